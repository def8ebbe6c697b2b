"""The CPU attention variant against transformers' own SDPA."""

import torch
from conftest import make_config

from vlm_peft import VisionQwen
from vlm_peft.model.shared_prefix import attention_mask_from_segments


def attend(model, implementation, autocast):
    """Hidden states of the decoder under a shared-prefix mask."""
    segments = torch.tensor([[[0, 0], [0, 0], [0, 1], [0, 1], [0, 2], [-1, -1]]])
    embeds = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    model.model.language_model.set_attn_implementation(implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return model.model.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask_from_segments(segments)
        ).last_hidden_state


def test_without_autocast_it_is_plain_sdpa_bit_for_bit():
    model = VisionQwen(make_config()).eval()
    assert torch.equal(attend(model, "sdpa_float32", False), attend(model, "sdpa", False))


def test_under_autocast_attention_runs_in_float32(monkeypatch):
    import vlm_peft.model.attention as attention

    seen = []
    original = attention.sdpa_attention_forward

    def recording(module, query, key, value, mask, **kwargs):
        output, weights = original(module, query, key, value, mask, **kwargs)
        seen.append((query.dtype, output.dtype))
        return output, weights

    monkeypatch.setattr(attention, "sdpa_attention_forward", recording)
    model = VisionQwen(make_config()).eval()
    mixed = attend(model, "sdpa_float32", True)
    assert seen == [(torch.float32, torch.float32)] * 2
    exact = attend(model, "sdpa", False)
    assert (mixed - exact).abs().max() < 0.05 * exact.abs().max()


def test_generation_builds_its_masks():
    model = VisionQwen(make_config()).eval()
    ids = torch.tensor([[256, 5, 6, 7], [4, 5, 6, 7]])
    arguments = {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(ids, **arguments)
    model.model.language_model.set_attn_implementation("sdpa_float32")
    assert model.generate(ids, **arguments).tolist() == expected.tolist()
