"""The network stage: latents of a scene, in coordinates in which an error of one costs as much as of any other.

What an error of a cell's latents costs in z is, for small errors, a quadratic form (E, E): the mean of J^T J, J the
Jacobian of the decoder. A change of coordinates turns it into the identity, another the latents' covariance into a
diagonal, and then the latents are quantised with the same step as all else.

Shapes: (E, h, w) latents, a cell for s x s pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from spectralvae.codec.planes import decode_planes, encode_planes, fill_invalid
from spectralvae.codec.scratch import Scratch
from spectralvae.inference.coder import Coder
from spectralvae.runtime.placement import exact_float32

N_PROBES = 4  # random directions in which the decoder's Jacobian is tried, for each of as many places
_LEAST = 1e-6  # of the largest eigenvalue of the quadratic form

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def encode_scene(z: Scratch, coder: Coder) -> tuple[Float32, NDArray[np.bool_]]:
    """Latents (E, h, w) of a scene, and in which cells any sample is valid (h, w)."""
    ny, nx, _ = z.shape
    s = coder.scale
    latents = np.empty((coder.model.embed_dim, -(-ny // s), -(-nx // s)), np.float32)
    seen = np.empty(latents.shape[1:], np.bool_)

    def read(rows: slice, columns: slice) -> Float32:
        clip = coder.normalization.clip
        return np.clip(z.read(rows, columns), -clip, clip)

    for piece in coder.encode(read, (ny, nx)):
        latents[:, piece.rows, piece.columns] = piece.result.transpose(2, 0, 1)
        any_valid: NDArray[np.bool_] = np.asarray(np.isfinite(piece.seen).any(axis=2))
        rows = np.logical_or.reduceat(any_valid, range(0, len(any_valid), s), axis=0)
        seen[piece.rows, piece.columns] = np.logical_or.reduceat(rows, range(0, any_valid.shape[1], s), axis=1)
    return latents, seen


def decode_scene(latents: Float64, coder: Coder, into: Scratch) -> None:
    """z of a scene from its latents (E, h, w), within the clip."""
    clip = coder.normalization.clip

    def read(rows: slice, columns: slice) -> Float32:
        return np.moveaxis(latents[:, rows, columns], 0, -1).astype(np.float32)

    for piece in coder.decode(read, into.shape[:2]):
        into.write(piece.rows, piece.columns, np.clip(piece.result, -clip, clip))


def cost_of_errors(latents: Float32, coder: Coder) -> Float64:
    """(E, E): an error e of the latents of a cell adds e^T G e to the squared error of z.

    For u with random signs the expectation of (J^T u) (J^T u)^T is J^T J; J^T u comes from one backward pass.
    """
    e, h, w = latents.shape
    size = coder.tile // coder.scale
    signs = torch.Generator().manual_seed(0)
    places = np.linspace(0, 1, N_PROBES)
    total, n = np.zeros((e, e)), 0
    for down, right in zip(places, np.roll(places, 1), strict=True):
        top, left = round(down * max(0, h - size)), round(right * max(0, w - size))
        part = latents[:, top : top + size, left : left + size]
        part = np.pad(part, ((0, 0), (0, size - part.shape[1]), (0, size - part.shape[2])), mode="edge")
        with exact_float32(), torch.enable_grad():
            given = torch.from_numpy(part[None]).to(coder.device).requires_grad_()
            x_hat = coder.model.decode(given)
            u = torch.randint(0, 2, x_hat.shape, generator=signs).to(coder.device) * 2.0 - 1.0
            (gradient,) = torch.autograd.grad((x_hat * u).sum(), given)
        found = gradient[0].reshape(e, -1).double().cpu().numpy()
        total += found @ found.T
        n += found.shape[1]
    return total / n


@dataclass(frozen=True)
class Coordinates:
    """Latents are mean + directions^T p, where what p has is not correlated and each error of it costs 1.

    Attributes:
        mean: (E) float16.
        directions: (k, E) int8, to be multiplied by their scales; those of most variance first.
        scales: (k) float32.
    """

    mean: NDArray[np.float16]
    directions: NDArray[np.int8]
    scales: Float32

    def matrix(self) -> Float64:
        """(E, k)"""
        return (self.directions.astype(np.float64) * self.scales[:, None]).T


def coordinates_of(latents: Float32, seen: NDArray[np.bool_], cost: Float64) -> tuple[Coordinates, Float64]:
    """Coordinates for a scene's latents, and the variances of p.

    Args:
        latents: (E, h, w)
        seen: (h, w), cells that count.
        cost: (E, E) from `cost_of_errors`.
    """
    values = latents[:, seen].astype(np.float64)
    mean = values.mean(axis=1)
    sizes, vectors = np.linalg.eigh(cost)
    root = np.sqrt(np.maximum(sizes, _LEAST * sizes.max()))[:, None] * vectors.T
    whitened = root @ (values - mean[:, None])
    variances, rotation = np.linalg.eigh(whitened @ whitened.T / values.shape[1])
    matrix = np.linalg.solve(root, rotation[:, ::-1])  # (E, E)
    scales = (np.abs(matrix).max(axis=0) / 127).astype(np.float32)
    directions = np.rint(matrix / scales).astype(np.int8).T
    return Coordinates(mean.astype(np.float16), directions, scales), np.maximum(variances[::-1], 0.0)


class LatentCode:
    """Latents of a scene, to be coded at several steps.

    Args:
        latents: (E, h, w)
        seen: (h, w), cells that count.
        cost: (E, E) from `cost_of_errors`.
    """

    def __init__(self, latents: Float32, seen: NDArray[np.bool_], cost: Float64) -> None:
        given = latents.astype(np.float64)
        self._latents = given if seen.all() else fill_invalid(given, seen)
        self._cost = cost
        self._coordinates, self._variances = coordinates_of(latents, seen, cost)

    def encode(self, step: float) -> tuple[bytes, Float64]:
        """The bytes, and the latents (E, h, w) that they decode to."""
        e, h, w = self._latents.shape
        k = max(1, int(np.count_nonzero(self._variances > step**2 / 12)))
        c = Coordinates(self._coordinates.mean, self._coordinates.directions[:k], self._coordinates.scales[:k])
        matrix = c.matrix()
        weighted = matrix.T @ self._cost
        given = self._latents.reshape(e, -1) - c.mean[:, None].astype(np.float64)
        p = np.asarray(np.linalg.lstsq(weighted @ matrix, weighted @ given, rcond=None)[0], np.float64)
        data, decoded = encode_planes(p.reshape(k, h, w), step)
        head = np.uint16(k).tobytes() + c.mean.tobytes() + c.scales.tobytes() + c.directions.tobytes()
        return head + data, _latents_of(decoded, c)


def decode_latents(data: bytes, shape: tuple[int, int, int], step: float) -> Float64:
    """The inverse of `LatentCode.encode`: (E, h, w).

    Raises:
        ValueError: the bytes are damaged.
    """
    e, h, w = shape
    k = int(np.frombuffer(data, "<u2", 1)[0])
    if not 1 <= k <= e:
        raise ValueError(f"{k} of {e} latent channels")
    mean = np.frombuffer(data, "<f2", e, 2)
    scales = np.frombuffer(data, "<f4", k, 2 + 2 * e)
    directions = np.frombuffer(data, np.int8, k * e, 2 + 2 * e + 4 * k).reshape(k, e)
    begin = 2 + 2 * e + 4 * k + k * e
    return _latents_of(decode_planes(data[begin:], (k, h, w), step), Coordinates(mean, directions, scales))


def _latents_of(p: Float64, coordinates: Coordinates) -> Float64:
    k, h, w = p.shape
    flat = coordinates.matrix() @ p.reshape(k, -1) + coordinates.mean[:, None].astype(np.float64)
    return flat.reshape(-1, h, w)
