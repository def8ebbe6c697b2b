"""Captioning: picture files -> texts, batch after batch, for the command line and the web page.

Stage: trained model -> one record a picture, in the order of the files.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image as PILImage

from ..data.pictures import UnreadablePictureError, open_picture
from ..evaluation.choices import picture_class_probabilities
from ..evaluation.generation import generate_texts
from ..tasks import TaskSettings, find_kind
from ..tasks.caption import INSTRUCTION
from ..tasks.example import check_text, picture_turn


def ask(settings: TaskSettings, question: str | None = None, instruction: str | None = None) -> str:
    """What the user says beside a picture, worded as in training.

    Args:
        settings ([`~vlm_peft.tasks.TaskSettings`]): Of the model.
        question (`str`, *optional*): A question instead of the wish for a caption.
        instruction (`str`, *optional*): Instead of the one in `settings`.

    Raises:
        ValueError: For bytes that are no text.
    """
    for name, text in (("The question", question), ("The instruction", instruction)):
        check_text(text or "", name)
    kind = find_kind(settings.task)
    if question is None:
        return instruction or (settings.instruction if kind.question else None) or kind.question or INSTRUCTION
    if instruction:
        return f"{question} {instruction}"
    # Where the instruction is what is asked, it would be a second question.
    return kind.ask(question, settings.instruction) if settings.instruction and not kind.question else question


def find_pictures(inputs: Iterable[str], stdin: BinaryIO) -> list[str] | Iterator[str]:
    """Paths of pictures, in order.

    Args:
        inputs (`Iterable[str]`): Files, folders (all pictures in them and below, sorted, hidden ones left out), or `-`
            for paths on `stdin`, one a line.
        stdin (`BinaryIO`): Read only when asked for, and only as far as paths are needed.

    Returns:
        `list[str]`, or an `Iterator[str]` when some come from `stdin`.

    Raises:
        FileNotFoundError: When a file or folder is not there, or a folder holds no picture.
    """
    inputs = list(inputs)
    PILImage.init()
    suffixes = {suffix for suffix, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
    found: list[list[str] | Iterator[str]] = []
    for name in inputs:
        path = Path(name)
        if name == "-":
            found.append(_lines(stdin))
        elif path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            inside = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
            if not inside:
                raise FileNotFoundError(f"The folder {name} holds no pictures.")
            found.append([str(file) for file in inside])
        elif path.exists():
            found.append([name])
        else:
            raise FileNotFoundError(f"The picture {name} is not there.")
    if "-" in inputs:
        return (path for paths in found for path in paths)
    return [path for paths in found for path in paths]


def _lines(stdin: BinaryIO) -> Iterator[str]:
    """Paths as the file system spells them, whatever their encoding."""
    for line in stdin:
        if path := line.rstrip(b"\r\n"):
            yield os.fsdecode(path)


def caption_pictures(
    model,
    processor,
    paths: Iterable[str],
    text: str,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 48,
    num_beams: int = 1,
    choices: Sequence[str] = (),
    temperature: float = 1.0,
) -> Iterator[dict]:
    """Asks the same about every picture; records come batch by batch, in order.

    Args:
        model, processor: Of [`~vlm_peft.adapters.loading.load_model`].
        paths (`Iterable[str]`): Picture files.
        text (`str`): What the user says; see [`ask`].
        batch_size (`int`, *optional*, defaults to 16): Pictures at a time; the texts do not depend on it.
        max_new_tokens, num_beams (`int`, *optional*): See [`~vlm_peft.evaluation.generation.generate_texts`].
        choices (`Sequence[str]`, *optional*): Classes; the caption is then the likeliest, and nothing is generated.
        temperature (`float`, *optional*, defaults to 1.0): Divides the log-probabilities of the classes.

    Yields:
        `dict`: `{"image": path, "caption": text}`, with the `probabilities` of the classes where there are some; or
            `{"image": path, "error": reason}` for a picture that cannot be read.
    """
    for records, readable, pixel_values in read_batches(processor, paths, batch_size):
        if pixel_values is not None and choices:
            found = picture_class_probabilities(
                model, processor, pixel_values, choices, text, temperature=temperature, batch_size=batch_size
            )
            for record, row in zip(readable, found.tolist(), strict=True):
                record["probabilities"] = shares = dict(zip(choices, row, strict=True))
                record["caption"] = max(shares, key=shares.__getitem__)
        elif pixel_values is not None:
            texts = generate_texts(
                model,
                processor,
                [picture_turn(text)] * len(readable),
                [[index] for index in range(len(readable))],
                partial(select_pixels, pixel_values),
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
            )
            for record, caption in zip(readable, texts, strict=True):
                record["caption"] = caption
        yield from records


def read_batches(
    processor, paths: Iterable[str], batch_size: int
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]], torch.Tensor | None]]:
    """Pictures as a model reads them, some at a time.

    Args:
        processor ([`~vlm_peft.model.processing_vision_qwen.VisionQwenProcessor`]): Of the model.
        paths (`Iterable[str]`): Picture files.
        batch_size (`int`): Pictures at a time.

    Yields:
        `tuple`: A record for each picture, `{"image": path}`, with the `error` of one that cannot be read; those of
            the records that can; and their `pixel_values` `(I, 3, H, W)`, `None` for no picture.
    """
    waiting = iter(paths)
    while batch := list(islice(waiting, batch_size)):
        records: list[dict[str, Any]] = [{"image": path} for path in batch]
        pixels, readable = [], []
        for record in records:
            try:
                # Scaled at once, and named by nothing: two opened pictures may not fit into memory.
                pixels.append(
                    processor.image_processor(open_picture(Path(record["image"])), return_tensors="pt")["pixel_values"]
                )
                readable.append(record)
            except UnreadablePictureError as error:
                record["error"] = str(error)
        yield records, readable, torch.cat(pixels) if pixels else None


def select_pixels(pixel_values: torch.Tensor, ids: list[int]) -> dict[str, torch.Tensor]:
    """Those of some pictures, as generation fetches them."""
    return {"pixel_values": pixel_values[ids]}
