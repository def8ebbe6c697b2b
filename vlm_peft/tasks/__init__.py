"""Tasks: a row of a data set -> a prompt with image parts, completions, and what they are scored against.

All about a task is in its one module: the columns that it reads, its own options, how it is asked, its metrics, score
and reward. `kinds` lists them.
"""

from .example import Example, Task
from .kinds import DECIDED_BY_ROWS, DEFAULT_TASK, TASKS, TaskOptions, find_kind, make_task, task_options
from .scoring import Metric, Scores, TaskKind, make_reward
from .settings import TASK_FILE, TaskSettings

__all__ = [
    "DECIDED_BY_ROWS",
    "DEFAULT_TASK",
    "TASKS",
    "TASK_FILE",
    "Example",
    "Metric",
    "Scores",
    "Task",
    "TaskKind",
    "TaskOptions",
    "TaskSettings",
    "find_kind",
    "make_reward",
    "make_task",
    "task_options",
]
