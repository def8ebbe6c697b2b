"""Quantized decoders on a CPU: what is quantized, what trains beside it, and which bases an adapter fits."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import get_peft_model
from tiny_runs import NF4, VARIANTS, encoded_rows, load_bases, logits, losses, make_trainer, wide_config
from transformers import BitsAndBytesConfig, Qwen3ForCausalLM

from vlm_peft import VisionQwen
from vlm_peft.adapters.lora import lora_config, trainable_table
from vlm_peft.training.arguments import parse_arguments
from vlm_peft.training.setup import build_trainer, load_model

FORMATS = {"4bit": NF4, "8bit": {"load_in_8bit": True}}
LINEAR = "layers.1.mlp.down_proj"


@pytest.fixture(params=FORMATS)
def quantization(request) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**FORMATS[request.param])


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**NF4)


def test_only_the_decoders_linear_layers_are_quantized(wide_bases, quantization):
    model = load_bases(wide_bases, quantization_config=quantization)
    packed = {name for name, parameter in model.named_parameters() if not parameter.is_floating_point()}
    assert len(packed) == 2 * 7
    assert all(".language_model.layers." in name and "_proj." in name for name in packed)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_table_names_the_storage_and_counts_weights_not_bytes(wide_bases):
    rows = {row.module: row for row in trainable_table(load_bases(wide_bases, quantization_config=nf4()))}
    full = {row.module: row for row in trainable_table(load_bases(wide_bases))}
    assert {name: row.parameters for name, row in rows.items()} == {name: row.parameters for name, row in full.items()}
    assert rows["language_model"].dtypes == "float32, nf4 (uint8)"
    assert rows["multi_modal_projector"].dtypes == rows["vision_tower"].dtypes == "float32"


def test_quantized_weights_are_close_to_those_of_the_checkpoint(wide_bases):
    """Normal weights in blocks of 64 lose about 9 % in NF4 (arXiv 2305.14314)."""
    full = load_bases(wide_bases).model.language_model.get_parameter(f"{LINEAR}.weight")
    packed = load_bases(wide_bases, quantization_config=nf4()).model.language_model.get_parameter(f"{LINEAR}.weight")
    restored = dequantize_4bit(packed.data, packed.quant_state)
    assert (restored - full).norm() / full.norm() < 0.11


def test_evaluation_leaves_packed_weights_and_gradients_as_they_are(wide_bases):
    """Otherwise bitsandbytes repacks them on some CPUs, and the next training step has no gradient."""
    model = load_bases(wide_bases, quantization_config=nf4())
    adapted = get_peft_model(model, lora_config(model, r=2, init_lora_weights=False))
    packed = model.model.language_model.get_parameter(f"{LINEAR}.base_layer.weight")
    before = packed.data.clone()
    first = logits(adapted)
    assert torch.equal(packed.data, before)
    adapted.train()
    generator = torch.Generator().manual_seed(3)
    pixel_values = torch.randn(1, 3, 8, 8, generator=generator)
    input_ids = torch.tensor([[1, *[259] * 16, 5, 6, 7]])
    adapted(input_ids=input_ids, pixel_values=pixel_values, labels=input_ids).loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)
    assert torch.equal(logits(adapted), first)


def test_what_trains_beside_quantized_weights_stays_in_float32_and_learns(wide_bases, quantization, tmp_path):
    """TRL rounds LoRA and projector to bfloat16."""
    trainer = make_trainer(tmp_path, load_bases(wide_bases, quantization_config=quantization), {})
    projector = trainer.model.get_base_model().model.multi_modal_projector
    start = projector.modules_to_save["default"].linear_1.weight.detach().clone()
    trained = {name: each for name, each in trainer.model.named_parameters() if each.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    trainer.train()
    history = losses(trainer)
    assert history[6] < history[1]
    assert not torch.equal(projector.modules_to_save["default"].linear_1.weight, start)
    trainer.save_model()
    loaded = VisionQwen.from_adapter(tmp_path, quantization_config=quantization)
    assert torch.equal(logits(loaded), logits(trainer.model))


def test_a_given_adapter_is_not_rounded_when_it_goes_on_training(wide_bases, tmp_path):
    model = load_bases(wide_bases, quantization_config=nf4())
    adapted = get_peft_model(model, lora_config(model, r=4, init_lora_weights=False))
    before = {name: each.detach().clone() for name, each in adapted.named_parameters() if each.requires_grad}
    trainer = make_trainer(tmp_path, adapted, None)
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trainers_head_scores_as_the_models_own_beside_a_quantized_trunk(wide_bases, tmp_path, dtype):
    model = load_bases(wide_bases, quantization_config=nf4(), dtype=dtype)
    trainer = make_trainer(tmp_path, model, {}, max_steps=1, save_strategy="no", per_device_train_batch_size=4)
    trainer.model.eval()
    with torch.inference_mode():
        expected = trainer.model(**trainer.data_collator(list(trainer.train_dataset))).loss
    trainer.train()
    assert model.lm_head.weight.dtype == dtype
    assert losses(trainer)[1] == pytest.approx(float(expected), rel=1e-4 if dtype == torch.float32 else 2e-2)


def test_an_adapter_fits_its_base_quantized_or_not_and_no_other(wide_bases, tmp_path):
    trained = {}
    for name, arguments in (("qlora", {"quantization_config": nf4()}), ("lora", {})):
        trainer = make_trainer(tmp_path / name, load_bases(wide_bases, **arguments), VARIANTS[name], max_steps=2)
        trainer.train()
        trainer.save_model()
        trained[name] = trainer
    on_full, on_packed = logits(VisionQwen.from_adapter(tmp_path / "qlora")), logits(trained["qlora"].model)
    # The adapter is the same; the weights below it differ by what NF4 rounds.
    assert 0 < (on_full - on_packed).abs().max() < on_full.abs().max()
    assert torch.corrcoef(torch.stack([on_full.flatten(), on_packed.flatten()]))[0, 1] > 0.9
    VisionQwen.from_adapter(tmp_path / "lora", quantization_config=nf4())
    torch.manual_seed(9)
    Qwen3ForCausalLM(wide_config()).save_pretrained(tmp_path / "other")
    for arguments in ({}, {"quantization_config": nf4()}):
        for name in trained:
            with pytest.raises(ValueError, match=r"another text base: .*\(the same shape with other weights"):
                VisionQwen.from_adapter(tmp_path / name, text=tmp_path / "other", **arguments)


def test_the_fingerprint_is_that_of_the_full_weights_in_one_file_or_several(wide_bases, quantization, tmp_path):
    expected = load_bases(wide_bases).config.text_fingerprint
    Qwen3ForCausalLM.from_pretrained(wide_bases[1]).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for qwen3 in (wide_bases[1], tmp_path):
        model = load_bases((wide_bases[0], qwen3), quantization_config=quantization)
        assert model.config.text_fingerprint == expected


def test_merging_into_quantized_weights_is_refused(wide_bases, tmp_path, quantization):
    with pytest.raises(ValueError, match=r"merge into the full weights .* or keep merge=False"):
        VisionQwen.from_adapter(tmp_path, merge=True, quantization_config=quantization)


def test_widths_that_the_cpu_restores_wrongly_are_refused(bases):
    """The decoder of the other tests is 16 wide."""
    with pytest.raises(ValueError, match=r"multiple of 64: model\.layers\.0\.self_attn\.q_proj has 16\. Load in 8"):
        VisionQwen.from_vision_text_pretrained(*bases, image_token_id=259, quantization_config=nf4())


def test_a_quantized_head_is_refused(wide_bases, tmp_path):
    torch.manual_seed(0)
    Qwen3ForCausalLM(wide_config(tie_word_embeddings=False)).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**NF4, llm_int8_skip_modules=["o_proj"])
    with pytest.raises(ValueError, match=r"head is quantized, .* add 'lm_head' to llm_int8_skip_modules"):
        load_bases((wide_bases[0], tmp_path), quantization_config=config)


def test_options_of_a_run_reach_quantization_and_every_kind_of_lora(wide_bases, flickr, tmp_path):
    options = ["--dataset_name", str(flickr), "--vision_model", str(wide_bases[0]), "--use_peft", "--use_dora"]
    options += ["--model_name_or_path", str(wide_bases[1]), "--load_in_4bit", "--use_bnb_nested_quant", "--use_rslora"]
    options += ["--lora_vision", "--vision_learning_rate", "0.25", "--loraplus_lr_ratio", "16", "--bf16", "false"]
    options += ["--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none", "--learning_rate", "0.01"]
    vision, training, model_args = parse_arguments(options)
    model, _ = load_model(vision, model_args)
    model.config.image_token_id = 259
    rows, processor = encoded_rows(model)
    trainer = build_trainer(vision, training, model_args, model, processor, rows, lambda ids: {})
    lora = trainer.model.active_peft_config
    assert (lora.use_dora, lora.use_rslora, lora.init_lora_weights) == (True, True, True)
    table = {row.module: row for row in trainable_table(trainer.model)}
    assert table["language_model"].dtypes == "float32, nf4 (uint8)"
    assert table["vision_tower"].trainable > 0
    weight = model.model.language_model.get_parameter(f"{LINEAR}.base_layer.weight")
    assert weight.quant_state.nested
    groups = trainer.create_optimizer().param_groups
    assert {group["lr"] for group in groups if group["params"]} == {0.01, 0.16, 0.25, 4.0}
    pissa = parse_arguments([*options, "--init_lora_weights", "pissa"])
    with pytest.raises(ValueError, match="PiSSA starts from the singular vectors"):
        build_trainer(*pissa, model, processor, rows, lambda ids: {})
