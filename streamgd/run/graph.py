"""Tasks that are handed to Dask's scheduler at once, each with a key of its own and a worker where it belongs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

#: Names a task: a string, or a tuple that begins with one.
Key: TypeAlias = Any


class Graph:
    """Collects tasks, and hands them over.

    A message to the scheduler takes a task longer than most else about it, so a graph goes in one.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    fit : sequence of str or None
        The only workers that may run the tasks, if not all may.
    """

    def __init__(self, client: Any, fit: Sequence[str] | None) -> None:
        self._client, self._fit = client, fit
        self._tasks: dict[tuple[str | None, float], dict[Key, Any]] = {}

    def add(self, key: Key, address: str | None, priority: float, function: Any, *arguments: Any) -> Key:
        """Add a task; return its key, which stands for what comes of it in arguments of others, also in lists.

        Parameters
        ----------
        key : str or tuple
            Its name.
        address : str or None
            The worker where it belongs; elsewhere if that one is gone or busy, but never where it cannot be.
        priority : float
            Greater ones go first.
        function : callable
            What to do.
        *arguments
            With what: keys, futures, and values that are no tuples.
        """
        self._tasks.setdefault((address, priority), {})[key] = (function, *arguments)
        return key

    def hand_over(self, wanted: Sequence[Key]) -> list[Any]:
        """Return futures of the keys that are wanted; what none of them needs is not computed."""
        from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

        layers: dict[str, Any] = {}
        for (address, priority), tasks in self._tasks.items():
            annotations: dict[str, Any] = {"priority": priority}
            if self._fit is not None:
                annotations["workers"] = list(self._fit)
            elif address is not None:
                annotations |= {"workers": [address], "allow_other_workers": True}
            layers[f"layer-{len(layers)}"] = MaterializedLayer(tasks, annotations=annotations)
        with _quiet_about_size():
            futures: list[Any] = self._client.get(
                HighLevelGraph(layers, {name: set() for name in layers}), list(wanted), sync=False
            )
        return futures


def keep(value: Any) -> Any:
    """Hold a value where tasks can find it; should it be lost, the scheduler has it still."""
    return value


_quiet = threading.Lock()
_n_quiet = 0
_loud: Any = None


@contextlib.contextmanager
def _quiet_about_size() -> Iterator[None]:
    """Keep Dask from advising against big arguments: states are sent on purpose.

    Dask's configuration belongs to the whole process: the first of several fits changes it, and the last restores it.
    """
    global _n_quiet, _loud
    import dask

    configuration: Any = dask.config
    with _quiet:
        if _n_quiet == 0:
            _loud = configuration.set({"distributed.admin.large-graph-warning-threshold": "100 GB"})
        _n_quiet += 1
    try:
        yield
    finally:
        with _quiet:
            _n_quiet -= 1
            if _n_quiet == 0:
                _loud.__exit__(None, None, None)
