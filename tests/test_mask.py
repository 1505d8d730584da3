"""Masks to bytes and back: identity, sizes of what is common, damage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from spectralvae.codec.entropy import IntegerEncoder
from spectralvae.codec.mask import pack_mask, unpack_mask

Bools = NDArray[np.bool_]
Shape = tuple[int, int, int]


def _pack(valid: Bools) -> bytes:
    ny, nx, nc = valid.shape
    return pack_mask(valid, (ny, nx, nc))


def _unpack(data: bytes, shape: Shape) -> Bools:
    rows = list(unpack_mask(data, shape))
    return np.stack(rows) if rows else np.zeros(shape, np.bool_)


def _size(valid: Bools) -> int:
    """Bytes, after a round trip."""
    ny, nx, nc = valid.shape
    data = _pack(valid)
    assert np.array_equal(_unpack(data, (ny, nx, nc)), valid)
    return len(data)


def _entropy(p: float) -> float:
    return float(-p * np.log2(p) - (1 - p) * np.log2(1 - p))


# --- round trips ------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 6), st.integers(1, 20), st.integers(1, 40)),
    shares=st.tuples(*[st.sampled_from([0.0, 0.02, 0.5, 1.0])] * 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_masks_come_back(shape: Shape, shares: tuple[float, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    ny, nx, nc = shape
    valid = np.ones(shape, np.bool_)
    for share, kind in zip(shares, [(ny, nx, nc), (ny, nx, 1), (1, nx, nc), (1, 1, nc)], strict=True):
        valid &= rng.random(kind) >= share
    data = _pack(valid)
    assert np.array_equal(_unpack(data, shape), valid)
    assert data == pack_mask(iter(valid), shape)


@settings(max_examples=50, deadline=None)
@given(npst.arrays(np.bool_, st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))))
def test_any_small_mask_comes_back(valid: Bools) -> None:
    _size(valid)


# --- sizes ------------------------------------------------------------------------------------

SHAPE = (60, 200, 64)


def _pixels(invalid: Bools) -> Bools:
    return np.broadcast_to(~invalid[..., None], SHAPE)


def _disks(rng: np.random.Generator, n: int) -> Bools:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    disks = [(y - rng.uniform(0, 60)) ** 2 + (x - rng.uniform(0, 200)) ** 2 < rng.uniform(4, 30) for _ in range(n)]
    return np.logical_or.reduce(disks)


def test_all_or_nothing() -> None:
    for shape in ((1, 1, 1), SHAPE, (2000, 300, 2)):
        assert _size(np.ones(shape, np.bool_)) < 40
    assert _size(np.zeros(SHAPE, np.bool_)) < 60


def test_patches_and_lines_of_pixels() -> None:
    invalid = _disks(np.random.default_rng(0), 10)
    edges = int(np.count_nonzero(invalid[1:] != invalid[:-1]) + np.count_nonzero(invalid[:, 1:] != invalid[:, :-1]))
    assert 8 * _size(_pixels(invalid)) < 2 * edges + 500  # a chain code has 4 directions
    lines = invalid.copy()
    lines[:, 40] = lines[20] = True
    assert _size(_pixels(lines)) < _size(_pixels(invalid)) + 60


def test_pixels_at_random_and_a_region() -> None:
    invalid = np.random.default_rng(1).random(SHAPE[:2]) < 0.02
    # a pixel that turns valid again must be told as well, though its context makes it cheap
    assert 8 * _size(_pixels(invalid)) < 1.25 * _entropy(0.02) * invalid.size
    assert _size(_pixels(np.broadcast_to(np.arange(SHAPE[1]) < 70, SHAPE[:2]))) < 150


def test_whole_channels_and_some_of_patches() -> None:
    valid = np.ones(SHAPE, np.bool_)
    valid[..., [3, 20, 21, 50]] = False
    alone = _size(valid)
    assert alone < 500
    invalid = _disks(np.random.default_rng(2), 10)
    patches = _size(_pixels(invalid))
    assert _size(valid & _pixels(invalid)) < alone + patches + 500
    band = np.ones(SHAPE, np.bool_)
    band[invalid, 20:40] = False
    assert _size(band) < patches + 600


def test_detector_elements() -> None:
    """The same samples in all rows cost little more than those of one row, at entropy."""
    bad = np.random.default_rng(3).random(SHAPE[1:]) < 0.005
    assert 8 * _size(np.broadcast_to(~bad, SHAPE)) < 2 * _entropy(0.005) * bad.size + 1000


@pytest.mark.parametrize(("share", "more"), [(0.001, 1.25), (0.02, 1.08), (0.5, 1.02)])
def test_samples_at_random(share: float, more: float) -> None:
    valid = np.random.default_rng(4).random(SHAPE) >= share
    assert 8 * _size(valid) < more * _entropy(share) * valid.size


# --- damage -----------------------------------------------------------------------------------


def test_damage_is_told_or_gives_another_mask() -> None:
    rng = np.random.default_rng(6)
    valid = rng.random((8, 20, 30)) > 0.02
    valid[2:5, 3:9] = False
    data, told = _pack(valid), 0
    for at in range(0, len(data) - 8):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        for damaged in (bytes(flipped), data[:at]):
            try:
                assert _unpack(damaged, (8, 20, 30)).shape == valid.shape
            except ValueError:
                told += 1
    assert told > len(data) / 4


def test_what_no_mask_is_made_of_is_refused() -> None:
    good = _pack(np.ones((1, 2, 2), np.bool_))
    for damaged in (b"", good[:3], (1000).to_bytes(4, "little") + good[4:]):
        with pytest.raises(ValueError, match="bytes"):
            _unpack(damaged, (1, 2, 2))
    for value in (-1, 3, 2**40):
        encoder = IntegerEncoder()
        encoder.encode(np.array([value]), np.array([15], np.uint8))
        symbols = encoder.finish()
        with pytest.raises(ValueError, match="0 to 2"):
            _unpack(len(symbols).to_bytes(4, "little") + symbols, (1, 2, 2))


def test_bytes_that_are_left_over_are_refused_before_the_last_row() -> None:
    data = _pack(np.random.default_rng(7).random((3, 4, 5)) > 0.3)
    more, symbols = b"\1\2\3\4" * 4, int.from_bytes(data[:4], "little")
    longer = (symbols + 16).to_bytes(4, "little") + data[4 : 4 + symbols] + more + data[4 + symbols :]
    for damaged in (data + more, longer):
        rows = unpack_mask(damaged, (3, 4, 5))
        assert [next(rows).shape for _ in range(2)] == [(4, 5)] * 2
        with pytest.raises(ValueError, match="left over"):
            next(rows)
