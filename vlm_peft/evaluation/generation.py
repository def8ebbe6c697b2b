"""Generation: prompts -> texts, batched, with a key-value cache, each picture encoded once.

Stage: trained model -> `list[str]`; called by evaluation and by the command line.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from ..data.probe import probe
from ..model.cuda.generation import CapturedBeams, CapturedGreedy
from ..model.greedy import greedy, make_argmax, make_sampler
from ..model.modeling_vision_qwen import VisionQwen, base_model
from ..model.processing_vision_qwen import VisionQwenProcessor
from .beams import beam_search


def generate_texts(
    model: VisionQwen | PeftModel,
    processor: VisionQwenProcessor,
    prompts: list[list[dict]],
    image_ids: list[list[int]],
    fetch_images: Callable[[list[int]], dict[str, torch.Tensor]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    num_beams: int = 1,
    temperature: float | None = None,
    progress: str | None = None,
) -> list[str]:
    """Generates one text for each prompt: greedily, with beams or at random; only the last depends on `batch_size`.

    Prompts are sorted by length, so that a batch has little padding, and returned in their own order. A picture that
    several prompts ask about is fetched and encoded once; its features are kept until the last of them is done. What
    the beams of a prompt, and the prompts about the same pictures, have in common is read once, too.

    Args:
        model ([`VisionQwen`] or `PeftModel`): In evaluation mode.
        processor ([`VisionQwenProcessor`]): Saved with the model.
        prompts (`list[list[dict]]`): Messages of each prompt.
        image_ids (`list[list[int]]`): Picture numbers of each prompt, in the order of its image parts.
        fetch_images (`Callable`): Picture numbers -> `{"image_features": (I, N_v, D_v)}` or
            `{"pixel_values": (I, 3, H, W)}`.
        batch_size (`int`, *optional*, defaults to 64): Prompts at a time.
        max_new_tokens (`int`, *optional*, defaults to 32): Tokens of a text at most, its end included.
        num_beams (`int`, *optional*, defaults to 1): 1 is greedy.
        temperature (`float`, *optional*): Tokens are drawn with the probabilities softmax(logits / temperature) from
            torch's global random state; without it, none is drawn.
        progress (`str`, *optional*): Title of a progress bar; none without it.

    Returns:
        `list[str]`: Texts without special tokens, stripped.

    Raises:
        ValueError: When beams are to be drawn, the temperature is not above 0, or a prompt is too long.
    """
    generated = generate_ids(
        model,
        processor,
        encode_prompts(processor, prompts),
        image_ids,
        fetch_images,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        temperature=temperature,
        progress=progress,
    )
    return [text.strip() for text in decode_answers(processor, generated)]


def encode_prompts(processor: VisionQwenProcessor, prompts: list[list[dict]]) -> list[list[int]]:
    """Token ids of prompts, equal ones encoded once: most tasks ask of every picture the same."""
    keys = list(map(repr, prompts))
    ids_of = {key: processor.encode_prompt(prompt) for key, prompt in dict(zip(keys, prompts, strict=True)).items()}
    return [ids_of[key] for key in keys]


def decode_answers(processor: VisionQwenProcessor, generated: list[list[int]]) -> list[str]:
    """Texts of generated tokens without special ones."""
    # Of no text at all the tokenizer would make an empty one.
    return processor.tokenizer.batch_decode(generated, skip_special_tokens=True) if generated else []


def generate_ids(
    model: VisionQwen | PeftModel,
    processor: VisionQwenProcessor,
    encoded: list[list[int]],
    image_ids: list[list[int]],
    fetch_images: Callable[[list[int]], dict[str, torch.Tensor]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    num_beams: int = 1,
    temperature: float | None = None,
    progress: str | None = None,
) -> list[list[int]]:
    """As [`generate_texts`], from token ids to token ids.

    Args:
        model, processor, image_ids, fetch_images, batch_size, max_new_tokens, num_beams, temperature, progress: See
            there.
        encoded (`list[list[int]]`): Of `processor.encode_prompt`.

    Returns:
        `list[list[int]]`: Tokens of each text, the end of the turn among them where it was reached.

    Raises:
        ValueError: As there.
    """
    if temperature is not None and (num_beams > 1 or temperature <= 0):
        raise ValueError(
            f"Sampling expects a temperature above 0 and 1 beam, got temperature {temperature} and {num_beams} beams."
        )
    end = processor.end_of_turn_token_id
    for length in set(map(len, encoded)):
        check_length(model, length, max_new_tokens)
    features = _Features(model, image_ids, fetch_images)
    longest: dict[tuple[int, ...], int] = {}
    for ids, pictures in zip(encoded, map(tuple, image_ids), strict=True):
        longest[pictures] = max(longest.get(pictures, 0), len(ids))

    def sort_key(index: int) -> tuple:
        # Prompts about the same pictures stay together.
        pictures = tuple(image_ids[index])
        shares = len(longest) < len(encoded)
        return (longest[pictures], pictures, len(encoded[index]), index) if shares else (len(encoded[index]), index)

    attention, size = base_model(model).model.language_model.config._attn_implementation, min(batch_size, len(encoded))
    # A captured step has a boolean mask over the whole cache: SDPA's, for decoders that take such masks.
    is_captured = model.device.type == "cuda" and attention == "sdpa" and probe(model).sharing
    length = max(map(len, encoded), default=0) + max_new_tokens
    search: dict = {"num_beams": num_beams}
    if temperature is not None:
        search |= {"custom_generate": greedy, "choose": make_sampler(model, temperature)}
    elif num_beams == 1:
        way = CapturedGreedy(size, length) if is_captured else greedy
        search |= {"custom_generate": way, "choose": make_argmax(model)}
    else:
        captured = CapturedBeams(size, num_beams, length, max_new_tokens) if is_captured else None
        search |= {"custom_generate": beam_search, "captured": captured}
    order = sorted(range(len(encoded)), key=sort_key)
    texts: list[list[int]] = [[] for _ in encoded]
    bar = tqdm(total=len(encoded), desc=progress, disable=progress is None, unit="picture")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        with torch.inference_mode():
            images = features.get([image for index in chosen for image in image_ids[index]])
            inputs = _prefill(
                model,
                processor,
                [encoded[i] for i in chosen],
                [image_ids[i] for i in chosen],
                images,
                max_new_tokens,
                is_captured and num_beams > 1,
            )
            generated = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                **search,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
        for index, ids in zip(chosen, generated[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            texts[index] = ids[: ids.index(end) + 1] if end in ids else ids
        bar.update(len(chosen))
    bar.close()
    return texts


def check_length(model: VisionQwen | PeftModel, length: int, max_new_tokens: int) -> None:
    """Refuses a prompt that leaves its answer no place among the decoder's positions.

    Args:
        model ([`VisionQwen`] or `PeftModel`): Whose decoder names them; some have no limit.
        length (`int`): Tokens of the prompt, those of its pictures included.
        max_new_tokens (`int`): Of its answer at most.

    Raises:
        ValueError: With both lengths.
    """
    text_config: Any = base_model(model).config.text_config
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and length + max_new_tokens > longest:
        raise ValueError(
            f"The question, with its pictures and the turns before it, has {length:,} tokens, and its answer may take "
            f"{max_new_tokens:,}, more than the {longest:,} that the decoder takes. Shorten it, or start over."
        )


def _prefill(
    model: VisionQwen | PeftModel,
    processor: VisionQwenProcessor,
    encoded: list[list[int]],
    image_ids: list[list[int]],
    images: dict[str, torch.Tensor],
    max_new_tokens: int,
    is_read_first: bool,
) -> dict:
    """Inputs of `generate` for one batch; the prefixes that several rows share are in its cache already.

    So are, if `is_read_first`, those that no other row shares: `generate` repeats pictures that it is given for each
    beam, and counts their tokens on the host.

    Decoders that cannot be handed a prefix (see [`~vlm_peft.data.probe.probe`]) read each prompt from its beginning.

    A row's sequence is then `prefix, padding, rest`, with the padding masked and not counted in the positions.
    """
    device, pad = model.device, processor.tokenizer.pad
    images = {key: value.to(device) for key, value in images.items()}
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, pictures in enumerate(image_ids):
        groups.setdefault(tuple(pictures), []).append(row)
    prefixes = [common_prefix([encoded[row] for row in rows]) for rows in groups.values()]
    ends = {row: len(prefix) for prefix, rows in zip(prefixes, groups.values(), strict=True) for row in rows}
    rests = [ids[ends[row] :] for row, ids in enumerate(encoded)]
    longest = max(map(len, prefixes)) + max(map(len, rests)) + max_new_tokens
    is_shared = len(groups) < len(encoded) or is_read_first
    is_shared = is_shared and all(prefixes) and probe(model).shares_prefill(longest)
    if not is_shared or any(model.config.image_token_id in rest for rest in rests):
        batch = pad({"input_ids": encoded}, padding_side="left", return_tensors="pt")
        return {key: value.to(device) for key, value in batch.items()} | images

    first = [rows[0] for rows in groups.values()]
    if images:
        counts = [len(pictures) for pictures in image_ids]
        starts = [sum(counts[:row]) for row in first]
        chosen = [start + offset for start, row in zip(starts, first, strict=True) for offset in range(counts[row])]
        images = {key: value[chosen] for key, value in images.items()}
    prefix = pad({"input_ids": prefixes}, padding_side="left", return_tensors="pt").to(device)
    rest = pad({"input_ids": rests}, padding_side="left", return_tensors="pt").to(device)
    cache = model(
        **prefix,
        **images,
        position_ids=(prefix["attention_mask"].cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    group_of = {row: group for group, rows in enumerate(groups.values()) for row in rows}
    owners = torch.tensor([group_of[row] for row in range(len(encoded))], device=device)
    cache.reorder_cache(owners)
    return {key: torch.cat([prefix[key][owners], rest[key]], dim=1) for key in ("input_ids", "attention_mask")} | {
        "past_key_values": cache
    }


def common_prefix(sequences: list[list[int]]) -> list[int]:
    """The longest beginning that all have, without the last token of any."""
    prefix = sequences[0][: min(map(len, sequences)) - 1]
    for ids in sequences[1:]:
        while prefix != ids[: len(prefix)]:
            prefix = prefix[:-1]
    return prefix


class _Features:
    """Vision features of pictures, each fetched and encoded once and forgotten after its last use."""

    def __init__(self, model: VisionQwen | PeftModel, image_ids: list[list[int]], fetch_images: Callable):
        self._model = base_model(model)
        self._fetch_images = fetch_images
        self._uses_left = Counter(image for images in image_ids for image in images)
        self._kept: dict[int, torch.Tensor] = {}

    def get(self, images: list[int]) -> dict[str, torch.Tensor]:
        """`image_features` `(I, N_v, D_v)` of pictures in this order; nothing for no picture."""
        if not images:
            return {}
        new = [image for image in dict.fromkeys(images) if image not in self._kept]
        features = self._encode(self._fetch_images(new)) if new else torch.empty(0)
        self._uses_left.subtract(images)
        self._kept |= zip(new, features, strict=True)
        # Stacking them again takes longer than fetching them.
        if new != images:
            features = torch.stack([self._kept[image] for image in images])
        for image in dict.fromkeys(images):
            if not self._uses_left[image]:
                del self._kept[image]
        return {"image_features": features}

    def _encode(self, fetched: dict[str, torch.Tensor]) -> torch.Tensor:
        if "image_features" in fetched:
            return fetched["image_features"]
        return self._model.model.get_vision_features(fetched["pixel_values"].to(self._model.device))
