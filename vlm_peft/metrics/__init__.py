"""Scores as plain functions: numbers from texts, boxes and pictures."""

from .answers import anls, exact_match, token_f1
from .boxes import score_boxes
from .captions import score_captions
from .digits import digit_accuracy, digits_match
from .significance import bootstrap_interval, paired_difference
from .vqa import vqa_accuracy

__all__ = [
    "anls",
    "bootstrap_interval",
    "digit_accuracy",
    "digits_match",
    "exact_match",
    "paired_difference",
    "score_boxes",
    "score_captions",
    "token_f1",
    "vqa_accuracy",
]
