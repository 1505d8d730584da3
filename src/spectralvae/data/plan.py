"""Which scenes a store will hold: everything is opened and checked before anything is written."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from spectralvae.config import InputSpec, PrepareConfig
from spectralvae.data.splits import PlannedScene, split_scenes
from spectralvae.data.wavelengths import channel_means, span, wavelength_gap
from spectralvae.errors import ConfigError, InputError
from spectralvae.readers import Scene, open_reader
from spectralvae.readers.arguments import Window
from spectralvae.readers.containers import is_zarr
from spectralvae.readers.pairing import ProductFolder, granule_key
from spectralvae.readers.products import read_product
from spectralvae.readers.tiles import tile_files
from spectralvae.runtime.console import new_progress
from spectralvae.weights.normalization import Float64

EXCERPT_BLOCKS, EXCERPT_BYTES = 5, 4096  # of each file: equal ones agree there, others hardly ever


def plan_scenes(config: PrepareConfig, console: Console) -> tuple[list[PlannedScene], Float64]:
    """Open every input far enough to know that it is a scene, check that all go together, and split them.

    Returns:
        The scenes, and the wavelengths of the first training scene: (channel), nm.

    Raises:
        ConfigError, InputError: as `prepare`.
    """
    files = [(path, spec) for spec in config.inputs for path in expand(spec.path)]
    with new_progress() as progress:
        task = progress.add_task("opening the inputs", total=2 * len(files))
        advance = partial(progress.advance, task)
        planned = []
        for path, spec in files:
            planned.append(PlannedScene(_open(path, spec, config, spec.region), spec))
            advance()
        _check_distinct(planned)
        planned = split_scenes(planned, config.split, partial(_crop, config=config), console)
        _check_distinct(planned)  # the parts have names of their own
        _check_scans(planned)
        _check_copies(planned)
        _check_alike(planned, config.mixed_versions)
        _check_angles(planned, config.validity.max_solar_zenith)
        _pair(planned, config)
        reference = next(p for p in planned if p.split == "train")
        wavelength = check_wavelengths(planned, reference, advance)
    return planned, wavelength


def expand(pattern: str, key: str = "inputs") -> list[Path]:
    """The files that a path, a glob or a folder means; ``key`` is the config's, for errors.

    Raises:
        InputError: none.
    """
    if "://" in pattern:
        raise InputError("is a URL; only local files are read", key=key, value=pattern, remedy="download it first")
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 (pathlib's raises over an unknown user)
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return _scenes_of(Path(pattern), key) if Path(pattern).is_dir() else [Path(pattern)]
    paths = sorted(Path(path) for path in glob.iglob(pattern, recursive=True))  # noqa: PTH207
    if not paths:
        raise InputError("matches no file", key=key, value=pattern)
    return paths


def _scenes_of(folder: Path, key: str) -> list[Path]:
    """The scenes of a folder: itself where it is a Zarr group, else its tiles or its level-1 granules."""
    if is_zarr(folder):
        return [folder]
    paths = tile_files(folder) or sorted(folder.glob("TEMPO_RAD*_L1_*.nc*"))
    if not paths:
        raise InputError(
            "this folder holds no TEMPO_RAD*_L1_*.nc and no tiles NNNNN.pt, and is no Zarr group",
            key=key,
            path=folder,
            remedy="give its files, by a glob for example",
        )
    return paths


def _open(path: Path, spec: InputSpec, config: PrepareConfig, region: Sequence[int] | None) -> Scene:
    return open_input(path, spec, region, band=config.band, flag_bits=config.validity.flag_bits)


def open_input(
    path: Path, spec: InputSpec, region: Sequence[int] | None, *, band: str | None, flag_bits: Sequence[int] | None
) -> Scene:
    """Open a file as the config says.

    Args:
        path: One of those that `spec` names.
        spec: How to read it.
        region: Of it; None for all.
        band, flag_bits: TEMPO: as of `open_reader`.

    Raises:
        InputError, ConfigError: As `open_reader`.
    """
    wavelength = spec.wavelength
    return open_reader(
        path.absolute(),  # for workers that were started in another folder
        variable=spec.variable,
        size=spec.size,
        wavelength=wavelength if wavelength is None or isinstance(wavelength, list) else wavelength.model_dump(),
        region=region,
        band=band,
        dims=spec.dims,
        units=spec.units,
        flag_bits=flag_bits,
    )


def _crop(p: PlannedScene, region: Window, config: PrepareConfig) -> PlannedScene:
    return PlannedScene(_open(p.scene.path, p.spec, config, region), p.spec)


def _check_distinct(planned: Sequence[PlannedScene]) -> None:
    """No pixel may be in two scenes, else the validation would see what was trained on."""
    by_file: dict[Path, list[PlannedScene]] = {}
    by_id: dict[str, PlannedScene] = {}
    for p in planned:
        others = by_file.setdefault(p.scene.path.resolve(), [])
        if any(_overlap(p.scene, other.scene) for other in others):
            raise ConfigError("is given twice, and the regions share pixels", key="inputs", path=p.scene.path)
        others.append(p)
        twin = by_id.setdefault(p.id, p)
        if twin is not p:
            raise ConfigError(
                f"gives a scene named {p.id}, and so does {twin.scene.path}",
                key="inputs",
                path=p.scene.path,
                remedy="rename one or leave it out",
            )


def _check_copies(planned: Sequence[PlannedScene]) -> None:
    """One file under two names is one scene: it may not be trained on and judged with.

    To hash every file takes hours. So only those scenes are hashed that agree in their size and in an excerpt.
    """
    by_size: dict[int, dict[Path, PlannedScene]] = {}
    for p in planned:
        size = sum(file.stat().st_size for file in p.scene.files())
        by_size.setdefault(size, {})[p.scene.path.resolve()] = p
    by_excerpt: dict[str, list[PlannedScene]] = {}
    for group in by_size.values():
        for p in group.values() if len(group) > 1 else ():
            by_excerpt.setdefault(_excerpt_digest(p.scene), []).append(p)
    seen: dict[str, PlannedScene] = {}
    for alike in by_excerpt.values():
        for p in alike if len(alike) > 1 else ():
            twin = seen.setdefault(p.scene.sha256(), p)
            if twin is not p:
                problem = f"is a copy of {twin.scene.path}"
                raise ConfigError(problem, key="inputs", path=p.scene.path, remedy="give it once")


def _excerpt_digest(scene: Scene) -> str:
    """SHA-256 of a few blocks of each of the scene's files, evenly spread from its start to its end; hexadecimal."""
    digest = hashlib.sha256()
    for path in scene.files():
        last = max(0, path.stat().st_size - EXCERPT_BYTES)
        with path.open("rb") as file:
            for i in range(EXCERPT_BLOCKS):
                file.seek(last * i // (EXCERPT_BLOCKS - 1))
                digest.update(file.read(EXCERPT_BYTES))
    return digest.hexdigest()


def _check_scans(planned: Sequence[PlannedScene]) -> None:
    """One scan may be there in several files (of two versions, say): it may not be trained on and judged with."""
    seen: dict[str, PlannedScene] = {}
    for p in planned:
        if p.scene.format == "tempo" and (scan := granule_key(p.scene.path)):
            twin = seen.setdefault(scan, p)
            if twin.scene.path.resolve() != p.scene.path.resolve():
                problem = f"is of the same scan as {twin.scene.path}"
                raise ConfigError(problem, key="inputs", path=p.scene.path, remedy="leave one out")


def _overlap(a: Scene, b: Scene) -> bool:
    if a.region is None or b.region is None:
        return True
    (ay0, ay1, ax0, ax1), (by0, by1, bx0, bx1) = a.region, b.region
    return ay0 < by1 and by0 < ay1 and ax0 < bx1 and bx0 < ax1


def _check_alike(planned: Sequence[PlannedScene], mixed_versions: bool) -> None:
    first = planned[0].scene
    for p in planned[1:]:
        for what, ours, theirs in (
            ("channels", p.scene.shape[2], first.shape[2]),
            ("band", p.scene.band, first.band),
            ("units", p.scene.units, first.units),
        ):
            if ours != theirs:
                problem = f"{what}: {ours} here, but {theirs} in {first.path}"
                raise ConfigError(problem, key="inputs", path=p.scene.path)
        if p.scene.version != first.version and not mixed_versions:
            raise ConfigError(
                f"is of version {p.scene.version}, but {first.path} of {first.version}, and calibrations differ",
                key="inputs",
                path=p.scene.path,
                remedy="leave one out, or set mixed_versions: true",
            )


def _check_angles(planned: Sequence[PlannedScene], max_solar_zenith: float | None) -> None:
    for p in planned:
        if max_solar_zenith is not None and "solar_zenith_angle" in p.scene.absent:
            raise ConfigError(
                "has no solar_zenith_angle",
                key="validity.max_solar_zenith",
                path=p.scene.path,
                remedy="leave out the limit or the file",
            )


def _pair(planned: Sequence[PlannedScene], config: PrepareConfig) -> None:
    """Find the level-2 files of every scene, and look at one pixel of each: what is wrong with a file shows."""
    for product, wanted in config.l2.items():
        folder = ProductFolder(wanted.folder.absolute(), product)
        first = None
        for p in planned:
            p.products[product] = folder.find(p.scene.path)
            ny, nx, _ = p.scene.full_shape
            found = read_product(
                p.products[product],
                product,
                field=wanted.field,
                max_quality=wanted.max_quality,
                valid_range=wanted.valid_range,
                region=(0, 1, 0, 1),
                expected_shape=(ny, nx),
            )
            first = first or found
            if found.version != first.version and not config.mixed_versions:
                raise ConfigError(
                    f"is of version {found.version}, but {first.path} of {first.version}",
                    key=f"l2.{product}",
                    path=found.path,
                    remedy="leave one out, or set mixed_versions: true",
                )
            if (found.field, found.units) != (first.field, first.units):
                raise InputError(
                    f"{found.field} is in {found.units!r}, but {first.field} of {first.path} in {first.units!r}",
                    key=f"l2.{product}",
                    path=found.path,
                )


def check_wavelengths(planned: Sequence[PlannedScene], reference: PlannedScene, advance: Callable[[], None]) -> Float64:
    """All scenes must have the reference's wavelengths within one channel spacing.

    Args:
        planned: all scenes.
        reference: one of them.
        advance: called after each.

    Returns:
        The reference's wavelengths, (channel), nm, averaged over x where they depend on it.

    Raises:
        ConfigError: a scene has others.
    """
    expected = _channel_means(reference.scene)
    for p in planned:
        found = _channel_means(p.scene)
        worst, limit = wavelength_gap(found, expected)
        if worst > limit:
            raise ConfigError(
                f"its wavelengths ({span(found)}) differ by up to {worst:.3f} nm from those of {reference.scene.path} "
                f"({span(expected)})",
                key="inputs",
                path=p.scene.path,
                limit=f"within one channel ({limit:.3f} nm)",
            )
        advance()
    return expected


def _channel_means(scene: Scene) -> Float64:
    with scene:
        return channel_means(scene.path, scene.wavelength)
