"""Generate for the rows of a split, score, and write predictions.jsonl and scores.json; for run.py and recipes/sft.py.

The blind control asks the same questions about the wrong pictures: each row gets the pictures of the row half the split
away. What a model scores there it owes to the language alone.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from coco_caption.caption_scores import score_captions
from datasets import Dataset
from peft import PeftModel
from predictions import Row, score_summary, write_predictions, write_scores

from vlm_peft.data import find_unreadable, load_rows
from vlm_peft.feature_cache import build_feature_cache
from vlm_peft.generation import generate_texts
from vlm_peft.pictures import Pictures
from vlm_peft.tasks import Task, make_task

TASK_FILE = "task.json"
"""Lies beside an adapter: how the model was asked in training, so that evaluation asks the same way."""


@dataclass(frozen=True)
class TaskSettings:
    """What the numbers of a model depend on beside its weights.

    Args:
        task: `"caption"` or `"vqa"`.
        instruction: What the user says beside the picture, for captions.
        max_new_tokens: Tokens of a generated text at most.
        num_beams: 1 is greedy.
    """

    task: str = "caption"
    instruction: str = "Describe the picture."
    max_new_tokens: int = 48
    num_beams: int = 1

    def to_json(self) -> str:
        """The content of `task.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path | str) -> "TaskSettings | None":
        """Reads `task.json` of a model's folder; `None` where there is none.

        Raises:
            ValueError: if the file is not what it should be.
        """
        path = Path(folder) / TASK_FILE
        if not path.is_file():
            return None
        known = {each.name: type(each.default) for each in fields(cls)}
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            values = {name: kind(stored[name]) for name, kind in known.items() if name in stored}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a JSON object with {', '.join(known)} ({error}).") from error
        return cls(**values)


@dataclass
class Split:
    """A split ready to be trained on or generated for.

    Args:
        name: What its folder is called.
        rows: Of `vlm_peft.data.load_rows`.
        task: Row -> prompt and references.
        pictures: Of the same rows.
        fetch_images: Picture numbers -> model inputs, from the feature cache or from pixels.
        unreadable: Picture number -> why it cannot be read.
        left_out: Ids of rows that cannot be used, with the reason; they are not scored. See `leave_out`.
    """

    name: str
    rows: Dataset
    task: Task
    pictures: Pictures
    fetch_images: Callable[[list[int]], dict[str, torch.Tensor]]
    unreadable: dict[int, str]
    left_out: dict[str, str] = field(default_factory=dict)


def load_split(
    model,
    processor,
    dataset: str,
    name: str,
    *,
    revision: str | None = None,
    stored_split: str | None = None,
    split_column: str | None = None,
    limit: int | None = None,
    task: str = "caption",
    image_column: str = "image",
    text_column: str | None = None,
    instruction: str = "Describe the picture.",
    feature_cache: bool = True,
    feature_cache_dir: str | None = None,
    feature_dtype: str = "float16",
) -> Split:
    """Loads a split's rows and makes its pictures ready: encoded once, or read for every batch.

    Args:
        model: `VisionQwen` or a `PeftModel` around it; its encoder fills the feature cache.
        processor: Of the model.
        dataset, name, revision, stored_split, split_column, limit: See `vlm_peft.data.load_rows`.
        task, image_column, text_column, instruction: See `vlm_peft.tasks.make_task`.
        feature_cache: Encodes each picture once and keeps the result on disk.
        feature_cache_dir, feature_dtype: See `vlm_peft.feature_cache.build_feature_cache`.

    Raises:
        ValueError: if the split, a column or the task is not there.
        FileNotFoundError: if the data set is not there.
    """
    state = PartialState()
    with state.main_process_first():
        rows = load_rows(
            dataset, name, revision=revision, stored_split=stored_split, split_column=split_column, limit=limit
        )
    bound = make_task(
        task, rows.column_names, image_column=image_column, text_column=text_column, instruction=instruction
    )
    pictures = Pictures(rows, bound.image_columns)
    if state.is_main_process:
        print(f"Split {name}: {len(rows):,} rows, {len(pictures):,} pictures.", flush=True)
    image_processor = processor.image_processor

    def from_pixels(ids: list[int]) -> dict[str, torch.Tensor]:
        opened = [pictures.open(index) for index in ids]
        return {"pixel_values": image_processor(opened, return_tensors="pt")["pixel_values"]}

    if not feature_cache:
        return Split(name, rows, bound, pictures, from_pixels, find_unreadable(pictures))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    features = build_feature_cache(base, image_processor, pictures, directory=feature_cache_dir, dtype=feature_dtype)

    def from_cache(ids: list[int]) -> dict[str, torch.Tensor]:
        return {"image_features": features.get(ids)}

    return Split(name, rows, bound, pictures, from_cache, features.unreadable)


def leave_out(split: Split, on_bad_row: str = "stop") -> Split:
    """Finds a held-out split's rows that cannot be scored: unreadable pictures, or no text.

    Args:
        split: Its `left_out` is filled.
        on_bad_row: `"stop"` raises when there are any, `"skip"` scores the others; scores.json then says how many.

    Raises:
        ValueError: as above, with the rows and the reasons; or when no row is left.
    """
    for index, row in enumerate(split.rows.remove_columns(split.task.image_columns)):
        reasons = [split.unreadable[image] for image in split.pictures.of_row(index) if image in split.unreadable]
        try:
            split.task.example(row)
        except ValueError as error:
            reasons.append(str(error))
        if reasons:
            split.left_out[str(row["id"])] = reasons[0]
    count, total = len(split.left_out), len(split.rows)
    shown = "".join(f"\n  row {row_id}: {reason}" for row_id, reason in list(split.left_out.items())[:10])
    if count == total:
        raise ValueError(f"None of the {total} rows of {split.name} can be scored:{shown}")
    if count and on_bad_row == "stop":
        raise ValueError(
            f"{count} of {total} rows of {split.name} cannot be scored; repair them, or leave them out with "
            f"--on_bad_row skip:{shown}"
        )
    if count and PartialState().is_main_process:
        print(f"Left out {count} of {total} rows of {split.name}:{shown}", flush=True)
    return split


def evaluate_split(
    model,
    processor,
    split: Split,
    output_dir: Path | str,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    blind: bool = False,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    num_beams: int = 1,
    meteor: bool = False,
    spice: bool = False,
    tokenizer: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Generates on all processes, scores on the main one, writes two files and returns what scores.json holds.

    Args:
        model: `VisionQwen` or a `PeftModel` around it, in evaluation mode.
        processor: Saved with the model.
        split: What to evaluate.
        output_dir: Gets `predictions.jsonl` and `scores.json`.
        model_name, dataset_name: Recorded in scores.json.
        blind: Swaps the pictures, see the module's text.
        batch_size: Prompts at a time on each process.
        max_new_tokens, num_beams: Decoding; recorded.
        meteor, spice, tokenizer: See `score_captions`.
        progress: Shows a progress bar.

    Raises:
        ValueError: for a blind control of a single row, which has no other picture.
    """
    state = PartialState()
    examples, image_ids, ids = [], [], []
    text_rows = split.rows.remove_columns(split.task.image_columns)
    for index, row in enumerate(text_rows):
        if str(row["id"]) in split.left_out:
            continue
        example = split.task.example(row)
        for number, question in enumerate(example.questions):
            examples.append(([*example.prompt, *question], example.references[number]))
            image_ids.append(list(split.pictures.of_row(index)))
            ids.append(str(row["id"]) if len(example.questions) == 1 else f"{row['id']}-{number}")
    if blind:
        image_ids = _swapped(image_ids)
    mine = range(state.process_index, len(examples), state.num_processes)
    texts = generate_texts(
        model,
        processor,
        [examples[index][0] for index in mine],
        [image_ids[index] for index in mine],
        split.fetch_images,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        progress=f"Describing {split.name}{' (blind)' if blind else ''}"
        if progress and state.is_main_process
        else None,
    )
    gathered = dict(gather_object(list(zip(mine, texts, strict=True))))
    summary: dict[str, Any] = {}
    if state.is_main_process:
        rows: list[Row] = [
            {"id": ids[index], "prediction": gathered[index], "references": examples[index][1]}
            for index in range(len(ids))
        ]
        scores = score_captions(
            [row["prediction"] for row in rows],
            [row["references"] for row in rows],
            tokenizer=tokenizer,
            meteor=meteor,
            spice=spice,
        )
        if split.left_out:
            scores.notes.append(
                f"{len(split.left_out)} of {len(split.rows)} rows left out: no readable picture, or no text."
            )
        described = {
            "model": model_name,
            "dataset": dataset_name,
            "split": split.name,
            "decoding": {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "do_sample": False, "blind": blind},
        }
        write_predictions(Path(output_dir) / "predictions.jsonl", rows, scores.per_picture)
        write_scores(Path(output_dir) / "scores.json", scores, **described)
        summary = score_summary(scores, **described)
    state.wait_for_everyone()
    return summary


def _swapped(image_ids: list[list[int]]) -> list[list[int]]:
    """The pictures of the row half the split away; rows of one picture count must meet their like."""
    by_count: dict[int, list[int]] = {}
    for index, images in enumerate(image_ids):
        by_count.setdefault(len(images), []).append(index)
    swapped = list(image_ids)
    for members in by_count.values():
        shift = len(members) // 2
        distinct = [image_ids[members[(place + shift) % len(members)]] for place in range(len(members))]
        if any(other == image_ids[index] for index, other in zip(members, distinct, strict=True)):
            raise ValueError("the blind control needs at least two rows with as many pictures each, to swap them")
        for index, other in zip(members, distinct, strict=True):
            swapped[index] = other
    return swapped
