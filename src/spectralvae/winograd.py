"""3 x 3 convolutions on the CPU with 2.25 times fewer multiplications: Winograd's minimal filtering F(2 x 2, 3 x 3).

Lavin and Gray 2016, arXiv 1509.09308. A convolution becomes 16 products of matrices, one for each of the 4 x 4 values
into which pieces of the image and the kernels are transformed; the gradients become the same products with the
transforms' transposes. It rounds about as torch's own convolutions do: between half and twice as much was measured.
Imports torch only.

Shape letters
    H  W  height and width, even         I  O  channels before and after
    h  w  H / 2, W / 2: outputs are computed in pieces of 2 x 2
    4, 4  in front: the transformed values of a piece, along y and along x
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEAST_CHANNELS = 256  # before and after: with fewer, the transforms cost more than the products save
LEAST_SIZE = 32  # pixels along y and x


class _Scratch(threading.local):
    """Memory of a thread that is used again and again: to write to fresh pages takes longer than all transforms."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised float32, until ``name`` is taken again."""
        n = math.prod(shape)
        if name not in self._memory or len(self._memory[name]) < n:
            with torch.inference_mode(False):  # what is kept must serve others, too
                self._memory[name] = torch.empty(n, dtype=torch.float32, device="cpu")
        return self._memory[name][:n].view(shape)


_scratch = _Scratch()


# --- the transforms of one axis: each takes and gives slices of that axis -------------------------
# output = A^T [(G weights) * (B^T input)], 2 outputs of 4 inputs and 3 weights


def _input(x: Tensor, dim: int, out: Tensor) -> None:
    """B^T: (..., 2 n + 2, ...) -> out (4, ..., n, ...), pieces of four inputs that begin at every second one."""
    n = x.shape[dim] - 2
    x0, x1, x2, x3 = (x[(slice(None),) * dim + (slice(i, i + n - 1, 2),)] for i in range(4))
    torch.sub(x0, x2, out=out[0])
    torch.add(x1, x2, out=out[1])
    torch.sub(x2, x1, out=out[2])
    torch.sub(x3, x1, out=out[3])


def _input_transposed(d: Sequence[Tensor], dim: int, out: Tensor) -> None:
    """B without the padding: 4 times (..., n, ...) -> out (..., 2 n, ...), overlapping pieces added up."""
    even, odd = (out[(slice(None),) * dim + (slice(i, None, 2),)] for i in range(2))
    n = even.shape[dim]
    torch.sub(d[1], d[2], out=even).sub_(d[3])
    even.narrow(dim, 1, n - 1).add_(d[3].narrow(dim, 0, n - 1))
    torch.add(d[1], d[2], out=odd).sub_(d[0])
    odd.narrow(dim, 0, n - 1).add_(d[0].narrow(dim, 1, n - 1))


def _output(m: Sequence[Tensor], first: Tensor, second: Tensor) -> None:
    """A^T: 4 values -> the two outputs of a piece."""
    torch.add(m[0], m[1], out=first).add_(m[2])
    torch.sub(m[1], m[2], out=second).add_(m[3])


def _output_transposed(first: Tensor, second: Tensor, out: Tensor) -> None:
    """A: the two outputs of a piece -> out (4, ...)"""
    out[0].copy_(first)
    torch.add(first, second, out=out[1])
    torch.sub(first, second, out=out[2])
    out[3].copy_(second)


def _weights(w: Tensor, out: Tensor) -> None:
    """G: (3, ...) -> out (4, ...)"""
    ends = w[0] + w[2]
    out[0].copy_(w[0])
    torch.add(ends, w[1], out=out[1]).mul_(0.5)
    torch.sub(ends, w[1], out=out[2]).mul_(0.5)
    out[3].copy_(w[2])


def _weights_transposed(u: Tensor, out: Tensor) -> None:
    """G^T: (4, ...) -> out (3, ...)"""
    half = (u[1] + u[2]).mul_(0.5)
    torch.add(u[0], half, out=out[0])
    torch.sub(u[1], u[2], out=out[1]).mul_(0.5)
    torch.add(u[3], half, out=out[2])


# --- an image ---------------------------------------------------------------------------------


def _transform_image(x: Tensor) -> Tensor:
    """(H, W, I) -> (4, 4, h, w, I)"""
    height, width, channels = x.shape
    padded = _scratch.take("padded", height + 2, width + 2, channels)
    padded[1:-1, 1:-1] = x
    for edge in (padded[0], padded[-1], padded[:, 0], padded[:, -1]):
        edge.zero_()
    rows = _scratch.take("rows", 4, height // 2, width + 2, channels)
    _input(padded, 0, rows)
    out = _scratch.take("image", 4, 4, height // 2, width // 2, channels)
    for row, values in zip(rows, out, strict=True):
        _input(row, 1, values)
    return out


def _transform_gradient(g: Tensor) -> Tensor:
    """Of the output, (H, W, O) -> (4, 4, h, w, O)"""
    height, width, channels = g.shape
    rows = _scratch.take("rows", 4, height // 2, width, channels)
    _output_transposed(g[0::2], g[1::2], rows)
    out = _scratch.take("gradient", 4, 4, height // 2, width // 2, channels)
    for row, values in zip(rows, out, strict=True):
        _output_transposed(row[:, 0::2], row[:, 1::2], values)
    return out


def _assemble(m: list[list[Tensor]], out: Tensor) -> None:
    """4 x 4 times (h, w, O) -> out (H, W, O)"""
    height, width, channels = out.shape
    halves = _scratch.take("rows", 2, 4, height // 2, width // 2, channels)
    for j in range(4):
        _output([m[i][j] for i in range(4)], halves[0, j], halves[1, j])
    for i in range(2):
        _output(list(halves[i]), out[i::2, 0::2], out[i::2, 1::2])


def _assemble_gradient(d: list[list[Tensor]], out: Tensor) -> None:
    """Of the input, 4 x 4 times (h, w, I) -> out (H, W, I)"""
    height, width, channels = out.shape
    rows = _scratch.take("rows", 4, height // 2, width, channels)
    for values, row in zip(d, rows, strict=True):
        _input_transposed(values, 1, row)
    _input_transposed(list(rows), 0, out)


def _transform_weights(w: Tensor) -> Tensor:
    """(O, I, 3, 3) -> (4, 4, O, I)"""
    o, i = w.shape[:2]
    rows, u = _scratch.take("weight rows", 4, 3, o, i), _scratch.take("weights", 4, 4, o, i)
    _weights(w.permute(2, 3, 0, 1), rows)
    _weights(rows.transpose(0, 1), u.transpose(0, 1))
    return u


def _weight_gradient(du: Tensor, like: Tensor) -> Tensor:
    """(4, 4, O, I) -> (O, I, 3, 3), laid out as the weights are"""
    rows = _scratch.take("weight rows", 4, 3, *du.shape[2:])
    _weights_transposed(du.transpose(0, 1), rows.transpose(0, 1))
    out = torch.empty_like(like)
    _weights_transposed(rows, out.permute(2, 3, 0, 1))
    return out


# --- the products, as 1 x 1 convolutions: what torch multiplies fastest on all these processors ---


def _products(values: Tensor, u: Tensor, bias: Tensor | None) -> list[list[Tensor]]:
    """(4, 4, h, w, I), (4, 4, O, I) -> 4 x 4 times (h, w, O)

    The bias (O,) goes to the value that every output of a piece contains once.
    """
    products = [
        [F.conv2d(_as_image(values[i, j]), _as_kernel(u[i, j]), bias if i == j == 1 else None) for j in range(4)]
        for i in range(4)
    ]
    return [[_of_image(product) for product in row] for row in products]


def _products_transposed(
    values: Tensor, dm: Tensor, u: Tensor, du: Tensor, wanted: tuple[bool, bool]
) -> list[list[Tensor]]:
    """The gradients of `_products`.

    Args:
        values: (4, 4, h, w, I)
        dm: (4, 4, h, w, O), of the products.
        u: (4, 4, O, I)
        du: (4, 4, O, I), of the weights; they are added to it.
        wanted: those of values, those of weights.

    Returns:
        4 x 4 times (h, w, I), of the values; nothing where they are not wanted.
    """
    found: list[list[Tensor]] = [[], [], [], []]
    for i in range(4):
        for j in range(4):
            of_values, of_weights, _ = torch.ops.aten.convolution_backward(
                _as_image(dm[i, j]),
                _as_image(values[i, j]),
                _as_kernel(u[i, j]),
                None,
                (1, 1),
                (0, 0),
                (1, 1),
                False,
                (0, 0),
                1,
                (*wanted, False),
            )
            if wanted[0]:
                found[i].append(_of_image(of_values))
            if wanted[1]:
                du[i, j] += of_weights[:, :, 0, 0]
    return found


def _as_image(t: Tensor) -> Tensor:
    """(h, w, K) -> (h, K, 1, w), a channels_last view; not (1, K, h, w): a single image torch may not give to oneDNN"""
    return t[:, None].permute(0, 3, 1, 2)


def _of_image(t: Tensor) -> Tensor:
    """(h, K, 1, w) -> (h, w, K), a view"""
    return t[:, :, 0].transpose(1, 2)


def _as_kernel(u: Tensor) -> Tensor:
    """(O, I) -> (O, I, 1, 1), a view"""
    return u[:, :, None, None]


class _Winograd(torch.autograd.Function):
    """A 3 x 3 convolution with a padding of one zero; image by image, so that it needs little memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """(B, I, H, W) channels_last, (O, I, 3, 3), (O,) -> (B, O, H, W) channels_last"""
        ctx.save_for_backward(x, w)
        u = _transform_weights(w)
        y = x.new_empty(len(x), *x.shape[2:], len(w))
        for image, out in zip(x.permute(0, 2, 3, 1), y, strict=True):
            _assemble(_products(_transform_image(image), u, bias), out)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(B, O, H, W) -> (B, I, H, W), (O, I, 3, 3), (O,)"""
        x, w = ctx.saved_tensors
        wants_x, wants_w, wants_bias = ctx.needs_input_grad
        u, du = _transform_weights(w), _scratch.take("weight gradient", 4, 4, *w.shape[:2]).zero_()
        dx = x.new_empty(len(x), *x.shape[2:], x.shape[1]) if wants_x else None
        for b, gradient in enumerate(g.permute(0, 2, 3, 1)):
            values, dm = _transform_image(x[b].permute(1, 2, 0)), _transform_gradient(gradient)
            found = _products_transposed(values, dm, u, du, (wants_x, wants_w))
            if dx is not None:
                _assemble_gradient(found, dx[b])
        return (
            dx.permute(0, 3, 1, 2) if dx is not None else None,
            _weight_gradient(du, w) if wants_w else None,
            g.sum((0, 2, 3)) if wants_bias else None,
        )


# --- in a network -----------------------------------------------------------------------------


def conv2d(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """As ``torch.nn.functional.conv2d(x, w, bias, padding=1)`` of 3 x 3 kernels, by Winograd's algorithm where that is
    faster: float32 images of even size that are large enough.

    Args:
        x: (B, I, H, W)
        w: (O, I, 3, 3)
        bias: (O,)

    Returns:
        (B, O, H, W)
    """
    height, width = x.shape[2:]
    fits = height % 2 == width % 2 == 0 and min(height, width) >= LEAST_SIZE
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if plain or not fits or torch.compiler.is_compiling():
        return F.conv2d(x, w, bias, padding=1)
    x = x.contiguous(memory_format=torch.channels_last)
    return cast(Tensor, _Winograd.apply(x, w, bias))  # type: ignore[no-untyped-call]


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias)


def use_winograd(network: nn.Module) -> bool:
    """Let the wide 3 x 3 convolutions of a network be computed so on the CPU; weights and keys stay as they are.

    Returns:
        Whether there are any, and the processor is one on which it was measured to help: x86-64 with torch's oneDNN.
        Then the network should be channels_last.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    wide = [module for module in network.modules() if _is_wide(module)]
    for module in wide:
        module.__class__ = _Conv2d
    return bool(wide)


def _is_wide(conv: nn.Module) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and type(conv) in (nn.Conv2d, _Conv2d)  # others may do something else
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.groups == 1
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
    )
