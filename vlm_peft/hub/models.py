"""Hub: an adapter folder -> a repository, in one commit; a repository -> an adapter folder.

Stage: after training, and before loading. Imports no torch. What goes up is listed here by name; text files lose local
names and paths on the way.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from ..json_files import read_json
from .access import (
    VOCABULARIES,
    Contents,
    HubError,
    check_repo_id,
    commit,
    find_token,
    is_hub_id,
    look_up,
    one_line_errors,
    refuse_secrets,
    without_local_paths,
)
from .licences import licence_of

NEEDED_FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "processor_config.json",
    "tokenizer_config.json",
)
"""Without these an adapter folder is not complete."""

LOADED_FILES = (
    *NEEDED_FILES[1:],
    "chat_template.jinja",
    "added_tokens.json",
    "merges.txt",
    "preprocessor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "task.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
"""What loading an adapter and its processor may read."""

FULL_SAVE_FILES = ("generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
"""What a full save has beside these."""

MEASURED_FILES = ("run_summary.json", "eval/*/scores.json", "eval/*/predictions.jsonl")
"""What the card's figures rest on; pushed, with the pictures that the card shows, but not needed to load."""

CLIP_TYPES = ("clip", "siglip", "siglip2")
"""`config.model_type` of models with two towers: an adapter of one has one base, the encoder; a merged one has none."""

_PICTURES = (".webp", ".png", ".jpg", ".jpeg")
_NAMES = {"vision": "encoder", "text": "decoder"}
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Published:
    """What an adapter and its bases are called on the Hub."""

    repo_id: str
    """Of the adapter."""
    bases: dict[str, str]
    """Id of each base, by `"vision"` and `"text"`."""
    revisions: dict[str, str | None]
    """Newest commit of each."""
    licences: dict[str, str]
    """What the card of each states; empty when it states none."""

    @property
    def base_model(self) -> list[str]:
        """As a card's metadata name the bases; of a merged CLIP there are none."""
        return [self.bases[part] for part in ("text", "vision") if part in self.bases]

    def summary(self, recorded: dict[str, Any]) -> dict[str, Any]:
        """What `run_summary.json` holds, with ids in place of local names."""
        named: dict[str, Any] = {"adapter": self.repo_id}
        for part, base in self.bases.items():
            named[f"{part}_model"] = base
            if f"{part}_revision" in recorded and recorded.get(f"{part}_model") != base:
                # The recorded revision was of another repository.
                named[f"{part}_revision"] = self.revisions[part]
        return recorded | named


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    card: Callable[[Path, Published], str],
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    vision: str | None = None,
    text: str | None = None,
) -> str:
    """Pushes an adapter folder or a merged CLIP in one commit: others see the old version or the whole new one.

    The repository is made when it is not there. Files of an earlier push that are no longer part of the folder are
    removed in the same commit; other files are left alone. Nothing in the folder itself is changed.

    Args:
        folder (`str` or `Path`): An adapter folder with its card and processor; or a CLIP's `merged` folder.
        repo_id (`str`): `owner/name`, or a name under the token's user.
        card (`Callable`): Makes the card for others: that of `report.model_card` or of `contrastive.card`.
        private (`bool`, *optional*): Visibility of a new repository; the owner's default when left out.
        revision (`str`, *optional*): Branch that is there already; `main` by default.
        token (`str`, *optional*): With write permission; the one of `hf auth login` or `HF_TOKEN` by default.
        vision, text (`str`, *optional*): Hub ids of the bases, in place of the recorded ones. Needed when the adapter
            was trained on local folders.

    Returns:
        `str`: Address of the repository.

    Raises:
        FileNotFoundError: When the folder is not complete; names what is missing.
        ValueError: When a file is damaged, a base is a local folder, or a text names the home folder or holds a token.
        HubError: When the name is invalid, there is no token, or the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    files = adapter_files(folder)
    config = read_json(folder / "config.json")
    bases = base_ids(config, vision=vision, text=text)
    token = find_token(token, repo_id, private)
    api = HfApi(token=token, library_name="vlm_peft")
    with one_line_errors(repo_id, token, revision):
        repo_id, head = look_up(api, repo_id, "model", private, revision)
        found = {part: _look_up_base(api, part, name) for part, name in bases.items()}
    revisions, licences = (
        {part: sha for part, (sha, _) in found.items()},
        {part: said for part, (_, said) in found.items()},
    )
    contents = _for_others(folder, files, Published(repo_id, bases, revisions, licences), card)
    refuse_secrets(contents, token)
    stale = [*NEEDED_FILES, *LOADED_FILES, *MEASURED_FILES, *(f"eval/*/pictures/*{suffix}" for suffix in _PICTURES)]
    # An adapter may follow a merged CLIP in its repository.
    stale += FULL_SAVE_FILES if config.get("model_type") in CLIP_TYPES else ()
    with one_line_errors(repo_id, token, revision):
        return commit(api, repo_id, "model", contents, stale, private, revision, head)


def check_push(
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    vision: str | None = None,
    text: str | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Finds out before a training what would stop its push: the name, the token, the bases, the repository.

    Args:
        repo_id, private, revision, token: See [`push_adapter`].
        vision, text (`str`, *optional*): Names of the bases that will be trained on.
        config (`dict`, *optional*): What is known of the configuration that will be saved; see [`base_ids`].

    Raises:
        ValueError, HubError: As [`push_adapter`].
    """
    check_repo_id(repo_id)
    # A training takes `demo/clip` from the working directory when it is there, and records its absolute path.
    names = {"vision": vision, "text": text}
    base_ids(
        config or {},
        **{part: str(Path(name).resolve()) if name and Path(name).exists() else name for part, name in names.items()},
    )
    token = find_token(token, repo_id, private)
    with one_line_errors(repo_id, token, revision):
        look_up(HfApi(token=token, library_name="vlm_peft"), repo_id, "model", private, revision)


def pull_model(repo_id: str, *, revision: str | None = None) -> Path:
    """Downloads what loading an adapter or a full save reads, and nothing else, into the Hub's cache.

    Args:
        repo_id (`str`): `owner/name`.
        revision (`str`, *optional*): Branch, tag or commit; `main` by default.

    Returns:
        `Path`: The folder in the cache.

    Raises:
        HubError: When the name is invalid, or the repository or revision is not there or cannot be reached.
    """
    check_repo_id(repo_id)
    with one_line_errors(repo_id, get_token(), revision):
        patterns = [*LOADED_FILES, *FULL_SAVE_FILES]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))


def base_ids(config: dict[str, Any], *, vision: str | None = None, text: str | None = None) -> dict[str, str]:
    """Hub ids of the bases, `{"vision": ..., "text": ...}`; of a CLIP's adapter `{"vision": ...}`, merged none.

    Args:
        config (`dict`): The adapter's `config.json`.
        vision, text (`str`, *optional*): In place of what the configuration records.

    Raises:
        ValueError: When one is a folder: the pushed adapter would load only where it was trained. Or when an id is
            given for a base that the model has not.
    """
    ids, fields = {}, _base_fields(config)
    for part, given in (("vision", vision), ("text", text)):
        if part not in fields:
            if given is not None:
                raise ValueError(f"The model has no {_NAMES[part]} as its base: leave --{part} out.")
            continue
        name = given if given is not None else config.get(f"{fields[part]}_name_or_path")
        if name is None:
            raise ValueError(
                f"The adapter's {_NAMES[part]} was drawn at random, not loaded: save it, push it to the Hub and give "
                f'its id ({part}="owner/name", --{part} owner/name on the command line).'
            )
        if not is_hub_id(name):
            raise ValueError(
                f"The adapter's {_NAMES[part]} is the local folder {name}, so what is pushed would load on this "
                f'machine only: push that folder to the Hub and give its id ({part}="owner/name", --{part} owner/name '
                "on the command line)."
            )
        ids[part] = name
    return ids


def _base_fields(config: dict[str, Any]) -> dict[str, str]:
    """Part -> how the fields of its base begin in a configuration."""
    if config.get("model_type") in CLIP_TYPES:
        return {"vision": "base"} if "base_name_or_path" in config else {}
    return {"vision": "vision", "text": "text"}


def is_clip_folder(folder: str | Path) -> bool:
    """Whether a folder holds a CLIP's adapter, or a CLIP.

    Raises:
        ValueError: When its config.json is damaged.
    """
    config = Path(folder) / "config.json"
    return config.is_file() and read_json(config).get("model_type") in CLIP_TYPES


def adapter_files(folder: str | Path) -> list[str]:
    """Names of the files of an adapter folder, or of a merged CLIP, that are pushed, after a look at each.

    Returns:
        `list[str]`: Relative paths with forward slashes, sorted.

    Raises:
        FileNotFoundError: When the folder is not complete.
        ValueError: When a file is damaged, or a link that leads out of the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"The adapter folder {folder} is not there.")
    is_merged = is_clip_folder(folder) and not _base_fields(read_json(folder / "config.json"))
    weights = sorted(path.name for path in folder.glob("model*.safetensors")) if is_merged else [_WEIGHTS]
    needed = [name for name in NEEDED_FILES if not (is_merged and name.startswith("adapter_"))]
    missing = [name for name in (*needed, *(weights or ["model.safetensors"])) if not (folder / name).is_file()]
    if missing:
        kind = "merged CLIP" if is_merged else "adapter folder"
        raise FileNotFoundError(f"{folder} is no complete {kind}: {', '.join(dict.fromkeys(missing))} missing.")
    names = [name for name in ("README.md", *LOADED_FILES) if (folder / name).is_file()]
    for pattern in (*MEASURED_FILES, *(FULL_SAVE_FILES if is_merged else ())):
        names += [path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file()]
    for link in _shown_pictures((folder / "README.md").read_text(encoding="utf-8")):
        if not (folder / link).is_file():
            raise FileNotFoundError(f"{folder / 'README.md'} shows {link}, which is not there.")
        names.append(link)
    for name in names:
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} leads out of the folder, to {path.resolve()}: put the file itself there.")
        if path.suffix == ".json":
            read_json(path)
    for name in weights:
        try:
            with safe_open(folder / name, framework="numpy") as file:
                tensors = list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged ({error}): save the adapter again.") from error
        if not tensors:
            raise ValueError(f"{folder / name} holds no tensors: save the adapter again.")
    return sorted(set(names))


def _shown_pictures(card: str) -> list[str]:
    """Relative links of a card's pictures, as paths."""
    links = re.findall(r"!\[(?:\\.|[^\]\\])*\]\(([^)\s]+)\)", card) + re.findall(r"<img[^>]*\ssrc=\"([^\"]+)\"", card)
    paths = [unquote(link) for link in links if not re.match(r"[a-z]+:", link)]
    return [path for path in paths if path.lower().endswith(_PICTURES)]


def _for_others(
    folder: Path, files: list[str], published: Published, card: Callable[[Path, Published], str]
) -> Contents:
    """The files to push: as they lie in the folder, or with ids in place of local names."""
    config, bases = read_json(folder / "config.json"), published.bases
    fields = _base_fields(config)
    summary = read_json(folder / "run_summary.json") if "run_summary.json" in files else {}
    own_names = {str(folder), str(folder.resolve()), folder.resolve().name, summary.get("adapter")}
    renamed = {config.get(f"{fields[part]}_name_or_path"): base for part, base in bases.items()}
    renamed |= {summary.get(f"{part}_model"): base for part, base in bases.items()}
    contents: Contents = {}
    for name in files:
        path = folder / name
        if name == "README.md":
            contents[name] = without_local_paths(card(folder, published)).encode()
            continue
        if path.suffix != ".json" or name in VOCABULARIES:
            contents[name] = path
            continue
        stored = read_json(path)
        value = json.loads(json.dumps(stored))
        if name == "config.json":
            for part, base in bases.items():
                if value.get(f"{fields[part]}_name_or_path") != base:
                    # The commit that was found now: the recorded revision was of another repository.
                    revision = published.revisions[part]
                    value |= {f"{fields[part]}_name_or_path": base, f"{fields[part]}_revision": revision}
                if "_name_or_path" in (value.get(f"{part}_config") or {}):
                    value[f"{part}_config"]["_name_or_path"] = base
        elif name == "adapter_config.json":
            base_model = value.get("base_model_name_or_path")
            value["base_model_name_or_path"] = base_model and renamed.get(base_model, base_model)
        elif name == "run_summary.json":
            value = published.summary(value)
        elif path.name == "scores.json" and value.get("model") in own_names:
            value["model"] = published.repo_id
        value = _map_strings(value, without_local_paths)
        contents[name] = path if value == stored else (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    return contents


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_strings(each, change) for each in value]
    if isinstance(value, dict):
        return {name: _map_strings(each, change) for name, each in value.items()}
    return value


def _look_up_base(api: HfApi, part: str, name: str) -> tuple[str | None, str]:
    """Newest commit and stated licence of a base.

    Raises:
        HubError: When it is not on the Hub.
    """
    try:
        info = api.model_info(name)
    except RepositoryNotFoundError:
        raise HubError(
            f"The {_NAMES[part]} {name} is not on the Hub, or the token may not read it: push it, or give another id "
            f'({part}="owner/name", --{part} owner/name on the command line).'
        ) from None
    return info.sha, licence_of(info.card_data)
