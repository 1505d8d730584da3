"""Two processes train as one does; and whatever happens to one of them, neither waits for ever, and nothing is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import (
    differing,
    environments,
    newest_checkpoint,
    record,
    rows,
    train_ranks,
    write_config,
)
from safetensors.numpy import load_file

from spectralvae.errors import ConfigError
from spectralvae.runtime.ranks import SLURM_PORTS, Ranks, find_ranks
from spectralvae.weights.artifact import read_artifact

SBATCH = Path(__file__).parents[1] / "examples" / "slurm" / "train.sbatch"
PATIENCE = 4.0  # peer_timeout where it is to run out


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_store):
    random = np.random.default_rng(0)
    scenes = {name: random.normal(size=(24, 24, 6)) for name in ("a", "b", "v")}
    for z in scenes.values():
        z[random.random(z.shape) < 0.1] = np.nan
    return make_store(tmp_path_factory.mktemp("data") / "store", scenes, val=("v",)).path


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


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_learn_what_one_does(starter, config, tmp_path, parts):
    """Of the same tiles with the same noise, without dropout, whose masks depend on the number of processes."""
    training = {"n_steps": 20, "save_every": 20, "val_every": 5, "log_every": 1, "gradient_accumulation": parts}
    changes = {"model": {"dropout_prob": 0.0}, "optimizer": {"lr": 1e-4}, "training": training}
    one, one_run = config("one", **changes)
    two, two_run = config("two", **changes)
    assert starter.train(one, ("recorded", tmp_path / "one")).wait() == 0
    assert codes(train_ranks(starter, two, 2, ("recorded", tmp_path / "two"))) == [0, 0]

    seen = [np.load(tmp_path / f"{name}.npz") for name in ("one-0", "two-0", "two-1")]
    for key in ("crops", "noise"):
        alone, *shares = (arrays[key] for arrays in seen)
        assert alone.shape[:2] == (20, 4)
        assert [share.shape[:2] for share in shares] == [(20, 2), (20, 2)]
        np.testing.assert_array_equal(np.concatenate(shares, axis=1), alone)

    weights = [load_file(newest_checkpoint(run) / "model.safetensors") for run in (one_run, two_run)]
    start = max(np.abs(weights[0][key]).max() for key in weights[0])
    assert start > 0.1  # the tolerance is one of weights of this size
    for key in weights[0]:
        np.testing.assert_allclose(weights[1][key], weights[0][key], rtol=0, atol=1e-6, err_msg=key)
    assert len(rows(one_run)) == 21
    for mine, expected in zip(rows(two_run), rows(one_run), strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)
    one, two = (read_artifact(newest_checkpoint(run))[0] for run in (one_run, two_run))
    assert (two.latents.n_tiles, two.latents.n_positions) == (one.latents.n_tiles, one.latents.n_positions) == (5, 80)
    np.testing.assert_allclose(two.latents.mean, one.latents.mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(two.latents.std, one.latents.std, rtol=1e-6)
    assert two.provenance.metrics == pytest.approx(one.provenance.metrics, rel=1e-5)


# --- signals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_stops_both(starter, config, rank):
    """With dropout; resumed by two, the run ends as one of two that nobody stopped."""
    whole, whole_run = config("whole")
    cut, run = config("cut")
    assert codes(train_ranks(starter, whole, 2)) == [0, 0]
    assert codes(train_ranks(starter, cut, 2, ("at_update", 7, signal.SIGUSR1, rank))) == [75, 75]
    assert record(run)["state"] == "stopped"
    assert newest_checkpoint(run).name == "step=000007"
    assert codes(train_ranks(starter, cut, 2)) == [0, 0]
    assert differing(run, whole_run) == []


def test_three_go_on_exactly(starter, config):
    """Of three, the order in which gradients are added up matters, as it does not of two."""
    whole, whole_run = config("whole", data={"batch_size": 6})
    cut, run = config("cut", data={"batch_size": 6})
    assert codes(train_ranks(starter, whole, 3)) == [0] * 3
    assert codes(train_ranks(starter, cut, 3, ("at_update", 7, signal.SIGTERM, 2))) == [75] * 3
    assert codes(train_ranks(starter, cut, 3)) == [0] * 3
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
    """The other process must end by itself in time, with one line; returns that line."""
    other = children[1 - rank]
    started = time.monotonic()
    assert other.wait(patience + 20) == 1, "it waits for ever"
    assert time.monotonic() - started < patience + 10
    return other.errors


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_the_other(starter, config, rank):
    """Long before the time-out: its connection is closed."""
    path, run = config()
    children = train_ranks(starter, path, 2, ("at_update", 7, signal.SIGKILL, rank), to_the_end=True)
    assert children[rank].wait() == -signal.SIGKILL
    (line,) = survivor_of(children, rank, 0)
    assert re.search(f"process {1 - rank} of 2: another process is gone", line)
    if rank == 1:
        assert record(run)["state"] == "stopped"  # no verdict on the run: it may be started again
        assert "another process is gone" in record(run)["error"]
    assert codes(train_ranks(starter, path, 2)) == [0, 0]  # from checkpoint 5
    assert record(run)["starts"][-1]["from_step"] == 5


def one_run_for_each_rank(starter, config, *put):
    """(rank, run's directory, processes), twice at once: what takes as long as one's patience is waited for together.

    Args:
        put: what happens to the process of that rank, which is its last argument.
    """
    started = []
    for rank in (0, 1):
        path, run = config(f"run{rank}", training={"peer_timeout": PATIENCE})
        started.append((rank, run, train_ranks(starter, path, 2, (*put, rank), to_the_end=True)))
    return started


def test_frozen_process_ends_the_other(starter, config):
    for rank, run, children in one_run_for_each_rank(starter, config, "at_update", 7, signal.SIGSTOP):
        (line,) = survivor_of(children, rank, PATIENCE + 20)
        assert re.search(rf"process {1 - rank} of 2: .*has not answered for 4 s \(training.peer_timeout\)", line)
        if rank == 1:
            assert record(run)["state"] == "stopped"
        assert newest_checkpoint(run).name == "step=000005"


def test_process_that_never_starts(starter, config):
    for rank, run, children in one_run_for_each_rank(starter, config, "never_there"):
        assert children[rank].wait() == 0
        *_, line = survivor_of(children, rank, PATIENCE + 5)  # torch may have said something before
        assert "another process is gone, or has not answered for 4 s" in line
        assert not run.exists()


# --- errors in one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_not_finite_in_one_stops_both(starter, config, tmp_path, rank):
    """Before the update: the weights are those of a run that ended one step earlier."""
    path, run = config()
    before, before_run = config("before", training={"n_steps": 6})
    assert codes(train_ranks(starter, before, 2, ("recorded", tmp_path / "seen"))) == [0, 0]
    assert codes(train_ranks(starter, path, 2, ("recorded", tmp_path / "bad"), ("poisoned", rank, 7, 1, run))) == [1, 1]

    expected = load_file(newest_checkpoint(before_run) / "model.safetensors")
    for kept in (load_file(f"{run}-{i}.safetensors") for i in range(2)):
        assert kept.keys() == expected.keys()
        for key in expected:
            np.testing.assert_array_equal(kept[key], expected[key])
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step=000005"]
    assert rows(run)[-1]["step"] == 6
    assert record(run)["state"] == "failed"

    report = json.loads((run / "failures/step=000007.json").read_text())
    crops = [np.load(f"{tmp_path}/bad-{i}.npz")["crops"][6] for i in range(2)]
    assert [(t["process"], t["y"], t["x"]) for t in report["tiles"]] == [
        (i, y, x) for i in range(2) for _, y, x, _, _ in crops[i].tolist()
    ]
    (guilty,) = (t for t in report["tiles"] if isinstance(t["loss"], str))
    scene, y, x, _, _ = crops[rank][1].tolist()
    assert (guilty["process"], guilty["scene"], guilty["y"], guilty["x"]) == (rank, "abv"[scene], y, x)
    assert f"{'abv'[scene]} at ({y}, {x})" in record(run)["error"]
    assert not np.isfinite(float(report["metrics"]["loss"]))


def test_unreadable_for_one(starter, config):
    """The error of a process that does not write stands in run.json, too."""
    path, run = config()
    children = train_ranks(starter, path, 2, ("unreadable", 1, 8), to_the_end=True)
    assert codes(children) == [1, 1]
    assert record(run)["state"] == "failed"
    assert re.search(r"process 1: .*Input/output error.*scenes/[ab]", record(run)["error"])
    assert len(children[1].errors) == 1
    assert "Input/output error" in children[0].errors[0]


def test_full_disk(starter, config):
    path, run = config(model={"chs": [32, 16]})
    children = train_ranks(starter, path, 2, ("small_files", 500_000, 0))
    assert codes(children) == [1, 1]
    assert record(run)["state"] == "failed"
    assert re.search("step=000005: File too large", record(run)["error"])
    assert len(children[0].errors) == 1


# --- before and after -------------------------------------------------------------------------------------------


def test_finished_run_says_so(starter, config):
    path, run = config(training={"n_steps": 2})
    assert codes(train_ranks(starter, path, 2)) == [0, 0]
    before = record(run)
    children = train_ranks(starter, path, 2)
    assert codes(children) == [0, 0]
    assert "this run is finished" in children[0].output
    assert record(run) == before


@pytest.mark.parametrize("key", ["data", "model"])
def test_config_errors_end_both(starter, config, key):
    """Found by the schema, and found with the store at hand."""
    changes = {"data": {"batch_size": 3}, "model": {"norm_groups": 3}}
    path, run = config(**{key: changes[key]}) if key == "model" else config()
    options = ("--set", "data.batch_size=3") if key == "data" else ()
    children = [starter.train(path, environment=rank, options=options) for rank in environments(2)]
    assert all(code in (1, 2) for code in codes(children))
    assert children[0].wait() == 2
    assert not run.exists()


# --- who is who -------------------------------------------------------------------------------------------------


def who(environment):
    ranks = find_ranks(environment)
    return ranks.rank, ranks.world_size, ranks.local_rank


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A job step of srun on two nodes, as this process sees it; scontrol is there."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[3-4]" ] && echo node3 && echo node4\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "of before")
        monkeypatch.delenv(name)
    batch = {"SLURM_JOB_ID": "123456", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    batch |= {"SLURM_JOB_NODELIST": "node[3-4]"}
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    return batch, batch | step


def test_torchrun_tells_who_is_who():
    where = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert who({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **where}) == (5, 8, 1)
    with pytest.raises(ConfigError, match="MASTER_PORT is missing beside RANK"):
        who({"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "node1"})
    assert who({"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1, None)
    assert who({}) == (0, 1, None)


def test_srun_tells_who_is_who(slurm):
    _, step = slurm
    assert who(step) == (3, 4, 1)
    assert os.environ["MASTER_ADDR"] == "node3"
    assert int(os.environ["MASTER_PORT"]) in SLURM_PORTS


def test_named_address_is_kept(slurm):
    _, step = slurm
    assert who({**step, "MASTER_ADDR": "other", "MASTER_PORT": "1"}) == (3, 4, 1)
    assert "MASTER_ADDR" not in os.environ
    assert "MASTER_PORT" not in os.environ


def test_batch_script_without_srun_is_alone(slurm):
    batch, _ = slurm
    assert who(batch) == (0, 1, None)
    assert "MASTER_ADDR" not in os.environ


def test_single_task_needs_no_address(slurm):
    _, step = slurm
    assert who({**step, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == (0, 1, 0)
    assert "MASTER_ADDR" not in os.environ


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one is no number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is no number"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE= is no number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be less than WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 must be less than WORLD_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK=x is no number"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS=many is no number"),
    ],
)
def test_malformed_environment_is_refused(environment, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        find_ranks(environment)


def test_nodes_that_cannot_be_expanded(slurm, monkeypatch):
    _, step = slurm
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST=node5: scontrol cannot expand it"):
        find_ranks({**step, "SLURM_STEP_NODELIST": "node5"})
    del step["SLURM_STEP_NODELIST"], step["SLURM_JOB_NODELIST"]
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST is missing"):
        find_ranks(step)


def test_alone_everything_is_as_it_was():
    ranks = Ranks()
    with ranks.joined(1.0), ranks.together():
        assert ranks.leads
        assert ranks.share("this") == "this"
        assert ranks.gather(3) == [3]
        assert ranks.lead(len, "four") == 4
        np.testing.assert_array_equal(ranks.sum(np.arange(3.0)), np.arange(3.0))


# --- launchers --------------------------------------------------------------------------------------------------


def clean_environment(**more):
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RANK", "WORLD_", "MASTER"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def test_torchrun(config):
    """The real one, and a config that knows nothing of it."""
    path, run = config(training={"n_steps": 2})
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "spectralvae",
        "train",
        path,
    ]
    done = subprocess.run(
        [sys.executable, *command], env=clean_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert record(run)["state"] == "finished"
    assert record(run)["n_processes"] == 2
    assert done.stdout.count("output directory: ") == 1


@pytest.fixture
def cluster(tmp_path):
    """A folder for PATH: scontrol that notes what is put back into the queue, and python3; srun is for the test."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "scontrol": 'case $1 in show) echo 127.0.0.1 ;; requeue) echo "$2" >> "$QUEUE" ;; esac',
        "python3": f'exec {sys.executable} "$@"',
    }
    for name, script in scripts.items():
        write_script(folder / name, script)
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
    done = subprocess.run(
        ["bash", SBATCH, config, run],
        env=clean_environment(**more, **environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, queue.read_text().split()


def test_batch_script_goes_on_until_the_run_is_finished(cluster, config):
    """srun's two processes; the first time, one of them is told that the time is up."""
    path, run = config()
    script = "import running, sys; sys.exit(running.srun(sys.argv[1:]))"
    write_script(cluster / "srun", f'cd {Path(__file__).parent} && exec {sys.executable} -c "{script}" "$@"')
    code, printed, queue = submit(cluster, path, run, STOP=str(run))
    assert (code, queue) == (0, ["77"]), printed
    assert record(run)["state"] == "stopped"
    code, printed, queue = submit(cluster, path, run, STOP="", SLURM_RESTART_COUNT="1")
    assert (code, queue) == (0, []), printed
    assert record(run)["state"] == "finished"
    assert [start["from_step"] > 0 for start in record(run)["starts"]] == [False, True]
    assert record(run)["n_processes"] == 2


STOPPED_AT_5 = {"from_step": 0, "to_step": 5}
KILLED_AT_5 = {"from_step": 5}


@pytest.mark.parametrize(
    ("before", "state", "starts", "newest", "exit_codes", "requeued"),
    [
        (None, "stopped", [STOPPED_AT_5], 5, (75, 0), True),
        (None, "running", [{}], None, (137, 0), True),
        ([STOPPED_AT_5], "running", [STOPPED_AT_5, KILLED_AT_5], 5, (137, 0), True),
        ([{}, {}], "running", [{}, {}, {}], None, (137, 1), False),
        ([STOPPED_AT_5] + 2 * [KILLED_AT_5], "running", [STOPPED_AT_5] + 3 * [KILLED_AT_5], 5, (137, 1), False),
        ([STOPPED_AT_5] + 2 * [KILLED_AT_5], "running", [STOPPED_AT_5] + 3 * [KILLED_AT_5], 10, (137, 0), True),
        (None, "failed", [{"from_step": 0}], 5, (1, 1), False),
        (None, "finished", [{"from_step": 0}], 14, (0, 0), False),
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
