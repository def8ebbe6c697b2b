"""Mixtures: rows are drawn by weight, every row comes, and each picture number finds its own data set."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset

from vlm_peft.data.mixture import fetch_from, first_images, mix


def rows(name: str, count: int) -> Dataset:
    return Dataset.from_dict({"name": [name] * count, "number": list(range(count))})


def split(count: int, value: float):
    def fetch(ids: list[int]) -> dict[str, torch.Tensor]:
        assert all(0 <= index < count for index in ids)
        return {"image_features": torch.tensor([[value + index] for index in ids])}

    return SimpleNamespace(pictures=range(count), fetch_images=fetch)


def test_without_weights_each_row_comes_once():
    mixed = mix([rows("a", 3), rows("b", 2)], [None, None], seed=0)
    assert sorted(zip(mixed["name"], mixed["number"], strict=True)) == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        ("b", 0),
        ("b", 1),
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_weights_rule_how_often_rows_are_drawn_and_all_rows_come(streamed):
    parts = [rows("a", 300), rows("b", 50)]
    if streamed:
        parts = [part.to_iterable_dataset() for part in parts]
    drawn = [(row["name"], row["number"]) for row in mix(parts, [1, 3], seed=0)]
    assert set(drawn) == {("a", number) for number in range(300)} | {("b", number) for number in range(50)}
    counts = Counter(name for name, _ in drawn)
    assert 2.5 < counts["b"] / counts["a"] < 3.5
    again = [(row["name"], row["number"]) for row in mix(parts, [1, 3], seed=0)]
    assert again == drawn
    assert [(row["name"], row["number"]) for row in mix(parts, [1, 3], seed=1)] != drawn


def test_streams_without_weights_are_drawn_equally_often():
    streams = [rows(name, 400).to_iterable_dataset() for name in "ab"]
    mixed = mix(streams, [None, None], seed=0)
    assert isinstance(mixed, IterableDataset)
    counts = Counter(row["name"] for row in mixed.take(400))
    assert 150 < counts["a"] < 250


@pytest.mark.parametrize("weights", [[1, None], [1, 0], [1, -2]])
def test_weights_that_say_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="Expected a weight above 0 for each data set of the mixture, or none at all"):
        mix([rows("a", 3), rows("b", 2)], weights, seed=0)


def test_one_data_set_is_itself():
    only = rows("a", 3)
    assert mix([only], [2.0], seed=0) is only


def test_pictures_are_fetched_from_the_data_set_that_has_them():
    splits = [split(3, 100.0), split(0, 0.0), split(2, 200.0)]
    assert first_images(splits) == [0, 3, 3]
    fetched = fetch_from(splits)([4, 0, 1, 3, 2])["image_features"]
    assert fetched.flatten().tolist() == [201.0, 100.0, 101.0, 200.0, 102.0]
