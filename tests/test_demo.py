"""``streamgd demo``: it shows what it promises, and would notice if it were not so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgd import demo
from streamgd.cli import main
from streamgd.run.checkpoint import Checkpoint
from streamgd.run.folder import RunFolder


def test_demo_keeps_its_promise_and_cleans_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--dir", str(tmp_path), "--rows", "200000"]) == 0
    said = capsys.readouterr().out
    assert said.count("killed (SIGKILL) with ") == 2  # HDF5 and Parquet
    assert said.count("equal bit for bit") == 2
    assert said.count("equal metrics.jsonl") == 2
    assert said.count("close to the true coefficients") == 2
    assert "as promised: killed runs lost nothing" in said
    assert list(tmp_path.iterdir()) == []


def test_demo_says_what_went_wrong_in_its_child(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_argv", lambda *_: [sys.executable, "-c", "raise SystemExit('no luck')"])
    monkeypatch.setattr(demo, "_train_whole", lambda *_: None)
    assert main(["demo", "--dir", str(tmp_path), "--rows", "200000", "--keep"]) == 2
    assert "ended by itself, with status 1: no luck" in capsys.readouterr().err
    assert {path.name for path in next(tmp_path.iterdir()).iterdir()} == {"data.h5", "data.parquet"}


def make_checkpoint(**more: Any) -> Checkpoint:
    tensors = {"theta": np.array([[1.0, 0.0]]), "average": np.array([[2.0, 3.0]]), **more}
    return Checkpoint(tensors, {"cursor": [3, 0, 0], "layout": {}, "finished": "max_iter"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"theta": np.array([[1.0, -0.0]])}, "theta"),  # equal as numbers, not as bits
        ({"average": np.array([[2.0, np.nextafter(3.0, 4.0)]])}, "average"),
        ({"average": np.array([2.0, 3.0])}, "average"),
        ({"extra": np.zeros(1)}, "extra"),
    ],
)
def test_demo_notices_a_single_bit(change: dict[str, Any], named: str) -> None:
    lines: list[str] = []
    assert demo._compare(make_checkpoint(), make_checkpoint(), lines.append)
    assert not demo._compare(make_checkpoint(), make_checkpoint(**change), lines.append)
    assert f"DIFFERENT: {named}" in lines[-1]
    assert not demo._compare(make_checkpoint(), None, lines.append)


def test_demo_notices_other_metrics(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / name) for name in ("one", "same", "other")]
    lines = ['{"loss": 1.0, "wall_s": 1}', '{"loss": 1.0, "wall_s": 9}', '{"loss": 1.5, "wall_s": 1}']
    for folder, line in zip(folders, lines, strict=True):
        folder.path.mkdir()
        (folder.path / "metrics.jsonl").write_text(line + "\n")
    assert demo._compare_metrics(folders[0], folders[1], lambda _: None)
    assert not demo._compare_metrics(folders[0], folders[2], lambda _: None)


def test_demo_data_is_several_times_its_buffer(tmp_path: Path) -> None:
    import h5py
    import pyarrow.parquet as pq

    paths = demo.make_data(tmp_path, 9000, demo.Truth.draw())
    with h5py.File(paths["HDF5"]) as file:
        X, y = file["X"][:], file["y"][:]
    table = pq.read_table(paths["Parquet"])
    assert X.shape == (9000, demo.N_FEATURES)
    np.testing.assert_array_equal(np.stack([table[f"x{j}"].to_numpy() for j in range(demo.N_FEATURES)], axis=1), X)
    np.testing.assert_array_equal(table["y"].to_numpy(), y)
    assert paths["Parquet"].stat().st_size > (demo._TIMES - 1) * X.nbytes / demo._TIMES
