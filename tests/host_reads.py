"""What a GPU would have to be waited for, counted on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: values that the host reads, and shapes that depend on them."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "masked_scatter_backward", "equal")

    def __init__(self):
        super().__init__()
        self.found = []
        self.is_on = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        by_mask = name in ("index", "index_put_", "index_put") and any(
            each is not None and each.dtype is torch.bool for each in args[1]
        )
        if self.is_on and (name in self.WAITING or by_mask):
            self.found.append(name)
        return function(*args, **(kwargs or {}))
