"""Does the shuffle window mix data that is sorted by its label?

adult, sorted by label, in HDF5 chunks of 32 rows, with a buffer whose window holds 2 % of the rows: defaults, 3 epochs,
several seeds. The mean test log-loss is compared with the same on rows that were shuffled before they were stored.

    python benchmarks/sorted_labels.py --data FOLDER_WITH_ADULT [--seeds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import h5py
import numpy as np
import sets

import streamgd
from streamgd.data.plan import plan_layout
from streamgd.errors import BufferTooSmallError

SHARE, CHUNK_ROWS = 0.02, 32


def store(path: Path, X: np.ndarray, y: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("X", data=X.astype(np.float32), chunks=(CHUNK_ROWS, X.shape[1]))
        file.create_dataset("y", data=y, chunks=(CHUNK_ROWS,))
    return path


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    train, test = sets.adult(options.data), sets.adult_test(options.data)
    orders = {
        "sorted by label": np.argsort(train.y, kind="stable"),
        "shuffled": np.random.default_rng(0).permutation(len(train.y)),
    }
    means = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, order in orders.items():
            path = store(Path(folder) / f"{name.split()[0]}.h5", train.X[order], train.y[order])
            buffer = buffer_for(path, round(SHARE * len(train.y)))
            losses = []
            for seed in range(options.seeds):
                model = streamgd.SGDClassifier(max_iter=3, tol=None, buffer=buffer, random_state=seed)
                model.fit(streamgd.open_source(str(path), target="y"))
                losses.append(sets.loss(test, model.coef_[0], float(model.intercept_[0])))
            means[name] = statistics.mean(losses)
            print(f"{name:16s} buffer {buffer:,} bytes: test log-loss {means[name]:.5f}", *(f"{x:.5f}" for x in losses))
    print(f"sorted / shuffled: {means['sorted by label'] / means['shuffled']:.4f}")


if __name__ == "__main__":
    main()
