"""Generation: prompts -> texts, batched, with a key-value cache, each picture encoded once.

Stage: trained model -> `list[str]`; called by evaluation and by the command line.
"""

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

    Prompts are sorted by length, so that a batch has little padding, and returned in their own order.

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
    order = sorted(range(len(prompts)), key=lambda index: (len(encoded[index]), index))
    device = model.device
    texts = [""] * len(prompts)
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, unit="picture")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = processor.tokenizer.pad({"input_ids": [encoded[index] for index in chosen]}, return_tensors="pt")
        images = [image for index in chosen for image in image_ids[index]]
        inputs = dict(batch) | (fetch_images(images) if images else {})
        with torch.inference_mode():
            generated = model.generate(
                **{key: value.to(device) for key, value in inputs.items()},
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                eos_token_id=processor.end_of_turn_token_id,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
        answers = generated[:, batch["input_ids"].shape[1] :]
        for index, text in zip(chosen, processor.tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
            texts[index] = text.strip()
        bar.update(len(chosen))
    bar.close()
    return texts
