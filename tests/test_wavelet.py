"""The wavelet: published filters, convolution, vanishing moments, perfect reconstruction of any size."""

from __future__ import annotations

import numpy as np
import pytest

from spectralvae.codec.wavelet import Subband, forward, inverse, n_levels_of, subband_sizes

# Analysis filters from their middle on, as in Antonini et al., "Image coding using wavelet transform" (1992), table I.
LOW = np.array([0.852698679009, 0.377402855613, -0.110624404418, -0.023849465020, 0.037828455507])
HIGH = np.array([0.788485616406, -0.418092273222, -0.040689417609, 0.064538882629])


def both_sides(half: np.ndarray) -> np.ndarray:
    return np.concatenate([half[:0:-1], half])


def line(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One level along x of one row: low and high."""
    low, high, *_ = forward(values[None, None], 1)
    return low.values[0, 0], high.values[0, 0]


def energy(subbands: list[Subband]) -> float:
    return float(sum((subband.values**2).sum() for subband in subbands))


def test_impulse_responses_are_the_published_filters() -> None:
    responses = [line(row) for row in np.eye(64)]
    low, high = (np.stack(parts)[:, 16] for parts in zip(*responses, strict=True))
    np.testing.assert_allclose(low[28:37], both_sides(LOW), atol=1e-11)
    np.testing.assert_allclose(high[30:37], both_sides(HIGH), atol=1e-11)  # sample 33 is odd sample 16
    assert np.abs(np.delete(low, range(28, 37))).max() < 1e-15
    assert np.abs(np.delete(high, range(30, 37))).max() < 1e-15


@pytest.mark.parametrize("n", range(2, 21))
def test_one_level_is_convolution_of_the_mirrored_line(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    mirrored = np.pad(values, 4, "reflect")
    low, high = line(values)
    np.testing.assert_allclose(low, np.convolve(mirrored, both_sides(LOW), "valid")[::2], atol=1e-10)
    np.testing.assert_allclose(high, np.convolve(mirrored, both_sides(HIGH), "valid")[2:-1:2], atol=1e-10)


def test_axes_are_separable_and_named_by_what_is_high() -> None:
    row, column = np.random.default_rng(0).normal(size=(2, 24))
    (low_x, high_x), (low_y, high_y) = line(row), line(column)
    subbands = forward((column[:, None] * row)[None], 1)
    assert [subband.orientation for subband in subbands] == ["LL", "HL", "LH", "HH"]
    parts = [(low_y, low_x), (low_y, high_x), (high_y, low_x), (high_y, high_x)]
    for subband, (y, x) in zip(subbands, parts, strict=True):
        np.testing.assert_allclose(subband.values[0], y[:, None] * x, atol=1e-13)


def test_every_size_is_reconstructed() -> None:
    rng = np.random.default_rng(1)
    for n_y in range(1, 21):
        for n_x in range(1, 21):
            for n_levels in range(6):
                images = rng.normal(size=(2, n_y, n_x))
                subbands = forward(images, n_levels)
                sizes = [(subband.orientation, *subband.values.shape[1:]) for subband in subbands]
                assert sizes == subband_sizes(n_y, n_x, n_levels)
                assert sum(subband.values.size for subband in subbands) == images.size
                assert np.abs(inverse(subbands) - images).max() < 1e-10


def test_images_of_any_type_are_transformed_one_by_one_in_float64_and_stay() -> None:
    images = (100 * np.random.default_rng(2).normal(size=(5, 13, 22))).astype(np.int16)
    before = images.copy()
    together, wide = forward(images, 3), forward(images.astype(np.float32), 3)
    for i in range(5):
        for alone, both, same in zip(forward(images[i : i + 1], 3), together, wide, strict=True):
            assert both.values.dtype == same.values.dtype == np.float64
            np.testing.assert_array_equal(alone.values[0], both.values[i])
            np.testing.assert_array_equal(both.values, same.values)
    kept = [subband.values.copy() for subband in together]
    inverse(together)
    np.testing.assert_array_equal(images, before)
    for subband, values in zip(together, kept, strict=True):
        np.testing.assert_array_equal(subband.values, values)


@pytest.mark.parametrize("degree", range(5))
def test_four_moments_vanish(degree: int) -> None:
    """Details of a polynomial are 0 up to the third degree, and not from the fourth on."""
    n = 129
    polynomial = np.linspace(-1, 1, n) ** degree
    images = np.stack([np.broadcast_to(polynomial, (n, n)), np.broadcast_to(polynomial[:, None], (n, n))])
    largest = 0.0
    for name, values in forward(images, 3)[1:]:
        inside = values[:, 4:-4, 4:-4]  # where no mirrored sample is felt: less than 7 of them on each level
        if values.shape[1] > 20:
            along = {"HL": inside[:1], "LH": inside[1:], "HH": inside}[name]
            largest = max(largest, float(np.abs(along).max()) if name != "HH" else 0.0)
            assert name != "HH" or np.abs(inside).max() < 1e-12  # the other axis is constant
    assert largest < 1e-12 if degree < 4 else largest > 1e-8


def test_a_constant_is_all_in_the_coarsest_subband() -> None:
    """Twice the constant per level, as with any orthonormal wavelet; up to the border."""
    low, *details = forward(np.full((1, 37, 50), 3.0), 3)
    np.testing.assert_allclose(low.values, 3.0 * 2**3, rtol=1e-12)
    assert max(np.abs(values).max() for _, values in details) < 1e-12


def test_energy_stays_within_the_frame_bounds_of_the_filters() -> None:
    """The bounds are the extreme singular values of the filters' polyphase matrix, over all frequencies."""
    omega = np.linspace(0, np.pi, 2001)
    low = LOW[0] + 2 * sum(LOW[k] * np.cos(k * omega) for k in range(1, 5))
    high = HIGH[0] + 2 * sum(HIGH[k] * np.cos(k * omega) for k in range(1, 4))
    # rows: the filters; columns: a frequency and its alias, where the high-pass filter is centred on an odd sample
    aliased = np.stack([np.stack([low, low[::-1]]), np.stack([high, -high[::-1]])]).transpose(2, 0, 1) / np.sqrt(2)
    singular = np.linalg.svd(aliased, compute_uv=False)
    lowest, highest = singular.min() ** 4, singular.max() ** 4  # squares, along two axes
    assert 0.5 < lowest < 1 < highest < 2
    rng, ratios = np.random.default_rng(4), []
    wave = np.arange(64)
    images = [rng.normal(size=(64, 64)) for _ in range(20)]
    images += [np.cos(f * wave)[:, None] * np.cos(g * wave) for f in omega[::400] for g in omega[::400]]
    for image in images:
        framed = np.pad(image * np.hanning(64)[:, None] * np.hanning(64), 8)  # nothing is mirrored
        ratios.append(energy(forward(framed[None], 1)) / (framed**2).sum())
    assert lowest <= min(ratios) < 0.85 < 1.2 < max(ratios) <= highest


def test_an_error_costs_the_same_in_every_subband() -> None:
    empty = forward(np.zeros((1, 256, 256)), 5)
    for i, (_, values) in enumerate(empty):
        one = [Subband(subband.orientation, subband.values.copy()) for subband in empty]
        one[i].values[0, values.shape[1] // 2, values.shape[2] // 2] = 1
        assert 0.93 < (inverse(one) ** 2).sum() < 1.18


@pytest.mark.parametrize(
    ("size", "n_levels"), [((1, 1), 0), ((4, 4), 0), ((5, 1), 1), ((1, 9), 2), ((64, 64), 4), ((131, 2048), 5)]
)
def test_levels_by_the_longer_side(size: tuple[int, int], n_levels: int) -> None:
    assert n_levels_of(*size) == n_levels
    assert n_levels_of(*size[::-1]) == n_levels
