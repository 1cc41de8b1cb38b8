"""What is asked of a cluster, and for how long an answer is awaited.

A worker or a scheduler may stop answering without being gone: it is stopped, swaps, or its network is torn. Dask waits
for it without end; here, whoever asks goes on without the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Sequence
from typing import Any

from streamgd.data.sources.base import Source
from streamgd.data.sources.dask_clients import ANSWER_S
from streamgd.errors import ClusterError
from streamgd.run.workers import WorkerReport, describe

#: Seconds in which a worker imports what it needs, and opens files.
_REPORT_S = 120.0


def reports_of_workers(
    client: Any, source: Source | None, addresses: Sequence[str]
) -> tuple[dict[str, WorkerReport | BaseException], set[str]]:
    """Have workers describe themselves; return what they say, and those that are there and say nothing.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    source : Source or None
        Files to open on trial.
    addresses : sequence of str
        Whom to ask.

    Raises
    ------
    ClusterError
        If the scheduler is gone, or the client closed.
    """
    alive: list[str] = []
    silent: set[str] = set()
    reports: dict[str, WorkerReport | BaseException] = {}
    lost: BaseException | None = None
    try:
        alive, silent = client.sync(_who_answers, client, addresses)
        if alive:
            reports = client.run(describe, source, workers=alive, on_error="return", callback_timeout=_REPORT_S)
    except TimeoutError:  # somebody stopped meanwhile
        return {}, silent | set(alive)
    except Exception as err:  # what a worker raises it returns
        if not isinstance(err, OSError) and client.status == "running":
            raise
        lost = err
    if lost is not None or client.status in ("closing", "closed"):
        why = f" ({type(lost).__name__}: {lost})" if lost is not None else ""
        raise ClusterError(
            f"the workers cannot be asked{why}: the scheduler is gone, or the client was closed. Start the cluster "
            "again, and fit again or resume the run"
        ) from lost
    return dict(reports), silent


def tell_workers(client: Any, function: Any, *arguments: Any) -> None:
    """Run something on all workers that answer; it is for the best, and no error if none does."""
    with contextlib.suppress(Exception):
        client.run(function, *arguments, on_error="ignore", callback_timeout=ANSWER_S)


def tell_workers_soon(client: Any, function: Any, *arguments: Any, held: Any) -> None:
    """Do the same without waiting for it; what it is about is `held` until they are told."""

    def tell(held: Any) -> None:
        tell_workers(client, function, *arguments)

    threading.Thread(target=tell, args=(held,), name="streamgd-tell", daemon=True).start()


async def _who_answers(client: Any, addresses: Sequence[str]) -> tuple[list[str], set[str]]:
    """Tell workers that answer, and those that do not; the rest is gone."""
    asked = {
        address: asyncio.ensure_future(client.run(os.getpid, workers=[address], on_error="ignore", asynchronous=True))
        for address in addresses
    }
    await asyncio.wait(asked.values(), timeout=ANSWER_S)
    alive, silent = [], set()
    for address, answer in asked.items():
        if not answer.done():
            answer.cancel()
            silent.add(address)
        elif answer.exception() is None and address in answer.result():
            alive.append(address)
    return alive, silent
