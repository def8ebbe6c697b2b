"""Screening: what bfloat16 logits say of fp32 ones, and where fp32 has to decide.

Stage: below greedy decoding and the labelled head, on a CPU, whose bfloat16 products take a third of the time of fp32
ones and are rounded once more when they are written.
"""

import torch

UNIT = 2.0**-8
"""Unit roundoff of bfloat16."""

_MARGIN = 1.1
"""For terms of higher order and the sum."""

_PAIRS = 1024
"""Rows and tokens that are compared in float64 at a time."""


def logit_error(length: torch.Tensor, longest: torch.Tensor, logit: torch.Tensor) -> torch.Tensor:
    """How far a bfloat16 logit may be from the exact one.

    With u the unit roundoff and fp32 sums, Higham, Accuracy and Stability of Numerical Algorithms (2002), section 3.1,
    bounds the error of an inner product by 2u |h| |w| for the rounded factors, with Cauchy and Schwarz, plus u times
    the logit for the rounded result; both are taken with a tenth more for the terms of higher order and the sum.

    Args:
        length (`torch.Tensor`): Norms of hidden states.
        longest (`torch.Tensor`): The largest norm of the head's rows.
        logit (`torch.Tensor`): In bfloat16.
    """
    return _MARGIN * (2 * UNIT * length * longest + UNIT * logit.abs())


class ExactHits:
    """Whether labels are the likeliest tokens by fp32 logits, where a head is gone over in bfloat16.

    A tile's highest logit rules most labels out or leaves them alone. Tokens within the error of a label's own logit
    are few; they are compared with it one by one, in fp32 as float64 sums round to it, so that no order of summing
    decides. Of equal logits the first counts, as in `argmax`.

    Args:
        hidden (`torch.Tensor` of shape `(L, D_t)`): At the labelled positions.
        weight (`torch.Tensor` of shape `(V, D_t)`): Of the head.
        labels (`torch.LongTensor` of shape `(L,)`): In `0 .. V - 1`.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor):
        self._hidden, self._weight, self._labels = hidden, weight, labels
        self._length = torch.linalg.vector_norm(hidden.float(), dim=1)
        every = torch.arange(len(labels), device=labels.device)
        self._at_label = torch.cat([self._exact(*pairs) for pairs in _chunks(every, labels)])
        self.is_top1 = torch.ones(len(labels), dtype=torch.bool, device=labels.device)

    def begin(self, first: int, keys: torch.Tensor) -> None:
        """Goes on to another tile: the head's rows `(columns, D_t)` in bfloat16, from the token `first` on."""
        self._first = first
        # Rows and norms were rounded, by less than this.
        self._longest = torch.linalg.vector_norm(keys, dim=1).max().float() * (1 + 4 * UNIT)

    def see(self, rows: slice, logits: torch.Tensor, highest: torch.Tensor) -> None:
        """Compares labels with the tile's logits.

        Args:
            rows (`slice`): Of the labels.
            logits (`torch.Tensor` of shape `(rows, columns)`): In bfloat16.
            highest (`torch.Tensor` of shape `(rows,)`): Of each row of the tile.
        """
        own, length, longest = self._at_label[rows], self._length[rows], self._longest
        is_above = highest - logit_error(length, longest, highest) > own
        # A logit x may be as high as the label's if x + error(x) is: solved for x, with a little more.
        least = own - logit_error(length, longest, torch.zeros_like(own))
        least = least - 1.2 * UNIT * least.abs()
        self.is_top1[rows] &= ~is_above
        (near,) = (self.is_top1[rows] & (highest >= least)).nonzero(as_tuple=True)
        if not len(near):
            return
        place, column = (logits[near].float() >= least[near, None]).nonzero(as_tuple=True)
        for row, token in _chunks(near[place] + rows.start, column + self._first):
            found, label = self._exact(row, token), self._labels[row]
            is_before = (found > self._at_label[row]) | ((found == self._at_label[row]) & (token < label))
            self.is_top1[row[is_before]] = False

    def _exact(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return (self._hidden[rows].double() * self._weight[tokens].double()).sum(-1).float()


def _chunks(rows: torch.Tensor, tokens: torch.Tensor) -> zip:
    return zip(rows.split(_PAIRS), tokens.split(_PAIRS), strict=True)
