"""A small language for writing LLVM functions with Python's operators; nothing here knows about learning.

Compiled code is written as instructions because sums must run in the same order on every CPU. LLVM may not reorder a
strict sum, so it would not vectorise one; here a vector has the width that the text says, and LLVM splits or pads it
for the CPU at hand. Nothing needs to be inferred, inlined or vectorised, so compilation takes a second where Numba
took seven for the same code in Python.

`Value` is a number or a vector, `Pointer` the address of numbers; both are names for what an instruction yields, so
Python's ``if`` and ``for`` decide what is written, and `Code.when` and `Code.loop` what is done.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from llvmlite import ir

F64, F32, I64, I32, BOOL = ir.DoubleType(), ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(1)

#: How many numbers are computed together where nothing else matters.
LANES = 8

Number = int | float


class Value:
    """A number or a vector of numbers that the code being written has at hand.

    Parameters
    ----------
    code : Code
        Where instructions on it go.
    ir : llvmlite.ir.Value
        What LLVM calls it.
    """

    def __init__(self, code: Code, value: Any) -> None:
        self.code, self.ir = code, value

    @property
    def type(self) -> Any:
        """LLVM's type."""
        return self.ir.type

    @property
    def element(self) -> Any:
        """Type of one number."""
        return self.type.element if isinstance(self.type, ir.VectorType) else self.type

    @property
    def lanes(self) -> int:
        """How many numbers."""
        return self.type.count if isinstance(self.type, ir.VectorType) else 1

    @property
    def is_float(self) -> bool:
        """Whether it is floating point."""
        return self.element in (F64, F32)

    def like(self, other: Value | Number) -> Any:
        """LLVM's name for another value of this type: plain numbers are constants, one number stands for each lane."""
        if isinstance(other, Value):
            return self.code.splat(other, self.lanes).ir if other.lanes < self.lanes else other.ir
        number: Any = float(other) if self.is_float else int(other)
        return ir.Constant(self.type, number if self.lanes == 1 else [number] * self.lanes)

    def _operate(self, floats: str, integers: str, other: Value | Number, swapped: bool = False) -> Value:
        if isinstance(other, Value) and other.lanes > self.lanes:
            return self.code.splat(self, other.lanes)._operate(floats, integers, other, swapped)
        a, b = self.ir, self.like(other)
        if swapped:
            a, b = b, a
        return Value(self.code, getattr(self.code.builder, floats if self.is_float else integers)(a, b))

    def _compare(self, sign: str, other: Value | Number) -> Value:
        builder = self.code.builder
        if self.is_float:
            compare = builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered
        else:
            compare = builder.icmp_signed
        return Value(self.code, compare(sign, self.ir, self.like(other)))

    def __add__(self, other: Value | Number) -> Value:
        return self._operate("fadd", "add", other)

    def __radd__(self, other: Number) -> Value:
        return self._operate("fadd", "add", other, swapped=True)

    def __sub__(self, other: Value | Number) -> Value:
        return self._operate("fsub", "sub", other)

    def __rsub__(self, other: Number) -> Value:
        return self._operate("fsub", "sub", other, swapped=True)

    def __mul__(self, other: Value | Number) -> Value:
        return self._operate("fmul", "mul", other)

    def __rmul__(self, other: Number) -> Value:
        return self._operate("fmul", "mul", other, swapped=True)

    def __truediv__(self, other: Value | Number) -> Value:
        return self._operate("fdiv", "sdiv", other)

    def __rtruediv__(self, other: Number) -> Value:
        return self._operate("fdiv", "sdiv", other, swapped=True)

    def __and__(self, other: Value | Number) -> Value:
        return self._operate("and_", "and_", other)

    def __or__(self, other: Value | Number) -> Value:
        return self._operate("or_", "or_", other)

    def __lshift__(self, other: Value | Number) -> Value:
        return self._operate("shl", "shl", other)

    def __rshift__(self, other: Value | Number) -> Value:
        return self._operate("lshr", "lshr", other)

    def __invert__(self) -> Value:
        return Value(self.code, self.code.builder.not_(self.ir))

    def __neg__(self) -> Value:
        builder = self.code.builder
        return Value(self.code, builder.fneg(self.ir) if self.is_float else builder.neg(self.ir))

    def __lt__(self, other: Value | Number) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Value | Number) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Value | Number) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Value | Number) -> Value:
        return self._compare(">=", other)

    def __eq__(self, other: Value | Number) -> Value:  # type: ignore[override]
        return self._compare("==", other)

    def __ne__(self, other: Value | Number) -> Value:  # type: ignore[override]
        return self._compare("!=", other)

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError("a value of the code being written is neither true nor false; use Code.when or where")

    def lane(self, index: int) -> Value:
        """Return one number of the vector."""
        return Value(self.code, self.code.builder.extract_element(self.ir, ir.Constant(I32, index)))

    def pick(self, lanes: Sequence[int], other: Value | None = None) -> Value:
        """Return a vector of some lanes of this one and another, whose lanes are counted on."""
        second = ir.Constant(self.type, ir.Undefined) if other is None else other.ir
        chosen = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return Value(self.code, self.code.builder.shuffle_vector(self.ir, second, chosen))

    def halves(self) -> tuple[Value, Value]:
        """Return the lower and the upper lanes."""
        middle = self.lanes // 2
        return self.pick(range(middle)), self.pick(range(middle, self.lanes))

    def folded(self, fold: Callable[[Value, Value], Value] = operator.add) -> Value:
        """Return the sum of the lanes, as a number: halves are added, or folded otherwise, until one is left."""
        whole = self
        while whole.lanes > 2:
            whole = fold(*whole.halves())
        return fold(whole.lane(0), whole.lane(1)) if whole.lanes == 2 else whole

    def to(self, element: Any) -> Value:
        """Return the same numbers in another type."""
        if element == self.element:
            return self
        target = element if self.lanes == 1 else ir.VectorType(element, self.lanes)
        builder = self.code.builder
        if self.is_float and element in (F64, F32):
            convert = builder.fpext if element == F64 else builder.fptrunc
        elif self.is_float:
            convert = builder.fptosi
        elif self.element == BOOL:
            convert = builder.uitofp if element in (F64, F32) else builder.zext
        else:
            convert = builder.sitofp
        return Value(self.code, convert(self.ir, target))

    def bits_as(self, element: Any) -> Value:
        """Return the same bits, read as another type of the same size."""
        target = element if self.lanes == 1 else ir.VectorType(element, self.lanes)
        return Value(self.code, self.code.builder.bitcast(self.ir, target))


class Pointer:
    """The address of numbers of one type, as C has it; nothing is checked.

    Parameters
    ----------
    code : Code
        Where instructions on it go.
    ir : llvmlite.ir.Value
        What LLVM calls it; a typed pointer.
    """

    def __init__(self, code: Code, value: Any) -> None:
        self.code, self.ir = code, value

    @property
    def element(self) -> Any:
        """Type of the numbers."""
        return self.ir.type.pointee

    def __add__(self, n: Value | Number) -> Pointer:
        """Return the address n numbers further on."""
        offset = ir.Constant(I64, int(n)) if not isinstance(n, Value) else n.ir
        return Pointer(self.code, self.code.builder.gep(self.ir, [offset], source_etype=self.element))

    def load(self, index: Value | Number, lanes: int) -> Value:
        """Return a vector that begins at an index; one lane is a number."""
        place, builder = (self + index).ir, self.code.builder
        if lanes > 1:
            vector = ir.VectorType(self.element, lanes)
            place = builder.bitcast(place, vector.as_pointer())
            return Value(self.code, builder.load(place, align=_size(self.element), typ=vector))
        return Value(self.code, builder.load(place, align=_size(self.element), typ=self.element))

    def store(self, index: Value | Number, value: Value) -> None:
        """Write a number or a vector from an index on."""
        place, builder = (self + index).ir, self.code.builder
        if value.lanes > 1:
            place = builder.bitcast(place, value.type.as_pointer())
        builder.store(value.ir, place, align=_size(self.element))

    def __getitem__(self, index: Value | Number) -> Value:
        return self.load(index, 1)

    def __setitem__(self, index: Value | Number, value: Value | Number) -> None:
        self.store(index, self.code.constant(value, self.element))

    def aligned(self) -> Pointer:
        """Return the next address that begins a cache line."""
        builder = self.code.builder
        line = builder.and_(builder.add(builder.ptrtoint(self.ir, I64), ir.Constant(I64, 63)), ir.Constant(I64, -64))
        return Pointer(self.code, builder.inttoptr(line, self.ir.type))

    def select(self, condition: Value, other: Pointer) -> Pointer:
        """Return this address where a condition holds, the other elsewhere."""
        return Pointer(self.code, self.code.builder.select(condition.ir, self.ir, other.ir))

    def prefetch(self, offset: Value | Number) -> None:
        """Ask for the cache line so many bytes on, into the second-level cache; any address is allowed.

        A line asked for into the first level would hold one of its few slots for lines under way.
        """
        builder, byte = self.code.builder, ir.IntType(8)
        place = builder.bitcast(self.ir, byte.as_pointer())
        offset = ir.Constant(I64, int(offset)) if not isinstance(offset, Value) else offset.ir
        place = builder.gep(place, [offset], source_etype=byte)
        kind = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        read, second_level, data = (ir.Constant(I32, value) for value in (0, 2, 1))
        builder.call(function, [place, read, second_level, data])


Held = TypeVar("Held", Value, Pointer)


class Variable(Generic[Held]):
    """A place for a number, a vector or an address that changes; LLVM keeps it in a register."""

    def __init__(self, code: Code, value: Held) -> None:
        self.code: Code = code
        self._kind: Any = type(value)
        with code.builder.goto_entry_block():
            self._place = code.builder.alloca(value.ir.type)
        self._type = value.ir.type
        self.value = value

    @property
    def value(self) -> Held:
        """What it holds now."""
        found: Held = self._kind(self.code, self.code.builder.load(self._place, typ=self._type))
        return found

    @value.setter
    def value(self, value: Held) -> None:
        self.code.builder.store(value.ir, self._place)

    def add(self, value: Value | Number) -> None:
        """Add to what it holds."""
        self.value = self.value + value


class Code:
    """An LLVM function while it is written.

    Parameters
    ----------
    builder : llvmlite.ir.IRBuilder
        Stands where the next instruction goes.
    """

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    # --- values ---
    def integer(self, value: Value | Number) -> Value:
        """Return a 64-bit whole number."""
        return self.constant(value, I64)

    def number(self, value: Value | Number) -> Value:
        """Return a double."""
        return self.constant(value, F64)

    def constant(self, value: Value | Number, element: Any) -> Value:
        """Return a number of some type; what is a value already stays as it is."""
        if isinstance(value, Value):
            return value
        return Value(self, ir.Constant(element, float(value) if element in (F64, F32) else int(value)))

    def zeros(self, element: Any, lanes: int) -> Value:
        """Return a vector of zeros."""
        return self.splat(self.constant(0, element), lanes)

    def splat(self, value: Value, lanes: int) -> Value:
        """Return a vector of equal lanes; one lane is the number itself."""
        if lanes == 1:
            return value
        if isinstance(value.ir, ir.Constant):
            return Value(self, ir.Constant(ir.VectorType(value.type, lanes), [value.ir.constant] * lanes))
        vector = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        return Value(self, self.builder.insert_element(vector, value.ir, ir.Constant(I32, 0))).pick([0] * lanes)

    def lane_numbers(self, lanes: int) -> Value:
        """Return the vector of lane numbers: 0, 1, 2 and so on."""
        return Value(self, ir.Constant(ir.VectorType(I64, lanes), list(range(lanes))))

    def variable(self, value: Held) -> Variable[Held]:
        """Return a place that holds a value now, and may hold another later."""
        return Variable(self, value)

    # --- flow ---
    @contextmanager
    def loop(
        self, start: Value | Number, stop: Value | Number, step: Value | Number = 1, *, short: bool = True
    ) -> Iterator[Value]:
        """Do what is written inside for start, start + step, … below stop; a short loop is not worth unrolling."""
        builder = self.builder
        first, last, by = self.integer(start), self.integer(stop), self.integer(step)
        before = builder.block
        head, body, after = (builder.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(I64)
        index.add_incoming(first.ir, before)
        builder.cbranch((Value(self, index) < last).ir, body, after)
        builder.position_at_end(body)
        yield Value(self, index)
        index.add_incoming((Value(self, index) + by).ir, builder.block)
        builder.branch(head).set_metadata("llvm.loop", _as_written(builder.module, short))
        builder.position_at_end(after)

    @contextmanager
    def repeat(self, condition: Callable[[], Value]) -> Iterator[None]:
        """Do what is written inside as long as a condition, asked before each turn, holds."""
        builder = self.builder
        head, body, after = (builder.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        builder.cbranch(condition().ir, body, after)
        builder.position_at_end(body)
        yield
        builder.branch(head).set_metadata("llvm.loop", _as_written(builder.module, short=True))
        builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Do what is written inside if a condition holds."""
        with self.builder.if_then(condition.ir):
            yield

    @contextmanager
    def either(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """Give two contexts: what is done if a condition holds, and what is done if not."""
        with self.builder.if_else(condition.ir) as branches:
            yield branches

    def each(self, n: Value, body: Callable[[Value, int], None]) -> None:
        """Do something for n numbers: body(i, lanes) for eight of them from i on, then for the 4, 2 and 1 left over."""
        i = n & -LANES
        with self.loop(0, i, LANES) as first:
            body(first, LANES)
        for lanes in (4, 2, 1):
            with self.when((n & lanes) != 0):
                body(i, lanes)
            i = i + (n & lanes)


def where(condition: Value, a: Value | Number, b: Value | Number) -> Value:
    """Return a where a condition holds, b elsewhere."""
    code = condition.code
    plain = a if isinstance(a, Value) else code.constant(a, I64 if isinstance(a, int) and isinstance(b, int) else F64)
    model = a if isinstance(a, Value) else b if isinstance(b, Value) else plain
    model = code.splat(model, condition.lanes) if condition.lanes > model.lanes else model
    return Value(code, code.builder.select(condition.ir, model.like(a), model.like(b)))


def smaller(a: Value, b: Value | Number) -> Value:
    """Return a where it is below b, else b."""
    return where(a < b, a, b)


def larger(a: Value, b: Value | Number) -> Value:
    """Return a where it is above b, else b."""
    return where(a > b, a, b)


def absolute(x: Value) -> Value:
    """Return the sizes of floating-point numbers."""
    return _intrinsic("llvm.fabs", x)


def sqrt(x: Value) -> Value:
    """Return square roots, rounded exactly as IEEE 754 wants them."""
    return _intrinsic("llvm.sqrt", x)


def _intrinsic(name: str, x: Value) -> Value:
    module = x.code.builder.module
    name += "." + (f"v{x.lanes}" if x.lanes > 1 else "") + x.element.intrinsic_name
    known = module.globals.get(name)
    function = ir.Function(module, ir.FunctionType(x.type, [x.type]), name) if known is None else known
    return Value(x.code, x.code.builder.call(function, [x.ir]))


def joined(parts: Sequence[Value]) -> Value:
    """Return vectors or numbers, a power of two of them, put one after the other."""
    code = parts[0].code
    if parts[0].lanes == 1:
        vector = ir.Constant(ir.VectorType(parts[0].type, len(parts)), ir.Undefined)
        for i, part in enumerate(parts):
            vector = code.builder.insert_element(vector, part.ir, ir.Constant(I32, i))
        return Value(code, vector)
    while len(parts) > 1:
        lanes = range(2 * parts[0].lanes)
        parts = [a.pick(lanes, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def function(body: Callable[..., None]) -> Callable[..., Any]:
    """Make of something that writes code a function of the compiled code: written once, called wherever it is used.

    Called with the code at hand and values or pointers, it calls the function, which is written at its first use with
    these types. Keyword arguments are plain Python: each set of them makes a function of its own.

    A function returns nothing: it writes where pointers say.
    """

    def call(code: Code, *args: Value | Pointer, **choices: Any) -> None:
        module = code.builder.module
        kinds = [str(arg.element) + "*" * isinstance(arg, Pointer) for arg in args]
        chosen = [getattr(choice, "__name__", str(choice)) for choice in choices.values()]
        name = ".".join(["streamgd", body.__name__, *kinds, *chosen])
        if name not in module.globals:
            written = ir.Function(module, ir.FunctionType(ir.VoidType(), [arg.ir.type for arg in args]), name)
            written.linkage = "internal"
            written.attributes.add("noinline")
            within = Code(ir.IRBuilder(written.append_basic_block()))
            body(within, *(type(arg)(within, value) for arg, value in zip(args, written.args, strict=True)), **choices)
            within.builder.ret_void()
        code.builder.call(module.globals[name], [arg.ir for arg in args])

    call.__name__, call.__doc__ = body.__name__, body.__doc__
    return call


def _as_written(module: Any, short: bool) -> Any:
    """Return what keeps LLVM from looking for vectors in a loop, or from unrolling it, too: that takes it long."""
    wishes = [[ir.MetaDataString(module, "llvm.loop.vectorize.enable"), ir.Constant(BOOL, 0)]]
    wishes += [[ir.MetaDataString(module, "llvm.loop.unroll.disable")]] * short
    parts = [module.add_metadata(wish) for wish in wishes]
    loop = ir.MDValue(module, [], name=str(len(module.metadata)))
    loop.operands = (loop, *parts)  # LLVM tells loops apart by what names itself
    return loop


def _size(element: Any) -> int:
    return {F64: 8, F32: 4, I64: 8, I32: 4, BOOL: 1}[element]
