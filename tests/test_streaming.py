"""Streams: rows as they come are what the map-style encoding gives; order, bad rows and held-out pictures."""

import io

import pytest
import torch
from conftest import flickr_rows, save_flickr
from PIL import Image as PILImage

from vlm_peft.data.arguments import DataArguments
from vlm_peft.data.collator import SharedPrefixCollator
from vlm_peft.data.leakage import picture_hashes
from vlm_peft.data.rows import encode_rows
from vlm_peft.data.splits import bind_task, load_split
from vlm_peft.data.streaming import LeakedPictureError, load_stream, stack_pixels, stream_rows


@pytest.fixture
def data(flickr) -> DataArguments:
    return DataArguments(dataset_name=str(flickr), stored_split="test", split_column="split")


def stream(data: DataArguments, processor, split: str = "train", **arguments):
    rows = load_stream(data, split)
    task = bind_task(data, rows.column_names)
    return stream_rows(rows, task, processor, max_length=arguments.pop("max_length", None), **arguments)


def test_rows_of_a_stream_are_those_of_the_encoded_data_set(data, processor):
    split = load_split(data, "train", processor)
    encoded = encode_rows(split.texts, split.task, processor, split.pictures, max_length=None).dataset
    whole = {tuple(row["input_ids"]): row for row in encoded}
    streamed = list(stream(data, processor))
    assert len(streamed) == len(encoded) == 24
    for row in streamed:
        same = whole[tuple(row["input_ids"])]
        for name in ("position_ids", "branch_ids", "shift_labels", "num_branches"):
            assert row[name] == same[name]
    # The first row of each colour: its pixels travel with it.
    for row in streamed:
        twin = [other for other in encoded if other["input_ids"] == row["input_ids"]]
        pixels = split.fetch_images([image for other in twin for image in other["image_ids"]])["pixel_values"]
        assert any(torch.equal(row["image_ids"][0], each) for each in pixels)


def test_the_order_is_shuffled_and_depends_on_the_seed_alone(data, processor):
    first = [row["row"] for row in stream(data, processor, seed=3)]
    pixels = [row["image_ids"][0] for row in stream(data, processor, seed=3)]
    again = [row["image_ids"][0] for row in stream(data, processor, seed=3)]
    other = [row["image_ids"][0] for row in stream(data, processor, seed=4)]
    assert first == list(range(24))
    assert all(torch.equal(a, b) for a, b in zip(pixels, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(pixels, other, strict=True))


def test_the_collator_takes_streamed_rows(data, processor):
    rows = list(stream(data, processor).take(3))
    batch = SharedPrefixCollator(0, stack_pixels, max_length=512, packing=True)(rows)
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert (batch["input_ids"] == processor.image_token_id).sum() == 3 * processor.num_image_tokens


def test_rows_that_follow_each_other_share_their_picture(tmp_path, processor):
    from datasets import Dataset, Image

    picture = flickr_rows()["image"]
    rows = {
        "image": [picture[0], picture[0], picture[1], picture[0]],
        "image_id": [5, 5, 6, 5],
        "question_id": [50, 51, 60, 52],
        "question": ["how?", "who?", "what?", "when?"],
        "multiple_choice_answer": ["so", "me", "that", "now"],
    }
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(tmp_path / "train.parquet")
    data = DataArguments(dataset_name=str(tmp_path / "train.parquet"), task="vqa")
    branches = sorted(row["num_branches"] for row in stream(data, processor))
    assert branches == [1, 1, 2]


def test_a_row_that_does_not_fit_one_sequence_becomes_several(data, processor):
    lengths = [len(row["input_ids"]) for row in stream(data, processor)]
    split = list(stream(data, processor, max_length=max(lengths) - 1))
    assert len(split) > 24
    assert sum(row["num_branches"] for row in split) == 24 * 5


def test_bad_rows_stop_the_stream_or_are_left_out(tmp_path, processor):
    rows = flickr_rows()
    rows["image"][2] = {"bytes": b"no picture", "path": None}
    rows["caption"][3] = [" "]
    data = DataArguments(
        dataset_name=str(save_flickr(tmp_path / "data", rows)), stored_split="test", split_column="split"
    )
    with pytest.raises(ValueError, match=r"Row .* of the stream cannot be used; .*--on_bad_row skip: "):
        list(stream(data, processor))
    assert len(list(stream(data, processor, on_bad_row="skip"))) == 22


def test_a_held_out_picture_ends_the_stream(data, processor):
    held_out = load_split(data, "test", processor)
    hashes = frozenset(picture_hashes(held_out.pictures))
    assert len(list(stream(data, processor, held_out_hashes=hashes))) == 24
    with pytest.raises(LeakedPictureError, match="is also in an evaluation split"):
        list(stream(data, processor, split="test", held_out_hashes=hashes, on_bad_row="skip"))


def test_a_missing_split_column_is_said(flickr, processor):
    data = DataArguments(dataset_name=str(flickr), stored_split="test", split_column="part")
    with pytest.raises(ValueError, match=r"no column 'part'; it has caption, .*"):
        load_stream(data, "train")


def test_encoded_bytes_of_pictures_without_a_file_are_not_needed(processor, data):
    """A decoded picture has no bytes to hash: it passes the guard and is used."""
    from vlm_peft.data.streaming import _checked

    picture = PILImage.open(io.BytesIO(flickr_rows()["image"][0]["bytes"]))
    assert _checked(picture, "0", frozenset({"x"})).size == picture.size
