"""Put a piece of rows where it belongs in a window, and say what is wrong with it if something is.

Every value becomes ``(float64(x) - shift) * factor``, rounded once to the row dtype, whatever it is stored as: the same
data gives the same bits from every source. Numbers that are not finite are noticed in the same pass, and only then
searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.memory import DTYPE_CODES
from streamgd.data.compiled.placing import place_columns, place_identities, place_rows, place_targets, place_weights
from streamgd.data.plan import Layout, WindowPlan
from streamgd.data.sources.base import Array, Columns, Slice, Source, readable
from streamgd.data.targets import TargetCodec
from streamgd.errors import CorruptDataError, NonFiniteError, SchemaError

Floats = NDArray[np.float64]


@lru_cache(maxsize=16)
def _codes_of(dtypes: tuple[str, ...]) -> NDArray[np.int64]:
    """Return what compiled code calls dtypes."""
    return np.array([DTYPE_CODES[name] for name in dtypes], np.int64)


@lru_cache(maxsize=64)
def _code_of(dtype: np.dtype[Any]) -> int:
    """Return what compiled code calls a dtype; NumPy makes up its name anew whenever it is asked."""
    return DTYPE_CODES[dtype.name]


class Window:
    """Rows in memory, allocated once and refilled.

    Parameters
    ----------
    layout : Layout
        How many rows it holds.
    source : Source
        What they look like.

    Attributes
    ----------
    X : ndarray of shape (capacity, n_features), float32 or float64
        Scaled features, C-contiguous.
    y : ndarray of shape (capacity, n_outputs), float64
        Encoded targets; no columns without a target.
    weight : ndarray of shape (capacity,), float64, or None
        Sample weights.
    ids : ndarray of shape (capacity,), uint64
        Hashed identity of each row (splitmix64 of ``block << 40 | row``), see `streamgd.data.plan.checksum_of`.
    n_rows : int
        Rows that are filled; those after it mean nothing.
    epoch, index : int
        Where the window belongs.
    last : bool
        Whether it is the last of its epoch.
    """

    def __init__(self, layout: Layout, source: Source) -> None:
        capacity = layout.window_rows
        self.X: Array = np.empty((capacity, source.n_features), source.row_dtype)
        self.y: Floats = np.empty((capacity, layout.n_outputs))
        self.weight: Floats | None = np.empty(capacity) if source.has_weight else None
        self.ids: NDArray[np.uint64] = np.empty(capacity, np.uint64)
        self.n_rows = 0
        self.epoch = 0
        self.index = 0
        self.last = False

    def describe(self, plan: WindowPlan) -> None:
        """Take over where the window belongs."""
        self.n_rows, self.epoch, self.index, self.last = plan.n_rows, plan.epoch, plan.index, plan.last


class RowPlacer:
    """Writes pieces of a source's rows to their places in a window; safe for several threads on different rows.

    Parameters
    ----------
    source : Source
        Where the rows come from, for types and messages.
    codec : TargetCodec or None
        How targets become numbers; None leaves the target out.
    shift, factor : ndarray of shape (n_features,), float64, or None, default=None
        Each value becomes ``(x - shift) * factor``; None leaves it as it is.
    check : bool, default=True
        Whether features, targets and weights that are not finite, and negative weights, are errors.

    Raises
    ------
    SchemaError
        If the source has no target to encode, or `shift` and `factor` have the wrong length.
    """

    def __init__(
        self, source: Source, codec: TargetCodec | None, shift: Floats | None, factor: Floats | None, *, check: bool
    ) -> None:
        if codec is not None and source.target is None:
            raise SchemaError(f"{source.name} has no target: open it with target=")
        self._source = source
        self._codec = codec
        d = source.n_features
        self._shift = np.zeros(d) if shift is None else np.ascontiguousarray(shift, np.float64)
        self._factor = np.ones(d) if factor is None else np.ascontiguousarray(factor, np.float64)
        if self._shift.shape != (d,) or self._factor.shape != (d,):
            raise SchemaError(
                f"shift of shape {self._shift.shape} and factor of shape {self._factor.shape}: expected ({d},), one "
                "number for each feature"
            )
        self._check = check

    def place(self, window: Window, piece: Slice, block: int, start: int, places: NDArray[np.int32]) -> None:
        """Put the rows of a piece where they belong.

        Parameters
        ----------
        window : Window
            Is written to.
        piece : Slice
            As a reader gave it.
        block, start : int
            Which rows these are.
        places : ndarray of shape (n_rows,), int32
            Row of the window for each.

        Raises
        ------
        NonFiniteError
            If a number is not finite or a weight is negative; names block, row, column and value.
        DataError
            If a target is no known class.
        CorruptDataError
            If there are more or fewer rows than places.
        """
        finite = self.place_features(piece.X, places, window.X, block)
        if not finite and self._check:
            raise self._bad_feature(piece.X, block, start)
        if self._codec is not None:
            codes, unknown = self._codec.look_up(piece.y)
            self._expect_rows(len(codes), len(places), block)
            if unknown >= 0:
                raise self._codec.unknown_class(piece.y, unknown, self._source.locate(block, start + unknown))
            if not place_targets(codes, places, window.y) and self._check:
                raise self._bad_target(piece.y, codes, block, start)
        if window.weight is not None:
            weight = np.ascontiguousarray(piece.weight, np.float64)
            self._expect_rows(len(weight), len(places), block)
            if not place_weights(weight, places, window.weight) and self._check:
                raise self._bad_weight(weight, block, start)
        place_identities(block, start, places, window.ids)

    def place_features(self, X: Array | Sequence[Array], places: NDArray[np.int32], out: Array, block: int) -> bool:
        """Write the features of some rows at their places in `out`; return whether all are finite."""
        if isinstance(X, np.ndarray):
            X = readable(X)
            self._expect_rows(len(X), len(places), block)
            row_step, step = X.strides
            width = X.shape[1]
            if width == out.shape[1]:
                address, code, stride = X.__array_interface__["data"][0], _code_of(X.dtype), row_step // X.itemsize
                if step == X.itemsize or width == 1:
                    return place_rows(address, code, stride, self._shift, self._factor, places, out)
                addresses, codes = address + step * np.arange(width), np.full(width, code)
                return place_columns(addresses, codes, np.full(width, stride), self._shift, self._factor, places, out)
            X = Columns(list(X.T))
        columns = X if isinstance(X, Columns) else Columns(X)
        if len(columns) != out.shape[1]:
            raise SchemaError(
                f"block {block} of {self._source.name} has {len(columns)} features: expected {out.shape[1]}"
            )
        for column in columns if columns is not X else columns[:1]:
            self._expect_rows(len(column), len(places), block)
        addresses, strides, dtypes = columns.locate()
        codes = _codes_of(dtypes)
        # By address: `columns` keeps the memory alive until the kernel has returned.
        return place_columns(addresses, codes, strides, self._shift, self._factor, places, out)

    def _expect_rows(self, found: int, expected: int, block: int) -> None:
        if found != expected:
            raise CorruptDataError(
                f"block {block} of {self._source.name} gave {found:,} rows where {expected:,} were asked for: the data "
                "changed while it was read, or it ends early"
            )

    def _bad_feature(self, X: Array | Sequence[Array], block: int, start: int) -> NonFiniteError:
        """Find the first value that is not finite once it is placed; only then is the search worth its time."""
        columns = list(X.T) if isinstance(X, np.ndarray) else list(X)
        dtype = self._source.row_dtype
        row, column = len(columns[0]), 0
        with np.errstate(all="ignore"):
            for j, values in enumerate(columns):
                scaled = ((values.astype(np.float64) - self._shift[j]) * self._factor[j]).astype(dtype)
                bad = np.flatnonzero(~np.isfinite(scaled[:row]))
                if len(bad):
                    row, column = int(bad[0]), j
        value, label = columns[column][row], self._source.feature_label(column)
        where = f"{self._source.locate(block, start + row)}: feature {label} is {shown(value)}"
        if np.isfinite(value):
            return NonFiniteError(
                f"{where}, which {dtype} cannot hold. Open the data with dtype='float64', or rescale the column"
            )
        return NonFiniteError(
            f"{where}: expected a finite number. Fill or drop missing values before training, or leave the column out"
        )

    def _bad_target(self, y: Any, codes: Floats, block: int, start: int) -> NonFiniteError:
        row = int(np.flatnonzero(~np.isfinite(codes).all(axis=1))[0])
        name = self._source.target.name if self._source.target is not None else "y"
        return NonFiniteError(
            f"{self._source.locate(block, start + row)}: target {name!r} is {shown(y[row])}: expected a "
            f"{'finite number' if self._codec is None or self._codec.classes is None else 'class'}. "
            "Drop rows without a target before training"
        )

    def _bad_weight(self, weight: Floats, block: int, start: int) -> NonFiniteError:
        row = int(np.flatnonzero(~((weight >= 0) & np.isfinite(weight)))[0])
        return NonFiniteError(
            f"{self._source.locate(block, start + row)}: sample weight is {shown(weight[row])}: expected a finite "
            "number that is not negative. Give rows that should not count the weight 0"
        )


def shown(value: Any) -> str:
    """Write a number as messages do everywhere."""
    return "NaN" if isinstance(value, (float, np.floating)) and np.isnan(value) else str(value)
