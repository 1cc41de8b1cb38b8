"""All compiled code of learning: consume rows of a window, update the state.

One file, because Numba's cache notices only a change of the file that holds the compiled function; for the same reason
every number that the compiled code branches on, or finds its place by, is defined here and imported elsewhere. Losses,
optimizers, schedules and penalties are integer codes with runtime branches, so that one compilation serves them all.

Same bits everywhere: no fastmath; sums run in an order fixed by the row, the batch and the number of features alone
(`row_dot` spells its 16 accumulators out, gradients take four rows at a time counted from the batch's start); `exp` and
`log` are computed here, because those of the C library differ between CPU types. Batches are always computed whole: the
rows of a batch that a window's end cuts in two wait in the state.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

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

# Division by zero gives infinity or NaN as in NumPy: Python's check would keep loops from vectorising. Inner functions
# are compiled into their callers, so the wrappers that let Python call them would only cost compile time.
_SHARED: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_njit: Any = nb.njit
_entry = _njit(cache=True, **_SHARED)
_inner = _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_SHARED)

#: A prediction or loss beyond this counts as divergence: its square would overflow.
_HUGE = 1e150
#: AdaGrad's guard against dividing noise by noise: this share of the largest √G of the same output.
_ADAGRAD_FLOOR = 1e-9
#: A sum below this share of the size of its terms is rounding: that of the terms, which come from means that are rounded
#: themselves, included.
_ROUNDING = 1e-14


# --- arithmetic with the same bits on every CPU ----------------------------------------------------------------------
@intrinsic
def _double_of_bits(typingctx: Any, bits: Any) -> Any:
    """Read the 64 bits of an integer as a double."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic
def _bits_of_double(typingctx: Any, value: Any) -> Any:
    """Read a double as a 64-bit integer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(types.float64), codegen


@intrinsic
def row_dot(typingctx: Any, A: Any, i: Any, B: Any, k: Any, n: Any) -> Any:
    """Dot product of the first n elements of row i of A and row k of B, both 2-D and C-contiguous.

    Sixteen accumulators, then the 8, 4, 2 and 1 left-over elements while the accumulators are folded in halves: an
    order that depends on n alone. Spelt as vector instructions because the compiler may not reorder a strict sum.
    """
    if not (isinstance(A, types.Array) and isinstance(B, types.Array) and A.dtype == B.dtype):
        return None
    signature = A.dtype(A, types.intp, B, types.intp, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a_type, _, b_type, _, _ = signature.args
        element = context.get_value_type(a_type.dtype)
        align = a_type.dtype.bitwidth // 8

        def row_start(array_type: Any, value: Any, index: Any) -> Any:
            array = context.make_array(array_type)(context, builder, value)
            width = builder.extract_value(array.shape, 1)
            return builder.gep(array.data, [builder.mul(index, width)], source_etype=element)

        a_row, b_row = row_start(a_type, args[0], args[1]), row_start(b_type, args[2], args[3])
        n_elements = args[4]
        intp = n_elements.type

        def load(base: Any, offset: Any, lanes: int) -> Any:
            vector = ir.VectorType(element, lanes)
            pointer = builder.bitcast(builder.gep(base, [offset], source_etype=element), vector.as_pointer())
            return builder.load(pointer, align=align, typ=vector)

        def product(offset: Any, lanes: int) -> Any:
            return builder.fmul(load(a_row, offset, lanes), load(b_row, offset, lanes))

        def fold(vector: Any, lanes: int) -> Any:
            def part(first: int) -> Any:
                lanes_of = ir.VectorType(ir.IntType(32), lanes // 2)
                return builder.shuffle_vector(
                    vector, vector, ir.Constant(lanes_of, list(range(first, first + lanes // 2)))
                )

            return builder.fadd(part(0), part(lanes // 2))

        sixteen = ir.VectorType(element, 16)
        zero = ir.Constant(sixteen, [0.0] * 16)
        slot = cgutils.alloca_once_value(builder, zero)
        builder.store(zero, slot)
        whole = builder.and_(n_elements, ir.Constant(intp, -16))
        bounds = (ir.Constant(intp, 0), whole, ir.Constant(intp, 16))
        with cgutils.for_range_slice(builder, *bounds, intp=intp) as (offset, _):
            builder.store(builder.fadd(builder.load(slot, typ=sixteen), product(offset, 16)), slot)
        total = fold(builder.load(slot, typ=sixteen), 16)
        offset = whole
        for lanes in (8, 4, 2, 1):
            slot = cgutils.alloca_once_value(builder, total)
            builder.store(total, slot)
            left = builder.and_(n_elements, ir.Constant(intp, lanes))
            with builder.if_then(builder.icmp_unsigned("!=", left, ir.Constant(intp, 0))):
                builder.store(builder.fadd(total, product(offset, lanes)), slot)
            offset = builder.add(offset, left)
            total = builder.load(slot, typ=ir.VectorType(element, lanes))
            if lanes > 1:
                total = fold(total, lanes)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return signature, codegen


_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_INVERSE_LN2 = 1.4426950408889634
_ROUNDER = 6755399441055744.0  # 1.5 * 2**52: adding it leaves the nearest integer in the low bits
_ROUNDER_BITS = 0x4338000000000000


@_inner
def exp(x):
    """Return e**x, to a unit in the last place or so; x is clamped to [-708, 709]. Branch-free, so loops vectorise.

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
    """Return log((1 + s) / (1 - s)) for |s| <= 1/3, by its series in s**2."""
    z = s * s
    p = 1.0 / 35.0
    p = p * z + 1.0 / 33.0
    p = p * z + 1.0 / 31.0
    p = p * z + 1.0 / 29.0
    p = p * z + 1.0 / 27.0
    p = p * z + 1.0 / 25.0
    p = p * z + 1.0 / 23.0
    p = p * z + 1.0 / 21.0
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
    """Return log(1 + u) for 0 <= u <= 1."""
    return _two_atanh(u / (2.0 + u))


@_inner
def log(x):
    """Return log(x) for a normal positive x: exponent and a mantissa between √½ and √2."""
    bits: Any = _bits_of_double(x)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    m = _double_of_bits((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000)
    high = m > 1.4142135623730951
    m = 0.5 * m if high else m
    k = float(exponent + 1) if high else float(exponent)
    return k * _LN2_HIGH + (_two_atanh((m - 1.0) / (m + 1.0)) + k * _LN2_LOW)


@_inner
def _cos_pi(x):
    """Return cos(π x) for 0 <= x <= 1."""
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
@_inner
def elementwise_loss(loss, param, P, T, L, D, H, k, n):
    """Fill row k of L, D and H: loss, its first and its second derivative in the prediction, for n rows.

    P holds predictions, T targets (±1 for classes). Formulas stand in `streamgd.learn.losses`.
    """
    p, y, value, slope, curve = P[k], T[k], L[k], D[k], H[k]
    if loss == SQUARED_ERROR:
        for i in range(n):
            r = p[i] - y[i]
            value[i] = 0.5 * r * r
            slope[i] = r
            curve[i] = 1.0
    elif loss == HUBER:
        for i in range(n):
            r = p[i] - y[i]
            near = abs(r) <= param
            value[i] = 0.5 * r * r if near else param * abs(r) - 0.5 * param * param
            slope[i] = r if near else (param if r > 0 else -param)
            curve[i] = 1.0 if near else 0.0
    elif loss == EPSILON_INSENSITIVE:
        for i in range(n):
            r = p[i] - y[i]
            out = abs(r) - param
            value[i] = out if out > 0 else 0.0
            slope[i] = (1.0 if r > 0 else -1.0) if out > 0 else 0.0
            curve[i] = 0.0
    elif loss == SQUARED_EPSILON_INSENSITIVE:
        for i in range(n):
            r = p[i] - y[i]
            out = abs(r) - param
            out = out if out > 0 else 0.0
            value[i] = out * out
            slope[i] = 2.0 * out if r > 0 else -2.0 * out
            curve[i] = 2.0 if out > 0 else 0.0
    elif loss == QUANTILE:
        for i in range(n):
            r = y[i] - p[i]
            value[i] = param * r if r > 0 else (param - 1.0) * r
            slope[i] = -param if r > 0 else (1.0 - param if r < 0 else 0.0)
            curve[i] = 0.0
    elif loss == LOG_LOSS:
        for i in range(n):
            z = y[i] * p[i]
            u = exp(-abs(z))  # in (0, 1]: never overflows
            share = u / (1.0 + u)
            wrong = share if z > 0 else 1.0 - share  # 1 / (1 + exp(z))
            value[i] = log1p(u) + (0.0 if z > 0 else -z)
            slope[i] = -y[i] * wrong
            curve[i] = wrong * (1.0 - wrong)
    elif loss in (HINGE, PERCEPTRON):
        threshold = 1.0 if loss == HINGE else 0.0
        for i in range(n):
            z = y[i] * p[i]
            value[i] = threshold - z if z <= threshold else 0.0
            slope[i] = -y[i] if z <= threshold else 0.0
            curve[i] = 0.0
    elif loss == SQUARED_HINGE:
        for i in range(n):
            out = 1.0 - y[i] * p[i]
            out = out if out > 0 else 0.0
            value[i] = out * out
            slope[i] = -2.0 * y[i] * out
            curve[i] = 2.0 if out > 0 else 0.0
    else:  # MODIFIED_HUBER
        for i in range(n):
            z = y[i] * p[i]
            out = 1.0 - z if z < 1.0 else 0.0
            value[i] = out * out if z >= -1.0 else -4.0 * z
            slope[i] = -2.0 * y[i] * out if z >= -1.0 else -4.0 * y[i]
            curve[i] = 2.0 if -1.0 <= z < 1.0 else 0.0


@_inner
def softmax_loss(P, T, L, D, H, n):
    """Softmax cross-entropy of n rows: loss in row 0 of L, derivatives in D, probabilities in H.

    P holds the K rows of predictions; row 0 of T the class index. Rows 1 of T and L are used as work space.
    """
    n_outputs = P.shape[0]
    for i in range(n):
        T[1, i] = P[0, i]
        L[1, i] = 0.0
    for k in range(1, n_outputs):
        for i in range(n):
            T[1, i] = P[k, i] if P[k, i] > T[1, i] else T[1, i]
    for k in range(n_outputs):
        for i in range(n):
            e = exp(P[k, i] - T[1, i])
            H[k, i] = e
            L[1, i] += e
    for i in range(n):
        L[0, i] = log(L[1, i]) + T[1, i]
        L[1, i] = 1.0 / L[1, i]
    for k in range(n_outputs):
        for i in range(n):
            share = H[k, i] * L[1, i]
            H[k, i] = share
            D[k, i] = share
    for i in range(n):
        k = int(T[0, i])
        L[0, i] -= P[k, i]
        D[k, i] -= 1.0


# --- one batch -------------------------------------------------------------------------------------------------------
@_inner
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
    return left if value > 0 else -left


@_inner
def _gradient(X, first, n, R, G, k):
    """Row k of G becomes the sum over n rows of R[k, i] * X[first + i], four rows at a time."""
    d = X.shape[1]
    for j in range(d):
        G[k, j] = 0
    whole = n - n % 4
    for i in range(0, whole, 4):
        r0, r1, r2, r3 = R[k, i], R[k, i + 1], R[k, i + 2], R[k, i + 3]
        x = first + i
        for j in range(d):
            G[k, j] += (r0 * X[x, j] + r1 * X[x + 1, j]) + (r2 * X[x + 2, j] + r3 * X[x + 3, j])
    for i in range(whole, n):
        r0 = R[k, i]
        for j in range(d):
            G[k, j] += r0 * X[first + i, j]


@_inner
def _intercept_gradient(C, D, P, k, n, mean_weight):
    """Sum row k of D, the rows' derivatives; a sum within its own rounding error counts as zero.

    The intercept starts where this sum is zero in exact arithmetic. Steps that are divided by √G would blow what is
    left of it, which depends on the order of the rows, up to steps of full size.
    """
    total: Any = row_dot(C, 3, D, k, n)
    size = row_dot(D, k, D, k, n) + mean_weight * mean_weight * row_dot(P, k, P, k, n)
    return total if abs(total) > _ROUNDING * np.sqrt(n * size) else 0.0


@_inner
def _adagrad_step(k, grad, delta, theta, slots, eta):
    """Add the squared gradient of output k to its sums and fill its step; return (gradient . step, floor)."""
    width = grad.shape[1]
    G = slots[0, k]
    largest = 0.0
    for j in range(width):
        G[j] += grad[k, j] * grad[k, j]
        largest = G[j] if G[j] > largest else largest
    floor = _ADAGRAD_FLOOR * np.sqrt(largest)
    along = 0.0
    for j in range(width):
        root = np.sqrt(G[j]) + floor
        delta[k, j] = eta * grad[k, j] / root if root > 0 else 0.0
    for j in range(width):
        along += grad[k, j] * delta[k, j]
    return along, floor


@_inner
def _step_along(X, first, n, C, H, S, W, delta, k):
    """Fill row k of S with each row's change of prediction along the step of output k."""
    d = X.shape[1]
    for j in range(d):
        W[k, j] = delta[k, j]
    for i in range(n):
        S[k, i] = row_dot(X, first + i, W, k, d) + delta[k, d]


@_inner
def _auto_update(X, first, n, C, H, S, W, theta, grad, delta, slots, codes, params, target_scale, eta):
    """AdaGrad's step, shrunk where it would overshoot the batch's minimum along it."""
    n_outputs, width = theta.shape
    d = width - 1
    l1, l2 = params[PARAM_L1], params[PARAM_L2]
    rows = n * params[PARAM_MEAN_WEIGHT]
    guard = codes[CODE_OPTIMIZER] == AUTO
    joint_along, joint_curve = 0.0, 0.0
    floors = np.empty(n_outputs)
    factors = np.ones(n_outputs)
    for k in range(n_outputs):
        rate = eta * target_scale[k] if guard else eta
        along, floors[k] = _adagrad_step(k, grad, delta, theta, slots, rate)
        if not guard:
            continue
        _step_along(X, first, n, C, H, S, W, delta, k)
        shrinkage = 0.0
        for j in range(d):
            shrinkage += delta[k, j] * delta[k, j]
        if codes[CODE_SOFTMAX]:
            joint_along += along
            joint_curve += l2 * shrinkage
        else:
            for i in range(n):
                S[k, i] = H[k, i] * S[k, i] * S[k, i]
            curve = row_dot(C, 0, S, k, n) / rows + l2 * shrinkage
            if curve > along:
                factors[k] = along / curve
    if guard and codes[CODE_SOFTMAX]:
        # Along the step the second derivative of a row's loss is the variance of the step under its probabilities.
        for i in range(n):
            C[1, i] = 0.0
            C[2, i] = 0.0
        for k in range(n_outputs):
            for i in range(n):
                C[1, i] += H[k, i] * S[k, i]
                C[2, i] += H[k, i] * S[k, i] * S[k, i]
        for i in range(n):
            C[2, i] -= C[1, i] * C[1, i]
        joint_curve += row_dot(C, 0, C, 2, n) / rows
        if joint_curve > joint_along:
            for k in range(n_outputs):
                factors[k] = joint_along / joint_curve
    for k in range(n_outputs):
        rate = eta * target_scale[k] if guard else eta
        for j in range(width):
            theta[k, j] -= factors[k] * delta[k, j]
        if l1 > 0:
            for j in range(d):
                root = np.sqrt(slots[0, k, j]) + floors[k]
                if root > 0:
                    theta[k, j] = _shrink(theta[k, j], factors[k] * rate * l1 / root)


@_inner
def _sgd_update(theta, grad, slots, codes, params, eta):
    """Plain steps with scikit-learn's weight decay, optional momentum, and the proximal l1 step."""
    n_outputs, width = theta.shape
    momentum, l1, l2 = params[PARAM_MOMENTUM], params[PARAM_L1], params[PARAM_L2]
    keep = 1.0 - eta * l2
    keep = keep if keep > 0 else 0.0
    for k in range(n_outputs):
        for j in range(width):
            step = grad[k, j]
            if momentum > 0:
                slots[0, k, j] = momentum * slots[0, k, j] + step
                step = step + momentum * slots[0, k, j] if codes[CODE_NESTEROV] else slots[0, k, j]
            kept = theta[k, j] * keep if (l2 > 0 and j < width - 1) else theta[k, j]
            theta[k, j] = kept - eta * step
            if l1 > 0 and j < width - 1:
                theta[k, j] = _shrink(theta[k, j], eta * l1)


@_inner
def _adam_update(theta, grad, slots, scalars, params, eta):
    """Adam's step, with the proximal l1 step in its metric."""
    n_outputs, width = theta.shape
    beta_1, beta_2, epsilon, l1 = params[PARAM_BETA_1], params[PARAM_BETA_2], params[PARAM_EPSILON], params[PARAM_L1]
    scalars[BETA_1_POWER] *= beta_1
    scalars[BETA_2_POWER] *= beta_2
    first, second = 1.0 - scalars[BETA_1_POWER], 1.0 - scalars[BETA_2_POWER]
    for k in range(n_outputs):
        for j in range(width):
            g = grad[k, j]
            slots[0, k, j] = beta_1 * slots[0, k, j] + (1.0 - beta_1) * g
            slots[1, k, j] = beta_2 * slots[1, k, j] + (1.0 - beta_2) * g * g
            rate = eta / (np.sqrt(slots[1, k, j] / second) + epsilon)
            theta[k, j] -= rate * (slots[0, k, j] / first)
            if l1 > 0 and j < width - 1:
                theta[k, j] = _shrink(theta[k, j], rate * l1)


@_inner
def _dowg_update(theta, grad, slots, scalars, counters, params):
    """DoWG's step: the rate is the largest distance travelled, squared, over the weighted gradients' norm."""
    n_outputs, width = theta.shape
    if counters[N_UPDATES] == 0:
        for k in range(n_outputs):
            for j in range(width):
                slots[0, k, j] = theta[k, j]
    distance, norm = 0.0, 0.0
    for k in range(n_outputs):
        for j in range(width):
            moved = theta[k, j] - slots[0, k, j]
            distance += moved * moved
            norm += grad[k, j] * grad[k, j]
    distance = np.sqrt(distance)
    if distance > scalars[DOWG_DISTANCE]:
        scalars[DOWG_DISTANCE] = distance
    r = scalars[DOWG_DISTANCE]
    scalars[DOWG_SUM] += r * r * norm
    if scalars[DOWG_SUM] > 0:
        rate = r * r / np.sqrt(scalars[DOWG_SUM])
        for k in range(n_outputs):
            for j in range(width):
                theta[k, j] -= rate * grad[k, j]
                if params[PARAM_L1] > 0 and j < width - 1:
                    theta[k, j] = _shrink(theta[k, j], rate * params[PARAM_L1])


@_inner
def _average(theta, average, codes, params, t):
    """Move the running average towards the coefficients after update t."""
    kind = codes[CODE_AVERAGE]
    if kind == AVERAGE_NONE:
        return
    if kind == AVERAGE_POLYNOMIAL:
        share = 9.0 / (t + 8.0)
    else:
        since = t - params[PARAM_AVERAGE_FROM] + 1.0
        share = 1.0 / since if since > 1.0 else 1.0
    for k in range(theta.shape[0]):
        for j in range(theta.shape[1]):
            average[k, j] += share * (theta[k, j] - average[k, j])


@_inner
def _targets(y, first, n, T, n_outputs, codes):
    """Fill T as the losses want it: values, ±1 for two classes or one against the rest, class indices for softmax."""
    n_classes = codes[CODE_CLASSES]
    if codes[CODE_SOFTMAX]:
        for i in range(n):
            T[0, i] = y[first + i, 0]
    elif n_classes == 0:
        for k in range(n_outputs):
            for i in range(n):
                T[k, i] = y[first + i, k]
    elif n_outputs == 1:
        for i in range(n):
            T[0, i] = 1.0 if y[first + i, 0] > 0 else -1.0
    else:
        for k in range(n_outputs):
            for i in range(n):
                T[k, i] = 1.0 if y[first + i, 0] == k else -1.0


@_inner
def _penalty(theta, params):
    """Value of the penalty at the coefficients."""
    l1, l2 = params[PARAM_L1], params[PARAM_L2]
    total = 0.0
    if l1 > 0 or l2 > 0:
        for k in range(theta.shape[0]):
            for j in range(theta.shape[1] - 1):
                total += l1 * abs(theta[k, j]) + 0.5 * l2 * theta[k, j] * theta[k, j]
    return total


@_inner
def _batch(X, first, n, y, weight, state, scratch, codes, params, class_weight, target_scale):
    """Loss, gradient and update of one whole batch: rows first to first + n. Leaves the state alone on divergence."""
    theta, average, slots, scalars, counters = state
    W, G, R, grad, delta, P, T, L, D, H, S, C = scratch
    n_outputs, width = theta.shape
    d = width - 1
    for k in range(n_outputs):
        for j in range(d):
            W[k, j] = theta[k, j]
        for i in range(n):
            P[k, i] = row_dot(X, first + i, W, k, d) + theta[k, d]
    if weight.size:
        for i in range(n):
            C[0, i] = weight[first + i]
    else:
        for i in range(n):
            C[0, i] = 1.0
    if class_weight.size:
        for i in range(n):
            C[0, i] *= class_weight[int(y[first + i, 0])]
    _targets(y, first, n, T, n_outputs, codes)
    softmax = codes[CODE_SOFTMAX] != 0
    n_losses = 1 if softmax else n_outputs
    if softmax:
        softmax_loss(P, T, L, D, H, n)
    else:
        for k in range(n_outputs):
            elementwise_loss(codes[CODE_LOSS], params[PARAM_LOSS], P, T, L, D, H, k, n)
    loss = 0.0
    for k in range(n_losses):
        loss += row_dot(C, 0, L, k, n)
    loss /= n_losses
    finite = True
    for k in range(n_outputs):
        for i in range(n):
            finite &= abs(P[k, i]) < _HUGE
    if not finite or not abs(loss) < _HUGE:
        counters[STATUS] = DIVERGED
        scalars[BAD_VALUE] = loss
        return
    scalars[LOSS_SUM] += loss
    scalars[WEIGHT_SUM] += row_dot(C, 0, C, 3, n)
    scalars[PENALTY_SUM] += n * _penalty(theta, params)

    rows = n * params[PARAM_MEAN_WEIGHT]
    for k in range(n_outputs):
        for i in range(n):
            D[k, i] *= C[0, i]
            R[k, i] = D[k, i]
        _gradient(X, first, n, R, G, k)
        for j in range(d):
            grad[k, j] = G[k, j] / rows
        grad[k, d] = 0.0
        if codes[CODE_INTERCEPT]:
            grad[k, d] = _intercept_gradient(C, D, P, k, n, params[PARAM_MEAN_WEIGHT]) / rows
        if codes[CODE_OPTIMIZER] != SGD and params[PARAM_L2] > 0:
            for j in range(d):
                grad[k, j] += params[PARAM_L2] * theta[k, j]

    t = counters[N_UPDATES] + 1.0
    optimizer = codes[CODE_OPTIMIZER]
    eta = _eta(codes, params, scalars, t)
    if optimizer in (AUTO, ADAGRAD):
        _auto_update(X, first, n, C, H, S, W, theta, grad, delta, slots, codes, params, target_scale, eta)
    elif optimizer == SGD:
        _sgd_update(theta, grad, slots, codes, params, eta)
    elif optimizer == ADAM:
        _adam_update(theta, grad, slots, scalars, params, eta)
    else:
        _dowg_update(theta, grad, slots, scalars, counters, params)
    _average(theta, average, codes, params, t)
    counters[N_UPDATES] += 1


@_inner
def _scratch(n_outputs, d, batch, rows_like):
    """Work space of one call: coefficients and gradients in the rows' dtype, the rest in float64."""
    narrow = rows_like.dtype
    two = max(n_outputs, 2)
    W = np.zeros((n_outputs, d), narrow)
    G = np.zeros((n_outputs, d), narrow)
    R = np.zeros((n_outputs, batch), narrow)
    grad = np.zeros((n_outputs, d + 1))
    delta = np.zeros((n_outputs, d + 1))
    P = np.zeros((n_outputs, batch))
    T = np.zeros((two, batch))
    L = np.zeros((two, batch))
    D = np.zeros((n_outputs, batch))
    H = np.zeros((n_outputs, batch))
    S = np.zeros((n_outputs, batch))
    C = np.ones((4, batch))  # rows: weights, two for softmax to work in, and ones to sum with
    return W, G, R, grad, delta, P, T, L, D, H, S, C


@_inner
def _append(carry, filled, X, y, weight, row, n):
    """Copy n rows behind those that the open batch has."""
    carry_X, carry_y, carry_weight = carry
    for i in range(n):
        for j in range(X.shape[1]):
            carry_X[filled + i, j] = X[row + i, j]
        for j in range(y.shape[1]):
            carry_y[filled + i, j] = y[row + i, j]
        if weight.size:
            carry_weight[filled + i] = weight[row + i]


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
        or empty, (capacity,) uint64.
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
    theta, counters = state[0], state[4]
    carry_X, carry_y, carry_weight = carry
    batch = carry_X.shape[0]
    scratch = _scratch(theta.shape[0], X.shape[1], batch, X)
    row = start
    while counters[STATUS] == OK and (row < stop or (close and counters[N_CARRY] > 0)):
        filled = counters[N_CARRY]
        n = batch
        carried = filled > 0 or stop - row < batch
        if carried:
            take = min(batch - filled, stop - row)
            _append(carry, filled, X, y, weight, row, take)
            counters[N_CARRY] = filled + take
            row += take
            if filled + take < batch:
                if not close:
                    break
                n = filled + take
        # One call for both, so that the batch's code is compiled once.
        batch_X, batch_y, batch_weight = (carry_X, carry_y, carry_weight) if carried else (X, y, weight)
        first = 0 if carried else row
        _batch(batch_X, first, n, batch_y, batch_weight, state, scratch, codes, params, class_weight, target_scale)
        if counters[STATUS] == OK:
            if carried:
                counters[N_CARRY] = 0
            else:
                row += batch
    seen = checksum[0]
    for i in range(start, row):
        seen += ids[i]
    checksum[0] = seen
    if codes[CODE_MOMENTS]:
        for i in range(start, row):
            for j in range(X.shape[1]):
                z = float(X[i, j])
                moments[0, j] += z
                moments[1, j] += z * z
    counters[ROW] = row
    counters[EPOCH_ROWS] += row - start
    counters[N_ROWS] += row - start


@_entry
def mean_loss(y, weight, decisions, codes, params, class_weight):
    """Weighted mean loss of some predictions.

    Parameters
    ----------
    y : ndarray of shape (n_rows, n_targets), float64
        Targets or class indices.
    weight : ndarray of shape (n_rows,), float64
        Weight of each row.
    decisions : ndarray of shape (n_rows, n_outputs) or (1, n_outputs), float64
        The predictions, before any link; a single row stands for all rows.
    codes, params, class_weight : ndarrays
        As in `consume`.
    """
    n_outputs, tile = decisions.shape[1], 1024
    step = 0 if decisions.shape[0] == 1 else 1
    P, D, H = np.zeros((n_outputs, tile)), np.zeros((n_outputs, tile)), np.zeros((n_outputs, tile))
    T, L = np.zeros((max(n_outputs, 2), tile)), np.zeros((max(n_outputs, 2), tile))
    n_losses = 1 if codes[CODE_SOFTMAX] else n_outputs
    total, weights = 0.0, 0.0
    for first in range(0, y.shape[0], tile):
        n = min(tile, y.shape[0] - first)
        for k in range(n_outputs):
            for i in range(n):
                P[k, i] = decisions[step * (first + i), k]
        _targets(y, first, n, T, n_outputs, codes)
        if codes[CODE_SOFTMAX]:
            softmax_loss(P, T, L, D, H, n)
        else:
            for k in range(n_outputs):
                elementwise_loss(codes[CODE_LOSS], params[PARAM_LOSS], P, T, L, D, H, k, n)
        for i in range(n):
            w = weight[first + i]
            if class_weight.size:
                w *= class_weight[int(y[first + i, 0])]
            weights += w
            for k in range(n_losses):
                total += w * L[k, i] / n_losses
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
