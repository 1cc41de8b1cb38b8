"""Checkpoints are there whole or not at all, and nothing that is damaged is taken for good."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from streamgd.errors import CheckpointError, CheckpointWriteError, ResumeError
from streamgd.run import checkpoint as module
from streamgd.run.checkpoint import FORMAT, KEPT, Checkpoint, CheckpointFolder, load, save, write_atomic
from streamgd.run.folder import RunFolder


def make(value: float = 1.0) -> Checkpoint:
    tensors = {
        "theta": np.array([[value, -0.0, np.pi]]),
        "counters": np.arange(3, dtype=np.int64),
        "checksum": np.array([2**64 - 1], np.uint64),
        "carry_X": np.zeros((0, 3), np.float32),
    }
    return Checkpoint(tensors, {"cursor": [1, 2, 3], "name": "Zürich", "finished": None})


def assert_equal(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    for name, array in expected.tensors.items():
        assert found.tensors[name].dtype == array.dtype
        assert found.tensors[name].shape == array.shape
        assert found.tensors[name].tobytes() == array.tobytes()
    assert found.meta == {"format": FORMAT, **expected.meta}


def never(text: str) -> None:
    raise AssertionError(text)


# --- what is in the file ---------------------------------------------------------------------------------------------
def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", make())
    assert_equal(load(tmp_path / "a.safetensors"), make())


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", make())
    save(tmp_path / "b.safetensors", make())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_arrays_that_are_not_contiguous(tmp_path: Path) -> None:
    array = np.arange(12.0).reshape(3, 4)
    save(tmp_path / "a.safetensors", Checkpoint({"columns": array.T, "every": array[:, ::2]}, {}))
    found = load(tmp_path / "a.safetensors").tensors
    np.testing.assert_array_equal(found["columns"], array.T)
    np.testing.assert_array_equal(found["every"], array[:, ::2])


def test_anyone_can_read_it_without_pickle(tmp_path: Path) -> None:
    """The file is safetensors and nothing else; the words are JSON."""
    path = tmp_path / "a.safetensors"
    save(path, make())
    with safe_open(str(path), framework="numpy") as file:
        words = file.metadata()
        np.testing.assert_array_equal(file.get_tensor("theta"), make().tensors["theta"])
    assert set(words) == {"streamgd"}
    assert json.loads(words["streamgd"][64:])["cursor"] == [1, 2, 3]
    content = path.read_bytes()
    (n_header,) = struct.unpack("<Q", content[:8])
    assert set(json.loads(content[8 : 8 + n_header])) == {"__metadata__", *make().tensors}


# --- damage ----------------------------------------------------------------------------------------------------------
def test_a_flipped_bit_in_any_byte_is_noticed(tmp_path: Path) -> None:
    """In the header's length, the header and the arrays; whatever safetensors makes of it."""
    path = tmp_path / "a.safetensors"
    save(path, make())
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at * 5 % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged|not a streamgd checkpoint"):
            load(path)


def test_a_shorter_or_longer_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, make())
    whole = path.read_bytes()
    for n in [*range(0, len(whole), 11), len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match="damaged"):
            load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


def test_arrays_exchanged_between_checkpoints_are_noticed(tmp_path: Path) -> None:
    """Each part is whole, but they do not belong together."""
    save(tmp_path / "a.safetensors", make(1.0))
    save(tmp_path / "b.safetensors", make(2.0))
    one, other = (tmp_path / "a.safetensors").read_bytes(), (tmp_path / "b.safetensors").read_bytes()
    (n_header,) = struct.unpack("<Q", one[:8])
    (tmp_path / "a.safetensors").write_bytes(one[: 8 + n_header] + other[8 + n_header :])
    with pytest.raises(CheckpointError, match="does not match its hash"):
        load(tmp_path / "a.safetensors")


def test_a_folder_or_nothing_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name)


def test_safetensors_of_somebody_else(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a streamgd checkpoint"):
        load(tmp_path / "a.safetensors")


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(make(), 1)
    monkeypatch.setattr(module, "FORMAT", FORMAT + 1)
    folder.save(make(), 2)
    monkeypatch.undo()
    with pytest.raises(ResumeError, match=f"has format {FORMAT + 1}, this streamgd reads up to {FORMAT}: upgrade"):
        folder.load_newest(never)


# --- several ---------------------------------------------------------------------------------------------------------
def test_the_last_three_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.load_newest(never) is None
    for n_rows in (5, 40, 300, 2_000, 10**12):  # numbers of different lengths: names must sort as numbers
        folder.save(make(n_rows), n_rows)
        found = folder.load_newest(never)
        assert found is not None
        assert found.tensors["theta"][0, 0] == n_rows
    kept = [load(path).tensors["theta"][0, 0] for path in folder.files()]
    assert kept == [10**12, 2_000, 300]
    assert len(kept) == KEPT


def test_a_damaged_newest_is_reported_and_the_one_before_used(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for n_rows in (1, 2, 3):
        folder.save(make(n_rows), n_rows)
    newest, second, _ = folder.files()
    newest.write_bytes(newest.read_bytes()[:-1])
    second.write_bytes(b"")
    said: list[str] = []
    found = folder.load_newest(said.append)
    assert found is not None
    assert found.tensors["theta"][0, 0] == 1
    assert [path.name in text for path, text in zip((newest, second), said, strict=True)] == [True, True]
    assert all("damaged" in text and "before it" in text for text in said)


def test_damaged_ones_do_not_cost_good_ones(tmp_path: Path) -> None:
    """A run that goes on from an older one writes files that sort before the damaged."""
    folder = CheckpointFolder(tmp_path)
    for n_rows in (10, 20, 30):
        folder.save(make(n_rows), n_rows)
    for path in folder.files()[:2]:
        path.write_bytes(b"rubbish")
    for n_rows in (12, 14, 16, 18):
        folder.save(make(n_rows), n_rows)
    said: list[str] = []
    found = folder.load_newest(said.append)
    assert found is not None
    assert found.tensors["theta"][0, 0] == 18
    assert [load(path).tensors["theta"][0, 0] for path in folder.files()[2:]] == [18, 16, 14]
    for n_rows in (40, 50, 60):
        folder.save(make(n_rows), n_rows)
    assert [load(path).tensors["theta"][0, 0] for path in folder.files()] == [60, 50, 40]


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for n_rows in (1, 2):
        folder.save(make(n_rows), n_rows).write_bytes(b"rubbish")
    said: list[str] = []
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        folder.load_newest(said.append)
    assert len(said) == 2


# --- failures while writing ------------------------------------------------------------------------------------------
def failing(function: Callable[..., Any], n: int, error: BaseException) -> Callable[..., Any]:
    """Make a function that raises instead of its n-th call."""
    left = iter(range(n))

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise error
        return function(*args, **kwargs)

    return replaced


class Full:
    """A file on a full disk: takes half of what is written."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> int:
        self._file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def break_step(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> None:
    if step == "write":
        opened = Path.open

        def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = opened(self, mode, *args, **kwargs)
            return Full(file) if mode == "wb" else file

        monkeypatch.setattr(Path, "open", open_full)
    elif step == "open":
        monkeypatch.setattr(Path, "open", failing(Path.open, 0, error))
    elif step in ("flush", "flush folder"):
        monkeypatch.setattr(os, "fsync", failing(os.fsync, 0 if step == "flush" else 1, error))
    else:
        monkeypatch.setattr(Path, "replace", failing(Path.replace, 0, error))


@pytest.mark.parametrize("step", ["open", "write", "flush", "rename", "flush folder"])
def test_a_failing_step_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(make(1), 1)
    with monkeypatch.context() as broken:
        break_step(broken, step, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(CheckpointWriteError, match=r"No space left on device.*free some space.*resume") as caught:
            folder.save(make(2), 2)
    assert isinstance(caught.value.__cause__, OSError)
    found = folder.load_newest(never)
    assert found is not None
    # Renamed is saved: that the folder could not be flushed matters only if the power goes.
    assert found.tensors["theta"][0, 0] == (2 if step == "flush folder" else 1)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
    folder.save(make(3), 3)
    found = folder.load_newest(never)
    assert found is not None
    assert found.tensors["theta"][0, 0] == 3


@pytest.mark.parametrize("step", ["flush", "rename"])
def test_an_interrupt_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(make(1), 1)
    with monkeypatch.context() as broken:
        break_step(broken, step, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            folder.save(make(2), 2)
    assert [load(path).tensors["theta"][0, 0] for path in folder.files()] == [1]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_does_not_cost_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes only when the newest is there."""
    folder = CheckpointFolder(tmp_path)
    for n_rows in (1, 2, 3):
        folder.save(make(n_rows), n_rows)
    break_step(monkeypatch, "write", OSError())
    with pytest.raises(CheckpointWriteError):
        folder.save(make(4), 4)
    assert [load(path).tensors["theta"][0, 0] for path in folder.files()] == [3, 2, 1]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and renamed, in order."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("the names of open files are needed, from /proc")
    found: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        found.append(f"flush {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        found.append(f"rename {self.name} to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    return found


def test_the_content_is_on_disk_before_it_gets_its_name(tmp_path: Path, done: list[str]) -> None:
    write_atomic(tmp_path / "a", b"content")
    assert done == ["flush a.tmp", "rename a.tmp to a", f"flush {tmp_path.name}"]
    assert (tmp_path / "a").read_bytes() == b"content"


def test_folders_are_on_disk_before_what_is_in_them(tmp_path: Path, done: list[str]) -> None:
    name = "rows-000000000000000001.safetensors"
    with RunFolder(tmp_path / "runs" / "a") as folder:
        assert done == ["flush runs", f"flush {tmp_path.name}"]
        done.clear()
        folder.append_metrics({"epoch": 0, "window": 0})
        folder.save(make(), 1)
        steps = [f"flush {name}.tmp", f"rename {name}.tmp to {name}", "flush checkpoints"]
        assert done == ["flush metrics.jsonl", "flush a", *steps]
        done.clear()
        folder.save(make(), 1)
        assert done == ["flush metrics.jsonl", *steps]


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointWriteError, match="cannot make the folder"):
        CheckpointFolder(tmp_path / "checkpoints").save(make(), 1)


def test_what_a_killed_writer_left_is_removed_with_the_next_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.save(make(), 1)
    leftovers = [
        folder.checkpoints.path / "rows-000000000000000002.safetensors.tmp",
        tmp_path / "config.json.tmp",
        tmp_path / "metrics.jsonl.tmp",
    ]
    for path in leftovers:
        path.write_bytes(b"half of it")
    (tmp_path / "notes.tmp").write_text("the user's own")
    assert folder.newest(never) is not None
    with folder:
        assert [path for path in leftovers if path.exists()] == []
        assert len(folder.checkpoints.files()) == 1
        assert (tmp_path / "notes.tmp").exists()
