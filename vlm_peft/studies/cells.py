"""Cells: runs of the recipe in processes of their own, each with its folder, side by side, kept when they are finished.

Stage: below compare and tune, which say what the cells are; `python -m vlm_peft.studies.cells train FOLDER` is one.
A cell locks its folder while it runs. A study that is killed loses nothing that its cells finish without it, and the
next one waits for what still runs.
"""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

from ..console import quiet_imports, run_script
from ..data.arguments import DataArguments
from ..evaluation.records import read_all_scores, read_predictions, write_text
from ..json_files import read_json
from ..tasks import TASKS
from ..training.arguments import keeps_features, parse_arguments
from ..training.options import read_config

OPTIONS_FILE = "options.yaml"
OUTCOME_FILE = "cell.json"
LOG_FILE = "log.txt"
_LOCK_FILE = ".lock"
PROGRAM = [sys.executable, "-m"]
"""How the process of a cell is started; a module and its arguments follow."""
NOT_OF_A_CELL = ("output_dir", "resume_from_checkpoint", "push_to_hub", "config", "stages")
"""Options that a study sets for its cells, or that it does not know how to score."""
_ENCODING = (
    "mixture",
    "vision_model",
    "vision_revision",
    "vision_feature_layer",
    "image_size",
    "keep_class_token",
    "feature_dtype",
    "feature_cache_dir",
    *(each.name for each in fields(DataArguments) if each.name != "train_limit"),
)
"""Options that decide which pictures are encoded, and how; of a `train_limit` the largest holds the others."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        folder (`Path`): Where its options, its log and all that the recipe writes are.
        options (`dict`): Of the recipe, without the folder.
        kind (`str`, *optional*, defaults to `"train"`): Or `"untrained"`: the model as joined is scored.
        shots (`int`, *optional*, defaults to 0): Solved examples before each question, for an untrained one.
    """

    folder: Path
    options: dict[str, Any]
    kind: str = "train"
    shots: int = 0

    @property
    def name(self) -> str:
        """That of the folder."""
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        """Whether it ran to its end."""
        return (self.folder / OUTCOME_FILE).is_file()


def read_keys(path: str, kind: type, required: Sequence[str], output_dir: str | None) -> dict[str, Any]:
    """The keys of a study's YAML file.

    Args:
        path (`str`): Of the file.
        kind (`type`): Dataclass whose fields are the keys that there are.
        required (`Sequence[str]`): Keys that must be there.
        output_dir (`str`, *optional*): In place of the file's.

    Raises:
        OSError: When it cannot be read.
        ValueError: When a key is unknown or missing, or a name is none; names it.
    """
    given = read_config(path) | ({"output_dir": output_dir} if output_dir else {})
    names = [each.name for each in fields(kind)]
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}, expected {', '.join(names)}.")
    if missing := [name for name in required if not given.get(name)]:
        raise ValueError(f"{path}: {missing[0]} is missing or empty.")
    for name in {"output_dir", "split", "metric"} & given.keys():
        if given[name] is not None and (not isinstance(given[name], str) or "\0" in given[name]):
            raise ValueError(f"{path}: {name}: expected text, got {given[name]!r}.")
    # A part of a metric has its kind in brackets. What a run scores is known only when it has ended.
    metrics = [metric.name for kind in TASKS.values() for metric in kind.metrics]
    if given.get("metric") is not None and given["metric"].partition("[")[0] not in metrics:
        known = ", ".join(dict.fromkeys(metrics))
        raise ValueError(f"{path}: metric: {given['metric']!r} is no metric of any task; there are {known}.")
    return given


def read_base(base: Any) -> dict[str, Any]:
    """Options of the recipe that all cells share.

    Args:
        base (`str` or `dict`): A YAML file of the recipe, or its options themselves.

    Raises:
        OSError: When there is no such file.
        ValueError: When it is neither.
    """
    if isinstance(base, str):
        return read_config(base)
    if not isinstance(base, dict) or not base:
        raise ValueError(f"base: expected a YAML file of the recipe or its options, got {base!r}.")
    return dict(base)


def prepare(cells: Sequence[Cell], program: str) -> None:
    """Writes each cell's options and checks them all as the recipe does, before anything runs.

    Args:
        cells (`Sequence[Cell]`): Of a study.
        program (`str`): Put before messages.

    Raises:
        SystemExit: For options that the recipe would refuse; names the cell.
        ValueError: When a cell's folder is of other options.
    """
    for cell in cells:
        refused = [name for name in NOT_OF_A_CELL if name in cell.options]
        if refused:
            raise ValueError(
                f"{cell.name}: {refused[0]} is set by the study, or has no place in one of its runs: leave it out."
            )
        wanted = {**cell.options, "output_dir": str(cell.folder)}
        file = cell.folder / OPTIONS_FILE
        if file.is_file() and (there := read_config(str(file))) != wanted:
            names = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
            shown = "; ".join(f"{name}: {there.get(name)} there, {wanted.get(name)} here" for name in names)
            raise ValueError(f"{cell.folder} is of other options ({shown}): delete it, or choose another output_dir.")
        write_text(file, yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))
        parse_arguments(["--config", str(file)], program=f"{program}: {cell.name}")


def encode_once(cells: Sequence[Cell], folder: Path) -> None:
    """Encodes the pictures of all cells that are not finished, in a process of its own, so that no cell has to.

    Args:
        cells (`Sequence[Cell]`): Of a study, prepared.
        folder (`Path`): Gets the log.

    Raises:
        ValueError: When the data or a base cannot be read; with the last line of the log.
    """
    waiting = [cell for cell in cells if not cell.is_finished]
    if waiting:
        failure = start(["features", *(str(cell.folder) for cell in waiting)], folder / "encode_pictures.txt")
        if failure is not None:
            raise ValueError(f"Nothing was trained: {failure}")


def run_cells(cells: Sequence[Cell], *, jobs: int = 1, say: Callable[[str], None]) -> dict[str, str]:
    """Runs the cells that are not finished.

    Args:
        cells (`Sequence[Cell]`): Of a study, prepared.
        jobs (`int`, *optional*, defaults to 1): So many side by side.
        say (`Callable`): Is told of each that ends.

    Returns:
        `dict[str, str]`: Names of those that failed, with the last line that they printed.
    """
    failures: dict[str, str] = {}
    waiting = [cell for cell in cells if not cell.is_finished]
    done = len(cells) - len(waiting)
    if done:
        say(f"{done} of {len(cells)} runs are finished already.")
    slots: SimpleQueue[dict[str, str]] = SimpleQueue()
    for place in places(jobs):
        slots.put(place)

    def run(cell: Cell) -> tuple[Cell, str | None, float]:
        place, started = slots.get(), time.monotonic()
        try:
            asked = [cell.kind, str(cell.folder)] + ([str(cell.shots)] if cell.shots else [])
            return cell, start(asked, cell.folder / LOG_FILE, place), time.monotonic() - started
        finally:
            slots.put(place)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(run, cell) for cell in waiting]):
                cell, failure, seconds = future.result()
                done += 1
                if failure is not None:
                    failures[cell.name] = failure
                say(f"[{done}/{len(cells)}] {cell.name}: {failure or f'{seconds:.0f} s'}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def places(jobs: int) -> list[dict[str, str]]:
    """Environment of each of so many runs side by side: a device for each, or its share of the cores."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [name for name in given.split(",") if name] if given is not None else list(map(str, range(_devices())))
    if devices:
        return [{"CUDA_VISIBLE_DEVICES": devices[job % len(devices)]} for job in range(jobs)]
    if "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(jobs)]
    return [{"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))} for _ in range(jobs)]


def _devices() -> int:
    import torch

    return torch.cuda.device_count()


def start(arguments: list[str], log: Path, place: dict[str, str] | None = None, module: str = __name__) -> str | None:
    """Runs a module with arguments in a process of its own.

    Args:
        arguments (`list[str]`): Of its `main`.
        log (`Path`): Gets all that it prints, after what is there.
        place (`dict[str, str]`, *optional*): Added to its environment.
        module (`str`, *optional*): This one by default.

    Returns:
        `str`, *optional*: The last line that it printed, if it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*PROGRAM, module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | (place or {}),
        )
        status = process.wait()
    if status == 0:
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"ended with status {status}: {lines[-1] if lines else 'it printed nothing'} ({log})"


@contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock until the block or the process ends, however it ends.

    Args:
        file (`Path`): Is made; its content does not matter.
        wait (`bool`, *optional*, defaults to `True`): For another process to give it up.

    Yields:
        `bool`: Whether it is held.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def run_one(folder: Path, work: Callable[[list[str]], int]) -> int:
    """Runs a cell in this process, unless it is finished, and writes down that it is.

    Args:
        folder (`Path`): Of the cell.
        work (`Callable`): Command line -> exit status.

    Returns:
        `int`: The exit status.
    """
    with locked(folder / _LOCK_FILE):
        if (folder / OUTCOME_FILE).is_file():
            return 0
        started = time.monotonic()
        status = work(["--config", str(folder / OPTIONS_FILE), *_resume(folder)])
        if status == 0:
            seconds = time.monotonic() - started
            outcome = {"seconds": round(seconds, 1), "peak_bytes": _peak_bytes()}
            write_text(folder / OUTCOME_FILE, json.dumps(outcome, indent=2) + "\n")
        return status


def _resume(folder: Path) -> list[str]:
    """A cell that was killed goes on from its last whole checkpoint, if it has one."""
    from ..training.checkpoints import checkpoints_in, newest_whole

    if newest_whole(folder) is not None:
        return ["--resume_from_checkpoint", "true"]
    for path in checkpoints_in(folder):
        shutil.rmtree(path)
    return []


def _peak_bytes() -> int:
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def score_untrained(arguments: list[str], shots: int = 0) -> int:
    """Scores the model as it is before training, and what it says about other pictures than a row's own.

    Args:
        arguments (`list[str]`): Command line of the recipe.
        shots (`int`, *optional*, defaults to 0): Solved examples of the training split before each question.

    Returns:
        `int`: The exit status.
    """
    from ..data.splits import encode_pictures, leave_out
    from ..evaluation.few_shot import check_room, load_examples, with_examples
    from ..training import run as phases
    from ..training.data import load_held_out

    vision, training, model_args = parse_arguments(arguments, program="untrained")
    run = phases.Run(vision, training, model_args, command="untrained")
    model, processor = phases.load_bases(run)
    held_out = load_held_out(vision, model, processor)
    for name, split in held_out.items() if shots else ():
        count = shots * sum(1 for _ in split.questions())
        drawn = load_examples(
            split.data, vision.train_split or "train", processor, count=count, seed=vision.split_seed + training.seed
        )
        check_room(model, processor, with_examples(split, drawn, shots, training.seed), vision.max_new_tokens)
        cache = {"directory": vision.feature_cache_dir, "dtype": vision.feature_dtype}
        drawn = leave_out(encode_pictures(drawn, model, processor, **cache), "skip")
        held_out[name] = with_examples(split, drawn, shots, training.seed)
    phases.begin_results(run)
    phases.evaluate(run, model, processor, held_out, "-before")
    phases.evaluate(run, model, processor, {name: each for name, each in held_out.items() if each.is_blind}, "-blind")
    if run.unscored:
        raise ValueError("; ".join(run.unscored))
    return 0


def encode_pictures_of(folders: Iterable[Path]) -> int:
    """Fills the feature cache with all pictures of cells; each kind of features and data once.

    Args:
        folders (`Iterable[Path]`): Of prepared cells.

    Returns:
        `int`: The exit status.
    """
    from ..data.splits import encode_pictures
    from ..training import run as phases
    from ..training.data import load_held_out, parts

    parsed = [parse_arguments(["--config", str(folder / OPTIONS_FILE)], program=folder.name) for folder in folders]
    # No limit is the largest.
    parsed.sort(key=lambda each: each[0].train_limit or sys.maxsize, reverse=True)
    known: set[str] = set()
    for vision, training, model_args in parsed:
        key = json.dumps([getattr(vision, name) for name in _ENCODING], sort_keys=True, default=str)
        if key in known or vision.streaming or not keeps_features(vision):
            continue
        # Checkpoints of the cell are none of this run's.
        training.output_dir = os.devnull
        run = phases.Run(vision, training, model_args, command="features")
        model, processor = phases.load_bases(run)
        known.add(key)
        load_held_out(vision, model, processor)
        for part in parts(vision):
            if not part.is_held_out:
                split = part.load(processor)
                encode_pictures(split, model, processor, directory=vision.feature_cache_dir, dtype=vision.feature_dtype)
    return 0


def read_cell(cell: Cell) -> dict[str, Any]:
    """What a finished cell gave.

    Returns:
        `dict`: `summary` (run_summary.json, empty for an untrained model), `outcome` (`seconds` and `peak_bytes` of
        its process), and `scores`: split -> condition -> scores.json.

    Raises:
        ValueError, OSError: When its files cannot be read.
    """
    summary = cell.folder / "run_summary.json"
    return {
        "summary": read_json(summary) if summary.is_file() else {},
        "outcome": read_json(cell.folder / OUTCOME_FILE),
        "scores": read_all_scores(cell.folder),
    }


def read_rows(folder: Path, metric: str) -> dict[str, float]:
    """Id -> score of each row in a folder with predictions.jsonl; empty when the metric is none of single rows."""
    file = folder / "predictions.jsonl"
    if not file.is_file():
        return {}
    name = metric.lower()
    return {str(row["id"]): float(row[name]) for row in read_predictions(file) if name in row}


def main(arguments: Sequence[str]) -> int:
    """One process of a study: `train FOLDER`, `untrained FOLDER [SHOTS]` or `features FOLDER ...`; returns the exit
    status."""
    quiet_imports()
    kind, *folders = arguments
    if kind == "features":
        return encode_pictures_of(map(Path, folders))
    if kind == "untrained":
        shots = int(folders[1]) if len(folders) > 1 else 0
        return run_one(Path(folders[0]), lambda given: score_untrained(given, shots))
    from ..training.sft import main as train

    return run_one(Path(folders[0]), lambda given: train(given, program="sft.py", command="recipes/sft.py"))


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:]), "study"))
