"""The loader: batches are slices of the store, the same for any number of threads and from any step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preparing import wait_until
from refusals import refused

from spectralvae.data import cache, loader, sampling
from spectralvae.data.cache import load_scenes
from spectralvae.data.loader import Batch, TileStream, grid_crops, make_sampler, read_crops
from spectralvae.data.sampling import Crop, CropSampler
from spectralvae.data.store import Store, scene_folder, shard_file
from spectralvae.errors import ConfigError, InputError
from spectralvae.runtime.console import new_console

NC, TILE, BATCH, SEED = 5, 4, 6, 11
NOISE = (3, 2, 2)
SCENES = {"a": (12, 9), "b": (8, 15), "v": (11, 10)}


def z_of(name: str, dtype: str) -> np.ndarray:
    """Every sample has a value of its own, some are NaN; a corner of each scene is lost altogether."""
    ny, nx = SCENES[name]
    first = 600 * list(SCENES).index(name)
    z = (first + np.arange(ny * nx * NC)).reshape(ny, nx, NC).astype(dtype)
    z[np.random.default_rng(first).random(z.shape) < 0.05] = np.nan
    z[:5, :4] = np.nan
    return z


@pytest.fixture(params=["float16", "float32"])
def store(request: pytest.FixtureRequest, tmp_path: Path, make_store: Callable[..., Store]) -> Store:
    dtype = request.param
    return make_store(tmp_path / "store", {n: z_of(n, dtype) for n in SCENES}, val=("v",), dtype=dtype)


def sampler_of(store: Store, scenes: Sequence[int] = (0, 1), tile_size: int = TILE, most: float = 0.5) -> CropSampler:
    return make_sampler(store, scenes, seed=SEED, tile_size=tile_size, max_invalid_fraction=most)


def grid_of(
    store: Store, scenes: Sequence[int] = (2,), tile_size: int = 3, most: float = 0.5, at_most: int = 1000
) -> list[Crop]:
    return grid_crops(store, scenes, tile_size=tile_size, max_invalid_fraction=most, at_most=at_most)


def stream(store: Store, **settings: Any) -> TileStream:
    sampler = sampler_of(store)
    return TileStream(store, sampler, batch_size=BATCH, tile_size=TILE, noise_shape=NOISE, **settings)


def same(a: Batch, b: Batch) -> bool:
    return (
        (a.step, a.crops) == (b.step, b.crops)
        and a.tiles.numpy().tobytes() == b.tiles.numpy().tobytes()  # bytes: NaN must be equal as well
        and a.noise.numpy().tobytes() == b.noise.numpy().tobytes()
    )


def check_tiles(store: Store, batches: Iterable[Batch]) -> None:
    """All eight orientations of both scenes are drawn, and every tile is the turned slice of its scene."""
    seen = set()
    for batch in batches:
        assert batch.tiles.shape == (BATCH, TILE, TILE, NC)
        assert batch.tiles.numpy().dtype == store.dtype
        for crop, tile in zip(batch.crops, batch.tiles.numpy(), strict=True):
            z = z_of(list(SCENES)[crop.scene], str(store.dtype))
            truth = z[crop.y : crop.y + TILE, crop.x : crop.x + TILE]
            assert np.isnan(truth).mean() <= 0.5
            np.testing.assert_array_equal(tile, np.rot90(np.flipud(truth) if crop.flip else truth, crop.turns))
            seen.add((crop.scene, crop.flip, crop.turns))
    assert seen == {(s, flip, turns) for s in (0, 1) for flip in (False, True) for turns in range(4)}


def reader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tiles")]


def test_sample_i_is_crop_i_of_the_store_with_noise_i(store: Store) -> None:
    ours = stream(store)
    batches = list(islice(ours, 20))
    check_tiles(store, batches)
    for step, batch in enumerate(batches):
        assert batch.step == step
        assert batch.crops == [ours.sampler.crop(step * BATCH + j) for j in range(BATCH)]
        truth = [sampling.noise(SEED, sampling.NOISE, step * BATCH + j, NOISE) for j in range(BATCH)]
        np.testing.assert_array_equal(batch.noise.numpy(), truth)
        assert batch.noise.dtype == torch.float32
    # permuted, a batch is what the network takes, at no cost
    images = batch.tiles.permute(0, 3, 1, 2)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.data_ptr() == batch.tiles.data_ptr()


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize(("first_step", "world_size"), [(0, 2), (7, 1), (7, 3)])
def test_same_samples_for_any_processes_threads_and_first_step(
    store: Store, num_workers: int, first_step: int, world_size: int
) -> None:
    """The processes' shares of a step, one after the other, are the step of one process."""
    expected = list(islice(stream(store), 12))[first_step:]
    settings = {"num_workers": num_workers, "first_step": first_step, "world_size": world_size}
    shares = [list(islice(stream(store, rank=rank, **settings), 12 - first_step)) for rank in range(world_size)]
    for whole, parts in zip(expected, zip(*shares, strict=True), strict=True):
        assert {len(part.tiles) for part in parts} == {BATCH // world_size}
        assert {part.step for part in parts} == {whole.step}
        tiles, noise = (torch.cat([getattr(part, key) for part in parts]) for key in ("tiles", "noise"))
        assert same(whole, Batch(whole.step, tiles, noise, [crop for part in parts for crop in part.crops]))


@pytest.mark.parametrize("num_workers", [0, 4])
def test_a_view_of_a_batch_keeps_it(store: Store, num_workers: int) -> None:
    """Memory of batches is used again, but not while anything looks at it."""
    expected = list(islice(stream(store), 30))
    iterator = iter(stream(store, num_workers=num_workers))
    views = []
    for step in range(30):
        batch = next(iterator)
        assert same(batch, expected[step])
        if step % 10 == 0:
            views.append(batch.tiles.permute(0, 3, 1, 2)[1:2])
        del batch
    iterator.close()
    for step, view in zip((0, 10, 20), views, strict=True):
        assert view.numpy().tobytes() == expected[step].tiles.permute(0, 3, 1, 2)[1:2].numpy().tobytes()


def test_memory_is_used_again() -> None:
    """40 MB: the C library takes so much from the system each time, which would give zeros."""
    memory = loader._Memory((10, 2**20), np.dtype("float32"), pin=False)
    tensor = memory.take().fill_(7)
    view = tensor[3:]
    del tensor
    other = memory.take()
    assert other.data_ptr() + 3 * 2**22 != view.data_ptr()
    del view
    assert bool((memory.take() == 7).all())


@pytest.mark.parametrize("num_workers", [0, 4])
def test_a_stream_can_be_read_again_and_by_a_data_loader(store: Store, num_workers: int) -> None:
    """As an iterable data set of whole batches, without a length."""
    ours = stream(store, num_workers=num_workers)
    assert not hasattr(ours, "__len__")
    first, again = (list(islice(torch.utils.data.DataLoader(ours, batch_size=None), 3)) for _ in range(2))
    state = torch.get_rng_state()
    expected = list(islice(stream(store), 3))
    grid_of(store, at_most=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(same, first, expected)) and all(map(same, again, expected))


# --- scenes that are kept -----------------------------------------------------------------------


@pytest.mark.parametrize(("block_bytes", "num_workers"), [(1, 0), (700, 3), (2**26, 3)])  # a row, a few, all at a time
def test_batches_out_of_a_cache_are_turned_slices_of_the_store(
    store: Store, num_workers: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BLOCK_BYTES", block_bytes)
    kept = load_scenes(store, store.indices("train"), torch.device("cpu"), new_console())
    expected = list(islice(stream(store), 20))
    ours = stream(store, cache=kept, num_workers=num_workers)
    for scene in store.indices("train"):
        shard_file(scene_folder(store.path, store.scenes[scene].id)).unlink()  # nothing is read any more
    found = list(islice(ours, 20))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    check_tiles(store, found)


def test_a_cache_has_the_scenes_that_it_was_asked_for(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And shows how far it is, if that takes long."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, stderr is a terminal then
    assert cache.scene_bytes(store, [1, 2]) == [ny * nx * NC * store.dtype.itemsize for ny, nx in ((8, 15), (11, 10))]
    kept = load_scenes(store, [1, 2], torch.device("cpu"), new_console())
    assert kept.pixels.nbytes == sum(cache.scene_bytes(store, [1, 2]))
    assert kept.places == {1: (0, 15), 2: (8 * 15, 10)}
    assert "19/19" not in capsys.readouterr().err
    monkeypatch.setattr(cache, "QUIET_SECONDS", -1.0)
    load_scenes(store, [1, 2], torch.device("cpu"), new_console())
    assert "19/19" in capsys.readouterr().err
    np.testing.assert_array_equal(kept.pixels[8 * 15 :].numpy(), z_of("v", str(store.dtype)).reshape(-1, NC))


# --- threads ------------------------------------------------------------------------------------


def test_reading_ahead_is_bounded_and_leaves_no_threads(store: Store) -> None:
    """A slow training step must not let the readers fill the memory."""
    ours = stream(store, num_workers=4)
    drawn, crop = set(), ours.sampler.crop
    ours.sampler.crop = lambda i: drawn.add(i) or crop(i)
    iterator = iter(ours)
    for step in range(3):
        assert next(iterator).step == step
        steps = step + 1 + loader.BATCHES_AHEAD
        wait_until(lambda steps=steps: len(drawn) >= steps * BATCH)
        assert drawn == set(range(steps * BATCH))
    assert reader_threads()
    iterator.close()
    assert reader_threads() == []


# --- samplers and validation tiles --------------------------------------------------------------


def test_sizes_that_do_not_fit(store: Store) -> None:
    """Whichever scene is refused first, the size that is named fits in all."""
    for call, scenes, size, words in ((sampler_of, [0, 1], 10, ("a", "12 x 9")), (grid_of, [2], 11, ("v", "11 x 10"))):
        with refused(ConfigError, *words, "at most 8", key="data.tile_size", value=size):
            call(store, scenes, size)
    assert sampler_of(store, tile_size=8) and grid_of(store, tile_size=8)
    with refused(ConfigError, "4", key="data.batch_size", value=BATCH):
        stream(store, world_size=4)


def test_nothing_admissible_is_refused(tmp_path: Path, make_store: Callable[..., Store]) -> None:
    z = np.zeros((6, 6, NC), np.float16)
    z[::2] = np.nan
    store = make_store(tmp_path / "store", {"a": z, "v": z}, val=("v",))
    for call in (sampler_of, grid_of):
        with refused(ConfigError, key="data.max_invalid_fraction", value=0.25, path=store.path):
            call(store, [0], 4, 0.25)
    assert sampler_of(store, [0]).crop(0).scene == 0
    assert grid_of(store, []) == []


def test_no_tile_straddles_two_pieces_of_a_stack(store: Store) -> None:
    """Scenes a and b are stacks of three and two tiles of 4 rows."""
    store.scenes[:2] = [replace(scene, stack=4) for scene in store.scenes[:2]]
    sampler = sampler_of(store, tile_size=3)
    drawn = {(c.scene, c.y) for c in map(sampler.crop, range(2000))}
    assert drawn == {(0, y) for y in (0, 1, 4, 5, 8, 9)} | {(1, y) for y in (0, 1, 4, 5)}
    assert {(c.scene, c.y) for c in grid_of(store, [0, 1])} == drawn
    with refused(ConfigError, "4 x 9", key="data.tile_size", value=5):
        sampler_of(store, tile_size=5)


@pytest.mark.parametrize("name", ["z/c/0/0/0", "n_invalid/c/0/0"])
def test_damaged_files_are_found_before_the_first_step_or_reach_the_caller(store: Store, name: str) -> None:
    """Of every scene that is drawn from, and of none but these."""
    file = store.path / "scenes" / "b" / name
    content = file.read_bytes()
    streams = [stream(store, num_workers=n) for n in (0, 4)]
    half = content[: len(content) // 2 + 1]
    for damaged in (content[:-1], content + b"0", half, None):
        file.write_bytes(damaged) if damaged else file.unlink()
        with refused(InputError, path=file):
            sampler_of(store)
        sampler_of(store, [0])
        for under_way in streams if damaged in (half, None) else ():
            with refused(InputError, path=file):
                list(islice(under_way, 20))
            assert reader_threads() == []


def test_validation_tiles(store: Store) -> None:
    z = z_of("v", str(store.dtype))
    crops = grid_of(store)
    grid = [(y, x) for y in (0, 3, 6, 8) for x in (0, 3, 6, 7)]  # 11 x 10 pixels, the last tiles moved back
    good = [(y, x) for y, x in grid if np.isnan(z[y : y + 3, x : x + 3]).mean() <= 0.5]
    assert len(good) < len(grid)
    assert crops == [Crop(2, y, x) for y, x in good] == grid_of(store)
    fewer = grid_of(store, at_most=5)
    assert len(fewer) == 5 and set(fewer) < set(crops)
    for crop, tile in zip(fewer, read_crops(store, fewer, 3).numpy(), strict=True):
        np.testing.assert_array_equal(tile, z[crop.y : crop.y + 3, crop.x : crop.x + 3])
