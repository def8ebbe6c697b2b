"""The recipe with --push_to_hub: bases from the Hub, one push at the end, and the token nowhere."""

import subprocess
import sys

import pytest
from conftest import ROOT
from hub_client import IDS, environment
from hub_server import OWNER, serve

OPTIONS = """\
stored_split: test
split_column: split
vision_feature_layer: [-1]
use_peft: true
lora_r: 2
use_cpu: true
max_steps: 2
max_new_tokens: 4
report_to: none
save_strategy: steps
save_steps: 1
"""


@pytest.fixture
def server(bases):
    with serve() as server:
        for name, base in zip(IDS.values(), bases, strict=True):
            server.add(name, {path.name: path.read_bytes() for path in base.iterdir()})
        yield server


def train(server, tmp_path, flickr, *options: str) -> tuple[int, str]:
    """Runs the recipe with both bases of the server; its exit status and all that it printed."""
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "config.yaml").write_text(OPTIONS)
    command = [sys.executable, str(ROOT / "recipes" / "sft.py"), "--config", "config.yaml", "--output_dir", "out"]
    command += ["--dataset_name", str(flickr), "--vision_model", IDS["vision"], "--model_name_or_path", IDS["text"]]
    command += ["--push_to_hub", "true", "--hub_model_id", "me/run", *options]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment(server, tmp_path), capture_output=True, text=True, timeout=200
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_one_push_at_the_end_and_no_token_left_behind(server, tmp_path, flickr):
    status, log = train(server, tmp_path, flickr, "--hub_token", OWNER, "--hub_private_repo", "true")
    assert status == 0, log
    assert "pushed   " in log
    assert OWNER not in log
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert OWNER.encode() not in file.read_bytes(), file
    repo = server.repos["model", "me/run"]
    assert repo.private
    assert len(repo.history) == 1
    files = repo.files
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "README.md"} <= set(files)
    assert "eval/test/scores.json" in files
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt"))]


def test_what_would_stop_the_push_stops_the_run_before_training(server, tmp_path, flickr):
    status, log = train(server, tmp_path, flickr)
    assert status == 2
    assert "token" in log.splitlines()[-1]
    assert not (tmp_path / "out").exists()
