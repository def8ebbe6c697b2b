"""Boxes that a model writes as text against the true ones: COCO's average precision, precision, recall and IoU.

The text is `dog [12, 40, 300, 512]; red ball [600, 0, 999, 80]`, or `none`: label and [x1, y1, x2, y2], whole numbers
on a grid of 0..999 over the picture's width and height. Both corners belong to the box: [5, 5, 5, 5] is one cell of the
grid, and so a box has an area and overlaps itself wholly however small it becomes by rounding to the grid. Labels are
the same if they are the same in lower case without outer spaces.

Sources: average precision, Lin et al., Microsoft COCO, ECCV 2014, computed by pycocotools' COCOeval; no-target accuracy
(N-acc), Liu et al., GRES, arXiv 2306.00968.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

GRID = 1000
"""Cells of the grid along each side."""

_ENTRY = re.compile(r"([^\[\]]+)\[ ?" + r" ?, ?".join([r"([0-9]{1,3})"] * 4) + r" ?\] ?\.?")
_SEPARATOR = re.compile(r"[;\n]|(?<=\]),")


@dataclass(frozen=True)
class LabelledBox:
    """A box of a picture.

    Raises:
        ValueError: if the label is empty or the box is not four whole numbers 0 <= x1 <= x2 <= 999, and y likewise.
    """

    label: str
    box: tuple[int, int, int, int]
    """x1, y1, x2, y2 on the grid; both corners belong to the box."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label.strip().lower())
        object.__setattr__(self, "box", tuple(self.box))
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in self.box)
        if not self.label or len(self.box) != 4 or not whole:
            raise ValueError(f"expected a label and four whole numbers, got {self.label!r} and {list(self.box)!r}")
        x1, y1, x2, y2 = self.box
        if not (0 <= x1 <= x2 < GRID and 0 <= y1 <= y2 < GRID):
            raise ValueError(f"expected [x1, y1, x2, y2] in 0..{GRID - 1} with x1 <= x2 and y1 <= y2, got {self.box}")


def parse_boxes(text: str) -> tuple[list[LabelledBox], list[str]]:
    """Read boxes from a model's text; never raises.

    Entries may also be separated by line breaks or by commas, and spaces are free.

    Returns:
        The boxes in the order of the text, and the entries that are none: no label, not four whole numbers in 0..999,
        corners the wrong way round, an entry cut short.
    """
    boxes, malformed = [], []
    for start, end in _entries(text):
        entry = " ".join(text[start:end].split())
        if entry.lower().rstrip(".") == "none":
            continue
        box = _read(entry)
        if box is not None:
            boxes.append(box)
        else:
            malformed.append(entry)
    return boxes, malformed


def box_spans(text: str) -> list[tuple[int, int, int]]:
    """Return where the boxes that `parse_boxes` reads are: places where an entry begins, its bracket opens, it ends.

    An entry begins where the one before it ends, so that what divides them is the later one's.
    """
    spans, before = [], 0
    for start, end in _entries(text):
        if _read(" ".join(text[start:end].split())) is not None:
            spans.append((before, text.index("[", start), end))
        before = end
    return spans


def _entries(text: str) -> Iterator[tuple[int, int]]:
    """Yield where entries begin and end, empty ones left out."""
    start = 0
    for end, after in [*(match.span() for match in _SEPARATOR.finditer(text)), (len(text), 0)]:
        if text[start:end].strip():
            yield start, end
        start = after


def _read(entry: str) -> LabelledBox | None:
    match = _ENTRY.fullmatch(entry)
    try:
        if match is None:
            return None
        x1, y1, x2, y2 = map(int, match.groups()[1:])
        return LabelledBox(match[1], (x1, y1, x2, y2))
    except ValueError:
        return None


@dataclass
class DetectionScores:
    """What `score_boxes` found."""

    metrics: dict[str, float]
    """AP50, AP, precision50, recall50, f1_50, mean_iou and no_target_accuracy, each 0..1; those of true boxes, or of
    names that are not there, only if there are any."""
    f1_50: list[float]
    """F1 of each picture at IoU 0.5, in input order; its mean is `metrics["f1_50"]`."""
    no_target: list[float] = field(default_factory=list)
    """No-target accuracy of each picture that was asked for something it does not have, in input order."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Metrics that could not be computed, each with its reason in one line."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers must know, one sentence each."""


def score_boxes(
    predictions: Sequence[str],
    truths: Sequence[Sequence[LabelledBox]],
    confidences: Sequence[Sequence[float]] | None = None,
    asked: Sequence[Sequence[str]] | None = None,
) -> DetectionScores:
    """Score the boxes of each picture's text against its true ones.

    - `AP50`, `AP`: COCO's, at IoU 0.5 and over 0.50:0.05:0.95, mean over the labels of the true boxes, boxes ranked by
      confidence. Without confidences every box has the score 1.0 and COCOeval ranks by order: of the pictures, and in
      a text; the value then depends on the order of the pictures. Boxes with a label that no true box has do not
      lower it.
    - `precision50`, `recall50`, over all boxes: a predicted and a true box of one label match if their IoU is at least
      0.5; the pairs with the largest IoU are matched first, each box once, whatever its place in the text. What cannot
      be read as a box counts as one that matches nothing, so that nonsense is not taken for "none".
    - `f1_50`: the mean over pictures of 2 x matches / (predicted + true), 1 for rightly no box.
    - `mean_iou`: over true boxes, the IoU of the predicted box of the same label that fits best, 0 without any.
    - `no_target_accuracy`: of the names asked for that no true box of the picture has, the share that no predicted box
      has, either; the mean over pictures with such names. A text with an entry that is no box has none of them right.

    Args:
        predictions: A text for each picture.
        truths: The true boxes of each picture, in the same order; may be none.
        confidences: 0..1, for each picture those of the boxes that `parse_boxes` reads, in its order.
        asked: The names that each picture was asked for.

    Raises:
        ValueError: if there is nothing to score, or the numbers of texts, true boxes, confidences and names differ.
    """
    if len(predictions) != len(truths) or not predictions:
        raise ValueError(
            f"expected texts and true boxes of the same pictures, got {len(predictions)} and {len(truths)}"
        )
    parsed = [parse_boxes(text) for text in predictions]
    f1_50, best_ious, matches, predicted = [], [], 0, 0
    for (boxes, malformed), truth in zip(parsed, truths, strict=True):
        ious = _ious(boxes, truth)
        matched, entries = len(_matches(ious, 0.5)), len(boxes) + len(malformed)
        f1_50.append(2 * matched / (entries + len(truth)) if entries or truth else 1.0)
        best_ious.extend(ious.max(axis=0, initial=0.0).tolist())
        matches += matched
        predicted += entries

    scores = DetectionScores({}, f1_50)
    nothing = "no picture has a true box"
    if best_ious:
        scores.metrics |= average_precision([boxes for boxes, _ in parsed], truths, confidences)
        scores.metrics["recall50"] = matches / len(best_ious)
        scores.metrics["mean_iou"] = sum(best_ious) / len(best_ious)
    else:
        scores.skipped |= dict.fromkeys(["AP50", "AP", "recall50", "mean_iou"], nothing)
    scores.metrics["precision50"] = matches / predicted if predicted else float(not best_ious)
    scores.metrics["f1_50"] = sum(f1_50) / len(f1_50)
    for names, (boxes, malformed), truth in zip(asked or (), parsed, truths, strict=asked is not None):
        absent = {name.strip().lower() for name in names} - {box.label for box in truth}
        if absent:
            found = absent if malformed else absent & {box.label for box in boxes}
            scores.no_target.append(1 - len(found) / len(absent))
    if scores.no_target:
        scores.metrics["no_target_accuracy"] = sum(scores.no_target) / len(scores.no_target)

    unread = [entries for _, entries in parsed if entries]
    if unread:
        scores.notes.append(
            f"{sum(map(len, unread))} entries of {len(unread)} texts are no boxes and count as wrong ones; the first: "
            f"{unread[0][0][:80]!r}."
        )
    return scores


def overlap_f1(prediction: str, truth: Sequence[LabelledBox]) -> float:
    """Return `f1_50` of one text, 0..1, where a pair of boxes counts by its IoU, however small, and not as a match.

    Args:
        prediction: The text.
        truth: The true boxes of its picture; may be none.
    """
    boxes, malformed = parse_boxes(prediction)
    count = len(boxes) + len(malformed) + len(truth)
    return 2 * sum(_matches(_ious(boxes, truth), 0)) / count if count else 1.0


def average_precision(
    predictions: Sequence[Sequence[LabelledBox]],
    truths: Sequence[Sequence[LabelledBox]],
    confidences: Sequence[Sequence[float]] | None = None,
) -> dict[str, float]:
    """Return `AP50` and `AP`, 0..1, of boxes ranked by confidence, equal ones by their order; see `score_boxes`.

    Raises:
        ValueError: if no picture has a true box, or a picture has not as many confidences as predicted boxes.
    """
    if confidences is None:
        confidences = [[1.0] * len(boxes) for boxes in predictions]
    predicted = _by_label(predictions, confidences)
    true = _by_label(truths, [[1.0] * len(boxes) for boxes in truths])
    if not true:
        raise ValueError("expected at least one true box, got none")
    # COCOeval goes through every picture for every label. One label at a time, with its own pictures, gives the same
    # numbers, and a set whose labels are thousands of phrases takes seconds.
    curves = np.stack([_precision_curves(predicted.get(label, []), boxes) for label, boxes in sorted(true.items())])
    return {"AP50": float(curves[:, 0].mean()), "AP": float(curves.mean())}


_Located = tuple[int, LabelledBox, float]
"""A box with its picture before it and its confidence after it."""


def _by_label(
    pictures: Sequence[Sequence[LabelledBox]], confidences: Sequence[Sequence[float]]
) -> dict[str, list[_Located]]:
    grouped: dict[str, list[_Located]] = {}
    for picture, (boxes, scores) in enumerate(zip(pictures, confidences, strict=True)):
        for box, score in zip(boxes, scores, strict=True):
            grouped.setdefault(box.label, []).append((picture, box, score))
    return grouped


def _precision_curves(predictions: Sequence[_Located], truths: Sequence[_Located]) -> np.ndarray:
    """Return the precision at 10 IoU thresholds (rows) and 101 recalls of boxes of one label."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_coco(COCO(), truths), _coco(COCO(), predictions), "bbox")
        evaluation.params.imgIds = sorted({*evaluation.cocoGt.getImgIds(), *evaluation.cocoDt.getImgIds()})
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0, 0, -1]


def _coco(coco, boxes: Sequence[_Located]):
    annotations: list[dict[str, Any]] = []
    for number, (picture, each, score) in enumerate(boxes, 1):  # COCOeval takes the id 0 for "matches nothing".
        x1, y1, x2, y2 = each.box
        width, height = x2 - x1 + 1, y2 - y1 + 1
        annotations.append(
            {
                "id": number,
                "image_id": picture,
                "category_id": 1,
                "bbox": [x1, y1, width, height],
                "area": width * height,
                "iscrowd": 0,
                "score": score,
            }
        )
    pictures = sorted({annotation["image_id"] for annotation in annotations})
    coco.dataset = {
        "images": [{"id": picture} for picture in pictures],
        "categories": [{"id": 1}],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _ious(predicted: Sequence[LabelledBox], truth: Sequence[LabelledBox]) -> np.ndarray:
    """Return intersection over union of each predicted (row) and true box, 0 where the labels differ."""
    first = np.array([box.box for box in predicted], dtype=np.float64).reshape(-1, 1, 4)
    second = np.array([box.box for box in truth], dtype=np.float64).reshape(1, -1, 4)
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2]) + 1
    common = sides.clip(min=0).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2] + 1).prod(axis=-1) for boxes in (first, second)]
    same = [[a.label == b.label for b in truth] for a in predicted]
    return common / (areas[0] + areas[1] - common) * np.array(same, dtype=np.float64).reshape(common.shape)


def _matches(ious: np.ndarray, at_least: float) -> list[float]:
    """Return the IoUs of the pairs, the largest first, each box in one of them."""
    ious, matches = ious.copy(), []
    while ious.size and (largest := float(ious.max())) >= at_least and largest > 0:
        row, column = np.unravel_index(ious.argmax(), ious.shape)
        ious[row, :] = ious[:, column] = 0
        matches.append(largest)
    return matches
