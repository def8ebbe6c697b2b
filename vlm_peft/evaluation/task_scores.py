"""One door to the scores of every task: rows of predictions.jsonl -> metrics.

All metrics are in 0..1 but CIDEr (0..10).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..metrics.answers import anls, exact_match, page_scores, split_pages, token_f1
from ..metrics.boxes import LabelledBox, score_boxes
from ..metrics.captions import score_captions
from ..metrics.digits import digit_accuracy, digits_match
from ..metrics.vqa import PEOPLE, accuracy_by_type, vqa_accuracy

Row = Mapping[str, Any]


@dataclass
class Scores:
    """What `score_rows` found."""

    metrics: dict[str, float]
    """Names and values over all rows."""
    per_row: dict[str, list[float]]
    """Metrics that have a value for each row, in input order, and are its mean; their intervals come from these."""
    primary: str
    """The one of `per_row` that stands for the task."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers must know, one sentence each."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Metrics asked for and not computed, each with its reason in one line."""
    tokenizer: str | None = None
    """The tokenizer of the caption metrics."""


def score_rows(task: str, rows: Sequence[Row], **caption_options: Any) -> Scores:
    """Score rows of predictions.jsonl as their task is scored.

    A row has `prediction` (text) and `references` (list of one or more texts), and for some tasks more:

    - `caption`: coco-caption's metrics. Primary: CIDEr.
    - `vqa`: `vqa_accuracy`, and where rows have `answer_type` or `question_type` also
      `vqa_accuracy[answer_type=number]` and the like.
    - `slides`: `exact_match`, `f1`, `anls` of the answer without the pages that it names, unless a reference names
      pages, too. Where all rows have `evidence_pages` (list of page numbers) and a prediction names pages, also
      `page_precision`, `page_recall` and `page_f1`. Primary: f1.
    - `chat`: `exact_match`, `f1`, `anls`, `ROUGE_L`, `Bleu_4`. Primary: f1, as ROUGE_L and Bleu_4 have no value for
      each row that an interval could be drawn from.
    - `grounding`: `AP50`, `AP`, `precision50`, `recall50`, `mean_iou`, `f1_50` of the true `boxes`
      (`{"label", "box": [x1, y1, x2, y2]}` each, on the grid of 0..999); needs no `references`. Primary: f1_50, as an
      average precision belongs to the whole set, and it depends on an order that text does not have.
    - `digits`: `exact_match`, `digit_accuracy`. Primary: exact_match.

    Args:
        task: One of these names.
        rows: At least one.
        caption_options: Of `score_captions`, for `caption` and `chat`: `tokenizer`, `meteor`, `spice`,
            `idf_references`, `java_time_limit`. The other tasks leave them unused.

    Raises:
        ValueError: if the task is unknown, there are no rows, or a row lacks what the task needs or has it wrong (the
            message has the row's id and the key).
    """
    if task not in _TASKS:
        raise ValueError(f"expected one of the tasks {', '.join(_TASKS)}, got {task!r}")
    if not rows:
        raise ValueError("expected at least one row to score, got none")
    for index, row in enumerate(rows):
        if not isinstance(row.get("prediction"), str):
            raise _error(index, row, "prediction", "text")
        references = row.get("references")
        if task != "grounding" and not (_is_list_of(str, references) and references):
            raise _error(index, row, "references", "a list of one or more texts")
    return _TASKS[task](rows, caption_options)


def _caption(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    scored = score_captions([row["prediction"] for row in rows], [row["references"] for row in rows], **options)
    return Scores(
        scored.metrics, {"CIDEr": scored.per_picture}, "CIDEr", scored.notes, scored.skipped, scored.tokenizer
    )


def _vqa(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    scores = _means(rows, "vqa_accuracy", vqa_accuracy=vqa_accuracy)
    for key, kinds in accuracy_by_type(rows, scores.per_row["vqa_accuracy"]).items():
        scores.metrics |= {f"vqa_accuracy[{key}={kind}]": value for kind, value in kinds.items()}
    fewer = sum(len(row["references"]) < PEOPLE for row in rows)
    if fewer:
        scores.notes.append(
            f"{fewer} of {len(rows)} questions have fewer than {PEOPLE} answers, which count as if {PEOPLE} people had "
            "given them in equal parts; a single answer, or several equal ones, must be met letter by letter."
        )
    return scores


def _slides(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    for index, row in enumerate(rows):
        if row.get("evidence_pages") is not None and not _is_list_of(int, row["evidence_pages"]):
            raise _error(index, row, "evidence_pages", "a list of page numbers")
    evidence = [row.get("evidence_pages") for row in rows]
    split = [split_pages(row["prediction"]) for row in rows]
    # Where the question is "On which page ...?", the pages are the answer.
    answers = [
        {**row, "prediction": row["prediction"] if not answer or _names_pages(row["references"]) else answer}
        for row, (answer, _) in zip(rows, split, strict=True)
    ]
    scores = _means(answers, "f1", exact_match=exact_match, f1=token_f1, anls=anls)
    names = ("page_precision", "page_recall", "page_f1")
    without = evidence.count(None)
    if without:
        which = "the" if without == len(rows) else f"{without} of {len(rows)}"
        scores.skipped |= dict.fromkeys(names, f"{which} rows have no evidence_pages")
    elif not any(pages for _, pages in split):
        scores.skipped |= dict.fromkeys(names, "no prediction names a page")
    else:
        values = [page_scores(pages, set(true or ())) for (_, pages), true in zip(split, evidence, strict=True)]
        _add(scores, dict(zip(names, map(list, zip(*values, strict=True)), strict=True)))
    return scores


def _names_pages(texts: Sequence[str]) -> bool:
    return any(split_pages(text)[1] for text in texts)


def _chat(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    scores = _means(rows, "f1", exact_match=exact_match, f1=token_f1, anls=anls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # About CIDEr, which is not among the scores here.
        scored = _caption(rows, options)
    kept = ("ROUGE_L", "Bleu_4", "METEOR", "SPICE")
    scores.metrics |= {name: scored.metrics[name] for name in kept if name in scored.metrics}
    scores.skipped, scores.tokenizer = scored.skipped, scored.tokenizer
    return scores


def _grounding(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    truths = []
    for index, row in enumerate(rows):
        if not _is_list_of(dict, row.get("boxes")):
            raise _error(index, row, "boxes", 'a list of {"label", "box"}')
        try:
            truths.append([LabelledBox(each["label"], tuple(each["box"])) for each in row["boxes"]])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _error(index, row, "boxes", 'a list of {"label", "box": [x1, y1, x2, y2]}', error) from error
    scored = score_boxes([row["prediction"] for row in rows], truths)
    return Scores(scored.metrics, {"f1_50": scored.f1_50}, "f1_50", scored.notes, scored.skipped)


def _digits(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    for index, row in enumerate(rows):
        if not all(any(character.isdecimal() for character in text) for text in row["references"]):
            raise _error(index, row, "references", "texts with a digit in each")
    return _means(rows, "exact_match", exact_match=digits_match, digit_accuracy=digit_accuracy)


_TASKS: dict[str, Callable[[Sequence[Row], dict[str, Any]], Scores]] = {
    "caption": _caption,
    "vqa": _vqa,
    "slides": _slides,
    "chat": _chat,
    "grounding": _grounding,
    "digits": _digits,
}


def _means(rows: Sequence[Row], primary: str, **functions: Callable[[str, Sequence[str]], float]) -> Scores:
    scores = Scores({}, {}, primary)
    _add(scores, {n: [f(row["prediction"], row["references"]) for row in rows] for n, f in functions.items()})
    return scores


def _add(scores: Scores, per_row: dict[str, list[float]]) -> None:
    scores.per_row |= per_row
    scores.metrics |= {name: sum(values) / len(values) for name, values in per_row.items()}


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) and not isinstance(each, bool) for each in value)


def _error(index: int, row: Row, key: str, expected: str, reason: Exception | None = None) -> ValueError:
    got = f"got {row[key]!r}" if key in row else f"the keys are {', '.join(map(str, row))}"
    return ValueError(
        f"row {row.get('id', index)!r}: expected {expected} as {key}, {got}{f' ({reason!r})' if reason else ''}"
    )
