"""Blocks of Dask collections, computed one at a time: here, or ahead on the active client."""

from __future__ import annotations

import logging
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import dask.core
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from streamgd.data.sources.dask_clients import active_client
from streamgd.data.sources.dask_frames import expressions, is_frame, settled
from streamgd.data.sources.dask_waiting import gathered

#: Dask is annotated in parts only.
_dask: Any = dask

logger = logging.getLogger("streamgd")

#: Threads, and so blocks in memory at once, that measure unknown lengths where there is no client.
_MEASURING_THREADS = 4
#: Blocks asked of the cluster ahead, where few are open.
_LEAST_AHEAD = 4


class BlockGraph:
    """The tasks behind collections that are cut into blocks alike.

    The graph is optimized once, and each block's part cut out of it: handing Dask the whole collection for every block
    would walk all of its tasks every time (measured with 10,000 blocks: 27 ms a block instead of 0.7 ms).

    Parameters
    ----------
    collections : sequence of dask collections
        Each with one task a block, in the blocks' order.
    """

    def __init__(self, collections: Sequence[Any]) -> None:
        self._collections = tuple(collections)  # also keeps what was persisted alive
        self._tasks, keys = _optimized(self._collections)
        self._keys = [list(_dask.core.flatten(some)) for some in keys]
        self._name = uuid.uuid4().hex[:12]

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        return len(self._keys[0])

    @cached_property
    def lies_in_cluster(self) -> bool:
        """Whether the first collection is made of what a cluster holds, and of nothing else."""
        left, seen = list(self._keys[0]), set(self._keys[0])
        while left:
            key = left.pop()
            if key in self._persisted:
                continue
            needed = _dask.core.keys_in_tasks(self._known, [self._tasks[key]], as_list=True)
            if not needed:
                return False
            left += set(needed) - seen
            seen.update(needed)
        return True

    def lying(self, block: int) -> list[Any] | None:
        """Return the futures of a block of which a cluster holds every part; None if some has to be computed."""
        keys = [keys[block] for keys in self._keys]
        return [self._persisted[key] for key in keys] if all(key in self._persisted for key in keys) else None

    def compute(self, block: int) -> list[Any]:
        """Compute a block in the calling thread; the caller's threads are the parallelism."""
        tasks, keys, persisted = self._cut(block)
        tasks |= {key: _value(self._persisted[key]) for key in persisted}
        return list(_dask.get(tasks, keys))

    def submit(self, client: Any, block: int) -> list[Any]:
        """Begin computing a block on the client; return its futures."""
        return self.submit_all(client, [block])[block]

    def submit_all(
        self, client: Any, blocks: Sequence[int], workers: Sequence[str] | None = None, name: str | None = None
    ) -> dict[int, list[Any]]:
        """Begin computing several blocks; return the futures of each.

        Parameters
        ----------
        client : distributed.Client
            Of the cluster.
        blocks : sequence of int
            Which.
        workers : sequence of str or None, default=None
            Where, if possible.
        name : str or None, default=None
            What the keys of tasks end in, so that nobody else's are the same; default: a name of this graph. Optimized
            with others, a collection's tasks have the same keys and do something else. And tasks that were to be
            computed on workers which are gone may wait for good, and whoever asks for the same ones with them.
        """
        tasks, keys, names = self._renamed(blocks, name or self._name)
        wanted = [names[key] for some in keys.values() for key in some if key in names]
        where: dict[str, Any] = {} if workers is None else {"workers": list(workers), "allow_other_workers": True}
        futures = dict(zip(wanted, _handed_over(client, tasks, wanted, **where), strict=True)) if wanted else {}
        return {
            block: [futures[names[key]] if key in names else self._persisted[key] for key in some]
            for block, some in keys.items()
        }

    def submit_heads(self, client: Any, n_rows: Mapping[int, int]) -> dict[int, list[Any]]:
        """Begin computing the first rows of blocks, so many of each; return the future of each, in a list."""
        tasks, keys, names = self._renamed(list(n_rows), self._name)
        heads = {block: f"head-{block}-{n}-{self._name}" for block, n in n_rows.items()}
        for block, some in keys.items():
            parts = [names[key] if key in names else self._persisted[key] for key in some]
            tasks[heads[block]] = (_first_rows, parts, n_rows[block])
        futures = _handed_over(client, tasks, list(heads.values()))
        return {block: [future] for block, future in zip(heads, futures, strict=True)}

    def submit_lengths(self, client: Any) -> list[Any]:
        """Begin counting the rows of every block, of the first collection; return the futures."""
        blocks = range(self.n_blocks)
        tasks, keys, names = self._renamed(blocks, self._name)
        wanted = [f"rows-{block}-{self._name}" for block in blocks]
        first = [keys[block][0] for block in blocks]
        tasks |= {  # what is persisted has a future
            key: (len, names[block] if block in names else self._persisted[block])
            for key, block in zip(wanted, first, strict=True)
        }
        return _handed_over(client, tasks, wanted)

    def lengths(self) -> list[int]:
        """Count the rows of every block, of the first collection, here."""
        with ThreadPoolExecutor(_MEASURING_THREADS, "streamgd-lengths") as pool:
            return list(pool.map(lambda block: len(self.compute(block)[0]), range(self.n_blocks)))

    def _renamed(self, blocks: Sequence[int], name: str) -> tuple[dict[Any, Any], dict[int, list[Any]], dict[Any, Any]]:
        """Return the tasks of blocks under names that end so, the old keys of each block, and the names by old keys."""
        tasks: dict[Any, Any] = {}
        keys: dict[int, list[Any]] = {}
        for block in blocks:
            more, keys[block], _ = self._cut(block)
            tasks |= more
        names = {key: _ending_in(name, key) for key in tasks}
        tasks = {names[key]: task.substitute(names, key=names[key]) for key, task in self._nodes(tasks).items()}
        return tasks, keys, names

    def _nodes(self, tasks: dict[Any, Any]) -> dict[Any, Any]:
        """Return tasks in the form in which keys can be replaced."""
        from dask._task_spec import convert_legacy_graph

        return dict(convert_legacy_graph(tasks, all_keys=self._known))

    @cached_property
    def _persisted(self) -> dict[Any, Any]:
        """What the cluster holds already; optimizing leaves only its keys in the graph."""
        distributed = sys.modules.get("distributed")
        if distributed is None:
            return {}
        graphs = [dict(collection.__dask_graph__()) for collection in self._collections]
        return {k: task for graph in graphs for k, task in graph.items() if isinstance(task, distributed.Future)}

    @cached_property
    def _known(self) -> set[Any]:
        return self._tasks.keys() | self._persisted.keys()

    def _cut(self, block: int) -> tuple[dict[Any, Any], list[Any], list[Any]]:
        """Return the tasks behind a block, its keys, and the keys of persisted data that the tasks need."""
        keys = [keys[block] for keys in self._keys]
        tasks: dict[Any, Any] = {}
        persisted = {}
        left = list(keys)
        while left:
            key = left.pop()
            if key not in self._tasks or key in self._persisted:
                persisted[key] = True
            elif key not in tasks:
                tasks[key] = self._tasks[key]
                left += _dask.core.keys_in_tasks(self._known, [self._tasks[key]], as_list=True)
        return tasks, keys, list(persisted)


def _first_rows(parts: Sequence[Any], n_rows: int) -> list[Any]:
    """Cut a computed block on the worker that has it."""
    return [part.iloc[:n_rows] if hasattr(part, "iloc") else part[:n_rows] for part in parts]


def _handed_over(client: Any, tasks: dict[Any, Any], wanted: list[Any], **where: Any) -> list[Any]:
    """Hand tasks to the scheduler.

    As a layer: of a plain dict Dask makes an expression that it names by a hash of all tasks, which there is not of
    tasks that hold open files, or locks.
    """
    layer = f"blocks-{uuid.uuid4().hex[:12]}"
    graph: Any = HighLevelGraph({layer: MaterializedLayer(tasks)}, {layer: set()})
    return list(client.get(graph, wanted, sync=False, **where))


def _ending_in(name: str, key: Any) -> Any:
    return (f"{key[0]}-{name}", *key[1:]) if isinstance(key, tuple) else f"{key}-{name}"


def _optimized(collections: Sequence[Any]) -> tuple[dict[Any, Any], list[Any]]:
    """Optimize collections; return their tasks, and the keys of each collection.

    Arrays are optimized together, as `dask.compute` does: one by one (as `dask.optimize` does), a target made from the
    features would load them a second time.
    """
    arrays = [each for each in collections if not is_frame(each)]
    tasks: dict[Any, Any] = {}
    if arrays:
        merged = HighLevelGraph.merge(*(array.__dask_graph__() for array in arrays))
        tasks.update(arrays[0].__dask_optimize__(merged, [array.__dask_keys__() for array in arrays]))
    keys = []
    for each in collections:
        with expressions:
            if is_frame(each):
                each = settled(each)
                tasks.update(each.__dask_graph__())
            keys.append(each.__dask_keys__())
    return tasks, keys


def _value(future: Any) -> Any:
    """Fetch what the cluster holds."""
    try:
        return future.result()
    except RuntimeError as err:
        raise RuntimeError(
            "the data was persisted on a cluster and cannot be fetched from here; pass the collection as it was before "
            "persist()"
        ) from err


class Ahead:
    """Blocks that the cluster computes before they are asked for, a bounded number of them.

    Results stay in the workers' memory until they are fetched or no longer wanted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[int, list[Any]] = {}

    def announce(self, graph: BlockGraph, client: Any, blocks: Sequence[int], n_open: int) -> None:
        """Begin with the first of `blocks`, as many as two for each open one; forget all others."""
        wanted = list(dict.fromkeys(blocks))[: max(_LEAST_AHEAD, 2 * n_open)]
        with self._lock:
            for block in set(self._futures) - set(wanted):
                del self._futures[block]  # Dask cancels what no future asks for
            for block in wanted:
                if not _usable(self._futures.get(block), client):
                    self._futures[block] = graph.submit(client, block)

    def compute(self, graph: BlockGraph, client: Any, block: int) -> list[Any]:
        """Fetch a block, whether it was announced or not."""
        with self._lock:
            futures = self._futures.pop(block, None)
        if futures is None or not _usable(futures, client):
            futures = graph.submit(client, block)
        try:
            return list(gathered(client, futures))
        except Exception:
            for future in futures:  # the traceback holds them, and with them their tasks on the cluster
                future.release()
            raise

    def clear(self) -> None:
        """Forget all blocks."""
        with self._lock:
            self._futures.clear()


def _usable(futures: list[Any] | None, client: Any) -> bool:
    """Tell whether futures belong to this client and were not cancelled or lost."""
    return futures is not None and all(f.client is client and f.status in ("pending", "finished") for f in futures)


def measure_lengths(collection: Any, what: str) -> list[int]:
    """Compute the number of rows of each block, which loads every block once."""
    if not is_frame(collection) and collection.ndim == 2:
        collection = collection.blocks[:, :1]
    graph = BlockGraph([collection])
    logger.info("%s has blocks of unknown length: measuring all %d of them once", what, graph.n_blocks)
    client = active_client()
    if client is None:
        return graph.lengths()
    futures = graph.submit_lengths(client)
    try:
        return list(gathered(client, futures))
    finally:
        for future in futures:  # an error's traceback holds them, and with them their tasks on the cluster
            future.release()
