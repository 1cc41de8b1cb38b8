"""Where the columns of an Arrow batch lie."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled
from streamgd.data.compiled.memory import int64_at

#: Members of Arrow's C struct ArrowArray, by words of eight bytes.
_LENGTH, _NULL_COUNT, _OFFSET, _N_BUFFERS, _N_CHILDREN, _BUFFERS, _CHILDREN = range(7)


@compiled
def find_arrow_columns(
    batch: int, numbers: NDArray[np.int64], sizes: NDArray[np.int64], out: NDArray[np.int64]
) -> bool:
    """Write the addresses of columns of numbers of a batch; False if one may hold nulls, or is no such column.

    Parameters
    ----------
    batch : int
        Address of the batch as an ArrowArray; valid as long as its owner keeps it.
    numbers, sizes : ndarrays of shape (n_columns,), int64
        Which columns, and the bytes of a value of each.
    out : ndarray of shape (n_columns,), int64
        Address of each column's first value.
    """
    children, n_rows = int64_at(batch, _CHILDREN), int64_at(batch, _LENGTH)
    for i in range(len(numbers)):
        if numbers[i] < 0 or numbers[i] >= int64_at(batch, _N_CHILDREN):
            return False
        column = int64_at(children, numbers[i])
        if int64_at(column, _NULL_COUNT) != 0 or int64_at(column, _N_BUFFERS) != 2:
            return False
        first = int64_at(batch, _OFFSET) + int64_at(column, _OFFSET)
        values = int64_at(int64_at(column, _BUFFERS), 1)
        if values == 0 or int64_at(column, _LENGTH) < n_rows:
            return False
        out[i] = values + first * sizes[i]
    return True
