"""Row groups of plain numbers, read page by page: the same rows as Arrow's, and Arrow's word where something is odd."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streamgd.data.sources import parquet_direct, parquet_rows
from streamgd.data.sources.base import BlockReader
from streamgd.data.sources.parquet import ParquetSource
from streamgd.data.sources.parquet_direct import DirectRows, UndecodableError
from streamgd.errors import CorruptDataError, DataError, NonFiniteError
from tests.data.contract import plain

N = 9_000
#: Rows of a page, far fewer than a row group has, and not as many in columns of different widths.
SMALL_PAGES: dict[str, Any] = {"data_page_size": 4_000, "max_rows_per_page": 1 << 30, "write_batch_size": 100}


def columns(n: int = N) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal(n).astype(np.float32),
        "b": rng.standard_normal(n),
        "c": rng.integers(-(2**31), 2**31, n).astype(np.int32),
        "d": rng.integers(-(2**60), 2**60, n),
        "e": rng.integers(0, 2**32, n).astype(np.uint32),
        "f": rng.integers(0, 2**63, n).astype(np.uint64) * 2 + 1,
        "few": np.repeat(np.arange(5.0), n // 5),
        "g": (np.arange(n) % 700).astype(np.float32),
        "y": np.round(rng.standard_normal(n), 1),
    }


def write(path: Path, table: Any = None, **options: Any) -> Path:
    table = columns() if table is None else table
    table = table if isinstance(table, pa.Table) else pa.table(table)
    pq.write_table(table, path, **({"row_group_size": N} | options))
    return path


def open_block(path: Path, target: str | None = "y", start: int = 0, **options: Any) -> BlockReader:
    return ParquetSource(path, target, **options).open_block(0, start, piece_rows=1 << 20)


def read_all(reader: BlockReader, n_rows: int, sizes: tuple[int, ...] = (1 << 20,)) -> tuple[list[np.ndarray], Any]:
    """Read rows by `read_some`, which gives what lies together, and put the pieces together."""
    X, y, turn = [], [], itertools.cycle(sizes)
    with reader:
        while n_rows:
            n, piece = reader.read_some(min(next(turn), n_rows))
            X.append([np.array(column) for column in piece.X])
            y.append(np.array(plain(piece.y)))
            assert {len(column) for column in X[-1]} == {n} == {len(y[-1])}
            n_rows -= n
    return [np.concatenate(parts) for parts in zip(*X, strict=True)], np.concatenate(y)


def assert_rows(found: tuple[list[np.ndarray], Any], path: Path, start: int = 0) -> None:
    table = pq.read_table(path).slice(start)
    for values, name in zip(found[0], [name for name in table.column_names if name != "y"], strict=True):
        assert values.tobytes() == table[name].to_numpy().tobytes(), name
    assert found[1].tolist() == table["y"].to_pylist()


@pytest.fixture
def arrow_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be read by Arrow."""

    def refuse(*_: Any) -> None:
        raise AssertionError("read by Arrow")

    monkeypatch.setattr(parquet_rows, "ArrowReader", refuse)


@pytest.mark.usefixtures("arrow_is_out")
class TestSameRows:
    @pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
    @pytest.mark.parametrize("version", ["1.0", "2.0"])
    @pytest.mark.parametrize("dictionary", [True, False, ["b", "few"]])
    def test_codecs_pages_and_dictionaries(self, tmp_path, compression, version, dictionary):
        options = {"compression": compression, "data_page_version": version, "use_dictionary": dictionary}
        path = write(tmp_path / "a.parquet", **options)
        assert_rows(read_all(open_block(path), N), path)

    @pytest.mark.parametrize("dictionary", [True, False])
    @pytest.mark.parametrize("version", ["1.0", "2.0"])
    @pytest.mark.parametrize("start", [0, 1, 499, 4_321, N - 1])
    def test_pages_that_end_at_different_rows(self, tmp_path, dictionary, version, start):
        path = write(tmp_path / "a.parquet", use_dictionary=dictionary, data_page_version=version, **SMALL_PAGES)
        assert_rows(read_all(open_block(path, start=start), N - start, (7, 1000, 64)), path, start)

    def test_a_dictionary_that_is_given_up_half_way(self, tmp_path):
        path = write(tmp_path / "a.parquet", dictionary_pagesize_limit=20_000, **SMALL_PAGES)
        assert {"PLAIN", "RLE_DICTIONARY"} <= set(pq.ParquetFile(path).metadata.row_group(0).column(1).encodings)
        assert_rows(read_all(open_block(path), N), path)

    @pytest.mark.parametrize("version", ["1.0", "2.0"])
    def test_columns_that_cannot_have_nulls(self, tmp_path, version):
        table = pa.table(columns())
        schema = pa.schema([field.with_nullable(False) for field in table.schema])
        path = write(tmp_path / "a.parquet", table.cast(schema), data_page_version=version, **SMALL_PAGES)
        assert_rows(read_all(open_block(path), N), path)

    @pytest.mark.parametrize("version", ["1.0", "2.0"])
    def test_checksums(self, tmp_path, version):
        path = write(tmp_path / "a.parquet", write_page_checksum=True, data_page_version=version)
        assert_rows(read_all(open_block(path), N), path)

    def test_several_row_groups_and_weights(self, tmp_path):
        path = write(tmp_path / "a.parquet", row_group_size=2_000)
        source = ParquetSource(path, "y", ["a", "g"], "few")
        for block, n in enumerate(source.block_rows.tolist()):
            with source.open_block(block) as reader:
                piece = reader.read(n)
            rows = slice(2_000 * block, 2_000 * block + n)
            for found, name in ((piece.X[0], "a"), (piece.X[1], "g"), (piece.y, "y"), (piece.weight, "few")):
                assert np.array_equal(found, columns()[name][rows])

    def test_read_puts_together_what_does_not_lie_together(self, tmp_path):
        path = write(tmp_path / "a.parquet", use_dictionary=False, **SMALL_PAGES)
        with open_block(path) as reader:
            parts = [reader.read(n) for n in (3, 4_000, N - 4_003)]
        X = [[np.array(column) for column in part.X] for part in parts[2:]]
        table = pq.read_table(path).slice(4_003)
        assert all(np.array_equal(a, table[name].to_numpy()) for a, name in zip(X[0], "abcdef", strict=False))
        assert np.array_equal(parts[2].y, table["y"].to_numpy())


def test_several_outputs_and_labels(tmp_path):
    table = columns() | {"label": np.array(["no", "yes"])[np.arange(N) % 2]}
    path = write(tmp_path / "a.parquet", table)
    with ParquetSource(path, ["y", "few"], ["a", "b"]).open_block(0) as reader:
        assert np.array_equal(reader.read(100).y, np.column_stack([table["y"], table["few"]])[:100])
    (a, b), labels = read_all(open_block(path, "label", features=["a", "b"]), N, (777,))
    assert labels.tolist() == table["label"].tolist()
    assert np.array_equal(a, table["a"])
    assert np.array_equal(b, table["b"])


@pytest.mark.parametrize(
    ("name", "values", "options"),
    [
        ("int8", pa.array(np.arange(N) % 100, pa.int8()), {}),
        ("bool", pa.array(np.arange(N) % 2 == 0), {}),
        (
            "decimal",
            pa.array(np.arange(N) % 50).cast(pa.decimal128(21, 2)).cast(pa.decimal128(9, 2)),
            {"store_decimal_as_integer": True},
        ),
        ("half", pa.array((np.arange(N) % 50).astype(np.float16)), {}),
        ("delta", pa.array(np.arange(N)), {"use_dictionary": False, "column_encoding": {"x": "DELTA_BINARY_PACKED"}}),
        (
            "split",
            pa.array(np.arange(N) / 3),
            {"use_dictionary": False, "column_encoding": {"x": "BYTE_STREAM_SPLIT"}},
        ),
        ("brotli", pa.array(np.arange(N) / 3), {"compression": "brotli"}),
        ("lz4", pa.array(np.arange(N) / 3), {"compression": "lz4"}),
    ],
)
def test_what_is_not_known_here_is_read_by_arrow(tmp_path, monkeypatch, name, values, options):
    def refuse(*_: Any) -> None:
        raise AssertionError("read here")

    monkeypatch.setattr(parquet_rows, "DirectRows", refuse)
    path = write(tmp_path / "a.parquet", pa.table({"x": values, "y": np.arange(N) / 7}), **options)
    (x,), y = read_all(open_block(path), N)
    assert np.array_equal(x.astype(float), np.array([float(value) for value in values.to_pylist()]))
    assert np.array_equal(y, np.arange(N) / 7)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("row", [0, 4_321, N - 1])
def test_a_null_is_named(tmp_path, version, dictionary, row):
    b = columns()["b"].tolist()
    b[row] = None
    options = {"write_statistics": False, "use_dictionary": dictionary, "data_page_version": version, **SMALL_PAGES}
    path = write(tmp_path / "a.parquet", columns() | {"b": pa.array(b, pa.float64())}, **options)
    with pytest.raises(NonFiniteError, match=rf"column 'b' has a missing value \(null\).*row {row:,} of the file"):
        read_all(open_block(path), N, (500,))


def test_damage_under_a_checksum_is_an_error(tmp_path):
    path = write(tmp_path / "a.parquet", write_page_checksum=True, use_dictionary=False, compression="none")
    raw = bytearray(path.read_bytes())
    raw[20_000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptDataError, match="CRC"):
        read_all(open_block(path), N)


@pytest.mark.parametrize("compression", ["none", "snappy"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_damage_ends_in_an_error_or_in_arrows_rows(tmp_path, compression, dictionary):
    """Single bytes of headers, levels, dictionaries and values; never a crash, never rows that Arrow would not give."""
    options = {"compression": compression, "use_dictionary": dictionary, **SMALL_PAGES}
    whole = write(tmp_path / "whole.parquet", {name: columns()[name] for name in ("b", "g", "y")}, **options)
    raw = whole.read_bytes()
    footer = len(raw) - int.from_bytes(raw[-8:-4], "little") - 8
    rng = np.random.default_rng(3)
    places = np.unique(np.concatenate([np.arange(4, 60), rng.integers(4, footer, 250)]))
    path = tmp_path / "damaged.parquet"
    n_rows_read = 0
    for at in places.tolist():
        damaged = bytearray(raw)
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            expected: Any = pq.read_table(path)
            expected = [expected[name].to_numpy(zero_copy_only=False).tobytes() for name in ("b", "g", "y")]
        except (OSError, pa.ArrowException):
            expected = None
        try:
            (b, g), y = read_all(open_block(path), N, (1000,))
        except DataError:
            continue
        n_rows_read += 1
        assert expected == [b.tobytes(), g.tobytes(), y.tobytes()], at
    assert n_rows_read > 20 or compression == "snappy"


def test_no_more_than_a_page_of_each_column_is_held(tmp_path):
    n = 400_000
    table = {f"x{j}": np.random.default_rng(j).standard_normal(n) for j in range(4)}
    path = write(tmp_path / "a.parquet", table, row_group_size=n, use_dictionary=False, data_page_size=1 << 16)
    with ParquetSource(path).open_block(0, piece_rows=1 << 20) as reader:
        rows = reader._rows
        assert isinstance(rows, DirectRows)
        for _ in range(30):
            reader.read_some(1000)
            assert sum(memory.size for memory in rows._held) < 4 * 2 * (1 << 16) * 8
        held = sum(memory.size for memory in rows._held)
    assert held < 4 * n * 8 / 10


class TestZstd:
    """Writers that compress as a stream leave out how much it was."""

    DATA = np.arange(5_000.0).view(np.uint8)

    def stream(self) -> np.ndarray:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(self.DATA.tobytes())
        return np.frombuffer(sink.getvalue(), np.uint8)

    def test_frames_without_their_size_are_decompressed(self):
        data = self.stream()
        assert parquet_direct._zstd_size(data[:18].tobytes(), data) is None
        assert np.array_equal(parquet_direct._decompressed("zstd", data, len(self.DATA)), self.DATA)

    @pytest.mark.parametrize("change", [-1, 1, 100])
    def test_frames_of_another_size_are_not(self, change):
        with pytest.raises(UndecodableError, match="another size"):
            parquet_direct._decompressed("zstd", self.stream(), len(self.DATA) + change)

    def test_frames_that_end_early_are_not(self):
        with pytest.raises(UndecodableError):
            parquet_direct._decompressed("zstd", self.stream()[:-9], len(self.DATA))
