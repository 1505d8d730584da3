"""How fast `encode` and `decode` are, and what they need, beside the script that one would write instead.

    python benchmarks/encode.py [--json FILE] [--granule FILE] [--model RUN] [--shape MIRROR_STEP XTRACK] [--quick] ...

    plain                reads radiance and flags whole, normalises them with numpy, cuts tiles that do not overlap, and
                         puts one batch after the other through the network in float32; all stays in memory, nothing is
                         written. `decode` begins with the latents in memory, and no sample of what it gives is masked.
    command-no-overlap   the command with `overlap: 0`: as many tiles as the script has, or a row of them more
    command              the command as it is: its tiles share a quarter along each axis, and are blended

The command looks into the granule in a process of its own first, takes its SHA-256, keeps few rows in memory, and
writes netCDF-4 files, of `decode` also all radiance. All take turns in one process, beginning with another one at each
repeat, once each was called and the files are in the page cache. MB/s are of float32 radiance. A ratio is the median
over the repeats of the script's time by the command's in the same repeat. Shares are of the command's time that its
main thread spends in reading and normalising, in the network, and in waiting for what is written. Memory is the peak
RSS of a process of its own for each, and so is what imports alone take of it. `difference` is the rms of that of the
latents without overlap from the script's, by their standard deviation; they agree to rounding if tiles of both lie
alike, that is, if the granule is as high and wide as some whole tiles.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import torch
from progress import parse, say
from steps import Network, make_config, make_model, peak_memory, spread, write_report

from spectralvae import load_model
from spectralvae.cli import run
from spectralvae.config.loading import dump_config
from spectralvae.data.wavelengths import channel_means
from spectralvae.files.writer_base import Writer
from spectralvae.inference.coder import Coder
from spectralvae.inference.reading import _ZReader
from spectralvae.readers import open_reader
from spectralvae.readers.tempo import REJECTED_FLAG_BITS
from spectralvae.weights.artifact import pack_model, write_folder
from spectralvae.weights.loading import artifact_of
from spectralvae.weights.normalization import Normalization

WAYS = ("plain", "command-no-overlap", "command")
QUICK = {"shape": [64, 128], "repeats": 1}
STAGES = {"reading": (_ZReader, "read"), "network": (Coder, "run_network"), "writing": (Writer, "write")}


@dataclass(frozen=True)
class Case:
    """What all ways are given."""

    granule: Path
    model: Path
    folder: Path
    device: str
    batch_size: int


# --- the command ------------------------------------------------------------------------------


def command(name: str, folder: Path, **config: Any) -> Path:
    """Run a command of ours; returns its output directory."""
    output_dir = folder / name
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"output_dir": str(output_dir), **config}))
    with contextlib.redirect_stdout(io.StringIO()):
        code = run([name.split("-")[0], str(path), "--overwrite"])
    if code:
        sys.exit(f"spectralvae {name} failed with {code}")
    return output_dir


def ours(task: str, way: str, case: Case) -> Path:
    """`encode`, or `decode` of what it made; returns the file that is made."""
    names = {name: f"{name}-{way}" for name in ("encode", "decode")}
    given = case.granule if task == "encode" else case.folder / names["encode"] / f"{case.granule.stem}.latents.nc"
    output_dir = command(
        names[task],
        case.folder,
        inputs=[str(given)],
        model=str(case.model),
        device=case.device,
        batch_size=case.batch_size,
        **({"overlap": 0} if way == "command-no-overlap" else {}),
    )
    return next(output_dir.glob("*.nc"))


@contextlib.contextmanager
def stages() -> Iterator[dict[str, float]]:
    """Seconds that a command spends in each stage while the block runs."""
    found: dict[str, float] = defaultdict(float)

    def timed(stage: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                found[stage] += time.perf_counter() - begun

        return call

    with contextlib.ExitStack() as stack:
        for stage, (owner, name) in STAGES.items():
            stack.enter_context(mock.patch.object(owner, name, timed(stage, getattr(owner, name))))
        yield found


# --- the script -------------------------------------------------------------------------------


@torch.no_grad()
def plain_encode(case: Case) -> np.ndarray:
    """The latents of whole tiles, (tiles along y, along x, E, cells, cells)."""
    model = load_model(case.model).to(case.device)
    artifact = artifact_of(model)
    normalization, tile = artifact.normalization, artifact.settings["shape"][1]
    assert normalization is not None
    with h5py.File(case.granule) as file:
        band = file[normalization.band]
        radiance = band["radiance"][...].astype(np.float32)
        flag = band["pixel_quality_flag"][...]
    radiance[(flag & sum(1 << bit for bit in REJECTED_FLAG_BITS)) != 0] = np.nan
    radiance[radiance < normalization.min_radiance] = np.nan
    z = (np.log(radiance) - normalization.mean.astype(np.float32)) / normalization.std.astype(np.float32)
    z = np.nan_to_num(np.clip(z, -normalization.clip, normalization.clip))
    ny, nx, nc = z.shape
    z = np.pad(z, ((0, -ny % tile), (0, -nx % tile), (0, 0)))
    rows, columns = z.shape[0] // tile, z.shape[1] // tile
    tiles = z.reshape(rows, tile, columns, tile, nc).transpose(0, 2, 4, 1, 3).reshape(-1, nc, tile, tile)
    latents = [
        model.encode(torch.from_numpy(tiles[k : k + case.batch_size]).to(case.device)).mean.cpu().numpy()
        for k in range(0, len(tiles), case.batch_size)
    ]
    return np.concatenate(latents).reshape(rows, columns, *latents[0].shape[1:])


@torch.no_grad()
def plain_decode(case: Case, latents: np.ndarray) -> np.ndarray:
    """Radiance (y, x, channel) of the whole tiles that `plain_encode` made latents of."""
    model = load_model(case.model).to(case.device)
    normalization = artifact_of(model).normalization
    assert normalization is not None
    rows, columns, *cells = latents.shape
    flat = torch.from_numpy(latents.reshape(-1, *cells))
    z = np.concatenate(
        [
            model.decode(flat[k : k + case.batch_size].to(case.device)).cpu().numpy()
            for k in range(0, len(flat), case.batch_size)
        ]
    )
    z = np.clip(z, -normalization.clip, normalization.clip)
    _, nc, tile, _ = z.shape
    z = z.reshape(rows, columns, nc, tile, tile).transpose(0, 3, 1, 4, 2).reshape(rows * tile, columns * tile, nc)
    radiance: np.ndarray = np.exp(z * normalization.std.astype(np.float32) + normalization.mean.astype(np.float32))
    return radiance


def difference(latents: np.ndarray, file: Path) -> float:
    """Between the script's latents and those of a command."""
    with h5py.File(file) as found:
        theirs = found["latent"][...]
    rows, columns, e, cells, _ = latents.shape
    whole = latents.transpose(2, 0, 3, 1, 4).reshape(e, rows * cells, columns * cells)
    whole = whole[:, : theirs.shape[1], : theirs.shape[2]]
    return float(np.sqrt(np.mean((whole - theirs) ** 2)) / theirs.std())


# --- what they are given ----------------------------------------------------------------------


def simulate(folder: Path, shape: list[int], n_channels: int) -> Path:
    """A granule without level 2."""
    made = command("simulate", folder, n_granules=1, shape=shape, n_channels=n_channels, products=[])
    return next(made.glob("*.nc"))


def write_model(folder: Path, granule: Path, chs: list[int], tile: int) -> Path:
    """An export of a network with random weights, and the statistics of a granule's first rows."""
    with open_reader(granule) as scene:
        radiance = scene.read(slice(0, min(8, scene.shape[0])))[0].astype(np.float64)
        radiance[radiance < 1.0] = np.nan
        x = np.log(radiance)
        normalization = Normalization(
            "log_zscore",
            np.nanmean(x, axis=(0, 1)),
            np.nanstd(x, axis=(0, 1)),
            clip=10.0,
            min_radiance=1.0,
            band=scene.band,
            wavelength=channel_means(granule, scene.wavelength),
            units=scene.units,
        )
    config = make_config(Network({"chs": chs}, normalization.n_channels, tile, 1))
    write_folder(folder, pack_model(make_model(config), dump_config(config.model), normalization, None))
    return folder


# --- measuring --------------------------------------------------------------------------------


def measure(task: str, case: Case, latents: np.ndarray, repeats: int, float32_mb: float) -> dict[str, Any]:
    """All figures of `encode` or `decode`, by way."""

    def call(way: str) -> Any:
        if way != "plain":
            return ours(task, way, case)
        return plain_encode(case) if task == "encode" else plain_decode(case, latents)

    for way in WAYS:  # what happens once
        say(f"{task}, {way}: first call")
        call(way)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    shares: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        for k in range(len(WAYS)):
            way = WAYS[(repeat + k) % len(WAYS)]
            say(f"{task}, {way}: repeat {repeat + 1} of {repeats}")
            with stages() as found:
                begun = time.perf_counter()
                call(way)
                seconds[way].append(time.perf_counter() - begun)
            shares[way].append({stage: found[stage] / seconds[way][-1] for stage in STAGES})
    rows: dict[str, Any] = {}
    for way in WAYS:
        say(f"{task}, {way}: memory")
        row: dict[str, Any] = {
            "seconds": spread(seconds[way]),
            "mb_per_s": float32_mb / statistics.median(seconds[way]),
        }
        if way == "plain":
            function, arguments = (plain_encode, (case,)) if task == "encode" else (plain_decode, (case, latents))
            row |= peak_memory(function, *arguments)
        else:
            row |= peak_memory(ours, task, way, case)
            ratios = [p / o for p, o in zip(seconds["plain"], seconds[way], strict=True)]
            row["faster_than_plain"] = spread(ratios)
            row["shares"] = {stage: statistics.median(each[stage] for each in shares[way]) for stage in STAGES}
        rows[way] = row
    return rows


def show(task: str, rows: dict[str, Any]) -> None:
    """Print a table."""
    for way, row in rows.items():
        seconds, memory = row["seconds"], row["memory_mb"] + row["imports_mb"]
        line = (
            f"{task:7s} {way:19s} {seconds['median']:8.2f} s ({seconds['least']:.2f} - {seconds['most']:.2f})  "
            f"{row['mb_per_s']:7.1f} MB/s of float32  peak {memory:6.0f} MB, imports {row['imports_mb']:.0f}"
        )
        if "shares" in row:
            shares = ", ".join(f"{stage} {share:.0%}" for stage, share in row["shares"].items())
            line += f"  {row['faster_than_plain']['median']:.2f} x plain; {shares}"
        print(line)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--granule", type=Path, help="a TEMPO granule with flags, instead of a simulated one")
    parser.add_argument("--shape", type=int, nargs=2, default=[128, 256], metavar=("MIRROR_STEP", "XTRACK"))
    parser.add_argument("--channels", type=int, default=1028, help="of a simulated granule")
    parser.add_argument("--model", type=Path, help="a run or export, instead of a network with random weights")
    parser.add_argument("--chs", type=int, nargs="+", default=[64, 64, 64], help="of a network with random weights")
    parser.add_argument("--tile", type=int, default=64, help="its tiles")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where the temporary folder is made")
    return parse(parser, arguments, QUICK)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, save."""
    options = options_of(arguments)
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="encode-", dir=options.directory) as name:
        folder = Path(name)
        say("the granule and the model")
        granule = (options.granule or simulate(folder, options.shape, options.channels)).absolute()
        model = options.model or write_model(folder / "model", granule, options.chs, options.tile)
        case = Case(granule, model.absolute(), folder, options.device, options.batch_size)
        with open_reader(granule) as scene:
            shape = scene.shape
        float32_mb = 4 * float(np.prod(shape)) / 1e6
        found: dict[str, Any] = {"shape": list(shape), "float32_mb": float32_mb}
        found["source_bytes"] = granule.stat().st_size
        latents = plain_encode(case)
        for task in ("encode", "decode"):
            found[task] = measure(task, case, latents, options.repeats, float32_mb)
            show(task, found[task])
        found["difference"] = difference(latents, next((folder / "encode-command-no-overlap").glob("*.nc")))
    print(f"latents without overlap differ from the script's by {found['difference']:.1e} of their standard deviation")
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        write_report(options.json, settings, load_before, found)


if __name__ == "__main__":
    main()
