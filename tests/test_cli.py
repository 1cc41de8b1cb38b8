"""The command line, as its users meet it: what they type, what they see, what is left on disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import streamgd
from streamgd.cli import main
from streamgd.commands import parameters as kinds
from streamgd.data.layout import format_bytes
from streamgd.learn.losses import LOSSES
from streamgd.learn.optimizers import OPTIMIZERS
from streamgd.learn.penalties import PENALTIES
from streamgd.learn.schedules import SCHEDULES
from streamgd.learn.state import State
from streamgd.run import checkpoint, loop, runs
from streamgd.run.folder import RunFolder
from streamgd.run.worker_memory import PROCESS_BYTES

N_ROWS = 3000
COEF = np.array([1.0, -2.0, 0.5])
#: A dozen windows an epoch.
SMALL = ("--buffer", "30000", "--batch-size", "64")


def make_rows(n_rows: int = N_ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_rows, 3)).astype(np.float32)
    return X, (X @ COEF + 3 + 0.1 * rng.normal(size=n_rows)).astype(np.float32)


def write_parquet(path: Path, X: np.ndarray, y: Any, **more: Any) -> Path:
    pq.write_table(pa.table({**{f"x{j}": column for j, column in enumerate(X.T)}, "y": y, **more}), path)
    return path


def write_hdf5(path: Path, X: np.ndarray, y: Any, **more: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("X", data=X, chunks=(50, X.shape[1]))
        for name, values in {"y": y, **more}.items():
            file[name] = values
    return path


def write_big_group(path: Path) -> Path:
    """All rows in one row group, which takes more memory to keep open than the rows that a window then holds."""
    X = np.random.default_rng(0).normal(size=(530_000, 1)).astype(np.float32)
    return write_parquet(path, X, X[:, 0])


@pytest.fixture
def h5(tmp_path: Path) -> Path:
    return write_hdf5(tmp_path / "data.h5", *make_rows())


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "data.parquet", *make_rows())


class Said:
    """What a command left: its status, and what it wrote."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def sg(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def call(*args: object) -> Said:
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        said = Said(status, *capsys.readouterr())
        assert "Traceback" not in said.err
        return said

    return call


def newest(run: Path) -> checkpoint.Checkpoint:
    found = RunFolder(run).newest(pytest.fail)
    assert found is not None
    return found


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "wall_s"} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = newest(one), newest(other)
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert a.tensors[name].tobytes() == b.tensors[name].tobytes(), name
    for name in ("config", "cursor", "layout", "finished", "survey"):
        assert a.meta[name] == b.meta[name], name
    assert records(one) == records(other)


def signal_at_record(monkeypatch: pytest.MonkeyPatch, number: int, signum: int) -> None:
    """Have this process sent a signal when a window has been trained for the `number`-th time."""
    left = [number]
    record = loop._Training._record

    def record_and_signal(self: Any, window: Any) -> None:
        record(self, window)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(loop._Training, "_record", record_and_signal)


# --- the options ---


def test_choices_are_what_there_is_to_learn() -> None:
    assert list(kinds.LOSSES) == list(LOSSES)
    assert list(kinds.OPTIMIZERS) == list(OPTIMIZERS)
    assert list(kinds.LEARNING_RATES) == ["auto", *SCHEDULES]
    assert list(kinds.PENALTIES) == ["none" if name is None else name for name in PENALTIES]


def test_help_is_quick_and_training_needs_no_scikit_learn(h5: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from streamgd.cli import main\n"
        "assert main(['--help']) == 0 and main(['train', '--help']) == 0\n"
        "heavy = {'numba', 'numpy', 'pyarrow', 'h5py', 'dask', 'distributed', 'sklearn', 'pandas', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert main(sys.argv[1:]) == 0\n"
        "late = {'dask', 'distributed', 'sklearn', 'pandas', 'pyarrow'}\n"
        "assert not late & set(sys.modules), late & set(sys.modules)\n"
    )
    args = ["train", str(h5), "--target", "y", "--run", str(tmp_path / "run"), "--epochs", "1", "--quiet"]
    subprocess.run([sys.executable, "-c", code, *args], check=True, stdout=subprocess.DEVNULL)


def test_usage_errors_say_what_is_expected(sg: Callable[..., Said], h5: Path, tmp_path: Path) -> None:
    run = ("--run", tmp_path / "run")
    for args, part in (
        ((h5, *run), "Missing option '--target'"),
        ((h5, "--target", "y"), "Missing option '--run'"),
        ((h5, "--target", "y", *run, "--epochs", "0"), "'0' is not a whole number of at least 1, or 'auto'"),
        ((h5, "--target", "y", *run, "--tol", "nan"), "'nan' is not a number, or 'auto', or 'none'"),
        ((h5, "--target", "y", *run, "--loss", "square"), "'square' is not one of"),
        ((h5, "--target", "y", *run, "--class-weight", "a:2"), "'a:2' is not a label, '=' and a number"),
        (("--target", "y", *run), "Missing argument 'DATA"),
    ):
        said = sg("train", *args)
        assert said.status == 2
        assert part in said.err
    assert not (tmp_path / "run").exists()


# --- train ---


def test_train_says_what_was_decided_and_leaves_a_run(sg: Callable[..., Said], h5: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = sg("train", h5, "--target", "y", "--run", run, "--epochs", 3, *SMALL)
    assert said.status == 0
    for part in (
        "data.h5 (hdf5): 3,000 rows in 60 blocks",
        "3 as float32",
        "y (float32): regression (the target is float32)",
        "loss squared_error, no penalty, optimizer auto",
        "epochs      3\n",
        "planned: 2 windows of",
        "mixing      ",
        f"{run}, with a checkpoint every 60 s",
    ):
        assert part in said.err
    assert said.out.startswith("finished: 3 epochs done, 141 updates\nloss ")
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl", "checkpoints", "lock"}
    described = json.loads((run / "config.json").read_text())
    assert described["config"]["max_iter"] == 3
    assert described["origin"]["data"] == str(h5)
    assert {"config", "origin", "fingerprint", "versions", "target", "features", "row_dtype"} <= described.keys()
    quiet = sg("train", h5, "--target", "y", "--run", tmp_path / "other", "--epochs", 3, *SMALL, "--quiet")
    assert quiet.err == ""
    assert quiet.out == said.out


def test_automatic_epochs_are_explained(sg: Callable[..., Said], h5: Path, tmp_path: Path) -> None:
    said = sg("train", h5, "--target", "y", "--run", tmp_path / "run")
    assert "at most 834 (as many as make about 10,000 updates), fewer if the loss stops falling for 5" in said.err
    assert said.out.startswith("finished: converged after ")


def test_options_reach_the_run(sg: Callable[..., Said], parquet: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = "--features x0,x2 --loss huber --epsilon 2 --penalty elasticnet --alpha 0.01 --l1-ratio 0.5 "
    options += "--optimizer sgd --learning-rate invscaling --eta0 0.02 --power-t 0.5 --momentum 0.9 --nesterov "
    options += "--average --batch-size 32 --epochs 2 --tol 1e-3 --n-iter-no-change 7 --buffer 2MB --no-shuffle "
    options += "--standardize full --no-intercept --dtype float64 --seed 9 --threads 1 --checkpoint-every 5"
    assert sg("train", parquet, "--target", "y", "--run", run, *options.split()).status == 0
    described = json.loads((run / "config.json").read_text())
    assert described["features"] == ["x0", "x2"]
    assert described["row_dtype"] == "float64"
    learning = {"task": "regression", "loss": "huber", "epsilon": 2.0, "quantile": 0.5, "class_weight": None}
    learning |= {"penalty": "elasticnet", "alpha": 0.01, "l1_ratio": 0.5, "fit_intercept": False}
    steps = {"optimizer": "sgd", "learning_rate": "invscaling", "eta0": 0.02, "power_t": 0.5, "batch_size": 32}
    steps |= {"momentum": 0.9, "nesterov": True, "average": True}
    passes = {"max_iter": 2, "tol": 0.001, "n_iter_no_change": 7, "shuffle": False, "seed": 9, "n_lanes": 1}
    assert described["config"] == learning | steps | passes | {"buffer_bytes": 2_000_000, "standardize": "full"}
    assert sg("resume", run, "--epochs", "3").status == 0  # reads rows in the same type, from the same columns


@pytest.mark.parametrize(
    ("target", "args", "task", "loss", "reason"),
    [
        (["a", "b", "c"], (), "classification", "log_loss", "the target is string"),
        ([True, False, True], (), "classification", "log_loss", "the target is bool"),
        ([1, 2, 3], (), "regression", "squared_error", "if its values are classes, say --task classification"),
        ([1, 2, 3], ("--task", "classification"), "classification", "log_loss", "as told"),
        ([1, 2, 3], ("--loss", "hinge"), "classification", "hinge", "as loss hinge asks for"),
        ([1, 2, 3], ("--class-weight", "2=5"), "classification", "log_loss", "as class weights ask for"),
    ],
)
def test_the_task_follows_the_target(
    sg: Callable[..., Said], tmp_path: Path, target: Any, args: Any, task: str, loss: str, reason: str
) -> None:
    X, _ = make_rows(300)
    data = write_parquet(tmp_path / "data.parquet", X, np.resize(target, 300))
    said = sg("train", data, "--target", "y", "--run", tmp_path / "run", "--epochs", "1", *args)
    assert said.status == 0
    assert f": {task} ({reason}" in said.err or reason in said.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["task"], config["loss"]) == (task, loss)


@pytest.mark.parametrize(
    ("target", "given", "expected"),
    [
        (["a", "b"], "a=2,b=0.5", [["a", 2.0], ["b", 0.5]]),
        ([1, 2], "2=3", [[2, 3.0]]),
        ([True, False], "true=3", [[True, 3.0]]),
        ([0.5, 1.5], "1.5=3", [[1.5, 3.0]]),
        (["a", "b"], "balanced", "balanced"),
    ],
)
def test_class_weights_have_the_labels_type(
    sg: Callable[..., Said], tmp_path: Path, target: Any, given: str, expected: Any
) -> None:
    X, _ = make_rows(300)
    data = write_parquet(tmp_path / "data.parquet", X, np.resize(target, 300))
    said = sg("train", data, "--target", "y", "--run", tmp_path / "run", "--epochs", "1", "--class-weight", given)
    assert said.status == 0
    assert "classes     2: " in said.err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["class_weight"] == expected


def test_left_out_columns_are_named(sg: Callable[..., Said], tmp_path: Path) -> None:
    import pandas as pd

    X, y = make_rows(300)
    index = pd.Index(np.arange(300)[::-1], name="id")
    pd.DataFrame(X, columns=list("abc"), index=index).assign(y=y).to_parquet(tmp_path / "d")
    said = sg("train", tmp_path / "d", "--target", "y", "--run", tmp_path / "run", "--epochs", "1")
    assert "left out    id (the pandas index)" in said.err


def test_poor_mixing_is_said_with_a_way_out(sg: Callable[..., Said], tmp_path: Path) -> None:
    data = write_big_group(tmp_path / "data.parquet")
    said = sg("train", data, "--target", "y", "--run", tmp_path / "run", "--epochs", "1", "--buffer", "12MB")
    assert said.status == 0, said.err
    assert "mixing      poor: " in said.err
    assert "as in sorted files, the fit will suffer" in said.err
    assert "row_group_size=" in said.err


# --- bad input ---


def bad_inputs(folder: Path) -> dict[str, tuple[tuple[object, ...], list[str]]]:
    X, y = make_rows(400)
    text = ["a"] * 400
    write_parquet(folder / "text.parquet", X, y, city=text, day=pa.array([0] * 400, pa.date32()), tags=[["t"]] * 400)
    holes = X.copy()
    holes[333, 1] = np.nan
    write_parquet(folder / "nan.parquet", holes, y)
    write_parquet(folder / "null.parquet", X, pa.array([None, *y[1:].tolist()]))
    infinite = y.copy()
    infinite[7] = np.inf
    write_hdf5(folder / "inf.h5", X, infinite)
    write_hdf5(folder / "weights.h5", X, y, w=np.where(np.arange(400) == 9, -1.0, 1.0))
    write_hdf5(folder / "rows.h5", X, y[:-1])
    write_hdf5(folder / "one.h5", X, np.ones(400, np.int32))
    write_parquet(folder / "empty.parquet", X[:0], y[:0])
    whole = (folder / "nan.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.parquet").touch()
    (folder / "table.csv").write_text("a,b\n1,2\n")
    (folder / "mixed").mkdir()
    write_parquet(folder / "mixed" / "a.parquet", X, y)
    write_parquet(folder / "mixed" / "b.parquet", X, [str(value) for value in y])
    good = write_hdf5(folder / "good.h5", X, y)
    y_ = ("--target", "y")
    return {
        "no file": ((folder / "god.h5", *y_), ["no such file", "good.h5"]),
        "no dataset": ((good, "--target", "z"), ["there is no dataset 'z'", "'y' (400,) float32"]),
        "no column": ((folder / "nan.parquet", "--target", "yy"), ["no column 'yy'", "Did you mean 'y'"]),
        "text": ((folder / "text.parquet", *y_), ["'city' (string)", "'day' (date32", "'tags' (list<"]),
        "text target": (
            (folder / "text.parquet", "--target", "city", "--features", "x0", "--task", "regression"),
            ["'city'", "classification"],
        ),
        "nan": ((folder / "nan.parquet", *y_), ["row group 0, row 333", "'x1' is NaN"]),
        "null": ((folder / "null.parquet", *y_), ["'y' (1 in 'null.parquet', row group 0)"]),
        "inf": ((folder / "inf.h5", *y_), ["inf.h5, row 7", "target 'y' is inf"]),
        "weight": ((folder / "weights.h5", *y_, "--weight", "w"), ["weights.h5, row 9", "weight is -1.0"]),
        "rows": ((folder / "rows.h5", *y_), ["'X' has 400 rows, but 'y' has 399"]),
        "one class": ((folder / "one.h5", *y_, "--task", "classification"), ["got 1 class (1)"]),
        "empty": ((folder / "empty.parquet", *y_), ["no file has rows"]),
        "zero": ((folder / "zero.parquet", *y_), ["it is empty (0 bytes)"]),
        "cut": ((folder / "cut.parquet", *y_), ["was cut short"]),
        "csv": ((folder / "table.csv", *y_), ["looks like text", "pyarrow.csv"]),
        "schemas": ((folder / "mixed", *y_), ["b.parquet", "'y' is string instead of float"]),
        "buffer": ((good, *y_, "--buffer", "1kB"), ["buffer of 1 kB is too small", "(buffer='"]),
        "size": ((good, *y_, "--buffer", "much"), ["size 'much' cannot be read"]),
        "pair": ((good, *y_, "--optimizer", "adam", "--learning-rate", "optimal"), ["'optimal' does not go with"]),
        "task": ((good, *y_, "--task", "classification", "--loss", "huber"), ["'huber' is not a loss for class"]),
        "label": ((good, *y_, "--class-weight", "spam=1"), ["names the class 'spam'", "float32"]),
        "diverges": (
            (good, *y_, "--optimizer", "sgd", "--eta0", "1e9", "--epochs", "3"),
            ["training diverged in epoch ", "eta0=1e+09", "Try"],
        ),
    }


def test_bad_input_gets_one_clear_message(sg: Callable[..., Said], tmp_path: Path) -> None:
    for what, (args, parts) in bad_inputs(tmp_path).items():
        run = tmp_path / f"run {what}"
        said = sg("train", *args, "--run", run, "--quiet")
        assert said.status == 2, what
        assert said.err.startswith("streamgd: error: "), what
        assert said.out == ""
        for part in parts:
            assert part in said.err, (what, said.err)
        # Whatever was wrong with the data, the folder can be used once it is mended.
        assert what == "diverges" or not (run / "config.json").exists(), what


def test_bugs_are_not_hidden(
    sg: Callable[..., Said], h5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop._Training, "go", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", str(h5), "--target", "y", "--run", str(tmp_path / "run"), "--quiet"])


# --- the run folder ---


def test_a_folder_holds_one_run(sg: Callable[..., Said], h5: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = ("train", h5, "--target", "y", "--epochs", "1", "--run", run)
    assert sg(*train).status == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = sg(*train)
    assert said.status == 2
    assert f"{run} already holds a run: `streamgd resume" in said.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_somebody_elses_files_are_not_touched(sg: Callable[..., Said], h5: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "checkpoints" / "model.pt"
    other.parent.mkdir(parents=True)
    other.write_text("precious")
    said = sg("train", h5, "--target", "y", "--run", tmp_path / "other")
    assert said.status == 2
    assert "something else" in said.err
    assert other.read_text() == "precious"


def test_a_folder_in_use_is_refused(sg: Callable[..., Said], h5: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert sg("train", h5, "--target", "y", "--epochs", "1", "--run", run).status == 0
    with RunFolder(run):
        said = sg("resume", run)
        assert sg("evaluate", run, h5).status == 0  # reading needs no lock
    assert said.status == 2
    assert "in use by another process" in said.err


def test_a_folder_that_cannot_be_written_is_refused(sg: Callable[..., Said], h5: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = sg("train", h5, "--target", "y", "--run", tmp_path / "file" / "run")
    assert said.status == 2
    assert "cannot write to the run folder" in said.err


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
def test_a_full_disk_stops_the_run_and_the_checkpoint_before_is_good(
    sg: Callable[..., Said], h5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train = ("train", h5, "--target", "y", "--epochs", "3", "--tol", "none", *SMALL, "--run")
    assert sg(*train, whole).status == 0
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        if what == "checkpoint":
            done, fsync = [0], os.fsync

            def full_fsync(fd: int) -> None:
                done[0] += Path(f"/proc/self/fd/{fd}").readlink().name.endswith(".safetensors.tmp")
                if done[0] == 3:
                    raise full
                fsync(fd)

            patch.setattr(os, "fsync", full_fsync)
        else:
            append = RunFolder.append_metrics

            def torn(self: RunFolder, record: dict[str, Any]) -> None:
                if record["epoch"] == 1 and record["window"] == 3:
                    with (self.path / "metrics.jsonl").open("a") as file:
                        file.write('{"epoch": 1, "win')
                    raise full
                append(self, record)

            patch.setattr(RunFolder, "append_metrics", torn)
        said = sg(*train, run)
    assert said.status == 2
    assert os.strerror(errno.ENOSPC) in said.err
    assert not list(run.rglob("*.tmp"))
    assert 0 < int(newest(run).tensors["counters"][loop.kernels.N_ROWS]) < 3 * N_ROWS
    assert sg("resume", run).status == 0
    assert_same_run(whole, run)


# --- stopping and resuming ---


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    sg: Callable[..., Said], h5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "my run"
    train = ("train", h5, "--target", "y", "--epochs", "3", "--tol", "none", *SMALL, "--run")
    assert sg(*train, whole).status == 0
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signal_at_record(patch, 17, signum)
        said = sg(*train, run)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert said.status == 128 + signum
    assert f"stopped by {signum.name} in epoch 2 of 3, after " in said.err
    assert f"and saved; go on with: streamgd resume '{run}'" in said.err
    assert said.out == ""
    assert newest(run).meta["finished"] is None
    said = sg("resume", run)
    assert said.status == 0
    assert "resuming    in epoch 2 of 3, after " in said.err
    assert_same_run(whole, run)


def test_a_signal_during_the_survey_leaves_a_run_to_go_on_with(
    sg: Callable[..., Said], h5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train = ("train", h5, "--target", "y", "--epochs", "2", *SMALL, "--run")
    assert sg(*train, whole).status == 0
    with monkeypatch.context() as patch:
        patch.setattr(runs, "take_survey", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        said = sg(*train, run)
    assert said.status == 143
    assert f"stopped by SIGTERM before the first update; go on with: streamgd resume {run}" in said.err
    said = sg("predict", run, h5, "--output", tmp_path / "p.parquet")
    assert said.status == 2
    assert "has no checkpoint yet" in said.err
    assert sg("resume", run).status == 0
    assert_same_run(whole, run)


def test_a_second_signal_ends_at_once(h5: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from streamgd.cli import main\n"
        "from streamgd.run import loop\n"
        "def hang(self):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "loop._Training.go = hang\n"
        "main(sys.argv[1:])\n"
    )
    args = ["train", str(h5), "--target", "y", "--run", str(tmp_path / "run")]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "stopped at once" in done.stderr
    assert time.monotonic() - began < 50


def test_a_killed_process_is_resumed_by_another(tmp_path: Path) -> None:
    data = write_hdf5(tmp_path / "data.h5", *make_rows(40_000))
    whole, run = tmp_path / "whole", tmp_path / "run"
    train = ["train", str(data), "--target", "y", "--epochs", "15", "--tol", "none", "--buffer", "400kB", "--quiet"]
    assert main([*train, "--run", str(whole)]) == 0
    command = [sys.executable, "-m", "streamgd", *train, "--checkpoint-every", "0", "--run", str(run)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None and len(list(run.glob("checkpoints/*"))) < 3:
            time.sleep(0.005)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert newest(run).meta["finished"] is None
    assert main(["resume", str(run), "--quiet", "--threads", "1"]) == 0
    assert_same_run(whole, run)


def test_more_epochs_continue_a_finished_run(sg: Callable[..., Said], h5: Path, tmp_path: Path) -> None:
    long, run = tmp_path / "long", tmp_path / "run"
    train = ("train", h5, "--target", "y", "--tol", "none", *SMALL, "--run")
    assert sg(*train, long, "--epochs", "5").status == 0
    assert sg(*train, run, "--epochs", "2").status == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for more in ((), ("--epochs", "2"), ("--epochs", "1")):
        said = sg("resume", run, *more)
        assert said.status == 0
        assert said.out.startswith("finished: 2 epochs done")
        assert "nothing to do; `streamgd resume" in said.out
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert sg("resume", run, "--epochs", "5").status == 0
    assert_same_run(long, run)
    assert json.loads((run / "config.json").read_text())["config"]["max_iter"] == 5


def test_more_epochs_survive_a_stop(
    sg: Callable[..., Said], h5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, run = tmp_path / "long", tmp_path / "run"
    train = ("train", h5, "--target", "y", "--tol", "none", *SMALL, "--run")
    assert sg(*train, long, "--epochs", "4").status == 0
    assert sg(*train, run, "--epochs", "2").status == 0
    with monkeypatch.context() as patch:
        signal_at_record(patch, 3, signal.SIGINT)
        assert sg("resume", run, "--epochs", "4").status == 130
    said = sg("resume", run, "--epochs", "2")
    assert said.status == 2
    assert "has begun epoch 3" in said.err
    assert sg("resume", run).status == 0  # the four epochs are remembered
    assert_same_run(long, run)


def test_a_converged_run_says_that_more_epochs_change_nothing(
    sg: Callable[..., Said], h5: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert sg("train", h5, "--target", "y", "--run", run, "--tol", "1", "--epochs", "50").status == 0
    said = sg("resume", run, "--epochs", "99")
    assert said.status == 0
    assert said.out.startswith("finished: converged after 6 epochs")
    assert "more epochs would not change that" in said.out


def test_moved_data_is_the_same_data_and_changed_data_is_refused(
    sg: Callable[..., Said], h5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train = ("train", h5, "--target", "y", "--epochs", "2", *SMALL, "--run")
    assert sg(*train, whole).status == 0
    with monkeypatch.context() as patch:
        signal_at_record(patch, 4, signal.SIGINT)
        assert sg(*train, run).status == 130
    moved = tmp_path / "elsewhere" / "renamed.h5"
    moved.parent.mkdir()
    h5.rename(moved)
    said = sg("resume", run)
    assert said.status == 2
    assert "say where it is now: --data PATH" in said.err
    X, y = make_rows(seed=1)
    changed = write_hdf5(tmp_path / "changed.h5", X, y)
    said = sg("resume", run, "--data", changed)
    assert said.status == 2
    assert "is not what the run was trained on; these differ: files[0].digest: " in said.err
    other = write_hdf5(tmp_path / "other.h5", X[:-1], y[:-1])
    assert "n_rows: 3000 then, 2999 now" in sg("resume", run, "--data", other).err
    assert sg("resume", run, "--data", moved).status == 0
    assert_same_run(whole, run)
    assert json.loads((run / "config.json").read_text())["origin"]["data"] == str(moved)


def test_damaged_checkpoints_are_reported_and_the_one_before_is_used(
    sg: Callable[..., Said], h5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train = ("train", h5, "--target", "y", "--epochs", "3", "--tol", "none", *SMALL, "--run")
    assert sg(*train, whole).status == 0
    with monkeypatch.context() as patch:
        signal_at_record(patch, 17, signal.SIGINT)
        assert sg(*train, run).status == 130
    files = sorted(run.glob("checkpoints/*"))
    content = bytearray(files[-1].read_bytes())
    content[-1] ^= 1
    files[-1].write_bytes(content)
    ruined = tmp_path / "ruined"
    shutil.copytree(run, ruined)
    for path in ruined.glob("checkpoints/*"):
        path.write_bytes(b"")
    said = sg("resume", run, "--quiet")
    assert said.status == 0
    assert said.err.startswith(f"warning: {files[-1]} is damaged: ")
    assert_same_run(whole, run)
    said = sg("resume", ruined, "--quiet")
    assert said.status == 2
    assert "streamgd: error: none of the 3 checkpoints" in said.err


def test_newer_formats_are_refused(sg: Callable[..., Said], h5: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert sg("train", h5, "--target", "y", "--epochs", "1", "--run", run).status == 0
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"format": 1', '"format": 7'))
    assert "config.json has format 7, this streamgd reads up to 1" in sg("resume", run).err
    (run / "config.json").write_text(text)
    found = newest(run)
    newer = checkpoint.Checkpoint(found.tensors, {**found.meta, "format": 7})
    checkpoint.save(run / "checkpoints" / "rows-000000000000009999.safetensors", newer)
    said = sg("resume", run)
    assert said.status == 2
    assert "has format 7, this streamgd reads up to 1: upgrade" in said.err


def test_nothing_to_resume(sg: Callable[..., Said], tmp_path: Path) -> None:
    said = sg("resume", tmp_path / "nowhere")
    assert said.status == 2
    assert "holds no run" in said.err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda described: described.pop("origin"), "it lacks 'origin'"),
        (lambda described: described["config"].update(bogus=1), "its 'config' cannot be used"),
        (lambda described: described["config"].pop("tol"), "its 'config' cannot be used"),
        (lambda described: described.update(config=5), "its 'config' cannot be used"),
    ],
    ids=["lacks", "unknown", "lacks option", "no object"],
)
def test_a_damaged_description_is_one_message(
    sg: Callable[..., Said], h5: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    assert sg("train", h5, "--target", "y", "--run", tmp_path / "run", "--epochs", 1).status == 0
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    change(described)
    (tmp_path / "run" / "config.json").write_text(json.dumps(described))
    for command in (("resume", tmp_path / "run"), ("evaluate", tmp_path / "run", h5)):
        said = sg(*command)
        assert said.status == 2
        assert "config.json is damaged" in said.err
        assert message in said.err


def test_a_target_that_names_nothing_is_a_usage_error(sg: Callable[..., Said], h5: Path, tmp_path: Path) -> None:
    for name in ("", ",", " "):
        said = sg("train", h5, "--target", name, "--run", tmp_path / "run")
        assert said.status == 2
        assert "names no column" in said.err


def test_a_number_to_predict_is_no_class(sg: Callable[..., Said], h5: Path, tmp_path: Path) -> None:
    said = sg("train", h5, "--target", "y", "--loss", "log_loss", "--run", tmp_path / "run")
    assert said.status == 2
    assert "unknown label type: continuous" in said.err
    assert not (tmp_path / "run" / "config.json").exists()


# --- predict ---


def train_on(sg: Callable[..., Said], data: Path, run: Path, *args: object) -> Any:
    assert sg("train", data, "--target", "y", "--run", run, "--epochs", "20", "--batch-size", "32", *args).status == 0
    return newest(run)


def test_predictions_match_the_model_by_name(sg: Callable[..., Said], parquet: Path, tmp_path: Path) -> None:
    train_on(sg, parquet, tmp_path / "run")
    X, y = make_rows(500, seed=5)
    shuffled = pa.table({"id": [str(i) for i in range(500)], "x2": X[:, 2], "y": y, "x0": X[:, 0], "x1": X[:, 1]})
    pq.write_table(shuffled, tmp_path / "new.parquet", row_group_size=120)
    said = sg("predict", tmp_path / "run", tmp_path / "new.parquet", "--output", tmp_path / "p.parquet")
    assert said.status == 0
    found = pq.read_table(tmp_path / "p.parquet")
    assert found.schema == pa.schema([("prediction", pa.float64())])
    np.testing.assert_allclose(found["prediction"].to_numpy(), X @ COEF + 3, atol=0.05)
    lacking = shuffled.drop_columns(["x0", "x2"])
    pq.write_table(lacking, tmp_path / "lacking.parquet")
    said = sg("predict", tmp_path / "run", tmp_path / "lacking.parquet", "--output", tmp_path / "q.parquet")
    assert said.status == 2
    assert "has no column 'x0', 'x2'" in said.err
    assert not (tmp_path / "q.parquet").exists()


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["no", "yes"], pa.string()),
        ([10, 20, 30], pa.int64()),
        ([False, True], pa.bool_()),
        ([0.5, 1.5], pa.float64()),
        (np.array(["2020-01-01", "2021-01-01"], "M8[ms]"), pa.timestamp("ms")),
    ],
)
def test_labels_keep_their_type(sg: Callable[..., Said], tmp_path: Path, labels: Any, kind: Any) -> None:
    X, y = make_rows(600)
    target = np.asarray(labels)[np.searchsorted(np.quantile(y, np.arange(1, len(labels)) / len(labels)), y)]
    data = write_parquet(tmp_path / "data.parquet", X, target)
    train_on(sg, data, tmp_path / "run", "--task", "classification")
    out = tmp_path / "p.parquet"
    assert sg("predict", tmp_path / "run", data, "--output", out).status == 0
    found = pq.read_table(out)["prediction"]
    assert found.type == kind
    assert np.mean(found.to_numpy(zero_copy_only=False) == target) > 0.8
    assert sg("predict", tmp_path / "run", data, "--output", out, "--proba").status == 0
    table = pq.read_table(out)
    assert table.column_names == [f"probability_{label}" for label in np.asarray(labels).tolist()]
    shares = np.stack([column.to_numpy() for column in table.columns], axis=1)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    assert np.mean(np.asarray(labels)[shares.argmax(axis=1)] == target) > 0.8


def test_labels_keep_all_of_their_text(sg: Callable[..., Said], tmp_path: Path) -> None:
    """Also behind a NUL, where Arrow takes NumPy's text to end."""
    X, y = make_rows(600)
    labels = np.array(["a\0b", "a", "a\0c"])[np.searchsorted(np.quantile(y, [1 / 3, 2 / 3]), y)]
    data = write_parquet(tmp_path / "data.parquet", X, labels.tolist())
    train_on(sg, data, tmp_path / "run", "--task", "classification")
    assert sg("predict", tmp_path / "run", data, "--output", tmp_path / "p.parquet").status == 0
    found = np.array(pq.read_table(tmp_path / "p.parquet")["prediction"].to_pylist())
    assert np.mean(found == labels) > 0.8
    X = np.column_stack([X.astype(float)])
    model = streamgd.SGDClassifier(random_state=0).fit(X, labels)
    assert model.classes_.tolist() == ["a", "a\0b", "a\0c"]
    assert model.score(X, labels) > 0.8


def test_decimals_can_be_planned_and_cached(sg: Callable[..., Said], tmp_path: Path) -> None:
    X, y = make_rows(300)
    price = pa.array([Decimal(i) / 4 for i in range(300)], pa.decimal128(10, 2))
    data = write_parquet(tmp_path / "data.parquet", X, y, price=price)
    said = sg("inspect", data, "--target", "y")
    assert said.status == 0, said.err
    assert "--cache DIR would take" in said.out
    run, cache = tmp_path / "run", tmp_path / "cache"
    said = sg("train", data, "--target", "y", "--epochs", 1, "--run", run, "--cache", cache)
    assert said.status == 0, said.err


def test_targets_may_be_named_one_by_one(sg: Callable[..., Said], tmp_path: Path) -> None:
    X, y = make_rows()
    data = write_parquet(tmp_path / "data.parquet", X, y, z=-y)
    for names in (["--target", "y,z"], ["--target", "y", "--target", "z"]):
        run = tmp_path / f"run{len(names)}"
        assert sg("train", data, *names, "--epochs", "2", "--run", run).status == 0
        assert json.loads((run / "config.json").read_text())["target"]["name"] == "y, z"


@pytest.mark.parametrize("kind", [streamgd.SGDRegressor, streamgd.SGDClassifier])
def test_defaults_are_those_of_the_estimators(sg: Callable[..., Said], tmp_path: Path, kind: Any) -> None:
    X, y = make_rows(300)
    task = kind._task
    data = write_parquet(tmp_path / "data.parquet", X, y > 0 if task == "classification" else y)
    assert sg("train", data, "--target", "y", "--task", task, "--seed", "0", "--run", tmp_path / "run").status == 0
    found = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert found == kind(random_state=0)._config(0).to_json()


def test_several_outputs_are_several_columns(sg: Callable[..., Said], tmp_path: Path) -> None:
    X, y = make_rows()
    data = write_parquet(tmp_path / "data.parquet", X, y, z=-y)
    run = tmp_path / "run"
    assert sg("train", data, "--target", "y,z", "--run", run, "--epochs", "20").status == 0
    assert sg("predict", run, data, "--output", tmp_path / "p.parquet").status == 0
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.column_names == ["prediction_0", "prediction_1"]
    np.testing.assert_allclose(table["prediction_0"].to_numpy(), y, atol=0.6)
    assert "r2 " in sg("evaluate", run, data).out


def test_the_end_of_a_name_says_what_predictions_are_written_as(
    sg: Callable[..., Said], tmp_path: Path, parquet: Path
) -> None:
    X, y = make_rows(600)
    labels = np.where(y > np.median(y), 'a "b", c', "none")
    data = write_parquet(tmp_path / "data.parquet", X, labels)
    run = tmp_path / "run"
    train_on(sg, data, run)
    for options in ([], ["--proba"]):
        for name in ("p.parquet", "p.csv", "p.PQ"):
            assert sg("predict", run, data, "--output", tmp_path / name, *options).status == 0
        expected = pq.read_table(tmp_path / "p.parquet")
        assert pq.read_table(tmp_path / "p.PQ") == expected
        assert pyarrow.csv.read_csv(tmp_path / "p.csv") == expected  # to the last bit
    before = sorted(tmp_path.iterdir())
    for name in ("p", "p.xlsx", "p.parquet.gz"):
        said = sg("predict", run, data, "--output", tmp_path / name)
        assert said.status == 2
        assert f"{tmp_path / name}: expected a name that ends in .parquet (or .pq) or .csv" in said.err
    assert sorted(tmp_path.iterdir()) == before


def test_predictions_are_there_whole_or_not_at_all(
    sg: Callable[..., Said], parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_on(sg, parquet, tmp_path / "run")
    X, y = make_rows(2000)
    X[1900, 1] = np.nan
    broken = write_hdf5(tmp_path / "broken.h5", X, y)
    good = write_hdf5(tmp_path / "good.h5", *make_rows(2000))
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "p.parquet"
    predict = ("predict", tmp_path / "run", "--features", "X", "--output", out)
    assert sg(*predict, good).status == 0
    before = out.read_bytes()
    said = sg(*predict, broken)
    assert said.status == 2
    assert "row 1,900" in said.err
    with monkeypatch.context() as patch:
        from streamgd.run import predictions

        patch.setattr(predictions, "_grouped", lambda pieces: os.kill(os.getpid(), signal.SIGTERM))
        said = sg(*predict, good)
    assert said.status == 143
    assert said.err == "stopped by SIGTERM\n"
    assert out.read_bytes() == before
    assert list(folder.iterdir()) == [out]


def test_predictions_go_only_where_they_may(sg: Callable[..., Said], parquet: Path, tmp_path: Path) -> None:
    train_on(sg, parquet, tmp_path / "run", "--loss", "huber")
    before = parquet.read_bytes()
    said = sg("predict", tmp_path / "run", parquet, "--output", parquet)
    assert said.status == 2
    assert "is one of the files to read" in said.err
    assert parquet.read_bytes() == before
    said = sg("predict", tmp_path / "run", parquet, "--output", tmp_path / "no" / "p.parquet")
    assert said.status == 2
    assert f"{tmp_path / 'no' / 'p.parquet'}: cannot write the predictions: No such file" in said.err
    said = sg("predict", tmp_path / "run", parquet, "--output", tmp_path / "p.parquet", "--proba")
    assert said.status == 2
    assert "gives no probabilities" in said.err


def test_predictions_of_a_run_under_way_say_so(
    sg: Callable[..., Said], h5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at_record(patch, 17, signal.SIGINT)
        assert sg("train", h5, "--target", "y", "--epochs", "3", *SMALL, "--run", run).status == 130
    said = sg("predict", run, h5, "--output", tmp_path / "p.parquet")
    assert said.status == 0
    assert "warning: the run is not finished (1 epochs done)" in said.err


# --- evaluate ---


def test_evaluation_of_numbers_honours_weights(sg: Callable[..., Said], tmp_path: Path) -> None:
    X, y = make_rows()
    w = np.arange(N_ROWS) % 3 + 0.5
    data = write_parquet(tmp_path / "data.parquet", X, y, w=w)
    run = tmp_path / "run"
    train_on(sg, data, run, "--weight", "w", "--loss", "huber", "--epsilon", "0.1")
    assert sg("predict", run, data, "--output", tmp_path / "p.parquet").status == 0
    left = pq.read_table(tmp_path / "p.parquet")["prediction"].to_numpy() - y
    huber = np.where(abs(left) <= 0.1, left**2 / 2, 0.1 * abs(left) - 0.005)
    expected = {
        "r2": 1 - np.average(left**2, weights=w) / np.average((y - np.average(y, weights=w)) ** 2, weights=w),
        "mse": np.average(left**2, weights=w),
        "rmse": np.sqrt(np.average(left**2, weights=w)),
        "mae": np.average(abs(left), weights=w),
        "loss": np.average(huber, weights=w),
    }
    found = json.loads(sg("evaluate", run, data, "--json").out)
    assert found.pop("n_rows") == N_ROWS
    assert found.pop("n_unknown") == 0
    assert found == pytest.approx(expected, rel=1e-6)
    said = sg("evaluate", run, data)
    assert "rows        3,000, weighted" in said.out
    assert "mean huber loss" in said.out


@pytest.mark.parametrize("loss", ["log_loss", "hinge"])
def test_evaluation_of_classes_counts_confusions(sg: Callable[..., Said], tmp_path: Path, loss: str) -> None:
    X, y = make_rows()
    labels = np.array(["low", "middle", "top"])[np.searchsorted([2.0, 4.0], y)]
    data = write_parquet(tmp_path / "data.parquet", X, labels)
    run = tmp_path / "run"
    train_on(sg, data, run, "--loss", loss)
    found = json.loads(sg("evaluate", run, data, "--json").out)
    assert found["classes"] == ["low", "middle", "top"]
    confusion = np.array(found["confusion"])
    assert confusion.sum(axis=1).tolist() == [int((labels == label).sum()) for label in found["classes"]]
    assert found["accuracy"] == pytest.approx(np.trace(confusion) / N_ROWS)
    assert ("log_loss" in found) == (loss == "log_loss")
    if loss == "log_loss":
        assert found["loss"] == pytest.approx(found["log_loss"])
    shown = sg("evaluate", run, data).out
    assert "true \\ predicted" in shown
    strange = write_parquet(tmp_path / "strange.parquet", X, np.where(np.arange(N_ROWS) < 30, "new", labels))
    found = json.loads(sg("evaluate", run, strange, "--json").out)
    assert found["n_unknown"] == 30
    assert "30 rows are of classes that the model does not know" in sg("evaluate", run, strange).out


def test_evaluation_needs_a_target(sg: Callable[..., Said], parquet: Path, tmp_path: Path) -> None:
    train_on(sg, parquet, tmp_path / "run")
    X, _ = make_rows(100)
    pq.write_table(pa.table({f"x{j}": column for j, column in enumerate(X.T)}), tmp_path / "plain.parquet")
    said = sg("evaluate", tmp_path / "run", tmp_path / "plain.parquet")
    assert said.status == 2
    assert "has no column 'y'" in said.err


def test_matrices_are_trained_on_and_predicted_from(sg: Callable[..., Said], tmp_path: Path) -> None:
    X, y = make_rows()
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "y.npy", y)
    run = tmp_path / "run"
    train = ("train", tmp_path / "X.npy", "--target", tmp_path / "y.npy", "--run", run)
    assert sg(*train, "--epochs", "20", "--batch-size", "32").status == 0
    said = sg("evaluate", run, tmp_path / "X.npy", "--target", tmp_path / "y.npy", "--json")
    assert json.loads(said.out)["r2"] > 0.99
    assert "no target to compare with" in sg("evaluate", run, tmp_path / "X.npy").err
    assert sg("predict", run, tmp_path / "X.npy", "--output", tmp_path / "p.parquet").status == 0
    assert sg("resume", run).status == 0


# --- inspect ---


def test_inspect_lists_columns_and_plans(sg: Callable[..., Said], tmp_path: Path) -> None:
    X, y = make_rows()
    data = tmp_path / "data.parquet"
    columns = {f"x{j}": column for j, column in enumerate(X.T)}
    pq.write_table(pa.table({**columns, "y": y, "city": ["Bern"] * N_ROWS}), data, row_group_size=700)
    said = sg("inspect", data, "--target", "y")
    assert said.status == 0
    for part in (
        "x0    float32",
        "city  string",
        "3,000 rows in 5 blocks",
        "of 200 to 700 rows",
        "3 as float32: x0, x1, x2",
        "y (float32): regression",
        "not numbers city (string)",
        "--features x0,x1,x2",
        "of 256 MB planned",
        "mixing      good",
    ):
        assert part in said.out, said.out
    said = sg("inspect", data)
    assert said.status == 0
    assert "none given; name it with --target" in said.out
    said = sg("inspect", data, "--target", "y", "--buffer", "100kB")
    assert said.status == 2
    assert "x0    float32" in said.out  # what is known is shown all the same
    assert "buffer of 100 kB is too small" in said.err


def test_inspect_lists_datasets(sg: Callable[..., Said], h5: Path) -> None:
    said = sg("inspect", h5, "--target", "y", *SMALL)
    assert said.status == 0
    assert "'X' (3000, 3) float32" in said.out
    assert "3,000 rows in 60 blocks" in said.out
    said = sg("inspect", h5, "--features", "Z")
    assert said.status == 2
    assert "'X' (3000, 3) float32" in said.out
    assert "there is no dataset 'Z'" in said.err


def test_inspect_counts_what_is_kept_beside_the_rows(sg: Callable[..., Said], tmp_path: Path) -> None:
    """Coefficients of the features, and of every lane: what a worker needs, and is refused for, if it lacks it."""
    n_features, n_lanes = 100_000, 4
    X = np.random.default_rng(0).standard_normal((64, n_features), np.float32)
    data = write_hdf5(tmp_path / "wide.h5", X, X[:, 0])
    said = sg("inspect", data, "--target", "y", "--lanes", n_lanes, "--buffer", "1GB")
    assert said.status == 0, said.err
    state_bytes = State.start(
        intercept=np.zeros(1),
        n_features=n_features,
        n_targets=1,
        n_slots=1,
        batch_size=0,
        row_dtype=X.dtype,
        has_weight=False,
    ).n_bytes
    assert f"beside it {format_bytes(state_bytes)} of coefficients" in said.out
    base = PROCESS_BYTES + (n_lanes + 2) * state_bytes
    assert f"a worker of a cluster takes {format_bytes(base)}, and" in said.out
    run = tmp_path / "run"
    said = sg("train", data, "--target", "y", "--epochs", 1, "--run", run)
    assert f"beside it {format_bytes(state_bytes)} of" in said.err
    small = write_hdf5(tmp_path / "small.h5", X[:, :5], X[:, 0])
    assert "beside it" not in sg("inspect", small, "--target", "y").out


def test_inspect_advises_smaller_row_groups(sg: Callable[..., Said], tmp_path: Path) -> None:
    data = write_big_group(tmp_path / "data.parquet")
    said = sg("inspect", data, "--target", "y", "--buffer", "12MB")
    assert said.status == 0, said.err
    assert "mixing      poor" in said.out
    assert "row_group_size=" in said.out
