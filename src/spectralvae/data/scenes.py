"""What is done with each scene: measured for the statistics, then normalised and written.

Each step works on one scene alone and leaves its result in a scratch folder. So any worker can do any scene in any
order, and an interrupted preparation resumes with the scenes that are not done.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from spectralvae.config import ProductConfig
from spectralvae.data.splits import PlannedScene
from spectralvae.data.statistics import Moments, RatioHistogram
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
from spectralvae.data.validity import Validity
from spectralvae.errors import InputError
from spectralvae.readers import Scene
from spectralvae.readers.base import file_sha256
from spectralvae.readers.products import ProductField, read_product
from spectralvae.weights.normalization import Normalization, transform_values

BLOCK_SAMPLES = 4_000_000  # read at a time: 16 MB of float32
BELOW_MINIMUM = "below_min_radiance"
NO_STATISTICS = "no_statistics"  # the rule of samples whose channel has no valid training sample

Advance = Callable[[int], None]  # called with the number of pixels that are done
Counts = dict[str, int]


@dataclass(frozen=True)
class Bench:
    """Where and how scenes are worked on.

    Attributes:
        root: the store.
        scratch: for results of each scene.
        validity: which samples may be used.
        products: the level-2 products.
        dtype: of z.
        leave_out: whether a scene without any valid sample is left out; otherwise it is refused.
        measured: whether training scenes are measured: for mean and std, or to know which of them are left out.
    """

    root: Path
    scratch: Path
    validity: Validity
    products: Mapping[str, ProductConfig]
    dtype: str
    leave_out: bool
    measured: bool


@dataclass(frozen=True)
class Block:
    """A piece of a scene.

    Attributes:
        rows, columns: where it lies.
        values: (rows, columns, channel) radiance, NaN = invalid.
        counts: rejected samples by rule.
        noise: its standard deviation, as values; None where unknown or not asked for.
    """

    rows: slice
    columns: slice
    values: NDArray[np.float32]
    counts: Counts
    noise: NDArray[np.float32] | None

    @property
    def n_pixels(self) -> int:
        """How many pixels it has."""
        return int(self.values.shape[0] * self.values.shape[1])


def blocks(scene: Scene, validity: Validity, *, noise: bool = False) -> Iterator[Block]:
    """All of a scene, one block being read while another is worked on."""
    solar_zenith = scene.coordinates()["solar_zenith_angle"][1] if validity.max_solar_zenith is not None else None

    def read(rows: slice, columns: slice) -> Block:
        values, counts = scene.read(rows, columns)
        counts |= validity.reject(values, None if solar_zenith is None else solar_zenith[rows, columns])
        return Block(rows, columns, values, counts, scene.read_noise(rows, columns) if noise else None)

    windows = list(scene.blocks(BLOCK_SAMPLES))
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        following = reader.submit(read, *windows[0])
        for window in windows[1:]:
            block, following = following.result(), reader.submit(read, *window)
            yield block
        yield following.result()


# --- statistics -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What the statistics need to know of a scene.

    Attributes:
        moments: of its transformed valid samples.
        noise: of radiance_error / radiance; None where the source has no error.
        n_small: samples below min_radiance.
    """

    moments: Moments
    noise: RatioHistogram | None
    n_small: int

    @property
    def n_valid(self) -> int:
        """How many samples are valid."""
        return int(np.sum(self.moments.count, dtype=np.int64))


def measure(bench: Bench, p: PlannedScene, advance: Advance) -> None:
    """Measure a training scene, and keep its level-2 fields at hand for their statistics.

    Raises:
        InputError: it cannot be read, or has no valid sample.
    """
    kept = _result_file(bench, p, "measured")
    if bench.measured and not kept.is_file():
        nc = p.scene.shape[2]
        moments, noise, n_small = Moments.empty(nc), RatioHistogram.empty(nc), 0
        counts: Counter[str] = Counter()
        with p.scene:
            for block in blocks(p.scene, bench.validity, noise=True):
                moments = moments.merge(Moments.of(transform_values(block.values, bench.validity.transform)))
                if block.noise is not None:
                    with np.errstate(all="ignore"):
                        noise = noise.merge(RatioHistogram.of(block.noise / block.values))
                n_small += block.counts[BELOW_MINIMUM]
                counts.update(block.counts)
                advance(block.n_pixels)
        if not moments.count.any() and not bench.leave_out:
            raise _all_invalid(p, counts)
        _save(kept, n_small=n_small, noise=noise.counts, **vars(moments))
    else:
        advance(p.scene.shape[0] * p.scene.shape[1])
    for product in bench.products:
        kept = _result_file(bench, p, product)
        if not kept.is_file():
            _save(kept, values=product_field(bench, p, product).values)


def load_measured(bench: Bench, p: PlannedScene) -> Measured:
    """What `measure` found."""
    with np.load(_result_file(bench, p, "measured")) as saved:
        moments = Moments(**{name: saved[name] for name in Moments.__dataclass_fields__})
        noise = RatioHistogram(saved["noise"])
        return Measured(moments, noise if noise.counts.any() else None, int(saved["n_small"]))


def load_product_values(bench: Bench, p: PlannedScene, product: str) -> NDArray[np.float32]:
    """The level-2 field that `measure` read: (y, x) float32, NaN = invalid."""
    with np.load(_result_file(bench, p, product)) as saved:
        return np.asarray(saved["values"], np.float32)


def product_field(bench: Bench, p: PlannedScene, product: str) -> ProductField:
    """Read a level-2 field on the pixels of a scene."""
    wanted = bench.products[product]
    return read_product(
        p.products[product],
        product,
        field=wanted.field,
        max_quality=wanted.max_quality,
        valid_range=wanted.valid_range,
        region=p.scene.region,
        expected_shape=p.scene.full_shape[:2],
    )


def _result_file(bench: Bench, p: PlannedScene, what: str) -> Path:
    return bench.scratch / f"{p.id}.{what}.npz"


# --- writing ----------------------------------------------------------------------------------


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
    bench: Bench,
    normalization: Normalization,
    targets: Mapping[str, TargetTransform],
    p: PlannedScene,
    advance: Advance,
) -> None:
    """Write a scene into the store; what was begun appears under its name only when it is complete.

    Raises:
        InputError: it cannot be read, or has no valid sample.
    """
    folder = scene_folder(bench.root, p.id)
    kept = _result_file(bench, p, "written")
    if kept.is_file() and (folder.is_dir() or load_written(bench, p).record is None):
        advance(p.scene.shape[0] * p.scene.shape[1])
        return
    attempt = bench.scratch / f"{p.id}.{uuid4().hex}"  # another worker may be at it, taken for lost
    attempt.mkdir()
    with p.scene, ThreadPoolExecutor(1, thread_name_prefix="digest") as digester:
        source_digest = digester.submit(p.scene.sha256)
        coordinates = p.scene.coordinates()
        written, n_invalid, counts, z_sha256 = _write_z(bench, normalization, p, attempt, list(coordinates), advance)
        wavelength = p.scene.wavelength
    record: SceneRecord | None = None
    if written.n_valid.any():
        arrays: dict[str, NamedArray] = {
            **coordinates,
            "wavelength": (("x", "channel")[-wavelength.ndim :], wavelength),
        }
        products = {product: _write_product(bench, p, product, target, attempt) for product, target in targets.items()}
        record = _record(p, source_digest.result(), counts, int(n_invalid.sum()), z_sha256, products)
        write_n_invalid(attempt, n_invalid, p.scene.shape[2])
        record = write_scene_group(attempt, record, arrays)
    elif not bench.leave_out:
        raise _all_invalid(p, counts)
    _save(kept, **{**vars(written), "record": json.dumps(record and asdict(record))})
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


def load_written(bench: Bench, p: PlannedScene) -> Written:
    """What `write` left."""
    with np.load(_result_file(bench, p, "written")) as saved:
        record = json.loads(str(saved["record"]))
        return Written(**{**saved, "record": None if record is None else SceneRecord(**record)})


def _write_z(
    bench: Bench,
    normalization: Normalization,
    p: PlannedScene,
    folder: Path,
    coordinates: list[str],
    advance: Advance,
) -> tuple[Written, NDArray[np.int64], Counts, str]:
    """Write z; also returns (y, x) invalid samples, rejected samples by rule, and the digest of z."""
    ny, nx, nc = p.scene.shape
    n_invalid = np.zeros((ny, nx), np.int64)
    n_valid, n_clipped = np.zeros((2, nc), np.int64)
    written = Written(None, n_valid, n_clipped, np.zeros(nc), np.zeros(nc), np.zeros((2, nc)))
    counts: Counter[str] = Counter()
    attributes = {"long_name": f"normalised radiance ({normalization.transform})", "units": "1"}
    if coordinates:
        attributes["coordinates"] = " ".join(coordinates)  # CF
    with ZWriter(folder, p.scene.shape, bench.dtype, attributes) as writer:
        for block in blocks(p.scene, bench.validity):
            z = normalization.standardize(block.values)
            clipped = np.clip(z, -normalization.clip, normalization.clip)
            stored = writer.write(block.rows.start, block.columns.start, clipped)
            invalid = np.isnan(z)
            n_invalid[block.rows, block.columns] = np.count_nonzero(invalid, axis=-1)
            n_missing = np.count_nonzero(invalid, axis=(0, 1))
            written.n_valid[:] += block.n_pixels - n_missing
            for values in (z, clipped):
                values[invalid] = 0.0
            written.n_clipped[:] += np.count_nonzero(clipped != z, axis=(0, 1))
            back = np.where(invalid, 0.0, stored.astype(np.float64))
            written.lost[0] += (z - back).sum(axis=(0, 1))
            written.lost[1] += ((z - back) * (z + back)).sum(axis=(0, 1))
            clipped -= back
            np.maximum(written.rounding_max, np.abs(clipped).max(axis=(0, 1)), out=written.rounding_max)
            written.rounding_sum[:] += np.einsum("yxc,yxc->c", clipped, clipped)
            counts.update(block.counts)
            counts[NO_STATISTICS] += int(n_missing.sum()) - sum(block.counts.values())
            advance(block.n_pixels)
    assert sum(counts.values()) == n_invalid.sum()
    return written, n_invalid, dict(counts), writer.sha256


def _write_product(
    bench: Bench, p: PlannedScene, product: str, target: TargetTransform, folder: Path
) -> dict[str, Any]:
    """Write a level-2 field beside z; returns what the table of scenes has of it."""
    found = product_field(bench, p, product)
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
    p: PlannedScene, sha256: str, counts: Counts, n_invalid: int, z_sha256: str, products: dict[str, dict[str, Any]]
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
        invalid=counts,
        absent=list(p.scene.absent),
        z_sha256=z_sha256,
        n_invalid=n_invalid,
        stack=p.scene.stack,
        version=p.scene.version,
        products=products,
    )


def _all_invalid(p: PlannedScene, counts: Counts) -> InputError:
    by_rule = ", ".join(f"{rule} {n}" for rule, n in counts.items() if n)
    return InputError(
        f"scene {p.id} has no valid sample ({by_rule})",
        path=p.scene.path,
        remedy="take it out of inputs, or set validity.all_invalid: leave_out",
    )


def _save(path: Path, **arrays: Any) -> None:
    """Write a result; by a name of its own first, for another worker may be at the same scene."""
    temporary = path.with_name(f".{uuid4().hex}.npz")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
