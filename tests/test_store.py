"""The store: what is written is what zarr and xarray read, and nothing but a finished store opens."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

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


def z_file(store: Store, name: str) -> Path:
    """The only file of a scene's z that holds data."""
    (file,) = (p for p in (store.path / "scenes" / name / "z").rglob("*") if p.is_file() and p.name != "zarr.json")
    return file


# --- z --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[0, NY], [0, 1, NY], [0, 2, 3, 8, NY], list(range(NY + 1))])
@pytest.mark.parametrize("columns", [[0, NX], [0, 3, 4, NX]])
@pytest.mark.parametrize("shuffled", [False, True])
def test_z_written_in_pieces_reads_back_in_zarr(
    tmp_path: Path, dtype: str, rows: list[int], columns: list[int], shuffled: bool
) -> None:
    z = z_of(0, dtype)
    pieces = [(slice(*r), slice(*c)) for r in pairwise(rows) for c in pairwise(columns)]
    if shuffled:
        pieces = [pieces[i] for i in np.random.default_rng(0).permutation(len(pieces))]
    with ZWriter(tmp_path, z.shape, dtype, {"units": "1"}) as writer:
        for r, c in pieces:
            stored = writer.write(r.start, c.start, z[r, c].astype(np.float64))
            assert stored.tobytes() == z[r, c].tobytes()
    array = zarr.open_array(tmp_path / "z", mode="r")
    assert array.dtype == dtype
    assert array[:].tobytes() == z.tobytes()
    assert array[4, 3].tobytes() == z[4, 3].tobytes()  # one pixel's spectrum
    assert array[NY - 1, NX - 1, NC - 1] == z[-1, -1, -1] or np.isnan(z[-1, -1, -1])
    assert array[2:5, 1:6:2, 3].tobytes() == np.ascontiguousarray(z[2:5, 1:6:2, 3]).tobytes()
    assert writer.sha256 == hashlib.sha256(z.tobytes()).hexdigest()
    assert array.metadata.dimension_names == ("y", "x", "channel")
    assert np.isnan(array.fill_value)
    assert array.attrs["units"] == "1"


def test_z_begins_with_the_plain_array(two: Store) -> None:
    """Readers in other languages may map the file: raw, row-major, little-endian."""
    raw = np.fromfile(z_file(two, "a"), "<f2", count=NY * NX * NC).reshape(NY, NX, NC)
    assert raw.tobytes() == z_of(0, "float16").tobytes()


def test_float64_is_rounded_to_nearest(tmp_path: Path) -> None:
    z = np.random.default_rng(0).uniform(-10, 10, (4, 5, 6))
    with ZWriter(tmp_path, z.shape, "float16", {}) as writer:
        stored = writer.write(0, 0, z)
    assert np.abs(stored.astype(np.float64) - z).max() <= 2.0**-8  # half of the spacing between 8 and 16
    assert stored.tobytes() == z.astype(np.float16).tobytes()


def test_writer_cut_off_leaves_no_readable_z(tmp_path: Path) -> None:
    z = z_of(0, "float16")
    with pytest.raises(RuntimeError, match="stop"), ZWriter(tmp_path, z.shape, "float16", {}) as writer:  # noqa: PT012
        writer.write(0, 0, z)
        raise RuntimeError("stop")
    array = zarr.open_array(tmp_path / "z", mode="r")
    with pytest.raises(ValueError, match="checksum"):
        array[:]


def test_missing_pixels_are_our_own_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="4 pixels"), ZWriter(tmp_path, (NY, NX, NC), "float16", {}) as writer:  # noqa: PT012
        writer.write(0, 0, z_of(0, "float16")[:-1])
        writer.write(NY - 1, 4, z_of(0, "float16")[-1:, 4:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_tile_equals_slices(tmp_path: Path, make_store: MakeStore, dtype: str) -> None:
    scenes = {"a": z_of(0, dtype), "b": z_of(1, dtype, (5, 11, NC))}
    store = make_store(tmp_path / "store", scenes, dtype=dtype)
    assert store.dtype == dtype
    for scene, z in enumerate(scenes.values()):
        for height, width in ((1, 1), (3, 3), (4, 2), z.shape[:2]):
            for y in range(z.shape[0] - height + 1):
                for x in range(z.shape[1] - width + 1):
                    tile = np.empty((height, width, NC), dtype)
                    store.read_tile(scene, y, x, tile)
                    assert tile.tobytes() == z[y : y + height, x : x + width].tobytes()


def test_truncated_z_is_refused_by_name(two: Store) -> None:
    file = z_file(two, "b")
    row = NX * NC * 2
    with file.open("r+b") as f:
        f.truncate(6 * row + 5)
    tile = np.empty((2, 2, NC), np.float16)
    two.read_tile(1, 4, 0, tile)  # what is there can be read
    for y in (5, 6, 7):
        with pytest.raises(InputError, match="shorter") as caught:
            two.read_tile(1, y, 2, tile)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(InputError, match="cannot be read") as caught:
        two.read_tile(1, 0, 0, tile)
    assert str(file) in str(caught.value)


# --- the whole store ----------------------------------------------------------------------------


def test_open(two: Store) -> None:
    assert [s.id for s in two.scenes] == ["a", "b"]
    assert two.indices("train") == [0]
    assert two.indices("val") == [1]
    assert two.dtype == np.float16
    assert two.normalization.settings() == {
        "transform": "zscore",
        "clip": 10.0,
        "min_radiance": None,
        "band": None,
        "units": None,
        "valid_range": None,
        "flag_bits": None,
        "max_solar_zenith": None,
    }
    np.testing.assert_array_equal(two.normalization.mean, 1.0 + np.arange(NC))
    np.testing.assert_array_equal(two.normalization.std, 2.0 + np.arange(NC))
    np.testing.assert_array_equal(two.normalization.wavelength, 400.0 + np.arange(NC))
    for scene, seed in ((0, 0), (1, 1)):
        np.testing.assert_array_equal(two.n_invalid(scene), np.isnan(z_of(seed, "float16")).sum(axis=-1))


def test_zarr_sees_all_of_it(two: Store) -> None:
    group = zarr.open_group(two.path, mode="r")
    names = {name for name, _ in group.members(max_depth=None)}
    inside = {"z", "n_invalid", "latitude", "time", "wavelength"}
    assert names == {
        *STATISTICS,
        *("scenes", "scenes/a", "scenes/b"),
        *(f"scenes/{s}/{name}" for s in "ab" for name in inside),
    }
    assert group["scenes/b/z"][:].tobytes() == z_of(1, "float16").tobytes()
    assert group.attrs["scenes"][1]["split"] == "val"
    assert group.attrs["hash"] == two.hash
    assert set(zarr.open_group(two.path / "scenes", mode="r", use_consolidated=False)) == {"a", "b"}


@pytest.mark.parametrize("consolidated", [True, False])
def test_xarray_opens_the_root(two: Store, consolidated: bool) -> None:
    with xr.open_zarr(two.path, consolidated=consolidated, chunks=None) as ds:
        assert set(ds.variables) == STATISTICS
        assert all(v.dims == ("channel",) for v in ds.variables.values())
        np.testing.assert_array_equal(ds["mean"], 1.0 + np.arange(NC))
        assert ds["wavelength"].attrs["units"] == "nm"
        assert ds.attrs["hash"] == two.hash


@pytest.mark.parametrize("consolidated", [True, False])
def test_xarray_opens_a_scene(two: Store, consolidated: bool) -> None:
    with xr.open_zarr(two.path, group="scenes/b", consolidated=consolidated, chunks=None) as ds:
        ds.load()
    z = z_of(1, "float16")
    assert ds["z"].dims == ("y", "x", "channel")
    np.testing.assert_array_equal(ds["z"], z)
    assert ds["z"].dtype == np.float16
    assert ds["n_invalid"].dtype.kind in "iu"
    np.testing.assert_array_equal(ds["n_invalid"], np.isnan(z).sum(axis=-1))
    truth = geometry()
    np.testing.assert_array_equal(ds["latitude"], truth["latitude"][1])
    assert ds["latitude"].attrs["units"] == "degrees_north"
    assert ds["wavelength"].dims == ("x", "channel")
    np.testing.assert_array_equal(ds["wavelength"], truth["wavelength"][1])
    assert ds.attrs["id"] == "b"


def test_dates_decode_in_xarray(two: Store) -> None:
    with xr.open_zarr(two.path, group="scenes/a", chunks=None) as ds:
        time = ds["time"].to_numpy()
    assert time.dtype.kind == "M"
    assert np.isnat(time[3])
    assert not np.isnat(np.delete(time, 3)).any()
    # 1717276174.25 s after 1970 is 21:09:34.25 UTC on the first of June 2024
    assert abs(time[0] - np.datetime64("2024-06-01T21:09:34.250")) < np.timedelta64(1, "ms")
    assert abs(time[8] - time[0] - np.timedelta64(20, "s")) < np.timedelta64(1, "ms")


def test_hash_is_of_the_content(tmp_path: Path, make_store: MakeStore) -> None:
    a, b = z_of(0, "float16"), z_of(1, "float16")
    first = make_store(tmp_path / "1", {"a": a, "b": b})
    assert make_store(tmp_path / "2", {"a": a, "b": b}).hash == first.hash
    shutil.move(tmp_path / "2", tmp_path / "moved")
    assert Store(tmp_path / "moved").hash == first.hash
    changed = b.copy()
    changed[8, 6, 5] = 1.25 if changed[8, 6, 5] != 1.25 else 1.5
    others = [
        make_store(tmp_path / "3", {"a": a, "b": changed}).hash,
        make_store(tmp_path / "4", {"a": a, "c": b}).hash,
        make_store(tmp_path / "5", {"a": a, "b": b}, val=("b",)).hash,
        make_store(tmp_path / "6", {"a": a.astype("float32"), "b": b.astype("float32")}, dtype="float32").hash,
        make_store(tmp_path / "7", {"b": b, "a": a}).hash,
    ]
    assert len({first.hash, *others}) == 6


# --- many scenes --------------------------------------------------------------------------------


def check_opens_in_zarr_and_xarray(path: Path, scene: str, z: np.ndarray) -> None:
    with xr.open_zarr(path, chunks=None) as ds:
        assert set(ds.variables) == STATISTICS
        np.testing.assert_array_equal(ds["mean"], 1.0 + np.arange(NC))
    with xr.open_zarr(path, group=f"scenes/{scene}", chunks=None) as ds:
        np.testing.assert_array_equal(ds["z"], z)
        assert set(ds.variables) == {"z", "n_invalid", "latitude", "time", "wavelength"}
    root = zarr.open_group(path, mode="r")
    assert root["scenes"][scene]["z"][:].tobytes() == z.tobytes()
    assert scene in set(root["scenes"].group_keys())
    np.testing.assert_array_equal(root["mean"][:], 1.0 + np.arange(NC))


@pytest.mark.parametrize("limit", [0, 2, 3])
def test_opens_whether_or_not_the_root_knows_all_arrays(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(store_writer, "CONSOLIDATED_SCENES", limit)
    scenes = {name: z_of(i, "float16") for i, name in enumerate("abc")}
    path = make_store(tmp_path / "store", scenes, arrays=geometry()).path
    known = json.loads((path / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    assert ("scenes/b/z" in known) == (limit == 3)
    assert "scenes/b" in known
    for name, z in scenes.items():
        check_opens_in_zarr_and_xarray(path, name, z)


OPENED: list[str] = []  # paths, while `recording` holds
recording = False


def record_opened(event: str, arguments: tuple[object, ...]) -> None:
    if recording and event == "open" and isinstance(arguments[0], (str, Path)):
        OPENED.append(str(arguments[0]))


@contextmanager
def opened_inside(path: Path) -> Iterator[set[str]]:
    """Which files of a folder this process opens, relative to it; known when the block is left."""
    global recording
    found: set[str] = set()
    OPENED.clear()
    recording = True
    try:
        yield found
    finally:
        recording = False
        found.update(str(Path(p).relative_to(path)) for p in OPENED if Path(p).is_relative_to(path))


@pytest.fixture(scope="module", autouse=True)
def _audit() -> None:
    """A hook cannot be taken away again, so it has a switch."""
    sys.addaudithook(record_opened)


def test_ten_thousand_scenes_cost_one_file(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A root that lists 10,000 scenes, of which one is there: to open it, none of them is looked at."""
    monkeypatch.setattr(store_writer, "CONSOLIDATED_SCENES", 0)
    z = z_of(0, "float16")
    made = make_store(tmp_path / "store", {"s00000": z}, arrays=geometry())
    root = json.loads((made.path / "zarr.json").read_text())
    attributes, members = root["attributes"], root["consolidated_metadata"]["metadata"]
    record, group = attributes["scenes"][0], members["scenes/s00000"]
    for i in range(1, 10_000):
        row = {**record, "id": f"s{i:05d}"}
        attributes["scenes"].append(row)
        members[f"scenes/{row['id']}"] = {**group, "attributes": {**group["attributes"], "id": row["id"]}}
    attributes["hash"] = content_hash(attributes, made.arrays)
    (made.path / "zarr.json").write_text(json.dumps(root))

    with opened_inside(made.path) as opened:
        store = Store(made.path)
    assert "zarr.json" in opened
    assert {Path(p).parts[0] for p in opened} == {"zarr.json", *STATISTICS}
    assert [s.id for s in store.scenes] == [f"s{i:05d}" for i in range(10_000)]
    with opened_inside(made.path) as opened, xr.open_zarr(made.path, chunks=None) as ds:
        ds.load()
    assert "zarr.json" in opened
    assert not any(p.startswith("scenes") for p in opened)
    with opened_inside(made.path) as opened, xr.open_zarr(made.path, group="scenes/s00000", chunks=None) as ds:
        np.testing.assert_array_equal(ds["z"], z)
    assert not any(p.startswith("scenes") and not p.startswith("scenes/s00000/") for p in opened)


# --- what does not open -------------------------------------------------------------------------


def refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        Store(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message, f"{word!r} not in: {message}"


def test_no_folder_or_an_empty_one(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such folder", "prepare")
    refused(tmp_path, "no store", "prepare")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")


def test_unfinished_store(two: Store) -> None:
    (two.path / "zarr.json").unlink()
    refused(two.path, "no store")
    (two.path / "run.json").write_text('{"tool": "spectralvae", "command": "prepare"}')
    refused(two.path, "not finished", "prepare")


def test_foreign_zarr_group(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "foreign").create_array("mean", shape=(3,), dtype="float64")
    refused(tmp_path / "foreign", "no spectralvae store")
    zarr.create_array(tmp_path / "array", shape=(3,), dtype="float64")
    refused(tmp_path / "array", "no spectralvae store")


@pytest.mark.parametrize("found", [1, 3])
def test_store_of_another_format(two: Store, found: int) -> None:
    root = two.path / "zarr.json"
    root.write_text(root.read_text().replace(f'"spectralvae_store": {FORMAT}', f'"spectralvae_store": {found}'))
    refused(two.path, f"is a store of format {found}", "needed: format 2", "prepare it with this version")


@pytest.mark.parametrize(
    "damage", ["cut", "list", "no attributes", "no hash", "no scenes", "no mean", "column missing"]
)
def test_damaged_metadata(two: Store, damage: str) -> None:
    root = two.path / "zarr.json"
    content = json.loads(root.read_text())
    if damage == "list":
        content = [1, 2]
    elif damage == "no attributes":
        del content["attributes"]
    elif damage in ("no hash", "no scenes"):
        del content["attributes"][damage.removeprefix("no ")]
    elif damage == "column missing":
        del content["attributes"]["scenes"][0]["shape"]
    elif damage == "no mean":
        shutil.rmtree(two.path / "mean")
    text = json.dumps(content)
    root.write_text(text[: len(text) // 2] if damage == "cut" else text)
    refused(two.path, "damaged")


@pytest.mark.parametrize("name", ["mean", "std", "wavelength"])
@pytest.mark.parametrize("damage", ["lost", "cut", "overwritten"])
def test_damaged_statistics(two: Store, name: str, damage: str) -> None:
    """zarr reads a lost chunk as zeros: a mean of 0 would go unnoticed into every reconstruction."""
    (chunk,) = (p for p in (two.path / name).rglob("*") if p.is_file() and p.name != "zarr.json")
    if damage == "lost":
        chunk.unlink()
    elif damage == "cut":
        chunk.write_bytes(chunk.read_bytes()[:5])
    else:
        other = "mean" if name == "std" else "std"
        shutil.copyfile(next(p for p in (two.path / other / "c").iterdir() if p.is_file()), chunk)
    refused(two.path, "damaged")


def test_edited_table(two: Store) -> None:
    """Who moves a scene into validation by hand gets statistics that have seen it."""
    root = two.path / "zarr.json"
    root.write_text(root.read_text().replace('"split": "train"', '"split": "val"'))
    refused(two.path, "damaged")


def test_lost_or_damaged_counts_are_refused(tmp_path: Path, make_store: Callable[..., Store]) -> None:
    """zarr reads a lost chunk as zeros: tiles without data would be drawn."""
    z = np.zeros((5, 6, 3), np.float16)
    z[1] = np.nan
    made = make_store(tmp_path / "store", {"a": z})
    assert made.n_invalid(0).sum() == 18
    file = tmp_path / "store/scenes/a/n_invalid/c/0/0"
    for content, message in (
        (bytes(30), "is damaged"),  # as long as it was, of other content
        (file.read_bytes()[:-1], "has 29 bytes instead of 30"),
        (None, "cannot be read"),
    ):
        file.write_bytes(content) if content else file.unlink()
        with pytest.raises(InputError, match=message) as caught:
            made.n_invalid(0)
        assert str(file) in str(caught.value)
        assert "prepare the store again" in str(caught.value)


@pytest.mark.parametrize(("n_channels", "dtype"), [(3, "u1"), (255, "u1"), (256, "<u2"), (1028, "<u2")])
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
    with xr.open_zarr(made.path, group="scenes/a", chunks=None) as ds:
        np.testing.assert_array_equal(ds["n_invalid"], truth)
        assert ds["n_invalid"].dtype == dtype  # zero is a count, and must not be taken for fill


def test_count_invalid_against_z(two: Store) -> None:
    for scene, seed in ((0, 0), (1, 1)):
        invalid = np.isnan(z_of(seed, "float16"))
        for tile in (1, 3, NX):
            for y in range(NY - tile + 1):
                for x in range(NX - tile + 1):
                    assert two.count_invalid(scene, y, x, tile) == invalid[y : y + tile, x : x + tile].sum()


def test_short_or_lost_counts_are_refused_by_name(two: Store) -> None:
    """Not read as zeros, and no death by SIGBUS."""
    file = two.path / "scenes/b/n_invalid/c/0/0"
    with file.open("r+b") as f:
        f.truncate(6 * NX - 1)
    assert two.count_invalid(1, 3, 0, 2) >= 0  # what is there can be read
    for y in (4, 5, 7):
        with pytest.raises(InputError, match="shorter") as caught:
            two.count_invalid(1, y, 0, 2)
        assert str(file) in str(caught.value)
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        two.count_invalid(1, 0, 0, 2)


def test_read_into_a_turned_view(two: Store) -> None:
    z = z_of(0, "float16")
    for flip in (False, True):
        for turns in range(4):
            finished = np.empty((4, 4, NC), np.float16)
            view = np.rot90(finished, -turns)
            two.read_tile(0, 2, 3, view[::-1] if flip else view)
            truth = z[2:6, 3:7]
            np.testing.assert_array_equal(finished, np.rot90(np.flipud(truth) if flip else truth, turns))
