"""What a report says of each metric, and by which one a task's rows are ranked."""

from collections.abc import Mapping
from typing import Any

_SEQUENCES = "share of word sequences, as long as the number says or shorter, that a reference has, too"
HIGHEST = {"CIDEr": 10, "CLIPScore": 2.5, "RefCLIPScore": 1.43}
"""Metrics that go beyond 1."""

EXPLAINED = {
    "CIDEr": "word sequences shared with the references, rare ones counting more",
    "Bleu_1": _SEQUENCES,
    "Bleu_2": _SEQUENCES,
    "Bleu_3": _SEQUENCES,
    "Bleu_4": _SEQUENCES,
    "ROUGE_L": "longest sequence of words in common with a reference",
    "METEOR": "words in common with a reference, also by stem and synonym",
    "SPICE": "objects, their attributes and relations in common with the references",
    "CLIPScore": "likeness of caption and picture to a CLIP",
    "RefCLIPScore": "the same, and likeness to the nearest reference",
    "vqa_accuracy": "1 where three or more of ten people gave the answer, less where fewer did",
    "f1": "words in common with the nearest accepted answer, missing and extra ones counted",
    "exact_match": "share of rows that equal an accepted answer, case, spaces and signs aside",
    "anls": "characters in common with the nearest accepted answer, nothing where half of them or more differ",
    "page_precision": "share of the pages named that hold the evidence",
    "page_recall": "share of the pages with the evidence that are named",
    "page_f1": "harmonic mean of these two for each row",
    "f1_50": "share of boxes, predicted and true, that match one of the other kind: same label, overlap of a half",
    "AP50": "COCO's average precision where an overlap of half is a match",
    "AP": "COCO's average precision, mean over matches from an overlap of 0.5 to 0.95",
    "precision50": "share of the predicted boxes that match a true one",
    "recall50": "share of the true boxes that a predicted one matches",
    "mean_iou": "overlap of true boxes with the best predicted one: area shared by area covered",
    "digit_accuracy": "share of the digits that are right once they are aligned",
}
"""What each metric is; CIDEr goes from 0 to 10, all others from 0 to 1."""


def ranking(summary: Mapping[str, Any]) -> list[str]:
    """Return the metrics by which a scores.json ranks its rows: the task's own, then, for ties, what else each row has.

    Before there were tasks, a scores.json did not name its metric, which was CIDEr.
    """
    primary = summary.get("primary") or "CIDEr"
    return [primary, *(name for name in summary.get("intervals") or {} if name != primary)]


def digits(metric: str) -> int:
    """Return how many digits after the point say something."""
    return 2 if metric == "CIDEr" else 3
