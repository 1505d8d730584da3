"""What probes are fitted and tested on: which scenes, and the targets and features of their latent cells.

Shapes: a scene is (y, x) pixels and C channels, its grid of latents (h, w) cells of s x s pixels, fewer at its ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from spectralvae.config import FilterConfig
from spectralvae.data.cells import LEAST_VALID, cell_means, cell_sums
from spectralvae.data.normalize import Float64
from spectralvae.data.splits import DAY_OFFSET
from spectralvae.data.store import SceneRecord, Store, beside_digest, scene_folder
from spectralvae.data.targets import TargetTransform
from spectralvae.errors import InputError
from spectralvae.inference.latents import on_grid
from spectralvae.provenance import Provenance
from spectralvae.readers.base import ANGLES, COORDINATES
from spectralvae.readers.products import PRODUCTS

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
        shared_days: days that both have scenes of, as the model's own split has it.
    """

    fit: list[int]
    test: list[int]
    shared_days: list[date]


def assign_roles(store: Store, provenance: Provenance | None, model: Path) -> Roles:
    """Tell which scenes of a store to fit on and which to test on, by the digests that the model remembers.

    A scene that the model never saw is fitted on, too.

    Args:
        store: the scenes.
        provenance: the model's.
        model: its path, for messages.

    Raises:
        InputError: the model does not remember its scenes; the store has none of one side; or an unknown scene is of
            the day of a test scene, so that what was fitted on the one would be tested on the other.
    """
    known = provenance and (provenance.training.identities, provenance.validation.identities)
    if not known or known[0] is None or known[1] is None:
        raise InputError(
            f"{model}: does not tell which scenes it was trained and validated on (it is of an older version, or from "
            "elsewhere), so nothing keeps the test fair: train it with this version"
        )
    training, validation = set(known[0]), set(known[1])
    numbered = list(enumerate(store.scenes))
    test = [i for i, scene in numbered if scene.identity in validation]
    fit = [i for i, scene in numbered if scene.identity not in validation]
    for role, found, wanted in (("test", test, validation), ("fit", fit, training)):
        if not found:
            what = (
                f"none of the {len(wanted)} scenes that the model was validated on" if role == "test" else "no others"
            )
            raise InputError(
                f"store {store.path}: holds {what}, so probes have nothing to {role} on; give a store with scenes of "
                "the model's training and of its validation, as that which it was trained on"
            )
    test_days = {day for i in test if (day := _day(store.scenes[i]))}
    for i in fit:
        scene, day = store.scenes[i], _day(store.scenes[i])
        if scene.identity not in training and (day is None or day in test_days):
            when = "has no time, so it may be" if day is None else f"is of {day} (UTC - 6 h), the day"
            raise InputError(
                f"store {store.path}: scene {scene.id}, which the model never saw, {when} of a test scene: prepare the "
                "store without it"
            )
    return Roles(fit, test, sorted(test_days & {day for i in fit if (day := _day(store.scenes[i]))}))


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
            raise InputError(
                f"products: {product} is missing in store {store.path} (it has {has}): take it out, or prepare the "
                f"store with `l2: {{{product}: ...}}`"
            )
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
            f"filter.max_cloud_fraction: {limits.max_cloud_fraction:g} needs cloud fractions, but store {store.path} "
            f"has {has}: set filter.max_cloud_fraction: null, or prepare the store with `l2: {{{CLOUDS}: ...}}`"
        )
    angle = "solar_zenith_angle"
    if limits.max_solar_zenith is not None:
        for scene in store.scenes:
            if not (scene_folder(store.path, scene.id) / angle).is_dir():
                raise InputError(
                    f"filter.max_solar_zenith: {limits.max_solar_zenith:g} needs {angle}, which scene {scene.id} of "
                    f"store {store.path} lacks: set filter.max_solar_zenith: null"
                )


# --- what is known of cells without their spectra -------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The cells of a scene, but for what z tells.

    Attributes:
        targets: by question, (h, w) float32, NaN where a cell does not count.
        pixels: by question: how many are valid, have few enough clouds as well, and the sun high enough as well.
        geometry: (h, w, k) float32; k as many as `geometry_names`.
        latitude, longitude: (h, w) float32 in degrees; NaN where unknown.
        time: (h) seconds since 1970, mean of a cell's rows; NaN where unknown.
    """

    targets: dict[Question, Float32]
    pixels: dict[Question, tuple[int, int, int]]
    geometry: Float32
    latitude: Float32
    longitude: Float32
    time: Float64


def coordinates_of(store: Store, scenes: Iterable[int]) -> list[str]:
    """The coordinates that all of these scenes have."""
    folders = [scene_folder(store.path, store.scenes[i].id) for i in scenes]
    return [name for name in COORDINATES if all((folder / name).is_dir() for folder in folders)]


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
        raise InputError(f"{folder}: an array beside z has changed (the SHA-256 is not the table's); prepare it again")

    def read(name: str) -> NDArray[Any]:
        return np.asarray(zarr.open_array(folder / name, mode="r")[...])

    fields = {name: read(name) for name in coordinates}
    clouds = read(f"l2/{CLOUDS}") if any(q.max_cloud_fraction is not None for q in questions) else None
    solar_zenith = fields.get("solar_zenith_angle")
    ny, nx, nc = record.shape
    n_samples = cell_sums(np.full((ny, nx), nc), s)
    geometry = geometry_of(fields, (ny, nx), s)
    counts = cell_sums(store.n_invalid(scene), s) <= (1 - LEAST_VALID) * n_samples
    counts &= np.isfinite(geometry).all(axis=-1)
    targets, pixels = {}, {}
    for q in questions:
        values = read(f"l2/{q.product}")
        clear = np.isfinite(values)
        left = [int(clear.sum())]
        for field, limit in ((clouds, q.max_cloud_fraction), (solar_zenith, q.max_solar_zenith)):
            if limit is not None:
                assert field is not None
                clear &= field <= limit
            left.append(int(clear.sum()))
        means = cell_means(q.transform.transform(np.where(clear, values, np.nan)), s)
        targets[q] = np.where(counts, means, np.nan).astype(np.float32)
        pixels[q] = (left[0], left[1], left[2])
    places = on_grid({name: (("y", "x")[: f.ndim], f) for name, f in fields.items()}, s)
    unknown = np.full(counts.shape, np.nan, np.float32)
    return Grid(
        targets,
        pixels,
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
