"""One epoch side by side with scikit-learn's partial_fit over the same file.

Makes the data (28 float32 features, a regression), then runs each contender in turn, round after round, in one process,
over a warm page cache, and prints medians and the ratio. Everything is at its defaults: streamgd shuffles, scales the
features, takes its survey and checks that each row came once; scikit-learn gets 65,536-row chunks in file order, which
are scaled already (the data is generated with unit variance).

    python benchmarks/speed.py [--rows 8000000] [--rounds 5] [--folder DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.linear_model import SGDRegressor as SklearnSGD

import streamgd

N_FEATURES, CHUNK = 28, 65_536


def make(folder: Path, n_rows: int) -> tuple[Path, Path]:
    """Write the same table as HDF5 (contiguous) and as Parquet (snappy, groups of 131,072 rows, no dictionary)."""
    hdf5, parquet = folder / f"rows-{n_rows}.h5", folder / f"rows-{n_rows}.parquet"
    if hdf5.exists() and parquet.exists():
        return hdf5, parquet
    rng = np.random.default_rng(0)
    w = rng.standard_normal(N_FEATURES)
    names = [f"x{j}" for j in range(N_FEATURES)]
    schema = pa.schema([(name, pa.float32()) for name in [*names, "y"]])
    with h5py.File(hdf5, "w") as file, pq.ParquetWriter(parquet, schema, use_dictionary=False) as writer:
        X_out = file.create_dataset("X", (n_rows, N_FEATURES), np.float32)
        y_out = file.create_dataset("y", (n_rows,), np.float32)
        for first in range(0, n_rows, 131_072):
            n = min(131_072, n_rows - first)
            X = rng.standard_normal((n, N_FEATURES), dtype=np.float32)
            y = (X @ w + rng.standard_normal(n)).astype(np.float32)
            X_out[first : first + n], y_out[first : first + n] = X, y
            writer.write_table(pa.table([*X.T.copy(), y], schema=schema))
    return hdf5, parquet


def sklearn_hdf5(path: Path) -> None:
    model = SklearnSGD(penalty=None)
    with h5py.File(path) as file:
        for first in range(0, len(file["y"]), CHUNK):
            model.partial_fit(file["X"][first : first + CHUNK], file["y"][first : first + CHUNK])


def sklearn_parquet(path: Path) -> None:
    model = SklearnSGD(penalty=None)
    for batch in pq.ParquetFile(path).iter_batches(CHUNK):
        columns = [column.to_numpy() for column in batch.columns]
        model.partial_fit(np.stack(columns[:-1], axis=1), columns[-1])


def scan_parquet(path: Path) -> None:
    for _ in pq.ParquetFile(path).iter_batches(CHUNK, use_threads=True):
        pass


def scan_hdf5(path: Path) -> None:
    with h5py.File(path) as file:
        for first in range(0, len(file["y"]), CHUNK):
            file["X"][first : first + CHUNK], file["y"][first : first + CHUNK]


def ours(path: Path) -> None:
    streamgd.SGDRegressor(max_iter=1).fit(streamgd.open_source(str(path), target="y"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the data is kept; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        hdf5, parquet = make(folder, options.rows)
        groups: dict[str, tuple[Path, dict[str, Callable[[Path], None]]]] = {
            "HDF5": (hdf5, {"streamgd": ours, "scikit-learn": sklearn_hdf5, "h5py scan": scan_hdf5}),
            "Parquet": (parquet, {"streamgd": ours, "scikit-learn": sklearn_parquet, "pyarrow scan": scan_parquet}),
        }
        for label, (path, contenders) in groups.items():
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for round_number in range(options.rounds + 1):  # the first warms the page cache and compiles
                for name, run in contenders.items():
                    began = time.perf_counter()
                    run(path)
                    if round_number:
                        seconds[name].append(time.perf_counter() - began)
            for name, taken in seconds.items():
                ratios = [a / b for a, b in zip(taken, seconds["streamgd"], strict=True)]
                median = statistics.median(taken)
                print(
                    f"{label:8s} {name:13s} median {median:6.2f} s ({min(taken):.2f}-{max(taken):.2f}), "
                    f"{options.rows / median / 1e6:5.1f} M rows/s, "
                    f"{statistics.median(ratios):5.2f} times streamgd's time",
                    flush=True,
                )


if __name__ == "__main__":
    main()
