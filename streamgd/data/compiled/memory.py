"""Numbers at addresses: read, written and copied, aligned or not; and stored numbers of any dtype as float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled

#: Codes of the dtypes that features can be stored as; booleans are read as bytes.
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
#: The bytes of each, by code.
DTYPE_BYTES = (4, 8, 1, 2, 4, 8, 1, 2, 4, 8)

#: The operating system's own; found by name when compiled code is loaded, so that it can be kept on disk.
_pread: Any = types.ExternalFunction("pread", types.intp(types.intc, types.intp, types.uintp, types.int64))


def _reader_of(kind: Any) -> Any:
    """Make a function of (address, index) that reads one number."""

    @intrinsic
    def read(_context: Any, _address: Any, _index: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], context.get_data_type(kind).as_pointer())
            return builder.load(builder.gep(pointer, [arguments[1]]), align=1)

        return kind(types.int64, types.int64), generate

    return read


def _writer_of(kind: Any) -> Any:
    """Make a function of (address, index, value) that writes one number."""

    @intrinsic
    def write(_context: Any, _address: Any, _index: Any, _value: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], context.get_data_type(kind).as_pointer())
            builder.store(arguments[2], builder.gep(pointer, [arguments[1]]), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, kind), generate

    return write


float32_at, float64_at = _reader_of(types.float32), _reader_of(types.float64)
int8_at, int16_at = _reader_of(types.int8), _reader_of(types.int16)
int32_at, int64_at = _reader_of(types.int32), _reader_of(types.int64)
uint8_at, uint16_at = _reader_of(types.uint8), _reader_of(types.uint16)
uint32_at, uint64_at = _reader_of(types.uint32), _reader_of(types.uint64)
put_uint8, put_uint16 = _writer_of(types.uint8), _writer_of(types.uint16)
put_uint32, put_uint64 = _writer_of(types.uint32), _writer_of(types.uint64)


@intrinsic
def copy_bytes(_context: Any, _target: Any, _source: Any, _n_bytes: Any) -> Any:
    """Copy memory from address to address."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        target, source, n_bytes = arguments
        pointer = cgutils.voidptr_t
        cgutils.raw_memcpy(builder, builder.inttoptr(target, pointer), builder.inttoptr(source, pointer), n_bytes, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def prefetch(_context: Any, _address: Any) -> Any:
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


@compiled
def address_of(array: NDArray[Any]) -> Any:
    """Return where an array lies, as a number that others can be added to; NumPy's own would make floats of them."""
    return np.int64(array.ctypes.data)


@compiled
def read_file(fd: int, target: int, n_bytes: int, offset: int) -> bool:
    """Read so many bytes of a file to an address; False if they are not all there."""
    done = 0
    while done < n_bytes:
        got = _pread(np.int32(fd), target + done, np.uint64(n_bytes - done), offset + done)
        if got <= 0:
            return False
        done += got
    return True


@compiled
def load(address: int, code: int, first: int, stride: int, n: int, out: NDArray[np.float64]) -> None:
    """Read `n` values from memory as float64; `first` and `stride` count values, not bytes."""
    if code == 0:
        for i in range(n):
            out[i] = float32_at(address, first + i * stride)
    elif code == 1:
        for i in range(n):
            out[i] = float64_at(address, first + i * stride)
    elif code == 2:
        for i in range(n):
            out[i] = int8_at(address, first + i * stride)
    elif code == 3:
        for i in range(n):
            out[i] = int16_at(address, first + i * stride)
    elif code == 4:
        for i in range(n):
            out[i] = int32_at(address, first + i * stride)
    elif code == 5:
        for i in range(n):
            out[i] = int64_at(address, first + i * stride)
    elif code == 6:
        for i in range(n):
            out[i] = uint8_at(address, first + i * stride)
    elif code == 7:
        for i in range(n):
            out[i] = uint16_at(address, first + i * stride)
    elif code == 8:
        for i in range(n):
            out[i] = uint32_at(address, first + i * stride)
    else:
        for i in range(n):
            out[i] = uint64_at(address, first + i * stride)


@compiled
def varint(at: int, end: int) -> Any:
    """Read a number of any length (LEB128); return it and where it ends, 0 if it does not end in time."""
    found, shift = np.uint64(0), np.uint64(0)
    while at < end and shift < np.uint64(64):
        byte = np.uint64(uint8_at(at, 0))
        at += 1
        found |= (byte & np.uint64(0x7F)) << shift
        if byte < np.uint64(0x80):
            return np.int64(found), at
        shift += np.uint64(7)
    return 0, 0


@compiled
def whole(value: int) -> Any:
    """Undo the zigzag of a number, which makes small numbers of those near 0."""
    return np.int64(np.uint64(value) >> np.uint64(1)) ^ -(value & 1)
