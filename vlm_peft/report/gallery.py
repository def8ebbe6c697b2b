"""The rows and pictures of a report: which ones, where their thumbnails lie, and how they get into a page."""

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from ..evaluation.records import Row, read_predictions, read_scores
from ..metrics.boxes import LabelledBox
from .explained import ranking

THUMBNAIL_PIXELS = 336
"""Longest side of a stored thumbnail; twice the width of a card, for screens with two pixels to a point."""

Picture = Image.Image | Path | str
"""An image, or a file that holds one."""


@dataclass(frozen=True)
class Thumbnail:
    """A picture as the page has it."""

    address: str
    """`data:` address of a WebP file."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""


def best_and_worst(rows: Sequence[Row], metrics: Sequence[str], n: int = 24) -> tuple[list[Row], list[Row]]:
    """Return the rows with the highest scores, best first, and with the lowest, worst first; no row is in both.

    Rows without the first metric are left out, and equal scores keep their order, so the choice is the same every time.

    Args:
        rows: Lines of predictions.jsonl.
        metrics: Names; rows that are equal in the first are told apart by the others.
        n: How many in all; half of them best, half worst.
    """
    keys = [metric.lower() for metric in metrics]
    scored = [row for row in rows if row.get(keys[0]) is not None]
    ranked = sorted(scored, key=lambda row: [-float(row.get(key) or 0.0) for key in keys])
    n = min(n, len(ranked))
    best, worst = ranked[: n - n // 2], ranked[len(ranked) - n // 2 :]
    return best, worst[::-1]


def choose_gallery(folder: Path | str, n: int = 24) -> list[str | int]:
    """Return the ids of the rows whose pictures a report shows, best first, then worst first; see `best_and_worst`.

    Args:
        folder: Of a split, with predictions.jsonl and scores.json.
        n: How many in all.

    Raises:
        ValueError: if a file is not what it should be.
        OSError: if one cannot be read.
    """
    summary = read_scores(Path(folder, "scores.json"))
    best, worst = best_and_worst(read_predictions(Path(folder, "predictions.jsonl")), ranking(summary), n)
    return [row["id"] for row in [*best, *worst]]


def true_boxes(row: Row) -> list[LabelledBox] | None:
    """Return the `boxes` of a row, None if its task has none.

    Raises:
        ValueError: if they are no boxes; names the row.
    """
    if "boxes" not in row:
        return None
    try:
        return [LabelledBox(each["label"], tuple(each["box"])) for each in row["boxes"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        expected = 'a list of {"label", "box": [x1, y1, x2, y2]}'
        raise ValueError(
            f"row {row['id']!r}: expected {expected} as boxes, got {row['boxes']!r} ({error!r})"
        ) from error


def references_of(row: Row) -> list[str]:
    """Return what is right for a row as texts, the most frequent first: references, or true boxes; and pages.

    Raises:
        ValueError: as `true_boxes`.
    """
    boxes = true_boxes(row) or []
    references = row.get("references") or [f"{each.label} {list(each.box)}" for each in boxes] or ["none"]
    counts = Counter(references)
    said = [f"{each} ({n} of {counts.total()})" if n > 1 else each for each, n in counts.most_common()]
    pages = row.get("evidence_pages")
    if isinstance(pages, list) and pages:
        said.append(f"{'pages' if len(pages) > 1 else 'page'} {', '.join(map(str, pages))}")
    return said


def picture_path(output_dir: Path | str, split: str, picture_id: str | int) -> Path:
    """Return where a picture's thumbnail lies; any id gives a plain file name inside `eval/<split>/pictures`."""
    name = quote(str(picture_id).encode("utf-8", "replace"), safe="")
    if len(name) > 120:
        name = hashlib.sha256(name.encode()).hexdigest()
    return Path(output_dir, "eval", split, "pictures", f"{name}.webp")


def save_gallery_pictures(output_dir: Path | str, split: str, pictures: Mapping[Any, Picture]) -> list[Path]:
    """Store thumbnails for `build_report`.

    Args:
        output_dir: The run's folder.
        split: Name of the split's folder in `output_dir/eval`.
        pictures: From id to picture, those that `choose_gallery` named; of several pictures the first.

    Raises:
        OSError: if a picture cannot be read (PIL's `UnidentifiedImageError` is one) or a file cannot be written.
    """
    paths = []
    for picture_id, picture in pictures.items():
        path = picture_path(output_dir, split, picture_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(_encoded(picture)[0])
        temporary.replace(path)
        paths.append(path)
    return paths


def thumbnail(picture: Picture, pixels: int = THUMBNAIL_PIXELS) -> Thumbnail:
    """Return a picture for the page; it is decoded and encoded anew, so nothing else gets in.

    Args:
        picture: To be shown.
        pixels: Its longest side at most.

    Raises:
        OSError: if the picture cannot be read.
    """
    encoded, (width, height) = _encoded(picture, pixels)
    return Thumbnail("data:image/webp;base64," + base64.b64encode(encoded).decode("ascii"), width, height)


def _encoded(picture: Picture, pixels: int = THUMBNAIL_PIXELS) -> tuple[bytes, tuple[int, int]]:
    if isinstance(picture, Image.Image):
        image = picture.convert("RGB")
    else:
        with Image.open(picture) as opened:
            opened.draft("RGB", (pixels, pixels))
            image = opened.convert("RGB")
    image.thumbnail((pixels, pixels))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return buffer.getvalue(), image.size
