"""Training in rounds: every lane takes its turn from the same state, then the states are merged.

The same loop for lanes that run here, in threads, and for lanes on a cluster: a `Crew` plays the rounds, and what comes
of one is a pure function of the state before it. Between rounds the client has the whole state, so checkpoints, epochs
and progress are those of a run without lanes.
"""

from __future__ import annotations

import abc
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Self

from streamgd.data.prefetch import default_threads
from streamgd.errors import ClusterError, DataError
from streamgd.learn import kernels
from streamgd.learn.merge import Stretches, fold, merge
from streamgd.learn.recipe import Packed
from streamgd.learn.state import State
from streamgd.run.config import RunOptions
from streamgd.run.epochs import Reading, Training, Watcher, interrupts
from streamgd.run.folder import RunFolder
from streamgd.run.lane_rows import Delivery, LaneReader
from streamgd.run.lanes import LaneWork, Turn, leave_reader, open_reader, take_turn, train_turn
from streamgd.run.runs import Run
from streamgd.run.sent_rows import SentReader, SentRows
from streamgd.run.turns import Span, Turns

#: Round records in ``metrics.jsonl`` per epoch, about; an epoch's end always has one.
_RECORDS_PER_EPOCH = 200
#: How long to wait for lanes before looking whether somebody asked to stop.
_POLL_S = 0.1


@dataclass(frozen=True)
class Round:
    """What came of a round.

    Attributes
    ----------
    state : State
        Of all lanes.
    done : bool
        Whether the epoch of every lane is over.
    read_rows : int
        Rows read by all lanes.
    wait_s : float
        Seconds that lanes waited for windows, the sum of all.
    took_s : float
        Seconds that one worker took who played it by itself; 0 if several did.
    """

    state: State
    done: bool
    read_rows: int
    wait_s: float
    took_s: float = 0.0


@dataclass(frozen=True)
class Part:
    """What the turns of some lanes gave, added up as far as they are neighbours.

    Attributes
    ----------
    n_lanes : int
        How many turns were taken.
    stretches : dict of (level, index) to Found or None
        See `streamgd.learn.merge.fold`.
    alone : State or None
        As trained, if the run has one lane.
    done : bool
        Whether the epoch is over for all of them.
    read_rows : int
        Rows read.
    wait_s : float
        Seconds that training waited for windows, the sum of all.
    """

    n_lanes: int
    stretches: Stretches
    alone: State | None
    done: bool
    read_rows: int
    wait_s: float

    @classmethod
    def of(cls, lane: int, turn: Turn) -> Self:
        """Return that of one turn."""
        found, alone = (None, turn.found) if isinstance(turn.found, State) else (turn.found, None)
        return cls(1, {(0, lane): found}, alone, turn.done, turn.read_rows, turn.wait_s)

    @classmethod
    def nothing(cls, lanes: Sequence[int]) -> Self:
        """Return that of lanes that were not trained."""
        return cls(len(lanes), {(0, lane): None for lane in lanes}, None, True, 0, 0.0)


def joined(parts: Sequence[Part], n_lanes: int) -> Part:
    """Join parts, of the `n_lanes` lanes of the run, to one; they stay as they are."""
    stretches: Stretches = {}
    for part in parts:
        stretches |= part.stretches
    return Part(
        sum(part.n_lanes for part in parts),
        fold(stretches, n_lanes),
        next((part.alone for part in parts if part.alone is not None), None),
        all(part.done for part in parts),
        sum(part.read_rows for part in parts),
        sum(part.wait_s for part in parts),
    )


def merge_parts(start: State, parts: Sequence[Part], packed: Packed, end: int) -> Round:
    """Merge what the turns of all lanes gave, however they were grouped.

    Parameters
    ----------
    start : State
        What all lanes started from.
    parts : sequence of Part
        Of all lanes.
    packed : Packed
        The recipe.
    end : int
        Row of each lane's epoch where the next turn begins.
    """
    n_lanes = sum(part.n_lanes for part in parts)
    whole = joined(parts, n_lanes)
    if n_lanes == 1:
        state = start if whole.alone is None else whole.alone  # the cursor is that of a run without lanes
    else:
        (found,) = whole.stretches.values()
        state = start.copy() if found is None else merge(start, found, packed)
        state.counters[[kernels.WINDOW, kernels.ROW]] = start.counters[kernels.WINDOW] + 1, end
    return Round(state, whole.done, whole.read_rows, whole.wait_s)


def play_rounds(
    work: LaneWork,
    start: State,
    packed: Packed,
    spans: Sequence[Span],
    delivered: Mapping[int, Delivery] | None = None,
    leaving: Sequence[int] = (),
    sent: Sequence[SentRows] = (),
    *,
    lanes: Sequence[int] | None = None,
    gather: Callable[[Part], Sequence[Part]] | None = None,
) -> list[Round]:
    """Play several rounds in this thread, one lane's turn after the other.

    Parameters
    ----------
    work : LaneWork
        What stays the same.
    start : State
        Where the first round begins; stays as it is.
    packed : Packed
        The recipe.
    spans : sequence of Span
        The rows of each, one after the other; there are fewer if the epoch ends before, or a lane diverges.
    delivered : mapping of int to Delivery, optional
        For each lane, the blocks of a Dask collection that the rows lie in.
    leaving : sequence of int, default=()
        Lanes that go elsewhere when these rounds have ended.
    sent : sequence of SentRows, default=()
        The rows of lanes that were read elsewhere.
    lanes : sequence of int, optional
        Those whose turns are taken here; all by default.
    gather : callable, optional
        Takes what these gave in a round, and returns what all lanes gave; needed if others take some turns.

    Returns
    -------
    list of Round
        What came of each; of the last one alone if others take the turns of lane 0, and tell the rest.
    """
    lanes = range(work.plans.n_lanes) if lanes is None else lanes
    own: list[LaneReader] = []
    readers: dict[int, LaneReader | SentReader] = {rows.lane: SentReader(rows) for rows in sent}
    played: list[Round] = []
    state = start
    try:
        for lane in sorted(set(lanes) - readers.keys()):
            delivery = None if delivered is None else delivered[lane]
            own.append(open_reader(work, lane, spans[0].epoch, spans[0].row, delivery))
            readers[lane] = own[-1]
            if lane in leaving:
                own[-1].read_ahead_to(spans[-1].end)
        for span in spans:
            began = time.perf_counter()
            parts: Sequence[Part] = [
                Part.of(lane, train_turn(work, state, packed, lane, reader, span))
                for lane, reader in sorted(readers.items())
            ]
            if gather is not None:
                parts = gather(joined(parts, work.plans.n_lanes))
            found = merge_parts(state, parts, packed, span.end)
            if gather is None:
                found = replace(found, took_s=time.perf_counter() - began)
            elif 0 not in lanes:
                played.clear()
            played.append(found)
            state = played[-1].state
            if played[-1].done or state.counters[kernels.STATUS] != kernels.OK:
                break
    except BaseException:
        for reader in own:
            work.readers.discard(reader)
        raise
    for reader in own:
        leave_reader(work, reader, state)
    return played


class Crew(abc.ABC):
    """Whoever takes the turns of all lanes."""

    @abc.abstractmethod
    def play(self, start: State, packed: Packed, span: Span, stop: threading.Event) -> Round | None:
        """Play the round over some rows of each lane's epoch.

        Returns
        -------
        Round or None
            None if somebody asked to stop meanwhile; `start` is as it was.
        """

    @property
    @abc.abstractmethod
    def n_threads(self) -> int:
        """How many lanes take their turns at once."""

    @property
    def workers(self) -> int | None:
        """How many workers there are; None if there is no cluster."""
        return None

    @property
    def round_s(self) -> float | None:
        """Seconds that the last round took, if several came at once; None if that is the time of the call."""
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Leave nothing behind. Idempotent."""


class LocalCrew(Crew):
    """Takes the turns in threads of this process.

    Parameters
    ----------
    run : Run
        What is trained.
    n_threads : int or None
        Threads that train, and as many that read; None for one per core.
    """

    def __init__(self, run: Run, n_threads: int | None) -> None:
        n_threads = default_threads() if n_threads is None else n_threads
        self._n_lanes = run.config.n_lanes
        self._work = LaneWork(run, run.source, n_threads=n_threads, most_readers=self._n_lanes)
        self._n_threads = min(n_threads, self._n_lanes)
        self._pool = ThreadPoolExecutor(self._n_threads, "streamgd-turns")

    @property
    def n_threads(self) -> int:
        """How many lanes take their turns at once."""
        return self._n_threads

    def play(self, start: State, packed: Packed, span: Span, stop: threading.Event) -> Round | None:
        """Play a round, see `Crew.play`."""
        # Futures are left alone: an interrupt that comes while this thread has their locks would keep them locked, and
        # the threads waiting for good.
        told: SimpleQueue[tuple[int, Turn | BaseException]] = SimpleQueue()
        for lane in range(self._n_lanes):
            self._pool.submit(self._take_turn, told, start, packed, lane, span)
        turns: dict[int, Turn] = {}
        while len(turns) < self._n_lanes:
            with contextlib.suppress(Empty):
                lane, turn = told.get(timeout=_POLL_S)
                if isinstance(turn, BaseException):
                    raise turn
                turns[lane] = turn
            if stop.is_set():
                return None
        return merge_parts(start, [Part.of(lane, turns[lane]) for lane in range(self._n_lanes)], packed, span.end)

    def _take_turn(
        self, told: SimpleQueue[tuple[int, Turn | BaseException]], start: State, packed: Packed, lane: int, span: Span
    ) -> None:
        """Take a turn, and tell what came of it."""
        try:
            told.put((lane, take_turn(self._work, start, packed, lane, span)))
        except BaseException as err:
            told.put((lane, err))

    def close(self) -> None:
        """Stop all threads."""
        self._work.readers.stopping = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._work.readers.close()


class RoundTraining(Training):
    """Trains in rounds.

    Parameters
    ----------
    run, options, folder, watcher, stop
        As in `Training`.
    client : distributed.Client or None
        The cluster; None trains here.
    """

    def __init__(
        self,
        run: Run,
        options: RunOptions,
        folder: RunFolder | None,
        watcher: Watcher,
        stop: threading.Event,
        client: Any,
    ) -> None:
        super().__init__(run, options, folder, watcher, stop)
        self._client = client
        self._turns = Turns.of(run)
        self._reading = Reading()
        self._read_rows = 0
        n_rounds = -(-self._turns.lane_rows // self._turns.most_rows)
        self._record_every = max(1, n_rounds // _RECORDS_PER_EPOCH)

    def go(self) -> bool:
        """Train; say whether the run is finished, rather than asked to stop."""
        run = self.run
        self.watcher.started(run)
        if run.finished:
            return True
        self._note_idle_lanes()
        with contextlib.closing(self._crew()) as crew:
            if self.folder is not None and run.state.counters[kernels.N_ROWS] == 0:
                self.save()
            # Saved before the crew is closed, which waits for what is under way.
            try:
                with interrupts():
                    done = self._through(crew)
            except (KeyboardInterrupt, ClusterError, DataError):
                # The state is that of the last whole round, wherever the interrupt came.
                if self.folder is not None:
                    self.save()
                raise
            if not done and self.folder is not None:
                self.save()
        return done

    def _note_idle_lanes(self) -> None:
        n_lanes, n_blocks = self.run.config.n_lanes, self.run.source.n_blocks
        if n_lanes > n_blocks:
            self.watcher.note(
                f"n_lanes={n_lanes:,}: the data has {n_blocks:,} blocks, which are dealt to the lanes, so that "
                f"{n_lanes - n_blocks:,} of these have no rows. Fewer lanes take more steps in an epoch"
            )

    def _crew(self) -> Crew:
        if self._client is None:
            return LocalCrew(self.run, self.options.n_threads)
        from streamgd.run.cluster import ClusterCrew

        return ClusterCrew(self.run, self._client, self.options, self.watcher, self.stop)

    def _through(self, crew: Crew) -> bool:
        """Play rounds until the run is finished (True) or asked to stop (False)."""
        run = self.run
        while not self.stop.is_set():
            state, began = run.state, time.perf_counter()
            several = run.config.n_lanes > 1
            row = int(state.counters[kernels.ROW if several else kernels.EPOCH_ROWS])
            played = crew.play(state, self._packed, self._turns.at(state.epoch, row), self.stop)
            if played is None:
                return False
            if played.state.counters[kernels.STATUS] == kernels.DIVERGED:
                raise self._divergence(f"round {int(state.counters[kernels.WINDOW]) + 1}" if several else "a turn")
            self._record(several, played.state)  # first: a round that is interrupted here will be recorded again
            run.state = played.state
            # Lanes that wait for a thread do not wait for windows; who plays alone gets rows that others waited for.
            alone = bool(played.took_s)
            self._reading.wait_s += min(played.wait_s, played.took_s) if alone else played.wait_s / crew.n_threads
            self._read_rows += played.read_rows
            self._reading.read_bytes = round(self._read_rows * run.source.stored_bytes / run.source.n_rows)
            took_s = crew.round_s
            self._reading.round_s = time.perf_counter() - began if took_s is None else took_s
            self._reading.workers = crew.workers
            self.watcher.advanced(run, self._reading)
            if played.done:
                if self._end_epoch():
                    return True
            else:
                self._save_if_due()
        return False

    def _record(self, several: bool, state: State) -> None:
        """Write a metrics record of a round; which rounds have one depends on their number alone."""
        number = int(state.counters[kernels.WINDOW]) - 1
        if several and self.folder is not None and number % self._record_every == 0:
            self.folder.append_metrics(self._metrics(number, state.progressive_loss, state))
