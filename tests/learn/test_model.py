"""What a fitted model says about rows."""

from __future__ import annotations

import numpy as np
import pytest

from streamgd.errors import OptionError
from streamgd.learn.losses import LOSSES
from streamgd.learn.model import LinearModel

X = np.random.default_rng(0).standard_normal((20, 3))


class OverRows:
    """A model that decides the rows it is given first, as whoever reads them does."""

    def __init__(self, *parts):
        self._model = LinearModel(*parts)

    def __getattr__(self, method):
        if method in ("coef", "intercept", "classes"):
            return getattr(self._model, method)

        def of_rows(X):
            return getattr(self._model, method)(X.astype(np.float64) @ self._model.coef.T + self._model.intercept)

        return of_rows


def model(n_outputs: int, *, loss: str = "squared_error", classes=None, is_vector: bool = True, scale: float = 1.0):
    rng = np.random.default_rng(n_outputs)
    coef, intercept = rng.standard_normal((n_outputs, 3)) * scale, rng.standard_normal(n_outputs)
    return OverRows(LOSSES[loss].task, loss, coef, intercept, None if classes is None else np.array(classes), is_vector)


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values)
    return e / e.sum(axis=1, keepdims=True)


class TestRegression:
    def test_one_target(self):
        fitted = model(1)
        expected = X @ fitted.coef[0] + fitted.intercept[0]
        np.testing.assert_allclose(fitted.predict(X), expected, rtol=1e-14)

    @pytest.mark.parametrize("n_outputs", [1, 2])
    def test_a_matrix_stays_a_matrix(self, n_outputs):
        assert model(n_outputs, is_vector=False).predict(X).shape == (20, n_outputs)

    def test_float32_rows_are_predicted_in_float64(self):
        fitted = model(1)
        narrow = X.astype(np.float32)
        np.testing.assert_array_equal(fitted.predict(narrow), fitted.predict(narrow.astype(np.float64)))

    def test_there_are_no_probabilities(self):
        with pytest.raises(OptionError, match=r"loss='squared_error' gives no probabilities.*decision_function"):
            model(1).predict_proba(X)


class TestTwoClasses:
    def test_the_sign_decides_and_zero_is_the_first(self):
        fitted = OverRows("classification", "hinge", np.array([[1.0]]), np.zeros(1), np.array(["no", "yes"]))
        assert fitted.predict(np.array([[-2.0], [0.0], [3.0]])).tolist() == ["no", "no", "yes"]
        assert fitted.decision_function(np.array([[-2.0], [3.0]])).tolist() == [-2, 3]

    def test_log_loss_is_logistic(self):
        fitted = model(1, loss="log_loss", classes=[0, 1])
        positive = 1 / (1 + np.exp(-fitted.decision_function(X)))
        np.testing.assert_allclose(fitted.predict_proba(X), np.column_stack([1 - positive, positive]), rtol=1e-12)

    def test_log_probabilities_stay_finite_far_out(self):
        fitted = OverRows("classification", "log_loss", np.array([[1.0]]), np.zeros(1), np.array([0, 1]))
        found = fitted.predict_log_proba(np.array([[-1e4], [0.3], [1e4]]))
        np.testing.assert_allclose(found[[0, 2]], [[0, -1e4], [-1e4, 0]], atol=1e-300)
        np.testing.assert_allclose(found[1], np.log(fitted.predict_proba(np.array([[0.3]]))[0]), rtol=1e-13)

    def test_extreme_values_give_no_warning_and_whole_probabilities(self):
        fitted = OverRows("classification", "log_loss", np.array([[1.0]]), np.zeros(1), np.array([0, 1]))
        found = fitted.predict_proba(np.array([[-1e4], [1e4], [0.0]]))
        np.testing.assert_allclose(found, [[1, 0], [0, 1], [0.5, 0.5]], atol=1e-300)

    def test_modified_huber_clips(self):
        fitted = OverRows("classification", "modified_huber", np.array([[1.0]]), np.zeros(1), np.array([0, 1]))
        found = fitted.predict_proba(np.array([[-3.0], [-0.5], [0.0], [3.0]]))
        np.testing.assert_allclose(found[:, 1], [0, 0.25, 0.5, 1])
        np.testing.assert_allclose(found.sum(axis=1), 1)

    @pytest.mark.parametrize("loss", ["hinge", "squared_hinge", "perceptron"])
    def test_margins_are_not_probabilities(self, loss):
        with pytest.raises(OptionError, match=f"loss='{loss}' gives no probabilities: train with loss='log_loss'"):
            model(1, loss=loss, classes=[0, 1]).predict_proba(X)


class TestManyClasses:
    @pytest.mark.parametrize("loss", ["log_loss", "modified_huber", "hinge"])
    def test_the_largest_decision_value_wins(self, loss):
        fitted = model(4, loss=loss, classes=["a", "b", "c", "d"])
        values = fitted.decision_function(X)
        assert values.shape == (20, 4)
        assert fitted.predict(X).tolist() == ["abcd"[k] for k in values.argmax(axis=1)]

    def test_log_loss_is_softmax(self):
        fitted = model(4, loss="log_loss", classes=[3, 5, 7, 9])
        np.testing.assert_allclose(fitted.predict_proba(X), softmax(fitted.decision_function(X)), rtol=1e-12)

    @pytest.mark.parametrize("loss", ["log_loss", "modified_huber"])
    def test_log_probabilities_are_the_logarithms(self, loss):
        fitted = model(4, loss=loss, classes=[3, 5, 7, 9])
        with np.errstate(divide="ignore"):
            expected = np.log(fitted.predict_proba(X))
        np.testing.assert_allclose(fitted.predict_log_proba(X), expected, rtol=1e-12)

    def test_log_probabilities_stay_finite_far_out(self):
        found = model(4, loss="log_loss", classes=range(4), scale=1e5).predict_log_proba(X)
        assert np.isfinite(found).all()
        assert found.min() < -1e4

    def test_modified_huber_normalises_and_shares_where_no_class_is_likely(self):
        coef = np.array([[1.0], [0.5], [-0.2]])
        fitted = OverRows("classification", "modified_huber", coef, np.array([0.0, 0, 0]), np.array([0, 1, 2]))
        found = fitted.predict_proba(np.array([[1.0]]))
        np.testing.assert_allclose(found, np.array([[1.0, 0.75, 0.4]]) / 2.15)
        hopeless = OverRows("classification", "modified_huber", coef * 0, np.array([-2.0] * 3), np.array([0, 1, 2]))
        np.testing.assert_allclose(hopeless.predict_proba(np.array([[1.0]])), [[1 / 3] * 3])

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e200])
    @pytest.mark.parametrize("loss", ["log_loss", "modified_huber"])
    def test_probabilities_sum_to_one_and_agree_with_predict(self, loss, scale):
        fitted = model(5, loss=loss, classes=range(5), scale=scale)
        found = fitted.predict_proba(X)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
        assert ((found >= 0) & (found <= 1)).all()
        chosen = found[np.arange(20), fitted.predict(X)]
        np.testing.assert_allclose(chosen, found.max(axis=1))


def test_one_class_is_always_it():
    fitted = model(1, loss="log_loss", classes=["only"])
    assert fitted.predict(X).tolist() == ["only"] * 20
    assert fitted.predict_proba(X).tolist() == [[1.0]] * 20


def test_no_rows():
    assert model(1).predict(X[:0]).shape == (0,)
    assert model(1, loss="log_loss", classes=[0, 1]).predict_proba(X[:0]).shape == (0, 2)
    assert model(3, loss="log_loss", classes=[0, 1, 2]).predict(X[:0]).shape == (0,)
