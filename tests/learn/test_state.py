"""The state: where it starts, and that nothing is lost when it is stored."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from safetensors.numpy import load, save

from streamgd.learn import kernels
from streamgd.learn.recipe import Recipe
from streamgd.learn.state import State
from tests.learn.training import begin, bits_of, feed, make_rows, pack, train

RECIPES = [
    Recipe(batch_size=16),
    Recipe(optimizer="adam", batch_size=16, average=True),
    Recipe(optimizer="dowg", batch_size=16),
    Recipe(optimizer="sgd", momentum=0.9, batch_size=16),
    Recipe(optimizer="adagrad", batch_size=16, penalty="l1"),
]


def test_the_first_state():
    state = State.start(
        intercept=np.array([3.0, -4.0]),
        n_features=5,
        n_targets=2,
        n_slots=1,
        batch_size=7,
        row_dtype=np.dtype(np.float32),
        has_weight=True,
    )
    np.testing.assert_array_equal(state.theta, [[0, 0, 0, 0, 0, 3], [0, 0, 0, 0, 0, -4]])
    np.testing.assert_array_equal(state.average, state.theta)
    assert not np.shares_memory(state.average, state.theta)
    assert state.slots.shape == (1, 2, 6)
    assert (state.carry_X.shape, state.carry_X.dtype) == ((7, 5), np.float32)
    assert (state.carry_y.shape, state.carry_weight.shape, state.moments.shape) == ((7, 2), (7,), (2, 5))
    assert (state.cursor, state.epoch, state.loss_curve) == ((0, 0, 0), 0, [])
    assert np.isnan(state.progressive_loss)
    assert state.scalars[kernels.DOWG_DISTANCE] == pytest.approx(1e-4 * (1 + 5))
    assert state.scalars[[kernels.ETA_SCALE, kernels.BETA_1_POWER, kernels.BETA_2_POWER]].tolist() == [1, 1, 1]
    assert state.scalars[kernels.BEST_OBJECTIVE] == np.inf


def test_the_cursor_moves_to_the_next_window():
    state = begin(Recipe(), make_rows(4, 2))
    state.counters[[kernels.EPOCH, kernels.WINDOW, kernels.ROW]] = (2, 5, 77)
    assert state.cursor == (2, 5, 77)
    state.next_window()
    assert (state.cursor, state.epoch) == ((2, 6, 0), 2)


def test_progressive_loss_is_weighted():
    state = begin(Recipe(), make_rows(4, 2))
    state.scalars[[kernels.LOSS_SUM, kernels.WEIGHT_SUM]] = (6.0, 4.0)
    assert state.progressive_loss == 1.5


@pytest.mark.parametrize("stop", [32, 39, 47, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.optimizer)
def test_a_stored_state_goes_on_to_the_same_bits(recipe, dtype, weighted, stop):
    """Through the file format itself, with the open batch empty, part-filled and one row short of full."""
    rows = make_rows(90, 5, dtype=dtype, n_targets=2, weighted=weighted)
    packed = pack(recipe, rows, moments=True)
    state = begin(recipe, rows)
    feed(state, rows, packed, stop=stop, close=False)
    state.loss_curve.append(0.1 + 0.2)
    tensors = state.to_tensors()
    assert len(tensors["carry_X"]) == stop % 16
    stored = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    again = State.from_tensors(load(stored), batch_size=16, has_weight=weighted)
    assert bits_of(again) == bits_of(state)
    assert again.cursor == state.cursor
    assert again.carry_X.shape == (16, 5)
    assert again.carry_weight.shape == ((16,) if weighted else (0,))
    for one in (state, again):
        feed(one, rows, packed, start=stop)
    assert bits_of(again) == bits_of(state)
    assert again.loss_curve == [0.1 + 0.2]


def test_a_restored_state_owns_writable_arrays():
    rows = make_rows(20, 3)
    state = begin(Recipe(batch_size=16), rows)
    feed(state, rows, pack(Recipe(batch_size=16), rows), close=False)
    tensors = state.to_tensors()
    for tensor in tensors.values():
        tensor.setflags(write=False)
    again = State.from_tensors(tensors, batch_size=16, has_weight=False)
    for name, array in vars(again).items():
        if name != "loss_curve":
            assert array.flags.writeable, name
            assert array.flags.c_contiguous, name
            assert not np.shares_memory(array, tensors[name]), name


def test_a_copy_is_independent():
    rows = make_rows(40, 3)
    recipe = Recipe(batch_size=16)
    packed = pack(recipe, rows)
    state = begin(recipe, rows)
    feed(state, rows, packed, stop=20, close=False)
    state.loss_curve.append(1.0)
    before = bits_of(state)
    copy = state.copy()
    assert bits_of(copy) == before
    feed(copy, rows, packed, start=20)
    copy.loss_curve.append(2.0)
    assert bits_of(state) == before
    assert bits_of(copy) != before


@pytest.mark.parametrize("stop", [0, 20, 32])
def test_a_pickled_state_goes_on_to_the_same_bits_and_holds_no_unfilled_rows(stop):
    rows, recipe = make_rows(40, 300), Recipe(batch_size=16)
    packed = pack(recipe, rows)
    state = begin(recipe, rows)
    feed(state, rows, packed, stop=stop, close=False)
    sent = pickle.dumps(state)
    assert len(sent) < 5 * 8 * 301 + (stop % 16) * 301 * 8 + 5_000
    again = pickle.loads(sent)
    assert (again.carry_X.shape, again.carry_y.shape) == (state.carry_X.shape, state.carry_y.shape)
    assert (again.moments.shape, again.moments.dtype) == (state.moments.shape, state.moments.dtype)
    for one in (state, again):
        feed(one, rows, packed, start=stop)
    assert bits_of(again) == bits_of(state)


def test_moments_are_pickled():
    state = begin(Recipe(), make_rows(4, 2))
    state.moments[1, 0] = 2.0
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(state)).moments, state.moments)


def test_states_of_before_there_were_subgradients():
    """Their coefficients are taken to keep their signs, so that they stay as they were."""
    rows = make_rows(100, 3)
    state = train(Recipe(penalty="l1", alpha=0.01, batch_size=16), rows)
    tensors = state.to_tensors()
    del tensors["subgradient"]
    old = State.from_tensors(tensors, batch_size=16, has_weight=False)
    assert old.with_penalty(sparse=False) is old
    assert (old.with_penalty(sparse=True).subgradient == np.sign(state.theta)).all()
    attributes = state.__getstate__()
    del attributes["subgradient"]
    again = State.__new__(State)
    again.__setstate__(attributes)
    assert again.subgradient.shape == (0, 4)
    with pytest.raises(ValueError, match="a state without subgradients, and an l1 penalty"):
        feed(again, rows, pack(Recipe(penalty="l1", alpha=0.01, batch_size=16), rows))
