"""Confidence: how sure a model is of each thing that it writes, such as a box, by the probabilities of its own tokens.

Stage: beside `generation`, for tasks that say where in a text these things are (`TaskKind.spans`). The texts are those
of `generation`, to the byte; one further pass over prompt and text has the probability of every token, whatever search
found it.

A detector's confidence is the probability that a thing is there, times the quality of its place (FCOS, arXiv
1904.01355, section 3.3). Of a box as text, `; dog [12, 40, 300, 512]`, the tokens up to the bracket decide whether
there is one more box and what it is, against `none`, another name or the end; their probabilities are multiplied. Those
of the box say how sharply the model sees where it is; of them the geometric mean is taken, since the product of a
dozen digits, each right to a thousandth of the picture, would say little of whether anything is there.
"""

import math
from collections.abc import Callable

import torch
from peft import PeftModel

from ..model.modeling_vision_qwen import VisionQwen
from ..model.processing_vision_qwen import VisionQwenProcessor
from .choices import answer_log_probs
from .generation import decode_answers, encode_prompts, generate_ids


def generate_with_confidences(
    model: VisionQwen | PeftModel,
    processor: VisionQwenProcessor,
    prompts: list[list[dict]],
    image_ids: list[list[int]],
    fetch_images: Callable[[list[int]], dict[str, torch.Tensor]],
    spans: Callable[[str], list[tuple[int, int, int]]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    num_beams: int = 1,
    progress: str | None = None,
) -> list[tuple[str, list[float]]]:
    """Generates as [`~vlm_peft.evaluation.generation.generate_texts`], and says how sure the model is of its boxes.

    Args:
        model, processor, prompts, image_ids, fetch_images, batch_size, max_new_tokens, num_beams, progress: See there.
        spans (`Callable`): Of the task; text -> for each box where its entry begins, its bracket opens, it ends.

    Returns:
        `list[tuple[str, list[float]]]`: The text, and for each of its boxes, in their order, a number in 0..1.

    Raises:
        ValueError: As there.
    """
    encoded = encode_prompts(processor, prompts)
    generated = generate_ids(
        model,
        processor,
        encoded,
        image_ids,
        fetch_images,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        progress=progress,
    )
    texts = [text.strip() for text in decode_answers(processor, generated)]
    found = [spans(text) for text in texts]
    # Without a box there is nothing to be sure of.
    asked = [index for index, boxes in enumerate(found) if boxes]
    log_probs = answer_log_probs(
        model,
        processor,
        [encoded[index] for index in asked],
        [image_ids[index] for index in asked],
        fetch_images,
        [generated[index] for index in asked],
        batch_size=batch_size,
    )
    confidences: list[list[float]] = [[] for _ in texts]
    for index, nats in zip(asked, log_probs, strict=True):
        starts = _starts(processor, generated[index])
        confidences[index] = [_confidence(starts, nats, *span) for span in found[index]]
    return list(zip(texts, confidences, strict=True))


def _confidence(starts: list[int], nats: list[float], begin: int, bracket: int, end: int) -> float:
    """Of the box in `text[begin:end]`, from where each token starts in the text."""
    what = sum(value for start, value in zip(starts, nats, strict=True) if begin <= start < bracket)
    where = [value for start, value in zip(starts, nats, strict=True) if bracket <= start < end]
    # One token may hold the end of the label and the whole bracket.
    return round(math.exp(what + sum(where) / max(1, len(where))), 6)


def _starts(processor: VisionQwenProcessor, ids: list[int]) -> list[int]:
    """Where in the stripped text each token begins."""
    *beginnings, whole = decode_answers(processor, [ids[:count] for count in range(len(ids) + 1)])
    stripped = len(whole) - len(whole.lstrip())
    # A beginning may end in half a character.
    return [max(0, len(text.rstrip("\ufffd")) - stripped) for text in beginnings]
