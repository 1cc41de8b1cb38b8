"""The Dask collections behind a source: features, target and weight, cut into the same blocks of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from dask.base import is_dask_collection

from streamgd.data.sources.dask_blocks import measure_lengths
from streamgd.data.sources.dask_frames import expressions, is_frame, pick, settled, values_of
from streamgd.data.sources.frames import pick_columns
from streamgd.errors import DataError, SchemaError


@dataclass(frozen=True)
class Parts:
    """The collections that are computed together, and what lies where in them.

    Attributes
    ----------
    rows : dask.array.Array, dask.dataframe.DataFrame or None
        Features; of a DataFrame also the target and weight that are columns of it.
    features : list of str or None
        Feature columns of a DataFrame; None for an array.
    target, weight : str, list of str, dask collection or None
        Columns of the DataFrame, or collections of their own.
    """

    rows: Any
    features: list[str] | None
    target: Any
    weight: Any

    def collections(self) -> list[Any]:
        """List what is computed for a block."""
        return [part for part in (self.rows, self.target, self.weight) if is_dask_collection(part)]

    def targets(self) -> Parts:
        """Leave out the features."""
        columns = [*listed(self.target), *listed(self.weight)]
        rows = pick(self.rows, columns) if columns else None
        return Parts(rows, None if self.features is None else [], self.target, self.weight)

    def elsewhere(self) -> Parts:
        """Put something that can only be recognized in the place of each collection, so that `split` works without."""
        placeholders = [_Elsewhere() if is_dask_collection(p) else p for p in (self.rows, self.target, self.weight)]
        return Parts(placeholders[0], self.features, placeholders[1], placeholders[2])

    def split(self, computed: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Sort what was computed into features, target and weight."""
        rest = list(computed)
        X = None if self.rows is None else rest.pop(0)
        y = rest.pop(0) if is_dask_collection(self.target) else None
        weight = rest.pop(0) if is_dask_collection(self.weight) else None
        if self.features is None or X is None:
            return X, y, weight
        names = [None if is_dask_collection(part) else part for part in (self.target, self.weight)]
        columns, y_column, weight_column = pick_columns(X, names[0], self.features, names[1])
        return (
            columns if self.features else None,
            y if names[0] is None else y_column,
            weight if names[1] is None else weight_column,
        )

    def sample(self) -> tuple[Any, Any, Any]:
        """Make features, target and weight of the right types, without rows or without meaning."""
        with expressions:
            parts = [
                np.empty((0, *part.shape[1:]), part.dtype) if hasattr(part, "chunks") else part._meta_nonempty
                for part in self.collections()
            ]
        return self.split(parts)


class _Elsewhere:
    """Stands for a Dask collection that is not in this process."""

    def __dask_graph__(self) -> dict[str, Any]:
        return {}


def array_parts(X: Any, y: Any, weight: Any, target_name: str) -> Parts:
    """Bring arrays to the same blocks of rows, of known lengths.

    Raises
    ------
    SchemaError
        If X is no matrix of NumPy blocks, or the numbers of rows differ.
    DataError
        If lengths are unknown and cannot be measured.
    """
    if X.ndim != 2:
        advice = "X[:, None] if it is one feature" if X.ndim == 1 else "X.reshape((len(X), -1))"
        raise SchemaError(f"X: Expected 2D array, got {X.ndim}D Dask array of shape {X.shape} instead. Use {advice}")
    if np.isnan(X.shape[1]):
        raise SchemaError("X: the number of columns of the Dask array is unknown; call X.compute_chunk_sizes() first")
    if not isinstance(X._meta, np.ndarray):
        raise SchemaError(
            f"X is a Dask array of {type(X._meta).__name__}, expected NumPy blocks; convert them, for example with "
            "X.map_blocks(lambda block: block.toarray()) if they are sparse"
        )
    X = _with_known_rows(X, "X")
    rows = X.chunks[0]
    if X.numblocks[1] > 1:
        X = X.rechunk({1: -1})
    return Parts(X, None, _aligned(y, rows, target_name), _aligned(weight, rows, "weight"))


def frame_parts(frame: Any, target: Any, features: Sequence[str] | None, weight: Any) -> tuple[Parts, tuple[int, ...]]:
    """Pick columns of a DataFrame, and bring what is no column of it to its blocks; return the blocks' lengths too.

    Raises
    ------
    SourceNotFoundError
        If a column is not there.
    SchemaError
        If a name occurs twice, or the numbers of rows differ.
    DataError
        If lengths cannot be measured.
    """
    names = [part if _is_names(part) else None for part in (target, weight)]
    with expressions:
        sample = frame._meta_nonempty
        columns, _, _ = pick_columns(sample, names[0], features, names[1])
        chosen = [sample.columns[j] for j in columns.positions]
        frame = settled(frame[[*chosen, *listed(names[0]), *listed(names[1])]])
        first = pick(frame, [frame.columns[0]])
    rows = tuple(_measured(first, "the DataFrame"))
    y = names[0] if names[0] is not None else _aligned(target, rows, "y")
    w = names[1] if names[1] is not None else _aligned(weight, rows, "weight")
    return Parts(frame, chosen, y, w), rows


def listed(columns: Any) -> list[str]:
    """List columns that are given by name."""
    if columns is None or is_dask_collection(columns):
        return []
    return [columns] if isinstance(columns, str) else list(columns)


def _is_names(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, list | tuple) and all(isinstance(name, str) for name in part))


def _measured(collection: Any, what: str) -> list[int]:
    try:
        return measure_lengths(collection, what)
    except Exception as err:
        raise DataError(
            f"the blocks of {what} cannot be computed to measure their lengths: {type(err).__name__}: {err}. See the "
            "error above"
        ) from err


def _with_known_rows(array: Any, what: str) -> Any:
    """Return the array with the lengths of its blocks known; the caller's own array is left as it is."""
    if not np.isnan(array.shape[0]):
        return array
    from dask.array import Array

    rows, kind = tuple(_measured(array, what)), Array  # type: Any, Any
    return kind(array.dask, array.name, (rows, *array.chunks[1:]), dtype=array.dtype, meta=array._meta)


def _aligned(part: Any, rows: Sequence[int], what: str) -> Any:
    """Cut a target or weights like the features."""
    if part is None:
        return None
    if not is_dask_collection(part):
        from dask import array as da

        from_array: Any = da.from_array
        values = np.asarray(part)
        if values.ndim == 0:
            raise SchemaError(
                f"{what} is the single value {values!s}; expected one for each row"
                + ("" if what == "weight" else ", or the name of a column, a string")
            )
        part = from_array(values)
    elif is_frame(part):
        part = values_of(part)
    part = _with_known_rows(part, what)
    if part.shape[0] != sum(rows):
        raise SchemaError(
            f"X has {sum(rows):,} rows, but {what} has {part.shape[0]:,}: inconsistent numbers of samples. "
            "Every row needs its own"
        )
    return part.rechunk(dict.fromkeys(range(1, part.ndim), -1) | {0: tuple(rows)})
