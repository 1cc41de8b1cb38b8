"""Dask DataFrames as Dask computes them: their partitions, some of their columns, and their values."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import dask
import numpy as np
from dask.highlevelgraph import HighLevelGraph

from streamgd.data.sources.frames import series_values
from streamgd.errors import DataError

#: Dask is annotated in parts only.
_dask: Any = dask

#: Held where a DataFrame's expression is looked into: the configuration belongs to all threads, and in Python 3.11
#: attributes that are computed once take locks, which threads that come to them in different orders wait for for good.
expressions = threading.RLock()


def settled(frame: Any) -> Any:
    """Return a DataFrame as Dask computes it, with its partitions as they are; `pick` takes columns in the same ones.

    Dask's own `optimize` joins the partitions of files of which few columns are read, so that each choice of columns
    has other blocks; and `dask.optimize` returns a DataFrame with the keys of what it was made of, whose values are
    other ones. Shuffles are by tasks, each of which may be computed at any time.
    """
    with expressions, _dask.config.set({"dataframe.shuffle.method": "tasks"}):
        found = frame.simplify().lower_completely().simplify()
        p2p = any(type(each).__name__.startswith("P2P") for each in found.expr.walk())
    if p2p:
        raise DataError(
            "the DataFrame is shuffled by 'p2p', which computes all partitions at once: persist() it first, or leave "
            "out shuffle_method"
        )
    return found


def pick(frame: Any, columns: Sequence[str]) -> Any:
    """Return some columns of a DataFrame that is settled, in the same partitions."""
    with expressions:
        found = settled(frame[columns])
        if found.npartitions == frame.npartitions:
            return found
        # Partitions of a certain size are others where columns are fewer: then all are computed.
        return settled(frame.map_partitions(_columns_of, columns, meta=frame._meta[columns]))


def _columns_of(part: Any, columns: Sequence[str]) -> Any:
    return part[columns]


def values_of(frame: Any) -> Any:
    """Return the values of a DataFrame or Series as an array of the same blocks, whose lengths are not known."""
    from dask.array import Array

    kind: Any = Array
    with expressions:
        frame = settled(frame)
        name, meta = f"values-{frame._name}", _values(frame._meta)
        more = (0,) * (meta.ndim - 1)
        tasks = {(name, i, *more): (_values, key) for i, key in enumerate(frame.__dask_keys__())}
        graph = HighLevelGraph({name: dict(frame.__dask_graph__()) | tasks}, {name: set()})
    return kind(graph, name, ((np.nan,) * len(tasks), *((n,) for n in meta.shape[1:])), meta=meta)


def _values(part: Any) -> Any:
    """Convert as columns of a DataFrame are."""
    if part.ndim == 1:
        return series_values(part)
    return np.column_stack([series_values(part.iloc[:, j]) for j in range(part.shape[1])])


def is_frame(collection: Any) -> bool:
    """Whether this is a Dask DataFrame or Series, and no array."""
    return hasattr(collection, "lower_completely") and not hasattr(collection, "chunks")
