"""Pictures of a data set: read with limits, counted, and never decoded before they are needed.

Stage: data set -> raw pictures, in one flat order that rows, feature cache and collator share.
"""

import base64
import binascii
import ctypes
import io
import os
import stat
import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from PIL import ExifTags, TiffImagePlugin, UnidentifiedImageError
from PIL import Image as PILImage
from PIL.JpegImagePlugin import JpegImageFile

MAX_PIXELS = 64 * 1024 * 1024
"""Pictures with more pixels are refused before they are decoded (64 Mi pixels take 268 MB as Pillow keeps them)."""

SCALED_PIXELS = 16 * 1024 * 1024
"""Larger pictures are halved as they are decoded: no encoder sees so much, and processors copy what they get twice."""

# Decoders that hold the picture several times: so many times fewer pixels. JPEG of several scans waits as coefficients.
_HUNGRY = {"AVIF": 4, "JPEG2000": 5, "TIFF": 2, "WEBP": 4}
_STRIP = 32  # rows
_M_MMAP_THRESHOLD = -3  # of malloc.h

# Bytes of texts, profiles and programs' own data beside the pixels of a large picture. A PNG is read without them.
_NOTES = 16 * 1024 * 1024

ALONE = threading.RLock()
"""Held while a large picture is decoded, which takes up to a third of a gigabyte; to be held while it is scaled."""

MAX_ASPECT = 64
"""Longer pictures are refused, too: scaled to an encoder's 1024 pixels on the short side they would be larger."""

# Builds of Pillow may lack some.
PILImage.init()
FORMATS = tuple(
    name
    for name in ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in PILImage.OPEN
)
"""What is read; others hand files to programs outside (EPS), hide another picture's size (ICO), or have no pixels."""

# Parts of a PNG beside its pixels; Pillow refuses the whole picture for a long one.
_PNG_START, _PNG_NOTES = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_PNG_FRAMES = (b"acTL", b"fcTL", b"fdAT")
_UPRIGHT = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
# The first bytes of JPEG, PNG, GIF and RIFF (WebP) files in base64.
_BASE64_STARTS = ("/9j/", "iVBOR", "R0lGOD", "UklGR")
_ADDRESSES = ("http://", "https://", "s3://", "gs://")


class UnreadablePictureError(ValueError):
    """A picture that is missing, damaged, no picture at all, or too large."""


def open_picture(value) -> PILImage.Image:
    """Decodes one picture completely.

    Args:
        value (`PIL.Image.Image`, `str`, `Path`, `bytes` or `dict`): The picture, a file's path, an encoded file, base64
            text of one (with or without a `data:` prefix), or a `datasets` image `{"bytes": ..., "path": ...}`.

    Returns:
        `PIL.Image.Image` in mode RGB, upright as its EXIF orientation says; transparent parts are put on white. Of half
            the size where there are more than [`SCALED_PIXELS`]; [`picture_size`] is the whole one's.

    Raises:
        UnreadablePictureError: Naming what came and why it cannot be read.
    """
    try:
        if isinstance(value, PILImage.Image):
            _check_size(value)
            flat, turn = _flat(value)
        else:
            flat, turn = _read(value, _decode)
        # A file's own pixels are gone by now.
        found = PILImage.fromarray(flat) if isinstance(flat, np.ndarray) else flat
        return found if turn is None else found.transpose(turn)
    except UnreadablePictureError:
        raise
    except PILImage.DecompressionBombError as error:
        raise UnreadablePictureError(
            f"The picture is larger than the {MAX_PIXELS} pixels allowed, scale it down first: {error}"
        ) from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadablePictureError(
            f"Cannot read the picture: {error}; expected one of {', '.join(FORMATS)}."
        ) from error
    except Exception as error:
        # Pillow's plugins let anything out on damaged files: OSError, SyntaxError, ValueError, struct.error, ...
        raise UnreadablePictureError(f"Cannot read the picture: {error}") from error


def _read(value, take: Callable[[PILImage.Image], Any]) -> Any:
    """What `take` makes of a picture's open file; of a PNG with texts that Pillow finds too long, without them."""

    def read(source) -> Any:
        with warnings.catch_warnings():
            # Our own limit is lower and names the size.
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
            picture = PILImage.open(source, formats=FORMATS)
        with picture:
            return take(picture)

    source = _as_file(value)
    try:
        return read(source)
    except UnreadablePictureError:
        raise
    except ValueError as error:
        said = str(error)
    # Outside: the error holds on to what was read.
    short = _without_notes(encoded_bytes(value))
    if short is None:
        raise ValueError(said)
    return read(io.BytesIO(short))


def _decode(picture: PILImage.Image) -> tuple[PILImage.Image | np.ndarray, PILImage.Transpose | None]:
    _check_size(picture)
    if picture.width * picture.height > SCALED_PIXELS // 4:
        notes = _notes(picture)
        if notes > (_NOTES if picture.format != "PNG" else _NOTES // 16):
            raise ValueError(f"its texts and profiles take {notes} bytes, expected {_NOTES} at most: take them out.")
    large = picture.width * picture.height > _allowed(picture) // 4
    halved = _halved(picture.size)
    if picture.format in ("JPEG", "MPO") and halved != picture.size:
        # Rounded up there, too.
        picture.draft(None, (picture.width // 2, picture.height // 2))
        large = large and _waits(picture)
    with _alone() if large else nullcontext():
        flat = _flat(picture)
        # Its memory goes before another one's comes.
        picture.close()
    return flat


@contextmanager
def _alone() -> Iterator[None]:
    """Holds [`ALONE`], and keeps pixels in blocks that go back to the system at once: smaller ones may stay."""
    with ALONE:
        usual = PILImage.core.get_block_size()
        PILImage.core.set_block_size(4 * usual)
        try:
            yield
        finally:
            PILImage.core.set_block_size(usual)


def while_scaled(picture: PILImage.Image) -> AbstractContextManager:
    """What is held while a picture is scaled that processors copy several times: [`ALONE`] for large ones.

    Args:
        picture (`PIL.Image.Image`): Of [`open_picture`].
    """
    # Photographs of 12 million pixels still go in parallel.
    return ALONE if picture.width * picture.height > SCALED_PIXELS * 3 // 4 else nullcontext()


def _upright_size(picture: PILImage.Image) -> list[int]:
    width, height = picture.size
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        # Those that Pillow is going to turn have their size turned before.
        width, height = picture.tag_v2[TiffImagePlugin.IMAGEWIDTH], picture.tag_v2[TiffImagePlugin.IMAGELENGTH]
    # Orientations 5 to 8 of EXIF are lying ones; there are no others.
    return [height, width] if picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8) else [width, height]


def _check_size(picture: PILImage.Image) -> None:
    """Refuses what is too large or too long, before it is decoded or scaled."""
    width, height = picture.size
    allowed = _allowed(picture)
    if width * height > allowed:
        scans = " of several scans" if _waits(picture) else ""
        raise UnreadablePictureError(
            f"The picture has {width} x {height} = {width * height} pixels, more than the {allowed} allowed"
            f"{f' of a {picture.format}' if allowed < MAX_PIXELS else ''}{scans}: scale it down first."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadablePictureError(
            f"The picture has {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other; cut it "
            "into parts first."
        )
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        _check_parts(picture)


def _allowed(picture: PILImage.Image) -> int:
    """How many pixels a picture of its kind may have."""
    return MAX_PIXELS // (2 if _waits(picture) else _HUNGRY.get(str(picture.format), 1))


def _waits(picture: PILImage.Image) -> bool:
    """Whether it is a JPEG whose first scan has not all colours and bits, so that no row is decoded before the end."""
    # A picture that was decoded before has no file.
    if not isinstance(picture, JpegImageFile) or picture.fp is None:
        return False
    if picture.info.get("progressive"):
        return True
    # The file stands behind the scan's header: its length, the number of colours, two bytes for each, and three more.
    length = 6 + 2 * picture.layers
    file: Any = picture.fp
    place = file.tell()
    file.seek(place - length)
    header = file.read(3)
    file.seek(place)
    return header != length.to_bytes(2, "big") + bytes([picture.layers])


def _check_parts(picture: TiffImagePlugin.TiffImageFile) -> None:
    """Refuses a TIFF file whose strips or tiles, each decoded as a whole, take too much beside the pixels."""
    # The size of one that is going to be turned is the turned one.
    tags = picture.tag_v2
    width, height = tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    rows = tags.get(TiffImagePlugin.TILELENGTH) or min(tags.get(TiffImagePlugin.ROWSPERSTRIP, height), height)
    depth = max(sum(bits), bits[0] * tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    # Those of files that are not compressed are read where they lie.
    is_whole = any(tile[0] == "libtiff" for tile in picture.tile)
    part = tags.get(TiffImagePlugin.TILEWIDTH, width) * rows * depth // 8 if is_whole else 0
    turned = tags.get(ExifTags.Base.Orientation) in _UPRIGHT
    if part + width * height * (8 if turned else 4) > 3 * MAX_PIXELS:
        raise UnreadablePictureError(
            f"The picture has {width} x {height} pixels in strips or tiles of {part / 1e6:.0f} MB, more than memory is "
            "kept for: save it in smaller strips, or scale it down first."
        )


def _notes(picture: PILImage.Image) -> int:
    """Bytes of what a file holds beside its pixels and stays in memory."""
    if picture.format == "PNG":
        # Those behind the pixels, too.
        lengths = [length for name, length in _chunks(picture.fp) if _is_note(name)]
    else:
        lengths = [len(each) for each in picture.info.values() if isinstance(each, (bytes, str))]
        lengths += [len(segment) for _, segment in getattr(picture, "applist", ())]
    return sum(lengths)


def _chunks(file: Any) -> Iterator[tuple[bytes, int]]:
    """Names and lengths of a PNG's parts; the file stands afterwards where it stood."""
    place = file.tell()
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big")
        yield head[4:], length
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(place)


def _is_note(name: bytes) -> bool:
    """Whether a PNG's part says nothing of its pixels; the second letter is small in those of programs' own."""
    return name in _PNG_NOTES or (name[1:2].islower() and name not in _PNG_FRAMES)


def _without_notes(encoded: bytes) -> bytes | None:
    """A PNG without texts, colour profile and programs' own data; nothing for other pictures."""
    if not encoded.startswith(_PNG_START):
        return None
    kept, place = [encoded[:8]], 8
    for name, length in _chunks(io.BytesIO(encoded)):
        if not _is_note(name):
            kept.append(encoded[place : place + length + 12])
        place += length + 12
    return b"".join(kept)


def _as_file(value):
    """A path or a binary file object for `PIL.Image.open`."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return io.BytesIO(value["bytes"])
        if value.get("path") is not None:
            return _regular_file(value["path"])
        raise UnreadablePictureError(
            f"Expected a picture as a dict with 'bytes' or 'path', got the keys {sorted(value)} without a value."
        )
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if isinstance(value, Path):
        return _regular_file(value)
    if isinstance(value, str):
        if value.startswith(_ADDRESSES):
            raise UnreadablePictureError(
                f"{value} is an address, and pictures are not downloaded from addresses: save them as files first and "
                "put their paths into the column."
            )
        if value.startswith(("data:", *_BASE64_STARTS)):
            try:
                # Mail and XML break base64 into lines.
                return io.BytesIO(base64.b64decode("".join(value.rpartition(",")[2].split()), validate=True))
            except binascii.Error as error:
                raise UnreadablePictureError(f"The text is no valid base64 picture: {error}") from error
        return _regular_file(value)
    raise UnreadablePictureError(
        f"Expected a picture, a path, bytes, base64 text or a dict, got {type(value).__name__}."
    )


def _regular_file(path: str | Path) -> str | Path:
    """The path of a file that can be read to its end: a pipe or a device might never have one."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise UnreadablePictureError(f"Cannot read the picture: {error}") from error
    if not stat.S_ISREG(mode):
        raise UnreadablePictureError(
            f"Cannot read the picture: {path} is no regular file, but a folder, pipe or device."
        )
    return path


def give_memory_back() -> None:
    """Lets the C library give large buffers back to the system as they are freed, in threads, too.

    For a process that answers for a long time; one that trains uses them again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1024 * 1024)


def is_path(value: object) -> bool:
    """Whether a cell is the path of a picture, and neither base64 text of one nor its address."""
    return isinstance(value, str) and not value.startswith(("data:", *_BASE64_STARTS, *_ADDRESSES))


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    """The size in which a picture is given."""
    width, height = size
    return (width, height) if width * height <= SCALED_PIXELS else ((width + 1) // 2, (height + 1) // 2)


def _flat(picture: PILImage.Image) -> tuple[PILImage.Image | np.ndarray, PILImage.Transpose | None]:
    """In RGB, halved where it is large, transparency on white, as a page would show it; and how it is to be turned.

    A large one is an array `(H, W, 3)`: beside what was decoded, the bytes that Pillow keeps for each pixel are four.
    """
    # Pillow turns TIFF files itself as it loads them, and then takes the orientation out.
    picture.load()
    turn = _UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    convert = _conversion(picture)
    halved = _halved(picture.size)
    factor = 1 if halved == picture.size else 2
    if factor == 1 and convert is _opaque:
        return convert(picture), turn
    # Strip by strip: each conversion is a copy.
    found = np.empty((halved[1], halved[0], 3), np.uint8)
    for top in range(0, picture.height, _STRIP):
        strip = convert(picture.crop((0, top, picture.width, min(top + _STRIP, picture.height))))
        found[top // factor : (top + _STRIP) // factor] = np.asarray(strip.reduce(factor))
    return found, turn


def _conversion(picture: PILImage.Image) -> Callable[[PILImage.Image], PILImage.Image]:
    """What makes RGB of a picture, or of a part of it."""
    if picture.mode.startswith("I") or picture.mode == "F":
        low, high = _extremes(picture)
        if not (low >= 0 and high <= 65535):
            raise UnreadablePictureError(
                f"The picture has greys from {low:g} to {high:g}: expected 0 to 1, 255, 4095 or 65535; scale them "
                "first."
            )
        return lambda part: PILImage.fromarray(_to_bytes(np.asarray(part), high)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        return _on_white
    return _opaque


def _opaque(part: PILImage.Image) -> PILImage.Image:
    return part.convert("RGB")


def _extremes(picture: PILImage.Image) -> tuple[float, float]:
    """The least and the highest grey; NaN where one is."""
    lows, highs = [], []
    for top in range(0, picture.height, _STRIP):
        greys = np.asarray(picture.crop((0, top, picture.width, min(top + _STRIP, picture.height))))
        lows.append(greys.min())
        highs.append(greys.max())
    return (float(np.min(lows)), float(np.max(highs))) if lows else (0.0, 0.0)


def _on_white(part: PILImage.Image) -> PILImage.Image:
    part = part.convert("RGBA")
    return PILImage.alpha_composite(PILImage.new("RGBA", part.size, "white"), part).convert("RGB")


def _to_bytes(greys: np.ndarray, high: float) -> np.ndarray:
    """Greys of more than 8 bits as bytes, which Pillow itself would clip to black or white.

    Whole numbers are of 8, 12 or 16 bits, as the largest, `high`, says; floats reach 1, 255 or 65535.
    """
    if np.issubdtype(greys.dtype, np.floating):
        factor = 255.0 if high <= 1 else 1.0 if high <= 255 else 1 / 257
        return np.round(greys * factor).astype(np.uint8)
    return (greys.astype(np.uint16) >> (0 if high <= 255 else 4 if high <= 4095 else 8)).astype(np.uint8)


class Pictures:
    """All pictures of a data set's rows as one flat, lazy sequence.

    Args:
        dataset (`Dataset`): Rows; pictures are read one by one, and decoded by [`~Pictures.open`] only.
        columns (`list[str]`): Columns that hold a picture or a list of pictures, in the order of the placeholders.
            Empty cells (`None`) hold no picture. None at all for rows of text.
        chosen (`list[list[int]]`, *optional*): For each row, which of its pictures are used, counted from 0 over all
            columns and cells, empty ones included. All by default.
    """

    def __init__(self, dataset: Dataset, columns: list[str], chosen: list[list[int]] | None = None):
        # Arrow's own values are undecoded; casting list columns to undecoded ones would copy every picture.
        self._dataset = dataset.select_columns(columns).with_format("arrow")
        self._columns = columns
        # A selection of no columns has no rows.
        self._rows = len(dataset)
        self._chosen = chosen
        counts = self._count() if chosen is None else np.array([len(places) for places in chosen], dtype=np.int64)
        self._ends = np.cumsum(counts).tolist()

    def of_row_as_stored(self, index: int) -> list:
        """The used pictures of row number `index`, undecoded.

        Raises:
            UnreadablePictureError: When one that is to be used is not there.
        """
        row = self._dataset[index].to_pylist()[0] if self._columns else {}
        cells: list = []
        for column in self._columns:
            cells += row[column] if isinstance(row[column], list) else [row[column]]
        if self._chosen is None:
            return [cell for cell in cells if cell is not None]
        missing = [place for place in self._chosen[index] if place >= len(cells) or cells[place] is None]
        if missing:
            raise UnreadablePictureError(
                f"Row {index} has no picture number {missing[0] + 1}; it has {sum(cell is not None for cell in cells)}."
            )
        return [cells[place] for place in self._chosen[index]]

    def _count(self) -> np.ndarray:
        """Pictures of each row, from the columns' validity bits and list offsets: no picture's bytes are read."""
        table = self._dataset.data.table
        if not self._columns:
            return np.zeros(self._rows, dtype=np.int64)
        counts = np.zeros(len(table), dtype=np.int64)
        for column in self._columns:
            chunks = table.column(column).chunks
            if chunks:
                counts += np.concatenate([_count_cells(chunk) for chunk in chunks])
        # Reading rows through `select`'s row numbers would copy the pictures; the counts are picked instead.
        indices = self._dataset._indices
        return counts if indices is None else counts[indices.column(0).to_numpy()]

    def __len__(self) -> int:
        """Pictures of all rows."""
        return self._ends[-1] if self._ends else 0

    def of_row(self, row: int) -> range:
        """Indices of the pictures of row number `row`."""
        return range(self._ends[row - 1] if row else 0, self._ends[row])

    def row_of(self, index: int) -> int:
        """Number of the row that picture `index` belongs to."""
        return bisect_right(self._ends, index)

    def raw(self, index: int):
        """Picture `index` as stored (bytes and path, undecoded).

        Raises:
            UnreadablePictureError: When the row has no such picture.
        """
        row = self.row_of(index)
        return self.of_row_as_stored(row)[index - self.of_row(row).start]

    def open(self, index: int) -> PILImage.Image:
        """Picture `index`, decoded; see [`open_picture`] for errors."""
        return open_picture(self.raw(index))

    def size(self, index: int) -> list[int]:
        """Width and height of picture `index`; see [`picture_size`]."""
        return picture_size(self.raw(index))

    @cached_property
    def hashes(self) -> list[str | None]:
        """[`picture_hash`] of each picture; `None` where there is no file to take it of."""
        found: list[str | None] = []
        for row in range(self._rows):
            try:
                found += [stored_hash(cell) for cell in self.of_row_as_stored(row)]
            except UnreadablePictureError:
                found += [None] * len(self.of_row(row))
        return found

    def encoded(self, index: int) -> bytes:
        """The encoded bytes of picture `index`: what its content hash is taken of.

        Raises:
            UnreadablePictureError: When there is no file to take them from.
        """
        return encoded_bytes(self.raw(index))


def picture_size(value) -> list[int]:
    """Width and height in pixels, upright as [`open_picture`] gives it, from the header alone.

    Raises:
        UnreadablePictureError: When there is no picture, or its header cannot be read.
    """
    try:
        return _read(value, _upright_size)
    except UnreadablePictureError:
        raise
    except Exception as error:
        # As in `open_picture`: anything comes out of damaged files.
        raise UnreadablePictureError(f"Cannot read the picture's size: {error}") from error


def picture_hash(encoded: bytes | memoryview) -> str:
    """Hash of a picture file's bytes: 32 hexadecimal digits (xxh3, 128 bits)."""
    return xxhash.xxh3_128_hexdigest(encoded)


def picture_identity(value) -> str:
    """What equal pictures have in common: the hash of their bytes; of those without a file, what the cell says."""
    return stored_hash(value) or f"unreadable {value!r:.1000}"


def stored_hash(value) -> str | None:
    """[`picture_hash`] of a picture as stored, see [`open_picture`]; `None` where there is no file to take it of.

    A file is read once by a process, unless its size or its time of change is another than before.
    """
    try:
        source = _as_file(value)
        if isinstance(source, io.BytesIO):
            return picture_hash(source.getbuffer())
        state = os.stat(source)
        return _file_hash(source, state.st_size, state.st_mtime_ns)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=2**20)
def _file_hash(path: str | Path, size: int, changed: int) -> str:
    return picture_hash(Path(path).read_bytes())


def encoded_bytes(value) -> bytes:
    """The encoded bytes of a picture as stored, see [`open_picture`].

    Raises:
        UnreadablePictureError: When there is no file to take them from.
    """
    source = _as_file(value)
    if isinstance(source, io.BytesIO):
        return source.getvalue()
    try:
        return Path(source).read_bytes()
    except (OSError, ValueError) as error:
        raise UnreadablePictureError(f"Cannot read the picture: {error}") from error


def picture_places(dataset: Dataset, columns: list[str]) -> list[list[int]]:
    """For each row, which of the cells of `columns`, counted from 0, hold a picture. No picture's bytes are read.

    Args:
        dataset (`Dataset`): Rows.
        columns (`list[str]`): With one picture, or none, a cell.
    """
    table = dataset.data.table
    present = np.stack([table.column(name).is_valid().to_numpy() for name in columns], axis=1)
    indices = dataset._indices
    present = present if indices is None else present[indices.column(0).to_numpy()]
    return [np.flatnonzero(cells).tolist() for cells in present]


def _count_cells(cells: pa.Array) -> np.ndarray:
    """Pictures in each cell of one Arrow chunk: 0 or 1, or the items of a list that are not empty."""
    if not (pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)):
        return cells.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
    owners = pc.list_parent_indices(cells).to_numpy(zero_copy_only=False)
    present = cells.flatten().is_valid().to_numpy(zero_copy_only=False)
    return np.bincount(owners[present], minlength=len(cells))
