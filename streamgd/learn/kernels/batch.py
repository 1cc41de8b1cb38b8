"""One call of `consume`: batches are found, computed and applied, one after the other.

Rows pass through in tiles that stay in the first-level cache: their predictions, losses and slopes, and their part of
the gradient, before the next tile. The default step needs the rows again once the step is known, to see how far along
it the batch's loss falls; a batch that is not too large is still in the second-level cache then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from streamgd.learn import codes as c
from streamgd.learn.kernels import losses, rows
from streamgd.learn.kernels.llvm import (
    BOOL,
    F64,
    I64,
    LANES,
    Code,
    Pointer,
    Value,
    absolute,
    function,
    smaller,
    sqrt,
    where,
)
from streamgd.learn.kernels.steps import Step, apply_step, dot, largest, penalty, take_step, total

#: A loss beyond this counts as divergence, and a gradient beyond its root: squares and their sums must not overflow.
_HUGE, _STEEP = 1e150, 1e75
#: A sum below this share of the size of its terms is rounding: that of the terms, which come from means that are
#: rounded themselves, included.
_ROUNDING = 1e-14
#: Outputs up to this number are computed one by one, more of them together.
FEW = 2
#: Bytes of rows that a tile should have, and of a batch that stays in the second-level cache between two passes.
_TILE_BYTES, _CACHED_BYTES = 32_768, 262_144
#: Bytes between the rows that are computed and those that are asked for; less, and they come too late.
_AHEAD_BYTES = 8_192
#: Rows of a tile are padded to a multiple of this.
_PAD = losses.LANES

#: Work space, by its place in `Scratch.places`: first arrays of doubles, then arrays of the rows' type.
DOUBLES = ("P", "T", "C", "H", "sums", "totals", "grad", "step", "rate", "factors", "moments")
NARROW = ("w", "g", "slopes", "turned")
TILE = len(DOUBLES) + len(NARROW)


@dataclass(frozen=True)
class Scratch:
    """Where compiled code finds its work space.

    Attributes
    ----------
    places : ndarray of int64
        Where each array of `DOUBLES` and of `NARROW` begins, and the rows of a tile.
    n_doubles, n_narrow : int
        Numbers of both kinds.
    """

    places: NDArray[np.int64]
    n_doubles: int
    n_narrow: int


@lru_cache(maxsize=64)
def scratch(n_outputs: int, n_features: int, batch: int, itemsize: int) -> Scratch:
    """Lay the work space out."""
    tile = 64 if n_outputs <= FEW else 32
    while tile > 8 and tile * n_features * itemsize > _TILE_BYTES and n_outputs <= FEW:
        tile //= 2
    tall = -(-batch // tile) * tile
    size = n_outputs * (n_features + 1)
    lanes = rows.LINE // itemsize
    sizes = {
        "P": n_outputs * tile,
        "T": n_outputs * tile,
        "C": tall,
        "H": n_outputs * tall,
        "sums": n_outputs * losses.N_SUMS * losses.LANES,
        "totals": n_outputs * losses.LANES,
        "grad": size,
        "step": size,
        "rate": size,
        "factors": n_outputs,
        "moments": 2 * n_features,
        "w": n_outputs * (n_features + lanes),
        "g": n_outputs * (n_features + lanes),
        "slopes": n_outputs * tile,
        "turned": lanes * n_features if n_outputs > FEW else 0,
    }
    places, ends = [], []
    for names in (DOUBLES, NARROW):
        end = 0
        for name in names:
            places.append(end)
            end += -(-sizes[name] // 16) * 16
        ends.append(end + rows.LINE)  # addresses are rounded up to a line
    return Scratch(np.array([*places, tile], np.int64), *ends)


class Call:
    """What one call of `consume` has at hand: its arguments, and what follows from them.

    Parameters
    ----------
    arrays, shapes : dict of str to Pointer, and to list of Value
        The arrays by the names of `streamgd.learn.kernels.entries.CONSUME`; ``cursor`` holds start, stop and close.
    """

    def __init__(self, arrays: dict[str, Pointer], shapes: dict[str, list[Value]]) -> None:
        cursor = arrays["cursor"]
        self.start, self.stop, self.close = cursor[0], cursor[1], cursor[2] != 0
        self.X, self.y, self.weight, self.ids = (arrays[name] for name in ("X", "y", "weight", "ids"))
        self.theta, self.average, self.slots = (arrays[name] for name in ("theta", "average", "slots"))
        self.subgradient = arrays["subgradient"]
        self.scalars, self.counters = arrays["scalars"], arrays["counters"]
        self.carry = tuple(arrays[name] for name in ("carry_X", "carry_y", "carry_weight"))
        self.checksum, self.moments = arrays["checksum"], arrays["moments"]
        self.codes, self.params = arrays["codes"], arrays["params"]
        self.class_weight, self.target_scale = arrays["class_weight"], arrays["target_scale"]
        places = arrays["places"]
        self.work: dict[str, Pointer] = {}
        for first, names, area in ((0, DOUBLES, arrays["doubles"]), (len(DOUBLES), NARROW, arrays["narrow"])):
            begin = area.aligned()
            self.work |= {name: begin + places[place] for place, name in enumerate(names, first)}
        self.tile = places[TILE]
        self.batch, self.d = shapes["carry_X"]
        self.n_targets, self.n_outputs = shapes["y"][1], shapes["theta"][0]
        self.has_weight, self.has_factors = (shapes[name][0] > 0 for name in ("weight", "class_weight"))
        self.width = self.d + 1
        self.size = self.n_outputs * self.width
        self.classify = self.codes[c.CODE_CLASSES] > 0
        self.softmax = self.codes[c.CODE_SOFTMAX] != 0
        self.l1, self.l2 = self.params[c.PARAM_L1], self.params[c.PARAM_L2]
        self.mean_weight = self.params[c.PARAM_MEAN_WEIGHT]
        self.few = self.n_outputs <= FEW
        self.guarded = self.codes[c.CODE_OPTIMIZER] == c.AUTO
        # A row's features as the blocks of the passes count them: those that add up columns, and those that take dot
        # products, of which one may be wider than the other.
        self.row = rows.padded_row(self.d, rows.column_lanes(self.X.element))
        self.step = rows.padded_row(self.d, rows.block_lanes(self.X.element))
        size = rows.size(self.X.element)
        self.row_bytes, self.ahead = self.d * size, _AHEAD_BYTES // size + self.tile * self.d


@dataclass
class Batch:
    """The rows behind one update.

    Attributes
    ----------
    x, y, weight : Pointer
        Where they lie.
    ahead : Pointer
        Where they would lie if the rows after them followed; what is asked for ahead of time is found from here.
    n : Value
        How many.
    rows : Value
        How many of mean weight, as a double.
    """

    x: Pointer
    y: Pointer
    weight: Pointer
    ahead: Pointer
    n: Value
    rows: Value


def consume(code: Code, arrays: dict[str, Pointer], shapes: dict[str, list[Value]]) -> None:
    """Write the whole of `streamgd.learn.kernels.consume`."""
    a = Call(arrays, shapes)
    counters, row = a.counters, code.variable(a.start)
    going = code.variable(counters[c.STATUS] == c.OK)

    def more() -> Value:
        return going.value & ((row.value < a.stop) | (a.close & (counters[c.N_CARRY] > 0)))

    def advance(n: Value) -> None:
        add_identities(code, a.ids + row.value, n, a.checksum)
        row.add(n)

    with code.repeat(more):
        first, filled = row.value, counters[c.N_CARRY]
        carried = (filled > 0) | (a.stop - first < a.batch)
        places = [a.X + first * a.d, a.y + first * a.n_targets, a.weight + first]
        n = code.variable(a.batch)
        with code.when(carried):
            take = smaller(a.batch - filled, a.stop - first)
            for place, target, step in zip(places, a.carry, (a.d, a.n_targets, a.has_weight.to(I64)), strict=True):
                copy(code, place, target + filled * step, take * step)
            advance(take)
            n.value = filled + take
            counters[c.N_CARRY] = n.value
        x, y, weight = (held.select(carried, place) for held, place in zip(a.carry, places, strict=True))
        ahead = (a.X + (row.value - n.value) * a.d).select(carried, x)
        with code.either((n.value == a.batch) | a.close) as (then, otherwise):
            with then:
                batch = Batch(x, y, weight, ahead, n.value, n.value.to(F64) * a.mean_weight)
                done = update(code, a, batch)
                with code.when(done & carried):
                    counters[c.N_CARRY] = 0
                with code.when(done & ~carried):
                    advance(n.value)
                going.value = done
            with otherwise:
                going.value = code.constant(0, BOOL)
    done = row.value - a.start
    counters[c.ROW] = row.value
    counters[c.EPOCH_ROWS] = counters[c.EPOCH_ROWS] + done
    counters[c.N_ROWS] = counters[c.N_ROWS] + done


@function
def add_identities(code: Code, ids: Pointer, n: Value, total: Pointer) -> None:
    """Add n identities to their sum, which wraps around."""
    wide, one = code.variable(code.zeros(I64, LANES)), code.variable(total[0])

    def add(i: Value, lanes: int) -> None:
        few = ids.load(i, lanes)
        wide.add(few) if lanes == LANES else one.add(few.folded())

    code.each(n, add)
    total[0] = one.value + wide.value.folded()


@function
def copy(code: Code, source: Pointer, target: Pointer, n: Value) -> None:
    """Copy n numbers."""
    code.each(n, lambda i, lanes: target.store(i, source.load(i, lanes)))


@function
def fill(code: Code, target: Pointer, n: Value, value: Value) -> None:
    """Fill n places with a number."""
    code.each(n, lambda i, lanes: target.store(i, code.splat(value, lanes)))


def update(code: Code, a: Call, batch: Batch) -> Value:
    """Compute a batch and apply it; return whether that was possible, or else say that training diverged."""
    w = a.work
    spread_all(code, a, a.theta)
    fill(code, w["g"], a.n_outputs * a.row, code.constant(0, a.X.element))
    fill(code, w["sums"], a.n_outputs * (losses.N_SUMS * losses.LANES), code.number(0.0))
    with code.when(a.codes[c.CODE_MOMENTS] != 0):
        fill(code, w["moments"], a.d * 2, code.number(0.0))
    with code.loop(0, batch.n, a.tile) as first:
        through_tile(code, a, batch, first)
    loss, finite = finish_gradient(code, a, batch)
    small = absolute(loss) < _HUGE
    too_steep = largest(code, a.size, lambda j, lanes: where(absolute(w["grad"].load(j, lanes)) < _STEEP, 0.0, 1.0))
    fine = finite & small & (too_steep == 0.0)
    with code.either(fine) as (then, otherwise):
        with then:
            apply(code, a, batch, loss)
        with otherwise:
            a.counters[c.STATUS] = c.DIVERGED
            a.scalars[c.BAD_VALUE] = where(finite & ~small, loss, math.inf)
    return fine


def spread_all(code: Code, a: Call, coefficients: Pointer) -> None:
    """Bring every output's coefficients to the rows' type: as blocks, or as they are for several outputs."""
    with code.loop(0, a.n_outputs) as k:
        of_output = coefficients + k * a.width
        with code.either(a.few) as (then, otherwise):
            with then:
                rows.spread(code, of_output, a.d, a.work["w"] + k * a.step)
            with otherwise:
                rows.convert(code, of_output, a.d, a.work["w"] + k * a.d)


def through_tile(code: Code, a: Call, batch: Batch, first: Value) -> None:
    """Compute the rows of one tile, and add their part to the gradient and to the sums."""
    w, x = a.work, batch.x + first * a.d
    n = smaller(a.tile, batch.n - first)
    n_padded = (n + (_PAD - 1)) & -_PAD
    C, H = w["C"] + first, w["H"] + first * a.n_outputs
    y = batch.y + first * a.n_targets
    row_weights(code, batch.weight + first, a.has_weight, a.class_weight, a.has_factors, y, a.n_targets, C, n, n_padded)
    as_they_are = (a.n_targets == 1) & ~a.classify & (n == n_padded)
    with code.when(~as_they_are):
        targets(code, y, a.n_targets, w["T"], a.tile, a.n_outputs, n, n_padded, a.classify, a.softmax)
    T = y.select(as_they_are, w["T"])
    with code.either(a.few) as (then, otherwise):
        with then:
            base, half, share = pace(code, a, batch, first, n)
            with code.loop(0, a.n_outputs) as k:
                P = w["P"] + k * a.tile
                rows.predict(code, x, n, a.d, w["w"] + k * a.step, a.theta[k * a.width + a.d], P, base, share)
                with code.loop(n, n_padded) as i:
                    P[i] = 0.0
                losses.elementwise_loss(
                    code,
                    a.codes[c.CODE_LOSS],
                    P,
                    T + k * a.tile,
                    C,
                    n_padded,
                    a.params,
                    w["slopes"],
                    H + k * a.tile,
                    w["sums"] + k * (losses.N_SUMS * losses.LANES),
                )
                rows.add_gradient(code, x, n, a.d, w["slopes"], w["g"] + k * a.row, base + half, share)
        with otherwise:
            predict_all(code, a, x, n, a.theta)
            with code.either(a.softmax) as (then, otherwise):
                with then:
                    losses.softmax_loss(
                        code, w["P"], a.tile, w["T"], C, n_padded, a.n_outputs, w["slopes"], H, w["sums"]
                    )
                with otherwise, code.loop(0, a.n_outputs) as k:
                    losses.elementwise_loss(
                        code,
                        a.codes[c.CODE_LOSS],
                        w["P"] + k * a.tile,
                        w["T"] + k * a.tile,
                        C,
                        n_padded,
                        a.params,
                        w["slopes"] + k * a.tile,
                        H + k * a.tile,
                        w["sums"] + k * (losses.N_SUMS * losses.LANES),
                    )
            rows.add_gradients(code, x, n, a.d, w["slopes"], a.tile, a.n_outputs, w["g"], a.row)
    with code.when(a.codes[c.CODE_MOMENTS] != 0):
        rows.add_tile_moments(code, x, n, a.d, w["moments"], w["moments"] + a.d)


def predict_all(code: Code, a: Call, x: Pointer, n: Value, coefficients: Pointer) -> None:
    """Fill P with the predictions of n rows by the coefficients in w and the intercepts of some coefficients."""
    lanes = rows.line_lanes(x.element)
    with code.loop(0, n, lanes) as i:
        rows.turn(code, x + i * a.d, smaller(n - i, lanes), a.d, a.work["turned"])
        rows.predict_outputs(
            code, a.work["turned"], a.d, a.work["w"], coefficients + a.d, a.width, a.n_outputs, a.work["P"] + i, a.tile
        )


def pace(code: Code, a: Call, batch: Batch, first: Value, n: Value) -> tuple[Pointer, Value, Value]:
    """Say which lines to ask for while a tile is computed: from where, how far on for the gradient, and at what share.

    If the step looks at the rows again, half the lines of the next batch are asked for then.
    """
    later = a.guarded & (batch.n * a.row_bytes <= _CACHED_BYTES)
    each = where(later, a.d - (a.step >> 1), a.d)
    begin = where(later, batch.n * (a.step >> 1), 0) + first * each
    return batch.ahead + (begin + a.ahead), (n * each) >> 1, where(later, 1, 2)


@function
def row_weights(
    code: Code,
    weight: Pointer,
    has_weight: Value,
    class_weight: Pointer,
    has_factors: Value,
    y: Pointer,
    n_targets: Value,
    C: Pointer,
    n: Value,
    n_padded: Value,
) -> None:
    """Fill C with the weights of n rows, and zeros for those that are not there."""
    with code.either(has_weight) as (then, otherwise):
        with then:
            copy(code, weight, C, n)
        with otherwise:
            fill(code, C, n, code.number(1.0))
    with code.when(has_factors), code.loop(0, n) as i:
        C[i] = C[i] * class_weight[y[i * n_targets].to(I64)]
    with code.loop(n, n_padded) as i:
        C[i] = 0.0


@function
def targets(
    code: Code,
    y: Pointer,
    n_targets: Value,
    T: Pointer,
    stride: Value,
    n_outputs: Value,
    n: Value,
    n_padded: Value,
    classify: Value,
    softmax: Value,
) -> None:
    """Fill T as the losses want it: values, ±1 for two classes or one against the rest, class indices for softmax."""
    signs = classify & ~softmax
    with code.loop(0, where(softmax, 1, n_outputs)) as k:
        row, column = T + k * stride, where(classify, 0, k)
        positive = where(n_outputs == 1, 1.0, k.to(F64))

        def store(i: Value, value: Value) -> None:
            row.store(i, where(signs, where(value == positive, 1.0, -1.0), value))

        with code.either(n_targets == 1) as (then, otherwise):
            with then:
                code.each(n, lambda i, lanes: store(i, y.load(i, lanes)))
            with otherwise, code.loop(0, n) as i:
                store(i, y[i * n_targets + column])
        with code.loop(n, n_padded) as i:
            row[i] = 0.0


def finish_gradient(code: Code, a: Call, batch: Batch) -> tuple[Value, Value]:
    """Fill grad: the weighted mean of the rows' gradients and that of l2; return the loss, and whether all was finite.

    The intercept starts where the sum of the slopes is zero in exact arithmetic. Steps that are divided by √G would
    blow what is left of it, which depends on the order of the rows, up to steps of full size: a sum within its own
    rounding error counts as zero.
    """
    w = a.work
    l2 = where(a.codes[c.CODE_OPTIMIZER] == c.SGD, 0.0, a.l2)  # sgd decays the coefficients instead
    loss, squares = code.variable(code.number(0.0)), code.variable(code.number(0.0))
    share = 1.0 / batch.rows
    with code.loop(0, a.n_outputs) as k:
        sums = w["sums"] + k * (losses.N_SUMS * losses.LANES)
        kinds = [sums.load(place * losses.LANES, losses.LANES).folded() for place in range(losses.N_SUMS)]
        loss.add(kinds[losses.SUM_LOSS])
        squares.add(kinds[losses.SUM_P_2])
        grad, theta = w["grad"] + k * a.width, a.theta + k * a.width
        rows.gather_blocks(code, w["g"] + k * a.row, a.d, grad)

        def mean(j: Value, lanes: int) -> None:
            grad.store(j, grad.load(j, lanes) * share + theta.load(j, lanes) * l2)

        code.each(a.d, mean)
        slope = kinds[losses.SUM_SLOPE]
        of_predictions = where(a.softmax, squares.value, kinds[losses.SUM_P_2])
        size = kinds[losses.SUM_SLOPE_2] + a.mean_weight * a.mean_weight * of_predictions
        beyond = absolute(slope) > _ROUNDING * sqrt(batch.n.to(F64) * size)
        grad[a.d] = where((a.codes[c.CODE_INTERCEPT] != 0) & beyond, slope * share, 0.0)
    return where(a.softmax, loss.value, loss.value / a.n_outputs.to(F64)), squares.value < math.inf


def apply(code: Code, a: Call, batch: Batch, loss: Value) -> None:
    """Take the step. Nothing of the state but the open batch has changed so far; from here on all of it does."""
    w, scalars, counters = a.work, a.scalars, a.counters
    scalars[c.LOSS_SUM] = scalars[c.LOSS_SUM] + loss
    scalars[c.WEIGHT_SUM] = scalars[c.WEIGHT_SUM] + total(code, batch.n, lambda i, lanes: w["C"].load(i, lanes))
    value = penalty(code, a.theta, a.n_outputs, a.width, a.l1, a.l2)
    scalars[c.PENALTY_SUM] = scalars[c.PENALTY_SUM] + batch.n.to(F64) * value
    with code.when(a.codes[c.CODE_MOMENTS] != 0):

        def add(j: Value, lanes: int) -> None:
            a.moments.store(j, a.moments.load(j, lanes) + w["moments"].load(j, lanes))

        code.each(a.d * 2, add)
    fill(code, w["factors"], a.n_outputs, code.number(1.0))
    step = Step(
        a.theta,
        a.average,
        a.slots,
        w["grad"],
        w["step"],
        w["rate"],
        a.target_scale.select(a.guarded, w["factors"]),
        a.n_outputs,
        a.width,
        a.size,
        scalars,
        a.params,
        a.codes,
        a.l2,
        (counters[c.N_UPDATES] + 1).to(F64),
    )
    take_step(code, step)
    with code.when(a.guarded):
        guard(code, a, batch)
    apply_step(code, step, w["factors"], a.l1, a.subgradient)
    counters[c.N_UPDATES] = counters[c.N_UPDATES] + 1


def guard(code: Code, a: Call, batch: Batch) -> None:
    """Fill the factors that keep the steps from overshooting the batch's minimum along them.

    The change of each row's prediction along the step is squared and weighted by the loss's second derivative. Under
    softmax that derivative is the variance of the change under the row's probabilities, and all outputs share a factor.
    """
    w, lanes = a.work, losses.LANES
    spread_all(code, a, w["step"])
    fill(code, w["totals"], a.n_outputs * lanes, code.number(0.0))
    cached = batch.n * a.row_bytes <= _CACHED_BYTES
    with code.loop(0, batch.n, a.tile) as first:
        n = smaller(a.tile, batch.n - first)
        n_padded = (n + (_PAD - 1)) & -_PAD
        x, H, C = batch.x + first * a.d, w["H"] + first * a.n_outputs, w["C"] + first
        with code.either(a.few) as (then, otherwise):
            with then:
                # Ask for the next batch, or, if this one is not in the cache any more, for its own rows again.
                own, other = x + a.ahead, batch.ahead + (batch.n * a.d + first * (a.step >> 1) + a.ahead)
                base, share = other.select(cached, own), where(cached, 2, 4)
                with code.loop(0, a.n_outputs) as k:
                    plus, total = w["step"][k * a.width + a.d], w["totals"] + k * lanes
                    rows.bend_along(code, x, n, a.d, w["w"] + k * a.step, plus, H + k * a.tile, total, base, share)
            with otherwise:
                predict_all(code, a, x, n, w["step"])
                with code.either(a.softmax) as (then, otherwise):
                    with then:
                        losses.add_drift(code, w["P"], H, a.tile, C, n_padded, a.n_outputs, w["totals"])
                    with otherwise, code.loop(0, a.n_outputs) as k:
                        P = w["P"] + k * a.tile
                        losses.add_squares(code, P, H + k * a.tile, n_padded, w["totals"] + k * lanes)
    joint_along, joint_curve = code.variable(code.number(0.0)), code.variable(code.number(0.0))
    with code.loop(0, a.n_outputs) as k:
        grad, step = w["grad"] + k * a.width, w["step"] + k * a.width
        along = dot(code, grad, step, a.width)
        curve = (w["totals"] + k * lanes).load(0, lanes).folded() / batch.rows + a.l2 * dot(code, step, step, a.d)
        joint_along.add(along)
        joint_curve.add(curve)
        w["factors"][k] = where(curve > along, along / curve, 1.0)
    with code.when(a.softmax):
        along, curve = joint_along.value, joint_curve.value
        fill(code, w["factors"], a.n_outputs, where(curve > along, along / curve, 1.0))
