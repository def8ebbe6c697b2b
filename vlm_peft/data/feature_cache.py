"""Feature cache: the frozen encoder runs once per picture, ever.

Stage: pictures -> `(N_v, D_v)` vision features on disk, memory-mapped, fed to the model as `image_features`. The store
is `datasets`' own Arrow files. A file holds one shard of pictures and is named by a hash of everything that its content
depends on: the pictures' bytes, the encoder's weights, the chosen layers, the image processor and the dtype. A changed
picture, encoder or layer therefore never reads an old entry, an interrupted run finds its finished shards, and several
processes share the work shard by shard.
"""

import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
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
from .pictures import Pictures, UnreadablePictureError

logger = logging.getLogger(__name__)

SHARD_PICTURES = 1024
"""Pictures per shard: what an interrupted run loses at most."""

_FEATURES = Features({"features": Value("binary"), "problem": Value("string")})
# Recorded in a configuration without any effect on features.
_UNRELATED_SETTINGS = ("transformers_version", "_name_or_path", "architectures")
_NUMPY_DTYPES = {"float16": np.float16, "float32": np.float32}


class FeatureCache:
    """Vision features of a flat sequence of pictures.

    Args:
        dataset (`Dataset`): One row per picture: `features`, the raw bytes of `(N_v, D_v)`, and `problem`, why a
            picture has none.
        shape (`tuple[int, int]`): `(N_v, D_v)`.
        dtype (`str`): `"float16"` or `"float32"`.
    """

    def __init__(self, dataset: Dataset, shape: tuple[int, int], dtype: str):
        self._dataset = dataset.with_format("arrow")
        self._shape = shape
        self._dtype = _NUMPY_DTYPES[dtype]

    def __len__(self) -> int:
        """Pictures."""
        return len(self._dataset)

    @cached_property
    def unreadable(self) -> dict[int, str]:
        """Picture number -> why it could not be read."""
        problems = self._dataset.data.table.column("problem").to_pylist()
        return {index: reason for index, reason in enumerate(problems) if reason}

    def get(self, indices: list[int]) -> torch.Tensor:
        """Features of the pictures `indices` as a tensor of shape `(len(indices), N_v, D_v)`, in the stored dtype.

        Raises:
            ValueError: When one of the pictures could not be read.
        """
        for index in indices:
            if index in self.unreadable:
                raise ValueError(f"Picture {index} has no features: {self.unreadable[index]} Leave its row out.")
        # Arrow buffers are views of the mapped file: the only copy is the one into the batch.
        cells = self._dataset[list(indices)].column("features")
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
        ValueError: When the encoder trains, since its features would change under the cache, or when float16 cannot
            hold its features.
        OSError: When the disk has too little room, with both figures.
    """
    tower = model.model.vision_tower
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError("The vision tower has trainable parameters: its features cannot be cached.")
    shape = (model.config.num_vision_tokens, model.config.vision_feature_size)
    directory = features_folder(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards, files = _shards(model, image_processor, pictures, directory, dtype)

    state = PartialState()
    # Shards of equal pictures share a file, which is written once.
    missing = list({file: index for index, file in enumerate(files) if not file.exists()}.values())
    state.wait_for_everyone()
    if missing:
        bytes_per_picture = picture_bytes(model.config, dtype)
        wanted = sum(len(shards[index]) for index in missing)
        _check_disk(directory, wanted * bytes_per_picture)
        if state.is_main_process:
            logger.info(
                "Encoding %d pictures once: %.1f MB of %s features in %s.",
                wanted,
                wanted * bytes_per_picture / 1e6,
                dtype,
                directory,
            )
        # By the shard's own number: another run may write a shard between two processes' looks at the folder.
        for index in missing:
            if index % state.num_processes == state.process_index:
                _encode_shard(model, image_processor, pictures, shards[index], files[index], dtype, batch_size)
    state.wait_for_everyone()
    stored = [Dataset.from_file(str(file)) for file in files]
    dataset = concatenate_datasets(stored) if stored else Dataset.from_dict({"features": [], "problem": []}, _FEATURES)
    return FeatureCache(dataset, shape, dtype)


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
    shards, files = _shards(model, image_processor, pictures, features_folder(directory), dtype)
    return sum(len(shard) for file, shard in dict(zip(files, shards, strict=True)).items() if not file.exists())


def _shards(
    model: VisionQwen, image_processor, pictures: Pictures, directory: Path, dtype: str
) -> tuple[list[range], list[Path]]:
    """Picture numbers of each shard, and its file."""
    key = encoder_key(model, image_processor, dtype)
    shards = [
        range(start, min(start + SHARD_PICTURES, len(pictures))) for start in range(0, len(pictures), SHARD_PICTURES)
    ]
    return shards, [directory / f"{_shard_key(pictures, shard, key)}.arrow" for shard in shards]


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


def _shard_key(pictures: Pictures, shard: range, key: str) -> str:
    digest = xxhash.xxh3_128(key.encode())
    for index in shard:
        try:
            encoded = pictures.encoded(index)
        except UnreadablePictureError as error:
            # The entry records the problem; a picture that turns up later is another content.
            encoded = f"unreadable: {error}".encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def _check_disk(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"The feature cache needs {needed / 1e9:.2f} GB in {directory}, which has {free / 1e9:.2f} GB free: point "
            "--feature_cache_dir to a larger disk, or use --feature_cache false."
        )


def _encode_shard(
    model: VisionQwen, image_processor, pictures: Pictures, shard: range, file: Path, dtype: str, batch_size: int
) -> None:
    """Encodes one shard in a folder of this process, and gives it its name when it is whole."""
    # Pillow and NumPy give the interpreter free while they work.
    threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    prepare = partial(_prepare, image_processor=image_processor, pictures=pictures)
    # An encoder on the CPU has all cores to itself: threads beside its own make it wait (190 pictures/s for 228).
    ahead = 0 if model.model.vision_tower.device.type == "cpu" else 1
    prepared = _prepare_batches(threads, prepare, shard, batch_size, ahead)
    sweep(file.parent)
    draft = draft_of(file)
    draft.mkdir()
    try:
        Dataset.from_dict({"index": list(shard)}).map(
            partial(_encode_batch, model=model, prepared=prepared, dtype=dtype),
            batched=True,
            batch_size=batch_size,
            remove_columns=["index"],
            features=_FEATURES,
            cache_file_name=str(draft / file.name),
            new_fingerprint=file.stem,
            load_from_cache_file=False,
            desc=f"Encoding pictures {shard.start} to {shard.stop - 1}",
        )
        (draft / file.name).replace(file)
    finally:
        threads.shutdown(cancel_futures=True)
        shutil.rmtree(draft, ignore_errors=True)


def _prepare(index: int, image_processor, pictures: Pictures) -> torch.Tensor | str:
    """`pixel_values` `(3, H, W)` of one picture, or why it cannot be read."""
    try:
        picture = pictures.open(index)
    except UnreadablePictureError as error:
        return str(error)
    return image_processor([picture], return_tensors="pt")["pixel_values"][0]


def _prepare_batches(
    threads: ThreadPoolExecutor, prepare: Callable, indices: range, batch_size: int, ahead: int
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
def _encode_batch(batch: dict, model: VisionQwen, prepared: Iterator[list[torch.Tensor | str]], dtype: str) -> dict:
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
    return {"features": features, "problem": problems}


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
