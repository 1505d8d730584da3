"""Level-2 fields as learning targets: the transform of each product, its exact statistics, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.data.statistics import Moments
from spectralvae.errors import ConfigError, RunError
from spectralvae.readers.products import ProductSpec
from spectralvae.weights.normalization import Float64

NORMAL_MAD = 1.4826  # the standard deviation of a normal distribution is so many of its MADs
MARGIN = 0.01  # fractions of 0 and 1 have no finite logit

Passes = Callable[[], Iterable[NDArray[np.float32]]]  # each call gives the same arrays, of any shapes, NaN = invalid


@dataclass(frozen=True)
class TargetTransform:
    """Values x = value / divide to targets t, and back.

    asinh: t = asinh(x / scale), scale = 1.4826 MAD(x): linear near 0, where columns are noise of either sign, and
    logarithmic in the plumes. zscore: t = (x - center) / scale, mean and standard deviation. logit: t = logit(0.01 +
    0.98 x).

    Attributes:
        product, field, units: What the values are.
        kind: asinh, zscore or logit.
        divide: As in `ProductSpec`.
        center, scale: Of x over the valid training values; 0 and 1 where the kind has none.
        n: Number of valid training values.
        mean, std, minimum, maximum: Of their targets; std with divisor n.
    """

    product: str
    field: str
    units: str | None
    kind: str
    divide: float
    center: float
    scale: float
    n: int
    mean: float
    std: float
    minimum: float
    maximum: float

    def transform(self, values: NDArray[Any]) -> Float64:
        """Values of any shape, NaN = invalid -> targets, float64; under logit they must lie in 0...divide."""
        return _transform(values, self.kind, self.divide, self.center, self.scale)

    def inverse(self, targets: NDArray[Any]) -> Float64:
        """Targets of any shape, NaN = invalid -> values in `units`, float64."""
        t = targets.astype(np.float64)
        if self.kind == "logit":
            # Both terms are fractions: exp(-t) of a far target, infinite, gives 0, which is right.
            with np.errstate(over="ignore"):
                x = (1 / (1 + np.exp(-t)) - MARGIN) / (1 - 2 * MARGIN)
        else:
            x = self.center + self.scale * (np.sinh(t) if self.kind == "asinh" else t)
        return np.asarray(x * self.divide)

    def to_attributes(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> TargetTransform:
        """The inverse of `to_attributes`."""
        return cls(**attributes)


def _transform(values: NDArray[Any], kind: str, divide: float, center: float, scale: float) -> Float64:
    x = values.astype(np.float64) / divide
    if kind == "logit":
        share = MARGIN + (1 - 2 * MARGIN) * x
        return np.asarray(np.log(share) - np.log1p(-share))
    x = (x - center) / scale
    return np.asarray(np.arcsinh(x) if kind == "asinh" else x)


def fit_transform(spec: ProductSpec, field: str, units: str | None, passes: Passes) -> TargetTransform:
    """The transform of a field with the statistics of its training values, in memory for one array.

    All are independent of how the values are cut into arrays and of their order (mean and std within rounding). A
    field in other units than the product's own is z-scored, undivided. The values are gone through several times:
    six times under asinh, twice otherwise.

    Args:
        spec: The product.
        field: Name or path of the field.
        units: Of the field.
        passes: Called for each pass: the arrays of the training scenes.

    Raises:
        ConfigError: No valid value, or no spread.
        RunError: The values changed between two passes.
    """
    holds = spec.holds_for(field, units)
    kind, divide = (spec.transform, spec.divide) if holds else ("zscore", 1.0)
    key = f"l2.{spec.name}"
    values = _moments(np.asarray(v, dtype=np.float64) for v in passes())
    n = int(values.count[0])
    if n == 0:
        problem = f"{field} has no valid value in the training scenes"
        raise ConfigError(problem, key=key, remedy="check folder, max_quality and valid_range")
    if values.minimum[0] == values.maximum[0]:
        problem = f"{field} has the same value ({values.minimum[0]:g}) in all its {n} valid training pixels"
        raise ConfigError(problem, key=key, remedy=f"leave out {key}")
    assert kind != "logit" or (values.minimum[0] >= 0 and values.maximum[0] <= divide), "the reader's range"
    center, scale = 0.0, 1.0
    if kind == "asinh":
        scale = NORMAL_MAD * median_absolute_deviation(passes) / divide
        if scale == 0:
            problem = f"the median absolute deviation of the {n} valid training values of {field} is 0"
            raise ConfigError(problem, key=key, remedy=f"leave out {key}")
    elif kind == "zscore":
        center, scale = float(values.mean[0]) / divide, float(values.std[0]) / divide
    targets = _moments(_transform(v, kind, divide, center, scale) for v in passes())
    _check_unchanged(n, int(targets.count[0]))
    return TargetTransform(
        product=spec.name,
        field=field,
        units=units,
        kind=kind,
        divide=divide,
        center=center,
        scale=scale,
        n=n,
        mean=float(targets.mean[0]),
        std=float(targets.std[0]),
        minimum=float(targets.minimum[0]),
        maximum=float(targets.maximum[0]),
    )


def _moments(arrays: Iterable[Float64]) -> Moments:
    """Of all values together."""
    total = Moments.empty(1)
    for values in arrays:
        total = total.merge(Moments.of(values.reshape(-1, 1)))
    return total


def median(passes: Passes) -> float:
    """The exact median of float32 values in two passes, by counting; NaN without a valid value.

    The values' upper 16 bits are counted first, which tells in which of 65,536 bins the middle lies, then the lower
    16 bits of the values in this bin. Memory: 1 MB and one array. An even number of values has the mean of the two
    middle ones, in float64.

    Args:
        passes: Called twice.

    Raises:
        RunError: The values changed between the passes.
    """
    upper = np.zeros(1 << 16, np.int64)
    for values in passes():
        upper += np.bincount(_keys(values) >> 16, minlength=1 << 16)
    n = int(upper.sum())
    if n == 0:
        return float("nan")
    up_to = np.cumsum(upper)
    ranks = ((n - 1) // 2, n // 2)
    bins = [int(np.searchsorted(up_to, rank, side="right")) for rank in ranks]
    lower = {b: np.zeros(1 << 16, np.int64) for b in bins}
    for values in passes():
        keys = _keys(values)
        for b, counts in lower.items():
            counts += np.bincount(keys[keys >> 16 == b] & 0xFFFF, minlength=1 << 16)
    middle = 0.0
    for rank, b in zip(ranks, bins, strict=True):
        _check_unchanged(int(upper[b]), int(lower[b].sum()))
        within = rank - int(up_to[b] - upper[b])
        key = b << 16 | int(np.searchsorted(np.cumsum(lower[b]), within, side="right"))
        bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF  # the inverse of `_keys`
        middle += float(np.uint32(bits).view(np.float32)) / 2
    return middle


def median_absolute_deviation(passes: Passes) -> float:
    """The median of |value - median of all|, in four passes; NaN without a valid value.

    Each deviation is computed in float64 and rounded to float32. Rounding keeps the order, so that the result is the
    exact one up to a relative error of 2^-24.

    Args, Raises: as for `median`.
    """
    middle = median(passes)
    return median(lambda: (np.abs(v.astype(np.float64) - middle).astype(np.float32) for v in passes()))


def _keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """uint32 keys that sort as the values do; (n,), NaN left out."""
    valid = values[~np.isnan(values)]
    assert valid.dtype == np.float32
    bits = valid.view(np.uint32)
    # Negative numbers have the sign bit and grow downwards, positive ones don't.
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _check_unchanged(before: int, now: int) -> None:
    if before != now:
        problem = f"a file has changed meanwhile: {before} values were counted, then {now}"
        raise RunError(problem, key="l2", remedy="start again")
