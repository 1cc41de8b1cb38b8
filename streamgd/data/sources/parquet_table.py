"""What the footers of all files of a Parquet table say together: which files have rows, which columns are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from streamgd.data.sources.parquet_chunks import Footer
from streamgd.data.sources.parquet_columns import (
    Partitions,
    Roles,
    choose_columns,
    read_partitions,
    refuse_null_partitions,
)
from streamgd.data.sources.parquet_footer import (
    FileInfo,
    Layout,
    check_agreement,
    describe_file,
    read_footer,
    shown,
    sound_footer,
)
from streamgd.data.sources.parquet_types import ColumnType
from streamgd.errors import EmptySourceError, NonFiniteError, SchemaError

#: Threads that read footers, and up to how many files none are needed.
_FOOTER_THREADS, _FEW_FILES = 16, 4


class ParquetTable:
    """The files with rows, and the columns that are read.

    Attributes
    ----------
    paths : tuple of str
        All files.
    kept : list of (int, FileInfo)
        Those with rows: number in `paths`, and what is known of it.
    roles : Roles
        Features, target and weight.
    types : dict of str to ColumnType
        Of every column that is read, the widest where files differ.
    file_columns : tuple of str
        Columns that are read from the files.
    partitions : Partitions
        Columns that lie in the files' names.
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        relatives: list[str],
        target: str | Sequence[str] | None,
        features: Sequence[str] | None,
        weight: str | None,
    ) -> None:
        self.paths = paths
        self._first, self._first_footer = _first_with_rows(paths)
        with sound_footer(paths[self._first]):
            layout = Layout(self._first_footer.metadata)
        self.partitions: Partitions = read_partitions(relatives)
        # A column in the files themselves goes before a partition of the same name.
        partition_types = {k: t for k, t in self.partitions.types.items() if k not in layout.leaves}
        self.roles: Roles = choose_columns(paths[self._first], layout, partition_types, target, features, weight)
        used = self.roles.used
        self.file_columns: tuple[str, ...] = tuple(name for name in used if name in layout.leaves)
        self.types: dict[str, ColumnType] = partition_types | {n: layout.leaves[n].type for n in self.file_columns}
        self._strict_names = features is None
        self.kept: list[tuple[int, FileInfo]] = []
        for i, info in enumerate(self._describe_all(layout)):
            if len(info.groups):
                self.kept.append((i, info))
        del self._first_footer  # can be big
        self._refuse_nulls(relatives)
        refuse_null_partitions([relatives[i] for i, _ in self.kept], [n for n in used if n in partition_types])

    def _describe_all(self, layout: Layout) -> Iterator[FileInfo]:
        """Describe every file, reading ahead in threads where there are many."""
        if len(self.paths) <= _FEW_FILES:
            for path in self.paths:
                yield self._describe(path, layout, self._footer(path))
            return
        with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="streamgd-footer") as pool:
            for start in range(0, len(self.paths), 4 * _FOOTER_THREADS):  # bounds the footers held at once
                group = self.paths[start : start + 4 * _FOOTER_THREADS]
                for path, footer in zip(group, pool.map(self._footer, group), strict=True):
                    yield self._describe(path, layout, footer)

    def _footer(self, path: str) -> Footer:
        return self._first_footer if path == self.paths[self._first] else read_footer(path)

    def _describe(self, path: str, layout: Layout, footer: Footer) -> FileInfo:
        with sound_footer(path):
            return self._checked(path, layout, footer)

    def _checked(self, path: str, layout: Layout, footer: Footer) -> FileInfo:
        if not footer.metadata.num_rows:  # its types may be anything: there was nothing to tell them from
            return describe_file(path, footer, layout, ())
        first = self.paths[self._first]
        own = layout if path == first else Layout(footer.metadata)
        check_agreement(path, own, self.file_columns, first, self.types)
        extra = [repr(name) for name in own.names if name not in layout.leaves and name not in own.index_names]
        if self._strict_names and extra:
            raise SchemaError(
                f"{path!r} has columns that {first!r} has not: {shown(extra)}. Name the columns that all files "
                "share with features=[...], or leave the file out"
            )
        return describe_file(path, footer, own, self.file_columns)

    def _refuse_nulls(self, relatives: list[str]) -> None:
        found: dict[str, str] = {}
        for i, info in self.kept:
            for name, group, n_nulls in info.nulls:
                found.setdefault(name, f"{name!r} ({n_nulls:,} in {relatives[i]!r}, row group {group})")
        if found:
            raise NonFiniteError(
                f"{len(found)} of the columns that are used have missing values (nulls; pandas writes NaN so): "
                f"{shown(list(found.values()))}. Leave these rows or columns out, or fill them in before writing the "
                "file"
            )


def _first_with_rows(paths: tuple[str, ...]) -> tuple[int, Footer]:
    """Find the first file with rows; those without may have been written with any types."""
    for i, path in enumerate(paths):
        footer = read_footer(path)
        if footer.metadata.num_rows:
            return i, footer
    raise EmptySourceError(f"{_named(paths)}: no file has rows; expected at least one row")


def _named(paths: Sequence[str]) -> str:
    return repr(paths[0]) if len(paths) == 1 else f"{paths[0]!r} and {len(paths) - 1} more"
