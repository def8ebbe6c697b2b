"""Generate for the rows of a split, score, and write predictions.jsonl and scores.json; for recipes and eval/run.py.

The blind control asks the same questions about the wrong pictures: each row gets the pictures of the row half the split
away. What a model scores there it owes to the language alone.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from ..data.splits import Question, Split
from ..metrics.clip_score import clip_scores
from ..tasks import Task, find_kind
from .choices import choice_log_probs
from .confidence import generate_with_confidences
from .generation import generate_texts
from .records import Row, score_summary, write_predictions, write_text
from .task_scores import Scores, score_rows


def evaluate_split(
    model,
    processor,
    split: Split,
    output_dir: Path | str,
    *,
    model_name: str | None = None,
    condition: str = "after",
    batch_size: int = 64,
    max_new_tokens: int = 32,
    num_beams: int = 1,
    meteor: bool = False,
    spice: bool = False,
    tokenizer: str = "auto",
    clip_model: str | None = None,
    progress: bool = True,
    recorded: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Generates on all processes, scores on the main one, writes two files and returns what scores.json holds.

    Args:
        model: `VisionQwen` or a `PeftModel` around it, in evaluation mode.
        processor: Saved with the model.
        split: What to evaluate.
        output_dir: Gets `predictions.jsonl` and `scores.json`.
        model_name: Recorded in scores.json.
        condition: One of `records.CONDITIONS`; recorded. `"blind"` swaps the pictures, see the module's text.
        batch_size: Prompts at a time on each process.
        max_new_tokens, num_beams: Decoding; recorded.
        meteor, spice, tokenizer: See `score_captions`.
        clip_model: Folder or id of a CLIP: also the task's metrics that need pictures, with each row's own picture.
        progress: Shows a progress bar.
        recorded: Beside the decoding, what else the texts depend on.

    Raises:
        ValueError: for a blind control of a single row, which has no other picture, or a row that cannot be scored:
            its predictions are written all the same.
    """
    files = [Path(output_dir) / name for name in ("predictions.jsonl", "scores.json")]
    if PartialState().is_main_process:
        for file in files:
            file.unlink(missing_ok=True)
    questions, blind = list(split.questions()), condition == "blind"
    rows = generate_rows(
        model,
        processor,
        questions,
        split.fetch_images,
        task=split.task,
        blind=blind,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        progress=f"Describing {split.name}{' (blind)' if blind else ''}" if progress else None,
    )
    summary: dict[str, Any] = {}
    if PartialState().is_main_process:
        options = {"tokenizer": tokenizer, "meteor": meteor, "spice": spice}
        # What took hours to generate is kept, whatever becomes of its scores.
        write_predictions(files[0], rows)
        try:
            scores = score_rows(split.task.name, rows, **options)
        except ValueError as error:
            raise ValueError(
                f"{files[0]}{_culprit(split.task.name, rows, options)} cannot be scored: {error}; mend the file and "
                "score it with eval/score.py."
            ) from error
        if clip_model is not None and any(each.needs_pictures for each in find_kind(split.task.name).metrics):
            _add_clip_scores(scores, clip_model, split, questions, rows)
        if split.left_out:
            scores.notes.append(
                f"{len(split.left_out)} of {len(split.texts)} rows left out: no readable picture, or no text."
            )
        described: dict[str, Any] = {
            "model": model_name,
            "dataset": split.data.dataset_name,
            "task": split.task.name,
            "split": split.name,
            "condition": condition,
            "decoding": {
                "num_beams": num_beams,
                "max_new_tokens": max_new_tokens,
                "do_sample": False,
                "blind": blind,
                **(recorded or {}),
            },
        }
        write_predictions(files[0], rows, scores.per_row)
        summary = score_summary(scores, **described)
        write_text(files[1], json.dumps(summary, indent=2) + "\n")
    PartialState().wait_for_everyone()
    return summary


def _culprit(task: str, rows: list[Row], options: dict[str, Any]) -> str:
    """Names the first row that alone cannot be scored, either."""
    alone = options | {"meteor": False, "spice": False}
    for row in rows:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # What they say of one row alone is nobody's score.
                score_rows(task, [row], **alone)
        except ValueError:
            return f": row {row['id']}"
    return ""


class _OwnPictures(Sequence):
    """Each question's first picture, opened when it is taken."""

    def __init__(self, split: Split, questions: list[Question]):
        self._split, self._questions = split, questions

    def __len__(self) -> int:
        return len(self._questions)

    def _own(self, index: int) -> int:
        question = self._questions[index]
        return question.image_ids[question.solved]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._split.pictures.open(self._own(index))


def _add_clip_scores(scores: Scores, clip_model: str, split: Split, questions: list[Question], rows: list[Row]) -> None:
    found = clip_scores(
        clip_model,
        _OwnPictures(split, questions),
        [row["prediction"] for row in rows],
        [row["references"] for row in rows],
    )
    scores.metrics |= found.metrics
    scores.per_row |= found.per_picture
    scores.notes += [*found.notes, f"CLIPScore and RefCLIPScore with {clip_model}."]


def generate_rows(
    model,
    processor,
    questions: list[Question],
    fetch_images,
    *,
    task: Task | None = None,
    blind: bool = False,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    num_beams: int = 1,
    progress: str | None = None,
) -> list[Row]:
    """Answers questions on all processes.

    Args:
        model, processor, batch_size, max_new_tokens, num_beams: See `evaluate_split`.
        task: Of the questions; one with choices has each of them scored, and its rows have `probabilities`. One whose
            texts hold boxes has them scored, and its rows have `confidences`.
        blind: Swaps the pictures, see the module's text; those of solved examples stay.
        questions: Of `Split.questions`.
        fetch_images: Of the split.
        progress: Title of a progress bar on the main process.

    Returns:
        Rows of predictions.jsonl, in the order of the questions; the same on every process.
    """
    state = PartialState()
    image_ids = [question.image_ids for question in questions]
    if blind:
        others = _swapped([question.image_ids[question.solved :] for question in questions])
        image_ids = [[*each.image_ids[: each.solved], *other] for each, other in zip(questions, others, strict=True)]
    mine = range(state.process_index, len(questions), state.num_processes)
    prompts = [questions[index].prompt for index in mine]
    shown = [image_ids[index] for index in mine]
    bar = progress if state.is_main_process else None
    decoding: dict[str, Any] = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "progress": bar,
    }
    spans = None if task is None else find_kind(task.name).spans
    said: list[dict[str, Any]]
    if task is not None and task.choices:
        log_probs = choice_log_probs(
            model, processor, prompts, shown, fetch_images, task.choices, batch_size=batch_size, progress=bar
        )
        said = [
            {"prediction": task.choices[max(range(len(row)), key=row.__getitem__)], "probabilities": row}
            for row in (log_probs.double() / task.temperature).softmax(-1).tolist()
        ]
        for each in said:
            each["probabilities"] = dict(zip(task.choices, each["probabilities"], strict=True))
    elif spans is not None:
        answers = generate_with_confidences(model, processor, prompts, shown, fetch_images, spans, **decoding)
        said = [{"prediction": text, "confidences": confidences} for text, confidences in answers]
    else:
        texts = generate_texts(model, processor, prompts, shown, fetch_images, **decoding)
        said = [{"prediction": text} for text in texts]
    gathered = dict(gather_object(list(zip(mine, said, strict=True))))
    return [
        {"id": question.id, **gathered[index], "references": question.references, **question.details}
        for index, question in enumerate(questions)
    ]


def sample_table(title: str, rows: list[Row], count: int = 4) -> str:
    """A few answers beside what was expected, as aligned text for the log.

    Args:
        title: Put above.
        rows: Of `generate_rows`.
        count: So many rows, spread evenly.
    """
    chosen = [rows[index * len(rows) // count] for index in range(min(count, len(rows)))]
    lines = [("id", "says", "expected")]
    lines += [(str(row["id"]), _short(row["prediction"]), _short(row["references"][0])) for row in chosen]
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    shown = [f"  {line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  {line[2]}".rstrip() for line in lines]
    return "\n".join([f"{title}:", *shown])


def _short(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _swapped(image_ids: list[list[int]]) -> list[list[int]]:
    """The pictures of the row half the split away, among the rows with as many; rows without pictures stay.

    A row that has no other with as many pictures gets as many from the other rows, beginning half the split away.
    """
    by_count: dict[int, list[int]] = {}
    for index, images in enumerate(image_ids):
        by_count.setdefault(len(images), []).append(index)
    everything = list(dict.fromkeys(image for images in image_ids for image in images))
    middle = len(everything) // 2
    swapped = list(image_ids)
    for count, members in by_count.items():
        shift = len(members) // 2
        for place, index in enumerate(members):
            other = image_ids[members[(place + shift) % len(members)]]
            if count and other == image_ids[index]:
                start = middle + everything.index(image_ids[index][0])
                wrong = [everything[(start + step) % len(everything)] for step in range(len(everything))]
                wrong = [image for image in wrong if image not in image_ids[index]]
                if not wrong:
                    raise ValueError("the blind control needs another picture than a row's own, to swap them")
                other = [wrong[step % len(wrong)] for step in range(count)]
            swapped[index] = other
    return swapped
