"""Options of a training run: the data and the vision side here, the rest as TRL's `SFTConfig` and `ModelConfig`.

Stage: command line and YAML file -> dataclasses, for recipes and for the checks before a run.
"""

import difflib
import os
import re
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..adapters.strategies import STRATEGIES, Strategy, choose_strategy
from ..data.arguments import DataArguments
from ..model.projector import ProjectorSettings
from .options import check_optimizer, check_ranges, name_choice, take_config, typed


@dataclass
class VisionArguments(ProjectorSettings, DataArguments):
    """What TRL's own arguments do not cover: the data, the encoder, the projector and the evaluation."""

    mixture: list[dict] | None = field(
        default=None,
        metadata={
            "help": "In the YAML file: a list of data sets to train on together, each with options of its own from "
            "dataset_name to weight; what an entry leaves out is taken from the top level."
        },
    )
    watch: list[dict] | None = field(
        default=None,
        metadata={
            "help": "In the YAML file: a list of data sets (old tasks, text only) that are scored before and after "
            "training, to see what is lost; each with options of its own from dataset_name to eval_limit."
        },
    )
    watch_text: str | None = field(
        default=None,
        metadata={
            "help": "Text file, or data set with a column text (its first 200 rows of ten words or more), whose "
            "perplexity is watched; with --watch, a sample of English by default."
        },
    )
    watch_text_split: str = field(default="test", metadata={"help": "Of the data set of --watch_text."})
    streaming: bool = field(
        default=False, metadata={"help": "Read training rows as they come, without a copy on disk; needs --max_steps."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Begin anew in --output_dir: checkpoints of an earlier run in it are removed, once all else "
            "is checked. Otherwise such a run is refused."
        },
    )
    allow_overlap: bool = field(
        default=False, metadata={"help": "Train even though training pictures are among those that are scored."}
    )
    on_bad_row: str = field(
        default="stop", metadata={"help": "Rows with unreadable pictures or empty texts.", "choices": ["stop", "skip"]}
    )
    vision_model: str | None = field(default=None, metadata={"help": "Hub id or folder of the vision encoder."})
    vision_revision: str | None = field(default=None, metadata={"help": "Commit or branch of the encoder."})
    vision_feature_layer: list[int] | None = field(
        default=None,
        metadata={
            "help": "Hidden state(s) of the encoder; several are concatenated. By default -2, and the last map of nets "
            "with stages (Swin, ResNet, ConvNeXt, ...)."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the pictures in pixels; by default the one that the encoder was built for."},
    )
    keep_class_token: bool = field(default=False, metadata={"help": "Pass the class token on, too."})
    stages: list[dict] | None = field(
        default=None,
        metadata={
            "help": "In the YAML file: a list of trainings one after the other, each with a name and options of its "
            "own; what an entry leaves out is taken from the top level and the command line."
        },
    )
    strategy: str = field(
        default="lora",
        metadata={
            "help": "What trains beside the projector: nothing (projector), LoRA on all linear layers of the decoder "
            "(lora) or on those of its attention (attention_lora), its last layers in full (top_layers), the encoder's "
            "(vision_layers), the whole decoder (full), or a decoder drawn at random from the configuration of "
            "--model_name_or_path (scratch). The last two save a whole model.",
            "choices": list(STRATEGIES),
        },
    )
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a trained adapter, or of a whole model with --strategy full, that is trained "
            "on, for this task; its bases and projector must be those of the run. The bases without it, or for none."
        },
    )
    top_layers: int | None = field(
        default=None, metadata={"help": "How many of the decoder's layers --strategy top_layers trains; 2 by default."}
    )
    vision_layers: int | None = field(
        default=None,
        metadata={"help": "Train so many of the encoder's last layers, too, with any strategy; not cached then."},
    )
    layer_decay: float | None = field(
        default=None,
        metadata={"help": "Factor on the learning rate for each layer that one lies below the top of its part."},
    )
    unfreeze_steps: int | None = field(
        default=None,
        metadata={
            "help": "Gradual unfreezing: every so many steps one more layer learns, from the decoder's last one "
            "downwards, then the encoder's; the projector and the head do from the beginning."
        },
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; --learning_rate by default."}
    )
    lora_vision: bool = field(
        default=False, metadata={"help": "LoRA on the encoder, too; its features are then not cached."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of what trains in the encoder; --learning_rate by default."}
    )
    init_lora_weights: str | None = field(
        default=None, metadata={"help": "Where LoRA starts: pissa, pissa_niter_4, ...; at zero by default."}
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: how many times the learning rate of A that of B is, 16 for example."}
    )
    feature_cache: bool = field(
        default=True, metadata={"help": "Encode each picture once and keep the result on disk."}
    )
    feature_cache_dir: str | None = field(default=None, metadata={"help": "Where; the data sets' cache by default."})
    feature_dtype: str = field(
        default="float16", metadata={"help": "Stored precision of features.", "choices": ["float16", "float32"]}
    )
    pack_rows: bool = field(
        default=False,
        metadata={
            "help": "Put several rows into a sequence of max_length tokens; on a GPU, where it is the default, all "
            "rows of a batch into one sequence."
        },
    )
    fused_lora: bool = field(
        default=True, metadata={"help": "Train plain LoRA layers in fewer computations, with the same gradients."}
    )
    compile_layers: bool = field(
        default=False, metadata={"help": "Compile the decoder's layers; the default on a GPU."}
    )
    eval_samples: int = field(
        default=0,
        metadata={
            "help": "At every evaluation during training, also answer so many questions of each data set's first "
            "held-out split and log the scores, as eval_CIDEr, eval_vqa_accuracy, ..."
        },
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better --metric_for_best_model."}
    )
    score_before: bool = field(default=False, metadata={"help": "Score the held-out splits before training, too."})
    generation_batch_size: int = field(default=64, metadata={"help": "Prompts at a time in the evaluation."})
    max_new_tokens: int = field(default=48, metadata={"help": "Tokens of a generated text at most."})
    num_beams: int = field(default=1, metadata={"help": "1 is greedy."})
    meteor: bool = field(default=False, metadata={"help": "Also score METEOR (needs Java, 6 s a split)."})


# The parser writes into the fields that it is given, and those of the projector are the configuration's, too.
VisionArguments.__dataclass_fields__ = {name: copy(each) for name, each in VisionArguments.__dataclass_fields__.items()}

_GPU_DEFAULTS = {
    "dtype": "bfloat16",
    "pack_rows": True,
    "compile_layers": True,
    "dataloader_num_workers": 4,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 4,
    # A copy that blocks waits for all work that the device was given before it.
    "accelerator_config": {"non_blocking": True},
}
"""What is fastest on CUDA; a configuration file and the command line override each. What trains stays in float32."""


_LOGGED = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "reward")
"""What every evaluation logs."""


def chosen_strategy(vision: VisionArguments, model_args: Any) -> Strategy:
    """What a run trains; see [`~vlm_peft.adapters.strategies.choose_strategy`].

    Args:
        vision, model_args: Of [`parse_arguments`].

    Raises:
        ValueError: For options that contradict each other.
    """
    return choose_strategy(
        vision.strategy,
        top_layers=vision.top_layers,
        vision_layers=vision.vision_layers,
        lora_vision=vision.lora_vision,
        is_quantized=model_args.load_in_4bit or model_args.load_in_8bit,
        target_modules=model_args.lora_target_modules,
        loraplus=vision.loraplus_lr_ratio is not None,
    )


def keeps_features(vision: VisionArguments) -> bool:
    """Whether pictures are encoded once: not when the encoder trains, since its features then change.

    Nor where it has trained before: see [`~vlm_peft.training.setup.find_start`].
    """
    strategy = choose_strategy(
        vision.strategy,
        top_layers=vision.top_layers,
        vision_layers=vision.vision_layers,
        lora_vision=vision.lora_vision,
    )
    return vision.feature_cache and not strategy.encoder_trains


def data_sources(arguments: VisionArguments) -> list[DataArguments]:
    """The data sets of a run: the entries of `mixture`, or the one that the options name.

    Raises:
        ValueError: When an entry has an unknown option, or a value of another kind.
    """
    common = DataArguments(**{each.name: getattr(arguments, each.name) for each in fields(DataArguments)})
    if arguments.mixture is None:
        return [common]
    sources = _entries(arguments.mixture, common, "the mixture")
    if not sources:
        raise ValueError("The mixture is empty: expected at least one data set.")
    return sources


def watched_sources(arguments: VisionArguments) -> list[DataArguments]:
    """The data sets of `watch`, each with options of its own alone.

    Raises:
        ValueError: When an entry has an unknown option, a value of another kind, or no data set.
    """
    sources = _entries(arguments.watch or [], DataArguments(), "watch")
    for number, source in enumerate(sources, 1):
        if source.dataset_name is None or not source.eval_splits:
            raise ValueError(f"Entry {number} of watch: expected dataset_name and eval_splits.")
    return sources


def _entries(entries: list[dict], common: DataArguments, where: str) -> list[DataArguments]:
    names = [each.name for each in fields(DataArguments)]
    sources = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not entry:
            raise ValueError(f"Entry {number} of {where}: expected options such as dataset_name, got {entry!r}.")
        unknown = [name for name in entry if name not in names]
        if unknown:
            raise ValueError(f"Entry {number} of {where}: unknown option {with_hints(unknown, names)}.")
        try:
            source = replace(common, **typed(entry, [DataArguments]))
            check_ranges(source)
        except ValueError as error:
            raise ValueError(f"Entry {number} of {where}: {error}") from error
        sources.append(source)
    return sources


def parse_arguments(
    arguments: list[str],
    *,
    program: str = "sft.py",
    description: str | None = None,
    entry: dict[str, Any] | None = None,
    kinds: tuple[type, type] | None = None,
    defaults: dict[str, Any] | None = None,
):
    """Command line and YAML file -> `(VisionArguments, SFTConfig, ModelConfig)`.

    Args:
        arguments (`list[str]`): `--config FILE.yaml` and options, which override the file's.
        program (`str`, *optional*, defaults to `"sft.py"`): Put before messages.
        description (`str`, *optional*): First line of `--help`.
        entry (`dict`, *optional*): Options of one of the file's `stages`, which override all others. Without it, those
            of a file with stages are taken as they are, for [`~vlm_peft.training.stages.parse_stages`].
        kinds (`tuple[type, type]`, *optional*): Of another recipe, a subclass of [`VisionArguments`] and TRL's options.
        defaults (`dict`, *optional*): Of its options, where they are not those of the dataclasses.

    Raises:
        SystemExit: For an unknown key, naming the nearest known one, or a missing one, and for a value of another kind
            or out of its range.
        OSError: When the file cannot be read.
    """
    from trl import ModelConfig, SFTConfig, TrlParser

    types: Any = (*(kinds or (VisionArguments, SFTConfig)), ModelConfig)
    # The usage that argparse makes of 250 options would push its message off the screen.
    usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]  (--help lists the options)"
    given = list(arguments)
    config: dict[str, Any] = {}

    def parse(**of_device) -> tuple:
        parser = TrlParser(types, prog=program, allow_abbrev=False, description=description, usage=usage)
        # TRL's own default, 0.05, costs time in every layer.
        parser.set_defaults(lora_dropout=0.0, **(defaults or {}), **of_device)
        unknown = parser.set_defaults_with_config(**config)
        *found, others = parser.parse_args_into_dataclasses(args=given, return_remaining_strings=True)
        return *found, unknown + others

    try:
        config = take_config(given, types)
        if config:
            if entry is not None:
                config = {name: value for name, value in config.items() if name != "stages"} | typed(entry, types)
                given = _without(given, entry)
            os.environ.update({name: str(value) for name, value in (config.pop("env", None) or {}).items()})
        *parsed, unknown = parse()
        if parsed[1].device.type == "cuda":
            *parsed, unknown = parse(**_gpu_defaults(parsed[0], parsed[2]))
    except OverflowError as error:
        # transformers makes whole numbers of those above 1.
        said = "a number of steps is infinite, expected finite --logging_steps, --eval_steps and --save_steps"
        raise SystemExit(f"{program}: {said}.") from error
    except (ValueError, TypeError, ImportError) as error:
        # Options that contradict each other or the machine (bf16 without a GPU and without use_cpu), what is
        # not installed (deepspeed), or a broken file.
        said = name_choice(error, types) if isinstance(error, ValueError) else str(error)
        raise SystemExit(f"{program}: {' '.join(said.split())}") from error
    if unknown:
        known = sorted({each.name for kind in types for each in fields(kind)})
        keys = [text.split("=")[0].lstrip("-") for text in unknown if text.startswith("--")] or [unknown[0]]
        raise SystemExit(f"{program}: unknown option: {with_hints(keys, known)}.")
    vision_args, training_args, model_args = parsed
    for options in (vision_args, model_args):
        for each in fields(options):
            # On the command line there is no other way to take back what the file says.
            value = getattr(options, each.name)
            if each.default is None and value in ("none", "null", ["none"], ["null"]):
                setattr(options, each.name, None)
            elif value in (["none"], ["null"]):
                setattr(options, each.name, [])
    try:
        check_ranges(*parsed)
        check_optimizer(parsed[1])
        if vision_args.stages is not None:
            return vision_args, training_args, model_args
        _check_strategy(*parsed)
        _check_reports(training_args)
        sources = data_sources(vision_args)
        watched_sources(vision_args)
    except ValueError as error:
        raise SystemExit(f"{program}: {error}") from error
    if all(source.train_split is None for source in sources):
        raise SystemExit(f"{program}: --train_split is null: expected at least one data set to train on.")
    if vision_args.streaming and training_args.max_steps <= 0:
        raise SystemExit(f"{program}: --streaming: the length of a stream is not known, so --max_steps is needed.")
    if not model_args.use_peft and not STRATEGIES[vision_args.strategy].trains_decoder:
        raise SystemExit(f"{program}: --use_peft true is missing: this recipe trains LoRA and the projector.")
    if vision_args.early_stopping_patience is not None and not training_args.load_best_model_at_end:
        raise SystemExit(
            f"{program}: --early_stopping_patience needs --load_best_model_at_end true, --metric_for_best_model, and "
            "--eval_strategy and --save_strategy of the same steps."
        )
    best = str(training_args.metric_for_best_model or "loss").removeprefix("eval_")
    if training_args.eval_strategy != "no" and best not in _LOGGED and not vision_args.eval_samples:
        raise SystemExit(f"{program}: --metric_for_best_model {best} is a score, so --eval_samples is needed.")
    for name, value in (
        ("dataset_name", next((None for source in sources if source.dataset_name is None), "given")),
        ("vision_model", vision_args.vision_model),
        ("model_name_or_path", model_args.model_name_or_path),
    ):
        if value is None:
            raise SystemExit(f"{program}: --{name} is missing; give it on the command line or in the --config file.")
    return vision_args, training_args, model_args


def _without(given: list[str], names: Iterable[str]) -> list[str]:
    """A command line without some options and their values."""
    kept, is_out = [], False
    for text in given:
        if text.startswith("--"):
            is_out = text[2:].partition("=")[0] in names
        if not is_out:
            kept.append(text)
    return kept


def _gpu_defaults(vision: VisionArguments, model_args: Any) -> dict[str, Any]:
    defaults = dict(_GPU_DEFAULTS)
    if vision.strategy in STRATEGIES and chosen_strategy(vision, model_args).trains_whole_layers:
        del defaults["dtype"]
    return defaults


def _check_strategy(vision: VisionArguments, training: Any, model_args: Any) -> None:
    """Refuses what a strategy cannot do.

    Raises:
        ValueError: For options that contradict each other.
    """
    strategy = chosen_strategy(vision, model_args)
    for name in model_args.lora_modules_to_save or ():
        # peft makes a regular expression of it.
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"--lora_modules_to_save {name}: expected names of layers, such as lm_head.")
    if strategy.trains_whole_layers and model_args.dtype not in (None, "auto", "float32"):
        raise ValueError(
            f"--dtype {model_args.dtype}: the layers that --strategy {vision.strategy} trains must be in float32, "
            "where small updates are kept: leave --dtype out; --bf16 true computes in bfloat16."
        )
    if strategy.trains_decoder and training.push_to_hub:
        raise ValueError(
            f"--push_to_hub: what is pushed is an adapter folder, and --strategy {vision.strategy} saves a whole "
            "model: leave it out, and upload the folder with `hf upload`."
        )
    if vision.unfreeze_steps is not None and training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            f"--unfreeze_steps needs a schedule that is known beforehand, got {training.lr_scheduler_type.value}."
        )


def _check_reports(training_args: Any) -> None:
    """Refuses names in `--report_to` that are none, or whose program is not installed."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in training_args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to is {name!r}, expected none, all or some of {known}.")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to names {name}, which is not installed: install it, or give none.")


def with_hints(names: list[str], known: list[str]) -> str:
    """Unknown names, each with the nearest known one."""
    hints = []
    for name in names:
        near = difflib.get_close_matches(name, known, n=1)
        hints.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return ", ".join(hints)
