"""What probes are fitted and tested on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from probing import MockScene, S, geometry, known, transform, write_store
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
from spectralvae.weights.provenance import Provenance

MODEL = Path("model")


# --- roles ----------------------------------------------------------------------------------------


def scene(name: str, time: str | None, ny: int = 2, nx: int = 2) -> MockScene:
    return MockScene(name, np.zeros((ny, nx, N_CHANNELS)), time)


A = scene("a", "2024-06-01T18:00:00+00:00")
B = scene("b", "2024-06-02T05:59:59+00:00")  # still the first of June, six hours behind UTC
C = scene("c", "2024-06-03T18:00:00+00:00")
NEW = scene("new", "2024-06-04T18:00:00+00:00")
TEST_DAY = scene("test_day", "2024-06-04T05:59:59+00:00")  # of the third of June
TIMELESS = scene("timeless", None)


def remembers(training: list[MockScene], validation: list[MockScene]) -> Provenance:
    return tiny_provenance(training=known(training), validation=known(validation))


def test_roles_follow_what_the_model_remembers_not_the_splits_of_the_store(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [C, A, NEW, B])
    assert {record.split for record in store.scenes} == {"train"}
    roles = assign_roles(store, remembers([A, B], [C]), MODEL)
    assert (roles.fit, roles.test, roles.remarks) == ([1, 2, 3], [0], [])


def test_days_that_the_models_own_split_shares_are_told(tmp_path: Path) -> None:
    (remark,) = assign_roles(write_store(tmp_path / "store", [A, B]), remembers([A], [B]), MODEL).remarks
    assert remark.startswith("fit and test scenes share days (2024-06-01),")


def test_scenes_of_the_model_that_the_store_lacks_are_told(tmp_path: Path) -> None:
    some = assign_roles(write_store(tmp_path / "a", [A, C]), remembers([A, B], [C, TEST_DAY, TIMELESS]), MODEL)
    assert some.remarks == ["1 of 3 validation scenes of the model are in this store"]
    (remark,) = assign_roles(write_store(tmp_path / "b", [NEW, C]), remembers([A, B], [C]), MODEL).remarks
    assert remark.startswith("none of the model's own training scenes is in this store")


def test_what_the_first_weights_were_trained_on_is_not_tested_on(tmp_path: Path) -> None:
    """Of ancestors that are not in the store nothing is said; of unknown ones there is a remark."""
    store = write_store(tmp_path / "store", [A, C])
    fresh = remembers([A], [C])
    descended = replace(fresh, initial_weights="abc")
    for provenance, n_remarks in (
        (replace(fresh, ancestors=None), 0),  # an earlier version, but from random weights
        (replace(fresh, ancestors=[]), 0),
        (replace(descended, ancestors=[A.identity, NEW.identity]), 0),
        (replace(descended, ancestors=None), 1),
    ):
        remarks = assign_roles(store, provenance, MODEL).remarks
        assert len(remarks) == n_remarks
        assert all("weights that do not say what they were trained on" in remark for remark in remarks)
    with pytest.raises(
        InputError, match=r"scene c, which is to be tested on, .* trained on: prepare the store without"
    ):
        assign_roles(store, replace(descended, ancestors=[A.identity, C.identity]), MODEL)


def test_days_are_held_back_together(tmp_path: Path) -> None:
    a, b, c, timeless = write_store(tmp_path / "store", [A, B, C, TIMELESS]).scenes
    assert groups_of([a, b, c, timeless]) == (["2024-06-01", "2024-06-01", "2024-06-03", "timeless"], False)
    assert groups_of([a, b]) == (["a", "b"], True)
    assert groups_of([a, timeless])[1] is groups_of([a])[1] is False


@pytest.mark.parametrize(
    ("scenes", "provenance", "message"),
    [
        ([A, C], None, "model: does not tell which scenes"),
        ([A, C], tiny_provenance(), "model: does not tell which scenes"),
        ([A, B], remembers([A, B], [C]), "none of the 1 scenes that the model was validated on"),
        ([C], remembers([A, B], [C]), "holds no others"),
        ([A, C, TEST_DAY], remembers([A], [C]), "test_day, which the model never saw, is of 2024-06-03"),
        ([A, C, TIMELESS], remembers([A], [C]), "timeless, which the model never saw, has no time"),
        ([A, NEW, TIMELESS], remembers([A], [TIMELESS]), "new, which the model never saw, may be of the day of a test"),
    ],
)
def test_what_would_not_be_a_fair_test_is_refused(
    tmp_path: Path, scenes: list[MockScene], provenance: Provenance | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        assign_roles(write_store(tmp_path / "store", scenes), provenance, MODEL)


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
    assert found == [
        Question("NO2", True, gas, 0.2, 70.0),
        Question("NO2", False, gas),
        Question("CLDO4", True, clouds),
    ]
    nothing = FilterConfig(max_cloud_fraction=None, max_solar_zenith=None)
    assert questions_of(["NO2"], nothing, store) == [Question("NO2", True, gas)]


def test_what_the_store_lacks_is_refused(tmp_path: Path) -> None:
    no_clouds = FilterConfig(max_cloud_fraction=None)
    with pytest.raises(InputError, match=r"products: HCHO is missing in store .* \(it has NO2\)"):
        questions_of(["HCHO"], FilterConfig(), store_of(tmp_path / "a", "NO2"))
    with pytest.raises(
        InputError, match=r"max_cloud_fraction: 0.2 needs .* no l2/CLDO4: set .*max_cloud_fraction: null"
    ):
        questions_of(["NO2"], FilterConfig(), store_of(tmp_path / "b", "NO2"))
    pressure = store_of(tmp_path / "c", "NO2", "CLDO4", CLDO4="cloud_pressure")
    with pytest.raises(InputError, match="has l2/CLDO4 of cloud_pressure"):
        questions_of(["NO2"], FilterConfig(), pressure)
    with pytest.raises(InputError, match="max_solar_zenith: 70 needs solar_zenith_angle, which scene a"):
        questions_of(["NO2"], no_clouds, store_of(tmp_path / "d", "NO2", angles=False))
    assert len(questions_of(["NO2"], no_clouds, store_of(tmp_path / "e", "NO2"))) == 2


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
    places["viewing_zenith_angle"][4:6, 6:8] = np.nan
    asinh = transform("NO2", kind="asinh", divide=1e15, scale=2.0)
    store = write_store(
        tmp_path / "store",
        [MockScene("a", z, products={"NO2": no2, "CLDO4": clouds}, geometry=places)],
        {"NO2": asinh, "CLDO4": transform("CLDO4")},
    )
    q, every = Question("NO2", True, asinh, 0.6, 50.0), Question("NO2", False, asinh)
    found = read_grid(store, 0, [q, every], coordinates_of(store, [0])[0], S)

    n_found, n_left_out = 0, {q: 0, every: 0}
    for i in range(4):
        for j in range(5):
            n_pixels, n_samples, targets, unfiltered, geometry_known = 0, 0, [], [], False
            for y in range(2 * i, min(2 * i + 2, ny)):
                for x in range(2 * j, min(2 * j + 2, nx)):
                    n_pixels += 1
                    n_samples += sum(1 for value in z[y, x] if value == value)
                    geometry_known |= bool(places["viewing_zenith_angle"][y, x] == places["viewing_zenith_angle"][y, x])
                    if no2[y, x] == no2[y, x]:
                        value = float(np.arcsinh(np.float32(no2[y, x]) / 1e15 / 2.0))
                        unfiltered.append(value)
                        if np.float32(clouds[y, x]) <= 0.6 and places["solar_zenith_angle"][y, x] <= 50:
                            targets.append(value)
            counts = 2 * n_samples >= N_CHANNELS * n_pixels and geometry_known
            for question, values in ((q, targets), (every, unfiltered)):
                wanted = np.mean(values) if counts and 2 * len(values) >= n_pixels else np.nan
                np.testing.assert_allclose(found.targets[question][i, j], wanted, rtol=1e-6)
                n_found += wanted == wanted
                n_left_out[question] += 2 * len(values) >= n_pixels and not counts
    assert 5 < n_found < 35, "both kinds of cells were seen"
    assert np.isnan(found.targets[every][2, 3]), "its viewing angle is unknown"
    assert found.left_out == n_left_out and n_left_out[every] > 1


def test_filters_count_pixels_one_after_the_other(tmp_path: Path) -> None:
    """2 x 4 pixels: one without a value, one without a cloud fraction, one at each limit, one beyond each."""
    values = np.array([[np.nan, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])
    clouds = np.array([[0.1, np.nan, 0.25, 0.3], [0.0, 0.1, 0.2, 0.0]])
    places = geometry(2, 4, np.random.default_rng(0), "2024-06-01T18:00:00+00:00")
    places["solar_zenith_angle"] = np.array([[10, 10, 60, 10], [61, 10, 60, np.nan]], np.float32)
    store = write_store(
        tmp_path / "store",
        [MockScene("a", np.zeros((2, 4, N_CHANNELS)), products={"O3TOT": values, "CLDO4": clouds}, geometry=places)],
    )
    q = Question("O3TOT", True, transform("O3TOT"), 0.25, 60.0)
    found = read_grid(store, 0, [q], coordinates_of(store, [0])[0], S)
    assert found.pixels[q] == (7, 5, 3)  # no value 1; no or many clouds 2; a low sun or none 2
    # the left cell keeps one pixel of four, the right one two: 2 and 6
    np.testing.assert_array_equal(found.targets[q], [[np.nan, 4.0]])


def test_an_array_beside_z_that_has_changed_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", "NO2")
    (tmp_path / "store/scenes/a/latitude/c/0/0").unlink()  # zarr would read zeros
    with pytest.raises(InputError, match="an array beside z has changed"):
        read_grid(store, 0, [Question("NO2", False, transform("NO2"))], coordinates_of(store, [0])[0], S)


# --- geometry -------------------------------------------------------------------------------------


def test_angles_that_wrap_are_averaged_as_vectors() -> None:
    angles = np.array([[359.0, 1.0, 80.0, np.nan], [358.0, 2.0, 100.0, 90.0]], np.float32)
    fields = {"relative_azimuth_angle": angles}
    assert geometry_names(list(fields)) == ["cos relative_azimuth_angle", "sin relative_azimuth_angle"]
    np.testing.assert_allclose(geometry_of(fields, (2, 4), S), [[[1, 0], [0, 1]]], atol=1e-6)


def test_local_time_is_that_of_the_sun_and_wraps_at_midnight() -> None:
    """18:00 UTC is noon at 90 W; 06:00 UTC is midnight there, and half an hour before it 7.5 degrees further west."""
    time = np.array([np.datetime64(f"2024-06-01T{hour}:00:00") for hour in ("18", "06")]).astype(np.int64) * 1.0
    names = geometry_names(["time", "longitude"])
    assert names == ["cos local time", "sin local time"]
    noon, midnight = geometry_of({"time": time, "longitude": np.full((2, 1), -90.0)}, (2, 1), 1)[:, 0]
    np.testing.assert_allclose(noon, [-1, 0], atol=1e-6)
    np.testing.assert_allclose(midnight, [1, 0], atol=1e-6)
    around = geometry_of({"time": time[1:], "longitude": np.array([[-97.5, -82.5]])}, (1, 2), S)
    np.testing.assert_allclose(around, [[[1, 0]]], atol=1e-6)


def test_geometry_is_what_all_scenes_have(tmp_path: Path) -> None:
    full = geometry(2, 2, np.random.default_rng(0), "2024-06-01T18:00:00+00:00")
    poor = {name: full[name] for name in ("latitude", "longitude")}
    store = write_store(tmp_path / "store", [replace(A, geometry=full), replace(B, geometry=poor)])
    assert geometry_names(coordinates_of(store, [0])[0]) == [
        *("cos solar_zenith_angle", "sin solar_zenith_angle", "cos viewing_zenith_angle", "sin viewing_zenith_angle"),
        *("cos relative_azimuth_angle", "sin relative_azimuth_angle"),
        *("latitude", "longitude", "cos local time", "sin local time"),
    ]
    assert geometry_names(coordinates_of(store, [0, 1])[0]) == ["latitude", "longitude"]
    found = geometry_of(
        {name: np.full((3, 3), v) for name, v in (("latitude", 40.0), ("longitude", -100.0))}, (3, 3), S
    )
    np.testing.assert_allclose(found, np.broadcast_to([40.0, -100.0], (2, 2, 2)), rtol=1e-6)


def test_a_coordinate_that_is_unknown_all_over_a_scene_is_left_out_of_all(tmp_path: Path) -> None:
    """Of the sun's angle the filter still asks, so that no pixel of that scene passes it."""
    full, unknown = (geometry(2, 2, np.random.default_rng(i), "2024-06-01T18:00:00+00:00") for i in range(2))
    full["viewing_zenith_angle"][0] = np.nan  # partly
    unknown["solar_zenith_angle"][:] = np.nan
    products = {"O3TOT": np.ones((2, 2))}
    store = write_store(
        tmp_path / "store", [replace(s, products=products, geometry=g) for s, g in ((A, full), (B, unknown))]
    )
    names, remarks = coordinates_of(store, [0, 1])
    assert "solar_zenith_angle" not in names and "viewing_zenith_angle" in names and len(names) == 5
    assert remarks == ["solar_zenith_angle is unknown all over scene b, so geometry goes without it"]
    assert len(coordinates_of(store, [0])[0]) == 6
    filtered = Question("O3TOT", True, transform("O3TOT"), max_solar_zenith=90.0)
    every = Question("O3TOT", False, transform("O3TOT"))
    first, second = (read_grid(store, i, [filtered, every], names, S) for i in (0, 1))
    assert first.pixels[filtered] == (4, 4, 4) and second.pixels[filtered] == (4, 4, 0)
    assert second.targets[every] == 1 and np.isnan(second.targets[filtered])


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
