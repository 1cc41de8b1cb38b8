"""What footers say of column chunks: the same as pyarrow, and no more than an error where they are damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import streamgd
from streamgd.data.sources import parquet_footer
from streamgd.data.sources.parquet_chunks import ChunkTable
from streamgd.data.sources.parquet_footer import read_footer
from streamgd.errors import CorruptDataError, DataError
from tests.clustering import REPOSITORY

NUMBERS = {"PLAIN": 0, "PLAIN_DICTIONARY": 2, "RLE": 3, "BIT_PACKED": 4, "DELTA_BINARY_PACKED": 5} | {
    "DELTA_LENGTH_BYTE_ARRAY": 6,
    "RLE_DICTIONARY": 8,
    "BYTE_STREAM_SPLIT": 9,
}


def table_of(n: int) -> pa.Table:
    rng = np.random.default_rng(n)
    missing = rng.random(n) < 0.1
    return pa.table(
        {
            "a": rng.normal(size=n),
            "b": pa.array(rng.integers(0, 9, n), mask=missing),
            "nested": [{"first": float(i), "second": [i, i + 1]} for i in range(n)],
            "text": [f"{i % 7}" * (i % 5) for i in range(n)],
            "flag": rng.random(n) < 0.5,
        }
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dictionary": False, "compression": "gzip", "data_page_version": "2.0"},
        {"compression": "none", "write_statistics": False, "store_schema": False},
        {"compression": "zstd", "write_page_index": True, "write_page_checksum": True},
        {"compression": "lz4", "use_dictionary": False, "column_encoding": {"a": "BYTE_STREAM_SPLIT"}},
    ],
    ids=["defaults", "gzip", "bare", "index", "lz4"],
)
def test_the_same_as_pyarrow(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table_of(1000), path, row_group_size=300, **options)
    footer = read_footer(str(path))
    leaves = [5, 0, 1, 2, 3, 4]
    table = ChunkTable(str(path), footer, leaves)
    assert table.rows.tolist() == [300, 300, 300, 100]
    assert footer.metadata.num_row_groups == 0  # of which pyarrow would keep 2 kB for each column
    for group in range(4):
        expected = pq.read_metadata(path).row_group(group)
        alone = footer.with_group(group)
        assert alone.num_row_groups == 1
        assert alone.row_group(0).to_dict() == expected.to_dict()
        for i, leaf in enumerate(leaves):
            found, column = table.chunk(group, i), expected.column(leaf)
            begins = [column.data_page_offset, column.dictionary_page_offset or column.data_page_offset]
            assert found.start == min(begins)
            assert found.compressed_bytes == column.total_compressed_size
            assert found.uncompressed_bytes == column.total_uncompressed_size
            assert found.physical_type == column.physical_type
            assert found.codec.removesuffix("_RAW") == column.compression
            assert found.n_values == column.num_values
            assert found.n_nulls == (column.statistics.null_count if column.is_stats_set else -1)
            assert found.encodings == sum(1 << NUMBERS[name] for name in set(column.encodings))
            assert (found.max_level, found.repeats) == (
                footer.metadata.schema.column(leaf).max_definition_level,
                footer.metadata.schema.column(leaf).max_repetition_level,
            )


DAMAGE = """
import sys
import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
import streamgd
path, damaged = sys.argv[1:]
raw = open(path, "rb").read()
length = int.from_bytes(raw[-8:-4], "little")
expected = pq.read_table(path)

def read():
    source = streamgd.open_source(damaged, "y")
    rows = []
    for block, n in enumerate(source.block_rows.tolist()):
        with source.open_block(block) as reader:
            piece = reader.read(n)
            rows.append(np.column_stack([*piece.X, piece.y]))
    return np.concatenate(rows)

right = other = refused = 0
for at in range(len(raw) - 8 - length, len(raw)):
    spoilt = bytearray(raw)
    spoilt[at] ^= 1 << (at * 5 % 8)
    open(damaged, "wb").write(spoilt)
    try:
        found = read()
    except streamgd.StreamgdError:
        refused += 1
        continue
    try:
        table = pq.ParquetFile(damaged).read(use_threads=False)
    except OSError:  # of what is not needed here
        table = expected
    names = [name for name in table.column_names if name != "y"]
    assert found.shape == (len(expected), 3), (at, found.shape)
    assert np.array_equal(found, np.column_stack([table[name].to_numpy() for name in (*names, "y")])), at
    right += 1
print(right, refused)
"""


def test_damage_ends_in_an_error_or_in_all_rows(tmp_path: Path) -> None:
    """In a process of its own, which pyarrow's access to column chunks would end."""
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    columns = {"a": rng.normal(size=50), "b": rng.integers(0, 9, 50).astype(np.int32), "y": rng.normal(size=50)}
    pq.write_table(pa.table(columns), path, row_group_size=25)
    ended = subprocess.run(
        [sys.executable, "-c", DAMAGE, path, tmp_path / "damaged.parquet"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert ended.returncode == 0, ended.stderr
    right, refused = map(int, ended.stdout.split())
    assert right > 100
    assert refused > 100


def edited(path: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Have footers say something else of their column chunks."""
    read = parquet_footer.ChunkTable.__init__.__globals__["members"].read_footer

    def change_read(at: int, end: int, wanted: Any, chunks: Any, rows: Any) -> bool:
        assert read(at, end, wanted, chunks, rows)
        change(chunks, rows)
        return True

    monkeypatch.setattr("streamgd.data.compiled.parquet_footer.read_footer", change_read)


@pytest.mark.parametrize(
    ("member", "value", "error", "words"),
    [
        ("TYPE", 1, CorruptDataError, "column 'x' of row group 1 holds INT32, and by the schema DOUBLE"),
        ("N_VALUES", 9, CorruptDataError, "column 'x' of row group 1 has 9 values for 10 rows"),
        ("DATA_AT", -4, CorruptDataError, "column 'x' of row group 1 lies outside of the file"),
        ("STORED_BYTES", 10**9, CorruptDataError, "column 'x' of row group 1 lies outside of the file"),
        ("ENCRYPTED", 1, DataError, "has encrypted columns"),
        ("CODEC", 9, DataError, "number 9"),
    ],
)
def test_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, value: int, error: type[Exception], words: str
) -> None:
    from streamgd.data.compiled import parquet_footer as members

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": np.arange(20.0), "y": np.arange(20.0)}), path, row_group_size=10)

    def change(chunks: Any, rows: Any) -> None:
        chunks[1, 0, getattr(members, member)] = value

    edited(path, monkeypatch, change)
    with pytest.raises(error, match=words):
        streamgd.open_source(path, "y")


def test_rows_that_the_file_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": np.arange(20.0), "y": np.arange(20.0)}), path, row_group_size=10)

    def change(chunks: Any, rows: Any) -> None:
        rows[0] = 7

    edited(path, monkeypatch, change)
    with pytest.raises(CorruptDataError, match=r"row groups of \[7, 10\] rows in a file of 20"):
        streamgd.open_source(path, "y")


def test_rows_that_lie_in_other_files(tmp_path: Path) -> None:
    """As by the summary that some writers leave beside a table's files."""
    gathered: list[Any] = []
    table = pa.table({"x": np.arange(2000.0), "y": np.arange(2000.0)})
    pq.write_to_dataset(table, tmp_path / "table", metadata_collector=gathered)
    pq.write_metadata(table.schema, tmp_path / "summary.parquet", gathered)
    with pytest.raises(DataError, match="lie in other files: open those, or their folder"):
        streamgd.open_source(tmp_path / "summary.parquet", "y")


def test_files_are_let_go_by_what_is_kept_of_their_footers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        pq.write_table(table_of(100), tmp_path / f"{name}.parquet", row_group_size=10)
    opened = parquet_footer.OpenFiles(("a",))
    paths = [str(tmp_path / f"{name}.parquet") for name in "abc"]
    digests = [read_footer(path).digest for path in paths]
    first = opened.get(paths[0], digests[0])
    monkeypatch.setattr(parquet_footer, "_OPEN_FOOTER_BYTES", int(2.5 * first.held_bytes))
    for path, digest in zip(paths, digests, strict=True):
        opened.get(path, digest)
    assert list(opened._held) == paths[1:]
