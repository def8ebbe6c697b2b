"""Attention for training on CPUs under bfloat16 autocast: `attn_implementation="sdpa_float32"`.

Stage: inside the decoder. On a CPU, bfloat16 matrix products are faster than float32 ones, but PyTorch's masked
attention is slower in bfloat16 than in float32, its backward pass several times so (PyTorch 2.13, AMD Zen 4). This
variant leaves autocast for the attention alone. Without autocast it is plain SDPA.
"""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def sdpa_float32_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention, computed in float32 outside autocast.

    Args:
        module (`nn.Module`): The attention layer.
        query, key, value (`torch.Tensor` of shape `(B, heads, T, D_t / heads)`): Any floating dtype.
        attention_mask (`torch.Tensor` of shape `(B, 1, T, T)`, *optional*): Boolean visibility.

    Returns:
        `tuple[torch.Tensor, None]`: Output of shape `(B, T, heads, D_t / heads)` in the query's dtype; no weights.
    """
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return output.to(query.dtype), None


AttentionInterface.register("sdpa_float32", sdpa_float32_attention_forward)
AttentionMaskInterface.register("sdpa_float32", sdpa_mask)
