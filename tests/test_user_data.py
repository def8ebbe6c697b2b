"""Users' data: texts stay what the files say, paths are literal, and what cannot be used is named in a line."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, ClassLabel, Dataset, Features, Image, List, Value
from hub_client import environment
from hub_server import serve
from PIL import Image as PILImage
from PIL import PngImagePlugin

from vlm_peft.data.arguments import DataArguments
from vlm_peft.data.pictures import UnreadablePictureError, encoded_bytes, open_picture, picture_size
from vlm_peft.data.rows import bind_rows, find_unreadable, load_rows, picture_folder, resolve_paths
from vlm_peft.data.splits import bind_task, leave_out, load_split
from vlm_peft.data.streaming import load_stream, stream_rows
from vlm_peft.tasks import make_task
from vlm_peft.tasks.chat import chat_example


def save_picture(path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (20, 20), (30 * number, 50, 90)).save(path)


def cell(number: int = 0) -> dict:
    file = io.BytesIO()
    PILImage.new("RGB", (20, 20), (30 * number, 50, 90)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def bind(path, task: str = "caption", **options):
    """Texts, pictures and task of a data set's training rows."""
    data = DataArguments(dataset_name=str(path), task=task, **options)
    rows = load_rows(str(path), "train")
    bound = bind_task(data, rows.column_names)
    return *bind_rows(rows, bound, picture_folder(str(path))), bound


def answers(texts, task) -> list:
    return [task.example(row).references for row in texts]


# --- text is text ---

WORDS = ["0417", "12.50", "null", "NA", "nan", "2024-03-01", "True", "1e5", " two ", "007"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl"])
def test_text_columns_are_text_letter_by_letter(tmp_path, kind):
    rows = [{"image": f"{number}.png", "caption": word} for number, word in enumerate(WORDS)]
    path = tmp_path / f"rows.{kind}"
    if kind.endswith("sv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([["image", "caption"], *([row["image"], row["caption"]] for row in rows)])
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    assert load_rows(str(path), "train")["caption"][:] == WORDS
    # A column of digits alone, which inference makes numbers of.
    assert load_rows(str(path), "train[:1]")["caption"][:] == ["0417"]
    assert [row["caption"] for row in load_stream(DataArguments(dataset_name=str(path)), "train")] == WORDS


def test_meter_readings_keep_their_zeros(tmp_path):
    save_picture(tmp_path / "0.png")
    (tmp_path / "meters.csv").write_text('"image","digits"\n"0.png","0417"\n"0.png","0023"\n')
    texts, _, task = bind(tmp_path / "meters.csv", "digits")
    assert sorted(text for each in answers(texts, task) for text in each[0]) == ["0023", "0417"]


def test_a_folder_of_tables_and_an_image_folder_are_text_too(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.csv").write_text("image,digits\n0.png,0417\n")
    (tmp_path / "tables" / "test.csv").write_text("image,digits\n0.png,0023\n")
    assert load_rows(str(tmp_path / "tables"), "train+test")["digits"][:] == ["0417", "0023"]
    save_picture(tmp_path / "pictures" / "0.png")
    (tmp_path / "pictures" / "metadata.csv").write_text("file_name,digits\n0.png,0417\n")
    assert load_rows(str(tmp_path / "pictures"), "train")["digits"][:] == ["0417"]


def test_numbers_of_json_are_their_literals(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"image": "0.png", "question": "?", "answer": 12.50, "more": [1.0, "a"]}\n'
        '{"image": "0.png", "question": "?", "answer": true, "more": [1e3, null]}\n'
        '{"image": "0.png", "question": "?", "answer": 12345678901234567890, "more": []}\n'
    )
    rows = load_rows(str(tmp_path / "rows.jsonl"), "train")
    assert rows["answer"][:] == ["12.50", "true", "12345678901234567890"]
    assert rows["more"][:] == [["1.0", "a"], ["1e3", None], []]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_nan_in_json_is_what_is_missing(tmp_path, kind):
    """Python writes a missing caption so; the word would be learnt."""
    rows = [{"image": "0.png", "caption": float("nan")}, {"image": "1.png", "caption": "nan"}]
    text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"rows.{kind}").write_text(text.replace('"1.png"', "Infinity"))
    found = load_rows(str(tmp_path / f"rows.{kind}"), "train")
    assert (found["caption"][:], found["image"][:]) == ([None, "nan"], ["0.png", "Infinity"])


def test_compressed_tables_whose_types_would_be_inferred_are_refused(tmp_path):
    with gzip.open(tmp_path / "train.csv.gz", "wt") as file:
        file.write("image,digits\n0.png,0417\n")
    with pytest.raises(ValueError, match=r"train\.csv\.gz is no table ending in .*: unpack or rename it"):
        load_rows(str(tmp_path), "train")


def test_columns_of_parquet_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pairs = pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"image": ["0.png"], "notes": pairs}), path)
    for place in (path, tmp_path):
        with pytest.raises(
            ValueError, match=r"rows\.parquet, column 'notes': a column of the type map<.* leave it out"
        ):
            load_rows(str(place), "train")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["caption"] * 2), path)
    with pytest.raises(ValueError, match=r"rows\.parquet has two columns 'caption': rename one"):
        load_rows(str(path), "train")


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_columns_of_mixed_types_keep_ids_answers_and_paths(tmp_path, kind):
    """A list among texts is a list; quotes come into no path."""
    talk = turns("<image>\nWhat?", "This.")
    rows = [
        {"id": "000000033", "image": "0.png", "conversations": talk, "caption": "one"},
        {"id": 17, "image": ["1.png"], "conversations": talk, "caption": ["two", 2]},
        {"id": "abc_0", "image": "0.png", "conversations": talk, "caption": 3},
    ]
    for number in range(2):
        save_picture(tmp_path / f"{number}.png", number)
    path = tmp_path / f"rows.{kind}"
    path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    assert load_rows(str(path), "train")["id"][:] == ["000000033", "17", "abc_0"]
    _, pictures, _ = bind(path, "chat")
    assert {pictures.open(number).getpixel((0, 0))[0] for number in range(len(pictures))} == {0, 30}
    rows = load_rows(str(path), "train")
    task = make_task("caption", rows.column_names)
    assert [task.example(row).completions for row in rows] == [["one"], ["two", "2"], ["3"]]


def test_turns_of_text_and_turns_of_parts_may_be_mixed(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "0417"}]}
        for content in ("<image>What?", parts)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = load_rows(str(tmp_path / "rows.json"), "train")
    task = make_task("chat", found.column_names)
    prompts = [task.example(row).prompt for row in found]
    assert prompts[0] == prompts[1]
    assert [task.example(row).completions for row in found] == [["0417"]] * 2
    stream = load_stream(DataArguments(dataset_name=str(tmp_path / "rows.json")), "train")
    assert [task.example(row).prompt for row in stream] == prompts


def test_mixed_columns_stay_text_in_groups(tmp_path):
    save_picture(tmp_path / "0.png")
    answers_of = ["0417", {"answer": "1.50"}, "null", [{"answer": "true"}]]
    rows = [{"image": "0.png", "question": "?", "answers": each} for each in answers_of]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts, _, task = bind(tmp_path / "rows.jsonl", "vqa")
    assert answers(texts, task) == [[["0417"], ["1.50"], ["null"], ["true"]]]


def test_boxes_and_pages_are_numbers_where_a_task_needs_them(tmp_path):
    save_picture(tmp_path / "0.png")
    (tmp_path / "rows.csv").write_text('image,answer,bbox\n0.png,a dot,"[1, 2.5, 10, 10]"\n')
    texts, _, task = bind(tmp_path / "rows.csv", "grounding")
    assert answers(texts, task) == [[["a dot [50, 125, 549, 624]"]]]


# --- classes and lists ---


def test_classes_in_the_metadata_of_an_image_folder_are_learnt_by_name(tmp_path):
    save_picture(tmp_path / "0.png")
    features = Features({"file_name": Value("string"), "caption": ClassLabel(names=["a door", "a wall"])})
    Dataset.from_dict({"file_name": ["0.png"], "caption": [1]}, features=features).to_parquet(
        tmp_path / "metadata.parquet"
    )
    texts, _, task = bind(tmp_path)
    assert answers(texts, task) == [[["a wall"]]]


def test_class_labels_are_learnt_by_name(tmp_path):
    features = Features(
        {
            "image": Image(),
            "question": Value("string"),
            "answer": ClassLabel(names=["no", "yes"]),
            "kinds": List(ClassLabel(names=["dark", "light"])),
        }
    )
    cells = {"image": [cell(), cell(1)], "question": ["Is it dark?"] * 2, "answer": [1, 0], "kinds": [[1, 0], []]}
    Dataset.from_dict(cells, features=features).to_parquet(tmp_path / "rows.parquet")
    texts, _, task = bind(tmp_path / "rows.parquet", "vqa")
    assert sorted(answers(texts, task)) == [[["no"]], [["yes"]]]
    assert load_rows(str(tmp_path / "rows.parquet"), "train")["kinds"][:] == [["light", "dark"], []]
    stream = load_stream(DataArguments(dataset_name=str(tmp_path / "rows.parquet")), "train")
    assert [(row["answer"], row["kinds"]) for row in stream] == [("yes", ["light", "dark"]), ("no", [])]


def test_json_lists_in_cells_are_lists(tmp_path):
    (tmp_path / "rows.csv").write_text('image,captions\n0.png,"[""A field."", ""Green.""]"\n1.png,"[""A sea.""]"\n')
    rows = load_rows(str(tmp_path / "rows.csv"), "train")
    task = make_task("caption", rows.column_names)
    assert [task.example(row).completions for row in rows] == [["A field.", "Green."], ["A sea."]]


@pytest.mark.parametrize("other", ["['A', 'b']", "plain"])
def test_what_only_looks_like_a_list_is_refused_by_name(tmp_path, other):
    (tmp_path / "rows.csv").write_text(f'image,captions\n0.png,"{other}"\n1.png,"[""A sea.""]"\n')
    with pytest.raises(ValueError, match=r"rows.csv, line \d, column 'captions': .*write lists as JSON"):
        load_rows(str(tmp_path / "rows.csv"), "train")


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_lists_as_one_text_in_tables_with_types_are_refused(tmp_path, task):
    row = {"image": "0.png", "caption": '["a", "b"]', "question": "?", "answer": '[{"answer": "a"}]'}
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    texts, _, bound = bind(tmp_path / "rows.parquet", task)
    with pytest.raises(ValueError, match="got a list as one text"):
        bound.example(texts[0])


def test_words_in_brackets_are_words(tmp_path):
    (tmp_path / "rows.csv").write_text("image,caption\n0.png,[music]\n1.png,[a] wall\n")
    assert load_rows(str(tmp_path / "rows.csv"), "train")["caption"][:] == ["[music]", "[a] wall"]


# --- columns and names that cannot be ---


def test_one_column_is_not_both_picture_and_text(tmp_path):
    (tmp_path / "rows.csv").write_text("image,caption\n0.png,a\n")
    with pytest.raises(ValueError, match="--image_column and --text_column are both 'image'"):
        bind(tmp_path / "rows.csv", text_column="image")
    for task, column in (("caption", "caption"), ("digits", "digits")):
        with pytest.raises(ValueError, match="has no column"):
            make_task(task, ["image", column], image_column=column)


def test_a_name_that_the_hub_cannot_have_is_a_missing_file():
    with pytest.raises(FileNotFoundError, match="The data set my pictures/at all is not there"):
        load_rows("my pictures/at all", "train")


# --- paths ---


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["photos [2024]", "a*b", "who?", "[v2]*?"])
def test_brackets_and_stars_in_names_are_letters(tmp_path, name, kind):
    """Beside each stands what the name would match as a pattern."""
    for folder, word in (("photos 2", "wrong"), ("aXb", "wrong"), ("who1", "wrong"), ("vXX", "wrong"), (name, "right")):
        rows = Dataset.from_list([{"image": f"{name}.png", "caption": word}])
        for place, column in (
            (f"{folder}/{folder}.{kind}", "image"),
            (f"{folder} pictures/metadata.{kind}", "file_name"),
        ):
            path = tmp_path / place
            save_picture(path.parent / f"{name}.png", 3 if word == "right" else 0)
            table = rows.rename_column("image", column) if column != "image" else rows
            {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind](path)
    for found in (tmp_path / name / f"{name}.{kind}", tmp_path / f"{name} pictures", tmp_path / name):
        texts, pictures, task = bind(found)
        assert answers(texts, task) == [[["right"]]]
        assert pictures.open(0).getpixel((0, 0))[0] == 90


@pytest.mark.parametrize("place", ["$PLACE.parquet", "$PLACE/train.parquet", "${PLACE}/train.parquet"])
def test_variables_in_names_are_letters_or_refused(tmp_path, monkeypatch, place):
    """`datasets` would read the file that the variable names, which is there, too."""
    monkeypatch.setenv("PLACE", "other")
    for each, word in ((place, "right"), (place.replace("${PLACE}", "other").replace("$PLACE", "other"), "wrong")):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        Dataset.from_list([{"image": "a.png", "caption": word}]).to_parquet(tmp_path / each)
        Dataset.from_list([{"image": "a.png", "caption": word}]).to_csv((tmp_path / each).with_suffix(".csv"))
    assert load_rows(str((tmp_path / place).with_suffix(".csv")), "train")["caption"][:] == ["right"]
    for name in (tmp_path / place, (tmp_path / place).parent):
        if name != tmp_path:
            (tmp_path / place).with_suffix(".csv").unlink(missing_ok=True)
            with pytest.raises(ValueError, match=r"takes a \$ and a name in a path for a variable, .* rename"):
                load_rows(str(name), "train")


# --- rows of one picture ---


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def rows_of(task: str) -> list[dict]:
    """Two pictures, three rows, the first picture twice."""
    return {
        "caption": [{"caption": "a"}, {"caption": "b"}, {"caption": "c"}],
        "vqa": [{"question": f"{each}?", "answer": each} for each in "abc"],
        "chat": [{"conversations": turns(f"<image>\n{each}?", each, "Sure?", "Yes.")} for each in "abc"],
        "digits": [{"digits": "12"}, {"digits": "3"}, {"digits": "1 2"}],
        "grounding": [{"answer": each, "bbox": [0, 0, 10, 20]} for each in "abc"],
        "objects": [{"objects": [{"name": each, "box": [0, 0, 10, 20]}]} for each in "abc"],
    }[task]


@pytest.mark.parametrize("task", ["caption", "vqa", "chat", "digits", "grounding", "objects"])
@pytest.mark.parametrize("same", ["path", "content"])
def test_rows_of_one_picture_are_one_group_in_every_task(tmp_path, task, same, processor):
    save_picture(tmp_path / "0.png")
    save_picture(tmp_path / "copy.png")
    save_picture(tmp_path / "1.png", 1)
    names = ["0.png", "1.png", "0.png" if same == "path" else "copy.png"]
    rows = [{"image": name} | row for name, row in zip(names, rows_of(task), strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = "grounding" if task == "objects" else task
    texts, pictures, bound = bind(tmp_path / "rows.jsonl", name)
    assert (len(texts), len(pictures), texts["id"][:]) == (2, 2, [["0", "2"], ["1"]])
    found = [bound.example(row) for row in texts]
    shared = {"caption": [["a", "c"]], "digits": [["12", "1 2"]], "vqa": [["a"], ["c"]]}
    assert found[0].references[: len(shared.get(task, []))] == shared.get(task, [])
    assert len(found[0].completions) > len(found[1].completions) - (task == "objects")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(rows[index]) for index in (0, 2, 1)))
    data = DataArguments(dataset_name=str(tmp_path / "rows.jsonl"), task=name)
    stream = resolve_paths(load_stream(data, "train"), ["image"], tmp_path)
    assert len(list(stream_rows(stream, bound, processor, max_length=None))) == 2


def test_conversations_about_one_picture_are_what_they_were_alone(tmp_path, processor):
    """Those that begin alike, up to the picture, are branches of one row; others, and broken ones, stay alone."""
    save_picture(tmp_path / "0.png")
    conversations = [
        turns("<image>\nWhat?", "A dot.", "Sure?", "Yes."),
        turns("Look:<image>What?", "A dot."),
        turns("<image>Where?", "Here."),
        turns("<image>"),
        turns("<image>", "Nothing was asked."),
        turns("Hello.", "Hi.", "<image>What?", "A dot."),
        turns("Hello.", "Hi.", "<image>What?", "A dot."),
    ]
    rows = [{"image": "0.png", "conversations": each} for each in conversations]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts, pictures, task = bind(tmp_path / "rows.jsonl", "chat")
    assert texts["id"][:] == [["0", "2", "4"], ["1"], ["3"], ["5"], ["6"]]
    assert [len(pictures.of_row(row)) for row in range(5)] == [1] * 5
    joined = task.example(texts[0])
    alone = [chat_example(conversations[index]) for index in (0, 2, 4)]
    assert joined.references == [each.references[0] for each in alone]
    assert joined.details == [each.details[0] for each in alone]
    for completion, question, each in zip(joined.completions, joined.questions, alone, strict=True):
        assert processor.encode_row(joined.prompt, [completion]) == processor.encode_row(each.prompt, each.completions)
        assert processor.encode_prompt([*joined.prompt, *question]) == processor.encode_prompt(each.prompt)


def test_one_image_id_of_two_pictures_joins_nothing(tmp_path, caplog):
    """Two films number their pictures alike: each caption stays with its own, and rows have names of their own."""
    rows = []
    for film in ("a", "b"):
        for number in range(2):
            save_picture(tmp_path / film / f"{number}.png", number + 3 * (film == "b"))
            rows += [
                {"image": f"{film}/{number}.png", "image_id": number, "caption": f"{film}{number}{k}"} for k in "xy"
            ]
    (tmp_path / "frames.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level("WARNING"):
        texts, pictures, task = bind(tmp_path / "frames.jsonl")
    assert answers(texts, task) == [[["a0x", "a0y"]], [["a1x", "a1y"]], [["b0x", "b0y"]], [["b1x", "b1y"]]]
    assert [pictures.open(number).getpixel((0, 0))[0] // 30 for number in range(4)] == [0, 1, 3, 4]
    assert texts["id"][:] == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]]
    assert "2 groups of rows have one name and different pictures" in caplog.text
    assert "rows 0, 4" in caplog.text


def test_ids_that_repeat_are_replaced_and_left_out_rows_take_no_other_with_them(tmp_path, processor):
    rows = []
    for number in range(4):
        save_picture(tmp_path / f"{number}.png", number)
        rows.append(
            {"image": f"{number}.png", "question": "?", "answer": f"colour {number}", "question_id": number // 2}
        )
    rows.append(rows[3] | {"question": "And?", "answer": "none"})
    (tmp_path / "0.png").write_bytes(b"broken")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataArguments(dataset_name=str(tmp_path / "rows.jsonl"), task="vqa")
    split = load_split(data, "test", processor)
    split.unreadable = find_unreadable(split.pictures)
    leave_out(split, "skip")
    asked = list(split.questions())
    assert [question.id for question in asked] == ["1", "2", "3", "4"]
    assert [question.references[0] for question in asked] == ["colour 1", "colour 2", "colour 3", "none"]
    # One picture's questions of one id are told apart, too.
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[3:])))
    assert [question.id for question in load_split(data, "test", processor).questions()] == ["1-0", "1-1"]


# --- what would end a run later ---


def save_captions(folder, captions: list) -> str:
    lines = []
    for number, caption in enumerate(captions):
        save_picture(folder / f"{number}.png", number)
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.mark.parametrize("caption", ["...", "🎉🎉", "?! -- ;", ["…", "!"]])
def test_a_reference_without_a_word_is_named_before_training(tmp_path, processor, caption, capsys):
    data = DataArguments(dataset_name=save_captions(tmp_path, ["a wall", "a door", caption, "猫"]))
    split = load_split(data, "train", processor)
    with pytest.raises(ValueError, match=r"(?s)1 of 4 rows of train cannot be scored.*row 2: .*with a word in it"):
        leave_out(split)
    leave_out(load_split(data, "train", processor), "skip")
    assert "Left out 1 of 4 rows of train" in capsys.readouterr().out


@pytest.mark.parametrize("captions", [["a wall"], ["a wall", "..."]])
def test_a_blind_control_without_other_pictures_is_found_before_training(tmp_path, processor, captions):
    data = DataArguments(dataset_name=save_captions(tmp_path, captions), blind_splits=["train"])
    with pytest.raises(ValueError, match=r"blind control of train needs another picture .*its 1 rows have 1 in all"):
        leave_out(load_split(data, "train", processor), "skip")


def test_a_run_without_a_step_is_found_before_training(tmp_path):
    from trl import SFTConfig

    from vlm_peft.training.setup import check_steps

    options = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 4, "bf16": False}
    assert check_steps(9, SFTConfig(**options, num_train_epochs=2)) == 6
    assert check_steps(9, SFTConfig(**options, num_train_epochs=2, dataloader_drop_last=True)) == 4
    assert check_steps(9, SFTConfig(**options, max_steps=5)) == 5
    for wrong in ({"dataloader_drop_last": True}, {"num_train_epochs": 0}, {"max_steps": 0}):
        with pytest.raises(ValueError, match=r"The run has no step: 3 rows in batches of 4"):
            check_steps(3, SFTConfig(**options, **wrong))


# --- pictures ---


def png(picture, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(1, 60_000), (20_000, 1), (1, 65), (130, 2)])
def test_lines_are_refused_before_they_are_scaled(size, monkeypatch):
    encoded = png(PILImage.new("RGB", size))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("The picture was decoded."))
    with pytest.raises(UnreadablePictureError, match=f"{size[0]} x {size[1]} pixels: .* more than 64 times the other"):
        open_picture(encoded)


@pytest.mark.parametrize(
    ("kind", "top", "dtype"),
    [
        ("TIFF", 65535, np.int32),
        ("TIFF", 255, np.int32),
        ("TIFF", 1, np.float32),
        ("TIFF", 255, np.float32),
        ("TIFF", 65535, np.float32),
        ("TIFF", 65535, np.uint16),
        ("PNG", 65535, np.uint16),
        ("PNG", 4095, np.uint16),
        ("PNG", 255, np.uint8),
    ],
)
def test_greys_of_any_depth_are_the_same_ramp(kind, top, dtype):
    ramp = np.tile(np.linspace(0, 1, 64), (8, 1))
    opened = open_picture(png(PILImage.fromarray((ramp * top).astype(dtype)), kind))
    assert np.abs(np.asarray(opened)[:, :, 0] - ramp * 255).max() <= 1.5


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, 1e6], [0.0, np.nan]])
def test_greys_of_no_known_depth_are_refused_by_name(values):
    encoded = png(PILImage.fromarray(np.array([values] * 2, dtype=np.float32)), "TIFF")
    with pytest.raises(UnreadablePictureError, match=r"greys from .*: expected 0 to 1, 255, 4095 or 65535"):
        open_picture(encoded)


def test_long_texts_beside_good_pixels_are_passed_over():
    notes = PngImagePlugin.PngInfo()
    for number in range(2):
        notes.add_text(f"prompt {number}", "x" * 1_100_000, zip=True)
    encoded = png(PILImage.new("RGB", (8, 6), (200, 30, 30)), pnginfo=notes)
    assert open_picture(encoded).getpixel((0, 0)) == (200, 30, 30)
    assert picture_size(encoded) == [8, 6]


@pytest.mark.parametrize("way", range(11))
def test_a_picture_is_as_large_as_it_is_opened_whatever_its_exif_says(way):
    exif = PILImage.Exif()
    exif[274] = way
    encoded = png(PILImage.new("RGB", (8, 6)), exif=exif)
    assert picture_size(encoded) == list(open_picture(encoded).size) == ([6, 8] if way in (5, 6, 7, 8) else [8, 6])


@pytest.mark.parametrize("kind", ["EPS", "SGI", "TGA", "PCX", "IM"])
def test_formats_are_those_of_a_list(kind, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was called."))
    with pytest.raises(UnreadablePictureError, match=r"expected one of (AVIF, )?BMP, .*JPEG.*PNG"):
        open_picture(png(PILImage.new("RGB", (8, 6)), kind))


def test_only_regular_files_are_opened(tmp_path):
    """A pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for path, message in (
        (tmp_path / "pipe.png", "no regular file"),
        (tmp_path, "no regular file"),
        (Path("/dev/zero"), "no regular file"),
        (tmp_path / "loop.png", "symbolic links"),
    ):
        for read in (open_picture, picture_size, encoded_bytes):
            with pytest.raises(UnreadablePictureError, match=message):
                read(str(path))


# --- files that are damaged, in other encodings, or of other shapes ---

TEXTS = ["a café at night", "piñatas"]
LINES = "".join(json.dumps({"image": "0.png", "caption": text}, ensure_ascii=False) + "\n" for text in TEXTS)
CELLS = "image,caption\r\n" + "".join(f"0.png,{text}\r\n" for text in TEXTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", CELLS.encode("cp1252"), "line 2: the byte 0xe9 is no UTF-8 text: save the file as UTF-8"),
        ("rows.jsonl", LINES.encode("cp1252"), "line 1: the byte 0xe9 is no UTF-8 text: save the file as UTF-8"),
        ("rows.csv", CELLS.encode("utf-16"), "is text in UTF-16: save it as UTF-8"),
        ("rows.csv", CELLS.replace(",", ";").encode(), "separates its cells by ';': expected ','"),
        ("rows.csv", b"image,caption\n0.png,a wall, and a door\n", "line 2: expected 2 cells .*, found 3: put quotes"),
        ("rows.csv", b"image,caption\n0.png\n", "line 2: expected 2 cells .*, found 1"),
        ("rows.csv", b'image,caption\n0.png,"a wall\n', "line 2: unexpected end of data: repair the quotes"),
        ("rows.csv", b"image,caption,caption\n0.png,a,b\n", "two columns 'caption': rename one"),
        ("rows.csv", b"image,caption\n", "has no rows"),
        ("rows.csv", b"", "is empty: expected a table"),
        ("rows.csv", b"\xef\xbb\xbf", "is empty: expected a table"),
        ("rows.json", b"  \n", "is empty: expected a table"),
        ("rows.json", b"[]", "has no rows"),
        ("rows.jsonl", b"{}\n{}\n", "has no columns"),
        ("rows.jsonl", LINES.encode()[:-9], "line 2: no whole JSON object .*repair the line, or take it out"),
        ("rows.json", b'[{"image": "0.png"}, {"ima', "line 1, column .*: no whole JSON"),
        ("rows.json", b"[" * 100_000, "no whole JSON"),
        ("rows.jsonl", b'"a wall"\n', "line 1: expected an object with columns, found"),
        ("rows.jsonl", b'{"caption": ["a \\ud800 b"]}\n', "line 1, column 'caption': half of a character"),
        ("rows.parquet", b"", "no whole parquet file; write or download it again"),
        ("rows.parquet", b"PAR1 and more PAR1", "no whole parquet file; write or download it again"),
    ],
)
def test_tables_that_cannot_be_read_are_named_in_a_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}") as found:
        load_rows(str(tmp_path / name), "train")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["rows.csv", "ROWS.CSV", "rows.jsonl", "rows.json", "metadata.csv", "metadata.jsonl"])
def test_marks_at_the_beginning_and_ends_of_lines_are_no_text(tmp_path, name):
    save_picture(tmp_path / "0.png")
    text = CELLS if name.lower().endswith("csv") else LINES.replace("\n", "\r\n\r\n")
    text = text.replace("image", "file_name") if name.startswith("metadata") else text
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    rows = load_rows(str(tmp_path if name.startswith("metadata") else tmp_path / name), "train")
    assert (rows["caption"][:], "image" in rows.column_names) == (TEXTS, True)


def test_a_parquet_file_without_rows_or_with_a_broken_page_is_named(tmp_path):
    Dataset.from_dict({"caption": []}, features=Features({"caption": Value("string")})).to_parquet(
        tmp_path / "none.parquet"
    )
    with pytest.raises(ValueError, match=r"none.parquet has no rows"):
        load_rows(str(tmp_path / "none.parquet"), "train")
    Dataset.from_dict({"caption": [f"caption {number}" for number in range(999)]}).to_parquet(tmp_path / "torn.parquet")
    content = bytearray((tmp_path / "torn.parquet").read_bytes())
    content[4:400] = b"\xff" * 396
    (tmp_path / "torn.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"torn.parquet cannot be read; repair it, or download it again"):
        load_rows(str(tmp_path / "torn.parquet"), "train")


def test_words_in_names_of_pictures_are_no_splits_but_folders_are(tmp_path):
    """`red train.png` is no training picture."""
    names = ["red train.png", "two test tubes.png", "cat.png"]
    for name in names:
        save_picture(tmp_path / "flat" / name)
    lines = [json.dumps({"file_name": name, "caption": name}) for name in names]
    (tmp_path / "flat" / "metadata.jsonl").write_text("\n".join(lines))
    assert load_rows(str(tmp_path / "flat"), "train")["caption"][:] == names
    for split in ("train", "test"):
        save_captions(tmp_path / "parts" / split, [split, split])
    assert load_rows(str(tmp_path / "parts"), "test")["caption"][:] == ["test"] * 2
    with pytest.raises(ValueError, match="has no split 'validation'; it has train, test"):
        load_rows(str(tmp_path / "parts"), "validation")


def test_metadata_that_does_not_fit_its_folder_is_read_or_said(tmp_path, caplog):
    save_captions(tmp_path / "more", ["a", "b"])
    save_picture(tmp_path / "more" / "x.png")
    save_picture(tmp_path / "more" / "y.png")
    texts, _, task = bind(tmp_path / "more")
    assert answers(texts, task) == [[["a"]], [["b"]]]
    assert "2 pictures in" in caplog.text
    assert "(for example x.png)" in caplog.text
    save_captions(tmp_path / "less", ["a", "b"])
    (tmp_path / "less" / "1.png").unlink()
    _, pictures, _ = bind(tmp_path / "less")
    assert list(find_unreadable(pictures)) == [1]
    save_captions(tmp_path / "both", ["a"])
    (tmp_path / "both" / "metadata.csv").write_text("file_name,caption\n0.png,b\n")
    with pytest.raises(ValueError, match=r"has metadata.csv and metadata.jsonl: expected one of them"):
        load_rows(str(tmp_path / "both"), "train")
    save_picture(tmp_path / "column" / "0.png", 2)
    (tmp_path / "column" / "metadata.jsonl").write_text('{"image": "0.png", "caption": "a"}')
    assert bind(tmp_path / "column")[1].open(0).getpixel((0, 0))[0] == 60
    (tmp_path / "column" / "metadata.jsonl").write_text('{"name": "0.png", "caption": "a"}')
    with pytest.raises(
        ValueError, match=r"metadata.jsonl, line 1: expected file_name, .*found the columns caption, name"
    ):
        load_rows(str(tmp_path / "column"), "train")


@pytest.mark.parametrize("depth", [60, 120, 400, 3000])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_json_that_libraries_cannot_follow_is_refused(tmp_path, kind, depth):
    save_picture(tmp_path / "0.png")

    def write(depth: int) -> Path:
        path = tmp_path / f"rows.{kind}"
        line = f'{{"image": "0.png", "caption": "a", "more": {"[" * depth}{"]" * depth}}}'
        path.write_text(f"[{line}]" if kind == "json" else line)
        return path

    with pytest.raises(ValueError, match=rf"rows.{kind}, line 1.*too many lists and objects in each other"):
        load_rows(str(write(depth)), "train")
    texts, _, task = bind(write(45))
    assert answers(texts, task) == [[["a"]]]


def test_tables_are_preferred_to_the_pictures_beside_them(tmp_path):
    for number in range(3):
        save_picture(tmp_path / "pictures" / f"{number}.png", number)
    (tmp_path / "train.jsonl").write_text('{"image": "pictures/2.png", "caption": "a"}')
    texts, pictures, task = bind(tmp_path)
    assert answers(texts, task) == [[["a"]]]
    assert pictures.open(0).getpixel((0, 0))[0] == 60


def test_columns_that_no_task_reads_are_not_touched(tmp_path):
    broken = {"bytes": b"no picture and no sound", "path": None}
    table = {
        "image": [cell()] * 2,
        "caption": ["a", "b"],
        "mask": [broken] * 2,
        "more": [[broken]] * 2,
        "audio": [broken] * 2,
    }
    features = Features(
        {"image": Image(), "caption": Value("string"), "mask": Image(), "more": List(Image()), "audio": Audio()}
    )
    arrow = pa.table({name: pa.array(cells, features.arrow_schema.field(name).type) for name, cells in table.items()})
    Dataset(arrow.cast(features.arrow_schema)).to_parquet(tmp_path / "rows.parquet")
    texts, pictures, task = bind(tmp_path / "rows.parquet")
    assert answers(texts, task) == [[["a", "b"]]]
    assert len(pictures) == 1


HUB = """
from vlm_peft.data.rows import load_rows
for name in ("me/csv", "me/json"):
    print(name, *load_rows(name, "train")["digits"][:], *load_rows(name, "train+test[:1]")["digits"][:])
try:
    load_rows("me/csv", "val")
except ValueError as error:
    print(error)
"""


def test_tables_on_the_hub_are_text_too_and_are_found_again_offline(tmp_path):
    with serve() as server:
        table = {"README.md": b"", "train.csv": b"digits\n0417\n", "test.csv": b"digits\n0023\n0024\n"}
        server.add("me/csv", table, kind="dataset")
        lines = {"data/train.jsonl": b'{"digits": 12.50}\n', "data/test.jsonl": b'{"digits": "007"}\n'}
        server.add("me/json", {"README.md": b""} | lines, kind="dataset")
        printed = [
            subprocess.run(
                [sys.executable, "-c", HUB],
                env=environment(server, tmp_path, **more),
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for more in ({}, {"HF_HUB_OFFLINE": "1"})
        ]
    assert printed[0].splitlines()[:2] == ["me/csv 0417 0417 0023", "me/json 12.50 12.50 007"]
    assert "has no split 'val'; it has train, test" in printed[0]
    assert printed[1].splitlines()[:2] == printed[0].splitlines()[:2]


# --- what is held out ---


def save_pairs(folder: Path, pictures: int = 20) -> None:
    """Two rows a picture, one of them under another name, in the order of the pictures."""
    rows = []
    for number in range(pictures):
        for copy in "ab":
            save_picture(folder / copy / f"{number}.png", 0)
            PILImage.new("RGB", (20, 20), (number, 0, 0)).save(folder / copy / f"{number}.png")
            rows.append({"image": f"{copy}/{number}.png", "caption": f"{copy} {number}"})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_share_is_drawn_by_pictures_with_a_seed(tmp_path, processor, capsys):
    save_pairs(tmp_path)

    def load(name: str, seed: int = 0, limit=None, **others) -> list[str]:
        data = DataArguments(dataset_name=str(tmp_path), eval_splits=["train[25%]"], split_seed=seed, **others)
        split = load_split(data, name, processor, limit=limit)
        return [text for row in split.texts for text in split.task.example(row).completions]

    held, trained = load("train[25%]"), load("train")
    assert (len(held), len(trained)) == (10, 30)
    assert sorted(held + trained) == sorted(f"{copy} {number}" for number in range(20) for copy in "ab")
    numbers = [{text.split()[1] for text in texts} for texts in (held, trained)]
    assert not numbers[0] & numbers[1]
    assert numbers[0] != {str(number) for number in range(15, 20)}
    assert load("train[25%]") == held
    assert load("train[25%]", seed=1) != held
    # Fewer training rows change nothing about what is scored.
    assert load("train", limit=4) == trained[:4]
    assert load("train[25%]", limit=4) == held[:4]
    for share in ("train[0%]", "train[100%]"):
        with pytest.raises(ValueError, match="between 0% and 100%"):
            load(share)
    save_pairs(tmp_path, 1)
    with pytest.raises(ValueError, match="2 rows, all about the same pictures"):
        load("train")


def test_pictures_that_rows_share_in_part_stay_on_one_side(tmp_path):
    from vlm_peft.data.groups import hold_out

    for number in range(9):
        save_picture(tmp_path / f"{number}.png", 0)
        PILImage.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
    # A chain of three rows, and rows of their own.
    cells = [[0, 1], [1, 2], [3], [2], [4], [5], [6], [7], [8]]
    rows = Dataset.from_dict({"images": [[str(tmp_path / f"{each}.png") for each in cell] for cell in cells]})
    seen = set()
    for seed in range(30):
        held = hold_out(rows, ["images"], 0.34, seed)
        assert len(held) == 3
        assert len({0, 1, 3} & set(held)) in (0, 3)
        seen |= set(held)
    assert seen == set(range(9))
    # Without pictures each row stands alone; a share of too little is one group.
    assert len(hold_out(rows, [], 0.34, 0)) == 3
    assert len(hold_out(rows.select([0, 1, 2]), ["images"], 0.1, 0)) == 1


def test_the_recipe_of_captions_holds_a_share_out_and_says_what_few_pictures_mean(tmp_path, processor, capsys):
    import yaml
    from conftest import ROOT

    save_pairs(tmp_path)
    options = yaml.safe_load((ROOT / "recipes/configs/captions.yaml").read_text())
    data = DataArguments(
        dataset_name=str(tmp_path), **{name: options[name] for name in ("train_split", "eval_splits", "blind_splits")}
    )
    split = load_split(data, "train[10%]", processor)
    assert (split.is_blind, len(split.texts)) == (True, 2)
    leave_out(split)
    assert "train[10%] has 2 pictures: CIDEr means little on fewer than 50." in capsys.readouterr().out
    save_pairs(tmp_path, 50)
    leave_out(load_split(replace(data, eval_splits=["test"]), "train", processor))
    assert "means little" not in capsys.readouterr().out


def test_nothing_is_drawn_from_a_stream():
    from vlm_peft.training.arguments import VisionArguments
    from vlm_peft.training.data import parts

    with pytest.raises(ValueError, match="nothing can be drawn from a stream"):
        parts(VisionArguments(dataset_name="some/data", eval_splits=["train[10%]"], streaming=True))


# --- folders ---


def test_how_a_folder_is_read_is_said_and_tables_come_first(tmp_path, caplog):
    for name in ("cats/0.png", "dogs/1.png"):
        save_picture(tmp_path / "mixed" / name)
        save_picture(tmp_path / "labelled" / name)
        save_picture(tmp_path / "described" / name)
    (tmp_path / "mixed" / "train.jsonl").write_text('{"image": "cats/0.png", "caption": "a cat"}\n')
    (tmp_path / "described" / "metadata.jsonl").write_text('{"file_name": "dogs/1.png", "caption": "a dog"}\n')
    with caplog.at_level("INFO"):
        for _ in range(2):
            columns = {name: load_rows(str(tmp_path / name), "train") for name in ("mixed", "labelled", "described")}
    assert (columns["mixed"]["caption"][:], columns["described"]["caption"][:]) == (["a cat"], ["a dog"])
    said = [record.message.removeprefix(f"{tmp_path}/") for record in caplog.records if "is read as" in record.message]
    assert said == [
        "mixed is read as json files (train.jsonl).",
        "labelled is read as pictures without texts, whose folders are labels.",
        "described is read as pictures with their metadata.jsonl.",
    ]


def test_archives_whose_samples_have_other_endings_are_refused_in_a_line(tmp_path):
    with tarfile.open(tmp_path / "train-0000.tar", "w") as archive:
        for number, kind in enumerate(("png", "jpg")):
            for name, content in ((f"{number}.{kind}", cell(number)["bytes"]), (f"{number}.txt", b"a wall")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    for load in (load_rows, lambda name, split: load_stream(DataArguments(dataset_name=name), split)):
        with pytest.raises(
            ValueError, match="cannot be read; give all of its samples the same kinds of files: "
        ) as caught:
            load(str(tmp_path), "train")
        assert "same types" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_text_that_a_parquet_file_holds_as_bytes_is_text(tmp_path, kind):
    PILImage.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    cells = {"file_name": ["a.png"], "captions": pa.array(["ein Gru\u00df".encode()], kind)}
    pq.write_table(pa.table(cells), tmp_path / "metadata.parquet")
    assert load_rows(str(tmp_path), "train")[0]["captions"] == "ein Gru\u00df"
    cells["captions"] = pa.array([b"ein Gru\xdf"], kind)
    pq.write_table(pa.table(cells), tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match=r"row 1, column 'captions': expected text, found bytes .*0xdf"):
        load_rows(str(tmp_path), "train")
