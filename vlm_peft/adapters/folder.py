"""Adapters: what trains, and the one small folder that holds it.

Stage: model -> `PeftModel` for the trainer; folder <-> model. An adapter folder holds LoRA, the full projector and the
rows of turn tokens that were added to the decoder's vocabulary in one `adapter_model.safetensors`,
`adapter_config.json`, the composite `config.json` with both bases, and the processor. It holds no base weights and
nothing that would have to be unpickled.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ..hub.access import looks_local
from ..hub.models import pull_model
from ..json_files import read_json
from ..model.configuration_vision_qwen import VisionQwenConfig
from ..model.modeling_vision_qwen import VisionQwen
from .lora import PROJECTOR, add_turn_rows

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json")
# Saved together by the processor; an adapter alone, without any of them, loads.
_PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")


def save_composite_config(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """Writes the model's `config.json` into an adapter folder; local bases are kept as absolute paths."""
    config: Any = (model.get_base_model() if isinstance(model, PeftModel) else model).config
    for field in ("vision_name_or_path", "text_name_or_path"):
        name = getattr(config, field, None)
        if name is not None and Path(name).exists():
            setattr(config, field, str(Path(name).resolve()))
    config.save_pretrained(folder)


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a local folder holds an adapter rather than a full save."""
    return (Path(folder) / "adapter_config.json").is_file()


def load_adapter(
    name_or_path: str | Path,
    *,
    merge: bool = False,
    vision: str | Path | None = None,
    text: str | Path | None = None,
    revision: str | None = None,
    is_trainable: bool = False,
    dtype: torch.dtype = torch.float32,
    **arguments,
) -> VisionQwen | PeftModel:
    """Reassembles encoder, decoder, projector and LoRA from an adapter folder.

    Args:
        name_or_path (`str` or `Path`): Adapter folder, or the id of a Hub repository that holds one.
        merge (`bool`, *optional*, defaults to `False`): Adds LoRA to the decoder's weights and returns a plain
            [`VisionQwen`]; otherwise a `PeftModel` around it, whose adapter can be disabled.
        vision, text (`str` or `Path`, *optional*): Where the bases lie when they moved.
        revision (`str`, *optional*): Of the adapter's Hub repository.
        is_trainable (`bool`, *optional*, defaults to `False`): Loads LoRA and projector ready to train on.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Dtype of the bases.
        **arguments: Passed on to [`VisionQwen.from_vision_text_pretrained`] (`device_map`, `quantization_config`, ...).

    Returns:
        `PeftModel` or [`VisionQwen`] in evaluation mode.

    Raises:
        FileNotFoundError: When a file of the adapter, or a base's folder, is missing; names it.
        ValueError: When the folder is no adapter of a VisionQwen, a file is damaged, its tensors are not those that
            its configuration asks for or not finite, the bases are not those it was trained on, or it should be merged
            into quantized weights.
    """
    if merge and arguments.get("quantization_config") is not None:
        raise ValueError(
            "merge=True with a quantization_config would round the adapter away with the weights: merge into the full "
            "weights (without quantization_config) and quantize the saved result, or keep merge=False."
        )
    folder = Path(name_or_path)
    if not folder.exists():
        if looks_local(str(name_or_path)):
            raise FileNotFoundError(f"The adapter folder {name_or_path} is not there.")
        folder = pull_model(str(name_or_path), revision=revision)
    check_adapter_files(folder)
    with reading(folder / "config.json"):
        config = VisionQwenConfig.from_pretrained(folder)
    if text is None and config.text_name_or_path is None:
        raise ValueError(
            f"The adapter {folder} was trained on a decoder that was drawn at random, not loaded: save that decoder "
            "and say where it lies with text=."
        )
    bases = {"vision": str(vision or config.vision_name_or_path), "text": str(text or config.text_name_or_path)}
    for part, base in bases.items():
        if looks_local(base) and not Path(base).exists():
            raise FileNotFoundError(
                f"The adapter {folder} was trained on the {part} base {base}, which is not there: say where it lies "
                f"with {part}=."
            )
    model = VisionQwen.from_vision_text_pretrained(
        bases["vision"],
        bases["text"],
        vision_revision=config.vision_revision,
        text_revision=config.text_revision,
        dtype=dtype,
        **config.joint_fields,
        **arguments,
    )
    add_turn_rows(model)
    check_bases(config, model.config, f"The adapter {folder}")
    with reading(folder / "adapter_config.json and adapter_model.safetensors"), warnings.catch_warnings():
        # What it warns of is refused below, by name.
        warnings.filterwarnings("ignore", message="Found missing adapter keys|Some weights of PeftModel")
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, ignore_mismatched_sizes=True)
    _check_tensors(adapted, folder)
    if merge:
        return adapted.merge_and_unload().eval()
    if is_trainable:
        return adapted
    for layer in _row_layers(adapted):
        layer.merge()
    return adapted.eval()


def _row_layers(model: nn.Module) -> list[TrainableTokensLayer]:
    """What puts trained rows into embedding and head, where they are not in there yet."""
    return [module for module in model.modules() if isinstance(module, TrainableTokensLayer) and not module.merged]


@contextmanager
def rows_in_place(model: nn.Module) -> Iterator[None]:
    """Runs the block with the trained rows in embedding and head: to generate a token would copy both of them.

    Args:
        model (`PeftModel` or what it is in): Not under `torch.inference_mode`, whose tensors cannot train.
    """
    layers = _row_layers(model)
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def weights_digest(folder: str | Path) -> str:
    """Hash of an adapter's or a full save's weights, the same wherever the files lie: 32 hexadecimal digits."""
    pattern = "adapter_model.safetensors" if is_adapter_folder(folder) else "model*.safetensors"
    digest = xxhash.xxh3_128()
    for path in sorted(Path(folder).glob(pattern)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, xxhash.xxh3_128).digest())
    return digest.hexdigest()


def holds_encoder(folder: str | Path) -> bool:
    """Whether an adapter changes the encoder, by LoRA or whole layers, so that the base's features are not its own."""
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        return any(".vision_tower." in name for name in file.keys())


def check_adapter_files(folder: Path) -> None:
    """Looks through an adapter folder before anything is loaded with it.

    Raises:
        FileNotFoundError: When a file is missing.
        ValueError: When it is no adapter of a VisionQwen, or a file is damaged.
    """
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    unfit = [name for name in _PROCESSOR_FILES if not (folder / name).is_file()]
    if len(unfit) < len(_PROCESSOR_FILES):
        missing += unfit
    if missing == ["adapter_model.safetensors"] and (folder / "adapter_model.bin").is_file():
        raise FileNotFoundError(
            f"{folder} holds its weights as adapter_model.bin, a pickle, which could run any program and is never "
            "loaded: ask for adapter_model.safetensors."
        )
    if missing:
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"{folder} is no adapter folder: {', '.join(missing)} missing; it holds {', '.join(found) or 'nothing'}."
        )
    configs = {name: read_json(folder / name) for name in ("adapter_config.json", "config.json")}
    model_type = configs["config.json"].get("model_type")
    if model_type != VisionQwenConfig.model_type:
        raise ValueError(f"{folder} is an adapter of a {model_type!r} model, expected {VisionQwenConfig.model_type!r}.")
    kind = configs["adapter_config.json"].get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder / 'adapter_config.json'}: peft_type is {kind!r}, expected 'LORA'.")
    if configs["adapter_config.json"].get("alora_invocation_tokens") is not None:
        raise ValueError(
            f"{folder / 'adapter_config.json'}: alora_invocation_tokens asks for a LoRA that begins in the middle of a "
            "prompt, expected one that is on throughout."
        )
    weights = folder / "adapter_model.safetensors"
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged ({error}): copy or download it again.") from error
    names = list(state)
    # peft only warns, and would leave a projector at its random start.
    if not any(f".{PROJECTOR}." in name for name in names):
        raise ValueError(
            f"{weights} holds no projector among its {len(names)} tensors: it was saved by another program."
        )
    if others := [f"{name} ({value.dtype})" for name, value in state.items() if not value.is_floating_point()]:
        raise ValueError(f"{weights} is damaged: expected weights in floating point, got {others[0]}.")
    check_finite(state.items(), str(weights))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes whatever a library says about the content of a file one line that names the file.

    Args:
        path (`Path`): What the block reads.

    Raises:
        ValueError: For any error but those of the file system and of libraries that are not installed.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        said = said if len(said) <= 300 else f"{said[:300]}..."
        raise ValueError(
            f"{path} cannot be used, damaged or of another program ({type(error).__name__}: {said}): copy or download "
            "it again."
        ) from error


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Refuses weights that are no numbers.

    Args:
        tensors (`Iterable[tuple[str, torch.Tensor]]`): Names and weights.
        where (`str`): Put before the message.

    Raises:
        ValueError: For NaN or infinity; names the first tensor and counts the others.
    """
    broken = [
        (name, value) for name, value in tensors if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if broken:
        name, value = broken[0]
        others = f", and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise ValueError(
            f"{where}: {int((~value.isfinite()).sum()):,} of {value.numel():,} weights of {name} are NaN or infinite"
            f"{others}: take an earlier checkpoint, or train again with a lower learning rate."
        )


def _check_tensors(model: PeftModel, folder: Path) -> None:
    """Compares names and shapes in the file with those that the configuration asks for: peft loads what fits."""
    weights = folder / "adapter_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    asked = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(value.shape) for name, value in asked.items()}
    for names, said in (
        (expected.keys() - found.keys(), "are missing"),
        (found.keys() - expected.keys(), "belong to no layer that adapter_config.json names"),
    ):
        if names:
            raise ValueError(
                f"{weights} does not fit adapter_config.json and the bases: {len(names)} tensors {said}, {min(names)} "
                f"the first; expected {len(expected)}, got {len(found)}."
            )
    wrong = sorted(name for name, shape in expected.items() if found[name] != shape)
    if wrong:
        raise ValueError(
            f"{weights} does not fit adapter_config.json and the bases: {wrong[0]} has the shape "
            f"{found[wrong[0]]}, expected {expected[wrong[0]]} ({len(wrong)} of {len(expected)} tensors differ)."
        )


def check_bases(saved: VisionQwenConfig, loaded: VisionQwenConfig, name: str) -> None:
    """Compares the bases that a model was trained on with others.

    A part without a fingerprint, such as a decoder from scratch, is compared by its shapes.

    Args:
        saved, loaded ([`VisionQwenConfig`]): What it was trained on, and what there is.
        name (`str`): Of the model, put before the message.

    Raises:
        ValueError: When they differ; names the part and both.
    """
    for part in ("vision", "text"):
        old, new = getattr(saved, f"{part}_config"), getattr(loaded, f"{part}_config")
        fields = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "image_size", "patch_size")
        differing = [
            f"{field}: {getattr(old, field, None)} against {getattr(new, field, None)}"
            for field in fields
            if getattr(old, field, None) != getattr(new, field, None)
        ]
        expected, found = getattr(saved, f"{part}_fingerprint"), getattr(loaded, f"{part}_fingerprint")
        if not differing and (None in (expected, found) or expected == found):
            continue
        raise ValueError(
            f"{name} was trained on another {part} base: expected {_base_name(saved, part)}, got "
            f"{_base_name(loaded, part)} ("
            f"{'; '.join(differing) or 'the same shape with other weights'})."
        )


def _base_name(config: VisionQwenConfig, part: str) -> str:
    name, revision = getattr(config, f"{part}_name_or_path"), getattr(config, f"{part}_revision")
    return f"{name} at revision {revision}" if revision else str(name)
