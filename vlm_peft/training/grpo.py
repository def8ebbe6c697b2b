"""Training for the score: a trained model's own samples, rewarded by what its task is scored by.

Stage: the recipe behind `recipes/grpo.py`. It goes through the phases of supervised fine-tuning with another trainer,
from a trained adapter folder on, or from the bases. Options are those of [`GrpoArguments`], TRL's `GRPOConfig` and
`ModelConfig`.
"""

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig

from ..adapters.fused_lora import fuse_lora
from ..adapters.loading import load_trained
from ..data.collator import SharedPrefixCollator
from ..data.mixture import fetch_from, first_images, mix
from ..data.probe import probe
from ..data.splits import Question, Split, leave_out
from ..model.configuration_vision_qwen import IGNORE_INDEX
from ..model.processing_vision_qwen import VisionQwenProcessor
from ..tasks import TaskKind, find_kind
from . import run as phases
from .arguments import VisionArguments, parse_arguments
from .checkpoints import RUN_FILE, run_record
from .data import load_held_out, load_trained_on, watched
from .grpo_trainer import Asked, VisionGRPOTrainer, prepare_grpo_arguments
from .rewards import make_rewards, parse_reward
from .run import Run
from .setup import adapted_model, find_start, local, task_file

_REWARDED = ("rewards", "format_pattern", "baseline", "supervised_coef")
"""Options of ours that a run that goes on must share, and TRL's."""
_SAMPLED = ("reward_weights", "num_generations", "temperature", "beta", "loss_type", "scale_rewards", "num_iterations")


@dataclass
class GrpoArguments(VisionArguments):
    """What training for the score adds to the options of a run."""

    rewards: list[str] = field(
        default_factory=lambda: ["task"],
        metadata={
            "help": "What a text earns, mixed by --reward_weights: task (CIDEr of captions, accuracy of answers, ...), "
            "clip_score, length, format, or a function of yours as module:function, called as TRL calls its rewards."
        },
    )
    clip_model: str | None = field(default=None, metadata={"help": "CLIP of the reward clip_score: Hub id or folder."})
    format_pattern: str | None = field(
        default=None, metadata={"help": "Regular expression that a whole text must match to earn the reward format."}
    )
    baseline: str = field(
        default="mean",
        metadata={
            "help": "What a sample's reward is compared with: the mean of its question's samples (GRPO), or what the "
            "greedy text earns (greedy; self-critical training, SCST), not scaled.",
            "choices": ["mean", "greedy"],
        },
    )
    supervised_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of a further loss: nats per token of the references, behind the same prefixes."},
    )


# As in VisionArguments: the parser writes into the fields that it is given.
GrpoArguments.__dataclass_fields__ = {name: copy(each) for name, each in GrpoArguments.__dataclass_fields__.items()}


@dataclass
class RewardedConfig(GRPOConfig):
    """TRL's options, of which one has a name that is taken: it follows from `steps_per_generation` here."""

    generation_batch_size: int | None = field(default=None, init=False)


_DEFAULTS = {
    # A group that is cut into several batches would be read behind a prefix in each of them.
    "steps_per_generation": 1,
    # As long as in the evaluation.
    "max_completion_length": None,
}


@dataclass(frozen=True)
class Questions:
    """All that is asked in a run.

    Args:
        asked (`list[Asked]`): For the rollouts.
        rows (`list[dict]`): Of the same: `id`, `references`, and what else their scores need.
        kinds (`list[TaskKind]`): Their tasks.
        owners (`list[tuple[Split, Question]]`): Where they come from.
        dataset (`Dataset`): `prompt`, `row`, `id` and `references` of what is trained on.
        eval_dataset (`Dataset`, *optional*): Of what is asked at evaluations.
        training (`list[int]`): Numbers of the questions that are trained on.
    """

    asked: list[Asked]
    rows: list[dict[str, Any]]
    kinds: list[TaskKind]
    owners: list[tuple[Split, Question]]
    dataset: Dataset
    eval_dataset: Dataset | None
    training: list[int]


def collect(splits: Sequence[Split], others: Sequence[Split], processor, *, seed: int, count: int, answers: bool):
    """Questions of the splits that are trained on, and of those that are watched.

    Args:
        splits, others (`Sequence[Split]`): Their pictures are numbered over all, in this order.
        processor ([`VisionQwenProcessor`]): Encodes prompts.
        seed (`int`): Of a weighed mixture.
        count (`int`): Questions of each of the others; all with 0.
        answers (`bool`): Whether references are encoded, too.

    Returns:
        [`Questions`].
    """
    asked: list[Asked] = []
    rows, kinds, owners, parts = [], [], [], []
    prompts: dict[str, list[int]] = {}
    starts = first_images([*splits, *others])
    for split, first in zip([*splits, *others], starts, strict=True):
        found = list(split.questions())
        if count and any(split is each for each in others):
            found = found[:count]
        part: dict[str, list] = {"prompt": [], "row": [], "id": [], "references": []}
        for question in found:
            key = str(question.prompt)
            if key not in prompts:
                prompts[key] = processor.encode_prompt(question.prompt)
            encoded = [_answer(processor, question, text) for text in question.references] if answers else []
            part["prompt"].append(_said(question.prompt))
            part["row"].append(len(asked))
            part["id"].append(question.id)
            part["references"].append(question.references)
            asked.append(Asked(prompts[key], [first + image for image in question.image_ids], encoded))
            rows.append({"id": question.id, "references": question.references, **question.details})
            kinds.append(find_kind(split.task.name))
            owners.append((split, question))
        parts.append(Dataset.from_dict(part))
    trained, watched_parts = parts[: len(splits)], parts[len(splits) :]
    dataset = mix(trained, [split.data.weight for split in splits], seed)
    eval_dataset = mix(watched_parts, [None] * len(others), seed) if others else None
    return Questions(
        asked, rows, kinds, owners, dataset, eval_dataset, [number for part in trained for number in part["row"][:]]
    )


def _answer(processor: VisionQwenProcessor, question: Question, text: str) -> list[int]:
    labels = processor.encode_row(question.prompt, [text]).shift_labels
    return [label for label in labels if label != IGNORE_INDEX]


def _said(prompt: list[dict]) -> str:
    contents = (message["content"] for message in prompt)
    parts = (part for content in contents for part in ([{"text": content}] if isinstance(content, str) else content))
    return " ".join(part["text"] for part in parts if "text" in part)


def check_options(vision: GrpoArguments, training: GRPOConfig) -> None:
    """Checks what can be checked before anything is loaded, and says how long samples may be.

    Raises:
        ValueError: For rewards that are none, or lack what they need; for streams; for a text that must end earlier.
    """
    for name in vision.rewards:
        parse_reward(name)
    if training.reward_weights is not None and len(training.reward_weights) != len(vision.rewards):
        raise ValueError(f"reward_weights: {len(training.reward_weights)} weights of {len(vision.rewards)} rewards.")
    for reward, option in (("clip_score", "clip_model"), ("format", "format_pattern")):
        if reward in vision.rewards and getattr(vision, option) is None:
            raise ValueError(f"The reward {reward} needs --{option}.")
    if vision.streaming:
        raise ValueError("--streaming: rewards weigh words by all training rows, which come one by one: leave it out.")
    if training.max_completion_length is None:
        training.max_completion_length = vision.max_new_tokens


def make_trainer(
    run: Run,
    model,
    processor,
    splits: Sequence[Split],
    held_out: dict[str, Split],
    record: dict[str, Any],
    start: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> VisionGRPOTrainer:
    """The trainer, after the table of what trains was printed and checked.

    Args:
        model, processor: Of [`~vlm_peft.training.run.load_bases`].
        splits (`Sequence[Split]`): To train on.
        held_out (`dict[str, Split]`): Of [`~vlm_peft.training.data.load_held_out`].
        record (`dict`): Kept in every checkpoint.
        start (`Path`, *optional*): Of [`~vlm_peft.training.setup.find_start`].
        callbacks (`Sequence[TrainerCallback]`, *optional*): Of whoever runs the recipe.

    Raises:
        ValueError, OSError: For options that the model or the data cannot have.
    """
    vision, training = run.vision, run.training
    trained, peft_config = adapted_model(vision, run.model, model, start)
    others = watched(held_out.values(), training)
    questions = collect(
        splits,
        others,
        processor,
        seed=training.seed,
        count=vision.eval_samples,
        answers=vision.supervised_coef > 0,
    )
    least = training.generation_batch_size // training.num_generations
    if len(questions.dataset) < least:
        raise ValueError(
            f"The run has no step: {len(questions.dataset):,} questions, and a step takes {least}, "
            f"{training.num_generations} samples each. Lower --per_device_train_batch_size."
        )
    collator = SharedPrefixCollator(
        processor.tokenizer.pad_token_id,
        fetch_from([*splits, *others]),
        image_token_id=model.config.image_token_id,
        sharing=probe(model).sharing,
    )

    def open_picture(number: int):
        split, question = questions.owners[number]
        if not question.image_ids:
            raise ValueError(f"The reward clip_score needs pictures, and row {question.id} of {split.name} has none.")
        return split.pictures.open(question.image_ids[question.solved])

    rewards = make_rewards(
        vision.rewards,
        questions.rows,
        questions.kinds,
        processor.end_of_turn_token_id,
        training=questions.training,
        open_picture=open_picture,
        options={
            "clip_model": vision.clip_model and local(vision.clip_model, "clip_model"),
            "format_pattern": vision.format_pattern,
            "device": training.device,
        },
    )
    trainer = VisionGRPOTrainer(
        trained,
        rewards,
        args=prepare_grpo_arguments(training, trained),
        train_dataset=questions.dataset,
        eval_dataset=questions.eval_dataset,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=[*callbacks, *phases.early_stopping(run)],
        asked=questions.asked,
        collator=collator,
        baseline=vision.baseline,
        supervised_coef=vision.supervised_coef,
        extra_files=task_file(vision) | {RUN_FILE: json.dumps(record, indent=2) + "\n"},
        projector_learning_rate=vision.projector_learning_rate,
        vision_learning_rate=vision.vision_learning_rate,
        layer_decay=vision.layer_decay,
        unfreeze_steps=vision.unfreeze_steps,
        loraplus_lr_ratio=vision.loraplus_lr_ratio,
        score=phases.make_scorer(run, processor, held_out) if vision.eval_samples else None,
    )
    adapted: Any = trainer.model
    if vision.fused_lora:
        fuse_lora(adapted)
    phases.show_trained(run, adapted)
    run.say(
        f"Training on {len(questions.dataset):,} questions, {least} with {training.num_generations} samples each in a "
        f"step, rewarded by {', '.join(vision.rewards)}, against "
        + ("the greedy text's." if vision.baseline == "greedy" else "the mean of a question's samples.")
    )
    return trainer


def main(
    arguments: Sequence[str],
    *,
    program: str = "grpo.py",
    command: str | None = None,
    started: float | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> int:
    """Scores the start, trains, saves, checks, scores again and reports.

    Args:
        arguments (`Sequence[str]`): The command line.
        program (`str`, *optional*, defaults to `"grpo.py"`): Put before messages.
        command (`str`, *optional*): How the program is started, for the report; its name by default.
        started (`float`, *optional*): `time.monotonic()` when it was.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Added to the trainer's.

    Returns:
        `int`: The exit status.

    Raises:
        SystemExit: For options that are none.
        ValueError, OSError: For what is wrong with the start, bases, data, rewards or checkpoints; names it.
    """
    vision, training, model_args = parse_arguments(
        list(arguments),
        program=program,
        description="Train a vision-language model for the score of its texts.",
        kinds=(GrpoArguments, RewardedConfig),
        defaults=_DEFAULTS,
    )
    if vision.stages is not None:
        raise SystemExit(
            f"{program}: stages are of supervised fine-tuning: train them first, and name the last as --start_from."
        )
    check_options(vision, training)
    start = find_start(vision, training, model_args)
    run = Run(vision, training, model_args, command=" ".join([command or program, *arguments]), started=started)
    run.compare(_record(run, start))

    with run.phase("load models"):
        model, processor = phases.load_bases(run, start)
    with run.phase("encode pictures"):
        held_out = load_held_out(vision, model, processor)
        splits = [leave_out(each, vision.on_bad_row) for each in load_trained_on(vision, model, processor, held_out)]
        others = phases.load_watch(run, model, processor)
    phases.begin_results(run)
    with run.phase("prepare training"):
        record = _record(run, start, model, splits)
        run.compare(record)
        trainer = make_trainer(run, model, processor, splits, held_out, record, start, callbacks)
    trained: Any = trainer.model
    if vision.score_before:
        with run.phase("score before"):
            phases.evaluate(run, trained, processor, held_out, "-before")
    others = phases.watch_before(run, trained, processor, others)
    status = phases.train(run, trainer)
    if status:
        return status
    with run.phase("save"):
        question = next(splits[0].questions())
        row = processor.encode_row(question.prompt, question.references)
        batch = trainer._collator([{**vars(row), "image_ids": question.image_ids}])
        inputs = {key: value for key, value in batch.items() if "labels" not in key}
        loaded = phases.save_checked(run, trainer, load_trained, inputs)
    processor = VisionQwenProcessor.from_pretrained(training.output_dir)
    phases.evaluate_trained(run, loaded, processor, held_out)
    phases.watch_after(run, loaded, processor, others, held_out)
    if run.is_main and vision.score_before and not others.splits and not others.paragraphs:
        phases.show_changes(run, held_out)
    phases.finish(run, trainer, splits, held_out)
    return 0


def _record(run: Run, start: Path | None, model=None, splits: Sequence[Split] = ()) -> dict[str, Any]:
    """What a run must have in common with the one that it goes on with."""
    config = None if model is None else model.config
    found = run_record(run.vision, run.training, run.model, config, splits, start=start)
    found |= {name: getattr(run.vision, name) for name in _REWARDED}
    return found | {name: getattr(run.training, name) for name in _SAMPLED}
