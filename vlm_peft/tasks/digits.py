"""Digits: one picture of a number or of several digits, one text that reads them out in order."""

from collections.abc import Sequence
from typing import Any

from ..metrics.digits import digit_accuracy, digits_match
from .example import Example, Task, picture_turn, require_columns, to_text
from .scoring import EXACT_MATCH, Metric, Row, Scores, TaskKind, by_references, mean_scores, row_error

DIGIT_COLUMNS = ("digits", "label", "text")
"""Names under which data sets keep what is to be read; the first that a data set has is taken."""

INSTRUCTION = "Read the digits."

DIGITS, SEPARATORS = "0123456789", " .,;:-_/"


def digits_task(columns: list[str], image_column: str, text_column: str | None, instruction: str | None) -> Task:
    """A picture and its digits from left to right and top to bottom (a meter, a grid, a number), as text."""
    column = text_column or next((name for name in DIGIT_COLUMNS if name in columns and name != image_column), None)
    require_columns(columns, image_column, column or " or ".join(DIGIT_COLUMNS))
    asked = INSTRUCTION if instruction is None else instruction

    def example(row: dict) -> Example:
        # A list in the cell of a row of its own is no text of digits.
        cells = row[column] if isinstance(row.get("id"), list) else [row[column]]
        texts = [text for cell in cells for text in digits_example(cell, asked).completions]
        texts = list(dict.fromkeys(texts))
        return Example(picture_turn(asked), texts, [texts])

    return Task(DIGITS_TASK.name, [image_column], example)


def digits_example(digits: str | int, instruction: str) -> Example:
    """One picture, its digits.

    Args:
        digits (`str` or `int`): For example `"0417"`, `"0 4 1 7"` or `"0.417"`; a whole number has no leading zeros.
        instruction (`str`): What the user says beside the picture.

    Raises:
        ValueError: When there is no digit, or something else than digits, spaces and the [`SEPARATORS`].
    """
    text = to_text(digits)
    if text is None or not set(text) & set(DIGITS) or set(text) - set(DIGITS + SEPARATORS):
        raise ValueError(f"Expected digits as text like '0417', got {digits!r}.")
    return Example(picture_turn(instruction), [text], [[text]])


def _score(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    for index, row in enumerate(rows):
        if not all(any(character.isdecimal() for character in text) for text in row["references"]):
            raise row_error(index, row, "references", "texts with a digit in each")
    return mean_scores(rows, "exact_match", exact_match=digits_match, digit_accuracy=digit_accuracy)


DIGITS_TASK = TaskKind(
    "digits",
    digits_task,
    metrics=(EXACT_MATCH, Metric("digit_accuracy", "share of the digits that are right once they are aligned")),
    primary="exact_match",
    score=_score,
    reward=by_references(digits_match),
    question=INSTRUCTION,
)
