"""Tasks: a row of a data set -> a prompt with image parts, completions, and what they are scored against.

Stage: first of the data's way; imports nothing of ours. A task is one function from a row to an [`Example`], in a
module of its own.
"""

from .caption import caption_task
from .chat import chat_task
from .digits import digits_task
from .example import Example, Task
from .grounding import grounding_task
from .settings import TASK_FILE, TaskSettings
from .slides import slides_task
from .vqa import vqa_task

__all__ = ["TASKS", "TASK_FILE", "Example", "Task", "TaskSettings", "make_task"]

TASKS = ("caption", "vqa", "slides", "chat", "digits", "grounding")


def make_task(
    name: str,
    columns: list[str],
    *,
    image_column: str = "image",
    text_column: str | None = None,
    instruction: str | None = None,
    slide_pages: str = "evidence",
    name_pages: bool = False,
) -> Task:
    """Binds a task to a data set's columns.

    Args:
        name (`str`): One of `TASKS`.
        columns (`list[str]`): What the data set has.
        image_column (`str`, *optional*, defaults to `"image"`): Column with the picture.
        text_column (`str`, *optional*): Column with the texts; found by its usual names when not given.
        instruction (`str`, *optional*): What the user says beside the picture; each task has its own default.
        slide_pages (`str`, *optional*, defaults to `"evidence"`): Of the task `slides`: `"evidence"` or `"all"`.
        name_pages (`bool`, *optional*, defaults to `False`): Of the task `slides`: answers name their pages.

    Returns:
        [`Task`].

    Raises:
        ValueError: When the task is unknown, or the data set lacks a column; lists those it has.
    """
    if name == "caption":
        return caption_task(columns, image_column, text_column, instruction)
    if name == "vqa":
        return vqa_task(columns, image_column, text_column, instruction)
    if name == "grounding":
        return grounding_task(columns, image_column, text_column, instruction)
    if name == "slides":
        return slides_task(columns, text_column, instruction, slide_pages, name_pages)
    if name == "chat":
        return chat_task(columns, image_column, text_column, instruction)
    if name == "digits":
        return digits_task(columns, image_column, text_column, instruction)
    raise ValueError(f"Expected one of the tasks {', '.join(TASKS)}, got {name!r}.")
