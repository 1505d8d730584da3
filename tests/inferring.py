"""Scenes for the model of `tiny`, and runs of encode and decode: in this process, or in processes that are cut off."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import running
import yaml
import zarr
from running import Child, Starter
from tiny import N_CHANNELS, tiny_normalization

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


def write_config(path: Path, output_dir: Path, model: Path, inputs: Sequence[Any], **more: Any) -> Path:
    """A config of either command."""
    values = {"output_dir": str(output_dir), "model": str(model), "inputs": [_plain(i) for i in inputs], **more}
    path.write_text(yaml.safe_dump({"device": "cpu", "batch_size": 1, **values}))
    return path


def _plain(given: Any) -> Any:
    return str(given) if isinstance(given, Path) else given


def contents(path: Path) -> dict[str, Any]:
    """All arrays of a netCDF-4 file or Zarr folder by their places, as they are stored."""
    found: dict[str, Any] = {}

    def note(place: str, array: Any) -> None:
        values = np.asarray(array[...])
        content = values.tolist() if values.dtype.kind == "O" else values.tobytes()  # NaN is not itself, its bytes are
        found[place] = (values.shape, values.dtype.str, content)

    if path.is_dir():
        for place, item in zarr.open_group(path, mode="r").members(max_depth=None):
            if isinstance(item, zarr.Array):
                note(place, item)
        return found
    with h5py.File(path) as file:
        file.visititems(lambda place, item: note(place, item) if isinstance(item, h5py.Dataset) else None)
    return found


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


def at_file(name: str, number: int, tile: int, rank: int = 0) -> None:
    """One process sends itself a signal before it puts a tile of a file through the network, 0 being the first."""
    from spectralvae.files import jobs
    from spectralvae.inference.coder import Coder

    at = {"file": "", "tile": 0}

    def do_all(original: Any, left: Any, *arguments: Any) -> None:
        original([_Watched(job, at) for job in left], *arguments)

    def run_network(original: Any, self: Any, *arguments: Any) -> Any:
        here = at["file"] == name and at["tile"] == tile and int(os.environ.get("RANK", "0")) == rank
        at["tile"] += 1  # type: ignore[operator]
        if here:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # the interpreter's turn to notice
        return original(self, *arguments)

    running._around(jobs, "_do_all", do_all)
    running._around(Coder, "run_network", run_network)


class _Watched:
    """A job that tells when it begins."""

    def __init__(self, job: Any, at: dict[str, Any]) -> None:
        self._job, self._at = job, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)

    def do(self, advance: Any) -> Any:
        self._at.update(file=self._job.result.name, tile=0)
        return self._job.do(advance)


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
    vars(running).update({f.__name__: f for f in (unguarded, small_figures, at_file, at_rename)})
    sys.exit(running._serve())
