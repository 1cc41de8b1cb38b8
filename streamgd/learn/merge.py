"""What several lanes have learnt from the same start, as one state.

A lane trains on its own rows from a state that all lanes share; then the states are merged, in lane order, and all go
on from the result. With δₗ the change of the coefficients in lane l and wₗ its share of the rows:

``"auto"``
    G' = G + Σ (Gₗ − G), the sum over all rows, as in one lane; then θ ← θ + c Σ δₗ (Gₗ / G')^¼ and G ← G'.

    The root is about what a lane did not know. It went by its own Gₗ, so its steps were longer than those of one that
    had seen the gradients of all; if each of n lanes has the same share of G', their sum is n^¾ steps where n lanes one
    after the other would go some 2 √n (both are 8 for 16 lanes), and without the root it were n. It matters in the
    first rounds, where G is little: there, 16 lanes went so far astray on features with heavy tails that the gradients
    of a few extreme rows, huge because of it, left G too large for anything to be mended. A lane alone with what it
    found (one that saw a feature's only extreme rows) has Gₗ = G' there: its change counts whole, those of the others,
    who knew nothing, hardly.

    c = Σ ‖uₗ‖² / ‖Σ uₗ‖², held between 1/n and 1, of the changes as they count, uₗ = δₗ (Gₗ / G)^¼. Lanes that agree
    have all found the same, and c is 1/n: their mean. Lanes that found different things (each its few positives out of
    a million rows) have orthogonal changes, and c is 1: everything counts, as if one lane had found it all. Each output
    has a c of its own, but for softmax, where outputs belong together. Where G is below a thousandth of the output's
    largest it is taken for that, so that what is new does not decide alone. A step that went too far is met by the
    next round's, none of which goes beyond the minimum of its batch.
``"sgd"``, ``"adagrad"``, ``"adam"``
    θ ← Σ wₗ θₗ, and velocity, sums and moments likewise. This is local SGD: with rates that fall it converges as one
    lane does (Stich 2019), because all lanes start anew from the mean in every round; with sums and moments that are
    means, a coordinate's rate is that of a lane.
``"dowg"``
    θ and Σ r² ‖g‖² likewise; the distance r is the largest of all lanes, because it may never shrink.

Averages, of the l1 penalty's subgradients too, are merged by rows in every case: θ̄ ← Σ wₗ θ̄ₗ. The number of updates
is that of the busiest lane, so that rates and averages go by the steps a lane has taken, and Adam's powers are that
lane's.

Lanes are added up in pairs, pairs of pairs, and so on, by their numbers alone: lanes 0 and 1, 2 and 3; then 0 to 3. So
whoever took the turns of lanes 0 to 3 hands on one sum in place of four states, and the bits are the same however the
lanes were grouped. Within an array sums go by element, in order: the bits do not depend on the processor either.

References
----------
Stich (2019), Local SGD converges fast and communicates little, ICLR. McMahan et al. (2017), AISTATS (averaging by
rows). Agarwal et al. (2014), A reliable effective terascale linear learning system, JMLR 15 (lanes weighted by their
AdaGrad sums).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from streamgd.learn import kernels
from streamgd.learn.recipe import Packed
from streamgd.learn.state import State

Floats = NDArray[np.float64]

#: What a turn counts from zero, and the merge adds up.
_SUMS = [kernels.LOSS_SUM, kernels.WEIGHT_SUM, kernels.PENALTY_SUM]
_COUNTS = [kernels.EPOCH_ROWS, kernels.N_ROWS]
#: What is that of the busiest lane.
_POWERS = [kernels.BETA_1_POWER, kernels.BETA_2_POWER]
#: Values squared at a time, which the processor's caches hold.
_PIECE = 4096
#: A gradient sum counts as no less than this part of the output's largest where changes are compared.
_LEAST_SUM = 1e-3


def begin_turn(start: State) -> State:
    """Return a copy of a state for one lane to train, with everything that is added up set to zero.

    Parameters
    ----------
    start : State
        Without an open batch; stays as it is.
    """
    state = replace(start, moments=np.empty((0, 0))).copy()
    state.moments = np.zeros(start.moments.shape)
    state.scalars[_SUMS] = 0.0
    state.counters[_COUNTS] = 0
    state.checksum[:] = 0
    return state


@dataclass(frozen=True)
class Found:
    """What one or several lanes found, added up.

    Attributes
    ----------
    n_lanes : int
        How many have trained.
    theta, slots : ndarray of float64
        For ``"auto"`` sums of the changes, those of the coefficients times Gₗ^¼; for others of the values times the
        lane's rows.
    sizes : ndarray of shape (n_outputs,)
        Sums of ‖uₗ‖² of each output.
    average, subgradient : ndarray of float64
        Sums of the averages times the lane's rows.
    zero : ndarray of bool, or None
        What is zero in every lane, where that matters.
    scalars, counters, checksum, moments : ndarray
        As in the state: sums, the busiest lane's updates and powers, the greatest distance, the first lane's failure.
    """

    n_lanes: int
    theta: Floats
    slots: Floats
    sizes: Floats
    average: Floats
    subgradient: Floats
    zero: NDArray[np.bool_] | None
    scalars: Floats
    counters: NDArray[np.int64]
    checksum: NDArray[np.uint64]
    moments: Floats | None


def found_by(start: State, state: State, packed: Packed) -> Found:
    """Say what a lane found.

    Parameters
    ----------
    start : State
        What the lane started from.
    state : State
        As `begin_turn` gave it, trained on at least one row unless it diverged before, without an open batch. Its
        arrays are used up.
    packed : Packed
        The recipe.
    """
    rows = float(state.counters[kernels.EPOCH_ROWS])
    zero = state.theta == 0 if packed.params[kernels.PARAM_L1] > 0 else None
    sizes = np.zeros(0)
    with np.errstate(all="ignore"):  # a lane that diverged
        if packed.codes[kernels.CODE_OPTIMIZER] == kernels.AUTO:
            state.theta -= start.theta
            state.theta *= _fourth_root(state.slots[0])
            state.slots -= start.slots
            sizes = _sizes(state.theta, start)
        else:
            state.theta *= rows
            state.slots *= rows
        state.average *= rows
        state.subgradient *= rows
        state.scalars[kernels.DOWG_SUM] *= rows
    moments = state.moments if packed.codes[kernels.CODE_MOMENTS] else None
    return Found(
        n_lanes=1,
        theta=state.theta,
        slots=state.slots,
        sizes=sizes,
        average=state.average,
        subgradient=state.subgradient,
        zero=zero,
        scalars=state.scalars,
        counters=state.counters,
        checksum=state.checksum,
        moments=moments,
    )


def added(left: Found, right: Found) -> Found:
    """Add up what lanes found, those with lower numbers on the left; both stay as they are."""
    scalars, counters = left.scalars.copy(), left.counters.copy()
    with np.errstate(all="ignore"):
        scalars[_SUMS] += right.scalars[_SUMS]
        scalars[kernels.DOWG_SUM] += right.scalars[kernels.DOWG_SUM]
        theta, slots = left.theta + right.theta, left.slots + right.slots
        sizes, average = left.sizes + right.sizes, left.average + right.average
        subgradient = left.subgradient + right.subgradient
    scalars[kernels.DOWG_DISTANCE] = max(left.scalars[kernels.DOWG_DISTANCE], right.scalars[kernels.DOWG_DISTANCE])
    if right.counters[kernels.N_UPDATES] > left.counters[kernels.N_UPDATES]:
        counters[kernels.N_UPDATES] = right.counters[kernels.N_UPDATES]
        scalars[_POWERS] = right.scalars[_POWERS]
    if counters[kernels.STATUS] == kernels.OK:
        counters[kernels.STATUS] = right.counters[kernels.STATUS]
        scalars[kernels.BAD_VALUE] = right.scalars[kernels.BAD_VALUE]
    counters[_COUNTS] += right.counters[_COUNTS]
    return Found(
        n_lanes=left.n_lanes + right.n_lanes,
        theta=theta,
        slots=slots,
        sizes=sizes,
        average=average,
        subgradient=subgradient,
        zero=None if left.zero is None or right.zero is None else left.zero & right.zero,
        scalars=scalars,
        counters=counters,
        checksum=left.checksum + right.checksum,
        moments=None if left.moments is None or right.moments is None else left.moments + right.moments,
    )


#: What stretches of lanes found, by (level, index): lanes ``index * 2**level`` up to the next index's first one, as far
#: as there are so many. None where no lane had rows.
Stretches = dict[tuple[int, int], Found | None]


def fold(stretches: Mapping[tuple[int, int], Found | None], n_lanes: int) -> Stretches:
    """Add up neighbours as far as they are there.

    Parameters
    ----------
    stretches : mapping of (level, index) to Found or None
        Single lanes are of level 0. None of them may overlap.
    n_lanes : int
        Lanes of the run.

    Returns
    -------
    dict
        The fewest stretches; a single one if every lane is there.
    """
    left = dict(stretches)
    level = 0
    while 1 << level < n_lanes:
        for at, index in sorted(key for key in left if key[0] == level):
            first, other = index & ~1, index | 1
            if other << level >= n_lanes:  # there are no such lanes
                left[level + 1, index >> 1] = left.pop((at, index))
            elif index == first and (level, other) in left:
                one, two = left.pop((level, first)), left.pop((level, other))
                left[level + 1, index >> 1] = added(one, two) if one and two else one or two
        level += 1
    return left


def merge(start: State, found: Found, packed: Packed) -> State:
    """Go on from what all lanes found.

    Parameters
    ----------
    start : State
        What all lanes started from; stays as it is.
    found : Found
        Of all lanes.
    packed : Packed
        The recipe.

    Returns
    -------
    State
        A new one. If a lane has diverged, so has the result.
    """
    rows = max(1.0, float(found.counters[kernels.EPOCH_ROWS]))  # none if all lanes diverged in their first batch
    with np.errstate(all="ignore"):  # diverged lanes; no change at all
        if packed.codes[kernels.CODE_OPTIMIZER] == kernels.AUTO:
            slots = start.slots + found.slots
            factor = _factor(found, _sizes(found.theta, start), bool(packed.codes[kernels.CODE_SOFTMAX]))
            theta = factor[:, None] * found.theta
            root = _fourth_root(slots[0])
            np.divide(theta, root, out=theta, where=root > 0)  # where no gradient was nothing has changed
            theta += start.theta
        else:
            theta, slots = found.theta / rows, found.slots / rows
        average, subgradient = found.average / rows, found.subgradient / rows
    if found.zero is not None:  # what is zero in every lane is zero
        theta[found.zero] = 0.0
    none = np.empty((0, 0))
    merged = replace(start, theta=none, average=none, slots=none, subgradient=none).copy()
    merged.theta, merged.average, merged.slots, merged.subgradient = theta, average, slots, subgradient
    scalars, counters = merged.scalars, merged.counters
    scalars[_POWERS] = found.scalars[_POWERS]
    scalars[kernels.DOWG_DISTANCE] = found.scalars[kernels.DOWG_DISTANCE]
    scalars[kernels.DOWG_SUM] = found.scalars[kernels.DOWG_SUM] / rows
    scalars[kernels.BAD_VALUE] = found.scalars[kernels.BAD_VALUE]
    scalars[_SUMS] += found.scalars[_SUMS]
    counters[_COUNTS] += found.counters[_COUNTS]
    counters[kernels.N_UPDATES] = found.counters[kernels.N_UPDATES]
    counters[kernels.STATUS] = found.counters[kernels.STATUS]
    merged.checksum += found.checksum
    if found.moments is not None:
        merged.moments += found.moments
    return merged


def _fourth_root(sums: Floats) -> Floats:
    """Return x^¼ by roots alone, which are rounded correctly everywhere."""
    root = np.sqrt(sums)
    return np.sqrt(root, out=root)


def _factor(found: Found, together: Floats, softmax: bool) -> Floats:
    """Say how much of the sum of the changes counts: the more, the less the lanes agree."""
    sizes = found.sizes
    if softmax:
        sizes, together = sizes.sum(keepdims=True), together.sum(keepdims=True)
    factor = np.where(together > 0, sizes / together, 1.0)
    return np.clip(factor, 1.0 / found.n_lanes, 1.0)


def _sizes(change: Floats, start: State) -> Floats:
    """Sum the squares of changes that were weighted by their own sums' roots, divided by those of G; of each output.

    One square after the other: NumPy's own sums depend on the processor.
    """
    sums = start.slots[0]
    largest = sums.max(axis=1, keepdims=True)
    least = np.where(largest > 0, _LEAST_SUM * largest, 1.0)  # at the very start all count the same
    total = np.zeros(len(change))
    for first in range(0, change.shape[1], _PIECE):
        piece = change[:, first : first + _PIECE]
        squares = piece * piece
        squares /= np.sqrt(np.maximum(sums[:, first : first + _PIECE], least))
        squares[:, 0] += total
        total = np.cumsum(squares, axis=1)[:, -1]
    return total
