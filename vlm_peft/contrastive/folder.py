"""A CLIP's folders: a plain checkpoint, or an adapter folder, which says by itself on what it was trained.

Stage: name -> [`DualEncoder`], and back. An adapter folder holds what trained in one `adapter_model.safetensors` (LoRA
under peft's names, whole weights under the model's with the same prefix), `adapter_config.json`, `config.json` with the
base's name, revision and fingerprint, tokenizer and image processor.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import find_adapter_config_file

from ..adapters.folder import check_finite, is_adapter_folder, reading
from ..drafts import draft_of, sweep
from ..hub.access import looks_local
from ..hub.models import pull_model
from ..hub.weights import safetensors_revision
from ..json_files import read_json
from ..model.joining import fingerprint
from .adapt import is_lora, trained_parameters
from .encoder import MODEL_TYPES, DualEncoder

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_FILES = ("adapter_config.json", _WEIGHTS, "config.json")


def load_clip(
    name: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    merge: bool = True,
    device: torch.device | str = "cpu",
) -> DualEncoder:
    """Loads a CLIP or SigLIP in float32, whatever it is stored in: float16 weights would train into NaN.

    Args:
        name (`str` or `Path`): Folder or Hub id of a `CLIPModel`, `SiglipModel`, `Siglip2Model`, or of an adapter.
        revision (`str`, *optional*): Of a Hub id.
        base (`str` or `Path`, *optional*): Where an adapter's base lies when it moved.
        merge (`bool`, *optional*, defaults to `True`): Adds LoRA to the weights; otherwise a `PeftModel` is kept.
        device (*optional*, defaults to `"cpu"`): Where the model goes.

    Returns:
        [`DualEncoder`], frozen and in evaluation mode.

    Raises:
        FileNotFoundError: When the folder, a file of it, or an adapter's base is not there.
        ValueError: When it is no model with both towers, a file is damaged, or the base is another one.
    """
    folder = Path(name).expanduser()
    if not folder.exists() and looks_local(str(name)):
        raise FileNotFoundError(f"The model {name} is not there: expected the folder of a CLIP, or an id on the Hub.")
    if not folder.exists() and is_adapter(name, revision):
        folder = pull_model(str(name), revision=revision)
    if not is_adapter_folder(folder):
        clip, processor = _load_plain(str(folder if folder.exists() else name), revision)
    else:
        clip, processor = _load_adapter(folder, base)
        if merge and is_lora(clip):
            clip = clip.merge_and_unload()
    return DualEncoder(clip.eval().requires_grad_(False).to(device), processor)


def is_adapter(name: str | Path, revision: str | None = None) -> bool:
    """Whether a folder, or what the Hub has under an id, is an adapter and no plain checkpoint.

    Args:
        name (`str` or `Path`): Folder or Hub id.
        revision (`str`, *optional*): Of a Hub id.
    """
    folder = Path(name).expanduser()
    if folder.exists() or looks_local(str(name)):
        return is_adapter_folder(folder)
    return find_adapter_config_file(str(name), revision=revision) is not None


def _load_plain(name: str, revision: str | None) -> tuple[Any, Any]:
    revision = safetensors_revision(name, revision)
    config = AutoConfig.from_pretrained(name, revision=revision)
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"{name} is a {config.model_type!r} model: expected a CLIP or SigLIP with both towers, such as "
            "openai/clip-vit-base-patch32."
        )
    clip, info = AutoModel.from_pretrained(
        name, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        # transformers fills them with random numbers.
        raise ValueError(f"{name} is no whole {config.model_type}: it lacks {min(info['missing_keys'])}.")
    check_finite(clip.named_parameters(), name)
    clip.config.base_name_or_path = str(Path(name).resolve()) if Path(name).exists() else name
    clip.config.base_revision = revision
    clip.config.base_fingerprint = fingerprint(clip)
    return clip, AutoProcessor.from_pretrained(name, revision=revision)


def _load_adapter(folder: Path, base: str | Path | None) -> tuple[Any, Any]:
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is no complete adapter folder: {', '.join(missing)} missing.")
    stored, adapter = (read_json(folder / name) for name in ("config.json", "adapter_config.json"))
    if stored.get("model_type") not in MODEL_TYPES or "base_fingerprint" not in stored:
        raise ValueError(
            f"{folder} is an adapter of a {stored.get('model_type')!r} model: expected one of a CLIP or SigLIP."
        )
    where = str(base or stored["base_name_or_path"])
    if looks_local(where) and not Path(where).exists():
        raise FileNotFoundError(
            f"The adapter {folder} was trained on {where}, which is not there: say where it lies (base=, --vision on "
            "the command line)."
        )
    clip, _ = _load_plain(where, None if base else stored["base_revision"])
    if clip.config.base_fingerprint != stored["base_fingerprint"]:
        raise ValueError(f"The adapter {folder} was trained on another base: {where} has other weights than then.")
    if adapter.get("peft_type") == "LORA":
        with reading(folder / "adapter_config.json"):
            clip = PeftModel(clip, LoraConfig(**{**adapter, "inference_mode": False}))
    load_trained(clip, folder)
    return clip, AutoProcessor.from_pretrained(folder)


def load_trained(clip: Any, folder: str | Path) -> None:
    """Puts the weights of an adapter folder into a model that has its LoRA layers.

    Raises:
        ValueError: When the file is damaged, or its tensors are not the model's.
    """
    path = Path(folder) / _WEIGHTS
    with reading(path):
        state = load_file(path)
    check_finite(state.items(), str(path))
    own = dict(clip.get_base_model().named_parameters() if is_lora(clip) else clip.named_parameters())
    whole = {name: value for name, value in state.items() if name.removeprefix(_PREFIX) in own}
    lora = {name: value for name, value in state.items() if name not in whole}
    expected = get_peft_model_state_dict(clip) if is_lora(clip) else {}
    shapes = {name: value.shape for name, value in (expected | {f"{_PREFIX}{n}": v for n, v in own.items()}).items()}
    wrong = sorted(lora.keys() ^ expected.keys())
    wrong += [name for name, value in state.items() if name in shapes and value.shape != shapes[name]]
    if wrong:
        raise ValueError(f"{path} does not fit adapter_config.json and the base: {wrong[0]} ({len(wrong)} tensors).")
    if lora:
        set_peft_model_state_dict(clip, lora)
    with torch.no_grad():
        for name, value in whole.items():
            own[name.removeprefix(_PREFIX)].copy_(value)


def save_clip(encoder: DualEncoder, folder: str | Path) -> None:
    """Writes an adapter folder with everything that trains.

    Args:
        encoder ([`DualEncoder`]): Of [`~vlm_peft.contrastive.adapt.adapt`].
        folder (`str` or `Path`): Is made.
    """
    clip, folder = encoder.clip, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(clip) if is_lora(clip) else {}
    state |= {f"{_PREFIX}{name}": value for name, value in trained_parameters(clip).items()}
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    config = clip.config
    config.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    if is_lora(clip):
        lora = clip.peft_config["default"]
        lora.base_model_name_or_path, lora.inference_mode = config.base_name_or_path, True
        lora.save_pretrained(folder)
        return
    adapter = {"peft_type": None, "base_model_name_or_path": config.base_name_or_path}
    (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")


def save_merged(folder: str | Path, output: str | Path, *, base: str | Path | None = None) -> Path:
    """Writes an adapter folder as a plain checkpoint, which stock transformers loads.

    Args:
        folder (`str` or `Path`): An adapter folder, or the Hub id of one.
        output (`str` or `Path`): Folder to write; what is in it is replaced.
        base (`str` or `Path`, *optional*): Where the adapter's base lies when it moved.

    Returns:
        `Path`: `output`.

    Raises:
        FileNotFoundError, ValueError: See [`load_clip`].
    """
    encoder, output = load_clip(folder, base=base), Path(output)
    for name in ("base_name_or_path", "base_revision", "base_fingerprint"):
        delattr(encoder.config, name)
    sweep(output.parent, output.name)
    draft = draft_of(output)
    encoder.clip.save_pretrained(draft)
    encoder.processor.save_pretrained(draft)
    # transformers before 5 looks for it under this name only.
    encoder.processor.image_processor.save_pretrained(draft)
    shutil.rmtree(output, ignore_errors=True)
    draft.replace(output)
    return output


def interpolate(old: DualEncoder, new: DualEncoder, share: float) -> DualEncoder:
    """WiSE-FT (arXiv 2109.01903): weights between two encoders of one shape.

    Args:
        old, new ([`DualEncoder`]): Merged; `new` is changed in place.
        share (`float`): 0 is `old`, 1 is `new`.

    Returns:
        [`DualEncoder`]: `new`.

    Raises:
        ValueError: When their weights have other names or shapes.
    """
    before, after = old.clip.state_dict(), new.clip.state_dict()
    if {name: value.shape for name, value in before.items()} != {name: value.shape for name, value in after.items()}:
        raise ValueError("Weights can be interpolated between two encoders of one shape only.")
    new.clip.load_state_dict(
        {
            name: torch.lerp(before[name].float(), value.float(), share) if value.is_floating_point() else value
            for name, value in after.items()
        }
    )
    return new
