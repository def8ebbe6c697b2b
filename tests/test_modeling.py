"""The model against `LlavaForConditionalGeneration` with the same weights, and its own contracts."""

import pytest
import torch
from conftest import make_config
from stock_llava import IMAGE, assert_close, make_batch, make_llava
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    Dinov2Config,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    ViTConfig,
)

from vlm_peft import VisionQwen, VisionQwenConfig


# Every value of each, every pair of layer and class token, each layer with two picture counts.
@pytest.mark.parametrize(
    ("layer", "keep_class_token", "images_per_row"),
    [
        (-2, False, (1, 1)),
        (-2, True, (2, 1)),
        (-1, False, (2, 2)),
        (-1, True, (0, 1)),
        ([0, -2], False, (2, 1)),
        ([0, -2], True, (1, 1)),
        (1, False, (0, 1)),
        (1, True, (2, 2)),
    ],
)
def test_logits_loss_and_every_gradient_equal_llava(layer, keep_class_token, images_per_row):
    model = VisionQwen(make_config(vision_feature_layer=layer, keep_class_token=keep_class_token)).eval()
    llava = make_llava(model)
    batch = make_batch(model, images_per_row)
    ours, theirs = model(**batch), llava(**batch)
    real = batch["attention_mask"].bool()
    assert_close(ours.logits[real], theirs.logits[real])
    assert_close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    stock = dict(llava.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        expected = stock[name].grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            assert_close(parameter.grad, expected)
            compared += 1
    assert compared > 20


def test_text_only_batch_equals_llava(model):
    llava = make_llava(model)
    batch = make_batch(model, (0, 0))
    assert_close(model(**batch).loss, llava(**batch).loss)


@pytest.mark.parametrize("images_per_row", [(1, 1), (2, 1), (0, 2)])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_equals_llava_token_by_token(model, images_per_row, num_beams):
    llava = make_llava(model)
    batch = make_batch(model, images_per_row)
    batch.pop("labels")
    arguments = {"max_new_tokens": 8, "do_sample": False, "num_beams": num_beams, "output_scores": True}
    arguments |= {"return_dict_in_generate": True, "eos_token_id": None}
    # Ours never generates the placeholder.
    ours = model.generate(**batch, **arguments)
    theirs = llava.generate(**batch, **arguments, suppress_tokens=[model.config.image_token_id])
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for mine, stock in zip(ours.scores, theirs.scores, strict=True):
        finite = torch.isfinite(stock)
        assert_close(mine[finite], stock[finite])


def test_kv_cache_steps_equal_full_forward(model):
    batch = make_batch(model, (1, 1), (7, 7))
    batch.pop("labels")
    full = model(**batch).logits
    cut = batch["input_ids"].shape[1] - 3
    first = model(
        input_ids=batch["input_ids"][:, :cut],
        attention_mask=batch["attention_mask"][:, :cut],
        pixel_values=batch["pixel_values"],
        use_cache=True,
    )
    assert_close(first.logits, full[:, :cut])
    cache = first.past_key_values
    for step in range(cut, cut + 3):
        output = model(
            input_ids=batch["input_ids"][:, step : step + 1],
            attention_mask=batch["attention_mask"][:, : step + 1],
            past_key_values=cache,
        )
        assert_close(output.logits[:, 0], full[:, step])


def test_encoder_layers_above_the_chosen_one_are_not_built():
    assert len(VisionQwen(make_config(vision_feature_layer=1)).model.vision_tower.encoder.layers) == 1
    assert len(VisionQwen(make_config(vision_feature_layer=[-3, -2])).model.vision_tower.encoder.layers) == 2
    assert VisionQwen(make_config(vision_feature_layer=1)).config.vision_config.num_hidden_layers == 3


def test_feature_k_is_spliced_at_placeholder_k(model):
    batch = make_batch(model, (2, 1))
    batch.pop("labels")
    image_tokens = model.get_image_features(batch["pixel_values"]).pooler_output
    embeds = model.model._splice(batch["input_ids"], image_tokens)
    is_image = batch["input_ids"] == IMAGE
    assert torch.equal(embeds[is_image], image_tokens.flatten(0, 1))
    assert torch.equal(embeds[~is_image], model.get_input_embeddings()(batch["input_ids"][~is_image]))


def test_cached_image_features_equal_pixel_values(model):
    batch = make_batch(model, (1, 2))
    features = model.model.get_vision_features(batch["pixel_values"])
    expected = model(**batch).logits
    batch.pop("pixel_values")
    assert torch.equal(model(**batch, image_features=features).logits, expected)
    batch.pop("labels")
    arguments = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    from_features = model.generate(**batch, image_features=features, **arguments)
    assert from_features.shape[1] > batch["input_ids"].shape[1]


def test_logits_at_label_positions_equal_full_logits(model):
    batch = make_batch(model, (1, 1))
    labels = batch.pop("labels")
    full = model(**batch, labels=labels)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    positions = (shifted != -100).nonzero().flatten()
    cut = model(**batch, label_positions=positions, shift_labels=shifted[positions][None])
    assert_close(cut.logits[0], full.logits.flatten(0, 1)[positions])
    assert_close(cut.loss, full.loss)


@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_joins_neighbouring_patches(factor):
    from vlm_peft.model.projector import pixel_shuffle

    grid = torch.arange(16.0).reshape(1, 16, 1)
    folded = pixel_shuffle(grid, factor)
    assert folded.shape == (1, 16 // factor**2, factor**2)
    if factor == 2:
        assert folded[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("projector_type", ["linear", "mlp"])
def test_pixel_shuffle_model_runs_and_shortens(projector_type):
    model = VisionQwen(make_config(pixel_shuffle_factor=2, projector_type=projector_type)).eval()
    assert model.config.num_image_tokens == 4
    batch = make_batch(model)
    model(**batch).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.model.multi_modal_projector.parameters())


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWERS = [
    SiglipVisionConfig(**SMALL, image_size=8, patch_size=2),
    ViTConfig(**SMALL, image_size=8, patch_size=2),
    Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=2),
]


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.model_type)
@pytest.mark.parametrize("keep_class_token", [False, True])
def test_other_vision_towers_give_the_counted_tokens(tower, keep_class_token):
    model = VisionQwen(make_config(vision_config=tower.to_dict(), keep_class_token=keep_class_token)).eval()
    features = model.model.get_vision_features(torch.randn(2, 3, 8, 8))
    assert features.shape == (2, model.config.num_vision_tokens, 16)
    model(**make_batch(model)).loss.backward()


DECODERS = [
    LlamaConfig(**SMALL, vocab_size=264, num_key_value_heads=2),
    GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=264),
]


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.model_type)
def test_other_decoders_train_and_generate(decoder):
    model = VisionQwen(make_config(text_config=decoder.to_dict())).eval()
    batch = make_batch(model)
    model(**batch).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    batch.pop("labels")
    assert model.generate(**batch, max_new_tokens=2, eos_token_id=None).shape[1] == batch["input_ids"].shape[1] + 2


def test_placeholder_id_may_lie_outside_the_vocabulary():
    model = VisionQwen(make_config(image_token_id=300)).eval()
    input_ids = torch.tensor([[1, *[300] * 16, 2]])
    assert torch.isfinite(model(input_ids=input_ids, pixel_values=torch.randn(1, 3, 8, 8)).logits).all()


def test_gradient_checkpointing_gives_the_same_gradients(model):
    batch = make_batch(model)
    model(**batch).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable()
    model.train()
    model(**batch, use_cache=False).loss.backward()
    for name, gradient in expected.items():
        assert_close(dict(model.named_parameters())[name].grad, gradient)


def test_frozen_tower_stays_in_evaluation_mode(model):
    model.train()
    assert model.model.vision_tower.training
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert not model.model.vision_tower.training
    assert model.model.language_model.training


@pytest.mark.parametrize(
    ("input_ids", "images", "message"),
    [
        ([[1, *[IMAGE] * 16, 2]], 2, r"got 2 images, and placeholders for 1 images \(16 tokens, 16 per image\)"),
        ([[1, *[IMAGE] * 12, 2]], 1, "got 1 images, and placeholders for 0.75 images"),
        ([[1, *[IMAGE] * 16, 2]], 0, "got 0 images, and placeholders for 1 images"),
    ],
)
def test_mismatching_placeholders_are_counted_in_images(model, input_ids, images, message):
    pixel_values = torch.randn(images, 3, 8, 8) if images else None
    with pytest.raises(ValueError, match="Image features and image tokens do not match: " + message):
        model(input_ids=torch.tensor(input_ids), pixel_values=pixel_values)


def test_pictures_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match=r"\(images, 3, 8, 8\) in pixels, got \(1, 3, 16, 16\)"):
        model(input_ids=torch.tensor([[IMAGE] * 16]), pixel_values=torch.randn(1, 3, 16, 16))


def test_features_of_another_encoder_are_refused(model):
    with pytest.raises(ValueError, match="another encoder, layer or class-token setting"):
        model(input_ids=torch.tensor([[IMAGE] * 16]), image_features=torch.randn(1, 17, 16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_feature_layer": 4}, "select from 4 hidden states, -4 to 3, got 4"),
        ({"pixel_shuffle_factor": 3}, "expected a divisor of 4 patches, got 3"),
        ({"pixel_shuffle_factor": 0}, "expected a divisor of 4 patches, got 0"),
        ({"pixel_shuffle_factor": -1}, "expected a divisor of 4 patches, got -1"),
        ({"pixel_shuffle_factor": 2, "keep_class_token": True}, "cannot hold the class token"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


@pytest.fixture
def bases(tmp_path, config):
    """A CLIP pair and a Qwen3 decoder as folders."""
    clip = CLIPModel(
        CLIPConfig(
            vision_config=config.vision_config.to_dict(), text_config=CLIPTextConfig(**SMALL, vocab_size=99).to_dict()
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    decoder = Qwen3ForCausalLM(Qwen3Config(**config.text_config.to_dict()))
    decoder.save_pretrained(tmp_path / "qwen3")
    return clip, decoder


def test_from_vision_text_pretrained_loads_both_parts(tmp_path, bases):
    clip, decoder = bases
    model = VisionQwen.from_vision_text_pretrained(tmp_path / "clip", tmp_path / "qwen3", image_token_id=IMAGE)
    pixel_values = torch.randn(2, 3, 8, 8)
    expected = clip.vision_model(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(model.model.get_vision_features(pixel_values), expected)
    input_ids = torch.randint(0, 255, (1, 9))
    assert torch.equal(model(input_ids=input_ids).logits, decoder(input_ids=input_ids).logits)
    assert model.config.text_name_or_path == str(tmp_path / "qwen3")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]


def test_decoder_from_scratch(tmp_path, bases):
    _, decoder = bases
    model = VisionQwen.from_vision_text_pretrained(tmp_path / "clip", text_config=decoder.config, image_token_id=IMAGE)
    assert model.config.text_name_or_path is None
    assert not torch.equal(model.lm_head.weight, decoder.lm_head.weight)
    with pytest.raises(ValueError, match="exactly one of text"):
        VisionQwen.from_vision_text_pretrained(tmp_path / "clip")


def test_full_save_reloads_through_auto_class_with_equal_logits(tmp_path, bases):
    model = VisionQwen.from_vision_text_pretrained(
        tmp_path / "clip", tmp_path / "qwen3", image_token_id=IMAGE, vision_feature_layer=1
    )
    model.save_pretrained(tmp_path / "full")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "full")
    assert isinstance(loaded, VisionQwen)
    assert isinstance(loaded.config, VisionQwenConfig)
    batch = make_batch(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
