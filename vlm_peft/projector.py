"""Projector: (I, N_v, D_v) vision features -> (I, N, D_t) image tokens in the decoder's embedding space.

Stage: between the vision tower and the splice into the decoder's sequence; called by `VisionQwenModel`.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_vision_qwen import VisionQwenConfig


def pixel_shuffle(features: torch.Tensor, factor: int) -> torch.Tensor:
    """Moves each square of `factor` x `factor` neighbouring patches into the feature axis of one token.

    The fold that Idefics3 (arXiv 2408.12637) and InternVL use; rows of the square vary slower than its columns.

    Args:
        features (`torch.Tensor` of shape `(I, N_v, D_v)`): Patches of a square grid, row by row; `N_v` is its area.
        factor (`int`): Side of the square; divides the grid's side.

    Returns:
        `torch.Tensor` of shape `(I, N_v / factor**2, D_v * factor**2)`, dtype unchanged.
    """
    if factor == 1:
        return features
    num_images, num_patches, width = features.shape
    side = round(num_patches**0.5)
    rows = side // factor
    features = features.reshape(num_images, rows, factor, rows, factor, width)  # (I, rows, f, columns, f, D_v)
    features = features.permute(0, 1, 3, 2, 4, 5)  # (I, rows, columns, f, f, D_v)
    return features.reshape(num_images, rows * rows, factor * factor * width)  # (I, N, D_v * f^2)


class VisionQwenProjector(nn.Module):
    """The trained joint: pixel shuffle, optional layer norm, then one linear layer or two with an activation.

    Parameter names follow `LlavaMultiModalProjector` (`linear_1`, `linear_2`), so that weights map one to one.

    Args:
        config ([`VisionQwenConfig`]): Sizes, `projector_type`, `projector_bias` and `pixel_shuffle_factor`.
    """

    def __init__(self, config: VisionQwenConfig):
        super().__init__()
        self.pixel_shuffle_factor = config.pixel_shuffle_factor
        input_size = config.vision_feature_size * config.pixel_shuffle_factor**2
        output_size = config.text_config.hidden_size
        if config.projector_layer_norm:
            self.layer_norm = nn.LayerNorm(input_size)
        self.linear_1 = nn.Linear(input_size, output_size, bias=config.projector_bias)
        if config.projector_type == "mlp":
            self.act = ACT2FN[config.projector_hidden_act]
            self.linear_2 = nn.Linear(output_size, output_size, bias=config.projector_bias)

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        """Projects `(I, N_v, D_v)` to `(I, N, D_t)`; computes in the dtype of its own weights."""
        features = pixel_shuffle(vision_features.to(self.linear_1.weight.dtype), self.pixel_shuffle_factor)
        if hasattr(self, "layer_norm"):
            features = self.layer_norm(features)
        features = self.linear_1(features)
        if hasattr(self, "linear_2"):
            features = self.linear_2(self.act(features))
        return features
