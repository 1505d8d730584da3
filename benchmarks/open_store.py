"""How long it takes to open a store of many scenes.

    python benchmarks/open_store.py [--json FILE] [--scenes N]

The store is made up: one small scene with four level-2 products is written, and the root lists it N times under other
names, as `prepare` would have written it. Opening parses only the root.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xarray as xr
from machine import machine
from progress import say

from spectralvae.cli import run
from spectralvae.data.store import Store, content_hash


def make_store(folder: Path, n_scenes: int) -> Path:
    """A store whose table has n_scenes rows."""
    granules, store = folder / "granules", folder / "store"
    products = ["NO2", "HCHO", "O3TOT", "CLDO4"]
    settings: dict[str, dict[str, Any]] = {
        "simulate": {"output_dir": str(granules), "n_granules": 1, "shape": [16, 16], "n_channels": 1028},
        "prepare": {
            "output_dir": str(store),
            "inputs": [str(granules)],
            "l2": {product: {"folder": str(granules)} for product in products},
            "split": {"val_fraction": 0},
        },
    }
    for command, config in settings.items():
        path = folder / f"{command}.yaml"
        path.write_text(json.dumps(config))
        assert run([command, str(path)]) == 0
    root = json.loads((store / "zarr.json").read_text())
    attributes, members = root["attributes"], root["consolidated_metadata"]["metadata"]
    record = attributes["scenes"][0]
    group = members[f"scenes/{record['id']}"]
    for name in [name for name in members if name.startswith(f"scenes/{record['id']}/")]:
        del members[name]  # as for more than store_writer.CONSOLIDATED_SCENES
    del group["consolidated_metadata"]
    for i in range(1, n_scenes):
        row = {**record, "id": f"{record['id']}_{i:05d}"}
        attributes["scenes"].append(row)
        members[f"scenes/{row['id']}"] = {**group, "attributes": {**group["attributes"], "id": row["id"]}}
    attributes["hash"] = content_hash(attributes, Store(store).arrays)
    (store / "zarr.json").write_text(json.dumps(root))
    return store


def seconds(function: Callable[[], Any], repeats: int) -> list[float]:
    """Of each call."""
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        found.append(time.perf_counter() - begun)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--scenes", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="open-store-") as name:
        say(f"a store of {options.scenes} scenes")
        store = make_store(Path(name), options.scenes)
        say(f"opening it, {options.repeats} times each")
        first = Store(store).scenes[0].id
        root_mb = (store / "zarr.json").stat().st_size / 1e6
        found = {
            "Store(path)": seconds(lambda: Store(store), options.repeats),
            "xarray.open_zarr(path)": seconds(lambda: xr.open_zarr(store, chunks=None).close(), options.repeats),
            "xarray.open_zarr(path/scenes/<id>)": seconds(
                lambda: xr.open_zarr(store / "scenes" / first, chunks=None).close(), options.repeats
            ),
        }
    print(f"{options.scenes} scenes, root of {root_mb:.1f} MB, load {load_before[0]:.1f}")
    for what, each in found.items():
        print(f"{what:36s} {statistics.median(each):6.3f} s ({min(each):.3f} - {max(each):.3f})")
    if options.json:
        report = {
            "machine": machine(["zarr", "xarray"]),
            "load_before": load_before,
            "load_after": os.getloadavg(),
            "scenes": options.scenes,
            "root_mb": root_mb,
            "seconds": {what: {"median": statistics.median(each), "all": each} for what, each in found.items()},
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
