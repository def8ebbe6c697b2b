"""What users do to runs and their folders: each ends well, or in one line that names what is wrong."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_peft.loading import load_model

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
    ],
)
def test_a_hostile_chat_template_is_refused_when_the_model_is_loaded(copied, template):
    (copied / "chat_template.jinja").write_text(template)
    assert "chat_template.jinja" in refusal(copied)


def test_a_processor_of_another_model_is_refused(copied):
    change_json(copied, "processor_config.json", num_image_tokens=7)
    assert "num_image_tokens is 7, expected 16" in refusal(copied)


@pytest.mark.parametrize("text", ["", "{}", "[]", "{"])
def test_a_damaged_tokenizer_is_named(copied, text):
    (copied / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in refusal(copied)


def test_weights_that_are_no_numbers_are_not_saved(bases, tmp_path):
    from test_lifecycle import load_bases, make_trainer

    trainer = make_trainer(tmp_path / "run", load_bases(bases), {})
    trainer.save_model()
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    name, parameter = next((name, value) for name, value in trainer.model.named_parameters() if "lora_B" in name)
    parameter.data.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=f"Nothing is saved at step 0: 1 of .* weights of {re.escape(name)} are NaN"):
        trainer.save_model()
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before


def test_part_of_a_full_save_is_refused(adapter, tmp_path):
    from vlm_peft.commands.export import export_merged

    whole = export_merged(adapter, tmp_path / "merged")
    (path,) = whole.glob("*.safetensors")
    state = load_file(path)
    save_file({name: value for name, value in state.items() if "linear_2" not in name}, path, {"format": "pt"})
    assert "2 weights are missing, " in refusal(whole)
    poisoned = {name: value.clone() for name, value in state.items()}
    next(value for name, value in poisoned.items() if "mlp" in name).view(-1)[0] = math.inf
    save_file(poisoned, path, {"format": "pt"})
    assert "are NaN or infinite" in refusal(whole)
