"""Rounds on a Dask cluster.

A round is a task for the lanes of each worker's thread; it begins by merging what the round before found, and several
rounds are handed over at once, with one task that tells the client what came of them: a flight
(`streamgd.run.flights`). Rounds that one worker plays sooner by itself, as the first ones are, make one task together
(`streamgd.run.pace`). Each task is pure and has a key of its own, made of the run, the epoch, the round and the lanes,
so Dask may run it anywhere, again or late. The client keeps the state of the last round that it was told of, from which
rounds that are lost with a worker are played again; the next flight is handed over while one is under way, so that no
worker waits for the client. Nothing that happens on the cluster can change what comes of it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from streamgd.errors import ClusterError, DataError, OptionError, StreamgdError
from streamgd.learn.recipe import Packed
from streamgd.learn.state import State
from streamgd.run.config import RunOptions
from streamgd.run.delivery import DeliveredBlocks
from streamgd.run.epochs import Watcher
from streamgd.run.flights import (
    Unfit,
    WorkerWork,
    begin_reading,
    deliver,
    keep,
    merge_flight,
    play_short,
    send_rows,
    take_turns,
)
from streamgd.run.graph import Graph, Key
from streamgd.run.members import Members
from streamgd.run.pace import Pace, Stretch
from streamgd.run.rounds import Crew, Round
from streamgd.run.runs import Run
from streamgd.run.turns import Turns
from streamgd.run.workers import lane_bytes

#: How often to look whether somebody asked to stop.
_POLL_S = 0.25
#: A merged state comes to the client at so many bytes a second at least, after two seconds at most.
_FETCH_RATE, _FETCH_S = 10e6, 2.0
#: Times that a round is played again before what keeps it from ending is taken to be for good.
_MOST_ATTEMPTS = 5
#: Times that workers may leave over the same round before it is taken to be what ends them.
_MOST_LOSSES = 20
#: States up to this size are sent with each task that needs them, others once.
_EMBEDDED_BYTES = 100_000


@dataclass(frozen=True)
class Flight:
    """Rounds on their way.

    Attributes
    ----------
    stretch : Stretch
        Which rounds.
    merged : Future
        Of what comes of each of them.
    last : list of Future
        What the next flight begins from.
    sent : dict of str to Future
        Rows that were read for it elsewhere, by the lanes that they are of.
    held : list of Future
        What else has to stay until the flight ends.
    chained : int
        How many flights went before, back to a state that the client has.
    """

    stretch: Stretch
    merged: Any
    last: list[Any]
    sent: dict[str, Any]
    held: list[Any]
    chained: int


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
        self._client, self._stop = client, stop
        self._n_lanes = run.config.n_lanes
        self._state_bytes = sum(array.nbytes for array in run.state.to_tensors().values())
        self._name = uuid.uuid4().hex[:12]
        source: Any = run.source
        self._blocks: DeliveredBlocks | None = None
        if source.kind == "dask":
            self._blocks = DeliveredBlocks(run, client)
            source = source.detached()
        self._sends = source.decodes_slowly
        self._pace = Pace(
            Turns.of(run),
            self._n_lanes,
            run.layout.row_bytes,
            self._state_bytes,
            # Of two tasks at a time; see `Members.has_room_to_send`.
            sent_bytes=self._n_lanes * lane_bytes(run) // 2 if self._sends else None,
            bounded=self._blocks is not None,
        )
        self._closed = False
        self._next: Flight | None = None
        self._flown_from: State | None = None
        self._played: deque[Round] = deque()  # rounds that came with others before them
        self._round_s = 0.0
        self._flights = self._attempt = 0
        self._ahead: tuple[Stretch, list[Any]] | None = None  # what comes next, and futures of its blocks
        self._members = Members(run, client, options.workers_timeout_s, watcher, stop)
        self._lane_work = WorkerWork(run, source)
        self._hand_over_work()

    def _hand_over_work(self) -> None:
        graph = Graph(self._client, None)
        key = graph.add(f"lane-work-{self._name}-{self._attempt}", None, 0, keep, self._lane_work)
        (self._work,) = graph.hand_over([key])

    @property
    def workers(self) -> int | None:
        """How many workers take part."""
        return len(self._members)

    @property
    def round_s(self) -> float | None:
        """Seconds of each of the rounds that came last, on average."""
        return self._round_s

    def play(self, start: State, packed: Packed, row: int, end: int, stop: threading.Event) -> Round | None:
        """Play a round, again if need be; see `Crew.play`."""
        lost = left = 0
        if self._played and self._flown_from is start:
            return self._hand_out()
        self._played.clear()
        while not stop.is_set():
            began = time.monotonic()
            flight, self._next = self._next, None
            if flight is None or self._flown_from is not start:
                self._drop(flight)
                flight = self._submit(start, packed, start.epoch, row, behind=None)
            try:
                self._look()
                if stop.is_set():
                    return None  # perhaps without a worker: nobody is waited for then
                stretch = flight.stretch
                if self._pace.may_chain(stretch, flight.chained):
                    self._next = self._submit(flight.last, packed, stretch.epoch, stretch.ends[-1], behind=flight)
                elif self._blocks is not None:
                    self._deliver_ahead(stretch.epoch, stretch.ends[-1])
                while not self._finished(flight.merged):
                    if stop.is_set():
                        return None
                    self._look()
                self._played.extend(self._result(flight))
                took_s = time.monotonic() - began
                self._pace.ended(stretch, flight.chained, self._played, took_s)
                self._round_s = took_s / len(self._played)
                return self._hand_out()
            except _Again as again:
                lost += again.counts
                left += not again.counts
                self._drop(flight)
                self._drop_next()
                if lost >= _MOST_ATTEMPTS or left >= _MOST_LOSSES:
                    raise ClusterError(
                        f"a round was lost {lost + left} times: {again}. If workers die, see their logs; they may have "
                        "too little memory"
                    ) from again.__cause__
                self._start_again()
            finally:
                self._drop(flight)
        return None

    def _start_again(self) -> None:
        """Forget what was handed over, and see which workers are left.

        In this order, and after flights are dropped: with the question who is there, the scheduler learns that nobody
        wants a collection's blocks any more. Those that it was to compute on a worker that is gone, when there was no
        other, wait for that one for good; asked for again too soon, they would be the same tasks, of the same keys.
        """
        self._ahead, self._attempt = None, self._attempt + 1
        if self._blocks is not None:
            self._blocks.clear()
        if self._work.status not in ("pending", "finished"):  # the cluster was started afresh
            self._hand_over_work()
        self._look(now=True, lose=False)

    def _look(self, *, now: bool = False, lose: bool = True) -> None:
        """See whether workers came or went; a round is lost with one that had lanes."""
        gone = self._members.look(now=now)
        if gone is not None and lose:
            raise _Again(f"{gone} left", counts=False)

    def _hand_out(self) -> Round:
        """Return the next round, and remember where the one after it begins."""
        found = self._played.popleft()
        self._flown_from = found.state
        return found

    def _stretch(self, epoch: int, row: int) -> Stretch:
        """Say which rounds to hand over next: those that blocks were delivered for, if any were."""
        if self._ahead is not None and (self._ahead[0].epoch, self._ahead[0].row) == (epoch, row):
            return self._ahead[0]
        members = self._members
        return self._pace.next(epoch, row, len(members.groups()), room=members.has_room)

    def _groups(self, stretch: Stretch) -> list[tuple[list[int], str]]:
        """Say which lanes take their turns in one task, and where."""
        if stretch.together:
            return [(list(range(self._n_lanes)), self._members.first)]
        return self._members.groups()

    def _submit(self, start: Any, packed: Packed, epoch: int, row: int, *, behind: Flight | None) -> Flight:
        """Hand the tasks of rounds to the scheduler, to begin from a state or from what came of the rounds before."""
        stretch = self._stretch(epoch, row)
        groups = self._groups(stretch)
        deliveries = self._delivered(stretch, groups)
        self._ahead = None  # the flight holds its own
        self._flights += 1
        name = f"{self._name}-{self._flights}"
        graph = Graph(self._client, self._members.fit)
        if behind is None and self._state_bytes > _EMBEDDED_BYTES:
            start = graph.add((f"round-state-{name}", epoch, row), None, 20, keep, start)
        sent: dict[str, Key] = {}
        aside: list[Key] = []
        if stretch.together:
            leaving: list[int] = []
            if self._sends and self._others() and self._members.has_room_to_send:
                sent, aside = self._add_sent(graph, name, stretch, behind)
            elif stretch.last:
                leaving = [lane for lanes, _ in self._others() for lane in lanes]
                aside = self._add_starts(graph, name, stretch)
            key: Key = (f"lane-rounds-{name}", epoch, row, len(stretch.ends))
            several = self._work, start, packed, row, stretch.ends, deliveries[0], leaving, list(sent.values())
            merged = graph.add(key, self._members.first, 10, play_short, *several)
            last = [merged]
        else:
            merged, last = self._add_shared(graph, name, start, packed, stretch, groups, deliveries)
        wanted = [merged, *last, *sent.values(), *aside]
        futures = dict(zip(wanted, graph.hand_over(wanted), strict=True))
        held = [*filter(None, deliveries), *(futures[key] for key in aside)]
        return Flight(
            stretch,
            futures[merged],
            [futures[key] for key in last],
            {lanes: futures[key] for lanes, key in sent.items()},
            held,
            0 if behind is None else behind.chained + 1,
        )

    def _add_shared(
        self,
        graph: Graph,
        name: str,
        start: Any,
        packed: Packed,
        stretch: Stretch,
        groups: Sequence[tuple[list[int], str]],
        deliveries: Sequence[Any],
    ) -> tuple[Key, list[Key]]:
        """Add rounds that workers share; return what comes of them, and what the next flight begins from."""
        row = stretch.row
        firsts: list[Key] = []
        last: list[Key] = []
        for end in stretch.ends:
            last = []
            for (lanes, address), delivery in zip(groups, deliveries, strict=True):
                key: Key = (f"lane-turns-{name}", stretch.epoch, row, _text(lanes))
                arguments = self._work, start, packed, lanes, row, end, delivery
                last.append(graph.add(key, address, 10, take_turns, *arguments))
            firsts.append(last[0])
            start, row = last, end
        key = (f"merge-lanes-{name}", stretch.epoch, row)
        merged = graph.add(key, groups[0][1], 20, merge_flight, firsts, last, packed)
        return merged, last if self._pace.few(len(groups)) else [merged]

    def _add_sent(
        self, graph: Graph, name: str, stretch: Stretch, behind: Flight | None
    ) -> tuple[dict[str, Key], list[Key]]:
        """Have lanes read where they belong for who plays alone, who begins with its own meanwhile."""
        epoch, row, end = stretch.epoch, stretch.row, stretch.ends[-1]
        sent: dict[str, Key] = {}
        for lanes, address in self._others():
            # After what was read before, whichever comes to the worker first.
            arguments = self._work, lanes, epoch, row, end, None if behind is None else behind.sent.get(_text(lanes))
            key = (f"lane-rows-{name}", epoch, row, _text(lanes))
            sent[_text(lanes)] = graph.add(key, address, 15, send_rows, *arguments)
        if behind is not None:
            return sent, []
        first = self._members.first
        mine = [lane for lanes, address in self._members.groups() if address == first for lane in lanes]
        return sent, [self._add_start(graph, name, mine, first, epoch, row)]

    def _add_starts(self, graph: Graph, name: str, stretch: Stretch) -> list[Key]:
        """Have lanes begin to read where they go after these rounds."""
        if self._blocks is not None:
            return []
        epoch, row = stretch.epoch, stretch.ends[-1]
        return [self._add_start(graph, name, lanes, address, epoch, row) for lanes, address in self._others()]

    def _add_start(self, graph: Graph, name: str, lanes: list[int], address: str, epoch: int, row: int) -> Key:
        key = (f"lane-starts-{name}", epoch, row, _text(lanes))
        return graph.add(key, address, 20, begin_reading, self._work, lanes, epoch, row)

    def _others(self) -> list[tuple[list[int], str]]:
        """Return the lanes of all workers but the one that plays by itself what is not shared."""
        return [(lanes, address) for lanes, address in self._members.groups() if address != self._members.first]

    def _deliver_ahead(self, epoch: int, row: int) -> None:
        """Have the lanes read on where the next round cannot be handed over yet."""
        assert self._blocks is not None
        following = self._blocks.next_turn(epoch, row)
        if following is not None:
            stretch = self._stretch(*following)
            self._ahead = stretch, self._delivered(stretch, self._groups(stretch))

    def _delivered(self, stretch: Stretch, groups: Sequence[tuple[list[int], str]]) -> list[Any]:
        """Bring blocks of a Dask collection to the lanes that need them, and have these fill windows meanwhile.

        A turn's own blocks would come only once the merge before it is done, because then it is given to a worker; and
        a turn that names one task in place of all blocks is cheaper to schedule.
        """
        if self._blocks is None:
            return [None] * len(groups)
        epoch, row, end = stretch.epoch, stretch.row, stretch.ends[-1]
        at = {lane: address for lanes, address in groups for lane in lanes}
        blocks = self._blocks.deliver(epoch, row, end, at, self._members.fit)
        graph = Graph(self._client, self._members.fit)
        keys = []
        for lanes, address in groups:
            # The same turn of the same lanes has the same key: what was delivered ahead is not delivered again.
            key = (f"lane-blocks-{self._name}-{self._attempt}", epoch, row, end, _text(lanes))
            numbers = [list(blocks[lane]) for lane in lanes]
            computed = [list(blocks[lane].values()) for lane in lanes]
            keys.append(graph.add(key, address, 15, deliver, self._work, epoch, row, end, lanes, numbers, computed))
        return graph.hand_over(keys)

    def _drop(self, flight: Flight | None) -> None:
        """Let go of a flight, even if a traceback holds its futures: what nobody wants, the scheduler gives up.

        Cancelling would give up what depends on it too, which the scheduler takes for what some client wants.
        """
        if flight is None:
            return
        with contextlib.suppress(Exception):
            for future in dict.fromkeys([flight.merged, *flight.last, *flight.sent.values(), *flight.held]):
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
            with self._client.as_current():  # it need not be the process's default
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
        size = len(flight.stretch.ends) * self._state_bytes
        patience_s = _FETCH_S + size / _FETCH_RATE
        for _ in range(_MOST_ATTEMPTS):
            if self._stop.is_set():
                break
            try:
                found: list[Round] = flight.merged.result(timeout=patience_s).rounds
                return found
            except TimeoutError as err:
                if flight.merged.status == "error":  # it is the task's own
                    raise _Failed(str(err)) from err
            self._look()
        raise TimeoutError(f"a state of {size:,} bytes did not come within {_MOST_ATTEMPTS * patience_s:.0f} s")

    def close(self) -> None:
        """Release what the workers hold, and have them close what they opened. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._drop_next()
        self._ahead = None
        if self._blocks is not None:
            self._blocks.clear()
        if self._client.status == "running":
            with contextlib.suppress(Exception):
                self._client.run(_close, self._work.key, on_error="ignore")
        del self._work


def _text(lanes: Sequence[int]) -> str:
    return " ".join(map(str, lanes))


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


def _close(key: Any, dask_worker: Any = None) -> None:
    """Close a run's readers on a worker."""
    work = dask_worker.data.get(key)
    if work is not None:
        threading.Thread(target=work.readers.close, name="streamgd-close", daemon=True).start()
