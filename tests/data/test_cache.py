"""A cache holds the rows of its source, bit for bit, and is never used when it does not."""

from __future__ import annotations

import errno
import gc
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streamgd.data.cache import Cache
from streamgd.data.cache_writer import CacheWriter
from streamgd.data.plan import EpochPlan, checksum_of
from streamgd.data.sources import Source, open_source
from streamgd.data.sources.cache import CacheSource, Parts
from streamgd.data.targets import ClassCounter, TargetCodec
from streamgd.data.window_stream import WindowStream
from streamgd.errors import CorruptDataError
from tests.data.fake import FakeSource, expect_no_threads, layout_of

N_ROWS = 700
RNG_SEED = 5


def rows(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features with values that scaling rounds, targets and weights."""
    rng = np.random.default_rng(RNG_SEED)
    X = (rng.normal(size=(N_ROWS, 5)) * [1, 1e6, 1e-6, 1, 3] + [0, 1e7, 0, -2, 0]).astype(dtype)
    X[3, 0] = -0.0
    return X, rng.normal(size=N_ROWS), rng.uniform(0, 2, N_ROWS)


def parquet(folder: Path) -> Source:
    """Columns of several types, two of which float32 cannot hold."""
    X, y, weight = rows("float64")
    columns: dict[str, Any] = {"a": X[:, 0].astype("f4"), "b": X[:, 1].astype("i8"), "c": X[:, 2], "d": X[:, 3] > -2}
    pq.write_table(pa.table({**columns, "y": y, "w": weight}), folder / "rows.parquet", row_group_size=150)
    return open_source(str(folder / "rows.parquet"), "y", weight="w", dtype="float32")


def labelled(folder: Path) -> Source:
    """Classes named by text."""
    X, y, _ = rows()
    names = np.array(["ash", "beech", "cedar"])[np.digitize(y, [-0.5, 0.5])]
    table = pa.table({f"x{j}": column for j, column in enumerate(X.T)} | {"y": names})
    pq.write_table(table, folder / "names.parquet", row_group_size=200)
    return open_source(str(folder / "names.parquet"), "y")


def hdf5(folder: Path) -> Source:
    """Compressed chunks, two targets, weights; big-endian."""
    X, y, weight = rows()
    with h5py.File(folder / "rows.h5", "w") as file:
        file.create_dataset("X", data=X.astype(">f4"), chunks=(64, 5), compression="gzip", shuffle=True)
        file.create_dataset("y", data=np.column_stack([y, -y]))
        file.create_dataset("w", data=weight)
    return open_source(str(folder / "rows.h5"), "y", weight="w")


def contiguous(folder: Path) -> Source:
    """Rows that lie flat already; whole numbers as classes."""
    X, y, _ = rows()
    with h5py.File(folder / "flat.h5", "w") as file:
        file["X"], file["y"] = X, (y > 0).astype(np.int64) * 7 - 3
    return open_source(str(folder / "flat.h5"), "y")


def memory(folder: Path) -> Source:
    """Arrays in column order."""
    X, y, _ = rows("float64")
    return open_source(np.asfortranarray(X), y)


def dask(folder: Path) -> Source:
    """A Dask array."""
    import dask.array as da

    X, y, _ = rows()
    return open_source(da.from_array(X, chunks=(90, -1)), da.from_array(y, chunks=90))


KINDS: dict[str, tuple[Callable[[Path], Source], bool]] = {
    "parquet": (parquet, False),
    "labelled": (labelled, True),
    "hdf5": (hdf5, False),
    "contiguous": (contiguous, True),
    "memory": (memory, False),
    "dask": (dask, False),
}


def codec_of(source: Source, *, classify: bool) -> TargetCodec:
    assert source.target is not None
    if not classify:
        return TargetCodec(None, source.target.n_outputs)
    counter = ClassCounter()
    for _, y, _ in source.iter_targets():
        assert counter.add(y) is None
    return TargetCodec(counter.classes)


def fill(cache: Cache, codec: TargetCodec, *, window_rows: int = 260, n_threads: int = 3) -> CacheWriter:
    """Write a cache in one shuffled epoch."""
    writer = cache.begin()
    assert writer is not None
    source = cache.source
    layout = layout_of(
        source, window_rows=window_rows, slice_rows=60, n_open=3, piece_rows=30, n_outputs=codec.n_outputs
    )
    last = -1
    with WindowStream(source, layout, codec, seed=2, n_threads=n_threads, keep=writer) as stream:
        for window in stream:
            last = window.index
    assert (writer.finish(last) is None) == (writer.error is not None)
    writer.close()
    return writer


def small(folder: Path, **options: Any) -> tuple[Cache, TargetCodec]:
    source = FakeSource((90, 40, 1, 70), **options)
    codec = TargetCodec(None)
    return Cache(folder / "cache", source, codec, part_rows=16), codec


def contents(source: Source, codec: TargetCodec, **options: Any) -> list[Any]:
    """Return the bytes of every window."""
    layout = layout_of(source, window_rows=128, slice_rows=10, n_open=4, n_outputs=codec.n_outputs)
    found = []
    with WindowStream(source, layout, codec, seed=9, n_epochs=2, n_threads=2, **options) as stream:
        for window in stream:
            n = window.n_rows
            weight = None if window.weight is None else window.weight[:n].tobytes()
            found.append((window.X[:n].tobytes(), window.y[:n].tobytes(), weight, window.ids[:n].tobytes()))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_sources_to_the_bit(tmp_path: Path, kind: str) -> None:
    make, classify = KINDS[kind]
    source = make(tmp_path)
    codec = codec_of(source, classify=classify)
    cache = Cache(tmp_path / "cache", source, codec, part_rows=32)
    assert not cache.is_whole
    fill(cache, codec)
    assert cache.is_whole
    assert cache.needed_bytes == sum((cache.path / file.name).stat().st_size for file in cache.files)
    reading = TargetCodec(None) if cache.coded else codec
    rng = np.random.default_rng(0)
    scaling = {"shift": rng.normal(size=source.n_features), "factor": rng.uniform(0.1, 3, source.n_features)}
    again = Cache(tmp_path / "cache", source, codec, part_rows=32).open(as_source=True)
    assert contents(again, reading, **scaling) == contents(source, codec, **scaling)
    assert contents(again, reading) == contents(source, codec)


@pytest.mark.parametrize("kind", KINDS)
def test_small_blocks_hold_each_row_once_under_its_own_identity(tmp_path: Path, kind: str) -> None:
    make, classify = KINDS[kind]
    source = make(tmp_path)
    codec = codec_of(source, classify=classify)
    cache = Cache(tmp_path / "cache", source, codec, part_rows=32)
    fill(cache, codec)
    found = cache.open()
    assert found.block_rows.max() <= 32
    assert found.n_rows == source.n_rows
    layout = layout_of(found, window_rows=200, n_outputs=codec.n_outputs)
    ids = []
    with WindowStream(found, layout, TargetCodec(None) if cache.coded else codec, seed=1) as stream:
        ids = [window.ids[: window.n_rows].copy() for window in stream]
    assert int(np.concatenate(ids).sum(dtype=np.uint64)) == checksum_of(source.block_rows)
    assert len(np.unique(np.concatenate(ids))) == source.n_rows


def test_targets_alone_and_places_in_messages(tmp_path: Path) -> None:
    cache, codec = small(tmp_path, weight=np.linspace(1, 2, 201))
    fill(cache, codec)
    found = cache.open()
    y = np.concatenate([values for _, values, _ in found.iter_targets()])
    weight = np.concatenate([values for _, _, values in found.iter_targets()])
    assert (y == np.arange(201)).all()
    assert (weight == np.linspace(1, 2, 201)).all()
    assert found.locate(6, 3) == cache.source.locate(1, 3)
    assert found.locate(1, 0) == cache.source.locate(0, 16)


def test_sources_over_a_cache_can_be_pickled(tmp_path: Path) -> None:
    cache, codec = small(tmp_path)
    fill(cache, codec)
    found = cache.open()
    found.cached.lock = None  # type: ignore[attr-defined]  # the fake's own
    found.cached.before_read = None  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(found))
    assert isinstance(again, CacheSource)
    assert (again.read_rows(0, 201).X == found.read_rows(0, 201).X).all()


def test_parts_lie_inside_blocks() -> None:
    parts = Parts.of(np.array([5, 1, 4]), 2)
    assert parts.rows.tolist() == [2, 2, 1, 1, 2, 2]
    assert parts.block.tolist() == [0, 0, 0, 1, 2, 2]
    assert parts.first.tolist() == [0, 2, 4, 0, 0, 2]
    assert list(parts.overlapping(3, 4)) == [1, 2, 3, 4]
    assert list(parts.overlapping(6, 2)) == [4]


def test_types_that_rows_are_kept_in(tmp_path: Path) -> None:
    assert Cache(tmp_path, parquet(tmp_path), TargetCodec(None)).files[0].dtype == np.float64
    assert Cache(tmp_path, hdf5(tmp_path), TargetCodec(None, 2)).files[0].dtype == np.float32
    wide = open_source(np.zeros((4, 2), np.int16), np.zeros(4), dtype="float64")
    assert Cache(tmp_path, wide, TargetCodec(None)).files[0].dtype == np.float32


@pytest.mark.parametrize("name", ["X.bin", "y.bin", "weight.bin"])
@pytest.mark.parametrize("at", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_noticed_before_its_row_is_used(tmp_path: Path, name: str, at: float) -> None:
    cache, codec = small(tmp_path, weight=np.ones(201))
    fill(cache, codec)
    content = bytearray((cache.path / name).read_bytes())
    content[int(at * len(content))] ^= 16
    (cache.path / name).write_bytes(content)
    again = Cache(tmp_path / "cache", cache.source, codec, part_rows=16)
    with pytest.raises(CorruptDataError, match="is damaged: rows"):
        contents(again.open(), codec)
    assert not again.is_whole
    writer = again.begin()  # and it can be written anew
    assert writer is not None
    writer.close()
    expect_no_threads()


@pytest.mark.parametrize("damage", ["cut", "gone", "sums", "manifest"])
def test_other_damage_is_noticed_when_it_is_opened(tmp_path: Path, damage: str) -> None:
    cache, codec = small(tmp_path)
    fill(cache, codec)
    if damage == "cut":
        os.truncate(cache.path / "X.bin", 100)
    elif damage == "gone":
        (cache.path / "y.bin").unlink()
    elif damage == "sums":
        (cache.path / "parts.bin").write_bytes(bytes(8 * len(cache.parts.rows)))
    else:
        (cache.path / "cache.json").write_text("{")
    with pytest.raises(CorruptDataError, match="is damaged"):
        cache.open()
    assert not cache.is_whole


@pytest.mark.parametrize("name", ["cache.json", "parts.bin"])
@pytest.mark.parametrize("how", ["flip", "cut", "nul"])
def test_a_cache_damaged_anywhere_is_whole_or_is_written_anew(tmp_path: Path, name: str, how: str) -> None:
    """No damage ends a run in any other way; also not where the damaged words are still JSON."""
    cache, codec = small(tmp_path)
    fill(cache, codec)
    content = (cache.path / name).read_bytes()
    kept = {path.name: path.read_bytes() for path in cache.path.iterdir()}
    for at in range(0, len(content), 7):
        damaged = bytearray(content[:at] if how == "cut" else content)
        if how == "flip":
            damaged[at] ^= 1 << at % 8
        elif how == "nul":
            damaged[at : at + 16] = bytes(len(damaged[at : at + 16]))
        (cache.path / name).write_bytes(damaged)
        again = Cache(tmp_path / "cache", cache.source, codec, part_rows=16)
        try:
            again.open().require_whole()
        except CorruptDataError:
            assert not again.is_whole
            (cache.path / "cache.json").write_bytes(kept["cache.json"])
        (cache.path / name).write_bytes(content)


def test_leftovers_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a writer that was killed is replaced, so its room counts as free."""
    cache, codec = small(tmp_path)

    def free(self: Cache) -> int:
        return 5000 - sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())

    monkeypatch.setattr(Cache, "free_bytes", free)
    assert 5000 / 2 < cache.needed_bytes < 5000
    writer = cache.begin()
    assert writer is not None
    for file in cache.files:
        os.truncate(cache.path / file.name, file.row_bytes * 201)
    writer._lock.close()  # as if it was killed: nothing is removed
    writer.close()
    fill(cache, codec)
    assert cache.is_whole
    other = Cache(tmp_path / "cache", cache.source, codec, part_rows=17)
    with pytest.raises(OSError, match=r"the cache takes .*B, and .*B are free"):
        other.begin()
    with pytest.raises(OSError, match="the cache takes"):  # the lock was let go of
        other.begin()


def test_a_full_disk_has_room_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed files keep it as long as they are open; other writers of the disk would fail."""
    cache, codec = small(tmp_path)
    writer = cache.begin()
    assert writer is not None
    write, left = os.pwrite, iter(range(10))

    def full(descriptor: int, content: Any, at: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content, at)

    monkeypatch.setattr(os, "pwrite", full)
    layout = layout_of(cache.source, window_rows=50, slice_rows=20, n_open=2)
    with WindowStream(cache.source, layout, codec, seed=2, keep=writer) as stream:
        assert len(list(stream)) == 5
        assert writer.error is not None
        assert [os.fstat(descriptor).st_blocks for descriptor in writer._descriptors] == [0, 0]
    writer.close()


def refuse_to_remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the folder of the cache be somebody else's."""
    unlink = Path.unlink

    def refused(self: Path, missing_ok: bool = False) -> None:
        if self.name == "cache.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)


def test_a_damaged_cache_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, codec = small(tmp_path)
    fill(cache, codec)
    content = bytearray((cache.path / "X.bin").read_bytes())
    content[100] ^= 1
    (cache.path / "X.bin").write_bytes(content)
    refuse_to_remove(monkeypatch)
    cache = Cache(tmp_path / "cache", cache.source, codec, part_rows=16)
    with pytest.raises(
        CorruptDataError, match=r"cannot be removed \(Permission denied\): remove .*, or choose another"
    ):
        cache.open().require_whole()
    assert not cache.is_whole
    with pytest.raises(PermissionError, match="cannot be removed"):
        cache.begin()


N_LONG = 50_000


def long(*, changed: bool) -> tuple[np.ndarray, np.ndarray]:
    """More rows than fingerprints look at, some of them others in the middle; extremes stay."""
    rng = np.random.default_rng(RNG_SEED)
    X, y = rng.normal(size=(N_LONG, 10)), rng.normal(size=N_LONG)
    if changed:
        y[20_100:20_110] = y[20_100:20_110] * 0.5
    return X, y


def long_hdf5(folder: Path, *, changed: bool) -> Source:
    X, y = long(changed=changed)
    if changed:
        with h5py.File(folder / "long.h5", "r+") as file:
            file["y"][...] = y
    else:
        with h5py.File(folder / "long.h5", "w") as file:
            file["X"], file["y"] = X, y
    return open_source(str(folder / "long.h5"), "y")


def long_virtual(folder: Path, *, changed: bool) -> Source:
    """A file that never changes, over one that does."""
    long_hdf5(folder, changed=changed).close()
    if not changed:
        with h5py.File(folder / "virtual.h5", "w") as file:
            for name, shape in (("X", (N_LONG, 10)), ("y", (N_LONG,))):
                layout = h5py.VirtualLayout(shape, "f8")
                layout[...] = h5py.VirtualSource("long.h5", name, shape)
                file.create_virtual_dataset(name, layout)
    return open_source(str(folder / "virtual.h5"), "y")


def long_parquet(folder: Path, *, changed: bool) -> Source:
    X, y = long(changed=changed)
    table = pa.table({f"x{j}": column for j, column in enumerate(X.T)} | {"y": y})
    pq.write_table(table, folder / "long.parquet", compression="none", use_dictionary=False)
    return open_source(str(folder / "long.parquet"), "y")


def long_memory(folder: Path, *, changed: bool) -> Source:
    X, y = long(changed=changed)
    return open_source(np.asfortranarray(X), y)


def long_memmap(folder: Path, *, changed: bool) -> Source:
    X, y = long(changed=changed)
    np.save(folder / "X.npy", X)
    np.save(folder / "y.npy", y)
    return open_source(str(folder / "X.npy"), str(folder / "y.npy"))


def long_dask(folder: Path, *, changed: bool) -> Source:
    import dask.array as da

    X, y = long(changed=changed)
    return open_source(da.from_array(X, chunks=(9000, -1)), da.from_array(y, chunks=9000))


LONG = (long_hdf5, long_virtual, long_parquet, long_memory, long_memmap, long_dask)


@pytest.mark.parametrize("make", LONG)
def test_data_that_has_changed_is_not_read_from_its_old_cache(tmp_path: Path, make: Callable[..., Source]) -> None:
    """Also where the fingerprint looks elsewhere; and what was not changed is."""
    source = make(tmp_path, changed=False)
    cache = Cache(tmp_path / "cache", source, TargetCodec(None))
    fill(cache, TargetCodec(None), window_rows=20_000)
    source.close()
    del cache.source, source
    gc.collect()
    if make in (long_memory, long_dask):  # files are written again, which changes their time
        Cache(tmp_path / "cache", make(tmp_path, changed=False), TargetCodec(None)).open()
    source = make(tmp_path, changed=True)
    again = Cache(tmp_path / "cache", source, TargetCodec(None))
    assert again.path == cache.path
    with pytest.raises(CorruptDataError, match=r"is of other data: .* has changed since it was written"):
        again.open()
    assert not again.is_whole
    fill(again, TargetCodec(None), window_rows=20_000)
    found = Cache(tmp_path / "cache", source, TargetCodec(None)).open()
    assert (found.read_rows(0, N_LONG).y == long(changed=True)[1]).all()


def test_data_that_changes_while_it_is_written_down_is_written_down_again(tmp_path: Path) -> None:
    cache, codec = small(tmp_path)
    source = cache.source
    assert isinstance(source, FakeSource)
    source.before_read = lambda block, row: source.made.update(file=row)
    source.made["file"] = -1
    fill(cache, codec)
    with pytest.raises(CorruptDataError, match=r"has changed since it was written \(file\)"):
        Cache(tmp_path / "cache", source, codec, part_rows=16).open()


def test_a_moved_data_set_keeps_its_cache(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    source = long_hdf5(tmp_path / "here", changed=False)
    cache = Cache(tmp_path / "cache", source, TargetCodec(None))
    fill(cache, TargetCodec(None), window_rows=20_000)
    source.close()
    (tmp_path / "here").rename(tmp_path / "there")
    os.utime(tmp_path / "there" / "long.h5")
    moved = Cache(tmp_path / "cache", open_source(str(tmp_path / "there" / "long.h5"), "y"), TargetCodec(None))
    assert moved.open().n_rows == N_LONG


def test_other_data_lies_elsewhere(tmp_path: Path) -> None:
    cache, codec = small(tmp_path)
    names = {cache.path, small(tmp_path, weight=np.ones(201))[0].path}
    names.add(small(tmp_path, X=np.ones((201, 3), np.float32))[0].path)
    names.add(Cache(tmp_path / "cache", cache.source, codec, part_rows=17).path)
    assert len(names) == 4


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    cache, codec = small(tmp_path)
    writer = cache.begin()
    assert writer is not None
    assert Cache(tmp_path / "cache", cache.source, codec, part_rows=16).begin() is None
    writer.close()
    fill(cache, codec)
    assert cache.begin() is None  # nothing to do


@pytest.mark.parametrize("after", [0, 3, 7])
def test_a_full_disk_ends_the_cache_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    left = iter(range(after))
    write = os.pwrite

    def full(descriptor: int, content: Any, at: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content, at)

    monkeypatch.setattr(os, "pwrite", full)
    cache, codec = small(tmp_path)
    writer = fill(cache, codec)
    assert "the disk is full" in writer.why()
    assert not cache.is_whole
    assert [path.name for path in cache.path.iterdir()] == ["lock"]


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, at: write(descriptor, content[:100], at))
    cache, codec = small(tmp_path)
    fill(cache, codec)
    Cache(tmp_path / "cache", cache.source, codec, part_rows=16).open().require_whole()


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("lose", [False, True])
def test_another_process_goes_on(tmp_path: Path, stop: int, lose: bool) -> None:
    """From the windows that were trained on; what was read ahead of them is written once more."""
    cache, codec = small(tmp_path)
    layout = layout_of(cache.source, window_rows=50, slice_rows=20, n_open=2)
    writer = cache.begin()
    assert writer is not None
    plans = list(EpochPlan(cache.source.block_rows, layout, seed=0, epoch=0).windows())
    with WindowStream(cache.source, layout, codec, seed=0, keep=writer) as stream:
        for _ in range(stop + 1):
            stream.get()
        written = writer.written_before(stop)
        writer.keeps_rest = True
    writer.close()
    assert written.n_rows == sum(plan.n_rows for plan in plans[:stop])
    if lose:
        block, start, n_rows = plans[0].table[0]
        at = int(cache.source.block_rows[:block].sum()) + start
        content = bytearray((cache.path / "X.bin").read_bytes())
        content[12 * at : 12 * (at + n_rows)] = bytes(12 * n_rows)
        content[12 * at + 5] = 1
        (cache.path / "X.bin").write_bytes(content)
    again = Cache(tmp_path / "cache", cache.source, codec, part_rows=16)
    writer = again.begin(written)
    assert writer is not None
    with WindowStream(cache.source, layout, codec, seed=0, first=(0, stop), keep=writer) as stream:
        last = [window.index for window in stream][-1]
    assert writer.finish(last) is not None
    writer.close()
    assert writer.lost == lose
    assert again.is_whole == (not lose)
    if not lose:
        Cache(tmp_path / "cache", cache.source, codec, part_rows=16).open().require_whole()
