"""CLIPScore: how near a caption is to its picture in a CLIP's space, without references or with them.

CLIPScore = 2.5 * max(cos(picture, caption), 0), so 0..2.5, and RefCLIPScore = the harmonic mean of that and of
max(cos(caption, reference), 0) for the nearest reference, 0..1.43. Other tools take another constant: torchmetrics
gives 100 * max(cos, 0), 40 times these. Scores compare only with the same CLIP and the same words before the caption.

Source: Hessel et al., CLIPScore, EMNLP 2021, whose numbers are of `openai/clip-vit-base-patch32` and captions that
begin with "A photo depicts".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..hub.weights import safetensors_revision

WEIGHT = 2.5
"""The constant of the paper."""


@dataclass
class ClipScores:
    """What `clip_scores` found."""

    metrics: dict[str, float]
    """Means over pictures: CLIPScore (0..2.5) and, with references, RefCLIPScore (0..1.43)."""
    per_picture: dict[str, list[float]]
    """The same for each picture, in input order."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers must know, one sentence each; usually empty."""


@torch.inference_mode()
def clip_scores(
    clip: str | Path,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    *,
    prefix: str = "A photo depicts ",
    revision: str | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> ClipScores:
    """Score one caption a picture, in float32.

    Args:
        clip: Folder or id of a CLIP with both towers.
        pictures: Opened ones, or a sequence that opens them when they are taken (a column of a `datasets.Dataset`).
        captions: One for each picture.
        references: For each picture at least one caption; adds RefCLIPScore.
        prefix: Put before every caption and reference; "" for a CLIP that did not learn from sentences.
        revision: Of a CLIP on the Hub.
        batch_size: Pictures or texts at a time.
        device: Where CLIP runs.

    Raises:
        ValueError: if there is nothing to score, lengths differ, a picture has no reference, or `clip` is not a CLIP
            with both towers.
        OSError: if `clip` is not there, or has only pickled weights.
    """
    _check(pictures, captions, references)
    scorer = ClipScorer(clip, prefix=prefix, revision=revision, batch_size=batch_size, device=device)
    image = scorer.see(pictures)
    text, cut = scorer.read([*captions, *(text for group in references or [] for text in group)])
    text, reference = text[: len(captions)], text[len(captions) :]
    alone = scorer.score(image, text)
    per_picture = {"CLIPScore": alone.tolist()}
    if references is not None:
        groups = reference.split([len(group) for group in references])
        nearest = torch.stack([(group @ own).max() for own, group in zip(text, groups, strict=True)]).clamp(min=0)
        # Where both are 0, so is their harmonic mean.
        per_picture["RefCLIPScore"] = (2 * alone * nearest / (alone + nearest).clamp(min=1e-12)).tolist()
    metrics = {name: sum(scores) / len(scores) for name, scores in per_picture.items()}
    count = len(text) + len(reference)
    notes = [f"{cut} of {count} texts are longer than CLIP reads, and were cut."] if cut else []
    return ClipScores(metrics, per_picture, notes)


class ClipScorer:
    """A CLIP that is kept, for whoever scores again and again.

    Args:
        clip, prefix, revision, batch_size, device: See [`clip_scores`].

    Raises:
        ValueError, OSError: As there.
    """

    def __init__(
        self,
        clip: str | Path,
        *,
        prefix: str = "A photo depicts ",
        revision: str | None = None,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ):
        revision = safetensors_revision(clip, revision)
        self._model = _load(clip, revision).to(device)
        self._image_processor = AutoImageProcessor.from_pretrained(clip, revision=revision)
        self._tokenizer = AutoTokenizer.from_pretrained(clip, revision=revision)
        self._prefix, self._batch_size, self._device = prefix, batch_size, device

    @torch.inference_mode()
    def see(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Pictures as vectors `(P, D)` of length 1."""
        seen = []
        for start in range(0, len(pictures), self._batch_size):
            batch = self._image_processor(list(pictures[start : start + self._batch_size]), return_tensors="pt")
            pixels = batch["pixel_values"].to(self._device)
            seen.append(self._model.get_image_features(pixel_values=pixels).pooler_output)
        return torch.nn.functional.normalize(torch.cat(seen), dim=-1)

    @torch.inference_mode()
    def read(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        """Texts as vectors `(T, D)` of length 1, and how many were longer than CLIP reads."""
        length = self._model.config.text_config.max_position_embeddings
        tokens, cut = _encode(self._tokenizer, [f"{self._prefix}{text}" for text in texts], length)
        read = []
        for start in range(0, len(tokens), self._batch_size):
            batch = self._tokenizer.pad(
                {"input_ids": tokens[start : start + self._batch_size]}, padding_side="right", return_tensors="pt"
            ).to(self._device)
            read.append(self._model.get_text_features(**batch).pooler_output)
        return torch.nn.functional.normalize(torch.cat(read), dim=-1), cut

    @staticmethod
    def score(pictures: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """CLIPScore of pairs of vectors, `(P, D)` and `(P, D)` -> `(P,)`, 0..2.5."""
        return WEIGHT * (pictures * texts).sum(dim=-1).clamp(min=0)


def _load(clip: str | Path, revision: str | None) -> Any:
    config = AutoConfig.from_pretrained(clip, revision=revision)
    if config.model_type != "clip":
        raise ValueError(f"expected a CLIP with both towers, got {clip}, which is of the type {config.model_type!r}")
    load: Any = CLIPModel.from_pretrained
    model, info = load(clip, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        # transformers fills them with random numbers.
        raise ValueError(f"expected a CLIP with both towers, got {clip}, which lacks {min(info['missing_keys'])}")
    return model.eval()


def _encode(tokenizer: Tokenizer, texts: list[str], length: int) -> tuple[list[list[int]], int]:
    """Return ids of at most `length` tokens that end with the token CLIP's text tower pools, and how many were cut."""
    tokens, cut = [], 0
    for ids in tokenizer(texts)["input_ids"]:
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        cut += len(ids) > length - 1
        tokens.append([*ids[: length - 1], tokenizer.eos_token_id])
    return tokens, cut


def _check(pictures: Sequence, captions: Sequence[str], references: Sequence[Sequence[str]] | None) -> None:
    if not len(pictures) or len(pictures) != len(captions):
        raise ValueError(f"expected a caption for each picture, got {len(pictures)} pictures, {len(captions)} captions")
    if references is None:
        return
    if len(references) != len(captions):
        raise ValueError(f"expected references for each of {len(captions)} pictures, got {len(references)} lists")
    for index, group in enumerate(references):
        if isinstance(group, str) or not group:
            raise ValueError(f"picture {index}: expected a list of one or more references, got {group!r}")
