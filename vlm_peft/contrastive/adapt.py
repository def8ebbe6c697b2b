"""What of a CLIP trains: each tower by LoRA, in its last layers, in full, or not at all.

Stage: loaded model -> the same model with LoRA in it and the right `requires_grad`.
"""

import re
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

TUNINGS = ("locked", "lora", "last_layers", "full")
"""Ways in which a tower trains."""

_PROJECTIONS = {"vision": "visual_projection", "text": "text_projection"}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Tuning:
    """What trains.

    Args:
        vision, text (`str`): One of [`TUNINGS`] each.
        last_layers (`int`): Of `"last_layers"`: so many, with what comes after them and the projection.
        temperature (`bool`): `logit_scale`, and SigLIP's `logit_bias`.
        r, alpha, dropout: Of LoRA.
    """

    vision: str = "lora"
    text: str = "lora"
    last_layers: int = 1
    temperature: bool = True
    r: int = 8
    alpha: int = 16
    dropout: float = 0.0


def adapt(clip: Any, tuning: Tuning) -> Any:
    """Prepares a model for training.

    LoRA is put on the linear layers of a tower's encoder and on its projection; not on SigLIP's attention pooling,
    whose weights PyTorch reads past any adapter.

    Args:
        clip (`PreTrainedModel`): In float32; changed in place.
        tuning ([`Tuning`]): What is asked for.

    Returns:
        `PeftModel` around it where a tower has LoRA, and the model itself otherwise.

    Raises:
        ValueError: When nothing trains, or a tower has fewer layers than should.
    """
    towers = {"vision": tuning.vision, "text": tuning.text}
    if set(towers.values()) == {"locked"}:
        raise ValueError("Both towers are locked, and nothing would train: expected --vision_tuning or --text_tuning.")
    clip.requires_grad_(False)
    with_lora = [tower for tower, way in towers.items() if way == "lora"]
    if with_lora:
        config = LoraConfig(
            r=tuning.r,
            lora_alpha=tuning.alpha,
            lora_dropout=tuning.dropout,
            target_modules="|".join(_lora_targets(clip, tower) for tower in with_lora),
        )
        clip = get_peft_model(clip, config)
    for name, parameter in clip.named_parameters():
        name = name.removeprefix("base_model.model.")
        for tower, way in towers.items():
            if way in ("last_layers", "full") and name.startswith((f"{tower}_model.", f"{_PROJECTIONS[tower]}.")):
                depth = getattr(clip.config, f"{tower}_config").num_hidden_layers
                if way == "full" or _is_late(name, depth, tuning.last_layers):
                    parameter.requires_grad = True
        if name in ("logit_scale", "logit_bias"):
            parameter.requires_grad = tuning.temperature
    return clip


def _lora_targets(clip: nn.Module, tower: str) -> str:
    """A regular expression over the linear layers of a tower's encoder, and its projection."""
    layers = [name for name, module in clip.named_modules() if isinstance(module, nn.Linear)]
    inside = {name.rpartition(".")[2] for name in layers if name.startswith(f"{tower}_model.encoder.layers.")}
    projection = _PROJECTIONS[tower]
    ends = f"|{projection}" if projection in layers else ""
    return rf"{tower}_model\.encoder\.layers\.\d+\..*\.({'|'.join(sorted(inside))}){ends}"


def _is_late(name: str, depth: int, last: int) -> bool:
    """Whether a parameter of a tower is in its last layers, or behind them."""
    if last > depth:
        raise ValueError(f"Expected at most {depth} last layers, which is all that the tower has, got {last}.")
    layer = _LAYER.search(name)
    if layer:
        return int(layer[1]) >= depth - last
    return "embeddings" not in name and "pre_layrnorm" not in name


def trained_parameters(clip: Any) -> dict[str, nn.Parameter]:
    """What trains beside LoRA: name in the plain model -> parameter."""
    return {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in clip.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }


def tuning_table(clip: Any) -> list[tuple[str, int, int]]:
    """Name, parameters and trained ones of both towers, their projections and the temperature."""
    counts: dict[str, list[int]] = {"vision tower": [0, 0], "text tower": [0, 0], "temperature": [0, 0]}
    for name, parameter in clip.named_parameters():
        name = name.removeprefix("base_model.model.")
        part = "vision tower" if name.startswith(("vision", "visual")) else "text tower"
        row = counts["temperature" if name.startswith("logit_") else part]
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    return [(part, total, trained) for part, (total, trained) in counts.items()]


def is_lora(clip: Any) -> bool:
    """Whether a model has LoRA in it."""
    return isinstance(clip, PeftModel)
