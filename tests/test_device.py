"""Which device is taken, and that too little memory is said."""

import pytest
import torch

from spectralvae.errors import ConfigError
from spectralvae.runtime import device
from spectralvae.runtime.console import new_console
from spectralvae.runtime.ranks import Ranks


@pytest.fixture
def three_gpus(monkeypatch):
    free = [4e9, 30e9, 7e9]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (int(free[i]), int(80e9)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU number {i}")


def test_auto_takes_the_gpu_with_most_free_memory(three_gpus, capsys):
    assert device.choose_device("auto", Ranks(), new_console()) == torch.device("cuda:1")
    printed = capsys.readouterr().out
    assert "GPU number 1" in printed
    assert "30.0 GB free" in printed


def test_auto_without_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_device("auto", Ranks(), new_console()) == torch.device("cpu")
    assert "no CUDA device" in capsys.readouterr().out


def test_named_device_is_taken_or_refused(three_gpus):
    assert device.choose_device("cuda:2", Ranks(), new_console()) == torch.device("cuda:2")
    assert device.choose_device("cuda", Ranks(), new_console()) == torch.device("cuda:0")
    assert device.choose_device("cpu", Ranks(), new_console()) == torch.device("cpu")
    with pytest.raises(ConfigError, match="cuda:3 is absent: this machine has 3 CUDA devices"):
        device.choose_device("cuda:3", Ranks(), new_console())


def test_each_process_takes_its_own_gpu(three_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for name in ("auto", "cuda"):
        taken = [device.choose_device(name, Ranks(rank, 6, rank % 3), new_console()) for rank in range(6)]
        assert taken == [torch.device("cuda", i) for i in (0, 1, 2, 0, 1, 2)]
    assert device.choose_device("cpu", Ranks(1, 2, 1), new_console()) == torch.device("cpu")
    for name, local_rank, words in (("cuda:1", 0, "cannot be shared"), ("auto", 3, "number 3"), ("auto", None, "None")):
        with pytest.raises(ConfigError, match=words):
            device.choose_device(name, Ranks(0, 4, local_rank), new_console())


def test_a_launcher_may_show_each_process_one_gpu(three_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.choose_device("auto", Ranks(3, 4, 3), new_console()) == torch.device("cuda:0")


@pytest.mark.parametrize(("free", "warned"), [(50e9, False), (1e9, True)])
def test_tight_memory_is_said_after_the_first_step(monkeypatch, capsys, free, warned):
    monkeypatch.setattr(device, "peak_memory", lambda _: int(20e9))
    monkeypatch.setattr(device, "available_memory", lambda _: int(free))
    device.report_first_step(torch.device("cpu"), new_console())
    printed = capsys.readouterr().out
    assert "peak memory 20.00 GB" in printed
    assert ("WARNING" in printed) == warned


def test_memory_of_a_job_counts_file_cache_as_free(monkeypatch, tmp_path):
    """Reading a store fills the cache of the job's cgroup; the kernel gives it up when it is needed."""
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2900000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\nactive_file 500000\ninactive_file 2000000\n")
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    assert device.available_memory(torch.device("cpu")) == 2_600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert device.available_memory(torch.device("cpu")) > 1e8


def test_batch_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(device, "available_memory", lambda _: 2_000_000)
    device.check_batch_fits(2, (6, 100, 100), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"data\.batch_size: 3 tiles .* at most 2 fit"):
        device.check_batch_fits(3, (6, 100, 100), torch.device("cpu"))


def test_memory_of_this_process():
    cpu = torch.device("cpu")
    assert device.peak_memory(cpu) > 1e7
    assert device.available_memory(cpu) > 0
