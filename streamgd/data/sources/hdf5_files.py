"""HDF5 files as such: opening them, what is in them, and whether this machine can decode it."""

from __future__ import annotations

import errno
import importlib
import os
from pathlib import Path
from typing import Any

import h5py

from streamgd.errors import CorruptDataError, DataError, SourceNotFoundError


def open_file(path: str) -> h5py.File:
    """Open a file for reading.

    Raises
    ------
    SourceNotFoundError
        If it is not there.
    CorruptDataError
        If it is not an HDF5 file, or cut short.
    DataError
        If it may not be read, or is a folder.
    """
    # No chunk cache: what must stay decoded, a block's reader keeps, where the memory plan sees it. HDF5's own locking
    # first, because a process cannot have a file open with and without it: whoever opens the file beside us would fail.
    try:
        return h5py.File(path, "r", rdcc_nbytes=0)
    except OSError as err:
        refusal = err
    if "lock" in str(refusal) and getattr(refusal, "errno", None) != errno.EAGAIN:
        try:  # the file system has no locks, or somebody here opened the file without
            return h5py.File(path, "r", locking=False, rdcc_nbytes=0)
        except OSError as err:
            refusal = err
    raise _explained(path, refusal) from refusal


def _explained(path: str, err: OSError) -> DataError:
    """Turn what HDF5 says of a file that it cannot open into an error that helps."""
    place = Path(path)
    if place.is_dir():
        return DataError(f"{path} is a folder; name the HDF5 files in it, for example {place / '*.h5'}")
    if not place.exists():
        return SourceNotFoundError(f"{path}: there is no such file")
    if not os.access(path, os.R_OK):
        return DataError(f"{path}: no permission to read it")
    if err.errno == errno.EAGAIN:
        return DataError(f"{path} is open for writing in another process; close it there, and try again")
    if "signature" in str(err):
        return CorruptDataError(
            f"{path} ({place.stat().st_size:,} bytes) is not an HDF5 file: it does not begin with HDF5's signature"
        )
    if "truncated" in str(err):
        return CorruptDataError(f"{path} is cut short: {err}. Copy it again")
    return CorruptDataError(f"{path} cannot be opened: {err}")


def has_dataset(path: str | os.PathLike[str], name: str) -> bool:
    """Tell whether a file holds a dataset, for names that are only defaults.

    `open_source` uses the dataset ``"y"`` as target if the user named none and this says it is there.

    Raises
    ------
    DataError
        As `open_file`.
    """
    with open_file(os.fspath(path)) as file:
        return isinstance(file.get(name), h5py.Dataset)


def list_datasets(file: h5py.File, limit: int = 30) -> list[str]:
    """List the datasets of a file with shapes and types, for messages."""
    found: list[str] = []

    def visit(name: str, item: Any) -> bool | None:
        if isinstance(item, h5py.Dataset):
            try:
                dtype = dtype_name(item)
            except (TypeError, ValueError):
                dtype = "of an unknown type"
            found.append(f"{name!r} {item.shape} {dtype}" if len(found) < limit else "…")
        return True if len(found) > limit else None

    try:
        file.visititems(visit)
    except (OSError, RuntimeError, ValueError, KeyError):  # of a damaged file; whoever asked says what it is about
        found.append("…")
    return found


def dtype_name(dataset: h5py.Dataset) -> str:
    """Name the type of a dataset's values: NumPy's name, or ``"string"``."""
    if h5py.check_string_dtype(dataset.dtype) is not None:
        return "string"
    return str(dataset.dtype.newbyteorder("=")) if dataset.dtype.kind in "fiubc" else str(dataset.dtype)


def filter_is_there(code: int) -> bool:
    """Tell whether HDF5 can undo a filter, loading hdf5plugin if that is what it takes."""
    if not h5py.h5z.filter_avail(code):
        try:
            importlib.import_module("hdf5plugin")
        except ImportError:
            return False
    return bool(h5py.h5z.filter_avail(code))
