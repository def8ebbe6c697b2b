"""What users do to runs and their folders: each ends well, or in one line that names what is wrong."""

import io
import json
import logging
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import flickr_rows, save_flickr
from safetensors.torch import load_file, save_file

from vlm_peft.adapters.loading import load_model
from vlm_peft.training import run as phases
from vlm_peft.training import sft
from vlm_peft.training.checkpoints import checkpoint_to_resume

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def copied(adapter, tmp_path) -> Path:
    """A copy of an adapter folder to damage."""
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def change_tensors(folder: Path, change) -> None:
    """Rewrites the adapter's weights: `change(name, value)` is a new value, or None to leave the tensor out."""
    state = {name: change(name, value) for name, value in load_file(folder / WEIGHTS).items()}
    save_file({name: value.contiguous() for name, value in state.items() if value is not None}, folder / WEIGHTS)


def change_json(folder: Path, name: str, **fields) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


def refusal(folder: Path) -> str:
    """The one line that loading ends in."""
    with pytest.raises((ValueError, OSError)) as caught:
        load_model(folder)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert len(said) < 1000
    return said


# --- damaged, swapped and hostile adapters ---


def drop(part: str):
    return lambda name, value: None if part in name else value


def poison(part: str, with_value: float):
    def change(name, value):
        if part in name:
            value.view(-1)[-1] = with_value
        return value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (drop(".lora_"), "tensors are missing"),
        (drop(".layers.1.self_attn.q_proj.lora_A"), "1 tensors are missing"),
        (drop("linear_2"), r"\(KeyError: .*multi_modal_projector.linear_2.weight'\)"),
        (drop("linear_1.bias"), "linear_1.bias"),
        (poison("lora_B", math.nan), "are NaN or infinite, and"),
        (poison("linear_2.weight", -math.inf), r"1 of 256 weights of .*linear_2.weight are NaN or infinite"),
        (lambda name, value: value[:-1] if "linear_1.weight" in name else value, r"\(15, 16\), expected \(16, 16\)"),
        (lambda name, value: value.T if "down_proj.lora_A" in name else value, r"\(32, 4\), expected \(4, 32\)"),
        (lambda name, value: value.int() if "v_proj.lora_B" in name else value, r"floating point, got .*torch\.int32"),
    ],
)
def test_an_adapter_with_other_tensors_than_it_should_have_is_refused(copied, change, expected):
    change_tensors(copied, change)
    said = refusal(copied)
    assert WEIGHTS in said
    assert re.search(expected, said), said


def test_a_tensor_of_no_layer_is_named(copied):
    state = load_file(copied / WEIGHTS)
    save_file(
        state | {"base_model.model.model.language_model.layers.7.mlp.lora_A.weight": torch.ones(1)}, copied / WEIGHTS
    )
    assert "1 tensors belong to no layer that adapter_config.json names" in refusal(copied)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"r": 8}, "has the shape (4, "),
        ({"r": 0}, "adapter_config.json"),
        ({"r": "four"}, "adapter_config.json"),
        ({"r": None}, "adapter_config.json"),
        ({"peft_type": "BANANA"}, "peft_type is 'BANANA', expected 'LORA'"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING', expected 'LORA'"),
        ({"peft_type": None}, "peft_type is None, expected 'LORA'"),
        ({"target_modules": ["nothing"]}, "adapter_config.json"),
        ({"target_modules": "("}, "adapter_config.json"),
        ({"task_type": "SEQ_2_SEQ_BANANA"}, "adapter_config.json"),
        ({"modules_to_save": 5}, "adapter_config.json"),
        ({"lora_alpha": "much"}, "adapter_config.json"),
    ],
)
def test_a_configuration_of_lora_that_cannot_be_is_refused(copied, fields, expected):
    change_json(copied, "adapter_config.json", **fields)
    assert expected in refusal(copied)


@pytest.mark.parametrize(
    "fields",
    [
        {"projector_type": "banana"},
        {"pixel_shuffle_factor": 0},
        {"vision_feature_layer": "last"},
        {"text_config": []},
        {"vision_config": {"model_type": "banana"}},
        {"vision_layout": {"grid": "none"}},
    ],
)
def test_a_composite_configuration_that_cannot_be_is_refused(copied, fields):
    change_json(copied, "config.json", **fields)
    assert str(copied) in refusal(copied)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "config.json", "processor_config.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize(
    "text", ["[]", "null", '"text"', "[" * 100_000, "{", "\ud800".encode("utf-8", "surrogatepass")]
)
def test_a_json_file_of_another_kind_is_named(copied, name, text):
    (copied / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert name.partition("_")[0] in refusal(copied)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% for",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages + 1 }}",
        "{{ range(10 ** 9) | list }}",
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
        "no picture here",
        "<|image_pad|><|image_pad|>",
        "{{ 'x' * 10000000 }}",
    ],
)
def test_a_hostile_chat_template_is_refused_when_the_model_is_loaded(copied, template):
    (copied / "chat_template.jinja").write_text(template)
    assert "chat_template.jinja" in refusal(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda processor: processor["image_processor"]["size"].update(width={}),
        lambda processor: processor["image_processor"]["image_mean"].__setitem__(0, "grey"),
        lambda processor: processor.update(end_of_turn_token=7),
    ],
)
def test_a_processor_that_no_picture_and_no_answer_can_use_is_refused_when_it_is_loaded(copied, change):
    processor = json.loads((copied / "processor_config.json").read_text())
    change(processor)
    (copied / "processor_config.json").write_text(json.dumps(processor))
    assert "processor_config.json" in refusal(copied)


def test_a_processor_of_another_model_is_refused(copied):
    change_json(copied, "processor_config.json", num_image_tokens=7)
    assert "num_image_tokens is 7, expected 16" in refusal(copied)


@pytest.mark.parametrize("text", ["", "{}", "[]", "{"])
def test_a_damaged_tokenizer_is_named(copied, text):
    (copied / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in refusal(copied)


def test_weights_that_are_no_numbers_are_not_saved(bases, tmp_path):
    from tiny_runs import load_bases, make_trainer

    trainer = make_trainer(tmp_path / "run", load_bases(bases), {})
    trainer.save_model()
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    name, parameter = next((name, value) for name, value in trainer.model.named_parameters() if "lora_B" in name)
    parameter.data.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=f"Nothing is saved at step 0: 1 of .* weights of {re.escape(name)} are NaN"):
        trainer.save_model()
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before


def test_part_of_a_full_save_is_refused(adapter, tmp_path):
    from vlm_peft.adapters.export import export_merged

    whole = export_merged(adapter, tmp_path / "merged")
    (path,) = whole.glob("*.safetensors")
    state = load_file(path)
    save_file({name: value for name, value in state.items() if "linear_2" not in name}, path, {"format": "pt"})
    assert "2 weights are missing, " in refusal(whole)
    poisoned = {name: value.clone() for name, value in state.items()}
    next(value for name, value in poisoned.items() if "mlp" in name).view(-1)[0] = math.inf
    save_file(poisoned, path, {"format": "pt"})
    assert "are NaN or infinite" in refusal(whole)


# --- runs that go on ---

OPTIONS = """\
stored_split: test
split_column: split
vision_feature_layer: [-1]
use_peft: true
use_cpu: true
lora_r: 2
max_steps: 4
per_device_train_batch_size: 4
learning_rate: 0.01
max_new_tokens: 4
logging_steps: 1
eval_strategy: "no"
save_strategy: steps
save_steps: 2
report_to: none
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, flickr, bases) -> list[str]:
    """Options of a run of four steps with a checkpoint every two, without its folder."""
    config = tmp_path_factory.mktemp("options") / "config.yaml"
    config.write_text(OPTIONS)
    vision, text = map(str, bases)
    named = ["--dataset_name", str(flickr), "--vision_model", vision, "--model_name_or_path", text]
    return ["--config", str(config), *named]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    """The folder of a run that ended."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert sft.main([*arguments, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def train(arguments, finished, tmp_path, caplog):
    """Runs the recipe in a copy of the finished run's folder; its exit status."""
    shutil.copytree(finished, tmp_path / "run")
    caplog.set_level("INFO")
    return lambda *overrides: sft.main([*arguments, "--output_dir", str(tmp_path / "run"), *map(str, overrides)])


RESUME = ("--resume_from_checkpoint", "true")


def steps(folder: Path) -> list[int]:
    history = json.loads((folder / "log_history.json").read_text())
    return [entry["step"] for entry in history if "loss" in entry]


def test_a_finished_run_that_is_resumed_trains_nothing_saves_and_scores(train, finished, tmp_path, caplog):
    shutil.rmtree(tmp_path / "run" / "eval")
    (tmp_path / "run" / WEIGHTS).unlink()
    assert train(*RESUME) == 0
    assert "Trained to step 4 of 4 already: nothing is left to train." in caplog.text
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
    assert (tmp_path / "run/eval/test/scores.json").is_file()


def test_a_save_that_reads_back_otherwise_ends_the_run(train, monkeypatch):
    save = phases.save_whole

    def spoil(run, trainer):
        save(run, trainer)
        change_tensors(run.output_dir, lambda name, value: value + 1e-3)

    monkeypatch.setattr(phases, "save_whole", spoil)
    with pytest.raises(RuntimeError, match=r"The saved adapter's logits differ from the trained model's by \d"):
        train(*RESUME)


def test_more_steps_go_on_where_the_finished_run_ended(train, tmp_path):
    assert train(*RESUME, "--max_steps", "5") == 0
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]


def test_a_run_does_not_begin_beside_the_checkpoints_of_another(train):
    ways = "--resume_from_checkpoint true, .*another --output_dir, .*--overwrite_output_dir true"
    with pytest.raises(FileExistsError, match=f"holds checkpoint-4 of an earlier run: go on .*{ways}"):
        train()


def test_the_same_run_begins_anew_over_its_own_checkpoints_when_told_to(train, finished, tmp_path):
    (tmp_path / "run/checkpoint-9").mkdir()
    assert train("--overwrite_output_dir", "true") == 0
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
    # To go on takes nothing away.
    assert train("--overwrite_output_dir", "true", *RESUME, "--max_steps", "5") == 0
    assert (tmp_path / "run/checkpoint-4").is_dir()


def test_a_demo_that_was_stopped_begins_anew(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    demo = [*("--config", str(sft.DEMO)), "--output_dir", str(tmp_path)]
    phases.Run(*sft.parse_arguments(demo), command="demo")
    assert (tmp_path / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lora_r", "4"), "lora_r: 2 there, 4 here"),
        (("--vision_feature_layer", "-2"), r"vision_feature_layer: \[-1\] there, \[-2\] here"),
        (("--instruction", "Say it."), "instruction: None there, Say it. here"),
        (("--seed", "7"), "seed: 42 there, 7 here"),
        (("--gradient_accumulation_steps", "2"), "rows a step: 4 there, 8 here"),
        (("--projector_learning_rate", "0.1"), "projector_learning_rate given: False there, True here"),
    ],
)
def test_a_run_with_other_options_does_not_go_on(train, monkeypatch, options, said):
    monkeypatch.setattr(phases, "load_bases", lambda run: pytest.fail("The bases were loaded first."))
    with pytest.raises(ValueError, match=rf"checkpoint-4 is of another run \(.*{said}.*another --output_dir"):
        train(*RESUME, *options)


def test_a_run_on_other_data_or_bases_does_not_go_on(train, tmp_path, bases):
    rows = flickr_rows()
    rows["caption"][3][0] += "!"
    with pytest.raises(ValueError, match=r"of another run \(training data: "):
        train(*RESUME, "--dataset_name", save_flickr(tmp_path / "other", rows))
    text = Path(shutil.copytree(bases[1], tmp_path / "text"))
    state = load_file(text / "model.safetensors")
    save_file({name: value + 0.01 for name, value in state.items()}, text / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"of another run \(decoder's weights: "):
        train(*RESUME, "--model_name_or_path", text)


@pytest.mark.parametrize(
    ("name", "keep", "reason"),
    [
        ("trainer_state.json", 0.5, "trainer_state.json is damaged"),
        ("trainer_state.json", 0.0, "trainer_state.json is damaged"),
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("optimizer.pt", 0.5, "optimizer.pt is damaged"),
        ("scheduler.pt", 0.0, "scheduler.pt is damaged"),
        ("rng_state.pth", None, "rng_state.pth is missing"),
        (WEIGHTS, 0.5, f"{WEIGHTS} is missing or damaged"),
    ],
)
def test_the_newest_whole_checkpoint_is_taken_and_it_is_said(train, tmp_path, caplog, name, keep, reason):
    path = tmp_path / "run" / "checkpoint-4" / name
    content = path.read_bytes()
    path.unlink() if keep is None else path.write_bytes(content[: int(keep * len(content))])
    asked = SimpleNamespace(resume_from_checkpoint="true", output_dir=str(tmp_path / "run"))
    assert checkpoint_to_resume(asked) == str(tmp_path / "run" / "checkpoint-2")
    assert f"checkpoint-4 is passed over: {reason}." in caplog.text
    asked.resume_from_checkpoint = str(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(FileNotFoundError, match=f"checkpoint-4 is no checkpoint to resume from: {re.escape(reason)}"):
        checkpoint_to_resume(asked)


def test_a_run_goes_on_from_an_older_checkpoint_as_it_went(train, finished, tmp_path):
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").write_text("")
    assert train(*RESUME) == 0
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


# --- options ---


def refused(tmp_path, *options: str, yaml: str = "") -> str:
    """What the recipe says of options, as one line with exit status 2, before it loads anything."""
    from vlm_peft.console import run_script

    config = tmp_path / "options.yaml"
    config.write_text(
        "dataset_name: data\nvision_model: clip\nmodel_name_or_path: qwen3\nuse_peft: true\nuse_cpu: true\n"
        f"report_to: none\noutput_dir: {tmp_path / 'out'}\n{yaml}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "Run", lambda *parsed, **_: pytest.fail("These options were taken."))
        said: list[str] = []
        patch.setattr("sys.stderr", SimpleNamespace(write=said.append, flush=lambda: None))
        assert run_script(lambda: sft.main(["--config", str(config), *options], program="sft.py"), "sft.py") == 2
    text = "".join(said).strip()
    assert text.startswith("sft.py: ")
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(
    "line",
    [
        "per_device_train_batch_size: 0",
        "per_device_eval_batch_size: -1",
        "gradient_accumulation_steps: -3",
        "generation_batch_size: -1",
        "generation_batch_size: 0",
        "max_new_tokens: 0",
        "num_beams: -2",
        "eval_samples: -1",
        "train_limit: 0",
        "eval_limit: -5",
        "image_size: 0",
        "pooled_grid: [2, 0]",
        "pooled_grid: ['-1']",
        "pooled_grid: '-1'",
        "pooled_grid: [2, null]",
        "pooled_grid: [2, true]",
        "vision_feature_layer: [-1, one]",
        "learning_rate: .inf",
        "learning_rate: -1.0e-3",
        "projector_learning_rate: .nan",
        "loraplus_lr_ratio: 0",
        "lora_dropout: 1.0",
        "lora_dropout: -0.1",
        "lora_r: 0",
        "lora_r: 1000000000000000000000000000000",
        "num_image_queries: 10000000000",
        "lora_alpha: -1",
        "max_steps: 0",
        "max_steps: -7",
        "num_train_epochs: 0",
        "num_train_epochs: .nan",
        "max_length: 0",
        "save_total_limit: 0",
        "adam_beta2: 1.5",
        "weight_decay: -1",
        "early_stopping_patience: 0",
        "slide_pages: some",
        "feature_dtype: float8",
        "on_bad_row: weep",
        "task: banana",
        "init_lora_weights: banana",
        "report_to: [tensorboard, banana]",
        "lr_scheduler_type: banana",
        "save_strategy: sometimes",
        "optim: banana",
        "optim_args: /dev/null",
        "optim_args: alpha_init=0.9,scale\noptim: sgd",
        "optim: lomo",
        "metric_for_best_model: eval_CIDEr\neval_strategy: epoch",
        # Of another type.
        "max_steps: 2.5",
        "max_steps: true",
        "lora_r: [4]",
        "max_new_tokens: null",
        "accelerator_config: 7",
        "learning_rate: fast",
        "instruction: Yes",
        "text_column: 2024",
        "output_dir: {a: b}",
        "vision_feature_layer: last",
        "vision_feature_layer: [-1.5]",
        "eval_splits: {test: 1}",
        "pack_rows: 3",
        "mixture: {dataset_name: x}",
        "mixture:\n- {weight: much}",
        "mixture:\n- {eval_limit: 0}",
        "mixture:\n- {eval_limit: '0'}",
        "mixture:\n- {class_temperature: null}",
        "mixture:\n- {task: banana}",
        "train_split: null",
        "lora_r: 4\nlora_r: 8",
        "seed: 4294967296",
        "lr_scheduler_kwargs: 0.5",
        "activation_checkpointing_kwargs: some",
        "lora_task_type: SEQ_CLS",
        "torch_compile_backend: banana",
        "torch_compile_mode: banana",
        "deepspeed: {zero_optimization: 1}",
    ],
)
def test_an_option_that_cannot_be_is_named_before_anything_is_loaded(tmp_path, line):
    name = re.findall(r"[a-z_]\w+", line)[0]
    if line.startswith("mixture:\n"):
        assert "Entry 1 of the mixture: " in refused(tmp_path, yaml=line)
        name = re.findall(r"\{(\w+)", line)[0]
    assert name in refused(tmp_path, yaml=line)


def test_words_that_yaml_reads_otherwise_are_taken_as_meant(tmp_path):
    from vlm_peft.training.arguments import data_sources, parse_arguments

    config = tmp_path / "options.yaml"
    config.write_text(
        "dataset_name: data\nvision_model: clip\nmodel_name_or_path: qwen3\nuse_peft: true\nuse_cpu: true\n"
        "report_to: none\nsave_strategy: no\neval_strategy: no\neval_splits: val\nblind_splits: val\n"
        "vision_feature_layer: -2\nlearning_rate: 1e-4\nmax_steps: '2'\nlora_target_modules: q_proj\n"
        "projector_type: average_pool\npooled_grid: ['2', '3']\nmixture:\n- {train_limit: '4', weight: '1e-1'}\n"
    )
    vision, training, _ = parse_arguments(["--config", str(config)])
    assert (training.save_strategy, training.eval_strategy, training.max_steps) == ("no", "no", 2)
    assert (vision.eval_splits, vision.blind_splits, vision.vision_feature_layer) == (["val"], ["val"], [-2])
    assert (training.learning_rate, vision.pooled_grid) == (1e-4, [2, 3])
    (source,) = data_sources(vision)
    assert (source.train_limit, source.weight) == (4, 0.1)
    cleared, _, _ = parse_arguments(
        ["--config", str(config), "--eval_splits", "none", "--blind_splits", "none", "--vision_feature_layer", "-1"]
    )
    assert (cleared.eval_splits, cleared.blind_splits, cleared.vision_feature_layer) == ([], [], [-1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ), "aliases stand for more than"),
        ("a: !!timestamp x\n", "cannot be read as YAML options"),
        ("a: &a [*a]\n", "aliases stand for more than"),
        ("- 1\n", "expected lines such as"),
        ("just words\n", "expected lines such as"),
        ("", "expected lines such as"),
        ("a: [1\n", "cannot be read as YAML options"),
        ("[" * 5000, "cannot be read as YAML options"),
        (b"a: \xff\xfe\n", "cannot be read as YAML options"),
        ("a: !!python/object/apply:os.system [ls]\n", "cannot be read as YAML options"),
        ("? [a, b]\n: 1\n", "cannot be read as YAML options"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_options_is_refused_at_once(tmp_path, text, said):
    from vlm_peft.training.arguments import parse_arguments

    config = tmp_path / "options.yaml"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--config", str(config)])
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(SystemExit, match="--config expects a YAML file"):
        parse_arguments(["--config"])


def test_an_encoder_in_the_place_of_the_decoder_is_said(bases, tmp_path):
    from vlm_peft.model.joining import joint_config

    with pytest.raises(ValueError, match=rf"{tmp_path} cannot be loaded: Unrecognized model"):
        joint_config(tmp_path, bases[1])
    with pytest.raises(ValueError, match="clip is a 'clip_text_model' model, which writes no text: expected a decoder"):
        joint_config(bases[0], bases[0])


# --- folders that hold one run only ---


@pytest.fixture
def dead_process() -> int:
    """The number of a process that is gone."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_results_of_an_earlier_run_go_before_the_run_writes(train, tmp_path, monkeypatch, dead_process):
    run = tmp_path / "run"
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    left = run / f".README.md.{dead_process}.tmp"
    left.write_text("half")
    (run / "eval" / "notes.txt").write_text("The user's own.")
    monkeypatch.setattr(sft, "make_trainer", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train()
    names = {path.name for path in run.rglob("*") if path.is_file()}
    gone = {"README.md", "report.html", "run_summary.json", "log_history.json", "scores.json", "predictions.jsonl"}
    assert not names & {*gone, left.name}
    assert {WEIGHTS, "notes.txt"} <= names


def test_a_readme_that_is_no_card_stays(tmp_path):
    (tmp_path / "README.md").write_text("Mine.")
    (tmp_path / "eval").mkdir()
    phases.clear_results(tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."


def test_a_save_that_is_killed_leaves_a_whole_adapter_or_none(bases, tmp_path):
    from tiny_runs import load_bases, make_trainer

    from vlm_peft import VisionQwen

    folder = tmp_path / "run"
    run = SimpleNamespace(output_dir=folder, is_main=True)
    trainer = make_trainer(folder, load_bases(bases), {})
    phases.save_whole(run, trainer)
    before = load_file(folder / WEIGHTS)
    assert not list(folder.glob(".*"))
    for value in trainer.model.parameters():
        if value.requires_grad:
            value.data += 1
    move, files = Path.replace, len(list(folder.glob("*.*")))
    for survived in range(files):
        moved: list[Path] = []

        def replace(path, target, moved=moved, survived=survived):
            if len(moved) == survived:
                raise KeyboardInterrupt
            moved.append(target)
            return move(path, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                phases.save_whole(run, trainer)
        with pytest.raises(FileNotFoundError, match=r"no adapter folder: adapter_config\.json missing"):
            VisionQwen.from_adapter(folder)
    phases.save_whole(run, trainer)
    VisionQwen.from_adapter(folder)
    after = load_file(folder / WEIGHTS)
    assert all(torch.equal(after[name], value + 1) for name, value in before.items())


def test_predictions_are_kept_when_they_cannot_be_scored_and_the_row_is_named(tmp_path, monkeypatch):
    from vlm_peft.data.splits import Question
    from vlm_peft.evaluation import evaluate as evaluation

    references = {"seven": ["a dog"], "eight": ["...!"], "nine": ["a cat"]}
    questions = [Question(name, [], [index], texts, {}) for index, (name, texts) in enumerate(references.items())]
    split = SimpleNamespace(
        name="test",
        data=SimpleNamespace(dataset_name="data"),
        task=SimpleNamespace(name="caption", choices=()),
        fetch_images=None,
        left_out=[],
        texts=questions,
        questions=lambda: questions,
    )
    monkeypatch.setattr(
        evaluation, "generate_texts", lambda model, processor, prompts, *_, **__: ["a dog"] * len(prompts)
    )
    (tmp_path / "scores.json").write_text("of an earlier run")
    with pytest.raises(ValueError, match=r"predictions\.jsonl: row eight cannot be scored: .*a word in it"):
        evaluation.evaluate_split(None, None, split, tmp_path, tokenizer="treebank-python")
    kept = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(row["id"], row["prediction"]) for row in kept] == [(name, "a dog") for name in references]
    assert not (tmp_path / "scores.json").exists()


def test_a_split_that_cannot_be_scored_costs_no_other_its_scores(tmp_path, monkeypatch):

    said: list[str] = []
    vision = SimpleNamespace(generation_batch_size=1, max_new_tokens=1, num_beams=1, meteor=False)
    run = SimpleNamespace(output_dir=tmp_path, vision=vision, is_main=True, unscored=[], say=said.append)

    def evaluate_split(model, processor, split, folder, **arguments):
        if split == "bad":
            raise ValueError("row 7 cannot be scored")
        return {"metrics": {"CIDEr": 0.5}, "n": 3}

    monkeypatch.setattr(phases, "evaluate_split", evaluate_split)
    phases.evaluate(run, torch.nn.Linear(1, 1), None, {"a": "good", "b": "bad", "c": "good"})
    assert [line.split()[0] for line in said] == ["a", "c"]
    assert run.unscored == ["b: row 7 cannot be scored"]


def test_drafts_of_killed_processes_are_swept_and_those_of_others_are_not(tmp_path, dead_process):
    from vlm_peft.adapters.export import _new_folder
    from vlm_peft.drafts import draft_of, sweep

    host = draft_of(Path("x")).name.removeprefix(".x.").rpartition("-")[0]
    dead = [tmp_path / f".out.{host}-{dead_process}.tmp", tmp_path / f".out.{dead_process}.tmp"]
    others = [tmp_path / f".out.elsewhere-{dead_process}.tmp", draft_of(tmp_path / "out2"), tmp_path / ".out.tmp"]
    others.append(tmp_path / f".other.{host}-{dead_process}.tmp")
    for folder in (*dead, *others):
        folder.mkdir()
        (folder / "half").write_text("")
    with _new_folder(tmp_path / "out") as partial:
        (partial / "whole").write_text("")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *(path.name for path in others)}
    sweep(tmp_path)
    assert not others.pop().exists()
    assert all(path.is_dir() for path in others)
    sweep(tmp_path / "missing")


def test_a_file_that_was_being_written_leaves_nothing_behind(tmp_path, dead_process):
    from vlm_peft.drafts import draft_of
    from vlm_peft.evaluation.records import write_text

    host = draft_of(Path("x")).name.removeprefix(".x.").rpartition("-")[0]
    left = [tmp_path / f".scores.json.{host}-{dead_process}.tmp", tmp_path / f".scores.json.{dead_process}.tmp"]
    for path in left:
        path.write_text("half")
    write_text(tmp_path / "scores.json", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_pictures_that_were_being_encoded_leave_nothing_behind(bases, flickr, tmp_path):
    from vlm_peft import VisionQwen, VisionQwenProcessor
    from vlm_peft.data import feature_cache
    from vlm_peft.data.arguments import DataArguments
    from vlm_peft.data.splits import encode_pictures, load_split

    model = VisionQwen.from_vision_text_pretrained(*bases).requires_grad_(False)
    processor = VisionQwenProcessor.from_vision_text_pretrained(*bases, model.config)
    data = DataArguments(dataset_name=str(flickr), stored_split="test", split_column="split")
    split = load_split(data, "test", processor)
    child = os.fork()
    if child == 0:
        try:
            feature_cache.encode_batch = lambda *arguments, **others: os.kill(os.getpid(), signal.SIGKILL)
            encode_pictures(split, model, processor, feature_cache=True, directory=str(tmp_path))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert len(list(tmp_path.iterdir())) == 1
    encode_pictures(split, model, processor, feature_cache=True, directory=str(tmp_path))
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".arrow"


# --- the checkpoint that is kept ---


@pytest.mark.parametrize(
    ("scores", "losses", "kept"),
    [
        ([0.0, 0.0, 0.0], [3.0, 2.0, 1.0], 6),
        ([0.0, 0.0, 0.0], [3.0, 1.0, 2.0], 4),
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], 6),
        ([0.2, 0.5, 0.2], [1.0, 3.0, 0.5], 4),
        ([0.5, 0.2, 0.5], [1.0, 3.0, 2.0], 2),
    ],
)
def test_of_equal_scores_the_loss_decides_and_then_the_later_step(bases, tmp_path, caplog, scores, losses, kept):
    from tiny_runs import encoded_rows, load_bases, make_trainer

    caplog.set_level("INFO")
    model = load_bases(bases)
    trainer = make_trainer(
        tmp_path,
        model,
        {},
        trainer={"eval_dataset": encoded_rows(model)[0]},
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_CIDEr",
        greater_is_better=True,
    )

    def evaluate(*arguments, **others):
        score, loss = (values[trainer.state.global_step // 2 - 1] for values in (scores, losses))
        trainer.log({"eval_CIDEr": score, "eval_loss": loss})
        return {"eval_CIDEr": score, "eval_loss": loss}

    trainer.evaluate = evaluate
    trainer.train()
    assert trainer.state.best_global_step == kept
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{kept}"
    saved = load_file(tmp_path / f"checkpoint-{kept}" / WEIGHTS)
    trainer.save_model()
    assert all(torch.equal(value, saved[name]) for name, value in load_file(tmp_path / WEIGHTS).items())
    assert f"Kept step {kept}: eval_CIDEr {max(scores)} is the best" in caplog.text


def test_a_full_disk_is_said_and_the_last_checkpoint_stays_whole(bases, tmp_path, monkeypatch):
    from tiny_runs import load_bases, make_trainer

    from vlm_peft.training.checkpoints import newest_whole

    trainer = make_trainer(tmp_path, load_bases(bases), {}, save_total_limit=1)
    write = torch.save

    def save(value, path, *arguments, **others):
        if "checkpoint-4" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        return write(value, path, *arguments, **others)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"step 4 cannot be written to .*GB free .*--resume_from_checkpoint true"):
        trainer.train()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-2"


# --- questions ---


@pytest.fixture(scope="module")
def loaded(adapter):
    """Model and processor of an adapter whose decoder has 512 positions."""
    return load_model(adapter)


LONG = "why " * 200


def test_an_over_long_question_is_refused_in_every_door(adapter, loaded, flickr, tmp_path, monkeypatch, capsys):
    from PIL import Image

    from vlm_peft import __main__
    from vlm_peft.commands import evaluate as eval_run
    from vlm_peft.commands.chat import Conversation
    from vlm_peft.commands.web_demo import PictureAnswers
    from vlm_peft.console import run_script
    from vlm_peft.tasks import TaskSettings

    said = r"has 8\d\d tokens, and its answer may take 6, more than the 512 that the decoder takes"
    monkeypatch.setattr(__main__, "quiet_imports", lambda: None)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert __main__.main(["caption", str(adapter), str(tmp_path / "a.png"), "--question", LONG]) == 2
    assert re.search(said, capsys.readouterr().err)
    with pytest.raises(ValueError, match=said):
        Conversation(*loaded, 6).ask(LONG)
    with pytest.raises(ValueError, match=said):
        list(PictureAnswers(*loaded, TaskSettings(max_new_tokens=6))(tmp_path / "a.png", LONG))
    data = ["--dataset", str(flickr), "--stored_split", "test", "--split_column", "split", "--split", "test"]
    arguments = ["--model", str(adapter), *data, "--output_dir", str(tmp_path / "scores"), "--instruction", LONG]
    assert run_script(lambda: eval_run.main(arguments), "run.py") == 2
    assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.glob("scores/*"))


def test_a_question_that_just_fits_is_answered(loaded):
    from vlm_peft.evaluation.generation import check_length

    check_length(loaded[0], 506, 6)
    with pytest.raises(ValueError, match="has 507 tokens, and its answer may take 6"):
        check_length(loaded[0], 507, 6)


def test_bytes_that_are_no_text_are_named_and_the_chat_goes_on(loaded, monkeypatch, capsys):
    from vlm_peft.commands import chat as chatting

    asked: list[str] = []
    conversation = SimpleNamespace(ask=lambda text, streamer: asked.append(text))
    stdin = SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"what?\nca\xf1on\n\xff\xfe\n\xc3\xb1\n\nlast"))
    monkeypatch.setattr("sys.stdin", stdin)
    chatting.chat(conversation, loaded[1], "Describe.")
    assert asked == ["what?", "ñ", "Describe.", "last"]
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "The line is no UTF-8 text: byte 0xf1 after 2 characters.",
        "The line is no UTF-8 text: byte 0xff after 0 characters.",
    ]


@pytest.mark.parametrize("option", ["question", "instruction"])
def test_an_option_that_is_no_text_is_named(option):
    from vlm_peft.commands.caption import ask
    from vlm_peft.tasks import TaskSettings

    with pytest.raises(ValueError, match=f"The {option} is no UTF-8 text: byte 0xe9 after 3 characters"):
        ask(TaskSettings(), **{option: os.fsdecode(b"caf\xe9")})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--instruction", "caf\udce9"], "instruction is no UTF-8 text: byte 0xe9 after 3 characters"),
        (["--output_dir", "out\udcff"], "output_dir is no UTF-8 text: byte 0xff after 3 characters"),
        (["--class_names", "a", "b\udcff"], "class_names is no UTF-8 text: byte 0xff after 1 characters"),
    ],
)
def test_a_training_option_that_is_no_text_is_named_before_anything_is_loaded(options, said):
    from vlm_peft.training.arguments import parse_arguments

    given = ["--output_dir", "out", "--dataset_name", "x", "--use_peft", "true", "--use_cpu", "true", *options]
    with pytest.raises(SystemExit, match=said):
        parse_arguments(given)


def test_a_label_that_is_no_text_is_named():
    from vlm_peft.contrastive.encoder import check_labels

    with pytest.raises(ValueError, match="The label is no UTF-8 text: byte 0xe9 after 3 characters"):
        check_labels(["a", "caf\udce9"])


@pytest.mark.parametrize(
    ("task", "asked", "is_said"),
    [
        ("vqa", (), True),
        ("vqa", ("--question", "Why?"), False),
        ("caption", (), False),
        ("caption", ("--question", "Why?"), True),
        ("digits", (), False),
    ],
)
def test_a_model_that_is_asked_something_else_than_in_training_is_named(
    copied, tmp_path, capsys, monkeypatch, task, asked, is_said
):
    from PIL import Image

    from vlm_peft import __main__

    monkeypatch.setattr(__main__, "quiet_imports", lambda: None)
    change_json(copied, "task.json", task=task)
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in "ab"]
    assert __main__.main(["caption", str(copied), *files, "--max_new_tokens", "1", *asked]) == 0
    assert capsys.readouterr().err.count("This model was trained to") == is_said


# --- the log ---


def test_libraries_tell_warnings_only(monkeypatch):
    """accelerate would say after each epoch that "the used dataset had no length"."""
    from vlm_peft.console import show_messages

    # pytest's own handlers would keep `basicConfig` from doing anything.
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    logging.root.manager._clear_cache()
    for is_main in (False, True):
        show_messages(is_main)
        assert logging.getLogger("vlm_peft.training.setup").isEnabledFor(logging.INFO) == is_main
        assert not logging.getLogger("accelerate.accelerator").isEnabledFor(logging.INFO)
    assert logging.root.handlers[0].formatter._fmt == "%(message)s"
