"""Compare: strategies x amounts of data x seeds, one run each, one table, and what may be said about it.

Stage: the recipe behind `recipes/compare.py`: YAML -> cells -> study.csv, study.json and study.html.
"""

import argparse
import csv
import io
import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..evaluation.records import write_text
from ..json_files import read_json
from ..metrics.significance import bootstrap_interval, runs_mean
from ..report.charts import SERIES, Measured, curve_chart
from ..report.explained import digits
from ..report.pages import render
from .advice import Group, advise
from .cells import Cell, encode_once, prepare, read_base, read_cell, read_keys, read_rows, run_cells

NAMES = re.compile(r"[\w.+-]+")
"""What a strategy may be called: its runs' folders are."""

Row = dict[str, Any]
"""A line of the table."""

COLUMNS = (
    "strategy",
    "train_limit",
    "seed",
    "state",
    "pictures",
    "split",
    "metric",
    "score",
    "low",
    "high",
    "blind",
    "before",
    "trained_weights",
    "train_minutes",
    "minutes",
    "peak_gb",
    "folder",
    "error",
)
"""Of study.csv; the other splits' scores follow."""


@dataclass
class StudyOptions:
    """Keys of a study's YAML file.

    Args:
        base (`str` or `dict`): A YAML file of the recipe, or its options.
        strategies (`dict[str, dict]`): Name -> options that it sets; trained for each amount of data and each seed.
        output_dir (`str`): Gets the table, the page and a folder for each run.
        options (`dict`, *optional*): Put over the base for all.
        untrained (`dict[str, dict]`, *optional*): Name -> options, of rows without training: zero-shot, and few-shot
            with `shots`, the solved examples before each question.
        train_limits (`list[int]`, *optional*): First so many training rows; `null` is all of them, the default.
        seeds (`list[int]`, *optional*): By default the base's own.
        split (`str`, *optional*): That is compared on; the first that the base scores by default.
        metric (`str`, *optional*): By default the one that stands for the task.
        margin (`float`, *optional*): Of the metric, below which a difference does not matter; 5 % of the best.
    """

    base: Any
    strategies: dict[str, dict]
    output_dir: str
    options: dict[str, Any] = field(default_factory=dict)
    untrained: dict[str, dict] = field(default_factory=dict)
    train_limits: list[int | None] = field(default_factory=lambda: [None])
    seeds: list[int] = field(default_factory=list)
    split: str | None = None
    metric: str | None = None
    margin: float | None = None


def read_study(path: str, output_dir: str | None = None) -> StudyOptions:
    """Reads a study's YAML file.

    Args:
        path (`str`): Of the file.
        output_dir (`str`, *optional*): In place of the file's.

    Raises:
        OSError: When it cannot be read.
        ValueError: When a key is unknown, missing, or of another kind; names it.
    """
    given = read_keys(path, StudyOptions, ("base", "strategies", "output_dir"), output_dir)
    for name in ("strategies", "untrained", "options"):
        if not isinstance(given.get(name, {}), dict):
            raise ValueError(f"{path}: {name}: expected names with options, got {given[name]!r}.")
    for name in ("strategies", "untrained"):
        for key, options in given.get(name, {}).items():
            if not NAMES.fullmatch(str(key)):
                raise ValueError(f"{path}: {name}: expected a name of letters, digits and _.+-, got {key!r}.")
            # A name alone is a strategy that changes nothing.
            given[name][key] = {} if options is None else options
            if not isinstance(given[name][key], dict):
                raise ValueError(f"{path}: {name}: {key}: expected options, got {options!r}.")
    for key, options in given.get("untrained", {}).items():
        shots = options.get("shots", 0)
        if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
            raise ValueError(f"{path}: untrained: {key}: shots: expected a whole number from 0, got {shots!r}.")
    if twice := set(given["strategies"]) & set(given.get("untrained", {})):
        raise ValueError(f"{path}: {twice.pop()} is a name in strategies and in untrained.")
    for name, least in (("train_limits", 1), ("seeds", 0)):
        values = given.get(name, [0] if name == "seeds" else [None])
        given[name] = values = values if isinstance(values, list) else [values]
        kinds = [isinstance(value, int) and not isinstance(value, bool) and value >= least for value in values]
        if not values or not all(ok or (value is None and least) for ok, value in zip(kinds, values, strict=True)):
            raise ValueError(f"{path}: {name}: expected a list of whole numbers of at least {least}, got {values}.")
        if len(set(values)) < len(values):
            raise ValueError(f"{path}: {name}: {values} names one twice.")
    margin = given.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float) or not margin > 0):
        raise ValueError(f"{path}: margin: expected a number above 0, got {margin!r}.")
    return StudyOptions(**given)


@dataclass(frozen=True)
class Place:
    """Where a cell stands in the table."""

    strategy: str
    train_limit: int | None
    seed: int
    cell: Cell


def lay_out(study: StudyOptions) -> list[Place]:
    """The cells of a study: first untrained rows, then the amounts of data, each with all strategies and seeds.

    Raises:
        OSError, ValueError: When the base cannot be read, or does not score the split that is compared on.
    """
    base = read_base(study.base) | study.options
    scored = base.get("eval_splits")
    names = [str(each) for each in (scored if isinstance(scored, list) else [scored] if scored else [])]
    # Splits of mixtures, of what is watched, and parts of splits have names of their own.
    is_plain = names and not any(base.get(name) for name in ("mixture", "watch")) and "[" not in "".join(names)
    if study.split is not None and is_plain and study.split not in names:
        raise ValueError(f"split: {study.split!r} is not scored; eval_splits names {', '.join(names)}.")
    folder = Path(study.output_dir) / "cells"
    found = []
    for seed in study.seeds:
        for name, options in study.untrained.items():
            asked = {**_without_output(base), **options, "seed": seed}
            shots = asked.pop("shots", 0)
            # A folder of other examples is another one.
            own = folder / (f"{name}-shots{shots}-seed{seed}" if shots else f"{name}-seed{seed}")
            found.append(Place(name, None, seed, Cell(own, asked, "untrained", shots)))
    for limit in study.train_limits:
        for seed in study.seeds:
            for name, options in study.strategies.items():
                asked = {**_without_output(base), **options, "seed": seed}
                # A limit of the base's own stays where the study has none.
                asked |= {} if limit is None else {"train_limit": limit}
                cell = Cell(folder / f"{name}-{limit or 'all'}-seed{seed}", asked)
                found.append(Place(name, limit, seed, cell))
    return found


def _without_output(base: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in base.items() if name != "output_dir"}


def make_table(study: StudyOptions, places: Sequence[Place], failures: dict[str, str]) -> tuple[list[Row], list[Group]]:
    """Lines of the table, and the same runs grouped for what may be said about them.

    Args:
        study ([`StudyOptions`]): Names split and metric.
        places (`Sequence[Place]`): Of [`lay_out`].
        failures (`dict[str, str]`): Of [`~vlm_peft.studies.cells.run_cells`].

    Raises:
        ValueError: When a finished run has no such split or metric; names those that it has.
    """
    rows: list[Row] = []
    groups: dict[tuple[str, int | None], Group] = {}
    for place in places:
        row: Row = {"strategy": place.strategy, "train_limit": place.train_limit, "seed": place.seed}
        row |= {"folder": str(place.cell.folder)}
        rows.append(row)
        if not place.cell.is_finished:
            row |= {"state": "failed", "error": failures.get(place.cell.name, "not run")}
            continue
        read = read_cell(place.cell)
        split, metric = _measured(study, read["scores"], place.cell)
        is_trained = place.cell.kind == "train"
        condition = "after" if is_trained else "before"
        summary, outcome = read["summary"], read["outcome"]
        pictures = _pictures(summary, set(read["scores"])) if is_trained else None
        own = read["scores"][split][condition]
        low, high = (own.get("intervals") or {}).get(metric, (None, None))
        row |= {"state": "finished", "pictures": pictures, "split": split, "metric": metric}
        row |= {"score": own["metrics"][metric], "low": low, "high": high}
        row |= {name: _score(read["scores"][split].get(name), metric) for name in ("blind", "before")}
        row |= {
            "trained_weights": summary.get("trainable_parameters", 0),
            "train_minutes": round(summary.get("seconds", {}).get("train", 0) / 60, 3),
            "minutes": round(outcome["seconds"] / 60, 3),
            "peak_gb": round(outcome["peak_bytes"] / 1e9, 3),
        }
        scores = place.cell.folder / "eval"
        key = (place.strategy, place.train_limit)
        group = groups.setdefault(key, Group(place.strategy, pictures, [], trained_weights=row["trained_weights"]))
        group.runs.append(read_rows(scores / (split if is_trained else f"{split}-before"), metric))
        if blind := read_rows(scores / f"{split}-blind", metric):
            group.blind.append(blind)
        for name, conditions in read["scores"].items():
            if name == split or condition not in conditions:
                continue
            other = conditions[condition]
            stands = metric if metric in other["metrics"] else other.get("primary") or next(iter(other["metrics"]))
            row[f"{stands} on {name}"] = other["metrics"][stands]
            row[f"{stands} on {name}, before"] = _score(conditions.get("before"), stands) if is_trained else None
            before = read_rows(scores / f"{name}-before", stands) if is_trained else {}
            if before:
                pair = group.watched.setdefault(name, ([], []))
                pair[0].append(before)
                pair[1].append(read_rows(scores / name, stands))
    return rows, list(groups.values())


def _measured(study: StudyOptions, scores: dict[str, Any], cell: Cell) -> tuple[str, str]:
    """Split and metric that stand for a study."""
    if not scores:
        raise ValueError(f"{cell.folder} has no scores: name eval_splits in the base.")
    asked = cell.options.get("eval_splits") or []
    first = next(iter([asked] if isinstance(asked, str) else asked), None)
    # In a mixture each data set names its own.
    split = study.split or (first if first in scores else next(iter(scores)))
    if split not in scores:
        raise ValueError(f"{cell.folder} has no scores of the split {split!r}; it has {', '.join(scores)}.")
    own = next(reversed(scores[split].values())) if "after" not in scores[split] else scores[split]["after"]
    metric = study.metric or own.get("primary") or next(iter(own["metrics"]))
    if metric not in own["metrics"]:
        raise ValueError(f"{cell.folder} has no metric {metric!r}; it has {', '.join(own['metrics'])}.")
    return split, metric


def _score(summary: dict[str, Any] | None, metric: str) -> float | None:
    return None if summary is None else summary["metrics"].get(metric)


def _pictures(summary: dict[str, Any], held_out: set[str]) -> int:
    """Pictures trained on: of all data in the summary that are not held out."""
    return sum(data["pictures"] for name, data in summary["data"].items() if name not in held_out)


def describe(rows: Sequence[Row], groups: Sequence[Group]) -> list[Row]:
    """Groups as rows: mean of the runs, its interval, and what a run costs on average.

    With several runs the interval is that of [`~vlm_peft.metrics.significance.runs_mean`]; a single one has its own.
    """
    found = []
    for group in groups:
        members = [row for row in rows if row["state"] == "finished" and row["strategy"] == group.strategy]
        members = [row for row in members if row["pictures"] == group.pictures]
        values = [list(run.values()) for run in group.runs]
        interval: tuple[float | None, float | None] = (members[0]["low"], members[0]["high"])
        if len(values) > 1 and all(len(run) == len(values[0]) > 1 for run in values):
            interval = runs_mean(values).interval
        elif len(values) == 1 and values[0]:
            interval = bootstrap_interval(values[0])
        described: Row = {"strategy": group.strategy, "pictures": group.pictures, "runs": len(members)}
        described |= {"score": fmean(row["score"] for row in members), "low": interval[0], "high": interval[1]}
        described |= {"scores": [row["score"] for row in members]}
        for name in ("blind", "trained_weights", "train_minutes", "minutes", "peak_gb"):
            known = [row[name] for row in members if row[name] is not None]
            described[name] = fmean(known) if known else None
        others = {name for row in members for name in row if name not in COLUMNS}
        for name in sorted(others):
            known = [row[name] for row in members if row.get(name) is not None]
            if known:
                described[name] = fmean(known)
        found.append(described)
    return found


def write_study(study: StudyOptions, rows: Sequence[Row], groups: Sequence[Group]) -> Path:
    """Writes study.csv (a line for each run), study.json (runs, groups and advice) and study.html.

    Returns:
        `Path`: Of the page.
    """
    folder = Path(study.output_dir)
    described = describe(rows, groups)
    metric = next((row["metric"] for row in rows if row["state"] == "finished"), "")
    split = next((row["split"] for row in rows if row["state"] == "finished"), "")
    advice = advise(groups, metric, study.margin)
    columns = [*COLUMNS, *dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)]
    lines = io.StringIO()
    writer = csv.DictWriter(lines, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "study.csv", lines.getvalue())
    whole = {"metric": metric, "split": split, "advice": advice, "groups": described, "runs": list(rows)}
    write_text(folder / "study.json", json.dumps(whole, indent=2) + "\n")
    page = render(
        "study.html.jinja",
        title=f"{folder.name}: {', '.join(study.strategies)}",
        metric=metric,
        split=split,
        digits=digits(metric) if metric else 3,
        advice=advice,
        figures=_figures(described, metric, split),
        groups=described,
        others=[name for name in dict.fromkeys(name for row in described for name in row) if " on " in name],
        failed=[row for row in rows if row["state"] != "finished"],
        base=json.dumps(study.base) if isinstance(study.base, dict) else study.base,
        settings={
            name: ", ".join(f"{key}: {value}" for key, value in options.items()) or "as the base"
            for name, options in (study.strategies | study.untrained).items()
        },
    )
    write_text(folder / "study.html", page)
    return folder / "study.html"


def _figures(described: Sequence[Row], metric: str, split: str) -> list[dict[str, Any]]:
    """Charts with the names of their series: learning curves, costs, and the other data."""
    trained: dict[str, list[Row]] = {}
    for row in described:
        if row["pictures"]:
            trained.setdefault(row["strategy"], []).append(row)
    trained = {name: sorted(line, key=lambda row: row["pictures"]) for name, line in list(trained.items())[:SERIES]}
    levels = {row["strategy"]: row for row in described if row["pictures"] is None}
    levels = dict(list(levels.items())[: SERIES - len(trained)])
    if not trained:
        return []

    def series(x: str, y: str = "score") -> dict[str, list[Measured]]:
        return {
            name: [
                Measured(
                    row[x],
                    row[y],
                    (row["low"], row["high"]) if y == "score" and row["low"] is not None else None,
                    tuple(row["scores"]) if y == "score" else (),
                )
                for row in sorted(line, key=lambda row: row[x] or 0)
                if row.get(x) and row.get(y) is not None
            ]
            for name, line in trained.items()
        }

    def flat(y: str) -> dict[str, float]:
        return {name: row[y] for name, row in levels.items() if row.get(y) is not None}

    drawings = [(f"{metric} on {split} over pictures trained on", "pictures", "score", "pictures")]
    drawings += [(f"{metric} over minutes of training", "train_minutes", "score", "minutes")]
    drawings += [(f"{metric} over trained weights", "trained_weights", "score", "weights")]
    others = sorted({name for row in described for name in row if " on " in name and not name.endswith(", before")})
    drawings += [(f"{name} over pictures trained on", "pictures", name, "pictures") for name in others]
    return [
        {
            "title": title,
            "drawn": curve_chart(title.partition(" over ")[0], axis, line, flat(y)),
            "keys": list(enumerate([*line, *flat(y)])),
        }
        for title, x, y, axis in drawings
        if any((line := series(x, y)).values())
    ]


def main(arguments: Sequence[str], program: str = "compare.py") -> int:
    """Runs what is not finished of a study, and writes its table and page.

    Args:
        arguments (`Sequence[str]`): `--config FILE.yaml [--jobs N] [--output_dir FOLDER]`.
        program (`str`, *optional*): Put before messages.

    Returns:
        `int`: The exit status; 1 when a run failed.

    Raises:
        SystemExit: For options that are none.
        ValueError, OSError: For what is wrong with the study, its base or its data, before anything is trained.
    """
    parser = argparse.ArgumentParser(program, allow_abbrev=False, description="Train strategies side by side.")
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="keys: see StudyOptions")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs side by side, a device or cores for each"
    )
    parser.add_argument("--output_dir", metavar="FOLDER", help="in place of the file's")
    options = parser.parse_args(list(arguments))
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    study = read_study(options.config, options.output_dir)
    # A study that is told to end stops its runs, too; they leave checkpoints if the base saves any.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    places = lay_out(study)
    cells = [place.cell for place in places]
    prepare(cells, program)
    print(f"{len(cells)} runs in {study.output_dir}, {options.jobs} at a time", flush=True)
    encode_once(cells, Path(study.output_dir))
    failures = run_cells(cells, jobs=options.jobs, say=lambda text: print(text, flush=True))
    rows, groups = make_table(study, places, failures)
    page = write_study(study, rows, groups)
    print("\n" + "\n".join(read_json(page.parent / "study.json")["advice"]))
    print(f"\ntable    {page.with_suffix('.csv')}\npage     {page}", flush=True)
    return 1 if failures else 0
