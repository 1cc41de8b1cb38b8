"""The optimizers against plain NumPy, against scikit-learn and against the optimum; and what divergence leaves."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import SGDClassifier, SGDRegressor

from streamgd.learn import kernels, optimizers
from streamgd.learn.losses import LOSSES
from streamgd.learn.optimizers import OPTIMIZERS, resolve
from streamgd.learn.recipe import Recipe
from streamgd.learn.state import State
from tests.learn.reference import Reference, loss_terms, softmax_terms
from tests.learn.training import Rows, begin, bits_of, feed, make_rows, pack, train

# --- against NumPy ---------------------------------------------------------------------------------------------------
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "l2": {"penalty": "l2", "alpha": 0.05},
    "l1": {"penalty": "l1", "alpha": 0.03},
    "elasticnet": {"penalty": "elasticnet", "alpha": 0.05, "l1_ratio": 0.4},
}
STEPS: dict[str, dict[str, Any]] = {
    "auto": {},
    "auto, eta0 2": {"eta0": 2.0},
    "auto, not averaged": {"average": False},
    "sgd": {"optimizer": "sgd", "eta0": 0.05},
    "sgd, momentum": {"optimizer": "sgd", "learning_rate": "constant", "eta0": 0.02, "momentum": 0.8},
    "sgd, nesterov": {"optimizer": "sgd", "learning_rate": "constant", "momentum": 0.8, "nesterov": True},
    "sgd, invscaling": {"optimizer": "sgd", "learning_rate": "invscaling", "eta0": 0.1, "power_t": 0.6},
    "sgd, cosine": {"optimizer": "sgd", "learning_rate": "cosine", "eta0": 0.1},
    "sgd, adaptive": {"optimizer": "sgd", "learning_rate": "adaptive", "eta0": 0.1},
    "sgd, averaged": {"optimizer": "sgd", "learning_rate": "constant", "eta0": 0.05, "average": True},
    "sgd, averaged from 4": {"optimizer": "sgd", "learning_rate": "constant", "eta0": 0.05, "average": 4},
    "adagrad": {"optimizer": "adagrad"},
    "adagrad, invscaling": {"optimizer": "adagrad", "learning_rate": "invscaling", "average": True},
    "adam": {"optimizer": "adam", "eta0": 0.05},
    "adam, cosine": {"optimizer": "adam", "learning_rate": "cosine", "eta0": 0.05, "average": True},
    "dowg": {"optimizer": "dowg"},
    "dowg, not averaged": {"optimizer": "dowg", "average": False},
}
TARGETS: dict[str, dict[str, Any]] = {
    "one target": {"n_targets": 1},
    "three targets": {"n_targets": 3, "weighted": True},
    "two classes": {"n_classes": 2, "class_weighted": True},
    "softmax": {"n_classes": 4, "weighted": True, "class_weighted": True},
    "one against the rest": {"n_classes": 3, "weighted": True},
}


def assert_equals_reference(recipe: Recipe, rows: Rows, intercept: np.ndarray | None = None) -> None:
    n_updates = 2 * -(-len(rows) // recipe.batch_size)
    reference = Reference(recipe, rows, intercept, n_updates=n_updates)
    state = begin(recipe, rows, intercept)
    packed = pack(recipe, rows, n_updates=n_updates)
    for _ in range(2):
        feed(state, rows, packed)
        reference.epoch()
    assert state.counters[kernels.STATUS] == kernels.OK
    assert state.counters[kernels.N_UPDATES] == reference.t
    pairs = [(state.theta, reference.theta), (state.average, reference.average)]
    if recipe.is_sparse:
        pairs.append((state.subgradient[:, :-1], reference.subgradient))
    else:
        assert len(state.subgradient) == 0
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12 * np.abs(expected).max())
    sums = state.scalars[[kernels.LOSS_SUM, kernels.WEIGHT_SUM, kernels.PENALTY_SUM]]
    np.testing.assert_allclose(
        sums, [reference.loss_sum, reference.weight_sum, reference.penalty_sum], rtol=1e-12, atol=1e-300
    )


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("steps", STEPS)
def test_every_optimizer_and_penalty_equals_numpy(steps, penalty, targets):
    rows = make_rows(150, 5, **TARGETS[targets])
    loss = {"softmax": "log_loss", "one against the rest": "modified_huber", "two classes": "log_loss"}.get(targets)
    task = {"task": "classification", "loss": loss} if loss else {}
    recipe = Recipe(**task, **STEPS[steps], **PENALTIES[penalty], batch_size=16)
    assert_equals_reference(recipe, rows)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("steps", ["auto", "sgd", "adam", "dowg"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_equals_numpy(loss, steps, fit_intercept):
    task = LOSSES[loss].task
    rows = make_rows(150, 5, seed=1, n_classes=2 * (task == "classification"), weighted=True)
    recipe = Recipe(task=task, loss=loss, epsilon=0.2, quantile=0.7, fit_intercept=fit_intercept, **STEPS[steps])
    assert_equals_reference(recipe, rows, np.array([0.25]) if fit_intercept else None)


@pytest.mark.parametrize("steps", ["auto", "adagrad"])
def test_the_default_measures_steps_in_the_targets_units(steps):
    rows = make_rows(150, 5, n_targets=2)
    unit = np.array([1000.0, 0.01])
    scaled = Rows(rows.X, rows.y * unit, target_scale=unit)
    recipe = Recipe(**STEPS[steps], batch_size=16)
    assert_equals_reference(recipe, scaled)
    ours, theirs = train(recipe, scaled).theta / unit[:, None], train(recipe, rows).theta
    assert np.allclose(ours, theirs, rtol=1e-9) == (steps == "auto")


def test_optimal_equals_numpy():
    rows = make_rows(300, 5, n_classes=2)
    for penalty in PENALTIES.values():
        recipe = Recipe(task="classification", loss="hinge", optimizer="sgd", **{"alpha": 0.02, **penalty})
        assert recipe.schedule == "optimal"
        assert_equals_reference(recipe, rows)


# --- against scikit-learn --------------------------------------------------------------------------------------------
SHARED = ["squared_error", "huber", "epsilon_insensitive", "squared_epsilon_insensitive"]
SHARED += ["log_loss", "hinge", "squared_hinge", "modified_huber", "perceptron"]


@pytest.mark.parametrize("average", [False, True, 25])
@pytest.mark.parametrize("learning_rate", ["constant", "optimal", "invscaling"])
@pytest.mark.parametrize("penalty", [None, "l2"])
@pytest.mark.parametrize("loss", SHARED)
def test_one_row_at_a_time_equals_scikit_learn(loss, penalty, learning_rate, average):
    task = LOSSES[loss].task
    rows = make_rows(120, 4, seed=2, n_classes=2 * (task == "classification"), weighted=True)
    # The first optimal rate is alpha**(-1/4): too long a step for a curvature of 1 unless alpha is large.
    alpha = 1e4 if learning_rate == "optimal" and (task == "regression" or loss == "squared_hinge") else 0.01
    common = {"loss": loss, "penalty": penalty, "alpha": alpha, "learning_rate": learning_rate, "eta0": 0.01}
    theirs = (SGDRegressor if task == "regression" else SGDClassifier)(
        **common, power_t=0.4, average=average, max_iter=3, tol=None, shuffle=False
    )
    theirs.fit(rows.X, rows.y[:, 0], sample_weight=rows.weight)
    recipe = Recipe(task=task, **common, power_t=0.4, average=average, batch_size=1)
    state, packed = (
        begin(recipe, rows),
        recipe.pack(n_classes=rows.n_classes, n_updates=1, mean_weight=1, moments=False),
    )
    for _ in range(3):
        feed(state, rows, packed)
    found = (state.average if average else state.theta)[0]
    expected = np.append(theirs.coef_, theirs.intercept_)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


# --- against the optimum ---------------------------------------------------------------------------------------------
def missed(recipe: Recipe, rows: Rows, theta: np.ndarray, best: np.ndarray, start: np.ndarray) -> float:
    """Share of the attainable gain, from the constant prediction to the optimum, that is still missed."""

    def mean_loss(coefficients: np.ndarray) -> float:
        P = rows.X @ coefficients[:, :-1].T + coefficients[:, -1]
        if rows.n_classes > 2:
            return softmax_terms(P, rows.y[:, 0])[0].mean()
        y = np.where(rows.y > 0, 1.0, -1.0) if rows.n_classes else rows.y
        return loss_terms(recipe.loss, P, y)[0].mean()

    constant = np.zeros_like(best)
    constant[:, -1] = start
    return (mean_loss(theta) - mean_loss(best)) / (mean_loss(constant) - mean_loss(best))


def newton(rows: Rows) -> np.ndarray:
    """Coefficients of the logistic regression's optimum, softmax for three classes and more."""
    X = np.column_stack([rows.X, np.ones(len(rows))])
    d = X.shape[1]
    if rows.n_classes == 2:
        theta, s = np.zeros(d), np.where(rows.y[:, 0] > 0, 1.0, -1.0)
        for _ in range(30):
            _, slope, curve = loss_terms("log_loss", X @ theta, s)
            theta -= np.linalg.solve((X * curve[:, None]).T @ X, X.T @ slope)
        return theta[None]
    K = rows.n_classes
    theta = np.zeros(K * d)
    for _ in range(30):
        _, slope, share = softmax_terms(X @ theta.reshape(K, d).T, rows.y[:, 0])
        hessian = np.block(
            [[(X * (share[:, a] * ((a == b) - share[:, b]))[:, None]).T @ X for b in range(K)] for a in range(K)]
        )
        theta -= np.linalg.lstsq(hessian, (slope.T @ X).ravel(), rcond=1e-12)[0]
    return theta.reshape(K, d)


@functools.cache
def converging_problem(kind: str) -> tuple[Recipe, Rows, np.ndarray, np.ndarray]:
    """A recipe's loss, rows, the optimum and the best constant."""
    if kind == "squared_error":
        rows = make_rows(20_000, 8, seed=3)
        X = np.column_stack([rows.X, np.ones(len(rows))])
        return Recipe(), rows, np.linalg.lstsq(X, rows.y)[0].T, rows.y.mean(axis=0)
    n_classes = 2 if kind == "log_loss" else 4
    rows = make_rows(20_000, 8, seed=3, n_classes=n_classes)
    share = np.bincount(rows.y[:, 0].astype(int)) / len(rows)
    start = np.log(share) if n_classes > 2 else np.log(share[1:] / share[:1])
    return Recipe(task="classification", loss="log_loss"), rows, newton(rows), start


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["squared_error", "log_loss", "softmax"])
def test_the_default_reaches_the_optimum(kind, dtype):
    recipe, rows, best, start = converging_problem(kind)
    rows = Rows(rows.X.astype(dtype), rows.y, n_classes=rows.n_classes)
    state = train(recipe, rows, n_epochs=3, intercept=start)
    assert missed(recipe, rows, state.average, best, start) < 1e-3
    once = train(recipe, rows, n_epochs=1, intercept=start)
    assert missed(recipe, rows, once.average, best, start) < 5e-3


@pytest.mark.parametrize(
    ("options", "at_most"),
    [
        ({"optimizer": "sgd", "learning_rate": "constant", "eta0": 0.2}, 0.02),
        ({"optimizer": "sgd", "learning_rate": "invscaling", "eta0": 0.5}, 0.02),
        ({"optimizer": "sgd", "learning_rate": "cosine", "eta0": 0.2, "momentum": 0.9, "nesterov": True}, 0.01),
        ({"optimizer": "sgd", "learning_rate": "constant", "eta0": 0.5, "average": 100}, 0.01),
        ({"optimizer": "adagrad"}, 0.01),
        ({"optimizer": "adam", "eta0": 0.05, "learning_rate": "cosine"}, 0.01),
        ({"optimizer": "adam"}, 0.7),  # at its usual 0.001 it has only begun
        ({"optimizer": "dowg"}, 0.02),
    ],
    ids=lambda value: value.get("optimizer") if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", ["squared_error", "log_loss", "softmax"])
def test_every_other_optimizer_gets_near_it(kind, options, at_most):
    base, rows, best, start = converging_problem(kind)
    eta0 = options.get("eta0", "auto")
    if kind != "squared_error" and options["optimizer"] == "sgd":
        eta0 *= 5  # the curvature is at most a quarter
    recipe = Recipe(task=base.task, loss=base.loss, **{**options, "eta0": eta0})
    state = train(recipe, rows, n_epochs=3, intercept=start)
    theta = state.average if recipe.average_kind else state.theta
    assert missed(recipe, rows, theta, best, start) < at_most


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_default_learns_every_loss(loss):
    """Whatever the loss, two epochs bring it to about half of what predicting nothing costs, or lower."""
    task = LOSSES[loss].task
    rows = make_rows(20_000, 8, seed=4, n_classes=2 * (task == "classification"))
    state = train(Recipe(task=task, loss=loss), rows, n_epochs=2)
    P = rows.X @ state.average[:, :-1].T + state.average[:, -1]
    y = np.where(rows.y > 0, 1.0, -1.0) if rows.n_classes else rows.y
    start = np.zeros_like(P) if loss != "perceptron" else np.ones_like(P)
    assert loss_terms(loss, P, y)[0].mean() < 0.55 * loss_terms(loss, start, y)[0].mean()


def test_the_default_copes_with_heavy_tails():
    rng = np.random.default_rng(5)
    X = rng.lognormal(0, 2, (40_000, 8))
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    y = X @ rng.standard_normal((8, 1)) + rng.standard_normal((40_000, 1))
    rows, start = Rows(X, y, target_scale=y.std(axis=0)), y.mean(axis=0)
    best = np.linalg.lstsq(np.column_stack([X, np.ones(len(X))]), y)[0].T
    state = train(Recipe(), rows, n_epochs=2, intercept=start)
    assert missed(Recipe(), rows, state.average, best, start) < 0.01


# --- what each part promises -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", ["auto", "sgd", "adagrad", "adam", "dowg"])
@pytest.mark.parametrize("targets", ["one target", "softmax"])
def test_l1_makes_exact_zeros_and_spares_the_intercept(steps, targets):
    rows = make_rows(6000, 8, seed=6, **TARGETS[targets])
    X = rows.X.copy()
    X[:, 5:] = np.random.default_rng(0).standard_normal((6000, 3))
    noisy = Rows(X, rows.y, rows.weight, rows.n_classes, rows.class_weight)
    task = {"task": "classification", "loss": "log_loss"} if rows.n_classes else {}
    recipe = Recipe(**task, **STEPS[steps], penalty="l1", alpha=0.02 if rows.n_classes else 0.2, batch_size=500)
    state = train(recipe, noisy, n_epochs=20, intercept=np.full(max(1, rows.n_classes), 0.5))
    coef = state.theta[:, :-1]
    assert (coef[:, 5:] == 0).mean() > 0.6
    assert (coef[:, :5] != 0).any()
    assert (state.theta[:, -1] != 0).all()


@pytest.mark.parametrize("steps", ["auto", "sgd", "adagrad", "adam"])
def test_l2_reaches_the_ridge_solution(steps):
    rows = make_rows(4000, 5, seed=7)
    alpha = 0.5
    X = np.column_stack([rows.X, np.ones(len(rows))])
    ridge = alpha * len(X) * np.diag([1.0] * 5 + [0.0])
    best = np.linalg.solve(X.T @ X + ridge, X.T @ rows.y[:, 0])
    recipe = Recipe(**{**STEPS[steps], "average": True}, penalty="l2", alpha=alpha, batch_size=64)
    state = train(recipe, rows, n_epochs=30)
    np.testing.assert_allclose(state.average[0], best, atol=0.02 * np.abs(best).max())


@pytest.mark.parametrize("steps", STEPS)
def test_no_intercept_stays_exactly_zero(steps):
    rows = make_rows(200, 3, n_targets=2)
    state = train(Recipe(**STEPS[steps], fit_intercept=False, batch_size=20), rows)
    assert not state.theta[:, -1].any()
    assert not state.average[:, -1].any()
    assert state.theta[:, :-1].all()


@pytest.mark.parametrize("steps", ["auto", "adagrad", "adam"])
def test_a_feature_that_is_always_zero_gets_a_zero(steps):
    rows = make_rows(200, 3)
    rows.X[:, 1] = 0
    state = train(Recipe(**STEPS[steps], penalty="l1", alpha=1e-4, batch_size=20), rows)
    assert state.theta[0, 1] == 0
    assert np.isfinite(state.theta).all()


def test_rounding_noise_in_a_gradient_does_not_become_a_step():
    """An intercept that starts at its optimum has a gradient of pure rounding; g / √g² would be a whole step of ±1."""
    rows = make_rows(64, 3)
    start = rows.y.mean(axis=0)
    X = rows.X - rows.X.mean(axis=0)
    state = train(Recipe(batch_size=64), Rows(X, rows.y), intercept=start)
    assert abs(state.theta[0, -1] - start[0]) < 1e-6


@pytest.mark.parametrize("kind", ["squared_error", "log_loss", "softmax"])
def test_the_guard_never_overshoots_the_batch(kind):
    """With a huge eta0 one step must still not raise the loss of its own batch (beyond the quadratic model)."""
    base, rows, _, start = converging_problem(kind)
    batch = rows.part(0, 256)
    recipe = Recipe(task=base.task, loss=base.loss, eta0=1e6)
    state = begin(recipe, batch, start)
    packed = pack(recipe, batch)
    losses = []
    for _ in range(20):
        state.scalars[[kernels.LOSS_SUM, kernels.WEIGHT_SUM]] = 0
        feed(state, batch, packed)
        losses.append(state.progressive_loss)
    assert (np.diff(losses) <= 1e-12).all()


# --- divergence ------------------------------------------------------------------------------------------------------
def kept(state: State) -> dict[str, bytes]:
    """What a diverging batch must leave as it was: everything but the status, the bad value and the cursor."""
    copy = state.copy()
    copy.scalars[kernels.BAD_VALUE] = 0
    copy.counters[[kernels.STATUS, kernels.N_CARRY]] = 0
    return {**bits_of(copy), "carry_X": b"", "carry_y": b"", "carry_weight": b""}


@pytest.mark.parametrize("steps", ["auto", "sgd, nesterov", "adam", "dowg"])
@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 3e38), (np.float64, 1e120), (np.float64, 1e307)])
@pytest.mark.parametrize("loss", [*sorted(LOSSES), "softmax"])
class TestDivergence:
    def problem(self, loss: str, dtype: Any, size: float, steps: str):
        n_classes = 4 if loss == "softmax" else 2
        name = "log_loss" if loss == "softmax" else loss
        task = LOSSES[name].task
        rows = make_rows(64, 9, dtype=dtype, n_classes=n_classes * (task == "classification"), weighted=True)
        huge = np.full_like(rows.X, size)
        huge[::2, 3:] *= -1
        recipe = Recipe(task=task, loss=name, **STEPS[steps], batch_size=32)
        return recipe, rows, Rows(huge, rows.y, rows.weight, rows.n_classes)

    def test_huge_features_after_a_good_batch(self, loss, dtype, size, steps):
        recipe, rows, huge = self.problem(loss, dtype, size, steps)
        state, packed = begin(recipe, rows), pack(recipe, rows)
        feed(state, rows, packed)
        before, n_rows = kept(state), state.counters[kernels.EPOCH_ROWS]
        feed(state, huge, packed)
        assert state.counters[kernels.STATUS] == kernels.DIVERGED
        assert not abs(state.scalars[kernels.BAD_VALUE]) < 1e30
        assert state.counters[kernels.EPOCH_ROWS] == n_rows
        assert kept(state) == before
        feed(state, rows, packed)
        assert kept(state) == before, "a diverged state must not go on"

    def test_huge_features_in_the_first_batch(self, loss, dtype, size, steps):
        """All predictions are still zero: only the gradient overflows."""
        recipe, rows, huge = self.problem(loss, dtype, size, steps)
        state, packed = begin(recipe, rows), pack(recipe, rows)
        before = kept(state)
        feed(state, huge, packed)
        assert state.counters[kernels.STATUS] == kernels.DIVERGED
        assert kept(state) == before


@pytest.mark.parametrize("steps", STEPS)
def test_the_largest_gradients_that_pass_leave_the_state_finite(steps):
    rows = make_rows(128, 9, dtype=np.float32)
    rows.X[:] *= 1e35
    state = begin(Recipe(**STEPS[steps]), rows)
    feed(state, rows, pack(Recipe(**STEPS[steps]), rows))
    assert state.counters[kernels.STATUS] == kernels.OK
    assert np.isfinite(state.theta).all()
    assert np.isfinite(state.slots).all()
    assert np.isfinite(state.scalars[: kernels.BEST_OBJECTIVE]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_steps_that_are_too_long_end_in_divergence_with_finite_coefficients(dtype):
    rows = make_rows(5000, 6, dtype=dtype)
    recipe = Recipe(optimizer="sgd", learning_rate="constant", eta0=10.0, batch_size=16)
    state = train(recipe, rows, n_epochs=5)
    assert state.counters[kernels.STATUS] == kernels.DIVERGED
    assert np.isfinite(state.theta).all()
    assert state.counters[kernels.EPOCH_ROWS] == 16 * state.counters[kernels.N_UPDATES] < 5000


def test_a_huge_target_is_divergence():
    rows = Rows(np.ones((4, 1)), np.full((4, 1), 1e200))
    state = begin(Recipe(batch_size=4), rows)
    before = kept(state)
    feed(state, rows, pack(Recipe(batch_size=4), rows))
    assert state.counters[kernels.STATUS] == kernels.DIVERGED
    assert kept(state) == before


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge", "perceptron", "modified_huber", "log_loss"])
def test_infinite_predictions_on_the_right_side_are_divergence(loss):
    """They cost nothing and pull at nothing: only the look at the predictions themselves can tell."""
    rows = Rows(np.ones((8, 2), np.float32), np.ones((8, 1)), n_classes=2)
    recipe = Recipe(task="classification", loss=loss, batch_size=8)
    state = begin(recipe, rows)
    state.theta[0, 0] = 1e39  # beyond float32
    feed(state, rows, pack(recipe, rows))
    assert state.counters[kernels.STATUS] == kernels.DIVERGED
    assert state.scalars[kernels.BAD_VALUE] == np.inf


def test_nan_in_the_rows_is_divergence():
    for column in ("X", "y"):
        rows = make_rows(40, 3)
        getattr(rows, column)[17, 0] = np.nan
        state = train(Recipe(batch_size=10), rows)
        assert state.counters[kernels.STATUS] == kernels.DIVERGED
        assert state.counters[kernels.N_UPDATES] == 1
        assert np.isfinite(state.theta).all()


def test_divergence_in_a_carried_batch_keeps_the_open_rows():
    recipe = Recipe(batch_size=10)
    rows = make_rows(15, 3)
    rows.X[12] = 1e200
    state, packed = begin(recipe, rows), pack(recipe, rows)
    feed(state, rows, packed, stop=7, close=False)
    feed(state, rows, packed, start=7, close=True)
    assert state.counters[kernels.STATUS] == kernels.DIVERGED
    assert state.counters[[kernels.N_UPDATES, kernels.N_CARRY, kernels.ROW]].tolist() == [1, 5, 15]


# --- the table -------------------------------------------------------------------------------------------------------
def test_every_optimizer_names_itself_and_its_slots():
    assert [optimizer.n_slots for optimizer in OPTIMIZERS.values()] == [1, 1, 1, 2, 1]
    assert len({optimizer.code for optimizer in OPTIMIZERS.values()}) == 5


@pytest.mark.parametrize(("task", "schedule"), [("regression", "invscaling"), ("classification", "optimal")])
def test_sgd_alone_means_scikit_learns_defaults(task, schedule):
    chosen, name = resolve("sgd", "auto", task)
    assert (chosen.name, name, chosen.eta0) == ("sgd", schedule, 0.01)


@pytest.mark.parametrize("learning_rate", ["constant", "optimal", "invscaling", "adaptive", "cosine"])
def test_a_learning_rate_alone_means_sgd(learning_rate):
    chosen, name = resolve("auto", learning_rate, "regression")
    assert (chosen.name, name) == ("sgd", learning_rate)


def test_the_docstring_tables_rows_are_the_tables():
    text = optimizers.__doc__
    for optimizer in OPTIMIZERS.values():
        row = next(line for line in text.splitlines() if line.startswith(f"{optimizer.name} "))
        taken = row.split("  ", 1)[1].strip().split("  ")[0]
        assert taken == (", ".join(optimizer.learning_rates) or "auto")
