"""Learning targets: transforms, inverses and statistics equal to numpy's and scipy's over all values at once."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats

from spectralvae.data.targets import TargetTransform, fit_transform, median, median_absolute_deviation
from spectralvae.errors import ConfigError, RunError
from spectralvae.readers.products import PRODUCTS, read_product

Passes = Callable[[], Iterator[np.ndarray]]
FLOAT32 = 2.0**-24


def columns(kind: str, n: int = 5000) -> np.ndarray:
    """(n,) float32 without NaN."""
    rng = np.random.default_rng(5)
    values = {
        "normal": rng.normal(0, 1, n),
        "columns": 1e15 * rng.normal(1, 3, n),
        "heavy_tailed": 1e15 * rng.standard_cauchy(n),
        "negative": -rng.exponential(1e16, n),
        "lognormal": np.exp(rng.normal(0, 8, n)),
        "duplicates": rng.integers(-3, 4, n).astype(float),
        "offset": 1e6 + rng.normal(0, 1, n),
        "subnormal": rng.normal(0, 1e-41, n),
        "extremes": rng.choice([-3e38, -1e-45, -0.0, 0.0, 1e-45, 3e38, 1.0], n),
    }[kind]
    return values.astype(np.float32)


KINDS = ["normal", "columns", "heavy_tailed", "negative", "lognormal", "duplicates", "offset", "subnormal"]


def once(values: np.ndarray) -> Passes:
    return lambda: iter([values])


def pieces(values: np.ndarray, seed: int) -> Passes:
    """The same values in another order, with NaN among them, in pieces of any size and shape, some without a value."""
    rng = np.random.default_rng(seed)
    mixed = np.concatenate([values, np.full(values.size // 3 + 5, np.nan, np.float32)])
    rng.shuffle(mixed)
    cuts = np.sort(rng.integers(0, mixed.size, 7))
    parts = [part if part.size % 2 else part.reshape(-1, 2) for part in np.split(mixed, cuts)]
    parts += [np.full((3, 4), np.nan, np.float32), np.empty((0, 5), np.float32)]
    return lambda: iter(parts)


# --- median and MAD -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "extremes"])
@pytest.mark.parametrize("n", [5000, 4999])
def test_median_is_numpys(kind: str, n: int) -> None:
    values = columns(kind, n)
    expected = np.median(values.astype(np.float64))
    for seed in range(3):
        assert median(pieces(values, seed)) == expected


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_median_of_few(n: int) -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).normal(0, 1e15, n).astype(np.float32)
        exact = values.astype(np.float64)
        assert median(once(values)) == np.median(exact)
        expected = scipy.stats.median_abs_deviation(exact)
        np.testing.assert_allclose(median_absolute_deviation(once(values)), expected, rtol=FLOAT32)


@pytest.mark.parametrize("step", [2.0**-149, 2.0**-16, 2.0**-7, 1.0, 1000.0])
def test_middle_values_near_and_far(step: float) -> None:
    """The two middle values in one bin of the upper 16 bits, in two that adjoin, and on two sides of 0."""
    for values in (
        [1, 1 + step],
        [-1 - step, -1],
        [-step, step],
        [-step, 0, 0, step],
        [0, step],
        [-1, -0.0, 0.0, step],
    ):
        array = np.array(values, np.float32)
        assert median(once(array)) == np.median(array.astype(np.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [5000, 4999])
def test_mad_is_scipys(kind: str, n: int) -> None:
    """To float32's precision, whatever the pieces and their order; these change no bit."""
    values = columns(kind, n)
    expected = scipy.stats.median_abs_deviation(values.astype(np.float64))
    found = {median_absolute_deviation(pieces(values, seed)) for seed in range(3)}
    assert len(found) == 1
    # the smallest float32 is the last digit of subnormal deviations
    np.testing.assert_allclose(found.pop(), expected, rtol=FLOAT32, atol=2.0**-150)


def test_mad_is_exact_but_for_one_rounding() -> None:
    """Odd n, so that the median is a value: the MAD is scipy's, rounded to float32."""
    values = columns("heavy_tailed", 4999)
    expected = scipy.stats.median_abs_deviation(values.astype(np.float64))
    assert median_absolute_deviation(once(values)) == np.float32(expected)


def test_no_values() -> None:
    nothing = np.full((2, 3), np.nan, np.float32)
    assert np.isnan(median(once(nothing)))
    assert np.isnan(median_absolute_deviation(once(nothing)))
    assert np.isnan(median(lambda: iter(())))


def test_passes_that_differ_are_refused() -> None:
    """An iterator that is used up, or a file that changes meanwhile."""
    used_up = iter([columns("normal")])
    with pytest.raises(RunError, match="then 0"):
        median(lambda: used_up)


def test_memory_is_bounded() -> None:
    """A hundred arrays take no more than one and the two tables."""

    def passes() -> Iterator[np.ndarray]:
        for seed in range(100):
            yield np.random.default_rng(seed).normal(0, 1, 100_000).astype(np.float32)

    tracemalloc.start()
    try:
        median_absolute_deviation(passes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10e6 < 100 * 400_000


# --- transforms ---------------------------------------------------------------------------------


def values_of(product: str, n: int = 4000) -> np.ndarray:
    """(n,) float32 as a product has them, with NaN among them."""
    rng = np.random.default_rng(9)
    values = {
        "NO2": lambda: 1e15 * (rng.normal(0, 1, n) + rng.exponential(2, n) ** 2),
        "HCHO": lambda: 1e16 * rng.normal(0.5, 1, n),
        "O3TOT": lambda: rng.normal(300, 25, n),
        "CLDO4": lambda: np.clip(rng.normal(0.3, 0.5, n), 0, 1),
    }[product]()
    values[rng.random(n) < 0.1] = np.nan
    return values.astype(np.float32)


def expected_targets(product: str, values: np.ndarray) -> np.ndarray:
    """The formulas of the data's description, by numpy and scipy."""
    x = values.astype(np.float64) / {"NO2": 1e15, "HCHO": 1e16, "O3TOT": 1, "CLDO4": 1}[product]
    if product == "CLDO4":
        return scipy.special.logit(0.01 + 0.98 * x)
    if product == "O3TOT":
        return (x - np.nanmean(x)) / np.nanstd(x)
    return np.arcsinh(x / (1.4826 * scipy.stats.median_abs_deviation(x, nan_policy="omit")))


def fit(product: str, passes: Passes) -> TargetTransform:
    spec = PRODUCTS[product]
    return fit_transform(spec, f"product/{spec.field}", spec.units, passes)


@pytest.mark.parametrize("product", PRODUCTS)
def test_transform_and_statistics(product: str) -> None:
    values = values_of(product)
    expected = expected_targets(product, values)
    for seed in range(3):
        fitted = fit(product, pieces(values, seed))
        targets = fitted.transform(values)
        assert targets.dtype == np.float64
        np.testing.assert_allclose(targets, expected, rtol=1e-7, atol=1e-9)
        assert fitted.n == np.isfinite(values).sum()
        own = targets[np.isfinite(targets)]
        found = (fitted.mean, fitted.std, fitted.minimum, fitted.maximum)
        np.testing.assert_allclose(found, (own.mean(), own.std(), own.min(), own.max()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("product", PRODUCTS)
def test_inverse_gives_the_values_back(product: str) -> None:
    """To 1e-10 of each value; near cloud fraction 0 to the last digit of 0.01, which is added to it."""
    fitted = fit(product, once(values_of(product)))
    values = values_of(product, 500).astype(np.float64)
    values[::7] = np.nan
    if product == "CLDO4":
        values[:6] = 0, 1, 0.5, 1e-7, 1 - 1e-7, 1e-3
    if product in ("NO2", "HCHO"):
        values[:6] = -1e17, 1e18, 0, 1, -1, 1e15
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        targets = fitted.transform(values.reshape(50, 10))
        back = fitted.inverse(targets)
    assert targets.shape == back.shape == (50, 10) and back.dtype == np.float64
    atol = 1e-16 if product == "CLDO4" else 0
    np.testing.assert_allclose(back.ravel(), values, rtol=1e-10, atol=atol, equal_nan=True)


def test_inverse_of_what_a_model_may_say() -> None:
    """Targets far outside the training's give finite cloud fractions, without a warning."""
    fitted = fit("CLDO4", once(values_of("CLDO4")))
    np.testing.assert_allclose(fitted.inverse(np.array([-1e4, 1e4])), [-0.01 / 0.98, 0.99 / 0.98], rtol=1e-12)
    assert fitted.inverse(np.zeros(1, np.float32)).dtype == np.float64


@pytest.mark.parametrize("product", PRODUCTS)
def test_kept_as_json(product: str) -> None:
    fitted = fit(product, once(values_of(product)))
    assert TargetTransform.from_attributes(json.loads(json.dumps(fitted.to_attributes()))) == fitted
    assert (fitted.product, fitted.kind) == (product, PRODUCTS[product].transform)
    assert fitted.units == PRODUCTS[product].units


def test_field_in_other_units_is_z_scored() -> None:
    values = columns("offset")
    fitted = fit_transform(PRODUCTS["NO2"], "support_data/pressure", "Pa", once(values))
    assert (fitted.kind, fitted.divide) == ("zscore", 1.0)
    np.testing.assert_allclose(fitted.transform(values), scipy.stats.zscore(values.astype(np.float64)), atol=1e-9)


def test_stratosphere_is_a_column_too() -> None:
    values = (3e15 + 1e14 * columns("normal")).astype(np.float32)
    fitted = fit_transform(PRODUCTS["NO2"], "product/vertical_column_stratosphere", "molecules/cm^2", once(values))
    mad = scipy.stats.median_abs_deviation(values.astype(np.float64))
    np.testing.assert_allclose(fitted.transform(values), np.arcsinh(values / (1.4826 * mad)), rtol=1e-6)


@pytest.mark.parametrize("product", PRODUCTS)
def test_no_valid_value(product: str) -> None:
    with pytest.raises(ConfigError, match=rf"l2\.{product}: product/.* no valid value in the training scenes"):
        fit(product, once(np.full((3, 3), np.nan, np.float32)))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("n", [1, 7])
def test_no_spread(product: str, n: int) -> None:
    values = np.full(n, 0.1, np.float32)
    with pytest.raises(ConfigError, match=rf"l2\.{product}: product/.* same value \(0\.1\) in all its {n}"):
        fit(product, once(values))


def test_no_mad() -> None:
    values = np.array([1, 1, 1, 5, -5], np.float32)
    with pytest.raises(ConfigError, match=r"l2\.NO2: .* at least half of its 5 .* median absolute deviation is 0"):
        fit("NO2", once(values))
    fit("O3TOT", once(values))


def test_targets_of_the_real_file(real_data: Path) -> None:
    path = real_data / "TEMPO_NO2_L2_V03_20240601T210934Z_S012G01_subsetted.nc4"
    field = read_product(path, "NO2", field="vertical_column_stratosphere")
    fitted = fit_transform(PRODUCTS["NO2"], field.field, field.units, once(field.values))
    exact = field.values[np.isfinite(field.values)].astype(np.float64) / 1e15
    assert fitted.n == exact.size == 264_208
    np.testing.assert_allclose(fitted.scale, 1.4826 * scipy.stats.median_abs_deviation(exact), rtol=FLOAT32)
    targets = np.arcsinh(exact / fitted.scale)
    found = (fitted.mean, fitted.std, fitted.minimum, fitted.maximum)
    np.testing.assert_allclose(found, (targets.mean(), targets.std(), targets.min(), targets.max()), rtol=1e-10)
    np.testing.assert_allclose(fitted.inverse(fitted.transform(field.values)), field.values, rtol=1e-10)
