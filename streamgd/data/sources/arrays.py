"""Arrays in memory as features, targets and weights; what cannot be used is refused here, by name."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from streamgd.data.sources.base import Array, TargetInfo
from streamgd.data.sources.columns import Column, Features, Target, checked_names, number_dtype
from streamgd.data.sources.frames import FrameColumns, frame_features, is_pandas, series_values
from streamgd.data.sources.mapped import MappedArray, unmap
from streamgd.data.sources.neighbours import NeighbourArray
from streamgd.errors import SchemaError

#: Python strings up to this length are packed into a NumPy array, which compares faster; longer ones would waste it.
_PACKED_CHARACTERS = 64


def as_features(X: Any, names: Sequence[str] | None = None) -> Features:
    """Take `X` as features.

    Raises
    ------
    SchemaError
        If it is not a matrix of real numbers; every column that is not is named.
    """
    if is_pandas(X, "DataFrame"):
        X = FrameColumns(X, tuple(range(X.shape[1])))
    if isinstance(X, FrameColumns):
        return frame_features(X, names)
    array = _as_array(X, "X")
    if array.ndim < 2:
        raise SchemaError(
            f"X: Expected 2D array, got {array.ndim}D array of shape {array.shape} instead. Reshape your data with "
            "X.reshape(-1, 1) if it is one feature, or X.reshape(1, -1) if it is one row"
        )
    if array.ndim > 2:
        raise SchemaError(
            f"X: found array with {array.ndim} dimensions, shape {array.shape}; expected (n_rows, n_features). "
            "Flatten each row with X.reshape(len(X), -1)"
        )
    if array.shape[1] == 0:
        raise SchemaError(f"X: 0 feature(s) (shape={array.shape}) while a minimum of 1 is required.")
    stored = str(array.dtype)
    if array.dtype.kind == "O":
        array = _objects_to_float(array, "X")
    dtype = number_dtype(array.dtype, "X")
    name = "X"
    mapped = unmap(array)
    if mapped is not None:
        path = (mapped[0] if isinstance(mapped, list) else mapped).path
        name = f"X in {path}"
    if isinstance(mapped, list):
        columns = tuple(Column(part, dtype, stored) for part in mapped)
    else:
        columns = (Column(array if mapped is None else mapped, dtype, stored),)
    return Features(columns, not isinstance(mapped, list), checked_names(names, array.shape[1]), name)


def as_target(y: Any, name: str) -> Target:
    """Take `y` as a target: numbers, or anything that can hold classes.

    Raises
    ------
    SchemaError
        If it is neither a vector nor a matrix, or complex.
    """
    stored = None
    if is_pandas(y, "Series"):
        name, stored = (y.name if isinstance(y.name, str) else name), str(y.dtype)
        y = series_values(y)
    elif is_pandas(y, "DataFrame"):
        values = [series_values(y.iloc[:, j]) for j in range(y.shape[1])]
        if len(values) == 1:
            name, stored = str(y.columns[0]), str(y.dtypes.iloc[0])
        y = np.column_stack(values) if values else np.empty((len(y), 0))
    array = _as_array(y, f"target {name!r}")
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] == 0):
        raise SchemaError(
            f"target {name!r} has shape {array.shape}; expected (n_rows,), or (n_rows, n_outputs) for several outputs"
        )
    stored = stored or str(array.dtype)
    if array.dtype.kind == "O":
        array = _pack_objects(array)
    numeric = array.dtype.kind in "fiub"
    if array.dtype.kind in "cV":
        raise SchemaError(
            f"target {name!r} is {array.dtype}: Complex data not supported, nor records; "
            "expected real numbers, or labels of classes"
        )
    dtype = number_dtype(array.dtype, "y") if numeric else array.dtype
    mapped = unmap(array) if numeric else None
    data = mapped if isinstance(mapped, MappedArray) else array
    n_outputs = 1 if array.ndim == 1 else array.shape[1]
    return Target(Column(data, dtype, stored), TargetInfo(name, n_outputs, stored, numeric, array.ndim == 1))


def as_weight(weight: Any) -> Column:
    """Take `weight` as sample weights.

    Raises
    ------
    SchemaError
        If it is not a vector of numbers.
    """
    stored = str(weight.dtype) if is_pandas(weight, "Series") else None
    array = _as_array(series_values(weight) if stored else weight, "weight")
    if array.ndim != 1:
        raise SchemaError(f"weight has shape {array.shape}; expected one number a row, (n_rows,)")
    stored = stored or str(array.dtype)
    if array.dtype.kind == "O":
        array = _objects_to_float(array, "weight")
    mapped = unmap(array)
    data = mapped if isinstance(mapped, MappedArray) else array
    return Column(data, number_dtype(array.dtype, "weight"), stored)


def _as_array(values: Any, what: str) -> Array:
    """Convert to an array without copying one, nor reading one that lies in another process."""
    if isinstance(values, NeighbourArray):
        stands_for_one: Any = values
        return stands_for_one  # type: ignore[no-any-return]
    if hasattr(values, "toarray") and hasattr(values, "nnz"):
        raise SchemaError(
            f"{what} is a sparse matrix ({type(values).__name__}), which is not supported; "
            "convert it with .toarray() if it fits in memory"
        )
    require_unmasked(values, what)
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as err:
        raise SchemaError(f"{what} cannot be read as an array: {err}. Rows must all have the same length") from err


def _objects_to_float(array: Array, what: str) -> Array:
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError) as err:
        raise SchemaError(
            f"{what} holds Python objects that are not numbers: {err}. Make numbers of them first, or leave them out"
        ) from err


def _pack_objects(array: Array) -> Array:
    """Turn an array of Python objects into one of numbers or strings if that is what they are."""
    values = array.ravel().tolist()
    if values and all(isinstance(value, str) for value in values):
        return array.astype(str) if max(map(len, values)) <= _PACKED_CHARACTERS else array
    if values and all(isinstance(value, bool | np.bool_) for value in values):
        return array.astype(bool)
    if values and all(isinstance(value, numbers.Integral) for value in values):
        try:
            return array.astype(np.int64)
        except OverflowError:
            return array.astype(np.float64)
    if values and all(isinstance(value, numbers.Number) and not isinstance(value, complex) for value in values):
        return array.astype(np.float64)
    return array


def require_unmasked(values: Any, what: str) -> None:
    """Refuse values of which some are masked: what lies behind the mask would be taken for them."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise SchemaError(f"{what} has masked values; fill them first, e.g. with .filled(0.0)")
