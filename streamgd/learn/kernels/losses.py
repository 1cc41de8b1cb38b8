"""Losses of the rows of a tile: values, and first and second derivatives in the predictions.

The formulas stand in `streamgd.learn.losses`. Values are only ever summed, so they are summed here, in eight sums by
the number of the row, together with the weighted slopes and what tells rounding and overflow.
"""

from __future__ import annotations

from collections.abc import Callable

from streamgd.learn.codes import (
    LOG_LOSS,
    PARAM_BEND,
    PARAM_KNEE,
    PARAM_OVER,
    PARAM_STEEP,
    PARAM_UNDER,
    PARAM_WIDTH,
    SQUARED_ERROR,
)
from streamgd.learn.kernels.arithmetic import exp, log, log1p
from streamgd.learn.kernels.llvm import F64, Code, Pointer, Value, absolute, function, larger, where

#: Rows that are computed together, and sums of each kind.
LANES = 8
#: Places of the sums of an output, each of LANES: weighted losses, weighted slopes and their squares, and squares of
#: the predictions, which are not finite if a prediction is not.
SUM_LOSS, SUM_SLOPE, SUM_SLOPE_2, SUM_P_2 = 0, 1, 2, 3
N_SUMS = 4

Terms = tuple[Value, Value, Value]


class _Sum:
    """One kind of sum while a loop adds to it."""

    def __init__(self, sums: Pointer, place: int) -> None:
        self._place = sums + place * LANES
        self._variable = sums.code.variable(self._place.load(0, LANES))
        self.add = self._variable.add

    def store(self) -> None:
        self._place.store(0, self._variable.value)


def _squared_error(p: Value, y: Value, params: Pointer) -> Terms:
    r = p - y
    return 0.5 * r * r, r, r.code.splat(r.code.number(1.0), LANES)


def _log_loss(p: Value, y: Value, params: Pointer) -> Terms:
    z = y * p
    right = z > 0.0
    u = exp(-absolute(z))  # in (0, 1]: never overflows
    share = u / (u + 1.0)
    value = log1p(u) + where(right, 0.0, -z)
    return value, -y * where(right, share, 1.0 - share), share * (1.0 - share)  # the slope is 1 / (1 + exp(z))


def _of_residual(p: Value, y: Value, params: Pointer) -> Terms:
    """One function of the excess o = max(0, |r| - width) of the residual r = p - y, for all losses of residuals.

    bend · (o²/2 up to the knee, straight on from there) + steep · o, all times over or under by the sign of r.
    """
    width, knee, bend, steep = (params[place] for place in (PARAM_WIDTH, PARAM_KNEE, PARAM_BEND, PARAM_STEEP))
    r = p - y
    v = absolute(r) - width
    o = where(v <= 0.0, 0.0, v)  # NaN stays NaN
    m = where(o > knee, knee, o)
    above = r > 0.0
    side = where(above, p.code.splat(params[PARAM_OVER], LANES), params[PARAM_UNDER])
    slope = side * (m * bend + where(v > 0.0, p.code.splat(steep, LANES), 0.0))
    value = side * (m * bend * (o - 0.5 * m) + o * steep)
    return value, where(above, slope, -slope), where((v >= 0.0) & (v <= knee), p.code.splat(bend, LANES), 0.0)


def _of_margin(p: Value, y: Value, params: Pointer) -> Terms:
    """Return the same function of the excess o = max(0, width - z) of the margin z = y p, for all losses of margins."""
    width, knee, bend, steep = (params[place] for place in (PARAM_WIDTH, PARAM_KNEE, PARAM_BEND, PARAM_STEEP))
    v = -(y * p) + width
    o = where(v <= 0.0, 0.0, v)
    m = where(o > knee, knee, o)
    value = m * bend * (o - 0.5 * m) + o * steep
    slope = -y * (m * bend + where(v >= 0.0, p.code.splat(steep, LANES), 0.0))  # a perceptron at 0 must start to move
    return value, slope, where((v >= 0.0) & (v <= knee), p.code.splat(bend, LANES), 0.0)


@function
def _tile(
    code: Code,
    p: Pointer,
    y: Pointer,
    weights: Pointer,
    n: Value,
    params: Pointer,
    slopes: Pointer,
    curves: Pointer,
    sums: Pointer,
    *,
    terms: Callable[[Value, Value, Pointer], Terms],
) -> None:
    losses, slopes_1, slopes_2, p_2 = (_Sum(sums, place) for place in (SUM_LOSS, SUM_SLOPE, SUM_SLOPE_2, SUM_P_2))
    with code.loop(0, n, LANES) as i:
        prediction, weight = p.load(i, LANES), weights.load(i, LANES)
        value, slope, curve = terms(prediction, y.load(i, LANES), params)
        slope = slope * weight
        slopes.store(i, slope.to(slopes.element))
        curves.store(i, curve * weight)
        losses.add(value * weight)
        slopes_1.add(slope)
        slopes_2.add(slope * slope)
        p_2.add(prediction * prediction)
    for kind in (losses, slopes_1, slopes_2, p_2):
        kind.store()


def elementwise_loss(
    code: Code,
    loss: Value,
    p: Pointer,
    y: Pointer,
    weights: Pointer,
    n: Value,
    params: Pointer,
    slopes: Pointer,
    curves: Pointer,
    sums: Pointer,
) -> None:
    """Fill slopes and curves, weighted, for n predictions p of one output, a multiple of LANES; add to its sums.

    Targets y are ±1 for classes. Rows that are not there have the weight zero, and finite predictions and targets.
    """

    def write(terms: Callable[[Value, Value, Pointer], Terms]) -> None:
        _tile(code, p, y, weights, n, params, slopes, curves, sums, terms=terms)

    with code.either(loss == SQUARED_ERROR) as (then, otherwise):
        with then:
            write(_squared_error)
        with otherwise, code.either(loss == LOG_LOSS) as (then, otherwise):
            with then:
                write(_log_loss)
            with otherwise, code.either(loss < LOG_LOSS) as (then, otherwise):
                with then:
                    write(_of_residual)
                with otherwise:
                    write(_of_margin)


@function
def softmax_loss(
    code: Code,
    P: Pointer,
    stride: Value,
    classes: Pointer,
    weights: Pointer,
    n: Value,
    n_outputs: Value,
    slopes: Pointer,
    shares: Pointer,
    sums: Pointer,
) -> None:
    """Do what `elementwise_loss` does for softmax cross-entropy; shares are the probabilities, not weighted.

    P, slopes and shares hold stride numbers for each output in turn; P is overwritten. The losses and the squares of
    all predictions go to the first output's sums.
    """
    losses, p_2 = _Sum(sums, SUM_LOSS), _Sum(sums, SUM_P_2)
    with code.loop(0, n, LANES) as i:
        weight, chosen, p = weights.load(i, LANES), classes.load(i, LANES), P + i
        zero = code.zeros(F64, LANES)
        peak, right, total = code.variable(p.load(0, LANES)), code.variable(zero), code.variable(zero)
        with code.loop(1, n_outputs) as k:
            peak.value = larger(p.load(k * stride, LANES), peak.value)
        with code.loop(0, n_outputs) as k:
            prediction = p.load(k * stride, LANES)
            p_2.add(prediction * prediction)
            right.value = where(chosen == k.to(F64), prediction, right.value)
            e = exp(prediction - peak.value)
            p.store(k * stride, e)
            total.add(e)
        losses.add((log(total.value) + peak.value - right.value) * weight)
        scale = 1.0 / total.value
        with code.loop(0, n_outputs) as k:
            share = p.load(k * stride, LANES) * scale
            shares.store(k * stride + i, share)
            slope = where(chosen == k.to(F64), share - 1.0, share) * weight
            slopes.store(k * stride + i, slope.to(slopes.element))
            for place, term in ((SUM_SLOPE, slope), (SUM_SLOPE_2, slope * slope)):
                running = sums + k * (N_SUMS * LANES) + place * LANES
                running.store(0, running.load(0, LANES) + term)
    losses.store()
    p_2.store()


@function
def add_drift(
    code: Code,
    changes: Pointer,
    shares: Pointer,
    stride: Value,
    weights: Pointer,
    n: Value,
    n_outputs: Value,
    total: Pointer,
) -> None:
    """Add the weighted variance of each row's changes under its probabilities to eight sums by the number of the row.

    Changes and shares hold stride numbers for each output in turn.
    """
    with code.loop(0, n, LANES) as i:
        zero = code.zeros(F64, LANES)
        mean, square = code.variable(zero), code.variable(zero)
        with code.loop(0, n_outputs) as k:
            change = changes.load(k * stride + i, LANES)
            part = shares.load(k * stride + i, LANES) * change
            mean.add(part)
            square.add(part * change)
        variance = square.value - mean.value * mean.value
        total.store(0, total.load(0, LANES) + weights.load(i, LANES) * variance)


@function
def add_squares(code: Code, changes: Pointer, curves: Pointer, n: Value, total: Pointer) -> None:
    """Add curves[i] * changes[i]**2 to eight sums by the number of the row."""
    running = code.variable(total.load(0, LANES))
    with code.loop(0, n, LANES) as i:
        change = changes.load(i, LANES)
        running.add(curves.load(i, LANES) * change * change)
    total.store(0, running.value)
