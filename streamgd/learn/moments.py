"""Running weighted means and variances, the same whatever pieces the rows come in."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from streamgd.learn import kernels

Floats = NDArray[np.float64]


class Moments:
    """Means and sums of squared deviations of the columns of some rows.

    Parameters
    ----------
    n_columns : int
        Columns of every row.

    Notes
    -----
    Sixteen sums are kept, for rows in turn, and put together when they are asked for: so the next row need not wait
    for the one before.
    """

    def __init__(self, n_columns: int) -> None:
        from streamgd.learn.kernels.measures import MOMENT_PLACES

        self._mean, self._squares = np.zeros((2, MOMENT_PLACES, n_columns))
        self._total, self._n_rows = np.zeros(MOMENT_PLACES), np.zeros(1, np.int64)

    def add(self, X: Floats, weight: Floats) -> None:
        """Add rows.

        Parameters
        ----------
        X : ndarray of shape (n_rows, n_columns), float64
            The rows.
        weight : ndarray of shape (n_rows,) or (0,), float64
            Their weights; 1 if empty.
        """
        kernels.add_moments(X, weight, self._mean, self._squares, self._total, self._n_rows)

    def joined(self, later: Self) -> Self:
        """Return the sums of these rows and of others that come after them; no rows can be added to it."""
        if not (self.total and later.total):  # the gap to rows of no weight says nothing, and could overflow
            return later if self.total == 0 else self
        both = type(self)(self._mean.shape[1])
        (first, squares), (second, later_squares) = self.merged(), later.merged()
        both._mean, both._squares = np.stack([first, second]), np.stack([squares, later_squares])
        both._total = np.array([self.total, later.total])
        return both

    @property
    def total(self) -> float:
        """The weight of all rows."""
        return float(np.cumsum(self._total)[-1])

    @property
    def finite(self) -> bool:
        """Whether all sums are finite; not if any value of a row with some weight was not."""
        return bool(np.isfinite(self._mean).all() and np.isfinite(self._squares).all())

    def merged(self) -> tuple[Floats, Floats]:
        """Return the means and the sums of squared deviations from them, both of shape (n_columns,).

        References
        ----------
        Chan, Golub & LeVeque (1979), Updating formulae and a pairwise algorithm for computing sample variances:
        δ = μ₂ − μ₁, μ = μ₁ + δ W₂ / W, S = S₁ + S₂ + δ² W₁ W₂ / W.
        """
        mean, squares, total = self._mean[0].copy(), self._squares[0].copy(), float(self._total[0])
        for of_place, squares_of_place, weight in zip(
            self._mean[1:], self._squares[1:], self._total[1:].tolist(), strict=True
        ):
            if weight > 0:
                gap, both = of_place - mean, total + weight
                mean += gap * (weight / both)
                with np.errstate(over="ignore"):  # whoever asks sees what is not finite
                    squares += squares_of_place + gap**2 * (total * weight / both)
                total = both
        return mean, squares
