"""Where the pre-training scripts compute, and how their cards say it."""

from __future__ import annotations

import torch


def choose_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """As the cards say it."""
    return f"one {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "one CPU core"
