"""Blocks of persisted arrays that a cluster's workers show to the processes of their machine.

What a cluster holds need not be sent to a process that runs beside it: see `streamgd.data.sources.neighbours`. A task
on each worker shows its blocks for as long as its future lives, and what stands for them comes to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
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
    """What stands for blocks that workers show, which have begun to when this is made.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    futures : mapping of int to sequence of Future
        The arrays of each block, by its number.
    to_workers : bool, default=False
        Whether workers are to say what they can read of it as soon as it is shown; see `readable`.

    Raises
    ------
    ClusterError
        If the cluster has no workers for longer than `workers_timeout`, or is gone.
    """

    def __init__(self, client: Any, futures: Mapping[int, Sequence[Any]], *, to_workers: bool = False) -> None:
        self._client = client
        self._futures: list[Any] = []
        self._addresses: list[str] = []  # of all workers, if these are to be asked
        self._asked: Any = None
        self._showing = threading.Lock()
        self._handles: dict[int, list[NeighbourArray]] | None = None
        if not futures:
            return
        awaited(client, futures)
        with contextlib.suppress(Exception):  # then blocks are sent; if something is wrong, that shows it
            self._show(futures, to_workers=to_workers)

    @property
    def handles(self) -> dict[int, list[NeighbourArray]]:
        """By number, as soon as they are there; blocks that cannot be shown are left out, since they are to be sent."""
        with self._showing:
            if self._handles is None:
                self._handles = self._gathered()
                if self._handles and self._addresses:
                    self._asked = self._ask_soon(self._handles, self._addresses)
            return self._handles

    @cached_property
    def owners(self) -> list[Owner]:
        """Who shows them."""
        return _owners_of(self.handles)

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

    def readable(self, addresses: Sequence[str]) -> dict[str, dict[int, list[NeighbourArray]]]:
        """Return the handles of what each of some workers can read; those that do not answer can read nothing."""
        handles, found = self.handles, {}
        if not handles:
            return {address: {} for address in addresses}
        if self._asked is not None:
            found, self._asked = _answers(self._asked), None
        missing = [address for address in addresses if address not in found]
        if missing:
            found |= _answers(self._ask_soon(handles, missing))
        return {
            address: self.of(owner for owner, yes in zip(self.owners, found.get(address, ()), strict=False) if yes)
            for address in addresses
        }

    def release(self) -> None:
        """Have workers show them no more."""
        for future in self._futures:
            future.release()
        self._futures.clear()

    def _show(self, futures: Mapping[int, Sequence[Any]], *, to_workers: bool) -> None:
        """Have workers begin to show blocks."""
        name = uuid.uuid4().hex[:12]
        for address, blocks in sorted(self._where(futures, to_workers=to_workers).items()):
            parts = [list(futures[block]) for block in blocks]
            key = f"show-blocks-{name}-{len(self._futures)}"
            # Nowhere else: if the worker is lost, another one would fetch all of its blocks for nobody.
            where: dict[str, Any] = {"workers": [address], "allow_other_workers": False, "priority": _PRIORITY}
            self._futures.append(self._client.submit(show, blocks, parts, key=key, pure=False, **where))

    def _gathered(self) -> dict[int, list[NeighbourArray]]:
        """Wait for what workers show."""
        handles: dict[int, list[NeighbourArray]] = {}
        until = time.monotonic() + _PATIENCE_S
        shown = []
        for future in list(self._futures):
            try:
                handles |= future.result(timeout=max(0.01, until - time.monotonic())).handles
                shown.append(future)
            except Exception:  # blocks of this worker are sent
                future.release()
        self._futures = shown
        return handles

    def _ask_soon(self, handles: Mapping[int, Sequence[NeighbourArray]], addresses: Sequence[str]) -> Any:
        """Ask workers what they can read, and return a future of what they say."""
        how: dict[str, Any] = {"on_error": "ignore", "asynchronous": True, "callback_timeout": ANSWER_S}
        asking = self._client.run(_answering, _owners_of(handles), workers=addresses, **how)
        return asyncio.run_coroutine_threadsafe(asking, self._client.loop.asyncio_loop)

    def _where(self, futures: Mapping[int, Sequence[Any]], *, to_workers: bool) -> dict[str, list[int]]:
        """Return the blocks of each worker that has memory left, by where their first array is."""
        first = {block: arrays[0].key for block, arrays in futures.items()}
        holders, workers = self._client.sync(_places, self._client, list(first.values()), callback_timeout=ANSWER_S)
        if to_workers:
            self._addresses = sorted(workers)
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


def _owners_of(handles: Mapping[int, Sequence[NeighbourArray]]) -> list[Owner]:
    return list(dict.fromkeys(arrays[0].owner for arrays in handles.values()))


async def _places(client: Any, keys: Sequence[str]) -> tuple[Mapping[str, Sequence[str]], Mapping[str, Any]]:
    """Return which workers have what, and what the scheduler knows of all of them."""
    holders, identity = await asyncio.gather(client.scheduler.who_has(keys=keys), client.scheduler.identity())
    return holders, identity["workers"]


def _answers(asked: Any) -> dict[str, list[bool]]:
    """Return what workers said; nothing if that cannot be had."""
    try:
        return dict(asked.result(2 * ANSWER_S))
    except Exception:  # who is asked for workers finds out what that means
        return {}


def _answering(owners: Sequence[Owner]) -> list[bool]:
    """Say of each owner whether this process can read what it shows."""
    return [owner.answers() for owner in owners]


def show(numbers: Sequence[int], blocks: Sequence[Sequence[Any]]) -> Shown:
    """Show blocks to the neighbours of the worker that holds them."""
    return Shown(dict(zip(numbers, blocks, strict=True)))
