"""Exact match, F1, ANLS, pages and edit distance on hand-worked cases."""

import random

import pytest

from vlm_peft.metrics.answers import anls, edit_distance, exact_match, page_scores, split_pages, token_f1


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["Eiffel tower"], 1, 1),
        ("a cat sat", ["cat"], 0, 2 / 3),
        ("cat", ["dog", "the cat"], 1, 1),
        # A word counts as often as both have it, which a set of words would not show.
        ("the the cat cat", ["cat"], 0, 2 / 3),
        ("no no yes", ["no no no"], 0, 2 / 3),
        ("1976", ["1976"], 1, 1),
        ("$1,000", ["1000"], 1, 1),
        # Punctuation is deleted, not replaced by a space, and only ASCII's.
        ("black-white", ["black white"], 0, 0),
        ("blackwhite", ["black-white"], 1, 1),
        ("\u201cyes\u201d", ["yes"], 0, 0),
        ("CAF\u00c9", ["caf\u00e9"], 1, 1),
        ("theatre", ["atre"], 0, 0),
        ("dog", ["cat"], 0, 0),
        # No answer: right only if nothing is said. An empty reference beside a real one does not count.
        ("", [""], 1, 1),
        ("the", ["", "!"], 1, 1),
        ("cat", [""], 0, 0),
        ("", ["cat"], 0, 0),
        ("", ["", "cat"], 0, 0),
    ],
)
def test_exact_match_and_f1(prediction, references, exact, f1):
    assert exact_match(prediction, references) == exact
    assert token_f1(prediction, references) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("hello", ["hello"], 1.0),
        ("  HeLLo ", ["hello"], 1.0),
        ("new  york", ["New York"], 1.0),
        ("hallo", ["hello"], 0.8),
        ("hallo", ["x", "hello"], 0.8),
        # A distance of exactly one half is too far.
        ("ab", ["ax"], 0.0),
        ("abc", ["abx"], 2 / 3),
        ("abcde", ["abxyz"], 0.0),
        ("", ["hello"], 0.0),
        ("hello", [""], 0.0),
        ("", [""], 1.0),
        ("\u00dcber", ["\u00fcber"], 1.0),
        ("10 %", ["10%"], 0.75),
    ],
)
def test_anls(prediction, references, expected):
    assert anls(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [exact_match, token_f1, anls])
@pytest.mark.parametrize("references", [[], "text"])
def test_references_that_are_no_list_are_named(metric, references):
    with pytest.raises(ValueError, match="expected a list of one or more references"):
        metric("x", references)


@pytest.mark.parametrize(
    ("named", "evidence", "expected"),
    [
        ({3, 7}, {3, 7}, (1, 1, 1)),
        ({3}, {3, 7}, (1, 0.5, 2 / 3)),
        ({1, 2, 3, 7}, {3, 7}, (0.5, 1, 2 / 3)),
        ({1}, {3}, (0, 0, 0)),
        (set(), {3}, (0, 0, 0)),
        ({3}, set(), (0, 0, 0)),
        (set(), set(), (1, 1, 1)),
    ],
)
def test_page_scores(named, evidence, expected):
    assert page_scores(named, evidence) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "answer", "pages"),
    [
        ("42 (pages 3, 7)", "42", {3, 7}),
        ("pages 3 and 7", "", {3, 7}),
        ("42, pp. 3 and 7", "42", {3, 7}),
        ("42 [slides 3 & 7]", "42", {3, 7}),
        ("42 (Pages: 3, 7, and 9).", "42", {3, 7, 9}),
        ("Page 3, 7: 42", "42", {3, 7}),
        ("42 (page 3; page 7)", "42", {3, 7}),
        ("42 (pages 3-5)", "42", {3, 4, 5}),
        ("42 (pages 3\u20135, 9 to 10)", "42", {3, 4, 5, 9, 10}),
        ("U.S. (page 3 of 20)", "U.S.", {3}),
        ("42 (page 3", "42", {3}),
        ("42\n(pages\t3,\n7)", "42", {3, 7}),
        # These name no page.
        ("42", "42", set()),
        (" 12 pages ", "12 pages", set()),
        ("page 3.5", "page 3.5", set()),
        ("pages 1,000", "pages 1,000", set()),
        ("slides 30% down", "slides 30% down", set()),
        ("stop 5, homepage 3", "stop 5, homepage 3", set()),
        ("page two", "page two", set()),
        ("", "", set()),
    ],
)
def test_pages_are_split_from_the_answer(text, answer, pages):
    assert split_pages(text) == (answer, pages)


def test_long_runs_of_spaces_in_a_text_take_no_time():
    # The cube of 20,000 would not end.
    assert split_pages(("page" + " " * 20_000) * 3) == ("page page page", set())


def table_distance(first: str, second: str) -> int:
    row = list(range(len(first) + 1))
    for count, b in enumerate(second, 1):
        above, row = row, [count]
        for place, a in enumerate(first):
            row.append(min(above[place] + (a != b), above[place + 1] + 1, row[place] + 1))
    return row[-1]


@pytest.mark.parametrize("longest", [3, 12, 90])
def test_edit_distance_equals_the_table(longest):
    random_source = random.Random(longest)

    def text() -> str:
        return "".join(random_source.choices("ab\u00e9\U0001f600", k=random_source.randint(0, longest)))

    pairs = [(text(), text()) for _ in range(150)]
    assert [edit_distance(*pair) for pair in pairs] == [table_distance(*pair) for pair in pairs]
    assert edit_distance("kitten", "sitting") == 3
