"""Access to the Hub: names, the token, one commit for a whole push, and errors of one line.

Stage: below everything that is pushed or pulled. Imports nothing of ours and no torch. A text that still holds the
token or the home folder's path is not let through.
"""

import fnmatch
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

RepoType = Literal["model", "dataset"]

Contents = dict[str, Path | bytes]
"""Path in a repository -> what lies there."""

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
"""Any word may stand in these; they come from a base as they are."""

_SECRETS = (
    # As their makers say that they look; JSON may have `\n` before them, base64 has any letters in it.
    r"(?:(?<![A-Za-z0-9+/])|(?<=\\[nrt]))(?:(hf_|api_org_)[A-Za-z0-9]{30,}|(gh[opsur]_|github_pat_)\w{30,}|(sk-)[A-Za-z0-9_-]{20,}"
    r"|(AKIA)[0-9A-Z]{16}(?![0-9A-Z])|(xox[abprs]-)[A-Za-z0-9-]{20,}|(AIza)[A-Za-z0-9_-]{35}|(glpat-)[A-Za-z0-9_-]{20,})",
    r"-----(BEGIN [A-Z ]*PRIVATE KEY)-----",
    # Long values, with letters and digits, of options and keys that are named so.
    r"(?i)(token|secret|password|passwd|api[_-]?key|access[_-]?key)"
    r"(?:[\"']?\s*[=:]\s*|\s+)[\"']?(?=[\w+/=.-]*\d)(?=[\w+/=.-]*[a-z])[\w+/=.-]{16,}",
)

_BINARIES = (".safetensors", ".parquet", ".webp", ".png", ".jpg", ".jpeg", ".model")


class HubError(OSError):
    """What the Hub refused, or why it was not asked, and what to do; one line, without the token."""


def check_repo_id(repo_id: str) -> None:
    """Looks at a repository's name before anything is sent.

    Raises:
        HubError: When the Hub would not take it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} is no name for a repository, expected owner/name of letters, digits, '-', '_', '.': {error}"
        ) from None


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository; a path with a dot, a slash or a tilde in front cannot."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def looks_local(name: str) -> bool:
    """Whether a name cannot be a Hub id, which is `owner/name`, so that it must be a path that is there."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return name.startswith((".", "/", "~"))


def find_token(token: str | None, repo_id: str, private: bool | None) -> str:
    """The token given, or that of `hf auth login` or `HF_TOKEN`.

    Raises:
        HubError: When there is none; nothing is pushed without.
    """
    token = token or get_token()
    if not token:
        raise HubError(
            f"Nothing is pushed to the {'private ' if private else ''}repository {repo_id} without an access token: "
            "run `hf auth login`, or set HF_TOKEN to a token with write permission."
        )
    return token


def look_up(
    api: HfApi, repo_id: str, repo_type: RepoType, private: bool | None, revision: str | None
) -> tuple[str, str | None]:
    """Full name and newest commit of a repository, without a commit when it is yet to be made.

    Raises:
        HubError: When it is of another kind, public where a private one is asked for, or lacks the branch.
    """
    user = api.whoami()["name"]
    if "/" not in repo_id:
        repo_id = f"{user}/{repo_id}"
    kinds: dict[str, Any] = {}
    for kind in ("model", "dataset"):
        try:
            kinds[kind] = api.repo_info(repo_id, repo_type=kind)
        except RepositoryNotFoundError:
            continue
    if repo_type not in kinds:
        if kinds:
            raise HubError(
                f"{repo_id} is the name of a {next(iter(kinds))} repository, not of a {repo_type} one: choose another."
            )
        if revision not in (None, "main"):
            raise HubError(f"{repo_id} is not there yet, so it has no branch {revision!r}: leave the revision out.")
        return repo_id, None
    info = kinds[repo_type]
    if private and info.private is False:
        raise HubError(f"{repo_id} is public already: make it private on the Hub first, or choose another name.")
    return repo_id, api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha if revision else info.sha


def commit(
    api: HfApi,
    repo_id: str,
    repo_type: RepoType,
    contents: Contents,
    stale: list[str],
    private: bool | None,
    revision: str | None,
    head: str | None,
) -> str:
    """Makes the repository when it is not there, and sends everything as one commit.

    Args:
        api: With the token.
        repo_id, repo_type: Of the repository.
        contents: All its files.
        stale: Patterns of files that go in the same commit when they are not among `contents`.
        private: Visibility of a new repository.
        revision: Branch.
        head: Commit to build upon, of [`look_up`]; `None` for a new repository.

    Returns:
        Address of the repository.
    """
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
    if head is None:
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    else:
        there = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)
        gone = [name for name in there if any(fnmatch.fnmatch(name, each) for each in stale) and name not in contents]
        operations += [CommitOperationDelete(name) for name in gone]
    api.create_commit(
        repo_id,
        operations,
        commit_message="Adapter" if repo_type == "model" else "Data set",
        repo_type=repo_type,
        revision=revision,
        # Somebody else's commit in between is refused, not overwritten.
        parent_commit=head,
    )
    address = f"{api.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    return address if revision is None else f"{address}/tree/{revision}"


@contextmanager
def one_line_errors(repo_id: str, token: str | None, revision: str | None) -> Iterator[None]:
    """What the Hub's client raises -> [`HubError`], one line without the token."""
    try:
        yield
    except HubError:
        raise
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, RuntimeError, ValueError) as error:
        message = _explain(error, repo_id, revision)
        if message is None:
            raise
        message = " ".join(message.split())
        # From None: the client's own error holds the request with its headers.
        raise HubError(message.replace(token, "***") if token else message) from None


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError | OfflineModeIsEnabled):
        cause = cause.__cause__
    endpoint = constants.ENDPOINT
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        # Metadata of a card, or a large file, that the Hub did not like; the client has put its reasons together.
        return f"{endpoint} refused this for {repo_id}: {error}"
    if cause is None:
        return None
    if isinstance(cause, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and {repo_id} cannot be had without {endpoint}: unset it."
    if isinstance(cause, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r} on {endpoint}: give a branch, tag or commit that it has."
    if not isinstance(cause, HfHubHTTPError):
        return (
            f"{endpoint} cannot be reached or broke off ({type(cause).__name__}: {cause}); of {repo_id} there is no "
            "half version. Try again."
        )
    status, said = cause.response.status_code, cause.server_message or ""
    if status == 401 and not isinstance(cause, RepositoryNotFoundError):
        return f"{endpoint} did not accept the access token: run `hf auth login`, or set HF_TOKEN to a valid one."
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"{repo_id} is not on {endpoint}, or is private and the access token may not read it: check the name, or "
            "run `hf auth login`."
        )
    if status == 403:
        return f"The access token may not do this to {repo_id} ({said or 'forbidden'}): use one with write permission."
    if status in (409, 412):
        return f"{repo_id} was changed by somebody else at the same time ({said}): try again."
    return f"{endpoint} refused this for {repo_id} with status {status} ({said or 'no reason given'})."


def without_local_paths(text: str) -> str:
    """Absolute paths that exist here -> their last name; what is left of the home folder -> `~`."""

    def last_name(match: re.Match) -> str:
        path = match[0].rstrip(".,/")
        return Path(path).name + match[0][len(path) :] if Path(path).exists() else match[0]

    text = re.sub(r"(?<![\w.:/~<\\-])(?:/[\w.+@%,-]+){2,}/?", last_name, text)
    home = _home_pattern()
    return home.sub("~", text) if home else text


def _home_pattern() -> re.Pattern | None:
    home = str(Path.home())
    return re.compile(rf"(?<![\w.]){re.escape(home)}(?![\w-])") if len(home) > 1 else None


def refuse_secrets(contents: Contents, token: str) -> None:
    """Looks through the text files of a push.

    Raises:
        ValueError: for one that holds the token, or, outside of vocabularies, what looks like a token or a password, or
            the home folder's path.
    """
    for name, content in contents.items():
        if not name.lower().endswith(_BINARIES):
            raw = content if isinstance(content, bytes) else content.read_bytes()
            refuse_secret(name, raw.decode("utf-8", "replace"), token, is_vocabulary=name in VOCABULARIES)


def refuse_secret(what: str, text: str, token: str, *, is_vocabulary: bool = False) -> None:
    """As [`refuse_secrets`], for one text; `what` names it in the message."""
    if token in text:
        raise ValueError(f"{what} is not pushed: it holds your access token. Remove it there, and renew the token.")
    if is_vocabulary:
        return
    for pattern in _SECRETS:
        if found := re.search(pattern, text):
            kind, line = next(filter(None, found.groups())), text.count("\n", 0, found.start()) + 1
            raise ValueError(
                f"{what} is not pushed: line {line} holds what looks like a secret ({kind}...). Remove it there, and "
                "renew it if it is one."
            )
    home = _home_pattern()
    if home and home.search(text):
        raise ValueError(f"{what} is not pushed: it names your home folder. Remove the path there.")
