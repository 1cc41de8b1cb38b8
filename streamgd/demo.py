"""``streamgd demo``: data larger than its buffer, a run that is really killed, and the proof that it lost nothing.

For HDF5 and for Parquet: one run goes through undisturbed; another is killed half-way by SIGKILL and resumed. Every
array of their last checkpoints must agree in every bit, and the coefficients must be close to those that the data was
made with.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.layout import format_bytes
from streamgd.data.sources import open_source
from streamgd.errors import RunError
from streamgd.learn.recipe import Recipe
from streamgd.run.checkpoint import Checkpoint
from streamgd.run.config import Config
from streamgd.run.folder import RunFolder
from streamgd.run.loop import train
from streamgd.run.session import begin, load_saved

Floats = NDArray[np.float64]
Say = Callable[[str], None]

N_FEATURES = 20
#: Rows trained in all, about: a second's work or more, so that there is a half-way to be killed at.
_TOTAL_ROWS = 3_000_000
#: The data is so many times larger than the buffer.
_TIMES = 5
_SEED = 20
#: Largest difference to the true coefficients, in units of the features' spread; the noise has a spread of 1.
_CLOSE = 0.05
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Truth:
    """What the data is made of: y = intercept + Σ coef (x − offset) / scale + noise."""

    coef: Floats
    offset: Floats
    scale: Floats

    @classmethod
    def draw(cls) -> Truth:
        """Draw coefficients, and features of very different units."""
        rng = np.random.default_rng(_SEED)
        return cls(
            rng.normal(size=N_FEATURES), rng.normal(size=N_FEATURES) * 10, 10.0 ** rng.uniform(-2, 3, N_FEATURES)
        )


def make_data(folder: Path, n_rows: int, truth: Truth) -> dict[str, Path]:
    """Write the same rows as an HDF5 and as a Parquet file, a piece at a time; the first feature drifts, as in logs.

    Returns
    -------
    dict of str to Path
        The file of each format.
    """
    import h5py
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = {"HDF5": folder / "data.h5", "Parquet": folder / "data.parquet"}
    rng = np.random.default_rng(_SEED + 1)
    names = [f"x{j}" for j in range(N_FEATURES)]
    schema = pa.schema([(name, pa.float32()) for name in [*names, "y"]])
    piece = 4096  # rows of a row group: small ones mix well, and many can be open at once
    with (
        h5py.File(paths["HDF5"], "w") as h5,
        pq.ParquetWriter(paths["Parquet"], schema, use_dictionary=False) as parquet,
    ):
        X = h5.create_dataset("X", (n_rows, N_FEATURES), "float32")
        y = h5.create_dataset("y", (n_rows,), "float32")
        for first in range(0, n_rows, piece):
            n = min(piece, n_rows - first)
            z = rng.normal(size=(n, N_FEATURES))
            z[:, 0] += 2.0 * (first + np.arange(n)) / n_rows - 1.0
            rows = (truth.offset + truth.scale * z).astype(np.float32)
            target = (3.0 + z @ truth.coef + rng.normal(size=n)).astype(np.float32)
            X[first : first + n], y[first : first + n] = rows, target
            columns = [pa.array(column) for column in (*np.ascontiguousarray(rows.T), target)]
            parquet.write_batch(pa.record_batch(columns, schema=schema))
    return paths


def run_demo(folder: Path, n_rows: int, say: Say) -> bool:
    """Run the demonstration.

    Parameters
    ----------
    folder : Path
        Where everything goes.
    n_rows : int
        Rows to make.
    say : callable
        Takes each line for the user.

    Returns
    -------
    bool
        Whether everything was as promised.
    """
    truth = Truth.draw()
    paths = make_data(folder, n_rows, truth)
    n_bytes = n_rows * (N_FEATURES + 1) * 4
    config = Config(
        recipe=Recipe(),
        max_iter=max(4, round(_TOTAL_ROWS / n_rows)),
        tol=None,
        seed=_SEED,
        buffer_bytes=n_bytes // _TIMES,
    )
    say(
        f"{n_rows:,} rows of {N_FEATURES} features: {format_bytes(n_bytes)}, to be trained on in a buffer of "
        f"{format_bytes(config.buffer_bytes)}, {config.max_iter} epochs"
    )
    good = True
    for name, path in paths.items():
        good &= _show_format(name, path, folder, n_rows, config, truth, say)
    return good


def _show_format(name: str, path: Path, folder: Path, n_rows: int, config: Config, truth: Truth, say: Say) -> bool:
    say(f"\n{name}, {format_bytes(path.stat().st_size)}")
    whole, killed = folder / f"{name.lower()}-whole", folder / f"{name.lower()}-killed"
    total = n_rows * config.n_epochs(n_rows)
    began = time.perf_counter()
    _train_whole(path, whole, config)
    say(f"  trained undisturbed: {total:,} rows in {time.perf_counter() - began:.1f} s")
    saved = _train_and_kill(path, killed, config, total)
    say(f"  trained again in another process, and killed (SIGKILL) with {saved:,} of {total:,} rows saved")
    said = subprocess.run(_argv("resume", str(killed), "--quiet"), capture_output=True, text=True, check=False)
    if said.returncode != 0:
        raise RunError(f"`streamgd resume` ended with status {said.returncode}: {said.stderr.strip()}")
    say("  resumed in a third process, to its end")
    one, other = RunFolder(whole), RunFolder(killed)
    equal = _compare(one.newest(say), other.newest(say), say)
    return _compare_metrics(one, other, say) and equal and _is_close(one, truth, say)


def _train_whole(path: Path, run_path: Path, config: Config) -> None:
    source = open_source(str(path), "y")
    with RunFolder(run_path) as folder:
        train(begin(folder, source, config), folder=folder)
    source.close()


def _train_and_kill(path: Path, run_path: Path, config: Config, total: int) -> int:
    """Train in a process of its own and kill it half-way; return the rows of its last checkpoint."""
    command = ["train", str(path), "--target", "y", "--run", str(run_path), "--tol", "none", "--quiet"]
    command += ["--epochs", str(config.max_iter), "--seed", str(config.seed), "--buffer", str(config.buffer_bytes)]
    command += ["--checkpoint-every", "0.02"]
    folder = RunFolder(run_path)
    for share in (0.5, 0.2, 0.0):  # earlier, if this machine is so fast that the run ends before it is hit
        status, said = _start_and_kill(command, folder, share * total)
        saved = _saved_rows(folder)
        if status == -signal.SIGKILL and saved < total:
            return saved
        if status not in (0, -signal.SIGKILL):
            break
        shutil.rmtree(run_path)
    raise RunError(f"the run that was to be killed ended by itself, with status {status}: {said}")


def _start_and_kill(command: list[str], folder: RunFolder, n_rows: float) -> tuple[int, str]:
    """Run a command, kill it once it has saved more than `n_rows` rows, and return its status and what it said."""
    with subprocess.Popen(_argv(*command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        try:
            gives_up = time.monotonic() + _PATIENCE_S
            while child.poll() is None and _saved_rows(folder) <= n_rows and time.monotonic() < gives_up:
                time.sleep(0.002)
            time.sleep(0.005)  # on, into the next window
        finally:
            child.kill()
        _, said = child.communicate()
    return child.returncode, said.strip()


def _argv(*command: str) -> list[str]:
    return [sys.executable, "-m", "streamgd", *command]


def _saved_rows(folder: RunFolder) -> int:
    files = folder.checkpoints.files()
    return int(files[0].stem.partition("-")[2]) if files else 0


def _compare(one: Checkpoint | None, other: Checkpoint | None, say: Say) -> bool:
    """Compare two checkpoints by the bytes of every array, and by their words."""
    if one is None or other is None:
        say("  DIFFERENT: a run has no checkpoint")
        return False
    names = sorted(one.tensors.keys() | other.tensors.keys())
    bad = [name for name in names if _bytes_of(one, name) != _bytes_of(other, name)]
    bad += [name for name in ("cursor", "layout", "finished") if one.meta[name] != other.meta[name]]
    if bad:
        say(f"  DIFFERENT: {', '.join(bad)}")
        return False
    n_bytes = sum(array.nbytes for array in one.tensors.values())
    say(
        f"  equal bit for bit: coefficients, averages, optimizer, losses and all else "
        f"({len(names)} arrays, {n_bytes:,} bytes)"
    )
    return True


def _bytes_of(checkpoint: Checkpoint, name: str) -> tuple[str, tuple[int, ...], bytes] | None:
    array = checkpoint.tensors.get(name)
    return None if array is None else (array.dtype.str, array.shape, array.tobytes())


def _compare_metrics(one: RunFolder, other: RunFolder, say: Say) -> bool:
    """Compare the records of two runs, clock times left out."""
    equal = _records(one) == _records(other)
    say("  equal metrics.jsonl, clock times left out" if equal else "  DIFFERENT: metrics.jsonl")
    return equal


def _records(folder: RunFolder) -> list[dict[str, Any]]:
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("wall_")} for line in lines]


def _is_close(folder: RunFolder, truth: Truth, say: Say) -> bool:
    coef = load_saved(folder, say).trained.model().coef[0]
    off = float(np.abs(coef * truth.scale - truth.coef).max())
    size = float(np.abs(truth.coef).max())
    close = off <= _CLOSE
    say(
        f"  {'close to' if close else 'FAR FROM'} the true coefficients: at most {off:.4f} off, the largest being "
        f"{size:.2f}"
    )
    return close
