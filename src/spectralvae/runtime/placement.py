"""Where a network computes, how its numbers lie there, and how exactly its products are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from spectralvae.winograd import use_winograd


def place(network: nn.Module, device: torch.device, *, plain: bool = False) -> torch.memory_format:
    """Move a network to a device, in the layout that is fastest there.

    That is channels_last on GPUs whose GroupNorm keeps it, and on CPUs for networks with wide convolutions, which are
    then computed by Winograd's algorithm; without it, channels_last was measured to be slower than NCHW in training.

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
    if device.type == "cuda":
        # older versions of torch return NCHW: then every convolution after a norm would convert its input
        x = torch.zeros(1, 2, 2, 2, device=device).to(memory_format=torch.channels_last)
        fast = F.group_norm(x, 1).is_contiguous(memory_format=torch.channels_last)
    else:
        fast = not plain and use_winograd(network)
    return torch.channels_last if fast else torch.contiguous_format


def set_arithmetic(device: torch.device, *, tf32: bool) -> None:
    """Choose for the whole process how training computes on a device.

    Args:
        device: where it computes.
        tf32: round the factors of float32 products to 10 bits, as cuDNN does if not told otherwise.
    """
    # Not by the newer fp32_precision: torch.export and the compiler still read allow_tf32 (torch 2.13), and torch
    # refuses that once the newer one alone has been set. Setting the older one sets both.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cuda":
        # An interrupted run must resume exactly. The fused attention kernels accumulate gradients in no fixed order;
        # the plain kernel, which stores the matrix of scores, is deterministic.
        torch.backends.cudnn.deterministic = True
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute without TF32 while the block runs; the caller's settings are restored."""
    # the newer names can be read whichever the caller has set
    backends: Any = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
