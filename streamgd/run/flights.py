"""What workers do with rounds that were handed over at once: a flight.

Rounds follow one another without the client, and without a task of their own for merging: a turn is handed what the
round before found, in a few parts, and merges it itself. That is one way to the scheduler and back less in each round,
for milliseconds of arithmetic that every worker does for itself. All of it is pure: see `streamgd.run.lanes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from streamgd.learn import kernels
from streamgd.learn.recipe import Packed
from streamgd.learn.state import State
from streamgd.run.lane_rows import Delivery
from streamgd.run.lanes import LaneWork, take_turn
from streamgd.run.rounds import Part, Round, joined, merge_parts, play_rounds
from streamgd.run.workers import lanes_kept, same_versions


class Unfit(Exception):
    """A turn came to a worker that cannot take it."""


@dataclass(frozen=True)
class Flight:
    """Rounds on their way.

    Attributes
    ----------
    epoch, row : int
        Where they begin.
    ends : list of int
        Rows of each lane's epoch where they end.
    merged : Future
        Of what comes of each of them.
    last : Future, or list of Future
        What the next flight begins from.
    tasks : list of Future
        All others.
    chained : int
        How many flights went before, back to a state that the client has.
    """

    epoch: int
    row: int
    ends: list[int]
    merged: Any
    last: Any
    tasks: list[Any]
    chained: int


@dataclass(frozen=True)
class Taken:
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
        The round whose merge is `start`, if it was merged for this; with `start`.
    """

    part: Part
    end: int
    start: State | None
    before: Round | None


#: Where rounds begin: a state, the last of some rounds, or the groups of a round that is not merged yet.
Beginning: TypeAlias = State | Sequence[Round] | Sequence[Taken]


def keep(value: Any) -> Any:
    """Hold a value where tasks can find it; should it be lost, the scheduler has it still."""
    return value


def deliver(
    work: LaneWork, epoch: int, row: int, end: int, blocks: Mapping[int, Mapping[int, Any]]
) -> dict[int, Delivery]:
    """Hold blocks where turns can find them, and let the readers of lanes that are here go on over them."""
    found = {lane: Delivery(epoch, row, end, some) for lane, some in blocks.items()}
    for lane, delivery in found.items():
        work.readers.expect(lane, delivery)
    return found


def take_turns(
    work: LaneWork,
    beginning: Beginning,
    packed: Packed,
    lanes: Sequence[int],
    row: int,
    end: int,
    extra: Mapping[str, Any],
    delivered: Mapping[int, Delivery] | None,
) -> Taken:
    """Take the turns of some lanes, neighbours joined as soon as they are there."""
    _make_ready(work, extra)
    start, before = _begun(beginning, packed)
    part = Part.nothing(lanes)
    if start.counters[kernels.STATUS] == kernels.OK:  # or there is nothing to go on from
        part = Part.nothing([])
        for lane in lanes:
            turn = take_turn(work, start, packed, lane, row, end, None if delivered is None else delivered[lane])
            part = joined([part, Part.of(lane, turn)], work.plans.n_lanes)
    first = 0 in lanes
    return Taken(part, end, start if first else None, before if first else None)


def play_short(
    work: LaneWork,
    beginning: Beginning,
    packed: Packed,
    row: int,
    ends: Sequence[int],
    extra: Mapping[str, Any],
    delivered: Mapping[int, Delivery] | None,
) -> list[Round]:
    """Play several short rounds on one worker."""
    _make_ready(work, extra)
    return play_rounds(work, _begun(beginning, packed)[0], packed, row, ends, delivered)


def merge_flight(firsts: Sequence[Taken], last: Sequence[Taken], packed: Packed) -> list[Round]:
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
    return [*found, _merged(last, packed)]


def _merged(groups: Sequence[Taken], packed: Packed) -> Round:
    (start,) = (taken.start for taken in groups if taken.start is not None)
    return merge_parts(start, [taken.part for taken in groups], packed, groups[0].end)


def _begun(beginning: Beginning, packed: Packed) -> tuple[State, Round | None]:
    """Return the state that a round begins from, and the round that it came from if that was merged here."""
    if isinstance(beginning, State):
        return beginning, None
    groups = [taken for taken in beginning if isinstance(taken, Taken)]
    if groups:
        found = _merged(groups, packed)
        return found.state, found
    last = beginning[-1]
    assert isinstance(last, Round)
    return last.state, None


def _make_ready(work: LaneWork, extra: Mapping[str, Any]) -> None:
    """Give the lanes as many threads and readers as this worker has room for."""
    from distributed import get_worker

    wrong = same_versions(extra["versions"])
    if wrong is not None:
        raise Unfit(f"a worker has {wrong}")
    worker = get_worker()
    work.n_threads = int(worker.state.nthreads)
    work.most_readers = lanes_kept(extra["costs"], work.n_threads, int(worker.memory_manager.memory_limit or 0))
