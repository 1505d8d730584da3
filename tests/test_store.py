"""The store: what is written is what zarr and xarray read, and nothing but a finished store opens."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from refusals import refused

from spectralvae.data import store_writer
from spectralvae.data.store import FORMAT, REQUIRED_ARRAYS, Store, content_hash
from spectralvae.data.store_writer import ZWriter
from spectralvae.errors import InputError

NY, NX, NC = 9, 7, 6
STATISTICS = set(REQUIRED_ARRAYS)
DTYPES = ("float16", "float32")
MakeStore = Callable[..., Store]


def z_of(seed: int, dtype: str, shape: tuple[int, int, int] = (NY, NX, NC)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, shape).astype(dtype)
    z[rng.random(shape) < 0.1] = np.nan
    return z


def geometry() -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    rng = np.random.default_rng(9)
    latitude = rng.uniform(20, 60, (NY, NX)).astype(np.float32)
    latitude[0, 0], latitude[0, 1] = 0, np.nan  # zero is a latitude, and must not be taken for fill
    time = 1717276174.25 + 2.5 * np.arange(NY)
    time[3] = np.nan
    return {
        "latitude": (("y", "x"), latitude),
        "time": (("y",), time),
        "wavelength": (("x", "channel"), 300 + 0.01 * np.arange(NX)[:, None] + 0.2 * np.arange(NC)),
    }


@pytest.fixture
def two(tmp_path: Path, make_store: MakeStore) -> Store:
    """Scenes a (train) and b (val), float16, with geometry."""
    scenes = {"a": z_of(0, "float16"), "b": z_of(1, "float16")}
    return make_store(tmp_path / "store", scenes, val=("b",), arrays=geometry())


# --- z --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[0, NY], [0, 2, 3, 8, NY]])
@pytest.mark.parametrize("columns", [[0, NX], [0, 3, 4, NX]])
def test_z_written_in_pieces_reads_back_in_zarr(
    tmp_path: Path, dtype: str, rows: list[int], columns: list[int]
) -> None:
    exact = np.random.default_rng(0).normal(0, 4, (NY, NX, NC))
    exact[2, 3] = exact[5, :, 1] = np.nan
    z = exact.astype(dtype)  # rounded to nearest
    pieces = [(slice(*r), slice(*c)) for r in pairwise(rows) for c in pairwise(columns)]
    with ZWriter(tmp_path, z.shape, dtype, {"units": "1"}) as writer, ThreadPoolExecutor(4) as threads:
        in_turn = np.random.default_rng(0).permutation(pieces)
        list(threads.map(lambda piece: writer.write(piece[0].start, piece[1].start, exact[*piece]), in_turn))
    array = zarr.open_array(tmp_path / "z", mode="r")
    assert array.dtype == dtype
    assert array[:].tobytes() == z.tobytes()
    assert next((tmp_path / "z/c").rglob("0/0/0")).read_bytes().startswith(z.tobytes())  # plain, for other languages
    assert writer.sha256 == hashlib.sha256(z.tobytes()).hexdigest()
    assert np.isnan(array.fill_value)
    assert array.attrs["units"] == "1"


def test_writer_that_is_cut_off_or_misses_pixels(tmp_path: Path) -> None:
    z = z_of(0, "float16")
    with suppress(KeyboardInterrupt), ZWriter(tmp_path, z.shape, "float16", {}) as writer:
        writer.write(0, 0, z)
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(tmp_path / "z", mode="r")[:]
    with pytest.raises(AssertionError), ZWriter(tmp_path / "b", z.shape, "float16", {}) as writer:  # noqa: PT012
        writer.write(0, 0, z[:-1])
        writer.write(NY - 1, 4, z[-1:, 4:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_and_their_counts_equal_slices(tmp_path: Path, make_store: MakeStore, dtype: str) -> None:
    scenes = {"a": z_of(0, dtype), "b": z_of(1, dtype, (5, 11, NC))}
    store = make_store(tmp_path / "store", scenes, dtype=dtype)
    assert store.dtype == dtype
    for scene, z in enumerate(scenes.values()):
        for height, width in ((1, 1), (3, 3), (4, 2), z.shape[:2]):
            for y in range(z.shape[0] - height + 1):
                for x in range(z.shape[1] - width + 1):
                    tile, truth = np.empty((height, width, NC), dtype), z[y : y + height, x : x + width]
                    store.read_tile(scene, y, x, tile)
                    assert tile.tobytes() == truth.tobytes()
                    assert height != width or store.count_invalid(scene, y, x, width) == np.isnan(truth).sum()


# --- the whole store ----------------------------------------------------------------------------


@pytest.mark.parametrize(("consolidated", "limit"), [(True, 3), (True, 2), (True, 0), (False, 3)])
def test_zarr_and_xarray_open_all_of_it(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, consolidated: bool, limit: int
) -> None:
    """Whether or not the root knows the arrays of all scenes."""
    monkeypatch.setattr(store_writer, "CONSOLIDATED_SCENES", limit)
    scenes, truth = {name: z_of(i, "float16") for i, name in enumerate("abc")}, geometry()
    store = make_store(tmp_path / "store", scenes, val=("b",), arrays=truth)
    known = json.loads((store.path / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    assert "scenes/b" in known and ("scenes/b/z" in known) == (limit == 3)
    with xr.open_zarr(store.path, consolidated=consolidated, chunks=None) as ds:
        assert set(ds.variables) == STATISTICS
        assert all(v.dims == ("channel",) for v in ds.variables.values())
        np.testing.assert_array_equal(ds["mean"], 1.0 + np.arange(NC))
        assert ds["wavelength"].attrs["units"] == "nm"
        assert (ds.attrs["hash"], ds.attrs["scenes"][1]["split"]) == (store.hash, "val")
    assert (store.indices("train"), store.indices("val")) == ([0, 2], [1])
    assert set(zarr.open_group(store.path / "scenes", mode="r", use_consolidated=False)) == set(scenes)
    group = zarr.open_group(store.path, mode="r")["scenes"]
    assert set(group.group_keys()) == set(scenes)
    for name, z in scenes.items():
        assert group[name]["z"][:].tobytes() == z.tobytes()
        with xr.open_zarr(store.path, group=f"scenes/{name}", consolidated=consolidated, chunks=None) as ds:
            ds.load()
        assert set(ds.variables) == {"z", "n_invalid", *truth}
        assert (ds["z"].dims, ds["z"].dtype, ds.attrs["id"]) == (("y", "x", "channel"), np.float16, name)
        np.testing.assert_array_equal(ds["z"], z)
        np.testing.assert_array_equal(ds["n_invalid"], np.isnan(z).sum(axis=-1))
        assert ds["n_invalid"].dtype == np.uint8  # zero is a count, and must not be taken for fill
        np.testing.assert_array_equal(ds["latitude"], truth["latitude"][1])
        assert ds["latitude"].attrs["units"] == "degrees_north"
        assert ds["wavelength"].dims == ("x", "channel")
        np.testing.assert_array_equal(ds["wavelength"], truth["wavelength"][1])
        time = ds["time"].to_numpy()
        np.testing.assert_array_equal(np.isnat(time), np.arange(NY) == 3)
        # 1717276174.25 s after 1970 is 21:09:34.25 UTC on the first of June 2024
        assert abs(time[0] - np.datetime64("2024-06-01T21:09:34.250")) < np.timedelta64(1, "ms")


def test_hash_is_of_the_content(tmp_path: Path, make_store: MakeStore) -> None:
    a, b = z_of(0, "float16"), z_of(1, "float16")
    first = make_store(tmp_path / "1", {"a": a, "b": b})
    assert make_store(tmp_path / "2", {"a": a, "b": b}).hash == first.hash
    shutil.move(tmp_path / "2", tmp_path / "moved")
    assert Store(tmp_path / "moved").hash == first.hash
    changed = b.copy()
    changed[8, 6, 5] = 1.25 if changed[8, 6, 5] != 1.25 else 1.5
    others = (
        {"scenes": {"a": a, "b": changed}},
        {"scenes": {"a": a, "c": b}},
        {"scenes": {"a": a, "b": b}, "val": ("b",)},
        {"scenes": {"a": a, "b": b}, "dtype": "float32"},
        {"scenes": {"b": b, "a": a}},
    )
    hashes = {make_store(tmp_path / f"other{i}", **other).hash for i, other in enumerate(others)}
    assert len({first.hash, *hashes}) == 6


# --- many scenes --------------------------------------------------------------------------------


def test_ten_thousand_scenes_cost_one_file(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A root that lists 10,000 scenes, of which one is there: to open it, none of them is looked at."""
    monkeypatch.setattr(store_writer, "CONSOLIDATED_SCENES", 0)
    made = make_store(tmp_path / "store", {"s00000": z_of(0, "float16")}, arrays=geometry())
    root = json.loads((made.path / "zarr.json").read_text())
    attributes, members = root["attributes"], root["consolidated_metadata"]["metadata"]
    record, group = attributes["scenes"][0], members["scenes/s00000"]
    ids = [f"s{i:05d}" for i in range(10_000)]
    attributes["scenes"] = [{**record, "id": name} for name in ids]
    members |= {f"scenes/{name}": {**group, "attributes": {**group["attributes"], "id": name}} for name in ids}
    attributes["hash"] = content_hash(attributes, made.arrays)
    (made.path / "zarr.json").write_text(json.dumps(root))

    scenes = made.path / "scenes"
    aside = scenes.rename(tmp_path / "aside")
    scenes.symlink_to(scenes)  # to open anything there is an error
    assert [s.id for s in Store(made.path).scenes] == ids
    xr.open_zarr(made.path, chunks=None).load()
    scenes.unlink()
    aside.rename(scenes)
    for name in ids[1:]:
        (scenes / name).symlink_to(scenes / name)
    xr.open_zarr(made.path, group="scenes/s00000", chunks=None).load()


# --- what does not open -------------------------------------------------------------------------


def is_no_store(path: Path, *words: str) -> None:
    with refused(InputError, *words, path=path):
        Store(path)


def test_only_a_finished_store_opens(two: Store, tmp_path: Path) -> None:
    """The root's zarr.json, which is written last, is the marker."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "file"):
        is_no_store(path, "prepare")
    zarr.create_group(tmp_path / "foreign").create_array("mean", shape=(3,), dtype="float64")
    is_no_store(tmp_path / "foreign", f"format {FORMAT}")
    root = two.path / "zarr.json"
    text = root.read_text()
    for found in (1, 3):
        root.write_text(text.replace(f'"spectralvae_store": {FORMAT}', f'"spectralvae_store": {found}'))
        is_no_store(two.path, f"format {found}", f"format {FORMAT}")
    # who moves a scene into validation by hand gets statistics that have seen it
    root.write_text(text.replace('"split": "train"', '"split": "val"'))
    is_no_store(two.path, "hash")
    root.write_text(text)
    Store(two.path)
    root.unlink()
    is_no_store(two.path, "zarr.json")
    for command, word in (("prepare", "not finished"), ("train", "spectralvae train")):
        (two.path / "run.json").write_text(json.dumps({"tool": "spectralvae", "command": command}))
        is_no_store(two.path, word)


def test_damaged_metadata_and_statistics(two: Store) -> None:
    root = two.path / "zarr.json"
    text = root.read_text()
    texts = [text[: len(text) // 2], "[1, 2]"]
    for *parents, last in (["attributes"], ["attributes", "hash"], ["attributes", "scenes", 0, "shape"]):
        content = json.loads(text)
        del reduce(getitem, parents, content)[last]
        texts.append(json.dumps(content))
    for damaged in texts:
        root.write_text(damaged)
        is_no_store(two.path, "corrupt")
    root.write_text(text)
    # zarr reads a lost chunk as zeros: a mean of 0 would go unnoticed into every reconstruction
    chunks = {name: next(p for p in (two.path / name / "c").iterdir()) for name in ("mean", "std", "wavelength")}
    for chunk in chunks.values():
        content = chunk.read_bytes()
        for damaged in (None, content[:5], chunks["std" if chunk == chunks["mean"] else "mean"].read_bytes()):
            chunk.write_bytes(damaged) if damaged else chunk.unlink()
            is_no_store(two.path, "corrupt")
        chunk.write_bytes(content)
    Store(two.path)
    shutil.rmtree(two.path / "mean")
    is_no_store(two.path, "corrupt")


@pytest.mark.parametrize(("n_channels", "dtype"), [(255, "u1"), (256, "<u2")])
@pytest.mark.parametrize("lost", [0, 7])
def test_counts_are_a_plain_file(
    tmp_path: Path, make_store: Callable[..., Store], n_channels: int, dtype: str, lost: int
) -> None:
    """Also where no sample is invalid: zarr leaves out a chunk that holds nothing but the fill value."""
    z = np.zeros((4, 5, n_channels), np.float16)
    z.reshape(-1, n_channels)[:lost] = np.nan
    made = make_store(tmp_path / "store", {"a": z})
    truth = np.isnan(z).sum(axis=-1)
    folder = tmp_path / "store/scenes/a/n_invalid"
    np.testing.assert_array_equal(np.fromfile(folder / "c/0/0", dtype).reshape(4, 5), truth)
    np.testing.assert_array_equal(made.n_invalid(0), truth)
    array = zarr.open_array(folder, mode="r")
    assert array.dtype == dtype
    np.testing.assert_array_equal(array[:], truth)
    file = folder / "c/0/0"
    for content in (b"\7" + file.read_bytes()[1:], file.read_bytes()[:-1], None):  # the first is as long
        file.write_bytes(content) if content else file.unlink()
        with refused(InputError, path=file):
            made.n_invalid(0)
