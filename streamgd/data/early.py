"""Blocks of rows that lie as they are, ahead of their turn: asked for from the system, or read past its page cache.

Which of both depends on whether the data stays in the page cache. Neither changes what is read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamgd.data import placing
from streamgd.data.ahead import Range, ReadAhead, stays_in_memory
from streamgd.data.flat_files import FlatFiles
from streamgd.data.plan import EpochPlan, Layout, WindowPlan
from streamgd.data.sources.base import Source
from streamgd.data.sources.flat import FlatRows
from streamgd.data.sources.mapped import OpenFile
from streamgd.data.unbuffered import BlockLoader, Piece, blocks_at_once, reads_unbuffered

#: No row is in memory ahead of its turn.
_NOWHERE = np.empty((0, 0), np.int64)


class EarlyBlocks:
    """Has the blocks of an epoch after another ready when their turn comes.

    Parameters
    ----------
    source : Source
        What is read.
    rows : FlatRows
        Where its rows lie.
    layout : Layout
        How much at once. What it leaves of the buffer holds blocks that are read past the page cache.
    files : FlatFiles
        The files, as they are read else.
    """

    def __init__(self, source: Source, rows: FlatRows, layout: Layout, files: FlatFiles) -> None:
        self._source, self._rows, self._files = source, rows, files
        self._unbuffered = FlatFiles(rows, unbuffered=True)
        self._strips = rows.strips(0)
        on_disk = any(strip.path is not None for strip in self._strips)
        self._loader = self._make_loader(layout) if on_disk and not stays_in_memory(source.stored_bytes) else None
        asks = on_disk and self._loader is None
        self._ahead = ReadAhead(self._ranges_of, layout.n_open, source.stored_bytes) if asks else None

    def _make_loader(self, layout: Layout) -> BlockLoader | None:
        """Return what reads blocks past the page cache, if there is memory for them and the system can."""
        strips = self._strips
        row_bytes = sum(strip.row_bytes for strip in strips if strip.path is not None)
        block_bytes = int(self._source.block_rows.max()) * row_bytes
        open_blocks = max(layout.n_open, -(-layout.window_rows // layout.slice_rows))
        most = blocks_at_once(open_blocks, block_bytes, len(strips), layout.spare_bytes)
        if not most or not all(reads_unbuffered(strip.path) for strip in strips if strip.path is not None):
            return None
        return BlockLoader(self._pieces_of, len(strips), block_bytes, most)

    def expect(self, plan: EpochPlan, first: int = 0) -> None:
        """Hear of the blocks of an epoch from a window on, before that is asked for."""
        if self._loader is None and self._ahead is None:
            return
        blocks, rows = plan.blocks_left(first)
        if self._loader is not None:
            left = self._source.block_rows[blocks] - rows
            self._loader.expect(zip(blocks.tolist(), left.tolist(), strict=True))
        elif self._ahead is not None:
            self._ahead.expect(iter(blocks[rows == 0].tolist()))

    def locate(self, plan: WindowPlan) -> NDArray[np.int64]:
        """Say where rows of a window lie that are in memory already; see `BlockLoader.locate`, or of shape (0, 0)."""
        if self._ahead is not None:
            self._ahead.opened(int(np.count_nonzero(plan.table[:, 1] == 0)))
        return _NOWHERE if self._loader is None else self._loader.locate(plan.table[:, 0])

    def placed(self, plan: WindowPlan) -> None:
        """Note that all rows of a window have been placed."""
        if self._loader is not None:
            self._loader.placed(plan.table[:, 0], plan.table[:, 2])

    def _ranges_of(self, block: int) -> tuple[list[Range], list[OpenFile]]:
        """Say which bytes of which open files a block takes; these stay open as long as they are held."""
        table, held = self._files.open(int(self._rows.block_file[block]))
        start, n_rows = int(self._rows.block_start[block]), int(self._source.block_rows[block])
        ranges = [
            (fd, offset + start * row_bytes, n_rows * row_bytes)
            for fd, offset, row_bytes in table[:, [placing.FD, placing.OFFSET, placing.ROW_BYTES]].tolist()
            if fd >= 0
        ]
        return ranges, held

    def _pieces_of(self, block: int) -> tuple[list[Piece | None], list[OpenFile]]:
        """Say where a block's rows of each strip lie, for reads past the page cache."""
        table, held = self._unbuffered.open(int(self._rows.block_file[block]))
        start, n_rows = int(self._rows.block_start[block]), int(self._source.block_rows[block])
        pieces = [
            None if fd < 0 else Piece(fd, offset + start * row_bytes, n_rows * row_bytes, start * row_bytes)
            for fd, offset, row_bytes in table[:, [placing.FD, placing.OFFSET, placing.ROW_BYTES]].tolist()
        ]
        return pieces, held

    def stop(self) -> None:
        """Let go of whoever waits, from any thread."""
        if self._loader is not None:
            self._loader.close()

    def close(self) -> None:
        """Stop reading ahead. Idempotent; waits for reads that are under way."""
        self.stop()
        if self._ahead is not None:
            self._ahead.close()
        self._unbuffered.close()
