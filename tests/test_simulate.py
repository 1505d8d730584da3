"""Simulated granules: the physics against published numbers, the files against the format, the truth in the spectra."""

from datetime import UTC, datetime

import h5netcdf
import h5py
import numpy as np
import pytest
import xarray as xr
from inferring import contents, peak
from pydantic import ValidationError
from refusals import refused

from spectralvae import cli
from spectralvae.config import PLANTED_KINDS, PlantConfig, SimulateConfig
from spectralvae.errors import ConfigError
from spectralvae.simulate import PRODUCTS, fields, files, physics, plant, simulate_granules

BAND = "band_290_490_nm"
SETTINGS = {"seed": 3, "n_granules": 4, "shape": (12, 40), "n_channels": 128, "products": PRODUCTS}
SETTINGS["invalid_fraction"] = 0.06
N_MISSING = 29  # round(0.06 * 12 * 40)
TRUTH = {
    "NO2": "vertical_column_troposphere",
    "O3TOT": "column_amount_o3",
    "HCHO": "vertical_column",
    "CLDO4": "cloud_fraction",
}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Paths of four granules with all products, by name."""
    paths = simulate_granules(tmp_path_factory.mktemp("simulated"), **SETTINGS)
    return {path.name: path for path in paths}


@pytest.fixture
def first(simulated):
    """The first level-1 granule."""
    return simulated["TEMPO_RAD_L1_V03_20240601T150000Z_S006G01.nc"]


def arrays(path):
    """Every variable of a file, by its path in the file."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[...]}) if isinstance(item, h5py.Dataset) else None)
    return found


def attributes(path):
    """The attributes at the root of a file."""
    with h5netcdf.File(path) as file:
        return dict(file.attrs)


def simulate(folder, **changes):
    """Files of a small simulation, by name."""
    return {path.name: path for path in simulate_granules(folder, **{**SETTINGS, **changes})}


def same(first, second):
    """Whether two files hold the same arrays, bit by bit."""
    return contents(first) == contents(second)


def spectrum(wavelength, **changes):
    """Noise-free radiance of one pixel of a summer's day over a surface of 5 %."""
    values = {
        "solar_zenith": 40.0,
        "viewing_zenith": 45.0,
        "relative_azimuth": 90.0,
        "ozone": 300 * physics.DOBSON_UNIT,
        "no2_stratosphere": 3e15,
        "no2_troposphere": 2e15,
        "hcho": 8e15,
        "cloud_fraction": 0.0,
        **changes,
    }
    pixel = physics.Pixels(**{name: np.array([[value]]) for name, value in values.items()})
    wavelength = np.atleast_2d(np.asarray(wavelength, dtype=float))
    return physics.radiance(physics.make_optics(wavelength), pixel, np.full((1, *wavelength.shape), 0.05), 1.0)[0, 0]


# ---- physics against published numbers


def test_rayleigh_depth_is_bodhaines():
    at_400, at_350, at_450 = physics.rayleigh_optical_depth(np.array([400.0, 350.0, 450.0]))
    assert at_400 == pytest.approx(0.3600, rel=0.01)
    assert np.log(at_450 / at_350) / np.log(450 / 350) == pytest.approx(-4.1, abs=0.15)


def test_irradiance_is_the_suns():
    """Measured: about 0.5 W/m^2/nm at 300-305 nm and 2.0 at 470-480 nm; the deepest lines are calcium's H and K."""
    wavelength = np.arange(291, 489, 0.1)
    irradiance = physics.solar_irradiance(wavelength)
    watts = irradiance * 1e4 * 6.626e-34 * 2.998e8 / (wavelength * 1e-9)
    assert watts[(wavelength > 300) & (wavelength < 305)].mean() == pytest.approx(0.5, rel=0.2)
    assert watts[(wavelength > 470) & (wavelength < 480)].mean() == pytest.approx(2.0, rel=0.2)
    for line in (393.37, 396.85, 430.8, 434.05, 486.13):
        near = np.abs(wavelength - line) < 1.2
        assert wavelength[near][irradiance[near].argmin()] == pytest.approx(line, abs=0.25)


def test_a_rayleigh_layer_loses_no_light():
    """Without absorption, what diffuse light is not let through is thrown back: 2 int T(mu) mu dmu = 1 - S."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    cosine, weights = (nodes + 1) / 2, weights / 2
    for depth in (0.05, 0.4, 1.5):
        passed = 2 * np.sum(weights * cosine * physics.total_transmittance(np.array(depth), cosine))
        assert passed + physics.spherical_albedo(np.array(depth)) == pytest.approx(1.0, abs=1e-3)


def test_cross_sections_have_the_right_magnitude():
    assert physics.ozone_cross_section(np.array([290.0, 300.0])) == pytest.approx([1.4e-18, 4e-19], rel=0.1)
    assert 4.5e-19 < physics.no2_cross_section(np.linspace(400, 450, 500)).mean() < 6.5e-19
    wavelength = np.arange(335.0, 345.0, 0.05)
    assert wavelength[physics.hcho_cross_section(wavelength).argmax()] == pytest.approx(339.5, abs=0.2)
    assert physics.hcho_cross_section(np.array([450.0]))[0] < 1e-25


def test_stratospheric_no2_obeys_beer_and_lambert():
    air_mass = 1 / np.cos(np.radians(40)) + 1 / np.cos(np.radians(45))
    expected = np.exp(-air_mass * 2e15 * physics.no2_cross_section(np.array([440.0])))
    ratio = spectrum(440.0, no2_stratosphere=5e15) / spectrum(440.0, no2_stratosphere=3e15)
    assert ratio == pytest.approx(expected, rel=1e-12)


def test_ozone_makes_the_edge():
    at_300, at_340 = spectrum([300.0, 340.0])
    assert at_300 / at_340 < 0.05
    light = [spectrum(310.0, ozone=du * physics.DOBSON_UNIT)[0] for du in (200, 300, 400)]
    assert light[0] > 1.2 * light[1] > 1.4 * light[2]


def test_clouds_are_bright_and_hide_the_lowest_layer():
    clear, half, overcast = (spectrum(440.0, cloud_fraction=f)[0] for f in (0.0, 0.5, 1.0))
    assert overcast > 2 * clear
    assert half == pytest.approx((clear + overcast) / 2)
    assert spectrum(440.0, cloud_fraction=1.0, no2_troposphere=5e16)[0] == overcast
    assert spectrum(440.0, no2_troposphere=5e16)[0] < 0.98 * clear


def test_sun_and_satellite_stand_where_almanacs_say():
    noon = datetime(2024, 6, 21, 12, 2, tzinfo=UTC)  # the equation of time is about -2 minutes
    zenith, azimuth, distance = fields.sun_position(noon, np.zeros(1), np.array([40.0]), np.array([0.0]))
    assert zenith[0] == pytest.approx(40 - 23.44, abs=0.05)
    assert azimuth[0] == pytest.approx(180, abs=1)
    assert distance == pytest.approx(1.0162, abs=1e-3)
    latitude, longitude = np.array([0.0, 40.0, 40.0]), np.array([-91.0, -91.0, -100.0])
    zenith, azimuth = fields.satellite_position(latitude, longitude)
    assert zenith[:2] == pytest.approx([0.0, 46.27], abs=0.05)
    assert azimuth[1] == pytest.approx(180.0)
    assert 90 < azimuth[2] < 180


def test_scans_of_a_year_have_days_numbers_and_sunlight():
    place = fields.make_place(0, (3, 3))
    duration = np.array([[0.0], [900.0], [1800.0]])
    for scans_per_day in range(1, 13):
        starts = [fields.scan_start(index, scans_per_day) for index in range(366 * scans_per_day)]
        assert [(s - fields.FIRST_DAY).days for s in starts] == [i // scans_per_day for i in range(len(starts))]
        assert starts == sorted(starts)
        assert len({(s.date(), files.granule_name("RAD_L1", s, "V03").split("Z_")[1]) for s in starts}) == len(starts)
        for start in starts[::13]:
            assert fields.sun_position(start, duration, place.latitude, place.longitude)[0].max() < 89


def test_scans_never_overlap():
    for steps in (131, 2000):
        place = fields.make_place(0, (steps, 1))
        first, second = (fields.make_granule(place, 0, index, 12) for index in (0, 1))
        assert first.time[-1] < (second.start - first.start).total_seconds()
        assert first.time[1] == (3.0 if steps == 131 else 0.9)


def test_light_on_its_way():
    """Without air a Lambertian reflector of albedo A reflects A; a layer of air mass 2 is crossed twice."""
    zero, one = np.zeros((1, 1)), np.ones((1, 1, 1))
    assert physics.lambertian_reflectance(0.3, zero, zero, one, one)[0, 0, 0] == pytest.approx(0.3)
    assert physics.air_mass(np.array(1.0), np.array(0.5)) == 3.0
    passed = physics.beer_lambert(2 * one, np.array([[1e-18, 2e-18]]), np.array([[1e17]]))
    assert passed[0, 0] == pytest.approx([np.exp(-0.2), np.exp(-0.4)])


# ---- files


def test_names_pair_the_levels(simulated):
    stamps = ["20240601T150000Z_S006", "20240602T180000Z_S009", "20240603T210000Z_S012", "20240604T150000Z_S006"]
    kinds = ["RAD_L1", *(f"{product}_L2" for product in PRODUCTS)]
    assert list(simulated) == [f"TEMPO_{kind}_V03_{stamp}G01.nc" for stamp in stamps for kind in kinds]
    folder = next(iter(simulated.values())).parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(simulated)


def test_level1_reads_back_in_xarray(first):
    with xr.open_dataset(first) as root:
        assert {"mirror_step", "xtrack", "time", "exposure_time", "earth_sun_distance"} <= set(root.variables)
        assert root.Conventions == "CF-1.6"
        assert all(word in root.source for word in ("SIMULATED", "seed 3"))
        assert root["time"].values[0] == np.datetime64("2024-06-01T15:00:00")
        assert (np.diff(root["time"].values) > np.timedelta64(0)).all()
    with xr.open_dataset(first, group=BAND) as band:
        for name in ("radiance", "radiance_error"):
            variable = band[name]
            assert variable.dims == ("mirror_step", "xtrack", "spectral_channel")
            assert (variable.shape, variable.dtype) == ((12, 40, 128), np.float32)
            assert variable.units == "photons/s/cm^2/nm/sr"
            assert variable.encoding["_FillValue"] == np.float32(-1e30)
            assert variable.encoding["chunksizes"] == (1, 40, 128)
            assert variable.isnull().any("spectral_channel").sum() == N_MISSING
        assert band.pixel_quality_flag.dtype == np.uint16
        assert band.nominal_wavelength.dims == ("xtrack", "spectral_channel")
        wavelength = band.nominal_wavelength.values
        assert np.abs(wavelength - np.linspace(290, 490, 128)).max() < 0.1
        assert np.ptp(wavelength, axis=0).min() > 0.01
        assert (np.diff(wavelength, axis=1) > 0).all()
        assert band.latitude[:, [0, -1]].values == pytest.approx(np.full((12, 2), [50, 22]))
        assert ((band.solar_zenith_angle > 0) & (band.solar_zenith_angle < 88)).all()


def test_fill_is_exact_and_at_the_edges(simulated, first):
    place = arrays(first)[f"{BAND}/latitude"]
    for name in (name for name in simulated if "RAD_L1" in name):
        found = arrays(simulated[name])
        missing = found[f"{BAND}/radiance"][..., 0] == np.float32(-1e30)
        assert missing.sum() == N_MISSING
        for key, fill in (("radiance", -1e30), ("radiance_error", -1e30), ("pixel_quality_flag", 1)):
            values = found[f"{BAND}/{key}"]
            assert ((values == values.dtype.type(fill)) == missing[..., None]).all()
        assert np.array_equal(found[f"{BAND}/latitude"], place), "also without radiance, and on every day"
        across = np.minimum(np.arange(40), np.arange(40)[::-1])
        assert np.broadcast_to(across, missing.shape)[missing].max() <= 3
        assert missing[:, :20].any() and missing[:, 20:].any()

        for product, field in TRUTH.items():
            level2 = arrays(simulated[name.replace("RAD_L1", f"{product}_L2")])
            values, (flag,) = level2[f"product/{field}"], [level2[key] for key in level2 if "quality" in key]
            assert np.array_equal(values == values.dtype.type(-1e30), missing)
            assert np.array_equal(flag == (2 if product in ("NO2", "HCHO") else 1), missing)
            assert np.array_equal(level2["geolocation/latitude"], place)


# ---- what a seed means


def test_the_seed_changes_all_and_the_fill_nothing_else(first, tmp_path):
    (other,) = simulate(tmp_path / "seed", n_granules=1, products=[], seed=4).values()
    (full,) = simulate(tmp_path / "full", n_granules=1, products=[], invalid_fraction=0.0).values()
    ours, theirs, full = (arrays(path)[f"{BAND}/radiance"] for path in (first, other, full))
    assert (ours != theirs)[(ours > 0) & (theirs > 0)].mean() > 0.99
    assert (full > 0).all()
    assert (full == ours)[ours > 0].all()


# ---- noise, and the truth in the spectra


def test_the_radiance_is_the_physics_with_the_noise_that_radiance_error_says(first, tmp_path):
    (clean,) = map(arrays, simulate(tmp_path, n_granules=1, products=[], noise=False).values())
    noisy = arrays(first)
    place, optics = fields.make_place(3, (12, 40)), physics.make_optics(physics.wavelength_grid(40, 128))
    expected = fields.clean_radiance(optics, place, fields.make_granule(place, 3, 0), slice(0, 12))
    radiance, error = noisy[f"{BAND}/radiance"], noisy[f"{BAND}/radiance_error"]
    valid = radiance > 0
    assert np.array_equal(clean[f"{BAND}/radiance"][valid], expected.astype(np.float32)[valid])
    assert np.array_equal(clean[f"{BAND}/radiance_error"], error)
    score = (radiance[valid] - expected[valid]) / error[valid]
    assert score.mean() == pytest.approx(0, abs=0.02)
    assert score.std() == pytest.approx(1, abs=0.02)
    ratio = expected[valid] / error[valid]
    assert ratio == pytest.approx(1000 * np.sqrt(expected[valid] / 1e13), rel=1e-5)


DAYS = {"n_granules": 9, "scans_per_day": 3, "shape": (16, 64), "n_channels": 128, "invalid_fraction": 0.0}


def read(simulated):
    """Log radiance (pixel, channel), the truth of each product (pixel) and the day (pixel) of all granules."""
    spectra, day, truth = [], [], {product: [] for product in TRUTH}
    for name in (name for name in simulated if "RAD_L1" in name):
        found = arrays(simulated[name])
        spectra.append(np.log(found[f"{BAND}/radiance"].reshape(-1, 128)).astype(float))
        day.append(np.full(len(spectra[-1]), found["time"][0] // 86400))
        for product, values in truth.items():
            level2 = arrays(simulated[name.replace("RAD_L1", f"{product}_L2")])
            values.append(level2[f"product/{TRUTH[product]}"].ravel())
    return np.concatenate(spectra), {key: np.concatenate(values) for key, values in truth.items()}, np.concatenate(day)


def held_out_r2(data, product, *, shuffle=False):
    """R² on the last day of a least-squares fit on the days before: log radiance of all channels, and a constant.

    Gases are fitted where the cloud fraction is below 0.2, the cloud fraction everywhere.
    """
    spectra, truths, day = data
    used = (truths["CLDO4"] < 0.2) | (product == "CLDO4")
    spectra, truth, held_out = spectra[used], truths[product][used], day[used] == day.max()
    truth = truth / truth.std()
    if shuffle:
        truth = np.random.default_rng(0).permutation(truth)
    features = np.c_[spectra - spectra[~held_out].mean(axis=0), np.ones(len(truth))]
    weights = np.linalg.lstsq(features[~held_out], truth[~held_out], rcond=None)[0]
    left = truth[held_out] - features[held_out] @ weights
    return 1 - np.mean(left**2) / truth[held_out].var()


@pytest.fixture(scope="module")
def noise_free(tmp_path_factory):
    """Three days of three scans without noise."""
    return read(simulate(tmp_path_factory.mktemp("clean"), **DAYS, noise=False))


def test_truth_is_plausible(noise_free):
    spectra, truth, _ = noise_free
    no2, hcho, ozone, cloud = (truth[product] for product in ("NO2", "HCHO", "O3TOT", "CLDO4"))
    assert 0 < no2.min() < 2e15
    assert 1e16 < no2.max() < 2e17
    assert 9e14 < hcho.min() < hcho.max() < 6e16
    assert np.median(np.abs(hcho - np.median(hcho))) > 1e14
    assert 180 <= ozone.min() < ozone.max() <= 500
    assert (cloud.min(), cloud.max()) == (0, 1)
    assert np.mean(cloud == 0) > 0.2 and np.mean(cloud == 1) > 0.03
    assert 1e9 < np.exp(spectra.min()) < 1e11
    assert 1e13 < np.exp(spectra.max()) < 6e13


def test_the_truth_is_in_the_spectra_and_noise_hides_some_of_it(noise_free, tmp_path):
    noisy = read(simulate(tmp_path, **DAYS))
    for product, limit in (("NO2", 0.7), ("O3TOT", 0.85), ("HCHO", 0.3), ("CLDO4", 0.9)):
        found, shuffled = (held_out_r2(noise_free, product, shuffle=s) for s in (False, True))
        assert found > 0.9
        assert shuffled < 0.1
        assert limit < held_out_r2(noisy, product) < found


def test_it_is_the_gases_that_tell(noise_free, tmp_path, monkeypatch):
    """If they absorbed nothing, geography alone (vegetation makes formaldehyde) would explain much less."""
    for gas in ("no2", "ozone", "hcho"):
        monkeypatch.setattr(physics, f"{gas}_cross_section", np.zeros_like)
    blind = read(simulate(tmp_path, **DAYS, noise=False))
    for product in ("NO2", "O3TOT", "HCHO"):
        assert held_out_r2(blind, product) < held_out_r2(noise_free, product) - 0.2


# ---- several scans a day


def test_scans_of_a_day_are_alike_and_their_clouds_move():
    place = fields.make_place(3, (24, 64))
    scans = [fields.make_granule(place, 3, index, 6).pixels for index in range(12)]

    def likeness(name, first, second):
        usual = np.mean([getattr(scan, name) for scan in scans], axis=0)
        return np.corrcoef(*(np.ravel(getattr(scans[i], name) - usual) for i in (first, second)))[0, 1]

    for gas in ("ozone", "no2_troposphere", "hcho"):
        assert likeness(gas, 0, 1) > 0.7, "an hour later"
        assert likeness(gas, 0, 6) < 0, "the same hour of the other day"
        assert np.mean(getattr(scans[0], gas) != getattr(scans[1], gas)) > 0.9
    assert 0.2 < np.corrcoef(scans[0].cloud_fraction.ravel(), scans[1].cloud_fraction.ravel())[0, 1] < 0.9


def test_weather_goes_with_the_wind():
    random = [fields.random_stream(1, fields.Purpose.OZONE) for _ in range(2)]
    before, after = (
        fields.smooth_field(r, (20, 40), 3.0, d) for r, d in zip(random, [(0, 0), (0.1, -0.25)], strict=True)
    )
    assert np.corrcoef(before[:-2, 10:].ravel(), after[2:, :-10].ravel())[0, 1] == pytest.approx(1)


def test_a_granule_depends_neither_on_how_many_there_are_nor_on_the_blocks(tmp_path, monkeypatch):
    settings = {"scans_per_day": 3, "products": ["NO2"], "planted": PlantConfig(**PLANTED, unphysical_l2=0.1)}
    many = simulate(tmp_path / "many", **settings, n_granules=4)
    monkeypatch.setattr(files, "BLOCK_SAMPLES", 5 * 40 * 128)
    monkeypatch.setattr(fields, "PIECE_SAMPLES", 7 * 5 * 128)
    few = simulate(tmp_path / "few", **settings, n_granules=3)
    assert len(few) == 6
    assert all(same(path, many[name]) for name, path in few.items())


# ---- invalid samples


PLANTED = {"fill": 0.011, "nan": 0.013, "infinite": 0.017, "default_fill": 0.019, "flagged": 0.023}
PLANTED["below_min_radiance"] = 0.029


def test_planted_samples_are_exact_and_the_others_untouched(simulated, tmp_path):
    for name, path in simulate(tmp_path, n_granules=2, planted=PlantConfig(**PLANTED)).items():
        if "RAD_L1" not in name:
            assert same(path, simulated[name])
            continue
        clean, spoiled = arrays(simulated[name]), arrays(path)
        (before, was_flag), (after, flag) = (
            [found.pop(f"{BAND}/{key}") for key in ("radiance", "pixel_quality_flag")] for found in (clean, spoiled)
        )
        assert all(np.array_equal(clean[key], spoiled[key]) for key in clean)
        valid = before != np.float32(-1e30)
        found = {
            "fill": (after == np.float32(-1e30)) & valid,
            "nan": np.isnan(after),
            "infinite": np.isinf(after),
            "default_fill": after == np.float32(9.969209968386869e36),
            "flagged": (flag != 0) & valid,
            "below_min_radiance": (after < 1) & (after > -1e29),
        }
        assert tuple(found) == PLANTED_KINDS
        counts = {kind: int(mask.sum()) for kind, mask in found.items()}
        assert counts == {kind: round(share * int(valid.sum())) for kind, share in PLANTED.items()}
        written = {key: int(value) for key, value in attributes(path).items() if key.startswith("planted_")}
        assert written == {f"planted_{kind}": count for kind, count in counts.items()}
        assert np.max(sum(mask.astype(int) for mask in found.values())) == 1
        changed = np.any([mask for kind, mask in found.items() if kind != "flagged"], axis=0)
        assert np.array_equal(after[~changed], before[~changed])
        assert np.array_equal(flag[~found["flagged"]], was_flag[~found["flagged"]])
        assert set(flag[found["flagged"]].tolist()) == {1, 2, 4, 32}
        assert {*np.sign(after[found["infinite"]])} == {-1, 1}
        low = after[found["below_min_radiance"]]
        assert all(np.mean(part) > 0.2 for part in (low < 0, low == 0, low > 0))


def test_planted_samples_are_everywhere():
    """Every sample is as likely as any other: shares by mirror step and by channel scatter as chance has it."""
    valid = np.ones((30, 40), dtype=bool)
    valid[:, :10] = False
    random, counts = np.random.default_rng(0), dict.fromkeys(PLANTED_KINDS, 6000)
    nan = [chosen["nan"] for chosen in plant.deal(random, counts, valid, 50)]
    for found, cells in ((np.repeat(np.arange(30), [len(step) for step in nan]), 30), (np.concatenate(nan) % 50, 50)):
        scatter = (np.bincount(found, minlength=cells) - 6000 / cells) / np.sqrt(6000 / cells)
        assert 0.5 < scatter.std() < 1.5
        assert np.abs(scatter).max() < 5
    assert np.concatenate(nan).min() >= 10 * 50


def test_nights_impossible_columns_and_fill_that_is_not_declared(simulated, tmp_path):
    planted = PlantConfig(nan=0.1, night=[1], unphysical_l2=0.02, declare_fill=False)
    n_valid, fill = 12 * 40 - N_MISSING, -1e30
    for name, path in simulate(tmp_path, n_granules=2, planted=planted).items():
        product, night, found = name.split("_")[1], "20240602" in name, arrays(path)
        written = {key: int(value) for key, value in attributes(path).items() if key.startswith("planted_")}
        if product == "RAD":
            with h5py.File(path) as file:
                declared = ["_FillValue" in file[BAND][key].attrs for key in ("radiance", "radiance_error")]
            assert declared == [False, True]
            n_fill = (12 * 40 if night else N_MISSING) * 128
            assert np.sum(found[f"{BAND}/radiance"] == np.float32(fill)) == n_fill
            assert np.sum(found[f"{BAND}/pixel_quality_flag"] == 1) == n_fill
            assert written == ({"planted_night": 1} if night else {"planted_nan": round(0.1 * n_valid * 128)})
        elif night:
            values = found[f"product/{TRUTH[product]}"]
            assert (values == values.dtype.type(fill)).all()
        elif product == "NO2":
            clean, spoiled = (arrays(p)["product/vertical_column_troposphere"] for p in (simulated[name], path))
            wrong = spoiled == 1.5e20
            assert written == {"planted_unphysical_l2": wrong.sum()} == {"planted_unphysical_l2": round(0.02 * n_valid)}
            assert (clean[wrong] > 0).all()
            assert np.array_equal(spoiled[~wrong], clean[~wrong])
        else:
            assert same(path, simulated[name])


# ---- size


def test_memory_does_not_grow_with_the_mirror_steps(tmp_path, monkeypatch):
    """Beside a few maps, only a block of mirror steps is in memory."""
    monkeypatch.setattr(files, "BLOCK_SAMPLES", 4 * 50 * 100)
    settings = {"seed": 0, "n_granules": 1, "n_channels": 100, "products": [], "invalid_fraction": 0.1}
    settings["planted"] = PlantConfig(nan=0.01, flagged=0.01)
    peaks = [  # the first time, imports are counted too
        peak(lambda steps=steps: simulate_granules(tmp_path, **settings, shape=(steps, 50))) for steps in (4, 4, 200)
    ]
    assert peaks[2] - peaks[1] < 0.5 * 4 * 196 * 50 * 100, "half of what the radiance has more"


# ---- refusals, and the command


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("products", ["NO2", "SO2"], ["SO2", "CLDO4"]),
        ("products", ["NO2", "NO2"], ["NO2"]),
        ("invalid_fraction", 1.0, ["1.0"]),
        ("invalid_fraction", -0.1, ["-0.1"]),
        ("invalid_fraction", float("nan"), ["nan"]),
        ("shape", (0, 40), ["[0, 40]"]),
        ("n_granules", 0, ["0"]),
        ("n_granules", 10_001, ["10001", "10000"]),
        ("scans_per_day", 0, ["0", "12"]),
        ("scans_per_day", 13, ["13", "12"]),
        ("version", "V05", ["V05", "V03, V04"]),
        ("n_channels", 15, ["15", "16"]),
        ("seed", -1, ["-1"]),
        ("plant.night", {"planted": PlantConfig(night=[4])}, ["4", "3"]),
        ("plant", {"planted": PlantConfig(nan=0.1), "shape": (1000, 1064), "n_channels": 1000}, ["1000160000"]),
        (
            "plant",
            {"planted": PlantConfig(**dict.fromkeys(PLANTED_KINDS, 0.16)), "shape": (1, 1), "n_channels": 16},
            ["18 of 16"],
        ),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, key, value, words):
    with refused(ConfigError, *words, key=key):
        simulate(tmp_path / "new", **(value if "plant" in key else {key: value}))
    assert not (tmp_path / "new").exists()
    if "plant" not in key:
        with pytest.raises(ValidationError):
            SimulateConfig(output_dir=tmp_path / "new", **{key: list(value) if key == "shape" else value})


def test_the_command_hands_everything_over_and_files_tell_what_they_are(tmp_path):
    config = tmp_path / "simulate.yaml"
    config.write_text(
        f"output_dir: {tmp_path / 'out'}\nshape: [1, 1]\nn_channels: 16\nn_granules: 3\nscans_per_day: 2\n"
        "noise: false\nversion: V04\ninvalid_fraction: 0.0\nproducts: [CLDO4, NO2]\nplant: {nan: 0.25, night: [2]}\n"
    )
    assert cli.run(["simulate", str(config)]) == 0
    settings = {"seed": 0, "n_granules": 3, "shape": (1, 1), "n_channels": 16, "products": ["CLDO4", "NO2"]}
    planted = PlantConfig(nan=0.25, night=[2])
    settings |= {"scans_per_day": 2, "noise": False, "version": "V04", "invalid_fraction": 0.0, "planted": planted}
    for name, path in simulate(tmp_path / "expected", **settings).items():
        assert same(path, tmp_path / "out" / name)
        found, (_, product, level, *_) = attributes(tmp_path / "out" / name), name.split("_")
        assert found["local_granule_id"] == name
        assert found["version_id"] == found["processing_version"] == 4
        assert (found["product_type"], found["collection_shortname"]) == (product, f"TEMPO_{product}_{level}")
        assert level == "L1" or found["input_files"] == name.replace(f"{product}_{level}", "RAD_L1")


def test_an_interrupted_file_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fields, "clean_radiance", fail)
    with pytest.raises(KeyboardInterrupt):
        simulate_granules(tmp_path, **SETTINGS)
    assert list(tmp_path.iterdir()) == []
