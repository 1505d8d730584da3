"""Where a network computes, and how its numbers lie there."""

from __future__ import annotations

import torch
from torch import nn

from spectralvae.winograd import use_winograd


def place(network: nn.Module, device: torch.device, *, plain: bool = False) -> torch.memory_format:
    """Move a network to a device, in the layout that is fastest there.

    That is channels_last on GPUs, and on CPUs for networks with wide convolutions, which are then computed by
    Winograd's algorithm; without it, channels_last was measured to be slower than NCHW in training.

    Args:
        network: to be moved.
        device: where to.
        plain: leave the convolutions to torch in any case: for other precisions than float32, and torch.compile.

    Returns:
        The layout that its inputs should have, too.
    """
    layout = _fastest_layout(network, device, plain)
    network.to(device, memory_format=layout)  # type: ignore[call-overload]
    return layout


def _fastest_layout(network: nn.Module, device: torch.device, plain: bool) -> torch.memory_format:
    fast = device.type == "cuda" or (not plain and use_winograd(network))
    return torch.channels_last if fast else torch.contiguous_format
