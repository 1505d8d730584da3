"""encode_scene and decode_scene: scenes and latents in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from tiny import N_CHANNELS, tiny_latents, tiny_model, tiny_normalization, write_tiny

from spectralvae import AutoencoderKL, decode_scene, encode_scene, load_model, open_scene
from spectralvae.errors import ConfigError, InputError
from spectralvae.inference import coder as coder_module
from spectralvae.inference import latents as latents_module
from spectralvae.inference import reading as reading_module
from spectralvae.inference import scenes as scenes_module
from spectralvae.inference.coder import Coder
from spectralvae.inference.latents import on_grid
from spectralvae.weights.loading import artifact_of

WAVELENGTH = tiny_normalization().wavelength


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(write_tiny(tmp_path_factory.mktemp("model") / "export"))


def radiance(ny: int, nx: int, seed: int = 0) -> Any:
    """Within the range of the tiny normalisation; positive, some invalid."""
    values = np.exp(np.random.default_rng(seed).normal(1.5, 0.3, (ny, nx, N_CHANNELS))).astype(np.float32)
    values[values < 2.0] = np.nan
    return values


def dataset(ny: int, nx: int, **more: Any) -> xr.Dataset:
    return xr.Dataset(
        {"radiance": (("y", "x", "channel"), radiance(ny, nx))}, {"wavelength": ("channel", WAVELENGTH), **more}
    )


def test_one_tile_is_what_the_network_makes_of_it(model: Any) -> None:
    scene = radiance(8, 8)
    z = tiny_normalization().normalize(scene)
    x = torch.from_numpy(np.nan_to_num(z)).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        posterior = tiny_model().eval().encode(x)
        x_hat = tiny_model().eval().decode(posterior.mode())[0].permute(1, 2, 0).numpy()

    latents = encode_scene(model, scene, log_variance=True)
    decoded = decode_scene(model, latents)

    np.testing.assert_allclose(latents.latent.values, posterior.mean[0], atol=1e-6)
    np.testing.assert_allclose(latents.log_variance.values, posterior.logvar[0], atol=1e-6)
    expected = np.where(np.isnan(z), np.nan, tiny_normalization().denormalize(x_hat))
    np.testing.assert_allclose(decoded.radiance.values, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (1, 30), (23, 19), (3, 40), (16, 9)], ids=str)
def test_shapes_and_masks_come_back(model: Any, shape: tuple[int, int]) -> None:
    scene = dataset(*shape)
    latents = encode_scene(model, scene)
    decoded = decode_scene(model, latents)

    assert latents.latent.dims == ("latent_channel", "y", "x")
    assert latents.latent.shape == (3, -(-shape[0] // 2), -(-shape[1] // 2))
    valid = np.isfinite(scene.radiance.values)
    np.testing.assert_array_equal(latents.valid.values, valid)
    assert latents.valid.dtype == bool
    np.testing.assert_array_equal(np.isfinite(decoded.radiance.values), valid)
    assert decoded.radiance.dims == ("y", "x", "channel") and decoded.radiance.shape == (*shape, N_CHANNELS)
    np.testing.assert_array_equal(decoded.wavelength, WAVELENGTH)
    cells = latents.valid_fraction.values
    y, x = shape[0] - 1, shape[1] - 1
    assert cells[-1, -1] == pytest.approx(valid[y - y % 2 :, x - x % 2 :].mean())
    rows = np.arange(shape[0])
    np.testing.assert_array_equal(latents.y, [rows[i : i + 2].mean() for i in rows[::2]])


def test_a_scene_with_the_axes_in_another_order_is_the_same_scene(model: Any) -> None:
    scene = dataset(11, 13)

    expected = encode_scene(model, scene)
    xr.testing.assert_identical(encode_scene(model, scene.transpose("channel", "x", "y")), expected)


def test_an_array_is_a_scene_of_the_models_wavelengths(model: Any) -> None:
    expected = encode_scene(model, dataset(11, 13))

    found = encode_scene(model, radiance(11, 13))
    xr.testing.assert_identical(found, expected)


def test_latents_alone_give_all_samples(model: Any) -> None:
    latents = encode_scene(model, radiance(12, 10))
    decoded = decode_scene(model, latents)

    alone = decode_scene(model, latents.latent.values)

    assert np.isfinite(alone.radiance).all()
    np.testing.assert_array_equal(np.where(latents.valid.values, alone.radiance, np.nan), decoded.radiance)
    np.testing.assert_array_equal(alone.wavelength, WAVELENGTH)


def test_a_granule_opened_lazily(model: Any, write_granule: Any, tmp_path: Path) -> None:
    values = radiance(9, 7)
    geometry = {
        "latitude": np.linspace(40, 41, 63).reshape(9, 7),
        "longitude": np.linspace(-100, -99, 63).reshape(9, 7),
    }
    wavelength = np.broadcast_to(WAVELENGTH, (7, N_CHANNELS))
    path = write_granule(
        tmp_path / "TEMPO_RAD_L1_V03_20240601T150000Z_S006G01.nc",
        values,
        wavelength=wavelength,
        geometry=geometry,
        seconds=1.4e9 + np.arange(9),
    )

    latents = encode_scene(model, open_scene(path))

    np.testing.assert_array_equal(latents.latent, encode_scene(model, values).latent)
    assert latents.attrs["source"] == path.name
    assert latents.latitude.shape == latents.longitude.shape == (5, 4)
    assert latents.latitude.values[0, 0] == pytest.approx(geometry["latitude"][:2, :2].mean(), abs=1e-4)
    assert latents.latitude.values[-1, -1] == pytest.approx(geometry["latitude"][8, 6], abs=1e-4)
    start = np.datetime64("1980-01-06") + np.timedelta64(1_400_000_000, "s")
    np.testing.assert_array_equal(latents.time[:2], start + np.array([500, 2500], "timedelta64[ms]"))
    assert decode_scene(model, latents).wavelength.dims == ("x", "channel")


def test_latents_of_a_file_decode_as_those_in_memory(model: Any, tmp_path: Path) -> None:
    latents = encode_scene(model, dataset(9, 9))
    latents.to_netcdf(tmp_path / "latents.nc", engine="h5netcdf")

    with xr.open_dataset(tmp_path / "latents.nc", engine="h5netcdf") as saved:
        xr.testing.assert_identical(decode_scene(model, saved), decode_scene(model, latents))


# --- places -----------------------------------------------------------------------------------


def test_a_cells_place_at_the_date_line_and_at_the_pole() -> None:
    latitude = np.array([[0.0, 0.0, 89.0, 89.0], [0.0, 0.0, 89.0, 89.0]])
    longitude = np.array([[179.0, -179.0, 0.0, 90.0], [179.0, -179.0, 180.0, -90.0]])
    found = on_grid({"latitude": (("y", "x"), latitude), "longitude": (("y", "x"), longitude)}, 2)

    assert abs(found["longitude"][0, 0]) == pytest.approx(180)
    assert found["latitude"][0, 1] == pytest.approx(90)


def test_a_cells_place_is_that_of_its_known_pixels() -> None:
    latitude = np.array([[10.0, np.nan, np.nan], [10.0, np.nan, np.nan]])
    longitude = np.full((2, 3), 20.0)
    found = on_grid({"latitude": (("y", "x"), latitude), "longitude": (("y", "x"), longitude)}, 2)

    np.testing.assert_allclose(found["latitude"], [[10.0, np.nan]], rtol=1e-6)
    np.testing.assert_allclose(found["longitude"], [[20.0, np.nan]], rtol=1e-6)


def test_time_is_the_mean_of_the_known_rows() -> None:
    time = np.array([1.7e9, 1.7e9 + 1e-3, np.nan, 1.7e9 + 3, np.nan])

    found = on_grid({"time": (("y",), time)}, 2)["time"]
    np.testing.assert_array_equal(found, [1.7e9 + 5e-4, 1.7e9 + 3, np.nan])


# --- refusals ---------------------------------------------------------------------------------


def refused(call: Any, message: str, error: type[Exception] = InputError) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_wavelengths_of_another_band(model: Any) -> None:
    scene = dataset(8, 8).assign_coords(wavelength=("channel", WAVELENGTH + 0.34), name="scene")
    refused(
        lambda: encode_scene(model, scene),
        r"wavelengths \(300.34-302.01 nm\) differ by up to 0.340 nm .* \(300.00-301.67 nm\); at most one channel",
    )
    encode_scene(model, dataset(8, 8).assign_coords(wavelength=("channel", WAVELENGTH + 0.33)))


def test_scenes_that_are_none(model: Any) -> None:
    refused(lambda: encode_scene(model, radiance(8, 8)[..., :5]), "has 5 channels, but the model takes 6")
    refused(lambda: encode_scene(model, dataset(8, 8).isel(channel=slice(5))), "has 5 channels, but the model takes 6")
    refused(lambda: encode_scene(model, radiance(8, 8)[0]), r"shape \(8, 6\); needed: \(y, x, channel\)")
    refused(lambda: encode_scene(model, dataset(8, 8).drop_vars("radiance")), "has no radiance")
    refused(lambda: encode_scene(model, dataset(8, 8).rename(y="lat")), r"has radiance \('lat'")
    refused(lambda: encode_scene(model, dataset(8, 8).drop_vars("wavelength")), "no wavelength")
    refused(lambda: encode_scene(model, radiance(0, 8)), "is empty")


def test_latents_that_are_none(model: Any, tmp_path: Path) -> None:
    latents = encode_scene(model, dataset(9, 9))

    other = load_model(write_tiny(tmp_path / "other", seed=1))
    refused(lambda: decode_scene(other, latents), "was encoded by another model")
    refused(lambda: decode_scene(model, latents.drop_vars("valid")), "lack valid")
    refused(
        lambda: decode_scene(model, latents.isel(latent_channel=slice(2))), "has 2 latent channels, but the model has 3"
    )
    refused(
        lambda: decode_scene(model, latents.isel(y=slice(2))), "a grid of 2 x 5 cells does not fit a scene of 9 x 9"
    )
    refused(lambda: decode_scene(model, latents.assign_attrs(spectralvae_latents=9)), "has format 9")
    refused(lambda: decode_scene(model, latents.latent.values[0]), r"shape \(5, 5\)")
    refused(lambda: decode_scene(model, np.full((3, 4, 4), np.nan, np.float32)), "not finite")


def test_models_that_are_none(model: Any) -> None:
    refused(lambda: encode_scene(tiny_model(), radiance(8, 8)), "is not from load_model", ConfigError)
    refused(lambda: encode_scene(model, radiance(8, 8), batch_size=0), "batch_size: 0 must be at least 1", ConfigError)
    refused(lambda: encode_scene(model, radiance(8, 8), overlap=3), "overlap: 3 must be a multiple of 2", ConfigError)


def test_the_sun_of_the_training_is_the_sun_of_the_latents(tmp_path: Path) -> None:
    limited = load_model(write_tiny(tmp_path / "limited", normalization=tiny_normalization(max_solar_zenith=70.0)))
    zenith = np.full((8, 8), 60.0)
    zenith[:, 5:] = 80.0
    scene = dataset(8, 8, solar_zenith_angle=(("y", "x"), zenith))

    valid = encode_scene(limited, scene).valid.values

    np.testing.assert_array_equal(valid, np.isfinite(scene.radiance) & (zenith <= 70)[..., None])
    refused(lambda: encode_scene(limited, dataset(8, 8)), "has no solar_zenith_angle, but .* at most 70 degrees")


def test_the_range_of_the_training_is_the_range_of_the_latents(tmp_path: Path) -> None:
    limited = load_model(write_tiny(tmp_path / "limited", normalization=tiny_normalization(valid_range=(3.0, 5.0))))

    valid = encode_scene(limited, radiance(8, 8)).valid.values
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(valid, (radiance(8, 8) >= 3) & (radiance(8, 8) <= 5))


# --- what people hand in --------------------------------------------------------------------------


def test_a_data_array_keeps_its_wavelengths_and_dimensions(model: Any) -> None:
    scene = dataset(11, 13)

    found = encode_scene(model, scene.radiance.transpose("channel", "y", "x"))
    np.testing.assert_array_equal(found.latent, encode_scene(model, scene).latent)
    other = scene.assign_coords(wavelength=("channel", WAVELENGTH + 250))
    refused(lambda: encode_scene(model, other.radiance), "differ by up to 250")


def test_masks_and_fills_are_invalid(model: Any) -> None:
    values = np.nan_to_num(radiance(8, 8), nan=3.0)
    values[0, 0], values[1, 1], values[2, 2] = -1e30, 9.969209968386869e36, np.inf
    mask = np.zeros(values.shape, bool)
    mask[3, 3] = True

    valid = encode_scene(model, np.ma.MaskedArray(values, mask)).valid.values

    expected = np.ones((8, 8), bool)
    expected[[0, 1, 2, 3], [0, 1, 2, 3]] = False
    np.testing.assert_array_equal(valid, np.repeat(expected[..., None], N_CHANNELS, axis=2))


def test_units_are_those_of_the_training(tmp_path: Path) -> None:
    measured = load_model(
        write_tiny(tmp_path / "model", normalization=tiny_normalization(units="photons/s/cm^2/nm/sr"))
    )
    scene = dataset(8, 8)
    scene.radiance.attrs["units"] = "W m-2 sr-1 nm-1"

    refused(lambda: encode_scene(measured, scene), "in 'W m-2 sr-1 nm-1', but the model takes 'photons/s/cm")
    scene.radiance.attrs["units"] = "photons/s/cm^2/nm/sr"
    encode_scene(measured, scene)


def test_latents_of_another_normalisation(tmp_path: Path) -> None:
    first = load_model(write_tiny(tmp_path / "first"))
    corrected = tiny_normalization(mean=tiny_normalization().mean + 1)
    second = load_model(write_tiny(tmp_path / "second", normalization=corrected))
    latents = encode_scene(first, radiance(8, 8))

    refused(lambda: decode_scene(second, latents), "with another normalisation")


def test_a_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path / "model"))
    model.train()
    encode_scene(model, radiance(8, 8))
    assert model.training

    wide = AutoencoderKL({"shape": (300, 32, 32), "chs": (256, 256), "z_channels": 2})
    before = [(p.data_ptr(), p.stride()) for p in wide.parameters()], [type(m) for m in wide.modules()]
    Coder(replace(artifact_of(model), model=wide), torch.device("cpu"), overlap=0, batch_size=1, borrowed=True)
    assert ([(p.data_ptr(), p.stride()) for p in wide.parameters()], [type(m) for m in wide.modules()]) == before

    refused(
        lambda: encode_scene(model.half(), radiance(8, 8)), r"weights in torch.float16.*model.float\(\)", ConfigError
    )


def test_latents_with_transposed_masks(model: Any) -> None:
    latents = encode_scene(model, radiance(8, 8))
    turned = latents.transpose("channel", "column", "row", ...)

    np.testing.assert_array_equal(decode_scene(model, turned).radiance, decode_scene(model, latents).radiance)


def test_times_and_places_in_other_forms(model: Any) -> None:
    time = ("y", np.arange(8) * 1.0)
    refused(lambda: encode_scene(model, dataset(8, 8, time=time)), "time is float64; needed: datetime64")
    plain = dataset(8, 6, latitude=("y", np.arange(8.0)), longitude=("x", np.arange(6.0)))

    latents = encode_scene(model, plain)
    np.testing.assert_allclose(latents.latitude[:, 0], [0.5, 2.5, 4.5, 6.5], rtol=1e-4)
    np.testing.assert_allclose(latents.longitude[0], [0.5, 2.5, 4.5], rtol=1e-4)


def test_wavelengths_along_other_dimensions(model: Any) -> None:
    scene = dataset(8, 8).drop_vars("wavelength").assign(wavelength=(("y", "channel"), np.zeros((8, N_CHANNELS))))
    refused(lambda: encode_scene(model, scene), r"wavelength has dimensions \('y', 'channel'\)")


# --- clip, blocks, counts -------------------------------------------------------------------------


def test_the_clip_holds_before_the_network_and_after(tmp_path: Path) -> None:
    narrow = load_model(write_tiny(tmp_path / "narrow", normalization=tiny_normalization(clip=0.05)))
    normalization = tiny_normalization(clip=0.05)
    bounds = [normalization.denormalize(np.full(N_CHANNELS, z)) for z in (-0.05, 0.05)]
    inside = np.clip(radiance(8, 8), *bounds)

    latents = encode_scene(narrow, radiance(8, 8))
    np.testing.assert_allclose(latents.latent, encode_scene(narrow, inside).latent, atol=1e-5)
    huge = decode_scene(narrow, 1e3 * np.ones((3, 4, 4), np.float32)).radiance.values
    assert (huge >= bounds[0] * (1 - 1e-6)).all() and (huge <= bounds[1] * (1 + 1e-6)).all()
    assert (np.isclose(huge, bounds[0]) | np.isclose(huge, bounds[1])).any()


@pytest.mark.parametrize("block", [1, 200, 10**9])
@pytest.mark.parametrize("strip", [2 * 8 * 8 * N_CHANNELS, 10**9])
def test_blocks_and_panels_change_nothing_and_every_sample_is_counted_once(
    model: Any, block: int, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = radiance(21, 37)
    expected = encode_scene(model, scene)
    radiance_expected = decode_scene(model, expected).radiance
    monkeypatch.setattr(latents_module, "BLOCK_SAMPLES", block)
    monkeypatch.setattr(reading_module, "BLOCK_SAMPLES", block)
    monkeypatch.setattr(scenes_module, "LAZY_SAMPLES", block)
    monkeypatch.setattr(coder_module, "STRIP_SAMPLES", strip)
    counts: dict[str, int] = {}
    stream = latents_module.stream_latents
    monkeypatch.setattr(scenes_module, "stream_latents", lambda *given: counts.update(stream(*given)) or counts)

    latents = encode_scene(model, scene)

    np.testing.assert_allclose(latents.latent, expected.latent, atol=1e-5)
    np.testing.assert_array_equal(latents.valid, expected.valid)
    np.testing.assert_allclose(decode_scene(model, latents).radiance, radiance_expected, rtol=1e-4)
    assert sum(counts.values()) == scene.size
    assert counts["nan"] == np.isnan(scene).sum()


def test_a_scene_without_any_valid_sample(model: Any) -> None:
    refused(lambda: encode_scene(model, np.full((8, 8, N_CHANNELS), np.nan)), "none of its 384 samples is valid")


def test_paths_are_no_scenes(model: Any) -> None:
    refused(lambda: encode_scene(model, "granule.nc"), "'granule.nc' is a path: open it with open_scene")
    refused(lambda: decode_scene(model, Path("x.latents.nc")), "is a path: open it with xarray.open_dataset")


def test_cells_of_a_region_lie_where_they_lie_in_the_image(model: Any, write_granule: Any, tmp_path: Path) -> None:
    wavelength = np.broadcast_to(WAVELENGTH, (16, N_CHANNELS))
    path = write_granule(
        tmp_path / "TEMPO_RAD_L1_V03_20240601T150000Z_S006G01.nc", radiance(20, 16), wavelength=wavelength
    )

    latents = encode_scene(model, open_scene(path, region=[5, 14, 3, 11]))

    np.testing.assert_array_equal(latents.y, [5.5, 7.5, 9.5, 11.5, 13])
    np.testing.assert_array_equal(latents.x, [3.5, 5.5, 7.5, 9.5])


def test_statistics_of_the_latents_come_along(tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path / "model", latents=tiny_latents()))

    latents = encode_scene(model, radiance(8, 8))
    np.testing.assert_array_equal(latents.latent_mean, tiny_latents().mean)
    np.testing.assert_array_equal(latents.latent_std, tiny_latents().std)
    assert ((latents.latent - latents.latent_mean) / latents.latent_std).dims == latents.latent.dims
