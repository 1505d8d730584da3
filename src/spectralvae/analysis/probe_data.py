"""What probes are fitted and tested on: which scenes, and the targets and features of their latent cells.

Shapes: a scene is (y, x) pixels and C channels, its grid of latents (h, w) cells of s x s pixels, fewer at its ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from spectralvae.config import FilterConfig
from spectralvae.data.cells import LEAST_VALID, cell_means, cell_sums
from spectralvae.data.splits import DAY_OFFSET
from spectralvae.data.store import SceneRecord, Store, beside_digest, scene_folder
from spectralvae.data.targets import TargetTransform
from spectralvae.errors import InputError
from spectralvae.inference.latents import on_grid
from spectralvae.readers.base import ANGLES, COORDINATES
from spectralvae.readers.products import PRODUCTS
from spectralvae.weights.normalization import Float64
from spectralvae.weights.provenance import Provenance

CLOUDS = "CLDO4"
DAY_SECONDS = 86_400

Float32 = NDArray[np.float32]


# --- scenes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roles:
    """What the scenes of a store are for.

    Attributes:
        fit: numbers of the scenes that probes are fitted on.
        test: numbers of the scenes that they are tested on: all that the model was validated on.
        remarks: what readers of the results should know of this.
    """

    fit: list[int]
    test: list[int]
    remarks: list[str] = field(default_factory=list)


def assign_roles(store: Store, provenance: Provenance | None, model: Path) -> Roles:
    """Tell which scenes of a store to fit on and which to test on, by the digests that the model remembers.

    A scene that the model never saw is fitted on, too.

    Args:
        store: the scenes.
        provenance: the model's.
        model: its path, for messages.

    Raises:
        InputError: the model does not remember its scenes; the store has none of one side; weights that it began
            with were trained on a test scene; or an unknown scene is, or may be, of the day of a test scene, so that
            what was fitted on the one would be tested on the other.
    """
    if not provenance or provenance.training.identities is None or provenance.validation.identities is None:
        raise InputError(
            "does not say which scenes it was trained and validated on (it comes from an older version or another "
            "tool), so the test could include training scenes",
            key="model",
            path=model,
            remedy="train it with this version",
        )
    training, validation = set(provenance.training.identities), set(provenance.validation.identities)
    numbered = list(enumerate(store.scenes))
    test = [i for i, scene in numbered if scene.identity in validation]
    fit = [i for i, scene in numbered if scene.identity not in validation]
    for role, found, wanted in (("test", test, validation), ("fit", fit, training)):
        if not found:
            what = (
                f"none of the {len(wanted)} scenes that the model was validated on" if role == "test" else "no others"
            )
            problem = f"holds {what}, so probes have nothing to {role} on"
            remedy = "give a store with training and validation scenes of the model, such as its own"
            raise InputError(problem, key="store", path=store.path, remedy=remedy)
    sides = [store.scenes[i] for i in fit], [store.scenes[i] for i in test]
    _check_test(*sides, provenance, store.path)
    return Roles(fit, test, _remarks(*sides, provenance))


def _check_test(fit: Sequence[SceneRecord], test: Sequence[SceneRecord], provenance: Provenance, store: Path) -> None:
    """Refuse test scenes that ancestors were trained on, and scenes new to the model that may be of their days."""
    for scene in test:
        if scene.identity in (provenance.ancestry() or ()):
            problem = f"the initial weights of the model were trained on the test scene {scene.id}"
            raise InputError(problem, key="store", path=store, remedy="prepare the store without it")
    test_days = {_day(scene) for scene in test}
    for scene in fit:
        day = _day(scene)
        if scene.identity in (provenance.training.identities or ()):
            continue
        if day is None:
            when = "has no time, so it may be of the day of a test scene"
        elif day in test_days:
            when = f"is of {day} (UTC - 6 h), the day of a test scene"
        elif None in test_days:
            when = "may be of the day of a test scene, for one of these has no time"
        else:
            continue
        problem = f"scene {scene.id}, which the model never saw, {when}"
        raise InputError(problem, key="store", path=store, remedy="prepare the store without it")


def _remarks(fit: Sequence[SceneRecord], test: Sequence[SceneRecord], provenance: Provenance) -> list[str]:
    shared = sorted({day for s in fit if (day := _day(s))} & {day for s in test if (day := _day(s))})
    days = ", ".join(map(str, shared))
    n_here, n_all = len({scene.identity for scene in test}), len(set(provenance.validation.identities or ()))
    own = set(provenance.training.identities or ())
    remarks = {
        f"fit and test scenes share days ({days}), so test scenes are of weather that was seen": bool(shared),
        f"{n_here} of {n_all} validation scenes of the model are in this store": n_here < n_all,
        "none of the model's own training scenes is in this store: probes are fitted on scenes that it never saw": (
            not any(scene.identity in own for scene in fit)
        ),
        "the run began with weights that do not say what they were trained on: test scenes may have been among that": (
            provenance.ancestry() is None
        ),
    }
    return [remark for remark, is_due in remarks.items() if is_due]


def groups_of(scenes: Sequence[SceneRecord]) -> tuple[list[str], bool]:
    """What probes hold back together when they choose their complexity: a day, or a scene without a time.

    Returns:
        The group of each scene; and whether all are of one day: then each scene is a group of its own.
    """
    groups = [str(_day(scene) or scene.id) for scene in scenes]
    one_day = len(scenes) > 1 and len(set(groups)) == 1
    return [scene.id for scene in scenes] if one_day else groups, one_day


def _day(scene: SceneRecord) -> date | None:
    return None if scene.time is None else (datetime.fromisoformat(scene.time) - DAY_OFFSET).date()


# --- questions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A product, and which of its pixels count.

    Attributes:
        product: its name.
        filtered: whether these are those that the config asks for; without limits, all of good quality.
        transform: values to targets, with the statistics of the store's training scenes.
        max_cloud_fraction, max_solar_zenith: limits of a pixel, the latter in degrees; None: any will do.
    """

    product: str
    filtered: bool
    transform: TargetTransform
    max_cloud_fraction: float | None = None
    max_solar_zenith: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        if self.filtered and self.max_cloud_fraction is None and self.max_solar_zenith is None:
            return self.product
        return f"{self.product}, {'filtered' if self.filtered else 'unfiltered'}"


def questions_of(products: Iterable[str], limits: FilterConfig, store: Store) -> list[Question]:
    """Each product filtered and, where that leaves out other pixels, unfiltered. Clouds are never filtered.

    Raises:
        InputError: the store lacks a product, or what a filter needs.
    """
    transforms = {name: TargetTransform.from_attributes(t) for name, t in store.attributes.get("targets", {}).items()}
    questions = []
    for product in products:
        if product not in transforms:
            has = ", ".join(transforms) or "none"
            problem = f"the store has no {product} (it has {has})"
            remedy = f"take it out, or prepare the store with `l2: {{{product}: ...}}`"
            raise InputError(problem, key="products", path=store.path, remedy=remedy)
        if product == CLOUDS or (limits.max_cloud_fraction is None and limits.max_solar_zenith is None):
            questions.append(Question(product, True, transforms[product]))
            continue
        _check_filter(limits, transforms, store)
        questions.append(
            Question(product, True, transforms[product], limits.max_cloud_fraction, limits.max_solar_zenith)
        )
        questions.append(Question(product, False, transforms[product]))
    return questions


def _check_filter(limits: FilterConfig, transforms: Mapping[str, TargetTransform], store: Store) -> None:
    clouds = transforms.get(CLOUDS)
    if limits.max_cloud_fraction is not None and (
        clouds is None or not PRODUCTS[CLOUDS].holds_for(clouds.field, clouds.units)
    ):
        has = f"l2/{CLOUDS} of {clouds.field}" if clouds else f"no l2/{CLOUDS}"
        raise InputError(
            f"needs cloud fractions, but the store has {has}",
            key="filter.max_cloud_fraction",
            path=store.path,
            value=limits.max_cloud_fraction,
            remedy=f"set it to null, or prepare the store with `l2: {{{CLOUDS}: ...}}`",
        )
    angle = "solar_zenith_angle"
    if limits.max_solar_zenith is not None:
        for scene in store.scenes:
            if not (scene_folder(store.path, scene.id) / angle).is_dir():
                raise InputError(
                    f"needs {angle}, which scene {scene.id} lacks",
                    key="filter.max_solar_zenith",
                    path=store.path,
                    value=limits.max_solar_zenith,
                    remedy="set it to null",
                )


# --- what is known of cells without their spectra -------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The cells of a scene, but for what z tells.

    Attributes:
        targets: by question, (h, w) float32, NaN where a cell does not count.
        pixels: by question: how many are valid, have few enough clouds as well, and the sun high enough as well.
        left_out: by question: how many cells have a target, but do not count.
        geometry: (h, w, k) float32; k as many as `geometry_names`.
        latitude, longitude: (h, w) float32 in degrees; NaN where unknown.
        time: (h) seconds since 1970, mean of a cell's rows; NaN where unknown.
    """

    targets: dict[Question, Float32]
    pixels: dict[Question, tuple[int, int, int]]
    left_out: dict[Question, int]
    geometry: Float32
    latitude: Float32
    longitude: Float32
    time: Float64


def coordinates_of(store: Store, scenes: Iterable[int]) -> tuple[list[str], list[str]]:
    """The coordinates that all of these scenes have, and a remark on each that is unknown all over one of them."""
    folders = [scene_folder(store.path, store.scenes[i].id) for i in scenes]
    names, remarks = [], []
    for name in COORDINATES:
        if all((folder / name).is_dir() for folder in folders):
            unknown = [folder.name for folder in folders if np.isnan(_read(folder, name)).all()]
            if unknown:
                remarks.append(f"{name} is unknown all over scene {unknown[0]}, so geometry goes without it")
            else:
                names.append(name)
    return names, remarks


def _read(folder: Path, name: str) -> NDArray[Any]:
    """An array of a scene."""
    return np.asarray(zarr.open_array(folder / name, mode="r")[...])


def geometry_names(coordinates: Sequence[str]) -> list[str]:
    """The features of `geometry`, given the coordinates that the scenes have."""
    names = [f"{part} {angle}" for angle in ANGLES if angle in coordinates for part in ("cos", "sin")]
    names += [name for name in ("latitude", "longitude") if {"latitude", "longitude"} <= {*coordinates}]
    return names + ["cos local time", "sin local time"] * ({"time", "longitude"} <= {*coordinates})


def read_grid(store: Store, scene: int, questions: Sequence[Question], coordinates: Sequence[str], s: int) -> Grid:
    """What is known of a scene's cells without its spectra.

    A cell counts if at least half of its pixels have a target, at least half of its samples are valid, and all its
    geometry is known. Values are transformed before they are averaged.

    Args:
        store: the scenes.
        scene: which.
        questions: what to ask.
        coordinates: those to use.
        s: pixels of a cell along each axis.

    Raises:
        InputError: an array of the scene has changed since it was written.
    """
    record = store.scenes[scene]
    folder = scene_folder(store.path, record.id)
    if beside_digest(folder) != record.beside_sha256:  # zarr reads a lost chunk as zeros, without a word
        raise InputError("an array beside z is corrupt: its SHA-256 differs", path=folder, remedy="prepare it again")
    fields = {name: _read(folder, name) for name in coordinates}
    clouds = _read(folder, f"l2/{CLOUDS}") if any(q.max_cloud_fraction is not None for q in questions) else None
    angle = "solar_zenith_angle"  # which may be no feature
    solar_zenith = _read(folder, angle) if any(q.max_solar_zenith is not None for q in questions) else None
    ny, nx, nc = record.shape
    n_samples = cell_sums(np.full((ny, nx), nc), s)
    geometry = geometry_of(fields, (ny, nx), s)
    counts = cell_sums(store.n_invalid(scene), s) <= (1 - LEAST_VALID) * n_samples
    counts &= np.isfinite(geometry).all(axis=-1)
    targets, pixels, left_out = {}, {}, {}
    for q in questions:
        values = _read(folder, f"l2/{q.product}")
        clear = np.isfinite(values)
        left = [int(clear.sum())]
        for limited, limit in ((clouds, q.max_cloud_fraction), (solar_zenith, q.max_solar_zenith)):
            if limit is not None:
                assert limited is not None
                clear &= limited <= limit
            left.append(int(clear.sum()))
        means = cell_means(q.transform.transform(np.where(clear, values, np.nan)), s)
        targets[q] = np.where(counts, means, np.nan).astype(np.float32)
        pixels[q] = (left[0], left[1], left[2])
        left_out[q] = int((np.isfinite(means) & ~counts).sum())
    places = on_grid({name: (("y", "x")[: f.ndim], f) for name, f in fields.items()}, s)
    unknown = np.full(counts.shape, np.nan, np.float32)
    return Grid(
        targets,
        pixels,
        left_out,
        geometry,
        places.get("latitude", unknown),
        places.get("longitude", unknown),
        places.get("time", unknown[:, 0].astype(np.float64)),
    )


def geometry_of(fields: Mapping[str, NDArray[Any]], shape: tuple[int, int], s: int) -> Float32:
    """(h, w, `geometry_names`): what places, angles and the hour alone tell; NaN where a cell has none of one.

    An angle is that of the sum of the unit vectors of a cell's pixels, given by its cosine and sine: 359 and 1 degree
    make 0. The hour is mean local solar time, UTC + longitude / 15, as an angle.
    """
    angles = [np.radians(fields[name].astype(np.float64)) for name in ANGLES if name in fields]
    parts = [part for angle in angles for part in _direction(angle, s)]
    if {"latitude", "longitude"} <= fields.keys():
        places = on_grid({name: (("y", "x"), fields[name]) for name in ("latitude", "longitude")}, s)
        parts += [places["latitude"], places["longitude"]]
    if {"time", "longitude"} <= fields.keys():
        days = fields["time"][:, None] / DAY_SECONDS % 1 + fields["longitude"].astype(np.float64) / 360
        parts += _direction(2 * np.pi * days, s)
    grid = tuple(-(-size // s) for size in shape)
    return np.stack(parts, axis=-1).astype(np.float32) if parts else np.empty((*grid, 0), np.float32)


def _direction(angle: Float64, s: int) -> list[Float64]:
    """Cosine and sine, (h, w) each, of the mean direction of the angles, in radians, of each cell's pixels."""
    known = np.isfinite(angle)
    vector = np.stack([cell_sums(np.where(known, f(angle), 0.0), s) for f in (np.cos, np.sin)])
    length = np.hypot(*vector)
    return list(np.divide(vector, length, out=np.full(vector.shape, np.nan), where=length > 0))


# --- which cells to fit on ------------------------------------------------------------------------


def choose_cells(counts: Sequence[NDArray[np.bool_]], n_cells: int, seed: int) -> list[NDArray[np.int64]]:
    """Cells to fit on, spread over scenes as evenly as they have them.

    Each cell has a rank, which depends on the seed alone: whatever else is asked, the same cells are taken where
    they count, so that few of them need to be kept.

    Args:
        counts: of each scene (h, w): which cells count.
        n_cells: at most so many are taken.
        seed: of the choice.

    Returns:
        Of each scene the flat positions of cells, in order.
    """
    random = np.random.default_rng(seed)
    chosen = []
    for count, n in zip(counts, quotas([int(c.sum()) for c in counts], n_cells), strict=True):
        ranked = random.permutation(count.size)
        chosen.append(np.sort(ranked[count.ravel()[ranked]][:n]))
    return chosen


def quotas(available: Sequence[int], n: int) -> list[int]:
    """How many each gives if they give n together, as even as what they have allows."""
    given = [0] * len(available)
    for k, i in enumerate(sorted(range(len(available)), key=lambda i: available[i])):
        given[i] = min(available[i], n // (len(available) - k))
        n -= given[i]
    return given
