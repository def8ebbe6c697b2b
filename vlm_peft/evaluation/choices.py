"""Choices: how probable a model finds each of several texts as its answer; nothing is generated.

Stage: trained model -> `(Q, C)` log-probabilities, in the place of `generation` for tasks with a list of answers; and
those of the tokens of answers that are there already, after it.

The texts are branches of one prompt, so that its pictures are read once, however many texts there are. A text's score
is the sum of the log-probabilities of its tokens, the end of the turn included: the probability that the model answers
this and nothing else. Without the end, "cat" would be given what belongs to "caterpillar"; divided by the number of
tokens, scores would not be probabilities, which calibration needs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from PIL.Image import Image
from torch import nn
from tqdm.auto import tqdm

from ..data.collator import SharedPrefixCollator
from ..data.probe import probe
from ..data.rows import check_places
from ..model.configuration_vision_qwen import IGNORE_INDEX
from ..model.modeling_vision_qwen import VisionQwen, base_model
from ..model.processing_vision_qwen import VisionQwenProcessor
from ..model.shared_prefix import lay_out
from ..tasks import Example
from ..tasks.example import picture_turn
from .generation import check_length, common_prefix

_BRANCHES = 1024
"""Tokens of the choices in one pass at most, unless one alone has more: attention grows with their square."""
_BATCH = 8192
"""Tokens of a batch at most, and so many numbers of a mask a token."""
_HEAD = 256
"""Positions whose logits over the whole vocabulary are held at a time."""


def choice_log_probs(
    model: VisionQwen | PeftModel,
    processor: VisionQwenProcessor,
    prompts: list[list[dict]],
    image_ids: list[list[int]],
    fetch_images: Callable[[list[int]], dict[str, torch.Tensor]],
    choices: Sequence[str],
    *,
    batch_size: int = 64,
    progress: str | None = None,
) -> torch.Tensor:
    """The log-probability of each choice as the answer to each prompt.

    More choices than one sequence should hold are split into several, each behind the prompt again.

    Args:
        model, processor, prompts, image_ids, fetch_images: See [`~vlm_peft.evaluation.generation.generate_texts`].
        choices (`Sequence[str]`): Texts, the same for all prompts.
        batch_size (`int`, *optional*, defaults to 64): Sequences at a time at most.
        progress (`str`, *optional*): Title of a progress bar; none without it.

    Returns:
        `torch.FloatTensor` of shape `(Q, C)`: Nats, on the CPU.

    Raises:
        ValueError: When a prompt has another number of pictures than places, or is too long for the decoder.
    """
    layouts: dict[str, list[dict]] = {}
    units: list[tuple[int, int, dict]] = []
    for question, (prompt, images) in enumerate(zip(prompts, image_ids, strict=True)):
        # Mostly all prompts are one.
        key = f"{len(images)} {prompt}"
        if key not in layouts:
            layouts[key] = _lay_out(model, processor, prompt, images, choices)
        first = 0
        for layout in layouts[key]:
            units.append((question, first, layout | {"image_ids": images}))
            first += layout["num_branches"]
    scores = torch.zeros(len(prompts), len(choices))
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, unit="picture")
    found = _passes(model, processor, [layout for _, _, layout in units], fetch_images, batch_size)
    for (question, first, layout), nats in zip(units, found, strict=True):
        own = torch.zeros(layout["num_branches"]).index_add_(0, torch.tensor(_owners(layout)), nats)
        scores[question, first : first + len(own)] = own
        bar.update(first == 0)
    bar.close()
    return scores


def answer_log_probs(
    model: VisionQwen | PeftModel,
    processor: VisionQwenProcessor,
    encoded: list[list[int]],
    image_ids: list[list[int]],
    fetch_images: Callable[[list[int]], dict[str, torch.Tensor]],
    answers: list[list[int]],
    *,
    batch_size: int = 64,
) -> list[list[float]]:
    """The log-probability of each token of an answer, given the prompt and the tokens before it: one pass, no search.

    Answers about the same pictures are branches of one row, which reads the pictures once.

    Args:
        model, processor, encoded, image_ids, fetch_images, batch_size: See
            [`~vlm_peft.evaluation.generation.generate_ids`].
        answers (`list[list[int]]`): Tokens of each answer, for example of `generate_ids`; at least one.

    Returns:
        `list[list[float]]`: Nats, one for each token.
    """
    about: dict[tuple[int, ...], list[int]] = {}
    for index, images in enumerate(image_ids):
        about.setdefault(tuple(images), []).append(index)
    groups: list[list[int]] = []
    for members in about.values():
        prefix, room = len(common_prefix([encoded[index] for index in members])), 0
        for index in members:
            # What differs between prompts is in the branches, too.
            length = len(encoded[index]) - prefix + len(answers[index])
            if length > room:
                groups.append([])
                room = max(_BRANCHES, length)
            groups[-1].append(index)
            room -= length
    layouts = []
    for members in groups:
        branches = [
            (encoded[index] + answers[index], [IGNORE_INDEX] * len(encoded[index]) + answers[index])
            for index in members
        ]
        own = {"image_ids": image_ids[members[0]], "num_branches": len(members)}
        layouts.append(vars(lay_out(branches)) | own)
    found: list[list[float]] = [[] for _ in answers]
    passes = _passes(model, processor, layouts, fetch_images, batch_size)
    for members, layout, nats in zip(groups, layouts, passes, strict=True):
        for branch, value in zip(_owners(layout), nats.tolist(), strict=True):
            found[members[branch]].append(value)
    return found


def _passes(
    model: VisionQwen | PeftModel, processor: VisionQwenProcessor, layouts: list[dict], fetch_images, batch_size: int
) -> Iterator[torch.Tensor]:
    """Log-probabilities of the labels of each laid-out row, on the CPU."""
    sharing, base = probe(model).sharing, base_model(model)

    def fetch(ids: list[int]) -> dict[str, torch.Tensor]:
        distinct = list(dict.fromkeys(ids))
        found = {key: value.to(model.device) for key, value in fetch_images(distinct).items()}
        if "pixel_values" in found:
            found = {"image_features": base.model.get_vision_features(found["pixel_values"])}
        places = [distinct.index(each) for each in ids]
        return {key: value[places] for key, value in found.items()}

    pad: Any = processor.tokenizer.pad_token_id
    collator = SharedPrefixCollator(pad, fetch, image_token_id=base.config.image_token_id, sharing=sharing)
    while layouts:
        size = _batch_size(layouts[:batch_size], sharing)
        chosen, layouts = layouts[:size], layouts[size:]
        with torch.inference_mode():
            found = _label_nats(base, collator, chosen).cpu()
        yield from found.split([len(_owners(layout)) for layout in chosen])


def _lay_out(model, processor, prompt: list[dict], images: list[int], choices: Sequence[str]) -> list[dict]:
    """The choices behind the prompt, in one or several sequences."""
    check_places(Example(prompt, list(choices), []), len(images))
    # The token before the name and the end of the turn are in each branch, too.
    lengths = [len(ids) + 2 for ids in processor.tokenizer(list(choices), add_special_tokens=False)["input_ids"]]
    check_length(model, len(processor.encode_prompt(prompt)), max(lengths))
    layouts, start = [], 0
    while start < len(choices):
        stop, room = start + 1, _BRANCHES - lengths[start]
        while stop < len(choices) and lengths[stop] <= room:
            room -= lengths[stop]
            stop += 1
        row = processor.encode_row(prompt, list(choices[start:stop]), labels_prompt=False)
        layouts.append(vars(row) | {"num_branches": stop - start})
        start = stop
    return layouts


def _batch_size(layouts: list[dict], sharing: bool) -> int:
    """How many of these sequences are one batch."""
    longest = 0
    for size, layout in enumerate(layouts):
        length = len(layout["input_ids"]) if sharing else _BATCH
        longest = max(longest, length)
        if size and ((size + 1) * longest > _BATCH or (size + 1) * longest**2 > _BATCH**2):
            return size
    return len(layouts)


def _label_nats(base: VisionQwen, collator: SharedPrefixCollator, layouts: list[dict]) -> torch.Tensor:
    """Log-probability of each label, `(L,)`, row by row and branch by branch."""
    batch = collator(layouts)
    batch = {key: value.to(base.device) for key, value in batch.items() if key != "labels"}
    targets = batch.pop("shift_labels")[0]  # (L,)
    hidden = base.model(**batch).last_hidden_state[0]  # (L, D_t)
    nats = [
        -nn.functional.cross_entropy(base.lm_head(part).float(), target, reduction="none")
        for part, target in zip(hidden.split(_HEAD), targets.split(_HEAD), strict=True)
    ]
    return torch.cat(nats)


def _owners(layout: dict) -> list[int]:
    """For each label of a laid-out row its branch, counted from 0."""
    labelled = zip(layout["branch_ids"], layout["shift_labels"], strict=True)
    return [branch - 1 for branch, label in labelled if label != IGNORE_INDEX]


def picture_class_probabilities(
    model: VisionQwen | PeftModel,
    processor: VisionQwenProcessor,
    pictures: Sequence[Image] | torch.Tensor,
    labels: Sequence[str],
    text: str,
    *,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> torch.Tensor:
    """The probability of each label for each picture.

    Args:
        model ([`VisionQwen`] or `PeftModel`): In evaluation mode.
        processor ([`VisionQwenProcessor`]): Saved with the model.
        pictures (`Sequence[PIL.Image.Image]`): RGB; or what the processor made of them, `(I, 3, H, W)`.
        labels (`Sequence[str]`): Names of classes, as they are said.
        text (`str`): What the user says beside a picture.
        temperature (`float`, *optional*, defaults to 1.0): Divides the log-probabilities.
        batch_size (`int`, *optional*, defaults to 64): Pictures at a time at most.

    Returns:
        `torch.FloatTensor` of shape `(I, C)`: Each row sums to 1.
    """

    def fetch(ids: list[int]) -> dict[str, torch.Tensor]:
        if isinstance(pictures, torch.Tensor):
            return {"pixel_values": pictures[ids]}
        shown = [pictures[index] for index in ids]
        return {"pixel_values": processor.image_processor(shown, return_tensors="pt")["pixel_values"]}

    count = len(pictures)
    found = choice_log_probs(
        model,
        processor,
        [picture_turn(text)] * count,
        [[index] for index in range(count)],
        fetch,
        labels,
        batch_size=batch_size,
    )
    return (found / temperature).softmax(-1)
