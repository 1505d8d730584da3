"""A scene to the blocks of a file: reads it once, tries what is smallest, and checks what a decoder makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spectralvae.codec.decoding import stream_scene
from spectralvae.codec.mask import pack_mask
from spectralvae.codec.network import LatentCode, cost_of_errors, decode_scene, encode_scene
from spectralvae.codec.rates import Target, solve
from spectralvae.codec.scratch import Scratch, bands
from spectralvae.codec.stages import LEAST_BOUND, MARGIN_NETWORK, Errors, Stages
from spectralvae.codec.variants import Blocks, Estimate, Variant
from spectralvae.errors import InputError, RunError
from spectralvae.inference.coder import Coder
from spectralvae.weights.normalization import EPSILON

_WINDOW = (2, 4)  # tiles along y and x on which the network is tried first
_COARSER = (1.0, 2.0, 4.0)  # steps of latents that are tried, in that of the components
_NEARLY = 0.995  # of the bytes asked for are aimed at
_ATTEMPTS = 6  # to meet a target that was met by the estimate
_TIGHTER = 0.002  # at least by so much is an error made smaller, and by twice as much at each further attempt
_MOST_STEPS = 2.0**38  # of a residual
_WASTEFUL = 0.985  # of the bytes allowed: with less it is tried again

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Coded:
    """A scene's blocks.

    Attributes:
        stages: how they were coded.
        blocks: kind -> content.
        errors: of what is decoded from them.
        estimated_bytes: of the blocks that meet the target, without and with the network, as far as it was tried.
    """

    stages: Stages
    blocks: Blocks
    errors: Errors
    estimated_bytes: dict[str, int]


class SceneCoder:
    """Codes one scene.

    Args:
        z: the scene, not clipped, NaN = invalid.
        coder: the network, with its normalisation.
        target: what to meet.
        fixed: bytes of the file besides the blocks of the scene and its mask.
        folder: where temporary files may lie.
        name: of the scene, for errors.
        advance: called with the share of the work that is done, of which there is 1.

    Raises:
        InputError: a sample is so large that no bound of that size can be kept.
    """

    def __init__(
        self,
        z: Scratch,
        coder: Coder,
        target: Target,
        fixed: int,
        folder: Path,
        name: str,
        advance: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.z, self.coder, self.target, self.folder, self.name = z, coder, target, folder, name
        self.normalization, self._advance = coder.normalization, advance
        self.n_valid, self._largest = 0, 0.0
        self.mask = pack_mask(self._valid_rows(), z.shape)
        self.fixed = fixed + len(self.mask)
        if target.bound is not None:
            least = float(np.nanmin(target.bound.in_z(self.normalization)))
            if self._largest / least > _MOST_STEPS:
                raise InputError(
                    f"a sample has a z of {self._largest:.3g}; a bound of {least:.3g} can be kept up to "
                    f"{_MOST_STEPS * least:.3g}",
                    key="bound",
                    path=name,
                    remedy="give a larger bound, or limit the valid range in `prepare`",
                )

    def _valid_rows(self) -> Iterator[NDArray[np.bool_]]:
        """Also counts them, and finds the largest."""
        for rows in bands(self.z.shape):
            z = self.z.read(rows)
            valid = np.isfinite(z)
            self.n_valid += int(np.count_nonzero(valid))
            self._largest = max(self._largest, float(np.abs(z[valid]).max(initial=0.0)))
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
            self._advance(0.3)
            network_step = self._promising_step(plain.stages.step)
            self._advance(0.1)
            if network_step is not None:
                variant = _Network(self.z, self.coder).variant(network_step, base)
                tried = self._solve(variant, guess=network_step)
                if self._better(tried, plain):
                    best, chosen = variant, tried
            self._advance(0.2)
            stages, blocks, errors = self._fit(best, chosen)
        self._advance(0.4)
        estimates = {"components": plain, "network": tried}
        sizes = {way: round(e.n_bytes) + len(self.mask) for way, e in estimates.items() if e is not None}
        return Coded(stages, blocks, errors, sizes)

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
            if not network.says_anything:
                return None
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
                if self._meets(stages, errors):
                    return stages, blocks, errors
                if stages.bound is not None:
                    missed = f"decoded, a sample is further off than the bound, {stages.bound.value:g}: {errors}"
                    if (margin := 4 * stages.margin) > float(np.nanmin(stages.bound.in_z(self.normalization))) / 2:
                        break
                    estimate = replace(estimate, stages=stages.model_copy(update={"margin": margin}))
                    continue
                missed = f"a mean squared error of {target.value:g} cannot be met: {errors.mse:g} was reached"
                factor *= max(1 + _TIGHTER * 2**attempt, errors.mse / target.value)
            estimate = self._solve(variant, guess=stages.step, factor=factor)
        raise RunError(missed, path=self.name)

    def _meets(self, stages: Stages, errors: Errors) -> bool:
        """Whether errors are what was asked for."""
        if (bound := stages.bound) is not None:
            found = errors.max_error if bound.kind == "z" else errors.max_relative_error
            return found is not None and found <= bound.value
        return self.target.kind != "mse" or errors.mse <= self.target.value

    def _errors(self, stages: Stages, blocks: Mapping[str, bytes]) -> Errors:
        """Decode, and compare with the scene.

        Raises:
            RunError: what is decoded is not valid at the same samples.
        """
        n, n_beyond, squares, largest, relative = 0, 0, 0.0, 0.0, 0.0
        spread, clip = self.normalization.std + EPSILON, self.normalization.clip
        log = self.normalization.transform == "log_zscore"
        for rows, radiance in stream_scene(stages, blocks, self.z.shape, self.coder, self.folder):
            z, found = self.z.read(rows).astype(np.float64), standardized(radiance, self.coder)
            if not np.array_equal(np.isnan(z), np.isnan(found)):
                raise RunError(f"rows {rows.start}-{rows.stop - 1}: decoded samples are not valid", path=self.name)
            # half a unit in the last place of z, which is kept in float32 only
            error = np.abs(found - z) + 2.0**-24 * np.abs(z)
            n += int(np.count_nonzero(np.isfinite(error)))
            n_beyond += int(np.count_nonzero(np.abs(z) > clip))
            largest = max(largest, float(np.nanmax(error, initial=0.0)))
            if log:
                exponent = np.minimum(np.copysign(error, found - z) * spread, 700.0)  # what float64 can hold
                relative = max(relative, float(np.nanmax(np.abs(np.expm1(exponent)), initial=0.0)))
            if stages.bound is None:
                np.clip(z, -clip, clip, out=z)
            squares += float(np.nansum(np.square(found - z)))
        return Errors(
            n_valid=n,
            n_beyond_clip=n_beyond,
            mse=squares / max(n, 1),
            max_error=largest,
            max_relative_error=relative if log else None,
        )


class _Network:
    """The network's view of a scene."""

    def __init__(self, z: Scratch, coder: Coder) -> None:
        self._z, self._coder = z, coder
        latents, seen = encode_scene(z, coder)
        cost = cost_of_errors(latents, coder)
        self.says_anything = bool(cost.any())  # the decoder of an untrained network does not heed its latents
        self._code = LatentCode(latents, seen, cost) if self.says_anything else None

    def variant(self, step: float, base: Scratch) -> Variant:
        """The scene less what the network makes of latents of a step, which is written to ``base``."""
        assert self._code is not None
        block, decoded = self._code.encode(step)
        decode_scene(decoded, self._coder, base)
        return Variant(self._z, self._coder.normalization, base, (block, step))


def standardized(radiance: Float32, coder: Coder) -> NDArray[np.float64]:
    """z, not clipped, of radiance whose valid samples are known: none is rejected again for being small."""
    normalization = replace(coder.normalization, min_radiance=0.0 if coder.normalization.min_radiance else None)
    return normalization.standardize(radiance)
