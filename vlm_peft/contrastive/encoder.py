"""The two towers: pictures and texts -> embeddings of unit length in one space.

Stage: a `CLIPModel`, `SiglipModel` or `Siglip2Model` of transformers, plain or with LoRA in it, behind one forward that
a trainer and DDP can wrap.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..data.pictures import open_picture
from ..hub.models import CLIP_TYPES
from ..tasks.example import check_text

MODEL_TYPES = CLIP_TYPES
"""`config.model_type` of what can be trained."""


class DualEncoder(nn.Module):
    """A CLIP or SigLIP with its processor.

    Args:
        clip (`PreTrainedModel` or `PeftModel`): Both towers.
        processor (`ProcessorMixin`): Of the checkpoint: `image_processor` and `tokenizer`.
        chunk_size (`int`, *optional*): So many pictures, or texts, at a time keep their activations while training; the
            others are computed again in the backward pass. Gradients are those of the whole batch (GradCache, arXiv
            2101.06983, by `torch.utils.checkpoint`).
    """

    clip: Any

    def __init__(self, clip: PreTrainedModel, processor: Any, *, chunk_size: int | None = None):
        super().__init__()
        self.clip = clip
        self.processor = processor
        self.chunk_size = chunk_size

    @property
    def config(self) -> Any:
        """Of the CLIP."""
        return self.clip.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.clip.logit_scale.device

    @property
    def logit_scale(self) -> torch.Tensor:
        """Logarithm of the inverse temperature."""
        return self.clip.logit_scale

    @property
    def logit_bias(self) -> torch.Tensor | None:
        """SigLIP's."""
        return getattr(self.clip, "logit_bias", None)

    @property
    def width(self) -> int:
        """D."""
        config = self.config
        return config.projection_dim if config.model_type == "clip" else config.vision_config.hidden_size

    def forward(
        self, text: dict[str, torch.Tensor], image: dict[str, torch.Tensor] | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Embeds a batch.

        Args:
            text (`dict`): `input_ids` `(T, L)` and, for CLIP, `attention_mask`.
            image (`dict` or `torch.Tensor`): `pixel_values` `(P, 3, H, W)` and what else the image processor gave; or
                embeddings `(P, D)` of a locked tower.

        Returns:
            `tuple`: `(P, D)` and `(T, D)` in float32, of unit length; inverse temperature; and SigLIP's bias or `None`.
            DDP needs all that trains to come out of here.
        """
        images = image.float() if isinstance(image, torch.Tensor) else self._run(self.clip.get_image_features, image)
        texts = self._run(self.clip.get_text_features, text)
        images, texts = (nn.functional.normalize(each, dim=-1) for each in (images, texts))
        bias = self.logit_bias
        # A parameter that is given out as it is would be none of DDP's outputs.
        return images, texts, self.logit_scale.exp(), None if bias is None else bias * 1

    def _run(self, tower: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        def embed(*values: torch.Tensor) -> torch.Tensor:
            return tower(**dict(zip(inputs, values, strict=True))).pooler_output.float()

        values = list(inputs.values())
        size = self.chunk_size
        if size is None or not torch.is_grad_enabled() or len(values[0]) <= size:
            return embed(*values)
        chunks = zip(*(value.split(size) for value in values), strict=True)
        return torch.cat([checkpoint(embed, *chunk, use_reentrant=False) for chunk in chunks])  # type: ignore[arg-type]

    def pixels(self, pictures: Iterable[Any]) -> dict[str, torch.Tensor]:
        """Model inputs of pictures, which are opened and scaled one by one: many large ones may not fit into memory.

        Args:
            pictures: Opened ones, or what [`~vlm_peft.data.pictures.open_picture`] takes; at least one.

        Raises:
            UnreadablePictureError: For a picture that cannot be read.
        """
        return _joined(self._scaled(pictures))

    def _scaled(self, pictures: Iterable[Any]) -> list[dict[str, torch.Tensor]]:
        # A loop's name would keep a picture while the next one is opened.
        return list(map(self._scale, pictures))

    def _scale(self, picture: Any) -> dict[str, torch.Tensor]:
        return self.processor.image_processor(open_picture(picture), return_tensors="pt")

    def too_long(self, texts: Sequence[str]) -> list[int]:
        """Numbers of the texts that are longer than the text tower reads."""
        return [index for index, ids in enumerate(self._ids(texts)) if len(ids) > self._context]

    def tokens(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Model inputs `(T, L)` of texts; those longer than the context are cut.

        CLIP pools at the end token, which some tokenizers do not write; SigLIP pools the last place of its context,
        and was trained on padding up to it.
        """
        found = self._ids(texts)
        end = self.processor.tokenizer.eos_token_id
        ids = [each if len(each) <= self._context else [*each[: self._context - 1], end] for each in found]
        is_clip = self.config.model_type == "clip"
        length = max(map(len, ids)) if is_clip else self._context
        padding = self.processor.tokenizer.pad_token_id
        rows = torch.full((len(ids), length), end if padding is None else padding)
        mask = torch.zeros_like(rows)
        for row, each in enumerate(ids):
            rows[row, : len(each)] = torch.tensor(each)
            mask[row, : len(each)] = 1
        return {"input_ids": rows, "attention_mask": mask} if is_clip else {"input_ids": rows}

    @property
    def _context(self) -> int:
        return self.config.text_config.max_position_embeddings

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the end token, which some tokenizers do not write."""
        tokenizer = self.processor.tokenizer
        # `model_max_length` of some tokenizers is another number than the tower's context.
        ids = tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        return [each if each and each[-1] == end else [*each, end] for each in ids]

    @torch.inference_mode()
    def embed_pictures(self, pictures: Iterable[Any], batch_size: int = 64) -> torch.Tensor:
        """Embeddings `(P, D)` of pictures on the CPU, float32, of unit length.

        Args:
            pictures: As for [`~DualEncoder.pixels`], and asked for one by one.
            batch_size (`int`, *optional*, defaults to 64): Pictures per run of the tower.

        Raises:
            UnreadablePictureError: For a picture that cannot be read.
        """
        waiting = iter(pictures)
        found = [torch.empty(0, self.width)]
        while made := self._scaled(islice(waiting, batch_size)):
            inputs = {name: value.to(self.device) for name, value in _joined(made).items()}
            found.append(self.clip.get_image_features(**inputs).pooler_output.float().cpu())
        return nn.functional.normalize(torch.cat(found), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Embeddings `(T, D)` of texts on the CPU, float32, of unit length."""
        found = []
        for start in range(0, len(texts), batch_size):
            inputs = {
                name: value.to(self.device) for name, value in self.tokens(texts[start : start + batch_size]).items()
            }
            found.append(self.clip.get_text_features(**inputs).pooler_output.float().cpu())
        return nn.functional.normalize(torch.cat(found), dim=-1)

    def embed_classes(self, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        """Embeddings `(C, D)` of classes: the mean over prompt templates, of unit length again.

        Args:
            names (`Sequence[str]`): Of the classes.
            templates (`Sequence[str]`): With `{}` where the name goes.

        Raises:
            ValueError: For names that repeat, a template without a place for the name, or a text that is longer than
                the text tower reads: cut, it might be another class's.
        """
        check_labels(names)
        for template in templates:
            check_text(template, "The template")
        without = [each for each in templates if "{}" not in each]
        if without or not templates:
            found = repr(without[0]) if without else "none"
            raise ValueError(f"Expected templates with {{}} where the label goes, got {found}.")
        texts = [each.replace("{}", name) for name in names for each in templates]
        if long := self.too_long(texts):
            raise ValueError(
                f"The label {names[long[0] // len(templates)][:60]!r} is, in its template, longer than the "
                f"{self._context} tokens that the text tower reads: shorten it."
            )
        return nn.functional.normalize(self.embed_texts(texts).view(len(names), len(templates), -1).mean(dim=1), dim=-1)

    @torch.inference_mode()
    def probabilities(self, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Probabilities `(P, C)` of classes: a softmax over them, or, where the model has a bias, of each alone.

        Args:
            images, classes (`torch.Tensor`): `(P, D)` and `(C, D)`, of unit length, on the CPU.
        """
        logits = images @ classes.T * self.logit_scale.exp().cpu()
        bias = self.logit_bias
        return logits.softmax(dim=-1) if bias is None else (logits + bias.cpu()).sigmoid()


def check_labels(labels: Sequence[str]) -> None:
    """Refuses labels among which nothing could be chosen.

    Raises:
        ValueError: For labels that repeat, an empty one, one that is no text, or fewer than two.
    """
    for label in labels:
        check_text(label, "The label")
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise ValueError(f"Expected every label once, got {twice[0]!r} several times.")
    if len(labels) < 2:
        raise ValueError(f"Expected at least two labels to choose from, got {', '.join(labels) or 'none'}.")
    if not all(label.strip() for label in labels):
        raise ValueError("Expected labels of at least a letter, got an empty one.")


def _joined(made: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([each[name] for each in made]) for name in made[0]}
