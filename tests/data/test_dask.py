"""Dask: the contract of all sources, and what only lazy, clustered, partitioned data can do to one."""

from __future__ import annotations

import gc
import logging
import pickle
from pathlib import Path
from typing import Any

import dask.array as da
import dask.dataframe as dd
import h5py
import numpy as np
import pandas as pd
import pytest

from streamgd.data.sources.base import Source
from streamgd.data.sources.dask import DaskSource
from streamgd.errors import DataError, EmptySourceError, SchemaError, SourceNotFoundError
from tests.data.contract import SourceContract, dense, make_rows, make_target, plain, read_all, read_block


def blocks_of(array: np.ndarray, n_blocks: int) -> da.Array:
    return da.from_array(array, chunks=(-(-len(array) // n_blocks), *array.shape[1:]))


class TestDaskContract(SourceContract):
    kind = "dask"
    in_files = False
    named_features = False

    def make(
        self,
        folder: Path,
        X: np.ndarray,
        y: np.ndarray | None,
        weight: np.ndarray | None = None,
        *,
        n_blocks: int = 4,
        dtype: str = "auto",
        names: tuple[str, ...] | None = None,
    ) -> Source:
        lazy_X = da.from_array(X, chunks=(-(-len(X) // n_blocks), 2))  # cut between columns too
        lazy_y = None if y is None else blocks_of(y, n_blocks + 1)  # and the target elsewhere
        lazy_weight = None if weight is None else blocks_of(weight, n_blocks)
        return DaskSource(lazy_X, lazy_y, weight=lazy_weight, dtype=dtype)


class TestDaskDataFrameContract(SourceContract):
    kind = "dask"
    in_files = False

    def make(
        self,
        folder: Path,
        X: np.ndarray,
        y: np.ndarray | None,
        weight: np.ndarray | None = None,
        *,
        n_blocks: int = 4,
        dtype: str = "auto",
        names: tuple[str, ...] | None = None,
    ) -> Source:
        frame = pd.DataFrame(X, columns=list(names or (f"x{j}" for j in range(X.shape[1]))))
        target: Any = None
        if y is not None and y.ndim == 1:
            target, frame["y"] = "y", y
        elif y is not None:
            target = [f"y{j}" for j in range(y.shape[1])]
            for j, name in enumerate(target):
                frame[name] = y[:, j]
        if weight is not None:
            frame["weight"] = weight
        lazy = dd.from_pandas(frame, npartitions=n_blocks)
        return DaskSource.from_dataframe(lazy, target, weight=None if weight is None else "weight", dtype=dtype)
