"""The learning-rate schedules, seen through the size of the kernel's steps."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import SGDClassifier

from streamgd.learn import kernels
from streamgd.learn.recipe import Recipe
from streamgd.learn.schedules import SCHEDULES, optimal_start
from tests.learn.training import Rows, begin, feed, pack


def rates(n_steps: int, *, n_updates: float = 10, eta_scale: float = 1.0, **options) -> np.ndarray:
    """Learning rates of the first updates.

    The loss is absolute error (slope −1 on a target far away) and the only feature is 1, so each step is the rate.
    """
    rows = Rows(np.ones((1, 1)), np.full((1, 1), 1e9))
    recipe = Recipe(
        loss="epsilon_insensitive", epsilon=0, optimizer="sgd", batch_size=1, fit_intercept=False, **options
    )
    state = begin(recipe, rows)
    state.scalars[kernels.ETA_SCALE] = eta_scale
    packed = pack(recipe, rows, n_updates=n_updates)
    path = [0.0]
    for _ in range(n_steps):
        feed(state, rows, packed)
        path.append(state.theta[0, 0])
    return np.diff(path)


def test_constant():
    np.testing.assert_allclose(rates(5, learning_rate="constant", eta0=0.3), 0.3, rtol=1e-14)


@pytest.mark.parametrize("power_t", [0.5, 0.25, 1.0, 0.1, 0.37, 2.5, 0.0, -0.5])
def test_invscaling(power_t):
    found = rates(50, learning_rate="invscaling", eta0=0.3, power_t=power_t)
    np.testing.assert_allclose(found, 0.3 / np.arange(1, 51) ** power_t, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("power_t", [0.25, 0.5])
def test_invscaling_of_roots_is_what_the_general_power_gives(power_t):
    """The common powers take square roots; another code path must not be another schedule."""
    np.testing.assert_allclose(
        rates(30, learning_rate="invscaling", eta0=1.0, power_t=power_t),
        rates(30, learning_rate="invscaling", eta0=1.0, power_t=power_t * (1 + 1e-13)),
        rtol=1e-11,
    )


def test_cosine_ends_at_zero_and_stays_there():
    found = rates(13, n_updates=10, learning_rate="cosine", eta0=0.3)
    expected = 0.15 * (1 + np.cos(np.pi * np.minimum(1, np.arange(13) / 10)))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-16)
    assert found[0] == 0.3
    assert (found[10:] == 0).all()


def test_adaptive_follows_the_scale_that_the_loop_sets():
    np.testing.assert_allclose(rates(3, learning_rate="adaptive", eta0=0.3), 0.3, rtol=1e-14)
    np.testing.assert_allclose(rates(3, learning_rate="adaptive", eta0=0.3, eta_scale=0.04), 0.012, rtol=1e-13)


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 1.0])
def test_optimal(alpha):
    t = np.arange(20)
    start = np.sqrt(1 / np.sqrt(alpha))  # the first rate, over a slope of 1
    np.testing.assert_allclose(
        rates(20, learning_rate="optimal", alpha=alpha), 1 / (alpha * (1 / (start * alpha) + t)), rtol=1e-12
    )


@pytest.mark.parametrize("alpha", [1e-4, 0.03])
def test_the_first_optimal_rate_is_scikit_learns(alpha):
    theirs = SGDClassifier(alpha=alpha, penalty=None, max_iter=1, tol=None, fit_intercept=False, shuffle=False)
    theirs.fit(np.array([[1.0], [0.0]]), [1, 0])
    assert 1 / (alpha * optimal_start(alpha)) == pytest.approx(theirs.coef_[0, 0], rel=1e-12)


def test_every_schedule_has_a_code_of_its_own():
    assert len(set(SCHEDULES.values())) == len(SCHEDULES) == 5
