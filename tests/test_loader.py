"""The loader: batches are slices of the store, the same for any number of threads and from any step."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spectralvae.data import cache, loader, sampling
from spectralvae.data.cache import load_scenes
from spectralvae.data.loader import Batch, TileStream, grid_crops, make_sampler, read_crops
from spectralvae.data.sampling import Crop
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
    z = (first + np.arange(ny * nx * NC, dtype=np.float64)).reshape(ny, nx, NC)
    z = z.astype(dtype)
    z[np.random.default_rng(first).random(z.shape) < 0.05] = np.nan
    z[:5, :4] = np.nan
    return z


@pytest.fixture(params=["float16", "float32"])
def store(request: pytest.FixtureRequest, tmp_path: Path, make_store: Callable[..., Store]) -> Store:
    dtype = request.param
    return make_store(tmp_path / "store", {n: z_of(n, dtype) for n in SCENES}, val=("v",), dtype=dtype)


def stream(store: Store, **settings: Any) -> TileStream:
    sampler = make_sampler(store, store.indices("train"), seed=SEED, tile_size=TILE, max_invalid_fraction=0.5)
    return TileStream(store, sampler, batch_size=BATCH, tile_size=TILE, noise_shape=NOISE, **settings)


def same(a: Batch, b: Batch) -> bool:
    return (
        (a.step, a.crops) == (b.step, b.crops)
        and a.tiles.numpy().tobytes() == b.tiles.numpy().tobytes()  # bytes: NaN must be equal as well
        and a.noise.numpy().tobytes() == b.noise.numpy().tobytes()
    )


def reader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tiles")]


def test_batch_is_turned_slices_of_the_store(store: Store) -> None:
    names = list(SCENES)
    seen = set()
    for step, batch in enumerate(islice(stream(store), 20)):
        assert batch.step == step
        assert batch.tiles.shape == (BATCH, TILE, TILE, NC)
        assert batch.tiles.numpy().dtype == store.dtype
        for crop, tile in zip(batch.crops, batch.tiles.numpy(), strict=True):
            z = z_of(names[crop.scene], str(store.dtype))
            truth = z[crop.y : crop.y + TILE, crop.x : crop.x + TILE]
            if crop.flip:
                truth = np.flipud(truth)
            truth = np.rot90(truth, crop.turns)
            np.testing.assert_array_equal(tile, truth)
            assert np.isnan(truth).mean() <= 0.5
            seen.add((crop.scene, crop.flip, crop.turns))
    assert seen == {(s, flip, turns) for s in (0, 1) for flip in (False, True) for turns in range(4)}


def test_sample_i_is_crop_i_with_noise_i(store: Store) -> None:
    ours = stream(store)
    for batch in islice(ours, 5):
        for j in range(BATCH):
            i = batch.step * BATCH + j
            assert batch.crops[j] == ours.sampler.crop(i)
            truth = sampling.noise(SEED, sampling.NOISE, i, NOISE)
            np.testing.assert_array_equal(batch.noise[j].numpy(), truth)
    assert batch.noise.dtype == torch.float32


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("first_step", [0, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_same_samples_for_any_processes_threads_and_first_step(
    store: Store, num_workers: int, first_step: int, world_size: int
) -> None:
    """The processes' shares of a step, one after the other, are the step of one process."""
    expected = list(islice(stream(store), 12))[first_step:]
    settings = {"num_workers": num_workers, "first_step": first_step, "world_size": world_size}
    shares = [list(islice(stream(store, rank=rank, **settings), 12 - first_step)) for rank in range(world_size)]
    for whole, parts in zip(expected, zip(*shares, strict=True), strict=True):
        assert {len(part.tiles) for part in parts} == {BATCH // world_size}
        assert same(
            whole,
            Batch(
                whole.step,
                torch.cat([part.tiles for part in parts]),
                torch.cat([part.noise for part in parts]),
                [crop for part in parts for crop in part.crops],
            ),
        )
        assert {part.step for part in parts} == {whole.step}


def test_batch_that_cannot_be_shared_out_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size: 6 must be a multiple of the 4 processes"):
        stream(store, world_size=4)


def test_a_stream_can_be_read_again(store: Store) -> None:
    ours = stream(store, num_workers=2)
    first, again = (list(islice(ours, 3)) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_batches_already_given_are_not_written_to_again(store: Store) -> None:
    batches = stream(store, num_workers=4)
    iterator = iter(batches)
    first = next(iterator)
    before = first.tiles.clone(), first.noise.clone()
    for _ in range(8):
        next(iterator)
    iterator.close()
    assert before[0].numpy().tobytes() == first.tiles.numpy().tobytes()
    assert torch.equal(before[1], first.noise)


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


def test_permuted_tiles_are_channels_last(store: Store) -> None:
    """So that the network's layout costs no copy."""
    batch = next(iter(stream(store)))
    images = batch.tiles.permute(0, 3, 1, 2)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.data_ptr() == batch.tiles.data_ptr()


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_data_loader_takes_the_stream(store: Store, num_workers: int) -> None:
    """As an iterable data set of whole batches, without a length."""
    ours = stream(store, num_workers=num_workers)
    assert not hasattr(ours, "__len__")
    found = list(islice(torch.utils.data.DataLoader(ours, batch_size=None), 2))
    assert all(same(a, b) for a, b in zip(found, islice(stream(store), 2), strict=True))


# --- scenes that are kept -----------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("block_bytes", [1, 700, 2**26])  # rows one by one, a few, and all of a scene at a time
def test_batches_out_of_a_cache_are_turned_slices_of_the_store(
    store: Store, num_workers: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BLOCK_BYTES", block_bytes)
    kept = load_scenes(store, store.indices("train"), torch.device("cpu"), new_console())
    expected = list(islice(stream(store), 20))
    ours = stream(store, cache=kept, num_workers=num_workers)
    for scene in store.indices("train"):
        shard_file(scene_folder(store.path, store.scenes[scene].id)).unlink()  # nothing is read any more
    names, seen = list(SCENES), set()
    found = list(islice(ours, 20))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    for batch in found:
        for crop, tile in zip(batch.crops, batch.tiles.numpy(), strict=True):
            z = z_of(names[crop.scene], str(store.dtype))
            truth = z[crop.y : crop.y + TILE, crop.x : crop.x + TILE]
            truth = np.rot90(np.flipud(truth) if crop.flip else truth, crop.turns)
            np.testing.assert_array_equal(tile, truth)
            seen.add((crop.scene, crop.flip, crop.turns))
    assert seen == {(s, flip, turns) for s in (0, 1) for flip in (False, True) for turns in range(4)}


def test_a_cache_has_the_scenes_that_it_was_asked_for(store: Store) -> None:
    assert cache.scene_bytes(store, [1, 2]) == [ny * nx * NC * store.dtype.itemsize for ny, nx in ((8, 15), (11, 10))]
    kept = load_scenes(store, [1, 2], torch.device("cpu"), new_console())
    assert kept.pixels.nbytes == sum(cache.scene_bytes(store, [1, 2]))
    assert kept.places == {1: (0, 15), 2: (8 * 15, 10)}
    np.testing.assert_array_equal(kept.pixels[8 * 15 :].numpy(), z_of("v", str(store.dtype)).reshape(-1, NC))


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, True), (100.0, False)])
def test_reading_for_a_cache_shows_how_far_it_is_if_it_takes_long(
    store: Store, seconds: float, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = cache.new_progress(quiet=True)
    begun = []
    monkeypatch.setattr(progress, "start", lambda: begun.append(True))
    monkeypatch.setattr(cache, "new_progress", lambda quiet: progress)
    monkeypatch.setattr(cache, "QUIET_SECONDS", seconds - 1)
    load_scenes(store, [0, 1], torch.device("cpu"), new_console())
    assert bool(begun) == shown
    assert progress.tasks[0].completed == progress.tasks[0].total == sum(SCENES[name][0] for name in ("a", "b"))


# --- threads ------------------------------------------------------------------------------------


def test_leaving_early_leaves_no_threads(store: Store) -> None:
    iterator = iter(stream(store, num_workers=4))
    next(iterator)
    assert reader_threads()
    iterator.close()
    assert reader_threads() == []
    for _ in stream(store, num_workers=4):
        break
    assert reader_threads() == []


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_error_of_a_reader_reaches_the_caller(store: Store, num_workers: int) -> None:
    (file,) = (store.path / "scenes" / "b" / "z" / "c").rglob("0/0/0")
    ours = stream(store, num_workers=num_workers)
    with file.open("r+b") as f:  # under a run; at its start it would have been refused
        f.truncate(100)
    with pytest.raises(InputError, match="shorter") as caught:
        list(islice(ours, 20))
    assert str(file) in str(caught.value)
    assert reader_threads() == []


def test_reading_ahead_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow training step must not let the readers fill the memory."""
    made = []
    new_batch = TileStream._new_batch
    monkeypatch.setattr(
        TileStream, "_new_batch", lambda self, step, *rest: made.append(step) or new_batch(self, step, *rest)
    )
    iterator = iter(stream(store, num_workers=4))
    next(iterator)
    assert made == list(range(1 + loader.BATCHES_AHEAD))
    next(iterator)
    assert made == list(range(2 + loader.BATCHES_AHEAD))
    iterator.close()


# --- samplers and validation tiles --------------------------------------------------------------


def test_sampler_draws_from_its_scenes_only(store: Store) -> None:
    sampler = make_sampler(store, [1], seed=0, tile_size=TILE, max_invalid_fraction=0.5)
    assert {sampler.crop(i).scene for i in range(100)} == {1}


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_no_inadmissible_tile(store: Store, fraction: float) -> None:
    """Counted in the data themselves."""
    allowed = {
        (s, y, x)
        for s, name in enumerate(list(SCENES)[:2])
        for z in [z_of(name, str(store.dtype))]
        for y in range(z.shape[0] - TILE + 1)
        for x in range(z.shape[1] - TILE + 1)
        if np.isnan(z[y : y + TILE, x : x + TILE]).mean() <= fraction
    }
    if not allowed:
        with pytest.raises(ConfigError):
            make_sampler(store, [0, 1], seed=0, tile_size=TILE, max_invalid_fraction=fraction)
        return
    sampler = make_sampler(store, [0, 1], seed=0, tile_size=TILE, max_invalid_fraction=fraction)
    drawn = Counter((c.scene, c.y, c.x) for c in map(sampler.crop, range(100 * len(allowed))))
    assert set(drawn) == allowed
    k = len(allowed)
    chi_square = sum((m - 100) ** 2 / 100 for m in drawn.values())
    assert abs(chi_square - (k - 1)) < 4 * np.sqrt(2 * (k - 1))


def test_too_large_tile_is_refused(store: Store) -> None:
    for call in (
        lambda: make_sampler(store, [0, 1], seed=0, tile_size=9, max_invalid_fraction=0.5),
        lambda: grid_crops(store, store.indices("val"), tile_size=11, max_invalid_fraction=0.5, at_most=8),
    ):
        with pytest.raises(ConfigError, match=r"data\.tile_size: (9|11) is larger") as caught:
            call()
        assert "scene b (8 x 15 pixels)" in str(caught.value) or "scene v (11 x 10 pixels)" in str(caught.value)


def test_nothing_admissible_is_refused(tmp_path: Path, make_store: Callable[..., Store]) -> None:
    z = np.zeros((6, 6, NC), np.float16)
    z[::2] = np.nan
    store = make_store(tmp_path / "store", {"a": z, "v": z}, val=("v",))
    for call in (
        lambda: make_sampler(store, [0], seed=0, tile_size=4, max_invalid_fraction=0.25),
        lambda: grid_crops(store, store.indices("val"), tile_size=4, max_invalid_fraction=0.25, at_most=8),
    ):
        with pytest.raises(ConfigError, match=r"data\.max_invalid_fraction: 0\.25 leaves hardly a tile") as caught:
            call()
        assert str(store.path) in str(caught.value)
    sampler = make_sampler(store, [0], seed=0, tile_size=4, max_invalid_fraction=0.5)
    assert {(c.y, c.x) for c in map(sampler.crop, range(300))} == {(y, x) for y in range(3) for x in range(3)}


def test_no_tile_straddles_two_pieces_of_a_stack(store: Store) -> None:
    """Scenes a and b are stacks of three and two tiles of 4 rows."""
    names = list(SCENES)
    store.scenes[0] = replace(store.scenes[0], stack=4)
    store.scenes[1] = replace(store.scenes[1], stack=4)
    sampler = make_sampler(store, [0, 1], seed=0, tile_size=3, max_invalid_fraction=0.5)
    drawn = {(c.scene, c.y) for c in map(sampler.crop, range(2000))}
    assert drawn == {(0, y) for y in (0, 1, 4, 5, 8, 9)} | {(1, y) for y in (0, 1, 4, 5)}
    crops = grid_crops(store, [0, 1], tile_size=3, max_invalid_fraction=0.5, at_most=1000)
    grid = [(s, y, x) for s, tops in ((0, (0, 4, 8)), (1, (0, 4))) for top in tops for y in (top, top + 1)
            for x in ((0, 3, 6) if s == 0 else (0, 3, 6, 9, 12))]  # fmt: skip
    data = [z_of(name, str(store.dtype)) for name in names]
    good = [(s, y, x) for s, y, x in grid if np.isnan(data[s][y : y + 3, x : x + 3]).mean() <= 0.5]
    assert len(good) < len(grid)
    assert [(c.scene, c.y, c.x) for c in crops] == good
    with pytest.raises(ConfigError, match=r"tile_size: 5 is larger than train scene a \(4 x 9 pixels\)"):
        make_sampler(store, [0, 1], seed=0, tile_size=5, max_invalid_fraction=0.5)


@pytest.mark.parametrize("name", ["z/c/0/0/0", "n_invalid/c/0/0"])
@pytest.mark.parametrize("damage", ["lost", "short", "long"])
def test_damaged_files_are_found_before_the_first_step(store: Store, name: str, damage: str) -> None:
    """Of every scene that is drawn from, and of none but these."""
    file = store.path / "scenes" / "b" / name
    if damage == "lost":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "short" else file.read_bytes() + b"0")
    with pytest.raises(InputError, match="cannot be read" if damage == "lost" else "bytes instead of") as caught:
        make_sampler(store, [0, 1], seed=0, tile_size=TILE, max_invalid_fraction=0.5)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    make_sampler(store, [0], seed=0, tile_size=TILE, max_invalid_fraction=0.5)


@pytest.mark.parametrize("num_workers", [0, 4])
def test_counts_cut_off_under_a_run_reach_the_caller(store: Store, num_workers: int) -> None:
    file = store.path / "scenes" / "b" / "n_invalid" / "c" / "0" / "0"
    ours = stream(store, num_workers=num_workers)
    with file.open("r+b") as f:
        f.truncate(3)
    with pytest.raises(InputError, match="shorter") as caught:
        list(islice(ours, 20))
    assert str(file) in str(caught.value)
    assert reader_threads() == []


def test_validation_tiles(store: Store) -> None:
    z = z_of("v", str(store.dtype))
    crops = grid_crops(store, store.indices("val"), tile_size=3, max_invalid_fraction=0.5, at_most=100)
    grid = [(y, x) for y in (0, 3, 6, 8) for x in (0, 3, 6, 7)]  # 11 x 10 pixels, the last tiles moved back
    good = [(y, x) for y, x in grid if np.isnan(z[y : y + 3, x : x + 3]).mean() <= 0.5]
    assert len(good) < len(grid)
    assert crops == [Crop(2, y, x) for y, x in good]
    assert grid_crops(store, store.indices("val"), tile_size=3, max_invalid_fraction=0.5, at_most=100) == crops
    fewer = grid_crops(store, store.indices("val"), tile_size=3, max_invalid_fraction=0.5, at_most=5)
    assert len(fewer) == 5
    assert set(fewer) < set(crops)
    tiles = read_crops(store, fewer, 3).numpy()
    for crop, tile in zip(fewer, tiles, strict=True):
        np.testing.assert_array_equal(tile, z[crop.y : crop.y + 3, crop.x : crop.x + 3])


def test_no_validation_scenes_no_validation_tiles(tmp_path: Path, make_store: Callable[..., Store]) -> None:
    store = make_store(tmp_path / "store", {"a": np.zeros((6, 6, NC), np.float16)})
    assert grid_crops(store, store.indices("val"), tile_size=4, max_invalid_fraction=0.5, at_most=8) == []


def test_reading_leaves_the_random_state_alone(store: Store) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    next(iter(stream(store, num_workers=2)))
    grid_crops(store, store.indices("val"), tile_size=3, max_invalid_fraction=0.5, at_most=3)
    assert torch.equal(torch.get_rng_state(), state)
