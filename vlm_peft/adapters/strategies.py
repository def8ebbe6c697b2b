"""Strategies: what trains of a model, and as what it is saved; one entry each in `STRATEGIES`.

Stage: options -> `Strategy`, before anything is loaded; joined model -> `LoraConfig` for peft, or a model that trains
itself. What trains beside LoRA lies in `modules_to_save`: the adapter's one file holds it, disabling the adapter gives
the base back, and merging puts it in place.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file
from torch import nn

from ..model.cuda.training import decoder_layers
from ..model.modeling_vision_qwen import VisionQwen, base_model
from .folder import load_adapter
from .lora import lora_config

LAST_LAYERS = 2
"""Of the decoder or the encoder, where a strategy trains the last ones and no number is given."""

_LORA_SIZES = ("r", "lora_alpha", "use_rslora", "use_dora")


@dataclass(frozen=True)
class Strategy:
    """What trains beside the projector, and as what it is saved.

    Args:
        lora (`str`, *optional*): Which of the decoder's linear layers get LoRA, of [`~vlm_peft.adapters.lora.LAYERS`].
        top_layers, vision_layers (`int`, *optional*, defaults to 0): How many of the last layers of decoder and
            encoder train in full.
        lora_vision (`bool`, *optional*, defaults to `False`): LoRA on the encoder, too.
        trains_decoder (`bool`, *optional*, defaults to `False`): All of it; saved is a whole model, no adapter.
        draws_decoder (`bool`, *optional*, defaults to `False`): At random, from its configuration.
    """

    lora: str | None = None
    top_layers: int = 0
    vision_layers: int = 0
    lora_vision: bool = False
    trains_decoder: bool = False
    draws_decoder: bool = False

    @property
    def encoder_trains(self) -> bool:
        """Whether the encoder's features change, so that none may be kept."""
        return self.lora_vision or self.vision_layers > 0

    @property
    def described(self) -> str:
        """What trains, for people: `LoRA and projector`."""
        lora = {"linear": "LoRA", "attention": "LoRA on attention"}.get(self.lora or "")
        decoder = ("decoder from scratch" if self.draws_decoder else "decoder") if self.trains_decoder else None
        top = self.top_layers and f"last {self.top_layers} layers of the decoder"
        vision = self.vision_layers and f"last {self.vision_layers} layers of the encoder"
        parts = [part for part in (lora, decoder, top, vision, self.lora_vision and "LoRA on the encoder") if part]
        return f"{', '.join(parts)} and projector" if parts else "projector"

    @property
    def trains_whole_layers(self) -> bool:
        """Whether weights of the bases themselves train; they must then be in float32."""
        return self.trains_decoder or self.top_layers > 0 or self.vision_layers > 0


STRATEGIES = {
    "projector": Strategy(),
    "lora": Strategy(lora="linear"),
    "attention_lora": Strategy(lora="attention"),
    "top_layers": Strategy(top_layers=LAST_LAYERS),
    "vision_layers": Strategy(vision_layers=LAST_LAYERS),
    "full": Strategy(trains_decoder=True),
    "scratch": Strategy(trains_decoder=True, draws_decoder=True),
}


def choose_strategy(
    name: str,
    *,
    top_layers: int | None = None,
    vision_layers: int | None = None,
    lora_vision: bool = False,
    is_quantized: bool = False,
    target_modules: str | list[str] | None = None,
    loraplus: bool = False,
) -> Strategy:
    """The entry of a name, with what the options add to it.

    Args:
        name (`str`): Of `STRATEGIES`.
        top_layers (`int`, *optional*): For `top_layers` only; [`LAST_LAYERS`] by default.
        vision_layers (`int`, *optional*): Of the encoder, beside whatever trains.
        lora_vision (`bool`, *optional*, defaults to `False`): LoRA on the encoder, beside whatever an adapter holds.
        is_quantized (`bool`, *optional*, defaults to `False`): Whether the decoder is to be loaded so.
        target_modules (`str` or `list[str]`, *optional*): Names of layers that LoRA is asked for by.
        loraplus (`bool`, *optional*, defaults to `False`): Whether LoRA's two matrices are to have their own rates.

    Raises:
        ValueError: For options that contradict each other, before anything is loaded.
    """
    found = STRATEGIES[name]
    if top_layers is not None and name != "top_layers":
        raise ValueError(f"--top_layers {top_layers} belongs to --strategy top_layers, got --strategy {name}.")
    if is_quantized and (found.trains_decoder or found.top_layers):
        raise ValueError(
            f"--strategy {name} trains the decoder's own weights, and quantized ones cannot train: leave "
            "--load_in_4bit and --load_in_8bit out, or take --strategy lora."
        )
    if lora_vision and (found.trains_decoder or vision_layers is not None or found.vision_layers):
        raise ValueError(
            f"--lora_vision adapts the encoder, and --strategy {name}"
            f"{'' if vision_layers is None else ' with --vision_layers'} saves or trains it in full: leave "
            "--lora_vision out; --vision_layers trains the encoder's last layers."
        )
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"--lora_target_modules {target_modules}: expected names of layers, or a regular expression over whole "
                f"names; {error}."
            ) from error
    if name == "attention_lora" and target_modules not in (None, "all-linear", ["all-linear"]):
        raise ValueError(
            f"--strategy attention_lora chooses LoRA's layers by itself, got --lora_target_modules {target_modules}: "
            "leave one of the two out."
        )
    if loraplus and found.lora is None and not lora_vision:
        raise ValueError(f"--loraplus_lr_ratio is of LoRA, and --strategy {name} trains none: leave it out.")
    return replace(
        found,
        top_layers=found.top_layers and (top_layers or LAST_LAYERS),
        vision_layers=vision_layers if vision_layers is not None else found.vision_layers,
        lora_vision=lora_vision,
    )


def apply_strategy(
    model: VisionQwen, strategy: Strategy, *, target_modules: str | list[str] | None = None, **arguments
) -> LoraConfig | None:
    """Sets what trains.

    Args:
        model ([`VisionQwen`]): Joined, its encoder frozen.
        strategy ([`Strategy`]): Of [`choose_strategy`].
        target_modules (`str` or `list[str]`, *optional*): As in [`~vlm_peft.adapters.lora.lora_config`].
        **arguments: Further fields of `peft.LoraConfig`, `modules_to_save` among them.

    Returns:
        `peft.LoraConfig` of the adapter that is to be put around the model; `None` when the model trains itself.

    Raises:
        ValueError: When a part has fewer layers, or none that are numbered; see also
            [`~vlm_peft.adapters.lora.lora_config`].
    """
    whole = [
        *_last_layers(model, "language_model", decoder_layers(model), strategy.top_layers, "--top_layers"),
        *_last_layers(model, "vision_tower", vision_layers(model), strategy.vision_layers, "--vision_layers"),
    ]
    if strategy.trains_decoder:
        tower = model.model.vision_tower
        model.requires_grad_(True)
        tower.requires_grad_(False)
        for name in whole:
            model.get_submodule(name).requires_grad_(True)
        return None
    modules_to_save = [*whole, *(arguments.pop("modules_to_save", None) or [])]
    return lora_config(
        model,
        layers=strategy.lora,
        target_modules=target_modules if strategy.lora == "linear" else None,
        lora_vision=strategy.lora_vision,
        modules_to_save=modules_to_save,
        **arguments,
    )


def carry_on(model: VisionQwen, config: LoraConfig, folder: str | Path) -> PeftModel:
    """An adapter that holds what an earlier one holds, with its weights, and what it trains itself.

    What only the earlier adapter trained is frozen. Layers that are held whole have no LoRA: where the earlier adapter
    had some in a layer that trains whole, it is merged into where the layer starts.

    Args:
        model ([`VisionQwen`]): The bases that the earlier adapter was trained on, joined anew.
        config (`LoraConfig`): Of [`apply_strategy`].
        folder (`str` or `Path`): The earlier adapter.

    Raises:
        ValueError: See [`check_lora_sizes`].
    """
    earlier: Any = LoraConfig.from_pretrained(str(folder))
    wanted: Any = config
    held, own = list(earlier.modules_to_save), list(wanted.modules_to_save)
    had_lora, has_lora = (each.target_modules != DUMMY_TARGET_MODULES for each in (earlier, wanted))
    if has_lora:
        check_lora_sizes(folder, {name: getattr(wanted, name) for name in _LORA_SIZES})
    targets = [str(each.target_modules) for each, has in ((wanted, has_lora), (earlier, had_lora)) if has]
    united = replace(
        wanted,
        modules_to_save=list(dict.fromkeys([*own, *held])),
        target_modules="|".join(f"(?:{each})" for each in dict.fromkeys(targets)) or DUMMY_TARGET_MODULES,
        **{name: getattr(earlier if had_lora else wanted, name) for name in _LORA_SIZES},
    )
    adapted: Any = get_peft_model(model, united)
    start = load_file(Path(folder) / "adapter_model.safetensors")
    asked = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    lacking = {name: name.removeprefix("base_model.model.") for name in asked if name not in start}
    if had_lora and any(".lora_" not in name for name in lacking):
        bases: Any = {"vision": model.config.vision_name_or_path, "text": model.config.text_name_or_path}
        merged = load_adapter(folder, merge=True, **bases).state_dict()
        start |= {name: merged[plain] for name, plain in lacking.items() if plain in merged}
    set_peft_model_state_dict(adapted, {name: start.get(name, value) for name, value in asked.items()})
    others = tuple(f"{name}." for name in held if name not in own)
    for name, parameter in adapted.named_parameters():
        plain = name.removeprefix("base_model.model.")
        if ".lora_" in plain:
            is_own = has_lora and re.fullmatch(wanted.target_modules, plain.partition(".lora_")[0])
            parameter.requires_grad_(bool(is_own))
        elif plain.startswith(others) or any(f".{name}" in f".{plain}" for name in others):
            parameter.requires_grad_(False)
    return adapted


def check_lora_sizes(folder: str | Path, sizes: Mapping[str, Any]) -> None:
    """Compares LoRA that goes on with what it was.

    Args:
        folder (`str` or `Path`): The earlier adapter.
        sizes (`Mapping`): `r`, `lora_alpha`, `use_rslora` and `use_dora` of the LoRA that is to go on with it.

    Raises:
        ValueError: When the adapter has LoRA, of other sizes.
    """
    earlier: Any = LoraConfig.from_pretrained(str(folder))
    if earlier.target_modules == DUMMY_TARGET_MODULES:
        return
    for name, here in sizes.items():
        if getattr(earlier, name) != here:
            raise ValueError(
                f"LoRA that goes on must be as it was: {name} is {getattr(earlier, name)} in {folder}, and {here} "
                "here: give both the same."
            )


def vision_layers(model: VisionQwen | PeftModel) -> list[nn.Module]:
    """The encoder's layers up to the highest that is read, in their order; none where they are not in one list."""
    tower: Any = base_model(model).model.vision_tower
    lists = [each for each in tower.modules() if isinstance(each, nn.ModuleList)]
    depth = getattr(base_model(model).config.vision_tower_config, "num_hidden_layers", None)
    return list(next((each for each in lists if len(each) == depth), nn.ModuleList()))


def _last_layers(model: VisionQwen, part: str, layers: list[nn.Module], count: int, option: str) -> list[str]:
    """Full names of the last layers of a part."""
    if not count:
        return []
    if count > len(layers):
        raise ValueError(
            f"{option} {count}: the {'decoder' if part == 'language_model' else 'encoder'} has "
            f"{f'{len(layers)} layers that are run' if layers else 'no numbered layers in one list'}."
        )
    chosen = {id(layer) for layer in layers[len(layers) - count :]}
    return [name for name, module in model.named_modules() if id(module) in chosen]


def layers_from_top(model: VisionQwen | PeftModel) -> Callable[[str, nn.Parameter], tuple[str, int]]:
    """Tells how deep below the top of its part a weight lies.

    Args:
        model ([`VisionQwen`] or `PeftModel`): Adapted, if it will be.

    Returns:
        `Callable`: Full name of a parameter and itself -> the part, `language_model`, `vision_tower` or `""` for the
        projector, and the number of layers above it; the decoder's embedding lies below all of its layers.

    Raises:
        ValueError: When the decoder's layers are not in one list.
    """
    parts = {"language_model": decoder_layers(model), "vision_tower": vision_layers(model)}
    if not parts["language_model"]:
        raise ValueError("The decoder's layers are not in one list: leave --layer_decay and --unfreeze_steps out.")
    above = {
        id(parameter): (part, len(layers) - 1 - place)
        for part, layers in parts.items()
        for place, layer in enumerate(layers)
        for parameter in layer.parameters()
    }
    for parameter in base_model(model).get_input_embeddings().parameters():
        above[id(parameter)] = ("language_model", len(parts["language_model"]))

    def find(name: str, parameter: nn.Parameter) -> tuple[str, int]:
        part = next((part for part in parts if f".{part}." in name), "language_model" if "lm_head" in name else "")
        return above.get(id(parameter), (part, 0))

    return find
