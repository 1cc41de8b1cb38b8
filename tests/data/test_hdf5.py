"""HDF5 files as sources."""

from __future__ import annotations

import gc
import os
import pickle
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest

from streamgd.data.sources import hdf5, hdf5_blocks, hdf5_files, hdf5_rows
from streamgd.data.sources.hdf5 import Hdf5Source
from streamgd.data.sources.hdf5_chunks import ChunkReader
from streamgd.data.sources.hdf5_files import has_dataset
from streamgd.errors import CorruptDataError, DataError, EmptySourceError, OptionError, SchemaError, SourceNotFoundError
from tests.data.contract import (
    SourceContract,
    assert_same_bits,
    make_rows,
    make_target,
    open_files_in,
    plain,
    read_all,
    read_block,
)


def stored(array: np.ndarray) -> Any:
    """Return what h5py can store: it has no fixed-width text of its own."""
    return array.astype(object) if array.dtype.kind == "U" else array


def write(path: Path, layout: dict[str, Any] | None = None, **arrays: Any) -> Path:
    """Write datasets; `layout` holds for those of two dimensions."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            how = layout if layout and np.ndim(array) == 2 else {}
            file.create_dataset(name, data=stored(np.asarray(array)), **how)
    return path


class TestContiguous(SourceContract):
    kind = "hdf5"
    named_features = False
    layout: ClassVar[Any] = None

    def make(self, folder, X, y, weight=None, *, n_blocks=4, dtype="auto", names=None):
        arrays = {"X": X, "y": y, "weight": weight}
        write(folder / "data.h5", self.layout, **{name: a for name, a in arrays.items() if a is not None})
        return Hdf5Source(
            folder / "data.h5",
            target=None if y is None else "y",
            weight=None if weight is None else "weight",
            dtype=dtype,
            block_bytes=X.nbytes // n_blocks,
        )

    def reopen(self, folder):
        return Hdf5Source([folder / "data.h5"])


class TestChunked(TestContiguous):
    layout: ClassVar[Any] = {"chunks": (32, 1)}


class TestCompressed(TestContiguous):
    layout: ClassVar[Any] = {"chunks": (100, 1), "compression": "gzip", "shuffle": True}


class TestLzfWithChecksums(TestContiguous):
    layout: ClassVar[Any] = {"chunks": (200, 1), "compression": "lzf", "fletcher32": True}


class TestColumnDatasets(SourceContract):
    """A dataset for each feature, in a group, compressed."""

    kind = "hdf5"

    def make(self, folder, X, y, weight=None, *, n_blocks=4, dtype="auto", names=None):
        names = names or tuple(f"x{j}" for j in range(X.shape[1]))
        with h5py.File(folder / "data.h5", "w") as file:
            for j, name in enumerate(names):
                file.create_dataset(name, data=X[:, j], chunks=(len(X) // n_blocks,), compression="gzip")
            for name, array in (("t/y", y), ("t/w", weight)):
                if array is not None:
                    file[name] = stored(array)
        return Hdf5Source(
            folder / "data.h5",
            features=names,
            target=None if y is None else "t/y",
            weight=None if weight is None else "t/w",
            dtype=dtype,
            block_bytes=X.nbytes // n_blocks,
        )

    def reopen(self, folder):
        with h5py.File(folder / "data.h5") as file:
            names = sorted((name for name in file if name[0] == "x"), key=lambda name: int(name[1:]))
        return Hdf5Source(folder / "data.h5", features=names, target="t/y")


class TestSeveralFiles(SourceContract):
    kind = "hdf5"
    named_features = False

    def make(self, folder, X, y, weight=None, *, n_blocks=4, dtype="auto", names=None):
        edges = np.linspace(0, len(X), n_blocks).astype(int)
        for i in range(len(edges) - 1):
            part = slice(edges[i], edges[i + 1])
            arrays = {"X": X, "y": y, "weight": weight}
            write(folder / f"part-{i}.h5", **{name: a[part] for name, a in arrays.items() if a is not None})
        (folder / "part-1a.h5").write_bytes(
            write(folder / "none.h5", X=X[:0], y=X[:0, 0], weight=X[:0, 0]).read_bytes()
        )
        (folder / "none.h5").unlink()
        return Hdf5Source(
            sorted(folder.glob("*.h5")),
            target=None if y is None else "y",
            weight=None if weight is None else "weight",
            dtype=dtype,
            block_bytes=X.nbytes // n_blocks,
        )

    def reopen(self, folder):
        return Hdf5Source(sorted(folder.glob("*.h5")))


# Blocks


def blocks_of(path: Path, **options: Any) -> Hdf5Source:
    source = Hdf5Source(path, **options)
    X, y, _ = read_all(source, (10**9,))
    source.close()
    with h5py.File(path) as file:
        assert_same_bits(X, file["X"][:])
        assert_same_bits(y, file["y"][:])
    return source


def heights(source: Hdf5Source) -> list[int]:
    """List the different sizes of blocks, the last one of the file aside."""
    return sorted(set(source.block_rows[:-1].tolist()))


def test_contiguous_rows_make_blocks_of_about_a_mebibyte(tmp_path: Path) -> None:
    source = blocks_of(write(tmp_path / "a.h5", X=make_rows(60_000, 28), y=make_target(60_000)))
    assert heights(source) == [(1 << 20) // 120]
    assert source.open_block_bytes < 10_000


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_short_chunks_make_a_block_for_each_run(tmp_path: Path, compression: Any) -> None:
    """Blocks of 32 rows are what lets sorted rows mix."""
    layout = {"chunks": (32, 123), "compression": compression}
    source = blocks_of(write(tmp_path / "a.h5", layout, X=make_rows(1_000, 123), y=make_target(1_000)))
    assert heights(source) == [32]
    assert source.mixing_hint() is None


@pytest.mark.parametrize(("chunk", "rows"), [(1, 32), (5, 35), (20, 40)])
def test_tiny_chunks_are_grouped(tmp_path: Path, chunk: int, rows: int) -> None:
    layout = {"chunks": (chunk, 28)}
    assert heights(blocks_of(write(tmp_path / "a.h5", layout, X=make_rows(500, 28), y=make_target(500)))) == [rows]


def test_short_chunks_are_joined_where_there_are_very_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_blocks, "_MANY_BLOCKS", 10)
    layout = {"chunks": (32, 4)}
    assert heights(blocks_of(write(tmp_path / "a.h5", layout, X=make_rows(1_000, 4), y=make_target(1_000)))) == [128]


@pytest.mark.parametrize("chunks", [(500, 1), (500, 2), (64, 3), (2_000, 4), (2_000, 7)])
def test_chunks_side_by_side_are_read_in_few_requests(tmp_path: Path, chunks: tuple[int, int]) -> None:
    """HDF5 left alone reads an uncompressed chunk one column wide value by value."""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts requests in /proc")

    def n_requests() -> int:
        return int(re.findall(r"syscr: (\d+)", Path("/proc/self/io").read_text())[0])

    path = write(tmp_path / "a.h5", {"chunks": chunks}, X=make_rows(2_000, 7), y=make_target(2_000))
    source = blocks_of(path)
    before = n_requests()
    read_all(source, (10**9,))
    assert n_requests() - before < 7 * (2_000 // chunks[0] + 1) + 500


def test_chunks_of_one_wide_row_are_not_grouped_beyond_a_mebibyte(tmp_path: Path) -> None:
    layout = {"chunks": (1, 100_000)}
    source = blocks_of(write(tmp_path / "a.h5", layout, X=make_rows(8, 100_000), y=make_target(8)))
    assert heights(source) == [2]


def test_tall_chunks_without_compression_are_sliced(tmp_path: Path) -> None:
    layout = {"chunks": (50_000, 4)}
    source = blocks_of(write(tmp_path / "a.h5", layout, X=make_rows(60_000, 28), y=make_target(60_000)))
    assert source.block_rows.max() * 120 <= 1.01 * 2**20
    edges = np.cumsum(source.block_rows)
    assert 50_000 in edges  # no block lies in two runs of chunks
    assert source.open_block_bytes < 10_000


def test_tall_compressed_chunks_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = {"chunks": (20_000, 4), "compression": "gzip", "compression_opts": 1}
    path = write(tmp_path / "a.h5", layout, X=make_rows(45_000, 28), y=make_target(45_000))
    source = blocks_of(path, block_bytes=1 << 18)
    assert source.block_rows.tolist() == [20_000, 20_000, 5_000]
    assert source.open_block_bytes >= 20_000 * 28 * 4
    calls: list[tuple[int, int]] = []
    read = ChunkReader.read

    def counted(self: ChunkReader, first: int, stop: int, *args: Any) -> Any:
        rows = read(self, first, stop, *args)
        if rows is not None and rows.ndim == 2:
            calls.append((first, stop))
        return rows

    monkeypatch.setattr(ChunkReader, "read", counted)
    read_block(source, 0, 0, (999,))
    read_block(source, 1, 7_000, (999,))
    assert calls == [(0, 20_000), (27_000, 40_000)]
    hint = source.mixing_hint()
    assert hint is not None
    assert "20,000 rows" in hint
    assert re.search(r"chunks=\(\d+, 28\)", hint)


def test_compressed_runs_beyond_what_may_be_held_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_blocks, "HELD_BYTES", 400_000)
    layout = {"chunks": (10_000, 1), "compression": "lzf"}
    path = write(tmp_path / "a.h5", layout, X=make_rows(25_000, 28), y=make_target(25_000))
    source = blocks_of(path, block_bytes=50_000)
    assert source.block_rows[:3].tolist() == [3334, 3334, 3332]
    assert source.block_rows.max() * 120 <= 400_100
    assert source.open_block_bytes < 600_000
    assert "3 times" in (source.mixing_hint() or "")


def test_blocks_grow_where_another_dataset_has_far_taller_chunks(tmp_path: Path) -> None:
    """Else every block of 32 rows would decode the targets of 20,000."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("X", data=make_rows(40_000, 28), chunks=(32, 28), compression="lzf")
        file.create_dataset("y", data=make_target(40_000), chunks=(20_000,), compression="gzip")
    (rows,) = heights(blocks_of(tmp_path / "a.h5"))
    assert rows * 112 * 4 >= 20_000 * 8 / 2
    assert rows % 32 == 0


def test_rows_in_many_pieces_are_read_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"x{j}" for j in range(20)]
    X = make_rows(1_000, 20)
    write(tmp_path / "a.h5", y=make_target(1_000), **dict(zip(names, X.T, strict=True)))
    source = Hdf5Source(tmp_path / "a.h5", features=names)
    assert source.open_block_bytes >= X.nbytes
    calls: list[str] = []

    def counted(dataset: h5py.Dataset, first: int, stop: int, panel: int) -> Any:
        calls.append(dataset.name)
        return dataset[first:stop]

    monkeypatch.setattr(hdf5_rows, "_read_rows", counted)
    assert_same_bits(read_block(source, 0, 0, (100,))[0], X)
    assert calls.count("/x3") == 1


def test_target_chunks_are_decoded_once_in_a_pass_over_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("X", data=make_rows(10_000, 4), chunks=(32, 4))
        file.create_dataset("y", data=make_target(10_000), chunks=(3_000,), compression="gzip")
    monkeypatch.setattr(hdf5, "_TARGET_ROWS", 4_000)
    source = Hdf5Source(tmp_path / "a.h5")
    calls: list[int] = []
    read = ChunkReader.read

    def counted(self: ChunkReader, first: int, *args: Any) -> Any:
        calls.append(first)
        return read(self, first, *args)

    monkeypatch.setattr(ChunkReader, "read", counted)
    assert_same_bits(np.concatenate([plain(y) for _, y, _ in source.iter_targets()]), make_target(10_000))
    assert sorted(calls) == [0, 3_000, 6_000, 9_000]


# Types


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">f8", "<f2", ">f2"])
def test_other_number_types_are_handed_out_native(tmp_path: Path, dtype: str) -> None:
    name = np.dtype(dtype).newbyteorder("=").name
    X = make_rows(100, 3, dtype=name)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for key, array in (("X", X), ("y", X[:, 0]), ("w", X[:, 1])):
            file.create_dataset(key, data=array, dtype=dtype)
    source = Hdf5Source(tmp_path / "a.h5", weight="w")
    assert source.feature_dtypes == (name,) * 3
    with source.open_block(0) as reader:
        piece = reader.read(100)
    for found, expected in zip(piece, (X, X[:, 0], X[:, 1]), strict=True):
        assert found.dtype == np.dtype(name)
        assert found.dtype.isnative
        assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", [np.dtype("S8"), h5py.string_dtype(), h5py.string_dtype("utf-8", 8)])
def test_text_targets_come_as_text(tmp_path: Path, dtype: Any) -> None:
    labels = np.array([b"no", "größer".encode(), b"", b"yes"] * 5, dtype="S8")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X"] = make_rows(20, 2)
        file.create_dataset("y", data=labels.astype(dtype), dtype=dtype)
    source = Hdf5Source(tmp_path / "a.h5")
    assert source.target is not None
    assert (source.target.dtype, source.target.numeric) == ("string", False)
    _, y, _ = read_all(source)
    assert y.dtype.kind == "U"
    assert y.tolist() == ["no", "größer", "", "yes"] * 5


def test_text_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", X=make_rows(3, 2), y=np.array([b"a", "é".encode("latin-1"), b"c"]))
    with pytest.raises(SchemaError, match=r"a\.h5: text in rows .* is not UTF-8"):
        read_all(Hdf5Source(tmp_path / "a.h5"))


def test_rows_never_written_are_fill_values(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, how in (("X", {"chunks": (10, 2)}), ("Z", {"chunks": (10, 2), "compression": "gzip"})):
            dataset = file.create_dataset(name, (95, 2), "f4", fillvalue=7, maxshape=(None, 2), **how)
            dataset[20:25] = 1
        file["y"] = np.zeros(95)
    expected = np.full((95, 2), 7, np.float32)
    expected[20:25] = 1
    for name in "XZ":
        assert_same_bits(read_all(Hdf5Source(tmp_path / "a.h5", features=name))[0], expected)


def test_several_datasets_side_by_side(tmp_path: Path) -> None:
    X = make_rows(50, 4)
    write(tmp_path / "a.h5", a=X[:, 0], m=X[:, 1:3], b=X[:, 3].astype("f8"), y=X[:, 0])
    source = Hdf5Source(tmp_path / "a.h5", features=["b", "m", "a"])
    assert source.feature_names == ("b", "m[0]", "m[1]", "a")
    assert source.feature_dtypes == ("float64", "float32", "float32", "float32")
    assert source.row_dtype == np.float64
    with source.open_block(0) as reader:
        columns = reader.read(50).X
    assert all(column.flags.c_contiguous for column in columns)
    assert_same_bits(np.column_stack(columns), X[:, [3, 1, 2, 0]])


def test_list_of_one_matrix_is_a_matrix(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", X=make_rows(50, 4), y=make_target(50))
    with Hdf5Source(tmp_path / "a.h5", features=["X"]).open_block(0) as reader:
        assert isinstance(reader.read(5).X, np.ndarray)


def test_virtual_datasets_are_read_and_their_files_asked_for(tmp_path: Path) -> None:
    X = make_rows(60, 3)
    virtual = h5py.VirtualLayout((60, 3), "f4")
    for i in range(3):
        write(tmp_path / f"{i}.h5", X=X[20 * i : 20 * i + 20])
        virtual[20 * i : 20 * i + 20] = h5py.VirtualSource(f"{i}.h5", "X", (20, 3))
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("X", virtual)
        file["y"] = make_target(60)
    source = Hdf5Source(tmp_path / "all.h5")
    assert_same_bits(read_all(source)[0], X)
    (tmp_path / "1.h5").unlink()
    with pytest.raises(SourceNotFoundError, match=r"virtual and takes rows from 1\.h5"):
        Hdf5Source(tmp_path / "all.h5")


def virtual_file(folder: Path, X: np.ndarray, *, part: bool = False) -> Path:
    """Make a virtual dataset over two others."""
    layout = h5py.VirtualLayout(X.shape, "f4")
    for i, rows in enumerate((np.s_[:30], np.s_[30:])):
        write(folder / f"{i}.h5", X=X[rows])
        source = h5py.VirtualSource(f"{i}.h5", "X", (31 if part else 30, 3))
        layout[rows] = source[:30] if part else source
    with h5py.File(folder / "all.h5", "w") as file:
        file.create_virtual_dataset("X", layout)
        file["y"] = make_target(len(X))
    return folder / "all.h5"


def test_virtual_rows_that_are_not_there_are_no_fill_values(tmp_path: Path) -> None:
    """HDF5 hands out zeros for a dataset that was renamed or is shorter, without a word."""
    path = virtual_file(tmp_path, make_rows(60, 3))
    source = Hdf5Source(path)
    with h5py.File(tmp_path / "1.h5", "r+") as file:
        file.move("X", "other")
    with pytest.raises(SourceNotFoundError, match=r"takes rows from dataset 'X' of 1\.h5, which has none of that name"):
        Hdf5Source(path)
    with pytest.raises(SourceNotFoundError, match="none of that name"):  # nor if it happens between opening and reading
        read_all(source)
    write(tmp_path / "1.h5", X=make_rows(29, 3))
    with pytest.raises(CorruptDataError, match=r"has shape \(29, 3\) where 90 values are taken"):
        Hdf5Source(path)
    virtual_file(tmp_path, make_rows(60, 3), part=True)
    Hdf5Source(path)
    write(tmp_path / "1.h5", X=make_rows(29, 3))
    with pytest.raises(CorruptDataError, match=r"has shape \(29, 3\) where at least \(30, 3\) is taken"):
        Hdf5Source(path)
    (tmp_path / "1.h5").write_bytes(b"no HDF5")
    with pytest.raises(CorruptDataError, match=r"1\.h5 .* is not an HDF5 file"):
        Hdf5Source(path)


def test_virtual_rows_of_the_same_file_without_an_end_and_of_numbered_files(tmp_path: Path) -> None:
    X = make_rows(60, 3)
    write(tmp_path / "part-0.h5", X=X[:30])
    write(tmp_path / "part-1.h5", X=X[30:])
    endless = h5py.h5s.UNLIMITED
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_dataset("Z", data=X, chunks=(10, 3), maxshape=(None, 3))
        same = h5py.VirtualLayout((60, 3), "f4", maxshape=(None, 3))
        same[:endless] = h5py.VirtualSource(".", "Z", (60, 3), maxshape=(None, 3))[:endless]
        file.create_virtual_dataset("A", same)
        where, taken = h5py.h5s.create_simple((60, 3), (endless, 3)), h5py.h5s.create_simple((30, 3))
        where.select_hyperslab((0, 0), (endless, 1), stride=(30, 1), block=(30, 3))
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_virtual(where, b"part-%b.h5", b"X", taken)
        h5py.h5d.create(file.id, b"B", h5py.h5t.IEEE_F32LE, where, creation)
        file["y"] = make_target(60)
    for name, files in {"A": ["all.h5"], "B": ["all.h5", "part-0.h5", "part-1.h5"]}.items():
        source = Hdf5Source(tmp_path / "all.h5", features=name)
        assert_same_bits(read_all(source)[0], X)
        assert [Path(path).name for path in source.stamp()] == files


def test_external_storage_that_was_cut_short_is_no_zeros(tmp_path: Path) -> None:
    X = make_rows(60, 3)
    X[:40].tofile(tmp_path / "one.bin")
    (tmp_path / "two.bin").write_bytes(b"head" + X[40:].tobytes())
    parts = [(str(tmp_path / "one.bin"), 0, 480), (str(tmp_path / "two.bin"), 4, h5py.h5f.UNLIMITED)]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("X", shape=X.shape, dtype="f4", external=parts)
        file["y"] = make_target(60)
    source = Hdf5Source(tmp_path / "a.h5")
    assert_same_bits(read_all(source)[0], X)
    source.close()
    os.truncate(tmp_path / "two.bin", 243)
    with pytest.raises(CorruptDataError, match=r"two\.bin, which has 243 bytes where 244 are needed"):
        Hdf5Source(tmp_path / "a.h5")
    (tmp_path / "one.bin").unlink()
    with pytest.raises(SourceNotFoundError, match=r"lie in .*one\.bin, which is not there"):
        Hdf5Source(tmp_path / "a.h5")


@pytest.mark.parametrize("chunks", [None, (20, 3)])
def test_numbers_of_few_bits_are_read_as_h5py_reads_them(tmp_path: Path, chunks: tuple[int, int] | None) -> None:
    """NumPy's name of the type says nothing of the bits in the file."""
    twelve = h5py.h5t.STD_I16LE.copy()
    twelve.set_precision(12)
    twelve.set_offset(4)
    brain = h5py.h5t.IEEE_F32LE.copy()
    brain.set_fields(15, 7, 8, 0, 7)
    brain.set_size(2)
    brain.set_ebias(127)
    values = {b"I": (twelve, np.arange(-90, 90, dtype="i2")), b"F": (brain, np.linspace(-3, 3, 180, dtype="f4"))}
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if chunks:
        creation.set_chunk(chunks)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["y"] = make_target(60)
        for name, (stored, flat) in values.items():
            dataset = h5py.h5d.create(file.id, name, stored, h5py.h5s.create_simple((60, 3)), creation)
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, flat.reshape(60, 3))
    for name in "IF":
        with h5py.File(tmp_path / "a.h5") as file:
            expected = file[name][:]
        source = Hdf5Source(tmp_path / "a.h5", features=name)
        assert not source.is_flat
        assert_same_bits(read_all(source)[0], expected)


@pytest.mark.parametrize("filters", [{}, {"chunks": (20, 3), "compression": "gzip"}])
def test_a_source_that_is_forgotten_leaves_no_file_open(tmp_path: Path, filters: dict[str, Any]) -> None:
    """At once, and not when the collector comes by: else the file cannot be written to."""
    write(tmp_path / "a.h5", filters, X=make_rows(60, 3), y=make_target(60))
    gc.disable()
    try:
        source = Hdf5Source(tmp_path / "a.h5")
        read_all(source)
        source.flat_rows()
        del source
        with h5py.File(tmp_path / "a.h5", "r+") as file:
            file["y"][...] = 0
    finally:
        gc.enable()


def test_links_are_followed(tmp_path: Path) -> None:
    X = make_rows(60, 7)
    write(tmp_path / "other.h5", {"chunks": (20, 3)}, **{"deep/X": X})
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X"] = h5py.ExternalLink("other.h5", "/deep/X")
        file["data/labels"] = make_target(60)
        file["y"] = h5py.SoftLink("/data/labels")
    source = Hdf5Source(tmp_path / "a.h5")
    for found, expected in zip(read_all(source)[:2], (X, make_target(60)), strict=True):
        assert_same_bits(found, expected)
    source.close()
    assert open_files_in(tmp_path) == []


# Several files


def test_files_may_differ_in_the_width_of_types(tmp_path: Path) -> None:
    parts = [make_rows(20, 2, dtype=name) for name in ("float32", "float64")]
    for i, X in enumerate(parts):
        write(tmp_path / f"{i}.h5", X=X, y=np.arange(20, dtype=("i2", "i8")[i]))
    source = Hdf5Source(sorted(tmp_path.glob("*.h5")))
    assert source.row_dtype == np.float64
    assert source.feature_dtypes == ("float64", "float64")
    assert source.target is not None
    assert source.target.dtype == "int64"
    assert_same_bits(read_all(source)[0], np.concatenate(parts))
    assert "1.h5" in source.locate(1, 3)
    assert "row 3" in source.locate(1, 3)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"X": make_rows(20, 3), "y": np.zeros(20)}, r"b\.h5: dataset 'X' .*\(3,\).*a\.h5 .*\(2,\)"),
        ({"X": make_rows(20, 2, dtype="int32"), "y": np.zeros(20)}, r"b\.h5: dataset 'X' .*int32.*float32"),
        ({"X": make_rows(20, 2), "y": np.zeros(20, bool)}, r"b\.h5: dataset 'y' .*bool.*float64"),
        ({"X": make_rows(20, 2), "y": np.zeros((20, 1))}, r"b\.h5: dataset 'y' .*\(1,\).*\(\)"),
    ],
)
def test_files_that_disagree_are_named(tmp_path: Path, other: dict[str, Any], match: str) -> None:
    write(tmp_path / "a.h5", X=make_rows(20, 2), y=np.zeros(20))
    write(tmp_path / "b.h5", **other)
    with pytest.raises(SchemaError, match=match):
        Hdf5Source([tmp_path / "a.h5", tmp_path / "b.h5"])


def test_few_of_many_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_rows, "_OPEN_FILES", 3)
    X = make_rows(100, 2)
    for i in range(10):
        write(tmp_path / f"{i}.h5", X=X[10 * i : 10 * i + 10], y=make_target(10))
    source = Hdf5Source(sorted(tmp_path.glob("*.h5")))
    readers = [source.open_block(block) for block in range(10)]
    for at in (0, 4):
        for block, reader in enumerate(readers):
            assert_same_bits(reader.read(4).X, X[10 * block + at : 10 * block + at + 4])
            assert len(open_files_in(tmp_path)) <= 3
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda block: read_block(source, block)[0], [*range(10)] * 5))
    assert_same_bits(np.concatenate(parts), np.concatenate([X] * 5))
    source.close()
    assert open_files_in(tmp_path) == []


def test_order_and_names_of_several_files_count(tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / f"{i}.h5", X=make_rows(20, 2, seed=i), y=np.zeros(20))
    paths = sorted(tmp_path.glob("*.h5"))
    fingerprint = Hdf5Source(paths).fingerprint
    assert Hdf5Source(paths[::-1]).fingerprint != fingerprint
    paths[0].rename(tmp_path / "2.h5")
    assert Hdf5Source([tmp_path / "2.h5", paths[1]]).fingerprint != fingerprint


def test_name_of_a_single_file_does_not_count(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", X=make_rows(20, 2), y=np.zeros(20))
    fingerprint = Hdf5Source(tmp_path / "a.h5").fingerprint
    (tmp_path / "a.h5").rename(tmp_path / "b.h5")
    assert Hdf5Source(tmp_path / "b.h5").fingerprint == fingerprint


# Living with others


@pytest.mark.parametrize("how", [{}, {"locking": False}, {"mode": "r+"}])
def test_file_open_beside_the_source_in_this_process(tmp_path: Path, how: Any) -> None:
    """Whichever comes first, neither keeps the other out."""
    path = write(tmp_path / "a.h5", X=make_rows(20, 2), y=np.zeros(20))
    with h5py.File(path, **how) as file:
        source = Hdf5Source(path)
        assert_same_bits(read_all(source)[0], file["X"][:])
    source.close()
    read_all(source)
    with h5py.File(path) as file:
        assert_same_bits(read_all(source)[0], file["X"][:])
        source.close()
        assert file["X"].shape == (20, 2)


def test_file_being_written_by_another_process(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", X=make_rows(20, 2), y=np.zeros(20))
    writer = f"import h5py; file = h5py.File({str(path)!r}, 'r+'); print('open', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", writer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        refused(DataError, r"a\.h5 is open for writing in another process", path)
        process.communicate(b"\n")
    assert_same_bits(read_all(Hdf5Source(path))[0], make_rows(20, 2))


def test_read_only_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", X=make_rows(20, 2), y=np.zeros(20))
    path.chmod(stat.S_IRUSR)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert_same_bits(read_all(Hdf5Source(path))[0], make_rows(20, 2))
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_relative_paths_are_remembered_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.h5", X=make_rows(20, 2), y=np.zeros(20))
    monkeypatch.chdir(tmp_path)
    source = pickle.loads(pickle.dumps(Hdf5Source("a.h5")))
    monkeypatch.chdir("/")
    assert_same_bits(read_all(source)[0], make_rows(20, 2))


def test_default_target_is_there_or_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", X=make_rows(20, 2), g=np.zeros(3))
    assert has_dataset(path, "X")
    assert not has_dataset(path, "y")


# Errors


def refused(error: type[Exception], match: str, *args: Any, **options: Any) -> None:
    with pytest.raises(error, match=match):
        Hdf5Source(*args, **options)


def test_missing_file(tmp_path: Path) -> None:
    refused(SourceNotFoundError, r"gone\.h5: there is no such file", tmp_path / "gone.h5")


def test_folder(tmp_path: Path) -> None:
    refused(DataError, r"is a folder; name the HDF5 files", tmp_path)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n" * 1000])
def test_other_kinds_of_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.h5").write_bytes(content)
    refused(CorruptDataError, r"a\.h5 .*is not an HDF5 file", tmp_path / "a.h5")


def test_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", X=make_rows(1_000, 20), y=np.zeros(1_000))
    os.truncate(path, path.stat().st_size // 2)
    refused(CorruptDataError, r"a\.h5 is cut short", path)


def test_damaged_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", X=make_rows(1_000, 20), y=np.zeros(1_000))
    content = bytearray(path.read_bytes())
    content[96:2048] = b"\xa5" * 1952
    path.write_bytes(content)
    refused(DataError, r"a\.h5", path)


def test_missing_dataset_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", **{"g/X": make_rows(20, 2), "label": np.zeros(20)})
    refused(SourceNotFoundError, r"no dataset 'X'; .*'g/X' \(20, 2\) float32, 'label' \(20,\) float64", path)
    refused(SourceNotFoundError, "no dataset 'y'", path, features="g/X")
    refused(SourceNotFoundError, "no dataset 'w'", path, features="g/X", target="label", weight="w")
    refused(SourceNotFoundError, "'g' is a group", path, features="g")


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", y=np.zeros(20))
    with h5py.File(path, "r+") as file:
        file["X"] = h5py.ExternalLink("gone.h5", "X")
        file["Z"] = h5py.SoftLink("/gone")
    refused(SourceNotFoundError, "'X'", path)
    refused(SourceNotFoundError, "'Z'", path, features="Z")


@pytest.mark.parametrize(
    ("X", "match"),
    [
        (np.zeros((20, 2, 2)), r"shape \(20, 2, 2\)"),
        (np.zeros((20, 0)), r"shape \(20, 0\)"),
        (np.zeros(20), r"features=\['X'\]"),
        (np.float64(1), "single value"),
        (np.zeros((20, 2), complex), "complex128"),
        (np.zeros((20, 2), "S3"), "type string"),
        (np.zeros((20, 2), dtype=[("a", "f4")]), r"type .*'a'"),
        (np.zeros((20, 2), dtype=h5py.ref_dtype), "type object"),
    ],
)
def test_unusable_features(tmp_path: Path, X: Any, match: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("X", np.shape(X), np.asarray(X).dtype)
        file["y"] = np.zeros(20)
    refused(SchemaError, rf"a\.h5.*'X'.*{match}|a\.h5.*{match}", tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("y", "match"), [(np.zeros((20, 2, 2)), r"shape \(20, 2, 2\)"), (np.zeros(20, complex), "complex")]
)
def test_unusable_targets(tmp_path: Path, y: Any, match: str) -> None:
    refused(SchemaError, f"target dataset 'y'.*{match}", write(tmp_path / "a.h5", X=make_rows(20, 2), y=y))


@pytest.mark.parametrize(("w", "match"), [(np.zeros((20, 1)), r"shape \(20, 1\)"), (np.zeros(20, "S1"), "string")])
def test_unusable_weights(tmp_path: Path, w: Any, match: str) -> None:
    path = write(tmp_path / "a.h5", X=make_rows(20, 2), y=np.zeros(20), w=w)
    refused(SchemaError, f"weight dataset 'w'.*{match}", path, weight="w")


@pytest.mark.parametrize("name", ["y", "w"])
def test_row_counts_that_differ(tmp_path: Path, name: str) -> None:
    arrays = {"X": make_rows(20, 2), "y": np.zeros(20), "w": np.zeros(20), name: np.zeros(21)}
    refused(SchemaError, f"'X' has 20 rows, but '{name}' has 21", write(tmp_path / "a.h5", **arrays), weight="w")


def test_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", X=np.zeros((0, 2)), y=np.zeros(0))
    refused(EmptySourceError, r"a\.h5 and 1 more: dataset 'X' has no rows", [path, path])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"features": ["a", "/a"]}, "'a' would be used twice"),
        ({"features": ["a", "y"]}, "'y' would be used twice"),
        ({"features": []}, "at least one"),
    ],
)
def test_unusable_choice_of_datasets(tmp_path: Path, options: Any, match: str) -> None:
    refused(OptionError, match, write(tmp_path / "a.h5", a=np.zeros(3), y=np.zeros(3)), **options)
    refused(OptionError, "no HDF5 file", [])


def write_damaged(path: Path) -> Path:
    """Write compressed chunks and overwrite the third one's bytes."""
    write(path, {"chunks": (50, 4), "compression": "gzip"}, X=make_rows(200, 4), y=make_target(200))
    with h5py.File(path) as file:
        chunk = file["X"].id.get_chunk_info(2)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)
    return path


def test_damaged_chunk_is_named(tmp_path: Path) -> None:
    source = Hdf5Source(write_damaged(tmp_path / "a.h5"))
    read_block(source, 1)
    with pytest.raises(CorruptDataError, match=r"a\.h5: rows 100 to 149 \(block 2\) cannot be read from 'X'") as caught:
        read_block(source, 2)
    assert isinstance(caught.value.__cause__, OSError)
    read_block(source, 3)


def test_file_replaced_by_another_while_in_use(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", X=make_rows(20, 2), y=np.zeros(20))
    source = Hdf5Source(path)
    write(path, X=make_rows(30, 2), y=np.zeros(30))
    with pytest.raises(CorruptDataError, match=r"a\.h5 was changed while it was in use: dataset 'X' was .*20.*30"):
        read_all(source)


def write_unknown_filter(path: Path, code: int) -> Path:
    """Name a filter that is optional, so that HDF5 stores chunks without it where it is missing."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((10, 2))
    creation.set_filter(code, h5py.h5z.FLAG_OPTIONAL, ())
    with h5py.File(path, "w") as file:
        h5py.h5d.create(file.id, b"X", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((20, 2)), creation)
        file["y"] = np.zeros(20)
    return path


def test_filter_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_unknown_filter(tmp_path / "a.h5", 511)
    refused(CorruptDataError, r"filter 511 .*not installed.*hdf5plugin", path)
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    assert not hdf5_files.filter_is_there(511)


def test_filter_of_hdf5plugin_in_a_process_that_has_not_imported_it(tmp_path: Path) -> None:
    hdf5plugin = pytest.importorskip("hdf5plugin")
    X = make_rows(200, 4)
    write(tmp_path / "a.h5", {"chunks": (50, 4), **hdf5plugin.Zstd()}, X=X, y=make_target(200))
    (tmp_path / "source").write_bytes(pickle.dumps(Hdf5Source(tmp_path / "a.h5")))
    reader = (
        "import pickle, pathlib; "
        f"source = pickle.loads(pathlib.Path({str(tmp_path / 'source')!r}).read_bytes()); "
        "assert source.open_block(3).read(50).X.shape == (50, 4)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", reader]) == 0


def test_types_that_numpy_does_not_know(tmp_path: Path) -> None:
    """They are named where they are used, and do no harm where they are not."""
    quadruple = h5py.h5t.IEEE_F64LE.copy()
    quadruple.set_size(16)
    quadruple.set_precision(128)
    quadruple.set_fields(127, 112, 15, 0, 112)
    quadruple.set_ebias(16383)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X"], file["y"] = np.ones((20, 2)), np.arange(20.0)
        h5py.h5d.create(file.id, b"q", quadruple, h5py.h5s.create_simple((20,)))
    assert Hdf5Source(tmp_path / "a.h5", target="y").n_rows == 20
    with pytest.raises(SchemaError, match="a type that NumPy does not know"):
        Hdf5Source(tmp_path / "a.h5", target="q")
    with pytest.raises(SourceNotFoundError, match=r"there is no dataset 'z'; .* 'q' \(20,\) of an unknown type"):
        Hdf5Source(tmp_path / "a.h5", target="z")


def test_tables_of_records_are_told(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["table"] = np.zeros(3, [("x", "f4"), ("y", "f4")])
    with pytest.raises(SourceNotFoundError, match=r"holds 'table'.*Tables of records \(compound types\) are not read"):
        Hdf5Source(tmp_path / "a.h5")
