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

from streamgd.data.compiled.flat import NOT_READY
from streamgd.data.window import Stopped

#: What offsets, lengths and addresses are multiples of: a page, which every disk's sectors divide.
_ALIGNMENT = 4096
#: Reads at once: a disk of many queues is busy with eight to sixteen requests of a megabyte or less.
_READS = 8


class Piece(NamedTuple):
    """A block's rows of one strip: descriptor opened for unbuffered reads, first byte, bytes, bytes before the block.

    The last says how far the block is from the strip's first row.
    """

    descriptor: int
    first: int
    n_bytes: int
    before: int


@dataclass
class Loaded:
    """A block of an epoch in memory, or on its way there, and its rows that have not been placed from there yet."""

    key: tuple[int, int]
    memory: NDArray[np.uint8]
    reading: Future[NDArray[np.int64]]
    rows_left: int


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

    Notes
    -----
    Every row of an epoch is located once. Where its block is not loaded by then, it is read elsewhere, and taken off
    the rows that the block will have to place once it is loaded. A block's memory is used again when no row is left,
    which is not before whoever located one, and so waited for the block to be read, has said that it is placed.
    """

    def __init__(
        self,
        pieces_of: Callable[[int], tuple[Sequence[Piece | None], Any]],
        n_strips: int,
        block_bytes: int,
        most_blocks: int,
    ) -> None:
        self._pieces_of, self._n_strips = pieces_of, n_strips
        self._memory_bytes = memory_of(block_bytes, n_strips) - _ALIGNMENT
        self._most = most_blocks
        self._lock = threading.Lock()
        self._epochs: deque[tuple[int, Iterator[tuple[int, int]]]] = deque()
        self._blocks: dict[tuple[int, int], Loaded] = {}  # by epoch and block
        self._elsewhere: Counter[tuple[int, int]] = Counter()  # rows located before their block was loaded
        self._free: list[NDArray[np.uint8]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def expect(self, epoch: int, blocks: Iterable[tuple[int, int]]) -> None:
        """Add the blocks of an epoch, in the order of their turns, and how many rows of each will be located."""
        with self._lock:
            self._epochs.append((epoch, iter(blocks)))
            self._load_more()

    def locate(
        self, epoch: int, blocks: NDArray[np.int64], n_rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], list[Loaded | None]]:
        """Wait for the blocks of a window.

        Parameters
        ----------
        epoch : int
            The window's.
        blocks, n_rows : ndarrays of shape (n_slices,), int64
            The block of each slice, and its rows.

        Returns
        -------
        addresses : ndarray of shape (n_slices, n_strips), int64
            Where the first row of the strip would lie if all of it lay as the block does, for each slice; `NOT_READY`
            for what is not in memory.
        held : list of Loaded or None
            What is to be given back to `placed`.

        Raises
        ------
        Stopped
            If the loader is closed meanwhile.
        """
        held: list[Loaded | None] = []
        with self._lock:
            for block, n in zip(blocks.tolist(), n_rows.tolist(), strict=True):
                held.append(self._blocks.get((epoch, block)))
                if held[-1] is None:
                    self._elsewhere[epoch, block] += n
        try:
            known = [self._nowhere() if each is None else each.reading.result() for each in held]
        except CancelledError as err:
            raise Stopped from err
        return np.array(known, np.int64).reshape(len(blocks), self._n_strips), held

    def placed(self, held: Sequence[Loaded | None], n_rows: NDArray[np.int64]) -> None:
        """Note that the rows of a window's slices have been placed: a block that has no more makes room for others."""
        with self._lock:
            for found, n in zip(held, n_rows.tolist(), strict=True):
                if found is not None:
                    found.rows_left -= n
                    if found.rows_left == 0:
                        self._free.append(self._blocks.pop(found.key).memory)
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
            epoch, block, n_rows = following
            n_rows -= self._elsewhere.pop((epoch, block), 0)
            if n_rows == 0:
                continue
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_READS, "streamgd-loader")
            memory = self._free.pop() if self._free else _aligned(self._memory_bytes)
            reading = self._pool.submit(self._read, block, memory)
            self._blocks[epoch, block] = Loaded((epoch, block), memory, reading, n_rows)

    def _next(self) -> tuple[int, int, int] | None:
        while self._epochs:
            epoch, blocks = self._epochs[0]
            found = next(blocks, None)
            if found is not None:
                return epoch, *found
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
    """Count the bytes that a block takes in memory, with what is read before and after each strip, and aligned."""
    return block_bytes + (2 * n_strips + 1) * _ALIGNMENT


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
