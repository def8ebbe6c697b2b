"""The adapter's scale: how much of what LoRA learnt is added, from 0 (the bases) to 1 (as trained); nothing is trained.

On the line between the two lies often a model that keeps most of the new task and loses less of the old ones: WiSE-FT
(arXiv 2109.01903), for adapters. The projector is trained in full, and its start, drawn at random, is worth nothing:
it stays as trained at every scale, and so do rows of turn tokens that a decoder did not have. Text alone reads neither
the projector nor LoRA at scale 0, so that the decoder is then the base, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.helpers import rescale_adapter_scale

from .lora import PROJECTOR


@contextmanager
def at_scale(model: Any, scale: float) -> Iterator[None]:
    """Inside, the model's LoRA counts `scale` times as much.

    Args:
        model (`PeftModel`): With one LoRA adapter that is not merged.
        scale (`float`): 0..1.

    Raises:
        ValueError: When the scale is out of its range, or means nothing: for a model without LoRA, DoRA, whose lengths
            of weights are not a sum, and modules that were trained in full beside the projector.
    """
    if not 0 <= scale <= 1:
        raise ValueError(f"Expected a scale from 0 (the bases) to 1 (as trained), got {scale}.")
    if not isinstance(model, PeftModel):
        raise ValueError("A scale is LoRA's: this model is a full save, whose weights hold no part to be scaled.")
    config: Any = model.active_peft_config
    if getattr(config, "use_dora", False):
        raise ValueError("DoRA trains the lengths of weights, too, which no scale of LoRA takes back: use it as it is.")
    others = [name for name in config.modules_to_save or () if PROJECTOR not in name]
    if others:
        raise ValueError(f"A scale is LoRA's, and {', '.join(others)} were trained in full: use the model as it is.")
    with rescale_adapter_scale(model, scale):
        yield
