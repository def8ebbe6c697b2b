"""Every YAML file under recipes/ is read by the parser that will read it, where an unknown key is an error."""

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import save_file

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
LAUNCH = [path for path in RECIPES if path.parent.name == "accelerate"]
# Read in test_studies.py and test_tune.py.
STUDIES = [path for path in RECIPES if path.name.startswith("study_") or path.name == "tune_demo.yaml"]
CLIP = [path for path in RECIPES if path.name.startswith("clip_")]
SYNTHESIS = [path for path in RECIPES if path.name.startswith("synthesize_")]
GRPO = [path for path in RECIPES if path.name.startswith("grpo_")]
TRAINING = [path for path in RECIPES if path not in LAUNCH + STUDIES + CLIP + SYNTHESIS + GRPO]


def name(path):
    return str(path.relative_to(ROOT))


def test_both_kinds_are_found():
    assert {"demo.yaml", "flickr30k.yaml"} <= {path.name for path in TRAINING}
    assert {"cpu.yaml", "one_gpu.yaml", "multi_gpu.yaml"} <= {path.name for path in LAUNCH}


@pytest.mark.parametrize("path", CLIP, ids=name)
def test_configuration_of_a_clip_is_understood(path):
    from vlm_peft.contrastive.arguments import parse_arguments

    written = yaml.safe_load(path.read_text())
    own = [] if "dataset_name" in written else ["--dataset_name", "mine"]
    options, training = parse_arguments(["--config", str(path), *own, "--use_cpu", "true"])
    for key in written.keys() - {"use_cpu", "report_to", "dataset_name"}:
        assert getattr(options, key, getattr(training, key, None)) == written[key], key


@pytest.mark.parametrize("path", SYNTHESIS, ids=name)
def test_configuration_of_a_synthesis_is_understood(path):
    from vlm_peft.teacher.options import parse_arguments
    from vlm_peft.teacher.prompts import read_prompt

    written = yaml.safe_load(path.read_text())
    own = [] if "dataset_name" in written else ["--dataset_name", "mine"]
    options = parse_arguments(["--config", str(path), *own])
    for key in written.keys() - {"dataset_name"}:
        assert getattr(options, key) == written[key], key
    prompts = [read_prompt(str(ROOT / each) if "/" in each else each) for each in options.prompts]
    assert len({prompt.task for prompt in prompts}) == 1


@pytest.mark.parametrize("path", [path for path in STUDIES if path.name.startswith("study_")], ids=name)
def test_study_is_understood(path, tmp_path):
    from vlm_peft.studies.cells import prepare
    from vlm_peft.studies.compare import lay_out, read_study

    study = read_study(str(path), str(tmp_path))
    study.base = str(ROOT / study.base)
    prepare([place.cell for place in lay_out(study)], "test")


@pytest.mark.parametrize("path", GRPO, ids=name)
def test_configuration_of_training_for_the_score_is_understood(path, monkeypatch):
    from vlm_peft.training import grpo

    kept = []
    monkeypatch.setattr(grpo, "check_options", lambda *options: kept.extend(options))
    monkeypatch.setattr(grpo, "find_start", lambda *_: None)
    monkeypatch.setattr(grpo, "Run", lambda vision, training, model_args, **others: kept.append(model_args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grpo.main(["--config", str(path), "--use_cpu", "true"])
    options, training, model = kept
    written = yaml.safe_load(path.read_text())
    for key in written.keys() - {"use_cpu", "report_to"}:
        assert getattr(options, key, getattr(training, key, getattr(model, key, None))) == written[key], key


def parse(*arguments: str):
    from vlm_peft.training.arguments import parse_arguments

    # Without a GPU, bf16 is only taken for the CPU.
    return parse_arguments([*map(str, arguments), "--use_cpu", "true"])


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_training_configuration_is_understood(path, tmp_path):
    written = yaml.safe_load(path.read_text())
    # captions.yaml is for a data set of one's own.
    own = [] if {"dataset_name", "mixture"} & written.keys() else ["--dataset_name", "mine"]
    vision, training, model = parse("--config", path, "--output_dir", tmp_path, *own)
    parsed = vars(vision) | vars(model) | {key: getattr(training, key) for key in written if hasattr(training, key)}
    for key in written.keys() - {"output_dir", "use_cpu", "report_to"}:
        assert parsed[key] == written[key], key


@pytest.mark.parametrize("path", LAUNCH, ids=name)
def test_launch_configuration_is_understood(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == (2 if path.name == "multi_gpu.yaml" else 1)
    assert config.use_cpu == (path.name == "cpu.yaml")


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_unknown_key_in_a_file_names_the_nearest(path, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(path.read_text() + "\nlerning_rate: 1.0\n")
    with pytest.raises(SystemExit, match=r"unknown option: 'lerning_rate' \(did you mean 'learning_rate'\?\)"):
        parse("--config", broken)


def test_unknown_key_on_the_command_line_names_the_nearest():
    with pytest.raises(SystemExit, match=r"unknown option: 'visionmodel' \(did you mean 'vision_model'\?\)"):
        parse("--config", ROOT / "recipes/configs/demo.yaml", "--visionmodel", "somewhere")


def test_what_a_file_says_can_be_taken_back():
    config = ROOT / "recipes/configs/flickr30k.yaml"
    vision, _, _ = parse("--config", config, "--stored_split", "none", "--split_column", "null", "--train_split", "a")
    assert (vision.stored_split, vision.split_column, vision.train_split) == (None, None, "a")


def test_missing_model_is_said(tmp_path):
    config = tmp_path / "little.yaml"
    config.write_text("dataset_name: somewhere\nuse_peft: true\n")
    with pytest.raises(SystemExit, match="--vision_model is missing"):
        parse("--config", config, "--output_dir", tmp_path)


def test_wrong_value_is_one_line_without_a_list_of_all_options(capsys):
    with pytest.raises(SystemExit):
        parse("--config", ROOT / "recipes/configs/demo.yaml", "--learning_rate", "fast")
    printed = capsys.readouterr().err
    assert "invalid float value: 'fast'" in printed
    assert len(printed.splitlines()) == 2


def test_paths_are_found_from_anywhere_and_missing_ones_named(tmp_path, monkeypatch):
    from vlm_peft.training import setup
    from vlm_peft.training.setup import local

    monkeypatch.chdir(tmp_path)
    assert local("recipes/configs", "dataset_name") == str(ROOT / "recipes/configs")
    assert local("openai/clip-vit-base-patch32", "vision_model") == "openai/clip-vit-base-patch32"
    with pytest.raises(FileNotFoundError, match=r"--vision_model \./clip is not there"):
        local("./clip", "vision_model")
    # Of an installed package, the folder above holds other packages, whose names may be those of data sets.
    (tmp_path / "site-packages" / "datasets").mkdir(parents=True)
    monkeypatch.setattr(setup, "CLONE", tmp_path / "site-packages")
    assert local("datasets", "dataset_name") == "datasets"


def test_command_line_overrides_the_file(tmp_path):
    _, training, model = parse(
        "--config", ROOT / "recipes/configs/demo.yaml", "--lora_r", "3", "--output_dir", tmp_path
    )
    assert model.lora_r == 3
    assert training.output_dir == str(tmp_path)


def test_resume_names_what_is_missing_and_takes_the_newest_complete_checkpoint(tmp_path):
    from types import SimpleNamespace

    from vlm_peft.training.checkpoints import checkpoint_to_resume

    def ask(value):
        return checkpoint_to_resume(SimpleNamespace(resume_from_checkpoint=value, output_dir=str(tmp_path)))

    assert ask(None) is None
    assert ask("false") is None
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        ask("true")
    for step, complete in ((9, True), (100, True), (200, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, folder / name)
        if complete:
            (folder / "trainer_state.json").write_text('{"global_step": 9}')
    assert ask("true") == str(tmp_path / "checkpoint-100")
    assert ask(str(tmp_path / "checkpoint-9")) == str(tmp_path / "checkpoint-9")
    with pytest.raises(FileNotFoundError, match=r"trainer_state\.json"):
        ask(str(tmp_path / "checkpoint-200"))
