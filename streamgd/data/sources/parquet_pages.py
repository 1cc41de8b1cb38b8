"""What an open Parquet row group costs in memory, from the headers of its pages.

Arrow keeps, for every column of an open row group, one page decompressed and the column's dictionary decoded. Footers
do not tell how big pages are (1 MB by most writers, any size by some), and pyarrow does not show page headers, so that
they are read here: a Thrift struct in compact encoding before each page [1]_.

References
----------
.. [1] Apache Parquet format, ``parquet.thrift``: PageHeader, DataPageHeader, DictionaryPageHeader;
   Apache Thrift, "Thrift compact protocol encoding".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from streamgd.data.sources.parquet_chunks import Chunk

#: Bytes that Arrow buffers of each open column, given to it as ``buffer_size``.
STREAM_BYTES = 1 << 16
#: Pages that are not left to Arrow are read to so much memory at first, one after the other: decompression finds them
#: in the second cache.
SCRATCH_BYTES = 1 << 18
#: Page headers looked at in one row group, all columns together, and at least in each column.
_MOST_HEADERS = 512
_LEAST_PAGES = 4
#: Bytes read at once for a header; statistics of long strings can make one longer.
_HEADER_BYTES = (256, 1 << 16)
_DICTIONARY_PAGE = 2
_DATA_PAGES = (0, 3)
#: Bytes of a plain value, 8 where not listed; strings are taken for long.
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT96": 12, "FIXED_LEN_BYTE_ARRAY": 16, "BYTE_ARRAY": 64}
#: Definition levels and scratch of a column while a slice of it is decoded, and its share of the reader's objects.
_DECODER_BYTES = 40_000
#: Resident bytes to a byte that Arrow has allocated, at worst: size classes and freed pages of the allocator. Measured
#: over the default, dictionary-free and huge-page writers, 28 and 300 columns, 1 to 8 open row groups, 1 and 2 threads.
_ALLOCATOR_SLACK = 1.5
#: The same where pages are read one by one.
_DIRECT_SLACK = 1.5


class _DamagedHeader(Exception):
    """A page header that does not follow the format; reading the page will say so better."""


@dataclass(frozen=True)
class _Page:
    kind: int
    compressed_bytes: int
    uncompressed_bytes: int
    n_values: int


def open_bytes(file: BinaryIO, chunks: list[Chunk], direct: Sequence[bool] | None = None) -> tuple[int, int]:
    """Estimate, from above, the memory that keeping a row group open costs; and find the rows of its pages.

    Parameters
    ----------
    file : binary file
        Unbuffered, so that a header costs one small read.
    chunks : list of Chunk
        The columns of the row group that are read.
    direct : sequence of bool, optional
        Which of them are read page by page (`streamgd.data.sources.parquet_direct`) and not by Arrow; default: none.

    Returns
    -------
    n_bytes : int
        The estimate.
    page_rows : int
        Rows of the longest page that was looked at, or 1.
    """
    n_pages = max(_LEAST_PAGES, _MOST_HEADERS // max(1, len(chunks)))
    held, transient, page_rows = 0.0, 0, 1
    directly = [False] * len(chunks) if direct is None else direct
    for chunk, by_value in zip(chunks, directly, strict=True):
        page, dictionary, stored, n_values = _column_bytes(chunk, _pages(file, chunk, n_pages), by_value=by_value)
        if by_value:
            held += (page + dictionary) * _DIRECT_SLACK
        else:
            # Never more than everything twice: decompressed and decoded.
            fixed = min(STREAM_BYTES, chunk.compressed_bytes) + _DECODER_BYTES
            most = 2 * chunk.uncompressed_bytes + fixed * _ALLOCATOR_SLACK
            held += min((page + dictionary + fixed) * _ALLOCATOR_SLACK, most)
        transient = max(transient, stored + (page if by_value else 0))
        page_rows = max(page_rows, n_values)
    return int(held) + max(transient, SCRATCH_BYTES if any(directly) else 0), page_rows


def _column_bytes(chunk: Chunk, pages: Iterator[_Page], *, by_value: bool) -> tuple[int, int, int, int]:
    """Return a column's largest page, decompressed or (by value) decoded; its dictionary; its largest stored page.

    Last come the values of its longest page.
    """
    width = _WIDTHS.get(chunk.physical_type, 8)
    largest = dictionary = most_values = compressed = seen = 0
    for page in pages:
        seen += page.uncompressed_bytes
        if not (by_value and page.kind == _DICTIONARY_PAGE):
            largest = max(largest, page.uncompressed_bytes)
        compressed = max(compressed, page.compressed_bytes)
        if page.kind == _DICTIONARY_PAGE:
            dictionary = page.uncompressed_bytes
            if chunk.physical_type.endswith("BYTE_ARRAY"):  # decoded to pointers and lengths beside the bytes, twice
                dictionary = 2 * dictionary + (8 if chunk.physical_type.startswith("FIXED") else 40) * page.n_values
        elif page.kind in _DATA_PAGES:
            most_values = max(most_values, page.n_values)
    # Pages not looked at: a writer that gives up its dictionary half-way goes on with as many values, but plain ones.
    unseen = max(0, chunk.uncompressed_bytes - seen)
    largest = max(largest, min(unseen, most_values * width) if most_values else min(unseen, chunk.uncompressed_bytes))
    decoded = max(largest, most_values * width) if by_value and dictionary else largest
    return decoded, dictionary, max(compressed, min(largest, chunk.compressed_bytes)), most_values


def _pages(file: BinaryIO, chunk: Chunk, n_pages: int) -> Iterator[_Page]:
    """Walk the first pages of a column; ends quietly at anything odd, which leaves the rest to the footer's sizes."""
    at, end = chunk.start, chunk.start + chunk.compressed_bytes
    for _ in range(n_pages + 1):
        if at >= end:
            return
        for n_bytes in _HEADER_BYTES:
            file.seek(at)
            raw = file.read(n_bytes)
            try:
                header, length = _struct(raw, 0)
                page = _page(header)
                break
            except (IndexError, RecursionError, _DamagedHeader):
                continue
        else:
            return
        yield page
        at += length + page.compressed_bytes


def _page(header: dict[int, Any]) -> _Page:
    kind, uncompressed, compressed = (header.get(field) for field in (1, 2, 3))
    if not (isinstance(kind, int) and isinstance(uncompressed, int) and isinstance(compressed, int)):
        raise _DamagedHeader
    if uncompressed < 0 or compressed < 0:
        raise _DamagedHeader
    detail = header.get({0: 5, 2: 7, 3: 8}.get(kind, -1), {})
    n_values = detail.get(1) if isinstance(detail, dict) else None
    return _Page(kind, compressed, uncompressed, n_values if isinstance(n_values, int) else 0)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    found = shift = 0
    while True:
        byte = raw[at]
        at += 1
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            return found, at
        shift += 7
        if shift > 63:
            raise _DamagedHeader


def _struct(raw: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Decode a struct into its fields by number; fields of no interest are skipped."""
    fields: dict[int, Any] = {}
    number = 0
    while True:
        byte = raw[at]
        at += 1
        if byte == 0:
            return fields, at
        kind, step = byte & 0x0F, byte >> 4
        if step:
            number += step
        else:
            found, at = _varint(raw, at)
            number = (found >> 1) ^ -(found & 1)
        fields[number], at = _value(raw, at, kind)


def _value(raw: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # a boolean, whose value is its type
        return kind == 1, at
    if kind == 3:
        return raw[at], at + 1
    if kind in (4, 5, 6):
        found, at = _varint(raw, at)
        return (found >> 1) ^ -(found & 1), at
    if kind == 7:
        return None, _within(raw, at + 8)
    if kind == 8:
        length, at = _varint(raw, at)
        return None, _within(raw, at + length)
    if kind == 12:
        return _struct(raw, at)
    raise _DamagedHeader  # lists, sets and maps do not occur in page headers


def _within(raw: bytes, at: int) -> int:
    if at > len(raw):
        raise IndexError
    return at
