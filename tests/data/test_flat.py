"""Rows that lie as they are: the same windows, errors and order as when a reader hands them out."""

import errno
import os
import threading
import time

import h5py
import numpy as np
import pandas as pd
import pytest

import streamgd.data.flat
import streamgd.data.flat_files
from streamgd.data.flat import FlatFiller
from streamgd.data.flat_files import iter_numbers, reads_flat
from streamgd.data.plan import EpochPlan, plan_layout
from streamgd.data.prefetch import END
from streamgd.data.sources.hdf5 import Hdf5Source
from streamgd.data.sources.mapped import OpenFile
from streamgd.data.sources.memory import MemorySource
from streamgd.data.targets import TargetCodec
from streamgd.data.window import Window, WindowFiller
from streamgd.data.window_stream import WindowStream
from streamgd.errors import CorruptDataError, DataError, NonFiniteError, SourceNotFoundError
from tests.data.fake import expect_no_threads, layout_of

DTYPES = ["float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]
N, D = 700, 5


def numbers(dtype, shape, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    return (rng.normal(size=shape) * 50).clip(0 if dtype[0] == "u" else -120, 120).astype(dtype)


def windows_of(filler, source, layout, *, shuffle=True):
    window, found = Window(layout, source), []
    with filler:
        for plan in EpochPlan(source.block_rows, layout, seed=3, epoch=1, shuffle=shuffle).windows():
            filler.fill(window, plan)
            n = window.n_rows
            weight = np.empty(0) if window.weight is None else window.weight[:n].copy()
            found.append([window.X[:n].copy(), window.y[:n].copy(), weight, window.ids[:n].copy()])
    return found


def expect_same(source, codec=None, *, n_threads=1, window_rows=200, slice_rows=30, **options):
    codec = TargetCodec(None) if codec is None and source.target is not None else codec
    n_outputs = 0 if codec is None else codec.n_outputs
    layout = layout_of(source, window_rows=window_rows, slice_rows=slice_rows, n_outputs=n_outputs)
    assert reads_flat(source, codec)
    d = source.n_features
    scaling = {"shift": np.linspace(-1, 1, d), "factor": np.linspace(0.5, 2, d)}
    flat = FlatFiller(source, source.flat_rows(), layout, codec, n_threads=n_threads, **scaling, **options)
    expected = windows_of(WindowFiller(source, layout, codec, **scaling, **options), source, layout)
    found = windows_of(flat, source, layout)
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.tobytes() == b.tobytes()


def write(path, X, y=None, weight=None, **options):
    with h5py.File(path, "w", **options) as file:
        for name, values in (("X", X), ("y", y), ("w", weight)):
            if values is not None:
                file[name] = values
    return path


class TestSameWindows:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("row_dtype", ["float32", "float64"])
    def test_of_every_type_in_files_and_in_memory(self, tmp_path, dtype, row_dtype):
        X, y, weight = numbers(dtype, (N, D)), numbers(dtype, N, 1), np.abs(numbers("float32", N, 2))
        write(tmp_path / "a.h5", X, y, weight)
        expect_same(Hdf5Source(tmp_path / "a.h5", weight="w", dtype=row_dtype))
        expect_same(MemorySource(X, y, weight=weight, dtype=row_dtype))

    def test_of_several_datasets_and_outputs(self, tmp_path):
        with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
            file["a"], file["m"], file["b"] = numbers("int16", N), numbers("float32", (N, 3)), numbers("float64", N)
            file["y"] = numbers("float32", (N, 2), 4)
        source = Hdf5Source(tmp_path / "a.h5", features=["a", "m", "b"])
        expect_same(source, TargetCodec(None, n_outputs=2))

    def test_of_arrays_of_any_strides(self):
        X = numbers("float32", (2 * N, 2 * D))
        y = numbers("float64", 3 * N)
        for view in (X[:N, :D], X[::2, ::2], X[::-2, :D], np.asfortranarray(X[:N, :D]), X[:N, ::-1]):
            expect_same(MemorySource(view, y[::3]))
        expect_same(MemorySource(np.broadcast_to(X[:1], (N, 2 * D)), y[:N]))

    def test_of_memory_maps_and_frames(self, tmp_path):
        X, y = numbers("float32", (N, D)), numbers("float32", N)
        np.save(tmp_path / "X.npy", X)
        expect_same(MemorySource(np.load(tmp_path / "X.npy", mmap_mode="r"), y))
        frame = pd.DataFrame({"a": numbers("int8", N), "b": numbers("float32", N), "c": numbers("bool", N)})
        expect_same(MemorySource(frame, y))

    @pytest.mark.parametrize("dtype", ["int64", "float32", "bool"])
    def test_of_classes(self, dtype):
        y = numbers("bool", N).astype(dtype) * (1 if dtype == "bool" else 3)
        expect_same(MemorySource(numbers("float32", (N, D)), y), TargetCodec(np.unique(y)))

    def test_of_no_target(self, tmp_path):
        write(tmp_path / "a.h5", numbers("float32", (N, D)))
        expect_same(Hdf5Source(tmp_path / "a.h5", target=None))

    def test_of_more_files_than_are_kept_open(self, tmp_path, monkeypatch):
        monkeypatch.setattr(streamgd.data.flat, "OPEN_FILES", 3)
        paths = [
            write(tmp_path / f"{i}.h5", numbers("float32", (40 + i, D), i), numbers("float32", 40 + i))
            for i in range(11)
        ]
        expect_same(Hdf5Source(paths))
        expect_same(Hdf5Source(paths), window_rows=460, n_threads=1)

    def test_of_wide_rows_and_a_small_scratch(self, monkeypatch):
        monkeypatch.setattr(streamgd.data.flat, "_SCRATCH_BYTES", 1000)
        expect_same(MemorySource(numbers("float32", (60, 3000)), np.arange(60.0)), window_rows=20, slice_rows=7)

    def test_filled_by_several_threads_each(self, monkeypatch, tmp_path):
        monkeypatch.setattr(streamgd.data.flat, "_OWN_WINDOW_BYTES", 100)
        write(tmp_path / "a.h5", numbers("float32", (N, D)), numbers("float32", N))
        expect_same(Hdf5Source(tmp_path / "a.h5"), n_threads=3)
        expect_no_threads()

    @pytest.mark.parametrize("n_threads", [1, 2, 5])
    @pytest.mark.parametrize("depth", [None, 1, 2, 4])
    def test_in_the_same_order_from_a_stream(self, tmp_path, n_threads, depth):
        write(tmp_path / "a.h5", numbers("float32", (N, D)), np.arange(N))
        source = Hdf5Source(tmp_path / "a.h5", block_bytes=600)
        layout = plan_layout(source, 60_000)
        found = []
        with WindowStream(
            source, layout, TargetCodec(None), seed=1, n_epochs=3, n_threads=n_threads, depth=depth
        ) as stream:
            found.extend((window.epoch, window.index, window.y[: window.n_rows, 0].copy()) for window in stream)
        plans = [p for e in range(3) for p in EpochPlan(source.block_rows, layout, seed=1, epoch=e).windows()]
        assert [entry[:2] for entry in found] == [(p.epoch, p.index) for p in plans]
        starts = np.concatenate([[0], np.cumsum(source.block_rows)])
        for (_, _, y), plan in zip(found, plans, strict=True):
            rows = np.concatenate([np.arange(n) + starts[b] + s for b, s, n in plan.slices])
            assert (y[plan.places()] == rows).all()
        expect_no_threads()


class TestWhatIsFlat:
    def test_not_what_hdf5_must_decode(self, tmp_path):
        X, y = numbers("float32", (N, D)), numbers("float32", N)
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["X"], file["y"], file["big"] = X, y, X.astype(">f4")
            file["half"], file["words"] = X.astype("float16"), np.array(["a", "b"], object)[(y > 0).astype(int)]
            file.create_dataset("chunked", data=X, chunks=(10, D))
            file.create_dataset("unwritten", X.shape, "f4")
            layout = h5py.VirtualLayout(X.shape, "f4")
            layout[:] = h5py.VirtualSource(file["X"])
            file.create_virtual_dataset("virtual", layout)
            file.create_dataset("outside", data=X, external=[(str(tmp_path / "x.raw"), 0, X.nbytes)])
        for name in ("big", "half", "chunked", "unwritten", "virtual", "outside"):
            assert not Hdf5Source(tmp_path / "a.h5", features=name).is_flat, name
        assert not Hdf5Source(tmp_path / "a.h5", target="words").is_flat
        assert Hdf5Source(tmp_path / "a.h5").is_flat

    def test_not_what_must_be_converted(self):
        X, y = numbers("float32", (N, D)), numbers("float32", N)
        assert not MemorySource(X.astype(">f4"), y).is_flat
        assert not MemorySource(X.astype("float16"), y).is_flat
        assert not MemorySource(X, np.where(y > 0, "a", "b")).is_flat
        unaligned = np.ndarray((N, D), "float32", np.zeros(N * D * 4 + 1, np.uint8), offset=1)
        assert not MemorySource(unaligned, y).is_flat

    def test_not_where_the_target_needs_more_than_numbers(self):
        source = MemorySource(numbers("float32", (N, D)), numbers("int64", N))
        assert not reads_flat(source, TargetCodec(np.array(["a", "b"])))
        assert not reads_flat(source, TargetCodec(None, dtype="int64"))
        assert not reads_flat(source, TargetCodec(None, n_outputs=2))

    def test_a_link_into_another_file(self, tmp_path):
        write(tmp_path / "a.h5", numbers("float32", (N, D)))
        with h5py.File(tmp_path / "b.h5", "w") as file:
            file["X"], file["y"] = h5py.ExternalLink("a.h5", "X"), numbers("float32", N)
        expect_same(Hdf5Source(tmp_path / "b.h5"))


class TestErrors:
    @pytest.mark.parametrize("where", ["X", "y", "w"])
    def test_bad_numbers_are_named_where_they_lie(self, tmp_path, where):
        data = {"X": numbers("float32", (N, D)), "y": numbers("float32", N), "w": np.ones(N, np.float32)}
        data[where][333] = np.nan if where != "w" else -1
        source = Hdf5Source(write(tmp_path / "a.h5", data["X"], data["y"], data["w"]), weight="w")
        with pytest.raises(NonFiniteError, match="row 333"):
            expect_same(source)
        layout = layout_of(source, window_rows=200, slice_rows=30)
        with pytest.raises(NonFiniteError, match="row 333"):
            windows_of(FlatFiller(source, source.flat_rows(), layout, TargetCodec(None)), source, layout)
        if where == "X":
            expect_same(source, check=False)

    def test_an_unknown_class_is_named(self):
        y = numbers("bool", N).astype(np.int32)
        y[600] = 7
        source = MemorySource(numbers("float32", (N, D)), y)
        layout = layout_of(source, window_rows=200, slice_rows=30)
        with pytest.raises(DataError, match=r"row 600.*target 7 is none of the 2 known classes"):
            windows_of(FlatFiller(source, source.flat_rows(), layout, TargetCodec(np.array([0, 1]))), source, layout)

    def test_a_file_cut_short_while_it_is_read(self, tmp_path):
        path = write(tmp_path / "a.h5", numbers("float32", (20_000, D)), numbers("float32", 20_000))
        source = Hdf5Source(path)
        layout = layout_of(source, window_rows=1000, slice_rows=100)
        filler = FlatFiller(source, source.flat_rows(), layout, TargetCodec(None))
        plans = EpochPlan(source.block_rows, layout, seed=0, epoch=0).windows()
        window = Window(layout, source)
        with filler:
            filler.fill(window, next(plans))
            os.truncate(path, 100_000)
            with pytest.raises(CorruptDataError, match=r"a\.h5"):
                [filler.fill(window, plan) for plan in plans]

    def test_a_file_that_is_gone_or_is_another(self, tmp_path):
        path = write(tmp_path / "a.h5", numbers("float32", (N, D)), numbers("float32", N))
        source = Hdf5Source(path)
        path.unlink()
        with pytest.raises(SourceNotFoundError, match=r"a\.h5"):
            source.flat_rows().strips(0)
        with h5py.File(path, "w") as file:
            file["y"] = numbers("float32", N)
            file.create_dataset("X", data=numbers("float32", (N, D)), chunks=(10, D))
        with pytest.raises(CorruptDataError, match=r"stored in one piece, and is no longer"):
            source.flat_rows().strips(0)

    def test_an_error_comes_after_the_windows_before_it(self, tmp_path):
        y = numbers("float32", N)
        y[-1] = np.nan
        source = Hdf5Source(write(tmp_path / "a.h5", numbers("float32", (N, D)), y), block_bytes=600)
        layout = layout_of(source, window_rows=100, slice_rows=25, shuffle=False)
        with WindowStream(source, layout, TargetCodec(None), seed=0, shuffle=False, n_threads=4, depth=6) as stream:
            for _ in range(6):
                assert stream.get() is not None
            for _ in range(2):
                with pytest.raises(NonFiniteError, match="row 699"):
                    stream.get()
        expect_no_threads()


class TestLayout:
    def test_windows_stay_small_and_draw_on_many_blocks(self):
        source = MemorySource(np.zeros((1, 28), np.float32), np.zeros(1))
        source.block_rows = np.full(1000, 9000, np.int64)
        layout = plan_layout(source, 256_000_000)
        assert layout.window_bytes <= 4 << 20
        assert layout.n_open >= 30
        assert layout.window_rows == layout.n_open * layout.slice_rows
        assert layout.planned_bytes <= 256_000_000
        assert layout.n_windows >= 3
        big = plan_layout(source, 2_000_000_000)
        assert big.window_rows > 2 * layout.window_rows

    def test_a_small_buffer_is_used_whole(self):
        source = MemorySource(np.zeros((1, 28), np.float32), np.zeros(1))
        source.block_rows = np.full(1000, 9000, np.int64)
        layout = plan_layout(source, 2_000_000)
        assert layout.n_windows == 2
        assert 2 * layout.window_bytes > 1_000_000

    def test_wide_rows_still_fill_some_batches(self):
        source = MemorySource(np.zeros((1, 2000), np.float32), np.zeros(1))
        source.block_rows = np.full(5000, 131, np.int64)
        layout = plan_layout(source, 256_000_000)
        assert layout.window_rows >= 2000
        assert layout.n_open >= 30


def test_too_many_open_files_are_named_as_such(tmp_path, monkeypatch):
    def full(path, flags):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(DataError, match=r"Too many open files.*ulimit -n"):
        OpenFile(str(tmp_path / "a.h5"))


def test_files_stay_open_as_long_as_advice_is_given_on_them(tmp_path, monkeypatch):
    """Others may be opened meanwhile, and push them out."""
    monkeypatch.setattr(streamgd.data.flat_files, "OPEN_FILES", 1)
    for name in "ab":
        write(tmp_path / f"{name}.h5", numbers("float32", (N, D)), np.arange(N))
    source = Hdf5Source([tmp_path / "a.h5", tmp_path / "b.h5"])
    layout = layout_of(source, window_rows=10)
    with FlatFiller(source, source.flat_rows(), layout, TargetCodec(None)) as filler:
        ranges, held = filler._early._ranges_of(0)
        filler._early._ranges_of(source.n_blocks - 1)
        assert os.fstat(ranges[0][0]).st_ino == (tmp_path / "a.h5").stat().st_ino
        del held
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(ranges[0][0])


@pytest.mark.parametrize("last_rows", [50, 110, 190])
def test_more_threads_than_the_last_window_has_slices(tmp_path, monkeypatch, last_rows):
    monkeypatch.setattr(streamgd.data.flat, "_OWN_WINDOW_BYTES", 100)
    n_rows = 600 + last_rows
    source = Hdf5Source(write(tmp_path / "a.h5", numbers("float32", (n_rows, D)), np.arange(n_rows)), block_bytes=600)
    for shuffle in (True, False):
        layout = layout_of(source, window_rows=200, slice_rows=25, shuffle=shuffle)
        with WindowStream(source, layout, TargetCodec(None), seed=0, shuffle=shuffle, n_threads=8) as stream:
            rows = [row for window in stream for row in window.y[: window.n_rows, 0].tolist()]
        assert sorted(rows) == list(range(n_rows))


class TestHelping:
    """A consumer that would have to wait fills a window itself."""

    @pytest.fixture
    def filling(self, tmp_path, monkeypatch):
        """A source, its layout, and what to call before a window is filled; notes the thread of each."""
        source = Hdf5Source(write(tmp_path / "a.h5", numbers("float32", (N, D)), np.arange(N)), block_bytes=600)
        threads, fill = [], FlatFiller.fill
        before = {"call": lambda: None}

        def noted(self, *arguments):
            threads.append(threading.current_thread())
            before["call"]()
            fill(self, *arguments)

        monkeypatch.setattr(FlatFiller, "fill", noted)
        return source, layout_of(source, window_rows=50, slice_rows=25), before, threads

    def stream(self, source, layout, **options):
        return WindowStream(source, layout, TargetCodec(None), seed=0, depth=4, **options)

    def test_fills_what_the_threads_do_not(self, filling):
        source, layout, before, threads = filling
        own = threading.current_thread()
        before["call"] = lambda: time.sleep(0 if threading.current_thread() is own else 0.02)
        with self.stream(source, layout, n_threads=2) as stream:
            rows = [row for window in stream for row in window.y[: window.n_rows, 0].tolist()]
        assert sorted(rows) == list(range(N))
        assert threads.count(own) > len(threads) // 2
        assert len(set(threads)) == 2
        expect_no_threads()

    def test_leaves_a_single_thread_alone(self, filling):
        source, layout, _, threads = filling
        with self.stream(source, layout, n_threads=1) as stream:
            for _ in stream:
                pass
        assert threading.current_thread() not in threads

    def test_an_interrupt_is_heard_at_once(self, filling):
        source, layout, before, _ = filling
        own = threading.current_thread()

        def interrupted():
            time.sleep(0.02)
            if threading.current_thread() is own:
                raise KeyboardInterrupt

        before["call"] = interrupted
        with self.stream(source, layout, n_threads=2) as stream, pytest.raises(KeyboardInterrupt):
            stream.get()
        assert stream.get() is END
        expect_no_threads()

    def test_its_errors_come_after_the_windows_before(self, filling):
        source, layout, before, threads = filling
        own = threading.current_thread()

        def failing():
            if threading.current_thread() is own:
                raise OSError("gone")
            time.sleep(0.02)

        before["call"] = failing
        with self.stream(source, layout, n_threads=2) as stream:
            assert stream.get().index == 0
            with pytest.raises(OSError, match="gone"):
                stream.get()
            assert len(threads) <= 3
        expect_no_threads()


class TestNumbers:
    def whole(self, pieces, start=0):
        parts = [(first, y.copy(), None if weight is None else weight.copy()) for first, y, weight in pieces]
        starts = np.cumsum([start, *(len(y) for _, y, _ in parts)])
        assert [first for first, _, _ in parts] == starts[:-1].tolist()
        y = np.concatenate([y.reshape(len(y), -1) for _, y, _ in parts])
        return y, None if parts[0][2] is None else np.concatenate([weight for _, _, weight in parts])

    @pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in ("int64", "uint64")])
    @pytest.mark.parametrize("n_targets", [1, 3])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_are_those_of_the_source(self, tmp_path, monkeypatch, dtype, n_targets, weighted):
        monkeypatch.setattr(streamgd.data.flat_files, "_NUMBERS_BYTES", 130 * 8 * n_targets)
        monkeypatch.setattr(streamgd.data.flat_files, "_SCRATCH_BYTES", 100)
        paths = [tmp_path / f"{number}.h5" for number in range(3)]
        for number, path in enumerate(paths):
            n = N - 123 * number
            y = numbers(dtype, (n, n_targets) if n_targets > 1 else n, number)
            write(path, numbers("float32", (n, D)), y, np.abs(numbers("float32", n, 2)) if weighted else None)
        source = Hdf5Source(paths, weight="w" if weighted else None, block_bytes=600)
        found = self.whole(iter_numbers(source, TargetCodec(None, n_targets)))
        expected = self.whole(source.iter_targets())
        assert (found[0] == expected[0].astype(float)).all()
        assert (found[1] is None) is not weighted
        assert not weighted or (found[1] == expected[1]).all()
        for start, stop in ((0, 10), (N - 5, N + 5), (7, source.n_rows - 1), (2 * N - 100, source.n_rows)):
            for pieces in (
                iter_numbers(source, TargetCodec(None, n_targets), start, stop),
                source.iter_targets(start, stop),
            ):
                assert (self.whole(pieces, start)[0] == expected[0][start:stop]).all()

    def test_many_targets_take_no_more_memory_than_few(self, tmp_path):
        y = numbers("float64", (40, 20_000))
        write(tmp_path / "a.h5", numbers("float32", (40, 2)), y)
        source = Hdf5Source(tmp_path / "a.h5")
        pieces = [piece.copy() for _, piece, _ in iter_numbers(source, TargetCodec(None, 20_000))]
        assert max(piece.nbytes for piece in pieces) <= 2 << 20
        assert (np.concatenate(pieces) == y).all()

    @pytest.mark.parametrize("y", [np.broadcast_to(np.float64(3), N), np.arange(float(N))[::-1]])
    def test_arrays_of_any_stride(self, y):
        source = MemorySource(numbers("float32", (N, D)), y)
        assert (self.whole(iter_numbers(source, TargetCodec(None)))[0][:, 0] == y).all()

    def test_whatever_must_be_decoded_or_looked_up_is_left_to_the_source(self, tmp_path):
        write(tmp_path / "a.h5", numbers("float32", (N, D)), numbers("int64", N))
        source = Hdf5Source(tmp_path / "a.h5")
        assert iter_numbers(source, TargetCodec(np.array([0, 1]))) is None
        assert iter_numbers(source, TargetCodec(None)) is not None
        with h5py.File(tmp_path / "b.h5", "w") as file:
            file["X"] = numbers("float32", (N, D))
            file.create_dataset("y", data=np.arange(N), chunks=(10,))
        assert iter_numbers(Hdf5Source(tmp_path / "b.h5"), TargetCodec(None)) is None

    def test_a_file_cut_short_is_named(self, tmp_path):
        write(tmp_path / "a.h5", numbers("float32", (N, D)), numbers("float32", N))
        source = Hdf5Source(tmp_path / "a.h5")
        pieces = iter_numbers(source, TargetCodec(None))
        os.truncate(tmp_path / "a.h5", 4000)
        with pytest.raises(DataError, match=r"a\.h5"):
            list(pieces)


def test_a_target_that_is_not_finite_is_found_where_its_weight_is_zero(tmp_path):
    from streamgd.learn.recipe import Recipe
    from streamgd.run.config import Config
    from streamgd.run.survey import take_survey

    for weighted in (False, True):
        y, weight = numbers("float32", N), np.ones(N, np.float32)
        y[431], weight[431] = np.nan, 0
        path = write(tmp_path / f"{weighted}.h5", numbers("float32", (N, D)), y, weight)
        source = Hdf5Source(path, weight="w" if weighted else None)
        with pytest.raises(NonFiniteError, match=r"row 431.* is NaN"):
            take_survey(source, Config(Recipe()))
