"""What the operating system is asked for before it is read, and told to forget afterwards."""

import os
import time

import h5py
import numpy as np
import pytest

import streamgd.data.ahead as module
from streamgd.data.ahead import ReadAhead
from streamgd.data.plan import EpochPlan, plan_layout
from streamgd.data.sources.hdf5 import Hdf5Source
from streamgd.data.targets import TargetCodec
from streamgd.data.window_stream import WindowStream
from tests.data.fake import expect_no_threads

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")


@pytest.fixture
def advice(monkeypatch):
    """Record advice as (what, first byte); nothing is in memory."""
    given = []

    def record(descriptor, at, n_bytes, kind):
        given.append((kind, at))

    monkeypatch.setattr(module.os, "posix_fadvise", record)
    monkeypatch.setattr(module, "_is_there", lambda descriptor, at: False)
    monkeypatch.setattr(module, "_AHEAD_BYTES", 300)
    return given


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("nothing happened")


def asked(advice):
    return [at for kind, at in advice if kind == os.POSIX_FADV_WILLNEED]


def test_asks_for_blocks_in_order_and_no_further_than_it_should(advice):
    ahead = ReadAhead(lambda block: ([(0, 100 * block, 100)], None), n_open=2)
    ahead.expect(iter([3, 1, 4, 0, 5]))
    wait_for(lambda: len(asked(advice)) == 3)
    time.sleep(0.01)
    assert asked(advice) == [300, 100, 400]
    ahead.opened(2)
    wait_for(lambda: len(asked(advice)) == 5)
    ahead.expect(iter([7]))
    ahead.opened(3)
    wait_for(lambda: asked(advice) == [300, 100, 400, 0, 500, 700])
    assert len(advice) == 6  # small data stays in memory
    ahead.close()
    expect_no_threads()


def test_lets_big_data_go_once_it_is_read(advice):
    ahead = ReadAhead(lambda block: ([(0, 100 * block, 100)], None), n_open=1, forgets=True)
    ahead.expect(iter(range(9)))
    ahead.opened(5)  # the first ones are too late to be asked for
    wait_for(lambda: (os.POSIX_FADV_DONTNEED, 200) in advice)
    assert [at for kind, at in advice if kind == os.POSIX_FADV_DONTNEED] == [0, 100, 200]
    ahead.close()


def test_what_is_there_is_not_asked_for(advice, monkeypatch):
    monkeypatch.setattr(module, "_is_there", lambda descriptor, at: at < 200)
    assert module.ask_for([(0, 100, 50), (0, 300, 50)]) == 50
    assert asked(advice) == [300]


def test_looks_less_often_while_all_is_there(advice, monkeypatch):
    looked = []

    def there(descriptor, at):
        looked.append(at // 100)
        return at < 5000

    monkeypatch.setattr(module, "_is_there", there)
    monkeypatch.setattr(module, "_AHEAD_BYTES", 100_000)
    ahead = ReadAhead(lambda block: ([(0, 100 * block, 100)], None), n_open=2)
    ahead.expect(iter(range(100)))
    wait_for(lambda: 99 in looked)
    assert looked[:5] == [0, 2, 6, 14, 30]
    first = looked[5]
    assert looked[5:] == list(range(first, 100))  # every one, once something was missing
    assert first <= 30 + module._MOST_PASSED + 1
    assert asked(advice) == [100 * block for block in range(first, 100)]
    ahead.close()


def test_a_run_asks_for_blocks_in_the_order_of_its_plan(tmp_path, advice):
    X = np.arange(40_000, dtype=np.float32).reshape(10_000, 4)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X"], file["y"] = X, X[:, 0]
        first = file["X"].id.get_offset()
    source = Hdf5Source(tmp_path / "a.h5", block_bytes=2000)
    layout = plan_layout(source, 40_000)
    assert layout.window_rows < source.n_rows
    with WindowStream(source, layout, TargetCodec(None), seed=0, n_epochs=2) as stream:
        assert sum(window.n_rows for window in stream) == 20_000
    planned = [
        first + 1600 * block
        for epoch in (0, 1)
        for block in EpochPlan(source.block_rows, layout, seed=0, epoch=epoch).blocks.tolist()
    ]
    left = iter(planned)
    of_features = [at for at in asked(advice) if first <= at < first + X.nbytes]
    assert len(of_features) > 1
    assert all(at in left for at in of_features)  # in order; those that were read before it came to them are left out
    expect_no_threads()


def test_an_error_in_looking_up_a_block_is_left_to_whoever_reads():
    def gone(block):
        raise OSError("gone")

    ahead = ReadAhead(gone, n_open=1)
    ahead.expect(iter([0, 1]))
    ahead.opened(1)
    ahead.close()
    expect_no_threads()


def test_data_of_up_to_half_the_memory_stays(monkeypatch):
    monkeypatch.setattr(module, "memory_bytes", lambda: 1000)
    assert module.stays_in_memory(500)
    assert not module.stays_in_memory(501)


def test_what_is_in_the_page_cache_is_counted(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        found = module.cached_bytes(file.fileno(), 0, 1 << 20)
        if not found:
            pytest.skip("the system cannot tell")
        assert found == 1 << 20
        assert module.cached_bytes(file.fileno(), 1 << 19, 1 << 18) == 1 << 18
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 1 << 19, os.POSIX_FADV_DONTNEED)
        assert module.cached_bytes(file.fileno(), 0, 1 << 20) <= 1 << 20
    assert module.cached_bytes(-1, 0, 1 << 20) == 0
