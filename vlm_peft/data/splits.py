"""Splits: rows, task, pictures and vision features of one part of a data set, ready to train on or to generate for.

Stage: names and options -> everything that encoding, training and evaluation read.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from accelerate import PartialState
from datasets import Dataset

from ..model.modeling_vision_qwen import base_model
from ..tasks import Example, Task, find_kind, make_task, task_options
from .arguments import DataArguments
from .feature_cache import build_feature_cache
from .groups import hold_out
from .pictures import Pictures
from .rows import bind_rows, check_places, find_unreadable, load_rows, picture_folder, resolve_paths

_SHARE = re.compile(r"(.+)\[(\d+(?:\.\d+)?)%\]")


def drawn_shares(splits: Iterable[str], name: str) -> list[float]:
    """Shares of the split `name` that are among others: 0.1 for `train[10%]` of `train`."""
    found = (_SHARE.fullmatch(each) for each in splits)
    return [float(share[2]) / 100 for share in found if share is not None and share[1] == name]


@dataclass(frozen=True)
class Question:
    """One text that a model is asked to generate.

    Args:
        id (`str`): Of the row, or of the member of a group; with a number where these have several questions.
        prompt (`list[dict]`): Messages up to where the assistant answers.
        image_ids (`list[int]`): Picture numbers, in the order of the prompt's image parts.
        references (`list[str]`): Accepted texts.
        details (`dict`): What the score needs beside them.
        solved (`int`): Of the pictures, so many at the beginning belong to solved examples before the question.
    """

    id: str
    prompt: list[dict]
    image_ids: list[int]
    references: list[str]
    details: dict
    solved: int = 0


@dataclass
class Split:
    """A split ready to be trained on or generated for.

    Args:
        name (`str`): What its folder is called.
        stored_name (`str`): What the data set calls it.
        data ([`~vlm_peft.data.arguments.DataArguments`]): Where it comes from.
        texts (`Dataset`): Rows without pictures, grouped as the task wants them; `id` is the row's own, or a list of
            its members' ids.
        task ([`~vlm_peft.tasks.Task`]): Row -> prompt and references.
        pictures ([`~vlm_peft.data.pictures.Pictures`]): Of the same rows.
        fetch_images (`Callable`): Picture numbers -> model inputs, from the feature cache or from pixels.
        unreadable (`dict[int, str]`): Picture number -> why it cannot be read.
        left_out (`dict[int, str]`): Numbers of rows that cannot be used, with the reason; they are not scored. See
            [`leave_out`].
    """

    name: str
    stored_name: str
    data: DataArguments
    texts: Dataset
    task: Task
    pictures: Pictures
    fetch_images: Callable[[list[int]], dict[str, torch.Tensor]]
    unreadable: dict[int, str] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)

    @property
    def is_blind(self) -> bool:
        """Whether the blind control of a held-out split was asked for."""
        return self.stored_name in self.data.blind_splits

    def questions(self) -> Iterator[Question]:
        """All that a model is asked about the rows that are not left out."""
        for index, row in enumerate(self.texts):
            if index in self.left_out:
                continue
            example = self.task.example(row)
            for number, question in enumerate(example.questions):
                members = row["id"] if isinstance(row["id"], list) else [row["id"]]
                # Captions of one picture may be rows of their own: several members, one question.
                several = len(example.questions) not in (1, len(members)) or (
                    len(example.questions) > 1 and len(set(map(str, members))) < len(members)
                )
                name = f"{row_name(row)}-{number}" if several else str(members[number])
                yield Question(
                    name,
                    [*example.prompt, *question],
                    list(self.pictures.of_row(index)),
                    example.references[number],
                    example.details[number] if example.details else {},
                )


def content_hash(split: Split) -> str:
    """Hash of a split's texts and picture files, in order: 32 hexadecimal digits (xxh3, 128 bits)."""
    digest = xxhash.xxh3_128()
    for row in split.texts:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    for each in split.pictures.hashes:
        digest.update((each or "unreadable").encode())
    return digest.hexdigest()


def first_of_each(splits: Iterable[Split]) -> list[Split]:
    """The first split of each data set: of those held out, what is watched while training."""
    found: dict[int, Split] = {}
    for split in splits:
        found.setdefault(id(split.data), split)
    return list(found.values())


def bind_task(data: DataArguments, columns: list[str]) -> Task:
    """The task of a data set, bound to its columns; see [`~vlm_peft.tasks.make_task`] for errors."""
    return make_task(
        data.task,
        columns,
        image_column=data.image_column,
        text_column=data.text_column,
        instruction=data.instruction,
        **task_options(data),
    )


def settle(data: DataArguments, name: str, *, is_trained: bool = False) -> dict[str, Any]:
    """Options of a task that a data set's rows decide, such as the classes to choose from, as far as they are missing.

    Args:
        data ([`~vlm_peft.data.arguments.DataArguments`]): Data set, columns and task.
        name (`str`): Of the split whose rows are asked.
        is_trained (`bool`, *optional*, defaults to `False`): Whether it is trained on.

    Raises:
        ValueError, FileNotFoundError: See [`load_split`]; and for rows that the task cannot do with.
    """
    kind = find_kind(data.task)
    if kind.settle is None or not undecided(data):
        return {}
    with PartialState().main_process_first():
        rows = _load_rows(data, name)
    return kind.settle(rows, data.text_column, task_options(data), is_trained)


def undecided(data: DataArguments) -> list[str]:
    """Names of the options that [`settle`] would find."""
    return [name for name in find_kind(data.task).from_rows if getattr(data, name) is None]


def _load_rows(data: DataArguments, name: str, limit: int | None = None) -> Dataset:
    if data.dataset_name is None:
        raise ValueError("dataset_name is missing: expected a Hub id, a parquet file or a folder.")
    share = _SHARE.fullmatch(name)
    stored = name if share is None else share[1]
    # What is scored has nothing to do with how much of the rest is trained on.
    shares = drawn_shares(data.eval_splits if share is None else [name], stored)
    order = find_kind(data.task).order
    rows = load_rows(
        data.dataset_name,
        stored,
        revision=data.dataset_revision,
        stored_split=data.stored_split,
        split_column=data.split_column,
        limit=limit if order is None and not shares else None,
    )
    if shares:
        columns = bind_task(data, rows.column_names).image_columns
        shown = resolve_paths(rows, columns, picture_folder(data.dataset_name, data.image_folder))
        held = {row for each in shares for row in hold_out(shown, columns, each, data.split_seed)}
        rows = rows.select([row for row in range(len(rows)) if (row in held) == (share is not None)])
    chosen = range(len(rows)) if order is None else order(rows, data.text_column)
    return rows.select(chosen[:limit]) if shares or order is not None else rows


def load_split(data: DataArguments, name: str, processor, *, limit: int | None = None) -> Split:
    """Loads a split's rows; pictures are read and processed whenever they are asked for.

    Args:
        data ([`~vlm_peft.data.arguments.DataArguments`]): Data set, columns and task.
        name (`str`): Of the split; `train[10%]` is a tenth of the split `train`, drawn by
            [`~vlm_peft.data.groups.hold_out`]. Where one is among `data.eval_splits`, `train` is what it leaves.
        processor ([`VisionQwenProcessor`]): Its image processor makes `pixel_values`.
        limit (`int`, *optional*): First so many rows only.

    Returns:
        [`Split`]: Nothing is known yet about pictures that cannot be read; see [`encode_pictures`].

    Raises:
        ValueError: When the split, a column or the task is not there.
        FileNotFoundError: When the data set is not there.
    """
    with PartialState().main_process_first():
        rows = _load_rows(data, name, limit)
        split = make_split(data, name, rows, processor)
    if PartialState().is_main_process:
        texts, pictures = split.texts, split.pictures
        grouped = f" in {len(texts):,} groups" if len(texts) < len(rows) else ""
        print(f"Split {name} ({split.task.name}): {len(rows):,} rows{grouped}, {len(pictures):,} pictures.", flush=True)  # noqa: T201
    return split


def make_split(data: DataArguments, name: str, rows: Dataset, processor) -> Split:
    """A split of rows that are loaded; see [`load_split`]."""
    task = bind_task(data, rows.column_names)
    texts, pictures = bind_rows(rows, task, picture_folder(str(data.dataset_name), data.image_folder))

    def from_pixels(ids: list[int]) -> dict[str, torch.Tensor]:
        # One by one: opened pictures of a whole batch may not fit into memory.
        scaled = [processor.image_processor(pictures.open(index), return_tensors="pt") for index in ids]
        return {"pixel_values": torch.cat([each["pixel_values"] for each in scaled])}

    return Split(name, name, data, texts, task, pictures, from_pixels)


def encode_pictures(
    split: Split,
    model,
    processor,
    *,
    feature_cache: bool = True,
    directory: str | None = None,
    dtype: str = "float16",
) -> Split:
    """Finds the pictures that cannot be read, and encodes the others once.

    Args:
        split ([`Split`]): Of [`load_split`]; changed in place.
        model: `VisionQwen` or a `PeftModel` around it; its frozen encoder fills the feature cache.
        processor ([`VisionQwenProcessor`]): Of the model.
        feature_cache (`bool`, *optional*, defaults to `True`): Otherwise pictures go on being read for every batch.
        directory, dtype: See [`~vlm_peft.data.feature_cache.build_feature_cache`].
    """
    if not feature_cache:
        split.unreadable = find_unreadable(split.pictures)
        return split
    features = build_feature_cache(
        base_model(model), processor.image_processor, split.pictures, directory=directory, dtype=dtype
    )
    split.fetch_images = lambda ids: {"image_features": features.get(ids)}
    split.unreadable = features.unreadable
    return split


def leave_out(split: Split, on_bad_row: str = "stop") -> Split:
    """Finds a held-out split's rows that cannot be scored: unreadable pictures, too many or too few, or no text.

    Captions and chats are scored word by word: of their references at least one needs a letter or a digit.

    Args:
        split ([`Split`]): Its `left_out` is filled.
        on_bad_row (`str`): `"stop"` raises when there are any, `"skip"` scores the others; scores.json then says how
            many.

    Raises:
        ValueError: As above, with the rows and the reasons; when no row is left; or when the blind control has no other
            pictures to swap for a row's own.
    """
    for index, row in enumerate(split.texts):
        reasons = [split.unreadable[image] for image in split.pictures.of_row(index) if image in split.unreadable]
        try:
            example = split.task.example(row)
            check_places(example, len(split.pictures.of_row(index)))
            if find_kind(split.task.name).counts_words:
                check_words(example)
        except ValueError as error:
            reasons.append(str(error))
        if reasons:
            split.left_out[index] = reasons[0]
    count, total = len(split.left_out), len(split.texts)
    named = "".join(
        f"\n  row {row_name(split.texts[index])}: {reason}" for index, reason in list(split.left_out.items())[:10]
    )
    if count == total:
        raise ValueError(f"None of the {total} rows of {split.name} can be scored:{named}")
    if count and on_bad_row == "stop":
        raise ValueError(
            f"{count} of {total} rows of {split.name} cannot be scored; repair them, or leave them out with "
            f"--on_bad_row skip:{named}"
        )
    if count and PartialState().is_main_process:
        print(f"Left out {count} of {total} rows of {split.name}:{named}", flush=True)  # noqa: T201
    if split.is_blind:
        _check_blind(split)
    shown = {image for row in range(total) if row not in split.left_out for image in split.pictures.of_row(row)}
    for metric in find_kind(split.task.name).metrics if PartialState().is_main_process else ():
        if len(shown) < metric.fewest:
            print(  # noqa: T201
                f"{split.name} has {len(shown)} pictures: {metric.name} means little on fewer than {metric.fewest}. "
                "Hold more of them out, or choose checkpoints by --metric_for_best_model loss.",
                flush=True,
            )
    return split


def check_words(example: Example) -> None:
    """Checks that each text to generate has a reference with a word in it.

    Raises:
        ValueError: With the references that have none.
    """
    for references in example.references:
        if not any(map(str.isalnum, "".join(references))):
            raise ValueError(f"Expected a reference with a word in it, got {references!r}.")


def _check_blind(split: Split) -> None:
    kept = [set(split.pictures.of_row(index)) for index in range(len(split.texts)) if index not in split.left_out]
    together = set().union(*kept)
    if any(own and own == together for own in kept):
        raise ValueError(
            f"The blind control of {split.name} needs another picture than a row's own, to swap them: its "
            f"{len(kept)} rows have {len(together)} in all. Hold more rows out, or leave {split.stored_name} out of "
            "--blind_splits."
        )


def row_name(row: dict) -> str:
    """What a text row is called in messages and files: its id, or that of its first member."""
    return str(row["id"][0] if isinstance(row["id"], list) else row["id"])
