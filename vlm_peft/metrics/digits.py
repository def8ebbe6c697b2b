"""Rows of digits read from a picture: right as a whole, and how many of the digits are right.

Spaces and the separators . , ; : - _ / are ignored on both sides, so "1 234", "1,234" and "1234." are one number, and a
decimal point does not count. Everything else stays: each other character that the reference does not have is an error.
"""

import re
from collections.abc import Sequence

from .answers import edit_distance

_IGNORED = re.compile(r"[\s.,;:_/-]+")


def digits_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the digits are those of a reference, in order and without any other character, else 0.

    Raises:
        ValueError: if there is no reference, a reference has no digit, or a text is given in place of the list.
    """
    return float(_IGNORED.sub("", prediction) in _references(references))


def digit_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Return 1 - Levenshtein distance / length of the longer text, 0..1, of the nearest reference.

    Characters are aligned before they are compared. Comparing place by place instead would call every digit after a
    missing one wrong: 2345 for 12345 has one error of five here (0.8), five there.

    Raises:
        ValueError: as `digits_match`.
    """
    predicted = _IGNORED.sub("", prediction)
    return max(1 - edit_distance(predicted, r) / max(len(predicted), len(r)) for r in _references(references))


def _references(references: Sequence[str]) -> list[str]:
    if isinstance(references, str) or not references:
        raise ValueError(f"expected a list of one or more references, got {references!r}")
    for reference in references:
        if not re.search(r"\d", reference):
            raise ValueError(f"expected a reference with a digit in it, got {reference!r}")
    return [_IGNORED.sub("", reference) for reference in references]
