"""Greedy decoding: the argmax is that of the fp32 logits, however close they are, and texts are those of `generate`."""

import pytest
import torch
from conftest import make_config
from tiny_decoders import MASK, PROMPTS
from torch import nn
from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor

from vlm_peft import VisionQwen
from vlm_peft.model.greedy import ScreenedArgmax, greedy, make_argmax, make_sampler


def exact(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (hidden.double() @ weight.double().T).argmax(-1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_argmax_is_that_of_the_exact_logits(scale):
    weight = torch.randn(20_000, 48) * scale
    hidden = torch.randn(64, 48) / scale
    assert torch.equal(ScreenedArgmax(weight, [])(hidden), exact(hidden, weight))


def test_logits_that_bfloat16_cannot_tell_apart_are_told_apart():
    hidden = torch.randn(64, 48)
    # Around the largest logit of each row lie others, less than a thousandth below it.
    weight = torch.randn(4_000, 48) * 0.01
    for row in range(64):
        best = hidden[row] / hidden[row].norm()
        for place in range(8):
            weight[row * 40 + place] = best * (1 - 2e-5 * (7 - place)) + 1e-6 * torch.randn(48)
    chosen = ScreenedArgmax(weight, [])(hidden)
    assert torch.equal(chosen, exact(hidden, weight))
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).argmax(-1)
    assert (rounded != chosen).sum() > 20


def test_factors_that_bfloat16_rounds_the_wrong_way_are_found():
    down, up = 1 + 0.49 * 2**-7, 1 + 0.51 * 2**-7
    hidden = torch.tensor([[down] * 24 + [up] * 24])
    weight = torch.zeros(4_000, 48)
    # The larger sum is of numbers that are rounded down, the smaller one of numbers that are rounded up.
    weight[5, :24] = down
    weight[9, 24:] = up
    weight[9, 24] = 0.98
    logits, rounded = hidden @ weight.T, (hidden.bfloat16() @ weight.bfloat16().T).float()
    assert logits[0, 5] > logits[0, 9]
    assert rounded[0, 5] < 0.99 * rounded[0, 9]
    assert ScreenedArgmax(weight, [])(hidden).tolist() == [5]


def test_of_equal_logits_the_first_token_is_taken():
    weight = torch.randn(4_000, 16)
    weight[3000] = weight[17] = weight[900] = 5 * torch.ones(16)
    assert ScreenedArgmax(weight, [])(torch.ones(2, 16)).tolist() == [17, 17]


def test_flat_logits_fall_back_to_the_whole_head():
    weight = torch.ones(4_000, 16) + 1e-6 * torch.randn(4_000, 16)
    hidden = torch.ones(3, 16)
    assert torch.equal(ScreenedArgmax(weight, [])(hidden), nn.functional.linear(hidden, weight).argmax(-1))
    assert ScreenedArgmax(torch.zeros(4_000, 16), [0])(hidden).tolist() == [1, 1, 1]


def test_negative_logits_and_banned_tokens():
    hidden = torch.rand(16, 24) + 0.1
    weight = -hidden.mean(0) - torch.rand(2_000, 24) * 0.1
    weight[7] = 9 * torch.ones(24)
    found = ScreenedArgmax(weight, [7])(hidden)
    logits = hidden.double() @ weight.double().T
    logits[:, 7] = -torch.inf
    assert torch.equal(found, logits.argmax(-1))


@pytest.mark.parametrize("faster", ["plain", "screened"])
def test_large_heads_on_a_cpu_are_screened_where_that_is_faster(monkeypatch, faster):
    ways = {}
    monkeypatch.setattr("vlm_peft.model.greedy.fastest", lambda task, candidates: ways.update(candidates) or faster)
    small = VisionQwen(make_config())
    assert not isinstance(make_argmax(small), ScreenedArgmax)
    assert not ways
    small.lm_head = nn.Linear(16, 20_000, bias=False)
    assert isinstance(make_argmax(small), ScreenedArgmax) == (faster == "screened")
    assert torch.equal(ways["plain"](), ways["screened"]())
    hidden = torch.randn(4, 16)
    assert torch.equal(make_argmax(small)(hidden), exact(hidden, small.lm_head.weight))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_with_their_probabilities(temperature, monkeypatch):
    """Chi-square over 20,000 draws of tokens in three tiles: of 263 degrees of freedom, a thousandth lies above 339."""
    monkeypatch.setattr("vlm_peft.model.greedy._SAMPLED_TILE", 100)
    model = VisionQwen(make_config())
    hidden = 0.5 * torch.randn(1, 16)
    logits = (hidden @ model.lm_head.weight.detach().T)[0]
    logits[model.config.image_token_id] = -torch.inf
    expected = 20_000 * torch.softmax(logits / temperature, -1)
    drawn = make_sampler(model, temperature)(hidden.expand(20_000, -1))
    seen = torch.bincount(drawn, minlength=264)
    assert seen[model.config.image_token_id] == 0
    assert (expected > 5).sum() == 263
    statistic = ((seen - expected) ** 2 / expected)[expected > 0].sum()
    assert 180 < statistic < 339
    # The other temperature would be seen.
    other = 20_000 * torch.softmax(logits, -1)
    assert ((seen - other) ** 2 / other)[other > 0].sum() > 339


@pytest.fixture(scope="module")
def model() -> VisionQwen:
    torch.manual_seed(1)
    return VisionQwen(make_config()).eval()


def first_ends(model: VisionQwen, new_tokens: int = 12) -> int:
    """A token that ends one text before the others, and others before the last step."""
    model.generation_config.eos_token_id = None
    texts = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=new_tokens, do_sample=False, pad_token_id=256)
    texts = texts[:, PROMPTS.shape[1] :].tolist()

    def ends(token: int) -> list[int]:
        return sorted(text.index(token) for text in texts if token in text)

    candidates = {token for text in texts for token in text}
    alone = [token for token in candidates if len(ends(token)) > 3 and 0 <= ends(token)[0] < ends(token)[1]]
    assert alone
    return min(alone, key=lambda token: ends(token)[3])


@pytest.mark.parametrize("chosen", [True, False])
def test_texts_are_those_of_generate_and_ended_ones_leave_the_batch(model, chosen, monkeypatch):
    end = first_ends(model)
    arguments = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    expected = model.generate(PROMPTS, eos_token_id=end, **arguments)
    sizes = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **inputs: sizes.append(len(inputs["input_ids"])) or forward(**inputs)
    )
    choose = make_argmax(model) if chosen else None
    found = model.generate(PROMPTS, eos_token_id=end, custom_generate=greedy, choose=choose, **arguments)
    assert torch.equal(found, expected)
    assert sizes[0] == len(PROMPTS)
    assert sizes[-1] < len(PROMPTS)


def test_other_tokens_that_are_suppressed_stay_away(model):
    arguments = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 256}
    model.generation_config.eos_token_id = None
    said = model.generate(PROMPTS, **arguments)[:, PROMPTS.shape[1] :].unique().tolist()
    banned = [model.config.image_token_id, *said]
    expected = model.generate(PROMPTS, suppress_tokens=banned, **arguments)
    found = model.generate(
        PROMPTS, suppress_tokens=banned, custom_generate=greedy, choose=make_argmax(model), **arguments
    )
    assert torch.equal(found, expected)


def test_other_processors_of_logits_are_obeyed(model):
    end = first_ends(model)
    arguments = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    processors = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(PROMPTS.shape[1], 6, end)])
    expected = model.generate(PROMPTS, eos_token_id=end, logits_processor=processors, **arguments)
    assert not torch.equal(expected, model.generate(PROMPTS, eos_token_id=end, **arguments))
    found = model.generate(
        PROMPTS,
        eos_token_id=end,
        logits_processor=processors,
        custom_generate=greedy,
        choose=make_argmax(model),
        **arguments,
    )
    assert torch.equal(found, expected)
