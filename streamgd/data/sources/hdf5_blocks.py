"""Where blocks of an HDF5 file begin and end: pure arithmetic on how its datasets are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.hdf5_layout import FileInfo

#: A compressed chunk must be decoded whole for any row of it. Runs of such chunks are kept decoded while their block is
#: open; only runs bigger than this are cut, and then decoded once for each part.
HELD_BYTES = 32 << 20
#: Blocks of fewer rows cost more to open than to read.
_LEAST_ROWS = 32
#: Short runs of chunks are joined until a source has no more blocks than this: more mix no better.
_MANY_BLOCKS = 2048
#: Blocks grow until they decode at most so many times their own bytes, and as long as they are small, few more at all.
_DECODED_TIMES, _DECODED_TIMES_SMALL = 4, 1.1
#: The places of so many chunks of a source are kept in memory, in sixteen bytes each; h5py reads datasets with more.
MOST_CHUNKS, _PLACE_BYTES = 1 << 20, 16
#: They are there once, and every open block is charged with such a part of them.
_SHARES = 8
#: A row that lies in more pieces than this is read a block at a time: the cost is per piece, not per byte.
_MANY_PIECES = 8


@dataclass(frozen=True)
class Cut:
    """How a file is cut into blocks.

    Attributes
    ----------
    starts : ndarray of shape (n_blocks,), int64
        First row of each block.
    held : tuple of bool
        For each dataset, whether an open block keeps its rows decoded.
    open_bytes : int
        Memory that an open block costs.
    times_decoded : float
        How often every byte is decoded in a pass over the blocks, at most about; 1 is ideal.
    """

    starts: NDArray[np.int64]
    held: tuple[bool, ...]
    open_bytes: int
    times_decoded: float


def cut_into_blocks(info: FileInfo, block_bytes: int, n_rows: int) -> Cut:
    """Cut a file into blocks: small, because many small blocks mix better, but cheap to read.

    Rows stored in one piece, or in tall chunks without compression, can be read from anywhere: blocks take about
    `block_bytes`. Otherwise a block is one run of chunks side by side, whole because a compressed chunk can only be
    decoded whole; several runs where they have few rows for a source of `n_rows` or other datasets have far taller
    chunks; a part of one where it is bigger than `HELD_BYTES`.
    """
    row_bytes = max(1, sum(each.row_bytes for each in info.datasets))
    free = max(1, block_bytes // row_bytes)
    chunked = [each for each in info.features if each.chunks is not None]
    lead = max(chunked, key=lambda each: (each.in_wholes, each.row_bytes), default=None)
    run = free if lead is None or lead.chunks is None else min(lead.chunks[0], info.n_rows)
    limit = max(block_bytes, HELD_BYTES) if any(each.in_wholes for each in info.datasets) else block_bytes
    parts = 1
    if lead is not None and run * row_bytes > block_bytes:
        parts = math.ceil(run * row_bytes / (limit if lead.in_wholes else block_bytes))
    if parts > 1:
        rows = math.ceil(run / parts)
        runs = np.arange(0, info.n_rows, run, dtype=np.int64)
        starts = (runs[:, None] + np.arange(0, run, rows)[None, :]).ravel()
        starts = starts[starts < info.n_rows]
    else:
        rows = run
        least = max(_LEAST_ROWS, n_rows // _MANY_BLOCKS)
        if rows < least:
            rows *= max(1, min(math.ceil(least / rows), free // rows))
        for times, most_bytes in ((_DECODED_TIMES_SMALL, block_bytes), (_DECODED_TIMES, limit)):
            while _times_decoded(info, rows) > times and 2 * rows * row_bytes <= most_bytes:
                rows *= 2
        starts = np.arange(0, info.n_rows, rows, dtype=np.int64)
    many = sum(each.pieces for each in info.features) > _MANY_PIECES
    n_features = len(info.features)
    held = tuple(each.in_wholes or (many and i < n_features) for i, each in enumerate(info.datasets))
    open_bytes = 4096 + sum(rows * each.row_bytes for each, kept in zip(info.datasets, held, strict=True) if kept)
    # While a chunk is decoded it is there twice, as stored and as bytes that are not yet rows.
    decoding = max((2 * each.chunk_bytes for each in info.datasets if each.in_wholes), default=0)
    times = float(parts) if lead is not None and lead.in_wholes and parts > 1 else _times_decoded(info, rows)
    return Cut(starts, held, open_bytes + decoding, times)


def place_bytes(files: Sequence[FileInfo]) -> int:
    """Return an open block's share of the memory that the places of chunks take."""
    n_chunks = sum(each.n_chunks for info in files for each in info.datasets)
    return -(-_PLACE_BYTES * min(n_chunks, MOST_CHUNKS) // _SHARES)


def rows_at_least(info: FileInfo) -> int:
    """Estimate how many rows' bytes are decoded for any row: those of the chunks that are read whole."""
    row_bytes = max(1, sum(each.row_bytes for each in info.datasets))
    heights = [(min(each.chunks[0], info.n_rows), each) for each in info.datasets if each.in_wholes and each.chunks]
    return max(1, sum(height * each.row_bytes for height, each in heights) // row_bytes)


def _times_decoded(info: FileInfo, rows: int) -> float:
    """Estimate the bytes decoded for blocks of so many rows, as a multiple of the bytes they hold."""
    decoded = 0
    for each in info.datasets:
        height = min(each.chunks[0], info.n_rows) if each.in_wholes and each.chunks is not None else 1
        if rows % height == 0:
            decoded += rows * each.row_bytes
        else:
            decoded += (height if height % rows == 0 else rows + height) * each.row_bytes
    return decoded / max(1, rows * sum(each.row_bytes for each in info.datasets))


def advise(files: Sequence[FileInfo], most_rows: int, times_decoded: float, block_bytes: int) -> str | None:
    """Advise other chunks where those read whole are so tall that blocks are big, or read again and again."""
    info, lead = max(
        ((info, each) for info in files for each in info.features if each.in_wholes),
        key=lambda pair: pair[1].chunk_bytes,
        default=(None, None),
    )
    if info is None or lead is None or lead.chunks is None:
        return None
    row_bytes = max(1, sum(each.row_bytes for each in info.datasets))
    if most_rows * row_bytes <= 4 * block_bytes and times_decoded <= _DECODED_TIMES:
        return None
    better = (max(_LEAST_ROWS, block_bytes // 4 // row_bytes), lead.width)[: len(lead.shape)]
    again = f" and are read about {times_decoded:.0f} times an epoch" if times_decoded > 1.5 else ""
    return (
        f"dataset {lead.name!r} is stored in chunks of {lead.chunks[0]:,} rows that can only be read whole "
        f"({', '.join(lead.filters) or 'wider than the dataset'}): blocks take up to "
        f"{most_rows * row_bytes / 2**20:,.1f} MiB{again}. Rewritten with chunks={better} it would mix better and take "
        "less memory"
    )
