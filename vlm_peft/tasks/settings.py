"""How a model was asked in training, kept beside its adapter so that whoever uses it asks the same way."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from ..json_files import parse_json
from .example import check_text
from .kinds import DEFAULT_TASK, TaskOptions
from .scoring import is_list_of

TASK_FILE = "task.json"
"""Lies beside an adapter."""


@dataclass
class TaskSettings(TaskOptions):
    """What the texts of a model depend on beside its weights, and the tasks' own options.

    Args:
        task (`str`): See [`~vlm_peft.tasks.make_task`].
        instruction (`str`, *optional*): What the user says beside the picture; the task's own without it.
        max_new_tokens (`int`): Tokens of a generated text at most.
        num_beams (`int`): 1 is greedy.
    """

    task: str = DEFAULT_TASK
    instruction: str | None = None
    max_new_tokens: int = 48
    num_beams: int = 1

    @property
    def choices(self) -> tuple[str, ...]:
        """Texts of which one is the answer, for models that choose; none for those that write."""
        return tuple(self.class_names or ())

    @property
    def temperature(self) -> float:
        """Divides the log-probabilities of the choices."""
        return self.class_temperature

    def to_json(self) -> str:
        """The content of `task.json`."""
        return json.dumps({name: getattr(self, name) for name in _DEFAULTS}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path | str) -> "TaskSettings | None":
        """Reads `task.json` of a model's folder; `None` where there is none.

        Raises:
            ValueError: When the file is not what it should be.
        """
        path = Path(folder) / TASK_FILE
        if not path.is_file():
            return None
        try:
            stored = parse_json(path.read_text(encoding="utf-8"))
            values = {name: stored[name] for name in _DEFAULTS if name in stored}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a JSON object with {', '.join(_DEFAULTS)} ({error}).") from error
        for name, value in values.items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    check_text(text, f"{path}: {name}")
            default = _DEFAULTS[name]
            if name in _LISTS and (value is None or is_list_of(str, value)):
                continue
            if name in _LISTS or not isinstance(value, (str, type(None)) if default is None else type(default)):
                expected = "a list of texts" if name in _LISTS else f"a value like {default!r}"
                raise ValueError(f"{path}: {name} is {value!r}, expected {expected}.")
            if name in ("max_new_tokens", "num_beams") and isinstance(value, int) and value < 1:
                raise ValueError(f"{path}: {name} is {value!r}, expected at least 1.")
        return cls(**values)


# The tasks' own options last, whatever the order of inheritance.
_DEFAULTS = {
    each.name: each.default for each in sorted(fields(TaskSettings), key=lambda each: hasattr(TaskOptions, each.name))
}
_LISTS = {each.name for each in fields(TaskSettings) if "list[str]" in str(each.type)}
