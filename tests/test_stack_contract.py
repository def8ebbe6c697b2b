"""What the stack asks of a vision-language model beside its loss: features with states, embeddings, one configuration.

The behaviour that transformers' common model tests look for, and peft's prompt learning, which hands over embeddings.
"""

from fnmatch import fnmatchcase

import pytest
import torch
from conftest import make_config
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from stock_llava import IMAGE, assert_close, make_batch, make_llava

from vlm_peft import VisionQwen

LAYERS_BUILT = 2  # vision_feature_layer=-2 of a tower with three


@pytest.fixture
def eager(config) -> VisionQwen:
    """SDPA returns no attentions."""
    return VisionQwen._from_config(config, attn_implementation="eager").eval()


# --- get_image_features ---


@pytest.mark.parametrize("trunk", [True, False])
def test_image_features_come_with_the_towers_states_as_from_llava(eager, trunk):
    pixel_values = torch.randn(2, 3, 8, 8)
    model = eager.model if trunk else eager
    asked = {"output_hidden_states": True, "output_attentions": True}
    outputs = model.get_image_features(pixel_values, **asked)
    llava = make_llava(eager)
    llava.set_attn_implementation("eager")
    expected = llava.get_image_features(pixel_values, **asked)
    assert_close(outputs.pooler_output, torch.stack(list(expected.pooler_output)))
    assert outputs.last_hidden_state.shape == (2, 17, 16)
    # The tower ends where the features are read, so its last state is the one that they are read from.
    assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[LAYERS_BUILT])
    for name, count in (("hidden_states", LAYERS_BUILT + 1), ("attentions", LAYERS_BUILT)):
        assert len(outputs[name]) == count
        for state, stock in zip(outputs[name], expected[name], strict=False):
            assert_close(state, stock)
    spliced = eager(**make_batch(eager) | {"pixel_values": pixel_values}).image_hidden_states
    assert torch.equal(outputs.pooler_output, spliced)


def test_states_of_the_tower_are_kept_only_where_asked_for(eager):
    pixel_values = torch.randn(1, 3, 8, 8)
    outputs = eager.get_image_features(pixel_values)
    assert set(outputs) == {"last_hidden_state", "pooler_output"}
    outputs = eager.get_image_features(pixel_values, output_hidden_states=False, output_attentions=True)
    assert set(outputs) == {"last_hidden_state", "pooler_output", "attentions"}
    eager.config.output_hidden_states = True
    assert len(eager.get_image_features(pixel_values).hidden_states) == LAYERS_BUILT + 1


def test_image_features_are_a_tuple_where_asked_for(model):
    pixel_values = torch.randn(1, 3, 8, 8)
    expected = model.get_image_features(pixel_values)
    batch = make_batch(model)
    generated = model.generate(**batch | {"labels": None}, max_new_tokens=2, do_sample=False)
    for answer in (
        model.get_image_features(pixel_values, return_dict=False),
        model.model.get_image_features(pixel_values, return_dict=False),
    ):
        assert isinstance(answer, tuple)
        assert torch.equal(answer[0], expected.last_hidden_state)
        assert torch.equal(answer[1], expected.pooler_output)
    model.config.return_dict = False
    assert isinstance(model.get_image_features(pixel_values), tuple)
    # The loss and generation read fields by name, whatever the configuration says.
    assert isinstance(model(**batch), tuple)
    assert torch.equal(generated, model.generate(**batch | {"labels": None}, max_new_tokens=2, do_sample=False))


# --- inputs_embeds ---


def embedded(model: VisionQwen, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch with embeddings in place of ids."""
    return {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        **{name: value for name, value in batch.items() if name != "input_ids"},
    }


@pytest.mark.parametrize("cached", [True, False])
def test_embeddings_with_pictures_equal_ids_with_pictures(model, cached):
    batch = make_batch(model, images_per_row=(2, 1))
    if cached:
        batch["image_features"] = model.model.get_vision_features(batch.pop("pixel_values"))
    expected = model(**batch)
    outputs = model(**embedded(model, batch))
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.loss, expected.loss)
    outputs.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0


def test_embeddings_are_compared_in_their_own_dtype(model):
    batch = embedded(model, make_batch(model))
    batch["inputs_embeds"] = batch["inputs_embeds"].to(torch.bfloat16)
    # Under autocast they may come in another dtype than the table's.
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**batch).image_hidden_states.shape == (2, 16, 16)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_from_embeddings_equals_generation_from_ids(model, num_beams):
    batch = make_batch(model)
    del batch["labels"]
    options = {"max_new_tokens": 6, "num_beams": num_beams, "do_sample": False}
    expected = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**embedded(model, batch), **options), expected)


@pytest.mark.parametrize(("images", "message"), [(0, "got 0 images, and placeholders for 2"), (3, "got 3 images")])
def test_placeholders_among_embeddings_need_their_pictures(model, images, message):
    batch = embedded(model, make_batch(model))
    batch["pixel_values"] = torch.randn(images, 3, 8, 8) if images else None
    with pytest.raises(ValueError, match=f"^Image features and image tokens do not match: {message}"):
        model(**batch)


def test_embeddings_of_a_prompt_are_searched_and_those_of_a_step_are_not(model):
    batch = embedded(model, make_batch(model))
    del batch["labels"]
    cache = model(**batch).past_key_values
    placeholder = model.get_input_embeddings()(torch.full((2, 1), IMAGE))
    assert model(inputs_embeds=placeholder, past_key_values=cache).logits.shape == (2, 1, 264)
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="got 0 images, and placeholders for 2"):
        model.generate(**batch, max_new_tokens=2)


def test_positions_say_where_a_placeholder_outside_the_vocabulary_is():
    model = VisionQwen(make_config(image_token_id=5000)).eval()
    batch = make_batch(model)
    is_image = batch["input_ids"] == 259
    batch["input_ids"][is_image] = 5000
    expected = model(**batch).logits
    table = model.get_input_embeddings()
    # What stands at the placeholders is replaced.
    batch["inputs_embeds"] = table(batch.pop("input_ids").masked_fill(is_image, 7))
    assert torch.equal(model(**batch, image_positions=is_image.flatten().nonzero()[:, 0]).logits, expected)
    with pytest.raises(ValueError, match=r"^The placeholder 5000 lies outside the decoder's vocabulary of 264 tokens"):
        model(**batch)
    text_only = {"inputs_embeds": table(torch.randint(0, 255, (1, 5)))}
    assert model(**text_only).logits.shape == (1, 5, 264)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_prompt_learning_trains_with_pictures(model, kind):
    batch = make_batch(model, images_per_row=(1, 2))
    # As collated: of the sequence without the virtual tokens.
    batch["image_positions"] = (batch["input_ids"] == 259).flatten().nonzero()[:, 0]
    adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    # peft freezes the whole model; the projector trains along where it is told to.
    projector = model.model.multi_modal_projector.requires_grad_(True)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(3):
        loss = adapted(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        assert projector.linear_1.weight.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    adapted.eval()
    with torch.inference_mode():
        seen = adapted(**batch).logits
        other = adapted(**batch | {"pixel_values": torch.randn_like(batch["pixel_values"])}).logits
    assert seen.shape[1] == batch["input_ids"].shape[1] + 4
    assert (seen - other).abs().max() > 0.01
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    generated = adapted.generate(**prompt, max_new_tokens=3, do_sample=False)
    # The first token after the prompt is the likeliest one of the pass above.
    likeliest = seen[:, -1].index_fill(-1, torch.tensor(model.config.image_token_id), -torch.inf).argmax(dim=-1)
    assert torch.equal(generated[:, batch["input_ids"].shape[1]], likeliest)


# --- one configuration, one plan ---


@pytest.mark.parametrize("made", ["built", "joined", "loaded"])
def test_parts_hold_the_configurations_that_the_model_holds(model, bases, tmp_path, made):
    if made == "joined":
        model = VisionQwen.from_vision_text_pretrained(*bases, dtype=torch.bfloat16)
    elif made == "loaded":
        model.save_pretrained(tmp_path)
        model = VisionQwen.from_pretrained(tmp_path)
    trunk = model.model
    assert trunk.config is model.config
    assert trunk.vision_tower.config is model.config.vision_config
    assert trunk.language_model.config is model.config.text_config
    # It still says how deep the encoder is, which the tower is not.
    assert model.config.vision_config.num_hidden_layers == 3
    assert len(trunk.vision_tower.encoder.layers) == LAYERS_BUILT
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert made == "built" or model.config.vision_config.dtype == trunk.vision_tower.dtype
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    attention = trunk.vision_tower.encoder.layers[0].self_attn
    assert attention.config._attn_implementation == model.config.vision_config._attn_implementation == "eager"
    assert trunk.get_image_features(torch.randn(1, 3, 8, 8), output_attentions=True).attentions[0] is not None


def test_tensor_parallel_plan_names_the_tied_head_and_modules_that_are_there(model):
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    names = [name for name, _ in model.named_modules()]
    assert any("language_model.layers" in pattern for pattern in model.tp_plan)
    for pattern in model.tp_plan:
        assert any(fnmatchcase(name, pattern) for name in names), pattern
