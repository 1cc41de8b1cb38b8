"""Waiting for what a cluster computes: not without end where it has no workers, and not against an interrupt."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextvars import ContextVar
from typing import Any

from streamgd.data.sources.dask_clients import idle_workers, threads_of_workers, workers_timeout
from streamgd.data.window import Stopped
from streamgd.errors import ClusterError

#: How often to look whether somebody gave up, and whether there are workers.
_POLL_S, _LOOK_S = 0.25, 1.0
#: A wait for workers is told after this.
_SAY_AFTER_S = 2.0

#: Set once nobody wants what is computed any more.
given_up: ContextVar[threading.Event | None] = ContextVar("streamgd_given_up", default=None)


def gathered(client: Any, futures: Any) -> Any:
    """Fetch what futures come to.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    futures : list of Future, or mapping of lists of Future
        As for `Client.gather`, which by itself waits without end.

    Raises
    ------
    ClusterError
        If there are no workers for longer than `workers_timeout`, or the scheduler or the client is gone.
    Stopped
        If `given_up` is set meanwhile.
    Exception
        What a task raised.
    """
    awaited(client, futures)
    from distributed.comm.core import CommClosedError

    try:
        return client.gather(futures)
    except (CancelledError, CommClosedError, TimeoutError) as err:
        # A task may fail so by itself; then the cluster is there still.
        if client.status == "running" and not isinstance(err, CancelledError):
            raise
        if "lost dependencies" in str(err):
            raise ClusterError(
                f"what the cluster was computing is lost ({type(err).__name__}: {err}): it needs what lay on a worker "
                "that is gone and cannot be computed again, as what was scattered. Scatter or persist it anew, and fit "
                "again or resume the run"
            ) from err
        raise ClusterError(
            f"what the cluster was computing is lost ({type(err).__name__}: {err}): the scheduler is gone, the client "
            "was closed, or somebody cancelled it. Start the cluster again, and fit again or resume the run"
        ) from err


def awaited(client: Any, futures: Any) -> None:
    """Wait until futures are done, or have failed; see `gathered`.

    Raises
    ------
    ClusterError
        If there are no workers for longer than `workers_timeout`, or the scheduler is gone.
    Stopped
        If `given_up` is set meanwhile.
    """
    stop, patience = given_up.get(), _Patience(client)
    for future in _listed(futures):
        if future.done():
            continue
        done = threading.Event()
        future.add_done_callback(lambda _, done=done: done.set())
        while not done.wait(_POLL_S) and not future.done():
            if stop is not None and stop.is_set():
                raise Stopped
            patience.look()


def _listed(futures: Any) -> Iterator[Any]:
    groups: Iterable[Any] = futures.values() if isinstance(futures, Mapping) else [futures]
    for group in groups:
        yield from group


class _Patience:
    """How long a cluster has had no workers."""

    def __init__(self, client: Any) -> None:
        self._client, self._timeout_s = client, workers_timeout()
        self._looked, self._since, self._said = time.monotonic(), 0.0, False

    def look(self) -> None:
        """Look whether there are workers, if the last look was a while ago."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        threads = threads_of_workers(self._client)
        idle = {} if not threads else idle_workers(self._client) or {}
        if threads and threads.keys() - idle.keys():
            self._since = 0.0
            return
        self._since = self._since or now
        waited = now - self._since
        if waited >= self._timeout_s:
            lacking = f"all workers were idle ({_why(idle)})" if idle else "no worker"
            raise ClusterError(
                f"{lacking} for {waited:.0f} s: start workers and fit again, or allow a longer wait "
                "(fit(..., workers_timeout_s=...))"
            )
        if waited >= _SAY_AFTER_S and not self._said:
            self._said = True
            end = "" if self._timeout_s == math.inf else f", up to {self._timeout_s:g} s"
            lacking = f"all workers are idle ({_why(idle)})" if idle else "no workers"
            warnings.warn(f"{lacking}: waiting for some{end}", stacklevel=2)


def _why(idle: Mapping[str, str]) -> str:
    return ", ".join(f"{address} is {why}" for address, why in sorted(idle.items())[:4])
