"""The recipes with --push_to_hub: bases from the Hub, one push at the end, and the token nowhere."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from hub_client import IDS, environment
from hub_server import OWNER, serve
from tiny_clips import save_tiny
from yaml import safe_load

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


# In one process, as loading torch takes most of the time.
USE_A_CLIP = """
import shutil, sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from vlm_peft.__main__ import main
from vlm_peft.contrastive.adapt import Tuning, adapt
from vlm_peft.contrastive.folder import load_clip, save_clip
from vlm_peft.contrastive.fine_tune import main as fine_tune
data, model, token = sys.argv[1:]
texts, picture = ["a red wall", "two"], [Image.new("RGB", (8, 8), "red")]
assert fine_tune(
    ["--dataset_name", data, "--stored_split", "test", "--split_column", "split", "--clip_model", model]
    + ["--max_steps", "1", "--save_steps", "1", "--use_cpu", "true", "--report_to", "none", "--output_dir", "out"]
    + ["--push_to_hub", "true", "--hub_model_id", "me/clip", "--hub_token", token, "--long_texts", "cut"]
) == 0
here, pulled = load_clip("out"), load_clip("me/clip")
assert torch.equal(here.embed_texts(texts), pulled.embed_texts(texts))
assert torch.equal(here.embed_pictures(picture), pulled.embed_pictures(picture))
assert main(["export", "me/clip", "bare", "--to", "merged"]) == 0
assert main(["export", "out", "merged", "--to", "merged"]) == 0
assert main(["push", "bare", "me/bare"]) == 2
assert main(["push", "merged", "me/merged"]) == 0
assert main(["push", "merged", "me/merged", "--vision", model]) == 2
# An adapter takes the place of what was merged.
assert main(["push", "merged", "me/both"]) == main(["push", "out", "me/both"]) == 0
# One that was trained on a folder needs the folder's id.
encoder = load_clip("base")
encoder.clip = adapt(encoder.clip, Tuning())
save_clip(encoder, "local")
shutil.copyfile("out/README.md", "local/README.md")
assert main(["push", "local", "me/local"]) == 2
assert main(["push", "local", "me/local", "--vision", model]) == 0
assert torch.equal(load_clip("local").embed_texts(texts), load_clip("me/local").embed_texts(texts))
stock = AutoModel.from_pretrained("me/merged")
inputs = AutoProcessor.from_pretrained("me/merged").image_processor(picture, return_tensors="pt")
found = torch.nn.functional.normalize(stock.get_image_features(**inputs).pooler_output)
torch.testing.assert_close(found, here.embed_pictures(picture), rtol=1e-4, atol=1e-5)
"""


def test_a_clip_is_pushed_and_found_again_as_adapter_and_merged(tmp_path, flickr):
    base = save_tiny(tmp_path / "base")
    (tmp_path / "home").mkdir()
    with serve() as server:
        server.add("tiny/dual", {path.name: path.read_bytes() for path in base.iterdir()})
        known = environment(server, tmp_path, HF_TOKEN=OWNER)
        command = [sys.executable, "-c", USE_A_CLIP, str(flickr), "tiny/dual", OWNER]
        ended = subprocess.run(command, cwd=tmp_path, env=known, capture_output=True, text=True, timeout=600)
        repos = dict(server.repos)
    told = ended.stdout + ended.stderr
    assert ended.returncode == 0, told
    assert OWNER not in told
    assert "is no complete merged CLIP: README.md missing" in ended.stderr
    assert "The model has no encoder as its base: leave --vision out." in ended.stderr
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or OWNER.encode() not in file.read_bytes(), file
    adapter, merged = repos["model", "me/clip"], repos["model", "me/merged"]
    assert len(adapter.history) == len(merged.history) == 1
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    assert not [name for name in {*adapter.files, *merged.files} if "checkpoint" in name or name.endswith(".pt")]
    assert {"adapter_model.safetensors", "eval/retrieval-test/scores.json"} <= set(adapter.files)
    assert {"model.safetensors", "preprocessor_config.json", "eval/retrieval-test/scores.json"} <= set(merged.files)
    assert not [name for name in merged.files if name.startswith("adapter_")]
    config = json.loads(adapter.files["config.json"])
    assert (config["base_name_or_path"], "base_name_or_path" in json.loads(merged.files["config.json"])) == (
        "tiny/dual",
        False,
    )
    assert "adapter_model.safetensors" in repos["model", "me/both"].files
    assert "model.safetensors" not in repos["model", "me/both"].files
    config = json.loads(repos["model", "me/local"].files["config.json"])
    head = repos["model", "tiny/dual"].branches["main"]
    assert (config["base_name_or_path"], config["base_revision"]) == ("tiny/dual", head)
    config = json.loads(repos["model", "me/local"].files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tiny/dual"
    assert "encoder is the local folder" in ended.stderr
    cards = {name: repos["model", f"me/{name}"].files["README.md"].decode() for name in ("clip", "merged")}
    fronts = {name: safe_load(card.split("---")[1]) for name, card in cards.items()}
    assert {name: front["base_model_relation"] for name, front in fronts.items()} == {
        "clip": "adapter",
        "merged": "finetune",
    }
    assert all(front["base_model"] in ("tiny/dual", ["tiny/dual"]) for front in fronts.values())
    assert 'load_clip("me/clip")' in cards["clip"]
    assert 'AutoModel.from_pretrained("me/merged")' in cards["merged"]
    assert 'AutoModel.from_pretrained("merged")' in (tmp_path / "merged" / "README.md").read_text()
    assert "image\\_retrieval" not in cards["clip"]
    assert "| retrieval-test | retrieval | image_retrieval_recall@1 |" in cards["merged"]
    for repo in (adapter, merged, repos["model", "me/local"]):
        for name, content in repo.files.items():
            assert str(tmp_path).encode() not in content, name
