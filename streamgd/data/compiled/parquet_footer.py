"""What a footer of Parquet says of the columns of its row groups, in Thrift's compact protocol.

References
----------
Apache Parquet format, ``parquet.thrift`` (FileMetaData, RowGroup, ColumnChunk, ColumnMetaData, Statistics); Apache
Thrift, "Thrift compact protocol encoding".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled
from streamgd.data.compiled.memory import uint8_at, varint, whole

#: Members of a column chunk: its physical type and codec, its values, its bytes when decompressed and as stored, where
#: its first data page and its dictionary begin, its nulls (-1: not told), its encodings (bits), whether it lies in
#: another file, and whether it is encrypted.
TYPE, CODEC, N_VALUES, DECODED_BYTES, STORED_BYTES, DATA_AT, DICTIONARY_AT, N_NULLS, ENCODINGS = range(9)
ELSEWHERE, ENCRYPTED = 9, 10
N_CHUNK_MEMBERS = 11
#: Encodings beyond these have one bit together.
MOST_ENCODINGS = 62
#: Structs, lists and maps within one another at most.
_MOST_DEPTH = 32
#: Types of values: booleans are their own values but in lists.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = range(1, 14)


@compiled
def _field(at: int, end: int, number: Any) -> Any:
    """Read what a field of a struct begins with; return its type (0 after the last, -1 for damage), number and end."""
    if at >= end:
        return -1, 0, at
    byte = np.int64(uint8_at(at, 0))
    at += 1
    if byte == 0:
        return 0, 0, at
    if byte >> 4:
        return byte & 15, number + (byte >> 4), at
    value, at = varint(at, end)
    return (byte & 15 if at else -1), whole(value), at


@compiled
def _listed(at: int, end: int) -> Any:
    """Read what a list begins with; return how many values it has (-1 for damage), their type, and where they begin."""
    if at >= end:
        return -1, 0, at
    byte = np.int64(uint8_at(at, 0))
    count, at = byte >> 4, at + 1
    if count == 15:
        count, at = varint(at, end)
    if at == 0 or count < 0 or count > end - at:  # every value takes a byte at least
        return -1, 0, at
    return count, byte & 15, at


@compiled
def _skip(at: int, end: int, kind: int) -> int:
    """Return where a value ends, 0 for damage."""
    kinds = np.zeros(_MOST_DEPTH, np.int64)  # of what is within one another: 12 in structs, else that of the values
    left = np.zeros(_MOST_DEPTH, np.int64)  # values of lists
    depth, begun = 0, True
    while begun or depth:
        if not begun:  # the next value of what is open
            if kinds[depth - 1] == _STRUCT and left[depth - 1] < 0:
                kind, _, at = _field(at, end, 0)
                if kind < 0:
                    return 0
                if kind == 0:
                    depth -= 1
                    continue
                if kind <= _FALSE:
                    continue
            elif left[depth - 1] == 0:
                depth -= 1
                continue
            else:
                left[depth - 1] -= 1
                kind = kinds[depth - 1]
                if kind <= _FALSE:
                    kind = _BYTE
        begun = False
        if kind == _BYTE:
            at += 1
        elif kind in (_I16, _I32, _I64):
            _, at = varint(at, end)
            if at == 0:
                return 0
        elif kind == _DOUBLE:
            at += 8
        elif kind == _UUID:
            at += 16
        elif kind == _BINARY:
            size, at = varint(at, end)
            if at == 0 or size < 0 or size > end - at:
                return 0
            at += size
        elif kind in (_LIST, _SET, _STRUCT):
            if depth == _MOST_DEPTH:
                return 0
            if kind == _STRUCT:
                kinds[depth], left[depth] = _STRUCT, -1
            else:
                left[depth], kinds[depth], at = _listed(at, end)
                if left[depth] < 0:
                    return 0
            depth += 1
        elif kind > _FALSE or kind <= 0:  # maps do not occur in footers
            return 0
        if at > end:
            return 0
    return at


@compiled
def _read_encodings(at: int, end: int, chunk: NDArray[np.int64]) -> int:
    count, kind, at = _listed(at, end)
    if count < 0 or kind < _I16 or kind > _I64:
        return 0
    chunk[ENCODINGS] = 0
    for _ in range(count):
        value, at = varint(at, end)
        if at == 0:
            return 0
        chunk[ENCODINGS] |= np.int64(1) << min(max(whole(value), 0), MOST_ENCODINGS)
    return at


@compiled
def _read_statistics(at: int, end: int, chunk: NDArray[np.int64]) -> int:
    number = np.int64(0)
    while True:
        kind, number, at = _field(at, end, number)
        if kind <= 0:
            return at if kind == 0 else 0
        if number == 3 and kind == _I64:
            value, at = varint(at, end)
            chunk[N_NULLS] = whole(value)
        elif kind > _FALSE:
            at = _skip(at, end, kind)
        if at == 0:
            return 0


@compiled
def _read_metadata(at: int, end: int, chunk: NDArray[np.int64]) -> int:
    """Read what a column chunk says of itself; return where that ends, 0 for damage."""
    number = np.int64(0)
    while True:
        kind, number, at = _field(at, end, number)
        if kind <= 0:
            return at if kind == 0 else 0
        member = -1
        if number == 1:
            member = TYPE
        elif number == 4:
            member = CODEC
        elif number == 5:
            member = N_VALUES
        elif number == 6:
            member = DECODED_BYTES
        elif number == 7:
            member = STORED_BYTES
        elif number == 9:
            member = DATA_AT
        elif number == 11:
            member = DICTIONARY_AT
        if member >= 0 and kind in (_I32, _I64):
            value, at = varint(at, end)
            chunk[member] = whole(value)
        elif number == 2 and kind == _LIST:
            at = _read_encodings(at, end, chunk)
        elif number == 12 and kind == _STRUCT:
            at = _read_statistics(at, end, chunk)
        elif kind > _FALSE:
            at = _skip(at, end, kind)
        if at == 0:
            return 0


@compiled
def _read_chunk(at: int, end: int, chunk: NDArray[np.int64]) -> int:
    number = np.int64(0)
    chunk[:] = -1
    chunk[ELSEWHERE], chunk[ENCRYPTED], chunk[ENCODINGS] = 0, 0, 0
    while True:
        kind, number, at = _field(at, end, number)
        if kind <= 0:
            return at if kind == 0 else 0
        if number == 1:
            chunk[ELSEWHERE] = 1
        elif number == 8:
            chunk[ENCRYPTED] = 1
        if number == 3 and kind == _STRUCT:
            at = _read_metadata(at, end, chunk)
        elif kind > _FALSE:
            at = _skip(at, end, kind)
        if at == 0:
            return 0


@compiled
def _read_group(
    at: int, end: int, wanted: NDArray[np.int64], chunks: NDArray[np.int64], rows: NDArray[np.int64]
) -> int:
    """Read a row group: its rows, and its column chunks that have a place in `chunks`."""
    number, found = np.int64(0), 0
    spare = np.zeros(N_CHUNK_MEMBERS, np.int64)
    rows[0] = -1
    while True:
        kind, number, at = _field(at, end, number)
        if kind <= 0:
            return at if kind == 0 and found == len(wanted) else 0
        if number == 1 and kind == _LIST:
            found, kind, at = _listed(at, end)
            if found != len(wanted) or kind != _STRUCT:
                return 0
            for column in range(found):
                place = wanted[column]
                at = _read_chunk(at, end, chunks[place] if place >= 0 else spare)
                if at == 0:
                    return 0
        elif number == 3 and kind == _I64:
            value, at = varint(at, end)
            rows[0] = whole(value)
        elif kind > _FALSE:
            at = _skip(at, end, kind)
        if at == 0:
            return 0


@compiled
def read_footer(
    at: int, end: int, wanted: NDArray[np.int64], chunks: NDArray[np.int64], rows: NDArray[np.int64]
) -> bool:
    """Read a footer.

    Parameters
    ----------
    at, end : int
        Addresses of its bytes.
    wanted : ndarray of shape (n_leaves,), int64
        The place of each column in `chunks`, or -1.
    chunks : ndarray of shape (n_groups, n_wanted, N_CHUNK_MEMBERS), int64
        Is given what the footer says of each; -1 where it says nothing.
    rows : ndarray of shape (n_groups,), int64
        Is given the rows of each row group.

    Returns
    -------
    bool
        Whether it makes sense, and has as many row groups as there is room for, of as many columns.
    """
    number, found = np.int64(0), -1
    while True:
        kind, number, at = _field(at, end, number)
        if kind <= 0:
            return kind == 0 and found == len(rows)
        if number == 4 and kind == _LIST:
            found, kind, at = _listed(at, end)
            if found != len(rows) or (found and kind != _STRUCT):
                return False
            for group in range(found):
                at = _read_group(at, end, wanted, chunks[group], rows[group : group + 1])
                if at == 0:
                    return False
        elif kind > _FALSE:
            at = _skip(at, end, kind)
        if at == 0:
            return False


@compiled
def find_groups(at: int, end: int, places: NDArray[np.int64], bounds: NDArray[np.int64]) -> int:
    """Find where row groups lie in a footer.

    Parameters
    ----------
    at, end : int
        Addresses of its bytes.
    places : ndarray of shape (3,), int64
        Is given where the list of row groups begins and ends, and where the footer does, counted from `at`.
    bounds : ndarray of shape (n,), int64
        Is given where the first n - 1 row groups begin, and behind them where the last of them ends.

    Returns
    -------
    int
        How many row groups there are; -1 if the footer makes no sense.
    """
    base, number, found = at, np.int64(0), -1
    while True:
        kind, number, at = _field(at, end, number)
        if kind <= 0:
            places[2] = at - base
            return found if kind == 0 else -1
        if number == 4 and kind == _LIST:
            places[0] = at - base
            found, kind, at = _listed(at, end)
            if found < 0 or (found and kind != _STRUCT):
                return -1
            for group in range(found):
                if group < len(bounds):
                    bounds[group] = at - base
                at = _skip(at, end, _STRUCT)
                if at == 0:
                    return -1
            if found < len(bounds):
                bounds[found] = at - base
            places[1] = at - base
        elif kind > _FALSE:
            at = _skip(at, end, kind)
        if at == 0:
            return -1
