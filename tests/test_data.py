"""Data: rows from every kind of source, and their encoding: cached, never cut, bad rows stopped at or counted."""

import io
import json
import logging

import pytest
from conftest import flickr_rows, make_config, make_processor
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from vlm_peft.data.pictures import Pictures
from vlm_peft.data.rows import bind_rows, encode_rows, find_unreadable, load_rows, picture_folder
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


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_an_image_folder_with_metadata(tmp_path, kind):
    folder = tmp_path / "train"
    folder.mkdir()
    for colour in ("red", "blue"):
        (folder / f"{colour}.png").write_bytes(encode(colour))
    metadata = Dataset.from_list([{"file_name": f"{name}.png", "text": f"a {name} wall"} for name in ("red", "blue")])
    write = {"jsonl": metadata.to_json, "csv": metadata.to_csv, "parquet": metadata.to_parquet}[kind]
    write(folder / f"metadata.{kind}")
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


def test_two_stored_splits_at_once_and_two_parts_of_a_column(tmp_path):
    """COCO's `restval` counts as train."""
    (tmp_path / "data").mkdir()
    for name, count in (("train", 3), ("restval", 2), ("test", 1)):
        make_rows([[name]] * count).to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    assert len(load_rows(str(tmp_path), "train+restval")) == 5
    with pytest.raises(ValueError, match="has no split 'rest'; it has"):
        load_rows(str(tmp_path), "train+rest")
    with pytest.raises(ValueError, match=r"One file holds one split, got 'train\+restval'"):
        load_rows(str(tmp_path / "data" / "train-00000-of-00001.parquet"), "train+restval")
    rows = make_rows([["a"], ["b"], ["c"], ["d"]]).add_column("split", ["train", "val", "restval", "train"])
    rows.to_parquet(tmp_path / "rows.parquet")
    found = load_rows(str(tmp_path / "rows.parquet"), "train+restval", split_column="split")
    assert found["id"][:] == ["r0", "r2", "r3"]
    with pytest.raises(ValueError, match=r"No row of .* has split = 'rest'; found restval, train, val"):
        load_rows(str(tmp_path / "rows.parquet"), "train+rest", split_column="split")


def test_a_split_column_of_class_labels_is_read_by_name(tmp_path):
    rows = make_rows([["a"], ["b"], ["c"]]).add_column("part", [1, 0, 1])
    rows.cast_column("part", ClassLabel(names=["train", "test"])).to_parquet(tmp_path / "rows.parquet")
    found = load_rows(str(tmp_path / "rows.parquet"), "test", stored_split="whole", split_column="part")
    assert found["id"][:] == ["r0", "r2"]


def test_ids_that_name_several_rows_are_replaced_by_row_numbers(tmp_path):
    rows = make_rows([["a"], ["b"], ["c"]]).remove_columns("id").add_column("id", ["x", "x", "y"])
    rows.to_parquet(tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "rows.parquet"), "train")["id"][:] == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.parquet"])
def test_tables(tmp_path, name):
    """Tables of text hold text, parquet has types of its own; an empty cell is none."""
    rows = Dataset.from_list([{"image": "a.png", "answer": 2}, {"image": None, "answer": 3}])
    path = tmp_path / name
    if name.endswith("sv"):
        rows.to_csv(path, sep="\t" if name == "rows.tsv" else ",")
    elif name == "rows.json":
        path.write_text(json.dumps(list(rows)))
    else:
        (rows.to_parquet if name == "rows.parquet" else rows.to_json)(path)
    found = load_rows(str(path), "anything")
    answers = [2, 3] if name == "rows.parquet" else ["2", "3"]
    assert (found["image"][:], found["answer"][:]) == (["a.png", None], answers)


# --- bind_rows ---


def test_relative_paths_begin_at_the_table_or_at_the_image_folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encode())
    (tmp_path / "rows.jsonl").write_text('{"image": "pictures/a.png", "text": "a"}\n{"image": null, "text": "b"}\n')
    rows = load_rows(str(tmp_path / "rows.jsonl"), "train")
    task = make_task("caption", rows.column_names)
    _, pictures = bind_rows(rows, task, picture_folder(str(tmp_path / "rows.jsonl")))
    assert [pictures.of_row(0), pictures.of_row(1)] == [range(1), range(1, 1)]
    assert pictures.encoded(0) == encode()
    _, pictures = bind_rows(rows, task, picture_folder(str(tmp_path / "rows.jsonl"), str(tmp_path / "pictures")))
    assert find_unreadable(pictures).keys() == {0}
    assert picture_folder("somebody/a_data_set") is None
    with pytest.raises(FileNotFoundError, match=r"--image_folder .*nowhere is not there"):
        picture_folder("somebody/a_data_set", str(tmp_path / "nowhere"))


def test_groups_are_joined_wherever_their_rows_stand():
    rows = make_rows([["a"], ["b"], ["c"], ["d"]], [encode(colour) for colour in ("red", "blue", "red", "white")])
    rows = rows.add_column("image_id", [7, 8, 7, None])
    task = make_task("caption", rows.column_names)
    texts, pictures = bind_rows(rows, task)
    assert texts["captions"][:] == [[["a"], ["c"]], [["b"]], [["d"]]]
    assert texts["id"][:] == [[7, 7], [8], [None]]
    assert [task.example(row).completions for row in texts] == [["a", "c"], ["b"], ["d"]]
    assert [pictures.encoded(index) for index in range(len(pictures))] == list(map(encode, ("red", "blue", "white")))


def make_decks(evidence: list[list[int]]) -> Dataset:
    """One deck of three pages, the second empty, with a question a list of evidence."""
    pages = {"page_1": encode("red"), "page_2": None, "page_3": encode("blue")}
    cells = {name: [page and {"bytes": page, "path": None}] * len(evidence) for name, page in pages.items()}
    texts = {"question": [f"{number}?" for number in range(len(evidence))], "answer": ["a"] * len(evidence)}
    columns = cells | texts | {"evidence_pages": evidence, "deck_name": ["d"] * len(evidence)}
    rows = Dataset.from_dict(columns | {"id": [f"q{number}" for number in range(len(evidence))]})
    return rows.cast(Features(rows.features | dict.fromkeys(pages, Image())))


@pytest.mark.parametrize(("pages", "shown"), [("evidence", [["blue"], ["red", "blue"]]), ("all", [["red", "blue"]])])
def test_pages_of_a_deck_are_counted_over_empty_cells(processor, pages, shown):
    rows = make_decks([[3], [1, 3], [3, 1]])
    task = make_task("slides", rows.column_names, slide_pages=pages)
    texts, pictures = bind_rows(rows, task)
    assert [[pictures.encoded(index) for index in pictures.of_row(row)] for row in range(len(texts))] == [
        list(map(encode, colours)) for colours in shown
    ]
    encoded = encode_rows(texts, task, processor, pictures, max_length=None).dataset
    assert sum(encoded["num_branches"][:]) == 3
    for row, colours in zip(encoded, shown, strict=True):
        assert row["input_ids"].count(processor.image_token_id) == len(colours) * processor.num_image_tokens


def test_evidence_on_an_empty_page_is_named(processor):
    rows = make_decks([[2], [1]])
    task = make_task("slides", rows.column_names)
    texts, pictures = bind_rows(rows, task)
    with pytest.raises(ValueError, match=r"1 rows \(q0\): .*evidence_pages .* the deck's pages 1, 3, got \[2\]"):
        encode_rows(texts, task, processor, pictures, max_length=None)


def test_text_alone_is_a_data_set_without_pictures(processor):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = Dataset.from_list([{"id": str(number), "messages": turns} for number in range(3)])
    task = make_task("chat", rows.column_names)
    texts, pictures = bind_rows(rows, task)
    assert len(pictures) == 0
    assert encode_rows(texts, task, processor, pictures, max_length=None).dataset["image_ids"][:] == [[], [], []]


def test_pictures_and_their_places_must_agree(processor):
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "a"}]
    rows = make_rows([["a"]] * 2, [encode(), None]).remove_columns("captions").add_column("conversations", [turns] * 2)
    task = make_task("chat", rows.column_names)
    texts, pictures = bind_rows(rows, task)
    with pytest.raises(ValueError, match=r"1 rows \(r1\): The row has 0 pictures, its prompt has places for 1\."):
        encode_rows(texts, task, processor, pictures, max_length=None)


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
        ValueError,
        match=r"r0\): The pictures \(1 of 16 tokens\) and one completion need \d+ tokens, more .*=150",
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
    monkeypatch.setattr("vlm_peft.data.rows.inspect.getsource", lambda module: "a later version")
    assert encodes()


def test_a_folder_that_was_made_anew_under_its_name_gives_its_new_rows(tmp_path):
    files = "  data_files:\n  - split: train\n    path: data/train-*.parquet\n"
    card = f"---\nconfigs:\n- config_name: default\n{files}---\n"
    for place, captions in (("one", ["a", "b"]), ("two", ["c", "d", "e"])):
        folder = tmp_path / place / "pictures"
        (folder / "data").mkdir(parents=True)
        (folder / "README.md").write_text(card)
        Dataset.from_dict({"caption": captions}).to_parquet(folder / "data" / "train-0.parquet")
        assert load_rows(str(folder), "train")["caption"][:] == captions
