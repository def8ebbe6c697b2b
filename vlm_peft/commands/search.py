"""What `vlm-peft search` and the page's tab do: the pictures of a folder that are nearest to a text."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..contrastive.encoder import DualEncoder
from ..contrastive.search import Found, PictureIndex, index_pictures
from ..data.pictures import UnreadablePictureError, open_picture
from ..evaluation.records import write_text
from ..report import pages as html
from ..report.gallery import thumbnail
from ..tasks.example import check_text


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
        print(f"{printable(path)}: {why}", file=sys.stderr)
    if encoded:
        print(f"Encoded {encoded:,} of {len(index):,} pictures.", file=sys.stderr)
    return index


def printable(path: str) -> str:
    """A path for a terminal: one that would break the line, or steer the terminal, as JSON's text."""
    return path if path.isprintable() else json.dumps(path)


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


def result_cards(found: Iterable[Found], folder: str | Path | None = None) -> str:
    """Results as HTML: thumbnails in a grid, with score and path; what cannot be read any more is left out.

    Args:
        found (`Iterable[Found]`): Of [`search_text`].
        folder (`str` or `Path`, *optional*): Paths are shown as they are in it.
    """
    cards = []
    for each in found:
        try:
            shown = thumbnail(open_picture(Path(each.path)))
        except UnreadablePictureError:
            continue
        name = each.path if folder is None else Path(each.path).relative_to(folder)
        cards.append(
            f'<figure style="margin:0"><img src="{shown.address}" width="{shown.width}" height="{shown.height}" alt="" '
            f'style="max-width:100%;height:auto"><figcaption style="overflow-wrap:anywhere">{each.score:.3f} '
            f"{html.text(name)}</figcaption></figure>"
        )
    style = "display:grid;grid-template-columns:repeat(auto-fill,minmax(160px,1fr));gap:1rem"
    return f'<div style="{style}">{"".join(cards)}</div>'


def write_page(file: str | Path, text: str, found: Iterable[Found]) -> None:
    """Writes results as one HTML page of thumbnails that needs nothing beside it."""
    write_text(Path(file), html.page(text, f"<h1>{html.text(text)}</h1>{result_cards(found)}"))
