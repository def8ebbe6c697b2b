"""Grounding and digits: rows of published schemas become questions and answers; the recipes run on such rows."""

import io
import json

import numpy as np
import pytest
from conftest import ROOT
from datasets import Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage

from vlm_peft.data.arguments import DataArguments
from vlm_peft.data.pictures import Pictures, UnreadablePictureError
from vlm_peft.data.rows import bind_rows, load_rows
from vlm_peft.data.streaming import load_stream, stream_rows
from vlm_peft.metrics.boxes import LabelledBox, parse_boxes, score_boxes
from vlm_peft.tasks import make_task
from vlm_peft.tasks.digits import digits_example
from vlm_peft.tasks.grounding import choose_absent, grid_box, objects_example, referring_example

SCENES, DIGITS = ROOT / "recipes/demo/scenes", ROOT / "recipes/demo/digits"
DOG, BALL = {"name": "dog", "box": [0, 0, 56, 28]}, {"name": "red ball", "box": [56, 84, 56, 28]}


def asked(example) -> list[str]:
    return [question[0]["content"] for question in example.questions]


def picture(width: int = 40, height: int = 20, orientation: int | None = None) -> dict:
    encoded = io.BytesIO()
    image = PILImage.new("RGB", (width, height), (width, height, 90))
    exif = image.getexif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(encoded, "JPEG", exif=exif)
    return {"bytes": encoded.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ([0, 0, 640, 480], [0, 0, 999, 999]),
        ([320, 240, 320, 240], [500, 500, 999, 999]),
        ([0, 0, 320, 240], [0, 0, 499, 499]),
        # As rounding of the annotators' polygons leaves them: less than a pixel outside.
        ([-0.4, 0.0, 640.9, 480.3], [0, 0, 999, 999]),
        ([639.9, 479.9, 0.1, 0.1], [999, 999, 999, 999]),
        ([64.0, 48.0, 0.01, 0.01], [100, 100, 100, 100]),
    ],
)
def test_pixels_become_cells_of_the_grid(box, cells):
    assert grid_box(box, [640, 480]) == cells
    LabelledBox("what the scores accept", tuple(grid_box(box, [640, 480])))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0, 0, 642, 10], r"inside the picture of 640 x 480 pixels, got \[0, 0, 642, 10\]"),
        ([-2, 0, 10, 10], r"inside the picture of 640 x 480 pixels, got \[-2, 0, 10, 10\]"),
        ([0, 475, 10, 10], "inside the picture of 640 x 480 pixels"),
        ([float("nan"), 0, 10, 10], "inside the picture of 640 x 480 pixels"),
        ([0, 0, 0, 10], r"a width and a height above 0, got \[0, 0, 0, 10\]"),
        ([0, 0, 10, -1], "a width and a height above 0"),
        ([0, 0, float("nan"), 1], "a width and a height above 0"),
        ([1, 2, 3], r"as \[x, y, width, height\] in pixels, got \[1, 2, 3\]"),
        ([1, 2, 3, None], r"as \[x, y, width, height\] in pixels"),
        (None, "got None"),
    ],
)
def test_boxes_that_cannot_be_are_refused_with_what_came(box, message):
    with pytest.raises(ValueError, match=message):
        grid_box(box, [640, 480])


def test_scene_asks_for_each_object_for_all_and_for_an_absent_one():
    example = objects_example([DOG, BALL], [112, 112], "detect:", absent=["cat", "red ball"], seed="3")
    dog, ball = "dog [0, 0, 499, 249]", "red ball [500, 750, 999, 999]"
    assert asked(example)[:2] == ["detect: dog", "detect: red ball"]
    assert asked(example)[2] in ("detect: dog; red ball", "detect: red ball; dog")
    assert asked(example)[3] == "detect: cat; red ball"
    both = f"{dog}; {ball}" if asked(example)[2].endswith("ball") else f"{ball}; {dog}"
    assert example.references == [[dog], [ball], [both], [ball]]
    assert [messages[-1]["content"] for messages in example.completions] == [dog, ball, both, ball]
    assert example.details[3]["boxes"] == [{"label": "red ball", "box": [500, 750, 999, 999]}]
    orders = {asked(objects_example([DOG, BALL], [112, 112], "detect:", seed=str(seed)))[2] for seed in range(20)}
    assert len(orders) == 2


def test_several_of_one_name_are_one_question_and_nothing_there_is_none():
    twice = objects_example([DOG, DOG | {"box": [1, 1, 1, 1]}], [112, 112], "find")
    assert asked(twice) == ["find dog"]
    assert twice.references == [["dog [0, 0, 499, 249]; dog [9, 9, 17, 17]"]]
    nothing = objects_example([], [112, 112], "detect:", absent=["cat"])
    assert (asked(nothing), nothing.references) == (["detect: cat"], [["none"]])


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (None, "Expected a list of"),
        (["dog"], "Expected a list of"),
        ([], "got none"),
        ([{"name": " ", "box": [0, 0, 1, 1]}], "Expected the name of an object"),
        ([{"name": "[];", "box": [0, 0, 1, 1]}], "Expected the name of an object"),
        ([{"name": "dog"}], "Expected a box"),
        ([{"name": "dog", "box": [100, 0, 20, 20]}], "inside the picture of 112 x 112"),
    ],
)
def test_objects_that_cannot_be_asked_for_are_refused(objects, message):
    with pytest.raises(ValueError, match=message):
        objects_example(objects, [112, 112], "detect:")


def test_absent_names_come_from_other_pictures_with_the_present_one():
    rows = [("1", ["dog", "cat"]), ("2", ["dog", "ball"]), ("3", ["key", "bell"]), ("4", []), ("5", ["sun"])]
    questions = choose_absent(rows)
    # The dog was seen with a ball, the cat with nothing that is not there.
    assert questions[0] in ([], ["ball"], ["dog", "ball"], ["ball", "dog"])
    assert questions[2] == []
    assert len(questions[3]) == 1
    assert questions[4] == []
    assert choose_absent(rows) == questions
    many = [(str(row), ["dog", "cat"][: 1 + row % 2]) for row in range(400)]
    chosen = [question for question, (_, names) in zip(choose_absent(many), many, strict=True) if len(names) == 1]
    assert {tuple(question) for question in chosen} == {("cat",), ("dog", "cat"), ("cat", "dog")}
    assert 0.15 < sum(len(question) == 1 for question in chosen) / len(chosen) < 0.35


def test_demo_scenes_have_questions_that_copying_does_not_answer():
    rows = load_rows(str(SCENES), "test", limit=60)
    task = make_task("grounding", rows.column_names)
    texts, _ = bind_rows(rows, task)
    unanswered = 0
    for row in texts:
        names = {item["name"] for item in row["objects"]}
        example = task.example(row)
        for question, (reference,), detail in zip(asked(example), example.references, example.details, strict=True):
            wanted = question.removeprefix("detect: ").split("; ")
            boxes, malformed = parse_boxes(reference)
            assert not malformed
            assert {box.label for box in boxes} == set(wanted) & names
            assert [(box.label, list(box.box)) for box in boxes] == [
                (each["label"], each["box"]) for each in detail["boxes"]
            ]
            truth = [LabelledBox(each["label"], tuple(each["box"])) for each in detail["boxes"]]
            assert score_boxes([reference], [truth]).metrics["f1_50"] == 1.0
            unanswered += not set(wanted) <= names
    assert unanswered > len(texts) / 2


def test_refcoco_of_both_publishers_gives_the_same_questions():
    """lmms-lab/RefCOCO has pictures and [x, y, width, height], jxu124/refcoco paths and corners."""
    said = [["left zebra", "zebra; on [the] left"], ["right one"]]
    lmms = {
        "question_id": ["1", "2"],
        "image": [picture(), picture()],
        "question": ["Please describe the box."] * 2,
        "answer": said,
        "bbox": [[0.0, 0.0, 20.0, 10.0], [20.0, 10.0, 20.0, 10.0]],
        "file_name": ["COCO_train2014_000000000042_0.jpg", "COCO_train2014_000000000042_16.jpg"],
    }
    jxu = {
        "image_path": ["coco/42.jpg"] * 2,
        "image_id": [42, 42],
        "sentences": [[{"raw": text.upper(), "sent": text} for text in texts] for texts in said],
        "raw_anns": ["{}", "{}"],
        "bbox": [[0.0, 0.0, 20.0, 10.0], [20.0, 10.0, 40.0, 20.0]],
    }
    first = make_task("grounding", list(lmms))
    rows = Dataset.from_dict({"id": ["a", "b"], **lmms}).cast_column("image", Image())
    texts, pictures = bind_rows(rows, first)
    assert (len(texts), len(pictures), texts[0]["image_sizes"]) == (1, 1, [[40, 20]])
    example = first.example(texts[0])
    assert asked(example) == ["detect: left zebra", "detect: zebra on the left", "detect: right one"]
    assert example.references == [
        ["left zebra [0, 0, 499, 499]"],
        ["zebra on the left [0, 0, 499, 499]"],
        ["right one [500, 500, 999, 999]"],
    ]
    second = make_task("grounding", list(jxu), image_column="image_path")
    assert {second.group_key({"image_id": value}) for value in jxu["image_id"]} == {"42"}
    assert second.example(jxu | {"image_sizes": [[40, 20]]}) == example


@pytest.mark.parametrize("said", [[None], [[]], [[""]], [[{"sent": None}]], [[3]]])
def test_boxes_without_an_expression_are_refused(said):
    with pytest.raises(ValueError, match=r"Expected (one or more expressions|the name of an object)"):
        referring_example(said, [[0, 0, 1, 1]], [10, 10], "detect:")


def test_sizes_are_those_of_the_upright_picture_and_unreadable_ones_are_left_to_be_refused():
    rows = Dataset.from_dict(
        {
            "id": ["wide", "lying", "broken"],
            "image": [picture(), picture(orientation=6), {"bytes": b"no picture", "path": None}],
            "objects": [[{"name": "dog", "box": [0, 10, 20, 20]}]] * 3,
        }
    ).cast_column("image", Image())
    pictures = Pictures(rows, ["image"])
    assert [pictures.size(0), pictures.size(1)] == [[40, 20], [20, 40]]
    assert pictures.size(1) == list(pictures.open(1).size)
    with pytest.raises(UnreadablePictureError, match="size"):
        pictures.size(2)
    task = make_task("grounding", rows.column_names)
    texts, _ = bind_rows(rows, task)
    assert texts["image_sizes"][:] == [[[40, 20]], [[20, 40]], [[0, 0]]]
    # Of the picture that lies on its side the box is inside, of the wide one it is not.
    assert task.example(texts[1]).references[0] == ["dog [0, 250, 999, 749]"]
    for row, message in ((0, "inside the picture of 40 x 20"), (2, "width and height can be read")):
        with pytest.raises(ValueError, match=message):
            task.example(texts[row])


@pytest.mark.parametrize(
    ("cell", "text"), [(" 0417 ", "0417"), ("4 1 7", "4 1 7"), (417, "417"), ("12:30", "12:30"), ("-0.5", "-0.5")]
)
def test_digits_of_every_shape(cell, text):
    example = digits_example(cell, "Read.")
    assert (example.completions, example.references) == ([text], [[text]])


@pytest.mark.parametrize("cell", [None, "", " ", "-", "four", "4a", True, [4, 1], "\uff14"])
def test_rows_without_digits_are_refused(cell):
    with pytest.raises(ValueError, match="Expected digits as text like '0417', got"):
        digits_example(cell, "Read.")


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="no column 'digits or label or text'; it has image, number"):
        make_task("digits", ["image", "number"])
    with pytest.raises(ValueError, match="no column 'objects'; it has image, number"):
        make_task("grounding", ["image", "number"])
    with pytest.raises(ValueError, match="no column 'answer or sentences'; it has bbox, image"):
        make_task("grounding", ["image", "bbox"])
    with pytest.raises(ValueError, match="no column 'image'; it has bbox, sentences"):
        make_task("grounding", ["bbox", "sentences"])


def digits_of(row: dict) -> list[bytes]:
    """Shapes of a picture's digits: what is not paper in each cell, without the margin, in parts of the darkest."""
    pixels = np.asarray(row["image"].convert("RGB"), dtype=np.float64)
    ink = np.abs(pixels - pixels[-1, -1]).sum(axis=-1)
    shapes = []
    for cell in range(len(row["digits"])):
        top, left = (28 * place for place in divmod(cell, 4))
        part = ink[top : top + 28, left : left + 28]
        rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        part = part[rows[0] : rows[-1] + 1 : 3, columns[0] : columns[-1] + 1 : 3]
        shapes.append(bytes(part.shape) + np.round(16 * part / part.max()).astype(np.uint8).tobytes())
    return shapes


def test_digits_of_the_test_split_are_never_shown_in_training():
    """Every digit is drawn once before any is drawn again, so that the first pictures show them all."""
    splits = {name: load_dataset(str(DIGITS), split=name) for name in ("train", "test")}
    shown = {}
    for name, sources in (("train", 1438), ("test", 359)):
        seen: list[bytes] = []
        for row in splits[name]:
            assert row["image"].size == (112, 112)
            assert 4 <= len(row["digits"]) <= 8
            seen += digits_of(row)
            if len(seen) >= sources:
                break
        shown[name] = set(seen[:sources])
        assert len(shown[name]) > 0.99 * sources
    assert not shown["train"] & shown["test"]


def save_refcoco(folder, image_folder):
    """jxu124/refcoco's schema and file names as they lie on the Hub, with pictures where its `image_path` says."""
    (image_folder / "coco/train2014").mkdir(parents=True)
    features = Features(
        {
            "image_id": Value("int64"),
            "sentences": List({"raw": Value("string"), "sent": Value("string"), "sent_id": Value("int64")}),
            "raw_anns": Value("string"),
            "image_path": Value("string"),
            "bbox": List(Value("float64")),
        }
    )
    for number, (split, pictures) in enumerate({"train": 4, "validation": 2, "test": 2, "testB": 2}.items()):
        rows = []
        for index in range(pictures):
            image_id = 10 * number + index
            path = f"coco/train2014/COCO_train2014_{image_id:012}.jpg"
            (image_folder / path).write_bytes(picture(40 + image_id, 20 + image_id)["bytes"])
            for side in ("left", "right"):
                corners = [0.0, 0.0, 20.0, 10.0] if side == "left" else [20.0, 0.0, 40.0, 10.5]
                said = [{"raw": text, "sent": text, "sent_id": 0} for text in (side, f"the {side} half")]
                rows.append({"image_id": image_id, "sentences": said, "raw_anns": "{}", "image_path": path})
                rows[-1]["bbox"] = corners
        Dataset.from_list(rows, features=features).to_parquet(
            folder / "data" / f"{split}-00000-of-00001-60990e4598892dc1.parquet"
        )


@pytest.fixture
def train(tmp_path, bases, monkeypatch):
    """Runs a configuration for two steps in this process; returns its folder."""
    from vlm_peft.training import sft

    def run(config: str, *overrides: str):
        vision, text = bases
        arguments = [
            *("--config", str(ROOT / "recipes/configs" / config), "--output_dir", str(tmp_path / "out")),
            *("--vision_model", str(vision), "--model_name_or_path", str(text), "--vision_feature_layer", "-2"),
            *("--start_from", "none"),
            *("--use_cpu", "true", "--bf16", "false", "--max_steps", "2", "--per_device_train_batch_size", "2"),
            *("--max_new_tokens", "4", "--report_to", "none", "--save_strategy", "no", "--score_before", "false"),
            *("--attn_implementation", "sdpa", "--feature_cache_dir", str(tmp_path / "features"), *overrides),
        ]
        assert sft.main(arguments) == 0
        return tmp_path / "out"

    monkeypatch.chdir(tmp_path)
    return run


def read(folder) -> tuple[dict, list[dict]]:
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return json.loads((folder / "scores.json").read_text()), rows


def test_refcoco_recipe_trains_and_scores_every_expression(train, tmp_path):
    save_refcoco(tmp_path / "refcoco", tmp_path / "pictures")
    places = ("--dataset_name", str(tmp_path / "refcoco"), "--image_folder", str(tmp_path / "pictures"))
    out = train("refcoco.yaml", *places)
    for name in ("validation", "test", "testB", "validation-blind"):
        scores, rows = read(out / "eval" / name)
        assert (scores["task"], scores["n"], scores["primary"]) == ("grounding", 8, "f1_50")
        assert {"AP50", "precision50", "recall50", "mean_iou", "f1_50"} <= scores["metrics"].keys()
        assert len({row["id"] for row in rows}) == 8
    first = read(out / "eval/validation")[1][0]
    assert first["question"] == "detect: left"
    assert first["references"] == ["left [0, 0, 399, 332]"]
    assert first["boxes"] == [{"label": "left", "box": [0, 0, 399, 332]}]
    assert json.loads((out / "task.json").read_text())["task"] == "grounding"


def test_digits_recipe_trains_and_scores(train):
    out = train("digits.yaml", "--train_limit", "6", "--eval_limit", "4")
    scores, rows = read(out / "eval/test")
    assert (scores["task"], scores["n"], scores["primary"]) == ("digits", 4, "exact_match")
    assert scores["metrics"].keys() == {"exact_match", "digit_accuracy"}
    assert read(out / "eval/test-blind")[0]["decoding"]["blind"] is True
    assert rows[0]["references"] == [load_dataset(str(DIGITS), split="test")[0]["digits"]]


def test_scenes_recipe_trains_and_scores_boxes(train):
    out = train("demo_grounding.yaml", "--train_limit", "4", "--eval_limit", "2", "--max_length", "2048")
    scores, rows = read(out / "eval/test")
    assert (scores["task"], scores["primary"]) == ("grounding", "f1_50")
    assert all(row["question"].startswith("detect: ") for row in rows)
    assert len(rows) == scores["n"] > 4


def test_stream_of_scenes_knows_the_sizes_and_asks_for_nothing_absent(processor):
    data = DataArguments(dataset_name=str(SCENES), task="grounding")
    rows = load_stream(data, "test", limit=3)
    stream = stream_rows(rows, make_task("grounding", rows.column_names), processor, max_length=None)
    objects = [len(row["objects"]) for row in load_rows(str(SCENES), "test", limit=3)]
    # One question for each object, and one for all where there are several.
    assert sorted(row["num_branches"] for row in stream) == sorted(n + (n > 1) for n in objects)
