"""What every task says of itself beside its rows: how it is asked, its metrics, its score and its reward.

A row is a line of predictions.jsonl: `prediction` (text) and `references` (list of one or more texts), and for some
tasks more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from .example import Task

Row = Mapping[str, Any]

_ENDLESS = 4
_SHORT = 64


@dataclass(frozen=True)
class Metric:
    """A number that a task is scored by; higher is better, unless its explanation says so, and 0 is the least.

    Args:
        name (`str`): In scores.json, in tables and pages.
        explanation (`str`): What it is, in one line.
        highest (`float`): The most it can be.
        needs_pictures (`bool`): It compares with pictures, which a file of texts does not have.
        fewest (`int`): Pictures below which it means little.
    """

    name: str
    explanation: str
    highest: float = 1
    needs_pictures: bool = False
    fewest: int = 0


F1 = Metric("f1", "words in common with the nearest accepted answer, missing and extra ones counted")
EXACT_MATCH = Metric("exact_match", "share of rows that equal an accepted answer, case, spaces and signs aside")
ANLS = Metric(
    "anls", "characters in common with the nearest accepted answer, nothing where half of them or more differ"
)


@dataclass
class Scores:
    """What a task's score found in rows."""

    metrics: dict[str, float]
    """Names and values over all rows."""
    per_row: dict[str, list[float]]
    """Metrics that have a value for each row, in input order, and are its mean; their intervals come from these."""
    primary: str
    """The one of `per_row` that stands for the task."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers must know, one sentence each."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Metrics asked for and not computed, each with its reason in one line."""
    tokenizer: str | None = None
    """The tokenizer of the caption metrics."""
    breakdowns: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """A metric's value for each kind of rows, where there are too many of them for `metrics`."""
    per_some: dict[str, list[float]] = field(default_factory=dict)
    """Values of metrics that only some rows have one for; the metrics are their means, their intervals come of them."""

    def add(self, per_row: dict[str, list[float]]) -> None:
        """Adds metrics that each row has, and their means."""
        self.per_row |= per_row
        self.metrics |= {name: sum(values) / len(values) for name, values in per_row.items()}


def mean_scores(rows: Sequence[Row], primary: str, **functions: Callable[[str, Sequence[str]], float]) -> Scores:
    """Scores that are means of functions of a prediction and its references.

    Args:
        rows: What is scored.
        primary: One of the names.
        functions: By the metric's name.
    """
    scores = Scores({}, {}, primary)
    scores.add({n: [f(row["prediction"], row["references"]) for row in rows] for n, f in functions.items()})
    return scores


def ask_with(question: str, instruction: str) -> str:
    """A question and the instruction after it."""
    return f"{question} {instruction}"


@dataclass(frozen=True)
class TaskKind:
    """A task, whatever data set it is bound to. All of it is in the one module of the task.

    Args:
        name (`str`): In options and files.
        bind (`Callable[..., Task]`): Columns, image column, text column, instruction and the task's own `options` by
            their names -> [`Task`].
        metrics (`tuple[Metric, ...]`): In the order of a table.
        primary (`str`): The metric that stands for the task; each row has it.
        score (`Callable[[Sequence[Row], dict], Scores]`): Rows and the options of `score_captions` -> their scores.
        reward (`Callable[[Sequence[Row]], Callable[[str, Row], float]]`): All rows of a training -> what a text earns
            for a row of them; see [`make_reward`].
        options (`type`, *optional*): Dataclass of the task's own options, which
            [`TaskOptions`][vlm_peft.tasks.kinds.TaskOptions] inherits.
        asked (`tuple[str, ...]`): Those of the options that change what is asked, and not only what is learnt.
        question (`str`, *optional*): What is asked without an instruction, where rows have no questions of their own.
        ask (`Callable[[str, str], str]`): Where they have, a question and the training's instruction -> what is said.
        hint (`str`, *optional*): What a person should know who asks such a model something else.
        spans (`Callable[[str], list[tuple[int, int, int]]]`, *optional*): Where a text says the things that get a
            confidence each: where one begins, where what it is ends and where it is begins, where it ends. None without
            it.
        counts_words (`bool`): References without a word cannot be scored.
        truth (`str`): What a row's score needs beside `prediction`.
        from_rows (`tuple[str, ...]`): Options that `settle` and `calibrate` decide.
        order (`Callable[[Dataset, str | None], list[int]]`, *optional*): Rows and text column -> their numbers in the
            order in which they are taken; as they are stored without it.
        settle (`Callable[[Dataset, str | None, Mapping, bool], dict]`, *optional*): Rows, text column, the task's
            options and whether the rows are trained on -> values of those options that the rows decide.
        calibrate (`Callable[[Sequence[Row]], dict]`, *optional*): Rows that were held back from training, with what the
            trained model says -> values of the options that they decide.
    """

    name: str
    bind: Callable[..., Task]
    metrics: tuple[Metric, ...]
    primary: str
    score: Callable[[Sequence[Row], dict[str, Any]], Scores]
    reward: Callable[[Sequence[Row]], Callable[[str, Row], float]]
    options: type | None = None
    asked: tuple[str, ...] = ()
    question: str | None = None
    ask: Callable[[str, str], str] = ask_with
    hint: str | None = None
    spans: Callable[[str], list[tuple[int, int, int]]] | None = None
    counts_words: bool = False
    truth: str = "references"
    from_rows: tuple[str, ...] = ()
    order: Callable[[Any, str | None], list[int]] | None = None
    settle: Callable[[Any, str | None, Mapping[str, Any], bool], dict[str, Any]] | None = None
    calibrate: Callable[[Sequence[Row]], dict[str, Any]] | None = None

    def check(self, rows: Sequence[Row]) -> None:
        """Checks that rows have the references that a score or a reward needs.

        Raises:
            ValueError: If there are no rows, or one has no references; names its id.
        """
        if not rows:
            raise ValueError("expected at least one row to score, got none")
        for index, row in enumerate(rows):
            references = row.get("references")
            if self.truth == "references" and not (is_list_of(str, references) and references):
                raise row_error(index, row, "references", "a list of one or more texts")


def make_reward(kind: TaskKind, rows: Sequence[Row]) -> Callable[[Sequence[str], Sequence[Row]], list[float]]:
    """The reward of a task: texts, and for each the row that it answers -> what each earns.

    Scores disregard signs, articles and blanks, so that a right answer could go on with them for ever. A text that is
    far longer than all that is accepted therefore earns nothing, nor does one that is empty.

    Args:
        kind: Of the task.
        rows: All rows of the training; captions weigh words by how rare they are among them.

    Returns:
        A function whose numbers are in 0..1, or up to the `highest` of CIDEr for captions.

    Raises:
        ValueError: If a row lacks what the task needs.
    """
    kind.check(rows)
    earned = kind.reward(rows)

    def reward(texts: Sequence[str], rows: Sequence[Row]) -> list[float]:
        return [
            0.0 if not text.strip() or _is_endless(text, row) else earned(text, row)
            for text, row in zip(texts, rows, strict=True)
        ]

    return reward


def by_references(function: Callable[[str, Sequence[str]], float]):
    """The `reward` of a task that compares a text with its references and nothing else."""
    return lambda rows: lambda text, row: function(text, row["references"])


def is_list_of(kind: type | UnionType, value: object) -> bool:
    """Whether a value is a list of that kind; true and false are no numbers."""
    return isinstance(value, list) and all(isinstance(each, kind) and not isinstance(each, bool) for each in value)


def row_error(index: int, row: Row, key: str, expected: str, reason: Exception | None = None) -> ValueError:
    """What is said of a row that lacks a key or has it wrong."""
    got = f"got {row[key]!r}" if key in row else f"the keys are {', '.join(map(str, row))}"
    return ValueError(
        f"row {row.get('id', index)!r}: expected {expected} as {key}, {got}{f' ({reason!r})' if reason else ''}"
    )


def _is_endless(text: str, row: Row) -> bool:
    longest = max((len(reference) for reference in row.get("references") or ()), default=0)
    return longest > 0 and len(text) > max(_SHORT, _ENDLESS * longest)
