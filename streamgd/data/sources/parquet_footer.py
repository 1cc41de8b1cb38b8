"""Parquet footers: what a file says of itself, read once and checked; and files kept open while they are read."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streamgd.data.sources.mapped import OpenFile
from streamgd.data.sources.parquet_chunks import ChunkTable, Footer
from streamgd.data.sources.parquet_types import ColumnType, column_type, stored_type
from streamgd.errors import CorruptDataError, DataError, SchemaError, SourceNotFoundError, StreamgdError

_MAGIC, _ENCRYPTED_MAGIC = b"PAR1", b"PARE"
#: Read from the end of a file at once; holds most footers whole.
_TAIL_BYTES = 1 << 16
#: Files kept open at once, each twice (most systems allow a process 1,024), and bytes of what is kept of their footers.
_OPEN_FILES = 64
_OPEN_FOOTER_BYTES = 32 << 20


def read_footer(path: str) -> Footer:
    """Read the footer of one file, in one read for most.

    Raises
    ------
    SourceNotFoundError
        If the file is not there.
    CorruptDataError
        If it is no whole Parquet file.
    DataError
        If it is encrypted or may not be read.
    """
    try:
        with Path(path).open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
            length = int.from_bytes(tail[-8:-4], "little") + 8
            whole = size >= 12 and tail[-4:] == _MAGIC and length + 4 <= size
            if whole and length > len(tail):
                file.seek(size - length)
                tail = file.read()
    except FileNotFoundError as err:
        raise SourceNotFoundError(f"the file {path!r} is gone; put it back, or open the source anew") from err
    except OSError as err:
        raise DataError(f"cannot read {path!r}: {err.strerror}") from err
    if tail[-4:] == _ENCRYPTED_MAGIC:
        raise DataError(f"{path!r} is encrypted, which streamgd does not support; write it again without encryption")
    if not whole:
        if not tail:
            found = "is empty (0 bytes)"
        elif tail[-4:] != _MAGIC:
            found = f"ends in {tail[-4:]!r} where {_MAGIC!r} must stand"
        else:
            found = f"has {size:,} bytes, fewer than the {length + 4:,} that it says its footer takes"
        raise CorruptDataError(
            f"{path!r} is no whole Parquet file: it {found}. It was cut short, or is still being written; copy or "
            "write it again, or leave it out"
        )
    footer = tail[-length:]
    with sound_footer(path):
        return Footer.read(path, size, hashlib.blake2b(footer, digest_size=16).hexdigest(), footer[:-8])


@contextlib.contextmanager
def sound_footer(path: str) -> Iterator[None]:
    """Report what goes wrong in reading a footer as damage to the file."""
    try:
        yield
    except StreamgdError:
        raise
    except pa.ArrowNotImplementedError as err:
        raise DataError(
            f"{path!r} cannot be read by this pyarrow: {err}. Leave the file out, or write it again with other types"
        ) from err
    except (OSError, ValueError, RuntimeError, OverflowError, pa.ArrowException) as err:
        raise CorruptDataError(
            f"the footer of {path!r} cannot be read: {err}. The file is damaged; copy or write it again, or leave it "
            "out"
        ) from err


class Leaf(NamedTuple):
    """A column of a file: its number among the leaves of the schema, and its type."""

    number: int
    type: ColumnType


class Layout:
    """The columns of one file, by name.

    Attributes
    ----------
    names : list of str
        Top-level columns in order.
    repeated : set of str
        Names that occur more than once.
    leaves : dict of str to Leaf
        The columns that a name leads to; nested ones have the number of their first leaf.
    index_names : set of str
        Columns that pandas stored as the index.
    """

    def __init__(self, metadata: Any) -> None:
        schema = metadata.schema.to_arrow_schema()
        self.names: list[str] = schema.names
        self.leaves: dict[str, Leaf] = {}
        self.repeated = {name for name, n in Counter(self.names).items() if n > 1}
        at = 0
        for field in schema:
            self.leaves[field.name] = Leaf(at, column_type(stored_type(field.type)))
            at += _n_leaves(field.type)
        if at != metadata.num_columns:
            raise SchemaError(
                f"the schema has {at} columns, nested ones counted, and the file {metadata.num_columns}: it has a type "
                "that is not known here. Write the file again without it"
            )
        stored = (schema.pandas_metadata or {}).get("index_columns", [])
        self.index_names = {name for name in stored if isinstance(name, str)}


def _n_leaves(arrow: pa.DataType) -> int:
    """Count the Parquet columns behind an Arrow type."""
    arrow = stored_type(arrow)
    if pa.types.is_nested(arrow) and arrow.num_fields:
        return sum(_n_leaves(arrow.field(i).type) for i in range(arrow.num_fields))
    return 1


class NullCount(NamedTuple):
    """Nulls that a footer tells of."""

    column: str
    group: int
    n_nulls: int


@dataclass(frozen=True)
class FileInfo:
    """What is kept of one file.

    Attributes
    ----------
    size, digest
        As in `Footer`.
    groups, group_rows, group_first : ndarray of int64
        Row groups with rows: their number, rows, and first row within the file.
    stored_bytes : int
        Compressed bytes of the columns that are read.
    biggest : tuple of int
        Uncompressed bytes of the biggest row group, and its number.
    writer : str
        Who wrote the file, and how: files of one writer have pages of similar size.
    nulls : tuple of NullCount
        Nulls in the columns that are read, at most one entry for each.
    """

    size: int
    digest: str
    groups: NDArray[np.int64]
    group_rows: NDArray[np.int64]
    group_first: NDArray[np.int64]
    stored_bytes: int
    biggest: tuple[int, int]
    writer: str
    nulls: tuple[NullCount, ...]


def describe_file(path: str, footer: Footer, layout: Layout, columns: tuple[str, ...]) -> FileInfo:
    """Keep of a footer what reading the named columns takes."""
    table = ChunkTable(path, footer, [layout.leaves[name].number for name in columns])
    rows = table.rows
    groups = np.flatnonzero(rows).astype(np.int64)
    stored, decoded = table.n_bytes
    biggest = max(zip(decoded[groups].tolist(), groups.tolist(), strict=True), default=(-1, -1))
    nulls: dict[str, NullCount] = {}
    for group, column in np.argwhere(table.n_nulls > 0).tolist():
        nulls.setdefault(columns[column], NullCount(columns[column], group, int(table.n_nulls[group, column])))
    return FileInfo(
        footer.size,
        footer.digest,
        groups,
        rows[groups],
        (np.cumsum(rows) - rows)[groups],
        int(stored[groups].sum()),
        biggest,
        f"{footer.metadata.created_by} {table.chunk(int(groups[0]), 0).codec}" if len(groups) and columns else "",
        tuple(nulls.values()),
    )


def check_agreement(
    path: str, layout: Layout, columns: tuple[str, ...], first_path: str, found: dict[str, ColumnType]
) -> None:
    """Hold a file's columns against those of the files before it; `found` is widened where only the width differs.

    Raises
    ------
    SchemaError
        If a column is missing or of another type; the file and all such columns are named.
    """
    differences = []
    for name in columns:
        leaf = layout.leaves.get(name)
        if leaf is None:
            differences.append(f"{name!r} is missing")
        elif name in layout.repeated:
            differences.append(f"{name!r} occurs more than once")
        elif leaf.type.family != found[name].family:
            differences.append(f"{name!r} is {leaf.type.text} instead of {found[name].text}")
        else:
            found[name] = found[name].widest(leaf.type)
    if differences:
        raise SchemaError(
            f"the columns of {path!r} disagree with those of {first_path!r}: {shown(differences)}. Only widths may "
            "differ (int32 and int64, float32 and float64); write the file again with the same types, name the columns "
            "that all files share with features=[...], or leave the file out"
        )


def shown(items: list[str], limit: int = 20) -> str:
    """List items for a message, cut short if they are many."""
    listed = ", ".join(items[:limit])
    return listed if len(items) <= limit else f"{listed}, … ({len(items)} in all)"


class OpenParquet(NamedTuple):
    """A file that is open: for Arrow, with the footer as it wants that; and to be read page by page.

    Arrow's own handle does not tell its descriptor in pyarrow 16 to 24.
    """

    handle: Any
    footer: Footer
    file: OpenFile
    chunks: ChunkTable

    @property
    def held_bytes(self) -> int:
        """Bytes of what is known of the row groups."""
        return len(self.footer.content) + self.chunks.held_bytes


class OpenFiles:
    """Files open in this process, each with its footer parsed once; the least recently used are let go.

    A footer of thousands of row groups takes longer to parse than a row group to read, so that it must not be parsed
    for every block. Handles are closed when the last reader lets go of them; reading at an offset is safe from any
    thread.

    Parameters
    ----------
    columns : sequence of str
        The columns that are read.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = columns
        self._lock = threading.Lock()
        self._held: OrderedDict[str, OpenParquet] = OrderedDict()

    def get(self, path: str, digest: str) -> OpenParquet:
        """Return the open file.

        Raises
        ------
        DataError
            If the file is not the one whose footer had this digest.
        """
        with self._lock:
            if path not in self._held:
                footer = read_footer(path)
                if footer.digest != digest:
                    raise DataError(
                        f"{path!r} has changed since the source was opened; open it again (a run that was training on "
                        "it cannot go on)"
                    )
                with sound_footer(path):
                    leaves = Layout(footer.metadata).leaves
                    table = ChunkTable(path, footer, [leaves[name].number for name in self._columns])
                self._held[path] = OpenParquet(self._open(path), footer, OpenFile(path), table)
                self._let_go()
            self._held.move_to_end(path)
            return self._held[path]

    def close(self) -> None:
        """Let go of all files."""
        with self._lock:
            self._held.clear()

    def _open(self, path: str) -> Any:
        try:
            return pa.OSFile(path, "rb")
        except FileNotFoundError as err:
            raise SourceNotFoundError(f"the file {path!r} is gone; put it back, or open the source anew") from err
        except OSError as err:
            raise DataError(f"cannot open {path!r}: {err}") from err

    def _let_go(self) -> None:
        footer_bytes = sum(each.held_bytes for each in self._held.values())
        while len(self._held) > 1 and (len(self._held) > _OPEN_FILES or footer_bytes > _OPEN_FOOTER_BYTES):
            _, oldest = self._held.popitem(last=False)
            footer_bytes -= oldest.held_bytes
