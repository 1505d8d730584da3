"""What predicts a quantity from the features of a cell: ridge regression, and a small network.

Both choose their complexity on groups of cells that they were not fitted on, among those they are given: cells of one
scene, and scenes of one day, resemble each other, and would praise what merely remembers them.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spectralvae.errors import ConfigError, InputError

try:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    remedy = 'install it: pip install "spectralvae[analysis]"'
    raise ConfigError(f"probe needs scikit-learn ({error})", remedy=remedy) from error

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

STRENGTHS = np.logspace(-8, 4, 25)  # of the ridge, a cell: in variances of a standardised feature
N_FOLDS = 5
HIDDEN, DROPOUT = 512, 0.1
LR, WEIGHT_DECAY = 1e-3, 1e-2
BATCH = 512  # cells
MAX_EPOCHS, PATIENCE = 100, 10
HELD_BACK = 0.2  # share of the groups that tell the network when to stop
SEEN = 4  # every so many-th of the cells fitted on is enough for the curve
LEAST_VARIANCE = 1e-10  # of a principal axis, beside the largest: less is rounding
PREDICTED = 16_384  # cells that are predicted at a time


@dataclass(frozen=True)
class Fitted:
    """A regressor that has learnt.

    Attributes:
        predict: (n, k) -> (n), in the units of the targets that it was fitted on.
        curves: how it came to its complexity. `strength` or `epoch`: what was tried, and of each `training` and
            `validation`: mean squared error on the cells fitted on (the network: on every fourth) and on groups held
            back, in variances of the target (0 perfect, 1 no better than the mean).
        facts: what was chosen: `alpha`, `strength` and `edge` (weakest or strongest if the grid ended there, else
            empty); or `epoch` and `epochs`, and `held_back` groups.
    """

    predict: Callable[[NDArray[Any]], Float64]
    curves: dict[str, list[float]]
    facts: dict[str, Any]


def fit_linear(x: NDArray[Any], y: NDArray[Any], groups: NDArray[Any], *, seed: int) -> Fitted:
    """Ridge regression (Hoerl & Kennard 1970, Technometrics 12, 55-67) on standardised features.

    Minimises |y - b0 - x b|^2 + alpha |b|^2 with alpha = strength * cells. The strength is the one of `STRENGTHS`
    with the least squared error in cross-validation over up to five folds of whole groups, each left out once;
    scales are those of the cells fitted on. With it, all cells are fitted.

    Args:
        x: (n, k) finite features.
        y: (n) finite targets.
        groups: (n) the day or scene of each.
        seed: of the division into folds.

    Raises:
        InputError: the cells are of one group, or the targets do not vary.
    """
    names = _check(x, y, groups)
    alphas = STRENGTHS * len(x)
    variance = float(np.var(y, dtype=np.float64))
    folds = GroupKFold(min(N_FOLDS, len(names)), shuffle=True, random_state=seed)
    errors = np.zeros((2, len(alphas)))  # on cells fitted on, and on those left out: means over the folds
    for fitted, left_out in folds.split(x, y, groups):
        predict = _ridge(x[fitted], y[fitted], alphas)
        for part, index in zip(errors, (fitted, left_out), strict=True):
            part += np.mean((predict(x[index]) - y[index, None]) ** 2, axis=0) / folds.get_n_splits()
    best = int(np.argmin(errors[1]))
    predict_all = _ridge(x, y, alphas[best : best + 1])
    edge = {0: "weakest", len(alphas) - 1: "strongest"}.get(best, "")
    training, validation = (errors / variance).tolist()
    return Fitted(
        lambda cells: predict_all(cells)[:, 0],
        {"strength": STRENGTHS.tolist(), "training": training, "validation": validation},
        {"alpha": float(alphas[best]), "strength": float(STRENGTHS[best]), "edge": edge},
    )


def fit_mlp(
    x: NDArray[Any], y: NDArray[Any], groups: NDArray[Any], *, seed: int, device: torch.device | str = "cpu"
) -> Fitted:
    """A network k -> 512 -> 512 -> 1 with ReLU and dropout on whitened features and standardised targets.

    Whitened: neighbouring channels of spectra are so alike that a gas shows in axes of a millionth of their variance,
    which the network would take thousands of epochs to find. A ridge finds them as they are.

    AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on batches of 512 cells. A fifth of the groups, at least one,
    is held back; the weights are those of the epoch with the least squared error on them, 0 being the network as it
    was drawn, and training ends `PATIENCE` epochs after it. The same seed gives the same weights on the same machine;
    the global random state is left as it was.

    Args:
        x: (n, k) finite features.
        y: (n) finite targets.
        groups: (n) the day or scene of each.
        seed: of the groups held back, the first weights, the order of cells and dropout.
        device: where to compute.

    Raises:
        InputError: the cells are of one group, or the targets (of all groups, or of those fitted on, which may be one
            cell) do not vary.
    """
    names = _check(x, y, groups)
    device = torch.device(device)
    held_back = np.random.default_rng(seed).permutation(names)[: max(1, round(HELD_BACK * len(names)))]
    left_out = np.isin(groups, held_back)
    scale = _Scale.of(y[~left_out])
    whiten = _whitening(x[~left_out])

    def tensors(part: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        target = ((y[part] - scale.mean) / scale.std).astype(np.float32)
        return torch.from_numpy(whiten(x[part])).to(device), torch.from_numpy(target).to(device)

    fitted, judged = tensors(~left_out), tensors(left_out)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch every GPU
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Linear(fitted[0].shape[1], HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT)),
            *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT)),
            nn.Linear(HIDDEN, 1),
        ).to(device)
        curves = _train(network, fitted, judged)

    def predict(cells: NDArray[Any]) -> Float64:
        found = _forward(network, torch.from_numpy(whiten(cells))).cpu().numpy()
        return np.asarray(found.astype(np.float64) * scale.std + scale.mean)

    to_variances = scale.std**2 / float(np.var(y, dtype=np.float64))
    epochs = len(curves["epoch"]) - 1
    best = int(np.argmin(curves["validation"]))
    for name in ("training", "validation"):
        curves[name] = [value * to_variances for value in curves[name]]
    return Fitted(predict, curves, {"epoch": best, "epochs": epochs, "held_back": len(held_back)})


@dataclass(frozen=True)
class _Scale:
    """Mean and standard deviation of targets."""

    mean: float
    std: float

    @classmethod
    def of(cls, y: NDArray[Any]) -> _Scale:
        mean, std = float(np.mean(y, dtype=np.float64)), float(np.std(y, dtype=np.float64))
        if y.min() == y.max():
            problem = f"nothing to learn: all {len(y)} cells to fit on have the target {y[0]:g}"
            raise InputError(problem, key="n_cells", remedy="give a larger n_cells, or more scenes")
        return cls(mean, std)


def _check(x: NDArray[Any], y: NDArray[Any], groups: NDArray[Any]) -> NDArray[Any]:
    """The groups there are."""
    assert x.ndim == 2 and y.shape == groups.shape == x.shape[:1]
    assert np.isfinite(x).all() and np.isfinite(y).all(), "what cannot be learnt from is left out beforehand"
    names = np.unique(groups)
    if len(names) < 2:
        problem = (
            f"the {len(x)} cells to fit on come from {len(names)} day or scene; probes need at least 2, "
            "since they choose their complexity on one that is held back"
        )
        raise InputError(problem, key="store", remedy="prepare a store with more scenes")
    _Scale.of(y)
    return names


def _ridge(x: NDArray[Any], y: NDArray[Any], alphas: Float64) -> Callable[[NDArray[Any]], Float64]:
    """Fit one ridge for each alpha on one Gram matrix; what returns predicts (n, k) -> (n, alpha)."""
    scaler = StandardScaler(copy=False)  # float64: weak ridges on spectra are close to singular
    standardised = scaler.fit_transform(x.astype(np.float64))
    mean = np.mean(y, dtype=np.float64)
    targets = np.repeat((y - mean)[:, None], len(alphas), axis=1)
    ridge = Ridge(alphas, fit_intercept=False, copy_X=False, solver="cholesky").fit(standardised, targets)
    coefficients = ridge.coef_.reshape(len(alphas), -1).T

    def predict(cells: NDArray[Any]) -> Float64:
        blocks = (cells[i : i + PREDICTED].astype(np.float64) for i in range(0, len(cells), PREDICTED))
        return np.concatenate([scaler.transform(block) @ coefficients + mean for block in blocks])

    return predict


def _whitening(x: NDArray[Any]) -> Callable[[NDArray[Any]], Float32]:
    """To the principal axes of standardised features, each scaled to variance 1; fitted on (n, k), n at least 2.

    Of features that are all constant it makes a single 0.
    """
    scaler = StandardScaler()
    standardised = scaler.fit_transform(x.astype(np.float64))
    if standardised.var(axis=0).max() < 0.5:  # of a feature that varies it is 1
        matrix = np.zeros((x.shape[1], 1))
    else:
        axes = PCA(svd_solver="covariance_eigh").fit(standardised)
        variance = axes.explained_variance_
        kept = variance > LEAST_VARIANCE * variance[0]
        matrix = axes.components_[kept].T / np.sqrt(variance[kept])

    def whiten(cells: NDArray[Any]) -> Float32:
        blocks = (cells[i : i + PREDICTED].astype(np.float64) for i in range(0, len(cells), PREDICTED))
        return np.concatenate([(scaler.transform(block) @ matrix).astype(np.float32) for block in blocks])

    return whiten


def _forward(network: nn.Module, x: Tensor) -> Tensor:
    """(n, k) -> (n), without dropout, batch by batch on the network's device."""
    device = next(network.parameters()).device
    network.eval()
    with torch.inference_mode():
        return torch.cat([network(part.to(device)).squeeze(1) for part in torch.split(x, PREDICTED)])


def _train(
    network: nn.Module, fitted: tuple[Tensor, Tensor], left_out: tuple[Tensor, Tensor]
) -> dict[str, list[float]]:
    """Train until the cells left out have gained nothing for a while, and keep the best weights.

    Returns:
        `epoch`, and after each the mean squared errors `training` and `validation`, without dropout.
    """
    x, y = fitted
    judged = {"training": (x[::SEEN], y[::SEEN]), "validation": left_out}
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    curves: dict[str, list[float]] = {"epoch": [], "training": [], "validation": []}
    best, kept = np.inf, network.state_dict()
    for epoch in range(MAX_EPOCHS + 1):
        if epoch:
            network.train()
            for index in torch.split(torch.randperm(len(x)).to(x.device), BATCH):
                loss = nn.functional.mse_loss(network(x[index]).squeeze(1), y[index])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        curves["epoch"].append(epoch)
        for name, (features, target) in judged.items():
            curves[name].append(nn.functional.mse_loss(_forward(network, features), target).item())
        if curves["validation"][-1] < best:
            best, kept = curves["validation"][-1], deepcopy(network.state_dict())
        elif epoch - int(np.argmin(curves["validation"])) >= PATIENCE:
            break
    network.load_state_dict(kept)
    return curves
