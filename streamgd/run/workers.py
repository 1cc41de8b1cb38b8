"""What a cluster's workers are and can do, found before they are given work.

`describe` runs on every worker; `unfit` says what is wrong with one, and `memory_needed` what it must have room for.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgd.data.layout import format_bytes
from streamgd.data.sources.base import Source
from streamgd.run.lane_rows import LEAST_WINDOWS, more_windows
from streamgd.run.runs import Run, versions

#: What must be equal for equal bits: our own code, what compiles it, and what merges states.
COMPARED = ("streamgd", "numba", "numpy")
#: Resident memory of a worker process that has imported everything and compiled its kernels.
PROCESS_BYTES = 350_000_000
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
    """

    versions: dict[str, Any]
    n_threads: int
    memory_limit: int
    unreadable: str | None


def describe(source: Source | None, dask_worker: Any = None) -> WorkerReport:
    """Describe the worker that this runs on.

    Parameters
    ----------
    source : Source or None
        Files to open on trial.
    dask_worker : distributed.Worker
        Given by Dask.
    """
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
    return WorkerReport(versions(), int(dask_worker.state.nthreads), usable_memory(dask_worker), unreadable)


def usable_memory(worker: Any) -> int:
    """Return the bytes that a Dask worker may take before it is paused, and ended if it takes more; 0 for no limit."""
    manager = worker.memory_manager
    return int((manager.memory_limit or 0) * (manager.memory_pause_fraction or 1))


def unfit(address: str, report: WorkerReport | BaseException, run: Run) -> str | None:
    """Say why a worker cannot take part in a run; None if it can.

    Parameters
    ----------
    address : str
        The worker.
    report : WorkerReport or exception
        What `describe` gave there, or raised.
    run : Run
        What it would train.
    """
    if isinstance(report, BaseException):
        return (
            f"worker {address} cannot run streamgd ({type(report).__name__}: {report}): install the same streamgd in "
            "the environment of the workers"
        )
    here = versions()
    differing = [
        f"{name} {report.versions.get(name, 'missing')} there, {here[name]} here"
        for name in COMPARED
        if report.versions.get(name) != here[name]
    ]
    if differing:
        return (
            f"worker {address} has other versions, so that results could differ: {'; '.join(differing)}. Install the "
            "same on all workers and the client"
        )
    if report.unreadable is not None:
        return (
            f"worker {address} cannot read the data: {report.unreadable}. Workers open files themselves: put the same "
            "ones where every worker sees them under the same path"
        )
    needed = memory_needed(run, report.n_threads, report.n_threads)
    if report.memory_limit and needed > report.memory_limit:
        return (
            f"worker {address} may take {format_bytes(report.memory_limit)} before it reaches the part of its memory "
            f"limit where Dask pauses it; with {report.n_threads} thread(s) it would need {format_bytes(needed)}: "
            f"{about_memory(run, report.n_threads, report.n_threads)}. Give it more memory or fewer threads, or "
            "choose a smaller buffer"
        )
    return None


def memory_needed(run: Run, n_threads: int, n_lanes: int) -> int:
    """Count the bytes that a worker needs for so many lanes that are read, so many of which are trained at once."""
    return PROCESS_BYTES + _states_bytes(run, n_threads) + n_lanes * lane_bytes(run) + _copied_bytes(run)


def lanes_kept(run_bytes: Mapping[str, int], n_threads: int, memory_limit: int) -> int:
    """Count the lanes whose windows a worker may keep and read ahead, within its limit.

    Parameters
    ----------
    run_bytes : mapping
        As from `costs_of`.
    n_threads : int
        Lanes that it trains at once.
    memory_limit : int
        Bytes; 0 for no limit.
    """
    if not memory_limit:
        return max(n_threads, run_bytes["n_lanes"])
    left = memory_limit - run_bytes["fixed"] - n_threads * run_bytes["states"]
    return max(n_threads, min(run_bytes["n_lanes"], left // run_bytes["lane"]))


def windows_kept(run_bytes: Mapping[str, int], n_threads: int, n_lanes: int, memory_limit: int) -> int:
    """Count the windows that each of so many lanes may have at once, within a worker's limit.

    Parameters
    ----------
    run_bytes : mapping
        As from `costs_of`.
    n_threads : int
        Lanes that it trains at once.
    n_lanes : int
        Lanes whose windows it keeps, as from `lanes_kept`.
    memory_limit : int
        Bytes; 0 for no limit.
    """
    more = run_bytes["more_windows"]
    if memory_limit:
        left = memory_limit - run_bytes["fixed"] - n_threads * run_bytes["states"] - n_lanes * run_bytes["lane"]
        more = min(more, max(0, left) // (n_lanes * run_bytes["window"]))
    return LEAST_WINDOWS + more


def costs_of(run: Run) -> dict[str, int]:
    """Return what a worker's memory goes to, for `lanes_kept` and `windows_kept`."""
    return {
        "fixed": PROCESS_BYTES + _copied_bytes(run),
        "states": _states_bytes(run, 1),
        "lane": lane_bytes(run),
        "window": run.layout.window_bytes,
        "more_windows": more_windows(run.layout, run.source),
        "n_lanes": run.config.n_lanes,
    }


def about_memory(run: Run, n_threads: int, n_lanes: int) -> str:
    """Say where a worker's memory goes."""
    copied = _copied_bytes(run)
    parts = [
        f"Python {format_bytes(PROCESS_BYTES)}",
        f"{n_lanes} lane(s) of {format_bytes(lane_bytes(run))}",
        f"states {format_bytes(_states_bytes(run, n_threads))}",
    ]
    return ", ".join([*parts, f"the data itself {format_bytes(copied)}"] if copied else parts)


def lane_bytes(run: Run) -> int:
    """Count the bytes that reading a lane takes: its plan, and the blocks of Dask collections for two turns."""
    layout = run.layout
    return layout.planned_bytes + (2 * layout.open_bytes + layout.buffer_bytes if run.source.holds_block else 0)


def _states_bytes(run: Run, n_threads: int) -> int:
    """Count the states before and after each turn, and all of them where they are merged."""
    state = sum(array.nbytes for array in run.state.to_tensors().values())
    return state * (2 * n_threads + run.config.n_lanes + 2)


def _copied_bytes(run: Run) -> int:
    """Rows in the memory of the client go to every worker."""
    return run.source.held_bytes


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


_checked = threading.local()


def same_versions(expected: Mapping[str, Any]) -> str | None:
    """Say which versions differ in this process from those expected; None if none does."""
    if getattr(_checked, "pid", None) != os.getpid():
        _checked.found, _checked.pid = versions(), os.getpid()
    differing = [f"{name} {_checked.found[name]} instead of {expected[name]}" for name in COMPARED]
    wrong = [text for name, text in zip(COMPARED, differing, strict=True) if _checked.found[name] != expected[name]]
    return "; ".join(wrong) or None
