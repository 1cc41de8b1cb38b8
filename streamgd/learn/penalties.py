"""The penalties on the coefficients; the intercept is never penalised.

The objective is mean loss + alpha * penalty. Penalties act on the coefficients of the *scaled* features, so that they
treat a feature in metres like one in kilometres (as glmnet and H2O do).

==============  ==========================================================================
``None``        0 (the default)
``"l2"``        ½ Σ w²; under plain SGD scikit-learn's multiplicative decay w ← w·max(0, 1 − eta·alpha)
``"l1"``        Σ |w|; proximal: after a step of eta_j, w_j ← sign(w_j) max(0, |w_j| − eta_j·alpha)
``"elasticnet"``  (1 − l1_ratio) · ½ Σ w² + l1_ratio · Σ |w|
==============  ==========================================================================

References
----------
Duchi & Singer (2009), Efficient Online and Batch Learning Using Forward Backward Splitting, JMLR 10 (the proximal
step, and its per-coordinate form for adaptive steps).
"""

from __future__ import annotations

from streamgd.learn.options import is_number, require

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
