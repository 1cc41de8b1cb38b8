"""The blocks of a Dask collection on their way to the lanes.

The blocks of the rounds that are handed over at once are computed on workers, near the lanes that need them, and go
from worker to worker; the client holds the futures of those that were handed over last. At most three of the longest
turns are under way, behind one another: so no more of the collection is in memory than these need.

What is persisted is in memory anyway. Blocks that a lane's worker can read where they lie are not sent at all
(`streamgd.run.in_place`). Where workers have room for the others of their lanes, these stay with them from the first
shared rounds on; and as soon as there are none that have to come, lanes read on over all of them to the end of the run.
Otherwise the same blocks would go from worker to worker in every epoch, in many tasks. After a loss there may be less
room: then nothing stays, and what can be read in place is so after a while.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from streamgd.data.plan import EpochPlan, lanes_of_blocks
from streamgd.run.asking import tell_workers
from streamgd.run.flights import deliver, hold, work_here
from streamgd.run.graph import Graph, Key
from streamgd.run.in_place import Handed, InPlace
from streamgd.run.lane_rows import LanePlans
from streamgd.run.members import Members
from streamgd.run.runs import Run
from streamgd.run.turns import Span

#: Lanes that take their turns in one task, and the worker where they belong.
Group: TypeAlias = tuple[list[int], str]

#: Seconds after a loss in which all blocks are sent, the first time and at most, where another one follows soon after
#: them: what was shown may be lost again.
_SENT_S, _MOST_SENT_S = 30.0, 600.0


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
    token : bytes
        Of the workers' `WorkerWork`.
    """

    def __init__(self, run: Run, client: Any, members: Members, plans: LanePlans, token: bytes) -> None:
        self._client, self._members, self._plans = client, members, plans
        self._blocks = _ComputedBlocks(run, client, plans)
        self._name, self._attempt = uuid.uuid4().hex[:12], 0
        source: Any = run.source
        self._row_bytes = source.stored_bytes / source.n_rows
        self._in_place = InPlace(source, client)
        self._lanes = lanes_of_blocks(plans.block_rows, plans.n_lanes, plans.seed, shuffle=plans.shuffle)
        self._lane_bytes = [0] * plans.n_lanes  # of the blocks that have to come
        self._most_rows = plans.most_rows()
        self._lies_there, self._may_keep = bool(source.lies_in_cluster), True
        self._sent_until, self._sent_s = float("-inf"), _SENT_S
        self._groups: list[Group] = []  # those that were asked about last
        self._looked = False  # whether it was seen what has to come to them
        self._keepers: list[Group] = []  # the same, if their blocks stay
        self._kept_from = plans.n_epochs  # the epoch from which they have them all
        self._held: dict[tuple[int, int], _Holding] = {}  # by lane and block, what came before that
        self._all: dict[str, Any] = {}  # and what they have since then
        self._token = token

    def kept(self, groups: Sequence[Group], epoch: int) -> bool:
        """Whether groups that share the rounds of an epoch have all blocks of their lanes, to the end of the run."""
        if self._groups != groups:
            self._free()
            self._groups, self._looked = list(groups), False
        if self._lies_there and not self._looked and time.monotonic() >= self._sent_until:
            self._looked = True
            self._see_what_has_to_come(groups, epoch)
        return epoch >= self._kept_from

    @property
    def arrived(self) -> bool:
        """Whether the blocks that are kept are all there, so that nobody waits for them."""
        if not any(self._lane_bytes):
            return True
        return bool(self._all) and all(future.status == "finished" for future in self._all.values())

    def _see_what_has_to_come(self, groups: Sequence[Group], epoch: int) -> None:
        """Find out which blocks lanes can read where they lie, and whether there is room for the others to stay."""
        members, plans = self._members, self._plans
        if not members.have_room_beside([0] * plans.n_lanes):
            self._in_place.forget()  # as long as blocks are shown, Dask would move them to disk in vain
            return
        self._in_place.ask(address for _, address in groups)
        rows = np.zeros(plans.n_lanes)
        for lanes, address in groups:
            coming = np.isin(self._lanes, lanes)
            coming[list(self._in_place.at(address))] = False
            rows += np.bincount(self._lanes[coming], plans.block_rows[coming], plans.n_lanes)
        self._lane_bytes = (rows * self._row_bytes).astype(np.int64).tolist()
        if not rows.any():
            self._keepers, self._kept_from = list(groups), epoch
        elif self._may_keep and epoch < plans.n_epochs - 1 and members.have_room_beside(self._lane_bytes):
            self._keepers, self._kept_from = list(groups), epoch + 1

    def bring(self, works: Mapping[str, Any], rows: Span, groups: Sequence[Group], *, shared: bool) -> list[Any]:
        """Have the blocks of some rounds come, and lanes fill windows meanwhile.

        A turn's own blocks would come only once the merge before it is done, because then it is given to a worker; and
        a turn that names one task in place of all blocks is cheaper to schedule.

        Parameters
        ----------
        works : mapping of str to Future
            Of each worker's `WorkerWork`.
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

        keep = shared and self._keepers == groups
        if not keep or rows.epoch < self._kept_from:
            return self._deliver(works, rows, groups, keep=keep)
        if not self._all:
            whole = Span(rows.epoch, 0, self._most_rows)
            found = self._deliver(works, whole, groups, keep=True, to_end=True)
            self._all = {_text(lanes): future for (lanes, _), future in zip(groups, found, strict=True)}
            self._release_held()
            self._blocks.clear()
        return [Future(self._all[_text(lanes)].key, self._client) for lanes, _ in groups]

    def _deliver(
        self, works: Mapping[str, Any], rows: Span, groups: Sequence[Group], *, keep: bool, to_end: bool = False
    ) -> list[Any]:
        """Hand over what delivers blocks; if they are to stay, each of them is held once, however often it is used."""
        at = {lane: address for lanes, address in groups for lane in lanes}
        behind = {lane: self._blocks.behind(lane, rows) for lane in at}
        near = {address: self._in_place.at(address) for _, address in groups}
        wanted = {lane: [each for each in some if each not in near[at[lane]]] for lane, some in behind.items()}
        missing = wanted
        if keep:
            missing = {lane: [each for each in some if (lane, each) not in self._held] for lane, some in wanted.items()}
        blocks = self._blocks.computed(missing, at, self._members.fit)
        n_epochs = self._plans.n_epochs - rows.epoch if to_end else 1
        graph = Graph(self._client, self._members.fit)
        holdings: list[_Holding] = []
        keys = []
        for lanes, address in groups:
            # The same turn of the same lanes has the same key: what was delivered ahead is not delivered again.
            key = (
                f"lane-blocks-{self._name}-{self._attempt}",
                rows.epoch,
                rows.row,
                rows.end,
                _text(lanes),
                int(to_end),
            )
            numbers = [list(blocks[lane]) for lane in lanes]
            computed = [list(blocks[lane].values()) for lane in lanes]
            sources: list[Any] = []
            n_bytes = 0
            if keep:
                if any(numbers):
                    size = sum(self._bytes_of(some) for some in numbers)
                    name = (f"lane-holds-{self._name}-{self._attempt}", *key[1:])
                    holdings.append(_Holding(graph.add(name, address, 15, hold, lanes, numbers, computed, size)))
                    self._held |= {(lane, each): holdings[-1] for lane in lanes for each in missing[lane]}
                held = dict.fromkeys(self._held[lane, each] for lane in lanes for each in wanted[lane])
                sources = [each.key if each.future is None else each.future for each in held]
                numbers, computed = [[] for _ in lanes], [[] for _ in lanes]
                n_bytes = sum(self._lane_bytes[lane] for lane in lanes) if to_end else 0
            handed = Handed(
                {lane: {each: near[address][each] for each in behind[lane] if each in near[address]} for lane in lanes}
            )
            arguments = (
                works[address],
                rows,
                n_epochs,
                lanes,
                numbers,
                computed,
                sources,
                handed,
                n_bytes,
                self._attempt,
            )
            keys.append(graph.add(key, address, 15, deliver, *arguments))
        found = graph.hand_over([*keys, *(each.key for each in holdings)])
        for each, future in zip(holdings, found[len(keys) :], strict=True):
            each.future = future
        return found[: len(keys)]

    def _bytes_of(self, blocks: Sequence[int]) -> int:
        return int(self._row_bytes * self._plans.block_rows[list(blocks)].sum())

    def start_again(self) -> None:
        """Forget what was delivered after a loss, and keep no more."""
        self._may_keep = False
        now = time.monotonic()
        if now >= self._sent_until:  # else several workers were lost at once
            soon = now < self._sent_until + _MOST_SENT_S
            self._sent_s = min(2 * self._sent_s, _MOST_SENT_S) if soon else _SENT_S
        self._sent_until = now + self._sent_s
        self._free()
        self.close()

    def close(self) -> None:
        """Release all."""
        self.clear()
        self._in_place.forget()

    def clear(self) -> None:
        """Release what was delivered; what is asked for from now on are other tasks."""
        self._groups, self._keepers, self._kept_from = [], [], self._plans.n_epochs
        self._release_held()
        _release(self._all.values())
        self._all.clear()
        self._blocks.clear()
        self._attempt += 1

    def _free(self) -> None:
        """Let go of what stays, on workers too: lanes that moved, or a worker that is paused, would hold it on."""
        if not self._keepers:
            return
        tell_workers(self._client, _free_readers, self._token, self._attempt + 1)
        self.clear()

    def _release_held(self) -> None:
        _release(each.future for each in dict.fromkeys(self._held.values()))
        self._held.clear()


@dataclass(eq=False)
class _Holding:
    """A task that holds blocks, by its key and, once it is handed over, its future."""

    key: Key
    future: Any = None


def _release(futures: Iterable[Any]) -> None:
    """Release futures even if a traceback holds them; there is none where handing over was interrupted."""
    for future in futures:
        if future is not None:
            future.release()


def _text(lanes: Sequence[int]) -> str:
    return " ".join(map(str, lanes))


def _free_readers(token: bytes, attempt: int) -> None:
    """Close what waits on a worker for its lanes' next turns, and have it hold nothing older than an attempt."""
    work = work_here(token)
    if work is not None:
        threading.Thread(target=work.readers.free, args=(attempt,), name="streamgd-close", daemon=True).start()


class _ComputedBlocks:
    """Computes blocks where they are needed, and knows which those are; see `Deliveries` for what it is made of."""

    def __init__(self, run: Run, client: Any, plans: LanePlans) -> None:
        self._collection: Any = run.source
        self._client, self._plans = client, plans
        self._epochs: dict[tuple[int, int], EpochPlan] = {}
        self._futures: dict[int, list[Any]] = {}
        self._name, self._attempt = uuid.uuid4().hex[:12], 0

    def computed(
        self, wanted: Mapping[int, Iterable[int]], lanes: Mapping[int, str], workers: Sequence[str] | None
    ) -> dict[int, dict[int, list[Any]]]:
        """Have blocks computed.

        Parameters
        ----------
        wanted : mapping of int to iterable of int
            Which, of each lane.
        lanes : mapping of int to str
            The worker of each lane.
        workers : sequence of str or None
            The only workers that may take part, if not all may.

        Returns
        -------
        dict of int to dict of int to list of Future
            The blocks of each lane.
        """
        kept = {block for blocks in wanted.values() for block in blocks}
        # Rounds that were handed over before hold futures of their own.
        self._futures = {block: futures for block, futures in self._futures.items() if block in kept}
        return {lane: self._computed(list(some), workers or [lanes[lane]]) for lane, some in wanted.items()}

    def clear(self) -> None:
        """Release what was computed; what is asked for from now on are other tasks."""
        self._futures.clear()
        self._attempt += 1

    def _computed(self, blocks: Sequence[int], workers: Sequence[str]) -> dict[int, list[Any]]:
        missing = [block for block in blocks if block not in self._futures]
        if missing:
            self._futures |= self._collection.submit(self._client, missing, workers, f"{self._name}-{self._attempt}")
        return {block: self._futures[block] for block in blocks}

    def behind(self, lane: int, span: Span) -> list[int]:
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
