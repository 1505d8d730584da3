"""Whether a store still holds what was written: digests, counts and statistics are computed again from its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from spectralvae.data.statistics import Moments
from spectralvae.data.store import Store, beside_digest, scene_folder, shard_file
from spectralvae.data.store_writer import group_json, root_json, scene_attributes, shard_index
from spectralvae.errors import InputError
from spectralvae.weights.normalization import EPSILON

_BLOCK_BYTES = 2**24
_TOLERANCE = 1e-8  # of sums in float64 over all training samples


def verify_store(store: Store, advance: Callable[[int], None]) -> list[str]:
    """Read all of a store and compare it with its own table.

    Args:
        store: open, so the root arrays and the table match the store's hash already.
        advance: called with the number of pixels that are done.

    Returns:
        One line for each thing that is wrong; none for a sound store.
    """
    problems: list[str] = []
    training = Moments.empty(store.normalization.n_channels)
    for i, record in enumerate(store.scenes):
        try:
            wrong, moments = _check_scene(store, i, advance)
        except InputError as error:
            problems.append(str(error))
            continue
        problems += wrong
        if record.split == "train":
            training = training.merge(moments)
    if not problems:
        problems += _check_root(store, training)
    return problems


def _is_as_written(path: Path, content: Callable[[], str]) -> bool:
    """Does a file hold the JSON that would be written now, from metadata that can be read?"""
    try:
        return bool(json.loads(path.read_text()) == json.loads(content()))
    except (OSError, ValueError):
        return False


def _check_scene(store: Store, scene: int, advance: Callable[[int], None]) -> tuple[list[str], Moments]:
    """What is wrong with a scene, and the moments of its z, which is read past zarr, a few rows at a time.

    Raises:
        InputError: z cannot be read.
    """
    store.check_files(scene)
    record = store.scenes[scene]
    folder = scene_folder(store.path, record.id)
    path: Path = shard_file(folder)
    ny, nx, nc = record.shape
    row_bytes = nx * nc * store.dtype.itemsize
    digest = hashlib.sha256()
    counted = np.zeros((ny, nx), np.int64)
    moments = Moments.empty(nc)
    height = max(1, _BLOCK_BYTES // row_bytes)
    try:
        with path.open("rb") as file:
            for y in range(0, ny, height):
                content = file.read(row_bytes * min(height, ny - y))
                digest.update(content)
                z = np.frombuffer(content, store.dtype).reshape(-1, nx, nc)
                counted[y : y + len(z)] = np.count_nonzero(np.isnan(z), axis=-1)
                moments = moments.merge(Moments.of(z))
                advance(len(z) * nx)
            index = file.read()
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {os.strerror(getattr(error, 'errno', None) or 5)}"
        raise InputError(problem, path=path) from error
    problems = []
    if digest.hexdigest() != record.z_sha256:
        problems.append(f"{path}: z has changed (its SHA-256 is not the table's)")
    if index != shard_index(ny, row_bytes):
        problems.append(f"{path}: the shard's index has changed")
    try:
        if not np.array_equal(store.n_invalid(scene), counted):
            problems.append(f"{folder / 'n_invalid'}: does not count the invalid samples of z")
    except InputError as error:
        problems.append(str(error))
    if beside_digest(folder) != record.beside_sha256:
        problems.append(f"{folder}: an array beside z has changed (the SHA-256 is not the table's)")
    if not _is_as_written(folder / "zarr.json", partial(group_json, folder, scene_attributes(record))):
        problems.append(f"{folder / 'zarr.json'}: the group's metadata have changed")
    return problems, moments


def _check_root(store: Store, training: Moments) -> list[str]:
    """What is wrong with the root's metadata and with the statistics of the training scenes.

    z must have the stored number of samples, mean 0 and mean square (std / (std + 1e-8))^2, since std + 1e-8 is the
    denominator of z; the store records what rounding and clipping change in both. A store that takes its statistics
    from another one has other means.
    """
    problems = []
    attributes = {**store.attributes, "scenes": [asdict(record) for record in store.scenes]}
    if not _is_as_written(store.path / "zarr.json", partial(root_json, store.path, attributes, store.scenes)):
        problems.append(f"{store.path / 'zarr.json'}: the metadata of arrays or scenes have changed")
    if not np.array_equal(training.count, store.arrays["count"]):
        wrong = np.flatnonzero(training.count != store.arrays["count"])
        problems.append(f"{store.path / 'count'}: is wrong in {len(wrong)} channels, first in {wrong[0]}")
    if store.attributes.get("statistics_from") is None:
        std = store.normalization.std
        square = training.m2 / np.maximum(training.count, 1) + training.mean**2
        for what, found, expected in (
            ("mean", training.mean + store.arrays["lost_mean"], np.zeros_like(std)),
            ("mean square", square + store.arrays["lost_square"], (std / (std + EPSILON)) ** 2),
        ):
            wrong = np.flatnonzero((training.count > 0) & ~(np.abs(found - expected) <= _TOLERANCE))
            if len(wrong):
                c = wrong[0]
                problems.append(
                    f"{store.path}: mean and std do not normalise z: its {what} is {found[c]:.9g} in channel {c}, "
                    f"not {expected[c]:.9g} ({len(wrong)} such channels)"
                )
    return problems
