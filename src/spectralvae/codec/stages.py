"""What one scene is coded with, in numbers: what a file's head says, and its decoder needs to know."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from spectralvae.weights.normalization import EPSILON, Normalization

# What is kept of a bound for what rounds otherwise elsewhere, in z; more where that is not enough. Of the linear stage
# only float32 does, in which radiance is written; the network's result depends on device, memory layout, threads and
# algorithms of convolution, by a quarter of this at most where that was tried.
MARGIN, MARGIN_NETWORK = 1e-5, 2e-4
LEAST_BOUND = 10.0  # times the margin

Float64 = NDArray[np.float64]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Values(BaseModel):
    """What is kept as JSON, and checked when it comes back."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True, protected_namespaces=())


class Bound(Values):
    """The largest error of any valid sample.

    Attributes:
        kind: "z", absolute in z, or "relative", of radiance.
        value: the error.
    """

    kind: Literal["z", "relative"]
    value: Positive

    def in_z(self, normalization: Normalization) -> Float64:
        """(nc): the same as absolute errors of z. A radiance r becomes r exp(std e), so that upwards counts."""
        if self.kind == "z":
            return np.full(normalization.n_channels, self.value)
        assert normalization.transform == "log_zscore"
        return math.log1p(self.value) / (normalization.std + EPSILON)


class Stages(Values):
    """How a scene is coded.

    Attributes:
        step: of the linear stage, in z.
        n_components: of the linear stage.
        network_step: of the latents; None without the network.
        bound: that is kept by coding residuals of samples; None if there is none.
        margin: by how much the residuals' steps stay below the bound, in z; 0 if there is none.
    """

    step: Positive
    n_components: Count
    network_step: Positive | None
    bound: Bound | None
    margin: Annotated[float, Field(ge=0)]

    def residual_steps(self, normalization: Normalization) -> Float64:
        """(nc): steps of the residual stage, in z."""
        assert self.bound is not None
        steps: Float64 = 2 * (self.bound.in_z(normalization) - self.margin)
        return steps


class Errors(Values):
    """What a decoder's result differs by from the scene, over all valid samples.

    Attributes:
        n_valid: samples.
        n_beyond_clip: of these.
        mse: of z; where there is no bound, of z within the clip.
        max_error: the largest of z, beyond the clip as well.
        max_relative_error: the largest of radiance, of its true value; None under zscore, where that may be 0.
    """

    n_valid: Count
    n_beyond_clip: Count
    mse: float
    max_error: float
    max_relative_error: float | None


class Head(Values):
    """What a file says of itself.

    Attributes:
        spectralvae_version, created: of the file.
        shape: (ny, nx, nc).
        source, source_sha256, source_format, source_arguments, band, scan_start, units: of the scene.
        radiance_bytes: that radiance takes in the source, where that is HDF5; None elsewhere.
        model: its name.
        model_sha256, normalization_sha256: without which it is not decoded.
        overlap: pixels that the network's tiles share.
        stages: how it was coded.
        errors: of what is decoded.
        estimated_bytes: what the blocks were thought to take without and with the network, as far as it was tried.
    """

    spectralvae_version: str
    created: str
    shape: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
    source: str
    source_sha256: str
    source_format: str
    source_arguments: dict[str, Any]
    band: str | None
    scan_start: str | None
    units: str | None
    radiance_bytes: Count | None
    model: str
    model_sha256: str
    normalization_sha256: str
    overlap: Count
    stages: Stages
    errors: Errors
    estimated_bytes: dict[str, Count]

    def kinds(self) -> set[str]:
        """Of the blocks that such a file has."""
        there = {"LATN": self.stages.network_step, "COMP": self.stages.n_components, "RESD": self.stages.bound}
        return {"LAYT", "MASK", "SPEC", *(kind for kind, needed in there.items() if needed)}
