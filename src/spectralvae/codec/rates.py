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
_TOLERANCE = 0.004  # how near bytes or error come to the target, as a share of it

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


def solve(at: At, target: Target, *, n_valid: int, guess: float) -> Estimate:
    """The best that meets a target; where nothing does, what comes nearest to it.

    Args:
        at: what a step gives.
        target: bytes, of what `at` counts, or error.
        n_valid: samples that the error is the mean over.
        guess: a step to begin with.
    """
    if target.kind == "step":
        return at(target.value)
    if target.kind == "bound":
        return _fewest_bytes(at, guess)
    if target.kind == "bytes":
        return _search(at, lambda e: math.log(max(e.n_bytes, 1.0) / target.value), guess, rising=False)
    return _search(at, lambda e: math.log(max(e.squares, 1e-300) / (target.value * n_valid)), guess, rising=True)


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


def _search(at: At, excess: Callable[[Estimate], float], guess: float, *, rising: bool) -> Estimate:
    """Where an excess comes nearest to 0 from below: by regula falsi over the logarithm of the step.

    Args:
        at: what a step gives.
        excess: over what is allowed, as a logarithm; it rises or falls with the step, if not strictly.
        guess: a step to begin with.
        rising: whether it rises.
    """
    sign = 1.0 if rising else -1.0
    octaves, before = sign * math.log2(min(max(guess, FINEST), COARSEST)), math.nan  # so that it rises
    within: tuple[float, float] | None = None
    beyond: tuple[float, float] | None = None
    best: Estimate | None = None
    for _ in range(_AT_MOST):
        found = at(2 ** (sign * octaves))
        value = excess(found)
        if value <= 0:
            within, best = (octaves, value), found
        else:
            beyond, best = (octaves, value), best or found
        if -_TOLERANCE <= value <= 0 or (value == before and within and beyond):
            break
        before = value
        if within is None or beyond is None:
            octaves += 2.0 if beyond is None else -2.0
            if not FINEST <= 2 ** (sign * octaves) <= COARSEST:
                break
        else:
            share = (_TOLERANCE / 2 + within[1]) / (within[1] - beyond[1])  # a little on the side that is allowed
            octaves = within[0] + (beyond[0] - within[0]) * min(max(share, 0.1), 0.9)
    assert best is not None
    return best
