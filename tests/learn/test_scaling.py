"""Units of the features, there and back."""

from __future__ import annotations

import numpy as np
import pytest

from streamgd.learn.scaling import Scaling


def some_scaling(d: int = 5) -> Scaling:
    rng = np.random.default_rng(0)
    return Scaling.from_moments(rng.normal(0, 100, d), rng.uniform(1e-4, 1e4, d))


def test_moments_become_means_and_deviations():
    scaling = Scaling.from_moments(np.array([1.0, -2.0]), np.array([4.0, 0.25]))
    assert scaling.mean.tolist() == [1, -2]
    assert scaling.scale.tolist() == [2, 0.5]
    assert scaling.factor.tolist() == [0.5, 2]


@pytest.mark.parametrize(
    ("mean", "variance"),
    [(0.0, 0.0), (5.0, 0.0), (1e9, 1e-16), (-1e9, 1e-16), (0.1, (0.1 * 1e-16) ** 2), (3.0, -1e-20)],
)
def test_rounding_is_not_spread(mean, variance):
    scaling = Scaling.from_moments(np.array([mean]), np.array([variance]))
    assert scaling.scale.tolist() == [1.0]
    assert np.isfinite(scaling.factor).all()


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1e-12), (1e6, 1e-3), (-1e9, 1e-4), (1e-30, 1e-32), (0, 1e150)])
def test_small_and_large_spreads_are_kept(mean, deviation):
    scaling = Scaling.from_moments(np.array([mean]), np.array([deviation**2]))
    assert scaling.scale[0] == pytest.approx(deviation, rel=1e-12)


def test_the_mean_is_a_copy():
    mean = np.ones(2)
    scaling = Scaling.from_moments(mean, np.ones(2))
    mean[0] = 7
    assert scaling.mean.tolist() == [1, 1]


def test_folded_coefficients_predict_the_same_in_the_datas_units():
    scaling, rng = some_scaling(), np.random.default_rng(1)
    theta = rng.standard_normal((3, 6))
    X = rng.normal(0, 100, (50, 5))
    coef, intercept = scaling.fold(theta)
    scaled = (X - scaling.mean) / scaling.scale
    np.testing.assert_allclose(X @ coef.T + intercept, scaled @ theta[:, :-1].T + theta[:, -1], rtol=1e-9)


def test_unfold_undoes_fold():
    scaling = some_scaling()
    theta = np.random.default_rng(2).standard_normal((2, 6))
    np.testing.assert_allclose(scaling.unfold(*scaling.fold(theta)), theta, rtol=1e-9)


def test_the_identity_changes_no_bit():
    theta = np.random.default_rng(3).standard_normal((2, 4))
    coef, intercept = Scaling.identity(3).fold(theta)
    np.testing.assert_array_equal(np.column_stack([coef, intercept]), theta)


def test_exact_zeros_stay_zero():
    theta = np.array([[0.0, 1.0, 0.0, 2.0]])
    coef, _ = some_scaling(3).fold(theta)
    assert coef[0, [0, 2]].tolist() == [0.0, 0.0]
