import decimal
import gc
import json
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamgd.data.sources
from streamgd.data.sources.memory import MemorySource
from streamgd.data.stream import Stream, stream
from streamgd.errors import (
    BufferTooSmallError,
    DataError,
    NonFiniteError,
    OptionError,
    ResumeError,
    RowAccountingError,
)
from tests.data.fake import FakeSource, expect_no_threads, repeatable


@pytest.fixture(autouse=True)
def _no_thread_outlives_its_test():
    yield
    gc.collect()
    expect_no_threads()


def rows_in(batches):
    return [y.astype(int).tolist() for _, y in batches]


def flat(batches):
    return [row for batch in batches for row in batch]


def small_buffer(source):
    """Return a buffer that makes windows of some dozen rows."""
    return Stream(source).layout.row_bytes * 150 + 2_000


class TestBatches:
    def test_are_shuffled_whole_and_run_across_windows(self):
        source = FakeSource([11] * 40)
        with stream(source, batch_size=32, buffer=small_buffer(source), n_epochs=2) as batches:
            assert batches.layout.window_rows < 100
            assert len(batches) == 14
            found = rows_in(batches)
        assert [len(batch) for batch in found] == [*([32] * 13), 440 - 13 * 32] * 2
        first, second = flat(found[:14]), flat(found[14:])
        assert sorted(first) == sorted(second) == list(range(440))
        assert first != second
        assert first != sorted(first)

    def test_belong_to_the_caller_and_keep_the_datas_units(self):
        X = np.arange(600, dtype=np.int16).reshape(200, 3)
        y = np.arange(200, dtype=np.int32) - 100
        batches = list(stream((X, y), batch_size=64))
        assert [batch[0].dtype for batch in batches] == [np.float32] * 4
        for features, target in batches:
            assert target.dtype == np.int32
            assert np.array_equal(features, X[target + 100])
            assert features.flags.owndata
            assert features.flags.writeable
            features[:] = -1
            target[:] = -1
        assert np.array_equal(X, np.arange(600).reshape(200, 3))

    def test_with_a_target_of_decimals(self, tmp_path):
        y = pa.array([decimal.Decimal(i) / 4 for i in range(40)], pa.decimal128(9, 2))
        pq.write_table(pa.table({"x": np.arange(40.0), "y": y}), tmp_path / "a.parquet")
        with stream(streamgd.data.sources.open_source(tmp_path / "a.parquet", "y")) as batches:
            ((X, found),) = list(batches)
        assert found.dtype == np.float64
        assert (found == X[:, 0] / 4).all()

    def test_with_weights_without_target_and_with_several(self):
        weight = np.linspace(0, 1, 40)
        for X, y, w in stream(FakeSource([10] * 4, weight=weight), batch_size=16):
            assert np.array_equal(w, weight[y.astype(int)])
            assert X.shape == (len(y), 3)
        assert [X.shape for X in stream(FakeSource([10] * 4, with_target=False), batch_size=16)] == [
            (16, 3),
            (16, 3),
            (8, 3),
        ]
        several = np.arange(80, dtype=np.float32).reshape(40, 2)
        found = np.concatenate([y for _, y in stream(FakeSource([10] * 4, y=several), batch_size=16)])
        assert found.dtype == np.float32
        assert sorted(map(tuple, found)) == sorted(map(tuple, several))

    @pytest.mark.parametrize(
        "labels",
        [
            np.array(["no", "yes", "maybe"] * 20),
            np.array(["no", "yes", "maybe"] * 20, object),
            pa.array(["no", "yes", "maybe"] * 20),
            pa.array(["no", "yes", "maybe"] * 20).dictionary_encode(),
            np.array([True, False, True] * 20),
        ],
    )
    def test_labels_stay_labels(self, labels):
        plain = labels.to_pylist() if isinstance(labels, pa.Array) else labels.tolist()
        X = np.arange(60, dtype=np.float32)[:, None]
        for features, target in stream(FakeSource([20] * 3, X, labels), batch_size=7):
            assert target.tolist() == [plain[int(row)] for row in features[:, 0]]

    def test_drop_last(self):
        source = FakeSource([11] * 4)
        with stream(source, batch_size=10, drop_last=True, n_epochs=2) as batches:
            assert len(batches) == 4
            assert [len(y) for _, y in batches] == [10] * 8

    def test_file_order(self):
        source = FakeSource([11] * 40)
        found = rows_in(stream(source, batch_size=32, buffer=small_buffer(source), shuffle=False))
        assert flat(found) == list(range(440))

    @repeatable
    @given(st.integers(1, 60), st.integers(0, 3), st.integers(1, 3), st.sampled_from([1, 3]))
    def test_the_batches_do_not_depend_on_threads(self, batch_size, seed, n_epochs, n_threads):
        source = FakeSource([7, 3, 12, 1, 9])
        options = {"batch_size": batch_size, "seed": seed, "n_epochs": n_epochs, "buffer": small_buffer(source)}
        one = rows_in(stream(source, n_threads=n_threads, **options))
        assert one == rows_in(stream(source, n_threads=2, **options))
        assert sorted(flat(one)) == sorted(list(range(32)) * n_epochs)

    def test_goes_on_for_ever_if_asked_to(self):
        with stream(FakeSource([5]), batch_size=5, n_epochs=None) as batches:
            orders = {tuple(next(batches)[1]) for _ in range(20)}
            assert batches.epoch == 20
        assert len(orders) > 10

    def test_seeds_differ(self):
        orders = {tuple(flat(rows_in(stream(FakeSource([50]), seed=seed)))) for seed in range(5)}
        assert len(orders) == 5

    def test_small_data_is_cheap(self):
        """Small sets run for a thousand epochs."""
        source = MemorySource(np.zeros((15, 3), np.float32), np.zeros(15))
        with stream(source, n_epochs=3) as warm:
            list(warm)
        with stream(source, n_epochs=300) as batches:
            begin = time.process_time()
            assert sum(1 for _ in batches) == 300
            assert time.process_time() - begin < 0.3  # about 0.03 measured


class TestResuming:
    @repeatable
    @given(
        st.integers(0, 40),
        st.integers(1, 25),
        st.booleans(),
        st.sampled_from(["fake", "memory"]),
        st.booleans(),
        st.sampled_from([0, 300, 5000]),
    )
    def test_goes_on_at_the_exact_row(self, n_taken, batch_size, shuffle, kind, drop_last, extra):
        source = FakeSource([7, 3, 12, 1, 9, 4], kind=kind)
        with pytest.raises(BufferTooSmallError) as refusal:
            Stream(source, batch_size=batch_size, buffer=1)
        buffer = refusal.value.needed_bytes + extra

        def make():
            options = {"shuffle": shuffle, "n_epochs": 3, "drop_last": drop_last, "buffer": buffer}
            return stream(source, batch_size=batch_size, **options)

        whole = rows_in(make())
        with make() as first:
            taken = [y.astype(int).tolist() for _, (_, y) in zip(range(n_taken), first, strict=False)]
            state = json.loads(json.dumps(first.state_dict()))
        with make() as second:
            second.load_state_dict(state)
            assert second.state_dict() == state
            assert taken + rows_in(second) == whole

    def test_moving_a_running_stream(self):
        source = FakeSource([11] * 40)
        with stream(source, batch_size=32, buffer=small_buffer(source)) as batches:
            state = batches.state_dict()
            first = [next(batches)[1].tolist() for _ in range(5)]
            batches.load_state_dict(state)
            assert [next(batches)[1].tolist() for _ in range(5)] == first

    def test_more_epochs_go_on(self):
        source = FakeSource([11] * 4)
        whole = rows_in(stream(source, n_epochs=3, batch_size=9))
        first = stream(source, n_epochs=2, batch_size=9)
        start = rows_in(first)
        more = stream(source, n_epochs=3, batch_size=9)
        more.load_state_dict(first.state_dict())
        assert start + rows_in(more) == whole
        done = stream(source, n_epochs=2, batch_size=9)
        done.load_state_dict(first.state_dict())
        assert rows_in(done) == []

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("batch_size", 5, "batch_size was 9, is 5"),
            ("seed", 1, "seed was 0, is 1"),
            ("buffer", "1MB", "buffer was 256000000, is 1000000"),
            ("shuffle", False, "shuffle was True, is False"),
            ("drop_last", True, "drop_last was False, is True"),
        ],
    )
    def test_refuses_other_options_by_name(self, option, value, message):
        options = {"batch_size": 9}
        state = stream(FakeSource([11] * 4), **options).state_dict()
        other = stream(FakeSource([11] * 4), **{**options, option: value})
        with pytest.raises(ResumeError, match=f"other options: {message}"):
            other.load_state_dict(state)

    def test_refuses_other_data_by_name(self):
        state = stream(FakeSource([11] * 4)).state_dict()
        with pytest.raises(ResumeError, match="other data: n_rows was 44, is 55"):
            stream(FakeSource([11] * 5)).load_state_dict(state)

    def test_refuses_newer_and_damaged_states(self):
        batches = stream(FakeSource([11] * 4))
        state = batches.state_dict()
        for wrong in ({**state, "version": 2}, {}):
            with pytest.raises(ResumeError, match="version"):
                batches.load_state_dict(wrong)
        for key, value in (("row", "x"), ("checksum", 5), ("layout", {}), ("window", -1), ("n_seen", 44)):
            with pytest.raises(ResumeError, match="damaged"):
                batches.load_state_dict({**state, key: value})
        with pytest.raises(ResumeError, match="damaged"):
            batches.load_state_dict({key: value for key, value in state.items() if key != "epoch"})
        batches.load_state_dict({**state, "row": 1000})
        with pytest.raises(ResumeError, match="row 1,000 of a window of 44"):
            next(batches)


class TestAccounting:
    """Faults injected between the source and the stream: an epoch must notice each of them."""

    def spoil(self, monkeypatch, change):
        from streamgd.data import window_stream

        class Spoilt(window_stream.WindowFiller):
            def fill(self, window, plan, upcoming=None):
                super().fill(window, plan, upcoming)
                change(window)

        monkeypatch.setattr(window_stream, "WindowFiller", Spoilt)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: setattr(w, "n_rows", w.n_rows - (w.index == 1)), "epoch ended after 439 rows"),
            (lambda w: w.ids.__setitem__(0, w.ids[1]), "some rows came twice"),
            (lambda w: setattr(w, "last", w.last or w.index == 1), "epoch ended after"),
            (lambda w: setattr(w, "last", False), "there were more rows"),
        ],
    )
    def test_lost_and_repeated_rows(self, monkeypatch, change, message):
        self.spoil(monkeypatch, change)
        source = FakeSource([11] * 40)
        batches = stream(source, buffer=small_buffer(source), batch_size=32)
        with pytest.raises(RowAccountingError, match=f"epoch 0 of fake: expected each of 440 rows once.*{message}"):
            list(batches)


class TestErrors:
    def test_readers_errors_arrive_and_leave_nothing_behind(self):
        source = FakeSource([11] * 40)

        def fail(block, row):
            if block == 13:
                raise OSError("the disk is gone")

        source.before_read = fail
        batches = stream(source, buffer=small_buffer(source), batch_size=32, n_threads=3)
        with pytest.raises(OSError, match="the disk is gone"):
            list(batches)
        expect_no_threads()
        assert source.n_open == 0

    def test_a_failed_batch_can_be_tried_again(self):
        source = FakeSource([11] * 40)
        expected = rows_in(stream(source, buffer=small_buffer(source), batch_size=32))
        batches = stream(source, buffer=small_buffer(source), batch_size=32)
        broken = threading.Event()

        def fail(block, row):
            if source.n_read > 800 and not broken.is_set():
                broken.set()
                raise OSError("the network is down")

        source.before_read = fail
        found = []
        while True:
            try:
                found.append(next(batches)[1].astype(int).tolist())
            except OSError:
                continue
            except StopIteration:
                break
        assert broken.is_set()
        assert found == expected

    def test_bad_numbers(self):
        X = np.zeros((44, 3), np.float32)
        X[30, 1] = np.nan
        with pytest.raises(NonFiniteError, match="block 2, row 8: feature number 1 is NaN"):
            next(stream(FakeSource([11] * 4, X)))
        labels = np.array(["a", "b", None, "a"] * 11, object)
        with pytest.raises(NonFiniteError, match="block 0, row 2: the target is missing"):
            next(stream(FakeSource([11] * 4, y=labels)))

    def test_integers_that_would_be_rounded(self):
        with pytest.raises(DataError, match="cannot be kept exactly"):
            next(stream(FakeSource([3], y=np.array([1, 2, 2**53 + 1]))))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size=0: expected a whole number from 1 on"),
            ({"batch_size": 2.5}, r"batch_size=2\.5"),
            ({"batch_size": True}, "batch_size=True"),
            ({"n_epochs": 0}, "n_epochs=0"),
            ({"n_threads": 0}, "n_threads=0"),
            ({"seed": -1}, "seed -1"),
            ({"buffer": "lots"}, "size 'lots' cannot be read"),
            ({"batch_size": 45, "drop_last": True}, "leaves nothing of 44 rows"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(OptionError, match=message):
            stream(FakeSource([11] * 4), **options)

    def test_a_buffer_too_small(self):
        with pytest.raises(BufferTooSmallError, match="smaller batch_size") as error:
            stream(FakeSource([11] * 4), buffer=100)
        batches = stream(FakeSource([11] * 4), buffer=error.value.needed_bytes)
        assert sorted(flat(rows_in(batches))) == list(range(44))

    def test_a_closed_stream_says_so(self):
        with stream(FakeSource([11] * 4), batch_size=9) as batches:
            next(batches)
        assert batches.state_dict()["n_seen"] == 9
        with pytest.raises(OptionError, match="closed"):
            next(batches)


def test_closes_only_the_sources_that_it_opened(monkeypatch):
    closed = []
    monkeypatch.setattr(FakeSource, "close", lambda self: closed.append(self))
    monkeypatch.setattr(streamgd.data.sources, "open_source", lambda data, target=None: FakeSource([4]))
    with stream("somewhere.parquet") as batches:
        next(batches)
    assert closed == [batches.source]
    with stream(FakeSource([4])) as batches:
        next(batches)
    assert len(closed) == 1


def test_says_where_it_stands():
    with stream(FakeSource([11] * 4), batch_size=9) as batches:
        next(batches)
        assert repr(batches) == "<stream of 'fake': epoch 0, 9 of 44 rows, batches of 9, buffer of 256 MB>"
