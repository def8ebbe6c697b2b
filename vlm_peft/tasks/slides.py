"""Slides: questions about a deck of pages, one picture a page, answered from some of them (SlideVQA)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..metrics.answers import anls, exact_match, page_scores, split_pages, token_f1
from .example import PICTURE_PLACES, Example, Task, answered, has_text, require_columns, row_key, to_number, to_text
from .scoring import (
    ANLS,
    EXACT_MATCH,
    F1,
    Metric,
    Row,
    Scores,
    TaskKind,
    by_references,
    is_list_of,
    mean_scores,
    row_error,
)
from .vqa import members, question_turn

DECK_COLUMNS = ("deck_name", "deck_url")
"""Rows of one value are questions about one deck."""


@dataclass
class SlideOptions:
    """Options of this task alone."""

    slide_pages: str = field(
        default="evidence",
        metadata={"help": "Of a deck: the pages that an answer needs, or all.", "choices": ["evidence", "all"]},
    )
    name_pages: bool = field(default=False, metadata={"help": "Answers about a deck name their pages, too."})


def slides_task(
    columns: list[str],
    image_column: str,
    text_column: str | None,
    instruction: str | None,
    slide_pages: str,
    name_pages: bool,
) -> Task:
    """SlideVQA: a row a question, a column a page.

    Args:
        columns (`list[str]`): `page_1`, `page_2`, ... (pictures, empty cells after a short deck's end), `question`,
            `answer`, `evidence_pages` (numbers from 1 of the pages that the answer needs), `deck_name`, by which rows
            are grouped, and `qa_id`, by which predictions are named. All other columns are left alone.
        image_column (`str`): Left alone: pages have columns of their own.
        text_column (`str`, *optional*): Instead of `question`.
        instruction (`str`, *optional*): Said after each question.
        slide_pages (`str`): `"evidence"` shows the evidence pages only, and rows of a deck with the same ones are
            grouped; `"all"` shows every page that the deck has.
        name_pages (`bool`): The answers to be learnt name their pages, as in "42 (pages 3, 7)".

    Raises:
        ValueError: When a column is missing, or `slide_pages` is something else.
    """
    if slide_pages not in ("evidence", "all"):
        raise ValueError(f"Expected slide_pages 'evidence' or 'all', got {slide_pages!r}.")
    numbers = sorted(int(found[1]) for name in columns if (found := re.fullmatch(r"page_(\d+)", name)))
    asked = text_column or "question"
    needed = ["answer", "evidence_pages"] if slide_pages == "evidence" or name_pages else ["answer"]
    require_columns(columns, *([] if numbers else ["page_1"]), asked, *needed)
    deck = [name for name in DECK_COLUMNS if name in columns]

    def group_key(row: dict) -> str:
        evidence = _evidence(row["evidence_pages"]) if slide_pages == "evidence" else []
        return f"{row_key(row, deck)} {evidence}"

    def pages(row: dict) -> list[int]:
        if slide_pages == "all":
            return row[PICTURE_PLACES]
        evidence = _evidence(row["evidence_pages"][0])
        return [place for place in row[PICTURE_PLACES] if numbers[place] in evidence]

    def example(row: dict) -> Example:
        shown = [numbers[place] for place in pages(row)]
        cells = {name: row[name] for name in (asked, "answer", "evidence_pages") if name in row}
        questions = [member | {"question": member[asked]} for member in members(cells)]
        there = [numbers[place] for place in row[PICTURE_PLACES]]
        return slides_example(questions, shown, there, instruction, name_pages)

    id_column = "qa_id" if "qa_id" in columns else None
    image_columns = [f"page_{number}" for number in numbers]
    return Task(SLIDES.name, image_columns, example, group_key, pages, id_column=id_column)


def slides_example(
    questions: list[dict],
    shown: list[int],
    there: list[int],
    instruction: str | None = None,
    name_pages: bool = False,
) -> Example:
    """Some pages of a deck, several questions; each question is unlabelled text of its own branch.

    Args:
        questions (`list[dict]`): Each has `question`, `answer`, and `evidence_pages` if the data set has it.
        shown (`list[int]`): Numbers of the pages that are shown, in this order; each is named before its picture.
        there (`list[int]`): Numbers of the pages that the deck has.
        instruction, name_pages: See [`slides_task`].

    Raises:
        ValueError: When a question or an answer is empty, or evidence is not among the deck's pages.
    """
    asked: list[list[dict]] = []
    answers: list[str] = []
    learnt: list[str] = []
    details: list[dict] = []
    evidence: list[int] = []
    for item in questions:
        if not has_text(item.get("question")):
            raise ValueError(f"Expected a question about the deck, got {item.get('question')!r}.")
        question, answer = item["question"].strip(), to_text(item.get("answer"))
        if answer is None:
            raise ValueError(f"Expected an answer with text to {question!r}, got {item.get('answer')!r}.")
        details.append({"question": question})
        if "evidence_pages" in item:
            evidence = _evidence(item["evidence_pages"])
            if not evidence or not set(evidence) <= set(there):
                raise ValueError(
                    f"Expected evidence_pages of {question!r} among the deck's pages {', '.join(map(str, there))}, got "
                    f"{item['evidence_pages']!r}."
                )
            details[-1]["evidence_pages"] = evidence
        named = f" ({_named(evidence)})" if name_pages else ""
        asked.append(question_turn(question, instruction))
        answers.append(answer)
        learnt.append(answer + named)
    content: list[dict] = []
    for number in shown:
        content += [{"type": "text", "text": f"Page {number}:"}, {"type": "image"}]
    prompt = [{"role": "user", "content": content}]
    return Example(prompt, answered(asked, learnt), [[answer] for answer in answers], asked, details)


def _evidence(pages) -> list[int]:
    """The page numbers of a cell, sorted; none when it holds something else."""
    pages = [to_number(page) for page in pages] if isinstance(pages, list) else pages
    known = isinstance(pages, list) and all(isinstance(page, int) and not isinstance(page, bool) for page in pages)
    return sorted(set(pages)) if known else []


def _named(pages: list[int]) -> str:
    return f"page{'s' if len(pages) > 1 else ''} {', '.join(map(str, pages))}"


def _score(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    """The answer is scored without the pages that it names, unless a reference names pages, too.

    Where all rows have `evidence_pages` (list of page numbers) and a prediction names pages, these are scored as well.
    """
    for index, row in enumerate(rows):
        if row.get("evidence_pages") is not None and not is_list_of(int, row["evidence_pages"]):
            raise row_error(index, row, "evidence_pages", "a list of page numbers")
    evidence = [row.get("evidence_pages") for row in rows]
    answers = [{**row, "prediction": _answer(row["prediction"], row["references"])} for row in rows]
    scores = mean_scores(answers, "f1", exact_match=exact_match, f1=token_f1, anls=anls)
    named = [split_pages(row["prediction"])[1] for row in rows]
    names = [metric.name for metric in PAGES]
    without = evidence.count(None)
    if without:
        which = "the" if without == len(rows) else f"{without} of {len(rows)}"
        scores.skipped |= dict.fromkeys(names, f"{which} rows have no evidence_pages")
    elif not any(named):
        scores.skipped |= dict.fromkeys(names, "no prediction names a page")
    else:
        values = [page_scores(pages, set(true or ())) for pages, true in zip(named, evidence, strict=True)]
        scores.add(dict(zip(names, map(list, zip(*values, strict=True)), strict=True)))
    return scores


def _answer(text: str, references: Sequence[str]) -> str:
    """A text without the pages that it names, unless these are the answer, as to "On which page ...?"."""
    answer, _ = split_pages(text)
    return text if not answer or any(split_pages(reference)[1] for reference in references) else answer


PAGES = (
    Metric("page_precision", "share of the pages named that hold the evidence"),
    Metric("page_recall", "share of the pages with the evidence that are named"),
    Metric("page_f1", "harmonic mean of these two for each row"),
)

SLIDES = TaskKind(
    "slides",
    slides_task,
    metrics=(F1, EXACT_MATCH, ANLS, *PAGES),
    primary="f1",
    score=_score,
    reward=by_references(lambda text, references: exact_match(_answer(text, references), references)),
    options=SlideOptions,
    asked=("slide_pages",),
)
