"""Boxes with confidences: probabilities of the tokens they were written with, pixels of pictures as they are seen."""

import io
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import make_config, make_processor
from PIL import Image

from vlm_peft import VisionQwen, __main__
from vlm_peft.adapters.loading import load_model
from vlm_peft.commands.detect import draw_boxes
from vlm_peft.commands.web_demo import PictureAnswers, make_page
from vlm_peft.data.probe import probe
from vlm_peft.evaluation import choices, confidence
from vlm_peft.evaluation.choices import answer_log_probs
from vlm_peft.evaluation.confidence import generate_with_confidences
from vlm_peft.evaluation.generation import generate_ids, generate_texts
from vlm_peft.evaluation.task_scores import score_rows
from vlm_peft.metrics.boxes import LabelledBox, box_spans
from vlm_peft.tasks import TASK_FILE, TaskSettings
from vlm_peft.tasks.example import picture_turn
from vlm_peft.tasks.grounding import grid_box, names_questions, pixel_box

TEXT = "dog [0, 0, 499, 249]; caf\u00e9 au lait [500, 500, 999, 999]; dog [3, 4"
QUESTIONS = ["detect: dog", "detect: dog; caf\u00e9 au lait", "detect: ant", "detect: dog"]
IMAGES = [[0], [0], [1], [0]]


@pytest.fixture(scope="module")
def world():
    """A model with a projector that sees something, its processor, and two pictures."""
    torch.manual_seed(2)
    model = VisionQwen(make_config()).eval()
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data.normal_(std=0.6)
    model.generation_config.eos_token_id = None
    pixel_values = torch.randn(2, 3, 8, 8)
    return model, make_processor(model.config), lambda ids: {"pixel_values": pixel_values[ids]}


def prompts_of(world):
    return [world[1].encode_prompt(picture_turn(question)) for question in QUESTIONS]


def token_nats(world, prompt: list[int], answer: list[int], images: list[int]) -> list[float]:
    """Log-probabilities of an answer's tokens by one plain pass, past the code under test."""
    model, _, fetch = world
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + answer]), **fetch(images)).logits[0]
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return [logits[place].log_softmax(-1)[token].item() for place, token in zip(places, answer, strict=True)]


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_tokens_have_the_log_probabilities_of_a_plain_pass(world, monkeypatch, is_shared, batch_size):
    model, processor, fetch = world
    prompts = prompts_of(world)
    answers = generate_ids(model, processor, prompts, IMAGES, fetch, max_new_tokens=7)
    answers[2] = answers[2][:3]
    expected = [token_nats(world, *each) for each in zip(prompts, answers, IMAGES, strict=True)]
    if not is_shared:
        monkeypatch.setattr(choices, "probe", lambda model: replace(probe(model), sharing=False))
    found = answer_log_probs(model, processor, prompts, IMAGES, fetch, answers, batch_size=batch_size)
    assert list(map(len, found)) == [7, 7, 3, 7]
    for own, right in zip(found, expected, strict=True):
        assert own == pytest.approx(right, abs=1e-4)
    # Branches over the limit come in several rows.
    monkeypatch.setattr(choices, "_BRANCHES", 20)
    again = answer_log_probs(model, processor, prompts, IMAGES, fetch, answers, batch_size=batch_size)
    for own, right in zip(again, expected, strict=True):
        assert own == pytest.approx(right, abs=1e-4)


def say(monkeypatch, processor, text: str):
    """Lets generation find a text, whatever the model would say."""
    ids = [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], processor.end_of_turn_token_id]
    monkeypatch.setattr(confidence, "generate_ids", lambda model, processor, encoded, *_, **__: [ids] * len(encoded))
    return ids


def test_a_box_is_as_sure_as_its_label_and_the_mean_of_its_tokens(world, monkeypatch):
    model, processor, fetch = world
    ids = say(monkeypatch, processor, f"  {TEXT}")
    nats = [-0.001 * (place + 1) for place in range(len(ids))]
    given: list = []

    def known(model, processor, encoded, images, fetch, answers, **_):
        given.append((encoded, images, answers))
        return [[value * (1 + index) for value in nats] for index in range(len(answers))]

    monkeypatch.setattr(confidence, "answer_log_probs", known)
    prompts = [picture_turn(question) for question in QUESTIONS]
    found = generate_with_confidences(model, processor, prompts, IMAGES, fetch, box_spans, max_new_tokens=99)
    assert given == [(prompts_of(world), IMAGES, [ids] * 4)]
    # One token a byte, a letter of two of them included; blanks at the beginning are no part of the text.
    raw = f"  {TEXT}".encode()
    first, second = raw.index(b"["), raw.index(b"[", raw.index(b";"))
    ends = [raw.index(b"]") + 1, raw.index(b"]", second) + 1]
    for index, (text, confidences) in enumerate(found):
        assert text == TEXT
        own = [value * (1 + index) for value in nats]
        assert confidences == pytest.approx(
            [
                math.exp(sum(own[:first]) + sum(own[first : ends[0]]) / (ends[0] - first)),
                math.exp(sum(own[ends[0] : second]) + sum(own[second : ends[1]]) / (ends[1] - second)),
            ],
            abs=1e-6,
        )
        assert confidences[0] > confidences[1] > 0.01


def test_texts_are_those_of_generation_and_nothing_is_read_again_without_a_box(world, monkeypatch):
    model, processor, fetch = world
    prompts = [picture_turn(question) for question in QUESTIONS]
    found = generate_with_confidences(model, processor, prompts, IMAGES, fetch, box_spans, max_new_tokens=9)
    assert [text for text, _ in found] == generate_texts(model, processor, prompts, IMAGES, fetch, max_new_tokens=9)
    assert all(confidences == [] for _, confidences in found)
    say(monkeypatch, processor, "none")
    fetched: list = []
    assert generate_with_confidences(model, processor, prompts, IMAGES, fetched.append, box_spans) == [("none", [])] * 4
    assert fetched == []


@pytest.mark.parametrize("size", [(640, 480), (112, 112), (3, 2000), (1, 1)])
def test_pixels_are_what_the_grid_was_made_of(size):
    width, height = size
    for box in ([0, 0, width, height], [width // 3, height // 2, max(1, width // 4), max(1, height // 5)]):
        x1, y1, x2, y2 = pixel_box(grid_box(box, list(size)), size)
        tolerance = max(size) / 1000 + 0.5
        assert (x1, y1, x2, y2) == pytest.approx((box[0], box[1], box[0] + box[2], box[1] + box[3]), abs=tolerance)
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
    assert pixel_box([999, 0, 999, 999], (640, 480)) == [639, 0, 640, 480]


def test_names_are_asked_as_in_training():
    asked = {"dog": "detect: dog", "red ball": "detect: red ball"}
    assert names_questions(" dog;red  ball ; dog;") == asked
    assert list(names_questions(" red ball; dog")) == ["red ball", "dog"]
    assert names_questions("detect: dog") == {"dog": "detect: dog"}
    assert names_questions("dog; [cat]", "find") == {"dog": "find dog", "cat": "find cat"}
    for nothing in ("", " ; ", "detect:", "[]"):
        with pytest.raises(ValueError, match="Expected names of what to look for"):
            names_questions(nothing)


def test_rows_with_wrong_confidences_are_named():
    row = {"id": "a", "prediction": "dog [0, 0, 9, 9]", "boxes": []}
    for wrong in ([], [0.5, 0.5], [1.5], [float("nan")], [True], 0.5, None):
        with pytest.raises(ValueError, match=r"row 'a': expected a number in 0\.\.1 for each .* 1 boxes"):
            score_rows("grounding", [row | {"confidences": wrong}])
    with pytest.raises(ValueError, match="row 'a': expected a list of names as asked"):
        score_rows("grounding", [row | {"asked": "dog"}])
    scores = score_rows("grounding", [row | {"confidences": [1]}, row | {"id": "b"}])
    assert "1 of 2 rows have no confidences, so AP ranks all boxes by their order." in scores.notes


# --- the command and the page ---


@pytest.fixture
def grounded(adapter, tmp_path):
    """The adapter as one of boxes."""
    folder = tmp_path / "boxes"
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / TASK_FILE).unlink()
    (folder / TASK_FILE).write_text(TaskSettings(task="grounding", max_new_tokens=80).to_json())
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process: exit status, records, standard error."""
    monkeypatch.setattr(__main__, "quiet_imports", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        capsys.readouterr()
        status = __main__.main(["detect", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], err

    yield run
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def pictures(tmp_path):
    """Noise in three files, of which `turned` is shown upright, 40 wide and 80 high; no picture in a fourth."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    noise = torch.randint(0, 60, (40, 80, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    image.save(folder / "plain.png")
    image.save(folder / "deeper" / "plain.webp")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_records_have_pixels_of_the_picture_as_it_is_seen(run, grounded, pictures, tmp_path, monkeypatch):
    say(monkeypatch, load_model(grounded)[1], TEXT)
    drawn = tmp_path / "drawn"
    status, found, _ = run(grounded, pictures, "--draw", drawn, "dog; caf\u00e9 au lait")
    assert status == 1
    broken, webp, png, turned = found
    assert [record["image"] for record in found] == [
        str(pictures / name) for name in ("broken.png", "deeper/plain.webp", "plain.png", "turned.jpg")
    ]
    assert "Cannot read the picture" in broken["error"]
    assert list(png) == ["image", "boxes", "unread", "drawn"]
    # Each name is asked for alone, and a box of another is none of its own.
    assert png["unread"] == ["caf\u00e9 au lait [500, 500, 999, 999]", "dog [3, 4", "dog [0, 0, 499, 249]"]
    lying, upright = (
        {box["label"]: box["box"] for box in record["boxes"]} for record in (png, turned)
    )  # fmt: skip
    assert lying == {"dog": [0, 0, 40, 10], "caf\u00e9 au lait": [40, 20, 80, 40]}
    assert upright == {"dog": [0, 0, 20, 20], "caf\u00e9 au lait": [20, 40, 40, 80]}
    for record in found[1:]:
        sure = [box["confidence"] for box in record["boxes"]]
        assert sure == sorted(sure, reverse=True)
        assert all(0 <= each <= 1 for each in sure)
    names = [record["drawn"] for record in (webp, png, turned)]
    assert names == [str(drawn / name) for name in ("plain-boxes.jpg", "plain-boxes-2.jpg", "turned-boxes.jpg")]
    # Upright, with a box's line where the noise is dark.
    with Image.open(turned["drawn"]) as copy:
        assert copy.size == (40, 80)
        assert max(copy.getpixel((38, 79))) > 100
    one = run(grounded, pictures / "plain.png", "DOG; Caf\u00e9 au lait", "--batch_size", 1)[1][0]
    assert one["boxes"] == png["boxes"]


def test_what_is_not_there_is_an_empty_list(run, grounded, pictures, monkeypatch):
    asked = []

    def fake(model, processor, encoded, *_, **__):
        asked.extend(processor.tokenizer.batch_decode(encoded))
        return [processor.tokenizer("none")["input_ids"]] * len(encoded)

    monkeypatch.setattr(confidence, "generate_ids", fake)
    status, (record,), err = run(grounded, pictures / "plain.png", " dog;cat ")
    assert (status, record, err) == (0, {"image": str(pictures / "plain.png"), "boxes": []}, "")
    assert "detect: dog<|im_end|>" in asked[0]
    assert "detect: cat<|im_end|>" in asked[1]
    run(grounded, pictures / "plain.png", "dog", "--instruction", "find:")
    assert "find: dog<|im_end|>" in asked[2]


def test_what_cannot_be_asked_is_said(run, adapter, grounded, pictures):
    for arguments, message in (
        ((grounded, pictures / "plain.png", pictures / "turned.jpg"), "Expected names after the pictures"),
        ((grounded, pictures / "plain.png", " ; "), "Expected names of what to look for"),
        ((adapter, pictures / "plain.png", "dog"), "was trained for the task caption"),
        ((grounded, pictures / "nowhere.png", "dog"), "nowhere.png is not there"),
    ):
        status, found, err = run(*arguments)
        assert (status, found) == (2, [])
        assert message in err


def test_a_model_without_a_task_file_is_asked_all_the_same(run, grounded, pictures):
    (grounded / TASK_FILE).unlink()
    status, (record,), err = run(grounded, pictures / "plain.png", "dog", "--max_new_tokens", 4)
    assert status == 0
    assert record["boxes"] == []
    assert f"has no {TASK_FILE}" in err


def test_labels_stay_in_the_picture():
    boxes = [
        (LabelledBox("a long name at the edge", (900, 0, 999, 50)), 0.5),
        (LabelledBox("b", (0, 0, 999, 999)), 1.0),
    ]
    for size in ((300, 200), (20, 900), (1, 1)):
        assert draw_boxes(Image.new("RGB", size), boxes).size == size
    # The label begins left of its box, which has no room for it.
    drawn = draw_boxes(Image.new("RGB", (300, 200)), boxes[:1])
    assert drawn.crop((250, 2, 265, 9)).getbbox() is not None


def test_the_page_draws_boxes_before_and_after(grounded, pictures, monkeypatch):
    torch.manual_seed(0)
    model, processor = load_model(grounded)
    settings = TaskSettings.read(grounded)
    answers = PictureAnswers(model, processor, settings)
    say(monkeypatch, processor, TEXT.replace("dog", "<b>dog"))
    adapted = []

    def known(model, processor, encoded, images, fetch, answers, **_):
        # LoRA is off in the answer from before.
        adapted.append(any(each.disable_adapters for each in model.modules() if hasattr(each, "lora_A")))
        return [[-0.01 * (1 + 2 * adapted[-1])] * len(ids) for ids in answers]

    monkeypatch.setattr(confidence, "answer_log_probs", known)
    after, (again, before) = answers.detect(pictures / "turned.jpg", "<b>dog; caf\u00e9 au lait")
    assert after == (again, "")
    assert adapted == [False, True]
    assert again != before
    for shown in (again, before):
        assert "<b>" not in shown
        assert shown.count('<rect class="predicted"') == 2
        assert 'viewBox="0 0 500 1000"' in shown
        assert re.search(r'<text class="predicted"[^>]*>&lt;b&gt;dog 0\.\d\d</text>', shown)
        assert "Also written: caf\u00e9 au lait [500, 500, 999, 999]; &lt;b&gt;dog [3, 4; &lt;b&gt;dog [0, 0" in shown
    say(monkeypatch, processor, "none")
    assert "Nothing was found." in list(answers.detect(pictures / "turned.jpg", "dog"))[1][1]
    with pytest.raises(ValueError, match="Expected names"):
        next(answers.detect(pictures / "turned.jpg", " "))
    page = make_page(answers, "boxes", [(str(pictures / "plain.png"), "detect: dog", "none")])
    parts = page.get_config_file()
    tabs = [part["props"]["label"] for part in parts["components"] if part["type"] == "tabitem"]
    assert tabs == ["Detect", "Describe", "Classify"]
    assert "detect" in [each["api_name"] for each in parts["dependencies"]]
