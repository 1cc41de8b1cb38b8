"""Values, slopes and curvatures of the losses, and where the intercept starts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn._loss import HuberLoss, PinballLoss
from sklearn.linear_model import _sgd_fast
from sklearn.metrics import log_loss

from streamgd.errors import OptionError
from streamgd.learn import kernels
from streamgd.learn.kernels import losses
from streamgd.learn.kernels.batch import fill
from streamgd.learn.kernels.losses import LANES
from streamgd.learn.losses import LOSSES, curvature_of, get_loss, outputs_of, start_intercept
from streamgd.learn.recipe import Recipe
from tests.learn.reference import loss_terms, softmax_terms
from tests.learn.training import EMPTY, compiled

NAMES = sorted(LOSSES)
EPSILON, QUANTILE = 0.3, 0.7


def write_elementwise(code, arrays, shapes):
    loss, sums = arrays["loss"][0], arrays["sums"]
    with code.loop(0, shapes["p"][0], LANES) as i:
        fill(code, sums, shapes["sums"][0], code.number(0.0))
        p, y, slope, curve = (arrays[name] + i for name in ("p", "y", "slope", "curve"))
        n = code.integer(LANES)
        losses.elementwise_loss(code, loss, p, y, arrays["ones"], n, arrays["params"], slope, curve, sums)
        arrays["value"].store(i, sums.load(losses.SUM_LOSS, LANES))  # one row each


def write_softmax(code, arrays, shapes):
    n_outputs, n = shapes["P"]
    sums = arrays["sums"]
    with code.loop(0, n, LANES) as i:
        fill(code, sums, shapes["sums"][0], code.number(0.0))
        P, classes, slope, share = (arrays[name] + i for name in ("P", "classes", "slope", "share"))
        losses.softmax_loss(code, P, n, classes, arrays["ones"], code.integer(LANES), n_outputs, slope, share, sums)
        arrays["value"].store(i, sums.load(losses.SUM_LOSS, LANES))


_elementwise = compiled("loss params p y ones value slope curve sums", write_elementwise)
_softmax = compiled("P classes ones value slope share sums", write_softmax)


def padded(values: np.ndarray) -> np.ndarray:
    """Return an array whose last axis is a multiple of LANES; what is added repeats the last values."""
    n = values.shape[-1]
    return np.ascontiguousarray(values[..., np.minimum(np.arange(-(-n // LANES) * LANES), n - 1)], np.float64)


def terms(name: str, p: np.ndarray, y: np.ndarray):
    """Value, slope and curvature by the compiled code."""
    recipe = Recipe(task=LOSSES[name].task, loss=name, epsilon=EPSILON, quantile=QUANTILE)
    params = recipe.pack(n_classes=0, n_updates=1, mean_weight=1, moments=False).params
    value, slope, curve = np.empty((3, len(padded(p))))
    sums = np.empty(losses.N_SUMS * LANES)
    _elementwise(np.array([LOSSES[name].code]), params, padded(p), padded(y), np.ones(LANES), value, slope, curve, sums)
    return value[: len(p)], slope[: len(p)], curve[: len(p)]


def softmax(P: np.ndarray, classes: np.ndarray):
    """Loss, derivatives and probabilities by the compiled code; P has shape (n, K)."""
    n, by_output = len(P), padded(P.T)
    value, slope, share = np.empty(by_output.shape[1]), np.empty_like(by_output), np.empty_like(by_output)
    sums = np.empty(len(by_output) * losses.N_SUMS * LANES)
    _softmax(by_output, padded(classes), np.ones(LANES), value, slope, share, sums)
    return value[:n], slope.T[:n], share.T[:n]


def decisions(name: str, n: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    p = rng.uniform(-4, 4, n)
    return p, rng.uniform(-4, 4, n) if LOSSES[name].task == "regression" else rng.choice([-1.0, 1.0], n)


def from_kinks(name: str, p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of each prediction from where the loss or its slope has a kink."""
    r, z = p - y, p * y
    at = {
        "huber": [abs(r) - EPSILON],
        "epsilon_insensitive": [abs(r) - EPSILON],
        "squared_epsilon_insensitive": [abs(r) - EPSILON],
        "quantile": [r],
        "hinge": [z - 1],
        "perceptron": [z],
        "squared_hinge": [z - 1],
        "modified_huber": [z - 1, z + 1],
    }
    return np.min([np.abs(gap) for gap in at.get(name, [np.ones_like(r)])], axis=0)


@pytest.mark.parametrize("name", NAMES)
class TestEveryLoss:
    def test_slope_is_the_derivative_of_the_value(self, name):
        p, y = decisions(name)
        h = 1e-6
        smooth = from_kinks(name, p, y) > 2 * h
        assert smooth.mean() > 0.9
        numeric = (terms(name, p + h, y)[0] - terms(name, p - h, y)[0]) / (2 * h)
        np.testing.assert_allclose(terms(name, p, y)[1][smooth], numeric[smooth], rtol=1e-7, atol=1e-8)

    def test_curvature_is_the_derivative_of_the_slope(self, name):
        p, y = decisions(name)
        h = 1e-5
        smooth = from_kinks(name, p, y) > 2 * h
        numeric = (terms(name, p + h, y)[1] - terms(name, p - h, y)[1]) / (2 * h)
        np.testing.assert_allclose(terms(name, p, y)[2][smooth], numeric[smooth], rtol=1e-7, atol=1e-8)

    def test_values_are_those_of_the_formulas(self, name):
        p, y = decisions(name)
        for found, expected in zip(terms(name, p, y), loss_terms(name, p, y, EPSILON, QUANTILE), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15)

    def test_never_negative_and_convex(self, name):
        p, y = decisions(name)
        value, _, curve = terms(name, p, y)
        assert (value >= 0).all()
        assert (curve >= 0).all()
        order = np.argsort(p)
        fixed = np.full(len(p), y[0])
        assert (np.diff(terms(name, p[order], fixed)[1]) >= -1e-15).all()

    @pytest.mark.parametrize("size", [1e4, 1e8, 1e70])
    def test_extreme_decision_values_stay_finite(self, name, size):
        p = np.array([size, size, -size, -size])
        y = np.array([1.0, -1.0, 1.0, -1.0])
        value, slope, curve = terms(name, p, y)
        assert np.isfinite([value, slope, curve]).all()
        if LOSSES[name].task == "classification":
            assert (value[[0, 3]] < 1e-300).all()
            assert (value[[1, 2]] >= size).all()
            assert (slope[1], slope[2]) == (-slope[2], slope[2])


SCIKIT_LEARN = {
    "epsilon_insensitive": lambda: _sgd_fast.EpsilonInsensitive(EPSILON),
    "squared_epsilon_insensitive": lambda: _sgd_fast.SquaredEpsilonInsensitive(EPSILON),
    "hinge": lambda: _sgd_fast.Hinge(1.0),
    "perceptron": lambda: _sgd_fast.Hinge(0.0),
    "squared_hinge": lambda: _sgd_fast.SquaredHinge(1.0),
    "modified_huber": lambda: _sgd_fast.ModifiedHuber(),
}


@pytest.mark.parametrize("name", sorted(SCIKIT_LEARN))
def test_scikit_learns_values_and_slopes_kinks_included(name):
    p, y = decisions(name, 300)
    p = np.concatenate([p, np.repeat([0.0, 1.0, -1.0, 2.0, -2.0], 2), y[:2] + EPSILON])
    y = np.concatenate([y, np.tile([1.0, -1.0], 5), y[:2]])
    value, slope, _ = terms(name, p, y)
    theirs = SCIKIT_LEARN[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        np.testing.assert_allclose(value, [theirs.py_loss(a, b) for a, b in zip(p, y, strict=True)], atol=1e-15)
        np.testing.assert_allclose(slope, [theirs.py_dloss(a, b) for a, b in zip(p, y, strict=True)], atol=1e-15)


@pytest.mark.parametrize("name", ["huber", "quantile", "log_loss", "squared_error"])
def test_scikit_learns_shared_losses(name):
    p, y = decisions(name, 300)
    value, slope, _ = terms(name, p, y)
    if name == "huber":
        theirs = HuberLoss(delta=EPSILON)
        np.testing.assert_allclose(value, theirs.loss(y, p), atol=1e-15)
        np.testing.assert_allclose(slope, theirs.gradient(y, p), atol=1e-15)
    elif name == "quantile":
        theirs = PinballLoss(quantile=QUANTILE)
        np.testing.assert_allclose(value, theirs.loss(y, p), atol=1e-15)
        np.testing.assert_allclose(slope, theirs.gradient(y, p), atol=1e-15)
    elif name == "log_loss":
        assert value.mean() == pytest.approx(log_loss(y, 1 / (1 + np.exp(-p))), rel=1e-13)
    else:
        np.testing.assert_allclose(value, 0.5 * (p - y) ** 2, rtol=1e-15)


class TestLogLoss:
    def test_tails_keep_their_relative_accuracy(self):
        p = np.array([40.0, 300.0, 700.0])
        value, slope, curve = terms("log_loss", p, np.ones(3))
        np.testing.assert_allclose(value, np.exp(-p), rtol=1e-13)
        np.testing.assert_allclose(slope, -np.exp(-p), rtol=1e-13)
        np.testing.assert_allclose(curve, np.exp(-p), rtol=1e-13)
        np.testing.assert_allclose(terms("log_loss", -p, np.ones(3))[2], np.exp(-p), rtol=1e-13)


class TestSoftmax:
    @pytest.mark.parametrize("n_classes", [3, 10, 101])
    def test_equals_numpy(self, n_classes):
        rng = np.random.default_rng(n_classes)
        P, classes = rng.normal(0, 5, (300, n_classes)), rng.integers(0, n_classes, 300)
        for found, expected in zip(softmax(P, classes), softmax_terms(P, classes), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)

    def test_slopes_are_the_derivatives_of_the_value(self):
        rng = np.random.default_rng(0)
        P, classes = rng.normal(0, 2, (100, 4)), rng.integers(0, 4, 100)
        slopes, h = softmax(P, classes)[1], 1e-6
        for k in range(4):
            step = h * (np.arange(4) == k)
            numeric = (softmax(P + step, classes)[0] - softmax(P - step, classes)[0]) / (2 * h)
            np.testing.assert_allclose(slopes[:, k], numeric, atol=1e-8)

    @pytest.mark.parametrize("size", [1e4, 1e100])
    def test_extreme_decision_values_stay_finite(self, size):
        P = size * np.array([[1.0, -1.0, 0.0], [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
        value, slope, share = softmax(P, np.array([1, 0, 2]))
        np.testing.assert_allclose(value[0], 2 * size, rtol=1e-12)
        assert np.isfinite([slope, share]).all()
        np.testing.assert_allclose(share[0], [1, 0, 0], atol=1e-300)
        np.testing.assert_allclose(share[1:], 1 / 3, rtol=1e-15)

    def test_two_classes_agree_with_log_loss(self):
        p = np.linspace(-5, 5, 41)
        value, slope, _ = softmax(np.column_stack([np.zeros(41), p]), np.ones(41))
        expected = terms("log_loss", p, np.ones(41))
        np.testing.assert_allclose(value, expected[0], rtol=1e-13)
        np.testing.assert_allclose(slope[:, 1], expected[1], rtol=1e-12)


# --- the table -------------------------------------------------------------------------------------------------------
def test_codes_differ():
    codes = [loss.code for loss in LOSSES.values()]
    assert len(set(codes)) == len(codes) == 10


@pytest.mark.parametrize("name", NAMES)
def test_get_loss_knows_the_task(name):
    loss = LOSSES[name]
    other = "regression" if loss.task == "classification" else "classification"
    assert get_loss(name, loss.task) is loss
    with pytest.raises(OptionError, match=f"loss='{name}' is not a loss for {other}: expected one of '"):
        get_loss(name, other)


@pytest.mark.parametrize("name", ["", "squared", None, 3, ["hinge"]])
def test_an_unknown_loss_lists_those_there_are(name):
    with pytest.raises(OptionError, match="'log_loss', 'hinge', 'squared_hinge', 'modified_huber', 'perceptron'"):
        get_loss(name, "classification")


def test_outputs_of():
    assert [outputs_of(LOSSES["huber"], n, 0) for n in (1, 3)] == [1, 3]
    assert [outputs_of(LOSSES["hinge"], 1, n) for n in (1, 2, 3, 7)] == [1, 1, 3, 7]


# --- where the intercept starts --------------------------------------------------------------------------------------
class TestStartIntercept:
    def test_regression_starts_at_the_mean(self):
        start = start_intercept(LOSSES["squared_error"], np.array([3.0, -2.0]), EMPTY)
        assert start.tolist() == [3.0, -2.0]

    @pytest.mark.parametrize("weights", [[1.0, 1.0], [990.0, 10.0], [3.0, 8.0, 1.0], [1e6, 1.0, 5.0, 20.0]])
    def test_log_loss_predicts_the_shares(self, weights):
        weights = np.array(weights)
        start = start_intercept(LOSSES["log_loss"], EMPTY, weights)
        if len(weights) == 2:
            start = np.array([0.0, start[0]])
        share = np.exp(start) / np.exp(start).sum()
        np.testing.assert_allclose(share, weights / weights.sum(), rtol=1e-12)

    @pytest.mark.parametrize("name", ["squared_hinge", "modified_huber"])
    @pytest.mark.parametrize("weights", [[50.0, 50.0], [990.0, 10.0], [3.0, 8.0, 1.0]])
    def test_squared_margins_start_at_their_best_constant(self, name, weights):
        weights = np.array(weights)
        start = start_intercept(LOSSES[name], EMPTY, weights)
        shares = weights[-1:] / weights.sum() if len(weights) == 2 else weights / weights.sum()
        for p, share in zip(start, shares, strict=True):
            slope = (
                share * terms(name, np.array([p]), np.ones(1))[1]
                + (1 - share) * terms(name, np.array([p]), -np.ones(1))[1]
            )
            assert abs(slope[0]) < 1e-12

    @pytest.mark.parametrize("name", [name for name in NAMES if LOSSES[name].task == "classification"])
    @pytest.mark.parametrize("weights", [[0.0, 10.0], [10.0, 0.0], [5.0, 0.0, 5.0], [0.0, 0.0], [0.0, 0.0, 0.0]])
    def test_a_class_not_seen_yet_starts_finite(self, name, weights):
        start = start_intercept(LOSSES[name], EMPTY, np.array(weights))
        assert start.shape == (1 if len(weights) == 2 else 3,)
        assert np.isfinite(start).all()
        if len(weights) == 3 and weights[0] > 0:
            assert start[1] <= start[0]

    def test_perceptron_starts_at_zero(self):
        assert start_intercept(LOSSES["perceptron"], EMPTY, np.array([9.0, 1.0])).tolist() == [0.0]
        assert start_intercept(LOSSES["perceptron"], EMPTY, np.array([9.0, 1.0, 4.0])).tolist() == [0.0] * 3


# --- mean loss of given predictions ----------------------------------------------------------------------------------
class TestMeanLoss:
    @pytest.mark.parametrize("constant", [False, True])
    @pytest.mark.parametrize("name", NAMES)
    def test_is_weighted_and_spans_tiles(self, name, constant):
        rng = np.random.default_rng(0)
        loss, n = LOSSES[name], 2500
        weight = rng.uniform(0, 2, n)
        n_outputs = 2 if loss.task == "regression" else 3
        decisions = rng.standard_normal((1 if constant else n, n_outputs))
        P = np.broadcast_to(decisions, (n, n_outputs))
        if loss.task == "regression":
            y, factors = rng.standard_normal((n, 2)), EMPTY
            expected = np.average(loss_terms(name, P, y, EPSILON, QUANTILE)[0].mean(axis=1), weights=weight)
        else:
            y, factors = rng.integers(0, 3, (n, 1)).astype(float), np.array([1.0, 2.0, 0.5])
            if name == "log_loss":
                value = softmax_terms(P, y[:, 0])[0]
            else:
                value = loss_terms(name, P, np.where(y == np.arange(3), 1.0, -1.0))[0].mean(axis=1)
            expected = np.average(value, weights=weight * factors[y[:, 0].astype(int)])
        recipe = Recipe(task=loss.task, loss=name, epsilon=EPSILON, quantile=QUANTILE)
        packed = recipe.pack(n_classes=len(factors), n_updates=1, mean_weight=1, moments=False)
        found = kernels.mean_loss(y, weight, decisions, packed.codes, packed.params, factors)
        assert found == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("name", ["log_loss", "hinge"])
    def test_two_classes_have_one_output(self, name):
        y, p = np.array([[0.0], [1.0], [1.0]]), np.array([[-0.5], [0.3], [-2.0]])
        packed = Recipe(task="classification", loss=name).pack(n_classes=2, n_updates=1, mean_weight=1, moments=False)
        found = kernels.mean_loss(y, np.ones(3), p, packed.codes, packed.params, EMPTY)
        assert found == pytest.approx(loss_terms(name, p[:, 0], np.array([-1.0, 1.0, 1.0]))[0].mean(), rel=1e-12)

    def test_no_weight_is_no_loss(self):
        packed = Recipe().pack(n_classes=0, n_updates=1, mean_weight=1, moments=False)
        found = kernels.mean_loss(np.ones((3, 1)), np.zeros(3), np.ones((1, 1)), packed.codes, packed.params, EMPTY)
        assert found == 0.0


@pytest.mark.parametrize(
    ("loss", "unit", "classes", "expected"),
    [
        ("squared_error", [3.0, 0.1], [], [1.0, 1.0]),
        ("squared_epsilon_insensitive", [3.0], [], [2.0]),
        ("quantile", [4.0, 0.5], [], [0.25, 2.0]),
        ("log_loss", [1.0], [0.9, 0.1], [0.09]),
        ("log_loss", [1.0], [90.0, 10.0], [9.0]),  # of classes that count a hundred times
        ("log_loss", [1.0] * 3, [0.5, 0.3, 0.2], [0.25, 0.21, 0.16]),
        ("squared_hinge", [1.0], [0.5, 0.5], [2.0]),
        ("hinge", [1.0], [1.0, 2.0], [3.0]),
    ],
)
def test_how_much_losses_bend(loss, unit, classes, expected):
    found = curvature_of(LOSSES[loss], np.array(unit), np.array(classes, np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
