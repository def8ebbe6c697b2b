"""What every task gives: an example for each row, and where the row's pictures are.

Stage: first of the data's way. Pictures are not touched here, only counted, so that they stay
undecoded until they are needed.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from uuid import uuid4

from ..json_files import parse_json


@dataclass(frozen=True)
class Example:
    """What one row trains and tests.

    Args:
        prompt (`list[dict]`): Messages that all completions share, one `{"type": "image"}` part per picture.
        completions (`list[str]` or `list[list[dict]]`): Answers, or the messages that follow (a question, its answer).
        references (`list[list[str]]`): For each text that the model will be asked to generate, the accepted ones.
        questions (`list[list[dict]]`): For each of these, the messages between prompt and answer; empty for captions.
        details (`list[dict]`, *optional*): For each of these, what its score needs beside the references
            (`answer_type`, `evidence_pages`, `boxes`, ...); goes into predictions.jsonl.
    """

    prompt: list[dict]
    completions: list
    references: list[list[str]]
    questions: list[list[dict]] = field(default_factory=lambda: [[]])
    details: list[dict] | None = None


@dataclass(frozen=True)
class Task:
    """A task on a data set's columns.

    Args:
        name (`str`): See [`make_task`].
        image_columns (`list[str]`): Columns with pictures, in the order of the image parts.
        example (`Callable[[dict], Example]`): Row without its pictures -> [`Example`]. Of a group, each column of the
            row is a list with one item a member.
        group_key (`Callable[[dict], str]`, *optional*): Rows are joined only when they have one key, and always come
            as groups. Without it each row is a row of its own unless another has the same pictures.
        pages (`Callable[[dict], list[int]]`, *optional*): Which of the row's pictures are used, counted from 0 over
            all image columns; the row is that of `example`. All of them without it.
        complete (`Callable[[Iterable[dict], list[list[list[int]]]], dict[str, list]]`, *optional*): Columns that
            `example` needs and no row has of itself: rows that are loaded together (a stream's come one by one) and
            [width, height] of each row's pictures, [0, 0] where it cannot be read -> cells by column.
        id_column (`str`, *optional*): Column whose values name the rows in messages and predictions (`question_id`).
        beginning (`Callable[[dict], str]`, *optional*): What rows about the same pictures must also have in common to
            become one row, so that they share its prefix. Nothing without it.
        choices (`tuple[str, ...]`): Texts of which one is the answer; each gets its probability, and none is generated.
        temperature (`float`): Divides the log-probabilities of the choices.
        held_back (`int`): Rows of the training split that are not trained on, but calibrate the choices.
    """

    name: str
    image_columns: list[str]
    example: Callable[[dict], Example]
    group_key: Callable[[dict], str] | None = None
    pages: Callable[[dict], list[int]] | None = None
    complete: Callable[[Iterable[dict], list[list[list[int]]]], dict[str, list]] | None = None
    id_column: str | None = None
    beginning: Callable[[dict], str] | None = None
    choices: tuple[str, ...] = ()
    temperature: float = 1.0
    held_back: int = 0


PICTURE_PLACES = "picture_places"
"""Column that rows get for tasks with `pages`: which cells of the image columns, counted from 0, hold a picture."""


def require_columns(columns: list[str], *needed: str) -> None:
    """Checks that a data set has what a task reads.

    Raises:
        ValueError: Naming the missing columns and those that are there.
    """
    missing = [name for name in needed if name not in columns]
    if missing:
        addresses = [name for name in columns if name.endswith("url")]
        raise ValueError(
            f"The data set has no column {', '.join(map(repr, missing))}; it has {', '.join(sorted(columns))}. Name "
            "the columns with --image_column and --text_column."
            + (f" Pictures are not downloaded from addresses ({', '.join(addresses)})." if addresses else "")
        )


def has_text(value: object) -> bool:
    """Whether a cell is text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def to_text(value: object) -> str | None:
    """A cell as text without blanks around it: tables keep the answer 2 as a number. `None` for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        # A column of whole numbers with an empty cell is read as one of floats.
        return str(int(value)) if value == value // 1 else str(value)
    return value.strip() or None if isinstance(value, str) else None


def check_text(text: str, name: str) -> str:
    """The text, which a tokenizer must be able to encode.

    Args:
        text (`str`): From a command line or a terminal, where bytes that are no UTF-8 become lone surrogates, or from
            a file that escapes one.
        name (`str`): Put before the message.

    Raises:
        ValueError: For such a character; names it and its place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = ord(text[error.start])
        # Python's own stand-ins for bytes that are no UTF-8.
        said = f"byte {found & 0xFF:#04x}" if 0xDC80 <= found <= 0xDCFF else f"half a character, U+{found:04X},"
        raise ValueError(f"{name} is no UTF-8 text: {said} after {error.start} characters.") from error
    return text


def refuse_list(text: str) -> None:
    """Refuses a list that a table holds as one text, which would be learnt with its brackets.

    Raises:
        ValueError: With the text.
    """
    if not (text.lstrip().startswith("[") and text.rstrip().endswith("]")):
        return
    try:
        found = parse_json(text)
    except ValueError:
        return
    if any(isinstance(each, str | dict) for each in found):
        raise ValueError(f"Expected a text, or a column of lists, got a list as one text: {text[:60]}")


def to_number(value: object) -> object:
    """A cell as a number where it is the text of one, as tables of text keep it; anything else stays, to be refused."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return value
    if number is None or not math.isfinite(number):
        return value
    return int(number) if number.is_integer() else number


def row_key(row: dict, columns: list[str]) -> str:
    """What the rows of one group have in common; a row without it is a group of its own.

    Args:
        row (`dict`): Texts of a row.
        columns (`list[str]`): Of which at least one has a value.
    """
    values = [row.get(name) for name in columns]
    return json.dumps(values, default=str) if any(value is not None for value in values) else uuid4().hex


def answered(questions: list[list[dict]], answers: list[str]) -> list[list[dict]]:
    """Completions of an [`Example`]: each question with the assistant's turn after it."""
    return [
        [*question, {"role": "assistant", "content": answer}]
        for question, answer in zip(questions, answers, strict=True)
    ]


def picture_turn(*texts: str | None, pictures: int = 1) -> list[dict]:
    """A user's turn as the one message of a prompt: pictures first, then texts."""
    content: list[dict] = [{"type": "image"}] * pictures
    content += [{"type": "text", "text": text} for text in texts if text]
    return [{"role": "user", "content": content}]
