"""Head: log-probabilities of labels under a frozen head, their gradient computed on the way.

Stage: hidden states at the labelled positions -> loss; called by `VisionSFTTrainer`. With Qwen3's 151,936 rows the head
is most of a small model's step. A frozen head needs no gradient of its own, so one pass over the vocabulary in two
products is enough: each tile of logits is used for the sum and for the gradient while it is in the cache, and is never
computed again.
"""

from dataclasses import dataclass
from functools import partial

import torch

from .cpu.choices import fastest
from .cpu.screening import ExactHits


@dataclass(frozen=True)
class Tiles:
    """How a device cuts the logits.

    Args:
        rows, vocabulary (`int`): Of one tile.
        is_compiled (`bool`): Whether what lies between the two products is compiled into one or two kernels.
    """

    rows: int
    vocabulary: int
    is_compiled: bool


TILES = {
    # A tile of fp32 logits takes 2 MB.
    "cpu": Tiles(rows=128, vocabulary=4096, is_compiled=False),
    # Few large products; 128 MB of fp32 logits at 4,096 labels.
    "cuda": Tiles(rows=4096, vocabulary=8192, is_compiled=True),
}
"""By type of device; a CPU chooses for a large head by [`_fastest_cpu_tiles`]."""

_CPU_SHAPES = ((128, 4096), (256, 2048), (512, 1024))

_LARGE = 16_384
"""Rows of a head that is worth a choice."""

_MEASURED_ROWS = 8192
_MEASURED_LABELS = 256


class FrozenHeadLogProbs(torch.autograd.Function):
    """`(log_probs, entropy, log_total, is_top1)` of labels, `(L,)` each; `log_probs` carries a gradient to `hidden`."""

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores the labels.

        Args:
            hidden (`torch.Tensor` of shape `(L, D_t)`): At the labelled positions.
            weight (`torch.Tensor` of shape `(V, D_t)`): Of the head, frozen.
            labels (`torch.LongTensor` of shape `(L,)`): In `0 .. V - 1`.

        Returns:
            `tuple` of fp32 log-probabilities and entropies in nats, the logarithm of the sum of all exponentiated
            logits, and whether the label is the first of the likeliest tokens, by fp32 logits. Where a CPU rounds
            products to bf16, under autocast, [`~vlm_peft.model.cpu.screening.ExactHits`] finds them.
        """
        device = hidden.device
        is_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_autocast else hidden.dtype
        with torch.autocast(device.type, enabled=False):
            queries = hidden.detach().to(dtype)  # (L, D_t)
            tiles = _fastest_cpu_tiles(weight, dtype) if _is_worth_measuring(weight) else TILES[device.type]
            is_rounded = dtype == torch.bfloat16 and not _has_fp32_products(queries)
            hits = ExactHits(hidden.detach(), weight.detach(), labels) if is_rounded else None
            highest, is_top1, at_label, total, mean = _sweep(queries, weight.detach(), labels, tiles, hits)
            mean /= total[:, None]
            log_total = highest + total.log()
            of_label = weight.detach()[labels].to(dtype).float()  # (L, D_t)
            ctx.save_for_backward((of_label - mean).to(hidden.dtype))
            # The expected logit is the query times the expected key.
            entropy = log_total - (queries.float() * mean).sum(-1)
        ctx.mark_non_differentiable(entropy, log_total, is_top1)
        return at_label - log_total, entropy, log_total, is_top1

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, *_) -> tuple[torch.Tensor, None, None]:
        """Gradient to `hidden`: of each row, the label's key less the expected key."""
        (direction,) = ctx.saved_tensors
        return gradient[:, None].to(direction.dtype) * direction, None, None


def with_row_gradients(
    log_probs: torch.Tensor,
    log_total: torch.Tensor,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
    row_ids: torch.Tensor,
) -> torch.Tensor:
    """The same log-probabilities, which a few trained rows of an otherwise frozen head get their gradient from.

    Args:
        log_probs, log_total (`torch.Tensor` of shape `(L,)`): Of [`FrozenHeadLogProbs`], under a weight with the rows.
        hidden (`torch.Tensor` of shape `(L, D_t)`): At the labelled positions.
        labels (`torch.LongTensor` of shape `(L,)`): In `0 .. V - 1`.
        rows (`torch.Tensor` of shape `(K, D_t)`): What trains.
        row_ids (`torch.LongTensor` of shape `(K,)`): Where in the weight they are.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.detach().to(rows.dtype) @ rows.t()  # (L, K)
        shares = torch.exp(logits.detach().float() - log_total[:, None])
        # Of a log-probability by a row's logit.
        slope = (labels[:, None] == row_ids).float() - shares
        return log_probs + (slope * (logits - logits.detach())).sum(-1)


def _sweep(
    queries: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, tiles: Tiles, hits: ExactHits | None = None
) -> tuple[torch.Tensor, ...]:
    """Goes over the vocabulary once.

    Args:
        hits ([`ExactHits`], *optional*): Decides whether labels are first, where logits are rounded.

    Returns:
        `tuple` of the highest logit, whether the label has it first, the label's logit, the sum of
        exp(logit - highest), `(L,)` each, and the sum of exp(logit - highest) * weight, `(L, D_t)`.
    """
    fold = _compiled_fold if tiles.is_compiled else _fold
    highest = torch.full((len(labels),), float("-inf"), device=queries.device)
    is_top1 = torch.zeros(len(labels), dtype=torch.bool, device=queries.device)
    at_label = torch.zeros(len(labels), device=queries.device)
    total = torch.zeros(len(labels), device=queries.device)
    mean = torch.zeros(queries.shape, device=queries.device)
    for first in range(0, len(weight), tiles.vocabulary):
        keys = weight[first : first + tiles.vocabulary].to(queries.dtype)
        if hits is not None:
            hits.begin(first, keys)
        for start in range(0, len(labels), tiles.rows):
            part = slice(start, start + tiles.rows)
            running = (highest[part], is_top1[part], at_label[part], total[part])
            logits = _product(queries[part], keys.t())
            shares, rescale, tile_highest = fold(logits, labels[part] - first, *running, dtype=queries.dtype)
            if hits is not None:
                # A copy in fp32 was spoilt, not these.
                hits.see(part, logits, tile_highest)
            _rescale_and_add_product(mean[part], rescale, shares, keys)
    return highest, is_top1 if hits is None else hits.is_top1, at_label, total, mean


def _is_worth_measuring(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and len(weight) >= _LARGE


def _fastest_cpu_tiles(weight: torch.Tensor, dtype: torch.dtype) -> Tiles:
    """Tiles of one size and several shapes, measured on a part of the head."""
    part = weight.detach()[:_MEASURED_ROWS]
    queries, labels = part[:_MEASURED_LABELS].to(dtype), torch.arange(_MEASURED_LABELS)
    shapes = {f"{rows} x {columns}": Tiles(rows, columns, False) for rows, columns in _CPU_SHAPES}
    ways = {name: partial(_sweep, queries, part, labels, tiles) for name, tiles in shapes.items()}
    return shapes[fastest(f"head, {weight.shape[1]} wide, {weight.dtype} in {dtype}", ways)]


def _has_fp32_products(operand: torch.Tensor) -> bool:
    """Whether products of this operand can be had in fp32, as they were summed."""
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16)


def _product(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`(rows, columns)` logits; rounded to the operands' dtype where there is no other way."""
    if _has_fp32_products(queries):
        return torch.mm(queries, keys, out_dtype=torch.float32)
    return torch.mm(queries, keys)


def _rescale_and_add_product(
    mean: torch.Tensor, rescale: torch.Tensor, shares: torch.Tensor, keys: torch.Tensor
) -> None:
    """`mean * rescale + shares @ keys`, in place and in fp32."""
    mean *= rescale[:, None]
    if _has_fp32_products(shares):
        torch.addmm(mean, shares, keys, out_dtype=torch.float32, out=mean)
    else:
        mean += torch.mm(shares, keys)


def _fold(
    logits: torch.Tensor,
    places: torch.Tensor,
    highest: torch.Tensor,
    is_top1: torch.Tensor,
    at_label: torch.Tensor,
    total: torch.Tensor,
    *,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes one tile of logits into the running values, in place.

    Args:
        logits (`torch.Tensor` of shape `(rows, columns)`): Of the tile; spoilt.
        places (`torch.LongTensor` of shape `(rows,)`): The labels' columns, which may lie before or after the tile.
        highest, is_top1, at_label, total (`torch.Tensor` of shape `(rows,)`): So far.
        dtype (`torch.dtype`): Of what is returned first.

    Returns:
        `tuple` of exp(logit - highest) `(rows, columns)`, what earlier sums must be multiplied by, `(rows,)`, and the
        tile's highest logits, `(rows,)`.
    """
    logits = logits.float()
    is_here = (places >= 0) & (places < logits.shape[1])
    found = logits.gather(1, places.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    at_label.copy_(torch.where(is_here, found, at_label))
    tile_highest = logits.amax(-1)
    # Of equal logits the first counts: `argmax` returns it, and an earlier tile's stands.
    is_top1.copy_(torch.where(tile_highest > highest, _is_argmax(logits, places, is_here), is_top1))
    new_highest = torch.maximum(highest, tile_highest)
    rescale = torch.exp(highest - new_highest)
    highest.copy_(new_highest)
    shares = logits.sub_(new_highest[:, None]).exp_()
    total.copy_(total * rescale + shares.sum(-1))
    return shares.to(dtype), rescale, tile_highest


def _is_argmax(logits: torch.Tensor, places: torch.Tensor, is_here: torch.Tensor) -> torch.Tensor:
    """Whether each row's first highest logit is at the label's place, `(rows,)`."""
    if torch.compiler.is_compiling() or logits.is_cuda:
        return logits.argmax(-1) == places
    # A CPU's argmax costs more than all the rest: only the few rows that have their label in this tile.
    rows = is_here.nonzero()[:, 0]
    is_argmax = torch.zeros_like(is_here)
    is_argmax[rows] = logits[rows].argmax(-1) == places[rows]
    return is_argmax


@torch.compile
def _compile_fold(*arguments, dtype):
    return _fold(*arguments, dtype=dtype)


def _compiled_fold(
    logits: torch.Tensor, *of_rows: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[`_fold`] in a few kernels: one graph for whole tiles and one for the last, for any number of labels."""
    torch._dynamo.mark_static(logits, 1)
    for tensor in (logits, *of_rows):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compile_fold(logits, *of_rows, dtype=dtype)
