"""PiSSA adapters, saved as LoRA of twice the rank on the unmodified base.

Stage: beside the saving and loading of adapter folders.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file

from ..json_files import read_json

_LORA_MATRIX = re.compile(r"\.lora_[AB]\.")


def is_pissa(init_lora_weights: Any) -> bool:
    """Whether LoRA starts from principal singular vectors (PiSSA, arXiv 2404.02948), which it takes out of the base."""
    return str(init_lora_weights).startswith("pissa")


def lora_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of the LoRA matrices under the names that they have in an adapter file."""
    state = get_peft_model_state_dict(model)
    return {name: value.detach().cpu().clone() for name, value in state.items() if _LORA_MATRIX.search(name)}


def save_pissa_as_lora(folder: str | Path, start: dict[str, torch.Tensor]) -> None:
    """Rewrites a saved PiSSA adapter as LoRA of twice the rank on the unchanged base.

    What was learnt is BA - B_0 A_0 = [B, -B_0] [A; A_0], where B_0 A_0 was taken out of the base. The same as peft's
    `path_initial_model_for_weight_conversion`, which loses `modules_to_save`.

    Args:
        folder (`str` or `Path`): What `PeftModel.save_pretrained` wrote.
        start (`dict[str, torch.Tensor]`): [`lora_state`] before training.
    """
    folder = Path(folder)
    state = load_file(folder / "adapter_model.safetensors")
    for name, value in start.items():
        is_a = ".lora_A." in name
        state[name] = torch.cat([state[name], value if is_a else -value], dim=0 if is_a else 1).contiguous()
    config = read_json(folder / "adapter_config.json")
    # The scale alpha / r, or alpha / sqrt(r), stays what it was.
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2
    config["r"] *= 2
    config["init_lora_weights"] = True
    save_file(state, folder / "adapter_model.safetensors.tmp", metadata={"format": "pt"})
    (folder / "adapter_config.json.tmp").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / f"{name}.tmp").rename(folder / name)


def load_pissa_from_lora(
    model: PeftModel, folder: str | Path, start: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Goes on with PiSSA from a folder of [`save_pissa_as_lora`].

    Args:
        model (`PeftModel`): With PiSSA as it starts.
        folder (`str` or `Path`): The saved adapter.
        start (`dict[str, torch.Tensor]`): Where LoRA of this model starts from.

    Returns:
        `dict[str, torch.Tensor]`: Where the saved run started from; another machine, and the randomized
        decomposition, find other singular vectors, and the base is then left without those of the saved run.
    """
    state = load_file(Path(folder) / "adapter_model.safetensors")
    saved_start = {}
    for name in start:
        is_a = ".lora_A." in name
        state[name], half = (part.contiguous() for part in state[name].chunk(2, dim=0 if is_a else 1))
        saved_start[name] = half if is_a else -half
    if not all(torch.equal(value, saved_start[name]) for name, value in start.items()):
        for sign, values in ((1, start), (-1, saved_start)):
            set_peft_model_state_dict(model, {**state, **values})
            for layer in model.modules():
                if isinstance(layer, Linear):
                    base: Any = layer.get_base_layer()
                    base.weight.data += sign * layer.get_delta_weight(model.active_adapter)
    set_peft_model_state_dict(model, state)
    return saved_start
