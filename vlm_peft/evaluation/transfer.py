"""What a training gained and lost: every data set that was scored before and after it, with a paired test.

Stage: files of two evaluations -> one table, transfer.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..metrics.significance import paired_difference
from .perplexity import perplexity
from .records import read_predictions, read_scores

TRANSFER_FILE = "transfer.json"
"""In a run's folder: the rows of [`compared`] and [`compared_text`]."""


def compared(before: Path, after: Path, name: str) -> dict[str, Any]:
    """Compares two evaluations of the same rows by the metric that stands for their task.

    Args:
        before, after: Folders with predictions.jsonl and scores.json.
        name: Of the data set, for the table.

    Returns:
        `name`, `metric`, `n`, `before`, `after`, `difference` (after minus before, mean over rows), its 95 %
        `interval`, and `p_value`.

    Raises:
        ValueError, OSError: When a file is not there or not what it should be, or the rows differ.
    """
    metric = read_scores(after / "scores.json")["primary"]
    first, second = (
        {str(row["id"]): float(row[metric.lower()]) for row in read_predictions(folder / "predictions.jsonl")}
        for folder in (before, after)
    )
    if first.keys() != second.keys():
        raise ValueError(f"{before} and {after} hold other rows: score both again.")
    return _row(name, metric, [first[key] for key in second], list(second.values()))


def compared_text(before: Sequence[float], after: Sequence[float], name: str) -> dict[str, Any]:
    """As [`compared`], of nats a token of the same paragraphs: lower is better; with both perplexities."""
    row = _row(name, "nats a token", before, after)
    return row | {"perplexity": [perplexity(list(before)), perplexity(list(after))]}


def _row(name: str, metric: str, before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    found = paired_difference(before, after)
    return {
        "name": name,
        "metric": metric,
        "n": len(after),
        "before": sum(before) / len(before),
        "after": sum(after) / len(after),
        "difference": found.difference,
        "interval": list(found.interval),
        "p_value": found.p_value,
    }


def said(row: Mapping[str, Any]) -> str:
    """`gained`, `lost` or, where the test does not tell the two apart at 5 %, `no difference shown`."""
    if row["p_value"] > 0.05 or not row["difference"]:
        return "no difference shown"
    return "gained" if (row["difference"] > 0) == ("perplexity" not in row) else "lost"


def transfer_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table's cells, its head first."""
    lines = [["data", "metric", "n", "before", "after", "difference", "95 %", "p", ""]]
    for row in rows:
        low, high = row["interval"]
        numbers = [f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['difference']:+.3f}"]
        interval = f"[{low:+.3f}, {high:+.3f}]"
        lines.append(
            [row["name"], row["metric"], str(row["n"]), *numbers, interval, f"{row['p_value']:.4f}", said(row)]
        )
    return lines
