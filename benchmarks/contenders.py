"""What runs side by side: one epoch of streamgd, what users would pick instead, and bare scans.

Each function makes one pass over the rows. Those that learn return their coefficients. The peers get rows that are
scaled already, in file order, in chunks of the size at which they were fastest or most usual; no penalty; else their
defaults. streamgd does all that it does by default, and keeps checkpoints.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
from rounds import Outcome

import streamgd

BATCH = 256
#: Where Vowpal Wabbit keeps the intercept: the index of the feature that it adds to each row.
VOWPAL_CONSTANT = 11_650_396


# --- streamgd ---
def streamgd_epoch(path: Path, scratch: Path, **settings: object) -> Outcome:
    """One epoch as a user would run it: survey, shuffle, scaling, every check, checkpoints."""
    source = streamgd.open_source(str(path), target="y")
    model = streamgd.SGDRegressor(max_iter=1, checkpoint_dir=scratch / "runs", **settings).fit(source)
    return Outcome(model.coef_, float(np.ravel(model.intercept_)[0]))


def why_no_cache() -> str | None:
    """Say why the cache cannot be measured, or None."""
    if "cache" in inspect.signature(streamgd.SGDRegressor).parameters:
        return None
    return f"streamgd {streamgd.__version__} has no cache"


def streamgd_second_epoch(path: Path, scratch: Path) -> Outcome:
    """The second of two epochs, by the run's own clock. The cache is made in the round that is not counted."""
    source = streamgd.open_source(str(path), target="y")
    settings = {"checkpoint_dir": scratch / "runs", "cache": scratch / "cache"}
    model = streamgd.SGDRegressor(max_iter=2, tol=None, **settings).fit(source)
    records = [json.loads(line) for line in (Path(model.run_dir_) / "metrics.jsonl").read_text().splitlines()]
    first, second = (record["wall_s"] for record in records if record["window"] is None)
    return Outcome(model.coef_, float(np.ravel(model.intercept_)[0]), seconds=second - first)


# --- bare scans ---
def h5py_chunks(path: Path, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield features and targets of runs of rows; of compressed data whole chunks, lest one is decompressed twice."""
    with h5py.File(path) as file:
        X, y = file["X"], file["y"]
        height = X.chunks[0] if X.chunks else 1
        chunk = max(height, chunk - chunk % height)
        for first in range(0, len(y), chunk):
            yield X[first : first + chunk], y[first : first + chunk]


def h5py_scan(path: Path, chunk: int) -> None:
    for _ in h5py_chunks(path, chunk):
        pass


def pyarrow_scan(path: Path, batch_rows: int) -> None:
    """Decode all columns, two threads or more, and leave them as they come."""
    for _ in pq.ParquetFile(path).iter_batches(batch_rows, use_threads=True):
        pass


def pyarrow_chunks(path: Path, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield features as row-major matrices, by pyarrow's own conversion (the fastest of five tried), and targets."""
    file = pq.ParquetFile(path)
    names = [name for name in file.schema_arrow.names if name != "y"]
    for batch in file.iter_batches(chunk, use_threads=True):
        yield batch.select(names).to_tensor(row_major=True).to_numpy(), batch.column("y").to_numpy()


def pyarrow_matrix(path: Path, chunk: int) -> None:
    for _ in pyarrow_chunks(path, chunk):
        pass


# --- peers ---
def sklearn_hdf5(path: Path, chunk: int) -> Outcome:
    return _partial_fit(h5py_chunks(path, chunk))


def sklearn_parquet(path: Path, chunk: int) -> Outcome:
    return _partial_fit(pyarrow_chunks(path, chunk))


def _partial_fit(chunks: Iterator[tuple[np.ndarray, np.ndarray]]) -> Outcome:
    from sklearn.linear_model import SGDRegressor

    model = SGDRegressor(penalty=None, random_state=0)
    for X, y in chunks:
        model.partial_fit(X, y)
    return Outcome(model.coef_, float(model.intercept_[0]))


def dask_ml_incremental(path: Path, chunk: int) -> Outcome:
    """scikit-learn's model, fed by Dask's threads, which read ahead."""
    import dask.array as da
    from dask_ml.wrappers import Incremental
    from sklearn.linear_model import SGDRegressor

    with h5py.File(path) as file:
        X = da.from_array(file["X"], chunks=(chunk, -1))
        y = da.from_array(file["y"], chunks=chunk)
        model = Incremental(SGDRegressor(penalty=None, random_state=0), random_state=0).fit(X, y)
    return Outcome(model.estimator_.coef_, float(model.estimator_.intercept_[0]))


def torch_loop(path: Path, chunk: int) -> Outcome:
    """The usual loop: a linear layer, plain SGD, each chunk's rows shuffled by one indexing, views as batches."""
    import torch

    torch.manual_seed(0)
    with h5py.File(path) as file:
        layer = torch.nn.Linear(file["X"].shape[1], 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for X, y in h5py_chunks(path, chunk):
        order = torch.randperm(len(y))
        rows, targets = torch.from_numpy(X)[order], torch.from_numpy(y)[order]
        for some, wanted in zip(rows.split(BATCH), targets.split(BATCH), strict=True):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(layer(some).squeeze(1), wanted).backward()
            optimizer.step()
    return Outcome(layer.weight.detach().numpy()[0], float(layer.bias.detach()))


def vowpal_wabbit(cache: Path, n_rows: int, n_features: int, *options: str) -> Outcome:
    """One pass over the cache file, by the native loop of the library: it parses in one thread, learns in another."""
    from vowpalwabbit import Workspace

    model = Workspace(arg_list=["--cache_file", str(cache), "--passes", "1", "--quiet", *options])
    if model.get_weighted_examples() != n_rows:
        raise RuntimeError(f"Vowpal Wabbit learnt from {model.get_weighted_examples():,} rows of {n_rows:,}")
    coef = np.array([model.get_weight_from_name(str(j), "f") for j in range(n_features)])
    intercept = model.get_weight(VOWPAL_CONSTANT)
    model.finish()
    return Outcome(coef, intercept)
