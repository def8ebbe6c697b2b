"""What `vlm-peft search` and `vlm-peft classify` do: pictures by a text, and a label for each picture."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..contrastive.encoder import DualEncoder, check_classes
from ..contrastive.folder import load_clip
from ..contrastive.search import Found, PictureIndex, index_pictures
from ..data.pictures import UnreadablePictureError, open_picture
from ..evaluation.records import write_text
from ..report import pages as html
from ..report.gallery import thumbnail
from .caption import check_text


def load_encoder(name: str, device: torch.device) -> DualEncoder:
    """A CLIP by its folder or Hub id; see [`~vlm_peft.contrastive.folder.load_clip`] for errors."""
    return load_clip(name, device=device)


def open_index(
    encoder: DualEncoder, folder: str, paths: Sequence[str], directory: str | None, batch_size: int
) -> PictureIndex:
    """The index of a folder, brought up to date; says on standard error what was encoded and what cannot be read."""
    from tqdm.auto import tqdm

    # Without a terminal, disable=None draws no bar.
    with tqdm(total=len(paths), unit="picture", desc="Indexing", disable=None) as bar:
        index, problems, encoded = index_pictures(
            encoder, folder, paths, directory=directory, batch_size=batch_size, progress=bar.update
        )
    for path, why in problems.items():
        print(f"{path}: {why}", file=sys.stderr)
    if encoded:
        print(f"Encoded {encoded:,} of {len(index):,} pictures.", file=sys.stderr)
    return index


def search_text(encoder: DualEncoder, index: PictureIndex, text: str, count: int) -> list[Found]:
    """The pictures nearest to a text.

    Args:
        encoder ([`~vlm_peft.contrastive.encoder.DualEncoder`]): Of the index.
        index ([`~vlm_peft.contrastive.search.PictureIndex`]): To search.
        text (`str`): What is looked for.
        count (`int`): So many at most.

    Raises:
        ValueError: For a text that is empty, no text, or longer than the text tower reads.
    """
    if not check_text(text, "The text").strip():
        raise ValueError("Expected a text to search for, got an empty one.")
    if encoder.too_long([text]):
        limit = encoder.config.text_config.max_position_embeddings
        raise ValueError(f"The text is longer than the {limit} tokens that the CLIP reads: shorten it.")
    return index.search(encoder.embed_texts([text])[0].numpy(), count)


def write_page(file: str | Path, text: str, found: Iterable[Found]) -> None:
    """Writes results as one HTML page of thumbnails that needs nothing beside it."""
    cards = []
    for each in found:
        try:
            shown = thumbnail(open_picture(each.path))
        except UnreadablePictureError:
            continue
        cards.append(
            f'<figure style="margin:0"><img src="{shown.address}" width="{shown.width}" height="{shown.height}" alt="">'
            f"<figcaption>{each.score:.3f} {html.text(each.path)}</figcaption></figure>"
        )
    style = "display:grid;grid-template-columns:repeat(auto-fill,minmax(160px,1fr));gap:1rem"
    body = f'<h1>{html.text(text)}</h1><div style="{style}">{"".join(cards)}</div>'
    write_text(Path(file), html.page(text, body))


def classify_pictures(
    encoder: DualEncoder, paths: Iterable[str], labels: Sequence[str], templates: Sequence[str], batch_size: int
) -> Iterator[dict[str, Any]]:
    """One record a picture, in order: `image`, `label`, `probability` and `probabilities`, or `image` and `error`.

    Args:
        encoder ([`~vlm_peft.contrastive.encoder.DualEncoder`]): CLIP's probabilities are a softmax over the labels;
            SigLIP judges each label alone.
        paths (`Iterable[str]`): Of the pictures.
        labels (`Sequence[str]`): To choose from.
        templates (`Sequence[str]`): With `{}` where the label goes.
        batch_size (`int`): Pictures at a time.

    Raises:
        ValueError: For labels that repeat, fewer than two, or a template without `{}`.
    """
    check_classes(labels, templates)
    classes = encoder.embed_classes(labels, templates)
    batch: list[tuple[str, Any]] = []
    for path in paths:
        try:
            batch.append((path, open_picture(path)))
        except UnreadablePictureError as error:
            batch.append((path, str(error)))
        if len(batch) >= batch_size:
            yield from _classified(encoder, batch, labels, classes)
            batch = []
    yield from _classified(encoder, batch, labels, classes)


def _classified(
    encoder: DualEncoder, batch: list[tuple[str, Any]], labels: Sequence[str], classes: torch.Tensor
) -> Iterator[dict[str, Any]]:
    opened = [picture for _, picture in batch if not isinstance(picture, str)]
    found = iter(encoder.probabilities(encoder.embed_pictures(opened), classes).tolist() if opened else ())
    for path, picture in batch:
        if isinstance(picture, str):
            yield {"image": path, "error": picture}
            continue
        shares = dict(zip(labels, (round(each, 6) for each in next(found)), strict=True))
        best = max(shares, key=lambda label: shares[label])
        yield {"image": path, "label": best, "probability": shares[best], "probabilities": shares}
