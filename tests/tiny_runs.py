"""Real runs of `VisionSFTTrainer` on tiny bases: six steps of two rows, with a checkpoint every two."""

from pathlib import Path

import torch
from conftest import make_config, make_processor
from datasets import Dataset
from transformers import BitsAndBytesConfig, Qwen3Config, set_seed
from trl import SFTConfig

from vlm_peft import VisionQwen, VisionQwenProcessor
from vlm_peft.adapters.lora import lora_config
from vlm_peft.data.collator import SharedPrefixCollator
from vlm_peft.training.trainer import VisionSFTTrainer, prepare_training_arguments

IMAGE = 259
STEPS = 6
PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]}]
COMPLETIONS = [["a dog", "two dogs on a lawn"], ["a cat"], ["one small horse", "a horse"], ["b", "cc", "ddd"]]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "qlora": {},
}


def loading(variant: str) -> dict:
    """How the bases of a variant are loaded."""
    return {"quantization_config": BitsAndBytesConfig(**NF4)} if variant == "qlora" else {}


def wide_config(**fields) -> Qwen3Config:
    """As the tiny decoder, with inputs of 64 everywhere, the size of a block of 4-bit weights."""
    text = make_config().text_config.to_dict()
    text |= {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "initializer_range": 0.1}
    return Qwen3Config(**text | fields)


RECIPE = """
stored_split: test
split_column: split
eval_splits: [test]
vision_feature_layer: [-1]
use_peft: true
lora_r: 4
use_cpu: true
bf16: false
gradient_checkpointing: false
per_device_train_batch_size: 4
learning_rate: 1.0e-2
save_steps: 2
max_new_tokens: 4
report_to: none
disable_tqdm: true
"""
"""The YAML file of a small run of the recipe on `save_flickr`'s rows, without its data set, bases and steps."""

QUIET = {
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Of a run in fp32 on a CPU, which logs each step and saves nothing unless it is told to."""


def quiet_config(output_dir: Path | str | None = None, **settings) -> SFTConfig:
    """Of a run of a few steps in fp32 on a CPU, which logs each of them and saves nothing unless it is told to."""
    return SFTConfig(output_dir and str(output_dir), **{"per_device_train_batch_size": 2, **QUIET, **settings})


def load_bases(bases: tuple[Path, Path], **arguments) -> VisionQwen:
    """Bases with a projector that shows the decoder something, the same at every call."""
    model = VisionQwen.from_vision_text_pretrained(*bases, image_token_id=IMAGE, **arguments)
    model.model.vision_tower.requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator) * 0.2)
    return model


def encoded_rows(model: VisionQwen) -> tuple[Dataset, VisionQwenProcessor]:
    """Four pictures with one to three texts each."""
    processor = make_processor(model.config)
    rows = [
        {**vars(processor.encode_row(PROMPT, texts)), "image_ids": [index]} for index, texts in enumerate(COMPLETIONS)
    ]
    return Dataset.from_list(rows), processor


def make_trainer(
    folder: Path,
    model,
    lora: dict | None,
    callbacks=(),
    trainer: dict | None = None,
    images: str = "image_features",
    peft_config=None,
    **settings,
):
    """A run of six steps of two rows; `lora=None` for a model that has its adapter, or with another `peft_config`."""
    set_seed(0)
    rows, processor = encoded_rows(model)
    shape = (16, 16) if images == "image_features" else (3, 8, 8)
    inputs = torch.randn(len(rows), *shape, generator=torch.Generator().manual_seed(5))
    return VisionSFTTrainer(
        model,
        args=prepare_training_arguments(
            quiet_config(folder, **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, **settings})
        ),
        train_dataset=rows,
        data_collator=SharedPrefixCollator(256, lambda ids: {images: inputs[ids]}),
        processing_class=processor,
        peft_config=peft_config if lora is None else lora_config(model, r=4, lora_dropout=0.1, **lora),
        callbacks=list(callbacks),
        **trainer or {},
    )


def losses(trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixel_values = torch.randn(1, 3, 8, 8, generator=generator)
    return {"input_ids": torch.tensor([[1, *[IMAGE] * 16, 5, 6, 7]]), "pixel_values": pixel_values}


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model.eval()(**batch()).logits
