"""Chat: conversations about pictures, of one or several turns (LLaVA's instructions)."""

import json
import warnings
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from ..metrics.answers import anls, exact_match, token_f1
from .caption import BLEU, METEOR, ROUGE_L, SPICE, score_caption_rows
from .example import Example, Task, answered, require_columns, to_number
from .scoring import ANLS, EXACT_MATCH, F1, Row, Scores, TaskKind, by_references, mean_scores

CHAT_COLUMNS = ("messages", "conversations")
"""Names under which published data sets keep their conversations; the first that a data set has is taken."""

MARK = "<image>"
"""Stands for a picture in a user's plain text."""

_ROLES = {"human": "user", "gpt": "assistant"}


def chat_task(columns: list[str], image_column: str, text_column: str | None, instruction: str | None) -> Task:
    """Conversations, with all, some or none of the rows about pictures.

    Args:
        columns (`list[str]`): `messages` (`role`, `content`: text or parts) or `conversations` (`from`, `value`), and
            `image` (one picture or a list) or `images`, if there are pictures at all.
        image_column (`str`): Where pictures are; `images` when the data set does not have it.
        text_column (`str`, *optional*): Where conversations are.
        instruction (`str`, *optional*): Refused: the data says everything.
    """
    if instruction is not None:
        raise ValueError(f"The task chat has its instructions in the data; leave out the instruction {instruction!r}.")
    column = text_column or next((name for name in CHAT_COLUMNS if name in columns), None)
    require_columns(columns, column or " or ".join(CHAT_COLUMNS))
    if image_column != "image":
        require_columns(columns, image_column)
    image_columns = [name for name in (image_column, "images") if name in columns][:1]

    def example(row: dict) -> Example:
        # Of a group, each conversation is an item.
        conversations = row[column] if isinstance(row.get("id"), list) else [row[column]]
        return _join(conversations) if len(conversations) > 1 else chat_example(conversations[0])

    return Task(CHAT.name, image_columns, example, beginning=lambda row: _beginning(row[column]))


def chat_example(conversation: list[dict]) -> Example:
    """One conversation: all of the assistant's turns are learnt, the last one is asked for in the evaluation.

    Args:
        conversation (`list[dict]`): Turns in either shape. A picture is a part `{"type": "image"}` or `<image>` in the
            user's plain text; other text stays as it is, but for blanks at both ends. What follows the last turn of the
            assistant is left out.

    Raises:
        ValueError: When a turn is of no known shape, or the assistant says nothing, or speaks before the user.
    """
    if not isinstance(conversation, list) or not conversation:
        raise ValueError(f"Expected a conversation of one or more turns, got {conversation!r}.")
    turns = [_turn(turn) for turn in conversation]
    pictures = [part for turn in turns for part in turn["content"] if part["type"] == "image"]
    for place, picture in enumerate(pictures):
        if picture.pop("index", place) != place:
            raise ValueError("Expected picture parts in the order of the pictures, got others before them.")
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    roles = [turn["role"] for turn in turns]
    if "user" not in roles or roles.index("user") > roles.index("assistant"):
        raise ValueError(
            f"Expected a user's turn and an assistant's answer, got turns of {', '.join(roles) or 'none'}."
        )
    if "system" in roles[1:]:
        raise ValueError(f"Expected a system message at the beginning only, got turns of {', '.join(roles)}.")
    answer, question = _text_of(turns.pop()), _text_of([turn for turn in turns if turn["role"] == "user"][-1])
    return Example(turns, [answer], [[answer]], details=[{"question": question}])


def _join(conversations: list[list[dict]]) -> Example:
    """Conversations of one beginning as branches of one row."""
    examples = [chat_example(each) for each in conversations]
    parts = [_divide(each.prompt) for each in examples]
    questions = [rest for _, rest in parts]
    answers = [each.completions[0] for each in examples]
    references = [each.references[0] for each in examples]
    return Example(
        parts[0][0],
        answered(questions, answers),
        references,
        questions,
        [detail for each in examples for detail in each.details or ()],
    )


def _beginning(conversation: list[dict]) -> str:
    """A conversation up to its last picture; one that can share no beginning has one of its own."""
    try:
        lead, _ = _divide(chat_example(conversation).prompt)
    except (ValueError, TypeError, AttributeError):
        # Named with its row when it is read.
        return uuid4().hex
    return uuid4().hex if any(turn["role"] == "assistant" for turn in lead) else json.dumps(lead)


def _divide(turns: list[dict]) -> tuple[list[dict], list[dict]]:
    """Turns up to the last picture, and what follows: first the rest of its own turn, if there is one."""
    places = [
        (index, place)
        for index, turn in enumerate(turns)
        for place, part in enumerate(turn["content"])
        if part["type"] == "image"
    ]
    if not places:
        return [], turns
    index, place = places[-1]
    before, after = turns[index]["content"][: place + 1], turns[index]["content"][place + 1 :]
    rest = [{**turns[index], "content": after}] if after else []
    return [*turns[:index], {**turns[index], "content": before}], [*rest, *turns[index + 1 :]]


def _turn(turn: dict) -> dict:
    """A message with its content as parts."""
    if not isinstance(turn, dict) or not ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys()):
        raise ValueError(f"Expected a turn with role and content, or with from and value, got {turn!r}.")
    role = turn["role"] if "role" in turn else _ROLES.get(turn["from"], turn["from"])
    content = turn["content"] if "role" in turn else turn["value"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"Expected turns of system, user (human) or assistant (gpt), got one of {role!r}.")
    if isinstance(content, str):
        content = _parts_of_text(content) if role == "user" else [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"Expected a turn's text or parts, got {content!r}.")
    parts = [_part(part) for part in content]
    parts = [part for part in parts if part["type"] == "image" or part["text"]]
    if not parts:
        raise ValueError(f"Expected a turn with text, got {turn!r}.")
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise ValueError(f"Expected pictures in the user's turns only, got one in a turn of {role}.")
    return {"role": role, "content": parts}


def _part(part: dict) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return {"type": "image"} if part.get("index") is None else {"type": "image", "index": to_number(part["index"])}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"].strip()}
    raise ValueError(f"Expected parts of type 'image' or 'text', got {part!r}.")


def _parts_of_text(text: str) -> list[dict]:
    """Text with `<image>` as parts, pictures where they stand."""
    parts: list[dict] = []
    for place, piece in enumerate(text.split(MARK)):
        parts += [{"type": "image"}] * (place > 0) + [{"type": "text", "text": piece}]
    return parts


def _text_of(turn: dict) -> str:
    return "\n".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _score(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    """Primary is f1: ROUGE_L and Bleu_4 have no value for each row that an interval could be drawn from."""
    scores = mean_scores(rows, "f1", exact_match=exact_match, f1=token_f1, anls=anls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # About CIDEr, which is not among the scores here.
        scored = score_caption_rows(rows, options | {"idf_references": ()})
    kept = ("ROUGE_L", "Bleu_4", "METEOR", "SPICE")
    scores.metrics |= {name: scored.metrics[name] for name in kept if name in scored.metrics}
    scores.skipped, scores.tokenizer = scored.skipped, scored.tokenizer
    return scores


CHAT = TaskKind(
    "chat",
    chat_task,
    metrics=(F1, EXACT_MATCH, ANLS, ROUGE_L, BLEU[3], METEOR, SPICE),
    primary="f1",
    score=_score,
    reward=by_references(token_f1),
    counts_words=True,
)
