"""Arrays of another process: the same rows as there, or an error once they are shown no more."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgd.data.sources import neighbours
from streamgd.data.sources.arrays import as_features, as_target, as_weight
from streamgd.data.sources.neighbours import NeighbourArray, Shown, UnreachableError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not let processes read one another")

#: Shows what is pickled to it, and lets go of it, or of it and overwrites it, when it is told to.
NEIGHBOUR = """
import pickle, sys
from streamgd.data.sources.neighbours import Shown
blocks = pickle.load(sys.stdin.buffer)
shown = Shown(blocks)
pickle.dump(shown, sys.stdout.buffer)
sys.stdout.flush()
kept = list(blocks.values())
for line in sys.stdin.buffer:
    del shown
    for arrays in kept:
        for array in arrays:
            array.fill(0)
    print("gone", flush=True)
"""


class Neighbour:
    """A process that shows blocks."""

    def __init__(self, blocks: dict[int, list[Any]]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR], cwd=Path(__file__).resolve().parents[2], **pipes
        )
        pickle.dump(blocks, self._process.stdin, protocol=5)  # others turn bytes round
        self._process.stdin.flush()
        self.handles = pickle.load(self._process.stdout).handles

    def let_go(self) -> None:
        """Have it show no more, and overwrite what it showed."""
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == b"gone\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture
def neighbour() -> Iterator[Any]:
    """Start processes."""
    started: list[Neighbour] = []

    def start(blocks: dict[int, list[Any]]) -> Neighbour:
        started.append(Neighbour(blocks))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_rows_are_those_of_the_neighbour(neighbour):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(100, 7))
    arrays = [
        X,
        np.asfortranarray(X.astype(np.float32)),
        X[:, 0].astype(">f8"),
        X[:, :3] > 0,
        (100 * X).astype(np.int8),
        X.astype(np.float16),
        np.array(["a", "bcd", "ef", "g"] * 25),
        np.asfortranarray(rng.normal(size=(5, 2500))),  # more columns than the system takes at once
        np.zeros((0, 3)),
    ]
    found = neighbour({3: arrays}).handles[3]
    for array, other in zip(arrays, found, strict=True):
        assert (other.shape, other.dtype, other.ndim, len(other)) == (array.shape, array.dtype, array.ndim, len(array))
        for rows in (slice(0, len(array)), slice(2, 5), slice(4, 4), slice(90, 400)):
            there = other[rows]
            assert there.dtype == array.dtype
            np.testing.assert_array_equal(there, array[rows], strict=True)


def test_they_are_features_targets_and_weights(neighbour):
    X, y = np.arange(12, dtype=">i4").reshape(4, 3), np.array(["b", "a", "b", "c"])
    weight = np.array([1, 2, 3, 4], np.uint8)
    far_X, far_y, far_weight = neighbour({0: [X, y, weight]}).handles[0]
    for far, here in (
        (as_features(far_X), as_features(X)),
        (as_target(far_y, "y"), as_target(y, "y")),
        (as_weight(far_weight), as_weight(weight)),
    ):
        np.testing.assert_array_equal(far.read(1, 3), here.read(1, 3), strict=True)
    assert as_features(far_X).dtypes == as_features(X).dtypes
    assert as_target(far_y, "y").info == as_target(y, "y").info


def test_what_is_shown_no_more_is_an_error_and_never_other_rows(neighbour):
    there = neighbour({0: [np.ones((50, 2))]})
    (array,) = there.handles[0]
    assert array.owner.answers()
    np.testing.assert_array_equal(array[0:50], 1)
    there.let_go()
    assert not array.owner.answers()
    with pytest.raises(UnreachableError, match="does not show its arrays any more"):
        array[0:50]


def test_nor_is_what_was_of_a_process_that_is_gone(neighbour):
    there = neighbour({0: [np.ones((50, 2))]})
    (array,) = there.handles[0]
    there.kill()
    assert not array.owner.answers()
    with pytest.raises(UnreachableError, match="cannot be read"):
        array[0:50]


def test_the_mark_is_taken_back_before_arrays_go():
    """Whoever reads them looks at it afterwards."""
    order: list[Any] = []

    class Noted(list):
        def __del__(self) -> None:
            order.append(int(mark[0]))

    shown = Shown({0: [np.ones(3)]})
    mark = shown._mark
    assert mark[0] != 0
    shown.blocks = {0: Noted(shown.blocks[0])}
    del shown
    assert order == [0]


def test_marks_differ_and_stay_where_they_were():
    marks = [Shown({})._mark for _ in range(100)]
    assert len({mark.ctypes.data for mark in marks}) == 100
    assert len({int(Shown({})._mark[0]) for _ in range(100)}) > 0
    assert all(any(mark is kept for kept in neighbours._marks) for mark in marks)


def test_here_it_is_the_array_itself():
    X = np.ones((4, 2))
    shown = Shown({0: [X]})
    (array,) = pickle.loads(pickle.dumps(shown)).handles[0]
    assert array.here() is X
    del shown
    with pytest.raises(UnreachableError):
        array.here()


def test_a_shown_block_travels_without_its_rows():
    shown = Shown({n: [np.ones((10_000, 10))] for n in range(10)})
    assert len(pickle.dumps(shown)) < 5000


@pytest.mark.parametrize(
    "array",
    [
        np.array([1, "a"], object),
        np.ma.masked_array([1.0, 2.0], [False, True]),
        np.ones((8, 8))[::2, ::2],
        np.ones((2, 2, 2)),
        [1.0, 2.0],
        None,
    ],
    ids=["objects", "masked", "with gaps", "cube", "list", "none"],
)
def test_what_cannot_be_shown_is_left_out_with_its_block(array):
    assert set(Shown({0: [np.ones(2), array], 1: [np.ones(2), np.ones(2)]}).handles) == {1}


def test_rows_are_kept_unless_they_may_be_overwritten(neighbour):
    X, y = np.arange(20.0).reshape(10, 2), -np.arange(10.0)
    far = neighbour({0: [X, y], 1: [X + 100, y + 100]}).handles
    first, second = far[0][0].here()[0:4], far[1][0].here()[0:4]
    np.testing.assert_array_equal(first, X[:4])
    np.testing.assert_array_equal(second, X[:4] + 100)

    again = {n: [each.here(reuse=True) for each in far[n]] for n in far}
    some_X, some_y = again[0][0][0:4], again[0][1][0:4]
    np.testing.assert_array_equal(some_X, X[:4])  # features and targets have places of their own
    np.testing.assert_array_equal(some_y, y[:4])
    others: list[Any] = []
    reading = threading.Thread(target=lambda: others.append(again[1][0][0:4]))
    reading.start()
    reading.join()
    np.testing.assert_array_equal(some_X, X[:4])  # and so has each thread
    assert np.shares_memory(again[1][0][0:4], some_X)
    np.testing.assert_array_equal(some_X, X[:4] + 100)
    np.testing.assert_array_equal(others[0], X[:4] + 100)


def test_other_machines_and_systems_do_not_answer(neighbour, monkeypatch):
    owner = neighbour({0: [np.ones(3)]}).handles[0][0].owner
    assert owner.answers()
    assert not replace(owner, machine="another").answers()
    assert not replace(owner, mark=owner.mark ^ 2).answers()
    monkeypatch.setattr(neighbours, "_system_call", lambda: None)
    assert not owner.answers()
    with pytest.raises(UnreachableError, match="does not let processes read one another"):
        NeighbourArray(owner, (0, 0), 0, (3,), np.dtype(float), by_column=False)[0:1]
