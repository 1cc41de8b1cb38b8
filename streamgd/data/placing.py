"""All compiled code of `streamgd.data`: random places, the order of slices, and rows put where they belong.

One file, because Numba's cache notices only changes of the file that holds the compiled function. Everything runs
without the interpreter lock, so that reader threads work beside whoever consumes. No fast-math: the same values give
the same bits from every source and on every CPU.

Importing this module imports Numba; `streamgd.data.plan` does so only when a plan is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

_F = TypeVar("_F", bound=Callable[..., Any])

# Rows and columns that are put together at once: 32 kB at most.
_TILE_ROWS, _TILE_COLUMNS = 256, 32
#: Rows that are scaled and placed at once, eight columns after the other: they should stay in the first cache.
_SCALED_ROWS = 32
#: Rows that are turned into columns at once, as float64.
_SHORT_TILE_ROWS = 64

#: Codes of the dtypes that features can be stored as, and the bytes of each; booleans are read as bytes.
DTYPE_CODES: dict[str, int] = {
    "float32": 0,
    "float64": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "uint8": 6,
    "uint16": 7,
    "uint32": 8,
    "uint64": 9,
    "bool": 6,
}

_SIZES = (4, 8, 1, 2, 4, 8, 1, 2, 4, 8)

#: So many rows ahead of being written, so many bytes of a place are fetched; the processor foresees the rest.
_AHEAD, _AHEAD_BYTES = 8, 256

#: Permutations of fewer rows take two steps from each raw number.
_PAIRED_ROWS = 1 << 20

_BLOCK_SHIFT = np.uint64(40)  # a row's identity is block << 40 | row: 16 million blocks of 10**12 rows


def _compiled(function: _F) -> _F:
    """Compile without the interpreter lock, and keep the machine code on disk."""
    return cast(_F, numba.njit(nogil=True, cache=True)(function))


def _reader_of(kind: Any) -> Any:
    """Make a function of (address, index) that reads one value from memory."""

    @intrinsic
    def read(_context: Any, _address: Any, _index: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], context.get_data_type(kind).as_pointer())
            return builder.load(builder.gep(pointer, [arguments[1]]))

        return kind(types.int64, types.int64), generate

    return read


#: The operating system's own; found by name when compiled code is loaded, so that it can be kept on disk.
_pread: Any = types.ExternalFunction("pread", types.intp(types.intc, types.intp, types.uintp, types.int64))

_float32_at, _float64_at = _reader_of(types.float32), _reader_of(types.float64)
_int8_at, _int16_at = _reader_of(types.int8), _reader_of(types.int16)
_int32_at, _int64_at = _reader_of(types.int32), _reader_of(types.int64)
_uint8_at, _uint16_at = _reader_of(types.uint8), _reader_of(types.uint16)
_uint32_at, _uint64_at = _reader_of(types.uint32), _reader_of(types.uint64)


@intrinsic
def _copy_bytes(_context: Any, _target: Any, _source: Any, _n_bytes: Any) -> Any:
    """Copy memory from address to address."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        target, source, n_bytes = arguments
        to_pointer = cgutils.voidptr_t
        cgutils.raw_memcpy(
            builder, builder.inttoptr(target, to_pointer), builder.inttoptr(source, to_pointer), n_bytes, 1
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


class _Scaler:
    """Writes instructions that turn eight values at a time into ``(float64(x) - shift) * factor``, rounded once.

    What is left of a finite number minus itself is 0, and nothing else; `odd` gathers what is left of all.
    """

    def __init__(self, context: Any, builder: Any, stored: Any, out: Any) -> None:
        self.builder = builder
        self.stored, self.written = context.get_data_type(stored), context.get_data_type(out)
        bits = ir.VectorType(ir.IntType(out.bitwidth), 8)
        self._none = ir.Constant(bits, [0] * 8)
        self._odd = cgutils.alloca_once_value(builder, self._none)

    def numbers(self, address: Any, element: Any, align: int | None = None) -> Any:
        """Load eight adjacent numbers, wherever they begin."""
        pointer = self.builder.inttoptr(address, ir.VectorType(element, 8).as_pointer())
        return self.builder.load(pointer, align=align or (4 if element == ir.FloatType() else 8))

    def number(self, base: Any, element: Any, index: Any) -> Any:
        """Load one number of an array."""
        return self.builder.load(self.builder.gep(self.builder.inttoptr(base, element.as_pointer()), [index]))

    def scaled(self, x: Any, shift: Any, factor: Any) -> Any:
        """Return eight scaled values."""
        builder, wide = self.builder, ir.VectorType(ir.DoubleType(), 8)
        x = builder.fmul(builder.fsub(x if x.type == wide else builder.fpext(x, wide), shift), factor)
        if self.written != ir.DoubleType():
            x = builder.fptrunc(x, ir.VectorType(self.written, 8))
        left = builder.bitcast(builder.fsub(x, x), self._none.type)
        builder.store(builder.or_(builder.load(self._odd), left), self._odd)
        return x

    def store(self, x: Any, address: Any) -> None:
        """Write eight numbers."""
        size = 4 if self.written == ir.FloatType() else 8
        self.builder.store(x, self.builder.inttoptr(address, x.type.as_pointer()), align=size)

    @property
    def odd(self) -> Any:
        """0 if everything was finite."""
        found = self.builder.icmp_signed("!=", self.builder.load(self._odd), self._none)
        return self.builder.zext(self.builder.bitcast(found, ir.IntType(8)), ir.IntType(64))


def _row_scaler_of(stored: Any) -> Any:
    """Make a function that scales eight adjacent columns of rows, and writes them at the rows' places.

    It takes (array of the dtype to write, address of the first value, bytes from row to row, address of the places as
    int32, rows, addresses of the eight shifts and factors, where place 0 is, bytes from place to place), and returns 0
    if all that it wrote is finite. Spelt as vectors, eight columns at a time, so that shifts and factors stay in
    registers: LLVM left the loop over the values of a row at a quarter of the speed.
    """

    @intrinsic
    def scale(
        _context: Any,
        _out: Any,
        _source: Any,
        _source_step: Any,
        _places: Any,
        _n_rows: Any,
        _shift: Any,
        _factor: Any,
        _target: Any,
        _target_step: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, source_step, places, n_rows, shift, factor, target, target_step = arguments[1:]
            scaler = _Scaler(context, builder, stored, signature.args[0].dtype)
            shifts, factors = (scaler.numbers(address, ir.DoubleType()) for address in (shift, factor))
            with cgutils.for_range(builder, n_rows) as loop:
                x = scaler.numbers(builder.add(source, builder.mul(loop.index, source_step)), scaler.stored)
                place = builder.sext(scaler.number(places, ir.IntType(32), loop.index), ir.IntType(64))
                x = scaler.scaled(x, shifts, factors)
                scaler.store(x, builder.add(target, builder.mul(place, target_step)))
            return scaler.odd

        return types.int64(_out, *(types.int64,) * 8), generate

    return scale


def _column_scaler_of(stored: Any) -> Any:
    """Make a function that scales eight columns, and writes them as parts of rows.

    It takes (array of the dtype to write, address of the columns' addresses, bytes into each column, rows, a multiple
    of eight, addresses of the shifts and factors, address of the rows' addresses, bytes into each row), and returns 0
    if all that it wrote is finite. Squares of eight by eight values are turned in registers: turning them in memory
    took most of the time of placing them.
    """

    @intrinsic
    def scale(
        _context: Any,
        _out: Any,
        _columns: Any,
        _at: Any,
        _n_rows: Any,
        _shift: Any,
        _factor: Any,
        _rows: Any,
        _left: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            columns, at, n_rows, shift, factor, rows, left = arguments[1:]
            scaler = _Scaler(context, builder, stored, signature.args[0].dtype)
            integer, double, size = ir.IntType(64), ir.DoubleType(), stored.bitwidth // 8
            masks = [
                ir.Constant(ir.VectorType(ir.IntType(32), 8), half)
                for half in ([0, 8, 1, 9, 2, 10, 3, 11], [4, 12, 5, 13, 6, 14, 7, 15], [0] * 8)
            ]

            def constant(k: int) -> Any:
                return ir.Constant(integer, k)

            def eight_times(value: Any) -> Any:
                nothing = ir.Constant(ir.VectorType(double, 8), ir.Undefined)
                one = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
                return builder.shuffle_vector(one, nothing, masks[2])

            begins = [builder.add(scaler.number(columns, integer, constant(k)), at) for k in range(8)]
            shifts = [eight_times(scaler.number(shift, double, constant(k))) for k in range(8)]
            factors = [eight_times(scaler.number(factor, double, constant(k))) for k in range(8)]
            with cgutils.for_range_slice(builder, constant(0), n_rows, constant(8), integer) as (first, _):
                offset = builder.mul(first, constant(size))
                vectors = [
                    scaler.scaled(scaler.numbers(builder.add(begins[k], offset), scaler.stored), shifts[k], factors[k])
                    for k in range(8)
                ]
                for _stage in range(3):  # each pairs the values of vectors four apart; after three, all are in place
                    vectors = [
                        builder.shuffle_vector(vectors[i], vectors[i + 4], mask) for i in range(4) for mask in masks[:2]
                    ]
                for k, x in enumerate(vectors):
                    row = scaler.number(rows, integer, builder.add(first, constant(k)))
                    scaler.store(x, builder.add(row, left))
            return scaler.odd

        return types.int64(_out, *(types.int64,) * 7), generate

    return scale


_scale_float32_rows, _scale_float64_rows = _row_scaler_of(types.float32), _row_scaler_of(types.float64)
_scale_float32_columns, _scale_float64_columns = _column_scaler_of(types.float32), _column_scaler_of(types.float64)


@intrinsic
def _multiply_high(_context: Any, _a: Any, _b: Any) -> Any:
    """Return the upper 64 bits of a product of two 64-bit numbers."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(arguments[0], wide), builder.zext(arguments[1], wide))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


# Random order -----------------------------------------------------------------------------------------------------


@_compiled
def _address(array: NDArray[Any]) -> Any:
    """Return where an array lies, as a number that others can be added to; NumPy's own would make floats of them."""
    return np.int64(array.ctypes.data)


@_compiled
def _philox(counter: np.uint64, key_0: np.uint64, key_1: np.uint64) -> tuple[np.uint64, ...]:
    """Return four raw numbers: those that `numpy.random.Philox` with this key gives at this counter."""
    c0, c1, c2, c3 = counter, np.uint64(0), np.uint64(0), np.uint64(0)
    for _ in range(10):
        high_0: Any = _multiply_high(np.uint64(0xD2E7470EE14C6C93), c0)
        high_1: Any = _multiply_high(np.uint64(0xCA5A826395121157), c2)
        low_0 = np.uint64(0xD2E7470EE14C6C93) * c0
        low_1 = np.uint64(0xCA5A826395121157) * c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0 += np.uint64(0x9E3779B97F4A7C15)
        key_1 += np.uint64(0xBB67AE8584CAA73B)
    return c0, c1, c2, c3


@_compiled
def raw_numbers(key: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
    """Write the raw numbers of `numpy.random.Philox` with a key: what `permute` consumes, for the test of it."""
    for i in range(0, len(out), 4):
        four = _philox(np.uint64(i // 4 + 1), key[0], key[1])
        for k in range(min(4, len(out) - i)):
            out[i + k] = four[k]


@_compiled
def permute(key: NDArray[np.uint64], out: NDArray[np.int32]) -> None:
    """Write a random permutation of ``0 … len(out) - 1``.

    Fisher and Yates' shuffle, from the end. A bound is taken from 64 raw bits by the upper half of a product; the lower
    half is random still, and gives the next bound where there are few enough rows [1]_. The bias is at most
    ``len(out) ** 2 / 2**64`` up to `_PAIRED_ROWS`, and ``len(out) / 2**64`` above, which no run can notice, and as many
    raw numbers are taken whatever comes.

    References
    ----------
    .. [1] Brackett-Rozinsky & Lemire, "Batched Ranged Random Integer Generation", 2024.
    """
    for i in range(len(out)):
        out[i] = i
    i = len(out) - 1
    counter = np.uint64(0)
    while i > 0:
        counter += np.uint64(1)
        for raw in _philox(counter, key[0], key[1]):
            if i > 0:
                j = np.int64(_multiply_high(raw, np.uint64(i + 1)))
                out[i], out[j] = out[j], out[i]
                i -= 1
            if 0 < i < _PAIRED_ROWS:
                rest = raw * np.uint64(i + 2)
                j = np.int64(_multiply_high(rest, np.uint64(i + 1)))
                out[i], out[j] = out[j], out[i]
                i -= 1


@_compiled
def draw_places(key: NDArray[np.uint64], out: NDArray[np.int32]) -> None:
    """Write the places of a window's rows: a random permutation, or without a key their own order."""
    if len(key):
        permute(key, out)
    else:
        for i in range(len(out)):
            out[i] = i


@_compiled
def identity(block: np.uint64, row: np.uint64) -> np.uint64:
    """Hash a row's identity; sums of these tell whether an epoch saw each row exactly once (Steele's splitmix64)."""
    z = ((block << _BLOCK_SHIFT) | row) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_compiled
def sum_identities(blocks: NDArray[np.int64], block_rows: NDArray[np.int64]) -> np.uint64:
    """Sum the hashed identities of every row of some blocks, modulo 2**64."""
    total = np.uint64(0)
    for b in range(len(blocks)):
        block = np.uint64(blocks[b])
        for row in range(block_rows[b]):
            total += identity(block, np.uint64(row))
    return total


# The order of slices ----------------------------------------------------------------------------------------------

#: Where each number lies in the state of a walk through an epoch.
NEXT_BLOCK, TURN, N_LIVE = range(3)


@_compiled
def deal_blocks(order: NDArray[np.int32], block_rows: NDArray[np.int64], n_lanes: int) -> NDArray[np.int32]:
    """Give each block, in order, to the lane with the fewest rows so far, and return the lane of each."""
    rows = np.zeros(n_lanes, np.int64)
    lanes = np.empty(len(order), np.int32)
    for i in range(len(order)):
        lane = 0
        for k in range(1, n_lanes):
            if rows[k] < rows[lane]:
                lane = k
        lanes[i] = lane
        rows[lane] += block_rows[order[i]]
    return lanes


@_compiled
def _step(
    order: NDArray[np.int32],
    block_rows: NDArray[np.int64],
    slots: NDArray[np.int64],
    walk: NDArray[np.int64],
    slice_rows: int,
    room: int,
) -> tuple[int, int, int]:
    """Take the next slice (block, start, rows) if it fits in `room` rows, else return 0 rows."""
    turn = walk[TURN]
    block, start = slots[turn, 0], slots[turn, 1]
    rows = min(slice_rows, block_rows[block] - start)
    if rows > room:
        return 0, 0, 0
    if start + rows < block_rows[block]:
        slots[turn, 1] = start + rows
        walk[TURN] = turn + 1
    elif walk[NEXT_BLOCK] < len(order):
        slots[turn, 0], slots[turn, 1] = order[walk[NEXT_BLOCK]], 0
        walk[NEXT_BLOCK] += 1
        walk[TURN] = turn + 1
    else:
        for k in range(turn, walk[N_LIVE] - 1):
            slots[k, 0], slots[k, 1] = slots[k + 1, 0], slots[k + 1, 1]
        walk[N_LIVE] -= 1
    if walk[TURN] >= walk[N_LIVE]:
        walk[TURN] = 0
    return block, start, rows


@_compiled
def next_slices(
    order: NDArray[np.int32],
    block_rows: NDArray[np.int64],
    slots: NDArray[np.int64],
    walk: NDArray[np.int64],
    slice_rows: int,
    window_rows: int,
    out: NDArray[np.int64],
) -> int:
    """Walk through one window, write as many slices (block, start, rows) as `out` holds, and return their number."""
    n, room = 0, window_rows
    while walk[N_LIVE] > 0:
        block, start, rows = _step(order, block_rows, slots, walk, slice_rows, room)
        if rows == 0:
            break
        if n < len(out):
            out[n, 0], out[n, 1], out[n, 2] = block, start, rows
        n += 1
        room -= rows
    return n


@_compiled
def skip_windows(
    order: NDArray[np.int32],
    block_rows: NDArray[np.int64],
    slots: NDArray[np.int64],
    walk: NDArray[np.int64],
    slice_rows: int,
    window_rows: int,
    most: int,
) -> int:
    """Walk through up to `most` windows (all that are left if negative) and return how many there were."""
    n = 0
    while walk[N_LIVE] > 0 and n != most:
        room = window_rows
        while walk[N_LIVE] > 0:
            rows = _step(order, block_rows, slots, walk, slice_rows, room)[2]
            if rows == 0:
                break
            room -= rows
        n += 1
    return n


# Rows to their places ---------------------------------------------------------------------------------------------


@_compiled
def _load(address: int, code: int, first: int, stride: int, n: int, out: NDArray[np.float64]) -> None:
    """Read `n` values from memory as float64; `first` and `stride` count values, not bytes."""
    if code == 0:
        for i in range(n):
            out[i] = _float32_at(address, first + i * stride)
    elif code == 1:
        for i in range(n):
            out[i] = _float64_at(address, first + i * stride)
    elif code == 2:
        for i in range(n):
            out[i] = _int8_at(address, first + i * stride)
    elif code == 3:
        for i in range(n):
            out[i] = _int16_at(address, first + i * stride)
    elif code == 4:
        for i in range(n):
            out[i] = _int32_at(address, first + i * stride)
    elif code == 5:
        for i in range(n):
            out[i] = _int64_at(address, first + i * stride)
    elif code == 6:
        for i in range(n):
            out[i] = _uint8_at(address, first + i * stride)
    elif code == 7:
        for i in range(n):
            out[i] = _uint16_at(address, first + i * stride)
    elif code == 8:
        for i in range(n):
            out[i] = _uint32_at(address, first + i * stride)
    else:
        for i in range(n):
            out[i] = _uint64_at(address, first + i * stride)


@intrinsic
def _prefetch(_context: Any, _address: Any) -> Any:
    """Ask for the cache line at an address, to be written soon."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        kinds = [ir.IntType(32)] * 3
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [cgutils.voidptr_t], ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, *kinds])
        )
        write, keep, data = (ir.Constant(ir.IntType(32), value) for value in (1, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], cgutils.voidptr_t), write, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@_compiled
def _spread(
    tile: NDArray[Any],
    width: int,
    n_rows: int,
    n_columns: int,
    places: NDArray[np.int32],
    first: int,
    out: NDArray[Any],
    left: int,
) -> None:
    """Copy the rows of a tile to their places, from column `left` on.

    Rows are put together in the tile, which stays in the first cache, and go to memory once and whole: written value
    by value they would miss the cache, or the table of pages, for every column.
    """
    size = out.itemsize
    source = _address(tile)
    target = _address(out) + left * size
    step = out.shape[1] * size
    for i in range(n_rows):
        if i + _AHEAD < n_rows:  # places are random: their lines are fetched while the rows before are written
            ahead = target + np.int64(places[first + i + _AHEAD]) * step
            for line in range(0, min(n_columns * size, _AHEAD_BYTES), 64):
                _prefetch(ahead + line)
        _copy_bytes(target + np.int64(places[first + i]) * step, source + i * width * size, n_columns * size)


@_compiled
def _turn(columns: NDArray[np.float64], n_rows: int, n_columns: int, tile: NDArray[np.float64]) -> None:
    """Turn columns into rows."""
    for i in range(n_rows):
        for k in range(n_columns):
            tile[i, k] = columns[k, i]


@_compiled
def _place_narrow(
    addresses: NDArray[np.int64],
    codes: NDArray[np.int64],
    strides: NDArray[np.int64],
    shift: NDArray[np.float64],
    factor: NDArray[np.float64],
    places: NDArray[np.int32],
    out: NDArray[Any],
) -> bool:
    """Do what `place_columns` does, value by value: for fewer than eight columns."""
    n_columns = len(addresses)
    loaded = np.empty((n_columns, _TILE_ROWS))
    finite = True
    for first in range(0, len(places), _TILE_ROWS):
        n = min(_TILE_ROWS, len(places) - first)
        for j in range(n_columns):
            _load(addresses[j], codes[j], first * strides[j], strides[j], n, loaded[j])
        for i in range(n):
            row = out[places[first + i]]
            for j in range(n_columns):
                value = out.dtype.type((loaded[j, i] - shift[j]) * factor[j])
                row[j] = value
                finite &= value - value == 0
    return finite


@_compiled
def place_columns(
    addresses: NDArray[np.int64],
    codes: NDArray[np.int64],
    strides: NDArray[np.int64],
    shift: NDArray[np.float64],
    factor: NDArray[np.float64],
    places: NDArray[np.int32],
    out: NDArray[Any],
) -> bool:
    """Scale the columns of some rows and write each row at its place; return whether all is finite.

    Parameters
    ----------
    addresses, codes, strides : ndarrays of shape (n_features,), int64
        Where each column's first value lies, its `DTYPE_CODES`, and how many values lie from one row to the next.
    shift, factor : ndarrays of shape (n_features,), float64
        Each value becomes ``(float64(value) - shift) * factor``, rounded to the dtype of `out`.
    places : ndarray of shape (n_rows,), int32
        Row of `out` for each row.
    out : ndarray of shape (capacity, n_features), float32 or float64
        The window.
    """
    n_rows, n_features = len(places), len(addresses)
    if n_features < 8:
        return _place_narrow(addresses, codes, strides, shift, factor, places, out)
    size = out.itemsize
    target, step = _address(out), out.shape[1] * size
    loaded = np.empty((8, _TILE_ROWS), np.float64)
    ours, nowhere = np.empty(8, np.int64), np.empty(n_features, out.dtype)
    rows = np.empty(_TILE_ROWS + 8, np.int64)
    odd = np.int64(0)
    for k in range(8):
        ours[k] = _address(loaded[k])
    for first in range(0, n_rows, _TILE_ROWS):
        n = min(_TILE_ROWS, n_rows - first)
        for i in range(n):
            rows[i] = target + np.int64(places[first + i]) * step
        for i in range(n, n + 7):
            rows[i] = _address(nowhere)  # the last rows are filled up to eight
        for k in range(0, n_features, 8):
            left = min(k, n_features - 8)  # the last eight columns overlap those before
            shifts, factors = _address(shift) + 8 * left, _address(factor) + 8 * left
            code = codes[left]
            direct = code < 2
            for j in range(left, left + 8):
                direct &= codes[j] == code and strides[j] == 1
            whole = n // 8 * 8 if direct else 0  # rows that are read where they lie
            at, row = _address(addresses[left:]), _address(rows)
            if whole and code == 0:
                odd |= _scale_float32_columns(out, at, 4 * first, whole, shifts, factors, row, left * size)
            elif whole:
                odd |= _scale_float64_columns(out, at, 8 * first, whole, shifts, factors, row, left * size)
            if whole == n:
                continue
            for j in range(8):
                column, stride = loaded[j], strides[left + j]
                _load(addresses[left + j], codes[left + j], (first + whole) * stride, stride, n - whole, column)
                for i in range(n - whole, min(n - whole + 7, _TILE_ROWS)):
                    column[i] = column[n - whole - 1]
            rest = (n - whole + 7) // 8 * 8
            odd |= _scale_float64_columns(
                out, _address(ours), 0, rest, shifts, factors, _address(rows[whole:]), left * size
            )
    return bool(odd == 0)


@_compiled
def _add_columns(
    columns: NDArray[np.float64],
    left: int,
    n_columns: int,
    n: int,
    factors: NDArray[np.float64],
    sums: NDArray[np.float64],
) -> bool:
    """Add columns, each times its factors, to sums, one column after the other; return whether all are finite."""
    infinite = np.int32(0)
    for j in range(n_columns):
        column = columns[j]
        for i in range(n):
            infinite |= np.int32(0) if column[i] - column[i] == 0 else np.int32(1)
        for k in range(len(factors)):
            factor, total = factors[k, left + j], sums[k]
            for i in range(n):
                total[i] += column[i] * factor
    return bool(infinite == 0)


@_compiled
def combine_columns(
    addresses: NDArray[np.int64],
    codes: NDArray[np.int64],
    strides: NDArray[np.int64],
    factors: NDArray[np.float64],
    start: NDArray[np.float64],
    out: NDArray[np.float64],
) -> bool:
    """Add up columns as they are stored, each times a factor, in the order of the columns; tell whether all are finite.

    Parameters
    ----------
    addresses, codes, strides : ndarrays of shape (n_columns,), int64
        As for `place_columns`.
    factors : ndarray of shape (n_outputs, n_columns), float64
        What each value is multiplied with, as float64.
    start : ndarray of shape (n_outputs,), float64
        Is added last.
    out : ndarray of shape (n_rows, n_outputs), float64
        The sums.
    """
    n_rows, n_outputs = out.shape
    column = np.empty((1, _TILE_ROWS))
    sums = np.empty((n_outputs, _TILE_ROWS))
    finite = True
    for first in range(0, n_rows, _TILE_ROWS):
        n = min(_TILE_ROWS, n_rows - first)
        sums[:, :n] = 0.0
        for j in range(len(addresses)):
            _load(addresses[j], codes[j], first * strides[j], strides[j], n, column[0])
            finite &= _add_columns(column, j, 1, n, factors, sums)
        for k in range(n_outputs):
            for i in range(n):
                out[first + i, k] = sums[k, i] + start[k]
    return finite


@_compiled
def combine_eights(
    X: NDArray[Any], factors: NDArray[np.float64], start: NDArray[np.float64], out: NDArray[np.float64]
) -> int:
    """Do what `combine_rows` does, faster for few outputs: eight rows side by side, so that no sum waits for itself.

    Parameters
    ----------
    X : ndarray of shape (n_rows, n_features), float32 or float64
        Rows.
    factors, start, out : ndarrays
        As for `combine_columns`.

    Returns
    -------
    int
        Rows that are done: up to seven at the end are not, nor those from the first sum on that is not finite.
    """
    n_outputs, n_features = factors.shape
    whole = len(X) // 8 * 8
    for first in range(0, whole, 8):
        rows = X[first : first + 8]
        for k in range(n_outputs):
            a = b = c = d = e = f = g = h = 0.0
            for j in range(n_features):
                factor = factors[k, j]
                a += rows[0, j] * factor
                b += rows[1, j] * factor
                c += rows[2, j] * factor
                d += rows[3, j] * factor
                e += rows[4, j] * factor
                f += rows[5, j] * factor
                g += rows[6, j] * factor
                h += rows[7, j] * factor
            # A value that is not finite makes its sum so, even times zero.
            if not (a - a == 0 and b - b == 0 and c - c == 0 and d - d == 0):
                return first
            if not (e - e == 0 and f - f == 0 and g - g == 0 and h - h == 0):
                return first
            s = start[k]
            at = out[first : first + 8]
            at[0, k], at[1, k], at[2, k], at[3, k] = a + s, b + s, c + s, d + s
            at[4, k], at[5, k], at[6, k], at[7, k] = e + s, f + s, g + s, h + s
    return whole


@_compiled
def combine_rows(
    address: int,
    code: int,
    stride: int,
    factors: NDArray[np.float64],
    start: NDArray[np.float64],
    out: NDArray[np.float64],
) -> bool:
    """Do what `combine_columns` does for rows whose values lie side by side, `stride` values from row to row."""
    n_rows, n_outputs = out.shape
    n_features = factors.shape[1]
    width = min(n_features, _TILE_COLUMNS)
    rows, columns = np.empty((_SHORT_TILE_ROWS, width)), np.empty((width, _SHORT_TILE_ROWS))
    sums = np.empty((n_outputs, _SHORT_TILE_ROWS))
    finite = True
    for first in range(0, n_rows, _SHORT_TILE_ROWS):
        n = min(_SHORT_TILE_ROWS, n_rows - first)
        sums[:, :n] = 0.0
        for left in range(0, n_features, width):
            n_columns = min(width, n_features - left)
            for i in range(n):
                _load(address, code, (first + i) * stride + left, 1, n_columns, rows[i])
            _turn(rows, n_columns, n, columns)
            finite &= _add_columns(columns, left, n_columns, n, factors, sums)
        for k in range(n_outputs):
            for i in range(n):
                out[first + i, k] = sums[k, i] + start[k]
    return finite


@_compiled
def place_rows(
    address: int,
    code: int,
    stride: int,
    shift: NDArray[np.float64],
    factor: NDArray[np.float64],
    places: NDArray[np.int32],
    out: NDArray[Any],
) -> bool:
    """Do what `place_columns` does for rows whose values lie side by side, `stride` values from row to row."""
    n_rows, n_features, size = len(places), out.shape[1], _SIZES[code]
    if n_features < 8:
        addresses = address + size * np.arange(n_features)
        codes, strides = np.full(n_features, code), np.full(n_features, stride)
        return _place_narrow(addresses, codes, strides, shift, factor, places, out)
    target, width = _address(out), out.itemsize
    loaded = np.empty((_SCALED_ROWS, n_features if code > 1 else 0), np.float64)
    odd = np.int64(0)
    for first in range(0, n_rows, _SCALED_ROWS):
        n = min(_SCALED_ROWS, n_rows - first)
        begin, step = address + first * stride * size, stride * size
        if code > 1:
            for i in range(n):
                _load(address, code, (first + i) * stride, 1, n_features, loaded[i])
            begin, step = _address(loaded), 8 * n_features
        places_at = _address(places[first:])
        for i in range(first + n, min(first + n + _SCALED_ROWS, n_rows)):  # places are random: of the rows after these
            ahead = target + np.int64(places[i]) * n_features * width
            for line in range(0, min(n_features * width, _AHEAD_BYTES), 64):
                _prefetch(ahead + line)
        for k in range(0, n_features, 8):
            left = min(k, n_features - 8)  # the last eight columns overlap those before
            shifts, factors = _address(shift) + 8 * left, _address(factor) + 8 * left
            place = target + left * width
            if code == 0:
                odd |= _scale_float32_rows(
                    out, begin + 4 * left, step, places_at, n, shifts, factors, place, n_features * width
                )
            else:
                odd |= _scale_float64_rows(
                    out, begin + 8 * left, step, places_at, n, shifts, factors, place, n_features * width
                )
    return bool(odd == 0)


@_compiled
def place_targets(y: NDArray[np.float64], places: NDArray[np.int32], out: NDArray[np.float64]) -> bool:
    """Write encoded targets, of shape (n_rows, n_outputs), at their places; return whether all are finite."""
    n_finite = 0
    for i in range(len(y)):
        for k in range(y.shape[1]):
            value = y[i, k]
            out[places[i], k] = value
            n_finite += (value - value) == 0
    return n_finite == y.size


@_compiled
def place_weights(weight: NDArray[np.float64], places: NDArray[np.int32], out: NDArray[np.float64]) -> bool:
    """Write weights at their places; return whether all are finite and none is negative."""
    n_good = 0
    for i in range(len(weight)):
        value = weight[i]
        out[places[i]] = value
        n_good += value >= 0 and value - value == 0
    return n_good == len(weight)


@_compiled
def place_identities(block: int, start: int, places: NDArray[np.int32], out: NDArray[np.uint64]) -> None:
    """Write the hashed identity of each row of a block, from row `start` on, at its place."""
    for i in range(len(places)):
        out[places[i]] = identity(np.uint64(block), np.uint64(start + i))


@_compiled
def copy_rows(
    X: NDArray[Any],
    y: NDArray[np.float64],
    ids: NDArray[np.uint64],
    places: NDArray[np.int32],
    X_out: NDArray[Any],
    y_out: NDArray[np.float64],
    ids_out: NDArray[np.uint64],
) -> None:
    """Copy rows that are scaled already to their places."""
    _spread(X, X.shape[1], len(places), X.shape[1], places, 0, X_out, 0)
    for i in range(len(places)):
        place = places[i]
        ids_out[place] = ids[i]
        for k in range(y.shape[1]):
            y_out[place, k] = y[i, k]


# Classes to their codes -------------------------------------------------------------------------------------------


@_compiled
def find_classes(values: NDArray[np.float64], classes: NDArray[np.float64], out: NDArray[np.float64]) -> int:
    """Write the index of each value among sorted classes; -1 for a value that is not one, NaN for NaN and infinities.

    Returns
    -------
    int
        The first row whose value is none of the classes (NaN and infinities are not counted), or -1.
    """
    unknown = -1
    for i in range(len(values)):
        value = values[i]
        low, high = 0, len(classes)
        while low < high:
            middle = (low + high) // 2
            if classes[middle] < value:
                low = middle + 1
            else:
                high = middle
        if low < len(classes) and classes[low] == value:
            out[i] = low
        elif value - value != 0:
            out[i] = np.nan
        else:
            out[i] = -1
            if unknown < 0:
                unknown = i
    return unknown


# Columns of an Arrow batch ----------------------------------------------------------------------------------------

#: Members of Arrow's C struct ArrowArray, by words of eight bytes.
_LENGTH, _NULL_COUNT, _OFFSET, _N_BUFFERS, _N_CHILDREN, _BUFFERS, _CHILDREN = range(7)


@_compiled
def find_arrow_columns(
    batch: int, numbers: NDArray[np.int64], sizes: NDArray[np.int64], out: NDArray[np.int64]
) -> bool:
    """Write the addresses of columns of numbers of a batch; False if one may hold nulls, or is no such column.

    Parameters
    ----------
    batch : int
        Address of the batch as an ArrowArray; valid as long as its owner keeps it.
    numbers, sizes : ndarrays of shape (n_columns,), int64
        Which columns, and the bytes of a value of each.
    out : ndarray of shape (n_columns,), int64
        Address of each column's first value.
    """
    children, n_rows = _int64_at(batch, _CHILDREN), _int64_at(batch, _LENGTH)
    for i in range(len(numbers)):
        if numbers[i] < 0 or numbers[i] >= _int64_at(batch, _N_CHILDREN):
            return False
        column = _int64_at(children, numbers[i])
        if _int64_at(column, _NULL_COUNT) != 0 or _int64_at(column, _N_BUFFERS) != 2:
            return False
        first = _int64_at(batch, _OFFSET) + _int64_at(column, _OFFSET)
        values = _int64_at(_int64_at(column, _BUFFERS), 1)
        if values == 0 or _int64_at(column, _LENGTH) < n_rows:
            return False
        out[i] = values + first * sizes[i]
    return True


# Rows that lie in a file or in memory as they are ------------------------------------------------------------------

#: What each number of a strip is, see `streamgd.data.sources.flat.Strip`.
FD, OFFSET, ROW_BYTES, CODE, PART, COLUMN, N_COLUMNS = range(7)
#: What a strip holds.
FEATURES, TARGET, WEIGHT = range(3)
#: Where rows lie that are not in memory.
NOT_READY = -(2**63)
#: How `place_flat` ended.
PLACED, UNREADABLE, UNUSABLE = range(3)
#: Values that are not scaled go through arrays of this many.
_CONVERTED_ROWS = 512


@_compiled
def _fetch(strip: NDArray[np.int64], first: int, n: int, scratch: int, ready: int) -> Any:
    """Return the address of `n` rows of a strip, read to `scratch` if they lie in a file; 0 if they cannot be read.

    `ready` is where the strip's first row would lie, if rows of a file have been read already, else `NOT_READY`.
    """
    if ready != NOT_READY:
        return ready + first * strip[ROW_BYTES]
    at, wanted = strip[OFFSET] + first * strip[ROW_BYTES], n * strip[ROW_BYTES]
    if strip[FD] < 0:
        return at
    done = 0
    while done < wanted:
        got = _pread(np.int32(strip[FD]), scratch + done, np.uint64(wanted - done), at + done)
        if got <= 0:
            return 0
        done += got
    return scratch


@_compiled
def _place_numbers(
    address: int,
    code: int,
    stride: int,
    classes: NDArray[np.float64],
    places: NDArray[np.int32],
    column: int,
    not_negative: bool,
    out: NDArray[np.float64],
) -> tuple[bool, bool]:
    """Write targets or weights, `stride` values apart, at their places; tell whether all are finite, and all known."""
    loaded, codes = np.empty(_CONVERTED_ROWS), np.empty(_CONVERTED_ROWS)
    finite, known = True, True
    for first in range(0, len(places), _CONVERTED_ROWS):
        n = min(_CONVERTED_ROWS, len(places) - first)
        _load(address, code, first * stride, stride, n, loaded)
        values = loaded
        if len(classes):
            known &= find_classes(loaded[:n], classes, codes[:n]) < 0
            values = codes
        for i in range(n):
            value = values[i]
            out[places[first + i], column] = value
            finite &= value - value == 0 and not (not_negative and value < 0)
    return finite, known


@_compiled
def place_flat(
    slices: NDArray[np.int64],
    strips: NDArray[np.int64],
    ready: NDArray[np.int64],
    shift: NDArray[np.float64],
    factor: NDArray[np.float64],
    classes: NDArray[np.float64],
    key: NDArray[np.uint64],
    places: NDArray[np.int32],
    X: NDArray[Any],
    y: NDArray[np.float64],
    weight: NDArray[np.float64],
    ids: NDArray[np.uint64],
    scratch: NDArray[np.uint8],
    check: bool,
) -> tuple[int, int]:
    """Read slices of rows that lie as they are, scale them and put them at their places.

    Parameters
    ----------
    slices : ndarray of shape (n_slices, 5), int64
        Block, first row in the block, rows, file, first row in the file.
    strips : ndarray of shape (n_files, n_strips, 7), int64
        Where the values lie.
    ready : ndarray of shape (n_slices, n_strips) or (0, 0), int64
        For slices of files that have been read already, where the strip's first row would lie if all of it lay in
        memory as the slice does; the lowest number for others.
    shift, factor : ndarrays of shape (n_features,), float64
        Each feature becomes ``(float64(value) - shift) * factor``.
    classes : ndarray of shape (n_classes,), float64
        Sorted classes, if targets become their index; empty for numbers.
    key : ndarray of shape (2,), uint64
        What places are drawn from, see `draw_places`; of shape (0,) if `places` says them.
    places : ndarray of shape (n_rows,), int32
        Row of the window for each row, slice after slice.
    X, y, weight, ids : ndarrays
        The window; `y` of shape (capacity, n_outputs) and `weight` of shape (capacity, 1), either with no columns.
    scratch : ndarray of uint8
        Memory that what is read passes through.
    check : bool
        Whether numbers that are not finite and negative weights are errors.

    Returns
    -------
    int, int
        `PLACED`, `UNREADABLE` or `UNUSABLE` (bad numbers, unknown classes), and the slice.
    """
    if len(key):
        draw_places(key, places)
    n_features = X.shape[1]
    addresses, codes = np.empty(n_features, np.int64), np.empty(n_features, np.int64)
    strides = np.empty(n_features, np.int64)
    memory = (_address(scratch) + 63) // 64 * 64
    room = len(scratch) - 64 * (strips.shape[1] + 1)
    placed = 0
    for k in range(len(slices)):
        block, start, n_rows, file, file_row = slices[k]
        widest = 0
        for s in range(strips.shape[1]):
            widest += strips[file, s, ROW_BYTES] * (strips[file, s, FD] >= 0)
        most = n_rows if widest == 0 else max(1, room // widest)
        for first in range(0, n_rows, most):
            n = min(most, n_rows - first)
            here = places[placed : placed + n]
            free, whole = memory, False
            for s in range(strips.shape[1]):
                strip = strips[file, s]
                address = _fetch(strip, file_row + first, n, free, ready[k, s] if len(ready) else NOT_READY)
                if address == 0:
                    return UNREADABLE, k
                if address == free:
                    free += (n * strip[ROW_BYTES] + 63) // 64 * 64
                size = _SIZES[strip[CODE]]
                stride = strip[ROW_BYTES] // size
                if strip[PART] == FEATURES:
                    if strip[N_COLUMNS] == n_features:
                        whole = True
                        finite = place_rows(address, strip[CODE], stride, shift, factor, here, X)
                        if check and not finite:
                            return UNUSABLE, k
                    else:
                        for j in range(strip[N_COLUMNS]):
                            column = strip[COLUMN] + j
                            addresses[column], codes[column] = address + j * size, strip[CODE]
                            strides[column] = stride
                else:
                    is_target = strip[PART] == TARGET
                    for j in range(strip[N_COLUMNS]):
                        finite, known = _place_numbers(
                            address + j * size,
                            strip[CODE],
                            stride,
                            classes if is_target else classes[:0],
                            here,
                            strip[COLUMN] + j,
                            not is_target,
                            y if is_target else weight,
                        )
                        if not known or (check and not finite):
                            return UNUSABLE, k
            if not whole and not (place_columns(addresses, codes, strides, shift, factor, here, X) or not check):
                return UNUSABLE, k
            place_identities(block, start + first, here, ids)
            placed += n
    return PLACED, 0


@_compiled
def load_numbers(
    strips: NDArray[np.int64],
    first: int,
    y: NDArray[np.float64],
    weight: NDArray[np.float64],
    scratch: NDArray[np.uint8],
) -> bool:
    """Read targets and weights of consecutive rows of a file, as float64.

    Parameters
    ----------
    strips : ndarray of shape (n_strips, 7), int64
        Where the values lie.
    first : int
        First row in the file.
    y, weight : ndarrays of shape (n_rows, n_outputs) and (n_rows, 1 or 0), float64
        Are filled.
    scratch : ndarray of uint8
        Memory that what is read passes through, a row of every strip at least.

    Returns
    -------
    bool
        Whether all could be read.
    """
    memory = _address(scratch)
    loaded = np.empty(_CONVERTED_ROWS)
    for s in range(strips.shape[0]):
        strip = strips[s]
        if strip[PART] == FEATURES:
            continue
        out = y if strip[PART] == TARGET else weight
        size = _SIZES[strip[CODE]]
        stride, most = strip[ROW_BYTES] // size, len(y)
        if strip[FD] >= 0:
            most = max(1, len(scratch) // strip[ROW_BYTES])
        for begin in range(0, len(y), most):
            n = min(most, len(y) - begin)
            address = _fetch(strip, first + begin, n, memory, NOT_READY)
            if address == 0:
                return False
            if stride == 1 and out.shape[1] == 1:
                _load(address, strip[CODE], 0, 1, n, out.reshape(out.size)[begin : begin + n])
                continue
            for j in range(strip[N_COLUMNS]):
                column = strip[COLUMN] + j
                for at in range(0, n, _CONVERTED_ROWS):
                    m = min(_CONVERTED_ROWS, n - at)
                    _load(address + j * size, strip[CODE], at * stride, stride, m, loaded)
                    for i in range(m):
                        out[begin + at + i, column] = loaded[i]
    return True


# Rows that are kept ------------------------------------------------------------------------------------------------


@_compiled
def sum_words(words: NDArray[Any], first: int) -> np.uint64:
    """Sum up hashed words, modulo 2**64, each hashed with its number; `first` is that of the first one.

    The sums of parts add up to that of the whole, in whatever order they come. A single word that changes always
    changes the sum, because what hashes it is a bijection.
    """
    total = np.uint64(0)
    salt = np.uint64(first) * np.uint64(0x9E3779B97F4A7C15)
    for i in range(len(words)):
        z = np.uint64(words[i]) + salt
        z = (z ^ (z >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
        total += z ^ (z >> np.uint64(32))
        salt += np.uint64(0x9E3779B97F4A7C15)
    return total
