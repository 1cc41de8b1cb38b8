"""Lanes on one machine: the same bits for any number of threads, from any checkpoint, wherever a reader begins."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgd.data.plan import EpochPlan
from streamgd.data.sources import open_source
from streamgd.data.window import Stopped
from streamgd.errors import BufferTooSmallError, DataError, DivergenceError, OptionError
from streamgd.estimators import SGDRegressor
from streamgd.learn import kernels
from streamgd.run.config import RunOptions
from streamgd.run.folder import RunFolder
from streamgd.run.lane_rows import LaneReader, more_windows
from streamgd.run.lanes import LaneWork, open_reader, read_ahead, take_turn
from streamgd.run.loop import Watcher, train
from streamgd.run.rounds import RoundTraining, play_rounds
from streamgd.run.runs import Run, plan_for, prepare
from streamgd.run.turns import Span, Turns
from tests.clustering import OPTIMIZERS, bits, estimator, load, make_data
from tests.data.fake import FakeSource, layout_of
from tests.run import small

BLOCKS = (40, 17, 40, 40, 33, 40, 5, 40, 40, 28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rows")
    make_data(made)
    return made


def begin_lanes(n_lanes: int = 3, source: FakeSource | None = None, folder: RunFolder | None = None, **options: Any):
    config = small.config_of(n_lanes=n_lanes, buffer_bytes=60_000, **options)
    run = small.begin_small(config, source or small.source_of(BLOCKS), folder)
    run.layout = layout_of(run.source, window_rows=60, n_open=2, slice_rows=20)
    return run


def trained(run: Run, **options: Any) -> dict[str, Any]:
    assert train(run, **options)
    return small.bits(run)


class TestBits:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_threads_change_nothing(self, optimizer):
        options = OPTIMIZERS[optimizer]
        one = trained(begin_lanes(**options), options=RunOptions(n_threads=1))
        assert trained(begin_lanes(**options), options=RunOptions(n_threads=3)) == one

    def test_lanes_are_part_of_the_model(self):
        assert trained(begin_lanes(2))["theta"] != trained(begin_lanes(3))["theta"]

    def test_memory_in_another_form_gives_the_same(self, folder):
        X, y = load(folder, "dask")
        array = estimator().fit(np.asarray(X), np.asarray(y))
        again = estimator(n_threads=1).fit(np.asarray(X), np.asarray(y))
        assert bits(array) == bits(again)

    def test_every_row_is_seen_once_an_epoch(self):
        run = begin_lanes()
        train(run)
        assert run.state.epoch == 3
        assert run.state.counters[kernels.N_ROWS] == 3 * sum(BLOCKS)

    def test_more_lanes_than_blocks(self):
        source = small.source_of((50, 7, 30))
        run = begin_lanes(8, source)
        train(run)
        assert run.state.counters[kernels.N_ROWS] == 3 * 87
        assert trained(begin_lanes(8, source), options=RunOptions(n_threads=1)) == small.bits(run)

    def test_lanes_without_rows_plan_nothing(self, monkeypatch):
        """Epochs to come are many where the number of epochs is chosen by the data."""
        made = []

        class Counted(EpochPlan):
            def __init__(self, *args: Any, **options: Any) -> None:
                made.append(options["lane"])
                super().__init__(*args, **options)

        monkeypatch.setattr("streamgd.run.lane_rows.EpochPlan", Counted)
        train(begin_lanes(8, small.source_of((50, 30)), max_iter=40, tol=None))
        assert len(made) < 8 + 4 * 40  # of two lanes those of each epoch, and of the others the first

    def test_one_lane_is_the_run_without_lanes(self):
        plain, rounds = small.begin_small(), small.begin_small()
        train(plain)
        options = RunOptions(n_threads=2), None, Watcher(), threading.Event()
        assert RoundTraining(rounds, *options, None).go()
        assert small.bits(plain) == small.bits(rounds)

    def test_partial_fit_goes_on_in_lanes(self, folder):
        X, y = (np.asarray(part) for part in load(folder, "dask"))
        model = estimator()
        for _ in range(2):
            model.partial_fit(X, y)
        assert model.n_iter_ == 2
        assert model.score(X, y) > 0.5


class TestTurns:
    def test_a_turn_is_pure(self):
        run = begin_lanes()
        work = LaneWork(run, run.source, n_threads=1, most_readers=3)
        packed = run.packed(moments=False)
        before = small.bits(run)
        first = take_turn(work, run.state, packed, 1, Span(0, 0, 64))
        take_turn(work, run.state, packed, 1, Span(0, 64, 96))  # leaves a reader in the middle of a window
        again = take_turn(work, run.state, packed, 1, Span(0, 0, 64))
        fresh = LaneWork(run, run.source, n_threads=2, most_readers=0)
        elsewhere = take_turn(fresh, run.state, packed, 1, Span(0, 0, 64))
        for turn in (again, elsewhere):
            assert turn.found is not None
            assert turn.found.theta.tobytes() == first.found.theta.tobytes()
            assert turn.found.checksum == first.found.checksum
        assert small.bits(run) == before
        work.readers.close()
        fresh.readers.close()
        assert run.source.n_open == 0

    @pytest.mark.parametrize("row", [0, 32, 64, 96])
    def test_a_reader_begins_at_any_row(self, row):
        run = begin_lanes()
        packed = run.packed(moments=False)
        work = LaneWork(run, run.source, n_threads=1, most_readers=3)
        for first in range(0, row, 32):
            take_turn(work, run.state, packed, 0, Span(0, first, first + 32))
        came_by = take_turn(work, run.state, packed, 0, Span(0, row, row + 32))
        work.readers.close()
        jumped = take_turn(
            LaneWork(run, run.source, n_threads=1, most_readers=0), run.state, packed, 0, Span(0, row, row + 32)
        )
        assert came_by.found.theta.tobytes() == jumped.found.theta.tobytes()
        assert came_by.found.checksum == jumped.found.checksum

    def test_a_lane_without_rows_left_says_so(self):
        run = begin_lanes()
        work = LaneWork(run, run.source, n_threads=1, most_readers=0)
        turn = take_turn(work, run.state, run.packed(moments=False), 0, Span(0, 10_000, 10_032))
        assert turn.found is None
        assert turn.done

    def test_kept_readers_are_bounded(self):
        run = begin_lanes()
        work = LaneWork(run, run.source, n_threads=1, most_readers=1)
        for lane in range(3):
            take_turn(work, run.state, run.packed(moments=False), lane, Span(0, 0, 32))
        assert len(work.readers._idle) == 1
        work.readers.close()

    def test_windows_of_rows(self):
        source = small.source_of(BLOCKS)
        layout = layout_of(source, window_rows=60, n_open=2, slice_rows=20)
        plan = EpochPlan(source.block_rows, layout, seed=3, epoch=1, lane=1, n_lanes=2)
        before = 0
        for window in plan.windows():
            for row in (before, before + window.n_rows - 1):
                assert plan.window_at(row) == (window.index, before)
            before += window.n_rows
        assert plan.window_at(before) == (plan.n_windows, plan.n_rows)
        assert plan.window_at(before + 1000) == (plan.n_windows, plan.n_rows)

    def test_turns_grow_up_to_a_bound(self):
        turns = Turns(batch_rows=32, most_rows=3200, lane_rows=10**6, grow=True)
        ends, row = [], 0
        while row < 10**6:
            ends.append(turns.at(0, row).n_rows)
            row += ends[-1]
        assert ends[0] == 32
        assert ends == sorted(ends)
        assert ends[-1] == 3200
        assert all(length % 32 == 0 for length in ends)
        assert turns.at(1, 0) == Span(1, 0, 3200)  # a later epoch does not begin anew


class TestResuming:
    def test_from_every_checkpoint(self, tmp_path):
        whole_folder = RunFolder(tmp_path / "whole")
        with whole_folder as folder:
            whole = trained(begin_lanes(folder=folder), folder=folder)

        class StopAfter(Watcher):
            def __init__(self, n: int, stop: threading.Event) -> None:
                self.left, self.stop = n, stop

            def advanced(self, run: Run, stream: Any) -> None:
                self.left -= 1
                if self.left == 0:
                    self.stop.set()

        for n in (1, 2, 5, 9):
            with RunFolder(tmp_path / f"stopped-{n}") as folder:
                run, stop = begin_lanes(folder=folder), threading.Event()
                assert not train(run, folder=folder, watcher=StopAfter(n, stop), stop=stop)
            with RunFolder(tmp_path / f"stopped-{n}") as folder:
                resumed = small.resume_small(folder, source=small.source_of(BLOCKS))
                assert resumed.state.cursor == run.state.cursor
                assert trained(resumed, folder=folder) == whole
                assert small.saved(folder)["metrics"] == small.saved(whole_folder)["metrics"]

    def test_another_number_of_lanes_is_refused(self, folder, tmp_path):
        X, _ = load(folder, "hdf5")
        estimator(checkpoint_dir=tmp_path).fit(X)
        other = estimator(n_lanes=2, checkpoint_dir=tmp_path).fit(X, resume=True)
        assert other.run_dir_ != estimator(checkpoint_dir=tmp_path).fit(X, resume=True).run_dir_


class TestErrors:
    def test_data_that_ends_a_run_leaves_the_last_whole_round(self, tmp_path):
        source = small.source_of(BLOCKS)
        source.X = source.X.copy()
        with RunFolder(tmp_path / "run") as folder:
            run = begin_lanes(source=source, folder=folder)
            source.X[300:] = np.nan
            with pytest.raises(DataError, match="feature number 0 is NaN"):
                train(run, folder=folder)
            assert folder.newest(small.never) is not None
        assert source.n_open == 0

    def test_divergence_names_the_round(self):
        run = begin_lanes(optimizer="sgd", learning_rate="constant", eta0=1e200, standardize=False)
        with pytest.raises(DivergenceError, match="epoch 1, round"):
            train(run)

    @pytest.mark.parametrize("n_lanes", [2, 4])
    @pytest.mark.parametrize("eta0", [0.1, 1.0, 50.0])
    def test_divergence_in_the_first_batch_of_a_turn(self, n_lanes, eta0):
        """Which then has no rows."""
        rng = np.random.default_rng(0)
        X = rng.normal(size=(4000, 6)) * 1e3
        model = SGDRegressor(
            optimizer="sgd", learning_rate="constant", eta0=eta0, standardize=False, n_lanes=n_lanes, max_iter=3
        )
        with pytest.raises(DivergenceError, match="epoch 1, round"):
            model.fit(X, X @ rng.normal(size=6))

    def test_the_buffer_is_for_all_lanes(self):
        source = small.source_of(BLOCKS, open_block_bytes=1000)
        with pytest.raises(BufferTooSmallError, match="shared by 50 lanes") as caught:
            plan_for(source, replace(small.config_of(), n_lanes=50))
        needed = caught.value.needed_bytes
        layout = plan_for(source, replace(small.config_of(), n_lanes=50, buffer_bytes=needed))
        assert 50 * layout.planned_bytes <= needed

    def test_the_buffer_that_is_asked_for_is_enough(self):
        X = np.random.default_rng(0).normal(size=(20_000, 8))
        model = SGDRegressor(n_lanes=4, buffer="20kB", max_iter=1, tol=None)
        with pytest.raises(BufferTooSmallError) as caught:
            model.fit(X, X[:, 0])
        (asked,) = re.findall(r"buffer='(\w+)'", str(caught.value))
        model.set_params(buffer=asked).fit(X, X[:, 0])

    @pytest.mark.parametrize(("n_lanes", "told"), [(10, []), (13, ["3 of these have no rows"])])
    def test_lanes_without_rows_are_told(self, n_lanes, told):
        run, notes = (
            prepare(
                small.source_of(BLOCKS), replace(small.config_of(), n_lanes=n_lanes, max_iter=1, buffer_bytes=10**6)
            ),
            [],
        )
        watcher = Watcher()
        watcher.note = notes.append
        train(run, watcher=watcher)
        assert len(notes) == len(told)
        assert all(text in note for text, note in zip(told, notes, strict=True))

    @pytest.mark.parametrize("n_lanes", [0, 1.5, True, 5000])
    def test_lanes_that_are_no_number(self, n_lanes):
        with pytest.raises(OptionError, match="n_lanes"):
            replace(small.config_of(), n_lanes=n_lanes)

    def test_no_thread_is_left(self):
        before = threading.active_count()
        train(begin_lanes())
        assert threading.active_count() == before


def settled(work: LaneWork, lane: int) -> LaneReader:
    return small.settled(work.readers._idle[lane])


def test_windows_are_filled_ahead_as_far_as_there_is_room():
    run = begin_lanes(2, max_iter=3)
    for n_windows in (2, 5):
        work = LaneWork(run, run.source, n_threads=2, most_readers=2)
        work.n_windows = n_windows
        take_turn(work, run.state, run.packed(moments=False), 0, Span(0, 0, 8))
        reader = settled(work, 0)
        assert reader._ready.qsize() == n_windows - 1
        assert not reader._free
        work.readers.close()


def test_more_windows_are_of_what_the_plan_leaves():
    run = begin_lanes(2)
    layout = replace(run.layout, planned_bytes=1000, window_bytes=100)
    for spare, more in ((0, 0), (99, 0), (100, 1), (399, 3), (10_000, 4), (-500, 0)):
        assert more_windows(replace(layout, buffer_bytes=1000 + spare), run.source) == more


def test_a_lane_that_comes_has_read_before_its_first_turn():
    run = begin_lanes(2)
    packed = run.packed(moments=False)
    work, fresh = (LaneWork(run, run.source, n_threads=2, most_readers=2) for _ in range(2))
    read_ahead(work, 1, 0, 24)
    reader = settled(work, 1)
    read_ahead(work, 1, 0, 0)  # too late: it is here
    assert work.readers._idle[1] is reader
    turns = [take_turn(each, run.state, packed, 1, Span(0, 24, 90)).found for each in (work, fresh)]
    assert work.readers._idle[1] is reader
    assert turns[0].theta.tobytes() == turns[1].theta.tobytes()
    assert turns[0].checksum == turns[1].checksum
    work.readers.close()
    fresh.readers.close()


@pytest.mark.parametrize("n_threads", [1, 2])
def test_lanes_that_wait_for_a_thread_do_not_count_as_training(n_threads: int, monkeypatch: pytest.MonkeyPatch):
    """Else reading never looks like the limit where a thread trains several lanes, one after the other."""
    fill = LaneReader._fill

    def slowly(self: LaneReader, *arguments: Any) -> None:
        time.sleep(0.02)
        fill(self, *arguments)

    train(begin_lanes(4))  # compiles
    waited: list[float] = []
    watcher = Watcher()
    monkeypatch.setattr(watcher, "advanced", lambda _, reading: waited.append(reading.wait_s))
    monkeypatch.setattr(LaneReader, "_fill", slowly)
    run = begin_lanes(4)
    began = time.perf_counter()
    train(run, options=RunOptions(n_threads=n_threads), watcher=watcher)
    assert 0.5 < waited[-1] / (time.perf_counter() - began) < 1.05


def test_readers_in_use_count_among_the_most():
    run = begin_lanes(3)
    work = LaneWork(run, run.source, n_threads=2, most_readers=2)
    readers = [open_reader(work, lane, 0, 0, None) for lane in (0, 1)]
    work.readers.give_back(readers[0], 2)
    last = open_reader(work, 2, 0, 0, None)  # while that of lane 1 is in use: that of lane 0 makes room
    assert not work.readers.has(0)
    assert readers[0]._closed
    assert work.readers.has(1)
    read_ahead(work, 1, 0, 24)  # too late: it is in use
    work.readers.discard(readers[1])
    work.readers.give_back(last, 2)
    assert list(work.readers._idle) == [2]
    assert not work.readers.has(1)
    work.readers.close()


def test_a_closed_reader_holds_no_windows():
    """Whoever still knows of it: they are most of a lane's memory, and there may be no room for others beside them."""
    run = begin_lanes(2)
    work = LaneWork(run, run.source, n_threads=1, most_readers=2)
    take_turn(work, run.state, run.packed(moments=False), 0, Span(0, 0, 8))
    reader = settled(work, 0)
    windows = [weakref.ref(window) for window in (reader._window, *reader._free) if window is not None]
    windows += [weakref.ref(window) for window in [reader._ready.get() for _ in range(reader._ready.qsize())]]
    assert windows
    reader.close()
    assert all(window() is None for window in windows)
    with pytest.raises(Stopped):
        next(reader.pieces(8))
    work.readers.close()


def test_an_error_keeps_nothing_open():
    """Not even until it is collected: its traceback must not lead back to it."""
    run = begin_lanes(2)
    run.source.X[:] = np.nan
    work = LaneWork(run, run.source, n_threads=1, most_readers=2)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(DataError) as found:
            take_turn(work, run.state, run.packed(moments=False), 0, Span(0, 0, 64))
        kept = weakref.ref(found.value)
        del found
        work.readers.close()
        until = time.monotonic() + 5
        while kept() is not None and time.monotonic() < until:
            time.sleep(0.01)
        assert kept() is None
    finally:
        gc.enable()


def test_a_lane_that_leaves_reads_no_further_unless_it_stays_after_all():
    run = begin_lanes(2)
    packed = run.packed(moments=False)
    work, fresh = (LaneWork(run, run.source, n_threads=2, most_readers=2) for _ in range(2))
    work.n_windows = 5
    play_rounds(work, run.state, packed, [Span(0, 0, 8), Span(0, 8, 16)], leaving=[1])
    assert settled(work, 1)._planned <= 16 + run.layout.window_rows
    assert settled(work, 0)._planned > 16 + run.layout.window_rows
    turns = [take_turn(each, run.state, packed, 1, Span(0, 16, 130)).found for each in (work, fresh)]
    assert turns[0].theta.tobytes() == turns[1].theta.tobytes()
    work.readers.close()
    fresh.readers.close()


def test_lanes_share_the_files_that_they_have_open(tmp_path: Path) -> None:
    """One set for each lane, and many lanes over many files run out of descriptors."""
    import h5py

    n_files, rng = 30, np.random.default_rng(0)
    for i in range(n_files):
        X = rng.normal(size=(60, 4)).astype("f4")
        with h5py.File(tmp_path / f"{i}.h5", "w") as file:
            file["X"], file["y"] = X, X[:, 0]
    source = open_source(str(tmp_path / "*.h5"), "y")
    assert source.is_flat
    most: list[int] = []

    class Counting(Watcher):
        def advanced(self, run: Run, stream: Any) -> None:
            links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
            most.append(sum(link.parent == tmp_path for link in links))

    run = prepare(source, small.config_of(n_lanes=8, max_iter=3, buffer_bytes=100_000))
    train(run, options=RunOptions(n_threads=2), watcher=Counting())
    assert 0 < max(most) <= 2 * n_files  # those that HDF5 has open, and those that all lanes read from
    source.close()


def test_a_batch_is_shared_by_the_lanes():
    config = replace(small.config_of(batch_size=256), n_lanes=4)
    assert config.batch_rows(10**6) == 64
    assert replace(config, n_lanes=64).batch_rows(10**6) == 32
    assert replace(small.config_of(batch_size=8), n_lanes=64).batch_rows(10**6) == 8
    assert prepare(small.source_of(BLOCKS), replace(config, buffer_bytes=10**6)).state.carry_X.shape[0] == 64


def test_many_lanes_are_not_led_astray_by_heavy_tails():
    """Where the first rounds go too far, the gradients of a few extreme rows are the end of learning."""
    rng = np.random.default_rng(0)
    X = np.exp(2.5 * rng.standard_normal((300_000, 20)))
    signal = X @ (rng.standard_normal(20) / X.std(axis=0))
    y = signal + signal.std() * rng.standard_normal(len(X))
    fitted = SGDRegressor(n_lanes=16, max_iter=1, tol=None, random_state=2).fit(X, y)
    assert fitted.score(X, y) > 0.49  # 0.5 is what can be explained; it was -2.9
