"""The stock `LlavaForConditionalGeneration` with the same weights, and batches for both."""

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlm_peft import VisionQwen

RELATIVE = 1e-5
IMAGE = 259


def make_llava(model: VisionQwen) -> LlavaForConditionalGeneration:
    """The stock model with the same weights (layers that VisionQwen does not build keep their random ones)."""
    config = model.config
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_token_index=config.image_token_id,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy="full" if config.keep_class_token else "default",
        )
    ).eval()
    result = llava.load_state_dict(model.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all("vision_tower" in key for key in result.missing_keys)
    return llava


def make_batch(model: VisionQwen, images_per_row=(1, 1), text=(5, 9)) -> dict[str, torch.Tensor]:
    """Left-padded rows: some text, the images, more text."""
    n = model.config.num_image_tokens
    rows = [
        [1] * 2 + [IMAGE] * (n * images) + torch.randint(0, 255, (length,)).tolist()
        for images, length in zip(images_per_row, text, strict=True)
    ]
    width = max(map(len, rows))
    input_ids = torch.tensor([[256] * (width - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    labels = input_ids.masked_fill((input_ids == IMAGE) | (attention_mask == 0), -100)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if sum(images_per_row):
        batch["pixel_values"] = torch.randn(sum(images_per_row), 3, 8, 8)
    return batch


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Largest difference at most 1e-5 of the largest value."""
    scale = expected.abs().max().clamp(min=1e-12)
    assert (actual - expected).abs().max() / scale < RELATIVE
