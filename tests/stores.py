"""Small stores, written scene by scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spectralvae.data import store
from spectralvae.data.store import SceneRecord, Store
from spectralvae.data.store_writer import (
    NamedArray,
    ZWriter,
    finish_store,
    write_field,
    write_n_invalid,
    write_scene_group,
)
from spectralvae.weights.normalization import Normalization


def write_scene(
    path: Path,
    name: str,
    z: np.ndarray,
    arrays: Mapping[str, NamedArray],
    *,
    dtype: str = "float16",
    level2: Mapping[str, np.ndarray] | None = None,
    **known: Any,
) -> SceneRecord:
    """Write (y, x, channel) z, and what stands beside it: (y, x) by product, other arrays; `known` is of its record."""
    folder = store.scene_folder(path, name)
    with ZWriter(folder, z.shape, dtype, {}) as writer:
        writer.write(0, 0, z)
    for product, values in (level2 or {}).items():
        write_field(folder, product, values, {})
    n_invalid = np.isnan(z).sum(axis=-1, dtype=np.int32)
    write_n_invalid(folder, n_invalid, z.shape[2])
    usual = {
        **{"id": name, "source": f"{name}.nc", "region": None, "shape": list(z.shape), "source_bytes": 1},
        **{"sha256": "0" * 64, "time": None, "split": "train", "invalid": {}, "absent": []},
        **{"z_sha256": writer.sha256, "n_invalid": int(n_invalid.sum())},
        "products": {product: {} for product in level2 or {}},
    }
    return write_scene_group(folder, SceneRecord(**usual | known), arrays)


def finish(
    path: Path,
    records: Sequence[SceneRecord],
    normalization: Normalization,
    *,
    dtype: str = "float16",
    arrays: Mapping[str, np.ndarray] | None = None,
    **more: Any,
) -> Store:
    """Make a store of these scenes; statistics that are not given are zero."""
    zeros = {key: np.zeros(records[0].shape[2]) for key in store.REQUIRED_ARRAYS if key not in normalization.arrays()}
    finish_store(path, records, normalization, zeros | dict(arrays or {}), dtype, **more)
    return Store(path)
