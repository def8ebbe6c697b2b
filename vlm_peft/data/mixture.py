"""Mixtures: several data sets, each with its own task, as one training set.

Stage: encoded rows of several splits -> one data set and one way to their pictures.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate, groupby
from typing import Any

import torch
from datasets import IterableDataset, concatenate_datasets, interleave_datasets

from .splits import Split


def mix(encoded: list, weights: list[float | None], seed: int) -> Any:
    """Joins encoded data sets, or streams of them.

    Args:
        encoded (`list[Dataset]` or `list[IterableDataset]`): At least one.
        weights (`list[float]`, *optional*): For each, how often its rows are drawn, relative to the others. Rows of a
            small data set are repeated until every row of every data set was drawn once. Without any weight, each row
            comes once; of streams, whose lengths are not known, all are drawn equally often.
        seed (`int`): Of the draw.

    Raises:
        ValueError: When some have a weight and some have none, or one is not above 0.
    """
    if len(encoded) == 1:
        return encoded[0]
    is_stream = isinstance(encoded[0], IterableDataset)
    if all(weight is None for weight in weights):
        if not is_stream:
            return concatenate_datasets(encoded)
        weights = [1.0] * len(encoded)
    given = [weight for weight in weights if weight is not None]
    if len(given) < len(weights) or min(given) <= 0:
        raise ValueError(f"Expected a weight above 0 for each data set of the mixture, or none at all, got {weights}.")
    shares = [weight / sum(given) for weight in given]
    if is_stream:
        # `interleave_datasets` would pass rows through Arrow, which knows no tensors.
        # A list among its arguments would be taken for shards and come in pieces.
        arguments = {"streams": tuple(encoded), "shares": tuple(shares), "seed": seed}
        return IterableDataset.from_generator(_draw, gen_kwargs=arguments)
    return interleave_datasets(encoded, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def _draw(streams: tuple[IterableDataset, ...], shares: tuple[float, ...], seed: int) -> Iterator[dict]:
    """Rows of streams, drawn by their shares until each has ended once."""
    draw = random.Random(seed)
    iterators = [iter(stream) for stream in streams]
    ended = [False] * len(streams)
    while True:
        chosen = draw.choices(range(len(streams)), shares)[0]
        try:
            row = next(iterators[chosen])
        except StopIteration:
            ended[chosen] = True
            if all(ended):
                return
            iterators[chosen] = iter(streams[chosen])
            row = next(iterators[chosen])
        yield row


def first_images(splits: list[Split]) -> list[int]:
    """Number of each split's first picture when the pictures of all are counted in one row."""
    return [0, *accumulate(len(split.pictures) for split in splits)][:-1]


def fetch_from(splits: list[Split]) -> Callable[[list[int]], dict[str, torch.Tensor]]:
    """`fetch_images` over all splits, for picture numbers that [`first_images`] shifted."""
    starts = first_images(splits)
    # A split without pictures starts where the next one does and owns none.
    owners = [index for index, split in enumerate(splits) if len(split.pictures)]
    owned = [starts[index] for index in owners]

    def owner_of(image: int) -> int:
        return owners[bisect_right(owned, image) - 1]

    def fetch(ids: list[int]) -> dict[str, torch.Tensor]:
        parts = [
            splits[owner].fetch_images([image - starts[owner] for image in images])
            for owner, images in groupby(ids, key=owner_of)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return fetch
