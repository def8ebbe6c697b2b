"""The page's functions in this process, and the page itself as a program that is asked over HTTP."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import quote

import pytest
import torch
from PIL import Image
from tiny_clips import save_tiny

from vlm_peft import VisionQwen, __main__
from vlm_peft.adapters.loading import load_model
from vlm_peft.commands import web_demo
from vlm_peft.commands.web_demo import (
    MAX_EXAMPLES,
    MAX_UPLOAD,
    ClipAnswers,
    PictureAnswers,
    find_examples,
    make_page,
    typed_labels,
)
from vlm_peft.contrastive.folder import load_clip
from vlm_peft.data.pictures import UnreadablePictureError, open_picture
from vlm_peft.evaluation.choices import picture_class_probabilities
from vlm_peft.evaluation.generation import generate_texts
from vlm_peft.tasks import TaskSettings
from vlm_peft.tasks.example import picture_turn

SETTINGS = TaskSettings(instruction="Say what you see.", max_new_tokens=6, num_beams=2)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture of noise."""
    noise = torch.randint(0, 256, (9, 12, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    file = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(noise.numpy()).save(file)
    return file


@pytest.fixture
def trained(adapter):
    """Model and processor; drawn as the command draws the projector that the adapter replaces."""
    torch.manual_seed(0)
    return load_model(adapter)


def expected(model, processor, picture, text: str) -> str:
    def fetch(ids):
        return {"pixel_values": processor.image_processor(open_picture(picture), return_tensors="pt")["pixel_values"]}

    prompts = [picture_turn(text)]
    return generate_texts(model, processor, prompts, [[0]], fetch, max_new_tokens=6, num_beams=2)[0]


@pytest.mark.parametrize(("question", "text"), [("", "Say what you see."), (" What is it? ", "What is it?")])
def test_after_comes_first_and_before_is_without_lora_and_projector(trained, picture, question, text):
    model, processor = trained
    after = expected(model, processor, picture, text)
    with model.disable_adapter():
        before = expected(model, processor, picture, text)
    assert after != before
    answers = PictureAnswers(model, processor, SETTINGS)
    assert answers.has_before
    assert list(answers(picture, question)) == [(after, ""), (after, before)]
    assert expected(model, processor, picture, text) == after
    # Before fine-tuning the projector had learnt nothing, and LoRA was not there.
    projector = model.get_base_model().model.multi_modal_projector
    with torch.no_grad():
        for parameter in projector.modules_to_save["default"].parameters():
            parameter.zero_()
    assert list(answers(picture, question))[1][1] == before


def test_a_full_save_has_no_before(adapter, picture):
    model = VisionQwen.from_adapter(adapter, merge=True)
    _, processor = load_model(adapter)
    answers = PictureAnswers(model, processor, SETTINGS)
    assert list(answers(picture, "")) == [(expected(model, processor, picture, "Say what you see."), "")]
    page = make_page(answers, "full", [])
    shown = {part["props"].get("label"): part["props"].get("visible") for part in page.get_config_file()["components"]}
    assert shown["After fine-tuning"] is True
    assert (shown["Before fine-tuning"], shown["References"]) == (False, False)


def test_a_file_that_is_no_picture_is_said(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UnreadablePictureError, match="Cannot read the picture"):
        next(PictureAnswers(*trained, SETTINGS)(tmp_path / "notes.txt", ""))


def test_visitors_open_pictures_one_at_a_time(trained, picture, monkeypatch):
    """Two large ones would not fit into a gigabyte."""
    opened = []

    def slowly(path):
        opened.append("begins")
        time.sleep(0.05)
        opened.append("ends")
        return open_picture(path)

    monkeypatch.setattr(web_demo, "open_picture", slowly)
    answers = PictureAnswers(*trained, SETTINGS)
    asked = [
        lambda: next(answers(picture, "")),
        lambda: answers.classify(picture, ["cat", "dog"]),
        lambda: next(answers.detect(picture, "cat")),
    ]
    threads = [threading.Thread(target=each) for each in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == ["begins", "ends"] * 3


def test_bases_are_named_without_the_folders_of_this_machine(trained):
    parts = PictureAnswers(*trained, SETTINGS).parts
    assert parts == "Fine-tuned with vlm_peft from the encoder clip and the decoder qwen3."


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def album(tmp_path, picture):
    """A folder with a picture whose name is markup, and with one that is none."""
    folder = tmp_path / "album"
    folder.mkdir()
    (folder / "<b>red.png").write_bytes(picture.read_bytes())
    Image.new("RGB", (8, 8), "blue").save(folder / "blue.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_labels_are_typed_in_with_commas_or_one_a_line():
    assert typed_labels(" cat, dog,,") == ["cat", "dog"]
    assert typed_labels("a cat, black\n a dog \n") == ["a cat, black", "a dog"]
    assert typed_labels("cat, dog\n") == ["cat", "dog"]
    assert typed_labels(" ") == []


def test_labels_get_the_probabilities_of_answers(trained, picture):
    model, processor = trained
    answers = PictureAnswers(model, processor, SETTINGS)
    found = answers.classify(picture, ["red", "blue"])
    expected = picture_class_probabilities(
        model, processor, [open_picture(picture)], ["red", "blue"], "Say what you see."
    )
    assert found == dict(zip(("red", "blue"), expected[0].tolist(), strict=True))
    for labels, said in ((["red"], "at least two labels"), (["red", "red"], "every label once")):
        with pytest.raises(ValueError, match=said):
            answers.classify(picture, labels)


def test_labels_get_those_of_a_clip(clip, picture):
    encoder = load_clip(clip)
    found = ClipAnswers(encoder).classify(picture, ["red", "blue"], "a {} thing")
    classes = encoder.embed_classes(["red", "blue"], ["a {} thing"])
    expected = encoder.probabilities(encoder.embed_pictures([open_picture(picture)]), classes)[0]
    assert list(found.values()) == pytest.approx(expected.tolist())
    with pytest.raises(ValueError, match=r"templates with \{\} where the label goes"):
        ClipAnswers(encoder).classify(picture, ["red", "blue"], "a thing")


def tabs(page) -> list[str]:
    return [part["props"]["label"] for part in page.get_config_file()["components"] if part["type"] == "tabitem"]


def test_a_page_has_the_tabs_that_its_model_can_fill(trained, clip, album, monkeypatch, capsys, tmp_path):
    assert tabs(make_page(PictureAnswers(*trained, SETTINGS), "title", [])) == ["Describe", "Classify"]
    pages = []
    monkeypatch.setattr(web_demo, "serve_page", lambda page, *address: pages.append(page))
    assert __main__.main(["demo", str(clip)]) == 0
    assert __main__.main(["demo", str(clip), "--search", str(album), "--index", str(tmp_path / "index")]) == 0
    assert [tabs(page) for page in pages] == [["Classify"], ["Classify", "Search"]]
    assert f"{album / 'broken.png'}: Cannot read the picture" in capsys.readouterr().err
    shown = json.dumps(pages[1].get_config_file())
    assert "2 pictures of the folder album" in shown
    assert str(tmp_path) not in shown
    # In a browser a label without a value ends the page's program.
    assert "() => null" not in shown
    assert __main__.main(["demo", str(clip), "--search", str(tmp_path / "nowhere")]) == 2
    assert "Expected a folder of pictures" in capsys.readouterr().err


def save_run(folder, picture, splits: dict[str, list[dict]]) -> None:
    """A run's folder with predictions and a thumbnail for each row."""
    for split, rows in splits.items():
        (folder / "eval" / split / "pictures").mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "eval" / split / "predictions.jsonl").write_text(lines)
        for row in rows:
            file = folder / "eval" / split / "pictures" / f"{quote(str(row['id']), safe='')}.webp"
            Image.open(picture).save(file, "WEBP")


def test_examples_come_from_all_splits_with_their_texts(tmp_path, picture):
    first = [{"id": f"a/{number:02}", "references": ["x", "y"]} for number in range(30)]
    save_run(tmp_path, picture, {"test": first, "vqa": [{"id": 7, "references": ["two"], "question": "How many?"}]})
    (tmp_path / "eval" / "vqa" / "pictures" / "unknown.webp").write_bytes(b"")
    (tmp_path / "eval" / "test-blind").mkdir()
    examples = find_examples(tmp_path)
    pictures = tmp_path / "eval"
    assert examples[:4] == [
        (str(pictures / "test" / "pictures" / "a%2F00.webp"), "", "x\ny"),
        (str(pictures / "vqa" / "pictures" / "7.webp"), "How many?", "two"),
        (str(pictures / "test" / "pictures" / "a%2F01.webp"), "", "x\ny"),
        (str(pictures / "vqa" / "pictures" / "unknown.webp"), "", ""),
    ]
    assert len(examples) == MAX_EXAMPLES
    assert find_examples(tmp_path / "nowhere") == []


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys, adapter):
    monkeypatch.setattr(__main__.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(__main__, "quiet_imports", lambda: None)
    assert __main__.main(["demo", str(adapter)]) == 2
    assert capsys.readouterr().err == 'vlm-peft demo: The page needs Gradio: pip install "vlm-peft[demo]"\n'


def fetch_text(address: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    # A proxy in the environment is not for this machine.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        return response.read().decode()


META = {"_type": "gradio.FileData"}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def upload(address: str, content: bytes) -> dict:
    """Uploads a file to the page; what stands for it in a call."""
    head = b'--part\r\nContent-Disposition: form-data; name="files"; filename="noise.png"\r\n\r\n'
    request = urllib.request.Request(
        f"{address}/gradio_api/upload",
        head + content + b"\r\n--part--\r\n",
        {"Content-Type": "multipart/form-data; boundary=part"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        (stored,) = json.load(response)
    return {"path": stored, "meta": META}


def test_the_page_answers_over_http_and_names_no_other_machine(adapter, trained, picture, clip, album, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    searched = ["--search", album, "--clip", clip, "--index", tmp_path / "index"]
    folder = tmp_path / "mine"
    folder.symlink_to(adapter, target_is_directory=True)
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        server = subprocess.Popen(
            [sys.executable, "-m", "vlm_peft", "demo", folder, "--port", str(port), *searched],
            stdout=out,
            stderr=err,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "GRADIO_TEMP_DIR": str(tmp_path)},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            if (tmp_path / "out").read_text() or server.poll() is not None:
                break
            time.sleep(0.1)
        assert (tmp_path / "out").read_text() == f"The page is at {address}/ (Ctrl-C ends it).\n"

        with socket.socket() as other:
            # This address only: the machine's others are not listened on.
            assert other.connect_ex(("127.0.0.2", port)) != 0
        page = fetch_text(address)
        sources = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
        sources += re.findall(r"url\(['\"]?([^'\")]+)", page + fetch_text(f"{address}/theme.css"))
        assert any("assets/" in source for source in sources)
        assert not [source for source in sources if re.match(r"(https?:)?//", source)]
        assert json.loads(fetch_text(f"{address}/config"))["analytics_enabled"] is False

        def called(name: str, *data) -> tuple[str, str]:
            """The last event of an answer, and its data."""
            call = f"{address}/gradio_api/call/{name}"
            event = json.loads(fetch_text(call, {"data": data}))["event_id"]
            return re.findall(r"event: (\w+)\ndata: (.*)\n", fetch_text(f"{call}/{event}"))[-1]

        def said(file: dict | None, question: str) -> tuple[str, str]:
            return called("answer", file, question)

        kind, answer = said(upload(address, picture.read_bytes()), "What is it?")
        assert kind == "complete"
        refusals = [(None, "Choose a picture first"), (upload(address, b"no picture"), "Cannot read the picture")]
        # Pillow itself would hand it to a program, whatever its name says.
        refusals += [(upload(address, EPS), "Cannot read the picture")]
        url = f"data:image/png;base64,{base64.b64encode(EPS).decode()}"
        refusals += [({"url": url, "path": None, "meta": META}, "Upload the picture as a file")]
        for file, message in refusals:
            kind, data = said(file, "")
            assert kind == "error"
            assert message in data
        kind, shares = called("classify", upload(address, picture.read_bytes()), "red, blue")
        assert kind == "complete"
        for file, labels, message in (
            (None, "red, blue", "Choose a picture first"),
            (upload(address, EPS), "red, blue", "Cannot read the picture"),
            (upload(address, picture.read_bytes()), "red", "at least two labels"),
        ):
            kind, data = called("classify", file, labels)
            assert kind == "error"
            assert message in data
        kind, found = called("search", "red")
        assert kind == "complete"
        kind, data = called("search", " ")
        assert (kind, "Expected a text to search for" in data) == ("error", True)
        with pytest.raises(urllib.error.HTTPError) as caught:
            upload(address, bytes(MAX_UPLOAD + 1))
        assert caught.value.code == 413
        assert caught.value.read() == b"File size exceeded maximum allowed size of 50000000 bytes."
    finally:
        server.send_signal(signal.SIGINT)
        status = server.wait(60)
    told = (tmp_path / "err").read_text()
    assert status == 130
    assert re.sub(r"(?<=: ).*", "", told) == f"{album / 'broken.png'}: \nEncoded 2 of 2 pictures.\n"
    # Names of files are text, and where the folder lies is not said.
    (cards,) = json.loads(found)
    assert cards.count("<img") == 2
    assert "&lt;b&gt;red.png" in cards
    assert str(tmp_path) not in cards
    expected_shares = PictureAnswers(*trained, SETTINGS).classify(picture, ["red", "blue"])
    confidences = {each["label"]: each["confidence"] for each in json.loads(shares)[0]["confidences"]}
    assert confidences == pytest.approx(expected_shares, abs=1e-5)
    model, processor = trained
    with model.disable_adapter():
        before = expected(model, processor, picture, "What is it?")
    assert json.loads(answer) == [expected(model, processor, picture, "What is it?"), before]
