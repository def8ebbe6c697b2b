"""Digits read from a picture, on hand-worked cases."""

import pytest

from vlm_peft.metrics.digits import digit_accuracy, digits_match


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "accuracy"),
    [
        ("12345", ["12345"], 1, 1),
        ("12346", ["12345"], 0, 0.8),
        # One digit is missing, and the four others are right although none is in its place.
        ("2345", ["12345"], 0, 0.8),
        ("112345", ["12345"], 0, 5 / 6),
        ("21", ["12"], 0, 0),
        ("1 234", ["1234"], 1, 1),
        ("1,234/5.\n", ["1-2_3;4:5"], 1, 1),
        ("1234", ["9", "1234"], 1, 1),
        # What is no digit is an error.
        ("a7", ["7"], 0, 0.5),
        ("It is 42", ["42"], 0, 2 / 6),
        ("\u0664\u0662", ["42"], 0, 0),
        ("", ["42"], 0, 0),
        (" , ", ["42"], 0, 0),
        ("007", ["7"], 0, 1 / 3),
    ],
)
def test_hand_worked_cases(prediction, references, exact, accuracy):
    assert digits_match(prediction, references) == exact
    assert digit_accuracy(prediction, references) == pytest.approx(accuracy)


@pytest.mark.parametrize("metric", [digits_match, digit_accuracy])
@pytest.mark.parametrize(
    ("references", "message"),
    [([], "a list of one or more references"), ("42", "a list of"), (["42", "none"], "a digit in it, got 'none'")],
)
def test_bad_references_are_named(metric, references, message):
    with pytest.raises(ValueError, match=message):
        metric("42", references)
