"""Runs with a cache: the same bits whether they write it, find it, lose it or share it, wherever they are stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgd.data import cache as caches
from streamgd.data.cache import Cache
from streamgd.data.cache_writer import CacheWriter
from streamgd.data.sources.cache import CacheSource
from streamgd.data.window_stream import WindowStream
from streamgd.errors import CacheError, CorruptDataError, OptionError, ResumeError
from streamgd.run.caching import RunWindows
from streamgd.run.config import RunOptions
from streamgd.run.folder import RunFolder
from streamgd.run.loop import Watcher, train
from streamgd.run.runs import Run
from tests.data.fake import FakeSource, expect_no_threads
from tests.data.test_cache import refuse_to_remove
from tests.run.small import N_ROWS, begin_small, bits, config_of, resume_small, saved, source_of

#: Rows of a window of the source: with few blocks in each the cache comes first, with more the first epoch writes it.
POOR, FAIR = 80, 160


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 10 rows, so that they are not the blocks of the source."""
    monkeypatch.setattr(caches, "_LEAST_PART_BYTES", 200)


class Stopper(Watcher):
    """Asks to stop after some kernel calls; keeps what it is told."""

    def __init__(self, after: int | None = None) -> None:
        self.left, self.stop = after, threading.Event()
        self.messages: list[str] = []
        self.notes: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advanced(self, run: Run, stream: Any) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                self.stop.set()


def go(run: Run, folder: RunFolder | None, cache: Path | None, watcher: Stopper | None = None, **options: Any) -> bool:
    watcher = watcher or Stopper()
    done = train(run, options=RunOptions(cache=cache, **options), folder=folder, watcher=watcher, stop=watcher.stop)
    expect_no_threads()
    return done


def whole(folder: Path, cache: Path | None, window_rows: int, **options: Any) -> dict[str, Any]:
    """Train a run to its end, and return all that is left of it."""
    with RunFolder(folder) as opened:
        run = begin_small(folder=opened, window_rows=window_rows)
        assert go(run, opened, cache, **options)
        return saved(opened)


@pytest.mark.parametrize("window_rows", [POOR, FAIR])
def test_written_or_found_makes_no_difference(tmp_path: Path, window_rows: int) -> None:
    cache = tmp_path / "cache"
    expected = whole(tmp_path / "a", cache, window_rows, n_threads=3)
    assert expected["cached"]["first_epoch"] == (0 if window_rows == POOR else 1)
    assert expected["cached"]["part_rows"] == 10
    assert [len(list(cache.iterdir())), *map(len, [list(path.iterdir()) for path in cache.iterdir()])] == [1, 5]
    for n_threads in (1, 2):
        assert whole(tmp_path / f"b{n_threads}", cache, window_rows, n_threads=n_threads) == expected
        assert whole(tmp_path / f"c{n_threads}", tmp_path / f"other{n_threads}", window_rows) == expected
    without = whole(tmp_path / "d", None, window_rows)
    assert without["theta"] != expected["theta"]
    assert (without["metrics"][0] == expected["metrics"][0]) == (window_rows == FAIR)


@pytest.mark.parametrize("window_rows", [POOR, FAIR])
def test_the_source_is_read_once(tmp_path: Path, window_rows: int) -> None:
    source = source_of()
    run = begin_small(source=source, window_rows=window_rows)
    before = source.n_read
    assert go(run, None, tmp_path)
    assert source.n_read - before == N_ROWS
    run = begin_small(source=source, window_rows=window_rows)
    before = source.n_read
    assert go(run, None, tmp_path)
    assert source.n_read == before


def test_without_shuffling_the_cache_changes_no_bit(tmp_path: Path) -> None:
    """Windows are others, rows are scaled from another file: what is learnt is the same."""
    config = config_of(shuffle=False)
    weights = np.random.default_rng(3).uniform(0.5, 2, N_ROWS)
    found = []
    for cache in (None, tmp_path / "cache"):
        run = begin_small(config, source_of(weight=weights), window_rows=POOR)
        assert go(run, None, cache)
        found.append(bits(run))
    assert found[0]["theta"] == found[1]["theta"]
    assert found[0]["average"] == found[1]["average"]
    assert found[0]["loss_curve"] == found[1]["loss_curve"]


def keep(cache: Path) -> None:
    """Leave the cache as it is."""


def lose(cache: Path) -> None:
    """Delete the cache, or what there is of it."""
    shutil.rmtree(cache, ignore_errors=True)


def zero(cache: Path) -> None:
    """Forget the last bytes that were written, as a power cut does, and all that says that it is whole."""
    for path in cache.glob("*/X.bin"):
        path.write_bytes(path.read_bytes()[:1000] + bytes(max(0, path.stat().st_size - 1000)))
    for path in cache.glob("*/cache.json"):
        path.unlink()


@pytest.mark.parametrize("meanwhile", [keep, lose, zero])
@pytest.mark.parametrize("window_rows", [POOR, FAIR])
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_stopped_anywhere_and_resumed(
    tmp_path: Path, window_rows: int, step: int, meanwhile: Callable[[Path], None]
) -> None:
    expected = whole(tmp_path / "whole", tmp_path / "cache", window_rows)
    cache, done, first = tmp_path / "other", False, True
    while not done:
        with RunFolder(tmp_path / "run") as folder:
            run = begin_small(folder=folder, window_rows=window_rows) if first else resume_small(folder)
            done, first = go(run, folder, cache, Stopper(after=step)), False
            found = saved(folder)
        meanwhile(cache)
    assert {name: found[name] for name in expected} == expected


def test_a_stopped_first_epoch_is_gone_on_with(tmp_path: Path) -> None:
    """No row is read again but those of the windows that were not trained on."""
    cache = tmp_path / "cache"
    with RunFolder(tmp_path / "run") as folder:
        assert not go(begin_small(folder=folder, window_rows=FAIR), folder, cache, Stopper(after=1))
        run = resume_small(folder)
        before = run.source.n_read  # type: ignore[attr-defined]
        rows = run.state.cursor[1] * FAIR
        assert rows > 0
        assert go(run, folder, cache)
        assert run.source.n_read - before == N_ROWS - rows  # type: ignore[attr-defined]
    assert len(list(cache.glob("*/cache.json"))) == 1


def test_what_was_written_before_is_checked_beside_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be as big as the data, and whoever waits must hear of signals meanwhile."""
    where, check, asked = [], CacheSource.require_whole, threading.Event()

    def require_whole(self: CacheSource) -> None:
        where.append(threading.current_thread().name)
        assert asked.wait(10)
        check(self)

    monkeypatch.setattr(CacheSource, "require_whole", require_whole)
    get = RunWindows.get

    def get_and_tell(self: RunWindows, timeout_s: float) -> Any:
        found = get(self, timeout_s)
        if where and found is None:
            asked.set()
        return found

    monkeypatch.setattr(RunWindows, "get", get_and_tell)
    with RunFolder(tmp_path / "run") as folder:
        assert not go(begin_small(folder=folder, window_rows=FAIR), folder, tmp_path / "cache", Stopper(after=1))
        assert go(resume_small(folder), folder, tmp_path / "cache")
    assert where == ["streamgd-cache"]
    assert len(list((tmp_path / "cache").glob("*/cache.json"))) == 1


def full_after(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Let the disk be full after some writes."""
    left, write = iter(range(n)), os.pwrite

    def full(descriptor: int, content: Any, at: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content, at)

    monkeypatch.setattr(os, "pwrite", full)


@pytest.mark.parametrize("window_rows", [POOR, FAIR])
@pytest.mark.parametrize("n", [0, 3, 15])
def test_a_full_disk_ends_the_cache_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_rows: int, n: int
) -> None:
    expected = whole(tmp_path / "without", None, window_rows)
    full_after(monkeypatch, n)
    watcher = Stopper()
    with RunFolder(tmp_path / "run") as folder:
        assert go(begin_small(folder=folder, window_rows=window_rows), folder, tmp_path / "cache", watcher)
        assert saved(folder) == expected
    assert len(watcher.messages) == 1
    assert "the disk is full" in watcher.messages[0]
    assert "goes on without" in watcher.messages[0]
    assert [path.name for path in (tmp_path / "cache").glob("*/*")] == ["lock"]


def test_no_room_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "free_bytes", lambda self: self.needed_bytes - 1)
    watcher = Stopper()
    assert go(begin_small(window_rows=POOR), None, tmp_path / "cache", watcher)
    assert "8,0" in watcher.notes[0] or "8 kB" in watcher.notes[0]
    assert "free; the run goes on without" in watcher.messages[0]
    assert [path.name for path in (tmp_path / "cache").glob("*/*")] == ["lock"]


def test_whoever_writes_the_cache_is_waited_for_however_little_room_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the other's writing that takes the room; the order of rows must not depend on when one looks."""
    first = begin_small(window_rows=POOR)
    place = Cache(tmp_path / "cache", first.source, first.survey.codec)
    writer = place.begin()
    assert writer is not None
    monkeypatch.setattr(Cache, "free_bytes", lambda self: 0)

    class Patient(Stopper):
        def message(self, text: str) -> None:
            super().message(text)
            fill(place, writer, first)

    watcher = Patient()
    with RunFolder(tmp_path / "run") as folder:
        assert go(begin_small(folder=folder, window_rows=POOR), folder, tmp_path / "cache", watcher)
        assert saved(folder)["cached"] is not None
    assert len(watcher.messages) == 1
    assert "waiting for another process" in watcher.messages[0]


def test_a_damaged_cache_that_cannot_be_removed_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    without = whole(tmp_path / "without", None, POOR)
    whole(tmp_path / "a", cache, POOR)
    os.truncate(next(cache.glob("*/y.bin")), 10)
    refuse_to_remove(monkeypatch)
    watcher = Stopper()
    with RunFolder(tmp_path / "b") as folder:
        assert go(begin_small(folder=folder, window_rows=POOR), folder, cache, watcher)
        assert saved(folder) == without
    assert "cannot be removed (Permission denied): remove" in watcher.messages[0]
    assert "goes on without" in watcher.messages[1]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    watcher = Stopper()
    assert go(begin_small(window_rows=FAIR), None, tmp_path / "file" / "cache", watcher)
    assert "goes on without" in watcher.messages[0]


def test_a_run_that_gave_its_cache_up_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(tmp_path / "without", None, FAIR)
    with RunFolder(tmp_path / "run") as folder:
        with monkeypatch.context() as full:
            full_after(full, 2)
            assert not go(begin_small(folder=folder, window_rows=FAIR), folder, tmp_path / "cache", Stopper(after=4))
        watcher = Stopper()
        assert go(resume_small(folder), folder, tmp_path / "cache", watcher)
        assert "goes on without a cache" in watcher.messages[0]
        assert saved(folder) == expected


def stopped_in_the_second_epoch(path: Path, cache: Path) -> None:
    with RunFolder(path) as folder:
        run = begin_small(folder=folder, window_rows=FAIR)
        assert not go(run, folder, cache, Stopper(after=5))
        assert run.state.cursor > (1, 0, 0)


def test_rows_in_the_order_of_a_cache_are_not_gone_on_with_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    stopped_in_the_second_epoch(tmp_path / "run", cache)
    with RunFolder(tmp_path / "run") as folder:
        with pytest.raises(ResumeError, match="was begun with a cache"):
            go(resume_small(folder), folder, None)
        lose(cache)
        with monkeypatch.context() as full:
            full_after(full, 3)
            with pytest.raises(CacheError, match="make room, or give it another folder, and resume"):
                go(resume_small(folder), folder, cache)
        assert go(resume_small(folder), folder, tmp_path / "another")
        assert saved(folder) == whole(tmp_path / "whole", tmp_path / "third", FAIR)


def test_damage_stops_the_run_which_then_writes_the_cache_anew(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    stopped_in_the_second_epoch(tmp_path / "run", cache)
    path = next(cache.glob("*/X.bin"))
    content = bytearray(path.read_bytes())
    for at in range(2, len(content), 120):  # every part, so that whichever is read next
        content[at] ^= 1
    path.write_bytes(content)
    with RunFolder(tmp_path / "run") as folder:
        with pytest.raises(CorruptDataError, match=r"is damaged: rows .* resume again"):
            go(resume_small(folder), folder, cache)
        expect_no_threads()
        assert go(resume_small(folder), folder, cache)
        assert saved(folder) == whole(tmp_path / "whole", tmp_path / "other", FAIR)


@pytest.mark.parametrize("after", [1, 5])
def test_a_run_is_not_gone_on_with_from_rows_that_were_changed_since(tmp_path: Path, after: int) -> None:
    """Neither the half of a cache nor a whole one; the data counts as the same, as the fingerprint says."""
    cache, watcher = tmp_path / "cache", Stopper()
    with RunFolder(tmp_path / "run") as folder:
        source = source_of()
        source.made["file"] = [100, 1]
        assert not go(begin_small(source=source, folder=folder, window_rows=FAIR), folder, cache, Stopper(after=after))
        source = source_of()
        source.made["file"] = [100, 2]
        assert go(resume_small(folder, source=source), folder, cache, watcher)
        assert saved(folder) == whole(tmp_path / "whole", tmp_path / "other", FAIR)
    assert "has changed since it was written (file)" in watcher.messages[0]
    assert "written anew" in watcher.messages[0]
    assert source.n_read >= N_ROWS
    assert json.loads(next(cache.glob("*/cache.json")).read_text())["stamp"]["file"] == [100, 2]


def test_a_cache_found_cut_short_is_written_anew(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected = whole(tmp_path / "a", cache, FAIR)
    os.truncate(next(cache.glob("*/y.bin")), 10)
    watcher = Stopper()
    with RunFolder(tmp_path / "b") as folder:
        assert go(begin_small(folder=folder, window_rows=FAIR), folder, cache, watcher)
        assert saved(folder) == expected
    assert "written anew" in watcher.messages[0]


@pytest.mark.parametrize("window_rows", [POOR, FAIR])
def test_two_runs_share_a_cache(tmp_path: Path, window_rows: int) -> None:
    """The second waits for the first, and reads what that one wrote."""
    cache, expected = tmp_path / "cache", whole(tmp_path / "whole", tmp_path / "alone", window_rows)
    source = source_of()
    first = begin_small(window_rows=window_rows)
    place = Cache(cache, first.source, first.survey.codec)
    writer = place.begin()
    assert writer is not None
    watcher, done = Stopper(), threading.Event()

    def run() -> None:
        with RunFolder(tmp_path / "second") as folder:
            train(
                begin_small(source=source, folder=folder, window_rows=window_rows),
                options=RunOptions(cache=cache),
                folder=folder,
                watcher=watcher,
            )
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    while not watcher.messages:
        assert not done.wait(0.01)
    assert "waiting for another process" in watcher.messages[0]
    fill(place, writer, first)
    thread.join()
    assert saved(RunFolder(tmp_path / "second")) == expected


def fill(place: Cache, writer: CacheWriter, run: Run) -> None:
    with WindowStream(run.source, run.layout, run.survey.codec, seed=1, keep=writer) as stream:
        last = [window.index for window in stream][-1]
    assert writer.finish(last) is not None
    writer.close()
    assert place.is_whole


def test_whoever_is_waited_for_may_die(tmp_path: Path) -> None:
    """Then the lock is free, and the run writes the cache itself; asked to stop meanwhile, it does."""
    first = begin_small(window_rows=POOR)
    writer = Cache(tmp_path / "cache", first.source, first.survey.codec).begin()
    assert writer is not None

    class Impatient(Stopper):
        def message(self, text: str) -> None:
            self.stop.set()

    with RunFolder(tmp_path / "run") as folder:
        assert not go(begin_small(folder=folder, window_rows=POOR), folder, tmp_path / "cache", Impatient())
        writer.close()
        assert go(resume_small(folder), folder, tmp_path / "cache")
        assert saved(folder) == whole(tmp_path / "whole", tmp_path / "other", POOR)


def test_a_disk_that_fails_when_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(tmp_path / "whole", tmp_path / "other", FAIR)

    def fail(self: Cache, sums: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Cache, "seal", fail)
    watcher = Stopper()
    with RunFolder(tmp_path / "run") as folder:
        assert go(begin_small(folder=folder, window_rows=FAIR), folder, tmp_path / "cache", watcher)
        assert saved(folder) == expected
    assert "will not be found by others" in watcher.messages[0]
    assert not list((tmp_path / "cache").glob("*/cache.json"))


def test_runs_in_memory_leave_no_half_cache(tmp_path: Path) -> None:
    run = begin_small(window_rows=FAIR)
    assert not go(run, None, tmp_path / "cache", Stopper(after=1))
    assert [path.name for path in (tmp_path / "cache").glob("*/*")] == ["lock"]


def test_bad_data_is_named_as_without_a_cache(tmp_path: Path) -> None:
    y = source_of().y.copy()
    source = source_of(y=y)
    run = begin_small(source=source, window_rows=POOR)
    y[123] = np.nan
    with pytest.raises(ValueError, match="fake, block 3, row 3: target 'y' is NaN"):
        go(run, None, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").glob("*/*")] == ["lock"]


def test_what_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cache=7: expected the path of a folder"):
        RunOptions(cache=7)  # type: ignore[arg-type]
    for path in ("", "a\0b"):
        with pytest.raises(OptionError, match="expected the path of a folder"):
            RunOptions(cache=path)


def test_small_sources_of_many_blocks() -> None:
    """Parts never reach over blocks, and a plan is made of metadata alone."""
    source = FakeSource((3,) * 50)
    cache = Cache("nowhere", source, begin_small().survey.codec)
    assert cache.parts.rows.tolist() == [3] * 50
    assert not Path("nowhere").exists()
    assert source.n_read == 0
