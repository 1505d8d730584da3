"""What latents consist of, in memory and in files, and how a scene becomes them.

Dimensions: latent_channel; y, x: the grid of latent cells, s x s pixels each; row, column, channel: the samples of the
scene. What is on the grid comes from the pixels beneath.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.data.cells import cell_sums
from spectralvae.data.wavelengths import channel_means, span, wavelength_gap
from spectralvae.errors import InputError
from spectralvae.inference.coder import Coder, Float32, Read
from spectralvae.inference.reading import Source, z_reader
from spectralvae.readers.base import Coordinate
from spectralvae.version import __version__
from spectralvae.weights.normalization import Normalization

FORMAT = 1
BLOCK_SAMPLES = 4_000_000  # decoded at a time
GEOLOCATION = ("latitude", "longitude")


Write = Callable[[str, tuple[slice, ...], NDArray[Any]], None]  # variable, part, values


def check_scene(path: Path | None, source: Source, normalization: Normalization) -> None:
    """Check that a scene is one of those that a model is for.

    Args:
        path: of its file, for errors; None for a scene in memory.
        source: the scene.
        normalization: the model's.

    Raises:
        InputError: its channels are others, or an angle is missing that tells which samples are valid.
    """
    n_channels = source.shape[2]
    assert normalization.wavelength is not None
    if n_channels != normalization.n_channels:
        raise InputError(
            f"has {n_channels} channels, but the model takes {normalization.n_channels} "
            f"({span(normalization.wavelength)})",
            path=path,
            remedy="give scenes like those it was trained on",
        )
    found = channel_means(path, source.wavelength)
    worst, limit = wavelength_gap(found, normalization.wavelength)
    if worst > limit:
        raise InputError(
            f"its wavelengths ({span(found)}) differ by up to {worst:.3f} nm from those of the training "
            f"({span(normalization.wavelength)}); at most one channel ({limit:.3f} nm) is allowed",
            path=path,
            remedy="give scenes of that band, or a model of this one",
        )
    if None not in (source.units, normalization.units) and source.units != normalization.units:
        raise InputError(f"its radiance is in {source.units!r}, but the model takes {normalization.units!r}", path=path)
    if normalization.max_solar_zenith is not None and "solar_zenith_angle" not in source.coordinates():
        raise InputError(
            "has no solar_zenith_angle, but the model was trained on pixels of at most "
            f"{normalization.max_solar_zenith:g} degrees only",
            path=path,
        )


# --- contents ---------------------------------------------------------------------------------

GRID, PIXELS = ("y", "x"), ("row", "column", "channel")
_POSTERIOR = "of the posterior of the latents"

# name -> dimensions, dtype, attributes
VARIABLES: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "latent": (("latent_channel", *GRID), "f4", {"long_name": "latent", "comment": f"mean {_POSTERIOR}", "units": "1"}),
    "log_variance": (
        ("latent_channel", *GRID),
        "f4",
        {"long_name": f"logarithm of the variance {_POSTERIOR}", "units": "1"},
    ),
    "valid_fraction": (GRID, "f4", {"long_name": "share of valid samples among those beneath the cell", "units": "1"}),
    "valid": (
        PIXELS,
        "i1",
        {
            "long_name": "whether a sample of the scene is valid",
            "flag_values": np.array([0, 1], np.int8),
            "flag_meanings": "invalid valid",
            "dtype": "bool",  # how xarray marks one
        },
    ),
    "y": (("y",), "f8", {"long_name": "middle of the cell in rows of the source's whole image, which count from 0"}),
    "x": (("x",), "f8", {"long_name": "middle of the cell in columns of the source's whole image, which count from 0"}),
    "latitude": (
        GRID,
        "f4",
        {"standard_name": "latitude", "long_name": "latitude", "units": "degrees_north"},
    ),
    "longitude": (
        GRID,
        "f4",
        {"standard_name": "longitude", "long_name": "longitude", "units": "degrees_east"},
    ),
    "time": (
        ("y",),
        "f8",
        {
            "standard_name": "time",
            "long_name": "mean time of the rows beneath the cell",
            "units": "seconds since 1970-01-01",
            "calendar": "standard",
        },
    ),
    "latent_mean": (("latent_channel",), "f8", {"long_name": "mean of the latents of the validation tiles"}),
    "latent_std": (
        ("latent_channel",),
        "f8",
        {"long_name": "standard deviation of the latents of the validation tiles"},
    ),
    "wavelength": (("channel",), "f8", {"long_name": "wavelength of the scene", "units": "nm"}),
    "mean": (("channel",), "f8", {"long_name": "mean in the normalisation of the model"}),
    "std": (("channel",), "f8", {"long_name": "standard deviation in the normalisation of the model"}),
}
AUXILIARY = (*GEOLOCATION, "time", "wavelength")  # coordinates that are no dimensions
COORDINATES = ("y", "x", *AUXILIARY)
STREAMED = ("latent", "log_variance", "valid_fraction", "valid")


@dataclass(frozen=True)
class Contents:
    """What the latents of a scene will hold.

    Attributes:
        sizes: of all dimensions.
        small: values of the variables that are known beforehand.
        streamed: names of those that the network gives.
        attributes: of the whole.
    """

    sizes: dict[str, int]
    small: dict[str, NDArray[Any]]
    streamed: tuple[str, ...]
    attributes: dict[str, Any]

    def layout(self, name: str) -> tuple[tuple[str, ...], str, dict[str, Any]]:
        """Dimensions, dtype and attributes of a variable."""
        _, dtype, attributes = VARIABLES[name]
        dims = self._dims(name)
        theirs = [other for other in AUXILIARY if other in self.small and set(self._dims(other)) <= set(dims)]
        if theirs and name not in COORDINATES:
            attributes = {**attributes, "coordinates": " ".join(theirs)}
        return dims, dtype, attributes

    def _dims(self, name: str) -> tuple[str, ...]:
        return PIXELS[-self.small[name].ndim :] if name == "wavelength" else VARIABLES[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a variable."""
        return tuple(self.sizes[dim] for dim in self.layout(name)[0])


def contents(source: Source, coder: Coder, log_variance: bool, attributes: Mapping[str, Any]) -> Contents:
    """What the latents of a scene will hold.

    Args:
        source: the scene.
        coder: the network.
        log_variance: whether they hold the posterior's.
        attributes: more of the whole.
    """
    ny, nx, nc = source.shape
    s = coder.scale
    height, width = -(-ny // s), -(-nx // s)
    cells = {"latent_channel": coder.model.embed_dim, "y": height, "x": width}
    sizes = {**cells, "row": ny, "column": nx, "channel": nc}
    small = {
        "y": _middles(ny, s) + (source.region[0] if source.region else 0),
        "x": _middles(nx, s) + (source.region[2] if source.region else 0),
        **on_grid(source.coordinates(), s),
        "wavelength": source.wavelength,
        "mean": coder.normalization.mean,
        "std": coder.normalization.std,
    }
    if coder.latents is not None:
        small |= {"latent_mean": coder.latents.mean, "latent_std": coder.latents.std}
    facts = {
        "Conventions": "CF-1.11",
        "title": "latents of a hyperspectral scene",
        "spectralvae_latents": FORMAT,
        "spectralvae_version": __version__,
        "model": coder.path.name if coder.step is None else f"{coder.path.name}, step {coder.step}",
        **coder.identity,
        "pixels_per_cell": s,
        "tile_size": coder.tile,
        "overlap": coder.overlap,
        "normalization": json.dumps(coder.normalization.settings()),
        **attributes,
    }
    return Contents(sizes, small, tuple(n for n in STREAMED if log_variance or n != "log_variance"), facts)


def _middles(size: int, s: int) -> NDArray[np.float64]:
    """Of the cells of an axis, in its pixels; the last cell may have fewer of them."""
    first = np.arange(0, size, s)
    return np.asarray((first + np.minimum(first + s, size) - 1) / 2, np.float64)


def on_grid(coordinates: Mapping[str, Coordinate], s: int) -> dict[str, NDArray[Any]]:
    """Latitude, longitude and time of latent cells, as far as the pixels have them.

    A place is the direction of the sum of the unit vectors to all pixels beneath that have one: right at the date line
    and at the poles as well. Cells without any are NaN.

    Args:
        coordinates: of the scene.
        s: pixels of a cell along each axis.
    """
    found: dict[str, NDArray[Any]] = {}
    if set(GEOLOCATION) <= coordinates.keys():
        latitude, longitude = (np.radians(coordinates[name][1].astype(np.float64)) for name in GEOLOCATION)
        parallel = np.cos(latitude)
        vectors = np.stack([parallel * np.cos(longitude), parallel * np.sin(longitude), np.sin(latitude)])
        known = np.isfinite(vectors).all(axis=0)
        x, y, z = cell_sums(np.where(known, vectors, 0.0), s)
        somewhere = np.where(cell_sums(known, s) > 0, 0.0, np.nan)
        found["latitude"] = (np.degrees(np.arctan2(z, np.hypot(x, y))) + somewhere).astype(np.float32)
        found["longitude"] = (np.degrees(np.arctan2(y, x)) + somewhere).astype(np.float32)
    if "time" in coordinates:
        time = coordinates["time"][1]
        known = np.isfinite(time)
        starts = range(0, len(time), s)
        n = np.add.reduceat(known, starts, dtype=np.float64)
        first = time[known][0] if known.any() else 0.0  # sums of seconds since 1970 would cost digits
        total = np.add.reduceat(np.where(known, time - first, 0.0), starts)
        found["time"] = np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0) + first
    return found


def stream_latents(
    source: Source, coder: Coder, log_variance: bool, write: Write, advance: Callable[[int], None]
) -> dict[str, int]:
    """Encode a scene, piece by piece.

    Args:
        source: the scene.
        coder: the network.
        log_variance: whether to write the posterior's.
        write: is given each part of the streamed variables once.
        advance: is called with the numbers of pixels that are done.

    Returns:
        How many samples were invalid, by rule; 0 and more of `valid`.

    Raises:
        InputError: the scene cannot be read.
    """
    ny, nx, nc = source.shape
    s, e = coder.scale, coder.model.embed_dim
    counts: dict[str, int] = {"valid": 0}
    for piece in coder.encode(z_reader(source, coder.normalization, counts), (ny, nx), log_variance=log_variance):
        rows = slice(piece.rows.start * s, min(piece.rows.stop * s, ny))
        columns = slice(piece.columns.start * s, min(piece.columns.stop * s, nx))
        cells = (slice(None), piece.rows, piece.columns)
        values = piece.result.transpose(2, 0, 1)
        valid = np.isfinite(piece.seen)
        n_valid = valid.sum(axis=2)
        write("latent", cells, values[:e])
        if log_variance:
            write("log_variance", cells, values[e:])
        share = cell_sums(n_valid, s) / (cell_sums(np.ones(n_valid.shape), s) * nc)
        write("valid_fraction", cells[1:], share.astype(np.float32))
        write("valid", (rows, columns, slice(None)), valid.view(np.int8))
        counts["valid"] += int(n_valid.sum())
        advance(n_valid.size)
    return counts


# --- back -------------------------------------------------------------------------------------


def check_latents(attributes: Mapping[str, Any], n_latents: int, coder: Coder, **where: Any) -> None:
    """Check that latents are of the model that is to decode them.

    Args:
        attributes: of the whole.
        n_latents: latent channels.
        coder: the network.
        where: the path or the key of the latents, as errors take them.

    Raises:
        InputError: they are of another model, or of another format.
    """
    if (found := attributes.get("spectralvae_latents", FORMAT)) != FORMAT:
        raise InputError(
            f"has format {found}, but this version ({__version__}) reads {FORMAT}", **where, remedy="update spectralvae"
        )
    if n_latents != coder.model.embed_dim:
        raise InputError(f"has {n_latents} latent channels, but the model has {coder.model.embed_dim}", **where)
    ours, theirs = coder.identity["model_sha256"], attributes.get("model_sha256", "")
    if theirs and theirs != ours:
        raise InputError(
            f"was encoded by another model (SHA-256 of its weights {theirs[:16]}..., of this {ours[:16]}...)",
            **where,
            remedy="decode it with that one",
        )
    ours, theirs = coder.identity["normalization_sha256"], attributes.get("normalization_sha256", "")
    if theirs and theirs != ours:
        raise InputError(
            f"was encoded with another normalisation (SHA-256 {theirs[:16]}..., of this {ours[:16]}...), though by the "
            "same weights",
            **where,
            remedy="decode it with that one",
        )


def stream_radiance(
    read: Read,
    valid: Callable[[slice, slice], NDArray[np.bool_]],
    shape: tuple[int, int],
    coder: Coder,
) -> Iterator[tuple[slice, slice, Float32, Float32]]:
    """Decode a scene, piece by piece.

    The network was trained on z within the clip, so what it gives beyond is cut off.

    Args:
        read: gives latents of a part, (rows, columns, E) in cells.
        valid: tells which samples of a part are valid, (rows, columns, channel).
        shape: (ny, nx) of the scene.
        coder: the network.

    Yields:
        rows, columns, radiance, z; both (rows, columns, channel) float32, NaN where invalid.
    """
    clip = coder.normalization.clip
    for piece in coder.decode(read, shape):
        height = max(1, BLOCK_SAMPLES // (piece.result.shape[1] * piece.result.shape[2]))
        for top in range(0, len(piece.result), height):
            z = np.clip(piece.result[top : top + height], -clip, clip)
            rows = slice(piece.rows.start + top, piece.rows.start + top + len(z))
            z[~valid(rows, piece.columns)] = np.nan
            yield rows, piece.columns, coder.normalization.denormalize(z).astype(np.float32), z
