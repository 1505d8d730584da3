"""The processes that train one network together: how they find each other, and what they tell each other.

torchrun and SLURM's srun start one process a GPU, each with the same command and config; ranks come from the launcher's
environment variables. torch's DistributedDataParallel averages the gradients. This module does the rest: the processes
decide together when to stop, and a process that is lost or does not answer in time ends the others.
"""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from traceback import clear_frames
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectralvae.errors import ConfigError, LostPeerError, PeerError
from spectralvae.runtime.signals import Stopped

T = TypeVar("T")
SLURM_PORTS = range(20_000, 30_000)  # of a job's first node; which one, its number tells
_LAUNCHERS = "start with torchrun or srun"


class Ranks:
    """The processes of a run, seen from one of them. Alone, as most runs are, it does nothing.

    Args:
        rank: which process this is, from 0.
        world_size: how many there are.
        local_rank: which of those on its machine; None where nothing tells.
        local_world_size: how many are on its machine; None where nothing tells: torchrun alone does.

    Attributes:
        is_main: whether this is the main process, which writes.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, local_rank: int | None = None, local_world_size: int | None = None
    ) -> None:
        assert 0 <= rank < world_size
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.is_main = rank == 0
        self._timeout = 0.0

    # --- finding each other ---------------------------------------------------------------------

    @contextmanager
    def joined(self, timeout: float) -> Iterator[None]:
        """Meet the others, and part when the block ends well.

        Args:
            timeout: seconds after which a silent process is taken for dead.

        Raises:
            LostPeerError: not all have come in time.
        """
        if self.world_size == 1:
            yield
            return
        import torch
        import torch.distributed.nn  # imported later, its functions' defaults would hold on to the group for ever
        from torch import distributed

        self._timeout = timeout
        # numbers go by gloo, whose errors can be caught, gradients on GPUs by NCCL
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with self.listening():
            distributed.init_process_group(
                backend, rank=self.rank, world_size=self.world_size, timeout=timedelta(seconds=timeout)
            )
        try:
            yield
        except Stopped as stopped:  # by all together
            clear_frames(stopped.__traceback__)
            _part()
            raise
        _part()

    # --- talking --------------------------------------------------------------------------------

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around whatever waits for others: name the reason if they don't answer.

        Raises:
            LostPeerError: one is gone, or has not answered in time.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not _is_lost_peer(error):
                raise
            raise LostPeerError(
                f"process {self.rank} of {self.world_size}: another process is gone, or has not answered for "
                f"{self._timeout:g} s (training.peer_timeout)",
                remedy="its own output may tell why; start the run again",
            ) from error

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over all processes, elementwise."""
        if self.world_size == 1:
            return values
        import torch
        from torch import distributed

        total = torch.from_numpy(np.array(values, np.float64))
        with self.listening():
            distributed.all_reduce(total)
        return np.asarray(total.numpy())

    def add(self, named: Mapping[str, ArrayLike]) -> dict[str, NDArray[np.float64]]:
        """The sums over all processes by name, in one reduction; each process gives the same names and shapes."""
        arrays = {name: np.asarray(values, np.float64) for name, values in named.items()}
        total = self.sum(np.concatenate([array.ravel() for array in arrays.values()]))
        parts = np.split(total, np.cumsum([array.size for array in arrays.values()])[:-1])
        return {name: part.reshape(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}

    def gather(self, value: T) -> list[T]:
        """What each process gives, by rank."""
        if self.world_size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world_size
        with self.listening():
            distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """What the main process gives, for all."""
        return self.gather(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """All leave the block in the same way: an error in one is told to the others, and raised in all.

        Nothing may wait for the others inside, but another such block.

        Raises:
            PeerError: in those that had none themselves.
        """
        if self.world_size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}")
            raise
        failures = self._tell(None)
        if failures:
            raise PeerError("; ".join(failures))

    def _tell(self, failure: str | None) -> list[str]:
        if not self.sum(np.array([float(failure is not None)]))[0]:
            return []
        return [f"process {rank}: {text}" for rank, text in enumerate(self.gather(failure)) if text is not None]

    def on_main(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T | None:
        """Call a function in the main process only; an error there is raised everywhere."""
        with self.together():
            return function(*arguments, **options) if self.is_main else None


def _part() -> None:
    """Leave the group, and end its threads.

    Nothing else may hold the group by then: one of its threads that still has to release a tensor when Python ends
    aborts the process; and who releases the group last, other than here, waits for its threads while holding Python's
    lock, which these may want.
    """
    from torch import distributed

    gc.collect()  # DistributedDataParallel, whose reducer holds the group, is part of a cycle
    distributed.destroy_process_group()


def _is_lost_peer(error: RuntimeError) -> bool:
    """gloo's errors are plain RuntimeErrors that name its source file."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Who this process is: as torchrun or srun say, else alone.

    For srun, the address of the first node is put into ``os.environ`` where the script has not named one
    (MASTER_ADDR, MASTER_PORT), as torchrun does.

    Raises:
        ConfigError: the launcher's variables are incomplete or no numbers.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        ranks = _ranks_of(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if ranks.world_size > 1 and missing:
            raise ConfigError(f"is set, but not {' or '.join(missing)}", key="$RANK", remedy=_LAUNCHERS)
        return ranks
    # srun sets SLURM_STEP_NUM_TASKS. A batch script's own shell has SLURM_NTASKS and SLURM_PROCID = 0 as well, and a
    # command started there without srun is alone.
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    if "SLURM_PROCID" not in environment or count not in environment:
        return Ranks()
    if count == "SLURM_NTASKS" and "MASTER_ADDR" not in environment:
        return Ranks()
    ranks = _ranks_of(environment, "SLURM_PROCID", count, "SLURM_LOCALID")
    if ranks.world_size > 1 and "MASTER_ADDR" not in environment:
        os.environ["MASTER_ADDR"] = _first_node(environment)
    if ranks.world_size > 1 and "MASTER_PORT" not in environment:
        os.environ["MASTER_PORT"] = str(SLURM_PORTS[int(environment.get("SLURM_JOB_ID", "0")) % len(SLURM_PORTS)])
    return ranks


def _ranks_of(environment: Mapping[str, str], *names: str) -> Ranks:
    values: list[int | None] = []
    for name in names:
        text = environment.get(name)
        if text is not None and not text.isdigit():
            raise ConfigError(key=f"${name}", value=text, limit="a whole number", remedy=_LAUNCHERS)
        values.append(None if text is None else int(text))
    rank, world_size, *local = values
    assert rank is not None and world_size is not None, "the caller has looked"
    if rank >= world_size:
        raise ConfigError(key=f"${names[0]}", value=rank, limit=f"less than ${names[1]} ({world_size})")
    return Ranks(rank, world_size, *local)


def _first_node(environment: Mapping[str, str]) -> str:
    """The first of the job step's nodes; scontrol expands lists such as node[3-5,9]."""
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST"))
    if nodes is None:
        raise ConfigError("is missing", key="$SLURM_STEP_NODELIST", remedy="start with srun, or set MASTER_ADDR")
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"scontrol cannot expand it ({error})",
            key="$SLURM_STEP_NODELIST",
            value=nodes,
            remedy="set MASTER_ADDR to the first node",
        ) from error
    return found.stdout.split()[0]
