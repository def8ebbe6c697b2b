"""The wheel without the clone: built, installed into an empty folder, and used from there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from vlm_peft.training import sft

OPTIONS = """\
stored_split: test
split_column: split
vision_feature_layer: [-1]
use_peft: true
lora_r: 2
use_cpu: true
bf16: false
max_steps: 2
logging_steps: 1
max_new_tokens: 4
report_to: none
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a program of an installed wheel in a folder of its own, and returns what it printed."""
    tmp = tmp_path_factory.mktemp("wheel")
    # A build leaves files beside its sources.
    shutil.copytree(ROOT / "vlm_peft", tmp / "source" / "vlm_peft", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    alone = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *alone, "--no-build-isolation", "--wheel-dir", tmp, tmp / "source"]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp.glob("*.whl")
    site = tmp / "site"
    subprocess.run([*pip, "install", *alone, "--target", site, wheel], check=True, capture_output=True, timeout=120)
    (tmp / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*program) -> str:
        command = [sys.executable, *map(str, program)]
        done = subprocess.run(
            command, cwd=tmp / "elsewhere", env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.program, run.folder = site / "bin" / "vlm-peft", tmp / "elsewhere"
    return run


def test_two_steps_are_trained_and_scored_without_a_clone(installed, flickr, bases):
    (installed.folder / "mine.yaml").write_text(OPTIONS)
    vision, text = bases
    data = ("--dataset_name", flickr, "--vision_model", vision, "--model_name_or_path", text)
    log = installed(installed.program, "train", "--config", "mine.yaml", *data, "--output_dir", "out")
    assert "step 2/2" in log
    assert "reloaded, its logits are equal." in log
    out = installed.folder / "out"
    summary = json.loads((out / "run_summary.json").read_text())
    assert summary["command"].startswith("vlm-peft train --config mine.yaml --dataset_name ")
    assert {"total", "train", "save", "score"} <= summary["seconds"].keys()
    assert (out / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert (out / "README.md").is_file()

    predictions = out / "eval" / "test" / "predictions.jsonl"
    scored = installed(installed.program, "score", predictions, "--metrics", "CIDEr", "--output", "again.json")
    assert "CIDEr" in scored
    trained, again = (
        json.loads(path.read_text())["metrics"]
        for path in (predictions.with_name("scores.json"), installed.folder / "again.json")
    )
    assert again["CIDEr"] == trained["CIDEr"]


def test_metrics_are_imported_from_where_the_wheel_is(installed):
    code = """
import vlm_peft
from vlm_peft.metrics import score_captions
print(vlm_peft.__file__)
print(score_captions(["a red dog"], [["a red dog", "the dog"]], tokenizer="treebank-python").metrics["Bleu_1"])
"""
    place, bleu = installed("-c", code).splitlines()
    assert Path(place) == installed.program.parents[1] / "vlm_peft" / "__init__.py"
    assert float(bleu) == pytest.approx(1)


def test_a_training_without_options_says_what_to_give(monkeypatch):
    """Outside a clone there is no demo."""
    monkeypatch.setattr(sft, "DEMO", Path("recipes/configs/nowhere.yaml"))
    with pytest.raises(SystemExit, match=r"^vlm-peft train: give --config FILE\.yaml, or --dataset_name, "):
        sft.main([])
