"""Classes: one picture and the name of its class, one of a list; every name gets its probability."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..metrics.calibration import calibration_error, fit_temperature
from ..metrics.classification import classification_scores
from .example import Example, Task, picture_turn, require_columns, to_text
from .scoring import Metric, Row, Scores, TaskKind, by_references, mean_scores, row_error

LABEL_COLUMNS = ("label", "labels", "class", "category", "fine_label")
"""Names under which data sets keep the class; the first that a data set has is taken."""

INSTRUCTION = "What is in the picture?"


@dataclass
class ClassifyOptions:
    """Options of this task alone."""

    class_names: list[str] | None = field(
        default=None,
        metadata={"help": "Classes to choose from; those of the training split by default."},
    )
    class_temperature: float = field(
        default=1.0,
        metadata={"help": "Divides the classes' log-probabilities; found by calibration_rows."},
    )
    calibration_rows: int = field(
        default=0,
        metadata={"help": "So many training rows are not trained on; they decide the temperature of the classes."},
    )


def classify_task(
    columns: list[str],
    image_column: str,
    text_column: str | None,
    instruction: str | None,
    class_names: list[str] | None,
    class_temperature: float,
    calibration_rows: int,
) -> Task:
    """A folder a class (`train/tiger/*.jpg`), or a picture and a column of labels.

    Args:
        columns (`list[str]`): A `label`, which `datasets` gives to a folder a class, as text or as a `ClassLabel`.
        image_column, text_column (`str`): Where picture and label are.
        instruction (`str`, *optional*): What the user says beside the picture.
        class_names (`list[str]`, *optional*): See [`ClassifyOptions`]; without them every label is taken as it is.
        class_temperature (`float`): Of the probabilities.
        calibration_rows (`int`): Rows of the training split that are not trained on.

    Raises:
        ValueError: When a column is missing, a class has no name or another's, or a number is out of its range.
    """
    if calibration_rows < 0 or not 0 < class_temperature < math.inf:
        raise ValueError(
            f"Expected calibration_rows of at least 0 and a class_temperature above 0, got {calibration_rows} and "
            f"{class_temperature}."
        )
    column = _label_column(columns, text_column)
    require_columns(columns, image_column, column)
    asked = INSTRUCTION if instruction is None else instruction
    names = None if class_names is None else check_class_names(class_names)
    known = set(names or ())

    def example(row: dict) -> Example:
        name = class_name(row[column])
        if known and name not in known:
            shown = ", ".join((names or [])[:10])
            raise ValueError(f"Expected one of the {len(known)} classes ({shown}), got the label {name!r}.")
        return Example(picture_turn(asked), [name], [[name]])

    return Task(
        CLASSIFY.name,
        [image_column],
        example,
        # The same picture under two labels is two rows: its score shows it.
        beginning=lambda row: str(row["id"]),
        choices=tuple(names or ()),
        temperature=class_temperature,
        held_back=calibration_rows,
    )


def _label_column(columns: Sequence[str], text_column: str | None) -> str:
    found = next((name for name in LABEL_COLUMNS if name in columns), None)
    if text_column is None and found is None:
        raise ValueError(
            f"The data set has no column {' or '.join(LABEL_COLUMNS)!r}; it has {', '.join(sorted(columns))}. Name the "
            "columns with --image_column and --text_column; of folders of two or more classes, all pictures lie "
            "straight in their class's folder (train/tiger/1.jpg), none above or below it."
        )
    return str(text_column or found)


def class_name(label: object) -> str:
    """A label as it is said: `polar_bear` is "polar bear".

    Raises:
        ValueError: When it is no text or number, or empty.
    """
    text = to_text(label)
    name = " ".join(text.replace("_", " ").split()) if text is not None else ""
    if not name:
        raise ValueError(f"Expected the name of a class, got {label!r}.")
    return name


def check_class_names(names: Sequence[object]) -> list[str]:
    """Names of classes as they are said, each once.

    Raises:
        ValueError: When one is empty or there twice, or there are not at least two.
    """
    said = [class_name(name) for name in names]
    for number, name in enumerate(said):
        if name in said[:number]:
            raise ValueError(f"The class {name!r} is there twice: {names[said.index(name)]!r} and {names[number]!r}.")
    if len(said) < 2:
        raise ValueError(f"Expected two or more classes to choose from, got {', '.join(said) or 'none'}.")
    return said


def _labels(rows: Any, text_column: str | None) -> list:
    column = _label_column(rows.column_names, text_column)
    require_columns(rows.column_names, column)
    return rows[column][:]


def _order(rows: Any, text_column: str | None) -> list[int]:
    """Class by turns, the classes of each turn shuffled: a folder a class has its rows sorted by class.

    Then the first rows of a limit are of all classes, and the row half the split away, whose picture the blind control
    shows, is of any class.
    """
    by_class: dict[Any, list[int]] = {}
    for index, label in enumerate(_labels(rows, text_column)):
        by_class.setdefault(label, []).append(index)
    draw, order = random.Random(0), []
    for turn in range(max(map(len, by_class.values()), default=0)):
        members = [indices[turn] for indices in by_class.values() if turn < len(indices)]
        draw.shuffle(members)
        order += members
    return order


def _settle(rows: Any, text_column: str | None, options: Mapping[str, Any], is_trained: bool) -> dict[str, Any]:
    """The classes of a split's rows, in the order of the alphabet.

    Raises:
        ValueError: When two labels are one class's name, or a class to be trained has a single picture.
    """
    if options["class_names"] is not None:
        return {}
    labels = [label for label in _labels(rows, text_column) if to_text(label) is not None]
    names = check_class_names(sorted(set(labels), key=str))
    if is_trained:
        single = sorted((name for name, count in Counter(labels).items() if count == 1), key=str)
        if single:
            raise ValueError(
                f"{len(single)} of {len(names)} classes have one picture, for example {single[0]!r}: expected two or "
                "more of each. Add pictures, or leave the class out."
            )
    return {"class_names": names}


def _distribution(rows: Sequence[Row]) -> tuple[list[str], np.ndarray, list[int]] | None:
    """Classes, `(P, C)` probabilities and the numbers of the true classes; None without probabilities.

    Raises:
        ValueError: When some rows have probabilities and others none, or one has them of other classes, or wrong.
    """
    if all(row.get("probabilities") is None for row in rows):
        return None
    first = rows[0].get("probabilities")
    names = list(first) if isinstance(first, Mapping) else []
    for index, row in enumerate(rows):
        found = row.get("probabilities")
        expected = f"a probability for each of {len(names) or 'its'} classes"
        if not isinstance(found, Mapping) or not found or found.keys() != set(names):
            raise row_error(index, row, "probabilities", expected)
        if not all(isinstance(p, int | float) and 0 <= p <= 1 for p in found.values()):
            raise row_error(index, row, "probabilities", f"{expected} from 0 to 1")
        if row["references"][0] not in found:
            raise row_error(index, row, "references", f"one of its {len(names)} classes")
    table = np.array([[row["probabilities"][name] for name in names] for row in rows])
    place = {name: number for number, name in enumerate(names)}
    return names, table, [place[row["references"][0]] for row in rows]


def _score(rows: Sequence[Row], options: dict[str, Any]) -> Scores:
    """Rows that a model answered have `probabilities`, from the name of a class to its own; others are texts only."""
    scores = mean_scores(rows, "acc1", acc1=_is_right)
    classes: dict[str, list[float]] = {}
    for row, value in zip(rows, scores.per_row["acc1"], strict=True):
        classes.setdefault(row["references"][0], []).append(value)
    recalls = {name: sum(values) / len(values) for name, values in sorted(classes.items())}
    scores.metrics["mean_per_class_recall"] = sum(recalls.values()) / len(recalls)
    scores.breakdowns = {"acc1": {"class": recalls}}
    found = _distribution(rows)
    if found is None:
        scores.skipped |= dict.fromkeys(("acc5", "ECE"), "the rows have no probabilities")
        return scores
    names, table, labels = found
    if len(names) > 5:
        scores.add({"acc5": classification_scores(table, labels)[1]["acc5"]})
    else:
        scores.skipped["acc5"] = f"of {len(names)} classes the right one is always among five"
    scores.metrics["ECE"] = calibration_error(table, labels)
    return scores


def _is_right(text: str, references: Sequence[str]) -> float:
    return float(text == references[0])


def _calibrate(rows: Sequence[Row]) -> dict[str, Any]:
    found = _distribution(rows)
    if found is None:
        return {}
    _, table, labels = found
    return {"class_temperature": fit_temperature(np.log(table.clip(1e-300)), labels)}


CLASSIFY = TaskKind(
    "classify",
    classify_task,
    metrics=(
        Metric("acc1", "share of rows whose class comes first"),
        Metric("acc5", "share of rows whose class is among the first five"),
        Metric("mean_per_class_recall", "share of a class's rows that are right, averaged over the classes"),
        Metric("ECE", "gap between the probability of the first class and how often it is right; lower is better"),
    ),
    primary="acc1",
    score=_score,
    reward=by_references(_is_right),
    options=ClassifyOptions,
    asked=("class_names",),
    question=INSTRUCTION,
    hint="This model was trained to name the class of a picture: expect a name, whatever you ask.",
    from_rows=("class_names", "class_temperature"),
    order=_order,
    settle=_settle,
    calibrate=_calibrate,
)
