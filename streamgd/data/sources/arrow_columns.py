"""Where the columns of an Arrow batch lie, found in one call.

Asking pyarrow for one column after the other takes as long as decoding some thousand rows of them. Arrow's C data
interface [1]_ tells of all at once.

References
----------
.. [1] Apache Arrow, "The Arrow C data interface": ArrowArray; "The Arrow PyCapsule interface".
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streamgd.data.sources.base import FLAT_DTYPES, Array, Columns
from streamgd.data.sources.parquet_types import to_numbers

_address_of = ctypes.pythonapi.PyCapsule_GetPointer
_address_of.restype, _address_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class BatchLayout:
    """Which columns of a stream's batches are wanted, and how their values are stored.

    Parameters
    ----------
    schema : pyarrow.Schema
        Of every batch.
    names : sequence of str
        Names of the columns.

    Attributes
    ----------
    plain : bool
        Whether all of them are numbers of types that compiled code can read; no others can be found here.
    """

    def __init__(self, schema: pa.Schema, names: Sequence[str]) -> None:
        self.numbers = np.array([schema.get_field_index(name) for name in names], np.int64)
        types = [schema.field(int(number)).type for number in self.numbers]
        self.plain = all(
            (pa.types.is_floating(kind) or pa.types.is_integer(kind))
            and str(np.dtype(kind.to_pandas_dtype())) in FLAT_DTYPES
            for kind in types
        )
        if self.plain:
            dtypes = [np.dtype(kind.to_pandas_dtype()) for kind in types]
            self.names = tuple(dtype.name for dtype in dtypes)
            self.sizes = np.array([dtype.itemsize for dtype in dtypes], np.int64)
            self.strides = np.ones(len(types), np.int64)

    def find(self, batch: pa.RecordBatch) -> Columns | None:
        """Return the columns of a batch; None if there may be nulls among their values."""
        from streamgd.data.compiled.arrow import find_arrow_columns

        _, capsule = batch.__arrow_c_array__()
        addresses = np.empty(len(self.numbers), np.int64)
        if not find_arrow_columns(_address_of(capsule, b"arrow_array"), self.numbers, self.sizes, addresses):
            return None
        located = addresses, self.sizes, self.strides, self.names
        return Columns(_BatchArrays(batch, self.numbers), 0, batch.num_rows, located=located)


class _BatchArrays(Sequence[Array]):
    """The columns themselves, for whoever asks for one; keeps the batch."""

    def __init__(self, batch: pa.RecordBatch, numbers: NDArray[np.int64]) -> None:
        self._batch, self._numbers = batch, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Array]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return to_numbers(self._batch.column(int(self._numbers[index])))
