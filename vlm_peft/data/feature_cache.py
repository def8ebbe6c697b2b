"""Feature cache: the frozen encoder runs once per picture, ever.

Stage: pictures -> `(N_v, D_v)` vision features on disk, memory-mapped, fed to the model as `image_features`. The store
is `datasets`' own Arrow files. A file is named by a hash of all that turns a picture into features (the encoder's
weights, the chosen layers, the image processor and the dtype) and by one of its pictures; each of its rows carries the
hash of its picture's bytes. A changed picture, encoder or layer therefore never reads an old entry, equal pictures have
one entry whatever data set they are in, and an interrupted run finds its finished files. Several processes share the
work shard by shard.
"""

import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from accelerate import PartialState
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.config import HF_DATASETS_CACHE

from ..drafts import draft_of, sweep
from ..model.configuration_vision_qwen import VisionQwenConfig
from ..model.modeling_vision_qwen import VisionQwen
from .pictures import Pictures, UnreadablePictureError, stored_hash, while_scaled

logger = logging.getLogger(__name__)

SHARD_PICTURES = 1024
"""Pictures per shard: what an interrupted run loses at most."""

_FEATURES = Features({"hash": Value("string"), "features": Value("binary"), "problem": Value("string")})
# Recorded in a configuration without any effect on features.
_UNRELATED_SETTINGS = ("transformers_version", "_name_or_path", "architectures")
_NUMPY_DTYPES = {"float16": np.float16, "float32": np.float32}


class FeatureCache:
    """Vision features of a flat sequence of pictures.

    Args:
        dataset (`Dataset`): One row per entry: `features`, the raw bytes of `(N_v, D_v)`, and `problem`, why its
            picture has none.
        rows (`list[int]`): The entry of each picture; any number for those that are `missing`.
        missing (`dict[int, str]`): Picture number -> why there is no file to encode.
        shape (`tuple[int, int]`): `(N_v, D_v)`.
        dtype (`str`): `"float16"` or `"float32"`.
    """

    def __init__(self, dataset: Dataset, rows: list[int], missing: dict[int, str], shape: tuple[int, int], dtype: str):
        self._dataset = dataset.with_format("arrow")
        self._rows = rows
        self._missing = missing
        self._shape = shape
        self._dtype = _NUMPY_DTYPES[dtype]

    def __len__(self) -> int:
        """Pictures."""
        return len(self._rows)

    @cached_property
    def unreadable(self) -> dict[int, str]:
        """Picture number -> why it could not be read."""
        problems = self._dataset.data.table.column("problem").to_pylist()
        reasons = (self._missing.get(index) or problems[row] for index, row in enumerate(self._rows))
        return {index: reason for index, reason in enumerate(reasons) if reason}

    def get(self, indices: list[int]) -> torch.Tensor:
        """Features of the pictures `indices` as a tensor of shape `(len(indices), N_v, D_v)`, in the stored dtype.

        Raises:
            ValueError: When one of the pictures could not be read.
        """
        for index in indices:
            if index in self.unreadable:
                raise ValueError(f"Picture {index} has no features: {self.unreadable[index]} Leave its row out.")
        # Arrow buffers are views of the mapped file: the only copy is the one into the batch.
        cells = self._dataset[[self._rows[index] for index in indices]].column("features")
        features = np.stack([np.frombuffer(cell.as_buffer(), self._dtype).reshape(self._shape) for cell in cells])
        return torch.from_numpy(features)


def build_feature_cache(
    model: VisionQwen,
    image_processor,
    pictures: Pictures,
    *,
    directory: str | Path | None = None,
    dtype: str = "float16",
    batch_size: int = 64,
) -> FeatureCache:
    """Encodes each picture once, or finds it encoded.

    Args:
        model ([`VisionQwen`]): Its vision tower must be frozen.
        image_processor (`BaseImageProcessor`): Makes `pixel_values`; part of the key.
        pictures ([`Pictures`]): What to encode.
        directory (`str` or `Path`, *optional*): Where the Arrow files lie; `vlm_peft_features` in the data sets' cache
            by default.
        dtype (`str`, *optional*, defaults to `"float16"`): `"float16"` or `"float32"`, as stored. Half precision moves
            the loss by about a millionth of itself (measured in `tests/test_feature_cache.py`).
        batch_size (`int`, *optional*, defaults to 64): Pictures per run of the encoder.

    Returns:
        [`FeatureCache`] over all pictures, in their order.

    Raises:
        ValueError: When the encoder trains, since its features would change under the cache, when float16 cannot
            hold its features, or when a picture's file changes in the meantime.
        OSError: When the disk has too little room, with both figures.
    """
    tower = model.model.vision_tower
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError("The vision tower has trainable parameters: its features cannot be cached.")
    shape = (model.config.num_vision_tokens, model.config.vision_feature_size)
    directory = features_folder(directory)
    directory.mkdir(parents=True, exist_ok=True)
    key = encoder_key(model, image_processor, dtype)
    firsts = _first_of_each(pictures)
    _, known = _stored(directory, key, firsts)

    state = PartialState()
    state.wait_for_everyone()
    wanted = len(firsts.keys() - known.keys())
    if wanted:
        bytes_per_picture = picture_bytes(model.config, dtype)
        check_disk(directory, wanted * bytes_per_picture)
        if state.is_main_process:
            logger.info(
                "Encoding %d pictures once: %.1f MB of %s features in %s.",
                wanted,
                wanted * bytes_per_picture / 1e6,
                dtype,
                directory,
            )
        # Shards of all pictures: another run may write between two processes' looks at what is missing.
        names = [*firsts]
        for start in range(SHARD_PICTURES * state.process_index, len(names), SHARD_PICTURES * state.num_processes):
            shard = {name: firsts[name] for name in names[start : start + SHARD_PICTURES] if name not in known}
            if shard:
                _encode_shard(model, image_processor, pictures, shard, directory, key, dtype, batch_size)
    state.wait_for_everyone()
    stored, known = _stored(directory, key, firsts)
    dataset = concatenate_datasets(stored) if stored else Dataset.from_dict({name: [] for name in _FEATURES}, _FEATURES)
    missing = {index: _why_missing(pictures, index) for index, name in enumerate(pictures.hashes) if name is None}
    return FeatureCache(
        dataset, [0 if name is None else known[name] for name in pictures.hashes], missing, shape, dtype
    )


def _first_of_each(pictures: Pictures) -> dict[str, int]:
    """Hash -> number of the first picture that has it, in the order of the pictures."""
    firsts: dict[str, int] = {}
    for index, name in enumerate(pictures.hashes):
        if name is not None:
            firsts.setdefault(name, index)
    return firsts


def _stored(directory: Path, key: str, wanted: Collection[str]) -> tuple[list[Dataset], dict[str, int]]:
    """The files that hold some of the wanted pictures, and each picture's row in all of them together."""
    # The oldest first: what another run adds must not change what this one reads.
    files = sorted(directory.glob(f"{key}-*.arrow"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    shards: list[Dataset] = []
    rows: dict[str, int] = {}
    total = 0
    for file in files:
        shard = Dataset.from_file(str(file))
        names = shard.data.table.column("hash").to_pylist()
        found = {name: total + row for row, name in enumerate(names) if name in wanted and name not in rows}
        if found:
            shards.append(shard)
            rows |= found
            total += len(shard)
    return shards, rows


def _why_missing(pictures: Pictures, index: int) -> str:
    try:
        pictures.encoded(index)
    except UnreadablePictureError as error:
        return str(error)
    return "Its file came while the pictures were being encoded."


def features_folder(directory: str | Path | None = None) -> Path:
    """Where the Arrow files lie: `directory`, or `vlm_peft_features` in the data sets' cache."""
    return Path(directory or Path(HF_DATASETS_CACHE) / "vlm_peft_features")


def picture_bytes(config: VisionQwenConfig, dtype: str) -> int:
    """Bytes of one picture's features as stored."""
    return config.num_vision_tokens * config.vision_feature_size * np.dtype(_NUMPY_DTYPES[dtype]).itemsize


def count_missing(
    model: VisionQwen, image_processor, pictures: Pictures, *, directory: str | Path | None = None, dtype: str
) -> int:
    """Pictures that [`build_feature_cache`] would have to encode; all are read, nothing is written."""
    firsts = _first_of_each(pictures)
    _, known = _stored(features_folder(directory), encoder_key(model, image_processor, dtype), firsts)
    return len(firsts) - len(known)


def encoder_key(model: VisionQwen, image_processor, dtype: str) -> str:
    """Hash of all that turns a picture into features.

    Args:
        model ([`VisionQwen`]): Its tower's weights and configuration, the chosen layers and the class token enter.
        image_processor (`BaseImageProcessor`): Its class (backends resize differently) and settings enter.
        dtype (`str`): As stored.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    tower = model.model.vision_tower
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    # Equal weights compute something else with, for example, another number of heads.
    config = model.config
    tower_config = config.vision_tower_config.to_dict()
    settings = {key: value for key, value in tower_config.items() if key not in _UNRELATED_SETTINGS}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    # Only where it is asked for, so that features that are stored already are found.
    size = () if config.image_size is None else (config.image_size,)
    digest.update(repr((config.hidden_state_indices, config.keep_class_token, dtype, *size)).encode())
    digest.update(f"{type(image_processor).__name__} {image_processor.to_json_string()}".encode())
    return digest.hexdigest()


def check_disk(directory: Path, needed: int) -> None:
    """Checks that so many bytes have room.

    Raises:
        OSError: With what is needed and what is free.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"The feature cache needs {needed / 1e9:.2f} GB in {directory}, which has {free / 1e9:.2f} GB free: point "
            "--feature_cache_dir to a larger disk, or use --feature_cache false."
        )


def _encode_shard(
    model: VisionQwen,
    image_processor,
    pictures: Pictures,
    shard: dict[str, int],
    directory: Path,
    key: str,
    dtype: str,
    batch_size: int,
) -> None:
    """Encodes pictures, hash -> number, in a folder of this process, and gives their file its name when it is whole."""
    # Pillow and NumPy give the interpreter free while they work.
    threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    prepare = partial(prepare_picture, image_processor=image_processor, pictures=pictures)
    # An encoder on the CPU has all cores to itself: threads beside its own make it wait (190 pictures/s for 228).
    ahead = 0 if model.model.vision_tower.device.type == "cpu" else 1
    numbers = [*shard.values()]
    prepared = prepare_batches(threads, prepare, numbers, batch_size, ahead)
    content = xxhash.xxh3_128_hexdigest("".join(shard).encode())
    file = directory / f"{key}-{content}.arrow"
    sweep(directory)
    draft = draft_of(file)
    draft.mkdir()
    try:
        Dataset.from_dict({"hash": [*shard], "index": numbers}).map(
            partial(encode_batch, model=model, prepared=prepared, dtype=dtype),
            batched=True,
            batch_size=batch_size,
            remove_columns=["index"],
            features=_FEATURES,
            cache_file_name=str(draft / file.name),
            new_fingerprint=content,
            load_from_cache_file=False,
            desc=f"Encoding pictures {numbers[0]} to {numbers[-1]}",
        )
        (draft / file.name).replace(file)
    finally:
        threads.shutdown(cancel_futures=True)
        shutil.rmtree(draft, ignore_errors=True)


def prepare_picture(index: int, image_processor, pictures: Pictures) -> torch.Tensor | str:
    """`pixel_values` `(3, H, W)` of one picture, or why it cannot be read."""
    prepared: torch.Tensor | str
    try:
        picture = pictures.open(index)
    except UnreadablePictureError as error:
        prepared = str(error)
    else:
        with while_scaled(picture):
            prepared = image_processor([picture], return_tensors="pt")["pixel_values"][0]
    # Its entry would be found for ever by the old content's hash.
    if stored_hash(pictures.raw(index)) != pictures.hashes[index]:
        raise ValueError(f"The file of picture {index} changed while the pictures were being read: start again.")
    return prepared


def prepare_batches(
    threads: ThreadPoolExecutor, prepare: Callable, indices: Sequence[int], batch_size: int, ahead: int
) -> Iterator[list[torch.Tensor | str]]:
    """Results of `prepare` in order, batch by batch; so many batches are begun before they are asked for."""
    waiting: deque[list[Future]] = deque()
    for start in range(0, len(indices), batch_size):
        waiting.append([threads.submit(prepare, index) for index in indices[start : start + batch_size]])
        if len(waiting) > ahead:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]


@torch.inference_mode()
def encode_batch(batch: dict, model: VisionQwen, prepared: Iterator[list[torch.Tensor | str]], dtype: str) -> dict:
    """Features of one batch of picture numbers; a picture that cannot be read gets the reason instead."""
    of_batch = next(prepared)
    readable = [pixels for pixels in of_batch if not isinstance(pixels, str)]
    encoded = iter(())
    if readable:
        tower = model.model.vision_tower.eval()
        encoded = iter(model.model.get_vision_features(torch.stack(readable).to(tower.device)).float().cpu())
    features, problems = [], []
    for pixels in of_batch:
        if isinstance(pixels, str):
            features.append(b"")
            problems.append(pixels)
        else:
            features.append(_to_bytes(next(encoded), dtype))
            problems.append("")
    return {"hash": batch["hash"], "features": features, "problem": problems}


def _to_bytes(features: torch.Tensor, dtype: str) -> bytes:
    """Features `(N_v, D_v)` as stored."""
    with np.errstate(over="ignore"):
        stored = features.numpy().astype(_NUMPY_DTYPES[dtype])
    if not np.isfinite(stored).all():
        raise ValueError(
            f"The encoder's features reach {features.abs().max():g}, more than {dtype} holds"
            f" ({np.finfo(stored.dtype).max:g}): use --feature_dtype float32."
        )
    return stored.tobytes()
