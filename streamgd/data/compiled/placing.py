"""Rows to their places in a window, scaled if they are not yet, with targets, weights and identities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.checksums import identity
from streamgd.data.compiled.compiling import compiled
from streamgd.data.compiled.memory import DTYPE_BYTES, address_of, copy_bytes, load, prefetch
from streamgd.data.compiled.scaling import (
    scale_float32_columns,
    scale_float32_rows,
    scale_float64_columns,
    scale_float64_rows,
)

#: Rows of which columns are read at once: eight columns of them take 16 kB.
_TILE_ROWS = 256

#: Rows that are scaled and placed at once, eight columns after the other: they should stay in the first cache.
_SCALED_ROWS = 32

#: So many rows ahead of being written, so many bytes of a place are fetched; the processor foresees the rest.
_AHEAD, _AHEAD_BYTES = 8, 256


@compiled
def _place_narrow(
    addresses: NDArray[np.int64],
    codes: NDArray[np.int64],
    strides: NDArray[np.int64],
    shift: NDArray[np.float64],
    factor: NDArray[np.float64],
    places: NDArray[np.int32],
    out: NDArray[Any],
) -> bool:
    """Do what `place_columns` does, value by value: for fewer than eight columns."""
    n_columns = len(addresses)
    loaded = np.empty((n_columns, _TILE_ROWS))
    finite = True
    for first in range(0, len(places), _TILE_ROWS):
        n = min(_TILE_ROWS, len(places) - first)
        for j in range(n_columns):
            load(addresses[j], codes[j], first * strides[j], strides[j], n, loaded[j])
        for i in range(n):
            row = out[places[first + i]]
            for j in range(n_columns):
                value = out.dtype.type((loaded[j, i] - shift[j]) * factor[j])
                row[j] = value
                finite &= value - value == 0
    return finite


@compiled
def place_columns(
    addresses: NDArray[np.int64],
    codes: NDArray[np.int64],
    strides: NDArray[np.int64],
    shift: NDArray[np.float64],
    factor: NDArray[np.float64],
    places: NDArray[np.int32],
    out: NDArray[Any],
) -> bool:
    """Scale the columns of some rows and write each row at its place; return whether all is finite.

    Parameters
    ----------
    addresses, codes, strides : ndarrays of shape (n_features,), int64
        Where each column's first value lies, its `DTYPE_CODES`, and how many values lie from one row to the next.
    shift, factor : ndarrays of shape (n_features,), float64
        Each value becomes ``(float64(value) - shift) * factor``, rounded to the dtype of `out`.
    places : ndarray of shape (n_rows,), int32
        Row of `out` for each row.
    out : ndarray of shape (capacity, n_features), float32 or float64
        The window.
    """
    n_rows, n_features = len(places), len(addresses)
    if n_features < 8:
        return _place_narrow(addresses, codes, strides, shift, factor, places, out)
    size = out.itemsize
    target, step = address_of(out), out.shape[1] * size
    loaded = np.empty((8, _TILE_ROWS), np.float64)
    ours, nowhere = np.empty(8, np.int64), np.empty(n_features, out.dtype)
    rows = np.empty(_TILE_ROWS + 8, np.int64)
    odd = np.int64(0)
    for k in range(8):
        ours[k] = address_of(loaded[k])
    for first in range(0, n_rows, _TILE_ROWS):
        n = min(_TILE_ROWS, n_rows - first)
        for i in range(n):
            rows[i] = target + np.int64(places[first + i]) * step
        for i in range(n, n + 7):
            rows[i] = address_of(nowhere)  # the last rows are filled up to eight
        for k in range(0, n_features, 8):
            left = min(k, n_features - 8)  # the last eight columns overlap those before
            shifts, factors = address_of(shift) + 8 * left, address_of(factor) + 8 * left
            code = codes[left]
            direct = code < 2
            for j in range(left, left + 8):
                direct &= codes[j] == code and strides[j] == 1
            whole = n // 8 * 8 if direct else 0  # rows that are read where they lie
            at, row = address_of(addresses[left:]), address_of(rows)
            if whole and code == 0:
                odd |= scale_float32_columns(out, at, 4 * first, whole, shifts, factors, row, left * size)
            elif whole:
                odd |= scale_float64_columns(out, at, 8 * first, whole, shifts, factors, row, left * size)
            if whole == n:
                continue
            for j in range(8):
                column, stride = loaded[j], strides[left + j]
                load(addresses[left + j], codes[left + j], (first + whole) * stride, stride, n - whole, column)
                for i in range(n - whole, min(n - whole + 7, _TILE_ROWS)):
                    column[i] = column[n - whole - 1]
            rest = (n - whole + 7) // 8 * 8
            odd |= scale_float64_columns(
                out, address_of(ours), 0, rest, shifts, factors, address_of(rows[whole:]), left * size
            )
    return bool(odd == 0)


@compiled
def place_rows(
    address: int,
    code: int,
    stride: int,
    shift: NDArray[np.float64],
    factor: NDArray[np.float64],
    places: NDArray[np.int32],
    out: NDArray[Any],
) -> bool:
    """Do what `place_columns` does for rows whose values lie side by side, `stride` values from row to row."""
    n_rows, n_features, size = len(places), out.shape[1], DTYPE_BYTES[code]
    if n_features < 8:
        addresses = address + size * np.arange(n_features)
        codes, strides = np.full(n_features, code), np.full(n_features, stride)
        return _place_narrow(addresses, codes, strides, shift, factor, places, out)
    target, width = address_of(out), out.itemsize
    loaded = np.empty((_SCALED_ROWS, n_features if code > 1 else 0), np.float64)
    odd = np.int64(0)
    for first in range(0, n_rows, _SCALED_ROWS):
        n = min(_SCALED_ROWS, n_rows - first)
        begin, step = address + first * stride * size, stride * size
        if code > 1:
            for i in range(n):
                load(address, code, (first + i) * stride, 1, n_features, loaded[i])
            begin, step = address_of(loaded), 8 * n_features
        places_at = address_of(places[first:])
        for i in range(first + n, min(first + n + _SCALED_ROWS, n_rows)):  # places are random: of the rows after these
            ahead = target + np.int64(places[i]) * n_features * width
            for line in range(0, min(n_features * width, _AHEAD_BYTES), 64):
                prefetch(ahead + line)
        for k in range(0, n_features, 8):
            left = min(k, n_features - 8)  # the last eight columns overlap those before
            shifts, factors = address_of(shift) + 8 * left, address_of(factor) + 8 * left
            place = target + left * width
            if code == 0:
                odd |= scale_float32_rows(
                    out, begin + 4 * left, step, places_at, n, shifts, factors, place, n_features * width
                )
            else:
                odd |= scale_float64_rows(
                    out, begin + 8 * left, step, places_at, n, shifts, factors, place, n_features * width
                )
    return bool(odd == 0)


@compiled
def place_targets(y: NDArray[np.float64], places: NDArray[np.int32], out: NDArray[np.float64]) -> bool:
    """Write encoded targets, of shape (n_rows, n_outputs), at their places; return whether all are finite."""
    n_finite = 0
    for i in range(len(y)):
        for k in range(y.shape[1]):
            value = y[i, k]
            out[places[i], k] = value
            n_finite += (value - value) == 0
    return n_finite == y.size


@compiled
def place_weights(weight: NDArray[np.float64], places: NDArray[np.int32], out: NDArray[np.float64]) -> bool:
    """Write weights at their places; return whether all are finite and none is negative."""
    n_good = 0
    for i in range(len(weight)):
        value = weight[i]
        out[places[i]] = value
        n_good += value >= 0 and value - value == 0
    return n_good == len(weight)


@compiled
def place_identities(block: int, start: int, places: NDArray[np.int32], out: NDArray[np.uint64]) -> None:
    """Write the hashed identity of each row of a block, from row `start` on, at its place."""
    for i in range(len(places)):
        out[places[i]] = identity(np.uint64(block), np.uint64(start + i))


@compiled
def copy_rows(
    X: NDArray[Any],
    y: NDArray[np.float64],
    ids: NDArray[np.uint64],
    places: NDArray[np.int32],
    X_out: NDArray[Any],
    y_out: NDArray[np.float64],
    ids_out: NDArray[np.uint64],
) -> None:
    """Copy rows that are scaled already to their places."""
    source, target, step = address_of(X), address_of(X_out), X.shape[1] * X.itemsize
    for i in range(len(places)):
        if i + _AHEAD < len(places):  # places are random: their lines are fetched while the rows before are written
            ahead = target + np.int64(places[i + _AHEAD]) * step
            for line in range(0, min(step, _AHEAD_BYTES), 64):
                prefetch(ahead + line)
        copy_bytes(target + np.int64(places[i]) * step, source + i * step, step)
    for i in range(len(places)):
        place = places[i]
        ids_out[place] = ids[i]
        for k in range(y.shape[1]):
            y_out[place, k] = y[i, k]
