"""A source in file order, a bounded piece at a time, worked on by several threads.

What the threads make of the pieces comes out in the order of the rows, whoever was faster, and only as much of it is
held as a consumer that lags behind should be kept waiting for.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.combining import combine_columns, combine_eights, combine_rows
from streamgd.data.compiled.memory import DTYPE_CODES
from streamgd.data.flat_files import FlatPieces
from streamgd.data.prefetch import default_threads
from streamgd.data.sources.base import BlockReader, Columns, Source, readable
from streamgd.learn.model import LinearModel

Array = NDArray[Any]
Floats = NDArray[np.float64]
T = TypeVar("T")

#: Bytes of a piece as float64, features and outputs together.
_PIECE_BYTES = 2 << 20
#: Up to so many outputs, rows are added up where they lie; for more, they are turned into columns first.
_FEW_OUTPUTS = 3
#: Blocks that a source which computes is told of ahead of time, the one being read included.
_AHEAD = 3
#: No more threads than this, nor so many that their open blocks cost more than this.
_MOST_THREADS, _OPEN_BYTES = 8, 256 << 20
#: Results held for the consumer, about.
_HELD_BYTES = 32 << 20


class Piece(NamedTuple):
    """Consecutive rows of one block.

    Attributes
    ----------
    block, start : int
        Where they lie.
    decided : ndarray of shape (n_rows, n_outputs), float64
        The model's decision values.
    finite : bool
        Whether all features are finite.
    X : ndarray of shape (n_rows, n_features), Columns or sequence of ndarrays
        Features as stored.
    y : ndarray, pyarrow.Array or None
        The target as stored.
    weight : ndarray of shape (n_rows,), or None
        Sample weights.
    """

    block: int
    start: int
    decided: Floats
    finite: bool
    X: Any
    y: Any
    weight: Array | None


def map_pieces(
    source: Source, model: LinearModel, function: Callable[[Piece], T], *, n_threads: int | None = None
) -> Generator[T, None, None]:
    """Decide all rows of a source, about two megabytes at a time, and apply a function to what comes of it.

    Parameters
    ----------
    source : Source
        What to read. Its handles are released when the iterator ends or is dropped.
    model : LinearModel
        What decides.
    function : callable
        Given a `Piece`; called by several threads. What it returns may refer to the piece's `decided` only.
    n_threads : int or None, default=None
        Threads; default: one for each processor. No result depends on it.

    Yields
    ------
    object
        What the function returned, in the order of the rows.
    """
    most = max(1, _PIECE_BYTES // (8 * (source.n_features + len(model.coef))))
    work = _Work(source, model, function, most)
    wanted = default_threads() if n_threads is None else n_threads
    # A source that holds whole blocks computes them side by side by itself.
    affordable = 1 if source.holds_block else max(1, _OPEN_BYTES // max(1, source.open_block_bytes))
    n_threads = min(wanted, affordable, source.n_blocks, _MOST_THREADS)
    try:
        if n_threads == 1:
            for block in range(source.n_blocks):
                yield from work.through(block)
        else:
            yield from work.side_by_side(n_threads)
    finally:
        work.stop()
        source.close()


class _Work:
    """Blocks claimed in order by threads, and their results handed out in order."""

    def __init__(self, source: Source, model: LinearModel, function: Callable[[Piece], T], most: int) -> None:
        self._source, self._model, self._function, self._most = source, model, function, most
        self._flat = FlatPieces(source)
        self._row_bytes = 8 * (len(model.coef) + 2)
        self._changed = threading.Condition()
        self._results: dict[int, deque[tuple[Any, int]]] = {}
        self._ended: dict[int, BaseException | None] = {}
        self._n_claimed = self._current = self._held = 0
        self._stopped = self._closing = False
        self._threads: list[threading.Thread] = []

    def through(self, block: int) -> Generator[Any, None, None]:
        """Work through one block."""
        source, n_rows = self._source, int(self._source.block_rows[block])
        source.announce(range(block, min(block + _AHEAD, source.n_blocks)))
        n = -(-n_rows // max(1, round(n_rows / self._most)))  # even pieces, about as long as wanted
        reader: BlockReader | None = None
        with contextlib.ExitStack() as stack:
            for start in range(0, n_rows, n):
                rows = self._flat.read(block, start, min(n, n_rows - start)) if reader is None else None
                if rows is None:
                    if reader is None:
                        reader = stack.enter_context(source.open_block(block, start, piece_rows=n))
                    rows = reader.read(min(n, n_rows - start))
                decided, finite = decide(self._model, rows.X, min(n, n_rows - start))
                yield self._function(Piece(block, start, decided, finite, rows.X, rows.y, rows.weight))

    def side_by_side(self, n_threads: int) -> Generator[Any, None, None]:
        """Work through all blocks with several threads."""
        for number in range(n_threads):
            thread = threading.Thread(target=self._run, name=f"streamgd-pieces-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        for block in range(self._source.n_blocks):
            while (found := self._next_of(block)) is not None:
                yield found[0]

    def _next_of(self, block: int) -> tuple[Any] | None:
        """Wait for the next result of a block; None after the last one."""
        with self._changed:
            self._current = block
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._results.get(block) or block in self._ended)
            if self._results.get(block):
                result, n_bytes = self._results[block].popleft()
                self._held -= n_bytes
                self._changed.notify_all()
                return (result,)
            self._results.pop(block, None)
            error = self._ended.pop(block)
        if error is not None:
            raise error
        return None

    def _run(self) -> None:
        while True:
            with self._changed:
                block = self._n_claimed
                if self._stopped or block == self._source.n_blocks:
                    return
                self._n_claimed += 1
                self._results[block] = deque()
            error: BaseException | None = None
            try:
                self._fill(block)
            except BaseException as err:
                error = err
            with self._changed:
                self._ended[block] = error
                self._stopped = self._stopped or error is not None  # blocks before this one are being worked on
                self._changed.notify_all()

    def _fill(self, block: int) -> None:
        rows_done = 0
        for result in self.through(block):
            n_bytes = self._row_bytes * min(self._most, int(self._source.block_rows[block]) - rows_done)
            rows_done += self._most
            with self._changed:
                self._results[block].append((result, n_bytes))
                self._held += n_bytes
                self._changed.notify_all()
                # Whoever works on the block that the consumer waits for goes on in any case.
                self._changed.wait_for(lambda: self._held < _HELD_BYTES or self._current == block or self._closing)
                if self._closing:
                    return

    def stop(self) -> None:
        """Stop and join the threads."""
        with self._changed:
            self._stopped = self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._flat.close()


def decide(model: LinearModel, X: Any, n_rows: int) -> tuple[Floats, bool]:
    """Return coefficients · features + intercept, and whether all features are finite.

    Parameters
    ----------
    model : LinearModel
        What decides.
    X : ndarray of shape (n_rows, n_features), Columns, or sequence of ndarrays
        Features as stored; added up column after column in float64, so that every processor gives the same bits.
    n_rows : int
        Rows of `X`.

    Returns
    -------
    ndarray of shape (n_rows, n_outputs), float64, and bool
    """
    out = np.empty((n_rows, len(model.coef)))
    if n_rows == 0:
        return out, True
    if isinstance(X, np.ndarray):
        X = readable(X)
        if X.strides[1] == X.itemsize or X.shape[1] == 1:
            done = 0
            if len(model.coef) <= _FEW_OUTPUTS and X.dtype.kind == "f" and X.flags.c_contiguous:
                done = combine_eights(X, model.coef, model.intercept, out)
            address = X.__array_interface__["data"][0] + done * X.strides[0]
            code, stride = DTYPE_CODES[X.dtype.name], X.strides[0] // X.itemsize
            return out, bool(combine_rows(address, code, stride, model.coef, model.intercept, out[done:]))
        X = list(X.T)
    columns = X if isinstance(X, Columns) else Columns(X)
    addresses, strides, dtypes = columns.locate()
    codes = np.array([DTYPE_CODES[name] for name in dtypes], np.int64)
    # By address: `columns` keeps the memory alive until the kernel has returned.
    return out, bool(combine_columns(addresses, codes, strides, model.coef, model.intercept, out))
