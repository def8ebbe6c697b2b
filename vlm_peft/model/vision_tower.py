"""Vision towers: how each kind is called, and what one forward pass says about the tokens that it gives.

Stage: below the configuration, which stores what is found here. A tower is any `AutoModel` that takes `pixel_values`
and gives hidden states: tokens `(I, T, D)`, or maps `(I, D, rows, columns)` of which each place is a token. Nothing is
concluded from names of models or fields: the tower runs once, on the meta device, where it costs no arithmetic and
needs no weights.
"""

import copy
import inspect
import math
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig

# Nets that take any size say none; ImageNet's were trained at this one.
_USUAL_SIZE = 224
# This tower takes patches that were cut out already (transformers, `models/siglip2/modeling_siglip2.py`).
_TAKES_PATCHES = "siglip2_vision_model"
# This one would drop three quarters of the patches and shuffle the others.
_DROPS_PATCHES = "vit_mae"
# What was measured in this process.
_MEASURED: dict[tuple, dict[str, Any]] = {}


def picture_size(vision_config: Any, image_size: int | None = None) -> tuple[int, int]:
    """Height and width in pixels of the pictures that a tower gets.

    Args:
        vision_config (`PreTrainedConfig`): Of the tower.
        image_size (`int`, *optional*): Side of square pictures; by default what the tower was built for.
    """
    if image_size is not None:
        return image_size, image_size
    own = getattr(vision_config, "image_size", None)
    if own is None and vision_config.model_type == _TAKES_PATCHES:
        own = math.isqrt(vision_config.num_patches) * vision_config.patch_size
    if own is None and getattr(vision_config, "pretrained_cfg", None):
        own = vision_config.pretrained_cfg.get("input_size", [_USUAL_SIZE])[-2:]
    height, *width = own if isinstance(own, list | tuple) else [own or _USUAL_SIZE]
    return height, width[0] if width else height


def needs_interpolation(vision_config: Any, image_size: int | None) -> bool:
    """Whether a tower must be told to interpolate its position embeddings; others do it by themselves, or need none."""
    return (
        picture_size(vision_config, image_size) != picture_size(vision_config)
        and "interpolate_pos_encoding" in inspect.signature(MODEL_MAPPING[type(vision_config)].forward).parameters
    )


def tower_config(vision_config: PreTrainedConfig, num_layers: int | None = None) -> PreTrainedConfig:
    """The configuration that a tower is built from.

    Args:
        vision_config (`PreTrainedConfig`): Of the checkpoint.
        num_layers (`int`, *optional*): Layers to build; all of them by default.
    """
    config = copy.deepcopy(vision_config)
    if config.model_type == _DROPS_PATCHES:
        config.mask_ratio = 0.0
    if num_layers is not None:
        config.num_hidden_layers = num_layers
    return config


def run_tower(tower: nn.Module, pixel_values: torch.Tensor, *, interpolate: bool = False, **kwargs) -> Any:
    """All that a tower returns, with its hidden states.

    Args:
        tower (`PreTrainedModel`): Of [`tower_config`].
        pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`): In the tower's dtype.
        interpolate (`bool`, *optional*, defaults to `False`): Of [`needs_interpolation`].
        **kwargs: Passed on to the tower, `output_attentions` for example.

    Returns:
        `ModelOutput`: Each of its `hidden_states` is `(I, T, D)`, class and register tokens first, or a map
        `(I, D, rows, columns)`.
    """
    config: Any = tower.config
    inputs: dict[str, Any] = {"pixel_values": pixel_values}
    num_images, _, height, width = pixel_values.shape
    if config.model_type == _TAKES_PATCHES:
        inputs["pixel_values"] = _cut_patches(pixel_values, config.patch_size)
        # Read as numbers by the tower, so they stay on the host. No mask: no patch is padding.
        shape = torch.tensor([[height // config.patch_size, width // config.patch_size]], device="cpu")
        inputs |= {"pixel_attention_mask": None, "spatial_shapes": shape.expand(num_images, 2)}
    elif config.model_type == _DROPS_PATCHES:
        rows, columns = _patch_grid(config, (height, width))
        # Patches are sorted by their noise.
        inputs["noise"] = torch.arange(rows * columns, device=pixel_values.device).expand(num_images, -1)
    if interpolate:
        inputs["interpolate_pos_encoding"] = True
    outputs = tower(**{**kwargs, **inputs, "output_hidden_states": True, "return_dict": True})
    states = outputs.hidden_states
    if not isinstance(states, list | tuple) or not all(state.ndim in (3, 4) for state in states):
        raise ValueError("it gives neither tokens (pictures, tokens, width) nor maps (pictures, width, rows, columns)")
    # Windowed transformers give their tokens a second time as maps.
    maps = outputs.get("reshaped_hidden_states")
    if maps is not None and all(each.shape[1] == state.shape[-1] for each, state in zip(maps, states, strict=True)):
        outputs["hidden_states"] = tuple(maps)
    return outputs


def as_tokens(state: torch.Tensor) -> torch.Tensor:
    """Tokens `(I, T, D)` of a hidden state; a map's places row by row."""
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state


_MOST = 1_000_000
"""Of what an encoder may have of anything; larger numbers of a damaged file would be allocated."""


def check_layout(layout: Any) -> None:
    """Checks what a configuration's file says about an encoder.

    Args:
        layout (`dict`): As of [`measure`].

    Raises:
        ValueError: Naming the field, what it should be and what it is.
    """
    if not isinstance(layout, dict):
        raise ValueError(f"vision_layout: expected fields, got {str(layout)[:60]}.")
    for name in ("feature_size", "num_hidden_states", "num_prefix_tokens", "grid"):
        value = layout.get(name)
        values = value if name == "grid" and isinstance(value, list | tuple) and len(value) == 2 else [value]
        least = 0 if name == "num_prefix_tokens" else 1
        if not all(type(each) is int and least <= each <= _MOST for each in values) or (name == "grid") != (
            len(values) == 2
        ):
            wanted = "rows and columns" if name == "grid" else f"a whole number from {least} to {_MOST:,}"
            raise ValueError(f"vision_layout.{name}: expected {wanted}, got {str(value)[:60]}.")
    if missing := [name for name in ("layers", "is_cut") if name not in layout]:
        raise ValueError(f"vision_layout.{missing[0]} is missing.")


def measure(vision_config: Any, layers: int | list[int] | None, image_size: int | None) -> dict[str, Any]:
    """Runs a tower without weights and tells which tokens it gives.

    Args:
        vision_config (`PreTrainedConfig`): Of the tower.
        layers (`int` or `list[int]`, *optional*): Chosen hidden states. By default the last but one where all have one
            shape, as in CLIP, and the last where they shrink from stage to stage.
        image_size (`int`, *optional*): Side of the pictures in pixels; by default what the tower was built for.

    Returns:
        `dict[str, Any]`: `layers`; `grid`, rows and columns of patches; `num_prefix_tokens`, class and register tokens
        in front of them; `feature_size`, widths of the chosen states together; `num_hidden_states` of the whole tower;
        `is_cut`, whether it can be built without the layers above the highest chosen one.

    Raises:
        ValueError: When the tower gives no tokens or maps, the size does not fit it, or the layers are not there or of
            different grids.
    """
    key = (vision_config.to_json_string(), str(layers), image_size)
    if key not in _MEASURED:
        _MEASURED[key] = _measure(vision_config, layers, image_size)
    return copy.deepcopy(_MEASURED[key])


def _measure(vision_config: Any, layers: int | list[int] | None, image_size: int | None) -> dict[str, Any]:
    kind = vision_config.model_type
    size = picture_size(vision_config, image_size)
    patch = _patch_size(vision_config)
    shapes, weights = _run_on_meta(vision_config, image_size)
    is_uniform = len(set(shapes)) == 1
    if layers is None:
        layers = -2 if is_uniform and len(shapes) > 1 else -1
    indices = resolve_layers(layers, len(shapes))
    chosen = [shapes[index] for index in indices]
    if any(len(shape) == 3 for shape in chosen):
        if patch is None:
            raise ValueError(f"The encoder {kind} says no patch_size: which of its {chosen[0][1]} tokens are patches?")
        if image_size is not None and (size[0] % patch[0] or size[1] % patch[1]):
            raise ValueError(_unfit(vision_config, image_size))
    grids = {shape[2:] if len(shape) == 4 else _patch_grid(vision_config, size) for shape in chosen}
    if len(grids) > 1 or len({len(shape) for shape in chosen}) > 1:
        found = " and ".join(f"{rows} x {columns}" for rows, columns in sorted(grids))
        raise ValueError(f"vision_feature_layer={layers} selects maps of {found} tokens: select those of one grid.")
    rows, columns = grids.pop()
    # Of some maps the width is the last axis, and one of the first two would be taken for it.
    if abs(rows * size[1] - columns * size[0]) >= max(size):
        raise ValueError(
            f"The encoder {kind} gives maps of {rows} x {columns} places for pictures of {size[0]} x {size[1]} pixels: "
            "their shape must be (pictures, width, rows, columns)."
        )
    prefixes = {0 if len(shape) == 4 else shape[1] - rows * columns for shape in chosen}
    if len(prefixes) > 1 or min(prefixes) < 0:
        raise ValueError(
            f"The encoder {kind} gives {chosen[0][1]} tokens of a picture of {size[0]} x {size[1]} pixels, fewer than "
            f"its {rows} x {columns} patches."
        )
    depth = max(indices)
    return {
        "layers": layers,
        "grid": [rows, columns],
        "num_prefix_tokens": prefixes.pop(),
        "feature_size": sum(shape[1 if len(shape) == 4 else 2] for shape in chosen),
        "num_hidden_states": len(shapes),
        "is_cut": all(len(shape) == 3 for shape in chosen)
        and _can_be_cut(vision_config, image_size, shapes, weights, depth),
    }


def resolve_layers(layers: int | list[int], num_hidden_states: int) -> list[int]:
    """Chosen hidden states as indices from 0.

    Raises:
        ValueError: When there is none, or one of them does not exist.
    """
    chosen = [layers] if isinstance(layers, int) else list(layers)
    if not chosen or any(not -num_hidden_states <= layer < num_hidden_states for layer in chosen):
        raise ValueError(
            f"vision_feature_layer must select from {num_hidden_states} hidden states, {-num_hidden_states} to "
            f"{num_hidden_states - 1}, got {layers}."
        )
    return [layer % num_hidden_states for layer in chosen]


def check_places(tower: nn.Module, size: tuple[int, int], *, interpolate: bool) -> None:
    """Runs a loaded tower once: each patch must be where the grid says it is, behind all other tokens.

    A picture that differs in one patch must differ most at that patch's token. Maps have their places from themselves.

    Args:
        tower (`PreTrainedModel`): With its weights.
        size (`tuple[int, int]`): Height and width of the pictures in pixels.
        interpolate (`bool`): Of [`needs_interpolation`].

    Raises:
        ValueError: When the tower orders its tokens differently.
    """
    loaded: Any = tower
    config = loaded.config
    patch = _patch_size(config)
    if patch is None:
        return
    rows, columns = _patch_grid(config, size)
    pictures = torch.zeros(2, 3, *size)
    # The last patch of the first row: transposed, reversed or behind fewer tokens, it has another number.
    pictures[1, :, : patch[0], (columns - 1) * patch[1] : columns * patch[1]] = 1
    # Not in inference mode, whose tensors a tower might keep, and could not train with.
    with torch.no_grad():
        embedded = run_tower(tower, pictures.to(loaded.device, loaded.dtype), interpolate=interpolate)
        embedded = embedded.hidden_states[0]
    if embedded.ndim == 4:
        return
    expected = embedded.shape[1] - rows * columns + columns - 1
    found = int((embedded[1] - embedded[0]).float().norm(dim=-1).argmax())
    if found != expected:
        raise ValueError(
            f"The encoder {config.model_type} does not give its patches row by row behind all other tokens: of its "
            f"{embedded.shape[1]} tokens, the last patch of the first row is number {found}, expected {expected}."
        )


def _run_on_meta(
    vision_config: Any, image_size: int | None, num_layers: int | None = None
) -> tuple[list[tuple[int, ...]], dict[str, torch.Size]]:
    """Shapes of a tower's hidden states for two pictures, and of its weights by name."""
    height, width = picture_size(vision_config, image_size)
    if type(vision_config) not in MODEL_MAPPING:
        raise ValueError(
            f"The encoder {vision_config.model_type} cannot be joined: transformers' AutoModel does not build this "
            "part of a model alone."
        )
    if vision_config.model_type == _TAKES_PATCHES and height % vision_config.patch_size:
        raise ValueError(_unfit(vision_config, height))
    try:
        with torch.device("meta"):
            tower: Any = AutoModel.from_config(tower_config(vision_config, num_layers)).eval()
            if tower.main_input_name != "pixel_values":
                raise ValueError(f"it takes {tower.main_input_name}, and no pixel_values")
            pictures = torch.empty(2, 3, height, width, dtype=tower.dtype)
            with torch.no_grad():
                interpolate = needs_interpolation(vision_config, image_size)
                states = run_tower(tower, pictures, interpolate=interpolate).hidden_states
        if any(state.shape[0] != 2 for state in states):
            raise ValueError("it gives the tokens of several pictures as one sequence")
    except Exception as error:
        # Whatever a tower raises here, it is no encoder for these pictures.
        built_for = "" if image_size is None else " (built for {} x {})".format(*picture_size(vision_config))
        raise ValueError(
            f"The encoder {vision_config.model_type}{built_for} cannot be joined with pictures of {height} x {width} "
            f"pixels: {' '.join(str(error).split()).rstrip('.')}."
        ) from error
    return [tuple(state.shape) for state in states], {name: value.shape for name, value in tower.state_dict().items()}


def _can_be_cut(
    vision_config: Any,
    image_size: int | None,
    shapes: list[tuple[int, ...]],
    weights: dict[str, torch.Size],
    depth: int,
) -> bool:
    """Whether a tower of `depth` layers is the lower part of the whole one."""
    if getattr(vision_config, "num_hidden_layers", None) != len(shapes) - 1:
        return False
    try:
        lower, lower_weights = _run_on_meta(vision_config, image_size, depth)
    except ValueError:
        return False
    return lower == shapes[: depth + 1] and lower_weights.items() <= weights.items()


def _unfit(vision_config: Any, image_size: int) -> str:
    patch = math.lcm(*(_patch_size(vision_config) or (1, 1)))
    below = max(1, image_size // patch) * patch
    return (
        f"image_size must be a multiple of the patch size of {vision_config.model_type}: expected a multiple of "
        f"{patch} pixels, such as {below} or {below + patch}, got {image_size}."
    )


def _patch_size(vision_config: Any) -> tuple[int, int] | None:
    """Height and width of a patch in pixels; None for nets without patches."""
    patch = getattr(vision_config, "patch_size", None)
    if isinstance(patch, int):
        return patch, patch
    return (patch[0], patch[1]) if isinstance(patch, list | tuple) and len(patch) == 2 else None


def _patch_grid(vision_config: Any, size: tuple[int, int]) -> tuple[int, int]:
    patch = _patch_size(vision_config) or (1, 1)
    return size[0] // patch[0], size[1] // patch[1]


def _cut_patches(pixel_values: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures `(I, 3, H, W)` as patches `(I, rows * columns, side * side * 3)`, as SigLIP 2's image processor does."""
    num_images, channels, height, width = pixel_values.shape
    rows, columns = height // side, width // side
    patches = pixel_values.reshape(num_images, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(num_images, rows * columns, -1)
