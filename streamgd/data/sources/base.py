"""What every source of rows promises.

A source knows its blocks without reading data, and hands out consecutive slices of any block. `streamgd.data.plan`
needs only the metadata; `streamgd.data.window` only `Source.open_block`; the survey also `Source.iter_targets`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from streamgd.errors import OptionError

if TYPE_CHECKING:
    from streamgd.data.sources.flat import FlatRows

Array = NDArray[Any]

#: Bytes of targets that are read at once, as numbers.
_TARGET_PIECE_BYTES = 1 << 21
#: Raw bytes a reader hands out at once when nothing else decides: small enough to stay cheap, big enough to amortise.
DEFAULT_BLOCK_BYTES = 1 << 20
#: Dtypes that compiled code reads as they are, in native byte order.
FLAT_DTYPES = frozenset(
    ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
)


Located = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], tuple[str, ...]]


class Columns(Sequence[Array]):
    """Columns of consecutive rows, whose addresses are looked up once however often they are sliced.

    Parameters
    ----------
    arrays : sequence of ndarray of shape (n_rows,)
        As in `Slice`.
    first, stop : int, optional
        The rows that count; default: all.
    located : tuple, optional
        Where they lie, if that is known: the address of each array, bytes and values from row to row, and dtypes.
    """

    def __init__(
        self, arrays: Sequence[Array], first: int = 0, stop: int | None = None, *, located: Located | None = None
    ) -> None:
        self._arrays = arrays
        self._first = first
        self.n_rows = (len(arrays[0]) if stop is None else stop) - first
        self._located = located

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self._arrays)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | Sequence[Array]:
        """Return a column."""
        rows = slice(self._first, self._first + self.n_rows)
        if isinstance(index, slice):
            return [array[rows] for array in self._arrays[index]]
        return self._arrays[index][rows]

    def rows(self, first: int, stop: int) -> Columns:
        """Return some of the rows, as views."""
        self._located = self._located or self._locate()
        return Columns(self._arrays, self._first + first, self._first + stop, located=self._located)

    def locate(self) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[str, ...]]:
        """Return the address of each column's first row, how many values lie from row to row, and the dtypes."""
        self._located = self._located or self._locate()
        addresses, steps, strides, names = self._located
        return addresses + self._first * steps, strides, names

    def _locate(self) -> Located:
        self._arrays = [readable(array) for array in self._arrays]
        addresses = [array.__array_interface__["data"][0] for array in self._arrays]
        steps = [array.strides[0] for array in self._arrays]
        strides = [array.strides[0] // array.itemsize for array in self._arrays]
        names = tuple(array.dtype.name for array in self._arrays)
        return np.array(addresses), np.array(steps), np.array(strides), names


@lru_cache(maxsize=64)
def _is_readable(dtype: np.dtype[Any]) -> bool:
    """Tell whether compiled code can read a dtype; NumPy makes up the name anew whenever it is asked."""
    return dtype.name in FLAT_DTYPES and dtype.isnative


def readable(values: Array) -> Array:
    """Return values that compiled code can read by address: a known dtype, aligned, with strides of whole values."""
    if not _is_readable(values.dtype):
        values = values.astype(np.float32 if values.dtype.kind == "f" and values.itemsize < 4 else np.float64)
    if not values.flags.aligned or any(step % values.itemsize for step in values.strides):
        values = np.ascontiguousarray(values)
    return values


class Slice(NamedTuple):
    """Consecutive rows out of one block, as stored: nothing is scaled, encoded or checked yet.

    Attributes
    ----------
    X : ndarray of shape (n_rows, n_features), Columns, or sequence of n_features ndarrays of shape (n_rows,)
        The features, row-major (or any 2-D layout) where the storage is, else one contiguous array per column
        (columns may differ in dtype). Real numbers or booleans, native byte order.
    y : ndarray of shape (n_rows,) or (n_rows, n_outputs), pyarrow.Array, or None
        The target in the dtype it is stored with; a `pyarrow.Array` only for targets that are not numbers.
    weight : ndarray of shape (n_rows,) or None
        Sample weights.
    """

    X: Array | Sequence[Array]
    y: Any
    weight: Array | None


@dataclass(frozen=True)
class TargetInfo:
    """What is known of the target before reading it.

    Attributes
    ----------
    name : str
        Column or dataset, for messages.
    n_outputs : int
        1 for a vector, the number of columns for a matrix.
    dtype : str
        As stored (``"float32"``, ``"string"``, …), for messages and the fingerprint.
    numeric : bool
        Whether it can be a regression target; any type can hold classes.
    is_vector : bool
        Whether predictions for it are 1-D.
    """

    name: str
    n_outputs: int
    dtype: str
    numeric: bool
    is_vector: bool = True


class BlockReader(abc.ABC):
    """Consecutive slices of one block, for one consumer at a time."""

    @abc.abstractmethod
    def read(self, n_rows: int) -> Slice:
        """Return the next `n_rows` rows.

        The caller never asks for more than the block still has. The arrays stay valid and unchanged until the next
        `read` or `close`; the caller does not write to them.

        Raises
        ------
        CorruptDataError
            If the storage ends early or cannot be decoded; names the file and the block.
        """

    def read_some(self, n_rows: int) -> tuple[int, Slice]:
        """Return the next rows that can be had without copying: at least one, at most `n_rows`; and their number.

        Otherwise as `read`.
        """
        return n_rows, self.read(n_rows)

    def close(self) -> None:  # noqa: B027 - most readers hold nothing
        """Release what the reader holds. Idempotent."""

    def __enter__(self) -> Self:
        """Return the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the reader."""
        self.close()


class Source(abc.ABC):
    """A table in blocks: metadata now, rows on demand.

    Subclasses set every attribute below in ``__init__`` from metadata alone. A source is picklable, may be used from
    any thread, and opens files only in the process and at the moment that reads them. Reading the same rows twice gives
    the same bits.

    Attributes
    ----------
    kind : str
        ``"hdf5"``, ``"parquet"``, ``"dask"`` or ``"memory"``.
    name : str
        Short name for messages, such as the file's name.
    block_rows : ndarray of shape (n_blocks,), int64
        Rows of each block, in file order; no block is empty.
    n_features : int
        Columns of X.
    feature_names : tuple of str, or None
        Their names where the storage has names.
    feature_dtypes : tuple of str
        Stored dtype of each feature.
    row_dtype : numpy.dtype
        float32 or float64: the dtype rows are trained in.
    target : TargetInfo or None
        None for a source that can only be predicted from.
    has_weight : bool
        Whether slices carry weights.
    stored_bytes : int
        Bytes on storage that one epoch reads, for MB/s.
    open_block_bytes : int
        Upper estimate of the memory that keeping one block open costs, the slice it hands out not counted.
    holds_block : bool
        True where opening a block decodes it whole whatever the slices are (Dask).
    slice_cost_rows : int
        Rows that are decoded at least when a block is opened for any slice: 1 where slices cost what they hold, a data
        page's rows for Parquet, the whole block for Dask. The survey opens fewer blocks where this is high.
    decodes_slowly : bool
        True where it takes longer to decode rows than to send them from one process to another (gzip). Workers of a
        cluster read for one another then.
    is_flat : bool
        True where rows lie as they are, at even distances, so that any few of them cost what their bytes cost: then
        `flat_rows` says where.
    dropped : tuple of (str, str)
        Columns left out on purpose, each with the reason, for the user to see.
    fingerprint : dict of str to JSON value
        Equal for the same data wherever it lies; every entry is compared on resume.
    origin : dict of str to JSON value
        How to open the same data again (paths, columns); informs, and lets the command line resume.
    """

    kind: str
    name: str
    block_rows: NDArray[np.int64]
    n_features: int
    feature_names: tuple[str, ...] | None
    feature_dtypes: tuple[str, ...]
    row_dtype: np.dtype[Any]
    target: TargetInfo | None
    has_weight: bool
    stored_bytes: int
    open_block_bytes: int
    holds_block: bool = False
    slice_cost_rows: int = 1
    decodes_slowly: bool = False
    is_flat: bool = False
    dropped: tuple[tuple[str, str], ...] = ()
    fingerprint: dict[str, Any]
    origin: dict[str, Any]

    @property
    def n_rows(self) -> int:
        """Rows of all blocks."""
        return int(self.block_rows.sum())

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.block_rows)

    @abc.abstractmethod
    def open_block(self, block: int, start: int = 0, *, piece_rows: int = 16384) -> BlockReader:
        """Open a block for reading from row `start` of it.

        Parameters
        ----------
        block : int
            Index into `block_rows`.
        start : int, default=0
            First row to hand out; may cost a decode of the rows before it.
        piece_rows : int, default=16384
            Hint: the most rows that `BlockReader.read` will be asked for at once (callers may ask for fewer).

        Raises
        ------
        SourceNotFoundError
            If the storage is gone.
        CorruptDataError
            If it cannot be read.
        """

    def open_heads(self, heads: Sequence[tuple[int, int]], *, piece_rows: int) -> Iterator[BlockReader]:
        """Open blocks one after the other, of which no more than their first rows will be read.

        Parameters
        ----------
        heads : sequence of (block, n_rows)
            How many rows of which. Each reader is closed by the caller before it asks for the next.
        piece_rows : int
            Hint: the most rows that will be asked for at once.
        """
        for block, n_rows in heads:
            yield self.open_block(block, piece_rows=min(n_rows, piece_rows))

    @abc.abstractmethod
    def iter_targets(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any, Array | None]]:
        """Read the target and weight columns alone, in file order, in bounded pieces.

        Parameters
        ----------
        start, stop : int
            The first row and the one after the last, counted from the source's first; all rows by default.

        Yields
        ------
        first : int
            The piece's first row, counted from the source's first; a piece may run over the ends of blocks.
        y : ndarray, pyarrow.Array or None
            As in `Slice`.
        weight : ndarray or None
            As in `Slice`.
        """

    @abc.abstractmethod
    def stamp(self) -> dict[str, Any]:
        """Say what the data is at this moment, for what is made of it and kept: a cache.

        Where the fingerprint takes samples, this misses no change, but is not the same wherever the data lies.

        Returns
        -------
        dict of str to JSON value
            The data has changed if an entry differs. Entries that only one of two stamps has say nothing: a copy of the
            data, under other names, is told by the fingerprint.
        """

    @abc.abstractmethod
    def locate(self, block: int, row: int) -> str:
        """Say where row `row` of block `block` lies, for messages (file, row group, row in the file)."""

    def locate_row(self, row: int) -> str:
        """Say where a row lies that is counted from the source's first one, see `locate`."""
        stops = np.cumsum(self.block_rows)
        block = int(np.searchsorted(stops, row, side="right"))
        return self.locate(block, row - int(stops[block] - self.block_rows[block]))

    def flat_rows(self) -> FlatRows | None:
        """Say where the rows lie, for this process; None unless `is_flat`."""
        return None

    def target_piece_rows(self, most: int, n_bytes: int = _TARGET_PIECE_BYTES) -> int:
        """Return the rows of a piece that `iter_targets` reads: so many, and fewer where they take more bytes."""
        n_outputs = 1 if self.target is None else self.target.n_outputs
        return max(1, min(most, n_bytes // (8 * n_outputs)))

    def blocks_of(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """List (block, first, end) of the rows from `start` up to `stop`: which of each block's own rows they are."""
        stops = np.cumsum(self.block_rows)
        starts = stops - self.block_rows
        return [
            (block, max(0, start - int(starts[block])), min(int(self.block_rows[block]), stop - int(starts[block])))
            for block in np.flatnonzero((stops > start) & (starts < stop)).tolist()
        ]

    @property
    def held_bytes(self) -> int:
        """Bytes of rows that this object holds in memory, and that go with it to other processes."""
        return 0

    @property
    def lies_in_files(self) -> bool:
        """Whether other processes open files for the rows: it is no collection, and not all of it goes with it."""
        return self.kind != "dask" and self.held_bytes != self.stored_bytes

    def check_unchanged(self, blocks: Sequence[int]) -> None:  # noqa: B027 - most sources look when they open a file
        """Make sure that the files behind some blocks are those that were opened, wherever this source was sent.

        Raises
        ------
        CorruptDataError
            If one is another, or was changed.
        """

    def get_ready(self) -> None:  # noqa: B027 - only what lies elsewhere has to be made ready
        """Begin with what takes others a moment; called before a run. Only a hint."""

    def let_go(self) -> None:  # noqa: B027 - as above
        """Keep nothing of that any longer than the run."""

    def announce(self, blocks: Sequence[int]) -> None:  # noqa: B027 - only sources that compute can use it
        """Tell which blocks will be opened next, in order, so that a source that computes may begin. Only a hint."""

    def lend(self, n_bytes: int) -> None:  # noqa: B027 - only sources that decode whole what is asked for in parts can
        """Let the source take so much memory, in this process, for what it would have to decode again; 0 takes it back.

        What a plan leaves of the buffer. Only a hint: rows are the same.
        """

    def mixing_hint(self) -> str | None:
        """Say what the user could change so that the blocks mix better, or return None."""
        return None

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Release open handles. Idempotent; the source may be used again afterwards."""

    def feature_label(self, column: int) -> str:
        """Name of feature `column` for messages: its name in quotes, or its number."""
        return f"{self.feature_names[column]!r}" if self.feature_names else f"number {column}"

    def __repr__(self) -> str:
        """Say what the source holds, on one line."""
        return (
            f"<{self.kind} source {self.name!r}: {self.n_rows:,} rows in {self.n_blocks:,} blocks, "
            f"{self.n_features:,} features as {self.row_dtype}>"
        )


def choose_row_dtype(stored: Sequence[np.dtype[Any]], dtype: str) -> np.dtype[Any]:
    """Pick the dtype that rows are trained in.

    Parameters
    ----------
    stored : sequence of numpy.dtype
        What the features are stored as.
    dtype : {"auto", "float32", "float64"}
        ``"auto"`` is float32 unless a feature is float64 or an integer of 32 bits or more, which float32 cannot hold.
    """
    if dtype in ("float32", "float64"):
        return np.dtype(dtype)
    if dtype != "auto":
        raise OptionError(f"dtype={dtype!r}: expected 'auto', 'float32' or 'float64'")
    wide = any(
        (d.kind == "f" and d.itemsize > 4) or (d.kind in "iu" and d.itemsize >= 4) or d.kind not in "fiub"
        for d in stored
    )
    return np.dtype(np.float64 if wide else np.float32)
