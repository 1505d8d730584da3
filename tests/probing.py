"""Stores with level-2 products, and models that remember which of their scenes they were trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from inferring import Result
from stores import finish, write_scene
from tiny import tiny_normalization, tiny_provenance, write_tiny

from spectralvae import cli
from spectralvae.data.store import Store
from spectralvae.data.targets import TargetTransform
from spectralvae.weights.normalization import Normalization
from spectralvae.weights.provenance import Scenes

S = 2  # pixels of a latent cell of the tiny model
DIMS = ("y", "x")


@dataclass
class MockScene:
    """A scene of a store: (y, x, channel) z, and what stands beside it."""

    id: str
    z: np.ndarray
    time: str | None = "2024-06-01T18:00:00+00:00"
    products: dict[str, np.ndarray] = field(default_factory=dict)
    geometry: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        return f"digest of {self.id}"


def transform(product: str, **changes: Any) -> TargetTransform:
    """One that leaves values as they are; of CLDO4 the logit of a cloud fraction."""
    usual = {"NO2": "vertical_column_troposphere", "CLDO4": "cloud_fraction"}
    clouds = product == "CLDO4"
    values = {
        **{"product": product, "field": usual.get(product, "column"), "units": "1" if clouds else "DU"},
        **{"kind": "logit" if clouds else "zscore", "divide": 1.0, "center": 0.0, "scale": 1.0},
        **{"n": 1, "mean": 0.0, "std": 1.0, "minimum": -1.0, "maximum": 1.0},
    }
    return TargetTransform(**{**values, **changes})


def geometry(ny: int, nx: int, random: np.random.Generator, start: str) -> dict[str, np.ndarray]:
    """Whatever a TEMPO scene has, the time of each row among it."""
    limits = {"solar_zenith_angle": (10, 60), "viewing_zenith_angle": (20, 70), "relative_azimuth_angle": (-180, 180)}
    found = {name: random.uniform(*ends, (ny, nx)) for name, ends in limits.items()}
    found["latitude"], found["longitude"] = np.meshgrid(
        random.uniform(20, 50) + np.arange(ny) / 50, random.uniform(-120, -70) + np.arange(nx) / 50, indexing="ij"
    )
    return {
        **{name: values.astype(np.float32) for name, values in found.items()},
        "time": datetime.fromisoformat(start).timestamp() + 3.0 * np.arange(ny),
    }


def write_store(
    path: Path,
    scenes: Sequence[MockScene],
    transforms: Mapping[str, TargetTransform] | None = None,
    normalization: Normalization | None = None,
) -> Store:
    """Write a finished store."""
    records = []
    for scene in scenes:
        arrays = {f"l2/{name}": (DIMS, values.astype(np.float32)) for name, values in scene.products.items()}
        arrays |= {name: (DIMS[: values.ndim], values) for name, values in scene.geometry.items()}
        records.append(write_scene(path, scene.id, scene.z, arrays, sha256=scene.identity, time=scene.time))
    if transforms is None:
        transforms = {name: transform(name) for name in scenes[0].products}
    targets = {name: t.to_attributes() for name, t in transforms.items()}
    return finish(path, records, normalization or tiny_normalization(), targets=targets)


def known(scenes: Sequence[MockScene]) -> Scenes:
    """Scenes that a model remembers."""
    return Scenes(len(scenes), len(scenes), None, None, [], [scene.identity for scene in scenes])


def write_model(
    folder: Path, training: Sequence[MockScene], validation: Sequence[MockScene], **normalization: Any
) -> Path:
    """A tiny model that was trained and validated on these."""
    provenance = tiny_provenance(training=known(training), validation=known(validation))
    return write_tiny(folder, step=12, normalization=tiny_normalization(**normalization), provenance=provenance)


def write_config(folder: Path, model: Path, of: Path, **config: Any) -> Path:
    """A config beside the output directory."""
    values = {"output_dir": str(folder), "model": str(model), "store": str(of), "device": "cpu", **config}
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def run_probe(folder: Path, *, capfd: Any, options: Sequence[str] = (), **config: Any) -> Result:
    """Run the command in this process."""
    path = write_config(folder, **config)
    capfd.readouterr()
    code = cli.run(["probe", str(path), *options])
    return Result(code, *capfd.readouterr(), folder)


def strict_json(path: Path) -> dict[str, Any]:
    """JSON in which every number is one."""
    found: dict[str, Any] = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found


def scores_of(folder: Path) -> dict[str, Any]:
    return strict_json(folder / "probes.json")
