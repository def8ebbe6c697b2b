"""Pairs: pictures with the texts that are true of them, and pictures with their class.

Stage: data set -> rows for the trainer and its batches. A picture is one row with all its texts, whatever the table
looks like, so that two of its captions can never be each other's negatives.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from ..data.arguments import DataArguments
from ..data.rows import bind_rows, load_rows, picture_folder
from ..data.splits import Split, leave_out, row_name
from ..tasks.caption import CAPTION, caption_task
from ..tasks.example import Example, Task, picture_turn, require_columns, to_text
from .encoder import DualEncoder
from .features import PictureVectors, encode_missing, open_vectors

TEMPLATES = {
    "plain": ["a photo of a {}."],
    # Seven of OpenAI's 80 that its authors found to do best together, for everyday pictures.
    "photos": [
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ],
    "satellite": ["a centered satellite photo of {}.", "a centered satellite photo of a {}."],
    "names": ["{}"],
}
"""Prompt templates by name; the mean of a list's embeddings stands for a class."""


@dataclass
class Pairs:
    """Pictures of a split with texts and classes.

    Args:
        split ([`~vlm_peft.data.splits.Split`]): Rows and pictures.
        kept (`list[int]`): Numbers of the rows that can be used; each has one picture.
        texts (`list[list[str]]`): Of each of these; empty without a column of texts.
        labels (`list[str | None]`): Of each, its class.
    """

    split: Split
    kept: list[int]
    texts: list[list[str]]
    labels: list[str | None]

    def __len__(self) -> int:
        """Pictures."""
        return len(self.kept)

    def picture(self, index: int) -> Any:
        """Picture of the kept row number `index`, undecoded."""
        return self.split.pictures.raw(self.split.pictures.of_row(self.kept[index]).start)

    @property
    def hashes(self) -> list[str | None]:
        """Of the pictures' bytes."""
        found = self.split.pictures.hashes
        return [found[self.split.pictures.of_row(row).start] for row in self.kept]

    @property
    def ids(self) -> list[str]:
        """Of the rows."""
        return [row_name(self.split.texts[row]) for row in self.kept]


def load_pairs(
    data: DataArguments,
    name: str,
    *,
    limit: int | None = None,
    label_column: str | None = None,
    with_texts: bool = True,
    on_bad_row: str = "stop",
) -> Pairs:
    """Loads a split as pictures with texts, classes, or both.

    Args:
        data ([`~vlm_peft.data.arguments.DataArguments`]): Data set and columns.
        name (`str`): Of the split.
        limit (`int`, *optional*): First so many rows only.
        label_column (`str`, *optional*): Column with the class; `objects.name` is a field of a column. Of a list, rows
            whose names are all the same have a class, others have none.
        with_texts (`bool`, *optional*, defaults to `True`): Whether there is a column of texts.
        on_bad_row (`str`): `"stop"` or `"skip"`, for rows without a readable picture or text.

    Raises:
        FileNotFoundError, ValueError: When data set, split or column are not there, or rows cannot be used.
    """
    if data.dataset_name is None:
        raise ValueError("dataset_name is missing: expected a Hub id, a table or a folder.")
    rows = load_rows(
        data.dataset_name,
        name,
        revision=data.dataset_revision,
        stored_split=data.stored_split,
        split_column=data.split_column,
        limit=limit,
    )
    task = _task(data, rows.column_names, label_column, with_texts)
    texts, pictures = bind_rows(rows, task, picture_folder(data.dataset_name, data.image_folder))
    split = Split(name, name, data, texts, task, pictures, lambda ids: {})
    split.unreadable = {index: "Cannot be read." for index, each in enumerate(pictures.hashes) if each is None}
    leave_out(split, on_bad_row)
    kept = [index for index in range(len(texts)) if index not in split.left_out]
    chosen = texts.select(kept)
    captions = [[str(text) for text in task.example(row).completions] if with_texts else [] for row in chosen]
    labels = [_label(row, label_column) if label_column else None for row in chosen]
    return Pairs(split, kept, captions, labels)


def _task(data: DataArguments, columns: list[str], label_column: str | None, with_texts: bool) -> Task:
    if label_column is not None:
        require_columns(columns, data.image_column, label_column.partition(".")[0])
    if with_texts:
        return caption_task(columns, data.image_column, data.text_column, None)

    def example(row: dict) -> Example:
        label = _label(row, label_column)
        return Example(picture_turn("Which?"), [label or "none"], [[label or "none"]])

    # A label is a text of its picture, and looked at like one.
    return Task(CAPTION.name, [data.image_column], example)


def _label(row: dict, column: str | None) -> str | None:
    """The one class of a row; `None` where it has none, or several."""
    head, _, inside = str(column).partition(".")
    cells = row[head] if isinstance(row[head], list) else [row[head]]
    while any(isinstance(cell, list) for cell in cells):
        cells = [each for cell in cells for each in (cell if isinstance(cell, list) else [cell])]
    if inside:
        cells = [(cell or {}).get(inside) for cell in cells]
    found = {to_text(cell) for cell in cells} - {None}
    return found.pop() if len(found) == 1 else None


def class_names(parts: Sequence[Pairs], given: Sequence[str] | None = None) -> list[str]:
    """Names of all classes, sorted, or as they are given.

    Raises:
        ValueError: When rows have a class that is not among the given ones.
    """
    found = sorted({label for part in parts for label in part.labels if label is not None})
    if given is None:
        return found
    other = sorted(set(found) - set(given))
    if other:
        raise ValueError(f"{len(other)} labels are not among the {len(given)} class names, {other[0]!r} the first.")
    return list(given)


def check_texts(encoder: DualEncoder, pairs: Pairs, long_texts: str = "stop") -> int:
    """Looks at all texts of a split before the first step.

    Args:
        encoder ([`DualEncoder`]): Whose context counts.
        pairs ([`Pairs`]): With texts.
        long_texts (`str`): `"stop"` raises for texts longer than the context, `"cut"` counts them.

    Returns:
        `int`: Texts that will be cut.

    Raises:
        ValueError: For long texts; or when all pictures have one and the same text, of which nothing can be learnt.
    """
    flat = [(row, text) for row, texts in enumerate(pairs.texts) for text in texts]
    if len(pairs) > 1 and len({text for _, text in flat}) == 1:
        raise ValueError(
            f"All {len(pairs)} pictures of {pairs.split.name} have one and the same text ({flat[0][1]!r}): nothing can "
            "be told apart by it. Name the column that differs with --text_column."
        )
    long = encoder.too_long([text for _, text in flat])
    if long and long_texts == "stop":
        row, text = flat[long[0]]
        raise ValueError(
            f"{len(long)} of {len(flat)} texts of {pairs.split.name} are longer than the "
            f"{encoder.config.text_config.max_position_embeddings} tokens that the text tower reads, row "
            f"{pairs.ids[row]} the first ({text[:60]!r}): shorten them, or cut them with --long_texts cut."
        )
    return len(long)


@dataclass
class PairRows(Dataset):
    """Training rows: a picture, and texts drawn for it anew in every epoch.

    Args:
        pairs ([`Pairs`]): What to train on.
        texts_per_picture (`int`, *optional*): So many of its texts; all by default.
        seed (`int`): With the epoch and the row it decides which, so that a resumed run draws the same.
        templates (`list[str]`): For pictures that have a class instead of texts.
    """

    pairs: Pairs
    texts_per_picture: int | None = None
    seed: int = 0
    templates: list[str] = field(default_factory=lambda: list(TEMPLATES["plain"]))

    def __post_init__(self) -> None:
        self._epoch = 0
        self._ids = [_number(name or str(index)) for index, name in enumerate(self.pairs.hashes)]

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Pictures."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`index`, `picture_id`, `texts`, `text_ids`."""
        draw = random.Random(f"{self.seed} {self._epoch} {index}")
        label = self.pairs.labels[index]
        texts = self.pairs.texts[index]
        if texts:
            chosen = (
                texts if self.texts_per_picture is None else draw.sample(texts, min(self.texts_per_picture, len(texts)))
            )
            ids = [_number(text) for text in chosen]
        else:
            # Whatever the template says of a class, it is true of all its pictures.
            chosen, ids = [draw.choice(self.templates).replace("{}", str(label))], [_number(str(label))]
        return {"index": index, "picture_id": self._ids[index], "texts": chosen, "text_ids": ids}


def _number(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


class PairCollator:
    """Rows -> one batch of pictures with all their texts.

    Args:
        encoder ([`DualEncoder`]): Tokenizes, and reads pictures.
        pairs ([`Pairs`]): The rows' pictures.
        vectors (`torch.Tensor`, *optional*): `(P, D)`, embeddings of a locked image tower in the place of pictures.
    """

    def __init__(self, encoder: DualEncoder, pairs: Pairs, vectors: np.ndarray | None = None):
        self._encoder, self._pairs, self._vectors = encoder, pairs, vectors

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """`text`, `image`, `picture_of` `(T,)`, `picture_ids` `(P,)` and `text_ids` `(T,)`."""
        indices = [row["index"] for row in rows]
        return {
            "text": self._encoder.tokens([text for row in rows for text in row["texts"]]),
            "image": self._encoder.pixels(self._pairs.picture(index) for index in indices)
            if self._vectors is None
            else torch.from_numpy(self._vectors[indices]),
            "picture_of": torch.tensor([place for place, row in enumerate(rows) for _ in row["texts"]]),
            "picture_ids": torch.tensor([row["picture_id"] for row in rows]),
            "text_ids": torch.tensor([each for row in rows for each in row["text_ids"]]),
        }


def picture_vectors(
    encoder: DualEncoder, pairs: Pairs, directory: str | None = None, batch_size: int = 64
) -> np.ndarray:
    """Embeddings `(P, D)` in float16 of a split's pictures, from the store of vectors.

    Raises:
        ValueError: For pictures that cannot be read.
    """
    store: PictureVectors = open_vectors(encoder, directory)
    hashes = pairs.hashes
    problems = encode_missing(encoder, store, hashes, pairs.picture, batch_size=batch_size)
    if problems:
        row, why = next(iter(problems.items()))
        raise ValueError(f"{len(problems)} pictures of {pairs.split.name} cannot be read, row {pairs.ids[row]}: {why}")
    rows = store.rows()
    return store.array()[[rows[str(name)] for name in hashes]]
