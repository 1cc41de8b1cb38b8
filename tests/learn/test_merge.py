"""What merging lanes must keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streamgd.learn import kernels
from streamgd.learn import merge as merge_module
from streamgd.learn.merge import begin_turn, fold, found_by
from streamgd.learn.merge import merge as merge_found
from streamgd.learn.recipe import Recipe
from streamgd.learn.state import State


def state_of(n_outputs: int = 1, n_features: int = 3, seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    state = State.start(
        intercept=np.ones(n_outputs),
        n_features=n_features,
        n_targets=1,
        n_slots=2,
        batch_size=4,
        row_dtype=np.dtype("f4"),
        has_weight=False,
    )
    state.theta[:] = rng.normal(size=state.theta.shape)
    state.average[:] = rng.normal(size=state.theta.shape)
    state.slots[:] = rng.uniform(1, 2, state.slots.shape)
    state.counters[[kernels.N_UPDATES, kernels.N_ROWS, kernels.EPOCH_ROWS]] = 7, 100, 40
    state.scalars[kernels.LOSS_SUM] = 5.0
    return state


def packed_of(optimizer: str = "auto", **options: object):
    return Recipe(optimizer=optimizer, **options).pack(n_classes=0, n_updates=10, mean_weight=1.0, moments=False)


def merge(start: State, lanes: list[State], packed: Any) -> State:
    """Merge lanes, each added to what others found on its own."""
    stretches = {(0, lane): found_by(start, state.copy(), packed) for lane, state in enumerate(lanes)}
    (found,) = fold(stretches, len(lanes)).values()
    assert found is not None
    return merge_found(start, found, packed)


def lane_of(
    start: State, change: np.ndarray, rows: int = 10, updates: int = 2, gradients: float | np.ndarray = 1.0
) -> State:
    state = begin_turn(start)
    state.theta += change
    state.average += change / 2
    state.slots += gradients
    state.counters[kernels.EPOCH_ROWS] = state.counters[kernels.N_ROWS] = rows
    state.counters[kernels.N_UPDATES] += updates
    state.scalars[kernels.LOSS_SUM] = 1.0
    state.checksum[0] = 2**63 + 1
    return state


def axis(j: int, size: float = 1.0) -> np.ndarray:
    change = np.zeros((1, 4))
    change[0, j] = size
    return change


class TestAuto:
    def test_lanes_that_agree_are_averaged(self):
        """With next to no new gradients: what they have seen before is what they all know."""
        start = state_of()
        merged = merge(start, [lane_of(start, axis(1, 0.5), gradients=1e-15) for _ in range(4)], packed_of())
        np.testing.assert_allclose(merged.theta, start.theta + axis(1, 0.5), rtol=1e-14)

    def test_what_only_one_lane_found_counts_in_full(self):
        start = state_of()
        changes = [axis(0, 3.0), axis(1, -1.0), axis(2, 0.0)]
        lanes = [lane_of(start, change, gradients=np.abs(change)) for change in changes]
        merged = merge(start, lanes, packed_of())
        np.testing.assert_allclose(merged.theta, start.theta + axis(0, 3.0) + axis(1, -1.0), rtol=1e-14)

    def test_steps_get_shorter_by_the_gradients_of_others(self):
        """The fourth root of a lane's part of all: at the very start that is one by number, here 1 / 16."""
        start = state_of()
        start.slots[:] = 0
        rng = np.random.default_rng(1)
        changes = rng.normal(size=(16, 1, 4))
        changes -= changes.mean(0)  # so that they have nothing in common but what is added
        lanes = [lane_of(start, change + 0.01) for change in changes]
        merged = merge(start, lanes, packed_of())
        np.testing.assert_allclose(merged.theta - start.theta, 16 * 0.01 * 16**-0.25, rtol=1e-12)

    def test_a_lane_that_knows_overrules_those_that_do_not(self):
        """One met a feature's only extreme row: huge gradients, a small step; the others drifted far."""
        start = state_of()
        start.slots[:] = 1e-6
        extreme = np.array([[1e12, 0, 0, 0]])
        lanes = [lane_of(start, axis(0, -0.1), gradients=extreme)]
        lanes += [lane_of(start, axis(0, 5.0), gradients=np.array([[1e-6, 0, 0, 0]])) for _ in range(15)]
        moved = (merge(start, lanes, packed_of()).theta - start.theta)[0, 0]
        assert -0.1 <= moved < 0.0

    def test_where_no_gradient_was_nothing_changes(self):
        start = state_of()
        start.slots[0, 0, 2] = 0
        lanes = [lane_of(start, axis(0, 1.0), gradients=np.array([[1.0, 1.0, 0.0, 1.0]])) for _ in range(2)]
        merged = merge(start, lanes, packed_of())
        assert np.isfinite(merged.theta).all()
        assert merged.theta[0, 2] == start.theta[0, 2]

    def test_lanes_that_contradict_each_other_do_not_blow_the_result_up(self):
        start = state_of()
        merged = merge(start, [lane_of(start, axis(0, 1.0)), lane_of(start, axis(0, -1.0 + 1e-9))], packed_of())
        assert np.abs(merged.theta - start.theta).max() <= 1e-8

    def test_outputs_are_judged_each_by_itself_but_for_softmax(self):
        start = state_of(n_outputs=2)
        same, other = np.zeros((2, 4)), np.zeros((2, 4))
        same[0, 0] = other[0, 0] = 1.0  # the lanes agree on the first output
        same[1, 0], other[1, 1] = 1.0, 1.0  # and found different things on the second
        start.slots[:] = 1.0
        lanes = [lane_of(start, same, gradients=1e-15), lane_of(start, other, gradients=1e-15)]
        moved = merge(start, lanes, packed_of()).theta - start.theta
        np.testing.assert_allclose(moved, [[1, 0, 0, 0], [1, 1, 0, 0]], atol=1e-12)
        softmax = packed_of()
        softmax.codes[kernels.CODE_SOFTMAX] = 1
        moved = merge(start, lanes, softmax).theta - start.theta
        np.testing.assert_allclose(moved, 4 / 6 * np.array([[2, 0, 0, 0], [1, 1, 0, 0]]), atol=1e-12)

    def test_squared_gradients_add_up(self):
        start = state_of()
        merged = merge(start, [lane_of(start, axis(0)) for _ in range(3)], packed_of())
        np.testing.assert_allclose(merged.slots, start.slots + 3.0)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam", "dowg"])
def test_other_optimizers_take_the_mean_by_rows(optimizer):
    start = state_of()
    lanes = [lane_of(start, axis(0, 1.0), rows=30), lane_of(start, axis(0, 5.0), rows=10)]
    lanes[1].slots += 4.0
    lanes[1].scalars[kernels.DOWG_DISTANCE] = 9.0
    merged = merge(start, lanes, packed_of(optimizer))
    np.testing.assert_allclose(merged.theta, start.theta + axis(0, 2.0))
    np.testing.assert_allclose(merged.average, start.average + axis(0, 1.0))
    np.testing.assert_allclose(merged.slots, start.slots + 2.0)
    assert merged.scalars[kernels.DOWG_DISTANCE] == 9.0


def test_rows_losses_and_identities_add_up_and_steps_are_those_of_a_lane():
    start = state_of()
    lanes = [lane_of(start, axis(0), rows=10, updates=2), lane_of(start, axis(1), rows=20, updates=5)]
    lanes[1].scalars[kernels.BETA_1_POWER] = 0.25
    merged = merge(start, lanes, packed_of("adam"))
    assert merged.counters[kernels.N_ROWS] == 130
    assert merged.counters[kernels.EPOCH_ROWS] == 70
    assert merged.counters[kernels.N_UPDATES] == 12
    assert merged.scalars[kernels.LOSS_SUM] == 7.0
    assert merged.scalars[kernels.BETA_1_POWER] == 0.25
    assert merged.checksum[0] == 2  # modulo 2**64


def test_what_is_zero_in_every_lane_stays_zero_under_l1():
    start = state_of()
    lanes = [lane_of(start, np.full((1, 4), 0.1 * (1 + lane))) for lane in range(3)]
    for lane in lanes:
        lane.theta[0, 1] = 0.0
    lanes[0].theta[0, 2] = 0.0
    merged = merge(start, lanes, packed_of(penalty="l1", alpha=0.1))
    assert merged.theta[0, 1] == 0.0
    assert merged.theta[0, 2] != 0.0


@pytest.mark.parametrize("optimizer", ["auto", "adam"])
def test_subgradients_are_merged_by_rows(optimizer):
    start = state_of()
    start.subgradient = np.full((1, 4), 0.5)
    lanes = [lane_of(start, axis(0), rows=rows) for rows in (10, 30)]
    lanes[0].subgradient[:], lanes[1].subgradient[:] = 1.0, -0.2
    merged = merge(start, lanes, packed_of(optimizer, penalty="l1", alpha=0.1))
    np.testing.assert_allclose(merged.subgradient, 0.1)
    assert (start.subgradient == 0.5).all()


def test_a_lane_that_diverged_is_seen():
    start = state_of()
    lanes = [lane_of(start, axis(0)), lane_of(start, axis(1))]
    lanes[1].counters[kernels.STATUS] = kernels.DIVERGED
    lanes[1].scalars[kernels.BAD_VALUE] = np.inf
    merged = merge(start, lanes, packed_of())
    assert merged.counters[kernels.STATUS] == kernels.DIVERGED
    assert merged.scalars[kernels.BAD_VALUE] == np.inf


def test_neither_start_nor_lanes_are_changed():
    start = state_of()
    before = {name: array.tobytes() for name, array in start.to_tensors().items()}
    lanes = [lane_of(start, axis(0)), lane_of(start, axis(1))]
    kept = [lane.theta.copy() for lane in lanes]
    merge(start, lanes, packed_of())
    assert before == {name: array.tobytes() for name, array in start.to_tensors().items()}
    for lane, theta in zip(lanes, kept, strict=True):
        np.testing.assert_array_equal(lane.theta, theta)


@pytest.mark.parametrize("optimizer", ["auto", "adam"])
@pytest.mark.parametrize("n_lanes", [2, 3, 5, 6, 8, 11])
def test_bits_do_not_depend_on_how_lanes_are_grouped(n_lanes, optimizer):
    """Whoever took which turns: alone, in runs, or every other one; neighbours are added up where they are."""
    start, packed, rng = state_of(), packed_of(optimizer, penalty="l1", alpha=0.1), np.random.default_rng(1)
    lanes = [lane_of(start, rng.normal(size=(1, 4)), rows=lane + 1, updates=lane % 3 + 1) for lane in range(n_lanes)]
    expected = bits_of(merge(start, lanes, packed))
    for groups in (
        [range(n_lanes)],
        [range(n_lanes // 2), range(n_lanes // 2, n_lanes)],
        [range(0, n_lanes, 2), range(1, n_lanes, 2)],
        [range(1), range(1, n_lanes)],
    ):
        parts = [fold({(0, i): found_by(start, lanes[i].copy(), packed) for i in some}, n_lanes) for some in groups]
        whole = fold({key: found for part in parts for key, found in part.items()}, n_lanes)
        assert len(whole) == 1
        assert bits_of(merge_found(start, next(iter(whole.values())), packed)) == expected


def test_neighbours_hand_on_one_sum():
    start, packed = state_of(), packed_of()
    found = {(0, lane): found_by(start, lane_of(start, axis(0)), packed) for lane in range(8)}
    assert list(fold({(0, i): found[0, i] for i in range(4)}, 8)) == [(2, 0)]
    assert list(fold({(0, i): found[0, i] for i in range(4, 7)}, 7)) == [(2, 1)]  # there is no eighth lane
    assert sorted(fold({(0, i): found[0, i] for i in range(1, 6)}, 8)) == [(0, 1), (1, 1), (1, 2)]
    assert sorted(fold({(0, i): found[0, i] for i in (0, 2, 4, 6)}, 8)) == [(0, 0), (0, 2), (0, 4), (0, 6)]


def test_lanes_without_rows_are_passed_over():
    start, packed = state_of(), packed_of()
    lane = lane_of(start, axis(0))
    alone = fold({(0, 0): found_by(start, lane.copy(), packed)}, 1)[0, 0]
    found = fold({(0, 0): None, (0, 1): None, (0, 2): found_by(start, lane.copy(), packed), (0, 3): None}, 4)[2, 0]
    assert bits_of(merge_found(start, found, packed)) == bits_of(merge_found(start, alone, packed))
    assert fold({(0, 0): None, (0, 1): None}, 2) == {(1, 0): None}


def bits_of(state: State) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state.to_tensors().items()}


def test_changes_are_compared_in_order_however_many_there_are():
    start = state_of(n_outputs=2, n_features=10_000)
    change = np.random.default_rng(0).normal(size=(2, 10_001))
    start.slots[0, 0, 0] = 1e-30  # counts as a thousandth of the largest
    sums = np.maximum(start.slots[0], 1e-3 * start.slots[0].max(axis=1, keepdims=True))
    one_by_one = np.cumsum(change * change / np.sqrt(sums), axis=1)[:, -1]
    np.testing.assert_array_equal(merge_module._sizes(change, start), one_by_one)
    start.slots[:] = 0
    np.testing.assert_array_equal(merge_module._sizes(change, start), np.cumsum(change * change, axis=1)[:, -1])
