"""What `vlm-peft detect` and the page's tab do: boxes of named things in pictures, each with its confidence.

Stage: trained model and names -> one record a picture, in the order of the files; and copies with the boxes drawn.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont
from PIL.Image import Image

from ..data.pictures import open_picture, picture_size
from ..evaluation.confidence import generate_with_confidences
from ..metrics.boxes import LabelledBox, box_spans, parse_boxes
from ..tasks.example import picture_turn
from ..tasks.grounding import pixel_box
from .caption import read_batches, select_pixels

COLOURS = ("#1f6feb", "#d9660b", "#1a7f4b", "#c0459b", "#7a6ad8", "#b3382c", "#0f8f9c", "#8a6d00")
"""Of labels in turn; white text can be read on each."""


@dataclass(frozen=True)
class Found:
    """What a model says of one picture.

    Args:
        boxes (`list[tuple[LabelledBox, float]]`): On the grid, each with its confidence, the surest first.
        unread (`list[str]`): What it wrote beside: no boxes, and boxes of what it was not asked for.
    """

    boxes: list[tuple[LabelledBox, float]]
    unread: list[str]

    @classmethod
    def of_answers(cls, answers: Iterable[tuple[str, tuple[str, Sequence[float]]]]) -> "Found":
        """From names, and what [`~vlm_peft.evaluation.confidence.generate_with_confidences`] gives for each."""
        found: list[tuple[LabelledBox, float]] = []
        beside: list[str] = []
        for name, (text, confidences) in answers:
            boxes, unread = parse_boxes(text)
            for box, confidence in zip(boxes, confidences, strict=True):
                if box.label.casefold() == name.casefold():
                    found.append((box, confidence))
                else:
                    beside.append(f"{box.label} {list(box.box)}")
            beside += unread
        return cls(sorted(found, key=lambda each: -each[1]), list(dict.fromkeys(beside)))


def detect(model, processor, questions: dict[str, str], fetch_images, count: int, **decoding: Any) -> list[Found]:
    """Asks the same about several pictures.

    Args:
        model, processor: Of [`~vlm_peft.adapters.loading.load_model`].
        questions (`dict[str, str]`): Of [`~vlm_peft.tasks.grounding.names_questions`].
        fetch_images (`Callable`): Numbers of pictures, from 0 on -> model inputs.
        count (`int`): Of the pictures.
        decoding: See [`~vlm_peft.evaluation.generation.generate_texts`].
    """
    prompts = [picture_turn(question) for _ in range(count) for question in questions.values()]
    image_ids = [[index] for index in range(count) for _ in questions]
    answers = generate_with_confidences(model, processor, prompts, image_ids, fetch_images, box_spans, **decoding)
    of_picture = [answers[first : first + len(questions)] for first in range(0, len(answers), len(questions))]
    return [Found.of_answers(zip(questions, each, strict=True)) for each in of_picture]


def detect_pictures(
    model,
    processor,
    paths: Iterable[str],
    questions: dict[str, str],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 48,
    num_beams: int = 1,
    draw: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Looks for the same things in every picture; records come batch by batch, in order.

    Args:
        model, processor, questions: See [`detect`].
        paths (`Iterable[str]`): Picture files.
        batch_size (`int`, *optional*, defaults to 16): Pictures, and answers, at a time; the boxes do not depend on it.
        max_new_tokens, num_beams (`int`, *optional*): See [`~vlm_peft.evaluation.generation.generate_texts`].
        draw (`Path`, *optional*): Folder for copies of the pictures with their boxes; files of earlier runs are
            overwritten, and nothing else is.

    Yields:
        `dict`: `image` and `boxes`, each with `label`, `box` and `confidence`, the surest first; see
            [`~vlm_peft.tasks.grounding.pixel_box`] for the pixels. `unread` has what the model wrote beside, if there
            is such; `drawn` is the copy. `image` and `error` for a picture that cannot be read.
    """
    names: set[str] = set()
    for records, readable, pixel_values in read_batches(processor, paths, batch_size):
        found: list[Found] = []
        if pixel_values is not None:
            fetch = partial(select_pixels, pixel_values)
            decoding = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "num_beams": num_beams}
            found = detect(model, processor, questions, fetch, len(readable), **decoding)
        for record, each in zip(readable, found, strict=True):
            path = Path(record["image"])
            size = picture_size(path)
            record["boxes"] = [
                {"label": box.label, "box": pixel_box(box.box, size), "confidence": confidence}
                for box, confidence in each.boxes
            ]
            if each.unread:
                record["unread"] = each.unread
            if draw is not None:
                target = draw / _free_name(path, names)
                draw.mkdir(parents=True, exist_ok=True)
                draw_boxes(open_picture(path), each.boxes).save(target, quality=92)
                record["drawn"] = str(target)
        yield from records


def _free_name(path: Path, taken: set[str]) -> str:
    """A name that no other picture of this run has, and no photograph."""
    name, number = f"{path.stem}-boxes.jpg", 1
    while name.lower() in taken:
        number += 1
        name = f"{path.stem}-boxes-{number}.jpg"
    taken.add(name.lower())
    return name


def draw_boxes(picture: Image, boxes: Sequence[tuple[LabelledBox, float]]) -> Image:
    """The picture with boxes, labels and confidences on it; one colour for each label.

    Args:
        picture (`PIL.Image.Image`): RGB, upright; it is drawn on itself.
        boxes (`Sequence[tuple[LabelledBox, float]]`): On the grid, each with its confidence; the first comes on top.
    """
    brush = ImageDraw.Draw(picture)
    width = max(1, round(max(picture.size) / 250))
    font = ImageFont.load_default(max(10, round(max(picture.size) / 40)))
    colours: dict[str, str] = {}
    for each, _ in boxes:
        colours.setdefault(each.label, COLOURS[len(colours) % len(COLOURS)])
    for each, confidence in reversed(boxes):
        x1, y1, x2, y2 = pixel_box(each.box, picture.size)
        brush.rectangle((x1, y1, x2 - 1, y2 - 1), outline=colours[each.label], width=width)
        said = f"{each.label} {confidence:.2f}"
        left, top, right, bottom = brush.textbbox((0, 0), said, font=font)
        across, down = right - left + 2 * width, bottom - top + 2 * width
        # Above the box where there is room, in it otherwise; never out of the picture.
        x = max(0, min(x1, picture.width - across))
        y = y1 - down if y1 >= down else y1
        brush.rectangle((x, y, x + across, y + down), fill=colours[each.label])
        brush.text((x + width - left, y + width - top), said, fill="#fff", font=font)
    return picture
