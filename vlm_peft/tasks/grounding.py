"""Grounding: one picture, things named by the user, their boxes as text.

The user says `detect: dog; red ball`, the answer is `dog [12, 40, 300, 512]; red ball [600, 0, 999, 80]`, or `none`.
Boxes are [x1, y1, x2, y2] on a grid of 1000 x 1000 cells over the picture, whatever its size; both corners belong to
the box. Numbers as text need no tokens of their own (Shikra, arXiv 2306.15195, section 3; Qwen2-VL, arXiv 2409.12191,
section 2.2, has the same grid).
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from ..metrics.boxes import GRID, LabelledBox, box_spans, overlap_f1, parse_boxes, score_boxes
from .example import Example, Task, answered, check_text, picture_turn, require_columns, to_number
from .scoring import Metric, Row, Scores, TaskKind, is_list_of, row_error

NOTHING = "none"
"""The answer when nothing that was asked for is there."""

INSTRUCTION = "detect:"

EXPRESSION_COLUMNS = ("answer", "sentences")
"""Names under which RefCOCO's data sets keep what people said of a box; the first that a data set has is taken."""

ALONE_SHARE = 0.25
"""Share of the questions for an absent object that ask for nothing else, so that "none" is an answer, too."""


def grounding_task(columns: list[str], image_column: str, text_column: str | None, instruction: str | None) -> Task:
    """RefCOCO (a row a box), or a column with all objects of a picture.

    Args:
        columns (`list[str]`): RefCOCO has `bbox` ([x, y, width, height] in pixels), what people said of it in
            `answer` (lmms-lab/RefCOCO) or `sentences` (texts, or dicts with `sent` or `raw`), and `image_id` or
            `file_name`, by which its rows are grouped. jxu124/refcoco, known by its column `raw_anns`, has
            [x1, y1, x2, y2] in `bbox`. Without `bbox`, the column `text_column` (`objects` by default) holds
            `{"name", "box"}` dicts, boxes [x, y, width, height] in pixels.
        image_column, text_column (`str`): Where pictures, and expressions or objects are.
        instruction (`str`, *optional*): Said before the names; "detect:" by default.
    """
    asked = INSTRUCTION if instruction is None else instruction
    if "bbox" in columns:
        column = text_column or next((name for name in EXPRESSION_COLUMNS if name in columns), None)
        require_columns(columns, image_column, column or " or ".join(EXPRESSION_COLUMNS))
        key = next((name for name in ("image_id", "file_name") if name in columns), None)
        read_box = _from_corners if "raw_anns" in columns else list

        def of_boxes(row: dict) -> Example:
            boxes, expressions = row["bbox"], row[column]
            if key is None and not any(isinstance(each, list) for each in boxes or []):
                boxes, expressions = [boxes], [expressions]
            return referring_example(expressions, [read_box(box or []) for box in boxes], _size(row), asked)

        def sizes_only(rows: Iterable[dict], sizes: list[list[list[int]]]) -> dict[str, list]:
            return {"image_sizes": sizes}

        group_key = None if key is None else (lambda row: _picture_name(row[key]))
        return Task(GROUNDING.name, [image_column], of_boxes, group_key, complete=sizes_only)

    column = text_column or "objects"
    require_columns(columns, image_column, column)

    def example(row: dict) -> Example:
        return objects_example(
            _objects(row[column]), _size(row), asked, absent=row["ask_also"], seed=_first_id(row.get("id"))
        )

    def complete(rows: Iterable[dict], sizes: list[list[list[int]]]) -> dict[str, list]:
        names = [(_first_id(row.get("id")), _names(_objects(row[column]))) for row in rows]
        return {"image_sizes": sizes, "ask_also": choose_absent(names)}

    return Task(GROUNDING.name, [image_column], example, complete=complete)


def objects_example(
    objects: list[dict], size: list[int], instruction: str, *, absent: list[str] | None = None, seed: str = ""
) -> Example:
    """One picture, its objects: a question for each name, one for all of them, and one with an absent name.

    Args:
        objects (`list[dict]`): `name` and `box`; several of one name are answered together.
        size (`list[int]`): Width and height of the picture in pixels.
        instruction (`str`): Said before the names.
        absent (`list[str]`, *optional*): Names of a last question, of which one is not there; see [`choose_absent`].
        seed (`str`, *optional*): The names of the question for all are in an order drawn from it, so that their places
            in the question do not tell where things are.

    Raises:
        ValueError: When there is nothing to ask, a name is empty, or a box is none of the picture's; see [`grid_box`].
    """
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise ValueError(f'Expected a list of {{"name", "box"}}, got {objects!r}.')
    boxes: dict[str, list[list[int]]] = {}
    for item in objects:
        boxes.setdefault(_label(item.get("name")), []).append(grid_box(item.get("box"), size))
    every = list(boxes)
    questions = [[name] for name in every]
    if len(every) > 1:
        questions.append(random.Random(seed).sample(every, len(every)))
    if absent:
        questions.append(absent)
    if not questions:
        raise ValueError("Expected objects with names, got none, and no name that the picture does not have.")
    found = [[(name, box) for name in names for box in boxes.get(name, [])] for names in questions]
    return _example(questions, found, instruction)


def referring_example(expressions: list[list], boxes: list[list[float]], size: list[int], instruction: str) -> Example:
    """One picture, boxes that people referred to: a question for each expression.

    Args:
        expressions (`list[list]`): For each box one or more texts, or dicts with `sent` (as cleaned by REFER) or `raw`.
        boxes (`list[list[float]]`): [x, y, width, height] in pixels.
        size (`list[int]`): Width and height of the picture in pixels.
        instruction (`str`): Said before the expression.

    Raises:
        ValueError: When there is no expression, one is empty, or a box is none of the picture's; see [`grid_box`].
    """
    found = []
    for texts, box in zip(expressions, boxes, strict=True):
        texts = [texts] if isinstance(texts, str) else list(texts or [])
        if not texts:
            raise ValueError(f"Expected one or more expressions for the box {box!r}, got {texts!r}.")
        for text in texts:
            label = _label(text.get("sent") or text.get("raw") if isinstance(text, dict) else text)
            found.append([(label, grid_box(box, size))])
    return _example([[label for label, _ in each] for each in found], found, instruction)


def grid_box(box: object, size: list[int]) -> list[int]:
    """A box in pixels on the grid.

    Args:
        box (`list[float]`): [x, y, width, height] in pixels; anything else is refused.
        size (`list[int]`): Width and height of the picture in pixels.

    Returns:
        `list[int]`: [x1, y1, x2, y2], each 0..999: the first and the last cell of the box, at least one cell.

    Raises:
        ValueError: When the box is not four numbers, has no area, or ends more than a pixel outside the picture, as
            rounding may put it.
    """
    box = _numbers(box)
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise ValueError(f"Expected a box as [x, y, width, height] in pixels, got {box!r}.")
    if not (box[2] > 0 and box[3] > 0):
        raise ValueError(f"Expected a box with a width and a height above 0, got {box!r}.")
    corners = []
    for start, length, side in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        if not (start >= -1 and start + length <= side + 1):
            raise ValueError(
                f"Expected a box [x, y, width, height] inside the picture of {size[0]} x {size[1]} pixels, got {box!r}."
            )
        first = min(max(round(GRID * start / side), 0), GRID - 1)
        corners.append((first, max(first, min(round(GRID * (start + length) / side), GRID) - 1)))
    (x1, x2), (y1, y2) = corners
    return [x1, y1, x2, y2]


def pixel_box(box: Sequence[int], size: Sequence[int]) -> list[int]:
    """A box of the grid in whole pixels, at least one each way; undoes [`grid_box`] as far as the grid is fine enough.

    Args:
        box (`Sequence[int]`): [x1, y1, x2, y2], the first and the last cell, each 0..999.
        size (`Sequence[int]`): Width and height of the picture in pixels.

    Returns:
        `list[int]`: [x1, y1, x2, y2]: the first pixel, and the one after the last, counted from the upper left corner.
    """
    starts, ends = [], []
    for first, last, side in zip(box[:2], box[2:], size, strict=True):
        starts.append(min(round(first * side / GRID), side - 1))
        ends.append(max(starts[-1] + 1, round((last + 1) * side / GRID)))
    return starts + ends


def names_questions(text: str, instruction: str | None = None) -> dict[str, str]:
    """A question for each of the names of `dog; red ball`, as a model was asked for it in training.

    Each is asked for alone: more names at once than a picture of the training had are answered worse, and where some of
    them are not there, the others suffer.

    Args:
        text (`str`): Names with semicolons between them; the instruction may stand before them already.
        instruction (`str`, *optional*): Of the training; "detect:" by default.

    Returns:
        `dict[str, str]`: From the name, clean as the model writes it, to the question.

    Raises:
        ValueError: When no name is left, or one is no text.
    """
    said = INSTRUCTION if instruction is None else instruction
    names = check_text(text, "The text of names").strip().removeprefix(said).split(";")
    found = list(dict.fromkeys(filter(None, map(_clean, names))))
    if not found:
        raise ValueError(f'Expected names of what to look for, as "dog; red ball", got {text!r}.')
    return {name: f"{said} {name}".strip() for name in found}


def choose_absent(rows: list[tuple[str, list[str]]]) -> list[list[str]]:
    """For each row a question for something that its picture does not have.

    The absent name is one that is seen together with a present one in another row. Drawn from all names, pairs that
    never occur would give themselves away, and pairs kept for a test would be shown as impossible.

    Args:
        rows (`list[tuple[str, list[str]]]`): Id, from which all is drawn, and names of the objects.

    Returns:
        `list[list[str]]`: A present and an absent name in any order, the absent one alone ([`ALONE_SHARE`]), or nothing
            when all names of the rows are in the picture.
    """
    together: dict[str, set[str]] = defaultdict(set)
    for _, names in rows:
        for name in names:
            together[name].update(names)
    questions: list[list[str]] = []
    for row_id, names in rows:
        # Text seeds give the same numbers in every process and version of Python.
        draw = random.Random(f"absent {row_id}")
        present = draw.choice(names) if names else None
        candidates = sorted((together[present] if present is not None else set(together)) - set(names))
        if not candidates:
            questions.append([])
            continue
        absent = draw.choice(candidates)
        asked = [absent] if present is None or draw.random() < ALONE_SHARE else [present, absent]
        questions.append(draw.sample(asked, len(asked)))
    return questions


def _example(questions: list[list[str]], found: list[list[tuple[str, list[int]]]], instruction: str) -> Example:
    """Names asked for and what is there of them, for each question."""
    asked: list[list[dict]] = []
    answers: list[str] = []
    details: list[dict] = []
    for names, boxes in zip(questions, found, strict=True):
        question = f"{instruction} {'; '.join(names)}".strip()
        asked.append([{"role": "user", "content": question}])
        answers.append("; ".join(f"{label} {box}" for label, box in boxes) or NOTHING)
        true = [{"label": label, "box": box} for label, box in boxes]
        details.append({"question": question, "asked": names, "boxes": true})
    return Example(picture_turn(), answered(asked, answers), [[answer] for answer in answers], asked, details)


def _from_corners(box: list[float]) -> list[float]:
    """[x1, y1, x2, y2] -> [x, y, width, height]; anything else stays, to be refused."""
    box = _numbers(box)
    if not all(isinstance(value, int | float) for value in box):
        return box
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]] if len(box) == 4 else box


def _numbers(box):
    return [to_number(value) for value in box] if isinstance(box, list | tuple) else box


def _label(text: object) -> str:
    """A name without what separates names and boxes."""
    label = _clean(text)
    if not label:
        raise ValueError(f"Expected the name of an object, or an expression for it, got {text!r}.")
    return label


def _objects(cell):
    """The objects of a row, or the different ones of a group's rows."""
    if not (isinstance(cell, list) and any(isinstance(each, list) for each in cell)):
        return cell
    found: list = []
    for each in cell:
        found += [item for item in each or [] if item not in found]
    return found


def _first_id(row_id) -> str:
    return str(row_id[0] if isinstance(row_id, list) else row_id)


def _clean(text: object) -> str:
    """As [`_label`], but empty when there is nothing left."""
    return " ".join(re.sub(r"[\[\];]", " ", text).split()) if isinstance(text, str) else ""


def _names(objects: object) -> list[str]:
    """The different names in a cell of objects, those without one left out: `example` complains of them."""
    items = [item for item in objects if isinstance(item, dict)] if isinstance(objects, list) else []
    return list(dict.fromkeys(filter(None, (_clean(item.get("name")) for item in items))))


def _size(row: dict) -> list[int]:
    """Width and height of the row's one picture."""
    sizes = row["image_sizes"]
    if len(sizes) != 1 or not all(sizes[0]):
        raise ValueError(f"Expected one picture whose width and height can be read, got the sizes {sizes!r}.")
    return sizes[0]


def _picture_name(name: object) -> str:
    """What the rows of one picture share: REFER numbers its referents in `COCO_train2014_000000581857_16.jpg`."""
    return re.sub(r"(COCO_\w+?_\d{12})_\d+(?=\.)", r"\1", str(name))


def _score(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    """Rows have `boxes`, `{"label", "box": [x1, y1, x2, y2]}` each, and may have `confidences` of the predicted ones
    and the names that were `asked`.

    Primary is f1_50: an average precision belongs to the whole set, and has no value for a row.
    """
    truths = [_true_boxes(row, index) for index, row in enumerate(rows)]
    confidences = [_confidences(row, index) for index, row in enumerate(rows)]
    known = [each for each in confidences if each is not None]
    asked = [_asked(row, index) for index, row in enumerate(rows)]
    ranked = known if len(known) == len(rows) else None
    scored = score_boxes([row["prediction"] for row in rows], truths, ranked, asked)
    if known and ranked is None:
        scored.notes.append(
            f"{len(rows) - len(known)} of {len(rows)} rows have no confidences, so AP ranks all boxes by their order."
        )
    some = {"no_target_accuracy": scored.no_target} if scored.no_target else {}
    return Scores(scored.metrics, {"f1_50": scored.f1_50}, "f1_50", scored.notes, scored.skipped, per_some=some)


def _confidences(row: Row, index: int) -> list[float] | None:
    """Of the boxes of a row's text; predictions of others, and old ones, have none."""
    if "confidences" not in row:
        return None
    given, count = row["confidences"], len(parse_boxes(row["prediction"])[0])
    if not is_list_of(int | float, given) or len(given) != count or not all(0 <= each <= 1 for each in given):
        raise row_error(index, row, "confidences", f"a number in 0..1 for each of the text's {count} boxes")
    return list(given)


def _asked(row: Row, index: int) -> list[str]:
    """Names that a row asks for: those it lists, or, in records that do not, those of its question."""
    if "asked" not in row:
        question = str(row.get("question"))
        names = question.removeprefix(INSTRUCTION).split(";") if question.startswith(INSTRUCTION) else []
        return [name for name in names if name.strip()]
    if not is_list_of(str, row["asked"]):
        raise row_error(index, row, "asked", "a list of names")
    return row["asked"]


def _true_boxes(row: Row, index: int = 0) -> list[LabelledBox]:
    if not is_list_of(dict, row.get("boxes")):
        raise row_error(index, row, "boxes", 'a list of {"label", "box"}')
    try:
        return [LabelledBox(each["label"], tuple(each["box"])) for each in row["boxes"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise row_error(index, row, "boxes", 'a list of {"label", "box": [x1, y1, x2, y2]}', error) from error


GROUNDING = TaskKind(
    "grounding",
    grounding_task,
    metrics=(
        Metric(
            "f1_50",
            "share of boxes, predicted and true, that match one of the other kind: same label, overlap of a half",
        ),
        Metric("AP50", "COCO's average precision where an overlap of half is a match, boxes ranked by confidence"),
        Metric("AP", "COCO's average precision, mean over matches from an overlap of 0.5 to 0.95"),
        Metric("precision50", "share of the predicted boxes that match a true one"),
        Metric("recall50", "share of the true boxes that a predicted one matches"),
        Metric("mean_iou", "overlap of true boxes with the best predicted one: area shared by area covered"),
        Metric("no_target_accuracy", "share of the names asked for and not in the picture that get no box (N-acc)"),
    ),
    primary="f1_50",
    score=_score,
    # Overlaps count by their size, so that a box that is nearly right earns more than one that is wrong.
    reward=lambda rows: lambda text, row: overlap_f1(text, _true_boxes(row)),
    ask=lambda question, instruction: f"{instruction} {question}",
    spans=box_spans,
    truth="boxes",
)
