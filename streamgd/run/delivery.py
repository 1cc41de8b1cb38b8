"""The blocks of a Dask collection on their way to the lanes.

The blocks of the rounds that are handed over at once are computed on workers, near the lanes that need them, and go
from worker to worker; the client holds the futures of those that were handed over last. At most three of the longest
turns are under way, behind one another: so no more of the collection is in memory than these need.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from streamgd.data.plan import EpochPlan
from streamgd.run.lane_rows import LanePlans
from streamgd.run.runs import Run
from streamgd.run.turns import Span


class DeliveredBlocks:
    """Computes blocks where they are needed.

    Parameters
    ----------
    run : Run
        Over a `DaskSource`.
    client : distributed.Client
        Of the cluster.
    plans : LanePlans
        Which blocks the lanes' rows lie in.
    """

    def __init__(self, run: Run, client: Any, plans: LanePlans) -> None:
        self._collection: Any = run.source
        self._client, self._plans = client, plans
        self._epochs: dict[tuple[int, int], EpochPlan] = {}
        self._futures: dict[int, list[Any]] = {}
        self._name, self._attempt = uuid.uuid4().hex[:12], 0

    def deliver(
        self, span: Span, lanes: Mapping[int, str], workers: Sequence[str] | None
    ) -> dict[int, dict[int, list[Any]]]:
        """Have the blocks of some rounds computed.

        Parameters
        ----------
        span : Span
            Their rows.
        lanes : mapping of int to str
            The worker of each lane.
        workers : sequence of str or None
            The only workers that may take part, if not all may.

        Returns
        -------
        dict of int to dict of int to list of Future
            The blocks of each lane.
        """
        wanted = {lane: self._blocks_of(lane, span) for lane in lanes}
        kept = {block for blocks in wanted.values() for block in blocks}
        # Rounds that were handed over before hold futures of their own.
        self._futures = {block: futures for block, futures in self._futures.items() if block in kept}
        return {lane: self._computed(blocks, workers or [lanes[lane]]) for lane, blocks in wanted.items()}

    def clear(self) -> None:
        """Release what was computed; what is asked for from now on are other tasks."""
        self._futures.clear()
        self._attempt += 1

    def _computed(self, blocks: Sequence[int], workers: Sequence[str]) -> dict[int, list[Any]]:
        missing = [block for block in blocks if block not in self._futures]
        if missing:
            self._futures |= self._collection.submit(self._client, missing, workers, f"{self._name}-{self._attempt}")
        return {block: self._futures[block] for block in blocks}

    def _blocks_of(self, lane: int, span: Span) -> list[int]:
        """List the blocks behind the windows of a lane's rows."""
        plan = self._plan(span.epoch, lane)
        if span.row >= plan.n_rows:
            return []
        window, before = plan.window_at(span.row)
        found: dict[int, None] = {}
        for each in plan.windows(window):
            if before >= span.end:
                break
            before += each.n_rows
            found |= dict.fromkeys(each.table[:, 0].tolist())
        return list(found)

    def _plan(self, epoch: int, lane: int) -> EpochPlan:
        if (epoch, lane) not in self._epochs:
            for old in [key for key in self._epochs if key[0] < epoch - 1]:
                del self._epochs[old]
            self._epochs[epoch, lane] = self._plans.epoch(epoch, lane)
        return self._epochs[epoch, lane]
