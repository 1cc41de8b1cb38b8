"""The run folder: one run in it, one writer at a time, and metrics that go as far as the checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import streamgd
from streamgd.errors import (
    CheckpointWriteError,
    ResumeError,
    RunError,
    RunExistsError,
    RunLockedError,
    RunNotFoundError,
)
from streamgd.run import folder as module
from streamgd.run.checkpoint import FORMAT, Checkpoint
from streamgd.run.folder import RunFolder

_HOLD = """
import sys
from streamgd.run.folder import RunFolder
with RunFolder(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Lock a folder in another process."""
    env = os.environ | {"PYTHONPATH": str(Path(streamgd.__file__).parents[1])}
    command = [sys.executable, "-c", _HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def never(text: str) -> None:
    raise AssertionError(text)


# --- locking ---------------------------------------------------------------------------------------------------------
def test_one_writer_at_a_time_and_none_after_its_death(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with held_elsewhere(folder.path) as process:
        with pytest.raises(RunLockedError, match="in use by another process: wait until it ends, or choose another"):
            folder.__enter__()
        with pytest.raises(RunLockedError):  # nothing was left open that would make the second time differ
            folder.__enter__()
        assert not folder.holds_run  # looking needs no lock
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        with folder:
            folder.start({})
    assert folder.holds_run


def test_one_writer_within_a_process(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(RunLockedError):
        RunFolder(tmp_path).__enter__()
    with RunFolder(tmp_path) as folder:
        folder.start({})
    with folder:
        assert folder.description() == {"format": FORMAT}


def test_the_lock_is_released_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path):
        raise ZeroDivisionError
    with RunFolder(tmp_path):
        pass


def test_folders_are_made(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "runs" / "a") as folder:
        assert folder.path.is_dir()


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_where_the_folder_should_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write to the run folder .*file.*Choose another folder") as caught:
        RunFolder(tmp_path / name).__enter__()
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(RunNotFoundError):
        RunFolder(tmp_path / name).description()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match="Permission denied"):
            RunFolder(tmp_path / "run").__enter__()
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("way", ["removed", "replaced"])
def test_nothing_is_saved_in_a_folder_that_was_removed(tmp_path: Path, way: str) -> None:
    """Another run may have begun there, whose checkpoints these would be taken for."""
    path = tmp_path / "run"
    with RunFolder(path) as folder:
        folder.start({"number": 1})
        folder.save(Checkpoint({"theta": np.ones(2)}, {}), 1)
        shutil.rmtree(path)
        if way == "replaced":
            other = RunFolder(path).__enter__()
            other.start({"number": 2})
        with pytest.raises(CheckpointWriteError, match="was removed or replaced while its run was training"):
            folder.save(Checkpoint({"theta": np.ones(2)}, {}), 2)
        if way == "removed":
            assert not path.exists()
        else:
            other.save(Checkpoint({"theta": np.zeros(2)}, {}), 1)
            found = other.newest(never)
            assert found is not None
            assert not found.tensors["theta"].any()
            other.__exit__(None, None, None)


# --- the run's description -------------------------------------------------------------------------------------------
def test_a_second_run_needs_another_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.start({"number": 1})
        folder.checkpoints.save(Checkpoint({"theta": np.ones(2)}, {}), 1)
        folder.append_metrics({"epoch": 0, "window": 0})
        with pytest.raises(RunExistsError, match=r"already holds a run: `streamgd resume .*another folder"):
            folder.start({"number": 2})
        assert folder.description()["number"] == 1
        assert folder.newest(never) is not None
    with RunFolder(tmp_path) as folder:
        folder.start({"number": 2}, replace=True)
        assert folder.description()["number"] == 2
        assert folder.newest(never) is None
        assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
@pytest.mark.parametrize("replace", [False, True])
def test_what_is_no_run_is_not_overwritten(tmp_path: Path, name: str, replace: bool) -> None:
    """A folder of somebody's checkpoints is not emptied."""
    if name == "checkpoints":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    else:
        (tmp_path / name).write_text("precious")
    expected = r"holds no run, but 'checkpoints' or 'metrics.jsonl' of something else, which a run would overwrite"
    with RunFolder(tmp_path) as folder, pytest.raises(RunExistsError, match=expected):
        folder.start({}, replace=replace)
    assert (tmp_path / name).exists()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    with RunFolder(tmp_path) as folder:
        folder.start({})
        folder.start({}, replace=True)
        folder.discard()
    assert not folder.holds_run
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_a_run_that_could_not_begin_leaves_room_for_another(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.start({})
        folder.discard()
        folder.discard()
        folder.start({"number": 2})
    assert folder.description()["number"] == 2


def test_descriptions_that_cannot_be_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunNotFoundError, match=r"holds no run \(no config.json in it\): `streamgd train"):
        folder.description()
    with pytest.raises(RunNotFoundError):
        RunFolder(tmp_path / "nowhere").description()
    (tmp_path / "config.json").write_text('{"format": 1, ')
    with pytest.raises(ResumeError, match=r"config.json is damaged"):
        folder.description()
    (tmp_path / "config.json").write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(ResumeError, match=f"has format {FORMAT + 1}, this streamgd reads up to {FORMAT}: upgrade"):
        folder.description()


@pytest.mark.parametrize("text", ["[]", "3", '"run"', "null", "{}", '{"format": "1"}'])
def test_json_that_is_no_description(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ResumeError, match=r"config.json is damaged"):
        RunFolder(tmp_path).description()


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ResumeError, match=r"config.json is damaged"):
        RunFolder(tmp_path).description()


# --- metrics ---------------------------------------------------------------------------------------------------------
def records(folder: RunFolder) -> list[tuple[int, int | None]]:
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [(record["epoch"], record["window"]) for record in map(json.loads, lines)]


ALL = [(0, 0), (0, 1), (0, None), (1, 0), (1, 1), (1, None), (2, 0)]


def write_all(folder: RunFolder) -> None:
    for epoch, window in ALL:
        folder.append_metrics({"epoch": epoch, "window": window, "loss": 0.1})


@pytest.mark.parametrize(
    ("cursor", "kept"),
    [
        ((0, 0, 0), 0),
        ((0, 0, 17), 0),  # within a window: it will be finished, and recorded, again
        ((0, 1, 0), 1),
        ((0, 2, 0), 2),
        ((0, 1, 99), 1),  # an epoch's end is recorded before the cursor moves on
        ((1, 0, 0), 3),
        ((1, 1, 5), 4),
        ((2, 0, 0), 6),
        ((2, 1, 0), 7),
        ((3, 0, 0), 7),
    ],
)
def test_metrics_are_cut_back_to_the_cursor(tmp_path: Path, cursor: tuple[int, int, int], kept: int) -> None:
    with RunFolder(tmp_path) as folder:
        write_all(folder)
    with RunFolder(tmp_path) as folder:
        folder.cut_metrics(cursor)
        assert records(folder) == ALL[:kept]
        folder.append_metrics({"epoch": 9, "window": 9})
        assert records(folder) == [*ALL[:kept], (9, 9)]


@pytest.mark.parametrize(
    "torn", ['{"epoch": 0, "wind', "{", '"epoch"', "17", "[0, 1]", "{}", '{"epoch": 0, "window": 1']
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    with RunFolder(tmp_path) as folder:
        write_all(folder)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    with RunFolder(tmp_path) as folder:
        folder.cut_metrics((9, 0, 0))
        folder.append_metrics({"epoch": 9, "window": 0})
    assert records(folder) == [*ALL, (9, 0)]


def test_records_reach_the_file_now_and_then_and_with_every_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("streamgd.run.folder.time.monotonic", lambda: clock[0])
    with RunFolder(tmp_path) as folder:
        folder.append_metrics({"epoch": 0, "window": 0})
        assert records(folder) == [(0, 0)]  # the first at once
        folder.append_metrics({"epoch": 0, "window": 1})
        clock[0] += 1
        folder.append_metrics({"epoch": 0, "window": 2})
        assert records(folder) == [(0, 0), (0, 1), (0, 2)]
        folder.append_metrics({"epoch": 0, "window": 3})
        folder.save(Checkpoint({}, {"format": 1}), 10)
        assert records(folder) == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_a_whole_last_line_without_its_end_stays_a_line(tmp_path: Path) -> None:
    """Killed between the record and the line break."""
    with RunFolder(tmp_path) as folder:
        write_all(folder)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-1])
    with RunFolder(tmp_path) as folder:
        folder.cut_metrics((9, 0, 0))
        folder.append_metrics({"epoch": 9, "window": 0})
    assert records(folder) == [*ALL, (9, 0)]


def test_no_metrics_to_cut(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.cut_metrics((0, 0, 0))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_metrics_with_nothing_to_cut_are_not_written_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        write_all(folder)
    before = (tmp_path / "metrics.jsonl").stat()
    with RunFolder(tmp_path) as folder:
        folder.cut_metrics((9, 0, 0))
    after = (tmp_path / "metrics.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_metrics_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with RunFolder(tmp_path) as folder, pytest.raises(CheckpointWriteError, match=r"metrics.jsonl.*resume the run"):
        folder.append_metrics({"epoch": 0, "window": 0})


def test_metrics_that_cannot_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path) as folder:
        write_all(folder)

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_atomic", full)
    with RunFolder(tmp_path) as folder:
        with pytest.raises(CheckpointWriteError, match=r"metrics.jsonl: No space left on device"):
            folder.cut_metrics((0, 1, 0))
        assert records(folder) == ALL
