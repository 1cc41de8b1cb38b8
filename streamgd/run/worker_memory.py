"""What a worker's memory goes to, and how much of it is left to read ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from streamgd.data.layout import Layout, format_bytes
from streamgd.data.sources.base import Source
from streamgd.run.lane_rows import LEAST_WINDOWS, more_windows
from streamgd.run.runs import Run

#: Resident memory of a worker process that has imported everything and compiled its kernels.
PROCESS_BYTES = 350_000_000


@dataclass(frozen=True)
class WorkerMemory:
    """What a run takes of a worker's memory.

    Attributes
    ----------
    copied_bytes : int
        Rows in the memory of the client, which go to every worker.
    state_bytes : int
        Of one state.
    lane_bytes : int
        What reading a lane takes: its plan, and the blocks of Dask collections for three turns.
    window_bytes, more_windows : int
        Of a window, and how many a lane can fill beyond those of its plan.
    n_lanes : int
        Of the run.
    """

    copied_bytes: int
    state_bytes: int
    lane_bytes: int
    window_bytes: int
    more_windows: int
    n_lanes: int

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return that of a run."""
        return cls.planned(run.layout, run.source, run.state.n_bytes, run.config.n_lanes)

    @classmethod
    def planned(cls, layout: Layout, source: Source, state_bytes: int, n_lanes: int) -> Self:
        """Return that of a run to come."""
        return cls(
            source.held_bytes,
            state_bytes,
            layout.planned_bytes + (2 * layout.open_bytes + 3 * layout.buffer_bytes // 2 if source.holds_block else 0),
            layout.window_bytes,
            more_windows(layout, source),
            n_lanes,
        )

    def needed(self, n_threads: int, n_lanes: int) -> int:
        """Count the bytes that a worker needs for so many lanes that are read, so many of which are trained at once."""
        return PROCESS_BYTES + self.copied_bytes + self._states_bytes(n_threads) + n_lanes * self.lane_bytes

    def _states_bytes(self, n_threads: int) -> int:
        """Count the states before and after each turn, and all of them where they are merged."""
        return self.state_bytes * (2 * n_threads + self.n_lanes + 2)

    def lanes_kept(self, n_threads: int, limit: int) -> int:
        """Count the lanes whose windows a worker may keep and read ahead.

        Parameters
        ----------
        n_threads : int
            Lanes that it trains at once: at least so many.
        limit : int
            Bytes that it may take; 0 for no limit.
        """
        if not limit:
            return max(n_threads, self.n_lanes)
        return max(n_threads, min(self.n_lanes, (limit - self.needed(n_threads, 0)) // self.lane_bytes))

    def windows_kept(self, n_threads: int, n_lanes: int, limit: int) -> int:
        """Count the windows that each lane may have at once.

        Parameters
        ----------
        n_threads : int
            Lanes that it trains at once.
        n_lanes : int
            Lanes whose windows it keeps, as from `lanes_kept`.
        limit : int
            Bytes that it may take; 0 for no limit.
        """
        more = self.more_windows
        if limit:
            left = limit - self.needed(n_threads, n_lanes)
            more = min(more, max(0, left) // (n_lanes * self.window_bytes))
        return LEAST_WINDOWS + more

    def explained(self, n_threads: int, n_lanes: int) -> str:
        """Say where what is `needed` goes."""
        parts = [
            f"Python {format_bytes(PROCESS_BYTES)}",
            f"{n_lanes} lane(s) of {format_bytes(self.lane_bytes)}",
            f"states {format_bytes(self._states_bytes(n_threads))}",
        ]
        return ", ".join([*parts, f"the data itself {format_bytes(self.copied_bytes)}"] if self.copied_bytes else parts)
