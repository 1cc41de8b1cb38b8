"""All compiled code of learning: consume rows of a window, update the state.

==============  ============================================================================================
``llvm``        a small language for writing LLVM functions with Python's operators
``arithmetic``  exp, log and others, with the same bits on every CPU
``losses``      losses and their derivatives, for the rows of a tile
``rows``        passes over rows: predictions, gradients, changes of predictions
``steps``       from a gradient to new coefficients: optimizers, schedules, penalties, averages
``batch``       how these make a batch, and batches a call of `consume`
``measures``    mean losses, means and variances
``entries``     compilation and its cache, by Numba
==============  ============================================================================================

Same bits everywhere: the order of every sum is written down, by the row, the batch and the number of features alone,
and no instruction may be reordered or contracted. Batches are always computed whole: the rows of a batch that a
window's end cuts in two wait in the state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.learn.codes import *  # noqa: F403

Floats = NDArray[np.float64]


def consume(
    X: NDArray[Any],
    y: Floats,
    weight: Floats,
    ids: NDArray[np.uint64],
    start: int,
    stop: int,
    close: bool,
    state: tuple[NDArray[Any], ...],
    carry: tuple[NDArray[Any], Floats, Floats],
    checksum: NDArray[np.uint64],
    moments: Floats,
    codes: NDArray[np.int64],
    params: Floats,
    class_weight: Floats,
    target_scale: Floats,
) -> None:
    """Train on rows start to stop of a window; everything that changes, the cursor included, changes in this one call.

    Parameters
    ----------
    X, y, weight, ids : ndarrays
        The window's rows: (capacity, n_features) in the row dtype, (capacity, n_targets) float64, (capacity,) float64
        or empty, (capacity,) uint64. C-contiguous, as are all arrays here.
    start, stop : int
        Rows to consume.
    close : bool
        Whether the batch that is open after them is closed: an update with the rows it has.
    state : tuple
        `learnt` of `streamgd.learn.state.State`, updated in place.
    carry : tuple
        (carry_X, carry_y, carry_weight), the open batch, updated in place.
    checksum, moments : ndarrays
        Updated in place.
    codes, params : ndarrays
        `streamgd.learn.recipe.Packed`.
    class_weight : ndarray of shape (n_classes,) or (0,)
        Factor of each class.
    target_scale : ndarray of shape (n_outputs,)
        The target's standard deviations.
    """
    from streamgd.learn.codes import PARAM_L1
    from streamgd.learn.kernels import batch, entries

    if params[PARAM_L1] > 0 and state[3].shape != state[0].shape:
        raise ValueError("a state without subgradients, and an l1 penalty")
    scratch = batch.scratch(len(state[0]), X.shape[1], len(carry[0]), X.itemsize)
    cursor = np.array([start, stop, close], np.int64)
    doubles, narrow = np.empty(scratch.n_doubles), np.empty(scratch.n_narrow, X.dtype)
    rows = (X, y, weight, ids, cursor)
    recipe = (codes, params, class_weight, target_scale)
    entries.consume(X.dtype)((*rows, *state, *carry, checksum, moments, *recipe, scratch.places, doubles, narrow))


def mean_loss(
    y: Floats,
    weight: Floats,
    decisions: Floats,
    codes: NDArray[np.int64],
    params: Floats,
    class_weight: Floats,
) -> float:
    """Weighted mean loss of some predictions; 0 if there is no weight.

    Parameters
    ----------
    y : ndarray of shape (n_rows, n_targets), float64, C-contiguous
        Targets or class indices.
    weight : ndarray of shape (n_rows,), float64
        Weight of each row.
    decisions : ndarray of shape (n_rows, n_outputs) or (1, n_outputs), float64
        The predictions, before any link; a single row stands for all rows.
    codes, params, class_weight : ndarrays
        As in `consume`.
    """
    from streamgd.learn.kernels import entries, losses, measures

    n_outputs = decisions.shape[1]
    work = np.empty(
        (4 * measures.MEAN_LOSS_ROWS + losses.N_SUMS * losses.LANES) * n_outputs + measures.MEAN_LOSS_ROWS + 8
    )
    result = np.zeros(2)
    entries.mean_loss()((y, weight, np.ascontiguousarray(decisions), codes, params, class_weight, work, result))
    return float(result[0] / result[1]) if result[1] > 0 else 0.0


def add_moments(
    X: Floats, weight: Floats, mean: Floats, squares: Floats, total: Floats, n_rows: NDArray[np.int64]
) -> None:
    """Add rows to running weighted means and sums of squared deviations; `streamgd.learn.moments` puts them together.

    Parameters
    ----------
    X : ndarray of shape (n_rows, n_columns), float64
        Rows to add.
    weight : ndarray of shape (n_rows,) or (0,), float64
        Their weights; 1 if empty.
    mean, squares : ndarrays of shape (16, n_columns), float64
        Row i of all rows, counted from the first call on, goes to place i % 16. Updated in place.
    total : ndarray of shape (16,), float64
        Weight so far, updated in place.
    n_rows : ndarray of shape (1,), int64
        Rows so far, updated in place.

    References
    ----------
    West (1979), Updating mean and variance estimates, CACM 22(9): δ = x − μ, μ += w δ / W, S += w δ (x − μ).
    """
    from streamgd.learn.kernels import entries

    entries.add_moments()((np.ascontiguousarray(X), np.ascontiguousarray(weight), mean, squares, total, n_rows))
