"""Calibration: whether a model is right as often as it says, and the temperature that makes it so."""

import math
from collections.abc import Sequence

import numpy as np

BINS = 15
"""Of equal width, as in the source."""


def calibration_error(probabilities: np.ndarray, labels: Sequence[int]) -> float:
    """Expected calibration error (ECE): how far confidence and accuracy are apart, 0..1.

    Rows are sorted into [`BINS`] by the probability of the class that comes first; the gaps between mean probability
    and accuracy are averaged, weighed by the rows of each bin. Source: Guo et al., arXiv 1706.04599, section 2.

    Args:
        probabilities (`np.ndarray`): `(P, C)`, each row sums to 1.
        labels (`Sequence[int]`): `(P,)`, numbers of the true classes.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == np.asarray(labels)
    bins = np.ceil(confidence * BINS).astype(int).clip(1, BINS)
    gaps = [np.sum(bins == each) * abs(np.mean((confidence - right)[bins == each])) for each in np.unique(bins)]
    return float(np.sum(gaps) / len(confidence))


def fit_temperature(log_probabilities: np.ndarray, labels: Sequence[int]) -> float:
    """The temperature by which scores must be divided for the true classes to be likeliest, 1/64..64.

    One number, so that no row changes its first class. Source: Guo et al., arXiv 1706.04599, section 4.2.

    Rows of which none is wrong have no such temperature: the lower, the likelier. They cannot show more than that
    another row is right with the probability (P + 1) / (P + 2), which is Laplace's rule of succession; the temperature
    is then that at which the mean confidence is so high, and 1 where it is already.

    Args:
        log_probabilities (`np.ndarray`): `(P, C)`, nats, up to a constant in each row.
        labels (`Sequence[int]`): `(P,)`, numbers of the true classes.
    """
    rows, places = np.arange(len(labels)), np.asarray(labels)
    of_true = log_probabilities[rows, places]
    others = log_probabilities.copy()
    others[rows, places] = -np.inf
    margins = of_true - others.max(axis=1)
    if (margins >= 0).all():
        return _least_supported(log_probabilities, ((margins > 0).sum() + 1) / (len(rows) + 2))

    def loss(exponent: float) -> float:
        scaled = log_probabilities * 2.0**-exponent
        highest = scaled.max(axis=1, keepdims=True)
        total = highest[:, 0] + np.log(np.exp(scaled - highest).sum(axis=1))
        return float(np.mean(total - scaled[rows, places]))

    # The loss is convex in 1/T, so that it has one minimum in log T, too: golden-section search.
    low, high, ratio = -6.0, 6.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return 2.0 ** ((low + high) / 2)


def _least_supported(log_probabilities: np.ndarray, confidence: float) -> float:
    """The temperature from 1/64 to 1 with this mean probability of the first class; 1 if it is more there."""

    def mean(exponent: float) -> float:
        scaled = (log_probabilities - log_probabilities.max(axis=1, keepdims=True)) * 2.0**-exponent
        return float(np.mean(1 / np.exp(scaled).sum(axis=1)))

    low, high = -6.0, 0.0
    if mean(high) >= confidence:
        return 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > confidence else (low, middle)
    return 2.0 ** ((low + high) / 2)
