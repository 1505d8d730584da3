"""Who works on the scenes: this process, processes on this machine, or those of a Dask cluster."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from spectralvae.data.splits import PlannedScene
from spectralvae.errors import ConfigError, RunError

Work = Callable[[PlannedScene, Callable[[int], None]], None]
Runner = Callable[[Work, Sequence[PlannedScene], Callable[[int], None]], None]

CONNECT_SECONDS = 30


@contextmanager
def workers(cluster: str | None, n_workers: int | None) -> Iterator[Runner]:
    """Give a function that does some work on each of some scenes.

    It calls ``work(scene, advance)`` for each scene, and ``advance`` with the number of pixels that are done. The
    first error ends it, and no work on other scenes is begun; on a cluster, scenes of a worker that died are given to
    another one.

    Args:
        cluster: None for this process, "local", or the address of a Dask scheduler.
        n_workers: of a local cluster; None for one a core.

    Raises:
        ConfigError: Dask is not installed, or there is no scheduler at the address.
        RunError: workers died again and again over one scene, or the scheduler did.
    """
    if cluster is None:

        def run_here(work: Work, scenes: Sequence[PlannedScene], advance: Callable[[int], None]) -> None:
            for p in scenes:
                work(p, advance)

        yield run_here
        return
    try:
        import distributed
    except ImportError as error:
        remedy = 'pip install "spectralvae[prepare]"'
        raise ConfigError("Dask is not installed", key="cluster", value=cluster, remedy=remedy) from error
    for name in ("distributed", "distributed.client"):  # whoever gets an error reports it, once
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with _client(distributed, cluster, n_workers) as client:

        def run(work: Work, scenes: Sequence[PlannedScene], advance: Callable[[int], None]) -> None:
            futures = {client.submit(_work_there, work, p, pure=False): p for p in scenes}
            try:
                for future in distributed.as_completed(futures):  # type: ignore[no-untyped-call]
                    p = futures[future]
                    try:
                        future.result()
                    except distributed.KilledWorker as error:
                        raise RunError(
                            "every worker that was given this scene died (out of memory?)",
                            path=p.scene.path,
                            remedy="give each more memory, which n_workers divides, or do without cluster",
                        ) from error
                    except distributed.client.FutureCancelledError as error:
                        remedy = "start again: what is done is kept"
                        problem = "the Dask scheduler was lost"
                        raise RunError(problem, key="cluster", value=cluster, remedy=remedy) from error
                    advance(p.scene.shape[0] * p.scene.shape[1])
            finally:
                client.cancel(list(futures))

        yield run


def _work_there(work: Work, p: PlannedScene) -> None:
    work(p, lambda n_pixels: None)


@contextmanager
def _client(distributed: Any, cluster: str, n_workers: int | None) -> Iterator[Any]:
    if cluster != "local":
        try:
            client = distributed.Client(cluster, timeout=CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no Dask scheduler answers there ({error})", key="cluster", value=cluster) from error
        with client:
            yield client
        return
    # Signals that ask to stop are meant for this process, which then ends its workers: they inherit that these are
    # ignored.
    signals = (signal.SIGINT, signal.SIGUSR1)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        local = distributed.LocalCluster(
            n_workers=n_workers, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL
        )
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    with local, distributed.Client(local) as client:
        yield client
