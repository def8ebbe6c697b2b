"""Greedy decoding on CUDA: one step captured as a graph over a static cache and replayed for each token.

Stage: inside `generate`, by its documented hook `custom_generate`. A step of a small decoder is some 1,600 kernels, and
starting them one by one takes the host longer than the GPU needs to run them; a replayed graph is one start. Tokens,
positions, mask and the texts so far stay on the device, and the host asks only every few tokens whether all texts have
ended.
"""

from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from ..greedy import greedy, only_bans

_TOKENS_A_LOOK = 8
"""Tokens between two looks at whether all texts have ended; each look waits for the device."""

_LENGTH_STEP = 256
"""Room in the cache grows by so many tokens: a longer one is captured anew."""


class CapturedGreedy:
    """Body of `generate(..., custom_generate=CapturedGreedy(batch_size))`, to be kept from batch to batch.

    Args:
        batch_size (`int`): Texts at a time at most; smaller batches are filled up, so that they need no graph of their
            own.

    Layers with a sliding window or a state instead of keys and values, and logits processors other than the ban of the
    placeholder, are left to [`~vlm_peft.model.greedy.greedy`].
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._room = 0
        self._eos: Any = None
        self._cache: Any = None
        self._graph: Any = None

    def __call__(
        self, model, input_ids: Any, logits_processor, stopping_criteria, generation_config, choose, **inputs
    ) -> torch.Tensor:
        """As [`~vlm_peft.model.greedy.greedy`].

        Returns:
            `torch.LongTensor` of shape `(B, T + new)`: Prompt and text, padded after its end.
        """
        new = generation_config.max_length - input_ids.shape[1]
        prefilled = inputs["past_key_values"]
        can = new > 1 and len(input_ids) <= self._batch_size and only_bans(model, logits_processor)
        if not can or not self._has_keys_only(model, prefilled):
            return greedy(
                model, input_ids, logits_processor, stopping_criteria, generation_config, choose=choose, **inputs
            )
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        past = prefilled.get_seq_length()
        images = {name: inputs[name] for name in ("pixel_values", "mm_encoder_outputs") if inputs.get(name) is not None}
        hidden = model.base_model(
            input_ids=input_ids[:, past:],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, past:],
            attention_mask=mask,
            past_key_values=prefilled,
            use_cache=True,
            **images,
        ).last_hidden_state[:, -1]
        eos = torch.as_tensor(generation_config.eos_token_id, device=hidden.device).reshape(-1)
        self._prepare(model, input_ids.shape[1] + new, eos, generation_config.pad_token_id, choose)
        self._start(prefilled, mask, choose(hidden), new)
        for step in range(1, new):
            self._replay(model)
            if step % _TOKENS_A_LOOK == 0 and bool(self._done.all()):
                break
        texts = self._texts[: len(input_ids), :new]
        ended = self._is_end(texts).cumsum(-1)
        longest = int(((ended == 0).sum(-1) + 1).clamp(max=new).max())
        return torch.cat([input_ids, texts[:, :longest]], dim=1)

    @staticmethod
    def _has_keys_only(model, prefilled) -> bool:
        """Whether every layer of the cache holds keys and values of all tokens."""
        static = StaticCache(config=model.config.get_text_config(), max_cache_len=1)
        layers = static.layers
        return isinstance(prefilled, DynamicCache) and all(type(layer) is StaticLayer for layer in layers)

    def _prepare(self, model, length: int, eos: torch.Tensor, pad: int, choose) -> None:
        """Room for sequences of `length` tokens, and a new graph where there was too little."""
        if length <= self._room and torch.equal(eos, self._eos):
            return
        device, self._graph = eos.device, None
        self._eos, self._pad = eos, pad
        self._room = length + -length % _LENGTH_STEP
        self._cache = StaticCache(config=model.config.get_text_config(), max_cache_len=self._room)
        size = self._batch_size
        self._tokens = torch.zeros(size, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros(size, 1, dtype=torch.long, device=device)
        self._visible = torch.zeros(size, 1, 1, self._room, dtype=torch.bool, device=device)
        self._done = torch.zeros(size, dtype=torch.bool, device=device)
        self._texts = torch.zeros(size, self._room, dtype=torch.long, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)  # of `_texts`, to be written next
        self._place = torch.zeros(1, dtype=torch.long, device=device)  # in the cache
        self._choose = choose

    def _start(self, prefilled, mask: torch.Tensor, first: torch.Tensor, new: int) -> None:
        """Takes over what was read of the prompts, and their first tokens."""
        rows, length = mask.shape
        if not self._cache.layers[0].is_initialized:
            for ours, theirs in zip(self._cache.layers, prefilled.layers, strict=True):
                shape = (self._batch_size, theirs.keys.shape[1], 1, theirs.keys.shape[3])
                ours.lazy_initialization(theirs.keys.new_zeros(shape), theirs.values.new_zeros(shape))
        for ours, theirs in zip(self._cache.layers, prefilled.layers, strict=True):
            ours.keys[:rows, :, :length] = theirs.keys
            ours.values[:rows, :, :length] = theirs.values
            ours.cumulative_length.fill_(length)
        self._visible.zero_()
        # A row that sees nothing would yield NaN.
        self._visible[:, ..., 0] = True
        self._visible[:rows, 0, 0, :length] = mask.bool()
        self._tokens[:rows, 0] = first
        self._positions[:rows, 0] = mask.sum(-1)
        self._done.fill_(True)
        self._done[:rows] = self._is_end(first)
        self._texts.fill_(self._pad)
        self._texts[:rows, 0] = first
        self._column.fill_(1)
        self._place.fill_(length)

    def _is_end(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.isin(tokens, self._eos)

    def _step(self, model) -> None:
        """Reads one token of each text and writes the next one; nothing leaves the device."""
        self._visible.index_fill_(3, self._place, True)
        # The placeholder is never chosen, so there is none to look for, which the host would have to wait for.
        hidden = model.base_model(
            inputs_embeds=model.get_input_embeddings()(self._tokens),
            attention_mask=self._visible,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        tokens = self._choose(hidden).masked_fill(self._done, self._pad)
        self._texts.index_copy_(1, self._column, tokens[:, None])
        self._done.logical_or_(self._is_end(tokens))
        self._tokens.copy_(tokens[:, None])
        for each in (self._positions, self._column, self._place):
            each.add_(1)

    def _replay(self, model) -> None:
        """One step; the first one on CUDA is captured, after one that is not, which sets up the libraries."""
        if self._tokens.device.type != "cuda":
            return self._step(model)
        if self._graph is None:
            state = [self._visible, self._done, self._texts, self._tokens, self._positions, self._column, self._place]
            state += [layer.cumulative_length for layer in self._cache.layers]
            before = [each.clone() for each in state]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step(model)
            torch.cuda.current_stream().wait_stream(stream)
            for each, value in zip(state, before, strict=True):
                each.copy_(value)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step(model)
        self._graph.replay()
        return None
