"""Parquet: the contract of all sources, and what only Parquet files can do to one."""

from __future__ import annotations

import base64
import contextlib
import datetime
import decimal
import io
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streamgd.data.plan import plan_layout
from streamgd.data.sources import open_source, parquet_rows
from streamgd.data.sources.base import Source
from streamgd.data.sources.parquet import ParquetSource
from streamgd.data.sources.parquet_chunks import Chunk
from streamgd.data.sources.parquet_pages import open_bytes
from streamgd.data.sources.parquet_types import to_numbers
from streamgd.errors import (
    CorruptDataError,
    DataError,
    EmptySourceError,
    NonFiniteError,
    OptionError,
    SchemaError,
    SourceNotFoundError,
)
from tests.data.contract import SourceContract, make_rows, open_files_in, plain, read_all, read_block


def target_columns(y: np.ndarray | None) -> dict[str, Any]:
    if y is None:
        return {}
    return {"y": y} if y.ndim == 1 else {f"y{j}": y[:, j] for j in range(y.shape[1])}


class TestParquetContract(SourceContract):
    kind = "parquet"

    def make(
        self,
        folder: Path,
        X: np.ndarray,
        y: np.ndarray | None,
        weight: np.ndarray | None = None,
        *,
        n_blocks: int = 4,
        dtype: str = "auto",
        names: tuple[str, ...] | None = None,
    ) -> Source:
        names = names or tuple(f"x{j}" for j in range(X.shape[1]))
        columns = {name: X[:, j] for j, name in enumerate(names)} | target_columns(y)
        if weight is not None:
            columns["weight"] = weight
        path = folder / "rows.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=-(-len(X) // n_blocks))
        target = None if y is None else "y" if y.ndim == 1 else list(target_columns(y))
        return ParquetSource(path, target, weight=None if weight is None else "weight", dtype=dtype)

    def reopen(self, folder: Path) -> Source:
        return ParquetSource(folder / "rows.parquet", "y")


class TestParquetFolderContract(TestParquetContract):
    """The same with a file for each block, in hive partitions."""

    def make(
        self,
        folder: Path,
        X: np.ndarray,
        y: np.ndarray | None,
        weight: np.ndarray | None = None,
        *,
        n_blocks: int = 4,
        dtype: str = "auto",
        names: tuple[str, ...] | None = None,
    ) -> Source:
        names = names or tuple(f"x{j}" for j in range(X.shape[1]))
        columns = {name: X[:, j] for j, name in enumerate(names)} | target_columns(y)
        if weight is not None:
            columns["weight"] = weight
        table, step = pa.table(columns), -(-len(X) // n_blocks)
        for part in range(n_blocks):
            (below := folder / "set" / f"part={part}").mkdir(parents=True)
            pq.write_table(table.slice(part * step, step), below / "rows.parquet")
        self.features = list(names)
        target = None if y is None else "y" if y.ndim == 1 else list(target_columns(y))
        return ParquetSource(
            folder / "set", target, list(names), weight=None if weight is None else "weight", dtype=dtype
        )

    def reopen(self, folder: Path) -> Source:
        return ParquetSource(folder / "set", "y", self.features)


def write(path: Path, columns: dict[str, Any] | pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def ramp(n: int = 10, dtype: str = "float32") -> np.ndarray:
    return np.arange(n).astype(dtype)


class TestFolders:
    def test_partitions_become_the_last_features(self, tmp_path: Path) -> None:
        for year in (2020, 2019):
            for share in ("0.5", "1e-2"):
                write(tmp_path / f"year={year}" / f"share={share}" / "a.parquet", {"x": ramp(3), "y": ramp(3)})
        source = ParquetSource(tmp_path, "y")
        assert source.feature_names == ("x", "year", "share")
        assert source.feature_dtypes == ("float32", "int16", "float64")
        X, y, _ = read_all(source)
        np.testing.assert_array_equal(X[:, 1], np.repeat([2019, 2020], 6))
        np.testing.assert_array_equal(X[:, 2], np.tile(np.repeat([0.5, 0.01], 3), 2))
        np.testing.assert_array_equal(y, np.tile(ramp(3), 4))

    def test_whole_numbers_in_names_do_not_force_float64(self, tmp_path: Path) -> None:
        write(tmp_path / "year=2020" / "a.parquet", {"x": ramp(), "y": ramp()})
        assert ParquetSource(tmp_path, "y").row_dtype == np.float32

    def test_text_partitions_are_no_features_but_may_be_the_target(self, tmp_path: Path) -> None:
        for name in ("b%20c", "a"):
            write(tmp_path / f"kind={name}" / "0.parquet", {"x": ramp(4)})
        with pytest.raises(SchemaError, match=r"'kind' \(string\)"):
            ParquetSource(tmp_path)
        source = ParquetSource(tmp_path, "kind")
        assert not source.target.numeric
        assert read_all(source)[1].tolist() == ["a"] * 4 + ["b c"] * 4
        assert [plain(y).tolist() for _, y, _ in source.iter_targets()] == [["a"] * 4, ["b c"] * 4]

    def test_partition_as_target_alone_reads_no_file(self, tmp_path: Path) -> None:
        write(tmp_path / "k=1" / "0.parquet", {"x": ramp(4)}).rename(tmp_path / "k=1" / "1.parquet")
        source = ParquetSource(tmp_path, "k")
        (tmp_path / "k=1" / "1.parquet").unlink()
        assert [y.tolist() for _, y, _ in source.iter_targets()] == [[1] * 4]

    def test_missing_partition_value_is_refused_if_used(self, tmp_path: Path) -> None:
        write(tmp_path / "k=__HIVE_DEFAULT_PARTITION__" / "0.parquet", {"x": ramp(4)})
        write(tmp_path / "k=3" / "0.parquet", {"x": ramp(4)})
        with pytest.raises(NonFiniteError, match="'k' has no value in 'k=__HIVE"):
            ParquetSource(tmp_path)
        assert ParquetSource(tmp_path, features=["x"]).n_rows == 8

    def test_partition_keys_must_agree(self, tmp_path: Path) -> None:
        write(tmp_path / "k=3" / "0.parquet", {"x": ramp(4)})
        write(tmp_path / "m=3" / "0.parquet", {"x": ramp(4)})
        with pytest.raises(SchemaError, match=r"m=3/0.parquet"):
            ParquetSource(tmp_path)

    def test_hidden_and_empty_files_are_passed_over(self, tmp_path: Path) -> None:
        write(tmp_path / "part-2.parquet", {"x": ramp(3), "y": ramp(3)})
        write(tmp_path / "part-0.parquet", {"x": pa.array([], pa.null()), "y": pa.array([], pa.string())})
        write(tmp_path / "_temporary" / "0.parquet", {"z": ["text"]})
        write(tmp_path / ".hidden.parquet", {"z": ["text"]})
        (tmp_path / "_SUCCESS").touch()
        (tmp_path / "part-1.parquet").touch()
        (tmp_path / "README.md").write_text("notes")
        source = ParquetSource(tmp_path, "y")
        assert source.n_rows == 3
        assert source.locate(0, 1) == "part-2.parquet, row group 0, row 1 of the file (counted from 0)"

    def test_row_groups_without_rows_are_passed_over(self, tmp_path: Path) -> None:
        schema = pa.schema([("x", pa.float32())])
        with pq.ParquetWriter(tmp_path / "a.parquet", schema) as out:
            for n in (0, 2, 0, 3):
                out.write_table(pa.table({"x": ramp(n)}), row_group_size=10)
        source = ParquetSource(tmp_path / "a.parquet")
        assert source.block_rows.tolist() == [2, 3]
        assert "row 2 of the file" in source.locate(1, 0)
        np.testing.assert_array_equal(read_all(source)[0][:, 0], [0, 1, 0, 1, 2])

    def test_many_files_are_read_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        for part in range(30):
            write(tmp_path / f"{part:02d}.parquet", {"x": np.full(3, part, np.float32)})
        found = read_all(ParquetSource(tmp_path))[0][:, 0]
        np.testing.assert_array_equal(found, np.repeat(np.arange(30), 3))
        listed = [tmp_path / "05.parquet", tmp_path / "03.parquet"]  # a list is in the user's order
        np.testing.assert_array_equal(read_all(ParquetSource(listed))[0][:, 0], [5, 5, 5, 3, 3, 3])

    def test_few_files_stay_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("streamgd.data.sources.parquet_footer._OPEN_FILES", 2)
        for part in range(6):
            write(tmp_path / f"{part}.parquet", {"x": np.full(3, part, np.float32)})
        source = ParquetSource(tmp_path)
        readers = [source.open_block(block) for block in range(6)]
        assert [float(reader.read(1).X[0][0]) for reader in readers] == [0, 1, 2, 3, 4, 5]
        for reader in readers:
            reader.close()
        assert (
            sorted(Path(name).name for name in open_files_in(tmp_path)) == ["4.parquet"] * 2 + ["5.parquet"] * 2
        )  # for Arrow, and not
        source.close()

    def test_no_rows_at_all(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", {"x": ramp(0)})
        with pytest.raises(EmptySourceError, match=r"a\.parquet"):
            ParquetSource(tmp_path / "a.parquet")
        with pytest.raises(EmptySourceError, match="no file has rows"):
            ParquetSource(tmp_path)


class TestAgreement:
    def test_widths_may_differ(self, tmp_path: Path) -> None:
        write(tmp_path / "0.parquet", {"a": ramp(2, "int32"), "b": ramp(2, "float32"), "y": ["u", "v"]})
        text = pa.array(["v", "w"]).dictionary_encode()
        write(tmp_path / "1.parquet", {"b": ramp(2, "float64"), "a": ramp(2, "int64") + 2**40, "y": text})
        source = ParquetSource(tmp_path, "y")
        assert source.feature_names == ("a", "b")
        assert source.feature_dtypes == ("int64", "float64")
        X, y, _ = read_all(source)
        np.testing.assert_array_equal(X, [[0, 0], [1, 1], [2**40, 0], [2**40 + 1, 1]])
        assert y.tolist() == ["u", "v", "v", "w"]

    def test_other_differences_name_file_and_columns(self, tmp_path: Path) -> None:
        write(tmp_path / "0.parquet", {"a": ramp(2, "int32"), "b": ramp(2), "c": ramp(2)})
        write(tmp_path / "1.parquet", {"a": ramp(2), "b": ["x", "y"]})
        with pytest.raises(SchemaError) as caught:
            ParquetSource(tmp_path)
        for words in ("1.parquet", "'a' is float32 instead of int32", "'b' is string", "'c' is missing"):
            assert words in str(caught.value)

    def test_columns_that_only_some_files_have(self, tmp_path: Path) -> None:
        write(tmp_path / "0.parquet", {"a": ramp(2)})
        write(tmp_path / "1.parquet", {"a": ramp(2), "extra": ramp(2)})
        with pytest.raises(SchemaError, match=r"1\.parquet' has columns .*'extra'"):
            ParquetSource(tmp_path)
        assert ParquetSource(tmp_path, features=["a"]).n_rows == 4


class TestFeatureTypes:
    def test_everything_that_is_a_number(self, tmp_path: Path) -> None:
        exact = [decimal.Decimal(text) for text in ("0.1", "-123456.789", "9007199254740993.123", "2.675")]
        columns = {
            "flag": pa.array([True, False, True, True]),
            "half": pa.array(np.array([1.5, -2, 0.25, 8], np.float16)),
            "money": pa.array(exact, pa.decimal128(30, 3)),
            "code": pa.array([7, 7, 9, 7], pa.int64()).dictionary_encode(),
            "small": pa.array([1, 2, 3, 4], pa.uint8()),
        }
        write(tmp_path / "a.parquet", columns, row_group_size=3)
        source = ParquetSource(tmp_path / "a.parquet")
        assert source.feature_dtypes == ("bool", "float16", "decimal128(30, 3)", "int64", "uint8")
        assert source.row_dtype == np.float64
        X = read_all(source)[0]
        assert X[:, 2].tolist() == [float(value) for value in exact]
        np.testing.assert_array_equal(
            np.delete(X, 2, 1), [[1, 1.5, 7, 1], [0, -2, 7, 2], [1, 0.25, 9, 3], [1, 8, 7, 4]]
        )
        with source.open_block(0) as reader:
            assert [column.dtype.kind for column in reader.read(2).X] == ["b", "f", "f", "i", "u"]

    @pytest.mark.parametrize(("precision", "scale"), [(9, 9), (15, 3), (18, 4), (19, 0), (38, 10), (38, 30), (50, 7)])
    def test_decimals_are_rounded_once(self, tmp_path: Path, precision: int, scale: int) -> None:
        generator = np.random.default_rng(precision)
        with decimal.localcontext(prec=90):
            exact = []
            for digits in generator.integers(1, precision + 1, 300):
                unscaled = int("".join(map(str, generator.integers(0, 10, digits)))) * int(generator.choice([-1, 1]))
                exact.append(decimal.Decimal(unscaled).scaleb(-scale))
            kind = pa.decimal128 if precision <= 38 else pa.decimal256
            values = pa.array(exact, kind(precision, scale))
            write(tmp_path / "a.parquet", {"x": values}, row_group_size=170)
            found = read_all(ParquetSource(tmp_path / "a.parquet"))[0][:, 0]
            assert found.tolist() == [float(value) for value in exact]

    @pytest.mark.parametrize("kind", [pa.decimal128(7, 2), pa.decimal128(30, 3), pa.decimal256(50, 9)])
    def test_decimals_have_a_place_in_the_plan(self, tmp_path: Path, kind: pa.DataType) -> None:
        """NumPy takes some of their names for structures."""
        money = pa.array([decimal.Decimal(n) for n in range(50)], kind)
        pq.write_table(pa.table({"money": money, "y": np.arange(50.0)}), tmp_path / "a.parquet")
        layout = plan_layout(open_source(tmp_path / "a.parquet", "y"), 1_000_000)
        assert layout.window_rows == 50

    def test_decimals_beside_the_limits(self) -> None:
        tens = [decimal.Decimal(n).scaleb(3) for n in (1, -999, 2**53 + 1)]
        assert to_numbers(pa.array(tens, pa.decimal128(20, -3)).slice(1)).tolist() == [-999e3, float(tens[2])]
        exact = [decimal.Decimal(-(2**63)), decimal.Decimal(2**63 - 1), decimal.Decimal(2**53 + 1), decimal.Decimal(-1)]
        exact += [decimal.Decimal(3 * 2**64 + 5), decimal.Decimal(-3 * 2**64 + 5)]
        assert to_numbers(pa.array(exact, pa.decimal128(38, 0))).tolist() == [float(value) for value in exact]

    def test_other_columns_are_all_named_with_a_way_out(self, tmp_path: Path) -> None:
        columns = {
            "x": ramp(2),
            "name": ["a", "b"],
            "kind": pa.array(["a", "b"]).dictionary_encode(),
            "day": [datetime.date(2020, 1, 1)] * 2,
            "when": [datetime.datetime(2020, 1, 1)] * 2,
            "many": [[1], [2]],
            "inner": [{"a": 1}, {"a": 2}],
            "nothing": pa.nulls(2),
        }
        path = write(tmp_path / "a.parquet", columns)
        with pytest.raises(SchemaError) as caught:
            ParquetSource(path)
        message = str(caught.value)
        for name in list(columns)[1:]:
            assert f"'{name}' (" in message
        assert "7 of 8 columns" in message
        assert "features=['x']" in message
        with pytest.raises(SchemaError, match=r"'day' \(date32"):
            ParquetSource(path, features=["x", "day"])

    def test_nested_neighbours_do_not_shift_columns(self, tmp_path: Path) -> None:
        inner = pa.array([{"a": None, "b": [1, 2]}, {"a": 2, "b": None}])
        many = pa.array([[{"k": 1}], None], pa.list_(pa.struct([("k", pa.int32()), ("l", pa.float64())])))
        path = write(
            tmp_path / "a.parquet",
            {
                "inner": inner,
                "many": many,
                "x": ramp(2),
                "m": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int8())),
            },
        )
        source = ParquetSource(path, features=["x"])  # nulls are in columns that are not used
        np.testing.assert_array_equal(read_all(source)[0], [[0], [1]])
        assert source.stored_bytes < 200

    def test_names_with_dots_and_prefixes(self, tmp_path: Path) -> None:
        columns = {"a": [{"b": 9.0}, {"b": 8.0}], "a.b": ramp(2), "c": ramp(2) + 4, "c.d": ramp(2) + 6}
        path = write(tmp_path / "a.parquet", columns)
        np.testing.assert_array_equal(read_all(ParquetSource(path, features=["a.b", "c"]))[0], [[0, 4], [1, 5]])
        np.testing.assert_array_equal(read_all(ParquetSource(path, "c.d", ["c"]))[1], [6, 7])

    def test_repeated_names_are_refused_where_used(self, tmp_path: Path) -> None:
        table = pa.Table.from_arrays([pa.array(ramp(2)), pa.array(ramp(2)), pa.array(ramp(2))], ["a", "b", "a"])
        path = write(tmp_path / "a.parquet", table)
        with pytest.raises(SchemaError, match="'a' occurs more than once"):
            ParquetSource(path)
        assert ParquetSource(path, features=["b"]).n_features == 1

    def test_pandas_index_is_no_feature(self, tmp_path: Path) -> None:
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame({"x": ramp(3)}, index=pandas.Index([7, 5, 9], name="id"))
        frame.to_parquet(tmp_path / "a.parquet")
        source = ParquetSource(tmp_path / "a.parquet")
        assert source.feature_names == ("x",)
        assert source.dropped == (("id", "the pandas index"),)
        assert ParquetSource(tmp_path / "a.parquet", features=["x", "id"]).n_features == 2


class TestNaming:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return write(tmp_path / "a.parquet", {"price": ramp(3), "size": ramp(3), "y": ramp(3), "w": ["a", "b", "c"]})

    def test_missing_columns(self, path: Path) -> None:
        with pytest.raises(SourceNotFoundError, match=r"no column 'prise'\. Did you mean 'price'\?.*'size', 'y', 'w'"):
            ParquetSource(path, "y", ["prise"])
        with pytest.raises(SourceNotFoundError, match="no column 'label'"):
            ParquetSource(path, "label")
        with pytest.raises(SourceNotFoundError, match="no column 'heft'"):
            ParquetSource(path, "y", ["size"], "heft")

    def test_columns_used_twice(self, path: Path) -> None:
        with pytest.raises(OptionError, match="'y'"):
            ParquetSource(path, "y", ["size", "y"])
        with pytest.raises(OptionError, match="'size'"):
            ParquetSource(path, "y", ["size", "size"])

    def test_weight_must_be_numbers(self, path: Path) -> None:
        with pytest.raises(SchemaError, match=r"weight 'w' .* is string"):
            ParquetSource(path, "y", ["size"], "w")

    def test_no_feature_left(self, path: Path) -> None:
        with pytest.raises(SchemaError, match="no columns left"):
            ParquetSource(path, "y", [])


class TestTargets:
    @pytest.mark.parametrize("encoded", [True, False], ids=["dictionary", "plain"])
    def test_strings_through_slices_of_any_size(self, tmp_path: Path, encoded: bool) -> None:
        y = np.array(["yes", "no", "perhaps"])[np.arange(1000) % 3]
        path = write(tmp_path / "a.parquet", {"x": ramp(1000), "y": y}, use_dictionary=encoded, row_group_size=400)
        source = ParquetSource(path, "y")
        assert source.target.dtype == "string"
        assert read_all(source, (7, 100, 1))[1].tolist() == y.tolist()
        with source.open_block(0, piece_rows=16) as reader:
            assert isinstance(reader.read(16).y, pa.DictionaryArray)  # a slice maps its classes, not its rows
        with source.open_block(1, 5, piece_rows=16) as reader:
            piece = reader.read(33)
            assert isinstance(piece.y, pa.Array)
            assert piece.y.to_pylist() == y[405:438].tolist()

    def test_more_strings_than_a_dictionary_holds(self, tmp_path: Path) -> None:
        y = np.array([f"{i:06d}" for i in range(3000)])
        path = write(tmp_path / "a.parquet", {"x": ramp(3000), "y": y}, dictionary_pagesize_limit=1024)
        assert read_all(ParquetSource(path, "y"), (500, 33))[1].tolist() == y.tolist()

    @pytest.mark.parametrize(
        ("values", "kind"),
        [
            ([datetime.date(2020, 1, 2), datetime.date(2021, 1, 2)], "date32[day]"),
            (pa.array([b"u", b"v"]), "binary"),
            (pa.array(["u", "v"]).dictionary_encode(), "string"),
            (pa.array(["u", "v"], pa.large_string()), "string"),
        ],
        ids=["date", "binary", "dictionary", "large"],
    )
    def test_any_type_with_classes(self, tmp_path: Path, values: Any, kind: str) -> None:
        source = ParquetSource(write(tmp_path / "a.parquet", {"x": ramp(2), "y": values}), "y")
        assert (source.target.dtype, source.target.numeric) == (kind, False)
        with source.open_block(0) as reader:
            assert reader.read(2).y.to_pylist() == pa.array(values).to_pylist()

    @pytest.mark.parametrize("values", [[[1], [2]], [{"a": 1}, {"a": 2}], pa.nulls(2)], ids=["list", "struct", "null"])
    def test_types_without_classes(self, tmp_path: Path, values: Any) -> None:
        path = write(tmp_path / "a.parquet", {"x": ramp(2), "y": values})
        with pytest.raises(SchemaError, match=r"target 'y'.*expected numbers, or labels"):
            ParquetSource(path, "y")

    def test_several_outputs_must_be_numbers(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", {"x": ramp(2), "y": ramp(2), "z": ["a", "b"]})
        with pytest.raises(SchemaError, match=r"target 'z' .* must all be numbers"):
            ParquetSource(path, ["y", "z"])

    def test_target_pass_reads_no_features(self, tmp_path: Path) -> None:
        n = 50_000
        columns = {f"x{j}": make_rows(n, 1, seed=j)[:, 0] for j in range(8)} | {"y": ramp(n)}
        source = ParquetSource(write(tmp_path / "a.parquet", columns, use_dictionary=False, compression="none"), "y")
        metadata = pq.read_metadata(tmp_path / "a.parquet").row_group(0)
        opened = []
        real = parquet_rows.DirectRows

        def spy(file: Any, columns: Any, *args: Any) -> Any:
            opened.extend(column.chunk.start for column in columns)
            return real(file, columns, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parquet_rows, "DirectRows", spy)
            found = np.concatenate([np.array(y) for _, y, _ in source.iter_targets()])
        assert opened == [metadata.column(8).data_page_offset]
        assert np.array_equal(found, ramp(n))

    def test_target_pass_of_labels_reads_no_features(self, tmp_path: Path) -> None:
        columns = {"x": ramp(100), "y": np.array(["a", "b"])[np.arange(100) % 2]}
        source = ParquetSource(write(tmp_path / "a.parquet", columns), "y")
        opened = []
        real = pq.ParquetFile.iter_batches

        def spy(self: Any, *args: Any, **options: Any) -> Any:
            opened.append(options["columns"])
            return real(self, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pq.ParquetFile, "iter_batches", spy)
            assert [y for _, part, _ in source.iter_targets() for y in plain(part)] == columns["y"].tolist()
        assert opened == [["y"]]


class TestNulls:
    def test_footers_tell_before_any_row_is_read(self, tmp_path: Path) -> None:
        columns = {
            "a": pa.array([1.0, 2.0, None, None]),
            "b": ramp(4),
            "y": pa.array([1, None, 3, 4]),
            "c": pa.nulls(4),
        }
        path = write(tmp_path / "a.parquet", columns, row_group_size=2)
        with pytest.raises(NonFiniteError) as caught:
            ParquetSource(path, "y", ["a", "b"])
        assert "'a' (2 in 'a.parquet', row group 1)" in str(caught.value)
        assert "'y' (1 in 'a.parquet', row group 0)" in str(caught.value)
        assert ParquetSource(path, features=["b"]).n_rows == 4

    @pytest.mark.parametrize("column", ["a", "s", "w"])
    def test_without_statistics_the_reader_names_the_row(self, tmp_path: Path, column: str) -> None:
        n = 300
        mask = np.arange(n) == 223
        columns = {"a": ramp(n), "s": np.array(["u", "v"])[np.arange(n) % 2], "w": ramp(n)}
        columns[column] = pa.array(columns[column], mask=mask)
        path = write(tmp_path / "a.parquet", columns, write_statistics=False, row_group_size=200)
        source = ParquetSource(path, "s", ["a"], "w")
        with pytest.raises(NonFiniteError, match=f"column '{column}'.*row group 1, row 223 of the file"):
            read_block(source, 1, start=7, sizes=(5,))
        with source.open_block(1, 24) as reader:  # rows before the start are not looked at
            assert len(reader.read(76).X[0]) == 76


class TestReading:
    def test_big_row_groups_are_never_held_whole(self, tmp_path: Path) -> None:
        n = 400_000
        columns = {f"x{j}": make_rows(n, 1, seed=j)[:, 0] for j in range(8)}
        path = write(tmp_path / "a.parquet", columns, row_group_size=n, use_dictionary=False, data_page_size=1 << 16)
        source = ParquetSource(path)
        before = pa.total_allocated_bytes()
        with source.open_block(0, piece_rows=2048) as reader:
            most = 0
            for _ in range(20):
                reader.read(2048)
                most = max(most, pa.total_allocated_bytes() - before)
        assert most < 8 * n * 4 / 4
        assert most < source.open_block_bytes + 2 * 8 * 2048 * 4
        assert pa.total_allocated_bytes() - before < 1 << 16

    def test_one_iterator_serves_a_whole_block(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        real = pq.ParquetFile.iter_batches
        monkeypatch.setattr(
            pq.ParquetFile, "iter_batches", lambda self, *a, **k: calls.append(1) or real(self, *a, **k)
        )
        source = ParquetSource(write(tmp_path / "a.parquet", {"x": ramp(1000, "int8")}))
        read_block(source, 0, sizes=(10,))
        assert len(calls) == 1

    def test_pieces_are_views(self, tmp_path: Path) -> None:
        source = ParquetSource(write(tmp_path / "a.parquet", {"x": ramp(1000)}))
        with source.open_block(0, piece_rows=100) as reader:
            assert all(not reader.read(50).X[0].flags.owndata for _ in range(4))

    @pytest.mark.parametrize(
        "writer",
        [
            {},
            {"use_dictionary": False, "max_rows_per_page": 1 << 30},
            {"max_rows_per_page": 1 << 30},
            {"data_page_size": 64 << 20, "max_rows_per_page": 1 << 30},
            {"data_page_size": 64 << 20, "max_rows_per_page": 1 << 30, "use_dictionary": False, "compression": "none"},
            {"data_page_version": "2.0", "compression": "zstd"},
            {"row_group_size": 5000},
        ],
        ids=["default", "no dictionary", "tall pages", "huge pages", "huge plain", "version 2", "small groups"],
    )
    def test_cost_of_an_open_block_is_an_upper_bound(self, tmp_path: Path, writer: dict[str, Any]) -> None:
        n, width = 500_000, 4
        columns: dict[str, Any] = {f"x{j}": make_rows(n, 1, seed=j)[:, 0] for j in range(width - 1)}
        columns["few"] = (np.arange(n) % 100).astype(np.int64)
        columns["y"] = np.array([f"label {i}" for i in range(50)])[np.arange(n) % 50]
        source = ParquetSource(write(tmp_path / "a.parquet", columns, **({"row_group_size": n} | writer)), "y")
        with source.open_block(0) as reader:  # what is loaded once is not counted
            reader.read(1)
        source.close()
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        with contextlib.closing(source.open_block(0, piece_rows=1024)) as reader:
            most = 0
            for _ in range(int(source.block_rows[0]) // 1024 - 1):
                piece = reader.read(1024)
                assert len(piece.X) == width
                most = max(most, pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert most <= source.open_block_bytes  # the slice included, which the promise leaves out
        assert source.open_block_bytes < 3 * most + 1_000_000

    def test_hint_where_row_groups_are_big(self, tmp_path: Path) -> None:
        columns = {f"x{j}": make_rows(300_000, 1)[:, 0] for j in range(4)}
        source = ParquetSource(write(tmp_path / "a.parquet", columns, row_group_size=300_000))
        assert source.mixing_hint() is None  # they are about as big as advised
        wide = {f"x{j}": make_rows(40_000, 1)[:, 0] for j in range(64)}
        source = ParquetSource(write(tmp_path / "b.parquet", wide))
        assert "row_group_size=8192" in source.mixing_hint()
        assert "40,000 rows (100.0% of the data)" in source.mixing_hint()
        source = ParquetSource(write(tmp_path / "c.parquet", wide, row_group_size=8192))
        assert source.mixing_hint() is None


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        columns = {"x": make_rows(5000, 1)[:, 0], "y": ramp(5000)}
        return write(tmp_path / "a.parquet", columns, row_group_size=1000, write_page_checksum=True)

    def test_cut_short(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CorruptDataError, match=r"a\.parquet' is no whole Parquet file.*cut short"):
            ParquetSource(path, "y")

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(20) + b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1"])
    def test_nothing_but_a_name(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(CorruptDataError, match=r"a\.parquet"):
            ParquetSource(path, "y")

    def test_footer_overwritten(self, path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[-400:-300] = b"\xff" * 100
        path.write_bytes(raw)
        with pytest.raises(CorruptDataError, match=r"footer of .*a\.parquet") as caught:
            ParquetSource(path, "y")
        assert caught.value.__cause__ is not None

    def test_page_overwritten(self, path: Path) -> None:
        raw = bytearray(path.read_bytes())
        place = pq.read_metadata(path).row_group(2).column(0).data_page_offset
        raw[place + 200 : place + 230] = b"\x55" * 30
        path.write_bytes(raw)
        source = ParquetSource(path, "y")
        read_block(source, 1)
        with pytest.raises(CorruptDataError, match=r"row group 2, row 2,\d+ of the file") as caught:
            read_block(source, 2)
        assert caught.value.__cause__ is not None

    def test_page_header_overwritten(self, path: Path) -> None:
        raw = bytearray(path.read_bytes())
        place = pq.read_metadata(path).row_group(0).column(0).data_page_offset
        for filler in (b"\x1c", b"\xff", b"\x00", b"\x88"):
            raw[place : place + 40] = filler * 40
            path.write_bytes(raw)
            source = ParquetSource(path, "y")  # costs are estimated all the same
            assert source.open_block_bytes > 0
            with pytest.raises(CorruptDataError, match="row group 0"):
                read_block(source, 0)

    def test_headers_that_never_end(self) -> None:
        for filler in (b"\x1c", b"\xff", b"\x18\x7f"):
            chunk = Chunk(0, 70_000, 140_000, "FLOAT")
            assert open_bytes(io.BytesIO(filler * 70_000), [chunk])[0] >= 140_000

    def test_changed_after_opening(self, path: Path) -> None:
        source = ParquetSource(path, "y")
        write(path, {"x": ramp(5000), "y": ramp(5000)}, row_group_size=1000)
        with pytest.raises(DataError, match="has changed since"):
            source.open_block(0)

    def test_encrypted_columns(self, path: Path) -> None:
        encryption = pytest.importorskip("pyarrow.parquet.encryption")

        class Keys(encryption.KmsClient):  # type: ignore[misc]
            def __init__(self) -> None:
                encryption.KmsClient.__init__(self)

            def wrap_key(self, key: bytes, name: str) -> bytes:
                return base64.b64encode(key)

            def unwrap_key(self, key: bytes, name: str) -> bytes:
                return base64.b64decode(key)

        factory, server = encryption.CryptoFactory(lambda _: Keys()), encryption.KmsConnectionConfig()
        for plaintext_footer in (True, False):
            how = encryption.EncryptionConfiguration(
                footer_key="one", column_keys={"two": ["x"]}, plaintext_footer=plaintext_footer
            )
            write(
                path,
                {"x": ramp(9), "y": ramp(9)},
                encryption_properties=factory.file_encryption_properties(server, how),
            )
            with pytest.raises(DataError, match="encrypt"):
                ParquetSource(path, "y")

    def test_encrypted_footer(self, path: Path) -> None:
        path.write_bytes(b"PARE" + bytes(100) + b"PARE")
        with pytest.raises(DataError, match="encrypted"):
            ParquetSource(path, "y")

    def test_unreadable(self, path: Path) -> None:
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("runs as root")
        with pytest.raises(DataError, match=r"a\.parquet"):
            ParquetSource(path, "y")


class TestIdentity:
    def test_single_file_may_be_renamed(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", {"x": ramp(5)})
        before = ParquetSource(path).fingerprint
        assert ParquetSource(path.rename(tmp_path / "b.pq")).fingerprint == before

    def test_partition_of_a_single_file_counts(self, tmp_path: Path) -> None:
        write(tmp_path / "one" / "k=1" / "a.parquet", {"x": ramp(5)})
        write(tmp_path / "two" / "k=2" / "a.parquet", {"x": ramp(5)})
        assert ParquetSource(tmp_path / "one").fingerprint != ParquetSource(tmp_path / "two").fingerprint

    def test_order_of_files_counts(self, tmp_path: Path) -> None:
        paths = [write(tmp_path / f"{part}.parquet", {"x": ramp(5) + part}) for part in range(2)]
        assert ParquetSource(paths).fingerprint != ParquetSource(paths[::-1]).fingerprint

    def test_columns_used_count(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", {"x": ramp(5), "y": ramp(5), "z": ramp(5)})
        prints = [
            ParquetSource(path, *columns).fingerprint
            for columns in ((None, ["x"]), ("y", ["x"]), ("z", ["x"]), ("y", ["z"]), ("y", ["x"], "z"))
        ]
        assert all(one != other for i, one in enumerate(prints) for other in prints[:i])

    def test_many_files_are_listed_as_a_hash(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("streamgd.data.sources.parquet._LISTED_FILES", 2)
        for part in range(3):
            write(tmp_path / f"{part}.parquet", {"x": ramp(5)})
        before = ParquetSource(tmp_path).fingerprint
        assert isinstance(before["files"], str)
        write(tmp_path / "1.parquet", {"x": ramp(5) + 1})
        assert ParquetSource(tmp_path).fingerprint["files"] != before["files"]


class TestText:
    """As targets; Arrow hands text out as it is stored."""

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()], ids=str)
    @pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
    def test_of_encodings_without_dictionaries(self, tmp_path: Path, encoding: str, kind: Any) -> None:
        labels = pa.array(["dear", "cheap", "fair"] * 30).cast(kind)
        path = tmp_path / "a.parquet"
        options: dict[str, Any] = {"use_dictionary": False, "column_encoding": {"y": encoding}}
        pq.write_table(pa.table({"x": ramp(90), "y": labels}), path, row_group_size=40, **options)
        source = ParquetSource(path, "y")
        found = [label for block in range(3) for label in read_block(source, block)[1].tolist()]
        assert found == labels.to_pylist()

    @pytest.mark.parametrize("dictionary", [True, False])
    def test_that_is_not_utf8_is_named_by_its_row(self, tmp_path: Path, dictionary: bool) -> None:
        path = tmp_path / "a.parquet"
        labels = pa.array([b"dear", b"d\xe9ar", b"dear"] * 2).cast(pa.binary())
        table = pa.table({"x": ramp(6), "y": pa.Array.from_buffers(pa.string(), 6, labels.buffers())})
        pq.write_table(table, path, row_group_size=3, use_dictionary=dictionary, write_statistics=False)
        source = ParquetSource(path, "y")
        with pytest.raises(DataError, match=r"'y' holds text that is not UTF-8, in a.parquet, row group 1, row 4 of"):
            read_block(source, 1)

    def test_that_is_not_utf8_before_its_row_is_read(self, tmp_path: Path) -> None:
        """Of a dictionary, which stands before all rows."""
        path = tmp_path / "a.parquet"
        labels = pa.array([b"dear"] * 90 + [b"d\xe9ar"] + [b"dear"] * 9)
        table = pa.table({"x": ramp(100), "y": pa.Array.from_buffers(pa.string(), 100, labels.buffers())})
        pq.write_table(table, path, write_statistics=False)
        with pytest.raises(DataError, match=r"not UTF-8, in a.parquet, row group 0; write"):
            read_block(ParquetSource(path, "y"), 0, sizes=(20,))
        words = r"not UTF-8, in a.parquet, row group 0, row 90 of"
        with ParquetSource(path, "y").open_block(0, 80, piece_rows=20) as reader, pytest.raises(DataError, match=words):
            reader.read(20)


_PAIR = pa.struct([("left", pa.float64()), ("right", pa.float64())])
_EXTENDED = {"pair": _PAIR, "number": pa.float64(), "decimal": pa.decimal128(9, 2), "text": pa.string()}


class _Extended(pa.ExtensionType):
    """By default two columns of a file, as pandas' intervals are."""

    def __init__(self, storage: pa.DataType = _PAIR) -> None:
        super().__init__(storage, f"test.{storage}")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, _: bytes) -> _Extended:
        return cls(storage)


class TestExtensionTypes:
    """Who has registered which of Arrow's extension types in this process changes nothing."""

    def table(self) -> pa.Table:
        rng = np.random.default_rng(0)
        values = {
            "pair": [{"left": 1.0, "right": 2.0}] * 50,
            "number": rng.normal(size=50).tolist(),
            "decimal": [decimal.Decimal(i) / 4 for i in range(50)],
            "text": ["a", "b"] * 25,
        }
        columns = {
            name: pa.ExtensionArray.from_storage(_Extended(kind), pa.array(values[name], kind))
            for name, kind in _EXTENDED.items()
        }
        return pa.table(columns | {"a": rng.normal(size=50), "b": rng.normal(size=50)})

    @pytest.mark.parametrize("features", [["b"], ["a", "b"], ["number", "a"], ["decimal", "number", "b"]])
    @pytest.mark.parametrize("target", ["a", "number", "decimal", "text"])
    def test_rows_are_those_that_are_stored(self, tmp_path: Path, features: list[str], target: str) -> None:
        pq.write_table(self.table(), tmp_path / "a.parquet", row_group_size=20)
        features = [name for name in features if name != target]
        plain_rows = read_all(ParquetSource(tmp_path / "a.parquet", target, features=features))
        for kind in _EXTENDED.values():
            pa.register_extension_type(_Extended(kind))
        try:
            assert isinstance(pq.read_schema(tmp_path / "a.parquet").field("pair").type, _Extended)
            rows = read_all(ParquetSource(tmp_path / "a.parquet", target, features=features))
        finally:
            for kind in _EXTENDED.values():
                pa.unregister_extension_type(f"test.{kind}")
        for found, expected in zip(rows[:2], plain_rows[:2], strict=True):
            assert found.tolist() == expected.tolist()
        stored = self.table()
        for j, name in enumerate(features):
            column = stored[name].combine_chunks()
            column = column.storage if isinstance(column, pa.ExtensionArray) else column
            np.testing.assert_array_equal(rows[0][:, j], [float(value) for value in column.to_pylist()])
