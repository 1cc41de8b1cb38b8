"""Data too big for the page cache: read past it, ahead of its turn, with the same windows as ever."""

import os
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest

import streamgd.data.early as module
import streamgd.data.flat
from streamgd.data.plan import EpochPlan
from streamgd.data.sources.hdf5 import Hdf5Source
from streamgd.data.targets import TargetCodec
from streamgd.data.unbuffered import NOT_READY, BlockLoader, Piece, blocks_at_once, reads_unbuffered
from streamgd.data.window import Stopped
from streamgd.data.window_stream import WindowStream
from streamgd.errors import NonFiniteError
from tests.data.fake import expect_no_threads, layout_of

N, D = 40_000, 6


@pytest.fixture(autouse=True)
def unbuffered(tmp_path):
    probe = tmp_path / "probe"
    probe.write_bytes(b"x")
    if not reads_unbuffered(str(probe)):
        pytest.skip("the system or the file system cannot read past its page cache")


@pytest.fixture
def big(monkeypatch):
    """Have all data taken for bigger than the memory; return what was looked up in memory."""
    monkeypatch.setattr(module, "stays_in_memory", lambda n_bytes: False)
    monkeypatch.setattr(module, "cached_bytes", lambda descriptor, first, n_bytes: 0)
    looked_up, locate = [], BlockLoader.locate

    def noted(self, *arguments):
        found = locate(self, *arguments)
        looked_up.append(found[0])
        return found

    monkeypatch.setattr(BlockLoader, "locate", noted)
    return looked_up


def source_of(folder, n_files=1, weight=False, columns=False):
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.h5" for number in range(n_files)]
    for path in paths:
        with h5py.File(path, "w") as file:
            file["X"], file["y"] = rng.normal(size=(N // n_files, D)).astype(np.float32), rng.normal(size=N // n_files)
            file["w"] = rng.random(N // n_files)
            if columns:
                for name in "abc":
                    file[name] = rng.normal(size=N // n_files)
    named = {"features": list("abc")} if columns else {}
    return Hdf5Source(paths, block_bytes=20_000, weight="w" if weight else None, **named)


def plan_of(source, *, spare_bytes=6_000_000, shuffle=True):
    """Plan windows of ten slices, that leave something of the buffer."""
    layout = layout_of(source, window_rows=2000, slice_rows=200, n_open=10, shuffle=shuffle)
    return replace(layout, n_windows=5, buffer_bytes=layout.planned_bytes + spare_bytes)


def windows_of(source, layout, **options):
    codec = TargetCodec(None)
    with WindowStream(source, layout, codec, seed=1, shift=None, factor=None, **options) as stream:
        return [
            tuple(
                part[: window.n_rows].tobytes()
                for part in (window.X, window.y, window.ids, *([] if window.weight is None else [window.weight]))
            )
            for window in stream
        ]


@pytest.mark.parametrize(
    "kind", [{}, {"n_files": 3}, {"weight": True}, {"columns": True}], ids=["plain", "files", "weights", "columns"]
)
@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"first": (0, 5)}, {"n_threads": 3}])
def test_windows_are_the_same_and_all_rows_come_from_memory(tmp_path, request, kind, options):
    source = source_of(tmp_path, **kind)
    layout = plan_of(source, shuffle=options.get("shuffle", True))
    options = {"n_epochs": 2, **options}
    expected = windows_of(source, layout, **options)
    looked_up = request.getfixturevalue("big")
    assert windows_of(source, layout, **options) == expected
    assert len(looked_up) == len(expected) > 1
    assert not any((found == NOT_READY).any() for found in looked_up)
    expect_no_threads()


def test_windows_filled_by_several_threads_together(tmp_path, request, monkeypatch):
    source = source_of(tmp_path)
    layout = plan_of(source)
    expected = windows_of(source, layout)
    looked_up = request.getfixturevalue("big")
    monkeypatch.setattr(streamgd.data.flat, "_OWN_WINDOW_BYTES", 100)
    assert windows_of(source, layout, n_threads=3) == expected
    assert len(looked_up) == len(expected)


def test_the_buffer_bounds_what_is_read_ahead(tmp_path, big, monkeypatch):
    source = source_of(tmp_path)
    layout = plan_of(source)
    most, placed = [], BlockLoader.placed

    def watched(self, *arguments):
        most.append((len(self._blocks), len(self._blocks) + len(self._free), self._most))
        placed(self, *arguments)

    monkeypatch.setattr(BlockLoader, "placed", watched)
    windows_of(source, layout, n_epochs=3)
    n_blocks, allocated, allowed = (max(column) for column in zip(*most, strict=True))
    assert layout.n_open < n_blocks <= allocated <= allowed < source.n_blocks


def test_without_room_for_blocks_it_reads_as_always(tmp_path, big):
    source = source_of(tmp_path)
    layout = plan_of(source, spare_bytes=200_000)
    assert len(windows_of(source, layout)) > 1
    assert not big


def test_a_file_system_that_cannot_is_read_as_always(tmp_path, big, monkeypatch):
    monkeypatch.setattr(module, "reads_unbuffered", lambda path: False)
    source = source_of(tmp_path)
    assert len(windows_of(source, plan_of(source))) > 1
    assert not big


def test_reads_that_fail_are_made_as_always(tmp_path, request, monkeypatch):
    source = source_of(tmp_path)
    layout = plan_of(source)
    expected = windows_of(source, layout)
    looked_up = request.getfixturevalue("big")
    preadv, calls = os.preadv, []

    def flaky(descriptor, buffers, at, *flags):
        calls.append(at)
        if len(calls) % 3 == 0:
            raise OSError("a disk of uneven temper")
        return preadv(descriptor, buffers, at, *flags) // (1 + (len(calls) % 5 == 0))

    monkeypatch.setattr(os, "preadv", flaky)
    assert windows_of(source, layout) == expected
    lost = np.concatenate(looked_up) == NOT_READY
    assert 0 < lost.mean() < 1


def test_bad_numbers_are_found_and_located(tmp_path, big):
    source = source_of(tmp_path)
    with h5py.File(tmp_path / "0.h5", "r+") as file:
        file["X"][12_345, 2] = np.nan
    with pytest.raises(NonFiniteError, match=r"12,345|12345"):
        windows_of(Hdf5Source(tmp_path / "0.h5", block_bytes=20_000), plan_of(source))
    expect_no_threads()


def test_a_consumer_that_stops_leaves_no_thread(tmp_path, big):
    source = source_of(tmp_path)
    stream = WindowStream(source, plan_of(source), TargetCodec(None), seed=0, n_epochs=None)
    assert stream.get().n_rows
    stream.close()
    expect_no_threads()


@pytest.mark.parametrize("n_threads", [2, 4, 8])
def test_fills_that_run_ahead_of_the_loader_never_see_another_blocks_rows(tmp_path, request, monkeypatch, n_threads):
    """The windows under way need more blocks than there is memory for, and reads take their time."""
    source = source_of(tmp_path)
    layout = plan_of(source, spare_bytes=18 * 41_000)
    expected = windows_of(source, layout, n_epochs=3)
    looked_up = request.getfixturevalue("big")
    read, random = BlockLoader._read, np.random.default_rng(0)

    def slow(self, block, memory):
        time.sleep(random.random() * 0.004)
        return read(self, block, memory)

    monkeypatch.setattr(BlockLoader, "_read", slow)
    assert windows_of(source, layout, n_epochs=3, n_threads=n_threads, depth=n_threads + 2) == expected
    lost = np.concatenate(looked_up) == NOT_READY
    assert lost.mean() < 1
    expect_no_threads()


class TestLoader:
    @pytest.fixture
    def loader(self, tmp_path):
        (tmp_path / "bytes").write_bytes(os.urandom(8 * 4096))
        descriptor = os.open(tmp_path / "bytes", os.O_RDONLY | os.O_DIRECT)
        yield BlockLoader(lambda block: ([Piece(descriptor, 4096 * block, 4096, 0)], None), 1, 4096, 2)
        os.close(descriptor)

    def locate(self, loader, epoch, block, n_rows):
        found, held = loader.locate(epoch, np.array([block]), np.array([n_rows]))
        return bool(found[0, 0] != NOT_READY), held

    def test_rows_located_before_their_block_is_loaded_are_not_waited_for(self, loader):
        for block, n_rows in ((1, 10), (2, 4)):
            there, held = self.locate(loader, 0, block, n_rows)
            assert not there
            loader.placed(held, np.array([n_rows]))
        loader.expect(0, [(0, 10), (1, 10), (2, 10), (3, 10), (4, 10)])
        assert set(loader._blocks) == {(0, 0), (0, 2)}  # all of block 1 was read elsewhere
        there, held = self.locate(loader, 0, 2, 6)
        assert there
        loader.placed(held, np.array([6]))
        assert set(loader._blocks) == {(0, 0), (0, 3)}
        loader.close()

    def test_memory_is_not_used_again_while_somebody_who_located_a_block_has_not_placed_it(self, loader):
        loader.expect(0, [(0, 10), (1, 10), (2, 10)])
        _, first = self.locate(loader, 0, 0, 6)
        _, second = self.locate(loader, 0, 0, 4)
        loader.placed(second, np.array([4]))
        assert (0, 2) not in loader._blocks
        loader.placed(first, np.array([6]))
        assert (0, 2) in loader._blocks
        loader.close()

    def test_a_block_that_two_epochs_have_at_once_is_loaded_for_both(self, loader):
        loader.expect(0, [(5, 10)])
        loader.expect(1, [(5, 10), (6, 10)])
        _, early = self.locate(loader, 1, 5, 10)
        loader.placed(early, np.array([10]))
        assert set(loader._blocks) == {(0, 5), (1, 6)}
        loader.close()

    def test_whoever_waits_for_a_block_hears_that_reading_was_stopped(self):
        loader = BlockLoader(lambda block: time.sleep(0.05), 1, 4096, 20)
        loader.expect(0, [(block, 1) for block in range(20)])
        loader.close()
        with pytest.raises(Stopped):
            loader.locate(0, np.arange(20), np.ones(20, int))
        expect_no_threads()


def test_big_data_that_is_in_the_page_cache_is_taken_from_there(tmp_path, big, monkeypatch):
    source = source_of(tmp_path, weight=True)
    counted = []

    def all_there(descriptor, first, n_bytes):
        counted.append(n_bytes)
        return n_bytes

    monkeypatch.setattr(module, "cached_bytes", all_there)
    windows_of(source, plan_of(source), n_epochs=2)
    assert not big
    assert sum(counted) == source.stored_bytes


def test_blocks_at_once():
    assert blocks_at_once(32, 1_000_000, 2, 200_000_000) == 80
    assert blocks_at_once(32, 1_000_000, 2, 45_000_000) == 44
    assert blocks_at_once(32, 1_000_000, 2, 40_000_000) == 0


@pytest.mark.parametrize("window", [0, 1, 4, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_blocks_left_are_those_of_the_windows_to_come(tmp_path, window, shuffle):
    source = source_of(tmp_path)
    layout = plan_of(source, shuffle=shuffle)
    plan = EpochPlan(source.block_rows, layout, seed=2, epoch=1, shuffle=shuffle)
    table = np.concatenate([each.table for each in plan.windows(window)])
    blocks, first = np.unique(table[:, 0], return_index=True)
    order = np.argsort(first)
    found, rows = plan.blocks_left(window)
    assert found.tolist() == blocks[order].tolist()
    assert rows.tolist() == table[np.sort(first), 1].tolist()
