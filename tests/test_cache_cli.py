"""``streamgd cache``, and ``--cache`` of the commands that train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from streamgd.data.cache import Cache
from tests.test_cli import Said, assert_same_run, make_rows, newest, parquet, sg, write_parquet

__all__ = ["parquet", "sg"]


def test_a_cache_made_beforehand_is_what_a_run_would_write(
    sg: Callable[..., Said], parquet: Path, tmp_path: Path
) -> None:
    made, written = tmp_path / "made", tmp_path / "written"
    said = sg("cache", parquet, made, "--target", "y")
    assert said.status == 0, said.err
    assert "data        data.parquet" in said.err
    assert "cache       the cache takes" in said.err
    assert "free" in said.err
    assert f"train with --cache {made}" in said.err
    again = sg("cache", parquet, made, "--target", "y", "--quiet")
    assert (again.status, again.err) == (0, "")
    assert "nothing to do" in again.out
    train = ["train", parquet, "--target", "y", "--epochs", 3]
    assert sg(*train, "--run", tmp_path / "a", "--cache", written).status == 0
    found = sg(*train, "--run", tmp_path / "b", "--cache", made)
    assert "reading the cache in" in found.err
    assert_same_run(tmp_path / "a", tmp_path / "b")
    for path in written.glob("*/*.*"):
        assert path.read_bytes() == (made / path.relative_to(written)).read_bytes()
    assert newest(tmp_path / "b").meta["cached"] is not None


def test_resume_finds_the_cache_again(sg: Callable[..., Said], parquet: Path, tmp_path: Path) -> None:
    train = ["train", parquet, "--target", "y", "--quiet", "--cache", tmp_path / "cache", "--run"]
    assert sg(*train, tmp_path / "whole", "--epochs", 4).status == 0
    assert sg(*train, tmp_path / "run", "--epochs", 2).status == 0
    said = sg("resume", tmp_path / "run", "--epochs", 3)
    assert said.status == 0, said.err
    assert "reading the cache in" in said.err
    assert sg("resume", tmp_path / "run", "--epochs", 4, "--cache", tmp_path / "other").status == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert len(list((tmp_path / "other").iterdir())) == 1


def test_a_run_with_a_cache_is_not_resumed_on_a_cluster(sg: Callable[..., Said], parquet: Path, tmp_path: Path) -> None:
    """And nothing is asked of that."""
    train = ["train", parquet, "--target", "y", "--quiet", "--cache", tmp_path / "cache", "--epochs", 1]
    assert sg(*train, "--run", tmp_path / "run").status == 0
    said = sg("resume", tmp_path / "run", "--epochs", 2, "--scheduler", "tcp://127.0.0.1:1")
    assert said.status == 2
    assert "resume it without --scheduler" in said.err


def test_classes_named_by_text(sg: Callable[..., Said], tmp_path: Path) -> None:
    X, y = make_rows()
    path = write_parquet(tmp_path / "names.parquet", X, np.where(y > 3, "high", "low"))
    assert sg("cache", path, tmp_path / "cache", "--target", "y").status == 0
    said = sg("train", path, "--target", "y", "--run", tmp_path / "run", "--cache", tmp_path / "cache")
    assert said.status == 0, said.err
    assert "reading the cache in" in said.err
    manifest = json.loads(next((tmp_path / "cache").glob("*/cache.json")).read_text())
    assert manifest["definition"]["target"][0] == "y"


def test_too_little_room_is_refused_at_once(
    sg: Callable[..., Said], parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "free_bytes", lambda self: 10)
    said = sg("cache", parquet, tmp_path / "cache", "--target", "y")
    assert said.status == 2
    assert "make room, or choose another folder" in said.err
    assert [left.name for left in (tmp_path / "cache").glob("*/*")] == ["lock"]


def test_bad_rows_leave_nothing(sg: Callable[..., Said], tmp_path: Path) -> None:
    X, y = make_rows()
    X[70, 1] = np.nan
    path = write_parquet(tmp_path / "bad.parquet", X, y)
    said = sg("cache", path, tmp_path / "cache", "--target", "y")
    assert said.status == 2
    assert "feature 'x1' is NaN" in said.err
    assert [left.name for left in (tmp_path / "cache").glob("*/*")] == ["lock"]


def test_inspect_says_what_a_cache_would_take(sg: Callable[..., Said], parquet: Path) -> None:
    said = sg("inspect", parquet, "--target", "y")
    assert "cache       --cache DIR would take" in said.out


def test_lanes_have_no_cache(sg: Callable[..., Said], parquet: Path, tmp_path: Path) -> None:
    said = sg("train", parquet, "--target", "y", "--lanes", 2, "--run", tmp_path / "run", "--cache", tmp_path / "cache")
    assert said.status == 2
    assert "a cache is for one lane" in said.err
    assert not (tmp_path / "run").exists()  # nor does a cluster, whether there is one or not
    where = ["--scheduler", "tcp://127.0.0.1:1", "--cache", tmp_path / "cache"]
    said = sg("train", parquet, "--target", "y", "--run", tmp_path / "run", *where)
    assert said.status == 2
    assert "a cache is for one lane" in said.err
    assert not (tmp_path / "run").exists()


def test_an_empty_path_is_not_the_folder_one_works_in(sg: Callable[..., Said], parquet: Path, tmp_path: Path) -> None:
    for command in (["cache", parquet, ""], ["train", parquet, "--run", tmp_path / "run", "--cache", ""]):
        said = sg(*command, "--target", "y")
        assert said.status == 2
        assert "'' is no path: name a folder" in said.err
    assert not (tmp_path / "run").exists()


def test_a_place_where_no_folder_can_be(sg: Callable[..., Said], parquet: Path, tmp_path: Path) -> None:
    """The reason is the system's, not how much room there would be beside it."""
    for place, why in ((parquet / "x", "Not a directory"), (tmp_path / ("x" * 300), "File name too long")):
        said = sg("cache", parquet, place, "--target", "y")
        assert said.status == 2
        assert f"{why}: make room, or choose another folder" in said.err
        assert "free" not in said.err
        run = tmp_path / why
        said = sg("train", parquet, "--target", "y", "--epochs", 1, "--run", run, "--cache", place)
        assert said.status == 0, said.err
        assert f"{why}; the run goes on without" in said.err


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_cache_is_written_anew(sg: Callable[..., Said], parquet: Path, tmp_path: Path, damage: str) -> None:
    make = ["cache", parquet, tmp_path / "cache", "--target", "y", "--quiet"]
    assert sg(*make).status == 0
    (path,) = (tmp_path / "cache").glob("*/X.bin")
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] if damage == "cut" else kept[:-1] + bytes([kept[-1] ^ 1]))
    said = sg(*make)
    assert said.status == 0
    assert "is damaged" in said.err
    assert path.read_bytes() == kept
    assert "nothing to do" in sg(*make).out


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_classes_that_are_great_whole_numbers(sg: Callable[..., Said], tmp_path: Path, dtype: str) -> None:
    X, y = make_rows()
    path = write_parquet(tmp_path / "great.parquet", X, 2**53 + (y > 3).astype(dtype))
    task = ["--target", "y", "--task", "classification", "--quiet"]
    assert sg("cache", path, tmp_path / "cache", *task).status == 0
    said = sg("train", path, *task, "--run", tmp_path / "run", "--cache", tmp_path / "cache")
    assert said.status == 0, said.err
    assert len(list((tmp_path / "cache").iterdir())) == 1
