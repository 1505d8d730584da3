"""What probes are fitted and tested on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from probing import MockScene, S, geometry, known, transform, write_store
from refusals import refused
from tiny import N_CHANNELS, tiny_provenance

from spectralvae.analysis.probe_data import (
    Question,
    assign_roles,
    choose_cells,
    coordinates_of,
    geometry_names,
    geometry_of,
    groups_of,
    questions_of,
    quotas,
    read_grid,
)
from spectralvae.config import FilterConfig
from spectralvae.data.store import Store
from spectralvae.errors import InputError
from spectralvae.readers.base import ANGLES
from spectralvae.weights.provenance import Provenance

MODEL = Path("model")


# --- roles ----------------------------------------------------------------------------------------


def scene(name: str, time: str | None) -> MockScene:
    return MockScene(name, np.zeros((2, 2, N_CHANNELS)), time)


A = scene("a", "2024-06-01T18:00:00+00:00")
B = scene("b", "2024-06-02T05:59:59+00:00")  # still the first of June, six hours behind UTC
C = scene("c", "2024-06-03T18:00:00+00:00")
NEW = scene("new", "2024-06-04T18:00:00+00:00")
TEST_DAY = scene("test_day", "2024-06-04T05:59:59+00:00")  # of the third of June
TIMELESS = scene("timeless", None)


def remembers(training: list[MockScene], validation: list[MockScene]) -> Provenance:
    return tiny_provenance(training=known(training), validation=known(validation))


def test_roles_follow_what_the_model_remembers_and_days_are_held_back_together(tmp_path: Path) -> None:
    """Whatever the splits of the store."""
    store = write_store(tmp_path / "store", [C, A, NEW, B, TIMELESS])
    roles = assign_roles(store, remembers([A, B, TIMELESS], [C]), MODEL)
    assert (roles.fit, roles.test, len(roles.remarks)) == ([1, 2, 3, 4], [0], 0)
    c, a, _, b, timeless = store.scenes
    assert groups_of([a, b, c, timeless]) == (["2024-06-01", "2024-06-01", "2024-06-03", "timeless"], False)
    assert groups_of([a, b]) == (["a", "b"], True)
    assert groups_of([a, timeless])[1] is groups_of([a])[1] is False


FRESH = remembers([A], [C])
DESCENDED = replace(FRESH, initial_weights="abc")


@pytest.mark.parametrize(
    ("scenes", "provenance", "words"),
    [
        ([A, B], remembers([A], [B]), ["2024-06-01"]),  # a day that the model's own split shares
        ([A, C], remembers([A, B], [C, TEST_DAY, TIMELESS]), ["1 of 3"]),
        ([NEW, C], remembers([A, B], [C]), ["training scenes"]),  # none of its own
        ([A, C], replace(FRESH, ancestors=None), []),  # an earlier version, but from random weights
        ([A, C], replace(FRESH, ancestors=[]), []),
        ([A, C], replace(DESCENDED, ancestors=[A.identity, NEW.identity]), []),
        ([A, C], replace(DESCENDED, ancestors=None), ["weights"]),
    ],
)
def test_what_readers_should_know_is_told(
    tmp_path: Path, scenes: list[MockScene], provenance: Provenance, words: list[str]
) -> None:
    remarks = assign_roles(write_store(tmp_path / "store", scenes), provenance, MODEL).remarks
    assert all(word in remark for word, remark in zip(words, remarks, strict=True))


@pytest.mark.parametrize(
    ("scenes", "provenance", "key", "word"),
    [
        ([A, C], None, "model", ""),
        ([A, C], tiny_provenance(), "model", ""),
        ([A, B], remembers([A, B], [C]), "store", "1 scenes"),  # that it was validated on
        ([C], remembers([A, B], [C]), "store", "to fit"),
        ([A, C, TEST_DAY], FRESH, "store", "test_day"),
        ([A, C, TIMELESS], FRESH, "store", "timeless"),
        ([A, NEW, TIMELESS], remembers([A], [TIMELESS]), "store", "scene new"),
        ([A, C], replace(DESCENDED, ancestors=[A.identity, C.identity]), "store", "scene c"),
    ],
)
def test_what_would_not_be_a_fair_test_is_refused(
    tmp_path: Path, scenes: list[MockScene], provenance: Provenance | None, key: str, word: str
) -> None:
    path = tmp_path / "store"
    with refused(InputError, word, key=key, path=MODEL if key == "model" else path):
        assign_roles(write_store(path, scenes), provenance, MODEL)


# --- questions ------------------------------------------------------------------------------------


def store_of(path: Path, *products: str, angles: bool = True, **fields: str) -> Store:
    values = dict.fromkeys(products, np.zeros((2, 2)))
    places = geometry(2, 2, np.random.default_rng(0), "2024-06-01T18:00:00+00:00") if angles else {}
    transforms = {name: transform(name, **({"field": fields[name]} if name in fields else {})) for name in products}
    return write_store(path, [replace(A, products=values, geometry=places)], transforms)


def test_gases_are_asked_with_and_without_filter_clouds_without(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", "NO2", "CLDO4")
    found = questions_of(["NO2", "CLDO4"], FilterConfig(), store)
    gas, clouds = transform("NO2"), transform("CLDO4")
    filtered, unfiltered = Question("NO2", True, gas, 0.2, 70.0), Question("NO2", False, gas)
    assert found == [filtered, unfiltered, Question("CLDO4", True, clouds)]
    nothing = FilterConfig(max_cloud_fraction=None, max_solar_zenith=None)
    assert questions_of(["NO2"], nothing, store) == [Question("NO2", True, gas)]


def test_what_the_store_lacks_is_refused(tmp_path: Path) -> None:
    clouds, zenith = FilterConfig(max_solar_zenith=None), FilterConfig(max_cloud_fraction=None)
    bare, blind = store_of(tmp_path / "bare", "NO2"), store_of(tmp_path / "blind", "NO2", angles=False)
    pressure = store_of(tmp_path / "pressure", "NO2", "CLDO4", CLDO4="cloud_pressure")
    for product, limits, store, key, value, word in (
        ("HCHO", clouds, bare, "products", None, "HCHO"),
        ("NO2", clouds, bare, "filter.max_cloud_fraction", 0.2, "l2/CLDO4"),
        ("NO2", clouds, pressure, "filter.max_cloud_fraction", 0.2, "cloud_pressure"),
        ("NO2", zenith, blind, "filter.max_solar_zenith", 70.0, "scene a"),
    ):
        with refused(InputError, word, key=key, path=store.path, value=value):
            questions_of([product], limits, store)
    assert len(questions_of(["NO2"], zenith, bare)) == 2


# --- grids ----------------------------------------------------------------------------------------


def test_targets_are_transformed_then_averaged_over_pixels_that_pass(tmp_path: Path) -> None:
    """Against a plain loop over cells and pixels; the scene ends amid a cell."""
    random = np.random.default_rng(1)
    ny, nx = 7, 9
    no2, clouds = random.normal(0, 5e15, (ny, nx)), random.random((ny, nx))
    no2[random.random((ny, nx)) < 0.2] = clouds[random.random((ny, nx)) < 0.1] = np.nan
    z = random.normal(size=(ny, nx, N_CHANNELS))
    z[random.random(z.shape) < 0.4] = np.nan
    places = geometry(ny, nx, random, "2024-06-01T18:00:00+00:00")
    places["viewing_zenith_angle"][4:6, 6:8] = places["solar_zenith_angle"][0, 3] = np.nan
    clouds[1, 1], clouds[2, 2], no2[1, 1], no2[2, 2] = 0.5, 0.1, 1e15, 1e15  # one at each limit
    places["solar_zenith_angle"][1, 1], places["solar_zenith_angle"][2, 2] = 10.0, 50.0
    asinh = transform("NO2", kind="asinh", divide=1e15, scale=2.0)
    made = MockScene("a", z, products={"NO2": no2, "CLDO4": clouds}, geometry=places)
    store = write_store(tmp_path / "store", [made], {"NO2": asinh, "CLDO4": transform("CLDO4")})
    q, every = Question("NO2", True, asinh, 0.5, 50.0), Question("NO2", False, asinh)
    found = read_grid(store, 0, [q, every], coordinates_of(store, [0])[0], S)

    clear, high_sun = clouds.astype(np.float32) <= 0.5, places["solar_zenith_angle"] <= 50
    one_by_one = np.cumprod([np.isfinite(no2), clear, high_sun], axis=0).sum(axis=(1, 2))
    assert found.pixels[q] == tuple(one_by_one) and found.pixels[every] == (one_by_one[0],) * 3
    value = np.arcsinh(no2.astype(np.float32) / 1e15 / 2.0).astype(np.float64)
    n_found, n_left_out = 0, {q: 0, every: 0}
    for i, j in np.ndindex(4, 5):
        cell = np.s_[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        is_known = np.isfinite(places["viewing_zenith_angle"][cell]).any()
        counts = 2 * np.isfinite(z[cell]).sum() >= z[cell].size and is_known
        for question, pixels in ((q, value[cell][(clear & high_sun)[cell]]), (every, value[cell].ravel())):
            values = pixels[np.isfinite(pixels)]
            enough = 2 * len(values) >= value[cell].size
            wanted = values.mean() if counts and enough else np.nan
            np.testing.assert_allclose(found.targets[question][i, j], wanted, rtol=1e-6)
            n_found += wanted == wanted
            n_left_out[question] += enough and not counts
    assert 5 < n_found < 35, "both kinds of cells were seen"
    assert np.isnan(found.targets[every][2, 3]), "its viewing angle is unknown"
    assert found.left_out == n_left_out and n_left_out[every] > 1


# --- geometry -------------------------------------------------------------------------------------


def test_angles_and_times_that_wrap_are_averaged_as_vectors() -> None:
    """18:00 UTC is noon at 90 W; 06:00 UTC is midnight there, and half an hour before it 7.5 degrees further west."""
    angles = np.array([[359.0, 1.0, 80.0, np.nan], [358.0, 2.0, 100.0, 90.0]], np.float32)
    found = geometry_of({"relative_azimuth_angle": angles}, (2, 4), S)
    np.testing.assert_allclose(found, [[[1, 0], [0, 1]]], atol=1e-6)
    time = np.array([np.datetime64(f"2024-06-01T{hour}:00:00") for hour in ("18", "06")]).astype(np.int64) * 1.0
    found = geometry_of({"time": time, "longitude": np.full((2, 1), -90.0)}, (2, 1), 1)
    np.testing.assert_allclose(found, [[[-1, 0]], [[1, 0]]], atol=1e-6)
    around = geometry_of({"time": time[1:], "longitude": np.array([[-97.5, -82.5]])}, (1, 2), S)
    np.testing.assert_allclose(around, [[[1, 0]]], atol=1e-6)


def test_geometry_is_what_all_scenes_have_and_know(tmp_path: Path) -> None:
    """Of the sun's angle the filter still asks, so that no pixel of that scene passes it."""
    full, unknown = (geometry(2, 2, np.random.default_rng(i), "2024-06-01T18:00:00+00:00") for i in range(2))
    full["viewing_zenith_angle"][0] = np.nan  # partly
    unknown["solar_zenith_angle"][:] = np.nan
    products = {"O3TOT": np.ones((2, 2))}
    poor = {name: full[name] for name in ("latitude", "longitude")}
    scenes = [replace(s, products=products, geometry=g) for s, g in ((A, full), (B, unknown), (C, poor))]
    store = write_store(tmp_path / "store", scenes)
    angles = [f"{part} {angle}" for angle in ANGLES for part in ("cos", "sin")]
    places = ["latitude", "longitude", "cos local time", "sin local time"]
    assert geometry_names(coordinates_of(store, [0])[0]) == [*angles, *places]
    assert geometry_names(coordinates_of(store, [0, 2])[0]) == places[:2]
    found = geometry_of({"latitude": np.full((3, 3), 40.0), "longitude": np.full((3, 3), -100.0)}, (3, 3), S)
    np.testing.assert_allclose(found, np.broadcast_to([40.0, -100.0], (2, 2, 2)), rtol=1e-6)
    names, remarks = coordinates_of(store, [0, 1])
    assert "solar_zenith_angle" not in names and "viewing_zenith_angle" in names and len(names) == 5
    (remark,) = remarks
    assert "solar_zenith_angle" in remark and "scene b" in remark
    assert len(coordinates_of(store, [0])[0]) == 6
    filtered = Question("O3TOT", True, transform("O3TOT"), max_solar_zenith=90.0)
    every = Question("O3TOT", False, transform("O3TOT"))
    first, second = (read_grid(store, i, [filtered, every], names, S) for i in (0, 1))
    assert first.pixels[filtered] == (4, 4, 4) and second.pixels[filtered] == (4, 4, 0)
    assert second.targets[every] == 1 and np.isnan(second.targets[filtered])
    (tmp_path / "store/scenes/a/latitude/c/0/0").unlink()  # zarr would read zeros
    with refused(InputError, path=tmp_path / "store/scenes/a"):
        read_grid(store, 0, [every], names, S)


# --- cells to fit on ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "n", "wanted"),
    [
        ([10, 10, 10], 6, [2, 2, 2]),
        ([1, 10, 4], 9, [1, 4, 4]),
        ([1, 10, 4], 12, [1, 7, 4]),
        ([1, 10, 4], 99, [1, 10, 4]),
        ([0, 5, 5], 3, [0, 1, 2]),
    ],
)
def test_scenes_give_evenly(available: list[int], n: int, wanted: list[int]) -> None:
    assert quotas(available, n) == wanted


def test_chosen_cells_count_and_are_shared_by_questions() -> None:
    random = np.random.default_rng(0)
    many = [random.random((10, 12)) < 0.9 for _ in range(3)]
    few = [count & (random.random((10, 12)) < 0.8) for count in many]
    chosen, others = choose_cells(many, 100, seed=3), choose_cells(few, 100, seed=3)
    for counts, cells in ((many, chosen), (few, others)):
        assert sum(map(len, cells)) == 100
        for count, positions in zip(counts, cells, strict=True):
            assert count.ravel()[positions].all() and (np.diff(positions) > 0).all()
    together = sum(len(np.union1d(a, b)) for a, b in zip(chosen, others, strict=True))
    assert together < 140, "of cells drawn twice at random, some 160 would be different ones"
    again, other = choose_cells(many, 100, seed=3), choose_cells(many, 100, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(chosen, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(chosen, other, strict=True))
