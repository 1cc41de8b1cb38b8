"""Parquet files and folders as a source.

A block is a row group. It is decoded slice by slice by one iterator that stays open, never as a whole, so that row
groups may be far bigger than the memory they are read in. `parquet_table` gathers what the footers say, `parquet_pages`
estimates the memory; here rows are read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from streamgd.data.sources.arrow_columns import BatchLayout
from streamgd.data.sources.base import Array, BlockReader, Columns, Slice, Source, TargetInfo, choose_row_dtype
from streamgd.data.sources.files import FileSet, data_files
from streamgd.data.sources.parquet_columns import Roles
from streamgd.data.sources.parquet_footer import Layout, OpenFiles
from streamgd.data.sources.parquet_pages import STREAM_BYTES, chunk_of, open_bytes
from streamgd.data.sources.parquet_table import ParquetTable
from streamgd.data.sources.parquet_types import ColumnType, to_numbers
from streamgd.errors import CorruptDataError, DataError, NonFiniteError, SchemaError

#: Rows of target and weights read at once.
_TARGET_ROWS = 65536
#: Row groups whose page headers are looked at: the biggest of each writer, of so many writers.
_SAMPLED_WRITERS = 8
#: Blocks that cost at least this much give their memory back to the system when closed: Arrow's allocator keeps it
#: else, and the next block may not fit into the pieces (measured, one block open: a peak of 123 MB instead of 159 MB).
_RELEASED_BYTES = 8 << 20
#: Up to so many files the fingerprint lists each, so that a message can name the one that changed.
_LISTED_FILES = 256
#: Decoded bytes of a row group that mixes well and still is read at full speed, for `ParquetSource.mixing_hint`.
_GOOD_BLOCK_BYTES = 2 << 20
_READ_ERRORS = (OSError, RuntimeError, ValueError, pa.ArrowException)


class ParquetSource(Source):
    """One or several Parquet files, with hive partitions if they lie in folders named ``key=value``.

    Parameters
    ----------
    paths : path-like, sequence of path-like, or FileSet
        Files, folders or patterns, see `streamgd.data.sources.files.find_files`. Files and row groups without rows are
        passed over.
    target : str, sequence of str or None, default=None
        Target column, or columns of numbers for several outputs. Any type that can hold classes will do for one.
    features : sequence of str or None, default=None
        Feature columns: numbers, booleans, decimals, or dictionaries of these. Default: every column that is neither
        target nor weight nor the pandas index; partition columns come last.
    weight : str or None, default=None
        Column of sample weights.
    dtype : {"auto", "float32", "float64"}, default="auto"
        Row dtype, see `streamgd.data.sources.base.choose_row_dtype`.

    Raises
    ------
    SourceNotFoundError
        If a file or a column is not there.
    SchemaError
        If columns cannot be used, or differ between files in more than their width.
    NonFiniteError
        If a footer tells of nulls in a column that is used.
    CorruptDataError
        If a footer cannot be read.
    EmptySourceError
        If there are no rows.
    OptionError
        If `dtype` is unknown or a column would be used twice.

    Notes
    -----
    Targets that are not numbers come as `pyarrow.Array`, those of strings with a dictionary: each slice maps its few
    classes once instead of every row.

    The fingerprint holds the size of each file and a hash of its footer (which has schema, statistics and the place of
    every page), names relative to the common root if there are several, and the columns that are used.
    """

    kind = "parquet"

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | FileSet,
        target: str | Sequence[str] | None = None,
        features: Sequence[str] | None = None,
        weight: str | None = None,
        dtype: str = "auto",
    ) -> None:
        kind, files = data_files(paths)
        if kind != "parquet":
            raise SchemaError(f"{str(files.paths[0])!r} is {kind}, not Parquet; open it with streamgd.open_source")
        relatives = [files.relative(path) for path in files.paths]
        self.name = files.paths[0].name if len(files.paths) == 1 else files.root.name
        table = ParquetTable(tuple(map(str, files.paths)), relatives, target, features, weight)
        self._set_files(table, relatives)
        roles = self._roles = table.roles
        types = table.types
        self.n_features = len(roles.features)
        self.feature_names = roles.features
        self.feature_dtypes = tuple(types[name].text for name in roles.features)
        self.row_dtype = choose_row_dtype([_number(types[name]) for name in roles.features], dtype)
        self.target = _target_info(roles, types, target)
        self.has_weight = roles.weight is not None
        self.dropped = roles.dropped
        self._opened: dict[int, OpenFiles] = {}
        self.open_block_bytes = self._open_bytes(table)
        self.fingerprint = self._make_fingerprint(table)
        self.origin = {
            "kind": self.kind,
            "data": files.spec,
            "target": target if target is None or isinstance(target, str) else list(target),
            "features": None if features is None else list(roles.features),
            "weight": weight,
            "dtype": dtype,
        }

    def _set_files(self, table: ParquetTable, relatives: list[str]) -> None:
        """Lay the row groups of all files out as blocks."""
        kept = table.kept
        infos = [info for _, info in kept]
        self._paths = tuple(table.paths[i] for i, _ in kept)
        self._relatives = tuple(relatives[i] for i, _ in kept)
        self._digests = tuple(info.digest for info in infos)
        self._values = tuple(table.partitions.values[i] for i, _ in kept)
        self._dictionary_columns = [n for n in table.file_columns if table.types[n].text in ("string", "binary")]
        self._file_columns = frozenset(table.file_columns)
        self._types = table.types
        self.block_rows = np.concatenate([info.group_rows for info in infos])
        self._block_group = np.concatenate([info.groups for info in infos])
        self._block_first = np.concatenate([info.group_first for info in infos])
        self._block_file = np.repeat(np.arange(len(infos)), [len(info.groups) for info in infos])
        self.stored_bytes = sum(info.stored_bytes for info in infos)

    def _open_bytes(self, table: ParquetTable) -> int:
        """Estimate what an open row group costs from the pages of the biggest one of each writer."""
        biggest: dict[str, tuple[int, int, int]] = {}
        for file, (_, info) in enumerate(table.kept):
            size, group = info.biggest
            biggest[info.writer] = max(biggest.get(info.writer, (-1, -1, -1)), (size, file, group))
        most = 0
        for _, file, group in sorted(biggest.values(), reverse=True)[:_SAMPLED_WRITERS]:
            handle, metadata = self.open_file(file)
            row_group = metadata.row_group(group)
            leaves = Layout(metadata).leaves
            chunks = [chunk_of(row_group.column(leaves[name].number)) for name in table.file_columns]
            most = max(most, open_bytes(handle, chunks))
        self.close()
        return most

    def open_file(self, file: int) -> tuple[Any, Any]:
        """Open a file in this process; return its handle and its metadata."""
        # Keyed by process: a forked child must not wait for a lock whose holder was not forked. `setdefault` is atomic.
        return self._opened.setdefault(os.getpid(), OpenFiles()).get(self._paths[file], self._digests[file])

    def open_block(self, block: int, start: int = 0, *, piece_rows: int = 16384) -> BlockReader:
        """Open a row group; `start` costs the decoding of the rows before it."""
        return _Reader(self, block, start, piece_rows, self._roles.features)

    def iter_targets(self) -> Iterator[tuple[int, Any, Array | None]]:
        """Read the target and weight columns alone, 65,536 rows at a time."""
        if self.target is None and not self.has_weight:
            return
        first = 0
        for block, n_rows in enumerate(self.block_rows.tolist()):
            with _Reader(self, block, 0, _TARGET_ROWS, ()) as reader:
                for start in range(0, n_rows, _TARGET_ROWS):
                    piece = reader.read(min(_TARGET_ROWS, n_rows - start))
                    yield first + start, piece.y, piece.weight
            first += n_rows

    def locate(self, block: int, row: int) -> str:
        """Name file, row group and row within the file, both counted from 0."""
        group, first = int(self._block_group[block]), int(self._block_first[block])
        return f"{self._name_of(block)}, row group {group}, row {first + row:,} of the file (counted from 0)"

    def _name_of(self, block: int) -> str:
        file = int(self._block_file[block])
        return self._relatives[file] if len(self._relatives) > 1 else Path(self._paths[file]).name

    def mixing_hint(self) -> str | None:
        """Advise smaller row groups where a few hold much of the data."""
        biggest = int(self.block_rows.max())
        row_bytes = max(1, self.n_features * self.row_dtype.itemsize)
        good = 1 << int(np.log2(min(max(_GOOD_BLOCK_BYTES // row_bytes, 1024), 1 << 17)))
        if biggest < 4 * good or biggest * 1000 < self.n_rows:
            return None
        return (
            f"row groups hold up to {biggest:,} rows ({biggest / self.n_rows:.1%} of the data), so that few can be "
            f"open at once; written again with row_group_size={good} (pyarrow.parquet.write_table or "
            "ParquetWriter.write_table) many more would be"
        )

    def close(self) -> None:
        """Let go of open files, and of memory that Arrow holds in reserve."""
        opened = self._opened.pop(os.getpid(), None)
        if opened is not None:
            opened.close()
            pa.default_memory_pool().release_unused()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind."""
        return {**self.__dict__, "_opened": {}}

    def _make_fingerprint(self, table: ParquetTable) -> dict[str, Any]:
        several = len(self._paths) > 1
        files = []
        for relative, (_, info) in zip(self._relatives, table.kept, strict=True):
            # A single file may be renamed, but the partition it lies in is data.
            place = relative if several else "/".join(part for part in relative.split("/")[:-1] if "=" in part)
            files.append(f"{place} {info.size} {info.digest}".strip())
        digest = hashlib.blake2b("\n".join(files).encode(), digest_size=16).hexdigest()
        roles = self._roles
        return {
            "kind": self.kind,
            "n_rows": self.n_rows,
            "features": list(roles.features),
            "feature_dtypes": sorted(set(self.feature_dtypes)),
            "target": None if self.target is None else [self.target.name, self.target.dtype, self.target.n_outputs],
            "weight": roles.weight,
            "n_files": len(files),
            "files": files if len(files) <= _LISTED_FILES else digest,
        }


class _Reader(BlockReader):
    """One row group, or some columns of it, as slices."""

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
        handle, metadata = source.open_file(int(source._block_file[self._block]))
        text = [name for name in source._dictionary_columns if name in self._from_file]
        try:
            file = pq.ParquetFile(
                handle,
                metadata=metadata,
                buffer_size=STREAM_BYTES,
                pre_buffer=False,  # else the whole row group is read at once
                read_dictionary=text,
                page_checksum_verification=True,  # where a writer left checksums; damage may pass unnoticed else
            )
            group = int(source._block_group[self._block])
            found: Iterator[Any] = file.iter_batches(
                self._piece_rows, row_groups=[group], columns=self._from_file, use_threads=False
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
            in_file = batch is not None and self._source._file_columns.issuperset(self._features)
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
        return batch, batch.num_rows

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
        return values if source._types[name].number is None else to_numbers(values)

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


def _number(kind: ColumnType) -> np.dtype[Any]:
    assert kind.number is not None  # features are checked to be numbers
    return kind.number


def _target_info(roles: Roles, types: dict[str, ColumnType], target: str | Sequence[str] | None) -> TargetInfo | None:
    if not roles.outputs:
        return None
    kinds = [types[name] for name in roles.outputs]
    texts = list(dict.fromkeys(kind.text for kind in kinds))
    return TargetInfo(
        name=", ".join(roles.outputs),
        n_outputs=len(kinds),
        dtype=", ".join(texts),
        numeric=all(kind.number is not None for kind in kinds),
        is_vector=isinstance(target, str),
    )
