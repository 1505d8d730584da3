"""Two processes train as one does; and whatever happens to one of them, neither waits for ever, and nothing is lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from rich.console import Console
from running import differing, environments, newest_checkpoint, noise_store, record, rows, train_ranks, write_config
from safetensors.numpy import load_file

from spectralvae.config import TrainConfig
from spectralvae.config.loading import load_config
from spectralvae.errors import ConfigError
from spectralvae.runtime.ranks import SLURM_PORTS, Ranks, find_ranks
from spectralvae.training.engine import Engine
from spectralvae.training.objective import means
from spectralvae.training.setup import set_up
from spectralvae.weights.artifact import read_artifact

SBATCH = Path(__file__).parents[1] / "examples" / "slurm" / "train.sbatch"
PATIENCE = 4.0  # peer_timeout where it is to run out


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_store):
    return noise_store(make_store, tmp_path_factory.mktemp("data") / "store")


@pytest.fixture
def config(tmp_path, store):
    """A function that writes a config; returns its path and the run's directory."""

    def write(name="run", **changes):
        changes.setdefault("data", {}).setdefault("num_workers", 0)
        changes.setdefault("training", {}).setdefault("peer_timeout", 60)
        return write_config(tmp_path, name, store, **changes)

    return write


def codes(children):
    return [child.wait() for child in children]


# --- two processes and one --------------------------------------------------------------------------------------


def test_two_processes_learn_what_one_does(starter, config, tmp_path):
    """Of the same tiles with the same noise, without dropout, whose masks depend on the number of processes."""
    training = {"n_steps": 10, "save_every": 10, "val_every": 5, "log_every": 1, "gradient_accumulation": 2}
    changes = {"model": {"dropout_prob": 0.0}, "optimizer": {"lr": 1e-4}, "training": training}
    one, one_run = config("one", **changes)
    two, two_run = config("two", **changes)
    assert starter.train(one, ("recorded", tmp_path / "one")).wait() == 0
    assert codes(train_ranks(starter, two, 2, ("recorded", tmp_path / "two"))) == [0, 0]

    seen = [np.load(tmp_path / f"{name}.npz") for name in ("one-0", "two-0", "two-1")]
    for key in ("crops", "noise"):
        alone, *shares = (arrays[key] for arrays in seen)
        assert alone.shape[:2] == (10, 4)
        assert [share.shape[:2] for share in shares] == [(10, 2), (10, 2)]
        np.testing.assert_array_equal(np.concatenate(shares, axis=1), alone)

    weights = [load_file(newest_checkpoint(run) / "model.safetensors") for run in (one_run, two_run)]
    start = max(np.abs(weights[0][key]).max() for key in weights[0])
    assert start > 0.1  # the tolerance is one of weights of this size
    for key in weights[0]:
        np.testing.assert_allclose(weights[1][key], weights[0][key], rtol=0, atol=1e-6, err_msg=key)
    assert len(rows(one_run)) == 11
    for mine, expected in zip(rows(two_run), rows(one_run), strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)
    alone, shared = (read_artifact(newest_checkpoint(run))[0] for run in (one_run, two_run))
    assert [(a.latents.n_tiles, a.latents.n_positions) for a in (alone, shared)] == [(5, 80)] * 2
    np.testing.assert_allclose(shared.latents.mean, alone.latents.mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(shared.latents.std, alone.latents.std, rtol=1e-6)
    assert shared.provenance.metrics == pytest.approx(alone.provenance.metrics, rel=1e-5)

    before = record(two_run)
    assert codes(train_ranks(starter, two, 2)) == [0, 0]
    assert record(two_run) == before  # finished: nothing to do


def gradients(config, ranks):
    """Loss and gradients of the first step of a network whose weights are not at their start, where most are 0."""
    setup = set_up(config, ranks, Console(quiet=True))
    with torch.no_grad():
        for parameter in setup.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    engine = Engine(setup.model, config, setup.device, ranks)
    sums = engine.gradients(next(iter(setup.stream(0, 0)))).sums
    found = {name: p.grad.clone() for name, p in setup.model.named_parameters() if p.grad is not None}
    return means(ranks.add(sums))["loss"], found


def deviations(paths, environment):
    """In one of two processes: for each config, the relative deviations of loss and gradients from those of one."""
    os.environ.update(environment)
    ranks, found = find_ranks(), []
    with ranks.joined(60):
        for path in paths:
            config = load_config(TrainConfig, path)
            (loss, shared), (expected, alone) = gradients(config, ranks), gradients(config, Ranks())
            assert shared.keys() == alone.keys()
            norms = {name: float(gradient.norm()) for name, gradient in alone.items()}
            rounding = 1e-5 * sum(norm**2 for norm in norms.values()) ** 0.5  # what a negligible gradient consists of
            of = [float((shared[name] - alone[name]).norm()) / max(norms[name], rounding) for name in alone]
            found.append((abs(loss / expected - 1), float(np.max(of))))
    return found


def test_gradients_of_two_processes_are_those_of_one(config):
    """Float32 sums in another order differ by 1e-6 to 1e-4; a factor or a share left out, by 0.1 and more."""
    parts = [config(f"{n}", model={"dropout_prob": 0.0}, training={"gradient_accumulation": n}) for n in (1, 2)]
    paths = [path for path, _ in parts]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        of_ranks = list(processes.map(deviations, [paths, paths], environments(2)))
    for of_loss, of_gradients in (pair for found in of_ranks for pair in found):
        assert of_loss < 1e-5
        assert of_gradients < 1e-3


# --- signals ----------------------------------------------------------------------------------------------------


def test_signal_to_one_stops_all(starter, config):
    """With dropout; resumed, the run ends as one that nobody stopped.

    Of three processes, the order in which gradients are added up matters, as it does not of two.
    """
    for n, stopped, tiles in ((2, {0: signal.SIGUSR1, 1: signal.SIGUSR1}, 4), (3, {2: signal.SIGTERM}, 6)):
        whole, whole_run = config(f"whole{n}", data={"batch_size": tiles})
        children = train_ranks(starter, whole, n)
        for rank, number in stopped.items():
            path, run = config(f"cut{n}{rank}", data={"batch_size": tiles})
            assert codes(train_ranks(starter, path, n, ("at_update", 7, number, rank))) == [75] * n
            assert record(run)["state"] == "stopped"
            assert newest_checkpoint(run).name == "step=000007"
            assert codes(train_ranks(starter, path, n)) == [0] * n
            assert codes(children) == [0] * n
            assert differing(run, whole_run) == []


PARTED = """
import os
from pathlib import Path

import torch

from spectralvae.runtime.ranks import find_ranks

def work():
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    network(torch.ones(1, 2)).sum().backward()
    cycle = [network]
    cycle.append(cycle)

with find_ranks().joined(60):
    work()
    during = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
left = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert any("gloo" in name for name in during)
assert not any("gloo" in name for name in left), left
"""


def test_no_thread_of_the_group_outlives_it():
    """One that still releases a tensor when Python ends would abort the process. In processes of their own: what was
    imported before matters."""
    ranks = [{**os.environ, **rank, "OMP_NUM_THREADS": "1"} for rank in environments(2)]
    children = [subprocess.Popen([sys.executable, "-c", PARTED], env=rank) for rank in ranks]
    assert [child.wait(60) for child in children] == [0, 0]


# --- processes that are gone ------------------------------------------------------------------------------------


def survivor_of(children, rank, patience):
    """The other process must end by itself in time; returns its lines."""
    started = time.monotonic()
    assert children[1 - rank].wait(patience + 20) == 1, "it waits for ever"
    assert time.monotonic() - started < patience + 10
    return children[1 - rank].errors


@pytest.mark.parametrize(
    ("what", "patience"),
    [
        (("at_update", 7, signal.SIGKILL), 0),  # long before the time-out: its connection is closed
        (("at_update", 7, signal.SIGSTOP), PATIENCE),
        (("never_there",), PATIENCE),
    ],
)
def test_process_that_is_gone_ends_the_other(starter, config, what, patience):
    """Of two runs, started at once, each loses another process."""
    started = []
    for rank in (0, 1):
        path, run = config(f"run{rank}", training={"peer_timeout": patience or 60})
        started.append((rank, path, run, train_ranks(starter, path, 2, (*what, rank), to_the_end=True)))
    for rank, path, run, children in started:
        *_, line = survivor_of(children, rank, patience)  # torch may have said something before
        if patience:
            assert "4 s" in line and "training.peer_timeout" in line
        if what == ("never_there",):
            assert children[rank].wait() == 0
            assert not run.exists()
            continue
        assert f"process {1 - rank} of 2" in line
        assert newest_checkpoint(run).name == "step=000005"
        if rank == 1:
            assert record(run)["state"] == "stopped"  # no verdict on the run: it may be started again
            assert "process 0 of 2" in record(run)["error"]
        if not patience:
            assert children[rank].wait() == -signal.SIGKILL
            assert codes(train_ranks(starter, path, 2)) == [0, 0]
            assert record(run)["starts"][-1]["from_step"] == 5


# --- errors in one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_not_finite_in_one_stops_both(starter, config, tmp_path, rank):
    """Before the update, and the report has the tiles of both."""
    path, run = config()
    put = (("recorded", tmp_path / "seen"), ("poisoned", rank, 7, 1))
    assert codes(train_ranks(starter, path, 2, *put)) == [1, 1]
    seen = [np.load(f"{tmp_path}/seen-{i}.npz") for i in range(2)]
    assert [arrays["updates"].tolist() for arrays in seen] == [[6], [6]]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step=000005"]
    assert rows(run)[-1]["step"] == 6
    assert record(run)["state"] == "failed"

    report = json.loads((run / "failures/step=000007.json").read_text())
    crops = [arrays["crops"][6].tolist() for arrays in seen]
    assert [(t["process"], t["y"], t["x"]) for t in report["tiles"]] == [
        (i, y, x) for i in range(2) for _, y, x, _, _ in crops[i]
    ]
    (guilty,) = (t for t in report["tiles"] if isinstance(t["loss"], str))
    scene, y, x, _, _ = crops[rank][1]
    assert (guilty["process"], guilty["scene"], guilty["y"], guilty["x"]) == (rank, "abv"[scene], y, x)
    assert f"{'abv'[scene]} at ({y}, {x})" in record(run)["error"]
    assert not np.isfinite(float(report["metrics"]["loss"]))


@pytest.mark.parametrize(
    ("put", "words", "every"),
    [
        (("unreadable", 1, 8), ("process 1", os.strerror(errno.EIO)), 14),  # one that does not write
        (("small_files", 500_000, 0), ("step=000005", os.strerror(errno.EFBIG)), 5),
    ],
)
def test_error_in_one_ends_both(starter, config, put, words, every):
    # no validation until the end: the batch of a step is lost in the loop
    path, run = config(model={"chs": [32, 16]}, training={"val_every": 14, "save_every": every})
    children = train_ranks(starter, path, 2, put, to_the_end=True)
    assert codes(children) == [1, 1]
    assert record(run)["state"] == "failed"
    for text in (record(run)["error"], children[0].errors[0]):
        assert all(word in text for word in words)
    assert len(children[put[-1] == 8].errors) == 1


# --- before and after -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["model.norm_groups=3", "data.batch_size=3"])
def test_config_errors_end_both(starter, config, setting):
    """Found by the schema, and found with the store at hand."""
    path, run = config()
    first, second = train_ranks(starter, path, 2, options=("--set", setting))
    assert first.wait() == 2 and second.wait() in (1, 2)
    assert not run.exists()


# --- who is who -------------------------------------------------------------------------------------------------


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Knows two nodes."""
    write_script(tmp_path / "scontrol", '[ "$*" = "show hostnames node[3-4]" ] && echo node3 && echo node4')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "of before")
        monkeypatch.delenv(name)


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
BATCH = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node[3-4]"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected", "address"),
    [
        ({}, (0, 1, None), None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, None), None),
        (TORCHRUN, (5, 8, 1), None),
        (BATCH, (0, 1, None), None),  # a batch script without srun is alone
        ({**BATCH, **SRUN}, (3, 4, 1), "node3"),
        ({**SRUN, "MASTER_ADDR": "other", "MASTER_PORT": "1"}, (3, 4, 1), None),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0), None),
    ],
)
def test_who_is_who(scontrol, environment, expected, address):
    """The address is found out where srun alone starts several."""
    ranks = find_ranks(environment)
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == expected
    assert os.environ.get("MASTER_ADDR") == address
    assert address is None or int(os.environ["MASTER_PORT"]) in SLURM_PORTS


def test_torchrun_alone_tells_how_many_are_on_a_machine(scontrol):
    assert find_ranks({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}).local_world_size == 2
    for environment in (TORCHRUN, {**BATCH, **SRUN}, {}):
        assert find_ranks(environment).local_world_size is None


@pytest.mark.parametrize(
    ("environment", "key", "value"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "$RANK", "one"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "$RANK", "-1"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "$WORLD_SIZE", ""),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "$RANK", 2),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "$LOCAL_RANK", "x"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, "$RANK", None),  # no port
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "many"}, "$SLURM_STEP_NUM_TASKS", "many"),
        ({**SRUN, "SLURM_STEP_NODELIST": "node5"}, "$SLURM_STEP_NODELIST", "node5"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, "$SLURM_STEP_NODELIST", None),
    ],
)
def test_malformed_environment_is_refused(scontrol, environment, key, value):
    with refused(ConfigError, key=key, **({} if value is None else {"value": value})):
        find_ranks(environment)


# --- launchers --------------------------------------------------------------------------------------------------


def clean_environment(**more):
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RANK", "WORLD_", "MASTER"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def test_torchrun(config):
    """The real one, and a config that knows nothing of it."""
    path, run = config(training={"n_steps": 2})
    launcher = [*["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]]
    command = [sys.executable, *launcher, "-m", "spectralvae", "train", path]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (record(run)["state"], record(run)["n_processes"]) == ("finished", 2)
    assert done.stdout.count(f"{record(run)['n_parameters']:,}") == 1  # one of the two prints


@pytest.fixture
def cluster(tmp_path):
    """A folder for PATH: scontrol that notes what is put back into the queue, and python3; srun is for the test."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_script(folder / "scontrol", 'case $1 in show) echo 127.0.0.1 ;; requeue) echo "$2" >> "$QUEUE" ;; esac')
    write_script(folder / "python3", f'exec {sys.executable} "$@"')
    return folder


def write_script(path, text):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def submit(cluster, config, run, **environment):
    """Run the batch script as SLURM would; returns its exit code, what it printed, and the jobs put into the queue."""
    queue = cluster / "queue"
    queue.write_text("")
    path = f"{cluster}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "QUEUE": str(queue), "SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    environment = clean_environment(**more, **environment)
    command = ["bash", SBATCH, config, run]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr, queue.read_text().split()


SRUN_OF_TWO = f"""
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=node1
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i {sys.executable} -m "$@" & done
if [ "$STOP" ]; then
    until ls "$STOP"/checkpoints/step=*; do sleep 0.05; done
    kill -USR1 $!
fi
wait %1
code=$?
wait %2
exit $code
"""


def test_batch_script_goes_on_until_the_run_is_finished(cluster, config):
    """srun's two processes; the first time, one of them is told that the time is up."""
    path, run = config(training={"save_every": 2})
    write_script(cluster / "srun", SRUN_OF_TWO)
    code, printed, queue = submit(cluster, path, run, STOP=str(run))
    assert (code, queue) == (0, ["77"]), printed
    assert record(run)["state"] == "stopped"
    code, printed, queue = submit(cluster, path, run, STOP="", SLURM_RESTART_COUNT="1")
    assert (code, queue) == (0, []), printed
    assert (record(run)["state"], record(run)["n_processes"]) == ("finished", 2)
    assert [start["from_step"] > 0 for start in record(run)["starts"]] == [False, True]


STOPPED_AT_5 = {"from_step": 0, "to_step": 5}
KILLED_AT_5 = {"from_step": 5}


@pytest.mark.parametrize(
    ("before", "state", "starts", "newest", "exit_codes", "requeued"),
    [
        (None, "running", [{}], None, (137, 0), True),
        ([STOPPED_AT_5], "running", [STOPPED_AT_5, KILLED_AT_5], 5, (137, 0), True),
        ([{}, {}], "running", [{}, {}, {}], None, (137, 1), False),
        ([STOPPED_AT_5] + 2 * [KILLED_AT_5], "running", [STOPPED_AT_5] + 3 * [KILLED_AT_5], 5, (137, 1), False),
        ([STOPPED_AT_5] + 2 * [KILLED_AT_5], "running", [STOPPED_AT_5] + 3 * [KILLED_AT_5], 10, (137, 0), True),
        (None, "failed", [{"from_step": 0}], 5, (1, 1), False),
        (None, None, None, None, (2, 2), False),  # an error in the config: nothing was made
        ([STOPPED_AT_5], "stopped", [STOPPED_AT_5], 5, (2, 2), False),  # another config was refused
        ([KILLED_AT_5], "running", [KILLED_AT_5], 5, (2, 2), False),  # another job is at it
    ],
)
def test_what_is_put_back_into_the_queue(cluster, tmp_path, before, state, starts, newest, exit_codes, requeued):
    run = tmp_path / "run"
    after = tmp_path / "after.json"
    after.write_text(json.dumps({"state": state, "starts": starts}))
    if before is not None:
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"state": "stopped", "starts": before}))
    made = "" if starts is None else f"mkdir -p {run}/checkpoints; cp {after} {run}/run.json;"
    made += "" if newest is None else f"mkdir {run}/checkpoints/step={newest:06d};"
    write_script(cluster / "srun", f"{made} exit {exit_codes[0]}")
    code, printed, queue = submit(cluster, "train.yaml", run)
    assert (code, queue) == (exit_codes[1], ["77"] if requeued else []), printed
