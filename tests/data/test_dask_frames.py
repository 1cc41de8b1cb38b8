"""Dask DataFrames that something was done to: what is read is what Dask itself computes, in its order."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

from streamgd.data.sources import open_source
from streamgd.data.sources.dask import DaskSource
from streamgd.errors import DataError
from tests.data.contract import read_all

N_FILES, FEATURES = 12, [f"x{j}" for j in range(20)]
N_ROWS = 40 * N_FILES + N_FILES * (N_FILES - 1) // 2


def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    found = pd.DataFrame(rng.normal(size=(N_ROWS, len(FEATURES))), columns=FEATURES)
    found["y"] = np.arange(N_ROWS, dtype=float)  # says which row it is
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many files of few rows, of which Dask reads several at once where few columns are wanted."""
    found, first = tmp_path_factory.mktemp("files"), 0
    for number in range(N_FILES):
        table().iloc[first : first + 40 + number].to_parquet(found / f"{number:02}.parquet", index=False)
        first += 40 + number
    return found


FROM: dict[str, Callable[[Path], Any]] = {
    "pandas": lambda _: dd.from_pandas(table(), npartitions=7),
    "parquet": dd.read_parquet,
    "map": lambda _: dd.from_map(lambda k: table().iloc[100 * k : 100 * k + 100], range(6), meta=table().iloc[:0]),
    "delayed": lambda _: dd.from_delayed(dd.from_pandas(table(), npartitions=7).to_delayed(), meta=table().iloc[:0]),
}
THEN: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda frame: frame,
    "assign": lambda frame: frame.assign(x0=-frame.x0, y=frame.y + 1),
    "map_partitions": lambda frame: frame.map_partitions(lambda part: part * 10),
    "filter": lambda frame: frame[frame.x3 > 0],
    "filter after assign": lambda frame: frame.assign(x3=-frame.x3).query("x3 > 0 and x1 < 1"),
    "rename": lambda frame: frame.rename(columns={"x0": "x19", "x19": "x0"}),
    "astype": lambda frame: frame.astype("float32"),
    "sample": lambda frame: frame.sample(frac=0.5, random_state=1),
    "repartition": lambda frame: frame.repartition(npartitions=3),
    "repartition by size": lambda frame: frame.repartition(partition_size="20kB"),
    "concat": lambda frame: dd.concat([frame, frame.assign(y=frame.y + N_ROWS)]),
    "sort_values": lambda frame: frame.sort_values("x2"),
    "drop_duplicates": lambda frame: frame.drop_duplicates(subset=["y"]),
    "persist": lambda frame: frame[frame.x3 > 0].persist(),
    "some partitions": lambda frame: frame.partitions[1:4],
}


@pytest.mark.filterwarnings("ignore:The inplace keyword", "ignore:Passing more than 2 positional")  # within Dask
@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("origin", FROM)
def test_what_is_read_is_what_dask_computes(folder: Path, origin: str, then: str) -> None:
    frame = THEN[then](FROM[origin](folder))
    expected = frame.compute().sort_values("y")
    apart = DaskSource.from_dataframe(frame[FEATURES], frame["y"])
    for source in (DaskSource.from_dataframe(frame, "y", FEATURES), apart):
        X, y, _ = read_all(source)
        order = np.argsort(y)
        np.testing.assert_array_equal(y[order], expected["y"])
        np.testing.assert_array_equal(X[order], expected[FEATURES])
        targets = np.concatenate([part for _, part, _ in source.iter_targets()])
        np.testing.assert_array_equal(targets, y)


@pytest.mark.filterwarnings("ignore:The inplace keyword")
@pytest.mark.parametrize("columns", [["x0"], FEATURES])
def test_blocks_are_the_partitions_whatever_is_picked(folder: Path, columns: list[str]) -> None:
    """Dask reads several files at once where few columns are wanted."""
    source = DaskSource.from_dataframe(dd.read_parquet(folder), "y", columns)
    assert source.block_rows.tolist() == [40 + number for number in range(N_FILES)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda frame: open_source(frame["x0"]), "Series has no rows and columns"),
        (lambda frame: open_source(dask.delayed(frame)), r"Delayed\w* has no rows and columns"),
        (lambda frame: open_source(frame, 5), "y is the single value 5; expected one for each row, or the name"),
        (lambda frame: open_source(frame, "y", weight=2.0), "weight is the single value 2.0; expected one for each"),
    ],
)
def test_what_cannot_be_used_is_told(given: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        given(FROM["pandas"](Path()))


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "boolean", "double[pyarrow]"])
def test_targets_apart_are_converted_as_columns_are(dtype: str) -> None:
    frame = pd.DataFrame({"x0": np.arange(30.0), "y": pd.array(np.arange(30) % 2, dtype=dtype)})
    frame = dd.from_pandas(frame, npartitions=3)
    for target in (frame["y"], frame[["y"]], "y"):
        source = DaskSource.from_dataframe(frame if isinstance(target, str) else frame[["x0"]], target)
        assert source.target.numeric
        np.testing.assert_array_equal(np.ravel(read_all(source)[1]).astype(float), np.arange(30) % 2)


def test_shuffles_that_cannot_be_taken_apart_are_refused() -> None:
    frame = FROM["pandas"](Path()).shuffle("x1", shuffle_method="p2p")
    with pytest.raises(DataError, match=r"shuffled by 'p2p'.*persist\(\) it first"):
        DaskSource.from_dataframe(frame, "y")


def test_threads_leave_the_configuration_of_dask_as_it_was() -> None:
    frame = FROM["pandas"](Path())
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda _: DaskSource.from_dataframe(frame, "y").n_rows, range(40)))) == 40
    assert dask.config.get("dataframe.shuffle.method", None) is None


@pytest.mark.parametrize("how", ["shuffle", "merge"])
def test_rows_of_a_shuffle_and_their_targets_apart(how: str) -> None:
    """By way of the disk, Dask would order the rows of each by chance."""
    frame = FROM["pandas"](Path())
    frame = frame.shuffle("x1") if how == "shuffle" else frame.merge(frame[["y"]].assign(z=1.0), on="y")
    source = DaskSource.from_dataframe(frame[["x0", "x1"]], frame["y"])
    X, y, _ = read_all(source)
    assert sorted(y) == table()["y"].tolist()
    np.testing.assert_array_equal(X, table().iloc[y.astype(int)][["x0", "x1"]])
