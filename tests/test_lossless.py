"""Arrays and back: every bit, the type and the shape, and how small."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from spectralvae.codec.lossless import pack_array, unpack_array
from spectralvae.codec.prediction import pack_table, unpack_table

NUMBERS = [
    *("|b1", "|i1", "|u1", "<i2", ">i2", "<u2", ">u2", "<i4", ">i4", "<u4", ">u4", "<i8", ">i8", "<u8", ">u8"),
    *("<f2", ">f2", "<f4", ">f4", "<f8", ">f8"),
]
OTHERS = ["<c8", ">c16", "|S1", "|S5", "<U3", ">U2", "|V3", "<f16"]


def check(array: NDArray[Any]) -> bytes:
    """The packed array, which is as before when unpacked."""
    data = pack_array(array)
    again = unpack_array(data, array.nbytes)
    assert again.dtype.str == array.dtype.str and again.shape == array.shape
    assert again.tobytes() == array.tobytes()
    assert again.flags.writeable
    return data


def smooth(ny: int, nx: int) -> NDArray[np.float64]:
    """Latitudes as a satellite sees them, more or less."""
    y, x = np.linspace(0, 1, ny)[:, None], np.linspace(0, 1, nx)
    return 60 - 40 * x - 3 * x**2 * y + np.sin(3 * x + y)


# --- any bits ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bits_of_any_type_and_shape(data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(NUMBERS + OTHERS)))
    shape = data.draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    content = data.draw(st.binary(min_size=n_bytes, max_size=n_bytes))
    check(np.ndarray(shape, dtype, content))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(NUMBERS),
    st.integers(0, 2**32),
    st.sampled_from([(400,), (3, 300), (70, 90), (300, 3), (2, 40, 50)]),
)
def test_walks_and_noise_of_any_step(dtype: str, seed: int, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(seed)
    steps = random.integers(-(2 ** random.integers(1, 62)), 2 ** random.integers(1, 62), shape)
    integers = np.cumsum(steps, axis=random.integers(len(shape)))
    integers[random.random(shape) < 0.1 * random.integers(2)] = 2**63 - 1
    width = np.dtype(dtype).itemsize
    bits = integers.astype(f"{dtype[0].replace('|', '=')}u{width}")  # the lowest, in the type's byte order
    check(integers > 0 if dtype == "|b1" else bits.view(dtype))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8"])
def test_all_kinds_of_floats(dtype: str) -> None:
    info, bits = np.finfo(np.dtype(dtype).newbyteorder("=")), f"{dtype[0]}u{np.dtype(dtype).itemsize}"
    ends = [info.tiny, -info.tiny, info.smallest_subnormal, info.max, info.min]
    special = np.array([np.inf, np.nan, -np.inf, -np.nan, 0.0, -0.0, *ends], dtype)
    # other NaN's, signalling ones first
    payloads, signalling = ((special[i : i + 1].view(bits) + np.arange(1, 9)).astype(bits).view(dtype) for i in (1, 0))
    values = np.concatenate([special, payloads, signalling])
    check(values)
    field = smooth(40, 200).astype(dtype)
    field.ravel()[: 20 * len(values)] = np.tile(values, 20)
    check(field)
    check(smooth(40, 200).astype(dtype) - np.array(40, dtype))  # from + to -


def test_shapes_and_layouts_in_memory() -> None:
    for shape in ((), (0,), (3, 0), (0, 3), (1,), (1, 1), (1, 1000), (1000, 1), (5, 1, 7)):
        check(np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape))
        check(np.random.default_rng(0).random(shape))
    field = smooth(60, 80).astype(np.float32)
    for array in (field.T, field[::2, ::-3], np.asfortranarray(field), np.broadcast_to(field[0], (9, 80))):
        check(array)


# --- how small --------------------------------------------------------------------------------


def test_constants_and_small_arrays_cost_nothing_but_the_header() -> None:
    assert len(check(np.full((2000, 3000), np.nan, np.float32))) < 70
    assert len(check(np.array(1.5))) < 60
    assert len(check(np.zeros(0))) < 60
    noise = np.random.default_rng(0).bytes(40)
    assert len(check(np.frombuffer(noise, np.uint8))) < 40 + 60


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<i4", "<f8"])
def test_smooth_fields(dtype: str) -> None:
    field = smooth(60, 1000)
    values = (field * 1e6).astype(dtype) if dtype == "<i4" else field.astype(np.float32).astype(dtype)
    # the rounding of values that are exact but for it, uniform over one unit, has 0 bits of its own
    n_bits = 8 * len(check(values)) / values.size
    assert n_bits < len(zlib.compress(values.tobytes(), 9)) * 8 / values.size / 4
    if dtype != "<f8":
        assert n_bits < 2.5


def test_noise_takes_its_bits_and_repetitions_are_left_to_zlib() -> None:
    random = np.random.default_rng(0)
    for n_bits in (3, 12, 20, 40, 60):
        values = random.integers(0, 2**n_bits, (60, 400))
        assert 8 * len(check(values)) / values.size < n_bits + 1.2
    normal = random.normal(size=(60, 400)).astype(np.float32)
    assert 8 * len(check(normal)) / normal.size < 31
    values = np.tile(random.integers(0, 2**31, 1000), 30)
    assert len(check(values)) < 1.1 * len(zlib.compress(values.tobytes(), 9))


@pytest.mark.parametrize("fill", [-1e30, np.nan])
def test_holes_cost_little(fill: float) -> None:
    field = smooth(40, 600).astype(np.float32)
    whole = len(check(field))
    field[10:20, :60] = field[30:, 200:210] = field[23] = fill
    assert len(check(field)) < 1.15 * whole
    field[:, 5] = field[0] = field[-1] = fill
    check(field)


# --- texts ------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(npst.arrays(object, npst.array_shapes(min_dims=0, min_side=0), elements=st.one_of(st.text(), st.binary())))
def test_texts(texts: NDArray[Any]) -> None:
    again = unpack_array(pack_array(texts), 10**6)
    assert again.dtype == object and again.shape == texts.shape
    assert [*map(repr, again.ravel())] == [*map(repr, texts.ravel())]


def test_texts_of_libraries() -> None:
    texts = np.array([["a", "ü"], ["", "\ud800"]], object)
    assert unpack_array(pack_array(texts), 1000).tolist() == texts.tolist()
    strings = np.array(["a", "", "long " * 10], np.dtypes.StringDType())
    again = unpack_array(pack_array(strings), 1000)
    assert again.dtype == strings.dtype and again.tolist() == strings.tolist()
    with_dtype = np.array(["a"], h5py.string_dtype())
    assert unpack_array(pack_array(with_dtype), 1000).tolist() == ["a"]


# --- damage -----------------------------------------------------------------------------------

WAYS = {"zlib", "bytes", "item", "texts"}
PACKED = {
    "weights": smooth(20, 400).astype(np.float32),
    "hole": np.where(np.random.default_rng(0).random(400) < 0.1, np.nan, smooth(1, 400)[0]),
    "start": np.cumsum(np.random.default_rng(0).integers(-9, 9, 500)),
    "low": np.random.default_rng(0).normal(size=(20, 40)) * 1e300,
    "zlib": np.tile(np.random.default_rng(0).integers(0, 2**31, 60), 30),
    "bytes": np.random.default_rng(0).integers(0, 256, 50, np.uint8),
    "item": np.full((7, 9), 3.25),
    "texts": np.array(["abc", "def", b"g"], object),
}


@pytest.mark.parametrize("name", PACKED)
def test_damage_ends_in_a_value_error_or_another_array(name: str) -> None:
    array, random = PACKED[name], np.random.default_rng(0)
    max_bytes = max(array.nbytes, 1000)
    data = pack_array(array)
    header = json.loads(data.split(b"\n")[0])
    assert header["by"] == name if name in WAYS else header["by"] == "neighbours" and name in header
    unpack_array(data, max_bytes)

    def attempt(damaged: bytes) -> bool:
        tracemalloc.start()
        try:
            again = unpack_array(damaged, max_bytes)
        except ValueError:
            return True
        finally:
            assert tracemalloc.get_traced_memory()[1] < 2**20 + 200 * max_bytes
            tracemalloc.stop()
        assert again.nbytes <= max_bytes
        return False

    n_header = data.index(b"\n") + 1
    positions = [*range(0, n_header, 2), *random.integers(n_header, len(data), 15)]
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << random.integers(8)
        attempt(bytes(damaged))
    for length in {*range(0, len(data), 1 + len(data) // 15), len(data) - 1}:
        assert attempt(data[:length])
    assert attempt(data + b"\0")
    for _ in range(20):
        attempt(random.bytes(200))


def test_larger_than_is_allowed() -> None:
    for array in (*PACKED.values(), np.zeros((2**14, 2**10), np.uint8)):
        data = pack_array(array)
        limit = array.nbytes - 1 if array.dtype != object else 10
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=f"{limit:,}"):
                unpack_array(data, limit)
            assert tracemalloc.get_traced_memory()[1] < 2**18  # not even for the 16 MiB of zeros
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "told"),
    [
        *(({"shape": shape}, "shape") for shape in ([-1, 4], [-8, -1000], [10**30, -1], "ab", [1.5, 2])),
        *(({"shape": shape}, None) for shape in ([8], [8, 500], None)),
        ({"shape": [10**30, 10]}, "1,000,000"),
        *(({"dtype": dtype}, "type") for dtype in ("O", "|O8", "<M8[s]", "<f4,<f4", "f4", "", 4, None, "<f3")),
        ({"dtype": "<c8"}, "complex64"),
        *(({"by": by}, "float32") for by in ("neighbors", None, 1, [])),
        *(({key: value}, "table") for key in ("x", "y") for value in (-1, 4, 10**30, "1", 0.5, None)),
        *(({"low": value}, "table") for value in (-1, 6, 1.5)),
        *(({"unit": value}, "table") for value in (-1, 64, "1")),
        *(({"start": value}, "table") for value in (-1, 2**40 + 1)),
        *(({key: value}, "table") for key in ("hole", "origin") for value in (2**63, -(2**63) - 1, "a", 1.5)),
        *(({"weights": value}, "table") for value in ([1, 2], [2**63] * 17, [0.5] * 17)),
        ({"weights": [1] * 17, "shape": [800, 10]}, "table"),
        *(({key: value}, None) for key, value in (("weights", 3), ("more", 1))),
    ],
)
def test_headers_that_nobody_packed(header: dict[str, Any], told: str | None) -> None:
    line, _, content = pack_array(smooth(8, 1000).astype(np.float32)).partition(b"\n")
    data = json.dumps({**json.loads(line), **header}).encode() + b"\n" + content
    with pytest.raises(ValueError, match=told):
        unpack_array(data, 10**6)


def test_parts_of_other_sizes() -> None:
    """Holes, and lowest bytes, that were packed for a smaller table."""
    big, small = (np.where(np.arange(n) % 90 == 7, 2**62, 3 * np.arange(n))[None] for n in (4000, 800))
    lowest = np.random.default_rng(0).integers(0, 2**55, (1, 4000))
    for table, other, which in ((big, small, 0), (lowest, lowest[:, :800], 1)):
        values, data = pack_table(table)
        parts = [*parts_of(data)]
        parts[which] = parts_of(pack_table(other)[1])[which]
        np.testing.assert_array_equal(unpack_table(values, data, table.shape), table)
        with pytest.raises(ValueError, match=r"of .* bytes"):
            unpack_table(values, np.array([*map(len, parts)], "<u4").tobytes() + b"".join(parts), table.shape)


def parts_of(data: bytes) -> list[bytes]:
    ends = 12 + np.cumsum(np.frombuffer(data[:12], "<u4"))
    return [data[start:end] for start, end in zip([12, *ends], ends, strict=False)]


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\n", b"[]\n", b"{}\n", b"[" * 10_000 + b"\n", b"\xff\n"),
        pack_array(np.zeros(3)).replace(b"{", b"{" + b" " * 20_000),
    ],
)
def test_what_is_no_packed_array(data: bytes) -> None:
    with pytest.raises(ValueError, match="packed"):
        unpack_array(data, 1000)


# --- tables -----------------------------------------------------------------------------------


def test_prediction_against_loops() -> None:
    """Decoded by the docstring's words alone: residuals of 0, so that the table is what the weights say."""
    taps = [(0, dx) for dx in range(1, 5)] + [(1, dx) for dx in range(-3, 4)] + [(2, dx) for dx in range(-2, 3)]
    weights = [int(w) for w in np.random.default_rng(0).integers(-30_000, 30_000, len(taps))] + [90_000]
    shape = (20, 400)
    values, data = pack_table(np.zeros(shape, np.int64))
    assert values == {}
    table = unpack_table({"weights": weights}, data, shape)
    expected: dict[tuple[int, int], int] = {}
    for y in range(shape[0]):
        for x in range(shape[1]):
            near = sum(w * expected.get((y - dy, x - dx), 0) for (dy, dx), w in zip(taps, weights, strict=False))
            expected[y, x] = (near + weights[-1]) // 2**16
    np.testing.assert_array_equal(table, [[expected[y, x] for x in range(shape[1])] for y in range(shape[0])])
    assert len(np.unique(table)) > 3
