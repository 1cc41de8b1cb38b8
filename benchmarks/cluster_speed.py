"""How fast is a cluster of two single-threaded workers, and what does a round cost?

``workers``: rows/s over gzip-compressed HDF5, one worker against two, in turn: of the whole fit, of the second epoch,
and of the last. ``dask-ml``: rows/s beside dask-ml's ``Incremental(SGDRegressor)`` on the same persisted Dask array and
workers. ``round``: milliseconds of rounds with little work, eight lanes, none of them made one task with others, for a
small state and one of 1 MB; and of the same ones here.

    python benchmarks/cluster_speed.py [workers] [dask-ml] [round] [--rows 1000000] [--epochs 3] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import streamgd
from streamgd.estimators.inputs import training_source
from streamgd.learn.recipe import Recipe
from streamgd.run import pace
from streamgd.run.config import Config
from streamgd.run.loop import Watcher, train
from streamgd.run.runs import prepare
from tests.clustering import cluster

N_FEATURES = 28


class Laps(Watcher):
    """Notes the time of each epoch's end, and of each round."""

    def __init__(self) -> None:
        self.epochs = [time.perf_counter()]
        self.rounds: list[float] = []

    def advanced(self, run: Any, stream: Any) -> None:
        self.rounds.append(stream.round_s)

    def epoch_ended(self, run: Any, loss: float) -> None:
        self.epochs.append(time.perf_counter())


def laps_of(source: Any, client: Any, n_lanes: int, n_epochs: int = 2, batch_size: int = 256) -> Laps:
    config = Config(Recipe(batch_size=batch_size), max_iter=n_epochs, tol=None, n_lanes=n_lanes)
    laps = Laps()
    train(prepare(source, config), client=client, watcher=laps)
    return laps


def rates(source: Any, client: Any, n_epochs: int) -> tuple[float, float, float]:
    """Measure rows/s of the whole fit, of the second epoch (in the first one turns are short), and of the last."""
    laps = laps_of(source, client, 4, n_epochs).epochs
    return (
        n_epochs * source.n_rows / (laps[-1] - laps[0]),
        source.n_rows / (laps[2] - laps[1]),
        source.n_rows / (laps[-1] - laps[-2]),
    )


def compare_workers(folder: Path, n_rows: int, n_epochs: int, repeats: int) -> None:
    rng = np.random.default_rng(0)
    path = folder / "rows.h5"
    with h5py.File(path, "w") as file:
        X = file.create_dataset("X", (n_rows, N_FEATURES), "f4", chunks=(4096, N_FEATURES), compression="gzip")
        for first in range(0, n_rows, 1 << 17):
            X[first : first + (1 << 17)] = rng.standard_normal((min(1 << 17, n_rows - first), N_FEATURES), np.float32)
        file.create_dataset("y", data=rng.standard_normal(n_rows))
    source = streamgd.open_source(path, "y")
    found: dict[int, list[tuple[float, float, float]]] = {1: [], 2: []}
    with cluster(1) as (_, one), cluster(2) as (_, two):
        for client in (one, two):
            rates(source, client, 2)  # compiles
        for _ in range(repeats):
            for n, client in ((1, one), (2, two)):
                found[n].append(rates(source, client, n_epochs))
    print(f"gzip HDF5, {n_rows:,} rows, {n_epochs} epochs")
    for k, what in enumerate(("whole fit", "second epoch", "last epoch")):
        one_s, two_s = ([rate[k] for rate in found[n]] for n in (1, 2))
        a, b = statistics.median(one_s), statistics.median(two_s)
        ratios = sorted(y / x for x, y in zip(one_s, two_s, strict=True))
        print(
            f"{what:13s} 1 worker {a / 1e6:.2f} M rows/s, 2 workers {b / 1e6:.2f}: ratio of medians {b / a:.2f}; of "
            f"pairs {', '.join(f'{ratio:.2f}' for ratio in ratios)}"
        )


def compare_dask_ml(n_rows: int, repeats: int) -> None:
    import dask.array as da
    from dask_ml.wrappers import Incremental
    from distributed import wait
    from sklearn.linear_model import SGDRegressor

    with cluster(2) as (_, client), client.as_current():
        rng = da.random.default_rng(0)
        X = rng.standard_normal((n_rows, N_FEATURES), chunks=(50_000, N_FEATURES)).astype(np.float32)
        X, y = client.persist([X, X @ np.ones(N_FEATURES, np.float32)])
        wait([X, y])
        source = training_source(streamgd.SGDRegressor(), X, y, None, reset=True, labels=False)
        ours, theirs, whole = [], [], []
        rates(source, client, 2)
        for _ in range(repeats):
            began = time.perf_counter()
            Incremental(SGDRegressor(), assume_equal_chunks=True).fit(X, y)
            theirs.append(n_rows / (time.perf_counter() - began))
            began = time.perf_counter()
            laps = laps_of(source, client, 4, 3)
            whole.append(3 * n_rows / (time.perf_counter() - began))
            ours.append(n_rows / (laps.epochs[2] - laps.epochs[1]))
    a, b, c = statistics.median(ours), statistics.median(theirs), statistics.median(whole)
    print(f"persisted Dask array, {n_rows:,} rows, two workers: Incremental(SGDRegressor) {b / 1e6:.2f} M rows/s")
    for what, rate, all_of in (("second epoch", a, ours), ("three epochs with survey", c, whole)):
        times = [x / y for x, y in zip(all_of, theirs, strict=True)]
        print(f"{what} {rate / 1e6:.2f} M rows/s: {rate / b:.2f} times, of pairs {min(times):.2f} to {max(times):.2f}")


def measure_rounds(folder: Path, repeats: int) -> None:
    rng = np.random.default_rng(0)
    for n_features in (N_FEATURES, 40_000):
        n_rows = 20_000 if n_features < 1000 else 2_000
        path = folder / f"wide-{n_features}.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset(
                "X", data=rng.standard_normal((n_rows, n_features), np.float32), chunks=(64, n_features)
            )
            file.create_dataset("y", data=rng.standard_normal(n_rows))
        source = streamgd.open_source(path, "y")
        rounds: list[float] = []
        here: list[float] = []
        pace._SHORT_BYTES, pace._SHARED_S = 0, -1.0
        with cluster(2) as (_, client):
            laps_of(source, client, 8, 1)
            for _ in range(repeats):
                rounds += laps_of(source, client, 8, 1).rounds
                here += laps_of(source, None, 8, 1).rounds
        state = 3 * 8 * (n_features + 1)
        print(
            f"round of 8 lanes, state {state / 1e3:,.0f} kB: median {1e3 * statistics.median(rounds):.1f} ms, ", end=""
        )
        print(
            f"nine in ten up to {1e3 * np.quantile(rounds, 0.9):.1f} ms, {len(rounds) // repeats} rounds a run; ",
            end="",
        )
        print(f"the same rounds in threads here: median {1e3 * statistics.median(here):.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["workers", "dask-ml", "round"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "workers" in options.what:
            compare_workers(Path(folder), options.rows, options.epochs, options.repeats)
        if "dask-ml" in options.what:
            compare_dask_ml(options.rows, options.repeats)
        if "round" in options.what:
            measure_rounds(Path(folder), options.repeats)


if __name__ == "__main__":
    main()
