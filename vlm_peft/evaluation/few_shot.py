"""In-context few-shot: solved examples, pictures and answers, before each question; for every task.

Stage: a split and rows of the training split -> a split whose questions show some of the latter first. Nothing is
trained. Each question has examples of its own, drawn with a seed, so that no lucky or unlucky few stand for all.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..data.arguments import DataArguments
from ..data.mixture import fetch_from
from ..data.rows import load_rows
from ..data.splits import Question, Split, make_split
from ..model.modeling_vision_qwen import base_model

_MOST = 2048
"""Rows that examples are drawn from at most, as OpenFlamingo has it: all their pictures are encoded."""


@dataclass
class FewShotSplit(Split):
    """A split whose questions stand behind solved examples.

    Args:
        source ([`~vlm_peft.data.splits.Split`]): Of [`load_examples`].
        shots (`int`): Examples before each question.
        seed (`int`): Of the draw.
    """

    source: Split | None = None
    shots: int = 0
    seed: int = 0

    def questions(self) -> Iterator[Question]:
        """As a split's, behind their examples, which never show a picture of the question.

        Raises:
            ValueError: When too few rows are left to draw from.
        """
        for question in super().questions():
            messages, pictures = self._draw(question)
            yield replace(
                question,
                prompt=[*messages, *question.prompt],
                image_ids=[*(len(self.pictures) + image for image in pictures), *question.image_ids],
                solved=len(pictures),
            )

    def _draw(self, question: Question) -> tuple[list[dict], list[int]]:
        """Messages and pictures of a question's examples."""
        assert self.source is not None
        source, shown = self.source, {self.pictures.hashes[image] for image in question.image_ids}
        draw = random.Random(f"{self.seed} {question.id}")
        messages: list[dict] = []
        pictures: list[int] = []
        found = 0
        for row in draw.sample(range(len(source.texts)), len(source.texts)):
            if found == self.shots:
                break
            own = list(source.pictures.of_row(row))
            if row in source.left_out or shown & {source.pictures.hashes[image] for image in own}:
                continue
            example = source.task.example(source.texts[row])
            answer = draw.choice(example.completions)
            said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            messages += [*example.prompt, *said]
            pictures += own
            found += 1
        if found < self.shots:
            raise ValueError(
                f"Expected {self.shots} solved examples with other pictures than the question {question.id}, found "
                f"{found} in the split {source.name}."
            )
        return messages, pictures


def load_examples(data: DataArguments, name: str, processor, *, count: int, seed: int) -> Split:
    """Rows that examples are drawn from: of a large split, some that are drawn with the seed.

    Args:
        data ([`~vlm_peft.data.arguments.DataArguments`]): Data set, columns and task.
        name (`str`): Of the split.
        processor ([`VisionQwenProcessor`]): Its image processor makes `pixel_values`.
        count (`int`): Examples of all questions together: more rows are never needed.
        seed (`int`): Of the draw.

    Raises:
        ValueError, FileNotFoundError: See [`~vlm_peft.data.rows.load_rows`].
    """
    rows = load_rows(
        str(data.dataset_name),
        name,
        revision=data.dataset_revision,
        stored_split=data.stored_split,
        split_column=data.split_column,
    )
    size = min(len(rows), _MOST, max(count, 16))
    chosen = sorted(random.Random(seed).sample(range(len(rows)), size))
    return make_split(data, name, rows.select(chosen), processor)


def with_examples(split: Split, source: Split, shots: int, seed: int) -> FewShotSplit:
    """The split with examples before its questions; pictures of both come through its `fetch_images`."""
    known: dict[str, Any] = vars(split) | {"fetch_images": fetch_from([split, source])}
    return FewShotSplit(**known, source=source, shots=shots, seed=seed)


def check_room(model, processor, split: FewShotSplit, max_new_tokens: int) -> None:
    """Checks, before a picture is encoded, that the decoder has places for the questions and all their examples.

    Args:
        model: `VisionQwen` or a `PeftModel` around it.
        processor ([`VisionQwenProcessor`]): Of the model.
        split ([`FewShotSplit`]): Of [`with_examples`].
        max_new_tokens (`int`): Of an answer at most.

    Raises:
        ValueError: With both lengths, and how many examples there is room for.
    """
    limit: int | None = getattr(base_model(model).config.text_config, "max_position_embeddings", None)
    if limit is None:
        return
    for question in split.questions():
        length = len(processor.encode_prompt(question.prompt)) + max_new_tokens
        if length > limit:
            alone = len(processor.encode_prompt(question.prompt[-1:])) + max_new_tokens
            room = max(0, (limit - alone) * split.shots // max(1, length - alone))
            raise ValueError(
                f"{split.shots} solved examples are too many: with its {len(question.image_ids)} pictures of "
                f"{processor.num_image_tokens} tokens and {max_new_tokens} for the answer, the question {question.id} "
                f"takes {length:,} tokens, and the decoder has {limit:,} positions. There is room for about {room}: "
                "lower --shots."
            )
