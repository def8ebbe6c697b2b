"""Convert: a base with pickled weights -> a folder with safetensors, by a process of its own.

Stage: before joining; called by the command line. Imports no torch: the process that unpickles is `unpickle.py`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from huggingface_hub import get_token, snapshot_download

from ..drafts import draft_of, sweep
from .access import is_hub_id, looks_local, one_line_errors
from .unpickle import REFUSED

_PICKLED = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*")
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


def convert_base(name: str | Path, output: str | Path, *, revision: str | None = None) -> Path:
    """Writes the weights of an encoder or decoder as safetensors, beside copies of its configuration and tokenizer.

    Tensors that share memory, as tied ones do, are each written whole. Nothing is at `output` until everything is.

    Args:
        name (`str` or `Path`): Folder, or Hub id, whose `pytorch_model.bin` may be in shards.
        output (`str` or `Path`): Folder to write; must not exist or be empty.
        revision (`str`, *optional*): Of a Hub id.

    Returns:
        `Path`: `output`.

    Raises:
        FileNotFoundError: When there is no such folder, or nothing in it to convert.
        ValueError: When `output` is not empty, or a file holds something else than tensors.
        HubError: When the Hub has not that repository, or cannot be reached.
    """
    output = Path(output).expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already and not empty: give another folder.")
    source = _find_source(str(name), revision)
    if any((source / file).is_file() for file in _SAFETENSORS):
        raise ValueError(f"{name} has safetensors already: there is nothing to convert.")
    if not any((source / file).is_file() for file in (_PICKLED[0], _PICKLED[2])):
        raise FileNotFoundError(f"{name} has neither {_PICKLED[0]} nor {_PICKLED[2]}: there is nothing to convert.")
    sweep(output.parent, output.name)
    draft = draft_of(output)
    draft.mkdir(parents=True)
    try:
        _unpickle(source, draft, name)
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if file.is_file() and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, draft / file.name)
        if output.exists():
            output.rmdir()
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return output


def _find_source(name: str, revision: str | None) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if looks_local(name) or not is_hub_id(name):
        raise FileNotFoundError(f"The base {name} is not there: expected a folder, or an id on the Hub.")
    with one_line_errors(name, get_token(), revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_PICKLED, *_COPIED]))


def _unpickle(source: Path, draft: Path, name: str | Path) -> None:
    """Runs `unpickle.py`.

    Raises:
        ValueError: With the reason that it gives, or its last line when it died.
    """
    process = subprocess.run(
        # -P: the modules of this folder are none of torch's.
        [sys.executable, "-P", str(Path(__file__).with_name("unpickle.py")), str(source), str(draft)],
        capture_output=True,
        text=True,
    )
    if process.returncode == 0:
        return
    lines = process.stderr.strip().splitlines() or [f"it ended with status {process.returncode}"]
    if process.returncode == REFUSED:
        raise ValueError(f"{name} is not converted: {lines[-1]}")
    raise ValueError(f"The process that converts {name} failed ({lines[-1]}): is there enough memory and disk space?")
