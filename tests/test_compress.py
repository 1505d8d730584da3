"""`spectralvae compress` and `decompress`: what comes back, how far from the source, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from inferring import FILL, WAVELENGTH, Result, call, contents, granule, names, radiance, write_config
from tiny import N_CHANNELS, SETTINGS, flip, tiny_model, tiny_normalization, write_tiny

from spectralvae import cli, open_scene
from spectralvae.codec import stages
from spectralvae.codec.container import read_container, write_container
from spectralvae.weights.artifact import pack_model, write_folder
from spectralvae.weights.settings import build_model

Make, Run, Both = Callable[..., Path], Callable[..., Result], Callable[..., tuple[Path, Path, dict[str, Any]]]

BAND = "band_290_490_nm"
ZSCORE = tiny_normalization(transform="zscore", min_radiance=None)
DARK = np.full((12, 16, N_CHANNELS), FILL, np.float32)


@pytest.fixture(scope="module")
def compressed(model: Path, write_granule: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with several components."""
    folder = tmp_path_factory.mktemp("compressed")
    y, x, c = np.ogrid[:12, :16, :N_CHANNELS]
    values = np.exp(1.5 + 0.5 * np.sin(y / 3) * np.cos(c) + 0.4 * np.cos(x / 4) * c / 6).astype(np.float32)
    source = granule(write_granule, folder / "a.nc", 12, 16, values=values)
    config = write_config(folder / "a.yaml", folder / "results", model, [source], bound={"z": 0.1})
    assert cli.run(["compress", str(config)]) == 0
    return folder / "results" / "a.svae"


@pytest.fixture
def run(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """A function that runs either command in this process; the name is that of config and folder."""
    return lambda command, *inputs, name="", **more: call(
        command, inputs, tmp_path, capfd, name or command, **{"model": model, **more}
    )


@pytest.fixture
def both(run: Run) -> Both:
    """A function that compresses and decompresses one scene: the file, what comes back, and its entry of the report."""

    def there_and_back(source: Any, **more: Any) -> tuple[Path, Path, dict[str, Any]]:
        made = run("compress", source, options=("--overwrite",), **more)
        assert made.code == 0, made.err
        (file,) = made.folder.glob("*.svae")
        given = {"model": more["model"]} if "model" in more else {}
        back = run("decompress", file, options=("--overwrite",), **given)
        assert back.code == 0, back.err
        (scene,) = back.folder.glob("*.nc")
        return file, scene, json.loads((made.folder / "report.json").read_text())["files"][file.name]

    return there_and_back


def values_of(*paths: Path) -> Any:
    """Radiance in float64."""
    return (open_scene(path).radiance.values.astype(np.float64) for path in paths)


def check_refused(result: Result, *words: Any, code: int = 2) -> None:
    """One line with some words, and no file."""
    assert result.code == code, result
    assert all(str(word) in result.message for word in words), result.message
    assert not [*result.folder.glob("*.nc"), *result.folder.glob("*.svae")]


# --- how far from the source ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "of", "target"),
    [
        *(("bound", "z", value) for value in (1.0, 0.1, 0.01, 0.001)),
        *(("bound", "relative", value) for value in (0.2, 0.01)),
        *(("rate", "mse", value) for value in (0.1, 0.001)),
    ],
)
def test_errors_are_at_most_what_is_asked_for(make: Make, both: Both, key: str, of: str, target: float) -> None:
    """A bound holds beyond the clip, too; a mean squared error is within it. All but radiance stays byte by byte."""
    values = radiance(21, 30)
    values[3, 4, :] = 1e30  # z of 22 and more
    source = make("a.nc", 21, 30, values=values)
    _, decoded, facts = both(source, **{key: {of: target}})
    before, after = values_of(source, decoded)
    normalization = tiny_normalization()
    valid = np.nan_to_num(before) >= normalization.min_radiance
    assert np.array_equal(np.isfinite(after), valid)
    z, back = (((np.log(some) - normalization.mean) / (normalization.std + 1e-8))[valid] for some in (before, after))
    clip = normalization.clip if key == "rate" else np.inf
    found = {
        "z": np.abs(back - z).max(),
        "relative": np.abs(after / before - 1)[valid].max(),
        "mse": np.square(np.clip(back, -clip, clip) - np.clip(z, -clip, clip)).mean(),
    }
    assert found[of] <= target
    if key == "rate":
        assert found["mse"] > 0.5 * target  # bytes are not wasted
        assert found["z"] > 10
    told = {"z": facts["max_error"], "relative": facts["max_relative_error"], "mse": facts["mse"]}
    assert told == pytest.approx(found, rel=3e-3)
    assert (facts["n_valid"], facts["n_beyond_clip"]) == (valid.sum(), N_CHANNELS)
    given, kept = contents(source), contents(decoded)
    assert kept.pop(f"{BAND}/radiance") and kept.items() <= given.items()
    assert {f"{BAND}/latitude", f"{BAND}/longitude", f"{BAND}/nominal_wavelength", "time"} <= kept.keys()


@pytest.mark.parametrize(
    ("changes", "offset"),
    [
        ({"transform": "zscore", "min_radiance": None, "mean": np.full(N_CHANNELS, 3000.0)}, 3000.0),
        ({"std": np.full(N_CHANNELS, 1e-4), "mean": np.full(N_CHANNELS, 1.5)}, None),
    ],
)
def test_a_bound_that_float32_makes_tight(
    make: Make, both: Both, tmp_path: Path, changes: Any, offset: float | None
) -> None:
    """Radiance in float32 is rounded by up to 1e-4 of z here, more than the margin that is tried at first."""
    normalization = tiny_normalization(**changes)
    noise = np.random.default_rng(0).normal(0, 1, (12, 16, N_CHANNELS))
    values = noise * normalization.std + offset if offset else np.exp(normalization.mean + normalization.std * noise)
    source = make("a.nc", 12, 16, values=values.astype(np.float32))
    coarse = write_tiny(tmp_path / "coarse", normalization=normalization)
    _, decoded, facts = both(source, model=coarse, bound={"z": 0.05})
    before, after = values_of(source, decoded)
    if offset is None:
        before, after = np.log(before), np.log(after)
    assert np.abs((after - before) / (normalization.std + 1e-8)).max() <= 0.05
    assert facts["stages"]["margin"] > stages.MARGIN


@pytest.mark.parametrize("keys", [{"bound": {"z": 0.05}}, {"rate": {"step": 0.1}}])
def test_samples_at_the_end_of_float32(make: Make, both: Both, run: Run, tmp_path: Path, keys: Any) -> None:
    values = radiance(8, 8)
    values[1, 2, 3] = 3.4e38
    source = make("a.nc", 8, 8, values=values)
    _, decoded, _ = both(source, **keys)
    found = open_scene(decoded).radiance.values
    assert not np.isinf(found).any() and np.isfinite(found[1, 2, 3])
    zscore = write_tiny(tmp_path / "zscore", normalization=ZSCORE)
    result = run("compress", source, model=zscore, name="zscore_run", **keys)
    assert result.code == (2 if "bound" in keys else 0)


@pytest.mark.parametrize(("key", "targets"), [("bytes", (14000, 11000, 8000)), ("step", (0.02, 0.2, 2.0))])
def test_fewer_bytes_cost_errors(make: Make, both: Both, key: str, targets: tuple[float, ...]) -> None:
    source, sizes, errors = make("a.nc", 24, 24), [], []
    for target in targets:
        file, _, facts = both(source, rate={key: target})
        sizes.append(file.stat().st_size)
        errors.append(facts["mse"])
        assert (facts["bytes"], facts["ratio"]) == (sizes[-1], pytest.approx(4 * 24 * 24 * N_CHANNELS / sizes[-1]))
        if key == "bytes":
            assert 0.9 * target < sizes[-1] <= target
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors) and errors[0] < errors[-1]
    if key == "step":
        assert errors[0] == pytest.approx(0.02**2 / 12, rel=0.3)  # of what is rounded to such a step


def test_bytes_are_counted(make: Make, run: Run) -> None:
    files = [make(f"{name}.nc", 16, 16, seed=i) for i, name in enumerate("ab")]
    made = run("compress", *files, bound={"z": 0.3})
    report = json.loads((made.folder / "report.json").read_text())
    assert set(report["files"]) == {"a.svae", "b.svae"}
    stored = 4 * 16 * 16 * N_CHANNELS  # not compressed
    for name, facts in report["files"].items():
        size = (made.folder / name).stat().st_size
        assert facts["bytes"] == size
        assert 0 < size - sum(facts["blocks"].values()) < 4000  # head, lengths, checksums
        assert facts["bytes_without_coordinates"] == size - facts["blocks"]["LAYT"]
        assert (facts["radiance_bytes"], facts["ratio_to_source"]) == (stored, stored / size)
    assert report["radiance_bytes"] == 2 * stored
    assert report["model_bytes"] == 4 * sum(p.numel() for p in tiny_model().parameters())
    saved = (2 * stored - report["bytes"]) / 2
    assert report["break_even_files"] == (int(np.ceil(report["model_bytes"] / saved)) if saved > 0 else None)
    assert names(made.folder) == {"a.svae", "b.svae", "report.json", "run.json", "config.yaml"}

    record = made.record  # as after a kill right after the last file
    record["files"].pop("b.svae")
    (made.folder / "run.json").write_text(json.dumps({**record, "state": "running"}))
    (made.folder / "report.json").unlink()
    assert run("compress", *files, bound={"z": 0.3}).code == 0
    found = json.loads((made.folder / "report.json").read_text())
    assert found["bytes"] == report["bytes"]
    assert found["files"]["b.svae"]["max_error"] == report["files"]["b.svae"]["max_error"]


def test_a_scene_of_another_format_by_a_network_of_no_use(tmp_path: Path, both: Both) -> None:
    """Not yet trained, its last convolution is zeros: nothing tells what its latents are worth."""
    values = radiance(9, 11)
    scipy.io.savemat(tmp_path / "a.mat", {"cube": values})
    spec = {"path": str(tmp_path / "a.mat"), "variable": "cube", "wavelength": {"first": 300.0, "last": 300 + 5 / 3}}
    write_folder(tmp_path / "fresh", pack_model(build_model(SETTINGS), SETTINGS, tiny_normalization(), None))
    _, decoded, facts = both(spec, model=tmp_path / "fresh", bound={"z": 0.05})
    assert set(facts["estimated_bytes"]) == {"components"}
    assert np.allclose(open_scene(decoded).wavelength, WAVELENGTH)
    (found,) = values_of(decoded)
    assert np.array_equal(np.isfinite(found), np.nan_to_num(values) >= tiny_normalization().min_radiance)
    assert np.nanmax(np.abs(np.log(found / values) / tiny_normalization().std)) <= 0.05


# --- what is refused ------------------------------------------------------------------------------


def test_every_damaged_file_is_refused(compressed: Path, make: Make, run: Run, tmp_path: Path, request: Any) -> None:
    whole = compressed.read_bytes()
    head, blocks = read_container(compressed)
    assert head["source"] == "a.nc" and {"LAYT", "MASK", "SPEC"} <= blocks.keys()
    random = np.random.default_rng(0)
    damaged = tmp_path / "damaged.svae"
    for _ in range(500 if request.config.getoption("--torture") else 20):
        damaged.write_bytes(whole)
        flip(damaged, int(random.integers(len(whole))), int(random.integers(8)))
        check_refused(run("decompress", damaged, options=("--overwrite",)), damaged)
        damaged.write_bytes(whole[: random.integers(len(whole))])
        check_refused(run("decompress", damaged, options=("--overwrite",)), damaged)
    check_refused(run("decompress", make("b.nc", 8, 8)), "b.nc")


@pytest.mark.parametrize(
    "changes",
    [
        *({"shape": shape} for shape in ([12, 16], [12, 16, 10**9], [10**6, 10**6, N_CHANNELS], [16, 12, N_CHANNELS])),
        {"model_sha256": 5},
        *({"overlap": overlap} for overlap in (-2, 3)),
        *({"stages": {"step": step}} for step in (0.0, float("nan"))),
        *({"stages": {"n_components": n}} for n in (-1, 99, 1)),
        *({"stages": {"bound": bound}} for bound in (None, {"kind": "foo", "value": 0.1})),
        {"stages": {"network_step": 0.1}},
        {"other": 1},
    ],
)
def test_heads_that_make_no_sense_are_refused(
    compressed: Path, run: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """By somebody who knows how to make checksums."""
    head, blocks = read_container(compressed)
    assert head["stages"]["n_components"] > 1
    for key, value in changes.items():
        head[key] = {**head[key], **value} if isinstance(value, dict) else value
    write_container(tmp_path / "crafted.svae", head, list(blocks.items()))
    check_refused(run("decompress", tmp_path / "crafted.svae"), "crafted.svae")


def test_another_model_is_refused(compressed: Path, run: Run, tmp_path: Path) -> None:
    changed = tiny_normalization(mean=np.log(np.arange(N_CHANNELS) + 3.1))
    for what, changes in {"weights": {"seed": 1}, "normalisation": {"normalization": changed}}.items():
        result = run("decompress", compressed, model=write_tiny(tmp_path / what, **changes))
        check_refused(result, what, "a.svae")
        assert not result.folder.exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "bound"),
        ({"bound": {"z": 0.1}, "rate": {"step": 0.1}}, "rate"),
        ({"bound": {"z": 0.1, "relative": 0.1}}, "relative"),
        ({"rate": {}}, "mse"),
        ({"bound": {"z": 1e-6}}, "bound.z"),
        ({"bound": {"relative": 1e-6}}, "bound.relative"),
        ({"bound": {"relative": 0.1}, "model": ZSCORE}, "log_zscore"),
        ({"rate": {"bytes": 500}}, "500"),
        ({"bound": {"z": 0.1}, "values": DARK}, "a.nc"),
    ],
)
def test_what_cannot_be_done(make: Make, run: Run, tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    source = make("a.nc", 12, 16, values=keys.get("values"))
    keys = {key: value for key, value in keys.items() if key != "values"}
    if "model" in keys:
        keys["model"] = write_tiny(tmp_path / "zscore", normalization=keys["model"])
    check_refused(run("compress", source, **keys), says, code=1 if says == "500" else 2)


def test_a_scene_at_night_may_be_left_out(make: Make, run: Run) -> None:
    dark = make("dark.nc", 12, 16, values=DARK)
    result = run("compress", make("a.nc", 8, 8), dark, bound={"z": 0.1}, all_invalid="leave_out")
    assert result.code == 0
    assert names(result.folder) == {"a.svae", "report.json", "run.json", "config.yaml"}
