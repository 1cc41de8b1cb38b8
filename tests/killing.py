"""Runs that are really killed: a warm process forks children that train, and SIGKILL ends them.

A Python that has to start and load compiled code spends most of its life doing so; a fork of one that has done it takes
milliseconds. Kills are therefore cheap, and nearly all of them hit a run at work. `Killer` is the side of whoever wants
something killed; run as a script, this module is the process that forks. What kills at a certain step is put in place
in the child, so that the package needs to know nothing of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

SOURCES = ("hdf5", "parquet", "dask", "memory")
#: Options of the optimizers, each with something that its state must carry across a kill.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "auto": {},
    "sgd": {"optimizer": "sgd", "learning_rate": "invscaling", "momentum": 0.9, "nesterov": True, "average": 50},
    "adagrad": {"optimizer": "adagrad", "penalty": "l1", "alpha": 1e-3},
    "adam": {"optimizer": "adam", "learning_rate": "cosine", "eta0": 0.01},
    "dowg": {"optimizer": "dowg", "penalty": "l2", "alpha": 1e-3},
}
#: Buffers in which a few thousand rows of five features make a dozen windows; an open Parquet file costs more.
BUFFERS = {"hdf5": 60_000, "parquet": 460_000, "dask": 60_000, "memory": 60_000}


@dataclass(frozen=True)
class Job:
    """A run to begin or to go on with: the data that `make_data` wrote, what to do with it, and where.

    Attributes
    ----------
    source : str
        One of `SOURCES`.
    data, run : str
        Folders. HDF5 and Parquet are trained as the command line does it, Dask and memory by an estimator's `fit`.
    options : dict
        Options of the estimators.
    checkpoint_every_s : float
        As in `RunOptions`.
    cache : str or None
        As in `RunOptions`.
    """

    source: str
    data: str
    run: str
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint_every_s: float = 0.0
    cache: str | None = None


# --- data ------------------------------------------------------------------------------------------------------------
def make_data(folder: Path, source: str, n_rows: int, n_features: int = 5, seed: int = 0) -> None:
    """Write what a source is trained on; each source has a task of its own.

    HDF5: two weighted targets. Parquet: three classes named by text, in row groups bigger than a small window. Dask:
    one target, float64. Memory: two classes.
    """
    rng = np.random.default_rng([seed, SOURCES.index(source)])
    X = rng.normal(size=(n_rows, n_features)).astype(np.float32)
    scores = X @ rng.normal(size=(n_features, 3)) + rng.normal(size=(n_rows, 3))
    if source == "hdf5":
        import h5py

        with h5py.File(folder / "rows.h5", "w") as file:
            file.create_dataset("X", data=X, chunks=(max(16, n_rows // 40), n_features), compression="gzip")
            file.create_dataset("y", data=scores[:, :2])
            file.create_dataset("w", data=rng.uniform(0.5, 2.0, n_rows))
    elif source == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = np.array(["ash", "beech", "cedar"])[scores.argmax(axis=1)]
        columns = {f"x{j}": X[:, j] for j in range(n_features)} | {"y": names}
        pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=max(1, min(n_rows // 5, 10_000)))
    else:
        y = scores[:, 0] if source == "dask" else (scores[:, 0] > 0).astype(np.int64)
        np.savez(folder / "rows.npz", X=X.astype(np.float64) if source == "dask" else X, y=y)


def open_rows(job: Job) -> Any:
    """Open the data of a job that is trained from files."""
    from streamgd.data.sources import open_source

    if job.source == "hdf5":
        return open_source(str(Path(job.data) / "rows.h5"), "y", weight="w")
    return open_source(str(Path(job.data) / "rows.parquet"), "y")


# --- what a child does -----------------------------------------------------------------------------------------------
def go(job: Job) -> None:
    """Begin the run, or go on with it, until it is finished."""
    if job.source in ("hdf5", "parquet"):
        _go_in_folder(job)
    else:
        _fit(job)


def _go_in_folder(job: Job) -> None:
    from streamgd.learn.recipe import Recipe
    from streamgd.run.config import Config, RunOptions
    from streamgd.run.folder import RunFolder
    from streamgd.run.loop import train
    from streamgd.run.session import begin, go_on

    own = {"max_iter", "tol", "seed", "buffer_bytes", "shuffle", "standardize"}
    task: dict[str, Any] = {} if job.source == "hdf5" else {"task": "classification", "loss": "log_loss"}
    recipe = Recipe(**task, **{name: value for name, value in job.options.items() if name not in own})
    config = Config(recipe=recipe, **{name: value for name, value in job.options.items() if name in own})
    with RunFolder(job.run) as folder:
        source = open_rows(job)
        run = go_on(folder, source, config, report=_fail) if folder.holds_run else begin(folder, source, config)
        train(run, options=RunOptions(checkpoint_every_s=job.checkpoint_every_s, cache=job.cache), folder=folder)


def _fit(job: Job) -> None:
    import warnings

    from streamgd.estimators import SGDClassifier, SGDRegressor

    warnings.simplefilter("error")
    with np.load(Path(job.data) / "rows.npz") as file:
        X, y = file["X"], file["y"]
    options = dict(job.options)
    options |= {"random_state": options.pop("seed"), "buffer": options.pop("buffer_bytes")}
    if job.source == "dask":
        import dask.array as da

        n = max(16, len(X) // 30)
        X, y = da.from_array(X, chunks=(n, -1)), da.from_array(y, chunks=n)
    kind = SGDRegressor if job.source == "dask" else SGDClassifier
    estimator = kind(checkpoint_dir=job.run, checkpoint_every_s=job.checkpoint_every_s, cache=job.cache, **options)
    estimator.fit(X, y, resume=True)


def _fail(text: str) -> None:
    raise AssertionError(f"a kill damaged a checkpoint: {text}")


# --- where a child kills itself --------------------------------------------------------------------------------------
def die() -> None:
    """End this process as nothing can catch."""
    os.kill(os.getpid(), signal.SIGKILL)


def _dying_before(function: Callable[..., Any], n: int | Iterator[int]) -> Callable[..., Any]:
    """Make a function that dies instead of its n-th call, counted from 0; several may count together."""
    left = iter(range(n)) if isinstance(n, int) else n

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            die()
        return function(*args, **kwargs)

    return replaced


def _dying_after(function: Callable[..., Any], n: int) -> Callable[..., Any]:
    """Make a function that dies after its n-th call, counted from 0."""
    left = iter(range(n))

    def replaced(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if next(left, None) is None:
            die()
        return found

    return replaced


def set_trap(step: str, n: int) -> None:
    """Have this process die at the n-th time, counted from 0, that it comes to a step.

    - ``"survey"``: before the data is looked at.
    - ``"kernel"``: after a kernel call.
    - ``"window"``, ``"window-end"``: before, or after, the cursor moves to the next window.
    - ``"epoch"``: before an epoch is closed.
    - ``"epoch-end"``: after an epoch's end, its checkpoint written.
    - ``"save"``: before a file is flushed, renamed or deleted, whichever it is.
    - ``"half"``: with half of a checkpoint written.
    - ``"line"``: with half of a metrics record written.
    """
    from streamgd.learn import kernels
    from streamgd.learn.state import State
    from streamgd.run import checkpoint, loop, runs
    from streamgd.run.folder import RunFolder

    if step == "survey":
        runs.take_survey = _dying_before(runs.take_survey, n)
    elif step == "kernel":
        kernels.consume = _dying_after(kernels.consume, n)
    elif step == "window":
        State.next_window = _dying_before(State.next_window, n)  # type: ignore[method-assign]
    elif step == "window-end":
        State.next_window = _dying_after(State.next_window, n)  # type: ignore[method-assign]
    elif step == "epoch":
        loop._Training._end_epoch = _dying_before(loop._Training._end_epoch, n)  # type: ignore[method-assign]
    elif step == "epoch-end":
        loop._Training._end_epoch = _dying_after(loop._Training._end_epoch, n)  # type: ignore[method-assign]
    elif step == "save":
        left = iter(range(n))
        os.fsync = _dying_before(os.fsync, left)
        Path.replace = _dying_before(Path.replace, left)  # type: ignore[method-assign]
        Path.unlink = _dying_before(Path.unlink, left)  # type: ignore[method-assign]
    elif step == "half":

        def half(path: Path, content: bytes) -> None:
            path.with_name(path.name + ".tmp").write_bytes(content[: len(content) // 2])
            die()

        whole = checkpoint.write_atomic
        left = iter(range(n))
        checkpoint.write_atomic = lambda path, content: (half if next(left, None) is None else whole)(path, content)
    elif step == "line":
        append = RunFolder.append_metrics

        def torn(self: RunFolder, record: dict[str, Any]) -> None:
            if next(left, None) is None:
                with (self.path / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record)[: 7 + n])
                die()
            append(self, record)

        left = iter(range(n))
        RunFolder.append_metrics = torn  # type: ignore[method-assign]
    else:
        raise ValueError(step)


def _serve(answers: IO[str]) -> None:
    """Fork a child for each request; tell how it ended."""
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(request)
        if request["delay_s"] is not None:
            time.sleep(max(0.0, request["delay_s"] - (time.monotonic() - began)))
            os.kill(pid, signal.SIGKILL)  # of a child that has ended, only the entry in the table of processes is left
        _, status = os.waitpid(pid, 0)
        answer = {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}
        print(json.dumps(answer), file=answers, flush=True)


def _child(request: dict[str, Any]) -> None:
    status = 1
    try:
        if request["trap"] is not None:
            set_trap(*request["trap"])
        go(Job(**request["job"]))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


# --- whoever wants something killed ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ended:
    """How a child ended: its status, -9 if it was killed, and how long it lived."""

    status: int
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Killer:
    """The process that forks, as a context manager."""

    def __enter__(self) -> Self:
        import streamgd

        root = str(Path(streamgd.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # One thread: what forks must not hold locks that nobody is left to release.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def run(self, job: Job, *, trap: tuple[str, int] | None = None, delay_s: float | None = None) -> Ended:
        """Have a child do a job: to its end, to a step, or for so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"job": asdict(job), "trap": trap, "delay_s": delay_s}) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


# --- what is left of a run -------------------------------------------------------------------------------------------
def run_folder(job: Job) -> Path:
    """Return the run's folder: the job's, or the only one that `fit` made in it."""
    path = Path(job.run)
    if job.source in ("hdf5", "parquet"):
        return path
    (found,) = path.iterdir()
    return found


def outcome(job: Job) -> dict[str, Any]:
    """Return all that a run has learnt and said, to the bit; what tells of clocks and versions is left out."""
    from streamgd.run.folder import RunFolder

    path = run_folder(job)
    checkpoint = RunFolder(path).newest(_fail)
    assert checkpoint is not None
    found: dict[str, Any] = {
        name: (array.dtype.str, array.shape, array.tobytes()) for name, array in checkpoint.tensors.items()
    }
    found |= {name: value for name, value in checkpoint.meta.items() if name != "versions"}
    records = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    found["metrics"] = [{key: value for key, value in record.items() if key != "wall_s"} for record in records]
    return found


def counted_rows(job: Job) -> int:
    """Return the number of rows that a run says it has consumed."""
    from streamgd.learn import kernels
    from streamgd.run.folder import RunFolder

    checkpoint = RunFolder(run_folder(job)).newest(_fail)
    assert checkpoint is not None
    return int(checkpoint.tensors["counters"][kernels.N_ROWS])


def leftovers(job: Job) -> Iterator[Path]:
    """Yield the temporary files in a run's folder."""
    return run_folder(job).rglob("*.tmp")


def _warm_up() -> None:
    """Load every module and all compiled code that children need: by runs of each source, in this process."""
    import tempfile

    import h5py  # noqa: F401 - for the fork
    import pyarrow.parquet  # noqa: F401

    with tempfile.TemporaryDirectory() as temporary:
        for source in SOURCES:
            folder = Path(temporary) / source
            folder.mkdir()
            make_data(folder, source, 1500)
            options = {"max_iter": 2, "tol": None, "seed": 0, "buffer_bytes": BUFFERS[source], "batch_size": 32}
            go(Job(source, str(folder), str(folder / "run"), options))


if __name__ == "__main__":
    # Answers alone go to the standard output; whatever children print is for people.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        _warm_up()
        _serve(answers)
