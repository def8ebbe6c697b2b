"""Contrastive training with a locked image tower, beside a plain `CLIPModel(return_loss=True)` in a `Trainer`.

The same pairs in the same batches, with the same weights, optimizer and trained tower: the losses must agree. The peer
decodes and encodes each picture in each step; ours reads its vector.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, Trainer, TrainerCallback, TrainingArguments
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlm_peft.console import table
from vlm_peft.contrastive.adapt import Tuning, adapt
from vlm_peft.contrastive.folder import load_clip
from vlm_peft.contrastive.pairs import PairCollator, PairRows, Pairs, load_pairs, picture_vectors
from vlm_peft.contrastive.trainer import ContrastiveTrainer
from vlm_peft.data.arguments import DataArguments
from vlm_peft.training.setup import CLONE

from .data import make_captions, make_pictures

DEMO = CLONE / "recipes" / "demo" / "clip"
TOLERANCE = 2e-3  # vectors are stored in float16
TURNS, STEPS, WARM_UP = 3, 6, 2
LOCKED = Tuning(vision="locked", text="full")


class _Times(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())


def _base_32(folder: Path) -> Path:
    """A CLIP of the shape of ViT-B/32 with random weights, and the demo's tokenizer of 4,096 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def _arguments(folder: Path, pairs: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=WARM_UP + STEPS,
        per_device_train_batch_size=pairs,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
    )


def _train(trainer: Trainer) -> tuple[float, list[float]]:
    """Seconds of a step (the median), and the losses."""
    times = _Times()
    trainer.add_callback(times)
    trainer.train()
    ends = torch.tensor(times.ends[WARM_UP - 1 :], dtype=torch.float64)
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return float(ends.diff().median()), [float(loss) for loss in losses]


def _ours(clip: Path, pairs: Pairs, arguments: TrainingArguments, vectors: Any) -> Trainer:
    encoder = load_clip(clip)
    encoder.clip = adapt(encoder.clip, LOCKED)
    collator = PairCollator(encoder, pairs, vectors)
    return ContrastiveTrainer(encoder, arguments, train_dataset=PairRows(pairs), data_collator=collator)


def _peer(clip: Path, pairs: Pairs, arguments: TrainingArguments) -> Trainer:
    encoder = load_clip(clip)
    model = adapt(encoder.clip, LOCKED)

    def collate(rows: list[dict]) -> dict[str, Any]:
        text = encoder.tokens([pairs.texts[row["index"]][0] for row in rows])
        return {**text, **encoder.pixels(pairs.picture(row["index"]) for row in rows), "return_loss": True}

    return Trainer(
        model, arguments, train_dataset=Dataset.from_dict({"index": list(range(len(pairs)))}), data_collator=collate
    )


def measure_contrastive(shape: str = "demo", pairs_per_step: int = 32, pictures: int = 128) -> str:
    """Trains both sides in turns and returns a table.

    Args:
        shape: `"demo"`, the demo's CLIP; or `"b32"`, random weights of the shape of CLIP ViT-B/32.
        pairs_per_step: On both sides, a text a picture.
        pictures: Of an epoch.

    Raises:
        AssertionError: When the losses do not agree.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = _base_32(folder / "clip") if shape == "b32" else DEMO
        paths = make_pictures(folder, pictures)
        Dataset.from_dict(
            {"image": paths, "caption": [make_captions(index)[0] for index in range(pictures)]}
        ).to_parquet(str(folder / "pairs.parquet"))
        pairs = load_pairs(DataArguments(dataset_name=str(folder / "pairs.parquet")), "train")
        start = time.perf_counter()
        vectors = picture_vectors(load_clip(clip), pairs, str(folder / "vectors"))
        encoded = time.perf_counter() - start
        arguments = _arguments(folder / "out", pairs_per_step)
        found: dict[str, list[float]] = {"peer": [], "ours": []}
        for _ in range(TURNS):
            step, losses = _train(_peer(clip, pairs, arguments))
            found["peer"].append(step)
            step, own = _train(_ours(clip, pairs, arguments, vectors))
            found["ours"].append(step)
            apart = max(abs(one - other) / one for one, other in zip(losses, own, strict=True))
            assert apart < TOLERANCE, (losses, own)
    rates = {side: pairs_per_step / sorted(steps)[TURNS // 2] for side, steps in found.items()}
    ratio = sorted(peer / own for peer, own in zip(found["peer"], found["ours"], strict=True))[TURNS // 2]
    lines = [("image tower locked, text tower in full", "peer", "ours", "ours / peer")]
    lines.append(("pairs/s", f"{rates['peer']:.1f}", f"{rates['ours']:.1f}", f"{ratio:.1f}x"))
    return (
        f"{table(lines)}\n\nCLIP `{shape}`, {pairs_per_step} pairs a step, JPEG files of 500 x 375. Ours encodes the "
        f"{pictures} pictures once before, in {encoded:.1f} s. Losses agree to {apart:.0e}; medians of {TURNS} turns "
        f"of {STEPS} steps; {torch.get_num_threads()} threads."
    )
