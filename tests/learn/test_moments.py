"""Running means and variances."""

import numpy as np
import pytest

from streamgd.learn.moments import Moments

EMPTY = np.empty(0)


def moments_of(X: np.ndarray, weight: np.ndarray, edges: list[int]) -> tuple[np.ndarray, np.ndarray, float]:
    moments = Moments(X.shape[1])
    for first, last in zip([0, *edges], [*edges, len(X)], strict=True):
        moments.add(X[first:last], weight[first:last])
    return *moments.merged(), moments.total


@pytest.mark.parametrize("n_columns", [1, 3])
@pytest.mark.parametrize("n_rows", [5, 16, 500])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_textbook_wherever_pieces_end(n_columns, n_rows, weighted):
    rng = np.random.default_rng(0)
    units, shifts = np.array([[1e6, 1, 1e-3], [-1e6, 0, 1e4]])[:, :n_columns]
    X, weight = rng.standard_normal((n_rows, n_columns)) * units + shifts, EMPTY
    if weighted:
        weight = rng.uniform(0.1, 2, n_rows)
        weight[1::7] = 0
    mean, squares, total = moments_of(X, weight, [])
    expected = np.average(X, axis=0, weights=weight if weighted else None)
    spread = np.average((X - expected) ** 2, axis=0, weights=weight if weighted else None)
    np.testing.assert_allclose(mean, expected, rtol=1e-13)
    np.testing.assert_allclose(squares / total, spread, rtol=1e-8)
    assert total == pytest.approx(weight.sum() if weighted else n_rows, rel=1e-14)
    for edges in ([1], [1, 4], list(range(1, n_rows)), [n_rows // 3, n_rows // 2]):
        again = moments_of(X, weight, edges)
        assert all(np.array_equal(a, b) for a, b in zip(again, (mean, squares, total), strict=True))


def test_parts_that_are_joined():
    rng = np.random.default_rng(2)
    X, weight = rng.standard_normal((300, 2)) * [1, 1e160] + [1e6, 0], rng.uniform(0, 1, 300)
    weight[:100] = 0  # of a part that has no weight nothing is taken, not even what overflows
    joined = Moments(2)
    for first in range(0, 300, 100):
        part = Moments(2)
        part.add(X[first : first + 100], weight[first : first + 100])
        joined = joined.joined(part)
    mean, squares, total = moments_of(X, weight, [])
    np.testing.assert_allclose(joined.merged()[0], mean, rtol=1e-13)
    np.testing.assert_allclose(joined.merged()[1][0], squares[0], rtol=1e-9)
    assert joined.total == pytest.approx(total, rel=1e-14)
    alone = Moments(2)
    alone.add(X, weight)
    again = Moments(2).joined(alone)
    assert (*again.merged()[0], *again.merged()[1], again.total) == (*mean, *squares, total)


def test_a_column_alone_has_the_bits_that_it_has_among_others():
    rng = np.random.default_rng(1)
    X, weight = rng.standard_normal((333, 4)), rng.uniform(0, 1, 333)
    weight[::5] = 0
    mean, squares, _ = moments_of(X, weight, [])
    for j in range(4):
        alone = moments_of(X[:, j : j + 1], weight, [7, 40])
        assert (alone[0][0], alone[1][0]) == (mean[j], squares[j])


def test_a_constant_has_no_spread_at_all():
    mean, squares, _ = moments_of(np.full((1000, 1), 0.1), np.full(1000, 0.7), [3])
    assert (mean[0], squares[0]) == (0.1, 0.0)


def test_rows_without_weight_change_nothing():
    mean, squares, total = moments_of(np.array([[1.0], [5.0], [3.0]]), np.array([0.0, 1.0, 1.0]), [])
    assert (mean[0], squares[0], total) == (4.0, 2.0, 2.0)
    assert moments_of(np.ones((3, 1)), np.zeros(3), [])[2] == 0.0
