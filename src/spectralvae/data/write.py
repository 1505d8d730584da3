"""Third stage of `prepare`: every scene is normalised and written into the store."""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from spectralvae.data.blocks import Block, map_blocks
from spectralvae.data.splits import PlannedScene
from spectralvae.data.statistics import PIECE_SAMPLES
from spectralvae.data.store import SceneRecord, scene_folder
from spectralvae.data.store_writer import (
    NamedArray,
    ZWriter,
    write_field,
    write_group,
    write_n_invalid,
    write_scene_group,
)
from spectralvae.data.targets import TargetTransform
from spectralvae.data.tasks import NO_STATISTICS, Task, all_invalid
from spectralvae.readers.base import file_sha256
from spectralvae.weights.normalization import EPSILON, Normalization, transform_values


@dataclass(frozen=True)
class Written:
    """What became of a scene.

    Attributes:
        record: its row of the table; None where it was left out for want of a valid sample.
        n_valid: (channel) valid samples.
        n_clipped: (channel) samples whose z was clipped.
        rounding_max: (channel) largest |stored - z|.
        rounding_sum: (channel) sum of (stored - z)^2.
        lost: (2, channel) sums of z - stored and of z^2 - stored^2, z before it was clipped.
    """

    record: SceneRecord | None
    n_valid: NDArray[np.int64]
    n_clipped: NDArray[np.int64]
    rounding_max: NDArray[np.float64]
    rounding_sum: NDArray[np.float64]
    lost: NDArray[np.float64]


def write(
    task: Task,
    normalization: Normalization,
    targets: Mapping[str, TargetTransform],
    p: PlannedScene,
    advance: Callable[[int], None],
) -> None:
    """Write a scene into the store; what was begun appears under its name only when it is complete.

    Raises:
        InputError: it cannot be read, or has no valid sample.
    """
    folder = scene_folder(task.root, p.id)
    if task.result_file(p, "written").is_file() and (folder.is_dir() or load_written(task, p).record is None):
        advance(p.scene.shape[0] * p.scene.shape[1])
        return
    attempt = task.scratch / f"{p.id}.{uuid4().hex}"  # another worker may be at it, taken for lost
    attempt.mkdir()
    with p.scene, ThreadPoolExecutor(1, thread_name_prefix="digest") as digester:
        source_digest = digester.submit(p.scene.sha256)
        coordinates = p.scene.coordinates()
        written, n_invalid, counts, z_sha256 = _write_z(task, normalization, p, attempt, list(coordinates), advance)
        wavelength = p.scene.wavelength
    record: SceneRecord | None = None
    if written.n_valid.any():
        arrays: dict[str, NamedArray] = {
            **coordinates,
            "wavelength": (("x", "channel")[-wavelength.ndim :], wavelength),
        }
        products = {product: _write_product(task, p, product, target, attempt) for product, target in targets.items()}
        record = _record(p, source_digest.result(), counts, int(n_invalid.sum()), z_sha256, products)
        write_n_invalid(attempt, n_invalid, p.scene.shape[2])
        record = write_scene_group(attempt, record, arrays)
    elif not task.leave_out:
        raise all_invalid(p, counts)
    task.keep(p, "written", **{**vars(written), "record": json.dumps(record and asdict(record))})
    if record is None:
        shutil.rmtree(attempt)
        return
    folder.parent.mkdir(exist_ok=True)
    try:
        attempt.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(attempt)  # another worker was first, with the same content


def load_written(task: Task, p: PlannedScene) -> Written:
    """What `write` left."""
    with np.load(task.result_file(p, "written")) as saved:
        record = json.loads(str(saved["record"]))
        return Written(**{**saved, "record": None if record is None else SceneRecord(**record)})


class Standardized(NamedTuple):
    """Samples as they are stored, and sums over them, as of `Written`, by channel.

    Attributes:
        stored: (pixel, channel) z in the type of the store, NaN = invalid.
        n_invalid: (pixel) invalid samples.
        n_missing, n_clipped, rounding_max, rounding_sum, lost: by channel.
    """

    stored: NDArray[Any]
    n_invalid: NDArray[np.int64]
    n_missing: NDArray[np.int64]
    n_clipped: NDArray[np.int64]
    rounding_max: NDArray[np.float64]
    rounding_sum: NDArray[np.float64]
    lost: NDArray[np.float64]


def standardized(radiance: NDArray[np.float32], normalization: Normalization, dtype: str) -> Standardized:
    """Radiance as it is stored, a piece at a time that fits into the processor's cache.

    Args:
        radiance: (pixel, channel), NaN = invalid.
        normalization: of the store.
        dtype: of z.
    """
    n, nc = radiance.shape
    stored, n_invalid = np.empty((n, nc), np.dtype(dtype).newbyteorder("<")), np.empty(n, np.int64)
    n_missing, n_clipped, rounding_max = np.zeros(nc, np.int64), np.zeros(nc, np.int64), np.zeros(nc)
    sums = np.zeros((3, nc))  # of (stored - z)^2, z - stored, z^2 - stored^2
    height = min(255, max(1, PIECE_SAMPLES // nc))
    clipped, back = np.empty((2, height, nc))
    rows = np.empty((height + 1, nc))  # the first one holds the sum over the pieces before
    spread, clip = normalization.std + EPSILON, normalization.clip

    def add(i: int, n_rows: int) -> None:
        rows[0] = sums[i]
        np.add.reduce(rows[: n_rows + 1], axis=0, out=sums[i])

    for start in range(0, n, height):
        piece = slice(start, min(start + height, n))
        m = piece.stop - start
        z, c, b, terms = np.empty((m, nc)), clipped[:m], back[:m], rows[1 : m + 1]
        transform_values(radiance[piece], normalization.transform, out=z)
        z -= normalization.mean
        z /= spread
        invalid = np.isnan(z)
        n_invalid[piece] = np.count_nonzero(invalid, axis=1)
        n_missing += np.add.reduce(invalid, axis=0, dtype=np.uint8)
        np.clip(z, -clip, clip, out=c)
        stored[piece] = c
        np.copyto(b, stored[piece])
        for values in (z, c, b):
            np.copyto(values, 0.0, where=invalid)
        n_clipped += np.add.reduce(c != z, axis=0, dtype=np.uint8)
        np.subtract(z, b, out=terms)
        z += b
        z *= terms
        add(1, m)
        terms[...] = z
        add(2, m)
        c -= b
        np.maximum(rounding_max, np.abs(c, out=b).max(axis=0), out=rounding_max)
        np.square(c, out=terms)
        add(0, m)
    return Standardized(stored, n_invalid, n_missing, n_clipped, rounding_max, sums[0], sums[1:])


def _write_z(
    task: Task,
    normalization: Normalization,
    p: PlannedScene,
    folder: Path,
    coordinates: list[str],
    advance: Callable[[int], None],
) -> tuple[Written, NDArray[np.int64], dict[str, int], str]:
    """Write z; also returns (y, x) invalid samples, rejected samples by rule, and the digest of z."""
    ny, nx, nc = p.scene.shape
    n_invalid = np.zeros((ny, nx), np.int64)
    n_valid, n_clipped = np.zeros((2, nc), np.int64)
    written = Written(None, n_valid, n_clipped, np.zeros(nc), np.zeros(nc), np.zeros((2, nc)))
    counts: Counter[str] = Counter()
    attributes = {"long_name": f"normalised radiance ({normalization.transform})", "units": "1"}
    if coordinates:
        attributes["coordinates"] = " ".join(coordinates)  # CF

    def store(block: Block) -> tuple[Block, Standardized]:
        found = standardized(block.values.reshape(-1, nc), normalization, task.dtype)
        writer.write(block.rows.start, block.columns.start, found.stored.reshape(block.values.shape))
        return block, found

    with ZWriter(folder, p.scene.shape, task.dtype, attributes) as writer:
        for block, found in map_blocks(store, p.scene, task.validity, n_threads=task.n_threads):
            n_invalid[block.rows, block.columns] = found.n_invalid.reshape(block.values.shape[:2])
            written.n_valid[:] += block.n_pixels - found.n_missing
            written.n_clipped[:] += found.n_clipped
            np.maximum(written.rounding_max, found.rounding_max, out=written.rounding_max)
            written.rounding_sum[:] += found.rounding_sum
            written.lost[:] += found.lost
            counts.update(block.counts)
            counts[NO_STATISTICS] += int(found.n_missing.sum()) - sum(block.counts.values())
            advance(block.n_pixels)
    assert sum(counts.values()) == n_invalid.sum()
    return written, n_invalid, dict(counts), writer.sha256


def _write_product(task: Task, p: PlannedScene, product: str, target: TargetTransform, folder: Path) -> dict[str, Any]:
    """Write a level-2 field beside z; returns what the table of scenes has of it."""
    found = task.product_field(p, product)
    identity = {
        "source": found.path.name,
        "sha256": file_sha256(found.path),
        "n_valid": int(np.count_nonzero(np.isfinite(found.values))),
    }
    attributes = {
        "long_name": f"TEMPO {product} {found.field}",
        **({"units": found.units} if found.units else {}),
        "transform": target.to_attributes(),
        **identity,
        "field": found.field,
        "version": found.version,
        "quality": found.quality,
        "valid_range": list(found.valid_range),
        "invalid": found.counts,
        "absent": list(found.absent),
    }
    (folder / "l2").mkdir(exist_ok=True)
    write_field(folder, product, found.values, attributes)
    write_group(folder / "l2", {})
    return identity


def _record(
    p: PlannedScene,
    sha256: str,
    counts: Mapping[str, int],
    n_invalid: int,
    z_sha256: str,
    products: dict[str, dict[str, Any]],
) -> SceneRecord:
    return SceneRecord(
        id=p.id,
        source=p.scene.path.name,
        region=list(p.scene.region) if p.scene.region else None,
        shape=list(p.scene.shape),
        source_bytes=sum(file.stat().st_size for file in p.scene.files()),
        sha256=sha256,
        time=p.scene.time.isoformat() if p.scene.time else None,
        split=p.split,
        invalid=dict(counts),
        absent=list(p.scene.absent),
        z_sha256=z_sha256,
        n_invalid=n_invalid,
        stack=p.scene.stack,
        version=p.scene.version,
        products=products,
    )
