"""Tasks: a row of a data set -> a prompt with image parts, and completions.

Stage: first of the data's way; imports nothing of ours. A task is one function from a row to an [`Example`]; pictures
are not touched here, only counted, so that they stay undecoded until they are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

CAPTION_COLUMNS = ("captions", "caption", "sentences", "text")
"""Names under which published data sets keep their captions; the first that a data set has is taken."""


@dataclass(frozen=True)
class Example:
    """What one row trains and tests.

    Args:
        prompt (`list[dict]`): Messages that all completions share, one `{"type": "image"}` part per picture.
        completions (`list[str]` or `list[list[dict]]`): Answers, or the messages that follow (a question, its answer).
        references (`list[list[str]]`): For each text that the model will be asked to generate, the accepted ones.
        questions (`list[list[dict]]`): For each of these, the messages between prompt and answer; empty for captions.
    """

    prompt: list[dict]
    completions: list
    references: list[list[str]]
    questions: list[list[dict]] = field(default_factory=lambda: [[]])


@dataclass(frozen=True)
class Task:
    """A task on a data set's columns.

    Args:
        name (`str`): `"caption"` or `"vqa"`.
        image_columns (`list[str]`): Columns with pictures, in the order of the image parts.
        example (`Callable[[dict], Example]`): Row without its pictures -> [`Example`].
    """

    name: str
    image_columns: list[str]
    example: Callable[[dict], Example]


def make_task(
    name: str,
    columns: list[str],
    *,
    image_column: str = "image",
    text_column: str | None = None,
    instruction: str = "Describe the picture.",
) -> Task:
    """Binds a task to a data set's columns.

    Args:
        name (`str`): `"caption"` (one or several texts a picture) or `"vqa"` (a column `questions` with
            `{"question", "answer"}` dicts, all about the row's picture).
        columns (`list[str]`): What the data set has.
        image_column (`str`, *optional*, defaults to `"image"`): Column with the picture.
        text_column (`str`, *optional*): Column with the texts; found by its usual names when not given.
        instruction (`str`, *optional*): What the user says beside the picture, for captions.

    Returns:
        [`Task`].

    Raises:
        ValueError: When the task is unknown, or the data set lacks a column; lists those it has.
    """
    if name == "caption":
        text_column = text_column or next((column for column in CAPTION_COLUMNS if column in columns), None)
        _require(columns, image_column, text_column or " or ".join(CAPTION_COLUMNS))

        def example(row: dict) -> Example:
            return caption_example(row[text_column], instruction)

    elif name == "vqa":
        text_column = text_column or "questions"
        _require(columns, image_column, text_column)

        def example(row: dict) -> Example:
            return vqa_example(row[text_column])

    else:
        raise ValueError(f"Expected the task 'caption' or 'vqa', got {name!r}.")
    return Task(name, [image_column], example)


def _require(columns: list[str], *needed: str) -> None:
    missing = [name for name in needed if not any(name == column for column in columns)]
    if missing:
        raise ValueError(
            f"The data set has no column {', '.join(map(repr, missing))}; it has {', '.join(sorted(columns))}. Name "
            "the columns with --image_column and --text_column."
        )


def caption_example(captions: str | list, instruction: str) -> Example:
    """One picture, its captions.

    Args:
        captions (`str`, `list[str]` or `list[dict]`): Texts; COCO's `sentences` are dicts with `raw`.
        instruction (`str`): What the user says beside the picture.

    Raises:
        ValueError: When there is no caption, or one is empty.
    """
    texts = [captions] if isinstance(captions, str) else list(captions or [])
    texts = [text.get("raw") if isinstance(text, dict) else text for text in texts]
    if not texts or not all(map(_has_text, texts)):
        raise ValueError(f"Expected one or more captions with text, got {captions!r}.")
    texts = [text.strip() for text in texts]
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]}]
    return Example(prompt, texts, [texts])


def vqa_example(questions: list[dict]) -> Example:
    """One picture, several questions; each question is unlabelled text of its own branch.

    Args:
        questions (`list[dict]`): `{"question", "answer"}` each.

    Raises:
        ValueError: When there is no question, or a question or an answer is empty.
    """
    if not questions or not all(
        isinstance(item, dict) and _has_text(item.get("question")) and _has_text(item.get("answer"))
        for item in questions
    ):
        raise ValueError(f"Expected one or more questions with answers, got {questions!r}.")
    asked = [[{"role": "user", "content": item["question"].strip()}] for item in questions]
    answers = [item["answer"].strip() for item in questions]
    completions = [
        [*question, {"role": "assistant", "content": answer}] for question, answer in zip(asked, answers, strict=True)
    ]
    return Example(
        [{"role": "user", "content": [{"type": "image"}]}], completions, [[answer] for answer in answers], asked
    )


def _has_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
