"""The decoding steps that CUDA replays: texts are those of plain greedy and beam search, from batch to batch."""

import pytest
import torch
from conftest import make_config
from host_reads import HostReads

from vlm_peft import VisionQwen
from vlm_peft.evaluation.beams import beam_search
from vlm_peft.model.cuda import generation
from vlm_peft.model.cuda.generation import CapturedBeams, CapturedGreedy
from vlm_peft.model.greedy import greedy, make_argmax

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def prompts(rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Left-padded prompts."""
    ids = torch.randint(0, 250, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 256).to(device), "attention_mask": mask.to(device)}


@pytest.mark.parametrize("device", DEVICES)
def test_texts_are_those_of_greedy_search_from_batch_to_batch(device):
    model = VisionQwen(make_config()).eval().to(device)
    choose = make_argmax(model)
    captured = CapturedGreedy(batch_size=5)
    ended = 0
    # A smaller batch, then longer texts than the first cache has room for.
    for rows, length, new in [(5, 4, 20), (3, 7, 20), (1, 2, 1), (5, 9, 300), (4, 4, 20)]:
        batch = prompts(rows, length, device)
        for eos in (None, [7], [65, 66, 67, 70, 80, 90, 100, 110]):
            arguments = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 256, "eos_token_id": eos or [999]}
            model.generation_config.eos_token_id = None
            expected = model.generate(**batch, custom_generate=greedy, choose=choose, **arguments)
            found = model.generate(**batch, custom_generate=captured, choose=choose, **arguments)
            assert torch.equal(found, expected)
            ended += int((found[:, length:] == 256).any())
    assert ended > 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{}, {"early_stopping": True, "length_penalty": 2.0}, {"num_return_sequences": 3}])
def test_texts_are_those_of_beam_search_from_batch_to_batch(settings, device):
    torch.manual_seed(3)
    model = VisionQwen(make_config()).eval().to(device)
    captured, steps = CapturedBeams(batch_size=5, num_beams=3), []
    step = captured.step
    captured.step = lambda *arguments: steps.append(None) or step(*arguments)
    ended = 0
    # A smaller batch, then longer texts than the first cache has room for, then more prompts than it was made for.
    for rows, length, new in [(5, 4, 20), (3, 7, 20), (1, 2, 1), (5, 9, 110), (4, 4, 20), (6, 4, 20)]:
        batch = prompts(rows, length, device)
        for eos in ([999], [7], [*range(0, 256, 3)]):
            arguments = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 256, "eos_token_id": eos}
            arguments |= {"num_beams": 3, **settings}
            model.generation_config.eos_token_id = None
            steps.clear()
            found = model.generate(**batch, custom_generate=beam_search, captured=captured, **arguments)
            assert bool(steps) == (rows < 6 and new > 1)
            assert torch.equal(found, model.generate(**batch, **arguments))
            ended += int((found[:, length:] == 256).any())
    assert ended > 2


def test_what_is_captured_reads_nothing_on_the_host(monkeypatch):
    """A graph cannot be captured otherwise."""
    model = VisionQwen(make_config()).eval()
    model.generation_config.eos_token_id = None
    reads = HostReads()
    replay = generation._StaticDecoding._replay

    def watched(self, step, changed):
        reads.is_on = True
        replay(self, step, changed)
        reads.is_on = False

    monkeypatch.setattr(generation._StaticDecoding, "_replay", watched)
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 256, "eos_token_id": [999]}
    with reads:
        for ways in (
            {"custom_generate": CapturedGreedy(3), "choose": make_argmax(model)},
            {"custom_generate": beam_search, "captured": CapturedBeams(3, 2), "num_beams": 2},
        ):
            model.generate(**prompts(3, 5, "cpu"), **ways, **arguments)
    assert reads.found == []


def test_processors_of_logits_and_windows_are_left_to_greedy_search(monkeypatch):
    model = VisionQwen(make_config()).eval()
    batch = prompts(3, 5, "cpu")
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256, "eos_token_id": [999]}
    said = model.generate(**batch, **arguments)[:, 5:].unique().tolist()
    banned = [model.config.image_token_id, *said]
    captured = CapturedGreedy(batch_size=3)
    monkeypatch.setattr(captured, "_start", lambda *_: pytest.fail("captured"))
    found = model.generate(
        **batch, custom_generate=captured, choose=make_argmax(model), suppress_tokens=banned, **arguments
    )
    assert torch.equal(found, model.generate(**batch, suppress_tokens=banned, **arguments))
    text = {**model.config.text_config.to_dict(), "use_sliding_window": True, "sliding_window": 4}
    text |= {"layer_types": ["full_attention", "sliding_attention"]}
    windowed = VisionQwen(make_config(text_config=text)).eval()
    assert "sliding_attention" in windowed.config.text_config.layer_types
    found = windowed.generate(**batch, custom_generate=captured, choose=make_argmax(windowed), **arguments)
    assert torch.equal(found, windowed.generate(**batch, **arguments))
