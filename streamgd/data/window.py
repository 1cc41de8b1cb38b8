"""Fill one window: read its slices, scale every row and put it at its shuffled place.

The plan says what goes where, so that any number of threads may read any blocks in any order and the window comes out
the same. What happens to each row is in `streamgd.data.rows`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.placing import copy_rows, place_weights
from streamgd.data.plan import Layout, WindowPlan
from streamgd.data.rows import RowPlacer, Window
from streamgd.data.shapes import MAX_READERS
from streamgd.data.sources.base import BlockReader, Source
from streamgd.data.targets import TargetCodec
from streamgd.errors import OptionError

if TYPE_CHECKING:
    from streamgd.data.cache_writer import CacheWriter
    from streamgd.data.flat import FlatFiller

__all__ = ["ResidentFiller", "Stopped", "Window", "WindowFiller"]

Floats = NDArray[np.float64]


class Stopped(Exception):
    """Reading was stopped from outside; nobody waits for the window any more."""


@dataclass
class _Task:
    """The slices of one block in one window: (first row in the block, rows, first row of `places`) of each."""

    number: int
    block: int
    slices: list[tuple[int, int, int]]
    opening: int = 0  # how many blocks are opened for the window before this one


@dataclass
class _Job:
    """One window being filled by several threads."""

    window: Window
    places: NDArray[np.int32]
    tasks: Sequence[_Task]
    counter: itertools.count[int] = field(default_factory=itertools.count)
    n_opened: int = 0
    errors: list[tuple[int, BaseException]] = field(default_factory=list)

    def claim(self) -> _Task | None:
        """Take the next task; in plan order, so that blocks are closed before others need their room."""
        number = next(self.counter)  # atomic under the interpreter lock
        return self.tasks[number] if number < len(self.tasks) and not self.errors else None


class WindowFiller:
    """Fills windows by a plan, keeping blocks open from one window to the next.

    Parameters
    ----------
    source : Source
        What is read.
    layout : Layout
        How much at once; at most ``layout.n_open`` blocks are ever open.
    codec : TargetCodec or None
        How targets become numbers; None leaves the target out.
    shift, factor : ndarray of shape (n_features,), float64, or None, default=None
        Each value becomes ``(x - shift) * factor``; None leaves it as it is.
    n_threads : int, default=1
        Threads that read, the caller's included; the result does not depend on it.
    check : bool, default=True
        Whether features, targets and weights that are not finite, and negative weights, are errors.
    keep : CacheWriter or None, default=None
        Is given every row that is read, as it is stored.
    spare_bytes : int, default=0
        Memory beside the plan that the source may keep what it decoded in, until the filler is closed.

    Notes
    -----
    Not for several callers at once. Close it, or use it in a ``with`` statement: threads and readers stay open between
    windows.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        codec: TargetCodec | None,
        *,
        shift: Floats | None = None,
        factor: Floats | None = None,
        n_threads: int = 1,
        check: bool = True,
        keep: CacheWriter | None = None,
        spare_bytes: int = 0,
    ) -> None:
        self._source = source
        self._layout = layout
        self._spare_bytes = spare_bytes
        if spare_bytes:
            source.lend(spare_bytes)
        self._keep = keep
        self._placer = RowPlacer(source, codec, shift, factor, check=check)
        self._places = np.empty(layout.window_rows, np.int32)
        self._n_threads = max(1, min(n_threads, MAX_READERS))
        self.n_callers = 1  # blocks stay open from one window to the next
        self._pool: ThreadPoolExecutor | None = None
        self._open: dict[int, tuple[BlockReader, int]] = {}  # reader and its next row
        self._n_open = 0
        self._room = threading.Condition()
        self._stopped = False
        self._expected: tuple[int, int] | None = None
        self.read_rows = 0

    def fill(self, window: Window, plan: WindowPlan, upcoming: WindowPlan | None = None) -> None:
        """Fill a window.

        Parameters
        ----------
        window : Window
            Is overwritten.
        plan : WindowPlan
            What to read.
        upcoming : WindowPlan or None, default=None
            What will probably be read next, as a hint for sources that compute.

        Raises
        ------
        NonFiniteError
            If a number is not finite or a weight is negative; names block, row, column and value.
        DataError
            If a target is no known class, or the storage fails.
        Stopped
            If `stop` was called.
        """
        if plan.n_rows > len(window.ids):
            raise OptionError(f"a plan of {plan.n_rows:,} rows for a window of {len(window.ids):,}: layouts differ")
        if self._expected != (plan.epoch, plan.index):
            self._close_readers()  # a jump: what is open may never be asked for
        self._expected = (plan.epoch + 1, 0) if plan.last else (plan.epoch, plan.index + 1)
        self._announce(plan, upcoming)
        job = _Job(window, plan.places(self._places), self._tasks_of(plan))
        n_helpers = min(self._n_threads, len(job.tasks)) - 1
        helpers: list[Future[None]] = []
        try:
            if n_helpers > 0:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(self._n_threads - 1, "streamgd-reader")
                helpers = [self._pool.submit(self._work, job) for _ in range(n_helpers)]
            self._work(job)
            wait(helpers)
        except BaseException as err:  # KeyboardInterrupt while waiting: nobody may write to the window any more
            self._fail(job, -1, err)
            wait(helpers)
        if job.errors:
            self._close_readers()
            job.errors.sort(key=lambda entry: (isinstance(entry[1], Stopped), entry[0]))
            error = job.errors[0][1]
            job.errors.clear()
            try:
                raise error
            finally:
                del error  # what its own traceback holds is open until it is collected
        window.describe(plan)
        self.read_rows += plan.n_rows
        if self._keep is not None:
            self._keep.filled(plan.index)

    def stop(self) -> None:
        """Make `fill` give up soon, from any thread."""
        with self._room:
            self._stopped = True
            self._room.notify_all()

    def close(self) -> None:
        """Stop the threads and close the readers. Idempotent."""
        self.stop()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        self._close_readers()
        if self._spare_bytes:
            self._source.lend(0)

    def __enter__(self) -> WindowFiller:
        """Return the filler itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _announce(self, plan: WindowPlan, upcoming: WindowPlan | None) -> None:
        blocks = plan.opened_blocks() + (() if upcoming is None else upcoming.opened_blocks())
        if blocks:
            self._source.announce([block for block in blocks if block not in self._open])

    def _tasks_of(self, plan: WindowPlan) -> list[_Task]:
        """Gather the slices of each block, read by one reader in order; tasks in the order of their first slices."""
        tasks: dict[int, _Task] = {}
        first = n_opened = 0
        for block, start, n_rows in plan.table.tolist():
            task = tasks.get(block)
            if task is None:
                task = tasks[block] = _Task(len(tasks), block, [], n_opened)
                if block not in self._open:
                    n_opened += 1
            task.slices.append((start, n_rows, first))
            first += n_rows
        return list(tasks.values())

    def _work(self, job: _Job) -> None:
        while (task := job.claim()) is not None:
            try:
                self._read(job, task)
            except BaseException as err:
                self._fail(job, task.number, err)

    def _fail(self, job: _Job, number: int, error: BaseException) -> None:
        with self._room:
            job.errors.append((number, error))
            self._room.notify_all()

    def _read(self, job: _Job, task: _Task) -> None:
        """Read the slices of one block and place their rows."""
        block, row = task.block, task.slices[0][0]
        reader = self._take_reader(job, task)
        try:
            for start, n_rows, first in task.slices:
                at = 0
                while at < n_rows:
                    if self._stopped or job.errors:
                        raise Stopped
                    n, piece = reader.read_some(min(self._layout.piece_rows, n_rows - at))
                    places = job.places[first + at : first + at + n]
                    self._placer.place(job.window, piece, block, start + at, places)
                    if self._keep is not None:
                        self._keep.write(piece.X, job.window, places, block, start + at)
                    at += n
                row = start + n_rows
        except BaseException:
            self._give_back(block, reader, None)
            raise
        self._give_back(block, reader, row if row < self._source.block_rows[block] else None)

    def _take_reader(self, job: _Job, task: _Task) -> BlockReader:
        """Go on with an open block, or open it as soon as there is room and it is its turn.

        Blocks are opened in plan order: when the turn comes, all blocks that the plan has closed by then are closed, or
        being read to their end by threads that wait for nothing, so that there will be room. In any other order a block
        could take the room of one before it, stay open beyond the window, and leave it waiting for ever.
        """
        found = self._open.pop(task.block, None)
        if found is not None:
            return found[0]
        with self._room:
            while job.n_opened != task.opening or self._n_open >= self._layout.n_open:
                if self._stopped or job.errors:
                    raise Stopped
                self._room.wait()
            self._n_open += 1
            job.n_opened += 1
            self._room.notify_all()
        try:
            return self._source.open_block(task.block, task.slices[0][0], piece_rows=self._layout.piece_rows)
        except BaseException:
            self._leave_room()
            raise

    def _give_back(self, block: int, reader: BlockReader, row: int | None) -> None:
        """Keep a reader for its next slice, or close it if no row is to follow."""
        if row is not None:
            self._open[block] = (reader, row)
            return
        try:
            reader.close()
        finally:
            self._leave_room()

    def _leave_room(self) -> None:
        with self._room:
            self._n_open -= 1
            self._room.notify_all()

    def _close_readers(self) -> None:
        with contextlib.ExitStack() as stack:  # every one, even if closing another fails
            while self._open:
                block, (reader, _) = self._open.popitem()
                stack.callback(self._give_back, block, reader, None)


class ResidentFiller:
    """Fills windows that each hold every row: reads once, and shuffles what it read anew for every epoch.

    Takes the place of a `WindowFiller` where the layout has room for one window more; the windows are the same.

    Parameters
    ----------
    filler : WindowFiller or FlatFiller
        Reads the rows, and is closed as soon as it has.
    held : Window
        Memory for all rows, in file order.
    """

    def __init__(self, filler: WindowFiller | FlatFiller, held: Window) -> None:
        self._filler = filler
        self._held = held
        self._places = np.empty(len(held.ids), np.int32)
        self._filled = False

    @property
    def read_rows(self) -> int:
        """Rows read from the source so far."""
        return self._filler.read_rows

    def fill(self, window: Window, plan: WindowPlan, upcoming: WindowPlan | None = None) -> None:
        """Fill a window, see `WindowFiller.fill`."""
        held = self._held
        if not self._filled:
            self._filler.fill(held, replace(plan, shuffle=False))
            self._filler.close()
            self._filled = True
        places = plan.places(self._places)
        n = plan.n_rows
        copy_rows(held.X[:n], held.y[:n], held.ids[:n], places, window.X, window.y, window.ids)
        if held.weight is not None and window.weight is not None:
            place_weights(held.weight[:n], places, window.weight)
        window.describe(plan)

    def stop(self) -> None:
        """Make `fill` give up soon, from any thread."""
        self._filler.stop()

    def close(self) -> None:
        """Stop the threads and close the readers. Idempotent."""
        self._filler.close()
