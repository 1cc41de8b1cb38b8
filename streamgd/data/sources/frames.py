"""pandas objects as features, targets and weights, without copying what can be viewed.

pandas is looked at only if the caller has imported it: an object of its own cannot exist otherwise.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgd.data.sources.base import Array, choose_row_dtype
from streamgd.data.sources.columns import Column, Features, checked_names, number_dtype
from streamgd.errors import OptionError, SchemaError, SourceNotFoundError


@dataclass(frozen=True)
class FrameColumns:
    """Some columns of a DataFrame, without copying them out (as ``frame[names]`` would)."""

    frame: Any
    positions: tuple[int, ...]


def pick_columns(
    frame: Any, target: str | Sequence[str] | None, features: Sequence[str] | None, weight: str | None
) -> tuple[FrameColumns, Any, Any]:
    """Split a DataFrame by column names into features, target (Series, DataFrame or None) and weight (Series or None).

    Raises
    ------
    SourceNotFoundError
        If a column is not there.
    SchemaError
        If a name occurs twice.
    OptionError
        If a column is used twice.
    """
    at = {label: position for position, label in enumerate(frame.columns)}
    outputs = [] if target is None else [target] if isinstance(target, str) else list(target)
    apart = outputs + ([] if weight is None else [weight])
    wanted = [label for label in frame.columns if label not in apart] if features is None else list(features)
    missing = [label for label in dict.fromkeys([*wanted, *apart]) if label not in at]
    if missing:
        raise SourceNotFoundError(
            f"the DataFrame has no column {', '.join(map(repr, missing))}; its columns are {_shown(list(at))}"
        )
    n_named, n_used = Counter(frame.columns), Counter([*dict.fromkeys(wanted), *apart])
    twice = [repr(label) for label in n_used if n_named[label] > 1]
    if twice:
        raise SchemaError(f"column name {', '.join(twice)} occurs more than once in the DataFrame; rename one of each")
    reused = [repr(label) for label, n in n_used.items() if n > 1]
    if reused:
        raise OptionError(
            f"column {', '.join(reused)} would be used twice; name it in one place only: features, target or weight"
        )
    X = FrameColumns(frame, tuple(at[label] for label in wanted))
    y = None if target is None else frame[target] if isinstance(target, str) else frame[outputs]
    return X, y, None if weight is None else frame[weight]


def frame_features(picked: FrameColumns, names: Sequence[str] | None) -> Features:
    """Take columns of a DataFrame as features.

    Raises
    ------
    SchemaError
        If some are not numbers; names all of them.
    """
    frame = picked.frame
    labels = [frame.columns[j] for j in picked.positions]
    dtypes = [frame.dtypes.iloc[j] for j in picked.positions]
    if not labels:
        raise SchemaError(f"X: 0 feature(s) (shape={(len(frame), 0)}) while a minimum of 1 is required.")
    bad = [f"{label!r} ({dtype})" for label, dtype in zip(labels, dtypes, strict=True) if not _is_number(dtype)]
    if bad:
        raise SchemaError(
            f"features must be real numbers or booleans, but {len(bad)} of {len(labels)} columns are not: "
            f"{', '.join(bad)}. Leave them out (features=[...], or frame.drop(columns=[...])), or make numbers of them "
            "first: pandas.get_dummies for categories and text, .astype('float64') for numbers kept as objects, "
            "a difference in seconds for dates"
        )
    columns = tuple(_series_column(frame.iloc[:, j]) for j in picked.positions)
    matrix = _lying_evenly(columns)
    if names is None and all(isinstance(label, str) for label in labels):
        names = labels
    found = columns if matrix is None else (Column(matrix, columns[0].dtype, columns[0].stored_dtype),)
    return Features(found, matrix is not None, checked_names(names, len(labels)), "DataFrame")


def _lying_evenly(columns: Sequence[Column]) -> Array | None:
    """View columns as one matrix if they lie at equal distances in one array, as pandas keeps columns of one type.

    A matrix is sliced once, columns one by one; ``frame.to_numpy()`` would copy where only some columns are wanted.
    """
    arrays = [column.data for column in columns]
    first = arrays[0]
    if len(arrays) < 2 or not all(
        isinstance(array, np.ndarray) and (array.dtype, array.strides) == (first.dtype, first.strides)
        for array in arrays
    ):
        return None
    addresses = [array.ctypes.data for array in arrays]
    step = addresses[1] - addresses[0]
    even = all(b - a == step for a, b in itertools.pairwise(addresses))
    if step == 0 or not even or len({id(_owner(array)) for array in arrays}) > 1:
        return None
    shape, strides = (len(first), len(arrays)), (first.strides[0], step)
    return np.lib.stride_tricks.as_strided(first, shape, strides, writeable=False)


def _owner(array: Array) -> Any:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def is_pandas(value: Any, kind: str) -> bool:
    """Tell whether `value` is a pandas ``DataFrame`` or ``Series``, whichever `kind` says."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, getattr(pandas, kind, ()))


def _is_number(dtype: Any) -> bool:
    """Tell whether a pandas column of this type holds real numbers or booleans."""
    types = sys.modules["pandas"].api.types
    if types.is_complex_dtype(dtype) or getattr(dtype, "name", "") == "category":
        return False
    return bool(types.is_numeric_dtype(dtype) or types.is_bool_dtype(dtype))


def _series_column(series: Any) -> Column:
    """Keep a pandas column as it is; NumPy's types as an array, pandas' own to be converted as they are read."""
    stored = str(series.dtype)
    if isinstance(series.dtype, np.dtype):
        return Column(series.to_numpy(), number_dtype(series.dtype, "X"), stored)
    return Column(series, _nullable_dtype(series), stored)


def _nullable_dtype(series: Any) -> np.dtype[Any]:
    """Pick the NumPy dtype of a numeric column of pandas' own types; floating where a value is missing."""
    inner = getattr(series.dtype, "numpy_dtype", None) or getattr(series.dtype, "subtype", None)
    dtype = np.dtype(inner) if inner is not None else np.dtype(object)
    if dtype.kind not in "fiub":  # decimals
        return np.dtype(np.float64)
    return choose_row_dtype([dtype], "auto") if series.hasnans and dtype.kind != "f" else dtype


def series_values(series: Any) -> Array:
    """Convert a pandas column to an array: missing numbers to NaN, everything else as it is."""
    if not isinstance(series.dtype, np.dtype) and _is_number(series.dtype):
        return Column(series, _nullable_dtype(series), "").read(0, len(series))
    return np.asarray(series.to_numpy())


def _shown(labels: Sequence[Any], limit: int = 20) -> str:
    """List labels for a message, cut short if they are many."""
    shown = ", ".join(map(repr, labels[:limit]))
    return shown if len(labels) <= limit else f"{shown}, … ({len(labels)} in all)"
