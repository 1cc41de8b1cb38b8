"""What a footer says of the column chunks that are read, held against the rest of it.

pyarrow would tell as much, but it ends the process over footers that contradict themselves, as damaged ones may: its
access to column chunks lets C++ exceptions through (seen with version 26). Their number can be large, so that
they are read all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from streamgd.data.compiled import parquet_footer as members
from streamgd.errors import DataError

_MAGIC = b"PAR1"
#: Names by the numbers that footers have for them.
_TYPES = ("BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
_CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")
#: Members that are counts, or places in the file.
_NOT_NEGATIVE = (members.N_VALUES, members.DECODED_BYTES, members.STORED_BYTES, members.DATA_AT)


@dataclass(frozen=True)
class Footer:
    """A footer as read.

    Attributes
    ----------
    size : int
        Bytes of the file.
    digest : str
        A hash of the footer's bytes.
    content : bytes
        These bytes.
    groups : list of int
        Where each row group begins in them, and where the last one ends.
    places : list of int
        Where the list of row groups begins and ends.
    metadata : pyarrow.parquet.FileMetaData
        What the bytes say of the file, without its row groups: of these pyarrow keeps twenty times as many bytes as
        there are here.
    """

    size: int
    digest: str
    content: bytes
    groups: NDArray[np.int64]
    places: Sequence[int]
    metadata: Any

    @property
    def n_groups(self) -> int:
        """Row groups."""
        return len(self.groups) - 1

    @classmethod
    def read(cls, path: str, size: int, digest: str, content: bytes) -> Self:
        """Read the bytes of a footer; `path` is for messages.

        Raises
        ------
        ValueError
            If they make no sense.
        DataError
            If a signature behind them says that columns are encrypted: asking pyarrow about one would end the process.
        """
        places, groups = _found_groups(content)
        if places[2] != len(content):
            raise DataError(
                f"{path!r} has encrypted columns, which streamgd does not support; write it again without encryption"
            )
        return cls(size, digest, content, groups, places, _parsed(content, places, b"\x0c"))

    def with_group(self, group: int) -> Any:
        """Return the pyarrow.parquet.FileMetaData of a file that has one row group alone."""
        first, end = self.groups[group : group + 2].tolist()
        return _parsed(self.content, self.places, b"\x1c" + self.content[first:end])


@dataclass(frozen=True)
class Chunk:
    """One column of one row group.

    Attributes
    ----------
    start, compressed_bytes, uncompressed_bytes : int
        Where its bytes lie in the file, how many there are, and how many they decompress to.
    physical_type, codec : str
        What it holds, and how it is compressed.
    n_values, n_nulls : int
        Values, those that are missing included, and how many are missing; -1 if that is not told.
    encodings : int
        A bit for each encoding of its pages.
    max_level, repeats : int
        The highest levels of definition and repetition.
    """

    start: int
    compressed_bytes: int
    uncompressed_bytes: int
    physical_type: str
    codec: str = "UNCOMPRESSED"
    n_values: int = 0
    n_nulls: int = -1
    encodings: int = 0
    max_level: int = 0
    repeats: int = 0


def _found_groups(content: bytes) -> tuple[list[int], NDArray[np.int64]]:
    """Find where the list of row groups and the footer lie, and each row group, which takes a byte at least."""
    stored = np.frombuffer(content, np.uint8)
    at, places, bounds = stored.__array_interface__["data"][0], np.zeros(3, np.int64), np.zeros(0, np.int64)
    found = members.find_groups(at, at + len(stored), places, bounds)
    if found < 0:
        raise ValueError("its row groups make no sense")
    bounds = np.zeros(found + 1, np.int64)
    members.find_groups(at, at + len(stored), places, bounds)
    return places.tolist(), bounds


def _parsed(content: bytes, places: Sequence[int], groups: bytes) -> Any:
    """Have pyarrow read a footer with another list of row groups."""
    whole = content[: places[0]] + groups + content[places[1] :]
    return pq.read_metadata(pa.BufferReader(_MAGIC + whole + len(whole).to_bytes(4, "little") + _MAGIC))


class ChunkTable:
    """The column chunks of some columns of a file.

    Parameters
    ----------
    path : str
        The file, for messages.
    footer : Footer
        Its footer.
    leaves : sequence of int
        Numbers of the columns.

    Attributes
    ----------
    rows : ndarray of shape (n_groups,), int64
        Rows of each row group.

    Raises
    ------
    ValueError
        If the footer contradicts itself.
    DataError
        If columns lie in other files, or are encrypted.
    """

    def __init__(self, path: str, footer: Footer, leaves: Sequence[int]) -> None:
        metadata, self._path = footer.metadata, path
        self._schema = [metadata.schema.column(leaf) for leaf in leaves]
        wanted = np.full(metadata.num_columns, -1, np.int64)
        places = {leaf: place for place, leaf in enumerate(dict.fromkeys(leaves))}
        wanted[list(places)] = list(places.values())
        self._places = [places[leaf] for leaf in leaves]
        self._table = np.empty((footer.n_groups, len(places), members.N_CHUNK_MEMBERS), np.int64)
        self.rows = np.empty(footer.n_groups, np.int64)
        stored = np.frombuffer(footer.content, np.uint8)
        at = stored.__array_interface__["data"][0]
        if not members.read_footer(at, at + len(stored), wanted, self._table, self.rows):
            raise ValueError("its row groups make no sense")
        data, dictionary = (self._table[..., member] for member in (members.DATA_AT, members.DICTIONARY_AT))
        self._starts = np.where(dictionary > 0, np.minimum(data, dictionary), data)  # some writers put 0 for none
        self._check(metadata, footer.size)

    def _check(self, metadata: Any, size: int) -> None:
        """Hold the row groups against the file, its schema, and one another."""
        table, rows = self._table, self.rows
        if (rows < 0).any() or int(rows.sum()) != metadata.num_rows:
            raise ValueError(f"row groups of {rows.tolist()[:20]} rows in a file of {metadata.num_rows:,}")
        if table[..., members.ENCRYPTED].any():
            raise DataError(
                f"{self._path!r} has encrypted columns, which streamgd does not support; write it again without "
                "encryption"
            )
        odd = (table[..., _NOT_NEGATIVE] < 0).any(-1)
        odd |= self._starts > size - np.minimum(table[..., members.STORED_BYTES], size)
        for group, place in np.argwhere(odd)[:1].tolist():
            if table[group, place, members.ELSEWHERE]:
                raise DataError(f"the rows of {self._path!r} lie in other files: open those, or their folder")
            raise ValueError(f"column {self._name(place)!r} of row group {group} lies outside of the file")
        chunks = table[:, self._places]
        stored = [column.physical_type for column in self._schema]
        wrong = chunks[..., members.TYPE] != [_number(_TYPES, each) for each in stored]
        for group, column in np.argwhere(wrong)[:1].tolist():
            found = _named(_TYPES, int(chunks[group, column, members.TYPE]))
            raise ValueError(
                f"column {self._schema[column].name!r} of row group {group} holds {found}, and by the schema "
                f"{stored[column]}"
            )
        codecs = chunks[..., members.CODEC]
        for group, column in np.argwhere((codecs < 0) | (codecs >= len(_CODECS)))[:1].tolist():
            raise DataError(
                f"column {self._schema[column].name!r} of row group {group} of {self._path!r} is compressed by a codec "
                f"that is not known here (number {int(codecs[group, column])}): write the file again with another one "
                "(zstd)"
            )
        wrong = chunks[..., members.N_VALUES] != rows[:, None]
        wrong &= np.array([column.max_repetition_level == 0 for column in self._schema], np.bool_)
        for group, column in np.argwhere(wrong)[:1].tolist():
            raise ValueError(
                f"column {self._schema[column].name!r} of row group {group} has "
                f"{int(chunks[group, column, members.N_VALUES]):,} values for {int(rows[group]):,} rows"
            )

    def _name(self, place: int) -> str:
        return str(self._schema[self._places.index(place)].name)

    def chunk(self, group: int, column: int) -> Chunk:
        """Return what the footer says of a column, by its position in `leaves`."""
        schema = self._schema[column]
        place = self._places[column]
        row = self._table[group, place].tolist()
        return Chunk(
            int(self._starts[group, place]),
            row[members.STORED_BYTES],
            row[members.DECODED_BYTES],
            schema.physical_type,
            _named(_CODECS, row[members.CODEC]),
            row[members.N_VALUES],
            row[members.N_NULLS],
            row[members.ENCODINGS],
            schema.max_definition_level,
            schema.max_repetition_level,
        )

    @property
    def held_bytes(self) -> int:
        """Bytes that this takes."""
        return int(self._table.nbytes + self._starts.nbytes + self.rows.nbytes)

    @property
    def n_bytes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bytes of the columns of each row group, as stored and decompressed."""
        stored, decoded = (self._table[..., member].sum(1) for member in (members.STORED_BYTES, members.DECODED_BYTES))
        return stored, decoded

    @property
    def n_nulls(self) -> NDArray[np.int64]:
        """How many values are missing in each column of each row group, -1 where that is not told."""
        found: NDArray[np.int64] = self._table[:, self._places, members.N_NULLS]
        return found


def _number(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else -2


def _named(names: Sequence[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else f"number {number}"
