"""Search: a folder of pictures -> an index -> the pictures nearest to a text.

Stage: after training; the vectors are those of [`~vlm_peft.contrastive.features`], so that a folder that is searched
again, or that another search has seen, is encoded only where it is new. The search is exact: every vector is compared.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from ..data.pictures import UnreadablePictureError, encoded_bytes, picture_hash
from ..drafts import draft_of
from ..evaluation.records import write_text
from ..json_files import read_json
from .encoder import DualEncoder
from .features import PictureVectors, encode_missing, open_vectors

_BLOCK = 65_536  # vectors held in float32 at a time: 134 MB at 512 numbers each


@dataclass(frozen=True)
class Found:
    """A picture and how near it is.

    Args:
        path (`str`): Of the picture.
        score (`float`): Cosine similarity, -1..1.
    """

    path: str
    score: float


class PictureIndex:
    """The vectors of some picture files.

    Args:
        store ([`~vlm_peft.contrastive.features.PictureVectors`]): Of the encoder.
        paths (`Sequence[str]`): Of the pictures that have a vector.
        rows (`np.ndarray`): `(P,)`, of each path in the store.
    """

    def __init__(self, store: PictureVectors, paths: Sequence[str], rows: np.ndarray):
        self.paths = list(paths)
        self._vectors, self._rows = store.array(), rows

    def __len__(self) -> int:
        """Pictures."""
        return len(self.paths)

    def vectors(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Vectors `(P, D)` of some of the paths, in float16."""
        return self._vectors[self._rows[start:stop]]

    def search(self, vector: np.ndarray, count: int = 10) -> list[Found]:
        """The nearest pictures, the nearest first.

        Args:
            vector (`np.ndarray`): `(D,)`, of unit length.
            count (`int`, *optional*, defaults to 10): So many at most.
        """
        scores = np.concatenate(
            [self.vectors(at, at + _BLOCK).astype(np.float32) @ vector for at in range(0, len(self), _BLOCK)]
        )
        count = min(count, len(scores))
        best = np.argpartition(-scores, count - 1)[:count]
        best = best[np.lexsort((best, -scores[best]))]
        return [Found(self.paths[index], float(scores[index])) for index in best]


def index_pictures(
    encoder: DualEncoder,
    folder: str | Path,
    paths: Sequence[str],
    *,
    directory: str | Path | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[PictureIndex, dict[str, str], int]:
    """Brings the index of a folder up to date: what is new or changed is encoded, what is gone is left out.

    Files of the size and time that they had are not read again.

    Args:
        encoder ([`~vlm_peft.contrastive.encoder.DualEncoder`]): Merged.
        folder (`str` or `Path`): What is searched, whose files are remembered.
        paths (`Sequence[str]`): Of the pictures in it.
        directory (`str` or `Path`, *optional*): Of all indexes; see [`~vlm_peft.contrastive.features.vectors_folder`].
        batch_size (`int`, *optional*, defaults to 64): Pictures at a time.
        progress (`Callable`, *optional*): Told how many more are encoded.

    Returns:
        `tuple`: The index; path -> why it cannot be read; and how many pictures were encoded.

    Raises:
        ValueError: When no picture can be read.
    """
    store = open_vectors(encoder, directory)
    file = (
        store.folder
        / f"files-{xxhash.xxh3_64_hexdigest(str(Path(folder).resolve()).encode('utf-8', 'surrogateescape'))}.json"
    )
    known = _read_known(file)
    seen: dict[str, list] = {}
    hashes: list[str | None] = []
    reasons: dict[int, str] = {}
    for number, path in enumerate(paths):
        try:
            name, stat = str(Path(path).resolve()), Path(path).stat()
            old = known.get(name)
            if old is None or old[:2] != [stat.st_size, stat.st_mtime_ns]:
                # A file name may look like a picture's base64 text: a path says what it is.
                old = [stat.st_size, stat.st_mtime_ns, picture_hash(encoded_bytes(Path(path)))]
            seen[name] = old
            hashes.append(old[2])
        except (OSError, UnreadablePictureError) as error:
            reasons[number] = str(error)
            hashes.append(None)

    def read(index: int) -> bytes:
        encoded = encoded_bytes(Path(paths[index]))
        # Its vector would be found under the hash of what was there before, for ever.
        if picture_hash(encoded) != hashes[index]:
            raise UnreadablePictureError("It changed while it was read: search again.")
        return encoded

    before = len(store.array())
    problems = encode_missing(encoder, store, hashes, read, batch_size=batch_size, progress=progress) | reasons
    write_text(file, json.dumps(seen))
    rows = store.rows()
    kept = [index for index in range(len(paths)) if index not in problems]
    if not kept:
        raise ValueError(f"None of the {len(paths)} pictures in {folder} can be read: {next(iter(problems.values()))}")
    index = PictureIndex(store, [paths[each] for each in kept], np.array([rows[str(hashes[each])] for each in kept]))
    return index, {paths[each]: why for each, why in problems.items()}, len(store.array()) - before


def _read_known(file: Path) -> dict[str, list]:
    """Path -> size, time and hash of an earlier look; nothing where the file is damaged, which costs one more look."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return {}


def export_vectors(index: PictureIndex, file: str | Path) -> None:
    """Writes an index as parquet for a vector engine: `id` (the path) and `vector` (a list of D float32).

    Args:
        index ([`PictureIndex`]): To write.
        file (`str` or `Path`): Of the table; nobody finds half of it there.
    """
    file = Path(file)
    draft = draft_of(file)
    width = index.vectors(0, 1).shape[1]
    schema = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), width))])
    with pq.ParquetWriter(draft, schema) as writer:
        for start in range(0, len(index), _BLOCK):
            flat = pa.array(index.vectors(start, start + _BLOCK).astype(np.float32).ravel())
            paths = [path.encode("utf-8", "replace").decode() for path in index.paths[start : start + _BLOCK]]
            vectors = pa.FixedSizeListArray.from_arrays(flat, width)
            writer.write_table(pa.Table.from_arrays([pa.array(paths), vectors], schema=schema))
    draft.replace(file)
