"""The linear stage: spectral components of one scene, those of its covariance (Karhunen-Loeve, PCA).

z of a pixel is about mean + sum over k of component_k * basis_k. Mean and basis travel with the scene. All that is
coded has one step, so that a bit more anywhere lowers the squared error as much as a bit more anywhere else: an error
of a component is one of z, as the basis is orthonormal; one of the basis counts for all pixels.

Shapes: (n, nc) pixels, (k, nc) basis, (k, ny, nx) images of the components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from spectralvae.codec.planes import decode_planes, encode_planes, fill_invalid

IN_MEMORY = 64  # images of components that are held at a time
_GROUP, _GROUP_PIXELS = 16, 8_000_000  # images that are coded together, which takes several times their memory
_REFINEMENTS = 8  # of the components of pixels with invalid samples

_LENGTH = Struct("<I")

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]
Pixels = Callable[[], Iterator[tuple[slice, Float32]]]  # rows, (rows, nx, nc) with NaN = invalid; from the top


@dataclass(frozen=True)
class Spectra:
    """What all pixels share.

    Attributes:
        mean: (nc)
        basis: (k, nc)
    """

    mean: Float64
    basis: Float64

    def first(self, k: int) -> Spectra:
        """With fewer components."""
        return Spectra(self.mean, self.basis[:k])

    def portions(self) -> Iterator[slice]:
        """Components whose images are held at a time; one at least, which may be empty."""
        for first in range(0, max(1, len(self.basis)), IN_MEMORY):
            yield slice(first, min(first + IN_MEMORY, len(self.basis)))

    def expand(self, images: Float64, portion: slice) -> Float64:
        """(k', rows, nx) of a portion -> (rows, nx, nc), what they add; the first adds the mean, too."""
        z = np.tensordot(images, self.basis[portion], axes=(0, 0))
        if portion.start == 0:
            z += self.mean
        return z


@dataclass(frozen=True)
class Analysis:
    """The components of a scene before anything is quantised.

    Attributes:
        spectra: mean and basis, of as many components as there are channels.
        variances: (nc) of the components.
        images: (k, ny, nx) of the first `IN_MEMORY` at most, filled where a pixel has no valid sample.
        seen: (ny, nx), pixels that have one.
    """

    spectra: Spectra
    variances: Float64
    images: Float64
    seen: Bools


def analyse(pixels: Pixels, nc: int) -> Analysis:
    """Mean, basis and components of a scene.

    Args:
        pixels: the scene; it is read three times.
        nc: its channels.
    """
    mean, covariance, seen = _moments(pixels, nc)
    variances, vectors = np.linalg.eigh(covariance)
    spectra = Spectra(mean, np.ascontiguousarray(vectors[:, ::-1].T))
    images = project(pixels, seen, spectra.first(IN_MEMORY), slice(0, IN_MEMORY))
    return Analysis(spectra, np.maximum(variances[::-1], 0.0), images, seen)


def _moments(pixels: Pixels, nc: int) -> tuple[Float64, Float64, Bools]:
    """Mean (nc) and covariance (nc, nc) of the pixels with any valid sample, and which these are (ny, nx).

    An invalid sample counts as the mean.
    """
    total, n_valid, seen = np.zeros(nc), np.zeros(nc), []
    for _, z in pixels():
        valid = np.isfinite(z)
        total += np.nansum(z, axis=(0, 1), dtype=np.float64)
        n_valid += valid.sum(axis=(0, 1))
        seen.append(valid.any(axis=2))
    mean = total / np.maximum(n_valid, 1)
    products, n = np.zeros((nc, nc)), 0
    for _, z in pixels():
        flat = z.reshape(-1, nc) - mean.astype(np.float32)
        flat = flat[np.isfinite(flat).any(axis=1)]
        np.nan_to_num(flat, copy=False, nan=0.0)
        products += flat.T @ flat
        n += len(flat)
    return mean, products / max(n, 1), np.concatenate(seen)


def project(pixels: Pixels, seen: Bools, spectra: Spectra, portion: slice) -> Float64:
    """The components, of a portion of them, that come nearest to a scene's valid samples: (k', ny, nx).

    Args:
        pixels: the scene; for a portion that is not the first one, less what the portions before decode to. Or samples
            that are missing would be taken for the mean, which is far off, and not for what those say.
        seen: (ny, nx), pixels with any valid sample.
        spectra: the basis.
        portion: which of them.
    """
    basis = spectra.basis[portion]
    k, nc = basis.shape
    images = np.empty((k, *seen.shape))
    if not k:
        return images
    inverse = np.asarray(np.linalg.pinv(basis), np.float64)  # (nc, k')
    for rows, z in pixels():
        flat = z.reshape(-1, nc).astype(np.float64)
        if portion.start == 0:
            flat -= spectra.mean
        valid = np.isfinite(flat)
        n_valid = valid.sum(axis=1)
        flat[~valid] = 0.0
        found = flat @ inverse
        partly = np.flatnonzero((n_valid > 0) & (n_valid < nc))
        if len(partly):
            found[partly] = _refined(flat[partly], valid[partly], found[partly], basis, inverse)
        images[:, rows] = found.T.reshape(k, *z.shape[:2])
    return images if seen.all() else fill_invalid(images, seen)


def _refined(flat: Float64, valid: Bools, found: Float64, basis: Float64, inverse: Float64) -> Float64:
    """Components of pixels with invalid samples, for which those that the components give stand in."""
    for _ in range(_REFINEMENTS):
        found = np.where(valid, flat, found @ basis) @ inverse
    return found


# --- bytes ------------------------------------------------------------------------------------


def encode_images(images: Float64, step: float, seen: Bools) -> tuple[bytes, Float64]:
    """Images of components (k, ny, nx), of which the pixels that were seen count, to bytes, and what they decode to."""
    parts, decoded, group = [], np.empty_like(images), _group(seen)
    for first in range(0, len(images), group):
        data, decoded[first : first + group] = encode_planes(images[first : first + group], step, seen)
        parts.append(_LENGTH.pack(len(data)) + data)
    return b"".join(parts), decoded


def _group(seen: Bools) -> int:
    return max(1, min(_GROUP, _GROUP_PIXELS // seen.size))


def decode_images(data: BinaryIO, k: int, seen: Bools, step: float) -> Float64:
    """The inverse of `encode_images`, for images that come next in ``data``: (k, ny, nx).

    Raises:
        ValueError: the bytes are damaged.
    """
    images, group = np.empty((k, *seen.shape)), _group(seen)
    for first in range(0, k, group):
        n = min(group, k - first)
        head = data.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise ValueError("the images of components end too early")
        images[first : first + n] = decode_planes(data.read(_LENGTH.unpack(head)[0]), (n, *seen.shape), step, seen)
    return images


def encode_spectra(spectra: Spectra, variances: Float64, step: float, n_pixels: int) -> tuple[bytes, Spectra]:
    """Mean and basis to bytes.

    Args:
        spectra: of which all is coded.
        variances: (k) of the components.
        step: that of the components.
        n_pixels: for which an error of mean or basis counts.

    Returns:
        The bytes, and what they decode to.
    """
    spreads = _spread_codes(variances)
    curves = np.vstack([spectra.mean, spectra.basis]) / _steps(spreads, step, n_pixels)[:, None]
    data, decoded = encode_planes(curves[:, None, :], 1.0)
    return spreads.tobytes() + data, _rescaled(decoded, spreads, step, n_pixels)


def decode_spectra(data: bytes, k: int, nc: int, step: float, n_pixels: int) -> Spectra:
    """The inverse of `encode_spectra`.

    Raises:
        ValueError: the bytes are damaged.
    """
    spreads = np.frombuffer(data, np.uint8, k)
    return _rescaled(decode_planes(data[k:], (1 + k, 1, nc), 1.0), spreads, step, n_pixels)


def _spread_codes(variances: Float64) -> NDArray[np.uint8]:
    """Standard deviations in quarters of an octave, as bytes: 1 is 128."""
    quarters = np.rint(2 * np.log2(np.maximum(variances, 1e-18))) + 128
    codes: NDArray[np.uint8] = np.clip(quarters, 0, 255).astype(np.uint8)
    return codes


def _steps(spreads: NDArray[np.uint8], step: float, n_pixels: int) -> Float64:
    """(1 + k) steps of mean and basis."""
    spread = np.exp2((spreads.astype(np.float64) - 128) / 4)
    steps: Float64 = step / np.sqrt(n_pixels) / np.concatenate([[1.0], spread])
    return steps


def _rescaled(decoded: NDArray[Any], spreads: NDArray[np.uint8], step: float, n_pixels: int) -> Spectra:
    curves = decoded[:, 0, :] * _steps(spreads, step, n_pixels)[:, None]
    return Spectra(curves[0], curves[1:])
