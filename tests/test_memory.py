"""Peak resident memory of processes that train on much more than their buffer holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import streamgd
from streamgd.data.layout import parse_bytes
from streamgd.data.sources import open_source
from streamgd.errors import BufferTooSmallError
from streamgd.run.config import Config
from streamgd.run.runs import plan_for

N_FEATURES, SMALL_ROWS = 8, 1_500_000
BUFFER = 40_000_000
#: What a run costs beside its buffer: stacks of threads, and what allocators keep for themselves.
SLACK = {"hdf5": 12_000_000, "parquet": 18_000_000, "dask": 18_000_000}


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")

# Trains on a few rows first, so that what is loaded once is not counted; then on each set of data in turn.
_CHILD = """
import json
import sys

import numpy as np

import streamgd
from streamgd.run.config import Config
from streamgd.run.loop import train
from streamgd.run.runs import prepare

kind, buffer, *data = json.loads(sys.argv[1])


def rows_made_of_arithmetic(n_rows):
    import dask.array as da

    def block(block_info):
        (first, last), _ = block_info[None]["array-location"]
        return np.sin(np.arange(first, last)[:, None] * np.arange(1.0, 9.0)).astype(np.float32)

    n = 50_000
    X = da.map_blocks(block, chunks=((n,) * (n_rows // n), (8,)), dtype=np.float32, meta=np.zeros((0, 0), np.float32))
    return streamgd.open_source(X, X.sum(axis=1))


def peak():
    with open("/proc/self/status") as file:
        words = {line.split(":")[0]: line.split() for line in file}
    return int(words["VmHWM"][1]) * 1024, int(words["VmRSS"][1]) * 1024


def go(data):
    source = rows_made_of_arithmetic(data) if kind == "dask" else streamgd.open_source(data, "y")
    run = prepare(source, Config(max_iter=1, tol=None, buffer_bytes=buffer))
    assert train(run)
    source.close()
    return run.layout.planned_bytes


planned = go(data[0])
before = peak()[1]
for each in data[1:]:
    planned = go(each)
    print(json.dumps({"before": before, "peak": peak()[0], "planned": planned}))
"""


def measured(kind: str, buffer: int, *data: str | int) -> list[dict[str, int]]:
    """Return what a process has before, and its peak after each set of data but the first, a tiny one."""
    env = os.environ | {"PYTHONPATH": str(Path(streamgd.__file__).parents[1])}
    command = [sys.executable, "-c", _CHILD, json.dumps([kind, buffer, *data])]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def write(kind: str, path: Path, n_rows: int, n_features: int = N_FEATURES) -> str:
    """Write rows, none like another, with the defaults of the format's writer."""
    piece = 250_000
    numbers = np.random.default_rng(0).normal(size=(n_features + 1, min(piece, n_rows))).astype(np.float32)
    names = [f"x{j}" for j in range(n_features)] + ["y"]
    if kind == "hdf5":
        with h5py.File(path, "w") as file:
            X = file.create_dataset("X", (n_rows, n_features), np.float32)
            y = file.create_dataset("y", (n_rows,), np.float32)
            for k, first in enumerate(range(0, n_rows, piece)):
                n = min(piece, n_rows - first)
                X[first : first + n] = numbers[:-1, :n].T + k
                y[first : first + n] = numbers[-1, :n]
        return str(path)
    group: list[Any] = []
    with pq.ParquetWriter(path, pa.schema([(name, pa.float32()) for name in names])) as writer:
        for k, first in enumerate(range(0, n_rows, piece)):
            group.append(pa.table(list(numbers[:, : n_rows - first] + k), names=names))
            if len(group) == 4 or first + piece >= n_rows:  # a million rows
                writer.write_table(pa.concat_tables(group).combine_chunks())
                group = []
    return str(path)


@pytest.mark.parametrize("kind", ["hdf5", "parquet", "dask"])
def test_peaks_keep_to_the_buffer_whatever_the_size(kind: str, tmp_path: Path) -> None:
    sizes = [50_000, SMALL_ROWS, 3 * SMALL_ROWS]
    data = sizes if kind == "dask" else [write(kind, tmp_path / f"{n}.{kind}", n) for n in sizes]
    small, large = measured(kind, BUFFER, *data)
    assert 4 * (N_FEATURES + 1) * SMALL_ROWS > 1.3 * BUFFER
    assert large["planned"] <= BUFFER
    assert small["peak"] - small["before"] <= BUFFER + SLACK[kind]
    assert large["peak"] - large["before"] <= BUFFER + SLACK[kind]
    assert large["peak"] <= 1.1 * small["peak"]


def test_wide_parquet_in_the_buffer_that_the_error_asks_for(tmp_path: Path) -> None:
    """Three hundred columns in one row group: refused with a number, which is enough."""
    data = [write("parquet", tmp_path / f"{n}.parquet", n, n_features=300) for n in (1000, 40_000)]
    with pytest.raises(BufferTooSmallError) as caught:
        plan_for(open_source(data[-1], "y"), Config(buffer_bytes=1_000_000))
    advice = re.search(r"buffer='(\d+MB)'", str(caught.value))
    assert advice is not None
    buffer = parse_bytes(advice[1])
    (found,) = measured("parquet", buffer, *data)
    assert 40_000 * 300 * 4 < found["planned"] <= buffer
    assert found["peak"] - found["before"] <= buffer + SLACK["parquet"]
