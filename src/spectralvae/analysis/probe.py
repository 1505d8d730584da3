"""The command `probe`: what latents tell of level-2 products, beside controls.

Memory: with all products and probes about 76 bytes for each cell of every scene, and about 700 for each test cell; two
spectra for each cell that is fitted on, and a few times the cells of one fit in float64 while it runs; four spectra
for each cell of one scene; the strips of the network (see `Coder`). Spectra of pixels are streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from spectralvae.analysis.probe_data import (
    Grid,
    Question,
    Roles,
    assign_roles,
    choose_cells,
    coordinates_of,
    geometry_names,
    groups_of,
    questions_of,
    read_grid,
)
from spectralvae.analysis.probe_features import APPLIED, FITTED, Bases, decode_cells, encode_cells
from spectralvae.analysis.probe_report import print_summary, write_page
from spectralvae.analysis.probe_results import Answer, Counts, Results, check_control, judge, write_numbers
from spectralvae.analysis.regressors import Fitted, fit_linear, fit_mlp
from spectralvae.config import ProbeConfig
from spectralvae.data.prepare import Stages
from spectralvae.data.store import Store
from spectralvae.errors import InputError
from spectralvae.inference.coder import Coder
from spectralvae.runtime.console import new_progress, warn
from spectralvae.runtime.device import choose_device
from spectralvae.runtime.ranks import Ranks
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import stop_at_once
from spectralvae.weights.artifact import Artifact
from spectralvae.weights.loading import load_artifact

MIN_SCENES = 2  # that are fitted on: probes choose their complexity on scenes held back
ENOUGH_SCENES = 16  # to test on: fewer are told

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
T = TypeVar("T")


def probe(config: ProbeConfig, run: RunDir, console: Console) -> None:
    """Fit probes on scenes that the model was trained on, test them on those it was validated on, write all of it.

    Args:
        config: of the command.
        run: its output directory.
        console: where to print.

    Raises:
        ConfigError, InputError: model, store and filters do not fit together; nothing was written.
        RunError: targets of other cells were predicted, so that the other results cannot be right either; all is
            written.
    """
    stages = Stages()
    with stages.timed("level 2"):
        study = _plan(config, run, console)
    with run, stop_at_once():
        with stages.timed("encoding"):
            sample = _sample(study)
        with stages.timed("fitting"):
            fits = _fit(study, sample)
        with stages.timed("testing"):
            answers = _answer(study, sample.bases, fits)
        with stages.timed("results"):
            curves = {q: _by_probe({key: fit.curves for key, fit in found.items()}) for q, found in fits.items()}
            results = Results(study.store, answers, study.counts, judge(answers, config.seed), curves, study.remarks)
            write_numbers(run.path, results, study.coder)
            write_page(run.path, results, config, study.coder)
        run.note(
            **study.coder.identity,
            model=str(study.coder.path),
            store_hash=study.store.hash,
            counts={q.name: vars(counts) for q, counts in study.counts.items()},
            geometry=geometry_names(study.coordinates),
            fits={q.name: _by_probe({key: fit.facts for key, fit in found.items()}) for q, found in fits.items()},
            remarks=study.remarks,
            stages=stages.facts,
        )
        print_summary(results, run.path, console)
        check_control(results.scores)


# --- what is asked --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What is to be done, all of it checked.

    Attributes:
        config: of the command.
        store: the scenes.
        coder: the network.
        roles: of the scenes.
        coordinates: those that all scenes have.
        grids: of all scenes with a role, by their numbers.
        chosen: for each question the flat positions of the cells to fit on, by scene.
        counts: of pixels and cells, by question.
        remarks: what readers of the results should know.
    """

    config: ProbeConfig
    store: Store
    coder: Coder
    roles: Roles
    coordinates: list[str]
    grids: dict[int, Grid]
    chosen: dict[Question, dict[int, NDArray[np.int64]]]
    counts: dict[Question, Counts] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def targets(self, question: Question, shuffled: bool) -> tuple[Float64, dict[int, Float64]]:
        """Targets of the cells to fit on, and of all test cells by scene; shuffled: each of another of all of them."""
        fit = [self.grids[i].targets[question].ravel()[cells] for i, cells in self.chosen[question].items()]
        test = [self.test_targets(question, i) for i in self.roles.test]
        together = np.concatenate([*fit, *test]).astype(np.float64)
        if shuffled:
            together = np.random.default_rng(self.config.seed).permutation(together)
        n_fit = sum(map(len, fit))
        parts = np.split(together[n_fit:], np.cumsum([len(part) for part in test])[:-1])
        return together[:n_fit], dict(zip(self.roles.test, parts, strict=True))

    def scenes(self, question: Question) -> list[int]:
        """Those with cells to fit on."""
        return [i for i, cells in self.chosen[question].items() if len(cells)]

    def test_targets(self, question: Question, scene: int) -> Float32:
        """Of those cells of a scene that count."""
        targets = self.grids[scene].targets[question]
        return targets[np.isfinite(targets)]


def _plan(config: ProbeConfig, run: RunDir, console: Console) -> Study:
    """Check all that can be checked without the network."""
    for key, path in (("model", config.model), ("store", config.store)):
        run.refuse_inside(key, path)
        run.refuse_within(key, path)
    store = Store(config.store)
    artifact = load_artifact(config.model)
    roles = assign_roles(store, artifact.provenance, artifact.path)
    _check_normalization(artifact, store)
    questions = questions_of(config.products, config.filter, store)
    coder = Coder(
        artifact,
        choose_device(config.device, Ranks(), console, key="device"),
        overlap=None,
        batch_size=config.batch_size,
    )
    step = "" if artifact.step is None else f", step {artifact.step}"
    console.print(f"model: {artifact.path}{step}")
    console.print(f"store: {store.path}: {len(roles.fit)} scenes to fit on, {len(roles.test)} to test on")
    scenes = [*roles.fit, *roles.test]
    coordinates, unknown = coordinates_of(store, scenes)
    grids = {}
    for i in _shown(scenes, "level 2 (scenes)"):
        store.check_files(i)
        grids[i] = read_grid(store, i, questions, coordinates, coder.scale)
    chosen = {}
    for q in questions:
        counted = [np.isfinite(grids[i].targets[q]) for i in roles.fit]
        chosen[q] = dict(zip(roles.fit, choose_cells(counted, config.n_cells, config.seed), strict=True))
    study = Study(config, store, coder, roles, coordinates, grids, chosen, remarks=[*roles.remarks, *unknown])
    for q in questions:
        study.counts[q] = _count(study, q)
        console.print(f"{q.name}: {study.counts[q]}")
    study.remarks.extend([*_on_groups(study), *_on_intervals(study.counts)])
    for remark in study.remarks:
        warn(console, remark)
    return study


def _on_groups(study: Study) -> list[str]:
    one_day = [q.name for q in study.chosen if groups_of([study.store.scenes[i] for i in study.scenes(q)])[1]]
    if not one_day:
        return []
    return [
        f"all scenes to fit on are of one day, so probes chose their complexity on scenes of weather that they had "
        f"seen, for {'; '.join(one_day)}"
    ]


def _on_intervals(counts: dict[Question, Counts]) -> list[str]:
    """How far to trust intervals over few scenes; the figures are those of `scores`."""
    remarks = []
    for n in sorted({c.test_scenes for c in counts.values() if c.test_scenes < ENOUGH_SCENES}):
        if n == 1:
            what = "with 1 test scene there are no 95 % intervals"
        elif n < 4:
            what = f"with {n} test scenes the 95 % intervals mean little"
        else:
            what = (
                f"with {n} test scenes the 95 % intervals are too narrow: in simulations they held the truth in "
                "75-81 % (4 scenes), 83-90 % (8)"
            )
        remarks.append(f"{what}; so it is of {'; '.join(q.name for q, c in counts.items() if c.test_scenes == n)}")
    return remarks


def _check_normalization(artifact: Artifact, store: Store) -> None:
    ours = store.normalization.sha256()
    theirs = artifact.normalization.sha256() if artifact.normalization else "none"
    if theirs != ours:
        raise InputError(
            f"its normalisation (SHA-256 {ours[:16]}...) is not that of the model {artifact.path} ({theirs[:16]}...)",
            key="store",
            path=store.path,
            remedy="give the store that the model was trained on, or one prepared with that store as "
            "normalization.statistics",
        )


def _count(study: Study, q: Question) -> Counts:
    """How much there is of a question.

    Raises:
        InputError: too little to fit or test on, or nothing to learn.
    """
    roles, grids = study.roles, study.grids
    valid, clear, pixels = map(sum, zip(*(grids[i].pixels[q] for i in (*roles.fit, *roles.test)), strict=True))
    fit = [int(np.isfinite(grids[i].targets[q]).sum()) for i in roles.fit]
    test = [len(study.test_targets(q, i)) for i in roles.test]
    chosen = [len(cells) for cells in study.chosen[q].values()]
    counts = Counts(
        valid_pixels=valid,
        clear_pixels=clear,
        pixels=pixels,
        left_out_cells=sum(grid.left_out[q] for grid in grids.values()),
        max_cloud_fraction=q.max_cloud_fraction,
        max_solar_zenith=q.max_solar_zenith,
        fit_cells_found=sum(fit),
        fit_cells=sum(chosen),
        fit_scenes=len(study.scenes(q)),
        test_cells=sum(test),
        test_scenes=int(np.count_nonzero(test)),
    )
    least = study.coder.model.embed_dim + 1  # principal components need more cells than there are
    short = {
        "no test cell is left": not counts.test_cells,
        f"fewer than {MIN_SCENES} scenes have cells to fit on": counts.fit_scenes < MIN_SCENES,
        f"fewer than {least} cells are left to fit on": counts.fit_cells < least,
        "all cells to fit on have the same target": len(np.unique(study.targets(q, shuffled=False)[0])) < 2,
    }
    for what, is_short in short.items():
        if is_short:
            more = "a wider filter" if q.filtered else "more scenes"
            remedy = f"give a larger n_cells or {more}, or take {q.product} out of products"
            raise InputError(f"{q.name}: {what} ({counts})", key="products", path=study.store.path, remedy=remedy)
    return counts


# --- the work -------------------------------------------------------------------------------------

Key = tuple[str, str]  # probe, features


@dataclass(frozen=True)
class Sample:
    """The cells that anything is fitted on.

    Attributes:
        cells: by scene, their flat positions, in order.
        features: (cell, k) each, the scenes one after the other.
        bases: principal components of them.
    """

    cells: dict[int, NDArray[np.int64]]
    features: dict[str, Float32]
    bases: Bases

    def rows(self, chosen: dict[int, NDArray[np.int64]]) -> NDArray[np.int64]:
        """Where some of the cells are."""
        first = np.cumsum([0, *map(len, self.cells.values())])
        return np.concatenate(
            [n + np.searchsorted(self.cells[i], chosen[i]) for n, i in zip(first, self.cells, strict=False)]
        )


def _sample(study: Study) -> Sample:
    """Encode the scenes to fit on, and keep the cells that were chosen for any question."""
    store, coder = study.store, study.coder
    cells = {i: np.unique(np.concatenate([chosen[i] for chosen in study.chosen.values()])) for i in study.roles.fit}
    n = sum(map(len, cells.values()))
    spectra = np.empty((n, coder.normalization.n_channels), np.float32)
    middles = np.empty_like(spectra, store.dtype)
    latents = np.empty((n, coder.model.embed_dim), np.float32)
    done = 0
    for i, positions in _shown(cells.items(), "encoding (scenes)"):
        encoded = encode_cells(store, i, coder)
        part = slice(done, done := done + len(positions))
        for rows, grid in ((latents, encoded.latents), (spectra, encoded.spectra), (middles, encoded.middles)):
            rows[part] = grid.reshape(-1, grid.shape[-1])[positions]
    bases = Bases.fit(spectra, middles, coder)
    geometry = np.concatenate([_flat(study.grids[i].geometry)[positions] for i, positions in cells.items()])
    features = {"latents": latents, "pca": bases.features(spectra), "raw": spectra, "shuffled": latents}
    return Sample(cells, features | ({"geometry": geometry} if geometry.shape[1] else {}), bases)


def _fit(study: Study, sample: Sample) -> dict[Question, dict[Key, Fitted]]:
    """All probes of all features, for all questions; they choose their complexity on days held back."""
    config = study.config
    wanted = [
        (q, features, name)
        for q in study.chosen
        for features in FITTED
        if features in sample.features
        for name in config.probes
    ]
    fits: dict[Question, dict[Key, Fitted]] = {q: {} for q in study.chosen}
    for q, features, name in _shown(wanted, "fitting (probes)"):
        x = sample.features[features][sample.rows(study.chosen[q])]
        y, _ = study.targets(q, features == "shuffled")
        groups, _ = groups_of([study.store.scenes[i] for i in study.scenes(q)])
        group = np.repeat(groups, [len(study.chosen[q][i]) for i in study.scenes(q)])
        if name == "linear":
            fitted = fit_linear(x, y, group, seed=config.seed)
        else:
            fitted = fit_mlp(x, y, group, seed=config.seed, device=study.coder.device)
        fits[q][name, features] = fitted
    weakest = [
        f"{q.name}: {key[1]}" for q in fits for key, fit in fits[q].items() if fit.facts.get("edge") == "weakest"
    ]
    if weakest:
        study.remarks.append(
            f"the ridge took the weakest of all strengths tried, and might want a weaker one, for {'; '.join(weakest)}"
        )
    untrained = [
        f"{q.name}: {features}"
        for q in fits
        for (_, features), fit in fits[q].items()
        if fit.facts.get("epoch") == 0 and features != "shuffled"
    ]
    if untrained:
        study.remarks.append(
            "the network did best before it had learnt anything, judged by the days held back, so its R2 says nothing, "
            f"for {'; '.join(untrained)}"
        )
    return fits


def _answer(study: Study, bases: Bases, fits: dict[Question, dict[Key, Fitted]]) -> dict[Question, Answer]:
    """What all probes predict for all test cells, scene by scene, the linear ones also for decoded spectra."""
    parts: dict[Question, list[Answer]] = {q: [] for q in fits}
    shuffled = {q: study.targets(q, shuffled=True)[1] for q in fits}
    for i in _shown(study.roles.test, "testing (scenes)"):
        features = _test_features(study, i, bases)
        for q, found in fits.items():
            targets = study.grids[i].targets[q]
            cells = np.flatnonzero(np.isfinite(targets))
            predictions = {}
            for (name, fitted_on), fit in found.items():
                applied = [key for key, of in APPLIED.items() if (name, fitted_on) == ("linear", of)]
                for tested_on in (fitted_on, *applied):
                    x = features[tested_on][cells]
                    predictions[name, tested_on] = _predict(fit.predict, x)
            parts[q].append(Answer.of_scene(i, study.grids[i], cells, targets, shuffled[q][i], predictions))
    return {q: Answer.joined(parts.pop(q)) for q in fits}  # each freed before the next is joined


def _predict(predict: Callable[[NDArray[Any]], Float64], x: Float32) -> Float32:
    return predict(x).astype(np.float32) if len(x) else np.empty(0, np.float32)


def _test_features(study: Study, scene: int, bases: Bases) -> dict[str, Float32]:
    """(cell, k) of all cells of a scene."""
    decoding = "linear" in study.config.probes
    encoded = encode_cells(study.store, scene, study.coder, bases if decoding else None)
    grids = {
        "latents": encoded.latents,
        "shuffled": encoded.latents,
        "pca": bases.features(encoded.spectra),
        "raw": encoded.spectra,
        "geometry": study.grids[scene].geometry,
    }
    if decoding:
        assert encoded.from_pca is not None
        grids["decoded"] = decode_cells(study.store, scene, study.coder, encoded.latents)
        grids["decoded_pca"] = encoded.from_pca
    return {name: _flat(grid) for name, grid in grids.items()}


def _flat(grid: Float32) -> Float32:
    """(h, w, k) -> (cell, k)."""
    h, w, k = grid.shape
    return grid.reshape(h * w, k)  # k may be 0


def _by_probe(found: dict[Key, Any]) -> dict[str, dict[str, Any]]:
    """probe -> features -> what was found."""
    nested: dict[str, dict[str, Any]] = {}
    for (name, features), value in found.items():
        nested.setdefault(name, {})[features] = value
    return nested


def _shown(items: Iterable[T], text: str) -> Iterator[T]:
    """The items, with a progress bar while they are gone through."""
    items = list(items)
    with new_progress() as progress:
        yield from progress.track(items, description=text)
