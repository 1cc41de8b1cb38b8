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

from streamgd.learn.codes import ADAPTIVE, CONSTANT, COSINE, INVSCALING, OPTIMAL

SCHEDULES = {
    "constant": CONSTANT,
    "optimal": OPTIMAL,
    "invscaling": INVSCALING,
    "adaptive": ADAPTIVE,
    "cosine": COSINE,
}

#: An adaptive run ends when its rate falls below this, as in scikit-learn.
ADAPTIVE_FLOOR = 1e-6


def optimal_start(alpha: float) -> float:
    """Offset t0 of the ``"optimal"`` schedule.

    The first rate is the size of a typical coefficient, typw = sqrt(1 / sqrt(alpha)), over a slope of 1:
    t0 = 1 / (typw · alpha).
    """
    return 1.0 / (math.sqrt(1.0 / math.sqrt(alpha)) * alpha)
