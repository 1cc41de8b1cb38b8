"""The sample of rows that the survey takes the features' means and scales from.

At least 65,536 rows where there are as many: runs of rows from the heads of up to 64 blocks spread evenly over the
source, of fewer where opening a block decodes much more than the run; all rows of a smaller source.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.rows import RowPlacer
from streamgd.data.sources.base import BlockReader, Source

Floats = NDArray[np.float64]

#: Rows of the sample, and the most blocks it is taken from.
SAMPLE_ROWS, SAMPLE_BLOCKS = 65_536, 64
#: Bytes of targets in a sample of them, but no fewer rows than these.
_TARGETS_BYTES, _LEAST_TARGETS = 1 << 23, 256
#: Blocks of the sample that are read side by side, if together they take no more than so many bytes.
_READ_AHEAD, _READ_AHEAD_BYTES = 2, 1 << 24


def sampling_step(n_rows: int, n_targets: int) -> int:
    """Return every how many rows one's targets stand for the others': as many as the sample has, or fewer wide ones."""
    wanted = min(SAMPLE_ROWS, max(_LEAST_TARGETS, _TARGETS_BYTES // (8 * n_targets)))
    return n_rows // wanted + 1


def sample_runs(source: Source) -> Iterator[tuple[int, int, int]]:
    """Yield (block, start, n_rows) of the rows to sample: a pure function of the source's metadata."""
    n_rows = source.n_rows
    if n_rows <= SAMPLE_ROWS:
        for block, rows in enumerate(source.block_rows):
            yield block, 0, int(rows)
        return
    affordable = n_rows // 16 // max(1, source.slice_cost_rows)
    n_blocks = min(source.n_blocks, SAMPLE_BLOCKS, max(4, affordable))
    heads = [round(i * source.n_blocks / n_blocks) for i in range(n_blocks)] + [source.n_blocks]
    stretch_rows = np.add.reduceat(source.block_rows, heads[:-1])
    for i, left in enumerate(_divide(SAMPLE_ROWS, stretch_rows)):
        for block in range(heads[i], heads[i + 1]):
            n = min(left, int(source.block_rows[block]))
            if n == 0:
                break
            yield block, 0, n
            left -= n


def _divide(wanted: int, available: NDArray[np.int64]) -> list[int]:
    """Divide a number among stretches, as evenly as they bear it: what small ones cannot give, the others do."""
    shares = [0] * len(available)
    for n_before, i in enumerate(np.argsort(available, kind="stable").tolist()):
        shares[i] = min(int(available[i]), -(-wanted // (len(available) - n_before)))
        wanted -= shares[i]
    return shares


def read_runs(
    source: Source, runs: Sequence[tuple[int, int, int]], buffer_bytes: int
) -> Iterator[tuple[int, Floats, Any]]:
    """Yield (first row, features, weights) of pieces of runs of rows, in order, read side by side if there is room.

    Parameters
    ----------
    source : Source
        Any.
    runs : sequence of (block, start, n_rows)
        Which rows.
    buffer_bytes : int
        The run's buffer.
    """
    offsets = np.cumsum(source.block_rows) - source.block_rows
    placer = RowPlacer(source, None, None, None, check=False)
    piece = max(1, (1 << 22) // (8 * source.n_features))

    def read(block: int, reader: BlockReader, done: int, n: int) -> tuple[int, Floats, Any]:
        rows, X = reader.read(n), np.empty((n, source.n_features))
        placer.place_features(rows.X, np.arange(n, dtype=np.int32), X, block)
        return int(offsets[block]) + done, X, rows.weight

    def read_whole(block: int, start: int, n: int) -> tuple[int, Floats, Any]:
        with source.open_block(block, start, piece_rows=n) as reader:
            first, X, weight = read(block, reader, start, n)
            return first, X, None if weight is None else np.array(weight)  # it may be the reader's own

    most = max(n for _, _, n in runs)
    needed = _READ_AHEAD * (source.open_block_bytes + 2 * most * 8 * source.n_features)  # as stored, and as numbers
    room = min(_READ_AHEAD_BYTES, buffer_bytes // 2)
    simple = source.kind in ("dask", "memory") or len(runs) == 1  # Dask computes blocks ahead in its own way
    if simple or most > piece or needed > room:
        heads = [(block, n) for block, start, n in runs if start == 0]  # others begin with rows in a block's middle
        opened = iter(source.open_heads(heads, piece_rows=piece))
        for block, start, n in runs:
            with next(opened) if start == 0 else source.open_block(block, start, piece_rows=piece) as reader:
                for done in range(0, n, piece):
                    yield read(block, reader, start + done, min(piece, n - done))
        return
    with ThreadPoolExecutor(_READ_AHEAD, "streamgd-survey") as pool:
        ahead: deque[Future[tuple[int, Floats, Any]]] = deque()
        try:
            for run in runs:
                ahead.append(pool.submit(read_whole, *run))
                if len(ahead) > _READ_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
