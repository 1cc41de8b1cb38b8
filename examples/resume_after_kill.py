"""Kill a fit with SIGKILL, resume it, and compare it byte for byte with a fit that nobody disturbed.

python examples/resume_after_kill.py
"""

import contextlib
import io
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

import streamgd

N_ROWS, N_FEATURES, N_EPOCHS = 60_000, 10, 30
KILL_AFTER_EPOCH = 5


def write_data(path: Path) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N_ROWS, N_FEATURES)).astype(np.float32)
    y = X @ rng.standard_normal(N_FEATURES) + rng.standard_normal(N_ROWS)
    with h5py.File(path, "w") as file:
        file.create_dataset("X", data=X, chunks=(2048, N_FEATURES))
        file.create_dataset("y", data=y)


def make_model(checkpoint_dir: Path | None, verbose: int = 0) -> streamgd.SGDRegressor:
    """Make the estimator: resuming takes the same parameters."""
    return streamgd.SGDRegressor(
        max_iter=N_EPOCHS,
        tol=None,
        buffer="1MB",
        verbose=verbose,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every_s=0.01,  # 60 by default, which is what a run of days wants
    )


def train_in_child(data: Path, checkpoint_dir: Path) -> None:
    """What the child process does until it is killed: an ordinary fit."""
    make_model(checkpoint_dir).fit(streamgd.open_source(data))


def kill_a_fit(data: Path, checkpoint_dir: Path) -> Path:
    """Start a fit in a process of its own, kill it on its way, and return its run folder."""
    child = subprocess.Popen([sys.executable, __file__, str(data), str(checkpoint_dir)])
    while child.poll() is None:
        # metrics.jsonl gets a record at each epoch's end, the one with no window.
        for metrics in checkpoint_dir.glob("*/metrics.jsonl"):
            if metrics.read_text().count('"window": null') >= KILL_AFTER_EPOCH:
                child.send_signal(signal.SIGKILL)  # cannot be caught: nothing is saved now
                child.wait()
        time.sleep(0.005)
    if child.returncode != -signal.SIGKILL:
        raise SystemExit(f"the child ended by itself, with status {child.returncode}, before it could be killed")
    return next(checkpoint_dir.glob("*/config.json")).parent


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        data, checkpoint_dir = Path(name) / "data.h5", Path(name) / "checkpoints"
        write_data(data)
        run_dir = kill_a_fit(data, checkpoint_dir)
        left = streamgd.load(run_dir)
        print(f"killed by SIGKILL; left behind: {left.n_iter_} of {N_EPOCHS} epochs, {left.t_ - 1:,} updates")

        source = streamgd.open_source(data)
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            resumed = make_model(checkpoint_dir, verbose=1).fit(source, resume=True)
        print(f"resumed; the first epoch to end was {told.getvalue().splitlines()[0]}")
        undisturbed = make_model(None).fit(source)
        print("resumed:    ", np.array2string(resumed.coef_[:3], precision=17))
        print("undisturbed:", np.array2string(undisturbed.coef_[:3], precision=17))
        same = (
            resumed.coef_.tobytes() == undisturbed.coef_.tobytes()
            and resumed.intercept_.tobytes() == undisturbed.intercept_.tobytes()
            and resumed.loss_curve_ == undisturbed.loss_curve_
        )
        print(f"coefficients, intercept and losses equal byte for byte: {'yes' if same else 'NO'}")
        if not same:
            raise SystemExit(1)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        train_in_child(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
