"""Pictures to ask about: each different one once, in the order of the data set, as often as it is gone through.

Stage: data set or stream -> pictures with their hashes; and which of them belong to evaluation sets.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.arguments import DataArguments
from ..data.leakage import coco_number, picture_hashes
from ..data.pictures import Pictures, stored_hash
from ..data.rows import load_rows, picture_folder, resolve_paths
from ..data.streaming import load_stream
from ..tasks.example import require_columns
from ..training.setup import local
from .options import SynthesisOptions, name_and_split


@dataclass(frozen=True)
class Shown:
    """A picture of the source.

    Args:
        hash (`str`): Of its bytes; see [`~vlm_peft.data.pictures.picture_hash`].
        row (`str`): File name where there is one, or the row's id.
        stored (`Any`): As [`~vlm_peft.data.pictures.open_picture`] takes it.
        number (`str`, *optional*): COCO's.
    """

    hash: str
    row: str
    stored: Any
    number: str | None


@dataclass(frozen=True)
class Seen:
    """What is remembered of a picture.

    Args:
        hash, row (`str`): See [`Shown`].
        held_out (`str`, *optional*): Evaluation set that it belongs to.
        size (`list[int]`): Width and height in pixels; nothing where no box is asked for.
    """

    hash: str
    row: str
    held_out: str | None
    size: list[int]


class Source:
    """All pictures of a run.

    Args:
        options ([`SynthesisOptions`]): Which data set.

    Raises:
        FileNotFoundError, ValueError: When the data set, the split or the column is not there.
    """

    def __init__(self, options: SynthesisOptions):
        name = local(str(options.dataset_name), "dataset_name")
        self._column, self._streaming = options.image_column, options.streaming
        if options.streaming:
            data = DataArguments(
                dataset_name=name,
                dataset_revision=options.dataset_revision,
                stored_split=options.stored_split,
                split_column=options.split_column,
            )
            rows: Any = load_stream(data, options.split, limit=options.limit)
        else:
            rows = load_rows(
                name,
                options.split,
                revision=options.dataset_revision,
                stored_split=options.stored_split,
                split_column=options.split_column,
                limit=options.limit,
            )
        require_columns(list(rows.column_names or ()), self._column)
        self._rows = resolve_paths(rows, [self._column], picture_folder(name, options.image_folder))
        self.left_out: Counter[str] = Counter()
        """Why rows give no picture of their own -> how many."""

    def __len__(self) -> int:
        """Rows; 0 where that is not known."""
        return 0 if self._streaming else len(self._rows)

    def __iter__(self) -> Iterator[Shown]:
        """Each different picture once."""
        seen: set[str] = set()
        self.left_out.clear()
        for row, stored, texts in self._cells():
            found = None if stored is None else stored_hash(stored)
            if found is None:
                self.left_out["no readable picture"] += 1
            elif found in seen:
                self.left_out["picture of an earlier row"] += 1
            else:
                seen.add(found)
                yield Shown(found, row, stored, coco_number(texts))

    def _cells(self) -> Iterator[tuple[str, Any, dict]]:
        if self._streaming:
            for place, row in enumerate(self._rows):
                texts = {name: value for name, value in row.items() if name != self._column}
                yield self._named(row.get("id", place), row[self._column], texts)
            return
        pictures = Pictures(self._rows, [self._column])
        texts = self._rows.remove_columns([self._column])
        names = [name for name in texts.column_names if "Image" not in str(texts.features[name])]
        for place, row in enumerate(texts.select_columns(names)):
            cells = pictures.of_row_as_stored(place)
            yield self._named(row.get("id", place), cells[0] if cells else None, row)

    def _named(self, row: Any, stored: Any, texts: dict) -> tuple[str, Any, dict]:
        if isinstance(stored, list):
            stored = stored[0] if stored else None
        path = stored.get("path") if isinstance(stored, dict) else stored if isinstance(stored, str) else None
        is_file = isinstance(path, str) and len(path) < 1000 and Path(path).suffix
        return Path(str(path)).name if is_file else str(row), stored, texts


@dataclass(frozen=True)
class HeldOut:
    """Pictures of evaluation sets.

    Args:
        hashes (`dict[str, str]`): Hash of a picture -> the set's name.
        numbers (`dict[str, str]`): COCO's number -> the set's name.
    """

    hashes: dict[str, str]
    numbers: dict[str, str]

    def name_of(self, shown: Shown) -> str | None:
        """The set that has the picture, if one has."""
        found = self.hashes.get(shown.hash)
        return found if found or shown.number is None else self.numbers.get(shown.number)


def load_held_out(names: list[str], image_column: str) -> HeldOut:
    """Reads the pictures of evaluation sets, and COCO's numbers.

    Args:
        names (`list[str]`): NAME:SPLIT each.
        image_column (`str`): Where pictures are; `image` where a set does not have it.
    """
    held = HeldOut({}, {})
    for name in names:
        folder, split = name_and_split(name)
        folder = local(folder, "evaluation_sets")
        rows = load_rows(folder, split)
        column = image_column if image_column in rows.column_names else "image"
        require_columns(rows.column_names, column)
        shown = resolve_paths(rows.select_columns([column]), [column], picture_folder(folder))
        held.hashes.update(dict.fromkeys(picture_hashes(Pictures(shown, [column])), name))
        texts = rows.remove_columns([each for each in rows.column_names if "Image" in str(rows.features[each])])
        held.numbers.update({number: name for row in texts if (number := coco_number(row)) is not None})
    return held
