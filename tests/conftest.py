"""Shared by all tests: where the real files are, writers of tiny inputs, and the golden table at the end of a run."""

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import pytest
import yaml
from browsing import BROWSER, Browser
from stores import finish, write_scene

from spectralvae.data.store import Store
from spectralvae.data.store_writer import NamedArray
from spectralvae.data.targets import fit_transform
from spectralvae.readers.products import PRODUCTS
from spectralvae.weights.normalization import Normalization

# A job in the background of a shell inherits that Ctrl-C is ignored; tests and their processes send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test loses power: to wait for the disk, thousands of times, would prove nothing. A wrong descriptor still fails.
os.fsync = lambda descriptor: os.fstat(descriptor) and None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="run the tests of test_torture_*.py in full")


@pytest.fixture(scope="session")
def amount(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """amount(quick, full): how many cases a test tries, `full` of them under `make torture`."""
    return lambda quick, full: full if pytestconfig.getoption("torture") else quick


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real files, which are not part of the project."""
    folder = Path(os.environ.get("SPECTRALVAE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real files at {folder}: set SPECTRALVAE_REAL_DATA")
    return folder


@pytest.fixture(scope="session")
def write_granule() -> Callable[..., Path]:
    """A function that writes arrays as a small TEMPO level-1 file."""
    return _write_granule


def _write_granule(
    path: Path,
    radiance: np.ndarray,
    *,
    wavelength: np.ndarray | None = None,
    flag: np.ndarray | None = None,
    fill: float | None = None,
    band: str = "band_290_490_nm",
    units: str = "photons/s/cm^2/nm/sr",
    seconds: np.ndarray | None = None,
    geometry: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write (y, x, channel) radiance and flag, (x, channel) wavelength, seconds since 1980-01-06, (y, x) geometry.

    `fill` is declared as the radiance's _FillValue. What is None is left out, but for the wavelength: 300 nm and on.
    """
    ny, nx, nc = radiance.shape
    if wavelength is None:
        wavelength = np.broadcast_to(300 + 0.2 * np.arange(nc), (nx, nc))
    dims = ("mirror_step", "xtrack", "spectral_channel")
    with h5netcdf.File(path, "w") as file:
        file.dimensions = {"mirror_step": ny, "xtrack": nx}
        if seconds is not None:
            time = file.create_variable("time", dims[:1], data=np.asarray(seconds, np.float64))
            time.attrs["units"] = "seconds since 1980-01-06T00:00:00Z"
        group = file.create_group(band)
        group.dimensions = {"spectral_channel": nc}
        fillvalue = None if fill is None else np.float32(fill)
        variable = group.create_variable("radiance", dims, np.float32, fillvalue=fillvalue)
        variable[...] = radiance.astype(np.float32)
        variable.attrs["units"] = units
        group.create_variable("nominal_wavelength", dims[1:], data=wavelength.astype(np.float32))
        if flag is not None:
            group.create_variable("pixel_quality_flag", dims, data=flag.astype(np.uint16))
        for name, values in (geometry or {}).items():
            group.create_variable(name, dims[:2], data=values.astype(np.float32))
    return path


@pytest.fixture(scope="session")
def make_store() -> Callable[..., Store]:
    """A function that writes arrays of z as a finished store."""
    return _make_store


def _make_store(
    path: Path,
    scenes: Mapping[str, np.ndarray],
    *,
    val: tuple[str, ...] = (),
    dtype: str = "float16",
    arrays: Mapping[str, NamedArray] | None = None,
    level2: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> Store:
    """Write (y, x, channel) z of each named scene, with more arrays beside each; mean = 1, 2, ..., std = 2, 3, ...

    level2: (y, x) by product and scene; those that a scene has.
    """
    level2 = level2 or {}
    records = []
    for name, z in scenes.items():
        fields = {product: of[name] for product, of in level2.items() if name in of}
        split = "val" if name in val else "train"
        records.append(write_scene(path, name, z, arrays or {}, dtype=dtype, level2=fields, split=split))
    channels = np.arange(records[0].shape[2])
    normalization = Normalization("zscore", 1.0 + channels, 2.0 + channels, 10.0, None, None, 400.0 + channels)
    targets = {product: _fit(product, fields.values()) for product, fields in level2.items()}
    return finish(path, records, normalization, dtype=dtype, targets=targets)


def _fit(product: str, fields: Iterable[np.ndarray]) -> dict[str, Any]:
    spec = PRODUCTS[product]
    arrays = [field.astype(np.float32) for field in fields]
    return fit_transform(spec, spec.field, spec.units, lambda: arrays).to_attributes()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless browser."""
    if BROWSER is None:
        pytest.skip("no chromium or google-chrome on this machine: the page was not tried")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def starter() -> Iterator[Any]:
    """Starts train, encode and decode in processes of their own, which begin at once."""
    from inferring import Runs

    starter = Runs()
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the network of `tiny`; not to be changed."""
    from tiny import write_tiny

    folder: Path = write_tiny(tmp_path_factory.mktemp("model") / "export", step=12)
    return folder


@pytest.fixture(scope="session")
def network(model: Path) -> Any:
    """That model, loaded."""
    from spectralvae import load_model

    return load_model(model)


@pytest.fixture
def make(write_granule: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a granule for that model into tmp_path."""
    from inferring import granule

    return lambda name, *size, **changes: granule(write_granule, tmp_path / name, *size, **changes)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pictures take most of a tiny run's time: drawn only where a test is marked so."""
    from matplotlib.figure import Figure

    from spectralvae.training.validation import Validation
    from spectralvae.training.watch import Watch

    if "pictures" not in request.keywords:
        monkeypatch.setattr(Watch, "draw", lambda *_: None)
        monkeypatch.setattr(Validation, "draw", lambda *_: Figure(figsize=(1, 1)))


@cache
def _check_forward(settings: str, batch_size: int) -> None:
    from spectralvae.training.network import check_forward

    check_forward(json.loads(settings), batch_size)


@pytest.fixture
def train(
    store: Path, tmp_path: Path, pictures: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, Path]]:
    """Run `spectralvae train` on a tiny network and the module's `store`; returns exit code and run directory.

    Whether a network can take a batch at all, which takes a quarter of a tiny run's time, is tried out once for each.
    """
    from spectralvae.cli import run as cli
    from spectralvae.training import setup

    monkeypatch.setattr(setup, "check_forward", lambda settings, n: _check_forward(json.dumps(settings), n))

    def run(name: str = "run", *, model: Mapping[str, Any] | None = None, **training: Any) -> tuple[int, Path]:
        config: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "data": {"store": str(store), "batch_size": 3, "tile_size": 8, "n_val_tiles": 5},
            "model": {"chs": [16, 8], "z_channels": 4, "embed_dim": 4, "n_attention_heads": 2, **(model or {})},
            "optimizer": {"lr": 2e-3},
            "training": {"n_steps": 14, "save_every": 5, "val_every": 4, "log_every": 2, "plot_every": 7},
        }
        config["data"] |= training.pop("data", {})
        config["optimizer"] |= training.pop("optimizer", {})
        config["training"] |= {"device": "cpu", **training}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return cli(["train", str(path)]), tmp_path / name

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        (*name.removeprefix("golden:").split(":"), value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name.startswith("golden:")
    ]
    if rows:
        terminalreporter.section("largest deviations from mltools")
        for case, quantity, value in sorted(rows):
            terminalreporter.write_line(f"{case:22s} {quantity:34s} {value}")
