"""Preparation by worker processes: the same store, bit for bit, and one line for whatever goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import dask
import distributed
import dying
import h5py
import numpy as np
import pytest
import yaml
from preparing import (
    BAND,
    SPLIT_OF_THREE,
    WriteGranule,
    name,
    radiance,
    rearrange,
    refused,
    run_prepare,
    same_content,
    wait_until,
    write_level2,
)

from spectralvae.data import prepare as prepare_module
from spectralvae.data import workers as workers_module
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError, InputError, RunError

LOCAL: dict[str, Any] = {"cluster": "local", "n_workers": 2}
SHAPE = (200, 120, 24)
VICTIM = name("20240602T180000")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, write_granule: WriteGranule) -> Path:
    """A folder with scans of three days, with NO2, and the store that one process makes of them."""
    folder = tmp_path_factory.mktemp("made")
    for i in (1, 2, 3):
        rng = np.random.default_rng(i)
        values = radiance(i, SHAPE)
        values[rng.random(SHAPE) < 0.05] = -1e30
        path = write_granule(folder / name(f"2024060{i}T180000"), values, fill=-1e30)
        write_level2(folder / "NO2", path, "NO2", rng.normal(3e15, 1e15, SHAPE[:2]))
    run_prepare(folder / "serial", [folder], **settings(folder))
    return folder


def settings(folder: Path) -> dict[str, Any]:
    return {"split": SPLIT_OF_THREE, "l2": {"NO2": {"folder": str(folder / "NO2")}}}


def test_workers_of_a_scheduler_by_address(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when they were started in another folder: paths of the config are relative to where the command was."""
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        monkeypatch.chdir(made)
        relative = {"split": SPLIT_OF_THREE, "l2": {"NO2": {"folder": "NO2"}}}
        store = run_prepare(tmp_path / "store", ["*.nc"], **relative, cluster=cluster.scheduler_address)
        assert len(cluster.workers) == 2  # they are not ours to end
    assert same_content(store.path, made / "serial")


def test_scene_of_a_dead_worker_is_done_by_another(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local workers make the same store, even if one dies over the statistics and one over the writing."""
    monkeypatch.setenv(dying.VICTIM, VICTIM.removesuffix(".nc"))
    monkeypatch.setenv(dying.MARKERS, str(tmp_path))
    for stage in ("measure", "write"):
        monkeypatch.setattr(prepare_module, stage, partial(dying.deadly, stage))
    store = run_prepare(tmp_path / "store", [made], **settings(made), **LOCAL)
    assert (tmp_path / "measure").exists() and (tmp_path / "write").exists()
    assert same_content(store.path, made / "serial")
    assert not (store.path / ".partial").exists()


def test_scene_over_which_every_worker_dies(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "store"
    with monkeypatch.context() as patch, dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        patch.setenv(dying.VICTIM, VICTIM.removesuffix(".nc"))
        patch.setattr(prepare_module, "write", partial(dying.deadly, "write"))
        refused(RunError, out, [made], "n_workers", made=True, path=made / VICTIM, **settings(made), **LOCAL)
    assert json.loads((out / "run.json").read_text())["state"] == "failed"
    assert same_content(run_prepare(out, [made], **settings(made), **LOCAL).path, made / "serial")


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_file_that_fails_stops_it_all(tmp_path: Path, write_granule: WriteGranule) -> None:
    """With workers, too: one line on stderr is all that is seen. It shows only when the radiance is read."""
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for i in (1, 2, 3):
        write_granule(spoilt / name(f"2024060{i}T180000"), radiance(i, (200, 8, 6)), fill=-1e30)
    path = spoilt / VICTIM
    rearrange(path, (50, 8, 6))
    with h5py.File(path) as file:
        chunk = file[f"{BAND}/radiance"].id.get_chunk_info(2)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)
    refused(InputError, tmp_path / "serial", [spoilt], VICTIM, made=True, split=SPLIT_OF_THREE)
    found = subprocess.run(command(tmp_path, spoilt, **LOCAL), capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    (line,) = errors_of(found.stderr)
    assert line.startswith("spectralvae: error: ") and str(spoilt / VICTIM) in line


def test_no_scheduler_and_no_dask(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "CONNECT_SECONDS", 1)
    for address in ("tcp://127.0.0.1:1", "carrier://pigeon"):
        refused(ConfigError, tmp_path / "store", [made], address, made=True, key="cluster", cluster=address)
        shutil.rmtree(tmp_path / "store")
    monkeypatch.setitem(sys.modules, "distributed", None)
    refused(ConfigError, tmp_path / "store", [made], "spectralvae[prepare]", made=True, key="cluster", **LOCAL)
    assert run_prepare(tmp_path / "serial", [made], **settings(made)).hash == Store(made / "serial").hash


# --- as a command ---------------------------------------------------------------------------------


def command(folder: Path, inputs: Path, **more: Any) -> list[str]:
    """The command line of a preparation of ``inputs`` in ``folder``."""
    config = {"output_dir": str(folder / "store"), "inputs": [str(inputs)], "split": SPLIT_OF_THREE, **more}
    (folder / "prepare.yaml").write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "spectralvae", "prepare", str(folder / "prepare.yaml")]


def errors_of(stderr: str) -> list[str]:
    """What stands on stderr, but for the progress bars."""
    return [line for line in stderr.splitlines() if line.strip() and "━" not in line]


def test_a_scheduler_that_dies(tmp_path: Path, made: Path) -> None:
    """One line, and what was done is kept."""
    file = tmp_path / "scheduler.json"
    arguments = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    processes = [subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_scheduler", *arguments],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]  # fmt: skip
    try:
        wait_until(lambda: file.exists() and file.read_text().endswith("}"))
        address = json.loads(file.read_text())["address"]
        client = subprocess.Popen(
            command(tmp_path, made, cluster=address, l2=settings(made)["l2"]),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "2"},
        )  # fmt: skip
        processes.append(client)
        wait_until((tmp_path / "store" / ".partial" / "plan.json").exists)
        time.sleep(3)  # it waits for workers, of which there are none
        processes[0].kill()
        out, err = client.communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert (client.returncode, out) == (1, "")
    (line,) = errors_of(err)
    assert line.startswith("spectralvae: error: cluster") and address in line


def has_ended(group: int) -> bool:
    """No process of a group is left."""
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stopped_with_its_workers_it_goes_on_without(tmp_path: Path, made: Path, number: signal.Signals) -> None:
    """Nothing but exit code and state tell of it, no worker stays behind, and who does the rest may change."""
    more = {"l2": settings(made)["l2"]}
    program = (
        "import dying; from spectralvae import cli; from spectralvae.data import prepare; "
        "prepare.write = dying.write_slowly; cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command(tmp_path, made, **more, **LOCAL)[3:]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, dying.VICTIM: VICTIM.removesuffix(".nc"), dying.MARKERS: str(tmp_path),
             "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    wait_until((tmp_path / "write").exists)
    os.killpg(process.pid, number)  # as Ctrl-C and schedulers do
    out, err = process.communicate(timeout=60)
    code, n_lines = (130, 1) if number == signal.SIGINT else (75, 0)
    assert (process.returncode, out) == (code, ""), err
    assert len(errors_of(err)) == n_lines
    assert json.loads((tmp_path / "store" / "run.json").read_text())["state"] == "stopped"
    wait_until(lambda: has_ended(process.pid))
    if number == signal.SIGUSR1:
        return
    found = subprocess.run(command(tmp_path, made, **more), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert same_content(tmp_path / "store", made / "serial")
    start = json.loads((tmp_path / "store" / "run.json").read_text())["starts"][1]
    assert start["changed"] == {"cluster": ["local", None], "n_workers": [2, None]}
