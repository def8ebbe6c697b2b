"""Training for the score, rollout and update together, beside TRL's `GRPOTrainer` as it comes.

The same model, questions, options and samples: each side draws its own, and both then go on with the same given ones,
so that log-probabilities and gradients must agree. The peer decodes and encodes each picture and reads its prompt for
every sample; ours once for each question, the picture from the cache. Weights are random and the vocabulary is Qwen3's,
so that no text ends by itself: both sides draw as many tokens, and that ended texts leave the batch is not counted.
"""

import dataclasses
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from peft import get_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from vlm_peft.adapters.fused_lora import fuse_lora
from vlm_peft.adapters.lora import lora_config
from vlm_peft.console import table
from vlm_peft.data.collator import SharedPrefixCollator
from vlm_peft.data.feature_cache import build_feature_cache
from vlm_peft.data.pictures import Pictures
from vlm_peft.metrics.captions import Cider
from vlm_peft.training.callbacks import PrintedLines
from vlm_peft.training.grpo_trainer import Asked, VisionGRPOTrainer, prepare_grpo_arguments

from .data import INSTRUCTION, PRESETS, Preset, make_captions, make_pictures, make_processor, make_tokenizer
from .report import device_text
from .sides import build_model, make_rows, set_adapters

SAMPLES, TOKENS = 5, 16
TURNS, STEPS, WARM_UP = 3, 2, 1
TOLERANCE = 1e-3  # relative, of entropies and of the gradient's length; pictures are stored in float16


class _Times(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def _arguments(preset: Preset, folder: Path) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=WARM_UP + STEPS,
        per_device_train_batch_size=SAMPLES * preset.pictures_per_step,
        num_generations=SAMPLES,
        steps_per_generation=1,
        max_completion_length=TOKENS,
        learning_rate=1e-4,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=preset.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        router_aux_loss_coef=0.0,
        seed=0,
    )


def _adapted(preset: Preset) -> Any:
    model = build_model(preset, "fp32")
    adapted = get_peft_model(model, lora_config(model, **preset.lora))
    set_adapters(adapted)
    return adapted


def _given(tokenizer, step: int, count: int) -> list[list[int]]:
    """Samples that both sides go on with: captions, cut or filled to `TOKENS`."""
    draw = random.Random(step)
    texts = [" ".join(draw.choices(" ".join(make_captions(step)).split(), k=2 * TOKENS)) for _ in range(count)]
    return [tokenizer.encode(text)[:TOKENS] for text in texts]


def _peer(preset: Preset, folder: Path, paths: list[str], tokenizer, reward: Any) -> GRPOTrainer:
    model = _adapted(preset)
    rows = {
        "images": [[path] for path in paths],
        "prompt": [[{"role": "user", "content": INSTRUCTION}]] * len(paths),
        "row": list(range(len(paths))),
    }
    trainer = GRPOTrainer(
        model,
        [lambda completions, **columns: reward([each[0]["content"] for each in completions], **columns)],
        args=_arguments(preset, folder),
        train_dataset=Dataset.from_dict(rows).cast_column("images", List(Image())),
        processing_class=make_processor(model.get_base_model().config, tokenizer),
    )
    draw = trainer._generate_single_turn

    def generate(*args, **kwargs):
        ids, log_probs = draw(*args, **kwargs)
        _check_lengths("the peer", ids)
        return _given(tokenizer, trainer.state.global_step, len(ids)), log_probs

    trainer._generate_single_turn = generate
    return trainer


def _ours(preset: Preset, folder: Path, paths: list[str], tokenizer, reward: Any) -> GRPOTrainer:
    model = _adapted(preset)
    processor = make_processor(model.get_base_model().config, tokenizer)
    rows = make_rows(paths)
    features = build_feature_cache(
        model.get_base_model(), processor.image_processor, Pictures(rows, ["image"]), directory=str(folder / "features")
    )
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]}]
    trainer = VisionGRPOTrainer(
        model,
        [reward],
        args=prepare_grpo_arguments(_arguments(preset, folder), model),
        train_dataset=Dataset.from_dict({"prompt": [INSTRUCTION] * len(paths), "row": list(range(len(paths)))}),
        processing_class=processor,
        asked=[Asked(processor.encode_prompt(prompt), [index], []) for index in range(len(paths))],
        collator=SharedPrefixCollator(
            tokenizer.pad_token_id,
            lambda ids: {"image_features": features.get(ids)},
            image_token_id=model.get_base_model().config.image_token_id,
        ),
    )
    fuse_lora(trainer.model)
    draw = trainer.generate

    def generate(questions, temperature):
        ids = draw(questions, temperature)
        _check_lengths("ours", ids)
        return _given(tokenizer, trainer.state.global_step, len(ids))

    trainer.generate = generate  # type: ignore[method-assign]
    return trainer


def _check_lengths(side: str, ids: list[list[int]]) -> None:
    """A text that ends early would be less work.

    Raises:
        RuntimeError: When there is one.
    """
    if any(len(each) != TOKENS for each in ids):
        raise RuntimeError(f"{side}: a text ended before {TOKENS} tokens.")


def _train(trainer: GRPOTrainer) -> tuple[float, list[tuple[float, float]]]:
    """Seconds of a step (the median), and entropy and length of the gradient of each."""
    times = _Times()
    for kind in (PrinterCallback, PrintedLines):
        trainer.pop_callback(kind)
    trainer.add_callback(times)
    trainer.train()
    ends = torch.tensor(times.ends[WARM_UP - 1 :], dtype=torch.float64)
    logged = [(each["entropy"], each["grad_norm"]) for each in trainer.state.log_history if "reward" in each]
    return float(ends.diff().median()), [(float(entropy), float(norm)) for entropy, norm in logged]


def measure_rollouts(pictures_per_step: int | None = None) -> str:
    """Trains both sides in turns, with the shapes of the preset `cpu`, or of `b32` on a GPU, and returns a table.

    Args:
        pictures_per_step (`int`, *optional*): Questions of a step, with five samples each; the preset's by default.

    Raises:
        ValueError: When entropies or gradients do not agree.
        RuntimeError: When a side draws fewer tokens.
    """
    preset = PRESETS["b32" if torch.cuda.is_available() else "cpu"]
    count = pictures_per_step or min(8, preset.pictures_per_step)
    preset = dataclasses.replace(preset, pictures_per_step=count)
    tokenizer = make_tokenizer()
    captions = [make_captions(index) for index in range(count * (WARM_UP + STEPS))]
    cider = Cider(captions)

    def reward(completions, row, **columns):
        return [cider(text, captions[number]) for text, number in zip(completions, row, strict=True)]

    found: dict[str, list[float]] = {"peer": [], "ours": []}
    apart = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_pictures(folder, len(captions))
        for _ in range(TURNS):
            logged = {}
            for side, make in (("peer", _peer), ("ours", _ours)):
                trainer = make(preset, folder, paths, tokenizer, reward)
                step, logged[side] = _train(trainer)
                found[side].append(step)
            pairs = zip(sum(logged["peer"], ()), sum(logged["ours"], ()), strict=True)
            apart = max(apart, *(abs(own - other) / abs(other) for other, own in pairs))
            if not apart < TOLERANCE:
                raise ValueError(f"The sides disagree: entropies and lengths of gradients are {logged}.")
    samples = count * SAMPLES
    rates = {side: samples / sorted(steps)[TURNS // 2] for side, steps in found.items()}
    ratio = sorted(peer / own for peer, own in zip(found["peer"], found["ours"], strict=True))[TURNS // 2]
    lines = [("rollout and update", "peer", "ours", "ours / peer")]
    lines.append(("samples/s", f"{rates['peer']:.2f}", f"{rates['ours']:.2f}", f"{ratio:.1f}x"))
    gpu = torch.cuda.get_device_name() if preset.device == "cuda" else None
    return (
        f"{table(lines)}\n\n{preset.summary}; vocabulary 151,936; fp32, LoRA rank {preset.lora['r']} and projector; "
        f"{count} pictures with {SAMPLES} samples of {TOKENS} tokens a step, JPEG files of 500 x 375, reward CIDEr. "
        f"Entropies and lengths of gradients agree to {apart:.0e}; medians of {TURNS} turns of {STEPS} steps; "
        f"{device_text(gpu, torch.get_num_threads())}."
    )
