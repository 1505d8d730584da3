"""encode_scene and decode_scene: scenes and latents in memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from inferring import WAVELENGTH
from refusals import refused
from tiny import N_CHANNELS, tiny_latents, tiny_model, tiny_normalization, write_tiny

from spectralvae import AutoencoderKL, decode_scene, encode_scene, load_model, open_scene
from spectralvae.errors import ConfigError, InputError
from spectralvae.inference import latents as latents_module
from spectralvae.inference import scenes as scenes_module
from spectralvae.inference.coder import Coder
from spectralvae.inference.latents import on_grid
from spectralvae.weights.loading import artifact_of


def radiance(ny: int, nx: int, seed: int = 0) -> Any:
    """Within the range of the tiny normalisation; positive, some invalid."""
    values = np.exp(np.random.default_rng(seed).normal(1.5, 0.3, (ny, nx, N_CHANNELS))).astype(np.float32)
    values[values < 2.0] = np.nan
    return values


def dataset(ny: int, nx: int, **more: Any) -> xr.Dataset:
    return xr.Dataset(
        {"radiance": (("y", "x", "channel"), radiance(ny, nx))}, {"wavelength": ("channel", WAVELENGTH), **more}
    )


def test_one_tile_is_what_the_network_makes_of_it(network: Any) -> None:
    scene = radiance(8, 8)
    z = tiny_normalization().normalize(scene)
    x = torch.from_numpy(np.nan_to_num(z)).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        posterior = tiny_model().eval().encode(x)
        x_hat = tiny_model().eval().decode(posterior.mode())[0].permute(1, 2, 0).numpy()

    latents = encode_scene(network, scene, log_variance=True)
    decoded = decode_scene(network, latents)

    np.testing.assert_allclose(latents.latent.values, posterior.mean[0], atol=1e-6)
    np.testing.assert_allclose(latents.log_variance.values, posterior.logvar[0], atol=1e-6)
    expected = tiny_normalization().denormalize(x_hat)
    np.testing.assert_allclose(decoded.radiance.values, np.where(np.isnan(z), np.nan, expected), rtol=1e-5)
    alone = decode_scene(network, latents.latent.values)
    np.testing.assert_allclose(alone.radiance.values, expected, rtol=1e-5)
    np.testing.assert_array_equal(alone.wavelength, WAVELENGTH)


@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (1, 30), (23, 19), (3, 40), (16, 9)], ids=str)
def test_shapes_and_masks_come_back(network: Any, shape: tuple[int, int]) -> None:
    scene = dataset(*shape)
    latents = encode_scene(network, scene)
    decoded = decode_scene(network, latents)

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


def test_other_forms_of_a_scene_and_of_latents(network: Any) -> None:
    scene = dataset(11, 13)
    expected = encode_scene(network, scene)
    for form in (scene.transpose("channel", "x", "y"), scene.radiance.transpose("channel", "y", "x"), radiance(11, 13)):
        xr.testing.assert_identical(encode_scene(network, form), expected)

    turned = expected.transpose("channel", "column", "row", ...)
    np.testing.assert_array_equal(decode_scene(network, turned).radiance, decode_scene(network, expected).radiance)


def test_a_granule_opened_lazily(network: Any, make: Any, tmp_path: Path) -> None:
    path = make("scene.nc", 9, 7)
    latents = encode_scene(network, open_scene(path))
    np.testing.assert_array_equal(latents.latent, encode_scene(network, open_scene(path).radiance.values).latent)
    assert latents.attrs["source"] == path.name
    assert decode_scene(network, latents).wavelength.dims == ("x", "channel")
    part = encode_scene(network, open_scene(path, region=[2, 9, 3, 7]))
    np.testing.assert_array_equal(part.y, [2.5, 4.5, 6.5, 8])
    np.testing.assert_array_equal(part.x, [3.5, 5.5])

    flagged = load_model(write_tiny(tmp_path / "flags", normalization=tiny_normalization(flag_bits=(3,))))
    with refused(InputError, "[3]", key="scene", path=path.name):
        encode_scene(flagged, open_scene(path))


def test_a_cells_place_and_time_are_those_of_its_known_pixels() -> None:
    """At the date line and at the pole, too."""
    latitude = np.array([[0.0, 0.0, 89.0, 89.0, 10.0, np.nan, np.nan]] * 2)
    longitude = np.array([[179.0, -179.0, 0.0, 90.0, 20, 20, 20], [179.0, -179.0, 180.0, -90.0, 20, 20, 20]])
    time = np.array([1.7e9, 1.7e9 + 1e-3, np.nan, 1.7e9 + 3, np.nan])
    places = {"latitude": (("y", "x"), latitude), "longitude": (("y", "x"), longitude)}
    found = on_grid({**places, "time": (("y",), time)}, 2)

    np.testing.assert_allclose(found["latitude"], [[0, 90, 10, np.nan]], rtol=1e-6, atol=1e-4)
    assert abs(found["longitude"][0, 0]) == pytest.approx(180)
    np.testing.assert_allclose(found["longitude"][0, 2:], [20, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(found["time"], [1.7e9 + 5e-4, 1.7e9 + 3, np.nan])


# --- refusals ---------------------------------------------------------------------------------


def shifted(by: float) -> xr.Dataset:
    return dataset(8, 8).assign_coords(wavelength=("channel", WAVELENGTH + by))


NOT_SCENES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "another band": (lambda: shifted(0.34), ("300.34", "0.340", "0.333")),
    "an array of few channels": (lambda: radiance(8, 8)[..., :5], ("5", "6")),
    "few channels": (lambda: dataset(8, 8).isel(channel=slice(5)), ("5", "6")),
    "two axes": (lambda: radiance(8, 8)[0], ("(8, 6)",)),
    "no radiance": (lambda: dataset(8, 8).drop_vars("radiance"), ("radiance",)),
    "other axes": (lambda: dataset(8, 8).rename(y="lat"), ("'lat'",)),
    "no wavelength": (lambda: dataset(8, 8).drop_vars("wavelength"), ("wavelength",)),
    "wavelengths along y": (
        lambda: dataset(8, 8).assign_coords(wavelength=(("y", "channel"), np.zeros((8, N_CHANNELS)))),
        ("('y', 'channel')",),
    ),
    "empty": (lambda: radiance(0, 8), ("(0, 8, 6)",)),
    "nothing valid": (lambda: np.full((8, 8, N_CHANNELS), np.nan), ("384",)),
    "times as numbers": (lambda: dataset(8, 8, time=("y", np.arange(8.0))), ("float64",)),
    "a path": (lambda: "granule.nc", ("'granule.nc'", "open_scene")),
}


@pytest.mark.parametrize("name", NOT_SCENES)
def test_scenes_that_are_none(network: Any, name: str) -> None:
    make, words = NOT_SCENES[name]
    with refused(InputError, *words, key="scene"):
        encode_scene(network, make())


def test_a_scene_of_a_file_is_refused_by_its_name_and_within_a_channel_it_is_taken(network: Any) -> None:
    with refused(InputError, key="scene", path="other.nc"):
        encode_scene(network, shifted(0.34).assign_attrs(source="other.nc"))
    encode_scene(network, shifted(0.33))
    with refused(ConfigError, "scene.wavelength: 5 of 5 ") as error:
        encode_scene(network, dataset(8, 8).assign_coords(wavelength=("channel", WAVELENGTH[::-1])))
    assert error.value.path is None


NOT_LATENTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no mask": (lambda latents: latents.drop_vars("valid"), ("valid",)),
    "a mask of other axes": (lambda latents: latents.rename(row="line"), ("'line'",)),
    "few channels": (lambda latents: latents.isel(latent_channel=slice(2)), ("2", "3")),
    "few cells": (lambda latents: latents.isel(y=slice(2)), ("2 x 5", "9 x 9")),
    "another format": (lambda latents: latents.assign_attrs(spectralvae_latents=9), ("9",)),
    "two axes": (lambda latents: latents.latent.values[0], ("(5, 5)",)),
    "a DataArray": (lambda latents: latents.latent, ("DataArray",)),
    "a path": (lambda latents: Path("x.latents.nc"), ("'x.latents.nc'", "open_dataset")),
}


@pytest.mark.parametrize("name", NOT_LATENTS)
def test_latents_that_are_none(network: Any, name: str) -> None:
    change, words = NOT_LATENTS[name]
    with refused(InputError, *words, key="latents"):
        decode_scene(network, change(encode_scene(network, dataset(9, 9))))


def test_latents_of_another_normalisation_or_none(network: Any, tmp_path: Path) -> None:
    corrected = tiny_normalization(mean=tiny_normalization().mean + 1)
    other = load_model(write_tiny(tmp_path / "other", normalization=corrected))
    with refused(InputError, "SHA-256", "normalisation", key="latents"):
        decode_scene(other, encode_scene(network, dataset(9, 9)))
    with refused(InputError, "finite", path=artifact_of(network).path):
        decode_scene(network, np.full((3, 4, 4), np.nan, np.float32))


def test_models_and_arguments_that_are_none(network: Any) -> None:
    with refused(ConfigError, "load_model"):
        encode_scene(tiny_model(), radiance(8, 8))
    with refused(ConfigError, key="batch_size", value=0):
        encode_scene(network, radiance(8, 8), batch_size=0)


def test_limits_of_the_training_are_those_of_the_latents(tmp_path: Path) -> None:
    """Of the sun, of the radiance, and its units."""
    changes = {"max_solar_zenith": 70.0, "valid_range": (3.0, 5.0), "units": "photons/s/cm^2/nm/sr"}
    limited = load_model(write_tiny(tmp_path / "limited", normalization=tiny_normalization(**changes)))
    zenith = np.full((8, 8), 60.0)
    zenith[:, 5:] = 80.0
    scene = dataset(8, 8, solar_zenith_angle=(("y", "x"), zenith))
    for units, fits in ((None, True), ("photons/s/cm^2/nm/sr", True), ("W m-2 sr-1 nm-1", False)):
        scene.radiance.attrs["units"] = units
        with nullcontext() if fits else refused(InputError, repr(units), repr(changes["units"]), key="scene"):
            valid = encode_scene(limited, scene).valid.values
            with np.errstate(invalid="ignore"):
                expected = (radiance(8, 8) >= 3) & (radiance(8, 8) <= 5) & (zenith <= 70)[..., None]
            np.testing.assert_array_equal(valid, expected)
    with refused(InputError, "solar_zenith_angle", "70", key="scene"):
        encode_scene(limited, dataset(8, 8))


# --- what people hand in --------------------------------------------------------------------------


def test_masks_and_fills_are_invalid(network: Any) -> None:
    values = np.nan_to_num(radiance(8, 8), nan=3.0)
    values[0, 0], values[1, 1], values[2, 2] = -1e30, 9.969209968386869e36, np.inf
    mask = np.zeros(values.shape, bool)
    mask[3, 3] = True

    valid = encode_scene(network, np.ma.MaskedArray(values, mask)).valid.values

    expected = np.ones((8, 8), bool)
    expected[[0, 1, 2, 3], [0, 1, 2, 3]] = False
    np.testing.assert_array_equal(valid, np.repeat(expected[..., None], N_CHANNELS, axis=2))


def test_a_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path / "model", latents=tiny_latents()))
    model.train()
    latents = encode_scene(model, radiance(8, 8))
    assert model.training
    np.testing.assert_array_equal(latents.latent_mean, tiny_latents().mean)
    np.testing.assert_array_equal(latents.latent_std, tiny_latents().std)

    wide = AutoencoderKL({"shape": (300, 32, 32), "chs": (256, 256), "z_channels": 2})
    before = [(p.data_ptr(), p.stride()) for p in wide.parameters()], [type(m) for m in wide.modules()]
    Coder(replace(artifact_of(model), model=wide), torch.device("cpu"), overlap=0, batch_size=1, borrowed=True)
    assert ([(p.data_ptr(), p.stride()) for p in wide.parameters()], [type(m) for m in wide.modules()]) == before

    with refused(ConfigError, "torch.float16", key="model", path=artifact_of(model).path):
        encode_scene(model.half(), radiance(8, 8))


def test_places_along_one_axis(network: Any) -> None:
    plain = dataset(8, 6, latitude=("y", np.arange(8.0)), longitude=("x", np.arange(6.0)))

    latents = encode_scene(network, plain)
    np.testing.assert_allclose(latents.latitude[:, 0], [0.5, 2.5, 4.5, 6.5], rtol=1e-4)
    np.testing.assert_allclose(latents.longitude[0], [0.5, 2.5, 4.5], rtol=1e-4)


# --- clip and blocks ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("block", [1, 200])
def test_blocks_change_nothing(network: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = radiance(21, 37)
    expected = encode_scene(network, scene)
    decoded = decode_scene(network, expected)
    monkeypatch.setattr(latents_module, "BLOCK_SAMPLES", block)
    monkeypatch.setattr(scenes_module, "LAZY_SAMPLES", block)
    latents = encode_scene(network, scene)
    xr.testing.assert_identical(latents, expected)
    xr.testing.assert_identical(decode_scene(network, latents), decoded)
