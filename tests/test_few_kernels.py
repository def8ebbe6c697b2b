"""A decoder's step in fewer kernels: equal to the library's, for whatever decoder it is."""

import pytest
import torch
from conftest import make_config
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig
from transformers.integrations import sdpa_attention

from vlm_peft import VisionQwen
from vlm_peft.model.cuda.few_kernels import few_kernels, grouped_attention_forward, plain_norms


class Layer(nn.Module):
    num_key_value_groups = 3
    is_causal = True


@pytest.mark.parametrize("tokens", [1, 4])
def test_attention_is_the_librarys_without_keys_for_each_head(tokens, monkeypatch):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, tokens, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)
    mask = torch.rand(2, 1, tokens, 11) < 0.5
    mask[..., 0] = True
    expected, _ = sdpa_attention.sdpa_attention_forward(Layer(), query, key, value, mask, scaling=0.3)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *_: pytest.fail("keys are written for each head"))
    found, _ = grouped_attention_forward(Layer(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_masks_of_single_heads_are_left_to_the_library():
    query, key = torch.randn(2, 6, 4, 8), torch.randn(2, 2, 11, 8)
    mask = torch.rand(2, 6, 4, 11) < 0.5
    mask[..., 0] = True
    expected, _ = sdpa_attention.sdpa_attention_forward(Layer(), query, key, key, mask)
    assert torch.equal(grouped_attention_forward(Layer(), query, key, key, mask)[0], expected)


def decoder(kind: str):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "qwen3":
        return VisionQwen(make_config()).eval().model.language_model
    config = MistralConfig(**sizes, sliding_window=None) if kind == "mistral" else Gemma3TextConfig(**sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().model


@pytest.mark.parametrize(("kind", "norms_a_layer"), [("qwen3", 4), ("mistral", 2), ("gemma3", None)])
def test_hidden_states_are_the_same_and_the_decoder_is_left_as_it_was(kind, norms_a_layer):
    torch.manual_seed(0)
    model = decoder(kind)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0)
    norms = plain_norms(model)
    # Gemma's have another weight.
    assert len(norms) == (0 if norms_a_layer is None else norms_a_layer * len(model.layers) + 1)
    ids = torch.randint(0, 60, (3, 7))
    expected = model(input_ids=ids).last_hidden_state
    calls = []
    hooks = [each.register_forward_hook(lambda *_: calls.append(None)) for each in norms]
    with few_kernels(model, norms):
        found = model(input_ids=ids).last_hidden_state
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == len(norms)
    assert torch.equal(model(input_ids=ids).last_hidden_state, expected)
    assert model.config._attn_implementation == "sdpa"


def test_low_precision_weights_are_told_from_shifted_ones():
    model = decoder("qwen3").to(torch.bfloat16)
    norm = plain_norms(model)[0]
    values = torch.randn(3, len(norm.weight), dtype=torch.bfloat16)
    torch.testing.assert_close(nn.functional.rms_norm(values, norm.weight.shape, norm.weight, 1e-6), norm(values))
