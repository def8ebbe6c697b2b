"""Visual questions: one picture, several questions, each with its answers."""

from .example import Example, Task, has_text, picture_turn, require_columns


def vqa_task(columns: list[str], image_column: str, text_column: str | None, instruction: str | None) -> Task:
    """VQAv2 (a row a question, `image_id`), or a column of questions a picture.

    Args:
        columns (`list[str]`): VQAv2 has `question`, `answers` (ten dicts with `answer`), `multiple_choice_answer`,
            `question_type`, `answer_type` and `image_id`, by which its rows are grouped. Without `question`, the column
            `text_column` (`questions` by default) holds `{"question", "answer"}` dicts about the row's picture.
        image_column, text_column (`str`): Where picture and questions are.
        instruction (`str`, *optional*): Said after each question, for example "Answer with a word or short phrase."
    """
    if text_column is None and "question" in columns:
        require_columns(columns, image_column)
        if not {"answers", "multiple_choice_answer", "answer"} & set(columns):
            require_columns(columns, "answers")

        def members(row: dict) -> list[dict]:
            count = len(row["question"])
            return [{name: row[name][place] for name in row} for place in range(count)]

        def grouped(row: dict) -> Example:
            return vqa_example(members(row), instruction)

        def single(row: dict) -> Example:
            return vqa_example([row], instruction)

        if "image_id" in columns:
            return Task("vqa", [image_column], grouped, group_key=lambda row: str(row["image_id"]))
        return Task("vqa", [image_column], single)

    column = text_column or "questions"
    require_columns(columns, image_column, column)
    return Task("vqa", [image_column], lambda row: vqa_example(row[column], instruction))


def vqa_example(questions: list[dict], instruction: str | None = None) -> Example:
    """One picture, several questions; each question is unlabelled text of its own branch.

    Args:
        questions (`list[dict]`): Each has `question`, and one or both of `answers` (texts, or dicts with `answer`) and
            `multiple_choice_answer` or `answer`, the one to be learnt (the most frequent of `answers` without it).
            `answer_type` and `question_type` (or `type`) are passed on to the scores.
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
        answers: list = [
            answer.get("answer") if isinstance(answer, dict) else answer for answer in item.get("answers") or []
        ]
        best = item.get("multiple_choice_answer") or item.get("answer")
        best = max(answers, key=answers.count) if best is None and answers else best
        if not isinstance(best, str) or not best.strip() or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"Expected an answer with text to {item['question']!r}, got {best!r} and {answers!r}.")
        question = item["question"].strip()
        asked.append([{"role": "user", "content": f"{question} {instruction}" if instruction else question}])
        learnt.append(best.strip())
        references.append(answers or [best.strip()])
        kinds = {"question_type": item.get("question_type") or item.get("type"), "answer_type": item.get("answer_type")}
        details.append({"question": question} | {name: kind for name, kind in kinds.items() if kind})
    completions = [
        [*question, {"role": "assistant", "content": answer}] for question, answer in zip(asked, learnt, strict=True)
    ]
    return Example(picture_turn(), completions, references, asked, details)
