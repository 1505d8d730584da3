"""What an evaluation compares: its quantities with their units, and who is a fair opponent of the latents; pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spectralvae.analysis.evaluation import Evaluation, Judged

MEAN = "mean"


@dataclass(frozen=True)
class Quantity:
    """A figure that checkpoints and baselines are judged by.

    Attributes:
        key: among `evaluation.METRICS`.
        name: for readers.
        unit: empty for a plain number.
        form: how it is written; four significant digits tell reconstructions apart.
        more_is_better: or less.
        is_drawn: or in tables only: it says what another one says.
        is_log: drawn on a logarithmic axis.
    """

    key: str
    name: str
    unit: str = ""
    form: str = ".4g"
    more_is_better: bool = False
    is_drawn: bool = True
    is_log: bool = True

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def of(self, judged: Judged) -> float:
        """Its value; NaN where it cannot be had."""
        return judged.metrics[self.key]


def quantities(e: Evaluation) -> list[Quantity]:
    """Those that are known of anything judged."""
    possible = (
        Quantity("mse", "MSE of z"),
        Quantity("mae", "MAE of z", is_drawn=False),
        Quantity("psnr", "PSNR", "dB", more_is_better=True, is_log=False),
        Quantity("spectral_angle", "spectral angle", "degrees"),
        # the last digits are what counts of a number so close to 1
        Quantity("explained_variance", "explained variance of z", form=".5f", more_is_better=True, is_drawn=False),
        Quantity("rmse_radiance", "RMSE of radiance", units(e)),
        Quantity("relative_rmse", "relative RMSE of radiance"),
        Quantity("noise_ratio", "RMSE in units of the noise"),
    )
    return [q for q in possible if any(math.isfinite(q.of(judged)) for judged in e.judged().values())]


class ChannelQuantity(NamedTuple):
    """An error by channel: a column of `evaluation.Channels`."""

    key: str
    name: str
    unit: str


def channel_quantities(e: Evaluation) -> list[ChannelQuantity]:
    """Those that are known of any channel."""
    possible = (
        ChannelQuantity("rmse", "RMSE of z", ""),
        ChannelQuantity("rmse_radiance", "RMSE of radiance", units(e)),
        ChannelQuantity("relative", "relative RMSE of radiance", ""),
        ChannelQuantity("noise", "RMSE in units of the noise", ""),
    )
    channels = e.checkpoints[e.shown].channels
    return [q for q in possible if (values := getattr(channels, q.key)) is not None and np.isfinite(values).any()]


def units(e: Evaluation) -> str:
    """Of radiance, or of what the files hold in its place."""
    return e.units or "units of the file"


def written(value: float, form: str = ".4g") -> str:
    """A number for readers; a dash for what cannot be had."""
    return f"{value:{form}}".replace("e+", "e") if math.isfinite(value) else "–"


def knows_noise(e: Evaluation) -> bool:
    """Of any channel."""
    return e.noise is not None and bool(np.isfinite(e.noise).any())


def floats_per_pixel(e: Evaluation) -> float:
    """Of the latents."""
    return e.embed_dim / e.scale**2


def n_components(name: str) -> int:
    """Floats per pixel of a baseline."""
    return 0 if name == MEAN else int(name.removeprefix("pca_"))


def label_of(name: str) -> str:
    """A baseline's name for readers."""
    return "predicting the mean" if name == MEAN else f"PCA {n_components(name)}"


def opponent(e: Evaluation) -> str:
    """The baseline with as many floats per pixel as the latents; if there is none, the next larger, or the largest.

    Where no PCA was judged (scenes of a single channel) it is the mean.
    """
    names = sorted(e.baselines, key=n_components)
    return next((name for name in names if name != MEAN and n_components(name) >= floats_per_pixel(e)), names[-1])


def drawn_baselines(e: Evaluation) -> list[str]:
    """PCA with 1 component, the opponent, and PCA with 8: more curves hide each other."""
    return sorted({"pca_1", opponent(e), "pca_8"} & (e.baselines.keys() - {MEAN}), key=n_components)


def verdicts(e: Evaluation) -> list[str]:
    """Whether the best checkpoint beats its opponent: a sentence on z, and one in units of the noise if it is known."""
    name = opponent(e)
    ours, theirs = e.checkpoints[e.shown].metrics, e.baselines[name].metrics
    of_z = _compared(ours["mse"], theirs["mse"])
    sentences = [
        f"Step {e.shown:,}, the checkpoint with the smallest MSE, {_outcome(ours['mse'], theirs['mse'])} "
        f"{_described(e, name)}: its MSE of z is {of_z}."
    ]
    noise, noise_theirs = ours["noise_ratio"], theirs["noise_ratio"]
    if math.isfinite(noise) and math.isfinite(noise_theirs):
        sentences.append(
            f"In units of the noise it {_outcome(noise, noise_theirs)} {label_of(name)}: its RMSE is "
            f"{_compared(noise, noise_theirs)}."
        )
    return sentences


def _outcome(ours: float, theirs: float) -> str:
    return "beats" if ours < theirs else "does not beat"


def _compared(ours: float, theirs: float) -> str:
    ratio = f", {ours / theirs:.3g} times as much" if theirs > 0 else ""
    return f"{written(ours)} against {written(theirs)}{ratio}"


def _described(e: Evaluation, name: str) -> str:
    """An opponent and its size."""
    if name == MEAN:
        return "predicting the mean, the only baseline"
    k, floats = n_components(name), floats_per_pixel(e)
    if k == floats:
        size = f"as many floats per pixel as the latents ({k})"
    else:
        size = f"{'more' if k > floats else 'fewer'} floats per pixel ({k}) than the latents ({written(floats)})"
    return f"PCA of each pixel's spectrum with {k} component{'s' * (k > 1)}, which keeps {size}"
