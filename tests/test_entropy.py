"""Integers to bytes: round trips of any size, exact levels, the rate that theory gives, damage."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from spectralvae.codec.entropy import N_LEVELS, IntegerDecoder, IntegerEncoder, levels_of


def encoded(chunks: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
    encoder = IntegerEncoder()
    for values, levels in chunks:
        encoder.encode(values, levels)
    return encoder.finish()


def assert_comes_back(chunks: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
    data = encoded(chunks)
    decoder = IntegerDecoder(data)
    for values, levels in chunks:
        decoded = decoder.decode(levels)
        assert decoded.dtype == np.int64
        np.testing.assert_array_equal(decoded, values)
    decoder.finish()
    return data


def geometric(rng: np.random.Generator, magnitude: float, n: int) -> tuple[np.ndarray, float]:
    """Two-sided geometric integers with a mean magnitude, and their information content in bits."""
    ratio = (math.sqrt(1 + magnitude**2) - 1) / magnitude
    values = rng.geometric(1 - ratio, n) - rng.geometric(1 - ratio, n)
    bits = -n * math.log2((1 - ratio) / (1 + ratio)) - float(np.abs(values).sum()) * math.log2(ratio)
    return values, bits


def exact_level(total: int, weight: int) -> int:
    """The largest level i with 2^(i / 2 - 7) <= total / weight; 0 where there is none."""
    square = Fraction(total, weight) ** 2
    return max((i for i in range(N_LEVELS) if square >= Fraction(2) ** (i - 14)), default=0)


# --- levels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1, 2, 7, 64, 576, 1001])
def test_levels_change_exactly_at_half_powers_of_two(weight: int) -> None:
    totals = {0, 1, 2, 3}
    for level in range(1, N_LEVELS):
        edge = math.isqrt((weight**2 << level) >> 14)
        totals |= {max(0, edge + i) for i in (-1, 0, 1, 2)}
    ordered = sorted(totals)
    expected = [exact_level(total, weight) for total in ordered]
    together = levels_of(np.array(ordered), weight)
    assert together.dtype == np.uint8
    assert together.tolist() == expected
    # one by one, small totals are looked up in a table
    assert [int(levels_of(np.array([total]), weight)[0]) for total in ordered] == expected


def test_levels_of_the_largest_totals_of_nothing_and_of_any_shape() -> None:
    assert levels_of(np.array([2**62, 2**50, 0]), 3).tolist() == [N_LEVELS - 1, N_LEVELS - 1, 0]
    assert levels_of(np.array([], np.int64), 5).shape == (0,)
    assert levels_of(np.ones((2, 3, 4), np.int64), 5).shape == (2, 3, 4)


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [10.0**i for i in range(-3, 13)])
def test_every_scale_comes_back_at_its_entropy(magnitude: float) -> None:
    rng = np.random.default_rng(0)
    values, bits = geometric(rng, magnitude, 50_000)
    levels = levels_of(np.full(len(values), round(1000 * magnitude)), 1000)
    data = assert_comes_back([(values[i : i + 2000], levels[i : i + 2000]) for i in range(0, len(values), 2000)])
    assert 0.99 * bits - 64 < 8 * len(data) < 1.03 * bits + 800


def test_any_level_codes_any_value() -> None:
    """Of any type, even the smallest one, whose magnitude its own type cannot hold."""
    edges = [0, *(sign * (2**i + j) for i in range(62) for sign in (-1, 1) for j in (-1, 0, 1))]
    arrays = [np.array([edge for edge in edges if abs(edge) < 2**62])]
    for dtype in (np.int8, np.int16, np.int32, np.uint8):
        arrays.append(np.array([np.iinfo(dtype).min, np.iinfo(dtype).max, 0, 1], dtype))
    for level in range(N_LEVELS):
        assert_comes_back([(values, np.full(len(values), level, np.uint8)) for values in arrays])


def test_chunks_of_any_length_and_mixed_levels() -> None:
    rng = np.random.default_rng(1)
    chunks = []
    for n in (0, 1, 0, 2, 1, 1000, 1, 0, 37):
        totals = (10 ** rng.uniform(-2, 9, n)).astype(np.int64)
        chunks.append(((totals * rng.normal(size=n)).astype(np.int64), levels_of(totals, 1)))
    assert_comes_back(chunks)
    assert assert_comes_back([]) == b""
    assert assert_comes_back(2 * [(np.array([], np.int64), np.array([], np.uint8))]) == b""


def test_tables_learn_what_is_not_geometric() -> None:
    """Even numbers alone: one bit less for each, once that is known."""
    values = 2 * np.random.default_rng(2).integers(-3, 4, 40_000)
    levels = levels_of(np.full(len(values), 3), 1)
    data = assert_comes_back([(values[i : i + 500], levels[i : i + 500]) for i in range(0, len(values), 500)])
    assert 8 * len(data) < 1.03 * len(values) * math.log2(7)


def test_levels_are_worth_it() -> None:
    """Two mixed scales cost what each costs by itself."""
    rng = np.random.default_rng(3)
    parts = [geometric(rng, magnitude, 30_000) for magnitude in (0.1, 100.0)]
    order = rng.permutation(60_000)
    values = np.concatenate([values for values, _ in parts])[order]
    levels = levels_of(np.repeat([1, 1000], 30_000)[order], 10)
    data = assert_comes_back([(values[i : i + 1000], levels[i : i + 1000]) for i in range(0, 60_000, 1000)])
    assert 8 * len(data) < 1.03 * sum(bits for _, bits in parts)


# --- damage -----------------------------------------------------------------------------------


def test_damage_is_refused_or_gives_other_integers_of_the_same_number() -> None:
    rng = np.random.default_rng(4)
    totals = (10 ** rng.uniform(-1, 6, 3000)).astype(np.int64)
    values = (totals * rng.standard_cauchy(3000)).astype(np.int64)  # with escapes
    levels = levels_of(totals, 1)
    data = encoded([(values, levels)])
    with pytest.raises(ValueError, match="multiple of 4"):
        IntegerDecoder(data[:-1])
    decoder = IntegerDecoder(data)
    decoder.decode(levels[:1000])
    with pytest.raises(ValueError, match="left over"):
        decoder.finish()
    damaged = [data[: 4 * int(end)] for end in rng.integers(1, len(data) // 4, 50)]
    for position in rng.integers(0, len(data), 150):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    damaged += [rng.bytes(400) for _ in range(50)]
    n_refused = 0
    for some in damaged:
        decoder = IntegerDecoder(some)
        try:
            decoded = decoder.decode(levels)
            decoder.finish()
        except ValueError:
            n_refused += 1
        else:
            assert decoded.shape == values.shape
            assert (decoded != values).any()
    assert n_refused > 100
