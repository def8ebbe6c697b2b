"""A run: the phases that every recipe goes through, from its options to a scored, reported and pushed adapter folder.

Stage: last of training; a recipe calls these functions in its own order, with its own trainer between them.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from .. import __version__
from ..adapters.folder import is_adapter_folder
from ..adapters.lora import check_trainable, format_trainable_table, trainable_table, unadapted_experts
from ..adapters.pissa import is_pissa
from ..console import quiet_progress, show_messages, table
from ..data.splits import Split, bind_task, content_hash, first_of_each
from ..drafts import draft_of, sweep
from ..evaluation.blind import blind_lines
from ..evaluation.evaluate import evaluate_split, generate_rows, sample_table
from ..evaluation.perplexity import text_nats
from ..evaluation.records import write_text
from ..evaluation.task_scores import score_rows
from ..evaluation.transfer import TRANSFER_FILE, compared, compared_text, transfer_lines
from ..hub.models import check_push, push_adapter
from ..model.cuda.training import plain_decoder
from ..model.modeling_vision_qwen import base_model
from ..report.gallery import choose_gallery, save_gallery_pictures
from ..report.model_card import card_for_others, write_model_card
from ..report.report import build_report
from ..tasks import TASK_FILE, TaskSettings, find_kind
from .arguments import chosen_strategy, data_sources, keeps_features
from .callbacks import StopOnSignal
from .checkpoints import check_same_run, checkpoint_to_resume, checkpoints_in
from .data import load_watched, watched_text
from .setup import load_model, loading_arguments, local, sources


class Run:
    """What the phases of one run share: arguments, their clock, where the run writes, and from where it goes on.

    Args:
        vision, training, model: Of [`~vlm_peft.training.arguments.parse_arguments`].
        command (`str`): How the run was started, for its report.
        started (`float`, *optional*): `time.monotonic()` when it was; now by default.
        pushed (`dict`, *optional*): What [`~vlm_peft.hub.models.check_push`] is told of the bases; those that the
            options name by default.

    Raises:
        OSError: When it cannot go on from where it should; see [`~vlm_peft.training.checkpoints.checkpoint_to_resume`].
        ValueError, OSError: For what would stop the push after the run; see [`prepare_push`].
    """

    def __init__(
        self,
        vision,
        training,
        model,
        *,
        command: str,
        started: float | None = None,
        pushed: dict[str, Any] | None = None,
    ):
        self.vision, self.training, self.model = vision, training, model
        # A token on the command line is nobody else's business.
        self.command = re.sub(r"(--hub_token[= ])\S+", r"\1***", command)
        self.output_dir = Path(training.output_dir)
        self.started = time.monotonic() if started is None else started
        self.seconds: dict[str, float] = {}
        self.unscored: list[str] = []
        self.is_main = PartialState().is_main_process
        quiet_progress(self.is_main)
        self.push = prepare_push(self, pushed)
        show_messages(self.is_main)
        self.checkpoint = checkpoint_to_resume(training, overwrite=vision.overwrite_output_dir)
        set_seed(training.seed)

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

    def compare(self, record: dict[str, Any]) -> None:
        """Compares a record with that of the checkpoint from which the run goes on, if it does.

        Raises:
            ValueError: When they differ; see [`~vlm_peft.training.checkpoints.check_same_run`].
        """
        if self.checkpoint is not None:
            check_same_run(self.checkpoint, record)


def prepare_push(run: Run, pushed: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """What `push_adapter` will be told after a run with `--push_to_hub`; checked now, and taken from the trainer.

    Raises:
        ValueError, OSError: For what would stop the push: the name, the token, bases that are not on the Hub.
    """
    if not run.training.push_to_hub:
        return None
    # The trainer would push each save by itself, with a card that describes a text model.
    run.training.push_to_hub = False
    push = {
        "repo_id": run.training.hub_model_id or run.output_dir.resolve().name,
        "private": run.training.hub_private_repo,
        "revision": run.training.hub_revision,
        "token": run.training.hub_token,
    }
    if pushed is None:
        pushed = {
            "vision": local(run.vision.vision_model, "vision_model"),
            "text": local(run.model.model_name_or_path, "model_name_or_path"),
        }
    check_push(**push, **pushed)
    return push


def load_bases(run: Run, start: Path | None = None):
    """Encoder + decoder + fresh projector, with their processor; see [`~vlm_peft.training.setup.load_model`]."""
    if run.vision.feature_cache and not keeps_features(run.vision):
        by = "--lora_vision" if run.vision.lora_vision else "its last layers"
        run.say(f"The encoder trains ({by}): its features change, so pictures are encoded in every step.")
    return load_model(run.vision, run.model, run.training.device, start)


def clear_results(folder: Path) -> None:
    """Removes what an earlier run scored and showed here, and drafts of processes that are gone.

    New weights must never lie beside an old card, nor new predictions beside old scores.
    """
    shown = [folder / name for name in ("run_summary.json", "log_history.json", TRANSFER_FILE, "report.html")]
    if any(path.is_file() for path in shown):
        shown.append(folder / "README.md")
    for pattern in ("eval/*/predictions.jsonl", "eval/*/scores.json", "eval/*/pictures/*.webp"):
        shown += folder.glob(pattern)
    for path in shown:
        path.unlink(missing_ok=True)
    for place in (folder, *folder.glob("eval/*")):
        sweep(place)


def begin_results(run: Run) -> None:
    """Clears the output folder of an earlier run's results, on one process before any writes there.

    A run that begins has no checkpoints there, unless it was told to remove them.
    """
    if run.is_main:
        clear_results(run.output_dir)
        for folder in checkpoints_in(run.output_dir) if run.checkpoint is None else ():
            shutil.rmtree(folder)
    PartialState().wait_for_everyone()


def early_stopping(run: Run) -> list[TrainerCallback]:
    """What ends a run whose score no longer rises, where that is asked for."""
    patience = run.vision.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience)]


def make_scorer(run: Run, processor, held_out: dict[str, Split]) -> Callable[[Any], dict[str, float]]:
    """What scores the model during training: the same questions at every evaluation, shared by all processes."""
    watched = []
    for split in first_of_each(held_out.values()):
        questions = list(split.questions())
        watched.append((split, questions[: run.vision.eval_samples], questions[run.vision.eval_samples :]))

    def score(model) -> dict[str, float]:
        found: dict[str, float] = {}
        for split, asked, others in watched:
            with plain_decoder(model):
                rows = generate_rows(model, processor, asked, split.fetch_images, task=split.task, **_decoding(run))
            # Document frequencies of the whole split: these figures then compare with the final ones.
            idf = [each.references for each in others]
            if PartialState().is_main_process:
                run.say("\n" + sample_table(split.name, rows))
            for metric, value in score_rows(split.task.name, rows, idf_references=idf).metrics.items():
                found[metric if metric not in found else f"{split.name}_{metric}"] = value
        return found

    return score


def _decoding(run: Run) -> dict[str, Any]:
    return {
        "batch_size": run.vision.generation_batch_size,
        "max_new_tokens": run.vision.max_new_tokens,
        "num_beams": run.vision.num_beams,
    }


def show_trained(run: Run, model) -> None:
    """Prints what trains, and checks that it is what should.

    Args:
        model (`PeftModel` or [`VisionQwen`]): Of a trainer.

    Raises:
        ValueError: See [`~vlm_peft.adapters.lora.check_trainable`].
    """
    rows = trainable_table(model)
    run.say("\n" + format_trainable_table(rows) + "\n")
    strategy = chosen_strategy(run.vision, run.model)
    check_trainable(rows, vision_tower_trains=strategy.encoder_trains)
    experts = unadapted_experts(model)
    if experts and strategy.lora:
        run.say(f"LoRA has no part in the experts, which are no linear layers: {', '.join(experts)}")


def train(run: Run, trainer) -> int:
    """Trains, from the run's checkpoint on if it has one.

    Returns:
        `int`: The exit status of a run that a signal stopped, and 0 otherwise.
    """
    signals = StopOnSignal()
    trainer.add_callback(signals)
    with run.phase("train"):
        trainer.train(resume_from_checkpoint=run.checkpoint)
    if signals.received is None:
        return 0
    run.say(
        f"Stopped by signal {signals.received} at step {trainer.state.global_step}; the checkpoint is in "
        f"{run.training.output_dir}. Go on with --resume_from_checkpoint true."
    )
    return 128 + signals.received


def save_whole(run: Run, trainer) -> None:
    """Saves the folder aside and moves its files here; last comes the one without which it is none."""
    draft = draft_of(run.output_dir / "adapter")
    trainer.save_model(str(draft))
    if not run.is_main:
        return
    last = "adapter_config.json" if is_adapter_folder(draft) else "config.json"
    (run.output_dir / last).unlink(missing_ok=True)
    # Of an earlier run that saved the other kind, or a whole model in more files.
    for pattern in ("model*.safetensors*", *([] if is_adapter_folder(draft) else ["adapter_*"])):
        for path in run.output_dir.glob(pattern):
            path.unlink()
    for path in sorted(draft.iterdir(), key=lambda path: path.name == last):
        path.replace(run.output_dir / path.name)
    draft.rmdir()


def save_checked(run: Run, trainer, load: Callable[..., Any], batch: dict[str, torch.Tensor]) -> Any:
    """Saves the folder, loads it again, and compares logits before it says that it is saved.

    Args:
        trainer ([`~vlm_peft.training.adapter_trainer.AdapterTrainer`]): It has trained.
        load (`Callable`): Folder, `dtype`, `attn_implementation`, `quantization_config` -> model.
        batch (`dict[str, torch.Tensor]`): Inputs of the model, without labels.

    Returns:
        The loaded model, on the run's device.

    Raises:
        RuntimeError: When they differ.
    """
    save_whole(run, trainer)
    # The other processes read what the first one writes.
    PartialState().wait_for_everyone()
    loaded = load(run.training.output_dir, **loading_arguments(run.model)).to(run.training.device)
    if not run.is_main:
        return loaded
    batch = {key: value.to(run.training.device) for key, value in batch.items()}
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    with torch.inference_mode(), plain_decoder(model):
        logits = model(**batch).logits
        difference = (logits - loaded(**batch).logits).abs().max().item()
    # A GPU's kernels may add in another order from one call to the next; PiSSA was trained on a base without its start.
    is_exact = logits.device.type == "cpu" and not is_pissa(run.vision.init_lora_weights)
    tolerance = 0.0 if is_exact else 0.01 * logits.abs().max().item()
    if difference > tolerance:
        raise RuntimeError(f"The saved adapter's logits differ from the trained model's by {difference:g}.")
    run.say(
        f"Saved {run.output_dir}; reloaded, its logits are equal" + (f" to {difference:.1g}." if difference else ".")
    )
    return loaded


def evaluate(run: Run, model, processor, splits: dict[str, Split], suffix: str = "", *, least_tokens: int = 0) -> None:
    """Scores held-out splits into `eval/<split><suffix>/` and prints a line each.

    Args:
        least_tokens (`int`, *optional*, defaults to 0): Room for a text, where the run's own task has less.
    """
    decoding = _decoding(run)
    decoding["max_new_tokens"] = max(decoding["max_new_tokens"], least_tokens)
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
                meteor=run.vision.meteor and not suffix,
                **decoding,
            )
        except ValueError as error:
            # The other splits get their scores first.
            run.unscored.append(f"{name + suffix}: {error}")
            PartialState().wait_for_everyone()
            continue
        if run.is_main:
            shown = "  ".join(f"{metric} {value:.3f}" for metric, value in summary["metrics"].items())
            run.say(f"{name + suffix:<20} n={summary['n']}  {shown}")


def calibrate(run: Run, model, processor, held_back: Iterable[Split], held_out: dict[str, Split]) -> None:
    """Scores the rows that were held back from training, and sets what they decide, here and in the adapter folder.

    Args:
        model, processor: Saved in the folder.
        held_back: Of [`~vlm_peft.training.data.load_training`].
        held_out: Are scored with what is found where they are of the same data set.
    """
    for split in held_back:
        kind = find_kind(split.task.name)
        assert kind.calibrate is not None
        with run.phase("calibrate"):
            questions = list(split.questions())
            rows = generate_rows(model, processor, questions, split.fetch_images, task=split.task, **_decoding(run))
        found = kind.calibrate(rows)
        if not found:
            continue
        run.say("".join(f"{name} {value:.4g} from {len(rows)} rows of {split.name}\n" for name, value in found.items()))
        of_model = TaskSettings.read(run.output_dir)
        # task.json says how the first data set is asked.
        if run.is_main and of_model is not None and split.data == sources(run.vision)[0]:
            write_text(run.output_dir / TASK_FILE, replace(of_model, **found).to_json())
        for other in held_out.values():
            if other.data.dataset_name == split.data.dataset_name and other.task.name == kind.name:
                other.data = replace(other.data, **found)
                other.task = bind_task(other.data, [*other.texts.column_names, *other.task.image_columns])


def evaluate_trained(run: Run, model, processor, held_out: dict[str, Split]) -> None:
    """Scores all held-out splits, and those that are also asked blind.

    Raises:
        ValueError: When some could not be scored, before or after training.
    """
    with run.phase("score"):
        evaluate(run, model, processor, held_out)
        evaluate(run, model, processor, {name: split for name, split in held_out.items() if split.is_blind}, "-blind")
    if run.unscored:
        raise ValueError(f"The adapter is saved in {run.output_dir}, but not all is scored. {'; '.join(run.unscored)}")


@dataclass(frozen=True)
class Watched:
    """What is scored before and after training, beside the task that is trained.

    Args:
        splits (`dict[str, Split]`): Of [`~vlm_peft.training.data.load_watched`].
        paragraphs (`list[str]`): Of the text whose perplexity is watched; none when nothing is.
        nats (`list[float]`): Of each paragraph before training.
    """

    splits: dict[str, Split]
    paragraphs: list[str]
    nats: list[float] = field(default_factory=list)


def load_watch(run: Run, model, processor) -> Watched:
    """What is watched; nothing is scored yet.

    Raises:
        ValueError, OSError: See [`~vlm_peft.training.data.load_watched`] and
            [`~vlm_peft.training.data.watched_text`].
    """
    return Watched(load_watched(run.vision, model, processor), watched_text(run.vision))


def watch_before(run: Run, model, processor, watched: Watched) -> Watched:
    """Scores what is watched before training, by the model that is to be trained."""
    if not watched.splits and not watched.paragraphs:
        return watched
    with run.phase("score before"), plain_decoder(model.eval()):
        evaluate(run, model, processor, watched.splits, "-before", least_tokens=TaskSettings.max_new_tokens)
        return replace(watched, nats=text_nats(model, processor, watched.paragraphs))


def watch_after(run: Run, model, processor, watched: Watched, held_out: dict[str, Split]) -> None:
    """Scores it again, and writes and prints the table of what was gained and lost, with the trained task's rows where
    they were scored before, too."""
    if not watched.splits and not watched.paragraphs:
        return
    with run.phase("score"):
        # Captions that are watched while digits are trained are longer than those.
        evaluate(run, model, processor, watched.splits, least_tokens=TaskSettings.max_new_tokens)
        nats = text_nats(model, processor, watched.paragraphs)
    if run.is_main:
        show_changes(run, [*held_out, *watched.splits], [compared_text(watched.nats, nats, "text")] if nats else [])


def show_changes(run: Run, names: Iterable[str], further: Iterable[dict[str, Any]] = ()) -> None:
    """Writes and prints what training changed, by a paired test of the rows, on splits that were scored before, too.

    Args:
        names (`Iterable[str]`): Of splits.
        further (`Iterable[dict]`): Rows of the table for what is no split.
    """
    scored = run.output_dir / "eval"
    names = [name for name in names if (scored / f"{name}-before" / "scores.json").is_file()]
    names = [name for name in names if (scored / name / "scores.json").is_file()]
    rows = [*(compared(scored / f"{name}-before", scored / name, name) for name in names), *further]
    write_text(run.output_dir / TRANSFER_FILE, json.dumps(rows, indent=2) + "\n")
    run.say(f"\nGained and lost:\n{table(transfer_lines(rows))}\n")


def finish(run: Run, trainer, trained_on: Iterable[Split], held_out: dict[str, Split]) -> None:
    """Writes summary, card and report on the main process, says where everything is, and pushes it if asked to."""
    if not run.is_main:
        return
    run.seconds["total"] = time.monotonic() - run.started
    write_summary(run, trainer, [*trained_on, *held_out.values()])
    report = write_report(run, held_out)
    what = "adapter" if is_adapter_folder(run.output_dir) else "model"
    for said in blind_lines(run.output_dir):
        run.say(said)
    run.say(
        f"\n{what:<9}{run.output_dir}\nscores   {run.output_dir / 'eval'}\nreport   {report}\n"
        f"time     {run.seconds['total']:.0f} s, of which training {run.seconds['train']:.0f} s"
    )
    if run.push is not None:
        run.say(f"pushed   {push_adapter(run.output_dir, card=card_for_others, **run.push)}")


def _described(splits: Iterable[Split]) -> dict[str, dict[str, Any]]:
    """Rows, pictures and content of each split, by a name of its own: data sets of a mixture may all have a `train`."""
    found: dict[str, dict[str, Any]] = {}
    for split in splits:
        name = split.name if split.name not in found else f"{Path(str(split.data.dataset_name)).stem}-{split.name}"
        found[name] = {
            "rows": len(split.texts),
            "pictures": len(split.pictures),
            "content_hash": content_hash(split),
        }
    return found


def write_summary(run: Run, trainer, splits: Iterable[Split]) -> None:
    """Writes run_summary.json and log_history.json."""
    config = base_model(trainer.model).config
    rows = trainable_table(trainer.model)
    used = data_sources(run.vision)
    names = [str(source.dataset_name) for source in used]
    revisions = [source.dataset_revision for source in used]
    summary = {
        "title": f"{run.output_dir.name}: {', '.join(Path(name).name for name in names)}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": run.command,
        "vision_model": run.vision.vision_model,
        "text_model": run.model.model_name_or_path,
        "dataset": names if len(names) > 1 else names[0],
        "dataset_revision": revisions if len(names) > 1 else revisions[0],
        "vision_revision": config.vision_revision,
        "text_revision": config.text_revision or run.model.model_revision,
        "data": _described(splits),
        "device": str(run.training.device),
        "seed": run.training.seed,
        "strategy": run.vision.strategy,
        "start_from": run.vision.start_from,
        "trains": chosen_strategy(run.vision, run.model).described,
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


def write_report(run: Run, held_out: dict[str, Split]) -> Path:
    """Writes the gallery's pictures, README.md and report.html; returns the latter."""
    for name, split in held_out.items():
        wanted = set(map(str, choose_gallery(run.output_dir / "eval" / name)))
        found = {
            question.id: split.pictures.open(question.image_ids[0])
            for question in split.questions()
            if question.id in wanted and question.image_ids
        }
        save_gallery_pictures(run.output_dir, name, found)
    write_model_card(run.output_dir)
    return build_report(run.output_dir)
