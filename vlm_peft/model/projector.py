"""Projectors: (I, N_v, D_v) vision features -> (I, N, D_t) image tokens in the decoder's embedding space.

Stage: between the vision tower and the splice into the decoder's sequence; called by `VisionQwenModel`. A kind of
projector is one class here, which knows how many tokens it gives (`count`), which settings it understands (`settings`)
and where it starts (`start`). [`ProjectorSettings`] are fields of the configuration, options of a training and part of
a run's record, so that a kind is added in this file alone.
"""

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

if TYPE_CHECKING:
    from .configuration_vision_qwen import VisionQwenConfig

PROJECTOR_TYPES = ["linear", "mlp", "average_pool", "resampler"]


@dataclass
class ProjectorSettings:
    """What can be chosen of a projector; numbers are at least 1.

    Args:
        projector_type (`str`, *optional*, defaults to `"mlp"`):
            `"linear"` (one layer), `"mlp"` (two layers with an activation, as LLaVA-1.5, arXiv 2310.03744),
            `"average_pool"` (means over a smaller grid, then the two layers) or `"resampler"` (learned queries that
            read the encoder's tokens by cross-attention).
        projector_layer_norm (`bool`, *optional*, defaults to `False`):
            Whether the projector normalizes its input first, as InternVL's does (arXiv 2404.16821); it learns faster
            from encoders whose hidden states vary much in scale.
        pixel_shuffle_factor (`int`, *optional*, defaults to 1):
            Side of the square of neighbouring patches that one image token carries; 2 gives a quarter of the tokens.
            For `"linear"` and `"mlp"`.
        pooled_grid (`list[int]`, *optional*):
            Rows and columns that `"average_pool"` makes of the patch grid.
        num_image_queries (`int`, *optional*):
            Image tokens that the `"resampler"` gives.
        num_resampler_layers (`int`, *optional*, defaults to 1):
            Layers of cross-attention of the `"resampler"`.
    """

    projector_type: str = field(default="mlp", metadata={"help": "Projector.", "choices": PROJECTOR_TYPES})
    projector_layer_norm: bool = field(default=False, metadata={"help": "Normalize the projector's input."})
    pixel_shuffle_factor: int = field(
        default=1, metadata={"help": "Of linear and mlp: 2 joins 2 x 2 patches into one image token."}
    )
    pooled_grid: list[int] | None = field(
        default=None, metadata={"help": "Of average_pool: rows and columns of image tokens a picture."}
    )
    num_image_queries: int | None = field(default=None, metadata={"help": "Of resampler: image tokens a picture."})
    num_resampler_layers: int = field(default=1, metadata={"help": "Of resampler: layers of cross-attention."})


PROJECTOR_AT_MOST = {"num_image_queries": 2**16, "num_resampler_layers": 2**10}
"""Largest settings that a training takes: weights of that size are made at once."""


def pixel_shuffle(features: torch.Tensor, factor: int, grid: tuple[int, int] | None = None) -> torch.Tensor:
    """Moves each square of `factor` x `factor` neighbouring patches into the feature axis of one token.

    The fold that Idefics3 (arXiv 2408.12637) and InternVL use; rows of the square vary slower than its columns.

    Args:
        features (`torch.Tensor` of shape `(I, N_v, D_v)`): Patches of a grid, row by row; `N_v` is its area.
        factor (`int`): Side of the square; divides the grid's sides.
        grid (`tuple[int, int]`, *optional*): Rows and columns; those of a square by default.

    Returns:
        `torch.Tensor` of shape `(I, N_v / factor**2, D_v * factor**2)`, dtype unchanged.
    """
    if factor == 1:
        return features
    num_images, num_patches, width = features.shape
    rows, columns = (side // factor for side in grid or [math.isqrt(num_patches)] * 2)
    features = features.reshape(num_images, rows, factor, columns, factor, width)  # (I, rows, f, columns, f, D_v)
    features = features.permute(0, 1, 3, 2, 4, 5)  # (I, rows, columns, f, f, D_v)
    return features.reshape(num_images, rows * columns, factor * factor * width)  # (I, N, D_v * f^2)


def projector_type(config: "VisionQwenConfig") -> type["Projector"]:
    """The class that `config.projector_type` names.

    Raises:
        ValueError: When there is none of this name.
    """
    name = config.projector_type
    if name in ("linear", "mlp"):
        return LinearProjector
    if name == "average_pool":
        return PoolingProjector
    if name == "resampler":
        return ResamplerProjector
    raise ValueError(f"projector_type is {name!r}, expected one of {', '.join(PROJECTOR_TYPES)}.")


def count_image_tokens(config: "VisionQwenConfig") -> int:
    """N: image tokens per picture that the projector of `config` gives.

    Raises:
        ValueError: When its settings contradict each other or do not fit the encoder's tokens.
    """
    kind = projector_type(config)
    for each in fields(ProjectorSettings):
        value = getattr(config, each.name)
        if each.name not in ("projector_type", *kind.settings) and value != each.default:
            raise ValueError(
                f"{each.name}={value} does nothing with projector_type={config.projector_type!r}: leave it out, or "
                "name the projector that it belongs to."
            )
    return kind.count(config)


class Projector(nn.Module):
    """What all kinds of projectors share: the trained joint between encoder and decoder."""

    settings: ClassVar[tuple[str, ...]] = ()
    """Of [`ProjectorSettings`], those that this kind understands."""

    @staticmethod
    def count(config: "VisionQwenConfig") -> int:
        """Image tokens per picture; raises `ValueError` for settings that this kind cannot have."""
        raise NotImplementedError

    @torch.no_grad()
    def start(self, std: float) -> None:
        """Draws the weights that a training starts from: biases zero, norms one, all others normal.

        Args:
            std (`float`): Standard deviation, the decoder's `initializer_range`.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=std)


class LinearProjector(Projector):
    """Pixel shuffle, optional layer norm, then one linear layer or two with an activation (`"linear"` and `"mlp"`).

    Parameter names follow `LlavaMultiModalProjector` (`linear_1`, `linear_2`), so that weights map one to one.

    Args:
        config ([`VisionQwenConfig`]): Sizes, `projector_type`, `projector_bias` and `pixel_shuffle_factor`.
    """

    settings = ("projector_layer_norm", "pixel_shuffle_factor")

    def __init__(self, config: "VisionQwenConfig"):
        super().__init__()
        self.grid = config.grid
        self.pixel_shuffle_factor = config.pixel_shuffle_factor
        input_size = config.vision_feature_size * config.pixel_shuffle_factor**2
        output_size = config.text_config.hidden_size
        if config.projector_layer_norm:
            self.layer_norm = nn.LayerNorm(input_size)
        self.linear_1 = nn.Linear(input_size, output_size, bias=config.projector_bias)
        if config.projector_type != "linear":
            self.act = ACT2FN[config.projector_hidden_act]
            self.linear_2 = nn.Linear(output_size, output_size, bias=config.projector_bias)

    @staticmethod
    def count(config: "VisionQwenConfig") -> int:
        """A token for each square of patches."""
        factor = config.pixel_shuffle_factor
        if factor < 1 or any(side % factor for side in config.grid):
            sides = " x ".join(map(str, dict.fromkeys(config.grid)))
            raise ValueError(
                f"pixel_shuffle_factor must divide the patch grid's side: expected a divisor of {sides} patches, got "
                f"{factor}. With projector_type='average_pool' or 'resampler' a grid of any size fits."
            )
        if factor > 1 and config.keep_class_token:
            raise ValueError(
                f"pixel_shuffle_factor={factor} regroups patches of a grid and cannot hold the class token: set "
                "keep_class_token=False or pixel_shuffle_factor=1."
            )
        return config.num_vision_tokens // factor**2

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        """Projects `(I, N_v, D_v)` to `(I, N, D_t)`; computes in the dtype of its own weights."""
        features = self.regroup(vision_features.to(self.linear_1.weight.dtype))
        if hasattr(self, "layer_norm"):
            features = self.layer_norm(features)
        features = self.linear_1(features)
        if hasattr(self, "linear_2"):
            features = self.linear_2(self.act(features))
        return features

    def regroup(self, features: torch.Tensor) -> torch.Tensor:
        """Vision features `(I, N_v, D_v)` as N tokens."""
        return pixel_shuffle(features, self.pixel_shuffle_factor, self.grid)


class PoolingProjector(LinearProjector):
    """Averages the patches of each cell of a smaller grid, then the two layers of `"mlp"` (`"average_pool"`).

    Cells of grids that do not divide overlap by a patch, as `torch.nn.AdaptiveAvgPool2d` defines them.

    Args:
        config ([`VisionQwenConfig`]): Sizes, `pooled_grid` and the fields of the layers.
    """

    settings = ("projector_layer_norm", "pooled_grid")

    def __init__(self, config: "VisionQwenConfig"):
        super().__init__(config)
        self.pooled_grid = tuple(config.pooled_grid)

    @staticmethod
    def count(config: "VisionQwenConfig") -> int:
        """A token for each cell of the pooled grid."""
        (rows, columns), pooled = config.grid, config.pooled_grid
        if pooled is None or len(pooled) != 2 or not (0 < pooled[0] <= rows and 0 < pooled[1] <= columns):
            raise ValueError(
                f"projector_type='average_pool' needs pooled_grid, rows and columns of at most {rows} x {columns} "
                f"patches, got {pooled}."
            )
        if config.keep_class_token:
            raise ValueError(
                "projector_type='average_pool' averages the patches of a grid and cannot hold the class token: set "
                "keep_class_token=False, or use the resampler."
            )
        return pooled[0] * pooled[1]

    def regroup(self, features: torch.Tensor) -> torch.Tensor:
        """Means of `(I, N_v, D_v)` over the cells, `(I, N, D_v)`."""
        maps = features.transpose(1, 2).unflatten(2, self.grid)  # (I, D_v, rows, columns)
        return functional.adaptive_avg_pool2d(maps, self.pooled_grid).flatten(2).transpose(1, 2)


class ResamplerProjector(Projector):
    """Learned queries that read the vision features by cross-attention (`"resampler"`).

    The resampler of Flamingo (arXiv 2204.14198) in the small form of Qwen-VL (arXiv 2308.12966): features are brought
    to the decoder's width and normalized, each layer adds what the queries find in them, then a norm and an output
    layer.
    Keys carry a learned position for each vision token.

    Args:
        config ([`VisionQwenConfig`]): Sizes, `num_image_queries` and `num_resampler_layers`.
    """

    settings = ("projector_layer_norm", "num_image_queries", "num_resampler_layers")

    def __init__(self, config: "VisionQwenConfig"):
        super().__init__()
        input_size, width = config.vision_feature_size, config.text_config.hidden_size
        num_heads = math.gcd(width, config.text_config.num_attention_heads)
        # Drawn here, too: a model that is built from a configuration alone must not start from equal queries.
        self.queries = nn.Parameter(0.02 * torch.randn(config.num_image_queries, width))
        self.positions = nn.Parameter(0.02 * torch.randn(config.num_vision_tokens, width))
        if config.projector_layer_norm:
            self.layer_norm = nn.LayerNorm(input_size)
        self.linear_in = nn.Linear(input_size, width, bias=config.projector_bias)
        self.norm_in = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            _CrossAttention(width, num_heads, config.projector_bias) for _ in range(config.num_resampler_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.linear_out = nn.Linear(width, width, bias=config.projector_bias)

    @staticmethod
    def count(config: "VisionQwenConfig") -> int:
        """As many tokens as queries."""
        if config.num_image_queries is None or config.num_image_queries < 1 or config.num_resampler_layers < 1:
            raise ValueError(
                "projector_type='resampler' needs num_image_queries, image tokens per picture, and num_resampler_layers"
                f", both at least 1, got {config.num_image_queries} and {config.num_resampler_layers}."
            )
        return config.num_image_queries

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        """Reads `(I, N_v, D_v)` into `(I, N, D_t)`; computes in the dtype of its own weights."""
        features = vision_features.to(self.linear_in.weight.dtype)
        if hasattr(self, "layer_norm"):
            features = self.layer_norm(features)
        features = self.norm_in(self.linear_in(features))  # (I, N_v, D_t)
        found = self.queries.expand(features.shape[0], -1, -1)  # (I, N, D_t)
        for layer in self.layers:
            found = found + layer(found, features + self.positions, features)
        return self.linear_out(self.norm_out(found))


class _CrossAttention(nn.Module):
    """One layer of the resampler; keys need no bias, which softmax would take away again."""

    def __init__(self, width: int, num_heads: int, bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What queries `(I, N, D)` find in `(I, N_v, D)`, of shape `(I, N, D)`."""
        inputs = self.q_proj(self.norm(queries)), self.k_proj(keys), self.v_proj(values)
        heads = [each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in inputs]  # (I, heads, tokens, D_h)
        found = functional.scaled_dot_product_attention(*heads)
        return self.o_proj(found.transpose(1, 2).flatten(2))
