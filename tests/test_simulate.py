"""Simulated granules: the physics against published numbers, the files against the format, the truth in the spectra."""

from datetime import UTC, datetime

import h5netcdf
import numpy as np
import pytest
import xarray as xr

from spectralvae.errors import ConfigError
from spectralvae.simulate import PRODUCTS, fields, granules, physics, simulate_granules

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


def same(first, second):
    """Whether two files hold the same arrays, bit by bit."""
    first, second = arrays(first), arrays(second)
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


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


def test_the_sun_is_up_all_year():
    place = fields.make_place(0, (3, 3))
    for day in range(0, 366, 5):
        for hour in granules.HOURS:
            start = datetime.fromordinal(granules.FIRST_DAY.toordinal() + day).replace(hour=hour, tzinfo=UTC)
            assert fields.sun_position(start, np.zeros(1), place.latitude, place.longitude)[0].max() < 88


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
    monkeypatch.setattr(granules, "_BLOCK_SAMPLES", 5 * 40 * 128)
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
    granule = fields.make_granule(place, 3, 0, datetime(2024, 6, 1, 15, tzinfo=UTC))
    clean = granules.clean_radiance(optics, place, granule, slice(0, 12))
    valid = radiance > -1e29
    score = (radiance[valid] - clean[valid]) / error[valid]
    assert score.mean() == pytest.approx(0, abs=0.02)
    assert score.std() == pytest.approx(1, abs=0.02)
    ratio = clean[valid] / error[valid]
    assert ratio == pytest.approx(1000 * np.sqrt(clean[valid] / 1e13), rel=1e-5)


def held_out_r2(simulated, product, field, *, shuffle=False):
    """R² on the last granule of a least-squares fit on the others: 40 principal components of log radiance."""
    spectra, truth, day = [], [], []
    names = [name for name in simulated if "RAD_L1" in name]
    for number, name in enumerate(names):
        radiance = arrays(simulated[name])[f"/{BAND}/radiance"]
        cloud = arrays(simulated[name.replace("RAD_L1", "CLDO4_L2")])["/product/cloud_fraction"]
        clear = (cloud >= 0) & (cloud < 0.2)
        spectra.append(np.log(radiance[clear]).astype(float))
        truth.append(arrays(simulated[name.replace("RAD_L1", f"{product}_L2")])[f"/product/{field}"][clear])
        day.append(np.full(int(clear.sum()), number))
    spectra, truth, day = (np.concatenate(part) for part in (spectra, truth, day))
    if shuffle:
        truth = np.random.default_rng(0).permutation(truth)
    held_out = day == len(names) - 1
    centred = spectra - spectra[~held_out].mean(axis=0)
    axes = np.linalg.svd(centred[~held_out], full_matrices=False)[2][:40]
    features = np.c_[centred @ axes.T, np.ones(len(truth))]
    weights = np.linalg.lstsq(features[~held_out], truth[~held_out], rcond=None)[0]
    left = truth[held_out] - features[held_out] @ weights
    return 1 - left.var() / truth[held_out].var()


@pytest.mark.parametrize(
    ("product", "field", "limit"),
    [("NO2", "vertical_column_troposphere", 0.6), ("O3TOT", "column_amount_o3", 0.8), ("HCHO", "vertical_column", 0.2)],
)
def test_the_truth_is_in_the_spectra(simulated, product, field, limit):
    found, shuffled = (held_out_r2(simulated, product, field, shuffle=s) for s in (False, True))
    assert found > limit, f"{product}: {found}"
    assert shuffled < 0.1, f"{product}: {shuffled}"


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


def test_an_interrupted_file_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(granules, "clean_radiance", fail)
    with pytest.raises(KeyboardInterrupt):
        simulate_granules(tmp_path, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_granule(tmp_path):
    settings = {"seed": 0, "n_granules": 1, "shape": (1, 1), "n_channels": 16, "products": PRODUCTS}
    path = simulate_granules(tmp_path, **settings, invalid_fraction=0.0)[0]
    assert (arrays(path)[f"/{BAND}/radiance"] > 0).all()
