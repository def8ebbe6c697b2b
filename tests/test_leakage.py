"""Leakage guard: equal pictures and equal COCO numbers are found, whatever the rows are called."""

import io
from types import SimpleNamespace

import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from vlm_peft.data.leakage import check_overlap, coco_number, find_overlap
from vlm_peft.data.pictures import Pictures


def png(colour: int) -> dict:
    encoded = io.BytesIO()
    PILImage.new("RGB", (4, 4), (colour, 0, 0)).save(encoded, "PNG")
    return {"bytes": encoded.getvalue(), "path": None}


def split(name: str, colours: list[int], **columns):
    """Rows with one picture each; a list of colours in a row makes several."""
    ids = [f"{name}-{index}" for index in range(len(colours))]
    texts = Dataset.from_dict({"id": ids, **columns})
    pictures = Dataset.from_dict({"image": [png(colour) for colour in colours]}).cast_column("image", Image())
    return SimpleNamespace(name=name, texts=texts, pictures=Pictures(pictures, ["image"]))


def test_equal_pictures_are_found_by_content():
    overlap = find_overlap(split("train", [1, 2, 3, 3]), split("test", [9, 3]))
    assert overlap.by_content == [("train-2", "test-1")]
    assert overlap.by_id == []
    assert not find_overlap(split("train", [1, 2]), split("test", [3, 4]))


@pytest.mark.parametrize(
    ("row", "number"),
    [
        ({"cocoid": 391895}, "391895"),
        ({"filename": "COCO_val2014_000000391895.jpg"}, "391895"),
        ({"file_name": "COCO_train2014_000000391895_2.jpg"}, "391895"),
        ({"coco_url": "http://images.cocodataset.org/train2017/000000391895.jpg"}, "391895"),
        ({"filepath": ["val2014/COCO_val2014_000000391895.jpg", "another"]}, "391895"),
        ({"filename": "36979.jpg"}, None),
        ({"filename": "1000000391895.jpg"}, None),
        ({"filename": None, "cocoid": None}, None),
        ({"image_id": 391895}, None),
    ],
)
def test_coco_numbers(row, number):
    assert coco_number(row) == number


def test_coco_pictures_that_moved_between_splits_are_found_by_number():
    train = split("train", [1, 2], file_name=["000000000007.jpg", "000000000008.jpg"])
    test = split("test", [3, 4], filename=["COCO_val2014_000000000008.jpg", "COCO_val2014_000000000009.jpg"])
    overlap = find_overlap(train, test)
    assert overlap.by_id == [("train-1", "test-0")]
    assert overlap.by_content == []


def test_overlap_stops_with_the_count_unless_allowed():
    train, test = split("train", [1, 2, 3]), split("test", [2, 3, 4])
    said = "2 pictures of the training split 'train' are also in 'test' by content, 0 by their COCO number"
    with pytest.raises(ValueError, match=said) as error:
        check_overlap(train, test)
    assert "train-1 = test-0" in str(error.value)
    assert "--allow_overlap true" in str(error.value)
    assert said in check_overlap(train, test, allow=True)
    assert check_overlap(train, split("test", [7])) is None


def test_pictures_that_cannot_be_read_do_not_hide_others(tmp_path):
    broken = split("test", [2, 3])
    pictures = Dataset.from_dict({"image": [{"bytes": None, "path": str(tmp_path / "gone.png")}, png(3)]})
    broken.pictures = Pictures(pictures.cast_column("image", Image()), ["image"])
    assert find_overlap(split("train", [3]), broken).by_content == [("train-0", "test-1")]
