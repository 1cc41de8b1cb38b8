"""Fill windows from rows that lie in files or in memory as they are, each window by one compiled call.

Takes the place of `streamgd.data.window.WindowFiller` for such sources: the windows are the same. Nothing is kept open
from one window to the next but files, so that several threads may fill a window each.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.flat import FD, PART, PLACED, ROW_BYTES, TARGET, place_flat
from streamgd.data.compiled.shuffle import draw_places
from streamgd.data.early import EarlyBlocks
from streamgd.data.flat_files import OPEN_FILES, FlatFiles
from streamgd.data.plan import EpochPlan, Layout, WindowPlan
from streamgd.data.rows import RowPlacer, Window
from streamgd.data.shapes import MAX_READERS
from streamgd.data.sources.base import Source
from streamgd.data.sources.flat import FlatRows
from streamgd.data.targets import TargetCodec
from streamgd.data.window import Stopped
from streamgd.errors import CorruptDataError, OptionError

Floats = NDArray[np.float64]

#: Places are drawn already.
_NO_KEY = np.empty(0, np.uint64)
#: What is read passes through so many bytes for each thread, so that it stays in the second cache.
_SCRATCH_BYTES = 1 << 17
#: Windows of fewer bytes are filled by one thread each, several at once; others by all threads together.
_OWN_WINDOW_BYTES = 24 << 20


@dataclass(frozen=True)
class _Part:
    """Slices of a window, or some of them: the table that `streamgd.data.compiled.flat.place_flat` takes.

    Places are drawn from the key when rows are placed; without one they have been drawn. `ready` says where blocks lie
    that are in memory already, if any are.
    """

    slices: NDArray[np.int64]
    key: NDArray[np.uint64]
    places: NDArray[np.int32]
    ready: NDArray[np.int64]

    def those(self, kept: NDArray[np.bool_]) -> _Part:
        """Return some of the slices, whose places must have been drawn."""
        rows = np.repeat(kept, self.slices[:, 2])
        ready = self.ready[kept] if len(self.ready) else self.ready
        return _Part(self.slices[kept], self.key, self.places[rows], ready)


class FlatFiller:
    """Fills windows by a plan; several threads may do so at once.

    Parameters
    ----------
    source : Source
        What is read.
    rows : FlatRows
        Where its rows lie.
    layout : Layout
        How much at once.
    codec : TargetCodec or None
        How targets become numbers; None leaves the target out. One that `reads_flat` accepts.
    shift, factor : ndarray of shape (n_features,), float64, or None, default=None
        Each value becomes ``(x - shift) * factor``; None leaves it as it is.
    n_threads : int, default=1
        Threads that read; the result does not depend on it.
    check : bool, default=True
        Whether features, targets and weights that are not finite, and negative weights, are errors.
    files : FlatFiles or None, default=None
        The files of the source that this process has open, for fillers that share them; None opens its own.

    Attributes
    ----------
    n_callers : int
        How many threads should call `fill` at once.
    read_rows : int
        Rows read so far.
    """

    def __init__(
        self,
        source: Source,
        rows: FlatRows,
        layout: Layout,
        codec: TargetCodec | None,
        *,
        shift: Floats | None = None,
        factor: Floats | None = None,
        n_threads: int = 1,
        check: bool = True,
        files: FlatFiles | None = None,
    ) -> None:
        self._source, self._rows, self._check = source, rows, check
        self._placer = RowPlacer(source, codec, shift, factor, check=check)
        d = source.n_features
        self._shift = np.zeros(d) if shift is None else np.ascontiguousarray(shift, np.float64)
        self._factor = np.ones(d) if factor is None else np.ascontiguousarray(factor, np.float64)
        self._with_target = codec is not None
        classes = None if codec is None else codec.sorted_numbers
        self._classes = np.zeros(0) if classes is None else classes
        n_threads = max(1, min(n_threads, MAX_READERS))
        shared = layout.window_rows * layout.row_bytes > _OWN_WINDOW_BYTES
        self.n_callers = 1 if shared else n_threads
        self._n_parts = n_threads if shared else 1
        self._pool: ThreadPoolExecutor | None = None
        self._one_file = bool((rows.block_file == rows.block_file[0]).all())
        self._files, self._shares = files or FlatFiles(rows), files is not None
        self._early = EarlyBlocks(source, rows, layout, self._files)
        self._local = threading.local()
        self._stopped = False
        self.read_rows = 0

    def expect(self, plan: EpochPlan, first: int = 0) -> None:
        """Hear of an epoch from a window on, before that is asked for."""
        self._early.expect(plan, first)

    def fill(self, window: Window, plan: WindowPlan, upcoming: WindowPlan | None = None) -> None:
        """Fill a window, see `streamgd.data.window.WindowFiller.fill`."""
        if plan.n_rows > len(window.ids):
            raise OptionError(f"a plan of {plan.n_rows:,} rows for a window of {len(window.ids):,}: layouts differ")
        blocks = plan.table[:, 0]
        files = self._rows.block_file[blocks]
        slices = np.column_stack([plan.table, files, self._rows.block_start[blocks] + plan.table[:, 1]])
        if self._rows.origin is not None:
            slices[:, 0], slices[:, 1] = self._rows.origin[0][blocks], self._rows.origin[1][blocks] + plan.table[:, 1]
        ready, held = self._early.locate(plan)
        places = self._memory("places", len(window.ids), np.int32)[: plan.n_rows]
        part = _Part(slices, plan.key, places, ready)
        if not (plan.shuffle and self._n_parts == 1 and self._one_file):
            draw_places(part.key, places)
            part = replace(part, key=_NO_KEY)
        if self._n_parts > 1 and len(slices) > 1:
            self._place_parts(window, part)
        else:
            self._place(window, part)
        self._early.placed(plan, held)
        window.describe(plan)
        self.read_rows += plan.n_rows

    def _place_parts(self, window: Window, whole: _Part) -> None:
        """Have several threads place a part each."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._n_parts, "streamgd-reader")
        n_slices = len(whole.slices)
        n_parts = min(self._n_parts, n_slices)
        number = np.arange(n_slices) * n_parts // n_slices
        parts = [self._pool.submit(self._place, window, whole.those(number == part)) for part in range(n_parts)]
        errors = [error for part in parts if (error := part.exception()) is not None]
        if errors:
            raise errors[0]

    def _place(self, window: Window, part: _Part) -> None:
        """Read and place slices, those of a bounded number of files at a time."""
        if self._rows.check is not None:
            self._rows.check(part.slices[:, 4], part.slices[:, 2])
        if self._one_file:
            self._place_few(window, part, part.slices[:1, 3], None)
            return
        files, of_slice = np.unique(part.slices[:, 3], return_inverse=True)
        for first in range(0, len(files), OPEN_FILES):
            if self._stopped:
                raise Stopped
            few = files[first : first + OPEN_FILES]
            kept = (of_slice >= first) & (of_slice < first + len(few))
            self._place_few(window, part if len(few) == len(files) else part.those(kept), few, of_slice[kept] - first)

    def _place_few(
        self, window: Window, part: _Part, files: NDArray[np.int64], of_slice: NDArray[np.intp] | None
    ) -> None:
        """Read and place slices of a few files; `of_slice` says which of these each slice is in, None the first."""
        opened = [self._files.open(int(file)) for file in files]  # keeps descriptors until all is read
        strips = opened[0][0][None] if len(opened) == 1 else np.stack([table for table, _ in opened])
        ready = part.ready
        if not self._with_target:
            wanted = strips[0, :, PART] != TARGET
            strips, ready = strips[:, wanted], ready[:, wanted] if len(ready) else ready
        slices = part.slices.copy()
        slices[:, 3] = 0 if of_slice is None else of_slice
        width = int((strips[:, :, ROW_BYTES] * (strips[:, :, FD] >= 0)).sum(axis=1).max())
        scratch = self._memory("scratch", max(_SCRATCH_BYTES, width) + 64 * (strips.shape[1] + 1), np.uint8)
        weight = np.empty((0, 0)) if window.weight is None else window.weight[:, None]
        status, failed = place_flat(
            slices,
            strips,
            ready,
            (self._shift, self._factor),
            self._classes,
            part.key,
            part.places,
            (window.X, window.y, weight, window.ids),
            scratch,
            self._check,
        )
        if status != PLACED:
            self._explain(window, slices[failed], int(slices[:failed, 2].sum()), part.places)

    def _explain(self, window: Window, failed: NDArray[np.int64], first: int, places: NDArray[np.int32]) -> None:
        """Read the slice that failed as any other source is read, which raises the error that says why."""
        block, start, n_rows = (int(value) for value in failed[:3])
        if self._rows.origin is not None:  # back to the source's own blocks
            blocks, firsts = self._rows.origin
            inside = np.flatnonzero((blocks == block) & (firsts <= start))[-1]
            block, start = int(inside), start - int(firsts[inside])
        with self._source.open_block(block, start, piece_rows=n_rows) as reader:
            self._placer.place(window, reader.read(n_rows), block, start, places[first : first + n_rows])
        raise CorruptDataError(
            f"{self._source.locate(block, start)}: {n_rows:,} rows from here could not be used at first, and could a "
            "moment later: the data changes while it is read. Train on data that nobody writes to"
        )

    def _memory(self, name: str, size: int, dtype: type) -> Any:
        """Return memory that this thread keeps for the purpose."""
        found: NDArray[Any] | None = getattr(self._local, name, None)
        if found is None or len(found) < size:
            found = np.empty(size, dtype)
            setattr(self._local, name, found)
        return found

    def stop(self) -> None:
        """Make `fill` give up soon, from any thread."""
        self._stopped = True
        self._early.stop()

    def close(self) -> None:
        """Stop the threads and close the files. Idempotent."""
        self.stop()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        self._early.close()
        if not self._shares:
            self._files.close()

    def __enter__(self) -> FlatFiller:
        """Return the filler itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()
