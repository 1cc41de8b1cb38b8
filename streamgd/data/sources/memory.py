"""Arrays, memmaps and data frames as a source.

Blocks are ranges of rows; slices of arrays are views, and columns are converted slice by slice, so that a data set in
memory is never copied whole. What can be a feature or a target is decided in `arrays` and `frames`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from streamgd.data.sources.arrays import as_features, as_target, as_weight
from streamgd.data.sources.base import (
    DEFAULT_BLOCK_BYTES,
    Array,
    BlockReader,
    Slice,
    Source,
    TargetInfo,
    choose_row_dtype,
)
from streamgd.data.sources.columns import Column, Features, Target
from streamgd.data.sources.files import stamp_of
from streamgd.data.sources.flat import FlatRows, Part, Strip
from streamgd.data.sources.frames import pick_columns
from streamgd.data.sources.mapped import MappedArray
from streamgd.errors import CorruptDataError, EmptySourceError, SchemaError

#: Up to this size the fingerprint covers every value; above it, rows spread over the whole.
_HASHED_WHOLE_BYTES = 4 << 20
_HASHED_RUNS = 64
_HASHED_RUN_ROWS = 16
_TARGET_ROWS = 65_536
#: Bytes that are summed up at once.
_SUMMED_BYTES = 1 << 20


class MemorySource(Source):
    """NumPy arrays, memmaps, pandas objects or nested lists.

    Parameters
    ----------
    X : array-like of shape (n_rows, n_features) or DataFrame
        Numbers or booleans. Arrays of Python objects are converted to float64; nullable pandas columns are converted
        as they are read, missing values to NaN. Memmaps are read from their file, not through the mapping, whose pages
        would count as memory.
    y : array-like of shape (n_rows,) or (n_rows, n_outputs), Series, DataFrame or None, default=None
        Target; numbers, or anything that can hold classes.
    feature_names : sequence of str or None, default=None
        Names of the columns of X; default: a DataFrame's, if they are strings.
    weight : array-like of shape (n_rows,) or None, default=None
        Sample weights.
    dtype : {"auto", "float32", "float64"}, default="auto"
        Row dtype, see `streamgd.data.sources.base.choose_row_dtype`.
    target_name : str, default="y"
        What messages call the target; a named Series keeps its name.
    block_bytes : int, default=1 MiB
        About how many bytes of rows make a block.

    Raises
    ------
    SchemaError
        If X is not a matrix of real numbers, or lengths differ.
    EmptySourceError
        If there are no rows.
    OptionError
        If `dtype` is unknown.

    Notes
    -----
    The data must not change while the source is in use. The fingerprint holds types, shape, names and a hash of the
    values: of all up to 4 MiB, else of (up to) 1,024 rows spread evenly, the first and the last included.
    """

    kind = "memory"

    def __init__(
        self,
        X: Any,
        y: Any = None,
        *,
        feature_names: Sequence[str] | None = None,
        weight: Any = None,
        dtype: str = "auto",
        target_name: str = "y",
        block_bytes: int = DEFAULT_BLOCK_BYTES,
    ) -> None:
        self._features: Features = as_features(X, feature_names)
        self._target: Target | None = None if y is None else as_target(y, target_name)
        self._weight: Column | None = None if weight is None else as_weight(weight)
        n_rows = self._features.n_rows
        for what, held in (("y", self._target), ("weight", self._weight)):
            if held is not None and len(held) != n_rows:
                raise SchemaError(
                    f"X has {n_rows:,} rows, but {what} has {len(held):,}: inconsistent numbers of samples. "
                    "Every row needs its own"
                )
        if n_rows == 0:
            raise EmptySourceError(
                f"Found array with 0 sample(s) (shape={self._features.shape}) while a minimum of 1 is required."
            )
        self.name = self._features.name
        self.n_features = self._features.n_columns
        self.feature_names = self._features.names
        self.feature_dtypes = self._features.stored_dtypes
        self.row_dtype = choose_row_dtype(self._features.dtypes, dtype)
        self.target = None if self._target is None else self._target.info
        self.has_weight = self._weight is not None
        self.stored_bytes = sum(column.n_bytes for column in self._columns())
        self.open_block_bytes = 0
        block = min(n_rows, max(1, block_bytes * n_rows // max(1, self.stored_bytes)))
        self.block_rows = np.full(-(-n_rows // block), block, np.int64)
        self.block_rows[-1] = n_rows - block * (len(self.block_rows) - 1)
        self._block = block
        self.is_flat = self._strips() is not None
        self.fingerprint = self._make_fingerprint()
        self.origin = {"kind": self.kind, "name": self.name, "shape": list(self._features.shape)}

    @classmethod
    def from_dataframe(
        cls,
        frame: Any,
        target: str | Sequence[str] | None = None,
        features: Sequence[str] | None = None,
        weight: str | None = None,
        dtype: str = "auto",
    ) -> MemorySource:
        """Make a source of one pandas DataFrame whose columns are named.

        Parameters
        ----------
        frame : pandas.DataFrame
            The table.
        target : str, sequence of str or None, default=None
            Target column, or columns for several outputs.
        features : sequence of str or None, default=None
            Feature columns; default: every column that is neither target nor weight.
        weight : str or None, default=None
            Column of sample weights.
        dtype : {"auto", "float32", "float64"}, default="auto"
            Row dtype.

        Raises
        ------
        SourceNotFoundError
            If a column is not there.
        SchemaError
            If features are not numbers (all are named), or a name occurs twice.
        """
        X, y, w = pick_columns(frame, target, features, weight)
        return cls(X, y, weight=w, dtype=dtype, target_name=target if isinstance(target, str) else "y")

    def open_block(self, block: int, start: int = 0, *, piece_rows: int = 16384) -> BlockReader:
        """Open a range of rows; costs nothing."""
        return _Reader(self, block * self._block + start)

    def read_rows(self, first: int, stop: int) -> Slice:
        """Return rows `first` to `stop` of the whole table; views where the types allow."""
        return Slice(
            self._features.read(first, stop),
            None if self._target is None else self._target.read(first, stop),
            None if self._weight is None else self._weight.read(first, stop),
        )

    def flat_rows(self) -> FlatRows | None:
        """Say where the rows lie if nothing must be converted; see `Source.flat_rows`."""
        strips = self._strips()
        if strips is None:
            return None
        starts = np.arange(self.n_blocks, dtype=np.int64) * self._block
        return FlatRows(np.zeros(self.n_blocks, np.int64), starts, lambda file: strips)

    def _strips(self) -> list[Strip] | None:
        found: list[Strip] = []
        parts: list[tuple[Part, Sequence[Column]]] = [("features", self._features.columns)]
        if self._target is not None:
            parts.append(("target", [self._target.column]))
        if self._weight is not None:
            parts.append(("weight", [self._weight]))
        for part, columns in parts:
            for j, column in enumerate(columns):
                strips = column.strips(part, j)
                if strips is None:
                    return None
                found.extend(strips)
        return found

    def iter_targets(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any, Array | None]]:
        """Hand out target and weights, many blocks at a time."""
        if self._target is None and self._weight is None:
            return
        stop, n = self.n_rows if stop is None else stop, self.target_piece_rows(_TARGET_ROWS)
        for first in range(start, stop, n):
            end = min(first + n, stop)
            y = None if self._target is None else self._target.read(first, end)
            yield first, y, None if self._weight is None else self._weight.read(first, end)

    @property
    def held_bytes(self) -> int:
        """Bytes of all but memmaps, which are sent as the paths of their files."""
        return sum(column.n_bytes for column in self._columns() if not isinstance(column.data, MappedArray))

    def check_unchanged(self, blocks: Sequence[int]) -> None:
        """Read the rows again that the fingerprint covers; see `Source.check_unchanged`."""
        if self._make_fingerprint() != self.fingerprint:
            raise CorruptDataError(f"{self.name}: not the values that were opened first, or changed since")

    def stamp(self) -> dict[str, Any]:
        """Sum up all values, at about the memory's speed, and look at the files behind memmaps; see `Source.stamp`."""
        files = [column.data.path for column in self._columns() if isinstance(column.data, MappedArray)]
        held = [column for column in self._columns() if not isinstance(column.data, MappedArray)]
        return stamp_of(files) | {"sum": _sum_columns(held, self.n_rows)}

    def locate(self, block: int, row: int) -> str:
        """Name the row, counted from 0 as in ``X[row]``."""
        return f"{self.name}, row {block * self._block + row:,} (counted from 0)"

    def close(self) -> None:
        """Close the files behind memmaps; the next slice opens them again."""
        for column in self._columns():
            column.close()

    def _columns(self) -> list[Column]:
        """List all that is stored: features, target, weight."""
        found = list(self._features.columns)
        if self._target is not None:
            found.append(self._target.column)
        if self._weight is not None:
            found.append(self._weight)
        return found

    def _make_fingerprint(self) -> dict[str, Any]:
        dtypes = self.feature_dtypes
        target: TargetInfo | None = self.target
        return {
            "kind": self.kind,
            "n_rows": self.n_rows,
            "n_features": self.n_features,
            "feature_dtypes": dtypes[0] if len(set(dtypes)) == 1 else list(dtypes),
            "feature_names": None if self.feature_names is None else list(self.feature_names),
            "target": None if target is None else [target.name, target.dtype, target.n_outputs, target.is_vector],
            "weight": None if self._weight is None else self._weight.stored_dtype,
            "sample": _hash_columns(self._columns(), self.n_rows),
        }


class _Reader(BlockReader):
    """A position in the table."""

    def __init__(self, source: MemorySource, at: int) -> None:
        self._source = source
        self._at = at

    def read(self, n_rows: int) -> Slice:
        """Return the next rows, as views where the types allow."""
        first, self._at = self._at, self._at + n_rows
        return self._source.read_rows(first, self._at)


def _hash_columns(columns: Sequence[Column], n_rows: int) -> str:
    """Hash the values, or runs of rows spread over them; positions are implied by the order."""
    runs = max(2, min(_HASHED_RUNS, _HASHED_RUNS * 64 // len(columns)))  # bounds the reads of a very wide table
    if sum(column.n_bytes for column in columns) <= _HASHED_WHOLE_BYTES or n_rows <= runs * _HASHED_RUN_ROWS:
        starts, run_rows = [0], n_rows
    else:
        starts = np.linspace(0, n_rows - _HASHED_RUN_ROWS, runs).astype(np.int64).tolist()
        run_rows = _HASHED_RUN_ROWS
    digest = hashlib.blake2b(digest_size=16)
    for column in columns:
        for start in starts:
            digest.update(_bytes_of(column.read(start, start + run_rows)).data)
    return digest.hexdigest()


def _sum_columns(columns: Sequence[Column], n_rows: int) -> str:
    """Sum up all values, a piece at a time; copied are only pieces that do not lie in one run of bytes."""
    from streamgd.data.compiled.checksums import sum_words  # imports Numba

    total = 0
    for number, column in enumerate(columns):
        step = max(1, _SUMMED_BYTES * n_rows // max(1, column.n_bytes))
        word = number << 48
        for first in range(0, n_rows, step):
            raw = _bytes_of(column.read(first, min(first + step, n_rows)))
            whole = len(raw) // 8 * 8
            rest = np.zeros(8, np.uint8)
            rest[: len(raw) - whole] = raw[whole:]
            for words, at in ((raw[:whole], word), (rest, word + whole // 8)):
                total += int(sum_words(words.view(np.uint64), at))
            word += whole // 8 + 1
    return f"{total % 2**64:016x}"


def _bytes_of(part: Array) -> Array:
    """Return the bytes of values."""
    if part.dtype.kind == "O":  # they are addresses: those of what they point to
        text = "\x1f".join(f"{type(value).__name__}:{value!r}" for value in part.ravel().tolist())
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8)
