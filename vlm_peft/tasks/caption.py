"""Captions: one picture, one or several texts that describe it."""

from collections.abc import Callable, Sequence
from typing import Any

from ..metrics.captions import Cider, score_captions
from .example import Example, Task, has_text, picture_turn, refuse_list, require_columns, row_key
from .scoring import Metric, Row, Scores, TaskKind

CAPTION_COLUMNS = ("captions", "caption", "sentences", "text")
"""Names under which published data sets keep their captions; the first that a data set has is taken."""

PICTURE_ID_COLUMNS = ("cocoid", "image_id")
"""Rows of one value are captions of one picture, and named by it in predictions."""

INSTRUCTION = "Describe the picture."


def caption_task(columns: list[str], image_column: str, text_column: str | None, instruction: str | None) -> Task:
    """Flickr30k (`caption`, a list of five), COCO's Karpathy split (`sentences`, or a row a caption), or any picture
    with texts."""
    column = text_column or next((name for name in CAPTION_COLUMNS if name in columns and name != image_column), None)
    require_columns(columns, image_column, column or " or ".join(CAPTION_COLUMNS))
    asked = INSTRUCTION if instruction is None else instruction
    picture_ids = [name for name in PICTURE_ID_COLUMNS if name in columns][:1]

    def example(row: dict) -> Example:
        return caption_example(row[column], asked)

    if picture_ids:
        return Task(
            CAPTION.name, [image_column], example, lambda row: row_key(row, picture_ids), id_column=picture_ids[0]
        )
    return Task(CAPTION.name, [image_column], example)


def caption_example(captions: str | list | dict, instruction: str) -> Example:
    """One picture, its captions.

    Args:
        captions (`str`, `list` or `dict`): A text, a dict with `raw` as COCO's `sentences` have it, or a list of these.
        instruction (`str`): What the user says beside the picture.

    Raises:
        ValueError: When there is no caption, or one is empty.
    """
    texts = _flat(captions)
    if not texts or not all(map(has_text, texts)):
        raise ValueError(f"Expected one or more captions with text, got {captions!r}.")
    texts = [text.strip() for text in texts]
    for text in texts:
        refuse_list(text)
    return Example(picture_turn(instruction), texts, [texts])


def _flat(cell) -> list:
    if isinstance(cell, dict):
        return _flat(cell.get("raw"))
    return [text for each in cell for text in _flat(each)] if isinstance(cell, list) else [cell]


def score_caption_rows(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    """Coco-caption's metrics of a picture's caption.

    Args:
        rows: With `prediction` and `references`.
        options: Of [`~vlm_peft.metrics.captions.score_captions`].
    """
    scored = score_captions([row["prediction"] for row in rows], [row["references"] for row in rows], **options)
    return Scores(
        scored.metrics, {"CIDEr": scored.per_picture}, "CIDEr", scored.notes, scored.skipped, scored.tokenizer
    )


def _reward(rows: Sequence[Row]) -> Callable[[str, Row], float]:
    cider = Cider([row["references"] for row in rows])
    return lambda text, row: cider(text, row["references"])


_SEQUENCES = "share of word sequences, as long as the number says or shorter, that a reference has, too"
BLEU = tuple(Metric(f"Bleu_{n}", _SEQUENCES) for n in (1, 2, 3, 4))
ROUGE_L = Metric("ROUGE_L", "longest sequence of words in common with a reference")
METEOR = Metric("METEOR", "words in common with a reference, also by stem and synonym")
SPICE = Metric("SPICE", "objects, their attributes and relations in common with the references")

CAPTION = TaskKind(
    "caption",
    caption_task,
    metrics=(
        *BLEU,
        ROUGE_L,
        # How rare a word is, is counted over the pictures: of one picture all are everywhere, and CIDEr is 0.
        Metric("CIDEr", "word sequences shared with the references, rare ones counting more", highest=10, fewest=50),
        METEOR,
        SPICE,
        Metric("CLIPScore", "likeness of caption and picture to a CLIP", 2.5, needs_pictures=True),
        Metric("RefCLIPScore", "the same, and likeness to the nearest reference", 1.43, needs_pictures=True),
    ),
    primary="CIDEr",
    score=score_caption_rows,
    reward=_reward,
    question=INSTRUCTION,
    hint="This model was trained to describe pictures: expect a description, whatever you ask.",
    counts_words=True,
)
