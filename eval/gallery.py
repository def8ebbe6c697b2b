"""The pictures of a report: which ones, where their thumbnails lie, and how they get into a page."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

THUMBNAIL_PIXELS = 336
"""Longest side of a stored thumbnail; twice the width of a card, for screens with two pixels to a point."""

Picture = Image.Image | Path | str
"""An image, or a file that holds one."""


def best_and_worst(rows: Sequence[Mapping[str, Any]], n: int = 24) -> tuple[list[Any], list[Any]]:
    """Return the rows with the highest `cider`, best first, and with the lowest, worst first; no row is in both.

    Rows without `cider` are left out, and equal scores keep their order, so the choice is the same every time.

    Args:
        rows: Lines of predictions.jsonl.
        n: How many in all; half of them best, half worst.
    """
    ranked = sorted((row for row in rows if row.get("cider") is not None), key=lambda row: -float(row["cider"]))
    n = min(n, len(ranked))
    best, worst = ranked[: n - n // 2], ranked[len(ranked) - n // 2 :]
    return best, worst[::-1]


def choose_gallery(rows: Sequence[Mapping[str, Any]], n: int = 24) -> list[Any]:
    """Return the ids of the pictures a report shows, best first, then worst first; see `best_and_worst`."""
    best, worst = best_and_worst(rows, n)
    return [row["id"] for row in [*best, *worst]]


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
        pictures: From id to picture, those that `choose_gallery` named.

    Raises:
        OSError: if a picture cannot be read (PIL's `UnidentifiedImageError` is one) or a file cannot be written.
    """
    paths = []
    for picture_id, picture in pictures.items():
        path = picture_path(output_dir, split, picture_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(_thumbnail(picture))
        temporary.replace(path)
        paths.append(path)
    return paths


def data_uri(picture: Picture) -> str:
    """Return a thumbnail of the picture as a `data:` address; it is decoded and encoded anew, so nothing else gets in.

    Raises:
        OSError: if the picture cannot be read.
    """
    return "data:image/webp;base64," + base64.b64encode(_thumbnail(picture)).decode("ascii")


def _thumbnail(picture: Picture) -> bytes:
    if isinstance(picture, Image.Image):
        image = picture.convert("RGB")
    else:
        with Image.open(picture) as opened:
            opened.draft("RGB", (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
            image = opened.convert("RGB")
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()
