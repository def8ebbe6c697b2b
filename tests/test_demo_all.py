"""eval/demo_all.py: which figures of the six runs stand in the table, from records alone."""

import json

import pytest

from eval.demo_all import RUNS, against_majority, main, table_lines
from vlm_peft.evaluation.records import write_predictions, write_scores, write_text
from vlm_peft.tasks.scoring import Scores

TRAINED = [("Is there a dog?", "yes"), ("Is there a dog?", "yes"), ("Is there a dog?", "no"), ("Is there a cat?", "no")]
# Type, question, answer, accuracy, blind accuracy.
ASKED = [
    ("presence", "Is there a dog?", "yes", 1, 1),
    ("presence", "Is there a dog?", "no", 0, 0),
    ("presence", "Is there a cat?", "yes", 1, 0),
    ("presence", "Is there a key?", "yes", 0, 1),
    ("count", "How many objects are there?", "2", 1, 0),
]


def save(folder, task: str, primary: str, values: list[float], **metrics: float) -> None:
    scores = Scores({primary: sum(values) / len(values)} | metrics, {primary: values}, primary)
    write_scores(folder / "scores.json", scores, task=task)


def save_questions(folder, place: int) -> None:
    rows = [
        {"id": str(number), "prediction": "?", "references": [each[2]], "question": each[1], "question_type": each[0]}
        for number, each in enumerate(ASKED)
    ]
    write_predictions(folder / "predictions.jsonl", rows, {"vqa_accuracy": [each[place] for each in ASKED]})


@pytest.fixture
def outputs(tmp_path):
    demo, vqa, boxes, digits, chat, slides = (tmp_path / name / "eval" for name in RUNS)
    for split, values in {"test": [4, 5], "test_pairs": [4, 4], "test_style": [3, 4]}.items():
        save(demo / split, "caption", "CIDEr", values)
    save(demo / "test_pairs-blind", "caption", "CIDEr", [0.25, 0.75])
    save_questions(vqa / "test", 3)
    save_questions(vqa / "test-blind", 4)
    save(boxes / "test", "grounding", "f1_50", [0.5, 1, 0], AP50=0.25, no_target_accuracy=0.875)
    save(digits / "test", "digits", "exact_match", [1, 1, 0, 1])
    for folder in (chat, slides):
        save(folder / "test", "chat", "f1", [1, 0.5])
        save(folder / "test-blind", "chat", "f1", [0, 0.25])
    for number, name in enumerate(RUNS):
        write_text(tmp_path / name / "run_summary.json", json.dumps({"seconds": {"train": 100 + number}}))
    return tmp_path


def test_lines_are_those_of_the_runs_records(outputs):
    lines = {line.what: line for line in table_lines(outputs, TRAINED)}
    captions = lines["captions: test_pairs, CIDEr"]
    assert (captions.n, captions.score, captions.blind, captions.target) == (2, 4, 0.5, 4.1)
    assert lines["captions: test, CIDEr"].blind is None
    assert lines["captions: test_style, CIDEr"].interval == [3, 4]
    every, present = lines["questions: all"], lines["questions: presence"]
    assert (every.n, every.score, every.blind) == (5, pytest.approx(3 / 5), pytest.approx(2 / 5))
    assert (present.n, present.score, present.blind, present.target) == (4, 0.5, 0.5, 0.85)
    assert 0 <= every.interval[0] < every.score < every.interval[1] <= 1
    assert (lines["questions: count"].score, lines["questions: count"].interval) == (1, None)
    assert (lines["boxes: AP50 by confidence"].score, lines["boxes: AP50 by confidence"].interval) == (0.25, None)
    assert lines["absent objects answered with nothing"].score == 0.875
    assert (lines["digits: exact match"].n, lines["digits: exact match"].score) == (4, 0.75)
    assert lines["chat: last answer, f1"].target == lines["slides: f1"].target == pytest.approx(0.125 + 0.3)


def test_the_majority_is_that_of_the_exact_words_in_training(outputs):
    (line,) = (line for line in table_lines(outputs, TRAINED) if line.what.startswith("yes/no"))
    # A dog that is not there, and a cat that is; of a key nothing is known.
    assert (line.n, line.score, line.blind) == (2, 0.5, 0)
    tied = [("Is there a dog?", "yes"), ("Is there a dog?", "no")]
    assert against_majority([{"question": "Is there a dog?", "references": ["no"]}], tied) == []


def test_table_is_printed_and_written(outputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eval.demo_all.training_questions", lambda data: TRAINED)
    assert main(["--outputs", str(outputs)]) == 0
    printed = capsys.readouterr().out
    assert printed == (outputs / "demo-all.md").read_text()
    assert "| digits: exact match | 4 | 0.750 | [" in printed
    assert "digits 103 s" in printed
    assert "together 615 s" in printed
    written = json.loads((outputs / "demo-all.json").read_text())
    assert written["seconds"]["demo_slides"] == 105
    assert [line["what"] for line in written["lines"]] == [line.what for line in table_lines(outputs, TRAINED)]


def test_what_a_run_lacks_is_named(outputs, monkeypatch, capsys):
    monkeypatch.setattr("eval.demo_all.training_questions", lambda data: TRAINED)
    save(outputs / "demo_grounding" / "eval" / "test", "grounding", "f1_50", [0.5])
    assert main(["--outputs", str(outputs)]) == 2
    assert "expected the metric AP50, got f1_50" in capsys.readouterr().err
    (outputs / "digits" / "eval" / "test" / "scores.json").unlink()
    save(outputs / "demo_grounding" / "eval" / "test", "grounding", "f1_50", [0.5], AP50=1, no_target_accuracy=1)
    assert main(["--outputs", str(outputs)]) == 2
    assert "scores.json" in capsys.readouterr().err
