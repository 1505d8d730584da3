"""Simulated granules: the physics against published numbers, the files against the format, the truth in the spectra."""

import tracemalloc
from datetime import UTC, datetime

import h5netcdf
import numpy as np
import pytest
import xarray as xr

from spectralvae import cli
from spectralvae.config import PLANTED_KINDS, PlantConfig, SimulateConfig
from spectralvae.config.loading import load_config
from spectralvae.errors import ConfigError
from spectralvae.simulate import PRODUCTS, fields, files, physics, plant, simulate_granules

BAND = "band_290_490_nm"
SETTINGS = {"seed": 3, "n_granules": 4, "shape": (12, 40), "n_channels": 128, "products": PRODUCTS}
SETTINGS["invalid_fraction"] = 0.06
N_MISSING = 29  # round(0.06 * 12 * 40)


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

    def walk(group):
        found.update({f"{group.name}/{name}": variable[...] for name, variable in group.variables.items()})
        for child in group.groups.values():
            walk(child)

    with h5netcdf.File(path) as file:
        walk(file)
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
    first, second = arrays(first), arrays(second)
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k], equal_nan=True) for k in first)


def pixels(**changes):
    """One pixel of a summer's day, as the physics takes it."""
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
    return physics.Pixels(**{name: np.array([[value]]) for name, value in values.items()})


def spectrum(wavelength, **changes):
    """Noise-free radiance of that pixel over a surface of 5 %."""
    wavelength = np.atleast_2d(np.asarray(wavelength, dtype=float))
    optics = physics.make_optics(wavelength)
    return physics.radiance(optics, pixels(**changes), np.full((1, *wavelength.shape), 0.05), 1.0)[0, 0]


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


@pytest.mark.parametrize("scans_per_day", [1, 2, 5, 12])
def test_the_sun_is_up_all_year(scans_per_day):
    place = fields.make_place(0, (3, 3))
    duration = np.array([[0.0], [900.0], [1800.0]])
    for index in range(0, 366 * scans_per_day, 7):
        start = fields.scan_start(index, scans_per_day)
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


def test_level1_reads_back_plainly(first):
    with h5netcdf.File(first) as file:
        assert {"mirror_step", "xtrack", "time", "exposure_time", "earth_sun_distance"} <= set(file.variables)
        assert file.attrs["Conventions"] == "CF-1.6"
        assert "SIMULATED" in file.attrs["source"]
        assert "seed 3" in file.attrs["source"]
        band = file[BAND]
        for name in ("radiance", "radiance_error"):
            variable = band[name]
            assert variable.dimensions == ("mirror_step", "xtrack", "spectral_channel")
            assert variable.shape == (12, 40, 128)
            assert variable.dtype == np.float32
            assert variable.attrs["units"] == "photons/s/cm^2/nm/sr"
            assert variable.attrs["_FillValue"] == np.float32(-1e30)
            assert variable.chunks == (1, 40, 128)
        assert band["pixel_quality_flag"].dtype == np.uint16
        wavelength = band["nominal_wavelength"][...]
        assert band["nominal_wavelength"].dimensions == ("xtrack", "spectral_channel")
        assert np.abs(wavelength - np.linspace(290, 490, 128)).max() < 0.1
        assert np.ptp(wavelength, axis=0).min() > 0.01
        assert (np.diff(wavelength, axis=1) > 0).all()
        latitude, zenith = band["latitude"][...], band["solar_zenith_angle"][...]
        assert latitude[:, 0] == pytest.approx(50)
        assert latitude[:, -1] == pytest.approx(22)
        assert ((zenith > 0) & (zenith < 88)).all()


def test_xarray_masks_and_dates(first):
    with xr.open_dataset(first, engine="h5netcdf") as root:
        assert root["time"].values[0] == np.datetime64("2024-06-01T15:00:00")
        assert (np.diff(root["time"].values) > np.timedelta64(0)).all()
    with xr.open_dataset(first, engine="h5netcdf", group=BAND) as band:
        assert band["radiance"].dims == ("mirror_step", "xtrack", "spectral_channel")
        assert int(band["radiance"].isnull().any("spectral_channel").sum()) == N_MISSING


def test_fill_is_exact_and_at_the_edges(simulated):
    for name, path in simulated.items():
        if "RAD_L1" not in name:
            continue
        found = arrays(path)
        radiance, error = found[f"/{BAND}/radiance"], found[f"/{BAND}/radiance_error"]
        fill = np.float32(-1e30)
        missing = (radiance == fill).all(axis=-1)
        assert missing.sum() == N_MISSING
        assert ((radiance == fill) == missing[..., None]).all()
        assert ((error == fill) == missing[..., None]).all()
        assert (found[f"/{BAND}/pixel_quality_flag"] == missing[..., None]).all()
        assert np.isfinite(found[f"/{BAND}/latitude"]).all()
        assert (found[f"/{BAND}/latitude"] > 0).all()
        across = np.minimum(np.arange(40), np.arange(40)[::-1])
        assert np.broadcast_to(across, missing.shape)[missing].max() <= 3
        assert missing[:, :20].any()
        assert missing[:, 20:].any()

        for product, field, flag, bad in (
            ("NO2", "vertical_column_troposphere", "main_data_quality_flag", 2),
            ("NO2", "vertical_column_stratosphere", "main_data_quality_flag", 2),
            ("HCHO", "vertical_column", "main_data_quality_flag", 2),
            ("O3TOT", "column_amount_o3", "quality_flag", 1),
            ("CLDO4", "cloud_fraction", "processing_quality_flag", 1),
        ):
            level2 = arrays(simulated[name.replace("RAD_L1", f"{product}_L2")])
            values = level2[f"/product/{field}"]
            assert (values == values.dtype.type(-1e30)).tolist() == missing.tolist()
            assert ((level2[f"/product/{flag}"] == bad) == missing).all()
            assert np.array_equal(level2["/geolocation/latitude"], found[f"/{BAND}/latitude"])


def test_truth_is_plausible(simulated):
    def valid(product, field):
        files = [path for name, path in simulated.items() if f"{product}_L2" in name]
        values = np.stack([arrays(path)[f"/product/{field}"] for path in files])
        return values[values > -1e29]

    no2, hcho = valid("NO2", "vertical_column_troposphere"), valid("HCHO", "vertical_column")
    assert 0 < no2.min() < 2e15
    assert 1e16 < no2.max() < 2e17
    assert 1e15 < hcho.min() < hcho.max() < 6e16
    assert np.median(np.abs(hcho - np.median(hcho))) > 1e14
    ozone, cloud = valid("O3TOT", "column_amount_o3"), valid("CLDO4", "cloud_fraction")
    assert 180 <= ozone.min() < ozone.max() <= 500
    assert (cloud.min(), cloud.max()) == (0, 1)
    assert np.mean(cloud == 0) > 0.2
    assert np.mean(cloud == 1) > 0.03


def test_radiance_is_in_the_instruments_range(simulated):
    for name, path in simulated.items():
        if "RAD_L1" in name:
            radiance = arrays(path)[f"/{BAND}/radiance"]
            radiance = radiance[radiance > -1e29]
            assert 1e9 < radiance.min() < 1e11
            assert 1e13 < radiance.max() < 6e13


# ---- what a seed means


def test_same_seed_same_arrays(simulated, first, tmp_path):
    again = simulate_granules(tmp_path, **{**SETTINGS, "n_granules": 1})
    assert [path.name for path in again] == list(simulated)[: len(again)]
    assert all(same(path, simulated[path.name]) for path in again)


def test_other_seed_other_arrays(first, tmp_path):
    other = simulate_granules(tmp_path, **{**SETTINGS, "seed": 4, "n_granules": 1, "products": []})
    ours, theirs = arrays(first), arrays(other[0])
    valid = (ours[f"/{BAND}/radiance"] > 0) & (theirs[f"/{BAND}/radiance"] > 0)
    assert (ours[f"/{BAND}/radiance"] != theirs[f"/{BAND}/radiance"])[valid].mean() > 0.99


def test_block_size_changes_nothing(first, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_SAMPLES", 5 * 40 * 128)
    monkeypatch.setattr(fields, "_PIECE_SAMPLES", 7 * 5 * 128)
    path = simulate_granules(tmp_path, **{**SETTINGS, "n_granules": 1, "products": []})[0]
    assert same(path, first)


def test_valid_pixels_do_not_depend_on_the_fill(first, tmp_path):
    path = simulate_granules(tmp_path, **{**SETTINGS, "n_granules": 1, "products": [], "invalid_fraction": 0.0})[0]
    full, ours = arrays(path)[f"/{BAND}/radiance"], arrays(first)[f"/{BAND}/radiance"]
    assert (full > 0).all()
    assert (full == ours)[ours > 0].all()


def test_the_place_stays_and_the_weather_changes(simulated):
    clouds = [arrays(p)["/product/cloud_fraction"] for n, p in simulated.items() if "CLDO4" in n]
    latitudes = [arrays(p)["/geolocation/latitude"] for n, p in simulated.items() if "CLDO4" in n]
    assert all(np.array_equal(latitudes[0], other) for other in latitudes)
    inside = (clouds[0] >= 0) & (clouds[1] >= 0)
    assert abs(np.corrcoef(clouds[0][inside], clouds[1][inside])[0, 1]) < 0.8
    assert np.mean(clouds[0] != clouds[1]) > 0.3


# ---- noise, and the truth in the spectra


def test_noise_is_what_radiance_error_says(first):
    found = arrays(first)
    radiance, error = found[f"/{BAND}/radiance"], found[f"/{BAND}/radiance_error"]
    optics = physics.make_optics(physics.wavelength_grid(40, 128))
    place = fields.make_place(3, (12, 40))
    clean = fields.clean_radiance(optics, place, fields.make_granule(place, 3, 0), slice(0, 12))
    valid = radiance > -1e29
    score = (radiance[valid] - clean[valid]) / error[valid]
    assert score.mean() == pytest.approx(0, abs=0.02)
    assert score.std() == pytest.approx(1, abs=0.02)
    ratio = clean[valid] / error[valid]
    assert ratio == pytest.approx(1000 * np.sqrt(clean[valid] / 1e13), rel=1e-5)


TRUTH = {
    "NO2": "vertical_column_troposphere",
    "O3TOT": "column_amount_o3",
    "HCHO": "vertical_column",
    "CLDO4": "cloud_fraction",
}
DAYS = {"n_granules": 12, "scans_per_day": 3, "shape": (16, 64), "n_channels": 128, "invalid_fraction": 0.0}


def read(simulated, products=TRUTH):
    """Log radiance (pixel, channel), the truth of each product (pixel) and the day (pixel) of all granules."""
    spectra, day, truth = [], [], {product: [] for product in products}
    for name in simulated:
        if "RAD_L1" not in name:
            continue
        with h5netcdf.File(simulated[name]) as file:
            spectra.append(np.log(file[BAND]["radiance"][...].reshape(-1, 128)).astype(float))
            day.append(np.full(len(spectra[-1]), file["time"][0] // 86400))
        for product in products:
            with h5netcdf.File(simulated[name.replace("RAD_L1", f"{product}_L2")]) as file:
                truth[product].append(file["product"][TRUTH[product]][...].ravel())
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
    """Four days of three scans without noise."""
    return read(simulate(tmp_path_factory.mktemp("clean"), **DAYS, noise=False))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """The same days with noise."""
    return read(simulate(tmp_path_factory.mktemp("noisy"), **DAYS))


@pytest.mark.parametrize("product", TRUTH)
def test_the_truth_is_in_the_spectra(noise_free, product):
    found, shuffled = (held_out_r2(noise_free, product, shuffle=s) for s in (False, True))
    assert found > 0.9, f"{product}: {found}"
    assert shuffled < 0.1, f"{product}: {shuffled}"


@pytest.mark.parametrize(("product", "limit"), [("NO2", 0.7), ("O3TOT", 0.85), ("HCHO", 0.3), ("CLDO4", 0.9)])
def test_noise_hides_some_of_the_truth(noise_free, noisy, product, limit):
    assert limit < held_out_r2(noisy, product) < held_out_r2(noise_free, product)


def test_it_is_the_gases_that_tell(noise_free, tmp_path, monkeypatch):
    """If they absorbed nothing, geography alone (vegetation makes formaldehyde) would explain much less."""
    for gas in ("no2", "ozone", "hcho"):
        monkeypatch.setattr(physics, f"{gas}_cross_section", np.zeros_like)
    blind = read(simulate(tmp_path, **DAYS, noise=False))
    for product in ("NO2", "O3TOT", "HCHO"):
        assert held_out_r2(blind, product) < held_out_r2(noise_free, product) - 0.2


def test_without_noise_the_radiance_is_the_physics(first, tmp_path):
    clean = arrays(next(iter(simulate(tmp_path, n_granules=1, products=[], noise=False).values())))
    noisy = arrays(first)
    place, optics = fields.make_place(3, (12, 40)), physics.make_optics(physics.wavelength_grid(40, 128))
    expected = fields.clean_radiance(optics, place, fields.make_granule(place, 3, 0), slice(0, 12))
    valid = noisy[f"/{BAND}/radiance"] > 0
    assert np.array_equal(clean[f"/{BAND}/radiance"][valid], expected.astype(np.float32)[valid])
    assert np.array_equal(clean[f"/{BAND}/radiance_error"], noisy[f"/{BAND}/radiance_error"])


# ---- several scans a day


def test_scans_of_a_day_have_their_hours(tmp_path):
    names = simulate(tmp_path, n_granules=4, scans_per_day=3, shape=(2, 3), n_channels=16, products=[])
    stamps = ["20240601T150000Z_S006", "20240601T180000Z_S009", "20240601T210000Z_S012", "20240602T150000Z_S006"]
    assert list(names) == [f"TEMPO_RAD_L1_V03_{stamp}G01.nc" for stamp in stamps]


def test_every_scan_has_a_number_of_its_own():
    for scans_per_day in range(1, 13):
        starts = [fields.scan_start(index, scans_per_day) for index in range(3 * scans_per_day)]
        assert len({(s.date(), files.granule_name("RAD_L1", s, "V03").split("Z_")[1]) for s in starts}) == len(starts)
        assert [(s - fields.FIRST_DAY).days for s in starts] == [i // scans_per_day for i in range(len(starts))]
        assert starts == sorted(starts)


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


def test_a_granule_does_not_depend_on_how_many_there_are(tmp_path):
    settings = {"scans_per_day": 2, "products": ["NO2"], "planted": PlantConfig(nan=0.1, unphysical_l2=0.1)}
    few, many = (simulate(tmp_path / str(n), **settings, n_granules=n) for n in (3, 4))
    assert len(few) == 6
    assert all(same(path, many[name]) for name, path in few.items())


# ---- invalid samples


PLANTED = {"fill": 0.011, "nan": 0.013, "infinite": 0.017, "default_fill": 0.019, "flagged": 0.023}
PLANTED["below_min_radiance"] = 0.029


def test_planted_samples_are_exact_and_the_others_untouched(simulated, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_SAMPLES", 5 * 40 * 128)
    settings = {"n_granules": 2, "planted": PlantConfig(**PLANTED)}
    for name, path in simulate(tmp_path, **settings).items():
        if "RAD_L1" not in name:
            assert same(path, simulated[name])
            continue
        clean, spoiled = arrays(simulated[name]), arrays(path)
        before, after = clean.pop(f"/{BAND}/radiance"), spoiled.pop(f"/{BAND}/radiance")
        flag = spoiled.pop(f"/{BAND}/pixel_quality_flag")
        was_flag = clean.pop(f"/{BAND}/pixel_quality_flag")
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


def test_planting_does_not_depend_on_the_block(tmp_path, monkeypatch):
    settings = {"n_granules": 1, "products": [], "planted": PlantConfig(**PLANTED)}
    path = next(iter(simulate(tmp_path / "one", **settings).values()))
    monkeypatch.setattr(files, "_BLOCK_SAMPLES", 5 * 40 * 128)
    assert same(path, next(iter(simulate(tmp_path / "two", **settings).values())))


@pytest.mark.parametrize("declared", [True, False])
def test_fill_is_declared_or_not(tmp_path, declared):
    planted = PlantConfig(fill=0.5, declare_fill=declared)
    path = next(iter(simulate(tmp_path, n_granules=1, products=[], planted=planted).values()))
    with h5netcdf.File(path) as file:
        assert ("_FillValue" in file[BAND]["radiance"].attrs) == declared
        assert "_FillValue" in file[BAND]["radiance_error"].attrs
        n_valid = (12 * 40 - N_MISSING) * 128
        assert np.sum(file[BAND]["radiance"][...] == np.float32(-1e30)) == N_MISSING * 128 + round(0.5 * n_valid)


def test_a_night_is_all_fill(simulated, tmp_path):
    paths = simulate(tmp_path, n_granules=2, planted=PlantConfig(nan=0.1, night=[1]))
    for name, path in paths.items():
        night, found = "20240602" in name, arrays(path)
        if "RAD_L1" in name:
            assert (found[f"/{BAND}/radiance"] == np.float32(-1e30)).all() == night
            assert (found[f"/{BAND}/pixel_quality_flag"] == 1).all() == night
            expected = {"planted_night": 1} if night else {"planted_nan": round(0.1 * (12 * 40 - N_MISSING) * 128)}
            assert {k: int(v) for k, v in attributes(path).items() if k.startswith("planted_")} == expected
        elif night:
            product = name.split("_")[1]
            values = found[f"/product/{TRUTH[product]}"]
            assert (values == values.dtype.type(-1e30)).all()
        else:
            assert same(path, simulated[name])


def test_unphysical_columns_are_planted_in_level_2(simulated, tmp_path):
    paths = simulate(tmp_path, n_granules=1, planted=PlantConfig(unphysical_l2=0.02))
    for name, path in paths.items():
        if "NO2_L2" not in name:
            assert same(path, simulated[name])
            continue
        clean, spoiled = (arrays(p)["/product/vertical_column_troposphere"] for p in (simulated[name], path))
        wrong = spoiled == 1.5e20
        assert wrong.sum() == round(0.02 * (12 * 40 - N_MISSING)) == attributes(path)["planted_unphysical_l2"]
        assert (clean[wrong] > 0).all()
        assert np.array_equal(spoiled[~wrong], clean[~wrong])


# ---- names and attributes of the collections


@pytest.mark.parametrize(("version", "number"), [("V03", 3), ("V04", 4)])
def test_versions(tmp_path, version, number):
    paths = simulate(tmp_path, n_granules=1, shape=(2, 3), n_channels=16, version=version)
    level1 = f"TEMPO_RAD_L1_{version}_20240601T150000Z_S006G01.nc"
    for name, kind in zip(paths, ("RAD_L1", "NO2_L2", "HCHO_L2", "O3TOT_L2", "CLDO4_L2"), strict=True):
        found = attributes(paths[name])
        assert name == level1.replace("RAD_L1", kind) == found["local_granule_id"]
        assert found["version_id"] == found["processing_version"] == number
        assert found["product_type"] == kind.split("_")[0]
        assert found["collection_shortname"] == f"TEMPO_{kind}"
        assert (kind == "RAD_L1") or found["input_files"] == level1


# ---- size


def test_memory_does_not_grow_with_the_mirror_steps(tmp_path, monkeypatch):
    """Beside a few maps, only a block of mirror steps is in memory."""
    monkeypatch.setattr(files, "_BLOCK_SAMPLES", 4 * 50 * 100)
    planted = PlantConfig(nan=0.01, flagged=0.01)
    settings = {"seed": 0, "n_granules": 1, "n_channels": 100, "products": [], "invalid_fraction": 0.1}
    peaks = []
    for steps in (4, 4, 200):  # the first time, imports are counted too
        tracemalloc.start()
        simulate_granules(tmp_path, **settings, shape=(steps, 50), planted=planted)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 0.5 * 4 * 196 * 50 * 100, "half of what the radiance has more"


# ---- refusals


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("products", ["NO2", "SO2"], ["SO2", "CLDO4"]),
        ("products", ["NO2", "NO2"], ["once"]),
        ("invalid_fraction", 1.0, ["1.0", "0 <= f < 1"]),
        ("invalid_fraction", -0.1, ["-0.1"]),
        ("invalid_fraction", float("nan"), ["nan"]),
        ("shape", (0, 40), ["[0, 40]"]),
        ("shape", (12, -1), ["[12, -1]"]),
        ("n_granules", 0, ["0"]),
        ("n_granules", 10_001, ["10001", "10000"]),
        ("scans_per_day", 0, ["0", "12"]),
        ("scans_per_day", 13, ["13", "12"]),
        ("version", "V05", ["V05", "V03, V04"]),
        ("n_channels", 15, ["15", "16"]),
        ("seed", -1, ["-1"]),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, key, value, words):
    with pytest.raises(ConfigError) as refusal:
        simulate_granules(tmp_path / "new", **{**SETTINGS, key: value})
    message = str(refusal.value)
    assert message.startswith(f"{key}: ")
    assert "\n" not in message
    assert all(word in message for word in words)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["n_granules=0"], ["n_granules: 0"]),
        (["n_granules=10001"], ["n_granules: 10001", "10000"]),
        (["scans_per_day=13"], ["scans_per_day: 13", "12"]),
        (["noise=1.5"], ["noise: 1.5"]),
        (["version=V05"], ["version: 'V05'", "V03"]),
        (["plant.fil=0.1"], ["plant.fil: unknown key, did you mean fill?"]),
        (["plant.nan=1"], ["plant.nan: 1", "less than 1"]),
        (["plant.nan=-0.1"], ["plant.nan: -0.1", "0"]),
        (["plant.nan=0.5", "plant.fill=0.5"], ["plant: ", "fill + nan", "below 1, and is 1"]),
        (["plant.night=[2]"], ["plant.night: 2", "n_granules is 2"]),
        (["plant.night=[0,0]"], ["plant.night", "twice"]),
        (["plant.night=[-1]"], ["plant.night.0: -1"]),
        (["plant.unphysical_l2=1.0"], ["plant.unphysical_l2: 1.0"]),
    ],
)
def test_impossible_configs_are_refused(tmp_path, settings, words):
    path = tmp_path / "simulate.yaml"
    path.write_text("output_dir: out\n")
    with pytest.raises(ConfigError) as refusal:
        load_config(SimulateConfig, path, settings)
    message = str(refusal.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"planted": PlantConfig(night=[4])}, "plant.night: 4 is no granule; n_granules is 4"),
        ({"planted": PlantConfig(nan=0.1), "shape": (1000, 1064), "n_channels": 1000}, "1000160000 samples"),
        (
            {"planted": PlantConfig(**dict.fromkeys(PLANTED_KINDS, 0.16)), "shape": (1, 1), "n_channels": 16},
            "18 of 16 valid samples",
        ),
    ],
)
def test_what_cannot_be_planted_is_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        simulate(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_the_command_hands_everything_over(tmp_path):
    config = tmp_path / "simulate.yaml"
    config.write_text(
        f"output_dir: {tmp_path / 'out'}\nshape: [2, 3]\nn_channels: 16\nn_granules: 3\nscans_per_day: 2\n"
        "noise: false\nversion: V04\ninvalid_fraction: 0.0\nproducts: [NO2]\nplant: {nan: 0.25, night: [2]}\n"
    )
    assert cli.run(["simulate", str(config)]) == 0
    settings = {"seed": 0, "n_granules": 3, "shape": (2, 3), "n_channels": 16, "products": ["NO2"]}
    planted = PlantConfig(nan=0.25, night=[2])
    settings |= {"scans_per_day": 2, "noise": False, "version": "V04", "invalid_fraction": 0.0, "planted": planted}
    for name, path in simulate(tmp_path / "expected", **settings).items():
        assert same(path, tmp_path / "out" / name)


def test_an_interrupted_file_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fields, "clean_radiance", fail)
    with pytest.raises(KeyboardInterrupt):
        simulate_granules(tmp_path, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_granule(tmp_path):
    settings = {"seed": 0, "n_granules": 1, "shape": (1, 1), "n_channels": 16, "products": PRODUCTS}
    path = simulate_granules(tmp_path, **settings, invalid_fraction=0.0)[0]
    assert (arrays(path)[f"/{BAND}/radiance"] > 0).all()
