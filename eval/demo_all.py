"""One table of what the demo's six runs reach, from their records: `python eval/demo_all.py`, or `make demo-all`.

Each line has the number of questions, a 95 % bootstrap interval, the blind control (the same model shown other
pictures) and what is to be reached. Nothing is computed again: scores and answers are those that the runs wrote.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vlm_peft.evaluation.records import Row, read_predictions, read_scores, write_text
from vlm_peft.metrics.significance import bootstrap_interval

RUNS = ("demo", "demo_vqa", "demo_grounding", "digits", "demo_chat", "demo_slides")


@dataclass
class Line:
    """A figure of a run, with what it is to be compared with; None where there is none."""

    run: str
    what: str
    n: int
    score: float
    interval: Sequence[float] | None
    blind: float | None
    target: float | None

    @property
    def cells(self) -> list[str]:
        """Of a row of the table."""
        interval = "" if self.interval is None else "[{:.3f}, {:.3f}]".format(*self.interval)
        blind, target = ("" if each is None else f"{each:.3f}" for each in (self.blind, self.target))
        return [self.what, str(self.n), f"{self.score:.3f}", interval, blind, target]


def of_metric(
    folder: Path, what: str, split: str, metric: str, target: float | None = None, above_blind: float | None = None
) -> Line:
    """A metric of one split as the run scored it; `above_blind`: the target is so much more than the blind score."""
    scores, blind = read_scores(folder / "eval" / split / "scores.json"), None
    if metric not in scores["metrics"]:
        raise ValueError(f"{folder / 'eval' / split}: expected the metric {metric}, got {', '.join(scores['metrics'])}")
    if (folder / "eval" / f"{split}-blind").is_dir():
        blind = read_scores(folder / "eval" / f"{split}-blind" / "scores.json")["metrics"].get(metric)
    if above_blind is not None and blind is not None:
        target = blind + above_blind
    interval = scores["intervals"].get(metric)
    return Line(folder.name, what, scores["n"], scores["metrics"][metric], interval, blind, target)


def of_rows(
    folder: Path, what: str, rows: list[Row], blind: dict[str, float], metric: str, target: float | None
) -> Line:
    """The mean of some of the rows."""
    if not rows:
        raise ValueError(f"{folder}: expected questions for {what!r}, got none")
    values = [float(row[metric]) for row in rows]
    low_high = bootstrap_interval(values) if len(values) > 1 else None
    blinds = [blind[str(row["id"])] for row in rows]
    return Line(
        folder.name, what, len(rows), sum(values) / len(rows), low_high, sum(blinds) / len(blinds), target
    )  # fmt: skip


def against_majority(rows: list[Row], trained: Sequence[tuple[str, str]]) -> list[Row]:
    """Questions of yes and no that the training set's most frequent answer to the same words would get wrong.

    Words that the training set does not have, or has as often with yes as with no, have no such answer.
    """
    excess: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in trained:
        excess[question][answer] += 1
    chosen = []
    for row in rows:
        right = row["references"][0]
        if right in ("yes", "no"):
            counted = excess[row["question"]]
            if counted["yes" if right == "no" else "no"] > counted[right]:
                chosen.append(row)
    return chosen


def vqa_lines(folder: Path, trained: Sequence[tuple[str, str]]) -> list[Line]:
    """Accuracy on the questions of `test`, of their types, and of those that the majority's answer gets wrong."""
    metric = "vqa_accuracy"
    rows = read_predictions(folder / "eval" / "test" / "predictions.jsonl")
    blind = {
        str(row["id"]): float(row[metric])
        for row in read_predictions(folder / "eval" / "test-blind" / "predictions.jsonl")
    }
    targets = {"presence": 0.85, "count": 0.90, "relation": 0.80}
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row["question_type"]].append(row)
    lines = [of_rows(folder, "questions: all", rows, blind, metric, 0.85)]
    lines += [
        of_rows(folder, f"questions: {kind}", kinds[kind], blind, metric, targets.get(kind)) for kind in sorted(kinds)
    ]
    wrong = against_majority(rows, trained)
    return [*lines, of_rows(folder, "yes/no where the majority in training is wrong", wrong, blind, metric, 0.8)]


def training_questions(data: Path) -> list[tuple[str, str]]:
    """Question and answer of each question that the run of `vqa` trains on."""
    from datasets import load_dataset

    rows = load_dataset(str(data), split="train", columns=["questions"])
    return [(asked["question"], asked["answer"]) for row in rows for asked in row["questions"]]


def table_lines(outputs: Path, trained: Sequence[tuple[str, str]]) -> list[Line]:
    """All lines.

    Args:
        outputs: The folder that holds a folder for each of `RUNS`.
        trained: Question and answer of the questions that `demo_vqa` trained on.

    Raises:
        ValueError, OSError: when a run has not the records that a line needs.
    """
    captions, vqa, boxes, digits, chat, slides = (outputs / name for name in RUNS)
    targets = {"test": 4.3, "test_pairs": 4.1, "test_style": 3.4}
    return [
        *(of_metric(captions, f"captions: {split}, CIDEr", split, "CIDEr", targets[split]) for split in targets),
        *vqa_lines(vqa, trained),
        of_metric(boxes, "boxes: f1_50", "test", "f1_50", 0.60),
        of_metric(boxes, "boxes: AP50 by confidence", "test", "AP50"),
        of_metric(boxes, "absent objects answered with nothing", "test", "no_target_accuracy", 0.90),
        of_metric(digits, "digits: exact match", "test", "exact_match", 0.95),
        of_metric(chat, "chat: last answer, f1", "test", "f1", above_blind=0.3),
        of_metric(slides, "slides: f1", "test", "f1", above_blind=0.3),
    ]


def markdown(lines: Sequence[Line], seconds: dict[str, float]) -> str:
    """The table, and how long the trainings took."""
    rows = [["", "n", "score", "95 %", "blind", "to reach"], ["---"] * 6, *(line.cells for line in lines)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return f"{table}\n\nTraining: {times}; together {sum(seconds.values()):.0f} s.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the folder that holds the runs' folders")
    parser.add_argument("--data", type=Path, default=Path("recipes/demo/scenes"), help="what demo_vqa trained on")
    args = parser.parse_args(arguments)
    try:
        lines = table_lines(args.outputs, training_questions(args.data))
        seconds = {
            name: json.loads((args.outputs / name / "run_summary.json").read_text())["seconds"]["train"]
            for name in RUNS
        }
        text = markdown(lines, seconds)
        write_text(args.outputs / "demo-all.md", text)
        record = {"lines": [asdict(line) for line in lines], "seconds": seconds}
        write_text(args.outputs / "demo-all.json", json.dumps(record, indent=2) + "\n")
        print(text, end="")
    except (OSError, ValueError) as error:
        print(f"demo_all.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
