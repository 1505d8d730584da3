"""Corrupt and hostile files: refused in one line with the file's name, in bounded time and memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import badfiles
import h5py
import numpy as np
import pytest
from badfiles import BAND, KINDS, NAME, NC, NX, NY, RADIANCE, read_all, write_granule
from refusals import refused

from spectralvae.errors import ConfigError, InputError, RunError, UserError
from spectralvae.readers import guard, hdf5, open_reader

# Over these HDF5 or its users take for ever, so that they are refused by the clock.
ENDLESS = {"chunk index: a node is its own brother", "groups 5,000 deep"}

# Those of which it matters what they are refused for.
REASONS = {
    "chunk index: a node is its own brother": "1 s",
    "chunk index: two chunks at one address": "overlap",
    "chunk index: an address beyond the end": "to byte",
    "chunk that skips its filters": "1 of 16",
    "missing chunk": "7 of 8",
    "chunk that inflates to too little": "1536 bytes",
    "chunk stored in 100 times its size": "3072 bytes",
    "chunk of 1 GiB": "at most",
    "unknown filter": "32099",
    "shuffle: parameter flipped": "shuffled",
    "byte order that is not the others'": "big-endian",
    "floats of an odd layout": "odd layout",
    "radiance that was never written": "none is stored",
    "attribute of 8 MiB": "'comment'",
    "external link in a corner": "notes/more",
    "external storage": "another file",
    "virtual dataset": "another file",
    "soft link in a circle": "nowhere",
    "MATLAB 5: deflated bomb of 3 GiB": "GiB",
    "name with a line break": "rename",
    "text named .nc": "HDF5",
    "text named .mat": "version 5",
    "units that hold a terminal's control characters": "level-2",
}


@pytest.fixture(scope="module")
def granule(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_granule(tmp_path_factory.mktemp("granule") / NAME)


def refusal(path: Path) -> str:
    """The message that a file is refused with; it must be one line with the file's name."""
    with pytest.raises(UserError) as caught:
        read_all(path)
    message = str(caught.value)
    assert message.isprintable()
    assert caught.value.path == path or repr(str(path)) in message
    assert len(message) < 3000
    return message


def run_in_child(path: Path, body: str) -> None:
    """Have the guard's child process do something else in place of opening a file."""
    guard.try_out(path, {"body": body}, "badfiles:execute")


def child_of(path: Path) -> int:
    """The process id of the guard's child."""
    out = path.with_name("pid")
    run_in_child(path, f"import os, pathlib; pathlib.Path({str(out)!r}).write_text(str(os.getpid()))")
    return int(out.read_text())


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)


class TestBadFiles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_refused(self, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if kind in ENDLESS:
            monkeypatch.setattr(guard, "SECONDS", 1)
        message = refusal(KINDS[kind](tmp_path))
        assert REASONS.get(kind, "") in message
        assert badfiles.SECRET.decode()[:8] not in message

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, tmp_path: Path) -> None:
        (tmp_path / "closed").mkdir()
        path, inside = write_granule(tmp_path / NAME), write_granule(tmp_path / "closed" / NAME)
        path.chmod(0)
        inside.parent.chmod(0)
        try:
            assert "permission" in refusal(path)
            assert "permission" in refusal(inside)
        finally:
            inside.parent.chmod(0o700)

    def test_a_bomb_takes_no_memory(self, tmp_path: Path) -> None:
        path = KINDS["deflated bomb in a chunk"](tmp_path)
        with open_reader(path) as scene:
            scene.read(slice(0, 1))
            tracemalloc.start()
            with refused(InputError, path=path):
                scene.read(slice(2, 3))
            assert tracemalloc.get_traced_memory()[1] < 2**20  # it holds 4 MiB
            tracemalloc.stop()

    def test_damaged_at_random(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wherever a granule is damaged, it is refused by us, or all it holds is what it held."""
        monkeypatch.setattr(guard, "SECONDS", 2)
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
    def test_layouts_and_links_that_stay_inside(self, tmp_path: Path, layout: str, fletcher32: bool) -> None:
        path = write_granule(tmp_path / NAME, layout=layout, fletcher32=fletcher32)
        with h5py.File(path, "r+") as file:
            radiance = np.where(file[f"{BAND}/pixel_quality_flag"][...] & 1, np.nan, file[RADIANCE][...])
            radiance[radiance == badfiles.FILL] = np.nan
            truth = {"wavelength": file[f"{BAND}/nominal_wavelength"][...], "latitude": file[f"{BAND}/latitude"][...]}
            file["geometry/circle"] = file["/"]
            file.move(f"{BAND}/latitude", "geometry/latitude")
            file[f"{BAND}/latitude"] = h5py.SoftLink("/geometry/circle/geometry/latitude")
        values = read_all(path)
        for name, expected in {**truth, "radiance": radiance.ravel()}.items():
            np.testing.assert_array_equal(values[name], expected)

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

    def test_chunks_are_checked_when_they_are_read(self, tmp_path: Path) -> None:
        """By Fletcher-32 without deflate, whose own checksum would see it; skipped filters give no numbers."""
        with h5py.File(tmp_path / "a.h5", "w") as file:
            made = file.create_dataset("a", data=np.arange(15, dtype="u1"), chunks=(15,), fletcher32=True)
            np.testing.assert_array_equal(hdf5.read(made), np.arange(15))
            _, chunk = made.id.read_direct_chunk((0,))
            made.id.write_direct_chunk((0,), bytes([chunk[0] ^ 1]) + chunk[1:])
            with pytest.raises(ValueError, match="Fletcher"):
                hdf5.read(made)
            made = file.create_dataset("b", data=np.arange(16, dtype="u1"), chunks=(16,), compression="gzip")
            made.id.write_direct_chunk((0,), bytes(16), filter_mask=1)
        with h5py.File(tmp_path / "a.h5") as file, pytest.raises(ValueError, match="skips"):
            hdf5.read(file["b"])

    def test_arguments_of_any_kind(self, tmp_path: Path, granule: Path) -> None:
        assert open_reader(granule, region=(1, 4, 2, 5), flag_bits=range(2)).shape == (3, 3, NC)
        path = tmp_path / "a.mat"
        with h5py.File(path, "w") as file:
            file["Y"] = np.ones((NC, NX, NY))
        for wavelength in (np.linspace(400, 700, NC, dtype="f4"), {"first": np.float32(400), "last": np.int64(700)}):
            assert open_reader(path, wavelength=wavelength).wavelength[-1] == 700
        for wavelength in (object(), b"400", {1j, 2}):
            with refused(ConfigError, key="wavelength", path=path):
                open_reader(path, wavelength=wavelength)  # type: ignore[arg-type]

    def test_relative_path(self, granule: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        open_reader(granule)  # the child process has started elsewhere
        monkeypatch.chdir(granule.parent)
        assert open_reader(NAME).shape == (NY, NX, NC)
        monkeypatch.chdir(tmp_path)
        Path(NAME).write_bytes(granule.read_bytes()[:1000])
        with refused(InputError, path=NAME):
            open_reader(NAME)


class TestChildProcess:
    """What no file that is known does may still happen: the child process is made to do it."""

    @pytest.mark.parametrize(
        ("body", "patience", "word"),
        [
            ("import ctypes; ctypes.PyDLL(None).pause()", 2, "2 s"),  # holds the interpreter's lock
            ("while True: pass", 60, "1 s of CPU"),
            ("import os; os.abort()", 60, "status -6"),
            ("import os; os._exit(0)", 60, "status 0"),
            ("held = bytearray(3 << 30)", 60, "2 GiB"),
        ],
    )
    def test_limits(self, granule: Path, body: str, patience: int, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guard, "SECONDS", 1)
        monkeypatch.setattr(guard, "PATIENCE", patience)
        with refused(InputError, word, path=granule):
            run_in_child(granule, body)
        assert open_reader(granule).shape == (NY, NX, NC)

    def test_waiting_for_storage_is_no_fault_of_a_file(self, granule: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And what earlier files took does not count: the child process stays the same."""
        monkeypatch.setattr(guard, "SECONDS", 1)
        first = child_of(granule)
        run_in_child(granule, "import time; time.sleep(1.5)")
        for _ in range(2):
            run_in_child(granule, "import time; t = time.process_time()\nwhile time.process_time() < t + 0.6: pass")
        assert child_of(granule) == first

    def test_errors_keep_their_parts(self, granule: Path) -> None:
        """Texts come without control characters, and cut; numbers of numpy as numbers."""
        imports = "import numpy as np; from spectralvae.errors import ConfigError, DamagedError"
        parts = "path=path, key='a\\nb', value=[np.float32(1.5), '\\x1b'], limit='9\\t', remedy='r'"
        texts = {"key": "a\\nb", "value": [1.5, "\x1b"], "limit": "9\\t", "remedy": "r"}
        with refused(ConfigError, path=granule, **texts) as caught:
            run_in_child(granule, f"{imports}; raise ConfigError('\\x1b[2J\\n\\udc80' + 9999 * 'x', {parts})")
        assert caught.value.problem.startswith("\\x1b[2J\\n\\udc80xxx")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 3000
        with refused(InputError, path=granule) as caught:  # of the nearest class that the parent knows
            run_in_child(granule, f"{imports}; raise DamagedError(path=path, value=list(range(9999)))")
        assert len(str(caught.value)) < 3000
        with refused(InputError, "ZeroDivisionError", path=granule) as caught:
            run_in_child(granule, "1 / 0")
        assert "in execute" in caught.value.__notes__[0]  # the traceback, for those who look for it

    def test_one_process_for_many_files(self, granule: Path, tmp_path: Path) -> None:
        first = child_of(granule)
        bad = tmp_path / "bad.nc"
        bad.write_bytes(granule.read_bytes()[:999])
        for _ in range(5):
            open_reader(granule)
            refusal(bad)
            run_in_child(granule, "import os; os.write(1, b'hello\\n'); print('hi', flush=True)")  # are no answers
        assert child_of(granule) == first
        kill(first)
        open_reader(granule)
        assert child_of(granule) != first

    def test_threads(self, granule: Path, tmp_path: Path) -> None:
        bad = tmp_path / "bad.nc"
        bad.write_bytes(granule.read_bytes()[:999])

        def outcome(path: Path) -> Any:
            return refusal(path) if path == bad else open_reader(path).shape

        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(outcome, [granule, bad] * 15))[::2] == [(NY, NX, NC)] * 15

    def test_fork_and_end(self, granule: Path) -> None:
        """A forked process gets its own child; its parent's lives on, and ends with the parent, also by SIGKILL."""
        script = """
            import os, sys, time
            from pathlib import Path
            from test_guard import child_of
            path = Path(sys.argv[1])
            mine = child_of(path)
            if os.fork() == 0:
                assert child_of(path) != mine
                os._exit(0)
            assert os.wait()[1] == 0
            assert child_of(path) == mine
            if os.fork() == 0:
                time.sleep(60)
            print(mine, flush=True)
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
        assert parent.communicate()[1] == b""

    def test_interrupted(self, granule: Path) -> None:
        """Ctrl-C reaches this process only, and the question that it left open is not answered to the next file."""
        refuse = "from spectralvae.errors import InputError; raise InputError({!r})"
        assert os.getsid(child_of(granule)) != os.getsid(0)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            run_in_child(granule, f"import time; time.sleep(2); {refuse.format('slow')}")
        timer.join()
        with refused(InputError, "fast"):
            run_in_child(granule, refuse.format("fast"))

    def test_cannot_start(self, granule: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kill(child_of(granule))
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with refused(RunError, "status 1", "/bin/false"):
            open_reader(granule)

    def test_is_light(self, granule: Path) -> None:
        """What it imports for a granule costs every command its start."""
        script = """
            import sys
            from pathlib import Path
            from spectralvae.readers import probe
            probe(Path(sys.argv[1]))
            print([name for name in ("torch", "xarray", "pydantic", "scipy", "zarr") if name in sys.modules])
        """
        assert run(script, granule).communicate()[0] == b"[]\n"


def run(script: str, path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )


def is_alive(process: int) -> bool:
    """Is it running, not a zombie?"""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
