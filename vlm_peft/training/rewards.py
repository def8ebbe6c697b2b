"""Rewards: what a sampled text earns, by the task's own score, a CLIP, its length, its form, or a user's function.

Stage: options and the questions of a training -> functions in TRL's form (`prompts`, `completions`, `completion_ids`
and the columns of the data set by name -> a number for each text), which TRL mixes by `reward_weights`.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..metrics.clip_score import ClipScorer
from ..tasks import TaskKind, make_reward
from ..tasks.scoring import Row

REWARDS = ("task", "clip_score", "length", "format")
"""Beside the functions of the user's."""

Reward = Callable[..., list[float]]


def parse_reward(name: str) -> str:
    """Checks the name of a reward, before anything is loaded.

    Raises:
        ValueError: When it is none of [`REWARDS`] and no `module:function`.
    """
    if name not in REWARDS and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(f"rewards: expected {', '.join(REWARDS)} or module:function, got {name!r}.")
    return name


def load_function(name: str) -> Reward:
    """A function of the user's.

    Args:
        name (`str`): `module:function`, to be found where Python imports from.

    Raises:
        ValueError: When the module or the function is not there.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--rewards {name}: {error}. Expected module:function that Python can import.") from error
    if not callable(found):
        raise ValueError(f"--rewards {name} is a {type(found).__name__}, expected a function.")
    return found


def only_ended(name: str, end: int, earn: Callable[[Sequence[str], Sequence[int]], Sequence[float]]) -> Reward:
    """A reward that counts the end of the turn: a text that was cut before it earns nothing, and an empty one neither.

    Args:
        name (`str`): In logs.
        end (`int`): Token id of the end of the turn.
        earn (`Callable`): Texts and the numbers of their questions -> what each earns.
    """

    def reward(*, completions, completion_ids, row, **columns) -> list[float]:
        ended = [
            place
            for place, (ids, text) in enumerate(zip(completion_ids, completions, strict=True))
            if ids and ids[-1] == end and text.strip()
        ]
        earned = earn([completions[place].strip() for place in ended], [row[place] for place in ended])
        found = [0.0] * len(completions)
        for place, value in zip(ended, earned, strict=True):
            found[place] = float(value)
        return found

    reward.__name__ = name
    return reward


def task_reward(rows: Sequence[Row], kinds: Sequence[TaskKind], end: int, training: Sequence[int]) -> Reward:
    """The reward of each question's task.

    Args:
        rows (`Sequence[Row]`): Of all questions, with `references` and what else their scores need.
        kinds (`Sequence[TaskKind]`): Of the same.
        end (`int`): Of [`only_ended`].
        training (`Sequence[int]`): Numbers of those that are trained on, by which captions weigh their words.

    Raises:
        ValueError: If a row lacks what its task needs.
    """
    by_kind: dict[str, Callable] = {}
    for kind in {each.name: each for each in kinds}.values():
        own = [rows[number] for number in training if kinds[number].name == kind.name]
        by_kind[kind.name] = make_reward(kind, own)

    def earn(texts: Sequence[str], numbers: Sequence[int]) -> list[float]:
        return [by_kind[kinds[n].name]([text], [rows[n]])[0] for text, n in zip(texts, numbers, strict=True)]

    return only_ended("task", end, earn)


def length_reward(rows: Sequence[Row], end: int) -> Reward:
    """1 for as many words as a reference has, or between two; falling to 0 at none and at twice the longest.

    Args:
        rows (`Sequence[Row]`): With `references`.
        end (`int`): Of [`only_ended`].
    """

    def one(text: str, row: Row) -> float:
        counts = [len(reference.split()) for reference in row["references"]]
        shortest, longest, words = min(counts), max(counts), len(text.split())
        if words < shortest:
            return words / shortest
        return max(0.0, 1 - max(0, words - longest) / max(1, longest))

    return only_ended(
        "length", end, lambda texts, numbers: [one(t, rows[n]) for t, n in zip(texts, numbers, strict=True)]
    )


def format_reward(pattern: str, end: int) -> Reward:
    """1 for a text that a regular expression matches as a whole.

    Args:
        pattern (`str`): Of Python's `re`.
        end (`int`): Of [`only_ended`].

    Raises:
        ValueError: When it is no regular expression.
    """
    try:
        whole = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--format_pattern {pattern!r} is no regular expression: {error}.") from error
    return only_ended("format", end, lambda texts, _: [float(whole.fullmatch(text) is not None) for text in texts])


def clip_reward(clip: str, open_picture: Callable[[int], Any], device: torch.device | str, end: int) -> Reward:
    """CLIPScore of text and picture, 0..2.5; alone it ruins the grammar, so mix it with another.

    Args:
        clip (`str`): Folder or id of a CLIP with both towers.
        open_picture (`Callable`): Number of a question -> its first picture.
        device (`torch.device` or `str`): Where CLIP runs.
        end (`int`): Of [`only_ended`].

    Raises:
        ValueError, OSError: See [`~vlm_peft.metrics.clip_score.ClipScorer`].
    """
    scorer = ClipScorer(clip, device=device)
    seen: dict[int, torch.Tensor] = {}

    def earn(texts: Sequence[str], numbers: Sequence[int]) -> list[float]:
        if not texts:
            return []
        fresh = [number for number in dict.fromkeys(numbers) if number not in seen]
        if fresh:
            seen.update(zip(fresh, scorer.see([open_picture(number) for number in fresh]), strict=True))
        read, _ = scorer.read(texts)
        return scorer.score(torch.stack([seen[number] for number in numbers]), read).tolist()

    return only_ended("clip_score", end, earn)


def make_rewards(
    names: Sequence[str],
    rows: Sequence[Row],
    kinds: Sequence[TaskKind],
    end: int,
    *,
    training: Sequence[int],
    open_picture: Callable[[int], Any],
    options: Mapping[str, Any],
) -> list[Reward]:
    """The rewards that a run names, in their order.

    Args:
        names (`Sequence[str]`): Of [`REWARDS`], or `module:function`.
        rows, kinds, end, training: Of [`task_reward`].
        open_picture (`Callable`): Of [`clip_reward`].
        options (`Mapping`): `clip_model`, `format_pattern` and `device`.

    Raises:
        ValueError, OSError: For a function that is not there, or what one of the rewards needs and is missing.
    """
    makers: dict[str, Callable[[], Reward]] = {
        "task": lambda: task_reward(rows, kinds, end, training),
        "clip_score": lambda: clip_reward(options["clip_model"], open_picture, options["device"], end),
        "length": lambda: length_reward(rows, end),
        "format": lambda: format_reward(options["format_pattern"], end),
    }
    return [makers[name]() if name in makers else load_function(name) for name in names]
