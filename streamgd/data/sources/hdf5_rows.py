"""Rows out of the HDF5 files that a process has open.

Chunks are read by `hdf5_chunks` where it can, in as many threads as ask for rows; everything else by h5py, which runs
one call at a time in a process.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import h5py
import numpy as np

from streamgd.data.sources.base import Array
from streamgd.data.sources.buffers import Buffers, Bytes, Kept
from streamgd.data.sources.hdf5_files import open_file
from streamgd.data.sources.hdf5_layout import FileInfo, find_datasets
from streamgd.errors import CorruptDataError, DataError, SchemaError

if TYPE_CHECKING:
    from streamgd.data.sources.hdf5_chunks import ChunkReader
    from streamgd.data.sources.hdf5_places import ChunkTables

#: Files kept open at once; most systems allow a process 1,024.
_OPEN_FILES = 64


class OpenFiles:
    """The files one process has open, the least recently used closed first, and memory to read into.

    h5py runs one call at a time in a process anyway, so that one lock costs no speed, and a file is never closed under
    a read. Chunk readers need neither.

    Parameters
    ----------
    files : sequence of FileInfo
        All files of a source.
    block_at : callable
        Tells the block that a row of a file lies in, for messages.
    """

    def __init__(self, files: Sequence[FileInfo], block_at: Callable[[int, int], int]) -> None:
        self.lock = threading.Lock()
        self._infos = files
        self._block_at = block_at
        self._files: OrderedDict[int, tuple[h5py.File, tuple[h5py.Dataset, ...]]] = OrderedDict()
        self._readers: dict[int, tuple[ChunkReader | None, ...]] = {}
        self._tables: ChunkTables | None = None
        self._rows, self._scratch = Buffers(), Buffers()
        self.kept = Kept()

    def read(
        self, file: int, datasets: Sequence[int], first: int, stop: int, lent: list[Bytes] | None = None
    ) -> list[Array]:
        """Read rows of some datasets of one file.

        Parameters
        ----------
        file : int
            Which file.
        datasets : sequence of int
            Which datasets: features, then target, then weight.
        first, stop : int
            Rows within the file.
        lent : list of ndarray, optional
            If given, takes up memory that the arrays lie in, for `give_back` once nobody reads them any more.

        Raises
        ------
        SourceNotFoundError, CorruptDataError
            If the file is gone, has changed, or cannot be read.
        """
        readers = self._chunk_readers(file)
        found: dict[int, Array] = {}
        for i in datasets:
            reader = readers[i]
            if reader is None:
                continue
            memory = self._take(reader.n_bytes(stop - first), lent)
            try:
                rows = reader.read(first, stop, memory, self._scratch)
            except OSError as err:
                raise self._unreadable(file, [i], first, stop, err) from err
            # What cannot be decoded is left to h5py, which can after all, or says what is wrong; so is text.
            with contextlib.suppress(UnicodeDecodeError):
                found.update({} if rows is None else {i: _native(rows)})
        left = [i for i in datasets if i not in found]
        if left:
            found.update(zip(left, self._read_by_h5py(file, left, first, stop), strict=True))
        return [found[i] for i in datasets]

    def give_back(self, lent: list[Bytes]) -> None:
        """Take back memory that was lent, and empty the list."""
        while lent:
            self._rows.give(lent.pop())

    def get(self, file: int) -> tuple[h5py.Dataset, ...]:
        """Return the datasets of a file, opening it if need be. The caller holds the lock."""
        if file in self._files:
            self._files.move_to_end(file)
            return self._files[file][1]
        while len(self._files) >= _OPEN_FILES:
            self._close_oldest()
        info = self._infos[file]
        handle = open_file(info.path)
        try:
            now = find_datasets(handle, info)
        except DataError:
            handle.close()
            raise
        except (OSError, RuntimeError, KeyError, TypeError) as err:
            handle.close()
            raise CorruptDataError(f"{info.path}: its datasets can no longer be read: {err}") from err
        self._files[file] = handle, now
        return now

    def close(self) -> None:
        """Close every file, and let go of memory that is not in use."""
        with self.lock:
            while self._files:
                self._close_oldest()
            self._rows.clear()
            self._scratch.clear()
            self.kept.clear()

    def _close_oldest(self) -> None:
        file, (handle, _) = self._files.popitem(last=False)
        self._readers.pop(file, None)
        handle.close()

    def _chunk_readers(self, file: int) -> tuple[ChunkReader | None, ...]:
        """Return for each dataset of a file what reads its chunks, or None where only h5py can."""
        with self.lock:
            datasets = self.get(file)
            found = self._readers.get(file)
            if found is None:
                found = (None,) * len(datasets)
                if any(each.chunks is not None for each in self._infos[file].datasets):
                    if self._tables is None:
                        from streamgd.data.sources.hdf5_places import ChunkTables  # imports Numba

                        self._tables = ChunkTables(self.kept)
                    found = self._tables.open(file, datasets, len(self._infos[file].features))
                self._readers[file] = found
        return found

    def _take(self, n_bytes: int, lent: list[Bytes] | None) -> Bytes:
        """Return memory for rows; noted in `lent` if it will come back, else fresh."""
        if lent is None:
            return np.empty(n_bytes, np.uint8)
        lent.append(self._rows.take(n_bytes))
        return lent[-1]

    def _read_by_h5py(self, file: int, datasets: Sequence[int], first: int, stop: int) -> list[Array]:
        info = self._infos[file]
        with self.lock:
            handles = self.get(file)
            try:
                return [_native(_read_rows(handles[i], first, stop, info.datasets[i].panel)) for i in datasets]
            except UnicodeDecodeError as err:
                raise SchemaError(
                    f"{info.path}: text in rows {first:,} to {stop - 1:,} is not UTF-8: {err}. Store it as UTF-8"
                ) from err
            except (OSError, RuntimeError, ValueError, KeyError) as err:
                raise self._unreadable(file, datasets, first, stop, err) from err

    def _unreadable(
        self, file: int, datasets: Sequence[int], first: int, stop: int, err: Exception
    ) -> CorruptDataError:
        info = self._infos[file]
        return CorruptDataError(
            f"{info.path}: rows {first:,} to {stop - 1:,} (block {self._block_at(file, first)}) cannot be read "
            f"from {', '.join(repr(info.datasets[i].name) for i in datasets)}: {err}. The file is damaged; "
            "copy it again, or leave it out"
        )


def _read_rows(dataset: h5py.Dataset, first: int, stop: int, panel: int) -> Array:
    """Read rows as they are stored: the one place where they leave a file.

    Where rows lie in several chunks without compression, chunks are read panel by panel: asked for whole rows, HDF5
    reads such chunks a value at a time (measured: 40 s instead of 0.3 s for 220 MB in chunks one column wide).
    """
    found: Array
    if not panel:
        found = dataset[first:stop]
        return found
    shape = (stop - first, dataset.shape[1])
    found = np.empty(shape, dataset.dtype, order="F" if panel == 1 else "C")
    for column in range(0, shape[1], panel):
        found[:, column : column + panel] = dataset[first:stop, column : column + panel]
    return found


def _native(array: Array) -> Array:
    """Convert to what slices may hold: native numbers of at most 64 bits, and text."""
    if array.dtype.kind == "S":
        return np.strings.decode(array, "utf-8")
    if array.dtype.kind == "O":
        return np.array([value.decode("utf-8") for value in array.ravel().tolist()]).reshape(array.shape)
    if array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
