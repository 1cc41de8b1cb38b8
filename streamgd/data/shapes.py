"""What windows look like: how many rows, of how many blocks, chosen from what they cost and a number of bytes.

The arithmetic behind `streamgd.data.layout.plan_layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from streamgd.data.sources.base import Source

#: No more reader threads than this work at once, so that what they decode can be planned for.
MAX_READERS = 8
#: A window should draw on at least this many blocks before it may hold whole ones.
_WHOLE_BLOCKS_PER_WINDOW = 8
#: Where blocks are big, windows draw on so many if they fit, and take this share of the buffer each, or all that is
#: left by very few; blocks are opened only as long as this leaves windows of so many bytes.
_BLOCKS_PER_WINDOW, _WINDOW_SHARE, _LEAST_WINDOW_BYTES = 8, 10, 12 << 20
#: Windows of small blocks draw on so many if that takes no fewer and no more bytes than these, or take this share of a
#: big buffer: memory is slow when it is new, and beyond the caches.
_AMPLE_BLOCKS, _AMPLE_BYTES_FROM, _AMPLE_BYTES_TO, _AMPLE_SHARE = 16, 8 << 20, 32 << 20, 14
#: Slices shorter than this cost more in calls than they bring in mixing.
_MIN_SLICE_ROWS = 256
_MIN_WINDOW_ROWS = 256
#: Where slices are cheap, windows take so many bytes, which a processor's caches hold, or this share of a big buffer…
_CHEAP_WINDOW_BYTES, _CHEAP_WINDOW_SHARE = 4 << 20, 64
#: … and, as far as an eighth of the buffer goes, so many rows at least; slices of so many blocks make up each of them.
_CHEAP_WINDOW_ROWS, _CHEAP_BLOCKS_PER_WINDOW = 16_384, 32
_MIN_PIECE_BYTES, _MAX_PIECE_BYTES = 20_000, 4_000_000
#: All pieces together may always cost this share of an open block.
_PIECES_PER_OPEN_BLOCK = 64
_MAX_WINDOW_ROWS = 2**31 - 1  # places are int32


@dataclass(frozen=True)
class Costs:
    """What a plan has to pay for, in bytes.

    Attributes
    ----------
    buffer : int
        What is allowed.
    row, piece_row : int
        A row in a window; and as stored, being decoded.
    carry : int
        The open batch.
    open_block : int
        A block that is open.
    n_rows, n_blocks, max_block_rows : int
        Rows, blocks, and the rows of the largest.
    min_window_rows : int
        The fewest rows that a window may hold.
    """

    buffer: int
    row: int
    piece_row: int
    carry: int
    open_block: int
    n_rows: int
    n_blocks: int
    max_block_rows: int
    min_window_rows: int

    @classmethod
    def of(cls, source: Source, buffer_bytes: int, *, n_outputs: int, carry_rows: int) -> Self:
        """Return those of a source, with so many target columns and rows of a batch."""
        row = source.n_features * source.row_dtype.itemsize + 8 * n_outputs + 8 * source.has_weight + 8 + 4
        return cls(
            buffer=buffer_bytes,
            row=row,
            piece_row=_stored_width(source.feature_dtypes) + 16 * n_outputs + 16 * source.has_weight,
            carry=carry_rows * row,
            open_block=source.open_block_bytes,
            n_rows=source.n_rows,
            n_blocks=source.n_blocks,
            max_block_rows=int(source.block_rows.max()),
            min_window_rows=max(1, min(source.n_rows, carry_rows, _MIN_WINDOW_ROWS)),
        )

    @property
    def needed(self) -> int:
        """The smallest buffer that does: two windows of few rows, one open block, the smallest pieces."""
        pieces = MAX_READERS * self.least_piece_rows * self.piece_row
        return 2 * self.min_window_rows * self.row + self.open_block + pieces + self.carry

    @property
    def least_piece_rows(self) -> int:
        """The fewest rows to decode at once: one, or as many as cost little beside the block they come from.

        Wide Parquet files have expensive blocks, and calls that take as long for one row as for hundreds.
        """
        n_bytes = self.open_block // _PIECES_PER_OPEN_BLOCK
        return max(1, min(n_bytes // (MAX_READERS * self.piece_row), self.max_block_rows))

    @property
    def piece_rows(self) -> int:
        """Rows to decode at once: a 64th of the buffer for each reader, as far as the minimum leaves room.

        Pieces of a few rows cost more in calls than in bytes, hence up to a 32nd of a small buffer.
        """
        n_bytes = max(self.buffer // 64, min(_MIN_PIECE_BYTES, self.buffer // 32))
        wanted = min(n_bytes, _MAX_PIECE_BYTES) // self.piece_row
        affordable = self.least_piece_rows + (self.buffer - self.needed) // (MAX_READERS * self.piece_row)
        return max(1, min(wanted, affordable, self.max_block_rows))

    def piece_bytes(self, n_open: int) -> int:
        """Sum what readers decode at once: a piece of every open block, or one for each reader."""
        return min(MAX_READERS, n_open) * self.piece_rows * self.piece_row

    def available(self, n_open: int = MAX_READERS) -> int:
        """Count the bytes that windows and `n_open` open blocks share."""
        return self.buffer - self.piece_bytes(n_open) - self.carry

    def most_open(self, share: float, window_rows: int) -> int:
        """Count the blocks that a share of what is available can keep open beside two windows of some rows."""
        if self.open_block == 0:
            return self.n_blocks
        for n_open in range(1, MAX_READERS + 1):  # the more are open, the more is decoded at once
            available = self.available(n_open)
            fit = min(int(available * share), available - 2 * window_rows * self.row) // self.open_block
            if fit < n_open:
                return max(1, min(self.n_blocks, n_open - 1))
        return min(self.n_blocks, fit)

    def window_rows(self, n_open: int) -> int:
        """Count the rows of a window beside `n_open` open blocks."""
        rows = (self.available(n_open) - n_open * self.open_block) // (2 * self.row)
        return min(rows, self.n_rows, _MAX_WINDOW_ROWS)


@dataclass(frozen=True)
class Shape:
    """How windows are made up; see `streamgd.data.layout.Layout` for what each number is."""

    window_rows: int
    n_open: int
    slice_rows: int
    piece_rows: int
    n_windows: int = 2


def choose_shape(costs: Costs, source: Source, *, shuffle: bool) -> Shape:
    """Choose how windows are made up.

    Notes
    -----
    Blocks are *small* if a window can hold eight of the largest: then slices are whole blocks. Otherwise several are
    kept open, because more blocks mix better than longer windows, and each window takes a slice of every one: of eight
    if the buffer bears them (131,072-row groups, 256 MB: 0.31 s an epoch with 8 open, 0.34 s with 16).
    """
    whole_bytes = 2 * costs.n_rows * costs.row + costs.open_block
    if whole_bytes <= costs.available() and costs.n_rows <= _MAX_WINDOW_ROWS:
        n_open = min(MAX_READERS, costs.most_open(1.0, costs.n_rows))
        return Shape(costs.n_rows, n_open, costs.max_block_rows, costs.piece_rows)
    if source.is_flat:
        return _share_cheap_slices(costs, shuffle)
    n_open = min(MAX_READERS, costs.most_open(0.25, costs.min_window_rows))
    ample = min(max(_AMPLE_BLOCKS * costs.max_block_rows * costs.row, _AMPLE_BYTES_FROM), _AMPLE_BYTES_TO)
    enough = max(ample, costs.available() // _AMPLE_SHARE) // costs.row
    eight = _WHOLE_BLOCKS_PER_WINDOW * costs.max_block_rows
    window_rows = min(costs.window_rows(n_open), max(enough, eight))
    if window_rows >= eight:
        return Shape(window_rows, n_open, costs.max_block_rows, costs.piece_rows)
    if shuffle:
        n_open, window_rows = _share_big_blocks(costs)
        slice_rows = min(window_rows // n_open, costs.max_block_rows)
    else:
        slice_rows = min(max(1, window_rows // _WHOLE_BLOCKS_PER_WINDOW), costs.max_block_rows)
    if slice_rows == costs.max_block_rows:
        return Shape(window_rows, n_open, slice_rows, costs.piece_rows)
    return _sliced(costs, window_rows, n_open, slice_rows, source.slice_cost_rows, shuffle)


def _sliced(costs: Costs, window_rows: int, n_open: int, slice_rows: int, cost_rows: int, shuffle: bool) -> Shape:
    """End slices where what is decoded at once does (a Parquet page), lest half of it waits for the next window."""
    slice_rows = _in_step(slice_rows, cost_rows)
    n_pieces = -(-9 * slice_rows // (10 * costs.piece_rows))  # rather a tenth less than half-empty pieces
    piece_rows = min(costs.piece_rows, slice_rows // n_pieces)
    slice_rows = piece_rows * n_pieces
    return Shape(n_open * slice_rows if shuffle else window_rows, n_open, slice_rows, piece_rows)


def _in_step(slice_rows: int, cost_rows: int) -> int:
    """Shorten slices so that they end with what is decoded at once, or several of them do; a little is no matter."""
    if slice_rows >= cost_rows:
        return slice_rows // cost_rows * cost_rows
    return cost_rows // -(-cost_rows // slice_rows)


def _share_big_blocks(costs: Costs) -> tuple[int, int]:
    """Choose how many big blocks to keep open, and the rows of a window beside them.

    The number of blocks is evened out, so that the last ones of an epoch are not left alone.
    """
    share = costs.available() // _WINDOW_SHARE // costs.row
    least = max(costs.min_window_rows, min(_LEAST_WINDOW_BYTES // costs.row, share))
    wanted = max(_BLOCKS_PER_WINDOW, share // costs.piece_rows)
    n_open = min(costs.most_open(1.0, least), wanted)
    n_open = max(1, min(n_open, costs.window_rows(n_open) // _MIN_SLICE_ROWS))
    n_turns = -(-costs.n_blocks // n_open)
    n_open = -(-costs.n_blocks // n_turns)
    rows = costs.window_rows(n_open)
    return n_open, min(rows, max(share, n_open * _MIN_SLICE_ROWS)) if n_open >= _BLOCKS_PER_WINDOW else rows


def _share_cheap_slices(costs: Costs, shuffle: bool) -> Shape:
    """Choose windows where short slices cost nothing."""
    wanted = max(
        _CHEAP_WINDOW_BYTES,
        costs.buffer // _CHEAP_WINDOW_SHARE,
        min(_CHEAP_WINDOW_ROWS * costs.row, costs.buffer // 8),
    )
    window_rows = max(1, min(wanted // costs.row, costs.window_rows(1)))
    spare = costs.available() - costs.open_block
    n_windows = max(2, min(MAX_READERS + 2, spare // (window_rows * costs.row)))
    if not shuffle or window_rows >= _CHEAP_BLOCKS_PER_WINDOW * costs.max_block_rows:
        slice_rows = min(costs.max_block_rows, max(1, window_rows // _WHOLE_BLOCKS_PER_WINDOW))
        return Shape(window_rows, 1, slice_rows, costs.piece_rows, n_windows)
    n_turns = -(-costs.n_blocks // min(_CHEAP_BLOCKS_PER_WINDOW, window_rows))
    n_open = -(-costs.n_blocks // n_turns)
    slice_rows = window_rows // n_open
    return Shape(n_open * slice_rows, n_open, slice_rows, costs.piece_rows, n_windows)


def _stored_width(dtypes: Sequence[str]) -> int:
    """Sum the bytes of one value of each type; types that NumPy does not know (decimals) count 16."""
    width = {}
    for name in set(dtypes):
        try:
            width[name] = np.dtype(name).itemsize
        except (TypeError, ValueError):  # as for decimal128(7, 2), which NumPy takes for a structure
            width[name] = 16
    return max(1, sum(width[name] for name in dtypes))
