"""Tune: a search over the recipe's options, run by run, on a validation split; then one run with the best.

Stage: the recipe behind `recipes/tune.py`. Optuna stays outside the trainer: each trial is a run of the recipe in a
process and a folder of its own. Trials are told in a journal file, under the lock of whoever has them; one whose
process was killed is taken up again under its own number, so none is lost and none is counted twice.
"""

import argparse
import difflib
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from transformers import TrainerCallback

from ..console import quiet_imports, run_script, table
from ..data.splits import drawn_shares
from ..evaluation.records import write_text
from ..json_files import read_json
from ..metrics.significance import paired_difference
from ..report.charts import Measured, curve_chart
from ..report.explained import digits
from ..report.pages import render
from ..tasks import TASKS
from ..training.arguments import VisionArguments, parse_arguments
from ..training.options import typed
from ..training.sft import main as train
from .cells import (
    NOT_OF_A_CELL,
    OPTIONS_FILE,
    Cell,
    encode_once,
    locked,
    places,
    prepare,
    read_base,
    read_cell,
    read_keys,
    read_rows,
    run_one,
    start,
)

STUDY = "search"
SAMPLERS = ("tpe", "random")
PRUNERS = ("none", "median", "hyperband", "halving")
_PRUNED_FILE = "pruned.json"
_OWN = (
    *NOT_OF_A_CELL,
    "eval_splits",
    "blind_splits",
    "score_before",
    "train_split",
    "split_seed",
    "mixture",
    "dataset_name",
    "dataset_revision",
    "stored_split",
    "split_column",
    "eval_limit",
    "task",
    "image_column",
    "text_column",
)
"""Options that the search sets for its trials, or that say on which data they are compared."""


@dataclass
class TuneOptions:
    """Keys of a search's YAML file.

    Args:
        base (`str` or `dict`): A YAML file of the recipe, or its options.
        search (`dict`): Option -> a list of choices, or `{low, high}` with `log: true` or `step` if wanted.
        output_dir (`str`): Gets the journal, a folder for each trial, the page and the best options.
        options (`dict`, *optional*): Put over the base for all trials and for the last run.
        trial_options (`dict`, *optional*): Put over those for trials only, which may be shorter than the last run.
        start (`dict`, *optional*): Values of the first trial.
        trials (`int`, *optional*, defaults to 20): That are run, with failed and pruned ones.
        sampler (`str`, *optional*, defaults to `"tpe"`): Or `"random"`.
        pruner (`str`, *optional*, defaults to `"none"`): Or `"median"`, `"hyperband"`, `"halving"`: on the scores that
            `eval_samples` gives during training.
        validation (`float` or `str`, *optional*, defaults to 0.1): Share of the training split that is held back, or
            a split that there is.
        metric (`str`, *optional*): By default the one that stands for the task; the larger, the better.
        seed (`int`, *optional*, defaults to 0): Of the sampler and of what is held back.
    """

    base: Any
    search: dict[str, Any]
    output_dir: str
    options: dict[str, Any] = field(default_factory=dict)
    trial_options: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    trials: int = 20
    sampler: str = "tpe"
    pruner: str = "none"
    validation: float | str = 0.1
    metric: str | None = None
    seed: int = 0


def read_search(path: str, output_dir: str | None = None) -> TuneOptions:
    """Reads a search's YAML file.

    Args:
        path (`str`): Of the file.
        output_dir (`str`, *optional*): In place of the file's.

    Raises:
        OSError: When it cannot be read.
        ValueError: When a key is unknown, missing, or of another kind; names it.
    """
    given = read_keys(path, TuneOptions, ("base", "search", "output_dir"), output_dir)
    for name in ("search", "options", "trial_options", "start"):
        found = given.get(name, {})
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise ValueError(f"{path}: {name}: expected names with values, got {found!r}.")
    options = TuneOptions(**given)
    for name, choices in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if getattr(options, name) not in choices:
            raise ValueError(f"{path}: {name} is {getattr(options, name)!r}, expected one of {', '.join(choices)}.")
    for name, least in (("trials", 1), ("seed", 0)):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{path}: {name}: expected a whole number of at least {least}, got {value!r}.")
    share = options.validation
    is_share = not isinstance(share, bool) and isinstance(share, int | float) and 0 < share < 1
    if not is_share and not (isinstance(share, str) and share.strip()):
        raise ValueError(f"{path}: validation: expected a share above 0 and below 1, or a split, got {share!r}.")
    if twice := sorted(options.search.keys() & options.trial_options.keys()):
        raise ValueError(f"{path}: {twice[0]} is searched: take it out of trial_options.")
    return options


def distributions(options: TuneOptions) -> dict[str, optuna.distributions.BaseDistribution]:
    """The search space.

    Raises:
        ValueError: For an option that the recipe does not have, or a range that cannot be; names it.
    """
    from trl import ModelConfig, SFTConfig

    kinds = (VisionArguments, SFTConfig, ModelConfig)
    known = {each.name for kind in kinds for each in fields(kind)}
    found: dict[str, optuna.distributions.BaseDistribution] = {}
    for name, space in options.search.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"search: unknown option {name!r}" + (f" (did you mean {near[0]!r}?)." if near else "."))
        if name in _OWN:
            raise ValueError(f"search: {name} decides what trials are compared on, and cannot be searched.")
        found[name] = _distribution(name, space, partial(_as_option, name, kinds))
    for name, value in options.start.items():
        if name not in found:
            raise ValueError(f"start: {name} is not searched, expected some of {', '.join(found)}.")
        if not _holds(found[name], value):
            raise ValueError(f"start: {name} is {value!r}, which is outside its range {options.search[name]}.")
    return found


def _as_option(name: str, kinds: Sequence[type], value: Any) -> Any:
    try:
        return typed({name: value}, kinds)[name]
    except ValueError as error:
        raise ValueError(f"search: {error}") from error


def _holds(space: Any, value: Any) -> bool:
    """Whether a value can be drawn."""
    if isinstance(space, optuna.distributions.CategoricalDistribution):
        return repr(value) in map(repr, space.choices)
    if isinstance(value, bool) or not isinstance(value, int | float) or not space.low <= value <= space.high:
        return False
    is_whole = isinstance(space, optuna.distributions.IntDistribution)
    return not (is_whole and isinstance(value, float)) and (
        space.step is None or _divides(space.step, value - space.low)
    )


def _divides(step: float, width: float) -> bool:
    return abs(width / step - round(width / step)) < 1e-6


def _distribution(name: str, space: Any, as_option: Callable[[Any], Any]) -> optuna.distributions.BaseDistribution:
    if isinstance(space, list):
        scalar = all(value is None or isinstance(value, bool | int | float | str) for value in space)
        # '2' and 2 are one choice, as the recipe reads them.
        if len(space) < 2 or not scalar or len({repr(as_option(value)) for value in space}) < len(space):
            raise ValueError(f"search: {name}: expected two or more different choices, got {space}.")
        return optuna.distributions.CategoricalDistribution(space)
    keys = set(space) if isinstance(space, dict) else set()
    if not {"low", "high"} <= keys <= {"low", "high", "log", "step"}:
        raise ValueError(f"search: {name}: expected a list, or low and high with log or step, got {space!r}.")
    numbers = [space["low"], space["high"], space.get("step", 1)]
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n) for n in numbers):
        raise ValueError(f"search: {name}: expected numbers (a power of ten is written 1.0e-4), got {space}.")
    low, high, step = numbers
    is_whole = all(isinstance(number, int) for number in numbers)
    if not is_whole:
        # Of an option that counts, what is drawn would be refused in mid-search.
        as_option(0.5)
    if low >= high or step <= 0 or ("step" in space and step > high - low):
        raise ValueError(f"search: {name}: expected low below high, and a step that fits between, got {space}.")
    if "step" in space and not _divides(step, high - low):
        raise ValueError(f"search: {name}: expected a step that leads from low to high, got {space}.")
    is_log = space.get("log", False)
    if not isinstance(is_log, bool):
        raise ValueError(f"search: {name}: log: expected true or false, got {is_log!r}.")
    if is_log and (low <= 0 or "step" in space):
        raise ValueError(f"search: {name}: log: true needs low above 0, and no step, got {space}.")
    if is_whole:
        return optuna.distributions.IntDistribution(low, high, log=is_log, step=step)
    return optuna.distributions.FloatDistribution(low, high, log=is_log, step=space.get("step"))


def trial_cell(options: TuneOptions, name: str, values: dict[str, Any]) -> Cell:
    """A run that is scored on the validation split and reads no other held-out one.

    Raises:
        ValueError, OSError: When base and validation do not go together.
    """
    base = _base(options) | options.trial_options
    held: dict[str, Any] = {"blind_splits": [], "score_before": False}
    if isinstance(options.validation, str):
        held["eval_splits"] = [options.validation]
    else:
        held |= {"eval_splits": [f"{_train_split(base)}[{100 * options.validation:g}%]"], "split_seed": options.seed}
    return Cell(Path(options.output_dir) / "trials" / name, {**base, **values, **held})


def best_cell(options: TuneOptions, values: dict[str, Any]) -> Cell:
    """The one run on the whole training split that the base's own held-out splits are scored with."""
    base = _base(options) | values
    asked = base.get("eval_splits", ["test"])
    splits = [split for split in (asked if isinstance(asked, list) else [asked]) if split != options.validation]
    return Cell(Path(options.output_dir) / "best", {**base, "eval_splits": splits})


def _train_split(base: dict[str, Any]) -> str:
    return base.get("train_split") or "train"


def _base(options: TuneOptions) -> dict[str, Any]:
    base = read_base(options.base) | options.options
    base.pop("output_dir", None)
    if base.get("mixture"):
        raise ValueError(
            "base: a search over a mixture is not possible: its data sets have held-out splits of their own."
        )
    asked = base.get("eval_splits", ["test"])
    asked = asked if isinstance(asked, list) else [asked]
    if drawn_shares(map(str, asked), _train_split(base)):
        raise ValueError(
            "base: what is scored at the end is drawn from the training split: make it a split of its own."
        )
    if isinstance(options.validation, str) and (options.validation.startswith("test") or asked == [options.validation]):
        raise ValueError(
            f"validation: {options.validation} is what the last run is scored on: name another split, or a share of "
            "the training split."
        )
    return base


def check_bounds(options: TuneOptions, space: dict[str, optuna.distributions.BaseDistribution], program: str) -> None:
    """Parses the recipe's options at both ends of each range and at each choice, as trials and the last run have them.

    Raises:
        SystemExit: For values that the recipe refuses, in a trial or in the last run.
        ValueError: For a metric that the task does not have, and a pruner without scores.
    """
    for name, distribution in space.items():
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            values: tuple = distribution.choices
        else:
            values = (distribution.low, distribution.high)
        for value in values:
            of_last = best_cell(options, {name: value})
            of_trial = trial_cell(options, "check", {name: value})
            for cell in (of_last, of_trial):
                file = Path(options.output_dir) / "check.yaml"
                write_text(file, yaml.safe_dump({**cell.options, "output_dir": str(cell.folder)}))
                said = f"{program}: search: {name}: {value}"
                vision, training, _ = parse_arguments(["--config", str(file)], program=said)
                file.unlink()
            metrics = [metric.name for metric in TASKS[vision.task].metrics]
            if options.metric is not None and options.metric.partition("[")[0] not in metrics:
                raise ValueError(
                    f"metric: {options.metric} is none of the task {vision.task}; it has {', '.join(metrics)}."
                )
            if options.pruner != "none" and training.eval_strategy == "no":
                raise ValueError(
                    f"pruner: {options.pruner} reads the scores during training, and there are none: set eval_strategy "
                    "and eval_steps, for example in trial_options."
                )


def open_study(options: TuneOptions) -> optuna.Study:
    """The study in the journal of `output_dir`; begun if there is none.

    Raises:
        ValueError: When the journal is of another search.
    """
    folder = Path(options.output_dir)
    asked = {name: getattr(options, name) for name in ("search", "validation", "seed", "metric", "start")}
    asked |= {"options": options.options | options.trial_options, "base": read_base(options.base)}
    asked = json.loads(json.dumps(asked, default=str))
    with locked_journal(options):
        storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
        study = optuna.create_study(
            storage=storage, study_name=STUDY, direction="maximize", pruner=_pruner(options), load_if_exists=True
        )
        there = study.user_attrs.get("asked")
        if there is None:
            if options.start:
                study.enqueue_trial(options.start)
            study.set_user_attr("asked", asked)
        elif there != asked:
            names = [name for name in asked if there.get(name) != asked[name]]
            raise ValueError(
                f"{folder} holds a search that differs in {', '.join(names)}: delete it, or choose another output_dir."
            )
    return study


def _pruner(options: TuneOptions) -> optuna.pruners.BasePruner:
    return {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "halving": optuna.pruners.SuccessiveHalvingPruner,
    }[options.pruner]()


@contextmanager
def locked_journal(options: TuneOptions) -> Iterator[None]:
    """One process at a time decides which trial comes next."""
    with locked(Path(options.output_dir) / ".claim.lock"):
        yield


@contextmanager
def claim(study: optuna.Study, options: TuneOptions, space: dict[str, Any]) -> Iterator[tuple[int, Cell] | None]:
    """The next trial, which is ours until the block ends: one that a killed process left, or a new one.

    Yields:
        `tuple[int, Cell]`, *optional*: Its number and run; `None` when all trials are taken.
    """
    folder = Path(options.output_dir) / "trials"
    with ExitStack() as held:
        found = None
        with locked_journal(options):
            trials = study.get_trials(deepcopy=False)
            for left in (trial for trial in trials if trial.state == TrialState.RUNNING):
                if not held.enter_context(locked(folder / f"{left.number:04d}" / ".owner", wait=False)):
                    continue
                # Its owner may have told its end since the journal was read, and let go of it.
                if study.get_trials(deepcopy=False)[left.number].state == TrialState.RUNNING:
                    found = optuna.Trial(study, left._trial_id)
                    break
            begun = [trial for trial in trials if trial.state != TrialState.WAITING]
            if found is None and len(begun) < options.trials:
                # Anew for each trial, so that processes beside each other do not draw the same.
                study.sampler = _sampler(options, len(begun))
                found = study.ask()
                held.enter_context(locked(folder / f"{found.number:04d}" / ".owner"))
            # What a killed process had not drawn yet is drawn here, and the rest stays.
            values = {} if found is None else {name: found._suggest(name, each) for name, each in space.items()}
        yield None if found is None else (found.number, trial_cell(options, f"{found.number:04d}", values))


def _sampler(options: TuneOptions, number: int) -> optuna.samplers.BaseSampler:
    seed = (options.seed * 100_003 + number) % 2**32
    if options.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, constant_liar=True)


def run_trials(study: optuna.Study, options: TuneOptions, space: dict[str, Any], program: str, jobs: int) -> None:
    """Runs trials until there are as many as asked for, so many side by side."""

    def work(place: dict[str, str]) -> None:
        while True:
            with claim(study, options, space) as claimed:
                if claimed is None:
                    return
                number, cell = claimed
                arguments = [str(cell.folder), options.output_dir, str(number), options.pruner]
                failure: str | None = None
                try:
                    prepare([cell], program)
                except SystemExit as error:
                    # Each value is allowed, and those that were drawn together are not.
                    failure = str(error)
                else:
                    if not cell.is_finished:
                        failure = start(arguments, cell.folder / "log.txt", place, __name__)
                print(f"trial {number}: {tell(study, options, number, cell, failure)}", flush=True)

    jobs = min(jobs, options.trials)
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(work, place) for place in places(jobs)]:
            future.result()


def tell(study: optuna.Study, options: TuneOptions, number: int, cell: Cell, failure: str | None) -> str:
    """Tells the journal how a trial ended; returns it in words."""
    if (cell.folder / _PRUNED_FILE).is_file():
        study.tell(number, state=TrialState.PRUNED)
        return "pruned"
    if failure is None:
        metric, value = validation_score(options, cell)
        if math.isfinite(value):
            study.tell(number, value)
            return f"{metric} {value:.3f}"
        failure = f"{metric} is {value}"
    study.tell(number, state=TrialState.FAIL)
    return f"failed: {failure}"


def validation_score(options: TuneOptions, cell: Cell) -> tuple[str, float]:
    """Metric and value of a finished trial.

    Raises:
        ValueError: When there is no such metric; names those that there are.
    """
    (scores,) = [conditions["after"] for conditions in read_cell(cell)["scores"].values() if "after" in conditions]
    metric = options.metric or scores["primary"]
    if metric not in scores["metrics"]:
        raise ValueError(f"metric: {metric!r} is not scored; there are {', '.join(scores['metrics'])}.")
    return metric, float(scores["metrics"][metric])


class _Pruned(Exception):
    """Ends a trial that is worse than others were at its step."""


class ReportScores(TrainerCallback):
    """Tells the journal each score of the run, and ends the run when the pruner says so.

    Args:
        study (`optuna.Study`): Of the trial.
        number (`int`): Of the trial.
    """

    def __init__(self, study: optuna.Study, number: int):
        self._study = study
        self._trial = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        """After the trainer has scored."""
        name = f"eval_{str(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if name not in (metrics or {}):
            return
        value = metrics[name] * (-1 if name == "eval_loss" else 1)
        trial = optuna.Trial(self._study, self._trial._trial_id)
        # A run that goes on from a checkpoint may have told this step already.
        if state.global_step not in self._study.get_trials(deepcopy=False)[trial.number].intermediate_values:
            trial.report(value, state.global_step)
        if trial.should_prune():
            raise _Pruned


def run_trial(folder: Path, output_dir: str, number: int, pruner: str) -> int:
    """One trial in this process; returns the exit status."""
    options = TuneOptions({}, {}, output_dir, pruner=pruner)
    callbacks = []
    if pruner != "none":
        storage = JournalStorage(JournalFileBackend(str(Path(output_dir) / "journal.log")))
        study = optuna.load_study(study_name=STUDY, storage=storage, pruner=_pruner(options))
        callbacks = [ReportScores(study, number)]

    def work(arguments: list[str]) -> int:
        try:
            return train(arguments, program="tune.py", command="recipes/sft.py", callbacks=callbacks)
        except _Pruned:
            write_text(folder / _PRUNED_FILE, "{}\n")
            return 0

    return run_one(folder, work)


def summarize(study: optuna.Study, options: TuneOptions) -> dict[str, Any]:
    """Trials, the best, what the start had, and how much each option mattered.

    Raises:
        ValueError: When no trial ended with a score.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
    whole = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not whole:
        raise ValueError(f"No trial in {options.output_dir} ended with a score: see trials/*/log.txt.")
    best = max(whole, key=lambda trial: (trial.value or 0.0, -trial.number))
    metric = validation_score(options, trial_cell(options, f"{best.number:04d}", best.params))[0]
    first = next((trial for trial in whole if trial.number == 0), None) if options.start else None
    compared = None
    if first is not None and first.number != best.number:
        rows = []
        for trial in (first, best):
            (folder,) = (Path(options.output_dir) / "trials" / f"{trial.number:04d}" / "eval").iterdir()
            rows.append(read_rows(folder, metric))
        shared = sorted(set(rows[0]) & set(rows[1]))
        if shared:
            compared = paired_difference([rows[0][row] for row in shared], [rows[1][row] for row in shared])
    importance: dict[str, float] = {}
    if len(whole) >= 4 and len({trial.value for trial in whole}) > 1:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        importance = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {
        "metric": metric,
        "trials": [
            {"number": each.number, "state": each.state.name.lower(), "value": each.value, "values": each.params}
            for each in trials
        ],
        "best": {"number": best.number, "value": best.value, "values": best.params},
        "start": None if first is None else {"number": first.number, "value": first.value, "values": first.params},
        "gain": None if compared is None else [compared.difference, *compared.interval],
        "importance": importance,
    }


def write_search(options: TuneOptions, found: dict[str, Any], test: dict[str, Any]) -> Path:
    """Writes tune.json and tune.html; best.yaml is there already.

    Args:
        options ([`TuneOptions`]): Of the search.
        found (`dict`): Of [`summarize`].
        test (`dict`): Split -> scores.json of the last run.

    Returns:
        `Path`: Of the page.
    """
    folder = Path(options.output_dir)
    metric = found["metric"]
    shown = {
        name: (score["metrics"].get(metric), (score.get("intervals") or {}).get(metric)) for name, score in test.items()
    }
    write_text(folder / "tune.json", json.dumps({**found, "test": shown}, indent=2) + "\n")
    whole = [trial for trial in found["trials"] if trial["state"] == "complete"]
    so_far = [max(each["value"] for each in whole[: index + 1]) for index in range(len(whole))]
    history = {
        "trial": [Measured(each["number"], each["value"]) for each in whole],
        "best so far": [Measured(each["number"], value) for each, value in zip(whole, so_far, strict=True)],
    }
    figures = [("history", curve_chart(f"{metric} of each trial", "trial", history, is_log=False))]
    choices: dict[str, list[tuple[Any, int, float, float]]] = {}
    for name, space in options.search.items():
        if isinstance(space, list):
            for choice in space:
                values = [each["value"] for each in whole if each["values"][name] == choice]
                if values:
                    choices.setdefault(name, []).append((choice, len(values), fmean(values), max(values)))
            continue
        points = {name: [Measured(each["values"][name], each["value"]) for each in whole]}
        drawn = curve_chart(f"{metric} by {name}", name, points, is_log=bool(space.get("log")), is_joined=False)
        figures.append((name, drawn))
    page = render(
        "tune.html.jinja",
        title=f"{folder.name}: {', '.join(options.search)}",
        metric=metric,
        digits=digits(metric),
        found=found,
        advice=describe(options, found, shown),
        figures=figures,
        choices=choices,
        best=(folder / "best.yaml").read_text(encoding="utf-8"),
        names=list(options.search),
    )
    write_text(folder / "tune.html", page)
    return folder / "tune.html"


def describe(options: TuneOptions, found: dict[str, Any], test: dict[str, Any]) -> list[str]:
    """What the search found, in sentences."""
    metric, best = found["metric"], found["best"]
    where = f"the split {options.validation}" if isinstance(options.validation, str) else "rows held back from training"
    values = ", ".join(f"{name} {_shown(value)}" for name, value in best["values"].items())
    said = [
        f"Trial {best['number']} of {len(found['trials'])} is the best on {where}: {metric} {best['value']:.3f} "
        f"({values})."
    ]
    if found["start"] is not None:
        if found["gain"] is None:
            said.append(f"No trial was better than the start, {metric} {found['start']['value']:.3f}.")
        else:
            gain, low, high = found["gain"]
            is_sure = "" if low > 0 else ": that cannot be told from none"
            said.append(
                f"The start had {found['start']['value']:.3f}; the difference is {gain:+.3f} [{low:.3f}, {high:.3f}] "
                f"over the same rows{is_sure}. The best of many is flattered by the rows that it was chosen on."
            )
    for name, (value, interval) in test.items():
        if value is not None:
            spread = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
            said.append(f"Trained once more on all training rows, it scores {metric} {value:.3f}{spread} on {name}.")
    return said


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str], program: str = "tune.py") -> int:
    """Runs the trials that are missing, trains with the best, and writes the page.

    Args:
        arguments (`Sequence[str]`): `--config FILE.yaml [--jobs N] [--output_dir FOLDER]`.
        program (`str`, *optional*): Put before messages.

    Returns:
        `int`: The exit status; 1 when the last run failed.

    Raises:
        SystemExit: For options that are none.
        ValueError, OSError: For what is wrong with the search, its base or its data, before anything is trained.
    """
    parser = argparse.ArgumentParser(program, allow_abbrev=False, description="Search for the recipe's options.")
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="keys: see TuneOptions")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials side by side")
    parser.add_argument("--output_dir", metavar="FOLDER", help="in place of the file's")
    given = parser.parse_args(list(arguments))
    if given.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {given.jobs}")
    options = read_search(given.config, given.output_dir)
    space = distributions(options)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    check_bounds(options, space, program)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    study = open_study(options)
    if sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)) < options.trials:
        pictures = trial_cell(options, "pictures", options.start)
        prepare([pictures], program)
        encode_once([pictures], folder)
        run_trials(study, options, space, program, given.jobs)
    found = summarize(study, options)
    last = best_cell(options, found["best"]["values"])
    prepare([last], program)
    write_text(folder / "best.yaml", (last.folder / OPTIONS_FILE).read_text(encoding="utf-8"))
    failure = None if last.is_finished else start(["train", str(last.folder)], last.folder / "log.txt")
    if failure is not None:
        print(f"{program}: the run with the best options {failure}", file=sys.stderr)
        return 1
    scores = {name: each["after"] for name, each in read_cell(last)["scores"].items() if "after" in each}
    page = write_search(options, found, scores)
    print(table([("option", "importance"), *((name, f"{value:.2f}") for name, value in found["importance"].items())]))
    shown = read_json(folder / "tune.json")["test"]
    print("\n" + "\n".join(describe(options, found, shown)))
    print(f"\noptions  {folder / 'best.yaml'}\nadapter  {last.folder}\npage     {page}", flush=True)
    return 0


def _trial(arguments: Sequence[str]) -> int:
    quiet_imports()
    folder, output_dir, number, pruner = arguments
    return run_trial(Path(folder), output_dir, int(number), pruner)


if __name__ == "__main__":
    sys.exit(run_script(lambda: _trial(sys.argv[1:]), "trial"))
