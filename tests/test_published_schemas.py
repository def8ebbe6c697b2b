"""Every shipped configuration of a published data set, run on a small local copy of the same schema.

The runs are in this process, on tiny bases: two steps of training, then the scores. Pictures are the demo's scenes.
"""

import json
import logging
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT
from datasets import Dataset, Features, Image, List, Value

SCENES = ROOT / "recipes/demo/scenes/data/test-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def scenes() -> list[dict]:
    """Forty scenes; `image` is `{"bytes", "path"}`."""
    return pq.read_table(SCENES, columns=["image", "captions", "questions", "background"]).slice(0, 40).to_pylist()


@pytest.fixture(autouse=True)
def _leave_no_trace():
    """What a run sets in its process is taken back."""
    from transformers.utils import logging as transformers_logging

    root, environment = logging.getLogger(), dict(os.environ)
    level, handlers = root.level, list(root.handlers)
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    root.setLevel(level)
    root.handlers[:] = handlers
    os.environ.clear()
    os.environ.update(environment)
    transformers_logging.enable_progress_bar()
    AcceleratorState._reset_state(reset_partial_state=True)


class Finished:
    """What a run left."""

    def __init__(self, folder: Path, log: str):
        self.folder, self.log = folder, log

    def scores(self, split: str = "test") -> dict:
        return json.loads((self.folder / "eval" / split / "scores.json").read_text())

    def predictions(self, split: str = "test") -> list[dict]:
        lines = (self.folder / "eval" / split / "predictions.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def run(tmp_path, bases, capsys):
    """Trains with a shipped configuration, in which only names, sizes and lengths are others."""
    from vlm_peft.training import sft

    def train(name: str, data: Path | None = None, config: Path | None = None, **overrides) -> Finished:
        vision, text = bases
        options = {
            "config": config or ROOT / "recipes/configs" / f"{name}.yaml",
            "vision_model": vision,
            "model_name_or_path": text,
            "output_dir": tmp_path / name,
            "use_cpu": "true",
            "bf16": "false",
            "gradient_checkpointing": "false",
            "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": 4,
            "max_length": 512,
            "max_steps": 2,
            "logging_steps": 1,
            "lora_r": 4,
            "save_strategy": "no",
            "report_to": "none",
            "num_beams": 1,
            "max_new_tokens": 4,
            **({"dataset_name": data, "dataset_revision": "none"} if data else {}),
            **overrides,
        }
        assert sft.main([text for key, value in options.items() for text in (f"--{key}", str(value))]) == 0
        history = json.loads((tmp_path / name / "log_history.json").read_text())
        assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
        return Finished(tmp_path / name, capsys.readouterr().out)

    return train


def save(folder: Path, splits: dict[str, list[dict]], **features) -> Path:
    """Parquet files as the Hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        dataset = Dataset.from_list(rows)
        dataset.cast(Features(dataset.features | features)).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def coco_rows(scenes: list[dict], first: int) -> list[dict]:
    """A row a caption; the rows of a picture do not follow each other."""
    return [
        {"image": scene["image"], "filename": f"{number}.jpg", "cocoid": number, "caption": caption}
        for place in range(5)
        for number, scene in enumerate(scenes, first)
        for caption in [scene["captions"][place]]
    ]


def test_a_folder_of_ones_own_is_divided(run, tmp_path, scenes):
    """`captions.yaml`: a folder with metadata.jsonl and no test part."""
    folder = tmp_path / "my_pictures"
    folder.mkdir()
    lines = []
    for number, scene in enumerate(scenes[:20]):
        (folder / f"{number}.png").write_bytes(scene["image"]["bytes"])
        lines.append(json.dumps({"file_name": f"{number}.png", "captions": scene["captions"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    finished = run(
        "captions", folder, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, eval_samples=2
    )
    assert "Training on 18 rows with 90 texts." in finished.log
    scores = json.loads((finished.folder / "eval" / "train-10" / "scores.json").read_text())
    assert (scores["n"], scores["split"]) == (2, "train-10")
    assert (finished.folder / "eval" / "train-10-blind" / "scores.json").is_file()
    assert "eval_CIDEr" in (finished.folder / "log_history.json").read_text()


def test_coco_a_row_a_caption(run, tmp_path, scenes):
    splits = {"train": coco_rows(scenes[:8], 100), "test": coco_rows(scenes[20:24], 120)}
    finished = run("coco", save(tmp_path / "data", splits, image=Image()))
    assert "Training on 8 rows with 40 texts." in finished.log
    rows = finished.predictions()
    assert [row["id"] for row in rows] == ["120", "121", "122", "123"]
    assert [row["references"] for row in rows] == [scene["captions"] for scene in scenes[20:24]]
    scores = finished.scores()
    assert (scores["task"], scores["n"]) == ("caption", 4)
    assert {"CIDEr", "Bleu_4", "ROUGE_L"} <= scores["metrics"].keys()


def test_coco_karpathy_file_with_restval(run, tmp_path, scenes):
    """One stored split, the true one in a column, `sentences` with tokens and raw texts."""
    parts = ["train"] * 4 + ["restval"] * 3 + ["val"] * 2 + ["test"] * 3
    rows = [
        {
            "image": scene["image"],
            "filepath": "val2014",
            "cocoid": number,
            "split": part,
            "sentences": [{"tokens": text.split(), "raw": text, "sentid": place} for place, text in enumerate(texts)],
        }
        for number, (scene, part) in enumerate(zip(scenes, parts, strict=False))
        for texts in [scene["captions"]]
    ]
    data = save(tmp_path / "data", {"train": rows}, image=Image())
    karpathy = {"stored_split": "train", "split_column": "split", "train_split": "train+restval"}
    finished = run("coco", data, text_column="sentences", **karpathy)
    assert "Training on 7 rows with 35 texts." in finished.log
    assert [row["references"] for row in finished.predictions()] == [scene["captions"] for scene in scenes[9:12]]


def vqa_rows(scenes: list[dict], image_id: str, answers) -> list[dict]:
    """VQAv2's columns, first the first question of every picture, then the second."""
    return [
        {
            "question_type": "what color is the" if place == 0 else "how many",
            "multiple_choice_answer": item["answer"],
            "answers": answers(item["answer"]),
            image_id: 500 + number,
            "answer_type": "other" if place == 0 else "number",
            "question_id": 1000 * (500 + number) + place,
            "question": item["question"],
            "image": scene["image"],
        }
        for place in range(2)
        for number, scene in enumerate(scenes)
        for item in [scene["questions"][place]]
    ]


def test_vqav2_from_two_repositories(run, tmp_path, scenes):
    """Questions of a picture are one row, wherever they stand; ten dicts or ten texts are answers."""

    def dicts(answer: str) -> list[dict]:
        texts = [answer] * 9 + ["unsure"]
        return [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(texts, 1)]

    train = vqa_rows(scenes[:8], "id_image", lambda answer: [answer] * 10)
    # That repository has an `id` of its own, the row's number.
    train = [row | {"id": number} for number, row in enumerate(train)]
    held_out = vqa_rows(scenes[20:24], "image_id", dicts)
    names = {
        "Multimodal-Fatima/VQAv2_train": save(tmp_path / "a", {"train": train}, image=Image()),
        "lmms-lab/VQAv2": save(tmp_path / "b", {"validation": held_out}, image=Image()),
    }
    config = yaml.safe_load((ROOT / "recipes/configs/vqav2.yaml").read_text())
    for entry in config["mixture"]:
        entry |= {"dataset_name": str(names[entry["dataset_name"]]), "dataset_revision": None}
    (tmp_path / "vqav2.yaml").write_text(yaml.safe_dump(config))
    finished = run("vqav2", config=tmp_path / "vqav2.yaml")
    assert "16 rows in 8 groups, 8 pictures" in finished.log
    assert "Training on 8 rows with 16 texts." in finished.log
    rows = finished.predictions("vqa-validation")
    expected = [row["question_id"] for number in range(4) for row in (held_out[number], held_out[number + 4])]
    assert [row["id"] for row in rows] == list(map(str, expected))
    assert rows[0]["references"] == [scenes[20]["questions"][0]["answer"]] * 9 + ["unsure"]
    assert rows[1]["answer_type"] == "number"
    scores = finished.scores("vqa-validation")
    assert (scores["task"], scores["n"]) == ("vqa", 8)
    assert {"vqa_accuracy", "vqa_accuracy[answer_type=number]"} <= scores["metrics"].keys()
    settings = json.loads((finished.folder / "task.json").read_text())
    assert settings["instruction"] == "Answer the question using a single word or phrase."


def slide_rows(scenes: list[dict], decks: int, first: int) -> list[dict]:
    """Decks of four scenes (the last one of three): a question about a page, two about two pages, in two orders."""
    rows = []
    for deck in range(decks):
        pages = scenes[first + 4 * deck :][: 3 if deck == decks - 1 else 4]
        cells = {f"page_{number}": None for number in range(1, 21)}
        cells |= {f"page_{number}": scene["image"] for number, scene in enumerate(pages, 1)}
        colours = [scene["background"] for scene in pages]
        questions = [
            ("What color is page 2?", colours[1], [2], ""),
            ("Which colors are pages 1 and 3?", f"{colours[0]} and {colours[2]}", [3, 1], ""),
            ("How many objects are on pages 1 and 3?", "4", [1, 3], "2 + 2"),
        ]
        for number, (question, answer, evidence, expression) in enumerate(questions):
            rows.append(
                {
                    "deck_name": f"deck-{first + deck}",
                    "deck_url": f"https://slides.invalid/deck-{first + deck}",
                    **cells,
                    "qa_id": 10 * (first + deck) + number,
                    "question": question,
                    "answer": answer,
                    "arithmetic_expression": expression,
                    "evidence_pages": evidence,
                }
            )
    # As stored, questions of a deck need not follow each other.
    return rows[::3] + rows[1::3] + rows[2::3]


@pytest.fixture
def decks(tmp_path, scenes) -> Path:
    splits = {"train": slide_rows(scenes, 3, 0), "val": slide_rows(scenes, 1, 12), "test": slide_rows(scenes, 2, 20)}
    return save(tmp_path / "data", splits, **{f"page_{number}": Image() for number in range(1, 21)})


@pytest.mark.parametrize("pages", ["evidence", "all"])
def test_slidevqa(run, decks, scenes, pages):
    finished = run("slidevqa", decks, slide_pages=pages, name_pages=str(pages == "all").lower(), max_length=1024)
    groups, pictures, texts = (6, 9, 9) if pages == "evidence" else (3, 11, 9)
    assert f": 9 rows in {groups} groups, {pictures} pictures." in finished.log
    assert f"Training on {groups} rows with {texts} texts." in finished.log
    rows = finished.predictions()
    assert sorted(row["id"] for row in rows) == ["200", "201", "202", "210", "211", "212"]
    found = {row["id"]: row for row in rows}
    assert found["211"]["evidence_pages"] == [1, 3]
    assert found["211"]["references"] == [f"{scenes[24]['background']} and {scenes[26]['background']}"]
    scores = finished.scores()
    assert (scores["task"], scores["n"]) == ("slides", 6)
    assert {"exact_match", "f1", "anls"} <= scores["metrics"].keys()
    settings = json.loads((finished.folder / "task.json").read_text())
    assert (settings["slide_pages"], settings["name_pages"]) == (pages, pages == "all")


def test_a_deck_that_does_not_fit_names_the_figures(run, decks):
    message = r"(?s)The pictures \(4 of 4 tokens\) and one completion need \d+ tokens, more than max_length=150"
    with pytest.raises(ValueError, match=message):
        run("slidevqa", decks, slide_pages="all", max_length=150, feature_cache="false")


def vsft_rows(scenes: list[dict]) -> list[dict]:
    """`messages` with parts as llava-instruct-mix-vsft has them: every part has all keys, text may come first."""

    def part(kind: str, text: str | None = None, index: int | None = None) -> dict:
        return {"index": index, "text": text, "type": kind}

    rows = []
    for number, scene in enumerate(scenes):
        first, second = scene["questions"][:2]
        opening = [part("text", f"\n{first['question']}"), part("image", index=0)]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": opening[:: 1 if number % 2 else -1]},
                    {"role": "assistant", "content": [part("text", first["answer"])]},
                    {"role": "user", "content": [part("text", second["question"])]},
                    {"role": "assistant", "content": [part("text", f"{second['answer']} objects")]},
                ],
                "images": [scene["image"]],
            }
        )
    return rows


def test_llava_instructions_as_messages(run, tmp_path, scenes):
    splits = {"train": vsft_rows(scenes[:8]), "test": vsft_rows(scenes[20:24])}
    finished = run("llava_instruct", save(tmp_path / "data", splits, images=List(Image())))
    assert "Training on 8 rows with 8 texts." in finished.log
    rows = finished.predictions()
    assert [row["references"] for row in rows] == [
        [f"{scene['questions'][1]['answer']} objects"] for scene in scenes[20:24]
    ]
    assert rows[0]["question"] == scenes[20]["questions"][1]["question"]
    scores = finished.scores()
    assert (scores["task"], scores["n"]) == ("chat", 4)
    assert {"f1", "ROUGE_L"} <= scores["metrics"].keys()


def llava_rows(scenes: list[dict], folder: Path, first: int) -> list[dict]:
    """LLaVA's own shape; one id for all conversations about a picture; the last row is text alone."""
    rows = []
    for number, scene in enumerate(scenes, first):
        path = Path("coco", "train2017", f"{number:012d}.webp")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(scene["image"]["bytes"])
        for item in scene["questions"][:2]:
            turns = [("human", f"{item['question']}\n<image>"), ("gpt", item["answer"])]
            turns += [("human", "Are you sure?"), ("gpt", "Yes, I am.")]
            rows.append({"id": f"{number:012d}", "image": str(path), "conversations": turns})
    rows.append({"id": "text", "model": "", "conversations": [("human", "Say <p>a</p>."), ("gpt", "<p>a</p>")]})
    for row in rows:
        row["conversations"] = [{"from": speaker, "value": text} for speaker, text in row["conversations"]]
    return rows


def test_llava_s_own_files(run, tmp_path, scenes):
    """A JSON file of which `image` is a path in another folder; rows without a picture; `id` is not the row's."""
    train, held_out = llava_rows(scenes[:4], tmp_path / "data", 0), llava_rows(scenes[20:22], tmp_path / "data", 20)
    for name, rows in (("train", train), ("held_out", held_out)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows, indent=1))
    config = yaml.safe_load((ROOT / "recipes/configs/llava_instruct.yaml").read_text())
    config["mixture"] = [
        {"dataset_name": str(tmp_path / "train.json"), "eval_splits": []},
        {"dataset_name": str(tmp_path / "held_out.json"), "train_split": None, "eval_splits": ["test"]},
    ]
    config["image_folder"] = str(tmp_path / "data")
    (tmp_path / "llava.yaml").write_text(yaml.safe_dump(config))
    finished = run("llava_instruct", config=tmp_path / "llava.yaml")
    assert ": 9 rows, 8 pictures." in finished.log
    rows = finished.predictions("chat-test")
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["references"] for row in rows] == [["Yes, I am."]] * 4 + [["<p>a</p>"]]
    assert finished.scores("chat-test")["n"] == 5


def table_rows(scenes: list[dict], folder: Path) -> list[dict]:
    for number, scene in enumerate(scenes):
        (folder / f"{number}.webp").write_bytes(scene["image"]["bytes"])
    return [{"photo": f"{number}.webp", "alt": scene["captions"][0]} for number, scene in enumerate(scenes)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_any_table_beside_its_pictures(tmp_path, scenes, processor, kind):
    """Paths begin where the table lies."""
    from vlm_peft.data.arguments import DataArguments
    from vlm_peft.data.splits import leave_out, load_split

    rows = Dataset.from_list(table_rows(scenes[:3], tmp_path))
    path = tmp_path / f"rows.{kind}"
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind](path)
    split = load_split(
        DataArguments(dataset_name=str(path), image_column="photo", text_column="alt"), "train", processor
    )
    leave_out(split)
    assert [question.references for question in split.questions()] == [[scene["captions"][0]] for scene in scenes[:3]]
    assert [split.pictures.encoded(index) for index in range(3)] == [scene["image"]["bytes"] for scene in scenes[:3]]


@pytest.mark.parametrize("pages", ["evidence", "all"])
def test_a_stream_of_decks_and_one_of_a_table_are_what_is_stored(decks, tmp_path, scenes, processor, pages):
    from vlm_peft.data.arguments import DataArguments
    from vlm_peft.data.rows import encode_rows, picture_folder, resolve_paths
    from vlm_peft.data.splits import bind_task, load_split
    from vlm_peft.data.streaming import load_stream, stream_rows

    (tmp_path / "train.json").write_text(json.dumps(llava_rows(scenes[:4], tmp_path, 0)))
    # A stream joins neighbours only: the questions of a deck are brought together.
    stored = sorted(pq.read_table(decks / "train-00000-of-00001.parquet").to_pylist(), key=lambda row: row["qa_id"])
    ordered = save(tmp_path / "ordered", {"train": stored}, **{f"page_{number}": Image() for number in range(1, 21)})
    for data in (
        DataArguments(dataset_name=str(ordered), task="slides", slide_pages=pages),
        DataArguments(dataset_name=str(tmp_path / "train.json"), task="chat"),
    ):
        split = load_split(data, "train", processor)
        encoded = encode_rows(split.texts, split.task, processor, split.pictures, max_length=None).dataset
        rows = load_stream(data, "train")
        task = bind_task(data, rows.column_names)
        rows = resolve_paths(rows, task.image_columns, picture_folder(data.dataset_name))
        streamed = list(stream_rows(rows, task, processor, max_length=None))
        assert sorted(row["input_ids"] for row in streamed) == sorted(encoded["input_ids"][:])
        assert sum(len(row["image_ids"]) for row in streamed) == len(split.pictures)


def test_held_out_rows_whose_pictures_miss_a_place_are_named(tmp_path, scenes, processor):
    from vlm_peft.data.arguments import DataArguments
    from vlm_peft.data.splits import leave_out, load_split

    rows = llava_rows(scenes[:2], tmp_path, 0)
    rows[1]["conversations"][0]["value"] += "<image>"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    split = load_split(DataArguments(dataset_name=str(tmp_path / "rows.json"), task="chat"), "test", processor)
    message = "(?s)1 of 5 rows of test cannot be scored.*row 1: The row has 1 pictures, its prompt has places for 2"
    with pytest.raises(ValueError, match=message):
        leave_out(split)


def test_features_of_a_column_of_texts_are_kept(tmp_path, scenes):
    """Paths are completed in the picture's column only; lists of them, too."""
    from vlm_peft.data.rows import resolve_paths

    rows = Dataset.from_list([{"files": ["a.png", "/b.png", "data:image/png;base64,QQ=="], "name": "a.png"}])
    found = resolve_paths(rows, ["files"], tmp_path)
    assert found.features == Features({"files": List(Value("string")), "name": Value("string")})
    assert found[0] == {"files": [str(tmp_path / "a.png"), "/b.png", "data:image/png;base64,QQ=="], "name": "a.png"}
