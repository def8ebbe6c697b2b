"""The command vlm-peft: in this process where that is enough, as a program where the program is what is tested."""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from PIL import Image
from transformers.generation.streamers import BaseStreamer

import vlm_peft
from vlm_peft import VisionQwen, __main__
from vlm_peft.adapters.loading import load_model
from vlm_peft.commands import caption as captioning
from vlm_peft.commands import inspect as inspecting
from vlm_peft.commands.caption import ask, caption_pictures, find_pictures
from vlm_peft.commands.chat import Conversation
from vlm_peft.data.pictures import open_picture
from vlm_peft.evaluation.generation import generate_texts
from vlm_peft.hub import models as hub
from vlm_peft.model.modeling_vision_qwen import base_model
from vlm_peft.report.model_card import card_for_others
from vlm_peft.tasks import TASK_FILE, TaskSettings
from vlm_peft.tasks.example import picture_turn

COMMANDS = ("caption", "chat", "convert", "demo", "detect", "export", "push")
SCRIPT = Path(sysconfig.get_path("scripts"), "vlm-peft")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three pictures of noise in a folder, one of them below another folder; a hidden one; a text file."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(3)
    for name in ("b.png", "a.jpg", "deeper/c.webp", ".thumbnails/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        noise = torch.randint(0, 256, (9, 12, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def trained(adapter):
    """Model and processor of the adapter."""
    return load_model(adapter)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process: exit status, standard output, standard error."""
    # What a program hides for good, a test must leave as it was.
    monkeypatch.setattr(__main__, "quiet_imports", lambda: None)

    def run(*arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        status = __main__.main([str(each) for each in arguments])
        return status, *capsys.readouterr()

    yield run
    transformers.utils.logging.enable_progress_bar()


def expected_texts(trained, files, text: str, **decoding) -> list[str]:
    """What the model says about each file, one by one, past the code under test."""
    model, processor = trained

    def fetch(ids):
        opened = [open_picture(files[index]) for index in ids]
        return {"pixel_values": processor.image_processor(opened, return_tensors="pt")["pixel_values"]}

    def describe(index):
        return generate_texts(model, processor, [picture_turn(text)], [[index]], fetch, **decoding)[0]

    return [describe(index) for index in range(len(files))]


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


# --- the program ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval"], "vlm-peft eval: error: the following arguments are required: --model, --dataset"),
        (["score", "nowhere.jsonl"], "vlm-peft score: [Errno 2] No such file or directory: 'nowhere.jsonl'"),
        (["inspect", "--rows", "0"], "vlm-peft inspect: error: --rows: expected at least 1, got 0"),
        (["inspect", "--lora_q", "3", "--use_cpu", "true"], "vlm-peft inspect: unknown option: 'lora_q'"),
        (["train", "--lora_q", "3", "--use_cpu", "true"], "vlm-peft train: unknown option: 'lora_q'"),
    ],
)
def test_commands_with_options_of_their_own_are_called_by_their_names(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(__main__, "quiet_imports", lambda: None)
    monkeypatch.setattr(inspecting, "quiet_imports", lambda: None)
    try:
        status = __main__.main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(said)


@pytest.mark.parametrize("program", [["-m", "vlm_peft"], [str(SCRIPT)]], ids=["module", "script"])
@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_loads_neither_torch_nor_transformers(program, command):
    arguments = [command] if command else []
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *program, *arguments, "--help"], capture_output=True, text=True, check=True
    )
    assert f"usage: vlm-peft {command or ''}".strip() in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "vlm_peft" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "gradio", "PIL", "numpy"}


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["/usr/bin/vlm-peft", "caption"], ["python", "/usr/bin/vlm-peft", "caption"], True),
        ([str(ROOT / "eval" / "score.py")], ["python", "eval/score.py"], True),
        (["elsewhere/eval/score.py"], ["python", "elsewhere/eval/score.py"], False),
        (["-m", "--help"], ["python", "-X", "utf8", "-m", "vlm_peft", "--help"], True),
        (["-m", "vlm_peft"], ["python", "-m", "mine.train", "vlm_peft"], False),
        (["train.py", "-m", "vlm_peft"], ["python", "train.py", "-m", "vlm_peft"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_only_the_command_itself_defers_loading(monkeypatch, argv, orig_argv, expected):
    """Everywhere else `import vlm_peft` alone must register the Auto classes."""
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    for name in vlm_peft.__all__:
        monkeypatch.delattr(vlm_peft, name)
    assert ("VisionQwen" in vars(importlib.reload(vlm_peft))) is not expected
    assert vlm_peft.VisionQwen is VisionQwen
    assert set(vlm_peft.__all__) <= set(vars(vlm_peft))
    with pytest.raises(AttributeError, match="has no attribute 'VisionGwen'"):
        vlm_peft.VisionGwen  # noqa: B018


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(adapter, pictures):
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm_peft", "caption", adapter, pictures, "--batch_size", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


def test_a_misspelt_command_is_told_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["captoin", "folder"])
    assert "no command 'captoin': did you mean 'caption'?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["zzz"])
    err = capsys.readouterr().err
    assert (
        "no command 'zzz': there are train, eval, score, sweep, inspect, doctor, synthesize, caption, detect, chat, "
        in err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("caption", "{adapter}", "{pictures}", "--batch_size", "0"), "at least 1, got '0'"),
        (("demo", "{adapter}", "--port", "70000"), "a number from 1 to 65535, got '70000'"),
        (("demo", "{adapter}", "--share", "maybe"), "expected true or false, got 'maybe'"),
        (("caption", "{adapter}", "{pictures}", "--batch", "2"), "unrecognized arguments: --batch 2"),
    ],
)
def test_options_that_are_none(run, capsys, adapter, pictures, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        run(*(each.format(adapter=adapter, pictures=pictures) for each in arguments))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("caption", "/no/such/folder", "{pictures}"), "The model /no/such/folder is not there: expected a folder"),
        (("caption", "nobody/nothing", "{pictures}"), "no folder here, and the Hub does not give it: .*nobody/nothing"),
        (("caption", "{adapter}", "{pictures}/none.jpg"), "The picture .*none.jpg is not there"),
        (("caption", "{adapter}", "{empty}"), "The folder .* holds no pictures"),
        (("caption", "{pictures}", "{pictures}"), "holds no trained model: .* it holds .*a.jpg, b.png"),
        (("caption", "{empty}", "{pictures}"), "holds no trained model: .* it holds nothing"),
        (("caption", "{adapter}", "{pictures}", "--device", "cuda:99"), "--device cuda:99 cannot be used here: "),
        (("chat", "{adapter}", "{pictures}/notes.txt"), "Cannot read the picture: .*notes.txt"),
        (("push", "{adapter}", "me/mine"), r"encoder is the local folder .*--vision owner/name"),
        (("export", "{adapter}", "{pictures}", "--to", "merged"), "is there already and not empty"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(run, adapter, pictures, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    folders = {"adapter": adapter, "pictures": pictures, "empty": tmp_path / "empty"}
    status, out, err = run(*(each.format(**folders) for each in arguments))
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"vlm-peft {arguments[0]}: ")
    assert re.search(message, last), last


def test_ctrl_c_ends_quietly_and_a_fault_keeps_its_traceback(run, adapter, pictures, monkeypatch):
    def raises(error):
        def find_pictures(inputs, stdin):
            raise error

        monkeypatch.setattr(captioning, "find_pictures", find_pictures)

    raises(KeyboardInterrupt())
    assert run("caption", adapter, pictures) == (130, "", "")
    raises(TypeError("a fault"))
    with pytest.raises(TypeError, match="a fault"):
        run("caption", adapter, pictures)
    raises(ValueError("not one of our checks"))
    with pytest.raises(ValueError, match="not one of our checks"):
        run("caption", adapter, pictures)


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "tokenizer.json", "adapter_model.safetensors"])
def test_a_damaged_file_is_said(run, adapter, pictures, tmp_path, name):
    folder = shutil.copytree(adapter, tmp_path / "damaged")
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    status, out, err = run("caption", folder, pictures)
    assert (status, out) == (2, "")
    assert re.search(
        r"vlm-peft caption: .*damaged.*: copy (or download it again|it again, or make it anew)\.$", err.splitlines()[-1]
    )


# --- caption ---


def test_captions_are_json_lines_in_the_order_of_the_files(run, adapter, trained, pictures):
    files = [str(pictures / name) for name in ("a.jpg", "b.png", "deeper/c.webp")]
    status, out, err = run("caption", adapter, files[1], pictures)
    assert (status, err) == (0, "")
    assert [record["image"] for record in records(out)] == [files[1], *files]
    expected = expected_texts(trained, files, "Say what you see.", max_new_tokens=6, num_beams=2)
    assert [record["caption"] for record in records(out)] == [expected[1], *expected]
    assert len(set(expected)) > 1
    assert run("caption", adapter, files[1], pictures, "--batch_size", "3")[1] == out


def test_options_change_what_is_asked_and_how(run, adapter, trained, pictures):
    file = pictures / "a.jpg"
    for options, text, decoding in (
        (("--question", "What is it?"), "What is it?", {"max_new_tokens": 6, "num_beams": 2}),
        (("--instruction", "Look!"), "Look!", {"max_new_tokens": 6, "num_beams": 2}),
        (("--num_beams", 1, "--max_new_tokens", 9), "Say what you see.", {"max_new_tokens": 9, "num_beams": 1}),
    ):
        (record,) = records(run("caption", adapter, file, *options)[1])
        assert [record["caption"]] == expected_texts(trained, [file], text, **decoding)
    assert run("caption", adapter, file, "--dtype", "bfloat16", "--device", "cpu")[0] == 0


def test_ask_words_it_as_in_training():
    captions = TaskSettings(instruction="Say what you see.")
    answers = TaskSettings(task="vqa", instruction="Answer with a word.")
    assert ask(captions) == "Say what you see."
    assert ask(TaskSettings()) == ask(answers) == "Describe the picture."
    assert ask(captions, instruction="Look!") == ask(answers, instruction="Look!") == "Look!"
    assert ask(captions, "What is it?") == ask(TaskSettings(task="vqa"), "What is it?") == "What is it?"
    assert ask(answers, "What is it?") == "What is it? Answer with a word."
    assert ask(answers, "What is it?", "Be brief.") == "What is it? Be brief."


def test_an_unreadable_picture_costs_the_others_nothing(run, adapter, pictures):
    good = run("caption", adapter, pictures / "a.jpg", pictures / "b.png")[1].splitlines()
    paths = [pictures / "a.jpg", pictures / "notes.txt", "nowhere.png", "", pictures / "b.png"]
    stdin = b"\r\n".join(os.fsencode(path) for path in paths)
    status, out, _ = run("caption", adapter, "-", "--batch_size", 2, stdin=stdin)
    assert status == 1
    assert [*out.splitlines()[:1], *out.splitlines()[3:]] == good
    text_file, missing = records(out)[1:3]
    assert (text_file["image"], missing["image"]) == (str(pictures / "notes.txt"), "nowhere.png")
    assert "cannot identify image file" in text_file["error"]
    assert "No such file" in missing["error"]
    assert "caption" not in text_file


def test_a_name_that_is_no_text_survives_the_round_trip(run, adapter, pictures, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    shutil.copy(pictures / "a.jpg", name)
    (record,) = records(run("caption", adapter, "-", stdin=name + b"\n")[1])
    assert os.fsencode(record["image"]) == name
    assert "caption" in record


def test_paths_are_read_no_further_than_a_batch_ahead(trained, pictures):
    asked = []

    def paths():
        for _ in range(5):
            asked.append(pictures / "a.jpg")
            yield str(pictures / "a.jpg")

    first = next(caption_pictures(*trained, paths(), "Say what you see.", batch_size=2, max_new_tokens=2))
    assert "caption" in first
    assert len(asked) == 2


def test_of_a_batch_one_picture_is_open_at_a_time(trained, pictures, monkeypatch):
    """Sixteen large ones would take more than a gigabyte."""
    opened = []

    def opens(path):
        # What was opened last is let go when this one comes.
        assert sum(each() is not None for each in opened) <= 1
        found = open_picture(path)
        opened.append(weakref.ref(found))
        return found

    monkeypatch.setattr(captioning, "open_picture", opens)
    found = list(caption_pictures(*trained, [str(pictures / "a.jpg")] * 5, "Say.", batch_size=5, max_new_tokens=2))
    assert len({record["caption"] for record in found}) == 1
    assert len(opened) == 5


def test_folders_are_searched_below_and_hidden_files_left_out(pictures):
    found = find_pictures([str(pictures), str(pictures / "notes.txt")], io.BytesIO())
    assert found == [str(pictures / name) for name in ("a.jpg", "b.png", "deeper/c.webp", "notes.txt")]
    assert list(find_pictures(["-", str(pictures / "b.png")], io.BytesIO(b"x\n\ny"))) == [
        "x",
        "y",
        str(pictures / "b.png"),
    ]


def test_a_merged_export_says_the_same_and_says_when_task_json_is_missing(run, adapter, pictures, tmp_path):
    status, out, _ = run("export", adapter, tmp_path / "merged", "--to", "merged")
    assert (status, out) == (0, f"Written and loaded again: {tmp_path / 'merged'}\n")
    expected = run("caption", adapter, pictures)
    assert run("caption", tmp_path / "merged", pictures) == expected
    (tmp_path / "merged" / TASK_FILE).unlink()
    status, out, err = run("caption", tmp_path / "merged", pictures)
    assert (status, out == expected[1]) == (0, False), err
    assert f"has no {TASK_FILE}" in err
    # The folder's own generation settings ask for two beams, which cannot be streamed.
    assert run("chat", tmp_path / "merged", pictures / "a.jpg", stdin=b"Hello\n")[0] == 0
    said = run("caption", tmp_path / "merged", pictures, "--text", "elsewhere")[2]
    assert "leave --vision, --text and --load_in_4bit out" in said


def test_bases_that_moved(run, adapter, bases, pictures, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "moved")
    config = folder / "config.json"
    config.write_text(config.read_text().replace(str(bases[1]), "/was/here/qwen3"))
    status, _, err = run("caption", folder, pictures)
    assert status == 2
    assert "/was/here/qwen3" in err
    assert run("caption", folder, pictures, "--text", bases[1])[:2] == run("caption", adapter, pictures)[:2]


def test_push_hands_everything_over(run, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        hub, "push_adapter", lambda *names, **options: calls.append((names, options)) or "https://there"
    )
    assert run("push", tmp_path, "me/mine", "--private", "--vision", "them/clip") == (0, "https://there\n", "")
    options = {"card": card_for_others, "private": True, "revision": None, "vision": "them/clip", "text": None}
    assert calls == [((tmp_path, "me/mine"), options)]


# --- chat ---


def test_a_conversation_remembers_turns_and_pictures(trained, pictures):
    model, processor = trained
    conversation = Conversation(model, processor, max_new_tokens=5)
    conversation.add_picture(pictures / "a.jpg")
    first = conversation.ask("What is it?")
    conversation.add_picture(pictures / "b.png")
    second = conversation.ask("And this?")

    def fetch(ids):
        files = [pictures / ("a.jpg", "b.png")[index] for index in ids]
        return {
            "pixel_values": processor.image_processor([*map(open_picture, files)], return_tensors="pt")["pixel_values"]
        }

    def expected(messages, images):
        return generate_texts(model, processor, [messages], [images], fetch, max_new_tokens=5)[0]

    history = picture_turn("What is it?")
    assert first == expected(history, [0])
    history += [{"role": "assistant", "content": first}, *picture_turn("And this?")]
    assert second == expected(history, [0, 1])
    conversation.reset()
    assert conversation.ask("Hello") == expected(picture_turn("Hello", pictures=0), [])


def test_a_conversation_that_outgrows_the_model_is_left_as_it_was(trained, pictures):
    conversation = Conversation(*trained, max_new_tokens=5)
    conversation.add_picture(pictures / "a.jpg")
    with pytest.raises(ValueError, match=r"its answer may take 5, more than the 512 .* start over"):
        conversation.ask("word " * 120)
    fresh = Conversation(*trained, max_new_tokens=5)
    fresh.add_picture(pictures / "a.jpg")
    assert conversation.ask("What is it?") == fresh.ask("What is it?")


def test_chat_reads_questions_from_a_pipe(run, adapter, trained, pictures):
    stdin = f"""
What is it?
/image {pictures / "nowhere.png"}
/frobnicate
/reset
/image '{pictures / "b.png"}'
What is it?
/quit
never asked
"""
    status, out, err = run("chat", adapter, pictures / "a.jpg", stdin=stdin.encode())
    conversation = Conversation(*trained, max_new_tokens=6)
    conversation.add_picture(pictures / "a.jpg")
    expected = [conversation.ask("Say what you see."), conversation.ask("What is it?")]
    conversation.reset()
    conversation.add_picture(pictures / "b.png")
    expected.append(conversation.ask("What is it?"))
    assert status == 0
    assert out.split() == " ".join(expected).split()
    assert "nowhere.png" in err
    assert "There is no /frobnicate. /image PATH adds a picture" in err
    assert run("chat", adapter, stdin=b"")[:2] == (0, "")


def test_answers_are_streamed(trained, pictures):
    """Each token reaches the streamer before the next one is made."""

    class Streamer(BaseStreamer):
        puts, calls = 0, []

        def put(self, value):
            self.puts += 1

        def end(self):
            self.calls.append(self.puts)

    model, processor = trained
    streamer, seen = Streamer(), []
    hook = base_model(model).model.register_forward_pre_hook(lambda *_: seen.append(streamer.puts))
    conversation = Conversation(model, processor, max_new_tokens=4)
    conversation.add_picture(pictures / "a.jpg")
    conversation.ask("What is it?", streamer)
    hook.remove()
    assert seen == [1, 2, 3, 4]
    assert streamer.calls == [5]
