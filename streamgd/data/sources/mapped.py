"""Rows of a memory-mapped array, read from its file instead of through the mapping.

Pages of a mapping count as resident memory once touched, so that an epoch over a memmap would grow the process to the
size of the file. `unmap` replaces a memmap (or a view of one) by an object that reads the same bytes from the file,
slice by slice, and that pickles as a path.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

import numpy as np

from streamgd.data.sources.base import FLAT_DTYPES, Array
from streamgd.data.sources.flat import Part, Strip
from streamgd.errors import CorruptDataError, DataError, SourceNotFoundError


class MappedArray:
    """A strided array in a file, sliced by rows; every slice is read anew.

    Parameters
    ----------
    path : str
        The file.
    offset : int
        Byte at which the first element lies.
    shape, strides : tuple of int
        As NumPy's; strides are positive and rows do not overlap.
    dtype : numpy.dtype
        As stored.
    """

    def __init__(
        self, path: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.path = path
        self.offset = offset
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self._row_bytes = dtype.itemsize + sum((n - 1) * s for n, s in zip(shape[1:], strides[1:], strict=True))
        self._file: OpenFile | None = None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array:
        """Read consecutive rows into an array of their own."""
        first, stop, _ = rows.indices(len(self))
        n = stop - first
        if n <= 0 or 0 in self.shape:
            return np.empty((max(n, 0), *self.shape[1:]), self.dtype)
        raw = np.empty((n - 1) * self.strides[0] + self._row_bytes, np.uint8)
        self._read(raw, self.offset + first * self.strides[0])
        found: Array = np.ndarray((n, *self.shape[1:]), self.dtype, raw, strides=self.strides)
        # One column out of many: do not keep the bytes between its values.
        return found.copy() if raw.nbytes > 2 * found.nbytes else found

    def _read(self, raw: Array, at: int) -> None:
        file = self._file
        if file is None:  # two threads at once may open it twice; the loser's is closed as it is forgotten
            file = self._file = OpenFile(self.path)
        done, view = 0, raw.data
        while done < len(view):
            try:
                got = os.preadv(file.descriptor, [view[done:]], at + done)
            except OSError as err:
                raise CorruptDataError(
                    f"{self.path}: byte {at + done:,} of a mapped array cannot be read: {err}"
                ) from err
            if got == 0:
                raise CorruptDataError(
                    f"{self.path}: ends at byte {at + done:,}, but the array mapped from it reaches to at least "
                    f"{at + len(view):,}. The file was cut short after it was mapped; restore it"
                )
            done += got

    def strips(self, part: Part, column: int) -> list[Strip] | None:
        """Say where the rows lie if they fill their bytes of the file; None if there are others between them."""
        width = 1 if self.ndim == 1 else self.shape[1]
        dense = self.strides[0] == width * self.dtype.itemsize and (
            width == 1 or self.strides[1] == self.dtype.itemsize
        )
        if not dense or self.dtype.name not in FLAT_DTYPES or not self.dtype.isnative:
            return None
        return [Strip(part, self.path, self.offset, self.strides[0], self.dtype.name, column, width)]

    def close(self) -> None:
        """Forget the open file; the next slice opens it again."""
        self._file = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind."""
        return {**self.__dict__, "_file": None}


class OpenFile:
    """A descriptor that is closed with the last reference, so that a read under way in a thread keeps it.

    Parameters
    ----------
    path : str
        The file.
    unbuffered : bool, default=False
        Whether to read past the page cache, where the system has ``O_DIRECT``.
    """

    def __init__(self, path: str, *, unbuffered: bool = False) -> None:
        self.descriptor = -1
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | (getattr(os, "O_DIRECT", 0) if unbuffered else 0)
        try:
            self.descriptor = os.open(path, flags)
        except OSError as err:
            if err.errno in (errno.EMFILE, errno.ENFILE):
                raise DataError(
                    f"{path}: the file that rows are read from cannot be opened ({err.strerror}). Allow this process "
                    "more of them, for example with `ulimit -n 4096`"
                ) from err
            raise SourceNotFoundError(
                f"{path}: the file that rows are read from cannot be opened ({err.strerror}). "
                "Put it back, or open the data again where the file is now"
            ) from err

    def __del__(self) -> None:
        """Close the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)


def unmap(array: Array) -> MappedArray | list[MappedArray] | None:
    """Find the file behind an array.

    Parameters
    ----------
    array : ndarray of shape (n_rows,) or (n_rows, n_columns)
        Any array.

    Returns
    -------
    MappedArray, list of MappedArray, or None
        A list of columns where a matrix is stored column by column. None if the array is not mapped from a file, if
        the file may hold other bytes (copy-on-write mappings; deleted or replaced files), or if it runs backwards.
    """
    if not isinstance(array, np.ndarray):  # but what stands for one
        return None
    if not hasattr(os, "preadv") or array.size == 0 or min(array.strides) <= 0:
        return None
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    # A view's own `offset` is that of the array it was taken from: only the outermost memmap's can be relied on.
    if not isinstance(root, np.memmap) or not isinstance(root.base, mmap.mmap):
        return None
    if root.filename is None or root.mode == "c":
        return None
    offset = root.offset + array.ctypes.data - root.ctypes.data
    path = os.path.abspath(root.filename)  # noqa: PTH100 - Path.resolve would follow links that may be re-pointed
    row_bytes = array.dtype.itemsize if array.ndim == 1 else (array.shape[1] - 1) * array.strides[1] + array.itemsize
    if array.ndim == 1 or array.strides[0] >= row_bytes:
        found = [MappedArray(path, offset, array.shape, array.strides, array.dtype)]
        whole = True
    else:
        found = [
            MappedArray(path, offset + j * array.strides[1], array.shape[:1], array.strides[:1], array.dtype)
            for j in range(array.shape[1])
        ]
        whole = False
    if not all(_agrees(part, array if whole else array[:, j]) for j, part in enumerate(found)):
        return None
    return found[0] if whole else found


def _agrees(mapped: MappedArray, array: Array) -> bool:
    """Compare the outermost rows: a file deleted or replaced after it was mapped is not what the mapping shows."""
    try:
        return all(mapped[rows].tobytes() == array[rows].tobytes() for rows in (slice(0, 1), slice(-1, None)))
    except (CorruptDataError, SourceNotFoundError):
        return False
    finally:
        mapped.close()
