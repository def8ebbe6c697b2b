"""Prompts: what a teacher is asked, from files, and what its answers must be to become rows of a task.

Stage: name or file -> [`Prompt`]; text of an answer -> cells of a row. Answers in JSON are read strictly, also where a
server was handed the schema.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Features, List, Value

from ..json_files import parse_json
from ..tasks.example import has_text

FOLDER = Path(__file__).parent / "prompts"
"""Where the named prompts lie."""

BOXES = ("pixels", "thousandths")
"""What a teacher's boxes are: pixels of the picture as it was sent, or cells of a grid of 1000 x 1000 over it."""

_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL)
_NUMBER = {"type": "number"}


class AnswerError(ValueError):
    """An answer that is not what was asked for; says what is wrong in a few words."""


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list_of(key: str, /, **properties: Any) -> dict[str, Any]:
    return _object(**{key: {"type": "array", "minItems": 1, "items": _object(**properties)}})


_TEXT = {"type": "string"}
_QUESTION = {"question": _TEXT, "answer": _TEXT}


@dataclass(frozen=True)
class Shape:
    """What answers for one task are, and what becomes of them.

    Args:
        schema (`dict`, *optional*): JSON schema of an answer; plain text without it.
        parse (`Callable`): Answer, [width, height] of the picture and of the one that was sent, kind of the boxes ->
            cells of a row.
        texts (`Callable`): Cells -> the texts that filters look at.
        features (`Features`): Of the cells.
    """

    schema: dict[str, Any] | None
    parse: Callable[[str, list[int], str], dict[str, Any]]
    texts: Callable[[dict[str, Any]], list[str]]
    features: Features


def _caption(answer: str, size: list[int], boxes: str) -> dict[str, Any]:
    text = answer.strip()
    for mark, end in ('""', "“”"):
        # The whole answer in quotes, as models that were told to give a sentence alone often put it.
        if len(text) > 2 and text[0] == mark and text[-1] == end and mark not in text[1:-1] and end not in text[1:-1]:
            text = text[1:-1].strip()
    return {"caption": text}


def _questions(answer: str, size: list[int], boxes: str) -> dict[str, Any]:
    return {"questions": _pairs(answer, "questions")}


def _turns(answer: str, size: list[int], boxes: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for place, pair in enumerate(_pairs(answer, "turns")):
        picture = [{"type": "image", "text": None}] if place == 0 else []
        question = [*picture, {"type": "text", "text": pair["question"]}]
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": pair["answer"]}]})
    return {"messages": messages}


def _boxes(answer: str, size: list[int], boxes: str) -> dict[str, Any]:
    """Boxes [x, y, width, height] in pixels of the picture; `size` is its own and that of the one that was sent."""
    if not size:
        raise AnswerError("a picture whose size cannot be read")
    width, height, sent_width, sent_height = size
    across, down = (1000, 1000) if boxes == "thousandths" else (sent_width, sent_height)
    found = []
    for item in _items(answer, "objects", ("name", "box")):
        box = item["box"]
        if not has_text(item["name"]):
            raise AnswerError("an object without a name")
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
            raise AnswerError("a box that is not four numbers")
        x1, y1, x2, y2 = (
            value * side / scale
            for value, side, scale in zip(box, (width, height) * 2, (across, down) * 2, strict=True)
        )
        if not (-1 <= x1 < x2 <= width + 1 and -1 <= y1 < y2 <= height + 1):
            raise AnswerError("a box that is empty or outside the picture")
        x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        found.append({"name": item["name"].strip(), "box": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]})
    return {"objects": found}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _pairs(answer: str, name: str) -> list[dict[str, str]]:
    pairs = _items(answer, name, ("question", "answer"))
    for pair in pairs:
        if not (has_text(pair["question"]) and has_text(pair["answer"])):
            raise AnswerError("a question or an answer without text")
    return [{key: pair[key].strip() for key in ("question", "answer")} for pair in pairs]


def _items(answer: str, name: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The list `name` of the JSON object that an answer is, with or without a fence around it, and nothing else."""
    fenced = _FENCED.fullmatch(answer.strip())
    try:
        found = parse_json(fenced[1] if fenced else answer, parse_constant=_no_number)
    except ValueError as error:
        raise AnswerError("no JSON") from error
    if not isinstance(found, dict) or set(found) != {name} or not isinstance(found[name], list) or not found[name]:
        raise AnswerError(f"no JSON object with the list {name!r} alone")
    for item in found[name]:
        if not isinstance(item, dict) or set(item) != set(keys):
            raise AnswerError(f"an item of {name!r} that has not just {' and '.join(keys)}")
    return found[name]


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _said(cells: dict[str, Any]) -> list[str]:
    return [part["text"] for turn in cells["messages"] for part in turn["content"] if part["type"] == "text"]


_PART = {"type": Value("string"), "text": Value("string")}
SHAPES: dict[str, Shape] = {
    "caption": Shape(None, _caption, lambda cells: [cells["caption"]], Features({"caption": Value("string")})),
    "vqa": Shape(
        _list_of("questions", **_QUESTION),
        _questions,
        lambda cells: [f"{each['question']} {each['answer']}" for each in cells["questions"]],
        Features({"questions": List({"question": Value("string"), "answer": Value("string")})}),
    ),
    "chat": Shape(
        _list_of("turns", **_QUESTION),
        _turns,
        _said,
        Features({"messages": List({"role": Value("string"), "content": List(_PART)})}),
    ),
    "grounding": Shape(
        _list_of("objects", name=_TEXT, box={"type": "array", "items": _NUMBER, "minItems": 4, "maxItems": 4}),
        _boxes,
        lambda cells: [each["name"] for each in cells["objects"]],
        Features({"objects": List({"name": Value("string"), "box": List(Value("float64"))})}),
    ),
}
"""By the task that rows are for."""


@dataclass(frozen=True)
class Prompt:
    """What is asked about a picture.

    Args:
        name (`str`): In records and messages.
        text (`str`): What the teacher is told beside the picture.
        task (`str`): One of `SHAPES`.
        instruction (`str`, *optional*): What a student is asked; the task's own without it.
        max_new_tokens (`int`): Tokens of an answer at most.
        words (`tuple[int, int]`, *optional*): So many words has a good answer at least, and at most.
        boxes (`str`): One of `BOXES`.
    """

    name: str
    text: str
    task: str = "caption"
    instruction: str | None = None
    max_new_tokens: int = 256
    words: tuple[int, int] | None = None
    boxes: str = "pixels"

    @property
    def shape(self) -> Shape:
        """What an answer must be."""
        return SHAPES[self.task]

    @property
    def whole_cells(self) -> int:
        """Sides of the picture that is sent are multiples of this, so that a teacher's own scaling moves no box."""
        return 28 if self.task == "grounding" and self.boxes == "pixels" else 1


def named_prompts() -> list[str]:
    """Names of the prompts that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_prompt(name: str) -> Prompt:
    """A prompt by its name, or from a file of one's own.

    Args:
        name (`str`): One of [`named_prompts`]; a YAML file with the fields of [`Prompt`]; or a text file that holds
            what a captioner is told.

    Raises:
        FileNotFoundError: When it is neither a name nor a file; lists the names.
        ValueError: When the file is not what it should be; names the key.
    """
    path = FOLDER / f"{name}.yaml" if name in named_prompts() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"No prompt {name!r}: expected {', '.join(named_prompts())}, or a file of your own (.yaml, .txt)."
        )
    if path.suffix not in (".yaml", ".yml"):
        text = path.read_text(encoding="utf-8").strip()
        if not text:
            raise ValueError(f"{path}: expected what the teacher is told, got an empty file.")
        return Prompt(path.stem, text)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected keys such as 'text:', got a {type(given).__name__}.")
    kinds = {"text": str, "task": str, "instruction": str, "max_new_tokens": int, "words": list, "boxes": str}
    for key, value in given.items():
        if key not in kinds:
            raise ValueError(f"{path}: unknown key {key!r}, expected {', '.join(kinds)}.")
        if not isinstance(value, kinds[key]):
            raise ValueError(f"{path}: {key}: expected a {kinds[key].__name__}, got {value!r}.")
    if not has_text(given.get("text")):
        raise ValueError(f"{path}: text is missing: what the teacher is told.")
    words = given.pop("words", None)
    is_range = words is None or (len(words) == 2 and all(type(each) is int for each in words) and words[0] <= words[1])
    if not is_range:
        raise ValueError(f"{path}: words: expected the least and the most, got {words!r}.")
    prompt = Prompt(path.stem, **given, words=None if words is None else (words[0], words[1]))
    if prompt.task not in SHAPES or prompt.boxes not in BOXES or prompt.max_new_tokens < 1:
        raise ValueError(
            f"{path}: expected a task of {', '.join(SHAPES)}, boxes of {', '.join(BOXES)} and max_new_tokens of at "
            f"least 1, got {prompt.task!r}, {prompt.boxes!r} and {prompt.max_new_tokens}."
        )
    return prompt
