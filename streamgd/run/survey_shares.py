"""The survey's passes over all rows, shared with the workers of a cluster.

Where a table has billions of rows, their targets take a single reader longer than all workers take for the epoch. So
workers look at the last rows, and the client at the first ones, until they meet. The client waits for nobody but for
workers that have begun and are about as fast as itself: whatever a worker cannot read, or reads with other versions,
the client looks at as well; so it finds what is wrong with the data in the order of the rows, as without a cluster.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from itertools import pairwise
from typing import Any, TypeVar

from streamgd.data.sources.base import Source
from streamgd.data.sources.dask_clients import chosen_client, threads_of_workers
from streamgd.run.graph import Graph, keep
from streamgd.run.versions import differing_versions, versions

Found = TypeVar("Found")
#: Looks at the rows of a source from a first one to a last one, in segments of so many rows.
Look = Callable[[Source, int, int, int], Iterator[Found]]

#: Rows that are added up by themselves. Another number makes other sums, in their last bits.
SEGMENT_ROWS = 1 << 22
#: With fewer segments the client is done within a second, and sooner by itself.
_LEAST_SEGMENTS = 32
#: Each thread of the workers has so many shares.
_SHARES = 2
#: How long to wait for a share that a worker has begun with: so many times as long as the client took for one of its
#: own, and at least so many seconds; and for what came of it to arrive.
_PATIENCE, _LEAST_PATIENCE_S, _FETCH_S = 3, 1.0, 10.0


def looked_at(source: Source, look: Look[Found]) -> Generator[Found]:
    """Look at all rows, with the workers of the client that was chosen if that is worth its while.

    Parameters
    ----------
    source : Source
        With a target.
    look : callable
        Pure, and known to workers by its name.

    Yields
    ------
    object
        What each segment came to, in order. Close the generator, so that nothing is left on the cluster.
    """
    client = chosen_client()
    n_segments = -(-source.n_rows // SEGMENT_ROWS)
    shared = client is not None and source.lies_in_files and n_segments >= _LEAST_SEGMENTS
    n_threads = sum((threads_of_workers(client) or {}).values()) if shared else 0
    if n_threads == 0:
        yield from look(source, 0, source.n_rows, SEGMENT_ROWS)
        return
    with contextlib.closing(_Shares(client, source, look, min(n_segments, _SHARES * n_threads))) as shares:
        yield from shares.gathered(n_threads)


class _Shares:
    """Runs of segments, handed over to a cluster: the last ones first."""

    def __init__(self, client: Any, source: Source, look: Look[Any], n_shares: int) -> None:
        self._source, self._look = source, look
        n_segments = -(-source.n_rows // SEGMENT_ROWS)
        cuts = [SEGMENT_ROWS * (n_segments * i // n_shares) for i in range(n_shares)] + [source.n_rows]
        self._bounds = list(pairwise(cuts))
        name, graph = uuid.uuid4().hex[:12], Graph(client, None)
        work = graph.add(f"survey-source-{name}", None, n_shares, keep, source)
        keys = [
            graph.add((f"survey-rows-{name}", start), None, number, look_there, work, look, start, stop, SEGMENT_ROWS)
            for number, (start, stop) in enumerate(self._bounds)
        ]
        self._futures = graph.hand_over(keys)

    def gathered(self, n_threads: int) -> Iterator[Any]:
        """Look at shares in order until the workers have done the rest; yield what segments come to."""
        longest_s, patient = 0.0, True
        for number, (start, stop) in enumerate(self._bounds):
            future = self._futures[number]
            n_left = sum(not each.done() for each in self._futures[number:])
            if not future.done() and n_left <= n_threads and patient:  # workers have begun with all that is left
                patient = _waited(future, max(_LEAST_PATIENCE_S, _PATIENCE * longest_s))
            there = _fetched(future)
            future.release()
            if there is not None:
                yield from there
                continue
            began = time.monotonic()
            yield from self._look(self._source, start, stop, SEGMENT_ROWS)
            longest_s = max(longest_s, time.monotonic() - began)

    def close(self) -> None:
        """Let go of what was handed over, even if a traceback holds it."""
        for future in self._futures:
            with contextlib.suppress(Exception):
                future.release()


def look_there(
    source: Source, look: Look[Found], start: int, stop: int, segment_rows: int
) -> tuple[dict[str, str], list[Found]] | None:
    """Look at some rows on a worker; None if it cannot, for whatever reason."""
    try:
        source.check_unchanged([block for block, _, _ in source.blocks_of(start, stop)])
        return versions(), list(look(source, start, stop, segment_rows))
    except Exception:  # the client finds it too, or the workers are refused before training
        return None


def _waited(future: Any, patience_s: float) -> bool:
    """Wait for a future; say whether it is done."""
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    return done.wait(patience_s) or bool(future.done())


def _fetched(future: Any) -> list[Any] | None:
    """Return what a worker found; None if there is nothing that can be used."""
    if not future.done():
        return None
    try:
        found: tuple[dict[str, str], list[Any]] | None = future.result(timeout=_FETCH_S)
    except Exception:  # lost with its worker, or the worker lacks streamgd
        return None
    return found[1] if found is not None and differing_versions(found[0], versions()) is None else None
