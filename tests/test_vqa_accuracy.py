"""VQAv2's accuracy on hand-worked cases, with the official rule's quirks."""

import itertools

import pytest

from vlm_peft.metrics.vqa import accuracy_by_type, normalise_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("yes", ["yes"] * 10, 1.0),
        # Ten equal answers are not normalised, and neither is what is compared with them.
        ("Yes", ["yes"] * 10, 0.0),
        ("yes.", ["yes"] * 10, 0.0),
        (" yes\n", ["yes\t"] * 10, 1.0),
        ("Yes", ["yes"] * 9 + ["no"], 1.0),
        ("no", ["yes"] * 9 + ["no"], 0.3),
        ("two", ["2"] * 3 + ["7"] * 7, 0.9),
        ("two", ["2"] * 2 + ["7"] * 8, 0.6),
        ("two", ["2"] + ["7"] * 9, 0.3),
        ("two", ["2"] * 4 + ["7"] * 6, 1.0),
        ("two", ["7"] * 9 + ["8"], 0.0),
        ("a dog", ["dog"] * 4 + ["cat"] * 6, 1.0),
        ("dont know", ["don't know"] * 4 + ["x"] * 6, 1.0),
        ("1,000", ["1000"] * 4 + ["x"] * 6, 1.0),
        ("3.5", ["3.5"] * 4 + ["x"] * 6, 1.0),
        ("t.v.", ["tv"] * 4 + ["x"] * 6, 1.0),
        ("", ["yes"] * 9 + ["no"], 0.0),
        ("caf\u00e9", ["Caf\u00e9"] * 4 + ["x"] * 6, 1.0),
        # Different texts that are equal once normalised: people are left out by number, not by text.
        ("two", ["2", "two", "Two"] + ["7"] * 7, 0.9),
    ],
)
def test_hand_worked_cases(prediction, answers, expected):
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize("count", range(11))
def test_is_the_average_over_the_ways_to_leave_one_person_out(count):
    answers = ["x"] * count + ["y"] * (10 - count)
    nine = [sum(a == "x" for a in subset) for subset in itertools.combinations(answers, 9)]
    assert vqa_accuracy("x", answers) == pytest.approx(sum(min(1, matches / 3) for matches in nine) / 10)


@pytest.mark.parametrize(
    ("answers", "as_ten"),
    [
        (["x"], ["x"] * 10),
        (["y"], ["y"] * 10),
        (["x", "y"], ["x", "y"] * 5),
        (["x", "y", "y", "z", "z"], ["x", "y", "y", "z", "z"] * 2),
    ],
)
def test_fewer_answers_count_as_if_ten_people_had_given_them(answers, as_ten):
    assert vqa_accuracy("x", answers) == pytest.approx(vqa_accuracy("x", as_ten))


def test_a_single_answer_is_compared_as_it_is():
    assert [vqa_accuracy(text, ["yes"]) for text in ("yes", "Yes", "", "yes yes")] == [1, 0, 0, 0]


def test_more_than_ten_answers_keep_the_threshold():
    assert vqa_accuracy("x", ["x"] * 3 + ["y"] * 17) == pytest.approx((3 * 2 / 3 + 17) / 20)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The black-white Dog!", "black white dog"),
        ("black -white", "black white"),
        # A space beside one hyphen, and all of them are deleted.
        ("a-b -c", "ab c"),
        ("a/b, c", "b c"),
        ("1,000-2", "10002"),
        ("none", "0"),
        ("ten of a kind", "10 of kind"),
        ("eleven", "eleven"),
        # The pattern spares a full stop before a digit only, although it was meant for one after a digit, too.
        ("3. and .5 and 3.5 e.g.", "3 and .5 and 3.5 eg"),
        ("." * 40, "." * 8),
        ("youre couldntve couldn'tve shed lets", "you're couldntve couldn't've shed lets"),
        ("somebody'd somebodyd've", "somebodyd somebody'd've"),
        ("Im", "im"),
        ("it's", "it's"),
        ("dog dog", "dog dog"),
        ("'ow'sat twas", "'ow's'at 'twas"),
        ("", ""),
        (" a \n the\t", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalise_answer(text) == expected


def test_accuracy_by_type_takes_the_rows_that_have_one():
    rows = [
        {"answer_type": "number", "question_type": "how many"},
        {"answer_type": "yes/no"},
        {"answer_type": "number", "question_type": None},
        {},
    ]
    assert accuracy_by_type(rows, [1.0, 0.25, 0.0, 1.0]) == {
        "answer_type": {"number": 0.5, "yes/no": 0.25},
        "question_type": {"how many": 1.0},
    }
    assert accuracy_by_type([{}], [1.0]) == {}


@pytest.mark.parametrize("answers", [[], "yes"])
def test_bad_answers_are_named(answers):
    with pytest.raises(ValueError, match="expected a list of one or more answers"):
        vqa_accuracy("yes", answers)
