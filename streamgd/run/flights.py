"""What workers do with rounds that were handed over at once: a flight.

Rounds follow one another without the client, and without a task of their own for merging: a turn is handed what the
round before found, in a few parts, and merges it itself. That is one way to the scheduler and back less in each round,
for milliseconds of arithmetic that every worker does for itself. With an exchange a flight is one task for each group
of lanes. What comes of all of it is a pure function of what it is given, or nothing: see `streamgd.run.lanes`.
"""

from __future__ import annotations

import contextlib
import pickle
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from streamgd.data.sources.base import Source
from streamgd.data.window import Stopped
from streamgd.learn import kernels
from streamgd.learn.recipe import Packed
from streamgd.learn.state import State
from streamgd.run.epochs import closed_epoch
from streamgd.run.exchange import ApartError, Circle, Exchange
from streamgd.run.in_place import Handed
from streamgd.run.lane_rows import Delivery
from streamgd.run.lanes import LaneWork, close_soon, open_reader, read_ahead, take_turn
from streamgd.run.rounds import Part, Round, joined, merge_parts, play_rounds
from streamgd.run.runs import Run
from streamgd.run.sent_rows import SentRows
from streamgd.run.turns import Span
from streamgd.run.versions import differing_versions, versions
from streamgd.run.worker_memory import WorkerMemory
from streamgd.run.workers import usable_memory

#: What has more bytes of arrays than this, and arrays of more than these on average, travels array by array, without a
#: copy.
_SMALL_BYTES, _SMALL_ARRAY_BYTES = 1 << 16, 1 << 14


class Unfit(Exception):
    """A turn came to a worker that cannot take it."""


class WorkerWork(LaneWork):
    """The work of a worker's lanes, of as many at once as it has room for.

    Parameters
    ----------
    run : Run
        What is trained.
    source : Source
        What stands for the run's source on workers.

    Attributes
    ----------
    token : bytes
        Of this run; what its workers know of one another by.

    Notes
    -----
    However often it comes to a process, there is one of it: readers and exchange are its own. Each worker has a task
    that holds it, rather than a replica of another's: Dask drops one of several replicas when nobody waits for it.
    """

    def __init__(self, run: Run, source: Source) -> None:
        self.token = secrets.token_bytes(16)
        super().__init__(run, source, n_threads=1, most_readers=1)
        self._config, self._tol = run.config, run.config.absolute_tol(run.survey.null_loss)
        self._versions, self._memory = versions(), WorkerMemory.of(run)

    def _start_afresh(self) -> None:
        super()._start_afresh()
        self.exchange = Exchange(self.token)
        weakref.finalize(self, close_soon, self.exchange).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        return {name: value for name, value in super().__getstate__().items() if name != "exchange"}

    def __reduce__(self) -> Any:
        """Be what is in the process already that it comes to."""
        return _unpickled, (self.token, self.__getstate__())

    def close(self) -> None:
        """Have nobody wait here any more, and close what is open."""
        self.readers.stopping = True
        self.exchange.close()
        self.readers.close()

    def make_ready(self) -> None:
        """Give the lanes as many threads and readers as the worker that this runs on has room for.

        Raises
        ------
        Unfit
            If the worker has other versions than the client.
        """
        from distributed import get_worker

        _works.setdefault(self.token, self)  # which was not pickled, where workers are threads
        wrong = differing_versions(versions(), self._versions)
        if wrong is not None:
            raise Unfit(f"a worker has other versions: {wrong}")
        worker = get_worker()
        limit = usable_memory(worker)
        self.n_threads = int(worker.state.nthreads)
        self.most_readers = self._memory.lanes_kept(self.n_threads, limit)
        self.n_windows = self._memory.windows_kept(self.n_threads, self.most_readers, limit)

    def begin(self, beginning: Beginning, packed: Packed, epoch: int) -> tuple[State, Round | None]:
        """Return the state that rounds of an epoch begin from, and the round that it came from if that was merged here.

        The epoch before is closed here as the client closes it, so that nobody waits for the client. The recipe is that
        of the new epoch; to merge, it says the same.
        """
        state, before = _begun(beginning, packed)
        if state.epoch < epoch and state.counters[kernels.STATUS] == kernels.OK:
            state = replace(state, **closed_epoch(state, self._config, self._tol))
        return state, before


_works: weakref.WeakValueDictionary[bytes, WorkerWork] = weakref.WeakValueDictionary()
_unpickling = threading.Lock()


def work_here(token: bytes) -> WorkerWork | None:
    """Return the work of a run in this process, if it came here."""
    return _works.get(token)


def _unpickled(token: bytes, state: dict[str, Any]) -> WorkerWork:
    with _unpickling:
        found = _works.get(token)
        if found is None:
            found = object.__new__(WorkerWork)
            found.__setstate__(state)
            _works[token] = found
        return found


class _InOnePiece:
    """Travels in one piece if it is small: Dask sends each array by itself, which takes longer than a small one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        arrays: list[pickle.PickleBuffer] = []
        rest = pickle.dumps(self.__dict__, protocol=5, buffer_callback=arrays.append)
        if sum(array.raw().nbytes for array in arrays) > max(_SMALL_BYTES, len(arrays) * _SMALL_ARRAY_BYTES):
            return super().__reduce_ex__(protocol)
        return _put_together, (type(self), rest, [bytearray(array) for array in arrays])


def _put_together(kind: Any, rest: bytes, arrays: list[bytearray]) -> Any:
    made = object.__new__(kind)
    made.__dict__.update(pickle.loads(rest, buffers=arrays))
    return made


@dataclass(frozen=True)
class Taken(_InOnePiece):
    """What the turns of a group of lanes gave.

    Attributes
    ----------
    part : Part
        What they found.
    end : int
        Row of each lane's epoch where they ended.
    start : State or None
        Where they began; the group of lane 0 alone has it, so that it travels once.
    before : Round or None
        The round whose merge is `start`, its epoch closed if it ended there, if it was merged for this; with `start`.
    """

    part: Part
    end: int
    start: State | None
    before: Round | None


@dataclass(frozen=True)
class Flown(_InOnePiece):
    """What came of the rounds of a flight.

    Attributes
    ----------
    rounds : list of Round
        In order; none if those that were to play them did not meet, or came apart.
    took_s : float
        Seconds from when these met; 0 if they did not have to.
    apart : str
        Why they did not.
    """

    rounds: list[Round]
    took_s: float = 0.0
    apart: str = ""


#: Where rounds begin: a state, what came of a flight, or the groups of a round that is not merged yet.
Beginning: TypeAlias = State | Sequence[Flown] | Sequence[Taken]


@contextlib.contextmanager
def _unless_over(work: LaneWork) -> Iterator[None]:
    """Leave off without an error if the run has ended meanwhile: what is under way then, nobody waits for."""
    try:
        yield
    except Stopped:
        if not work.readers.stopping:
            raise


@dataclass(frozen=True)
class Held:
    """Blocks of some lanes that stay on a worker.

    Attributes
    ----------
    blocks : mapping of int to mapping of int to computed blocks
        By lane and number.
    n_bytes : int
        Of them all, for Dask.
    """

    blocks: Mapping[int, Mapping[int, Any]]
    n_bytes: int

    def __sizeof__(self) -> int:
        """Tell Dask how much this is, should it look for a worker that has room for it."""
        return object.__sizeof__(self) + self.n_bytes


def hold(lanes: Sequence[int], numbers: Sequence[Sequence[int]], blocks: Sequence[Sequence[Any]], n_bytes: int) -> Held:
    """Hold blocks of some lanes where these are read."""
    each = zip(lanes, numbers, blocks, strict=True)
    return Held({lane: dict(zip(some, computed, strict=True)) for lane, some, computed in each}, n_bytes)


def deliver(
    work: LaneWork,
    span: Span,
    n_epochs: int,
    lanes: Sequence[int],
    numbers: Sequence[Sequence[int]],
    blocks: Sequence[Sequence[Any]],
    held: Sequence[Held],
    handed: Handed,
    n_bytes: int,
    attempt: int,
) -> dict[int, Delivery]:
    """Put blocks of some lanes where turns can find them, and those that are held, or handed over to be read in place.

    Readers go on over them.
    """
    found = {}
    for lane, some, computed in zip(lanes, numbers, blocks, strict=True):
        known = {number: block for each in held for number, block in each.blocks[lane].items()}
        known |= zip(some, computed, strict=True)
        known |= handed.blocks[lane]
        found[lane] = Delivery(span, known, n_epochs, n_bytes // len(lanes), attempt)
        work.readers.expect(lane, found[lane])
    return found


def begin_reading(
    work: WorkerWork, lanes: Sequence[int], epoch: int, row: int, delivered: Mapping[int, Delivery] | None
) -> None:
    """Have lanes that come to this worker read what they begin with; that this may be too late is all the same."""
    work.make_ready()
    with _unless_over(work):
        for lane in lanes:
            read_ahead(work, lane, epoch, row, None if delivered is None else delivered[lane])


def send_rows(work: WorkerWork, lanes: Sequence[int], home: str, span: Span, after: Any) -> list[SentRows]:
    """Read the rows of some lanes for who plays their first rounds.

    Where the lanes have their `home`, their readers stay. `after` is what was sent before, if anything: so that rows
    are read in order.
    """
    del after
    work.make_ready()
    found = []
    at_home = _is_at(home)
    with _unless_over(work):
        if at_home:  # the first windows of all are filled before any lane's second
            for lane in lanes:
                read_ahead(work, lane, span.epoch, span.row)
        for lane in lanes:
            reader = open_reader(work, lane, span.epoch, span.row, None)
            try:
                found.append(SentRows.read(reader, span.n_rows))
            except BaseException:
                work.readers.discard(reader)
                raise
            if at_home:
                work.readers.give_back(reader, work.most_readers)
            else:  # a worker that plays alone has no room for them beside the rows
                work.readers.discard(reader)
    return found


def take_turns(
    work: WorkerWork,
    beginning: Beginning,
    packed: Packed,
    lanes: Sequence[int],
    span: Span,
    delivered: Mapping[int, Delivery] | None,
) -> Taken:
    """Take the turns of some lanes, neighbours joined as soon as they are there."""
    work.make_ready()
    start, before = work.begin(beginning, packed, span.epoch)
    part = Part.nothing(lanes)
    with _unless_over(work):
        if start.counters[kernels.STATUS] == kernels.OK:  # or there is nothing to go on from
            found = Part.nothing([])
            for lane in lanes:
                turn = take_turn(work, start, packed, lane, span, None if delivered is None else delivered[lane])
                found = joined([found, Part.of(lane, turn)], work.plans.n_lanes)
            part = found
    first = 0 in lanes
    return Taken(part, span.end, start if first else None, before if first else None)


def play_short(
    work: WorkerWork,
    beginning: Beginning,
    packed: Packed,
    spans: Sequence[Span],
    delivered: Mapping[int, Delivery] | None,
    leaving: Sequence[int],
    sent: Sequence[Sequence[SentRows]],
) -> Flown:
    """Play several short rounds on one worker, of lanes that leave it then, or whose rows others have sent."""
    work.make_ready()
    rows = [each for some in sent for each in some]
    start, _ = work.begin(beginning, packed, spans[0].epoch)
    found = [Round(start, True, 0, 0.0)]
    with _unless_over(work):
        found = play_rounds(work, start, packed, spans, delivered, leaving, rows)
    return Flown(found)


def share_rounds(
    work: WorkerWork,
    beginning: Beginning,
    packed: Packed,
    lanes: Sequence[int],
    spans: Sequence[Span],
    delivered: Mapping[int, Delivery] | None,
    circle: Circle,
) -> Flown:
    """Take the turns of some lanes in several rounds, and hand what came of them to those that take the others'.

    The group of lane 0 tells all rounds, others the last one alone, from which they go on.
    """
    work.make_ready()
    played: list[Round] = []
    met = time.perf_counter()
    try:
        state, _ = work.begin(beginning, packed, spans[0].epoch)
        with _unless_over(work), work.exchange.among(circle) as gather:
            met = time.perf_counter()
            if not _is_at(circle.home):
                raise ApartError("this was given to another worker")
            played = play_rounds(work, state, packed, spans, delivered, lanes=lanes, gather=gather)
    except ApartError as err:
        return Flown([], apart=str(err))
    return Flown(played, time.perf_counter() - met)


def _is_at(address: str) -> bool:
    """Whether this worker is the one that the scheduler knows under an address; it may know itself by a name."""
    from distributed import get_worker
    from distributed.comm.addressing import resolve_address

    mine = get_worker().address
    return bool(mine == address or resolve_address(mine) == address)


def merge_flight(firsts: Sequence[Taken], last: Sequence[Taken], packed: Packed) -> Flown:
    """Say what came of each round of a flight: of all but the last, lane 0's group of the round after it knows.

    Parameters
    ----------
    firsts : sequence of Taken
        Of lane 0's group, in each round.
    last : sequence of Taken
        Every group's of the last round.
    packed : Packed
        The recipe.
    """
    before = [taken.before for taken in firsts[1:]]  # what was before the first is the flight before's
    found = [each for each in before if each is not None]
    assert len(found) == len(before), "rounds are told by the group of lane 0"
    return Flown([*found, _merged(last, packed)])


def _merged(groups: Sequence[Taken], packed: Packed) -> Round:
    (start,) = (taken.start for taken in groups if taken.start is not None)
    return merge_parts(start, [taken.part for taken in groups], packed, groups[0].end)


def _begun(beginning: Beginning, packed: Packed) -> tuple[State, Round | None]:
    """Return the state that a round begins from, and the round that it came from if that was merged here."""
    if isinstance(beginning, State):
        return beginning, None
    groups = [each for each in beginning if isinstance(each, Taken)]
    if groups:
        found = _merged(groups, packed)
        return found.state, found
    (flown,) = (each for each in beginning if isinstance(each, Flown))
    if not flown.rounds:
        raise ApartError(flown.apart)
    return flown.rounds[-1].state, None
