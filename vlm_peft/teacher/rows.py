"""Rows: answers that are read, judged, and kept beside what they were made with, accepted or not.

Stage: journals -> rows with reasons -> parquet files that `load_dataset` and the recipes read.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import Features, Image, Value

from ..data.pictures import encoded_bytes
from ..drafts import draft_of, sweep
from . import filters
from .journal import Journal, Record
from .prompts import AnswerError, Prompt
from .questions import Sampling, sent_size
from .source import Seen, Shown

ACCEPTED, REJECTED = "train", "rejected"
"""Splits of the data set."""

_BATCH = 64  # rows that are held with their pictures


@dataclass
class Row:
    """One answer.

    Args:
        picture (`str`): Hash of its picture.
        source (`str`): Row or file that the picture came from.
        prompt ([`Prompt`]): What was asked.
        record (`Record`): What came back.
        cells (`dict`, *optional*): What the answer says; nothing when it could not be read.
        reason (`str`, *optional*): Why it is rejected.
        clip_score (`float`, *optional*): Likeness to the picture.
    """

    picture: str
    source: str
    prompt: Prompt
    record: Record
    cells: dict[str, Any] | None = None
    reason: str | None = None
    clip_score: float | None = None

    @property
    def texts(self) -> list[str]:
        """What filters look at."""
        return self.prompt.shape.texts(self.cells) if self.cells is not None else []


def read_row(
    seen: Seen,
    prompt: Prompt,
    record: Record,
    *,
    image_side: int,
    length: tuple[int | None, int | None],
    english: bool,
) -> Row:
    """Reads an answer, and judges it by itself.

    Args:
        seen ([`~vlm_peft.teacher.source.Seen`]): Its picture.
        prompt ([`Prompt`]): What was asked.
        record (`Record`): What came back.
        image_side (`int`): Of the picture that was sent.
        length, english: See [`~vlm_peft.teacher.filters.judge`]; the prompt's own length where there is none.
    """
    row = Row(seen.hash, seen.row, prompt, record)
    least, most = length
    if prompt.words is not None:
        least, most = (prompt.words[0] if least is None else least), (prompt.words[1] if most is None else most)
    sizes = [*seen.size, *sent_size(seen.size, image_side, prompt.whole_cells)] if seen.size else []
    try:
        row.cells = prompt.shape.parse(record["text"], sizes, prompt.boxes)
        row.reason = filters.judge(row.texts, record["finish"], length=(least, most), english=english)
    except AnswerError as error:
        # What is said instead of JSON may be a refusal, and JSON that was cut off is none.
        row.reason = filters.judge([record["text"]], record["finish"], length=(None, None), english=english)
        row.reason = row.reason or f"not parsed: {error}"
    if seen.held_out is not None:
        row.reason = filters.LEAKED
    return row


def reject_unlike(
    rows: Sequence[Row], threshold: float | None = None, lowest_share: float | None = None
) -> float | None:
    """Rejects answers with a low CLIPScore among those that nothing else rejects.

    Args:
        rows (`Sequence[Row]`): With scores.
        threshold (`float`, *optional*): Least score.
        lowest_share (`float`, *optional*): So many, those with the lowest scores.

    Returns:
        `float`, *optional*: The least score that is accepted.
    """
    scored = [row for row in rows if row.reason is None and row.clip_score is not None]
    if lowest_share is not None and scored:
        scores = sorted(row.clip_score for row in scored if row.clip_score is not None)
        threshold = scores[min(int(lowest_share * len(scores)), len(scores) - 1)]
    for row in scored if threshold is not None else ():
        if row.clip_score is not None and threshold is not None and row.clip_score < threshold:
            row.reason = filters.UNLIKE
    return threshold


def reject_duplicates(rows: Sequence[Row], scope: str, similarity: float) -> None:
    """Rejects answers that are nearly the same as an earlier one that is accepted.

    Args:
        rows (`Sequence[Row]`): In order.
        scope (`str`): One of [`~vlm_peft.teacher.options.SCOPES`].
        similarity (`float`): See [`~vlm_peft.teacher.filters.near_duplicates`].
    """
    groups: dict[str, list[Row]] = {}
    for row in rows if scope != "none" else ():
        if row.reason is None:
            groups.setdefault(row.picture if scope == "picture" else "", []).append(row)
    for group in groups.values():
        texts = ["\n".join(row.texts) for row in group]
        for row, same in zip(group, filters.near_duplicates(texts, similarity), strict=True):
            if same is not None:
                row.reason = filters.DUPLICATE


def features_of(cells: Features) -> Features:
    """Columns of the data set: the picture, what the task reads, and where it comes from."""
    text, number = Value("string"), Value("float64")
    return Features(
        {
            "id": text,
            "image": Image(),
            **cells,
            "source": text,
            "picture": text,
            "prompt": text,
            "prompt_hash": text,
            "sample": Value("int64"),
            "teacher": text,
            "teacher_revision": text,
            "sampling": text,
            "seed": Value("int64"),
            "time": text,
            "finish": text,
            "tokens": Value("int64"),
            "clip_score": number,
            "answer": text,
            "rejected_because": text,
        }
    )


def row_cells(row: Row, picture: bytes, journals: dict[str, Journal], sampling: Sampling) -> dict[str, Any]:
    """A row as it is stored."""
    setting, record = journals[row.prompt.name].setting, row.record
    drawn = setting["temperature"] > 0
    return {
        "id": f"{row.picture[:16]}-{row.prompt.name}-{record['sample']}",
        "image": {"bytes": picture, "path": None},
        **(row.cells or dict.fromkeys(row.prompt.shape.features)),
        "source": row.source,
        "picture": row.picture,
        "prompt": row.prompt.name,
        "prompt_hash": xxhash.xxh3_128_hexdigest(row.prompt.text.encode()),
        "sample": record["sample"],
        "teacher": setting["teacher"],
        "teacher_revision": setting["teacher_revision"],
        "sampling": json.dumps({name: setting[name] for name in ("temperature", "top_p", "max_new_tokens")}),
        "seed": sampling.seed_of(row.picture, record["sample"]) if drawn else None,
        "time": record["time"],
        "finish": record["finish"],
        "tokens": record["tokens"],
        "clip_score": row.clip_score,
        "answer": record["text"],
        "rejected_because": row.reason,
    }


def write_splits(
    folder: Path, pictures: Iterable[Shown], rows: Sequence[Row], journals: dict[str, Journal], sampling: Sampling
) -> dict[str, Path]:
    """Writes the accepted and the rejected rows, each with its picture, in the order of the pictures.

    Args:
        folder (`Path`): Gets `data/train-00000-of-00001.parquet` and `data/rejected-...`; one of an earlier run is
            replaced, or removed when there is no such row any more.
        pictures (`Iterable[Shown]`): All pictures of the rows, once more.
        rows (`Sequence[Row]`): In any order within a picture: it is kept.
        journals (`dict[str, Journal]`): By the name of the prompt.
        sampling ([`Sampling`]): Of the answers.

    Returns:
        `dict[str, Path]`: File of each split that has rows.
    """
    by_picture: dict[str, list[Row]] = {}
    for row in rows:
        by_picture.setdefault(row.picture, []).append(row)
    features = features_of(rows[0].prompt.shape.features)
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    counts = {ACCEPTED: sum(row.reason is None for row in rows)}
    counts[REJECTED] = len(rows) - counts[ACCEPTED]
    files = {name: data / f"{name}-00000-of-00001.parquet" for name in counts}
    sweep(data)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(pq.ParquetWriter(draft_of(path), features.arrow_schema))
            for name, path in files.items()
            if counts[name]
        }
        waiting: dict[str, list[dict]] = {name: [] for name in writers}
        for name, cells in _in_order(pictures, by_picture, journals, sampling):
            waiting[name].append(cells)
            if len(waiting[name]) >= _BATCH:
                writers[name].write_table(pa.Table.from_pylist(waiting[name], features.arrow_schema))
                waiting[name].clear()
        for name, left in waiting.items():
            if left:
                writers[name].write_table(pa.Table.from_pylist(left, features.arrow_schema))
    for name, path in files.items():
        if name in writers:
            draft_of(path).replace(path)
        else:
            path.unlink(missing_ok=True)
    return {name: files[name] for name in writers}


def _in_order(
    pictures: Iterable[Shown], by_picture: dict[str, list[Row]], journals: dict[str, Journal], sampling: Sampling
) -> Iterator[tuple[str, dict[str, Any]]]:
    for shown in pictures:
        own = by_picture.get(shown.hash, [])
        encoded = encoded_bytes(shown.stored) if own else b""
        for row in own:
            yield (ACCEPTED if row.reason is None else REJECTED), row_cells(row, encoded, journals, sampling)
