"""Checkpoints that are damaged, killed while they are written, or do not fit on the disk: none is lost but that one."""

import errno
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import SETTINGS, equal_weights, flip, tiny_model, tiny_normalization, write_tiny

import spectralvae
from spectralvae import load_model
from spectralvae.config import TrainConfig
from spectralvae.errors import DamagedError, InputError, NoRoomError, RunError
from spectralvae.runtime.rundir import RunDir
from spectralvae.weights.artifact import verify
from spectralvae.weights.checkpoint import checkpoint_path, newest_valid, restore, save_checkpoint

BATCH = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(1))


def new_trained(step):
    """Model and optimizer after an update; other weights for every ``step``."""
    torch.manual_seed(step)
    model = tiny_model(step).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.get_loss(BATCH)[0].backward()
    optimizer.step()
    return model, optimizer


trained = cache(new_trained)  # for those who only read


def save(run, step, model, optimizer):
    return save_checkpoint(run, step, model, SETTINGS, tiny_normalization(), optimizer, {"seed": step})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints 5, 10, 15."""
    run = tmp_path_factory.mktemp("saved")
    for step in (5, 10, 15):
        save(run, step, *trained(step))
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A run with checkpoint 5 alone."""
    shutil.copytree(checkpoint_path(saved, 5), checkpoint_path(tmp_path / "run", 5))
    return tmp_path / "run"


@pytest.fixture
def console():
    return Console(file=io.StringIO(), highlight=False, soft_wrap=True, markup=False)


def names_in(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def loads(run, step):
    """The newest checkpoint, as `load_model` sees it, is that of ``step``."""
    return equal_weights(load_model(run).state_dict(), trained(step)[0].state_dict())


# -- damage ------------------------------------------------------------------------------------------------------


class Resume:
    """A run that would go on: whatever is refused must leave its weights and its optimizer as they were."""

    def __init__(self):
        self.model, self.optimizer = new_trained(99)
        self.before = self.snapshot()

    def snapshot(self):
        moments = {
            f"{i} {key}": value.clone()
            for i, entries in enumerate(self.optimizer.state.values())
            for key, value in entries.items()
        }
        return {name: value.clone() for name, value in self.model.state_dict().items()} | moments

    def refuses(self, path):
        with pytest.raises(InputError) as error:
            restore(path, self.model, self.optimizer)
        return error.value

    def is_untouched(self):
        return equal_weights(self.snapshot(), self.before)


def draw_damages(folder, kind, n, seed):
    """``n`` of (name, position, bit); files take turns, and half of the positions are in a file's header."""
    random = np.random.default_rng(seed)
    names = sorted(path.name for path in folder.iterdir())
    for i in range(n):
        content = (folder / names[i % len(names)]).read_bytes()
        end = len(content)
        if names[i % len(names)].endswith(".safetensors") and random.random() < 0.5:
            end = 8 + int.from_bytes(content[:8], "little")
        yield names[i % len(names)], int(random.integers(end)), int(random.integers(8)) if kind == "flip" else None


@pytest.mark.parametrize(("kind", "quick", "full"), [("flip", 250, 1000), ("cut", 60, 200)])
def test_every_flip_and_every_cut_is_refused_before_use(run, console, amount, kind, quick, full):
    folder, resume = checkpoint_path(run, 5), Resume()
    n = 0
    for name, position, bit in draw_damages(folder, kind, amount(quick, full), seed=7):
        path = folder / name
        content = path.read_bytes()
        if bit is None:
            path.write_bytes(content[:position])
        else:
            flip(path, position, bit)
        with pytest.raises(DamagedError) as error:
            verify(folder)
        for refusal in (error.value, resume.refuses(folder)):
            assert str(refusal).startswith(f"{path}: "), (name, position, bit)
        for what in (run, folder):
            with pytest.raises(InputError, match=re.escape(f"{path}: ")):
                load_model(what)
        assert newest_valid(run, console) is None
        path.write_bytes(content)
        n += 1
    assert n == amount(quick, full)
    assert console.file.getvalue().count(f"WARNING: damaged checkpoint passed over: {folder}/") == n
    assert resume.is_untouched()
    assert loads(run, 5)
    assert newest_valid(run, console) == folder


def test_a_missing_file_is_refused_and_one_more_is_never_read(run, console):
    folder, resume = checkpoint_path(run, 5), Resume()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        assert f"{path}: is missing" in str(resume.refuses(folder))
        with pytest.raises(InputError, match=re.escape(f"{path}: is missing")):
            load_model(run)
        path.write_bytes(content)
    assert resume.is_untouched()
    (folder / "pytorch_model.bin").write_bytes(b"weights of a stranger")
    (folder / "sub").mkdir()
    assert loads(run, 5)
    assert newest_valid(run, console) == folder
    export = write_tiny(run / "export")
    shutil.copy(folder / "optimizer.safetensors", export)
    assert "without optimizer state" in str(resume.refuses(export))


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


def zero(path):
    """What a power loss leaves where a file system writes sizes before data."""
    path.write_bytes(bytes(path.stat().st_size))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def become_folder(path):
    path.unlink()
    path.mkdir()


def become_loop(path):
    path.unlink()
    path.symlink_to(path.name)


FILE_DAMAGES = [lambda path: flip(path, 0.4, 3), cut, Path.unlink, grow, zero, become_folder, become_loop]


def damage(folder, i):
    """Do the ``i``-th kind of damage; returns the path that a message should name."""
    names = sorted(path.name for path in folder.iterdir())
    whole = [
        lambda: [path.unlink() for path in folder.iterdir()],
        lambda: (shutil.rmtree(folder), folder.write_bytes(b"")),
        lambda: (shutil.rmtree(folder), folder.symlink_to("gone")),
        lambda: (folder / "manifest.json").unlink(),
    ]
    if i < len(whole):
        whole[i]()
        return folder / "manifest.json"
    path = folder / names[i % len(names)]
    FILE_DAMAGES[i % len(FILE_DAMAGES)](path)
    return path


def test_damaged_newest_ones_are_passed_over_by_step_not_by_clock(saved, tmp_path, amount):
    random = np.random.default_rng(3)
    n = amount(20, 4 + len(FILE_DAMAGES) * 6)  # in full: every damage of every file
    for i in range(n):
        run = Path(shutil.copytree(saved, tmp_path / str(i)))
        newest = checkpoint_path(run, 15)
        named = damage(newest, i)
        for when, step in enumerate(random.permutation([5, 10, 15]) if i % 2 else (15, 10, 5)):
            folder = checkpoint_path(run, int(step))
            if folder.is_dir():
                for path in (*folder.iterdir(), folder):
                    os.utime(path, (1e9 + 1000 * when, 1e9 + 1000 * when), follow_symlinks=False)
        for leftover in (".step=000020.tmp", ".step=000025.old"):
            shutil.copytree(checkpoint_path(saved, 5), run / "checkpoints" / leftover)
        with pytest.raises(InputError):
            load_model(run)
        console = Console(file=io.StringIO(), soft_wrap=True)
        assert newest_valid(run, console) == checkpoint_path(run, 10), i
        warnings = [line for line in console.file.getvalue().splitlines() if line.startswith("WARNING")]
        assert len(warnings) == 1, i
        assert str(named) in warnings[0], i
        resume = Resume()
        assert restore(checkpoint_path(run, 10), resume.model, resume.optimizer)["step"] == 10
        assert equal_weights(resume.model.state_dict(), trained(10)[0].state_dict())


def test_an_unreadable_one_is_passed_over(saved, tmp_path, console, monkeypatch):
    """A bad sector in the newest."""
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    bad = checkpoint_path(run, 15) / "optimizer.safetensors"
    read = Path.read_bytes

    def fail(path):
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert newest_valid(run, console) == checkpoint_path(run, 10)
    assert f"WARNING: damaged checkpoint passed over: {bad}: cannot be read: Input/output" in console.file.getvalue()


# -- kills -------------------------------------------------------------------------------------------------------

KILLED = """
import io, json, os, shutil, sys
from pathlib import Path

import torch
from rich.console import Console
from test_torture_checkpoints import save, trained
from tiny import flip

from spectralvae.weights.artifact import verify
from spectralvae.weights.checkpoint import checkpoint_path, newest_valid, thin_out

torch.set_num_threads(1)
root, stride = Path(sys.argv[1]), int(sys.argv[2])
states = {step: trained(step) for step in (5, 10, 11, 15)}
countdown = 0  # of the file system operations, in a child only

def last():
    global countdown
    countdown -= 1
    return countdown == 0

def hook(event, arguments):
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and last():
        os._exit(9)

class Torn(io.FileIO):
    def write(self, data):
        if last():
            super().write(bytes(data)[: len(data) // 2])
            os._exit(9)
        return super().write(data)

def path_open(path, mode="r", *arguments, **options):
    return Torn(path, mode) if mode == "wb" else io.open(path, mode, *arguments, **options)

def fsync(descriptor):  # a kill is no power loss: nothing need really be done
    if last():
        os._exit(9)

sys.addaudithook(hook)
Path.open, os.fsync = path_open, fsync

def prepare(scenario, run):
    if scenario == "again":
        save(run, 10, *states[10])
    else:
        save(run, 5, *states[5])
    if scenario == "damaged":
        shutil.copytree(checkpoint_path(run, 5), checkpoint_path(run, 10))
        flip(checkpoint_path(run, 10) / "model.safetensors", 0.5)
    if scenario == "leftovers":
        for name in (".step=000010.tmp", ".step=000010.old", ".step=000003.old"):
            shutil.copytree(checkpoint_path(run, 5), run / "checkpoints" / name)
            flip(run / "checkpoints" / name / "config.json", 0.5)

def save_and_thin_out(run, step, state):
    save(run, step, *state)
    thin_out(run, keep_last=1, keep_every=None, best=None)

def killed_at(n, run):
    global countdown
    child = os.fork()
    if child == 0:
        countdown = n
        save_and_thin_out(run, 10, states[11])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

found = {}
for scenario in ("next", "again", "damaged", "leftovers"):
    start, run = root / scenario, root / "run"
    prepare(scenario, start)
    found[scenario] = []
    for n in range(1, 1000, stride):
        shutil.copytree(start, run)
        killed = killed_at(n, run)
        console = Console(file=io.StringIO())
        newest = newest_valid(run, console)
        verify(newest)
        assert scenario == "damaged" or not console.file.getvalue(), "half a checkpoint was seen"
        found[scenario].append(newest.name)
        save_and_thin_out(run, 15, states[15])
        left = [p.name for p in (run / "checkpoints").iterdir() if not p.name.startswith("damaged_")]
        assert left == ["step=000015"], (scenario, n, left)
        shutil.rmtree(run)
        if not killed:
            break
print(json.dumps(found))
"""


def test_a_kill_at_any_operation_costs_nothing(tmp_path, amount):
    """Dead at each file system operation of saving and thinning out in turn, or in the middle of a write.

    next: 5 is there, 10 is saved. again: 10 is there alone, and saved once more. damaged: 5 and a damaged 10 are
    there. leftovers: 5 is there, and what earlier kills left.
    """
    stride = amount(4, 1)
    folders = [str(Path(spectralvae.__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(stride)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    found = json.loads(done.stdout)
    assert set(found.pop("again")) == {"step=000010"}
    for scenario, names in found.items():
        assert len(names) > 50 // stride, scenario
        assert set(names) == {"step=000005", "step=000010"}
        assert names == sorted(names)
        assert names[-1] == "step=000010"


# -- full disks --------------------------------------------------------------------------------------------------

MESSAGE = re.compile(r"(?P<path>[^:]+): (?P<reason>[^:]+): (?P<needed>[\d,]+) bytes are needed, (?P<free>[\d,]+) bytes")
REMEDIES = {errno.ENOSPC: "make room", errno.EDQUOT: "have the quota raised", errno.EFBIG: "raise `ulimit -f`"}


def figures(run, error, code):
    """Bytes needed and free, from a message that says all that it should."""
    text = str(error)
    match = MESSAGE.match(text)
    assert match is not None, text
    assert "\n" not in text
    assert match["path"] == str(checkpoint_path(run, 10))
    assert match["reason"] == os.strerror(code)
    assert text.endswith(f"{REMEDIES[code]}{',' * (code == errno.EDQUOT)} and start again")
    assert isinstance(error, RunError)
    return int(match["needed"].replace(",", "")), int(match["free"].replace(",", ""))


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")


def train_dir(run):
    config = TrainConfig.model_validate({"output_dir": run, "data": {"store": run / "store"}})
    return RunDir("train", config, overwrite=False, resumable=True)


def fails_to_save(run, get_ready):
    """The error of a run that saves 5 and then cannot save 10; ``get_ready`` takes the room away until it has ended."""

    def work(stack):
        with train_dir(run):
            save(run, 5, *trained(5))
            stack.enter_context(get_ready())
            save(run, 10, *trained(10))

    with pytest.raises(NoRoomError) as error, ExitStack() as stack:
        work(stack)
    assert names_in(run) == ["step=000005"]
    return error.value


class FullDisk:
    """From the ``n``-th operation that needs room on, there is none; a write fills what is left first."""

    def __init__(self, patch, code, n):
        self.code, self.left = code, n
        for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace")):
            patch.setattr(owner, name, self.guarded(getattr(owner, name)))
        self.open_to_read = Path.open
        patch.setattr(Path, "open", lambda *arguments, **options: self.open(*arguments, **options))

    def is_full(self):
        self.left -= 1
        return self.left <= 0

    def error(self):
        return OSError(self.code, os.strerror(self.code))

    def guarded(self, function):
        def call(*arguments, **options):
            if self.is_full():
                raise self.error()
            return function(*arguments, **options)

        return call

    def open(self, path, mode="r", *arguments, **options):
        if "w" not in mode:
            return self.open_to_read(path, mode, *arguments, **options)
        if self.is_full():
            raise self.error()
        disk = self

        class File(io.FileIO):
            def write(self, data):
                if disk.is_full():
                    super().write(data[: len(data) // 2])
                    raise disk.error()
                return super().write(data)

        return File(path, mode)


@pytest.mark.parametrize("code", REMEDIES, ids=errno.errorcode.get)
def test_no_room_at_any_operation(run, saved, monkeypatch, amount, code):
    state, stride, failed = trained(10), amount(3, 1), 0
    for n in range(1, 100, stride):
        with monkeypatch.context() as patch:
            FullDisk(patch, code, n)
            try:
                save(run, 10, *state)
            except RunError as error:
                needed, free = figures(run, error, code)
                assert needed == size_of(checkpoint_path(saved, 10))
                assert free > 0
            else:
                break
        failed += 1
        if checkpoint_path(run, 10).exists():  # no room for the entry in the folder above: it is there and whole
            verify(checkpoint_path(run, 10))
            shutil.rmtree(checkpoint_path(run, 10))
        assert names_in(run) == ["step=000005"], n
        assert loads(run, 5)
    assert failed >= 20 // stride
    assert loads(run, 10)


@contextmanager
def file_limit(n_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_of_the_file_size_at_20_points(saved, tmp_path, amount):
    largest = max(path.stat().st_size for path in checkpoint_path(saved, 10).iterdir())
    for i in range(0, 20, amount(3, 1)):
        run, limit = tmp_path / str(i), largest * i // 20
        error = fails_to_save(run, lambda limit=limit: file_limit(limit))
        needed, _ = figures(run, error, errno.EFBIG)
        assert needed == size_of(checkpoint_path(saved, 10))
        assert f", {limit:,} bytes are the limit of a file;" in str(error)
        assert loads(run, 5)
        record = json.loads((run / "run.json").read_text())
        if limit == 0 or limit > 4096:  # in between, it depends on the length of run.json
            assert record["state"] == ("failed" if limit else "running")
        assert record.get("error", f"NoRoomError: {error}") == f"NoRoomError: {error}"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command: a disk that fills is not tried")
    if done.returncode:
        pytest.skip(f"no permission to mount a tmpfs, a disk that fills is not tried: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@contextmanager
def filled(disk, room):
    """Leave but ``room`` bytes on the disk, or less."""
    page = os.statvfs(disk).f_bsize
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (shutil.disk_usage(disk).free - room) // page * page + page)
    yield


def test_a_disk_that_fills_at_20_points(small_disk, saved, amount):
    page = os.statvfs(small_disk).f_bsize
    needed = size_of(checkpoint_path(saved, 10))
    for i in range(0, 20, amount(3, 1)):
        run, room = small_disk / str(i), page + needed * i // 20
        error = fails_to_save(run, lambda room=room: filled(small_disk, room))
        free = shutil.disk_usage(small_disk).free
        assert figures(run, error, errno.ENOSPC) == (needed, free)
        assert free <= room
        assert loads(run, 5)
        state = json.loads((run / "run.json").read_text())["state"]
        assert state == ("failed" if free >= page else "running"), "as there was room for run.json or not"
        (small_disk / "ballast").unlink()
        with train_dir(run):
            save(run, 10, *trained(10))
        assert loads(run, 10)
        shutil.rmtree(run)
