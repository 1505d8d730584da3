"""Which step meets a target: a size, an error, or a bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from spectralvae.codec.stages import Bound
from spectralvae.codec.variants import Estimate

FINEST, COARSEST = 2.0**-20, 2.0**16  # steps, in z
_AT_MOST = 16  # steps that are tried

At = Callable[[float], Estimate]


@dataclass(frozen=True)
class Target:
    """What a user asks for.

    Attributes:
        kind: `step`; `bytes` of the file at most; `mse` of z at most; `bound`, the fewest bytes that keep it.
        value: of the first three.
        bound: of the last.
    """

    kind: Literal["step", "bytes", "mse", "bound"]
    value: float = 0.0
    bound: Bound | None = None


def solve(at: At, target: Target, *, n_valid: float, guess: float, tolerance: float) -> Estimate:
    """The best that meets a target; where nothing does, what comes nearest to it.

    Args:
        at: what a step gives.
        target: bytes, of what `at` counts, or error.
        n_valid: samples that the error is the mean over.
        guess: a step to begin with.
        tolerance: how near bytes or error should come to the target, as a share of it.
    """
    if target.kind == "step":
        return at(target.value)
    if target.kind == "bound":
        return _fewest_bytes(at, guess)
    if target.kind == "bytes":
        return _search(at, lambda e: math.log(max(e.n_bytes, 1.0) / target.value), guess, tolerance, rising=False)
    return _search(
        at, lambda e: math.log(max(e.squares, 1e-300) / (target.value * n_valid)), guess, tolerance, rising=True
    )


def _fewest_bytes(at: At, guess: float) -> Estimate:
    """From step to step as long as it gets better."""
    best = at(guess)
    for factor in (2.0, 0.5):
        n = 0
        while (found := at(best.stages.step * factor)).n_bytes < best.n_bytes:
            best, n = found, n + 1
        if n:
            break
    return best


def _search(at: At, excess: Callable[[Estimate], float], guess: float, tolerance: float, *, rising: bool) -> Estimate:
    """Where an excess comes nearest to 0 from below: by regula falsi (Illinois) over the logarithm of the step.

    Args:
        at: what a step gives.
        excess: over what is allowed, as a logarithm; it rises or falls with the step, if not strictly.
        guess: a step to begin with.
        tolerance: of the excess.
        rising: whether it rises.
    """
    sign = 1.0 if rising else -1.0
    octaves = sign * math.log2(guess)  # so that it rises
    within: tuple[float, float] | None = None
    beyond: tuple[float, float] | None = None
    best: Estimate | None = None
    before = math.nan
    for _ in range(_AT_MOST):
        found = at(2 ** (sign * octaves))
        value = excess(found)
        if value <= 0:
            stuck = within is not None and beyond is not None
            within, best = (octaves, value), found
            beyond = (beyond[0], beyond[1] / 2) if stuck and beyond else beyond
        else:
            stuck = within is not None and beyond is not None
            beyond = (octaves, value)
            within = (within[0], within[1] / 2) if stuck and within else within
            best = best or found
        if -tolerance <= value <= 0 or value == before:
            break
        before = value
        if within is None or beyond is None:
            octaves += 2.0 if within is not None else -2.0
            if not FINEST <= 2 ** (sign * octaves) <= COARSEST:
                break
        elif beyond[0] - within[0] < 1e-3:
            break
        else:  # a little to the side that is allowed
            octaves = within[0] + (beyond[0] - within[0]) * (within[1] + tolerance / 2) / (within[1] - beyond[1])
            octaves = min(max(octaves, within[0] + 1e-4), beyond[0] - 1e-4)
    assert best is not None
    return best
