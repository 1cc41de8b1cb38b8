"""Compiled decoding of HDF5 chunks, against HDF5 itself and against NumPy."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from streamgd.data.compiled.hdf5 import adler32, expand_lzf, fletcher32, put_rows
from streamgd.data.sources import hdf5_inflate
from streamgd.data.sources.hdf5_inflate import inflate_to


def stored_chunk(path: Path, values: np.ndarray, **how: Any) -> np.ndarray:
    """Let HDF5 write one chunk, and return its bytes in the file."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("X", data=values, chunks=values.shape, **how)
        mask, content = dataset.id.read_direct_chunk((0,) * values.ndim)
    assert mask == 0
    return np.frombuffer(content, np.uint8)


@pytest.mark.parametrize("item_bytes", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(("width", "n_columns"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 1), (28, 28), (28, 9)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_are_put_where_they_belong_and_nothing_else_is_touched(
    item_bytes: int, width: int, n_columns: int, shuffled: bool
) -> None:
    height, first, n_rows = 1_000, 3, 905
    items = np.random.default_rng(0).integers(0, 256, (height, width, item_bytes), dtype=np.uint8)
    chunk = np.ascontiguousarray(items.reshape(-1, item_bytes).T if shuffled else items).ravel()
    for step in (n_columns * item_bytes, 31 * item_bytes):
        out = np.full((n_rows + 2) * step, 77, np.uint8)
        put_rows(chunk, shuffled, item_bytes, width, first, n_rows, n_columns, out.ctypes.data + step, step)
        expected = np.full((n_rows + 2, step), 77, np.uint8)
        expected[1:-1, : n_columns * item_bytes] = items[first : first + n_rows, :n_columns].reshape(n_rows, -1)
        np.testing.assert_array_equal(out.reshape(expected.shape), expected)


@pytest.mark.parametrize("n_bytes", [1, 2, 3, 720, 8191, 8192, 8193, 16_384, 300_000])
@pytest.mark.parametrize("content", ["random", "zeros", "ones"])
def test_checksums_are_those_that_hdf5_writes(tmp_path: Path, n_bytes: int, content: str) -> None:
    """Words are summed 4,096 at a time."""
    values = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, dtype=np.uint8)
    if content != "random":
        values[:] = 0 if content == "zeros" else 255
    stored = stored_chunk(tmp_path / "a.h5", values, fletcher32=True)
    assert fletcher32(stored[:-4]) == int.from_bytes(stored[-4:].tobytes(), "little")


def test_checksums_of_nothing_and_of_a_changed_byte() -> None:
    assert fletcher32(np.zeros(0, np.uint8)) == 0
    values = np.arange(10_000, dtype=np.uint8)
    changed = values.copy()
    changed[[400, 402]] = values[[402, 400]]  # words that change places
    assert fletcher32(changed) != fletcher32(values)


def lzf_example(name: str) -> np.ndarray:
    generator = np.random.default_rng(1)
    if name == "runs":  # references that overlap what they write
        return np.repeat(generator.integers(0, 9, 500, dtype=np.uint8), 61)
    if name == "words":
        words = generator.integers(0, 256, (40, 17), dtype=np.uint8)
        return words[generator.integers(0, 40, 2_000)].ravel()
    return np.where(np.arange(30_000) % 700 < 500, 3, generator.integers(0, 256, 30_000)).astype(np.uint8)


@pytest.mark.parametrize("name", ["runs", "words", "mixed"])
@pytest.mark.parametrize("spare", [0, 100])
def test_lzf_is_what_h5py_compressed(tmp_path: Path, name: str, spare: int) -> None:
    values = lzf_example(name)
    stored = stored_chunk(tmp_path / "a.h5", values, compression="lzf")
    assert len(stored) < len(values)
    out = np.zeros(len(values) + spare, np.uint8)
    assert expand_lzf(stored, out) == len(values)
    np.testing.assert_array_equal(out[: len(values)], values)


def test_damaged_lzf_stays_within_its_memory(tmp_path: Path) -> None:
    """Whatever the bytes, nothing is written beyond the room, and cut or overlong input is refused or shorter."""
    values = lzf_example("mixed")
    stored = stored_chunk(tmp_path / "a.h5", values, compression="lzf")
    generator = np.random.default_rng(2)
    memory = np.full(len(values) + 200, 99, np.uint8)
    room = memory[100:-100]
    for _ in range(300):
        damaged = stored.copy()
        damaged[generator.integers(0, len(stored), 3)] = generator.integers(0, 256, 3)
        assert -1 <= expand_lzf(damaged, room) <= len(room)
        assert -1 <= expand_lzf(generator.integers(0, 256, 500, dtype=np.uint8), room) <= len(room)
    assert (memory[:100] == 99).all()
    assert (memory[-100:] == 99).all()
    for n in range(len(stored) - 40, len(stored)):
        assert expand_lzf(stored[:n], room) < len(values)
    assert expand_lzf(stored, room[:-1]) == -1
    assert expand_lzf(np.array([0, 65, 32, 5], np.uint8), room) == -1  # refers to before the beginning
    assert expand_lzf(np.array([224], np.uint8), room) == -1


# zlib's format


@pytest.mark.parametrize("n_bytes", [*range(130), 1407, 1408, 1409, 1471, 1472, 5552, 65_521, 300_001])
@pytest.mark.parametrize("content", ["random", "zeros", "ones"])
def test_adlers_checksum_is_zlibs(n_bytes: int, content: str) -> None:
    """Sixty-four bytes are taken at once, twenty-two times before the sums are put together."""
    values = np.random.default_rng(n_bytes).integers(0, 256, n_bytes + 3, dtype=np.uint8)
    if content != "random":
        values[:] = 0 if content == "zeros" else 255
    for first in (0, 3):  # wherever they begin
        assert adler32(values[first : first + n_bytes]) == zlib.adler32(values[first : first + n_bytes])


@pytest.fixture(params=["library", "package", "another library"])
def way_to_inflate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Decompress by ISA-L's own functions; by what the package offers; and so because the functions are others."""
    hdf5_inflate._functions.cache_clear()
    if request.param == "package":
        monkeypatch.setattr(hdf5_inflate, "_functions", lambda: None)
    elif request.param == "another library":
        monkeypatch.setattr(hdf5_inflate, "inflate", lambda *_: 5000)  # as if nothing had been written
        assert hdf5_inflate._functions() is None
    else:
        assert hdf5_inflate._functions() is not None
    yield request.param
    monkeypatch.undo()
    hdf5_inflate._functions.cache_clear()


def values_that_shrink(n_bytes: int) -> np.ndarray:
    values = np.random.default_rng(n_bytes).binomial(255, 0.1, n_bytes).astype(np.uint8)
    values[n_bytes // 3 : n_bytes // 2] = 7
    return values


@pytest.mark.parametrize("n_bytes", [0, 1, 7, 64, 4_000, 70_000, 700_000])
@pytest.mark.parametrize("level", [0, 1, 4, 9])
def test_inflating_undoes_zlib(way_to_inflate: str, n_bytes: int, level: int) -> None:
    values = values_that_shrink(n_bytes)
    data = np.frombuffer(zlib.compress(values.tobytes(), level) + b"what comes after", np.uint8)
    for room in (n_bytes, n_bytes + 64):
        out = np.full(room + 8, 77, np.uint8)
        found = inflate_to(data, out[:room])
        assert found is not None
        np.testing.assert_array_equal(found, values)
        assert (out[room:] == 77).all()


@pytest.mark.parametrize("n_bytes", [1, 4_000, 700_000])
def test_what_is_damaged_is_not_inflated(way_to_inflate: str, n_bytes: int) -> None:
    values = values_that_shrink(n_bytes)
    data = np.frombuffer(zlib.compress(values.tobytes()), np.uint8)
    out = np.empty(n_bytes + 64, np.uint8)
    for n in {0, 1, 2, 5, len(data) // 2, len(data) - 1}:  # ends early
        assert inflate_to(data[:n], out) is None
    for at in {0, 1, 2, len(data) // 2, len(data) - 4, len(data) - 1}:
        changed = data.copy()
        changed[at] ^= 0x41
        assert inflate_to(changed, out) is None
    assert inflate_to(data, out[: n_bytes - 1]) is None  # more than there is room for
    noise = np.random.default_rng(1).integers(0, 256, 3_000, dtype=np.uint8)
    noise[:2] = data[:2]
    assert inflate_to(noise, out) is None


def test_a_dictionary_is_not_known(way_to_inflate: str) -> None:
    packer = zlib.compressobj(zdict=b"abcabcabc")
    data = np.frombuffer(packer.compress(b"abcabcabcabc") + packer.flush(), np.uint8)
    assert inflate_to(data, np.empty(100, np.uint8)) is None
