"""Options of contrastive training: the data and the CLIP here, the rest as transformers' `TrainingArguments`."""

import os
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from ..data.arguments import DataArguments
from ..training.arguments import with_hints
from ..training.options import check_optimizer, check_ranges, name_choice, take_config
from .adapt import TUNINGS, Tuning
from .pairs import TEMPLATES
from .trainer import LOSSES


@dataclass
class ClipArguments(DataArguments):
    """What transformers' own arguments do not cover: the data, the CLIP, what of it trains, and the evaluation."""

    clip_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a CLIP or SigLIP; eval/clip.py takes an adapter, too."}
    )
    clip_revision: str | None = field(default=None, metadata={"help": "Commit or branch of it."})
    vision_tuning: str = field(
        default="lora",
        metadata={"help": "How the image tower trains; locked pictures are encoded once.", "choices": list(TUNINGS)},
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
        default=None,
        metadata={"help": "Pictures whose activations are held at a time: large batches in little memory."},
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
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Begin anew in --output_dir: checkpoints of an earlier run in it are removed."},
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
        default=False,
        metadata={
            "help": "Also write OUTPUT_DIR/merged, a plain checkpoint for stock transformers; --push_to_hub then "
            "pushes that one."
        },
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
        return (
            TEMPLATES[self.templates[0]]
            if len(self.templates) == 1 and self.templates[0] in TEMPLATES
            else self.templates
        )


_AT_LEAST_ONE = ("last_layers", "texts_per_picture", "chunk_size", "eval_batch_size")


def parse_arguments(
    arguments: list[str],
    *,
    program: str = "clip.py",
    description: str | None = None,
    kind: type[ClipArguments] = ClipArguments,
) -> tuple[Any, TrainingArguments]:
    """Command line and YAML file -> options.

    Args:
        arguments (`list[str]`): `--config FILE.yaml` and options, which override the file's.
        program (`str`, *optional*, defaults to `"clip.py"`): Put before messages.
        description (`str`, *optional*): First line of `--help`.
        kind (`type`, *optional*): Of the options beside `TrainingArguments`.

    Raises:
        SystemExit: For an unknown or missing option, and for a value of another kind or out of its range.
        OSError: When the file cannot be read.
    """
    types: Any = (kind, TrainingArguments)
    usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]  (--help lists the options)"
    parser = HfArgumentParser(types, prog=program, allow_abbrev=False, description=description, usage=usage)
    given = list(arguments)
    known = {each.name for kind in types for each in fields(kind)}
    unknown: list[str] = []
    try:
        config = take_config(given, types)
        if config:
            os.environ.update({name: str(value) for name, value in (config.pop("env", None) or {}).items()})
            unknown = [name for name in config if name not in known]
            parser.set_defaults(**{name: value for name, value in config.items() if name in known})
        options, training, others = parser.parse_args_into_dataclasses(args=given, return_remaining_strings=True)
    except (ValueError, TypeError) as error:
        said = name_choice(error, types) if isinstance(error, ValueError) else str(error)
        raise SystemExit(f"{program}: {' '.join(said.split())}") from error
    unknown += [text.split("=")[0].lstrip("-") for text in others if text.startswith("--")] or others[:1]
    if unknown:
        raise SystemExit(f"{program}: unknown option: {with_hints(unknown, sorted(known))}.")
    for each in fields(options):
        # On the command line there is no other way to take back what the file says.
        if each.default is None and getattr(options, each.name) in ("none", "null", ["none"], ["null"]):
            setattr(options, each.name, None)
        elif getattr(options, each.name) in (["none"], ["null"]):
            setattr(options, each.name, [])
    try:
        check_ranges(options, training)
        check_optimizer(training)
        for name in _AT_LEAST_ONE:
            value = getattr(options, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1.")
        if options.clip_model is None or options.dataset_name is None:
            lacking = "clip_model" if options.clip_model is None else "dataset_name"
            raise ValueError(f"--{lacking} is missing; give it on the command line or in the --config file.")
        if options.train_on == "labels" and options.label_column is None:
            raise ValueError("--train_on labels needs --label_column, the column with the class.")
    except ValueError as error:
        raise SystemExit(f"{program}: {error}") from error
    # Batches hold texts and pictures under names that no model's forward has.
    training.remove_unused_columns = False
    if training.ddp_find_unused_parameters is None:
        # All that trains has a part in every step; to look for what has none takes time.
        training.ddp_find_unused_parameters = False
    return options, training
