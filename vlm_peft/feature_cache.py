"""Feature cache: the frozen encoder runs once per picture, ever.

Stage: pictures -> `(N_v, D_v)` vision features on disk, memory-mapped, fed to the model as `image_features`. The store is
`datasets`' own Arrow files. A file holds one shard of pictures and is named by a hash of everything that its content
depends on: the pictures' bytes, the encoder's weights, the chosen layers, the image processor and the dtype. A changed
picture, encoder or layer therefore never reads an old entry, an interrupted run finds its finished shards, and several
processes share the work shard by shard.
"""

import logging
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from accelerate import PartialState
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.config import HF_DATASETS_CACHE

from .modeling_vision_qwen import VisionQwen
from .pictures import Pictures, UnreadablePictureError

logger = logging.getLogger(__name__)

SHARD_PICTURES = 1024
"""Pictures per shard: what an interrupted run loses at most."""

_FEATURES = Features({"features": Value("binary"), "problem": Value("string")})
_NUMPY_DTYPES = {"float16": np.float16, "float32": np.float32}


class FeatureCache:
    """Vision features of a flat sequence of pictures.

    Args:
        dataset (`Dataset`): One row per picture: `features`, the raw bytes of `(N_v, D_v)`, and `problem`, why a picture
            has none.
        shape (`tuple[int, int]`): `(N_v, D_v)`.
        dtype (`str`): `"float16"` or `"float32"`.
    """

    def __init__(self, dataset: Dataset, shape: tuple[int, int], dtype: str):
        self._dataset = dataset
        self._shape = shape
        self._dtype = _NUMPY_DTYPES[dtype]

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def unreadable(self) -> dict[int, str]:
        """Picture number -> why it could not be read."""
        return {index: reason for index, reason in enumerate(self._dataset["problem"][:]) if reason}

    def get(self, indices: list[int]) -> torch.Tensor:
        """Features of the pictures `indices` as a tensor of shape `(len(indices), N_v, D_v)`."""
        rows = self._dataset[list(indices)]["features"]
        features = np.stack([np.frombuffer(row, dtype=self._dtype).reshape(self._shape) for row in rows])
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
        dtype (`str`, *optional*, defaults to `"float16"`): `"float16"` or `"float32"`, as stored.
        batch_size (`int`, *optional*, defaults to 64): Pictures per run of the encoder.

    Returns:
        [`FeatureCache`] over all pictures, in their order.

    Raises:
        ValueError: When the encoder trains, since its features would change under the cache.
        OSError: When the disk has too little room, with both figures.
    """
    tower = model.model.vision_tower
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError("The vision tower has trainable parameters: its features cannot be cached.")
    shape = (model.config.num_vision_tokens, model.config.vision_feature_size)
    directory = Path(directory or Path(HF_DATASETS_CACHE) / "vlm_peft_features")
    directory.mkdir(parents=True, exist_ok=True)
    key = encoder_key(model, image_processor, dtype)
    shards = [range(start, min(start + SHARD_PICTURES, len(pictures))) for start in range(0, len(pictures), SHARD_PICTURES)]
    files = [directory / f"{_shard_key(pictures, shard, key)}.arrow" for shard in shards]

    state = PartialState()
    missing = [index for index, file in enumerate(files) if not file.exists()]
    state.wait_for_everyone()
    if missing:
        bytes_per_picture = shape[0] * shape[1] * np.dtype(_NUMPY_DTYPES[dtype]).itemsize
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
        mine = missing[state.process_index :: state.num_processes]
        for index in mine:
            _encode_shard(model, image_processor, pictures, shards[index], files[index], dtype, batch_size)
        state.wait_for_everyone()
    stored = [Dataset.from_file(str(file)) for file in files]
    dataset = concatenate_datasets(stored) if stored else Dataset.from_dict({"features": [], "problem": []}, _FEATURES)
    return FeatureCache(dataset, shape, dtype)


def encoder_key(model: VisionQwen, image_processor, dtype: str) -> str:
    """Hash of all that turns a picture into features: weights, layers, class token, processor, dtype."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    config = model.config
    digest.update(repr((config.hidden_state_indices, config.keep_class_token, dtype)).encode())
    digest.update(image_processor.to_json_string().encode())
    return digest.hexdigest()


def _shard_key(pictures: Pictures, shard: range, key: str) -> str:
    digest = xxhash.xxh3_128(key.encode())
    for index in shard:
        encoded = pictures.encoded(index)
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
    """Encodes one shard into a temporary file, then renames it."""
    rows = Dataset.from_dict({"index": list(shard)})
    temporary = file.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    rows.map(
        partial(_encode_batch, model=model, image_processor=image_processor, pictures=pictures, dtype=dtype),
        batched=True,
        batch_size=batch_size,
        remove_columns=["index"],
        features=_FEATURES,
        cache_file_name=str(temporary),
        new_fingerprint=file.stem,
        load_from_cache_file=False,
        desc=f"Encoding pictures {shard.start} to {shard.stop}",
    )
    temporary.rename(file)


@torch.inference_mode()
def _encode_batch(batch: dict, model: VisionQwen, image_processor, pictures: Pictures, dtype: str) -> dict:
    features, problems, opened = [b""] * len(batch["index"]), [""] * len(batch["index"]), {}
    for position, index in enumerate(batch["index"]):
        try:
            opened[position] = pictures.open(index)
        except UnreadablePictureError as error:
            problems[position] = str(error)
    if opened:
        pixel_values = image_processor(list(opened.values()), return_tensors="pt")["pixel_values"]
        encoded = model.model.get_vision_features(pixel_values.to(model.model.vision_tower.device))
        encoded = encoded.float().cpu().numpy().astype(_NUMPY_DTYPES[dtype])
        for position, row in zip(opened, encoded, strict=True):
            features[position] = row.tobytes()
    return {"features": features, "problem": problems}
