"""A task is one module: nobody else names it or its options, and its metrics, options and reward are what it says."""

import ast
import json
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from conftest import ROOT

from vlm_peft.commands.caption import ask
from vlm_peft.commands.score import main as score_files
from vlm_peft.data.splits import Question
from vlm_peft.evaluation import evaluate as evaluation
from vlm_peft.evaluation import records
from vlm_peft.evaluation.task_scores import score_rows
from vlm_peft.metrics.boxes import LabelledBox, overlap_f1, parse_boxes
from vlm_peft.metrics.captions import Cider
from vlm_peft.tasks import TASK_FILE, TASKS, TaskOptions, TaskSettings, make_reward, make_task

JUSTIFIED = {
    ("evaluation/records.py", "caption"): "a key in COCO's files",
    ("commands/caption.py", "caption"): "a key of what the command prints",
    ("report", "caption"): "reads files from before there were other tasks",
    ("__main__.py", "classify"): "the name of a command",
    ("commands/web_demo.py", "classify"): "the address of a button",
    **{
        ("teacher", name): "what a teacher is asked for, and the columns of its answers"
        for name in ("caption", "vqa", "chat", "grounding")
    },
    ("contrastive", ".class_names"): "an option of contrastive training, too",
    ("commands/evaluate_clip.py", ".class_names"): "the same",
}
"""Where a word that is also a task's name may stand: module or room, word, reason."""

DOG = {"label": "dog", "box": [0, 0, 99, 99]}
CAT = {"label": "cat", "box": [500, 500, 599, 599]}
ROWS = {
    "caption": [
        {"references": ["a dog runs on the grass", "the dog is running outside"]},
        {"references": ["two cats sleep on a sofa", "cats asleep on the couch"]},
        {"references": ["a red car in a street", "the car is parked"]},
    ],
    "vqa": [{"references": ["2"] * 6 + ["two dogs"] * 4}, {"references": ["yes"]}],
    "slides": [{"references": ["42"]}, {"references": ["red car"]}],
    "chat": [{"references": ["a red car in a street"]}, {"references": ["no"]}],
    "grounding": [
        {"references": ["dog [0, 0, 99, 99]; cat [500, 500, 599, 599]"], "boxes": [DOG, CAT]},
        {"references": ["none"], "boxes": [], "asked": ["bird"]},
        {"references": ["none"], "boxes": [], "question": "detect: dog"},
    ],
    "digits": [{"references": ["0417"]}, {"references": ["12"]}],
    "classify": [{"references": ["polar bear"]}, {"references": ["tiger"]}],
}
RIGHT = {
    "caption": "a dog runs on the grass",
    "vqa": "two",
    "slides": "42 (pages 3, 7)",
    "chat": "a red car in a street",
    "grounding": ROWS["grounding"][0]["references"][0],
    "digits": "0417",
    "classify": "polar bear",
}


def words_of(path):
    """Text constants of a module without its docstrings, attributes and keywords."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value
        elif isinstance(node, ast.Attribute):
            yield f".{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg:
            yield f".{node.arg}"


def test_no_module_outside_its_own_names_a_task_or_its_options():
    options = {name for each in fields(TaskOptions) for name in (each.name, f".{each.name}")}
    package, found = ROOT / "vlm_peft", set()
    for path in package.rglob("*.py"):
        place = path.relative_to(package)
        if place.parts[0] != "tasks":
            found |= {(place, word) for word in words_of(path) if word in TASKS or word in options}
        elif place.stem not in ("example", "scoring", "settings", "kinds", "__init__"):
            # Each names itself only, and once.
            named = {word for word in words_of(path) if word in TASKS}
            assert named == {place.stem}, place
    allowed = {
        (place, word) for place, word in found if {(place.as_posix(), word), (place.parts[0], word)} & set(JUSTIFIED)
    }
    assert found == allowed


@pytest.mark.parametrize("name", TASKS)
def test_a_task_explains_its_metrics(name):
    kind = TASKS[name]
    names = [each.name for each in kind.metrics]
    assert len(set(names)) == len(names)
    assert kind.primary in names
    assert all(each.explanation and each.highest > 0 for each in kind.metrics)
    assert set(ROWS[name][0]) >= {kind.truth}
    scores = score_rows(name, [row | {"prediction": RIGHT[name]} for row in ROWS[name]], tokenizer="treebank-python")
    highest = {each.name: each.highest for each in kind.metrics if not each.needs_pictures}
    assert scores.primary == kind.primary
    assert all(0 <= value <= highest[key] for key, value in scores.metrics.items())
    # One name means one thing, in whichever task.
    others = {each.name: each for other in TASKS.values() for each in other.metrics}
    assert [others[each.name] for each in kind.metrics] == list(kind.metrics)


def test_a_task_that_is_listed_is_bound_scored_and_rewarded(monkeypatch):
    def bind(columns, image_column, text_column, instruction):
        return replace(make_task("digits", columns), name="numbers")

    def score(rows, options):
        return replace(TASKS["digits"].score(rows, options), notes=["numbers"])

    monkeypatch.setitem(TASKS, "numbers", replace(TASKS["digits"], name="numbers", bind=bind, score=score))
    assert make_task("numbers", ["image", "digits"]).name == "numbers"
    assert score_rows("numbers", [{"prediction": "1", "references": ["1"]}]).notes == ["numbers"]
    assert make_reward(TASKS["numbers"], ROWS["digits"])(["417"], ROWS["digits"][:1]) == [0]


def test_an_option_reaches_its_task_and_no_other():
    deck = ["page_1", "question", "answer", "evidence_pages"]
    assert make_task("slides", deck, slide_pages="all").pages({"picture_places": [0]}) == [0]
    assert make_task("caption", ["image", "caption"], slide_pages="all").name == "caption"
    with pytest.raises(TypeError, match="slide_page"):
        make_task("slides", deck, slide_page="all")


def test_task_json_keeps_the_options_and_reads_older_and_newer_files(tmp_path):
    settings = TaskSettings(task="slides", instruction="Be brief.", slide_pages="all", name_pages=True)
    (tmp_path / TASK_FILE).write_text(settings.to_json())
    assert TaskSettings.read(tmp_path) == settings
    names = ["task", "instruction", "max_new_tokens", "num_beams", "slide_pages", "name_pages"]
    names += ["class_names", "class_temperature", "calibration_rows"]
    assert list(json.loads(settings.to_json())) == names
    for stored in ({"task": "slides", "max_new_tokens": 9}, {"task": "slides", "max_new_tokens": 9, "of_tomorrow": 1}):
        (tmp_path / TASK_FILE).write_text(json.dumps(stored))
        assert TaskSettings.read(tmp_path) == TaskSettings(task="slides", max_new_tokens=9)
    (tmp_path / TASK_FILE).write_text('{"name_pages": "yes"}')
    with pytest.raises(ValueError, match="name_pages is 'yes', expected a value like False"):
        TaskSettings.read(tmp_path)


def test_a_person_asks_as_the_task_was_trained():
    assert ask(TaskSettings(task="digits")) == "Read the digits."
    assert ask(TaskSettings(task="digits", instruction="Read."), "What is it?") == "What is it?"
    assert ask(TaskSettings(task="grounding", instruction="find:"), "dog; cat") == "find: dog; cat"
    assert ask(TaskSettings(task="grounding"), "detect: dog") == "detect: dog"


KNOWN = {
    # (text, row, what it earns)
    "vqa": [("two", 0, 1.0), ("two dogs", 0, 1.0), ("3", 0, 0.0), ("yes", 1, 1.0), ("Yes", 1, 0.0)],
    "slides": [("42 (page 3)", 0, 1.0), ("the 42.", 0, 1.0), ("43", 0, 0.0), ("car", 1, 0.0)],
    "chat": [("a red car in a street", 0, 1.0), ("red car", 0, 2 / 3), ("no", 1, 1.0), ("blue", 1, 0.0)],
    "grounding": [
        ("dog [0, 0, 99, 99]; cat [500, 500, 599, 599]", 0, 1.0),
        ("dog [0, 0, 99, 99]", 0, 2 / 3),
        # The lower half of the box: an overlap of a half, where f1_50 has all or nothing.
        ("dog [0, 50, 99, 99]; cat [500, 500, 599, 599]", 0, 0.75),
        ("cat [0, 0, 99, 99]", 0, 0.0),
        ("none", 1, 1.0),
        ("dog [0, 0, 99, 99]", 1, 0.0),
    ],
    "digits": [("0417", 0, 1.0), ("0 4 1 7", 0, 1.0), ("417", 0, 0.0), ("0417 or 0418", 0, 0.0)],
    "classify": [("polar bear", 0, 1.0), ("bear", 0, 0.0), ("tiger", 1, 1.0), ("Tiger", 1, 0.0)],
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_reward_is_known(name):
    reward = make_reward(TASKS[name], ROWS[name])
    texts = [text for text, _, _ in KNOWN[name]]
    assert reward(texts, [ROWS[name][row] for _, row, _ in KNOWN[name]]) == pytest.approx(
        [earned for _, _, earned in KNOWN[name]], abs=1e-12
    )


def test_the_reward_of_a_caption_is_its_cider_whatever_else_is_in_the_batch():
    rows, texts = ROWS["caption"], ["a dog runs outside", "two cats on a couch", "a bus"]
    whole = score_rows(
        "caption",
        [row | {"prediction": text} for row, text in zip(rows, texts, strict=True)],
        tokenizer="treebank-python",
    )
    reward = make_reward(TASKS["caption"], rows)
    assert reward(texts, rows) == pytest.approx(whole.per_row["CIDEr"], rel=1e-12)
    assert min(whole.per_row["CIDEr"][:2]) > 0.5
    # Four answers to one row, as they are drawn in training: each earns what it earns alone.
    assert reward([texts[0]] * 3 + ["a cat"], [rows[0]] * 4)[:3] == [reward(texts[:1], rows[:1])[0]] * 3
    with pytest.raises(ValueError, match="at least two pictures, got those of 1"):
        Cider([["a dog"]])


@pytest.mark.parametrize("name", TASKS)
def test_no_reward_is_earned_by_what_is_no_answer(name):
    row, right = ROWS[name][0], RIGHT[name]
    reward = make_reward(TASKS[name], ROWS[name])
    joint = "; " if name == "grounding" else " "
    hacked = {
        "empty": "",
        "blank": " \n ",
        "never ends": right + " ." * 500,
        "never ends, said again": joint.join([right] * 200),
    }
    earned = dict(zip(hacked, reward(list(hacked.values()), [row] * len(hacked)), strict=True))
    assert earned == dict.fromkeys(hacked, 0.0)
    best, twice = reward([right, joint.join([right] * 3)], [row] * 2)
    assert best > 0.5
    assert 0 <= twice < 0.7 * best


def test_nothing_to_be_found_is_said_and_not_left_open():
    reward = make_reward(TASKS["grounding"], ROWS["grounding"])
    assert reward(["none", ""], [ROWS["grounding"][1]] * 2) == [1, 0]


def test_a_reward_names_the_row_that_cannot_be_judged():
    with pytest.raises(ValueError, match="row 'b': expected a list of one or more texts as references"):
        make_reward(TASKS["vqa"], [{"id": "a", "references": ["x"]}, {"id": "b"}])
    with pytest.raises(ValueError, match="expected at least one row"):
        make_reward(TASKS["vqa"], [])


def test_overlaps_count_once_each():
    truth = [LabelledBox("dog", (0, 0, 99, 99))]
    assert overlap_f1("dog [0, 0, 99, 99]; dog [0, 0, 99, 99]", truth) == pytest.approx(2 / 3)
    assert overlap_f1("dog [0, 0, 99, 99]; nonsense", truth) == pytest.approx(2 / 3)
    assert overlap_f1("none", []) == 1


def evaluate(monkeypatch, tmp_path, task, rows, texts, **options):
    """`evaluate_split` with texts in the place of a model's."""
    questions = [
        Question(str(place), [], [place], row["references"], {key: row[key] for key in row if key != "references"})
        for place, row in enumerate(rows)
    ]
    split = SimpleNamespace(
        name="test",
        data=SimpleNamespace(dataset_name="data"),
        task=SimpleNamespace(name=task, choices=()),
        fetch_images=None,
        left_out=[],
        texts=questions,
        questions=lambda: questions,
    )
    monkeypatch.setattr(evaluation, "generate_texts", lambda *_, **__: texts)
    sure = [(text, [0.5] * len(parse_boxes(text)[0])) for text in texts]
    monkeypatch.setattr(evaluation, "generate_with_confidences", lambda *_, **__: sure)
    return evaluation.evaluate_split(None, None, split, tmp_path, **options)


@pytest.mark.parametrize("task", TASKS)
def test_both_commands_give_the_same_scores(task, tmp_path, monkeypatch, capsys):
    rows, texts = ROWS[task], [RIGHT[task]] * len(ROWS[task])
    options = {"tokenizer": "treebank-python", "meteor": False}
    summary = evaluate(monkeypatch, tmp_path, task, rows, texts, **options)
    again = tmp_path / "again.json"
    names = [
        each.name for each in TASKS[task].metrics if each.name not in ("METEOR", "SPICE") and not each.needs_pictures
    ]
    files = [str(tmp_path / "predictions.jsonl"), "--output", str(again), "--tokenizer", "treebank-python"]
    assert score_files([*files, "--metrics", *names]) == 0
    stored = json.loads(again.read_text())
    assert json.loads((tmp_path / "scores.json").read_text()) == summary
    for key in ("task", "primary", "metrics", "intervals", "tokenizer", "n", "skipped"):
        assert stored[key] == summary[key], key


def test_the_options_of_caption_metrics_reach_every_task_that_has_them(tmp_path, monkeypatch):
    from vlm_peft.metrics import captions

    monkeypatch.setattr(captions, "score_with_java", lambda name, *_: {"METEOR": 0.25, "SPICE": 0.5}[name])
    for task in ("caption", "chat"):
        texts = [RIGHT[task]] * len(ROWS[task])
        options = {"tokenizer": "treebank-python", "meteor": True, "spice": True}
        summary = evaluate(monkeypatch, tmp_path, task, ROWS[task], texts, **options)
        assert (summary["metrics"]["METEOR"], summary["metrics"]["SPICE"]) == (0.25, 0.5)
        assert summary["tokenizer"] == "treebank-python"


def test_every_interval_is_drawn_once(tmp_path, monkeypatch):
    drawn = []

    def interval(values):
        drawn.append(values)
        return 0.0, 1.0

    monkeypatch.setattr(records, "bootstrap_interval", interval)
    summary = evaluate(monkeypatch, tmp_path, "digits", ROWS["digits"], ["0417", "13"])
    assert summary["intervals"] == {"exact_match": [0, 1], "digit_accuracy": [0, 1]}
    assert len(drawn) == 2
    assert math.isclose(summary["metrics"]["exact_match"], 0.5)


@pytest.mark.parametrize("name", ["max_new_tokens", "num_beams"])
def test_counts_below_one_in_the_settings_file_are_refused(tmp_path, name):
    (tmp_path / TASK_FILE).write_text(json.dumps({name: -1}))
    with pytest.raises(ValueError, match=f"{name} is -1, expected at least 1"):
        TaskSettings.read(tmp_path)
