"""Rows that lie in files or in memory as they are, at even distances: what may be read without a reader's help.

A source whose rows lie like that says where, as strips; `streamgd.data.flat` then reads, scales and places any number
of slices in one compiled call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.base import FLAT_DTYPES, Array

Part = Literal["features", "target", "weight"]


@dataclass(frozen=True)
class Strip:
    """Columns that lie side by side in every row.

    Attributes
    ----------
    part : {"features", "target", "weight"}
        What they are.
    path : str or None
        The file they lie in; None for memory.
    offset : int
        Where the first row begins: byte of the file, or address.
    row_bytes : int
        Bytes from one row to the next; in a file, all of them are the strip's.
    dtype : str
        One of `FLAT_DTYPES`.
    column, n_columns : int
        Which columns of the part.
    held : object
        What keeps the memory alive.
    """

    part: Part
    path: str | None
    offset: int
    row_bytes: int
    dtype: str
    column: int
    n_columns: int
    held: Any = None


@dataclass(frozen=True)
class FlatRows:
    """Where the rows of a source lie.

    Attributes
    ----------
    block_file : ndarray of shape (n_blocks,), int64
        The file (or array) that holds each block.
    block_start : ndarray of shape (n_blocks,), int64
        The block's first row in it.
    strips : callable
        Given a file's number, returns its strips, as many for every file; raises a `DataError` if the file is gone or
        has changed.
    origin : tuple of two ndarrays of shape (n_blocks,), int64, or None
        For each block, the block that its rows are identified by and their first row in it; None for itself and 0.
    check : callable or None
        Told the first row in its file and the number of rows of each slice that is about to be read; raises a
        `DataError` if they are damaged.
    """

    block_file: NDArray[np.int64]
    block_start: NDArray[np.int64]
    strips: Callable[[int], list[Strip]]
    origin: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    check: Callable[[NDArray[np.int64], NDArray[np.int64]], None] | None = None


def strips_of(array: Array, part: Part, column: int = 0) -> list[Strip] | None:
    """Describe an array in memory: one strip if its rows lie in one piece each, else one for every column.

    Parameters
    ----------
    array : ndarray of shape (n_rows,) or (n_rows, n_columns)
        Any strides.
    part : {"features", "target", "weight"}
        What it is.
    column : int, default=0
        Where its columns begin among those of the part.

    Returns
    -------
    list of Strip, or None
        None if values are of another type or not aligned.
    """
    size = array.dtype.itemsize
    usable = array.dtype.name in FLAT_DTYPES and array.dtype.isnative and array.flags.aligned
    if not usable or array.strides[0] % size:
        return None
    address, step = array.__array_interface__["data"][0], array.strides[0]
    matrix = array.reshape(-1, 1) if array.ndim == 1 else array
    width = matrix.shape[1]
    if width == 1 or matrix.strides[1] == size:
        return [Strip(part, None, address, step, array.dtype.name, column, width, array)]
    return [
        Strip(part, None, address + j * matrix.strides[1], step, array.dtype.name, column + j, 1, array)
        for j in range(width)
    ]
