import threading
import time
from concurrent.futures import wait

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamgd.data.window
from streamgd.data.plan import EpochPlan, checksum_of
from streamgd.data.targets import TargetCodec
from streamgd.data.window import ResidentFiller, Stopped, Window, WindowFiller
from streamgd.errors import NonFiniteError, OptionError
from tests.data.fake import FakeSource, expect_no_threads, layout_of, repeatable


def fill_epoch(source, layout, *, n_threads=1, seed=0, epoch=0, codec=None, shuffle=True, lane=0, n_lanes=1, **scaling):
    """Fill every window of an epoch; copies of (X, y, weight, ids)."""
    codec = codec or (TargetCodec(None) if source.target else None)
    window = Window(layout, source)
    plan = EpochPlan(source.block_rows, layout, seed=seed, epoch=epoch, shuffle=shuffle, lane=lane, n_lanes=n_lanes)
    found = []
    with WindowFiller(source, layout, codec, n_threads=n_threads, **scaling) as filler:
        for window_plan in plan.windows():
            filler.fill(window, window_plan)
            assert (window.epoch, window.index, window.last) == (epoch, window_plan.index, window_plan.last)
            n = window.n_rows
            weight = None if window.weight is None else window.weight[:n].copy()
            found.append((window.X[:n].copy(), window.y[:n].copy(), weight, window.ids[:n].copy()))
    return found


def reference(source, layout, *, seed=0, epoch=0):
    """What the windows must hold, by NumPy alone."""
    found = []
    for plan in EpochPlan(source.block_rows, layout, seed=seed, epoch=epoch).windows():
        rows = np.concatenate([np.arange(n) + source.row_of(b, s) for b, s, n in plan.slices])
        placed = np.empty_like(rows)
        placed[plan.places()] = rows
        found.append(placed)
    return found


@repeatable
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=15),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 7),
    st.data(),
)
def test_windows_hold_what_the_plan_says(block_rows, columns, n_open, n_threads, piece_rows, data):
    weight = np.linspace(0, 1, sum(block_rows)) if data.draw(st.booleans()) else None
    source = FakeSource(block_rows, columns=columns, weight=weight)
    longest = max(block_rows)
    slice_rows = data.draw(st.integers(1, longest))
    layout = layout_of(
        source,
        window_rows=data.draw(st.integers(slice_rows, 3 * longest)),
        slice_rows=slice_rows,
        n_open=n_open,
        piece_rows=piece_rows,
    )
    windows = fill_epoch(source, layout, n_threads=n_threads, seed=4, epoch=2)
    expected = reference(source, layout, seed=4, epoch=2)
    assert len(windows) == len(expected)
    for (X, y, w, _), rows in zip(windows, expected, strict=True):
        assert np.array_equal(X, source.X[rows])
        assert y[:, 0].tolist() == rows.tolist()
        assert w is None if weight is None else np.array_equal(w, weight[rows])
    total = sum(int(ids.sum(dtype=np.uint64)) for *_, ids in windows) % 2**64
    assert total == checksum_of(source.block_rows)
    assert source.most_open <= n_open
    assert source.n_open == 0


def test_threads_change_nothing_and_keep_to_the_open_blocks():
    """With delays that differ from block to block, so that threads overtake each other."""
    source = FakeSource(np.random.default_rng(0).integers(1, 30, 60))
    generator = np.random.default_rng(1)
    source.before_read = lambda block, row: time.sleep(generator.choice([0, 0, 0.0005]))
    layout = layout_of(source, window_rows=100, slice_rows=6, n_open=4, piece_rows=3)
    single = fill_epoch(source, layout, n_threads=1)
    assert source.threads == {threading.current_thread().name}
    source.most_open = 0
    many = fill_epoch(source, layout, n_threads=6)
    assert len(source.threads) > 2
    assert source.most_open <= 4
    for one, other in zip(single, many, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a is b is None or a.tobytes() == b.tobytes()
    expect_no_threads()


def test_a_block_that_waits_for_room_gets_it():
    """One block open at a time, and more threads than that: whoever comes later must not take the room first."""
    source = FakeSource([50, 1, 1, 50, 1, 50])
    source.before_read = lambda block, row: time.sleep(0.001)
    layout = layout_of(source, window_rows=12, slice_rows=4, n_open=1, piece_rows=4)
    for seed in range(5):
        fill_epoch(source, layout, n_threads=8, seed=seed)
    assert source.most_open == 1


def test_blocks_stay_open_from_window_to_window():
    source = FakeSource([1000, 1000])
    layout = layout_of(source, window_rows=20, slice_rows=10, n_open=2, piece_rows=5)
    assert len(fill_epoch(source, layout)) == 100
    assert source.n_opened == 2


def test_a_jump_closes_what_was_open():
    source = FakeSource([100, 100, 100])
    layout = layout_of(source, window_rows=20, slice_rows=10, n_open=2, piece_rows=5)
    plans = list(EpochPlan(source.block_rows, layout, seed=0, epoch=0).windows())
    window = Window(layout, source)
    with WindowFiller(source, layout, TargetCodec(None)) as filler:
        for plan in (plans[0], plans[9], plans[2], plans[3]):
            filler.fill(window, plan)
            rows = reference(source, layout)[plan.index]
            assert window.y[: window.n_rows, 0].tolist() == rows.tolist()
            assert source.n_open <= 2


def test_the_source_hears_what_comes():
    source = FakeSource([10] * 6)
    layout = layout_of(source, window_rows=20)
    plans = list(EpochPlan(source.block_rows, layout, seed=0, epoch=0).windows())
    with WindowFiller(source, layout, None) as filler:
        filler.fill(Window(layout, source), plans[0], plans[1])
    assert source.announced == [plans[0].opened_blocks() + plans[1].opened_blocks()]
    assert len(source.announced[0]) == 4


def test_scaling():
    source = FakeSource([50, 50])
    layout = layout_of(source, window_rows=100)
    shift, factor = np.array([1.0, 2.0, 3.0]), np.array([0.1, 1 / 3, 7.0])
    ((X, y, _, _),) = fill_epoch(source, layout, shift=shift, factor=factor)
    rows = y[:, 0].astype(int)
    assert np.array_equal(X, ((source.X[rows].astype(np.float64) - shift) * factor).astype(np.float32))


def test_targets_of_text_and_of_several_columns():
    labels = pa.array([f"class {i % 3}" for i in range(40)])
    source = FakeSource([10] * 4, y=labels)
    layout = layout_of(source, window_rows=20)
    codec = TargetCodec(np.array(["class 0", "class 1", "class 2"]))
    codes = np.concatenate([y[:, 0] for _, y, _, _ in fill_epoch(source, layout, codec=codec, n_threads=2)])
    assert codes.tolist() == [row % 3 for row in np.concatenate(reference(source, layout)).tolist()]

    several = FakeSource([10] * 4, y=np.arange(80.0).reshape(40, 2))
    layout = layout_of(several, window_rows=20, n_outputs=2)
    y = np.concatenate([y for _, y, _, _ in fill_epoch(several, layout, codec=TargetCodec(None, 2))])
    assert np.array_equal(y, several.y[np.concatenate(reference(several, layout))])


def test_no_target():
    source = FakeSource([10] * 4, with_target=False)
    layout = layout_of(source, window_rows=20, n_outputs=0)
    windows = fill_epoch(source, layout)
    assert all(y.shape == (20, 0) for _, y, _, _ in windows)


class TestFailure:
    @pytest.mark.parametrize("n_threads", [1, 4])
    def test_an_error_of_a_reader_keeps_its_cause_and_closes_everything(self, n_threads):
        source = FakeSource([20] * 10)

        def fail(block, row):
            if block == 7:
                raise OSError("the disk is gone")

        source.before_read = fail
        with pytest.raises(OSError, match="the disk is gone") as error:
            fill_epoch(source, layout_of(source, window_rows=60, slice_rows=5, n_open=5), n_threads=n_threads)
        assert "before_read" in "".join(str(entry.statement) for entry in error.traceback)
        assert source.n_open == 0
        expect_no_threads()

    def test_a_block_that_cannot_be_opened_leaves_its_room(self, monkeypatch):
        source = FakeSource([20] * 10)
        layout = layout_of(source, window_rows=60, slice_rows=5, n_open=2)
        plans = list(EpochPlan(source.block_rows, layout, seed=0, epoch=0).windows())
        window = Window(layout, source)
        with WindowFiller(source, layout, TargetCodec(None), n_threads=3) as filler:
            with monkeypatch.context() as patch:
                patch.setattr(source, "open_block", lambda *_, **__: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    filler.fill(window, plans[0])
            filler.fill(window, plans[0])  # would wait for ever if the room had been lost
        assert window.y[: window.n_rows, 0].tolist() == reference(source, layout)[0].tolist()

    def test_bad_numbers_are_found_where_they_lie(self):
        X = np.zeros((200, 3), np.float32)
        X[137, 2] = np.nan
        source = FakeSource([20] * 10, X)
        with pytest.raises(NonFiniteError, match="fake, block 6, row 17: feature number 2 is NaN"):
            fill_epoch(source, layout_of(source, window_rows=60, piece_rows=7), n_threads=3)
        fill_epoch(source, layout_of(source, window_rows=60), check=False)

    def test_stop_ends_a_fill_from_outside(self):
        source = FakeSource([20] * 10)
        layout = layout_of(source, window_rows=200, piece_rows=1, n_open=2)
        filler = WindowFiller(source, layout, None, n_threads=4)
        source.before_read = lambda block, row: (filler.stop() if source.n_read > 30 else None, time.sleep(0.001))
        with pytest.raises(Stopped):
            filler.fill(Window(layout, source), next(EpochPlan(source.block_rows, layout, seed=0, epoch=0).windows()))
        assert source.n_read < 100
        filler.close()
        filler.close()
        assert source.n_open == 0

    def test_an_interrupt_waits_for_the_helpers(self):
        """Nobody may write to a window after `fill` has returned."""
        source = FakeSource([20] * 10)
        main = threading.current_thread()
        reading = 0

        def interrupt(block, row):
            nonlocal reading
            if threading.current_thread() is main:
                raise KeyboardInterrupt
            reading += 1
            time.sleep(0.02)
            reading -= 1

        source.before_read = interrupt
        with pytest.raises(KeyboardInterrupt):
            fill_epoch(source, layout_of(source, window_rows=200), n_threads=4)
        assert reading == 0
        assert source.n_open == 0

    def test_an_interrupt_while_waiting_for_the_helpers(self, monkeypatch):
        source = FakeSource([20] * 10)
        main, reading, interrupted = threading.current_thread(), threading.Event(), False

        def slowly(block, row):
            if threading.current_thread() is main:
                assert reading.wait(10)
                return
            reading.set()
            time.sleep(0.05)
            assert source.n_open > 0

        def interrupt(helpers):
            nonlocal interrupted
            if not interrupted:
                interrupted = True
                raise KeyboardInterrupt
            return wait(helpers)

        source.before_read = slowly
        monkeypatch.setattr(streamgd.data.window, "wait", interrupt)
        layout = layout_of(source, window_rows=200)
        plan = next(EpochPlan(source.block_rows, layout, seed=0, epoch=0).windows())
        filler = WindowFiller(source, layout, None, n_threads=3)
        with pytest.raises(KeyboardInterrupt):
            filler.fill(Window(layout, source), plan)
        assert source.n_open == 0  # every helper is done with its block
        filler.close()

    def test_a_window_of_another_layout(self):
        source = FakeSource([20] * 10)
        small, big = layout_of(source, window_rows=20), layout_of(source, window_rows=200)
        plan = next(EpochPlan(source.block_rows, big, seed=0, epoch=0).windows())
        with WindowFiller(source, big, None) as filler, pytest.raises(OptionError, match="layouts differ"):
            filler.fill(Window(small, source), plan)


def test_resident_rows_give_the_same_windows_and_are_read_once():
    source = FakeSource([20, 7, 20], weight=np.linspace(0, 1, 47))
    layout = layout_of(source, window_rows=47)
    window = Window(layout, source)
    filler = ResidentFiller(WindowFiller(source, layout, TargetCodec(None), n_threads=2), Window(layout, source))
    for epoch in range(3):
        filler.fill(window, next(EpochPlan(source.block_rows, layout, seed=9, epoch=epoch).windows()))
        ((X, y, weight, ids),) = fill_epoch(source, layout, seed=9, epoch=epoch)
        assert np.array_equal(window.X, X)
        assert np.array_equal(window.y, y)
        assert np.array_equal(window.weight, weight)
        assert np.array_equal(window.ids, ids)
        assert window.epoch == epoch
    assert filler.read_rows == 47
    filler.close()
    expect_no_threads()
