"""How long `prepare` takes over a granule, and what it needs, beside the script that one would write instead.

    python benchmarks/prepare.py [--json FILE] [--shape MIRROR_STEP XTRACK] [--granule FILE] [--quick] ...

The script reads the radiance and its flags whole, masks, takes the logarithm, computes mean and standard deviation per
channel with numpy, normalises, and saves one array. It makes no store: no digests, no noise floor, no coordinates, no
resume. Both see the same granule, simulated if none is given, and run as processes of their own, in turn, beginning
with the other one at each repeat; the files are in the page cache. MB/s are of float32 radiance. Memory is the peak
resident size of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from machine import machine
from progress import parse, say

QUICK = {"shape": [32, 2048], "repeats": 1}
OBVIOUS = """
import sys
import h5py
import numpy as np

with h5py.File(sys.argv[1]) as file:
    band = file["band_290_490_nm"]
    radiance = band["radiance"][...]
    flag = band["pixel_quality_flag"][...] if "pixel_quality_flag" in band else None
radiance[radiance < 1] = np.nan
if flag is not None:
    radiance[(flag & 0b100111) != 0] = np.nan
x = np.log(radiance.astype(np.float64))
mean, std = np.nanmean(x, axis=(0, 1)), np.nanstd(x, axis=(0, 1))
z = np.clip((x - mean) / (std + 1e-8), -10, 10).astype(np.float16)
np.save(sys.argv[2] + "/z.npy", z)
np.save(sys.argv[2] + "/mean.npy", mean)
np.save(sys.argv[2] + "/std.npy", std)
"""


def run(command: list[str]) -> dict[str, float]:
    """Wall-clock seconds, CPU seconds and peak memory of a process."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command[:4])} failed with {process.returncode}:\n{errors}")
    return {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_mb": usage.ru_maxrss / 1e3,
    }


def ours(granule: Path, folder: Path) -> dict[str, Any]:
    """`spectralvae prepare` of the granule alone, all of it for training."""
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    config = folder / "prepare.yaml"
    config.write_text(json.dumps({"output_dir": str(store), "inputs": [str(granule)], "split": {"val_fraction": 0}}))
    found: dict[str, Any] = run([sys.executable, "-m", "spectralvae", "prepare", str(config)])
    found["stages"] = json.loads((store / "run.json").read_text())["stages"]
    found["bytes"] = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    return found


def obvious(granule: Path, folder: Path) -> dict[str, Any]:
    """The script."""
    found: dict[str, Any] = run([sys.executable, "-c", OBVIOUS, str(granule), str(folder)])
    found["bytes"] = sum((folder / name).stat().st_size for name in ("z.npy", "mean.npy", "std.npy"))
    return found


def largest_difference(folder: Path) -> dict[str, float]:
    """Of mean and std between both, relative: they must have computed the same."""
    import zarr

    root = zarr.open_group(folder / "store", mode="r")
    return {
        name: float(np.nanmax(np.abs(np.asarray(root[name]) / np.load(folder / f"{name}.npy") - 1)))
        for name in ("mean", "std")
    }


def simulate(folder: Path, shape: list[int]) -> Path:
    """A granule of a shape, without level 2."""
    config = folder / "simulate.yaml"
    settings = {"output_dir": str(folder / "granules"), "n_granules": 1, "shape": shape, "products": []}
    config.write_text(json.dumps(settings))
    run([sys.executable, "-m", "spectralvae", "simulate", str(config)])
    return next((folder / "granules").glob("*.nc"))


def summary(results: list[dict[str, Any]], float32_mb: float) -> dict[str, Any]:
    """Medians, and all seconds."""
    seconds = [r["seconds"] for r in results]
    median = {key: statistics.median(r[key] for r in results) for key in ("seconds", "cpu_seconds", "peak_memory_mb")}
    row = {**median, "seconds_all": seconds, "mb_per_s": float32_mb / median["seconds"], "bytes": results[0]["bytes"]}
    if "stages" in results[0]:
        row["stages"] = {
            stage: {key: statistics.median(r["stages"][stage][key] for r in results) for key in facts}
            for stage, facts in results[0]["stages"].items()
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--shape", type=int, nargs=2, default=[131, 2048], metavar=("MIRROR_STEP", "XTRACK"))
    parser.add_argument("--granule", type=Path, help="a granule to take instead of a simulated one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where the temporary folder is made")
    options = parse(parser, None, QUICK)
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=options.directory) as name:
        folder = Path(name)
        say("the granule")
        granule = options.granule or simulate(folder, options.shape)
        with h5py.File(granule) as file:
            shape = file["band_290_490_nm/radiance"].shape
        float32_mb = 4 * float(np.prod(shape)) / 1e6
        results: dict[str, list[dict[str, Any]]] = {"spectralvae prepare": [], "numpy script": []}
        for repeat in range(options.repeats):
            turns = [("spectralvae prepare", ours), ("numpy script", obvious)]
            for label, function in turns[:: 1 if repeat % 2 == 0 else -1]:
                say(f"{label}: repeat {repeat + 1} of {options.repeats}")
                results[label].append(function(granule, folder))
        report: dict[str, Any] = {
            "machine": machine(["numpy", "h5py", "zarr"]),
            "load_before": load_before,
            "load_after": os.getloadavg(),
            "shape": list(shape),
            "source_bytes": granule.stat().st_size,
            "float32_mb": float32_mb,
            "largest_relative_difference": largest_difference(folder),
            **{label: summary(found, float32_mb) for label, found in results.items()},
        }
    for label in results:
        row = report[label]
        print(
            f"{label:20s} {row['seconds']:7.1f} s  {row['mb_per_s']:6.0f} MB/s of float32  peak "
            f"{row['peak_memory_mb']:6.0f} MB  writes {row['bytes'] / 1e6:.0f} MB "
            f"({row['bytes'] / report['source_bytes']:.2f} of the source)"
        )
        for stage, facts in row.get("stages", {}).items():
            print(f"  {stage:18s} {facts['seconds']:7.1f} s  peak by then {facts['peak_memory_mb']:6.0f} MB")
    print(f"mean and std agree within {max(report['largest_relative_difference'].values()):.1e}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
