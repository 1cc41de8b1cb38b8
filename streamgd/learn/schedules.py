"""The learning-rate schedules: how eta follows from eta0 and the number t = 1, 2, … of the update.

================  ===========================================================================================
``"constant"``    eta0
``"optimal"``     1 / (alpha (t0 + t − 1)), t0 by Bottou's heuristic, as in scikit-learn; eta0 is not used
``"invscaling"``  eta0 / t**power_t
``"adaptive"``    eta0, divided by 5 whenever `n_iter_no_change` epochs in a row bring no improvement of `tol`
``"cosine"``      eta0 · ½ (1 + cos(π (t − 1) / T)), T the planned number of updates of the whole run
================  ===========================================================================================

References
----------
Bottou (2012), Stochastic Gradient Descent Tricks. Loshchilov & Hutter (2017), SGDR (the cosine, without restarts).
"""

from __future__ import annotations

import math

from streamgd.learn.losses import HUBER, LOG_LOSS, PERCEPTRON, QUANTILE, SQUARED_EPSILON_INSENSITIVE, Loss

CONSTANT, OPTIMAL, INVSCALING, ADAPTIVE, COSINE = 0, 1, 2, 3, 4

SCHEDULES = {
    "constant": CONSTANT,
    "optimal": OPTIMAL,
    "invscaling": INVSCALING,
    "adaptive": ADAPTIVE,
    "cosine": COSINE,
}

#: An adaptive run ends when its rate falls below this, as in scikit-learn.
ADAPTIVE_FLOOR = 1e-6


def optimal_start(loss: Loss, alpha: float, parameter: float) -> float:
    """Offset t0 of the ``"optimal"`` schedule.

    The first rate is about the size of a typical coefficient over a typical gradient:
    with typw = sqrt(1 / sqrt(alpha)), t0 = max(1, |dloss(−typw, 1)|) / (typw · alpha).
    """
    typical = math.sqrt(1.0 / math.sqrt(alpha))
    slope = {
        0: typical + 1.0,
        HUBER: min(typical + 1.0, parameter),
        SQUARED_EPSILON_INSENSITIVE: 2.0 * max(0.0, typical + 1.0 - parameter),
        QUANTILE: parameter,
        LOG_LOSS: 1.0 / (1.0 + math.exp(-typical)),
        7: 2.0 * (1.0 + typical),
        8: 4.0 if typical > 1 else 2.0 * (1.0 + typical),
        PERCEPTRON: 1.0,
    }.get(loss.code, 1.0)
    return max(1.0, slope) / (typical * alpha)
