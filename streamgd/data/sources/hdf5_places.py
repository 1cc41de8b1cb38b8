"""Where the chunks of HDF5 datasets lie, and which datasets may be read by it.

HDF5 is asked once for all chunks of a dataset: to look for one it would go through them all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.base import Array
from streamgd.data.sources.buffers import Kept
from streamgd.data.sources.hdf5_blocks import MOST_CHUNKS
from streamgd.data.sources.hdf5_chunks import DEFLATE, FLETCHER32, LZF, SHUFFLE, ChunkReader, ChunkTable, Descriptor
from streamgd.errors import CorruptDataError

#: Chunks that HDF5 lists are noted so many at a time: fast, and without ever holding a list of them all.
_NOTED = 4096


class ChunkTables:
    """Makes the chunk readers of a source, and keeps what HDF5 said of its files. Not for several threads at once.

    A file that was closed to make room for others is not asked again, unless it has changed.

    Parameters
    ----------
    kept : Kept or None, default=None
        Where decoded chunks of targets and weights are kept. They are few bytes and asked for again and again: by the
        survey, and by every block, whose ends lie within chunks that are taller than those of the features.
    """

    def __init__(self, kept: Kept | None = None) -> None:
        self._kept = kept
        self._tables: dict[tuple[int, int], ChunkTable] = {}

    def open(
        self, file: int, datasets: Sequence[h5py.Dataset], n_features: int | None = None
    ) -> tuple[ChunkReader | None, ...]:
        """Make a reader of each of a file's datasets, None for those that only h5py can read.

        Parameters
        ----------
        file : int
            The number of the file in the source.
        datasets : sequence of h5py.Dataset
            Always the same ones. Needed only while this function runs.
        n_features : int, optional
            How many of them, the first ones, hold features; default: all.
        """
        descriptors: dict[int, Descriptor] = {}
        n_features = len(datasets) if n_features is None else n_features
        return tuple(
            self._open((file, number), dataset, descriptors, None if number < n_features else self._kept)
            for number, dataset in enumerate(datasets)
        )

    def _open(
        self, key: tuple[int, int], dataset: h5py.Dataset, descriptors: dict[int, Descriptor], kept: Kept | None
    ) -> ChunkReader | None:
        try:
            filters = _known_filters(dataset) if _stores_values_as_they_are(dataset) else None
            if filters is None:
                return None
            handle = dataset.file.id.get_vfd_handle()  # datasets that are linked to may lie in other files
            if handle not in descriptors:
                descriptors[handle] = Descriptor(handle)
            table = self._table(key, dataset, descriptors[handle])
            if table is None:
                return None
            fill, name = _fill_value(dataset, table), (key, table.identity)
            return ChunkReader(dataset, filters, table, fill, descriptors[handle], kept, name)
        except CorruptDataError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError, OverflowError):
            return None  # damaged: h5py says so as rows are read

    def _table(self, key: tuple[int, int], dataset: h5py.Dataset, descriptor: Descriptor) -> ChunkTable | None:
        known = self._tables.pop(key, None)
        n_chunks = sum(len(each.offsets) for each in self._tables.values()) + math.prod(_grid(dataset))
        if known is None or known.identity != descriptor.identity:
            known = _look_up(dataset, descriptor) if n_chunks <= MOST_CHUNKS else None
        if known is not None:
            self._tables[key] = known
        return known


def _grid(dataset: h5py.Dataset) -> tuple[int, ...]:
    """Count the chunks along each dimension."""
    return tuple(-(-n // step) for n, step in zip(dataset.shape, dataset.chunks, strict=True))


def _corner(dataset: h5py.Dataset, number: int) -> tuple[int, ...]:
    """Return the first element of a chunk."""
    at = np.unravel_index(number, _grid(dataset))
    return tuple(int(i) * step for i, step in zip(at, dataset.chunks, strict=True))


def _stores_values_as_they_are(dataset: h5py.Dataset) -> bool:
    """Tell whether values lie in chunks of a plain file, and are there what they are in memory."""
    file = dataset.file
    return (
        hasattr(os, "preadv")
        and hasattr(dataset.id, "chunk_iter")
        and dataset.ndim in (1, 2)
        and dataset.id.get_create_plist().get_layout() == h5py.h5d.CHUNKED
        and file.driver == "sec2"
        # What somebody in this process writes to the file may not have reached it.
        and file.id.get_intent() == h5py.h5f.ACC_RDONLY
        and dataset.dtype.kind in "fiubS"
        and dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype, logical=True))
    )


def _known_filters(dataset: h5py.Dataset) -> list[int] | None:
    """List the filters that chunks went through; None if one of them, or their order, is not known here."""
    creation = dataset.id.get_create_plist()
    found = [creation.get_filter(i) for i in range(creation.get_nfilters())]
    codes = [code for code, *_ in found]
    known = {DEFLATE, SHUFFLE, FLETCHER32, LZF}.issuperset(codes) and not {DEFLATE, LZF}.issubset(codes)
    if not known or len(set(codes)) < len(codes):
        return None
    if SHUFFLE in codes and (codes[0] != SHUFFLE or found[0][2][:1] != (dataset.dtype.itemsize,)):
        return None
    return codes


def _look_up(dataset: h5py.Dataset, descriptor: Descriptor) -> ChunkTable | None:
    """Ask HDF5 for the place of every chunk; None if what it says cannot be made use of."""
    chunks, grid = np.array(dataset.chunks), np.array(_grid(dataset))
    offsets = np.full(grid.prod(), -1, np.int64)
    sizes, masks = np.zeros(len(offsets), np.uint32), np.zeros(len(offsets), np.uint32)
    noted: list[Any] = []
    n_noted, usable = 0, True

    def note(chunk: Any) -> None:
        noted.append(chunk)
        if len(noted) == _NOTED:
            enter()

    def enter() -> None:
        nonlocal n_noted, usable
        if noted:
            at, odd = np.divmod(np.array([chunk.chunk_offset for chunk in noted]), chunks)
            bytes_of = np.array([chunk.size for chunk in noted])
            # Some versions of HDF5 list chunks by their number; chunks of 4 GiB and more do not fit the table.
            usable &= not odd.any() and bool((at < grid).all()) and int(bytes_of.max()) < 1 << 32
            if usable:
                number = at @ np.append(np.cumprod(grid[:0:-1])[::-1], 1)
                offsets[number] = [chunk.byte_offset for chunk in noted]
                sizes[number], masks[number] = bytes_of, [chunk.filter_mask for chunk in noted]
            n_noted += len(noted)
            noted.clear()

    dataset.id.chunk_iter(note)
    enter()
    if usable and dataset.id.get_create_plist().get_nfilters() and ((offsets >= 0) & (sizes == 0)).any():
        # Reading one ends the process, within HDF5.
        raise CorruptDataError(
            f"{dataset.file.filename}: dataset {dataset.name!r} has compressed chunks of no bytes. The file is "
            "damaged; copy it again, or leave it out"
        )
    if not usable or np.count_nonzero(offsets >= 0) != n_noted:
        return None
    base = _find_base(dataset, descriptor, offsets, sizes)
    if base is None:
        return None
    offsets[offsets >= 0] += base
    return ChunkTable(offsets, sizes, masks if masks.any() else None, descriptor.identity)


def _find_base(
    dataset: h5py.Dataset, descriptor: Descriptor, offsets: NDArray[np.int64], sizes: NDArray[np.uint32]
) -> int | None:
    """Return from where in the file HDF5 counts, which its versions do differently where a user's own bytes come first.

    Two chunks are read both ways to find out, and to be sure of everything else: None if they differ.
    """
    there = np.flatnonzero(offsets >= 0)
    if len(there) == 0:
        return 0
    bases = {0, dataset.file.userblock_size}
    for number in {int(there[np.argmin(sizes[there])]), int(there[np.argmax(offsets[there])])}:
        _, expected = dataset.id.read_direct_chunk(_corner(dataset, number))
        at, size = int(offsets[number]), int(sizes[number])
        bases = {base for base in bases if descriptor.read(size, at + base) == expected}
    return min(bases, default=None)


def _fill_value(dataset: h5py.Dataset, table: ChunkTable) -> Array | None:
    """Let h5py read one value of a chunk that was never written; None if there is none."""
    missing = np.flatnonzero(table.offsets < 0)
    if len(missing) == 0:
        return None
    found: Array = dataset[tuple(slice(at, at + 1) for at in _corner(dataset, int(missing[0])))]
    return found.reshape(1, 1)
