"""What the survey and evaluation need compiled: the mean loss of predictions, and running means and variances."""

from __future__ import annotations

from streamgd.learn import codes as c
from streamgd.learn.kernels import losses
from streamgd.learn.kernels.batch import fill, row_weights, targets
from streamgd.learn.kernels.llvm import LANES, Code, Pointer, Value, smaller, where

#: Rows that `mean_loss` takes at a time.
MEAN_LOSS_ROWS = 512
#: Running moments that `add_moments` keeps, for rows in turn: a single one would wait for itself at every row.
MOMENT_PLACES = 16


def mean_loss(code: Code, arrays: dict[str, Pointer], shapes: dict[str, list[Value]]) -> None:
    """Write the whole of `streamgd.learn.kernels.mean_loss`; the results are the sums of losses and of weights."""
    codes, params, y = arrays["codes"], arrays["params"], arrays["y"]
    (n_decisions, n_outputs), (n_rows, n_targets) = shapes["decisions"], shapes["y"]
    softmax, classify = codes[c.CODE_SOFTMAX] != 0, codes[c.CODE_CLASSES] > 0
    tall = n_outputs * MEAN_LOSS_ROWS
    P = arrays["work"].aligned()
    T, D, H = (P + tall * i for i in (1, 2, 3))
    C, sums = H + tall, H + tall + MEAN_LOSS_ROWS
    n_sums = n_outputs * (losses.N_SUMS * losses.LANES)
    fill(code, sums, n_sums, code.number(0.0))
    weights = code.variable(code.number(0.0))
    with code.loop(0, n_rows, MEAN_LOSS_ROWS) as first:
        n = smaller(n_rows - first, MEAN_LOSS_ROWS)
        n_padded = (n + (losses.LANES - 1)) & -losses.LANES
        fill(code, P, tall, code.number(0.0))
        with code.loop(0, n_outputs) as k, code.loop(0, n) as i:
            row = where(n_decisions > 1, first + i, 0)
            P[k * MEAN_LOSS_ROWS + i] = arrays["decisions"][row * n_outputs + k]
        of_rows, factors = y + first * n_targets, arrays["class_weight"]
        yes = n_rows == n_rows
        row_weights(
            code,
            arrays["weight"] + first,
            yes,
            factors,
            shapes["class_weight"][0] > 0,
            of_rows,
            n_targets,
            C,
            n,
            n_padded,
        )
        stride = code.integer(MEAN_LOSS_ROWS)
        targets(code, of_rows, n_targets, T, stride, n_outputs, n, n_padded, classify, softmax)
        with code.loop(0, n) as i:
            weights.add(C[i])
        with code.either(softmax) as (then, otherwise):
            with then:
                losses.softmax_loss(code, P, stride, T, C, n_padded, n_outputs, D, H, sums)
            with otherwise, code.loop(0, n_outputs) as k:
                at = k * MEAN_LOSS_ROWS
                losses.elementwise_loss(
                    code,
                    codes[c.CODE_LOSS],
                    P + at,
                    T + at,
                    C,
                    n_padded,
                    params,
                    D,
                    H,
                    sums + k * (losses.N_SUMS * losses.LANES),
                )
    total = code.variable(code.number(0.0))
    with code.loop(0, n_outputs) as k:
        total.add((sums + k * (losses.N_SUMS * losses.LANES)).load(losses.SUM_LOSS, losses.LANES).folded())
    arrays["result"][0] = where(softmax, total.value, total.value / n_outputs.to(params.element))
    arrays["result"][1] = weights.value


def add_moments(code: Code, arrays: dict[str, Pointer], shapes: dict[str, list[Value]]) -> None:
    """Write the whole of `streamgd.learn.kernels.add_moments`.

    Rows of a single column are taken sixteen at a time, one for each place; the arithmetic is the same.
    """
    totals, means, squares = arrays["total"], arrays["mean"], arrays["squares"]
    n_rows, n_columns = shapes["X"]
    weighted = shapes["weight"][0] > 0
    begun = arrays["n_rows"][0]
    single = n_columns == 1
    head = where(single, smaller((code.integer(0) - begun) & (MOMENT_PLACES - 1), n_rows), n_rows)
    rest = head + ((n_rows - head) & -MOMENT_PLACES)

    def add_row(i: Value) -> None:
        weight = code.variable(code.number(1.0))
        with code.when(weighted):
            weight.value = arrays["weight"][i]
        w, place = weight.value, (begun + i) & (MOMENT_PLACES - 1)
        with code.when(w != 0.0):
            total = totals[place] + w
            totals[place] = total
            share, row = w / total, arrays["X"] + i * n_columns
            mean_at, squares_at = means + place * n_columns, squares + place * n_columns

            def move(j: Value, lanes: int) -> None:
                x, mean = row.load(j, lanes), mean_at.load(j, lanes)
                gap = x - mean
                mean = mean + gap * share
                mean_at.store(j, mean)
                squares_at.store(j, squares_at.load(j, lanes) + gap * w * (x - mean))

            code.each(n_columns, move)

    with code.loop(0, head) as i:
        add_row(i)
    with code.loop(head, rest, MOMENT_PLACES) as i:
        for place in range(0, MOMENT_PLACES, LANES):
            weights = code.variable(code.splat(code.number(1.0), LANES))
            with code.when(weighted):
                weights.value = arrays["weight"].load(i + place, LANES)
            w = weights.value
            total = totals.load(place, LANES) + w
            totals.store(place, total)
            share = where(w != 0.0, w / total, 0.0)
            x, mean = arrays["X"].load(i + place, LANES), means.load(place, LANES)
            gap = x - mean
            mean = mean + gap * share
            means.store(place, mean)
            squares.store(place, squares.load(place, LANES) + gap * w * (x - mean))
    with code.loop(rest, n_rows) as i:
        add_row(i)
    arrays["n_rows"][0] = begun + n_rows
