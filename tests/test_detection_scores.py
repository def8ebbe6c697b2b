"""Boxes written as text: reading them, matching them, and COCO's average precision of them."""

import contextlib
import io
import random

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlm_peft.metrics.boxes import LabelledBox, average_precision, box_spans, parse_boxes, score_boxes


def text_of(boxes: list[LabelledBox]) -> str:
    return "; ".join(f"{each.label} {list(each.box)}" for each in boxes) or "none"


DOG = LabelledBox("dog", (0, 0, 99, 99))
CAT = LabelledBox("cat", (500, 500, 599, 599))


def test_the_agreed_format_is_read():
    boxes, malformed = parse_boxes("dog [12, 40, 300, 512]; Red Ball [600, 0, 999, 80]")
    assert boxes == [LabelledBox("dog", (12, 40, 300, 512)), LabelledBox("red ball", (600, 0, 999, 80))]
    assert malformed == []


@pytest.mark.parametrize("text", ["none", " None. ", "", "\n;;"])
def test_texts_without_a_box(text):
    assert parse_boxes(text) == ([], [])


@pytest.mark.parametrize(
    "text",
    [
        "DOG[0,0,99,99];cat [500 , 500,599 ,599 ].",
        "dog [0, 0, 99, 99]\ncat [500, 500, 599, 599]",
        "dog [0, 0, 99, 99], cat [500, 500, 599, 599];",
        "  dog   [\t0, 0,\u00a099, 99] ; none; cat [500, 500, 599, 599]",
    ],
)
def test_spaces_and_separators_are_free(text):
    assert parse_boxes(text) == ([DOG, CAT], [])


@pytest.mark.parametrize(
    "entry",
    [
        "dog [0, 0, 99]",
        "dog [0, 0, 99, 99, 99]",
        "dog [0, 0, 99, 1000]",
        "dog [-1, 0, 99, 99]",
        "dog [0.5, 0, 99, 99]",
        "dog [99, 0, 0, 99]",
        "dog [0, 99, 99, 0]",
        "dog [0, 0, 99, " + "9" * 5000 + "]",
        "dog [0, 0, x, 99]",
        "[0, 0, 99, 99]",
        "dog [0, 0, 99",
        "dog [0, 0, 99, 99] [1, 1, 2, 2]",
        "[red] dog [0, 0, 99, 99]",
        "no animals at all",
        "\U0001f415 \u0660",
    ],
)
def test_malformed_entries_are_returned_and_the_others_read(entry):
    assert parse_boxes(f"cat [500, 500, 599, 599]; {entry}") == ([CAT], [entry])


@pytest.mark.parametrize("text", ["dog [" + " " * 30_000, "[1," * 20_000, "a " * 30_000 + "[1, 2"])
def test_hostile_texts_are_read_quickly(text):
    assert parse_boxes(text)[0] == []


def test_perfect_boxes_score_one_however_small_they_are(capfd):
    truths = [[DOG, LabelledBox("ant", (5, 5, 5, 5))], [], [CAT, LabelledBox("wire", (0, 7, 999, 7))]]
    scores = score_boxes([text_of(boxes) for boxes in truths], truths)
    assert scores.metrics == pytest.approx(
        dict.fromkeys(["AP50", "AP", "precision50", "recall50", "f1_50", "mean_iou"], 1.0)
    )
    assert scores.f1_50 == [1, 1, 1]
    assert (scores.skipped, scores.notes) == ({}, [])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("prediction", "f1", "mean_iou"),
    [
        # Half of the width: 50 of 100 columns, an IoU of exactly 0.5, is enough; 49 are not.
        ("dog [0, 0, 49, 99]", 1, 0.5),
        ("dog [0, 0, 48, 99]", 0, 0.49),
        # Boxes that touch share no cell; boxes that share a column of cells do.
        ("dog [100, 0, 199, 99]", 0, 0),
        ("dog [99, 0, 198, 99]", 0, 100 / 19900),
        ("cat [0, 0, 99, 99]", 0, 0),
        ("dog [0, 0, 99, 99]; dog [0, 0, 99, 99]", 2 / 3, 1),
        ("dog [0, 0, 99, 99]; cat [0, 0, 99, 99]", 2 / 3, 1),
        ("none", 0, 0),
        ("", 0, 0),
        # What cannot be read is an entry that matches nothing.
        ("dog [0, 0, 99, 99]; dog [0, 0", 2 / 3, 1),
    ],
)
def test_one_true_box(prediction, f1, mean_iou):
    scores = score_boxes([prediction], [[DOG]])
    assert scores.f1_50 == pytest.approx([f1])
    assert scores.metrics["mean_iou"] == pytest.approx(mean_iou)


def test_counts_over_pictures_and_the_note_about_malformed_entries():
    predictions = ["dog [0, 0, 99, 99]; dog [0", "cat [1, 1, 2, 2]; dog [0, 0, 99, 99]", "nothing to see", "none"]
    scores = score_boxes(predictions, [[DOG], [DOG, CAT], [], []])
    assert scores.f1_50 == pytest.approx([2 / 3, 0.5, 0, 1])
    assert scores.metrics["f1_50"] == pytest.approx((2 / 3 + 0.5 + 0 + 1) / 4)
    assert scores.metrics["precision50"] == pytest.approx(2 / 5)
    assert scores.metrics["recall50"] == pytest.approx(2 / 3)
    assert scores.notes == ["2 entries of 2 texts are no boxes and count as wrong ones; the first: 'dog [0'."]


def test_the_best_pairs_are_matched_first_whatever_the_order_of_the_text():
    truths = [[LabelledBox("dog", (0, 0, 99, 99)), LabelledBox("dog", (30, 0, 129, 99))]]
    # The first fits both true boxes, the left one better; the second fits only the left one, and that perfectly.
    entries = ["dog [10, 0, 109, 99]", "dog [0, 0, 99, 99]"]
    scores = [score_boxes(["; ".join(order)], truths).f1_50 for order in (entries, entries[::-1])]
    assert scores == [[1.0], [1.0]]


def test_average_precision_ranks_by_order_and_ignores_labels_without_a_true_box():
    wrong = LabelledBox("dog", (800, 800, 999, 999))
    assert average_precision([[DOG, wrong]], [[DOG]])["AP50"] == pytest.approx(1.0)
    assert average_precision([[wrong, DOG]], [[DOG]])["AP50"] == pytest.approx(0.5)
    assert average_precision([[CAT, DOG]], [[DOG]])["AP50"] == pytest.approx(1.0)
    # IoU 0.8: right at the seven thresholds from 0.50 to 0.80 of ten.
    assert average_precision([[LabelledBox("dog", (0, 0, 79, 99))]], [[DOG]]) == pytest.approx({"AP50": 1, "AP": 0.7})


def test_average_precision_ranks_by_confidence_where_there_is_one():
    wrong = LabelledBox("dog", (800, 800, 999, 999))
    texts, truths = [text_of([wrong]), text_of([DOG])], [[], [DOG]]
    assert score_boxes(texts, truths).metrics["AP50"] == pytest.approx(0.5)
    assert score_boxes(texts, truths, [[0.1], [0.9]]).metrics["AP50"] == pytest.approx(1.0)
    assert score_boxes(texts, truths, [[0.9], [0.1]]).metrics["AP50"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="shorter"):
        score_boxes(texts, truths, [[], [0.5]])


@pytest.mark.parametrize("is_ranked", [False, True])
def test_average_precision_equals_one_run_of_cocoeval_over_all_labels(is_ranked):
    source = random.Random(0)

    def box() -> tuple[int, int, int, int]:
        x, y = source.randint(0, 780), source.randint(0, 780)
        return x, y, x + source.randint(20, 199), y + source.randint(20, 199)

    def near(each: LabelledBox) -> LabelledBox:
        x1, y1, x2, y2 = (value + source.randint(0, 15) for value in each.box)
        return LabelledBox(each.label, (min(x1, x2), min(y1, y2), x2, y2))

    truths = [[LabelledBox(source.choice("abc"), box()) for _ in range(source.randint(0, 4))] for _ in range(30)]
    predictions = [[*map(near, boxes), LabelledBox(source.choice("abc"), box())] for boxes in truths]
    for boxes in predictions:
        source.shuffle(boxes)
    # Some are equal.
    confidences = [[source.randint(0, 20) / 20 for _ in boxes] for boxes in predictions] if is_ranked else None

    def coco(sets: list[list[LabelledBox]], scores=None) -> COCO:
        annotations = []
        for picture, boxes in enumerate(sets):
            for place, each in enumerate(boxes):
                x1, y1, x2, y2 = each.box
                size = [x2 - x1 + 1, y2 - y1 + 1]
                score = scores[picture][place] if scores else 1.0
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": picture, "category_id": ord(each.label), "score": score}
                    | {"bbox": [x1, y1, *size], "area": size[0] * size[1], "iscrowd": 0}
                )
        made = COCO()
        made.dataset = {"images": [{"id": i} for i in range(30)], "annotations": annotations}
        made.dataset["categories"] = [{"id": ord(label)} for label in "abc"]
        made.createIndex()
        return made

    with contextlib.redirect_stdout(io.StringIO()):
        whole = COCOeval(coco(truths), coco(predictions, confidences), "bbox")
        whole.evaluate()
        whole.accumulate()
        whole.summarize()
    assert 0.1 < whole.stats[0] < whole.stats[1] < 0.9
    found = average_precision(predictions, truths, confidences)
    assert found == pytest.approx({"AP": whole.stats[0], "AP50": whole.stats[1]})
    # The ranking matters on these boxes.
    assert (found == average_precision(predictions, truths)) == (not is_ranked)


def test_without_true_boxes_only_what_is_defined_is_scored():
    scores = score_boxes(["none", "dog [0, 0, 99, 99]"], [[], []])
    assert scores.metrics == {"precision50": 0.0, "f1_50": 0.5}
    assert set(scores.skipped) == {"AP50", "AP", "recall50", "mean_iou"}
    assert score_boxes(["none"], [[]]).metrics == {"precision50": 1.0, "f1_50": 1.0}
    with pytest.raises(ValueError, match="expected at least one true box"):
        average_precision([[DOG]], [[]])


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("none", [1.0, 1.0]),
        ("", [1.0, 1.0]),
        ("dog [0, 0, 99, 99]", [1.0, 1.0]),
        (" CAT [0, 0, 99, 99]", [0.5, 0.0]),
        ("cat [0, 0, 99, 99]; cat [0, 0, 9, 9]; ant [1, 1, 2, 2]", [0.0, 0.0]),
        # Nonsense is no "none".
        ("there is no cat here", [0.0, 0.0]),
    ],
)
def test_names_that_are_not_there_are_right_without_a_box(prediction, right):
    asked = [["dog", "Cat", "ant"], ["dog"], ["cat"]]
    scores = score_boxes([prediction, "none", prediction], [[DOG], [DOG], []], asked=asked)
    assert scores.no_target == right
    assert scores.metrics["no_target_accuracy"] == pytest.approx(sum(right) / 2)
    assert "no_target_accuracy" not in score_boxes(["none"], [[DOG]], asked=[["dog"]]).metrics
    assert "no_target_accuracy" not in score_boxes(["none"], [[DOG]]).metrics


def test_spans_are_those_of_the_boxes_that_are_read():
    text = " dog [0, 0, 99, 99]; nonsense;  Cat[1, 1, 2, 2],none\n\u00e9l\u00e9phant  [3, 3, 4, 4]."
    boxes, _ = parse_boxes(text)
    spans = box_spans(text)
    assert [text[bracket:end] for _, bracket, end in spans] == ["[0, 0, 99, 99]", "[1, 1, 2, 2]", "[3, 3, 4, 4]."]
    assert [text[begin:bracket] for begin, bracket, _ in spans] == [" dog ", ";  Cat", "\n\u00e9l\u00e9phant  "]
    assert [box.label for box in boxes] == ["dog", "cat", "\u00e9l\u00e9phant"]
    assert box_spans("none") == box_spans("") == []


@pytest.mark.parametrize(
    ("label", "box"),
    [
        (" ", (0, 0, 9, 9)),
        ("dog", (0, 0, 9)),
        ("dog", (0, 0, 9, 1000)),
        ("dog", (9, 0, 0, 9)),
        ("dog", (0, 0.5, 9, 9)),
        ("dog", (-1, 0, 9, 9)),
    ],
)
def test_bad_true_boxes_are_named(label, box):
    with pytest.raises(ValueError, match="expected"):
        LabelledBox(label, box)


@pytest.mark.parametrize(("predictions", "truths"), [([], []), (["none"], [])])
def test_nothing_to_score_is_named(predictions, truths):
    with pytest.raises(ValueError, match="expected texts and true boxes of the same pictures"):
        score_boxes(predictions, truths)
