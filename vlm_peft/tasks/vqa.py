"""Visual questions: one picture, several questions, each with its answers."""

from collections.abc import Sequence
from typing import Any

from ..metrics.vqa import PEOPLE, accuracy_by_type, vqa_accuracy
from .example import Example, Task, answered, has_text, picture_turn, refuse_list, require_columns, row_key, to_text
from .scoring import Metric, Row, Scores, TaskKind, by_references, mean_scores

ANSWER_COLUMNS = ("answers", "multiple_choice_answer", "answer")
"""Names under which published data sets keep what was answered; at least one is needed."""

PICTURE_ID_COLUMNS = ("image_id", "id_image")
"""Rows of one value are questions about one picture."""


def vqa_task(columns: list[str], image_column: str, text_column: str | None, instruction: str | None) -> Task:
    """VQAv2 (a row a question), or a column of questions a picture.

    Args:
        columns (`list[str]`): VQAv2 has `question`, `answers` (ten texts, or dicts with `answer`),
            `multiple_choice_answer`, `question_type`, `answer_type`, `question_id`, by which predictions are named, and
            `image_id`, by which its rows are grouped. Without `question`, the column `text_column` (`questions` by
            default) holds `{"question", "answer"}` dicts about the row's picture.
        image_column, text_column (`str`): Where picture and questions are.
        instruction (`str`, *optional*): Said after each question, for example "Answer with a word or short phrase."
    """
    if text_column in (None, "question") and "question" in columns:
        require_columns(columns, image_column)
        if not set(ANSWER_COLUMNS) & set(columns):
            require_columns(columns, " or ".join(ANSWER_COLUMNS))
        picture_ids = [name for name in PICTURE_ID_COLUMNS if name in columns][:1]
        id_column = "question_id" if "question_id" in columns else None

        def example(row: dict) -> Example:
            return vqa_example(members(row) if isinstance(row["question"], list) else [row], instruction)

        key = (lambda row: row_key(row, picture_ids)) if picture_ids else None
        return Task(VQA.name, [image_column], example, key, id_column=id_column)

    column = text_column or "questions"
    require_columns(columns, image_column, column)
    return Task(VQA.name, [image_column], lambda row: vqa_example(_questions(row[column]), instruction))


def _questions(cell):
    """The questions of a row, or of all rows of a group."""
    if isinstance(cell, list) and any(isinstance(each, list) for each in cell):
        return [question for each in cell for question in each or []]
    return cell


def members(row: dict) -> list[dict]:
    """The rows of a group, from one row whose cells are lists."""
    return [dict(zip(row, cells, strict=True)) for cells in zip(*row.values(), strict=True)]


def vqa_example(questions: list[dict], instruction: str | None = None) -> Example:
    """One picture, several questions; each question is unlabelled text of its own branch.

    Args:
        questions (`list[dict]`): Each has `question`, and one or both of `answers` (texts, or dicts with `answer`) and
            `multiple_choice_answer` or `answer`, the one to be learnt (the most frequent of `answers` without it).
            Numbers count as text. `answer_type` and `question_type` (or `type`) are passed on to the scores.
        instruction (`str`, *optional*): Said after each question.

    Raises:
        ValueError: When there is no question, or a question or an answer is empty.
    """
    if not isinstance(questions, list) or not questions:
        raise ValueError(f"Expected one or more questions with answers, got {questions!r}.")
    asked: list[list[dict]] = []
    learnt: list[str] = []
    references: list[list[str]] = []
    details: list[dict] = []
    for item in questions:
        if not isinstance(item, dict) or not has_text(item.get("question")):
            raise ValueError(f"Expected one or more questions with answers, got {item!r}.")
        question = item["question"].strip()
        best, accepted = _answers(item)
        asked.append(question_turn(question, instruction))
        learnt.append(best)
        references.append(accepted)
        kinds = {"question_type": item.get("question_type") or item.get("type"), "answer_type": item.get("answer_type")}
        details.append({"question": question} | {name: kind for name, kind in kinds.items() if kind})
    return Example(picture_turn(), answered(asked, learnt), references, asked, details)


def question_turn(question: str, instruction: str | None) -> list[dict]:
    """A question as the one message between a picture and its answer."""
    return [{"role": "user", "content": f"{question} {instruction}" if instruction else question}]


def _answers(item: dict) -> tuple[str, list[str]]:
    """The answer to be learnt, and those that are accepted."""
    given = item.get("answers")
    named = [item[name] for name in ("multiple_choice_answer", "answer") if item.get(name) is not None]
    chosen = named[0] if named else None
    if isinstance(chosen, list):
        given, chosen = given or chosen, None
    given = [] if given is None else _flat(given)
    best = to_text(chosen if chosen is not None else max(given, key=given.count, default=None))
    # People may have left an answer blank; it stays among the ten.
    accepted = ["" if answer == "" else to_text(answer) for answer in given]
    if best is None or None in accepted:
        raise ValueError(f"Expected an answer with text to {item['question']!r}, got {chosen!r} and {given!r}.")
    for answer in (best, *accepted):
        refuse_list(answer or "")
    return best, [answer for answer in accepted if answer is not None] or [best]


def _flat(cell) -> list:
    if isinstance(cell, dict):
        return _flat(cell.get("answer"))
    return [answer for each in cell for answer in _flat(each)] if isinstance(cell, list) else [cell]


def _score(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    """Where rows have `answer_type` or `question_type`, also `vqa_accuracy[answer_type=number]` and the like."""
    scores = mean_scores(rows, "vqa_accuracy", vqa_accuracy=vqa_accuracy)
    for key, kinds in accuracy_by_type(rows, scores.per_row["vqa_accuracy"]).items():
        scores.metrics |= {f"vqa_accuracy[{key}={kind}]": value for kind, value in kinds.items()}
    fewer = sum(len(row["references"]) < PEOPLE for row in rows)
    if fewer:
        scores.notes.append(
            f"{fewer} of {len(rows)} questions have fewer than {PEOPLE} answers, which count as if {PEOPLE} people had "
            "given them in equal parts; a single answer, or several equal ones, must be met letter by letter."
        )
    return scores


VQA = TaskKind(
    "vqa",
    vqa_task,
    metrics=(Metric("vqa_accuracy", "1 where three or more of ten people gave the answer, less where fewer did"),),
    primary="vqa_accuracy",
    score=_score,
    reward=by_references(vqa_accuracy),
    hint="This model was trained to answer questions: ask one, and expect a few words, not a description.",
)
