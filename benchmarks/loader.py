"""How fast finished tiles come, from the store and from the ways that one would try instead; and what runs wait.

    python benchmarks/loader.py [--json FILE] [--scenes N] [--shape Y X CHANNEL] [--quick] ...

A finished tile is read, cropped, flipped, turned, and stands in a batch (B, y, x, channel) beside its noise. All ways
read the same tiles in the same order. Most go through the same reader threads and differ only in how a crop is read:

    store              the shard's file by preadv: what training uses
    cache              scenes that were read before, whole, into the memory of this machine: `data.cache`
    memmap             the same file as a numpy.memmap
    zarr raw           zarr's own API, uncompressed chunks (32, 64, channel)
    zarr lz4           the same chunks, Blosc with LZ4 and shuffle
    zarr zstd          the same chunks, Zstandard level 3

and one reads as the store does, but in torch's DataLoader: a map-style data set, and worker processes for readers.

Warm: from the page cache, counted once all memory for batches has been touched, while batches are taken as fast as they
come. Cold: every file is put out of the page cache first, and everything counts from the first read on (not for the
DataLoader, whose processes take longer to start than that, nor for the cache, which is read before). The ways take
turns, in another order at each repeat; a ratio is the median over the repeats of ours by theirs. CPU is the processor
time that a tile costs, all threads and processes together: what is left to compare by where the machine has other
things to do. Memory is what the process and its children have more of than before: USS, the private pages (which falls
when processes are forked, for what they share is private no longer), and PSS, which has their share of shared pages as
well. Pages of a mapped file count in both, though the kernel can take them back.

Then `spectralvae train` runs some steps on the same store (of the first type, from the page cache): the small network,
and on a CUDA device the full one in bf16-mixed as well, each without reader threads, with those of the default, and out
of a cache. Told is what share of its loop it waited for data, validated, saved and drew, as `run.json` has it. It
validates and saves once, at its end; of a long run these are other shares (scaling.py).

The data are smooth spectra with a little noise, so that they compress as normalised spectra do. Everything is written
to a temporary folder, at most 2.3 GB at the default size since one type comes after the other, and removed. The machine
should have nothing else to do; the load before and after stands in the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import zarr
from machine import machine
from progress import parse, say
from rich.console import Console
from steps import NETWORKS
from torch.utils.data import DataLoader, Dataset

from spectralvae.cli import run
from spectralvae.data import sampling
from spectralvae.data.cache import load_scenes
from spectralvae.data.loader import BATCHES_AHEAD, TileStream, make_sampler
from spectralvae.data.sampling import CropSampler
from spectralvae.data.store import REQUIRED_ARRAYS, SceneRecord, Store, scene_folder, shard_file
from spectralvae.data.store_writer import ZWriter, finish_store, write_n_invalid, write_scene_group
from spectralvae.weights.normalization import Normalization

NOISE_SHAPE = (32, 16, 16)
CHUNK = (32, 64)
CODECS: dict[str, Any] = {
    "zarr raw": None,
    "zarr lz4": zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
    "zarr zstd": zarr.codecs.ZstdCodec(level=3),
}
LAYOUTS = ("store", "cache", "memmap", *CODECS, "DataLoader")
ONLY_WARM = ("cache", "DataLoader")
WARM_UP = BATCHES_AHEAD + 4  # batches; fresh memory can cost more than everything else
COLD_BATCHES = 4
QUICK = {"shape": [131, 128, 1028], "dtypes": ["float16"], "readers": [0, 2], "repeats": 1, "run_steps": 10}
RUNS: dict[str, dict[str, Any]] = {  # of `train`, by what differs in its `data:` section
    "no readers": {"num_workers": 0},
    "readers": {},
    "cache": {"cache": True},
}
RUN_NETWORKS = {"cpu": ["small"], "cuda": ["small", "full"]}
RUN_BATCH_SIZES = {"cpu": 4, "cuda": 32}


# --- the data ---------------------------------------------------------------------------------


def spectra(random: np.random.Generator, nx: int, nc: int, dtype: str) -> np.ndarray:
    """(1, x, channel): six smooth components and 1 % of noise."""
    waves = np.cos(np.pi * np.arange(6)[:, None] * np.linspace(0, 1, nc))
    return (random.normal(size=(nx, 6)) @ waves + random.normal(0, 0.01, (nx, nc)))[None].astype(dtype)


def write_store(path: Path, n_scenes: int, shape: tuple[int, int, int], dtype: str, n_val: int = 0) -> Store:
    """A store without an invalid sample; the last so many scenes are for validation."""
    ny, nx, nc = shape
    record = SceneRecord("", "", None, [ny, nx, nc], 0, "", None, "train", {}, [], "", 0)
    splits = ["train"] * (n_scenes - n_val) + ["val"] * n_val
    records = [replace(record, id=str(s), split=split) for s, split in enumerate(splits)]
    for s, r in enumerate(records):
        random = np.random.default_rng(s)
        with ZWriter(scene_folder(path, r.id), shape, dtype, {}) as writer:
            for y in range(ny):
                writer.write(y, 0, spectra(random, nx, nc, dtype))
        write_n_invalid(scene_folder(path, r.id), np.zeros((ny, nx), int), nc)
        write_scene_group(scene_folder(path, r.id), r, {})
    normalization = Normalization("zscore", np.zeros(nc), np.ones(nc), 10.0, None, None, np.arange(1.0, nc + 1))
    extra = {name: np.zeros(nc) for name in REQUIRED_ARRAYS if name not in normalization.arrays()}
    finish_store(path, records, normalization, extra, dtype)
    return Store(path)


class ArrayStore(Store):
    """Reads crops from arrays that are given."""

    z: list[Any]

    def read_tile(self, scene: int, y: int, x: int, out: np.ndarray) -> None:
        out[...] = self.z[scene][y : y + out.shape[0], x : x + out.shape[1]]


def mapped(path: Path) -> list[Any]:
    """The scenes of a store as memory maps."""
    store = Store(path)
    return [
        np.memmap(shard_file(scene_folder(path, r.id)), store.dtype, "r", shape=tuple(r.shape)) for r in store.scenes
    ]


def open_store(folder: Path, layout: str) -> Store:
    """The store, such that crops are read in a certain way."""
    path = folder / "store"
    if layout in ("store", *ONLY_WARM):
        return Store(path)
    store = ArrayStore(path)
    store.z = (
        mapped(path)
        if layout == "memmap"
        else [zarr.open_array(folder / layout / r.id, mode="r") for r in store.scenes]
    )
    return store


def write_copies(folder: Path) -> None:
    """Copies of z in other chunks."""
    for layout, codec in CODECS.items():
        for s, z in enumerate(mapped(folder / "store")):
            zarr.create_array(
                folder / layout / str(s),
                data=np.asarray(z),
                chunks=(*CHUNK, z.shape[2]),
                compressors=codec,
                filters=None,
            )


# --- the ways to read -------------------------------------------------------------------------


class Tiles(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Finished tiles with their noise, one by one."""

    def __init__(self, store: Store, sampler: CropSampler) -> None:
        self.store, self.sampler = store, sampler

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        size, crop = self.sampler.tile_size, self.sampler.crop(i)
        tile = np.empty((size, size, self.store.normalization.n_channels), self.store.dtype)
        self.store.read_tile(crop.scene, crop.y, crop.x, sampling.as_read(tile, crop))
        noise = sampling.noise(self.sampler.seed, sampling.NOISE, i, NOISE_SHAPE)
        return torch.from_numpy(tile), torch.from_numpy(noise)


def batches(layout: str, store: Store, readers: int, tile_size: int, batch_size: int) -> Iterator[torch.Tensor]:
    """The tiles of one batch after the other, without end."""
    scenes = range(len(store.scenes))
    sampler = make_sampler(store, scenes, seed=0, tile_size=tile_size, max_invalid_fraction=0.5)
    if layout == "DataLoader":
        yield from (tiles for tiles, _ in DataLoader(Tiles(store, sampler), batch_size, num_workers=readers))
    stream = TileStream(
        store,
        sampler,
        batch_size=batch_size,
        tile_size=tile_size,
        noise_shape=NOISE_SHAPE,
        num_workers=readers,
        cache=load_scenes(store, scenes, torch.device("cpu"), Console(quiet=True)) if layout == "cache" else None,
    )
    yield from (batch.tiles for batch in stream)


def memory() -> dict[str, float]:
    """USS and PSS of this process and its children, in bytes."""
    here = psutil.Process()
    parts = [process.memory_full_info() for process in (here, *here.children(recursive=True))]
    return {"uss": sum(p.uss for p in parts), "pss": sum(p.pss for p in parts)}


def cpu_seconds() -> float:
    """Processor time of this process and its children, all threads."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


def measure_warm(open_batches: Callable[[], Iterator[torch.Tensor]], seconds: float) -> dict[str, float]:
    """Batches a second once all is running, and the processor time and memory that this takes."""
    gc.collect()
    before = memory()
    ours = open_batches()
    for _ in range(WARM_UP):
        next(ours)  # and nothing holds it: its memory is to be used again
    start, cpu = time.perf_counter(), cpu_seconds()
    for n in count(1):
        next(ours)
        elapsed = time.perf_counter() - start
        if n >= 3 and elapsed > seconds:
            break
    cpu = cpu_seconds() - cpu
    taken = {f"{key}_mb": (value - before[key]) / 1e6 for key, value in memory().items()}
    ours.close()  # type: ignore[attr-defined]
    return {"batches_per_s": n / elapsed, "cpu_s_per_batch": cpu / n, **taken}


def measure_cold(open_batches: Callable[[], Iterator[torch.Tensor]], folder: Path) -> dict[str, float]:
    """Batches a second from the first read on, with nothing in the page cache."""
    gc.collect()  # mapped pages stay
    for file in opened(folder):
        os.fsync(file)  # pages that still have to be written stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    ours = open_batches()
    start = time.perf_counter()
    for _ in islice(ours, COLD_BATCHES):
        pass
    elapsed = time.perf_counter() - start
    ours.close()  # type: ignore[attr-defined]
    return {"batches_per_s": COLD_BATCHES / elapsed}


def opened(folder: Path) -> Iterator[int]:
    """All files of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                yield file.fileno()


def warm_up(folder: Path) -> None:
    """Read every file into the page cache."""
    for file in opened(folder):
        while os.read(file, 2**24):
            pass


# --- the comparison ---------------------------------------------------------------------------


def check_same(folder: Path, options: argparse.Namespace) -> None:
    """All ways must give the same bytes, or the comparison is none."""
    found = {
        next(batches(layout, open_store(folder, layout), readers, options.tile_size, options.batch_size))
        .numpy()
        .tobytes()
        for layout in LAYOUTS
        for readers in (0, 2)
    }
    assert len(found) == 1


def compare(folder: Path, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each layout, number of readers, and warm or cold, with the results of all repeats."""
    say(f"writing {options.scenes} scenes in {dtype}, in all layouts")
    write_store(folder / "store", options.scenes, tuple(options.shape), dtype, n_val=1)
    write_copies(folder)
    check_same(folder, options)
    results: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for repeat in range(options.repeats):
        random = np.random.default_rng(repeat)
        cases = [
            (cache, readers, str(layout))
            for cache, readers in product(("warm", "cold"), options.readers)
            for layout in random.permutation(LAYOUTS)
        ]
        warm_up(folder)
        for cache, readers, layout in cases:
            say(f"{dtype}, repeat {repeat + 1} of {options.repeats}: {layout}, {readers} readers, {cache}")

            def open_batches(layout: str = layout, readers: int = readers) -> Iterator[torch.Tensor]:
                store = open_store(folder, layout)
                return batches(layout, store, readers, options.tile_size, options.batch_size)

            if cache == "warm":
                result = measure_warm(open_batches, options.seconds)
            elif layout not in ONLY_WARM:
                result = measure_cold(open_batches, folder)
            else:
                continue
            results.setdefault((layout, readers, cache), []).append(result)
    tile_bytes = options.tile_size**2 * options.shape[2] * np.dtype(dtype).itemsize
    return [
        summary(found, results["store", readers, cache], options.batch_size, tile_bytes)
        | {"layout": layout, "dtype": dtype, "readers": readers, "cache": cache}
        for (layout, readers, cache), found in results.items()
    ]


def summary(
    results: list[dict[str, float]], ours: list[dict[str, float]], batch_size: int, tile_bytes: int
) -> dict[str, Any]:
    """Medians, smallest and largest of the repeats, and how many times faster ours was."""
    tiles = [r["batches_per_s"] * batch_size for r in results]
    ratios = [o["batches_per_s"] / r["batches_per_s"] for o, r in zip(ours, results, strict=True)]
    row: dict[str, Any] = {
        "tiles_per_s": statistics.median(tiles),
        "tiles_per_s_all": tiles,
        "gb_per_s": statistics.median(tiles) * tile_bytes / 1e9,
        "ours_times_faster": statistics.median(ratios),
        "ours_times_faster_range": [min(ratios), max(ratios)],
    }
    if "cpu_s_per_batch" in results[0]:
        row["cpu_ms_per_tile"] = 1000 * statistics.median(r["cpu_s_per_batch"] for r in results) / batch_size
        row |= {key: statistics.median(r[key] for r in results) for key in ("uss_mb", "pss_mb")}
    return row


# --- runs -------------------------------------------------------------------------------------


def seconds_of_run(folder: Path, network: str, device: str, data: dict[str, Any], n_steps: int) -> dict[str, float]:
    """Where the time of the loop of a real run goes, by its own account."""
    output_dir, path = folder / "run", folder / "train.yaml"
    training: dict[str, Any] = {"n_steps": n_steps, "device": device}
    if (network, device) == ("full", "cuda"):
        training["precision"] = "bf16-mixed"
    config = {
        "output_dir": str(output_dir),
        "data": {"store": str(folder / "store"), **data},
        "model": NETWORKS[network].model,
        "training": training,
    }
    path.write_text(json.dumps(config))
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(["train", str(path)]) == 0
    seconds: dict[str, float] = json.loads((output_dir / "run.json").read_text())["starts"][-1]["seconds"]
    shutil.rmtree(output_dir)
    return seconds


def shares_of_runs(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each network and way to read."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"tile_size": options.tile_size, "batch_size": options.run_batch_size or RUN_BATCH_SIZES[device]}
    rows = []
    for network, (name, data) in product(options.run_networks or RUN_NETWORKS[device], RUNS.items()):
        say(f"a run: {network}, {name}")
        warm_up(folder / "store")
        seconds = seconds_of_run(folder, network, device, {**sizes, **data}, options.run_steps)
        whole = seconds.pop("all")
        shares = {what: part / whole for what, part in seconds.items()}
        row = {"network": network, "data": name, "device": device, "steps": options.run_steps, "seconds": whole}
        rows.append({**row, **sizes, "shares": shares})
        parts = ", ".join(f"{what} {share:.2%}" for what, share in shares.items())
        print(f"train, {network}, {name}: {options.run_steps} steps on {device} in {whole:.1f} s; {parts}", flush=True)
    return rows


# --- all --------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'layout':11s} {'dtype':8s} {'readers':>7s} {'cache':5s} {'tiles/s':>8s} {'(least - most)':>17s} "
        f"{'GB/s':>6s} {'CPU ms':>7s} {'USS MB':>7s} {'PSS MB':>7s}  ours is x times as fast"
    ]
    for r in rows:
        spread = f"({min(r['tiles_per_s_all']):.0f} - {max(r['tiles_per_s_all']):.0f})"
        used = (
            f"{r['cpu_ms_per_tile']:7.2f} {r['uss_mb']:7.0f} {r['pss_mb']:7.0f}" if r["cache"] == "warm" else " " * 23
        )
        low, high = r["ours_times_faster_range"]
        lines.append(
            f"{r['layout']:11s} {r['dtype']:8s} {r['readers']:7d} {r['cache']:5s} {r['tiles_per_s']:8.0f} "
            f"{spread:>17s} {r['gb_per_s']:6.2f} {used}  {r['ours_times_faster']:.2f} ({low:.2f} - {high:.2f})"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--shape", type=int, nargs=3, default=[131, 512, 1028], metavar=("Y", "X", "CHANNEL"))
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"])
    parser.add_argument("--readers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--tile-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="at least so long is every warm measurement")
    parser.add_argument("--run-steps", type=int, default=50, help="of each run of `train`")
    parser.add_argument("--run-networks", nargs="*", choices=NETWORKS, help=f"if left out: {RUN_NETWORKS}")
    parser.add_argument("--run-batch-size", type=int, help=f"if left out: {RUN_BATCH_SIZES}")
    parser.add_argument("--directory", type=Path, help="where the temporary folder is made")
    options = parse(parser, arguments, QUICK)
    n_threads = torch.get_num_threads()
    load_before, rows, runs = os.getloadavg(), [], []
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory(prefix="loader-", dir=options.directory) as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more processes than cores
            torch.set_num_threads(1)
            rows += compare(Path(folder), dtype, options)
            torch.set_num_threads(n_threads)
            if dtype == options.dtypes[0]:
                runs = shares_of_runs(Path(folder), options)
    rows.sort(key=lambda r: (r["cache"] == "cold", r["dtype"], r["readers"], LAYOUTS.index(r["layout"])))
    print(table(rows))
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "directory")}
        load = {"load_before": load_before, "load_after": os.getloadavg()}
        packages = ["numpy", "torch", "zarr", "numcodecs"]
        report = {"machine": machine(packages), "settings": settings, **load, "rows": rows, "runs": runs}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
