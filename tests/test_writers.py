"""Files that are whole or not there, as xarray, h5py and the project's own readers see them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr
import zarr
from refusals import refused
from test_rundir import file_limit

from spectralvae.errors import NoRoomError
from spectralvae.files import writer_netcdf
from spectralvae.files.writer_base import CHUNK_BYTES, row_chunks
from spectralvae.files.writers import Writer, new_file
from spectralvae.readers.containers import open_container
from spectralvae.runtime.signals import Stopped, stop_at_once

KINDS = ("netcdf", "zarr")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
ENGINES = {"netcdf": "h5netcdf", "zarr": "zarr"}
NAMES = {"netcdf": "a.nc", "zarr": "a.zarr"}
FILL = np.float32(-1e30)


def cube(ny: int = 9, nx: int = 50, nc: int = 30) -> np.ndarray:
    values = np.random.default_rng(1).normal(size=(ny, nx, nc)).astype(np.float32)
    values[2, 3:5] = values[4] = FILL
    return values


def fill_in(writer: Writer, values: np.ndarray) -> None:
    """A group with a cube, and what else a file may hold."""
    ny, nx, nc = values.shape
    writer.group("", {"title": "t"})
    writer.dimension("y", ny)
    writer.dimension("x", nx)
    writer.dimension("band/channel", nc)
    writer.create("y", ("y",), "i4", {"units": "1"}, values=np.arange(ny))
    writer.create("band/cube", ("y", "x", "channel"), np.float32, {"units": "W"}, fill=-1e30, chunks=(1, 16, nc))
    writer.create("band/lonely", (), "f8", {}, values=2.5)
    for row in range(0, ny, 2):
        writer.write("band/cube", (slice(row, min(row + 2, ny)), slice(None), slice(None)), values[row : row + 2])


def make(path: Path, kind: Any, values: np.ndarray, then: Callable[[Writer], None] = lambda _: None) -> Path:
    with new_file(path, kind) as writer:
        fill_in(writer, values)
        then(writer)
    return path


class TestContent:
    @EVERY_KIND
    def test_as_libraries_see_it(self, tmp_path: Path, kind: str) -> None:
        values = cube()
        path = make(tmp_path / NAMES[kind], kind, values)
        with xr.open_datatree(path, engine=ENGINES[kind]) as tree:
            assert tree.attrs == {"title": "t"}
            found = tree["band/cube"]
            assert found.dims == ("y", "x", "channel")
            assert found.attrs == {"units": "W"}
            np.testing.assert_array_equal(found, np.where(values == FILL, np.nan, values))
            np.testing.assert_array_equal(tree["y"], np.arange(9))
            assert tree["band/lonely"] == 2.5
        with xr.open_dataset(path, engine=ENGINES[kind], group="band", mask_and_scale=False) as raw:
            np.testing.assert_array_equal(raw["cube"], values)
            assert raw["cube"].attrs["_FillValue"] == FILL
        if kind == "zarr":
            stored = zarr.open_array(path / "band" / "cube", mode="r")
            assert stored.metadata.zarr_format == 3
            assert stored.metadata.dimension_names == ("y", "x", "channel")
            assert [type(codec).__name__ for codec in stored.compressors] == ["ZstdCodec", "Crc32cCodec"]
            assert stored.nchunks_initialized == stored.nchunks
            return
        with h5py.File(path) as file:
            stored = file["band/cube"]
            assert [axis[0].name for axis in stored.dims] == ["/y", "/x", "/band/channel"]
            assert stored.chunks == (1, 16, 30)
            assert (stored.compression, stored.shuffle, stored.fletcher32) == ("gzip", True, True)
            assert stored.fillvalue == FILL
            assert file["y"].is_scale
            assert b"netCDF dimension but not" in file["x"].attrs["NAME"]

    @EVERY_KIND
    def test_attributes(self, tmp_path: Path, kind: str) -> None:
        given = {
            "text": "hällo", "empty": "", "bytes": b"abc", "whole": 3, "real": 0.1, "truth": True,
            "single": np.float32(0.1), "short": np.int16(-5), "vector": np.array([1, 2, 3], np.uint16),
            "list": [1.5, 2.5], "texts": ["a", "ü"], "nothing": np.array([], np.int32), "mixed": [1, "a"],
            "nested": {"a": [1, None]}, "ragged": [[1], [2, 3]], "long": "x" * 200_000, "nan": np.nan,
        }  # fmt: skip
        path = tmp_path / NAMES[kind]
        with new_file(path, kind) as writer:  # type: ignore[arg-type]
            writer.group("a/b", given)
            writer.dimension("n", 2)
            writer.create("a/v", ("n",), "i2", given, values=[1, 2])
        expected = given | {
            "bytes": "abc", "truth": 1, "nested": '{"a": [1, null]}', "ragged": "[[1], [2, 3]]"
        }  # fmt: skip
        with xr.open_datatree(path, engine=ENGINES[kind]) as tree:
            for found in (tree["a/b"].attrs, tree["a/v"].attrs):
                assert found.keys() == expected.keys()
                for key in expected.keys() - {"mixed"}:
                    np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
        with closing(open_container(path)) as container:
            assert container.attributes("a/v").keys() == expected.keys()

    @EVERY_KIND
    def test_types(self, tmp_path: Path, kind: str) -> None:
        path, values, texts = tmp_path / NAMES[kind], np.array([0, 1, 100]), ["a", "", "ünicode"]
        dtypes = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", ">f4", ">i2"]
        with new_file(path, kind) as writer:  # type: ignore[arg-type]
            writer.dimension("n", 3)
            for dtype in dtypes:
                writer.create(dtype, ("n",), dtype, {}, fill=100, values=values.astype(dtype))
            writer.create("texts", ("n",), "str", {"a": "b"}, values=texts)
            writer.create("text", (), str, {}, values="one")
        with (
            xr.open_dataset(path, engine=ENGINES[kind], mask_and_scale=False) as raw,
            xr.open_dataset(path, engine=ENGINES[kind]) as masked,
        ):
            for dtype in dtypes:
                assert raw[dtype].dtype == np.dtype(dtype).newbyteorder("=")
                np.testing.assert_array_equal(raw[dtype], values)
                assert raw[dtype].attrs["_FillValue"] == 100
                np.testing.assert_array_equal(np.isnan(masked[dtype].values), [False, False, True])
            assert (raw["texts"].values.tolist(), raw["text"].item()) == (texts, "one")
        with closing(open_container(path)) as container:
            assert container.read("texts", (slice(1, 3),)).tolist() == texts[1:]
            assert container.read("text", ()).item() == "one"


class TestChunks:
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
    def test_a_row_is_written_at_once(self, tmp_path: Path, order: tuple[int, ...]) -> None:
        ny, nx, nc = 6, 700, 600
        values = np.random.default_rng(0).normal(size=(ny, nx, nc)).astype(np.float32)
        stored = values.transpose(order)
        row, column = order.index(0), order.index(1)
        chunks = row_chunks(stored.shape, 4, row, column)
        assert chunks[row] == 1
        assert chunks[order.index(2)] == nc
        assert np.prod(chunks) * 4 <= CHUNK_BYTES
        assert chunks[column] & (chunks[column] - 1) == 0
        with new_file(tmp_path / "a.nc", "netcdf") as writer:
            for name, size in zip("abc", stored.shape, strict=True):
                writer.dimension(name, size)
            writer.create("v", ("a", "b", "c"), "f4", {}, chunks=chunks)
            for columns in (slice(0, 300), slice(300, 600), slice(600, 700)):  # panels that end within a chunk
                for y in range(0, ny, 4):
                    key = [slice(None)] * 3
                    key[row], key[column] = slice(y, min(y + 4, ny)), columns
                    writer.write("v", tuple(key), values[y : y + 4, columns].transpose(order))
        with xr.open_dataset(tmp_path / "a.nc") as dataset:
            np.testing.assert_array_equal(dataset["v"], stored)

    def test_small_variables_are_one_chunk_and_long_rows_are_cut(self) -> None:
        assert [row_chunks((5, 6), 4), row_chunks((0, 6), 4), row_chunks((), 8)] == [(5, 6), (1, 6), ()]
        rows, columns = row_chunks((10, 10_000_000), 4)
        assert rows == 1 and CHUNK_BYTES / 2 <= columns * 4 <= CHUNK_BYTES

    @EVERY_KIND
    def test_what_is_given_may_be_changed(self, tmp_path: Path, kind: str) -> None:
        path, values = tmp_path / NAMES[kind], np.zeros((4, 300_000), np.float32)
        with new_file(path, kind) as writer:  # type: ignore[arg-type]
            writer.dimension("y", 4)
            writer.dimension("x", 300_000)
            writer.create("v", ("y", "x"), "f4", {})
            for row in range(4):
                values[:1] = row
                writer.write("v", (slice(row, row + 1), slice(None)), values[:1])
                values[:1] = -1
        with xr.open_dataset(path, engine=ENGINES[kind]) as dataset:
            np.testing.assert_array_equal(dataset["v"], np.repeat(np.arange(4.0)[:, None], 300_000, axis=1))


def signal_at(owner: Any, name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """SIGTERM comes while a function is called for the nth time; returns a list that gets the thread of every call."""
    function, calls = getattr(owner, name), []

    def wrapper(*arguments: Any, **options: Any) -> Any:
        calls.append(threading.current_thread())
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def in_a_process(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program with all that is defined here."""
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_writers import *\n"
    return subprocess.run([sys.executable, "-c", start + program], check=False, capture_output=True, text=True)


class TestWholeOrNot:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, lambda: Stopped(75)])
    @EVERY_KIND
    def test_failure(self, tmp_path: Path, kind: str, error: Callable[[], BaseException]) -> None:
        """It leaves what was there before: nothing, or the file as it was; success replaces that."""
        path = tmp_path / NAMES[kind]

        def fail(_: Writer) -> None:
            raise error()

        for values in (None, cube(), cube()[:4] + 1):
            if values is not None:
                make(path, kind, values)
            with pytest.raises(type(error())):
                make(path, kind, cube() + 2, fail)
            if values is None:
                assert list(tmp_path.iterdir()) == []
                continue
            assert list(tmp_path.iterdir()) == [path]
            with xr.open_dataset(path, engine=ENGINES[kind], group="band", mask_and_scale=False) as raw:
                np.testing.assert_array_equal(raw["cube"], values)

    @pytest.mark.parametrize("n", [1, 3, 6, 12])
    @EVERY_KIND
    def test_signal(self, tmp_path: Path, kind: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A signal that comes while a library writes, whatever it writes."""
        path = tmp_path / NAMES[kind]
        owner, name = (writer_netcdf._Sink, "write") if kind == "netcdf" else (zarr.storage.LocalStore, "set")
        calls = signal_at(owner, name, n, monkeypatch)

        def go_on(writer: Writer) -> None:
            for row in range(9):
                writer.write("band/cube", (slice(row, row + 1), slice(None), slice(None)), cube()[row : row + 1])
            time.sleep(5)

        with pytest.raises(Stopped), stop_at_once():
            make(path, kind, cube(), go_on)
        assert len(calls) >= n
        assert threading.main_thread() not in calls, "signals are handled there"
        assert list(tmp_path.iterdir()) == []

    def test_chunks_of_zarr_one_by_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of several that are written at once some would go on after one has failed, into a folder that is deleted."""
        at_once, most, store = 0, 0, zarr.storage.LocalStore.set

        async def slowly(*arguments: Any, **options: Any) -> None:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(1e-3)
            await store(*arguments, **options)
            at_once -= 1

        monkeypatch.setattr(zarr.storage.LocalStore, "set", slowly)
        make(tmp_path / "a.zarr", "zarr", cube())
        assert most == 1

    def test_signals_and_full_disks_do_not_crash(self, tmp_path: Path) -> None:
        """HDF5 crashes at the end of a process in which a signal came between it and the disk, or a close failed."""
        program = f"""
path = Path({str(tmp_path / "a.nc")!r})
for n in range(1, 40):
    with pytest.MonkeyPatch.context() as patch, stop_at_once():
        signal_at(writer_netcdf._Sink, "write", n, patch)
        try:
            make(path, "netcdf", cube())
        except Stopped:
            pass
path.unlink(missing_ok=True)
values = np.random.default_rng(0).random((50, 20_000))
try:
    with file_limit(100_000), new_file(path, "netcdf") as writer:
        writer.dimension("y", 50)
        writer.dimension("x", 20_000)
        writer.create("v", ("y", "x"), "f4", {{}}, chunks=(1, 15_000))
        for y in range(50):
            for x in (slice(0, 10_000), slice(10_000, 20_000)):
                writer.write("v", (slice(y, y + 1), x), values[y : y + 1, x])
except NoRoomError:
    print("no room")
"""
        done = in_a_process(program)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "no room\n")
        assert list(tmp_path.iterdir()) == []

    @EVERY_KIND
    def test_no_room(self, tmp_path: Path, kind: str, amount: Callable[[int, int], int]) -> None:
        """Wherever the limit is met: in the structure, in what is streamed, or when the file is closed."""
        path, values = tmp_path / NAMES[kind], np.random.default_rng(0).normal(size=(9, 20, 2000))
        make(path, kind, values)
        files = [path] if path.is_file() else list(path.rglob("*"))
        largest = max(file.stat().st_size for file in files)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        for n_bytes in np.linspace(100, largest - 1, amount(12, 100)).astype(int).tolist():
            with refused(NoRoomError, f"{n_bytes:,}", str(path)), file_limit(n_bytes):
                make(path, kind, values)
            assert list(tmp_path.iterdir()) == []

    @EVERY_KIND
    @pytest.mark.parametrize("n_rows", [1, 20])
    def test_no_room_for_the_last_piece_or_early(self, tmp_path: Path, kind: str, n_rows: int) -> None:
        """It is told at once, even where nothing is written after."""
        values, written = np.random.default_rng(0).normal(size=(n_rows, 200_000)), 0

        def write_more(writer: Writer) -> None:
            nonlocal written
            writer.dimension("m", n_rows)
            writer.dimension("n", values.shape[1])
            writer.create("more", ("m", "n"), "f4", {}, chunks=(1, values.shape[1]))
            for row in range(n_rows):
                writer.write("more", (slice(row, row + 1), slice(None)), values[row : row + 1])
                written += 1

        with pytest.raises(NoRoomError), file_limit(300_000):
            make(tmp_path / NAMES[kind], kind, cube(), write_more)
        assert written <= 2
        assert list(tmp_path.iterdir()) == []
