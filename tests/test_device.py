"""Which device is chosen, and whether a run's memory suffices there."""

import re

import pytest
import torch
from refusals import refused

from spectralvae.errors import ConfigError
from spectralvae.runtime import device
from spectralvae.runtime.console import new_console
from spectralvae.runtime.device import choose_device
from spectralvae.runtime.ranks import Ranks
from spectralvae.training.memory import check_batch_fits, report_first_step

CPU = torch.device("cpu")


@pytest.fixture
def three_gpus(monkeypatch):
    free = [4e9, 30e9, 7e9]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (int(free[i]), int(80e9)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU number {i}")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)


def test_auto_takes_the_gpu_with_most_free_memory_or_the_cpu(three_gpus, monkeypatch, capsys):
    assert choose_device("auto", Ranks(), new_console()) == torch.device("cuda:1")
    printed = capsys.readouterr().out
    assert "GPU number 1" in printed and "30.0 GB" in printed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", Ranks(), new_console()) == CPU


def test_named_device_is_taken_or_refused(three_gpus):
    for name, expected in (("cuda:2", "cuda:2"), ("cuda", "cuda:0"), ("cpu", "cpu")):
        assert choose_device(name, Ranks(), new_console()) == torch.device(expected)
    with refused(ConfigError, "3 CUDA devices", key="training.device", value="cuda:3"):
        choose_device("cuda:3", Ranks(), new_console())


def test_each_process_takes_its_own_gpu(three_gpus, monkeypatch):
    for name in ("auto", "cuda"):
        taken = [choose_device(name, Ranks(rank, 6, rank % 3), new_console()) for rank in range(6)]
        assert taken == [torch.device("cuda", i) for i in (0, 1, 2, 0, 1, 2)]
    assert choose_device("cpu", Ranks(1, 2, 1), new_console()) == CPU
    for name, local_rank, word in (("cuda:1", 0, "4 processes"), ("auto", 3, "number 3"), ("auto", None, "None")):
        with refused(ConfigError, word, key="device"):
            choose_device(name, Ranks(0, 4, local_rank), new_console(), key="device")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a launcher may show each process one GPU
    assert choose_device("auto", Ranks(3, 4, 3), new_console()) == torch.device("cuda:0")


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Puts this process into a job that may still take so many bytes.

    Reading a store fills the cache of the job's cgroup; the kernel gives it up when it is needed.
    """

    def limit(free):
        (tmp_path / "memory.max").write_text(f"{400_000 + free}\n")
        (tmp_path / "memory.current").write_text("2900000\n")
        (tmp_path / "memory.stat").write_text("anon 400000\nactive_file 500000\ninactive_file 2000000\n")
        monkeypatch.setattr(device, "CGROUP", tmp_path)

    return limit


def test_memory_of_this_process_and_its_job(job, tmp_path):
    assert device.peak_memory(CPU) > 1e7
    assert device.available_memory(CPU) > 1e8
    job(2_600_000)
    assert device.available_memory(CPU) == 2_600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert device.available_memory(CPU) > 1e8


@pytest.mark.parametrize(("share", "warned"), [(0.5, False), (0.05, True)])
def test_tight_memory_is_told_after_the_first_step(job, capsys, share, warned):
    peak = device.peak_memory(CPU)
    job(int(share * peak))
    report_first_step(CPU, new_console())
    printed = capsys.readouterr().out
    assert float(re.search(r"([\d.]+) GB", printed)[1]) == pytest.approx(peak / 1e9, abs=0.01)
    assert ("WARNING" in printed) == warned


def test_batch_that_cannot_fit_is_refused(job):
    job(2_000_000)
    check_batch_fits(2, (6, 100, 100), CPU)
    with refused(ConfigError, "at most 2", key="data.batch_size"):
        check_batch_fits(3, (6, 100, 100), CPU)
