"""Adapters: what trains, and the life of an adapter folder from saving to merging, here and in a fresh process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_config
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen3Config, Qwen3ForCausalLM

from vlm_peft import VisionQwen
from vlm_peft.adapters.folder import is_adapter_folder, save_composite_config
from vlm_peft.adapters.lora import TrainableRow, check_trainable, format_trainable_table, lora_config, trainable_table

IMAGE = 259


def load_bases(clip: Path, qwen3: Path, **fields) -> VisionQwen:
    model = VisionQwen.from_vision_text_pretrained(clip, qwen3, image_token_id=IMAGE, **fields)
    model.model.vision_tower.requires_grad_(False)
    return model


def adapt(model: VisionQwen, **arguments) -> PeftModel:
    """LoRA with weights as after training: B is no longer zero."""
    adapted = get_peft_model(model, lora_config(model, r=4, **arguments)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.1 if "lora" in name else 0.02))
    return adapted


def save(adapted: PeftModel, folder: Path) -> Path:
    adapted.save_pretrained(folder)
    save_composite_config(adapted, folder)
    return folder


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": torch.tensor([[1, *[IMAGE] * 16, 5, 6, 7]]),
        "pixel_values": torch.randn(1, 3, 8, 8, generator=generator),
    }


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(**batch()).logits


@pytest.fixture(scope="module")
def trained(bases):
    return adapt(load_bases(*bases))


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    return save(trained, tmp_path_factory.mktemp("adapter") / "run")


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the adapter folder to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# --- life cycle ---


def test_the_adapter_changes_the_output_and_disabling_it_restores_the_base_bit_for_bit(trained, bases):
    base = load_bases(*bases)
    base.model.multi_modal_projector.load_state_dict(
        trained.get_base_model().model.multi_modal_projector.original_module.state_dict()
    )
    expected = logits(base)
    assert (logits(trained) - expected).abs().max() > 1e-2
    with trained.disable_adapter():
        assert torch.equal(logits(trained), expected)


def test_merged_equals_unmerged(folder, trained):
    merged = VisionQwen.from_adapter(folder, merge=True)
    assert type(merged) is VisionQwen
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "original_module" in name]
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-5, atol=1e-5)


def test_a_merged_model_saves_and_loads_as_a_full_one(folder, tmp_path):
    merged = VisionQwen.from_adapter(folder, merge=True)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(VisionQwen.from_pretrained(tmp_path).eval()), logits(merged))


def test_loaded_equals_saved_bit_for_bit_in_a_fresh_process_and_another_directory(folder, trained, tmp_path):
    torch.save(batch(), tmp_path / "batch.pt")
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from vlm_peft import VisionQwen\n"
        "with torch.inference_mode():\n"
        "    logits = VisionQwen.from_adapter(sys.argv[1])(**torch.load('batch.pt')).logits\n"
        "torch.save(logits, 'logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(trained))


def test_a_projector_with_layer_norm_is_saved_and_loaded_whole(bases, tmp_path):
    adapted = adapt(load_bases(*bases, projector_layer_norm=True))
    expected = logits(adapted)
    trained_norm = adapted.get_base_model().model.multi_modal_projector.layer_norm
    assert (trained_norm.weight - 1).abs().max() > 1e-3
    folder = save(adapted, tmp_path / "run")
    assert torch.equal(logits(VisionQwen.from_adapter(folder)), expected)
    torch.testing.assert_close(logits(VisionQwen.from_adapter(folder, merge=True)), expected, rtol=1e-5, atol=1e-5)


def test_bases_named_by_a_relative_path_are_found_from_another_directory(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(bases[0].parent)
    adapted = adapt(load_bases(Path("clip"), Path("qwen3")))
    save(adapted, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(VisionQwen.from_adapter("run")), logits(adapted))


def test_moved_bases_are_asked_for_and_found(copied, bases, trained, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config |= {"vision_name_or_path": str(tmp_path / "gone"), "text_name_or_path": str(tmp_path / "away")}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"trained on the vision base .*gone, which is not there: .* vision="):
        VisionQwen.from_adapter(copied)
    with pytest.raises(FileNotFoundError, match=r"trained on the text base .*away, which is not there: .* text="):
        VisionQwen.from_adapter(copied, vision=bases[0])
    loaded = VisionQwen.from_adapter(copied, vision=bases[0], text=bases[1])
    assert torch.equal(logits(loaded), logits(trained))


def test_auto_class_reassembles_an_adapter_folder(folder, trained):
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(loaded, PeftModel)
    assert torch.equal(logits(loaded), logits(trained))
    halved = VisionQwen.from_pretrained(folder, dtype=torch.bfloat16)
    assert halved.get_base_model().model.language_model.dtype == torch.bfloat16


def test_training_goes_on_from_a_folder(folder, trained):
    loaded = VisionQwen.from_adapter(folder, is_trainable=True)
    trains = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert not [
        name for name, parameter in VisionQwen.from_adapter(folder).named_parameters() if parameter.requires_grad
    ]


# --- what the folder holds ---


def test_lora_and_the_whole_projector_lie_in_one_safetensors_file_without_base_weights(folder, trained):
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}
    expected = {
        name.replace(".default", "").replace("modules_to_save.", ""): parameter.numel()
        for name, parameter in trained.named_parameters()
        if parameter.requires_grad
    }
    assert sizes == expected
    assert sum("multi_modal_projector" in name for name in sizes) == 4
    assert not [name for name in sizes if "lora_" not in name and "multi_modal_projector" not in name]
    assert not [path.name for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")]
    assert is_adapter_folder(folder)


def test_nothing_is_unpickled(copied, trained, monkeypatch):
    """A hostile `adapter_model.bin` beside the safetensors file is not touched, and `torch.load` is never called."""
    (copied / "adapter_model.bin").write_bytes(b"hostile")

    def load(*args, **kwargs):
        raise AssertionError("Something was unpickled.")

    monkeypatch.setattr(torch, "load", load)
    assert torch.equal(logits(VisionQwen.from_adapter(copied)), logits(trained))
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin, a pickle, .* is never loaded"):
        VisionQwen.from_adapter(copied)


@pytest.mark.parametrize("part", ["clip", "qwen3"])
def test_a_base_that_has_only_pickled_weights_is_refused(bases, tmp_path, part):
    base = Path(shutil.copytree(bases[0].parent / part, tmp_path / part))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    paths = {"clip": bases[0], "qwen3": bases[1]} | {part: base}
    with pytest.raises(OSError, match=rf"{part} has no model\.safetensors, and pickled weights .* are never loaded"):
        load_bases(*paths.values())


# --- wrong and damaged folders ---


def test_a_folder_that_is_no_adapter_is_named_with_what_it_holds(tmp_path, bases):
    with pytest.raises(FileNotFoundError, match=r"The adapter folder .*nowhere is not there"):
        VisionQwen.from_adapter(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json, .* missing; it holds nothing"):
        VisionQwen.from_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no adapter folder: adapter_config\.json.* it holds config\.json"):
        VisionQwen.from_adapter(bases[1])
    assert not is_adapter_folder(bases[1])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "config.json"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no adapter folder: {name} missing"):
        VisionQwen.from_adapter(copied)


def test_a_damaged_file_is_named(copied):
    path = copied / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        VisionQwen.from_adapter(copied)


@pytest.mark.parametrize("value", [True, [5, 6]])
def test_a_lora_that_begins_in_mid_prompt_is_refused(adapter, tmp_path, value):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alora_invocation_tokens": value}))
    with pytest.raises(ValueError, match=r"adapter_config.json: alora_invocation_tokens asks for"):
        VisionQwen.from_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json"])
def test_a_damaged_configuration_is_named(copied, name):
    (copied / name).write_text((copied / name).read_text()[:-20])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        VisionQwen.from_adapter(copied)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_missing_file_of_the_processor_is_named(copied, trained, processor, name):
    processor.save_pretrained(copied)
    assert torch.equal(logits(VisionQwen.from_adapter(copied)), logits(trained))
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no adapter folder: {name} missing"):
        VisionQwen.from_adapter(copied)


def test_a_file_without_the_projector_is_refused(copied):
    path = copied / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "lora" in name}, path)
    with pytest.raises(ValueError, match="holds no projector among its 28 tensors"):
        VisionQwen.from_adapter(copied)


def test_an_adapter_of_another_kind_of_model_is_refused(copied):
    (copied / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ValueError, match="an adapter of a 'qwen3' model, expected 'vision_qwen'"):
        VisionQwen.from_adapter(copied)


def test_an_adapter_of_a_decoder_from_scratch_asks_for_the_decoder(copied):
    config = json.loads((copied / "config.json").read_text()) | {"text_name_or_path": None}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"a decoder that was drawn at random, not loaded: .* text="):
        VisionQwen.from_adapter(copied)


def other_decoder(bases, folder, **fields) -> Path:
    decoder = Qwen3ForCausalLM(Qwen3Config(**{**make_config().text_config.to_dict(), **fields}))
    decoder.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the same shape with other weights"),
        ({"num_hidden_layers": 3, "layer_types": None}, "num_hidden_layers: 2 against 3"),
        ({"vocab_size": 272}, "vocab_size: 264 against 272"),
    ],
)
def test_another_text_base_is_refused(folder, bases, tmp_path, fields, message):
    other = other_decoder(bases, tmp_path / "other", **fields)
    with pytest.raises(ValueError, match=rf"trained on another text base: expected .*qwen3, got .*other \({message}\)"):
        VisionQwen.from_adapter(folder, text=other)


def test_a_refused_base_is_named_with_its_revision(copied, bases, tmp_path):
    config = json.loads((copied / "config.json").read_text()) | {"text_revision": "0a1b2c"}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected .*qwen3 at revision 0a1b2c, got .*other"):
        VisionQwen.from_adapter(copied, text=other_decoder(bases, tmp_path / "other"))


@pytest.mark.parametrize("name", ["text_fingerprint", "vision_fingerprint"])
def test_bases_without_a_fingerprint_are_compared_by_shape(copied, bases, trained, tmp_path, name):
    """Decoders from scratch have none, and so have folders that were saved beside a quantized one in earlier times."""
    config = json.loads((copied / "config.json").read_text()) | {name: None}
    (copied / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(VisionQwen.from_adapter(copied)), logits(trained))
    other = other_decoder(bases, tmp_path / "other", vocab_size=272)
    with pytest.raises(ValueError, match=r"another text base: .*\(vocab_size: 264 against 272\)"):
        VisionQwen.from_adapter(copied, text=other)


def test_another_vision_base_is_refused(folder, bases, tmp_path):
    torch.manual_seed(5)
    from transformers import CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(CLIPVisionConfig(**make_config().vision_config.to_dict())).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"another vision base: .*\(the same shape with other weights\)"):
        VisionQwen.from_adapter(folder, vision=tmp_path / "other")


# --- what trains ---


DECODER_LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("target_modules", "layers"),
    [
        (None, DECODER_LAYERS),
        ("all-linear", DECODER_LAYERS),
        (["all-linear"], DECODER_LAYERS),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["self_attn.q_proj"], ["q_proj"]),
        (r"model\.language_model\..*\.o_proj", ["o_proj"]),
    ],
)
def test_lora_hits_the_decoder_only(model, target_modules, layers):
    """The encoder has layers of the same names."""
    model.model.vision_tower.requires_grad_(False)
    adapted = get_peft_model(model, lora_config(model, target_modules=target_modules))
    hit = {name.partition(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in hit} == set(layers)
    assert all(".language_model." in name for name in hit)
    assert len(hit) == 2 * len(layers)


def test_lora_on_the_encoder_hits_its_numbered_layers_and_gets_gradients(model):
    model.model.vision_tower.requires_grad_(False)
    adapted = get_peft_model(model, lora_config(model, lora_vision=True, r=2, init_lora_weights=False)).train()
    adapted(**batch(), labels=batch()["input_ids"]).loss.backward()
    tower = {
        name: parameter.grad
        for name, parameter in adapted.named_parameters()
        if ".vision_tower." in name and parameter.requires_grad
    }
    # Six linear layers (q, k, v, out, fc1, fc2) of the two layers that are built, A and B of each.
    assert len(tower) == 2 * 6 * 2
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in tower.values())
    other = VisionQwen(make_config())
    both = get_peft_model(other, lora_config(other, lora_vision=True, target_modules=["q_proj"]))
    hit = {name.partition(".lora_")[0] for name, _ in both.named_parameters() if ".lora_A." in name}
    assert len(hit) == 4
    with pytest.raises(ValueError, match=r"hit no layer of the model: .*vision_tower.*gate_proj"):
        lora_config(VisionQwen(make_config()), lora_vision=True, target_modules=["gate_proj"])


def test_pissa_beside_quantized_weights_is_refused(model):
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match="PiSSA starts from the singular vectors of full-precision weights"):
        lora_config(model, init_lora_weights="pissa_niter_4")


def test_impossible_targets_are_refused(model):
    with pytest.raises(ValueError, match="LoRA on lm_head is not supported"):
        lora_config(model, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"hit no layer of the model: .*query"):
        lora_config(model, target_modules=["query"])


def test_the_table_counts_as_a_hand_does(model):
    """16 wide, 32 in the MLP, 2 query heads and 1 key head of 8, vocabulary 264, two layers of each part."""
    model.model.vision_tower.requires_grad_(False)
    adapted = get_peft_model(model, lora_config(model, r=4, target_modules=["q_proj", "v_proj"]))
    layer = 16 * 16 + 2 * (16 * 8) + 16 * 16 + 3 * (16 * 32) + 2 * 16 + 2 * 8
    decoder = 264 * 16 + 2 * layer + 16
    lora = 2 * (4 * (16 + 16) + 4 * (16 + 8))
    tower_layer = 4 * (16 * 16 + 16) + (16 * 32 + 32) + (32 * 16 + 16) + 2 * (16 + 16)
    tower = 16 + 3 * 2 * 2 * 16 + 17 * 16 + 2 * tower_layer + 2 * (16 + 16)
    projector = 2 * (16 * 16 + 16)
    rows = trainable_table(adapted)
    assert rows == [
        TrainableRow("vision_tower", tower, 0, "float32"),
        TrainableRow("multi_modal_projector", projector, projector, "float32"),
        TrainableRow("language_model", decoder + lora, lora, "float32"),
    ]
    total, trained = tower + projector + decoder + lora, projector + lora
    last = format_trainable_table(rows).splitlines()[-1].split()
    assert last == ["total", f"{total:,}", f"{trained:,}", f"{100 * trained / total:.2f}", "%", "trained"]
    check_trainable(rows)


def test_an_untied_head_has_its_own_line():
    text = {**make_config().text_config.to_dict(), "tie_word_embeddings": False}
    rows = {row.module: row for row in trainable_table(VisionQwen(make_config(text_config=text)))}
    assert rows["lm_head"].parameters == 264 * 16


def test_unasked_encoder_training_and_a_dead_projector_are_refused(model):
    model.model.vision_tower.requires_grad_(False)
    into_tower = get_peft_model(model, lora_config(model, r=2, target_modules=r".*\.q_proj"))
    rows = trainable_table(into_tower)
    with pytest.raises(ValueError, match="vision tower has 128 trainable parameters that nobody asked for"):
        check_trainable(rows)
    check_trainable(rows, vision_tower_trains=True)
    dead = [TrainableRow("multi_modal_projector", 9, 0, "float32"), TrainableRow("language_model", 9, 3, "float32")]
    with pytest.raises(ValueError, match=r"projector has no trainable parameters: .* modules_to_save"):
        check_trainable(dead)
