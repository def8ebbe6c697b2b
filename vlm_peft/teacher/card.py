"""The card and the page of a synthetic data set: what was accepted, what was rejected and why, and how it was made.

Stage: rows and counts -> README.md, by which the Hub and `datasets` find the splits, and gallery.html.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

from ..data.pictures import UnreadablePictureError, open_picture
from ..evaluation.records import write_text
from ..hub.access import is_hub_id
from ..hub.licences import licence_line, stated_licence
from ..hub.markup import Markdown
from ..report.gallery import thumbnail
from ..report.pages import render
from .rows import ACCEPTED, Row

_TASKS = {"caption": "image-to-text", "vqa": "visual-question-answering", "chat": "image-text-to-text"}
_CARD_ROWS, _PAGE_ROWS = 8, 36
_CARD_LETTERS = 300
_BATCH = 64  # rows that are held with their pictures


@dataclass(frozen=True)
class Made:
    """What card and page say.

    Args:
        title (`str`): Of both.
        dataset, dataset_revision (`str`, *optional*): Where the pictures come from.
        teacher, teacher_revision (`str`, *optional*): Who wrote.
        teacher_licence (`str`, *optional*): See [`~vlm_peft.hub.licences.stated_licence`].
        pictures (`int`): That were asked about.
        rows (`Sequence[Row]`): All answers.
        reasons (`dict[str, int]`): Why answers were rejected -> how many.
        prompts (`dict[str, str]`): Name -> what the teacher was told.
        settings (`dict[str, Any]`): Sampling, filters, date.
        threshold (`str`): What is to be said of the least CLIPScore; nothing without one.
    """

    title: str
    dataset: str
    dataset_revision: str | None
    teacher: str
    teacher_revision: str | None
    teacher_licence: str | None
    pictures: int
    rows: Sequence[Row]
    reasons: dict[str, int]
    prompts: dict[str, str]
    settings: dict[str, Any]
    threshold: str = ""

    @property
    def accepted(self) -> int:
        """How many rows were."""
        return sum(row.reason is None for row in self.rows)


def choose_shown(rows: Sequence[Row], n: int) -> tuple[list[Row], list[Row]]:
    """Accepted rows spread over all, and rejected ones of each reason by turns; `n` of each at most."""
    accepted = [row for row in rows if row.reason is None]
    step = max(len(accepted) / n, 1)
    spread = [accepted[int(place * step)] for place in range(min(n, len(accepted)))]
    by_reason: dict[str, list[Row]] = {}
    for row in rows:
        if row.reason is not None:
            by_reason.setdefault(row.reason, []).append(row)
    turns = [row for place in range(n) for group in by_reason.values() for row in group[place : place + 1]]
    return spread, sorted(turns[:n], key=lambda row: list(by_reason).index(str(row.reason)))


def write_card(folder: Path, made: Made, splits: dict[str, Path]) -> Path:
    """Writes README.md, whose metadata names the files of the splits.

    Args:
        folder (`Path`): Of the data set.
        made ([`Made`]): What is told.
        splits (`dict[str, Path]`): Split -> its file.
    """
    pictures_licence = stated_licence(made.dataset, revision=made.dataset_revision, repo_type="dataset")
    task = _TASKS.get(made.rows[0].prompt.task)
    metadata = DatasetCardData(
        pretty_name=made.title,
        task_categories=[task] if task else None,
        tags=["synthetic", "vlm_peft"],
        source_datasets=[made.dataset] if is_hub_id(made.dataset) and not Path(made.dataset).exists() else None,
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}-*"} for name in splits],
            }
        ],
    )
    accepted, rejected = choose_shown(made.rows, _CARD_ROWS)
    card = render(
        "synthetic.md.jinja",
        metadata=Markdown(metadata.to_yaml()),
        title=made.title,
        teacher=made.teacher,
        revision=made.teacher_revision,
        dataset=made.dataset,
        folder=Markdown(json.dumps(str(folder), ensure_ascii=False)),
        accepted=made.accepted,
        answers=len(made.rows),
        pictures=made.pictures,
        reasons=made.reasons,
        threshold=made.threshold,
        shown={"accepted": list(map(_line, accepted)), "rejected": list(map(_line, rejected))},
        prompts=made.prompts,
        settings=made.settings,
        licences=[
            licence_line("teacher", made.teacher, made.teacher_licence),
            licence_line("pictures", made.dataset, pictures_licence),
        ],
    )
    write_text(folder / "README.md", card)
    return folder / "README.md"


def _line(row: Row) -> dict[str, str]:
    said = " / ".join(row.texts) or row.record["text"]
    text = said if len(said) <= _CARD_LETTERS else f"{said[:_CARD_LETTERS]}..."
    return {"text": text, "source": row.source, "reason": row.reason or ""}


def write_gallery(folder: Path, made: Made, splits: dict[str, Path]) -> Path:
    """Writes gallery.html: accepted and rejected rows with their pictures; the page needs nothing beside it.

    Args:
        folder (`Path`): Of the data set.
        made ([`Made`]): What is told.
        splits (`dict[str, Path]`): Split -> its file, which has the pictures.
    """
    accepted, rejected = choose_shown(made.rows, _PAGE_ROWS)
    wanted = {row.picture for row in (*accepted, *rejected)}
    thumbnails = {}
    for path in splits.values():
        for batch in pq.ParquetFile(path).iter_batches(_BATCH, columns=["picture", "image"]):
            for name, stored in zip(batch["picture"].to_pylist(), batch["image"], strict=True):
                if name in wanted and name not in thumbnails:
                    try:
                        thumbnails[name] = thumbnail(open_picture(stored.as_py()))
                    except UnreadablePictureError:
                        continue

    def cards(rows: list[Row]) -> list[dict[str, Any]]:
        return [
            {
                "thumbnail": thumbnails[row.picture],
                "texts": row.texts or [row.record["text"]],
                "reason": row.reason,
                "source": row.source,
                "prompt": row.prompt.name,
                "clip_score": row.clip_score,
            }
            for row in rows
            if row.picture in thumbnails
        ]

    page = render(
        "synthetic.html.jinja",
        title=made.title,
        teacher=made.teacher,
        accepted=made.accepted,
        answers=len(made.rows),
        pictures=made.pictures,
        reasons=made.reasons,
        shown={"accepted": cards(accepted), "rejected": cards(rejected)},
        settings={"pictures": made.dataset, **made.settings, "CLIPScore": made.threshold},
        prompts=made.prompts,
    )
    write_text(folder / "gallery.html", page)
    return folder / "gallery.html"


def train_command(folder: Path, task: str, instruction: str | None) -> str:
    """How the recipe is told of the data set."""
    words = ["accelerate launch -q recipes/sft.py --config recipes/configs/captions.yaml --dataset_name", str(folder)]
    words += [] if task == "caption" else ["--task", task]
    words += ["--train_split", ACCEPTED]
    if task != "caption" or instruction:
        # The configuration's own instruction is for captions.
        words += ["--instruction", json.dumps(instruction, ensure_ascii=False) if instruction else "null"]
    return " ".join(words)
