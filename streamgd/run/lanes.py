"""A lane's turn: the rows of a lane's next round, trained from the state that all lanes share.

`take_turn` is a pure function of (state, lane, where the turn begins and ends): it may run anywhere, again, or late.
What makes it fast is kept beside it: the readers of the lanes, which fill the next window while this one is trained on
or while the lane waits for the merge. They belong to one process, are bounded in number, and may be lost at any time.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from streamgd.data.flat import FlatFiller
from streamgd.data.plan import EpochPlan, Layout, WindowPlan
from streamgd.data.prefetch import make_filler
from streamgd.data.sources.base import Source
from streamgd.data.targets import TargetCodec
from streamgd.data.window import Stopped, Window, WindowFiller
from streamgd.errors import RowAccountingError
from streamgd.learn import kernels
from streamgd.learn.merge import begin_turn
from streamgd.learn.recipe import Packed
from streamgd.learn.state import State
from streamgd.run.runs import Run

#: Rows times values of one kernel call, so that a request to stop is seen within a second.
_CALL_VALUES = 30_000_000
_EMPTY: NDArray[np.float64] = np.zeros(0)


@dataclass(frozen=True)
class Turn:
    """What came of a lane's turn.

    Attributes
    ----------
    state : State or None
        As trained; None if the lane had no rows left.
    done : bool
        Whether the lane's epoch is over.
    read_rows : int
        Rows read.
    wait_s : float
        Seconds that training waited for windows.
    """

    state: State | None
    done: bool
    read_rows: int
    wait_s: float


@dataclass(frozen=True, eq=False)
class LanePlans:
    """What the order of every lane's rows follows from.

    Attributes
    ----------
    block_rows : ndarray of shape (n_blocks,), int64
        Rows of each block.
    layout : Layout
        The memory plan of one lane.
    seed : int
        Of the shuffle.
    shuffle : bool
        Whether rows are shuffled.
    n_lanes, n_epochs : int
        How many there are.
    """

    block_rows: NDArray[np.int64]
    layout: Layout
    seed: int
    shuffle: bool
    n_lanes: int
    n_epochs: int

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return those of a run."""
        config = run.config
        return cls(run.source.block_rows, run.layout, config.seed, config.shuffle, config.n_lanes, run.n_epochs)

    def epoch(self, epoch: int, lane: int) -> EpochPlan:
        """Return the plan of a lane's epoch."""
        return EpochPlan(
            self.block_rows,
            self.layout,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            lane=lane,
            n_lanes=self.n_lanes,
        )


@dataclass(frozen=True, eq=False)
class RowInputs:
    """Where rows come from and how they are put in windows.

    Attributes
    ----------
    source : Source
        What is read.
    codec : TargetCodec
        How targets become numbers.
    shift, factor : ndarray of shape (n_features,), or None
        Features become ``(x - shift) * factor``.
    """

    source: Source
    codec: TargetCodec
    shift: NDArray[np.float64] | None
    factor: NDArray[np.float64] | None


class LaneWork:
    """All that turns need and that stays the same over a run; sent to each worker once.

    Parameters
    ----------
    run : Run
        What is trained.
    source : Source
        What turns read: the run's source, or what stands for it elsewhere.
    n_threads : int
        Threads that read, for all lanes of this process together.
    most_readers : int
        Lanes whose readers are kept between turns.

    Notes
    -----
    Readers, with their threads and open files, are closed when this object is collected: a worker does so when nobody
    wants the object any more, for example because the client is gone.
    """

    def __init__(self, run: Run, source: Source, *, n_threads: int, most_readers: int) -> None:
        survey = run.survey
        scaling = survey.scaling if run.config.standardize else None
        self.plans = LanePlans.of(run)
        self.inputs = RowInputs(
            source, survey.codec, None if scaling is None else scaling.mean, None if scaling is None else scaling.factor
        )
        self.class_factors, self.output_scale = survey.class_factors, survey.output_scale()
        self.n_threads, self.most_readers = n_threads, most_readers
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.readers = Readers()
        # In a thread of its own: whatever runs when this is collected may be what a reader waits for.
        weakref.finalize(self, _close_soon, self.readers).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        return {name: value for name, value in self.__dict__.items() if name != "readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with nothing open."""
        self.__dict__.update(state)
        self._start_afresh()


def _close_soon(readers: Readers) -> None:
    threading.Thread(target=readers.close, name="streamgd-close", daemon=True).start()


class LaneReader:
    """The rows of a lane in order, from some row of some epoch on; fills the next window ahead.

    Parameters
    ----------
    plans : LanePlans
        The order of rows.
    inputs : RowInputs
        Where they come from.
    pool : ThreadPoolExecutor
        Fills windows.
    lane, epoch, row : int
        Where to begin.
    until : int or None
        Row of the epoch to stop reading at; None reads ahead beyond it, and beyond the epoch.
    """

    def __init__(
        self,
        plans: LanePlans,
        inputs: RowInputs,
        pool: ThreadPoolExecutor,
        lane: int,
        epoch: int,
        row: int,
        until: int | None = None,
    ) -> None:
        self.lane, self.epoch, self.row = lane, epoch, row
        self.wait_s, self.read_rows = 0.0, 0
        self._pool = pool
        source, layout = inputs.source, plans.layout
        self._filler = make_filler(source, layout, inputs.codec, shift=inputs.shift, factor=inputs.factor, n_threads=1)
        first = plans.epoch(epoch, lane)
        self.lane_rows = first.n_rows
        index, before = first.window_at(row)
        self._at = row - before  # next row of the window
        self._plans = _windows(plans, first, index, before, until)
        self._free = [Window(layout, source) for _ in range(2)]
        self._window: Window | None = None
        self._upcoming = next(self._plans, None)
        self._filling: Future[Window] | None = None
        self._fill_next()

    def pieces(self, n_rows: int) -> Iterator[tuple[Window, int, int]]:
        """Yield (window, start, stop) of the next rows, up to the epoch's end."""
        end = min(self.row + n_rows, self.lane_rows)
        while self.row < end:
            if self._window is None:
                began = time.perf_counter()
                assert self._filling is not None
                self._window = self._filling.result()
                self.wait_s += time.perf_counter() - began
                self.read_rows += self._window.n_rows
                self._filling = None
                self._fill_next()
            window = self._window
            stop = min(window.n_rows, self._at + end - self.row)
            yield window, self._at, stop
            self.row += stop - self._at
            self._at = stop
            if stop == window.n_rows:
                self._free.append(window)
                self._window, self._at = None, 0

    def next_epoch(self, lane_rows: int) -> None:
        """Go on with the next epoch, which is what comes next."""
        self.epoch, self.row, self.lane_rows = self.epoch + 1, 0, lane_rows

    def close(self) -> None:
        """Stop reading and close what is open. Idempotent; waits for a read that is under way."""
        self._filler.stop()
        if self._filling is not None:
            self._filling.cancel()
            self._filling.exception() if not self._filling.cancelled() else None
        self._filler.close()

    def _fill_next(self) -> None:
        plan = self._upcoming
        if plan is None or not self._free:
            return
        window = self._free.pop()
        self._upcoming = upcoming = next(self._plans, None)
        self._filling = self._pool.submit(_filled, self._filler, window, plan, upcoming)


def _filled(filler: WindowFiller | FlatFiller, window: Window, plan: WindowPlan, upcoming: WindowPlan | None) -> Window:
    filler.fill(window, plan, upcoming)
    return window


def _windows(plans: LanePlans, first: EpochPlan, index: int, before: int, until: int | None) -> Iterator[WindowPlan]:
    for plan in first.windows(index):
        if until is not None and before >= until:
            return
        before += plan.n_rows
        yield plan
    if until is None:
        for epoch in range(first.epoch + 1, plans.n_epochs):
            yield from plans.epoch(epoch, first.lane).windows()


class Readers:
    """The readers of one process, by lane, and the threads that they share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: OrderedDict[int, LaneReader] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self.stopping = False

    def pool(self, n_threads: int) -> ThreadPoolExecutor:
        """Return the threads that read."""
        with self._lock:
            if self._closed:
                raise Stopped
            if self._pool is None:
                self._pool = ThreadPoolExecutor(n_threads, "streamgd-lanes")
            return self._pool

    def take(self, work: LaneWork, lane: int, epoch: int, row: int) -> LaneReader:
        """Return a reader that stands where a turn begins; it is the caller's until it is given back."""
        with self._lock:
            found = self._idle.pop(lane, None)
        if found is not None:
            if found.epoch + 1 == epoch and found.row == found.lane_rows and row == 0:
                found.next_epoch(work.plans.epoch(epoch, lane).n_rows)
            if (found.epoch, found.row) == (epoch, row):
                return found
            found.close()
        return LaneReader(work.plans, work.inputs, self.pool(work.n_threads), lane, epoch, row)

    def give_back(self, reader: LaneReader, most: int) -> None:
        """Keep a reader for its lane's next turn; those that were used least recently go when there are too many."""
        leaving = []
        with self._lock:
            old = self._idle.pop(reader.lane, None)
            self._idle[reader.lane] = reader
            while self._idle and (self._closed or len(self._idle) > most):
                leaving.append(self._idle.popitem(last=False)[1])
        for each in leaving if old is None else [old, *leaving]:
            each.close()

    def close(self) -> None:
        """Close them all. Idempotent."""
        with self._lock:
            self._closed = self.stopping = True
            idle, pool = list(self._idle.values()), self._pool
            self._idle.clear()
            self._pool = None
        for reader in idle:
            reader.close()
        if pool is not None:
            pool.shutdown(wait=True)


def take_turn(
    work: LaneWork,
    start: State,
    packed: Packed,
    lane: int,
    row: int,
    end: int,
    blocks: Mapping[int, Any] | None = None,
) -> Turn:
    """Train a lane on rows `row` to `end` of its epoch, from the state that all lanes share.

    Parameters
    ----------
    work : LaneWork
        What stays the same.
    start : State
        Where the round begins; stays as it is.
    packed : Packed
        The recipe.
    lane : int
        Which.
    row, end : int
        Rows of the lane's epoch; the lane may have fewer.
    blocks : mapping of int to computed blocks, optional
        The blocks of a Dask collection that the rows lie in.

    Returns
    -------
    Turn
        The batch that is open after the last row is closed, unless there is only one lane and its epoch goes on.
    """
    alone = work.plans.n_lanes == 1
    state = start.copy() if alone else begin_turn(start)
    epoch = start.epoch
    reader, delivered = _reader(work, lane, epoch, row, end, blocks)
    wait_s, read_rows = reader.wait_s, reader.read_rows
    try:
        for window, first, stop in reader.pieces(end - row):
            last = reader.row + stop - first == min(end, reader.lane_rows)
            whole = reader.row + stop - first == reader.lane_rows
            _consume(work, state, packed, window, first, stop, close=whole if alone else last)
            if state.counters[kernels.STATUS] != kernels.OK:
                break
            if alone and stop == window.n_rows and not whole:
                state.next_window()
    except BaseException:
        reader.close()
        raise
    n_rows = int(state.counters[kernels.EPOCH_ROWS]) - (int(start.counters[kernels.EPOCH_ROWS]) if alone else 0)
    expected = max(0, min(end, reader.lane_rows) - row)
    if n_rows != expected and state.counters[kernels.STATUS] == kernels.OK:
        raise RowAccountingError(f"lane {lane} saw {n_rows:,} rows of a turn of {expected:,}; this is a bug")
    done = end >= reader.lane_rows
    wait_s, read_rows = reader.wait_s - wait_s, reader.read_rows - read_rows
    if delivered or state.counters[kernels.STATUS] != kernels.OK:
        reader.close()
    else:
        work.readers.give_back(reader, work.most_readers)
    return Turn(state if n_rows else None, done, read_rows, wait_s)


def _reader(
    work: LaneWork, lane: int, epoch: int, row: int, end: int, blocks: Mapping[int, Any] | None
) -> tuple[LaneReader, bool]:
    if blocks is None:
        return work.readers.take(work, lane, epoch, row), False
    collection: Any = work.inputs.source  # a DaskSource; importing it would import Dask
    inputs = replace(work.inputs, source=collection.with_blocks(blocks))
    return LaneReader(work.plans, inputs, work.readers.pool(work.n_threads), lane, epoch, row, until=end), True


def _consume(
    work: LaneWork, state: State, packed: Packed, window: Window, first: int, stop: int, *, close: bool
) -> None:
    """Train on some rows of a window, in calls that are not too long."""
    weight = _EMPTY if window.weight is None else window.weight
    piece = max(1, _CALL_VALUES // (state.theta.size + 16))
    while first < stop:
        if work.readers.stopping:
            raise Stopped
        until = min(stop, first + piece)
        kernels.consume(
            window.X,
            window.y,
            weight,
            window.ids,
            first,
            until,
            close and until == stop,
            (state.theta, state.average, state.slots, state.scalars, state.counters),
            (state.carry_X, state.carry_y, state.carry_weight),
            state.checksum,
            state.moments,
            packed.codes,
            packed.params,
            work.class_factors,
            work.output_scale,
        )
        if state.counters[kernels.STATUS] != kernels.OK:
            return
        first = until
