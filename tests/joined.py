"""What must hold for any pair of encoder and decoder, as measurements: for the tests, and for README's table.

Each function takes a joined model of the tests' size, and gives a figure or raises.
"""

# mypy: ignore-errors

from pathlib import Path

import separate_samples
import torch
from datasets import Dataset
from peft import PeftModel
from separate_samples import gradients
from tiny_runs import quiet_config
from trl import ModelConfig

from vlm_peft import VisionQwen, VisionQwenProcessor
from vlm_peft.data.collator import SharedPrefixCollator
from vlm_peft.evaluation.generation import generate_ids
from vlm_peft.model.cuda.training import plain_decoder
from vlm_peft.training.arguments import VisionArguments
from vlm_peft.training.setup import build_trainer
from vlm_peft.training.trainer import VisionSFTTrainer

PICTURES = 3
NEW_TOKENS = 5
QUESTIONS = [("Describe.", 0), ("What is it?", 0), ("What is it?", 1), ("What", 1), ("Is it a dog or a cat?", 2)]
"""Prompts about one picture each."""

ROWS = [
    ("Describe.", ["a dog", "two dogs on a lawn", "b"]),
    ("What is it?", ["a cat, I think", "no"]),
    ("Go on", ["and on"]),
]
"""Prompts about one picture each, with their texts."""


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


CONVERSATIONS = [(ask(prompt), texts) for prompt, texts in ROWS]


def make_features(model: VisionQwen) -> torch.Tensor:
    """Of three pictures, `(3, N_v, D_v)`; and a projector that makes each of them another one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    shape = (PICTURES, model.config.num_vision_tokens, model.config.vision_feature_size)
    return torch.randn(shape, generator=generator)


def encode(processor: VisionQwenProcessor) -> list[dict]:
    return separate_samples.encode(processor, CONVERSATIONS)


def largest_difference(
    model: VisionQwen, processor: VisionQwenProcessor, features: torch.Tensor, *, sharing: bool, **layout
) -> float:
    """Of the loss and of every gradient, rows laid out and packed against every text alone; all in fp32.

    `layout` replaces the collator's arguments.

    Of each gradient as a share of its largest value, or of a twentieth of the largest of all: that of an attention's
    key bias is zero but for rounding.
    """
    collate = SharedPrefixCollator(
        processor.tokenizer.pad_token_id,
        lambda ids: {"image_features": features[ids]},
        **{"max_length": 400, "packing": True, "sharing": sharing, **layout},
    )
    batch = {name: value.to(model.device) for name, value in collate(encode(processor)).items()}
    together = model(**batch).loss
    found = gradients(model, together)
    with plain_decoder(model):
        alone = separate_loss(model, processor, features)
    expected = gradients(model, alone)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    floor = 0.05 * max(float(value.abs().max()) for value in expected.values())
    shares = [
        float((found[name] - value).abs().max()) / max(float(value.abs().max()), floor)
        for name, value in expected.items()
    ]
    return max(*shares, float((abs(together - alone) / alone).detach()))


def separate_loss(model: VisionQwen, processor: VisionQwenProcessor, features: torch.Tensor) -> torch.Tensor:
    """Mean over the labels of all texts, each run alone."""
    return separate_samples.separate_loss(model, processor, CONVERSATIONS, features)


def make_trainer(
    model: VisionQwen, processor: VisionQwenProcessor, features: torch.Tensor, folder: Path
) -> VisionSFTTrainer:
    """The recipe's own trainer for three steps."""
    settings = {"max_steps": 3, "per_device_train_batch_size": 3, "learning_rate": 2e-3, "max_length": 400}
    training = quiet_config(folder, lr_scheduler_type="constant", **settings)
    return build_trainer(
        VisionArguments(dataset_name="texts", pack_rows=True),
        training,
        ModelConfig(use_peft=True, lora_r=4),
        model,
        processor,
        Dataset.from_list(encode(processor)),
        lambda ids: {"image_features": features[list(ids)]},
    )


def answers(
    model: VisionQwen | PeftModel, processor: VisionQwenProcessor, features: torch.Tensor, **arguments
) -> list[list[int]]:
    """Tokens generated for every question, those about one picture with one prefix."""
    return generate_ids(
        model,
        processor,
        [processor.encode_prompt(ask(prompt)) for prompt, _ in QUESTIONS],
        [[picture] for _, picture in QUESTIONS],
        lambda ids: {"image_features": features[ids]},
        max_new_tokens=NEW_TOKENS,
        **arguments,
    )


def uncached_answers(
    model: VisionQwen | PeftModel, processor: VisionQwenProcessor, features: torch.Tensor
) -> list[list[int]]:
    """The same, greedily, each prompt alone, without a cache, by nothing but the forward pass."""
    found = []
    for prompt, picture in QUESTIONS:
        ids = processor.encode_prompt(ask(prompt))
        start = len(ids)
        while len(ids) < start + NEW_TOKENS and (len(ids) == start or ids[-1] != processor.end_of_turn_token_id):
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([ids]), image_features=features[[picture]], use_cache=False
                ).logits[0, -1]
            if model.config.image_token_id < len(logits):
                logits[model.config.image_token_id] = -torch.inf
            ids.append(int(logits.argmax()))
        found.append(ids[start:])
    return found
