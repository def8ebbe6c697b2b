"""Scores during training: logged under the task's names, usable to choose the best checkpoint and to stop early."""

import json
from types import SimpleNamespace

import pytest

from vlm_peft.data.splits import Question
from vlm_peft.evaluation.task_scores import score_rows
from vlm_peft.training import run as phases
from vlm_peft.training import sft

TRAINING = """\
stored_split: test
split_column: split
eval_splits: [val]
vision_feature_layer: [-1]
use_peft: true
lora_r: 2
use_cpu: true
max_steps: 6
per_device_train_batch_size: 4
learning_rate: 0.05
max_new_tokens: 4
logging_steps: 2
eval_strategy: steps
eval_steps: 2
save_strategy: steps
save_steps: 2
eval_samples: 3
load_best_model_at_end: true
report_to: none
disable_tqdm: true
"""


@pytest.fixture
def train(tmp_path, flickr, bases):
    """Runs the recipe in this process; returns its log history and its output folder."""
    config = tmp_path / "config.yaml"
    config.write_text(TRAINING)

    def run(*overrides: str, mixture: str = ""):
        config.write_text(TRAINING + mixture)
        arguments = ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--dataset_name", str(flickr)]
        arguments += ["--vision_model", str(bases[0]), "--model_name_or_path", str(bases[1]), *overrides]
        assert sft.main(arguments) == 0
        return json.loads((tmp_path / "out" / "log_history.json").read_text()), tmp_path / "out"

    return run


def test_scores_are_logged_and_choose_the_best_checkpoint(train, capsys):
    history, folder = train("--metric_for_best_model", "eval_CIDEr")
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    assert all({"eval_CIDEr", "eval_Bleu_4", "eval_ROUGE_L"} <= set(entry) for entry in evaluations)
    # Of equals, the one with the lower loss, and then the later one.
    best = max(evaluations, key=lambda entry: (entry["eval_CIDEr"], -entry["eval_loss"], entry["step"]))
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_metric"] == best["eval_CIDEr"]
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best['step']}")
    log = capsys.readouterr().out
    assert "CIDEr 0." in log
    assert "says" in log
    assert "expected" in log


def test_a_subset_in_training_scores_as_it_does_in_the_whole_split(model, monkeypatch):
    """Some words are in two pictures of four, and in one of the first two: only the whole split tells their weight."""
    references = [["a red dog runs"], ["a blue cat sits"], ["a red cat sits"], ["a green dog sits"]]
    said = ["a red dog sits", "a blue dog sits", "a red cat runs", "a green cat sits"]
    questions = [Question(str(index), [], [index], texts, {}) for index, texts in enumerate(references)]

    def generate(model, processor, asked, fetch_images, **arguments):
        return [{"id": each.id, "prediction": said[int(each.id)], "references": each.references} for each in asked]

    monkeypatch.setattr(phases, "generate_rows", generate)
    split = SimpleNamespace(
        name="val", data=None, task=SimpleNamespace(name="caption"), fetch_images=None, questions=lambda: questions
    )
    vision = SimpleNamespace(eval_samples=2, generation_batch_size=1, max_new_tokens=1, num_beams=1)
    run = SimpleNamespace(vision=vision, say=lambda text: None)
    in_training = phases.make_scorer(run, None, {"val": split})(model)["CIDEr"]
    whole = score_rows("caption", generate(None, None, questions, None)).per_row["CIDEr"]
    alone = score_rows("caption", generate(None, None, questions[:2], None)).metrics["CIDEr"]
    assert in_training == pytest.approx(sum(whole[:2]) / 2, abs=1e-12)
    assert abs(alone - in_training) > 0.01


def test_training_stops_when_the_score_no_longer_rises(train):
    # CIDEr is never below 0: an "improvement" by more than 20 never comes.
    history, _ = train(
        "--metric_for_best_model", "eval_CIDEr", "--early_stopping_patience", "1", "--learning_rate", "0"
    )
    assert max(entry["step"] for entry in history) == 4


def test_early_stopping_without_what_it_needs_is_said(train):
    with pytest.raises(SystemExit, match="--early_stopping_patience needs --load_best_model_at_end true"):
        train("--early_stopping_patience", "1", "--load_best_model_at_end", "false")


def test_each_data_set_of_a_mixture_is_scored_in_training_and_after_it(train):
    mixture = "mixture:\n  - {weight: 2}\n  - {instruction: 'What is this?', weight: 1, eval_splits: [test]}\n"
    history, folder = train("--max_steps", "2", "--metric_for_best_model", "eval_loss", mixture=mixture)
    entry = next(entry for entry in history if "eval_CIDEr" in entry)
    assert "eval_caption-test_CIDEr" in entry
    for name in ("caption-val", "caption-test"):
        scores = json.loads((folder / "eval" / name / "scores.json").read_text())
        assert scores["n"] == 4
        assert scores["task"] == "caption"


def test_a_stream_trains_and_is_evaluated(train):
    history, folder = train("--streaming", "true", "--max_steps", "4", "--metric_for_best_model", "eval_CIDEr")
    assert [entry["step"] for entry in history if "eval_CIDEr" in entry] == [2, 4]
    assert (folder / "adapter_model.safetensors").is_file()


def test_a_stream_needs_max_steps(train):
    with pytest.raises(SystemExit, match="the length of a stream is not known, so --max_steps is needed"):
        train("--streaming", "true", "--max_steps", "-1")


def test_training_on_held_out_pictures_is_refused_with_the_count(train):
    said = "4 pictures of the training split 'val' are also in 'val' by content"
    with pytest.raises(ValueError, match=said):
        train("--train_split", "val")
    history, _ = train("--train_split", "val", "--allow_overlap", "true", "--max_steps", "2")
    assert history


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ("mixture:\n  - {tsk: vqa}\n", r"Entry 1 of the mixture: unknown option 'tsk' \(did you mean 'task'\?\)"),
        ("mixture:\n  - vqa\n", "Entry 1 of the mixture: expected options such as dataset_name, got 'vqa'"),
        ("mixture: []\n", "The mixture is empty"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(train, mixture, said):
    with pytest.raises(SystemExit, match=said):
        train(mixture=mixture)


def test_a_blind_split_must_be_scored(train):
    with pytest.raises(ValueError, match="blind_splits: test must be among eval_splits"):
        train("--blind_splits", "test")
