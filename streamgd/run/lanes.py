"""A lane's turn: the rows of a lane's next round, trained from the state that all lanes share.

`take_turn` is a pure function of (state, lane, where the turn begins and ends): it may run anywhere, again, or late.
What makes it fast is kept beside it: the readers of the lanes, which fill the next window while this one is trained on
or while the lane waits for the merge. They belong to one process, are bounded in number, and may be lost at any time.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.base import Source
from streamgd.data.window import Stopped, Window
from streamgd.errors import RowAccountingError
from streamgd.learn import kernels
from streamgd.learn.merge import Found, begin_turn, found_by
from streamgd.learn.recipe import Packed
from streamgd.learn.state import State
from streamgd.run.lane_rows import LEAST_WINDOWS, Delivery, LanePlans, LaneReader, RowInputs, more_windows
from streamgd.run.readers import Readers
from streamgd.run.runs import Run
from streamgd.run.sent_rows import Rows, SentReader
from streamgd.run.turns import Span

#: Rows times values of one kernel call, so that a request to stop is seen within a second.
_CALL_VALUES = 30_000_000
_EMPTY: NDArray[np.float64] = np.zeros(0)


@dataclass(frozen=True)
class Turn:
    """What came of a lane's turn.

    Attributes
    ----------
    found : Found, State or None
        What the lane found, to be merged, or the state as trained if there is only one lane; None if the lane had no
        rows left.
    done : bool
        Whether the lane's epoch is over.
    read_rows : int
        Rows read.
    wait_s : float
        Seconds that training waited for windows.
    """

    found: Found | State | None
    done: bool
    read_rows: int
    wait_s: float


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

    Attributes
    ----------
    n_windows : int
        Windows of each lane in memory at once, as many as its part of the buffer has room for.

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
        self.n_windows = LEAST_WINDOWS + more_windows(run.layout, run.source)
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.readers = Readers()
        # In a thread of its own: whatever runs when this is collected may be what a reader waits for.
        weakref.finalize(self, close_soon, self.readers).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        return {name: value for name, value in self.__dict__.items() if name != "readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with nothing open."""
        self.__dict__.update(state)
        self._start_afresh()


def close_soon(what: Any) -> None:
    """Close something without waiting for it."""
    threading.Thread(target=what.close, name="streamgd-close", daemon=True).start()


def take_turn(
    work: LaneWork,
    start: State,
    packed: Packed,
    lane: int,
    span: Span,
    delivery: Delivery | None = None,
) -> Turn:
    """Train a lane on some rows of its epoch, from the state that all lanes share.

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
    span : Span
        The rows.
    delivery : Delivery, optional
        The blocks of a Dask collection that the rows lie in.

    Returns
    -------
    Turn
        The batch that is open after the last row is closed, unless there is only one lane and its epoch goes on.
    """
    reader = open_reader(work, lane, span.epoch, span.row, delivery)
    try:
        turn = train_turn(work, start, packed, lane, reader, span)
    except BaseException:
        work.readers.discard(reader)
        raise
    leave_reader(work, reader, turn.found)
    return turn


def train_turn(
    work: LaneWork, start: State, packed: Packed, lane: int, reader: LaneReader | SentReader, span: Span
) -> Turn:
    """Do what `take_turn` does, with a reader that stands at the turn's first row."""
    alone = work.plans.n_lanes == 1
    state = start.copy() if alone else begin_turn(start)
    wait_s, read_rows = reader.wait_s, reader.read_rows
    for window, first, stop in reader.pieces(span.n_rows):
        last = reader.row + stop - first == min(span.end, reader.lane_rows)
        whole = reader.row + stop - first == reader.lane_rows
        _consume(work, state, packed, window, first, stop, close=whole if alone else last)
        if state.counters[kernels.STATUS] != kernels.OK:
            break
        if alone and stop == window.n_rows and not whole:
            state.next_window()
    n_rows = int(state.counters[kernels.EPOCH_ROWS]) - (int(start.counters[kernels.EPOCH_ROWS]) if alone else 0)
    expected = max(0, min(span.end, reader.lane_rows) - span.row)
    if n_rows != expected and state.counters[kernels.STATUS] == kernels.OK:
        raise RowAccountingError(f"lane {lane} saw {n_rows:,} rows of a turn of {expected:,}; this is a bug")
    wait_s, read_rows = reader.wait_s - wait_s, reader.read_rows - read_rows
    # A lane that diverges in its first batch has no rows, but something to say.
    silent = n_rows == 0 and state.counters[kernels.STATUS] == kernels.OK
    found = None if silent else state if alone else found_by(start, state, packed)
    return Turn(found, span.end >= reader.lane_rows, read_rows, wait_s)


def open_reader(work: LaneWork, lane: int, epoch: int, row: int, delivery: Delivery | None) -> LaneReader:
    """Return a reader of a lane's rows from `row` on; of blocks that were delivered, if it reads a Dask collection."""
    return work.readers.take(
        work.plans,
        work.inputs,
        lane,
        epoch,
        row,
        n_threads=work.n_threads,
        most=work.most_readers,
        n_windows=work.n_windows,
        delivery=delivery,
    )


def read_ahead(work: LaneWork, lane: int, epoch: int, row: int, delivery: Delivery | None = None) -> None:
    """Have a lane that comes here fill its first windows, before its first turn here begins."""
    if not work.readers.has(lane):
        work.readers.give_back(open_reader(work, lane, epoch, row, delivery), work.most_readers)


def leave_reader(work: LaneWork, reader: LaneReader, state: Found | State | None) -> None:
    """Keep a reader for the lane's next turn, unless it was left where it stood when the lane diverged."""
    if state is not None and state.counters[kernels.STATUS] != kernels.OK:
        work.readers.discard(reader)
    else:
        work.readers.give_back(reader, work.most_readers)


def _consume(
    work: LaneWork, state: State, packed: Packed, window: Window | Rows, first: int, stop: int, *, close: bool
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
            state.learnt,
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
