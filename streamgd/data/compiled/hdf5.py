"""Compiled decoding of HDF5 chunks: checksums, LZF, calls of ISA-L, and the bytes of a chunk put in rows.

Everything here works on plain bytes; who calls takes HDF5's file format apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled
from streamgd.data.compiled.memory import (
    copy_bytes,
    put_uint8,
    put_uint16,
    put_uint32,
    put_uint64,
    uint32_at,
    uint64_at,
)

Bytes = NDArray[np.uint8]

#: Bytes of rows that are put together before they are dealt out: they stay in the first cache.
_TILE_BYTES = 16384
#: Checksums are reduced after so many words, long before their sums would leave 64 bits.
_FLETCHER_WORDS = 4096
#: Bytes that Adler's sums take at once, and how often before 16 bits could overflow: 255 * 22 * 23 / 2 is below 65536.
_ADLER_BYTES, _ADLER_TIMES, _ADLER_BASE = 64, 22, 65521
#: Bytes into ISA-L's `struct inflate_state`, as igzip_lib.h has it for 64 bits, where what is needed of it lies.
_NEXT_OUT, _AVAIL_OUT, _TOTAL_OUT, _NEXT_IN, _AVAIL_IN = 0, 8, 12, 16, 32

# A chunk to rows --------------------------------------------------------------------------------------------------


@compiled
def _join(chunk: Bytes, n_items: int, item_bytes: int, first: int, count: int, target: int) -> None:
    """Join the bytes of some items of a shuffled chunk, and write the items one after the other.

    Slices of the same length, and sums of at most 32 bits, are what the compiler makes vector instructions of.
    """
    if item_bytes == 4:
        b0, b1 = chunk[first:][:count], chunk[n_items + first :][:count]
        b2, b3 = chunk[2 * n_items + first :][:count], chunk[3 * n_items + first :][:count]
        for i in range(count):
            put_uint32(target, i, _join_four(b0[i], b1[i], b2[i], b3[i]))
    elif item_bytes == 8:
        b0, b1 = chunk[first:][:count], chunk[n_items + first :][:count]
        b2, b3 = chunk[2 * n_items + first :][:count], chunk[3 * n_items + first :][:count]
        b4, b5 = chunk[4 * n_items + first :][:count], chunk[5 * n_items + first :][:count]
        b6, b7 = chunk[6 * n_items + first :][:count], chunk[7 * n_items + first :][:count]
        for i in range(count):
            low, high = _join_four(b0[i], b1[i], b2[i], b3[i]), _join_four(b4[i], b5[i], b6[i], b7[i])
            put_uint64(target, i, np.uint64(low) | np.uint64(high) << np.uint64(32))
    elif item_bytes == 2:
        b0, b1 = chunk[first:][:count], chunk[n_items + first :][:count]
        for i in range(count):
            put_uint16(target, i, np.uint16(np.uint32(b0[i]) | np.uint32(b1[i]) << np.uint32(8)))
    else:
        for k in range(item_bytes):
            one = chunk[k * n_items + first :][:count]
            for i in range(count):
                put_uint8(target, i * item_bytes + k, one[i])


@compiled
def _join_four(b0: np.uint8, b1: np.uint8, b2: np.uint8, b3: np.uint8) -> np.uint32:
    low = np.uint32(b0) | np.uint32(b1) << np.uint32(8)
    return low | (np.uint32(b2) | np.uint32(b3) << np.uint32(8)) << np.uint32(16)


@compiled
def _deal(source: int, n_rows: int, source_step: int, n_bytes: int, target: int, target_step: int) -> None:
    """Copy the first bytes of each row; rows of few bytes without a call for each."""
    if n_bytes == 4:
        for i in range(n_rows):
            put_uint32(target + i * target_step, 0, uint32_at(source + i * source_step, 0))
    elif n_bytes == 8:
        for i in range(n_rows):
            put_uint64(target + i * target_step, 0, uint64_at(source + i * source_step, 0))
    elif n_bytes == 16:
        for i in range(n_rows):
            put_uint64(target + i * target_step, 0, uint64_at(source + i * source_step, 0))
            put_uint64(target + i * target_step, 1, uint64_at(source + i * source_step, 1))
    else:
        for i in range(n_rows):
            copy_bytes(target + i * target_step, source + i * source_step, n_bytes)


@compiled
def put_rows(
    chunk: Bytes,
    shuffled: bool,
    item_bytes: int,
    width: int,
    first: int,
    n_rows: int,
    n_columns: int,
    target: int,
    step: int,
) -> None:
    """Put some rows of a chunk where they belong among whole rows.

    Parameters
    ----------
    chunk : ndarray of uint8
        The chunk, decompressed.
    shuffled : bool
        Whether it holds the first bytes of all items, then the second ones, and so on.
    item_bytes, width : int
        Bytes of a value; values in a row of the chunk.
    first, n_rows : int
        Which rows of the chunk.
    n_columns : int
        How many values of each row; the last chunk of a row may be wider than what is left of the row.
    target, step : int
        Address of the first value, and bytes from one row to the next.
    """
    n_items = len(chunk) // item_bytes
    row_bytes, wanted = width * item_bytes, n_columns * item_bytes
    if not shuffled:
        source = chunk.ctypes.data + first * row_bytes
        if wanted == row_bytes == step:
            copy_bytes(target, source, n_rows * row_bytes)
        else:
            _deal(source, n_rows, row_bytes, wanted, target, step)
    elif wanted == row_bytes == step:
        _join(chunk, n_items, item_bytes, first * width, n_rows * width, target)
    else:
        tile_rows = max(1, _TILE_BYTES // row_bytes)
        tile = np.empty(tile_rows * row_bytes, np.uint8)
        address = tile.ctypes.data
        for i in range(0, n_rows, tile_rows):
            n = min(tile_rows, n_rows - i)
            _join(chunk, n_items, item_bytes, (first + i) * width, n * width, address)
            _deal(address, n, row_bytes, wanted, target + i * step, step)


# Filters ----------------------------------------------------------------------------------------------------------


@compiled
def fletcher32(data: Bytes) -> int:
    """Compute Fletcher's checksum as HDF5 does: over 16-bit words, high byte first, each sum from 1 to 65535.

    References
    ----------
    J. G. Fletcher, "An arithmetic checksum for serial transmissions", IEEE Transactions on Communications 30 (1982).
    """
    n_words = len(data) // 2
    low = high = np.uint64(0)
    for at in range(0, n_words, _FLETCHER_WORDS):
        n = min(_FLETCHER_WORDS, n_words - at)
        words = data[2 * at : 2 * (at + n)]
        # The sum of the words, and the sum of the sums up to each word, in a form that any order of adding gives.
        plain = rising = np.uint64(0)
        for i in range(n):
            word = np.uint64(words[2 * i]) << np.uint64(8) | np.uint64(words[2 * i + 1])
            plain += word
            rising += word * np.uint64(n - i)
        high = _fold(high + np.uint64(n) * low + rising)
        low = _fold(low + plain)
    if len(data) % 2:
        low = _fold(low + (np.uint64(data[-1]) << np.uint64(8)))
        high = _fold(high + low)
    return int(high << np.uint64(16) | low)


@compiled
def _fold(value: np.uint64) -> np.uint64:
    """Reduce modulo 65535; only zero stays zero, as other multiples become 65535."""
    while value > np.uint64(0xFFFF):
        value = (value & np.uint64(0xFFFF)) + (value >> np.uint64(16))
    return value


@intrinsic
def _adler_sums(_context: Any, _address: Any, _n_times: Any) -> Any:
    """Sum up bytes, 64 at a time; return their sum, and the sum of the sums up to each of them.

    Spelt as vectors of 16 bits: ISA-L's own takes four times as long, and LLVM multiplies where it is left the choice.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, n_times = arguments
        integer, n = ir.IntType(64), _ADLER_BYTES
        narrow, sums = (ir.VectorType(ir.IntType(bits), n) for bits in (8, 16))
        wide = ir.VectorType(ir.IntType(32), n)
        zero = ir.Constant(sums, [0] * n)
        plain, rising = cgutils.alloca_once_value(builder, zero), cgutils.alloca_once_value(builder, zero)
        builder.store(zero, plain)
        builder.store(zero, rising)
        with cgutils.for_range(builder, n_times, intp=integer) as loop:
            at = builder.add(address, builder.mul(loop.index, ir.Constant(integer, n)))
            values = builder.load(builder.inttoptr(at, narrow.as_pointer()), align=1)
            before = builder.load(plain)
            builder.store(builder.add(builder.load(rising), before), rising)
            builder.store(builder.add(before, builder.zext(values, sums)), plain)
        kind = ir.FunctionType(ir.IntType(32), [wide])
        add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{n}i32")
        plain, rising = (builder.zext(builder.load(each), wide) for each in (plain, rising))
        # What comes in a vector counts once for every byte from it to the end of the vector.
        weights = ir.Constant(wide, list(range(n, 0, -1)))
        within = builder.call(add, [builder.mul(plain, weights)])
        across = builder.mul(builder.call(add, [rising]), ir.Constant(ir.IntType(32), n))
        total = builder.zext(builder.call(add, [plain]), integer)
        return context.make_tuple(
            builder, signature.return_type, [total, builder.zext(builder.add(within, across), integer)]
        )

    return types.UniTuple(types.uint64, 2)(types.int64, types.int64), generate


@compiled
def adler32(data: Bytes) -> int:
    """Compute the checksum at the end of zlib's format (RFC 1950)."""
    base, n_bytes, address = np.uint64(_ADLER_BASE), len(data), data.ctypes.data
    low, high = np.uint64(1), np.uint64(0)
    at = 0
    while n_bytes - at >= _ADLER_BYTES:
        n_times = min(_ADLER_TIMES, (n_bytes - at) // _ADLER_BYTES)
        n = n_times * _ADLER_BYTES
        plain, rising = _adler_sums(address + at, n_times)  # type: ignore[var-annotated]
        high = (high + np.uint64(n) * low + rising) % base
        low = (low + plain) % base
        at += n
    for i in range(at, n_bytes):
        low += np.uint64(data[i])
        high += low
    return int(high % base << np.uint64(16) | low % base)


@intrinsic
def _call(_context: Any, _function: Any, _argument: Any) -> Any:
    """Call a C function of one pointer that returns an int."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])

    return types.int32(types.int64, types.int64), generate


@compiled
def inflate(begin: int, run: int, state: int, data: Bytes, out: Bytes) -> int:
    """Decompress zlib's format to memory that is there already, and return the number of bytes, or -1 if it cannot be.

    Parameters
    ----------
    begin, run : int
        Addresses of ISA-L's `isal_inflate_init` and `isal_inflate_stateless`.
    state : int
        Address of memory for its `struct inflate_state`.
    data, out : ndarray of uint8
        What is compressed, and where it goes: at least as many bytes as it becomes.
    """
    n = len(data)
    if n < 6 or data[0] & 15 != 8 or (int(data[0]) << 8 | int(data[1])) % 31 != 0 or data[1] & 32 != 0:
        return -1
    _call(begin, state)
    put_uint64(state + _NEXT_OUT, 0, np.uint64(out.ctypes.data))
    put_uint32(state + _AVAIL_OUT, 0, np.uint32(len(out)))
    put_uint64(state + _NEXT_IN, 0, np.uint64(data.ctypes.data + 2))
    put_uint32(state + _AVAIL_IN, 0, np.uint32(n - 2))
    if _call(run, state) != 0:
        return -1
    done, left = int(uint32_at(state + _TOTAL_OUT, 0)), int(uint32_at(state + _AVAIL_IN, 0))
    if done > len(out) or left < 4 or left > n - 2:
        return -1
    stored = np.uint32(0)
    for i in range(n - left, n - left + 4):
        stored = stored << np.uint32(8) | np.uint32(data[i])
    return done if adler32(out[:done]) == int(stored) else -1


@compiled
def expand_lzf(data: Bytes, out: Bytes) -> int:
    """Decompress LZF (M. Lehmann's LibLZF format), and return the number of bytes, or -1 if it cannot be.

    A byte below 32 announces as many bytes and one more as they are; any other holds length and distance of bytes that
    came before, which may overlap with those they become.
    """
    source, target = data.ctypes.data, out.ctypes.data
    at, done, n, room = 0, 0, len(data), len(out)
    while at < n:
        control = int(data[at])
        at += 1
        if control < 32:
            length = control + 1
            if at + length > n or done + length > room:
                return -1
            if at + 32 <= n and done + 32 <= room:  # more than needed: a length that is known is copied at once
                copy_bytes(target + done, source + at, 32)
            else:
                for i in range(length):
                    out[done + i] = data[at + i]
            at += length
        else:
            length = control >> 5
            if length == 7 and at < n:
                length += int(data[at])
                at += 1
            if at >= n:
                return -1
            distance = ((control & 31) << 8) + int(data[at]) + 1
            at += 1
            length += 2
            if distance > done or done + length > room:
                return -1
            if distance >= length:
                copy_bytes(target + done, target + done - distance, length)
            else:
                for i in range(done, done + length):
                    out[i] = out[i - distance]
        done += length
    return done
