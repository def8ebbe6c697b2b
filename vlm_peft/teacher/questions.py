"""Questions for a teacher, and its answers: what goes out, and what comes back, wherever the teacher runs.

Stage: picture and prompt -> messages, with the picture scaled down as it is sent.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash
from PIL import Image as PILImage

from ..data.pictures import open_picture
from .prompts import Prompt

LOSSLESS_PIXELS = 512 * 512
"""Smaller pictures are sent as PNG, others as JPEG of quality 95."""


class TeacherError(OSError):
    """A teacher that cannot be asked, or not any more; one line."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        temperature (`float`): 0 is greedy.
        top_p (`float`, *optional*): Share of the probability that is drawn from.
        seed (`int`): With picture and sample it gives each question a seed of its own.
    """

    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0

    def seed_of(self, picture: str, sample: int) -> int:
        """The seed of one question, 0 to 2**31 - 1."""
        return xxhash.xxh3_64_intdigest(f"{self.seed} {picture} {sample}".encode()) % 2**31


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Args:
        picture (`str`): Hash of the picture's bytes.
        sample (`int`): Which of several answers.
        prompt ([`Prompt`]): What is asked.
        stored (`Any`): The picture, as [`~vlm_peft.data.pictures.open_picture`] takes it.
        row (`str`): Of the picture, for messages.
    """

    picture: str
    sample: int
    prompt: Prompt
    stored: Any
    row: str


@dataclass(frozen=True)
class Answer:
    """What came back.

    Args:
        text (`str`): As the teacher wrote it.
        finish (`str`): `stop`, `length` where it was cut off, or what else a server says.
        prompt_tokens, tokens (`int`): Read and written, as far as the teacher counts them.
        seconds (`float`): From request to answer.
    """

    text: str
    finish: str
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0


Keep = Callable[[Question, Answer], None]
"""Told of an answer."""

Fail = Callable[[Question, str], None]
"""Told of a question that gets none, and why."""


def sent_size(size: list[int], side: int, whole: int = 1) -> list[int]:
    """Width and height of a picture as it is sent.

    Args:
        size (`list[int]`): Of the picture.
        side (`int`): Pixels of the longer side at most.
        whole (`int`): Both sides are multiples of it.
    """
    scale = min(1.0, side / max(size))
    return [max(round(length * scale / whole), 1) * whole for length in size]


def sent_picture(stored: Any, side: int, whole: int = 1) -> PILImage.Image:
    """A picture as it is sent; see [`sent_size`].

    Raises:
        UnreadablePictureError: When it cannot be read.
    """
    picture = open_picture(stored)
    size = sent_size(list(picture.size), side, whole)
    return picture if list(picture.size) == size else picture.resize((size[0], size[1]), PILImage.Resampling.LANCZOS)


def data_address(picture: PILImage.Image) -> str:
    """A picture as `data:` address, as OpenAI's interface takes it."""
    kind = "PNG" if picture.width * picture.height <= LOSSLESS_PIXELS else "JPEG"
    encoded = io.BytesIO()
    picture.save(encoded, kind, **({} if kind == "PNG" else {"quality": 95}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"
