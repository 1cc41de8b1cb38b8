"""Rounds on a Dask cluster.

A round is a task for the lanes of each worker's thread; it begins by merging what the round before found, and several
rounds are handed over at once, with one task that tells the client what came of them: a flight
(`streamgd.run.flights`). Rounds that are over sooner than their tasks are scheduled, as the first ones are, make one
task together. Each task is pure and has a key of its own, made of the run, the epoch, the round and the lanes, so
Dask may run it anywhere, again or late. The client keeps the state of the last round that it was told of, from which
rounds that are lost with a worker are played again; the next flight is handed over while one is under way, so that no
worker waits for the client. Nothing that happens on the cluster can change what comes of it.

Lanes stay with their workers as long as these live, because their readers are there; that is a matter of speed alone.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from streamgd.errors import ClusterError, DataError, OptionError, StreamgdError
from streamgd.learn.recipe import Packed
from streamgd.learn.state import State
from streamgd.run.config import RunOptions
from streamgd.run.delivery import DeliveredBlocks
from streamgd.run.epochs import Watcher
from streamgd.run.flights import Flight, Unfit, deliver, keep, merge_flight, play_short, take_turns
from streamgd.run.lanes import LaneWork
from streamgd.run.rounds import Crew, Round
from streamgd.run.runs import Run, versions
from streamgd.run.turns import Turns
from streamgd.run.workers import WorkerReport, assign, costs_of, describe, lanes_kept, unfit

#: How often to look whether somebody asked to stop, and whether workers came or went.
_POLL_S, _LOOK_S = 0.25, 1.0
#: A merged state comes to the client at so many bytes a second at least, after two seconds at most.
_FETCH_RATE, _FETCH_S = 10e6, 2.0
#: Times that a round is played again before what keeps it from ending is taken to be for good.
_MOST_ATTEMPTS = 5
#: Times that workers may leave over the same round before it is taken to be what ends them.
_MOST_LOSSES = 20
#: When what was handed over last took longer than this, in seconds, nothing is handed over behind what is under way; of
#: others so many are chained at most.
_LONG_S, _MOST_CHAINED = 1.0, 32
#: Rounds are handed over for so many seconds at once, so many of them at most; those of more groups of lanes than this
#: one by one, with a task for the merge, because otherwise every group gets what every other one found.
_FLIGHT_S, _MOST_IN_FLIGHT, _FEW_GROUPS = 0.25, 8, 8
#: Rounds are short that one worker would play in so many seconds, or, before that is known, that have so many bytes of
#: rows; so many short ones make one task at most, as long as their states, and their rows, come to no more than so many
#: bytes.
_SHORT_S, _SHORT_BYTES = 0.006, 8_000_000
_MOST_TOGETHER, _STATES_BYTES, _TOGETHER_BYTES = 100, 20_000_000, 128_000_000
#: States up to this size are sent with each task that needs them, others once.
_EMBEDDED_BYTES = 100_000
#: A wait for workers is told after this, and then now and again.
_SAY_AFTER_S, _SAY_EVERY_S = 2.0, 60.0


class ClusterCrew(Crew):
    """Takes the turns on a cluster's workers.

    Parameters
    ----------
    run : Run
        What is trained.
    client : distributed.Client
        Of the cluster.
    options : RunOptions
        How long to wait for workers.
    watcher : Watcher
        Told of workers that are awaited or cannot take part.
    stop : threading.Event
        Set by whoever wants training to stop; then workers are not waited for.

    Raises
    ------
    ClusterError
        If there are no workers, or some cannot take part: before training starts.
    """

    def __init__(self, run: Run, client: Any, options: RunOptions, watcher: Watcher, stop: threading.Event) -> None:
        require_client(client)
        self._run, self._client, self._watcher = run, client, watcher
        self._timeout_s = options.workers_timeout_s
        self._n_lanes = run.config.n_lanes
        self._turns = Turns.of(run)
        self._name = uuid.uuid4().hex[:12]
        self._reports: dict[str, WorkerReport] = {}
        self._refused: set[str] = set()
        self._lost: str | None = None  # what kept the last worker from answering
        self._lanes: dict[int, str] = {}
        self._looked = float("-inf")
        source: Any = run.source
        self._blocks: DeliveredBlocks | None = None
        if source.kind == "dask":
            self._blocks = DeliveredBlocks(run, client)
            source = source.detached()
        self._closed = False
        self._stop = stop
        self._next: Flight | None = None
        self._flown_from: State | None = None
        self._played: deque[Round] = deque()  # rounds that came with others before them
        # Seconds of what was handed over last, for a row of each lane, and for one where a worker plays by itself.
        self._flight_s, self._row_s, self._together_s, self._round_s = 0.0, 0.0, 0.0, 0.0
        self._flights, self._spread = 0, False
        self._ahead: list[Any] = []  # futures of blocks for the next round
        self._planned: tuple[int, int, list[int], bool] | None = None  # that round, its ends, and whether together
        self._attempt = 0
        work = LaneWork(run, source, n_threads=1, most_readers=1)
        self._costs = costs_of(run)
        self._extra = {"versions": versions(), "costs": self._costs}
        self._look(first=True)
        self._lane_work = work
        self._hand_over_work()

    def _hand_over_work(self) -> None:
        with _quiet_about_size():
            key = f"lane-work-{self._name}-{self._attempt}"
            self._work = self._client.submit(keep, self._lane_work, key=key)

    @property
    def workers(self) -> int | None:
        """How many workers take part."""
        return len(self._reports)

    @property
    def round_s(self) -> float | None:
        """Seconds of each of the rounds that came last, on average."""
        return self._round_s

    def play(self, start: State, packed: Packed, row: int, end: int, stop: threading.Event) -> Round | None:
        """Play a round, again if need be; see `Crew.play`."""
        lost = left = 0
        if self._played and self._flown_from is start:
            return self._hand_out(self._played)
        self._played.clear()
        while not stop.is_set():
            began = time.monotonic()
            flight, self._next = self._next, None
            if flight is None or (flight.epoch, flight.row) != (start.epoch, row) or self._flown_from is not start:
                self._drop(flight)
                flight = self._submit(start, packed, start.epoch, row, behind=None)
                self._ahead = []  # the flight holds its own
            try:
                self._look()
                if stop.is_set():
                    return None  # perhaps without a worker: nobody is waited for then
                if self._may_fly_ahead(flight):
                    self._next = self._submit(flight.last, packed, start.epoch, flight.ends[-1], behind=flight)
                elif self._blocks is not None:
                    self._deliver_ahead(start.epoch, flight.ends[-1])
                while not self._finished(flight.merged):
                    if stop.is_set():
                        return None
                    self._look()
                self._played.extend(self._result(flight))
                self._flight_s = time.monotonic() - began
                self._row_s = self._flight_s / (flight.ends[-1] - flight.row)
                self._round_s = self._flight_s / len(self._played)
                if flight.merged is flight.last and flight.chained:  # the first one opens files, and compiles
                    took_s = sum(each.took_s for each in self._played) / (flight.ends[-1] - flight.row)
                    self._together_s = max(self._together_s, took_s)
                return self._hand_out(self._played)
            except _Again as again:
                lost += again.counts
                left += not again.counts
                self._drop_next()
                if lost >= _MOST_ATTEMPTS or left >= _MOST_LOSSES:
                    raise ClusterError(
                        f"a round was lost {lost + left} times: {again}. If workers die, see their logs; they may have "
                        "too little memory"
                    ) from again.__cause__
                if self._work.status not in ("pending", "finished"):  # the cluster was started afresh
                    self._hand_over_work()
                self._ahead, self._planned, self._attempt = [], None, self._attempt + 1
                if self._blocks is not None:
                    self._blocks.clear()
                self._looked = float("-inf")
            finally:
                self._drop(flight)
        return None

    def _hand_out(self, played: deque[Round]) -> Round:
        """Return the next round, and remember where the one after it begins."""
        found = played.popleft()
        self._flown_from = found.state
        return found

    def _may_fly_ahead(self, flight: Flight) -> bool:
        """Whether to hand over the next round before this one has ended, so that nothing waits for the client.

        Not when rounds are long, or many have been chained already: what is lost with a worker is computed again from
        the last state that the client sent. And not beyond an epoch, which the client closes.
        """
        far = flight.ends[-1] >= self._turns.lane_rows
        return self._flight_s < _LONG_S and flight.chained < _MOST_CHAINED and not far

    def _ends(self, epoch: int, row: int) -> tuple[list[int], bool]:
        """Say where the rounds end that are handed over at once, and whether they make one task together.

        Only where and when rounds are played depends on it, and not what comes of them. Once lanes are spread over the
        workers they stay so.
        """
        if self._planned is not None and self._planned[:2] == (epoch, row):
            return self._planned[2:]  # what was delivered ahead
        short = [] if self._spread else self._short_ends(epoch, row)
        if short:
            return short, True
        self._spread = True  # lanes that went back to one worker would be read anew there
        return self._flight_ends(epoch, row), False

    def _short_ends(self, epoch: int, row: int) -> list[int]:
        """Say where short rounds end, as many as a worker has room for; none if the first is not short."""
        ends = [self._turns.end(epoch, row)]
        report = self._reports[self._lanes[0]]
        if lanes_kept(self._costs, report.n_threads, report.memory_limit) < self._n_lanes:
            return []
        most, n_bytes = min(_MOST_TOGETHER, _STATES_BYTES // self._state_bytes), 0
        while True:
            size = (ends[-1] - row) * self._n_lanes * self._run.layout.row_bytes
            n_bytes += size
            short = (ends[-1] - row) * self._together_s <= _SHORT_S if self._together_s else size <= _SHORT_BYTES
            if not short or n_bytes > _TOGETHER_BYTES or len(ends) > most:
                return ends[:-1]
            if ends[-1] >= self._turns.lane_rows:
                return ends
            row = ends[-1]
            ends.append(self._turns.end(epoch, row))

    def _flight_ends(self, epoch: int, row: int) -> list[int]:
        """Say where rounds end that follow one another without the client: for a moment's work, as far as is known."""
        ends = [self._turns.end(epoch, row)]
        most = min(_MOST_IN_FLIGHT, _STATES_BYTES // (2 * self._state_bytes)) if self._row_s else 1
        # Of Dask collections, the blocks behind all of the rounds wait in memory, as those of the longest turn may.
        most_rows = self._turns.most_rows if self._blocks is not None else sys.maxsize
        if self._row_s:
            most_rows = min(most_rows, int(_FLIGHT_S / self._row_s))
        while len(ends) < most and ends[-1] < self._turns.lane_rows and len(self._groups()) <= _FEW_GROUPS:
            end = self._turns.end(epoch, ends[-1])
            if end - row > most_rows:
                break
            ends.append(end)
        return ends

    @property
    def _state_bytes(self) -> int:
        return sum(array.nbytes for array in self._run.state.to_tensors().values())

    def _submit(self, start: Any, packed: Packed, epoch: int, row: int, *, behind: Flight | None) -> Flight:
        """Hand the tasks of rounds to the scheduler, to begin from a state or from what came of the rounds before."""
        client = self._client
        self._flights += 1
        name = f"{self._name}-{self._flights}"
        tasks: list[Any] = []
        (ends, together), chained = self._ends(epoch, row), 0 if behind is None else behind.chained + 1
        with _quiet_about_size():
            if behind is None and self._state_bytes > _EMBEDDED_BYTES:
                start = client.submit(keep, start, key=(f"round-state-{name}", epoch, row), priority=20)
                tasks.append(start)
            groups = self._grouped(together=together)
            deliveries = self._delivered(epoch, row, ends[-1], groups)
            tasks += filter(None, deliveries)
            if together:
                key: Any = (f"lane-rounds-{name}", epoch, row, len(ends))
                several = self._work, start, packed, row, ends, self._extra, deliveries[0]
                merged = client.submit(play_short, *several, key=key, priority=10, **self._at(self._lanes[0]))
                return Flight(epoch, row, ends, merged, merged, tasks, chained)
            few, first = len(groups) <= _FEW_GROUPS, row
            firsts: list[Any] = []
            taken: list[Any] = []
            for end in ends:
                taken = []
                for (lanes, address), delivery in zip(groups, deliveries, strict=True):
                    key = (f"lane-turns-{name}", epoch, row, _names(lanes))
                    arguments = self._work, start, packed, lanes, row, end, self._extra, delivery
                    taken.append(client.submit(take_turns, *arguments, key=key, priority=10, **self._at(address)))
                firsts.append(taken[0])
                tasks += taken
                start, row = taken, end
            key = (f"merge-lanes-{name}", epoch, row)
            merged = client.submit(
                merge_flight, firsts, taken, packed, key=key, priority=20, **self._at(self._lanes[0])
            )
        return Flight(epoch, first, ends, merged, taken if few else merged, tasks, chained)

    def _deliver_ahead(self, epoch: int, row: int) -> None:
        """Have the lanes read on where the next round cannot be handed over yet."""
        assert self._blocks is not None
        following = self._blocks.next_turn(epoch, row)
        if following is not None:
            ends, together = self._ends(*following)
            self._planned = (*following, ends, together)
            self._ahead = self._delivered(*following, ends[-1], self._grouped(together=together))

    def _delivered(self, epoch: int, row: int, end: int, groups: Sequence[tuple[list[int], str]]) -> list[Any]:
        """Bring blocks of a Dask collection to the lanes that need them, and have these fill windows meanwhile.

        A turn's own blocks would come only once the merge before it is done, because then it is given to a worker; and
        a turn that names one task in place of all blocks is cheaper to schedule.
        """
        if self._blocks is None:
            return [None] * len(groups)
        at = {lane: address for lanes, address in groups for lane in lanes}
        blocks = self._blocks.deliver(epoch, row, end, at, self._fit)
        found = []
        for lanes, address in groups:
            # The same turn of the same lanes has the same key: what was delivered ahead is not delivered again.
            key = (f"lane-blocks-{self._name}-{self._attempt}", epoch, row, end, _names(lanes))
            arguments = self._work, epoch, row, end, {lane: blocks[lane] for lane in lanes}
            with _quiet_about_size():
                found.append(self._client.submit(deliver, *arguments, key=key, priority=15, **self._at(address)))
        return found

    def _grouped(self, *, together: bool) -> list[tuple[list[int], str]]:
        """Say which lanes take their turns in one task, and where."""
        return [(list(range(self._n_lanes)), self._lanes[0])] if together else self._groups()

    def _groups(self) -> list[tuple[list[int], str]]:
        """Divide each worker's lanes among its threads, neighbours together: fewer tasks, and fewer sums to hand on."""
        groups = []
        for address in sorted(set(self._lanes.values())):
            lanes = sorted(lane for lane, where in self._lanes.items() if where == address)
            n = min(len(lanes), self._reports[address].n_threads)
            groups += [(lanes[i * len(lanes) // n : (i + 1) * len(lanes) // n], address) for i in range(n)]
        return sorted(groups)  # that of lane 0 first, wherever it is: see `merge_flight`

    def _at(self, address: str) -> dict[str, Any]:
        """Say where a task belongs; elsewhere if its worker is gone or busy, but never where it cannot be."""
        if self._fit is not None:
            return {"workers": self._fit}
        return {"workers": [address], "allow_other_workers": True}

    @property
    def _fit(self) -> list[str] | None:
        """The workers that may take part, if not all may."""
        return sorted(self._reports) if self._refused else None

    def _drop(self, flight: Flight | None) -> None:
        """Cancel what still runs of a round and release the rest, even if a traceback holds the futures."""
        if flight is None:
            return
        futures = [flight.merged, *flight.tasks]
        with contextlib.suppress(Exception):
            if flight.merged.status == "pending":
                self._client.cancel(futures, force=True)
            for future in futures:
                future.release()

    def _drop_next(self) -> None:
        flight, self._next = self._next, None
        self._drop(flight)

    # --- what comes back ---
    def _finished(self, future: Any) -> bool:
        """Wait a little for a future."""
        import distributed

        wait: Any = distributed.wait
        try:
            wait([future], timeout=_POLL_S)
        except TimeoutError:
            return False
        except Exception:  # cancelled; `_result` says what it means
            return True
        return True

    def _result(self, flight: Flight) -> list[Round]:
        """Fetch what came of rounds, or say what kept them from ending."""
        from concurrent.futures import CancelledError

        from distributed import KilledWorker
        from distributed.comm.core import CommClosedError

        try:
            return self._fetched(flight)
        except Unfit as err:
            raise _Again(str(err)) from err
        except (StreamgdError, _Again):
            raise
        except _Failed as err:
            raise self._failure(err.__cause__ or err) from err.__cause__
        except KilledWorker as err:
            raise _Again(f"workers died over it ({err})") from err
        except (CancelledError, CommClosedError, TimeoutError) as err:
            if self._client.status != "running":
                raise ClusterError(
                    f"the connection to the scheduler is lost ({type(err).__name__}: {err}): start the cluster again "
                    "and resume the run"
                ) from err
            raise _Again(f"what it needs was lost ({type(err).__name__}: {err})") from err
        except Exception as err:
            raise self._failure(err) from err

    def _failure(self, err: BaseException) -> StreamgdError:
        """Return what ends a run of which a task fails for good."""
        kind = DataError if self._blocks is not None else ClusterError
        return kind(
            f"a task failed on the cluster: {type(err).__name__}: {err}. See the error above; computing the collection "
            "by itself, or training without the cluster, shows it too"
        )

    def _fetched(self, flight: Flight) -> list[Round]:
        """Fetch what came of rounds, unless it is lost meanwhile with the worker that has it."""
        size = len(flight.ends) * self._state_bytes
        patience_s = _FETCH_S + size / _FETCH_RATE
        for _ in range(_MOST_ATTEMPTS):
            try:
                found = flight.merged.result(timeout=patience_s)
                return found if isinstance(found, list) else [found]
            except TimeoutError as err:
                if flight.merged.status == "error":  # it is the task's own
                    raise _Failed(str(err)) from err
            self._look()
        raise TimeoutError(f"a state of {size:,} bytes did not come within {_MOST_ATTEMPTS * patience_s:.0f} s")

    # --- workers ---
    def _look(self, *, first: bool = False) -> None:
        """See which workers there are, check new ones, and give each lane its own; wait if there is none."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        began = said = time.monotonic()
        gone: set[str] = set()
        while not self._stop.is_set():
            threads = self._present()
            gone |= self._reports.keys() - threads.keys()
            new = [address for address in threads if address not in self._reports and address not in self._refused]
            if new:
                self._check(new, first=first)
            self._reports = {address: report for address, report in self._reports.items() if address in threads}
            self._refused &= set(threads)
            self._looked = now = time.monotonic()
            if self._reports:
                before = set(self._lanes.values())
                usable = {address: report.n_threads for address, report in self._reports.items()}
                self._lanes = assign(self._n_lanes, usable, self._lanes)
                if gone & before and not first:
                    raise _Again(f"{', '.join(sorted(gone))} left", counts=False)
                return
            waited = now - began
            if waited > self._timeout_s:
                found = "" if self._lost is None else f" (the last one did not answer: {self._lost})"
                raise ClusterError(
                    f"no worker for {waited:.0f} s{found}: start workers and resume the run, or allow a longer wait "
                    "(workers_timeout_s, --workers-timeout)"
                )
            if waited > _SAY_AFTER_S and (now - said > _SAY_EVERY_S or said == began):
                self._watcher.message(f"no workers: waiting for some, up to {self._timeout_s:g} s")
                said = now
            time.sleep(_POLL_S)

    def _present(self) -> dict[str, int]:
        """Ask the scheduler for its workers."""
        try:
            found: dict[str, int] = dict(self._client.nthreads())
        except Exception as err:
            raise ClusterError(
                f"the scheduler does not answer ({type(err).__name__}: {err}): start the cluster again and resume the "
                "run"
            ) from err
        return found

    def _check(self, addresses: Sequence[str], *, first: bool) -> None:
        """Let workers in, or refuse them: before training all must be fit, later those that are not are left out."""
        source = None if self._run.source.kind in ("dask", "memory") else self._run.source
        reports = self._client.run(describe, source, workers=list(addresses), on_error="return")
        for address in addresses:
            report = reports.get(address)
            if report is None or isinstance(report, OSError):
                self._lost = f"{address}: {type(report).__name__}: {report}" if report is not None else self._lost
                continue  # gone again, as it seems; else it is asked once more
            why = unfit(address, report, self._run)
            if why is None:
                assert isinstance(report, WorkerReport)
                self._reports[address] = report
            elif first:
                raise ClusterError(why)
            else:
                self._refused.add(address)
                self._watcher.message(f"{why}. The run goes on without it")

    def close(self) -> None:
        """Release what the workers hold, and have them close what they opened. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._drop_next()
        self._ahead = []
        if self._blocks is not None:
            self._blocks.clear()
        if self._client.status == "running":
            with contextlib.suppress(Exception):
                self._client.run(_close, self._work.key, on_error="ignore")
        del self._work


def require_client(client: Any) -> None:
    """Refuse what is no client of a cluster that can be used.

    Raises
    ------
    OptionError
        If it is something else, such as an address.
    ClusterError
        If it is asynchronous, or closed.
    """
    kind = getattr(sys.modules.get("distributed"), "Client", None)  # whoever has one has imported it
    if kind is None or not isinstance(client, kind):
        raise OptionError(
            f"client={client!r}: expected a distributed.Client, such as distributed.Client('tcp://host:8786') or the "
            "get_client() of a cluster"
        )
    if client.asynchronous:
        raise ClusterError("the client is asynchronous: give a distributed.Client that was made without it")
    if client.status != "running":
        raise ClusterError(f"the client is {client.status}: connect anew, and give that distributed.Client")


class _Again(Exception):
    """A round was lost, and is to be played again; `counts` unless it was because a worker left."""

    def __init__(self, message: str, *, counts: bool = True) -> None:
        super().__init__(message)
        self.counts = counts


class _Failed(Exception):
    """A task failed with what else says that fetching took too long; its cause is the task's error."""


def _names(lanes: Sequence[int]) -> str:
    """Name lanes in a key."""
    return " ".join(map(str, lanes))


def _close(key: Any, dask_worker: Any = None) -> None:
    """Close a run's readers on a worker."""
    work = dask_worker.data.get(key)
    if work is not None:
        threading.Thread(target=work.readers.close, name="streamgd-close", daemon=True).start()


_quiet = threading.Lock()
_n_quiet = 0
_loud: Any = None


@contextlib.contextmanager
def _quiet_about_size() -> Iterator[None]:
    """Keep Dask from advising against big arguments: states are sent on purpose.

    Dask's configuration belongs to the whole process: the first of several fits changes it, and the last restores it.
    """
    global _n_quiet, _loud
    import dask

    configuration: Any = dask.config
    with _quiet:
        if _n_quiet == 0:
            _loud = configuration.set({"distributed.admin.large-graph-warning-threshold": "100 GB"})
        _n_quiet += 1
    try:
        yield
    finally:
        with _quiet:
            _n_quiet -= 1
            if _n_quiet == 0:
                _loud.__exit__(None, None, None)
