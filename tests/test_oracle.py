"""The same coefficients as scikit-learn, where both can be asked for the same thing: one row at a time, in file order.

A named table of settings; what differs from line to line is the loss, the penalty, the schedule, and averaging.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.linear_model as sk
from sklearn.exceptions import ConvergenceWarning

from streamgd import SGDClassifier, SGDRegressor

REGRESSION = ("squared_error", "huber", "epsilon_insensitive", "squared_epsilon_insensitive")
CLASSIFICATION = ("log_loss", "hinge", "squared_hinge", "modified_huber", "perceptron")
MARGINS = CLASSIFICATION[1:]
SCHEDULES = ("constant", "optimal", "invscaling", "adaptive")
#: What makes a run of streamgd the run of scikit-learn.
PLAIN = {"optimizer": "sgd", "batch_size": 1, "standardize": False, "shuffle": False}
SHARED: dict[str, Any] = {"alpha": 1e-3, "eta0": 0.01, "power_t": 0.3, "max_iter": 4, "tol": None}
N_ROWS, N_FEATURES = 60, 3


def rows(n_classes: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    X = rng.normal(size=(N_ROWS, N_FEATURES)) * [1.0, 2.0, 0.3] + [0.5, 0.0, -0.2]
    score = X @ rng.normal(size=(N_FEATURES, max(1, n_classes))) + rng.normal(size=(N_ROWS, max(1, n_classes)))
    if n_classes == 0:
        return X, score[:, 0] + 2.0
    return X, (score[:, 0] > 0).astype(int) if n_classes == 2 else score.argmax(axis=1)


def assert_same(ours: Any, theirs: Any) -> None:
    scale = np.abs(theirs.coef_).max()
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-9, atol=1e-11 * scale)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-9, atol=1e-11 * scale)


def pair(kind: str, **settings: Any) -> tuple[Any, Any]:
    """Return an estimator of ours and one of theirs with the same settings."""
    # The "optimal" rate begins with 1 / alpha**(1/4): a smaller alpha would make squared losses diverge.
    alpha = 30.0 if settings.get("learning_rate") == "optimal" else SHARED["alpha"]
    shared = {"average": False, "penalty": None, **SHARED, "alpha": alpha, **settings}
    ours, theirs = (SGDRegressor, sk.SGDRegressor) if kind == "regression" else (SGDClassifier, sk.SGDClassifier)
    return ours(**PLAIN, **shared), theirs(shuffle=False, **shared)


@pytest.mark.parametrize("average", [False, True, 75], ids=["last", "average", "late average"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("penalty", [None, "l2"])
@pytest.mark.parametrize("loss", REGRESSION)
def test_regression(loss: str, penalty: str | None, schedule: str, average: bool | int) -> None:
    X, y = rows()
    ours, theirs = pair("regression", loss=loss, penalty=penalty, learning_rate=schedule, average=average)
    assert_same(ours.fit(X, y), theirs.fit(X, y))
    assert ours.n_iter_ == theirs.n_iter_ == 4
    assert ours.t_ == theirs.t_


@pytest.mark.parametrize("average", [False, True], ids=["last", "average"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("penalty", [None, "l2"])
@pytest.mark.parametrize("loss", CLASSIFICATION)
def test_two_classes(loss: str, penalty: str | None, schedule: str, average: bool) -> None:
    X, y = rows(2)
    ours, theirs = pair("classification", loss=loss, penalty=penalty, learning_rate=schedule, average=average)
    assert_same(ours.fit(X, y), theirs.fit(X, y))
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


@pytest.mark.parametrize("average", [False, True], ids=["last", "average"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("penalty", [None, "l2"])
@pytest.mark.parametrize("loss", MARGINS)
def test_one_against_the_rest(loss: str, penalty: str | None, schedule: str, average: bool) -> None:
    X, y = rows(3)
    ours, theirs = pair("classification", loss=loss, penalty=penalty, learning_rate=schedule, average=average)
    assert_same(ours.fit(X, y), theirs.fit(X, y))
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings(f"ignore::{ConvergenceWarning.__module__}.{ConvergenceWarning.__name__}")
@pytest.mark.parametrize("penalty", [None, "l2"])
@pytest.mark.parametrize(
    ("kind", "loss"), [*(("regression", a) for a in REGRESSION), *(("classification", a) for a in CLASSIFICATION)]
)
def test_adaptive_rates_fall_at_the_same_epochs(kind: str, loss: str, penalty: str | None) -> None:
    X, y = rows(0 if kind == "regression" else 2)
    ours, theirs = pair(
        kind, loss=loss, penalty=penalty, learning_rate="adaptive", eta0=0.1, tol=1e-3, max_iter=60, n_iter_no_change=2
    )
    assert_same(ours.fit(X, y), theirs.fit(X, y))
    assert ours.n_iter_ == theirs.n_iter_
    assert ours.n_iter_ > 5


@pytest.mark.filterwarnings(f"ignore::{ConvergenceWarning.__module__}.{ConvergenceWarning.__name__}")
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
def test_training_ends_at_the_same_epoch(tol: float) -> None:
    X, y = rows()
    ours, theirs = pair(
        "regression", tol=tol, max_iter=200, n_iter_no_change=3, learning_rate="invscaling", penalty="l2"
    )
    assert_same(ours.fit(X, y), theirs.fit(X, y))
    assert ours.n_iter_ == theirs.n_iter_ < 200


def test_weights_and_class_weights_act_alike() -> None:
    X, y = rows(2)
    weight = np.random.default_rng(1).uniform(0.1, 3.0, len(X))
    weight /= weight.mean()  # gradients of ours are divided by the mean weight
    settings = {"loss": "squared_hinge", "penalty": "l2", "learning_rate": "constant", "class_weight": {0: 0.4, 1: 2.0}}
    ours, theirs = pair("classification", **settings)
    assert_same(ours.fit(X, y, sample_weight=weight), theirs.fit(X, y, sample_weight=weight))


def test_balanced_class_weights_are_alike() -> None:
    X, y = rows(2)
    ours, theirs = pair("classification", loss="hinge", class_weight="balanced", learning_rate="constant")
    assert_same(ours.fit(X, y), theirs.fit(X, y))


def test_without_an_intercept() -> None:
    X, y = rows()
    ours, theirs = pair("regression", fit_intercept=False, learning_rate="invscaling", penalty="l2")
    assert_same(ours.fit(X, y), theirs.fit(X, y))
    assert ours.intercept_.tolist() == [0.0]


@pytest.mark.parametrize("average", [False, True], ids=["last", "average"])
def test_partial_fit_goes_on_as_theirs_does(average: bool) -> None:
    X, y = rows()
    ours, theirs = pair("regression", learning_rate="invscaling", penalty="l2", average=average)
    for part in (slice(0, 13), slice(13, 50), slice(50, 60), slice(0, 13)):
        ours.partial_fit(X[part], y[part])
        theirs.partial_fit(X[part], y[part])
        assert_same(ours, theirs)
    assert ours.t_ == theirs.t_


def test_warm_start_begins_rates_anew() -> None:
    X, y = rows()
    ours, theirs = pair("regression", learning_rate="invscaling", warm_start=True)
    for _ in range(3):
        assert_same(ours.fit(X, y), theirs.fit(X, y))
