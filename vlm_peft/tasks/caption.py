"""Captions: one picture, one or several texts that describe it."""

from .example import Example, Task, has_text, picture_turn, require_columns

CAPTION_COLUMNS = ("captions", "caption", "sentences", "text")
"""Names under which published data sets keep their captions; the first that a data set has is taken."""

INSTRUCTION = "Describe the picture."


def caption_task(columns: list[str], image_column: str, text_column: str | None, instruction: str | None) -> Task:
    """Flickr30k (`caption`, a list of five), COCO's Karpathy split (`sentences`), or any picture with texts."""
    column = text_column or next((name for name in CAPTION_COLUMNS if name in columns), None)
    require_columns(columns, image_column, column or " or ".join(CAPTION_COLUMNS))
    asked = INSTRUCTION if instruction is None else instruction

    def example(row: dict) -> Example:
        return caption_example(row[column], asked)

    return Task("caption", [image_column], example)


def caption_example(captions: str | list, instruction: str) -> Example:
    """One picture, its captions.

    Args:
        captions (`str`, `list[str]` or `list[dict]`): Texts; COCO's `sentences` are dicts with `raw`.
        instruction (`str`): What the user says beside the picture.

    Raises:
        ValueError: When there is no caption, or one is empty.
    """
    texts = [captions] if isinstance(captions, str) else list(captions or [])
    texts = [text.get("raw") if isinstance(text, dict) else text for text in texts]
    if not texts or not all(map(has_text, texts)):
        raise ValueError(f"Expected one or more captions with text, got {captions!r}.")
    texts = [text.strip() for text in texts]
    return Example(picture_turn(instruction), texts, [texts])
