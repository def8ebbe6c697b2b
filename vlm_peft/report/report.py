"""Build report.html, one page about a training run that needs nothing beside it: `python eval/report.py OUTPUT_DIR`.

It reads what the run wrote, all of it optional; what is missing is named in the page and never invented:

- `run_summary.json`, an object with any of `title`, `date`, `command`, `vision_model`, `text_model`, `dataset`,
  `device` (text), `seed`, `parameters`, `trainable_parameters` (whole numbers), `trained` (a list of `{"module",
  "parameters", "trainable", "dtype"}`), `seconds` (from the name of a phase to seconds), `versions` (from package to
  version), `adapter` (what to pass to `from_adapter`, by default the folder's name), `load` (its
  lines of code, where that is not how) and `notes` (a list of sentences);
- `log_history.json`, the trainer's list of log entries; used are `step`, `loss`, `eval_loss` and what was scored in
  training (`eval_CIDEr`, or `eval_test_CIDEr` for one of several sets);
- `eval/<split>/scores.json`, with `eval/<split>-before` and `eval/<split>-blind` beside it, see
  records.read_all_scores; splits of several tasks are shown task by task;
- `transfer.json`, what was gained and lost, see evaluation.transfer;
- `eval/<split>/predictions.jsonl` with each line's scores, for the gallery of the 12 best and 12 worst rows;
- `eval/<split>/pictures/*.webp`, the gallery's thumbnails, see gallery.save_gallery_pictures.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..evaluation.blind import blind_lines
from ..evaluation.records import CONDITIONS, Row, read_all_scores, read_predictions, write_text
from ..evaluation.transfer import TRANSFER_FILE, transfer_lines
from ..json_files import read_json
from ..metrics.boxes import parse_boxes
from .charts import Point, bar_chart, box_overlay, confusion_chart, finite_points, step_chart
from .explained import METRICS, digits, ranking
from .gallery import (
    Picture,
    Thumbnail,
    best_and_worst,
    choose_gallery,
    picture_path,
    references_of,
    save_gallery_pictures,
    thumbnail,
    true_boxes,
)
from .pages import loads_with, render

__all__ = ["build_report", "choose_gallery", "save_gallery_pictures"]

Summary = Mapping[str, Any]
"""What a scores.json holds."""

Scores = Mapping[str, Mapping[str, Summary]]
"""From a split and a condition to its scores.json."""

_NOTHING = "\u2013"
_CONTROLS = {"before": "the scores before training", "blind": "the blind control"}


def build_report(output_dir: Path | str, pictures: Mapping[tuple[str, Any], Picture] | None = None) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Args:
        output_dir: The run's folder; the module's text says what is read.
        pictures: From (split, id) to a picture, in place of the thumbnails in the folder.

    Raises:
        FileNotFoundError: if the folder has nothing to report.
        ValueError: if one of the files is not what it should be.
        OSError: if a picture cannot be read.
    """
    output_dir = Path(output_dir)
    summary = _read_json(output_dir / "run_summary.json", dict)
    log_history = _read_json(output_dir / "log_history.json", list)
    scores = read_all_scores(output_dir)
    if summary is None and log_history is None and not scores:
        raise FileNotFoundError(
            f"{output_dir}: nothing to report; expected run_summary.json, log_history.json or eval/<split>/scores.json"
        )
    log_history = log_history or []
    gallery = [found for split in scores if (found := _gallery(output_dir, split, scores[split], pictures))]
    missing = [] if summary is not None else ["run_summary.json: how and on what it was trained"]
    if not any(finite_points(log_history, key) for key in ("loss", "eval_loss")):
        missing.append("log_history.json: the loss curve")
    if scores:
        there = {condition for conditions in scores.values() for condition in conditions}
        missing += [
            f"scores.json of the condition {each}: {what}" for each, what in _CONTROLS.items() if each not in there
        ]
    else:
        missing.append("scores.json of any split: the scores")
    if not gallery:
        missing.append("pictures, or predictions.jsonl with each row's scores: the gallery")
    summary = summary or {}
    rendered = render(
        "report.html.jinja",
        title=str(summary.get("title") or output_dir.resolve().name),
        facts=_facts(summary),
        lead=_lead(scores),
        blind=blind_lines(output_dir),
        tasks=[_task(name, splits) for name, splits in by_task(scores).items()],
        made_by=_made_by(scores),
        figures=[*_bars(scores), *_curves(scores, log_history), *_confusions(output_dir, scores)],
        gallery=gallery,
        # The folder's name, not its path: a page that is passed on should not tell how somebody's disk is laid out.
        adapter=repr(str(summary.get("adapter") or output_dir.resolve().name)),
        loads_with=loads_with(summary),
        load=summary.get("load"),
        command=summary.get("command"),
        making=_making(summary),
        trained=[
            {key: each.get(key, "") for key in ("module", "parameters", "trainable", "dtype")}
            for each in summary.get("trained") or []
        ],
        notes=summary.get("notes") or [],
        transfer=transfer_lines(_read_json(output_dir / TRANSFER_FILE, list) or []),
        passed=_best_point(scores, log_history),
        missing=missing,
    )
    target = output_dir / "report.html"
    write_text(target, rendered)
    return target


def by_task(scores: Scores) -> dict[str, dict[str, Mapping[str, Summary]]]:
    """Return task -> split -> condition -> scores.json; scores without a task are of captions, all there once was."""
    tasks: dict[str, dict[str, Mapping[str, Summary]]] = {}
    for split, conditions in scores.items():
        task = next((str(s["task"]) for s in conditions.values() if s.get("task")), "caption")
        tasks.setdefault(task, {})[split] = conditions
    return tasks


def primary_of(conditions: Mapping[str, Summary]) -> str:
    """Return the metric that stands for a split."""
    return ranking(conditions.get("after") or next(iter(conditions.values())))[0]


def _read_json(path: Path, kind: type) -> Any:
    return read_json(path, kind) if path.is_file() else None


def _facts(summary: Summary) -> dict[str, Any]:
    trained = summary.get("trainable_parameters")
    if trained is not None and summary.get("parameters"):
        share = 100 * trained / summary["parameters"]
        trained = f"{trained:,} of {summary['parameters']:,} parameters ({share:.1f} %)"
    return {
        "date": summary.get("date"),
        "image encoder": summary.get("vision_model"),
        "language model": summary.get("text_model"),
        "starts from": summary.get("start_from"),
        "data": summary.get("dataset"),
        "trained": trained,
        "device": summary.get("device"),
    }


def _lead(scores: Scores) -> list[dict[str, str]]:
    """What training changed on each split."""
    found = []
    for split, conditions in scores.items():
        metric = primary_of(conditions)
        values = {name: _number(summary, metric) for name, summary in conditions.items()}
        if values.get("after") is not None:
            said = {name: "" if (value := values.get(name)) is None else _shown(metric, value) for name in CONDITIONS}
            found.append({"metric": metric, "split": split, **said})
    return found


def _task(name: str, splits: Scores) -> dict[str, Any]:
    """The tables of a task: all scores, then those of kinds of rows."""
    summaries = [summary for conditions in splits.values() for summary in conditions.values()]
    names = [metric for s in summaries for metric in s.get("metrics") or {} if "[" not in metric]
    columns = [
        column
        for column in dict.fromkeys([*map(primary_of, splits.values()), *names])
        if any(_number(s, column) is not None for s in summaries)
    ]
    rows = [
        {
            "split": "" if index else split,
            "condition": condition,
            "n": summary.get("n", _NOTHING),
            "cells": [(_shown(column, _number(summary, column), 3), _interval(summary, column)) for column in columns],
        }
        for split, conditions in splits.items()
        for index, (condition, summary) in enumerate(conditions.items())
    ]
    explained: dict[str, list[str]] = {}
    for column in columns:
        if known := METRICS.get(column):
            explained.setdefault(f"{known.explanation}; 0 to {known.highest}", []).append(column)
    breakdowns = [table for split, conditions in splits.items() for table in _breakdowns(split, conditions)]
    return {"name": name, "columns": columns, "rows": rows, "explained": explained, "breakdowns": breakdowns}


def _breakdowns(split: str, conditions: Mapping[str, Summary]) -> list[dict[str, Any]]:
    tables: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for condition, summary in conditions.items():
        for metric, by in summary["breakdowns"].items():
            for key, kinds in by.items():
                for kind, value in kinds.items():
                    tables.setdefault((metric, key), {}).setdefault(kind, {})[condition] = value
    return [
        {
            "metric": metric,
            "split": split,
            "by": key,
            "conditions": list(conditions),
            "rows": {kind: [_shown(metric, values.get(each)) for each in conditions] for kind, values in kinds.items()},
        }
        for (metric, key), kinds in tables.items()
    ]


def _made_by(scores: Scores) -> dict[str, str]:
    """How the texts were made and scored."""
    summaries = [summary for conditions in scores.values() for summary in conditions.values()]
    settings = [s["decoding"].items() for s in summaries if s.get("decoding")]
    found = {
        "tokenizer": {str(s["tokenizer"]) for s in summaries if s.get("tokenizer")},
        # The rows say which of them are blind.
        "decoding": {", ".join(f"{name} {value}" for name, value in s if name != "blind") for s in settings},
        "left out": {f"{name}: {why}" for s in summaries for name, why in (s.get("skipped") or {}).items()},
        "note": {str(note) for s in summaries for note in s.get("notes") or []},
    }
    return {name: "; ".join(sorted(said)) for name, said in found.items()}


def _bars(scores: Scores) -> list[tuple[str, Markup]]:
    """Caption and drawing of each task's scores."""
    figures = []
    tasks = by_task(scores)
    for task, splits in tasks.items():
        for metric in dict.fromkeys(map(primary_of, splits.values())):
            groups = {
                split: [
                    (name, value, interval_of(summary, metric))
                    for name, summary in conditions.items()
                    if (value := _number(summary, metric)) is not None
                ]
                for split, conditions in splits.items()
                if primary_of(conditions) == metric
            }
            groups = {split: bars for split, bars in groups.items() if bars}
            if groups:
                title = f"{task}: {metric}" if len(tasks) > 1 else metric
                drawn = bar_chart(title, groups, digits(metric))
                figures.append((f"{title}, with its 95 % interval where known", drawn))
    return figures


def _curves(scores: Scores, log_history: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Caption and drawing, and of several lines their names, of what was logged in training."""
    losses = {"train": finite_points(log_history, "loss"), "held-out": finite_points(log_history, "eval_loss")}
    losses = {name: points for name, points in losses.items() if points}
    figures: list[tuple[Any, ...]] = []
    if losses:
        figures.append(("Loss by step, nats a token", step_chart("Loss", losses), tuple(losses)))
    rewards = {"train": finite_points(log_history, "reward"), "held-out": finite_points(log_history, "eval_reward")}
    rewards = {name: points for name, points in rewards.items() if points}
    if rewards:
        # Of advantages around their mean, the loss is always about 0.
        figures = [("Reward by step, mean of the samples", step_chart("Reward", rewards), tuple(rewards))]
    for title, points in _scores_in_training(scores, log_history).items():
        figures.append((f"{title} by step, on held-out rows", step_chart(title, {"score": points})))
    return figures


def _scores_in_training(scores: Scores, log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """What was logged as `eval_CIDEr` or, for one of several sets, `eval_test_CIDEr`; by a name to show.

    The metrics that stand for the run's tasks, or, where none of those was logged, all that are known here.
    """
    found: dict[str, dict[str, list[Point]]] = {}
    for key in dict.fromkeys(key for entry in log_history for key in entry if key.startswith("eval_")):
        # The longest: page_f1 is not the f1 of a set called page.
        metric = max((m for m in METRICS if key.endswith(f"_{m}")), key=len, default=None)
        points = finite_points(log_history, key)
        if metric is not None and points:
            split = key.removeprefix("eval_").removesuffix(metric).removesuffix("_")
            found.setdefault(metric, {})[f"{metric} on {split}" if split else metric] = points
    primaries = set(map(primary_of, scores.values())) & found.keys()
    return {
        name: points for metric in found if metric in (primaries or found) for name, points in found[metric].items()
    }


def _best_point(scores: Scores, log_history: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for the held-out loss, and one for each score: when its best point was passed, and by how much."""
    curves = {"loss": (finite_points(log_history, "eval_loss"), -1)}
    curves |= {name: (points, 1) for name, points in _scores_in_training(scores, log_history).items()}
    losses = finite_points(log_history, "loss")
    found = []
    for name, (points, sign) in curves.items():
        if len(points) < 2:
            continue
        best = max(points, key=lambda point: (sign * point[1], point[0]))
        last = points[-1]
        if best == last:
            found.append(f"The held-out {name} was best at the last evaluation (step {last[0]:.0f}).")
            continue
        said = (
            f"The held-out {name} was best at step {best[0]:.0f} ({best[1]:.3f}) and "
            f"{abs(last[1] - best[1]):.3f} worse at step {last[0]:.0f}"
        )
        before = [loss for step, loss in losses if step <= best[0]]
        if before and losses[-1][0] > best[0]:
            said += f", while the training loss went from {before[-1]:.3f} to {losses[-1][1]:.3f}"
        found.append(f"{said}.")
    return found


def _confusions(output_dir: Path, scores: Scores) -> list[tuple[str, Markup]]:
    """Caption and drawing of which class was taken for which, for splits whose rows have probabilities."""
    figures = []
    for split, conditions in scores.items():
        path = output_dir / "eval" / split / "predictions.jsonl"
        rows = read_predictions(path) if "after" in conditions and path.is_file() else []
        if rows and all(isinstance(row.get("probabilities"), Mapping) for row in rows):
            counts = Counter((row["references"][0], row["prediction"]) for row in rows)
            caption = f"Confusion on {split}: rows are true classes, columns what was said; shades are shares of a row"
            figures.append((caption, confusion_chart(caption, counts)))
    return figures


def _gallery(
    output_dir: Path,
    split: str,
    conditions: Mapping[str, Summary],
    pictures: Mapping[tuple[str, Any], Picture] | None,
) -> dict[str, Any] | None:
    """The best and the worst rows of a split as cards; None when none of them has a picture."""
    path = output_dir / "eval" / split / "predictions.jsonl"
    if "after" not in conditions or not path.is_file():
        return None
    rows, metrics = read_predictions(path), ranking(conditions["after"])
    best, worst = best_and_worst(rows, metrics)
    images = {}
    for row in [*best, *worst]:
        stored = picture_path(output_dir, split, row["id"])
        picture: Picture | None = stored if stored.is_file() else None
        if pictures is not None:
            picture = pictures.get((split, row["id"]))
        if picture is not None:
            images[str(row["id"])] = thumbnail(picture)
    if not images:
        return None
    earlier = output_dir / "eval" / f"{split}-before" / "predictions.jsonl"
    before = {str(row["id"]): row["prediction"] for row in read_predictions(earlier)} if earlier.is_file() else {}
    kinds = {
        kind: [_card(row, images.get(str(row["id"])), metrics[0], before.get(str(row["id"]))) for row in chosen]
        for kind, chosen in (("best", best), ("worst", worst))
        if chosen
    }
    return {
        "name": split,
        "rows": len(rows),
        "kinds": kinds,
        "has_questions": any(row.get("question") for row in [*best, *worst]),
        "has_boxes": any("boxes" in row for row in [*best, *worst]),
    }


def _card(row: Row, picture: Thumbnail | None, metric: str, before: str | None) -> dict[str, Any]:
    question, boxes = row.get("question"), true_boxes(row)
    drawn = None
    if picture is not None and boxes is not None:
        drawn = box_overlay(parse_boxes(row["prediction"])[0], boxes, picture.width, picture.height)
    return {
        "id": str(row["id"]),
        "picture": picture,
        "boxes": drawn,
        "score": f"{metric} {float(row[metric.lower()]):.2f}",
        "question": question if isinstance(question, str) else "",
        "prediction": row["prediction"],
        "before": before if before != row["prediction"] else None,
        "references": references_of(row),
    }


def _making(summary: Summary) -> dict[str, str]:
    seed = summary.get("seed")
    return {
        "seed": "" if seed is None else str(seed),
        "wall time": ", ".join(f"{name} {_duration(value)}" for name, value in (summary.get("seconds") or {}).items()),
        "versions": ", ".join(f"{name} {value}" for name, value in (summary.get("versions") or {}).items()),
    }


def interval_of(summary: Summary, metric: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a metric in a scores.json, or None."""
    interval = (summary.get("intervals") or {}).get(metric)
    return (float(interval[0]), float(interval[1])) if interval else None


def _interval(summary: Summary, metric: str) -> str:
    interval = interval_of(summary, metric)
    return "" if interval is None else " to ".join(_shown(metric, end) for end in interval)


def _number(summary: Summary, metric: str) -> float | None:
    value = (summary.get("metrics") or {}).get(metric)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _shown(metric: str, value: float | None, places: int | None = None) -> str:
    return _NOTHING if value is None else f"{value:.{places or digits(metric)}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
