"""What `vlm-peft classify` and the page's tab do: probabilities of labels for pictures, by a CLIP or a VisionQwen.

Stage: trained model and labels -> one record a picture, in the order of the files.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import AutoConfig

from ..contrastive.encoder import MODEL_TYPES, DualEncoder
from ..data.pictures import UnreadablePictureError, open_picture
from ..evaluation.choices import picture_class_probabilities
from ..hub.access import looks_local
from ..json_files import read_json
from ..model.configuration_vision_qwen import VisionQwenConfig
from ..tasks import TaskSettings
from .caption import ask

TEMPLATE = "a photo of a {}."
"""What a CLIP compares a picture with, unless it is told otherwise."""

Classifier = Callable[[Iterable[Image]], torch.Tensor]
"""Pictures -> probabilities `(I, C)` of the labels."""


def is_clip(name: str) -> bool:
    """Whether a folder or Hub id is that of a CLIP or SigLIP, or of an adapter of one."""
    return _model_type(name) in MODEL_TYPES


def is_captioner(name: str) -> bool:
    """Whether a folder or Hub id is that of a VisionQwen, or of an adapter of one."""
    return _model_type(name) == VisionQwenConfig.model_type


def _model_type(name: str) -> str | None:
    """`None` for what is no model, which whoever loads it says better."""
    config = Path(name).expanduser() / "config.json"
    try:
        if config.is_file():
            return read_json(config).get("model_type")
        if config.parent.exists() or looks_local(name):
            return None
        return AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError):
        return None


def by_clip(encoder: DualEncoder, labels: Sequence[str], templates: Sequence[str] = (TEMPLATE,)) -> Classifier:
    """A CLIP's probabilities are a softmax over the labels; SigLIP judges each label alone.

    Args:
        encoder ([`~vlm_peft.contrastive.encoder.DualEncoder`]): Merged.
        labels (`Sequence[str]`): To choose from.
        templates (`Sequence[str]`, *optional*): With `{}` where the label goes.

    Raises:
        ValueError: For labels or templates that cannot be used; see
            [`~vlm_peft.contrastive.encoder.DualEncoder.embed_classes`].
    """
    classes = encoder.embed_classes(labels, templates)
    return lambda pictures: encoder.probabilities(encoder.embed_pictures(pictures), classes)


def by_captioner(
    model: Any, processor: Any, settings: TaskSettings, labels: Sequence[str], instruction: str | None = None
) -> Classifier:
    """A VisionQwen's are those of its answers: each label to the end of the turn, a softmax over the labels.

    Args:
        model, processor: Of [`~vlm_peft.adapters.loading.load_model`].
        settings ([`~vlm_peft.tasks.TaskSettings`]): Of the model: how it is asked, and its temperature.
        labels (`Sequence[str]`): To choose from.
        instruction (`str`, *optional*): What the user says, in place of what was said in training.
    """
    said = ask(settings, instruction=instruction)

    def judge(pictures: Iterable[Image]) -> torch.Tensor:
        # A loop's name would keep a picture while the next one is opened.
        scaled = map(partial(processor.image_processor, return_tensors="pt"), pictures)
        pixels = [each["pixel_values"] for each in scaled]
        if not pixels:
            return torch.empty(0, len(labels))
        return picture_class_probabilities(
            model, processor, torch.cat(pixels), labels, said, temperature=settings.temperature
        )

    return judge


def classify_pictures(
    classifier: Classifier, paths: Iterable[str], labels: Sequence[str], batch_size: int
) -> Iterator[dict[str, Any]]:
    """One record a picture, in order: `image`, `label`, `probability` and `probabilities`, or `image` and `error`.

    Args:
        classifier (`Callable`): Of [`by_clip`] or [`by_captioner`], with these labels.
        paths (`Iterable[str]`): Of the pictures.
        labels (`Sequence[str]`): To choose from.
        batch_size (`int`): Pictures at a time.
    """
    waiting = iter(paths)
    while batch := list(islice(waiting, batch_size)):
        problems: dict[int, str] = {}
        found = iter(classifier(_readable(batch, problems)).tolist())
        for place, path in enumerate(batch):
            if place in problems:
                yield {"image": path, "error": problems[place]}
                continue
            shares = dict(zip(labels, (round(each, 6) for each in next(found)), strict=True))
            best = max(shares, key=shares.__getitem__)
            yield {"image": path, "label": best, "probability": shares[best], "probabilities": shares}


def _readable(paths: Iterable[str], problems: dict[int, str]) -> Iterator[Image]:
    """Opens pictures one by one, as they are asked for; those that cannot be read go to `problems`."""
    for place, path in enumerate(paths):
        try:
            # A file name may look like a picture's base64 text.
            yield open_picture(Path(path))
        except UnreadablePictureError as error:
            problems[place] = str(error)
