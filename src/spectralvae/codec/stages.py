"""What one scene is coded with, in numbers; what the file's head says, and what its decoder needs to know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spectralvae.data.normalize import EPSILON, Normalization

# What is kept of a bound for what rounds otherwise elsewhere, in z. Of the linear stage only float32 does, in which
# radiance is written; the network's result depends on device, memory layout, threads and algorithms of convolution,
# by a fifth of this at most where that was tried (tests/test_compress.py).
MARGIN, MARGIN_NETWORK = 1e-5, 2e-4
LEAST_BOUND = 10.0  # times the margin

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Bound:
    """The largest error of any valid sample.

    Attributes:
        kind: "z", absolute in z, or "relative", of radiance.
        value: the error.
    """

    kind: Literal["z", "relative"]
    value: float

    def in_z(self, normalization: Normalization) -> Float64:
        """(nc): the same as absolute errors of z. A radiance r becomes r exp(std e), so that upwards counts."""
        if self.kind == "z":
            return np.full(normalization.n_channels, self.value)
        assert normalization.transform == "log_zscore"
        return math.log1p(self.value) / (normalization.std + EPSILON)


@dataclass(frozen=True)
class Stages:
    """How a scene is coded.

    Attributes:
        step: of the linear stage, in z.
        n_components: of the linear stage.
        network_step: of the latents; None without the network.
        bound: that is kept by coding residuals of samples; None if there is none.
    """

    step: float
    n_components: int
    network_step: float | None
    bound: Bound | None

    def residual_steps(self, normalization: Normalization) -> Float64:
        """(nc): steps of the residual stage, in z."""
        assert self.bound is not None
        return 2 * (self.bound.in_z(normalization) - self.margin)

    @property
    def margin(self) -> float:
        """In z."""
        return MARGIN if self.network_step is None else MARGIN_NETWORK

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Stages:
        """The inverse of `values`.

        Raises:
            TypeError: they are none.
        """
        bound = values["bound"]
        return cls(**{**values, "bound": None if bound is None else Bound(**bound)})
