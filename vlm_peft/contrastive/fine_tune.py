"""Contrastive fine-tuning: the recipe behind `recipes/clip.py`.

Stage: options -> one adapter folder with scores before and after, card and report; with `--merge`, a plain checkpoint.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from accelerate import PartialState

from .. import __version__
from ..console import table
from ..data.leakage import check_overlap
from ..data.splits import content_hash
from ..evaluation.records import write_text
from ..hub.models import push_adapter
from ..report.gallery import choose_gallery, save_gallery_pictures
from ..report.report import build_report
from ..training import run as phases
from ..training.checkpoints import RUN_FILE
from ..training.run import Run
from .adapt import adapt, tuning_table
from .arguments import ClipArguments, parse_arguments
from .card import clip_card_for_others, describe_merged, write_clip_card
from .encoder import DualEncoder
from .evaluate import embed_split, evaluate_all, file_name, write_evaluated
from .features import vectors_folder
from .folder import is_adapter, load_clip, save_merged
from .pairs import PairCollator, PairRows, Pairs, check_texts, class_names, load_pairs, picture_vectors
from .trainer import ContrastiveTrainer

# Adding LoRA to the weights rounds differently than adding its output.
_MERGE_TOLERANCE = 1e-4


def main(
    arguments: Sequence[str], *, program: str = "clip.py", command: str | None = None, started: float | None = None
) -> int:
    """Scores, trains, saves, checks, scores again and reports.

    Args:
        arguments (`Sequence[str]`): The command line.
        program (`str`, *optional*, defaults to `"clip.py"`): Put before messages.
        command (`str`, *optional*): How the program is started, for the report.
        started (`float`, *optional*): `time.monotonic()` when it was.

    Returns:
        `int`: The exit status.

    Raises:
        SystemExit: For options that are none.
        ValueError, OSError: For what is wrong with the model, the data or checkpoints; names it.
    """
    options, training = parse_arguments(
        list(arguments), program=program, description="Fine-tune a CLIP or SigLIP on pictures with texts."
    )
    # A merged CLIP needs no base to be loaded; an adapter does.
    pushed: dict[str, Any] = {"config": {"model_type": "clip"}}
    if not options.merge:
        pushed = {"config": {"model_type": "clip", "base_name_or_path": None}, "vision": options.clip_model}
    command = " ".join([command or program, *arguments])
    run = Run(options, training, SimpleNamespace(), command=command, started=started, pushed=pushed)
    run.compare(_record(options, training))
    if is_adapter(str(options.clip_model), options.clip_revision):
        # What it adds to its base rounds differently elsewhere, so that no fingerprint would hold.
        raise ValueError(
            f"--clip_model {options.clip_model} is an adapter, and another is trained on a plain checkpoint only: "
            f"write one with `vlm-peft export {options.clip_model} FOLDER --to merged` and name that folder."
        )
    with run.phase("load model"):
        encoder = load_clip(str(options.clip_model), revision=options.clip_revision, device=training.device)
    with run.phase("load data"), PartialState().main_process_first():
        held_out = {name: _load(options, name, options.eval_limit, encoder) for name in options.eval_splits}
        pairs = _load(options, str(options.train_split), options.train_limit, encoder)
        for part in held_out.values():
            said = check_overlap(pairs.split, part.split, allow=options.allow_overlap)
            if said is not None:
                run.say(f"Overlap allowed: {said}")
    names = class_names([pairs, *held_out.values()], options.class_names) if options.label_column else []
    record = _record(options, training, encoder, pairs)
    run.compare(record)
    phases.begin_results(run)
    if options.score_before:
        with run.phase("score before"):
            evaluate(run, encoder, held_out, names, "-before")

    with run.phase("prepare training"):
        vectors = None
        if options.vision_tuning == "locked":
            # The others read what the first one writes.
            with PartialState().main_process_first():
                vectors = picture_vectors(encoder, pairs, options.vectors_dir, options.eval_batch_size)
        trainer = make_trainer(run, encoder, pairs, vectors, held_out, names, record)
    status = phases.train(run, trainer)
    if status:
        return status
    with run.phase("save"):
        phases.save_whole(run, trainer)
        PartialState().wait_for_everyone()
        trained = load_checked(run, encoder.eval(), pairs)
    with run.phase("score"):
        evaluate(run, trained, held_out, names)
        evaluate(
            run, trained, {name: held_out[name] for name in options.blind_splits if name in held_out}, [], "-blind"
        )
    if run.is_main:
        finish(run, trainer, pairs, held_out)
    return 0


def _load(options: ClipArguments, name: str, limit: int | None, encoder: DualEncoder) -> Pairs:
    """A split, with its texts looked at."""
    with_texts = options.train_on == "texts"
    pairs = load_pairs(
        options,
        name,
        limit=limit,
        label_column=options.label_column,
        with_texts=with_texts,
        on_bad_row=options.on_bad_row,
    )
    if with_texts:
        check_texts(encoder, pairs, options.long_texts)
    elif len({label for label in pairs.labels if label is not None}) < 2:
        raise ValueError(f"All pictures of {name} have one class: expected several in {options.label_column}.")
    return pairs


def _record(
    options: ClipArguments, training: Any, encoder: DualEncoder | None = None, pairs: Pairs | None = None
) -> dict:
    """What a run must have in common with the one that it goes on with."""
    found: dict[str, Any] = asdict(options.tuning) | {
        name: getattr(options, name) for name in ("loss", "texts_per_picture", "train_on", "train_limit")
    }
    found |= {"seed": training.seed, "optim": str(training.optim)}
    found["rows a step"] = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    )
    if encoder is not None:
        found["CLIP's weights"] = encoder.config.base_fingerprint
    return found | ({"training data": content_hash(pairs.split)} if pairs is not None else {})


def make_trainer(
    run: Run,
    encoder: DualEncoder,
    pairs: Pairs,
    vectors: np.ndarray | None,
    held_out: dict[str, Pairs],
    names: Sequence[str],
    record: dict[str, Any],
) -> ContrastiveTrainer:
    """The trainer, after the table of what trains was printed.

    Args:
        encoder ([`DualEncoder`]): Gets LoRA, in place.
        pairs ([`~vlm_peft.contrastive.pairs.Pairs`]): To train on.
        vectors (`np.ndarray`, *optional*): `(P, D)`, of a locked image tower.
        held_out (`dict`): The first is scored at evaluations.
        names (`Sequence[str]`): Of its classes.
        record (`dict`): Kept in every checkpoint.

    Raises:
        ValueError: When nothing would train.
    """
    options = run.vision
    encoder.clip = adapt(encoder.clip, options.tuning)
    encoder.chunk_size = options.chunk_size
    rows = PairRows(pairs, options.texts_per_picture, run.training.seed, options.prompts)
    if options.train_on == "labels":
        pairs.kept, pairs.texts, pairs.labels = _with_class(pairs)
        rows = PairRows(pairs, None, run.training.seed, options.prompts)
    parts = tuning_table(encoder.clip)
    lines = [("part", "parameters", "trainable"), *((part, f"{total:,}", f"{of:,}") for part, total, of in parts)]
    run.say(f"\n{table(lines)}\n")
    kinds = "vectors of pictures, encoded once" if vectors is not None else "pictures"
    run.say(f"Training on {len(pairs):,} {kinds}, with {sum(map(len, pairs.texts)) or len(pairs):,} texts.")

    def score() -> dict[str, float]:
        part = next(iter(held_out.values()))
        images = embed_split(encoder, part, _directory(run), options.eval_batch_size)
        found = evaluate_all(encoder, part, images, names, options.prompts)
        return {metric: value for each in found for metric, value in each.scores.metrics.items()}

    return ContrastiveTrainer(
        encoder,
        run.training,
        train_dataset=rows,
        eval_dataset=rows if run.training.eval_strategy != "no" else None,
        data_collator=PairCollator(encoder, pairs, vectors),
        loss=options.loss,
        score=score,
        extra_files={RUN_FILE: json.dumps(record, indent=2) + "\n"},
    )


def _with_class(pairs: Pairs) -> tuple[list[int], list[list[str]], list[str | None]]:
    kept = [index for index, label in enumerate(pairs.labels) if label is not None]
    return [pairs.kept[index] for index in kept], [[] for _ in kept], [pairs.labels[index] for index in kept]


def _directory(run: Run) -> str | None:
    """Where vectors of held-out pictures are kept: nowhere if the image tower trains."""
    return str(vectors_folder(run.vision.vectors_dir)) if run.vision.vision_tuning == "locked" else None


def evaluate(run: Run, encoder: DualEncoder, parts: dict[str, Pairs], names: Sequence[str], suffix: str = "") -> None:
    """Scores held-out splits on the main process, into `eval/<task>-<split><suffix>/`, with a line each.

    Args:
        encoder ([`DualEncoder`]): To score.
        parts (`dict`): Splits by name.
        names (`Sequence[str]`): Of the classes; none for no zero-shot scores.
        suffix (`str`): `"-before"`, `"-blind"`, or nothing.
    """
    encoder.eval()
    if run.is_main:
        for part in parts.values():
            images = embed_split(encoder, part, _directory(run), run.vision.eval_batch_size)
            for found in evaluate_all(encoder, part, images, names, run.vision.prompts, blind=suffix == "-blind"):
                run.say(write_evaluated(run.output_dir, part, found, suffix))
    PartialState().wait_for_everyone()


def load_checked(run: Run, trained: DualEncoder, pairs: Pairs) -> DualEncoder:
    """The saved adapter, loaded again and compared with what was trained; with `--merge`, the merged one, too.

    Raises:
        RuntimeError: When embeddings differ.
    """
    few = [pairs.picture(index) for index in range(min(4, len(pairs)))]
    texts = [text for each in pairs.texts[:4] for text in each] or run.vision.prompts

    def difference(one: DualEncoder, other: DualEncoder) -> float:
        apart = [one.embed_pictures(few) - other.embed_pictures(few), one.embed_texts(texts) - other.embed_texts(texts)]
        return max(float(each.abs().max()) for each in apart)

    loaded = load_clip(run.output_dir, merge=False, device=run.training.device)
    unlike = difference(trained, loaded)
    if unlike > (0.0 if loaded.device.type == "cpu" else 1e-2):
        raise RuntimeError(f"The saved adapter's embeddings differ from the trained model's by {unlike:g}.")
    run.say(f"Saved {run.output_dir}; reloaded, its embeddings are equal" + (f" to {unlike:.1g}." if unlike else "."))
    if run.vision.merge and run.is_main:
        merged = load_clip(save_merged(run.output_dir, run.output_dir / "merged"), device=run.training.device)
        unlike = difference(loaded, merged)
        if unlike > _MERGE_TOLERANCE:
            raise RuntimeError(f"The merged model's embeddings differ from the adapter's by {unlike:g}.")
        run.say(f"Merged into {run.output_dir / 'merged'}, a plain checkpoint; equal to {unlike:.1g}.")
    return loaded


def finish(run: Run, trainer: ContrastiveTrainer, pairs: Pairs, held_out: dict[str, Pairs]) -> None:
    """Writes summary, card and report, says where everything is, and pushes it if asked to."""
    run.seconds["total"] = time.monotonic() - run.started
    parts = tuning_table(trainer.accelerator.unwrap_model(trainer.model).clip)
    splits = {"train": pairs, **held_out}
    summary = {
        "title": f"{run.output_dir.name}: {Path(str(run.vision.dataset_name)).name}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": run.command,
        "vision_model": run.vision.clip_model,
        "vision_revision": run.vision.clip_revision,
        "dataset": run.vision.dataset_name,
        "dataset_revision": run.vision.dataset_revision,
        "data": {
            name: {"rows": len(part), "pictures": len(part), "content_hash": content_hash(part.split)}
            for name, part in splits.items()
        },
        "device": str(run.training.device),
        "seed": run.training.seed,
        "parameters": sum(total for _, total, _ in parts),
        "trainable_parameters": sum(trained for _, _, trained in parts),
        "trained": [
            {"module": part, "parameters": total, "trainable": trained, "dtype": "float32"}
            for part, total, trained in parts
        ],
        "seconds": {name: round(value, 1) for name, value in run.seconds.items()},
        "versions": {"vlm_peft": __version__}
        | {name: version(name) for name in ("torch", "transformers", "peft", "datasets")},
        "adapter": str(run.output_dir),
        "load": f"from vlm_peft.contrastive.folder import load_clip\nencoder = load_clip({str(run.output_dir)!r})",
    }
    write_text(run.output_dir / "run_summary.json", json.dumps(summary, indent=2) + "\n")
    write_text(run.output_dir / "log_history.json", json.dumps(trainer.state.log_history, indent=2) + "\n")
    for folder in sorted(run.output_dir.glob("eval/*/predictions.jsonl")):
        name = folder.parent.name
        part = next((part for split, part in held_out.items() if name.endswith(f"-{file_name(split)}")), None)
        if part is not None:
            wanted = set(map(str, choose_gallery(folder.parent)))
            found = {each: _opened(part, row) for row, each in enumerate(part.ids) if each in wanted}
            save_gallery_pictures(run.output_dir, name, found)
    write_clip_card(run.output_dir)
    merged = run.output_dir / "merged"
    if run.vision.merge:
        describe_merged(run.output_dir, merged)
    report = build_report(run.output_dir)
    run.say(
        f"\nadapter  {run.output_dir}\nscores   {run.output_dir / 'eval'}\nreport   {report}\n"
        f"time     {run.seconds['total']:.0f} s, of which training {run.seconds['train']:.0f} s"
    )
    if run.push is not None:
        folder = merged if run.vision.merge else run.output_dir
        run.say(f"pushed   {push_adapter(folder, card=clip_card_for_others, **run.push)}")


def _opened(part: Pairs, row: int) -> Any:
    return part.split.pictures.open(part.split.pictures.of_row(part.kept[row]).start)
