"""What several lanes have learnt from the same start, as one state.

A lane trains on its own rows from a state that all lanes share; then the states are merged, in lane order, and all go
on from the result. With δₗ the change of the coefficients in lane l and wₗ its share of the rows:

``"auto"``
    θ ← θ + c Σ δₗ with c = Σ ‖δₗ‖² / ‖Σ δₗ‖², held between 1/n and 1 for n lanes; G ← G + Σ (Gₗ − G). Lanes that agree
    have all found the same, and c is 1/n: their mean. Lanes that found different things (each its few positives out of
    a million rows) have orthogonal changes, and c is 1: everything counts, as if one lane had found it all. Each output
    has a c of its own, but for softmax, where outputs belong together. G is the sum over all rows, as in one lane: the
    steps get shorter with the number of gradients that were seen, wherever. A step that went too far is met by the next
    round's, none of which goes beyond the minimum of its batch.
``"sgd"``, ``"adagrad"``, ``"adam"``
    θ ← Σ wₗ θₗ, and velocity, sums and moments likewise. This is local SGD: with rates that fall it converges as one
    lane does (Stich 2019), because all lanes start anew from the mean in every round; with sums and moments that are
    means, a coordinate's rate is that of a lane.
``"dowg"``
    θ and Σ r² ‖g‖² likewise; the distance r is the largest of all lanes, because it may never shrink.

Averages are merged by rows in every case: θ̄ ← Σ wₗ θ̄ₗ. The number of updates is that of the busiest lane, so that
rates and averages go by the steps a lane has taken, and Adam's powers are that lane's.

Sums are taken in lane order, and by element: the bits do not depend on the processor.

References
----------
Stich (2019), Local SGD converges fast and communicates little, ICLR. McMahan et al. (2017), AISTATS (averaging by
rows). Agarwal et al. (2014), A reliable effective terascale linear learning system, JMLR 15 (AdaGrad in parallel).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamgd.learn import kernels
from streamgd.learn.recipe import Packed
from streamgd.learn.state import State

Floats = NDArray[np.float64]

#: What a turn counts from zero, and the merge adds up.
_SUMS = [kernels.LOSS_SUM, kernels.WEIGHT_SUM, kernels.PENALTY_SUM]
_COUNTS = [kernels.EPOCH_ROWS, kernels.N_ROWS]


def begin_turn(start: State) -> State:
    """Return a copy of a state for one lane to train, with everything that is added up set to zero.

    Parameters
    ----------
    start : State
        Without an open batch; stays as it is.
    """
    state = start.copy()
    state.scalars[_SUMS] = 0.0
    state.counters[_COUNTS] = 0
    state.checksum[:] = 0
    state.moments[:] = 0.0
    return state


def merge(start: State, lanes: Sequence[State], packed: Packed) -> State:
    """Merge the states of lanes.

    Parameters
    ----------
    start : State
        What all lanes started from.
    lanes : sequence of State
        As `begin_turn` gave them, trained on at least one row each, without open batches; in lane order.
    packed : Packed
        The recipe.

    Returns
    -------
    State
        A new one. If a lane has diverged, so has the result.
    """
    merged = start.copy()
    rows = np.array([state.counters[kernels.EPOCH_ROWS] for state in lanes], np.float64)
    shares = rows / rows.sum()
    if packed.codes[kernels.CODE_OPTIMIZER] == kernels.AUTO:
        merged.theta[:] = _joined(
            start.theta, [state.theta for state in lanes], bool(packed.codes[kernels.CODE_SOFTMAX])
        )
        for state in lanes:
            merged.slots += state.slots - start.slots
    else:
        merged.theta[:] = _mean([state.theta for state in lanes], shares)
        merged.slots[:] = _mean([state.slots for state in lanes], shares)
    merged.average[:] = _mean([state.average for state in lanes], shares)
    if packed.params[kernels.PARAM_L1] > 0:  # what is zero in every lane is zero
        merged.theta[np.all([state.theta == 0 for state in lanes], axis=0)] = 0.0
    busiest = max(lanes, key=lambda state: int(state.counters[kernels.N_UPDATES]))
    merged.counters[kernels.N_UPDATES] = busiest.counters[kernels.N_UPDATES]
    kept = [kernels.BETA_1_POWER, kernels.BETA_2_POWER]
    merged.scalars[kept] = busiest.scalars[kept]
    distances = [state.scalars[kernels.DOWG_DISTANCE] for state in lanes]
    merged.scalars[kernels.DOWG_DISTANCE] = max(distances)
    merged.scalars[kernels.DOWG_SUM] = _mean([state.scalars[[kernels.DOWG_SUM]] for state in lanes], shares)[0]
    for state in lanes:
        merged.scalars[_SUMS] += state.scalars[_SUMS]
        merged.counters[_COUNTS] += state.counters[_COUNTS]
        merged.checksum += state.checksum
        merged.moments += state.moments
        if state.counters[kernels.STATUS] != kernels.OK and merged.counters[kernels.STATUS] == kernels.OK:
            merged.counters[kernels.STATUS] = state.counters[kernels.STATUS]
            merged.scalars[kernels.BAD_VALUE] = state.scalars[kernels.BAD_VALUE]
    return merged


def _mean(arrays: Sequence[Floats], shares: Floats) -> Floats:
    total = np.zeros_like(arrays[0])
    for array, share in zip(arrays, shares, strict=True):
        total += share * array
    return total


def _joined(start: Floats, lanes: Sequence[Floats], softmax: bool) -> Floats:
    """Add to the coefficients what the lanes found: the more of it, the less they agree."""
    total, sizes = np.zeros_like(start), np.zeros(len(start))
    for theta in lanes:
        change = theta - start
        total += change
        sizes += _squares(change)
    together = _squares(total)
    if softmax:
        sizes, together = sizes.sum(keepdims=True), together.sum(keepdims=True)
    with np.errstate(all="ignore"):  # diverged lanes; no change at all
        factor = np.where(together > 0, sizes / together, 1.0)
    factor = np.clip(factor, 1.0 / len(lanes), 1.0)
    joined: Floats = start + factor[:, None] * total
    return joined


def _squares(change: Floats) -> Floats:
    """Sum the squares of each row, one after the other: NumPy's own sums depend on the processor."""
    sums: Floats = np.cumsum(change * change, axis=1)[:, -1]
    return sums
