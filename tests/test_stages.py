"""Stages: what one training hands to the next, runs of several as a user starts them, and what is refused."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from tiny_runs import RECIPE, load_bases, logits, make_trainer
from transformers import TrainerCallback

from vlm_peft import VisionQwen
from vlm_peft.adapters.loading import load_model
from vlm_peft.adapters.strategies import apply_strategy, carry_on, choose_strategy
from vlm_peft.commands import doctor
from vlm_peft.training import sft
from vlm_peft.training.arguments import parse_arguments
from vlm_peft.training.stages import check_bases, parse_stages

KINDS = {
    "projector": choose_strategy("projector"),
    "lora": choose_strategy("lora"),
    "attention_lora": choose_strategy("attention_lora"),
    "top_layers": choose_strategy("top_layers", top_layers=1),
    "vision_layers": choose_strategy("vision_layers", vision_layers=1),
}


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory) -> dict[str, Path]:
    """Adapters of three steps, by the name of their strategy."""
    found = {}
    for name, strategy in KINDS.items():
        folder, model = tmp_path_factory.mktemp(name), load_bases(bases)
        images = "pixel_values" if strategy.encoder_trains else "image_features"
        config = apply_strategy(model, strategy, r=4)
        trainer = make_trainer(folder, model, None, images=images, peft_config=config, max_steps=3, save_strategy="no")
        trainer.train()
        trainer.save_model()
        found[name] = folder
    return found


def handed_over(bases, folder: Path, name: str, **lora):
    model = load_bases(bases)
    return carry_on(model, apply_strategy(model, KINDS[name], **{"r": 4, **lora}), folder)


@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_the_next_adapter_starts_where_the_last_one_ended(bases, trained, before, after):
    """Exactly, unless LoRA is merged into layers that now train whole."""
    start, earlier = handed_over(bases, trained[before], after), logits(VisionQwen.from_adapter(trained[before]))
    is_merged = "lora" in before and after == "top_layers"
    assert (logits(start) - earlier).abs().max() <= (1e-5 if is_merged else 0) * earlier.abs().max()


@pytest.mark.parametrize(
    ("before", "after"),
    [("lora", "projector"), ("lora", "attention_lora"), ("top_layers", "lora"), ("lora", "top_layers")],
)
def test_what_only_an_earlier_stage_trained_stays_bit_for_bit_and_is_saved(bases, trained, before, after, tmp_path):
    trainer = make_trainer(tmp_path, handed_over(bases, trained[before], after), None, max_steps=4)
    trainer.train()
    trainer.save_model()
    assert torch.equal(logits(VisionQwen.from_adapter(tmp_path)), logits(trainer.model))
    start, end = (load_file(folder / "adapter_model.safetensors") for folder in (trained[before], tmp_path))
    kept = {name for name in start.keys() & end.keys() if torch.equal(start[name], end[name])}

    def is_frozen(name: str) -> bool:
        if ".lora_" in name:
            return after in ("projector", "top_layers") or (after == "attention_lora" and ".self_attn." not in name)
        return ".layers.1." in name and after != "top_layers"

    assert kept == {name for name in start.keys() & end.keys() if is_frozen(name)}
    assert kept
    # A checkpoint thaws nothing either.
    resumed = make_trainer(tmp_path, handed_over(bases, trained[before], after), None, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    now = dict(trainer.model.named_parameters())
    assert not [name for name, value in resumed.model.named_parameters() if not torch.equal(value, now[name])]


def test_lora_of_another_size_does_not_go_on(bases, trained):
    with pytest.raises(ValueError, match=r"LoRA that goes on must be as it was: r is 4 in .*, and 8 here"):
        handed_over(bases, trained["lora"], "lora", r=8)


def test_ready_configurations_fit_together(tmp_path, monkeypatch):
    """Stages of all files that have some."""
    monkeypatch.chdir(ROOT)
    written = {path: yaml.safe_load(path.read_text()) for path in (ROOT / "recipes/configs").glob("*.yaml")}
    staged = {path: config["stages"] for path, config in written.items() if "stages" in config}
    assert "demo_probe_then_finetune.yaml" in {path.name for path in staged}
    for path, entries in staged.items():
        arguments = ["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true"]
        check_bases(parse_stages(arguments, entries))


# --- runs ---


OPTIONS = f"{RECIPE}score_before: true\n"
STAGES = """
stages:
  - name: align
    strategy: projector
    max_steps: 1
    train_limit: 8
  - name: task
    max_steps: 4
  - name: all
    strategy: full
    max_steps: 1
    learning_rate: 1.0e-3
"""


@pytest.fixture
def given(bases, flickr, tmp_path):
    """The command line of a file with these stages."""

    def given(stages: str = STAGES, *more: str) -> list[str]:
        (tmp_path / "config.yaml").write_text(OPTIONS + stages)
        named = ["--dataset_name", str(flickr), "--vision_model", str(bases[0]), "--model_name_or_path", str(bases[1])]
        return ["--config", str(tmp_path / "config.yaml"), *named, "--output_dir", str(tmp_path / "run"), *more]

    return given


class StopAt(TrainerCallback):
    """A signal to the run itself after a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.max_steps == 4 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_stages_hand_over_stop_and_go_on(given, tmp_path, capsys, monkeypatch):
    run, build = tmp_path / "run", sft.build_trainer

    def stopped(*arguments, callbacks=(), **options):
        return build(*arguments, callbacks=[*callbacks, StopAt()], **options)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "build_trainer", stopped)
        assert sft.main(given()) == 128 + signal.SIGTERM
    assert (run / "stage-align" / "run_summary.json").is_file()
    with pytest.raises(FileExistsError, match="holds stage-align of an earlier run: go on with"):
        sft.main(given())
    capsys.readouterr()
    assert sft.main(given(STAGES, "--resume_from_checkpoint", "true")) == 0
    said = capsys.readouterr().out
    assert "Stage 1 of 3, align: projector; finished before." in said
    assert "Stage 2 of 3, task: LoRA and projector\n" in said
    assert "Trained to step 4" in said
    records = json.loads((run / "stages.json").read_text())
    assert [(each["stage"], each["steps"]) for each in records] == [("align", 1), ("task", 4), ("all", 1)]
    assert "stage-task/report.html" in (run / "report.html").read_text()
    transfer = json.loads((run / "transfer.json").read_text())
    assert [each["name"] for each in transfer] == ["test"]
    assert "Gained and lost" in said
    assert "Gained and lost" in (run / "report.html").read_text()
    # Only the first stage has scores from before: the others begin with the scores of the one before them.
    before = [path.parents[1].name for path in sorted(run.glob("stage-*/eval/test-before"))]
    assert before == ["stage-align"]
    for stage in ("align", "task", "all"):
        load_model(run / f"stage-{stage}")

    # The same as one that nobody stopped.
    whole = tmp_path / "whole"
    arguments = given()
    arguments[arguments.index("--output_dir") + 1] = str(whole)
    assert sft.main(arguments) == 0
    for name in ("stage-task/adapter_model.safetensors", "stage-all/model.safetensors"):
        first, second = load_file(run / name), load_file(whole / name)
        assert all(torch.equal(first[key], second[key]) for key in second), name

    with pytest.raises(ValueError, match=r"stage-align is of another run \(train_limit: 8 there, 7 here\)"):
        sft.main(given(STAGES.replace("train_limit: 8", "train_limit: 7"), "--resume_from_checkpoint", "true"))


def test_what_is_watched_is_scored_with_what_a_stage_starts_from(given, flickr, tmp_path):
    watch = f"[{{dataset_name: {flickr}, eval_splits: [test], stored_split: test, split_column: split}}]"
    stages = "stages:\n  - {name: align, max_steps: 2}\n  - {name: task, strategy: attention_lora, max_steps: 1}\n"
    assert sft.main(given(f"watch: {watch}\n{stages}")) == 0
    align, task = (tmp_path / "run" / f"stage-{name}" / "eval" for name in ("align", "task"))

    def said(folder: Path) -> list[str]:
        return [json.loads(line)["prediction"] for line in (folder / "predictions.jsonl").open()]

    decoding = json.loads((task / "watch-caption-test" / "scores.json").read_text())["decoding"]
    # The trained task's answers have 4 tokens; those of another one may be longer.
    assert decoding["max_new_tokens"] == 48
    assert said(task / "watch-caption-test-before") == said(align / "watch-caption-test")
    assert said(align / "watch-caption-test-before") != said(align / "watch-caption-test")
    rows = json.loads((tmp_path / "run" / "transfer.json").read_text())
    assert [each["name"] for each in rows] == ["test", "watch-caption-test"]
    texts = [json.loads((each.parent / "transfer.json").read_text())[-1] for each in (align, task)]
    assert texts[0]["name"] == "text"
    assert texts[1]["before"] == pytest.approx(texts[0]["after"], rel=1e-5)


def test_an_entry_overrides_the_command_line_and_the_rest_comes_from_above(given):
    arguments = given(STAGES, "--learning_rate", "0.5", "--max_steps", "7")
    align, task, everything = parse_stages(arguments, parse_arguments(arguments)[0].stages)
    assert [each.training.max_steps for each in (align, task, everything)] == [1, 4, 1]
    assert [each.training.learning_rate for each in (align, task, everything)] == [0.5, 0.5, 1e-3]
    assert [each.vision.strategy for each in (align, task, everything)] == ["projector", "lora", "full"]
    assert task.folder.name == "stage-task"
    assert (align.vision.feature_cache, task.vision.feature_cache) == (True, True)


def test_features_of_the_bases_are_not_used_after_the_encoder_has_trained(given):
    arguments = given("stages: [{name: a, vision_layers: 1, max_steps: 1}, {name: b, max_steps: 1}]")
    first, second = parse_stages(arguments, parse_arguments(arguments)[0].stages)
    assert not second.vision.feature_cache
    assert first.vision.vision_layers == 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[]", "stages is empty"),
        ("[{max_steps: 2}]", r"stage 1: expected a name of up to 100 letters, digits, dots and dashes, got None"),
        ("[null]", "stage 1: expected a mapping with a name and options, got None"),
        ("[a, b]", "stage 1: expected a mapping with a name and options, got 'a'"),
        (f"[{{name: {'a' * 300}}}]", "expected a name of up to 100 letters.* of 300"),
        ("[{name: a}, {name: a}]", r"stage 2 \(a\): an earlier stage has this name"),
        (
            "[{name: a, lerning_rate: 1}]",
            r"stage 1 \(a\): unknown option: 'lerning_rate' \(did you mean 'learning_rate'",
        ),
        ("[{name: a, max_steps: 0}]", r"stage 1 \(a\): max_steps is 0"),
        ("[{name: a, vision_model: other}]", "vision_model is the same in all stages: give it at the top level"),
        (
            "[{name: a}, {name: b, strategy: projector, projector_learning_rate: 0}]",
            r"\(b\): it trains nothing: .*projector",
        ),
        ("[{name: a, learning_rate: 0}]", r"\(a\): it trains nothing: .* projector, decoder are 0"),
        ("[{name: a, strategy: full}, {name: b}]", r"\(b\): a saves a whole model, on which no adapter can be put"),
        ("[{name: a}, {name: b, strategy: scratch}]", r"\(b\): --strategy scratch draws the decoder anew"),
        (
            "[{name: a}, {name: b, strategy: full, load_in_4bit: true}]",
            r"\(b\): --strategy full trains the decoder's own",
        ),
        ("[{name: a, init_lora_weights: pissa}]", r"\(a\): PiSSA takes its start out of the bases"),
        (
            "[{name: a}, {name: b, strategy: top_layers, top_layers: 9}]",
            r"Stage b: --top_layers 9, and qwen3 has 2 layers",
        ),
    ],
)
def test_stages_are_refused_before_any_begins(given, tmp_path, monkeypatch, stages, message):
    monkeypatch.setattr(sft, "Run", lambda *_, **__: pytest.fail("A stage began."))
    with pytest.raises((SystemExit, ValueError), match=message):
        sft.main(given(f"stages: {stages}"))
    assert not (tmp_path / "run").exists()


def test_the_doctor_examines_each_stage(given, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "TRIAL_STEPS", 1)
    monkeypatch.setattr(doctor, "WARM_UP", 1)
    stages = "stages: [{name: a, strategy: projector, max_steps: 3}, {name: b, strategy: full, max_steps: 2}]"
    assert doctor.main(given(stages)) == 0
    first, second = capsys.readouterr().out.split("\nStage b\n")
    assert "steps    3 (--max_steps)" in first
    assert "steps    2 (--max_steps)" in second
    assert ("adapter file:" in first, "model file:" in second) == (True, True)
    assert doctor.main(given("stages: [{name: a, strategy: top_layers, top_layers: 9}]")) == 2
    assert "Stage a: --top_layers 9, and qwen3 has 2 layers" in capsys.readouterr().err
