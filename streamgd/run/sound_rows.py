"""What rows have to be: finite, and of weights that are not negative. What is not is named by its place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.rows import shown
from streamgd.data.sources.base import Source
from streamgd.errors import NonFiniteError

Floats = NDArray[np.float64]
_EMPTY: Floats = np.zeros(0)


def checked_weights(source: Source, first: int, weight: Any) -> Floats:
    """Return the weights of consecutive rows as numbers; of shape (0,) if there are none.

    Raises
    ------
    NonFiniteError
        If one is NaN, infinite or negative.
    """
    if weight is None:
        return _EMPTY
    weights = np.ascontiguousarray(weight, np.float64)
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise NonFiniteError(
            f"{source.locate_row(first + int(bad[0]))}: the weight is {shown(weights[bad[0]])}; weights must be finite "
            "and not negative"
        )
    return weights


def require_finite(source: Source, first: int, values: Floats, what: str | None) -> None:
    """Refuse values that are not finite.

    Parameters
    ----------
    source : Source
        What they are from.
    first : int
        The row of the source that `values` begin with.
    values : ndarray of shape (n_rows, n_columns)
        The values.
    what : str or None
        What they are; None for features, which are named by their columns.

    Raises
    ------
    NonFiniteError
        If one is NaN or infinite.
    """
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        named = what or f"feature {source.feature_label(int(column))}"
        raise NonFiniteError(
            f"{source.locate_row(first + int(row))}: {named} is {shown(values[row, column])}; expected a finite "
            "number. Drop or fill such rows before training"
        )
