"""Train on a Dask cluster: the same coefficients, to the bit, for any number of workers, and without any.

Starts workers on this machine. For a cluster that is there already, give `Client` the address of its scheduler.

python examples/dask_cluster.py
"""

import os
import signal
import tempfile
import threading
from pathlib import Path

import h5py
import numpy as np
from distributed import Client, LocalCluster

import streamgd

N_ROWS, N_FEATURES = 200_000, 8
TRUE_COEF = np.array([2.0, -1.0, 0.5, 0.0, 3.0, -2.5, 1.0, -0.25])


def write(path: Path) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N_ROWS, N_FEATURES)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file.create_dataset("X", data=X, chunks=(4096, N_FEATURES), compression="gzip")
        file.create_dataset("y", data=X @ TRUE_COEF + 7.0 + 0.5 * rng.standard_normal(N_ROWS))


def fit(path: Path, client: Client | None) -> streamgd.SGDRegressor:
    # Eight lanes are trained side by side and merged after each round. They are part of what defines the model, like
    # the seed; where they are trained is not.
    source = streamgd.open_source(path, "y")
    return streamgd.SGDRegressor(n_lanes=8, max_iter=3, tol=None).fit(source, client=client)


def kill_a_worker(client: Client) -> None:
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.h5"
        write(path)
        here = fit(path, None)
        print("found here:", np.array2string(here.coef_, precision=3, suppress_small=True))
        print("true:      ", np.array2string(TRUE_COEF, precision=3, suppress_small=True))
        cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50, local_directory=folder
        )
        with cluster, Client(cluster) as client:
            there = fit(path, client)
            print("2 workers, same bits:", there.coef_.tobytes() == here.coef_.tobytes())
            killing = threading.Timer(0.5, kill_a_worker, [client])
            killing.start()
            survived = fit(path, client)
            killing.join()
            print("one of them killed, same bits:", survived.coef_.tobytes() == here.coef_.tobytes())


if __name__ == "__main__":  # workers import this file
    main()
