"""Training for the score as a user runs it: from an adapter on, on tiny bases, stopped, resumed, on two processes."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from vlm_peft import VisionQwen
from vlm_peft.training import grpo

TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def options(bases, flickr, adapter):
    """The command line of a run of four steps of two questions, three samples each, which keeps step 2."""
    vision, text = bases

    def build(folder, *overrides):
        return [
            *("--config", str(ROOT / "recipes/configs/grpo_flickr30k.yaml"), "--start_from", str(adapter)),
            *("--dataset_name", str(flickr), "--vision_model", str(vision), "--model_name_or_path", str(text)),
            *(
                "--lora_r",
                "4",
                "--lora_alpha",
                "8",
                "--output_dir",
                str(folder),
                "--use_cpu",
                "true",
                "--bf16",
                "false",
            ),
            *("--per_device_train_batch_size", "6", "--num_generations", "3", "--max_completion_length", "6"),
            *(
                "--gradient_accumulation_steps",
                "1",
                "--max_new_tokens",
                "6",
                "--max_steps",
                "4",
                "--logging_steps",
                "1",
            ),
            *("--learning_rate", "1e-2", "--projector_learning_rate", "1e-2", "--warmup_steps", "0"),
            *(
                "--save_strategy",
                "steps",
                "--save_steps",
                "2",
                "--eval_strategy",
                "no",
                "--load_best_model_at_end",
                "false",
            ),
            *("--report_to", "none", "--disable_tqdm", "true", "--dataloader_pin_memory", "false", *overrides),
        ]

    return build


@pytest.fixture(scope="module")
def paid(tmp_path_factory):
    """Folder of a module with a reward: untrained models never end, and earn nothing by the rewards that count it."""
    folder = tmp_path_factory.mktemp("paid")
    (folder / "paid_letters.py").write_text(
        "def letters(completions, references, row, **columns):\n"
        "    assert len(completions) == len(references) == len(row)\n"
        "    return [sum(map(str.isalpha, text)) / 10 for text in completions]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def whole(options, paid, tmp_path_factory):
    """A whole run from the adapter on."""
    folder = tmp_path_factory.mktemp("grpo")
    arguments = ["--rewards", "task", "paid_letters:letters", "--reward_weights", "1", "0.5", "--beta", "0.01"]
    assert grpo.main(options(folder, *arguments)) == 0
    return folder


def history(folder):
    return json.loads((folder / "log_history.json").read_text())


def test_the_folder_is_an_adapter_with_scores_before_and_after_blind_control_card_and_report(whole, adapter):
    assert VisionQwen.from_adapter(whole) is not None
    start, end = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, whole))
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[name], end[name]) for name in start)
    for name in ("test", "test-before", "test-blind"):
        scores = json.loads((whole / "eval" / name / "scores.json").read_text())
        assert len(scores["intervals"]["CIDEr"]) == 2
    (changed,) = json.loads((whole / "transfer.json").read_text())
    assert {"before", "after", "p_value"} <= changed.keys() or "CIDEr" in json.dumps(changed)
    assert (whole / "README.md").is_file()
    page = (whole / "report.html").read_text()
    assert "Reward by step" in page
    assert "before training: " in page
    assert not list(whole.rglob("ref"))


def test_rewards_are_mixed_by_their_weights_and_logged(whole):
    entries = [entry for entry in history(whole) if "reward" in entry]
    assert len(entries) == 4
    for entry in entries:
        mixed = entry["rewards/task/mean"] + 0.5 * entry["rewards/letters/mean"]
        assert entry["reward"] == pytest.approx(mixed, abs=2e-4)
    assert any(entry["rewards/letters/mean"] > 0 for entry in entries)
    assert abs(entries[0]["kl"]) < 1e-6 < max(abs(entry["kl"]) for entry in entries[1:])


def test_the_start_is_scored_before(whole, adapter, options, tmp_path):
    """Not the bases with a fresh projector."""
    texts = [
        [json.loads(line)["prediction"] for line in (whole / "eval" / name / "predictions.jsonl").open()]
        for name in ("test-before", "test")
    ]
    assert (
        grpo.main(options(tmp_path, "--max_steps", "1", "--learning_rate", "0", "--projector_learning_rate", "0")) == 0
    )
    unmoved = [json.loads(line)["prediction"] for line in (tmp_path / "eval" / "test" / "predictions.jsonl").open()]
    assert unmoved == texts[0]


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(options, paid, tmp_path):
    plain = ["--rewards", "paid_letters:letters", "--supervised_coef", "0.1"]
    for name in ("whole", "stopped"):
        assert grpo.main(options(tmp_path / name, *plain)) == 0
    for path in (tmp_path / "stopped").iterdir():
        if path.name != "checkpoint-2":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert grpo.main(options(tmp_path / "stopped", *plain, "--resume_from_checkpoint", "true")) == 0
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"is of another run \(num_generations: 3 there, 2 here\)"):
        grpo.main(options(tmp_path / "stopped", *plain, "--num_generations", "2", "--resume_from_checkpoint", "true"))


def test_two_processes_share_the_questions(options, paid, tmp_path):
    asked = ["--rewards", "paid_letters:letters", "--max_steps", "2"]
    script = [str(ROOT / "recipes" / "grpo.py"), *options(tmp_path / "two", *asked)]
    done = subprocess.run(
        [*TWO_PROCESSES, *script],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{paid}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 with 3 samples each in a step" in done.stdout
    entries = [entry for entry in history(tmp_path / "two") if "reward" in entry]
    assert len(entries) == 2
    rows = [json.loads(line) for line in (tmp_path / "two" / "eval" / "test" / "predictions.jsonl").open()]
    assert len({row["id"] for row in rows}) == len(rows) == 4


def test_evaluations_are_greedy_texts_and_may_choose_the_best(options, tmp_path):
    asked = [
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--eval_samples",
        "2",
        "--per_device_eval_batch_size",
        "6",
    ]
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "CIDEr"]
    assert grpo.main(options(tmp_path, *asked, *best)) == 0
    entries = [entry for entry in history(tmp_path) if "eval_CIDEr" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all("eval_reward" in entry for entry in entries)


@pytest.mark.parametrize(
    ("given", "said"),
    {
        "no weight for each": (["--reward_weights", "1", "2"], "reward_weights: 2 weights of 1 rewards."),
        "no clip": (["--rewards", "clip_score"], "The reward clip_score needs --clip_model"),
        "no pattern": (["--rewards", "format"], "The reward format needs --format_pattern"),
        "unknown reward": (["--rewards", "cider"], "rewards: expected task"),
        "no start": (["--start_from", "./nowhere"], "--start_from ./nowhere is not there"),
        "too many questions": (["--per_device_train_batch_size", "300"], "The run has no step: 24 questions"),
        "top_p": (["--top_p", "0.5"], "top_p is 0.5: samples are drawn with the model's own probabilities"),
    }.values(),
)
def test_what_cannot_be_done_is_said(given, said, options, tmp_path):
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        grpo.main(options(tmp_path, *given))


def test_stages_are_of_another_recipe(tmp_path):
    path = tmp_path / "staged.yaml"
    path.write_text("stages: [{name: one}]\n")
    with pytest.raises(SystemExit, match="stages are of supervised fine-tuning"):
        grpo.main(["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true"])
