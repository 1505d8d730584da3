"""Broken and hostile files: refused in one line with the file's name, in bounded time and memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import badfiles
import h5py
import numpy as np
import pytest
from badfiles import BAND, KINDS, NAME, NC, NX, NY, RADIANCE, read_all, write_granule

from spectralvae.errors import ConfigError, InputError, RunError, UserError
from spectralvae.readers import guard, hdf5, open_reader

# Over these HDF5 or its users take for ever, so that they are refused by the clock.
ENDLESS = {"chunk index: a node is its own brother", "groups 5,000 deep"}

# Those of which it matters what they are refused for.
REASONS = {
    "chunk index: a node is its own brother": "took more than 1 s",
    "chunk index: leads into itself": "crashed",
    "chunk index: two chunks at one address": "overlap",
    "chunk index: an address beyond the end": "data up to byte",
    "chunk that skips its filters": "skip filters",
    "missing chunk": "7 of 8 chunks",
    "chunk that inflates to too little": "holds 1536 bytes of 3072",
    "chunk stored in 100 times its size": "is stored in",
    "chunk of 1 GiB": "at most",
    "unknown filter": "32099",
    "shuffle: parameter flipped": "shuffled",
    "byte order of a type flipped": "big-endian",
    "floats of an odd layout": "odd layout",
    "attribute of 8 MiB": "'comment'",
    "all dimensions of 64 GB, never written": "none is stored",
    "external link in a corner": "link into another file",
    "external storage": "in another file",
    "MATLAB 7.3: external storage": "in another file",
    "virtual dataset": "in another file",
    "soft link in a circle": "leads nowhere",
    "MATLAB 5: deflated bomb of 3 GiB": "needed more than",
    "name with a line break": "rename",
}


@pytest.fixture(scope="module")
def granule(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_granule(tmp_path_factory.mktemp("granule") / NAME)


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Have the other process do something else in place of opening a file: the body of a function of its path."""

    def use(body: str) -> None:
        patch = f"from spectralvae.readers import guard\ndef _try(path, *_):\n    {body}\nguard._try = _try\n"
        monkeypatch.setattr(guard, "_PROGRAM", guard._PROGRAM.replace("serve()\n", patch + "serve()\n"))
        guard._HELPER.end()

    yield use
    guard._HELPER.end()


def refusal(path: Path, **arguments: Any) -> str:
    """The message that a file is refused with; it must be one line with the file's name."""
    with pytest.raises(UserError) as caught:
        read_all(path) if not arguments else open_reader(path, **arguments)
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message or repr(str(path)) in message
    assert len(message) < 3000
    return message


def pid() -> int:
    assert guard._HELPER._process is not None
    return guard._HELPER._process.pid


class TestBadFiles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_refused(self, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if kind in ENDLESS:
            monkeypatch.setattr(guard, "_SECONDS", 1)
        message = refusal(KINDS[kind](tmp_path))
        assert REASONS.get(kind, "") in message
        assert badfiles.SECRET.decode()[:8] not in message

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, tmp_path: Path) -> None:
        path = write_granule(tmp_path / NAME)
        path.chmod(0)
        assert "permission" in refusal(path)
        closed = tmp_path / "closed"
        closed.mkdir()
        inside = write_granule(closed / NAME)
        closed.chmod(0)
        try:
            assert "permission" in refusal(inside)
        finally:
            closed.chmod(0o700)

    def test_a_bomb_takes_no_memory(self, tmp_path: Path) -> None:
        path = KINDS["deflated bomb in a chunk"](tmp_path)
        with open_reader(path) as scene:
            scene.read(slice(0, 1))
            tracemalloc.start()
            with pytest.raises(InputError, match="doesn't end where it should"):
                scene.read(slice(2, 3))
            assert tracemalloc.get_traced_memory()[1] < 2**20  # it holds 4 MiB
            tracemalloc.stop()

    def test_a_chunk_harms_only_its_rows(self, tmp_path: Path, granule: Path) -> None:
        path = KINDS["one bit of a chunk flipped"](tmp_path)  # the fourth: row 1, second half
        with open_reader(path) as scene, open_reader(granule) as whole:
            np.testing.assert_array_equal(scene.read(slice(2, NY))[0], whole.read(slice(2, NY))[0])
            with pytest.raises(InputError, match=NAME):
                scene.read(slice(1, 2))

    def test_damaged_at_random(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wherever a granule is damaged, it is refused by us, or all it holds is what it held."""
        monkeypatch.setattr(guard, "_SECONDS", 2)
        random = np.random.default_rng(8)
        path = tmp_path / NAME
        messages = []
        for layout in badfiles.LAYOUTS:
            truth = read_all(write_granule(path, layout=layout))
            content = path.read_bytes()
            for i in range(50):
                path.write_bytes(damaged(content, i, random))
                try:
                    values = read_all(path)
                except UserError as error:
                    messages.append(str(error))
                    continue
                assert values.keys() == truth.keys()
                for name in truth:
                    np.testing.assert_array_equal(values[name], truth[name])
        assert 100 < len(messages) < 140  # so both happened
        assert all("\n" not in message and str(path) in message for message in messages)


def damaged(content: bytes, i: int, random: np.random.Generator) -> bytes:
    """A bit flipped, a burst of other bytes, zeros, or cut off."""
    data = np.frombuffer(content, dtype=np.uint8).copy()
    at = int(random.integers(len(data)))
    burst = data[at : at + int(random.integers(16, 513))]
    if i % 4 == 0:
        data[at] ^= 1 << int(random.integers(8))
    elif i % 4 == 1:
        burst[:] = random.integers(0, 256, burst.size)
    elif i % 4 == 2:
        burst[:] = 0
    else:
        data = data[:at]
    return data.tobytes()


class TestGoodFiles:
    @pytest.mark.parametrize("layout", badfiles.LAYOUTS)
    @pytest.mark.parametrize("fletcher32", [False, True])
    def test_layouts(self, tmp_path: Path, layout: str, fletcher32: bool) -> None:
        path = write_granule(tmp_path / NAME, layout=layout, fletcher32=fletcher32)
        values = read_all(path)
        with h5py.File(path) as file:
            radiance = np.where(file[f"{BAND}/pixel_quality_flag"][...] & 1, np.nan, file[RADIANCE][...])
            radiance[radiance == badfiles.FILL] = np.nan
            np.testing.assert_array_equal(values["wavelength"], file[f"{BAND}/nominal_wavelength"][...])
            np.testing.assert_array_equal(values["latitude"], file[f"{BAND}/latitude"][...])
        np.testing.assert_array_equal(values["radiance"], radiance.ravel())

    def test_links_that_stay_inside(self, tmp_path: Path, granule: Path) -> None:
        path = write_granule(tmp_path / NAME)
        with h5py.File(path, "r+") as file:
            file["geometry/circle"] = file["/"]
            file.move(f"{BAND}/latitude", "geometry/latitude")
            file[f"{BAND}/latitude"] = h5py.SoftLink("/geometry/circle/geometry/latitude")
        np.testing.assert_array_equal(read_all(path)["latitude"], read_all(granule)["latitude"])

    @pytest.mark.parametrize("fletcher32", [False, True])
    @pytest.mark.parametrize("chunks", [None, (2, 3), (7, 11), (1, 5), (3, 11)])
    @pytest.mark.parametrize("dtype", ["<f8", ">f4", "<u2", "i1"])
    def test_read_as_h5py_does(
        self, tmp_path: Path, chunks: tuple[int, int] | None, dtype: str, fletcher32: bool
    ) -> None:
        values = np.random.default_rng(0).integers(0, 100, (7, 11)).astype(dtype)
        packed = {} if chunks is None else {"compression": "gzip", "shuffle": True, "fletcher32": fletcher32}
        with h5py.File(tmp_path / "a.h5", "w") as file:
            made = file.create_dataset("a", data=values, chunks=chunks, **packed)
            np.testing.assert_array_equal(hdf5.read(made), values)
            assert hdf5.read(made).dtype == values.dtype
            for cut in (np.s_[2:5, 1:4], np.s_[0:7, 10:11], np.s_[3:3, 0:4], np.s_[6:7, 0:11]):
                np.testing.assert_array_equal(hdf5.read(made, *cut), values[cut])
            runs = h5py.MultiBlockSlice(start=1, stride=3, count=2, block=2)
            np.testing.assert_array_equal(hdf5.read(made, runs, np.s_[2:9]), values[[1, 2, 4, 5], 2:9])

    def test_fletcher32_is_compared(self, tmp_path: Path) -> None:
        """Without deflate, whose checksum would see it."""
        with h5py.File(tmp_path / "a.h5", "w") as file:
            made = file.create_dataset("a", data=np.arange(15, dtype="u1"), chunks=(15,), fletcher32=True)
            np.testing.assert_array_equal(hdf5.read(made), np.arange(15))
            _, chunk = made.id.read_direct_chunk((0,))
            made.id.write_direct_chunk((0,), bytes([chunk[0] ^ 1]) + chunk[1:])
            with pytest.raises(ValueError, match="Fletcher"):
                hdf5.read(made)

    def test_skipped_filters_are_seen(self, tmp_path: Path) -> None:
        """Also where the index was not checked before: what is deflated would come out as numbers."""
        with h5py.File(tmp_path / "a.h5", "w") as file:
            made = file.create_dataset("a", data=np.arange(16, dtype="u1"), chunks=(16,), compression="gzip")
            made.id.write_direct_chunk((0,), bytes(16), filter_mask=1)
        with h5py.File(tmp_path / "a.h5") as file, pytest.raises(ValueError, match="skips filters"):
            hdf5.read(file["a"])

    def test_arguments_of_any_kind(self, tmp_path: Path, granule: Path) -> None:
        assert open_reader(granule, region=np.array([1, 4, 2, 5])).shape == (3, 3, NC)
        assert open_reader(granule, region=(1, 4, 2, 5), flag_bits=range(2)).shape == (3, 3, NC)
        with h5py.File(tmp_path / "a.mat", "w") as file:
            file["Y"] = np.ones((NC, NX, NY))
        given = [np.linspace(400, 700, NC, dtype=np.float32), {"first": np.float32(400), "last": np.int64(700)}]
        for wavelength in given:
            assert open_reader(tmp_path / "a.mat", wavelength=wavelength).wavelength[-1] == 700
        for wavelength in (object(), b"400", {1j, 2}):
            with pytest.raises(ConfigError, match="wavelength"):
                open_reader(tmp_path / "a.mat", wavelength=wavelength)  # type: ignore[arg-type]

    def test_relative_path(self, granule: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        open_reader(granule)  # the other process has started elsewhere
        monkeypatch.chdir(granule.parent)
        assert open_reader(NAME).shape == (NY, NX, NC)
        monkeypatch.chdir(tmp_path)
        Path(NAME).write_bytes(granule.read_bytes()[:1000])
        with pytest.raises(InputError, match=f"^{NAME}: damaged"):
            open_reader(NAME)


class TestOtherProcess:
    """What no file that is known does may still happen: the other process is made to do it."""

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("import time; time.sleep(100)", "took more than 1 s"),
            ("[0 for _ in iter(int, 1)]", "took more than 1 s"),
            ("import ctypes; ctypes.PyDLL(None).pause()", "took more than 1 s"),  # holds the interpreter's lock
            ("import os; os.abort()", "crashed the reader (status -6)"),
            ("import ctypes; ctypes.string_at(0)", "crashed the reader (status -11)"),
            ("import os; os._exit(0)", "crashed the reader (status 0)"),
            ("held = bytearray(3 << 30)", "needed more than 2 GiB"),
        ],
    )
    def test_limits(
        self, granule: Path, helper: Callable[[str], None], body: str, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(guard, "_SECONDS", 1)
        helper(f"if 'bad' in path.name: {body}")
        bad = granule.with_name("bad.nc")
        bad.write_bytes(granule.read_bytes())
        with pytest.raises(InputError) as caught:
            open_reader(bad)
        assert str(bad) in str(caught.value)
        assert words in str(caught.value)
        assert open_reader(granule).shape == (NY, NX, NC)

    def test_another_function(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A level-2 product whose chunk index never ends."""
        path = tmp_path / "TEMPO_NO2_L2_V03_20240601T210934Z_S012G01.nc"
        with h5py.File(path, "w") as file:
            for dim in ("mirror_step", "xtrack"):
                file.create_dataset(dim, data=np.arange(32)).make_scale(dim)
            made = file.create_dataset(
                "product/vertical_column_troposphere", data=np.ones((32, 32)), chunks=(1, 1), compression="gzip"
            )
            made.attrs["units"] = "molecules/cm^2"
            for axis, dim in zip(made.dims, ("mirror_step", "xtrack"), strict=True):
                axis.attach_scale(file[dim])
        function = "spectralvae.readers.products:read_product"
        guard.try_out(path, {"product": "NO2"}, function)
        with pytest.raises(InputError, match="HCHO"):
            guard.try_out(path, {"product": "HCHO"}, function)
        path.write_bytes(badfiles.own_brothers(path.read_bytes()))
        monkeypatch.setattr(guard, "_SECONDS", 1)
        with pytest.raises(InputError, match="took more than 1 s"):
            guard.try_out(path, {"product": "NO2"}, function)

    def test_output_does_not_mix_with_answers(self, granule: Path, helper: Callable[[str], None]) -> None:
        helper("import os; os.write(1, b'library: hello\\n'); os.write(2, b'warning\\n'); print('hi', flush=True)")
        assert open_reader(granule).shape == (NY, NX, NC)

    def test_unforeseen_errors(self, granule: Path, helper: Callable[[str], None]) -> None:
        helper("1 / 0")
        with pytest.raises(InputError, match="ZeroDivisionError") as caught:
            open_reader(granule)
        assert "in _try" in caught.value.__notes__[0]  # the traceback, for those who look for it

    def test_messages_are_cleaned(self, granule: Path, helper: Callable[[str], None]) -> None:
        message = "f'{path}: \\x1b[2J\\n\\udc80' + 9999 * 'x'"
        helper(f"from spectralvae.errors import DamagedError; raise DamagedError({message})")
        with pytest.raises(InputError) as caught:
            open_reader(granule)
        assert str(caught.value).startswith(f"{granule}: \\x1b[2J\\n\\udc80xxx")
        assert len(str(caught.value)) < 3000

    def test_one_process_for_many_files(self, granule: Path, tmp_path: Path) -> None:
        open_reader(granule)
        first = pid()
        for i in range(5):
            open_reader(granule)
            (tmp_path / f"{i}.nc").write_bytes(granule.read_bytes()[:999])
            refusal(tmp_path / f"{i}.nc")
        assert pid() == first
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        open_reader(granule)
        assert pid() != first

    def test_threads(self, granule: Path, tmp_path: Path) -> None:
        bad = tmp_path / "bad.nc"
        bad.write_bytes(granule.read_bytes()[:999])
        results: list[str] = []

        def work(path: Path) -> None:
            for _ in range(5):
                try:
                    open_reader(path)
                    results.append("good")
                except InputError as error:
                    results.append(str(error))

        threads = [threading.Thread(target=work, args=(path,)) for path in (granule, bad) * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results.count("good") == 15
        assert sum(str(bad) in result for result in results) == 15

    def test_fork(self, granule: Path) -> None:
        """A forked process gets its own helper; that of its parent lives on."""
        script = """
            import os, sys
            from spectralvae.readers import guard, open_reader
            open_reader(sys.argv[1])
            mine = guard._HELPER._process.pid
            if os.fork() == 0:
                assert guard._HELPER._process is None
                open_reader(sys.argv[1])
                assert guard._HELPER._process.pid != mine
                sys.exit(0)
            assert os.wait()[1] == 0
            open_reader(sys.argv[1])
            assert guard._HELPER._process.pid == mine
            print("done")
        """
        done = run(script, granule)
        assert done.communicate(timeout=60) == (b"done\n", b"")
        assert done.returncode == 0

    def test_ends_with_its_parent(self, granule: Path) -> None:
        """Also after SIGKILL, and while a forked process lives on."""
        script = """
            import os, sys, time
            from spectralvae.readers import guard, open_reader
            open_reader(sys.argv[1])
            if os.fork() == 0:
                time.sleep(60)
            print(guard._HELPER._process.pid, flush=True)
            time.sleep(60)
        """
        parent = run(script, granule)
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.kill()
        for _ in range(200):
            if not is_alive(child):
                break
            time.sleep(0.05)
        assert not is_alive(child)
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()

    def test_interrupted(self, granule: Path, helper: Callable[[str], None]) -> None:
        """Ctrl-C reaches this process only, and the question that it left open is not answered to the next file."""
        refuse = "from spectralvae.errors import InputError; raise InputError(f'{path}: no')"
        helper(f"import time; time.sleep(2 if 'slow' in path.name else 0); {refuse}")
        slow = granule.with_name("slow.nc")
        slow.write_bytes(granule.read_bytes())
        with pytest.raises(InputError):
            open_reader(granule)
        assert os.getsid(pid()) != os.getsid(0)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            open_reader(slow)
        timer.join()
        with pytest.raises(InputError, match=str(granule)):
            open_reader(granule)

    def test_cannot_start(self, granule: Path, helper: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
        helper("pass")
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(RunError, match="cannot start"):
            open_reader(granule)

    def test_is_light(self, granule: Path) -> None:
        """What it imports for a granule costs every command its start."""
        script = """
            import sys
            from pathlib import Path
            from spectralvae.readers import guard
            guard.probe(Path(sys.argv[1]))
            print([name for name in ("torch", "xarray", "pydantic", "scipy", "zarr") if name in sys.modules])
        """
        assert run(script, granule).communicate()[0] == b"[]\n"


def run(script: str, path: Path) -> subprocess.Popen[bytes]:
    import textwrap

    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def is_alive(process: int) -> bool:
    """Is it running, not a zombie?"""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
