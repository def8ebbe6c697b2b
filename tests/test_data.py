"""Data: rows from every kind of source, and their encoding: cached, never cut, bad rows stopped at or counted."""

import io
import json
import logging

import pytest
from conftest import flickr_rows, make_config, make_processor
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from vlm_peft.data import encode_rows, find_unreadable, load_rows
from vlm_peft.pictures import Pictures
from vlm_peft.tasks import make_task


def encode(colour: str = "red") -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (9, 8), colour).save(file, "PNG")
    return file.getvalue()


def make_rows(captions: list, pictures: list | None = None) -> Dataset:
    pictures = pictures or [encode()] * len(captions)
    cells = {"id": [f"r{index}" for index in range(len(captions))], "captions": captions}
    cells["image"] = [picture and {"bytes": picture, "path": None} for picture in pictures]
    features = Features({"id": Value("string"), "captions": List(Value("string")), "image": Image()})
    return Dataset.from_dict(cells, features=features)


def run(rows: Dataset, processor, max_length: int | None = None, instruction: str = "Describe.", **arguments):
    task = make_task("caption", rows.column_names, instruction=instruction)
    return encode_rows(rows, task, processor, Pictures(rows, task.image_columns), max_length=max_length, **arguments)


# --- load_rows ---


def test_one_parquet_file(tmp_path):
    make_rows([["a"], ["b"]]).to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet"), "train")
    assert rows["captions"][:] == [["a"], ["b"]]
    assert rows[0]["image"].size == (9, 8)
    assert rows["id"][:] == ["r0", "r1"]


def test_a_folder_of_parquet_files_has_its_splits_and_a_wrong_one_lists_them(tmp_path):
    for name, count in (("train", 3), ("test", 1), ("test_style", 2)):
        make_rows([[name]] * count).to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
    assert load_rows(str(tmp_path), "train", limit=2)["captions"][:] == [["train"]] * 2
    assert len(load_rows(str(tmp_path), "train", limit=9)) == 3
    with pytest.raises(ValueError, match=r"has no split 'val'; it has .*test"):
        load_rows(str(tmp_path), "val")


def test_an_image_folder_with_metadata(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    lines = []
    for colour in ("red", "blue"):
        (folder / f"{colour}.png").write_bytes(encode(colour))
        lines.append(json.dumps({"file_name": f"{colour}.png", "text": f"a {colour} wall"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rows = load_rows(str(tmp_path), "train")
    task = make_task("caption", rows.column_names)
    pictures = Pictures(rows, task.image_columns)
    colours = {(255, 0, 0): "a red wall", (0, 0, 255): "a blue wall"}
    for index, row in enumerate(rows.remove_columns("image")):
        assert task.example(row).completions == [colours[pictures.open(index).getpixel((0, 0))]]


def test_flickr30k_schema(flickr):
    """One stored split `test`, the true one in a column; ids are row numbers of what is stored."""
    rows = load_rows(str(flickr), "val", stored_split="test", split_column="split")
    stored = flickr_rows()
    expected = [index for index, split in enumerate(stored["split"]) if split == "val"]
    assert rows["id"][:] == list(map(str, expected))
    assert rows["filename"][:] == [stored["filename"][index] for index in expected]
    task = make_task("caption", rows.column_names)
    assert task.example(rows[0]).completions == stored["caption"][expected[0]]
    with pytest.raises(ValueError, match=r"No row of .* has split = 'dev'; found test, train, val"):
        load_rows(str(flickr), "dev", stored_split="test", split_column="split")
    with pytest.raises(ValueError, match="no column 'part'; it has caption, filename, id, image"):
        load_rows(str(flickr), "val", stored_split="test", split_column="part")


def test_selecting_a_split_copies_no_pictures(tmp_path):
    """`add_column` on scattered rows would write all their pictures to a new file."""
    rows = make_rows([["a"]] * 6).remove_columns("id").add_column("split", ["train", "val"] * 3)
    rows.to_parquet(tmp_path / "rows.parquet")
    selected = load_rows(str(tmp_path / "rows.parquet"), "val", stored_split="test", split_column="split")
    assert selected["id"][:] == ["1", "3", "5"]
    assert len(selected.data) == 6


def test_local_names_that_do_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not there: expected a table"):
        load_rows(str(tmp_path / "nowhere"), "train")
    with pytest.raises(FileNotFoundError, match="data/sets/flickr is not there"):
        load_rows("data/sets/flickr", "train")
    (tmp_path / "rows.txt").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"Expected a table .*, or a folder .* got the file .*rows\.txt"):
        load_rows(str(tmp_path / "rows.txt"), "train")


# --- encode_rows ---


def test_rows_carry_their_pictures_numbers(processor):
    rows = make_rows([["a", "b"], ["c"]], [encode("red"), encode("blue")])
    encoded = run(rows, processor).dataset
    assert encoded["image_ids"][:] == [[0], [1]]
    assert encoded["num_branches"][:] == [2, 1]
    assert encoded["row"][:] == [0, 1]
    expected = processor.encode_row(
        make_task("caption", rows.column_names, instruction="Describe.").example(rows[0]).prompt, ["a", "b"]
    )
    for name, values in vars(expected).items():
        assert encoded[0][name] == values


@pytest.mark.parametrize("captions", [[], ["a", " "], None])
@pytest.mark.parametrize("position", [0, 1])
def test_empty_captions_stop_with_ids_or_are_left_out_with_ids(processor, caplog, captions, position):
    cells = [["a"], ["b"], ["c"]]
    cells[position] = captions
    rows = make_rows(cells)
    with pytest.raises(
        ValueError, match=rf"(?s)1 of 3 rows cannot be used.*--on_bad_row skip:.*1 rows \(r{position}\)"
    ):
        run(rows, processor)
    with caplog.at_level(logging.WARNING):
        encoded = run(rows, processor, on_bad_row="skip")
    assert encoded.dataset["row"][:] == [index for index in range(3) if index != position]
    assert list(encoded.dropped.values()) == [[f"r{position}"]]
    assert f"Left out 1 of 3 rows (r{position})" in caplog.text


def test_unreadable_pictures_stop_or_are_left_out(processor):
    rows = make_rows([["a"], ["b"], ["c"]], [encode(), b"garbage", None])
    unreadable = find_unreadable(Pictures(rows, ["image"]))
    assert unreadable.keys() == {1}
    with pytest.raises(ValueError, match=r"(?s)2 of 3 rows .*\(r1\): Cannot read the picture"):
        run(rows, processor, unreadable=unreadable)
    encoded = run(rows, processor, unreadable=unreadable, on_bad_row="skip")
    assert encoded.dataset["row"][:] == [0]
    assert encoded.dropped["The row has 0 pictures, its prompt has places for 1."] == ["r2"]


def test_no_usable_row_is_an_error(processor):
    with pytest.raises(ValueError, match="None of 1 rows can be used, for example: Expected one or more captions"):
        run(make_rows([[]]), processor, on_bad_row="skip")


def test_completions_that_do_not_fit_are_spread_over_sequences_with_the_picture_again(processor):
    captions = [f"number {index} " + "x" * (3 * index) for index in range(7)]
    whole = run(make_rows([captions]), processor).dataset[0]
    limit = len(whole["input_ids"]) // 2
    encoded = run(make_rows([captions]), processor, limit).dataset
    assert len(encoded) >= 3
    labelled = []
    for row in encoded:
        assert len(row["input_ids"]) <= limit
        assert row["image_ids"] == [0]
        assert row["input_ids"].count(processor.image_token_id) == processor.num_image_tokens
        labelled += [label for label in row["shift_labels"] if label != -100]
    assert labelled == [label for label in whole["shift_labels"] if label != -100]
    assert sum(encoded["num_branches"][:]) == 7


def test_a_row_that_cannot_fit_is_refused_not_cut(processor):
    rows = make_rows([["a", "b" * 200], ["c"]])
    with pytest.raises(
        ValueError, match=r"r0\): The pictures \(1 of 16 tokens\) and one completion need \d+ tokens, more than max_length=150"
    ):
        run(rows, processor, 150)
    assert run(rows, processor, 150, on_bad_row="skip").dataset["row"][:] == [1]


@pytest.fixture
def stored_rows(tmp_path):
    make_rows([["a", "b"], ["c"]]).to_parquet(tmp_path / "rows.parquet")
    return load_rows(str(tmp_path / "rows.parquet"), "train")


def test_encoding_is_kept_and_never_taken_for_another(processor, stored_rows, monkeypatch):
    calls = []
    original = type(processor).encode_row
    monkeypatch.setattr(type(processor), "encode_row", lambda self, *row: calls.append(row) or original(self, *row))

    def encodes(**arguments) -> bool:
        calls.clear()
        run(stored_rows, arguments.pop("processor", processor), **arguments)
        return bool(calls)

    assert encodes()
    assert not encodes()
    assert encodes(instruction="What is this?")
    assert encodes(max_length=200)
    more_tokens = make_processor(make_config(pixel_shuffle_factor=2))
    assert encodes(processor=more_tokens)
    other_template = make_processor(make_config())
    other_template.chat_template = other_template.chat_template.replace("<|im_end|>", "<|im_end|> ")
    assert encodes(processor=other_template)
    other_vocabulary = make_processor(make_config())
    other_vocabulary.tokenizer.add_tokens(["lawn"])
    assert encodes(processor=other_vocabulary)
    monkeypatch.setattr("vlm_peft.data.inspect.getsource", lambda module: "a later version")
    assert encodes()
