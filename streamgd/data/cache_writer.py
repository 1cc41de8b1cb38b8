"""Write a cache beside the training: every row that is read for an epoch is written down as it is stored.

Reader threads do it, right after they put rows in a window. When the last window is filled every row is written; a
thread of its own then waits for the disk, while the next epoch already reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.cache import Cache, Written
from streamgd.data.layout import Layout, format_bytes
from streamgd.data.rows import RowPlacer, Window
from streamgd.data.sources.base import Array, Columns
from streamgd.data.sources.cache import CacheSource, sum_of_rows
from streamgd.data.targets import TargetCodec
from streamgd.data.window_stream import WindowStream
from streamgd.errors import CacheError, DataError

#: Rows pass through so much memory in each thread that reads.
_SCRATCH_BYTES = 1 << 18


class CacheWriter:
    """Writes the rows of an epoch to a cache, from any thread, in any order.

    Parameters
    ----------
    cache : Cache
        What to write.
    lock : file
        Locked; keeps others from writing.
    written : Written or None
        What another process wrote before; None begins anew.

    Attributes
    ----------
    error : OSError or None
        Why writing has ended early; what was written is gone, and whatever comes is left out.
    keeps_rest : bool
        Whether what is not whole stays, because a checkpoint tells how to go on with it.
    lost : bool or None
        Whether something that another process wrote did not outlive it; None as long as that is not known.

    Notes
    -----
    Each thread has a quarter of a megabyte for it. The exactly-once check of the epoch that is written covers the
    cache: it is whole when as many rows were written as there are.
    """

    def __init__(self, cache: Cache, lock: IO[str], written: Written | None) -> None:
        self._cache, self._lock = cache, lock
        self._placer = RowPlacer(cache.source, None, None, None, check=False)
        self._starts = np.cumsum(cache.source.block_rows) - cache.source.block_rows
        self._stamp = cache.stamp  # before a row is read: what changes later is noticed by whoever opens the cache
        n_parts = len(cache.parts.rows)
        self._own = written is None
        self._sums = np.zeros(n_parts, np.uint64) if written is None else written.sums.copy()
        self._n_rows = 0 if written is None else written.n_rows
        # What the windows that are filled, and not yet trained on, add: a checkpoint may come before any of them.
        self._open: dict[int, int] = {}
        self._open_rows = 0
        self._ahead: dict[int, tuple[dict[int, int], int]] = {}
        self._guard = threading.Lock()
        self._local = threading.local()
        self._rows_at_once = max(1, _SCRATCH_BYTES // max(1, cache.files[0].row_bytes))
        self._order = np.arange(self._rows_at_once, dtype=np.int32)
        self._flusher: threading.Thread | None = None
        self.error: OSError | None = None
        self.keeps_rest = False
        self.lost: bool | None = False if self._own else None
        self._descriptors: list[int] = []
        try:
            for file in cache.files:
                flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
                self._descriptors.append(os.open(cache.path / file.name, flags, 0o666))
        except OSError as err:
            self._fail(err)

    # --- reader threads ---
    def write(self, X: Any, window: Window, places: NDArray[np.int32], block: int, start: int) -> None:
        """Keep rows that were just put in a window.

        Parameters
        ----------
        X : ndarray or sequence of ndarrays
            The features, as they are stored.
        window : Window
            Where targets and weights lie by now.
        places : ndarray of shape (n_rows,), int32
            Where in the window.
        block, start : int
            Which rows these are.
        """
        if self.error is not None:
            return
        rows: Any = X if isinstance(X, np.ndarray | Columns) else Columns(X)
        first = int(self._starts[block]) + start
        for at in range(0, len(places), self._rows_at_once):
            n = min(self._rows_at_once, len(places) - at)
            here = places[at : at + n]
            out = self._scratch()[:n]
            piece = rows[at : at + n] if isinstance(rows, np.ndarray) else rows.rows(at, at + n)
            self._placer.place_features(piece, self._order[:n], out, block)
            y = window.y[here]
            if self._cache.numbers is not None:
                y = self._cache.numbers[y.astype(np.intp)]
            values = [out, y, *([] if window.weight is None else [window.weight[here]])]
            try:
                self._put(values, first + at, n)
            except OSError as err:
                self._fail(err)
                return

    def filled(self, index: int) -> None:
        """Note that a window is filled; what was written since the one before belongs to it."""
        with self._guard:
            self._ahead[index] = (self._open, self._open_rows)
            self._open, self._open_rows = {}, 0

    def _scratch(self) -> Array:
        found: Array | None = getattr(self._local, "rows", None)
        if found is None:
            file = self._cache.files[0]
            found = self._local.rows = np.empty((self._rows_at_once, file.width), file.dtype)
        return found

    def _put(self, values: list[Array], first: int, n_rows: int) -> None:
        """Write consecutive rows, and add them to the sums of their parts."""
        cache = self._cache
        for descriptor, file, rows in zip(self._descriptors, cache.files, values, strict=True):
            _write_all(descriptor, np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data, first * file.row_bytes)
        added = []
        for part in cache.parts.overlapping(first, n_rows):
            left = max(first, int(cache.parts.starts[part])) - first
            right = min(first + n_rows, int(cache.parts.starts[part + 1])) - first
            added.append((part, sum_of_rows(cache.files, [rows[left:right] for rows in values], first + left)))
        with self._guard:
            for part, value in added:
                self._open[part] = (self._open.get(part, 0) + value) % 2**64
            self._open_rows += n_rows

    def _fail(self, error: OSError) -> None:
        """Give up: make room at once."""
        with self._guard:
            self.error = self.error or error
            self.keeps_rest = False
        for descriptor in self._descriptors:  # a file that is removed keeps its room until it is closed
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
        self._remove()

    # --- the training thread ---
    def written_before(self, window: int) -> Written:
        """Return what is written of the windows before one, to be stored with the cursor that stands there."""
        with self._guard:
            for index in [index for index in self._ahead if index < window]:
                added, n_rows = self._ahead.pop(index)
                for part, value in added.items():
                    self._sums[part] = (int(self._sums[part]) + value) % 2**64
                self._n_rows += n_rows
            return Written(self._sums.copy(), self._n_rows, self._stamp)

    def finish(self, last_window: int) -> CacheSource | None:
        """End the epoch: return the rows that are written, or None if they are not all there.

        A thread goes on: it reads again what another process wrote before, which tells `lost`, and waits for the disk.
        `close` waits for it. From now on `error` means that others will not find the cache.

        Parameters
        ----------
        last_window : int
            The number of the epoch's last window, which is filled.
        """
        written = self.written_before(last_window + 1)
        if self.error is not None or written.n_rows != self._cache.source.n_rows:
            return None
        found = self._cache.view(written.sums, trusted=self._own)
        self.keeps_rest = True
        self._flusher = threading.Thread(target=self._flush, args=(written, found), name="streamgd-cache", daemon=True)
        self._flusher.start()
        return found

    def _flush(self, written: Written, found: CacheSource) -> None:
        try:
            if not self._own:
                found.require_whole()
            self.lost = False
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            self._cache.seal(written.sums)
        except DataError:  # also if it cannot be read
            self.lost, self.keeps_rest = True, False
        except OSError as err:
            self.error = err  # the files stay, because the run reads them
            self._cache.distrust()

    def close(self) -> None:
        """Wait for the disk and close the files; remove what nobody can go on with. Idempotent."""
        if self._flusher is not None:
            self._flusher.join()
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)
        if not self._lock.closed:
            if not self.keeps_rest:
                self._remove()
            self._lock.close()

    def _remove(self) -> None:
        for file in self._cache.files:
            with contextlib.suppress(OSError):
                (self._cache.path / file.name).unlink()

    def why(self) -> str:
        """Say why writing ended."""
        assert self.error is not None
        full = self.error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else self.error.strerror or str(self.error)
        return f"{self._cache.path}: {reason} (the cache takes {format_bytes(self._cache.needed_bytes)})"


def _write_all(descriptor: int, content: memoryview, at: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], at + done)


def write_epoch(
    cache: Cache, writer: CacheWriter, codec: TargetCodec, layout: Layout, *, n_threads: int | None = None
) -> Iterator[int]:
    """Read a source once for its cache alone, and yield the number of rows that are written.

    Parameters
    ----------
    cache : Cache
        What is written.
    writer : CacheWriter
        As `Cache.begin` gave it; closed at the end.
    codec : TargetCodec
        How targets become numbers.
    layout : Layout
        How the source is read.
    n_threads : int or None, default=None
        Threads that read.

    Raises
    ------
    CacheError
        If the cache cannot be written.
    DataError
        If the data cannot be used.
    """
    n_rows, source = 0, cache.source
    with (
        contextlib.closing(writer),
        WindowStream(source, layout, codec, seed=0, n_threads=n_threads, keep=writer) as windows,
    ):
        for window in windows:
            if writer.error is None and window.last:
                writer.finish(window.index)
            if writer.error is not None:
                break
            n_rows += window.n_rows
            yield n_rows
    if writer.error is not None:
        raise CacheError(f"no cache was written: {writer.why()}. Make room, or choose another folder") from writer.error
