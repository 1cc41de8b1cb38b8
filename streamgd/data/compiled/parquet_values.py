"""Values of Parquet's pages: that none is null, and those that a dictionary stands for.

References
----------
Apache Parquet format, "Encodings" (RLE / bit-packing hybrid, dictionary).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled
from streamgd.data.compiled.memory import put_uint32, put_uint64, uint8_at, uint32_at, uint64_at, varint
from streamgd.data.compiled.parquet_members import (
    DATA_PAGE_V2,
    DECODED,
    KIND,
    LEVEL_ENCODING,
    LEVELS,
    MAX_LEVEL,
    N_NULLS,
    N_ROWS,
    N_VALUES,
    REPETITIONS,
    RLE,
)

#: No run of a page is longer, in values: their number is a 32-bit one.
_MOST_RUN = 1 << 32


@compiled
def _all_defined(at: int, end: int, n_values: int) -> bool:
    """Tell whether definition levels of one bit are 1 throughout."""
    n = 0
    while n < n_values:
        header, at = varint(at, end)
        if at == 0 or header <= 0 or header > _MOST_RUN:
            return False
        if header & 1:
            n_bytes = header >> 1
            if n_bytes > end - at:
                return False
            for i in range(n_bytes):
                left = n_values - n
                if left <= 0:
                    break
                mask = np.uint8(0xFF) if left >= 8 else np.uint8((1 << left) - 1)
                if uint8_at(at + i, 0) & mask != mask:
                    return False
                n += 8
            at += n_bytes
        else:
            if at >= end or uint8_at(at, 0) != 1:
                return False
            n += header >> 1
            at += 1
    return True


@compiled
def find_values(page: NDArray[np.int64], stored: int, decoded: int) -> Any:
    """Return where a data page's values begin among its decompressed bytes; -1 if one may be null, or all is not well.

    Parameters
    ----------
    page : ndarray of shape (`N_MEMBERS`,), int64
        The page.
    stored, decoded : int
        Addresses of its bytes in the file, and of those decompressed. The levels of `DATA_PAGE_V2` are not compressed,
        and only among the former.
    """
    if page[N_VALUES] < 0:
        return -1
    if page[KIND] == DATA_PAGE_V2:
        whole = page[N_NULLS] == 0 and page[N_ROWS] == page[N_VALUES] and page[REPETITIONS] == 0
        if page[MAX_LEVEL] == 0:
            return 0 if whole and page[LEVELS] == 0 else -1
        return 0 if whole and _all_defined(stored, stored + page[LEVELS], page[N_VALUES]) else -1
    if page[MAX_LEVEL] == 0:
        return 0
    if page[DECODED] < 4 or page[LEVEL_ENCODING] != RLE:
        return -1
    n_bytes: Any = np.int64(uint32_at(decoded, 0))
    if 4 + n_bytes > page[DECODED] or not _all_defined(decoded + 4, decoded + 4 + n_bytes, page[N_VALUES]):
        return -1
    return 4 + n_bytes


@compiled
def _index(at: int, end: int, bit: int, mask: Any) -> Any:
    """Read a bit-packed number that ends less than eight bytes before the memory does."""
    byte, word = at + (bit >> 3), np.uint64(0)
    for k in range(min(end - byte, 8)):
        word |= np.uint64(uint8_at(byte + k, 0)) << np.uint64(8 * k)
    return (word >> np.uint64(bit & 7)) & mask


@compiled
def _look_up_packed(
    at: int, end: int, bits: int, count: int, dictionary: int, n_entries: int, width: int, out: int
) -> bool:
    """Write the values that bit-packed indices stand for; False if there is none for one of them."""
    mask, entries, bit = np.uint64((1 << bits) - 1), np.uint64(n_entries), 0
    n_whole = min(count, max(0, ((end - at - 8) * 8) // bits)) if bits else 0  # where eight bytes can be read
    if width == 4:
        for i in range(n_whole):
            index = (uint64_at(at + (bit >> 3), 0) >> np.uint64(bit & 7)) & mask
            bit += bits
            if index >= entries:
                return False
            put_uint32(out + 4 * i, 0, uint32_at(dictionary + 4 * np.int64(index), 0))
    else:
        for i in range(n_whole):
            index = (uint64_at(at + (bit >> 3), 0) >> np.uint64(bit & 7)) & mask
            bit += bits
            if index >= entries:
                return False
            put_uint64(out + 8 * i, 0, uint64_at(dictionary + 8 * np.int64(index), 0))
    for i in range(n_whole, count):
        index = _index(at, end, bit, mask)
        bit += bits
        if index >= entries:
            return False
        _look_up(dictionary, np.int64(index), width, out + i * width)
    return True


@compiled
def _look_up(dictionary: int, index: Any, width: int, target: int) -> None:
    """Copy one value of a dictionary."""
    if width == 4:
        put_uint32(target, 0, uint32_at(dictionary + 4 * index, 0))
    else:
        put_uint64(target, 0, uint64_at(dictionary + 8 * index, 0))


@compiled
def decode_dictionary(at: Any, end: int, n_values: int, dictionary: int, n_entries: int, width: int, out: int) -> bool:
    """Write the values that indices stand for; False if they make no sense.

    Parameters
    ----------
    at, end : int
        Addresses of the first byte and after the last one: a byte that says how wide indices are, then the indices as
        runs of equal ones and of bit-packed ones.
    n_values : int
        How many.
    dictionary, n_entries : int
        Address of the dictionary, and its entries.
    width : int
        Bytes of a value: 4 or 8.
    out : int
        Address to write to.
    """
    if at >= end:
        return n_values == 0
    bits: Any = np.int64(uint8_at(at, 0))
    at += 1
    if bits > 32:
        return False
    n = 0
    while n < n_values:
        header, at = varint(at, end)
        if at == 0 or header <= 0 or header > _MOST_RUN:
            return False
        if header & 1:
            packed, count = (header >> 1) * bits, min(8 * (header >> 1), n_values - n)
            needed = (count * bits + 7) >> 3  # writers may leave out the end of the last group
            if needed > end - at:
                return False
            if not _look_up_packed(at, end, bits, count, dictionary, n_entries, width, out + n * width):
                return False
            at += min(packed, end - at)
        else:
            count, n_bytes = min(header >> 1, n_values - n), (bits + 7) >> 3
            if n_bytes > end - at:
                return False
            index: Any = 0
            for k in range(n_bytes):
                index |= np.int64(uint8_at(at + k, 0)) << (8 * k)
            at += n_bytes
            if index >= n_entries:
                return False
            for i in range(count):
                _look_up(dictionary, index, width, out + (n + i) * width)
        n += count
    return True
