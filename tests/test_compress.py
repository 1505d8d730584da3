"""`spectralvae compress` and `decompress`: what comes back, how far from the source, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from inferring import FILL, WAVELENGTH, Result, contents, granule, names, radiance, write_config
from tiny import N_CHANNELS, SETTINGS, flip, tiny_model, tiny_normalization, write_tiny

from spectralvae import cli, open_scene
from spectralvae.codec import entropy, stages
from spectralvae.codec.coding import SceneCoder
from spectralvae.codec.container import read_container, write_container
from spectralvae.codec.stages import MARGIN_NETWORK
from spectralvae.inference.coder import Coder
from spectralvae.weights.artifact import Artifact, pack_model, write_folder
from spectralvae.weights.settings import build_model

BAND = "band_290_490_nm"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "export", step=12)


@pytest.fixture
def make(write_granule: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a granule into tmp_path."""
    return lambda name, *size, **changes: granule(write_granule, tmp_path / name, *size, **changes)


@pytest.fixture
def run(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """A function that runs either command in this process; the name is that of config and folder."""

    def run(command: str, *inputs: Any, name: str = "", options: tuple[str, ...] = (), **more: Any) -> Result:
        name = name or command
        config = write_config(tmp_path / f"{name}.yaml", tmp_path / name, inputs=inputs, **{"model": model, **more})
        capfd.readouterr()
        code = cli.run([command, str(config), *options])
        return Result(code, *capfd.readouterr(), tmp_path / name)

    return run


@pytest.fixture
def both(run: Callable[..., Result]) -> Callable[..., tuple[Path, Path, dict[str, Any]]]:
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


def z_of(path: Path, clip: float | None = None) -> Any:
    """z as its definition has it: of a file that anything of ours may have written, in float64."""
    normalization = tiny_normalization()
    values = open_scene(path).radiance.values.astype(np.float64)
    z = (np.log(values) - normalization.mean) / (normalization.std + 1e-8)
    return z if clip is None else np.clip(z, -clip, clip)


def kept(source: Path, decoded: Path) -> None:
    """All but radiance is the source's, byte by byte, and so are its invalid samples."""
    before, after = contents(source), contents(decoded)
    for place, stored in after.items():
        if not place.endswith("/radiance"):
            assert stored == before[place], place
    assert {f"{BAND}/latitude", f"{BAND}/longitude", f"{BAND}/nominal_wavelength", "time"} <= after.keys()


def valid_of(source: Path) -> Any:
    """What the model takes for valid."""
    values = open_scene(source).radiance.values
    return np.isfinite(values) & (np.nan_to_num(values) >= tiny_normalization().min_radiance)


# --- how far from the source ----------------------------------------------------------------------


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is used even where the scene would be smaller without."""
    monkeypatch.setattr(SceneCoder, "_cheaper", lambda *_: True)
    monkeypatch.setattr(SceneCoder, "_better", lambda *_: True)


@pytest.mark.parametrize(
    ("bound", "with_network"), [(1.0, False), (0.1, False), (0.01, False), (0.001, False), (1.0, True), (0.01, True)]
)
def test_no_sample_is_further_off_than_the_bound(
    make: Callable[..., Path],
    both: Callable[..., Any],
    request: pytest.FixtureRequest,
    bound: float,
    with_network: bool,
) -> None:
    if with_network:
        request.getfixturevalue("network")
    source = make("a.nc", 21, 30)
    _, decoded, facts = both(source, bound={"z": bound})
    assert ("LATN" in facts["blocks"]) == with_network
    z, found, valid = z_of(source), z_of(decoded), valid_of(source)
    assert np.array_equal(np.isfinite(found), valid)
    error = np.abs(found - z)[valid].max()
    assert error <= bound
    assert facts["max_error"] == pytest.approx(error, abs=1e-6)
    assert facts["n_valid"] == valid.sum()
    kept(source, decoded)


@pytest.mark.parametrize("bound", [0.2, 0.01])
def test_no_sample_is_further_off_than_a_share_of_it(
    make: Callable[..., Path], both: Callable[..., Any], bound: float
) -> None:
    source = make("a.nc", 21, 30)
    _, decoded, facts = both(source, bound={"relative": bound})
    before, after = (open_scene(path).radiance.values.astype(np.float64) for path in (source, decoded))
    valid = valid_of(source)
    error = np.abs(after / before - 1)[valid].max()
    assert error <= bound
    assert facts["max_relative_error"] == pytest.approx(error, rel=1e-4)


def test_a_bound_holds_beyond_the_clip(make: Callable[..., Path], both: Callable[..., Any]) -> None:
    values = radiance(12, 16)
    values[3, 4, :] = 1e30  # z of 22 and more, where the clip is 9.5
    values[5, 6, 2] = 3e12
    source = make("a.nc", 12, 16, values=values)
    _, decoded, _ = both(source, bound={"z": 0.05})
    z = z_of(source)
    assert np.nanmax(z) > 20
    assert np.abs(z_of(decoded) - z)[valid_of(source)].max() <= 0.05


def test_errors_beyond_the_clip_are_told(make: Callable[..., Path], both: Callable[..., Any]) -> None:
    values = radiance(12, 16)
    values[3, 4, :] = 1e30
    source = make("a.nc", 12, 16, values=values)
    _, decoded, facts = both(source, rate={"mse": 0.01})
    error = np.abs(z_of(decoded) - z_of(source))[valid_of(source)].max()
    assert error > 10
    assert facts["max_error"] == pytest.approx(error, rel=1e-5)
    assert facts["n_beyond_clip"] == N_CHANNELS
    assert facts["max_relative_error"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "offset"),
    [
        ({"transform": "zscore", "min_radiance": None, "mean": np.full(N_CHANNELS, 3000.0)}, 3000.0),
        ({"std": np.full(N_CHANNELS, 1e-4), "mean": np.full(N_CHANNELS, 1.5)}, None),
    ],
)
def test_a_bound_that_float32_makes_tight(
    make: Callable[..., Path], both: Callable[..., Any], tmp_path: Path, changes: Any, offset: float | None
) -> None:
    """Radiance in float32 is rounded by up to 1e-4 of z here, more than the margin that is tried at first."""
    normalization = tiny_normalization(**changes)
    write_folder(tmp_path / "coarse", pack_model(tiny_model(), SETTINGS, normalization, None))
    noise = np.random.default_rng(0).normal(0, 1, (12, 16, N_CHANNELS))
    values = noise * normalization.std + offset if offset else np.exp(normalization.mean + normalization.std * noise)
    source = make("a.nc", 12, 16, values=values.astype(np.float32))
    _, decoded, facts = both(source, model=tmp_path / "coarse", bound={"z": 0.05})
    before, after = (open_scene(path).radiance.values.astype(np.float64) for path in (source, decoded))
    if offset is None:
        before, after = np.log(before), np.log(after)
    assert np.abs((after - before) / (normalization.std + 1e-8)).max() <= 0.05
    assert facts["stages"]["margin"] > stages.MARGIN


@pytest.mark.parametrize("keys", [{"bound": {"z": 0.05}}, {"rate": {"step": 0.1}}])
def test_samples_at_the_end_of_float32(
    make: Callable[..., Path], both: Callable[..., Any], run: Callable[..., Result], tmp_path: Path, keys: Any
) -> None:
    values = radiance(8, 8)
    values[1, 2, 3] = 3.4e38
    source = make("a.nc", 8, 8, values=values)
    _, decoded, _ = both(source, **keys)
    found = open_scene(decoded).radiance.values
    assert not np.isinf(found).any() and np.isfinite(found[1, 2, 3])
    normalization = tiny_normalization(transform="zscore", min_radiance=None)
    write_folder(tmp_path / "zscore", pack_model(tiny_model(), SETTINGS, normalization, None))
    result = run("compress", source, model=tmp_path / "zscore", name="zscore_run", **keys)
    assert result.code == (2 if "bound" in keys else 0)
    assert "bound" not in keys or "a sample has a z of" in result.message


def test_an_untrained_network_is_of_no_use(make: Callable[..., Path], both: Callable[..., Any], tmp_path: Path) -> None:
    """Its last convolution is zeros, so nothing tells what its latents are worth."""
    write_folder(tmp_path / "fresh", pack_model(build_model(SETTINGS), SETTINGS, tiny_normalization(), None))
    _, _, facts = both(make("a.nc", 12, 16), model=tmp_path / "fresh", bound={"z": 0.5})
    assert set(facts["estimated_bytes"]) == {"components"}


@pytest.mark.parametrize("mse", [0.1, 1e-3])
def test_the_mean_squared_error_is_at_most_what_was_asked_for(
    make: Callable[..., Path], both: Callable[..., Any], mse: float
) -> None:
    source = make("a.nc", 21, 30)
    _, decoded, facts = both(source, rate={"mse": mse})
    valid = valid_of(source)
    found = np.square(z_of(decoded, 9.5) - z_of(source, 9.5))[valid].mean()
    assert found <= mse
    assert found > 0.5 * mse  # bytes are not wasted
    assert facts["mse"] == pytest.approx(found, rel=1e-3)


def test_a_file_has_at_most_the_bytes_asked_for(make: Callable[..., Path], both: Callable[..., Any]) -> None:
    source = make("a.nc", 40, 40)
    errors = []
    for n_bytes in (40000, 30000, 20000):
        file, _, facts = both(source, rate={"bytes": n_bytes})
        assert file.stat().st_size <= n_bytes
        assert facts["bytes"] == file.stat().st_size
        assert facts["ratio"] == pytest.approx(4 * 40 * 40 * N_CHANNELS / file.stat().st_size)
        errors.append(facts["mse"])
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_a_finer_step_costs_bytes_and_saves_errors(make: Callable[..., Path], both: Callable[..., Any]) -> None:
    source = make("a.nc", 24, 24)
    facts = [both(source, rate={"step": step})[2] for step in (0.02, 0.2, 2.0)]
    assert [f["bytes"] for f in facts] == sorted((f["bytes"] for f in facts), reverse=True)
    assert [f["mse"] for f in facts] == sorted(f["mse"] for f in facts)
    assert facts[0]["mse"] == pytest.approx(0.02**2 / 12, rel=0.3)  # of what is rounded to such a step


def test_bytes_are_counted(make: Callable[..., Path], run: Callable[..., Result]) -> None:
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


def test_a_file_made_right_before_a_kill_is_counted(make: Callable[..., Path], run: Callable[..., Result]) -> None:
    files = [make(f"{name}.nc", 12, 12, seed=i) for i, name in enumerate("ab")]
    made = run("compress", *files, bound={"z": 0.3})
    report = (made.folder / "report.json").read_text()
    record = made.record
    record["files"].pop("b.svae")
    (made.folder / "run.json").write_text(json.dumps({**record, "state": "running"}))
    (made.folder / "report.json").unlink()
    again = run("compress", *files, bound={"z": 0.3})
    assert again.code == 0 and "2 of 2 files are done already" in again.out
    found, before = json.loads((made.folder / "report.json").read_text()), json.loads(report)
    assert found["bytes"] == before["bytes"]
    assert found["files"]["b.svae"]["max_error"] == before["files"]["b.svae"]["max_error"]


def test_a_scene_of_another_format_comes_back(tmp_path: Path, both: Callable[..., Any]) -> None:
    values = radiance(9, 11)
    scipy.io.savemat(tmp_path / "a.mat", {"cube": values})
    spec = {"path": str(tmp_path / "a.mat"), "variable": "cube", "wavelength": {"first": 300.0, "last": 300 + 5 / 3}}
    _, decoded, _ = both(spec, bound={"z": 0.05})
    scene = open_scene(decoded)
    valid = np.nan_to_num(values) >= tiny_normalization().min_radiance
    assert scene.radiance.shape == values.shape
    assert np.allclose(scene.wavelength, WAVELENGTH)
    ratio = np.log(scene.radiance.values.astype(float) / values) / tiny_normalization().std
    assert np.abs(ratio[valid]).max() <= 0.05
    assert np.isnan(scene.radiance.values[~valid]).all()


# --- the same everywhere --------------------------------------------------------------------------


@pytest.mark.usefixtures("network")
def test_integers_do_not_depend_on_threads_nor_on_the_layout(
    make: Callable[..., Path], run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written with one thread and NCHW, read with two and channels_last: what is decoded is the same, and in bounds."""
    source = make("a.nc", 30, 40)
    made = run("compress", source, bound={"z": 0.02})
    assert made.code == 0, made.err
    assert "LATN" in read_container(made.folder / "a.svae")[1]
    found = []
    for threads, channels_last in ((1, False), (2, True)):
        digest = hashlib.sha256()
        original = entropy.IntegerDecoder.decode

        def decode(self: Any, levels: Any, original: Any = original, digest: Any = digest) -> Any:
            values = original(self, levels)
            digest.update(values.tobytes())
            return values

        before = torch.get_num_threads()
        with monkeypatch.context() as patch:
            patch.setattr(entropy.IntegerDecoder, "decode", decode)
            patch.setattr(
                "spectralvae.runtime.placement._fastest_layout",
                lambda *_, layout=channels_last: torch.channels_last if layout else torch.contiguous_format,
            )
            torch.set_num_threads(threads)
            try:
                back = run("decompress", made.folder / "a.svae", options=("--overwrite",))
            finally:
                torch.set_num_threads(before)
        assert back.code == 0, back.err
        assert np.abs(z_of(back.folder / "a.nc") - z_of(source))[valid_of(source)].max() <= 0.02
        found.append(digest.hexdigest())
    assert found[0] == found[1]


def test_the_margin_covers_what_networks_round_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough for Winograd's convolutions: with these in channels_last, and as it is, by one thread and two."""
    settings = {**SETTINGS, "shape": [N_CHANNELS, 32, 32], "chs": [256, 256], "mid_attn": False}
    latents = 6 * np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
    found = []
    before = torch.get_num_threads()
    nchw, nhwc = torch.contiguous_format, torch.channels_last
    for layout, plain in ((nchw, True), (nchw, False), (nhwc, False)):
        for threads in (1, 2):
            artifact = Artifact(tiny_model(0, settings), settings, tiny_normalization(), None, Path("model"))
            with monkeypatch.context() as patch:
                patch.setattr("spectralvae.runtime.placement._fastest_layout", lambda *_, layout=layout: layout)
                coder = Coder(artifact, torch.device("cpu"), overlap=0, batch_size=1, borrowed=plain)
            torch.set_num_threads(threads)
            pieces = coder.decode(lambda rows, columns: latents[0, rows, columns], (32, 32))
            found.append(np.concatenate([piece.result.copy() for piece in pieces]))
    torch.set_num_threads(before)
    spread = np.ptp(found, axis=0).max()
    assert np.std(found[0]) > 0.2
    assert 0 < spread < MARGIN_NETWORK / 4


# --- what is refused ------------------------------------------------------------------------------


def test_every_damaged_file_is_refused(
    make: Callable[..., Path], run: Callable[..., Result], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    made = run("compress", make("a.nc", 12, 16), bound={"z": 0.1})
    whole = (made.folder / "a.svae").read_bytes()
    head, blocks = read_container(made.folder / "a.svae")
    assert head["source"] == "a.nc" and {"LAYT", "MASK", "SPEC"} <= blocks.keys()
    random = np.random.default_rng(0)
    damaged = tmp_path / "damaged.svae"
    for _ in range(500 if pytestconfig.getoption("--torture") else 20):
        damaged.write_bytes(whole)
        flip(damaged, int(random.integers(len(whole))), int(random.integers(8)))
        result = run("decompress", damaged, name="refused", options=("--overwrite",))
        assert result.code == 2 and str(damaged) in result.message
        damaged.write_bytes(whole[: random.integers(len(whole))])
        result = run("decompress", damaged, name="refused", options=("--overwrite",))
        assert result.code == 2 and str(damaged) in result.message
        assert not list(result.folder.glob("*.nc")) if result.folder.exists() else True


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shape": [12, 16]}, "shape"),
        ({"shape": [12, 16, 10**9]}, "do not fit"),
        ({"shape": [10**6, 10**6, N_CHANNELS]}, "do not fit"),
        ({"shape": [16, 12, N_CHANNELS]}, "coordinates are of"),
        ({"model_sha256": 5}, "model_sha256"),
        ({"overlap": -2}, "overlap"),
        ({"overlap": 3}, "multiple"),
        ({"stages": {"step": 0.0}}, "step"),
        ({"stages": {"step": float("nan")}}, "is damaged"),
        ({"stages": {"n_components": -1}}, "n_components"),
        ({"stages": {"n_components": 99}}, "do not fit"),
        ({"stages": {"n_components": 1}}, "is damaged"),
        ({"stages": {"bound": None}}, "it has blocks"),
        ({"stages": {"bound": {"kind": "foo", "value": 0.1}}}, "kind"),
        ({"stages": {"network_step": 0.1}}, "it has blocks"),
        ({"other": 1}, "other"),
    ],
)
def test_heads_that_make_no_sense_are_refused(
    make: Callable[..., Path], run: Callable[..., Result], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    """By somebody who knows how to make checksums."""
    y, x, c = np.ogrid[:12, :16, :N_CHANNELS]
    values = np.exp(1.5 + 0.5 * np.sin(y / 3) * np.cos(c) + 0.4 * np.cos(x / 4) * c / 6).astype(np.float32)
    made = run("compress", make("a.nc", 12, 16, values=values), bound={"z": 0.1})
    head, blocks = read_container(made.folder / "a.svae")
    assert head["stages"]["n_components"] > 1
    for key, value in changes.items():
        head[key] = {**head[key], **value} if isinstance(value, dict) else value
    write_container(tmp_path / "crafted.svae", head, list(blocks.items()))
    result = run("decompress", tmp_path / "crafted.svae")
    assert result.code == 2 and says in result.message and "crafted.svae" in result.message
    assert not list(result.folder.glob("*.nc")) if result.folder.exists() else True


def test_another_model_is_refused(make: Callable[..., Path], run: Callable[..., Result], tmp_path: Path) -> None:
    made = run("compress", make("a.nc", 12, 16), bound={"z": 0.1})
    other_weights = write_tiny(tmp_path / "weights", seed=1)
    other_statistics = tmp_path / "statistics"
    changed = tiny_normalization(mean=np.log(np.arange(N_CHANNELS) + 3.1))
    write_folder(other_statistics, pack_model(tiny_model(), SETTINGS, changed, None))
    for folder, what in ((other_weights, "weights"), (other_statistics, "normalisation")):
        result = run("decompress", made.folder / "a.svae", model=folder)
        assert result.code == 2
        assert "another model" in result.message and what in result.message
        assert not result.folder.exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "either bound or rate; given: none"),
        ({"bound": {"z": 0.1}, "rate": {"step": 0.1}}, "either bound or rate; given: both"),
        ({"bound": {"z": 0.1, "relative": 0.1}}, "exactly one of z, relative; given: z, relative"),
        ({"rate": {}}, "exactly one of step, bytes, mse; given: none"),
        ({"bound": {"z": 1e-6}}, "at least 0.0001 can be kept"),
        ({"bound": {"relative": 1e-6}}, "at least 0.0001 can be kept"),
    ],
)
def test_what_cannot_be_asked_for(
    make: Callable[..., Path], run: Callable[..., Result], keys: dict[str, Any], says: str
) -> None:
    result = run("compress", make("a.nc", 8, 8), **keys)
    assert result.code == 2 and says in result.message
    assert not result.folder.exists()


def test_reflectance_has_no_relative_bound(
    make: Callable[..., Path], run: Callable[..., Result], tmp_path: Path
) -> None:
    normalization = tiny_normalization(transform="zscore", min_radiance=None)
    write_folder(tmp_path / "zscore", pack_model(tiny_model(), SETTINGS, normalization, None))
    result = run("compress", make("a.nc", 8, 8), model=tmp_path / "zscore", bound={"relative": 0.1})
    assert result.code == 2 and "log_zscore" in result.message and "bound.z" in result.message


def test_too_few_bytes_are_told(make: Callable[..., Path], run: Callable[..., Result]) -> None:
    result = run("compress", make("a.nc", 12, 16), rate={"bytes": 500})
    assert result.code == 1
    assert "500 bytes are too few" in result.message
    assert not list(result.folder.glob("*.svae"))


def test_a_scene_at_night_is_refused_or_left_out(make: Callable[..., Path], run: Callable[..., Result]) -> None:
    dark = make("dark.nc", 8, 8, values=np.full((8, 8, N_CHANNELS), FILL, np.float32))
    result = run("compress", dark, bound={"z": 0.1})
    assert result.code == 2 and "none of its" in result.message
    result = run("compress", make("a.nc", 8, 8), dark, name="again", bound={"z": 0.1}, all_invalid="leave_out")
    assert result.code == 0
    assert names(result.folder) == {"a.svae", "report.json", "run.json", "config.yaml"}


def test_latents_are_no_scene(make: Callable[..., Path], run: Callable[..., Result]) -> None:
    result = run("decompress", make("a.nc", 8, 8))
    assert result.code == 2 and "is not a compressed scene" in result.message
