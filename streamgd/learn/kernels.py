"""All compiled code of learning: consume rows of a window, update the state.

One file, because Numba's cache notices only a change of the file that holds the compiled function; for the same reason
every number that the compiled code branches on, or finds its place by, is defined here and imported elsewhere. Losses,
optimizers, schedules and penalties are integer codes with runtime branches, so that one compilation serves them all.

Same bits everywhere: no fastmath; sums run in an order fixed by the row, the batch and the number of features alone
(`dot` spells its 16 accumulators out, gradients take four rows at a time counted from the batch's start); `exp` and
`log` are computed here, because those of the C library differ between CPU types. Batches are always computed whole: the
rows of a batch that a window's end cuts in two wait in the state.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

# --- codes -----------------------------------------------------------------------------------------------------------
SQUARED_ERROR, HUBER, EPSILON_INSENSITIVE, SQUARED_EPSILON_INSENSITIVE, QUANTILE = 0, 1, 2, 3, 4
LOG_LOSS, HINGE, SQUARED_HINGE, MODIFIED_HUBER, PERCEPTRON = 5, 6, 7, 8, 9
AUTO, SGD, ADAGRAD, ADAM, DOWG = 0, 1, 2, 3, 4
CONSTANT, OPTIMAL, INVSCALING, ADAPTIVE, COSINE = 0, 1, 2, 3, 4
AVERAGE_NONE, AVERAGE_UNIFORM, AVERAGE_POLYNOMIAL = 0, 1, 2
OK, DIVERGED = 0, 1

# Places in `codes`.
CODE_LOSS, CODE_OPTIMIZER, CODE_SCHEDULE, CODE_SOFTMAX, CODE_CLASSES = 0, 1, 2, 3, 4
CODE_INTERCEPT, CODE_AVERAGE, CODE_NESTEROV, CODE_MOMENTS = 5, 6, 7, 8
N_CODES = 9
# Places in `params`.
PARAM_LOSS, PARAM_L1, PARAM_L2, PARAM_ETA0, PARAM_POWER_T, PARAM_MOMENTUM = 0, 1, 2, 3, 4, 5
PARAM_BETA_1, PARAM_BETA_2, PARAM_EPSILON, PARAM_OPTIMAL_START = 6, 7, 8, 9
PARAM_N_UPDATES, PARAM_AVERAGE_FROM, PARAM_MEAN_WEIGHT, PARAM_ALPHA = 10, 11, 12, 13
N_PARAMS = 14
# Places in `scalars`: the epoch's weighted progressive loss, the weight behind it, rows times penalty; what the
# adaptive schedule made of eta0; Adam's running powers (kept as products, so that no pow is needed); DoWG's two
# numbers; the best epoch so far; the value that was not finite.
LOSS_SUM, WEIGHT_SUM, PENALTY_SUM, ETA_SCALE, BETA_1_POWER, BETA_2_POWER = 0, 1, 2, 3, 4, 5
DOWG_DISTANCE, DOWG_SUM, BEST_OBJECTIVE, BAD_VALUE = 6, 7, 8, 9
N_SCALARS = 10
# Places in `counters`: the cursor, the rows of the open batch, updates done, rows consumed in this epoch and in all, …
EPOCH, WINDOW, ROW, N_CARRY, N_UPDATES, EPOCH_ROWS, N_ROWS, STATUS, NO_IMPROVEMENT = 0, 1, 2, 3, 4, 5, 6, 7, 8
N_COUNTERS = 9

# Division by zero gives infinity or NaN as in NumPy: Python's check would keep loops from vectorising. LLVM optimises a
# compiled function once by itself and again in every caller, so the phases of a batch are put into their caller before
# compilation: that halves it. Numba copies what it inlines, at a cost that grows with its square, so they stay small
# and are called from `consume` itself, which is long for that reason. The rewrites left out would find nothing.
_SHARED: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "no_rewrites": True}
_njit: Any = nb.njit
_intrinsic: Any = extending.intrinsic
_entry = _njit(cache=True, **_SHARED)
_phase = _njit(inline="always", **_SHARED)
_inner = _njit(no_cpython_wrapper=True, **_SHARED)

#: A loss beyond this counts as divergence, and a gradient beyond its root: squares and their sums must not overflow.
_HUGE, _STEEP = 1e150, 1e75
#: AdaGrad's guard against dividing noise by noise: this share of the largest √G of the same output.
_ADAGRAD_FLOOR = 1e-9
#: A sum below this share of the size of its terms is rounding: that of the terms, which come from means that are
#: rounded themselves, included.
_ROUNDING = 1e-14


# --- arithmetic with the same bits on every CPU ----------------------------------------------------------------------
@_intrinsic
def _double_of_bits(typingctx: Any, bits: Any) -> Any:
    """Read the 64 bits of an integer as a double."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@_intrinsic
def _bits_of_double(typingctx: Any, value: Any) -> Any:
    """Read a double as a 64-bit integer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(types.float64), codegen


@_intrinsic
def address(typingctx: Any, array: Any, index: Any) -> Any:
    """Address of row `index` of a C-contiguous array, or of an element of a vector; ``address(A, i)[j]`` is A[i, j].

    The loops run over addresses because each use of an array, with its shape, strides, reference count and negative
    indices, is twenty instructions for LLVM to remove again: seconds, over this file. The array must be used again
    after the last use of its address, or Numba may free it.
    """
    if not isinstance(array, types.Array) or array.layout != "C":
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        offset = args[1]
        for axis in range(1, signature.args[0].ndim):
            offset = builder.mul(offset, builder.extract_value(struct.shape, axis))
        return builder.gep(struct.data, [offset], source_etype=context.get_value_type(signature.args[0].dtype))

    return types.CPointer(array.dtype)(array, types.intp), codegen


@_intrinsic
def ahead(typingctx: Any, pointer: Any, n: Any) -> Any:
    """Address n elements behind another."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]], source_etype=context.get_value_type(signature.return_type.dtype))

    return pointer(pointer, types.intp), codegen


class _Vectors:
    """Vector instructions, spelt out for LLVM: it may not reorder a strict sum, so it would not vectorise one.

    The order of a sum is written down here, and the same on every CPU: a vector that is wider than the CPU's registers
    is split, one that is narrower is padded.
    """

    def __init__(self, context: Any, builder: Any, dtype: Any) -> None:
        self.context, self.builder = context, builder
        self.element, self.size = context.get_value_type(dtype), dtype.bitwidth // 8
        self.intp = context.get_value_type(types.intp)

    def call(self, name: str, body: Any, result: Any, args: Any) -> Any:
        """Call a function of the module, written by `body` at its first call and never copied into its callers."""
        module = self.builder.module
        name = f"streamgd.{name}.{self.element}"
        if name not in module.globals:
            function = ir.Function(module, ir.FunctionType(result, [arg.type for arg in args]), name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            within = _Vectors.__new__(_Vectors)
            within.__dict__.update(self.__dict__, builder=ir.IRBuilder(function.append_basic_block()))
            returned = body(within, *function.args)
            within.builder.ret_void() if returned is None else within.builder.ret(returned)
        return self.builder.call(module.globals[name], args)

    def number(self, value: int) -> Any:
        """Return a whole number as a constant."""
        return ir.Constant(self.intp, value)

    def range(self, start: Any, stop: Any, step: int) -> Any:
        """Loop; gives the number of the turn's first element."""
        return cgutils.for_range_slice(self.builder, start, stop, self.number(step), intp=self.intp)

    def load(self, base: Any, offset: Any, lanes: int) -> Any:
        """Load so many elements, from an offset on."""
        vector = ir.VectorType(self.element, lanes)
        address = self.builder.gep(base, [offset], source_etype=self.element)
        return self.builder.load(self.builder.bitcast(address, vector.as_pointer()), align=self.size, typ=vector)

    def store(self, vector: Any, base: Any, offset: Any) -> None:
        """Store a vector from an offset on."""
        address = self.builder.gep(base, [offset], source_etype=vector.type.element)
        size = self.context.get_abi_sizeof(vector.type.element)
        self.builder.store(vector, self.builder.bitcast(address, vector.type.as_pointer()), align=size)

    def variable(self, value: Any) -> Any:
        """Return a place for a value that changes, holding the value now."""
        place = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, place)
        return place

    def zeros(self, lanes: int) -> Any:
        """Return a vector of zeros."""
        return ir.Constant(ir.VectorType(self.element, lanes), [0.0] * lanes)

    def pick(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Return a vector of some lanes out of two, those of the second counted on."""
        chosen = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        return self.builder.shuffle_vector(a, b, chosen)

    def splat(self, scalar: Any, lanes: int) -> Any:
        """Return a vector of equal lanes."""
        one = ir.Constant(ir.VectorType(scalar.type, 1), ir.Undefined)
        single = self.builder.insert_element(one, scalar, ir.Constant(ir.IntType(32), 0))
        return self.pick(single, single, [0] * lanes)

    def joined(self, vectors: list[Any]) -> Any:
        """Return vectors put one after the other; their number is a power of two."""
        while len(vectors) > 1:
            lanes = list(range(2 * vectors[0].type.count))
            vectors = [self.pick(a, b, lanes) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        return vectors[0]

    def dots(self, a_rows: list[Any], b: Any, n: Any) -> Any:
        """Return the dot products of one row or four with another, over n elements, as one vector."""
        builder = self.builder
        places = [self.variable(self.zeros(16)) for _ in a_rows]
        whole = builder.and_(n, self.number(-16))
        with self.range(self.number(0), whole, 16) as (offset, _):
            other = self.load(b, offset, 16)
            for place, a_row in zip(places, a_rows, strict=True):
                product = builder.fmul(self.load(a_row, offset, 16), other)
                builder.store(builder.fadd(builder.load(place), product), place)
        totals = [builder.load(place) for place in places]
        offset, rows_each = whole, 1
        for lanes in (8, 4, 2, 1):
            together = 2 if lanes <= 2 and len(totals) > 1 else 1  # narrow sums of two rows share a vector
            totals = [self._folded(totals[i : i + together], rows_each, lanes) for i in range(0, len(totals), together)]
            rows_each *= together
            left = builder.and_(n, self.number(lanes))
            places = [self.variable(total) for total in totals]
            with builder.if_then(builder.icmp_unsigned("!=", left, self.number(0))):
                other = self.joined([self.load(b, offset, lanes)] * rows_each)
                for i, (place, total) in enumerate(zip(places, totals, strict=True)):
                    rows = a_rows[i * rows_each : (i + 1) * rows_each]
                    product = builder.fmul(self.joined([self.load(row, offset, lanes) for row in rows]), other)
                    builder.store(builder.fadd(total, product), place)
            totals = [builder.load(place) for place in places]
            offset = builder.add(offset, left)
        return totals[0]

    def _folded(self, vectors: list[Any], rows_each: int, lanes: int) -> Any:
        """Add the upper half of each row's lanes to the lower, for the rows of one vector or of two."""
        rows = [row * 2 * lanes for row in range(rows_each * len(vectors))]
        lower, upper = ([first + half + lane for first in rows for lane in range(lanes)] for half in (0, lanes))
        a, b = vectors[0], vectors[-1]
        return self.builder.fadd(self.pick(a, b, lower), self.pick(a, b, upper))

    def sum_of_rows(self, x: Any, d: Any, n: Any, scale: Any, out: Any, offset: Any, lanes: int) -> None:
        """Store the sum over n rows of scale[i] * row, for some lanes from an offset on, four rows at a time."""
        builder = self.builder
        place = self.variable(self.zeros(lanes))

        def scaled(i: Any, later: int) -> Any:
            index = builder.add(i, self.number(later))
            factor = builder.load(builder.gep(scale, [index], source_etype=self.element), typ=self.element)
            row = self.load(x, builder.add(builder.mul(index, d), offset), lanes)
            return builder.fmul(self.splat(factor, lanes), row)

        def add(vector: Any) -> None:
            builder.store(builder.fadd(builder.load(place), vector), place)

        whole = builder.and_(n, self.number(-4))
        with self.range(self.number(0), whole, 4) as (i, _):
            first, second, third, fourth = (scaled(i, later) for later in range(4))
            add(builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth)))
        with self.range(whole, n, 1) as (i, _):
            add(scaled(i, 0))
        self.store(builder.load(place), out, offset)


@_intrinsic
def dot(typingctx: Any, a: Any, b: Any, n: Any) -> Any:
    """Dot product of n elements at two addresses.

    Sixteen accumulators, then the 8, 4, 2 and 1 left-over elements while the accumulators are folded in halves: an
    order that depends on n alone.
    """
    if a != b:
        return None

    def body(within: _Vectors, a: Any, b: Any, n: Any) -> Any:
        return within.builder.extract_element(within.dots([a], b, n), ir.Constant(ir.IntType(32), 0))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, signature.return_type)
        return vectors.call("dot", body, vectors.element, args)

    return a.dtype(a, b, types.intp), codegen


@_intrinsic
def dot_rows(typingctx: Any, x: Any, n_rows: Any, b: Any, d: Any, plus: Any, out: Any) -> Any:
    """Write plus + `dot` of each of n_rows rows of d elements, one behind the other, and b.

    Narrow rows are summed four at a time, each in the order of `dot`, so that they share the folding. Wide ones are
    not: memory that is read in order comes twice as fast.
    """
    if x != b or out.dtype != types.float64:
        return None

    def body(within: _Vectors, x: Any, n_rows: Any, b: Any, d: Any, plus: Any, out: Any) -> None:
        builder = within.builder
        narrow = builder.icmp_signed("<", d, within.number(256 // within.size))
        whole = builder.select(narrow, builder.and_(n_rows, within.number(-4)), within.number(0))
        for start, stop, together in ((within.number(0), whole, 4), (whole, n_rows, 1)):
            with within.range(start, stop, together) as (i, _):
                places = [builder.mul(builder.add(i, within.number(later)), d) for later in range(together)]
                rows = [builder.gep(x, [place], source_etype=within.element) for place in places]
                sums = within.dots(rows, b, d)
                if within.size == 4:
                    sums = builder.fpext(sums, ir.VectorType(ir.DoubleType(), together))
                within.store(builder.fadd(sums, within.splat(plus, together)), out, i)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _Vectors(context, builder, signature.args[0].dtype).call("dot_rows", body, ir.VoidType(), args)
        return context.get_dummy_value()

    return types.void(x, types.intp, b, types.intp, types.float64, out), codegen


@_intrinsic
def sum_rows(typingctx: Any, x: Any, n_rows: Any, d: Any, scale: Any, out: Any) -> Any:
    """Write the sum of scale[i] * row i over n_rows rows of d elements, four rows at a time counted from the first.

    Columns are taken in tiles that stay in registers, the widest that fits; the last tile overlaps the one before,
    which writes the same bits twice.
    """
    if x != scale or x != out:
        return None

    def body(within: _Vectors, x: Any, n_rows: Any, d: Any, scale: Any, out: Any) -> None:
        builder, number = within.builder, within.number
        widest = 128 // within.size
        for lanes, wider in ((1, 4), (4, widest // 2), (widest // 2, widest), (widest, 0)):
            fits = builder.icmp_signed(">=", d, number(lanes))
            if wider:
                fits = builder.and_(fits, builder.icmp_signed("<", d, number(wider)))
            last = builder.sub(d, number(lanes))
            with builder.if_then(fits), within.range(number(0), d, lanes) as (j, _):
                offset = builder.select(builder.icmp_signed("<", j, last), j, last)
                within.sum_of_rows(x, d, n_rows, scale, out, offset, lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _Vectors(context, builder, signature.args[0].dtype).call("sum_rows", body, ir.VoidType(), args)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, scale, out), codegen


@_intrinsic
def copy(typingctx: Any, source: Any, target: Any, n: Any) -> Any:
    """Copy n elements from one address to another."""
    if source != target:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.raw_memcpy(builder, args[1], args[0], args[2], signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(source, target, types.intp), codegen


_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_INVERSE_LN2 = 1.4426950408889634
_ROUNDER = 6755399441055744.0  # 1.5 * 2**52: adding it leaves the nearest integer in the low bits
_ROUNDER_BITS = 0x4338000000000000


@_inner
def exp(x):
    """Return e**x within 1.5 units in the last place; x is clamped to [-708, 709]. Branch-free, so loops vectorise.

    x = k ln 2 + r with |r| <= ln(2)/2, then a Taylor polynomial of degree 13 in r, then the exponent bits of k.
    """
    x = x if x > -708.0 else -708.0
    x = x if x < 709.0 else 709.0
    shifted = x * _INVERSE_LN2 + _ROUNDER
    k = shifted - _ROUNDER
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    exponent = (_bits_of_double(shifted) - _ROUNDER_BITS + 1023) << 52
    return p * _double_of_bits(exponent)


@_inner
def _two_atanh(s):
    """Return log((1 + s) / (1 - s)) for |s| <= 0.1716, by its series in s**2."""
    z = s * s
    p = 1.0 / 21.0
    p = p * z + 1.0 / 19.0
    p = p * z + 1.0 / 17.0
    p = p * z + 1.0 / 15.0
    p = p * z + 1.0 / 13.0
    p = p * z + 1.0 / 11.0
    p = p * z + 1.0 / 9.0
    p = p * z + 1.0 / 7.0
    p = p * z + 1.0 / 5.0
    p = p * z + 1.0 / 3.0
    return 2.0 * s + 2.0 * s * (z * p)


@_inner
def log1p(u):
    """Return log(1 + u) for 0 <= u <= 1, within two units in the last place.

    The series is taken of 1 + u where that is below √2, else of (1 + u) / 2.
    """
    high = u > 0.41421356237309503
    s = (u - 1.0) / (u + 3.0) if high else u / (2.0 + u)
    return (0.6931471805599453 if high else 0.0) + _two_atanh(s)


@_inner
def log(x):
    """Return log(x) for a normal positive x, within two units in the last place.

    The exponent apart, the series is taken of a mantissa between √½ and √2.
    """
    bits: Any = _bits_of_double(x)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    m = _double_of_bits((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000)
    high = m > 1.4142135623730951
    m = 0.5 * m if high else m
    k = float(exponent + 1) if high else float(exponent)
    return k * _LN2_HIGH + (_two_atanh((m - 1.0) / (m + 1.0)) + k * _LN2_LOW)


@_inner
def _cos_pi(x):
    """Return cos(π x) for 0 <= x <= 1, to 1e-15."""
    flip = x > 0.5
    a = np.pi * (1.0 - x if flip else x)
    z = a * a
    term = 1.0
    total = 1.0
    for i in range(1, 13):
        term = -term * z / float((2 * i - 1) * (2 * i))
        total += term
    return -total if flip else total


# --- losses ----------------------------------------------------------------------------------------------------------
@_phase
def _shape(loss, param):
    """Return (width, knee, bend, steep, over, under) of a loss; see `elementwise_loss`."""
    width, knee, bend, steep, over, under = 0.0, np.inf, 1.0, 0.0, 1.0, 1.0  # the squared error
    if loss == HUBER:
        knee = param
    elif loss == EPSILON_INSENSITIVE:
        width, knee, bend, steep = param, 0.0, 0.0, 1.0
    elif loss == SQUARED_EPSILON_INSENSITIVE:
        width, bend = param, 2.0
    elif loss == QUANTILE:
        knee, bend, steep, over, under = 0.0, 0.0, 1.0, 1.0 - param, param
    elif loss == HINGE:
        width, knee, bend, steep = 1.0, 0.0, 0.0, 1.0
    elif loss == PERCEPTRON:
        knee, bend, steep = 0.0, 0.0, 1.0
    elif loss == SQUARED_HINGE:
        width, bend = 1.0, 2.0
    elif loss == MODIFIED_HUBER:
        width, knee, bend = 1.0, 2.0, 2.0
    return width, knee, bend, steep, over, under


@_phase
def elementwise_loss(loss, param, p, y, value, slope, curve, n):
    """Fill value, slope and curve: n losses and their first and second derivatives in the predictions p.

    Targets y are ±1 for classes. Formulas stand in `streamgd.learn.losses`. All but log_loss are one function of the
    excess o: bend · (o²/2 up to the knee, straight on from there) + steep · o. For a residual r = p − y the excess is
    max(0, |r| − width), and all is times over or under by the sign of r; for a margin z = y p it is max(0, width − z).
    Two loops instead of nine save a second of compilation.
    """
    width, knee, bend, steep, over, under = _shape(loss, param)
    if loss == LOG_LOSS:
        for i in range(n):
            z = y[i] * p[i]
            u = exp(-abs(z))  # in (0, 1]: never overflows
            share = u / (1.0 + u)
            value[i] = log1p(u) + (0.0 if z > 0 else -z)
            slope[i] = -y[i] * (share if z > 0 else 1.0 - share)  # 1 / (1 + exp(z))
            curve[i] = share * (1.0 - share)
    elif loss < LOG_LOSS:
        for i in range(n):
            r = p[i] - y[i]
            v = abs(r) - width
            o = 0.0 if v <= 0 else v  # NaN stays NaN
            m = knee if o > knee else o
            side = over if r > 0 else under
            s = side * (bend * m + (steep if v > 0 else 0.0))
            value[i] = side * (bend * m * (o - 0.5 * m) + steep * o)
            slope[i] = s if r > 0 else -s
            curve[i] = bend if 0 <= v <= knee else 0.0
    else:
        for i in range(n):
            v = width - y[i] * p[i]
            o = 0.0 if v <= 0 else v
            m = knee if o > knee else o
            value[i] = bend * m * (o - 0.5 * m) + steep * o
            slope[i] = -y[i] * (bend * m + (steep if v >= 0 else 0.0))  # a perceptron at 0 must start to move
            curve[i] = bend if 0 <= v <= knee else 0.0


@_phase
def softmax_loss(P, classes, value, slope, share, peak, total, n_outputs, n):
    """Fill value, slope and share: softmax cross-entropy of n rows, its derivatives and the probabilities.

    P, slope and share hold n numbers for each output in turn, value one for each row; peak and total are work space.
    """
    for i in range(n):
        peak[i] = P[i]
        total[i] = 0.0
    for k in range(1, n_outputs):
        p = ahead(P, k * n)
        for i in range(n):
            peak[i] = p[i] if p[i] > peak[i] else peak[i]
    for k in range(n_outputs):
        p, s = ahead(P, k * n), ahead(share, k * n)
        for i in range(n):
            e = exp(p[i] - peak[i])
            s[i] = e
            total[i] += e
    for i in range(n):
        value[i] = log(total[i]) + peak[i]
        total[i] = 1.0 / total[i]
    for k in range(n_outputs):
        s, g = ahead(share, k * n), ahead(slope, k * n)
        for i in range(n):
            s[i] *= total[i]
            g[i] = s[i]
    for i in range(n):
        chosen = int(classes[i]) * n + i
        value[i] -= P[chosen]
        slope[chosen] -= 1.0


# --- one batch -------------------------------------------------------------------------------------------------------
@_phase
def _eta(codes, params, scalars, t):
    """Learning rate of update t, counted from 1."""
    schedule = codes[CODE_SCHEDULE]
    eta0 = params[PARAM_ETA0]
    if schedule == OPTIMAL:
        return 1.0 / (params[PARAM_ALPHA] * (params[PARAM_OPTIMAL_START] + t - 1.0))
    if schedule == INVSCALING:
        power = params[PARAM_POWER_T]
        if power == 0.5:
            return eta0 / np.sqrt(t)
        if power == 0.25:
            return eta0 / np.sqrt(np.sqrt(t))
        if power == 1.0:
            return eta0 / t
        return eta0 * exp(-power * log(t))
    if schedule == COSINE:
        done = (t - 1.0) / params[PARAM_N_UPDATES]
        return eta0 * 0.5 * (1.0 + _cos_pi(done if done < 1.0 else 1.0))
    return eta0 * scalars[ETA_SCALE]


@_inner
def _shrink(value, by):
    """Move a value towards zero by an amount, and stop there: the proximal step of l1."""
    left = abs(value) - by
    left = left if left > 0 else 0.0
    return left if value > 0 else 0.0 - left  # never -0.0


@_phase
def _adagrad_step(grad, step, rate, sums, unit, n_outputs, width, eta):
    """Add the squared gradients to their sums; the steps are measured in each output's unit."""
    for k in range(n_outputs):
        g, G = ahead(grad, k * width), ahead(sums, k * width)
        largest = 0.0
        for j in range(width):
            G[j] += g[j] * g[j]
            largest = G[j] if G[j] > largest else largest
        floor, eta_k = _ADAGRAD_FLOOR * np.sqrt(largest), eta * unit[k]
        s, r = ahead(step, k * width), ahead(rate, k * width)
        for j in range(width):
            root = np.sqrt(G[j]) + floor
            r[j] = eta_k / root if root > 0 else 0.0
            s[j] = r[j] * g[j]


@_phase
def _guard(x, n, d, C, H, change, drift, w, grad, step, factors, n_outputs, rows, l2, softmax):
    """Fill the factors that keep the steps from overshooting the batch's minimum along them.

    The change of each row's prediction along the step is squared and weighted by the loss's second derivative. Under
    softmax that derivative is the variance of the change under the row's probabilities, hence less the square of its
    mean, the drift, and all outputs share one factor.
    """
    width = d + 1
    joint_along, joint_curve = 0.0, 0.0
    for i in range(n):
        drift[i] = 0.0
    for k in range(n_outputs):
        g, s, h = ahead(grad, k * width), ahead(step, k * width), ahead(H, k * n)
        for j in range(d):
            w[j] = s[j]
        dot_rows(x, n, w, d, s[d], change)
        for i in range(n):
            drift[i] += h[i] * change[i]
            change[i] = h[i] * change[i] * change[i]
        along = dot(g, s, width)
        curve = dot(C, change, n) / rows + l2 * dot(s, s, d)
        joint_along += along
        joint_curve += curve
        factors[k] = along / curve if curve > along else 1.0
    if softmax:
        for i in range(n):
            drift[i] *= drift[i]
        joint_curve -= dot(C, drift, n) / rows
        for k in range(n_outputs):
            factors[k] = joint_along / joint_curve if joint_curve > joint_along else 1.0


@_phase
def _sgd_step(theta, velocity, grad, step, rate, n_outputs, width, eta, momentum, nesterov, l2):
    """Plain steps, with optional momentum; scikit-learn's weight decay is applied to the coefficients at once."""
    if momentum > 0:
        share, later = (1.0, momentum) if nesterov else (0.0, 1.0)
        for j in range(n_outputs * width):
            velocity[j] = momentum * velocity[j] + grad[j]
            grad[j] = share * grad[j] + later * velocity[j]
    for j in range(n_outputs * width):
        step[j] = eta * grad[j]
        rate[j] = eta
    if l2 > 0:
        keep = 1.0 - eta * l2 if eta * l2 < 1.0 else 0.0
        for k in range(n_outputs):
            for j in range(width - 1):
                theta[k * width + j] *= keep


@_phase
def _adam_step(grad, step, rate, first, second, size, scalars, params, eta):
    """Adam's step."""
    beta_1, beta_2, epsilon = params[PARAM_BETA_1], params[PARAM_BETA_2], params[PARAM_EPSILON]
    scalars[BETA_1_POWER] *= beta_1
    scalars[BETA_2_POWER] *= beta_2
    unbias_1, unbias_2 = 1.0 - scalars[BETA_1_POWER], 1.0 - scalars[BETA_2_POWER]
    for j in range(size):
        g = grad[j]
        first[j] = beta_1 * first[j] + (1.0 - beta_1) * g
        second[j] = beta_2 * second[j] + (1.0 - beta_2) * g * g
        rate[j] = eta / (np.sqrt(second[j] / unbias_2) + epsilon)
        step[j] = rate[j] * (first[j] / unbias_1)


@_phase
def _dowg_step(theta, start, grad, step, rate, size, scalars, is_first):
    """DoWG's step: the rate is the largest distance travelled, squared, over the weighted gradients' norm."""
    for j in range(size):
        start[j] = theta[j] if is_first else start[j]
        step[j] = theta[j] - start[j]
    distance = np.sqrt(dot(step, step, size))
    r = distance if distance > scalars[DOWG_DISTANCE] else scalars[DOWG_DISTANCE]
    scalars[DOWG_DISTANCE] = r
    scalars[DOWG_SUM] += r * r * dot(grad, grad, size)
    eta = r * r / np.sqrt(scalars[DOWG_SUM]) if scalars[DOWG_SUM] > 0 else 0.0
    for j in range(size):
        rate[j] = eta
        step[j] = eta * grad[j]


@_phase
def _average_share(kind, start, t):
    """Return how far the running average moves towards the coefficients after update t."""
    since = t - start + 1.0
    share = 1.0 / since if since > 1.0 else 1.0
    share = 9.0 / (t + 8.0) if kind == AVERAGE_POLYNOMIAL else share
    return 0.0 if kind == AVERAGE_NONE else share


@_phase
def _apply(theta, average, step, rate, factors, n_outputs, width, l1, share):
    """Take the steps, the proximal step of l1 behind them, and move the running average."""
    for k in range(n_outputs):
        first, factor = k * width, factors[k]
        for j in range(first, first + width):
            theta[j] -= factor * step[j]
        if l1 > 0:
            for j in range(first, first + width - 1):
                theta[j] = _shrink(theta[j], factor * rate[j] * l1)
    for j in range(n_outputs * width):
        average[j] += share * (theta[j] - average[j])


@_phase
def _targets(y, n_targets, T, n_outputs, n, classify, softmax):
    """Fill T as the losses want it: values, ±1 for two classes or one against the rest, class indices for softmax."""
    for k in range(1 if softmax else n_outputs):
        column = 0 if classify else k
        positive = 1.0 if n_outputs == 1 else float(k)
        for i in range(n):
            value = y[i * n_targets + column]
            sign = 1.0 if value == positive else -1.0
            T[k * n + i] = sign if classify and not softmax else value


@_phase
def _penalty(theta, n_outputs, width, l1, l2):
    """Value of the penalty at the coefficients."""
    total = 0.0
    if l1 > 0 or l2 > 0:
        for k in range(n_outputs):
            for j in range(k * width, k * width + width - 1):
                total += l1 * abs(theta[j]) + 0.5 * l2 * theta[j] * theta[j]
    return total


@_phase
def _row_weights(weight, has_weight, class_weight, has_factors, y, n_targets, C, n):
    """Fill C with the weight of each row."""
    for i in range(n):
        C[i] = 1.0
    if has_weight:
        copy(weight, C, n)
    if has_factors:
        for i in range(n):
            C[i] *= class_weight[int(y[i * n_targets])]


@_phase
def _within(values, n, limit):
    """Whether n values are below the limit in size; NaN is not."""
    within = True
    for i in range(n):
        within &= abs(values[i]) < limit
    return within


@_phase
def _add_batch_moments(x, n, d, sums, squares):
    """Add a batch's features and their squares to the sums, four rows at a time counted from the batch's start."""
    whole = n - n % 4
    for i in range(0, whole, 4):
        x0, x1, x2, x3 = ahead(x, i * d), ahead(x, (i + 1) * d), ahead(x, (i + 2) * d), ahead(x, (i + 3) * d)
        for j in range(d):
            sums[j] += np.float64((x0[j] + x1[j]) + (x2[j] + x3[j]))
            squares[j] += np.float64((x0[j] * x0[j] + x1[j] * x1[j]) + (x2[j] * x2[j] + x3[j] * x3[j]))
    for i in range(whole, n):
        row = ahead(x, i * d)
        for j in range(d):
            sums[j] += np.float64(row[j])
            squares[j] += np.float64(row[j] * row[j])


@_phase
def _intercept_gradient(slopes, ones, p, n, mean_weight):
    """Sum the rows' weighted derivatives; a sum within its own rounding error counts as zero.

    The intercept starts where this sum is zero in exact arithmetic. Steps that are divided by √G would blow what is
    left of it, which depends on the order of the rows, up to steps of full size.
    """
    total = dot(ones, slopes, n)
    size = dot(slopes, slopes, n) + mean_weight * mean_weight * dot(p, p, n)
    return total if abs(total) > _ROUNDING * np.sqrt(n * size) else 0.0


@_phase
def _gradients(x, n, d, C, ones, P, D, r, g, theta, grad, n_outputs, l2, mean_weight, intercept):
    """Weight the slopes D, and fill grad: the weighted mean of the rows' gradients, and that of the l2 part."""
    rows = n * mean_weight
    for k in range(n_outputs):
        first, slopes = k * (d + 1), ahead(D, k * n)
        for i in range(n):
            slopes[i] *= C[i]
            r[i] = slopes[i]
        sum_rows(x, n, d, r, g)
        for j in range(d):
            grad[first + j] = g[j] / rows + l2 * theta[first + j]
        grad[first + d] = 0.0
        if intercept:
            grad[first + d] = _intercept_gradient(slopes, ones, ahead(P, k * n), n, mean_weight) / rows


@_phase
def _next_batch(X, y, weight, row, stop, carry_X, carry_y, carry_weight, counters):
    """Find the next batch: where it lies whole in the window, or copied behind the rows that were waiting.

    Returns the addresses of its features, targets and weights, its number of rows, the next row to copy, and whether
    it was copied.
    """
    filled, batch, d, n_targets = counters[N_CARRY], carry_X.shape[0], X.shape[1], y.shape[1]
    x, b_y, b_weight = address(X, row), address(y, row), address(weight, row)
    carried = filled > 0 or stop - row < batch
    n = batch
    if carried:
        take = min(batch - filled, stop - row)
        copy(x, address(carry_X, filled), take * d)
        copy(b_y, address(carry_y, filled), take * n_targets)
        if weight.size:
            copy(b_weight, address(carry_weight, filled), take)
        x, b_y, b_weight = address(carry_X, 0), address(carry_y, 0), address(carry_weight, 0)
        row += take
        n = filled + take
        counters[N_CARRY] = n
    return x, b_y, b_weight, n, row, carried


@_phase
def _predictions(x, n, d, w, theta, P, n_outputs):
    """Fill P: n predictions for each output in turn."""
    for k in range(n_outputs):
        first = k * (d + 1)
        for j in range(d):
            w[j] = theta[first + j]
        dot_rows(x, n, w, d, theta[first + d], ahead(P, k * n))


# --- what the loop calls ---------------------------------------------------------------------------------------------
@_entry
def consume(
    X, y, weight, ids, start, stop, close, state, carry, checksum, moments, codes, params, class_weight, target_scale
):
    """Train on rows start to stop of a window; everything that changes, the cursor included, changes in this one call.

    Parameters
    ----------
    X, y, weight, ids : ndarrays
        The window's rows: (capacity, n_features) in the row dtype, (capacity, n_targets) float64, (capacity,) float64
        or empty, (capacity,) uint64. C-contiguous, as are all arrays here.
    start, stop : int
        Rows to consume.
    close : bool
        Whether the batch that is open after them is closed: an update with the rows it has.
    state : tuple
        (theta, average, slots, scalars, counters) of `streamgd.learn.state.State`, updated in place.
    carry : tuple
        (carry_X, carry_y, carry_weight), the open batch, updated in place.
    checksum, moments : ndarrays
        Updated in place.
    codes, params : ndarrays
        `streamgd.learn.recipe.Packed`.
    class_weight : ndarray of shape (n_classes,) or (0,)
        Factor of each class.
    target_scale : ndarray of shape (n_outputs,)
        The target's standard deviations.
    """
    theta_2d, average_2d, slots, scalars_1d, counters_1d = state
    carry_X, carry_y, carry_weight = carry
    (n_outputs, width), (batch, d), (_, n_targets) = theta_2d.shape, carry_X.shape, y.shape
    size, tall = n_outputs * width, n_outputs * batch
    # Addresses of arguments hold: the caller has the arrays.
    theta, average, slot = address(theta_2d, 0), address(average_2d, 0), address(slots, 0)
    scalars, counters = address(scalars_1d, 0), address(counters_1d, 0)
    code, param = address(codes, 0), address(params, 0)
    narrow = np.empty(2 * d + batch, X.dtype)
    work = np.empty(5 * tall + 4 * batch + 3 * size + n_outputs)
    for i in range(5 * tall, work.size):
        work[i] = 1.0
    softmax, classify, optimizer = code[CODE_SOFTMAX] != 0, code[CODE_CLASSES] > 0, code[CODE_OPTIMIZER]
    l1, l2, mean_weight = param[PARAM_L1], param[PARAM_L2], param[PARAM_MEAN_WEIGHT]
    grad_l2 = 0.0 if optimizer == SGD else l2  # sgd decays the coefficients instead
    row = start
    while counters[STATUS] == OK and (row < stop or (close and counters[N_CARRY] > 0)):
        w, g, r = address(narrow, 0), address(narrow, d), address(narrow, 2 * d)
        P, T, L = address(work, 0), address(work, tall), address(work, 2 * tall)
        D, H, C = address(work, 3 * tall), address(work, 4 * tall), address(work, 5 * tall)
        ones, change, drift = ahead(C, batch), ahead(C, 2 * batch), ahead(C, 3 * batch)
        grad = ahead(C, 4 * batch)
        step, rate, factors = ahead(grad, size), ahead(grad, 2 * size), ahead(grad, 3 * size)
        x, b_y, b_weight, n, row, carried = _next_batch(
            X, y, weight, row, stop, carry_X, carry_y, carry_weight, counters
        )
        if n < batch and not close:
            break
        rows = n * mean_weight
        _predictions(x, n, d, w, theta, P, n_outputs)
        _targets(b_y, n_targets, T, n_outputs, n, classify, softmax)
        _row_weights(b_weight, weight.size > 0, address(class_weight, 0), class_weight.size > 0, b_y, n_targets, C, n)
        if softmax:
            softmax_loss(P, T, L, D, H, change, drift, n_outputs, n)
            loss = dot(C, L, n)
        else:
            elementwise_loss(code[CODE_LOSS], param[PARAM_LOSS], P, T, L, D, H, n_outputs * n)
            loss = 0.0
            for k in range(n_outputs):
                loss += dot(C, ahead(L, k * n), n)
            loss /= n_outputs
        fine = _within(P, n_outputs * n, np.inf)
        _gradients(x, n, d, C, ones, P, D, r, g, theta, grad, n_outputs, grad_l2, mean_weight, code[CODE_INTERCEPT])
        if not (fine and abs(loss) < _HUGE and _within(grad, size, _STEEP)):
            counters[STATUS] = DIVERGED
            scalars[BAD_VALUE] = loss if fine and not abs(loss) < _HUGE else np.inf
            break
        # Nothing else of the state has changed so far; from here on all of it does.
        scalars[LOSS_SUM] += loss
        scalars[WEIGHT_SUM] += dot(C, ones, n)
        scalars[PENALTY_SUM] += n * _penalty(theta, n_outputs, width, l1, l2)
        if code[CODE_MOMENTS]:
            _add_batch_moments(x, n, d, address(moments, 0), address(moments, 1))
        t = counters[N_UPDATES] + 1.0
        eta = _eta(code, param, scalars, t)
        if optimizer in (AUTO, ADAGRAD):
            unit = address(target_scale, 0) if optimizer == AUTO else factors
            _adagrad_step(grad, step, rate, slot, unit, n_outputs, width, eta)
            if optimizer == AUTO:
                _guard(x, n, d, C, H, change, drift, w, grad, step, factors, n_outputs, rows, l2, softmax)
        elif optimizer == SGD:
            momentum, nesterov = param[PARAM_MOMENTUM], code[CODE_NESTEROV]
            _sgd_step(theta, slot, grad, step, rate, n_outputs, width, eta, momentum, nesterov, l2)
        elif optimizer == ADAM:
            _adam_step(grad, step, rate, slot, ahead(slot, size), size, scalars, param, eta)
        else:
            _dowg_step(theta, slot, grad, step, rate, size, scalars, counters[N_UPDATES] == 0)
        share = _average_share(code[CODE_AVERAGE], param[PARAM_AVERAGE_FROM], t)
        _apply(theta, average, step, rate, factors, n_outputs, width, l1, share)
        counters[N_UPDATES] += 1
        if carried:
            counters[N_CARRY] = 0
        else:
            row += batch
    seen = checksum[0]
    for i in range(start, row):
        seen += ids[i]
    checksum[0] = seen
    counters[ROW] = row
    counters[EPOCH_ROWS] += row - start
    counters[N_ROWS] += row - start


@_entry
def mean_loss(y, weight, decisions, codes, params, class_weight):
    """Weighted mean loss of some predictions.

    Parameters
    ----------
    y : ndarray of shape (n_rows, n_targets), float64, C-contiguous
        Targets or class indices.
    weight : ndarray of shape (n_rows,), float64
        Weight of each row.
    decisions : ndarray of shape (n_rows, n_outputs) or (1, n_outputs), float64
        The predictions, before any link; a single row stands for all rows.
    codes, params, class_weight : ndarrays
        As in `consume`.
    """
    (n_decisions, n_outputs), (n_rows, n_targets), most = decisions.shape, y.shape, 1024
    softmax, classify = codes[CODE_SOFTMAX] != 0, codes[CODE_CLASSES] > 0
    tall = n_outputs * most
    work = np.empty(5 * tall + 3 * most)
    total, weights = 0.0, 0.0
    for first in range(0, n_rows, most):
        P, T, L = address(work, 0), address(work, tall), address(work, 2 * tall)
        D, H, C = address(work, 3 * tall), address(work, 4 * tall), address(work, 5 * tall)
        n = min(most, n_rows - first)
        for k in range(n_outputs):
            for i in range(n):
                P[k * n + i] = decisions[first + i if n_decisions > 1 else 0, k]
        b_y = address(y, first)
        _targets(b_y, n_targets, T, n_outputs, n, classify, softmax)
        for i in range(n):
            C[i] = weight[first + i]
            if class_weight.size:
                C[i] *= class_weight[int(b_y[i * n_targets])]
        if softmax:
            softmax_loss(P, T, L, D, H, ahead(C, most), ahead(C, 2 * most), n_outputs, n)
        else:
            elementwise_loss(codes[CODE_LOSS], params[PARAM_LOSS], P, T, L, D, H, n_outputs * n)
        n_losses = 1 if softmax else n_outputs
        for i in range(n):
            weights += C[i]
            for k in range(n_losses):
                total += C[i] * L[k * n + i] / n_losses
    return total / weights if weights > 0 else 0.0


@_entry
def add_moments(X, weight, mean, squares, total):
    """Add rows to running weighted means and sums of squared deviations, one row after the other.

    Parameters
    ----------
    X : ndarray of shape (n_rows, n_columns), float64
        Rows to add.
    weight : ndarray of shape (n_rows,) or (0,), float64
        Their weights; 1 if empty.
    mean, squares : ndarrays of shape (n_columns,), float64
        Updated in place.
    total : ndarray of shape (1,), float64
        Weight so far, updated in place.

    References
    ----------
    West (1979), Updating mean and variance estimates, CACM 22(9): δ = x − μ, μ += w δ / W, S += w δ (x − μ).
    """
    for i in range(X.shape[0]):
        w = weight[i] if weight.size else 1.0
        if w == 0.0:
            continue
        total[0] += w
        share = w / total[0]
        for j in range(X.shape[1]):
            gap = X[i, j] - mean[j]
            mean[j] += share * gap
            squares[j] += w * gap * (X[i, j] - mean[j])
