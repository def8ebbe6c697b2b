"""Retrieval between pictures and texts: R@k both ways and the median rank, under the names of CLIP_benchmark.

`image_retrieval_recall@k` is text to image: the share of texts whose picture is among the first k. In
`text_retrieval_recall@k`, image to text, a picture counts once: one of its texts among the first k is enough (the five
captions of Flickr30k and COCO). Both are 0..1; ranks count from 1.
"""

from collections.abc import Sequence

import numpy as np

RECALLS = (1, 5, 10)
"""What papers report."""

_BLOCK = 50_000_000  # Scores held at once, 200 MB in float32.


def retrieval_ranks(images: np.ndarray, texts: np.ndarray, picture_of: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rank of the first right answer; of equal scores the earlier one comes first, as in a stable sort.

    Args:
        images (`np.ndarray`): `(P, D)`, of unit length.
        texts (`np.ndarray`): `(T, D)`, of unit length.
        picture_of (`Sequence[int]`): `(T,)`, number of each text's picture.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Of each text among pictures `(T,)`, and of each picture among texts `(P,)`.

    Raises:
        ValueError: When there is nothing to find, or a picture has no text.
    """
    owners = np.asarray(picture_of, dtype=np.int64)
    if not len(images) or owners.shape != (len(texts),):
        raise ValueError(
            f"expected a picture for each text, got {len(images)} pictures, {owners.shape} for {len(texts)}"
        )
    without = np.setdiff1d(np.arange(len(images)), owners)
    if len(without):
        raise ValueError(f"expected a text for each picture, picture {without[0]} has none")
    order = np.argsort(owners, kind="stable")
    starts = np.searchsorted(owners[order], np.arange(len(images) + 1))
    of_text, of_image = np.empty(len(texts), np.int64), np.empty(len(images), np.int64)
    for begin, end in _blocks(len(texts), len(images)):
        scores = texts[begin:end] @ images.T
        of_text[begin:end] = _rank(scores, owners[begin:end])
    for begin, end in _blocks(len(images), len(texts)):
        scores = images[begin:end] @ texts.T
        best = np.empty(end - begin, np.int64)
        for row in range(end - begin):
            own = order[starts[begin + row] : starts[begin + row + 1]]
            best[row] = own[scores[row, own].argmax()]
        of_image[begin:end] = _rank(scores, best)
    return of_text, of_image


def _rank(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    rows = np.arange(len(scores))
    own = scores[rows, right][:, None]
    earlier = np.arange(scores.shape[1])[None] < right[:, None]
    return 1 + ((scores > own) | ((scores == own) & earlier)).sum(axis=1)


def _blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    size = max(1, _BLOCK // max(1, columns))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def retrieval_scores(
    of_text: np.ndarray, of_image: np.ndarray, picture_of: Sequence[int]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """R@1/5/10 and the median rank of both directions.

    Args:
        of_text, of_image, picture_of: Of [`retrieval_ranks`].

    Returns:
        `tuple[dict, dict]`: Metrics; and of each R@k what every picture adds to it, whose mean over pictures it is: the
        units of a bootstrap are pictures, since the texts of one belong together.
    """
    owners = np.asarray(picture_of, dtype=np.int64)
    metrics, per_picture = {}, {}
    for k in RECALLS:
        hits = np.bincount(owners, weights=of_text <= k, minlength=len(of_image))
        per_picture[f"image_retrieval_recall@{k}"] = (hits * len(of_image) / len(of_text)).tolist()
        per_picture[f"text_retrieval_recall@{k}"] = (of_image <= k).astype(float).tolist()
        metrics[f"image_retrieval_recall@{k}"] = float((of_text <= k).mean())
        metrics[f"text_retrieval_recall@{k}"] = float((of_image <= k).mean())
    metrics["image_retrieval_median_rank"] = float(np.median(of_text))
    metrics["text_retrieval_median_rank"] = float(np.median(of_image))
    return metrics, per_picture
