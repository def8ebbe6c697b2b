"""Classification: the right class first, among the first five, and on average over classes; CLIP_benchmark's names."""

from collections.abc import Sequence

import numpy as np


def classification_scores(scores: np.ndarray, labels: Sequence[int]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """`acc1`, `acc5` (with more than five classes) and `mean_per_class_recall`, all 0..1.

    Args:
        scores (`np.ndarray`): `(P, C)`, the higher the likelier; of equal ones the earlier class comes first.
        labels (`Sequence[int]`): `(P,)`, numbers of the true classes.

    Returns:
        `tuple[dict, dict]`: Metrics; and of the accuracies each picture's own, 0 or 1. Classes without a picture have
        no part in `mean_per_class_recall`.

    Raises:
        ValueError: When there is no picture, or a label is no class.
    """
    truth = np.asarray(labels, dtype=np.int64)
    if scores.ndim != 2 or not len(scores) or truth.shape != (len(scores),):
        raise ValueError(f"expected a label for each picture, got scores {scores.shape} and labels {truth.shape}")
    if truth.min() < 0 or truth.max() >= scores.shape[1]:
        raise ValueError(f"expected labels from 0 to {scores.shape[1] - 1}, got {truth.min()} to {truth.max()}")
    order = np.argsort(-scores, axis=1, kind="stable")
    per_picture = {"acc1": (order[:, 0] == truth).astype(float).tolist()}
    if scores.shape[1] > 5:
        per_picture["acc5"] = (order[:, :5] == truth[:, None]).any(axis=1).astype(float).tolist()
    metrics = {name: float(np.mean(values)) for name, values in per_picture.items()}
    right, count = (
        np.bincount(truth, weights=weights, minlength=scores.shape[1]) for weights in (per_picture["acc1"], None)
    )
    metrics["mean_per_class_recall"] = float((right[count > 0] / count[count > 0]).mean())
    return metrics, per_picture
