"""Last stage of `prepare`: root arrays and root metadata; from then on there is a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from spectralvae.data.splits import PlannedScene
from spectralvae.data.store import SceneRecord
from spectralvae.data.store_statistics import Statistics
from spectralvae.data.store_writer import finish_store
from spectralvae.data.targets import TargetTransform
from spectralvae.data.tasks import NO_STATISTICS, Task
from spectralvae.data.write import Written, load_written
from spectralvae.errors import ConfigError, RunError
from spectralvae.readers.base import FLAG
from spectralvae.runtime.console import warn
from spectralvae.weights.normalization import Normalization


def finish(
    task: Task,
    planned: Sequence[PlannedScene],
    statistics: Statistics,
    normalization: Normalization,
    targets: Mapping[str, TargetTransform],
    console: Console,
) -> str:
    """Complete the store with what was written of each scene; returns its hash.

    Raises:
        ConfigError: no scene of a split has a valid sample.
        RunError: a file changed while it was prepared.
    """
    written = [load_written(task, p) for p in planned]
    records = [w.record for w in written if w.record is not None]
    left_out = [p.id for p, w in zip(planned, written, strict=True) if w.record is None]
    for split in {p.split for p in planned} - {record.split for record in records}:
        problem = f"no scene of the {split} split has a valid sample ({', '.join(left_out[:5])})"
        raise ConfigError(problem, key="split", remedy="split otherwise")
    arrays = {**statistics.more, **_written_arrays(written, statistics)}
    store_hash = finish_store(
        task.root,
        records,
        normalization,
        arrays,
        task.dtype,
        statistics_from=statistics.source,
        left_out=left_out,
        targets={product: target.to_attributes() for product, target in targets.items()},
    )
    _report(task.root, records, left_out, arrays, console)
    return store_hash


def _written_arrays(written: Sequence[Written], statistics: Statistics) -> dict[str, Any]:
    """Root arrays that only writing could tell.

    Raises:
        RunError: not the samples were written that had been measured.
    """
    training = [w for w in written if w.record and w.record.split == "train"]
    count = sum((w.n_valid for w in training), np.int64(0))
    if "count" in statistics.more and not np.array_equal(count, statistics.more["count"]):
        problem = "a file changed between the statistics and the writing"
        raise RunError(problem, key="inputs", remedy="start afresh with --overwrite")
    n_valid = sum((w.n_valid for w in written), np.int64(0))
    lost = np.sum([w.lost for w in training], axis=0)
    return {
        "count": count,
        "n_clipped": sum((w.n_clipped for w in written), np.int64(0)),
        "rounding_max": np.max([w.rounding_max for w in written], axis=0),
        "rounding_rms": np.sqrt(sum(w.rounding_sum for w in written) / np.maximum(n_valid, 1)),
        "lost_mean": lost[0] / np.maximum(count, 1),
        "lost_square": lost[1] / np.maximum(count, 1),
    }


def _report(
    path: Path,
    records: Sequence[SceneRecord],
    left_out: Sequence[str],
    arrays: Mapping[str, Any],
    console: Console,
) -> None:
    """Print what was made, with the invalid samples by rule."""
    total = sum(int(np.prod(r.shape)) for r in records)
    rules = {rule: sum(r.invalid[rule] for r in records) for rule in records[0].invalid}
    by_rule = ", ".join(f"{rule} {n / total:.2%}" for rule, n in rules.items() if n) or "none"
    console.print(f"invalid samples: {by_rule}")
    for product in records[0].products:
        pixels = sum(r.shape[0] * r.shape[1] for r in records)
        valid = sum(r.products[product]["n_valid"] for r in records)
        console.print(f"{product}: {valid} of {pixels} pixels are valid ({valid / pixels:.1%})")
    if left_out:
        warn(console, f"left out, for they have no valid sample: {', '.join(left_out)}")
    if any(FLAG in r.absent and r.version for r in records):
        warn(console, f"some granules have no {FLAG}: their bad samples count as valid")
    absent = sorted({name for r in records for name in r.absent})
    if absent:
        console.print(f"absent in some scenes: {', '.join(absent)}")
    if unknown := rules.get(NO_STATISTICS, 0):
        warn(console, f"{unknown} samples are of channels without statistics, and stay masked")
    if clipped := int(arrays["n_clipped"].sum()):
        console.print(f"clipped: {clipped} samples ({clipped / total:.2g} of all)")
    console.print(
        f"rounding of z: rms {np.sqrt(np.mean(arrays['rounding_rms'] ** 2)):.1e}, at most "
        f"{arrays['rounding_max'].max():.1e}"
    )
    n_val = sum(r.split == "val" for r in records)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and ".partial" not in file.parts)
    source = sum({r.sha256: r.source_bytes for r in records}.values())  # regions share their file
    console.print(
        f"store {path}: {len(records) - n_val} training and {n_val} validation scenes, {total / 1e6:.1f} M samples, "
        f"{size / 1e6:.1f} MB ({size / source:.2f} of the sources)"
    )
