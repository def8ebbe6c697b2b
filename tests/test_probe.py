"""The probe: decoders that mix what stands together are found out, and what is done about them keeps a run exact."""

import re

import joined
import pytest
import torch
from conftest import make_config, make_processor
from tiny_decoders import MASK, PROMPTS, decoder_config
from transformers import MambaConfig

from vlm_peft import VisionQwen
from vlm_peft.data import probe
from vlm_peft.data.collator import SharedPrefixCollator, separate_branches
from vlm_peft.data.probe import Layout
from vlm_peft.model.greedy import ScreenedArgmax, greedy, make_argmax
from vlm_peft.model.shared_prefix import attention_mask_from_segments, decoder_mask, lay_out
from vlm_peft.training.setup import describe_layout

SHARES = Layout(True, True, 0.0, 0.0, 0.0)
"""What the probe would say if it believed names."""


def make(name: str, **fields) -> VisionQwen:
    torch.manual_seed(0)
    model = VisionQwen(make_config(text_config=decoder_config(name, **fields).to_dict())).eval()
    model.model.vision_tower.requires_grad_(False)
    return model


def difference(model: VisionQwen, *, sharing: bool) -> float:
    return joined.largest_difference(model, make_processor(model.config), joined.make_features(model), sharing=sharing)


# --- masks ---


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "sdpa_float32"])
@pytest.mark.parametrize("name", ["Qwen3", "Mistral, sliding windows", "Gemma 3"])
def test_masks_have_the_form_that_the_attention_takes(name, implementation):
    model = make(name)
    model.set_attn_implementation({"text_config": implementation})
    assert difference(model, sharing=True) < 1e-5


def test_windows_count_positions_of_the_separate_sample():
    """A token of a later branch sees as much of the prefix as one of the first branch."""
    row = lay_out([([1, 2, 3, 4, 5, branch, 9], [-100] * 5 + [branch, 9]) for branch in (6, 7, 8)])
    segments = torch.tensor([[[0, branch] for branch in row.branch_ids]])
    config = decoder_config("Gemma 3", sliding_window=3)
    config._attn_implementation = "sdpa"
    masks = decoder_mask(config, segments, torch.tensor([row.position_ids]), torch.float32)
    seen = masks["sliding_attention"][0, 0]
    for query, position in enumerate(row.position_ids):
        visible = sorted(row.position_ids[key] for key in seen[query].nonzero().flatten())
        assert visible == list(range(max(0, position - 2), position + 1))
    assert masks["full_attention"][0, 0, -1].sum() == row.position_ids[-1] + 1


def test_an_additive_mask_is_zero_where_the_boolean_one_is_true():
    segments = torch.tensor([[[0, 0], [0, 0], [0, 1], [0, 2], [1, 0], [-1, -1]]])
    config = decoder_config("Qwen2")
    config._attn_implementation = "eager"
    mask = decoder_mask(config, segments, None, torch.bfloat16)["full_attention"]
    expected = attention_mask_from_segments(segments)
    assert mask.dtype == torch.bfloat16
    assert torch.equal(mask == 0, expected)
    assert (mask[~expected] == torch.finfo(torch.bfloat16).min).all()


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "paged|sdpa", "unheard_of"])
def test_other_implementations_are_refused_in_one_line(bases, implementation):
    expected = rf"^attn_implementation='{re.escape(implementation)}' cannot keep the branches of a row apart: .*'eager'"
    with pytest.raises(ValueError, match=expected):
        VisionQwen.from_vision_text_pretrained(*bases, attn_implementation=implementation)
    model = VisionQwen(make_config())
    for setting in (implementation, {"text_config": implementation}):
        with pytest.raises(ValueError, match=expected):
            model.set_attn_implementation(setting)
    model.model.language_model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=expected):
        model(input_ids=torch.tensor([[1, 2]]), segment_ids=torch.zeros(1, 2, 2, dtype=torch.long))


@pytest.mark.parametrize("kind", ["chunked_attention", "indexed_attention"])
def test_layers_without_a_mask_of_ours_are_named(kind):
    config = decoder_config("Gemma 3", layer_types=["full_attention", "full_attention"])
    config.layer_types = ["full_attention", kind]
    config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=f"no mask of branches for {kind} layers"):
        decoder_mask(config, torch.zeros(1, 2, 2, dtype=torch.long), None, torch.float32)


# --- what the probe finds ---


@pytest.mark.parametrize("name", ["LFM2", "Falcon-H1", "Qwen3.5"])
def test_leaking_decoders_are_wrong_when_their_verdict_is_not_heeded(monkeypatch, name):
    """The measurement of `test_decoders.py` sees what the probe guards against."""
    model = make(name)
    found = probe.probe(model)
    assert not found.sharing
    assert not found.sharing_prefill
    assert found.leak > 10 * probe._TOLERANCE
    monkeypatch.setitem(probe._FOUND, model, {"sdpa": SHARES})
    assert difference(model, sharing=probe.probe(model).sharing) > 1e-3
    assert difference(model, sharing=False) < 1e-4


def test_a_recurrence_that_is_handed_a_prefix_answers_otherwise(monkeypatch):
    model = make("LFM2")
    arguments = (model, make_processor(model.config), joined.make_features(model))
    expected = joined.uncached_answers(*arguments)
    assert joined.answers(*arguments) == expected
    monkeypatch.setitem(probe._FOUND, model, {"sdpa": SHARES})
    assert joined.answers(*arguments) != expected


@pytest.mark.parametrize("name", ["LFM2", "Qwen3.5", "Falcon-H1"])
def test_ended_texts_leave_a_cache_of_recurrent_states(name):
    model = make(name)
    arguments = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 256}
    model.generation_config.eos_token_id = None
    texts = model.generate(PROMPTS, **arguments)[:, PROMPTS.shape[1] :].tolist()
    ends = [texts[row][2] for row in range(0, len(texts), 2)]
    expected = model.generate(PROMPTS, eos_token_id=ends, **arguments)
    sizes = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, inputs, named: sizes.append(len(named["inputs_embeds"])), with_kwargs=True
    )
    found = model.generate(PROMPTS, eos_token_id=ends, custom_generate=greedy, choose=make_argmax(model), **arguments)
    assert torch.equal(found, expected)
    assert 0 < sizes[-1] < sizes[0]


def test_windows_that_are_exceeded_are_read_from_the_beginning(monkeypatch):
    model = make("Mistral, sliding windows", sliding_window=40)
    arguments = (model, make_processor(model.config), joined.make_features(model))
    found = probe.probe(model)
    assert found.sharing_prefill
    assert found.window == 40
    assert found.shares_prefill(40)
    assert not found.shares_prefill(41)
    expected = joined.uncached_answers(*arguments)
    assert joined.answers(*arguments) == expected
    monkeypatch.setitem(probe._FOUND, model, {"sdpa": SHARES})
    assert joined.answers(*arguments) != expected


@pytest.mark.parametrize("axis", [0, 1])
def test_a_mask_that_leaks_is_found_out(monkeypatch, axis):
    """Between branches and between rows."""

    def leak(segment_ids, *arguments):
        flat = segment_ids.clone()
        flat[..., axis] = flat[..., axis].clamp(max=0)
        return attention_mask_from_segments(flat, *arguments)

    monkeypatch.setattr("vlm_peft.model.shared_prefix.attention_mask_from_segments", leak)
    found = probe.probe(make("Qwen3"))
    assert not found.sharing
    assert found.leak > 10 * probe._TOLERANCE
    assert found.reason == "Qwen3Model does not keep branches apart"


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3-MoE", "LFM2"])
def test_rounding_in_bfloat16_is_no_leak_and_hides_none(name):
    found = probe.probe(make(name).to(torch.bfloat16))
    assert found.sharing == found.sharing_prefill == (name != "LFM2")


def test_it_is_tried_once_and_leaves_no_trace():
    model = make("Qwen3").train()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    calls = []
    model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    first = probe.probe(model)
    count = len(calls)
    assert probe.probe(model) is first
    assert len(calls) == count > 0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    model.set_attn_implementation({"text_config": "eager"})
    assert probe.probe(model) is not first


def test_flex_attention_is_not_compiled_for_it_and_stays():
    model = make("Gemma 3")
    model.set_attn_implementation({"text_config": "flex_attention"})
    assert probe.probe(model).sharing
    assert model.model.language_model.config._attn_implementation == "flex_attention"


def test_a_decoder_without_a_cache_is_refused_in_one_line(capsys):
    config = MambaConfig(vocab_size=264, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = VisionQwen(make_config(text_config=config.to_dict())).eval()
    with pytest.raises(ValueError, match=r"^MambaModel cannot be joined: it lacks .*past_key_values.*\.$"):
        probe.probe(model)


# --- what is done about it ---


def test_one_text_a_sequence_holds_what_its_separate_sample_holds():
    processor = make_processor(make_config())
    row = joined.encode(processor)[0]
    parts = separate_branches(row)
    texts = joined.ROWS[0][1]
    assert len(parts) == len(texts)
    for part, text in zip(parts, texts, strict=True):
        alone = processor.encode_row(joined.ask("Describe."), [text])
        assert part["input_ids"] == alone.input_ids
        assert part["position_ids"] == alone.position_ids
        assert part["shift_labels"] == alone.shift_labels
        assert part["image_ids"] == row["image_ids"]
    collate = SharedPrefixCollator(256, lambda ids: {"ids": torch.tensor(ids)}, sharing=False)
    batch = collate([row])
    assert "segment_ids" not in batch
    assert batch["input_ids"].shape[0] == len(texts)
    assert batch["ids"].tolist() == row["image_ids"] * len(texts)


def test_the_line_tells_the_reason_and_the_cost():
    from datasets import Dataset

    rows = Dataset.from_list(joined.encode(make_processor(make_config())))
    line = describe_layout(Layout(False, False, 1.0, 0.0, 0.0, reason="XModel's conv layers do not keep apart"), rows)
    shared = sum(map(len, rows["input_ids"]))
    separate = sum(len(part["input_ids"]) for row in rows for part in separate_branches(row))
    assert line == (
        "rows are laid out one text a sequence: XModel's conv layers do not keep apart; "
        f"{separate / shared:.1f}x the decoder tokens of shared prefixes"
    )
    assert separate / shared > 1.5
    assert "rows share their prefixes" in describe_layout(SHARES, rows)


def test_a_placeholder_outside_the_vocabulary_is_no_error_in_greedy_search(monkeypatch):
    model = make("Llama", vocab_size=259)
    hidden = torch.randn(3, 16)
    expected = model.lm_head(hidden).argmax(-1)
    assert torch.equal(make_argmax(model)(hidden), expected)
    monkeypatch.setattr("vlm_peft.model.greedy._SCREENED_ROWS", 1)
    monkeypatch.setattr("vlm_peft.model.greedy._is_screening_faster", lambda weight: True)
    chosen = make_argmax(model)
    assert isinstance(chosen, ScreenedArgmax)
    assert torch.equal(chosen(hidden), expected)
