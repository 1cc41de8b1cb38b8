"""How rounds are handed over to a cluster: the tasks of a flight, and where they belong.

How much is handed over at once is decided in `streamgd.run.pace`, and which worker has which lanes in
`streamgd.run.members`; what tasks do is in `streamgd.run.flights`. While one worker plays the first rounds of all
lanes, the others read: what they will need themselves or, of rows that are slow to decode, what that one needs of
their lanes (`streamgd.run.sent_rows`). Nothing of that is needed where workers hand one another what they found
(`streamgd.run.exchange`). Blocks of Dask collections are brought by `streamgd.run.delivery`.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from streamgd.learn.recipe import Packed
from streamgd.learn.state import State
from streamgd.run.asking import tell_workers, tell_workers_soon
from streamgd.run.delivery import Deliveries, Group
from streamgd.run.exchange import Circle, can_meet
from streamgd.run.flights import (
    WorkerWork,
    begin_reading,
    merge_flight,
    play_short,
    send_rows,
    share_rounds,
    take_turns,
    work_here,
)
from streamgd.run.graph import Graph, Key, keep
from streamgd.run.lane_rows import LanePlans
from streamgd.run.lanes import close_soon
from streamgd.run.members import Members
from streamgd.run.pace import Pace, Stretch
from streamgd.run.runs import Run
from streamgd.run.turns import Turns
from streamgd.run.worker_memory import WorkerMemory

#: States up to this size are sent with each task that needs them, others once.
_EMBEDDED_BYTES = 100_000
#: Seconds in which workers that did not meet do not try again, the first time and at most.
_APART_S, _MOST_APART_S = 30.0, 600.0
#: Messages that the threads of a worker send one another and others in a round, at most: each takes some 60 us of the
#: interpreter, which one of them has at a time. And bytes of what they hold of what came, beside each other.
_MOST_MESSAGES, _COPIES_BYTES = 32, 40_000_000
#: Priorities by age begin anew every so many seconds; at that moment newer tasks go before older ones.
_WRAP_S = 1e6


@dataclass(frozen=True)
class Flight:
    """Rounds on their way.

    Attributes
    ----------
    stretch : Stretch
        Which rounds.
    merged : Future
        Of what comes of each of them.
    groups : list of Group
        The lanes of each task, and where.
    last : list of Future
        What the next flight begins from; of an exchange, each group from its own.
    sent : dict of str to Future
        Rows that were read for it elsewhere, by the lanes that they are of.
    held : list of Future
        What else has to stay until the flight ends.
    chained : int
        How many flights went before, back to a state that the client has.
    """

    stretch: Stretch
    merged: Any
    groups: list[Group]
    last: list[Any]
    sent: dict[str, Any]
    held: list[Any]
    chained: int


class _Ahead(NamedTuple):
    """Rounds that come next, the lanes of each task and where, and futures of the tasks' blocks, of collections."""

    stretch: Stretch
    groups: list[Group]
    deliveries: list[Any]

    def starts_at(self, epoch: int, row: int) -> bool:
        rows = self.stretch.rows
        return (rows.epoch, rows.row) == (epoch, row)


class Dispatch:
    """Hands rounds over, and knows what of them is under way.

    Parameters
    ----------
    run : Run
        What is trained.
    client : distributed.Client
        Of the cluster.
    members : Members
        The workers.

    Attributes
    ----------
    pace : Pace
        How much is handed over at once.
    state_bytes : int
        Of a state.
    """

    def __init__(self, run: Run, client: Any, members: Members) -> None:
        self._client, self._members = client, members
        self._n_lanes = run.config.n_lanes
        memory = WorkerMemory.of(run)
        self.state_bytes = memory.state_bytes
        self._name = uuid.uuid4().hex[:12]
        source: Any = run.source
        self._plans = LanePlans.of(run)
        self._most_rows = self._plans.most_rows()
        self._deliveries: Deliveries | None = None
        if source.kind == "dask":
            self._lane_work = WorkerWork(run, source.detached())
            self._deliveries = Deliveries(run, client, members, self._plans, self._lane_work.token)
        else:
            self._lane_work = WorkerWork(run, source)
        self._works: dict[str, Any] = {}  # its future of each worker
        self._work_numbers = itertools.count()
        self._works_fit: list[str] | None = None  # who alone was fit when these were handed over
        self._sends = source.decodes_slowly
        self.pace = Pace(
            Turns.of(run),
            self._n_lanes,
            run.layout.row_bytes,
            self.state_bytes,
            # Of two tasks at a time; see `Members.has_room_to_send`.
            sent_bytes=self._n_lanes * memory.lane_bytes // 2,
            bounded=self._deliveries is not None,
        )
        self._flights = self._attempt = 0
        # When workers that did not meet may do so again, and after how long if they do not meet then.
        self._apart_until, self._apart_s = float("-inf"), _APART_S
        self._ahead: _Ahead | None = None
        self._hand_over_work()

    def _hand_over_work(self) -> None:
        """Have all workers that have lanes hold what their tasks need, unless they do."""
        addresses = {address for _, address in self._members.groups()}
        # The cluster may have been started afresh; or that of one worker may be on another, which alone was fit.
        same = self._works_fit == self._members.fit
        held = {at: each for at, each in self._works.items() if same and each.status in ("pending", "finished")}
        self._works = {address: held[address] for address in addresses & held.keys()}
        missing = sorted(addresses - held.keys())
        if missing:
            self._works_fit = self._members.fit
            graph, name = Graph(self._client, self._works_fit), f"lane-work-{self._name}-{next(self._work_numbers)}"
            keys = [graph.add((name, at), at, 20, keep, self._lane_work) for at in missing]
            self._works |= zip(missing, graph.hand_over(keys), strict=True)

    @property
    def computes(self) -> bool:
        """Whether blocks have to be computed, as those of a Dask collection."""
        return self._deliveries is not None

    def start_again(self, *, lost: bool) -> None:
        """Forget what was handed over; flights are dropped before. If no worker was `lost`, blocks stay in place."""
        self._ahead, self._attempt = None, self._attempt + 1
        # Whoever waits for a silent worker would have no thread for what comes; and nobody waits here for that one.
        tell_workers_soon(self._client, _give_up, self._lane_work.token, self._attempt, held=list(self._works.values()))
        if lost and self._deliveries is not None:
            self._deliveries.start_again()

    def close(self) -> None:
        """Release what the workers hold, and have them close what they opened."""
        self._ahead = None
        if self._deliveries is not None:
            self._deliveries.close()
        if self._client.status == "running":
            tell_workers(self._client, _close, self._lane_work.token)
        self._works.clear()

    def _stretch(self, epoch: int, row: int) -> Stretch:
        """Say which rounds to hand over next."""
        members = self._members
        sent = self._sends and bool(self._others()) and members.has_room_to_send
        groups = members.groups()
        kept = self._deliveries is not None and self._deliveries.kept(groups, epoch)
        # Where blocks have to come, whoever waits would keep the thread that computes them.
        there = self._deliveries is None or (kept and self._deliveries.arrived)
        exchanged = there and self._can_exchange(groups)
        return self.pace.next(epoch, row, len(groups), room=members.has_room, sent=sent, kept=kept, exchanged=exchanged)

    def _can_exchange(self, groups: Sequence[Group]) -> bool:
        """Whether the tasks of groups can hand one another what they found.

        Each of them holds by itself what it gets, and reads all of its lanes at once.
        """
        homes = [address for _, address in groups]
        n_threads = max(Counter(homes).values())
        # Beyond those that the plan counts, with a message that goes out and one that comes in.
        n_copies = (n_threads - 1) * len(groups) + 2
        return (
            time.monotonic() >= self._apart_until
            and self._members.fit is None
            and self._members.have_room
            and n_threads * (len(groups) - 1) <= _MOST_MESSAGES
            and n_copies * self.state_bytes <= _COPIES_BYTES
            and can_meet(homes)
        )

    def keep_apart(self) -> float:
        """Share rounds by tasks alone for a while: workers are busy with other tasks, or one of them was lost.

        Longer each time, until they have met. Return for how long.
        """
        apart_s = self._apart_s
        self._apart_until = time.monotonic() + apart_s
        self._apart_s = min(2 * apart_s, _MOST_APART_S)
        return apart_s

    def met(self) -> None:
        """Note that workers have met."""
        self._apart_s = _APART_S

    def _groups(self, stretch: Stretch) -> list[Group]:
        """Say which lanes take their turns in one task, and where."""
        if stretch.together:
            return [(list(range(self._n_lanes)), self._members.first)]
        return self._members.groups()

    def hand_over(self, start: State | None, packed: Packed, epoch: int, row: int, *, behind: Flight | None) -> Flight:
        """Hand the tasks of rounds to the scheduler, to begin from a state or from what came of the flight before."""
        ahead = self._with_blocks(epoch, row)
        stretch, groups, deliveries = ahead
        self._flights += 1
        name = f"{self._name}-{self._flights}"
        graph = Graph(self._client, self._members.fit)
        if behind is not None:
            starts = _beginnings(behind, groups)
        elif self.state_bytes > _EMBEDDED_BYTES:
            starts = [graph.add((f"round-state-{name}", epoch, row), None, 20, keep, start)] * len(groups)
        else:
            starts = [start] * len(groups)
        sent: dict[str, Key] = {}
        aside: list[Key] = []
        if stretch.together:
            leaving: list[int] = []
            if stretch.sent:
                sent, aside = self._add_sent(graph, name, stretch, behind)
            elif stretch.last:
                leaving = [lane for lanes, _ in self._others() for lane in lanes]
                aside = self._add_starts(graph, name, stretch)
            key: Key = (f"lane-rounds-{name}", epoch, row, len(stretch.spans))
            several = (
                self._works[groups[0][1]],
                starts[0],
                packed,
                stretch.spans,
                deliveries[0],
                leaving,
                list(sent.values()),
            )
            merged = graph.add(key, self._members.first, 10, play_short, *several)
            last = [merged]
        elif stretch.exchanged:
            last = self._add_exchanged(graph, name, starts, packed, ahead)
            merged = last[0]
        else:
            merged, last = self._add_shared(graph, name, starts, packed, ahead)
        wanted = [merged, *last, *sent.values(), *aside]
        futures = dict(zip(wanted, graph.hand_over(wanted), strict=True))
        held = [*filter(None, deliveries), *(futures[key] for key in aside)]
        return Flight(
            stretch,
            futures[merged],
            groups,
            [futures[key] for key in last],
            {lanes: futures[key] for lanes, key in sent.items()},
            held,
            0 if behind is None else behind.chained + 1,
        )

    def _add_shared(
        self, graph: Graph, name: str, starts: Sequence[Any], packed: Packed, ahead: _Ahead
    ) -> tuple[Key, list[Key]]:
        """Add rounds that workers share; return what comes of them, and what the next flight begins from."""
        stretch, groups, deliveries = ahead
        firsts: list[Key] = []
        last: list[Key] = []
        for span in stretch.spans:
            last = []
            for (lanes, address), start, delivery in zip(groups, starts, deliveries, strict=True):
                key: Key = (f"lane-turns-{name}", span.epoch, span.row, _text(lanes))
                arguments = self._works[address], start, packed, lanes, span, delivery
                last.append(graph.add(key, address, 10, take_turns, *arguments))
            firsts.append(last[0])
            starts = [last] * len(groups)
        key = (f"merge-lanes-{name}", stretch.rows.epoch, stretch.rows.end)
        merged = graph.add(key, groups[0][1], 20, merge_flight, firsts, last, packed)
        return merged, last if self.pace.few(len(groups)) else [merged]

    def _add_exchanged(
        self, graph: Graph, name: str, starts: Sequence[Any], packed: Packed, ahead: _Ahead
    ) -> list[Key]:
        """Add rounds that workers share by an exchange; return what comes of them, by group."""
        stretch, groups, deliveries = ahead
        rows, homes = stretch.rows, [address for _, address in groups]
        # Those that were handed over first go first on all workers: else fits would often wait for one another.
        priority = 10 - time.time() % _WRAP_S / _WRAP_S
        last: list[Key] = []
        for index, ((lanes, address), start, delivery) in enumerate(zip(groups, starts, deliveries, strict=True)):
            key: Key = (f"lane-rounds-{name}", rows.epoch, rows.row, len(stretch.spans), _text(lanes))
            circle = Circle(self._attempt, self._flights, homes, index)
            arguments = self._works[address], start, packed, lanes, stretch.spans, delivery, circle
            last.append(graph.add(key, address, priority, share_rounds, *arguments))
        return last

    def _add_sent(
        self, graph: Graph, name: str, stretch: Stretch, behind: Flight | None
    ) -> tuple[dict[str, Key], list[Key]]:
        """Have lanes read where they belong for who plays alone, who begins with its own meanwhile."""
        rows = stretch.rows
        sent: dict[str, Key] = {}
        for lanes, address in self._others():
            # After what it sent before, if it has the same lanes still: whichever task comes to it first.
            before = None if behind is None else behind.sent.get(_text(lanes))
            key = (f"lane-rows-{name}", rows.epoch, rows.row, _text(lanes))
            arguments = self._works[address], lanes, address, rows, before
            sent[_text(lanes)] = graph.add(key, address, 15, send_rows, *arguments)
        if behind is not None:
            return sent, []
        first = self._members.first
        mine = [lane for lanes, address in self._members.groups() if address == first for lane in lanes]
        return sent, [self._add_start(graph, name, (mine, first), rows.epoch, rows.row)]

    def _add_starts(self, graph: Graph, name: str, stretch: Stretch) -> list[Key]:
        """Have lanes begin to read where they go after these rounds."""
        groups, (epoch, end) = self._members.groups(), (stretch.rows.epoch, stretch.rows.end)
        deliveries: list[Any] = [None] * len(groups)
        if self._deliveries is not None:
            if not self._deliveries.kept(groups, epoch):
                return []  # their blocks come with the next rounds
            deliveries = self._deliveries.bring(self._works, stretch.rows, groups, shared=True)
        return [
            self._add_start(graph, name, group, epoch, end, delivery)
            for group, delivery in zip(groups, deliveries, strict=True)
            if group[1] != self._members.first
        ]

    def _add_start(self, graph: Graph, name: str, group: Group, epoch: int, row: int, delivery: Any = None) -> Key:
        lanes, address = group
        key = (f"lane-starts-{name}", epoch, row, _text(lanes))
        return graph.add(key, address, 20, begin_reading, self._works[address], lanes, epoch, row, delivery)

    def _others(self) -> list[Group]:
        """Return the lanes of all workers but the one that plays by itself what is not shared."""
        return [(lanes, address) for lanes, address in self._members.groups() if address != self._members.first]

    def following(self, flight: Flight) -> tuple[int, int] | None:
        """Return the epoch and row where the flight behind one begins; None if there is none."""
        rows = flight.stretch.rows
        return self._plans.following(rows.epoch, rows.end, self._most_rows)

    def deliver_ahead(self, epoch: int, row: int) -> None:
        """Have the lanes read on over rounds that cannot be handed over yet."""
        self._ahead = self._with_blocks(epoch, row)

    def _with_blocks(self, epoch: int, row: int) -> _Ahead:
        """Say which rounds come next and where, and have their blocks come, if they were not delivered ahead."""
        self._hand_over_work()
        ahead, self._ahead = self._ahead, None
        if (
            ahead is not None
            and ahead.starts_at(epoch, row)
            and self._groups(ahead.stretch) == ahead.groups
            and (not ahead.stretch.exchanged or self._can_exchange(ahead.groups))
        ):
            return ahead  # else lanes have gone elsewhere, or are apart
        stretch = self._stretch(epoch, row)
        groups = self._groups(stretch)
        if self._deliveries is None:
            return _Ahead(stretch, groups, [None] * len(groups))
        shared = not stretch.together
        return _Ahead(stretch, groups, self._deliveries.bring(self._works, stretch.rows, groups, shared=shared))


def drop(flight: Flight | None) -> None:
    """Let go of a flight, even if a traceback holds its futures: what nobody wants, the scheduler gives up.

    Cancelling would give up what depends on it too, which the scheduler takes for what some client wants.
    """
    if flight is None:
        return
    with contextlib.suppress(Exception):
        for future in dict.fromkeys([flight.merged, *flight.last, *flight.sent.values(), *flight.held]):
            future.release()


def _beginnings(behind: Flight, groups: Sequence[Group]) -> list[Any]:
    """Return what each group begins from behind a flight: after an exchange, what is on its own worker already."""
    if not behind.stretch.exchanged:
        return [behind.last] * len(groups)
    if behind.groups == groups:
        return [[each] for each in behind.last]
    return [[behind.merged]] * len(groups)


def _text(lanes: Sequence[int]) -> str:
    return " ".join(map(str, lanes))


def _give_up(token: bytes, attempt: int) -> None:
    """Have nobody on a worker wait for others that were to share rounds of earlier attempts."""
    work = work_here(token)
    if work is not None:
        work.exchange.give_up(attempt)


def _close(token: bytes) -> None:
    """Close a run's readers on a worker."""
    work = work_here(token)
    if work is not None:
        close_soon(work)
