"""Head: log-probabilities of labels under a frozen head on a CPU, their gradient computed on the way.

Stage: hidden states at the labelled positions -> loss; called by `VisionSFTTrainer`. With Qwen3's 151,936 rows the head
is most of a small model's step. A frozen head needs no gradient of its own, so one pass over the vocabulary is enough:
each tile of logits is used for the sum and for the gradient while it is in the processor's cache, and is never computed
again.
"""

import torch

_TILE_ROWS = 128
_TILE_VOCABULARY = 4096
"""A tile of fp32 logits takes 2 MB."""


class FrozenHeadLogProbs(torch.autograd.Function):
    """`(log_probs, entropy, is_top1)` of labels, `(L,)` each; only `log_probs` carries a gradient, to `hidden` only."""

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores the labels.

        Args:
            hidden (`torch.Tensor` of shape `(L, D_t)`): At the labelled positions.
            weight (`torch.Tensor` of shape `(V, D_t)`): Of the head, frozen.
            labels (`torch.LongTensor` of shape `(L,)`): In `0 .. V - 1`.

        Returns:
            `tuple` of fp32 log-probabilities and entropies in nats, and whether the label is the likeliest token.
        """
        device_type = hidden.device.type
        is_autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_autocast else hidden.dtype
        with torch.autocast(device_type, enabled=False):
            queries = hidden.detach().to(dtype)  # (L, D_t)
            highest = torch.full((len(labels),), float("-inf"))  # of the logits so far
            label_logits = torch.zeros(len(labels))
            total = torch.zeros(len(labels))  # sum of exp(logit - highest)
            mean = torch.zeros(hidden.shape, dtype=torch.float32)  # sum of exp(logit - highest) * weight, (L, D_t)
            for first in range(0, len(weight), _TILE_VOCABULARY):
                keys = weight.detach()[first : first + _TILE_VOCABULARY].to(dtype)
                for start in range(0, len(labels), _TILE_ROWS):
                    part = slice(start, start + _TILE_ROWS)
                    tile = torch.mm(queries[part], keys.t()).float()
                    local = labels[part] - first
                    is_here = (local >= 0) & (local < len(keys))
                    found = tile.gather(1, local.clamp(0, len(keys) - 1)[:, None])[:, 0]
                    label_logits[part] = torch.where(is_here, found, label_logits[part])
                    new_highest = torch.maximum(highest[part], tile.amax(-1))
                    rescale = torch.exp(highest[part] - new_highest)
                    highest[part] = new_highest
                    tile.sub_(new_highest[:, None]).exp_()
                    total[part] = total[part] * rescale + tile.sum(-1)
                    mean[part] = mean[part] * rescale[:, None] + torch.mm(tile.to(dtype), keys)
            mean /= total[:, None]
            log_total = highest + total.log()
            of_label = weight.detach()[labels].to(dtype).float()  # (L, D_t)
            ctx.save_for_backward((of_label - mean).to(hidden.dtype))
            # The expected logit is the query times the expected key.
            entropy = log_total - (queries.float() * mean).sum(-1)
            is_top1 = label_logits >= highest
        ctx.mark_non_differentiable(entropy, is_top1)
        return label_logits - log_total, entropy, is_top1

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, *_) -> tuple[torch.Tensor, None, None]:
        """Gradient to `hidden`: of each row, the label's key less the expected key."""
        (direction,) = ctx.saved_tensors
        return gradient[:, None].to(direction.dtype) * direction, None, None
