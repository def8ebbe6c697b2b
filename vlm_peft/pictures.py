"""Pictures of a data set: read with limits, counted, and never decoded before they are needed.

Stage: data set -> raw pictures, in one flat order that rows, feature cache and collator share.
"""

import base64
import binascii
import io
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from datasets import Dataset, Image, List
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

MAX_PIXELS = 64 * 1024 * 1024
"""Pictures with more pixels are refused before they are decoded (64 Mi pixels take 200 MB as RGB)."""

# The first bytes of JPEG, PNG, GIF and RIFF (WebP) files in base64.
_BASE64_STARTS = ("/9j/", "iVBOR", "R0lGOD", "UklGR")


class UnreadablePictureError(ValueError):
    """A picture that is missing, damaged, no picture at all, or too large."""


def open_picture(value) -> PILImage.Image:
    """Decodes one picture completely.

    Args:
        value (`PIL.Image.Image`, `str`, `Path`, `bytes` or `dict`): The picture, a file's path, an encoded file, base64
            text of one (with or without a `data:` prefix), or a `datasets` image `{"bytes": ..., "path": ...}`.

    Returns:
        `PIL.Image.Image` in mode RGB; transparent parts are put on white.

    Raises:
        UnreadablePictureError: Naming what came and why it cannot be read.
    """
    if isinstance(value, PILImage.Image):
        return _to_rgb(value)
    try:
        with PILImage.open(_as_file(value)) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise UnreadablePictureError(
                    f"The picture has {width} x {height} = {width * height} pixels, more than the {MAX_PIXELS} allowed: "
                    "scale it down first."
                )
            return _to_rgb(picture)
    except (OSError, SyntaxError, UnidentifiedImageError, PILImage.DecompressionBombError) as error:
        raise UnreadablePictureError(f"Cannot read the picture: {error}") from error


def _as_file(value):
    """A path or a binary file object for `PIL.Image.open`."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return io.BytesIO(value["bytes"])
        if value.get("path") is not None:
            return value["path"]
        raise UnreadablePictureError(
            f"Expected a picture as a dict with 'bytes' or 'path', got the keys {sorted(value)} without a value."
        )
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if isinstance(value, Path):
        return value
    if isinstance(value, str):
        if value.startswith(("data:", *_BASE64_STARTS)):
            try:
                return io.BytesIO(base64.b64decode(value.rpartition(",")[2], validate=True))
            except binascii.Error as error:
                raise UnreadablePictureError(f"The text is no valid base64 picture: {error}") from error
        return value
    raise UnreadablePictureError(f"Expected a picture, a path, bytes, base64 text or a dict, got {type(value).__name__}.")


def _to_rgb(picture: PILImage.Image) -> PILImage.Image:
    """RGB; transparency on white, as a page would show it."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        page = PILImage.new("RGBA", picture.size, "white")
        return PILImage.alpha_composite(page, picture).convert("RGB")
    return picture.convert("RGB")


class Pictures:
    """All pictures of a data set's rows as one flat, lazy sequence.

    Args:
        dataset (`Dataset`): Rows; image columns are kept undecoded.
        columns (`list[str]`): Columns that hold a picture or a list of pictures, in the order of the placeholders.
            Empty cells (`None`) hold no picture.
    """

    def __init__(self, dataset: Dataset, columns: list[str]):
        dataset = dataset.select_columns(columns)
        for column in columns:
            feature = dataset.features[column]
            if isinstance(feature, Image):
                dataset = dataset.cast_column(column, Image(decode=False))
            elif isinstance(feature, List) and isinstance(feature.feature, Image):
                dataset = dataset.cast_column(column, List(Image(decode=False)))
        self._dataset = dataset
        self._columns = columns
        self._ends = list(accumulate(len(pictures) for pictures in self._rows()))

    def _of_row(self, row: dict) -> list:
        found = []
        for column in self._columns:
            value = row[column]
            found += [item for item in (value if isinstance(value, list) else [value]) if item is not None]
        return found

    def _rows(self) -> Iterator[list]:
        if all(isinstance(self._dataset.features[column], Image) for column in self._columns):
            # Counting must not read the pictures' bytes: only the validity of each cell is looked at.
            table = self._dataset.with_format("arrow")[:]
            valid = [table.column(column).is_valid().to_pylist() for column in self._columns]
            for cells in zip(*valid, strict=True):
                yield [cell for cell in cells if cell]
        else:
            for row in self._dataset:
                yield self._of_row(row)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def of_row(self, row: int) -> range:
        """Indices of the pictures of row number `row`."""
        return range(self._ends[row - 1] if row else 0, self._ends[row])

    def raw(self, index: int):
        """Picture `index` as stored (bytes and path, undecoded)."""
        row = bisect_right(self._ends, index)
        return self._of_row(self._dataset[row])[index - self.of_row(row).start]

    def open(self, index: int) -> PILImage.Image:
        """Picture `index`, decoded; see [`open_picture`] for errors."""
        return open_picture(self.raw(index))

    def encoded(self, index: int) -> bytes:
        """The encoded bytes of picture `index`: what its content hash is taken of."""
        file = self.raw(index)
        if isinstance(file, PILImage.Image):
            return file.tobytes()
        source = _as_file(file)
        return source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
