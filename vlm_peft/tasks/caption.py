"""Captions: one picture, one or several texts that describe it."""

from .example import Example, Task, has_text, picture_turn, refuse_list, require_columns, row_key

CAPTION_COLUMNS = ("captions", "caption", "sentences", "text")
"""Names under which published data sets keep their captions; the first that a data set has is taken."""

PICTURE_ID_COLUMNS = ("cocoid", "image_id")
"""Rows of one value are captions of one picture, and named by it in predictions."""

INSTRUCTION = "Describe the picture."


def caption_task(columns: list[str], image_column: str, text_column: str | None, instruction: str | None) -> Task:
    """Flickr30k (`caption`, a list of five), COCO's Karpathy split (`sentences`, or a row a caption), or any picture
    with texts."""
    column = text_column or next((name for name in CAPTION_COLUMNS if name in columns), None)
    require_columns(columns, image_column, column or " or ".join(CAPTION_COLUMNS))
    asked = INSTRUCTION if instruction is None else instruction
    picture_ids = [name for name in PICTURE_ID_COLUMNS if name in columns][:1]

    def example(row: dict) -> Example:
        return caption_example(row[column], asked)

    if picture_ids:
        return Task("caption", [image_column], example, lambda row: row_key(row, picture_ids), id_column=picture_ids[0])
    return Task("caption", [image_column], example)


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
