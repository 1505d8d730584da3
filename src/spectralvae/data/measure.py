"""Second stage of `prepare`: every training scene is measured, and what was found is merged into statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from spectralvae.config import NormalizationConfig
from spectralvae.data.blocks import Block, map_blocks
from spectralvae.data.splits import PlannedScene
from spectralvae.data.statistics import Moments, RatioHistogram
from spectralvae.data.store_statistics import Statistics, check_share
from spectralvae.data.targets import TargetTransform, fit_transform
from spectralvae.data.tasks import BELOW_MINIMUM, Task, all_invalid
from spectralvae.errors import ConfigError
from spectralvae.readers.products import PRODUCTS
from spectralvae.runtime.console import warn
from spectralvae.weights.normalization import Float64


@dataclass(frozen=True)
class Measured:
    """What the statistics need to know of a scene.

    Attributes:
        moments: of its transformed valid samples.
        noise: of radiance_error / radiance; None where the source has no error.
        n_small: samples below min_radiance.
    """

    moments: Moments
    noise: RatioHistogram | None
    n_small: int

    @property
    def n_valid(self) -> int:
        """How many samples are valid."""
        return int(np.sum(self.moments.count, dtype=np.int64))


def measure(task: Task, p: PlannedScene, advance: Callable[[int], None]) -> None:
    """Measure a training scene, and keep its level-2 fields at hand for their statistics.

    Raises:
        InputError: it cannot be read, or has no valid sample.
    """

    def sums(block: Block) -> tuple[Moments, RatioHistogram | None, dict[str, int], int]:
        noise = None if block.noise is None else RatioHistogram.of(block.noise, block.values)
        return Moments.of(block.values, task.validity.transform), noise, block.counts, block.n_pixels

    if task.measured and not task.result_file(p, "measured").is_file():
        n_channels = p.scene.shape[2]
        moments, noise = Moments.empty(n_channels), RatioHistogram.empty(n_channels)
        counts: Counter[str] = Counter()
        with p.scene:
            for more, ratios, rejected, n_pixels in map_blocks(
                sums, p.scene, task.validity, noise=True, n_threads=task.n_threads
            ):
                moments = moments.merge(more)
                if ratios is not None:
                    noise.counts[...] += ratios.counts
                counts.update(rejected)
                advance(n_pixels)
        if not moments.count.any() and not task.leave_out:
            raise all_invalid(p, counts)
        task.keep(p, "measured", n_small=counts[BELOW_MINIMUM], noise=noise.counts, **vars(moments))
    else:
        advance(p.scene.shape[0] * p.scene.shape[1])
    for product in task.products:
        if not task.result_file(p, product).is_file():
            task.keep(p, product, values=task.product_field(p, product).values)


def load_measured(task: Task, p: PlannedScene) -> Measured:
    """What `measure` found."""
    with np.load(task.result_file(p, "measured")) as saved:
        moments = Moments(**{name: saved[name] for name in Moments.__dataclass_fields__})
        noise = RatioHistogram(saved["noise"])
        return Measured(moments, noise if noise.counts.any() else None, int(saved["n_small"]))


def fit_targets(task: Task, training: Sequence[PlannedScene]) -> dict[str, TargetTransform]:
    """The transform of every level-2 product, with statistics of the training scenes.

    Raises:
        ConfigError: a product has nothing that can be learned.
    """

    def values(p: PlannedScene, product: str) -> NDArray[np.float32]:
        with np.load(task.result_file(p, product)) as saved:  # (y, x), NaN = invalid
            return np.asarray(saved["values"], np.float32)

    targets = {}
    for product in task.products:
        first = task.product_field(training[0], product)
        targets[product] = fit_transform(
            PRODUCTS[product],
            first.field,
            first.units,
            lambda product=product: (values(p, product) for p in training),  # type: ignore[misc]
        )
    return targets


def own_statistics(
    task: Task,
    training: Sequence[PlannedScene],
    normalization: NormalizationConfig,
    wavelength: Float64,
    console: Console,
) -> Statistics:
    """Merge what was measured, in the order of the plan, so that nothing depends on who measured it when.

    Raises:
        ConfigError: most samples lie below min_radiance, no sample is valid, or a channel has no spread.
    """
    moments = Moments.empty(len(wavelength))
    noise: RatioHistogram | None = None
    n_small = 0
    for p in training:
        measured = load_measured(task, p)
        moments = moments.merge(measured.moments)
        n_small += measured.n_small
        if measured.noise is not None:
            noise = measured.noise if noise is None else noise.merge(measured.noise)
    check_share(n_small, int(moments.count.sum()) + n_small, normalization)
    mean, std = checked_statistics(moments, wavelength, console)
    more: dict[str, Any] = {"count": moments.count, "minimum": moments.minimum, "maximum": moments.maximum}
    if noise is not None:
        more["noise"] = noise.median()
    return Statistics(mean, std, more)


def checked_statistics(moments: Moments, wavelength: Float64, console: Console) -> tuple[Float64, Float64]:
    """Mean and std per channel, NaN for channels without a valid sample, which are named.

    Raises:
        ConfigError: no valid sample at all, or a channel has no spread.
    """
    dead = np.flatnonzero(moments.count == 0)
    if len(dead) == len(moments.count):
        raise ConfigError("the training scenes hold no valid sample", key="inputs")
    # not m2 == 0: rounding of the mean leaves a little of it
    flat = np.flatnonzero((moments.count > 0) & (moments.minimum == moments.maximum))
    if len(flat):
        raise ConfigError(
            f"channel {flat[0]} ({wavelength[flat[0]]:.2f} nm) has the same value in all its "
            f"{moments.count[flat[0]]} valid training samples and cannot be normalised ({len(flat)} such channels)",
            key="inputs",
        )
    if len(dead):
        named = ", ".join(f"{c} ({wavelength[c]:.2f} nm)" for c in dead[:10]) + (", ..." if len(dead) > 10 else "")
        warn(console, f"{len(dead)} channels have no valid training sample and stay masked: {named}")
    mean = np.where(moments.count > 0, moments.mean, np.nan)
    return mean, moments.std
