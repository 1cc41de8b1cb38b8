"""Headers of Parquet's pages, in Thrift's compact protocol.

References
----------
Apache Parquet format, ``parquet.thrift`` (PageHeader and the headers within); Apache Thrift, "Thrift compact protocol
encoding".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled
from streamgd.data.compiled.memory import uint8_at, varint, whole
from streamgd.data.compiled.parquet_members import (
    COMPRESSED,
    CRC,
    DECODED,
    ENCODING,
    HAS_CRC,
    KIND,
    LEVEL_ENCODING,
    LEVELS,
    N_NULLS,
    N_ROWS,
    N_VALUES,
    REPETITIONS,
    STORED,
)

#: Structs within one another at most.
_MOST_DEPTH = 8


@compiled
def _keep(page: NDArray[np.int64], where: int, field: Any, value: Any) -> None:
    """Take one number of a header: `where` is the field of the page header that holds it, 0 for itself."""
    if where == 0:
        if field == 1:
            page[KIND] = value
        elif field == 2:
            page[DECODED] = value
        elif field == 3:
            page[STORED] = value
        elif field == 4:
            page[CRC], page[HAS_CRC] = value & 0xFFFFFFFF, 1
    elif where == 5 or where == 7:
        if field == 1:
            page[N_VALUES] = value
        elif field == 2:
            page[ENCODING] = value
        elif field == 3:
            page[LEVEL_ENCODING] = value
    elif where == 8:
        if field == 1:
            page[N_VALUES] = value
        elif field == 2:
            page[N_NULLS] = value
        elif field == 3:
            page[N_ROWS] = value
        elif field == 4:
            page[ENCODING] = value
        elif field == 5:
            page[LEVELS] = value
        elif field == 6:
            page[REPETITIONS] = value
        elif field == 7:
            page[COMPRESSED] = value


@compiled
def read_header(at: int, end: int, page: NDArray[np.int64]) -> int:
    """Read a page's header from memory; return its bytes, 0 if it goes on after `end`, -1 if it makes no sense."""
    begin, depth = at, 0
    where, numbers = np.zeros(_MOST_DEPTH, np.int64), np.zeros(_MOST_DEPTH, np.int64)
    page[KIND], page[DECODED], page[STORED], page[N_VALUES], page[ENCODING] = -1, -1, -1, -1, -1
    page[N_NULLS], page[LEVELS], page[COMPRESSED], page[HAS_CRC] = -1, 0, 1, 0
    page[LEVEL_ENCODING], page[N_ROWS], page[REPETITIONS] = -1, -1, 0
    while at < end:
        byte = np.int64(uint8_at(at, 0))
        at += 1
        if byte == 0:
            if depth == 0:
                sane = page[DECODED] >= 0 and page[STORED] >= 0
                return at - begin if sane else -1
            depth -= 1
            continue
        kind = byte & 15
        if byte >> 4:
            numbers[depth] += byte >> 4
        else:
            value, at = varint(at, end)
            if at == 0:
                return 0
            numbers[depth] = whole(value)
        field = numbers[depth]
        if kind == 1 or kind == 2:  # a boolean, whose value is its type
            _keep(page, where[depth], field, np.int64(kind == 1))
        elif kind == 3:
            at += 1
        elif kind == 4 or kind == 5 or kind == 6:
            value, at = varint(at, end)
            if at == 0:
                return 0
            _keep(page, where[depth], field, whole(value))
        elif kind == 7:
            at += 8
        elif kind == 8:
            value, at = varint(at, end)
            if at == 0:
                return 0
            if value < 0 or value > end - at:
                return -1 if value < 0 else 0
            at += value
        elif kind == 12:
            if depth + 1 == _MOST_DEPTH:
                return -1
            inner = field if depth == 0 else -1
            depth += 1
            where[depth], numbers[depth] = inner, 0
        else:  # lists, sets and maps do not occur in page headers
            return -1
    return 0
