"""Fine-tune a vision-language model on pictures with texts.

    accelerate launch recipes/sft.py                                            # the embedded demo, offline, on a CPU
    accelerate launch recipes/sft.py --config recipes/configs/flickr30k.yaml    # a real data set
    accelerate launch recipes/sft.py --config ... --learning_rate 1e-4          # the command line overrides the file

LoRA on the decoder and a full projector are trained; the adapter folder, held-out scores and report.html go to
`--output_dir`. Options are those of `vlm_peft.training.arguments`, TRL's `SFTConfig` and TRL's `ModelConfig`.
"""

import json
import logging
import os
import re
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from vlm_peft.console import quiet_imports, quiet_progress, run_script

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "demo.yaml"


class Run:
    """What the parts of one run share: arguments, the clock of its phases, and where it writes."""

    def __init__(self, vision_args, training_args, model_args):
        from accelerate import PartialState

        self.vision, self.training, self.model = vision_args, training_args, model_args
        self.output_dir = Path(training_args.output_dir)
        self.seconds: dict[str, float] = {}
        self.unscored: list[str] = []
        self.is_main = PartialState().is_main_process
        quiet_progress(self.is_main)

    @property
    def loading(self) -> dict:
        """How the bases are loaded: before training, and again when the saved adapter is checked and scored."""
        from vlm_peft.training.setup import loading_arguments

        return loading_arguments(self.model)

    @contextmanager
    def phase(self, name: str):
        """Adds the time of the block to `seconds`."""
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - start

    def say(self, text: str) -> None:
        """Prints on the main process."""
        if self.is_main:
            print(text, flush=True)


def load_bases(run: Run):
    """Encoder + decoder + fresh projector, with their processor."""
    from vlm_peft.training.setup import load_model

    if run.vision.lora_vision and run.vision.feature_cache:
        run.vision.feature_cache = False
        run.say("The encoder trains (--lora_vision): its features change, so pictures are encoded in every step.")
    return load_model(run.vision, run.model, run.training.device)


def make_trainer(run: Run, model, processor, data, held_out: dict, record: dict):
    """The trainer with its collator, after the table of what trains was printed and checked."""
    from transformers import EarlyStoppingCallback

    from vlm_peft.adapters.lora import check_trainable, format_trainable_table, trainable_table, unadapted_experts
    from vlm_peft.data.probe import probe
    from vlm_peft.training.checkpoints import RUN_FILE
    from vlm_peft.training.setup import build_trainer, describe_layout
    from vlm_peft.training.trainer import StopOnSignal

    signals = StopOnSignal()
    callbacks: list = [signals]
    if run.vision.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(run.vision.early_stopping_patience))
    trainer = build_trainer(
        run.vision,
        run.training,
        run.model,
        model,
        processor,
        data.dataset,
        data.fetch_images,
        eval_dataset=data.eval_dataset,
        callbacks=callbacks,
        score=make_scorer(run, processor, held_out) if run.vision.eval_samples else None,
        extra_files={RUN_FILE: json.dumps(record, indent=2) + "\n"},
    )
    rows = trainable_table(trainer.model)
    run.say("\n" + format_trainable_table(rows) + "\n")
    check_trainable(rows, vision_tower_trains=run.vision.lora_vision)
    experts = unadapted_experts(model)
    if experts:
        run.say(f"LoRA has no part in the experts, which are no linear layers: {', '.join(experts)}")
    run.say(describe_layout(probe(model), data.dataset))
    run.say(data.described)
    return trainer, signals, rows


def make_scorer(run: Run, processor, held_out: dict):
    """What scores the model during training: the same questions at every evaluation, shared by all processes."""
    from accelerate import PartialState

    from vlm_peft.data.splits import first_of_each
    from vlm_peft.evaluation.evaluate import generate_rows, sample_table
    from vlm_peft.evaluation.task_scores import score_rows

    watched = []
    for split in first_of_each(held_out.values()):
        questions = list(split.questions())
        watched.append((split, questions[: run.vision.eval_samples], questions[run.vision.eval_samples :]))

    def score(model) -> dict[str, float]:
        found: dict[str, float] = {}
        for split, asked, others in watched:
            rows = generate_rows(
                model,
                processor,
                asked,
                split.fetch_images,
                batch_size=run.vision.generation_batch_size,
                max_new_tokens=run.vision.max_new_tokens,
                num_beams=run.vision.num_beams,
            )
            # Document frequencies of the whole split: these figures then compare with the final ones.
            idf = {"idf_references": [other.references for other in others]} if split.task.name == "caption" else {}
            if PartialState().is_main_process:
                run.say("\n" + sample_table(split.name, rows))
            for metric, value in score_rows(split.task.name, rows, **idf).metrics.items():
                found[metric if metric not in found else f"{split.name}_{metric}"] = value
        return found

    return score


def evaluate(run: Run, model, processor, splits: dict, suffix: str = "") -> None:
    """Scores held-out splits into `eval/<split><suffix>/` and prints a line each."""
    from accelerate import PartialState

    from vlm_peft.evaluation.evaluate import evaluate_split

    model.eval()
    for name, split in splits.items():
        try:
            summary = evaluate_split(
                model,
                processor,
                split,
                run.output_dir / "eval" / f"{name}{suffix}",
                model_name=str(run.output_dir),
                condition=suffix.removeprefix("-") or "after",
                batch_size=run.vision.generation_batch_size,
                max_new_tokens=run.vision.max_new_tokens,
                num_beams=run.vision.num_beams,
                meteor=run.vision.meteor and not suffix,
            )
        except ValueError as error:
            # The other splits get their scores first.
            run.unscored.append(f"{name + suffix}: {error}")
            PartialState().wait_for_everyone()
            continue
        if run.is_main:
            shown = "  ".join(f"{metric} {value:.3f}" for metric, value in summary["metrics"].items())
            run.say(f"{name + suffix:<20} n={summary['n']}  {shown}")


def write_report(run: Run, trainer, rows, data, splits: dict, command: str) -> Path:
    """Writes run_summary.json, log_history.json, the gallery's pictures, README.md and report.html."""
    from dataclasses import asdict

    from vlm_peft import __version__
    from vlm_peft.data.splits import content_hash
    from vlm_peft.evaluation.records import write_text
    from vlm_peft.model.modeling_vision_qwen import base_model
    from vlm_peft.report.gallery import choose_gallery, save_gallery_pictures
    from vlm_peft.report.model_card import write_model_card
    from vlm_peft.report.report import build_report
    from vlm_peft.training.arguments import data_sources

    config = base_model(trainer.model).config
    used = data_sources(run.vision)
    names = [str(source.dataset_name) for source in used]
    revisions = [source.dataset_revision for source in used]
    summary = {
        "title": f"{run.output_dir.name}: {', '.join(Path(name).name for name in names)}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "vision_model": run.vision.vision_model,
        "text_model": run.model.model_name_or_path,
        "dataset": names if len(names) > 1 else names[0],
        "dataset_revision": revisions if len(names) > 1 else revisions[0],
        "vision_revision": config.vision_revision,
        "text_revision": config.text_revision or run.model.model_revision,
        "data": {
            split.name: {
                "rows": len(split.texts),
                "pictures": len(split.pictures),
                "content_hash": content_hash(split),
            }
            for split in [*data.splits, *splits.values()]
        },
        "device": str(run.training.device),
        "seed": run.training.seed,
        "parameters": sum(row.parameters for row in rows),
        "trainable_parameters": sum(row.trainable for row in rows),
        "trained": [{**asdict(row), "dtype": row.dtypes} for row in rows],
        "seconds": {name: round(value, 1) for name, value in run.seconds.items()},
        "versions": {"vlm_peft": __version__}
        | {name: version(name) for name in ("torch", "transformers", "trl", "peft", "datasets")},
        "adapter": str(run.output_dir),
    }
    write_text(run.output_dir / "run_summary.json", json.dumps(summary, indent=2) + "\n")
    write_text(run.output_dir / "log_history.json", json.dumps(trainer.state.log_history, indent=2) + "\n")
    for name, split in splits.items():
        wanted = set(map(str, choose_gallery(run.output_dir / "eval" / name)))
        found = {
            question.id: split.pictures.open(question.image_ids[0])
            for question in split.questions()
            if question.id in wanted and question.image_ids
        }
        save_gallery_pictures(run.output_dir, name, found)
    write_model_card(run.output_dir)
    return build_report(run.output_dir)


def main(arguments: list[str] | None = None) -> int:
    """Trains, saves, checks, scores and reports; returns the exit status."""
    started = time.monotonic()
    quiet_imports()
    arguments = list(sys.argv[1:] if arguments is None else arguments)

    from vlm_peft.training.arguments import parse_arguments
    from vlm_peft.training.checkpoints import check_same_run, run_record

    vision_args, training_args, model_args = parse_arguments(
        arguments or ["--config", str(DEFAULT_CONFIG)], description=__doc__.splitlines()[0]
    )
    run = Run(vision_args, training_args, model_args)
    push = prepare_push(run)
    logging.basicConfig(level=logging.INFO if run.is_main else logging.WARNING, format="%(message)s")
    checkpoint = checkpoint_to_resume(training_args)
    if checkpoint is not None:
        check_same_run(checkpoint, run_record(vision_args, training_args, model_args))

    from accelerate import PartialState
    from transformers import set_seed

    from vlm_peft import VisionQwen, VisionQwenProcessor
    from vlm_peft.training.data import load_held_out, load_training

    set_seed(training_args.seed)
    with run.phase("load models"):
        model, processor = load_bases(run)
    with run.phase("encode pictures"):
        held_out = load_held_out(vision_args, model, processor)
        data = load_training(vision_args, training_args, model, processor, held_out)
    if run.is_main:
        clear_results(run.output_dir)
    PartialState().wait_for_everyone()
    if vision_args.score_before:
        with run.phase("score before"):
            evaluate(run, model, processor, held_out, "-before")

    with run.phase("prepare training"):
        record = run_record(vision_args, training_args, model_args, model.config, data.splits)
        if checkpoint is not None:
            check_same_run(checkpoint, record)
        trainer, signals, rows = make_trainer(run, model, processor, data, held_out, record)
    with run.phase("train"):
        trainer.train(resume_from_checkpoint=checkpoint)
    if signals.received is not None:
        run.say(
            f"Stopped by signal {signals.received} at step {trainer.state.global_step}; the checkpoint is in "
            f"{training_args.output_dir}. Go on with --resume_from_checkpoint true."
        )
        return 128 + signals.received
    with run.phase("save"):
        save_whole(run, trainer)
        check_saved(run, trainer)
    # The other processes read what the first one writes.
    PartialState().wait_for_everyone()

    trained = VisionQwen.from_adapter(training_args.output_dir, **run.loading).to(training_args.device)
    processor = VisionQwenProcessor.from_pretrained(training_args.output_dir)
    with run.phase("score"):
        evaluate(run, trained, processor, held_out)
        blind = {name: split for name, split in held_out.items() if split.is_blind}
        evaluate(run, trained, processor, blind, "-blind")
    if run.unscored:
        raise ValueError(f"The adapter is saved in {run.output_dir}, but not all is scored. {'; '.join(run.unscored)}")
    if run.is_main:
        run.seconds["total"] = time.monotonic() - started
        # A token on the command line is nobody else's business.
        shown = re.sub(r"(--hub_token[= ])\S+", r"\1***", " ".join(arguments))
        command = f"accelerate launch recipes/sft.py {shown}"
        report = write_report(run, trainer, rows, data, held_out, command.strip())
        run.say(
            f"\nadapter  {run.output_dir}\nscores   {run.output_dir / 'eval'}\nreport   {report}\n"
            f"time     {run.seconds['total']:.0f} s, of which training {run.seconds['train']:.0f} s"
        )
        if push is not None:
            from vlm_peft.hub.models import push_adapter
            from vlm_peft.report.model_card import card_for_others

            run.say(f"pushed   {push_adapter(run.output_dir, card=card_for_others, **push)}")
    return 0


def clear_results(folder: Path) -> None:
    """Removes what an earlier run scored and showed here, and drafts of processes that are gone.

    New weights must never lie beside an old card, nor new predictions beside old scores.
    """
    from vlm_peft.drafts import sweep

    shown = [folder / name for name in ("run_summary.json", "log_history.json", "report.html")]
    if any(path.is_file() for path in shown):
        shown.append(folder / "README.md")
    for pattern in ("eval/*/predictions.jsonl", "eval/*/scores.json", "eval/*/pictures/*.webp"):
        shown += folder.glob(pattern)
    for path in shown:
        path.unlink(missing_ok=True)
    for place in (folder, *folder.glob("eval/*")):
        sweep(place)


def save_whole(run: Run, trainer) -> None:
    """Saves the adapter folder aside and moves its files here; last comes the one without which it is none."""
    from vlm_peft.drafts import draft_of

    draft = draft_of(run.output_dir / "adapter")
    trainer.save_model(str(draft))
    if not run.is_main:
        return
    last = "adapter_config.json"
    (run.output_dir / last).unlink(missing_ok=True)
    for path in sorted(draft.iterdir(), key=lambda path: path.name == last):
        path.replace(run.output_dir / path.name)
    draft.rmdir()


def prepare_push(run: Run) -> dict | None:
    """What `push_adapter` will be told after a run with `--push_to_hub`; checked now, and taken from the trainer.

    Raises:
        ValueError, OSError: for what would stop the push: the name, the token, bases that are not on the Hub.
    """
    if not run.training.push_to_hub:
        return None
    from vlm_peft.hub.models import check_push
    from vlm_peft.training.setup import local

    # The trainer would push each save by itself, with a card that describes a text model.
    run.training.push_to_hub = False
    push = {
        "repo_id": run.training.hub_model_id or run.output_dir.resolve().name,
        "private": run.training.hub_private_repo,
        "revision": run.training.hub_revision,
        "token": run.training.hub_token,
    }
    vision = local(run.vision.vision_model, "vision_model")
    check_push(**push, vision=vision, text=local(run.model.model_name_or_path, "model_name_or_path"))
    return push


def checkpoint_to_resume(training_args) -> str | None:
    """`--resume_from_checkpoint true` means the newest complete one in `--output_dir`; a path means itself.

    Raises:
        FileNotFoundError: when there is none, or a file of it is missing or damaged.
        FileExistsError: when a run begins beside the checkpoints of another.
    """
    from vlm_peft.training.checkpoints import checkpoints_in, newest_whole, why_broken

    value = str(training_args.resume_from_checkpoint)
    if value.lower() in ("false", "none", ""):
        others = checkpoints_in(training_args.output_dir)
        if others:
            raise FileExistsError(
                f"--output_dir {training_args.output_dir} holds {others[0].name} of an earlier run: go on with "
                "--resume_from_checkpoint true, choose another folder, or delete its checkpoints."
            )
        return None
    if value.lower() != "true":
        reason = why_broken(Path(value))
        if reason is not None:
            raise FileNotFoundError(f"{value} is no checkpoint to resume from: {reason}.")
        return value
    folder = newest_whole(training_args.output_dir)
    if folder is None:
        raise FileNotFoundError(
            f"--resume_from_checkpoint true: {training_args.output_dir} has no complete checkpoint-* folder. Leave the "
            "option out to train from the beginning."
        )
    return str(folder)


def check_saved(run: Run, trainer) -> None:
    """Reloads the adapter folder and compares logits before the run says that it is saved.

    Raises:
        RuntimeError: when they differ.
    """
    import torch

    from vlm_peft import VisionQwen
    from vlm_peft.adapters.pissa import is_pissa
    from vlm_peft.model.cuda.training import plain_decoder

    if not run.is_main:
        return
    batch = trainer.data_collator([next(iter(trainer.train_dataset))])
    batch = {key: value.to(trainer.args.device) for key, value in batch.items() if "labels" not in key}
    reloaded = VisionQwen.from_adapter(trainer.args.output_dir, **run.loading).to(trainer.args.device)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    with torch.inference_mode(), plain_decoder(model):
        logits = model(**batch).logits
        difference = (logits - reloaded(**batch).logits).abs().max().item()
    # A GPU's kernels may add in another order from one call to the next; PiSSA was trained on a base without its start.
    is_exact = logits.device.type == "cpu" and not is_pissa(run.vision.init_lora_weights)
    tolerance = 0.0 if is_exact else 0.01 * logits.abs().max().item()
    if difference > tolerance:
        raise RuntimeError(f"The saved adapter's logits differ from the trained model's by {difference:g}.")
    run.say(
        f"Saved {run.output_dir}; reloaded, its logits are equal" + (f" to {difference:.1g}." if difference else ".")
    )


if __name__ == "__main__":
    raise SystemExit(run_script(main, "sft.py"))
