"""Checkpoints that are damaged, killed while they are written, or do not fit on the disk: none is lost but that one."""

import errno
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from rich.console import Console
from test_rundir import file_limit
from tiny import SETTINGS, equal_weights, flip, tiny_model, tiny_normalization

import spectralvae
from spectralvae import load_model
from spectralvae.errors import DamagedError, NoRoomError
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
    """A run that is to be resumed: whatever is refused must leave its weights and its optimizer as they were."""

    def __init__(self):
        self.model, self.optimizer = new_trained(99)
        self.before = self.snapshot()

    def snapshot(self):
        states = [self.model.state_dict(), *self.optimizer.state.values()]
        return {f"{i} {key}": value.clone() for i, state in enumerate(states) for key, value in state.items()}

    def refuses(self, path, named):
        with refused(DamagedError, path=named):
            restore(path, self.model, self.optimizer)
        assert equal_weights(self.snapshot(), self.before)


@pytest.mark.parametrize(("kind", "quick", "full"), [("flip", 200, 1000), ("cut", 50, 200)])
def test_every_flip_and_every_cut_is_refused_before_use(run, console, amount, kind, quick, full):
    """Files take turns, and half of the positions are in a file's header."""
    folder, resume, random = checkpoint_path(run, 5), Resume(), np.random.default_rng(7)
    paths, n = sorted(folder.iterdir()), amount(quick, full)
    for i in range(n):
        path = paths[i % len(paths)]
        content = path.read_bytes()
        end = len(content)
        if path.suffix == ".safetensors" and random.random() < 0.5:
            end = 8 + int.from_bytes(content[:8], "little")
        position = int(random.integers(end))
        if kind == "cut":
            os.truncate(path, position)
        else:
            flip(path, position, int(random.integers(8)))
        resume.refuses(folder, path)
        for what in (run, folder):
            with refused(DamagedError, path=path):
                load_model(what)
        assert newest_valid(run, console) is None
        path.write_bytes(content)
    assert console.file.getvalue().count(f": {folder}/") == n
    assert loads(run, 5)
    assert newest_valid(run, console) == folder


def test_one_file_more_is_never_read(run, console):
    folder = checkpoint_path(run, 5)
    (folder / "pytorch_model.bin").write_bytes(b"weights of a stranger")
    (folder / "sub").mkdir()
    assert loads(run, 5)
    assert newest_valid(run, console) == folder


FILE_DAMAGES = [
    lambda path: flip(path, 0.4, 3),
    lambda path: os.truncate(path, path.stat().st_size // 3),
    Path.unlink,
    lambda path: os.truncate(path, path.stat().st_size + 1),
    lambda path: path.write_bytes(bytes(path.stat().st_size)),  # a power loss, where sizes are written before data
    lambda path: (path.unlink(), path.mkdir()),
    lambda path: (path.unlink(), path.symlink_to(path.name)),
]
FOLDER_DAMAGES = [
    lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"")),
    lambda folder: (shutil.rmtree(folder), folder.symlink_to("gone")),
]


def test_damaged_newest_ones_are_passed_over_by_step_not_by_clock(saved, tmp_path, amount):
    random = np.random.default_rng(3)
    names = sorted(path.name for path in checkpoint_path(saved, 15).iterdir())
    cases = [(harm, name) for name in names for harm in FILE_DAMAGES][:: amount(3, 1)]
    for i, (harm, name) in enumerate([*cases, *((harm, "") for harm in FOLDER_DAMAGES)]):
        run = Path(shutil.copytree(saved, tmp_path / str(i)))
        newest = checkpoint_path(run, 15)
        harm(newest / name)
        for when, step in enumerate(random.permutation([5, 10, 15]) if i % 2 else (15, 10, 5)):
            folder = checkpoint_path(run, int(step))
            if folder.is_dir():
                for path in (*folder.iterdir(), folder):
                    os.utime(path, (1e9 + 1000 * when, 1e9 + 1000 * when), follow_symlinks=False)
        for leftover in (".step=000020.tmp", ".step=000025.old"):
            shutil.copytree(checkpoint_path(saved, 5), run / "checkpoints" / leftover)
        named = newest / (name or "manifest.json")
        with refused(DamagedError, path=named):
            load_model(run)
        console = Console(file=io.StringIO(), soft_wrap=True)
        assert newest_valid(run, console) == checkpoint_path(run, 10), i
        warnings = [line for line in console.file.getvalue().splitlines() if line.startswith("WARNING")]
        assert len(warnings) == 1, i
        assert str(named) in warnings[0], i
        resume = Resume()
        assert restore(checkpoint_path(run, 10), resume.model, resume.optimizer)["step"] == 10
        assert equal_weights(resume.model.state_dict(), trained(10)[0].state_dict())


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
    stride = amount(6, 1)
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


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")


def fails_to_save(run, code, no_room):
    """Saving 10 without room costs nothing; the numbers of bytes in the line: needed, free, where limited the limit."""
    with refused(NoRoomError, os.strerror(code), path=checkpoint_path(run, 10)) as error, no_room:
        save(run, 10, *trained(10))
    return [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", str(error.value))]


def is_untouched(run):
    return names_in(run) == ["step=000005"] and loads(run, 5)


@contextmanager
def full_disk(monkeypatch, n):
    """From the ``n``-th operation on that needs room for anything but content, there is none."""
    operations = itertools.count(1)

    def guarded(function):
        def call(*arguments, **options):
            if next(operations) >= n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace")):
            patch.setattr(owner, name, guarded(getattr(owner, name)))
        yield


def test_no_room_at_any_operation(run, saved, monkeypatch):
    for n in range(1, 17):
        needed, free = fails_to_save(run, errno.ENOSPC, full_disk(monkeypatch, n))
        assert needed == size_of(checkpoint_path(saved, 10))
        assert free == pytest.approx(shutil.disk_usage(run).free, rel=0.2)
        if checkpoint_path(run, 10).exists():  # no room for the entry in the folder above: it is there and whole
            verify(checkpoint_path(run, 10))
            shutil.rmtree(checkpoint_path(run, 10))
        assert is_untouched(run), n
    save(run, 10, *trained(10))
    assert loads(run, 10)


def test_a_limit_of_the_file_size_at_20_points(run, saved, amount):
    largest = max(path.stat().st_size for path in checkpoint_path(saved, 10).iterdir())
    for i in range(0, 20, amount(3, 1)):
        limit = largest * i // 20
        needed, _, allowed = fails_to_save(run, errno.EFBIG, file_limit(limit))
        assert (needed, allowed) == (size_of(checkpoint_path(saved, 10)), limit)
        assert is_untouched(run)
