"""How fast is a cluster of two single-threaded workers, and what does a round cost?

``workers``: rows/s of whole fits over gzip-compressed HDF5, one worker against two, in turn, each in a cluster of its
own: one that idles beside the other would take 4 % of a core. ``dask-ml``: rows/s of whole fits, of one epoch and of
several, beside dask-ml's ``Incremental(SGDRegressor)`` on the same persisted Dask array and the same workers; each pair
has a new array, about half of which lies where no lane needs it, and who is first alternates. ``round``: milliseconds
of rounds with little work, eight lanes, for a small state and one of 1 MB: as on one machine, by an exchange; by tasks,
as on several, none of them made one task with others; and of the same ones here.

    python benchmarks/cluster_speed.py [workers] [dask-ml] [round] [--rows 8000000] [--epochs 5] [--repeats 5]
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
from streamgd.learn.recipe import Recipe
from streamgd.run import dispatch, pace
from streamgd.run.config import Config
from streamgd.run.loop import Watcher, train
from streamgd.run.runs import prepare
from tests.clustering import cluster

N_FEATURES = 28
WHAT = ["workers", "dask-ml", "round"]


class Rounds(Watcher):
    """Notes the seconds of each round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def advanced(self, run: Any, stream: Any) -> None:
        self.seconds.append(stream.round_s)


def rounds_of(source: Any, client: Any, n_lanes: int, n_epochs: int = 1) -> list[float]:
    """Fit; return the seconds of each round."""
    rounds = Rounds()
    config = Config(Recipe(batch_size=256), max_iter=n_epochs, tol=None, n_lanes=n_lanes)
    train(prepare(source, config), client=client, watcher=rounds)
    return rounds.seconds


def rate(X: Any, y: Any, client: Any, n_epochs: int, n_rows: int) -> float:
    """Return the rows/s of a whole fit in four lanes."""
    model = streamgd.SGDRegressor(batch_size=256, max_iter=n_epochs, tol=None, n_lanes=4)
    began = time.perf_counter()
    model.fit(X, y, client=client)
    return n_epochs * n_rows / (time.perf_counter() - began)


def told(n_epochs: int, slow: tuple[str, list[float]], fast: tuple[str, list[float]]) -> str:
    """Say how many times as fast the second is as the first: the ratio of medians, and that of each pair."""
    ratios = sorted(b / a for a, b in zip(slow[1], fast[1], strict=True))
    (slow_rate, fast_rate), n = (statistics.median(rates) for _, rates in (slow, fast)), len(ratios)
    return (
        f"epochs: {n_epochs}; M rows/s: {slow[0]} {slow_rate / 1e6:.2f}, {fast[0]} {fast_rate / 1e6:.2f}; "
        f"times as fast: {fast_rate / slow_rate:.2f}, median of {n} pairs {statistics.median(ratios):.2f} "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
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
    found: dict[tuple[int, int], list[float]] = {}
    for repeat in range(repeats):
        for n_workers in (1, 2) if repeat % 2 else (2, 1):
            with cluster(n_workers) as (_, client):
                rate(source, None, client, 1, n_rows)  # imports and compiles
                for epochs in sorted({1, n_epochs}):
                    found.setdefault((n_workers, epochs), []).append(rate(source, None, client, epochs, n_rows))
    print(f"gzip HDF5, {n_rows:,} rows, whole fits")
    for epochs in sorted({1, n_epochs}):
        print(told(epochs, ("one worker", found[1, epochs]), ("two", found[2, epochs])))


def compare_dask_ml(n_rows: int, n_epochs: int, repeats: int) -> None:
    import dask.array as da
    from dask_ml.wrappers import Incremental
    from distributed import wait
    from sklearn.linear_model import SGDRegressor

    ours: dict[int, list[float]] = {1: [], n_epochs: []}
    theirs: dict[int, list[float]] = {1: [], n_epochs: []}
    with cluster(2) as (_, client), client.as_current():

        def pair(seed: list[int], epochs: int, first: bool) -> tuple[float, float]:
            """Return the rates of both over an array that is gone before the next one is made."""
            X = da.random.default_rng(seed).standard_normal((n_rows, N_FEATURES), chunks=(50_000, N_FEATURES))
            X = X.astype(np.float32)
            X, y = client.persist([X, X @ np.ones(N_FEATURES, np.float32)])
            wait([X, y])
            mine = rate(X, y, client, epochs, n_rows) if first else 0.0
            began = time.perf_counter()
            Incremental(SGDRegressor(), assume_equal_chunks=True).fit(X, y)
            other = n_rows / (time.perf_counter() - began)
            return mine or rate(X, y, client, epochs, n_rows), other

        for repeat in range(repeats + 1):
            for epochs in ours:
                mine, other = pair([repeat, epochs], epochs, repeat % 2 == 0)
                time.sleep(0.5)  # so that workers have dropped the array
                if repeat:  # the first ones import and compile
                    ours[epochs].append(mine)
                    theirs[epochs].append(other)
    print(f"persisted Dask array, {n_rows:,} rows, two workers, whole fits")
    for epochs, rates in ours.items():
        print(told(epochs, ("dask-ml's Incremental(SGDRegressor), one epoch", theirs[epochs]), ("streamgd", rates)))


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
        found: dict[str, list[float]] = {"by an exchange": [], "by tasks": [], "in threads here": []}
        pace._SHORT_BYTES, pace._SHARED_S = 0, -1.0
        can_meet = dispatch.can_meet
        with cluster(2) as (_, client):
            rounds_of(source, client, 8)
            for _ in range(repeats):
                for way, seconds in found.items():
                    dispatch.can_meet = can_meet if way == "by an exchange" else lambda _: False
                    seconds += rounds_of(source, None if way == "in threads here" else client, 8)
        dispatch.can_meet = can_meet
        state, here_ms = 3 * 8 * (n_features + 1), 1e3 * statistics.median(found["in threads here"])
        print(f"rounds of 8 lanes, state of {state / 1e3:,.0f} kB, {len(found['by tasks']) // repeats} a run, ms:")
        for way, seconds in found.items():
            median, most = 1e3 * statistics.median(seconds), 1e3 * np.quantile(seconds, 0.9)
            print(f"  {way}: median {median:.1f}, {median - here_ms:.1f} more than here; nine in ten up to {most:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help=f"{', '.join(WHAT)}; default: all")
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    what = options.what or WHAT
    if not set(what) <= set(WHAT):
        parser.error(f"{' '.join(what)}: expected some of {', '.join(WHAT)}")
    with tempfile.TemporaryDirectory() as folder:
        if "workers" in what:
            compare_workers(Path(folder), options.rows, options.epochs, options.repeats)
        if "dask-ml" in what:
            compare_dask_ml(options.rows, options.epochs, options.repeats)
        if "round" in what:
            measure_rounds(Path(folder), options.repeats)


if __name__ == "__main__":
    main()
