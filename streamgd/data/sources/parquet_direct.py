"""Row groups of plain numbers, decoded page by page: values stay where decompression put them.

Arrow assembles columns with their nulls out of pages, in memory of its own, which takes longer than to decompress them.
Where every value is there, as in most tables of numbers, a page's values can go straight to their places. Whatever is
not known here, and what turns out to be damaged or to hold a null, is left to Arrow, which reads it or says what is
wrong with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streamgd.data.compiled import parquet_members as members
from streamgd.data.compiled.parquet_pages import next_pages, take_values
from streamgd.data.sources.base import Array, Columns
from streamgd.data.sources.buffers import Buffers, Bytes
from streamgd.data.sources.mapped import OpenFile
from streamgd.data.sources.parquet_chunks import Chunk
from streamgd.data.sources.parquet_pages import SCRATCH_BYTES
from streamgd.data.sources.parquet_types import ColumnType

#: Physical types whose values lie in pages as NumPy has them.
_DTYPES = {"FLOAT": "float32", "DOUBLE": "float64", "INT32": "int32", "INT64": "int64"}
#: Smaller numbers are stored as bigger ones, and are what Arrow makes of them.
_LEAST_BYTES = 4
#: Encodings that are known here, a bit for each; the fifth is that of levels alone.
_ENCODINGS = sum(1 << n for n in (members.PLAIN, members.PLAIN_DICTIONARY, members.RLE, 4, members.RLE_DICTIONARY))
#: Codecs by their names in footers: those whose data says how much it decompresses to.
_CODECS = {"UNCOMPRESSED": None, "SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd"}
_CODES = {None: members.UNCOMPRESSED, "snappy": members.SNAPPY}
#: Memory for pages of columns that have not asked for it, at most.
_MOST_AT_A_GUESS = 1 << 20
#: Bytes read at once for a column's first page.
_FIRST_BYTES = 1 << 14


class UndecodableError(Exception):
    """A page that this module cannot make sense of."""


@dataclass(frozen=True)
class DirectColumn:
    """A column chunk that can be read without Arrow."""

    chunk: Chunk
    dtype: np.dtype[Any]
    codec: str | None


def direct_column(chunk: Chunk, kind: ColumnType) -> DirectColumn | None:
    """Describe a column of a row group, or return None if it cannot be read here.

    Parameters
    ----------
    chunk : Chunk
        What the footer says of it.
    kind : ColumnType
        What it holds.
    """
    if kind.number is None or kind.family not in ("f", "i", "u") or kind.number.itemsize < _LEAST_BYTES:
        return None
    stored = _DTYPES.get(chunk.physical_type)
    known = stored is not None and chunk.codec in _CODECS and not chunk.encodings & ~_ENCODINGS
    if not known or chunk.repeats or chunk.max_level > 1:
        return None
    dtype = np.dtype(stored)
    if kind.family == "u":
        dtype = np.dtype(f"uint{8 * dtype.itemsize}")
    if (kind.family == "f") != (dtype.kind == "f"):
        return None
    return DirectColumn(chunk, dtype, _CODECS[chunk.codec])


class DirectRows:
    """The rows of one row group from a row on, decoded as they are asked for.

    Parameters
    ----------
    file : OpenFile
        The file; kept open.
    columns : sequence of DirectColumn
        What is read.
    start : int
        Row to begin with; pages before it are passed over.
    scratch : Buffers
        Memory to work in.

    Attributes
    ----------
    n_columns : int
        Columns.

    Notes
    -----
    For one consumer. Holds a decompressed page of every column, and its dictionary if it has one.
    """

    def __init__(self, file: OpenFile, columns: Sequence[DirectColumn], start: int, scratch: Buffers) -> None:
        self._file: OpenFile | None = file
        self._scratch = scratch
        n = self.n_columns = len(columns)
        self._table = np.zeros((n, members.N_MEMBERS), np.int64)
        for page, column in zip(self._table, columns, strict=True):
            page[members.AT] = column.chunk.start
            page[members.END] = column.chunk.start + column.chunk.compressed_bytes
            page[members.WIDTH], page[members.MAX_LEVEL] = column.dtype.itemsize, column.chunk.max_level
            page[members.CODEC] = _CODES.get(column.codec, members.OTHER_CODEC)
            page[members.GUESS], page[members.SKIPPED] = _FIRST_BYTES, start
            page[members.MOST_BYTES], page[members.MOST_VALUES] = column.chunk.uncompressed_bytes, column.chunk.n_values
        self._codecs = tuple(column.codec for column in columns)
        self._names = tuple(column.dtype.name for column in columns)
        self._widths = self._table[:, members.WIDTH].copy()
        self._ones = np.ones(n, np.int64)
        #: What each column's values lie in, and the values of its dictionary.
        self._held: list[Bytes | None] = [None] * n
        self._dictionaries: list[Bytes | None] = [None] * n

    def read(self, most: int) -> tuple[int, _Held]:
        """Return the next rows, as many of `most` as lie together in every column.

        Returns
        -------
        n_rows : int
            At least 1.
        columns : _Held
            Of which `columns` makes `Columns`. Valid until more is read.

        Raises
        ------
        UndecodableError
            If a page cannot be made sense of, the row group ends, or the file cannot be read. Rows that were returned
            before are right.
        """
        table = self._table
        if (table[:, members.LEFT] == 0).any():
            self._next_pages()
        n_rows = int(min(most, table[:, members.LEFT].min()))
        addresses = table[:, members.ADDRESS].copy()
        table[:, members.ADDRESS] += n_rows * self._widths
        table[:, members.LEFT] -= n_rows
        return n_rows, _Held(n_rows, addresses, self._widths, self._ones, self._names, tuple(self._held))

    def _next_pages(self) -> None:
        """Go on to the next page of every column that has no values left."""
        assert self._file is not None
        memory = self._scratch.take(SCRATCH_BYTES)
        try:
            while True:
                status, column, n_bytes = next_pages(self._file.descriptor, self._table, memory)
                if status == members.NEEDS_SCRATCH:
                    self._scratch.give(memory)
                    memory = self._scratch.take(n_bytes + n_bytes // 8)
                elif status == members.FOREIGN:
                    self._decompress(column, memory)
                elif status != members.DONE:
                    self._provide(status, column, n_bytes)
                else:
                    return
        finally:
            self._scratch.give(memory)

    def _provide(self, status: int, column: int, n_bytes: int) -> None:
        """Give a column the memory that its page takes; and those like it as much, which will need it too."""
        if status not in (members.NEEDS_ROOM, members.NEEDS_DICTIONARY):
            raise UndecodableError("a page cannot be read, or makes no sense")
        values = status == members.NEEDS_ROOM
        address, room = (members.MEMORY, members.ROOM) if values else (members.DICTIONARY, members.DICTIONARY_ROOM)
        held = self._held if values else self._dictionaries
        # Nothing big is taken for many columns on the word of one header.
        guessed = values and n_bytes <= _MOST_AT_A_GUESS
        alike = (self._table[:, room] == 0) & (self._widths == self._widths[column]) & guessed
        for each in {column, *np.flatnonzero(alike).tolist()}:
            self._give_back(held[each])
            try:
                found = self._scratch.take(n_bytes)
            except MemoryError as err:
                raise UndecodableError(f"a page of {n_bytes:,} bytes") from err
            held[each] = found
            self._table[each, address], self._table[each, room] = found.ctypes.data, len(found)

    def _decompress(self, column: int, memory: Bytes) -> None:
        """Check and decompress a page that was read to the scratch memory, and go on with it."""
        page = self._table[column]
        begin, stored, decoded = int(page[members.BEGIN]), int(page[members.STORED]), int(page[members.DECODED])
        data = memory[begin : begin + stored]
        if page[members.HAS_CRC] and zlib.crc32(data.data) != page[members.CRC]:
            raise UndecodableError("a page does not match its checksum")
        levels = int(page[members.LEVELS]) if page[members.KIND] == members.DATA_PAGE_V2 else 0
        if not 0 <= levels <= min(stored, decoded):
            raise UndecodableError("levels are longer than their page")
        found = _decompressed(
            self._codecs[column] if page[members.COMPRESSED] else None, data[levels:], decoded - levels
        )
        if page[members.KIND] == members.DICTIONARY_PAGE or page[members.ENCODING] == members.PLAIN:
            is_dictionary = page[members.KIND] == members.DICTIONARY_PAGE
            self._provide(members.NEEDS_DICTIONARY if is_dictionary else members.NEEDS_ROOM, column, len(found))
            kept = self._dictionaries[column] if is_dictionary else self._held[column]
            assert kept is not None
            kept[: len(found)] = found
        else:
            kept = found
        while True:
            at = data.ctypes.data, kept.ctypes.data
            status, n_bytes = take_values(page, *at, len(found))
            if status == members.DONE:
                return
            self._provide(status, column, n_bytes)

    def _give_back(self, memory: Bytes | None) -> None:
        if memory is not None:
            self._scratch.give(memory)

    def close(self) -> None:
        """Give the memory back; what was read last is no longer valid."""
        for memory in (*self._held, *self._dictionaries):
            self._give_back(memory)
        self._held, self._dictionaries = [None] * self.n_columns, [None] * self.n_columns
        self._table[:, members.LEFT] = 0
        self._file = None


def _decompressed(codec: str | None, data: Bytes, decoded: int) -> Bytes:
    if codec is None or decoded == 0:
        if len(data) != decoded:
            raise UndecodableError("a page that is not compressed has another size than it says")
        return data
    size = _SIZES[codec](data[:_HEAD_BYTES].tobytes().ljust(_HEAD_BYTES, b"\0"), data)
    try:
        if size is None:
            with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(data)), codec) as stream:
                found = np.frombuffer(stream.read(decoded + 1), np.uint8)
            size = len(found)
        elif size == decoded:
            found = np.frombuffer(pa.Codec(codec).decompress(data, decoded), np.uint8)
    except (OSError, ValueError, pa.ArrowException) as err:
        raise UndecodableError(f"a page cannot be decompressed: {err}") from err
    if size != decoded:
        raise UndecodableError("a page decompresses to another size than it says")
    return found


def _snappy_size(head: bytes, _: Bytes) -> int:
    """Read the number that snappy's data begins with."""
    found = 0
    for i in range(5):
        found |= (head[i] & 0x7F) << 7 * i
        if head[i] < 0x80:
            return found
    return -1


def _gzip_size(_: bytes, data: Bytes) -> int:
    """Read the last four bytes; right for data of one member, as writers make it."""
    return int.from_bytes(data[-4:].tobytes(), "little")


def _zstd_size(head: bytes, _: Bytes) -> int | None:
    """Read the content size in a frame's header (RFC 8878, 3.1.1.1); None if it is not there, as in streams."""
    flags = head[4]
    n_bytes = (flags >> 5 & 1, 2, 4, 8)[flags >> 6]
    first = 5 + (flags >> 5 & 1 ^ 1) + (0, 1, 2, 4)[flags & 3]  # after the window's size and the dictionary's number
    if head[:4] != b"\x28\xb5\x2f\xfd":
        return -1
    if n_bytes == 0:
        return None
    return int.from_bytes(head[first : first + n_bytes], "little") + 256 * (n_bytes == 2)


#: How much compressed data says that it decompresses to, given its first bytes, and all of it. Decompression itself
#: would leave the rest of the memory as it is.
_SIZES: dict[str, Callable[[bytes, Bytes], int | None]] = {
    "snappy": _snappy_size,
    "gzip": _gzip_size,
    "zstd": _zstd_size,
}
#: As long as what says so can be.
_HEAD_BYTES = 18


@dataclass(frozen=True)
class _Held:
    """Columns of consecutive rows, and the memory that they lie in."""

    n_rows: int
    addresses: NDArray[np.int64]
    widths: NDArray[np.int64]
    strides: NDArray[np.int64]
    names: tuple[str, ...]
    memory: tuple[Any, ...]

    @property
    def n_columns(self) -> int:
        """Number of columns."""
        return len(self.memory)

    def columns(self, first: int, stop: int) -> Columns:
        """Return some of the columns."""
        located = self.addresses[first:stop], self.widths[first:stop], self.strides[first:stop], self.names[first:stop]
        return Columns(_HeldArrays(self, first, stop), 0, self.n_rows, located=located)

    def array(self, column: int) -> Array:
        """Return one column; a view."""
        memory: Bytes = self.memory[column]
        first = int(self.addresses[column]) - memory.ctypes.data
        values: Array = memory[first : first + self.n_rows * int(self.widths[column])].view(self.names[column])
        return values


class _HeldArrays(Sequence[Array]):
    """The columns as arrays, for whoever asks for one."""

    def __init__(self, held: _Held, first: int, stop: int) -> None:
        self._held, self._columns = held, range(first, stop)

    def __len__(self) -> int:
        return len(self._columns)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Array]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._held.array(self._columns[index])
