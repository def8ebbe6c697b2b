"""The teacher: what is asked, kept, judged and written; servers that fail, and runs that are killed."""

import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import HOSTILE, ROOT
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage
from teacher_server import FAILURES, caption, teach

from vlm_peft.teacher import filters, synthesize
from vlm_peft.teacher.filters import judge, near_duplicates
from vlm_peft.teacher.journal import Journal
from vlm_peft.teacher.options import parse_arguments
from vlm_peft.teacher.prompts import AnswerError, Prompt, named_prompts, read_prompt
from vlm_peft.teacher.questions import data_address, sent_picture, sent_size

ASK = "Say what you see."


def save_pictures(folder: Path, count: int = 12, first: int = 0) -> Path:
    """A folder of PNG files, each of another shade."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        PILImage.new("RGB", (12, 10), (index % 256, 40 * (index // 256), 99)).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with twelve pictures and a prompt of one's own."""
    save_pictures(tmp_path / "pictures")
    (tmp_path / "ask.txt").write_text(ASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments, url: str | list[str] | None = None, out: str = "out", **options) -> int:
    """The recipe in this process."""
    given = {"dataset_name": "pictures", "prompts": "ask.txt", "teacher": "them", "output_dir": out, "english": "false"}
    given |= {"first_wait": "0.01", "request_timeout": "5"} | {name: str(value) for name, value in options.items()}
    urls = [] if url is None else ["--base_url", *([url] if isinstance(url, str) else url)]
    return synthesize.main([*arguments, *(word for pair in given.items() for word in (f"--{pair[0]}", pair[1])), *urls])


def rows_of(out: str | Path = "out", split: str = "train") -> list[dict]:
    """Stored rows without the time at which they were answered."""
    path = Path(out, "data", f"{split}-00000-of-00001.parquet")
    return pq.read_table(path).drop_columns(["time"]).to_pylist() if path.is_file() else []


def records_of(out: str | Path = "out") -> list[dict]:
    """Answers in all journals, but for a line that was not finished."""
    lines = [line for path in Path(out, "answers").glob("*.jsonl") for line in path.open() if line.endswith("\n")]
    return [found for line in lines if "picture" in (found := json.loads(line))]


# --- what is asked, and what answers must be ---


def test_named_prompts_are_five_captions_questions_chats_boxes_and_text():
    prompts = {name: read_prompt(name) for name in named_prompts()}
    assert Counter(prompt.task for prompt in prompts.values()) == {"caption": 6, "vqa": 1, "chat": 1, "grounding": 1}
    for prompt in prompts.values():
        # What an answer must be is said where the schema is not sent, too.
        for key in prompt.shape.schema["required"] if prompt.shape.schema else ():
            assert f'Answer with JSON alone: {{"{key}": [' in prompt.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text: [a]", "text: expected a str"),
        ("words: [3]\ntext: a", "words: expected the least and the most"),
        ("task: poem\ntext: a", "expected a task of caption, vqa, chat, grounding"),
        ("txt: a", "unknown key 'txt'"),
        ("task: vqa", "text is missing"),
    ],
)
def test_a_prompt_of_ones_own_is_looked_at(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_prompt(str(tmp_path / "mine.yaml"))
    with pytest.raises(FileNotFoundError, match="expected boxes, caption_alt_text"):
        read_prompt("no_such")


QA = '{"questions": [{"question": "How many? ", "answer": " two"}]}'
TURNS = '{"turns": [{"question": "What?", "answer": "A dog."}, {"question": "Its colour?", "answer": "Brown."}]}'


def parse(task: str, answer: str, boxes: str = "pixels"):
    prompt = Prompt("p", ASK, task, boxes=boxes)
    # A picture of 200 x 100 pixels that was sent as 100 x 50.
    return prompt.shape.parse(answer, [200, 100, 100, 50], boxes)


def test_answers_become_cells_that_the_tasks_read():
    from vlm_peft.tasks import make_task

    assert parse("caption", ' "A dog." ') == {"caption": "A dog."}
    assert parse("caption", '"Stop" and "go"') == {"caption": '"Stop" and "go"'}
    for answer in (QA, f"```json\n{QA}\n```"):
        cells = parse("vqa", answer)
        assert cells == {"questions": [{"question": "How many?", "answer": "two"}]}
        assert make_task("vqa", ["image", "questions"]).example(cells).references == [["two"]]
    chat = make_task("chat", ["image", "messages"]).example(parse("chat", TURNS) | {"id": "a"})
    assert [turn["role"] for turn in chat.prompt] == ["user", "assistant", "user"]
    assert chat.prompt[0]["content"][0] == {"type": "image"}
    assert chat.references == [["Brown."]]
    box = '{"objects": [{"name": "dog", "box": [10, 0, 50, 50]}]}'
    assert parse("grounding", box) == {"objects": [{"name": "dog", "box": [20, 0, 80, 100]}]}
    assert parse("grounding", box, "thousandths") == {"objects": [{"name": "dog", "box": [2.0, 0.0, 8.0, 5.0]}]}


@pytest.mark.parametrize(
    ("task", "answer", "said"),
    [
        ("vqa", "Here it is: " + QA, "no JSON"),
        ("vqa", QA[:-3], "no JSON"),
        ("vqa", "[]", "the list 'questions' alone"),
        ("vqa", '{"questions": []}', "the list 'questions' alone"),
        ("vqa", QA[:-1] + ', "note": 1}', "the list 'questions' alone"),
        ("vqa", '{"questions": [{"question": "How?"}]}', "not just question and answer"),
        ("vqa", '{"questions": [{"question": "How?", "answer": 2}]}', "without text"),
        ("chat", '{"turns": [{"question": " ", "answer": "b"}]}', "without text"),
        ("grounding", '{"objects": [{"name": "a", "box": [0, 0, NaN, 9]}]}', "no JSON"),
        ("grounding", '{"objects": [{"name": "a", "box": [0, 0, 9]}]}', "not four numbers"),
        ("grounding", '{"objects": [{"name": "a", "box": [9, 9, 9, 12]}]}', "empty or outside"),
        ("grounding", '{"objects": [{"name": "a", "box": [0, 0, 9, 52]}]}', "empty or outside"),
        ("grounding", '{"objects": [{"name": "", "box": [0, 0, 9, 9]}]}', "without a name"),
    ],
)
def test_answers_in_json_are_read_strictly(task, answer, said):
    with pytest.raises(AnswerError, match=said):
        parse(task, answer)


def test_pictures_are_scaled_before_they_are_sent():
    assert sent_size([4000, 3000], 1024) == [1024, 768]
    assert sent_size([640, 480], 1024) == [640, 480]
    # A teacher that scales to multiples of 28 itself changes nothing, and boxes fit.
    assert sent_size([640, 480], 1024, 28) == [644, 476]
    assert sent_picture(PILImage.new("RGB", (300, 200)), 150).size == (150, 100)


# --- why answers are rejected ---

GOOD = "A brown dog runs over a lawn beside a red ball in the sun."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("A sign that says: I can't stop.", None),
        ("ha ha ha", None),
        ("", filters.EMPTY),
        (" ... !", filters.EMPTY),
        ("I'm sorry, but I can't help with that.", filters.REFUSED),
        ("I\u2019m unable to view images.", filters.REFUSED),
        ("As an AI language model, I see no dog.", filters.REFUSED),
        ("No image was provided. Please upload an image.", filters.REFUSED),
        (f"{GOOD}<|im_end|>", filters.SPECIAL),
        ("<think> a dog </think> A dog on the lawn.", filters.SPECIAL),
        ("A dog and a dog and a dog and a dog and a dog on the lawn.", filters.REPEATED),
        (f"{GOOD} {GOOD} {GOOD}", filters.REPEATED),
        ("the the the the dog", filters.REPEATED),
        ("一只狗在草地上跑", filters.LANGUAGE),
        ("Ein brauner Hund rennt neben einem roten Ball durch den Garten.", filters.LANGUAGE),
        ("A dog.", filters.TOO_SHORT),
        (" ".join(f"word{number} of" for number in range(30)), filters.TOO_LONG),
    ],
)
def test_texts_are_judged(text, reason):
    assert judge([text], "stop", length=(3, 40), english=True) == reason


def test_texts_that_were_cut_off_and_those_of_other_languages_if_they_are_wanted():
    assert judge([GOOD], "length", length=(None, None), english=True) == filters.TRUNCATED
    assert judge(["一只狗在草地上跑"], "stop", length=(None, None), english=False) is None


def test_near_duplicates_are_those_whose_word_triples_are_shared():
    words = [f"w{number}" for number in range(60)]
    base = " ".join(words)
    near = " ".join([*words[:30], "other", *words[31:]])  # 55 of 61 triples
    far = " ".join([*words[:30], *reversed(words[30:])])
    texts = [base, near, far, base.upper() + ".", "a dog", "A dog!", "a cat"]
    assert near_duplicates(texts, 0.9) == [None, 0, None, 0, None, 4, None]
    assert near_duplicates(texts, 0.95) == [None, None, None, 0, None, 4, None]
    # Against all pairs, on texts that differ more and more.
    draw = random.Random(0)
    shares = [draw.random() * 0.1 for _ in range(150)]
    many = [" ".join(draw.choice(words) if draw.random() < share else word for word in words) for share in shares]
    sets = [filters._shingles(text) for text in many]
    kept: list[int] = []
    for number, found in enumerate(near_duplicates(many, 0.7)):
        expected = next((other for other in kept if filters._jaccard(sets[number], sets[other]) >= 0.7), None)
        assert found == expected
        kept += [number] if found is None else []
    assert 1 < len(kept) < 149


# --- the journal ---

SETTING = {"teacher": "them", "prompt": ASK}


def record(picture: str, text: str = "a") -> dict:
    return {"picture": picture, "sample": 0, "text": text}


def test_a_torn_or_damaged_line_is_asked_again_and_nothing_else(tmp_path):
    with Journal(tmp_path, SETTING) as journal:
        for name in "abc":
            journal.add(record(name))
        journal.add(record("a", "another"))
    whole = journal.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 4
    for length in range(len(whole)):
        journal.path.write_bytes(whole[:length])
        with Journal(tmp_path, SETTING) as torn:
            stored = whole[:length].count(b"\n") - 1
            assert len(torn.records) == max(stored, 0)
            for name in "abc":
                torn.add(record(name))
        assert torn.path.read_bytes() == whole
    journal.path.write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2] + lines[3])
    with Journal(tmp_path, SETTING) as damaged:
        assert [key[0] for key in damaged.records] == ["b", "c"]


def test_another_way_of_asking_is_another_file_and_one_process_writes(tmp_path):
    with Journal(tmp_path, SETTING) as journal, Journal(tmp_path, SETTING | {"temperature": 1.0}) as other:
        journal.add(record("a"))
        assert journal.path != other.path
        assert not other.records
        with pytest.raises(ValueError, match="Another process is asking the same"):
            Journal(tmp_path, SETTING)


# --- the whole way ---


def test_a_folder_of_pictures_becomes_a_data_set(place, capsys):
    with teach() as server:
        assert run(url=server.url) == 0
        assert len(server.asked) == 12
        # Nothing is asked twice, and equal files are one picture.
        (place / "pictures" / "copy.png").write_bytes((place / "pictures" / "003.png").read_bytes())
        (place / "pictures" / "broken.png").write_bytes(b"no picture")
        assert run(url=server.url) == 1
        assert len(server.asked) == 12
    body = server.bodies[0]
    assert body["model"] == "them"
    assert body["messages"][0]["content"][1] == {"type": "text", "text": ASK}
    assert (body["temperature"], body["max_tokens"]) == (0.0, 256)
    said = capsys.readouterr().out
    assert "1 rows: picture of an earlier row." in said
    assert "Cannot read the picture" in said
    rows = load_dataset("out", split="train")
    assert len(rows) == 12
    assert rows.features["image"] == Image()
    row = rows[4]
    assert row["image"].getpixel((0, 0)) == (4, 0, 99)
    assert row["source"] == "004.png"
    assert row["caption"] == row["answer"]
    assert set(rows["caption"]) == {caption(name.split()[0]) for name in server.asked}
    assert (row["teacher"], row["sample"], row["finish"], row["tokens"]) == ("them", 0, "stop", 7)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["time"])
    assert row["rejected_because"] is None
    assert json.loads(Path("out/task.json").read_text())["task"] == "caption"
    summary = json.loads(Path("out/synthesis.json").read_text())
    assert (summary["answers"], summary["accepted"], summary["this_run"]["known_before"]) == (12, 12, 12)


def test_what_is_written_goes_straight_into_training(place, processor):
    from vlm_peft.data.arguments import DataArguments
    from vlm_peft.data.splits import load_split

    with teach() as server:
        run(url=server.url, samples=3, temperature=1.0, duplicates="none")
        assert len(server.asked) == 36
        assert len({body["seed"] for body in server.bodies}) == 36
    split = load_split(DataArguments(dataset_name="out"), "train", processor)
    # All answers about a picture are branches of its one row.
    assert len(split.texts) == len(split.pictures) == 12
    assert len(split.task.example(split.texts[0]).completions) == 3


@pytest.mark.parametrize(("prompt", "answer"), [("vqa", QA), ("chat", TURNS)])
def test_questions_and_chats_load_as_their_tasks(place, processor, prompt, answer):
    from vlm_peft.data.arguments import DataArguments
    from vlm_peft.data.rows import encode_rows
    from vlm_peft.data.splits import load_split

    with teach() as server:
        server.answer = lambda key, body: answer if int(key[0], 16) < 12 else "I'm sorry, I cannot help with that."
        run(url=server.url, prompts=prompt, english="true")
    sent = server.bodies[0]["response_format"]["json_schema"]
    assert sent["schema"] == read_prompt(prompt).shape.schema
    assert {row["rejected_because"] for row in rows_of(split="rejected")} <= {filters.REFUSED}
    split = load_split(DataArguments(dataset_name="out", task=prompt), "train", processor)
    encoded = encode_rows(split.texts, split.task, processor, split.pictures, max_length=None)
    assert len(encoded.dataset) == len(split.texts) > 0


def test_a_changed_prompt_or_sampling_asks_anew_and_never_mixes(place):
    with teach() as server:
        run(url=server.url, limit=3)
        run(url=server.url, limit=3, temperature=0.5)
        (place / "ask.txt").write_text("Say more.")
        run(url=server.url, limit=3)
        assert len(server.asked) == 9
        assert {row["prompt_hash"] for row in rows_of()} == {rows_of()[0]["prompt_hash"]}
        # More pictures: only they are asked about.
        run(url=server.url, limit=5)
        assert len(server.asked) == 11
        assert len(rows_of()) == 5


def test_pictures_of_evaluation_sets_are_not_asked_about_and_earlier_answers_rejected(place):
    save_pictures(place / "held" / "test", 4, first=2)
    with teach() as server:
        run(url=server.url, limit=4)
        run(url=server.url, evaluation_sets="held:test")
        assert len(server.asked) == 4 + 12 - 4 - 2
    assert [row["source"] for row in rows_of(split="rejected")] == ["002.png", "003.png"]
    assert {row["rejected_because"] for row in rows_of(split="rejected")} == {filters.LEAKED}
    assert len(rows_of()) == 8


def test_a_stream_is_as_a_folder(place):
    Dataset.from_dict({"image": [str(path) for path in sorted(Path("pictures").iterdir())]}).cast_column(
        "image", Image()
    ).to_parquet("table.parquet")
    with teach() as server:
        run(url=server.url, out="one", dataset_name="table.parquet")
        run(url=server.url, out="two", dataset_name="table.parquet", streaming="true")
    assert rows_of("one") == rows_of("two")
    assert len(rows_of("one")) == 12


def test_foreign_text_is_text_on_card_and_page(place):
    from markdown_it import MarkdownIt

    texts = iter(HOSTILE * 2)
    with teach() as server:
        server.answer = lambda key, body: next(texts).replace("\ud800", "?")
        save_pictures(place / "pictures", 20)
        run(url=server.url)
    card, page = Path("out/README.md").read_text(), Path("out/gallery.html").read_text()
    assert "<script>" not in page
    assert "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", page)
    shown = MarkdownIt("commonmark").enable("table").render(card.partition("\n---\n")[2])
    assert not re.findall(r"<(?:img|script|a) ", shown)
    assert load_dataset("out", split="train+rejected").num_rows == 20


# --- servers that fail ---


def test_each_failure_is_named_retried_and_counted_and_nothing_is_lost(place):
    def behave(number: int, again: int) -> str:
        return FAILURES[number] if number < len(FAILURES) else "ok"

    with teach(behave) as server:
        started = time.monotonic()
        assert run(url=server.url, request_timeout=0.5, concurrency=1) == 0
        assert len(server.asked) == 12 + len(FAILURES)
        assert set(server.answered.values()) == {1}
    retried = json.loads(Path("out/synthesis.json").read_text())["this_run"]["retried"]
    assert retried == {
        "status 500": 1,
        "status 429": 1,
        "an answer that is no JSON": 2,
        "an answer of another shape": 1,
        "no answer in 0.5 s": 1,
        "connection broke off": 1,
    }
    # The server asked to wait a second.
    assert max(later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)) >= 1.0
    assert time.monotonic() - started < 20
    with teach() as server:
        run(url=server.url, out="plain")
    assert rows_of() == rows_of("plain")


def test_a_server_that_dies_ends_the_run_with_everything_kept(place, capsys):
    with teach() as server:
        server.behave = lambda number, again: "ok" if number < 5 else "close"
        with pytest.raises(OSError, match=r"No server answers any more .*: connection broke off \(\d+ times\)"):
            run(url=server.url, request_tries=3, concurrency=2)
        assert "Stopped: 5 answers are kept" in capsys.readouterr().out
        server.behave = lambda number, again: "ok"
        assert run(url=server.url) == 0
        assert set(server.answered.values()) == {1}
    assert len(rows_of()) == 12


def test_servers_share_the_work_and_one_that_is_dead_loses_nothing(place, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    with teach(seconds=0.05) as one, teach(seconds=0.05) as other:
        assert run(url=[one.url, dead, f"{other.url}/v1/"], concurrency=2, request_tries=4) == 0
        assert min(len(one.asked), len(other.asked)) >= 3
        assert len(one.asked) + len(other.asked) == 12
    retried = json.loads(Path("out/synthesis.json").read_text())["this_run"]["retried"]
    assert list(retried) == ["connection refused"]


def test_a_wrong_model_or_key_ends_the_run_at_once_with_the_servers_words(place):
    with teach(lambda number, again: "404") as server:
        with pytest.raises(OSError, match=r"answers 404 for the model 'them': .*no such model"):
            run(url=server.url, concurrency=2)
        assert len(server.asked) <= 2


def test_a_picture_that_a_server_refuses_is_named_and_the_others_go_on(place, capsys):
    with teach(lambda number, again: "413" if number == 3 else "ok") as server:
        assert run(url=server.url, concurrency=1) == 1
        assert "No answer to 1 questions: status 413" in capsys.readouterr().out
        assert len(rows_of()) == 11
        assert run(url=server.url) == 0
    assert len(rows_of()) == 12


def test_a_server_that_refuses_schemas_is_asked_without(place):
    with teach(lambda number, again: "400" if number == 0 else "ok") as server:
        server.answer = lambda key, body: QA
        assert run(url=server.url, prompts="vqa", concurrency=1) == 0
        assert ["response_format" in body for body in server.bodies] == [True] + [False] * 12
    assert len(rows_of()) == 12


def test_requests_in_flight_keep_the_server_busy(place):
    save_pictures(place / "pictures", 32)
    # Nobody is answered before four ask: a client that waits anywhere else ends in time-outs.
    four = threading.Barrier(4, timeout=20)

    def answer(key: str, body: dict) -> str:
        four.wait()
        return caption(key)

    with teach() as server:
        server.answer = answer
        assert run(url=server.url, concurrency=4, request_timeout=30, request_tries=1) == 0
        assert server.most_busy == 4


# --- runs that are killed ---


def forked(work) -> int:
    """A process that goes on from here, so that it need not import torch again."""
    process = os.fork()
    if process == 0:
        try:
            os._exit(work())
        except BaseException:
            os._exit(99)
    return process


def test_killed_twenty_times_nothing_is_lost_doubled_or_asked_twice(place):
    save_pictures(place / "pictures", 120)
    draw = random.Random(0)
    with teach(seconds=0.004) as server:
        run(url=server.url, out="whole", concurrency=4)
        server.asked.clear()
        marks: list[tuple[int, set[str]]] = []
        for _ in range(20):
            process = forked(lambda: run(url=server.url, concurrency=4))
            goal = len(server.asked) + draw.randrange(1, 9)
            while len(server.asked) < goal and not os.waitpid(process, os.WNOHANG)[0]:
                time.sleep(0.001)
            time.sleep(draw.random() * 0.01)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            time.sleep(0.02)
            marks.append((len(server.asked), {found["text"] for found in records_of()}))
        assert run(url=server.url, concurrency=4) == 0
    for (asked, known), (_, later) in zip(
        marks, [*marks[1:], (0, {found["text"] for found in records_of()})], strict=True
    ):
        assert known <= later
        # What had been stored by then is not among what was asked afterwards.
        assert not {caption(name.split()[0]) for name in server.asked[asked:]} & known
    assert rows_of() == rows_of("whole")
    assert len(rows_of()) == 120
    names = [found["picture"] for found in records_of()]
    assert len(names) == len(set(names)) == 120


def test_ctrl_c_ends_in_order(place):
    with teach(seconds=0.1) as server:
        process = forked(lambda: run(url=server.url, concurrency=2))
        while len(server.asked) < 5:
            time.sleep(0.005)
        os.kill(process, signal.SIGINT)
        _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert 1 <= len(records_of()) < 12
    assert not Path("out/data").exists()


# --- likeness ---


def test_planted_captions_of_other_pictures_are_rejected_by_a_threshold_from_other_pictures(place):
    from vlm_peft.metrics.clip_score import clip_scores

    scenes, clip = ROOT / "recipes/demo/scenes", ROOT / "recipes/demo/clip"
    rows = load_dataset("parquet", data_files=str(scenes / "data/test-00000-of-00001.parquet"), split="train[:40]")
    rows.to_parquet("scenes.parquet")
    # Captions of every fifth picture are those of others.
    texts = [rows[(number + 5) % 40 if number % 5 == 0 else number]["captions"][0] for number in range(40)]
    sent = [data_address(sent_picture(picture, 1024)) for picture in rows["image"]]
    with teach() as server:
        # Requests come in any order.
        said = dict(zip(sent, texts, strict=True))
        server.answer = lambda key, body: said[body["messages"][0]["content"][0]["image_url"]["url"]]
        status = run(
            url=server.url,
            concurrency=1,
            dataset_name="scenes.parquet",
            clip_model=clip,
            clip_prefix="",
            clip_trusted=f"{scenes}:test_pairs[:40]",
            clip_keep=0.9,
            vectors_dir="vectors",
            device="cpu",
        )
    assert status == 0
    accepted, rejected = rows_of(), rows_of(split="rejected")
    assert {row["rejected_because"] for row in rejected} == {filters.UNLIKE}
    wrong = {f"test-{number:05d}" for number in range(0, 40, 5)}
    assert sum(row["source"] in wrong for row in rejected) >= 5
    assert sum(row["source"] not in wrong for row in accepted) >= 26
    threshold = json.loads(Path("out/synthesis.json").read_text())["threshold"]
    assert threshold["keeps"] >= 0.9
    assert min(row["clip_score"] for row in accepted) >= threshold["value"] > max(row["clip_score"] for row in rejected)
    found = {row["source"]: row["clip_score"] for row in (*accepted, *rejected)}
    expected = clip_scores(clip, rows["image"][:8], texts[:8], prefix="").per_picture["CLIPScore"]
    # Vectors of pictures are kept in half precision.
    assert [found[f"test-{number:05d}"] for number in range(8)] == pytest.approx(expected, abs=2e-3)


def test_the_lowest_share_is_rejected_of_what_nothing_else_rejects():
    from vlm_peft.teacher.rows import Row, reject_unlike

    rows = [Row(str(number), "", Prompt("p", ASK), {}, clip_score=number / 10) for number in range(10)]
    rows[0].reason = filters.EMPTY
    assert reject_unlike(rows, lowest_share=0.25) == 0.3
    assert [row.reason for row in rows] == [filters.EMPTY] + [filters.UNLIKE] * 2 + [None] * 7


# --- teachers of one's own ---


def test_an_adapter_teaches_in_this_process_and_a_whole_model_behind_transformers_serve(place, adapter):
    from vlm_peft.adapters.export import export_merged

    for number, path in enumerate(sorted((place / "pictures").iterdir())):
        colour = tuple(255 * (number >> bit & 1) for bit in range(3))
        PILImage.new("RGB", (12, 10), colour if number < 8 else (30 * number - 200, 128, 60)).save(path)
    assert run(teacher=adapter, batch_size=5, max_new_tokens=6, device="cpu") in (0, 1)
    local = {row["picture"]: row["answer"] for split in ("train", "rejected") for row in rows_of(split=split)}
    assert len(local) == 12
    assert len(set(local.values())) > 3
    with pytest.raises(ValueError, match=r"vlm-peft export .* --to merged"):
        run(teacher=adapter, serve="true", out="refused")
    whole = export_merged(adapter, place / "full")
    # Greedy means one beam, whatever a model says of itself.
    run(teacher=whole, batch_size=5, max_new_tokens=6, device="cpu", out="whole")
    assert {row["picture"]: row["answer"] for name in ("train", "rejected") for row in rows_of("whole", name)} == local
    decoding = whole / "generation_config.json"
    decoding.write_text(decoding.read_text().replace('"num_beams": 2', '"num_beams": 1'))
    status = run(teacher=whole, serve="true", max_new_tokens=6, device="cpu", out="served", request_timeout=60)
    assert status in (0, 1)
    served = {row["picture"]: row["answer"] for split in ("train", "rejected") for row in rows_of("served", split)}
    assert len(served) == 12
    assert {name: text.strip() for name, text in served.items()} == local


def test_options_that_contradict_each_other_are_refused():
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as error:
            parse_arguments(["--dataset_name", "a", *arguments])
        return str(error.value)

    assert "temperature above 0" in refused("--samples", "3")
    assert "expected one of them" in refused("--serve", "true", "--base_url", "http://a")
    assert "needs a --clip_model" in refused("--clip_lowest_share", "0.1")
    assert "both say" in refused("--clip_model", "c", "--clip_lowest_share", "0.1", "--clip_threshold", "0.2")
    assert "Expected NAME:SPLIT" in refused("--evaluation_sets", "test")
    assert "did you mean 'temperature'" in refused("--temprature", "1")
    assert "needs --hub_dataset_id" in refused("--push_to_hub", "true")


def test_a_finished_data_set_is_pushed_in_one_commit_and_loads_by_its_name(place, monkeypatch):
    from hub_server import OWNER, serve
    from huggingface_hub import constants

    template = "/{repo_id}/resolve/{revision}/{filename}"
    with serve() as hub, teach() as server:
        monkeypatch.setenv("HF_TOKEN", OWNER)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        server.answer = lambda key, body: "I cannot see an image." if key[0] < "4" else caption(key)
        assert run(url=server.url, push_to_hub="true", hub_dataset_id="me/synthetic") == 0
        files = hub.repos["dataset", "me/synthetic"].files
    shards = [f"data/{name}-00000-of-00001.parquet" for name in ("rejected", "train")]
    assert set(files) - {".gitattributes"} == {"README.md", *shards}
    card = files["README.md"].decode()
    assert "refusal" in card
    assert str(place) not in card
    assert "split: rejected" in card
