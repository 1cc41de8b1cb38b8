"""Strengths of the two parts of a penalty."""

from __future__ import annotations

import numpy as np
import pytest

from streamgd.errors import OptionError
from streamgd.learn.penalties import PENALTIES, settled, strengths


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [(None, (0, 0)), ("l2", (0, 0.5)), ("l1", (0.5, 0)), ("elasticnet", (0.1, 0.4))],
)
def test_strengths(penalty, expected):
    assert strengths(penalty, 0.5, 0.2) == pytest.approx(expected)


def test_elasticnet_goes_from_l2_to_l1():
    assert strengths("elasticnet", 0.5, 0.0) == strengths("l2", 0.5, 0.3)
    assert strengths("elasticnet", 0.5, 1.0) == strengths("l1", 0.5, 0.3)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_zero_alpha_is_no_penalty(penalty):
    assert strengths(penalty, 0, 0.5) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ridge", 1.0, 0.5), ["penalty='ridge'", "'elasticnet'"]),
        (("l2", -1.0, 0.5), ["alpha=-1.0", "at least 0"]),
        (("l2", float("nan"), 0.5), ["alpha=nan", "at least 0"]),
        (("l2", "1", 0.5), ["alpha='1'", "at least 0"]),
        (("l2", 1.0, 1.5), ["l1_ratio=1.5", "from 0 to 1"]),
        (("elasticnet", 1.0, None), ["l1_ratio=None", "from 0 to 1"]),
    ],
)
def test_what_cannot_be_used_is_named(arguments, words):
    with pytest.raises(OptionError) as refused:
        strengths(*arguments)
    for word in words:
        assert word in str(refused.value)


class TestSettled:
    def test_what_keeps_its_sign_stays_to_the_bit(self):
        coef = np.array([[0.1, -3e-17, 1e10]])
        assert (settled(coef, np.array([[1.0, -1.0, 1.0]]), 0.3, np.array([0.7])) == coef).all()

    def test_what_is_noise_becomes_zero(self):
        found = settled(np.array([[0.01, -0.03, -0.2, 0.0]]), np.array([[0.2, 0.1, -0.9, 0.0]]), 0.1, np.array([1.0]))
        np.testing.assert_allclose(found, [[0.0, 0.0, -0.19, 0.0]], atol=1e-15)
        assert not np.signbit(found[found == 0]).any()

    def test_each_output_has_its_own_curvature(self):
        found = settled(np.full((2, 1), 0.3), np.zeros((2, 1)), 0.1, np.array([1.0, 0.25]))
        np.testing.assert_allclose(found, [[0.2], [0.0]], atol=1e-15)

    @pytest.mark.parametrize("alpha", [0.02, 0.1])
    def test_it_is_the_minimum_along_each_coordinate(self, alpha):
        """With independent features of a variance of 1, and at stationarity, that is the lasso's solution."""
        rng = np.random.default_rng(0)
        X = np.linalg.qr(rng.normal(size=(400, 30)))[0] * 20
        y = X @ np.where(np.arange(30) < 5, 1.0, 0.0) + rng.normal(size=400)
        best = np.abs(X.T @ y / 400) - alpha
        best = np.sign(X.T @ y) * np.maximum(best, 0.0)
        average = best + rng.uniform(-0.3, 0.3, 30) * (best == 0) * alpha  # as noise leaves it
        gradient = X.T @ (X @ average - y) / 400
        found = settled(average[None], -gradient[None] / alpha, alpha, np.ones(1))
        np.testing.assert_allclose(found[0], best, atol=1e-12)

    def test_a_penalty_beyond_all_measure_leaves_zeros(self):
        found = settled(np.array([[3.0, -2.0]]), np.array([[0.5, 0.0]]), 1.7e308, np.array([0.1]))
        assert (found == 0).all()
