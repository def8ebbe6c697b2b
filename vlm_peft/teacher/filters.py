"""Filters: why an answer is not trained on. Each gives its reason in words; none is silent.

Stage: answers -> reasons, from texts alone; likeness to the picture is `likeness.py`'s.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import xxhash

REFUSED = "refusal"
TRUNCATED = "cut off"
EMPTY = "empty"
SPECIAL = "special tokens"
REPEATED = "repetition"
LANGUAGE = "other language"
TOO_SHORT = "too short"
TOO_LONG = "too long"
DUPLICATE = "near-duplicate"
LEAKED = "picture of an evaluation set"
UNLIKE = "unlike the picture"

_REFUSALS = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:can(?:'t|not| not)|won't|do not|don't) (?:\w+ )?"
    r"(?:assist|help|see|view|provide|describe|identify|process|analy[sz]e|fulfil|comply|answer)"
    r"|as an? (?:ai|artificial|language model|large language)"
    r"|no (?:image|picture|photo) (?:is |was |has been )?(?:provided|attached|given|uploaded|visible)"
    r"|please (?:provide|upload|share) (?:an|the|your) (?:image|picture|photo)"
    r"|against my (?:guidelines|programming))",
    re.IGNORECASE,
)
# Control tokens of chat templates, and marks that stand for pictures.
_SPECIAL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|</?s>|<(?:image|video|pad|unk|bos|eos|mask)>|</?think>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|<image_soft_token>|\ufffd"
)
_WORD = re.compile(r"\w+(?:['\u2019]\w+)?")
_FUNCTION_WORDS = frozenset(
    "a an the and or but of in on at to from with by for is are was were be has have it its there this that these "
    "which who he she they his her their as no not two some one into over under between near next behind up".split()
)

_TIMES = 4  # times in a row that a short sequence of words may not stand
_LONG = 8  # words of a sequence of which two repetitions are too many
_PERMUTATIONS, _BANDS = 128, 32


def words(text: str) -> list[str]:
    """Words of a text, in lower case."""
    return _WORD.findall(text.lower())


def is_refusal(text: str) -> bool:
    """Whether a text says, in English, that there will be no answer, or that there is no picture."""
    return _REFUSALS.search(text.replace("\u2019", "'")) is not None


def has_special_tokens(text: str) -> bool:
    """Whether a text holds what looks like a control token, or characters that could not be decoded."""
    return _SPECIAL.search(text) is not None


def repeats(text: str) -> bool:
    """Whether a sequence of words stands four times in a row, or a long one (8 words) three times anywhere."""
    found = words(text)
    for length in range(1, min(_LONG, len(found) // _TIMES) + 1):
        equal = 0
        for place in range(length, len(found)):
            equal = equal + 1 if found[place] == found[place - length] else 0
            if equal >= length * (_TIMES - 1):
                return True
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    for place in range(len(found) - _LONG + 1):
        sequence = tuple(found[place : place + _LONG])
        counts[sequence] += 1
        if counts[sequence] >= 3:
            return True
    return False


def is_english(text: str) -> bool:
    """Whether a text may be English: nine of ten letters are Latin, and of eight words one is a function word."""
    letters = [letter for letter in text if letter.isalpha()]
    latin = sum("LATIN" in unicodedata.name(letter, "") for letter in letters)
    if letters and latin < 0.9 * len(letters):
        return False
    found = words(text)
    return len(found) < 8 or any(word in _FUNCTION_WORDS for word in found)


def judge(texts: Sequence[str], finish: str, *, length: tuple[int | None, int | None], english: bool) -> str | None:
    """Why an answer that was read is not taken, from its texts alone.

    Args:
        texts (`Sequence[str]`): Of the answer.
        finish (`str`): See [`~vlm_peft.teacher.questions.Answer`].
        length (`tuple`): Words that the texts together have at least, and at most.
        english (`bool`): Other languages are not taken.
    """
    whole = "\n".join(texts)
    count = len(words(whole))
    if not any(map(str.isalnum, whole)):
        return EMPTY
    if is_refusal(whole):
        return REFUSED
    if has_special_tokens(whole):
        return SPECIAL
    if repeats(whole):
        return REPEATED
    if finish == "length":
        return TRUNCATED
    if english and not is_english(whole):
        return LANGUAGE
    if length[0] is not None and count < length[0]:
        return TOO_SHORT
    if length[1] is not None and count > length[1]:
        return TOO_LONG
    return None


def near_duplicates(texts: Sequence[str], similarity: float) -> list[int | None]:
    """For each text the number of an earlier one that is nearly the same, if there is one that is not itself left out.

    Texts are sets of three words in a row; the share that two have in common is exact, and candidates are found by
    MinHash in bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4).

    Args:
        texts (`Sequence[str]`): In the order in which they count.
        similarity (`float`): Jaccard's, 0..1, from which on two are the same.
    """
    sets = [_shingles(text) for text in texts]
    found: list[int | None] = []
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for number, own in enumerate(sets):
        keys = list(enumerate(_bands(own)))
        candidates = sorted({other for key in keys for other in buckets[key]})
        same = next((other for other in candidates if _jaccard(own, sets[other]) >= similarity), None)
        found.append(same)
        if same is None:
            for key in keys:
                buckets[key].append(number)
    return found


def _shingles(text: str) -> frozenset[int]:
    found = words(text)
    pieces = [" ".join(found[place : place + 3]) for place in range(max(len(found) - 2, 1))]
    return frozenset(xxhash.xxh32_intdigest(piece.encode()) for piece in pieces)


def _jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)


_FACTORS = np.random.default_rng(0).integers(0, 2**64, (2, _PERMUTATIONS), dtype=np.uint64)


def _bands(shingles: frozenset[int]) -> list[bytes]:
    """The smallest of the set under each of 128 hash functions, in bands of four."""
    values = np.fromiter(shingles, np.uint64, len(shingles))
    # Multiply-shift: the upper half of a product modulo 2**64.
    smallest = ((values[:, None] * (_FACTORS[0] | np.uint64(1)) + _FACTORS[1]) >> np.uint64(32)).min(axis=0)
    return [band.tobytes() for band in np.split(smallest, _BANDS)]
