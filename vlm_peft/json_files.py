"""JSON that others wrote: read in one place, so that what is wrong with it is one kind of error.

Stage: beside everything that reads files or answers.
"""

import json
from pathlib import Path
from typing import Any

_DEEPEST = 50
"""Lists and objects in each other; pickle and Arrow, through which rows go, end in a `RecursionError` at about twice as
many."""


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """The value that a text holds.

    Args:
        text (`str` or `bytes`): Of the whole JSON.
        **hooks: `parse_int`, `parse_float` and `parse_constant` of `json.loads`.

    Raises:
        ValueError: When it is no JSON (`json.JSONDecodeError`), no UTF-8, or too deep.
    """
    too_deep = json.JSONDecodeError("too many lists and objects in each other", "", 0)
    try:
        found = json.loads(text, **hooks)
    except RecursionError as error:
        raise too_deep from error
    level = [found]
    for _ in range(_DEEPEST):
        level = [part for each in level if isinstance(each, dict | list) for part in _parts(each)]
        if not level:
            return found
    raise too_deep


def _parts(value: dict | list) -> Any:
    return value.values() if isinstance(value, dict) else value


def read_json(path: Path | str, kind: type = dict) -> Any:
    """The JSON object, or list, in a file.

    Args:
        path (`Path` or `str`): Of the file.
        kind (`type`, *optional*, defaults to `dict`): Or `list`.

    Raises:
        ValueError: When it holds something else; names the file.
        OSError: When it cannot be read.
    """
    try:
        found = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, expected JSON ({error}): copy it again, or make it anew.") from error
    if not isinstance(found, kind):
        raise ValueError(
            f"{path} is damaged, expected a JSON {'object' if kind is dict else 'list'}, got a "
            f"{type(found).__name__}: copy it again, or make it anew."
        )
    return found
