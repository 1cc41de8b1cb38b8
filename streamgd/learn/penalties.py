"""The penalties on the coefficients; the intercept is never penalised.

The objective is mean loss + alpha * penalty. Penalties act on the coefficients of the *scaled* features, so that they
treat a feature in metres like one in kilometres (as glmnet and H2O do).

==============  ==========================================================================
``None``        0 (the default)
``"l2"``        ½ Σ w²; under plain SGD scikit-learn's multiplicative decay w ← w·max(0, 1 − eta·alpha)
``"l1"``        Σ |w|; proximal: after a step of eta_j, w_j ← S(w_j, eta_j·alpha), and one more step at the end;
                S(v, a) = sign(v) max(0, |v| − a)
``"elasticnet"``  (1 − l1_ratio) · ½ Σ w² + l1_ratio · Σ |w|
==============  ==========================================================================

The last step is what makes coefficients zero. Each proximal step takes away eta_j·alpha·s with an s between -1 and 1,
a subgradient of |w_j|. A batch's noise moves small coefficients off zero and back, so the last ones are zero by chance,
and averages never are. But while w_j hovers, its gradients and what is taken away cancel: the mean gradient is -alpha·s̄
with the mean s̄ of the subgradients, which is ±1 where w_j has kept its sign, and less where it has not. From the
average w̄_j the minimum along coordinate j, where the loss has the curvature h, is S(w̄_j + alpha·s̄/h, alpha/h): w̄_j
itself, or what noise has left of zero shrunk by alpha·(1 − |s̄|)/h.

References
----------
Duchi & Singer (2009), Efficient Online and Batch Learning Using Forward Backward Splitting, JMLR 10 (the proximal
step, and its per-coordinate form for adaptive steps). Xiao (2010), Dual Averaging Methods for Regularized Stochastic
Learning and Online Optimization, JMLR 11 (zeros from mean gradients in place of the last ones).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamgd.learn.options import is_number, require

Floats = NDArray[np.float64]

#: A threshold beyond all coefficients.
_MOST = 1e300

PENALTIES = (None, "l2", "l1", "elasticnet")


def strengths(penalty: str | None, alpha: float, l1_ratio: float | None) -> tuple[float, float]:
    """Strength of the l1 and of the l2 part.

    Returns
    -------
    l1, l2 : float
        ``alpha`` times each part's share.

    Raises
    ------
    OptionError
        If the penalty is unknown or a number is out of range.
    """
    require(penalty in PENALTIES, "penalty", penalty, "None, 'l2', 'l1' or 'elasticnet'")
    require(is_number(alpha) and alpha >= 0, "alpha", alpha, "a number of at least 0, not infinite")
    unused = penalty != "elasticnet" and l1_ratio is None  # which scikit-learn allows
    part = 0.0 if unused or l1_ratio is None else l1_ratio
    require(unused or (is_number(l1_ratio) and 0 <= part <= 1), "l1_ratio", l1_ratio, "a number from 0 to 1")
    share = {None: (0.0, 0.0), "l2": (0.0, 1.0), "l1": (1.0, 0.0), "elasticnet": (part, 1.0 - part)}[penalty]
    return alpha * share[0], alpha * share[1]


def settled(coef: Floats, subgradient: Floats, l1: float, curvature: Floats) -> Floats:
    """Take the last proximal step, of each coefficient by itself.

    Parameters
    ----------
    coef : ndarray of shape (n_outputs, n_features)
        Averages of the scaled features' coefficients, or the last ones.
    subgradient : ndarray, same shape
        Means of the subgradients.
    l1 : float
        The penalty's strength.
    curvature : ndarray of shape (n_outputs,)
        Second derivative of the mean loss, about, by a coefficient of each output; the penalty's l2 part included.

    Returns
    -------
    ndarray of shape (n_outputs, n_features)
        S(w̄ + l1·s̄/h, l1/h), never -0.0.
    """
    with np.errstate(over="ignore", divide="ignore"):
        threshold = np.minimum(l1 / curvature[:, None], _MOST)  # infinity times zero were NaN
    moved = coef + threshold * subgradient
    left = np.maximum(np.abs(moved) - threshold, 0.0)
    # What keeps its sign throughout stays as it is, to the last bit.
    return np.where(np.abs(subgradient) == 1.0, coef, np.where(moved > 0, left, 0.0 - left))
