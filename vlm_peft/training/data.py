"""The rows of a run: which are read, encoded and held out; for the recipe, and for those who look before it trains.

Stage: options -> held-out splits, and training rows from a data set, a mixture or a stream.
"""

import random
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from itertools import count as counting
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets

from ..data.arguments import DataArguments
from ..data.leakage import check_overlap, picture_hashes
from ..data.mixture import fetch_from, first_images, mix
from ..data.rows import EncodedRows, encode_rows, load_rows
from ..data.splits import (
    Split,
    drawn_shares,
    encode_pictures,
    first_of_each,
    leave_out,
    load_split,
    make_split,
    settle,
    undecided,
)
from ..data.streaming import load_stream, stack_pixels
from ..data.tables import TABLES
from ..evaluation.perplexity import SAMPLE, read_paragraphs
from .arguments import VisionArguments, keeps_features, watched_sources
from .setup import check_steps, local, sources, training_sources, training_stream

_PARAGRAPHS = 200
"""Of a data set whose perplexity is watched, at most."""


@dataclass(frozen=True)
class Part:
    """A split that a run reads, before it is read.

    Args:
        source ([`~vlm_peft.data.arguments.DataArguments`]): Its data set.
        name (`str`): As the data set calls it.
        is_held_out (`bool`): Whether it is scored, not trained on.
    """

    source: DataArguments
    name: str
    is_held_out: bool

    @property
    def limit(self) -> int | None:
        """First so many rows only."""
        return self.source.eval_limit if self.is_held_out else self.source.train_limit

    def load(self, processor) -> Split:
        """See [`~vlm_peft.data.splits.load_split`]."""
        return load_split(self.source, self.name, processor, limit=self.limit)

    def load_first(self, processor, count: int) -> Split:
        """The first rows of a stream as a split."""
        stream = load_stream(self.source, self.name, limit=min(self.limit or count, count))
        rows = Dataset.from_list(list(stream), features=stream.features)
        if "id" not in rows.column_names:
            rows = rows.add_column("id", [str(index) for index in range(len(rows))])
        return make_split(self.source, self.name, rows, processor)


def settle_options(vision: VisionArguments) -> None:
    """Fills in, once, the tasks' options that the training rows decide; see [`~vlm_peft.data.splits.settle`].

    Raises:
        ValueError: When a task needs all rows to find them, and they come as a stream.
    """
    for number, source in enumerate(sources(vision)):
        missing = undecided(source)
        if missing and vision.streaming:
            raise ValueError(
                f"--streaming: the task {source.task} finds {', '.join(missing)} in all training rows, which come one "
                f"by one: give --{missing[0]}."
            )
        is_trained = source.train_split is not None
        found = settle(source, source.train_split or source.eval_splits[0], is_trained=is_trained) if missing else {}
        if vision.mixture is not None:
            vision.mixture[number].update(found)
        else:
            for name, value in found.items():
                setattr(vision, name, value)


def parts(vision: VisionArguments) -> list[Part]:
    """All that a run reads, data set by data set, what is trained on first.

    Raises:
        ValueError: When nothing is trained on, or the options contradict each other.
        FileNotFoundError: When a data set's path is not there.
    """
    training_sources(vision)
    settle_options(vision)
    found = []
    for source in sources(vision):
        if vision.streaming and drawn_shares(source.eval_splits, str(source.train_split)):
            raise ValueError(
                f"eval_splits {source.eval_splits}: nothing can be drawn from a stream, whose length is not known; "
                "name a split of its own, or leave --streaming out."
            )
        found += [Part(source, source.train_split, is_held_out=False)] if source.train_split is not None else []
        found += [Part(source, name, is_held_out=True) for name in source.eval_splits]
    return found


def encode_split(
    split: Split, processor, training, *, on_bad_row: str = "skip", first_image: int = 0, whole: bool = False
) -> EncodedRows:
    """A split's rows as they are trained on; see [`~vlm_peft.data.rows.encode_rows`].

    Args:
        split, processor, on_bad_row, first_image: Passed on.
        training (`SFTConfig`): `max_length` and `dataset_num_proc`.
        whole (`bool`, *optional*, defaults to `False`): In one sequence each, however long.
    """
    return encode_rows(
        split.texts,
        split.task,
        processor,
        split.pictures,
        max_length=None if whole else training.max_length,
        unreadable=split.unreadable,
        on_bad_row=on_bad_row,
        num_proc=training.dataset_num_proc,
        first_image=first_image,
    )


def row_lengths(rows: Dataset) -> list[int]:
    """Tokens of each encoded row."""
    return [len(ids) for ids in rows["input_ids"][:]]


def watched(held_out: Iterable[Split], training) -> list[Split]:
    """The splits whose loss is taken at evaluations: the first one of each data set."""
    return first_of_each(held_out) if training.eval_strategy != "no" else []


def join(encoded: list[Dataset], splits: list[Split], training) -> Dataset:
    """The training rows of all data sets as one.

    Raises:
        ValueError: When there is no step to train, or some data sets have weights and others none.
    """
    rows = mix(encoded, [split.data.weight for split in splits], training.seed)
    check_steps(len(rows), training)
    return rows


@dataclass(frozen=True)
class TrainingRows:
    """What the trainer and its collator need.

    Args:
        dataset: Encoded rows, a `Dataset` or an `IterableDataset`.
        eval_dataset: Encoded rows of each data set's first held-out split, for the loss at evaluations.
        fetch_images: Picture numbers of both -> model inputs.
        described: One sentence for the log.
        splits: What the rows were made of; none for a stream.
        held_back: Of splits that have such rows, those that are not trained on but calibrate the model.
    """

    dataset: Any
    eval_dataset: Dataset | None
    fetch_images: Callable[[list], dict[str, torch.Tensor]]
    described: str
    splits: list[Split]
    held_back: list[Split] = field(default_factory=list)


def hold_back(split: Split, rows: Dataset) -> tuple[Dataset, Split]:
    """Takes the rows that a task wants held back out of those that are trained on.

    Args:
        split: That is trained on.
        rows: Its encoded rows.

    Returns:
        The encoded rows without them, and the split with all others left out.

    Raises:
        ValueError: When nothing is left to train on.
    """
    count, usable = split.task.held_back, sorted(set(rows["row"][:]))
    if count >= len(usable):
        raise ValueError(f"{count} rows of {split.name} are to be held back, which has {len(usable)}: hold back fewer.")
    chosen = set(random.Random(0).sample(usable, count))
    kept = [place for place, row in enumerate(rows["row"][:]) if row not in chosen]
    others = dict.fromkeys(set(range(len(split.texts))) - chosen, "not held back")
    return rows.select(kept), replace(split, left_out=others)


def load_held_out(vision: VisionArguments, model, processor) -> dict[str, Split]:
    """All splits to score, by the name of their folder: the split's own, with the task before it in a mixture.

    Raises:
        ValueError: if a split has rows that cannot be scored (see `leave_out`).
    """
    found: dict[str, Split] = {}
    is_mixture = len(sources(vision)) > 1
    for part in parts(vision):
        if not part.is_held_out:
            continue
        split = leave_out(_with_pictures(vision, part.load(processor), model, processor), vision.on_bad_row)
        split.name = _folder_name(part.name)
        if is_mixture:
            split.name = f"{split.data.task}-{split.name}"
            if split.name in found:
                split.name = f"{Path(str(split.data.dataset_name)).stem}-{split.name}"
        split.name = _unused(split.name, found)
        found[split.name] = split
    return found


def load_watched(vision: VisionArguments, model, processor) -> dict[str, Split]:
    """All splits of `watch`, by the name of their folder.

    Raises:
        FileNotFoundError: When a data set's path is not there.
        ValueError: If a split is not there, or has rows that cannot be scored.
    """
    found: dict[str, Split] = {}
    for source in watched_sources(vision):
        source = replace(source, dataset_name=local(str(source.dataset_name), "watch"))
        source = replace(source, **settle(source, source.eval_splits[0]))
        for name in source.eval_splits:
            split = load_split(source, name, processor, limit=source.eval_limit)
            split = leave_out(_with_pictures(vision, split, model, processor), vision.on_bad_row)
            split.name = f"watch-{source.task}-{_folder_name(name)}"
            if split.name in found:
                split.name = f"watch-{Path(str(source.dataset_name)).stem}-{source.task}-{_folder_name(name)}"
            split.name = _unused(split.name, found)
            found[split.name] = split
    return found


def watched_text(vision: VisionArguments) -> list[str]:
    """Paragraphs of the text whose perplexity is watched; none when nothing is.

    Raises:
        FileNotFoundError: When it is not there.
        ValueError, OSError: See [`~vlm_peft.evaluation.perplexity.read_paragraphs`]; and for a data set without a
            column `text`, or without a paragraph of ten words in it.
    """
    if vision.watch_text is None:
        return read_paragraphs(SAMPLE) if vision.watch is not None else []
    name = local(vision.watch_text, "watch_text")
    if Path(name).is_file() and Path(name).suffix.lower() not in (*TABLES, ".parquet"):
        return read_paragraphs(name)
    rows = load_rows(name, vision.watch_text_split)
    if "text" not in rows.column_names:
        raise ValueError(
            f"--watch_text {name}: expected a text file or a data set with a column text, got the columns "
            f"{', '.join(sorted(rows.column_names))}."
        )
    paragraphs = (" ".join(str(text or "").split()) for text in rows["text"])
    # Corpora have empty lines and headings as rows of their own.
    found = list(islice((each for each in paragraphs if each.count(" ") >= 9), _PARAGRAPHS))
    if not found:
        raise ValueError(f"--watch_text {name}: expected rows of ten words or more in the column text, found none.")
    return found


def _unused(name: str, used: Container[str]) -> str:
    """The name, with a number behind it where it is used."""
    names = chain([name], (f"{name}-{number}" for number in counting(2)))
    return next(each for each in names if each not in used)


def _folder_name(split: str) -> str:
    """A part like `train[90%:]` is a folder's name, too."""
    return re.sub(r"[^\w.+-]+", "-", split).strip("-")


def load_trained_on(vision: VisionArguments, model, processor, held_out: dict[str, Split]) -> list[Split]:
    """The splits that are trained on, with their pictures encoded, checked against the held-out ones.

    Raises:
        ValueError: For pictures that are also held out.
    """
    splits = []
    for part in parts(vision):
        if part.is_held_out:
            continue
        split = part.load(processor)
        for other in held_out.values():
            said = check_overlap(split, other, allow=vision.allow_overlap)
            if said is not None and PartialState().is_main_process:
                print(f"Overlap allowed: {said}", flush=True)
        splits.append(_with_pictures(vision, split, model, processor))
    return splits


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
    others = watched(held_out.values(), training)
    splits = [] if vision.streaming else load_trained_on(vision, model, processor, held_out)

    fetch = fetch_from([*splits, *others])
    with PartialState().main_process_first():
        encoded = [
            encode_split(split, processor, training, on_bad_row=vision.on_bad_row, first_image=first_image).dataset
            for split, first_image in zip([*splits, *others], first_images([*splits, *others]), strict=True)
        ]
    held_back = []
    for number, split in enumerate(splits):
        if split.task.held_back:
            encoded[number], back = hold_back(split, encoded[number])
            held_back.append(back)
    eval_dataset = concatenate_datasets(encoded[len(splits) :]) if others else None
    if vision.streaming:
        hashes: set[str] = set()
        if not vision.allow_overlap:
            for split in held_out.values():
                hashes |= set(picture_hashes(split.pictures))
        return TrainingRows(
            training_stream(vision, training, processor, frozenset(hashes)),
            eval_dataset,
            lambda images: fetch(images) if isinstance(images[0], int) else stack_pixels(images),
            f"Training on a stream for {training.max_steps:,} steps: its length is not known, and each picture is "
            "encoded when it comes (no feature cache).",
            [],
        )
    dataset = join(encoded[: len(splits)], splits, training)
    described = f"Training on {len(dataset):,} rows with {sum(dataset['num_branches'][:]):,} texts"
    if len(splits) > 1:
        drawn = zip(encoded, splits, strict=False)
        described += f", drawn from {', '.join(f'{len(rows):,} of {split.data.task}' for rows, split in drawn)}"
    return TrainingRows(dataset, eval_dataset, fetch, described + ".", splits, held_back)


def _with_pictures(vision: VisionArguments, split: Split, model, processor) -> Split:
    return encode_pictures(
        split,
        model,
        processor,
        feature_cache=keeps_features(vision),
        directory=vision.feature_cache_dir,
        dtype=vision.feature_dtype,
    )
