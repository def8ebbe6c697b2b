"""A decoder's step in fewer kernels, for steps of one token or a handful, where starting them is most of the time.

Stage: inside the step that [`~vlm_peft.model.cuda.generation`] captures. RMS norms are one kernel instead of eight. And
heads that share keys and values are rows of one attention over these, which are then not written out for each head:
transformers does so for steps of a single token, not for the several beams of a prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_GROUPED = "sdpa_grouped"


def grouped_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention under a mask that all heads share; keys and values are read where they lie.

    Args:
        module (`nn.Module`): The attention layer.
        query (`torch.Tensor` of shape `(B, heads, K, D)`): Of the newest tokens.
        key, value (`torch.Tensor` of shape `(B, groups, T, D)`): Of all tokens.
        attention_mask (`torch.BoolTensor` of shape `(B, 1, K, T)`, *optional*): Who is seen.
        dropout (`float`, *optional*, defaults to 0.0): None in evaluation.
        scaling (`float`, *optional*): Of the products.

    Returns:
        `tuple[torch.Tensor, None]`: Output `(B, K, heads, D)`; no weights.
    """
    rows, heads, tokens, width = query.shape
    shared = heads // key.shape[1]
    is_plain = attention_mask is not None and attention_mask.shape[1] == 1 and kwargs.get("position_bias") is None
    if shared == 1 or tokens == 1 or not is_plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert attention_mask is not None
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], shared * tokens, width),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, shared, 1),
        dropout_p=dropout,
        scale=scaling,
    )
    return output.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_GROUPED, grouped_attention_forward)
AttentionMaskInterface.register(_GROUPED, sdpa_mask)


def plain_norms(decoder: nn.Module) -> list[Any]:
    """The decoder's RMS norms that are torch's, as a trial shows; those of some decoders add 1 to their weight."""
    norms: list[Any] = []
    with torch.no_grad():
        for module in decoder.modules():
            weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
            if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(epsilon, float):
                continue
            values = torch.linspace(-1.0, 2.0, len(weight), dtype=weight.dtype, device=weight.device)
            expected, found = module(values).float(), _rms_norm(module, values).float()
            # The library's rounds the normalized values to the weight's dtype, too.
            tolerance = 4 * torch.finfo(weight.dtype).eps
            if torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
                norms.append(module)
    return norms


def _rms_norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    if hidden_states.dtype != weight.dtype:
        return type(module).forward(module, hidden_states)
    return nn.functional.rms_norm(hidden_states, weight.shape, weight, module.variance_epsilon)


@contextmanager
def few_kernels(decoder: Any, norms: list[Any]) -> Iterator[None]:
    """Within it, a decoder whose attention is SDPA reads its tokens in fewer kernels.

    Args:
        decoder (`PreTrainedModel`): The language model.
        norms (`list[nn.Module]`): Of [`plain_norms`].
    """
    before = decoder.config._attn_implementation
    for module in norms:
        module.forward = partial(_rms_norm, module)
    decoder.config._attn_implementation = _GROUPED
    try:
        yield
    finally:
        decoder.config._attn_implementation = before
        for module in norms:
            del module.forward
