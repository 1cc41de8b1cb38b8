"""The readers of the lanes of one process.

They share its threads and files, are bounded in number, and wait here between the turns of their lanes. See
`streamgd.run.lanes` for who uses them.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor

from streamgd.data.flat_files import FlatFiles
from streamgd.data.sources.base import Source
from streamgd.data.window import Stopped
from streamgd.run.lane_rows import LEAST_WINDOWS, Delivery, LanePlans, LaneReader, RowInputs

#: Turns of a lane for which blocks may wait until it has those before them.
_MOST_EARLY = 3


class Readers:
    """The readers of one process, by lane, and the threads that they share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: OrderedDict[int, LaneReader] = OrderedDict()
        self._used: Counter[int] = Counter()  # lanes whose readers are in use
        self._out: set[LaneReader] = set()  # those readers, as long as they are to be kept
        self._attempt = 0  # what was delivered before this one is not to be held
        self._early: dict[int, list[Delivery]] = {}  # what came before lanes can read on over it
        self._pool: ThreadPoolExecutor | None = None
        self._files: FlatFiles | None = None
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

    def take(
        self,
        plans: LanePlans,
        inputs: RowInputs,
        lane: int,
        epoch: int,
        row: int,
        *,
        n_threads: int,
        most: int,
        n_windows: int = LEAST_WINDOWS,
        delivery: Delivery | None = None,
    ) -> LaneReader:
        """Return a reader that stands where a turn begins; the caller gives it back or discards it.

        Parameters
        ----------
        plans : LanePlans
            The order of rows.
        inputs : RowInputs
            Where they come from.
        lane, epoch, row : int
            Where the turn begins.
        n_threads : int
            Threads that read, of all lanes together.
        most : int
            Readers at once, in use or not: those that were used least recently make room.
        n_windows : int
            Windows of a lane in memory at once.
        delivery : Delivery or None
            The blocks of a Dask collection behind the turn.
        """
        if delivery is not None:
            self.free(delivery.attempt)  # who was not told learns it so
        with self._lock:
            found = self._idle.pop(lane, None)
            self._used[lane] += 1
            leaving = self._beyond(most)
        for each in leaving:
            each.close()
        try:
            if found is not None:
                if found.goes_on_at(epoch, row) and (delivery is None or found.deliver(delivery)):
                    return self._go_on(found, delivery)
                found.close()
            files = self._files_of(inputs.source) if delivery is None else None
            pool = self.pool(n_threads)
            made = LaneReader(
                plans, inputs, pool, lane, epoch, row, n_windows=n_windows, delivery=delivery, files=files
            )
            return self._go_on(made, delivery)
        except BaseException:
            self._note_left(lane)
            with self._lock:
                self._early.pop(lane, None)
            raise

    def has(self, lane: int) -> bool:
        """Whether a lane has a reader here, in use or not."""
        with self._lock:
            return lane in self._idle or self._used[lane] > 0

    def discard(self, reader: LaneReader) -> None:
        """Close a reader in place of giving it back."""
        self._note_left(reader.lane)
        with self._lock:
            self._out.discard(reader)
            self._early.pop(reader.lane, None)
        reader.close()

    def _note_left(self, lane: int) -> None:
        with self._lock:
            self._used[lane] -= 1

    def _beyond(self, most: int) -> list[LaneReader]:
        """Take out the readers that are too many, those first that were used least recently; under the lock."""
        leaving = []
        while self._idle and (self._closed or len(self._idle) + self._used.total() > most):
            lane, reader = self._idle.popitem(last=False)
            self._early.pop(lane, None)
            leaving.append(reader)
        return leaving

    def expect(self, lane: int, delivery: Delivery) -> None:
        """Have a lane that is read here read on over blocks for a turn to come, as soon as it has those before it."""
        self.free(delivery.attempt)
        with self._lock:
            reader = self._idle.get(lane)
            if self._closed or delivery.attempt < self._attempt or (reader is None and self._used[lane] == 0):
                return
            self._early[lane] = [*self._early.get(lane, []), delivery][-_MOST_EARLY:]
            if reader is not None:
                self._read_on(reader)

    def _go_on(self, reader: LaneReader, delivery: Delivery | None) -> LaneReader:
        """Have a reader that is taken read on over what came early."""
        with self._lock:
            if delivery is None or delivery.attempt >= self._attempt:
                self._out.add(reader)
            self._read_on(reader)
        return reader

    def _read_on(self, reader: LaneReader) -> None:
        early = sorted(self._early.pop(reader.lane, []), key=lambda each: (each.span.epoch, each.span.row))
        left = [delivery for delivery in early if not reader.deliver(delivery)]
        if left and not self._closed:
            self._early[reader.lane] = left

    def _files_of(self, source: Source) -> FlatFiles | None:
        """Return the files that all lanes read from: one each, and many lanes would run out of descriptors."""
        rows = source.flat_rows()
        with self._lock:
            if self._files is None and rows is not None:
                self._files = FlatFiles(rows)
            return self._files

    def give_back(self, reader: LaneReader, most: int) -> None:
        """Keep a reader for its lane's next turn; those that were used least recently go when there are too many."""
        reader.let_go()
        leaving: list[LaneReader] = []
        with self._lock:
            wanted = reader in self._out
            if wanted:
                self._out.discard(reader)
                self._used[reader.lane] -= 1
                if not self._closed:
                    self._read_on(reader)
                old = self._idle.pop(reader.lane, None)
                self._idle[reader.lane] = reader
                leaving = [*self._beyond(most), *([] if old is None else [old])]
        if not wanted:
            self.discard(reader)
        for each in leaving:
            each.close()

    def free(self, attempt: int) -> None:
        """Close all readers, which may hold many blocks, and hold none that were delivered before an attempt.

        Those in use are closed when they are given back, as are those that turns take which are late.
        """
        with self._lock:
            if attempt <= self._attempt:
                return
            leaving = list(self._idle.values())
            self._attempt = attempt
            self._idle.clear()
            self._out.clear()
            self._early.clear()
        for each in leaving:
            each.close()

    def close(self) -> None:
        """Close them all. Idempotent."""
        with self._lock:
            self._closed = self.stopping = True
            idle, pool, files = list(self._idle.values()), self._pool, self._files
            self._idle.clear()
            self._early.clear()
            self._pool = self._files = None
        for reader in idle:
            reader.close()
        if pool is not None:
            pool.shutdown(wait=True)
        if files is not None:
            files.close()
