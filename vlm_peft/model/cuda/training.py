"""What only a GPU needs: compiled decoder layers, FlexAttention and one shape for all batches of a run.

Stage: between the adapted model and its trainer; called by `training.setup`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..modeling_vision_qwen import VisionQwen, base_model
from ..shared_prefix import FLEX_BLOCK


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


class CapturedDecoder:
    """Runs the decoder's forward and backward pass of a training step as two CUDA graphs.

    A compiled step of a small decoder is still some 3,000 kernels, and starting them takes the host twice as long as
    the GPU needs to run them. Takes the place of the trunk's `run_laid_out`. Batches of the first shape are replayed; a
    batch of another shape, and whatever is no training step, runs as it would without.

    Args:
        model ([`VisionQwen`] or `PeftModel`): On its device, LoRA fused and layers compiled.
    """

    # The first steps compile; PyTorch asks for warm-up before a capture.
    _PLAIN_STEPS = 2

    def __init__(self, model: VisionQwen | PeftModel):
        trunk = base_model(model).model
        self._trunk = trunk
        self._plain = trunk.run_laid_out
        self._shape: torch.Size | None = None
        self._steps = 0
        self._graphed: Callable | None = None
        trunk.run_laid_out = self  # type: ignore[method-assign, assignment]

    def __call__(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, segment_ids: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPast:
        """As `VisionQwenModel.run_laid_out`."""
        is_step = torch.is_grad_enabled() and self._trunk.training and inputs_embeds.requires_grad
        if not is_step or {name: value for name, value in kwargs.items() if value is not None} != {"use_cache": False}:
            return self._plain(inputs_embeds, position_ids, segment_ids, **kwargs)
        if self._shape is None:
            self._shape = inputs_embeds.shape
        if inputs_embeds.shape != self._shape or self._steps < self._PLAIN_STEPS:
            self._steps += inputs_embeds.shape == self._shape
            return self._plain(inputs_embeds, position_ids, segment_ids, **kwargs)
        if self._graphed is None:
            self._graphed = self._capture(inputs_embeds, position_ids, segment_ids)
        return BaseModelOutputWithPast(last_hidden_state=self._graphed(inputs_embeds, position_ids, segment_ids))

    def _capture(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, segment_ids: torch.Tensor) -> Callable:
        samples = (inputs_embeds.detach().clone().requires_grad_(), position_ids.clone(), segment_ids.clone())
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        # What autocast keeps of a weight from one use to the next would be read from outside the graph.
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            # The steps before have left nodes of the graph behind that know another stream; the capture warms up anew.
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
            return torch.cuda.make_graphed_callables(_LaidOut(self._trunk.language_model, self._plain), samples)


class _LaidOut(nn.Module):
    """The decoder as a module of tensors only, which is what can be captured."""

    def __init__(self, language_model: nn.Module, run: Callable):
        super().__init__()
        self.language_model = language_model
        self._run = run

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, segment_ids: torch.Tensor
    ) -> torch.Tensor:
        return self._run(inputs_embeds, position_ids, segment_ids, use_cache=False).last_hidden_state


def can_capture(model: VisionQwen | PeftModel, training: TrainingArguments) -> bool:
    """Whether a run's steps can be captured.

    Not with several batches or processes to an optimizer step, since a replay overwrites the gradients of the one
    before; not with dropout, whose random numbers a replay would repeat, nor with activations computed anew; nor with
    an embedding that trains, or rows of it, which a capture of the decoder would miss among what it uses.
    """
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return (
        training.device.type == "cuda"
        and training.gradient_accumulation_steps == training.world_size == 1
        and not training.gradient_checkpointing
        and not has_dropout
        and base_model(model).config.turn_token_ids is None
        and not any(each.requires_grad for each in base_model(model).get_input_embeddings().parameters())
    )


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
    return tokens + -tokens % FLEX_BLOCK


@contextmanager
def plain_decoder(model: VisionQwen | PeftModel) -> Iterator[None]:
    """Runs the block without compiled layers, and with SDPA (or eager attention) in place of FlexAttention.

    For texts of growing length, each of which would be compiled.
    """
    base = base_model(model)
    attention = base.model.language_model.config._attn_implementation
    if attention == "flex_attention":
        plain = "sdpa" if type(base.model.language_model)._supports_sdpa else "eager"
        base.set_attn_implementation({"text_config": plain})
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if attention == "flex_attention":
            base.set_attn_implementation({"text_config": attention})
