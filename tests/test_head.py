"""The CPU head against TRL's: same loss, metrics and gradient, and only where it may stand in."""

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction

from vlm_peft.head import FrozenHeadLogProbs


def score(function, hidden, *arguments):
    hidden = hidden.clone().requires_grad_()
    log_probs, entropy, *_, is_top1 = function(hidden, *arguments)
    (log_probs * torch.linspace(0.5, 2, len(log_probs))).sum().backward()
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
