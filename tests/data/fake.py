"""A source made of arithmetic, which records how it is used and can be told to misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from hypothesis import settings

from streamgd.data.plan import Layout
from streamgd.data.sources.base import BlockReader, Slice, Source, TargetInfo

#: For properties: the same examples every time, and no deadline, which compiling on the first call would miss.
repeatable = settings(deadline=None, derandomize=True)


class FakeSource(Source):
    """Rows of a matrix in blocks; its target is the row's number unless `y` is given."""

    kind = "fake"
    name = "fake"

    def __init__(
        self,
        block_rows: Sequence[int],
        X: Any = None,
        y: Any = None,
        *,
        n_features: int = 3,
        weight: Any = None,
        columns: bool = False,
        row_dtype: str = "float32",
        open_block_bytes: int = 0,
        with_target: bool = True,
        kind: str = "fake",
    ) -> None:
        self.kind = kind
        self.block_rows = np.asarray(block_rows, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.block_rows)])
        n = int(self._starts[-1])
        if X is None:
            X = np.arange(n * n_features, dtype=np.float32).reshape(n, n_features)
        self.X = X
        self.y = np.arange(n, dtype=np.float64) if y is None else y
        self.weight = weight
        self.n_features = X.shape[1]
        self.feature_names = None
        self.feature_dtypes = (X.dtype.name,) * self.n_features
        self.row_dtype = np.dtype(row_dtype)
        is_vector = getattr(self.y, "ndim", 1) == 1
        numeric = getattr(getattr(self.y, "dtype", None), "kind", "O") in "fiu"
        kind_of_y = str(getattr(self.y, "dtype", "string"))
        n_outputs = 1 if is_vector else self.y.shape[1]
        self.target = TargetInfo("y", n_outputs, kind_of_y, numeric, is_vector) if with_target else None
        self.has_weight = weight is not None
        self.stored_bytes = X.nbytes
        self.open_block_bytes = open_block_bytes
        self.fingerprint = {"n_rows": n, "sum": float(np.nansum(X.astype(np.float64)))}
        self.origin = {}
        self.made: dict[str, Any] = {}
        self.columns = columns
        self.lock = threading.Lock()
        self.n_open = self.most_open = self.n_opened = self.n_read = 0
        self.announced: list[tuple[int, ...]] = []
        self.threads: set[str] = set()
        self.before_read: Callable[[int, int], None] = lambda block, row: None

    def row_of(self, block: int, row: int) -> int:
        return int(self._starts[block]) + row

    def open_block(self, block: int, start: int = 0, *, piece_rows: int = 16384) -> BlockReader:
        with self.lock:
            self.n_open += 1
            self.n_opened += 1
            self.most_open = max(self.most_open, self.n_open)
        return FakeReader(self, block, start, piece_rows)

    def iter_targets(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any, Any]]:
        for block in range(self.n_blocks):
            first = max(start, int(self._starts[block]))
            end = min(int(self._starts[block + 1]), self.n_rows if stop is None else stop)
            if first < end:
                yield first, self.y[first:end], None if self.weight is None else self.weight[first:end]

    def stamp(self) -> dict[str, Any]:
        return {"X": float(np.nansum(self.X)), **self.made}

    def locate(self, block: int, row: int) -> str:
        return f"fake, block {block}, row {row}"

    def announce(self, blocks: Sequence[int]) -> None:
        self.announced.append(tuple(blocks))


class FakeReader(BlockReader):
    def __init__(self, source: FakeSource, block: int, start: int, piece_rows: int) -> None:
        self.source, self.block, self.at, self.piece_rows = source, block, start, piece_rows
        self.closed = False

    def read(self, n_rows: int) -> Slice:
        source = self.source
        assert not self.closed
        assert 0 < n_rows <= self.piece_rows
        assert self.at + n_rows <= source.block_rows[self.block], "asked for more rows than the block has"
        source.before_read(self.block, self.at)
        with source.lock:
            source.n_read += n_rows
            source.threads.add(threading.current_thread().name)
        first = source.row_of(self.block, self.at)
        rows = slice(first, first + n_rows)
        self.at += n_rows
        X = source.X[rows]
        return Slice(
            [np.ascontiguousarray(X[:, j]) for j in range(X.shape[1])] if source.columns else X,
            None if source.target is None else source.y[rows],
            None if source.weight is None else source.weight[rows],
        )

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with self.source.lock:
                self.source.n_open -= 1


def layout_of(
    source: Source,
    *,
    window_rows: int,
    slice_rows: int | None = None,
    n_open: int = 8,
    piece_rows: int = 64,
    n_outputs: int = 1,
    shuffle: bool = True,
    resident: bool = False,
) -> Layout:
    """Make a layout by hand, for the shapes that a memory plan would take much data to arrive at."""
    slice_rows = int(source.block_rows.max()) if slice_rows is None else slice_rows
    row_bytes = source.n_features * source.row_dtype.itemsize + 8 * n_outputs + 8 * source.has_weight + 12
    return Layout(
        window_rows=window_rows,
        n_open=n_open,
        slice_rows=slice_rows,
        piece_rows=piece_rows,
        row_bytes=row_bytes,
        planned_bytes=2 * window_rows * row_bytes,
        buffer_bytes=2 * window_rows * row_bytes,
        n_outputs=n_outputs,
        shuffle=shuffle,
        resident=resident,
        n_windows=2 + resident,
        window_bytes=window_rows * row_bytes,
        open_bytes=0,
        piece_bytes=0,
        carry_bytes=0,
    )


def reader_threads() -> list[str]:
    """Name the threads of streamgd that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamgd")]


def expect_no_threads(timeout_s: float = 5.0) -> None:
    """Fail if threads of streamgd outlive what started them."""
    end = time.monotonic() + timeout_s
    while reader_threads() and time.monotonic() < end:
        time.sleep(0.005)
    assert reader_threads() == []
