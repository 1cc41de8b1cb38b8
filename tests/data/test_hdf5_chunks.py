"""Chunks read past HDF5's library: the same bits as h5py, or h5py itself."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from streamgd.data.sources import hdf5_places, hdf5_rows
from streamgd.data.sources.buffers import Buffers
from streamgd.data.sources.hdf5 import Hdf5Source
from streamgd.data.sources.hdf5_chunks import ChunkReader
from streamgd.errors import CorruptDataError, SchemaError
from tests.data.contract import make_rows, make_target, open_files_in

GZIP = {"compression": "gzip", "compression_opts": 1}
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "gzip": GZIP,
    "gzip shuffle": {**GZIP, "shuffle": True},
    "gzip shuffle fletcher32": {**GZIP, "shuffle": True, "fletcher32": True},
    "lzf": {"compression": "lzf"},
    "lzf shuffle fletcher32": {"compression": "lzf", "shuffle": True, "fletcher32": True},
    "fletcher32": {"fletcher32": True},
    "shuffle": {"shuffle": True},
    "shuffle fletcher32": {"shuffle": True, "fletcher32": True},
}


@pytest.fixture
def read_by_h5py(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the datasets that h5py reads rows of."""
    names: list[str] = []
    read = hdf5_rows._read_rows

    def noted(dataset: h5py.Dataset, *args: Any) -> Any:
        names.append(dataset.name)
        return read(dataset, *args)

    monkeypatch.setattr(hdf5_rows, "_read_rows", noted)
    return names


def smooth(n_rows: int, n_columns: int | None, dtype: str, seed: int = 3) -> np.ndarray:
    """Generate values of a type that compress, and that are all different bytes somewhere."""
    generator = np.random.default_rng(seed)
    kind, shape = np.dtype(dtype).kind, (n_rows,) if n_columns is None else (n_rows, n_columns)
    if kind == "b":
        return generator.random(shape) < 0.2
    if kind == "S":
        return generator.choice([b"no", b"yes", b"", b"perhaps"], shape).astype(dtype)
    if kind in "iu":
        bounds = np.iinfo(dtype)
        values = generator.integers(bounds.min, bounds.max, shape, np.dtype(dtype).newbyteorder("="), endpoint=True)
    else:
        values = generator.standard_normal(shape)
        values.flat[:3] = np.nan, -0.0, np.inf
    return np.where(generator.random(shape) < 0.7, 1, values).astype(dtype)


def write(path: Path, X: Any, y: Any = None, chunks: Any = True, options: Any = None, **how: Any) -> Path:
    """Write features and a target, both in chunks of the same height."""
    with h5py.File(path, "w", **(options or {})) as file:
        X_set = file.create_dataset("X", data=X, dtype=X.dtype, chunks=chunks, **how)
        y = make_target(len(X)) if y is None else y
        how["maxshape"] = how.get("maxshape", y.shape)[:1]
        file.create_dataset("y", data=y, dtype=y.dtype, chunks=X_set.chunks[:1], **how)
    return path


def bits(array: Any) -> bytes:
    """Return the bits of numbers, and text as it is."""
    array = np.asarray(array)
    return array.tobytes() if array.dtype.kind in "fiub" else repr(array.tolist()).encode()


def as_handed_out(array: np.ndarray) -> np.ndarray:
    """Convert what h5py reads to what slices hold."""
    if array.dtype.kind == "S":
        return np.char.decode(array, "utf-8")
    return array.astype(np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("="))


def assert_as_h5py(
    source: Hdf5Source, *paths: Path, features: str = "X", sizes: tuple[int, ...] = (1_000_000,)
) -> None:
    """Compare every block, read from its beginning and from its middle, and the targets alone, with h5py's rows."""
    X, y = [], []
    for path in paths:
        with h5py.File(path) as file:
            X.append(as_handed_out(file["X"][()]))
            y.append(as_handed_out(file["y"][()]))
    expected_X, expected_y = np.concatenate(X), np.concatenate(y)
    first = 0
    for block, n_rows in enumerate(source.block_rows.tolist()):
        for start in {0, n_rows // 2}:
            at = first + start
            with source.open_block(block, start) as reader:
                for size in itertools.cycle(sizes):
                    n = min(size, first + n_rows - at)
                    piece = reader.read(n)
                    assert bits(piece.X) == bits(expected_X[at : at + n])
                    assert bits(piece.y) == bits(expected_y[at : at + n])
                    at += n
                    if at == first + n_rows:
                        break
        first += n_rows
    n = len(expected_y)
    for start, stop in ((0, None), (n // 3, n - n // 5), (n - 1, n)):
        parts = [np.array(part) for _, part, _ in source.iter_targets(start, stop)]
        assert bits(np.concatenate(parts)) == bits(expected_y[start:stop])


# What is read past h5py


@pytest.mark.parametrize("chunks", [(100, 7), (64, 3), (33, 1), (7, 2), (1, 7), (333, 5)])
@pytest.mark.parametrize("filters", FILTERS)
def test_same_bits_for_any_shape_of_chunks(
    tmp_path: Path, read_by_h5py: list[str], filters: str, chunks: tuple[int, int]
) -> None:
    path = write(tmp_path / "a.h5", smooth(333, 7, "f4"), chunks=chunks, **FILTERS[filters])
    source = Hdf5Source(path, block_bytes=4_000)
    assert_as_h5py(source, path, sizes=(1, 17, 5, 64))
    if filters != "shuffle":  # whose chunks at the edges do not tell whether they were shuffled
        assert read_by_h5py == []


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "g", "?"])
@pytest.mark.parametrize("filters", FILTERS)
def test_same_bits_for_any_type(tmp_path: Path, read_by_h5py: list[str], filters: str, dtype: str) -> None:
    path = write(tmp_path / "a.h5", smooth(120, 4, dtype), smooth(120, None, dtype), (40, 2), **FILTERS[filters])
    assert_as_h5py(Hdf5Source(path), path)
    assert read_by_h5py == []


@pytest.mark.parametrize("dtype", [">i2", ">u4", ">i8", ">f2", ">f4", ">f8", "<f4"])
@pytest.mark.parametrize("filters", ["none", "gzip shuffle", "lzf"])
def test_same_bits_for_any_byte_order(tmp_path: Path, read_by_h5py: list[str], filters: str, dtype: str) -> None:
    path = write(tmp_path / "a.h5", smooth(120, 4, dtype), smooth(120, None, dtype), (40, 2), **FILTERS[filters])
    source = Hdf5Source(path)
    assert_as_h5py(source, path)
    with source.open_block(0) as reader:
        assert reader.read(1).X.dtype.isnative
    assert read_by_h5py == []


@pytest.mark.parametrize("dtype", ["S8", "S1", h5py.string_dtype("utf-8", 9), h5py.string_dtype("ascii", 7)])
@pytest.mark.parametrize("filters", ["none", "gzip shuffle", "lzf"])
def test_text_of_fixed_width(tmp_path: Path, read_by_h5py: list[str], filters: str, dtype: Any) -> None:
    y = smooth(120, None, "S9").astype(dtype)
    path = write(tmp_path / "a.h5", smooth(120, 4, "f4"), y, (40, 2), **FILTERS[filters])
    assert_as_h5py(Hdf5Source(path), path)
    assert read_by_h5py == []


@pytest.mark.parametrize("filters", FILTERS)
def test_big_chunks(tmp_path: Path, read_by_h5py: list[str], filters: str) -> None:
    """Which are decompressed piece by piece."""
    X = smooth(30_000, 8, "f4")
    X[10_000:20_000] = 5  # a piece that becomes many
    path = write(tmp_path / "a.h5", X, None, (30_000, 8), **FILTERS[filters])
    assert_as_h5py(Hdf5Source(path), path)
    assert read_by_h5py == []


@pytest.mark.parametrize("change", ["flip", "end_early", "blot", "longer", "shorter"])
def test_damaged_big_chunks(tmp_path: Path, change: str) -> None:
    X = smooth(30_000, 8, "f4")
    path = write(tmp_path / "a.h5", X, None, (30_000, 8), **GZIP)
    if change in ("longer", "shorter"):
        n = 40_000 if change == "longer" else 20_000
        with h5py.File(path, "r+") as file:
            file["X"].id.write_direct_chunk((0, 0), zlib.compress(np.ones((n, 8), np.float32).tobytes()))
    else:
        damage(path, 0, {"flip": flip, "end_early": end_early, "blot": blot}[change])
    with h5py.File(path) as file:
        reader = hdf5_places.ChunkTables().open(0, [file["X"]])[0]
    assert reader is not None
    memory = np.empty(reader.n_bytes(30_000), np.uint8)
    if change == "shorter":
        with pytest.raises(OSError, match="a chunk of 960,000 bytes decompresses to 640,000"):
            reader.read(0, 30_000, memory, Buffers())
    else:
        assert reader.read(0, 30_000, memory, Buffers()) is None


# What stays decoded


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the places of chunks that are decoded."""
    offsets: list[int] = []
    decode = ChunkReader._chunk

    def noted(self: ChunkReader, offset: int, *args: Any) -> Any:
        offsets.append(offset)
        return decode(self, offset, *args)

    monkeypatch.setattr(ChunkReader, "_chunk", noted)
    return offsets


@pytest.mark.parametrize("dtype", ["f4", ">f8", "i2", "u1", "S5"])
@pytest.mark.parametrize("filters", ["gzip shuffle", "gzip shuffle fletcher32", "lzf", "lzf shuffle fletcher32"])
@pytest.mark.parametrize("columns", [None, 3])
def test_targets_stay_decoded_as_far_as_memory_is_lent(
    tmp_path: Path, decoded: list[int], filters: str, dtype: str, columns: int | None
) -> None:
    """Their chunks are taller than those of the features, and stick out at the end."""
    y = smooth(1000, columns, dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("X", data=smooth(1000, 4, "f4"), chunks=(50, 4), **GZIP)
        file.create_dataset("y", data=y, chunks=(170, 2)[: y.ndim], **FILTERS[filters])
    source = Hdf5Source(tmp_path / "a.h5", block_bytes=50 * 16)
    n_chunks = 6 * (1 if columns is None else 2)
    n_bytes = 170 * (1 if columns is None else 2) * y.itemsize

    def times() -> int:
        decoded.clear()
        assert_as_h5py(source, tmp_path / "a.h5", sizes=(7, 30))
        with h5py.File(tmp_path / "a.h5") as file:
            X_places = {file["X"].id.get_chunk_info(i).byte_offset for i in range(20)}
        return len([offset for offset in decoded if offset not in X_places])

    often = times()
    assert often > 2 * n_chunks
    source.lend(1 << 20)
    assert times() == n_chunks
    assert times() == 0
    source.lend(2 * (n_bytes + 512))  # less than is kept: all is forgotten, and some of it kept anew
    assert n_chunks < times() < often
    source.lend(0)
    assert times() == often


def test_text_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", make_rows(100, 2), np.array([b"a", b"\xe9"] * 50), (25, 2), **GZIP)
    with pytest.raises(SchemaError, match=r"a\.h5: text in rows 0 to 99 is not UTF-8"):
        list(Hdf5Source(path).iter_targets())


@pytest.mark.parametrize("filters", ["none", "gzip shuffle", "lzf"])
def test_targets_with_several_outputs_and_weights(tmp_path: Path, read_by_h5py: list[str], filters: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, shape, chunks in (
            ("a", (90, 3), (20, 2)),
            ("b", (90,), (50,)),
            ("y", (90, 4), (30, 1)),
            ("w", 90, (7,)),
        ):
            values = np.random.default_rng(len(name)).random(shape)
            file.create_dataset(name, data=values, chunks=chunks, **FILTERS[filters])
    source = Hdf5Source(tmp_path / "a.h5", features=["b", "a"], target="y", weight="w")
    with h5py.File(tmp_path / "a.h5") as file, source.open_block(0) as reader:
        piece = reader.read(int(source.block_rows[0]))
        n = len(piece.y)
        assert bits(np.column_stack(piece.X)) == bits(np.column_stack([file["b"][:n], file["a"][:n]]))
        assert bits(piece.y) == bits(file["y"][:n])
        assert bits(piece.weight) == bits(file["w"][:n])
    assert read_by_h5py == []


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}], ids=["earliest", "latest"])
@pytest.mark.parametrize(
    ("maxshape", "chunks"),
    [((333, 7), (40, 3)), ((None, 7), (40, 3)), ((None, None), (40, 3)), ((333, 7), (333, 7)), ((900, 20), (400, 9))],
    ids=["fixed array", "extensible array", "B-tree", "single chunk", "beyond the dataset"],
)
@pytest.mark.parametrize("filters", ["none", "gzip shuffle", "gzip shuffle fletcher32"])
def test_every_index_of_chunks(
    tmp_path: Path, read_by_h5py: list[str], filters: str, maxshape: Any, chunks: Any, options: Any
) -> None:
    X = smooth(333, 7, "f4")
    path = write(tmp_path / "a.h5", X, None, chunks, options, maxshape=maxshape, **FILTERS[filters])
    assert_as_h5py(Hdf5Source(path, block_bytes=4_000), path)
    assert read_by_h5py == []


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}], ids=["earliest", "latest"])
@pytest.mark.parametrize("maxshape", [(95, 7), (None, 7), (None, None)])
@pytest.mark.parametrize("filters", ["none", "gzip shuffle", "lzf shuffle fletcher32"])
@pytest.mark.parametrize("fill", [None, -2.5, np.nan])
def test_chunks_never_written_are_fill_values(
    tmp_path: Path, read_by_h5py: list[str], filters: str, maxshape: Any, options: Any, fill: Any
) -> None:
    with h5py.File(tmp_path / "a.h5", "w", **options) as file:
        how = {"chunks": (10, 3), "maxshape": maxshape, "fillvalue": fill, **FILTERS[filters]}
        dataset = file.create_dataset("X", (95, 7), ">f4", **how)
        dataset[22:26, 2:] = 1
        dataset[90:, 0] = 3
        file.create_dataset("y", (95,), "i8", chunks=(10,), fillvalue=7)[:5] = 2
    path = tmp_path / "a.h5"
    assert_as_h5py(Hdf5Source(path), path)
    assert read_by_h5py == []


@pytest.mark.parametrize("when", ["alloc", "never", "ifset"])
@pytest.mark.parametrize("early", [False, True])
def test_fill_values_that_were_written_early_or_never(tmp_path: Path, when: Any, early: bool) -> None:
    """With chunks allocated at once, and no filter, the newest format needs no index at all."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((10, 3))
    creation.set_fill_value(np.array(4, np.float32))
    if early:
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(getattr(h5py.h5d, f"FILL_TIME_{when.upper()}"))
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        space = h5py.h5s.create_simple((40, 7), (40, 7))
        dataset = h5py.Dataset(h5py.h5d.create(file.id, b"X", h5py.h5t.IEEE_F32LE, space, creation))
        dataset[5:12, 1:] = 1
        file["y"] = make_target(40)
    assert_as_h5py(Hdf5Source(path), path)


def test_nothing_was_ever_written(tmp_path: Path, read_by_h5py: list[str]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("X", (40, 3), "f4", chunks=(10, 3), fillvalue=2, **GZIP)
        file.create_dataset("y", (40,), "S3", chunks=(10,), fillvalue=b"abc")
    assert_as_h5py(Hdf5Source(tmp_path / "a.h5"), tmp_path / "a.h5")
    assert read_by_h5py == []


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}], ids=["earliest", "latest"])
@pytest.mark.parametrize("filters", ["none", "gzip shuffle", "lzf"])
def test_datasets_that_were_resized(tmp_path: Path, read_by_h5py: list[str], filters: str, options: Any) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", **options) as file:
        for name, width in (("X", (7,)), ("y", ())):
            how = {"maxshape": (None,) * (1 + len(width)), "fillvalue": 9, **FILTERS[filters]}
            dataset = file.create_dataset(name, (100, *width), "f4", chunks=(30, 4)[: 1 + len(width)], **how)
            dataset[:] = np.random.default_rng(0).random((100, *width))
            dataset.resize((37, *width))
            dataset.resize((171, *width))
            dataset[150:160] = 5
            if width:
                dataset.resize((171, 3))
                dataset.resize((171, 10))
    assert_as_h5py(Hdf5Source(path, block_bytes=2_000), path)
    assert read_by_h5py == []


@pytest.mark.parametrize("dtype", ["f4", "u1", ">f8"])
@pytest.mark.parametrize("filters", ["gzip shuffle fletcher32", "lzf shuffle fletcher32", "gzip", "lzf"])
def test_filters_that_single_chunks_went_without(
    tmp_path: Path, read_by_h5py: list[str], filters: str, dtype: str
) -> None:
    """HDF5 stores a chunk without a filter that fails, as lzf does where nothing can be saved."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["y"] = make_target(240)
        dataset = file.create_dataset("X", (240, 4), dtype, chunks=(30, 2), **FILTERS[filters])
        names = ["shuffle"] * dataset.shuffle + [filters.split()[0]] + ["fletcher32"] * dataset.fletcher32
        for number, corner in enumerate(itertools.product(range(0, 240, 30), (0, 2))):
            skipped = {name for i, name in enumerate(names) if number >> i & 1}
            plain = np.full((30, 2), number, dtype)
            content = plain.tobytes()
            if "shuffle" in names and "shuffle" not in skipped:
                content = plain.view(np.uint8).reshape(-1, plain.itemsize).T.tobytes()
            if "gzip" in names and "gzip" not in skipped:
                content = zlib.compress(content)
            skipped |= {"lzf", "fletcher32"}.intersection(names)
            mask = sum(1 << i for i, name in enumerate(names) if name in skipped)
            dataset.id.write_direct_chunk(corner, content, filter_mask=mask)
    assert_as_h5py(Hdf5Source(path), path)
    assert "/X" not in read_by_h5py


def test_lzf_leaves_chunks_that_do_not_shrink(tmp_path: Path, read_by_h5py: list[str]) -> None:
    X = np.random.default_rng(0).integers(0, 256, (90, 40), dtype=np.uint8)
    X[30:60] = 1
    path = write(tmp_path / "a.h5", X, None, (30, 40), compression="lzf", fletcher32=True)
    with h5py.File(path) as file:
        assert len({file["X"].id.get_chunk_info(i).filter_mask for i in range(3)}) == 2
    assert_as_h5py(Hdf5Source(path), path)
    assert read_by_h5py == []


@pytest.mark.parametrize("userblock", [512, 4096])
@pytest.mark.parametrize("options", [{}, {"libver": "latest"}], ids=["earliest", "latest"])
def test_bytes_of_the_users_own_come_first(
    tmp_path: Path, read_by_h5py: list[str], userblock: int, options: Any
) -> None:
    options = {"userblock_size": userblock, **options}
    path = write(tmp_path / "a.h5", smooth(333, 7, "f4"), None, (40, 3), options, **FILTERS["gzip shuffle"])
    with path.open("r+b") as file:
        file.write(b"\x89" * userblock)
    assert_as_h5py(Hdf5Source(path), path)
    assert read_by_h5py == []


def test_hdf5_that_does_not_count_the_users_bytes(tmp_path: Path, read_by_h5py: list[str], monkeypatch: Any) -> None:
    """As versions of HDF5 before 1.14.4 do."""
    path = write(tmp_path / "a.h5", smooth(333, 7, "f4"), None, (40, 3), {"userblock_size": 1024}, **GZIP)
    look_up = hdf5_places._find_base

    def shifted(dataset: Any, descriptor: Any, offsets: np.ndarray, sizes: np.ndarray) -> int | None:
        offsets -= 1024
        return look_up(dataset, descriptor, offsets, sizes)

    monkeypatch.setattr(hdf5_places, "_find_base", shifted)
    assert_as_h5py(Hdf5Source(path), path)
    assert read_by_h5py == []


def test_places_that_are_not_true_are_not_used(tmp_path: Path, read_by_h5py: list[str], monkeypatch: Any) -> None:
    path = write(tmp_path / "a.h5", smooth(333, 7, "f4"), None, (40, 3), **GZIP)
    look_up = hdf5_places._find_base

    def shifted(dataset: Any, descriptor: Any, offsets: np.ndarray, sizes: np.ndarray) -> int | None:
        offsets += 1
        return look_up(dataset, descriptor, offsets, sizes)

    monkeypatch.setattr(hdf5_places, "_find_base", shifted)
    assert_as_h5py(Hdf5Source(path), path)
    assert "/X" in read_by_h5py


def test_several_files_stored_in_different_ways(tmp_path: Path, read_by_h5py: list[str]) -> None:
    ways = [("none", (50, 2)), ("gzip shuffle", (30, 5)), ("lzf", (7, 5)), ("gzip shuffle fletcher32", (64, 1))]
    paths = [
        write(tmp_path / f"{i}.h5", smooth(100 + i, 5, ("f4", "f4", ">f4", "f4")[i], i), None, chunks, **FILTERS[name])
        for i, (name, chunks) in enumerate(ways)
    ]
    assert_as_h5py(Hdf5Source(paths, block_bytes=3_000), *paths)
    assert read_by_h5py == []


def test_files_opened_again_and_again_are_asked_for_their_chunks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5_rows, "_OPEN_FILES", 2)
    looked_up = []
    look_up = hdf5_places._look_up
    monkeypatch.setattr(hdf5_places, "_look_up", lambda *args: looked_up.append(1) or look_up(*args))
    paths = [write(tmp_path / f"{i}.h5", smooth(90, 3, "f4", i), None, (20, 2), **GZIP) for i in range(5)]
    source = Hdf5Source(paths)
    assert_as_h5py(source, *paths)
    assert_as_h5py(source, *paths)
    assert len(looked_up) == 2 * len(paths)
    source.close()
    assert open_files_in(tmp_path) == []


def test_a_file_that_was_written_again_is_asked_anew(tmp_path: Path, read_by_h5py: list[str]) -> None:
    path = tmp_path / "a.h5"
    source = Hdf5Source(write(path, smooth(90, 3, "f4", 0), None, (20, 2), **GZIP))
    assert_as_h5py(source, path)
    source.close()
    write(path, smooth(90, 3, "f4", 1), None, (20, 2), **GZIP)
    assert_as_h5py(source, path)
    assert read_by_h5py == []


def test_chunks_of_a_file_that_is_linked_to(tmp_path: Path, read_by_h5py: list[str]) -> None:
    write(tmp_path / "other.h5", smooth(90, 3, "f4"), None, (20, 2), **GZIP)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X"] = h5py.ExternalLink("other.h5", "/X")
        file.create_dataset("y", data=make_target(90), chunks=(40,))
    source = Hdf5Source(tmp_path / "a.h5")
    assert_as_h5py(source, tmp_path / "a.h5")
    assert read_by_h5py == []
    source.close()
    assert open_files_in(tmp_path) == []


# Threads and memory


def test_readers_do_not_wait_for_h5py(tmp_path: Path) -> None:
    """While somebody is in HDF5's library, which runs one call at a time, rows are read."""
    path = write(tmp_path / "a.h5", smooth(900, 3, "f4"), None, (20, 2), **GZIP)
    source = Hdf5Source(path)
    with source.open_block(0) as reader:
        reader.read(1)
    read: list[int] = []

    def read_on() -> None:
        with source.open_block(0) as reader:
            read.append(len(reader.read(int(source.block_rows[0])).y))

    with h5py._hl.base.phil:
        thread = threading.Thread(target=read_on)
        thread.start()
        thread.join(30)
        assert read == [int(source.block_rows[0])]


def test_many_threads_read_the_same_bits(tmp_path: Path) -> None:
    X = smooth(20_000, 6, "f4")
    path = write(tmp_path / "a.h5", X, None, (100, 2), **FILTERS["gzip shuffle fletcher32"])
    source = Hdf5Source(path, block_bytes=20_000)
    first = np.concatenate([[0], np.cumsum(source.block_rows)])

    def differs(block: int) -> bool:
        with source.open_block(block) as reader:
            return bits(reader.read(int(source.block_rows[block])).X) != bits(X[first[block] : first[block + 1]])

    with ThreadPoolExecutor(6) as pool:
        assert not any(pool.map(differs, [*range(source.n_blocks)] * 3))


def test_memory_is_used_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", smooth(20_000, 6, "f4"), None, (1_000, 6), **GZIP)
    source = Hdf5Source(path, block_bytes=20_000)
    addresses = set()
    for block in range(source.n_blocks):
        with source.open_block(block) as reader:
            addresses.add(reader.read(10).X.__array_interface__["data"][0])
    assert source.n_blocks == 20
    assert len(addresses) == 1


def test_rows_of_chunks_that_are_not_kept_use_the_same_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", smooth(20_000, 6, "f4"), None, (1_000, 3))
    source = Hdf5Source(path)
    with source.open_block(0) as reader:
        assert len({reader.read(10).X.__array_interface__["data"][0] for _ in range(20)}) == 1


def test_open_blocks_are_charged_for_decoding_and_for_the_places_of_chunks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", smooth(20_000, 6, "f4"), None, (1_000, 6), **GZIP)
    source = Hdf5Source(path)
    assert source.open_block_bytes >= 1_000 * 6 * 4 + 2 * 1_000 * 6 * 4 + 40 * 16 // 8
    assert source.slice_cost_rows == 1_000


# What is left to h5py


def test_more_chunks_than_are_kept_in_memory(tmp_path: Path, read_by_h5py: list[str], monkeypatch: Any) -> None:
    path = write(tmp_path / "a.h5", smooth(100, 4, "f4"), None, (10, 1), **GZIP)
    monkeypatch.setattr(hdf5_places, "MOST_CHUNKS", 45)
    assert_as_h5py(Hdf5Source(path), path)
    assert set(read_by_h5py) == {"/y"}


def test_chunks_listed_in_several_batches(tmp_path: Path, read_by_h5py: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(hdf5_places, "_NOTED", 7)
    path = write(tmp_path / "a.h5", smooth(100, 4, "f4"), None, (10, 1), **GZIP)
    assert_as_h5py(Hdf5Source(path), path)
    assert read_by_h5py == []


def write_by_plan(path: Path, plan: Callable[[Any], None], values: np.ndarray, kind: Any) -> Path:
    """Write features in chunks whose filters `plan` sets."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((20, 2))
    plan(creation)
    with h5py.File(path, "w") as file:
        dataset = h5py.h5d.create(file.id, b"X", kind, h5py.h5s.create_simple(values.shape), creation)
        h5py.Dataset(dataset)[:] = values
        file["y"] = make_target(len(values))
    return path


def shuffle_last(creation: Any) -> None:
    creation.set_deflate(4)  # which is also what shuffle notes: the bytes of a value
    creation.set_shuffle()


def compress_twice(creation: Any) -> None:
    creation.set_deflate(1)
    creation.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL, ())


def check_first(creation: Any) -> None:
    creation.set_fletcher32()
    creation.set_shuffle()
    creation.set_deflate(1)


def keep_decimals(creation: Any) -> None:
    creation.set_scaleoffset(h5py.h5z.SO_FLOAT_DSCALE, 3)


@pytest.mark.parametrize("plan", [shuffle_last, compress_twice, check_first, keep_decimals])
def test_filters_that_are_not_known_or_in_an_odd_order(
    tmp_path: Path, read_by_h5py: list[str], plan: Callable[[Any], None]
) -> None:
    path = write_by_plan(tmp_path / "a.h5", plan, make_rows(90, 3), h5py.h5t.IEEE_F32LE)
    assert_as_h5py(Hdf5Source(path), path)
    assert "/X" in read_by_h5py


def test_checksum_before_compression(tmp_path: Path, read_by_h5py: list[str]) -> None:
    def plan(creation: Any) -> None:
        creation.set_shuffle()
        creation.set_fletcher32()
        creation.set_deflate(1)

    path = write_by_plan(tmp_path / "a.h5", plan, make_rows(90, 3), h5py.h5t.IEEE_F32LE)
    assert_as_h5py(Hdf5Source(path), path)
    assert "/X" not in read_by_h5py


@pytest.mark.parametrize("filters", ["none", "gzip"])
def test_numbers_that_must_be_converted(tmp_path: Path, read_by_h5py: list[str], filters: str) -> None:
    """Integers of 20 bits in four bytes: the bits beyond do not say whether a number is negative."""
    kind = h5py.h5t.STD_I32LE.copy()
    kind.set_precision(20)
    X = np.random.default_rng(0).integers(-500_000, 500_000, (90, 3), dtype=np.int32)
    plan = (lambda creation: creation.set_deflate(1)) if filters == "gzip" else (lambda creation: None)
    path = write_by_plan(tmp_path / "a.h5", plan, X, kind)
    assert_as_h5py(Hdf5Source(path), path)
    assert "/X" in read_by_h5py


def test_other_compression(tmp_path: Path, read_by_h5py: list[str]) -> None:
    hdf5plugin = pytest.importorskip("hdf5plugin")
    path = write(tmp_path / "a.h5", smooth(200, 4, "f4"), None, (50, 4), **hdf5plugin.Zstd())
    assert_as_h5py(Hdf5Source(path), path)
    assert set(read_by_h5py) == {"/X", "/y"}


def test_virtual_datasets_over_chunks(tmp_path: Path, read_by_h5py: list[str]) -> None:
    write(tmp_path / "b.h5", smooth(90, 3, "f4"), None, (20, 2), **GZIP)
    layout = h5py.VirtualLayout((90, 3), "f4")
    layout[:] = h5py.VirtualSource("b.h5", "X", (90, 3))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("X", layout)
        file["y"] = make_target(90)
    assert_as_h5py(Hdf5Source(tmp_path / "a.h5"), tmp_path / "a.h5")
    assert "/X" in read_by_h5py


def test_file_that_this_process_is_writing(tmp_path: Path, read_by_h5py: list[str]) -> None:
    """What was written last may not be in the file yet."""
    path = write(tmp_path / "a.h5", smooth(90, 3, "f4"), None, (20, 2), **GZIP)
    with h5py.File(path, "r+") as file:
        source = Hdf5Source(path)
        with source.open_block(0) as reader:
            reader.read(1)
        file["X"][5] = 77
        file["y"][5] = 8
        with source.open_block(0) as reader:
            piece = reader.read(6)
        assert piece.X[5].tolist() == [77, 77, 77]
        assert piece.y[5] == 8
        source.close()


def leave_edges_unfiltered(creation: Any) -> None:
    """Set an option that h5py does not offer, by the library that it has loaded."""
    maps = Path("/proc/self/maps")
    loaded = re.findall(r"/\S*libhdf5[-.]\S*", maps.read_text()) if maps.exists() else []
    if not loaded:
        pytest.skip("looks for HDF5's library in /proc")
    function = ctypes.CDLL(loaded[0]).H5Pset_chunk_opts
    function.argtypes = [ctypes.c_int64, ctypes.c_uint]
    assert function(creation.id, 2) == 0


@pytest.mark.parametrize("codes", [(2,), (2, 1), (1,), (32000,), (2, 32000), (3,), (2, 1, 3), (32000, 3)])
@pytest.mark.parametrize("content", ["smooth", "zeros"])
def test_edges_that_were_not_filtered(tmp_path: Path, codes: tuple[int, ...], content: str) -> None:
    """HDF5 does not say so; a chunk must tell, or h5py is asked."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((10, 3))
    for code in codes:
        creation.set_filter(code, h5py.h5z.FLAG_OPTIONAL, (4,) if code == 1 else ())
    leave_edges_unfiltered(creation)
    X = smooth(95, 7, "f4") if content == "smooth" else np.zeros((95, 7), "f4")
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        dataset = h5py.h5d.create(file.id, b"X", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(X.shape), creation)
        h5py.Dataset(dataset)[:] = X
        file["y"] = make_target(95)
    assert_as_h5py(Hdf5Source(tmp_path / "a.h5", block_bytes=500), tmp_path / "a.h5")


# Damage


def damage(path: Path, number: int, change: Callable[[bytearray], None]) -> Path:
    """Change the bytes of a chunk of the features."""
    with h5py.File(path) as file:
        chunk = file["X"].id.get_chunk_info(number)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        content = bytearray(file.read(chunk.size))
        change(content)
        file.seek(chunk.byte_offset)
        file.write(content)
    return path


def flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 4


def blot(content: bytearray) -> None:
    content[:] = b"\xff" * len(content)


def end_early(content: bytearray) -> None:
    content[-5:] = b"\0" * 5


@pytest.mark.parametrize("change", [flip, end_early])
@pytest.mark.parametrize("filters", ["gzip", "gzip shuffle fletcher32", "lzf shuffle fletcher32", "fletcher32"])
def test_damaged_chunk_names_file_rows_and_dataset(
    tmp_path: Path, filters: str, change: Callable[[bytearray], None]
) -> None:
    path = write(tmp_path / "a.h5", smooth(200, 4, "f4"), None, (50, 4), **FILTERS[filters])
    source = Hdf5Source(damage(path, 2, change), block_bytes=900)
    assert source.block_rows.tolist() == [50] * 4
    for block in (0, 1, 3):
        with source.open_block(block) as reader:
            reader.read(50)
    with (
        pytest.raises(
            CorruptDataError,
            match=r"a\.h5: rows 100 to 149 \(block 2\) cannot be read from 'X': .*The file is damaged; copy it again",
        ) as caught,
        source.open_block(2) as reader,
    ):
        reader.read(50)
    assert isinstance(caught.value.__cause__, OSError)


def test_damaged_lzf(tmp_path: Path) -> None:
    path = damage(write(tmp_path / "a.h5", smooth(200, 4, "u1"), None, (50, 4), **FILTERS["lzf"]), 1, blot)
    source = Hdf5Source(path, block_bytes=900)
    with pytest.raises(CorruptDataError, match=r"rows 50 to 99 .* from 'X'"), source.open_block(1) as reader:
        reader.read(50)


def test_damaged_lzf_without_a_checksum_is_not_trained_on(tmp_path: Path) -> None:
    """h5py hands out whatever lies in its memory where a chunk decompresses to too few bytes."""
    X = np.round(np.random.default_rng(0).normal(size=(200, 4)) * 3)
    path = write(tmp_path / "a.h5", X, None, (100, 4), compression="lzf", shuffle=True)
    with h5py.File(path) as file:
        size = file["X"].id.get_chunk_info(1).size
    whole, refused = path.read_bytes(), 0
    for at in range(0, size, 5):

        def turn(content: bytearray, at: int = at) -> None:
            content[at] ^= 0x20

        path.write_bytes(whole)
        source = Hdf5Source(damage(path, 1, turn))
        try:
            source.read_rows(0, [0], 100, 200)
        except CorruptDataError as err:
            refused += "decompresses to" in str(err)
        source.close()
    assert refused > 3


@pytest.mark.parametrize(
    ("filters", "mask"),
    [({"compression": "gzip"}, 0), ({"compression": "gzip"}, 1), ({"compression": "lzf"}, 1), ({"shuffle": True}, 0)],
    ids=["gzip", "gzip left out", "lzf left out", "shuffle"],
)
def test_chunks_of_too_few_bytes_are_not_trained_on(tmp_path: Path, filters: dict[str, Any], mask: int) -> None:
    """h5py hands out whatever lies in its memory behind them."""
    X = np.ones((200, 4), np.float32)
    write(tmp_path / "a.h5", X, None, (50, 4), **filters)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        half = X[:25].tobytes()
        stored = zlib.compress(half) if "compression" in filters and not mask else half
        file["X"].id.write_direct_chunk((100, 0), stored, mask)
    source = Hdf5Source(tmp_path / "a.h5", block_bytes=900)
    assert (source.read_rows(0, [0], 50, 100)[0] == 1).all()
    with pytest.raises(CorruptDataError, match=r"rows 100 to 149 .* from 'X': a chunk of 800 bytes .* 400"):
        source.read_rows(0, [0], 100, 150)


def test_chunks_that_end_with_the_rows_are_read(tmp_path: Path, read_by_h5py: list[str]) -> None:
    """Some programs write no more of the last chunk; what is missing is beyond the dataset."""
    X = np.ones((175, 4), np.float32)
    path = write(tmp_path / "a.h5", X, None, (50, 4), compression="gzip")
    with h5py.File(path, "r+") as file:
        file["X"].id.write_direct_chunk((150, 0), zlib.compress((2 * X[:25]).tobytes()))
    source = Hdf5Source(path, block_bytes=900)
    assert (source.read_rows(0, [0], 150, 175)[0] == 2).all()
    source.close()
    with h5py.File(path, "r+") as file:
        file["X"].id.write_direct_chunk((150, 0), zlib.compress(X[:24].tobytes()))
    with pytest.raises(CorruptDataError, match="a chunk of 800 bytes decompresses to 384"):
        Hdf5Source(path, block_bytes=900).read_rows(0, [0], 150, 175)


def test_compressed_chunks_of_no_bytes_are_refused(tmp_path: Path) -> None:
    """HDF5 itself ends the process over them."""
    path = write(tmp_path / "a.h5", smooth(200, 4, "f4"), None, (50, 4), **GZIP)

    with h5py.File(path) as file:
        size = file["X"].id.get_chunk_info(2).size
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<IIQ", size, 0, 100))  # in the index: its size, the filters left out, its first row
    content[at : at + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(CorruptDataError, match="dataset '/X' has compressed chunks of no bytes"):
        Hdf5Source(path, block_bytes=900).read_rows(0, [0], 0, 50)


def test_damaged_targets(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X"] = make_rows(200, 4)
        chunk = file.create_dataset("y", data=make_target(200), chunks=(50,), **GZIP).id.get_chunk_info(3)
    with (tmp_path / "a.h5").open("r+b") as file:
        file.seek(chunk.byte_offset + 10)
        file.write(b"\xff" * 20)
    with pytest.raises(CorruptDataError, match=r"a\.h5: rows 0 to 199 .* from 'y'"):
        list(Hdf5Source(tmp_path / "a.h5").iter_targets())


@pytest.mark.parametrize("filters", ["none", "gzip"])
def test_file_cut_while_in_use(tmp_path: Path, filters: str) -> None:
    path = write(tmp_path / "a.h5", smooth(2_000, 4, "f8"), None, (500, 4), **FILTERS[filters])
    with h5py.File(path) as file:
        cut = file["X"].id.get_chunk_info(3).byte_offset + 10
    source = Hdf5Source(path, block_bytes=20_000)
    with source.open_block(0) as reader:
        reader.read(1)
    os.truncate(path, cut)
    with pytest.raises(CorruptDataError, match=r"a\.h5: rows 1,500 to 1,999 .*'X'"), source.open_block(3) as reader:
        reader.read(500)


def test_index_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", smooth(2_000, 4, "f4"), None, (10, 4), **GZIP)
    source = Hdf5Source(path)
    path.write_bytes(path.read_bytes().replace(b"TREE\x01", b"EERT\x01"))
    with pytest.raises(CorruptDataError, match=r"a\.h5: rows 0 .* cannot be read from 'X'"):
        source.open_block(0).read(1)
