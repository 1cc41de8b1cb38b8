"""Rows that one worker reads for another, which plays the first rounds of all lanes by itself.

Such rounds need few rows of a lane, but whoever reads them fills whole windows; and where rows are slow to decode, all
workers together are done with them sooner than one. Each lane's rows are read where the lane has its turns later, so
that its reader stands where these begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from streamgd.run.lane_rows import LaneReader


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in memory, as in `streamgd.data.rows.Window`.

    Attributes
    ----------
    X : ndarray of shape (n_rows, n_features), float32 or float64
        Scaled features.
    y : ndarray of shape (n_rows, n_outputs), float64
        Encoded targets.
    weight : ndarray of shape (n_rows,), float64, or None
        Sample weights.
    ids : ndarray of shape (n_rows,), uint64
        Hashed identity of each row.
    """

    X: NDArray[Any]
    y: NDArray[np.float64]
    weight: NDArray[np.float64] | None
    ids: NDArray[np.uint64]

    @property
    def n_rows(self) -> int:
        """How many there are."""
        return len(self.ids)

    def compiled(self) -> Self:
        """Return the rows as compiled code takes them: where messages leave them, they may lie at odd addresses."""
        X, y, weight, ids = (
            None if array is None else np.require(array, requirements=["C", "A", "W"])
            for array in (self.X, self.y, self.weight, self.ids)
        )
        assert X is not None
        assert y is not None
        assert ids is not None
        return type(self)(X, y, weight, ids)


@dataclass(frozen=True, eq=False)
class SentRows:
    """The next rows of a lane.

    Attributes
    ----------
    lane, row, lane_rows : int
        Which lane, where in its epoch they begin, and how many rows that has.
    parts : tuple of Rows
        In order.
    read_rows : int
        Rows that were read for them, or with them for later.
    wait_s : float
        Seconds that these were waited for.
    """

    lane: int
    row: int
    lane_rows: int
    parts: tuple[Rows, ...]
    read_rows: int
    wait_s: float

    def __sizeof__(self) -> int:
        """Return the bytes that the rows take, by which Dask judges what to send, and when."""
        return sum(part.X.nbytes + part.y.nbytes + 2 * part.ids.nbytes for part in self.parts)

    @classmethod
    def read(cls, reader: LaneReader, n_rows: int) -> Self:
        """Copy the next rows of a reader, up to its epoch's end."""
        row, read_rows, wait_s = reader.row, reader.read_rows, reader.wait_s
        parts = tuple(
            Rows(
                window.X[first:stop].copy(),
                window.y[first:stop].copy(),
                None if window.weight is None else window.weight[first:stop].copy(),
                window.ids[first:stop].copy(),
            )
            for window, first, stop in reader.pieces(n_rows)
        )
        read_rows, wait_s = reader.read_rows - read_rows, reader.wait_s - wait_s
        return cls(reader.lane, row, reader.lane_rows, parts, read_rows, wait_s)


class SentReader:
    """Hands out rows that were sent, as a `LaneReader` does those that it reads.

    Parameters
    ----------
    sent : SentRows
        The rows; they stay as they are.
    """

    def __init__(self, sent: SentRows) -> None:
        self.row, self.lane_rows = sent.row, sent.lane_rows
        self.wait_s, self.read_rows = 0.0, 0
        self._parts = iter(sent.parts)
        self._part: Rows | None = None
        self._at = 0  # next row of the part
        self._unsaid = sent.read_rows, sent.wait_s

    def pieces(self, n_rows: int) -> Iterator[tuple[Rows, int, int]]:
        """Yield (rows, start, stop) of the next rows, up to the epoch's end."""
        end = min(self.row + n_rows, self.lane_rows)
        (read_rows, wait_s), self._unsaid = self._unsaid, (0, 0.0)
        self.read_rows += read_rows
        self.wait_s += wait_s
        while self.row < end:
            if self._part is None:
                self._part, self._at = next(self._parts).compiled(), 0
            part = self._part
            stop = min(part.n_rows, self._at + end - self.row)
            yield part, self._at, stop
            self.row += stop - self._at
            self._at = stop
            if stop == part.n_rows:
                self._part = None
