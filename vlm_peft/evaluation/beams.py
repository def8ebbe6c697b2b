"""Beam search: the likeliest texts that keeping `num_beams` of them at each step finds, equal to transformers' own.

Stage: inside `generate`, by its documented hook `custom_generate=beam_search`. Three things are saved. The beams of a
prompt are columns of one row, told apart by the mask: the prompt's keys and values are read and kept once, and those of
the beams are never moved, since a beam that goes on from another one just sees what that one saw. Prompts whose search
has ended leave the batch. And where the head is large, on a CPU, its logits are used tile by tile and never written:
a step needs their sum and a handful of the largest.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..data.probe import probe
from ..model.cuda.generation import CapturedBeams
from ..model.greedy import is_large_on_cpu

TILE = 8192
"""Tokens of a tile of logits; larger ones are slower with many beams, smaller ones with few."""

_BLOCK = 32
"""Tokens whose largest logit is looked at before they are."""

_NEVER = -1e9
"""Added to the score of what must not be chosen, as in transformers."""

Best = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The C best continuations of each prompt: scores, beams and tokens, `(B, C)` each, best first."""

Search = Callable[[torch.Tensor, torch.Tensor, int], Best]
"""Of hidden states `(B, K, D_t)`, scores of the beams `(B, K)` and C."""


def beam_search(
    model,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    stopping_criteria,
    generation_config,
    captured: CapturedBeams | None = None,
    **inputs,
) -> torch.Tensor:
    """Body of `generate(..., custom_generate=beam_search)`; see `GenerationMixin._beam_search` for the arguments.

    Args:
        captured ([`CapturedBeams`], *optional*): Reads the beams' tokens on CUDA, to be kept from batch to batch.

    A cache that holds the beginning of the prompts already (`past_key_values`) has one row for each prompt. What this
    search does not know is left to transformers' own: sampled beams, other processors of logits than suppressed tokens,
    scores beside the texts, and decoders whose attention or cache takes no mask of ours.

    Returns:
        `torch.LongTensor` of shape `(B * num_return_sequences, T + new)`: Prompt and text, padded after its end.
    """
    settings, num_beams, cache = generation_config, generation_config.num_beams, inputs.get("past_key_values")
    head = model.get_output_embeddings()
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    ends = [end for end in ends if end is not None]
    # So many that enough of them go on when the best ones end.
    num_candidates = max(2, 1 + len(ends)) * num_beams
    bans = [each.suppress_tokens.tolist() for each in logits_processor if type(each) is SuppressTokensLogitsProcessor]
    banned = sorted({token for each in bans for token in each if token < len(head.weight)})
    if (
        settings.do_sample
        or settings.return_dict_in_generate
        or len(bans) < len(logits_processor)
        or num_candidates > len(head.weight) - len(banned)
        or model.base_model.language_model.config._attn_implementation not in ("sdpa", "sdpa_float32")
        or not probe(model).sharing
        or cache is None
        or any(type(layer) is not DynamicLayer for layer in cache.layers)
    ):
        if cache is not None and cache.get_seq_length() > 0:
            cache.batch_repeat_interleave(num_beams)
        return model._beam_search(input_ids, logits_processor, stopping_criteria, generation_config, **inputs)

    prompts, mask = input_ids[::num_beams], inputs.get("attention_mask")
    mask = torch.ones_like(prompts) if mask is None else mask[::num_beams]
    longest = settings.max_length - prompts.shape[1]
    search = make_search(head, banned)
    whole = prompts.new_full((len(prompts), num_beams, longest), -1)
    active = torch.arange(len(prompts), device=prompts.device)
    texts = prompts.new_empty(len(prompts), 1, 0)  # of the running beams, (B, K, t)
    scores = torch.zeros(len(prompts), 1, device=prompts.device)  # of the running beams: nats, (B, K)
    finished, is_finished = whole, torch.zeros(whole.shape[:2], dtype=torch.bool, device=prompts.device)
    finished_scores = scores.new_full(is_finished.shape, _NEVER)
    can_improve = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    is_closed = ~can_improve

    past, num_tokens = cache.get_seq_length(), mask.sum(-1, keepdim=True)
    visible = mask.bool()[:, None]  # (B, K, T)
    step = {"input_ids": prompts[:, past:], "attention_mask": mask} | _images_of_prompts(
        model, input_ids, inputs, num_beams
    )
    step["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
    for length in range(1, longest + 1):
        if length > 1 and captured is not None:
            hidden = captured.step(model, step["input_ids"], step["position_ids"], visible)
        else:
            hidden = model.base_model(**step, past_key_values=cache, use_cache=True).last_hidden_state
        if length == 1 and captured is not None and not captured.start(model, cache, mask, longest):
            captured = None
        found, parents, tokens = search(hidden[:, -scores.shape[1] :], scores, num_candidates)  # (B, C)
        texts = torch.cat([_pick(texts, parents), tokens[..., None]], dim=2)
        rows = torch.cat([prompts[:, None].expand(-1, num_candidates, -1), texts], dim=2)
        is_end = stopping_criteria(rows.flatten(0, 1), None).view_as(tokens)

        # Those of the best that end join the finished texts, unless the search of their prompt is closed.
        is_new = is_end & (torch.arange(num_candidates, device=tokens.device) < num_beams)
        new_scores = found / length**settings.length_penalty + _NEVER * (~is_new | is_closed[:, None]).float()
        finished_scores, best = torch.cat([finished_scores, new_scores], dim=1).topk(num_beams)
        padded = nn.functional.pad(texts, (0, longest - length), value=-1)
        finished = _pick(torch.cat([finished, padded], dim=1), best)
        is_finished = torch.cat([is_finished, is_new], dim=1).gather(1, best)
        whole[active] = finished

        # The best of the others go on.
        found = found + _NEVER * is_end.float()
        chosen = found.topk(num_beams).indices
        scores, parents, tokens = (each.gather(1, chosen) for each in (found, parents, tokens))
        texts = _pick(texts, chosen)
        reach = longest if settings.early_stopping == "never" and settings.length_penalty > 0 else length
        can_improve &= scores[:, 0] / reach**settings.length_penalty > finished_scores.amin(-1)
        is_closed = ~can_improve | (is_finished.all(-1) & (settings.early_stopping is True))
        if is_closed.all() or is_end.all():
            break

        itself = torch.eye(num_beams, dtype=torch.bool, device=visible.device).expand(len(visible), -1, -1)
        visible = torch.cat([_pick(visible, parents), itself], dim=2)
        # Dropping rows copies the cache; a captured step has all rows.
        if captured is None and is_closed.sum() >= 0.25 * len(is_closed):
            keep = (~is_closed).nonzero().flatten()
            cache.batch_select_indices(keep)
            active, prompts, num_tokens, visible = (each[keep] for each in (active, prompts, num_tokens, visible))
            texts, scores, tokens = (each[keep] for each in (texts, scores, tokens))
            finished, finished_scores, is_finished = (each[keep] for each in (finished, finished_scores, is_finished))
            can_improve, is_closed = can_improve[keep], is_closed[keep]
        positions = (num_tokens + length - 1).expand_as(tokens)
        step = {"input_ids": tokens, "position_ids": positions, "attention_mask": visible[:, None]}

    answers = whole[:, : settings.num_return_sequences].flatten(0, 1)
    answers = answers[:, : (answers >= 0).sum(-1).max()]
    pad = settings.pad_token_id if settings.pad_token_id is not None else next(iter(ends), 0)
    answers = answers.masked_fill(answers < 0, pad)
    return torch.cat([input_ids[::num_beams].repeat_interleave(settings.num_return_sequences, dim=0), answers], dim=1)


def _pick(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Of `values` `(B, K, T)`, those of the columns `(B, C)` -> `(B, C, T)`."""
    return values.gather(1, columns[..., None].expand(-1, -1, values.shape[2]))


def _images_of_prompts(model, input_ids: torch.Tensor, inputs: dict, num_beams: int) -> dict:
    """The image tokens of each prompt once; `generate` has repeated them for each beam."""
    outputs = (inputs.get("mm_encoder_outputs") or {}).get("image")
    if outputs is None:
        return {}
    num_images = (input_ids == model.config.image_token_id).sum(-1) // model.config.num_image_tokens
    is_first = torch.arange(len(input_ids), device=input_ids.device) % num_beams == 0
    tokens = outputs.pooler_output[is_first.repeat_interleave(num_images)]
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tokens)}}


def make_search(head: nn.Linear, banned: list[int]) -> Search:
    """The fastest exact search for the best continuations under a head, without its tokens `banned`."""
    weight = head.weight.detach()
    if is_large_on_cpu(weight):
        return partial(_search_in_tiles, weight, banned)
    return partial(_search_written, head, torch.tensor(banned, dtype=torch.long, device=weight.device))


def _search_written(
    head: nn.Linear, banned: torch.Tensor, hidden: torch.Tensor, scores: torch.Tensor, count: int
) -> Best:
    """As [`Search`], from all logits at once; of a whole vocabulary a top-k takes longer than all the rest."""
    log_probs = head(hidden).float().log_softmax(-1).index_fill_(2, banned, -torch.inf)  # (B, K, V)
    log_probs = nn.functional.pad(log_probs, (0, -log_probs.shape[2] % _BLOCK), value=-torch.inf)
    blocks = log_probs.unflatten(2, (-1, _BLOCK))
    of_blocks = blocks.amax(-1) + scores[..., None]  # (B, K, blocks)
    place = of_blocks.flatten(1).topk(min(count, of_blocks[0].numel())).indices
    beam, block = place // of_blocks.shape[2], place % of_blocks.shape[2]  # (B, C)
    prompt = torch.arange(len(place), device=place.device)[:, None]
    found, place = (blocks[prompt, beam, block] + scores.gather(1, beam)[..., None]).flatten(1).topk(count)
    chosen = place // _BLOCK
    return found, beam.gather(1, chosen), block.gather(1, chosen) * _BLOCK + place % _BLOCK


def _search_in_tiles(
    weight: torch.Tensor, banned: list[int], hidden: torch.Tensor, scores: torch.Tensor, count: int
) -> Best:
    """As [`Search`]: the C best tokens are in the C blocks whose best tokens are the best."""
    rows = hidden.flatten(0, 1)  # (B * K, D_t)
    # A thread that allocates its tiles itself takes twice as long.
    buffers = rows.new_empty(torch.get_num_threads(), len(rows) * TILE)

    def read(buffer: torch.Tensor, starts: range) -> tuple[torch.Tensor, torch.Tensor]:
        tops, totals = [], []
        for first in starts:
            keys = weight[first : first + TILE]
            tile = torch.mm(rows, keys.t(), out=buffer[: len(rows) * len(keys)].view(len(rows), len(keys)))
            tile[:, [token - first for token in banned if first <= token < first + len(keys)]] = -torch.inf
            tile = nn.functional.pad(tile, (0, -len(keys) % _BLOCK), value=-torch.inf)
            top = tile.view(len(rows), -1, _BLOCK).amax(-1)
            highest = top.amax(-1, keepdim=True).clamp(min=torch.finfo(tile.dtype).min)
            tops.append(top)
            totals.append(highest + tile.sub_(highest).exp_().sum(-1, keepdim=True).log_())
        return torch.cat(tops, dim=1), torch.cat(totals, dim=1)

    tops, totals = zip(*_on_all_cores(read, buffers, range(0, len(weight), TILE)), strict=True)
    # As in transformers, tokens that are not chosen have their share of the probability.
    total = torch.cat([*totals, torch.mm(rows, weight[banned].t())], dim=1).logsumexp(-1).view_as(scores)
    of_blocks = torch.cat(tops, dim=1).view(*scores.shape, -1) - (total - scores)[..., None]  # (B, K, blocks)
    place = of_blocks.flatten(1).topk(min(count, of_blocks[0].numel())).indices
    beam, block = place // of_blocks.shape[2], place % of_blocks.shape[2]  # (B, C)
    tokens = block[..., None] * _BLOCK + torch.arange(_BLOCK)  # (B, C, _BLOCK)
    is_out = (tokens >= len(weight)) | torch.isin(tokens, torch.tensor(banned, dtype=tokens.dtype))
    keys = weight[tokens.clamp(max=len(weight) - 1)]  # (B, C, _BLOCK, D_t)
    logits = torch.matmul(keys, _pick(hidden, beam)[..., None])[..., 0].masked_fill(is_out, -torch.inf)
    log_probs = logits - total.gather(1, beam)[..., None]
    found, place = (log_probs + scores.gather(1, beam)[..., None]).flatten(1).topk(count)
    return found, beam.gather(1, place // _BLOCK), tokens.flatten(1).gather(1, place)


def _on_all_cores(function: Callable, buffers: Iterable, values: range) -> list:
    """Results of `function` for each of as many shares of `values` as there are buffers, each in a thread of its own.

    Operations that torch divides among threads wait for the slowest of them each time; on a machine that does something
    else as well, these waits took four times as long as the computing.
    """
    count = torch.get_num_threads()
    ends = [len(values) * share // count for share in range(count + 1)]
    shares = [values[start:end] for start, end in pairwise(ends)]
    calls = [(buffer, share) for buffer, share in zip(buffers, shares, strict=True) if share]
    if len(calls) == 1:
        return [function(*calls[0])]
    # Each thread has a mode of its own, and only inference mode may write into what was made in it.
    function = torch.inference_mode(torch.is_inference_mode_enabled())(function)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            return list(threads.map(function, *zip(*calls, strict=True)))
    finally:
        torch.set_num_threads(count)
