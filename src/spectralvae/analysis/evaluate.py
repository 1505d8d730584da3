"""How good the checkpoints of a run are, beside PCA of each pixel and the mean, on all its validation tiles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from spectralvae.analysis.baselines import Baselines
from spectralvae.analysis.evaluation import (
    Channels,
    Evaluation,
    Judged,
    LatentUse,
    SceneScore,
    to_json,
    write_tables,
)
from spectralvae.analysis.evaluation_figures import save_figures
from spectralvae.analysis.judging import Advance, Judge, Tiles
from spectralvae.analysis.metrics import (
    Errors,
    Latents,
    Truth,
    channel_errors,
    mean_radiance,
    metrics_of,
    scene_metrics,
)
from spectralvae.analysis.report import write_evaluation_report
from spectralvae.config import EvaluateConfig
from spectralvae.config.training import DataConfig
from spectralvae.data.loader import grid_crops, read_crops
from spectralvae.data.pca import PixelPCA
from spectralvae.data.sampling import evenly
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError, InputError
from spectralvae.runtime.atomic import write_atomic
from spectralvae.runtime.console import new_progress, warn
from spectralvae.runtime.device import choose_device, peak_memory
from spectralvae.runtime.placement import exact_float32
from spectralvae.runtime.ranks import Ranks
from spectralvae.runtime.rundir import RunDir, command_of
from spectralvae.runtime.signals import stop_at_once
from spectralvae.training import record
from spectralvae.training.validation import ACTIVE_VARIANCE, REFERENCE_TILES
from spectralvae.weights.artifact import Artifact, read_artifact
from spectralvae.weights.checkpoint import list_checkpoints, step_of
from spectralvae.weights.normalization import EPSILON, Float64

COMPONENTS = (1, 2, 4, 8, 16, 32)
FIT_PIXELS = 2**16  # at least, where there are so many: 64 tiles as in training, and more if they are small
N_WORST = 3
N_VIEWS = 6


def evaluate(config: EvaluateConfig, run: RunDir, console: Console) -> None:
    """Judge checkpoints of a run, and write tables, pictures and a page into ``run``'s directory.

    Reconstructions, also those of the baselines, are clipped as `decode` clips them.

    Args:
        config: of the command.
        run: its output directory.
        console: where to print.

    Raises:
        ConfigError: there is no such checkpoint, or the directory is no place for results.
        InputError: it is no training run, a checkpoint is damaged, or the store is not the one it was trained on.
        RunError: a checkpoint gives values that are not finite.
    """
    subject = _admit(config, console)
    for key, path in (("run", config.run), ("run", subject.store.path)):
        run.refuse_within(key, path)
        run.refuse_inside(key, path)
    device = choose_device(config.device, Ranks(), console, key="device")
    tiles = Tiles(subject.store, subject.data.tile_size, subject.data.max_invalid_fraction)
    n = len(subject.checkpoints)
    console.print(
        f"{n} checkpoint{'s' * (n > 1)}, {len(tiles.crops)} validation tiles of {len(tiles.scenes)} scenes "
        f"({tiles.n_left_out} more are left out: too many invalid samples)"
    )
    remarks = _remarks(subject, tiles)
    for remark in remarks:
        warn(console, remark)
    baselines = _fit_baselines(subject, device)
    with run, stop_at_once(), torch.no_grad(), exact_float32():
        run.note(versions=record.versions(), device=record.describe_device(device), store_hash=subject.store.hash)
        found = _judge_all(subject, Judge(tiles, device, config.batch_size), baselines, remarks)
        _write(found, subject, run.path)
        run.note(peak_memory_gb=round(peak_memory(device) / 1e9, 2))
    _print_table(found, console)
    for name in ("report.html", "report.json"):
        console.print(str(run.path / name))


# --- what is judged -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """A training run, as far as it is judged.

    Attributes:
        path: of the run.
        store: what it was trained on.
        data: its `data:` section.
        checkpoints: by step.
        ancestors: identities of the scenes that weights were trained on from which any checkpoint began; None where
            one does not know.
    """

    path: Path
    store: Store
    data: DataConfig
    checkpoints: dict[int, Path]
    ancestors: set[str] | None


def _admit(config: EvaluateConfig, console: Console) -> _Subject:
    """Open a run and its store; every checkpoint that will be judged is loaded once.

    Raises:
        ConfigError, InputError: something of it will not do.
    """
    path = config.run
    run_record, data = _read_record(path)
    checkpoints = _choose(config, run_record)
    store = _open_store(path, run_record, data)
    training = run_record["config"].get("training", {})
    if config.checkpoints == "all" and run_record.get("state") == "running" and training.get("keep_last"):
        warn(
            console,
            f"{path} is still running, and training.keep_last may delete a checkpoint before it is judged, which would "
            "cost all results: judge `checkpoints: best` or a list of steps, or wait until it is finished",
        )
    ancestors: set[str] | None = set()
    for checkpoint in checkpoints.values():
        provenance = _load(checkpoint, store).provenance
        known = (provenance.ancestry() if provenance else None) if training.get("init_from") else []
        ancestors = None if ancestors is None or known is None else ancestors | set(known)
    return _Subject(path, store, data, checkpoints, ancestors)


def _read_record(path: Path) -> tuple[dict[str, Any], DataConfig]:
    """run.json of a training run, and its `data:` section."""
    if not path.is_dir():
        raise InputError("no such folder", key="run", path=path, remedy="give the output_dir of a `spectralvae train`")
    command = command_of(path)
    if command != "train":
        what = f"was made by `spectralvae {command}`" if command else "has no run.json of this tool"
        remedy = "give the output_dir of a `spectralvae train`"
        raise InputError(f"is not a training run: it {what}", key="run", path=path, remedy=remedy)
    run_record = json.loads((path / "run.json").read_text())
    try:
        return run_record, DataConfig.model_validate(run_record["config"]["data"])
    except (KeyError, TypeError, ValueError) as error:
        problem = (
            f"its config.data is missing or invalid ({' '.join(str(error).split())}); corrupt, or another version's"
        )
        raise InputError(problem, key="run", path=path / "run.json") from error


def _choose(config: EvaluateConfig, run_record: dict[str, Any]) -> dict[int, Path]:
    """The checkpoints that the config asks for, by step."""
    there = {step_of(path): path for path in list_checkpoints(config.run)}
    if not there:
        remedy = "resume its `spectralvae train` until it saves one"
        raise InputError("has no checkpoints", key="run", path=config.run, remedy=remedy)
    wanted = config.checkpoints
    if wanted == "all":
        return there
    if wanted == "newest":
        steps = [max(there)]
    elif wanted == "best":
        if "best" not in run_record:
            problem, remedy = "no checkpoint was validated", "use newest, all or a list of steps"
            path = config.run / "run.json"
            raise InputError(problem, key="checkpoints", path=path, value=wanted, remedy=remedy)
        steps = [run_record["best"]["step"]]
    else:
        steps = sorted(wanted)
    if missing := [step for step in steps if step not in there]:
        limit = f"among the saved steps: {', '.join(map(str, there))}"
        raise ConfigError(key="checkpoints", path=config.run, value=missing, limit=limit)
    return {step: there[step] for step in steps}


def _open_store(path: Path, run_record: dict[str, Any], data: DataConfig) -> Store:
    """The store that a run was trained on."""
    if not data.store.is_dir():
        remedy = "move it back" if data.store.is_absolute() else "start this where the training was started"
        problem = f"no such folder, but {path} was trained on this store"
        raise InputError(problem, key="run", path=data.store, remedy=remedy)
    store = Store(data.store)
    if run_record.get("store_hash") != store.hash:
        hashes = f"hash {store.hash[:16]}..., not {str(run_record.get('store_hash'))[:16]}..."
        problem = f"this store has changed since {path} was trained on it ({hashes})"
        raise InputError(problem, key="run", path=store.path, remedy="put the old one back")
    if not store.indices("val"):
        problem = f"the store of {path} has no validation scenes to judge on"
        remedy = "prepare one with split.val_fraction above 0, and train on that"
        raise InputError(problem, key="run", path=store.path, remedy=remedy)
    return store


def _load(checkpoint: Path, store: Store) -> Artifact:
    artifact, _ = read_artifact(checkpoint)
    if artifact.normalization is None or artifact.normalization.sha256() != store.normalization.sha256():
        problem = f"its normalisation is not that of {store.path}: it belongs to another run"
        raise InputError(problem, key="run", path=checkpoint)
    return artifact


# --- the work -------------------------------------------------------------------------------------


def _remarks(subject: _Subject, tiles: Tiles) -> list[str]:
    """Whether the run began with weights that know scenes which are judged."""
    if subject.ancestors is None:
        return [
            "What the weights that this run began with were trained on is unknown: if it was on validation scenes, "
            "they look better reconstructed than unseen ones would."
        ]
    judged = {tiles.store.scenes[crop.scene].identity for crop in tiles.crops}
    if known := len(judged & subject.ancestors):
        return [
            f"{known} of the {len(judged)} validation scenes judged are among those that the weights were trained on "
            "with which this run began: they look better reconstructed than unseen ones would."
        ]
    return []


def _judge_all(subject: _Subject, judge: Judge, baselines: Baselines, remarks: list[str]) -> Evaluation:
    """Baselines once, then one checkpoint after the other; at last the best one is looked at."""
    store, tiles, noise = subject.store, judge.tiles, _noise(subject.store)
    with new_progress() as progress:
        truth, errors = judge.baselines(baselines, _bar(progress, "baselines (tiles)", len(tiles.crops)))

        def judged(errors: Errors, latents: LatentUse | None) -> Judged:
            metrics = metrics_of(truth, errors, judge.radiance, noise)
            channels = Channels(**channel_errors(truth, errors, judge.radiance, noise))
            return Judged(metrics, channels, _scene_scores(tiles, truth, errors), latents)

        checkpoints: dict[int, Judged] = {}
        shown, tile_mse = -1, np.zeros(0)
        for step, path in subject.checkpoints.items():
            artifact = _load(path, store)
            found = judge.network(artifact, _bar(progress, f"step {step} (tiles)", len(tiles.crops)))
            checkpoints[step] = judged(found.errors, _use(found.latents, artifact.model.scale))
            if shown < 0 or checkpoints[step].metrics["mse"] < checkpoints[shown].metrics["mse"]:
                shown, tile_mse = step, found.tile_mse
        artifact = _load(subject.checkpoints[shown], store)
        seen = sorted({crop.scene for crop in tiles.crops})
        seen = [seen[i] for i in evenly(len(seen), N_VIEWS)]
        show = _bar(progress, f"views of step {shown} (scenes)", len(seen))
        views = []
        for i, scene in enumerate(seen):
            views.append(judge.view(artifact, scene, in_full=i == 0))
            show(1)
    return Evaluation(
        run=str(subject.path),
        store=str(store.path),
        normalization=store.normalization,
        units=store.normalization.units,
        tile_size=tiles.tile_size,
        scale=artifact.model.scale,
        embed_dim=artifact.model.embed_dim,
        n_tiles=len(tiles.crops),
        n_left_out=tiles.n_left_out,
        n_samples=truth.n_samples,
        peak=truth.peak,
        mean_spectrum=mean_radiance(truth, judge.radiance),
        noise=noise,
        checkpoints=checkpoints,
        baselines={name: judged(found, None) for name, found in errors.items()},
        shown=shown,
        worst=judge.worst(artifact, tile_mse, N_WORST),
        views=views,
        remarks=remarks,
    )


def _fit_baselines(subject: _Subject, device: torch.device) -> Baselines:
    """Fit PCA on tiles that lie on a grid over the scenes that the run was trained on.

    All of them, or as many as training takes for its own comparison; more where these have less than `FIT_PIXELS`
    pixels. An invalid sample counts as z = 0, in the fit as in what is reconstructed.

    Raises:
        ConfigError: no tile of the training scenes is valid enough.
        InputError: there are too few pixels, or a file of a scene is lost or damaged.
    """
    store, data = subject.store, subject.data
    n_tiles = max(REFERENCE_TILES, FIT_PIXELS // data.tile_size**2)
    scenes = store.indices("train")[: data.max_scenes]
    crops = grid_crops(
        store,
        [scenes[i] for i in evenly(len(scenes), n_tiles)],
        tile_size=data.tile_size,
        max_invalid_fraction=data.max_invalid_fraction,
        at_most=n_tiles,
    )
    components = [k for k in COMPONENTS if k < store.normalization.n_channels]
    with new_progress() as progress:
        advance = _bar(progress, "fitting PCA (training tiles)", len(crops))

        def tiles() -> Iterator[NDArray[Any]]:
            for crop in crops:
                yield read_crops(store, [crop], data.tile_size)[0].numpy()
                advance(1)

        return Baselines(PixelPCA.fit(tiles(), max(components, default=0)), components, device)


def _bar(progress: Progress, text: str, total: int) -> Advance:
    return partial(progress.advance, progress.add_task(text, total=total))


def _noise(store: Store) -> Float64 | None:
    """(C): the noise in z, NaN where unknown; None if nothing is known of it.

    A small relative error of radiance is the same error of its logarithm. The store has it by channel: the median of
    radiance_error / radiance over the training scenes.
    """
    if store.normalization.transform != "log_zscore" or "noise" not in store.arrays:
        return None
    noise = store.arrays["noise"] / (store.normalization.std + EPSILON)
    return np.where(noise > 0, noise, np.nan)


def _scene_scores(tiles: Tiles, truth: Truth, errors: Errors) -> list[SceneScore]:
    records = [tiles.store.scenes[scene] for scene in tiles.scenes]
    found = zip(records, truth.scenes[:, 0], scene_metrics(truth, errors), strict=True)
    return [SceneScore(scene.id, scene.time, int(n), metrics) for scene, n, metrics in found]


def _use(latents: Latents, scale: int) -> LatentUse:
    bits = latents.bits
    return LatentUse(bits, float(bits.sum()) / scale**2, int((latents.variance > ACTIVE_VARIANCE).sum()))


# --- what is left behind --------------------------------------------------------------------------


def _write(found: Evaluation, subject: _Subject, folder: Path) -> None:
    """All files but those that tell of the command itself."""
    facts = {"store_hash": subject.store.hash, "versions": record.versions()}
    content = json.dumps(to_json(found, facts), indent=2, allow_nan=False)
    write_atomic(folder / "report.json", content + "\n")
    write_tables(found, folder)
    pictures = save_figures(found, folder / "figures")
    write_evaluation_report(
        folder / "report.html", found, {title: path.read_bytes() for title, path in pictures.items()}
    )


def _print_table(found: Evaluation, console: Console) -> None:
    """The best checkpoint beside the baselines that matter most."""
    rows = {f"step {found.shown}": found.checkpoints[found.shown]}
    names = {"pca_1": "PCA, 1 component", "pca_2": "PCA, 2 components", "pca_8": "PCA, 8 components", "mean": "mean"}
    rows |= {text: found.baselines[name] for name, text in names.items() if name in found.baselines}
    columns = {"mse": "MSE of z", "noise_ratio": "RMSE in noise", "spectral_angle": "spectral angle, deg"}
    if found.noise is None:
        del columns["noise_ratio"]
    console.print(" " * 20 + "".join(f"{title:>22}" for title in columns.values()))
    for text, judged in rows.items():
        console.print(f"{text:20}" + "".join(f"{judged.metrics[name]:>22.4g}" for name in columns))
