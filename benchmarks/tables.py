"""The table that is read side by side, in every format that the contenders read: 28 float32 features, a regression.

Features are independent with unit variance, so that contenders without scaling of their own need none. Files are made
once, piece by piece, and kept: a file is there whole or not at all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

N_FEATURES, PIECE = 28, 131_072
#: Rows of a row group where the writer of a Parquet file is not told otherwise.
DEFAULT_GROUP = 1_048_576
CHUNK_ROWS = 8192


def pieces(n_rows: int, n_features: int = N_FEATURES) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield the table piece by piece: its first row, features, targets. Every call yields the same."""
    w = np.random.default_rng(0).standard_normal(n_features)
    piece = PIECE * N_FEATURES // max(N_FEATURES, n_features)
    for k, first in enumerate(range(0, n_rows, piece)):
        n, rng = min(piece, n_rows - first), np.random.default_rng((1, k))
        X = rng.standard_normal((n, n_features), dtype=np.float32)
        yield first, X, (X @ w + rng.standard_normal(n)).astype(np.float32)


def hdf5_row_bytes(n_features: int) -> int:
    """Return what a row takes in an uncompressed file, its target included."""
    return 4 * (n_features + 1)


def sample() -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the same kind that are in no file, to judge what was learnt."""
    rng = np.random.default_rng(2)
    X = rng.standard_normal((PIECE, N_FEATURES), dtype=np.float32)
    w = np.random.default_rng(0).standard_normal(N_FEATURES)
    return X, X @ w + rng.standard_normal(PIECE)


def kept(path: Path, write: Callable[[Path], None]) -> Path:
    """Write the file unless it is there; an interrupted write leaves nothing that would be taken for it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {path.name}", file=sys.stderr, flush=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.unlink(missing_ok=True)
        write(partial)
        partial.rename(path)
    return path


def write_hdf5(path: Path, n_rows: int, n_features: int = N_FEATURES, **settings: object) -> None:
    """Write datasets `X` and `y`; settings are those of h5py's `create_dataset` for `X`."""
    with h5py.File(path, "w") as file:
        X_out = file.create_dataset("X", (n_rows, n_features), np.float32, **settings)
        filters = {name: settings[name] for name in ("compression", "shuffle") if name in settings}
        y_out = file.create_dataset("y", (n_rows,), np.float32, **filters)
        for first, X, y in pieces(n_rows, n_features):
            X_out[first : first + len(y)], y_out[first : first + len(y)] = X, y


def write_parquet(
    path: Path, n_rows: int, n_features: int = N_FEATURES, *, group: int = DEFAULT_GROUP, **settings: object
) -> None:
    """Write columns `x0`, … and `y` in groups of so many rows; settings are those of pyarrow's `ParquetWriter`."""
    names = [f"x{j}" for j in range(n_features)] + ["y"]
    schema = pa.schema([(name, pa.float32()) for name in names])
    with pq.ParquetWriter(path, schema, **settings) as writer:
        waiting: list[pa.Table] = []
        for first, X, y in pieces(n_rows, n_features):
            waiting.append(pa.table([*X.T.copy(), y], schema=schema))
            n_waiting, last = sum(map(len, waiting)), first + len(y) == n_rows
            if n_waiting < group and not last:
                continue
            table = pa.concat_tables(waiting).combine_chunks()
            n_whole = n_waiting if last else n_waiting - n_waiting % group
            for start in range(0, n_whole, group):
                writer.write_table(table.slice(start, min(group, n_whole - start)))
            waiting = [table.slice(n_whole)] if n_whole < n_waiting else []


def write_vowpal_cache(path: Path, n_rows: int) -> None:
    """Have Vowpal Wabbit read the table as text, once, and keep its cache file. The text goes through a pipe."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "vowpalwabbit", "--quiet", "-d", f"/dev/fd/{reading}", "--cache_file", str(path)]
    with subprocess.Popen(command, pass_fds=[reading], stderr=subprocess.PIPE, text=True) as process:
        os.close(reading)
        line = "%.7g |f " + " ".join(f"{j}:%.7g" for j in range(N_FEATURES)) + "\n"
        try:
            with os.fdopen(writing, "w") as text:
                for _, X, y in pieces(n_rows):
                    text.writelines(line % tuple(row) for row in np.column_stack([y, X]).tolist())
        except BrokenPipeError:
            pass  # it has ended; why is in what it printed
        error = process.communicate()[1]
    if process.returncode != 0 or not path.exists():
        raise RuntimeError(f"Vowpal Wabbit made no cache file, exit status {process.returncode}: {error.strip()}")


class Tables:
    """The files of one table of `n_rows` rows in a folder, each made when it is first asked for."""

    def __init__(self, folder: Path, n_rows: int) -> None:
        self.folder, self.n_rows = folder, n_rows

    def _path(self, kind: str) -> Path:
        return self.folder / f"{kind.replace('.', f'-{self.n_rows}.', 1)}"

    @property
    def hdf5(self) -> Path:
        """Contiguous, uncompressed."""
        return kept(self._path("contiguous.h5"), lambda path: write_hdf5(path, self.n_rows))

    @property
    def hdf5_gzip(self) -> Path:
        """gzip (level 4, h5py's default) and shuffle, in chunks of whole rows."""
        chunks = (min(CHUNK_ROWS, self.n_rows), N_FEATURES)
        settings = {"chunks": chunks, "compression": "gzip", "shuffle": True}
        return kept(self._path("gzip.h5"), lambda path: write_hdf5(path, self.n_rows, **settings))

    @property
    def hdf5_auto(self) -> Path:
        """gzip and shuffle, in the chunks that h5py chooses: tall ones of a single feature."""
        settings = {"chunks": True, "compression": "gzip", "shuffle": True}
        return kept(self._path("gzip-auto.h5"), lambda path: write_hdf5(path, self.n_rows, **settings))

    @property
    def parquet(self) -> Path:
        """snappy, no dictionary, groups of 131,072 rows."""
        settings = {"group": PIECE, "use_dictionary": False}
        return kept(self._path("groups.parquet"), lambda path: write_parquet(path, self.n_rows, **settings))

    @property
    def parquet_default(self) -> Path:
        """What `pyarrow.parquet.write_table` writes unless told otherwise: snappy, dictionary, million-row groups."""
        return kept(self._path("default.parquet"), lambda path: write_parquet(path, self.n_rows))

    @property
    def vowpal_cache(self) -> Path:
        """Vowpal Wabbit's own binary form of the table."""
        return kept(self._path("vowpal.cache"), lambda path: write_vowpal_cache(path, self.n_rows))
