"""Without shuffling, no bit depends on the format, on where blocks end, on the windows or on the buffer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streamgd.data.sources import open_source
from streamgd.data.sources.base import Source
from streamgd.data.sources.memory import MemorySource
from streamgd.errors import BufferTooSmallError
from streamgd.learn.recipe import Recipe
from streamgd.run.config import Config
from streamgd.run.loop import train
from streamgd.run.runs import Run, plan_for, prepare

N_ROWS, N_FEATURES = 1200, 4
#: Targets of a task, and what is learnt; weights that are no round numbers go with two of them.
TASKS: dict[str, dict[str, Any]] = {
    "regression": {},
    "three targets, weighted": {"optimizer": "adam", "penalty": "l1"},
    "two classes": {"task": "classification", "loss": "hinge", "learning_rate": "constant", "momentum": 0.5},
    "three classes, weighted": {"task": "classification", "loss": "log_loss"},
}
Rows = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def rows_of(task: str, dtype: str) -> Rows:
    rng = np.random.default_rng(list(TASKS).index(task))
    X = rng.normal([100.0, 0.0, -3.0, 1e-4], [3.0, 1.0, 20.0, 1e-5], size=(N_ROWS, N_FEATURES)).astype(dtype)
    scores = (X - X.mean(axis=0)) / X.std(axis=0) @ rng.normal(size=(N_FEATURES, 3)) + rng.normal(size=(N_ROWS, 3))
    y = {
        "regression": scores[:, 0] * 7 + 50,
        "three targets, weighted": scores * [1.0, 10.0, 1e-3],
        "two classes": (scores[:, 0] > 1).astype(np.int64),
        "three classes, weighted": scores.argmax(axis=1),
    }[task]
    return X, y, rng.uniform(0.1, 3.0, N_ROWS) if "weighted" in task else None


def config_of(task: str, **options: Any) -> Config:
    recipe = {"batch_size": 64, **TASKS[task]}
    own = {name: options.pop(name) for name in ("standardize", "max_iter") if name in options}
    weighted = {"class_weight": "balanced"} if task == "three classes, weighted" else {}
    return Config(recipe=Recipe(**{**recipe, **options}), shuffle=False, tol=None, **{"max_iter": 2, **weighted, **own})


def in_memory(block_bytes: int, order: str = "C") -> Callable[[Path, Rows], Source]:
    def make(folder: Path, rows: Rows) -> Source:
        X, y, weight = rows
        return MemorySource(np.asarray(X, order=order), y, weight=weight, block_bytes=block_bytes)  # type: ignore[call-overload]

    return make


def as_frame(folder: Path, rows: Rows) -> Source:
    X, y, weight = rows
    return open_source(pd.DataFrame(X, columns=list("abcd")), y, weight=weight)


def as_npy(folder: Path, rows: Rows) -> Source:
    X, y, weight = rows
    np.save(folder / "X.npy", X)
    return open_source(folder / "X.npy", y, weight=weight)


def as_hdf5(chunks: tuple[int, int] | None, n_files: int = 1, **options: Any) -> Callable[[Path, Rows], Source]:
    def make(folder: Path, rows: Rows) -> Source:
        X, y, weight = rows
        ends = np.linspace(0, N_ROWS, n_files + 1).astype(int)
        for i, (first, last) in enumerate(itertools.pairwise(ends)):
            with h5py.File(folder / f"{i}.h5", "w") as file:
                file.create_dataset("X", data=X[first:last], chunks=chunks, **options)
                file.create_dataset("y", data=y[first:last], chunks=True if chunks else None)
                if weight is not None:
                    file.create_dataset("w", data=weight[first:last])
        return open_source(str(folder / "*.h5"), "y", weight=None if weight is None else "w")

    return make


def as_parquet(group_rows: int, n_files: int = 1, **options: Any) -> Callable[[Path, Rows], Source]:
    def make(folder: Path, rows: Rows) -> Source:
        X, y, weight = rows
        columns = {f"x{j}": X[:, j] for j in range(N_FEATURES)}
        targets = {"y": y} if y.ndim == 1 else {f"y{k}": y[:, k] for k in range(y.shape[1])}
        table = pa.table(columns | targets | ({} if weight is None else {"w": weight}))
        ends = np.linspace(0, N_ROWS, n_files + 1).astype(int)
        for i, (first, last) in enumerate(itertools.pairwise(ends)):
            part = table.slice(first, last - first)
            pq.write_table(part, folder / f"{i}.parquet", row_group_size=group_rows, **options)
        target = next(iter(targets)) if len(targets) == 1 else list(targets)
        return open_source(str(folder), target, weight=None if weight is None else "w")

    return make


def as_dask(chunk_rows: Any, columns: int = N_FEATURES) -> Callable[[Path, Rows], Source]:
    def make(folder: Path, rows: Rows) -> Source:
        X, y, weight = rows
        return open_source(
            da.from_array(X, chunks=(chunk_rows, columns)),
            da.from_array(y, chunks=(chunk_rows, *y.shape[1:])),
            weight=None if weight is None else da.from_array(weight, chunks=chunk_rows),
        )

    return make


FORMATS: dict[str, Callable[[Path, Rows], Source]] = {
    "memory, small blocks": in_memory(600),
    "memory, by columns": in_memory(1 << 20, "F"),
    "DataFrame": as_frame,
    "npy": as_npy,
    "hdf5, contiguous": as_hdf5(None),
    "hdf5, gzip chunks": as_hdf5((97, 3), compression="gzip"),
    "hdf5, tall chunks in three files": as_hdf5((400, 1), n_files=3, compression="lzf"),
    "parquet, one group": as_parquet(N_ROWS),
    "parquet, many groups": as_parquet(50, data_page_size=512),
    "parquet, uneven groups in files": as_parquet(333, n_files=2, compression="zstd", use_dictionary=False),
    "dask, even": as_dask(250),
    "dask, uneven and cut between columns": as_dask((1, 499, 3, 697), columns=2),
}


def bits(run: Run) -> dict[str, Any]:
    """Return what was learnt, to the bit, and the survey; where blocks and windows end is left out."""
    checkpoint = run.to_checkpoint()
    found: dict[str, Any] = {
        name: (array.dtype.str, array.tobytes()) for name, array in checkpoint.tensors.items() if name != "checksum"
    }
    return found | {"survey": checkpoint.meta["survey"], "model": run.model().coef.tobytes()}


def trained(source: Source, config: Config) -> dict[str, Any]:
    run = prepare(source, config)
    assert train(run)
    source.close()
    return bits(run)


def buffers(source: Source, config: Config) -> list[int]:
    """Return the smallest buffer that does, one for a few windows, and one for everything."""
    with pytest.raises(BufferTooSmallError) as caught:
        plan_for(source, replace(config, buffer_bytes=1))
    needed = caught.value.needed_bytes
    return [needed, needed + 20_000, 50_000_000]


@pytest.fixture(scope="module")
def references() -> dict[Any, dict[str, Any]]:
    """What each task comes to in one block and one window; made when first asked for."""
    return {}


def reference(references: dict[Any, Any], task: str, dtype: str, **options: Any) -> dict[str, Any]:
    key = (task, dtype, *sorted(options.items()))
    if key not in references:
        references[key] = trained(in_memory(1 << 30)(Path(), rows_of(task, dtype)), config_of(task, **options))
    found: dict[str, Any] = references[key]
    return found


@pytest.mark.parametrize(
    ("task", "dtype"),
    [
        ("regression", "float32"),
        ("regression", "float64"),
        ("three targets, weighted", "float32"),
        ("two classes", "float64"),
        ("three classes, weighted", "float32"),
    ],
)
@pytest.mark.parametrize("kind", FORMATS)
def test_formats_and_buffers(references: dict[Any, Any], tmp_path: Path, kind: str, task: str, dtype: str) -> None:
    source = FORMATS[kind](tmp_path, rows_of(task, dtype))
    config = config_of(task)
    assert source.row_dtype == dtype
    window_rows = []
    for buffer in buffers(source, config):
        run = prepare(source, replace(config, buffer_bytes=buffer))
        assert train(run)
        window_rows.append(run.layout.window_rows)
        assert bits(run) == reference(references, task, dtype)
    assert window_rows[0] < window_rows[-1] == N_ROWS
    source.close()


@pytest.mark.parametrize("options", [{"standardize": False}, {"standardize": "full"}, {"fit_intercept": False}])
@pytest.mark.parametrize("task", ["regression", "three classes, weighted"])
def test_scaling(references: dict[Any, Any], tmp_path: Path, task: str, options: dict[str, Any]) -> None:
    for number, kind in enumerate(["hdf5, gzip chunks", "parquet, many groups", "dask, even"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = FORMATS[kind](folder, rows_of(task, "float32"))
        config = config_of(task, **options)
        found = trained(source, replace(config, buffer_bytes=buffers(source, config)[1]))
        assert found == reference(references, task, "float32", **options)


@pytest.mark.parametrize("batch_size", [1, 7, 256, N_ROWS - 1, 5000])
@pytest.mark.parametrize("task", TASKS)
def test_batches_that_cross_windows(references: dict[Any, Any], task: str, batch_size: int) -> None:
    """The open batch runs on across blocks and windows of any size."""
    expected = reference(references, task, "float32", batch_size=batch_size)
    config = config_of(task, batch_size=batch_size)
    for block_bytes, more in ((1, 3000), (333, 700), (5000, 20_000)):
        source = in_memory(block_bytes)(Path(), rows_of(task, "float32"))
        assert trained(source, replace(config, buffer_bytes=buffers(source, config)[0] + more)) == expected


def test_more_rows_than_a_sample(tmp_path: Path) -> None:
    """With the survey over all rows, as well as without one, size changes nothing."""
    rng = np.random.default_rng(0)
    X = rng.normal(5, 2, size=(70_000, 2)).astype(np.float32)
    y = X @ [1.0, -2.0] + rng.normal(size=len(X))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("X", data=X, chunks=(1000, 2))
        file.create_dataset("y", data=y)
    table = pa.table({"a": X[:, 0], "b": X[:, 1], "y": y})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30_000)
    for standardize in (False, "full"):
        config = config_of("regression", standardize=standardize, max_iter=1)
        expected = trained(MemorySource(X, y), config)
        for path in ("a.h5", "a.parquet"):
            source = open_source(str(tmp_path / path), "y")
            assert trained(source, replace(config, buffer_bytes=3_000_000)) == expected
