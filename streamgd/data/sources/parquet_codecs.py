"""All compiled code of Parquet: page headers, snappy, definition levels, and values that a dictionary stands for.

One file, because Numba's cache notices only changes of the file that holds the compiled function. Whoever calls says
what is wrong with a page by leaving it to Arrow; here, it is only noticed.

References
----------
Apache Parquet format, ``parquet.thrift`` (PageHeader and the headers within), "Encodings" (RLE / bit-packing hybrid,
dictionary); Apache Thrift, "Thrift compact protocol encoding"; snappy's ``format_description.txt``.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

#: Members of a column's row in the table of `next_pages`. First what is known of the column: where its next page begins
#: in the file, where its chunk ends, bytes of a value, its highest definition level, how it is compressed, bytes to
#: read at once, values to pass over; and what no page can exceed: bytes when decompressed, and values still to come.
AT, END, WIDTH, MAX_LEVEL, CODEC, GUESS, SKIPPED, MOST_BYTES, MOST_VALUES = range(9)
#: Then memory for its page's values and for its dictionary: addresses and bytes; and how many entries there are.
MEMORY, ROOM, DICTIONARY, DICTIONARY_ROOM, N_ENTRIES = range(9, 14)
#: Then what the header of its page says,
STORED, DECODED, KIND, N_VALUES, ENCODING, N_NULLS, LEVELS, COMPRESSED, CRC, HAS_CRC = range(14, 24)
LEVEL_ENCODING, N_ROWS, REPETITIONS = range(24, 27)
#: where the page begins in the scratch memory, where its next value lies decoded, and how many of its values are left.
BEGIN, ADDRESS, LEFT = range(27, 30)
N_MEMBERS = 30
#: How a chunk is compressed: not at all, by snappy, or by something that is not known here.
UNCOMPRESSED, SNAPPY, OTHER_CODEC = range(3)
#: Kinds of pages.
DATA_PAGE, INDEX_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = range(4)
#: Encodings of values that are known here.
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8
_RLE = 3
#: How `next_pages` ended: all columns have values; more memory is needed (scratch, for values, for a dictionary); a
#: page was read that somebody else has to decompress or check; or the file cannot be read, or makes no sense.
DONE, NEEDS_SCRATCH, NEEDS_ROOM, NEEDS_DICTIONARY, FOREIGN, SENSELESS, _PASSED = range(7)
_MOST_DEPTH = 8
_FIRST_HEADER_BYTES = 512
#: No run of a page is longer, in values: their number is a 32-bit one.
_MOST_RUN = 1 << 32

_pread: Any = types.ExternalFunction("pread", types.intp(types.intc, types.intp, types.uintp, types.int64))


def _compiled(function: Any) -> Any:
    """Compile without the interpreter lock, and keep the machine code on disk."""
    return numba.njit(nogil=True, cache=True)(function)


def _reader_of(kind: Any) -> Any:
    """Make a function of an address that reads one number from memory, aligned or not."""

    @intrinsic
    def read(_context: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], context.get_data_type(kind).as_pointer())
            return builder.load(pointer, align=1)

        return kind(types.int64), generate

    return read


def _writer_of(kind: Any) -> Any:
    """Make a function of (address, number) that writes the number."""

    @intrinsic
    def write(_context: Any, _address: Any, _value: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], context.get_data_type(kind).as_pointer())
            builder.store(arguments[1], pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, kind), generate

    return write


_byte_at, _word_at, _half_at = _reader_of(types.uint8), _reader_of(types.uint64), _reader_of(types.uint32)
_put_word, _put_half, _put_byte = _writer_of(types.uint64), _writer_of(types.uint32), _writer_of(types.uint8)


@_compiled
def _address(array: NDArray[Any]) -> Any:
    """Return where an array lies, as a number that others can be added to; NumPy's own would make floats of them."""
    return np.int64(array.ctypes.data)


@_compiled
def _varint(at: int, end: int) -> Any:
    """Read a number of any length; return it and where it ends, 0 if it does not end in time."""
    found, shift = np.uint64(0), np.uint64(0)
    while at < end and shift < np.uint64(64):
        byte = np.uint64(_byte_at(at))
        at += 1
        found |= (byte & np.uint64(0x7F)) << shift
        if byte < np.uint64(0x80):
            return np.int64(found), at
        shift += np.uint64(7)
    return 0, 0


@_compiled
def _whole(value: int) -> Any:
    """Undo the zigzag of a number."""
    return np.int64(np.uint64(value) >> np.uint64(1)) ^ -(value & 1)


@_compiled
def _keep(page: NDArray[np.int64], where: int, field: int, value: int) -> None:
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


@_compiled
def read_header(at: int, end: int, page: NDArray[np.int64]) -> int:
    """Read a page's header from memory; return its bytes, 0 if it goes on after `end`, -1 if it makes no sense."""
    begin, depth = at, 0
    where, numbers = np.zeros(_MOST_DEPTH, np.int64), np.zeros(_MOST_DEPTH, np.int64)
    page[KIND], page[DECODED], page[STORED], page[N_VALUES], page[ENCODING] = -1, -1, -1, -1, -1
    page[N_NULLS], page[LEVELS], page[COMPRESSED], page[HAS_CRC] = -1, 0, 1, 0
    page[LEVEL_ENCODING], page[N_ROWS], page[REPETITIONS] = -1, -1, 0
    while at < end:
        byte = np.int64(_byte_at(at))
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
            value, at = _varint(at, end)
            if at == 0:
                return 0
            numbers[depth] = _whole(value)
        field = numbers[depth]
        if kind == 1 or kind == 2:  # a boolean, whose value is its type
            _keep(page, where[depth], field, np.int64(kind == 1))
        elif kind == 3:
            at += 1
        elif kind == 4 or kind == 5 or kind == 6:
            value, at = _varint(at, end)
            if at == 0:
                return 0
            _keep(page, where[depth], field, _whole(value))
        elif kind == 7:
            at += 8
        elif kind == 8:
            value, at = _varint(at, end)
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


@_compiled
def _read(fd: int, target: int, n_bytes: int, offset: int) -> bool:
    """Read so many bytes of a file to an address."""
    done = 0
    while done < n_bytes:
        got = _pread(np.int32(fd), target + done, np.uint64(n_bytes - done), offset + done)
        if got <= 0:
            return False
        done += got
    return True


@intrinsic
def _copy_bytes(_context: Any, _target: Any, _source: Any, _n_bytes: Any) -> Any:
    """Copy memory from address to address."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        target, source, n_bytes = arguments
        pointer = cgutils.voidptr_t
        cgutils.raw_memcpy(builder, builder.inttoptr(target, pointer), builder.inttoptr(source, pointer), n_bytes, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@_compiled
def expand_snappy(at: Any, end: int, target: int, n_bytes: int) -> bool:
    """Decompress snappy's raw format to exactly `n_bytes` at an address; False if it cannot be.

    Two bits of each tag tell bytes that follow as they are from copies of bytes that came before, which may overlap
    with those they become.
    """
    size, at = _varint(at, end)
    if at == 0 or size != n_bytes:
        return False
    out: Any = target
    limit = target + n_bytes
    while at < end:
        tag: Any = np.int64(_byte_at(at))
        at += 1
        if tag & 3 == 0:
            length = tag >> 2
            if length >= 60:
                n = length - 59
                if n > end - at:
                    return False
                length = tag & 0
                for k in range(n):
                    length |= np.int64(_byte_at(at + k)) << (8 * k)
                at += n
            length += 1
            if length > end - at or length > limit - out:
                return False
            if length <= 16 and end - at >= 16 and limit - out >= 16:  # more than needed: a known length is fast
                _put_word(out, _word_at(at))
                _put_word(out + 8, _word_at(at + 8))
            else:
                _copy_bytes(out, at, length)
            at += length
            out += length
            continue
        n = 1 if tag & 3 == 1 else 2 if tag & 3 == 2 else 4
        if n > end - at:
            return False
        distance = np.int64(0)
        for k in range(n):
            distance |= np.int64(_byte_at(at + k)) << (8 * k)
        at += n
        length = (tag >> 2) + 1
        if n == 1:
            length, distance = 4 + (tag >> 2 & 7), distance | (tag >> 5) << 8
        if distance == 0 or distance > out - target or length > limit - out:
            return False
        if distance >= 8 and limit - out >= length + 8:
            for k in range(0, length, 8):
                _put_word(out + k, _word_at(out + k - distance))
        else:
            for k in range(length):
                _put_byte(out + k, _byte_at(out + k - distance))
        out += length
    return bool(out == limit)


@_compiled
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
            if status == _PASSED:
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


@_compiled
def _read_page(fd: int, page: NDArray[np.int64], scratch: NDArray[np.uint8]) -> Any:
    """Read a page to the scratch memory, unless all of it is to be passed over."""
    base = _address(scratch)
    while True:
        left = page[END] - page[AT]
        ahead = min(max(page[GUESS], _FIRST_HEADER_BYTES), left)
        if ahead <= 0:
            return SENSELESS, 0
        if ahead > len(scratch):
            return NEEDS_SCRATCH, ahead
        if not _read(fd, base, ahead, page[AT]):
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
        return _PASSED, 0
    page[GUESS] = total + 64
    if total > ahead:
        if total > len(scratch):
            return NEEDS_SCRATCH, total
        if not _read(fd, base + ahead, total - ahead, page[AT] + ahead):
            return SENSELESS, 0
    page[BEGIN] = header
    return DONE, 0


@_compiled
def _decode(page: NDArray[np.int64], scratch: NDArray[np.uint8]) -> Any:
    """Decompress a page that lies in the scratch memory, and find or look up its values."""
    stored = _address(scratch) + page[BEGIN]
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
        _copy_bytes(target, stored + levels, decoded)
    elif not expand_snappy(stored + levels, end, target, decoded):
        return SENSELESS, 0
    return take_values(page, stored, target, decoded)


@_compiled
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


@_compiled
def _all_defined(at: int, end: int, n_values: int) -> bool:
    """Tell whether definition levels of one bit are 1 throughout."""
    n = 0
    while n < n_values:
        header, at = _varint(at, end)
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
                if _byte_at(at + i) & mask != mask:
                    return False
                n += 8
            at += n_bytes
        else:
            if at >= end or _byte_at(at) != 1:
                return False
            n += header >> 1
            at += 1
    return True


@_compiled
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
    if page[DECODED] < 4 or page[LEVEL_ENCODING] != _RLE:
        return -1
    n_bytes: Any = np.int64(_half_at(decoded))
    if 4 + n_bytes > page[DECODED] or not _all_defined(decoded + 4, decoded + 4 + n_bytes, page[N_VALUES]):
        return -1
    return 4 + n_bytes


@_compiled
def _index(at: int, end: int, bit: int, mask: Any) -> Any:
    """Read a bit-packed number that ends less than eight bytes before the memory does."""
    byte, word = at + (bit >> 3), np.uint64(0)
    for k in range(min(end - byte, 8)):
        word |= np.uint64(_byte_at(byte + k)) << np.uint64(8 * k)
    return (word >> np.uint64(bit & 7)) & mask


@_compiled
def _look_up_packed(
    at: int, end: int, bits: int, count: int, dictionary: int, n_entries: int, width: int, out: int
) -> bool:
    """Write the values that bit-packed indices stand for; False if there is none for one of them."""
    mask, entries, bit = np.uint64((1 << bits) - 1), np.uint64(n_entries), 0
    n_whole = min(count, max(0, ((end - at - 8) * 8) // bits)) if bits else 0  # where eight bytes can be read
    if width == 4:
        for i in range(n_whole):
            index = (_word_at(at + (bit >> 3)) >> np.uint64(bit & 7)) & mask
            bit += bits
            if index >= entries:
                return False
            _put_half(out + 4 * i, _half_at(dictionary + 4 * np.int64(index)))
    else:
        for i in range(n_whole):
            index = (_word_at(at + (bit >> 3)) >> np.uint64(bit & 7)) & mask
            bit += bits
            if index >= entries:
                return False
            _put_word(out + 8 * i, _word_at(dictionary + 8 * np.int64(index)))
    for i in range(n_whole, count):
        index = _index(at, end, bit, mask)
        bit += bits
        if index >= entries:
            return False
        _look_up(dictionary, np.int64(index), width, out + i * width)
    return True


@_compiled
def _look_up(dictionary: int, index: int, width: int, target: int) -> None:
    """Copy one value of a dictionary."""
    if width == 4:
        _put_half(target, _half_at(dictionary + 4 * index))
    else:
        _put_word(target, _word_at(dictionary + 8 * index))


@_compiled
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
    bits: Any = np.int64(_byte_at(at))
    at += 1
    if bits > 32:
        return False
    n = 0
    while n < n_values:
        header, at = _varint(at, end)
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
                index |= np.int64(_byte_at(at + k)) << (8 * k)
            at += n_bytes
            if index >= n_entries:
                return False
            for i in range(count):
                _look_up(dictionary, index, width, out + (n + i) * width)
        n += count
    return True
