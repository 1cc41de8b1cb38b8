"""The benchmarks run, on little data, and say what they left out."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

import streamgd
from streamgd.learn.losses import LOSSES
from streamgd.learn.optimizers import OPTIMIZERS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEERS = ("torch", "dask_ml", "vowpalwabbit")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import modules of the benchmarks, as their scripts do: from their own folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def run_script(*arguments: str, first_path: Path | None = None) -> str:
    """Run a script, with modules of some folder before all others, and return what it prints."""
    paths = [first_path, Path(streamgd.__file__).parents[1], os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)},
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- the data ---
def test_all_formats_hold_the_same_rows(load, tmp_path):
    module = load("tables")
    tables = module.Tables(tmp_path, 3000)
    ((_, X, y),) = module.pieces(3000)
    assert np.var(X) == pytest.approx(1, abs=0.05)
    for path in (tables.hdf5, tables.hdf5_gzip, tables.hdf5_auto):
        with h5py.File(path) as file:
            np.testing.assert_array_equal(file["X"], X)
            np.testing.assert_array_equal(file["y"], y)
            assert file["X"].compression == (None if path == tables.hdf5 else "gzip")
    for path in (tables.parquet, tables.parquet_default):
        table = pq.read_table(path)
        np.testing.assert_array_equal(np.column_stack(table.drop_columns("y").columns), X)
        np.testing.assert_array_equal(table["y"], y)
    assert "RLE_DICTIONARY" not in pq.ParquetFile(tables.parquet).metadata.row_group(0).column(0).encodings
    assert "RLE_DICTIONARY" in pq.ParquetFile(tables.parquet_default).metadata.row_group(0).column(0).encodings


@pytest.mark.parametrize("group", [50_000, 131_072, 200_000])
def test_row_groups_are_as_large_as_asked_for(load, tmp_path, group):
    n_rows, path = 300_000, tmp_path / "a.parquet"
    load("tables").write_parquet(path, n_rows, 1, group=group)
    metadata = pq.ParquetFile(path).metadata
    found = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
    assert found == [min(group, n_rows - first) for first in range(0, n_rows, group)]
    y = np.concatenate([y for _, _, y in load("tables").pieces(n_rows, 1)])
    np.testing.assert_array_equal(pq.read_table(path)["y"], y)


def test_an_interrupted_write_is_not_taken_for_the_file(load, tmp_path):
    kept, path = load("tables").kept, tmp_path / "a"

    def interrupted(path: Path) -> None:
        path.write_text("hal")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(path, interrupted)
    assert kept(path, lambda path: path.write_text("whole")).read_text() == "whole"
    assert kept(path, interrupted).read_text() == "whole"


# --- rounds and bars ---
def test_rounds_are_interleaved_and_peers_that_fail_are_left_out(load):
    rounds, calls = load("rounds"), []

    def fails() -> None:
        raise OSError("no such luck")

    def other(name: str) -> Any:
        return rounds.Contender(name, lambda: calls.append(name), before=lambda: calls.append(f"before {name}"))

    contenders = [
        other("a"),
        rounds.Contender("broken", fails),
        rounds.Contender("absent", fails, rounds.importable("no_such_module")),
        rounds.Contender("b", lambda: rounds.Outcome(seconds=calls.append("b") or 7.0)),
    ]
    measured, left_out = rounds.interleave(contenders, 3)
    assert calls == ["before a", "a", "b", "before a", "a", "b", "b", "before a", "a", "before a", "a", "b"]
    assert len(measured["a"].seconds) == 3
    assert measured["b"].seconds == (7.0, 7.0, 7.0)
    assert left_out["broken"] == "OSError: no such luck"
    assert "No module named 'no_such_module'" in left_out["absent"]
    assert "pip install" in left_out["absent"]
    with pytest.raises(OSError, match="luck"):
        rounds.interleave([rounds.Contender("streamgd", fails)], 1)


def test_bars_are_judged_round_by_round_against_the_fastest(load):
    cases, rounds = load("cases"), load("rounds")

    def taking(*seconds: float) -> Any:
        return rounds.Measured(seconds, rounds.Outcome())

    measured = {"streamgd": taking(1, 2, 1), "peer, slow": taking(90, 90, 90), "peer, fast": taking(5, 8, 7)}
    for least, verdict in ((5.0, "met"), (5.1, "MISSED")):
        bar = cases.Bar("work", "a peer", "streamgd", "peer", least)
        assert bar.judge(measured, {}) == ("5.00 (4.00-7.00) times as fast", verdict)
        assert bar.wanted == f"at least {least:g} times as fast"
    for most, verdict in ((0.2, "met"), (0.19, "MISSED")):
        bar = cases.Bar("work", "a peer", "streamgd", "peer", at_most=most)
        assert bar.judge(measured, {}) == ("0.20 (0.14-0.25) times its time", verdict)
    bar = cases.Bar("work", "another", "streamgd", "other", 5)
    assert bar.judge(measured, {"other, cached": "not here", "third": "nor this"}) == ("left out: not here", "-")


# --- contenders ---
@pytest.mark.parametrize("peer", ["", *PEERS])
def test_what_is_timed_does_learn(load, tmp_path, peer):
    run, tables = load("contenders"), load("tables").Tables(tmp_path, 40_000)
    fits: dict[str, list[Any]] = {
        "": [
            lambda: run.streamgd_epoch(tables.hdf5, tmp_path),
            lambda: run.sklearn_hdf5(tables.hdf5, 9000),
            lambda: run.sklearn_parquet(tables.parquet, 9000),
        ],
        "torch": [lambda: run.torch_loop(tables.hdf5, 9000)],
        "dask_ml": [lambda: run.dask_ml_incremental(tables.hdf5, 9000)],
        "vowpalwabbit": [lambda: run.vowpal_wabbit(tables.vowpal_cache, 40_000, 28)],
    }
    if peer:
        pytest.importorskip(peer)
    speed, rounds = load("speed"), load("rounds")
    for fit in fits[peer]:
        assert float(speed.explained(rounds.Measured((1.0,), fit()))) > 0.9


def test_scans_of_compressed_rows_take_whole_chunks(load, tmp_path):
    run, path = load("contenders"), tmp_path / "a.h5"
    load("tables").write_hdf5(path, 1000, 3, chunks=(64, 1), compression="gzip")
    assert [len(y) for _, y in run.h5py_chunks(path, 200)] == [192] * 5 + [40]
    assert [len(y) for _, y in run.h5py_chunks(path, 10)] == [64] * 15 + [40]


def lets_go_of_pages(path: Path, cached_share: Any) -> bool:
    """Whether the file system of a file keeps it elsewhere than in memory, and says so."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(path) < 0.01


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="files are made cold on Linux alone")
def test_a_cold_file_is_cold(load, tmp_path, monkeypatch):
    cold, path = load("cold"), tmp_path / "a"
    path.write_bytes(os.urandom(8_000_000))
    if not lets_go_of_pages(path, cold.cached_share):
        pytest.skip("the temporary folder is in memory")
    cold.sequential_read(path)
    assert cold.cached_share(path) > 0.99
    monkeypatch.setattr(cold, "_MAPPED_BYTES", 1 << 20)
    assert cold.cached_share(path) > 0.99
    cold.evict(path)
    assert cold.cached_share(path) < 0.01
    monkeypatch.setattr(cold, "cached_share", lambda path: 0.5)
    with pytest.raises(RuntimeError, match=r"50% of .* stayed"):
        cold.evict(path)


# --- the scripts ---
def test_speed_prints_tables_bars_and_who_is_absent(tmp_path):
    folder, absent = tmp_path / "data", tmp_path / "absent"
    absent.mkdir()
    for module in PEERS:
        (absent / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}')")
    shown = run_script("speed.py", "--rows", "3000", "--rounds", "1", "--folder", str(folder), first_path=absent)
    for peer, module in (("PyTorch", "torch"), ("dask-ml", "dask_ml"), ("Vowpal Wabbit", "vowpalwabbit")):
        (line, *_) = [line for line in shown.splitlines() if line.startswith(f"| {peer}")]
        assert f"left out: import {module}" in line
    for name in ("streamgd", "h5py scan", "pyarrow to a NumPy matrix", "scikit-learn partial_fit, pyarrow, 16,384-row"):
        assert f"\n| {name}" in shown
    bars = [line for line in shown.splitlines() if " at least " in line or " at most " in line or " within " in line]
    assert len(bars) == 8
    assert all(line.endswith(("| met |", "| MISSED |", "| - |")) for line in bars)
    assert sorted(path.suffix for path in folder.iterdir()) == [".h5", ".h5", ".h5", ".parquet", ".parquet"]


def test_second_epochs_are_timed_alone(load, tmp_path):
    run, tables = load("contenders"), load("tables").Tables(tmp_path, 40_000)
    if run.why_no_cache() is not None:
        pytest.skip(run.why_no_cache())
    path = tables.hdf5
    run.streamgd_second_epoch(path, tmp_path)
    began = time.perf_counter()
    outcome = run.streamgd_second_epoch(path, tmp_path)
    assert 0 <= outcome.seconds < time.perf_counter() - began
    assert np.abs(outcome.coef).max() > 0.1


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="files are made cold on Linux alone")
def test_speed_measures_a_cold_file_where_asked_to(load, tmp_path):
    (tmp_path / "a").write_bytes(os.urandom(100_000))
    if not lets_go_of_pages(tmp_path / "a", load("cold").cached_share):
        pytest.skip("the temporary folder is in memory")
    shown = run_script("speed.py", "--rounds", "1", "--folder", str(tmp_path), "--cases", "--cold", "1MB")
    assert "| HDF5, 0.0 GB, cold | plain sequential read of the file | at most 1.15 times its time |" in shown


def test_growth_measures_each_in_a_process_of_its_own(tmp_path):
    began = time.monotonic()
    shown = run_script(
        "growth.py", "--what", "groups", "--groups", "500", "--group-rows", "3000", "--repeats", "1",
        "--folder", str(tmp_path),
    )  # fmt: skip
    (line,) = [line for line in shown.splitlines() if line.startswith("| Parquet")]
    label, rows, seconds, _, _, _, before, peak = (text.strip() for text in line.strip("|").split("|"))
    assert (label, rows) == ("Parquet, groups of 500 rows", "3,000")
    assert 0 < float(seconds.split()[0]) < time.monotonic() - began
    assert 50 < float(before) <= float(peak) + 5 < 1000  # the kernel counts in batches
    assert list(tmp_path.iterdir()) == []


def test_growth_covers_bytes_features_and_refusals(load, tmp_path):
    growth = load("growth")
    sets = [*growth.sizes([200_000]), *growth.features([1, 300], 200_000)]
    assert [each.label for each in sets] == [
        f"{kind}, {what}" for what in ("0.0002 GB", "1 features", "300 features") for kind in ("HDF5", "Parquet")
    ]
    assert [each.n_rows for each in sets[::2]] == [1724, 25_000, 166]
    path = tmp_path / "a.parquet"
    sets[-1].write(path)
    found = growth.measure_here(path, path, "64MB", 1, 1204)
    assert found["seconds"][0] > 0
    assert 0 < found["before"] <= found["peak"] + 5e6
    few = tmp_path / "few.parquet"
    load("tables").write_parquet(few, 20, 2)
    assert "buffer=" in growth.measure_here(path, few, "1MB", 1, 1204)["refused"]


def test_kernels_are_timed_beside_a_pure_read():
    shown = run_script(
        "kernels.py", "--features", "3", "--dtypes", "float64", "--batches", "1", "300", "--window", "100kB",
        "--rounds", "1",
    )  # fmt: skip
    rows = [[text.strip() for text in line.strip("|").split("|")] for line in shown.splitlines() if line[:1] == "|"]
    shapes = [row for row in rows if row[:2] == ["3", "float64"]]
    assert [row[2] for row in shapes] == ["1", "300", "pure read"]
    assert [row[-1].partition(":")[0] for row in shapes] == ["", "at most 1.3", ""]
    assert shapes[-1][-2] == "1.00 (1.00-1.00)"
    assert all(float(row[-4]) > 0 for row in rows if row[-2].endswith(")"))
    recipes = [row for row in rows if len(row) == 6]
    assert {row[0] for row in recipes} > {*LOSSES, "log_loss, 10 classes", "log_loss, 100 classes"}
    assert {row[1] for row in recipes} > {*OPTIMIZERS}
    assert [row[0] for row in recipes if "80 M rows/s" in row[-1]] == ["log_loss"]


def test_the_kernel_that_is_timed_learns(load):
    bench = load("kernels").Bench(5, "float32", 1_000_000, 4096)
    assert (bench.n_rows, bench.n_bytes) == (28_672, 28_672 * 36)
    for options in ({}, {"n_classes": 2, "loss": "log_loss"}, {"n_classes": 10, "loss": "log_loss"}):
        n_classes = options.get("n_classes", 0)
        w = np.random.default_rng(1).standard_normal((5, n_classes or 1), dtype=np.float32).T
        if n_classes:
            w = np.diff(w, axis=0)
        coef = bench.kernel("some", **options).run().coef
        coef = np.diff(coef, axis=0) if n_classes > 2 else coef
        assert np.corrcoef(coef.ravel(), w.ravel())[0, 1] > 0.98


def test_starts_are_timed_from_the_process_on(load, tmp_path):
    startup = load("startup")
    load("tables").write_hdf5(tmp_path / "few.h5", 1000)
    processes = startup.Processes(tmp_path)
    times = processes.times("-c", startup.COUNT + startup.FIT + startup.FIT_HDF5 + startup.COUNTED)
    update, fitted, compiled, end = times
    assert (update, fitted, end) == ("update", "fitted", "end")
    assert int(compiled) >= 0
    assert 0 < times["update"] <= times["fitted"] <= times["end"]
    assert set(processes.times("-c", startup.FIT + startup.FIT_ARRAY)) == {"update", "fitted", "end"}
    with pytest.raises(RuntimeError, match="status 3"):
        processes.times("-c", "raise SystemExit(3)")
    shown = run_script("startup.py", "--what", "import", "--repeats", "1").splitlines()
    assert [line.split("|")[1].strip() for line in shown[4:]] == [
        "`python -c pass`, for comparison",
        "`import streamgd`",
        "`streamgd --help`",
    ]
    assert all(" s: " in line for line in shown[5:])


@pytest.mark.parametrize("storage", ["hdf5", "parquet"])
def test_sorted_rows_are_compared_with_shuffled_ones(load, monkeypatch, tmp_path, storage, capsys):
    sets, module = load("sets"), load("sorted_labels")
    small = sets.adult_like(np.random.default_rng(0), 2000, 1000)
    assert small[0].X.shape == (2000, 123)
    assert np.all(small[0].X.sum(axis=1) == 14)
    assert 0.1 < small[0].y.mean() < 0.4
    monkeypatch.setattr(sets, "adult_like", lambda rng: small)
    found = module.compare(storage, None, n_seeds=1, folder=tmp_path)
    assert capsys.readouterr().out.count("test log-loss") == 2
    if storage == "hdf5":
        assert found == pytest.approx(1, abs=0.05)
    else:
        assert pq.ParquetFile(tmp_path / "sorted.parquet").num_row_groups == 20
        assert 0.9 < found < 2
