"""Perplexity: how well a decoder still predicts plain text, paragraph by paragraph; no pictures, no chat format.

Stage: beside the scores of tasks; what a model has forgotten of its language shows here first.
"""

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..model.modeling_vision_qwen import VisionQwen, base_model
from ..model.processing_vision_qwen import VisionQwenProcessor

SAMPLE = Path(__file__).with_name("general_english.txt")
"""Twelve paragraphs of general English, written for this project and under its licence."""

_WINDOW = 512


def read_paragraphs(path: Path | str) -> list[str]:
    """Paragraphs of a text file, which blank lines divide.

    Raises:
        ValueError: When it holds no text, or is no UTF-8.
        OSError: When it cannot be read.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path}: expected a text file, got a folder, pipe or device.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x}.") from error
    found = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    if not found:
        raise ValueError(f"{path}: expected paragraphs of text, got an empty file.")
    return found


def text_nats(model: VisionQwen | PeftModel, processor: VisionQwenProcessor, paragraphs: list[str]) -> list[float]:
    """Nats a token of each paragraph; the exponential of their mean is the perplexity.

    Args:
        model ([`VisionQwen`] or `PeftModel`): In evaluation mode.
        processor ([`VisionQwenProcessor`]): Its tokenizer.
        paragraphs (`list[str]`): What is longer than 512 tokens, or than the decoder takes, is read in windows.

    Returns:
        `list[float]`: Of the tokens after the first of each window.

    Raises:
        ValueError: For a paragraph of a single token, which nothing predicts.
    """
    base = base_model(model)
    text_config: Any = base.config.text_config
    window = min(_WINDOW, getattr(text_config, "max_position_embeddings", None) or _WINDOW)
    found = []
    for paragraph in paragraphs:
        ids = processor.tokenizer(paragraph, add_special_tokens=False)["input_ids"]
        if len(ids) < 2:
            raise ValueError(f"Expected a paragraph of two or more tokens, got {paragraph!r}.")
        total, count = 0.0, 0
        for start in range(0, len(ids), window):
            part = torch.tensor([ids[start : start + window]], device=base.device)
            if part.shape[1] < 2:
                continue
            with torch.inference_mode():
                logits = base(input_ids=part).logits[0, :-1].float()
            total += nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum").item()
            count += part.shape[1] - 1
        found.append(total / count)
    return found


def perplexity(nats: list[float]) -> float:
    """Of paragraphs, from [`text_nats`]."""
    return math.exp(sum(nats) / len(nats))
