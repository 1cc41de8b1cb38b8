"""Pages of Parquet, the next one of each column a call: read, decompressed and decoded.

Whoever calls says what is wrong with a page by leaving it to Arrow; here, it is only noticed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled
from streamgd.data.compiled.memory import address_of, copy_bytes, read_file
from streamgd.data.compiled.parquet_headers import read_header
from streamgd.data.compiled.parquet_members import (
    ADDRESS,
    AT,
    BEGIN,
    CODEC,
    COMPRESSED,
    DATA_PAGE,
    DATA_PAGE_V2,
    DECODED,
    DICTIONARY,
    DICTIONARY_PAGE,
    DICTIONARY_ROOM,
    DONE,
    ENCODING,
    END,
    FOREIGN,
    GUESS,
    HAS_CRC,
    INDEX_PAGE,
    KIND,
    LEFT,
    LEVELS,
    MEMORY,
    MOST_BYTES,
    MOST_VALUES,
    N_ENTRIES,
    N_VALUES,
    NEEDS_DICTIONARY,
    NEEDS_ROOM,
    NEEDS_SCRATCH,
    OTHER_CODEC,
    PASSED,
    PLAIN,
    PLAIN_DICTIONARY,
    RLE_DICTIONARY,
    ROOM,
    SENSELESS,
    SKIPPED,
    STORED,
    UNCOMPRESSED,
    WIDTH,
)
from streamgd.data.compiled.parquet_values import decode_dictionary, find_values
from streamgd.data.compiled.snappy import expand_snappy

#: Bytes read at first where a header's length is not known.
_FIRST_HEADER_BYTES = 512


@compiled
def next_pages(fd: int, table: NDArray[np.int64], scratch: NDArray[np.uint8]) -> Any:
    """Read and decode the next page of every column that has no values left.

    Parameters
    ----------
    fd : int
        Descriptor of the file.
    table : ndarray of shape (n_columns, `N_MEMBERS`), int64
        What is known of each column. Of pages whose values are all to be passed over only headers are read.
    scratch : ndarray of uint8
        Memory to work in.

    Returns
    -------
    status, column, n_bytes : int
        `DONE`, or what is wrong or missing with a column, and how many bytes that takes. Called again, it goes on with
        that page; after `FOREIGN`, which leaves the page's bytes in the scratch memory, with the one after it.
    """
    for column in range(len(table)):
        page = table[column]
        while page[LEFT] == 0:
            status, n_bytes = _read_page(fd, page, scratch)
            if status == PASSED:
                continue
            if status != DONE:
                return status, column, n_bytes
            total = page[BEGIN] + page[STORED]
            if page[HAS_CRC] or (page[CODEC] == OTHER_CODEC and page[COMPRESSED]):
                page[AT] += total
                return FOREIGN, column, 0
            status, n_bytes = _decode(page, scratch)
            if status != DONE:
                return status, column, n_bytes
            page[AT] += total
    return DONE, 0, 0


@compiled
def _read_page(fd: int, page: NDArray[np.int64], scratch: NDArray[np.uint8]) -> Any:
    """Read a page to the scratch memory, unless all of it is to be passed over."""
    base = address_of(scratch)
    while True:
        left = page[END] - page[AT]
        ahead = min(max(page[GUESS], _FIRST_HEADER_BYTES), left)
        if ahead <= 0:
            return SENSELESS, 0
        if ahead > len(scratch):
            return NEEDS_SCRATCH, ahead
        if not read_file(fd, base, ahead, page[AT]):
            return SENSELESS, 0
        header = read_header(base, base + ahead, page)
        if header == 0 and ahead < left:
            page[GUESS] = 2 * ahead
            continue
        if header <= 0 or page[STORED] > left - header or page[DECODED] > page[MOST_BYTES]:
            return SENSELESS, 0
        break
    total = header + page[STORED]
    is_data = page[KIND] == DATA_PAGE or page[KIND] == DATA_PAGE_V2
    if is_data and not 0 <= page[N_VALUES] <= page[MOST_VALUES]:
        return SENSELESS, 0
    if page[KIND] == INDEX_PAGE or (is_data and page[N_VALUES] <= page[SKIPPED]):
        if is_data:
            page[SKIPPED] -= page[N_VALUES]
            page[MOST_VALUES] -= page[N_VALUES]
        page[AT] += total
        return PASSED, 0
    page[GUESS] = total + 64
    if total > ahead:
        if total > len(scratch):
            return NEEDS_SCRATCH, total
        if not read_file(fd, base + ahead, total - ahead, page[AT] + ahead):
            return SENSELESS, 0
    page[BEGIN] = header
    return DONE, 0


@compiled
def _decode(page: NDArray[np.int64], scratch: NDArray[np.uint8]) -> Any:
    """Decompress a page that lies in the scratch memory, and find or look up its values."""
    stored = address_of(scratch) + page[BEGIN]
    end, decoded, levels = stored + page[STORED], page[DECODED], 0
    if page[KIND] == DATA_PAGE_V2:  # its levels are not compressed
        levels = page[LEVELS]
        if levels < 0 or levels > min(page[STORED], decoded):
            return SENSELESS, 0
        decoded -= levels
    indexed = page[KIND] != DICTIONARY_PAGE and page[ENCODING] != PLAIN
    if page[KIND] == DICTIONARY_PAGE:
        if decoded > page[DICTIONARY_ROOM]:
            return NEEDS_DICTIONARY, decoded
        target = page[DICTIONARY]
    elif indexed:
        if page[BEGIN] + page[STORED] + decoded > len(scratch):
            return NEEDS_SCRATCH, page[BEGIN] + page[STORED] + decoded
        target = end
    else:
        if decoded > page[ROOM]:
            return NEEDS_ROOM, decoded
        target = page[MEMORY]
    if page[CODEC] == UNCOMPRESSED or not page[COMPRESSED] or decoded == 0:
        if end - stored - levels != decoded:
            return SENSELESS, 0
        copy_bytes(target, stored + levels, decoded)
    elif not expand_snappy(stored + levels, end, target, decoded):
        return SENSELESS, 0
    return take_values(page, stored, target, decoded)


@compiled
def take_values(page: NDArray[np.int64], stored: int, target: int, decoded: int) -> Any:
    """Go on with a page that is decompressed: take its dictionary, or find its values, or look them up.

    Parameters
    ----------
    page : ndarray of shape (`N_MEMBERS`,), int64
        The page.
    stored, target : int
        Addresses of its bytes as stored, and of those decompressed.
    decoded : int
        How many of the latter there are.

    Returns
    -------
    status, n_bytes : int
        As of `next_pages`.
    """
    if page[N_VALUES] < 0:
        return SENSELESS, 0
    if page[KIND] == DICTIONARY_PAGE:
        known = page[ENCODING] == PLAIN or page[ENCODING] == PLAIN_DICTIONARY
        if not known or page[N_VALUES] > decoded // page[WIDTH] or target != page[DICTIONARY]:
            return SENSELESS, 0
        page[N_ENTRIES] = page[N_VALUES]
        return DONE, 0
    if page[KIND] != DATA_PAGE and page[KIND] != DATA_PAGE_V2:
        return SENSELESS, 0
    first = find_values(page, stored, target)
    if first < 0:
        return SENSELESS, 0
    values = target + first
    if page[ENCODING] == PLAIN:
        if page[N_VALUES] > (decoded - first) // page[WIDTH]:
            return SENSELESS, 0
    else:
        if (page[ENCODING] != PLAIN_DICTIONARY and page[ENCODING] != RLE_DICTIONARY) or page[DICTIONARY] == 0:
            return SENSELESS, 0
        if page[N_VALUES] > page[ROOM] // page[WIDTH]:
            return NEEDS_ROOM, page[N_VALUES] * page[WIDTH]
        dictionary, entries, width = page[DICTIONARY], page[N_ENTRIES], page[WIDTH]
        if not decode_dictionary(values, target + decoded, page[N_VALUES], dictionary, entries, width, page[MEMORY]):
            return SENSELESS, 0
        values = page[MEMORY]
    page[MOST_VALUES] -= page[N_VALUES]
    page[ADDRESS] = values + page[SKIPPED] * page[WIDTH]
    page[LEFT] = page[N_VALUES] - page[SKIPPED]
    page[SKIPPED] = 0
    return DONE, 0
