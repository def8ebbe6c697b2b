"""Processes that know no Hub but `hub_server.py`: the client reads its environment when it is imported."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from conftest import ROOT

IDS = {"vision": "tiny/clip", "text": "tiny/qwen3"}

# Like the command: `import vlm_peft` waits with torch until a model is needed.
WORKER = """
import json, sys
sys.argv = ["vlm-peft"]
from huggingface_hub import constants
from vlm_peft.hub import models as hub
from vlm_peft.hub import datasets as hub_datasets
from vlm_peft.report.model_card import card_for_others
for line in sys.stdin:
    name, endpoint, arguments = json.loads(line)
    constants.ENDPOINT = endpoint
    arguments |= {"card": card_for_others} if name == "push_adapter" else {}
    try:
        answer = ["ok", str(getattr(hub if hasattr(hub, name) else hub_datasets, name)(**arguments))]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print("ANSWER " + json.dumps(answer), flush=True)
"""


class Worker:
    """A process with the Hub's client, which calls functions of `vlm_peft.hub.models`."""

    def __init__(self, server, folder: Path):
        self.server, self.output = server, []
        self.environment = environment(server, folder)
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=self.environment | {"HF_DEBUG": "1"},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Read all the time: a full pipe would stop the process.
        self.errors = threading.Thread(target=lambda: self.output.extend(self.process.stderr))
        self.errors.start()

    def __call__(self, function: str, *, endpoint: str | None = None, **arguments) -> tuple[str, str]:
        """`("ok", result)` or the error's class and message."""
        self.process.stdin.write(json.dumps([function, endpoint or self.server.url, arguments], default=str) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith("ANSWER "):
                return tuple(json.loads(line.removeprefix("ANSWER ")))
        raise AssertionError("The process ended: " + "".join(self.output))

    def close(self) -> str:
        """Ends it; all that it wrote."""
        self.process.stdin.close()
        self.process.wait(60)
        self.errors.join()
        return "".join(self.output)


def environment(server, folder: Path, **more: str) -> dict[str, str]:
    """Of a process that knows no Hub but the server's and no home but the folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": server.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(folder / "hf"),
        "HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        **more,
    }
