"""Training on from an earlier adapter: a run for another task begins with exactly what it holds, or is refused."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import flickr_rows, save_bases
from datasets import Dataset, Image
from safetensors.torch import load_file, save_file
from tiny_runs import RECIPE, logits
from transformers import TrainerCallback

from vlm_peft import VisionQwen
from vlm_peft.adapters.folder import holds_encoder
from vlm_peft.training import sft
from vlm_peft.training.arguments import parse_arguments
from vlm_peft.training.setup import find_start
from vlm_peft.training.stages import check_bases, parse_stages

OPTIONS = RECIPE.replace("vision_feature_layer: [-1]\n", "") + "lora_alpha: 8\ntask: vqa\nscore_before: true\n"
STILL = ("--learning_rate", "0", "--max_steps", "1", "--save_strategy", "no")


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Pictures with a question each."""
    rows = flickr_rows()
    asked = [[{"question": "Which colour?", "answer": captions[0].split()[0]}] for captions in rows["caption"]]
    kept = {name: rows[name] for name in ("image", "split")} | {"questions": asked}
    folder = tmp_path_factory.mktemp("questions")
    Dataset.from_dict(kept).cast_column("image", Image()).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def given(bases, questions, adapter, tmp_path):
    """The command line of questions from the captioning adapter on."""

    def given(*more: str, folder: str = "run", options: str = "") -> list[str]:
        (tmp_path / "config.yaml").write_text(OPTIONS + options)
        named = ["--dataset_name", questions, "--vision_model", bases[0], "--model_name_or_path", bases[1]]
        named += ["--start_from", adapter, "--output_dir", tmp_path / folder]
        return ["--config", str(tmp_path / "config.yaml"), *map(str, named), *more]

    return given


def find(arguments: list[str]) -> Path | None:
    return find_start(*parse_arguments(arguments))


def test_a_start_of_the_file_is_left_out_by_none(given, adapter):
    assert find(given()) == adapter
    assert find(given("--start_from", "none", "--strategy", "scratch")) is None


class AtStart(TrainerCallback):
    """What the model says and holds before its first step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.logits = logits(model)
        self.trainable = {name for name, value in model.named_parameters() if value.requires_grad}
        model.train()


def said(folder: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in (folder / "predictions.jsonl").open()]


def test_questions_start_with_the_captioning_adapter(given, adapter, tmp_path):
    seen, run = AtStart(), tmp_path / "run"
    assert sft.main(given(*STILL), callbacks=[seen]) == 0
    assert torch.equal(seen.logits, logits(VisionQwen.from_adapter(adapter)))
    assert any("projector" in name for name in seen.trainable)
    assert any("lora_B" in name for name in seen.trainable)
    start, end = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, run))
    assert start.keys() == end.keys()
    assert all(torch.equal(start[name], end[name]) for name in start)
    # Scored before is the start, not the bases: nothing has moved.
    assert said(run / "eval" / "test-before") == said(run / "eval" / "test")
    assert json.loads((run / "run_summary.json").read_text())["start_from"] == str(adapter)
    assert "starts from" in (run / "report.html").read_text()


class StopAt(TrainerCallback):
    """A signal to the run itself after its second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_was_stopped_goes_on_from_the_same_start_alone(given, adapter, tmp_path):
    steps = ("--max_steps", "3", "--score_before", "false")
    assert sft.main(given(*steps), callbacks=[StopAt()]) == 128 + signal.SIGTERM
    resumed = (*steps, "--resume_from_checkpoint", "true")
    other = shutil.copytree(adapter, tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, other / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"is of another run \(the start's weights: "):
        sft.main(given(*resumed, "--start_from", str(other)))
    # Wherever it lies.
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert sft.main(given(*resumed, "--start_from", str(copy))) == 0
    assert sft.main(given(*steps, folder="whole")) == 0
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize(
    ("more", "message"),
    {
        "not there": (("--start_from", "./nowhere"), "--start_from ./nowhere is not there"),
        "layer": (("--vision_feature_layer", "-1"), "has --vision_feature_layer -2, expected -1 as here"),
        "shuffle": (("--pixel_shuffle_factor", "2"), "has --pixel_shuffle_factor 1, expected 2 as here"),
        "kind": (("--projector_type", "linear"), "has --projector_type mlp, expected linear as here"),
        "class token": (("--keep_class_token", "true"), "has --keep_class_token False, expected True as here"),
        "size": (("--image_size", "12"), "has --image_size None, expected 12 as here"),
        "lora": (("--lora_r", "8"), "LoRA that goes on must be as it was: r is 4 in"),
        "pissa": (("--init_lora_weights", "pissa"), "PiSSA takes its start out of the bases"),
        "scratch": (("--strategy", "scratch"), "--strategy scratch draws the decoder anew"),
    }.values(),
)
def test_a_start_that_does_not_fit_is_refused_before_weights_are_loaded(given, more, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as caught:
        find(given(*more))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_or_the_output_is_refused(given, adapter, questions):
    with pytest.raises(ValueError, match="holds no trained model"):
        find(given("--start_from", str(questions)))
    with pytest.raises(ValueError, match="is --output_dir, too, and would be written over"):
        find(given("--output_dir", str(adapter)))


def test_other_bases_are_refused(given, adapter, bases, wide_bases, tmp_path):
    """By their shapes at once, by their weights when they are loaded; also where a whole decoder goes on."""
    with pytest.raises(ValueError, match=r"--start_from .* was trained on another text base: .*hidden_size: 16 .* 64"):
        find(given("--model_name_or_path", str(wide_bases[1])))
    _, other = save_bases(tmp_path / "again")
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    asked = ("--model_name_or_path", str(other), *STILL)
    for more, name in (((), "--start_from"), (("--strategy", "full"), "The adapter")):
        with pytest.raises(ValueError, match=rf"{name} .* another text base: expected .* with other weights"):
            sft.main(given(*asked, *more))


def test_a_start_that_has_changed_the_encoder_keeps_no_features_of_the_base(given, adapter, tmp_path, capsys):
    assert not holds_encoder(adapter)
    assert sft.main(given(*STILL, "--lora_vision", "true", "--score_before", "false", folder="seen")) == 0
    arguments = given("--start_from", str(tmp_path / "seen"))
    parsed = parse_arguments(arguments)
    find_start(*parsed)
    assert not parsed[0].feature_cache
    assert "has changed the encoder: pictures are encoded in every step." in capsys.readouterr().out
    arguments = given("--start_from", str(tmp_path / "seen"), options="stages: [{name: a}, {name: b}]\n")
    stages = parse_stages(arguments, parse_arguments(arguments)[0].stages)
    assert check_bases(stages) == tmp_path / "seen"
    assert [stage.vision.feature_cache for stage in stages] == [False, False]


def test_the_first_stage_starts_there_and_a_whole_model_needs_a_whole_decoder(given, adapter, tmp_path):
    entries = "stages: [{name: a, learning_rate: 0, projector_learning_rate: 1.0e-9}, {name: b, strategy: full}]\n"
    assert sft.main(given("--max_steps", "1", "--save_strategy", "no", options=entries)) == 0
    run = tmp_path / "run"
    assert said(run / "stage-a" / "eval" / "test-before") == said(run / "stage-a" / "eval" / "test")
    lora = [load_file(folder / "adapter_model.safetensors") for folder in (adapter, run / "stage-a")]
    assert all(torch.equal(lora[0][name], lora[1][name]) for name in lora[0] if ".lora_" in name)
    whole = ("--start_from", str(run / "stage-b"))
    assert find(given(*whole, "--strategy", "full")) == run / "stage-b"
    with pytest.raises(ValueError, match="is a whole model, on which no adapter can be put: give --strategy full"):
        find(given(*whole))
    with pytest.raises(SystemExit, match=r"\(a\): start_from is the same in all stages: give it at the top level"):
        sft.main(given(options="stages: [{name: a, start_from: other}]\n"))
