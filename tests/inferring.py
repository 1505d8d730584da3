"""Scenes for the model of `tiny`, and runs of encode and decode: in this process, or in processes that are cut off."""

from __future__ import annotations

import os
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import running
import xarray as xr
import yaml
from running import Child, Starter
from tiny import N_CHANNELS, tiny_normalization

from spectralvae import cli

WAVELENGTH = tiny_normalization().wavelength
FILL = -1e30

# --- scenes ---------------------------------------------------------------------------------------


def radiance(ny: int, nx: int, seed: int = 0, invalid: float = 0.1) -> Any:
    """(y, x, channel) as the tiny model knows it, NaN where invalid."""
    random = np.random.default_rng(seed)
    values = np.exp(random.normal(1.5, 0.3, (ny, nx, N_CHANNELS))).astype(np.float32)
    values[random.random(values.shape) < invalid] = np.nan
    return values


def granule(write_granule: Callable[..., Path], path: Path, ny: int, nx: int, seed: int = 0, **changes: Any) -> Path:
    """A TEMPO file with places and times."""
    random = np.random.default_rng(seed + 1000)
    values = changes.pop("values", None)
    places = {"latitude": (20, 50), "longitude": (-120, -70), "solar_zenith_angle": (10, 60)}
    options = {
        "wavelength": np.broadcast_to(WAVELENGTH, (nx, N_CHANNELS)),
        "fill": FILL,
        "seconds": 1.4e9 + np.arange(ny) * 3.0,
        "geometry": {name: random.uniform(*limits, (ny, nx)) for name, limits in places.items()},
        **changes,
    }
    values = radiance(ny, nx, seed) if values is None else values
    return write_granule(path, np.where(np.isnan(values), FILL, values), **options)


def open_latents(path: Path) -> xr.Dataset:
    """A file of latents, in memory."""
    with xr.open_dataset(path) as dataset:
        return dataset.load()


# --- runs in this process -------------------------------------------------------------------------


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def message(self) -> str:
        """The one line of an error."""
        assert self.err.startswith("spectralvae: error: ") and self.err.count("\n") == 1, self
        return self.err.removeprefix("spectralvae: error: ").strip()

    @property
    def record(self) -> dict[str, Any]:
        """run.json."""
        return running.record(self.folder)


def call(command: str, inputs: Sequence[Any], folder: Path, capfd: Any, name: str, **more: Any) -> Result:
    """Run a command; ``name`` is that of its config and its results in ``folder``."""
    options = more.pop("options", ())
    config = write_config(folder / f"{name}.yaml", folder / name, inputs=inputs, **more)
    capfd.readouterr()
    code = cli.run([command, str(config), *options])
    return Result(code, *capfd.readouterr(), folder / name)


def check_refused(done: Result, *words: Any, left: Sequence[str] | None = None) -> None:
    """One line with some words, exit code 2, and of files none but those that are ``left``: without any, no folder."""
    assert done.code == 2, done
    assert all(str(word) in done.message for word in words), done.message
    if left is None:
        assert not done.folder.exists()
    else:
        assert names(done.folder) == {*left, "run.json", "config.yaml"}


def write_config(path: Path, output_dir: Path, model: Path, inputs: Sequence[Any], **more: Any) -> Path:
    """A config of either command."""
    inputs = [given if isinstance(given, dict) else str(given) for given in inputs]
    values = {"output_dir": str(output_dir), "model": str(model), "inputs": inputs, **more}
    path.write_text(yaml.safe_dump({"device": "cpu", "batch_size": 1, **values}))
    return path


def contents(path: Path) -> dict[str, Any]:
    """All arrays of a netCDF-4 file or Zarr folder by their places, as they are stored."""
    options = {"engine": "zarr", "consolidated": False} if path.is_dir() else {"engine": "h5netcdf"}
    found: dict[str, Any] = {}
    for group, dataset in xr.open_groups(path, decode_cf=False, **options).items():
        with dataset:
            for name, array in dataset.variables.items():
                values = array.values
                content = values.tolist() if values.dtype.kind == "O" else values.tobytes()  # NaN is not itself
                found[f"{group}/{name}".lstrip("/")] = (values.shape, values.dtype.str, content)
    return found


_BOOKKEEPING = {
    *("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME", "_Netcdf4Dimid", "_Netcdf4Coordinates", "_NCProperties"),
}


def stored(path: Path, parts: Mapping[str, slice] | None = None) -> dict[str, Any]:
    """All that h5py sees of a netCDF-4 file: of each group its attributes, of each dataset everything.

    Of dimensions named in `parts`, as in "/x", only that part.
    """
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        attributes = {
            key: None if isinstance(value, h5py.Empty) else (type(value), np.asarray(value).tolist())
            for key, value in item.attrs.items()
            if key not in _BOOKKEEPING
        }
        if isinstance(item, h5py.Group):
            found[name] = attributes
        elif not bytes(item.attrs.get("NAME", b"")).startswith(b"This is a netCDF dimension but not"):
            dims = [item.name] if item.is_scale else [axis[0].name for axis in item.dims]
            values = np.asarray(item[tuple((parts or {}).get(dim, slice(None)) for dim in dims)])
            raw = values.tolist() if values.dtype.kind == "O" else values.tobytes()
            found[name] = (dims, values.shape, item.dtype.str, attributes, raw)

    with h5py.File(path) as file:
        visit("/", file)
        file.visititems(visit)
    return found


def peak(call: Callable[[], Any]) -> int:
    """Bytes of Python and numpy that a call needs at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def same_results(folder: Path, whole: Result) -> bool:
    """Whether a folder holds the files of an uninterrupted run, with the same values."""
    files = [name for name in names(whole.folder) if name.endswith((".nc", ".zarr"))]
    return names(folder) == names(whole.folder) and all(
        contents(folder / name) == contents(whole.folder / name) for name in files
    )


def names(folder: Path) -> set[str]:
    """Of all that lies in a run's folder, hidden or not, but for the lock."""
    return {entry.name for entry in folder.iterdir()} - {".lock"}


# --- runs in processes of their own ---------------------------------------------------------------


class Runs(Starter):
    """Starts encode and decode as well as train."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def start(
        self,
        command: str,
        config: Path,
        *put: Sequence[Any],
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        to_the_end: bool = False,
    ) -> Child:
        """Start a command; `put` are called in its process before."""
        log = config.with_name(f"{config.stem}-{len(self._children)}")
        request = {
            "arguments": [command, str(config), *options],
            "put": [["unguarded"], ["small_figures"], *map(list, put)],
            "environment": dict(environment or {}),
            "log": str(log),
            "to_the_end": to_the_end,
        }
        self._children.append(Child(self, self.ask(request), log))
        return self._children[-1]

    def start_ranks(self, command: str, config: Path, n: int, *put: Sequence[Any], **options: Any) -> list[Child]:
        """Start the processes of one run, as torchrun does."""
        return [self.start(command, config, *put, environment=rank, **options) for rank in running.environments(n)]


def unguarded() -> None:
    """Files are not tried out: each process would have to start another one for that."""
    from spectralvae.readers import guard

    guard.try_out = lambda *_: None


def small_figures() -> None:
    """Pictures take most of a tiny run's time."""
    from matplotlib.figure import Figure

    from spectralvae.inference.decode import Comparison

    Comparison.draw = lambda *_: Figure(figsize=(1, 1))  # type: ignore[method-assign]


def at_tile(n: int, number: int, rank: int = 0) -> None:
    """One process sends itself a signal before it puts its n-th tile through the network, 0 being the first."""
    from spectralvae.inference.coder import Coder

    tiles = count()

    def run_network(original: Any, *arguments: Any) -> Any:
        if next(tiles) == n and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # the interpreter's turn to notice
        return original(*arguments)

    running._around(Coder, "run_network", run_network)


def at_rename(name: str) -> None:
    """SIGKILL right before a file takes its name."""

    def replace(original: Any, path: Path, target: Path) -> Any:
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, target)

    running._around(Path, "replace", replace)


def _prepare() -> None:
    import spectralvae.inference.decode
    import spectralvae.inference.encode  # noqa: F401


if __name__ == "__main__":
    prepare = running._prepare
    running._prepare = lambda: (_prepare(), prepare())[1]  # type: ignore[func-returns-value]
    vars(running).update({f.__name__: f for f in (unguarded, small_figures, at_tile, at_rename)})
    sys.exit(running._serve())
