"""Targets as numbers and back: floats as they are, classes as their index among the sorted classes.

`ClassCounter` finds the classes in a pass over the target column; `TargetCodec` then encodes the targets of every
window. Missing targets (null, NaN, infinities) become NaN, which whoever places the rows reports with its position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from streamgd.data.classes import (
    EXACT,
    ClassCounter,
    arrow_numbers,
    as_vector,
    classes_from_json,
    classes_to_json,
    factorize,
    find_numbers,
    is_arrow,
    is_number,
    keys_of,
)
from streamgd.errors import DataError, OptionError, SchemaError

__all__ = ["ClassCounter", "TargetCodec"]

Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TargetCodec:
    """How targets are encoded as float64.

    Attributes
    ----------
    classes : ndarray of shape (n_classes,), or None
        The sorted classes; None for regression.
    n_outputs : int, default=1
        Columns of the encoded target; 1 for classes.
    dtype : str or None, default=None
        For regression: what `decode` returns, and what `encode` must keep exactly. None is float64, to which 64-bit
        integers are rounded.
    """

    classes: Array | None
    n_outputs: int = 1
    dtype: str | None = None

    def encode(self, y: Any) -> Floats:
        """Encode some targets.

        Parameters
        ----------
        y : ndarray of shape (n_rows,) or (n_rows, n_outputs), or pyarrow.Array
            As stored.

        Returns
        -------
        ndarray of shape (n_rows, n_outputs), float64
            Class indices or numbers; NaN where the target is missing.

        Raises
        ------
        DataError
            If a target is none of the classes, and names it.
        SchemaError
            If targets for regression are not numbers, or their shape is another.
        """
        codes, unknown = self.look_up(y)
        if unknown >= 0:
            raise self.unknown_class(y, unknown, f"row {unknown:,}")
        return codes

    def look_up(self, y: Any) -> tuple[Floats, int]:
        """Encode some targets as `encode` does, but return the first row of no known class (or -1) instead of raising.

        Returns
        -------
        codes : ndarray of shape (n_rows, n_outputs), float64
            As from `encode`; -1 for a target that is none of the classes.
        unknown : int
            The first such row, or -1.
        """
        if self.classes is None:
            return self._as_numbers(y), -1
        y = as_vector(y)
        if self.sorted_numbers is not None and is_number(y):
            return find_numbers(y, self.sorted_numbers)
        inverse, values = factorize(y)
        index = np.array([self._index.get(value, -1) for value in values] + [np.nan])
        codes = index[inverse]
        unknown = np.flatnonzero(codes < 0)
        return codes[:, None], int(unknown[0]) if len(unknown) else -1

    def unknown_class(self, y: Any, row: int, where: str) -> DataError:
        """Make the error for a target that is none of the classes."""
        assert self.classes is not None
        value = _plain(as_vector(y)[row])
        known = self.classes.tolist()
        shown = ", ".join(repr(value) for value in known[:10]) + (", …" if len(known) > 10 else "")
        return DataError(
            f"{where}: target {value!r} is none of the {len(known):,} known classes ({shown}). Classes are fixed "
            "before the first update: name them all with classes=, or start afresh with data that holds them"
        )

    def decode(self, codes: Array) -> Array:
        """Turn codes back into targets.

        Parameters
        ----------
        codes : ndarray
            Class indices, of shape (n_rows,) or (n_rows, 1); numbers of any shape for regression.

        Returns
        -------
        ndarray
            Labels of shape (n_rows,), or numbers of the same shape as `codes`, in the codec's dtype.
        """
        if self.classes is not None:
            return self.classes[np.asarray(codes).reshape(-1).astype(np.intp)]
        return np.asarray(codes, np.float64 if self.dtype is None else self.dtype)

    def to_json(self) -> dict[str, Any]:
        """Return the codec as JSON values."""
        classes = None if self.classes is None else classes_to_json(self.classes)
        return {"classes": classes, "n_outputs": self.n_outputs, "dtype": self.dtype}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Make a codec of what `to_json` gave."""
        classes = None if values["classes"] is None else classes_from_json(values["classes"])
        return cls(classes, int(values["n_outputs"]), values["dtype"])

    @classmethod
    def of_classes(cls, values: Any) -> Self:
        """Make a codec for classes that are known beforehand, in any order.

        Raises
        ------
        OptionError
            If there is none, or one is missing (None, NaN).
        """
        counter = ClassCounter()
        values = values if isinstance(values, np.ndarray) or is_arrow(values) else np.asarray(values)
        if np.ndim(values) == 0 or len(values) == 0 or counter.add(values) is not None:
            raise OptionError(f"classes={values!r}: expected at least one class, none of them missing")
        return cls(counter.classes)

    @cached_property
    def sorted_numbers(self) -> Floats | None:
        """The classes as float64 if they are numbers and all of them are exact."""
        if self.classes is None:
            return None
        if self.classes.dtype.kind not in "fiub":
            return None
        numbers = self.classes.astype(np.float64)
        exact = self.classes.dtype.kind == "f" or bool((np.abs(numbers) < EXACT).all())
        return numbers if exact else None

    @cached_property
    def _index(self) -> dict[Any, int]:
        assert self.classes is not None
        return {value: i for i, value in enumerate(keys_of(self.classes))}

    def _as_numbers(self, y: Any) -> Floats:
        if is_arrow(y):
            y = arrow_numbers(y)
        if y.dtype.kind not in "fiub":
            raise SchemaError(
                f"target of type {y.dtype} for regression: expected numbers. Convert it, or train a classifier"
            )
        codes = np.ascontiguousarray(y.reshape(len(y), -1), np.float64)
        if codes.shape[1] != self.n_outputs:
            raise SchemaError(f"target with {codes.shape[1]} columns: expected {self.n_outputs}")
        if self.dtype is not None and y.dtype.kind in "iu" and y.dtype.itemsize == 8 and (abs(codes) >= EXACT).any():
            value = int(y[np.unravel_index(abs(codes).argmax(), codes.shape)[0]].ravel()[0])
            raise DataError(
                f"target {value} cannot be kept exactly: whole numbers must stay below 2**53. Store such a target as "
                "text, or as float64 if it may be rounded"
            )
        return codes


def _plain(value: Any) -> Any:
    return value.as_py() if hasattr(value, "as_py") else value.item() if hasattr(value, "item") else value
