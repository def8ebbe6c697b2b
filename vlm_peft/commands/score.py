"""Score predictions that anybody made: `python eval/score.py predictions.jsonl [--task vqa]`.

Lines are `{"id": ..., "prediction": ..., "references": [...]}`, with more for some tasks (see task_scores.score_rows);
with `--format coco --references annotations.json` the file is a COCO result file. Several files, predictions of several
systems for the same rows, are also compared with each other: 95 % bootstrap intervals over rows, and for each pair a
test by approximate randomisation on the metric that stands for the task, row by row (see significance.py). Nothing is
written unless `--output` says where.

CIDEr weighs n-grams by how rare they are among all references, so that of a part of a set is another number than that
of the whole; `--idf_references` names the whole set's references, and then they compare.
"""

import argparse
import itertools
import json
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.records import Row, read_coco, read_predictions, read_references, score_summary, write_text
from ..evaluation.task_scores import Scores, score_rows
from ..json_files import read_json
from ..metrics.significance import PairedDifference, paired_difference
from ..tasks import DEFAULT_TASK, TASKS

METRICS = {name: [each.name for each in kind.metrics if not each.needs_pictures] for name, kind in TASKS.items()}
"""From a task to its metrics, in the order of the table; a file of texts has no pictures."""


def parse_arguments(arguments: Sequence[str] | None = None, program: str = "score.py") -> argparse.Namespace:
    """Read the command line; ends the program with a message if it is not one."""
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="predictions.jsonl, or COCO results")
    add(
        "--task", choices=tuple(METRICS), help=f"default: that of the scores.json beside FILE, otherwise {DEFAULT_TASK}"
    )
    add("--format", choices=("jsonl", "coco"), default="jsonl", help="of FILE (default: jsonl)")
    add("--references", type=Path, metavar="FILE", help="COCO annotations, with --format coco only")
    add("--output", type=Path, metavar="FILE", help="write the scores there, as JSON")
    add(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help="some of the task's metrics (default: all; METEOR and SPICE need Java): "
        + "; ".join(f"{task}: {' '.join(names)}" for task, names in METRICS.items()),
    )
    add("--tokenizer", choices=("auto", "ptb-java", "treebank-python"), default="auto", help="of caption metrics")
    add(
        "--idf_references",
        type=Path,
        metavar="FILE",
        help="the whole set's references, to weigh CIDEr's n-grams: rows with id and references (.jsonl, or a list in "
        ".json), or COCO annotations (.json)",
    )
    add("--limit", type=int, metavar="N", help="score the first N rows of each file only")
    options = parser.parse_args(arguments)
    if (options.format == "coco") != (options.references is not None):
        parser.error("--format coco and --references FILE (the annotations) go together")
    if options.format == "coco" and options.task not in (None, DEFAULT_TASK):
        parser.error(f"--format coco holds captions, got --task {options.task}")
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit: expected at least 1 row, got {options.limit}")
    return options


def find_task(files: Sequence[Path]) -> tuple[str, str | None]:
    """Return the task that scores.json beside the files names, and what to tell about it; otherwise `caption`.

    Raises:
        ValueError: if files have different tasks.
    """
    found: dict[str, Path] = {}
    for path in (file.with_name("scores.json") for file in files):
        try:
            task = read_json(path)["task"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # Not a file of ours, or one that does not know.
        if task in list(METRICS):
            found.setdefault(task, path)
    if len(found) > 1:
        said = ", ".join(f"{task} ({path})" for task, path in found.items())
        raise ValueError(f"expected files of one task, found {said}; name one with --task")
    for task, path in found.items():
        return task, f"Scored as {task}, which {path} names; --task takes another one."
    return DEFAULT_TASK, None


def read_rows(path: Path, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Read one file as the options say; returns its rows and what to tell about them.

    Raises:
        ValueError: if the file is not of that format.
        OSError: if it cannot be read.
    """
    notes = []
    if options.format == "coco":
        rows, pictures = read_coco(options.references, path)
        if len(rows) < pictures:
            notes.append(f"{len(rows)} of {pictures} annotated pictures have a result; only those are scored.")
    else:
        rows = read_predictions(path)
    if options.limit is not None and options.limit < len(rows):
        notes.append(f"The first {options.limit} of {len(rows)} rows are scored.")
        rows = rows[: options.limit]
    return rows, notes


def aligned(first: dict[Any, Row], second: dict[Any, Row], names: tuple[str, str]) -> list[Any]:
    """Return the ids of two files that predict for the same rows.

    Raises:
        ValueError: if the files differ in their rows, or in what is right for one of them.
    """
    if first.keys() != second.keys():
        only = [len(first.keys() - second.keys()), len(second.keys() - first.keys())]
        raise ValueError(
            f"cannot compare {names[0]} and {names[1]}: {only[0]} rows are only in the first and {only[1]} only in "
            "the second; compare predictions for the same rows"
        )
    for key, row in first.items():
        for truth in ("references", "boxes"):
            if row.get(truth) != second[key].get(truth):
                raise ValueError(f"cannot compare {names[0]} and {names[1]}: row {key!r} has other {truth} in each")
    return list(first)


def further_references(rows: Sequence[Row], path: Path) -> tuple[list[list[str]], str]:
    """Return the references of the rows in a file that are not among those scored, and what to tell about them.

    Raises:
        ValueError: if the file is no such file, or has other references for a row that is scored.
        OSError: if it cannot be read.
    """
    references = read_references(path)
    known = 0
    for row in rows:
        own = references.pop(str(row["id"]), None)
        known += own is not None
        if own is not None and sorted(own) != sorted(row["references"]):
            raise ValueError(
                f"{path}: row {row['id']!r} has other references than in the predictions; expected the references of "
                "the whole set that the predictions are from"
            )
    note = (
        f"CIDEr weighs n-grams by the references of {len(rows) + len(references)} rows: the {len(rows)} scored and "
        f"{len(references)} further ones of {path}, which has {known} of those scored."
    )
    return list(references.values()), note


def table(summaries: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    """Return the scores as an aligned table, a line for each file; `names` are the metrics in their order."""
    columns = [name for name in names if any(name in s["metrics"] for s in summaries.values())]
    lines = [["file", "n", *columns]]
    for name, summary in summaries.items():
        values = [f"{summary['metrics'][c]:.4f}" if c in summary["metrics"] else "-" for c in columns]
        lines.append([name, str(summary["n"]), *values])
    if any(summary["tokenizer"] for summary in summaries.values()):
        for line, cell in zip(lines, ["tokenizer", *(s["tokenizer"] for s in summaries.values())], strict=True):
            line.append(cell)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {0, 2 + len(columns)}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def details(name: str, summary: dict[str, Any]) -> list[str]:
    """Return the lines about one file that the table has no room for: intervals, and scores by kind of row."""
    lines = []
    if summary["intervals"]:
        said = ", ".join(f"{metric} [{low:.4f}, {high:.4f}]" for metric, (low, high) in summary["intervals"].items())
        lines.append(f"{name}: 95 % {said} (bootstrap over {summary['n']} rows)")
    kinds: dict[str, list[str]] = {}
    for metric, value in summary["metrics"].items():
        if match := re.fullmatch(r"(\w+)\[(\w+)=(.*)\]", metric, re.DOTALL):
            kinds.setdefault(f"{match[1]} by {match[2]}", []).append(f"{match[3]} {value:.4f}")
    return lines + [f"{name}: {what}: {', '.join(said)}" for what, said in kinds.items()]


def comparison(names: tuple[str, str], metric: str, result: PairedDifference) -> str:
    """Return one line that says how two files differ."""
    low, high = result.interval
    return (
        f"{names[1]} - {names[0]}: {metric} {result.difference:+.4f}, 95 % [{low:+.4f}, {high:+.4f}], "
        f"p = {result.p_value:.4f} (approximate randomisation)"
    )


def score_files(options: argparse.Namespace) -> dict[str, Any]:
    """Score what the options name.

    Returns:
        `files`, from each file's name to what `records.score_summary` returns, and `comparisons`, a list.

    Raises:
        ValueError: if a file or a metric is not what it should be, or files to compare are not for the same rows.
        OSError: if a file cannot be read.
    """
    task = options.task
    wanted = METRICS[task] if options.metrics is None else options.metrics
    unknown = [name for name in wanted if name not in METRICS[task]]
    if unknown:
        raise ValueError(f"--metrics: expected some of {' '.join(METRICS[task])} for the task {task}, got {unknown[0]}")
    if options.idf_references is not None and "CIDEr" not in wanted:
        raise ValueError(f"--idf_references is for CIDEr, which is not scored here (task {task})")
    loaded = {str(path): read_rows(path, options) for path in options.files}
    # Before anything is scored, which takes longer.
    by_id = {name: {str(row["id"]): row for row in rows} for name, (rows, _) in loaded.items()}
    pairs = list(itertools.combinations(loaded, 2))
    ids = {pair: aligned(by_id[pair[0]], by_id[pair[1]], pair) for pair in pairs}

    found: dict[str, Scores] = {}
    summaries: dict[str, dict[str, Any]] = {}
    for name, (rows, notes) in loaded.items():
        further: list[list[str]] = []
        if options.idf_references is not None:
            further, note = further_references(rows, options.idf_references)
            notes.append(note)
        found[name] = score_rows(
            task,
            rows,
            tokenizer=options.tokenizer,
            meteor="METEOR" in wanted,
            spice="SPICE" in wanted,
            idf_references=further,
        )
        summaries[name] = _chosen(score_summary(found[name], task=task), wanted, notes)
    comparisons = []
    for first, second in pairs:
        metric = found[first].primary
        if metric not in wanted:
            continue
        of_first, of_second = (
            dict(zip(by_id[name], found[name].per_row[metric], strict=True)) for name in (first, second)
        )
        order = ids[first, second]
        result = paired_difference([of_first[i] for i in order], [of_second[i] for i in order])
        comparisons.append({"files": [first, second], "metric": metric, **vars(result)})
    return {"files": summaries, "comparisons": comparisons}


def _chosen(summary: dict[str, Any], wanted: Sequence[str], notes: list[str]) -> dict[str, Any]:
    """Leave the wanted metrics, with those of kinds of rows (`vqa_accuracy[answer_type=number]`), in their order."""
    place = {name: index for index, name in enumerate(METRICS[summary["task"]]) if name in wanted}
    for key in ("metrics", "intervals", "skipped"):
        chosen = {name: value for name, value in summary[key].items() if name.partition("[")[0] in place}
        summary[key] = dict(sorted(chosen.items(), key=lambda item: place[item[0].partition("[")[0]]))
    summary["notes"] = [*notes, *summary["notes"]]
    return summary


def main(arguments: Sequence[str] | None = None, program: str = "score.py") -> int:
    """Run the command; returns its exit status: 0, or 2 with a message on stderr for input that cannot be scored."""
    options = parse_arguments(arguments, program)
    told = None
    try:
        if options.task is None:
            options.task, told = (DEFAULT_TASK, None) if options.format == "coco" else find_task(options.files)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # They are in the notes, printed below.
            result = score_files(options)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    summaries = result["files"].items()
    print(table(result["files"], METRICS[options.task]))
    for name, summary in summaries:
        for line in details(name, summary):
            print(line)
    for entry in result["comparisons"]:
        difference = PairedDifference(entry["difference"], entry["interval"], entry["p_value"])
        print(comparison(tuple(entry["files"]), entry["metric"], difference))
    skips = [f"{metric} skipped: {why}" for _, summary in summaries for metric, why in summary["skipped"].items()]
    notes = [f"{name}: {note}" for name, summary in summaries for note in summary["notes"]]
    for line in dict.fromkeys([*([told] if told else []), *skips, *notes]):
        print(line)
    if options.output is not None:
        only = next(iter(result["files"].values()))
        write_text(options.output, json.dumps(only if len(result["files"]) == 1 else result, indent=2) + "\n")
        print(f"written: {options.output}")
    return 0
