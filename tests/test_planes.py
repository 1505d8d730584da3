"""Stacks of images at one step: what comes back, what it costs against theory, damage; and holes that cost little."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as npst

from spectralvae.codec.entropy import IntegerEncoder, levels_of
from spectralvae.codec.planes import decode_planes, encode_planes, fill_invalid
from spectralvae.codec.wavelet import forward, n_levels_of


def smooth(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Random fields with a spectrum like 1 / frequency^2, of standard deviation 1."""
    noise = np.fft.rfft2(np.random.default_rng(seed).normal(size=shape))
    y, x = np.fft.fftfreq(shape[1])[:, None], np.fft.rfftfreq(shape[2])
    fields = np.fft.irfft2(noise / (1e-4 + y**2 + x**2), shape[1:])
    return np.asarray(fields / fields.std((1, 2), keepdims=True))


def coded(images: np.ndarray, step: float) -> tuple[int, np.ndarray]:
    """How many bytes, and what comes back, which is what the encoder said."""
    data, told = encode_planes(images, step)
    decoded = decode_planes(data, images.shape, step)
    assert decoded.dtype == np.float64 and decoded.shape == images.shape
    np.testing.assert_array_equal(decoded, told)
    return len(data), decoded


def entropy_bytes(integers: np.ndarray) -> float:
    """Of integers without any model of them, each image by itself."""
    total = 0.0
    for image in integers:
        _, counts = np.unique(image, return_counts=True)
        total -= float((counts * np.log2(counts / image.size)).sum()) / 8
    return total


# --- what comes back --------------------------------------------------------------------------


def test_every_size_comes_back() -> None:
    rng = np.random.default_rng(0)
    for n, n_y, n_x in [(1, y, x) for y in range(1, 8) for x in range(1, 8)] + [(3, 40, 1), (2, 1, 70), (5, 33, 18)]:
        images = rng.normal(size=(n, n_y, n_x)) * 10
        _, decoded = coded(images, 0.1)
        assert np.abs(decoded - images).max() < 0.5  # a few steps at the very worst
        assert n * n_y * n_x < 100 or 0.05 < ((decoded - images) ** 2).mean() / 0.1**2 < 0.125
    assert coded(np.zeros((0, 20, 30)), 1.0)[0] == 1


@pytest.mark.parametrize("scale", [1e-3, 0.2, 0.5, 1, 3, 10, 100, 1e6, 1e9])
def test_error_and_size_of_noise(scale: float) -> None:
    """step^2 / 12 and the filters' few percent where all is coded, and at its entropy; the noise where nothing is."""
    images = scale * np.random.default_rng(1).normal(size=(2, 128, 128))
    size, decoded = coded(images, 1.0)
    error = ((decoded - images) ** 2).mean()
    assert error <= min(1 / 8, 1.02 * scale**2)
    if scale >= 10:
        assert error == pytest.approx(1 / 12, rel=0.08)
    if scale >= 3:  # there is nothing to predict
        assert 8 * size == pytest.approx(images.size * math.log2(scale * math.sqrt(2 * math.pi * math.e)), rel=0.03)


@pytest.mark.parametrize("step", [0.05, 0.3, 1.0])
def test_intervals_have_their_centres_of_mass_on_the_integers(step: float) -> None:
    """Rounding as usual, magnitudes of sparse coefficients would be too large by an eighth of a step on average."""
    images = smooth((3, 200, 200))
    n_levels = n_levels_of(200, 200)
    excess, rounded_excess = [], []
    for (_, true), (_, decoded) in zip(
        forward(images, n_levels), forward(coded(images, step)[1], n_levels), strict=True
    ):
        magnitudes, integers = np.abs(true) / step, np.rint(np.abs(decoded) / step)
        excess.append((integers - magnitudes)[integers == 1])
        rounded_excess.append((1 - magnitudes)[np.rint(magnitudes) == 1])
    assert np.concatenate(rounded_excess).mean() > 0.08
    assert abs(np.concatenate(excess).mean()) < 0.04


def test_neither_units_nor_layout_in_memory_matter() -> None:
    """Images and step, both by a power of two: the same bytes, and the same images by this power."""
    images = smooth((4, 31, 42))
    data, decoded = encode_planes(images, 0.25)
    along_channels = np.ascontiguousarray(images.transpose(1, 2, 0)).transpose(2, 0, 1)
    for same in (np.asfortranarray(images), np.repeat(images, 2, 2)[..., ::2], along_channels):
        data_again, decoded_again = encode_planes(same, 0.25)
        assert data_again == data
        np.testing.assert_array_equal(decoded_again, decoded)
    data_scaled, decoded_scaled = encode_planes(images * 1024, 256)
    assert data_scaled == data
    np.testing.assert_array_equal(decoded * 1024, decoded_scaled)


# --- what it costs ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.003, 0.03, 0.3])
def test_smooth_images_cost_far_less_than_their_pixels(step: float) -> None:
    """Beside uniform quantisation of the pixels with the same mean squared error, at its entropy."""
    images = smooth((3, 100, 140))
    size, decoded = coded(images, step)
    pixel_step = math.sqrt(12 * ((decoded - images) ** 2).mean())
    assert size < 0.7 * entropy_bytes(np.rint(images / pixel_step))


def test_levels_follow_where_something_is_and_the_scale_of_each_image() -> None:
    noise = 100 * np.random.default_rng(3).normal(size=(1, 128, 256))
    half = noise * np.where(np.arange(256) < 128, 1, 1e-4)
    assert coded(half, 1.0)[0] < 0.53 * coded(noise, 1.0)[0]
    scales = np.array([1, 30, 1000])[:, None, None]
    images = scales * np.random.default_rng(4).normal(size=(3, 128, 128))
    apart = sum(coded(images[i : i + 1], 1.0)[0] for i in range(3))
    assert coded(images, 1.0)[0] < 1.01 * apart


def test_what_is_empty_costs_next_to_nothing() -> None:
    image = 10 * smooth((1, 64, 64))
    stack = np.concatenate([np.zeros((20, 64, 64)), image, 1e-3 * smooth((20, 64, 64))])
    assert coded(stack, 0.5)[0] <= coded(image, 0.5)[0] + 60  # 41 images with 13 subbands each
    assert coded(np.zeros((64, 131, 300)), 1.0)[0] <= 9
    slope = np.linspace(-50, 50, 256)[None, :, None] + np.linspace(-20, 20, 256)  # in the coarsest subband
    assert coded(slope, 1.0)[0] < 500  # of 65,536 pixels


@pytest.mark.parametrize("scale", [2.0, 10.0, 300.0])
def test_noise_is_coded_as_it_is(scale: float) -> None:
    """At the entropy of what is rounded (Gish and Pierce 1968), and only where pixels count."""
    rng = np.random.default_rng(0)
    images, valid = scale * rng.normal(size=(4, 128, 256)), rng.random((128, 256)) < 0.5
    data, told = encode_planes(np.where(valid, images, 0.0), 1.0, valid)
    assert np.array_equal(decode_planes(data, images.shape, 1.0, valid), told)
    assert (told[:, ~valid] == 0).all()
    squared = np.square(told - images)[:, valid].mean()
    assert squared < 1.1 / 12
    bits = 8 * len(data) / (4 * valid.sum())
    assert bits == pytest.approx(np.log2(scale * np.sqrt(2 * np.pi * np.e)) - np.log2(12 * squared) / 2, abs=0.05)


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**41])
def test_values_beyond_the_coder_are_refused(bad: float) -> None:
    images = np.zeros((2, 5, 5))
    images[1, 2, 3] = bad
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=r"0\.25"):
        encode_planes(images, 0.25)


def forged(size: int, value: int, rest: tuple[int, ...] = (), way: bytes = b"w") -> bytes:
    """One image of one pixel, the mean of whose magnitudes is called ``size``; and a rest that it has no use for."""
    encoder = IntegerEncoder()
    encoder.encode(np.array([size]), levels_of(np.array([64]), 1) if way == b"p" else levels_of(np.array([1]), 8))
    encoder.encode(np.array([value]), levels_of(np.array([0]), 1))
    encoder.encode(np.array(rest, np.int64), np.zeros(len(rest), np.uint8))
    return way + encoder.finish()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        *((forged(size, 7), "size") for size in (-1, 100, 2**40)),
        *((forged(1, value), "too large") for value in (2**41, -(2**41), 2**61)),
        (forged(1, 7, (1000, 1000)), "left over"),
        (forged(-1, 7, way=b"p"), "negative"),
        (forged(1, 7, way=b"x"), "b'x'"),
    ],
)
def test_forged_bytes_are_refused(data: bytes, told: str) -> None:
    assert decode_planes(forged(1, 7), (1, 1, 1), 0.5).tolist() == [[[3.5]]]
    with pytest.raises(ValueError, match=told):
        decode_planes(data, (1, 1, 1), 0.5)


def test_damage_is_refused_or_gives_other_images_of_the_same_shape() -> None:
    images = 10 * smooth((3, 12, 16))
    data, told = encode_planes(images, 0.1)
    rng = np.random.default_rng(6)
    damaged = [data[: 1 + 4 * int(end)] for end in rng.integers(1, len(data) // 4, 20)]
    for position in rng.integers(0, len(data), 40):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    n_refused = 0
    for some in damaged:
        try:
            decoded = decode_planes(some, images.shape, 0.1)
        except ValueError:
            n_refused += 1
        else:
            assert decoded.shape == images.shape and (decoded != told).any()
    assert n_refused > 20


# --- holes ------------------------------------------------------------------------------------


def holes(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Valid pixels: all but a disc, single ones, and the first rows."""
    y, x = np.indices(shape)
    disc = (y - shape[0] / 2) ** 2 + (x - shape[1] / 3) ** 2 < (shape[0] / 5) ** 2
    return ~disc & (np.random.default_rng(seed).random(shape) > 0.02) & (y > 2)


@settings(max_examples=150, deadline=None)
@given(npst.arrays(np.bool_, npst.array_shapes(min_dims=2, max_dims=2, max_side=14)))
def test_valid_pixels_stay_and_the_others_lie_between_them(valid: np.ndarray) -> None:
    """So a constant stays constant; without valid pixels, all is 0."""
    images = 5 + np.random.default_rng(0).normal(size=(2, *valid.shape))
    wild = np.where(valid, images, 1e30)
    before = wild.copy()
    filled = fill_invalid(wild, valid)
    np.testing.assert_array_equal(wild, before)
    np.testing.assert_array_equal(filled[:, valid], images[:, valid])
    for given_pixels, full in zip(images[:, valid], filled, strict=True):
        low, high = (given_pixels.min(), given_pixels.max()) if valid.any() else (0, 0)
        assert low - 1e-12 <= full.min() <= full.max() <= high + 1e-12


def test_a_slope_goes_on_through_a_hole() -> None:
    y, x = np.indices((40, 40), float)
    valid = (np.abs(y - 20) > 6) | (np.abs(x - 20) > 6)
    filled = fill_invalid((y + 2 * x)[None], valid)[0]
    assert np.abs(filled - y - 2 * x).max() < 4  # of 36 across the hole


@pytest.mark.parametrize("step", [0.01, 0.1])
def test_holes_cost_little(step: float) -> None:
    images, valid = 5 + smooth((2, 100, 140)), holes((100, 140))
    whole = coded(images, step)[0]
    assert coded(fill_invalid(images, valid), step)[0] < 1.1 * whole
    assert coded(np.where(valid, images, 0.0), step)[0] > 1.3 * whole  # and with zeros instead they would not
