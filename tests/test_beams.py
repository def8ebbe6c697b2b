"""Beam search: token for token the texts of transformers' own, whatever the settings, with less work."""

import threading

import pytest
import torch
from conftest import make_config, make_processor
from torch import nn
from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor

from vlm_peft import VisionQwen
from vlm_peft.evaluation import beams
from vlm_peft.evaluation.beams import beam_search, make_search
from vlm_peft.evaluation.generation import generate_texts

PROMPTS = torch.tensor(
    [
        *[[256, 256, 65, 66, 67], [256, 68, 66, 67, 70], [70, 71, 72, 73, 74], [70, 71, 72, 80, 81]],
        *[[60 + row, 90, 90 - row, 100 + row % 2, 110] for row in range(6)],
    ]
)
MASK = (PROMPTS != 256).long()
ENDS = [*range(0, 256, 5), 258]
"""So many that texts end early, late and not at all."""


@pytest.fixture(scope="module")
def model() -> VisionQwen:
    torch.manual_seed(3)
    model = VisionQwen(make_config()).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(params=["tiles", "written"])
def way(request, monkeypatch) -> str:
    """How the head is computed; tiles of 64 tokens, so that there are several."""
    monkeypatch.setattr(beams, "is_large_on_cpu", lambda weight: request.param == "tiles")
    monkeypatch.setattr(beams, "TILE", 64)
    return request.param


def both(model, rows=10, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and transformers' own."""
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256, "num_beams": 3, "eos_token_id": ENDS}
    arguments |= {"attention_mask": MASK[:rows]} | settings
    ours = model.generate(PROMPTS[:rows], custom_generate=beam_search, **arguments)
    return ours, model.generate(PROMPTS[:rows], **arguments)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
def test_texts_are_those_of_transformers(model, way, early_stopping, length_penalty):
    settings = {"num_beams": 2, "length_penalty": length_penalty}
    ours, expected = both(model, early_stopping=early_stopping, **settings)
    assert torch.equal(ours, expected)
    if early_stopping == "never" and length_penalty > 0:
        assert not torch.equal(ours, both(model, early_stopping=False, **settings)[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2, "rows": 1},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 6},  # more candidates than tokens
        {"eos_token_id": 6, "early_stopping": True},
        {"eos_token_id": None},
        {"eos_token_id": [*range(0, 256, 2)], "num_beams": 2},
        {"max_new_tokens": 1},
        {"max_new_tokens": 25, "early_stopping": True},
        {"suppress_tokens": [259, 3, 5, 7, *range(64, 128)]},
        {"suppress_tokens": [259, 70_000]},
        {"pad_token_id": 258},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_settings(model, way, settings):
    ours, expected = both(model, **settings)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("seed", range(4))
def test_other_models(way, seed):
    torch.manual_seed(seed)
    other = VisionQwen(make_config()).eval()
    other.generation_config.eos_token_id = None
    ours, expected = both(other, early_stopping=True, num_beams=4)
    assert torch.equal(ours, expected)
    lengths = (expected[:, PROMPTS.shape[1] :] != 256).sum(-1)
    assert len(lengths.unique()) > 2


@pytest.mark.parametrize("source", ["pixel_values", "image_features"])
def test_images_are_those_of_the_prompt(model, source):
    processor = make_processor(model.config)
    pictures = torch.randn(3, 3, 8, 8)
    images = pictures if source == "pixel_values" else model.model.get_vision_features(pictures).detach()
    content = [[{"type": "image"}] * count + [{"type": "text", "text": "Go on."}] for count in (2, 0, 1)]
    encoded = [processor.encode_prompt([{"role": "user", "content": each}]) for each in content]
    inputs = processor.tokenizer.pad({"input_ids": encoded}, padding_side="left", return_tensors="pt")
    arguments = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, source: images}
    ours = model.generate(**inputs, custom_generate=beam_search, **arguments)
    assert torch.equal(ours, model.generate(**inputs, **arguments))
    assert not torch.equal(ours, model.generate(**inputs, **arguments | {source: images.flip(0)}))


def test_evaluation_searches_with_it(model, monkeypatch):
    processor = make_processor(model.config)
    pictures = torch.randn(3, 3, 8, 8)
    prompts = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in ("a", "What?")
    ] * 3
    images = [[0], [0], [1], [1], [2], [2]]

    def fetch(ids):
        return {"pixel_values": pictures[ids]}

    def texts(size):
        return generate_texts(
            model, processor, prompts, images, fetch, num_beams=3, max_new_tokens=8, batch_size=size
        )  # fmt: skip

    read = []
    forward = model.model.language_model.forward
    monkeypatch.setattr(
        model.model.language_model,
        "forward",
        lambda **inputs: read.append(inputs["inputs_embeds"].shape[:2]) or forward(**inputs),
    )
    ours = texts(6)
    # The beginnings of the three pictures' prompts, what is left of each prompt, and three beams a row from there.
    assert [len(read), read[0][0], read[1][0]] == [9, 3, 6]
    assert set(read[2:]) == {(6, 3)}
    assert texts(1) == ours
    monkeypatch.setattr(beams, "SuppressTokensLogitsProcessor", MinNewTokensLengthLogitsProcessor)
    assert texts(6) == ours
    assert len(set(ours)) > 3


def test_prompts_whose_search_has_ended_leave_the_batch(model, monkeypatch):
    sizes = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **inputs: sizes.append(len(inputs["input_ids"])) or forward(**inputs)
    )
    ours, expected = both(model, early_stopping=True, max_new_tokens=25)
    assert torch.equal(ours, expected)
    ours = sizes[: sizes.index(30)]
    assert ours[0] == 10
    assert ours[-1] < 5


def test_of_equal_texts_one_is_found(way):
    """Every token has a twin with the same logits, so that each step has ties; which twin is taken is anybody's."""
    torch.manual_seed(5)
    model = VisionQwen(make_config()).eval()
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[128:256] = weight[:128]
    model.generation_config.eos_token_id = None
    ours, expected = (texts[:, PROMPTS.shape[1] :] for texts in both(model, num_beams=2, eos_token_id=None))
    assert torch.equal(ours % 128, expected % 128)


@pytest.mark.parametrize("vocabulary", [8_192 * 2, 20_001])
@pytest.mark.parametrize("banned", [[], [3, 8_193], [*range(8_192, 16_384)]])
def test_tiles_find_what_the_whole_head_finds(vocabulary, banned, monkeypatch):
    head = nn.Linear(24, vocabulary, bias=False)
    hidden, scores = 3 * torch.randn(7, 3, 24), torch.randn(7, 3)
    # The last token, whose block is not full, is the best.
    head.weight.data[-1] = hidden[0, 0]
    found = make_search(head, banned)(hidden, scores, 8)
    monkeypatch.setattr(beams, "is_large_on_cpu", lambda weight: False)
    whole = make_search(head, banned)(hidden, scores, 8)
    # Sums of 20,000 exponentials in another order.
    torch.testing.assert_close(found[0], whole[0], rtol=0, atol=1e-5)
    assert torch.equal(found[1], whole[1])
    assert torch.equal(found[2], whole[2])


def test_threads_share_the_tiles_and_their_number_is_restored():
    seen = []

    def work(buffer, values):
        seen.append(torch.get_num_threads())
        barrier.wait(10)
        if 6 in values:
            raise ValueError("stop")
        return buffer, list(values)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        barrier = threading.Barrier(2)
        assert beams._on_all_cores(work, "ab", range(0, 10, 2)[:3]) == [("a", [0]), ("b", [2, 4])]
        with pytest.raises(ValueError, match="stop"):
            beams._on_all_cores(work, "ab", range(7))
        assert torch.get_num_threads() == 2
        assert seen == [1] * 4
        barrier = threading.Barrier(1)
        assert beams._on_all_cores(work, "ab", range(1)) == [("b", [0])]
        assert seen[4:] == [2]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tiles_are_the_same_for_any_number_of_threads(threads, mode, monkeypatch):
    monkeypatch.setattr(beams, "is_large_on_cpu", lambda weight: True)
    search = make_search(nn.Linear(24, 40_001, bias=False), [7])
    hidden, scores = 3 * torch.randn(7, 3, 24), torch.randn(7, 3)
    expected = search(hidden, scores, 8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mode():
            found = search(hidden.clone(), scores, 8)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def forced(model):
    return {"logits_processor": LogitsProcessorList([MinNewTokensLengthLogitsProcessor(5, 4, ENDS)])}


def eager(model):
    model.set_attn_implementation("eager")
    return {}


def without_cache(model):
    return {"use_cache": False}


def several_outputs(model):
    return {"return_dict_in_generate": True}


def static_cache(model):
    return {"cache_implementation": "static"}


@pytest.mark.parametrize("case", [forced, eager, without_cache, several_outputs, static_cache])
def test_what_it_does_not_know_is_left_to_transformers(case):
    torch.manual_seed(3)
    model = VisionQwen(make_config()).eval()
    model.generation_config.eos_token_id = None
    ours, expected = both(model, **case(model))
    if case is several_outputs:
        ours, expected = ours.sequences, expected.sequences
    assert torch.equal(ours, expected)


def test_sampled_beams_are_left_to_transformers(model):
    torch.manual_seed(0)
    ours, _ = both(model, do_sample=True, top_k=0)
    torch.manual_seed(0)
    arguments = {"attention_mask": MASK, "max_new_tokens": 12, "pad_token_id": 256, "num_beams": 3, "top_k": 0}
    assert torch.equal(ours, model.generate(PROMPTS, do_sample=True, eos_token_id=ENDS, **arguments))
