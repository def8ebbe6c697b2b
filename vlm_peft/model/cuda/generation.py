"""Decoding on CUDA: one step captured as a graph over a static cache and replayed for each token.

Stage: inside `generate`, by its documented hook `custom_generate`. A step of a small decoder is some 1,600 kernels, and
starting them one by one takes the host longer than the GPU needs to run them; a replayed graph is one start. In greedy
search tokens, positions, mask and the texts so far stay on the device, and the host asks only every few tokens whether
all texts have ended; beam search chooses outside the graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from ..greedy import greedy, only_bans
from .few_kernels import few_kernels, plain_norms

_TOKENS_A_LOOK = 8
"""Tokens between two looks at whether all texts have ended; each look waits for the device."""

_LENGTH_STEP = 64
"""Room in the cache comes in so many tokens; attention reads all of it."""


def can_be_static(model, prefilled) -> bool:
    """Whether every layer of a cache holds keys and values of all tokens, and so has a static layer of its kind."""
    layers = StaticCache(config=model.config.get_text_config(), max_cache_len=1).layers
    return isinstance(prefilled, DynamicCache) and all(type(layer) is StaticLayer for layer in layers)


class _StaticDecoding:
    """A static cache, what a step reads, and the graph of a step.

    Args:
        batch_size (`int`): Prompts at a time at most; smaller batches are filled up, so that they need no graph of
            their own.
        width (`int`): Tokens of each prompt in a step.
        length (`int`): Of the longest sequence, text included, that is known of; a longer one is captured anew.
    """

    def __init__(self, batch_size: int, width: int, length: int):
        self._batch_size, self._width, self._longest = batch_size, width, length
        self._room = 0
        self._norms: list = []
        self._cache: Any = None
        self._graph: Any = None

    def _make_room(self, model, length: int, device: torch.device) -> None:
        """Place for sequences of `length` tokens, and a new graph where there was too little."""
        if length <= self._room:
            return
        self._graph = None
        self._norms = plain_norms(model.base_model.language_model)
        length = max(length, self._longest)
        self._room = length + -length % _LENGTH_STEP
        self._cache = StaticCache(config=model.config.get_text_config(), max_cache_len=self._room)
        size, width = self._batch_size, self._width
        self._tokens = torch.zeros(size, width, dtype=torch.long, device=device)
        self._positions = torch.zeros(size, width, dtype=torch.long, device=device)
        self._visible = torch.zeros(size, 1, width, self._room, dtype=torch.bool, device=device)

    def _take_over(self, prefilled, mask: torch.Tensor) -> None:
        """Keys and values of the prompts, and what is seen of them, `(B, T)`."""
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
        self._visible[..., 0] = True
        self._visible[:rows, 0, :, :length] = mask.bool()[:, None]

    def _read(self, model) -> torch.Tensor:
        """Hidden states `(B, K, D_t)` of the tokens, which the cache takes in."""
        # The placeholder is never chosen, so there is none to look for, which the host would have to wait for.
        with few_kernels(model.base_model.language_model, self._norms):
            return model.base_model(
                inputs_embeds=model.get_input_embeddings()(self._tokens),
                attention_mask=self._visible,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state

    def _replay(self, step: Callable[[], None], changed: list[torch.Tensor]) -> None:
        """One step; the first one on CUDA is captured, after one that is not, which sets up the libraries.

        Args:
            step: What is captured.
            changed: Tensors that it changes, beside keys and values; they are put back after the first one.
        """
        if self._tokens.device.type != "cuda":
            return step()
        if self._graph is None:
            state = changed + [layer.cumulative_length for layer in self._cache.layers]
            before = [each.clone() for each in state]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            for each, value in zip(state, before, strict=True):
                each.copy_(value)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                step()
        self._graph.replay()
        return None


class CapturedBeams(_StaticDecoding):
    """The decoder's steps of a beam search: the beams of a prompt are columns of one row, told apart by the mask.

    Args:
        batch_size (`int`): Prompts at a time at most.
        num_beams (`int`): K.
        length (`int`, *optional*, defaults to 0): As in [`CapturedGreedy`], with the tokens of one beam.
        new (`int`, *optional*, defaults to 0): Of these, tokens of a text at most.
    """

    def __init__(self, batch_size: int, num_beams: int, length: int = 0, new: int = 0):
        super().__init__(batch_size, num_beams, length + (num_beams - 1) * new)
        self._hidden: Any = None

    def start(self, model, prefilled, mask: torch.Tensor, new: int) -> bool:
        """Takes over what was read of the prompts; `False` where this cache or batch cannot be.

        Args:
            model: Whose text it is.
            prefilled (`DynamicCache`): Of the prompts, a row each.
            mask (`torch.Tensor` of shape `(B, T)`): Of the prompts.
            new (`int`): Tokens of a text at most.
        """
        if len(mask) > self._batch_size or not can_be_static(model, prefilled):
            return False
        self._make_room(model, mask.shape[1] + self._width * new, mask.device)
        self._take_over(prefilled, mask)
        return True

    def step(self, model, tokens: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Reads the newest token of each beam.

        Args:
            model: As in `start`.
            tokens, positions (`torch.LongTensor` of shape `(B, K)`): Of the beams.
            visible (`torch.BoolTensor` of shape `(B, K, T + K * t)`): Columns that each of them sees, its own included.

        Returns:
            `torch.Tensor` of shape `(B, K, D_t)`: Hidden states, which the next step overwrites.
        """
        rows, _, seen = visible.shape
        self._tokens[:rows] = tokens
        self._positions[:rows] = positions
        self._visible[:rows, 0, :, :seen] = visible

        def read() -> None:
            self._hidden = self._read(model)

        self._replay(read, [])
        return self._hidden[:rows]


class CapturedGreedy(_StaticDecoding):
    """Body of `generate(..., custom_generate=CapturedGreedy(batch_size))`, to be kept from batch to batch.

    Args:
        batch_size (`int`): Texts at a time at most.
        length (`int`, *optional*, defaults to 0): Of the longest sequence, text included, that is known of.

    Layers with a sliding window or a state instead of keys and values, and logits processors other than the ban of the
    placeholder, are left to [`~vlm_peft.model.greedy.greedy`].
    """

    def __init__(self, batch_size: int, length: int = 0):
        super().__init__(batch_size, 1, length)
        self._eos: Any = None

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
        if not can or not can_be_static(model, prefilled):
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
        self._start(prefilled, mask, choose(hidden))
        changed = [self._visible, self._done, self._texts, self._tokens, self._positions, self._column, self._place]
        for step in range(1, new):
            self._replay(lambda: self._step(model), changed)
            if step % _TOKENS_A_LOOK == 0 and bool(self._done.all()):
                break
        texts = self._texts[: len(input_ids), :new]
        ended = self._is_end(texts).cumsum(-1)
        longest = int(((ended == 0).sum(-1) + 1).clamp(max=new).max())
        return torch.cat([input_ids, texts[:, :longest]], dim=1)

    def _prepare(self, model, length: int, eos: torch.Tensor, pad: int, choose) -> None:
        """Room for sequences of `length` tokens, and a new graph where there was too little."""
        if length <= self._room and torch.equal(eos, self._eos):
            return
        device, size = eos.device, self._batch_size
        self._graph = None
        self._make_room(model, length, device)
        self._eos, self._pad = eos, pad
        self._done = torch.zeros(size, dtype=torch.bool, device=device)
        self._texts = torch.zeros(size, self._room, dtype=torch.long, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)  # of `_texts`, to be written next
        self._place = torch.zeros(1, dtype=torch.long, device=device)  # in the cache
        self._choose = choose

    def _start(self, prefilled, mask: torch.Tensor, first: torch.Tensor) -> None:
        """Takes over what was read of the prompts, and their first tokens."""
        rows, length = mask.shape
        self._take_over(prefilled, mask)
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
        tokens = self._choose(self._read(model)[:, -1]).masked_fill(self._done, self._pad)
        self._texts.index_copy_(1, self._column, tokens[:, None])
        self._done.logical_or_(self._is_end(tokens))
        self._tokens.copy_(tokens[:, None])
        for each in (self._positions, self._column, self._place):
            each.add_(1)
