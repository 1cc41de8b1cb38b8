"""What is known of HDF5 files without reading rows: their datasets, and how these are stored.

`Hdf5Source` reads; this module describes what is in the files, and says clearly what cannot be used.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from streamgd.data.sources.base import FLAT_DTYPES
from streamgd.data.sources.hdf5_elsewhere import files_behind
from streamgd.data.sources.hdf5_files import dtype_name, filter_is_there, list_datasets, open_file
from streamgd.errors import CorruptDataError, DataError, SchemaError, SourceNotFoundError

#: Of each file the fingerprint hashes so much of its beginning, a quarter of that of its end, and a few pieces between.
_DIGEST_BYTES = 64 << 10
_DIGEST_PIECES = 8
_DIGEST_PIECE_BYTES = 4 << 10
_BUILT_IN = frozenset({"deflate", "lzf", "shuffle", "fletcher32"})
#: Up to so many chunks are counted to say how many bytes they take.
_COUNTED_CHUNKS = 4096


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset, as stored.

    Attributes
    ----------
    name : str
        Path inside the file.
    shape : tuple of int
        Rows first.
    dtype : str
        NumPy name, or ``"string"``.
    row_bytes : int
        Bytes of a row once decoded.
    chunks : tuple of int, or None
        Shape of its chunks; None if it is stored in one piece.
    filters : tuple of str
        Compression, checksums and the like, which make a chunk readable only as a whole.
    stored_bytes : int
        Bytes in the file.
    is_flat : bool
        Whether rows lie in the file one after the other as they are, so that they can be read without HDF5.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    row_bytes: int
    chunks: tuple[int, ...] | None
    filters: tuple[str, ...]
    stored_bytes: int
    is_flat: bool = False

    @property
    def width(self) -> int:
        """Columns; 1 for a vector."""
        return self.shape[1] if len(self.shape) == 2 else 1

    @property
    def kind(self) -> str:
        """What it may be joined with from another file: types of one kind differ only in width."""
        return "number" if self.dtype.startswith(("int", "uint")) else self.dtype.rstrip("0123456789")

    @property
    def pieces(self) -> int:
        """Chunks side by side that a row lies in."""
        return math.ceil(self.width / self.chunks[1]) if self.chunks is not None and len(self.chunks) == 2 else 1

    @property
    def panel(self) -> int:
        """Columns to read at once where chunks lie side by side and can be read in part; 0 to read whole rows."""
        return self.chunks[1] if self.chunks is not None and self.pieces > 1 and not self.in_wholes else 0

    @property
    def in_wholes(self) -> bool:
        """Whether a chunk is best read whole: it must be decoded, or sticks out beyond the last column.

        Of a chunk that sticks out, HDF5 reads each row by itself unless it may keep the chunk in its cache.
        """
        return bool(self.filters) or self.sticks_out

    @property
    def sticks_out(self) -> bool:
        """Whether the last chunk of a row is stored wider than the row needs."""
        return self.chunks is not None and len(self.chunks) == 2 and self.width % self.chunks[1] != 0

    @property
    def n_chunks(self) -> int:
        """How many chunks it lies in; 0 if it is stored in one piece."""
        return 0 if self.chunks is None else math.prod(map(math.ceil, np.divide(self.shape, self.chunks)))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk once decoded; 0 if it is stored in one piece."""
        return 0 if self.chunks is None else math.prod(self.chunks) * self.row_bytes // max(1, self.width)

    def __str__(self) -> str:
        """Describe the dataset for messages and the fingerprint."""
        how = "" if self.chunks is None else f" chunks {self.chunks}"
        return f"{self.name} {self.shape} {self.dtype}{how}{' '.join(['', *self.filters])}"


@dataclass(frozen=True)
class FileInfo:
    """One file: where it is, what identifies it, its datasets, and all files that hold their rows."""

    path: str
    n_bytes: int
    digest: str
    features: tuple[DatasetInfo, ...]
    target: DatasetInfo | None
    weight: DatasetInfo | None
    behind: tuple[str, ...]

    @property
    def n_rows(self) -> int:
        """Rows of every dataset."""
        return self.features[0].shape[0]

    @property
    def datasets(self) -> tuple[DatasetInfo, ...]:
        """All datasets: features, then target, then weight."""
        return (*self.features, *(info for info in (self.target, self.weight) if info is not None))


def describe_file(path: str, features: Sequence[str], target: str | None, weight: str | None) -> FileInfo:
    """Look at the datasets of a file, reading no rows.

    Raises
    ------
    SourceNotFoundError
        If the file or a dataset is not there.
    SchemaError
        If types, shapes or row counts cannot be used together.
    CorruptDataError
        If the file cannot be read.
    """
    behind = {path}
    with open_file(path) as file:

        def look_at(name: str) -> DatasetInfo:
            dataset = _find(file, path, name)
            behind.update(files_behind(dataset, path))
            return _describe(dataset, name, path)

        try:
            xs = tuple(map(look_at, features))
            y = None if target is None else look_at(target)
            w = None if weight is None else look_at(weight)
        except DataError:
            raise
        except (TypeError, ValueError) as err:
            raise SchemaError(f"{path}: a dataset has a type that NumPy does not know: {err}") from err
        except (OSError, RuntimeError, KeyError) as err:
            raise CorruptDataError(f"{path}: its datasets cannot be read: {err}") from err
    for info in xs:
        _check_features(path, info)
    if y is not None and (len(y.shape) not in (1, 2) or y.width == 0 or not _is_label(y)):
        raise SchemaError(
            f"{path}: target {_shown(y)}; expected numbers, booleans or strings of shape (n_rows,), or "
            "(n_rows, n_outputs) for several outputs"
        )
    if w is not None and (len(w.shape) != 1 or not _is_number(w)):
        raise SchemaError(f"{path}: weight {_shown(w)}; expected numbers of shape (n_rows,)")
    n_bytes, digest = hash_of(path)
    found = FileInfo(path, n_bytes, digest, xs, y, w, tuple(sorted(behind)))
    for info in found.datasets:
        if info.shape[0] != found.n_rows:
            raise SchemaError(
                f"{path}: dataset {xs[0].name!r} has {found.n_rows:,} rows, but {info.name!r} has {info.shape[0]:,}; "
                "features, target and weight must have one row each for every example"
            )
    return found


def find_datasets(file: h5py.File, info: FileInfo) -> tuple[h5py.Dataset, ...]:
    """Find the datasets of a file again, to read from them.

    Raises
    ------
    SourceNotFoundError
        If one is gone.
    CorruptDataError
        If one is no longer what it was.
    """
    found = []
    for each in info.datasets:
        dataset = _find(file, info.path, each.name)
        if (dataset.shape, dtype_name(dataset)) != (each.shape, each.dtype):
            now = _describe(dataset, each.name, info.path)
            raise CorruptDataError(
                f"{info.path} was changed while it was in use: dataset {each.name!r} was {each} and is {now}. "
                "Open the source again"
            )
        files_behind(dataset, info.path)
        if not _BUILT_IN.issuperset(each.filters):
            _filters(dataset, info.path)  # a plugin must be loaded by every process
        if each.sticks_out and not each.filters:
            del dataset  # the cache is set by whoever opens it first
            access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
            access.set_chunk_cache(521, each.chunk_bytes, 1.0)
            dataset = h5py.Dataset(h5py.h5d.open(file.id, each.name.encode(), access))
        found.append(dataset)
    return tuple(found)


def _check_features(path: str, info: DatasetInfo) -> None:
    if not _is_number(info):
        raise SchemaError(
            f"{path}: features {_shown(info)}; expected real numbers or booleans. Make numbers of it first, or choose "
            "other datasets with features="
        )
    if len(info.shape) not in (1, 2) or info.shape[1:] == (0,):
        raise SchemaError(
            f"{path}: features {_shown(info)}; expected shape (n_rows, n_features), or a list of datasets of shape "
            "(n_rows,), one a feature"
        )


def _find(file: h5py.File, path: str, name: str) -> h5py.Dataset:
    found: Any
    try:
        found = file.get(name)
    except (OSError, RuntimeError) as err:  # a link into another file
        raise SourceNotFoundError(f"{path}: dataset {name!r} is a link that leads nowhere: {err}") from err
    if isinstance(found, h5py.Dataset):
        return found
    what = f"{name!r} is a group, not a dataset" if isinstance(found, h5py.Group) else f"there is no dataset {name!r}"
    there = list_datasets(file)
    hint = ""
    if any("[(" in each for each in there):
        hint = ". Tables of records (compound types) are not read: write their columns as datasets, or as Parquet"
    raise SourceNotFoundError(f"{path}: {what}; the file holds {', '.join(there) if there else 'no datasets'}{hint}")


def _describe(dataset: h5py.Dataset, name: str, path: str) -> DatasetInfo:
    name = name.strip("/")  # as asked for: behind a link, a dataset's own name is another file's
    if not dataset.shape:
        raise SchemaError(f"{path}: dataset {name!r} is a single value, expected one row for every example")
    width = math.prod(dataset.shape[1:])
    return DatasetInfo(
        name,
        tuple(dataset.shape),
        dtype_name(dataset),
        width * dataset.dtype.itemsize,
        dataset.chunks,
        _filters(dataset, path),
        _stored_bytes(dataset),
        flat_offset(dataset) is not None,
    )


def flat_offset(dataset: h5py.Dataset) -> int | None:
    """Return the byte of its file where a dataset's rows begin if they lie there as they are, else None."""
    if dataset.chunks is not None or dataset.is_virtual or dataset.external or not hasattr(os, "pread"):
        return None
    if dataset.dtype.name not in FLAT_DTYPES or not dataset.dtype.isnative:
        return None
    # Values may be stored in fewer bits than they have in memory, or in others: HDF5 converts them.
    if not dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype, logical=True)):
        return None
    offset = dataset.id.get_offset()  # None for what is so small that it lies in the header, or was never written
    return None if offset is None else int(offset)


def _stored_bytes(dataset: h5py.Dataset) -> int:
    """Return the bytes a dataset takes in its file, or could take where counting them would read a long index."""
    n_chunks = 1 if dataset.chunks is None else math.prod(map(math.ceil, np.divide(dataset.shape, dataset.chunks)))
    counted = dataset.id.get_storage_size() if n_chunks <= _COUNTED_CHUNKS else 0
    return int(counted or dataset.nbytes)  # a virtual dataset stores nothing itself


def _filters(dataset: h5py.Dataset, path: str) -> tuple[str, ...]:
    """Name the filters a dataset's chunks went through, and make sure that they can be undone."""
    creation = dataset.id.get_create_plist()
    found = [creation.get_filter(i) for i in range(creation.get_nfilters())]
    names = []
    for code, _, _, label in found:
        name = label.decode(errors="replace").split(";")[0].split(" ")[0] or f"filter-{code}"
        if not filter_is_there(code):
            raise CorruptDataError(
                f"{path}: dataset {dataset.name!r} is compressed with HDF5 filter {code} ({name}), which is not "
                "installed. `pip install hdf5plugin` brings the usual ones"
            )
        names.append(name)
    return tuple(names)


def _is_number(info: DatasetInfo) -> bool:
    return info.dtype == "bool" or info.dtype.rstrip("0123456789") in ("float", "int", "uint")


def _is_label(info: DatasetInfo) -> bool:
    return _is_number(info) or info.dtype == "string"


def _shown(info: DatasetInfo) -> str:
    return f"dataset {info.name!r} has shape {info.shape} and type {info.dtype}"


def hash_of(path: str) -> tuple[int, str]:
    """Measure a file, and hash its first and last bytes and a few pieces between: cheap, whatever the compression."""
    digest = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        n_bytes = file.seek(0, os.SEEK_END)
        if n_bytes > 4 * _DIGEST_BYTES:
            between = np.linspace(_DIGEST_BYTES, n_bytes - _DIGEST_BYTES, _DIGEST_PIECES).astype(int).tolist()
            pieces = [(0, _DIGEST_BYTES), *((at, _DIGEST_PIECE_BYTES) for at in between)]
            pieces.append((n_bytes - _DIGEST_BYTES // 4, _DIGEST_BYTES))
        else:
            pieces = [(0, n_bytes)]
        for at, size in pieces:
            file.seek(at)
            digest.update(file.read(size))
    return n_bytes, digest.hexdigest()


def check_agreement(first: FileInfo, other: FileInfo) -> None:
    """Make sure that two files differ only in rows, and in the width of their types.

    Raises
    ------
    SchemaError
        If they differ in more; names file and dataset.
    """
    for one, another in zip(first.datasets, other.datasets, strict=True):
        if (one.shape[1:], one.kind) != (another.shape[1:], another.kind):
            raise SchemaError(
                f"{other.path}: dataset {another.name!r} has rows of shape {another.shape[1:]} and type "
                f"{another.dtype}, but in {first.path} they have shape {one.shape[1:]} and type {one.dtype}. Files of "
                "one source may differ in rows and in the width of a type, in nothing else"
            )


def widest_dtype(infos: Sequence[DatasetInfo]) -> np.dtype[Any]:
    """Return the dtype that holds the values of a dataset in every file."""
    return np.result_type(*[np.dtype(info.dtype) for info in infos])
