"""Short answers against accepted ones: exact match, token F1, ANLS, and the pages that an answer names as evidence.

Sources: exact match and F1, Rajpurkar et al., SQuAD, EMNLP 2016, with the no-answer cases of SQuAD 2.0, ACL 2018; ANLS,
Biten et al., Scene Text Visual Question Answering, ICCV 2019; precision, recall and F1 of evidence as sets, as for
supporting facts in Yang et al., HotpotQA, EMNLP 2018.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence, Set

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# "3", "3-5", "3, 5 and 7"; never the beginning of "3.5", "30%" or "1,000".
_NUMBER = r"\d{1,4}(?![\d%]|[.,]\d{3}|\.\d)"
# Single spaces only, which is what `split_pages` gives it: runs of spaces would cost the cube of their length.
_RANGE = rf"{_NUMBER}(?: ?(?:-|\u2013|to) ?{_NUMBER})?"
_LIST = rf"{_RANGE}(?:(?: ?[,;&] ?| )(?:and )?{_RANGE})*"
_PAGES = re.compile(
    rf"[(\[]? ?\b(?:pages?|slides?|pp?\.) ?:? ?(?P<pages>{_LIST})(?: of \d+)? ?[)\]]?(?: ?\.?$)?",
    re.IGNORECASE | re.ASCII,
)


def normalise_answer(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, without ASCII punctuation, articles and repeated spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the normalised prediction is one of the normalised references, else 0.

    References that are empty once normalised count only if all are: the question then has no answer, and an empty
    prediction is the right one.

    Raises:
        ValueError: if there is no reference, or a text is given in place of the list.
    """
    return float(normalise_answer(prediction) in _accepted(references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Return the F1 of the words that prediction and reference share, 0..1, of the best reference.

    A word counts as often as it occurs in both. Questions without an answer are treated as in `exact_match`.

    Raises:
        ValueError: as `exact_match`.
    """
    predicted = Counter(normalise_answer(prediction).split())
    return max(_f1(predicted, Counter(reference.split())) for reference in _accepted(references))


def anls(prediction: str, references: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity to the nearest reference, 0..1.

    1 - distance / length of the longer text where that distance is below one half, else 0; upper and lower case, outer
    and repeated spaces make no difference. The mean over questions is the ANLS.

    Raises:
        ValueError: as `exact_match`.
    """
    _check(references)
    return max(_similarity(_plain(prediction), _plain(reference)) for reference in references)


def page_scores(named: Set[int], evidence: Set[int]) -> tuple[float, float, float]:
    """Return precision, recall and F1 of the pages named, each 0..1: 0 where 0/0, but 1 where both sets are empty."""
    if not named and not evidence:
        return 1.0, 1.0, 1.0
    common = len(named & evidence)
    precision = common / len(named) if named else 0.0
    recall = common / len(evidence) if evidence else 0.0
    return precision, recall, 2 * common / (len(named) + len(evidence))


def split_pages(text: str) -> tuple[str, set[int]]:
    """Return an answer without the pages that it names, and their numbers.

    "42 (pages 3, 7)" is "42" and {3, 7}; so are "42, pp. 3 and 7", "42 [slides 3 & 7]" and "Page 3, 7: 42". "pages 3-5"
    are three pages. A text that is pages only leaves an empty answer; what is not understood stays in the answer.
    """
    text = " ".join(text.split())
    pages: set[int] = set()
    for mention in _PAGES.finditer(text):
        for first, last in re.findall(r"(\d+)(?: ?(?:-|\u2013|to) ?(\d+))?", mention["pages"], re.IGNORECASE):
            pages.update(range(int(first), int(last or first) + 1))
    return (" ".join(_PAGES.sub(" ", text).split()).strip(" ,;:") if pages else text), pages


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and exchanges of one character.

    A column of the distance table is held as the bits of two whole numbers, where it rises and where it falls; a whole
    column is one step, and so a pair of long answers takes milliseconds.
    Source: Myers, A fast bit-vector algorithm for approximate string matching, JACM 1999; Hyyrö, 2003.
    """
    if not first:
        return len(second)
    places: dict[str, int] = {}
    for place, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << place
    every, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    rises, falls, distance = every, 0, len(first)
    for character in second:
        same = places.get(character, 0)
        diagonal = (((same & rises) + rises) ^ rises) | same
        right_rises = falls | ~(diagonal | rises) & every
        right_falls = rises & diagonal
        distance += bool(right_rises & last) - bool(right_falls & last)
        # The first row of the table counts up: one more character of the second text, one more insertion.
        right_rises, right_falls = (right_rises << 1 | 1) & every, right_falls << 1 & every
        same |= falls
        rises, falls = right_falls | ~(same | right_rises) & every, right_rises & same
    return distance


def _accepted(references: Sequence[str]) -> list[str]:
    _check(references)
    return [answer for answer in map(normalise_answer, references) if answer] or [""]


def _check(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError(f"expected a list of one or more references, got {references!r}")


def _f1(predicted: Counter, reference: Counter) -> float:
    if not predicted or not reference:
        return float(predicted == reference)
    return 2 * (predicted & reference).total() / (predicted.total() + reference.total())


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(first: str, second: str) -> float:
    distance = edit_distance(first, second) / max(len(first), len(second), 1)
    return 1 - distance if distance < 0.5 else 0.0
