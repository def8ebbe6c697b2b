"""The rows of a training run: held-out splits, and training rows from a data set, a mixture or a stream."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets

from ..data.leakage import check_overlap, picture_hashes
from ..data.mixture import fetch_from, first_images, mix
from ..data.rows import encode_rows
from ..data.splits import Split, encode_pictures, first_of_each, leave_out, load_split
from ..data.streaming import stack_pixels
from .arguments import VisionArguments
from .setup import check_steps, sources, training_sources, training_stream


@dataclass(frozen=True)
class TrainingRows:
    """What the trainer and its collator need.

    Args:
        dataset: Encoded rows, a `Dataset` or an `IterableDataset`.
        eval_dataset: Encoded rows of each data set's first held-out split, for the loss at evaluations.
        fetch_images: Picture numbers of both -> model inputs.
        described: One sentence for the log.
        splits: What the rows were made of; none for a stream.
    """

    dataset: Any
    eval_dataset: Dataset | None
    fetch_images: Callable[[list], dict[str, torch.Tensor]]
    described: str
    splits: list[Split]


def load_held_out(vision: VisionArguments, model, processor) -> dict[str, Split]:
    """All splits to score, by the name of their folder: the split's own, with the task before it in a mixture.

    Raises:
        ValueError: if a split has rows that cannot be scored (see `leave_out`).
    """
    found: dict[str, Split] = {}
    all_sources = sources(vision)
    for source in all_sources:
        for name in source.eval_splits:
            split = load_split(source, name, processor, limit=source.eval_limit)
            split = leave_out(_encoded(vision, split, model, processor), vision.on_bad_row)
            # A part like `train[90%:]` is a folder's name, too.
            split.name = re.sub(r"[^\w.+-]+", "-", name).strip("-")
            if len(all_sources) > 1:
                split.name = f"{source.task}-{split.name}"
                if split.name in found:
                    split.name = f"{Path(str(source.dataset_name)).stem}-{split.name}"
            found[split.name] = split
    return found


def load_training(vision: VisionArguments, training, model, processor, held_out: dict[str, Split]) -> TrainingRows:
    """Training rows of all data sets, checked against the held-out pictures and encoded.

    Args:
        vision: The run's options.
        training: Its `SFTConfig`: `max_length`, `seed`, `dataset_num_proc`.
        model, processor: Encode pictures and texts.
        held_out: Of `load_held_out`.

    Raises:
        ValueError: for rows that cannot be used, or pictures that are also held out.
    """
    watched = first_of_each(held_out.values()) if training.eval_strategy != "no" else []
    if vision.streaming:
        hashes: set[str] = set()
        if not vision.allow_overlap:
            for split in held_out.values():
                hashes |= set(picture_hashes(split.pictures))
        dataset = training_stream(vision, training, processor, frozenset(hashes))
        described = (
            f"Training on a stream for {training.max_steps:,} steps: its length is not known, and each picture is "
            "encoded when it comes (no feature cache)."
        )
        fetch = fetch_from(watched)
        eval_rows = _encode(vision, training, processor, watched, 0)
        return TrainingRows(
            dataset,
            concatenate_datasets(eval_rows) if eval_rows else None,
            lambda images: fetch(images) if isinstance(images[0], int) else stack_pixels(images),
            described,
            [],
        )

    splits = []
    for source in training_sources(vision):
        split = load_split(source, str(source.train_split), processor, limit=source.train_limit)
        for other in held_out.values():
            said = check_overlap(split, other, allow=vision.allow_overlap)
            if said is not None and PartialState().is_main_process:
                print(f"Overlap allowed: {said}", flush=True)
        splits.append(_encoded(vision, split, model, processor))
    encoded = _encode(vision, training, processor, splits, 0)
    dataset = mix(encoded, [split.data.weight for split in splits], training.seed)
    check_steps(len(dataset), training)
    texts = sum(dataset["num_branches"][:])
    described = f"Training on {len(dataset):,} rows with {texts:,} texts"
    if len(splits) > 1:
        parts = ", ".join(f"{len(rows):,} of {split.data.task}" for rows, split in zip(encoded, splits, strict=True))
        described += f", drawn from {parts}"
    eval_rows = _encode(vision, training, processor, watched, sum(len(split.pictures) for split in splits))
    return TrainingRows(
        dataset,
        concatenate_datasets(eval_rows) if eval_rows else None,
        fetch_from([*splits, *watched]),
        described + ".",
        splits,
    )


def _encode(vision: VisionArguments, training, processor, splits: list[Split], first: int) -> list[Dataset]:
    """Encoded rows of each split; their pictures are numbered from `first` on."""
    encoded = []
    with PartialState().main_process_first():
        for split, first_image in zip(splits, first_images(splits), strict=True):
            rows = encode_rows(
                split.texts,
                split.task,
                processor,
                split.pictures,
                max_length=training.max_length,
                unreadable=split.unreadable,
                on_bad_row=vision.on_bad_row,
                num_proc=training.dataset_num_proc,
                first_image=first + first_image,
            )
            encoded.append(rows.dataset)
    return encoded


def _encoded(vision: VisionArguments, split: Split, model, processor) -> Split:
    return encode_pictures(
        split,
        model,
        processor,
        feature_cache=vision.feature_cache,
        directory=vision.feature_cache_dir,
        dtype=vision.feature_dtype,
    )
