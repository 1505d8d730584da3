"""Learning targets: transforms, inverses and statistics equal to numpy's and scipy's over all values at once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
from inferring import peak
from refusals import refused

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
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 4999, 5000])
def test_median_is_numpys_and_mad_scipys(kind: str, n: int) -> None:
    """The MAD to float32's precision, whatever the pieces and their order; these change no bit."""
    values = columns(kind, n)
    exact = values.astype(np.float64)
    assert {median(pieces(values, seed)) for seed in range(3)} == {np.median(exact)}
    if kind == "extremes":
        return
    (found,) = {median_absolute_deviation(pieces(values, seed)) for seed in range(3)}
    expected = scipy.stats.median_abs_deviation(exact)
    # the smallest float32 is the last digit of subnormal deviations
    np.testing.assert_allclose(found, expected, rtol=FLOAT32, atol=2.0**-150)
    if n % 2:  # the median is a value: there is one rounding only
        assert found == np.float32(expected)


@pytest.mark.parametrize("step", [2.0**-149, 2.0**-16, 2.0**-7, 1.0, 1000.0])
def test_middle_values_near_and_far(step: float) -> None:
    """The two middle values in one bin of the upper 16 bits, in two that adjoin, and on two sides of 0."""
    ends = ([1, 1 + step], [-1 - step, -1], [-step, step], [-step, 0, 0, step], [0, step], [-1, -0.0, 0.0, step])
    for values in ends:
        array = np.array(values, np.float32)
        assert median(once(array)) == np.median(array.astype(np.float64))


def test_no_values_and_values_that_change() -> None:
    """An iterator that is used up is as a file that changes meanwhile."""
    nothing = np.full((2, 3), np.nan, np.float32)
    assert np.isnan(median(once(nothing)))
    assert np.isnan(median_absolute_deviation(once(nothing)))
    assert np.isnan(median(lambda: iter(())))
    for work in (median, lambda passes: fit("O3TOT", passes)):
        used_up = iter([columns("normal")])
        with refused(RunError, "then 0", key="l2"):
            work(lambda used_up=used_up: used_up)


def test_memory_is_bounded() -> None:
    """Many arrays take no more than one and the two tables."""

    def arrays() -> Iterator[np.ndarray]:
        return (np.random.default_rng(seed).normal(0, 1, 100_000).astype(np.float32) for seed in range(30))

    assert peak(lambda: median_absolute_deviation(arrays)) < 10e6 < 30 * 400_000


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
def test_transform_statistics_and_inverse(product: str) -> None:
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
    assert TargetTransform.from_attributes(json.loads(json.dumps(fitted.to_attributes()))) == fitted
    spec = PRODUCTS[product]
    assert (fitted.product, fitted.kind, fitted.units) == (product, spec.transform, spec.units)
    # the inverse: to 1e-10 of each value; near cloud fraction 0 to the last digit of 0.01, which is added to it
    values = values_of(product, 500).astype(np.float64)
    if product == "CLDO4":
        values[:6] = 0, 1, 0.5, 1e-7, 1 - 1e-7, 1e-3
    if product in ("NO2", "HCHO"):
        values[:6] = -1e17, 1e18, 0, 1, -1, 1e15
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = fitted.inverse(fitted.transform(values.reshape(50, 10)))
        if product == "CLDO4":  # a model's targets may lie far outside the training's
            far = fitted.inverse(np.array([-1e4, 1e4], np.float32))
            np.testing.assert_allclose(far, [-0.01 / 0.98, 0.99 / 0.98], rtol=1e-12)
    assert back.shape == (50, 10) and back.dtype == np.float64
    np.testing.assert_allclose(back.ravel(), values, rtol=1e-10, atol=1e-16 if product == "CLDO4" else 0)


def test_other_fields_of_a_product() -> None:
    """The stratosphere is a column, too; what has other units is z-scored."""
    spec, values = PRODUCTS["NO2"], columns("offset")
    fitted = fit_transform(spec, "support_data/pressure", "Pa", once(values))
    np.testing.assert_allclose(fitted.transform(values), scipy.stats.zscore(values.astype(np.float64)), atol=1e-9)
    values = (3e15 + 1e14 * columns("normal")).astype(np.float32)
    fitted = fit_transform(spec, "product/vertical_column_stratosphere", spec.units, once(values))
    mad = scipy.stats.median_abs_deviation(values.astype(np.float64))
    np.testing.assert_allclose(fitted.transform(values), np.arcsinh(values / (1.4826 * mad)), rtol=1e-6)


@pytest.mark.parametrize("product", PRODUCTS)
def test_nothing_to_learn(product: str) -> None:
    """No value, no spread, or no median absolute deviation where the transform needs one."""
    for values, words in (
        (np.full((3, 3), np.nan), ()),
        (np.full(1, 0.1), ("0.1", "1 valid")),
        (np.full(7, 0.1), ("0.1", "7 valid")),
        *([(np.array([1, 1, 1, 5, -5]), ("5 valid",))] if PRODUCTS[product].transform == "asinh" else []),
    ):
        with refused(ConfigError, PRODUCTS[product].field, *words, key=f"l2.{product}"):
            fit(product, once(values.astype(np.float32)))


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
