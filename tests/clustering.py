"""Runs in lanes, here or on a cluster of real processes, and what they come to, to the bit.

Run as a program, it is a client that can be killed: ``python -m tests.clustering KIND FOLDER SCHEDULER OPTIMIZER
[SETTINGS]``, the last as JSON for the module that hands rounds over.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from streamgd.data.sources import dask_shown
from streamgd.estimators import SGDRegressor

REPOSITORY = Path(__file__).resolve().parents[1]
#: The last one persisted too, on workers that do not read one another's memory.
KINDS = ("hdf5", "parquet", "dask", "persisted", "sent")
N_ROWS, N_LANES, N_EPOCHS, N_FEATURES = 3000, 4, 2, 5
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "auto": {},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "average": True, "penalty": "l2"},
    "adagrad": {"optimizer": "adagrad", "penalty": "l1", "alpha": 1e-3},
    "adam": {"optimizer": "adam", "learning_rate": "cosine", "eta0": 0.01},
    "dowg": {"optimizer": "dowg"},
}


def make_data(folder: Path, n_rows: int = N_ROWS) -> None:
    """Write the same rows in every form, in blocks of uneven length."""
    import h5py
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(7)
    X = rng.normal([2.0, -50.0, 0.0, 1.0, 0.0], [1.0, 10.0, 0.01, 1.0, 5.0], size=(n_rows, N_FEATURES))
    X = X.astype(np.float32)
    y = X @ np.array([1.0, 0.2, -30.0, 0.0, 0.3]) + rng.normal(size=n_rows)
    with h5py.File(folder / "rows.h5", "w") as file:
        file.create_dataset("X", data=X, chunks=(85, N_FEATURES), compression="gzip")
        file.create_dataset("y", data=y)
    table = pa.table({f"x{j}": X[:, j] for j in range(N_FEATURES)} | {"y": y})
    pq.write_table(table, folder / "rows.parquet", row_group_size=225)
    np.savez(folder / "rows.npz", X=X, y=y)


def load(folder: Path, kind: str) -> tuple[Any, Any]:
    """Return what `fit` takes."""
    import streamgd

    if kind == "hdf5":
        return streamgd.open_source(folder / "rows.h5", "y"), None
    if kind == "parquet":
        return streamgd.open_source(folder / "rows.parquet", "y"), None
    import dask.array as da

    with np.load(folder / "rows.npz") as file:
        X, y = file["X"], file["y"]
    n = len(X)
    cuts = (*[n // 23] * 22, n - 22 * (n // 23))
    return da.from_array(X, chunks=(cuts, -1)), da.from_array(y, chunks=(cuts,))


def estimator(optimizer: str = "auto", **options: Any) -> SGDRegressor:
    """Make an estimator whose lanes have several windows."""
    given = {"max_iter": N_EPOCHS, "tol": None, "n_lanes": N_LANES, "batch_size": 128, "buffer": "3MB"}
    return SGDRegressor(**{**given, **OPTIMIZERS[optimizer], **options})


def bits(fitted: SGDRegressor) -> dict[str, Any]:
    """Return all that was learnt, to the bit."""
    state = fitted._trained.state
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in state.to_tensors().items()}


def fit(folder: Path, kind: str, optimizer: str = "auto", client: Any = None, **options: Any) -> dict[str, Any]:
    """Fit, and return the bits."""
    X, y = load(folder, kind)
    if kind in ("persisted", "sent") and client is not None:
        X, y = client.persist([X, y])
    with apart() if kind == "sent" else contextlib.nullcontext():
        return bits(estimator(optimizer, **options).fit(X, y, client=client, resume="checkpoint_dir" in options))


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Have no worker show its blocks, as if each had a machine of its own."""

    def nothing(*_: Any, **__: Any) -> None:  # a mock would remember the futures
        pass

    with mock.patch.object(dask_shown.ShownBlocks, "_show", nothing):
        yield


@contextlib.contextmanager
def cluster(n_workers: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Start worker processes; yield the cluster and a client."""
    from distributed import Client, LocalCluster

    given = {
        "threads_per_worker": 1,
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": 50,
        "host": "127.0.0.1",
    }
    with (
        LocalCluster(n_workers=n_workers, **{**given, **options}) as made,
        Client(made, set_as_default=False) as client,
    ):
        yield made, client


def kill_worker(client: Any, which: int = 0) -> None:
    """Kill a worker process as nothing can catch; its nanny starts another."""
    pids = client.run(os.getpid)
    os.kill(pids[sorted(pids)[which % len(pids)]], signal.SIGKILL)


class Processes:
    """Worker processes without nannies, which are killed and replaced from here.

    A nanny gives its worker up if that is killed while it starts; then a test would wait for nobody.
    """

    def __init__(self, scheduler: str, n_workers: int) -> None:
        self._scheduler = scheduler
        self._running = [self._start() for _ in range(n_workers)]

    def _start(self) -> subprocess.Popen[bytes]:
        options = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1", "--memory-limit", "2GB"]
        command = [sys.executable, "-m", "dask", "worker", self._scheduler, *options]
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self, which: int) -> None:
        """Kill a worker, as nothing can catch, and start another."""
        self._running[which].kill()
        self._running[which].wait()
        self._running[which] = self._start()

    def close(self) -> None:
        """End them all."""
        for process in self._running:
            process.kill()
            process.wait()


def await_workers(client: Any, n_workers: int, timeout_s: float = 60.0) -> None:
    """Wait until there are as many workers again."""
    until = time.monotonic() + timeout_s
    while len(client.nthreads()) < n_workers:
        assert time.monotonic() < until, "the killed worker was not started again"
        time.sleep(0.05)


def main() -> None:
    from distributed import Client

    from streamgd.run import dispatch, pace

    kind, folder, scheduler, optimizer, *way = sys.argv[1:]
    given = json.loads(way[0]) if way else {}
    for name, value in given.items():
        setattr(pace, name, value)
    if given and "_EXCHANGED_S" not in given:
        dispatch.can_meet = lambda addresses: False
    run = Path(folder) / f"run-{kind}-{optimizer}"
    with Client(scheduler, set_as_default=False) as client:
        found = fit(Path(folder), kind, optimizer, client, checkpoint_dir=run, checkpoint_every_s=0)
    Path(folder, "done.txt").write_text(repr(found["theta"][2]))


if __name__ == "__main__":
    main()
