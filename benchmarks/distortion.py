"""How far a decoded scene is from what was coded: in z, in radiance, in noise, and in what a retrieval makes of it.

Shapes: z is (y, x, C), float32 with NaN = invalid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spectralvae.analysis.regressors import Fitted, fit_linear
from spectralvae.data.blocks import Block, map_blocks
from spectralvae.data.statistics import RatioHistogram
from spectralvae.data.targets import TargetTransform, fit_transform
from spectralvae.data.validity import Validity
from spectralvae.readers import Scene
from spectralvae.readers.pairing import ProductFolder
from spectralvae.readers.products import PRODUCTS, read_product
from spectralvae.weights.normalization import EPSILON, Normalization

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

DARK = 0.01  # of the mean radiance: relative errors of less say nothing
CLOUDS, CLEAR = "CLDO4", 0.2  # gases are asked for where the cloud fraction is no larger, as `probe` does


def read_z(scene: Scene, normalization: Normalization) -> tuple[Float32, RatioHistogram | None]:
    """z of a scene as the model's training would have it, but not clipped; and how large its noise is beside it."""
    z, noise = np.empty(scene.shape, np.float32), RatioHistogram.empty(scene.shape[2])
    known = False
    with scene:

        def histogram(block: Block) -> RatioHistogram | None:
            z[block.rows, block.columns] = normalization.standardize(block.values)
            return None if block.noise is None else RatioHistogram.of(block.noise, block.values)

        for more in map_blocks(histogram, scene, Validity.of_model(normalization), noise=True):
            if more is not None:
                noise, known = noise.merge(more), True
    return z, noise if known else None


def noise_in_z(noise: RatioHistogram, normalization: Normalization) -> Float64:
    """(C): as `evaluate` has it, the median of radiance_error / radiance in units of the channel's spread."""
    found: Float64 = noise.median() / (normalization.std + EPSILON)
    return np.where(found > 0, found, np.nan)


# --- errors of samples and spectra ----------------------------------------------------------------


def angles(a: Float64, b: Float64) -> Float64:
    """Between spectra (P, C) and (P, C), in degrees; NaN where one is 0.

    Kahan's formula (Miscalculating Area and Angles of a Needle-like Triangle, 2014): an arc cosine would lose small
    angles in the rounding of 1.
    """
    with np.errstate(invalid="ignore"):
        a, b = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (a, b))
    between = np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1))
    return np.asarray(np.degrees(2 * between))


def distortion(z: Float32, z_hat: Float32, normalization: Normalization, noise: Float64 | None) -> dict[str, float]:
    """Errors over all valid samples; NaN where one cannot be had, and infinity as the PSNR of what is exact.

    Args:
        z, z_hat: before and after; NaN in the same places.
        normalization: between z and radiance.
        noise: (C) in z, NaN where unknown; None where nothing is known of it.

    Returns:
        psnr: 10 log10(peak^2 / mean squared error of z) in dB, the peak being the range of the scene's own valid z;
        rmse and largest of z; angle_median and angle_99, of the angles between spectra of radiance, in degrees, a
        pixel's invalid samples left out; relative_median, relative_99 and relative_largest, of |radiance / radiance
        before - 1| where that was above a hundredth of the channel's mean in the scene; noise_ratio, root of the mean
        of (error / noise)^2 in z, over channels whose noise is known.
    """
    assert z.shape == z_hat.shape and (np.isnan(z) == np.isnan(z_hat)).all(), "the mask is lossless"
    square = in_noise = largest = 0.0
    n_known = 0
    relative, angle = [], []
    dark = DARK * _mean_radiance(z, normalization)
    for row, row_hat in zip(z, z_hat, strict=True):  # in float64 a scene of full size would not fit
        valid = ~np.isnan(row)
        error = np.where(valid, row_hat.astype(np.float64) - row, 0.0)
        square += float((error**2).sum())
        largest = max(largest, float(np.abs(error).max()))
        if noise is not None:
            known = np.isfinite(noise)
            in_noise += float(((error[:, known] / noise[known]) ** 2).sum())
            n_known += int(valid[:, known].sum())
        before, after = (np.where(valid, normalization.denormalize(r), 0.0) for r in (row, row_hat))
        bright = valid & (before > dark)
        relative.append(np.abs(after[bright] / before[bright] - 1).astype(np.float32))
        angle.append(angles(before, after)[valid.any(axis=-1)])
    relatives, all_angles = np.concatenate(relative), np.concatenate(angle)
    mse = square / int((~np.isnan(z)).sum())
    peak = float(np.nanmax(z)) - float(np.nanmin(z))
    return {
        "psnr": 10 * math.log10(peak**2 / mse) if mse else math.inf,
        "rmse": math.sqrt(mse),
        "largest": largest,
        "angle_median": float(np.nanmedian(all_angles)),
        "angle_99": float(np.nanquantile(all_angles, 0.99)),
        "relative_median": float(np.median(relatives)),
        "relative_99": float(np.quantile(relatives, 0.99)),
        "relative_largest": float(relatives.max()),
        "noise_ratio": math.sqrt(in_noise / n_known) if n_known else math.nan,
    }


def _mean_radiance(z: Float32, normalization: Normalization) -> Float64:
    """(C), 0 where no sample is valid."""
    total, n = np.zeros(z.shape[-1]), (~np.isnan(z)).sum(axis=(0, 1))
    for row in z:
        total += np.nansum(normalization.denormalize(row), axis=0)
    return total / np.maximum(n, 1)


# --- what a retrieval makes of it -----------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A level-2 product of the scene that is coded, and a regression that was fitted on other granules.

    Attributes:
        pixels: (y, x) bool: those with the product, valid in all channels.
        truth: (N) of these, transformed as targets are.
        before: (N) what the regression makes of the original.
        regression: from spectra (N, C) of z.
    """

    pixels: NDArray[np.bool_]
    truth: Float64
    before: Float64
    regression: Fitted

    def r2(self, found: Float64) -> float:
        """1 - sum of squared errors / sum of squared deviations of the truth from its mean."""
        return 1 - float(((found - self.truth) ** 2).sum() / ((self.truth - self.truth.mean()) ** 2).sum())

    def ask(self, z_hat: Float32) -> dict[str, float]:
        """How a decoded scene changes the answer.

        Returns:
            change: RMS of the difference, in units of the RMS error that the original has already; r2, and r2_before
            of the original.
        """
        after = self.regression.predict(z_hat[self.pixels])
        change = np.mean((after - self.before) ** 2) / np.mean((self.before - self.truth) ** 2)
        return {"change": math.sqrt(change), "r2": self.r2(after), "r2_before": self.r2(self.before)}


class Spectra:
    """Original spectra of other granules with their products, to fit regressions on.

    Args:
        folder: of the products.
        per_granule: pixels taken of each, for each product.
        seed: of the choice.
    """

    def __init__(self, folder: Path, per_granule: int, seed: int) -> None:
        self._folders = {name: ProductFolder(folder, name) for name in PRODUCTS}
        self._per_granule, self._seed = per_granule, seed
        self._taken: dict[str, list[tuple[Float32, Float32]]] = {name: [] for name in PRODUCTS}

    def _fields(self, path: Path, z: Float32) -> Iterator[tuple[str, Float32]]:
        """Products (y, x), NaN where they are bad, z is not valid in all channels, or clouds hide what a gas does."""
        fields = {
            name: read_product(folder.find(path), name, expected_shape=z.shape[:2]).values
            for name, folder in self._folders.items()
        }
        valid = np.isfinite(z).all(axis=-1)
        clear = fields[CLOUDS] <= CLEAR
        for name, field in fields.items():
            yield name, np.where(valid if name == CLOUDS else valid & clear, field, np.nan)

    def add(self, path: Path, z: Float32) -> None:
        """Take pixels of a granule."""
        for name, field in self._fields(path, z):
            taken = self._taken[name]
            random = np.random.default_rng([self._seed, len(taken)])
            chosen = np.sort(random.permutation(np.flatnonzero(np.isfinite(field)))[: self._per_granule])
            taken.append((z.reshape(-1, z.shape[-1])[chosen], field.reshape(-1)[chosen]))

    def questions(self, path: Path, z: Float32) -> dict[str, Question]:
        """Fit a ridge regression for each product, and ask it about the scene that is coded."""
        questions = {}
        for name, field in self._fields(path, z):
            spectra, values = zip(*self._taken[name], strict=True)
            transform = _transform(name, values)
            groups = np.repeat(np.arange(len(values)), [len(v) for v in values])
            y = transform.transform(np.concatenate(values))
            regression = fit_linear(np.concatenate(spectra), y, groups, seed=self._seed)
            pixels = np.isfinite(field)
            before = regression.predict(z[pixels])
            questions[name] = Question(pixels, transform.transform(field[pixels]), before, regression)
        return questions


def _transform(name: str, values: Sequence[Float32]) -> TargetTransform:
    spec = PRODUCTS[name]
    return fit_transform(spec, spec.field, spec.units, lambda: values)
