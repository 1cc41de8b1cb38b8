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
from typing import Any

import numpy as np
import pyarrow as pa

from streamgd.data.sources.base import Array, BlockReader, Source, TargetInfo, choose_row_dtype
from streamgd.data.sources.buffers import Buffers
from streamgd.data.sources.files import FileSet, data_files, stamp_of
from streamgd.data.sources.parquet_columns import Roles
from streamgd.data.sources.parquet_direct import direct_column
from streamgd.data.sources.parquet_footer import OpenFiles, OpenParquet
from streamgd.data.sources.parquet_pages import open_bytes
from streamgd.data.sources.parquet_rows import open_rows
from streamgd.data.sources.parquet_table import ParquetTable
from streamgd.data.sources.parquet_types import ColumnType
from streamgd.errors import SchemaError

#: Rows of target and weights read at once.
_TARGET_ROWS = 65536
#: Row groups whose page headers are looked at: the biggest of each writer, of so many writers.
_SAMPLED_WRITERS = 8
#: Up to so many files the fingerprint lists each, so that a message can name the one that changed.
_LISTED_FILES = 256
#: Decoded bytes of a row group that mixes well and still is read at full speed, for `ParquetSource.mixing_hint`.
_GOOD_BLOCK_BYTES = 2 << 20


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
        If a footer cannot be read, or contradicts itself.
    DataError
        If a file is encrypted, has its rows elsewhere, or is of types or codecs that are not known here.
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
        self._scratch = Buffers()
        self.open_block_bytes, self.slice_cost_rows = self._open_bytes(table)
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
        self._file_columns = {name: place for place, name in enumerate(table.file_columns)}
        self._types = table.types
        self.block_rows = np.concatenate([info.group_rows for info in infos])
        self._block_group = np.concatenate([info.groups for info in infos])
        self._block_first = np.concatenate([info.group_first for info in infos])
        self._block_file = np.repeat(np.arange(len(infos)), [len(info.groups) for info in infos])
        self.stored_bytes = sum(info.stored_bytes for info in infos)

    def _open_bytes(self, table: ParquetTable) -> tuple[int, int]:
        """Estimate what an open row group costs, and the rows of a page, from the biggest one of each writer."""
        biggest: dict[str, tuple[int, int, int]] = {}
        for file, (_, info) in enumerate(table.kept):
            size, group = info.biggest
            biggest[info.writer] = max(biggest.get(info.writer, (-1, -1, -1)), (size, file, group))
        most, page_rows = 0, 1
        for _, file, group in sorted(biggest.values(), reverse=True)[:_SAMPLED_WRITERS]:
            opened = self.open_file(file)
            chunks = [opened.chunks.chunk(group, place) for place in self._file_columns.values()]
            found = [
                direct_column(chunk, table.types[name]) for name, chunk in zip(table.file_columns, chunks, strict=True)
            ]
            # As `open_rows` reads them: features directly if all can be, and then target and weight if all those can.
            known = {name for name, column in zip(table.file_columns, found, strict=True) if column is not None}
            features = set(self._roles.features)
            rest = set(table.file_columns) - features
            directly = set() if features - known else features | (set() if rest - known else rest)
            direct = [name in directly for name in table.file_columns]
            n_bytes, n_rows = open_bytes(opened.handle, chunks, direct)
            most, page_rows = max(most, n_bytes), max(page_rows, n_rows)
        self.close()
        return most, min(page_rows, int(self.block_rows.max()))

    def open_file(self, file: int) -> OpenParquet:
        """Open a file in this process."""
        # Keyed by process: a forked child must not wait for a lock whose holder was not forked. `setdefault` is atomic.
        files = self._opened.setdefault(os.getpid(), OpenFiles(tuple(self._file_columns)))
        return files.get(self._paths[file], self._digests[file])

    def open_block(self, block: int, start: int = 0, *, piece_rows: int = 16384) -> BlockReader:
        """Open a row group; `start` costs the decoding of the rows before it, in the page that it lies in at least."""
        return open_rows(self, block, start, piece_rows, self._roles.features, self._scratch)

    def iter_targets(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any, Array | None]]:
        """Read the target and weight columns alone."""
        if self.target is None and not self.has_weight:
            return
        most = self.target_piece_rows(_TARGET_ROWS)
        for block, done, end in self.blocks_of(start, self.n_rows if stop is None else stop):
            with open_rows(self, block, done, most, (), self._scratch) as reader:
                while done < end:
                    n, piece = reader.read_some(min(most, end - done))
                    yield start, piece.y, piece.weight
                    done, start = done + n, start + n

    def stamp(self) -> dict[str, Any]:
        """Look at the files; see `Source.stamp`."""
        return stamp_of(self._paths)

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
        self._scratch.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files and memory behind."""
        return {**self.__dict__, "_opened": {}, "_scratch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with none."""
        self.__dict__.update(state, _scratch=Buffers())

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
