"""What a report says of each metric, and by which one a task's rows are ranked."""

from collections.abc import Mapping
from typing import Any

from ..tasks import TASKS

METRICS = {each.name: each for kind in TASKS.values() for each in kind.metrics}
"""All metrics of all tasks, by name."""


def ranking(summary: Mapping[str, Any]) -> list[str]:
    """Return the metrics by which a scores.json ranks its rows: the task's own, then, for ties, what else each row has.

    Before there were tasks, a scores.json did not name its metric, which was CIDEr.
    """
    primary = summary.get("primary") or "CIDEr"
    return [primary, *(name for name in summary.get("intervals") or {} if name != primary)]


def digits(metric: str) -> int:
    """Return how many digits after the point say something."""
    return 2 if metric == "CIDEr" else 3
