"""Every task's rows through the one door: names of metrics, primary, extras, and errors."""

import warnings

import pytest

from vlm_peft.evaluation.task_scores import score_rows
from vlm_peft.metrics.captions import score_captions


def row(prediction: str, *references: str, **extra) -> dict:
    return {"id": f"{prediction}-{len(references)}", "prediction": prediction, "references": list(references), **extra}


CAPTIONS = [row("a dog runs", "a dog runs", "the dog is running"), row("two cats", "a bird", "one bird flies")]
DOG = {"label": "Dog", "box": [0, 0, 99, 99]}
ROWS = {
    "caption": CAPTIONS,
    "vqa": [row("yes", *["yes"] * 10, answer_type="yes/no", question_type="is"), row("two", "2", "2", *["7"] * 8)],
    "slides": [row("42 (pages 3)", "42", evidence_pages=[3, 7]), row("red car", "the car", evidence_pages=[1])],
    "chat": CAPTIONS,
    "grounding": [
        {"id": "g1", "prediction": "dog [0, 0, 99, 99]", "boxes": [DOG]},
        {"id": "g2", "prediction": "none", "boxes": [DOG]},
    ],
    "digits": [row("1 2", "12"), row("13", "12")],
}
PRIMARY = {
    "caption": "CIDEr",
    "vqa": "vqa_accuracy",
    "slides": "f1",
    "chat": "f1",
    "grounding": "f1_50",
    "digits": "exact_match",
}


@pytest.mark.parametrize("task", ROWS)
def test_per_row_values_have_the_metric_as_their_mean_and_the_primary_is_among_them(task):
    options = {"tokenizer": "treebank-python"} if task in ("caption", "chat") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_rows(task, ROWS[task], **options)
    assert scores.primary == PRIMARY[task]
    assert scores.primary in scores.per_row
    for name, values in scores.per_row.items():
        assert len(values) == 2
        assert scores.metrics[name] == pytest.approx(sum(values) / 2)
    assert all(0 <= value <= 1 for name, value in scores.metrics.items() if name != "CIDEr")
    assert scores.tokenizer == options.get("tokenizer")


def test_caption_is_coco_caption_with_its_options():
    further = [["a bird on a wire"], ["cats sleep"]]
    options = {"tokenizer": "treebank-python", "idf_references": further}
    direct = score_captions([row["prediction"] for row in CAPTIONS], [row["references"] for row in CAPTIONS], **options)
    scores = score_rows("caption", CAPTIONS, **options)
    assert scores.metrics == direct.metrics
    assert scores.per_row == {"CIDEr": direct.per_picture}
    assert scores.metrics["CIDEr"] != score_rows("caption", CAPTIONS, tokenizer="treebank-python").metrics["CIDEr"]


def test_vqa_by_type_and_the_note_about_fewer_answers():
    scores = score_rows("vqa", [*ROWS["vqa"], row("Yes", "yes", answer_type="yes/no")])
    assert scores.metrics == pytest.approx(
        {
            "vqa_accuracy": 1.6 / 3,
            "vqa_accuracy[answer_type=yes/no]": 0.5,
            "vqa_accuracy[question_type=is]": 1.0,
        }
    )
    assert scores.per_row["vqa_accuracy"] == pytest.approx([1.0, 0.6, 0.0])
    assert "1 of 3 questions have fewer than 10 answers" in scores.notes[0]
    assert score_rows("vqa", ROWS["vqa"]).notes == []


def test_slides_score_the_answer_without_its_pages_and_the_pages():
    scores = score_rows("slides", ROWS["slides"])
    assert scores.per_row["exact_match"] == [1, 0]
    assert scores.per_row["f1"] == pytest.approx([1, 2 / 3])
    assert scores.per_row["page_precision"] == [1, 0]
    assert scores.per_row["page_recall"] == [0.5, 0]
    assert scores.per_row["page_f1"] == pytest.approx([2 / 3, 0])
    assert scores.metrics["page_f1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row("42", "42", evidence_pages=[3])], "no prediction names a page"),
        ([row("42 (page 3)", "42")], "the rows have no evidence_pages"),
    ],
)
def test_slides_without_pages_say_why(rows, reason):
    scores = score_rows("slides", rows)
    assert scores.metrics == {"exact_match": 1, "f1": 1, "anls": 1}
    assert scores.skipped == dict.fromkeys(["page_precision", "page_recall", "page_f1"], reason)


@pytest.mark.parametrize(
    ("prediction", "reference"), [("Page 3", "page 3"), ("the table on page 3", "table on page 3")]
)
def test_slides_where_the_page_is_in_the_answer(prediction, reference):
    scores = score_rows("slides", [row(prediction, "x", reference, evidence_pages=[3])])
    assert scores.metrics["exact_match"] == 1
    assert scores.metrics["page_f1"] == 1


def test_slides_where_nothing_but_a_page_is_said_keep_it():
    scores = score_rows("slides", [row("page 3", "3", evidence_pages=[3])])
    assert scores.metrics["f1"] == pytest.approx(2 / 3)


def test_slides_with_evidence_for_some_rows_only_score_no_pages():
    scores = score_rows("slides", [row("a (page 1)", "a", evidence_pages=[1]), row("b", "b")])
    assert scores.metrics["exact_match"] == 1
    assert scores.skipped["page_f1"] == "1 of 2 rows have no evidence_pages"


def test_chat_has_text_metrics_of_the_whole_set():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_rows("chat", CAPTIONS[:1], tokenizer="treebank-python")
    assert set(scores.metrics) == {"exact_match", "f1", "anls", "ROUGE_L", "Bleu_4"}
    assert scores.metrics["exact_match"] == scores.metrics["ROUGE_L"] == 1
    # CIDEr's note and warning are not about these metrics.
    assert scores.notes == []


def test_grounding_scores_boxes():
    scores = score_rows("grounding", ROWS["grounding"])
    assert scores.per_row == {"f1_50": [1.0, 0.0]}
    assert set(scores.metrics) == {"AP50", "AP", "precision50", "recall50", "mean_iou", "f1_50"}
    assert (scores.metrics["recall50"], scores.metrics["precision50"]) == (0.5, 1.0)


def test_digits():
    assert score_rows("digits", ROWS["digits"]).per_row == {"exact_match": [1, 0], "digit_accuracy": [1, 0.5]}


def test_empty_predictions_score_zero_everywhere():
    for task in ("vqa", "slides", "digits"):
        scores = score_rows(task, [{**each, "prediction": ""} for each in ROWS[task]])
        assert set(scores.metrics.values()) == {0.0}, task


def test_an_unknown_task_lists_the_tasks():
    with pytest.raises(ValueError, match="caption, vqa, slides, chat, grounding, digits, classify, got 'ocr'"):
        score_rows("ocr", CAPTIONS)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("vqa", [], "expected at least one row"),
        ("vqa", [{"id": "q7", "references": ["a"]}], "row 'q7': expected text as prediction, the keys are id, ref"),
        (
            "caption",
            [{"id": 7, "prediction": None, "references": ["a"]}],
            "row 7: expected text as prediction, got None",
        ),
        ("slides", [{"id": "s", "prediction": "a"}], "row 's': expected a list of one or more texts as references"),
        ("digits", [row("1")], "row '1-0': expected a list of one or more texts as references, got \\[\\]"),
        ("chat", [{"prediction": "1", "references": "a"}], "row 0: expected a list of .* as references, got 'a'"),
        ("digits", [row("1", "one")], "row '1-1': expected texts with a digit in each as references"),
        ("grounding", [{"id": "g", "prediction": "none"}], "row 'g': expected a list of .* as boxes, the keys are"),
        ("grounding", [{"id": "g", "prediction": "", "boxes": [{"label": "a"}]}], r"as boxes, got .*KeyError\('box'\)"),
        ("grounding", [{"prediction": "", "boxes": [{"label": "a", "box": [0, 0, 9, 1000]}]}], "row 0: .* in 0..999"),
        ("grounding", [{"prediction": "", "boxes": [{"label": 1, "box": [0, 0, 9, 9]}]}], "row 0: .* as boxes"),
        ("slides", [row("a", "a", evidence_pages=["1"])], "row 'a-1': expected a list of page numbers"),
    ],
)
def test_a_row_without_what_its_task_needs_is_named(task, rows, message):
    with pytest.raises(ValueError, match=message):
        score_rows(task, rows)
