"""One door to the scores of every task: rows of predictions.jsonl -> metrics.

All metrics are in 0..1 but CIDEr (0..10).
"""

from collections.abc import Sequence
from typing import Any

from ..tasks import Scores, find_kind
from ..tasks.scoring import Row, row_error

__all__ = ["Scores", "score_rows"]


def score_rows(task: str, rows: Sequence[Row], **caption_options: Any) -> Scores:
    """Score rows of predictions.jsonl as their task is scored.

    A row has `prediction` (text), `references` (list of one or more texts), or for `grounding` the true `boxes`, and
    for some tasks more: each says so where it scores.

    Args:
        task: One of `TASKS`.
        rows: At least one.
        caption_options: Of `score_captions`: `tokenizer`, `meteor`, `spice`, `idf_references`, `java_time_limit`. Tasks
            that have none of these metrics leave them unused, so that whoever scores need not know which.

    Raises:
        ValueError: if the task is unknown, there are no rows, or a row lacks what the task needs or has it wrong (the
            message has the row's id and the key).
    """
    kind = find_kind(task)
    for index, row in enumerate(rows):
        if not isinstance(row.get("prediction"), str):
            raise row_error(index, row, "prediction", "text")
    kind.check(rows)
    return kind.score(rows, caption_options)
