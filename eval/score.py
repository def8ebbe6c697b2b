"""Score captions that anybody made: `python eval/score.py predictions.jsonl`.

Lines are `{"id": ..., "prediction": ..., "references": [...]}`; with `--format coco --references annotations.json` the
file is a COCO result file. Several files, predictions of several systems for the same pictures, are also compared with
each other: 95 % bootstrap intervals over pictures, and for each pair a test by approximate randomisation on per-picture
CIDEr (see significance.py). Nothing is written unless `--output` says where.
"""

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coco_caption.caption_scores import CaptionScores, score_captions
from predictions import Row, read_coco, read_predictions, score_summary, write_text
from significance import PairedDifference, paired_difference

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "METEOR", "SPICE")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ends the program with a message if it is not one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="predictions.jsonl, or COCO results")
    parser.add_argument("--format", choices=("jsonl", "coco"), default="jsonl", help="of FILE (default: jsonl)")
    parser.add_argument("--references", type=Path, metavar="FILE", help="COCO annotations, with --format coco only")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the scores there, as JSON")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=METRICS,
        metavar="METRIC",
        help=f"some of {' '.join(METRICS)} (default: all; METEOR and SPICE need Java)",
    )
    parser.add_argument("--tokenizer", choices=("auto", "ptb-java", "treebank-python"), default="auto")
    parser.add_argument("--limit", type=int, metavar="N", help="score the first N pictures of each file only")
    options = parser.parse_args(arguments)
    if (options.format == "coco") != (options.references is not None):
        parser.error("--format coco and --references FILE (the annotations) go together")
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit: expected at least 1 picture, got {options.limit}")
    return options


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
        notes.append(f"The first {options.limit} of {len(rows)} pictures are scored.")
        rows = rows[: options.limit]
    return rows, notes


def aligned(first: dict[Any, Row], second: dict[Any, Row], names: tuple[str, str]) -> list[Any]:
    """Return the ids of two files that predict for the same pictures.

    Raises:
        ValueError: if the files differ in their pictures or in a picture's references.
    """
    if first.keys() != second.keys():
        only = [len(first.keys() - second.keys()), len(second.keys() - first.keys())]
        raise ValueError(
            f"cannot compare {names[0]} and {names[1]}: {only[0]} pictures are only in the first and {only[1]} only in "
            "the second; compare predictions for the same pictures"
        )
    for key, row in first.items():
        if row["references"] != second[key]["references"]:
            raise ValueError(f"cannot compare {names[0]} and {names[1]}: picture {key!r} has other references in each")
    return list(first)


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Return the scores as an aligned table, a line for each file."""
    columns = [name for name in METRICS if any(name in s["metrics"] for s in summaries.values())]
    lines = [["file", "n", *columns, "tokenizer"]]
    for name, summary in summaries.items():
        values = [f"{summary['metrics'][c]:.4f}" if c in summary["metrics"] else "-" for c in columns]
        lines.append([name, str(summary["n"]), *values, summary["tokenizer"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in (0, len(line) - 1) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def comparison(names: tuple[str, str], result: PairedDifference) -> str:
    """Return one line that says how two files differ."""
    low, high = result.interval
    return (
        f"{names[1]} - {names[0]}: CIDEr {result.difference:+.4f}, 95 % [{low:+.4f}, {high:+.4f}], "
        f"p = {result.p_value:.4f} (approximate randomisation)"
    )


def score_files(options: argparse.Namespace) -> dict[str, Any]:
    """Score what the options name.

    Returns:
        `files`, from each file's name to what `predictions.score_summary` returns, and `comparisons`, a list.

    Raises:
        ValueError: if a file is not what it should be, or files to compare are not for the same pictures.
        OSError: if a file cannot be read.
    """
    loaded = {str(path): read_rows(path, options) for path in options.files}
    # Before anything is scored, which takes longer.
    by_id = {name: {str(row["id"]): row for row in rows} for name, (rows, _) in loaded.items()}
    pairs = list(itertools.combinations(loaded, 2))
    ids = {pair: aligned(by_id[pair[0]], by_id[pair[1]], pair) for pair in pairs}

    summaries, per_picture = {}, {}
    for name, (rows, notes) in loaded.items():
        scores = score_captions(
            [row["prediction"] for row in rows],
            [row["references"] for row in rows],
            tokenizer=options.tokenizer,
            meteor="METEOR" in options.metrics,
            spice="SPICE" in options.metrics,
        )
        per_picture[name] = dict(zip(by_id[name], scores.per_picture, strict=True))
        summaries[name] = score_summary(_chosen(scores, options.metrics, notes))
        if "CIDEr" not in options.metrics:
            summaries[name]["intervals"] = {}
    comparisons = []
    for first, second in pairs if "CIDEr" in options.metrics else []:
        order = ids[first, second]
        result = paired_difference([per_picture[first][i] for i in order], [per_picture[second][i] for i in order])
        comparisons.append({"files": [first, second], "metric": "CIDEr", **vars(result)})
    return {"files": summaries, "comparisons": comparisons}


def _chosen(scores: CaptionScores, metrics: Sequence[str], notes: list[str]) -> CaptionScores:
    scores.metrics = {name: scores.metrics[name] for name in METRICS if name in metrics and name in scores.metrics}
    scores.notes = [*notes, *scores.notes]
    return scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 with a message on stderr for input that cannot be scored."""
    options = parse_arguments(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # They are in the notes, printed below.
            result = score_files(options)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"score.py: {error}", file=sys.stderr)
        return 2
    print(table(result["files"]))
    for name, summary in result["files"].items():
        for metric, (low, high) in summary["intervals"].items():
            print(f"{name}: {metric} 95 % [{low:.4f}, {high:.4f}] (bootstrap over {summary['n']} pictures)")
    for entry in result["comparisons"]:
        difference = PairedDifference(entry["difference"], entry["interval"], entry["p_value"])
        print(comparison(tuple(entry["files"]), difference))
    summaries = result["files"].items()
    skips = [f"{metric} skipped: {why}" for _, summary in summaries for metric, why in summary["skipped"].items()]
    notes = [f"{name}: {note}" for name, summary in summaries for note in summary["notes"]]
    for line in dict.fromkeys([*skips, *notes]):
        print(line)
    if options.output is not None:
        only = next(iter(result["files"].values()))
        write_text(options.output, json.dumps(only if len(result["files"]) == 1 else result, indent=2) + "\n")
        print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
