"""Read blocks ahead of their turn past the page cache, into memory of the reader's own.

Data bigger than the memory gains nothing by the page cache: every page is allocated, filled, copied and thrown out
again, which takes more processor time than training does. Blocks are therefore read whole by the disk itself
(``O_DIRECT``), several at once and ahead of their turn, and rows are placed from where they land. What is not there in
time, or cannot be read like this, is read as always: nothing that is read depends on it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamgd.data.window import Stopped

#: What offsets, lengths and addresses are multiples of: a page, which every disk's sectors divide.
_ALIGNMENT = 4096
#: Reads at once: a disk of many queues is busy with eight to sixteen requests of a megabyte or less.
_READS = 8
#: Where a row lies that is not in memory.
NOT_READY = np.iinfo(np.int64).min


class Piece(NamedTuple):
    """A block's rows of one strip: descriptor opened for unbuffered reads, first byte, bytes, bytes before the block.

    The last says how far the block is from the strip's first row.
    """

    descriptor: int
    first: int
    n_bytes: int
    before: int


@dataclass
class _Block:
    """A block in memory, or on its way there, and its rows that have not been placed yet."""

    memory: NDArray[np.uint8]
    reading: Future[NDArray[np.int64]]
    rows_left: int = 0


class BlockLoader:
    """Loads the blocks of one epoch after another, in the order of their turns.

    Parameters
    ----------
    pieces_of : callable
        Given a block, returns a `Piece` for each strip, or None for those in memory, and what keeps files open
        meanwhile; called in threads.
    n_strips : int
        How many there are.
    block_bytes : int
        The most bytes of a block.
    most_blocks : int
        Blocks in memory at once; those that are open, and at least one more.
    """

    def __init__(
        self,
        pieces_of: Callable[[int], tuple[Sequence[Piece | None], Any]],
        n_strips: int,
        block_bytes: int,
        most_blocks: int,
    ) -> None:
        self._pieces_of, self._n_strips = pieces_of, n_strips
        self._memory_bytes = memory_of(block_bytes, n_strips)
        self._most = most_blocks
        self._lock = threading.Lock()
        self._epochs: deque[Iterator[tuple[int, int]]] = deque()
        self._blocks: dict[int, _Block] = {}
        self._early: Counter[int] = Counter()  # rows that were placed before their block's turn to be loaded came
        self._free: list[NDArray[np.uint8]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def expect(self, blocks: Iterable[tuple[int, int]]) -> None:
        """Add the blocks of an epoch, in the order of their turns, and how many rows of each will be placed."""
        with self._lock:
            self._epochs.append(iter(blocks))
            self._load_more()

    def locate(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Wait for the blocks of a window.

        Parameters
        ----------
        blocks : ndarray of shape (n_slices,), int64
            The block of each slice.

        Returns
        -------
        ndarray of shape (n_slices, n_strips), int64
            Where the first row of the strip would lie if all of it lay as the block does, for each slice; `NOT_READY`
            for what is not in memory.

        Raises
        ------
        Stopped
            If the loader is closed meanwhile.
        """
        with self._lock:
            found = [self._blocks.get(block) for block in blocks.tolist()]
        try:
            known = [self._nowhere() if each is None else each.reading.result() for each in found]
        except CancelledError as err:
            raise Stopped from err
        return np.array(known, np.int64).reshape(len(blocks), self._n_strips)

    def placed(self, blocks: NDArray[np.int64], n_rows: NDArray[np.int64]) -> None:
        """Note that so many rows of each block have been placed: what has been placed whole makes room for others."""
        with self._lock:
            for block, n in zip(blocks.tolist(), n_rows.tolist(), strict=True):
                found = self._blocks.get(block)
                if found is None:
                    self._early[block] += n
                    continue
                found.rows_left -= n
                if found.rows_left == 0:
                    self._free.append(self._blocks.pop(block).memory)
            self._load_more()

    def close(self) -> None:
        """Stop reading. Idempotent; waits for reads that are under way."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _load_more(self) -> None:
        while not self._closed and len(self._blocks) < self._most:
            following = self._next()
            if following is None:
                return
            block, n_rows = following
            n_rows -= self._early.pop(block, 0)
            if n_rows == 0:
                continue
            if block not in self._blocks:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_READS, "streamgd-loader")
                memory = self._free.pop() if self._free else _aligned(self._memory_bytes)
                self._blocks[block] = _Block(memory, self._pool.submit(self._read, block, memory))
            self._blocks[block].rows_left += n_rows

    def _next(self) -> tuple[int, int] | None:
        while self._epochs:
            found = next(self._epochs[0], None)
            if found is not None:
                return found
            self._epochs.popleft()
        return None

    def _nowhere(self) -> NDArray[np.int64]:
        return np.full(self._n_strips, NOT_READY, np.int64)

    def _read(self, block: int, memory: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Read a block; say where each strip's first row would lie."""
        found, at = self._nowhere(), 0
        with contextlib.suppress(Exception):  # what is wrong with a file, whoever reads it as always says
            pieces, held = self._pieces_of(block)
            for strip, piece in enumerate(pieces):
                if piece is None:
                    continue
                first = piece.first // _ALIGNMENT * _ALIGNMENT
                n_bytes = -(-(piece.first + piece.n_bytes - first) // _ALIGNMENT) * _ALIGNMENT
                got = os.preadv(piece.descriptor, [memory[at : at + n_bytes].data], first)
                if got >= piece.first + piece.n_bytes - first:  # the last page of a file may be short
                    found[strip] = memory.ctypes.data + at + piece.first - first - piece.before
                at += n_bytes
            del held  # not before: a descriptor that is closed meanwhile may be another file's by now
        return found


def memory_of(block_bytes: int, n_strips: int) -> int:
    """Count the bytes that a block takes in memory, with what is read before and after each strip."""
    return block_bytes + 2 * _ALIGNMENT * n_strips


def blocks_at_once(open_blocks: int, block_bytes: int, n_strips: int, spare_bytes: int) -> int:
    """Count the blocks to hold in spare memory; 0 if it has no room to read ahead.

    Blocks of equal size that were opened together end together: their successors should be there by then.
    """
    fit = spare_bytes // memory_of(block_bytes, n_strips)
    return 0 if fit < open_blocks + _READS else min(fit, 2 * (open_blocks + _READS))


def reads_unbuffered(path: str) -> bool:
    """Tell whether the system and the file system that a file is on can read past the page cache."""
    if not (hasattr(os, "O_DIRECT") and hasattr(os, "preadv")):
        return False
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            return os.preadv(descriptor, [_aligned(_ALIGNMENT).data], 0) > 0
        finally:
            os.close(descriptor)
    return False


def _aligned(n_bytes: int) -> NDArray[np.uint8]:
    memory = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    skipped = -memory.ctypes.data % _ALIGNMENT
    return memory[skipped : skipped + n_bytes]
