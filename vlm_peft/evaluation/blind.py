"""What can be scored without looking: whether answers depend on the picture, after a training and before it.

Stage: files of an evaluation and of its blind control -> sentences for the report, the card and the end of a run; and
rows of questions -> what their wording alone scores, for the doctor. Questions whose wording gives the answer away are
learnt by their wording (Goyal et al., Making the V in VQA Matter, arXiv 1612.00837).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.splits import Split
from ..metrics.significance import bootstrap_interval
from .records import Row, read_all_scores, read_predictions
from .task_scores import Scores, score_rows

LEAST_ROWS = 30
"""Of a kind of questions; of fewer, hardly any difference could be told."""

MOST_KINDS = 5
"""Kinds of questions that are named, those with the most rows."""

MOST_QUESTIONS = 20_000
"""Of a split, that are counted."""

_SEEN = 5
"""Training questions that begin alike, at least; otherwise fewer words are compared."""
_BEGINNINGS = (3, 2, 1, 0)
"""Words, beside the whole question."""


def blind_lines(output_dir: Path | str) -> list[str]:
    """Return a sentence for each split, or kind of its questions, whose score is not told from its blind control's.

    Two are not told apart when the 95 % bootstrap interval of their difference, row by row, reaches 0. Kinds are those
    of the metric's breakdowns, and are named where the whole split is told.

    Args:
        output_dir: The run's folder, with `eval/<split>` and `eval/<split>-blind`.

    Raises:
        ValueError, OSError: If a file is not what it should be, or cannot be read.
    """
    found = []
    for split, conditions in read_all_scores(output_dir).items():
        folders = [Path(output_dir, "eval", name) for name in (split, f"{split}-blind")]
        files = [folder / "predictions.jsonl" for folder in folders]
        if not {"after", "blind"} <= conditions.keys() or not all(file.is_file() for file in files):
            continue
        metric = str(conditions["after"].get("primary") or "CIDEr")
        pairs = _pairs(read_predictions(files[0]), read_predictions(files[1]), metric.lower())
        if not pairs:
            continue
        if said := _not_told(f"On {split}, {metric}", [values for _, values in pairs]):
            found.append(said)
            continue
        kinds: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for key in conditions["after"]["breakdowns"].get(metric) or {}:
            for row, values in pairs:
                if row.get(key) is not None:
                    kinds.setdefault((key, str(row[key])), []).append(values)
        most = sorted(kinds.items(), key=lambda each: -len(each[1]))
        lines = [
            _not_told(f"On {split}, {metric} of {key} {kind}", values)
            for (key, kind), values in most
            if len(values) >= LEAST_ROWS
        ]
        lines = [line for line in lines if line]
        found += lines[:MOST_KINDS]
        if len(lines) > MOST_KINDS:
            found.append(f"So it is on {split} with {len(lines) - MOST_KINDS} more kinds of questions.")
    return found


def _pairs(after: Sequence[Row], blind: Sequence[Row], key: str) -> list[tuple[Row, tuple[float, float]]]:
    """Rows with their score and that of the same question about another picture; none if the files differ in rows."""
    others = {str(row["id"]): row.get(key) for row in blind}
    scores = [(row, row.get(key), others.get(str(row["id"]))) for row in after]
    if len(others) != len(after):
        return []
    known = [(row, (float(own), float(other))) for row, own, other in scores if own is not None and other is not None]
    return known if len(known) == len(after) else []


def _not_told(what: str, values: Sequence[tuple[float, float]]) -> str:
    differences = [own - other for own, other in values]
    low, high = bootstrap_interval(differences)
    if low > 0:
        return ""
    count = len(values)
    own, other = (sum(each) / count for each in zip(*values, strict=True))
    return (
        f"{what} is {own:.3f}, with the wrong pictures {other:.3f} (difference {own - other:+.3f}, 95 % [{low:+.3f}, "
        f"{high:+.3f}], n = {count:,}): nothing shows that the answers depend on the picture."
    )


def asked_rows(split: Split) -> list[Row]:
    """Return rows of a split's questions, with what their score needs beside a prediction, [`MOST_QUESTIONS`] at most.

    Rows that are no examples are left out, and so is what asks every picture the same.
    """

    def rows() -> Iterator[Row]:
        for row in split.texts:
            try:
                example = split.task.example(row)
            except ValueError:
                continue
            for references, details in zip(example.references, example.details or [], strict=False):
                if details.get("question"):
                    yield {"references": references, **details}

    return list(islice(rows(), MOST_QUESTIONS))


def prior_scores(task: str, train: Sequence[Row], held_out: Sequence[Row]) -> Scores:
    """Score the language prior: the commonest training answer to questions with the same words, or the same first ones.

    Args:
        task: Of both.
        train, held_out: Of [`asked_rows`]; at least one each.
    """
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for row in train:
        answer: str = Counter(row["references"]).most_common(1)[0][0]
        for beginning in _beginnings(row):
            counts.setdefault(beginning, Counter())[answer] += 1
    said = []
    for row in held_out:
        known = [counts[each] for each in _beginnings(row) if each in counts]
        answers = next((each for each in known if each.total() >= _SEEN), known[-1])
        said.append({**row, "prediction": answers.most_common(1)[0][0]})
    return score_rows(task, said, meteor=False, spice=False)


def _beginnings(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The words of a row's question and its first ones, the most words first."""
    words = tuple(str(row["question"]).lower().split())
    return list(dict.fromkeys([words, *(words[:count] for count in _BEGINNINGS)]))
