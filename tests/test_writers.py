"""Files that are whole or not there, as xarray, h5py and the project's own readers see them."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr
import zarr

from spectralvae.errors import InputError, NoRoomError
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
    def test_xarray(self, tmp_path: Path, kind: str) -> None:
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

    def test_netcdf_4(self, tmp_path: Path) -> None:
        values = cube()
        with h5py.File(make(tmp_path / "a.nc", "netcdf", values)) as file:
            stored = file["band/cube"]
            assert [axis[0].name for axis in stored.dims] == ["/y", "/x", "/band/channel"]
            assert stored.chunks == (1, 16, 30)
            assert (stored.compression, stored.shuffle, stored.fletcher32) == ("gzip", True, True)
            assert stored.fillvalue == FILL
            np.testing.assert_array_equal(stored[:], values)
            assert file["y"].is_scale
            assert b"netCDF dimension but not" in file["x"].attrs["NAME"]

    def test_zarr_3(self, tmp_path: Path) -> None:
        values = cube()
        stored = zarr.open_array(make(tmp_path / "a.zarr", "zarr", values) / "band" / "cube", mode="r")
        assert stored.metadata.zarr_format == 3
        assert stored.metadata.dimension_names == ("y", "x", "channel")
        assert [type(codec).__name__ for codec in stored.compressors] == ["ZstdCodec", "Crc32cCodec"]
        assert stored.nchunks_initialized == stored.nchunks
        np.testing.assert_array_equal(stored[:], values)

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
        if kind == "netcdf":
            with h5py.File(path) as file:
                stored = file["a/b"].attrs
                assert stored["vector"].dtype == np.uint16
                assert stored["short"].dtype == np.int16
                assert stored["single"].dtype == np.float32
                assert stored["nothing"].shape == (0,)
                assert stored["bytes"] == np.bytes_(b"abc")

    @EVERY_KIND
    def test_texts(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / NAMES[kind]
        with new_file(path, kind) as writer:  # type: ignore[arg-type]
            writer.dimension("n", 3)
            writer.create("names", ("n",), "str", {"a": "b"}, values=["a", "", "ünicode"])
            writer.create("name", (), str, {}, values="one")
            writer.create("later", ("n",), str, {})
            writer.write("later", (slice(1, 3),), np.array(["x", "yy"], dtype=object))
        with xr.open_dataset(path, engine=ENGINES[kind]) as dataset:
            assert dataset["names"].values.tolist() == ["a", "", "ünicode"]
            assert dataset["name"].item() == "one"
            assert dataset["later"].values.tolist() == ["", "x", "yy"]
        with closing(open_container(path)) as container:
            assert container.read("names", (slice(1, 3),)).tolist() == ["", "ünicode"]
            assert container.read("name", ()).item() == "one"

    def test_characters(self, tmp_path: Path) -> None:
        path = tmp_path / "a.nc"
        with new_file(path, "netcdf") as writer:
            writer.dimension("n", 2)
            writer.dimension("length", 3)
            writer.create("names", ("n", "length"), "S1", {}, values=np.array([list("abc"), list("xyz")], "S1"))
        with xr.open_dataset(path) as dataset:
            assert dataset["names"].values.tolist() == [b"abc", b"xyz"]

    @pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", ">f4", ">i2"])
    @EVERY_KIND
    def test_types(self, tmp_path: Path, kind: str, dtype: str) -> None:
        path, values = tmp_path / NAMES[kind], np.array([0, 1, 100], dtype)
        with new_file(path, kind) as writer:  # type: ignore[arg-type]
            writer.dimension("n", 3)
            writer.create("v", ("n",), dtype, {}, fill=100, values=values)
        with xr.open_dataset(path, engine=ENGINES[kind], mask_and_scale=False) as dataset:
            assert dataset["v"].dtype == np.dtype(dtype).newbyteorder("=")
            np.testing.assert_array_equal(dataset["v"], values)
            assert dataset["v"].attrs["_FillValue"] == 100
        with xr.open_dataset(path, engine=ENGINES[kind]) as dataset:
            np.testing.assert_array_equal(np.isnan(dataset["v"].values), [False, False, True])

    @EVERY_KIND
    def test_dimensions_of_one_name(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / NAMES[kind]
        with new_file(path, kind) as writer:  # type: ignore[arg-type]
            writer.dimension("y", 4)
            for group, size in (("a", 2), ("b", 3)):
                writer.dimension(f"{group}/channel", size)
                writer.create(f"{group}/deep/v", ("y", "channel"), "f4", {}, values=np.full((4, size), size))
            writer.dimension("c/y", 7)
            writer.create("c/v", ("y",), "f4", {}, values=np.zeros(7))
        for group, shape in (("a/deep", (4, 2)), ("b/deep", (4, 3)), ("c", (7,))):
            with xr.open_dataset(path, engine=ENGINES[kind], group=group) as dataset:
                assert dataset["v"].shape == shape
        if kind == "netcdf":
            with h5py.File(path) as file:
                assert [axis[0].name for axis in file["b/deep/v"].dims] == ["/y", "/b/channel"]
                assert [axis[0].name for axis in file["c/v"].dims] == ["/c/y"]

    def test_named_as_a_dimension_but_not_along_it(self, tmp_path: Path) -> None:
        path = tmp_path / "a.nc"
        with new_file(path, "netcdf") as writer:
            writer.dimension("x", 2)
            writer.dimension("y", 3)
            writer.create("x", ("y",), "i4", {}, values=[1, 2, 3])
        with closing(open_container(path)) as container:
            (variable,) = container.variables()
            assert (variable.name, variable.dims, variable.shape) == ("x", ("y",), (3,))
            assert container.read("x", (slice(None),)).tolist() == [1, 2, 3]

    def test_dimension_without_length(self, tmp_path: Path) -> None:
        path = tmp_path / "a.nc"
        with new_file(path, "netcdf") as writer:
            writer.dimension("n", 0)
            writer.dimension("x", 3)
            writer.create("v", ("n", "x"), "f4", {}, values=np.empty((0, 3)))
        with xr.open_dataset(path) as dataset:
            assert dataset["v"].shape == (0, 3)


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

    def test_small_variables_are_one_chunk(self) -> None:
        assert row_chunks((5, 6), 4) == (5, 6)
        assert row_chunks((0, 6), 4) == (1, 6)
        assert row_chunks((), 8) == ()

    def test_long_rows_are_cut(self) -> None:
        chunks = row_chunks((10, 10_000_000), 4)
        assert chunks[0] == 1
        assert CHUNK_BYTES / 2 <= chunks[1] * 4 <= CHUNK_BYTES

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

    @EVERY_KIND
    def test_a_changed_byte_is_found(self, tmp_path: Path, kind: str) -> None:
        path = make(tmp_path / NAMES[kind], kind, cube())
        if kind == "netcdf":
            with h5py.File(path) as file:
                chunk = file["band/cube"].id.get_chunk_info(3)
            victim, position = path, chunk.byte_offset + chunk.size // 2
        else:
            victim = path / "band" / "cube" / "c" / "0" / "3" / "0"
            position = victim.stat().st_size // 2
        with victim.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1]))
        with closing(open_container(path)) as container:
            container.read("band/cube", (slice(1, 3), slice(None), slice(None)))
            with pytest.raises((InputError, ValueError), match=r"(?i)checksum"):
                container.read("band/cube", (slice(0, 1), slice(None), slice(None)))


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


@contextmanager
def file_limit(n_bytes: int) -> Iterator[None]:
    """No process may write beyond so many bytes of a file (Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestWholeOrNot:
    @pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), Stopped(75)])
    @EVERY_KIND
    def test_failure(self, tmp_path: Path, kind: str, error: BaseException) -> None:
        path = tmp_path / NAMES[kind]

        def fail(_: Writer) -> None:
            assert not path.exists()
            raise error

        with pytest.raises(type(error)):
            make(path, kind, cube(), fail)
        assert list(tmp_path.iterdir()) == []

    @EVERY_KIND
    def test_failure_leaves_what_was_there(self, tmp_path: Path, kind: str) -> None:
        path = make(tmp_path / NAMES[kind], kind, cube())

        def fail(_: Writer) -> None:
            raise RuntimeError

        with pytest.raises(RuntimeError):
            make(path, kind, cube() + 1, fail)
        assert list(tmp_path.iterdir()) == [path]
        with xr.open_dataset(path, engine=ENGINES[kind], group="band", mask_and_scale=False) as raw:
            np.testing.assert_array_equal(raw["cube"], cube())

    @EVERY_KIND
    def test_what_was_there_is_replaced(self, tmp_path: Path, kind: str) -> None:
        path = make(tmp_path / NAMES[kind], kind, cube())
        make(path, kind, cube()[:4] + 1)
        assert list(tmp_path.iterdir()) == [path]
        with xr.open_dataset(path, engine=ENGINES[kind], group="band", mask_and_scale=False) as raw:
            np.testing.assert_array_equal(raw["cube"], cube()[:4] + 1)

    @EVERY_KIND
    def test_kill(self, tmp_path: Path, kind: str) -> None:
        """What a killed process leaves is hidden, and gone after the next try."""
        path = tmp_path / NAMES[kind]
        program = f"""
import os, signal
from pathlib import Path
from spectralvae.files.writers import new_file
with new_file(Path({str(path)!r}), {kind!r}) as writer:
    writer.dimension("y", 9)
    writer.create("v", ("y",), "f4", {{}}, values=range(9))
    writer.finish()
    os.kill(os.getpid(), signal.SIGKILL)
"""
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
        assert [p.name for p in tmp_path.iterdir()] == [f".{path.name}.part"]
        make(path, kind, cube())
        assert list(tmp_path.iterdir()) == [path]

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

    def test_signals_do_not_crash(self, tmp_path: Path) -> None:
        """HDF5 crashes at the end of a process in which a signal came between it and the disk."""
        program = f"""
import sys
from pathlib import Path
import pytest
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_writers import cube, make, signal_at
from spectralvae.files import writer_netcdf
from spectralvae.runtime.signals import Stopped
from spectralvae.runtime.signals import stop_at_once
for n in range(1, 40):
    with pytest.MonkeyPatch.context() as patch, stop_at_once():
        signal_at(writer_netcdf._Sink, "write", n, patch)
        try:
            make(Path({str(tmp_path / "a.nc")!r}), "netcdf", cube())
        except Stopped:
            pass
"""
        done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
        assert {file.name for file in tmp_path.iterdir()} <= {"a.nc"}

    @EVERY_KIND
    def test_no_such_folder(self, tmp_path: Path, kind: str) -> None:
        with pytest.raises(FileNotFoundError):
            make(tmp_path / "none" / NAMES[kind], kind, cube())

    @EVERY_KIND
    def test_no_room(self, tmp_path: Path, kind: str, amount: Callable[[int, int], int]) -> None:
        """Wherever the limit is met: in the structure, in what is streamed, or when the file is closed."""
        path, values = tmp_path / NAMES[kind], np.random.default_rng(0).normal(size=(9, 20, 2000))
        make(path, kind, values)
        files = [path] if path.is_file() else list(path.rglob("*"))
        largest = max(file.stat().st_size for file in files)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        for n_bytes in np.linspace(100, largest - 1, amount(12, 100)).astype(int).tolist():
            with pytest.raises(NoRoomError) as error, file_limit(n_bytes):
                make(path, kind, values)
            told = (
                rf"[\d,]+ bytes are free, {n_bytes:,} bytes are the limit of a file; raise `ulimit -f` and start again"
            )
            assert re.fullmatch(rf"{path}: File too large: {told}", str(error.value))
            assert list(tmp_path.iterdir()) == []

    @EVERY_KIND
    def test_no_room_for_the_last_piece(self, tmp_path: Path, kind: str) -> None:
        path, values = tmp_path / NAMES[kind], np.random.default_rng(0).normal(size=200_000)

        def write_more(writer: Writer) -> None:
            writer.dimension("n", values.size)
            writer.create("more", ("n",), "f4", {}, values=values)

        with pytest.raises(NoRoomError), file_limit(300_000):
            make(path, kind, cube(), write_more)
        assert list(tmp_path.iterdir()) == []

    @EVERY_KIND
    def test_no_room_is_told_soon(self, tmp_path: Path, kind: str) -> None:
        path, values, written = tmp_path / NAMES[kind], np.random.default_rng(0).normal(size=(20, 200_000)), 0

        def write_more(writer: Writer) -> None:
            nonlocal written
            writer.dimension("m", 20)
            writer.dimension("n", values.shape[1])
            writer.create("more", ("m", "n"), "f4", {}, chunks=(1, values.shape[1]))
            for row in range(20):
                writer.write("more", (slice(row, row + 1), slice(None)), values[row : row + 1])
                written += 1

        with pytest.raises(NoRoomError), file_limit(300_000):
            make(path, kind, cube(), write_more)
        assert written <= 2

    def test_no_room_does_not_crash(self, tmp_path: Path) -> None:
        """HDF5 crashes at the end of a process that could not close a file."""
        program = f"""
import resource
import numpy as np
from pathlib import Path
from spectralvae.errors import NoRoomError
from spectralvae.files.writers import new_file
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    with new_file(Path({str(tmp_path / "a.nc")!r}), "netcdf") as writer:
        writer.dimension("y", 50)
        writer.dimension("x", 20_000)
        writer.create("v", ("y", "x"), "f4", {{}}, chunks=(1, 15_000))
        for y in range(50):
            for x in (slice(0, 10_000), slice(10_000, 20_000)):
                writer.write("v", (slice(y, y + 1), x), np.random.default_rng(y).random((1, 10_000)))
except NoRoomError:
    pass
"""
        done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
        assert list(tmp_path.iterdir()) == []
