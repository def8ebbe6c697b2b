"""Training setup: the options of a run -> its bases, processor, model, data sets' places and trainer.

Stage: below the recipe, which trains with all of it, and the checks before a run, which only try it.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig, get_quantization_config

from ..adapters.folder import check_bases, holds_encoder, is_adapter_folder
from ..adapters.fused_lora import fuse_lora
from ..adapters.loading import find_model, load_trained, read_config
from ..adapters.lora import add_turn_rows
from ..adapters.pissa import is_pissa
from ..adapters.strategies import apply_strategy, carry_on, check_lora_sizes
from ..data.arguments import DataArguments
from ..data.collator import SharedPrefixCollator
from ..data.mixture import mix
from ..data.probe import Layout, probe
from ..data.rows import picture_folder, resolve_paths
from ..data.splits import bind_task
from ..data.streaming import load_stream, stream_rows
from ..hub.access import looks_local
from ..model import attention  # noqa: F401  (registers what `attn_implementation` may name)
from ..model.configuration_vision_qwen import JOINT_FIELDS, VisionQwenConfig
from ..model.cuda.training import CapturedDecoder, can_capture, compile_layers, sequence_length
from ..model.joining import joint_config
from ..model.modeling_vision_qwen import VisionQwen
from ..model.processing_vision_qwen import VisionQwenProcessor
from ..model.shared_prefix import FLEX_BLOCK
from ..tasks import TASK_FILE, TaskSettings, task_options
from .arguments import VisionArguments, chosen_strategy, data_sources
from .trainer import VisionSFTTrainer, prepare_training_arguments

logger = logging.getLogger(__name__)

CLONE = Path(__file__).resolve().parents[2]
"""The repository, where the package lies in one."""


def local(name: str, option: str) -> str:
    """A path that the repository has is found from any working directory.

    Args:
        name (`str`): Path, or id on the Hub, which is returned as it is.
        option (`str`): Named in the message.

    Raises:
        FileNotFoundError: For a path, not a Hub id, that is not there; names the option.
    """
    if Path(name).exists():
        return name
    # Beside an installed package lie others, whose names are no paths of ours.
    if (CLONE / "recipes").is_dir() and (CLONE / name).exists():
        return str(CLONE / name)
    if looks_local(name):
        raise FileNotFoundError(f"--{option} {name} is not there: expected a path that exists, or an id on the Hub.")
    return name


def sources(vision: VisionArguments) -> list[DataArguments]:
    """The data sets of the run, with paths that exist from here.

    Raises:
        FileNotFoundError: When a data set's path is not there.
        ValueError: When a blind split is not among the evaluation splits.
    """
    found = data_sources(vision)
    for source in found:
        unknown = [name for name in source.blind_splits if name not in source.eval_splits]
        if unknown:
            raise ValueError(f"blind_splits: {', '.join(unknown)} must be among eval_splits, {source.eval_splits}.")
    return [replace(source, dataset_name=local(str(source.dataset_name), "dataset_name")) for source in found]


def training_sources(vision: VisionArguments) -> list[DataArguments]:
    """Those of them that are trained on.

    Raises:
        ValueError: When there is none.
    """
    found = [source for source in sources(vision) if source.train_split is not None]
    if not found:
        raise ValueError("train_split is null everywhere: expected at least one data set to train on.")
    return found


def training_stream(
    vision: VisionArguments, training: SFTConfig, processor: VisionQwenProcessor, held_out_hashes: frozenset[str]
) -> IterableDataset:
    """Training rows of a run with `streaming`, from all its data sets; see [`~vlm_peft.data.streaming.stream_rows`].

    Args:
        vision, training: The run's options.
        processor: Of [`load_processor`].
        held_out_hashes (`frozenset[str]`): Of [`~vlm_peft.data.leakage.picture_hashes`].
    """
    streams, weights = [], []
    for source in training_sources(vision):
        rows = load_stream(source, str(source.train_split), limit=source.train_limit)
        task = bind_task(source, rows.column_names)
        rows = resolve_paths(rows, task.image_columns, picture_folder(str(source.dataset_name), source.image_folder))
        streams.append(
            stream_rows(
                rows,
                task,
                processor,
                max_length=training.max_length,
                on_bad_row=vision.on_bad_row,
                held_out_hashes=held_out_hashes,
                seed=training.seed,
            )
        )
        weights.append(source.weight)
    return mix(streams, weights, training.seed)


def bases(vision: VisionArguments, model_args: ModelConfig) -> dict[str, Any]:
    """Names and revisions of encoder and decoder, and how they are joined.

    They are for [`~vlm_peft.model.joining.join_pretrained`].

    Raises:
        FileNotFoundError: When a folder is not there.
    """
    layers = vision.vision_feature_layer
    return {
        "vision": local(str(vision.vision_model), "vision_model"),
        "text": local(str(model_args.model_name_or_path), "model_name_or_path"),
        "vision_revision": vision.vision_revision,
        "text_revision": None if model_args.model_revision == "main" else model_args.model_revision,
        **{name: getattr(vision, name) for name in JOINT_FIELDS if hasattr(vision, name)},
        "vision_feature_layer": layers[0] if layers is not None and len(layers) == 1 else layers,
    }


def loading_arguments(model_args: ModelConfig) -> dict[str, Any]:
    """How the bases are loaded: before training, and again when the saved adapter is checked and scored."""
    name = model_args.dtype
    return {
        "dtype": torch.float32 if name in (None, "auto") else getattr(torch, name),
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(model_args),
    }


def load_processor(vision: VisionArguments, model_args: ModelConfig) -> tuple[VisionQwenProcessor, VisionQwenConfig]:
    """The run's processor and composite configuration; no weights are read.

    Raises:
        OSError: When a base is not there.
        ValueError: When the two do not fit.
    """
    named = bases(vision, model_args)
    try:
        config = joint_config(**named)
        return VisionQwenProcessor.from_vision_text_pretrained(named["vision"], named["text"], config), config
    except OSError as error:
        raise OSError(_not_loaded(named, error)) from error


def find_start(vision: VisionArguments, training: Any, model_args: ModelConfig) -> Path | None:
    """The folder that a run starts from, after what can be compared without weights; they are, once they are loaded.

    Where its adapter has changed the encoder, pictures are encoded in every step: `feature_cache` is turned off.

    Args:
        vision, training, model_args: Of [`~vlm_peft.training.arguments.parse_arguments`].

    Returns:
        `Path`, or `None` when the run starts from its bases.

    Raises:
        FileNotFoundError: When `--start_from` is not there.
        ValueError: When it is no trained model, or has other bases, another projector or other LoRA than the run, or
            its strategy cannot go on from it.
    """
    if vision.start_from in (None, "none"):
        # A file's start is left out on the command line.
        vision.start_from = None
        return None
    folder = find_model(local(vision.start_from, "start_from"))
    strategy = chosen_strategy(vision, model_args)
    said = f"--start_from {vision.start_from}"
    if folder.resolve() == Path(training.output_dir).resolve():
        raise ValueError(f"{said} is --output_dir, too, and would be written over: choose another --output_dir.")
    saved = read_config(folder)
    if strategy.draws_decoder:
        raise ValueError(f"{said}: --strategy scratch draws the decoder anew: leave one of the two out.")
    if not is_adapter_folder(folder) and not strategy.trains_decoder:
        raise ValueError(f"{said} is a whole model, on which no adapter can be put: give --strategy full.")
    if is_pissa(vision.init_lora_weights):
        raise ValueError(f"{said}: PiSSA takes its start out of the bases: leave --init_lora_weights out.")
    _, config = load_processor(vision, model_args)
    text_config: Any = config.text_config
    # Rows of turn tokens are added when the weights are there.
    text_config.vocab_size = max(text_config.vocab_size, *(token + 1 for token in config.turn_token_ids or ()), 0)
    check_bases(saved, config, said)
    for name in JOINT_FIELDS:
        there, here = getattr(saved, name), getattr(config, name)
        compared = {"vision_feature_layer": "hidden_state_indices", "image_size": "picture_size"}.get(name, name)
        if name != "vision_layout" and getattr(saved, compared) != getattr(config, compared):
            option = f"--{name}" if hasattr(vision, name) else name
            raise ValueError(
                f"{said}: its projector has {option} {there}, expected {here} as here: give both the same."
            )
    if not is_adapter_folder(folder):
        return folder
    if strategy.lora or strategy.lora_vision:
        sizes = {"r": model_args.lora_r, "lora_alpha": model_args.lora_alpha}
        check_lora_sizes(folder, sizes | {name: getattr(model_args, name) for name in ("use_rslora", "use_dora")})
    if vision.feature_cache and holds_encoder(folder):
        PartialState().print(f"{said} has changed the encoder: pictures are encoded in every step.")
        vision.feature_cache = False
    return folder


def load_model(
    vision: VisionArguments,
    model_args: ModelConfig,
    device: torch.device | str = "cpu",
    start: str | Path | None = None,
) -> tuple[VisionQwen, VisionQwenProcessor]:
    """Frozen encoder + decoder + fresh projector, with their processor; the decoder may be drawn at random.

    Args:
        vision, model_args: Of [`~vlm_peft.training.arguments.parse_arguments`].
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where the model goes.
        start (`str` or `Path`, *optional*): Folder of an earlier training. A decoder that trains as a whole starts from
            it, what an adapter held merged; an adapter is put around the bases, see [`build_trainer`].

    Raises:
        OSError: When a base is not there.
        ValueError: When the two do not fit, the start was trained on others, or the decoder gives in a batch what it
            does not give alone.
    """
    named = bases(vision, model_args)
    parts = dict(named)
    try:
        strategy = chosen_strategy(vision, model_args)
        if strategy.draws_decoder:
            parts |= {"text": None, "text_revision": None, "text_config": joint_config(**named).text_config}
        if start is not None and strategy.trains_decoder:
            # An adapter is put on the run's bases, which may lie elsewhere, and compared with them.
            of_run = {part: named[part] for part in ("vision", "text")} if is_adapter_folder(start) else {}
            model = load_trained(start, merge=True, **of_run, **loading_arguments(model_args))
        else:
            model = VisionQwen.from_vision_text_pretrained(**parts, **loading_arguments(model_args))
    except OSError as error:
        raise OSError(_not_loaded(named, error)) from error
    model.model.vision_tower.requires_grad_(False)
    processor = VisionQwenProcessor.from_vision_text_pretrained(named["vision"], named["text"], model.config)
    if start is None or not strategy.trains_decoder:
        add_turn_rows(model)
    if start is not None and is_adapter_folder(start):
        check_bases(read_config(Path(start)), model.config, f"--start_from {start}")
    model = model.to(device)
    probe(model)
    return model, processor


def describe_layout(layout: Layout, rows: Any) -> str:
    """One line on how rows are laid out, and what it costs where nothing is shared.

    Args:
        layout ([`~vlm_peft.data.probe.Layout`]): Of the run's model.
        rows (`Dataset` or `IterableDataset`): Encoded; of a stream the cost is not known beforehand.
    """
    if layout.sharing:
        return (
            "rows share their prefixes: probed on this model, a text beside others differs from the text alone by "
            f"{layout.difference:.0e} of its hidden states, and is moved by their change by {layout.leak:.0e}"
        )
    cost = ""
    if isinstance(rows, Dataset):
        # A sample is enough for two digits.
        chosen = rows["branch_ids"][:: max(1, len(rows) // 1000)]
        shared = sum(len(branches) for branches in chosen)
        separate = sum(len(branches) + (max(branches) - 1) * branches.count(0) for branches in chosen)
        cost = f"; {separate / shared:.1f}x the decoder tokens of shared prefixes"
    return f"rows are laid out one text a sequence: {layout.reason}{cost}"


def _not_loaded(named: dict[str, Any], error: OSError) -> str:
    # What transformers says when the Hub cannot be reached names no repository.
    return f"Cannot load the encoder {named['vision']} or the decoder {named['text']}. {error}"


def check_steps(rows: int, training: SFTConfig) -> int:
    """Optimizer steps of the run.

    Args:
        rows (`int`): Encoded rows to train on.
        training (`SFTConfig`): Batches, epochs, steps.

    Raises:
        ValueError: When there is none.
    """
    each = training.train_batch_size * training.world_size
    batches = rows // each if training.dataloader_drop_last else math.ceil(rows / each)
    steps = training.max_steps
    if steps < 0:
        steps = math.ceil(training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps))
    if not batches or steps < 1:
        raise ValueError(
            f"The run has no step: {rows:,} rows in batches of {each}"
            f"{', of which the last is dropped' if training.dataloader_drop_last else ''}, "
            f"{training.num_train_epochs:g} epochs, max_steps {training.max_steps}. Lower "
            "--per_device_train_batch_size, or raise --num_train_epochs or --max_steps."
        )
    return steps


def adapted_model(
    vision: VisionArguments, model_args: ModelConfig, model: VisionQwen, start: str | Path | None = None
) -> tuple[Any, Any]:
    """What the options' strategy trains.

    Args:
        vision, model_args: Of [`~vlm_peft.training.arguments.parse_arguments`].
        model ([`VisionQwen`]): Of [`load_model`].
        start (`str` or `Path`, *optional*): Adapter folder of an earlier training, of which the adapter goes on.

    Returns:
        The model, and the `peft.LoraConfig` of the adapter that is to be put around it; `None` where it has one, or
        trains itself.

    Raises:
        ValueError: When the options ask for LoRA that the model cannot have.
    """
    peft_config = apply_strategy(
        model,
        chosen_strategy(vision, model_args),
        target_modules=model_args.lora_target_modules,
        init_lora_weights=vision.init_lora_weights or True,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        modules_to_save=model_args.lora_modules_to_save,
    )
    if peft_config is not None and start is not None:
        return carry_on(model, peft_config, start), None
    return model, peft_config


def task_file(vision: VisionArguments) -> dict[str, str]:
    """File name -> text of what an adapter's folder says of its task."""
    first = data_sources(vision)[0]
    settings = TaskSettings(
        task=first.task,
        instruction=first.instruction,
        max_new_tokens=vision.max_new_tokens,
        num_beams=vision.num_beams,
        **task_options(first),
    )
    return {TASK_FILE: settings.to_json()}


def build_trainer(
    vision: VisionArguments,
    training: SFTConfig,
    model_args: ModelConfig,
    model: VisionQwen,
    processor: VisionQwenProcessor,
    train_dataset: Any,
    fetch_images: Callable[[list], dict[str, torch.Tensor]],
    *,
    eval_dataset: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    score: Callable[[VisionQwen | PeftModel], dict[str, float]] | None = None,
    extra_files: dict[str, str] | None = None,
    start: str | Path | None = None,
) -> VisionSFTTrainer:
    """What the options' strategy trains, and its trainer with its collator.

    Args:
        vision, training, model_args: Of [`~vlm_peft.training.arguments.parse_arguments`]; `training` is changed in
            place by [`~vlm_peft.training.trainer.prepare_training_arguments`].
        model, processor: Of [`load_model`].
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`): Encoded rows.
        fetch_images (`Callable`): Picture numbers of both -> model inputs.
        callbacks, score, extra_files: Of [`~vlm_peft.training.trainer.VisionSFTTrainer`]; the task's settings are
            added to the files.
        start (`str` or `Path`, *optional*): Adapter folder of an earlier training, of which the adapter goes on.

    Raises:
        ValueError: When the options ask for LoRA that the model cannot have.
    """
    trained, peft_config = adapted_model(vision, model_args, model, start)
    sharing = probe(model).sharing
    is_cuda = training.device.type == "cuda" and sharing
    if is_cuda and model_args.attn_implementation is None and type(model.model.language_model)._supports_flex_attn:
        model.set_attn_implementation({"text_config": "flex_attention"})
    is_one_sequence = vision.pack_rows and is_cuda
    collator = SharedPrefixCollator(
        processor.tokenizer.pad_token_id,
        fetch_images,
        max_length=training.max_length,
        packing=vision.pack_rows,
        image_token_id=model.config.image_token_id,
        sequence_length=_sequence_length(train_dataset, training) if is_one_sequence else None,
        sharing=sharing,
    )
    trainer = VisionSFTTrainer(
        model=trained,
        args=prepare_training_arguments(training),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=list(callbacks),
        extra_files=task_file(vision) | (extra_files or {}),
        projector_learning_rate=vision.projector_learning_rate,
        vision_learning_rate=vision.vision_learning_rate,
        layer_decay=vision.layer_decay,
        unfreeze_steps=vision.unfreeze_steps,
        loraplus_lr_ratio=vision.loraplus_lr_ratio,
        score=score,
    )
    adapted: Any = trainer.model
    on = [f"attention {model.model.language_model.config._attn_implementation}"]
    if collator.sequence_length is not None:
        on.append(f"a batch in one sequence of {collator.sequence_length:,} tokens")
    if vision.fused_lora and any(isinstance(module, LoraLayer) for module in adapted.modules()):
        left_out = fuse_lora(adapted)
        on.append("fused LoRA" + (f" (not in {len(left_out)} layers: {left_out[0]})" if left_out else ""))
    # Texts of their own lengths would be compiled for each of them.
    if vision.compile_layers and sharing:
        compile_layers(adapted)
        on.append("compiled layers")
        if can_capture(adapted, training):
            CapturedDecoder(adapted)
            on.append("CUDA graphs")
    if training.device.type == "cuda":
        logger.info("On this GPU: %s.", ", ".join(on))
    return trainer


def _sequence_length(train_dataset: Any, training: SFTConfig) -> int:
    """Of all batches of a run; the rows of a stream are not known, and each batch is a multiple of 128 tokens long."""
    if isinstance(train_dataset, IterableDataset):
        return FLEX_BLOCK
    lengths = [len(ids) for ids in train_dataset["input_ids"]]
    return sequence_length(lengths, training.per_device_train_batch_size)
