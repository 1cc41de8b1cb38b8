"""The workers that take part in a run on a cluster, and which lanes each of them has.

Lanes stay with their workers as long as these live, because their readers are there; that is a matter of speed alone.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from streamgd.data.sources.base import Source
from streamgd.data.sources.dask_clients import idle_workers, threads_of_workers
from streamgd.errors import ClusterError, UnfitWorkerError
from streamgd.run.asking import reports_of_workers
from streamgd.run.config import Config, RunOptions
from streamgd.run.epochs import Watcher
from streamgd.run.runs import Run, least_state_bytes, plan_for
from streamgd.run.worker_memory import PROCESS_BYTES, WorkerMemory
from streamgd.run.workers import Reports, WorkerReport, assign, unfit

#: How often to look whether workers came or went, and, while there are none, whether one came.
_LOOK_S, _POLL_S = 1.0, 0.25
#: How often to look which workers are idle. One that is so twice in a row gets no lanes.
_LOOK_IDLE_S = 5.0
#: Workers that do not answer are asked again after so many seconds; what others said holds for so many.
_ASK_AGAIN_S, _FRESH_S = 30.0, 5.0
#: A wait for workers is told after this, and then now and again.
_SAY_AFTER_S, _SAY_EVERY_S = 2.0, 60.0


class Members:
    """Sees which workers there are, lets them in or refuses them, and gives each lane its own.

    Parameters
    ----------
    run : Run
        What is trained.
    client : distributed.Client
        Of the cluster.
    options : RunOptions
        How long to wait while there is no worker, and what workers said of themselves before.
    watcher : Watcher
        Told of workers that are awaited or cannot take part.
    stop : threading.Event
        Set by whoever wants training to stop; then workers are not waited for.
    """

    def __init__(self, run: Run, client: Any, options: RunOptions, watcher: Watcher, stop: threading.Event) -> None:
        self._client, self._timeout_s = client, options.workers_timeout_s
        self._watcher, self._stop = watcher, stop
        self._n_lanes = run.config.n_lanes
        self._memory = WorkerMemory.of(run)
        self._reports: dict[str, WorkerReport] = {}
        self._refused: set[str] = set()
        self._lost: str | None = None  # what kept the last worker from answering
        self._lanes: dict[int, str] = {}
        self._silent: dict[str, float] = {}  # when workers did not answer
        self._trial = run.source if run.source.lies_in_files else None
        self._asked = options.reports
        self._idle: dict[str, str] = {}  # for a while, and why
        self._seen_idle: dict[str, str] = {}  # at the last look
        self._looked = self._looked_idle = float("-inf")
        self._first = True
        self.look()

    def __len__(self) -> int:
        """How many workers take part."""
        return len(self._reports)

    @property
    def n_threads(self) -> int:
        """How many threads they have."""
        return sum(report.n_threads for report in self._reports.values())

    @property
    def fit(self) -> list[str] | None:
        """The workers that may take part, if not all may."""
        return sorted(self._reports) if self._refused or self._silent or self._idle else None

    @property
    def first(self) -> str:
        """The worker of lane 0, which plays by itself what is not shared."""
        return self._lanes[0]

    @property
    def has_room(self) -> bool:
        """Whether that worker has room for all lanes."""
        return self._lanes_kept(self.first) >= self._n_lanes

    @property
    def have_room(self) -> bool:
        """Whether each worker has room for all of its own lanes at once."""
        held = Counter(self._lanes.values())
        return all(self._lanes_kept(address) >= n for address, n in held.items())

    @property
    def has_room_to_send(self) -> bool:
        """Whether workers have room for their lanes and as much again: rows that they send, and those of all others."""
        held = Counter(self._lanes.values())
        return all(self._lanes_kept(address) >= min(self._n_lanes, 2 * n) for address, n in held.items())

    def have_room_beside(self, lane_bytes: Sequence[int]) -> bool:
        """Whether workers have room for so many bytes of each of their lanes, and leave as many free to others.

        Beside the plan, and what they took when they were let in. Workers of one machine share what that has.
        """
        from distributed.comm.addressing import get_address_host

        wanted: Counter[str] = Counter()
        for lane, address in self._lanes.items():
            wanted[address] += lane_bytes[lane]
        neighbours = Counter(get_address_host(address) for address in self._reports)
        for address, n_bytes in wanted.items():
            report = self._reports[address]
            free = report.free_bytes // neighbours[get_address_host(address)]
            if report.memory_limit:
                free = min(free, report.memory_limit - report.used_bytes)
            planned = self._memory.needed(report.n_threads, self._lanes_kept(address)) - PROCESS_BYTES
            if 2 * n_bytes > free - planned:
                return False
        return True

    def _lanes_kept(self, address: str) -> int:
        report = self._reports[address]
        return self._memory.lanes_kept(report.n_threads, report.memory_limit)

    def groups(self) -> list[tuple[list[int], str]]:
        """Divide each worker's lanes among its threads, neighbours together: fewer tasks, and fewer sums to hand on."""
        groups = []
        for address in sorted(set(self._lanes.values())):
            lanes = sorted(lane for lane, where in self._lanes.items() if where == address)
            n = min(len(lanes), self._reports[address].n_threads)
            groups += [(lanes[i * len(lanes) // n : (i + 1) * len(lanes) // n], address) for i in range(n)]
        return sorted(groups)  # that of lane 0 first, wherever it is: see `streamgd.run.flights.merge_flight`

    def look(self, *, now: bool = False) -> str | None:
        """See which workers there are, if the last look was a while ago; wait if there is none.

        Parameters
        ----------
        now : bool, default False
            Look even if the last look was not long ago.

        Returns
        -------
        str or None
            Which workers that had lanes are gone.

        Raises
        ------
        ClusterError
            If there are none for too long, or the first ones cannot take part.
        """
        if not now and time.monotonic() - self._looked < _LOOK_S:
            return None
        began = said = time.monotonic()
        gone: set[str] = set()
        wanted: Any = None
        while not self._stop.is_set():
            threads = threads_of_workers(self._client)
            if threads is not None:
                threads = self._without_idle(threads)
                gone |= self._reports.keys() - threads.keys()
                self._let_in(threads)
            self._looked = time.monotonic()
            if threads is not None and self._reports:
                before = set(self._lanes.values())
                usable = {address: report.n_threads for address, report in self._reports.items()}
                self._lanes = assign(self._n_lanes, usable, self._lanes)
                self._first = False
                return ", ".join(sorted(gone)) if gone & before else None
            waited = self._looked - began
            if waited > self._timeout_s:
                raise self._nobody(waited, scheduler=threads is not None)
            if waited > _SAY_AFTER_S and (self._looked - said > _SAY_EVERY_S or said == began):
                lacking = "the scheduler does not answer" if threads is None else "no workers: waiting for some"
                if self._idle:
                    lacking = f"no worker takes tasks ({self._why_idle()}): waiting for one"
                self._watcher.message(f"{lacking}, up to {self._timeout_s:g} s")
                said = self._looked
            if wanted is None and threads is not None:
                wanted = self._client.submit(_nothing, pure=False)  # a cluster that adapts starts workers for tasks
            time.sleep(_POLL_S)
        return None

    def _nobody(self, waited: float, *, scheduler: bool) -> ClusterError:
        if not scheduler:
            return ClusterError(
                f"the scheduler did not answer for {waited:.0f} s: start the cluster again and resume the run"
            )
        found = "" if self._lost is None else f" (the last one that was asked: {self._lost})"
        if self._idle:
            found = f" that takes tasks ({self._why_idle()})"
        return ClusterError(
            f"no worker for {waited:.0f} s{found}: start workers and resume the run, or allow a longer wait "
            "(workers_timeout_s, --workers-timeout)"
        )

    def _without_idle(self, threads: Mapping[str, int]) -> dict[str, int]:
        """Leave out workers that have begun no task for a while, and will not for some more."""
        now = time.monotonic()
        if now - self._looked_idle >= _LOOK_IDLE_S:
            self._looked_idle = now
            idle = idle_workers(self._client)
            if idle is not None:
                before = self._idle
                self._idle = {address: why for address, why in idle.items() if address in self._seen_idle}
                self._seen_idle = idle
                for address in sorted(self._idle.keys() - before.keys()):
                    self._watcher.message(
                        f"worker {address} is {self._idle[address]}: it gets no lanes until it goes on"
                    )
        return {address: n for address, n in threads.items() if address not in self._idle}

    def _why_idle(self) -> str:
        return ", ".join(f"{address} is {why}" for address, why in sorted(self._idle.items())[:4])

    def _let_in(self, threads: Mapping[str, int]) -> None:
        """Ask workers that are new, and forget those that are gone."""
        known = {address: report.n_threads for address, report in self._reports.items()}
        new = [each for each, n in threads.items() if known.get(each) != n and each not in self._refused]
        now = time.monotonic()
        patience_s = _ASK_AGAIN_S if self._reports else 0.0  # while nobody else is there, at every look
        new = [each for each in new if now - self._silent.get(each, -_ASK_AGAIN_S) >= patience_s]
        if new:
            self._check(new)
        self._reports = {address: report for address, report in self._reports.items() if address in threads}
        self._refused &= set(threads)
        self._silent = {address: when for address, when in self._silent.items() if address in threads}

    def _check(self, addresses: Sequence[str]) -> None:
        """Let workers in, or refuse them: before training all must be fit, later those that are not are left out."""
        known = self._known_already()
        missing = [address for address in addresses if address not in known]
        reports, silent = reports_of_workers(self._client, self._trial, missing) if missing else ({}, set())
        reports |= known
        for address in addresses:
            report = reports.get(address)
            told = self._silent.pop(address, None) is not None
            if address in silent:
                self._silent[address] = time.monotonic()
                self._lost = address
                if not told:
                    self._watcher.message(f"worker {address} does not answer: it gets no lanes until it does")
                continue
            if report is None or isinstance(report, OSError):
                self._lost = f"{address}: {type(report).__name__}: {report}" if report is not None else self._lost
                continue  # gone again, as it seems; else it is asked once more
            why = unfit(address, report, self._memory)
            if why is None:
                assert isinstance(report, WorkerReport)
                self._reports[address] = report
            elif self._first:
                raise UnfitWorkerError(why)
            else:
                self._refused.add(address)
                self._watcher.message(f"{why}. The run goes on without it")

    def _known_already(self) -> Mapping[str, WorkerReport]:
        """Return what workers said a moment ago, once; files they have not opened then."""
        asked, self._asked = self._asked, None
        if asked is None or self._trial is not None or time.monotonic() - asked.at > _FRESH_S:
            return {}
        return asked.by_address


def refuse_unfit(client: Any, source: Source, config: Config) -> Reports | None:
    """Refuse workers that lack memory or have other versions, before the survey, which computes blocks on them.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster. If it has no workers yet, they are looked at when they come.
    source : Source
        What is to be trained on.
    config : Config
        How.

    Returns
    -------
    Reports or None
        What they say of themselves; None if there are no workers.

    Raises
    ------
    UnfitWorkerError
        If a worker cannot take part.
    ClusterError
        If the scheduler is gone.
    """
    threads = threads_of_workers(client)
    if not threads:
        return None
    layout, state_bytes = plan_for(source, config), least_state_bytes(source, config)
    memory = WorkerMemory.planned(layout, source, state_bytes, config.n_lanes)
    began = time.monotonic()
    reports, _ = reports_of_workers(client, None, sorted(threads))
    for address, report in sorted(reports.items()):
        why = None if isinstance(report, OSError) else unfit(address, report, memory)
        if why is not None:
            raise UnfitWorkerError(why)
    return Reports({address: each for address, each in reports.items() if isinstance(each, WorkerReport)}, began)


def _nothing() -> None:
    """Be a task that waits for a worker."""
