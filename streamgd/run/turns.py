"""How long a lane's turn is: short at first, then longer and longer.

Until the coefficients are roughly right, lanes that train by themselves go astray; later, each of them could go on for
long. So a turn is a twentieth of what the lane has seen before, at least one batch, and a tenth more of what it has
seen beyond 50,000 rows. Eight lanes missed 11 % of what can be learnt from adult in an epoch, and twice as much with
turns of a tenth; with 2.4 million rows, turns of a twentieth and these missed the same, and those of a third more. A
turn is never longer than what takes a worker some seconds, next to which the milliseconds of a round's overhead are
nothing. The bounds are counted in rows of the lane's epoch and are a pure function of the run's configuration, layout
and data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from streamgd.run.runs import Run

#: A turn is the rows that the lane has seen before, divided by this; and those beyond so many, divided by that.
_GROWTH, _MANY_ROWS, _LATER_GROWTH = 20, 50_000, 10
#: Bytes of rows in a turn at most; of Dask collections, whose blocks wait in memory, half the lane's buffer at most.
MOST_BYTES = 1_000_000_000
#: With more lanes than these turns may be longer, as a round's tasks are more.
_FEW_LANES = 32


@dataclass(frozen=True)
class Span:
    """Rows of every lane's epoch: those of a turn, or of several that follow one another. A lane may have fewer.

    Attributes
    ----------
    epoch, row, end : int
        Which epoch, the first row, and the one after the last.
    """

    epoch: int
    row: int
    end: int

    @property
    def n_rows(self) -> int:
        """Rows of a lane, if it has so many."""
        return self.end - self.row


@dataclass(frozen=True)
class Turns:
    """The bounds of turns.

    Attributes
    ----------
    batch_rows, most_rows : int
        The shortest turn and the longest.
    lane_rows : int
        Rows of a lane's epoch, about.
    grow : bool
        Whether turns are short at first. With one lane there is nothing to merge.
    """

    batch_rows: int
    most_rows: int
    lane_rows: int
    grow: bool

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return those of a run."""
        batch, layout, n_lanes = run.batch_rows, run.layout, run.config.n_lanes
        most_bytes = longest(n_lanes)
        if run.source.holds_block:
            most_bytes = min(most_bytes, layout.buffer_bytes // 2)
        most = max(1, most_bytes // layout.row_bytes // batch) * batch
        return cls(batch, most, -(-run.source.n_rows // n_lanes), n_lanes > 1)

    def at(self, epoch: int, row: int) -> Span:
        """Return the turn that begins at a row of the lane's epoch."""
        if not self.grow:
            return Span(epoch, row, row + self.most_rows)
        seen = epoch * self.lane_rows + row
        n_rows = seen // _GROWTH + max(0, seen - _MANY_ROWS) // _LATER_GROWTH
        return Span(epoch, row, row + min(self.most_rows, max(1, n_rows // self.batch_rows) * self.batch_rows))


def longest(n_lanes: int) -> int:
    """Return the bytes of rows in a turn at most, so that its work is ten times what a round costs beside it."""
    return MOST_BYTES * max(1, n_lanes // _FEW_LANES)
