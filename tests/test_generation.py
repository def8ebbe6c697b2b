"""Generation: batches give what single prompts give, in order, without the prompt, and each picture is encoded once."""

import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import make_config, make_processor
from peft import get_peft_model

from vlm_peft import VisionQwen
from vlm_peft.adapters.lora import lora_config
from vlm_peft.data.probe import probe
from vlm_peft.evaluation.generation import generate_ids, generate_texts
from vlm_peft.model.modeling_vision_qwen import VisionQwenModel

PICTURE = {"type": "image"}


def ask(text: str, images: int = 1) -> list[dict]:
    return [{"role": "user", "content": [*[PICTURE] * images, {"type": "text", "text": text}]}]


PROMPTS = [ask("What is to be seen in this picture?"), ask("a", 2), ask("Go on.", 0), ask("b"), ask("Which one?", 2)]
IMAGE_IDS = [[0], [1, 2], [], [3], [2, 0]]


@pytest.fixture(scope="module")
def world():
    """A model whose texts differ from prompt to prompt, pictures, and their features."""
    torch.manual_seed(2)
    config = make_config()
    model = VisionQwen(config).eval()
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data.normal_(std=0.6)
    model.generation_config.eos_token_id = None
    # Tried once for each model; what it reads is not to be counted below.
    probe(model)
    pixel_values = torch.randn(4, 3, 8, 8)
    features = model.model.get_vision_features(pixel_values).detach()
    return SimpleNamespace(
        model=model,
        processor=make_processor(config),
        from_pixels=lambda ids: {"pixel_values": pixel_values[ids]},
        from_features=lambda ids: {"image_features": features[ids]},
    )


def tokens(world, fetch, batch_size, num_beams, model=None) -> list[list[int]]:
    """Generated tokens of each prompt, up to and with the end of the turn."""
    encoded = [world.processor.encode_prompt(prompt) for prompt in PROMPTS]
    return generate_ids(
        model or world.model, world.processor, encoded, IMAGE_IDS, fetch,
        batch_size=batch_size, max_new_tokens=12, num_beams=num_beams,
    )  # fmt: skip


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("source", ["from_pixels", "from_features"])
def test_a_batch_equals_one_by_one_token_for_token(world, source, num_beams):
    fetch = getattr(world, source)
    single = tokens(world, fetch, 1, num_beams)
    assert tokens(world, fetch, 8, num_beams) == single
    assert tokens(world, fetch, 2, num_beams) == single
    assert tokens(world, world.from_features, 8, num_beams) == single
    assert len({tuple(row) for row in single}) == len(PROMPTS)


def test_texts_equal_those_of_generate_on_each_prompt_alone(world):
    """Against the model's own `generate`, so that order, echo and pictures are all checked at once."""
    texts = generate_texts(
        world.model, world.processor, PROMPTS, IMAGE_IDS, world.from_pixels, batch_size=3, max_new_tokens=12
    )
    for prompt, images, text in zip(PROMPTS, IMAGE_IDS, texts, strict=True):
        input_ids = torch.tensor([world.processor.encode_prompt(prompt)])
        pictures = world.from_pixels(images) if images else {}
        generated = world.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            **pictures,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=258,
            pad_token_id=256,
        )[0, input_ids.shape[1] :]
        assert text == world.processor.tokenizer.decode(generated, skip_special_tokens=True).strip()
        assert "What is to be seen" not in text


def test_the_picture_matters(world):
    """Otherwise the tests above would pass with pictures in any order."""
    texts = [
        generate_texts(world.model, world.processor, [ask("b")], [[index]], world.from_pixels, max_new_tokens=12)[0]
        for index in range(4)
    ]
    assert len(set(texts)) > 1


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_picture_is_fetched_and_encoded_once(world, monkeypatch, num_beams, batch_size):
    encoded, fetched = [], []
    original = type(world.model.model).get_vision_features

    def counted(self, pixel_values):
        encoded.append(len(pixel_values))
        return original(self, pixel_values)

    def fetch(ids):
        fetched.extend(ids)
        return world.from_pixels(ids)

    monkeypatch.setattr(type(world.model.model), "get_vision_features", counted)
    tokens(world, fetch, batch_size, num_beams)
    assert sorted(fetched) == [0, 1, 2, 3]
    assert sum(encoded) == 4


def test_an_adapted_model_generates_with_its_adapter(world):
    base = VisionQwen(world.model.config).eval()
    base.load_state_dict(world.model.state_dict())
    adapted = get_peft_model(base, lora_config(base, r=4)).eval()
    plain = tokens(world, world.from_pixels, 8, 1)
    assert tokens(world, world.from_pixels, 8, 1, adapted) == plain
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    changed = tokens(world, world.from_pixels, 8, 1, adapted)
    assert changed != plain
    assert tokens(world, world.from_features, 1, 1, adapted) == changed


def test_no_prompts_give_no_texts(world):
    assert generate_texts(world.model, world.processor, [], [], world.from_pixels) == []


QUESTIONS = ["What?", "What is this here?", "Who", "What is it", "Which one is it?"]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_prompts_about_one_picture_read_it_once_and_equal_single_prompts(world, num_beams, batch_size, monkeypatch):
    prompts = [ask(text) for text in QUESTIONS] + [ask(text) for text in QUESTIONS[:3]] + [ask("a", 2)]
    images = [[0]] * 5 + [[1]] * 3 + [[2, 3]]
    read = []
    forward = VisionQwenModel.forward

    @functools.wraps(forward)
    def counted(self, *args, **kwargs):
        read.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(VisionQwenModel, "forward", counted)

    def texts(size):
        read.clear()
        found = generate_texts(
            world.model, world.processor, prompts, images, world.from_features,
            batch_size=size, max_new_tokens=12, num_beams=num_beams,
        )  # fmt: skip
        return found, sum(read)

    single = [
        generate_texts(
            world.model, world.processor, [prompt], [ids], world.from_features, max_new_tokens=12, num_beams=num_beams
        )[0]
        for prompt, ids in zip(prompts, images, strict=True)
    ]
    monkeypatch.setattr("vlm_peft.evaluation.generation.common_prefix", lambda sequences: [])
    plain, tokens_read = texts(batch_size)
    monkeypatch.undo()
    monkeypatch.setattr(VisionQwenModel, "forward", counted)
    shared, fewer = texts(batch_size)
    assert shared == plain == single
    assert len(set(shared)) > 3
    assert fewer < tokens_read


def test_the_placeholder_is_never_generated(world):
    """A decoder may predict a token of its vocabulary; this one would ask for a picture in the middle of the answer."""
    placeholder = world.model.config.image_token_id
    input_ids = torch.tensor([world.processor.encode_prompt(ask("b"))])
    wanted = [[[placeholder], 1e4]]
    generated = world.model.generate(
        input_ids=input_ids, **world.from_pixels([3]), sequence_bias=wanted, max_new_tokens=4, do_sample=False
    )
    assert placeholder not in generated[0, input_ids.shape[1] :].tolist()


def test_texts_are_drawn_where_a_temperature_is_given(world):
    def texts(**settings):
        torch.manual_seed(7)
        prompts, images = [ask("b")] * 6, [[0]] * 6
        return generate_texts(
            world.model, world.processor, prompts, images, world.from_pixels, max_new_tokens=8, **settings
        )

    drawn = texts(temperature=1.0)
    assert len(set(drawn)) > 1
    assert texts(temperature=1.0) == drawn
    assert texts(temperature=1e-4) == texts()
    with pytest.raises(ValueError, match="expects a temperature above 0 and 1 beam, got temperature 0 and 1 beams"):
        texts(temperature=0)
    with pytest.raises(ValueError, match=r"temperature 1\.0 and 2 beams"):
        texts(temperature=1.0, num_beams=2)
