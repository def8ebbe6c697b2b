"""The frozen head against TRL's: same loss, metrics and gradient, and only where it may stand in."""

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction

from vlm_peft.model import head
from vlm_peft.model.head import FrozenHeadLogProbs, Tiles


def score(function, hidden, *arguments):
    hidden = hidden.clone().requires_grad_()
    log_probs, entropy, *_, is_top1 = function(hidden, *arguments)
    (log_probs * torch.linspace(0.5, 2, len(log_probs), device=log_probs.device)).sum().backward()
    return log_probs.detach(), entropy.detach(), is_top1, hidden.grad


@pytest.mark.parametrize(("vocabulary", "rows"), [(9000, 300), (4096, 128), (50, 1)])
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 2e-5), (True, 2**-7)])
def test_equals_trl(vocabulary, rows, autocast, tolerance):
    weight, hidden = torch.randn(vocabulary, 32), torch.randn(rows, 32)
    labels = torch.randint(0, vocabulary, (rows,))
    # Some labels are the likeliest token, so that accuracy is no row of zeros.
    labels[::3] = (hidden @ weight.t()).argmax(-1)[::3]

    def trl(hidden):
        names = ("log_probs", "entropy", "is_top1")
        return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, names)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = score(trl, hidden)
        actual = score(FrozenHeadLogProbs.apply, hidden, weight, labels)
    for ours, theirs in zip(actual, expected, strict=True):
        # bf16 rounds logits before any sum.
        scale = (hidden @ weight.t()).abs().max() if autocast else theirs.float().abs().max().clamp(min=1)
        if theirs.dtype == torch.bool:
            assert (ours != theirs).float().mean() <= (0.02 if autocast else 0)
        else:
            assert float((ours - theirs).abs().max() / scale) < tolerance


def test_a_large_head_on_a_cpu_takes_the_fastest_tiles(monkeypatch):
    ways = {}
    monkeypatch.setattr(head, "fastest", lambda task, candidates: ways.update(candidates) or list(candidates)[-1])
    swept = []
    sweep = head._sweep
    monkeypatch.setattr(head, "_sweep", lambda *arguments: swept.append(arguments[3]) or sweep(*arguments))
    hidden, labels = torch.randn(300, 8), torch.randint(0, 9000, (300,))
    score(FrozenHeadLogProbs.apply, hidden, torch.randn(9000, 8), labels)
    assert swept == [head.TILES["cpu"]]
    assert not ways
    weight = torch.randn(20_000, 8)
    score(FrozenHeadLogProbs.apply, hidden, weight, labels)
    assert len(ways) > 1
    assert f"{swept[1].rows} x {swept[1].vocabulary}" == list(ways)[-1]
    first, *others = (way() for way in ways.values())
    for other in others:
        for ours, theirs in zip(other, first, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_of_equal_logits_the_first_is_the_likeliest():
    hidden, weight = torch.eye(4)[[0] * 4].contiguous(), torch.zeros(9000, 4)
    # Twice in one tile, once in a later one, and a label in the tile of the highest that is not among them.
    weight[[5, 7, 5000], 0] = 1.0
    labels = torch.tensor([5, 7, 5000, 6])
    assert score(FrozenHeadLogProbs.apply, hidden, weight, labels)[2].tolist() == [True, False, False, False]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("is_half", [False, True])
def test_under_autocast_a_label_is_first_if_fp32_logits_say_so(sign, is_half):
    """Tokens in several tiles whose logits bfloat16 cannot tell apart, all above or all below zero."""
    weight = torch.randn(9000, 32)
    crowd = torch.arange(0, 9000, 90)
    weight[crowd] = torch.randn(32) * (1 + 3e-4 * torch.randn(len(crowd), 1)) + 1e-4 * torch.randn(len(crowd), 32)
    if sign < 0:
        # The nearest of all that point away.
        weight = weight[crowd[0]] + 1e-3 * torch.randn(9000, 32)
    hidden = sign * weight[crowd[torch.arange(300) % 100]] * torch.linspace(0.01, 30, 300)[:, None]
    if is_half:
        weight, hidden = weight.to(torch.bfloat16), hidden.to(torch.bfloat16)
    # Equal rows in one tile and in another.
    weight[[91, 4100]] = weight[0].clone()
    logits = (hidden.double() @ weight.double().t()).float()
    best = logits.topk(4, dim=-1).indices
    labels = best[torch.arange(300), torch.arange(300) % 4]
    labels[::7] = torch.randint(0, 9000, (len(labels[::7]),))
    with torch.autocast("cpu", torch.bfloat16):
        found = score(FrozenHeadLogProbs.apply, hidden, weight, labels)[2]
        rounded = (hidden @ weight.t()).argmax(-1) == labels
    expected = logits.argmax(-1) == labels
    assert found.tolist() == expected.tolist()
    assert 20 < expected.sum() < 280
    assert (rounded != expected).sum() > 10


def test_compiled_equals_eager_and_one_graph_serves_all_counts(monkeypatch):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(head, "_compile_fold", torch.compile(head._fold, backend=graphs))
    weight = torch.randn(300, 32)
    weight[100] = weight[3]
    for rows in (150, 40, 77):
        hidden, labels = torch.randn(rows, 32), torch.randint(0, 300, (rows,))
        labels[::3] = (hidden @ weight.t()).argmax(-1)[::3]
        hidden[1::5], labels[1::5] = 2 * weight[3], 3
        hidden[2::5], labels[2::5] = 2 * weight[3], 100
        results = []
        for is_compiled in (False, True):
            monkeypatch.setitem(head.TILES, "cpu", Tiles(rows=64, vocabulary=128, is_compiled=is_compiled))
            results.append(score(FrozenHeadLogProbs.apply, hidden, weight, labels))
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager)
        assert results[1][2][1]
        assert not results[1][2][2]
    # Whole tiles, and the last one, which is narrower.
    assert graphs.frame_count == 2
    inputs = [node.meta.get("example_value") for graph in graphs.graphs for node in graph.graph.nodes]
    tiles = [each.shape for each in inputs if isinstance(each, torch.Tensor) and each.dim() == 2]
    assert all(isinstance(columns, int) for _, columns in tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_on_cuda(dtype):
    weight, hidden = torch.randn(20000, 64, device="cuda").to(dtype), torch.randn(5000, 64, device="cuda").to(dtype)
    logits = hidden.double() @ weight.double().t()
    labels = torch.randint(0, 20000, (5000,), device="cuda")
    labels[::3] = logits.argmax(-1)[::3]
    exact = hidden.double().requires_grad_()

    def torchs(hidden):
        log_probs = (hidden @ weight.to(hidden.dtype).t()).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(1, labels[:, None])[:, 0], entropy, logits.argmax(-1) == labels

    expected = score(torchs, exact.detach())
    actual = score(FrozenHeadLogProbs.apply, hidden, weight, labels)
    # bf16 products are summed in fp32; only the shares of the gradient, and the gradient itself, are rounded.
    tolerances = (1e-4, 1e-3 if dtype == torch.float32 else 0.05, 0, 1e-2)
    for ours, theirs, tolerance in zip(actual, expected, tolerances, strict=True):
        assert float((ours.double() - theirs.double()).abs().max()) <= tolerance * float(theirs.double().abs().max())
