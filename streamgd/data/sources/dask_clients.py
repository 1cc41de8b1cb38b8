"""Which `distributed.Client` computes: the one that was chosen, the process's default, or none; and its workers."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from streamgd.errors import ClusterError

#: Seconds in which whoever is alive says so.
ANSWER_S = 5.0
#: Seconds without a heartbeat, of which a thousand workers send one each every 6 s, until one is taken for silent.
SILENT_S = 60.0
#: The last heartbeat that the scheduler of a client has had, and since when none came after it.
_heard: weakref.WeakKeyDictionary[Any, tuple[float, float]] = weakref.WeakKeyDictionary()

_chosen: ContextVar[Any] = ContextVar("streamgd_client", default=None)
_timeout_s: ContextVar[float] = ContextVar("streamgd_workers_timeout", default=math.inf)


def within_task() -> bool:
    """Whether this thread runs a task of a cluster; never imports `distributed`."""
    get_worker = getattr(sys.modules.get("distributed"), "get_worker", None)  # which may be being imported
    if get_worker is None:
        return False
    try:
        get_worker()
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def computing_on(client: Any, workers_timeout_s: float) -> Iterator[None]:
    """Have this thread compute on a client meanwhile, which need not be the process's default; and wait so long.

    `Client.as_current` changes Dask's configuration for all threads, and those that end in another order than they
    began leave it changed.

    Parameters
    ----------
    client : distributed.Client or None
        The client; None leaves it to be the default.
    workers_timeout_s : float
        How long to wait while its cluster has no workers. By default there is no end to it.
    """
    token = _chosen.set(_chosen.get() if client is None else client)
    timeout = _timeout_s.set(workers_timeout_s)
    try:
        yield
    finally:
        _chosen.reset(token)
        _timeout_s.reset(timeout)


def workers_timeout() -> float:
    """Return the seconds to wait while a cluster has no workers."""
    return _timeout_s.get()


def chosen_client() -> Any | None:
    """Return the client that was chosen with `computing_on`, if any."""
    return _chosen.get()


def active_client() -> Any | None:
    """Return the `distributed.Client` that computes for this thread, or None; never imports `distributed`.

    That is the one that was chosen, or else the process's default. Within a task of a cluster there is no default: a
    task that waits for others can wait forever.
    """
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    default_client = getattr(sys.modules.get("distributed"), "default_client", None)
    if default_client is None or within_task():
        return None
    try:
        client = default_client()
    except ValueError:
        return None
    return client if client.status == "running" and not client.asynchronous else None


def threads_of_workers(client: Any) -> dict[str, int] | None:
    """Ask the scheduler for its workers, and the threads of each; None if it does not answer.

    Raises
    ------
    ClusterError
        If it is gone.
    """
    try:
        return dict(client.nthreads(callback_timeout=ANSWER_S))
    except TimeoutError:
        return None
    except Exception as err:
        raise ClusterError(
            f"the scheduler does not answer ({type(err).__name__}: {err}): start the cluster again, and fit again or "
            "resume the run"
        ) from err


def idle_workers(client: Any) -> dict[str, str] | None:
    """Ask the scheduler for workers that begin no tasks, and why; None if it does not answer.

    Those are paused for lack of memory, or have been silent for `SILENT_S`; where all of them are, since this was asked
    for the first time after they fell silent.
    """
    try:
        workers = client.sync(client.scheduler.identity, callback_timeout=ANSWER_S)["workers"]
    except Exception:  # whoever asks for the workers finds out what that means
        return None
    latest, now = max((worker.get("last_seen", 0.0) for worker in workers.values()), default=0.0), time.monotonic()
    heard, since = _heard.get(client, (0.0, now))
    if latest > heard:
        since = now
    _heard[client] = latest, since
    latest += now - since
    found = {}
    for address, worker in workers.items():
        if worker.get("status") == "paused":
            found[address] = "paused by Dask, for lack of memory"
        elif worker.get("last_seen", latest) < latest - SILENT_S:
            found[address] = f"silent for {latest - worker['last_seen']:.0f} s"
    return found
