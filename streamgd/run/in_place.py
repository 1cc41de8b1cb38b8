"""Blocks of a persisted collection that workers read where they lie: in their own process, or one beside it.

Each worker shows the blocks that it holds (`streamgd.data.sources.neighbours`), and the client hands what stands for
them to the lanes of all workers that can read them: then blocks of these lanes are neither sent nor copied. Where that
cannot be, for lack of permission, on another system or another machine, blocks are sent; see
`streamgd.run.delivery`.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamgd.data.sources.dask_clients import ANSWER_S
from streamgd.data.sources.neighbours import NeighbourArray, Owner, Shown
from streamgd.run.graph import Graph, Key
from streamgd.run.members import Members

#: Seconds that workers may take to show what they have; they may be busy with other tasks.
_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Handed:
    """What stands for blocks of some lanes, which can be read where they lie.

    Attributes
    ----------
    blocks : mapping of int to mapping of int to list of NeighbourArray
        By lane and number.
    """

    blocks: Mapping[int, Mapping[int, Sequence[NeighbourArray]]]


class InPlace:
    """Knows which blocks which workers can read where they lie.

    Parameters
    ----------
    source : DaskSource
        The collection.
    client : distributed.Client
        Of the cluster.
    members : Members
        The workers.
    """

    def __init__(self, source: Any, client: Any, members: Members) -> None:
        self._source, self._client, self._members = source, client, members
        self._shown: list[Any] | None = None  # futures; what they are of is kept as long as they are
        self._handles: dict[int, list[NeighbourArray]] = {}
        self._owners: list[Owner] = []
        self._readable: dict[str, set[Owner]] = {}

    def ask(self, addresses: Iterable[str]) -> None:
        """Have workers show their blocks, and ask others what they can read of them, unless that was done before."""
        if self._shown is None:
            self._shown = []
            with contextlib.suppress(Exception):  # then blocks are sent, and what is wrong will show
                self._show()
        new = sorted(set(addresses) - self._readable.keys())
        if not new or not self._owners:
            return
        found: dict[str, Any] = {}
        with contextlib.suppress(Exception):
            found = self._client.run(
                _answering, self._owners, workers=new, on_error="ignore", callback_timeout=ANSWER_S
            )
        for address in new:
            answers = found.get(address, [False] * len(self._owners))
            self._readable[address] = {owner for owner, yes in zip(self._owners, answers, strict=True) if yes}

    def at(self, address: str) -> dict[int, list[NeighbourArray]]:
        """Return what stands for the blocks that a worker can read where they lie; none before it was asked."""
        owners = self._readable.get(address, set())
        if len(owners) == len(self._owners):
            return self._handles
        return {block: handles for block, handles in self._handles.items() if handles[0].owner in owners}

    def forget(self) -> None:
        """Release what was shown, and ask no more."""
        shown, self._shown = self._shown, []
        self._handles, self._owners, self._readable = {}, [], {}
        for future in shown or []:
            future.release()

    def _show(self) -> None:
        futures = self._source.lying()
        graph, name = Graph(self._client, self._members.fit), uuid.uuid4().hex[:12]
        keys: list[Key] = []
        for address, blocks in sorted(self._where(futures).items()):
            parts = [futures[block] for block in blocks]
            keys.append(graph.add((f"lane-shows-{name}", len(keys)), address, 30, show, blocks, parts))
        if not keys:
            return
        self._shown = graph.hand_over(keys)
        for future in self._shown:
            self._handles |= future.result(timeout=_PATIENCE_S).handles
        self._owners = list(dict.fromkeys(handles[0].owner for handles in self._handles.values()))

    def _where(self, futures: Mapping[int, Sequence[Any]]) -> dict[str, list[int]]:
        """Return the blocks of each worker, by where their features are."""
        first = {block: parts[0].key for block, parts in futures.items()}
        found = self._client.sync(self._client.scheduler.who_has, keys=list(first.values()), callback_timeout=ANSWER_S)
        blocks = defaultdict(list)
        for block, key in first.items():
            if found.get(key):
                blocks[min(found[key])].append(block)
        return blocks


def show(numbers: Sequence[int], blocks: Sequence[Sequence[Any]]) -> Shown:
    """Show blocks to the neighbours of the worker that holds them."""
    return Shown(dict(zip(numbers, blocks, strict=True)))


def _answering(owners: Sequence[Owner]) -> list[bool]:
    """Say of each owner whether this process can read what it shows."""
    return [owner.answers() for owner in owners]
