"""Generation: prompts -> texts, batched, with a key-value cache, each picture encoded once.

Stage: trained model -> `list[str]`; called by evaluation and by the command line.
"""

from collections import Counter
from collections.abc import Callable

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from .modeling_vision_qwen import VisionQwen
from .processing_vision_qwen import VisionQwenProcessor


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
    progress: str | None = None,
) -> list[str]:
    """Generates one text for each prompt, greedily or with beams; the result does not depend on `batch_size`.

    Prompts are sorted by length, so that a batch has little padding, and returned in their own order. A picture that
    several prompts ask about is fetched and encoded once; its features are kept until the last of them is done.

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
        progress (`str`, *optional*): Title of a progress bar; none without it.

    Returns:
        `list[str]`: Texts without special tokens, stripped.
    """
    encoded = [processor.encode_prompt(prompt) for prompt in prompts]
    features = _Features(model, image_ids, fetch_images)
    order = sorted(range(len(prompts)), key=lambda index: (len(encoded[index]), index))
    device = model.device
    texts = [""] * len(prompts)
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, unit="picture")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = processor.tokenizer.pad(
            {"input_ids": [encoded[index] for index in chosen]}, padding_side="left", return_tensors="pt"
        )
        with torch.inference_mode():
            inputs = dict(batch) | features.get([image for index in chosen for image in image_ids[index]])
            generated = model.generate(
                **{key: value.to(device) for key, value in inputs.items()},
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                eos_token_id=processor.end_of_turn_token_id,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
        answers = generated[:, batch["input_ids"].shape[1] :]
        for index, text in zip(
            chosen, processor.tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True
        ):
            texts[index] = text.strip()
        bar.update(len(chosen))
    bar.close()
    return texts


class _Features:
    """Vision features of pictures, each fetched and encoded once and forgotten after its last use."""

    def __init__(self, model: VisionQwen | PeftModel, image_ids: list[list[int]], fetch_images: Callable):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(base, VisionQwen)
        self._model = base
        self._fetch_images = fetch_images
        self._uses_left = Counter(image for images in image_ids for image in images)
        self._kept: dict[int, torch.Tensor] = {}

    def get(self, images: list[int]) -> dict[str, torch.Tensor]:
        """`image_features` `(I, N_v, D_v)` of pictures in this order; nothing for no picture."""
        if not images:
            return {}
        new = [image for image in dict.fromkeys(images) if image not in self._kept]
        if new:
            self._kept |= zip(new, self._encode(self._fetch_images(new)), strict=True)
        features = torch.stack([self._kept[image] for image in images])
        for image in images:
            self._uses_left[image] -= 1
            if not self._uses_left[image]:
                del self._kept[image]
        return {"image_features": features}

    def _encode(self, fetched: dict[str, torch.Tensor]) -> torch.Tensor:
        if "image_features" in fetched:
            return fetched["image_features"]
        return self._model.model.get_vision_features(fetched["pixel_values"].to(self._model.device))
