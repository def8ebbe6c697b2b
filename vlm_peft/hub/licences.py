"""Licences: what the cards of bases and data sets state about them, and nothing guessed.

Stage: beside; read when a card is written.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard, try_to_load_from_cache
from yaml import YAMLError

from .access import RepoType, is_hub_id
from .markup import Markdown, code, markdown


def stated_licence(name: str, *, revision: str | None = None, repo_type: RepoType = "model") -> str | None:
    """What the card of a base or a data set says about its licence, as far as the card lies on this machine.

    Args:
        name (`str`): Folder or file, or Hub id whose `README.md` is looked for in the Hub's cache.
        revision (`str`, *optional*): Of the repository.
        repo_type (`str`, *optional*, defaults to `"model"`): `"model"` or `"dataset"`.

    Returns:
        `str` or `None`: The licence; empty when the card states none; `None` when there is no card here.
    """
    path = Path(name)
    if path.exists():
        card = (path if path.is_dir() else path.parent) / "README.md"
    elif is_hub_id(name):
        cached = try_to_load_from_cache(name, "README.md", revision=revision, repo_type=repo_type)
        if not isinstance(cached, str):
            return None
        card = Path(cached)
    else:
        return None
    if not card.is_file():
        return None
    try:
        return licence_of(RepoCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data)
    except (ValueError, OSError, YAMLError):
        return ""


def licence_of(metadata: Any) -> str:
    """The licence in a card's metadata (`ModelCardData`, `DatasetCardData` or `None`), empty when none is stated."""
    stated = metadata.get("license") if metadata is not None else None
    if stated == "other" and metadata.get("license_name"):
        stated = f"other ({metadata.get('license_name')})"
    return ", ".join(stated) if isinstance(stated, list) else str(stated or "")


def licence_line(what: str, name: str, licence: str | None) -> Markdown:
    """A card's line on one licence, for what [`stated_licence`] returns."""
    unknown = "not known: its card was not at hand" if licence is None else "not stated by its card"
    return Markdown(f"- {what} {code(name)}: {markdown(licence or unknown)}")


def common_licence(licences: Iterable[str | None]) -> str | None:
    """The licence that all bases state, for a card's metadata; `None` when they differ or one is not known.

    With two licences, which of them the adapter may bear is its author's to say.
    """
    stated = set(licences)
    licence = stated.pop() if len(stated) == 1 else None
    return None if not licence or licence.startswith("other") else licence
