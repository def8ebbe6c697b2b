"""Score captions against references with coco-caption's own scorers, called one by one.

The scorers are pycocoevalcap's, unchanged. Its `COCOEvalCap.evaluate()` is not used: it builds SPICE first, which
downloads, so offline it fails before any score.

Sources: BLEU, Papineni et al., ACL 2002; ROUGE-L, Lin, 2004; METEOR 1.5, Denkowski and Lavie, 2014; CIDEr (the CIDEr-D
of coco-caption), Vedantam et al., CVPR 2015; SPICE, Anderson et al., ECCV 2016; protocol, Chen et al.,
arXiv:1504.00325.
"""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .caption_tokenizer import Tokenizer, tokenize
from .java_scorers import JavaScorer, ScorerUnavailableError, score_with_java


@dataclass
class CaptionScores:
    """What `score_captions` found."""

    metrics: dict[str, float]
    """coco-caption's names and scales: Bleu_1..Bleu_4, ROUGE_L, METEOR, SPICE in 0..1, CIDEr in 0..10."""
    per_picture: list[float]
    """CIDEr of each picture in input order, 0..10; its mean is `metrics["CIDEr"]`."""
    tokenizer: str
    """The tokenizer used: ptb-java or treebank-python. Scores of different tokenizers do not compare exactly."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Metrics asked for and not computed, each with its reason in one line."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers must know, one sentence each; usually empty."""


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: Tokenizer = "auto",
    meteor: bool = False,
    spice: bool = False,
    idf_references: Sequence[Sequence[str]] = (),
    java_time_limit: float | None = None,
) -> CaptionScores:
    """Score one caption a picture against that picture's references.

    Args:
        predictions: One caption for each picture; may be empty text, which scores 0.
        references: For each picture, in the same order, at least one caption.
        tokenizer: See `caption_tokenizer.Tokenizer`; the one used is in the result.
        meteor: Also METEOR (Java; 6 s to start).
        spice: Also SPICE (Java, and models that pycocoevalcap must already hold; they are never downloaded).
        idf_references: The references of further pictures, not among those scored, that count when CIDEr weighs n-grams
            by their rarity. Makes the CIDEr of one picture or of a small sample mean something.
        java_time_limit: Seconds for each of METEOR and SPICE, by default enough for the number of pictures.

    Raises:
        ValueError: if there is nothing to score, the two lists differ in length, a picture has no reference with a word
            in it, or something other than text is given as a caption.
    """
    predictions = list(predictions)
    truth = [_caption_list(r, f"picture {i}") for i, r in enumerate(references)]
    further = [_caption_list(r, f"idf_references {i}") for i, r in enumerate(idf_references)]
    _check(predictions, truth)

    groups = [*truth, *further]
    texts = [*predictions, *(caption for group in groups for caption in group)]
    tokenized, tokenizer_used = tokenize(texts, tokenizer)
    hypotheses, rest = tokenized[: len(predictions)], iter(tokenized[len(predictions) :])
    groups = [[next(rest) for _ in group] for group in groups]
    for index, group in enumerate(groups[: len(predictions)]):
        if not any(group):
            raise ValueError(f"picture {index}: expected a reference with a word in it, got {truth[index]!r}")

    metrics, per_picture = _python_scores(hypotheses, groups)
    scores = CaptionScores(metrics, per_picture, tokenizer_used)
    wanted: dict[JavaScorer, bool] = {"METEOR": meteor, "SPICE": spice}
    for name in wanted:
        if not wanted[name]:
            continue
        try:
            metrics[name] = score_with_java(name, hypotheses, groups[: len(hypotheses)], java_time_limit)
        except ScorerUnavailableError as error:
            scores.skipped[name] = str(error)
    if len(groups) == 1:
        scores.notes.append(
            "CIDEr of a single picture is always 0: every n-gram occurs in every picture, so its weight is log(1/1)."
        )
        warnings.warn(scores.notes[-1], stacklevel=2)
    return scores


class Cider:
    """CIDEr of single texts, with the document frequencies of a whole set: the same number whatever else is scored.

    The arithmetic is that of pycocoevalcap's scorer, which computes the vectors of all references anew for every text;
    here those of a picture are kept, which is ten times as fast.

    Args:
        references: For each picture of the set, at least one caption.
        tokenizer: The same for all texts; a call of Java takes most of a second.

    Raises:
        ValueError: if there are fewer than two pictures, by which no word would be rarer than another.
    """

    def __init__(self, references: Sequence[Sequence[str]], tokenizer: Tokenizer = "treebank-python"):
        if len(references) < 2:
            raise ValueError(f"expected references of at least two pictures, got those of {len(references)}")
        self._tokenizer, self._log_pictures = tokenizer, math.log(len(references))
        tokens = iter(tokenize([caption for group in references for caption in group], tokenizer)[0])
        self._tokens = {tuple(group): [next(tokens) for _ in group] for group in references}
        self._frequencies: Counter = Counter()
        for group in references:
            self._frequencies.update({ngram for text in self._tokens[tuple(group)] for ngram in _ngrams(text)})
        self._known: dict[tuple[str, ...], list[_Weighed]] = {}

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        """Return the CIDEr of one caption, 0..10, against the references of its picture."""
        key = tuple(references)
        if key not in self._known:
            texts = self._tokens[key] if key in self._tokens else tokenize(key, self._tokenizer)[0]
            self._known[key] = [self._weigh(text) for text in texts]
        guess, truth = self._weigh(tokenize([prediction], self._tokenizer)[0][0]), self._known[key]
        return 10 * sum(_likeness(guess, each) for each in truth) / len(truth)

    def _weigh(self, text: str) -> "_Weighed":
        weights: list[dict] = [{} for _ in range(_LONGEST)]
        counts = _ngrams(text)
        for ngram, count in counts.items():
            rarity = self._log_pictures - math.log(max(1, self._frequencies.get(ngram, 0)))
            weights[len(ngram) - 1][ngram] = count * rarity
        norms = [math.sqrt(sum(weight**2 for weight in each.values())) for each in weights]
        # The scorer's length of a text: its pairs of words.
        return _Weighed(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


_LONGEST = 4
"""Words of an n-gram."""

_LENGTH_DEVIATION = 6.0
"""Of the penalty on other lengths than a reference's, in words."""


@dataclass(frozen=True)
class _Weighed:
    """A text's n-grams with their weights, one dict a length, their norms, and the text's length."""

    weights: list[dict]
    norms: list[float]
    length: int


def _ngrams(text: str) -> Counter:
    words = text.split()
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, _LONGEST + 1)
        for start in range(len(words) - length + 1)
    )


def _likeness(guess: _Weighed, truth: _Weighed) -> float:
    """CIDEr-D of a text and one reference, 0..1."""
    found = 0.0
    for ours, theirs, norm, their_norm in zip(guess.weights, truth.weights, guess.norms, truth.norms, strict=True):
        shared = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs)
        found += shared / (norm * their_norm) if norm and their_norm else shared
    return found / _LONGEST * math.exp(-((guess.length - truth.length) ** 2) / (2 * _LENGTH_DEVIATION**2))


def _caption_list(captions: Sequence[str], where: str) -> list[str]:
    if isinstance(captions, str):
        raise ValueError(f"{where}: expected a list of references, got the text {captions!r}; put it in a list")
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(f"{where}: expected text as reference, got {type(caption).__name__} {caption!r}")
    return list(captions)


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise ValueError(
            f"expected as many predictions as lists of references, got {len(predictions)} predictions "
            f"and {len(references)} lists of references"
        )
    if not predictions:
        raise ValueError("expected at least one picture to score, got none")
    for index, prediction in enumerate(predictions):
        if not isinstance(prediction, str):
            raise ValueError(
                f"picture {index}: expected text as prediction, got {type(prediction).__name__} {prediction!r}"
            )
    without = [index for index, group in enumerate(references) if not group]
    if without:
        raise ValueError(
            f"picture {without[0]}: expected at least one reference, got none "
            f"({len(without)} of {len(references)} pictures have none)"
        )


def _python_scores(hypotheses: list[str], groups: list[list[str]]) -> tuple[dict[str, float], list[float]]:
    """Return the metrics in pure Python and each picture's CIDEr; groups without a hypothesis count for idf only."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    count = len(hypotheses)
    truth = dict(enumerate(groups[:count]))
    guesses = {index: [caption] for index, caption in enumerate(hypotheses)}
    bleu, _ = Bleu(4).compute_score(truth, guesses, verbose=0)
    rouge, _ = Rouge().compute_score(truth, guesses)
    # The scorer has no parameter for the document frequencies, but it counts every picture it is given.
    _, cider = Cider().compute_score(dict(enumerate(groups)), guesses | {i: [""] for i in range(count, len(groups))})
    per_picture = [float(score) for score in cider[:count]]
    metrics = {f"Bleu_{n}": float(score) for n, score in enumerate(bleu, 1)}
    metrics |= {"ROUGE_L": float(rouge), "CIDEr": sum(per_picture) / count}
    return metrics, per_picture
