"""Rows out of a Parquet row group: page by page where its columns are plain numbers, else by Arrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from streamgd.data.sources.arrow_columns import BatchLayout
from streamgd.data.sources.base import Array, BlockReader, Columns, Slice
from streamgd.data.sources.buffers import Buffers
from streamgd.data.sources.parquet_direct import DirectColumn, DirectRows, UndecodableError, direct_column
from streamgd.data.sources.parquet_pages import STREAM_BYTES
from streamgd.data.sources.parquet_types import as_stored, first_not_text, to_numbers
from streamgd.errors import CorruptDataError, DataError, NonFiniteError

if TYPE_CHECKING:
    from streamgd.data.sources.parquet import ParquetSource

#: Blocks that cost at least this much give their memory back to the system when closed: Arrow's allocator keeps it
#: else, and the next block may not fit into the pieces (measured, one block open: a peak of 123 MB instead of 159 MB).
_RELEASED_BYTES = 8 << 20
#: Encodings of text that Arrow cannot make dictionaries of: lengths, or texts, as differences.
_WITHOUT_DICTIONARY = 1 << 6 | 1 << 7
_READ_ERRORS = (OSError, RuntimeError, ValueError, pa.ArrowException)


def open_rows(
    source: ParquetSource, block: int, start: int, piece_rows: int, features: tuple[str, ...], scratch: Buffers
) -> BlockReader:
    """Open a row group from a row on: some features, target and weight."""
    wanted = (*features, *_rest_of(source))
    if source._file_columns.keys().isdisjoint(wanted):
        return ArrowReader(source, block, start, piece_rows, features)
    opened = source.open_file(int(source._block_file[block]))
    group = int(source._block_group[block])

    def described(names: Sequence[str]) -> list[DirectColumn] | None:
        if not source._file_columns.keys() >= set(names):
            return None
        chunks = ((name, opened.chunks.chunk(group, source._file_columns[name])) for name in names)
        found = [direct_column(chunk, source._types[name]) for name, chunk in chunks]
        return None if None in found else [column for column in found if column is not None]

    columns, rest = described(features), described(_rest_of(source))
    if columns is None or (not features and rest is None):
        return ArrowReader(source, block, start, piece_rows, features)
    rows = DirectRows(opened.file, [*columns, *(rest or [])], start, scratch)
    return DirectReader(source, block, start, piece_rows, features, rows)


def _rest_of(source: ParquetSource) -> tuple[str, ...]:
    """Names of the target and weight columns."""
    roles = source._roles
    return (*roles.outputs, *(() if roles.weight is None else (roles.weight,)))


class DirectReader(BlockReader):
    """One row group whose features are plain numbers, page by page; Arrow goes on where that fails.

    Parameters
    ----------
    source : ParquetSource
        What is read.
    block, start, piece_rows : int
        See `Source.open_block`.
    features : tuple of str
        Names of the features.
    rows : DirectRows
        The features; and target and weight, unless Arrow has to read them.
    """

    def __init__(
        self,
        source: ParquetSource,
        block: int,
        start: int,
        piece_rows: int,
        features: tuple[str, ...],
        rows: DirectRows,
    ) -> None:
        self._source, self._block, self._piece_rows, self._next = source, block, piece_rows, start
        self._features = features
        self._rows: DirectRows | None = rows
        by_arrow = rows.n_columns == len(features) and len(_rest_of(source)) > 0
        self._rest = ArrowReader(source, block, start, piece_rows, ()) if by_arrow else None
        self._arrow: ArrowReader | None = None

    def read(self, n_rows: int) -> Slice:
        """Return the next rows; copies where they do not lie together, see `read_some`."""
        parts: list[Slice] = []
        while n_rows:
            n, part = self.read_some(n_rows)
            n_rows -= n
            parts.append(part if n_rows == 0 and not parts else _copied(part))
        if len(parts) == 1:
            return parts[0]
        X = [_joined(pieces) for pieces in zip(*(part.X for part in parts), strict=True)]
        y, weight = (
            None if column[0] is None else _joined(column)
            for column in ([part.y for part in parts], [part.weight for part in parts])
        )
        return Slice(Columns(X) if X else (), y, weight)

    def read_some(self, n_rows: int) -> tuple[int, Slice]:
        """Return the next rows that lie together, see `BlockReader.read_some`."""
        if self._arrow is None:
            if self._rows is None:
                raise ValueError("read from a closed block")
            try:
                n, held = self._rows.read(n_rows)
            except UndecodableError:
                self.close()
                self._arrow = ArrowReader(self._source, self._block, self._next, self._piece_rows, self._features)
            else:
                self._next += n
                X = held.columns(0, len(self._features)) if self._features else ()
                if self._rest is not None:
                    _, y, weight = self._rest.read(n)
                    return n, Slice(X, y, weight)
                return n, Slice(X, *self._numbers([held.array(i) for i in range(len(self._features), held.n_columns)]))
        return n_rows, self._arrow.read(n_rows)

    def _numbers(self, rest: list[Array]) -> tuple[Array | None, Array | None]:
        """Return target and weight out of their columns."""
        info = self._source.target
        weight = rest.pop() if self._source.has_weight else None
        if info is None:
            return None, weight
        return rest[0] if info.is_vector else np.column_stack(rest), weight

    def close(self) -> None:
        """Let go of the row group."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None
        for reader in (self._rest, self._arrow):
            if reader is not None:
                reader.close()


def _copied(part: Slice) -> Slice:
    """Keep what would not stay when more is read."""
    X = [np.array(column) for column in part.X]
    y = np.array(part.y) if isinstance(part.y, np.ndarray) else part.y  # Arrow's arrays stay
    return Slice(X, y, None if part.weight is None else np.array(part.weight))


class ArrowReader(BlockReader):
    """One row group, or some columns of it, as Arrow decodes it."""

    def __init__(
        self, source: ParquetSource, block: int, start: int, piece_rows: int, features: tuple[str, ...]
    ) -> None:
        self._source = source
        self._block = block
        self._features = features
        roles = source._roles
        self._names = (*features, *roles.outputs, *(() if roles.weight is None else (roles.weight,)))
        self._from_file = [name for name in self._names if name in source._file_columns]
        self._values = source._values[int(source._block_file[block])]
        self._n_rows = int(source.block_rows[block])
        self._piece_rows = max(1, min(piece_rows, self._n_rows))
        self._batches: Iterator[Any] | None = self._open() if self._from_file else None
        self._features_read: Columns | None = None
        self._rest: list[Any] = []  # target and weight columns
        self._have = self._at = 0  # rows that are decoded, and how many of them are handed out
        self._next = 0  # row of the block with which the next batch begins
        self._skip = start
        self._layout: BatchLayout | Literal[False] | None = None  # known with the first batch; False: not in the file

    def _open(self) -> Iterator[Any]:
        source = self._source
        opened = source.open_file(int(source._block_file[self._block]))
        group = int(source._block_group[self._block])
        text = [
            name
            for name in source._dictionary_columns
            if name in self._from_file
            and not opened.chunks.chunk(group, source._file_columns[name]).encodings & _WITHOUT_DICTIONARY
        ]
        try:
            file = pq.ParquetFile(
                opened.handle,
                metadata=opened.footer.with_group(group),
                buffer_size=STREAM_BYTES,
                pre_buffer=False,  # else the whole row group is read at once
                read_dictionary=text,
                page_checksum_verification=True,  # where a writer left checksums; damage may pass unnoticed else
            )
            found: Iterator[Any] = file.iter_batches(
                self._piece_rows, row_groups=[0], columns=self._from_file, use_threads=False
            )
        except _READ_ERRORS as err:
            raise self._read_error(err, 0) from err
        return found

    def read(self, n_rows: int) -> Slice:
        """Return the next rows; views of Arrow's memory where they lie in one batch, as in pieces of `piece_rows`."""
        parts: list[tuple[Columns | None, list[Any]]] = []
        while n_rows:
            if self._at == self._have:
                self._load()
            take = min(n_rows, self._have - self._at)
            if take == self._have:
                parts.append((self._features_read, self._rest))
            else:
                first, stop = self._at, self._at + take
                features = None if self._features_read is None else self._features_read.rows(first, stop)
                parts.append((features, [column[first:stop] for column in self._rest]))
            self._at += take
            n_rows -= take
        if len(parts) == 1:
            return self._slice(*parts[0])
        joined = [_joined(pieces) for pieces in zip(*(part[0] or () for part in parts), strict=True)]
        return self._slice(
            Columns(joined) if joined else None,
            [_joined(pieces) for pieces in zip(*(part[1] for part in parts), strict=True)],
        )

    def _slice(self, features: Columns | None, rest: list[Any]) -> Slice:
        info = self._source.target
        rest = list(rest)
        weight = rest.pop() if self._source.has_weight else None
        X: Sequence[Array] = () if features is None else features
        if info is None:
            return Slice(X, None, weight)
        return Slice(X, rest[0] if info.is_vector else np.column_stack(rest), weight)

    def _load(self) -> None:
        """Decode the next batch; rows to be skipped are dropped before they are converted."""
        self._features_read, self._rest = None, []
        while True:
            batch, n = self._next_batch()
            self._next += n
            if self._next > self._skip:
                break
        before = max(0, self._skip - (self._next - n))
        if batch is not None and before:
            batch = batch.slice(before)
        self._have, self._at = n - before, 0
        n = len(self._features)
        self._rest = [self._column(name, batch) for name in self._names[n:]]
        self._features_read = self._columns_of(batch) if n else None

    def _columns_of(self, batch: Any) -> Columns:
        """Return the features of a batch: all at once where they are plain numbers, else one by one."""
        if self._layout is None:
            in_file = batch is not None and self._source._file_columns.keys() >= set(self._features)
            self._layout = BatchLayout(batch.schema, self._features) if in_file else False
        found = self._layout.find(batch) if self._layout and self._layout.plain else None
        return Columns([self._column(name, batch) for name in self._features]) if found is None else found

    def _next_batch(self) -> tuple[Any, int]:
        if not self._from_file:  # partition columns only
            return None, min(self._piece_rows, self._n_rows - self._next)
        if self._batches is None:
            raise ValueError("read from a closed block")
        try:
            batch = next(self._batches)
        except StopIteration:
            raise CorruptDataError(
                f"{self._source.locate(self._block, 0)}: the row group ends after {self._next:,} of {self._n_rows:,} "
                "rows; the file is damaged, write it again or leave it out"
            ) from None
        except _READ_ERRORS as err:
            raise self._read_error(err, self._next) from err
        return as_stored(batch), batch.num_rows

    def _column(self, name: str, batch: Any) -> Any:
        source = self._source
        if name not in source._file_columns:
            value, kind = self._values[name], source._types[name]
            if kind.number is None:
                return pa.DictionaryArray.from_arrays(pa.array(np.zeros(self._have, np.int32)), pa.array([value]))
            return np.full(self._have, value, kind.number)
        values = batch.column(batch.schema.get_field_index(name))
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            place = source.locate(self._block, self._next - self._have + row)
            raise NonFiniteError(
                f"column {name!r} has a missing value (null) in {place}; leave such rows or the column out, or fill "
                "them in before writing the file"
            )
        if source._types[name].number is not None:
            return to_numbers(values)
        bad = first_not_text(values)
        if bad is not None:
            place = source.locate(self._block, max(0, self._next - self._have + bad))
            if bad < 0:  # of a later row, or of none
                place = place.rpartition(", row ")[0]
            raise DataError(f"column {name!r} holds text that is not UTF-8, in {place}; write it again as UTF-8")
        return values

    def _read_error(self, err: BaseException, row: int) -> DataError:
        place = self._source.locate(self._block, row)
        path = self._source._paths[int(self._source._block_file[self._block])]
        if isinstance(err, pa.ArrowNotImplementedError):
            return DataError(
                f"{path!r} cannot be read by this pyarrow: {err}. Write it again with another codec (zstd)"
            )
        if "crypt" in str(err).lower():
            return DataError(f"{path!r} is encrypted, which streamgd does not support; write it again without: {err}")
        last = min(row + self._piece_rows, self._n_rows) - row - 1
        return CorruptDataError(
            f"{path!r} cannot be decoded at {place}, or in the {last:,} rows after it: {err}. The file is damaged; "
            "copy or write it again, or leave it out"
        )

    def close(self) -> None:
        """Let go of the row group."""
        if self._batches is None and not self._have:
            return
        self._batches, self._features_read, self._rest, self._have, self._at = None, None, [], 0, 0
        if self._source.open_block_bytes >= _RELEASED_BYTES:
            pa.default_memory_pool().release_unused()


def _joined(pieces: Sequence[Any]) -> Any:
    return np.concatenate(pieces) if isinstance(pieces[0], np.ndarray) else pa.concat_arrays(pieces)
