"""How sure a mean over pictures is: bootstrap intervals and a paired test, on per-picture scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

_BLOCK = 2_000_000  # Random numbers drawn at once; keeps the memory of a large test set at some 20 MB.


def bootstrap_interval(values: Sequence[float], samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean over pictures.

    The pictures are what is drawn again; the scores stay, so CIDEr's n-gram weights are those of the whole set.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Args:
        values: One score for each picture.
        samples: How often the set is drawn again, with replacement and in its own size.
        seed: Of the random numbers; the same seed gives the same interval.

    Raises:
        ValueError: if there are no values.
    """
    array = _scores(values)
    generator = np.random.default_rng(seed)
    means = [
        array[generator.integers(0, len(array), (rows, len(array)))].mean(axis=1)
        for rows in _blocks(samples, len(array))
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


@dataclass
class PairedDifference:
    """How the mean of one system differs from another's on the same pictures."""

    difference: float
    """Mean of second minus first."""
    interval: tuple[float, float]
    """95 % bootstrap interval of `difference`."""
    p_value: float
    """Two-sided, of the hypothesis that the two systems are the same; at least 1 / (samples + 1)."""


def paired_difference(
    first: Sequence[float], second: Sequence[float], samples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Compare two systems by their scores of the same pictures, by paired approximate randomisation.

    If the systems were the same, each picture's two scores could as well be exchanged; the p-value says how often such
    exchanges, picture by picture at random, give a difference at least as large as the one seen.
    Source: Noreen, Computer-Intensive Methods for Testing Hypotheses, 1989; for text metrics, Riezler and Maxwell, On
    Some Pitfalls in Automatic Evaluation and Significance Testing for MT, 2005 (the +1 counts the unexchanged scores).

    Args:
        first: One score for each picture.
        second: The other system's scores of the same pictures in the same order.
        samples: Number of random exchanges.
        seed: Of the random numbers.

    Raises:
        ValueError: if there are no scores or not the same number of them.
    """
    if len(first) != len(second):
        raise ValueError(f"expected scores of the same pictures, got {len(first)} and {len(second)} scores")
    differences = _scores(second) - _scores(first)
    observed = abs(differences.mean())
    generator = np.random.default_rng(seed)
    as_large = 0
    for rows in _blocks(samples, len(differences)):
        signs = generator.integers(0, 2, (rows, len(differences)), dtype=np.int8) * 2.0 - 1.0
        # A sum in another order differs in its last digits, and equal differences must count as equal.
        as_large += int((np.abs(signs @ differences) / len(differences) >= observed - 1e-12).sum())
    interval = bootstrap_interval(differences.tolist(), seed=seed)
    return PairedDifference(float(differences.mean()), interval, (as_large + 1) / (samples + 1))


def _scores(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"expected at least one score in a flat list, got an array of shape {array.shape}")
    return array


def _blocks(samples: int, size: int) -> list[int]:
    rows = max(1, min(samples, _BLOCK // size))
    full, rest = divmod(samples, rows)
    return [rows] * full + ([rest] if rest else [])


@dataclass
class RunsMean:
    """A mean over several runs of one system (seeds) and over pictures."""

    mean: float
    interval: tuple[float, float]
    """Of what other runs on other pictures would give."""
    runs: int


def runs_mean(
    scores: Sequence[Sequence[float]], level: float = 0.95, usual: tuple[float, int] | None = None
) -> RunsMean:
    """Return a mean over runs and pictures, with an interval that knows that both are samples.

    Runs and pictures are crossed: each run scores the same pictures. The variances of the runs' means and of the
    pictures' means are each divided by their number and widened by Student's t for it, and the two half-widths add as
    squares. What runs and pictures do together is counted twice, so the interval is rather too wide than too narrow.
    Source: Graybill and Wang, Confidence Intervals on Nonnegative Linear Combinations of Variances, 1980, for the sum.

    Args:
        scores: One list for each run, with one score (or one difference of two systems' scores) for each picture.
        level: That the interval covers.
        usual: Variance between runs' means that other systems had, with its degrees of freedom. Three runs alone know
            little of it, and their interval is wide. With it, the larger variance of both is taken.

    Raises:
        ValueError: if there are fewer than two runs or pictures, or the runs' numbers of pictures differ.
    """
    sizes = {len(run) for run in scores}
    if len(scores) < 2 or len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"expected two or more runs with scores of the same pictures, got {[len(s) for s in scores]}")
    array = np.asarray(scores, dtype=np.float64)
    runs, pictures = array.shape
    variance, freedom = float(array.mean(axis=1).var(ddof=1)), runs - 1
    if usual is not None:
        variance, freedom = max(variance, usual[0]), max(freedom, usual[1])
    half = math.hypot(
        student_t(level, freedom) * math.sqrt(variance / runs),
        student_t(level, pictures - 1) * array.mean(axis=0).std(ddof=1) / math.sqrt(pictures),
    )
    mean = float(array.mean())
    return RunsMean(mean, (mean - half, mean + half), runs)


@cache
def student_t(level: float, freedom: int) -> float:
    """Return the bound that Student's t with so many degrees of freedom keeps within with the probability `level`."""
    # t = sqrt(freedom) tan(angle) has the density cos(angle)^(freedom - 1), up to a factor.
    angles = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    below = np.cumsum(np.cos(angles) ** (freedom - 1))
    angle = np.interp((1 + level) / 2, below / below[-1], angles)
    return math.sqrt(freedom) * math.tan(angle)
