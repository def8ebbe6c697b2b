"""Drafts: what is written aside and takes its name when it is whole, and what killed processes left of it.

Stage: beside everything that writes folders and caches.
"""

import os
import re
import shutil
import socket
from pathlib import Path

_HOST = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname()) or "host"
# A folder may be shared with other machines, whose processes are not known here.
_DRAFT = re.compile(rf"\.(?P<name>.+)\.(?:{_HOST}-)?(?P<process>[1-9][0-9]*)\.tmp")


def draft_of(path: Path) -> Path:
    """Where this process writes what will be `path`: a hidden name beside it."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes drafts whose processes are gone.

    Args:
        folder (`Path`): Where they lie; may be missing.
        name (`str`, *optional*): Only those of this file or folder; of all by default.
    """
    for path in folder.glob(".*.tmp"):
        draft = _DRAFT.fullmatch(path.name)
        if draft is None or (name is not None and draft["name"] != name) or _is_running(int(draft["process"])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
