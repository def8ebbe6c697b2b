"""Loading: what a user names (an adapter folder, a full save, or a Hub id of either) -> model, processor and settings.

Stage: before everything that uses a trained model: the command line, the web page, evaluation.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image as PILImage
from safetensors import SafetensorError

from ..hub.access import looks_local
from ..hub.models import HubError, pull_model
from ..json_files import read_json
from ..model.configuration_vision_qwen import VisionQwenConfig
from ..model.modeling_vision_qwen import VisionQwen
from ..model.processing_vision_qwen import VisionQwenProcessor
from ..tasks.example import picture_turn
from .folder import check_adapter_files, check_finite, is_adapter_folder, load_adapter, reading

_LONGEST_FRAME = 1_000_000  # characters


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
        ValueError: When the folder holds neither, a file of it is damaged or asks for what the model cannot do, or the
            bases are not those that the adapter was trained on.
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
        with reading(folder / "processor_config.json, tokenizer.json or chat_template.jinja"):
            processor = VisionQwenProcessor.from_pretrained(folder)
        _check_processor(processor, model, folder)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"A file of {folder} is damaged ({error}): copy or download it again.") from error
    return model.eval().requires_grad_(False).to(device), processor


def _check_processor(processor: VisionQwenProcessor, model: Any, folder: Path) -> None:
    """Asks about one picture: the template is a program of others, and the numbers beside it are theirs, too."""
    config = model.config
    with reading(folder / "chat_template.jinja"):
        said = processor.apply_chat_template(picture_turn("Describe."), tokenize=False, add_generation_prompt=True)
        if len(said) > _LONGEST_FRAME:
            raise ValueError(f"it makes {len(said):,} characters of a question, more than {_LONGEST_FRAME:,}")
        ids = processor.encode_prompt(picture_turn("Describe."))
    with reading(folder / "processor_config.json"):
        # Its values are used with the first picture and the first answer only.
        processor.image_processor([PILImage.new("RGB", (8, 8))], return_tensors="pt")
        end_of_turn = processor.end_of_turn_token_id
    if not isinstance(end_of_turn, int):
        raise ValueError(f"{folder / 'processor_config.json'}: end_of_turn_token is no token of the decoder.")
    counts = {
        "num_image_tokens": (processor.num_image_tokens, config.num_image_tokens),
        "the id of the image token": (processor.image_token_id, config.image_token_id),
        "image tokens of a question about one picture": (ids.count(config.image_token_id), config.num_image_tokens),
    }
    for name, (found, expected) in counts.items():
        if found != expected:
            raise ValueError(
                f"The processor of {folder} does not fit its model: {name} is {found}, expected {expected}: "
                "processor_config.json, tokenizer.json or chat_template.jinja is of another model."
            )


def read_config(folder: Path) -> VisionQwenConfig:
    """The composite configuration of an adapter folder or a full save; no weights are loaded.

    Raises:
        FileNotFoundError: When a file of the adapter is missing.
        ValueError: When the folder holds neither, or a file of it is damaged.
    """
    if is_adapter_folder(folder):
        check_adapter_files(folder)
    else:
        _check_full_save(folder)
    with reading(folder / "config.json"):
        return VisionQwenConfig.from_pretrained(folder)


def _check_full_save(folder: Path) -> None:
    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else None
    if kind != VisionQwenConfig.model_type:
        held = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(held[:10] + ["..."] * (len(held) > 10)) or "nothing"
        raise ValueError(
            f"{folder} holds no trained model: expected adapter_config.json of an adapter, or config.json of a "
            f"{VisionQwenConfig.model_type} model; it holds {shown}."
        )


def _load_full_save(folder: Path, dtype: torch.dtype) -> VisionQwen:
    _check_full_save(folder)
    with reading(folder):
        model, report = VisionQwen.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"{folder} is no whole save: {len(report['missing_keys'])} weights are missing, "
            f"{min(report['missing_keys'])} the first."
        )
    check_finite(model.named_parameters(), str(folder))
    return model


def load_trained(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantization_config=None,
    merge: bool = False,
    **bases: Any,
) -> Any:
    """What a run has saved, as it was trained.

    Args:
        folder (`str` or `Path`): Adapter folder, or full save.
        dtype (`torch.dtype`): Of the weights.
        attn_implementation (`str`, *optional*): Of the decoder.
        quantization_config (`BitsAndBytesConfig`, *optional*): Of an adapter's decoder.
        merge (`bool`, *optional*, defaults to `False`): Adds an adapter to the weights.
        **bases (`str`): `vision` and `text`, where an adapter's bases lie when they moved.

    Returns:
        `PeftModel` around a [`VisionQwen`], or [`VisionQwen`].
    """
    if is_adapter_folder(folder):
        return load_adapter(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            merge=merge,
            **bases,
        )
    model = _load_full_save(Path(folder), dtype)
    if attn_implementation is not None:
        model.set_attn_implementation({"text_config": attn_implementation})
    return model.eval()


def default_device() -> torch.device:
    """The accelerator that PyTorch finds, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
