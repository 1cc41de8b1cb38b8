"""Each example runs by itself, in a process of its own, and what it prints is what it promises to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import streamgd

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run_example(name: str, folder: Path) -> str:
    """Run an example in an empty folder and return what it printed; it must warn of nothing and leave nothing."""
    # The examples run with the package that is tested, whether it is installed or not.
    package = str(Path(streamgd.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    # PyTorch, where it is installed, leaves an empty folder for its compiler, and Dask one for its workers' files.
    left = [path for path in folder.iterdir() if not path.name.startswith(("torch", "dask-scratch-space"))]
    assert left == []
    return done.stdout


def number(pattern: str, text: str) -> float:
    """Return the number that the pattern's group matches."""
    match = re.search(pattern, text)
    assert match is not None, f"nothing like {pattern!r} in:\n{text}"
    return float(match[1].replace(",", ""))


def test_hdf5_trains_on_files_larger_than_the_buffer(tmp_path):
    shown = run_example("train_from_hdf5.py", tmp_path)
    assert number(r"stored: ([\d.]+) MB", shown) > 4 * number(r"buffer: ([\d.]+) MB", shown)
    assert number(r"largest relative difference: ([\d.]+) %", shown) < 3
    assert number(r"intercept: +([\d.]+)", shown) == pytest.approx(40, abs=0.02)
    assert number(r"R2: ([\d.]+)", shown) > 0.97
    assert "predicted 200,000 rows in 50 blocks" in shown


def test_parquet_trains_a_classifier_on_a_partitioned_folder(tmp_path):
    shown = run_example("train_from_parquet.py", tmp_path)
    assert "classes: leaves, stays" in shown
    found = [number(rf" {name} +(-?[\d.]+)", shown) for name in ("amount", "age_days", "n_orders", "is_new", "year")]
    # Generated as the log-odds of leaving; the second class is "stays".
    np.testing.assert_allclose(found, [-0.02, 0.001, 0.2, -1.5, -0.5], rtol=0.1)
    assert number(r"mean probability of 'stays': ([\d.]+)", shown) == pytest.approx(
        number(r"share of rows: ([\d.]+)", shown), abs=0.003
    )


def test_dask_arrays_train_without_being_held_whole(tmp_path):
    shown = run_example("train_from_dask.py", tmp_path)
    assert number(r"as float64: ([\d.]+) MB", shown) > number(r"buffer: ([\d.]+) MB", shown)
    assert number(r"largest difference: ([\d.]+)", shown) < 0.01
    assert number(r"R2 there: ([\d.]+)", shown) > 0.98


def test_a_killed_fit_resumes_byte_for_byte(tmp_path):
    shown = run_example("resume_after_kill.py", tmp_path)
    # It was on its way, some epochs done but not all, and was not begun afresh, which would be equal too.
    n_done = number(r"left behind: (\d+) of 30 epochs", shown)
    assert 3 <= n_done < 30
    assert number(r"first epoch to end was epoch (\d+)/30", shown) == n_done + 1
    assert "equal byte for byte: yes" in shown


def test_another_model_is_fed_and_resumed(tmp_path):
    shown = run_example("feed_another_model.py", tmp_path)
    assert "200 batches an epoch" in shown
    assert "stopped after 277 batches, at epoch 1" in shown
    assert "resumed for the other 123 batches" in shown
    assert "not stopped: yes" in shown
    # The rows are stored in the order of the target: without shuffling the network would not get there.
    assert number(r"R2 of the network: ([\d.]+)", shown) > 0.97
    assert number(r"of a linear model: ([\d.]+)", shown) < 0.1


def test_four_mini_batch_loops_agree(tmp_path):
    shown = run_example("minibatch_from_scratch.py", tmp_path)
    lines = shown.splitlines()
    table = [line for line in lines if re.match(r"w\d|intercept", line)]
    values = np.array([[float(text) for text in line.split()[1:]] for line in table])
    assert len(values) == 6
    has_torch = "PyTorch is not installed" not in shown
    assert values.shape[1] == (6 if has_torch else 5)
    fits = values[:, 2:]
    np.testing.assert_allclose(fits, np.broadcast_to(values[:, 1:2], fits.shape), atol=0.005)
    assert sum("diverges" in line for line in lines) == 1


def test_the_widespread_sign_mistake_diverges():
    # What minibatch_from_scratch.py says of it is true.
    rng = np.random.default_rng(0)
    X = rng.standard_normal((320, 2))
    y, w = X @ [2.0, -3.0], np.zeros(2)
    for start in [*range(0, 320, 32)] * 100:
        rows = slice(start, start + 32)
        w -= 0.01 * X[rows].T @ (y[rows] - X[rows] @ w) / 32
    assert np.abs(w).max() > 1e3


def test_every_example_is_tested_and_named_in_the_readme():
    here, readme = Path(__file__).read_text(), (ROOT / "README.md").read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f'run_example("{example.name}"' in here
        assert f"examples/{example.name}" in readme


def test_a_cluster_gives_the_same_bits(tmp_path):
    shown = run_example("dask_cluster.py", tmp_path)
    assert "2 workers, same bits: True" in shown
    assert "one of them killed, same bits: True" in shown
