"""What training leaves: coefficients in the data's units, and how they predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.errors import OptionError
from streamgd.learn.losses import Task

Floats = NDArray[np.float64]

#: Losses whose decision values say something about probabilities.
PROBABILISTIC = ("log_loss", "modified_huber")


@dataclass(frozen=True)
class LinearModel:
    """A fitted linear model.

    Attributes
    ----------
    task, loss : str
        What it was trained for.
    coef : ndarray of shape (n_outputs, n_features), float64
        Coefficients in the data's units.
    intercept : ndarray of shape (n_outputs,), float64
        Intercepts.
    classes : ndarray of shape (n_classes,), or None
        The classes, sorted; None for regression.
    is_vector : bool
        Whether predictions of a regression are 1-D.
    """

    task: Task
    loss: str
    coef: Floats
    intercept: Floats
    classes: NDArray[Any] | None
    is_vector: bool = True

    def decision_function(self, decided: Floats) -> Floats:
        """Shape decision values, coefficients · features + intercept, as scikit-learn does.

        Parameters
        ----------
        decided : ndarray of shape (n_rows, n_outputs), float64
            Decision values; so for every method here.

        Returns
        -------
        ndarray of shape (n_rows, n_outputs), or (n_rows,) if there is one output
        """
        one = decided.shape[1] == 1 and (self.classes is not None or self.is_vector)
        return decided[:, 0] if one else decided

    def predict(self, decided: Floats) -> NDArray[Any]:
        """Return the predicted values or classes, shape (n_rows,), or (n_rows, n_outputs) for several targets."""
        values = self.decision_function(decided)
        if self.classes is None:
            return values
        if len(self.classes) == 1:
            return np.repeat(self.classes, len(values))
        chosen = (values > 0).astype(np.intp) if values.ndim == 1 else values.argmax(axis=1)
        return np.asarray(self.classes[chosen])

    def predict_proba(self, decided: Floats) -> Floats:
        """Return probabilities, shape (n_rows, n_classes).

        Softmax or the logistic function for log_loss; for modified_huber (clip(p, −1, 1) + 1) / 2, normalised over the
        classes when there are three or more (Zhang 2004, "Statistical behavior and consistency of classification
        methods based on convex risk minimization").

        Raises
        ------
        OptionError
            For a loss whose decision values are not probabilities.
        """
        if self.classes is None or self.loss not in PROBABILISTIC:
            raise OptionError(
                f"loss={self.loss!r} gives no probabilities: train with loss='log_loss' or loss='modified_huber', "
                "or use decision_function"
            )
        values = self.decision_function(decided)
        if len(self.classes) == 1:
            return np.ones((len(values), 1))
        if values.ndim == 1:
            positive = _logistic(values) if self.loss == "log_loss" else (np.clip(values, -1, 1) + 1) / 2
            return np.column_stack([1.0 - positive, positive])
        if self.loss == "log_loss":
            shares = np.exp(values - values.max(axis=1, keepdims=True))
        else:
            shares = (np.clip(values, -1, 1) + 1) / 2
            shares[shares.sum(axis=1) == 0] = 1.0
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def predict_log_proba(self, decided: Floats) -> Floats:
        """Return the logarithms of `predict_proba`; for log_loss they stay finite where the probability rounds to 0."""
        if self.loss != "log_loss" or self.classes is None or len(self.classes) == 1:
            with np.errstate(divide="ignore"):
                return np.asarray(np.log(self.predict_proba(decided)))
        values = self.decision_function(decided)
        if values.ndim == 1:
            return -np.logaddexp(0.0, np.column_stack([values, -values]))
        shifted = values - values.max(axis=1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _logistic(values: Floats) -> Floats:
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1.0 / (1.0 + small), small / (1.0 + small))
