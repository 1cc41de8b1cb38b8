"""Blocks of rows that lie as they are, ahead of their turn: asked for from the system, or read past its page cache.

Which of both depends on whether the data stays in the page cache. Neither changes what is read.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from streamgd.data.ahead import Range, ReadAhead, cached_bytes, stays_in_memory
from streamgd.data.compiled.flat import FD, OFFSET, ROW_BYTES
from streamgd.data.flat_files import FlatFiles
from streamgd.data.plan import EpochPlan, Layout, WindowPlan
from streamgd.data.sources.base import Source
from streamgd.data.sources.flat import FlatRows
from streamgd.data.sources.mapped import OpenFile
from streamgd.data.unbuffered import BlockLoader, Loaded, Piece, blocks_at_once, reads_unbuffered

#: No row is in memory ahead of its turn.
_NOWHERE = np.empty((0, 0), np.int64)
#: Data of which so much is in the page cache is taken to stay there.
_CACHED_SHARE = 0.95


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
        self._source, self._rows, self._layout, self._files = source, rows, layout, files
        self._unbuffered = FlatFiles(rows, unbuffered=True)
        self._strips = rows.strips(0)
        self._on_disk = any(strip.path is not None for strip in self._strips)
        self._loader: BlockLoader | None = None
        self._ahead: ReadAhead | None = None

    def _begin(self) -> None:
        """Choose how blocks come early. What is in the page cache, however big, is taken from there and stays there."""
        n_bytes = self._source.stored_bytes
        stays = stays_in_memory(n_bytes) or self._cached_bytes() >= _CACHED_SHARE * n_bytes
        self._loader = None if stays else self._make_loader()
        if self._loader is None:
            self._ahead = ReadAhead(self._ranges_of, self._layout.n_open, forgets=not stays)

    def _cached_bytes(self) -> int:
        """Count the bytes in the page cache, as far as the system tells."""
        first = np.unique(self._rows.block_file, return_index=True)[1]
        ends = [*first[1:].tolist(), len(self._rows.block_file)]
        n_bytes = 0
        for begin, end in zip(first.tolist(), ends, strict=True):  # blocks lie in the order of their files
            pieces, held = self._pieces(self._files, begin, int(self._source.block_rows[begin:end].sum()))
            n_bytes += sum(cached_bytes(piece.descriptor, piece.first, piece.n_bytes) for piece in pieces if piece)
            del held  # not before: a descriptor that is closed meanwhile may be another file's by now
        return n_bytes

    def _make_loader(self) -> BlockLoader | None:
        """Return what reads blocks past the page cache, if there is memory for them and the system can."""
        strips, layout = self._strips, self._layout
        row_bytes = sum(strip.row_bytes for strip in strips if strip.path is not None)
        block_bytes = int(self._source.block_rows.max()) * row_bytes
        open_blocks = max(layout.n_open, -(-layout.window_rows // layout.slice_rows))
        most = blocks_at_once(open_blocks, block_bytes, len(strips), layout.spare_bytes)
        if not most or not all(reads_unbuffered(strip.path) for strip in strips if strip.path is not None):
            return None
        return BlockLoader(partial(self._pieces, self._unbuffered), len(strips), block_bytes, most)

    def expect(self, plan: EpochPlan, first: int = 0) -> None:
        """Hear of the blocks of an epoch from a window on, before that is asked for."""
        if not self._on_disk:
            return
        if self._loader is None and self._ahead is None:
            self._begin()
        blocks, rows = plan.blocks_left(first)
        if self._loader is not None:
            left = self._source.block_rows[blocks] - rows
            self._loader.expect(plan.epoch, zip(blocks.tolist(), left.tolist(), strict=True))
        elif self._ahead is not None:
            self._ahead.expect(iter(blocks[rows == 0].tolist()))

    def locate(self, plan: WindowPlan) -> tuple[NDArray[np.int64], list[Loaded | None]]:
        """Say where rows of a window lie that are in memory already; see `BlockLoader.locate`, or of shape (0, 0)."""
        if self._ahead is not None:
            self._ahead.opened(int(np.count_nonzero(plan.table[:, 1] == 0)))
        if self._loader is None:
            return _NOWHERE, []
        return self._loader.locate(plan.epoch, plan.table[:, 0], plan.table[:, 2])

    def placed(self, plan: WindowPlan, held: list[Loaded | None]) -> None:
        """Note that all rows of a window have been placed."""
        if self._loader is not None:
            self._loader.placed(held, plan.table[:, 2])

    def _pieces(
        self, files: FlatFiles, block: int, n_rows: int | None = None
    ) -> tuple[list[Piece | None], list[OpenFile]]:
        """Say where the rows of a block, or more from there, lie in files, which stay open while they are held."""
        table, held = files.open(int(self._rows.block_file[block]))
        start, n = int(self._rows.block_start[block]), int(self._source.block_rows[block]) if n_rows is None else n_rows
        pieces = [
            None if fd < 0 else Piece(fd, offset + start * row_bytes, n * row_bytes, start * row_bytes)
            for fd, offset, row_bytes in table[:, [FD, OFFSET, ROW_BYTES]].tolist()
        ]
        return pieces, held

    def _ranges_of(self, block: int) -> tuple[list[Range], list[OpenFile]]:
        """Say which bytes of which open files a block takes; these stay open as long as they are held."""
        pieces, held = self._pieces(self._files, block)
        return [(piece.descriptor, piece.first, piece.n_bytes) for piece in pieces if piece], held

    def stop(self) -> None:
        """Let go of whoever waits, from any thread."""
        if self._loader is not None:
            self._loader.close()

    def close(self) -> None:
        """Stop reading ahead. Idempotent; waits for reads that are under way."""
        self.stop()
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None  # it knows this object, and the source would be open until both are collected
        self._unbuffered.close()
