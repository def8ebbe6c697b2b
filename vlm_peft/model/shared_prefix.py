"""Shared prefix: a row's completions as sibling branches of one sequence, and the mask that keeps them apart.

Stage: between the processor (token ids per conversation) and the collator (tensors); the mask is built by the model.

A row with K completions of the same pictures is laid out as `prefix, branch 1, ..., branch K`. Every branch sees the
prefix and itself, never a sibling; positions restart after the prefix in each branch, so each branch is, position by
position, the sequence that a separate sample would have been. The prefix ends one token before the shortest prompt
does: the token before the first label heads its branch, so that every position predicts exactly one next token and
labels that are shifted beforehand (`shift_labels`) suffice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import eager_mask, flex_attention_mask, sdpa_mask

from .configuration_vision_qwen import IGNORE_INDEX

PADDING_SEGMENT = -1
"""Row and branch of padding positions."""

FLEX_BLOCK = 128
"""Side of a block of FlexAttention; in training sequences are a multiple of it long, or its gradients are not to be
trusted (pytorch#153799)."""


@dataclass(frozen=True)
class SharedPrefixRow:
    """One row laid out as one sequence of T tokens.

    Args:
        input_ids (`list[int]`, T): Prefix once, then the branches.
        position_ids (`list[int]`, T): Position of each token in its own separate sequence.
        branch_ids (`list[int]`, T): 0 for the prefix, k + 1 for branch k.
        shift_labels (`list[int]`, T): The token that each position must predict, or -100.
    """

    input_ids: list[int]
    position_ids: list[int]
    branch_ids: list[int]
    shift_labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


def lay_out(conversations: list[tuple[list[int], list[int]]]) -> SharedPrefixRow:
    """Lays conversations out as branches of their longest common prefix.

    Args:
        conversations (`list[tuple[list[int], list[int]]]`):
            `(input_ids, labels)` of each separate sequence, unshifted: `labels[i]` is `input_ids[i]` or -100. The
            first token carries no label.

    Returns:
        [`SharedPrefixRow`]: With one sequence the prefix is everything before its first label's predecessor.

    Raises:
        ValueError: When there is no conversation, or one carries no label after its first token.

    Example: prompt `1 2 3` with the completions `7 9` and `8 9` (all lower-case values are token ids):

    | | prefix | | branch 1 | | branch 2 | |
    |---|---|---|---|---|---|---|
    | `input_ids` | 1 | 2 | 3 | 7 | 3 | 8 |
    | `position_ids` | 0 | 1 | 2 | 3 | 2 | 3 |
    | `branch_ids` | 0 | 0 | 1 | 1 | 2 | 2 |
    | `shift_labels` | -100 | -100 | 7 | 9 | 8 | 9 |

    The last token of a branch predicts nothing and is left out.
    """
    if not conversations:
        raise ValueError("Expected at least one completion in a row, got none.")
    shortest_prompt = min(_first_label(labels) for _, labels in conversations)
    first = conversations[0][0]
    prefix = 0
    while prefix < shortest_prompt - 1 and all(ids[prefix] == first[prefix] for ids, _ in conversations):
        prefix += 1

    input_ids, position_ids, branch_ids = list(first[:prefix]), list(range(prefix)), [0] * prefix
    shift_labels = [IGNORE_INDEX] * prefix
    for branch, (ids, labels) in enumerate(conversations, start=1):
        end = len(ids) - 1
        input_ids += ids[prefix:end]
        position_ids += range(prefix, end)
        branch_ids += [branch] * (end - prefix)
        shift_labels += labels[prefix + 1 : end + 1]
    return SharedPrefixRow(input_ids, position_ids, branch_ids, shift_labels)


def _first_label(labels: list[int]) -> int:
    """Index of the first labelled token, which is the number of tokens before it."""
    for index, label in enumerate(labels):
        if label != IGNORE_INDEX:
            if index == 0:
                break
            return index
    raise ValueError("Expected a labelled token after at least one prompt token in every completion, got none.")


def check_attention(implementation: str) -> None:
    """Refuses attention implementations that cannot be told who may see whom.

    Args:
        implementation (`str`): What `attn_implementation` names.

    Raises:
        ValueError: For those that take no mask of ours, flash attention among them, and unknown ones.
    """
    if _mask_function(implementation) not in (sdpa_mask, eager_mask, flex_attention_mask):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot keep the branches of a row apart: it takes no mask of who "
            "sees whom. Expected 'sdpa', 'sdpa_float32', 'eager' or 'flex_attention'."
        )


def _mask_function(implementation: str) -> Callable | None:
    return AttentionMaskInterface().get(implementation)


def decoder_mask(
    config: PreTrainedConfig, segment_ids: torch.Tensor, position_ids: torch.Tensor | None, dtype: torch.dtype
) -> Any:
    """Who may see whom in a decoder's layers, in the form that its attention implementation takes.

    Args:
        config (`PreTrainedConfig`): Of the decoder; names the implementation, and the kinds and windows of its layers.
        segment_ids (`torch.LongTensor` of shape `(B, T, 2)`): Row and branch of each token; padding is -1, -1.
        position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Of each token in its separate sample, where
            windows are counted. Needed with windows only.
        dtype (`torch.dtype`): Of the hidden states.

    Returns:
        A mask over `(B, 1, T, T)`: boolean for SDPA, additive in `dtype` for eager attention, a `BlockMask` for
        FlexAttention; or, for decoders whose layers are of several kinds, a `dict` of kind -> mask, with `None` for
        layers that have no attention and therefore do not keep anything apart.

    Raises:
        ValueError: For an attention implementation or a kind of layer that takes none of these masks.
    """
    check_attention(config._attn_implementation)
    form = _mask_function(config._attn_implementation)
    window = getattr(config, "sliding_window", None)

    def build(window: int | None) -> torch.Tensor | BlockMask:
        if window is not None and position_ids is None:
            raise ValueError("Expected position_ids beside segment_ids: the decoder's windows are counted in them.")
        if form is flex_attention_mask:
            return block_mask_from_segments(segment_ids, position_ids, window)
        visible = attention_mask_from_segments(segment_ids, position_ids, window)
        if form is sdpa_mask:
            return visible
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )

    # As transformers' `create_masks_for_generate`: decoders with `layer_types` take a mask for each of them.
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        if getattr(config, "attention_chunk_size", None) is not None:
            raise ValueError(_UNKNOWN_LAYERS.format("chunked_attention"))
        return build(window)
    masks: dict[str, torch.Tensor | BlockMask | None] = {}
    for kind in dict.fromkeys(kinds):
        if kind == "full_attention":
            masks[kind] = build(None)
        elif kind == "sliding_attention":
            masks[kind] = build(window)
        elif kind == "hybrid":  # attention and a recurrence side by side
            masks |= {"full_attention": build(None), "linear_attention": None}
        elif kind in ("linear_attention", "conv"):
            masks[kind] = None
        else:
            raise ValueError(_UNKNOWN_LAYERS.format(kind))
    return masks


_UNKNOWN_LAYERS = "There is no mask of branches for {} layers."


def attention_mask_from_segments(
    segment_ids: torch.Tensor, position_ids: torch.Tensor | None = None, window: int | None = None
) -> torch.Tensor:
    """Boolean mask of who may see whom.

    Args:
        segment_ids (`torch.LongTensor` of shape `(B, T, 2)`): Row and branch of each token; padding is -1, -1.
        position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Of each token in its separate sample.
        window (`int`, *optional*): Positions that a token sees at most, its own among them.

    Returns:
        `torch.BoolTensor` of shape `(B, 1, T, T)`: True where query (axis 2) sees key (axis 3): the key is not later,
        is of the same row, is of the row's prefix or of the query's own branch, and is within the window. Every
        position sees itself, so that padding yields numbers, not NaN.
    """
    rows, branches = segment_ids[..., 0], segment_ids[..., 1]
    query_row, key_row = rows[:, :, None], rows[:, None, :]  # (B, T, 1), (B, 1, T)
    query_branch, key_branch = branches[:, :, None], branches[:, None, :]
    visible = (query_row == key_row) & ((key_branch == 0) | (key_branch == query_branch)) & (key_row >= 0)
    if position_ids is not None and window is not None:
        visible &= position_ids[:, None, :] > position_ids[:, :, None] - window
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=segment_ids.device)
    return ((visible & causal) | itself)[:, None]  # (B, 1, T, T)


def block_mask_from_segments(
    segment_ids: torch.Tensor, position_ids: torch.Tensor | None = None, window: int | None = None
) -> BlockMask:
    """The same visibility as [`attention_mask_from_segments`], as a FlexAttention `BlockMask`.

    Every key is seen by one run of queries, from itself to the end of its row (in a prefix) or of its branch, so one
    number a key is all that the kernel reads, and the blocks follow from that number alone: no `(T, T)` array, no
    compilation and nothing that the host has to wait for. A window cuts these runs by the positions.

    Args:
        segment_ids, position_ids, window: As there.

    Returns:
        `BlockMask` over `(B, 1, T, T)`; blocks in which nothing is visible are skipped.
    """
    until = visible_until(segment_ids)  # (B, T)
    batch_size, length = until.shape

    def visible(batch, head, query, key):
        seen = (key <= query) & (query < until[batch, key])
        if position_ids is not None and window is not None:
            seen = seen & (position_ids[batch, key] > position_ids[batch, query] - window)
        return seen

    num_blocks = -(-length // FLEX_BLOCK)
    # Positions beyond the end, in the last block only, are seen by nobody.
    spare = num_blocks * FLEX_BLOCK - length
    last = nn.functional.pad(until, (0, spare)).view(batch_size, 1, num_blocks, FLEX_BLOCK).amax(-1)[:, :, None]
    first = nn.functional.pad(until, (0, spare)).view(batch_size, 1, num_blocks, FLEX_BLOCK).amin(-1)[:, :, None]
    start = torch.arange(num_blocks, device=until.device)[:, None] * FLEX_BLOCK  # of a block of queries
    earlier = start > start.T
    is_full = earlier & (first >= start + FLEX_BLOCK)  # (B, 1, query blocks, key blocks)
    is_seen = (earlier & (last > start)) | (start == start.T)
    if position_ids is not None and window is not None:
        low, high = (
            nn.functional.pad(sign * position_ids, (0, spare), value=-(2**31)).view(
                batch_size, 1, num_blocks, FLEX_BLOCK
            )
            for sign in (-1, 1)
        )
        lowest, highest = -low.amax(-1), high.amax(-1)  # positions in a block, (B, 1, blocks)
        is_full &= highest[..., None] - lowest[:, :, None] < window
        is_seen &= (lowest[..., None] - highest[:, :, None] < window) | (start == start.T)
    is_partial = is_seen & ~is_full
    return BlockMask.from_kv_blocks(
        *_in_order(is_partial),
        *_in_order(is_full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def visible_until(segment_ids: torch.Tensor) -> torch.Tensor:
    """For each key the first later query that does not see it any more.

    Args:
        segment_ids (`torch.LongTensor` of shape `(B, T, 2)`): Row and branch of each token; padding is -1, -1.

    Returns:
        `torch.IntTensor` of shape `(B, T)`: The end of the key's row in a prefix, of its branch elsewhere; padding sees
        itself only.
    """
    rows, branches = segment_ids.unbind(-1)
    length = rows.shape[1]
    position = torch.arange(length, device=rows.device).expand_as(rows)
    is_row_end = nn.functional.pad(rows[:, 1:] != rows[:, :-1], (0, 1), value=True)
    is_branch_end = is_row_end | nn.functional.pad(branches[:, 1:] != branches[:, :-1], (0, 1), value=True)
    row_end, branch_end = (
        position.masked_fill(~is_end, length).flip(1).cummin(1).values.flip(1) + 1
        for is_end in (is_row_end, is_branch_end)
    )
    until = torch.where(branches == 0, row_end, branch_end)
    return torch.where(rows < 0, position + 1, until).to(torch.int32)


def _in_order(is_chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, 1, Q, K)` blocks -> how many each row has, and their numbers, chosen ones first."""
    order = is_chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return is_chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)
