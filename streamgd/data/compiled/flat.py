"""Windows filled from rows that lie in a file or in memory as they are, a window a call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.classes import find_classes
from streamgd.data.compiled.compiling import compiled
from streamgd.data.compiled.memory import DTYPE_BYTES, address_of, load, read_file
from streamgd.data.compiled.placing import place_columns, place_identities, place_rows
from streamgd.data.compiled.shuffle import draw_places

#: What each number of a strip is, see `streamgd.data.sources.flat.Strip`.
FD, OFFSET, ROW_BYTES, CODE, PART, COLUMN, N_COLUMNS = range(7)

#: What a strip holds.
FEATURES, TARGET, WEIGHT = range(3)

#: Where rows lie that are not in memory.
NOT_READY = -(2**63)

#: How `place_flat` ended.
PLACED, UNREADABLE, UNUSABLE = range(3)

#: Values that are not scaled go through arrays of this many.
_CONVERTED_ROWS = 512


@compiled
def _fetch(strip: NDArray[np.int64], first: int, n: int, scratch: int, ready: int) -> Any:
    """Return the address of `n` rows of a strip, read to `scratch` if they lie in a file; 0 if they cannot be read.

    `ready` is where the strip's first row would lie, if rows of a file have been read already, else `NOT_READY`.
    """
    if ready != NOT_READY:
        return ready + first * strip[ROW_BYTES]
    at, wanted = strip[OFFSET] + first * strip[ROW_BYTES], n * strip[ROW_BYTES]
    if strip[FD] < 0:
        return at
    if not read_file(strip[FD], scratch, wanted, at):
        return 0
    return scratch


@compiled
def _place_numbers(
    address: int,
    code: int,
    stride: int,
    classes: NDArray[np.float64],
    places: NDArray[np.int32],
    column: int,
    not_negative: bool,
    out: NDArray[np.float64],
) -> tuple[bool, bool]:
    """Write targets or weights, `stride` values apart, at their places; tell whether all are finite, and all known."""
    loaded, codes = np.empty(_CONVERTED_ROWS), np.empty(_CONVERTED_ROWS)
    finite, known = True, True
    for first in range(0, len(places), _CONVERTED_ROWS):
        n = min(_CONVERTED_ROWS, len(places) - first)
        load(address, code, first * stride, stride, n, loaded)
        values = loaded
        if len(classes):
            known &= find_classes(loaded[:n], classes, codes[:n]) < 0
            values = codes
        for i in range(n):
            value = values[i]
            out[places[first + i], column] = value
            finite &= value - value == 0 and not (not_negative and value < 0)
    return finite, known


@compiled
def _place_piece(
    strips: NDArray[np.int64],
    first: int,
    ready: NDArray[np.int64],
    scaling: tuple[NDArray[np.float64], NDArray[np.float64]],
    classes: NDArray[np.float64],
    places: NDArray[np.int32],
    window: tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64], NDArray[np.uint64]],
    columns: NDArray[np.int64],
    free: int,
    check: bool,
) -> int:
    """Read the rows of a file from `first` on, as many as there are places, and place all but their identities.

    `columns`, of shape (3, n_features), is memory for addresses, codes and strides; what is read goes to `free`.
    """
    X, y, weight = window[:3]
    n, n_features, whole = len(places), X.shape[1], False
    for s in range(len(strips)):
        strip = strips[s]
        address = _fetch(strip, first, n, free, ready[s])
        if address == 0:
            return UNREADABLE
        if address == free:
            free += (n * strip[ROW_BYTES] + 63) // 64 * 64
        size = DTYPE_BYTES[strip[CODE]]
        stride = strip[ROW_BYTES] // size
        if strip[PART] == FEATURES and strip[N_COLUMNS] == n_features:
            whole = True
            finite = place_rows(address, strip[CODE], stride, scaling[0], scaling[1], places, X)
            if check and not finite:
                return UNUSABLE
        elif strip[PART] == FEATURES:
            for j in range(strip[N_COLUMNS]):
                column = strip[COLUMN] + j
                columns[0, column], columns[1, column], columns[2, column] = address + j * size, strip[CODE], stride
        else:
            is_target = strip[PART] == TARGET
            known_as, out = (classes, y) if is_target else (classes[:0], weight)
            for j in range(strip[N_COLUMNS]):
                at, column = address + j * size, strip[COLUMN] + j
                finite, known = _place_numbers(at, strip[CODE], stride, known_as, places, column, not is_target, out)
                if not known or (check and not finite):
                    return UNUSABLE
    if not whole:
        finite = place_columns(columns[0], columns[1], columns[2], scaling[0], scaling[1], places, X)
        if check and not finite:
            return UNUSABLE
    return PLACED


@compiled
def place_flat(
    slices: NDArray[np.int64],
    strips: NDArray[np.int64],
    ready: NDArray[np.int64],
    scaling: tuple[NDArray[np.float64], NDArray[np.float64]],
    classes: NDArray[np.float64],
    key: NDArray[np.uint64],
    places: NDArray[np.int32],
    window: tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64], NDArray[np.uint64]],
    scratch: NDArray[np.uint8],
    check: bool,
) -> tuple[int, int]:
    """Read slices of rows that lie as they are, scale them and put them at their places.

    Parameters
    ----------
    slices : ndarray of shape (n_slices, 5), int64
        Block, first row in the block, rows, file, first row in the file.
    strips : ndarray of shape (n_files, n_strips, 7), int64
        Where the values lie.
    ready : ndarray of shape (n_slices, n_strips) or (0, 0), int64
        For slices of files that have been read already, where the strip's first row would lie if all of it lay in
        memory as the slice does; the lowest number for others.
    scaling : tuple of ndarrays of shape (n_features,), float64
        Shift and factor: each feature becomes ``(float64(value) - shift) * factor``.
    classes : ndarray of shape (n_classes,), float64
        Sorted classes, if targets become their index; empty for numbers.
    key : ndarray of shape (2,), uint64
        What places are drawn from, see `draw_places`; of shape (0,) if `places` says them.
    places : ndarray of shape (n_rows,), int32
        Row of the window for each row, slice after slice.
    window : tuple of ndarrays
        X, y, weight and ids of the window; y of shape (capacity, n_outputs) and weight of shape (capacity, 1), either
        with no columns.
    scratch : ndarray of uint8
        Memory that what is read passes through.
    check : bool
        Whether numbers that are not finite and negative weights are errors.

    Returns
    -------
    int, int
        `PLACED`, `UNREADABLE` or `UNUSABLE` (bad numbers, unknown classes), and the slice.
    """
    if len(key):
        draw_places(key, places)
    n_strips = strips.shape[1]
    columns = np.empty((3, window[0].shape[1]), np.int64)
    nowhere = np.full(n_strips, NOT_READY)
    memory = (address_of(scratch) + 63) // 64 * 64
    room = len(scratch) - 64 * (n_strips + 1)
    placed = 0
    for k in range(len(slices)):
        block, start, n_rows, file, file_row = slices[k]
        widest = 0
        for s in range(n_strips):
            widest += strips[file, s, ROW_BYTES] * (strips[file, s, FD] >= 0)
        most = n_rows if widest == 0 else max(1, room // widest)
        for first in range(0, n_rows, most):
            n = min(most, n_rows - first)
            here = places[placed : placed + n]
            known = ready[k] if len(ready) else nowhere
            status = _place_piece(
                strips[file], file_row + first, known, scaling, classes, here, window, columns, memory, check
            )
            if status != PLACED:
                return status, k
            place_identities(block, start + first, here, window[3])
            placed += n
    return PLACED, 0


@compiled
def load_numbers(
    strips: NDArray[np.int64],
    first: int,
    y: NDArray[np.float64],
    weight: NDArray[np.float64],
    scratch: NDArray[np.uint8],
) -> bool:
    """Read targets and weights of consecutive rows of a file, as float64.

    Parameters
    ----------
    strips : ndarray of shape (n_strips, 7), int64
        Where the values lie.
    first : int
        First row in the file.
    y, weight : ndarrays of shape (n_rows, n_outputs) and (n_rows, 1 or 0), float64
        Are filled.
    scratch : ndarray of uint8
        Memory that what is read passes through, a row of every strip at least.

    Returns
    -------
    bool
        Whether all could be read.
    """
    memory = address_of(scratch)
    loaded = np.empty(_CONVERTED_ROWS)
    for s in range(strips.shape[0]):
        strip = strips[s]
        if strip[PART] == FEATURES:
            continue
        out = y if strip[PART] == TARGET else weight
        size = DTYPE_BYTES[strip[CODE]]
        stride, most = strip[ROW_BYTES] // size, len(y)
        if strip[FD] >= 0:
            most = max(1, len(scratch) // strip[ROW_BYTES])
        for begin in range(0, len(y), most):
            n = min(most, len(y) - begin)
            address = _fetch(strip, first + begin, n, memory, NOT_READY)
            if address == 0:
                return False
            if stride == 1 and out.shape[1] == 1:
                load(address, strip[CODE], 0, 1, n, out.reshape(out.size)[begin : begin + n])
                continue
            for j in range(strip[N_COLUMNS]):
                column = strip[COLUMN] + j
                for at in range(0, n, _CONVERTED_ROWS):
                    m = min(_CONVERTED_ROWS, n - at)
                    load(address + j * size, strip[CODE], at * stride, stride, m, loaded)
                    for i in range(m):
                        out[begin + at + i, column] = loaded[i]
    return True
