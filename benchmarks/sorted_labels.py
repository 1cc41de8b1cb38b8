"""Does the shuffle window mix data that is sorted by its label?

Rows of adult (or, where the files are not at hand, generated ones like it), sorted by label, against the same rows
shuffled before they were stored: a buffer whose window holds 2 % of the rows, defaults, 3 epochs, several seeds; the
mean test log-losses are compared.

    python benchmarks/sorted_labels.py [--data FOLDER_WITH_ADULT] [--storage hdf5|parquet] [--cached] [--seeds 5]

Storage is HDF5 in chunks of 32 rows, or Parquet as its writer makes it, in 20 row groups, where only the cache can mix.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sets

import streamgd
from streamgd.data.plan import plan_layout
from streamgd.errors import BufferTooSmallError

SHARE, CHUNK_ROWS, N_GROUPS = 0.02, 32, 20


def store_hdf5(path: Path, X: np.ndarray, y: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("X", data=X.astype(np.float32), chunks=(CHUNK_ROWS, X.shape[1]))
        file.create_dataset("y", data=y, chunks=(CHUNK_ROWS,))


def store_parquet(path: Path, X: np.ndarray, y: np.ndarray) -> None:
    columns = {f"x{j}": column for j, column in enumerate(X.astype(np.float32).T)}
    pq.write_table(pa.table({**columns, "y": y}), path, row_group_size=-(-len(y) // N_GROUPS))


STORAGE = {"hdf5": store_hdf5, "parquet": store_parquet}


def buffer_for(path: Path, window_rows: int) -> int:
    """Find the smallest buffer whose window holds that many rows."""
    source = streamgd.open_source(str(path), target="y")
    low, high = 1, 1 << 34
    while low < high:
        middle = (low + high) // 2
        try:
            enough = plan_layout(source, middle, n_outputs=1, carry_rows=256).window_rows >= window_rows
        except BufferTooSmallError:
            enough = False
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def compare(storage: str, data: Path | None, *, n_seeds: int, folder: Path, cached: bool = False) -> float:
    """Print the losses of both orders, and return how many times the loss of shuffled rows that of sorted ones is."""
    train, test = (sets.adult(data), sets.adult_test(data)) if data else sets.adult_like(np.random.default_rng(0))
    orders = {
        "sorted by label": np.argsort(train.y, kind="stable"),
        "shuffled": np.random.default_rng(0).permutation(len(train.y)),
    }
    means = {}
    for name, order in orders.items():
        path = folder / f"{name.split()[0]}.{storage}"
        STORAGE[storage](path, train.X[order], train.y[order])
        buffer = buffer_for(path, round(SHARE * len(train.y)))
        settings = {"cache": folder / f"{path.name}-cache"} if cached else {}
        losses = []
        for seed in range(n_seeds):
            model = streamgd.SGDClassifier(max_iter=3, tol=None, buffer=buffer, random_state=seed, **settings)
            model.fit(streamgd.open_source(str(path), target="y"))
            losses.append(sets.loss(test, model.coef_[0], float(model.intercept_[0])))
        means[name] = statistics.mean(losses)
        print(f"{name:16s} buffer {buffer:,} bytes: test log-loss {means[name]:.5f}", *(f"{x:.5f}" for x in losses))
    return means["sorted by label"] / means["shuffled"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with adult.trn.bz2 and adult.tst.bz2")
    parser.add_argument("--storage", choices=STORAGE, default="hdf5")
    parser.add_argument("--cached", action="store_true", help="with the cache, from the first epoch on")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(
            options.storage, options.data, n_seeds=options.seeds, folder=Path(folder), cached=options.cached
        )
    print(f"sorted / shuffled: {found:.4f}")


if __name__ == "__main__":
    main()
