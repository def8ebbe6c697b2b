"""Stages: several trainings one after the other, each of which starts from what the one before it has trained.

Stage: options of a YAML file with `stages` -> those of each training, checked before any of them begins; afterwards one
table and one page of all. Each stage is a run of its own in `output_dir/stage-NAME`.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..adapters.pissa import is_pissa
from ..console import table
from ..evaluation.records import read_all_scores, write_text
from ..evaluation.transfer import TRANSFER_FILE, compared, transfer_lines
from ..json_files import read_json
from ..model.configuration_vision_qwen import JOINT_FIELDS
from ..model.projector import ProjectorSettings
from ..report.pages import render
from ..report.report import primary_of
from .arguments import chosen_strategy, parse_arguments
from .checkpoints import check_same_run, checkpoints_in, newest_whole, run_record
from .setup import find_start, load_processor

_BASES = (
    *("vision_model", "vision_revision", "model_name_or_path", "model_revision"),
    *JOINT_FIELDS,
    *(each.name for each in fields(ProjectorSettings)),
)
"""What all stages have in common."""

_SUMMARY = "run_summary.json"


@dataclass(frozen=True)
class Stage:
    """One training.

    Args:
        name (`str`): Of its folder, `stage-NAME`.
        vision, training, model_args: Of [`~vlm_peft.training.arguments.parse_arguments`].
    """

    name: str
    vision: Any
    training: Any
    model_args: Any

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path(self.training.output_dir)


def parse_stages(
    arguments: Sequence[str], entries: list[dict[str, Any]], *, program: str = "sft.py", description: str | None = None
) -> list[Stage]:
    """Options of each stage, checked together.

    Args:
        arguments (`Sequence[str]`): The command line, with `--config` of a file that has `stages`.
        entries (`list[dict]`): These `stages`.
        program, description: Of [`~vlm_peft.training.arguments.parse_arguments`].

    Raises:
        SystemExit: For a stage whose options cannot be understood, that trains nothing, or that cannot go on from the
            one before it; names the stage.
    """
    found: list[Stage] = []
    if not entries:
        raise SystemExit(f"{program}: stages is empty: expected at least one entry with a name.")
    for number, entry in enumerate(entries, 1):
        where = f"{program}: stage {number}"
        if not isinstance(entry, dict):
            raise SystemExit(f"{where}: expected a mapping with a name and options, got {entry!r}.")
        options = dict(entry)
        name = options.pop("name", None)
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,99}", name):
            said = f"{name[:100]!r} of {len(name)}" if isinstance(name, str) else repr(name)
            raise SystemExit(f"{where}: expected a name of up to 100 letters, digits, dots and dashes, got {said}.")
        where += f" ({name})"
        if name in (each.name for each in found):
            raise SystemExit(f"{where}: an earlier stage has this name, too.")
        shared = sorted({*_BASES, "output_dir", "stages", "start_from", "env"} & options.keys())
        if shared:
            raise SystemExit(f"{where}: {shared[0]} is the same in all stages: give it at the top level.")
        parsed = parse_arguments(list(arguments), program=where, description=description, entry=options)
        stage = Stage(name, *parsed)
        stage.training.output_dir = str(stage.folder / f"stage-{name}")
        try:
            _check_stage(stage, found)
        except ValueError as error:
            raise SystemExit(f"{where}: {error}") from error
        found.append(stage)
    for stage in found[:-1]:
        stage.training.push_to_hub = False
    return found


def _check_stage(stage: Stage, before: list[Stage]) -> None:
    """What no single option shows.

    Raises:
        ValueError: For a stage that trains nothing, or cannot go on from those before it.
    """
    strategy = chosen_strategy(stage.vision, stage.model_args)
    rate = stage.training.learning_rate
    own = {"projector": stage.vision.projector_learning_rate}
    if strategy.encoder_trains:
        own["encoder"] = stage.vision.vision_learning_rate
    if strategy.lora or strategy.top_layers or strategy.trains_decoder:
        own["decoder"] = rate
    if not any(rate if each is None else each for each in own.values()):
        raise ValueError(
            f"it trains nothing: with --strategy {stage.vision.strategy} the rates of {', '.join(own)} are 0. Raise "
            "one, or leave the stage out."
        )
    if is_pissa(stage.vision.init_lora_weights):
        raise ValueError(
            "PiSSA takes its start out of the bases, which other stages need as they are: leave "
            "--init_lora_weights out."
        )
    if not before:
        return
    last = before[-1]
    if strategy.draws_decoder:
        raise ValueError(
            f"--strategy scratch draws the decoder anew, and would throw away what {last.name} has trained: put "
            "it first."
        )
    was_full = chosen_strategy(last.vision, last.model_args).trains_decoder
    if was_full and not strategy.trains_decoder:
        raise ValueError(
            f"{last.name} saves a whole model, on which no adapter can be put: give --strategy full here, or another "
            "there."
        )
    # What the first stage starts from.
    stage.vision.start_from = None
    # What scored the last stage has scored the start of this one.
    stage.vision.score_before = False
    if any(chosen_strategy(each.vision, each.model_args).encoder_trains for each in before):
        # The bases' features are those of no later stage.
        stage.vision.feature_cache = False


def check_bases(stages: list[Stage]) -> Path | None:
    """Compares what the stages train with the layers that their bases have; reads configurations only.

    Returns:
        `Path`: What the first stage starts from; `None` for the bases.

    Raises:
        ValueError: For more layers than there are; names the stage. For a start that the first stage cannot have.
        FileNotFoundError: When the start is not there.
    """
    first = stages[0]
    kept = first.vision.feature_cache
    start = find_start(first.vision, first.training, first.model_args)
    if kept and not first.vision.feature_cache:
        for stage in stages:
            stage.vision.feature_cache = False
    config: Any = None
    for stage in stages:
        strategy = chosen_strategy(stage.vision, stage.model_args)
        if config is None:
            _, config = load_processor(stage.vision, stage.model_args)
        parts = (("top_layers", config.text_config), ("vision_layers", config.vision_tower_config))
        for name, part in parts:
            wanted, depth = getattr(strategy, name), getattr(part, "num_hidden_layers", 0)
            if wanted > depth:
                raise ValueError(f"Stage {stage.name}: --{name} {wanted}, and {part.model_type} has {depth} layers.")
    return start


def run_stages(stages: list[Stage], train: Callable[[Stage, Path | None], int]) -> int:
    """Trains them one after the other; those that an earlier call has finished are passed over.

    Args:
        stages (`list[Stage]`): Of [`parse_stages`].
        train (`Callable`): A stage, and the folder that it starts from -> exit status.

    Returns:
        `int`: The exit status of the stage that a signal stopped, and 0 otherwise.

    Raises:
        ValueError: When a finished stage had other options.
        FileExistsError: When the output folder has stages of an earlier call that should not go on.
    """
    goes_on = str(stages[0].training.resume_from_checkpoint).lower() not in ("false", "none", "")
    there = [stage for stage in stages if (stage.folder / _SUMMARY).is_file() or checkpoints_in(stage.folder)]
    if there and not goes_on:
        raise FileExistsError(
            f"--output_dir {stages[0].folder.parent} holds {there[0].folder.name} of an earlier run: go on with "
            "--resume_from_checkpoint true, or choose another folder."
        )
    start = check_bases(stages)
    say = PartialState().print
    for number, stage in enumerate(stages, 1):
        is_done = goes_on and (stage.folder / _SUMMARY).is_file()
        trains = chosen_strategy(stage.vision, stage.model_args).described
        said = f"Stage {number} of {len(stages)}, {stage.name}: {trains}"
        if is_done:
            check_same_run(stage.folder, run_record(stage.vision, stage.training, stage.model_args, start=start))
            say(f"\n{said}; finished before.")
        else:
            say(f"\n{said}", flush=True)
            can_go_on = goes_on and newest_whole(stage.folder) is not None
            stage.training.resume_from_checkpoint = "true" if can_go_on else None
            status = train(stage, start)
            if status:
                return status
        start = stage.folder
    if PartialState().is_main_process:
        say(f"\n{report_stages(stages)}")
    return 0


def report_stages(stages: list[Stage]) -> str:
    """Writes `stages.json` and `report.html` of all stages beside their folders; returns the table as text."""
    folder = stages[0].folder.parent
    records = [_record(stage) for stage in stages]
    metrics = list(dict.fromkeys(name for record in records for name in record["scores"]))
    lines = [["stage", "trains", "weights", "steps", "seconds", *metrics]]
    for record in records:
        scores = [f"{record['scores'][name]:.3f}" if name in record["scores"] else "-" for name in metrics]
        numbers = [f"{record['trained']:,}", f"{record['steps']:,}", f"{record['seconds']:.0f}"]
        lines.append([record["stage"], record["trains"], *numbers, *scores])
    write_text(folder / "stages.json", json.dumps(records, indent=2) + "\n")
    rows = _transfer(stages)
    write_text(folder / TRANSFER_FILE, json.dumps(rows, indent=2) + "\n")
    transfer = transfer_lines(rows) if rows else []
    links = [f"{stage.folder.name}/report.html" for stage in stages]
    page = render("stages.html.jinja", title=folder.name, lines=lines, links=links, transfer=transfer)
    write_text(folder / "report.html", page)
    gained = f"\nGained and lost from the first stage that scored it to the last:\n{table(transfer)}\n" if rows else ""
    return f"{table(lines)}\n{gained}\nmodel    {stages[-1].folder}\nreport   {folder / 'report.html'}"


def _transfer(stages: list[Stage]) -> list[dict[str, Any]]:
    """What was scored before one stage and after another one, such as the data sets that all of them watch."""
    before: dict[str, Path] = {}
    after: dict[str, Path] = {}
    for stage in stages:
        for file in sorted(stage.folder.glob("eval/*/scores.json")):
            name = file.parent.name
            if name.endswith("-before"):
                before.setdefault(name.removesuffix("-before"), file.parent)
            else:
                after[name] = file.parent
    return [
        compared(before[name], folder, name)
        for name, folder in after.items()
        if name in before and before[name].parents[1] != folder.parents[1]
    ]


def _record(stage: Stage) -> dict[str, Any]:
    summary = read_json(stage.folder / _SUMMARY)
    history = read_json(stage.folder / "log_history.json", list)
    scores = {}
    for split, conditions in read_all_scores(stage.folder).items():
        metric = primary_of(conditions)
        scores[f"{split} {metric}"] = conditions["after"]["metrics"][metric]
    return {
        "stage": stage.name,
        "strategy": summary["strategy"],
        "trains": summary["trains"],
        "trained": summary["trainable_parameters"],
        "steps": max((entry.get("step", 0) for entry in history), default=0),
        "seconds": summary["seconds"]["train"],
        "scores": scores,
    }
