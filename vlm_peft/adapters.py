"""Adapters: what trains, and the one small folder that holds it.

Stage: model -> `PeftModel` for the trainer; folder <-> model. An adapter folder holds LoRA and the full projector in
one `adapter_model.safetensors`, `adapter_config.json`, the composite `config.json` with both bases, and the processor.
It holds no base weights and nothing that would have to be unpickled.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from .configuration_vision_qwen import VisionQwenConfig
from .modeling_vision_qwen import VisionQwen

PROJECTOR = "multi_modal_projector"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json")


def lora_config(model: VisionQwen, *, target_modules: str | list[str] | None = None, **arguments) -> LoraConfig:
    """LoRA on the decoder's linear layers, and the projector trained in full.

    Args:
        model ([`VisionQwen`]): What will be adapted.
        target_modules (`str` or `list[str]`, *optional*): Names of the decoder's layers (`["q_proj", "v_proj"]`), or a
            regular expression over full names. All linear layers of the decoder by default and for `"all-linear"`;
            plain names would also hit the encoder, so they are anchored to the decoder here.
        **arguments: Further fields of `peft.LoraConfig` (`r`, `lora_alpha`, `use_dora`, ...).

    Returns:
        `peft.LoraConfig`: With the projector in `modules_to_save`.

    Raises:
        ValueError: When the targets include the head, or hit no layer of the decoder.
    """
    if target_modules in (None, "all-linear", ["all-linear"]):
        names = {
            name.rpartition(".")[2] for name, module in model.model.language_model.named_modules() if _is_linear(module)
        }
        target_modules = sorted(names)
    if isinstance(target_modules, list):
        if "lm_head" in target_modules:
            raise ValueError("LoRA on lm_head is not supported: the loss reads the head's weight directly.")
        target_modules = rf"model\.language_model\..*\.({'|'.join(map(re.escape, target_modules))})"
    hit = [name for name, _ in model.named_modules() if re.fullmatch(target_modules, name)]
    if not hit:
        raise ValueError(f"target_modules hit no layer of the model: {target_modules}.")
    modules_to_save = list(dict.fromkeys([PROJECTOR, *(arguments.pop("modules_to_save", None) or [])]))
    return LoraConfig(
        task_type="CAUSAL_LM", target_modules=target_modules, modules_to_save=modules_to_save, **arguments
    )


def _is_linear(module: nn.Module) -> bool:
    """Linear layers, quantized ones included, and GPT-2's transposed ones."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@dataclass(frozen=True)
class TrainableRow:
    """One line of the start-up table.

    Args:
        module (`str`): `vision_tower`, `multi_modal_projector`, `language_model` or `lm_head`.
        parameters (`int`): Weights in the module, adapters included; a copy that peft trains counts once.
        trainable (`int`): Of these, trained.
        dtypes (`str`): Storage dtypes of its weights.
    """

    module: str
    parameters: int
    trainable: int
    dtypes: str


def trainable_table(model: nn.Module) -> list[TrainableRow]:
    """What trains, module by module; a head tied to the embedding is counted there, once."""
    counts: dict[str, list] = {name: [0, 0, set()] for name in ("vision_tower", PROJECTOR, "language_model", "lm_head")}
    for name, parameter in model.named_parameters():
        if "original_module" in name:
            continue
        module = next((part for part in counts if f".{part}." in f".{name}."), None)
        if module is None:
            raise ValueError(f"The parameter {name} belongs to none of {', '.join(counts)}.")
        size = getattr(parameter, "quant_state", None)
        numel = size.shape.numel() if size is not None else parameter.numel()
        counts[module][0] += numel
        counts[module][1] += numel if parameter.requires_grad else 0
        counts[module][2].add(str(parameter.dtype).removeprefix("torch."))
    return [
        TrainableRow(module, parameters, trainable, ", ".join(sorted(dtypes)))
        for module, (parameters, trainable, dtypes) in counts.items()
        if parameters
    ]


def format_trainable_table(rows: list[TrainableRow]) -> str:
    """The table as aligned text with a total line."""
    total = sum(row.parameters for row in rows)
    trained = sum(row.trainable for row in rows)
    lines = [f"{'module':<24}{'parameters':>15}{'trainable':>15}  dtype"]
    lines += [f"{row.module:<24}{row.parameters:>15,}{row.trainable:>15,}  {row.dtypes}" for row in rows]
    lines.append(f"{'total':<24}{total:>15,}{trained:>15,}  {100 * trained / total:.2f} % trained")
    return "\n".join(lines)


def check_trainable(rows: list[TrainableRow], *, vision_tower_trains: bool = False) -> None:
    """Refuses to train what nobody asked for, or without the projector.

    Raises:
        ValueError: When the encoder has trainable parameters unasked, or the projector has none.
    """
    trained = {row.module: row.trainable for row in rows}
    if trained.get("vision_tower") and not vision_tower_trains:
        raise ValueError(
            f"The vision tower has {trained['vision_tower']:,} trainable parameters that nobody asked for: restrict "
            "target_modules to the decoder (a regular expression over full names), or freeze the tower."
        )
    if not trained.get(PROJECTOR):
        raise ValueError(
            "The projector has no trainable parameters: the decoder would train without ever seeing a picture. Put "
            f"{PROJECTOR!r} into modules_to_save."
        )


def save_composite_config(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """Writes the composite `config.json` into an adapter folder; local bases are kept as absolute paths."""
    config = (model.get_base_model() if isinstance(model, PeftModel) else model).config
    assert isinstance(config, VisionQwenConfig)
    for field in ("vision_name_or_path", "text_name_or_path"):
        name = getattr(config, field)
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
        ValueError: When the folder is no adapter of a VisionQwen, or the bases are not those it was trained on.
    """
    folder = Path(name_or_path)
    if not folder.exists():
        if _looks_local(str(name_or_path)):
            raise FileNotFoundError(f"The adapter folder {name_or_path} is not there.")
        folder = Path(snapshot_download(str(name_or_path), revision=revision))
    _check_adapter_files(folder)
    config = VisionQwenConfig.from_pretrained(folder)
    if text is None and config.text_name_or_path is None:
        raise ValueError(
            f"The adapter {folder} was trained on a decoder that was drawn at random, not loaded: save that decoder "
            "and say where it lies with text=."
        )
    bases = {"vision": str(vision or config.vision_name_or_path), "text": str(text or config.text_name_or_path)}
    for part, base in bases.items():
        if _looks_local(base) and not Path(base).exists():
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
    _check_bases(config, model.config, folder)
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    if merge:
        return adapted.merge_and_unload().eval()
    return adapted if is_trainable else adapted.eval()


def _looks_local(name: str) -> bool:
    """Whether a name cannot be a Hub id, which is `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _check_adapter_files(folder: Path) -> None:
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"{folder} is no adapter folder: {', '.join(missing)} missing; it holds {', '.join(found) or 'nothing'}."
        )
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != VisionQwenConfig.model_type:
        raise ValueError(f"{folder} is an adapter of a {model_type!r} model, expected {VisionQwenConfig.model_type!r}.")
    weights = folder / "adapter_model.safetensors"
    try:
        with safe_open(weights, framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged ({error}): copy or download it again.") from error
    # peft only warns, and would leave a projector at its random start.
    if not any(f".{PROJECTOR}." in name for name in names):
        raise ValueError(
            f"{weights} holds no projector among its {len(names)} tensors: it was saved by another program."
        )


def _check_bases(saved: VisionQwenConfig, loaded: VisionQwenConfig, folder: Path) -> None:
    """Compares the bases that an adapter was trained on with those that were loaded.

    Quantized weights have no fingerprint: of these, only the shapes are compared.
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
            f"The adapter {folder} was trained on another {part} base: expected "
            f"{getattr(saved, f'{part}_name_or_path')}, got {getattr(loaded, f'{part}_name_or_path')} ("
            f"{'; '.join(differing) or 'the same shape with other weights'})."
        )
