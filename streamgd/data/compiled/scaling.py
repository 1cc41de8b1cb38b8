"""Rows and columns scaled eight values at a time, written as vector instructions."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


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


scale_float32_rows, scale_float64_rows = _row_scaler_of(types.float32), _row_scaler_of(types.float64)
scale_float32_columns, scale_float64_columns = _column_scaler_of(types.float32), _column_scaler_of(types.float64)
