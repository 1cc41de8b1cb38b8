"""The files that HDF5 takes a dataset's rows from: its own, and those behind virtual datasets and external storage.

For what is missing there HDF5 hands out fill values or zeros, without a word. Here it is refused.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from streamgd.data.sources.hdf5_files import open_file
from streamgd.errors import CorruptDataError, SourceNotFoundError


def files_behind(dataset: h5py.Dataset, path: str) -> set[str]:
    """Find the files that hold the rows of a dataset, and make sure that they do.

    Parameters
    ----------
    dataset : h5py.Dataset
        Of an open file.
    path : str
        What messages call that file.

    Raises
    ------
    SourceNotFoundError
        If a file is not there, or the dataset in it that rows are taken from.
    CorruptDataError
        If it has fewer rows than are taken, or cannot be read.
    """
    found = {dataset.file.filename}  # behind a link, not `path`
    if dataset.is_virtual:
        found.update(*_behind_virtual(dataset, path))
    elif dataset.external:
        found.update(_behind_external(dataset, path))
    return found


def _behind_virtual(dataset: h5py.Dataset, path: str) -> Iterator[set[str]]:
    mappings: dict[str, list[Any]] = {}
    for mapping in dataset.virtual_sources():
        mappings.setdefault(mapping.file_name, []).append(mapping)
    what = f"{path}: dataset {dataset.name!r} is virtual and takes rows from"
    for name, some in mappings.items():
        if "%" in name:  # "%b" stands for a number: as many as there are, which the shape follows
            yield {found for place in _places(name, dataset) for found in _numbered(place)}
            continue
        if name == ".":
            opened: Any = contextlib.nullcontext(dataset.file)
        else:
            there = [place for place in _places(name, dataset) if place.exists()]
            if not there:
                raise SourceNotFoundError(f"{what} {name}, which is not there. Put it back")
            opened = open_file(str(there[0]))
        with opened as file:
            for each in {mapping.dset_name for mapping in some if "%" not in mapping.dset_name}:
                source = file.get(each)
                if not isinstance(source, h5py.Dataset):
                    raise SourceNotFoundError(f"{what} dataset {each!r} of {name}, which has none of that name")
                for mapping in some:
                    if mapping.dset_name == each:
                        _check_size(mapping, source, f"{what} dataset {each!r} of {name}")
                yield files_behind(source, file.filename)


def _check_size(mapping: Any, source: h5py.Dataset, what: str) -> None:
    """Make sure that a dataset reaches as far as what is taken of it."""
    selection = mapping.src_space
    try:
        if selection.get_select_type() == h5py.h5s.SEL_ALL:  # its shape is not written down
            needed = f"{mapping.vspace.get_select_npoints():,} values are"
            fits = mapping.vspace.get_select_npoints() == source.size
        else:
            taken = tuple(int(end) + 1 for end in selection.get_select_bounds()[1])
            needed = f"at least {taken} is"
            fits = len(taken) == source.ndim and all(n <= has for n, has in zip(taken, source.shape, strict=True))
    except RuntimeError:  # without an end: it follows the dataset
        return
    if not fits:
        raise CorruptDataError(f"{what}, which has shape {source.shape} where {needed} taken. Put the whole file back")


def _behind_external(dataset: h5py.Dataset, path: str) -> Iterator[str]:
    prefix = _prefix("HDF5_EXTFILE_PREFIX", dataset)
    left = dataset.size * dataset.id.get_type().get_size()
    for name, offset, size in dataset.external:
        taken = min(size, left)  # the last file may go on without an end
        left -= taken
        place = Path(prefix, name)
        if taken and not place.exists():
            raise SourceNotFoundError(
                f"{path}: the rows of dataset {dataset.name!r} lie in {name}, which is not there. Put it back, or work "
                "in the folder that its name counts from"
            )
        if taken and (found := place.stat().st_size) < offset + taken:
            raise CorruptDataError(
                f"{path}: the rows of dataset {dataset.name!r} lie in {name}, which has {found:,} bytes where "
                f"{offset + taken:,} are needed. It was cut short; copy it again"
            )
        if taken:
            yield str(place)


def _places(name: str, dataset: h5py.Dataset) -> list[Path]:
    """List where HDF5 looks for a file that a virtual dataset names, in its order."""
    own = Path(dataset.file.filename)
    prefix = _prefix("HDF5_VDS_PREFIX", dataset)
    places = [Path(prefix, name)] if prefix else []
    places.append(own.parent / name)
    if Path(name).is_absolute():
        places.append(own.parent / Path(name).name)
    return [*places, Path(name), own.resolve().parent / name]


def _prefix(variable: str, dataset: h5py.Dataset) -> str:
    return os.environ.get(variable, "").replace("${ORIGIN}", str(Path(dataset.file.filename).parent))


def _numbered(place: Path) -> list[str]:
    return glob.glob(glob.escape(str(place)).replace("%b", "*").replace("%%", "%"))  # noqa: PTH207 - may be absolute
