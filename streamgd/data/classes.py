"""The classes of a target: finding them, comparing them and storing them, whatever their type.

A target column can hold numbers, booleans, text, dates or decimals, as NumPy or Arrow arrays. `factorize` and
`ClassCounter` treat all alike; `streamgd.data.targets` turns classes into numbers.
"""

from __future__ import annotations

import base64
import datetime
import decimal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.errors import DataError, SchemaError

Array = NDArray[Any]
Floats = NDArray[np.float64]

#: More classes than this in one target are taken for a mistake.
MAX_CLASSES = 100_000
#: Whole numbers below this are exact as float64.
EXACT = 2.0**53


class ClassCounter:
    """Gathers the classes of a target, with their counts, from pieces of the column.

    Parameters
    ----------
    max_classes : int, default=MAX_CLASSES
        More than these are an error: such a target is no class.

    Attributes
    ----------
    classes : ndarray of shape (n_classes,)
        Sorted. Numbers, booleans, dates and fixed-width text keep their dtype; other text is an array of objects.
    counts : ndarray of shape (n_classes,), int64
        Rows of each class.
    weight_sums : ndarray of shape (n_classes,), float64
        Weights of each class; rows without one count 1.
    """

    def __init__(self, max_classes: int = MAX_CLASSES) -> None:
        self._max_classes = max_classes
        self._numbers: Floats = np.empty(0)  # what the fast path knows: numbers exact as float64
        self._number_counts: NDArray[np.int64] = np.empty(0, np.int64)
        self._number_weights: Floats = np.empty(0)
        self._others: dict[Any, list[float]] = {}  # everything else: rows and weight of each
        self._dtypes: set[np.dtype[Any]] = set()

    def add(self, y: Any, weight: Array | None = None) -> int | None:
        """Count the targets of one piece.

        Parameters
        ----------
        y : ndarray of shape (n_rows,) or (n_rows, 1), or pyarrow.Array
            As stored.
        weight : ndarray of shape (n_rows,) or None, default=None
            Weights.

        Returns
        -------
        int or None
            The first row whose target is missing (null, NaN, infinite), which counts for no class; None if none is.

        Raises
        ------
        DataError
            If there are too many classes.
        SchemaError
            If the target has several columns, or types that cannot be classes.
        """
        y = as_vector(y)
        if len(y) == 0:
            return None
        if isinstance(y, np.ndarray) and y.dtype.kind != "O":
            self._dtypes.add(y.dtype)
        numbers = is_number(y) and not (y.dtype.kind in "iu" and y.dtype.itemsize == 8 and _beyond_exact(y))
        inverse = self._add_numbers(y, weight) if numbers else self._add_others(y, weight)
        self._require_few()
        missing = np.flatnonzero(inverse < 0)
        return int(missing[0]) if len(missing) else None

    def join(self, other: ClassCounter) -> None:
        """Count what another one has counted, of rows that come after these.

        Raises
        ------
        DataError
            If there are too many classes.
        """
        self._dtypes |= other._dtypes
        fresh = other._numbers[~np.isin(other._numbers, self._numbers)]
        self._know(fresh)
        at = np.searchsorted(self._numbers, other._numbers)
        self._number_counts[at] += other._number_counts
        self._number_weights[at] += other._number_weights
        for value, (count, total) in other._others.items():
            entry = self._others.setdefault(value, [0, 0.0])
            entry[0], entry[1] = entry[0] + count, entry[1] + total
        self._require_few()

    def _require_few(self) -> None:
        n_classes = len(self._numbers) + len(self._others)
        if n_classes > self._max_classes:
            raise DataError(
                f"the target has more than {self._max_classes:,} classes: it looks like a number to predict. Train a "
                "regressor, or choose the column that holds the classes"
            )

    def _know(self, fresh: Floats) -> None:
        """Make room for numbers that were not seen before."""
        known = np.concatenate([self._numbers, fresh])
        order = np.argsort(known, kind="stable")
        self._numbers = known[order]
        self._number_counts = np.concatenate([self._number_counts, np.zeros(len(fresh), np.int64)])[order]
        self._number_weights = np.concatenate([self._number_weights, np.zeros(len(fresh))])[order]

    def _add_numbers(self, y: Array, weight: Array | None) -> NDArray[np.intp]:
        codes, unknown = find_numbers(y, self._numbers)
        if unknown >= 0:
            self._know(np.unique(y[codes[:, 0] < 0].astype(np.float64)))
            codes, _ = find_numbers(y, self._numbers)
        inverse = np.where(np.isnan(codes[:, 0]), -1, codes[:, 0]).astype(np.intp)
        n = len(self._numbers)
        counts, self._number_weights = _count(inverse, weight, n, self._number_weights)
        self._number_counts += counts
        return inverse

    def _add_others(self, y: Any, weight: Array | None) -> NDArray[np.intp]:
        inverse, values = factorize(y)
        entries = [self._others.setdefault(value, [0, 0.0]) for value in values]
        before = np.array([entry[1] for entry in entries], np.float64)
        counts, sums = _count(inverse, weight, len(values), before)
        for entry, count, total in zip(entries, counts.tolist(), sums.tolist(), strict=True):
            entry[0] += count
            entry[1] = total
        return inverse

    @property
    def classes(self) -> Array:
        """The sorted classes."""
        return self._sorted()[0]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each class."""
        return self._sorted()[1]

    @property
    def weight_sums(self) -> Floats:
        """Weights of each class."""
        return self._sorted()[2]

    def _sorted(self) -> tuple[Array, NDArray[np.int64], Floats]:
        entries = {value: list(entry) for value, entry in self._others.items()}
        numbers = self._numbers.astype(np.result_type(*self._dtypes)) if len(self._numbers) and self._dtypes else ()
        for value, count, total in zip(
            np.asarray(numbers).tolist(), self._number_counts.tolist(), self._number_weights.tolist(), strict=True
        ):
            entry = entries.setdefault(value, [0, 0.0])
            entry[0], entry[1] = entry[0] + count, entry[1] + total
        try:
            values = sorted(entries)
        except TypeError as err:
            kinds = sorted({type(value).__name__ for value in entries})
            raise SchemaError(
                f"the target mixes {' and '.join(kinds)}, which have no order: convert it to one type"
            ) from err
        counts = np.array([entries[value][0] for value in values], np.int64)
        return _as_classes(values, self._dtypes), counts, np.array([entries[value][1] for value in values], np.float64)


def factorize(y: Any) -> tuple[NDArray[np.intp], list[Any]]:
    """Find the distinct values of a vector of any type.

    Parameters
    ----------
    y : ndarray of shape (n_rows,) or pyarrow.Array
        Anything that can be compared.

    Returns
    -------
    inverse : ndarray of shape (n_rows,), intp
        Index among the values, -1 where the value is missing.
    values : list
        Hashable values, each once.
    """
    if is_arrow(y):
        return _factorize_arrow(y)
    if y.dtype.kind in "UO":
        import pyarrow as pa

        try:
            # Arrow takes NumPy's text to end at its first NUL, Python's not.
            return _factorize_arrow(pa.array(y.tolist() if y.dtype.kind == "U" else y, from_pandas=True))
        except (pa.ArrowException, UnicodeEncodeError):
            return _factorize_objects(y.tolist())
    values, inverse = np.unique(y, return_inverse=True)
    if y.dtype.kind == "f":
        missing = ~np.isfinite(values)
    else:
        missing = np.isnat(values) if y.dtype.kind in "mM" else np.zeros(len(values), bool)
    kept = np.flatnonzero(~missing)
    index = np.full(len(values), -1, np.intp)
    index[kept] = np.arange(len(kept))
    return index[inverse.reshape(-1)], keys_of(values[kept])


def _factorize_arrow(y: Any) -> tuple[NDArray[np.intp], list[Any]]:
    import pyarrow as pa

    if pa.types.is_temporal(y.type) and not pa.types.is_time(y.type):
        return factorize(y.to_numpy(zero_copy_only=False))
    if pa.types.is_boolean(y.type) or not (pa.types.is_primitive(y.type) or _is_plain_arrow(y.type)):
        return _factorize_objects(y.to_pylist())
    encoded = y.dictionary_encode()
    inverse = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.intp)
    values = encoded.dictionary.to_pylist()
    if pa.types.is_floating(y.type):
        missing = np.flatnonzero(~np.isfinite(np.asarray(values, np.float64)))
        if len(missing):
            return _factorize_objects(y.to_pylist())
    return inverse, values


def _factorize_objects(values: Sequence[Any]) -> tuple[NDArray[np.intp], list[Any]]:
    """Find distinct Python objects, where nothing faster knows them."""
    found: dict[Any, int] = {}
    inverse = np.empty(len(values), np.intp)
    for i, value in enumerate(values):
        if _is_missing(value):
            inverse[i] = -1
        else:
            try:
                inverse[i] = found.setdefault(value, len(found))
            except TypeError as err:
                raise SchemaError(f"target {value!r} of type {type(value).__name__} cannot be a class") from err
    return inverse, list(found)


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and not np.isfinite(value)


def as_vector(y: Any) -> Any:
    """Return a target of one column as a vector: an ndarray, or a pyarrow.Array of plain values.

    Raises
    ------
    SchemaError
        If there are several columns.
    """
    if is_arrow(y):
        import pyarrow as pa

        if isinstance(y, pa.ChunkedArray):
            y = y.combine_chunks()
        return y.dictionary_decode() if pa.types.is_dictionary(y.type) else y
    if y.ndim == 2 and y.shape[1] != 1:
        raise SchemaError(
            f"a target of {y.shape[1]} columns cannot hold classes: train one classifier for each, or use a regressor"
        )
    return y.reshape(-1)


def find_numbers(y: Array, classes: Floats) -> tuple[Floats, int]:
    """Find numbers among sorted classes: their indices as a column, and the first row of none (or -1)."""
    from streamgd.data.compiled.classes import find_classes

    codes = np.empty(len(y))
    unknown = find_classes(np.ascontiguousarray(y, np.float64), classes, codes)
    return codes[:, None], int(unknown)


def _count(inverse: NDArray[np.intp], weight: Array | None, n: int, sums: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Count the rows of each class, and add their weights to the sums so far.

    Weights are added one after the other, row by row, so that no sum depends on where pieces end.
    """
    kept = inverse >= 0
    counts = np.bincount(inverse[kept], minlength=n).astype(np.int64)
    if weight is None:
        return counts, sums + counts
    # The sums so far come first: added afterwards, a piece's own sum would be rounded by itself.
    at = np.concatenate([np.arange(n), inverse[kept]])
    found = np.bincount(at, np.concatenate([sums, np.asarray(weight, np.float64)[kept]]), minlength=n)
    return counts, found.astype(np.float64)


def is_arrow(y: Any) -> bool:
    """Tell whether a target came as Arrow data."""
    return type(y).__module__.split(".")[0] == "pyarrow"  # without importing pyarrow for those who do not use it


def _is_plain_arrow(kind: Any) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    more = (pa.types.is_fixed_size_binary, pa.types.is_decimal)
    return any(test(kind) for test in tests + more)


def arrow_numbers(y: Any) -> Array:
    """Convert numbers, booleans and decimals; anything else comes back as an array of objects or text."""
    import pyarrow as pa

    if pa.types.is_decimal(y.type):
        y = y.cast(pa.float64())
    if pa.types.is_boolean(y.type):
        y = y.cast(pa.int8())
    found: Array = y.to_numpy(zero_copy_only=False)
    return found


def is_number(y: Any) -> bool:
    """Tell whether a target is an array of real numbers or booleans."""
    return isinstance(y, np.ndarray) and y.dtype.kind in "fiub"


def _beyond_exact(y: Array) -> bool:
    return bool(int(y.max()) >= EXACT or int(y.min()) <= -EXACT)


def keys_of(values: Array) -> list[Any]:
    """List values as they are looked up; dates stay NumPy's, whose Python form depends on the unit."""
    return list(values) if values.dtype.kind in "mM" else values.tolist()


def _as_classes(values: list[Any], dtypes: set[np.dtype[Any]]) -> Array:
    """Make an array of sorted classes, in the dtype they were stored with where there was one."""
    if dtypes:
        return np.array(values, np.result_type(*dtypes))
    if values and isinstance(values[0], np.generic):  # dates that came as Arrow's
        return np.array(values)
    for kind, dtype in ((bool, np.bool_), (int, np.int64), (float, np.float64)):
        if values and all(type(value) is kind for value in values):
            return np.array(values, dtype)
    found = np.empty(len(values), object)
    found[:] = values
    return found


# Python objects that can be classes, each with a way to text and back.
_CODECS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    str: ("str", str, str),
    bool: ("bool", bool, bool),
    int: ("int", int, int),
    float: ("float", float, float),
    bytes: ("bytes", lambda v: base64.b64encode(v).decode(), base64.b64decode),
    decimal.Decimal: ("decimal", str, decimal.Decimal),
    datetime.datetime: ("datetime", datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    datetime.date: ("date", datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: ("time", datetime.time.isoformat, datetime.time.fromisoformat),
}
_DECODERS = {tag: decode for tag, _, decode in _CODECS.values()}


def classes_to_json(classes: Array) -> dict[str, Any]:
    """Turn classes into JSON values; each comes back as the same type."""
    if classes.dtype.kind in "mM":
        return {"dtype": classes.dtype.name, "values": classes.astype(np.int64).tolist()}
    if classes.dtype.kind in "fiubU":
        return {"dtype": classes.dtype.str, "values": classes.tolist()}
    tagged = []
    for value in classes.tolist():
        if type(value) not in _CODECS:
            raise SchemaError(f"class {value!r} of type {type(value).__name__} cannot be stored: convert the target")
        tag, encode, _ = _CODECS[type(value)]
        tagged.append([tag, encode(value)])
    return {"dtype": classes.dtype.str, "values": tagged}


def classes_from_json(stored: Mapping[str, Any]) -> Array:
    """Make classes of what `classes_to_json` gave."""
    dtype, values = np.dtype(stored["dtype"]), stored["values"]
    if dtype.kind in "mM":
        return np.array(values, np.int64).astype(dtype)
    if dtype.kind in "fiubU":
        return np.array(values, dtype)
    found = np.empty(len(values), object)
    found[:] = [_DECODERS[tag](value) for tag, value in values]
    return found.astype(dtype)
