"""What `fit` and `predict` are given, checked as scikit-learn checks it, as a source of rows.

Arrays are neither copied nor cast on the way, memmaps are not loaded: values that are not finite are found by whoever
reads the rows, with the row and the column in the message.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from sklearn.utils.validation import check_array, column_or_1d, validate_data

from streamgd.data.sources.arrays import require_unmasked
from streamgd.data.sources.base import Source
from streamgd.data.sources.frames import is_pandas
from streamgd.data.sources.memory import MemorySource
from streamgd.errors import DataError, OptionError, SchemaError

#: Values looked at in one go.
_PIECE = 1 << 16


def training_source(estimator: Any, X: Any, y: Any, sample_weight: Any, *, reset: bool, labels: bool) -> Source:
    """Turn what `fit` was given into a source with a target.

    Parameters
    ----------
    estimator : estimator
        Gets, or is held to, ``n_features_in_`` and ``feature_names_in_``.
    X, y, sample_weight : array-like, DataFrame, Dask collection, Source or None
        As in `fit`.
    reset : bool
        Whether the features are the estimator's from now on, or must be those it has.
    labels : bool
        Whether the target holds classes.

    Raises
    ------
    ValueError
        What scikit-learn raises for arrays that cannot be used.
    DataError
        For sources that cannot be used.
    """
    if isinstance(X, Source) or is_dask(X):
        source = _as_source(X, y, sample_weight)
        if source.target is None:
            raise DataError(f"{source.name}: no target was given. Name it when opening the source (target=…)")
        hold_features(estimator, source, reset=reset)
        return source
    _refuse_path(X)
    for what, values in (("X", X), ("y", y), ("sample_weight", sample_weight)):
        require_unmasked(values, what)
    if _is_plain_frame(X):
        # Read column by column: a NumPy array of a frame with several types would be a copy of all of it.
        validate_data(estimator, X, reset=reset, skip_check_array=True)
        y = _checked_target(estimator, y, labels=labels)
    else:
        X, y = validate_data(
            estimator,
            X,
            y,
            reset=reset,
            accept_sparse=False,
            dtype="numeric",
            ensure_all_finite=False,
            multi_output=not labels,
            y_numeric=not labels,
        )
    if labels:
        _require_labels(y)
    return MemorySource(X, y, weight=_checked_weight(sample_weight, len(X)))


def rows_source(estimator: Any, X: Any) -> Source | np.ndarray[Any, Any]:
    """Turn what `predict` was given into an array, or into a source where that would load or copy too much."""
    if isinstance(X, Source) or is_dask(X):
        source = _as_source(X, None, None)
        hold_features(estimator, source, reset=False)
        return source
    if _is_plain_frame(X):
        validate_data(estimator, X, reset=False, skip_check_array=True)
        return MemorySource(X)
    _refuse_path(X)
    require_unmasked(X, "X")
    array: np.ndarray[Any, Any] = validate_data(
        estimator, X, reset=False, accept_sparse=False, dtype="numeric", ensure_all_finite=False
    )
    return MemorySource(array) if is_mapped(array) else array


def _refuse_path(X: Any) -> None:
    """Refuse the name of a file, which has to be opened.

    Raises
    ------
    OptionError
        If it is one.
    """
    if isinstance(X, (str, os.PathLike)):
        raise OptionError(f"X={X!r} is a path: give what streamgd.open_source({str(X)!r}, target=…) returns")


def hold_features(estimator: Any, source: Source, *, reset: bool) -> None:
    """Note the features of a source on the estimator, or hold the source to those it has."""
    names = source.feature_names
    if reset:
        estimator.n_features_in_ = source.n_features
        if names is not None:
            estimator.feature_names_in_ = np.array(names, dtype=object)
        elif hasattr(estimator, "feature_names_in_"):
            del estimator.feature_names_in_
        return
    owner = type(estimator).__name__
    if source.n_features != estimator.n_features_in_:
        raise SchemaError(
            f"{source.name} has {source.n_features} features, but {owner} is expecting {estimator.n_features_in_} "
            "features as input. Choose them with features=[…] when opening the source"
        )
    expected = getattr(estimator, "feature_names_in_", None)
    if names is None or expected is None or list(names) == list(expected):
        return
    missing = [name for name in expected if name not in names]
    unseen = [name for name in names if name not in expected]
    difference = (
        f"it lacks {', '.join(map(repr, missing))} and has {', '.join(map(repr, unseen))} instead"
        if missing
        else "they are in another order"
    )
    raise SchemaError(
        f"the features of {source.name} are not those that {owner} was fitted with: {difference}. Choose them with "
        f"features=[…] when opening the source, in the order of feature_names_in_"
    )


def is_streamed(X: Any) -> bool:
    """Whether predictions for `X` come as an iterator."""
    return isinstance(X, Source) or is_dask(X)


def is_dask(value: Any) -> bool:
    """Whether it is a Dask collection; Dask is looked at only if the caller has imported it."""
    return "dask" in sys.modules and hasattr(value, "__dask_graph__")


def is_mapped(array: Any) -> bool:
    """Whether an array is a memmap, or a view of one."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


def _as_source(X: Any, y: Any, weight: Any) -> Source:
    if not isinstance(X, Source):
        from streamgd.data.sources import open_source

        return open_source(X, y, weight=weight)
    for name, value in (("y", y), ("sample_weight", weight)):
        if value is not None:
            raise OptionError(
                f"{name} was given beside a source, which brings its own: pass the source alone, opened with "
                f"{'target' if name == 'y' else 'weight'}=…"
            )
    return X


def _is_plain_frame(X: Any) -> bool:
    """Whether it is a pandas DataFrame that the source reads as it is; Python objects are scikit-learn's to convert."""
    return is_pandas(X, "DataFrame") and X.size > 0 and not any(dtype is np.dtype(object) for dtype in X.dtypes)


def _checked_target(estimator: Any, y: Any, *, labels: bool) -> Any:
    if y is None:
        raise DataError(f"This {type(estimator).__name__} estimator requires y to be passed, but the target y is None.")
    if labels:
        return column_or_1d(y, warn=True)
    found = check_array(y, ensure_2d=False, dtype=None, input_name="y", estimator=estimator)
    return found.astype(np.float64) if found.dtype.kind == "O" else found


def _checked_weight(weight: Any, n_rows: int) -> Any:
    if weight is None:
        return None
    if np.isscalar(weight):
        return np.full(n_rows, float(weight))  # type: ignore[arg-type]
    array = np.asarray(weight)
    if array.ndim != 1:
        raise SchemaError(f"Sample weights must be 1D array or scalar; got an array of shape {array.shape}")
    if len(array) != n_rows:
        raise SchemaError(f"sample_weight.shape == {array.shape}, expected ({n_rows},): one weight for each row of X")
    return array.astype(np.float64) if array.dtype.kind == "O" else array


def _require_labels(y: Any) -> None:
    """Refuse numbers with fractions, as scikit-learn does: they are values to predict, not names of classes."""
    if y.dtype.kind != "f":
        return
    for first in range(0, len(y), _PIECE):
        values = y[first : first + _PIECE]
        odd = np.flatnonzero(values != np.floor(values))
        if len(odd):
            raise DataError(
                f"Unknown label type: continuous. The target of row {first + int(odd[0]):,} is {values[odd[0]]}: a "
                "classifier takes whole numbers or names as classes; train SGDRegressor on numbers to predict"
            )
