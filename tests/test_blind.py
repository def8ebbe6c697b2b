"""What can be scored without looking: the blind control's sentences, and the language prior of questions."""

import json
from types import SimpleNamespace

import pytest

from vlm_peft.evaluation.blind import LEAST_ROWS, MOST_KINDS, asked_rows, blind_lines, prior_scores
from vlm_peft.evaluation.records import write_predictions, write_scores
from vlm_peft.evaluation.task_scores import score_rows
from vlm_peft.report.model_card import write_model_card
from vlm_peft.report.report import build_report
from vlm_peft.tasks import make_task

N = 200
SUMMARY = {"title": "run", "date": "", "command": "", "vision_model": "clip", "text_model": "qwen", "dataset": "d"} | {
    "device": "cpu", "seed": 0, "parameters": 10, "trainable_parameters": 1, "seconds": {}, "versions": {}
}  # fmt: skip


def save(folder, name: str, answers: dict[str, list[bool]]):
    """Predictions and scores of questions by type, right or wrong."""
    rows = [
        {"id": f"{kind}-{index}", "prediction": "2" if is_right else "3", "references": ["2"], "question_type": kind}
        for kind, said in answers.items()
        for index, is_right in enumerate(said)
    ]
    scores = score_rows("vqa", rows)
    write_predictions(folder / "eval" / name / "predictions.jsonl", rows, scores.per_row)
    write_scores(folder / "eval" / name / "scores.json", scores, task="vqa")


def every(share: int, n: int = N) -> list[bool]:
    """So many of ten right."""
    return [index % 10 < share for index in range(n)]


def shifted(share: int, n: int = N) -> list[bool]:
    return [index % 10 >= 10 - share for index in range(n)]


def test_a_split_that_is_not_told_from_its_control_is_named_with_its_figures(tmp_path):
    save(tmp_path, "test", {"presence": every(5)})
    save(tmp_path, "test-blind", {"presence": shifted(5)})
    save(tmp_path, "other", {"presence": every(5)})
    (line,) = blind_lines(tmp_path)
    assert line.startswith(
        "On test, vqa_accuracy is 0.500, with the wrong pictures 0.500 (difference +0.000, 95 % [-0.1"
    )
    assert line.endswith("n = 200): nothing shows that the answers depend on the picture.")
    # One right answer in 200 is no difference that can be told; paired, 20 of them are.
    save(tmp_path, "test-blind", {"presence": [*every(5)[:-6], *[False] * 6]})
    assert "difference +0.005" in blind_lines(tmp_path)[0]
    save(tmp_path, "test-blind", {"presence": every(4)})
    assert blind_lines(tmp_path) == []


def test_kinds_of_questions_are_named_where_the_split_is_told(tmp_path):
    few = {"colour": every(9), "rare": every(5, LEAST_ROWS - 1), "<b>": every(5), "count": every(8)}
    save(tmp_path, "test", few)
    save(tmp_path, "test-blind", few | {"colour": every(1), "<b>": every(6)})
    lines = blind_lines(tmp_path)
    assert [line.partition(" is ")[0] for line in lines] == [
        "On test, vqa_accuracy of question_type <b>",
        "On test, vqa_accuracy of question_type count",
    ]
    (tmp_path / "run_summary.json").write_text(json.dumps(SUMMARY))
    page, card = build_report(tmp_path).read_text(), write_model_card(tmp_path).read_text()
    assert page.count("nothing shows that the answers depend on the picture.") == 2
    assert "question_type &lt;b&gt; is 0.500, with the wrong pictures 0.600" in page
    assert card.count("nothing shows that the answers depend on the picture.") == 2
    assert "question_type \\<b\\> is 0.500" in card
    many = {f"kind {index}": every(5) for index in range(MOST_KINDS + 2)}
    save(tmp_path, "test", few | many)
    save(tmp_path, "test-blind", few | many | {"colour": every(1)})
    lines = blind_lines(tmp_path)
    assert len(lines) == MOST_KINDS + 1
    assert lines[-1] == "So it is on test with 4 more kinds of questions."


def test_a_control_of_other_rows_says_nothing(tmp_path):
    save(tmp_path, "test", {"presence": every(5)})
    save(tmp_path, "test-blind", {"presence": every(5)[:-1]})
    assert blind_lines(tmp_path) == []
    (tmp_path / "eval" / "test-blind" / "predictions.jsonl").unlink()
    assert blind_lines(tmp_path) == []


def test_the_prior_is_the_commonest_training_answer_to_the_same_words():
    def rows(*pairs):
        return [{"question": question, "references": [answer] * 10} for question, answer in pairs]

    train = rows(
        *[("Is there a dog?", "no")] * 6,
        *[("Is there a cat?", "yes")] * 3,
        *[("Is it red?", "yes")] * 5,
        *[("How many?", "2")] * 20,
    )
    held_out = rows(
        ("Is there a dog?", "no"),  # the whole question
        ("is there a cat?", "no"),  # seen three times only: its first three words
        ("Is it blue?", "yes"),  # two words
        ("Are they?", "2"),  # nothing in common: the commonest of all
    )
    assert prior_scores("vqa", train, held_out).per_row["vqa_accuracy"] == [1, 1, 1, 1]
    # Few questions in all: the nearest that there are.
    assert prior_scores("vqa", train[6:7], held_out).per_row["vqa_accuracy"] == [0, 0, 1, 0]


def test_rows_with_questions_are_read_and_the_others_left_out():
    cells = [
        {"questions": [{"question": "Is it?", "answer": "no"}, {"question": "How many?", "answer": "2"}]},
        {"questions": []},
    ]
    split = SimpleNamespace(texts=cells, task=make_task("vqa", ["image", "questions"]))
    assert [(row["question"], row["references"]) for row in asked_rows(split)] == [
        ("Is it?", ["no"]),
        ("How many?", ["2"]),
    ]
    captions = SimpleNamespace(texts=[{"caption": ["a dog"]}], task=make_task("caption", ["image", "caption"]))
    assert asked_rows(captions) == []


@pytest.mark.parametrize("is_blind", [True, False])
def test_the_doctor_says_what_the_wording_scores(capsys, is_blind):
    from vlm_peft.commands.doctor import Doctor

    cells = [{"questions": [{"question": "Is it?", "answer": "no", "type": "yes/no"}] * 9}]
    task = make_task("vqa", ["image", "questions"])
    split = SimpleNamespace(name="test", stored_name="test", texts=cells, task=task, is_blind=is_blind)
    doctor = Doctor.__new__(Doctor)
    doctor.problems, doctor.train, doctor.held_out = [], [split], [split]
    doctor.tell_priors()
    said = capsys.readouterr().out
    assert "questions that begin alike scores vqa_accuracy 1.000 on test (9 questions)." in said
    warning = "(vqa_accuracy 1.000, vqa_accuracy[question_type=yes/no] 1.000). Score the blind control, too: --blind_"
    assert (warning in said) == (not is_blind)
