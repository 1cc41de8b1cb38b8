"""Rows to sums: each value times a factor, added up as predictions are, from columns or from rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled
from streamgd.data.compiled.memory import load

#: Rows of which a column is read at once, and columns of rows that lie as rows.
_TILE_ROWS, _TILE_COLUMNS = 256, 32

#: Rows that are turned into columns at once, as float64.
_SHORT_TILE_ROWS = 64


@compiled
def _turn(columns: NDArray[np.float64], n_rows: int, n_columns: int, tile: NDArray[np.float64]) -> None:
    """Turn columns into rows."""
    for i in range(n_rows):
        for k in range(n_columns):
            tile[i, k] = columns[k, i]


@compiled
def _add_columns(
    columns: NDArray[np.float64],
    left: int,
    n_columns: int,
    n: int,
    factors: NDArray[np.float64],
    sums: NDArray[np.float64],
) -> bool:
    """Add columns, each times its factors, to sums, one column after the other; return whether all are finite."""
    infinite = np.int32(0)
    for j in range(n_columns):
        column = columns[j]
        for i in range(n):
            infinite |= np.int32(0) if column[i] - column[i] == 0 else np.int32(1)
        for k in range(len(factors)):
            factor, total = factors[k, left + j], sums[k]
            for i in range(n):
                total[i] += column[i] * factor
    return bool(infinite == 0)


@compiled
def combine_columns(
    addresses: NDArray[np.int64],
    codes: NDArray[np.int64],
    strides: NDArray[np.int64],
    factors: NDArray[np.float64],
    start: NDArray[np.float64],
    out: NDArray[np.float64],
) -> bool:
    """Add up columns as they are stored, each times a factor, in the order of the columns; tell whether all are finite.

    Parameters
    ----------
    addresses, codes, strides : ndarrays of shape (n_columns,), int64
        As for `place_columns`.
    factors : ndarray of shape (n_outputs, n_columns), float64
        What each value is multiplied with, as float64.
    start : ndarray of shape (n_outputs,), float64
        Is added last.
    out : ndarray of shape (n_rows, n_outputs), float64
        The sums.
    """
    n_rows, n_outputs = out.shape
    column = np.empty((1, _TILE_ROWS))
    sums = np.empty((n_outputs, _TILE_ROWS))
    finite = True
    for first in range(0, n_rows, _TILE_ROWS):
        n = min(_TILE_ROWS, n_rows - first)
        sums[:, :n] = 0.0
        for j in range(len(addresses)):
            load(addresses[j], codes[j], first * strides[j], strides[j], n, column[0])
            finite &= _add_columns(column, j, 1, n, factors, sums)
        for k in range(n_outputs):
            for i in range(n):
                out[first + i, k] = sums[k, i] + start[k]
    return finite


@compiled
def combine_eights(
    X: NDArray[Any], factors: NDArray[np.float64], start: NDArray[np.float64], out: NDArray[np.float64]
) -> int:
    """Do what `combine_rows` does, faster for few outputs: eight rows side by side, so that no sum waits for itself.

    Parameters
    ----------
    X : ndarray of shape (n_rows, n_features), float32 or float64
        Rows.
    factors, start, out : ndarrays
        As for `combine_columns`.

    Returns
    -------
    int
        Rows that are done: up to seven at the end are not, nor those from the first sum on that is not finite.
    """
    n_outputs, n_features = factors.shape
    whole = len(X) // 8 * 8
    for first in range(0, whole, 8):
        rows = X[first : first + 8]
        for k in range(n_outputs):
            a = b = c = d = e = f = g = h = 0.0
            for j in range(n_features):
                factor = factors[k, j]
                a += rows[0, j] * factor
                b += rows[1, j] * factor
                c += rows[2, j] * factor
                d += rows[3, j] * factor
                e += rows[4, j] * factor
                f += rows[5, j] * factor
                g += rows[6, j] * factor
                h += rows[7, j] * factor
            # A value that is not finite makes its sum so, even times zero.
            if not (a - a == 0 and b - b == 0 and c - c == 0 and d - d == 0):
                return first
            if not (e - e == 0 and f - f == 0 and g - g == 0 and h - h == 0):
                return first
            s = start[k]
            at = out[first : first + 8]
            at[0, k], at[1, k], at[2, k], at[3, k] = a + s, b + s, c + s, d + s
            at[4, k], at[5, k], at[6, k], at[7, k] = e + s, f + s, g + s, h + s
    return whole


@compiled
def combine_rows(
    address: int,
    code: int,
    stride: int,
    factors: NDArray[np.float64],
    start: NDArray[np.float64],
    out: NDArray[np.float64],
) -> bool:
    """Do what `combine_columns` does for rows whose values lie side by side, `stride` values from row to row."""
    n_rows, n_outputs = out.shape
    n_features = factors.shape[1]
    width = min(n_features, _TILE_COLUMNS)
    rows, columns = np.empty((_SHORT_TILE_ROWS, width)), np.empty((width, _SHORT_TILE_ROWS))
    sums = np.empty((n_outputs, _SHORT_TILE_ROWS))
    finite = True
    for first in range(0, n_rows, _SHORT_TILE_ROWS):
        n = min(_SHORT_TILE_ROWS, n_rows - first)
        sums[:, :n] = 0.0
        for left in range(0, n_features, width):
            n_columns = min(width, n_features - left)
            for i in range(n):
                load(address, code, (first + i) * stride + left, 1, n_columns, rows[i])
            _turn(rows, n_columns, n, columns)
            finite &= _add_columns(columns, left, n_columns, n, factors, sums)
        for k in range(n_outputs):
            for i in range(n):
                out[first + i, k] = sums[k, i] + start[k]
    return finite
