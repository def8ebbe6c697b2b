"""Leakage guard: training pictures that are also evaluation pictures.

Stage: before training; splits -> what they have in common. Equal files are found by the hash of their bytes, whatever
they are called; a picture that was scaled or compressed again is another file and is not found this way. COCO pictures
are also compared by number, since COCO moved pictures of val2014 into train2017 and many data sets are made of them.
"""

import re
from dataclasses import dataclass

from .pictures import Pictures
from .splits import Split, row_name

# COCO_val2014_000000391895.jpg, 000000391895.jpg, train2017/000000391895.jpg
_COCO_FILE = re.compile(r"(?:^|/)(?:COCO_\w+_)?(\d{12})(?:_\d+)?\.\w+$")
_FILE_COLUMNS = ("file_name", "filename", "filepath", "coco_url", "image_path", "path", "url")
_COCO_ID_COLUMNS = ("cocoid", "coco_id")


@dataclass(frozen=True)
class Overlap:
    """What a training and an evaluation split have in common.

    Args:
        by_content (`list[tuple[str, str]]`): Ids of a training and an evaluation row with an equal picture.
        by_id (`list[tuple[str, str]]`): The same for pictures with one COCO number.
    """

    by_content: list[tuple[str, str]]
    by_id: list[tuple[str, str]]

    def __bool__(self) -> bool:
        return bool(self.by_content or self.by_id)


def picture_hashes(pictures: Pictures) -> dict[str, int]:
    """Hash -> number of the first picture that has it; pictures that cannot be read are left out."""
    hashes: dict[str, int] = {}
    for index, name in enumerate(pictures.hashes):
        if name is not None:
            hashes.setdefault(name, index)
    return hashes


def coco_number(row: dict) -> str | None:
    """The COCO number of a row's picture, from a `cocoid` column or a COCO file name; `None` for other pictures."""
    for column in _COCO_ID_COLUMNS:
        value = _first(row.get(column))
        if value is not None:
            return str(int(value))
    for column in _FILE_COLUMNS:
        value = _first(row.get(column))
        found = _COCO_FILE.search(value) if isinstance(value, str) else None
        if found:
            return str(int(found[1]))
    return None


def find_overlap(train: Split, held_out: Split) -> Overlap:
    """Compares the pictures of two splits.

    Args:
        train, held_out ([`~vlm_peft.data.splits.Split`]): Rows, of which each may have several pictures.
    """
    hashes = picture_hashes(held_out.pictures)
    pairs: dict[tuple[str, str], None] = {}
    for name, image in picture_hashes(train.pictures).items():
        if name in hashes:
            pairs[_row_of(train, image), _row_of(held_out, hashes[name])] = None
    numbers = {number: row_name(row) for row in held_out.texts if (number := coco_number(row)) is not None}
    same_number: dict[tuple[str, str], None] = {}
    if numbers:
        for row in train.texts:
            number = coco_number(row)
            if number in numbers:
                same_number[row_name(row), numbers[number]] = None
    return Overlap(list(pairs), list(same_number))


def check_overlap(train: Split, held_out: Split, *, allow: bool = False) -> str | None:
    """Refuses to train on pictures that will be scored.

    Args:
        train, held_out ([`~vlm_peft.data.splits.Split`]): To compare.
        allow (`bool`, *optional*, defaults to `False`): Says it instead of raising.

    Returns:
        `str`, *optional*: One sentence with the counts when there is an overlap.

    Raises:
        ValueError: With the counts and the first rows.
    """
    overlap = find_overlap(train, held_out)
    if not overlap:
        return None
    shown = ", ".join(f"{ours} = {theirs}" for ours, theirs in [*overlap.by_content, *overlap.by_id][:5])
    said = (
        f"{len(overlap.by_content)} pictures of the training split {train.name!r} are also in {held_out.name!r} by "
        f"content, {len(overlap.by_id)} by their COCO number ({shown})."
    )
    if not allow:
        raise ValueError(f"{said} Scores would be too good. Take them out, or say --allow_overlap true.")
    return said


def _row_of(split: Split, image: int) -> str:
    return row_name(split.texts[split.pictures.row_of(image)])


def _first(value):
    """The value of a cell, or that of the first member of a group."""
    return value[0] if isinstance(value, list) and value else value
