"""Evaluations of nothing, with numbers that a test can know; and metrics by hand, over whole arrays."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.metrics import mean_absolute_error, mean_squared_error

from spectralvae.analysis.evaluation import Channels, Evaluation, Judged, LatentUse, SceneScore, SceneView, TileView
from spectralvae.weights.normalization import Normalization

NC, E, SCALE = 12, 8, 2
WAVELENGTH = np.linspace(300.0, 410.0, NC)
UNITS = "photons/s/cm^2/nm/sr"
BASELINES = {"mean": 1.0, "pca_1": 0.25, "pca_2": 0.04, "pca_4": 0.01, "pca_8": 0.0025}  # MSE


def normalization(transform: str = "log_zscore", nc: int = NC) -> Normalization:
    """Of all evaluations here."""
    units, wavelength = UNITS if transform == "log_zscore" else None, np.linspace(300.0, 410.0, nc)
    return Normalization(transform, np.linspace(26.0, 30.0, nc), np.full(nc, 0.5), 10.0, 1.0, None, wavelength, units)


def judged(mse: float, bits: np.ndarray | None = None, **metrics: float) -> Judged:
    """Errors that grow along the channels, on scenes a and b; all from one number."""
    rmse = math.sqrt(mse) * np.linspace(0.5, 1.5, NC)
    given = {
        "mse": mse,
        "mae": 0.8 * math.sqrt(mse),
        "psnr": 20 - 10 * math.log10(mse),
        "spectral_angle": 10 * math.sqrt(mse),
        "explained_variance": 1 - mse,
        "rmse_radiance": 1e12 * math.sqrt(mse),
        "relative_rmse": 0.5 * math.sqrt(mse),
        "noise_ratio": 50 * math.sqrt(mse),
    } | metrics
    scenes = [
        SceneScore(name, time, n, {"mse": factor * mse, "mae": mse, "spectral_angle": 3.0})
        for name, time, n, factor in (("a", "2024-06-01T15:00:00+00:00", 6000, 1.5), ("b", None, 4000, 0.5))
    ]
    use = None if bits is None else LatentUse(bits, float(bits.sum()) / SCALE**2, int((bits > 0).sum()))
    return Judged(given, Channels(rmse, 1e12 * rmse, 0.5 * rmse, 50 * rmse), scenes, use)


def scene_view(name: str, size: tuple[int, int] = (16, 24), *, whole: bool = False, e: int = E) -> SceneView:
    """RMSE = row + column / 100, and nothing valid in the first two rows."""
    ny, nx = size
    rmse = (np.arange(ny)[:, None] + np.arange(nx) / 100).astype(np.float32)
    rmse[:2] = np.nan
    if not whole:
        return SceneView(name, rmse, None, None, None)
    z = np.random.default_rng(0).normal(size=(ny, nx, NC)).astype(np.float32)
    z[:2] = np.nan
    latents = np.random.default_rng(1).normal(size=(e, ny // SCALE, nx // SCALE)).astype(np.float32)
    latents[:, 0] = np.nan
    return SceneView(name, rmse, z, np.nan_to_num(0.9 * z), latents)


def tile_view(mse: float, y: int) -> TileView:
    """A tile of scene a."""
    z = np.random.default_rng(y).normal(size=(8, 8, NC)).astype(np.float32)
    z[0, 0] = np.nan
    return TileView("a", y, 4, mse, z, np.nan_to_num(z) + np.float32(math.sqrt(mse)))


def evaluation(**changes: Any) -> Evaluation:
    """Three checkpoints, the second of which is the best: better than PCA 1, worse than PCA 2."""
    bits = np.array([1.0, 5.0, 0.0, 3.0, 2.0, 7.0, 0.5, 4.0])
    given: dict[str, Any] = {
        "run": "runs/x/train",
        "store": "runs/x/store",
        "normalization": normalization(),
        "units": UNITS,
        "tile_size": 8,
        "scale": SCALE,
        "embed_dim": E,
        "n_tiles": 5,
        "n_left_out": 1,
        "n_samples": 10_000,
        "peak": 10.0,
        "mean_spectrum": np.geomspace(1e11, 1e13, NC),
        "noise": np.linspace(0.01, 0.03, NC),
        "checkpoints": {100: judged(0.16, bits), 200: judged(0.09, bits), 300: judged(0.1225, bits)},
        "baselines": {name: judged(mse) for name, mse in BASELINES.items()},
        "shown": 200,
        "worst": [tile_view(0.2, 8), tile_view(0.15, 0)],
        "views": [scene_view("a", whole=True), scene_view("b")],
    }
    return Evaluation(**given | changes)


def dull(**changes: Any) -> Evaluation:
    """One checkpoint of a scene of reflectances: nothing known of noise, a dead channel, one latent channel, no PCA."""
    found, nan = judged(0.1, np.array([2.0]), relative_rmse=math.nan, noise_ratio=math.nan), np.full(NC, np.nan)
    rmse = found.channels.rmse.copy()
    rmse[3] = math.nan
    found = replace(found, channels=replace(found.channels, rmse=rmse, relative=nan, noise=None))
    of_them = {"checkpoints": {0: found}, "baselines": {"mean": replace(found, latents=None)}, "shown": 0}
    of_store = {"normalization": normalization("zscore"), "units": None, "noise": nan}
    return evaluation(**{**of_them, **of_store, "embed_dim": 1, **changes})


# --- by hand: z (pixel, channel) where NaN is invalid, and what is made of it ---------------------


def in_radiance(z: np.ndarray, mean: np.ndarray, spread: np.ndarray, logarithmic: bool) -> np.ndarray:
    values = spread * z + mean
    return np.exp(values) if logarithmic else values


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between the valid parts of spectra, of pixels with any."""
    dot, aa, bb = (np.nansum(np.where(np.isnan(a), 0.0, x * y), axis=1) for x, y in ((a, b), (a, a), (b, b)))
    seen = aa > 0
    return np.degrees(np.arccos(np.clip(dot[seen] / np.sqrt(aa[seen] * bb[seen]), -1, 1)))


def means(values: np.ndarray) -> np.ndarray:
    """Of the valid samples of each channel, NaN where there are none."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis=0), np.nan)


def channels_by_hand(
    z: np.ndarray, z_hat: np.ndarray, mean: np.ndarray, spread: np.ndarray, logarithmic: bool, noise: np.ndarray
) -> dict[str, np.ndarray]:
    """Errors by channel, and their mean radiance."""
    a, b = (in_radiance(values, mean, spread, logarithmic) for values in (z, z_hat))
    rmse, in_units, relative = (np.sqrt(means(error**2)) for error in (z_hat - z, b - a, b / a - 1))
    if not logarithmic:
        relative = np.full_like(rmse, np.nan)
    return {"rmse": rmse, "rmse_radiance": in_units, "relative": relative, "noise": rmse / noise, "mean": means(a)}


def metrics_by_hand(
    z: np.ndarray, z_hat: np.ndarray, mean: np.ndarray, spread: np.ndarray, logarithmic: bool, noise: np.ndarray
) -> dict[str, float]:
    """All of `evaluation.METRICS`."""
    valid = np.isfinite(z)
    a, b = (in_radiance(values, mean, spread, logarithmic) for values in (z, z_hat))
    mse, in_noise = mean_squared_error(z[valid], z_hat[valid]), ((z_hat - z) / noise)[valid & np.isfinite(noise)]
    return {
        "mse": mse,
        "mae": mean_absolute_error(z[valid], z_hat[valid]),
        "psnr": 10 * np.log10((np.nanmax(z) - np.nanmin(z)) ** 2 / mse),
        "spectral_angle": angles(a, b).mean(),
        "explained_variance": 1 - np.nansum((z_hat - z) ** 2) / np.nansum((z - means(z)) ** 2),
        "rmse_radiance": np.sqrt(mean_squared_error(a[valid], b[valid])),
        "relative_rmse": np.sqrt(np.nanmean((b / a - 1) ** 2)) if logarithmic else math.nan,
        "noise_ratio": np.sqrt(np.mean(in_noise**2)) if len(in_noise) else math.nan,
    }
