"""Vectors of pictures: the locked image tower runs once per picture, ever.

Stage: pictures -> embeddings of unit length in one memory-mapped float16 file. Rows are found by the hash of a
picture's bytes, and the folder is named by all that its vectors depend on: what changed never reads an old one.
Locked-image training, few-shot heads and search read the same file.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datasets.config import HF_DATASETS_CACHE
from filelock import FileLock
from PIL.Image import Image

from ..data.pictures import UnreadablePictureError, open_picture
from .encoder import DualEncoder

_HASH = 33  # bytes of a line: 32 hexadecimal digits and the end
_BATCH = 256  # pictures after which what is encoded is kept


class PictureVectors:
    """An append-only file of float16 vectors with the hashes of their pictures.

    Args:
        folder (`Path`): Is made.
        width (`int`): D.
    """

    def __init__(self, folder: Path, width: int):
        self.folder, self.width = folder, width
        folder.mkdir(parents=True, exist_ok=True)
        self._vectors, self._hashes = folder / "vectors.f16", folder / "hashes.txt"

    @contextmanager
    def _locked(self):
        with FileLock(self.folder / ".lock"):
            yield

    def rows(self) -> dict[str, int]:
        """Hash of a picture -> row of its vector."""
        known = self._hashes.read_text("ascii").split() if self._hashes.is_file() else []
        return {name: row for row, name in enumerate(known[: self._whole()])}

    def _whole(self) -> int:
        """Rows of which both the vector and the hash are written to their end."""
        sizes = [path.stat().st_size if path.is_file() else 0 for path in (self._vectors, self._hashes)]
        return min(sizes[0] // (2 * self.width), sizes[1] // _HASH)

    def array(self) -> np.ndarray:
        """All vectors `(N, D)` in float16, memory-mapped."""
        count = self._whole()
        if not count:
            return np.empty((0, self.width), np.float16)
        return np.memmap(self._vectors, np.float16, "r", shape=(count, self.width))

    def add(self, hashes: Sequence[str], vectors: np.ndarray) -> None:
        """Appends vectors of pictures that have none; what a killed process left half written is overwritten."""
        with self._locked():
            known = self.rows()
            count = self._whole()
            new = {name: row for row, name in enumerate(hashes) if name not in known}
            for path, size, content in (
                (self._vectors, 2 * self.width, vectors[list(new.values())].astype(np.float16).tobytes()),
                (self._hashes, _HASH, "".join(f"{name}\n" for name in new).encode()),
            ):
                path.touch()
                with path.open("r+b") as file:
                    file.truncate(count * size)
                    file.seek(0, 2)
                    file.write(content)


def vectors_folder(directory: str | Path | None = None) -> Path:
    """Where vectors lie: `directory`, or `vlm_peft_vectors` in the data sets' cache."""
    return Path(directory or Path(HF_DATASETS_CACHE) / "vlm_peft_vectors")


def image_tower_key(encoder: DualEncoder) -> str:
    """Hash of all that turns a picture into a vector: 32 hexadecimal digits (xxh3, 128 bits)."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(encoder.clip.state_dict().items()):
        if not name.startswith(("text_", "logit_")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy())
    settings = encoder.config.vision_config.to_dict()
    settings = {
        name: settings[name] for name in settings if name not in ("transformers_version", "_name_or_path", "dtype")
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    processor = encoder.processor.image_processor
    digest.update(f"{type(processor).__name__} {processor.to_json_string()}".encode())
    return digest.hexdigest()


def open_vectors(encoder: DualEncoder, directory: str | Path | None = None) -> PictureVectors:
    """The store of a merged encoder's vectors.

    Args:
        encoder ([`DualEncoder`]): Without LoRA in it.
        directory (`str` or `Path`, *optional*): See [`vectors_folder`].
    """
    return PictureVectors(vectors_folder(directory) / image_tower_key(encoder), encoder.width)


def encode_missing(
    encoder: DualEncoder,
    store: PictureVectors,
    hashes: Sequence[str | None],
    read: Callable[[int], Any],
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[int, str]:
    """Encodes the pictures that have no vector; what is done is kept as it goes.

    Args:
        encoder ([`DualEncoder`]): Of [`open_vectors`].
        store ([`PictureVectors`]): Is filled.
        hashes (`Sequence[str | None]`): Of each picture; `None` where it cannot be read.
        read (`Callable`): Number of a picture -> what [`~vlm_peft.data.pictures.open_picture`] takes.
        batch_size (`int`, *optional*, defaults to 64): Pictures per run of the tower.
        progress (`Callable`, *optional*): Told how many more are done.

    Returns:
        `dict[int, str]`: Numbers of the pictures that cannot be read -> why.
    """
    problems = {index: "It is missing." for index, name in enumerate(hashes) if name is None}
    known = store.rows()
    missing = list(
        {name: index for index, name in enumerate(hashes) if name is not None and name not in known}.values()
    )
    done: list[int] = []

    def readable(indices: Sequence[int]) -> Iterator[Image]:
        for index in indices:
            try:
                yield open_picture(read(index))
                done.append(index)
            except UnreadablePictureError as error:
                problems[index] = str(error)

    for start in range(0, len(missing), _BATCH):
        done.clear()
        vectors = encoder.embed_pictures(readable(missing[start : start + _BATCH]), batch_size).numpy()
        store.add([str(hashes[index]) for index in done], vectors)
        progress(len(missing[start : start + _BATCH]))
    rows = store.rows()
    return problems | {
        index: problems.get(index, "It cannot be read.") for index, name in enumerate(hashes) if name not in rows
    }
