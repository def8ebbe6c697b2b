"""VQAv2's accuracy of answers to questions about pictures, as the official evaluation counts it.

An answer is right to the degree that people gave it: min(1, how many of nine people gave it / 3), averaged over the ten
ways to leave one of ten people out. Texts are normalised before they are compared, unless all people gave the same one.

Source: Antol et al., VQA, ICCV 2015, and Goyal et al., CVPR 2017; the evaluation code at github.com/GT-Vision-Lab/VQA
(BSD-2), whose word lists are the tables below and whose slips are kept, because published numbers have them:

- The pattern for full stops was meant to spare those after a digit, too, and does not: "3." becomes "3". What it spares
  is a full stop before a digit ("3.5"). It stops after 32 of them (a flag passed in the place of a count).
- A sign of punctuation with a space on either side of it anywhere in the text is deleted, otherwise it becomes a space;
  a comma between digits anywhere deletes all signs. "black-white" equals "black white", "black -white" "black white",
  and "a-b, c" is "a b c", but "1,000-2" is "10002".
- "none" is 0, and "somebody'd" loses its apostrophe where all other contractions get theirs.
- Where all ten answers are the same text, it is compared as it is: "Yes" is wrong where ten people wrote "yes".
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PEOPLE = 10
"""Answers to a question of VQAv2."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
# Contractions written without one of their apostrophes get it back. Only these: "lets", "shed" or "were" are words.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalise_answer(text: str) -> str:
    """Return a text as the official evaluation compares it: lower case, no punctuation or articles, numbers as digits.

    Contractions have their apostrophes; the module's text has the rule's quirks.
    """
    text = _one_line(text)
    is_number = _COMMA_IN_NUMBER.search(text)
    cleaned = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if beside_space or is_number else " ")
    cleaned = _FULL_STOP.sub("", cleaned, count=_MOST_FULL_STOPS)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of one answer, 0..1.

    Data sets with fewer than ten answers a question are scored as if each answer had been given equally often by ten
    people: one answer counts as ten equal ones (and so is compared as it is), one of five as two of ten. More than ten
    are all counted, with the same threshold of three.

    Args:
        prediction: The model's answer.
        answers: What people answered; the same text once for each who gave it.

    Raises:
        ValueError: if there is no answer, or a text is given in place of the list.
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"expected a list of one or more answers, got {answers!r}")
    prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise_answer(prediction), [normalise_answer(answer) for answer in answers]
    people = max(len(answers), PEOPLE)
    # By count and not by text: of two people with one answer, only one is left out at a time.
    matching = answers.count(prediction) * people / len(answers)
    if not matching:
        return 0.0
    left_out_matched = matching * min(1.0, (matching - 1) / 3)
    left_out_did_not = (people - matching) * min(1.0, matching / 3)
    return (left_out_matched + left_out_did_not) / people


def accuracy_by_type(rows: Iterable[Mapping[str, Any]], accuracies: Iterable[float]) -> dict[str, dict[str, float]]:
    """Return the mean accuracy for each kind of question.

    Args:
        rows: Questions, of which those with `answer_type` (yes/no, number, other) or `question_type` ("how many", ...)
            count; both are text.
        accuracies: Of the rows, in the same order.

    Returns:
        `{"answer_type": {"number": 0.5, ...}, "question_type": {...}}`, kinds in alphabetical order; without a key that
        no row has.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for row, accuracy in zip(rows, accuracies, strict=True):
        for key in ("answer_type", "question_type"):
            if row.get(key) is not None:
                groups.setdefault(key, {}).setdefault(str(row[key]), []).append(accuracy)
    return {
        key: {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())}
        for key, kinds in sorted(groups.items())
    }


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
