"""Which blocks of a persisted collection a cluster's workers read where they lie.

Workers show what they hold (`streamgd.data.sources.dask_shown`), and the client hands what stands for it to the lanes
of all workers that can read it: then blocks of these lanes are neither sent nor copied. Where that cannot be, for lack
of permission, on another system or another machine, blocks are sent; see `streamgd.run.delivery`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamgd.data.sources.dask_shown import ShownBlocks
from streamgd.data.sources.neighbours import NeighbourArray


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
    """

    def __init__(self, source: Any, client: Any) -> None:
        self._source, self._client = source, client
        self._shown: ShownBlocks | None = source.take_shown()  # what the survey read is this run's now
        self._readable: dict[str, dict[int, list[NeighbourArray]]] = {}

    def ask(self, addresses: Iterable[str]) -> None:
        """Have workers show their blocks, and ask some what they can read of them, unless they were asked before."""
        if self._shown is None or not self._shown.handles:  # workers may have been busy
            self._shown = ShownBlocks(self._client, self._source.lying())
        new = sorted(set(addresses) - self._readable.keys())
        if new and self._shown.handles:
            self._readable |= self._shown.readable(new)

    def at(self, address: str) -> dict[int, list[NeighbourArray]]:
        """Return what stands for the blocks that a worker can read where they lie; none if it was not asked."""
        return self._readable.get(address, {})

    def forget(self) -> None:
        """Have nothing shown any more."""
        if self._shown is not None:
            self._shown.release()
        self._shown, self._readable = None, {}
