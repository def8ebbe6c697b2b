"""Supervised fine-tuning: a projector, and of the decoder what `--strategy` says, are trained on pictures with texts.

Stage: the recipe behind `recipes/sft.py` and `vlm-peft train`. The adapter folder, or the whole model, held-out scores
and report.html go to `--output_dir`. Options are those of `vlm_peft.training.arguments`, TRL's `SFTConfig` and TRL's
`ModelConfig`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..adapters.loading import load_trained
from ..data.probe import probe
from ..data.splits import Split
from ..model.cuda.training import plain_decoder
from ..model.processing_vision_qwen import VisionQwenProcessor
from . import run as phases
from .arguments import parse_arguments
from .checkpoints import RUN_FILE, run_record
from .data import TrainingRows, load_held_out, load_training
from .run import Run
from .setup import CLONE, build_trainer, describe_layout, find_start
from .stages import Stage, parse_stages, run_stages
from .trainer import VisionSFTTrainer

DEMO = CLONE / "recipes" / "configs" / "demo.yaml"


def make_trainer(
    run: Run,
    model,
    processor,
    data: TrainingRows,
    held_out: dict[str, Split],
    record: dict[str, Any],
    start: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> VisionSFTTrainer:
    """The trainer with its collator, after the table of what trains was printed and checked.

    Args:
        model, processor: Of [`~vlm_peft.training.run.load_bases`].
        data, held_out: Of [`~vlm_peft.training.data.load_training`] and [`~vlm_peft.training.data.load_held_out`].
        record (`dict`): Of [`~vlm_peft.training.checkpoints.run_record`]; kept in every checkpoint.
        start (`Path`, *optional*): Folder of an earlier training that this one goes on from.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Of whoever runs the recipe.

    Raises:
        ValueError: When the options ask for LoRA that the model cannot have, or something else trains than they say.
    """
    trainer = build_trainer(
        run.vision,
        run.training,
        run.model,
        model,
        processor,
        data.dataset,
        data.fetch_images,
        eval_dataset=data.eval_dataset,
        callbacks=[*callbacks, *phases.early_stopping(run)],
        score=phases.make_scorer(run, processor, held_out) if run.vision.eval_samples else None,
        extra_files={RUN_FILE: json.dumps(record, indent=2) + "\n"},
        start=start,
    )
    phases.show_trained(run, trainer.model)
    run.say(describe_layout(probe(model), data.dataset))
    run.say(data.described)
    return trainer


def main(
    arguments: Sequence[str],
    *,
    program: str = "vlm-peft train",
    command: str | None = None,
    started: float | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> int:
    """Trains, saves, checks, scores and reports.

    Args:
        arguments (`Sequence[str]`): The command line; without any, the demo of a clone.
        program (`str`, *optional*, defaults to `"vlm-peft train"`): Put before messages.
        command (`str`, *optional*): How the program is started, for the report; its name by default.
        started (`float`, *optional*): `time.monotonic()` when it was.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Added to the trainer's.

    Returns:
        `int`: The exit status.

    Raises:
        SystemExit: For options that are none.
        ValueError, OSError: For what is wrong with bases, data, checkpoints or the push; names it.
    """
    if not arguments and not DEMO.is_file():
        raise SystemExit(
            f"{program}: give --config FILE.yaml, or --dataset_name, --vision_model, --model_name_or_path, --use_peft "
            "true and --output_dir: the demo, which needs none of them, is in a clone of the repository only."
        )
    given = list(arguments) or ["--config", str(DEMO)]
    named: Any = {"program": program, "description": "Fine-tune a vision-language model on pictures with texts."}
    parsed = parse_arguments(given, **named)
    said = " ".join([command or program, *arguments])
    if parsed[0].stages is None:
        return train(*parsed, command=said, started=started, callbacks=callbacks)
    stages = parse_stages(given, parsed[0].stages, **named)

    def train_stage(stage: Stage, start: Path | None) -> int:
        return train(stage.vision, stage.training, stage.model_args, command=said, start=start, callbacks=callbacks)

    return run_stages(stages, train_stage)


def train(
    vision,
    training,
    model_args,
    *,
    command: str,
    started: float | None = None,
    start: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> int:
    """One training, from its options to its report.

    Args:
        vision, training, model_args: Of [`~vlm_peft.training.arguments.parse_arguments`].
        command, started: Of [`main`].
        start (`Path`, *optional*): Folder of an earlier training, which this one goes on from; what `--start_from`
            names by default.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Added to the trainer's.

    Returns:
        `int`: The exit status.

    Raises:
        ValueError, OSError: As [`main`].
    """
    if start is None:
        start = find_start(vision, training, model_args)
    run = Run(vision, training, model_args, command=command, started=started)
    run.compare(run_record(vision, training, model_args, start=start))

    with run.phase("load models"):
        model, processor = phases.load_bases(run, start)
    with run.phase("encode pictures"):
        held_out = load_held_out(vision, model, processor)
        data = load_training(vision, training, model, processor, held_out)
    phases.begin_results(run)
    if vision.score_before and start is None:
        with run.phase("score before"):
            phases.evaluate(run, model, processor, held_out, "-before")
    with run.phase("prepare training"):
        record = run_record(vision, training, model_args, model.config, data.splits, start=start)
        run.compare(record)
        watched = phases.load_watch(run, model, processor)
        trainer = make_trainer(run, model, processor, data, held_out, record, start, callbacks)
    begun: Any = trainer.model
    # With what it starts from: an earlier adapter is in the trainer's model, not in the bases.
    if vision.score_before and start is not None:
        with run.phase("score before"), plain_decoder(begun.eval()):
            phases.evaluate(run, begun, processor, held_out, "-before")
    watched = phases.watch_before(run, begun, processor, watched)
    status = phases.train(run, trainer)
    if status:
        return status
    with run.phase("save"):
        batch = trainer.data_collator([next(iter(data.dataset))])
        inputs = {key: value for key, value in batch.items() if "labels" not in key}
        trained = phases.save_checked(run, trainer, load_trained, inputs)
    processor = VisionQwenProcessor.from_pretrained(training.output_dir)
    phases.calibrate(run, trained, processor, data.held_back, held_out)
    phases.evaluate_trained(run, trained, processor, held_out)
    phases.watch_after(run, trained, processor, watched, held_out)
    phases.finish(run, trainer, data.splits, held_out)
    return 0
