"""The two sides of eval/throughput.py, each as its users run it: weights, data set, collator and trainer.

Ours is what recipes/sft.py builds. The peer is `LlavaForConditionalGeneration` with TRL's `SFTTrainer` and its own
vision collator on flattened rows. Weights, LoRA, optimizer, dtype, captions and pictures per step are the same; the
order of the data is kept, so that step s of either side sees the same captions.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from trl import SFTConfig, SFTTrainer

from vlm_peft import VisionQwen, VisionQwenProcessor
from vlm_peft.adapters.fused_lora import fuse_lora
from vlm_peft.adapters.lora import PROJECTOR, lora_config
from vlm_peft.data.collator import SharedPrefixCollator
from vlm_peft.data.feature_cache import build_feature_cache
from vlm_peft.data.pictures import Pictures
from vlm_peft.data.rows import encode_rows
from vlm_peft.model.configuration_vision_qwen import IGNORE_INDEX
from vlm_peft.model.cuda.training import CapturedDecoder, can_capture, compile_layers, sequence_length
from vlm_peft.tasks import make_task
from vlm_peft.training.trainer import VisionSFTTrainer, prepare_training_arguments

from .data import INSTRUCTION, Preset, make_captions, make_config, make_processor

PEER = "peer"
COMPILED_PEER = "peer, compiled layers"
OURS = "ours"


@dataclass
class Prepared:
    """A side that is ready for its first step.

    Args:
        trainer: With model, data and collator.
        seconds: What it took before the first step and is not needed in a later epoch.
        image_processor: Whose time is counted as decoding.
    """

    trainer: SFTTrainer
    seconds: dict[str, float]
    image_processor: Any


def build_model(preset: Preset, dtype: str) -> VisionQwen:
    """Our model with random weights that are the same in every process."""
    torch.manual_seed(0)
    with torch.device(preset.device):
        model = VisionQwen(make_config(preset))
    model.model.vision_tower.requires_grad_(False)
    # As in the recipes: a CPU keeps fp32 weights and autocasts, a GPU holds the bases in bf16.
    return model.to(torch.bfloat16 if dtype == "bf16" and preset.device == "cuda" else torch.float32).eval()


def build_peer_model(preset: Preset, dtype: str) -> LlavaForConditionalGeneration:
    """The peer with the weights of [`build_model`] copied into it.

    Raises:
        RuntimeError: when a weight of ours has no place there, or the peer lacks more than the encoder's top layer.
    """
    ours = build_model(preset, dtype)
    config = ours.config
    peer_config = LlavaConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=config.text_config.to_dict(),
        image_token_id=config.image_token_id,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy="full" if config.keep_class_token else "default",
        image_seq_length=config.num_image_tokens,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    with torch.device(preset.device):
        peer = LlavaForConditionalGeneration(peer_config)
    peer = peer.to(ours.dtype)
    missing, unexpected = peer.load_state_dict(ours.state_dict(), strict=False)
    missing = [name for name in missing if "vision_tower" not in name]
    if missing or unexpected:
        raise RuntimeError(f"The weights do not map one to one: {missing[:3]} missing, {unexpected[:3]} left over.")
    peer.model.vision_tower.requires_grad_(False)
    return peer.eval()


def build_peer_processor(processor: VisionQwenProcessor, model: LlavaForConditionalGeneration) -> LlavaProcessor:
    """The peer's processor with our image processor, tokenizer and template."""
    return LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
    )


def training_arguments(preset: Preset, dtype: str, folder: Path, batch_size: int) -> SFTConfig:
    """What both trainers share; rows come in order. A figure that is logged makes a GPU's host wait for the device."""
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=1_000_000,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        bf16=dtype == "bf16",
        use_cpu=preset.device == "cpu",
        gradient_checkpointing=False,
        dataloader_num_workers=preset.workers,
        dataloader_persistent_workers=preset.workers > 0,
        # Little in store, so that a turn shows what the loaders keep up with.
        dataloader_prefetch_factor=1 if preset.workers else None,
        accelerator_config={"non_blocking": preset.device == "cuda"},
        train_sampling_strategy="sequential",
        max_length=preset.max_length,
        # Losses are compared step by step in fp32; else TRL's default, on both sides.
        logging_steps=10 if preset.device == "cuda" and dtype != "fp32" else 1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )


def prepare_peer(
    preset: Preset, dtype: str, folder: Path, paths: list[str], tokenizer, *, compiles: bool = False
) -> Prepared:
    """The peer: one row for each caption, its picture decoded, resized and encoded each time."""
    model = build_peer_model(preset, dtype)
    processor = build_peer_processor(make_processor(make_config(preset), tokenizer), model)
    rows: dict[str, list] = {"images": [], "prompt": [], "completion": []}
    for index, path in enumerate(paths):
        for caption in make_captions(index):
            rows["images"].append([path])
            rows["prompt"].append([{"role": "user", "content": INSTRUCTION}])
            rows["completion"].append([{"role": "assistant", "content": caption}])
    dataset = Dataset.from_dict(rows).cast_column("images", List(Image()))
    captions = len(rows["prompt"]) // len(paths)
    trainer = SFTTrainer(
        model=model,
        args=training_arguments(preset, dtype, folder, captions * preset.pictures_per_step),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            # The anchored expression of `vlm_peft.adapters.folder`: plain names would put LoRA into the encoder, too.
            target_modules=r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj",
            modules_to_save=[PROJECTOR],
            **preset.lora,
        ),
    )
    set_adapters(trainer.model)
    if compiles:
        for layer in trainer.model.get_base_model().model.language_model.layers:
            layer.compile()
    return Prepared(trainer, {}, processor.image_processor)


def prepare_ours(
    preset: Preset, dtype: str, folder: Path, paths: list[str], tokenizer, switch: str | None = None
) -> Prepared:
    """Our side as recipes/sft.py builds it, with one idea switched."""
    model = build_model(preset, dtype)
    processor = make_processor(model.config, tokenizer)
    rows = make_rows(paths)
    task = make_task("caption", rows.column_names, instruction=INSTRUCTION)
    seconds = {}
    start = time.perf_counter()
    pictures = Pictures(rows, task.image_columns)
    features = None
    if switch != "no feature cache":
        features = build_feature_cache(model, processor.image_processor, pictures, directory=folder / "features")
        seconds["decode and encode once"] = time.perf_counter() - start
    start = time.perf_counter()
    encoded = encode_rows(rows, task, processor, pictures, max_length=preset.max_length).dataset
    seconds["lay out rows"] = time.perf_counter() - start
    batch_size = preset.pictures_per_step
    if switch == "no shared prefix":
        encoded = _one_caption_each(rows, task, processor)
        batch_size *= len(encoded) // len(paths)
    is_cuda = preset.device == "cuda"
    is_packed = preset.packing != (switch == "packing")
    collator: Callable = SharedPrefixCollator(
        processor.tokenizer.pad_token_id,
        fetch_from(features, pictures, processor.image_processor),
        max_length=preset.max_length,
        packing=is_packed and not is_cuda,
        image_token_id=model.config.image_token_id,
        sequence_length=sequence_length([len(ids) for ids in encoded["input_ids"]], batch_size) if is_cuda else None,
    )
    if switch == "no labelled-only head":
        collator = _AllPositions(collator)
    # TRL's own trainer scores the same labelled positions with TRL's kernel.
    trainer_class = SFTTrainer if switch == "TRL's head" else VisionSFTTrainer
    model.set_attn_implementation({"text_config": preset.attn_implementation})
    trainer = trainer_class(
        model=model,
        args=prepare_training_arguments(training_arguments(preset, dtype, folder, batch_size)),
        train_dataset=encoded,
        data_collator=collator,
        processing_class=processor,
        peft_config=lora_config(model, **preset.lora),
    )
    set_adapters(trainer.model)
    if is_cuda and switch != "no fused LoRA":
        fuse_lora(trainer.model)
    if is_cuda and switch != "no compiled layers":
        compile_layers(trainer.model)
        if switch != "no CUDA graph" and can_capture(trainer.model, trainer.args):
            CapturedDecoder(trainer.model)
    return Prepared(trainer, seconds, processor.image_processor)


def make_rows(paths: list[str]) -> Dataset:
    """One row for each picture, with its captions."""
    captions = [make_captions(index) for index in range(len(paths))]
    rows = Dataset.from_dict({"id": [str(index) for index in range(len(paths))], "image": paths, "captions": captions})
    return rows.cast_column("image", Image())


def fetch_from(features, pictures: Pictures, image_processor) -> Callable[[list[int]], dict[str, torch.Tensor]]:
    """Picture numbers -> model inputs: from the cache, or decoded and resized each time."""

    def from_cache(ids: list[int]) -> dict[str, torch.Tensor]:
        return {"image_features": features.get(ids)}

    def from_pixels(ids: list[int]) -> dict[str, torch.Tensor]:
        opened = [pictures.open(index) for index in ids]
        return {"pixel_values": image_processor(opened, return_tensors="pt")["pixel_values"]}

    return from_pixels if features is None else from_cache


def _one_caption_each(rows: Dataset, task, processor: VisionQwenProcessor) -> Dataset:
    """Layouts of rows with a single completion, picture by picture."""
    layouts = []
    for index, row in enumerate(rows.remove_columns(task.image_columns)):
        example = task.example(row)
        for completion in example.completions:
            layouts.append({**vars(processor.encode_row(example.prompt, [completion])), "image_ids": [index]})
    return Dataset.from_list(layouts)


class _AllPositions:
    """Gives TRL's head every position to score, as a full row of labels would."""

    def __init__(self, collator: SharedPrefixCollator):
        self._collator = collator

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self._collator(rows)
        full = torch.full((batch["input_ids"].numel(),), IGNORE_INDEX)
        full[batch.pop("label_positions")] = batch["shift_labels"][0]
        batch["labels"] = batch["shift_labels"] = full.view_as(batch["input_ids"])
        return batch


@torch.no_grad()
def set_adapters(model: torch.nn.Module) -> None:
    """Draws every LoRA A from its name, so that both sides start equal; B is zero on both."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.copy_(values)
