"""The collator: rows side by side or packed, every token in its row and branch, pictures in their order."""

import pytest
import torch

from vlm_peft.data.collator import SharedPrefixCollator

ROWS = [
    {
        "input_ids": [1, 2, 3, 7, 3],
        "position_ids": [0, 1, 2, 3, 2],
        "branch_ids": [0, 0, 1, 1, 2],
        "shift_labels": [-100, -100, 7, -100, 9],
        "image_ids": [4, 2],
    },
    {
        "input_ids": [5, 6, 8],
        "position_ids": [0, 1, 2],
        "branch_ids": [0, 1, 1],
        "shift_labels": [-100, 8, -100],
        "image_ids": [9],
    },
]


def collate(rows, **arguments):
    fetched = []

    def fetch(ids):
        fetched.append(ids)
        return {"image_features": torch.tensor(ids)}

    return SharedPrefixCollator(0, fetch, **arguments)(rows), fetched


def test_the_table_of_the_docstring():
    batch, fetched = collate(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 7, 3], [5, 6, 8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 0, 0]]
    assert batch["segment_ids"].tolist() == [
        [[0, 0], [0, 0], [0, 1], [0, 1], [0, 2]],
        [[0, 0], [0, 1], [0, 1], [-1, -1], [-1, -1]],
    ]
    assert batch["label_positions"].tolist() == [2, 4, 6]
    assert batch["labels"].tolist() == batch["shift_labels"].tolist() == [[7, 9, 8]]
    assert fetched == [[4, 2, 9]]
    assert batch["image_features"].tolist() == [4, 2, 9]


def test_packed_rows_keep_apart_and_their_pictures_in_order():
    batch, fetched = collate([*ROWS, {**ROWS[1], "image_ids": [1]}], packing=True, max_length=8)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 7, 3, 5, 6, 8], [5, 6, 8, 0, 0, 0, 0, 0]]
    assert batch["segment_ids"][0, :, 0].tolist() == [0] * 5 + [1] * 3
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 2, 0, 1, 2]
    assert batch["label_positions"].tolist() == [2, 4, 6, 9]
    assert fetched == [[4, 2, 9, 1]]


@pytest.mark.parametrize(("sequence_length", "width"), [(12, 12), (6, 128)])
def test_one_sequence_of_a_given_length_has_the_same_labels(sequence_length, width):
    batch, fetched = collate(ROWS, sequence_length=sequence_length, max_length=5, image_token_id=3)
    assert batch["input_ids"].shape == (1, width)
    targets, positions = batch["shift_labels"][0], batch["label_positions"]
    assert targets.shape == positions.shape == (256,)
    assert targets[targets != -100].tolist() == [7, 9, 8]
    assert positions[targets != -100].tolist() == [2, 4, 6]
    assert batch["image_positions"].tolist() == [2, 4]
    assert fetched == [[4, 2, 9]]


def test_rows_without_pictures_fetch_none():
    batch, fetched = collate([{**ROWS[0], "image_ids": []}])
    assert fetched == []
    assert not [key for key in batch if "image" in key or "pixel" in key]


@pytest.mark.parametrize("packing", [False, True])
def test_a_row_longer_than_a_sequence_is_refused_not_cut(packing):
    with pytest.raises(ValueError, match="Row 0 of the batch has 5 tokens and does not fit into max_length=4 tokens"):
        collate(ROWS, packing=packing, max_length=4)


def test_packing_asks_for_a_length():
    with pytest.raises(ValueError, match="packing needs max_length, the tokens of a sequence; got None"):
        collate(ROWS, packing=True)
