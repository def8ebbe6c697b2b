"""A server for a run: `transformers serve` on this machine, started and stopped with it.

Stage: before the questions. `python -m vlm_peft.teacher.serve MODEL --port N` is that server, which knows a VisionQwen,
too: transformers' own finds classes by their names among its own. It ends when whoever started it is gone. It decodes
as the model's `generation_config.json` says, beams included; a request decides temperature, seed and length alone.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from ..adapters.folder import is_adapter_folder
from .questions import TeacherError

logger = logging.getLogger(__name__)

_PATIENCE = 1800.0  # seconds, in which a large model loads, and may be fetched
_LINES = 5


@contextmanager
def served(model: str, log: Path, *, device: str | None = None, dtype: str | None = None) -> Iterator[str]:
    """Runs a server with one model on a free port of the loopback interface.

    Args:
        model (`str`): Folder or Hub id of a whole model, not of an adapter.
        log (`Path`): Gets what the server says.
        device (`str`, *optional*): `cpu`, `cuda:0`, ...; chosen by transformers without it.
        dtype (`str`, *optional*): Of the weights; as they are stored without it.

    Yields:
        `str`: The server's address.

    Raises:
        ValueError: For an adapter; says how to make a whole model of it.
        TeacherError: When the server ends or does not answer in time, with the end of its log.
    """
    if is_adapter_folder(model):
        raise ValueError(
            f"{model} is an adapter: `vlm-peft export {model} FOLDER --to merged` makes a folder to serve."
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", device or "auto", "--dtype", dtype or "auto"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        # Its standard input ends with this process, however that ends.
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, model, *options], stdin=subprocess.PIPE, stdout=said, stderr=said
        )
        try:
            _wait(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    """Until the server answers: it loads the model before it listens."""
    started = time.monotonic()
    while True:
        if process.poll() is not None or time.monotonic() - started > _PATIENCE:
            end = " / ".join(log.read_text(encoding="utf-8", errors="replace").split("\n")[-_LINES - 1 : -1])
            state = "does not answer" if process.poll() is None else f"ended with status {process.poll()}"
            raise TeacherError(f"The server of the teacher {state}; {log} ends with: {' '.join(end.split())[-500:]}")
        try:
            if httpx2.get(f"{address}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """`transformers serve`, with VisionQwen among the classes that it knows."""
    import transformers
    from transformers.cli.transformers import app
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from ..model.modeling_vision_qwen import VisionQwen

    transformers.VisionQwen = VisionQwen
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[VisionQwen.config_class.model_type] = VisionQwen.__name__
    threading.Thread(target=_end_with_parent, daemon=True).start()
    app(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    main()
