"""Options of contrastive training: the data and the CLIP here, the rest as transformers' `TrainingArguments`."""

import os
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from ..data.arguments import DataArguments
from ..training.arguments import unknown_options
from ..training.options import check_ranges, name_choice, read_config, typed
from .adapt import TUNINGS, Tuning
from .pairs import TEMPLATES
from .trainer import LOSSES


@dataclass
class ClipArguments(DataArguments):
    """What transformers' own arguments do not cover: the data, the CLIP, what of it trains, and the evaluation."""

    clip_model: str | None = field(default=None, metadata={"help": "Hub id or folder of a CLIP or SigLIP, or an adapter."})
    clip_revision: str | None = field(default=None, metadata={"help": "Commit or branch of it."})
    vision_tuning: str = field(
        default="lora", metadata={"help": "How the image tower trains; locked pictures are encoded once.", "choices": list(TUNINGS)}
    )
    text_tuning: str = field(default="lora", metadata={"help": "How the text tower trains.", "choices": list(TUNINGS)})
    last_layers: int = field(default=1, metadata={"help": "Of last_layers: so many, and what comes after them."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's scale is alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Of LoRA."})
    loss: str = field(default="info_nce", metadata={"help": "InfoNCE, or SigLIP's.", "choices": list(LOSSES)})
    train_temperature: bool = field(default=True, metadata={"help": "Learn the temperature, and SigLIP's bias."})
    texts_per_picture: int | None = field(
        default=None, metadata={"help": "Texts of a picture in a step, drawn anew in every epoch; all by default."}
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "Pictures whose activations are held at a time: large batches in little memory."}
    )
    train_on: str = field(
        default="texts", metadata={"help": "Texts, or class names in templates.", "choices": ["texts", "labels"]}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column with the class, for zero-shot scores: label, objects.name, ..."}
    )
    class_names: list[str] | None = field(default=None, metadata={"help": "All classes; those found by default."})
    templates: list[str] = field(
        default_factory=lambda: ["plain"],
        metadata={"help": f"Prompt templates with {{}} for the class, or one of {', '.join(TEMPLATES)}."},
    )
    long_texts: str = field(
        default="stop", metadata={"help": "Texts longer than the text tower reads.", "choices": ["stop", "cut"]}
    )
    on_bad_row: str = field(
        default="stop", metadata={"help": "Rows with unreadable pictures or empty texts.", "choices": ["stop", "skip"]}
    )
    allow_overlap: bool = field(
        default=False, metadata={"help": "Train even though training pictures are among those that are scored."}
    )
    score_before: bool = field(default=True, metadata={"help": "Score the held-out splits before training, too."})
    vectors_dir: str | None = field(
        default=None, metadata={"help": "Where vectors of locked pictures are kept; the data sets' cache by default."}
    )
    eval_batch_size: int = field(default=64, metadata={"help": "Pictures at a time in the evaluation."})
    merge: bool = field(
        default=False, metadata={"help": "Also write OUTPUT_DIR/merged, a plain checkpoint for stock transformers."}
    )

    @property
    def tuning(self) -> Tuning:
        """What trains."""
        return Tuning(
            self.vision_tuning,
            self.text_tuning,
            self.last_layers,
            self.train_temperature,
            self.lora_r,
            self.lora_alpha,
            self.lora_dropout,
        )

    @property
    def prompts(self) -> list[str]:
        """The templates themselves."""
        return TEMPLATES[self.templates[0]] if len(self.templates) == 1 and self.templates[0] in TEMPLATES else self.templates
