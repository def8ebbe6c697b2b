"""Fused LoRA against peft's: same gradients, same files, and peft's own wherever fusing does not hold."""

import copy

import pytest
import torch
from conftest import make_config
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners import lora
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from vlm_peft import VisionQwen
from vlm_peft.adapters.fused_lora import FusedLinear, fuse_lora, unfuse_lora
from vlm_peft.adapters.lora import lora_config


def make_decoder(device="cpu", **overrides):
    """Two layers with biases, LoRA of several ranks and scales that is far from its start."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=True,
    )
    arguments = {
        "r": 4,
        "lora_alpha": 7,
        "target_modules": "all-linear",
        "use_rslora": True,
        "init_lora_weights": False,
        "rank_pattern": {"k_proj": 6, "down_proj": 2},
        "alpha_pattern": {"up_proj": 3},
        **overrides,
    }
    model = Qwen3Model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return get_peft_model(model, LoraConfig(**arguments)).to(device).train()


def decode(model, autocast=False, **arguments):
    """Output, and gradients to the input and to all that trains, in fp32."""
    torch.manual_seed(1)
    device = next(model.parameters()).device
    inputs = torch.randn(2, 9, 32).to(device).requires_grad_()
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        output = model(inputs_embeds=inputs, use_cache=False, **arguments).last_hidden_state.float()
    (output * torch.linspace(-1, 2, output.numel(), device=device).view_as(output)).sum().backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient.dtype == torch.float32 for gradient in trained.values())
    return {"output": output.detach(), "input": inputs.grad} | trained


def distance(actual, expected):
    """The largest relative distance among tensors of the same names."""
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def mean_distance(actual, expected):
    """The root mean square of the relative distances."""
    distances = [(actual[name] - expected[name]).norm() / expected[name].norm() for name in expected]
    return float(torch.stack(distances).square().mean().sqrt())


def test_gradients_are_pefts():
    model = make_decoder()
    expected = decode(model)
    assert fuse_lora(model) == []
    assert distance(decode(model), expected) < 1e-5
    # A second step finds nothing left over from the first.
    assert distance(decode(model), expected) < 1e-5


def test_bf16_is_as_near_to_fp32_as_pefts():
    model = make_decoder()
    exact, pefts = decode(model), decode(model, autocast=True)
    fuse_lora(model)
    assert mean_distance(decode(model, autocast=True), exact) < 1.2 * mean_distance(pefts, exact)


def test_layers_compile_whole_and_as_one_graph():
    model = make_decoder(rank_pattern={}, alpha_pattern={})
    expected = decode(model)
    fuse_lora(model)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for layer in model.base_model.model.layers:
        layer.compile(backend=graphs, fullgraph=True)
    assert distance(decode(model), expected) < 1e-5
    assert distance(decode(model), expected) < 1e-5
    assert graphs.frame_count == 1


def test_activation_checkpointing_recomputes_neighbours():
    model = make_decoder()
    expected = decode(model)
    fuse_lora(model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert distance(decode(model), expected) < 1e-5


def test_only_inputs_are_kept_for_the_backward_pass():
    model = make_decoder()
    layer = model.base_model.model.layers[0].mlp.down_proj
    x = torch.randn(100, 48, requires_grad=True)
    kept = []

    def keep(tensor):
        if tensor.shape[:1] == x.shape[:1]:
            kept.append(tensor.numel())
        return tensor

    fuse_lora(model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert sorted(kept) == [100 * 2, 100 * 48]


def test_neighbours_are_one_product(monkeypatch):
    model = make_decoder()
    fuse_lora(model)
    products = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: products.append(x.shape[-1]) or linear(x, *rest))
    decode(model)
    # Query, key and value, and gate and up, with their ranks as further columns; output; down: in each of two layers.
    assert products == [32 + 4 + 6 + 4, 64, 32 + 4 + 4, 48] * 2
    # What is stacked is held once.
    bases = [module.base_layer for module in model.modules() if isinstance(module, FusedLinear)]
    assert len({base.weight.untyped_storage().data_ptr() for base in bases}) == 8


def test_neighbours_with_inputs_of_their_own_are_right():
    model = make_decoder()
    attention = model.base_model.model.layers[0].self_attn
    first, second = torch.randn(2, 1, 5, 32)
    expected = [attention.v_proj(first), attention.q_proj(second), attention.v_proj(second), attention.q_proj(first)]
    fuse_lora(model)
    actual = [attention.v_proj(first), attention.q_proj(second), attention.v_proj(second), attention.q_proj(first)]
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_saved_merged_and_switched_off_is_pefts(tmp_path):
    model = make_decoder()
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    ours, theirs = get_peft_model_state_dict(fused), get_peft_model_state_dict(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    inputs = torch.randn(1, 5, 32)

    def output(model):
        return model(inputs_embeds=inputs).last_hidden_state

    with model.disable_adapter(), fused.disable_adapter():
        assert torch.equal(output(fused), output(model))
    assert torch.equal(output(fused.eval()), output(model.eval()))
    model.train().merge_adapter()
    fused.train().merge_adapter()
    assert torch.equal(output(fused), output(model))
    model.unmerge_adapter()
    fused.unmerge_adapter()
    # Merging in place reaches what is stacked.
    torch.testing.assert_close(output(fused), output(model))
    plain = fused.merge_and_unload()
    assert not any(isinstance(module, lora.LoraLayer) for module in plain.modules())
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(output(Qwen3Model.from_pretrained(tmp_path)), output(model.merge_and_unload()))


def test_a_copy_trains_its_own_weights():
    model = make_decoder()
    expected = decode(model)
    fuse_lora(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert distance(decode(twin), expected) < 1e-5


def test_unfused_is_pefts_again():
    model = make_decoder()
    expected = decode(model)
    fuse_lora(model)
    unfuse_lora(model)
    assert not any(isinstance(module, FusedLinear) for module in model.modules())
    assert distance(decode(model), expected) == 0


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"use_dora": True}, "Dora"),
        ({"lora_dropout": 0.1}, "dropout 0.1"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "ALora"),
    ],
)
def test_what_is_not_plain_lora_is_left_out_by_name(overrides, reason):
    layer = lora.Linear(nn.Linear(8, 8), "default", LoraConfig(**overrides), r=4)
    assert fuse_lora(nn.ModuleDict({"proj": layer})) == [f"proj: {reason}"]
    assert type(layer) is lora.Linear


def test_other_layers_are_left_out_by_name():
    from transformers.pytorch_utils import Conv1D

    modules = nn.ModuleDict(
        {"linear": nn.Linear(8, 8), "transposed": Conv1D(8, 8), "embedding": nn.Embedding(8, 8)}
        | {"trained": nn.Linear(8, 8)}
    )
    model = get_peft_model(modules, LoraConfig(target_modules=list(modules)))
    modules["trained"].base_layer.requires_grad_(True)
    assert fuse_lora(model) == [
        "base_model.model.transposed: its base is Conv1D of Parameter, not a plain linear layer",
        "base_model.model.embedding: layer.Embedding, not a plain linear layer",
        "base_model.model.trained: its base trains",
    ]


def test_several_adapters_are_left_out_and_a_later_one_is_pefts():
    model = make_decoder()
    fuse_lora(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("second")
    plain = copy.deepcopy(model)
    unfuse_lora(plain)
    assert distance(decode(model), decode(plain)) == 0
    left_out = fuse_lora(plain)
    assert len(left_out) == 14
    assert all(line.endswith("adapters default, second, not one") for line in left_out)


def test_a_vision_qwen_keeps_its_projector_and_tower():
    model = VisionQwen(make_config())
    model = get_peft_model(model, lora_config(model, r=4))
    assert fuse_lora(model) == []
    fused = [name for name, module in model.named_modules() if isinstance(module, FusedLinear)]
    assert len(fused) == 14
    assert all("language_model.layers" in name for name in fused)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_pefts_on_cuda(autocast):
    model = make_decoder("cuda")
    exact, expected = decode(model), decode(model, autocast=autocast)
    fuse_lora(model)
    actual = decode(model, autocast=autocast)
    if autocast:
        assert mean_distance(actual, exact) < 1.2 * mean_distance(expected, exact)
    else:
        assert distance(actual, expected) < 1e-5


@pytest.mark.gpu
def test_compiled_layers_are_equal_on_cuda():
    model = make_decoder("cuda")
    expected = decode(model)
    fuse_lora(model)
    torch._dynamo.reset()
    for layer in model.base_model.model.layers:
        layer.compile(fullgraph=True)
    assert distance(decode(model), expected) < 1e-5
