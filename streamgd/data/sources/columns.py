"""Columns in memory: how rows are kept, and how slices of them are handed out.

Nothing is copied whole that can be converted a slice at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgd.data.sources.base import Array, TargetInfo
from streamgd.data.sources.flat import Part, Strip, strips_of
from streamgd.data.sources.mapped import MappedArray
from streamgd.data.sources.neighbours import NeighbourArray
from streamgd.errors import SchemaError


class Column:
    """One array of rows (a vector, or a whole matrix), converted as it is sliced.

    Parameters
    ----------
    data : ndarray, MappedArray, NeighbourArray or pandas.Series
        What is stored; a Series only for pandas' own types.
    dtype : numpy.dtype
        What slices come in.
    stored_dtype : str
        Name of the stored type.
    """

    def __init__(self, data: Any, dtype: np.dtype[Any], stored_dtype: str) -> None:
        self.data = data
        self.dtype = dtype
        self.stored_dtype = stored_dtype

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.data)

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows as slices have them."""
        n_values = len(self.data) * (self.data.shape[1] if self.data.ndim == 2 else 1)
        return int(n_values * self.dtype.itemsize)

    def read(self, first: int, stop: int) -> Array:
        """Return rows `first` to `stop`; a view where nothing must be converted."""
        if not isinstance(self.data, np.ndarray | MappedArray | NeighbourArray):
            part = self.data.iloc[first:stop]
            return np.asarray(part.to_numpy(self.dtype, na_value=np.nan) if part.hasnans else part.to_numpy(self.dtype))
        rows = self.data[first:stop]
        if rows.dtype != self.dtype:
            rows = rows.astype(self.dtype)
        return np.ascontiguousarray(rows) if rows.ndim == 1 else rows

    def strips(self, part: Part, column: int) -> list[Strip] | None:
        """Say where the values lie, as column `column` and those after it of a part; None if they are converted."""
        data = self.data
        if isinstance(data, MappedArray) and data.dtype == self.dtype:
            return data.strips(part, column)
        return strips_of(data, part, column) if isinstance(data, np.ndarray) and data.dtype == self.dtype else None

    def close(self) -> None:
        """Close the file behind the column, if there is one."""
        if isinstance(self.data, MappedArray):
            self.data.close()


@dataclass(frozen=True)
class Features:
    """The features: one matrix, or one column each."""

    columns: tuple[Column, ...]
    is_matrix: bool
    names: tuple[str, ...] | None
    name: str

    @property
    def n_rows(self) -> int:
        """Rows."""
        return len(self.columns[0])

    @property
    def n_columns(self) -> int:
        """Columns of X."""
        return int(self.columns[0].data.shape[1]) if self.is_matrix else len(self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of X."""
        return self.n_rows, self.n_columns

    @property
    def dtypes(self) -> list[np.dtype[Any]]:
        """Dtypes in which slices come, as often as they differ by column."""
        return [column.dtype for column in self.columns]

    @property
    def stored_dtypes(self) -> tuple[str, ...]:
        """Stored dtype of each feature."""
        stored = tuple(column.stored_dtype for column in self.columns)
        return stored * self.n_columns if self.is_matrix else stored

    def read(self, first: int, stop: int) -> Array | list[Array]:
        """Return rows `first` to `stop`."""
        if self.is_matrix:
            return self.columns[0].read(first, stop)
        return [column.read(first, stop) for column in self.columns]


@dataclass(frozen=True)
class Target:
    """The target and what is known of it."""

    column: Column
    info: TargetInfo

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.column)

    def read(self, first: int, stop: int) -> Array:
        """Return rows `first` to `stop`."""
        return self.column.read(first, stop)


def number_dtype(dtype: np.dtype[Any], what: str) -> np.dtype[Any]:
    """Pick the dtype in which numbers are handed out: native byte order, at most 64 bits."""
    if dtype.kind == "c":
        raise SchemaError(
            f"{what} is {dtype}: Complex data not supported. Use the real and imaginary parts as features"
        )
    if dtype.kind not in "fiub":
        raise SchemaError(
            f"{what} is {dtype}, expected real numbers or booleans. Make numbers of it first "
            "(.astype('float64') for numbers kept as text), or leave it out"
        )
    return np.dtype(np.float64) if dtype.itemsize > 8 else dtype.newbyteorder("=")


def checked_names(names: Sequence[str] | None, n_columns: int) -> tuple[str, ...] | None:
    """Check that there is a name for every feature, if there are names at all."""
    if names is not None and len(names) != n_columns:
        raise SchemaError(f"{len(names)} feature names for {n_columns} features; give one for each")
    return None if names is None else tuple(str(name) for name in names)
