"""Parquet: the contract of all sources, and what only Parquet files can do to one."""

from __future__ import annotations

import datetime
import decimal
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streamgd.data.sources.base import Source
from streamgd.data.sources.parquet import ParquetSource
from streamgd.errors import (
    CorruptDataError,
    DataError,
    EmptySourceError,
    NonFiniteError,
    OptionError,
    SchemaError,
    SourceNotFoundError,
)
from tests.data.contract import SourceContract, dense, make_rows, make_target, plain, read_all, read_block


def target_columns(y: np.ndarray | None) -> dict[str, Any]:
    if y is None:
        return {}
    return {"y": y} if y.ndim == 1 else {f"y{j}": y[:, j] for j in range(y.shape[1])}


class TestParquetContract(SourceContract):
    kind = "parquet"

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
        names = names or tuple(f"x{j}" for j in range(X.shape[1]))
        columns = {name: X[:, j] for j, name in enumerate(names)} | target_columns(y)
        if weight is not None:
            columns["weight"] = weight
        path = folder / "rows.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=-(-len(X) // n_blocks))
        target = None if y is None else "y" if y.ndim == 1 else list(target_columns(y))
        return ParquetSource(path, target, weight=None if weight is None else "weight", dtype=dtype)

    def reopen(self, folder: Path) -> Source:
        return ParquetSource(folder / "rows.parquet", "y")


class TestParquetFolderContract(TestParquetContract):
    """The same with a file for each block, in hive partitions."""

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
        names = names or tuple(f"x{j}" for j in range(X.shape[1]))
        columns = {name: X[:, j] for j, name in enumerate(names)} | target_columns(y)
        if weight is not None:
            columns["weight"] = weight
        table, step = pa.table(columns), -(-len(X) // n_blocks)
        for part in range(n_blocks):
            (below := folder / "set" / f"part={part}").mkdir(parents=True)
            pq.write_table(table.slice(part * step, step), below / "rows.parquet")
        self.features = list(names)
        target = None if y is None else "y" if y.ndim == 1 else list(target_columns(y))
        return ParquetSource(
            folder / "set", target, list(names), weight=None if weight is None else "weight", dtype=dtype
        )

    def reopen(self, folder: Path) -> Source:
        return ParquetSource(folder / "set", "y", self.features)
