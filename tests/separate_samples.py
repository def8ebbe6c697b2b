"""Shared-prefix batches against every text as a sample of its own."""

import torch
from conftest import make_config, make_processor

from vlm_peft import VisionQwen
from vlm_peft.data.collator import SharedPrefixCollator

RELATIVE = 1e-5
IMAGE = {"type": "image"}


def ask(text):
    return {"type": "text", "text": text}


CAPTIONS = ["a dog", "a dog runs", "two dogs on a lawn", "b", "dogs"]
QUESTIONS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in [("How many?", "two"), ("How big is it?", "small"), ("Is there a cat?", "no")]
]
TURNS = [[{"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}, QUESTIONS[0][1]]]
ROWS = {
    "captions": [([{"role": "user", "content": [IMAGE, ask("Describe.")]}], CAPTIONS)],
    "questions": [([{"role": "user", "content": [IMAGE]}], QUESTIONS)],
    "two images": [([{"role": "user", "content": [ask("First"), IMAGE, ask("second"), IMAGE]}], CAPTIONS[:3])],
    "several turns": [([{"role": "user", "content": [IMAGE]}], TURNS)],
    "text only": [([{"role": "user", "content": "Say something"}], CAPTIONS)],
}
ROWS["packed rows"] = [ROWS["captions"][0], ROWS["questions"][0], ROWS["two images"][0], ROWS["text only"][0]]


def count_images(prompt):
    return sum(part == IMAGE for message in prompt for part in message["content"])


def encode(processor, rows):
    """Encoded rows with flat picture numbers."""
    encoded, start = [], 0
    for prompt, completions in rows:
        images = count_images(prompt)
        row = processor.encode_row(prompt, completions)
        encoded.append({**vars(row), "image_ids": list(range(start, start + images))})
        start += images
    return encoded


def make_collator(features, **arguments):
    return SharedPrefixCollator(256, lambda ids: {"image_features": features[ids]}, **arguments)


def separate_loss(model, processor, rows, features):
    """Mean loss of every completion run as a sample of its own, without padding or sharing."""
    total, count, start = 0, 0, 0
    for prompt, completions in rows:
        images = count_images(prompt)
        for completion in completions:
            row = processor.encode_row(prompt, [completion])
            labels = torch.tensor([row.shift_labels])
            inputs = {"input_ids": torch.tensor([row.input_ids]), "shift_labels": labels}
            if images:
                inputs["image_features"] = features[start : start + images]
            output = model(**{name: value.to(model.device) for name, value in inputs.items()})
            labelled = int((labels != -100).sum())
            total, count = total + output.loss * labelled, count + labelled
        start += images
    return total / count


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def largest_difference(actual, expected):
    assert actual.keys() == expected.keys()
    return max(float((actual[n] - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-12)) for n in actual)


def compare(rows, dtype=torch.float32, attn_implementation="sdpa", **arguments):
    """Largest relative difference of loss and of any gradient."""
    config = make_config()
    processor = make_processor(config)
    model = VisionQwen(config).to(dtype).eval()
    model.model.vision_tower.requires_grad_(False)
    model.set_attn_implementation({"text_config": attn_implementation})
    features = torch.randn(sum(count_images(prompt) for prompt, _ in rows), config.num_vision_tokens, 16, dtype=dtype)
    collator = make_collator(features, **arguments)
    shared = model(**collator(encode(processor, rows)))
    separate = separate_loss(model, processor, rows, features)
    return (
        float((abs(shared.loss - separate) / separate).detach()),
        largest_difference(gradients(model, shared.loss), gradients(model, separate)),
    )
