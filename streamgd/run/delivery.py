"""The blocks of a Dask collection on their way to the lanes.

The blocks of the rounds that are handed over at once are computed on workers, near the lanes that need them, and go
from worker to worker; the client holds the futures of those that were handed over last. At most three of the longest
turns are under way, behind one another: so no more of the collection is in memory than these need.

What is persisted is in memory anyway. Where workers have room for the blocks of their lanes, these stay with them from
the first shared rounds on; and once an epoch is over, which needed them all, lanes read on over them to the end of the
run. Otherwise the same blocks would go from worker to worker in every epoch, in many tasks. After a loss there may be
less room, and it is as without.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from streamgd.data.plan import EpochPlan, rows_of_lanes
from streamgd.run.asking import tell_workers
from streamgd.run.flights import deliver, keep_blocks
from streamgd.run.graph import Graph
from streamgd.run.lane_rows import LanePlans
from streamgd.run.members import Members
from streamgd.run.runs import Run
from streamgd.run.turns import Span

#: Lanes that take their turns in one task, and the worker where they belong.
Group: TypeAlias = tuple[list[int], str]


class Deliveries:
    """Has the blocks behind rounds come to the lanes.

    Parameters
    ----------
    run : Run
        Over a `DaskSource`.
    client : distributed.Client
        Of the cluster.
    members : Members
        The workers.
    plans : LanePlans
        Which blocks the lanes' rows lie in.
    """

    def __init__(self, run: Run, client: Any, members: Members, plans: LanePlans) -> None:
        self._client, self._members, self._plans = client, members, plans
        self._blocks = _ComputedBlocks(run, client, plans)
        self._name, self._attempt = uuid.uuid4().hex[:12], 0
        source: Any = run.source
        rows = rows_of_lanes(source.block_rows, plans.n_lanes, plans.seed, shuffle=plans.shuffle)
        self._lane_bytes = (rows * (source.stored_bytes / source.n_rows)).astype(np.int64).tolist()
        self._most_rows = plans.most_rows()
        self._may_keep = bool(source.lies_in_cluster)
        self._groups: list[Group] = []  # those that were asked about last
        self._keepers: list[Group] = []  # the same, if their blocks stay
        self._kept_from = plans.n_epochs  # the epoch from which they have them all
        self._passed: dict[str, list[Any]] = {}  # what came to them before that
        self._all: dict[str, Any] = {}  # and since then, by lanes

    def kept(self, groups: Sequence[Group], epoch: int) -> bool:
        """Whether groups that share the rounds of an epoch have all blocks of their lanes, to the end of the run."""
        if self._groups != groups:
            self._forget()
            self._groups = list(groups)
            last = self._plans.n_epochs - 1
            if self._may_keep and epoch < last and self._members.have_room_beside(self._lane_bytes):
                self._keepers, self._kept_from = list(groups), epoch + 1
        return epoch >= self._kept_from

    def bring(self, work: Any, rows: Span, groups: Sequence[Group], *, shared: bool) -> list[Any]:
        """Have the blocks of some rounds come, and lanes fill windows meanwhile.

        A turn's own blocks would come only once the merge before it is done, because then it is given to a worker; and
        a turn that names one task in place of all blocks is cheaper to schedule.

        Parameters
        ----------
        work : Future
            Of the workers' `WorkerWork`.
        rows : Span
            Of the rounds.
        groups : sequence of Group
            Which lanes take their turns in one task, and where.
        shared : bool
            Whether workers share the rounds; then `kept` was asked before.

        Returns
        -------
        list of Future
            Of what the turns of each group take; whoever asked for them releases them.
        """
        from distributed import Future

        if shared and self._keepers == groups and rows.epoch >= self._kept_from:
            if not self._all:
                self._keep_all(work, rows.epoch)
            return [Future(self._all[_text(lanes)].key, self._client) for lanes, _ in groups]
        graph = Graph(self._client, self._members.fit)
        keys = []
        for lanes, address, numbers, computed in self._computed(rows, groups):
            # The same turn of the same lanes has the same key: what was delivered ahead is not delivered again.
            key = (f"lane-blocks-{self._name}-{self._attempt}", rows.epoch, rows.row, rows.end, _text(lanes))
            keys.append(graph.add(key, address, 15, deliver, work, rows, lanes, numbers, computed))
        found = graph.hand_over(keys)
        if shared and self._keepers == groups:
            for (lanes, _), future in zip(groups, found, strict=True):
                self._passed.setdefault(_text(lanes), []).append(Future(future.key, self._client))
        return found

    def _keep_all(self, work: Any, epoch: int) -> None:
        """Have workers hold all blocks of their lanes: those that came before, and what these lack."""
        rows, n_epochs = Span(epoch, 0, self._most_rows), self._plans.n_epochs - epoch
        graph = Graph(self._client, self._members.fit)
        keys = {}
        for lanes, address, numbers, computed in self._computed(rows, self._keepers):
            key = (f"lane-blocks-{self._name}-{self._attempt}", epoch, _text(lanes))
            here = [lane for some, where in self._keepers if where == address for lane in some]
            n_bytes = sum(self._lane_bytes[lane] for lane in lanes)
            held = self._passed.get(_text(lanes), [])
            arguments = work, rows, n_epochs, lanes, here, held, numbers, computed, n_bytes
            keys[_text(lanes)] = graph.add(key, address, 15, keep_blocks, *arguments)
        self._all = dict(zip(keys, graph.hand_over(list(keys.values())), strict=True))
        for futures in self._passed.values():
            _release(futures)
        self._passed.clear()
        self._blocks.clear()

    def _computed(
        self, rows: Span, groups: Sequence[Group]
    ) -> list[tuple[list[int], str, list[list[int]], list[list[Any]]]]:
        at = {lane: address for lanes, address in groups for lane in lanes}
        blocks = self._blocks.of(rows, at, self._members.fit)
        return [
            (lanes, address, [list(blocks[lane]) for lane in lanes], [list(blocks[lane].values()) for lane in lanes])
            for lanes, address in groups
        ]

    def start_again(self, work: Any) -> None:
        """Forget what was delivered after a loss, and keep no more."""
        self._may_keep = False
        if self._keepers:  # a worker that gets no tasks now, for lack of memory, has readers still that hold blocks
            with contextlib.suppress(Exception):
                tell_workers(self._client, _free_readers, work.key)
        self.clear()

    def clear(self) -> None:
        """Release what was delivered; what is asked for from now on are other tasks."""
        self._forget()
        self._groups = []
        self._blocks.clear()
        self._attempt += 1

    def _forget(self) -> None:
        """Let go of what stays with lanes."""
        self._keepers, self._kept_from = [], self._plans.n_epochs
        for futures in (*self._passed.values(), self._all.values()):
            _release(futures)
        self._passed.clear()
        self._all.clear()


def _release(futures: Iterable[Any]) -> None:
    """Release futures even if a traceback holds them."""
    for future in futures:
        future.release()


def _text(lanes: Sequence[int]) -> str:
    return " ".join(map(str, lanes))


def _free_readers(key: Any, dask_worker: Any = None) -> None:
    """Close what waits on a worker for its lanes' next turns."""
    work = dask_worker.data.get(key)
    if work is not None:
        threading.Thread(target=work.readers.keep_only, args=((),), name="streamgd-close", daemon=True).start()


class _ComputedBlocks:
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

    def of(
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
