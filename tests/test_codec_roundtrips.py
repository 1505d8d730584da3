"""Scenes of any size, mask and target through the whole codec, in memory: what hypothesis thinks of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import N_CHANNELS, SETTINGS, tiny_model, tiny_normalization
from torch.nn import functional

from spectralvae.codec.coding import Coded, SceneCoder
from spectralvae.codec.decoding import stream_scene
from spectralvae.codec.layouts import pack_layout, unpack_layout
from spectralvae.codec.rates import Target
from spectralvae.codec.scratch import Scratch
from spectralvae.codec.stages import MARGIN_NETWORK, Bound, Stages
from spectralvae.files.layout import Layout
from spectralvae.files.source import Stored
from spectralvae.inference.coder import Coder
from spectralvae.weights.artifact import Artifact
from spectralvae.weights.normalization import Normalization

FIXED = 300


@pytest.fixture(scope="module")
def coder() -> Coder:
    artifact = Artifact(tiny_model(), SETTINGS, tiny_normalization(), None, Path("model"))
    return Coder(artifact, torch.device("cpu"), overlap=None, batch_size=4)


@st.composite
def scenes(draw: st.DrawFn) -> Any:
    """z: smooth, noisy or wild, with samples, pixels, channels or regions that are not valid."""
    ny, nx = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    y, x, c = np.ogrid[:ny, :nx, :N_CHANNELS]
    z = 2 * np.sin(y / 5 + random.normal()) * np.cos(x / 7) + 0.3 * np.sin(c) * (x / 10)
    z = z + draw(st.sampled_from([0.0, 0.01, 0.3, 3.0])) * random.normal(size=z.shape)
    if draw(st.booleans()):
        wild = random.random(z.shape) < 0.02
        z[wild] = random.normal(0, 15, wild.sum())
    sizes = [(ny, 1, 1), (ny, nx, 1), (1, 1, N_CHANNELS), (ny, nx, N_CHANNELS)]
    for size in draw(st.lists(st.sampled_from(sizes), max_size=2)):
        z = np.where(random.random(size) < draw(st.sampled_from([0.02, 0.5, 0.95])), np.nan, z)
    normalization = tiny_normalization()
    low, high = ((end - normalization.mean) / normalization.std for end in (-85, 85))  # float32 holds exp(88)
    return np.clip(z, low, high).astype(np.float32)


targets = st.one_of(
    st.builds(lambda v: Target("bound", bound=Bound(kind="z", value=v)), st.floats(1e-4, 2.0)),
    st.builds(lambda v: Target("bound", bound=Bound(kind="relative", value=v)), st.floats(1e-3, 0.5)),
    st.builds(lambda v: Target("step", v), st.floats(1e-3, 10.0)),
    st.builds(lambda v: Target("mse", v), st.floats(1e-6, 10.0)),
    st.builds(lambda v: Target("bytes", FIXED + v), st.floats(600, 5000)),
)


def code(z: Any, coder: Coder, target: Target, folder: Path) -> Coded:
    with Scratch(folder, z.shape) as scratch:
        scratch.write(slice(0, z.shape[0]), slice(0, z.shape[1]), z)
        return SceneCoder(scratch, coder, target, FIXED, folder, "scene").code()


def decode(coded: Coded, shape: tuple[int, int, int], coder: Coder, folder: Path) -> Any:
    """Radiance in float64."""
    stages = Stages.model_validate_json(coded.stages.model_dump_json())
    parts = [radiance for _, radiance in stream_scene(stages, coded.blocks, shape, coder, folder)]
    return np.concatenate(parts).astype(np.float64)


def test_round_trips(coder: Coder, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    normalization = coder.normalization
    spread = normalization.std + 1e-8

    @settings(
        max_examples=500 if pytestconfig.getoption("--torture") else 40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(scenes(), targets)
    def check(z: Any, target: Target) -> None:
        if not np.isfinite(z).any():
            return
        coded = code(z, coder, target, tmp_path)
        radiance = decode(coded, z.shape, coder, tmp_path)
        assert np.array_equal(np.isnan(radiance), np.isnan(z))
        found = (np.log(radiance) - normalization.mean) / spread
        error = np.nan_to_num(found - z)
        clipped = np.nan_to_num(found - np.clip(z, -normalization.clip, normalization.clip))
        if target.bound is not None:
            relative = np.abs(np.expm1(error * spread)).max()
            assert (np.abs(error).max() if target.bound.kind == "z" else relative) <= target.bound.value
        elif target.kind == "mse":
            assert np.square(clipped).sum() / np.isfinite(z).sum() <= target.value
        elif target.kind == "bytes":
            assert sum(map(len, coded.blocks.values())) + FIXED <= target.value

    check()


class Pooling(torch.nn.Module):
    """Latents are block means, and a scene is its latents, each 4 x 4 times, up to rounding."""

    embed_dim, scale, rounding = 3, 4, 0.0

    def encode(self, x: Any) -> Any:
        return SimpleNamespace(mean=functional.avg_pool2d(x, 4))

    def decode(self, z: Any) -> Any:
        blocks = functional.interpolate(z, scale_factor=4, mode="nearest")
        return blocks + self.rounding * torch.rand_like(blocks)


@pytest.mark.parametrize("blocks", [True, False])
def test_the_network_is_taken_where_it_serves(blocks: bool, tmp_path: Path) -> None:
    """Squares of one colour are what this network is made for; smooth ramps are not."""
    normalization = Normalization("zscore", np.zeros(3), np.ones(3), 10.0, None, None, np.arange(1.0, 4))
    network: Any = Pooling()
    artifact = Artifact(network, {"shape": [3, 16, 16]}, normalization, None, Path("model"))
    coder = Coder(artifact, torch.device("cpu"), overlap=4, batch_size=4)
    z = np.random.default_rng(1).normal(size=(20, 24, 3)).repeat(4, 0).repeat(4, 1)
    if not blocks:
        z = np.add.outer(np.linspace(-2, 2, 80), np.linspace(-1, 1, 96))[..., None] * [1.0, 0.5, -1.0]
    coded = code(z.astype(np.float32), coder, Target("bound", bound=Bound(kind="z", value=0.05)), tmp_path)
    assert (coded.stages.network_step is not None) == blocks
    if blocks:
        assert 2 * coded.estimated_bytes["network"] < coded.estimated_bytes["components"]
    network.rounding = 0.9 * MARGIN_NETWORK  # as with other threads, layouts or devices
    assert np.abs(decode(coded, z.shape, coder, tmp_path) - z).max() <= 0.05


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(["f4", "f8", "i2", ">f4"]), st.integers(0, 2**32))
def test_coordinates_come_back_byte_by_byte(ny: int, nx: int, dtype: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    latitude = (40 + np.add.outer(np.arange(ny) * 0.02, random.normal(0, 0.01, nx))).astype(dtype)
    variable = Stored("geolocation/latitude", ("y", "x"), dtype.lstrip(">"), {"units": "degrees_north"}, None, latitude)
    radiance = Stored("radiance", ("y", "x", "channel"), "f4", {}, np.float32(np.nan))
    sizes = {"y": ny, "x": nx, "channel": 3}
    layout = Layout((ny, nx, 3), {"": {"title": "a"}}, sizes, radiance, ("y", "x", "channel"), np.nan, (variable,))
    back = unpack_layout(pack_layout(layout))
    (found,) = back.variables
    assert found.values is not None
    assert found.values.tobytes() == latitude.tobytes() and found.values.dtype == latitude.dtype
    assert (back.dimensions, back.groups, found.attributes) == (sizes, layout.groups, variable.attributes)
