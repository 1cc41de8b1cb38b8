"""The kernel's own arithmetic, its order of summation, and that where windows end changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numba as nb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamgd.learn import kernels
from streamgd.learn.kernels import arithmetic, rows
from streamgd.learn.losses import LOSSES
from streamgd.learn.recipe import Recipe
from tests.learn.training import Rows, begin, bits_of, compiled, feed, make_rows, pack, train, train_in_pieces


def mapped(function: Callable) -> Callable[[np.ndarray], np.ndarray]:
    """Compile a function of numbers for arrays: vectors of eight, and then what is left over."""

    def write(code, arrays, shapes):
        code.each(shapes["x"][0], lambda i, lanes: arrays["out"].store(i, function(arrays["x"].load(i, lanes))))

    call = compiled("x out", write)

    def on_array(x: np.ndarray) -> np.ndarray:
        wide, narrow = np.empty_like(x), np.empty_like(x)
        call(x, wide)
        for i in range(0, len(x), 7):
            call(x[i : i + 7], narrow[i : i + 7])
        np.testing.assert_array_equal(wide, narrow)  # a number gets what a vector's lane gets
        return wide

    return on_array


exp, log, log1p, cos_pi = (
    mapped(function) for function in (arithmetic.exp, arithmetic.log, arithmetic.log1p, arithmetic.cos_pi)
)


def units_off(found: np.ndarray, exact: list[mpmath.mpf]) -> float:
    """Largest error in units of the last place of the exact value."""
    return max(
        float(abs(mpmath.mpf(float(value)) - true) / mpmath.mpf(math.ulp(float(true))))
        for value, true in zip(found, exact, strict=True)
    )


@pytest.fixture(autouse=True)
def _precision():
    with mpmath.workdps(60):
        yield


class TestArithmetic:
    def test_exp(self):
        rng = np.random.default_rng(0)
        ties = np.arange(-40, 41)[:, None] * np.log(2) / 2 + np.array([-1e-12, 0.0, 1e-12])
        x = np.concatenate(
            [
                rng.uniform(-708, 709, 3000),
                rng.uniform(-1, 1, 2000),
                rng.uniform(-1, 1, 300) * 10.0 ** -rng.integers(1, 320, 300).astype(float),
                ties.ravel(),
                [0.0, -0.0, -708.0, 709.0, 1.0, -1.0, 5e-324, -5e-324],
            ]
        )
        assert units_off(exp(x), [mpmath.exp(mpmath.mpf(float(v))) for v in x]) < 1.5
        assert exp(np.array([0.0, -0.0])).tolist() == [1.0, 1.0]

    def test_exp_beyond_its_range_is_clamped(self):
        x = np.array([-np.inf, -1e300, -709.0, 709.5, 1e300, np.inf])
        low, high = exp(np.array([-708.0, 709.0]))
        assert exp(x).tolist() == [low, low, low, high, high, high]
        assert 0 < low < high < np.inf

    def test_log(self):
        rng = np.random.default_rng(1)
        tiny, largest = np.finfo(float).tiny, np.finfo(float).max
        x = np.concatenate(
            [
                np.exp(rng.uniform(-708, 709, 3000)),
                rng.uniform(0.5, 2, 3000),
                1 + rng.uniform(-1, 1, 300) * 10.0 ** -rng.integers(1, 16, 300).astype(float),
                np.ldexp(1.0, np.arange(-1022, 1024)),
                np.ldexp(np.sqrt(2), np.arange(-50, 50)),
                np.nextafter(np.ldexp(np.sqrt(2), np.arange(-50, 50)), np.inf),
                [tiny, largest, np.nextafter(1, 0), np.nextafter(1, 2), 10.0, 1000.0],
            ]
        )
        x = x[x != 1]
        assert units_off(log(x), [mpmath.log(mpmath.mpf(float(v))) for v in x]) < 2
        assert log(np.ones(1))[0] == 0

    def test_log1p(self):
        rng = np.random.default_rng(2)
        u = np.concatenate(
            [
                rng.uniform(0, 1, 3000),
                10.0 ** -rng.uniform(0, 307, 1000),
                [1.0, np.nextafter(1, 0), 2.0**-52, 2.0**-53, np.finfo(float).tiny],
            ]
        )
        assert units_off(log1p(u), [mpmath.log1p(mpmath.mpf(float(v))) for v in u]) < 2
        assert log1p(np.zeros(1))[0] == 0

    def test_cos_pi(self):
        x = np.concatenate([np.random.default_rng(3).uniform(0, 1, 3000), [0.0, 0.25, 0.5, 0.75, 1.0]])
        exact = np.array([float(mpmath.cospi(mpmath.mpf(float(v)))) for v in x])
        np.testing.assert_allclose(cos_pi(x), exact, rtol=0, atol=1e-15)
        assert cos_pi(np.array([0.0, 1.0])).tolist() == [1.0, -1.0]


# --- the order of sums -----------------------------------------------------------------------------------------------
WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 28, 31, 32, 33, 64, 100, 129, 300]


def lanes_of(d: int, dtype: np.dtype) -> int:
    return next(lanes for lanes in (32 // np.dtype(dtype).itemsize, 4, 1) if d >= lanes)


def folded(total: np.ndarray):
    """Halves are added until one number is left."""
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    return total[0]


def dot_in_order(x: np.ndarray, w: np.ndarray):
    """Blocks of the widest that fits, the last one at the row's end without what it repeats."""
    d, lanes = len(x), lanes_of(len(x), x.dtype)
    products = x * w
    total = products[:lanes]
    for j in range(lanes, d, lanes):
        block = products[j : j + lanes]
        total = total + np.concatenate([np.zeros(lanes - len(block), x.dtype), block])
    return folded(total)


def sum_in_order(values: np.ndarray) -> float:
    """Eight sums by the number of the row, folded."""
    values = np.append(values, np.zeros(-len(values) % 8))
    total = np.zeros(8)
    for i in range(0, len(values), 8):
        total = total + values[i : i + 8]
    return folded(total)


def write_predict(code, arrays, shapes):
    n, d = shapes["x"]
    rows.spread(code, arrays["w"], d, arrays["blocks"])
    share = code.integer(1)
    rows.predict(code, arrays["x"], n, d, arrays["blocks"], code.number(0.5), arrays["out"], arrays["x"], share)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predictions_sum_in_their_documented_order(dtype):
    predict = compiled("x w blocks out", write_predict)
    rng = np.random.default_rng(0)
    for d in WIDTHS:
        for n in range(1, 10):
            x, w, out = rng.standard_normal((n, d)).astype(dtype), rng.standard_normal(d), np.empty(n + 3)
            predict(x, w, np.full(d + 16, np.nan, dtype), out)
            expected = [np.float64(dot_in_order(row, w.astype(dtype))) + 0.5 for row in x]
            np.testing.assert_array_equal(out[:n], expected)
            np.testing.assert_allclose(out[:n], x @ w + 0.5, rtol=0, atol=1e-5 if dtype == np.float32 else 1e-12)


def write_predict_outputs(code, arrays, shapes):
    (n, d), (n_outputs, stride) = shapes["x"], shapes["out"]
    rows.turn(code, arrays["x"], n, d, arrays["turned"])
    plus, step = arrays["plus"], code.integer(1)
    rows.predict_outputs(code, arrays["turned"], d, arrays["w"], plus, step, n_outputs, arrays["out"], stride)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predictions_of_several_outputs_sum_in_their_documented_order(dtype):
    predict = compiled("x w plus turned out", write_predict_outputs)
    rng = np.random.default_rng(0)
    lanes = 64 // np.dtype(dtype).itemsize
    for d, n_outputs in zip(WIDTHS, [3, 4, 5, 6, 7, 8, 9] * 3, strict=True):
        for n in (1, lanes - 1, lanes):
            x, w = rng.standard_normal((n, d)).astype(dtype), rng.standard_normal((n_outputs, d)).astype(dtype)
            plus, out = rng.standard_normal(n_outputs), np.empty((n_outputs, lanes))
            predict(x, w, plus, np.full(d * lanes, np.nan, dtype), out)
            expected = np.repeat(plus[:, None], lanes, axis=1)
            for first in range(0, d, 128):
                part = np.zeros((n_outputs, n), dtype)
                for j in range(first, min(d, first + 128)):
                    part = part + w[:, j, None] * x[:, j]
                expected[:, :n] += part
            np.testing.assert_array_equal(out, expected)


def gradient_in_order(X: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Four rows at a time, counted from the batch's start; rows that are not there add zeros."""
    missing = -len(X) % 4
    X, slopes = np.vstack([X, np.zeros((missing, X.shape[1]), X.dtype)]), np.append(slopes, np.zeros(missing))
    products = slopes.astype(X.dtype)[:, None] * X
    total = np.zeros(X.shape[1], X.dtype)
    for i in range(0, len(X), 4):
        total = total + ((products[i] + products[i + 1]) + (products[i + 2] + products[i + 3]))
    return total


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 33, 150])
def test_one_batch_of_squared_error_has_the_documented_bits(n, d):
    """Prediction, gradient and step of plain SGD, bit for bit, from the order of the sums in the docstrings."""
    given = make_rows(n, d, dtype=np.float32, seed=n)
    recipe = Recipe(optimizer="sgd", learning_rate="constant", eta0=0.25, batch_size=n)
    state = begin(recipe, given)
    first = np.random.default_rng(n).standard_normal(d + 1)
    state.theta[0] = first
    feed(state, given, pack(recipe, given))
    coef = first[:-1].astype(np.float32)
    p = np.array([dot_in_order(x, coef) for x in given.X], np.float64) + first[-1]
    slopes = p - given.y[:, 0]
    g = gradient_in_order(given.X, slopes).astype(np.float64) * (1 / n)
    intercept = sum_in_order(slopes) * (1 / n)
    np.testing.assert_array_equal(state.theta[0], first - 0.25 * np.append(g, intercept))
    assert state.scalars[kernels.LOSS_SUM] == sum_in_order(0.5 * slopes * slopes)


@pytest.mark.parametrize("n_outputs", [2, 3, 5, 8])
@pytest.mark.parametrize("d", WIDTHS)
def test_gradients_of_several_outputs_have_the_documented_bits(d, n_outputs):
    given = make_rows(45, d, dtype=np.float32, seed=d, n_targets=n_outputs)
    recipe = Recipe(optimizer="sgd", learning_rate="constant", eta0=0.25, batch_size=45)
    state = begin(recipe, given)
    feed(state, given, pack(recipe, given))
    expected = [gradient_in_order(given.X, -y).astype(np.float64) * (1 / 45) for y in given.y.T]
    np.testing.assert_array_equal(state.theta[:, :-1], 0.0 - 0.25 * np.array(expected))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["auto", "sgd"])
def test_an_output_is_trained_as_if_it_were_alone(dtype, optimizer):
    """For every number of features, since each has blocks of its own, which outputs must not share."""
    recipe = Recipe(optimizer=optimizer, batch_size=32)
    for d in range(1, 41):
        for n_targets in (2, 3):
            rows = make_rows(150, d, n_targets=n_targets, dtype=dtype)
            together = train(recipe, rows)
            for k in range(n_targets):
                alone = train(recipe, Rows(rows.X, np.ascontiguousarray(rows.y[:, k : k + 1])))
                expected, found = alone.theta[0], together.theta[k]
                if n_targets == 2:  # with more, sums go another way
                    assert found.tobytes() == expected.tobytes(), (d, k)
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=f"{d} features, output {k}")


def test_arrays_that_are_not_contiguous_are_refused():
    """Their addresses would be wrong, and nothing else would notice."""
    given = make_rows(8, 3)
    recipe = Recipe()
    state = begin(recipe, given)
    with pytest.raises(nb.core.errors.TypingError):
        feed(state, Rows(np.asfortranarray(given.X), given.y), pack(recipe, given))


# --- what a call leaves behind ---------------------------------------------------------------------------------------
def test_counters_checksum_and_moments():
    rows = make_rows(103, 4, dtype=np.float32)
    recipe = Recipe(batch_size=10)
    state = begin(recipe, rows)
    feed(state, rows, pack(recipe, rows, moments=True), start=3, stop=58, close=False)
    counters = state.counters
    assert counters[[kernels.ROW, kernels.EPOCH_ROWS, kernels.N_ROWS]].tolist() == [58, 55, 55]
    assert counters[[kernels.N_UPDATES, kernels.N_CARRY]].tolist() == [5, 5]
    np.testing.assert_array_equal(state.carry_X[:5], rows.X[53:58])
    np.testing.assert_array_equal(state.carry_y[:5], rows.y[53:58])
    assert state.checksum[0] == sum(range(3, 58))
    expected = np.zeros((2, 4))
    for first in range(3, 53, 10):  # of whole batches, four rows at a time, in the rows' type
        for place, X in enumerate((rows.X[first : first + 10], rows.X[first : first + 10] ** 2)):
            part = np.zeros(4, np.float32)
            for i in range(0, 8, 4):
                part = part + ((X[i] + X[i + 1]) + (X[i + 2] + X[i + 3]))
            expected[place] += (part + X[8]) + X[9]
    np.testing.assert_array_equal(state.moments, expected)
    feed(state, rows, pack(recipe, rows, moments=True), start=58)
    np.testing.assert_allclose(state.moments[1], (rows.X[3:].astype(float) ** 2).sum(axis=0), rtol=1e-6)


def test_the_checksum_wraps_around():
    rows = make_rows(4, 1)
    recipe = Recipe(batch_size=3)
    state = begin(recipe, rows)
    state.checksum[0] = 2**64 - 2
    feed(state, rows, pack(recipe, rows))
    assert state.checksum[0] == 4


def test_moments_are_kept_only_when_asked_for():
    rows = make_rows(20, 2)
    assert not train(Recipe(), rows).moments.any()


def test_the_open_batch_is_closed_with_the_rows_it_has():
    rows = make_rows(25, 3)
    recipe = Recipe(batch_size=10)
    packed = pack(recipe, rows)
    state = begin(recipe, rows)
    feed(state, rows, packed, close=False)
    assert (state.counters[kernels.N_UPDATES], state.counters[kernels.N_CARRY]) == (2, 5)
    feed(state, rows, packed, start=25, close=True)
    assert (state.counters[kernels.N_UPDATES], state.counters[kernels.N_CARRY]) == (3, 0)
    assert bits_of(state) == bits_of(train(recipe, rows))
    feed(state, rows, packed, start=25, close=True)
    assert state.counters[kernels.N_UPDATES] == 3


def test_no_rows_change_nothing():
    rows = make_rows(25, 3)
    recipe = Recipe(batch_size=10)
    state = begin(recipe, rows)
    before = bits_of(state)
    feed(state, rows, pack(recipe, rows), stop=0)
    assert bits_of(state) == before


def test_weights_of_one_are_no_weights():
    rows = make_rows(60, 3)
    recipe = Recipe(batch_size=16)
    weighted = Rows(rows.X, rows.y, np.ones(60))
    assert bits_of(train(recipe, rows))["theta"] == bits_of(train(recipe, weighted))["theta"]


def test_the_scale_of_the_weights_does_not_matter():
    rows = make_rows(60, 3, weighted=True)
    eightfold = Rows(rows.X, rows.y, rows.weight * 8)
    recipe = Recipe(batch_size=16, penalty="l2")
    np.testing.assert_array_equal(train(recipe, rows).theta, train(recipe, eightfold).theta)


def test_rows_of_weight_zero_do_not_pull():
    rows = make_rows(60, 3)
    silent = np.concatenate([rows.y[:30], rows.y[30:] + 1000])
    weight = np.repeat([1.0, 0.0], 30)
    recipe = Recipe(batch_size=60)
    moved = train(recipe, Rows(rows.X, silent, weight))
    np.testing.assert_array_equal(moved.theta, train(recipe, Rows(rows.X, rows.y, weight)).theta)
    assert moved.progressive_loss < 100


# --- chunk invariance ------------------------------------------------------------------------------------------------
OPTIMIZERS = [
    {},
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "learning_rate": "cosine", "momentum": 0.9, "nesterov": True, "average": 3},
    {"optimizer": "adagrad", "average": True},
    {"optimizer": "adam"},
    {"optimizer": "dowg"},
]
PENALTIES = [{}, {"penalty": "l2", "alpha": 0.01}, {"penalty": "elasticnet", "alpha": 0.02, "l1_ratio": 0.6}]


@st.composite
def cut_problems(draw):
    """A recipe, rows for it, and two sets of edges at which to cut them."""
    loss = draw(st.sampled_from(sorted(LOSSES)))
    task = LOSSES[loss].task
    recipe = Recipe(
        task=task,
        loss=loss,
        batch_size=draw(st.integers(1, 40)),
        fit_intercept=draw(st.booleans()),
        **draw(st.sampled_from(OPTIMIZERS)),
        **draw(st.sampled_from(PENALTIES)),
    )
    n = draw(st.integers(1, 130))
    rows = make_rows(
        n,
        draw(st.integers(1, 40)),
        seed=draw(st.integers(0, 99)),
        dtype=draw(st.sampled_from([np.float32, np.float64])),
        n_targets=draw(st.integers(1, 3)) if task == "regression" else 1,
        n_classes=draw(st.integers(2, 5)) if task == "classification" else 0,
        weighted=draw(st.booleans()),
        class_weighted=task == "classification" and draw(st.booleans()),
    )
    edges = st.lists(st.integers(1, max(1, n - 1)), max_size=12).map(lambda cuts: [cut for cut in cuts if cut < n])
    return recipe, rows, draw(edges), draw(edges)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cut_problems())
def test_where_windows_and_pieces_end_changes_no_bit(problem):
    recipe, rows, window_edges, piece_edges = problem
    whole = train_in_pieces(recipe, rows, [], [], moments=True)
    assert whole.counters[kernels.STATUS] == kernels.OK
    cut = train_in_pieces(recipe, rows, window_edges, piece_edges, moments=True)
    assert bits_of(cut) == bits_of(whole)


@pytest.mark.parametrize("kind", ["regression", "softmax"])
def test_row_by_row_equals_all_at_once(kind):
    n_classes = 4 if kind == "softmax" else 0
    rows = make_rows(70, 19, dtype=np.float32, n_targets=3 - 2 * (n_classes > 0), n_classes=n_classes, weighted=True)
    recipe = Recipe(task="classification", loss="log_loss", batch_size=32) if n_classes else Recipe(batch_size=32)
    assert bits_of(train_in_pieces(recipe, rows, range(1, 70), [])) == bits_of(train(recipe, rows))
