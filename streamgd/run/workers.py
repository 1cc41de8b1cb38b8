"""What a cluster's workers are and can do, found before they are given work.

`describe` runs on every worker, and `unfit` says what is wrong with one; see `streamgd.run.worker_memory` for what it
must have room for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgd.data.layout import format_bytes
from streamgd.data.sources.base import Source
from streamgd.run.versions import differing_versions, versions
from streamgd.run.worker_memory import PROCESS_BYTES, WorkerMemory

#: Blocks that each worker opens on trial.
_TRIALS = 8


@dataclass(frozen=True)
class WorkerReport:
    """What a worker says of itself.

    Attributes
    ----------
    versions : dict of str to str
        As in checkpoints.
    n_threads : int
        Tasks at once.
    memory_limit : int
        Bytes that it may take, see `usable_memory`; 0 for no limit.
    unreadable : str or None
        Why it cannot read the data.
    used_bytes : int
        What its process takes now.
    free_bytes : int
        What its machine has left.
    """

    versions: dict[str, Any]
    n_threads: int
    memory_limit: int
    unreadable: str | None
    used_bytes: int = 0
    free_bytes: int = 0


@dataclass(frozen=True)
class Reports:
    """What workers said of themselves.

    Attributes
    ----------
    by_address : mapping of str to WorkerReport
        Of each that can take part.
    at : float
        When, by `time.monotonic`.
    """

    by_address: Mapping[str, WorkerReport]
    at: float


def describe(source: Source | None, dask_worker: Any = None) -> WorkerReport:
    """Describe the worker that this runs on.

    Parameters
    ----------
    source : Source or None
        Files to open on trial.
    dask_worker : distributed.Worker
        Given by Dask.
    """
    import psutil  # which Dask needs

    unreadable = None
    if source is not None:
        try:
            blocks = np.unique(np.linspace(0, source.n_blocks - 1, _TRIALS).astype(int)).tolist()
            source.check_unchanged(blocks)
            for block in blocks:
                with source.open_block(block, piece_rows=1) as reader:
                    reader.read(1)
            source.close()
        except Exception as err:
            unreadable = f"{type(err).__name__}: {err}"
    return WorkerReport(
        versions(),
        int(dask_worker.state.nthreads),
        usable_memory(dask_worker),
        unreadable,
        psutil.Process().memory_info().rss,
        psutil.virtual_memory().available,
    )


def usable_memory(worker: Any) -> int:
    """Return the bytes that a worker may take before Dask moves what it holds to disk, or pauses it; 0 for no limit.

    Moving takes as much memory again, so that a worker that begins with it may be ended by its nanny.
    """
    manager = worker.memory_manager
    limit = manager.memory_limit or 0
    of_process = min(manager.memory_pause_fraction or 1, manager.memory_spill_fraction or 1)
    # What Dask counts by itself is what tasks left, which is never more than all but the process.
    of_tasks = limit * manager.memory_target_fraction + PROCESS_BYTES if manager.memory_target_fraction else limit
    return int(min(limit * of_process, of_tasks))


def unfit(address: str, report: WorkerReport | BaseException, memory: WorkerMemory) -> str | None:
    """Say why a worker cannot take part in a run; None if it can.

    Parameters
    ----------
    address : str
        The worker.
    report : WorkerReport or exception
        What `describe` gave there, or raised.
    memory : WorkerMemory
        What the run takes.
    """
    if isinstance(report, BaseException):
        return (
            f"worker {address} cannot run streamgd ({type(report).__name__}: {report}): install the same streamgd in "
            "the environment of the workers"
        )
    differing = differing_versions(report.versions, versions())
    if differing is not None:
        return (
            f"worker {address} has other versions, so that results could differ: {differing}. Install the same on all "
            "workers and the client"
        )
    if report.unreadable is not None:
        return (
            f"worker {address} cannot read the data: {report.unreadable}. Workers open files themselves: put the same "
            "ones where every worker sees them under the same path"
        )
    n = min(report.n_threads, memory.n_lanes)  # lanes at once
    needed = memory.needed(n, n)
    if report.memory_limit and needed > report.memory_limit:
        return (
            f"worker {address} may take {format_bytes(report.memory_limit)} before it reaches the part of its memory "
            f"limit where Dask moves data to disk or pauses it; with {report.n_threads} thread(s) it would need "
            f"{format_bytes(needed)}: {memory.explained(n, n)}. Give it more memory or fewer threads, or choose a "
            "smaller buffer"
        )
    return None


def assign(n_lanes: int, threads: Mapping[str, int], before: Mapping[int, str]) -> dict[int, str]:
    """Give each lane a worker, as evenly as threads go, and leave lanes where they were as far as that allows.

    Lanes that move go to workers in order, so that each has neighbours, which hand on one sum: see
    `streamgd.learn.merge`.

    Parameters
    ----------
    n_lanes : int
        Lanes.
    threads : mapping of str to int
        Threads of each worker; not empty.
    before : mapping of int to str
        Where lanes were.
    """
    total = sum(threads.values())
    held = Counter(before.values())
    room = {address: n_lanes * n // total for address, n in sorted(threads.items())}
    # What is left over goes first to those that had more than their share anyway.
    fractions = {address: n_lanes * n % total for address, n in threads.items()}
    takers = sorted(room, key=lambda each: (held[each] <= room[each], -fractions[each], each))
    for address in takers[: n_lanes - sum(room.values())]:
        room[address] += 1
    found: dict[int, str] = {}
    for lane, address in sorted(before.items()):
        if room.get(address, 0) > 0 and lane < n_lanes:
            found[lane] = address
            room[address] -= 1
    free = (address for address, n in room.items() for _ in range(n))
    return found | {lane: next(free) for lane in range(n_lanes) if lane not in found}
