"""z that encode reads: against all of the scene, read and normalised at once, and how often each chunk is inflated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from tiny import N_CHANNELS, tiny_normalization, write_tiny
from zlib_ng import zlib_ng

from spectralvae import encode_scene, load_model, open_scene
from spectralvae.inference import reading
from spectralvae.readers import open_reader

NORMALIZATION = tiny_normalization()
WIDTH = 30
PANELS = [slice(0, 16), slice(11, 30)]  # the second begins within the first


@pytest.fixture
def inflated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a chunk is inflated."""
    found: list[int] = []
    original = zlib_ng.decompressobj
    monkeypatch.setattr(zlib_ng, "decompressobj", lambda *given: (found.append(1), original(*given))[1])
    return found


def write(path: Path, ny: int, chunks: tuple[int, ...]) -> Any:
    """A scene of chunks; returns its radiance (y, x, channel), some of it NaN or too small."""
    random = np.random.default_rng(0)
    values = np.exp(random.normal(1.5, 0.5, (ny, WIDTH, N_CHANNELS))).astype(np.float32)
    values[random.random(values.shape) < 0.1] = np.nan
    scene = xr.Dataset(
        {"radiance": (("y", "x", "channel"), values)},
        {"wavelength": ("channel", NORMALIZATION.wavelength, {"units": "nm"})},
    )
    encoding = {"chunksizes": chunks, "zlib": True, "_FillValue": None}
    scene.to_netcdf(path, engine="h5netcdf", encoding={"radiance": encoding})
    return values


def strips(ny: int) -> list[slice]:
    """Rows as a coder asks for them."""
    return [slice(top, min(top + 4, ny)) for top in range(0, ny, 4)]


@pytest.mark.parametrize("block", [1, 500, 10**6])
@pytest.mark.parametrize("chunks", [(7, 10, 2), (1, 30, 6), (5, 30, 6), (23, 6, 3), (3, 4, 6)], ids=str)
def test_no_chunk_is_inflated_twice(
    chunks: tuple[int, ...],
    block: int,
    inflated: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "BLOCK_SAMPLES", block)
    values = write(tmp_path / "scene.nc", 23, chunks)
    counts: dict[str, int] = {}
    with open_reader(tmp_path / "scene.nc") as scene:
        read = reading.z_reader(scene, NORMALIZATION, counts)
        z = np.concatenate([read(rows, slice(0, WIDTH)) for rows in strips(23)])

    np.testing.assert_array_equal(z, NORMALIZATION.normalize(values).astype(np.float32))
    assert z.dtype == np.float32
    assert len(inflated) == np.prod([-(-n // chunk) for n, chunk in zip(values.shape, chunks, strict=True)])
    rejected = {"nan": np.isnan(values).sum(), "below_min_radiance": (values < NORMALIZATION.min_radiance).sum()}
    assert {rule: n for rule, n in counts.items() if n} == rejected


def test_panels_of_a_region(inflated: list[int], tmp_path: Path) -> None:
    """Each sample counts once; what both panels need is inflated by both."""
    values = write(tmp_path / "scene.nc", 30, (7, 9, 6))[4:27]
    counts: dict[str, int] = {}
    with open_reader(tmp_path / "scene.nc", region=[4, 27, 0, 30]) as scene:
        read = reading.z_reader(scene, NORMALIZATION, counts)
        found = {panel.start: np.concatenate([read(rows, panel) for rows in strips(23)]) for panel in PANELS}

    for panel in PANELS:
        np.testing.assert_array_equal(found[panel.start], NORMALIZATION.normalize(values[:, panel]).astype(np.float32))
    assert counts["nan"] == np.isnan(values).sum()
    assert counts["below_min_radiance"] == (values < NORMALIZATION.min_radiance).sum()
    # The second panel reads the second chunk of a row twice: what the first panel has counted, and the rest.
    assert len(inflated) == 4 * (1 + 3 + 1 + 1)


def test_of_tall_chunks_no_more_is_kept_than_may_be(
    inflated: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a scene in chunks as high as it: these are inflated several times."""
    monkeypatch.setattr(reading, "BAND_SAMPLES", reading.TALL_SHARE * 8 * WIDTH * N_CHANNELS)
    values = write(tmp_path / "scene.nc", 48, (48, 10, 6))
    with open_reader(tmp_path / "scene.nc") as scene:
        read = reading.z_reader(scene, NORMALIZATION, {})
        z = np.concatenate([read(rows, slice(0, WIDTH)) for rows in strips(48)])

    np.testing.assert_array_equal(z, NORMALIZATION.normalize(values).astype(np.float32))
    assert len(inflated) == 3 * 6  # 48 rows, 8 at a time


def test_a_lazily_opened_scene(inflated: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are asked for many at a time, as open_scene reads them."""
    monkeypatch.setattr(reading, "BLOCK_SAMPLES", 1)
    model = load_model(write_tiny(tmp_path / "model"))
    values = write(tmp_path / "scene.nc", 23, (5, 30, 6))

    latents = encode_scene(model, open_scene(tmp_path / "scene.nc"))

    assert len(inflated) == 5
    np.testing.assert_array_equal(latents.latent, encode_scene(model, values).latent)


def test_an_array_stays_as_it_is(tmp_path: Path) -> None:
    """Its fill becomes NaN in a copy."""
    values = np.full((8, 8, N_CHANNELS), 5, dtype=np.float32)
    values[0, 0, 0] = -1e30
    given = values.copy()
    encode_scene(load_model(write_tiny(tmp_path / "model")), given)
    np.testing.assert_array_equal(given, values)
