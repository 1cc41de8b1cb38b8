"""The units of the features: how rows are scaled on their way in, and how coefficients are folded back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: A standard deviation below this share of the mean's size is rounding, not spread.
_ROUNDING = 16 * np.finfo(np.float64).eps


@dataclass(frozen=True)
class Scaling:
    """Rows are trained as (x − mean) / scale.

    Attributes
    ----------
    mean, scale : ndarray of shape (n_features,), float64
        Weighted means and standard deviations; scale is 1 for a feature without spread.
    """

    mean: Floats
    scale: Floats

    @classmethod
    def identity(cls, n_features: int) -> Scaling:
        """Return the scaling that changes nothing."""
        return cls(np.zeros(n_features), np.ones(n_features))

    @classmethod
    def from_moments(cls, mean: Floats, variance: Floats) -> Scaling:
        """Build from means and variances."""
        deviation = np.sqrt(np.maximum(variance, 0.0))
        silent = deviation <= _ROUNDING * np.abs(mean)
        return cls(mean.copy(), np.where(silent, 1.0, deviation))

    @property
    def factor(self) -> Floats:
        """What (x − mean) is multiplied by."""
        return 1.0 / self.scale

    def fold(self, theta: Floats) -> tuple[Floats, Floats]:
        """Bring coefficients of scaled features to the data's units.

        Parameters
        ----------
        theta : ndarray of shape (n_outputs, n_features + 1)
            Coefficients with the intercept as last column.

        Returns
        -------
        coef : ndarray of shape (n_outputs, n_features)
            theta / scale.
        intercept : ndarray of shape (n_outputs,)
            intercept − Σ coef · mean.
        """
        coef = theta[:, :-1] * self.factor
        return coef, theta[:, -1] - (coef * self.mean).sum(axis=1)

    def unfold(self, coef: Floats, intercept: Floats) -> Floats:
        """Undo `fold`."""
        return np.column_stack([coef * self.scale, intercept + (coef * self.mean).sum(axis=1)])
