"""Loading: what a user names (an adapter folder, a full save, or a Hub id of either) -> model, processor and settings.

Stage: before everything that uses a trained model: the command line, the web page, evaluation.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from .adapters import is_adapter_folder, load_adapter
from .configuration_vision_qwen import VisionQwenConfig
from .hub.access import looks_local
from .hub.models import HubError, pull_model
from .modeling_vision_qwen import VisionQwen
from .processing_vision_qwen import VisionQwenProcessor


def find_model(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: itself, or what the Hub has under that id.

    Args:
        name (`str` or `Path`): Folder or Hub id.
        revision (`str`, *optional*): Commit or branch, for a Hub id.

    Raises:
        FileNotFoundError: When it is neither.
    """
    folder, name = Path(name).expanduser(), str(name)
    if folder.is_dir():
        return folder
    if looks_local(name) or folder.exists():
        raise FileNotFoundError(f"The model {name} is not there: expected a folder, or an id on the Hub.")
    try:
        return pull_model(name, revision=revision)
    except HubError as error:
        raise FileNotFoundError(f"The model {name} is no folder here, and the Hub does not give it: {error}") from error


def load_model(
    folder: Path,
    *,
    vision: str | None = None,
    text: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization_config=None,
) -> tuple[VisionQwen | PeftModel, VisionQwenProcessor]:
    """Model and processor of an adapter folder or a full save, ready to generate.

    Args:
        folder (`Path`): Of [`find_model`].
        vision, text (`str`, *optional*): Where an adapter's bases lie when they moved.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the weights.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where the model goes.
        quantization_config (`BitsAndBytesConfig`, *optional*): Of an adapter's decoder.

    Returns:
        `PeftModel` around a [`VisionQwen`] for an adapter, [`VisionQwen`] for a full save, frozen and in evaluation
        mode; and its [`VisionQwenProcessor`].

    Raises:
        FileNotFoundError: When a file of the adapter, or a base, is missing.
        ValueError: When the folder holds neither, or the bases are not those that the adapter was trained on.
    """
    try:
        if is_adapter_folder(folder):
            model: Any = load_adapter(
                folder, vision=vision, text=text, dtype=dtype, quantization_config=quantization_config
            )
        elif vision or text or quantization_config:
            raise ValueError(
                f"{folder} is a full save with its own bases: leave --vision, --text and --load_in_4bit out."
            )
        else:
            model = _load_full_save(folder, dtype)
        processor = VisionQwenProcessor.from_pretrained(folder)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"A file of {folder} is damaged ({error}): copy or download it again.") from error
    return model.eval().requires_grad_(False).to(device), processor


def _load_full_save(folder: Path, dtype: torch.dtype) -> VisionQwen:
    config = folder / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    if kind != VisionQwenConfig.model_type:
        held = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(held[:10] + ["..."] * (len(held) > 10)) or "nothing"
        raise ValueError(
            f"{folder} holds no trained model: expected adapter_config.json of an adapter, or config.json of a "
            f"{VisionQwenConfig.model_type} model; it holds {shown}."
        )
    return VisionQwen.from_pretrained(folder, dtype=dtype)


def default_device() -> torch.device:
    """The accelerator that PyTorch finds, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
