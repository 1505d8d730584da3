"""Which device is chosen, and whether a run's memory suffices there."""

import re
import sys
from types import SimpleNamespace

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
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (int(free[i]), int(80e9)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU number {i}")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)


class NVML:
    """Stands in for pynvml: by UUID whether a card is exclusive, how many processes it has, and its free bytes."""

    NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 3

    class NVMLError(Exception):
        pass

    def __init__(self, cards):
        self.cards = cards

    def nvmlInit(self):
        if self.cards is None:
            raise self.NVMLError

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self.cards[uuid]

    def nvmlDeviceGetComputeMode(self, card):
        return 3 if card[0] else 0

    def nvmlDeviceGetComputeRunningProcesses(self, card):
        return ["process"] * card[1]

    def nvmlDeviceGetMemoryInfo(self, card):
        return SimpleNamespace(free=card[2])


def test_auto_asks_nvml_by_uuid_and_leaves_the_devices_alone(three_gpus, monkeypatch, capsys):
    """NVML may count cards that CUDA does not show; the freest is in exclusive use."""
    cards = {"GPU-a": (True, 1, int(60e9)), "GPU-b": (True, 0, int(5e9)), "GPU-c": (False, 2, int(9e9))}
    monkeypatch.setitem(sys.modules, "pynvml", NVML({"GPU-hidden": (False, 0, int(80e9)), **cards}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="abc"[i]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: pytest.fail("CUDA was asked"))
    assert choose_device("auto", Ranks(), new_console()) == torch.device("cuda:2")
    assert "9.0 GB" in capsys.readouterr().out


def test_auto_without_nvml_passes_over_devices_in_exclusive_use(three_gpus, monkeypatch):
    def mem_get_info(i):
        if i in busy:
            raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
        return int(4e9) * (3 - i), int(80e9)

    monkeypatch.setitem(sys.modules, "pynvml", NVML(None))  # the package without its library
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    busy = {0, 2}
    assert choose_device("auto", Ranks(), new_console()) == torch.device("cuda:1")
    busy = {0, 1, 2}
    with refused(ConfigError, "exclusive", key="training.device", value="auto"):
        choose_device("auto", Ranks(), new_console())


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
    for name, local_rank, words in (("cuda:1", 0, ["4"]), ("auto", 3, ["4", "3"]), ("auto", None, ["torchrun"])):
        with refused(ConfigError, *words, key="device"):
            choose_device(name, Ranks(0, 4, local_rank), new_console(), key="device")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun may show each process one GPU
    assert choose_device("auto", Ranks(3, 4, 3), new_console()) == torch.device("cuda:0")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused_in_each(three_gpus, monkeypatch, n, name):
    """torchrun shows all GPUs to every process: two would share one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    for local_rank in range(4):
        with refused(ConfigError, "4 processes", f"{n} visible", key="training.device", value=name):
            choose_device(name, Ranks(4 + local_rank, 8, local_rank, 4), new_console())
    assert choose_device(name, Ranks(n, 2 * n, 0, n), new_console()) == torch.device("cuda:0")
    assert choose_device("cpu", Ranks(4, 8, 0, 4), new_console()) == CPU


def write_kernel_files(root, groups, mounts, files):
    """What the kernel says of this process: /proc/self/cgroup, its mounts, and files by path, of 30 GB of memory."""
    texts = {
        "proc/meminfo": "MemTotal:       40000000 kB\nMemAvailable:   30000000 kB\n",
        "proc/self/cgroup": "".join(f"{group}\n" for group in groups),
        "proc/self/mountinfo": "22 1 0:20 / /proc rw,nosuid - proc proc rw\n" + "".join(f"{m}\n" for m in mounts),
    }
    for path, text in {**texts, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def group_v2(folder, limit, used, cached=0):
    stat = f"anon {used - cached}\nactive_file {cached // 2}\ninactive_file {cached - cached // 2}\n"
    return {f"{folder}/memory.{name}": text for name, text in
            (("max", f"{limit}\n"), ("current", f"{used}\n"), ("stat", stat))}  # fmt: skip


def group_v1(folder, limit, used, cached=0, hierarchical=None):
    """The counts without total_ are of the group alone, without those below it."""
    totals = f"total_active_file {cached // 2}\ntotal_inactive_file {cached - cached // 2}\n"
    stat = f"active_file 1\ninactive_file 1\nhierarchical_memory_limit {hierarchical or limit}\n{totals}"
    return {f"{folder}/memory.{name}": text for name, text in
            (("limit_in_bytes", f"{limit}\n"), ("usage_in_bytes", f"{used}\n"), ("stat", stat))}  # fmt: skip


V2 = "31 22 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
UNIFIED = "32 31 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
V1 = "33 31 0:29 {} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory"
CPU_V1 = "34 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"
NO_LIMIT = 9223372036854771712
V2_ROOT, V1_ROOT = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        ([], [], {}, 30_720_000_000),
        # version 2, as SLURM sets it: the job is limited, the step and the task in it are not
        (
            ["0::/system.slice/slurmstepd.scope/job_7/step_0/task_0"],
            [V2],
            group_v2(f"{V2_ROOT}/system.slice/slurmstepd.scope/job_7/step_0/task_0", "max", 900)
            | group_v2(f"{V2_ROOT}/system.slice/slurmstepd.scope/job_7", 8_000_000, 3_000_000, 2_000_000)
            | group_v2(f"{V2_ROOT}/system.slice", "max", 9_000_000)
            | group_v2(f"{V2_ROOT}/other", 5, 5),
            7_000_000,
        ),
        # version 2 in a container, whose own group is the root that it sees; the tightest of several limits counts
        (["0::/"], [V2], group_v2(V2_ROOT, 6_000_000, 1_000_000), 5_000_000),
        (
            ["0::/a/b"],
            [V2],
            group_v2(f"{V2_ROOT}/a", 6_000_000, 4_000_000) | group_v2(f"{V2_ROOT}/a/b", 5_000_000, 1_000_000),
            2_000_000,
        ),
        # version 1, as SLURM sets it, beside a version 2 without memory
        (
            ["5:cpu,cpuacct:/elsewhere", "4:memory:/slurm/uid_1/job_7/step_0", "0::/user.slice"],
            [UNIFIED, CPU_V1, V1.format("/")],
            group_v1(V1_ROOT, NO_LIMIT, 20_000_000)
            | group_v1(f"{V1_ROOT}/slurm/uid_1/job_7", 8_000_000, 3_000_000, 2_000_000)
            | group_v1(f"{V1_ROOT}/slurm/uid_1/job_7/step_0", NO_LIMIT, 2_500_000, 2_000_000, 8_000_000),
            7_000_000,
        ),
        # version 1 in a container: its group as the host calls it, of which nothing but the group itself is mounted
        (
            ["4:memory:/docker/0123"],
            [V1.format("/docker/0123")],
            group_v1(V1_ROOT, NO_LIMIT, 1_000_000, hierarchical=9_000_000),
            8_000_000,
        ),
        (["4:memory:/"], [V1.format("/")], group_v1(V1_ROOT, NO_LIMIT, 20_000_000), 30_720_000_000),
    ],
)
def test_memory_limits_are_those_of_the_groups_of_this_process(monkeypatch, tmp_path, groups, mounts, files, expected):
    write_kernel_files(tmp_path, groups, mounts, files)
    monkeypatch.setattr(device, "ROOT", tmp_path)
    assert device.available_memory(CPU) == expected


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Puts this process into a job that may still take so many bytes.

    Reading a store fills the cache of the job's cgroup; the kernel gives it up when it is needed.
    """

    def limit(free):
        files = group_v2(f"{V2_ROOT}/job", 400_000 + free, 2_900_000, 2_500_000)
        write_kernel_files(tmp_path, ["0::/job"], [V2], files)
        monkeypatch.setattr(device, "ROOT", tmp_path)

    return limit


def test_memory_of_this_process():
    assert device.peak_memory(CPU) > 1e7
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
