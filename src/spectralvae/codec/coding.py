"""A scene to the blocks of a file: reads it once, tries what is smallest, and checks what a decoder makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.codec.decoding import stream_scene
from spectralvae.codec.mask import pack_mask
from spectralvae.codec.network import LatentCode, cost_of_errors, decode_scene, encode_scene
from spectralvae.codec.rates import Target, solve
from spectralvae.codec.scratch import Scratch, bands
from spectralvae.codec.stages import LEAST_BOUND, MARGIN_NETWORK, Stages
from spectralvae.codec.variants import Blocks, Estimate, Variant
from spectralvae.data.normalize import EPSILON
from spectralvae.errors import RunError
from spectralvae.inference.coder import Coder

_WINDOW = (2, 4)  # tiles along y and x on which the network is tried first
_COARSER = (1.0, 2.0, 4.0)  # steps of latents that are tried, in that of the components
_NEARLY = 0.995  # of the bytes asked for are aimed at
_ATTEMPTS = 6  # to meet a target that was met by the estimate
_TIGHTER = 1.002  # is an error made at least from one to the next
_WASTEFUL = 0.985  # of the bytes allowed: with less it is tried again

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Errors:
    """What a decoder's result differs by from the scene, over all valid samples.

    Attributes:
        n_valid: samples.
        mse: of z; within the clip where there is no bound.
        max_error: the largest of z.
        max_relative_error: the largest of radiance, of its true value; None under zscore, where that may be 0.
    """

    n_valid: int
    mse: float
    max_error: float
    max_relative_error: float | None

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "n_valid": self.n_valid,
            "mse": self.mse,
            "max_error": self.max_error,
            "max_relative_error": self.max_relative_error,
        }


@dataclass(frozen=True)
class Coded:
    """A scene's blocks.

    Attributes:
        stages: how they were coded.
        blocks: kind -> content.
        errors: of what is decoded from them.
        n_bytes_linear, n_bytes_network: of all blocks, without and with the network, as far as they were tried.
    """

    stages: Stages
    blocks: Blocks
    errors: Errors
    n_bytes_linear: int | None
    n_bytes_network: int | None


class SceneCoder:
    """Codes one scene.

    Args:
        z: the scene, not clipped, NaN = invalid.
        coder: the network, with its normalisation.
        target: what to meet.
        fixed: bytes of the file besides the blocks of the scene and its mask.
        folder: where temporary files may lie.
        name: of the scene, for errors.
    """

    def __init__(self, z: Scratch, coder: Coder, target: Target, fixed: int, folder: Path, name: str) -> None:
        self.z, self.coder, self.target, self.folder, self.name = z, coder, target, folder, name
        self.normalization = coder.normalization
        self.n_valid = 0
        self.mask = pack_mask(self._valid_rows(), z.shape)
        self.fixed = fixed + len(self.mask)

    def _valid_rows(self) -> Iterator[NDArray[np.bool_]]:
        for rows in bands(self.z.shape):
            valid = np.isfinite(self.z.read(rows))
            self.n_valid += int(np.count_nonzero(valid))
            yield from valid

    # --- which way --------------------------------------------------------------------------------

    def code(self) -> Coded:
        """Code the scene in the way that is best.

        Raises:
            RunError: nothing meets the target.
        """
        linear = Variant(self.z, self.normalization)
        plain = self._solve(linear)
        best, chosen, tried = linear, plain, None
        with Scratch(self.folder, self.z.shape) as base:
            network_step = self._promising_step(plain.stages.step)
            if network_step is not None:
                variant = _Network(self.z, self.coder).variant(network_step, base)
                tried = self._solve(variant, guess=network_step)
                if self._better(tried, plain):
                    best, chosen = variant, tried
            stages, blocks, errors = self._fit(best, chosen)
        sizes = {e.stages.network_step is not None: round(e.n_bytes) for e in (plain, tried) if e is not None}
        return Coded(stages, blocks, errors, sizes.get(False), sizes.get(True))

    def _solve(self, variant: Variant, *, guess: float | None = None, factor: float = 1.0) -> Estimate:
        """What meets the target.

        Args:
            variant: of the scene.
            guess: a step to begin with.
            factor: by which bytes or errors were found to be more than estimated.
        """
        target, bound = self.target, self.target.bound
        if guess is None:
            guess = 1.0
            if bound is not None:
                guess = 4 * float(np.nanmedian(bound.in_z(self.normalization)))
            elif target.kind == "mse":
                guess = math.sqrt(12 * target.value)
        if target.kind == "bytes":
            target = replace(target, value=max(1.0, (target.value * _NEARLY - self.fixed) / factor))
        elif target.kind == "mse":
            target = replace(target, value=target.value / factor)
        return solve(lambda step: variant.at(step, bound), target, n_valid=self.n_valid, guess=guess)

    def _better(self, one: Estimate, other: Estimate) -> bool:
        """Whether one way is better than another."""
        if self.target.kind == "bytes":
            fits = one.n_bytes <= max(other.n_bytes, self.target.value - self.fixed)
            return fits and one.squares < other.squares
        if self.target.kind == "step":
            return one.cost() < other.cost()
        return one.n_bytes < other.n_bytes

    def _cheaper(self, one: Estimate, other: Estimate) -> bool:
        """Whether one way is better than another with the same step."""
        return one.cost() < other.cost()

    def _promising_step(self, step: float) -> float | None:
        """The step of the latents with which the network does best; None where it does worse than components alone.

        Found on a part of the scene, for to run the network over all of it takes long.

        Args:
            step: of the components.
        """
        if (bound := self.target.bound) is not None:
            least = float(np.nanmin(bound.in_z(self.normalization)))
            if least < LEAST_BOUND * MARGIN_NETWORK:
                return None
        ny, nx, nc = self.z.shape
        height, width = (min(n, tiles * self.coder.tile) for n, tiles in zip((ny, nx), _WINDOW, strict=True))
        top, left = (ny - height) // 2, (nx - width) // 2
        with Scratch(self.folder, (height, width, nc)) as part, Scratch(self.folder, (height, width, nc)) as base:
            z = self.z.read(slice(top, top + height))[:, left : left + width]
            if not np.isfinite(z).any():
                return None
            part.write(slice(0, height), slice(0, width), z)
            plain = Variant(part, self.normalization).at(step, bound)
            network = _Network(part, self.coder)
            tried = [network.variant(coarser * step, base).at(step, bound) for coarser in _COARSER]
        best = min(tried, key=Estimate.cost)
        return best.stages.network_step if self._cheaper(best, plain) else None

    # --- the real thing -----------------------------------------------------------------------------

    def _fit(self, variant: Variant, estimate: Estimate) -> tuple[Stages, Blocks, Errors]:
        """Code and decode, and again where the estimate was a little too good.

        Raises:
            RunError: the target cannot be met.
        """
        target, factor, missed = self.target, 1.0, ""
        found: tuple[Stages, Blocks] | None = None
        for attempt in range(_ATTEMPTS):
            stages = estimate.stages
            blocks = {"MASK": self.mask, **variant.encode(stages)}
            if target.kind == "bytes":
                n_bytes = sum(map(len, blocks.values())) - len(self.mask)
                allowed = target.value - self.fixed
                if n_bytes <= allowed:
                    found = stages, blocks
                missed = f"{target.value:,.0f} bytes are too few: {n_bytes + self.fixed:,} are needed"
                factor *= n_bytes / estimate.n_bytes
                if found and (n_bytes > allowed * _WASTEFUL or attempt > 1):
                    return *found, self._errors(*found)
            else:
                errors = self._errors(stages, blocks)
                if target.kind != "mse" or errors.mse <= target.value:
                    self._check(stages, errors)
                    return stages, blocks, errors
                missed = f"a mean squared error of {target.value:g} cannot be met: {errors.mse:g} was reached"
                factor *= max(_TIGHTER, errors.mse / target.value)
            estimate = self._solve(variant, guess=stages.step, factor=factor)
        raise RunError(f"{self.name}: {missed}")

    def _errors(self, stages: Stages, blocks: Mapping[str, bytes]) -> Errors:
        """Decode, and compare with the scene."""
        n, squares, largest, relative = 0, 0.0, 0.0, 0.0
        normalization = self.normalization
        log = normalization.transform == "log_zscore"
        clip = normalization.clip if stages.bound is None else math.inf
        for rows, radiance in stream_scene(stages, blocks, self.z.shape, self.coder, self.folder):
            z, found = self.z.read(rows).astype(np.float64), standardized(radiance, self.coder)
            if not np.array_equal(np.isnan(z), np.isnan(found)):
                raise RunError(f"{self.name}: rows {rows.start}-{rows.stop - 1}: decoded samples are not valid")
            np.clip(z, -clip, clip, out=z)
            error = found - z
            n += int(np.count_nonzero(np.isfinite(error)))
            squares += float(np.nansum(np.square(error)))
            largest = max(largest, float(np.nanmax(np.abs(error), initial=0.0)))
            if log:
                ratio = np.expm1(error * (normalization.std + EPSILON))
                relative = max(relative, float(np.nanmax(np.abs(ratio), initial=0.0)))
        return Errors(n, squares / max(n, 1), largest, relative if log else None)

    def _check(self, stages: Stages, errors: Errors) -> None:
        """Refuse what is not within the bound.

        Raises:
            RunError: it is not.
        """
        if (bound := stages.bound) is not None:
            found = errors.max_error if bound.kind == "z" else errors.max_relative_error
            if found is None or found > bound.value:
                raise RunError(
                    f"{self.name}: decoded, the largest error ({bound.kind}) is {found}, not {bound.value:g}: float32 "
                    "cannot hold such a bound there, or the network computes differently each time: ask for more"
                )


class _Network:
    """The network's view of a scene."""

    def __init__(self, z: Scratch, coder: Coder) -> None:
        self._z, self._coder = z, coder
        latents, seen = encode_scene(z, coder, lambda n: None)
        self._code = LatentCode(latents, seen, cost_of_errors(latents, coder))

    def variant(self, step: float, base: Scratch) -> Variant:
        """The scene less what the network makes of latents of a step, which is written to ``base``."""
        block, decoded = self._code.encode(step)
        decode_scene(decoded, self._coder, base, lambda n: None)
        return Variant(self._z, self._coder.normalization, base, (block, step))


def standardized(radiance: Float32, coder: Coder) -> NDArray[np.float64]:
    """z, not clipped, of radiance whose valid samples are known: none is rejected again for being small."""
    normalization = replace(coder.normalization, min_radiance=0.0 if coder.normalization.min_radiance else None)
    return normalization.standardize(radiance)
