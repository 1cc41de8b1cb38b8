"""The files of rows that lie as they are: opened, described as compiled code takes it, and read in order."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.flat import (
    CODE,
    FD,
    FEATURES,
    N_COLUMNS,
    OFFSET,
    PART,
    ROW_BYTES,
    TARGET,
    WEIGHT,
    load_numbers,
)
from streamgd.data.compiled.memory import DTYPE_CODES
from streamgd.data.sources.base import Array, Slice, Source
from streamgd.data.sources.flat import FlatRows, Strip
from streamgd.data.sources.mapped import OpenFile
from streamgd.data.targets import TargetCodec
from streamgd.errors import CorruptDataError

Floats = NDArray[np.float64]

_DTYPES = {code: np.dtype(name) for name, code in DTYPE_CODES.items() if name != "bool"}
_PARTS = {"features": FEATURES, "target": TARGET, "weight": WEIGHT}
#: Files kept open, and read in one call; most systems allow a process 1,024.
OPEN_FILES = 128
#: Bytes of targets that are read in one call, as float64: the fewer calls, the less often does a thread wait for the
#: interpreter's lock. Bytes of a file that pass through memory at once.
_NUMBERS_BYTES, _SCRATCH_BYTES = 2 << 20, 1 << 17


def reads_flat(source: Source, codec: TargetCodec | None) -> bool:
    """Tell whether a `FlatFiller` can read a source and encode its targets."""
    if not source.is_flat or codec is None or source.target is None:
        return source.is_flat and codec is None
    if codec.classes is None:
        exact = codec.dtype is not None and source.target.dtype in ("int64", "uint64")
        return source.target.numeric and not exact and codec.n_outputs == source.target.n_outputs
    return source.target.numeric and source.target.n_outputs == 1 and codec.sorted_numbers is not None


class FlatFiles:
    """The strips of each file as numbers, with its descriptors; the least recently used are forgotten first.

    Parameters
    ----------
    rows : FlatRows
        Where the rows of a source lie.
    unbuffered : bool, default=False
        Whether descriptors are for reads past the page cache.
    """

    def __init__(self, rows: FlatRows, *, unbuffered: bool = False) -> None:
        self._rows, self._unbuffered = rows, unbuffered
        self._lock = threading.Lock()
        self._known: OrderedDict[int, tuple[NDArray[np.int64], list[OpenFile]]] = OrderedDict()

    def open(self, file: int) -> tuple[NDArray[np.int64], list[OpenFile]]:
        """Return the strips of a file; its descriptors stay open as long as the caller holds what is returned."""
        with self._lock:
            if file in self._known:
                self._known.move_to_end(file)
                return self._known[file]
            while len(self._known) >= OPEN_FILES:
                self._known.popitem(last=False)
            found = self._known[file] = _described(self._rows.strips(file), self._unbuffered)
            return found

    def close(self) -> None:
        """Forget every file."""
        with self._lock:
            self._known.clear()


def _described(strips: Sequence[Strip], unbuffered: bool) -> tuple[NDArray[np.int64], list[OpenFile]]:
    opened = {
        path: OpenFile(path, unbuffered=unbuffered) for path in {strip.path for strip in strips} if path is not None
    }
    table = [
        (
            -1 if strip.path is None else opened[strip.path].descriptor,
            strip.offset,
            strip.row_bytes,
            DTYPE_CODES[strip.dtype],
            _PARTS[strip.part],
            strip.column,
            strip.n_columns,
        )
        for strip in strips
    ]
    return np.array(table, np.int64), list(opened.values())


def iter_numbers(
    source: Source, codec: TargetCodec, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Floats, Floats | None]] | None:
    """Read numeric targets and weights as `Source.iter_targets` does, faster; None for sources that are not flat.

    Each piece is one compiled call that does not hold the interpreter's lock. Pieces are overwritten by the next ones.
    """
    rows = source.flat_rows() if reads_flat(source, codec) and codec.classes is None else None
    if rows is None or rows.origin is not None or rows.check is not None:
        return None
    return _numbers(source, rows, codec.n_outputs, start, source.n_rows if stop is None else stop)


def _numbers(
    source: Source, rows: FlatRows, n_outputs: int, start: int, stop: int
) -> Iterator[tuple[int, Floats, Floats | None]]:
    most = max(1, min(_NUMBERS_BYTES // (8 * n_outputs), source.n_rows))
    y, weight = np.empty((most, n_outputs)), np.empty((most, 1 if source.has_weight else 0))
    widest = 8 * max(strip.n_columns for strip in rows.strips(0))  # files may differ in their types
    scratch = np.empty(max(_SCRATCH_BYTES, widest), np.uint8)
    files, before = FlatFiles(rows), 0
    ends = np.flatnonzero(np.diff(rows.block_file, append=-1)) + 1  # blocks lie in the order of their files
    for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        file, n_rows = int(rows.block_file[begin]), int(source.block_rows[begin:end].sum())
        last = min(n_rows, stop - before)
        for at in range(max(0, start - before), last, most):
            strips, held = files.open(file)
            n = min(most, last - at)
            if not load_numbers(strips, int(rows.block_start[begin]) + at, y[:n], weight[:n], scratch):
                raise _unreadable(source.locate_row(before + at), n)
            del held  # not before: a descriptor that is closed meanwhile may be another file's by now
            yield before + at, y[:n], weight[:n, 0] if source.has_weight else None
        before += n_rows


class FlatPieces:
    """Pieces of rows that lie in files as they are, without the library that wrote them, which reads one at a time.

    For several threads. Features are read to memory that each thread keeps: the next piece overwrites them.

    Parameters
    ----------
    source : Source
        Any; of one whose rows lie otherwise, nothing is read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        rows = source.flat_rows() if source.is_flat else None
        self._rows = None if rows is None or rows.check is not None else rows
        self._files = None if self._rows is None else FlatFiles(self._rows)
        self._local = threading.local()

    def read(self, block: int, start: int, n_rows: int) -> Slice | None:
        """Read rows of a block; None if they are not one strip of features, and one each of what else there is.

        Raises
        ------
        CorruptDataError
            If they cannot be read; h5py would give zeros behind the end of a file that was cut short.
        """
        if self._rows is None or self._files is None:
            return None
        table, held = self._files.open(int(self._rows.block_file[block]))
        strips = {strip[PART]: strip for strip in table.tolist()}
        if len(strips) < len(table) or not all(self._is_whole(strip) for strip in strips.values()):
            return None
        first, found = int(self._rows.block_start[block]) + start, {}
        for part, strip in strips.items():
            dtype, shape = _DTYPES[strip[CODE]], (n_rows, strip[N_COLUMNS])
            values = self._features(shape, dtype) if part == FEATURES else np.empty(shape, dtype)
            at = strip[OFFSET] + first * strip[ROW_BYTES]
            try:
                got = os.preadv(strip[FD], [values.data.cast("B")], at)
            except OSError as err:
                raise _unreadable(self._source.locate(block, start), n_rows) from err
            if got != values.nbytes:
                raise _unreadable(self._source.locate(block, start), n_rows)
            found[part] = values
        del held  # not before: a descriptor that is closed meanwhile may be another file's by now
        y, weight, target = found.get(TARGET), found.get(WEIGHT), self._source.target
        if y is not None and target is not None and target.is_vector:
            y = y[:, 0]
        return Slice(found[FEATURES], y, None if weight is None else weight[:, 0])

    def _is_whole(self, strip: list[int]) -> bool:
        """Whether a strip lies in a file and is all that there is of its part, as the source hands it out."""
        fd, _, row_bytes, code, part, _, n_columns = strip
        if fd < 0 or row_bytes != n_columns * _DTYPES[code].itemsize:
            return False
        if part == FEATURES:
            return n_columns == self._source.n_features
        target = self._source.target
        if part == TARGET:  # booleans have the code of bytes
            return target is not None and (n_columns, _DTYPES[code].name) == (target.n_outputs, target.dtype)
        return n_columns == 1

    def _features(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
        memory: Array | None = getattr(self._local, "memory", None)
        n_bytes = shape[0] * shape[1] * dtype.itemsize
        if memory is None or len(memory) < n_bytes:
            memory = self._local.memory = np.empty(n_bytes, np.uint8)
        return memory[:n_bytes].view(dtype).reshape(shape)

    def close(self) -> None:
        """Close the files. Idempotent."""
        if self._files is not None:
            self._files.close()


def _unreadable(where: str, n_rows: int) -> CorruptDataError:
    return CorruptDataError(
        f"{where}: {n_rows:,} rows from here cannot be read. The file was cut short after it was opened, or the disk "
        "fails: restore it"
    )
