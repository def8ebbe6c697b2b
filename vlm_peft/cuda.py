"""What only a GPU needs: compiled decoder layers, FlexAttention and one shape for all batches of a run.

Stage: between the adapted model and its trainer; called by `training_setup`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from .adapters import base_model
from .modeling_vision_qwen import VisionQwen

_BLOCK = 128
"""FlexAttention's block: sequences are a multiple of it, or its gradients are not to be trusted (pytorch#153799)."""


def decoder_layers(model: VisionQwen | PeftModel) -> list[nn.Module]:
    """The decoder's layers, in their order."""
    decoder = base_model(model).model.language_model
    depth = decoder.config.num_hidden_layers
    lists = (each for each in decoder.modules() if isinstance(each, nn.ModuleList) and len(each) == depth)
    return list(next(lists, nn.ModuleList()))


def compile_layers(model: VisionQwen | PeftModel) -> None:
    """Compiles each decoder layer for itself, in place: one graph serves all, and names in checkpoints stay.

    To be called after PEFT has put its layers in: LoRA's casts, scale and sum are then part of the fused kernels.
    """
    for layer in decoder_layers(model):
        layer.compile()


def sequence_length(lengths: list[int], batch_size: int) -> int:
    """Tokens of a sequence that nearly every batch of rows drawn at random fits into.

    Args:
        lengths (`list[int]`): Tokens of each row.
        batch_size (`int`): Rows of a batch.

    Returns:
        `int`: Mean and three standard deviations of the sum of `batch_size` rows, at most that of the longest rows, as
        a multiple of 128.
    """
    count = min(batch_size, len(lengths))
    mean = sum(lengths) / len(lengths)
    deviation = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    longest = sum(sorted(lengths, reverse=True)[:count])
    tokens = min(math.ceil(count * mean + 3 * math.sqrt(count) * deviation), longest)
    return tokens + -tokens % _BLOCK


@contextmanager
def plain_decoder(model: VisionQwen | PeftModel) -> Iterator[None]:
    """Runs the block without compiled layers and with SDPA in place of FlexAttention: for texts of growing length."""
    base = base_model(model)
    attention = base.model.language_model.config._attn_implementation
    if attention == "flex_attention":
        base.set_attn_implementation({"text_config": "sdpa"})
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if attention == "flex_attention":
            base.set_attn_implementation({"text_config": attention})
