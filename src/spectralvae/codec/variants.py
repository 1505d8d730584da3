"""One way to code a scene, with the network or without: what it costs at a step, and its blocks.

All that is coded has one step. At high rates the squared error D of what a step codes falls with the bits b as
dD / db = -2 ln(2) D with D = step^2 / 12: what saves more squared error for a bit than that is worth coding, and what
saves less is not. (Sullivan and Wiegand 1998, "Rate-distortion optimization for video compression".)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from spectralvae.codec.linear import IN_MEMORY, Analysis, analyse, encode_images, encode_spectra, project
from spectralvae.codec.residual import ResidualEncoder
from spectralvae.codec.scratch import Scratch, bands
from spectralvae.codec.stages import MARGIN, MARGIN_NETWORK, Bound, Stages
from spectralvae.weights.normalization import Normalization

SAMPLED = 12_000_000  # samples of the rows from which costs are estimated
_SMOOTHEST = 2.0**-6  # share of the variance that matters where a component's image is smooth
_ROUNDED = 0.4  # about where `planes` rounds up among noise

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Blocks = dict[str, bytes]


@dataclass(frozen=True)
class Estimate:
    """What coding at a step would give.

    Attributes:
        stages: how.
        n_bytes: of the blocks.
        squares: sum of the squared errors of z over all valid samples.
    """

    stages: Stages
    n_bytes: float
    squares: float

    def cost(self) -> float:
        """Squared error, with bytes counted as what they are worth at the step; with a bound, bytes alone."""
        worth = worth_of_a_byte(self.stages.step) * self.n_bytes
        return worth if self.stages.bound is not None else self.squares + worth


def worth_of_a_byte(step: float) -> float:
    """Squared error that a byte should save at least."""
    return 8 * 2 * math.log(2) * step**2 / 12


class Variant:
    """A scene less what the network predicts of it, if it does.

    Args:
        z: the scene, NaN = invalid.
        normalization: of the model.
        base: what the network predicts; None without it.
        latents: the block of the latents, and their step; None without them.
    """

    def __init__(
        self,
        z: Scratch,
        normalization: Normalization,
        base: Scratch | None = None,
        latents: tuple[bytes, float] | None = None,
    ) -> None:
        assert (base is None) == (latents is None)
        self.z, self.normalization, self.base = z, normalization, base
        self.latents = latents[0] if latents else None
        self.network_step = latents[1] if latents else None
        self.shape = z.shape
        self.n_pixels = z.shape[0] * z.shape[1]
        self._clip = normalization.clip

    def pixels(self) -> Iterator[tuple[slice, Float32]]:
        """Rows, and what is to be coded of them within the clip: (rows, nx, nc)."""
        for rows in bands(self.shape):
            yield rows, self._less_base(rows)

    def _less_base(self, rows: slice, clipped: bool = True) -> Float32:
        z = self.z.read(rows)
        if clipped:
            np.clip(z, -self._clip, self._clip, out=z)
        return z if self.base is None else z - self.base.read(rows)

    @cached_property
    def analysis(self) -> Analysis:
        """The scene's components."""
        return analyse(self.pixels, self.shape[2])

    @cached_property
    def _sample(self) -> list[tuple[slice, Float32]]:
        """Pairs of rows all over the scene: of the second the one before is known, as for most rows."""
        ny, nx, nc = self.shape
        n_pairs = max(1, min(SAMPLED // (2 * nx * nc), ny // 2))
        tops = sorted({round(top) for top in np.linspace(0, max(0, ny - 2), n_pairs)})
        return [(slice(top, min(top + 2, ny)), self._less_base(slice(top, min(top + 2, ny)))) for top in tops]

    @cached_property
    def _rest(self) -> Float64:
        """(n, k): components of the sampled pixels beyond those whose images are held."""
        spectra = self.analysis.spectra
        flat = np.concatenate([z.reshape(-1, z.shape[2]) for _, z in self._sample]) - spectra.mean
        valid = np.isfinite(flat)
        whole = (valid | ~valid.any(axis=0)).all(axis=1)  # a missing sample of others would look like noise
        return np.asarray(np.nan_to_num(flat[whole], nan=0.0) @ spectra.basis[IN_MEMORY:].T)

    # --- estimates ------------------------------------------------------------------------------

    def at(self, step: float, bound: Bound | None = None) -> Estimate:
        """What coding at a step would give, with the number of components that are worth it."""
        analysis = self.analysis
        k, images_block, images = self._worthwhile(step)
        more, more_bytes, saved = (0, 0.0, 0.0) if bound is not None else self._more(step, k)
        k += more
        spectra_block, spectra = encode_spectra(analysis.spectra.first(k), analysis.variances[:k], step, self.n_pixels)
        n_bytes = len(spectra_block) + len(images_block) + len(self.latents or b"") + more_bytes
        margin = 0.0 if bound is None else MARGIN if self.latents is None else MARGIN_NETWORK
        stages = Stages(step=step, n_components=k, network_step=self.network_step, bound=bound, margin=margin)
        coder = ResidualEncoder(*self.shape[1:])
        squares, n_rows, held = 0.0, 0, slice(0, len(images))
        for part, z in self._sample:
            left = z - spectra.expand(images[:, part], held)
            squares += self._encode_rows(coder, left, stages) if bound is not None else float(np.nansum(left**2))
            n_rows += len(left)
        scale = self.shape[0] / n_rows
        residual_bytes = len(coder.finish()) * scale if bound is not None else 0.0
        return Estimate(stages, n_bytes + residual_bytes, max(0.0, squares * scale - saved))

    def _worthwhile(self, step: float) -> tuple[int, bytes, Float64]:
        """Components that save more squared error than their curves of the basis are worth in bytes.

        Returns:
            How many of those whose images are held; the bytes of their images, or a little more; and what these
            decode to.
        """
        analysis = self.analysis
        images = analysis.images
        k = int(np.count_nonzero(analysis.variances[: len(images)] > step**2 / 12 * _SMOOTHEST))
        if not k:
            return 0, b"", images[:0]
        spectra, _ = encode_spectra(analysis.spectra.first(k), analysis.variances[:k], step, self.n_pixels)
        images = images[:k]
        block, decoded = encode_images(images, step, analysis.seen)
        saved = (np.square(images) - np.square(images - decoded))[:, analysis.seen].sum(axis=1)
        worthwhile = np.flatnonzero(saved > worth_of_a_byte(step) * len(spectra) / (1 + k))
        k = int(worthwhile[-1]) + 1 if worthwhile.size else 0
        return k, block if k else b"", decoded[:k]

    def _more(self, step: float, k: int) -> tuple[int, float, float]:
        """Components beyond those whose images are held, as far as they pay; their images are noise.

        Args:
            step: of all.
            k: how many of the others pay; only if all of them do, more of them are looked at.

        Returns:
            How many, the bytes of their images, and the squared error that they save. All from sampled pixels, and
            with the entropy of geometric distributions.
        """
        if k < IN_MEMORY or not self._rest.size:
            return 0, 0.0, 0.0
        magnitudes = np.abs(self._rest) / step
        q = np.floor(magnitudes + _ROUNDED)
        mean = q.mean(axis=0)
        ratio = (np.sqrt(1 + mean**2) - 1) / np.maximum(mean, 1e-12)
        with np.errstate(divide="ignore", invalid="ignore"):
            bits = -np.log2((1 - ratio) / (1 + ratio)) - np.where(mean > 0, mean * np.log2(ratio), 0.0)
        n_seen = int(np.count_nonzero(self.analysis.seen))
        scale = n_seen / len(q)
        n_bytes = bits * n_seen / 8
        saved = (magnitudes**2 - (magnitudes - q) ** 2).sum(axis=0) * step**2 * scale
        curve = self.shape[2] * np.log2(1 + np.sqrt(self.n_pixels / self.shape[2]) * mean) / 8
        worthwhile = np.flatnonzero(saved > worth_of_a_byte(step) * (n_bytes + curve))
        more = int(worthwhile[-1]) + 1 if worthwhile.size else 0
        return more, float(n_bytes[:more].sum()), float(saved[:more].sum())

    def _encode_rows(self, coder: ResidualEncoder, left: Float64, stages: Stages) -> float:
        """Code residuals (rows, nx, nc); returns the sum of squares of what is left of them."""
        steps = stages.residual_steps(self.normalization)
        squares = 0.0
        for row in left:
            valid = np.isfinite(row)
            q = np.rint(np.where(valid, row / steps, 0.0)).astype(np.int64)
            coder.encode_row(q, valid)
            squares += float(np.nansum(np.square(row - q * steps)))
        return squares

    # --- coding ---------------------------------------------------------------------------------

    def encode(self, stages: Stages) -> Blocks:
        """The blocks of the scene; a bound, if there is one, holds for z beyond the clip, too."""
        blocks: Blocks = {}
        if self.latents is not None:
            blocks["LATN"] = self.latents
        k, step = stages.n_components, stages.step
        spectra, seen = self.analysis.spectra.first(k), self.analysis.seen
        blocks["SPEC"], spectra = encode_spectra(spectra, self.analysis.variances[:k], step, self.n_pixels)
        parts, pixels = [], self.pixels
        with Scratch(self.z.folder, self.shape) as left:
            for portion in spectra.portions():
                data, images = encode_images(project(pixels, seen, spectra, portion), step, seen)
                parts.append(data)
                if portion.stop < k:
                    for rows, z in pixels():
                        less = z - spectra.expand(images[:, rows], portion)
                        left.write(rows, slice(0, self.shape[1]), less.astype(np.float32))
                    pixels = partial(_rows_of, left)
        if k:
            blocks["COMP"] = b"".join(parts)
        if stages.bound is not None:
            assert portion.stop == k
            coder = ResidualEncoder(*self.shape[1:])
            for rows in bands(self.shape):
                residuals = self._less_base(rows, clipped=False) - spectra.expand(images[:, rows], portion)
                self._encode_rows(coder, residuals, stages)
            blocks["RESD"] = coder.finish()
        return blocks


def _rows_of(scene: Scratch) -> Iterator[tuple[slice, Float32]]:
    for rows in bands(scene.shape):
        yield rows, scene.read(rows)
