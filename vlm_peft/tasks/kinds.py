"""All tasks, and how one is bound to a data set. A new one is a module of its own and a line in each list here."""

from dataclasses import dataclass, fields
from typing import Any

from .caption import CAPTION
from .chat import CHAT
from .classify import CLASSIFY, ClassifyOptions
from .digits import DIGITS_TASK
from .example import Task, check_text
from .grounding import GROUNDING
from .scoring import TaskKind
from .slides import SLIDES, SlideOptions
from .vqa import VQA

TASKS: dict[str, TaskKind] = {
    kind.name: kind for kind in (CAPTION, VQA, SLIDES, CHAT, GROUNDING, DIGITS_TASK, CLASSIFY)
}
"""By name."""

DECIDED_BY_ROWS = {name for kind in TASKS.values() for name in kind.from_rows}
"""Options that a run finds in its rows where they are not given; the rows stand for them in its records."""

DEFAULT_TASK = CAPTION.name
"""Where none is named; also that of files from before there were others."""


@dataclass
class TaskOptions(ClassifyOptions, SlideOptions):
    """The own options of all tasks that have some."""


def find_kind(name: str) -> TaskKind:
    """The task of that name.

    Raises:
        ValueError: When there is none; lists those there are.
    """
    if name not in TASKS:
        raise ValueError(f"Expected one of the tasks {', '.join(TASKS)}, got {name!r}.")
    return TASKS[name]


def task_options(source: TaskOptions) -> dict[str, Any]:
    """The own options of all tasks among the options of something else, by name."""
    return {each.name: getattr(source, each.name) for each in fields(TaskOptions)}


def make_task(
    name: str,
    columns: list[str],
    *,
    image_column: str = "image",
    text_column: str | None = None,
    instruction: str | None = None,
    **options: Any,
) -> Task:
    """Binds a task to a data set's columns.

    Args:
        name (`str`): One of `TASKS`.
        columns (`list[str]`): What the data set has.
        image_column (`str`, *optional*, defaults to `"image"`): Column with the picture.
        text_column (`str`, *optional*): Column with the texts; found by its usual names when not given.
        instruction (`str`, *optional*): What the user says beside the picture; each task has its own default.
        options: Of [`TaskOptions`]; those of other tasks are left alone.

    Returns:
        [`Task`].

    Raises:
        ValueError: When the task is unknown, one column should be both picture and text, the data set lacks a column
            (lists those it has), or a text cannot be encoded.
    """
    if text_column == image_column:
        raise ValueError(f"--image_column and --text_column are both {image_column!r}: expected two columns.")
    kind, given = find_kind(name), TaskOptions(**options)
    own = {each.name: getattr(given, each.name) for each in fields(kind.options)} if kind.options else {}
    for option, value in {"The instruction": instruction, **own}.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(text, option)
    return kind.bind(columns, image_column, text_column, instruction, **own)
