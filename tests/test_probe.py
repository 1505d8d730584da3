"""`spectralvae probe`: what it finds where the answer is known, what it writes, what it refuses."""

from __future__ import annotations

import csv
import io
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from contextlib import redirect_stdout
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
from refusals import refused
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold
from tiny import N_CHANNELS, tiny_normalization

from spectralvae import cli, encode_scene, load_model
from spectralvae.analysis import probe_report, probe_results, regressors
from spectralvae.analysis.probe_data import Question
from spectralvae.analysis.probe_features import Bases, decode_cells, encode_cells, middle_pixels
from spectralvae.analysis.probe_results import Answer, interval
from spectralvae.data.pca import PixelPCA
from spectralvae.data.store import Store
from spectralvae.errors import RunError
from spectralvae.inference.coder import Coder
from spectralvae.model import AutoencoderKL
from spectralvae.weights.loading import load_artifact

SIZE = (20, 18)
CLIP = 0.1
FEATURES = ["latents", "pca", "raw", "decoded", "decoded_pca", "geometry", "shuffled"]
OF = {"linear": FEATURES, "mlp": [name for name in FEATURES if not name.startswith("decoded")]}
PRODUCTS = ["NO2", "HCHO", "O3TOT", "CLDO4"]
NO_FILTER = {"max_cloud_fraction": None, "max_solar_zenith": None}
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


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[MockScene]:
    """NO2 follows the latents, HCHO the spectra, O3TOT the latitude, and CLDO4 nothing; a day each."""
    model = load_model(write_model(tmp_path_factory.mktemp("model") / "export", [], []))
    random = np.random.default_rng(5)
    weights, made = random.normal(size=N_CHANNELS), []
    for i in range(8):
        day = f"2024-06-{i + 1:02d}T18:00:00+00:00"
        z = 2 + np.round(random.normal(0, 0.5, (*SIZE, N_CHANNELS)), 2)
        z[random.random(SIZE) < 0.05] = np.nan
        places = geometry(*SIZE, random, day)
        places["latitude"] = (30 + np.arange(SIZE[0])[:, None] / 20 + i % 5 + np.zeros(SIZE)).astype(np.float32)
        latents = encode_scene(model, tiny_normalization().denormalize(z.astype(np.float16))).latent
        products = {
            "NO2": np.kron(latents.transpose("y", "x", "latent_channel").values @ [1.0, -2.0, 0.5], np.ones((S, S))),
            "HCHO": z.astype(np.float16).astype(np.float64) @ weights,
            "O3TOT": places["latitude"] * 1.0,
            "CLDO4": np.kron(random.random([n // S for n in SIZE]), np.ones((S, S))),
        }
        products = {name: np.where(np.isnan(z).any(axis=-1), np.nan, values) for name, values in products.items()}
        made.append(MockScene(f"scene{i}", z, day, products, places))
    return made


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
        config = {"model": model, "of": store.path, **CONFIG, **config}
        return run_probe(tmp_path / name, capfd=capfd, options=options, **config)

    return run


# --- what is found --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, model: Path, store: Store) -> Result:
    """A run with everything."""
    path = tmp_path_factory.mktemp("full") / "run"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        make_quick(patch)
        code = cli.run(["probe", str(write_config(path, model, store.path, **CONFIG))])
    assert code == 0
    return Result(code, out.getvalue(), "", path)


def test_what_is_known_is_found(full: Result) -> None:
    scores = scores_of(full.folder)
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


def test_results_agree_with_each_other_and_with_scikit_learn(full: Result) -> None:
    scores, folder = scores_of(full.folder), full.folder
    sides = [(name, which) for name in PRODUCTS for which in ("filtered", "unfiltered")][:-1]  # of clouds there is one
    for product, which in sides:
        with xr.open_dataset(folder / "predictions.nc", group=f"{which}/{product}") as dataset:
            found = dataset.load()
        for name, by_features in scores[product].items():
            for features, entry in by_features.items():
                truth = found.truth_shuffled if features == "shuffled" else found.truth
                side = entry if which == "filtered" else entry["unfiltered"]
                r2 = r2_score(truth, found[f"{name}_{features}"].astype(np.float64))
                assert r2 == pytest.approx(side["r2"], rel=1e-9, abs=1e-9)
                assert side["n"] == len(truth) and side["n_scenes"] == 3
                assert side["r2_low"] <= side["r2"] <= side["r2_high"]
    clouds = scores["CLDO4"]["mlp"].values()
    assert all(found == {**found["unfiltered"], "unfiltered": found["unfiltered"]} for found in clouds)
    with (folder / "probes.csv").open() as file:
        first, *others = csv.DictReader(file)
    assert 1 + len(others) == len(PRODUCTS) * sum(map(len, OF.values())) * 2
    keys = ("product", "probe", "features", "pixels", "units")
    assert [first[key] for key in keys] == ["NO2", "linear", "latents", "filtered", "DU"]
    assert float(first["r2"]) == scores["NO2"]["linear"]["latents"]["r2"]
    assert {"report.html", "figures", "run.json", "config.yaml"} < {path.name for path in folder.iterdir()}
    assert len(list((folder / "figures").iterdir())) == 1 + 4 * len(PRODUCTS)


def test_predictions_are_where_their_cells_are(full: Result, scenes: list[MockScene]) -> None:
    with xr.open_datatree(full.folder / "predictions.nc") as tree:
        found, ids = tree["unfiltered/NO2"].to_dataset().load(), tree.scene_id.values
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


def test_counts_are_told_and_kept(full: Result, scenes: list[MockScene]) -> None:
    clear = valid = 0
    for scene in scenes:
        known = np.isfinite(scene.products["NO2"])
        valid += int(known.sum())
        clear += int((known & (scene.products["CLDO4"].astype(np.float32) <= 0.7)).sum())
    counts = full.record["counts"]["NO2, filtered"]
    assert [counts[key] for key in ("valid_pixels", "clear_pixels", "pixels")] == [valid, clear, clear]
    assert [counts[key] for key in ("fit_cells", "fit_scenes", "test_scenes")] == [300, 5, 3]
    passes = np.stack([np.isfinite(s.products["NO2"]) & (s.products["CLDO4"] <= 0.7) for s in scenes[5:]])
    n_passing = passes.reshape(3, SIZE[0] // S, S, SIZE[1] // S, S).sum(axis=(2, 4))
    assert counts["test_cells"] == (n_passing >= 2).sum()
    line = next(line for line in full.out.splitlines() if line.startswith("NO2, filtered"))
    assert all(f"{n:,} " in line for n in (valid, clear, 300, counts["test_cells"]))
    latents = interval(scores_of(full.folder)["NO2"]["linear"]["latents"])
    assert latents in full.out and str(full.folder) in full.out
    page = (full.folder / "report.html").read_text()
    assert all(text in page for text in (f"{valid:,}", f"{clear:,}", latents, "0.75 floats"))
    (remark,) = (remark for remark in full.record["remarks"] if "3 test scenes" in remark)
    assert f"WARNING: {remark}" in full.out and "3 test scenes" in page
    assert all(name in remark for name in full.record["counts"])


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


def test_latents_and_spectra_of_a_scene(cut: tuple[Store, Coder]) -> None:
    store, coder = cut
    z = stored(store)
    found = encode_cells(store, 0, coder)
    encoded = encode_scene(load_model(coder.path), coder.normalization.denormalize(z))
    np.testing.assert_allclose(np.moveaxis(found.latents, -1, 0), encoded.latent, atol=1e-5)
    np.testing.assert_allclose(found.spectra, loop_means(z), rtol=1e-6, atol=1e-12)
    assert found.spectra[0, 0, 1] == 0
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


def test_without_geometry_and_for_a_network_alone(
    probe: Callable[..., Result], scenes: list[MockScene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no such features, and nothing is decoded. A seed gives the same bytes again, another one others."""
    monkeypatch.delattr(AutoencoderKL, "decode")
    bare = write_store(tmp_path / "store", [replace(scene, geometry={}) for scene in scenes])
    options = {"products": ["CLDO4"], "probes": ["mlp"], "of": bare.path, "filter": NO_FILTER, "n_cells": 100}
    done, again, other = (probe(name, **options, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert list(scores_of(done.folder)["CLDO4"]["mlp"]) == [name for name in OF["mlp"] if name != "geometry"]
    content = [(run.folder / "probes.json").read_bytes() for run in (done, again, other)]
    assert content[0] == content[1] != content[2]


# --- the control ----------------------------------------------------------------------------------


def test_every_control_is_checked_after_writing(probe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that learns from shuffled targets; what was found is there."""
    good, bad = ({"r2": low + 0.1, "r2_low": low, "r2_high": low + 0.2} for low in (-0.1, 0.06))
    linear = {"shuffled": {**good, "unfiltered": good}}
    probe_results.check_control({"NO2": {"linear": linear}})
    for entry, side in (({**bad, "unfiltered": good}, ""), ({**good, "unfiltered": bad}, ".unfiltered")):
        with refused(RunError, "0.160 [0.060, 0.260]", key=f"NO2.mlp.shuffled{side}.r2_low", value=0.06):
            probe_results.check_control({"NO2": {"linear": linear, "mlp": {"shuffled": entry}}})
    monkeypatch.setattr(probe_results, "CONTROL_LIMIT", -10.0)
    done = probe(products=["NO2"], probes=["linear"])
    assert done.code == 1 and "NO2.linear.shuffled" in done.message and done.record["state"] == "failed"
    assert "NO2" in scores_of(done.folder) and (done.folder / "report.html").is_file()


# --- units ----------------------------------------------------------------------------------------


def test_errors_in_units_are_of_values_transformed_back(
    probe: Callable[..., Result], scenes: list[MockScene], tmp_path: Path
) -> None:
    """Of columns of 1e16: RMSE and bias by hand."""
    columns = [replace(s, products={"NO2": 3e15 * s.products["HCHO"]}) for s in scenes]
    asinh = transform("NO2", kind="asinh", divide=1e15, scale=2.0, units="molecules/cm^2")
    store = write_store(tmp_path / "store", columns, {"NO2": asinh})
    done = probe(of=store.path, products=["NO2"], probes=["linear"], filter=NO_FILTER)
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
    q = Question("NO2", True, transform("NO2", kind="asinh"))
    truth, scene = np.arange(4.0), np.array([0, 0, 1, 1])
    for far in (400.0, 1000.0):  # its square is infinite, or it is itself
        predictions = {("mlp", "latents"): np.array([0.0, far, 0.0, 0.0])}
        answer = Answer(truth, truth, scene, scene, scene, truth, truth, truth, predictions)
        found = probe_results.judge({q: answer}, 0)["NO2"]["mlp"]["latents"]
        assert found["r2"] is not None
        assert [found["physical"][key] for key in ("rmse", "bias_high", "units")] == [None, None, "DU"]


# --- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_answered_is_refused_before_anything_is_written(
    probe: Callable[..., Result], full: Result, scenes: list[MockScene], model: Path, store: Store, tmp_path: Path
) -> None:
    """What is at fault is named in one line."""
    other = write_store(tmp_path / "other", scenes, normalization=tiny_normalization(clip=9.0)).path
    flat = [replace(s, products={**s.products, "HCHO": np.full(SIZE, 0.5)}) for s in scenes]
    flat_store = write_store(tmp_path / "flat", flat).path
    forgetful = write_model(tmp_path / "forgetful", scenes[:4], [])
    cloudless = {"max_cloud_fraction": 0.0, "max_solar_zenith": None}
    for config, *words in (
        ({"of": other}, f"{other}: store:", "normalisation", model),
        ({"model": forgetful}, f"{store.path}: store:", "validated on"),
        ({"filter": cloudless}, f"{store.path}: products:", "NO2, filtered", "0 with cloud fraction <= 0"),
        ({"products": ["CLDO4"], "n_cells": 1}, f"{store.path}: products:", "CLDO4", "2 scenes", "1 of "),
        ({"products": ["CLDO4"], "n_cells": 3}, f"{store.path}: products:", "CLDO4", "4 cells", "3 of "),
        ({"products": ["HCHO"], "of": flat_store}, f"{flat_store}: products:", "HCHO, filtered", "same target"),
        ({"output_dir": str(store.path / "run")}, f"output_dir = {store.path / 'run'}:", "(store)"),
        ({"output_dir": str(model / "run")}, f"output_dir = {model / 'run'}:", "(model)"),
    ):
        done = probe(**config)
        assert done.code == 2 and all(str(word) in done.message for word in words), done
        assert not any((place / "run").exists() for place in (tmp_path, store.path, model))
    inside = write_store(shutil.copytree(full.folder, tmp_path / "run") / "store", scenes).path
    done = probe(of=inside, options=("--overwrite",))
    assert done.code == 2 and str(inside) in done.message
    assert (done.folder / "probes.json").is_file() and inside.is_dir(), "nothing is cleared"


def test_scenes_that_share_a_day_are_told(
    probe: Callable[..., Result], scenes: list[MockScene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those to fit on with those to test on, and all those to fit on: then scenes are held back, else days."""
    folds, split = [], GroupKFold.split

    def watch(self: GroupKFold, x: Any, y: Any = None, groups: Any = None) -> Any:
        folds.append(set(groups.tolist()))
        return split(self, x, y, groups)

    monkeypatch.setattr(GroupKFold, "split", watch)
    for name, days, n_remarks, groups in (
        ("one", [0, 0, 0, 0, 0, 0, 6, 7], 2, {f"scene{i}" for i in range(5)}),
        ("two", [0, 1, 1, 0, 1, 5, 6, 7], 0, {"2024-06-01", "2024-06-02"}),
    ):
        folds.clear()
        timed = [replace(scene, time=scenes[day].time) for scene, day in zip(scenes, days, strict=True)]
        model = write_model(tmp_path / f"model_{name}", timed[:5], timed[5:])
        of = write_store(tmp_path / f"store_{name}", timed).path
        done = probe(name, model=model, of=of, products=["CLDO4"], probes=["linear"], n_cells=50)
        assert done.code == 0 and all(found == groups for found in folds)
        told = [remark for remark in done.record["remarks"] if "one day" in remark or "2024-06-01" in remark]
        assert len(told) == n_remarks and all(f"WARNING: {remark[:60]}" in done.out for remark in told)
        assert all(remark[:60] in (done.folder / "report.html").read_text() for remark in told)


@pytest.mark.parametrize(("n", "word"), [(1, "no 95 %"), (15, "75-81 %"), (16, None)])
def test_intervals_over_few_scenes_are_told(
    probe: Callable[..., Result], tmp_path: Path, n: int, word: str | None
) -> None:
    random = np.random.default_rng(n)
    few = [
        MockScene(f"s{i}", random.normal(2, 0.5, (8, 8, N_CHANNELS)), f"2024-06-{i + 1:02d}T18:00:00+00:00")
        for i in range(n + 2)
    ]
    few = [replace(scene, products={"CLDO4": random.random((8, 8))}) for scene in few]
    model = write_model(tmp_path / "model", few[:2], few[2:])
    of = write_store(tmp_path / "store", few).path
    done = probe(model=model, of=of, products=["CLDO4"], probes=["linear"])
    assert done.code == 0
    told = [remark for remark in done.record["remarks"] if "95 %" in remark]
    assert len(told) == (word is not None)
    assert all(str(word) in remark and f"{n} test scene" in remark and "CLDO4" in remark for remark in told)


def test_a_signal_stops_it(probe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *_: signal.raise_signal(signal.SIGTERM))
    stopped = probe()
    assert stopped.code == 75 and stopped.record["state"] == "stopped"
