"""Streaming: rows of a data set that is larger than the disk, encoded one after the other as they arrive.

Stage: data set -> stream of laid-out rows for the collator. Nothing is known in advance: neither the number of rows,
so that `max_steps` is needed, nor which pictures cannot be read. Features are not kept; each picture is encoded when it
comes.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
from datasets import IterableDataset

from ..model.processing_vision_qwen import VisionQwenProcessor
from ..tasks import Task
from ..tasks.example import PICTURE_PLACES
from .arguments import DataArguments
from .pictures import UnreadablePictureError, encoded_bytes, open_picture, picture_hash, picture_identity, picture_size
from .rows import lay_out_row, name_classes, open_rows

SHUFFLE_ROWS = 1000
"""Rows that wait, encoded as they are stored, from which the next one is drawn."""


def load_stream(data: DataArguments, split: str, *, limit: int | None = None) -> IterableDataset:
    """Opens a split without reading it.

    Args:
        data ([`~vlm_peft.data.arguments.DataArguments`]): Data set and columns.
        split (`str`): Which part.
        limit (`int`, *optional*): First so many rows only.

    Raises:
        FileNotFoundError, ValueError: As [`~vlm_peft.data.rows.load_rows`], except that an empty split is not noticed.
    """
    assert data.dataset_name is not None
    names = split.split("+")
    stored = data.stored_split or (split if data.split_column is None else names[0])
    rows = name_classes(open_rows(data.dataset_name, stored, data.dataset_revision, streaming=True))
    column = data.split_column
    if column is not None:
        if column not in rows.column_names:
            raise ValueError(
                f"The data set {data.dataset_name} has no column {column!r}; it has "
                f"{', '.join(sorted(rows.column_names))}."
            )
        rows = rows.filter(lambda value: value in names, input_columns=[column])
    return rows if limit is None else rows.take(limit)


def stream_rows(
    rows: IterableDataset,
    task: Task,
    processor: VisionQwenProcessor,
    *,
    max_length: int | None,
    on_bad_row: str = "stop",
    held_out_hashes: frozenset[str] = frozenset(),
    seed: int = 0,
) -> IterableDataset:
    """Lays rows out as they come, shuffled within [`SHUFFLE_ROWS`]; the order depends on `seed` alone.

    Rows of one group (a picture's questions) share a prefix when they follow each other in the data set; then the
    groups are shuffled instead of the rows.

    Args:
        rows (`IterableDataset`): Of [`load_stream`].
        task ([`~vlm_peft.tasks.Task`]): Row -> example.
        processor ([`VisionQwenProcessor`]): Tokenizes, and makes `pixel_values`.
        max_length (`int`, *optional*): Tokens of a sequence.
        on_bad_row (`str`, *optional*, defaults to `"stop"`): `"skip"` leaves rows out that cannot be used.
        held_out_hashes (`frozenset[str]`, *optional*): Of [`~vlm_peft.data.leakage.picture_hashes`]; a training picture
            among them ends the run.
        seed (`int`, *optional*, defaults to 0): Of the shuffling.

    Returns:
        `IterableDataset`: Rows as of [`~vlm_peft.data.rows.encode_rows`], with `pixel_values` `(3, H, W)` in
            `image_ids`; see [`stack_pixels`].

    Raises:
        ValueError: While it is read: for a row that cannot be used, or a held-out picture.
    """
    groups = IterableDataset.from_generator(_groups, gen_kwargs={"rows": rows, "task": task})

    def encode(groups: IterableDataset) -> Iterator[dict]:
        for number, group in enumerate(groups):
            row_id = _name(group["texts"].get("id", number))
            try:
                pictures = [_checked(value, row_id, held_out_hashes) for value in group["pictures"]]
                texts = group["texts"]
                if task.complete is not None:
                    columns = task.complete([texts], [[picture_size(value) for value in group["pictures"]]])
                    texts = texts | {name: cells[0] for name, cells in columns.items()}
                example = task.example(texts)
                images = (
                    list(processor.image_processor(pictures, return_tensors="pt")["pixel_values"]) if pictures else []
                )
                layouts = lay_out_row(example, processor, images, max_length)
            except LeakedPictureError:
                raise
            except ValueError as error:
                if on_bad_row == "stop":
                    raise ValueError(
                        f"Row {row_id} of the stream cannot be used; repair it, or leave such rows out with "
                        f"--on_bad_row skip: {error}"
                    ) from error
                continue
            for layout in layouts:
                yield layout | {"row": number}

    shuffled = groups.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
    return IterableDataset.from_generator(encode, gen_kwargs={"groups": shuffled})


class LeakedPictureError(ValueError):
    """A training picture that will be scored."""


def stack_pixels(images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """`fetch_images` of a stream: its rows carry `pixel_values` `(3, H, W)` in the place of picture numbers."""
    return {"pixel_values": torch.stack(images)}


def _groups(rows: IterableDataset, task: Task) -> Iterator[dict]:
    """Rows as texts and pictures; neighbours of one group are one."""
    for _, neighbours in groupby(enumerate(rows), key=lambda member: _key(member[0], member[1], task)):
        members = list(neighbours)
        group = [row for _, row in members]
        texts = [{name: value for name, value in row.items() if name not in task.image_columns} for row in group]
        alone = task.group_key is None and len(group) == 1
        joined = texts[0] if alone else {name: [row[name] for row in texts] for name in texts[0]}
        if not alone:
            joined.setdefault("id", [str(number) for number, _ in members])
        cells: list = []
        for column in task.image_columns:
            value = group[0][column]
            cells += value if isinstance(value, list) else [value]
        if task.pages is not None:
            joined[PICTURE_PLACES] = [place for place, cell in enumerate(cells) if cell is not None]
            cells = [cells[place] for place in task.pages(joined)]
        yield {"texts": joined, "pictures": [cell for cell in cells if cell is not None]}


def _name(row_id) -> str:
    return str(row_id[0] if isinstance(row_id, list) else row_id)


def _key(number: int, row: dict, task: Task):
    """What neighbours of one group share: their pictures, and the task's own key."""
    cells: list = []
    for column in task.image_columns:
        cells += row[column] if isinstance(row[column], list) else [row[column]]
    shown = tuple(picture_identity(cell) for cell in cells if cell is not None)
    key = None if task.group_key is None else task.group_key(row)
    begun = task.beginning(row) if shown and task.beginning is not None else None
    return (key, shown, begun) if shown or key is not None else number


def _checked(value, row_id: str, held_out_hashes: frozenset[str]):
    """A picture, decoded; refuses one of the held-out pictures."""
    if held_out_hashes:
        try:
            leaked = picture_hash(encoded_bytes(value)) in held_out_hashes
        except UnreadablePictureError:
            leaked = False
        if leaked:
            raise LeakedPictureError(
                f"The picture of row {row_id} of the stream is also in an evaluation split. Scores would be too good. "
                "Take it out, or say --allow_overlap true."
            )
    return open_picture(value)
