"""Blocks of persisted arrays that a cluster's workers show to the processes of their machine.

What a cluster holds need not be sent to a process that runs beside it: see `streamgd.data.sources.neighbours`. A task
on each worker shows its blocks for as long as its future lives, and what stands for them comes to the client.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from streamgd.data.sources.dask_clients import ANSWER_S
from streamgd.data.sources.dask_waiting import awaited
from streamgd.data.sources.neighbours import NeighbourArray, Owner, Shown

#: Seconds that workers may take to show what they have; they may be busy with other tasks.
_PATIENCE_S = 2.0
#: Workers show nothing that take more than this part of their memory limit, from where Dask moves what they hold to
#: disk: to show it they would have to read it back, and moving what is shown frees no memory.
_MOST_MEMORY = 0.6
#: What tasks that wait for others leave to be done first.
_PRIORITY = 30


class ShownBlocks:
    """What stands for blocks that workers show.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    futures : mapping of int to sequence of Future
        The arrays of each block, by its number.

    Attributes
    ----------
    handles : dict of int to list of NeighbourArray
        By number. Blocks that cannot be shown are left out: then they are to be sent.

    Raises
    ------
    ClusterError
        If the cluster has no workers for longer than `workers_timeout`, or is gone.
    """

    def __init__(self, client: Any, futures: Mapping[int, Sequence[Any]]) -> None:
        self._client = client
        self._futures: list[Any] = []
        self.handles: dict[int, list[NeighbourArray]] = {}
        if not futures:
            return
        awaited(client, futures)
        try:
            with contextlib.suppress(Exception):  # then blocks are sent; if something is wrong, that shows it
                self._show(futures)
        finally:
            if not self.handles:
                self.release()

    @cached_property
    def owners(self) -> list[Owner]:
        """Who shows them."""
        return list(dict.fromkeys(arrays[0].owner for arrays in self.handles.values()))

    @cached_property
    def here(self) -> dict[int, list[NeighbourArray]]:
        """The handles of what this process can read."""
        return self.of(owner for owner in self.owners if owner.answers())

    def of(self, owners: Iterable[Owner]) -> dict[int, list[NeighbourArray]]:
        """Return the handles of what some owners show."""
        some = set(owners)
        if len(some) == len(self.owners):
            return self.handles
        return {block: arrays for block, arrays in self.handles.items() if arrays[0].owner in some}

    def release(self) -> None:
        """Have workers show them no more."""
        for future in self._futures:
            future.release()
        self._futures.clear()

    def _show(self, futures: Mapping[int, Sequence[Any]]) -> None:
        name, until = uuid.uuid4().hex[:12], time.monotonic() + _PATIENCE_S
        for address, blocks in sorted(self._where(futures).items()):
            parts = [list(futures[block]) for block in blocks]
            key = f"show-blocks-{name}-{len(self._futures)}"
            # Nowhere else: if the worker is lost, another one would fetch all of its blocks for nobody.
            where: dict[str, Any] = {"workers": [address], "allow_other_workers": False, "priority": _PRIORITY}
            self._futures.append(self._client.submit(show, blocks, parts, key=key, pure=False, **where))
        for future in list(self._futures):
            try:
                self.handles |= future.result(timeout=max(0.01, until - time.monotonic())).handles
            except Exception:  # blocks of this worker are sent
                future.release()
                self._futures.remove(future)

    def _where(self, futures: Mapping[int, Sequence[Any]]) -> dict[str, list[int]]:
        """Return the blocks of each worker that has memory left, by where their first array is."""
        client = self._client
        first = {block: arrays[0].key for block, arrays in futures.items()}
        holders = client.sync(client.scheduler.who_has, keys=list(first.values()), callback_timeout=ANSWER_S)
        workers = client.sync(client.scheduler.identity, callback_timeout=ANSWER_S)["workers"]
        blocks = defaultdict(list)
        for block, key in first.items():
            usable = [address for address in holders.get(key) or () if _has_memory(workers.get(address))]
            if usable:
                blocks[min(usable)].append(block)
        return blocks


def _has_memory(worker: Mapping[str, Any] | None) -> bool:
    """Whether a worker holds all that it has in memory, and will for a while."""
    if worker is None or worker.get("status") not in (None, "running"):
        return False
    metrics, limit = worker.get("metrics", {}), worker.get("memory_limit") or 0
    if metrics.get("spilled_bytes", {}).get("disk", 0):
        return False
    return not limit or metrics.get("memory", 0) <= _MOST_MEMORY * limit


def show(numbers: Sequence[int], blocks: Sequence[Sequence[Any]]) -> Shown:
    """Show blocks to the neighbours of the worker that holds them."""
    return Shown(dict(zip(numbers, blocks, strict=True)))
