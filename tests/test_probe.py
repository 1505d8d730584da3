"""`spectralvae probe`: what it finds where the answer is known, what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
import signal
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from inferring import Result
from matplotlib.figure import Figure
from probing import MockScene, S, geometry, run_probe, scores_of, transform, write_config, write_model, write_store
from sklearn.metrics import r2_score
from tiny import N_CHANNELS, tiny_normalization

from spectralvae import cli, encode_scene, load_model
from spectralvae.analysis import probe_report, probe_results, regressors
from spectralvae.analysis.probe import _on_intervals
from spectralvae.analysis.probe_data import Question
from spectralvae.analysis.probe_features import Bases, decode_cells, encode_cells, mean_spectra, middle_pixels
from spectralvae.analysis.probe_results import Answer, Counts
from spectralvae.data.pca import PixelPCA
from spectralvae.data.store import Store
from spectralvae.errors import RunError
from spectralvae.inference.coder import Coder
from spectralvae.weights.loading import load_artifact

SIZE = (20, 18)
CLIP = 0.1
FEATURES = ["latents", "pca", "raw", "decoded", "decoded_pca", "geometry", "shuffled"]
OF = {"linear": FEATURES, "mlp": [name for name in FEATURES if not name.startswith("decoded")]}
PRODUCTS = ["NO2", "HCHO", "O3TOT", "CLDO4"]
CONFIG = {"filter": {"max_cloud_fraction": 0.7, "max_solar_zenith": 60}, "n_cells": 300}  # three tenths are too cloudy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures have tests of their own, and a small network is as good as a large one for what is tested here."""
    monkeypatch.setattr(regressors, "MAX_EPOCHS", 2)
    monkeypatch.setattr(regressors, "HIDDEN", 16)
    for name in ("draw_hexbin", "draw_learning", "draw_maps", "draw_overview", "draw_residuals"):
        monkeypatch.setattr(probe_report, name, lambda *_: Figure(figsize=(1, 1)))


def latents_of(model: Path, z: np.ndarray) -> np.ndarray:
    """(h, w, E), from radiance."""
    radiance = tiny_normalization().denormalize(z.astype(np.float16))
    found = encode_scene(load_model(model), radiance)
    return found.latent.transpose("y", "x", "latent_channel").values


def known_scenes(n: int, model: Path) -> list[MockScene]:
    """NO2 follows the latents, HCHO the spectra, O3TOT the latitude, and CLDO4 nothing."""
    random = np.random.default_rng(5)
    weights = random.normal(size=N_CHANNELS)
    scenes = []
    for i in range(n):
        day = f"2024-06-{i + 1:02d}T18:00:00+00:00"
        z = 2 + np.round(random.normal(0, 0.5, (*SIZE, N_CHANNELS)), 2)
        z[random.random(SIZE) < 0.05] = np.nan
        places = geometry(*SIZE, random, day)
        places["latitude"] = (30 + np.arange(SIZE[0])[:, None] / 20 + i % 5 + np.zeros(SIZE)).astype(np.float32)
        cells = latents_of(model, z) @ [1.0, -2.0, 0.5]
        products = {
            "NO2": np.repeat(np.repeat(cells, S, axis=0), S, axis=1),
            "HCHO": z.astype(np.float16).astype(np.float64) @ weights,
            "O3TOT": places["latitude"] * 1.0,
            "CLDO4": np.repeat(np.repeat(random.random([n // S for n in SIZE]), S, axis=0), S, axis=1),
        }
        products = {name: np.where(np.isnan(z).any(axis=-1), np.nan, values) for name, values in products.items()}
        scenes.append(MockScene(f"scene{i}", z, day, products, places))
    return scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[MockScene]:
    return known_scenes(8, write_model(tmp_path_factory.mktemp("model") / "export", [], []))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, scenes: list[MockScene]) -> Path:
    """It was trained on scenes 0 to 3 and validated on 5 to 7; scene 4 it never saw."""
    return write_model(tmp_path_factory.mktemp("model") / "export", scenes[:4], scenes[5:])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, scenes: list[MockScene]) -> Store:
    return write_store(tmp_path_factory.mktemp("data") / "store", scenes)


@pytest.fixture
def probe(model: Path, store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """A function that runs the command."""

    def run(name: str = "run", options: tuple[str, ...] = (), **config: Any) -> Result:
        config = {**CONFIG, **config}
        return run_probe(
            *(tmp_path / name, config.pop("model", model), config.pop("store", store.path), capfd, options), **config
        )

    return run


# --- what is found --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path, store: Store) -> Path:
    """Of a run with everything."""
    path = tmp_path_factory.mktemp("full") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        assert cli.run(["probe", str(write_config(path, model, store.path, **CONFIG))]) == 0
    return path


def test_what_is_known_is_found(folder: Path) -> None:
    scores = scores_of(folder)
    assert list(scores) == PRODUCTS
    assert all({name: list(found) for name, found in probes.items()} == OF for probes in scores.values())
    linear = {product: {name: found["r2"] for name, found in scores[product]["linear"].items()} for product in PRODUCTS}
    assert linear["NO2"]["latents"] > 0.9999 > 0.9 > linear["NO2"]["geometry"]
    assert linear["HCHO"]["raw"] > 0.9999 > 0.9 > max(linear["HCHO"][name] for name in ("latents", "pca", "geometry"))
    assert linear["O3TOT"]["geometry"] > 0.9999
    assert max(linear["O3TOT"][name] for name in ("latents", "raw", "pca")) < 0.2
    assert all(abs(r2) < 0.2 for name, r2 in linear["CLDO4"].items() if not name.startswith("decoded"))
    assert all(abs(found["shuffled"]) < 0.1 for found in linear.values())
    assert linear["HCHO"]["decoded"] < 0.9, "a network with random weights keeps little"


def test_results_agree_with_each_other_and_with_scikit_learn(folder: Path) -> None:
    scores = scores_of(folder)
    for product in PRODUCTS:
        for which in ("filtered", "unfiltered"):
            if (product, which) == ("CLDO4", "unfiltered"):
                continue
            with xr.open_dataset(folder / "predictions.nc", group=f"{which}/{product}") as found:
                found = found.load()
            for name, by_features in scores[product].items():
                for features, entry in by_features.items():
                    truth = found.truth_shuffled if features == "shuffled" else found.truth
                    side = entry if which == "filtered" else entry["unfiltered"]
                    r2 = r2_score(truth, found[f"{name}_{features}"].astype(np.float64))
                    assert r2 == pytest.approx(side["r2"], rel=1e-9, abs=1e-9)
                    assert side["n"] == len(truth) and side["n_scenes"] == 3
                    assert side["r2_low"] <= side["r2"] <= side["r2_high"]
    assert all(
        found == {**found["unfiltered"], "unfiltered": found["unfiltered"]} for found in scores["CLDO4"]["mlp"].values()
    )
    with (folder / "probes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(PRODUCTS) * sum(map(len, OF.values())) * 2
    first = rows[0]
    assert [first[key] for key in ("product", "probe", "features", "pixels")] == [
        "NO2",
        "linear",
        "latents",
        "filtered",
    ]
    assert float(first["r2"]) == scores["NO2"]["linear"]["latents"]["r2"] and first["units"] == "DU"
    assert {"report.html", "figures", "run.json", "config.yaml"} < {path.name for path in folder.iterdir()}
    assert len(list((folder / "figures").iterdir())) == 1 + 4 * len(PRODUCTS)


def test_predictions_are_where_their_cells_are(folder: Path, scenes: list[MockScene]) -> None:
    with xr.open_dataset(folder / "predictions.nc", group="unfiltered/NO2") as dataset:
        found = dataset.load()
    with xr.open_dataset(folder / "predictions.nc") as root:
        ids = root.scene_id.values
    assert sorted({ids[i] for i in found.scene_number.values}) == ["scene5", "scene6", "scene7"]
    for i in (0, 100, found.sizes["cell"] - 1):
        cell = found.isel(cell=i)
        scene = scenes[int(ids[int(cell.scene_number)].removeprefix("scene"))]
        y, x = S * int(cell.row), S * int(cell.column)
        values = scene.products["NO2"][y : y + S, x : x + S].astype(np.float32)
        np.testing.assert_allclose(cell.truth, np.nanmean(values), rtol=1e-6)
        np.testing.assert_allclose(cell.linear_latents, cell.truth, atol=0.02)
        assert abs(cell.latitude - scene.geometry["latitude"][y : y + S, x : x + S].mean()) < 0.01
        seconds = scene.geometry["time"][y : y + S].mean()
        assert abs(cell.time.values.astype("datetime64[ms]").astype(np.int64) / 1e3 - seconds) < 0.01


def test_counts_are_told_and_kept(probe: Callable[..., Result], scenes: list[MockScene]) -> None:
    done = probe(products=["NO2"], probes=["linear"], n_cells=100)
    clear = valid = 0
    for scene in scenes:
        known = np.isfinite(scene.products["NO2"])
        valid += int(known.sum())
        clear += int((known & (scene.products["CLDO4"].astype(np.float32) <= 0.7)).sum())
    assert f"NO2, filtered: {valid:,} valid pixels, {clear:,} with cloud fraction <= 0.7" in done.out
    assert f"NO2, unfiltered: {valid:,} valid pixels, 100 of " in done.out
    counts = done.record["counts"]["NO2, filtered"]
    assert (counts["valid_pixels"], counts["clear_pixels"], counts["pixels"]) == (valid, clear, clear)
    assert counts["fit_cells"] == 100 and counts["fit_scenes"] == 5 and counts["test_scenes"] == 3
    passes = np.stack([np.isfinite(s.products["NO2"]) & (s.products["CLDO4"] <= 0.7) for s in scenes[5:]])
    n_passing = passes.reshape(3, SIZE[0] // S, S, SIZE[1] // S, S).sum(axis=(2, 4))
    assert counts["test_cells"] == (n_passing >= 2).sum()
    page = (done.folder / "report.html").read_text()
    assert f"{valid:,}" in page and f"{clear:,}" in page and "shuffled" in page
    assert "what 1 principal component a pixel leaves; the latents are 0.75 floats a pixel" in page
    assert "with 3 test scenes the 95 % intervals mean little" in page
    assert "WARNING: with 3 test scenes the 95 % intervals mean little" in done.out
    assert "linear probe" in done.out and "latents" in done.out and str(done.folder) in done.out


def test_two_runs_give_the_same_bytes_and_another_seed_others(probe: Callable[..., Result]) -> None:
    options = {"products": ["HCHO"], "n_cells": 100}
    first, second, other = (probe(name, **options, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    content = [(done.folder / "probes.json").read_bytes() for done in (first, second, other)]
    assert content[0] == content[1] != content[2]


# --- features -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Coder]:
    """A scene that ends amid a cell, with single invalid samples, and a model whose clip cuts off."""
    random = np.random.default_rng(2)
    z = np.clip(random.normal(0, 0.05, (19, 17, N_CHANNELS)), -CLIP, CLIP)
    z[random.random(z.shape) < 0.3] = np.nan
    z[:2, :2, 1] = np.nan  # a cell without this channel
    folder = tmp_path_factory.mktemp("cut")
    scene = MockScene("scene", z)
    store = write_store(folder / "store", [scene], {}, tiny_normalization(clip=CLIP))
    artifact = load_artifact(write_model(folder / "model", [scene], [scene], clip=CLIP))
    return store, Coder(artifact, torch.device("cpu"), overlap=None, batch_size=2)


def stored(store: Store) -> np.ndarray:
    with xr.open_zarr(store.path / "scenes/scene") as dataset:
        return dataset.z.values.astype(np.float64)


def loop_means(z: np.ndarray) -> np.ndarray:
    """Means over valid samples of each cell and channel, 0 without any."""
    means = np.zeros((-(-z.shape[0] // S), -(-z.shape[1] // S), z.shape[2]))
    for i, j, c in np.ndindex(means.shape):
        values = z[S * i : S * i + S, S * j : S * j + S, c]
        if np.isfinite(values).any():
            means[i, j, c] = np.nanmean(values)
    return means


def test_mean_spectra_are_of_valid_samples(cut: tuple[Store, Coder]) -> None:
    z = stored(cut[0])
    found = mean_spectra(z, S)
    np.testing.assert_allclose(found, loop_means(z), rtol=1e-6, atol=1e-12)
    assert found[0, 0, 1] == 0


def test_latents_and_spectra_of_a_scene(cut: tuple[Store, Coder]) -> None:
    store, coder = cut
    z = stored(store)
    found = encode_cells(store, 0, coder)
    encoded = encode_scene(load_model(coder.path), coder.normalization.denormalize(z))
    np.testing.assert_allclose(np.moveaxis(found.latents, -1, 0), encoded.latent, atol=1e-5)
    np.testing.assert_allclose(found.spectra, loop_means(z), rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(found.middles[:-1, :-1], z[1::S, 1::S])
    np.testing.assert_array_equal(found.middles[-1, :-1], z[18, 1::S])  # the last cells have one row
    assert found.from_pca is None


def test_the_middle_pixel_is_the_nearest_that_is_valid() -> None:
    """Against a plain loop; the last cell is cut, and one has no valid pixel."""
    random = np.random.default_rng(0)
    z = random.normal(size=(4, 22, 3))
    z[random.random((4, 22)) < 0.6] = np.nan
    z[:, 4:8] = np.nan
    z[2, 2, 0], z[2, 10] = np.nan, [np.nan, 1.0, np.nan]  # partly valid is valid
    found = middle_pixels(z, 4)
    assert found.shape == (6, 3) and np.isnan(found[1]).all()
    for j in (0, 2, 3, 4, 5):
        pixels = [(y, x) for y in range(4) for x in range(4 * j, min(4 * j + 4, 22)) if np.isfinite(z[y, x]).any()]
        y, x = min(pixels, key=lambda at: (at[0] - 2) ** 2 + (at[1] - 4 * j - 2) ** 2)
        np.testing.assert_array_equal(found[j], z[y, x])
    np.testing.assert_array_equal(found[2], z[2, 10])


def test_decoded_is_the_mean_of_decoded_pixels_where_the_scene_was_valid(cut: tuple[Store, Coder]) -> None:
    store, coder = cut
    latents = np.random.default_rng(0).normal(size=(10, 9, 3)).astype(np.float32)
    z_hat = np.empty((19, 17, N_CHANNELS))
    for piece in coder.decode(lambda rows, columns: latents[rows, columns], (19, 17)):
        z_hat[piece.rows, piece.columns] = piece.result
    assert (np.abs(z_hat) > CLIP).any() and (np.abs(z_hat) < CLIP).any(), "some of it is cut off"
    z_hat = np.clip(z_hat, -CLIP, CLIP)
    z_hat[np.isnan(stored(store))] = np.nan
    np.testing.assert_allclose(decode_cells(store, 0, coder, latents), loop_means(z_hat), rtol=1e-5, atol=1e-6)


def test_principal_components_keep_as_many_floats_as_latents(cut: tuple[Store, Coder]) -> None:
    store, coder = cut
    z = stored(store)
    encoded = encode_cells(store, 0, coder)
    spectra = encoded.spectra.reshape(-1, N_CHANNELS)
    bases = Bases.fit(spectra, encoded.middles.reshape(-1, N_CHANNELS), coder)
    assert bases.cell.components.shape == (3, N_CHANNELS), "as many as latent channels"
    assert bases.pixel.components.shape == (1, N_CHANNELS), "3 latent channels on 4 pixels"
    np.testing.assert_allclose(
        bases.features(spectra), (spectra - spectra.mean(axis=0)) @ bases.cell.components.T, atol=1e-5
    )
    z_hat = np.array([[PixelPCA.reconstruct(bases.pixel, pixel, 1) for pixel in row] for row in z])
    z_hat[np.isnan(z)] = np.nan
    found = encode_cells(store, 0, coder, bases).from_pca
    np.testing.assert_allclose(found, loop_means(z_hat), rtol=1e-5, atol=1e-6)


def test_parts_of_an_answer_are_freed_as_they_are_joined() -> None:
    """Bytes at most held, beside the parts and one array: the predictions never lie in memory twice."""
    n, keys = 100_000, [("linear", str(i)) for i in range(20)]

    def part(i: int) -> Answer:
        small = [np.zeros(1) for _ in range(8)]
        return Answer(*small, predictions={key: np.full(n, i, np.float32) for key in keys})

    tracemalloc.start()
    parts = [part(0), part(1)]
    before = tracemalloc.get_traced_memory()[0]
    joined = Answer.joined(parts)
    extra = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert extra < 2.5 * 2 * n * 4
    np.testing.assert_array_equal(joined.predictions[keys[3]], np.repeat([0, 1], n))


def test_nothing_is_decoded_for_a_network_alone(probe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("spectralvae.analysis.probe.decode_cells")
    done = probe(products=["CLDO4"], probes=["mlp"])
    assert done.code == 0, done.message
    assert list(scores_of(done.folder)["CLDO4"]["mlp"]) == OF["mlp"]


# --- the control ----------------------------------------------------------------------------------


def test_a_probe_that_learns_from_shuffled_targets_fails_after_writing(
    probe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_results, "CONTROL_LIMIT", -10.0)
    done = probe(products=["NO2"], probes=["linear"])
    assert done.code == 1 and "the shuffled control has R2" in done.message
    assert "NO2" in scores_of(done.folder) and (done.folder / "report.html").is_file()
    assert done.record["state"] == "failed"


@pytest.mark.parametrize("unfiltered", [False, True])
def test_every_control_is_checked(unfiltered: bool) -> None:
    good, bad = ({"r2": low + 0.1, "r2_low": low, "r2_high": low + 0.2} for low in (-0.1, 0.06))
    entry = {**(good if unfiltered else bad), "unfiltered": bad if unfiltered else good}
    scores = {"NO2": {"linear": {"shuffled": {**good, "unfiltered": good}}, "mlp": {"shuffled": entry}}}
    where = "NO2, unfiltered, mlp" if unfiltered else "NO2, mlp"
    with pytest.raises(RunError, match=rf"{where}: the shuffled control has R2 0.160 \[0.060, 0.260\]"):
        probe_results.check_control(scores)
    del scores["NO2"]["mlp"]
    probe_results.check_control(scores)


# --- units ----------------------------------------------------------------------------------------


def test_errors_in_units_are_of_values_transformed_back(
    model: Path, scenes: list[MockScene], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of columns of 1e16: RMSE and bias by hand."""
    columns = [replace(s, products={"NO2": 3e15 * s.products["HCHO"]}) for s in scenes]
    asinh = transform("NO2", kind="asinh", divide=1e15, scale=2.0, units="molecules/cm^2")
    store = write_store(tmp_path / "store", columns, {"NO2": asinh})
    no_filter = {"max_cloud_fraction": None, "max_solar_zenith": None}
    config = {"products": ["NO2"], "probes": ["linear"], "filter": no_filter}
    done = run_probe(tmp_path / "run", model, store.path, capfd, **config)
    found = scores_of(done.folder)["NO2"]["linear"]["latents"]["physical"]
    with xr.open_dataset(done.folder / "predictions.nc", group="filtered/NO2") as answer:
        truth, predicted = (
            2e15 * np.sinh(answer[name].values.astype(np.float64)) for name in ("truth", "linear_latents")
        )
    assert found["units"] == "molecules/cm^2"
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((predicted - truth) ** 2)), rel=1e-6)
    assert found["bias"] == pytest.approx(np.mean(predicted - truth), rel=1e-6)
    assert found["rmse_low"] < found["rmse"] < found["rmse_high"]


def test_a_prediction_beyond_numbers_has_no_error_in_units() -> None:
    asinh = transform("NO2", kind="asinh")
    truth, scene = np.arange(4.0), np.array([0, 0, 1, 1])
    for far in (400.0, 1000.0):  # its square is infinite, or it is itself
        found = probe_results._physical(asinh, truth, np.array([0.0, far, 0.0, 0.0]), scene, seed=0)
        assert found["rmse"] is None and found["bias_high"] is None and found["units"] == "DU"


# --- refusals -------------------------------------------------------------------------------------


def refused(done: Result) -> str:
    assert done.code == 2 and not done.folder.exists(), done
    return done.message


def test_what_cannot_be_answered_is_refused_before_anything_is_written(
    probe: Callable[..., Result], scenes: list[MockScene], model: Path, store: Store, tmp_path: Path
) -> None:
    other = write_store(tmp_path / "other", scenes, normalization=tiny_normalization(clip=9.0))
    assert "its normalisation" in refused(probe("a", store=other.path))
    forgetful = write_model(tmp_path / "forgetful", scenes[:4], [])
    assert "validated on" in refused(probe("b", model=forgetful))
    message = refused(probe("c", filter={"max_cloud_fraction": 0.0, "max_solar_zenith": None}))
    assert "NO2, filtered: no test cell is left" in message and "0 with cloud fraction <= 0" in message
    message = refused(probe("d", products=["CLDO4"], n_cells=1))
    assert "CLDO4: fewer than 2 scenes have cells to fit on" in message and "1 of " in message
    assert "fewer than 4 cells are left" in refused(probe("e", products=["CLDO4"], n_cells=3))
    flat = [replace(s, products={**s.products, "HCHO": np.full(SIZE, 0.5)}) for s in scenes]
    message = refused(probe("f", store=write_store(tmp_path / "flat", flat).path, products=["HCHO"]))
    assert "HCHO, filtered: all cells to fit on have the same target" in message
    inside = probe(products=["CLDO4"], output_dir=str(store.path / "probe"))
    assert inside.code == 2 and "lies in store" in inside.message and not (store.path / "probe").exists()
    inside = probe(products=["CLDO4"], output_dir=str(model / "probe"))
    assert inside.code == 2 and "lies in model" in inside.message and not (model / "probe").exists()


def test_inputs_are_not_cleared(probe: Callable[..., Result], scenes: list[MockScene], tmp_path: Path) -> None:
    done = probe(products=["CLDO4"], probes=["linear"])
    inside = write_store(done.folder / "store", scenes)
    again = probe(products=["CLDO4"], probes=["linear"], store=inside.path, options=("--overwrite",))
    assert again.code == 2 and "lies in output_dir" in again.message
    assert (done.folder / "probes.json").is_file()


def test_scenes_that_share_a_day_are_told(
    scenes: list[MockScene], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    same = [replace(scene, time=scenes[0].time) for scene in scenes]
    model = write_model(tmp_path / "model", same[:5], same[5:])
    config = {"products": ["CLDO4"], "probes": ["linear"]}
    done = run_probe(tmp_path / "run", model, write_store(tmp_path / "store", same).path, capfd, **config)
    assert done.code == 0 and "WARNING: fit and test scenes share days (2024-06-01)" in done.out
    assert "share days" in (done.folder / "report.html").read_text()
    assert any("share days" in remark for remark in json.loads((done.folder / "run.json").read_text())["remarks"])


def test_fit_scenes_of_one_day_are_told(
    scenes: list[MockScene], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are held back one by one; of other days, a day is."""
    groups = []

    def spy(x: np.ndarray, y: np.ndarray, group: np.ndarray, *, seed: int) -> regressors.Fitted:
        groups.append(set(group.tolist()))
        return regressors.fit_linear(x, y, group, seed=seed)

    monkeypatch.setattr("spectralvae.analysis.probe.fit_linear", spy)
    days = [scene.time for scene in scenes]
    config = {"products": ["CLDO4"], "probes": ["linear"]}
    for name, first in (("one", [0, 0, 0, 0, 0]), ("two", [0, 1, 1, 0, 1])):
        timed = [replace(s, time=days[k]) for s, k in zip(scenes, [*first, 5, 6, 7], strict=True)]
        model = write_model(tmp_path / f"model_{name}", timed[:5], timed[5:])
        done = run_probe(tmp_path / name, model, write_store(tmp_path / f"s_{name}", timed).path, capfd, **config)
        assert done.code == 0 and ("scenes to fit on are of one day" in done.out) == (name == "one")
    n = len(groups) // 2
    assert all(found == {f"scene{i}" for i in range(5)} for found in groups[:n])
    assert all(found == {"2024-06-01", "2024-06-02"} for found in groups[n:])


@pytest.mark.parametrize(
    ("n", "wanted"), [(1, "no 95 %"), (2, "little"), (3, "little"), (4, "75-81 %"), (15, "75-81 %")]
)
def test_intervals_over_few_scenes_are_told(n: int, wanted: str) -> None:
    counts = Counts(9, 9, 9, 0, None, None, 9, 9, 2, 9, n)
    clouds, gas = Question("CLDO4", True, transform("CLDO4")), Question("NO2", False, transform("NO2"))
    (remark,) = _on_intervals({clouds: counts, gas: counts})
    assert remark.startswith(f"with {n} test scene") and wanted in remark and "CLDO4; NO2, unfiltered" in remark
    (remark,) = _on_intervals({clouds: counts, gas: replace(counts, test_scenes=16)})
    assert "NO2" not in remark


def test_a_store_without_geometry_has_no_such_features(
    model: Path, scenes: list[MockScene], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = write_store(tmp_path / "store", [replace(scene, geometry={}) for scene in scenes])
    config = {"products": ["CLDO4"], "probes": ["linear"]}
    done = run_probe(tmp_path / "run", model, bare.path, capfd, **config)
    assert done.code == 0
    assert list(scores_of(done.folder)["CLDO4"]["linear"]) == [name for name in FEATURES if name != "geometry"]


def test_a_signal_stops_it(probe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectralvae.analysis.probe._sample", lambda _: signal.raise_signal(signal.SIGTERM))
    stopped = probe()
    assert stopped.code == 75
    assert json.loads((stopped.folder / "run.json").read_text())["state"] == "stopped"
