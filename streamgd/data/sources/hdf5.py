"""HDF5 files as a source.

`hdf5_layout` describes the files, `hdf5_blocks` cuts them into blocks, and `hdf5_rows` reads rows of them. Files are
opened by the process that reads, a bounded number at a time, and never travel with a pickle or a fork.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from streamgd.data.sources.base import (
    DEFAULT_BLOCK_BYTES,
    Array,
    BlockReader,
    Slice,
    Source,
    TargetInfo,
    choose_row_dtype,
)
from streamgd.data.sources.buffers import Bytes
from streamgd.data.sources.files import stamp_of
from streamgd.data.sources.flat import FlatRows, Part, Strip
from streamgd.data.sources.hdf5_blocks import Cut, advise, cut_into_blocks, place_bytes, rows_at_least
from streamgd.data.sources.hdf5_layout import (
    DatasetInfo,
    FileInfo,
    check_agreement,
    describe_file,
    flat_offset,
    hash_of,
    widest_dtype,
)
from streamgd.data.sources.hdf5_rows import OpenFiles
from streamgd.errors import CorruptDataError, EmptySourceError, OptionError, SchemaError

#: Rows of target and weights read at once, and how many times as many are decoded ahead of whoever consumes them.
_TARGET_ROWS, _TARGETS_AHEAD = 131_072, 2


class Hdf5Source(Source):
    """One or several HDF5 files.

    Parameters
    ----------
    paths : str, path, or sequence of them
        Files, in the order of their rows. Files without rows are skipped.
    features : str or sequence of str, default="X"
        Dataset of shape (n_rows, n_features), or several of them and of shape (n_rows,), side by side. Datasets in
        groups are named with slashes.
    target : str or None, default="y"
        Dataset of shape (n_rows,) or (n_rows, n_outputs): numbers, booleans or strings.
    weight : str or None, default=None
        Dataset of shape (n_rows,).
    dtype : {"auto", "float32", "float64"}, default="auto"
        Row dtype, see `streamgd.data.sources.base.choose_row_dtype`.
    block_bytes : int, default=1 MiB
        About how many bytes of rows make a block, where chunks leave the choice.

    Raises
    ------
    SourceNotFoundError
        If a file or a dataset is not there.
    SchemaError
        If types, shapes or row counts cannot be used together.
    CorruptDataError
        If a file cannot be read.
    EmptySourceError
        If there are no rows.
    OptionError
        If `dtype` is unknown, no path is given, or a dataset would be used twice.

    Notes
    -----
    The fingerprint holds the size of each file and a hash of its first 64 KiB, its last 16 KiB and 8 pieces of 4 KiB
    between (of the whole up to 256 KiB), the layout of the datasets, and, with several files, their names relative to
    their common folder. Of files that are linked to, or that virtual datasets take rows from, it sees the layout only;
    the stamp has size and time of all of them.

    While files are open, HDF5's locks keep other processes from writing to them.
    """

    kind = "hdf5"

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        features: str | Sequence[str] = "X",
        target: str | None = "y",
        weight: str | None = None,
        dtype: str = "auto",
        block_bytes: int = DEFAULT_BLOCK_BYTES,
    ) -> None:
        listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        names = [features] if isinstance(features, str) else list(features)
        _check_use(listed, names, target, weight)
        # Workers may run in another folder. Links are not followed: they may be re-pointed.
        located = [os.path.abspath(path) for path in listed]  # noqa: PTH100
        described = [describe_file(path, names, target, weight) for path in located]
        files = [info for info in described if info.n_rows]
        if not files:
            raise EmptySourceError(f"{_short(located)}: dataset {names[0]!r} has no rows")
        first = files[0]
        if isinstance(features, str) and len(first.features[0].shape) == 1:
            raise SchemaError(
                f"{first.path}: dataset {features!r} has shape {first.features[0].shape}, expected "
                f"(n_rows, n_features). If it is a single feature, say so with features=[{features!r}]"
            )
        for info in files[1:]:
            check_agreement(first, info)
        self.name = _short(located)
        self._files = tuple(files)
        self._as_matrix = len(names) == 1 and len(first.features[0].shape) == 2
        self.n_features = sum(info.width for info in first.features)
        self.feature_names = None if self._as_matrix else tuple(_feature_names(first.features))
        dtypes = [widest_dtype([info.features[i] for info in files]) for i in range(len(names))]
        self.row_dtype = choose_row_dtype(dtypes, dtype)
        self.feature_dtypes = tuple(
            str(each) for each, info in zip(dtypes, first.features, strict=True) for _ in range(info.width)
        )
        self.target = _target_info(files)
        self.has_weight = weight is not None
        self.stored_bytes = sum(each.stored_bytes for info in files for each in info.datasets)
        n_rows = sum(info.n_rows for info in files)
        self.is_flat = all(each.is_flat for info in files for each in info.datasets)
        self.decodes_slowly = any("deflate" in each.filters for info in files for each in info.features)
        self._set_blocks([cut_into_blocks(info, block_bytes, n_rows) for info in files], block_bytes)
        self.fingerprint = self._make_fingerprint()
        self.origin = {
            "kind": self.kind,
            "data": located[0] if len(located) == 1 else located,
            "features": features if isinstance(features, str) else names,
            "target": target,
            "weight": weight,
            "modified": [Path(path).stat().st_mtime for path in located],
        }
        self._opened: dict[int, OpenFiles] = {}

    def _set_blocks(self, cuts: Sequence[Cut], block_bytes: int) -> None:
        ends = [np.append(cut.starts[1:], info.n_rows) for cut, info in zip(cuts, self._files, strict=True)]
        self.block_rows = np.concatenate([end - cut.starts for cut, end in zip(cuts, ends, strict=True)])
        self._block_start = np.concatenate([cut.starts for cut in cuts])
        self._block_file = np.repeat(np.arange(len(cuts)), [len(cut.starts) for cut in cuts])
        self._held = tuple(cut.held for cut in cuts)
        self.open_block_bytes = max(cut.open_bytes for cut in cuts) + place_bytes(self._files)
        self.slice_cost_rows = max(rows_at_least(info) for info in self._files)
        self._times_decoded = max(cut.times_decoded for cut in cuts)
        self._block_bytes = block_bytes

    def open_block(self, block: int, start: int = 0, *, piece_rows: int = 16384) -> BlockReader:
        """Open a run of rows; nothing is read yet."""
        return _Reader(self, block, start)

    def read_rows(
        self, file: int, datasets: Sequence[int], first: int, stop: int, lent: list[Bytes] | None = None
    ) -> list[Array]:
        """Read rows of some datasets of one file, features, target and weight being numbered in this order.

        See `streamgd.data.sources.hdf5_rows.OpenFiles.read`.
        """
        return self._open_files().read(file, datasets, first, stop, lent)

    def give_back(self, lent: list[Bytes]) -> None:
        """Take back memory that `read_rows` lent, and empty the list."""
        self._open_files().give_back(lent)

    def _open_files(self) -> OpenFiles:
        # Keyed by process: a forked child must neither use its parent's files nor wait for a lock whose holder was
        # not forked. `setdefault` is atomic.
        number = os.getpid()
        found = self._opened.get(number)
        if found is None:  # without a reference to the source: files are closed as it is forgotten
            block_at = partial(_block_at, self._block_file, self._block_start)
            found = self._opened.setdefault(number, OpenFiles(self._files, block_at))
        return found

    def flat_rows(self) -> FlatRows | None:
        """Say where the rows lie if no dataset is chunked; see `Source.flat_rows`."""
        return FlatRows(self._block_file, self._block_start, self._strips) if self.is_flat else None

    def _strips(self, file: int) -> list[Strip]:
        """Look up where the rows of a file's datasets lie, and make sure that they still do."""
        opened, info = self._open_files(), self._files[file]
        with opened.lock:
            handles = opened.get(file)
            offsets = [flat_offset(handle) for handle in handles]
            h5py.h5f.flush(handles[0].file.id)  # what this process wrote through another handle
        n_features, found, column = len(info.features), [], 0
        for i, (each, offset) in enumerate(zip(info.datasets, offsets, strict=True)):
            if offset is None:
                raise CorruptDataError(
                    f"{info.path} was changed while it was in use: dataset {each.name!r} was stored in one piece, and "
                    "is no longer. Open the source again"
                )
            part: Part = "features" if i < n_features else "target" if i == n_features and self.target else "weight"
            first = column if part == "features" else 0
            # A dataset's own file: behind a link, it is another one.
            found.append(Strip(part, handles[i].file.filename, offset, each.row_bytes, each.dtype, first, each.width))
            column += each.width
        return found

    def lend(self, n_bytes: int) -> None:
        """Let this process keep decoded targets and weights; see `Source.lend`."""
        if not self.is_flat:
            self._open_files().kept.allow(n_bytes)

    def place(self, block: int) -> tuple[int, int, int]:
        """Return file, first row and row after the last of a block."""
        start = int(self._block_start[block])
        return int(self._block_file[block]), start, start + int(self.block_rows[block])

    def held(self, file: int) -> tuple[bool, ...]:
        """Tell for each dataset of a file whether an open block keeps its rows decoded."""
        return self._held[file]

    def slice_of(self, arrays: Sequence[Array]) -> Slice:
        """Put arrays, one for each dataset, together as a slice."""
        rest = list(arrays)
        weight = rest.pop() if self.has_weight else None
        y = rest.pop() if self.target is not None else None
        if self._as_matrix:
            return Slice(rest[0], y, weight)
        columns: list[Array] = []
        for array in rest:
            columns.extend([array] if array.ndim == 1 else np.ascontiguousarray(array.T))
        return Slice(columns, y, weight)

    def iter_targets(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any, Array | None]]:
        """Read target and weights, many blocks at a time."""
        if self.target is None and not self.has_weight:
            return
        first = start
        for arrays in self._read_targets(start, self.n_rows if stop is None else stop):
            yield first, arrays[0] if self.target is not None else None, arrays[-1] if self.has_weight else None
            first += len(arrays[0])

    def _read_targets(self, start: int, stop: int) -> Iterator[list[Array]]:
        """Read target and weights in file order; where they must be decoded, the next ones meanwhile."""
        n_features = len(self._files[0].features)
        pieces: list[tuple[int, range, int, int]] = []
        decoded, before = False, 0
        for file, info in enumerate(self._files):
            first, last = max(0, start - before), min(info.n_rows, stop - before)  # of this file
            before += info.n_rows
            if first >= last:
                continue
            wholes = [each.chunks[0] for each in info.datasets[n_features:] if each.chunks and each.in_wholes]
            decoded |= bool(wholes)
            tallest = max(wholes, default=1)  # whole chunks, so that each is decoded once
            step = tallest * max(1, self.target_piece_rows(_TARGET_ROWS) // tallest)
            wanted = range(n_features, len(info.datasets))
            cuts = range(first - first % step, last, step)
            pieces += [(file, wanted, max(at, first), min(at + step, last)) for at in cuts]
        if not decoded or len(pieces) <= 1:
            yield from (self.read_rows(*piece) for piece in pieces)
            return
        pool = ThreadPoolExecutor(_TARGETS_AHEAD, "streamgd-targets")
        try:
            ahead: deque[Future[list[Array]]] = deque()
            for number in range(len(pieces)):
                while len(ahead) <= _TARGETS_AHEAD and number + len(ahead) < len(pieces):
                    ahead.append(pool.submit(self.read_rows, *pieces[number + len(ahead)]))
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def check_unchanged(self, blocks: Sequence[int]) -> None:
        """Hash a little of each file, as for the fingerprint; see `Source.check_unchanged`."""
        for file in dict.fromkeys(self.place(block)[0] for block in blocks):
            info = self._files[file]
            if hash_of(info.path) != (info.n_bytes, info.digest):
                raise CorruptDataError(f"{info.path}: not the file that was opened first, or changed since")

    def stamp(self) -> dict[str, Any]:
        """Look at the files, also those that rows are taken from behind links; see `Source.stamp`."""
        return stamp_of(path for info in self._files for path in info.behind)

    def locate(self, block: int, row: int) -> str:
        """Name the file and the row in it."""
        file, first, _ = self.place(block)
        return f"{self._files[file].path}, row {first + row:,} (counted from 0)"

    def mixing_hint(self) -> str | None:
        """Advise other chunks where those read whole are so tall that blocks are big, or read again and again."""
        return advise(self._files, int(self.block_rows.max()), self._times_decoded, self._block_bytes)

    def close(self) -> None:
        """Close the files this process holds open; the next read opens them again."""
        opened = self._opened.get(os.getpid())
        if opened is not None:
            opened.close()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind."""
        return {**self.__dict__, "_opened": {}}

    def _make_fingerprint(self) -> dict[str, Any]:
        paths = [info.path for info in self._files]
        root = os.path.commonpath([str(Path(path).parent) for path in paths])
        # The name of a single file only informs: renamed, it is the same data.
        names = [Path(os.path.relpath(path, root)).as_posix() for path in paths] if len(paths) > 1 else [None]
        return {
            "kind": self.kind,
            "n_rows": self.n_rows,
            "files": [
                {
                    "name": name,
                    "n_bytes": info.n_bytes,
                    "digest": info.digest,
                    "features": [str(each) for each in info.features],
                    "target": None if info.target is None else str(info.target),
                    "weight": None if info.weight is None else str(info.weight),
                }
                for name, info in zip(names, self._files, strict=True)
            ],
        }


def _block_at(block_file: Array, block_start: Array, file: int, row: int) -> int:
    """Tell the block that a row of a file lies in."""
    return int(np.flatnonzero((block_file == file) & (block_start <= row))[-1])


class _Reader(BlockReader):
    """A position in a block, with what must stay decoded."""

    def __init__(self, source: Hdf5Source, block: int, start: int) -> None:
        self._source = source
        self._file, first, self._stop = source.place(block)
        self._at = self._held_from = first + start
        held = source.held(self._file)
        self._kept = [i for i, keep in enumerate(held) if keep]
        self._direct = [i for i, keep in enumerate(held) if not keep]
        self._decoded: dict[int, Array] = {}
        self._lent_to_block: list[Bytes] = []
        self._lent_to_slice: list[Bytes] = []

    def read(self, n_rows: int) -> Slice:
        """Return the next rows: views of what is kept decoded, the rest straight from the file."""
        first, stop = self._at, self._at + n_rows
        if self._kept and not self._decoded:
            rows = self._source.read_rows(self._file, self._kept, first, self._stop, self._lent_to_block)
            self._decoded, self._held_from = dict(zip(self._kept, rows, strict=True)), first
        part = slice(first - self._held_from, stop - self._held_from)
        found = {i: array[part] for i, array in self._decoded.items()}
        if self._direct:
            self._source.give_back(self._lent_to_slice)
            rows = self._source.read_rows(self._file, self._direct, first, stop, self._lent_to_slice)
            found.update(zip(self._direct, rows, strict=True))
        self._at = stop
        return self._source.slice_of([found[i] for i in range(len(found))])

    def close(self) -> None:
        """Forget the decoded rows."""
        self._decoded = {}
        self._source.give_back(self._lent_to_block)
        self._source.give_back(self._lent_to_slice)


def _check_use(paths: Sequence[Any], features: Sequence[str], target: str | None, weight: str | None) -> None:
    if not paths:
        raise OptionError("no HDF5 file is given; name one, or several")
    if not features:
        raise OptionError("features=[]: name at least one dataset")
    used = [name.strip("/") for name in (*features, target, weight) if name is not None]
    twice = sorted({repr(name) for name in used if used.count(name) > 1})
    if twice:
        raise OptionError(
            f"dataset {', '.join(twice)} would be used twice; name it in one place only: features, target or weight"
        )


def _feature_names(features: Sequence[DatasetInfo]) -> Iterator[str]:
    for info in features:
        if len(info.shape) == 1:
            yield info.name
        else:
            yield from (f"{info.name}[{j}]" for j in range(info.width))


def _target_info(files: Sequence[FileInfo]) -> TargetInfo | None:
    infos = [info.target for info in files if info.target is not None]
    if not infos:
        return None
    first = infos[0]
    numeric = first.dtype != "string"
    dtype = str(widest_dtype(infos)) if numeric else "string"
    return TargetInfo(first.name, first.width, dtype, numeric, len(first.shape) == 1)


def _short(paths: Sequence[str]) -> str:
    """Name the files for messages."""
    first = Path(paths[0]).name
    return first if len(paths) == 1 else f"{first} and {len(paths) - 1:,} more"
