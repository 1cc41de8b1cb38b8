"""From a batch's gradient to new coefficients: optimizers, schedules, penalties, averages.

The formulas stand in `streamgd.learn.optimizers` and `streamgd.learn.schedules`. Everything is in doubles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamgd.learn import codes as c
from streamgd.learn.kernels.arithmetic import cos_pi, exp, log
from streamgd.learn.kernels.llvm import F64, LANES, Code, Pointer, Value, absolute, larger, smaller, sqrt, where

#: AdaGrad's guard against dividing noise by noise: this share of the largest √G of the same output.
_ADAGRAD_FLOOR = 1e-9


@dataclass
class Step:
    """What an optimizer reads and writes.

    Attributes
    ----------
    theta, average, slot : Pointer
        Of the state: coefficients, their average, what the optimizer keeps.
    grad, step, rate : Pointer
        The gradient; what will be subtracted from the coefficients, and the rate behind each of its numbers.
    unit : Pointer
        The unit in which each output's step is measured.
    n_outputs, width, size : Value
        Rows and columns of the coefficients, the intercept's included, and their product.
    scalars, params, codes : Pointer
        Of the state, and of the recipe.
    l2 : Value
        The penalty's strength.
    t : Value
        Number of the update, counted from 1.
    """

    theta: Pointer
    average: Pointer
    slot: Pointer
    grad: Pointer
    step: Pointer
    rate: Pointer
    unit: Pointer
    n_outputs: Value
    width: Value
    size: Value
    scalars: Pointer
    params: Pointer
    codes: Pointer
    l2: Value
    t: Value


def total(code: Code, n: Value, term: Callable[[Value, int], Value]) -> Value:
    """Return the sum of n terms: eight sums, to which what is left over is added in halves, are folded.

    term(i, lanes) gives the terms from i on.
    """
    wide, one = code.variable(code.zeros(F64, LANES)), code.variable(code.number(0.0))

    def add(i: Value, lanes: int) -> None:
        wide.add(term(i, lanes)) if lanes == LANES else one.add(term(i, lanes).folded())

    code.each(n, add)
    return wide.value.folded() + one.value


def dot(code: Code, a: Pointer, b: Pointer, n: Value) -> Value:
    """Return the dot product of n doubles."""
    return total(code, n, lambda i, lanes: a.load(i, lanes) * b.load(i, lanes))


def largest(code: Code, n: Value, size: Callable[[Value, int], Value]) -> Value:
    """Return the largest of n numbers that are not negative; size(i, lanes) gives those from i on."""
    wide, one = code.variable(code.zeros(F64, LANES)), code.variable(code.number(0.0))

    def compare(i: Value, lanes: int) -> None:
        if lanes == LANES:
            wide.value = larger(size(i, lanes), wide.value)
        else:
            one.value = larger(size(i, lanes).folded(larger), one.value)

    code.each(n, compare)
    return larger(wide.value.folded(larger), one.value)


def rate(code: Code, codes: Pointer, params: Pointer, scalars: Pointer, t: Value) -> Value:
    """Return the learning rate of update t."""
    schedule, eta0 = codes[c.CODE_SCHEDULE], params[c.PARAM_ETA0]
    eta = code.variable(eta0 * scalars[c.ETA_SCALE])
    with code.when(schedule == c.OPTIMAL):
        eta.value = 1.0 / (params[c.PARAM_ALPHA] * (params[c.PARAM_OPTIMAL_START] + t - 1.0))
    with code.when(schedule == c.INVSCALING):
        power = params[c.PARAM_POWER_T]
        eta.value = eta0 * exp(-power * log(t))
        for exact, value in ((0.5, eta0 / sqrt(t)), (0.25, eta0 / sqrt(sqrt(t))), (1.0, eta0 / t)):
            eta.value = where(power == exact, value, eta.value)
    with code.when(schedule == c.COSINE):
        eta.value = eta0 * 0.5 * (1.0 + cos_pi(smaller((t - 1.0) / params[c.PARAM_N_UPDATES], 1.0)))
    return eta.value


def take_step(code: Code, s: Step) -> None:
    """Fill step and rate by the optimizer, and update what it keeps; plain sgd also decays the coefficients."""
    eta, optimizer = rate(code, s.codes, s.params, s.scalars, s.t), s.codes[c.CODE_OPTIMIZER]
    with code.when((optimizer == c.AUTO) | (optimizer == c.ADAGRAD)):
        _adagrad(code, s, eta)
    with code.when(optimizer == c.SGD):
        _sgd(code, s, eta)
    with code.when(optimizer == c.ADAM):
        _adam(code, s, eta)
    with code.when(optimizer == c.DOWG):
        _dowg(code, s)


def _adagrad(code: Code, s: Step, eta: Value) -> None:
    """Add the squared gradients to their sums; the steps are measured in each output's unit."""
    with code.loop(0, s.n_outputs) as k:
        g, sums, step, rates = (pointer + k * s.width for pointer in (s.grad, s.slot, s.step, s.rate))

        def accumulate(j: Value, lanes: int) -> Value:
            total = sums.load(j, lanes) + g.load(j, lanes) * g.load(j, lanes)
            sums.store(j, total)
            return total

        most = largest(code, s.width, accumulate)
        floor, eta_k = sqrt(most) * _ADAGRAD_FLOOR, eta * s.unit[k]

        def divide(j: Value, lanes: int) -> None:
            root = sqrt(sums.load(j, lanes)) + floor
            each = where(root > 0.0, code.splat(eta_k, lanes) / root, 0.0)
            rates.store(j, each)
            step.store(j, each * g.load(j, lanes))

        code.each(s.width, divide)


def _sgd(code: Code, s: Step, eta: Value) -> None:
    """Plain steps, with optional momentum; scikit-learn's weight decay is applied to the coefficients at once."""
    momentum = s.params[c.PARAM_MOMENTUM]
    with code.when(momentum > 0.0):
        nesterov = s.codes[c.CODE_NESTEROV] != 0
        share, later = where(nesterov, 1.0, 0.0), where(nesterov, momentum, 1.0)

        def remember(j: Value, lanes: int) -> None:
            g = s.grad.load(j, lanes)
            velocity = s.slot.load(j, lanes) * momentum + g
            s.slot.store(j, velocity)
            s.grad.store(j, g * share + velocity * later)

        code.each(s.size, remember)

    def scale(j: Value, lanes: int) -> None:
        s.step.store(j, s.grad.load(j, lanes) * eta)
        s.rate.store(j, code.splat(eta, lanes))

    code.each(s.size, scale)
    with code.when(s.l2 > 0.0):
        keep = larger(1.0 - eta * s.l2, 0.0)
        with code.loop(0, s.n_outputs) as k:
            _scale(code, s.theta + k * s.width, s.width - 1, keep)


def _scale(code: Code, values: Pointer, n: Value, factor: Value) -> None:
    code.each(n, lambda j, lanes: values.store(j, values.load(j, lanes) * factor))


def _adam(code: Code, s: Step, eta: Value) -> None:
    beta_1, beta_2, epsilon = (s.params[place] for place in (c.PARAM_BETA_1, c.PARAM_BETA_2, c.PARAM_EPSILON))
    for power, beta in ((c.BETA_1_POWER, beta_1), (c.BETA_2_POWER, beta_2)):
        s.scalars[power] = s.scalars[power] * beta
    unbias_1, unbias_2 = 1.0 - s.scalars[c.BETA_1_POWER], 1.0 - s.scalars[c.BETA_2_POWER]
    new_1, new_2 = 1.0 - beta_1, 1.0 - beta_2
    second_moments = s.slot + s.size

    def moments(j: Value, lanes: int) -> None:
        g = s.grad.load(j, lanes)
        first = s.slot.load(j, lanes) * beta_1 + g * new_1
        second = second_moments.load(j, lanes) * beta_2 + g * new_2 * g
        s.slot.store(j, first)
        second_moments.store(j, second)
        each = code.splat(eta, lanes) / (sqrt(second / unbias_2) + epsilon)
        s.rate.store(j, each)
        s.step.store(j, each * (first / unbias_1))

    code.each(s.size, moments)


def _dowg(code: Code, s: Step) -> None:
    """DoWG's step: the rate is the largest distance travelled, squared, over the weighted gradients' norm."""
    with code.when(s.t == 1.0):
        code.each(s.size, lambda j, lanes: s.slot.store(j, s.theta.load(j, lanes)))
    code.each(s.size, lambda j, lanes: s.step.store(j, s.theta.load(j, lanes) - s.slot.load(j, lanes)))
    distance = larger(sqrt(dot(code, s.step, s.step, s.size)), s.scalars[c.DOWG_DISTANCE])
    total = s.scalars[c.DOWG_SUM] + distance * distance * dot(code, s.grad, s.grad, s.size)
    s.scalars[c.DOWG_DISTANCE], s.scalars[c.DOWG_SUM] = distance, total
    eta = where(total > 0.0, distance * distance / sqrt(total), 0.0)

    def scale(j: Value, lanes: int) -> None:
        s.step.store(j, s.grad.load(j, lanes) * eta)
        s.rate.store(j, code.splat(eta, lanes))

    code.each(s.size, scale)


def apply_step(code: Code, s: Step, factors: Pointer, l1: Value, subgradient: Pointer) -> None:
    """Take each output's steps times its factor, the proximal step of l1 behind them, and move the averages."""
    recent = 9.0 / (s.t + 8.0)
    with code.loop(0, s.n_outputs) as k:
        theta, step, rates = (pointer + k * s.width for pointer in (s.theta, s.step, s.rate))
        mean = subgradient + k * s.width
        factor = factors[k]
        code.each(s.width, lambda j, lanes: theta.store(j, theta.load(j, lanes) - step.load(j, lanes) * factor))
        with code.when(l1 > 0.0):

            def shrink(j: Value, lanes: int) -> None:
                old, threshold = theta.load(j, lanes), rates.load(j, lanes) * factor * l1
                left = absolute(old) - threshold
                left = where(left > 0.0, left, 0.0)
                theta.store(j, where(old > 0.0, left, 0.0 - left))  # never -0.0
                # What was taken away, as a part of the threshold: it lies between -1 and 1, and is one of them unless
                # the coefficient became zero.
                part = larger(smaller(where(threshold > 0.0, old / threshold, 0.0), 1.0), -1.0)
                before = mean.load(j, lanes)
                mean.store(j, before + (part - before) * recent)

            code.each(s.width - 1, shrink)
    share = _average_share(code, s)

    def move(j: Value, lanes: int) -> None:
        average = s.average.load(j, lanes)
        s.average.store(j, average + (s.theta.load(j, lanes) - average) * share)

    code.each(s.size, move)


def _average_share(code: Code, s: Step) -> Value:
    """Return how far the running average moves towards the coefficients."""
    kind = s.codes[c.CODE_AVERAGE]
    since = s.t - s.params[c.PARAM_AVERAGE_FROM] + 1.0
    share = where(since > 1.0, 1.0 / since, 1.0)
    share = where(kind == c.AVERAGE_POLYNOMIAL, 9.0 / (s.t + 8.0), share)
    return where(kind == c.AVERAGE_NONE, 0.0, share)


def penalty(code: Code, theta: Pointer, n_outputs: Value, width: Value, l1: Value, l2: Value) -> Value:
    """Return the value of the penalty at the coefficients."""
    total = code.variable(code.number(0.0))
    with code.when((l1 > 0.0) | (l2 > 0.0)), code.loop(0, n_outputs) as k, code.loop(0, width - 1) as j:
        value = theta[k * width + j]
        total.add(l1 * absolute(value) + 0.5 * l2 * value * value)
    return total.value
