import gc
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace

import numpy as np
import pytest

from streamgd.data.plan import EpochPlan, checksum_of
from streamgd.data.prefetch import END, default_threads
from streamgd.data.targets import TargetCodec
from streamgd.data.window import Window
from streamgd.data.window_stream import WindowStream
from streamgd.errors import NonFiniteError
from tests.data.fake import FakeSource, expect_no_threads, layout_of, reader_threads

CODEC = TargetCodec(None)


@pytest.fixture(autouse=True)
def _no_thread_outlives_its_test():
    yield
    gc.collect()
    expect_no_threads()


def make(block_rows=(9, 4, 12, 7, 1, 8), window_rows=15, **options):
    source = FakeSource(block_rows, **options)
    return source, layout_of(source, window_rows=window_rows, slice_rows=5, n_open=3, piece_rows=2)


def contents(stream):
    """Take everything out of a stream: ((epoch, window, last), row numbers) of each window, with its hash."""
    found = []
    with stream:
        for window in stream:
            n = window.n_rows
            found.append(((window.epoch, window.index, window.last), window.y[:n, 0].tolist(), window.ids[:n].tolist()))
    return found


class TestOrder:
    def test_thread_count_and_depth_change_nothing(self):
        source, layout = make()
        expected = contents(WindowStream(source, layout, CODEC, seed=5, n_epochs=3, n_threads=1, depth=1))
        assert [where for where, *_ in expected][-1][0] == 2
        for n_threads in (1, 2, 5):
            for depth in (1, 2, 4):
                stream = WindowStream(source, layout, CODEC, seed=5, n_epochs=3, n_threads=n_threads, depth=depth)
                assert contents(stream) == expected

    def test_every_row_once_an_epoch(self):
        source, layout = make()
        windows = contents(WindowStream(source, layout, CODEC, seed=5, n_epochs=4))
        orders = set()
        for epoch in range(4):
            mine = [(rows, ids) for where, rows, ids in windows if where[0] == epoch]
            rows = [row for part, _ in mine for row in part]
            assert sorted(rows) == list(range(source.n_rows))
            assert sum(i for _, ids in mine for i in ids) % 2**64 == checksum_of(source.block_rows)
            orders.add(tuple(rows))
        assert len(orders) == 4

    def test_begins_anywhere(self):
        source, layout = make()
        expected = contents(WindowStream(source, layout, CODEC, seed=5, n_epochs=3))
        for k, (where, *_) in enumerate(expected):
            assert contents(WindowStream(source, layout, CODEC, seed=5, n_epochs=3, first=where[:2])) == expected[k:]
        after_the_first_epoch = [entry for entry in expected if entry[0][0] >= 1]
        n_windows = len(expected) - len([entry for entry in expected if entry[0][0] >= 1])
        found = contents(WindowStream(source, layout, CODEC, seed=5, n_epochs=3, first=(0, n_windows)))
        assert found == after_the_first_epoch

    def test_lanes(self):
        source, layout = make()
        lanes = [
            contents(WindowStream(source, layout, CODEC, seed=5, lane=lane, n_lanes=8, n_epochs=2)) for lane in range(8)
        ]
        rows = [row for lane in lanes for where, part, _ in lane if where[0] == 1 for row in part]
        assert sorted(rows) == list(range(source.n_rows))
        assert [] in lanes  # more lanes than blocks

    def test_an_empty_lane_ends_even_if_epochs_do_not(self):
        source, layout = make(block_rows=(5,))
        with WindowStream(source, layout, CODEC, seed=0, lane=1, n_lanes=2, n_epochs=None) as stream:
            assert stream.get() is END

    def test_without_shuffling(self):
        source, layout = make()
        windows = contents(WindowStream(source, layout, CODEC, seed=5, shuffle=False, n_threads=3))
        assert [row for _, rows, _ in windows for row in rows] == list(range(source.n_rows))

    @pytest.mark.parametrize("kind", ["fake", "memory"])
    def test_data_that_fits_is_read_once_and_gives_the_same(self, kind):
        rows = (9, 4, 12)
        source, other = FakeSource(rows, kind=kind), FakeSource(rows)
        again, once = (layout_of(source, window_rows=25, resident=resident) for resident in (False, True))
        expected = contents(WindowStream(other, again, CODEC, seed=1, n_epochs=5))
        assert contents(WindowStream(source, once, CODEC, seed=1, n_epochs=5)) == expected
        assert source.n_read == 25
        assert other.n_read == 125

    def test_small_data_in_memory_takes_no_thread(self):
        source = FakeSource([15], kind="memory")
        with WindowStream(source, layout_of(source, window_rows=15), CODEC, seed=1, n_epochs=50) as stream:
            for window in stream:
                assert window.n_rows == 15
                assert reader_threads() == []
            assert stream.exhausted


class TestWaiting:
    def test_a_timeout_returns_none_and_loses_nothing(self):
        source, layout = make()
        gate = threading.Event()
        source.before_read = lambda block, row: gate.wait(10)
        with WindowStream(source, layout, CODEC, seed=0) as stream:
            begin = time.perf_counter()
            assert stream.get(timeout_s=0.02) is None
            assert 0.015 < time.perf_counter() - begin < 5
            assert not stream.exhausted
            gate.set()
            rows = [row for window in stream for row in window.y[: window.n_rows, 0].tolist()]
            assert sorted(rows) == list(range(source.n_rows))
            assert stream.get() is END
            assert stream.get(timeout_s=0) is END
            assert stream.exhausted

    def test_the_next_epoch_is_read_while_this_one_is_consumed(self):
        source, layout = make(window_rows=100)
        with WindowStream(source, layout, CODEC, seed=0, n_epochs=3) as stream:
            window = stream.get()
            assert isinstance(window, Window)
            assert window.last
            end = time.monotonic() + 5
            while source.n_read < 2 * source.n_rows and time.monotonic() < end:
                time.sleep(0.002)
            time.sleep(0.02)
            assert source.n_read == 2 * source.n_rows  # and no further: there are two windows
            assert window.epoch == 0  # the one that is handed out is left alone

    def test_counts_time_and_bytes(self):
        source, layout = make()
        source.before_read = lambda block, row: time.sleep(0.001)
        with WindowStream(source, layout, CODEC, seed=0) as stream:
            for _ in stream:
                pass
            assert stream.read_bytes == source.stored_bytes
            assert stream.fill_s > 0.01
            assert 0.01 < stream.wait_s < stream.fill_s + 1

    def test_threads_default_to_the_processors_of_the_process(self):
        assert 1 <= default_threads() <= 4096


class TestEnding:
    def test_an_error_comes_after_the_windows_before_it_with_its_cause(self):
        source, layout = make()
        plans = list(EpochPlan(source.block_rows, layout, seed=5, epoch=0).windows())
        block, start, _ = plans[2].slices[0]

        def fail(b, row):
            if (b, row) == (block, start):
                raise OSError("the disk is gone") from ValueError("loose cable")

        for n_threads in (1, 3):
            source.before_read = fail
            with WindowStream(source, layout, CODEC, seed=5, n_threads=n_threads) as stream:
                good = [stream.get().index for _ in range(2)]
                assert good == [0, 1]
                for _ in range(2):  # and again, if asked again
                    with pytest.raises(OSError, match="the disk is gone") as error:
                        stream.get()
                    assert isinstance(error.value.__cause__, ValueError)
                    assert "fail" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
            assert source.n_open == 0

    def test_bad_numbers_arrive_as_such(self):
        X = np.zeros((30, 3), np.float32)
        X[29, 1] = np.inf
        for kind in ("fake", "memory"):
            source = FakeSource([10, 20], X, kind=kind)
            with (
                WindowStream(source, layout_of(source, window_rows=30), CODEC, seed=0) as stream,
                pytest.raises(NonFiniteError, match="block 1, row 19: feature number 1 is inf"),
            ):
                stream.get()

    @pytest.mark.parametrize("n_taken", [0, 1, 3])
    def test_close_in_the_middle(self, n_taken):
        source, layout = make(block_rows=[20] * 30)
        source.before_read = lambda block, row: time.sleep(0.0005)
        stream = WindowStream(source, layout, CODEC, seed=0, n_threads=3, n_epochs=None)
        for _ in range(n_taken):
            stream.get()
        stream.close()
        assert reader_threads() == []
        assert source.n_open == 0
        assert stream.get() is END
        stream.close()

    def test_leaving_by_an_interrupt(self):
        source, layout = make(block_rows=[20] * 30)

        def use():
            with WindowStream(source, layout, CODEC, seed=0, n_threads=3) as stream:
                stream.get()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            use()
        assert reader_threads() == []
        assert source.n_open == 0

    def test_a_stream_that_is_forgotten_closes_itself(self):
        source, layout = make(block_rows=[20] * 30)
        stream = WindowStream(source, layout, CODEC, seed=0, n_epochs=None)
        stream.get()
        del stream
        gc.collect()
        expect_no_threads()
        assert source.n_open == 0

    def test_the_consumer_waits_for_no_condition(self, monkeypatch):
        """An interrupt that comes while one takes its lock again would let go of somebody else's."""
        wait, waits = threading.Condition.wait, []

        def noted(self, timeout=None):
            waits.append(threading.current_thread())
            return wait(self, timeout)

        monkeypatch.setattr(threading.Condition, "wait", noted)
        source = FakeSource([20] * 30)
        source.before_read = lambda block, row: time.sleep(0.001)
        with WindowStream(source, layout_of(source, window_rows=50), None, seed=0, n_threads=3) as stream:
            waits.clear()  # of threads that start
            assert stream.get(timeout_s=0.0) is None
            assert sum(window.n_rows for window in stream) == 600
            assert stream.wait_s > 0.01
            assert threading.main_thread() not in waits

    def test_python_exits_with_a_stream_open(self):
        code = """
from tests.data.fake import FakeSource, layout_of
from streamgd.data.window_stream import WindowStream
source = FakeSource([20] * 30)
stream = WindowStream(source, layout_of(source, window_rows=50), None, seed=0, n_epochs=None, n_threads=3)
stream.get()
print("done")
"""
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


class Borrower(FakeSource):
    """Notes the memory that it is lent."""

    def lend(self, n_bytes):
        self.__dict__.setdefault("lent", []).append(n_bytes)


@pytest.mark.parametrize("n_lanes", [1, 2])
def test_the_source_may_take_what_the_plan_leaves_until_all_is_read(n_lanes):
    source = Borrower([9, 4, 12, 7, 1, 8])
    layout = replace(layout_of(source, window_rows=15), buffer_bytes=10_000, planned_bytes=7_000)
    with WindowStream(source, layout, TargetCodec(None, 1), seed=0, n_lanes=n_lanes) as stream:
        assert source.__dict__.get("lent", [])[:1] == ([3_000] if n_lanes == 1 else [])
        for _ in stream:
            pass
    lent = source.__dict__.get("lent", [])
    assert lent[1:] == [0] * (len(lent) - 1)
    assert (len(lent) >= 2) == (n_lanes == 1)
