"""Rows of a cache: what a source holds, in files of numbers that are read as they lie.

Made by `streamgd.data.cache`. The rows are the source's, in its order and under its identities; only where blocks begin
and end is the cache's own, so that many small ones mix well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.base import Array, BlockReader, Slice, Source, TargetInfo
from streamgd.data.sources.flat import FlatRows, Part, Strip
from streamgd.data.sources.mapped import MappedArray
from streamgd.errors import CorruptDataError

#: Rows of a pass over the targets alone.
_TARGET_ROWS = 65_536


@dataclass(frozen=True)
class CacheFile:
    """One file of a cache: rows of some numbers, without a header.

    Attributes
    ----------
    part : {"features", "target", "weight"}
        What it holds.
    name : str
        Its name in the cache's folder.
    dtype : numpy.dtype
        Of each number.
    width : int
        Numbers of a row.
    """

    part: Part
    name: str
    dtype: np.dtype[Any]
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize

    def words(self, rows: Array, first_row: int) -> tuple[Array, int]:
        """Return rows as whole numbers to be summed up, and the number of the first of these in the file."""
        kind = np.uint32 if self.dtype.itemsize == 4 else np.uint64
        return rows.reshape(-1).view(kind), first_row * self.width


@dataclass(frozen=True)
class Parts:
    """How the rows of a source are cut for a cache: each part lies inside one block.

    Attributes
    ----------
    block, first : ndarray of shape (n_parts,), int64
        The block of each part, and the part's first row in it.
    rows : ndarray of shape (n_parts,), int64
        Its rows.
    starts : ndarray of shape (n_parts + 1,), int64
        Its first row in the files.
    """

    block: NDArray[np.int64]
    first: NDArray[np.int64]
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, block_rows: NDArray[np.int64], part_rows: int) -> Parts:
        """Cut blocks into parts of so many rows; what is left of a block is a shorter part."""
        n_parts = -(-block_rows // part_rows)
        block = np.repeat(np.arange(len(block_rows)), n_parts)
        first = (np.arange(len(block)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)) * part_rows
        rows = np.minimum(block_rows[block] - first, part_rows)
        return cls(block, first, rows, np.concatenate([[0], np.cumsum(rows)]))

    def overlapping(self, first_row: int, n_rows: int) -> range:
        """Return the parts that some rows of the files lie in."""
        left = int(np.searchsorted(self.starts, first_row, "right")) - 1
        return range(left, int(np.searchsorted(self.starts, first_row + n_rows, "left")))


class CacheSource(Source):
    """A source's rows, read from its cache.

    Parameters
    ----------
    source : Source
        What was cached.
    folder : Path
        Where the files lie.
    files : list of CacheFile
        What they hold.
    parts : Parts
        How the rows are cut.
    sums : ndarray of shape (n_parts,), uint64
        What each part sums up to, see `sum_of_part`.
    classes : bool
        Whether targets are stored as the index of their class.
    as_source : bool
        Whether blocks are the source's instead of the parts, so that the same plan gives the same windows.
    checked : ndarray of shape (n_parts,), bool
        The parts that are known to match their sums; written to, and shared by all sources over the same cache.
    damaged : callable
        Called when a part does not match its sum; says what comes of it.

    Notes
    -----
    Each part is checked against its sum when it is first read, unless this process wrote it.
    """

    kind = "cache"
    is_flat = True

    def __init__(
        self,
        source: Source,
        folder: Path,
        files: list[CacheFile],
        parts: Parts,
        sums: NDArray[np.uint64],
        checked: NDArray[np.bool_],
        *,
        classes: bool,
        as_source: bool,
        damaged: Callable[[], str],
    ) -> None:
        self.cached = source
        self.name = source.name
        self.n_features = source.n_features
        self.feature_names = source.feature_names
        self.feature_dtypes = (files[0].dtype.name,) * source.n_features
        self.row_dtype = source.row_dtype
        assert source.target is not None
        kept = source.target
        n_outputs = 1 if classes else kept.n_outputs
        self.target = TargetInfo(kept.name, n_outputs, "float64", numeric=True, is_vector=kept.is_vector)
        self.has_weight = source.has_weight
        self.open_block_bytes = 0
        self.dropped = source.dropped
        self.fingerprint, self.origin = source.fingerprint, source.origin
        n_rows = source.n_rows
        self.stored_bytes = n_rows * sum(file.row_bytes for file in files)
        self._files, self._parts, self._sums, self._damaged = files, parts, sums, damaged
        self._columns = {
            file.part: MappedArray(
                str(folder / file.name), 0, (n_rows, file.width), (file.row_bytes, file.dtype.itemsize), file.dtype
            )
            for file in files
        }
        if as_source:
            self.block_rows, self._origin = source.block_rows, None
            self._starts = np.cumsum(source.block_rows) - source.block_rows
        else:
            self.block_rows, self._origin = parts.rows, (parts.block, parts.first)
            self._starts = parts.starts[:-1]
        self._checked = checked

    def flat_rows(self) -> FlatRows:
        """Say where the rows lie; see `Source.flat_rows`."""
        strips: list[Strip] = []
        for file in self._files:
            found = self._columns[file.part].strips(file.part, 0)
            assert found is not None
            strips += found
        return FlatRows(
            np.zeros(self.n_blocks, np.int64), self._starts, lambda file: strips, self._origin, self._require_whole
        )

    def open_block(self, block: int, start: int = 0, *, piece_rows: int = 16384) -> BlockReader:
        """Open a range of rows; costs nothing."""
        return _Reader(self, int(self._starts[block]) + start)

    def read_rows(self, first: int, stop: int) -> Slice:
        """Read consecutive rows of the files."""
        self._require_whole(np.array([first]), np.array([stop - first]))
        y, weight = self._columns["target"][first:stop], self._columns.get("weight")
        assert self.target is not None
        return Slice(
            self._columns["features"][first:stop],
            y[:, 0] if self.target.n_outputs == 1 else y,
            None if weight is None else weight[first:stop][:, 0],
        )

    def iter_targets(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any, Array | None]]:
        """Read the target and weight columns alone; see `Source.iter_targets`."""
        y, weight = self._columns["target"], self._columns.get("weight")
        assert self.target is not None
        stop, n = self.n_rows if stop is None else stop, self.target_piece_rows(_TARGET_ROWS)
        for first in range(start, stop, n):
            rows = slice(first, min(first + n, stop))
            values = y[rows]
            weights = None if weight is None else weight[rows][:, 0]
            yield first, values[:, 0] if self.target.n_outputs == 1 else values, weights

    def stamp(self) -> dict[str, Any]:
        """Return that of the source."""
        return self.cached.stamp()

    def locate(self, block: int, row: int) -> str:
        """Say where the row lies in the source."""
        if self._origin is not None:
            block, row = int(self._origin[0][block]), int(self._origin[1][block]) + row
        return self.cached.locate(block, row)

    def close(self) -> None:
        """Close the files; the next slice opens them again."""
        for column in self._columns.values():
            column.close()

    def sum_of_part(self, part: int) -> int:
        """Read a part, and sum it up."""
        first, stop = int(self._parts.starts[part]), int(self._parts.starts[part + 1])
        return sum_of_rows(self._files, [self._columns[file.part][first:stop] for file in self._files], first)

    def require_whole(self) -> None:
        """Check every part.

        Raises
        ------
        CorruptDataError
            If one does not match its sum.
        """
        self._require_whole(np.array([0]), np.array([self.n_rows]))

    def _require_whole(self, first_rows: NDArray[np.int64], n_rows: NDArray[np.int64]) -> None:
        """Check the parts that rows lie in, unless it was done before."""
        if self._checked.all():
            return
        for first, n in zip(first_rows.tolist(), n_rows.tolist(), strict=True):
            for part in self._parts.overlapping(first, n):
                if self._checked[part]:
                    continue
                if self.sum_of_part(part) != int(self._sums[part]):
                    way = self._damaged()
                    raise CorruptDataError(
                        f"the cache in {Path(self._columns['features'].path).parent} is damaged: rows "
                        f"{self._parts.starts[part]:,} to {self._parts.starts[part + 1] - 1:,} are not what was "
                        f"written. {way}. Fit or resume again"
                    )
                self._checked[part] = True

    def __getstate__(self) -> dict[str, Any]:
        """Leave what belongs to this process behind."""
        return {**self.__dict__, "_damaged": _elsewhere}


class _Reader(BlockReader):
    """A position in the files."""

    def __init__(self, source: CacheSource, at: int) -> None:
        self._source = source
        self._at = at

    def read(self, n_rows: int) -> Slice:
        """Read the next rows."""
        first, self._at = self._at, self._at + n_rows
        return self._source.read_rows(first, self._at)


def sum_of_rows(files: list[CacheFile], rows: list[Array], first_row: int) -> int:
    """Sum up consecutive rows of all files of a cache; sums of some rows and of others add up, modulo 2**64."""
    from streamgd.data.compiled.checksums import sum_words

    total = 0
    for number, (file, values) in enumerate(zip(files, rows, strict=True)):
        words, first = file.words(values, first_row)
        total += int(sum_words(words, first + (number << 56)))
    return total % 2**64


def _elsewhere() -> str:
    """Say what to do with a cache that somebody else opened."""
    return "Remove it"
