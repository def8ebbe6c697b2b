"""The doctor: a good configuration passes and leaves no trace, each fault is a line and exit status 1, figures hold."""

import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import flickr_rows, save_flickr
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_decoders import save_decoder

from vlm_peft import __main__ as command
from vlm_peft.adapters.lora import lora_config
from vlm_peft.adapters.pissa import lora_state, save_pissa_as_lora
from vlm_peft.commands import doctor
from vlm_peft.data.rows import load_rows
from vlm_peft.training import setup as training_setup
from vlm_peft.training.arguments import parse_arguments


@pytest.fixture(autouse=True)
def _short_trial(monkeypatch):
    monkeypatch.setattr(doctor, "TRIAL_STEPS", 2)
    monkeypatch.setattr(doctor, "WARM_UP", 2)


@pytest.fixture
def options(bases, flickr, tmp_path):
    """Options of a small run, by name."""
    vision, text = bases
    return {
        "dataset_name": flickr,
        "stored_split": "test",
        "split_column": "split",
        "eval_splits": "test",
        "vision_model": vision,
        "model_name_or_path": text,
        "vision_feature_layer": -1,
        "output_dir": tmp_path / "out",
        "feature_cache_dir": tmp_path / "features",
        "use_peft": "true",
        "lora_r": 4,
        "use_cpu": "true",
        "bf16": "false",
        "gradient_checkpointing": "false",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_new_tokens": 4,
        "report_to": "none",
        "save_strategy": "no",
    }


def listed(options: dict) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def examine(options: dict, capsys, **changes) -> tuple[int, list[str], str]:
    """Exit status, the problems, and all that was printed."""
    status = doctor.main(listed(options | changes))
    printed = capsys.readouterr().out
    tail = printed.rstrip().split("\n\n")[-1].splitlines()
    problems = [line.split(". ", 1)[1] for line in tail[1:]] if "problem" in tail[0] and status else []
    if problems:
        assert tail[0] == f"{len(problems)} problem{'s' * (len(problems) > 1)}:"
    return status, problems, printed


def files_of(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


def test_a_good_configuration_passes_and_leaves_no_trace(options, capsys, tmp_path):
    # No other test has encoded these rows; loading them is what `datasets` may keep.
    data = save_flickr(tmp_path / "fresh")
    for name in ("train", "test"):
        load_rows(str(data), name, stored_split="test", split_column="split")
    before = files_of(tmp_path, Path(os.environ["HF_DATASETS_CACHE"]))
    status, problems, printed = examine(options, capsys, dataset_name=data)
    assert (status, problems) == (0, [])
    assert files_of(tmp_path, Path(os.environ["HF_DATASETS_CACHE"])) == before
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "features").exists()
    for said in (
        f"torch {torch.__version__}",
        "(clip_vision_model, pictures of 8 x 8 px)",
        "16 image tokens a picture, of 4 x 4 from the encoder (mlp)",
        "Split train (caption): 24 rows, 24 pictures.",
        "columns caption, filename, id, image, img_id, sentids, split; pictures in image",
        "0 of 24 pictures tried cannot be read",
        "1 pictures, 16 image tokens in the text, 16 features of 16 from encoder and projector",
        "No training picture is among those that are scored.",
        "rows share their prefixes: probed on this model",
        "features of 28 pictures: 14.3 KB",
        "steps    18 (3 epochs of 24 rows, 4 a step)",
        "(4 texts)",
        "No problems: the run can start.",
    ):
        assert said in printed


def test_a_decoder_that_mixes_texts_is_told_with_its_cost_and_trains(options, capsys, tmp_path):
    from vlm_peft.training import sft

    options |= {"model_name_or_path": save_decoder("LFM2", tmp_path / "lfm2"), "max_steps": 2}
    status, problems, printed = examine(options, capsys)
    assert (status, problems) == (0, [])
    line = r"rows are laid out one text a sequence: Lfm2Model's conv layers .* apart; [2-4]\.\dx the decoder tokens"
    assert re.search(line, printed)
    assert sft.main(listed(options)) == 0
    printed = capsys.readouterr().out
    assert re.search(line, printed)
    assert "reloaded, its logits are equal." in printed


@pytest.mark.parametrize("implementation", ["flash_attention_2", "unheard_of"])
def test_attention_that_cannot_keep_texts_apart_is_one_line_in_the_recipe(options, capsys, implementation):
    from vlm_peft.console import run_script
    from vlm_peft.training import sft

    options["attn_implementation"] = implementation
    assert run_script(lambda: sft.main(listed(options)), "sft.py") == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith(
        f"sft.py: attn_implementation='{implementation}' cannot keep the branches of a row apart"
    )


def test_the_saved_adapter_is_as_large_as_predicted(options, capsys):
    from vlm_peft.training import sft

    # Of a small adapter, the names in the file's header would be most.
    options |= {"lora_r": 256, "max_steps": 1}
    _, _, printed = examine(options, capsys)
    predicted = float(re.search(r"adapter file: ([\d.]+) MB", printed)[1]) * 1e6
    assert sft.main(listed(options)) == 0
    size = (options["output_dir"] / "adapter_model.safetensors").stat().st_size
    assert size == pytest.approx(predicted, rel=0.05)


def test_pissa_is_saved_with_twice_the_rank(model, tmp_path):
    adapted = get_peft_model(model, lora_config(model, r=8, init_lora_weights="pissa"))
    predicted, start = doctor.saved_bytes(adapted), lora_state(adapted)
    adapted.save_pretrained(tmp_path)
    save_pissa_as_lora(tmp_path, start)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert predicted == sum(value.numel() * value.element_size() for value in stored.values())


def test_missing_bases_and_columns_are_all_told(options, capsys):
    status, problems, _ = examine(options, capsys, text_column="captoin", vision_model="./nowhere")
    assert status == 1
    assert len(problems) == 2
    assert "--vision_model ./nowhere is not there" in problems[0]
    assert "has no column 'captoin'" in problems[1]


def test_a_hub_base_that_is_not_here_offline(options, capsys):
    status, problems, _ = examine(options, capsys, model_name_or_path="nobody/nothing")
    assert status == 1
    assert "Cannot load the encoder" in problems[0]
    assert "nobody/nothing" in problems[0]


def test_a_missing_data_set_and_a_missing_split(options, capsys):
    status, problems, _ = examine(options, capsys, dataset_name="./nothing")
    assert (status, len(problems)) == (1, 1)
    assert "--dataset_name ./nothing is not there" in problems[0]
    status, problems, _ = examine(options, capsys, train_split="trian")
    assert status == 1
    assert "'trian'" in problems[0]


def test_rows_that_do_not_fit(options, capsys):
    status, problems, printed = examine(options, capsys, max_length=40)
    assert status == 1
    assert "24 of 24 rows (100.0 %) exceed max_length" in printed
    assert any("more than max_length=40" in problem for problem in problems)
    longest = re.search(r"longest ([\d,]+) of max_length 40", printed)[1]
    assert f"--max_length {longest} holds every row" in printed
    # Texts that fit one by one are spread over several sequences.
    status, problems, printed = examine(options, capsys, max_length=100)
    assert (status, problems) == (0, [])
    assert "24 of 24 rows (100.0 %) exceed max_length" in printed


def test_pictures_that_do_not_fit(options, capsys):
    status, problems, printed = examine(options, capsys, max_length=16, image_size=12, projector_type="linear")
    assert status == 1
    assert "A picture takes 36 image tokens, and --max_length is 16: raise it above 36" in problems[0]
    assert "36 image tokens a picture, of 6 x 6 from the encoder (linear)" in printed


def test_held_out_rows_that_do_not_fit_matter_when_their_loss_is_watched(options, capsys, tmp_path):
    rows = flickr_rows()
    rows["caption"][30] = ["x" * 200]
    changes = {"dataset_name": save_flickr(tmp_path / "long", rows), "max_length": 120}
    assert examine(options, capsys, **changes)[0] == 0
    status, problems, _ = examine(options, capsys, **changes, eval_strategy="steps", eval_steps=5)
    assert (status, len(problems)) == (1, 1)
    assert "1 of 4 rows of test (30)" in problems[0]


def test_a_disk_that_is_too_small(options, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 5_000, 5_000))
    status, problems, _ = examine(options, capsys)
    assert (status, len(problems)) == (1, 1)
    assert "The feature cache needs 14.3 KB more" in problems[0]
    assert "--feature_cache_dir" in problems[0]


def test_an_unreadable_picture_and_an_empty_text(options, capsys, caplog, tmp_path):
    rows = flickr_rows()
    rows["image"][5]["bytes"] = rows["image"][5]["bytes"][:40]
    rows["caption"][7] = []
    data = save_flickr(tmp_path / "bad", rows)
    status, problems, printed = examine(options, capsys, dataset_name=data)
    assert (status, len(problems)) == (1, 2)
    assert "1 of 24 pictures tried cannot be read" in printed
    assert any("1 of 24 rows of train (5): Cannot read the picture" in problem for problem in problems)
    assert any("1 of 24 rows of train (7): Expected one or more captions" in problem for problem in problems)
    status, problems, printed = examine(options, capsys, dataset_name=data, on_bad_row="skip")
    assert (status, problems) == (0, [])
    assert "left out: 1 of 24 rows of train (5)" in printed
    assert not caplog.records  # The loader's own warnings would say it again.
    assert "of 22 rows" in printed


def test_a_projector_that_is_frozen(options, capsys, monkeypatch):
    made = training_setup.apply_strategy

    def without_projector(model, strategy, **arguments):
        config = made(model, strategy, **arguments)
        config.modules_to_save = None
        return config

    monkeypatch.setattr(training_setup, "apply_strategy", without_projector)

    def load_frozen(*arguments):
        model, processor = training_setup.load_model(*arguments)
        return model.requires_grad_(False), processor

    monkeypatch.setattr(doctor, "load_model", load_frozen)
    status, problems, _ = examine(options, capsys)
    assert status == 1
    assert "The projector has no trainable parameters" in problems[0]


def test_a_projector_that_does_not_move(options, capsys):
    status, problems, _ = examine(options, capsys, projector_learning_rate=0.0)
    assert status == 1
    assert "The projector did not change in the trial steps" in problems[0]


def test_encoder_and_text_that_do_not_agree(options, capsys, monkeypatch):
    load = doctor.load_model

    def load_other(*arguments):
        model, processor = load(*arguments)
        processor.num_image_tokens = 15
        return model, processor

    monkeypatch.setattr(doctor, "load_model", load_other)
    status, problems, _ = examine(options, capsys)
    assert status == 1
    assert "15 image tokens in its text, encoder and projector give 16 features" in problems[0]


def test_training_pictures_among_those_that_are_scored(options, capsys, tmp_path):
    rows = flickr_rows()
    rows["image"][30] = rows["image"][3]
    data = save_flickr(tmp_path / "leaking", rows)
    status, problems, printed = examine(options, capsys, dataset_name=data)
    assert (status, len(problems)) == (1, 1)
    assert "1 pictures of the training split 'train' are also in 'test'" in problems[0]
    assert "No training picture" not in printed


def test_out_of_memory_is_a_problem(options, capsys, monkeypatch):
    def no_memory(self, trainer, watch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(doctor.Doctor, "try_steps", no_memory)
    status, problems, _ = examine(options, capsys)
    assert status == 1
    assert "Lower --per_device_train_batch_size" in problems[0]


def test_an_old_version_is_warned_of(options, capsys, monkeypatch):
    found = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "peft" else found(name))
    status, _, printed = examine(options, capsys, max_steps=1)
    assert status == 0
    assert "WARNING: peft 0.1 is installed, >=" in printed


@pytest.mark.parametrize("arguments", [["--config", "nowhere.yaml"], ["--learning_rat", "1"], ["--lora_r", "2"]])
def test_bad_usage_is_told_with_status_2(arguments, capsys):
    assert doctor.main([]) == 2
    assert "expected --config FILE.yaml" in capsys.readouterr().err
    assert doctor.main(["--use_cpu", "true", *arguments]) == 2
    assert capsys.readouterr().err.startswith("vlm-peft doctor:")


@pytest.mark.parametrize(("percent", "is_busy"), [(100.0, True), (0.0, False)])
def test_busy_cores_are_told(options, capsys, monkeypatch, percent, is_busy):
    monkeypatch.setattr(doctor.psutil, "cpu_percent", lambda **_: [percent] * doctor.os.cpu_count())
    _, _, printed = examine(options, capsys, dataset_name="./nothing")
    assert ("WARNING: other programs keep" in printed) == is_busy
    assert ("OMP_NUM_THREADS=1." in printed) == is_busy


@pytest.mark.parametrize("task", ["chat", "caption"])
def test_rows_of_one_picture_that_are_not_joined_are_told(options, capsys, tmp_path, task):
    rows = flickr_rows()
    rows["image"] = rows["image"][:12] * 2 + rows["image"][24:]
    rows["messages"] = [
        [{"role": "user", "content": f"{number}<image>What?"}, {"role": "assistant", "content": each[0]}]
        for number, each in enumerate(rows["caption"])
    ]
    _, _, printed = examine(options, capsys, dataset_name=save_flickr(tmp_path / "twice", rows), task=task)
    said = "    12 of 24 rows show what another row shows, and do not share its tokens: "
    assert (said in printed) == (task == "chat")


def test_a_wrong_value_is_told_with_status_2(capsys):
    assert doctor.main(["--lora_r", "many"]) == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err


def test_the_command_passes_all_options_on(options, capsys):
    assert command.main(["doctor", *listed(options | {"dataset_name": "./nothing"})]) == 1
    assert "1 problem:" in capsys.readouterr().out
    assert command.main(["doctor", "--use_cpu", "true", "--lerning_rate", "1"]) == 2
    assert "did you mean 'learning_rate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"streaming": "true", "max_steps": 4}, "steps    4 (--max_steps)"),
        ({"feature_cache": "false"}, "no feature cache: pictures are encoded in every step"),
        ({"lora_vision": "true"}, "no feature cache: pictures are encoded in every step"),
    ],
)
def test_pictures_that_are_encoded_in_every_step(changes, said, options, capsys):
    status, problems, printed = examine(options, capsys, **changes)
    assert (status, problems) == (0, [])
    assert said in printed


def test_batches_are_real_and_go_from_light_to_heavy(options):
    patient = doctor.Doctor(*parse_arguments(listed(options | {"gradient_accumulation_steps": 2})))
    lengths = [10 + number % 7 for number in range(40)] + [99]
    batches = patient.draw_batches(lengths)
    assert len(batches) == 2 * (1 + (doctor.WARM_UP - 1) + doctor.TRIAL_STEPS)
    assert all(len(batch) == 4 for batch in batches)
    heaviest = max(batches, key=lambda batch: max(lengths[row] for row in batch))
    assert batches[0] == batches[1] == heaviest


def test_steps_of_a_run_are_counted_as_the_trainer_does(options):
    rows = Dataset.from_dict({"input_ids": [[1]] * 23})
    for accumulation, expected in ((1, 18), (2, 9), (4, 6)):
        changes = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 3}
        patient = doctor.Doctor(*parse_arguments(listed(options | changes)))
        assert patient.count_steps(rows)[0] == expected
