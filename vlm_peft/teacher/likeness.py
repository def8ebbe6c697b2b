"""Likeness: CLIPScore of each answer with its picture, each picture encoded once, and the threshold below which it is
not believed.

Stage: answers -> scores; a threshold is chosen on other pictures, whose captions people wrote.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..adapters.loading import default_device
from ..contrastive.features import encode_missing, open_vectors
from ..contrastive.folder import load_clip
from ..data.pictures import Pictures
from ..data.rows import load_rows, picture_folder, resolve_paths
from ..metrics.clip_score import WEIGHT
from ..tasks import make_task
from ..training.setup import local
from .options import name_and_split

TRUSTED_PICTURES = 500
"""So many pictures of a trusted set choose the threshold."""

_CHUNK = 256  # pictures whose bytes are held at a time


class Likeness:
    """A CLIP or SigLIP with its stored vectors of pictures.

    Args:
        name (`str`): Hub id, folder, or adapter folder.
        revision (`str`, *optional*): Of a Hub id.
        prefix (`str`): Before each text.
        device (`str`, *optional*): The accelerator if there is one.
        directory (`str`, *optional*): Where vectors are kept; the data sets' cache by default.

    Raises:
        FileNotFoundError, ValueError: As [`~vlm_peft.contrastive.folder.load_clip`].
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        prefix: str = "",
        device: str | None = None,
        directory: str | None = None,
    ):
        where = torch.device(device) if device else default_device()
        self.encoder = load_clip(local(name, "clip_model"), revision=revision, device=where)
        self.prefix = prefix
        self._vectors = open_vectors(self.encoder, directory)

    def encode(self, pictures: Iterable[tuple[str, Any]]) -> None:
        """Encodes the pictures that have no vector.

        Args:
            pictures (`Iterable[tuple[str, Any]]`): Hash, and what [`~vlm_peft.data.pictures.open_picture`] takes.
        """
        waiting: Iterator[tuple[str, Any]] = iter(pictures)
        while chunk := list(islice(waiting, _CHUNK)):
            encode_missing(self.encoder, self._vectors, [name for name, _ in chunk], lambda place: chunk[place][1])

    def scores(self, hashes: Sequence[str], texts: Sequence[str]) -> list[float | None]:
        """CLIPScore, 0..2.5, of each text with its picture; `None` where the picture cannot be read.

        Args:
            hashes (`Sequence[str]`): The picture of each text, encoded.
            texts (`Sequence[str]`): Those longer than the CLIP reads are cut.
        """
        rows, vectors = self._vectors.rows(), self._vectors.array()
        found: list[float | None] = []
        for start in range(0, len(texts), _CHUNK):
            part = hashes[start : start + _CHUNK]
            said = self.encoder.embed_texts([self.prefix + text for text in texts[start : start + _CHUNK]]).numpy()
            for name, text in zip(part, said, strict=True):
                row = rows.get(name)
                likeness = None if row is None else float(np.dot(vectors[row].astype(np.float32), text))
                found.append(None if likeness is None else WEIGHT * max(likeness, 0.0))
        return found


@dataclass(frozen=True)
class Threshold:
    """A least CLIPScore, and what it does to captions that people wrote.

    Args:
        value (`float`): 0..2.5.
        keeps (`float`): Share of right captions at or above it.
        rejects (`float`): Share of captions of other pictures below it.
        pictures (`int`): That it was chosen on.
    """

    value: float
    keeps: float
    rejects: float
    pictures: int

    def __str__(self) -> str:
        return (
            f"CLIPScore of at least {self.value:.3f}: it keeps {self.keeps:.1%} of the captions of {self.pictures} "
            f"trusted pictures, and rejects {self.rejects:.1%} of them beside other pictures."
        )


def choose_threshold(likeness: Likeness, trusted: str, keep: float, image_column: str = "image") -> Threshold:
    """The CLIPScore that keeps a share of captions that are right, and what it rejects of wrong ones.

    A wrong caption is that of the picture half the set further.

    Args:
        likeness ([`Likeness`]): Of the answers, too.
        trusted (`str`): NAME:SPLIT of pictures with captions; the first 500 pictures, one caption each.
        keep (`float`): Share of the right captions.
        image_column (`str`): Where pictures are; `image` where the set does not have it.

    Raises:
        FileNotFoundError, ValueError: When the set is not there, or has no captions.
    """
    folder, split = name_and_split(trusted)
    folder = local(folder, "clip_trusted")
    rows = load_rows(folder, split, limit=TRUSTED_PICTURES)
    column = image_column if image_column in rows.column_names else "image"
    task = make_task("caption", rows.column_names, image_column=column)
    pictures = Pictures(resolve_paths(rows.select_columns([column]), [column], picture_folder(folder)), [column])
    texts = [task.example(row).references[0][0] for row in rows.remove_columns([column])]
    usable = (
        [index for index, name in enumerate(pictures.hashes) if name is not None] if len(pictures) == len(rows) else []
    )
    if len(usable) < 2:
        raise ValueError(f"--clip_trusted {trusted}: expected two or more pictures with captions, one a row.")
    hashes = [str(pictures.hashes[index]) for index in usable]
    texts = [texts[index] for index in usable]
    likeness.encode((name, pictures.raw(index)) for name, index in zip(hashes, usable, strict=True))
    half = len(hashes) // 2
    right = [score for score in likeness.scores(hashes, texts) if score is not None]
    wrong = [score for score in likeness.scores([*hashes[half:], *hashes[:half]], texts) if score is not None]
    # The share that is kept is at least what was asked for.
    value = sorted(right)[int((1 - keep) * len(right) + 1e-9)]
    return Threshold(
        value,
        sum(score >= value for score in right) / len(right),
        sum(score < value for score in wrong) / len(wrong),
        len(hashes),
    )
