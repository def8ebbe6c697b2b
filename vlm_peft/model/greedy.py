"""Greedy decoding: the likeliest token at each step, without writing a row of logits for each of them.

Stage: inside `generate`, by its documented hook `custom_generate=greedy`. Two things are saved. Texts that have ended
leave the batch. And where the head is large, on a CPU, its fp32 logits are computed for a handful of tokens only: their
bfloat16 approximation, which takes a third of the time, is within a known distance of them, so every token that could
still be the likeliest is known, and fp32 decides among these. The result is the argmax of the fp32 logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import LogitsProcessorList, PreTrainedModel, SuppressTokensLogitsProcessor

from .cpu.choices import fastest
from .cpu.screening import UNIT, logit_error

_SCREENED_ROWS = 16_384
"""Smaller heads are not worth a second copy in bfloat16."""

_PROBED_TEXTS = 16

_MOST_CANDIDATES = 256
"""Of a text; beyond them the whole head is computed."""

_SAMPLED_TILE = 8192

_BLOCK = 64
"""Tokens whose largest logit is looked at before they are."""


class ScreenedArgmax:
    """Argmax over the rows of a frozen fp32 head, exact, with most of the arithmetic in bfloat16.

    Args:
        weight (`torch.Tensor` of shape `(V, D_t)`): Of the head, fp32; a copy in bfloat16 is kept.
        banned (`list[int]`): Token ids that are never chosen.
    """

    def __init__(self, weight: torch.Tensor, banned: list[int]):
        self._weight = weight
        self._banned = banned
        self._low = nn.functional.pad(weight, (0, 0, 0, -len(weight) % _BLOCK)).to(torch.bfloat16)
        self._longest = torch.linalg.vector_norm(weight, dim=1).max()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `(B, D_t)` in fp32 -> token ids `(B,)`."""
        approximate = nn.functional.linear(hidden.to(torch.bfloat16), self._low)  # (B, V), padded to whole blocks
        approximate[:, len(self._weight) :] = -torch.inf
        if self._banned:
            approximate[:, self._banned] = -torch.inf
        approximate = approximate.view(len(hidden), -1, _BLOCK)
        of_blocks = approximate.amax(-1)  # (B, V / _BLOCK)
        top = of_blocks.amax(-1, keepdim=True).float()
        length = torch.linalg.vector_norm(hidden, dim=1, keepdim=True)
        error = logit_error(length, self._longest, top)
        # A threshold rounded up to bfloat16 would lose a candidate.
        threshold = (top - 2 * error).mul(1 - UNIT * torch.sign(top - 2 * error)).to(torch.bfloat16)
        text, block = (of_blocks >= threshold).nonzero(as_tuple=True)
        if len(text) > _MOST_CANDIDATES * len(hidden):
            return _argmax(hidden, self._weight, self._banned)
        place, offset = (approximate[text, block] >= threshold[text]).nonzero(as_tuple=True)
        text, token = text[place], block[place] * _BLOCK + offset
        if len(text) > _MOST_CANDIDATES * len(hidden):
            return _argmax(hidden, self._weight, self._banned)
        logits = (hidden[text] * self._weight[token]).sum(-1)
        best = logits.new_full((len(hidden),), -torch.inf).scatter_reduce(0, text, logits, "amax")
        is_best = logits == best[text]
        chosen = torch.full((len(hidden),), len(self._weight), device=hidden.device)
        return chosen.scatter_reduce(0, text[is_best], token[is_best], "amin")


def _argmax(hidden: torch.Tensor, weight: torch.Tensor, banned: list[int]) -> torch.Tensor:
    logits = nn.functional.linear(hidden, weight)
    for token in banned:
        # Not by a list, which the host would have to hand over.
        logits[:, token] = -torch.inf
    return logits.argmax(-1)


def is_large_on_cpu(weight: torch.Tensor) -> bool:
    """Whether a head `(V, D_t)` is worth more than one way of its own: fp32 on a CPU, and of many tokens."""
    return len(weight) >= _SCREENED_ROWS and weight.dtype == torch.float32 and weight.device.type == "cpu"


def make_argmax(model: PreTrainedModel | PeftModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """The fastest exact argmax for a model's head: hidden states `(B, D_t)` -> token ids `(B,)`."""
    weight: torch.Tensor = model.get_output_embeddings().weight.detach()
    # The placeholder may lie outside the vocabulary, where nothing can be chosen.
    banned = [token for token in [model.config.image_token_id] if token < len(weight)]
    if is_large_on_cpu(weight) and _is_screening_faster(weight):
        return ScreenedArgmax(weight, banned)
    return lambda hidden: _argmax(hidden.to(weight.dtype), weight, banned)


def _is_screening_faster(weight: torch.Tensor) -> bool:
    """Measured on a part of the head: without instructions for bfloat16, it can take a hundred times as long."""
    part = weight[:_SCREENED_ROWS]
    hidden, screened = part[:_PROBED_TEXTS], ScreenedArgmax(part, [])
    ways = {"plain": lambda: _argmax(hidden, part, []), "screened": lambda: screened(hidden)}
    return fastest(f"greedy, {weight.shape[1]} wide", ways) == "screened"


def make_sampler(model: PreTrainedModel | PeftModel, temperature: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Draws tokens with the probabilities softmax(logits / temperature): hidden states `(B, D_t)` -> ids `(B,)`.

    The largest sum of a logit and Gumbel noise is such a draw (Gumbel, Statistical Theory of Extreme Values, 1954), and
    the largest of tiles' largest is the largest: logits of one tile at a time are in memory.
    """
    weight: torch.Tensor = model.get_output_embeddings().weight.detach()
    banned = model.config.image_token_id

    def sample(hidden: torch.Tensor) -> torch.Tensor:
        values, places = [], []
        for first in range(0, len(weight), _SAMPLED_TILE):
            tile = nn.functional.linear(hidden.to(weight.dtype), weight[first : first + _SAMPLED_TILE]).float()
            if first <= banned < first + tile.shape[1]:
                tile[:, banned - first] = -torch.inf
            tile = tile / temperature - torch.empty_like(tile).exponential_().log_()
            value, place = tile.max(-1)
            values.append(value)
            places.append(place + first)
        best = torch.stack(values).argmax(0, keepdim=True)
        return torch.stack(places).gather(0, best)[0]

    return sample


def only_bans(model: PreTrainedModel, logits_processor: LogitsProcessorList) -> bool:
    """Whether the processors ban the placeholder, as [`make_argmax`] does, and do nothing else."""
    return all(
        isinstance(each, SuppressTokensLogitsProcessor)
        and each.suppress_tokens.tolist() == [model.config.image_token_id]
        for each in logits_processor
    )


def greedy(
    model,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    stopping_criteria,
    generation_config,
    choose=None,
    **inputs,
) -> torch.Tensor:
    """Body of `generate(..., custom_generate=greedy)`; see `GenerationMixin._sample` for the arguments.

    Args:
        choose (`Callable`, *optional*): Of [`make_argmax`] or [`make_sampler`], to be kept from batch to batch.

    Returns:
        `torch.LongTensor` of shape `(B, T + new)`: Prompt and text, padded after its end.
    """
    cache, mask = inputs["past_key_values"], inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    images = {name: inputs[name] for name in ("pixel_values", "mm_encoder_outputs") if inputs.get(name) is not None}
    pad = generation_config.pad_token_id
    may_choose = choose is not None and only_bans(model, logits_processor)
    whole = input_ids
    active = torch.arange(len(input_ids), device=input_ids.device)
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    past = cache.get_seq_length()
    step = {"input_ids": input_ids[:, past:], "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]} | images
    while True:
        hidden = model.base_model(**step, attention_mask=mask, past_key_values=cache, use_cache=True)
        hidden = hidden.last_hidden_state[:, -1]  # (B, D_t)
        if may_choose:
            tokens = choose(hidden)
        else:
            scores = model.get_output_embeddings()(hidden).float()
            tokens = logits_processor(input_ids, scores).argmax(-1)
        tokens = tokens.masked_fill(done, pad)
        column = whole.new_full((len(whole), 1), pad)
        column[active, 0] = tokens
        whole = torch.cat([whole, column], dim=1)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        done = done | stopping_criteria(input_ids, None)
        if done.all():
            return whole
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        # Dropping rows copies the cache.
        if done.sum() >= 0.25 * len(done):
            keep = (~done).nonzero().flatten()
            active, input_ids, mask, tokens, done = (each[keep] for each in (active, input_ids, mask, tokens, done))
            # Unlike `batch_select_indices`, caches of recurrent states have it, too.
            cache.reorder_cache(keep)
        step = {"input_ids": tokens[:, None], "position_ids": (mask.sum(-1) - 1)[:, None]}
