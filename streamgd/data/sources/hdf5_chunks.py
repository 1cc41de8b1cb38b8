"""Rows out of HDF5 chunks without HDF5's library, which runs one call at a time in a process.

HDF5 says once where the chunks of a dataset lie. From then on whoever needs a chunk reads it by its place in the file,
decompresses it and puts its rows together, beside others who do the same. What cannot be read in this way, and what
turns out to be damaged, is left to h5py, which reads it or says what is wrong with it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import h5py
import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.hdf5 import expand_lzf, fletcher32, put_rows
from streamgd.data.sources.base import Array
from streamgd.data.sources.buffers import Buffers, Bytes, Kept
from streamgd.data.sources.hdf5_inflate import inflate_to

#: Numbers by which HDF5 knows filters.
DEFLATE, SHUFFLE, FLETCHER32, LZF = 1, 2, 3, 32000
_CHECKSUM_BYTES = 4
#: Room beyond what a chunk should decompress to: for a checksum, and to notice if there is more.
_SLACK = 64


class UndecodableError(Exception):
    """A chunk that this module cannot make sense of."""


@dataclass(frozen=True)
class ChunkTable:
    """Where the chunks of a dataset lie, row by row of chunks.

    Attributes
    ----------
    offsets : ndarray of shape (n_chunks,), int64
        Byte of the file where each begins; -1 for those never written.
    sizes : ndarray of shape (n_chunks,), uint32
        Bytes of each in the file.
    masks : ndarray of shape (n_chunks,), uint32, or None
        For each chunk a bit for every filter that it was stored without; None if there is no such chunk.
    identity : tuple of int
        What the file was when this was looked up.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.uint32]
    masks: NDArray[np.uint32] | None
    identity: tuple[int, ...]


class Descriptor:
    """A descriptor of an open file, closed with the last reference, so that a read under way keeps its file."""

    def __init__(self, number: int) -> None:
        self.number = -1
        self.number = os.dup(number)

    @property
    def identity(self) -> tuple[int, ...]:
        """Tell files, and states of a file, apart."""
        found = os.fstat(self.number)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def fill(self, memory: memoryview, offset: int) -> None:
        """Read as many bytes as there is memory for.

        Raises
        ------
        OSError
            If the file ends before (HDF5 would go on with zeros), or cannot be read.
        """
        done = os.preadv(self.number, [memory], offset)
        while done < len(memory):
            got = os.preadv(self.number, [memory[done:]], offset + done)
            if got == 0:
                raise OSError(f"the file ends at byte {offset + done:,}")
            done += got

    def read(self, n_bytes: int, offset: int) -> bytes:
        """Read some bytes, fewer where the file ends."""
        return os.pread(self.number, n_bytes, offset)

    def __del__(self) -> None:
        """Close the file."""
        if self.number >= 0:
            os.close(self.number)


class ChunkReader:
    """Reads rows of one dataset; safe for any number of threads.

    Parameters
    ----------
    dataset : h5py.Dataset
        Described, not kept.
    filters : sequence of int
        HDF5's numbers of the filters that chunks went through.
    table : ChunkTable
        Where its chunks lie.
    fill : ndarray of shape (1, 1), or None
        What chunks hold that were never written; None if there are none.
    descriptor : Descriptor
        The file.
    kept : Kept or None, default=None
        Where decoded chunks are kept, as far as it has room.
    name : hashable, default=None
        What tells the dataset from others there.
    """

    def __init__(
        self,
        dataset: h5py.Dataset,
        filters: Sequence[int],
        table: ChunkTable,
        fill: Array | None,
        descriptor: Descriptor,
        kept: Kept | None = None,
        name: Hashable = None,
    ) -> None:
        self._table = table
        self._kept, self._name = kept, name
        self._descriptor = descriptor
        self._dtype = np.dtype(dataset.dtype)
        self._tail = tuple(dataset.shape[1:])
        self._columns = math.prod(self._tail)
        self._row_bytes: int = self._columns * self._dtype.itemsize
        self._height = int(dataset.chunks[0])
        self._width = math.prod(dataset.chunks[1:])
        self._chunk_bytes = self._height * self._width * self._dtype.itemsize
        # What undoes the filters, the last one first, each with its bit. A shuffle is the first one and stays: it is
        # undone as rows are put together. HDF5 leaves single bytes where they are.
        self._undo = [(1 << i, code) for i, code in enumerate(filters) if code != SHUFFLE][::-1]
        self._shuffled = SHUFFLE in filters and self._dtype.itemsize > 1
        self._fill = fill
        # Columns that are stored one by one stay so: rows are put together when they go to their places.
        self._by_column = self._width == 1 and self._columns > 1
        self._most_stored = int(table.sizes.max(initial=0))
        filtered = bool(self._undo) or self._shuffled
        # HDF5 can leave chunks that stick out beyond the last row or column unfiltered, and does not say so. With these
        # filters a chunk says it itself, unless a checksum is right by chance, as that of zeros.
        self._doubtful = filtered and not {DEFLATE, FLETCHER32}.intersection(filters)
        self._n_rows = int(dataset.shape[0])
        if filtered:
            in_work = bool({LZF, DEFLATE}.intersection(filters))
            self._work_bytes = self._most_stored + (self._chunk_bytes + _SLACK if in_work else 0)
        else:
            self._work_bytes = 0 if self._by_column or self._width == self._columns else self._chunk_bytes

    def n_bytes(self, n_rows: int) -> int:
        """Return the memory that rows take."""
        return n_rows * self._row_bytes

    def read(self, first: int, stop: int, memory: Bytes, scratch: Buffers) -> Array | None:
        """Read rows.

        Parameters
        ----------
        first, stop : int
            Which rows.
        memory : ndarray of uint8
            Where to; at least `n_bytes` of them.
        scratch : Buffers
            Memory to work in.

        Returns
        -------
        ndarray of shape (n_rows,) or (n_rows, n_columns), or None
            Rows as stored; a view of `memory`. None if a chunk is damaged or stored in a way that is not known here.

        Raises
        ------
        OSError
            If the file cannot be read, or has become shorter, or a chunk is damaged and h5py would not notice.
        """
        n_rows = stop - first
        memory = memory[: self.n_bytes(n_rows)]
        shape = (self._columns, n_rows) if self._by_column else (n_rows, self._columns)
        rows: Array = memory.view(self._dtype).reshape(shape)
        rows = rows.T if self._by_column else rows
        work = scratch.take(self._work_bytes) if self._work_bytes else memory[:0]
        try:
            self._read_into(rows, first, stop, memory.data, work)
        except UndecodableError:
            return None
        finally:
            if self._work_bytes:
                scratch.give(work)
        return rows if self._tail else rows[:, 0]

    def _read_into(self, rows: Array, first: int, stop: int, memory: memoryview, work: Bytes) -> None:
        """Go through the chunks that rows lie in, one run of chunks side by side after the other."""
        item, height, width = self._dtype.itemsize, self._height, self._width
        step, column_step = rows.strides
        address = rows.__array_interface__["data"][0]
        runs = range(first // height, -(-stop // height))
        pieces = -(-self._columns // width)
        span = slice(runs.start * pieces, runs.stop * pieces)
        offsets, sizes = self._table.offsets[span].tolist(), self._table.sizes[span].tolist()
        masks = [0] * len(sizes) if self._table.masks is None else self._table.masks[span].tolist()
        number = 0
        for run in runs:
            top = max(first - run * height, 0)
            n_rows = min(stop - run * height, height) - top
            row = run * height + top - first
            for left in range(0, self._columns, width):
                n_columns = min(width, self._columns - left)
                offset, size, mask = offsets[number], sizes[number], masks[number]
                key = (self._name, span.start + number)
                number += 1
                at = row * step + left * column_step
                if offset < 0:
                    rows[row : row + n_rows, left : left + n_columns] = self._fill
                elif self._work_bytes == 0:
                    self._require_whole(size, "is stored in", self._chunk_bytes)
                    n_bytes = n_rows * width * item
                    self._descriptor.fill(memory[at : at + n_bytes], offset + top * width * item)
                else:
                    doubt = self._may_be_unfiltered(run, n_columns, size, mask)
                    least = min(height, self._n_rows - run * height) * width * item
                    kept = None if self._kept is None else self._kept.get(key)
                    if kept is not None:
                        chunk, shuffled, skipped = kept, False, 0
                    else:
                        chunk, shuffled, skipped = self._chunk(offset, size, mask, work, top, n_rows, doubt, least)
                        self._keep(key, chunk, shuffled)
                    put_rows(chunk, shuffled, item, width, top - skipped, n_rows, n_columns, address + at, step)

    def _keep(self, key: Hashable, chunk: Bytes, shuffled: bool) -> None:
        """Keep a chunk as rows, if it is whole and there is room."""
        if self._kept is None or len(chunk) < self._chunk_bytes or not self._kept.has_room(len(chunk)):
            return
        item, rows = self._dtype.itemsize, np.empty(len(chunk), np.uint8)
        address = rows.__array_interface__["data"][0]
        step = self._width * item
        put_rows(chunk, shuffled, item, self._width, 0, self._height, self._width, address, step)
        self._kept.put(key, rows)

    def _may_be_unfiltered(self, run: int, n_columns: int, size: int, mask: int) -> bool:
        sticks_out = n_columns < self._width or (run + 1) * self._height > self._n_rows
        return sticks_out and size == self._chunk_bytes and mask == 0

    def _chunk(
        self, offset: int, size: int, mask: int, work: Bytes, top: int, n_rows: int, doubt: bool, least: int
    ) -> tuple[Bytes, bool, int]:
        """Read a chunk and undo its filters, except that its bytes may be left shuffled; or only the rows asked for.

        Returns the bytes, whether they are shuffled, and how many of the chunk's rows were left out before them. Of a
        chunk that sticks out, the bytes of its rows within the dataset are the least that it must have.
        """
        if doubt and self._doubtful:
            raise UndecodableError("whether a chunk at the edge was filtered cannot be told")
        row_bytes = self._width * self._dtype.itemsize
        undo = [code for bit, code in self._undo if not mask & bit]
        shuffled = self._shuffled and not mask & 1
        if not undo:
            self._require_whole(size, "is stored in", least)
        if not undo and not shuffled:
            part = work[: n_rows * row_bytes]
            self._descriptor.fill(part.data, offset + top * row_bytes)
            return part, False, top
        data = work[:size]
        self._descriptor.fill(data.data, offset)
        for code in undo:
            if code == FLETCHER32:
                data = _checked(data)
            elif code == LZF:
                room = work[self._most_stored :]
                data = room[: expand_lzf(data, room)]  # all but the last byte if it cannot be expanded
            else:
                inflated = inflate_to(data, work[self._most_stored :][: self._chunk_bytes + _SLACK])
                if inflated is None:
                    raise UndecodableError("a chunk cannot be decompressed")
                data = inflated
        if doubt and len(data) != self._chunk_bytes:
            raise UndecodableError("a chunk at the edge, which seems not to have been filtered")
        self._require_whole(len(data), "decompresses to", self._chunk_bytes if LZF in undo else least, LZF in undo)
        return data, shuffled, 0

    def _require_whole(self, n_bytes: int, what: str, least: int, exactly: bool = False) -> None:
        """Refuse a chunk of too few bytes: h5py would hand out whatever lies in its memory behind them."""
        if n_bytes == self._chunk_bytes:
            return
        why = f"a chunk of {self._chunk_bytes:,} bytes {what} {n_bytes:,}"
        if n_bytes < least or exactly:
            raise OSError(why)
        raise UndecodableError(why)


def _checked(data: Bytes) -> Bytes:
    """Compare a chunk with the checksum at its end, and return the chunk without."""
    if len(data) < _CHECKSUM_BYTES:
        raise UndecodableError("a chunk is shorter than its checksum")
    data, stored = data[:-_CHECKSUM_BYTES], int.from_bytes(data[-_CHECKSUM_BYTES:].tobytes(), "little")
    found = fletcher32(data)
    # Versions of HDF5 before 1.6.3 swapped the bytes of each sum on some machines; it accepts both ever since.
    if stored not in (found, (found & 0xFF00FF) << 8 | found >> 8 & 0xFF00FF):
        raise UndecodableError(f"a chunk's checksum is {stored:08x}, but its bytes give {found:08x}")
    return data
