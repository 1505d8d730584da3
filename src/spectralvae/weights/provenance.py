"""Where weights come from, and what was measured with them: what a model on disk says of itself beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spectralvae.weights.normalization import Float64


@dataclass(frozen=True)
class LatentStatistics:
    """What to scale latents with: (latents - mean) / std has mean 0 and spread 1, as diffusion models want it.

    Over all validation tiles and those of their positions that have a valid sample in the pixels beneath them.

    Attributes:
        mean: (E) float64, of the posterior's mean.
        std: (E) float64, of samples of the posterior: sqrt(var(mean) + mean(variance)), by the law of total variance.
        n_tiles: how many validation tiles there were.
        n_positions: how many positions counted.
    """

    mean: Float64
    std: Float64
    n_tiles: int
    n_positions: int

    def values(self) -> dict[str, Any]:
        """As JSON values, exactly."""
        return {**vars(self), "mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_values(cls, values: Mapping[str, Any], n_channels: int) -> LatentStatistics:
        """The inverse of ``values``; ValueError where it is not of ``n_channels`` latent channels."""
        arrays = {name: np.asarray(values[name], np.float64) for name in ("mean", "std")}
        for name, array in arrays.items():
            if array.shape != (n_channels,):
                raise ValueError(f"{name} of the latents has shape {array.shape}, not ({n_channels},)")
        return cls(**{**values, **arrays})


@dataclass(frozen=True)
class Scenes:
    """Some scenes of a store.

    Attributes:
        n_scenes: how many.
        n_sources: from how many files.
        identities: `SceneRecord.identity` of each; None in what earlier versions wrote.
        first, last: earliest and latest start of a scan, ISO 8601 UTC; None where no scene has a time.
        versions: of the processing that made the files, where known.
    """

    n_scenes: int
    n_sources: int
    first: str | None
    last: str | None
    versions: list[str]
    identities: list[str] | None = None


@dataclass(frozen=True)
class Provenance:
    """What weights were trained on, and how well they did when they were saved.

    Attributes:
        store, store_hash: name of the store's folder, and what `inspect` shows as its hash.
        training, validation: its scenes that were used.
        tile_size: pixels along y and x.
        batch_size: tiles in a step.
        seed: of the run.
        initial_weights: what training began with: their ``weights_sha256``, "unknown", or None for random ones.
        n_val_tiles: how many validation tiles there are.
        metrics: on these, named as in metrics.jsonl; None if they were not judged at this step.
        baselines: mean squared errors of z on these, of the mean and of PCA; None where unknown.
        ancestors: `SceneRecord.identity` of all scenes that earlier weights were trained on, from which these began;
            [] for random ones, None where unknown and in what earlier versions wrote.
    """

    store: str
    store_hash: str
    training: Scenes
    validation: Scenes
    tile_size: int
    batch_size: int
    seed: int
    initial_weights: str | None
    n_val_tiles: int
    metrics: dict[str, float] | None
    baselines: dict[str, float] | None
    ancestors: list[str] | None = None

    def ancestry(self) -> list[str] | None:
        """``ancestors``, whatever version wrote this: random weights have none."""
        return [] if self.initial_weights is None else self.ancestors

    def lineage(self) -> list[str] | None:
        """Identities of all scenes that these weights have learned from, by themselves or before; None if unknown."""
        earlier, own = self.ancestry(), self.training.identities
        return None if earlier is None or own is None else sorted({*earlier, *own})

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Provenance:
        """The inverse of ``values``; KeyError or TypeError where it is something else."""
        scenes = {name: Scenes(**values[name]) for name in ("training", "validation")}
        return cls(**{**values, **scenes})
