"""Preparation by worker processes: the same store, bit for bit, and one line for whatever goes wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import distributed
import dying
import numpy as np
import pytest
import yaml
from preparing import SPLIT_OF_THREE, WriteGranule, name, radiance, refused, run_prepare, same_content, write_level2

from spectralvae.data import prepare as prepare_module
from spectralvae.data import workers as workers_module
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError, InputError, RunError

LOCAL: dict[str, Any] = {"cluster": "local", "n_workers": 2}
SHAPE = (200, 120, 24)  # in blocks of two


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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# --- the same store -------------------------------------------------------------------------------


def test_local_workers_make_the_same_store(tmp_path: Path, made: Path) -> None:
    store = run_prepare(tmp_path / "store", [made], **settings(made), **LOCAL)
    assert same_content(store.path, made / "serial")
    assert not (store.path / ".partial").exists()


def test_workers_of_a_scheduler_by_address(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when they were started in another folder: paths of the config are relative to where the command was."""
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        monkeypatch.chdir(made)
        relative = {"split": SPLIT_OF_THREE, "l2": {"NO2": {"folder": "NO2"}}}
        store = run_prepare(tmp_path / "store", ["*.nc"], **relative, cluster=cluster.scheduler_address)
        again = run_prepare(tmp_path / "again", ["*.nc"], **relative, cluster=cluster.scheduler_address)
        assert len(cluster.workers) == 2  # they are not ours to end
    assert same_content(store.path, made / "serial")
    assert same_content(again.path, made / "serial")


# --- workers that die -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["measure", "write"])
def test_scene_of_a_dead_worker_is_done_by_another(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    marker = tmp_path / "died"
    monkeypatch.setenv(dying.VICTIM, name("20240602T180000").removesuffix(".nc"))
    monkeypatch.setenv(dying.MARKER, str(marker))
    monkeypatch.setattr(prepare_module, stage, getattr(dying, stage))
    store = run_prepare(tmp_path / "store", [made], **settings(made), **LOCAL)
    assert marker.exists()
    assert same_content(store.path, made / "serial")


def test_scene_over_which_every_worker_dies(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = made / name("20240602T180000")
    out = tmp_path / "store"
    with monkeypatch.context() as patch, dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        patch.setenv(dying.VICTIM, victim.stem)
        patch.setattr(prepare_module, "write", dying.write)
        refused(RunError, out, [made], str(victim), "every worker", "died", made=True, **settings(made), **LOCAL)
    assert json.loads((out / "run.json").read_text())["state"] == "failed"
    store = run_prepare(out, [made], **settings(made), **LOCAL)
    assert same_content(store.path, made / "serial")


# --- what goes wrong ------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    """Make the radiance unreadable, which shows only when it is read."""
    import h5py

    with h5py.File(path, "r+") as file:
        group = file["band_290_490_nm"]
        old = group["radiance"]
        values, scales = old[...], [old.dims[i][0] for i in range(3)]
        attributes = {key: old.attrs[key] for key in ("_FillValue", "units")}
        del group["radiance"]
        new = group.create_dataset("radiance", data=values, chunks=(50, *values.shape[1:]), compression="gzip")
        new.attrs.update(attributes)
        for i, scale in enumerate(scales):
            new.dims[i].attach_scale(scale)
        chunk = new.id.get_chunk_info(2)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)


@pytest.fixture
def spoilt(tmp_path: Path, write_granule: WriteGranule) -> Path:
    """A folder in which the second of three scans is damaged."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for i in (1, 2, 3):
        write_granule(folder / name(f"2024060{i}T180000"), radiance(i, (200, 8, 6)), fill=-1e30)
    spoil(folder / name("20240602T180000"))
    return folder


@pytest.mark.parametrize("cluster", [{}, LOCAL])
def test_a_file_that_fails_stops_it_all(tmp_path: Path, spoilt: Path, cluster: dict[str, Any]) -> None:
    words = (str(spoilt / name("20240602T180000")), "damaged")
    refused(InputError, tmp_path / "store", [spoilt], *words, made=True, split=SPLIT_OF_THREE, **cluster)


def test_no_scheduler_at_the_address(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "CONNECT_SECONDS", 1)
    address = f"tcp://127.0.0.1:{free_port()}"
    words = ("cluster: no Dask scheduler answers", address)
    refused(ConfigError, tmp_path / "a", [made], *words, made=True, cluster=address, **settings(made))
    refused(ConfigError, tmp_path / "b", [made], "carrier://pigeon", made=True, cluster="carrier://pigeon")


def test_without_dask(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = ("cluster: local needs Dask", 'pip install "spectralvae[prepare]"')
    refused(ConfigError, tmp_path / "store", [made], *words, made=True, **LOCAL, **settings(made))
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


def test_the_error_is_all_that_is_seen(tmp_path: Path, spoilt: Path) -> None:
    found = subprocess.run(command(tmp_path, spoilt, **LOCAL), capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stdout == ""
    (line,) = errors_of(found.stderr)
    assert line.startswith("spectralvae: error: ") and name("20240602T180000") in line


def test_a_scheduler_that_dies(tmp_path: Path, made: Path) -> None:
    """One line, and what was done is kept."""
    address = f"tcp://127.0.0.1:{free_port()}"
    run_quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", address.split(":")[-1], "--no-dashboard"],
        **run_quietly,
    )
    client = subprocess.Popen(
        command(tmp_path, made, cluster=address, l2=settings(made)["l2"]),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "2"},
    )  # fmt: skip
    try:
        wait_until((tmp_path / "store" / ".partial" / "plan.json").exists)
        time.sleep(3)  # it waits for workers, of which there are none
        scheduler.kill()
        out, err = client.communicate(timeout=60)
    finally:
        for process in (scheduler, client):
            process.kill()
            process.wait()
    assert client.returncode == 1
    assert out == ""
    (line,) = errors_of(err)
    assert line.startswith(f"spectralvae: error: cluster: the Dask scheduler at {address} was lost")


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("not in a minute")


def has_ended(group: int) -> bool:
    """No process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stopped_with_its_workers_it_goes_on_without(tmp_path: Path, made: Path, number: signal.Signals) -> None:
    """Nothing but exit code and state tell of it, no worker stays behind, and who does the rest may change."""
    more = {"l2": settings(made)["l2"]}
    victim, marker = name("20240602T180000").removesuffix(".nc"), tmp_path / "begun"
    program = (
        "import dying; from spectralvae import cli; from spectralvae.data import prepare; "
        "prepare.write = dying.write_slowly; cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command(tmp_path, made, **more, **LOCAL)[3:]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, dying.VICTIM: victim, dying.MARKER: str(marker), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    wait_until(marker.exists)
    os.killpg(process.pid, number)  # as Ctrl-C and schedulers do
    out, err = process.communicate(timeout=60)
    code, lines = (130, ["spectralvae: error: interrupted"]) if number == signal.SIGINT else (75, [])
    assert process.returncode == code, err
    assert out == ""
    assert [line.split(";")[0] for line in errors_of(err)] == lines
    assert json.loads((tmp_path / "store" / "run.json").read_text())["state"] == "stopped"
    wait_until(lambda: has_ended(process.pid))
    found = subprocess.run(command(tmp_path, made, **more), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert same_content(tmp_path / "store", made / "serial")
    starts = json.loads((tmp_path / "store" / "run.json").read_text())["starts"]
    assert starts[1]["changed"] == {"cluster": ["local", None], "n_workers": [2, None]}
