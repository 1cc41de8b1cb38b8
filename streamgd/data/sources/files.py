"""From what the user typed — a path, a list, a glob, a folder — to files in reading order, and what format they are.

The order is a function of the names below the common root alone, so that a copied folder reads the same.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamgd.errors import DataError, EmptySourceError, SchemaError, SourceNotFoundError

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_PARQUET_MAGICS = (b"PAR1", b"PARE")
_NPY_MAGIC = b"\x93NUMPY"
_PARQUET_SUFFIXES = frozenset({".parquet", ".pq", ".parq"})
_HDF5_SUFFIXES = frozenset({".h5", ".hdf5", ".hdf", ".he5"})
_TEXT_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".tab", ".dat", ".json", ".jsonl", ".ndjson", ".svm", ".libsvm"})
_PACKED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip"})

#: What streamgd reads, for messages.
SUPPORTED = (
    "HDF5 files, Parquet files or folders, .npy files, NumPy arrays, pandas DataFrames, Dask arrays and DataFrames"
)


@dataclass(frozen=True)
class FileSet:
    """Files in reading order.

    Attributes
    ----------
    paths : tuple of Path
        Absolute.
    root : Path
        Folder below which all of them lie and names are given.
    explicit : bool
        Whether the user named each file, so that none may be skipped.
    spec : str or list of str
        What the user gave, made absolute: enough to find the same files again.
    """

    paths: tuple[Path, ...]
    root: Path
    explicit: bool
    spec: str | list[str]

    def relative(self, path: Path) -> str:
        """Name of a file below the root."""
        return path.relative_to(self.root).as_posix()


def is_path(data: Any) -> bool:
    """Tell whether `data` is a path, or a sequence of nothing but paths."""
    if isinstance(data, str | os.PathLike | FileSet):
        return True
    return isinstance(data, list | tuple) and len(data) > 0 and all(isinstance(p, str | os.PathLike) for p in data)


def find_files(data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | FileSet) -> FileSet:
    """Expand paths, globs and folders.

    Parameters
    ----------
    data : path-like, sequence of path-like, or FileSet
        A file, a folder (all files below it, however deep), a pattern with ``*``, ``?``, ``[…]`` or ``**``, or several
        of these. Names below a folder or pattern that begin with ``_`` or ``.`` and files of zero bytes are left out.

    Raises
    ------
    SourceNotFoundError
        If a path does not exist or a pattern matches nothing.
    EmptySourceError
        If a folder holds no files.
    DataError
        If a file is given twice, or the path is a URL.
    """
    if isinstance(data, FileSet):
        return data
    single = isinstance(data, str | os.PathLike)
    items = [os.fsdecode(data)] if isinstance(data, str | os.PathLike) else [os.fsdecode(item) for item in data]
    expanded = [_expand(item) for item in items]
    paths = [path for found, _, _ in expanded for path in found]
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise DataError(f"{str(path)!r} is given twice, its rows would count twice; name each file once")
        seen.add(path)
    roots = [str(root) for _, root, _ in expanded]
    spec = [_absolute(item) for item in items]
    return FileSet(
        paths=tuple(paths),
        root=Path(os.path.commonpath(roots)),
        explicit=all(explicit for _, _, explicit in expanded),
        spec=spec[0] if single else spec,
    )


def _absolute(item: str) -> str:
    return os.path.abspath(os.path.expanduser(item))  # noqa: PTH100, PTH111 - Path.absolute keeps "..", and drops a glob's "**/"


def _expand(item: str) -> tuple[list[Path], Path, bool]:
    """Find the files of one item, their root, and whether the item names its file."""
    if "://" in item:
        raise DataError(
            f"{item!r} is a URL; streamgd reads local files only. Copy the data to this machine, or read it through "
            "Dask and pass the Dask array or DataFrame"
        )
    path = Path(_absolute(item))
    if path.is_dir():
        return _below(path), path, False
    if path.exists():
        return [path], path.parent, True
    if glob.has_magic(item):
        return _matching(str(path))
    raise SourceNotFoundError(_not_found(path))


def _below(folder: Path) -> list[Path]:
    """List the files below a folder, sorted by name part by part."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(("_", "."))]
        found += [Path(where, name) for name in names if not name.startswith(("_", "."))]
    kept = [path for path in found if path.stat().st_size]
    if not kept:
        what = "only empty files" if found else "no files (names that begin with '_' or '.' do not count)"
        raise EmptySourceError(f"the folder {str(folder)!r} holds {what}; expected Parquet or HDF5 files")
    return sorted(kept, key=lambda path: path.relative_to(folder).parts)


def _matching(pattern: str) -> tuple[list[Path], Path, bool]:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    found: set[Path] = set()
    for match in glob.glob(pattern, recursive=True):  # noqa: PTH207 - Path.glob wants the root apart
        path = Path(match)
        if any(part.startswith(("_", ".")) for part in path.parts[fixed:]):
            continue
        if path.is_dir():
            if "**" not in parts[fixed:]:  # else its files match by themselves
                found.update(_below(path))
        elif path.stat().st_size:
            found.add(path)
    if not found:
        raise SourceNotFoundError(
            f"the pattern {pattern!r} matches no file with content (names that begin with '_' or '.' do not count); "
            + (f"{str(root)!r} holds {_listed(root)}" if root.is_dir() else f"there is no folder {str(root)!r}")
        )
    return sorted(found, key=lambda path: path.relative_to(root).parts), root, False


def _not_found(path: Path) -> str:
    """Say that nothing is there, and what is there instead."""
    above = path.parent
    if not above.is_dir():
        return f"no such file or folder: {str(path)!r} (there is no folder {str(above)!r}). Check the path"
    near = difflib.get_close_matches(path.name, [entry.name for entry in above.iterdir()], n=3)
    if near:
        return f"no such file or folder: {str(path)!r}. Did you mean {' or '.join(repr(str(above / n)) for n in near)}?"
    return f"no such file or folder: {str(path)!r}. Check the path; {str(above)!r} holds {_listed(above)}"


def _listed(folder: Path, limit: int = 8) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "nothing"
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} entries)"


def stamp_of(paths: Iterable[str | os.PathLike[str]]) -> dict[str, Any]:
    """Return size and time of the last change, in nanoseconds, of each file that is there; see `Source.stamp`."""
    found: dict[str, Any] = {}
    for path in sorted({os.path.abspath(path) for path in paths}):  # noqa: PTH100 - links may be re-pointed
        with contextlib.suppress(OSError):
            state = os.stat(path)  # noqa: PTH116
            found[path] = [state.st_size, state.st_mtime_ns]
    return found


def file_format(path: Path) -> str:
    """Tell the format by content: ``"parquet"``, ``"hdf5"``, ``"npy"`` or ``""``."""
    with path.open("rb") as file:
        head = file.read(8)
        if head[:4] in _PARQUET_MAGICS:
            return "parquet"
        if head == _HDF5_MAGIC:
            return "hdf5"
        if head[:6] == _NPY_MAGIC:
            return "npy"
        offset, size = 512, path.stat().st_size
        while offset < size:  # a block of the user's own may come before HDF5's
            file.seek(offset)
            if file.read(8) == _HDF5_MAGIC:
                return "hdf5"
            offset *= 2
    return ""


def data_files(data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | FileSet) -> tuple[str, FileSet]:
    """Find files that are all of one format; in folders, files of no known format are passed over.

    Returns
    -------
    format : {"parquet", "hdf5", "npy"}
        As `file_format` says, or as the name's ending promises where the content is damaged.
    files : FileSet
        The files of that format.

    Raises
    ------
    DataError
        If the format is none that streamgd reads, with the way to convert it.
    SchemaError
        If files of several formats are mixed.
    """
    files = find_files(data)
    formats = {path: _claimed_format(path) for path in files.paths}
    unknown = [path for path, kind in formats.items() if not kind]
    known: dict[str, Path] = {}
    for path, kind in formats.items():
        if kind:
            known.setdefault(kind, path)
    if not known or (unknown and files.explicit):
        raise DataError(_unsupported(unknown[0], files))
    if len(known) > 1:
        one, other = list(known.items())[:2]
        raise SchemaError(
            f"files of different formats: {files.relative(one[1])!r} is {one[0]}, {files.relative(other[1])!r} is "
            f"{other[0]}; name the files of one format, e.g. with a pattern such as '*{one[1].suffix}'"
        )
    kept = tuple(path for path in files.paths if formats[path])
    return next(iter(known)), FileSet(kept, files.root, files.explicit, files.spec)


def _claimed_format(path: Path) -> str:
    """Tell the format by content, else by the name's ending: a damaged file is to be reported, not passed over."""
    try:
        found = file_format(path)
    except OSError as err:
        raise DataError(f"cannot read {str(path)!r}: {err.strerror}. Check its permissions") from err
    suffix = path.suffix.lower()
    return found or ("parquet" if suffix in _PARQUET_SUFFIXES else "hdf5" if suffix in _HDF5_SUFFIXES else "")


def _unsupported(path: Path, files: FileSet) -> str:
    suffixes = {suffix.lower() for suffix in path.suffixes[-2:]}
    name = str(path)
    if any(part.name in ("zarr.json", ".zarray", ".zgroup") for part in (path, *files.root.glob(".z*"))):
        return f"{str(files.root)!r} is a Zarr store; open it with dask.array.from_zarr(…) and pass the Dask array"
    if suffixes & _TEXT_SUFFIXES:
        return (
            f"{name!r} looks like text, which is too slow to read every epoch. Convert it once; for CSV, in bounded "
            "memory:\n"
            "  import pyarrow.csv, pyarrow.parquet\n"
            f"  with pyarrow.csv.open_csv({name!r}) as rows, "
            f"pyarrow.parquet.ParquetWriter({str(path.with_suffix('.parquet'))!r}, rows.schema) as out:\n"
            "      for batch in rows: out.write_batch(batch)"
        )
    packed = " It is packed: unpack it first." if suffixes & _PACKED_SUFFIXES else ""
    with path.open("rb") as file:
        head = file.read(8)
    found = f"its first bytes are {head!r}" if head else "it is empty (0 bytes)"
    return f"{name!r} is in no format that streamgd reads ({found}).{packed} It reads {SUPPORTED}"
