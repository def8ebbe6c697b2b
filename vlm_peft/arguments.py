"""Options of a training run: the data and the vision side here, the rest as TRL's `SFTConfig` and `ModelConfig`.

Stage: command line and YAML file -> dataclasses, for recipes and for the checks before a run.
"""

import difflib
from dataclasses import dataclass, field, fields
from typing import Any

from .tasks import TASKS


@dataclass
class DataArguments:
    """Where rows come from and what they mean. In a `mixture`, each entry has its own."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, parquet file or folder, or image folder."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit or branch of the data set."})
    stored_split: str | None = field(default=None, metadata={"help": "The one stored split, with --split_column."})
    split_column: str | None = field(default=None, metadata={"help": "Column that names each row's true split."})
    task: str = field(default="caption", metadata={"help": "What rows mean.", "choices": list(TASKS)})
    image_column: str = field(default="image", metadata={"help": "Column with the picture."})
    text_column: str | None = field(default=None, metadata={"help": "Column with the texts; found by usual names."})
    instruction: str | None = field(
        default=None, metadata={"help": "What the user says beside the picture; each task has its own by default."}
    )
    slide_pages: str = field(
        default="evidence",
        metadata={"help": "Of a deck: the pages that an answer needs, or all.", "choices": ["evidence", "all"]},
    )
    name_pages: bool = field(default=False, metadata={"help": "Answers about a deck name their pages, too."})


@dataclass
class VisionArguments(DataArguments):
    """What TRL's own arguments do not cover: the data, the encoder, the projector and the evaluation."""

    train_split: str = field(default="train", metadata={"help": "Rows to train on."})
    eval_splits: list[str] = field(default_factory=lambda: ["test"], metadata={"help": "Held-out splits to score."})
    train_limit: int | None = field(default=None, metadata={"help": "First so many training rows only."})
    eval_limit: int | None = field(default=None, metadata={"help": "First so many rows of each held-out split only."})
    on_bad_row: str = field(
        default="stop", metadata={"help": "Rows with unreadable pictures or empty texts.", "choices": ["stop", "skip"]}
    )
    vision_model: str | None = field(default=None, metadata={"help": "Hub id or folder of the vision encoder."})
    vision_revision: str | None = field(default=None, metadata={"help": "Commit or branch of the encoder."})
    vision_feature_layer: list[int] = field(
        default_factory=lambda: [-2], metadata={"help": "Hidden state(s) of the encoder; several are concatenated."}
    )
    keep_class_token: bool = field(default=False, metadata={"help": "Pass the class token on, too."})
    projector_type: str = field(default="mlp", metadata={"help": "Projector.", "choices": ["linear", "mlp"]})
    projector_layer_norm: bool = field(default=False, metadata={"help": "Normalize the projector's input."})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; --learning_rate by default."}
    )
    pixel_shuffle_factor: int = field(default=1, metadata={"help": "2 joins 2 x 2 patches into one image token."})
    feature_cache: bool = field(
        default=True, metadata={"help": "Encode each picture once and keep the result on disk."}
    )
    feature_cache_dir: str | None = field(default=None, metadata={"help": "Where; the data sets' cache by default."})
    feature_dtype: str = field(
        default="float16", metadata={"help": "Stored precision of features.", "choices": ["float16", "float32"]}
    )
    pack_rows: bool = field(default=False, metadata={"help": "Put several rows into a sequence of max_length tokens."})
    score_before: bool = field(default=False, metadata={"help": "Score the held-out splits before training, too."})
    blind_splits: list[str] = field(default_factory=list, metadata={"help": "Splits to score with swapped pictures."})
    generation_batch_size: int = field(default=64, metadata={"help": "Prompts at a time in the evaluation."})
    max_new_tokens: int = field(default=48, metadata={"help": "Tokens of a generated text at most."})
    num_beams: int = field(default=1, metadata={"help": "1 is greedy."})
    meteor: bool = field(default=False, metadata={"help": "Also score METEOR (needs Java, 6 s a split)."})


def data_arguments(arguments: DataArguments) -> DataArguments:
    """The part of a run's options that says where its rows come from."""
    return DataArguments(**{each.name: getattr(arguments, each.name) for each in fields(DataArguments)})


def parse_arguments(arguments: list[str], *, program: str = "sft.py", description: str | None = None):
    """Command line and YAML file -> `(VisionArguments, SFTConfig, ModelConfig)`.

    Args:
        arguments (`list[str]`): `--config FILE.yaml` and options, which override the file's.
        program (`str`, *optional*, defaults to `"sft.py"`): Put before messages.
        description (`str`, *optional*): First line of `--help`.

    Raises:
        SystemExit: For an unknown key, naming the nearest known one, or a missing one.
    """
    from trl import ModelConfig, SFTConfig, TrlParser
    from yaml import YAMLError

    types: Any = (VisionArguments, SFTConfig, ModelConfig)
    # The usage that argparse makes of 250 options would push its message off the screen.
    usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]  (--help lists the options)"
    parser = TrlParser(types, prog=program, allow_abbrev=False, description=description, usage=usage)
    try:
        *parsed, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    except (ValueError, YAMLError) as error:
        # Options that contradict each other or the machine (bf16 without a GPU and without use_cpu), or a broken file.
        raise SystemExit(f"{program}: {error}") from error
    if unknown:
        known = sorted({each.name for kind in types for each in fields(kind)})
        keys = [text.split("=")[0].lstrip("-") for text in unknown if text.startswith("--")] or [unknown[0]]
        hints = []
        for key in keys:
            near = difflib.get_close_matches(key, known, n=1)
            hints.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        raise SystemExit(f"{program}: unknown option: {', '.join(hints)}.")
    vision_args, training_args, model_args = parsed
    if not model_args.use_peft:
        raise SystemExit(f"{program}: --use_peft true is missing: this recipe trains LoRA and the projector.")
    for name, value in (
        ("dataset_name", vision_args.dataset_name),
        ("vision_model", vision_args.vision_model),
        ("model_name_or_path", model_args.model_name_or_path),
    ):
        if value is None:
            raise SystemExit(f"{program}: --{name} is missing; give it on the command line or in the --config file.")
    return vision_args, training_args, model_args
