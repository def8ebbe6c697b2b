"""Weights: the revision of a base that has safetensors, where the branch or commit asked for has only pickled weights.

Stage: before a base is loaded. Imports no torch, unpickles nothing, and asks nobody to convert anything: transformers
would send the access token to a converting service.
"""

import functools
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import Discussion, HfApi, cached_assets_path, constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import ModelInfo

from ..json_files import read_json
from .access import HubError, is_hub_id, one_line_errors

CONVERSION_BOT = "SFconvertbot"
"""Author of the Hub's conversion pull requests."""

CONVERSION_TITLE = "Adding `safetensors` variant of this model"
"""Their title; in a private repository the bot opens them in its owner's name."""

_SAFETENSORS = (constants.SAFETENSORS_SINGLE_FILE, constants.SAFETENSORS_INDEX_FILE)
_PICKLED = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def safetensors_revision(name: str | Path, revision: str | None = None) -> str | None:
    """Where the safetensors of a base are.

    That is the revision itself, or the commit of a conversion pull request with the very same pickled weights and
    configuration. A commit found once is found again without a connection.

    Args:
        name (`str` or `Path`): Hub id; a folder is left alone.
        revision (`str`, *optional*): Branch, tag, commit or `refs/pr/N`; `main` by default.

    Returns:
        `str` or `None`: To be given to `from_pretrained`, for weights, configuration and all else.

    Raises:
        HubError: When the Hub has only pickled weights, or has not that repository or revision, or cannot be reached
            and the cache has nothing.
    """
    name = str(name)
    if Path(name).exists() or not is_hub_id(name):
        return revision
    asked = revision or constants.DEFAULT_REVISION
    # A pull request can be pushed to, so that it is followed to its commit.
    is_pull_request = asked.startswith("refs/pr/")
    if not is_pull_request and _is_cached(name, asked):
        return revision
    found = _read_found(name)
    if asked in found and (constants.is_offline_mode() or _COMMIT.fullmatch(asked)):
        return found[asked]
    if constants.is_offline_mode():
        raise HubError(
            f"There is no folder {name}, and HF_HUB_OFFLINE is set: the Hub's cache has no safetensors of {name} at "
            f"{asked}. Load it once with a connection."
        )
    with one_line_errors(name, get_token(), asked):
        api = HfApi(library_name="vlm_peft")
        try:
            info = api.model_info(name, revision=asked, files_metadata=True)
        except HTTPError as error:
            if asked not in found or isinstance(error, HfHubHTTPError):
                raise
            return found[asked]
        if _contents(info).keys().isdisjoint(_SAFETENSORS):
            commit = _find_conversion(api, name, asked, info)
        elif is_pull_request:
            commit = info.sha
        else:
            return revision
    _write_found(name, found | {asked: commit, info.sha: commit})
    return commit


def _is_cached(name: str, revision: str) -> bool:
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _SAFETENSORS)


def _find_conversion(api: HfApi, name: str, asked: str, info: ModelInfo) -> str | None:
    """Commit of a conversion of what a revision holds.

    Raises:
        HubError: When there is none.
    """
    files = _contents(info)
    pickled = sorted(file for file in files if _PICKLED.fullmatch(file))
    if not pickled and any(file.endswith(".safetensors") for file in files):
        # Weights under another name, which the configuration gives; by commit, transformers converts nothing.
        return info.sha
    if not pickled:
        raise HubError(
            f"{name} has neither {_SAFETENSORS[0]} nor {_SAFETENSORS[1]} at {asked}: choose another revision."
        )
    needed = [*pickled, *({constants.CONFIG_NAME} & files.keys())]
    for request in _conversions(api, name, is_private=bool(info.private)):
        head = api.model_info(name, revision=request.git_reference, files_metadata=True)
        offered = _contents(head)
        is_same = all(files[file] is not None and files[file] == offered.get(file) for file in needed)
        if offered.keys().isdisjoint(_SAFETENSORS) or not is_same:
            continue
        other = [file for file in files if file.endswith(_TEXT_SUFFIXES) and files[file] != offered.get(file)]
        _say(
            f"{name} has only pickled weights at {asked}: loading the safetensors of its conversion "
            f"{request.git_reference}, commit {head.sha}."
            + (f" Of that commit, and not of {asked}, are also {', '.join(sorted(other))}." if other else "")
        )
        return head.sha
    raise HubError(
        f"{name} has only pickled weights ({pickled[0]}) at {asked}, which could run any program and are never loaded, "
        "and no conversion pull request with the same weights and configuration: name a revision with safetensors, or "
        f"another repository, or convert a copy with `vlm-peft convert {name} --to FOLDER` and name that folder."
    )


def _conversions(api: HfApi, name: str, *, is_private: bool) -> list[Discussion]:
    """Pull requests of the Hub's bot that nobody has turned down."""
    author = None if is_private else CONVERSION_BOT
    try:
        requests = list(api.get_repo_discussions(name, discussion_type="pull_request", author=author))
    except HfHubHTTPError as error:
        if error.response.status_code != 403:
            raise
        # Its owner has switched discussions off.
        return []
    return [
        request
        for request in requests
        if request.status in ("open", "merged")
        and (request.author == CONVERSION_BOT or (is_private and request.title == CONVERSION_TITLE))
    ]


def _contents(info: ModelInfo) -> dict[str, str | None]:
    """Files of a commit with the hash of what is in each."""
    return {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or []}


@functools.cache
def _say(line: str) -> None:
    """Once in a process: a run looks a base up several times."""
    logging.getLogger(__name__).warning(line)


def _found_file(name: str) -> Path:
    return cached_assets_path("vlm_peft", namespace="conversions", subfolder=name.replace("/", "--")) / "commits.json"


def _read_found(name: str) -> dict[str, str]:
    """Revision -> commit with safetensors, of earlier look-ups."""
    try:
        return read_json(_found_file(name))
    except (OSError, ValueError):
        return {}


def _write_found(name: str, found: dict[Any, Any]) -> None:
    try:
        file = _found_file(name)
        draft = file.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(found, indent=2), encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        # Of a cache that cannot be written to: everything is looked up again.
        logging.getLogger(__name__).info("%s", error)
