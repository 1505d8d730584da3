"""What `evaluate` finds out, and how it is written down: report.json and tables.

Shapes: C channels, E latent channels; t pixels along a tile; a scene is (ny, nx) pixels, its latents (h, w) cells.
Whatever cannot be had (an error in units of a noise that nobody knows) is NaN here, null in JSON, empty in CSV.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.runtime.atomic import write_atomic
from spectralvae.weights.normalization import Float64, Normalization

Float32 = NDArray[np.float32]

# of every checkpoint and every baseline
METRICS = (
    "mse",  # of z
    "mae",  # of z
    "psnr",  # dB, 10 log10(peak^2 / mse)
    "spectral_angle",  # degrees, between radiance spectra, mean over pixels
    "explained_variance",  # 1 - mse / mean squared deviation from the mean of the channel over the judged samples
    "rmse_radiance",  # in the units of the source
    "relative_rmse",  # sqrt(mean((reconstruction / radiance - 1)^2)); log_zscore only
    "noise_ratio",  # sqrt(mean((error / noise)^2)); where the noise is known
)
SCENE_METRICS = ("mse", "mae", "spectral_angle")


@dataclass(frozen=True)
class Channels:
    """Errors by channel, (C) each; NaN where no sample is valid.

    Attributes:
        rmse: of z.
        rmse_radiance: in the units of radiance.
        relative: sqrt(mean((reconstruction / radiance - 1)^2)); NaN but under log_zscore.
        noise: rmse / noise, both in z; None where the noise is not known.
    """

    rmse: Float64
    rmse_radiance: Float64
    relative: Float64
    noise: Float64 | None


@dataclass(frozen=True)
class SceneScore:
    """Errors over one validation scene.

    Attributes:
        id: of the scene in the store.
        time: start of its scan, ISO 8601 UTC, where known.
        n_samples: valid ones that were judged.
        metrics: `SCENE_METRICS`.
    """

    id: str
    time: str | None
    n_samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class LatentUse:
    """What the latents of a checkpoint carry.

    Attributes:
        bits: (E) KL term of the posterior to the standard normal, mean over cells.
        bits_per_pixel: of all latent channels together.
        active_units: how many latent channels vary.
    """

    bits: Float64
    bits_per_pixel: float
    active_units: int


@dataclass(frozen=True)
class Judged:
    """How well a checkpoint or a baseline reconstructs.

    Attributes:
        metrics: `METRICS`.
        channels: by channel.
        scenes: by scene, in the order of the store.
        latents: None for a baseline.
    """

    metrics: dict[str, float]
    channels: Channels
    scenes: list[SceneScore]
    latents: LatentUse | None


@dataclass(frozen=True)
class TileView:
    """A tile to look at.

    Attributes:
        scene: id of its scene.
        y, x: its first pixel.
        mse: of z over its valid samples.
        z: (t, t, C) float32, NaN = invalid.
        z_hat: (t, t, C) float32, finite everywhere.
    """

    scene: str
    y: int
    x: int
    mse: float
    z: Float32
    z_hat: Float32


@dataclass(frozen=True)
class SceneView:
    """A scene to look at.

    Attributes:
        id: of the scene in the store.
        rmse: (ny, nx) float32 of z over the channels, NaN = not judged.
        z, z_hat: (ny', nx', C) float32, every few pixels, NaN = not judged; None but in the first view.
        latents: (E, h, w) float32, means of the posterior, NaN = not judged; None but in the first view.
    """

    id: str
    rmse: Float32
    z: Float32 | None
    z_hat: Float32 | None
    latents: Float32 | None


@dataclass(frozen=True)
class Evaluation:
    """All that `evaluate` finds out.

    Attributes:
        run, store: paths.
        normalization: of the store.
        units: of radiance, where known.
        tile_size: pixels along y and x.
        scale: pixels of a latent cell along each axis.
        embed_dim: E.
        n_tiles: validation tiles that were judged.
        n_left_out: those that have too many invalid samples.
        n_samples: valid ones that were judged, each once, however many tiles it is in.
        peak: of `psnr`: largest less smallest z of the samples judged.
        mean_spectrum: (C) mean radiance of the samples judged, NaN where there is none.
        noise: (C) noise in z, NaN where unknown; None where nothing is known of it.
        checkpoints: by step.
        baselines: "mean", "pca_1", "pca_2", ...
        shown: step of the checkpoint with the smallest mse, which the views are of.
        worst: tiles with the largest errors, the worst first.
        views: some scenes.
        remarks: what readers should know of the run.
    """

    run: str
    store: str
    normalization: Normalization
    units: str | None
    tile_size: int
    scale: int
    embed_dim: int
    n_tiles: int
    n_left_out: int
    n_samples: int
    peak: float
    mean_spectrum: Float64
    noise: Float64 | None
    checkpoints: dict[int, Judged]
    baselines: dict[str, Judged]
    shown: int
    worst: list[TileView]
    views: list[SceneView]
    remarks: Sequence[str] = ()

    def judged(self) -> dict[str, Judged]:
        """Checkpoints ("step_2000") and baselines, by name."""
        return {f"step_{step}": found for step, found in self.checkpoints.items()} | self.baselines


def to_json(evaluation: Evaluation, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of report.json.

    Args:
        evaluation: what was found.
        facts: more to say at its end, as JSON values.
    """
    e = evaluation
    return {
        "checkpoints": {str(step): _entry(found) for step, found in e.checkpoints.items()},
        "baselines": {name: _entry(found) for name, found in e.baselines.items()},
        "shown": e.shown,
        "peak": e.peak,
        "tile_size": e.tile_size,
        "n_tiles": e.n_tiles,
        "n_left_out": e.n_left_out,
        "n_samples": e.n_samples,
        "units": e.units,
        "run": e.run,
        "store": e.store,
        **facts,
    }


def _entry(found: Judged) -> dict[str, Any]:
    entry: dict[str, Any] = {name: number(value) for name, value in found.metrics.items()}
    entry["scenes"] = [
        {
            "id": scene.id,
            "time": scene.time,
            "n_samples": scene.n_samples,
            **{name: number(value) for name, value in scene.metrics.items()},
        }
        for scene in found.scenes
    ]
    if found.latents:
        entry["latents"] = {
            "bits": found.latents.bits.tolist(),
            "bits_per_pixel": found.latents.bits_per_pixel,
            "active_units": found.latents.active_units,
        }
    return entry


def number(value: float) -> float | None:
    """None for what JSON has no word for."""
    return float(value) if math.isfinite(value) else None


def write_tables(evaluation: Evaluation, folder: Path) -> None:
    """metrics.csv, channels.csv and scenes.csv."""
    judged = evaluation.judged()
    write_csv(
        folder / "metrics.csv",
        ["name", "step", *METRICS, "bits_per_pixel", "active_units"],
        (
            [
                name,
                name.removeprefix("step_") if found.latents else None,
                *(found.metrics[key] for key in METRICS),
                *((found.latents.bits_per_pixel, found.latents.active_units) if found.latents else (None, None)),
            ]
            for name, found in judged.items()
        ),
    )
    columns = _channel_columns(evaluation)
    write_csv(folder / "channels.csv", list(columns), zip(*columns.values(), strict=True))
    write_csv(
        folder / "scenes.csv",
        ["name", "scene", "time", "n_samples", *SCENE_METRICS],
        (
            [name, scene.id, scene.time, scene.n_samples, *(scene.metrics[key] for key in SCENE_METRICS)]
            for name, found in judged.items()
            for scene in found.scenes
        ),
    )


def _channel_columns(e: Evaluation) -> dict[str, Iterable[Any]]:
    wavelength = e.normalization.wavelength
    assert wavelength is not None, "a store always has wavelengths"
    columns: dict[str, Iterable[Any]] = {
        "channel": range(len(wavelength)),
        "wavelength_nm": wavelength,
        "mean_radiance": e.mean_spectrum,
    }
    if e.noise is not None:
        columns["noise_z"] = e.noise
    for name, found in e.judged().items():
        columns |= {
            f"rmse_z {name}": found.channels.rmse,
            f"rmse_radiance {name}": found.channels.rmse_radiance,
            f"relative_rmse {name}": found.channels.relative,
        }
        if found.channels.noise is not None:
            columns[f"rmse_in_noise {name}"] = found.channels.noise
    return columns


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; None and NaN are empty, numbers have all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    write_atomic(path, text.getvalue())


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):  # numpy's float64 is a float
        return ""
    return float(value) if isinstance(value, float) else value
