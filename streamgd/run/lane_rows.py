"""The rows of a lane, in order: a reader fills the next windows while the one before is trained on.

A new one may begin at any row, so readers may be lost at any time; see `streamgd.run.readers` for those of a process.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from streamgd.data.flat_files import FlatFiles
from streamgd.data.plan import EpochPlan, Layout, WindowPlan, rows_of_lanes
from streamgd.data.sources.base import Source
from streamgd.data.targets import TargetCodec
from streamgd.data.window import Stopped, Window
from streamgd.data.window_stream import make_filler
from streamgd.run.runs import Run
from streamgd.run.turns import Span

#: Windows of a lane: the one that is trained on and the next; and so many more, where the buffer has room for them.
LEAST_WINDOWS, _MORE_WINDOWS = 2, 4


def more_windows(layout: Layout, source: Source) -> int:
    """Count the windows that a lane can fill beyond two, in what the plan leaves of its part of the buffer.

    What they are for: lanes wait for one another at a round's end, those ahead for those behind, and read meanwhile.
    """
    if source.holds_block:  # of a Dask collection, whose blocks are what there is
        return 0
    return min(_MORE_WINDOWS, max(0, layout.spare_bytes) // layout.window_bytes)


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

    def most_rows(self) -> int:
        """Count the rows of the lane that has most of them, in every epoch."""
        return int(rows_of_lanes(self.block_rows, self.n_lanes, self.seed, shuffle=self.shuffle).max())

    def following(self, epoch: int, row: int, most_rows: int) -> tuple[int, int] | None:
        """Return where the turn after one that ends at a row begins, perhaps in the next epoch; None if there is none.

        `most_rows` is what the method of that name returned.
        """
        if row >= most_rows:
            epoch, row = epoch + 1, 0
        return (epoch, row) if epoch < self.n_epochs else None

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


@dataclass(frozen=True, eq=False)
class Delivery:
    """The blocks of a Dask collection behind a lane's turns, computed.

    Attributes
    ----------
    span : Span
        The turns' rows.
    blocks : mapping of int to computed blocks
        What the windows of these rows draw on.
    n_epochs : int
        More than one are for all rows up to the end of that many epochs, of which the span is the first.
    n_bytes : int
        What Dask is to take this for. 0 for what passes by: Dask counts the blocks already.
    attempt : int
        Grows when what was delivered before is not to be held any longer.
    """

    span: Span
    blocks: Mapping[int, Any]
    n_epochs: int = 1
    n_bytes: int = 0
    attempt: int = 0

    def __sizeof__(self) -> int:
        """Tell Dask how much this is, so that turns go where their blocks are."""
        return object.__sizeof__(self) + self.n_bytes


class LaneReader:
    """The rows of a lane in order, from some row of some epoch on; fills windows ahead.

    Parameters
    ----------
    plans : LanePlans
        The order of rows.
    inputs : RowInputs
        Where they come from.
    pool : ThreadPoolExecutor
        Fills windows, of a lane one after the other.
    lane, epoch, row : int
        Where to begin.
    n_windows : int
        Windows in memory at once.
    delivery : Delivery or None
        Blocks of a Dask collection, for a turn that begins here; no more than these and those that are delivered later
        can be read. None reads ahead without them.
    files : FlatFiles or None
        Files that all lanes of the process share.
    """

    def __init__(
        self,
        plans: LanePlans,
        inputs: RowInputs,
        pool: ThreadPoolExecutor,
        lane: int,
        epoch: int,
        row: int,
        *,
        n_windows: int = LEAST_WINDOWS,
        delivery: Delivery | None = None,
        files: FlatFiles | None = None,
    ) -> None:
        self.lane, self.epoch = lane, epoch
        self.wait_s, self.read_rows = 0.0, 0
        self._pool = pool
        source, layout = inputs.source, plans.layout
        if delivery is not None:
            collection: Any = source  # a DaskSource; importing it would import Dask
            source = collection.with_blocks(delivery.blocks)
        self._filler = make_filler(
            source, layout, inputs.codec, shift=inputs.shift, factor=inputs.factor, n_threads=1, files=files
        )
        first = plans.epoch(epoch, lane)
        self.lane_rows = first.n_rows  # of every epoch: blocks are dealt once
        self.row = min(row, self.lane_rows)
        index, before = first.window_at(self.row)
        self._at = self.row - before  # next row of the window
        self._source = source
        self._deliveries = [] if delivery is None else [delivery]
        self._window: Window | None = None
        # What follows changes hands between the reader's user and the threads that fill, under the lock.
        self._lock = threading.Lock()
        # Places are counted through all epochs, in each of which the lane has as many rows.
        self._planned = epoch * self.lane_rows + before
        self._until = None if delivery is None else self._end_of(delivery)
        self._ahead_to: int | None = None
        self._plans = _windows(plans, first, index)
        self._upcoming = next(self._plans, None)
        self._free = [Window(layout, source) for _ in range(n_windows)]
        self._ready: SimpleQueue[Window | BaseException] = SimpleQueue()
        self._filling: Future[None] | None = None
        self._closed = False
        self._fill_next()

    def pieces(self, n_rows: int) -> Iterator[tuple[Window, int, int]]:
        """Yield (window, start, stop) of the next rows, up to the epoch's end."""
        end = min(self.row + n_rows, self.lane_rows)
        while self.row < end:
            if self._window is None:
                self._window = self._next_window()
            window = self._window
            stop = min(window.n_rows, self._at + end - self.row)
            yield window, self._at, stop
            self.row += stop - self._at
            self._at = stop
            if stop == window.n_rows:
                self._window, self._at = None, 0
                with self._lock:
                    self._free.append(window)
                    self._fill_if_free()

    def _next_window(self) -> Window:
        began = time.perf_counter()
        with self._lock:
            if self._filling is None and self._ready.empty():
                self._ahead_to = None  # it is read on after all
                self._fill_if_free()
                assert self._filling is not None, "rows that were neither planned nor delivered"
        found = self._ready.get()
        self.wait_s += time.perf_counter() - began
        try:
            if isinstance(found, BaseException):
                self._ready.put(Stopped())  # nothing comes after an error
                raise found
            self.read_rows += found.n_rows
            return found
        finally:
            del found  # an error that its own frame holds keeps files open until it is collected

    def read_ahead_to(self, row: int) -> None:
        """Fill no windows ahead that begin at this row of the epoch or later: the lane goes elsewhere."""
        self._ahead_to = self.epoch * self.lane_rows + row

    @property
    def place(self) -> int:
        """The next row, counted through all epochs."""
        return self.epoch * self.lane_rows + self.row

    def deliver(self, delivery: Delivery) -> bool:
        """Read on over more blocks; say whether they are what comes next, or were here before."""
        assert self._until is not None
        if delivery.span.epoch * self.lane_rows + min(delivery.span.row, self.lane_rows) > self._until:
            return False
        if self._end_of(delivery) > self._until:
            self._deliveries.append(delivery)
            self._open_delivered()
            self._until = self._end_of(delivery)
            self._fill_next()
        return True

    def let_go(self) -> None:
        """Let go of the blocks of turns that are over; what is open keeps its own."""
        if self._until is not None:
            left = [each for each in self._deliveries if self._end_of(each) > self.place]
            if len(left) < len(self._deliveries):
                self._deliveries = left
                self._open_delivered()

    def _open_delivered(self) -> None:
        collection: Any = self._source
        collection.deliver({block: found for each in self._deliveries for block, found in each.blocks.items()})

    def _end_of(self, delivery: Delivery) -> int:
        last = delivery.span.epoch + delivery.n_epochs - 1
        return last * self.lane_rows + min(delivery.span.end, self.lane_rows)

    def goes_on_at(self, epoch: int, row: int) -> bool:
        """Say whether a row is what comes next, after going on to the next epoch if the row is its first."""
        if self.epoch + 1 == epoch and self.row == self.lane_rows and row == 0:
            self.epoch, self.row = epoch, 0
        return (self.epoch, self.row) == (epoch, min(row, self.lane_rows))

    def close(self) -> None:
        """Stop reading and close what is open. Idempotent; waits for a read that is under way."""
        self._filler.stop()
        with self._lock:
            self._closed = True
            filling = self._filling
        if filling is not None and not filling.cancel():
            filling.exception()
        self._filler.close()
        self._window = None
        self._free.clear()
        while not self._ready.empty():  # what windows take is free at once, whoever still knows of this
            self._ready.get()
        self._ready.put(Stopped())

    def _fill_next(self) -> None:
        with self._lock:
            self._fill_if_free()

    def _fill_if_free(self) -> None:
        """Have a free window filled, unless one is being filled or nothing is to be read yet; under the lock."""
        plan = self._upcoming
        bounds = [bound for bound in (self._until, self._ahead_to) if bound is not None]
        if self._closed or self._filling is not None or plan is None or not self._free:
            return
        if self._planned >= min(bounds, default=sys.maxsize):
            return
        upcoming = next(self._plans, None)
        try:
            self._filling = self._pool.submit(self._fill, self._free[-1], plan, upcoming)
        except RuntimeError as err:  # the threads are being stopped
            self._closed = True
            raise Stopped from err
        self._free.pop()
        self._planned += plan.n_rows
        self._upcoming = upcoming

    def _fill(self, window: Window, plan: WindowPlan, upcoming: WindowPlan | None) -> None:
        try:
            self._filler.fill(window, plan, upcoming)
        except BaseException as err:
            with self._lock:
                self._filling = None
                self._ready.put(err)
            return
        with self._lock:
            self._filling = None
            self._ready.put(window)
            with contextlib.suppress(Stopped):
                self._fill_if_free()


def _windows(plans: LanePlans, first: EpochPlan, index: int) -> Iterator[WindowPlan]:
    if first.n_rows == 0:  # now and ever
        return
    yield from first.windows(index)
    for epoch in range(first.epoch + 1, plans.n_epochs):
        yield from plans.epoch(epoch, first.lane).windows()
