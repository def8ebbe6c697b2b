"""The recipe as a user runs it: `accelerate launch` in a subprocess, from another folder, on tiny bases.

Each start imports for seconds, so a few runs, two at a time, serve all tests of this module.
"""

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, flickr_rows, save_flickr

LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(ROOT / "recipes/accelerate/cpu.yaml"),
    # Otherwise its own traceback follows on ours, or on the one line of an error of use.
    "--quiet",
]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
STEPS = 12
BAD_ROW = 5


@dataclass
class Finished:
    """A run that ended: its folder, exit status and everything it printed."""

    folder: Path
    status: int
    log: str

    def losses(self) -> dict[int, float]:
        history = json.loads((self.folder / "log_history.json").read_text())
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}

    def predictions(self, name: str = "test") -> list[dict]:
        return read_predictions(self.folder / "eval" / name)


def read_predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


class Runner:
    """Starts the scripts in an empty folder with the caches of this test session."""

    def __init__(self, tmp: Path, bases: tuple[Path, Path]):
        self.tmp = tmp
        self.bases = bases
        self.environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp / "hf"),
            "HF_DATASETS_CACHE": str(tmp / "cache"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        (tmp / "elsewhere").mkdir()

    def finish(self, folder: str, process: subprocess.Popen) -> Finished:
        try:
            log, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            # The launcher's children, too.
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Finished(self.tmp / folder, process.returncode, log)

    def start(self, launcher: list[str], script: str, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*launcher, str(ROOT / script), *map(str, arguments)],
            cwd=self.tmp / "elsewhere",
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def training(self, name: str, data: Path, *overrides: str) -> list[str]:
        vision, text = self.bases
        return [
            *("--config", str(ROOT / "recipes/configs/flickr30k.yaml")),
            *("--dataset_name", str(data), "--vision_model", str(vision), "--model_name_or_path", str(text)),
            *("--output_dir", str(self.tmp / name), "--use_cpu", "true", "--bf16", "false"),
            *("--per_device_train_batch_size", "8", "--max_length", "512", "--max_new_tokens", "12"),
            *("--learning_rate", "1e-2", "--warmup_steps", "2", "--max_steps", str(STEPS), "--logging_steps", "1"),
            *("--report_to", "none", *overrides),
        ]

    def train(self, name: str, data: Path, *overrides: str, launcher: list[str] = LAUNCH) -> Finished:
        return self.finish(name, self.start(launcher, "recipes/sft.py", *self.training(name, data, *overrides)))

    def interrupt(self, name: str, data: Path, *overrides: str) -> Finished:
        """Ends the launcher, as `kill` does, when the log shows step 4."""
        process = self.start(LAUNCH, "recipes/sft.py", *self.training(name, data, *overrides))
        log = ""
        for line in process.stdout:
            log += line
            if "step 4/" in line:
                process.send_signal(signal.SIGTERM)
                break
        # The recipe outlives the launcher until its checkpoint is written; then the pipe closes.
        log += process.stdout.read()
        return Finished(self.tmp / name, process.wait(timeout=300), log)


@pytest.fixture(scope="module")
def bad_flickr(tmp_path_factory) -> Path:
    """The data set with one training picture cut in half."""
    rows = flickr_rows()
    encoded = rows["image"][BAD_ROW]["bytes"]
    rows["image"][BAD_ROW]["bytes"] = encoded[: len(encoded) // 2]
    return save_flickr(tmp_path_factory.mktemp("flickr_bad"), rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bases, flickr, bad_flickr):
    """Name of a run -> its future."""
    runner = Runner(tmp_path_factory.mktemp("runs"), bases)
    skip = ("--on_bad_row", "skip")

    def resumed() -> tuple[Finished, Finished]:
        stopped = runner.interrupt("resumed", bad_flickr, *skip)
        return stopped, runner.train("resumed", bad_flickr, *skip, "--resume_from_checkpoint", "true")

    def evaluated() -> Finished:
        trained = futures["whole"].result().folder
        data = ("--dataset", bad_flickr, "--stored_split", "test", "--split_column", "split", "--split", "test")
        arguments = (
            "--model",
            trained,
            *data,
            "--output_dir",
            runner.tmp / "again",
            "--no-meteor",
            "--batch_size",
            "3",
        )
        return runner.finish("again", runner.start(LAUNCH, "eval/run.py", *arguments))

    def both(name: str, launcher: list[str], rows: int) -> Finished:
        batch = ("--per_device_train_batch_size", str(rows), "--lora_dropout", "0")
        return runner.train(name, flickr, *batch, launcher=launcher)

    with ThreadPoolExecutor(2) as pool:
        futures = {
            "whole": pool.submit(runner.train, "whole", bad_flickr, *skip, "--report_to", "tensorboard"),
            "resumed": pool.submit(resumed),
            "evaluated": pool.submit(evaluated),
            "one process": pool.submit(both, "one", LAUNCH, 8),
            "two processes": pool.submit(both, "two", TWO_PROCESSES, 4),
            "bad row": pool.submit(runner.train, "bad", bad_flickr),
        }
        yield futures


@pytest.fixture(scope="module")
def whole(runs) -> Finished:
    run = runs["whole"].result()
    assert run.status == 0, run.log
    return run


def test_adapter_folder_is_complete_and_small(whole, bases):
    names = {path.name for path in whole.folder.iterdir()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "config.json", "processor_config.json"}
    expected |= {"chat_template.jinja", "tokenizer.json", "task.json", "README.md", "report.html"}
    assert expected <= names
    assert not [path for path in whole.folder.rglob("*.bin")], "a pickle in the adapter folder"
    config = json.loads((whole.folder / "config.json").read_text())
    assert (config["vision_name_or_path"], config["text_name_or_path"]) == tuple(map(str, bases))
    assert list(whole.folder.glob("runs/**/events.out.tfevents*")), "--report_to tensorboard wrote no events"


def test_log_shows_what_trains_and_is_clean(whole):
    rows = dict(re.findall(r"^(\w+) +([\d,]+ +[\d,]+)  ", whole.log, re.MULTILINE))
    assert rows["vision_tower"].split()[1] == "0"
    assert int(rows["multi_modal_projector"].split()[1].replace(",", "")) == 16 * 16 + 16 * 16 + 2 * 16
    assert f"step {STEPS}/{STEPS}" in whole.log
    assert "tokens/s" in whole.log
    for noise in ("Warning", "warn(", "kernels-community", "Loading weights", "{'loss'", "Traceback"):
        assert noise not in whole.log, whole.log


def test_training_learns(whole):
    losses = whole.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 1


def test_evaluation_files(whole):
    rows = whole.predictions()
    assert [row["id"] for row in rows] == ["28", "29", "30", "31"]
    assert rows[0]["references"] == ["red wall", "a red wall", "the red wall", "all red", "red paint"]
    for name in ("test", "test-blind"):
        scores = json.loads((whole.folder / "eval" / name / "scores.json").read_text())
        assert {"n", "metrics", "model", "dataset", "split", "decoding", "tokenizer"} <= scores.keys()
        assert {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"} <= scores["metrics"].keys()
        assert scores["n"] == 4
        assert scores["decoding"]["num_beams"] == 3
        assert scores["decoding"]["blind"] == (name == "test-blind")
        assert scores["condition"] == {"test": "after", "test-blind": "blind"}[name]


def test_blind_control_gets_other_pictures(whole):
    seen = [row["prediction"] for row in whole.predictions()]
    blind = [row["prediction"] for row in whole.predictions("test-blind")]
    assert seen != blind
    assert blind == seen[2:] + seen[:2]


def test_unreadable_picture_is_skipped_with_a_count_when_asked(whole):
    assert re.search(rf"Left out 1 of 24 rows \({BAD_ROW}\): .*picture", whole.log), whole.log
    assert "Training on 23 rows with 115 texts." in whole.log


def test_unreadable_picture_stops_the_run_and_names_the_row(runs):
    run = runs["bad row"].result()
    # The launcher makes 1 of every status; the recipe's own is 2.
    assert run.status == 1
    message = run.log[run.log.index("sft.py: ") :]
    assert len(message.splitlines()) == 2
    assert "1 of 24 rows cannot be used" in message
    assert f"({BAD_ROW})" in message
    assert "--on_bad_row skip" in message
    assert "Traceback" not in run.log


def test_run_py_reproduces_the_recipes_predictions_and_scores(runs, whole):
    run = runs["evaluated"].result()
    assert run.status == 0, run.log
    assert read_predictions(run.folder) == whole.predictions()
    scores, recipes = (
        json.loads((f / "scores.json").read_text()) for f in (run.folder, whole.folder / "eval" / "test")
    )
    assert scores["metrics"] == recipes["metrics"]
    assert scores["decoding"] == recipes["decoding"]


def test_stopped_run_leaves_a_checkpoint_and_resumes_with_the_same_losses(runs, whole):
    stopped, resumed = runs["resumed"].result()
    assert "Stopped by signal 15" in stopped.log, stopped.log
    assert "Go on with --resume_from_checkpoint true" in stopped.log
    assert resumed.status == 0, resumed.log
    first = min(int(step) for step in re.findall(r"step (\d+)/", resumed.log))
    assert 4 < first <= STEPS, "it was not stopped in the middle, or began anew"
    assert resumed.losses() == pytest.approx(whole.losses(), rel=1e-6)
    assert resumed.predictions() == whole.predictions()


def test_two_processes_train_and_evaluate_like_one(runs):
    one, two = runs["one process"].result(), runs["two processes"].result()
    assert one.status == 0, one.log
    assert two.status == 0, two.log
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)
    assert [row["id"] for row in two.predictions()] == [row["id"] for row in one.predictions()]
    assert two.predictions() == one.predictions()
    assert two.log.count(f"step {STEPS}/{STEPS}") == 1, "both processes write the log"
