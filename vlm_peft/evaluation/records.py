"""The files of an evaluation: predictions.jsonl, scores.json and COCO's annotation and result files.

A line of predictions.jsonl is `{"id": text or whole number, "prediction": text, "references": [text, ...]}`, and may
have the row's own scores under their names in lower case (`"cider"`, 0..10). Other keys are kept; a row with the true
`boxes` of grounding needs no references. What a task's score reads beside these: see task_scores.score_rows.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..drafts import draft_of, sweep
from ..json_files import parse_json
from ..metrics.significance import bootstrap_interval
from .task_scores import Scores

Row = dict[str, Any]
"""One line of predictions.jsonl."""

CONDITIONS = ("before", "after", "blind")
"""What was scored: the model before training, after it, and after it with other pictures than a row's own."""


def write_text(path: Path | str, text: str) -> None:
    """Write a text file so that a reader sees the old file or the whole new one, never half of it; makes the folder.

    What killed processes left of the same file is swept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    temporary = draft_of(path)
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_predictions(
    path: Path | str, rows: Iterable[Mapping[str, Any]], per_row: Mapping[str, Sequence[float]] | None = None
) -> None:
    """Write predictions.jsonl.

    Args:
        path: Of the file; its folder is made.
        rows: What the module's text describes, in any order.
        per_row: Each row's scores (`Scores.per_row`), written under the metrics' names in lower case.

    Raises:
        ValueError: if a row lacks a key or has the wrong kind of value, two rows have one id, or the lengths differ.
    """
    checked = _checked((f"row {index}", dict(row)) for index, row in enumerate(rows))
    for metric, values in (per_row or {}).items():
        if len(values) != len(checked):
            raise ValueError(f"expected a {metric} for each of {len(checked)} rows, got {len(values)}")
        for row, value in zip(checked, values, strict=True):
            row[metric.lower()] = float(value)
    # ASCII only: some readers take U+2028 for the end of a line, and a lone surrogate has no UTF-8 form.
    write_text(path, "".join(json.dumps(row) + "\n" for row in checked))


def read_predictions(path: Path | str) -> list[Row]:
    """Read predictions.jsonl; empty lines are skipped.

    Raises:
        ValueError: for a line that is no such row (the message has its number and what is missing), two lines with one
            id, or a file without any.
        OSError: if the file cannot be read.
    """
    rows = _checked(_lines(path))
    if not rows:
        raise ValueError(f"{path}: expected at least one prediction, got an empty file")
    return rows


def read_coco(annotations_path: Path | str, results_path: Path | str) -> tuple[list[Row], int]:
    """Read COCO's caption annotations (references) and results (predictions) as rows, in the order of the results.

    As in coco-caption, pictures without a result are left out, so results of a part of the pictures can be scored.

    Returns:
        The rows, `id` being the `image_id`, and the number of pictures with annotations.

    Raises:
        ValueError: if a file is not of COCO's shape, a picture has two results, or results are for unknown pictures.
        OSError: if a file cannot be read.
    """
    references = _coco_references(_json(_text(annotations_path), str(annotations_path)), annotations_path)
    results = _json(_text(results_path), str(results_path))
    if not isinstance(results, list):
        raise ValueError(f"{results_path}: expected a list of results, got {type(results).__name__}")
    if not results:
        raise ValueError(f"{results_path}: expected at least one result, got none")
    entries = [_coco_entry(entry, f"{results_path}, result {index}") for index, entry in enumerate(results)]
    unknown = [image_id for image_id, _ in entries if str(image_id) not in references]
    if unknown:
        raise ValueError(
            f"{results_path}: {len(unknown)} of {len(entries)} results are for pictures that {annotations_path} "
            f"({len(references)} pictures) does not have, the first being image_id {unknown[0]!r}"
        )
    rows = _checked(
        (f"{results_path}, result {index}", {"id": i, "prediction": c, "references": references[str(i)]})
        for index, (i, c) in enumerate(entries)
    )
    return rows, len(references)


def read_references(path: Path | str) -> dict[str, list[str]]:
    """Read the references of a whole set, by id as text.

    Args:
        path: `.json` with COCO's caption annotations or a list of rows, otherwise a row in each line; the rows need
            only `id` and `references`, so predictions.jsonl will do.

    Raises:
        ValueError: if the file is none of these, has no row, or has two rows with one id.
        OSError: if it cannot be read.
    """
    content = _json(_text(path), str(path)) if Path(path).suffix.lower() == ".json" else None
    if isinstance(content, dict):
        references = _coco_references(content, path)
    else:
        rows_of_list = enumerate(content) if isinstance(content, list) else None
        located = [(f"{path}, row {index}", row) for index, row in rows_of_list] if rows_of_list else _lines(path)
        rows = _checked(located, ("id", "references"))
        references = {str(row["id"]): row["references"] for row in rows if "references" in row}
    if not references:
        raise ValueError(f"{path}: expected at least one row with references, got none")
    return references


def score_summary(
    scores: Scores,
    *,
    model: str | None = None,
    dataset: str | None = None,
    task: str | None = None,
    split: str | None = None,
    condition: str | None = None,
    decoding: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what scores.json holds; what is not known is null.

    `n` is the number of rows, `primary` the metric that stands for the task, `condition` one of `CONDITIONS`;
    `intervals` has the 95 % bootstrap intervals `[low, high]` of the metrics that each row has, or some of them, where
    more than one has a value, and `breakdowns` the scores of kinds of rows:
    `{"vqa_accuracy": {"answer_type": {"number": 0.5}}}`.
    """
    n = len(scores.per_row[scores.primary])
    samples = scores.per_row | scores.per_some
    intervals = {name: list(bootstrap_interval(values)) for name, values in samples.items() if len(values) > 1}
    return {
        "n": n,
        "task": task,
        "primary": scores.primary,
        "metrics": scores.metrics,
        "breakdowns": _breakdowns(scores.metrics) | scores.breakdowns,
        "intervals": intervals,
        "model": model,
        "dataset": dataset,
        "split": split,
        "condition": condition,
        "decoding": None if decoding is None else dict(decoding),
        "tokenizer": scores.tokenizer,
        "skipped": scores.skipped,
        "notes": scores.notes,
    }


def write_scores(path: Path | str, scores: Scores, **described: Any) -> None:
    """Write scores.json; its folder is made. `described` are the further arguments of `score_summary`."""
    write_text(path, json.dumps(score_summary(scores, **described), indent=2) + "\n")


def read_scores(path: Path | str) -> dict[str, Any]:
    """Read scores.json.

    Files that do not say so are of the condition that their folder's name ends with (`test-blind`), or else `after`,
    and have scores of kinds of rows only under names such as `vqa_accuracy[answer_type=number]`.

    Raises:
        ValueError: if it is no JSON object.
        OSError: if it cannot be read.
    """
    path = Path(path)
    summary = _json(_text(path), str(path))
    if not isinstance(summary, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(summary).__name__}")
    ending = path.parent.name.rpartition("-")[2]
    known = {
        "condition": summary.get("condition") or (ending if ending in ("before", "blind") else "after"),
        "breakdowns": summary.get("breakdowns") or _breakdowns(summary.get("metrics") or {}),
    }
    return summary | known


def read_all_scores(output_dir: Path | str) -> dict[str, dict[str, dict[str, Any]]]:
    """Read `eval/*/scores.json` of a run: folder of a split -> condition, in the order of `CONDITIONS` -> scores.

    Raises:
        ValueError, OSError: as `read_scores`.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(Path(output_dir).glob("eval/*/scores.json")):
        summary = read_scores(path)
        split, condition = path.parent.name, summary["condition"]
        split = split if condition == "after" else split.removesuffix(f"-{condition}")
        found.setdefault(split, {})[condition] = summary
    return {
        split: {name: conditions[name] for name in CONDITIONS if name in conditions}
        for split, conditions in sorted(found.items())
    }


def _breakdowns(metrics: Mapping[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, value in metrics.items():
        if match := re.fullmatch(r"(\w+)\[(\w+)=(.*)\]", name, re.DOTALL):
            found.setdefault(match[1], {}).setdefault(match[2], {})[match[3]] = value
    return found


def _text(path: Path | str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x}") from error


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected JSON, got {text[:60]!r} ({error.msg} at character {error.pos})") from error


def _lines(path: Path | str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _json(line, f"{path}, line {number}")


def _checked(
    located_rows: Iterable[tuple[str, Any]], keys: Sequence[str] = ("id", "prediction", "references")
) -> list[Row]:
    rows: list[Row] = []
    places: dict[str, str] = {}
    for where, row in located_rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
        missing = [key for key in keys if key not in row and not (key == "references" and "boxes" in row)]
        if missing:
            raise ValueError(f"{where}: {' and '.join(missing)} missing, the keys are {', '.join(map(str, row))}")
        if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
            raise ValueError(f"{where}: expected text or a whole number as id, got {row['id']!r}")
        if "prediction" in keys and not isinstance(row["prediction"], str):
            raise ValueError(f"{where}: expected text as prediction, got {row['prediction']!r}")
        references = row.get("references", [""])
        if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
            raise ValueError(f"{where}: expected a list of one or more texts as references, got {references!r}")
        earlier = places.setdefault(str(row["id"]), where)
        if earlier != where:
            raise ValueError(f"{where}: id {row['id']!r} was already in {earlier}")
        rows.append(row)
    return rows


def _coco_references(annotations: Any, path: Path | str) -> dict[str, list[str]]:
    if not isinstance(annotations, dict) or not isinstance(annotations.get("annotations"), list):
        found = sorted(annotations) if isinstance(annotations, dict) else type(annotations).__name__
        raise ValueError(f'{path}: expected an object with the list "annotations", got {found}')
    references: dict[str, list[str]] = {}
    for index, entry in enumerate(annotations["annotations"]):
        image_id, caption = _coco_entry(entry, f"{path}, annotation {index}")
        references.setdefault(str(image_id), []).append(caption)
    return references


def _coco_entry(entry: Any, where: str) -> tuple[str | int, str]:
    if not isinstance(entry, dict) or "image_id" not in entry or "caption" not in entry:
        found = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{where}: expected the keys image_id and caption, got {found or 'none'}")
    if not isinstance(entry["caption"], str):
        raise ValueError(f"{where}: expected text as caption, got {entry['caption']!r}")
    return entry["image_id"], entry["caption"]
