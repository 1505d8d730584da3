"""Rows of integers to bytes and back: identity, sizes against entropies, damage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spectralvae.codec.entropy import IntegerEncoder
from spectralvae.codec.residual import ResidualDecoder, ResidualEncoder


def _encode(values: NDArray[np.int64], valid: NDArray[np.bool_]) -> bytes:
    encoder = ResidualEncoder(*values.shape[1:])
    for row, coded in zip(values, valid, strict=True):
        encoder.encode_row(row, coded)
    return encoder.finish()


def _decode(data: bytes, valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    decoder = ResidualDecoder(data, *valid.shape[1:])
    rows = [decoder.decode_row(coded) for coded in valid]
    decoder.finish()
    return np.stack(rows)


def _laplace(
    rng: np.random.Generator, scale: NDArray[np.float64], shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], float]:
    """Rounded Laplace noise, and how many bits it takes where its scale is known."""
    values = np.rint(rng.laplace(0, np.broadcast_to(scale, shape))).astype(np.int64)
    magnitude = np.abs(values)
    tail = np.exp(-np.maximum(magnitude - 0.5, 0) / scale)
    probability = np.where(magnitude == 0, 1 - np.exp(-0.5 / scale), tail * (1 - np.exp(-1 / scale)) / 2)
    return values, float(-np.log2(probability).sum())


# --- round trips ------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 50)),
    octaves=st.floats(-6, 41),
    spread=st.floats(0, 3),
    share=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_integers_come_back(
    shape: tuple[int, int, int], octaves: float, spread: float, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scale = 2 ** (octaves + spread * rng.standard_normal(shape[1:]))
    values = np.clip(np.rint(rng.laplace(0, scale, shape)), -(2.0**50), 2.0**50).astype(np.int64)
    valid = rng.random(shape) < share
    assert np.array_equal(_decode(_encode(values, valid), valid), np.where(valid, values, 0))


def test_rows_of_many_parts_come_back() -> None:
    rng = np.random.default_rng(0)
    values = np.rint(rng.normal(0, 3, (3, 700, 257))).astype(np.int32)
    valid = rng.random((700, 1)) > np.full((3, 1, 257), 0.02)
    valid[:, 100:300, :40] = False
    assert np.array_equal(_decode(_encode(values, valid), valid), np.where(valid, values, 0))


def test_only_valid_samples_count() -> None:
    """Rows without any take nothing; nor have values that are not valid, nor the integers' type, any say."""
    rng = np.random.default_rng(1)
    values = np.rint(rng.normal(0, 30, (6, 30, 20))).astype(np.int64)
    valid = rng.random(values.shape) > 0.3
    valid[[0, 1, 3]] = False
    kept = valid.any(axis=(1, 2))
    data = _encode(values, valid)
    assert data == _encode(values[kept], valid[kept]) == _encode(np.where(valid, values, 2**40), valid)
    assert data == _encode(values.astype(np.int16), valid) == _encode(values.astype(np.int32), valid)
    assert np.array_equal(_decode(data, valid), np.where(valid, values, 0))
    valid[:] = False
    assert np.array_equal(_decode(_encode(values, valid), valid), np.zeros_like(values))


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 2.0, 50.0, 3000.0])
def test_size_is_near_the_entropy_of_noise_of_known_scale(scale: float) -> None:
    rng = np.random.default_rng(4)
    shape = (32, 192, 96)
    of_channel = np.exp(rng.uniform(-1, 1, 96))
    of_pixel = np.exp(np.sin(np.arange(192) / 20) / 2)[:, None]
    values, bits = _laplace(rng, scale * of_channel * of_pixel, shape)
    valid = np.ones(shape, np.bool_)
    assert 8 * len(_encode(values, valid)) < 1.025 * bits


def test_a_size_that_changes_within_the_scene_is_followed() -> None:
    rng = np.random.default_rng(5)
    shape = (48, 128, 64)
    y, x = np.mgrid[:48, :128]
    scale = np.where((y - 24) ** 2 + (x - 64) ** 2 < 400, 20.0, 1.0)[..., None]
    values, bits = _laplace(rng, scale, shape)
    assert 8 * len(_encode(values, np.ones(shape, np.bool_))) < 1.08 * bits


def test_zeros_cost_nothing_and_what_stands_out_itself_alone() -> None:
    rng = np.random.default_rng(6)
    shape = (20, 100, 60)
    valid = np.ones(shape, np.bool_)
    assert 8 * len(_encode(np.zeros(shape, np.int64), valid)) < 0.01 * valid.size
    values, _ = _laplace(rng, np.array(2.0), shape)
    plain = len(_encode(values, valid))
    places = tuple(rng.integers(0, n, 40) for n in shape)
    values[places] = rng.choice([-1, 1], 40) * 2**40
    assert 8 * (len(_encode(values, valid)) - plain) < 40 * 80
    assert np.array_equal(_decode(_encode(values, valid), valid), values)


def test_what_is_smooth_along_the_slit_is_predicted() -> None:
    rng = np.random.default_rng(7)
    shape = (40, 96, 64)
    noise, bits = _laplace(rng, np.array(4.0), shape)
    pattern = 20 * np.sin(np.arange(96)[:, None] / 8) * np.cos(np.arange(64) / 15)
    values = noise + np.rint(pattern).astype(np.int64)
    valid = np.ones(shape, np.bool_)
    without = 8 * len(_encode(rng.permutation(values.ravel()).reshape(shape), valid))
    assert without > 1.2 * bits
    assert 8 * len(_encode(values, valid)) < 1.06 * bits


# --- damage -----------------------------------------------------------------------------------


def test_damage_is_told_or_gives_other_integers() -> None:
    rng = np.random.default_rng(8)
    values = np.rint(rng.normal(0, 3, (4, 20, 30))).astype(np.int64)
    valid = rng.random(values.shape) > 0.1
    values[~valid] = 0
    data = _encode(values, valid)
    with pytest.raises(ValueError, match="left over"):
        _decode(data + b"\1\2\3\4" * 4, valid)
    told = 0
    for at in range(0, len(data) - 8, 7):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        for damaged in (bytes(flipped), data[:at]):
            try:
                assert not np.array_equal(_decode(damaged, valid), values)
            except ValueError:
                told += 1
    assert told > 0


@pytest.mark.parametrize("mean", [-1, 2**33, 2**61])
def test_a_first_mean_that_cannot_be_is_refused(mean: int) -> None:
    encoder = IntegerEncoder()
    encoder.encode(np.array([mean]), np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="mean magnitude"):
        _decode(encoder.finish(), np.ones((1, 3, 4), np.bool_))
