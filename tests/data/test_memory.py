"""Arrays, memmaps, data frames and lists as sources."""

from __future__ import annotations

import os
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from streamgd.data.sources.memory import MemorySource
from streamgd.errors import CorruptDataError, EmptySourceError, OptionError, SchemaError, SourceNotFoundError
from tests.data.contract import (
    SourceContract,
    assert_same_bits,
    dense,
    make_rows,
    make_target,
    open_files_in,
    plain,
    read_all,
)


def small_blocks(X: Any, n_blocks: int) -> int:
    return int(X.nbytes) // n_blocks + 1


class TestArrays(SourceContract):
    kind = "memory"
    in_files = False

    def make(self, folder, X, y, weight=None, *, n_blocks=4, dtype="auto", names=None):
        return MemorySource(
            X, y, weight=weight, dtype=dtype, feature_names=names, block_bytes=small_blocks(X, n_blocks)
        )


class TestFortranArrays(TestArrays):
    def make(self, folder, X, y, weight=None, **options):
        return super().make(folder, np.asfortranarray(X), y, weight, **options)


class TestFrames(TestArrays):
    def make(self, folder, X, y, weight=None, *, n_blocks=4, dtype="auto", names=None):
        frame = pd.DataFrame(X, columns=names)
        y = pd.DataFrame(y) if y is not None and y.ndim == 2 else y if y is None else pd.Series(y)
        weight = None if weight is None else pd.Series(weight)
        return MemorySource(frame, y, weight=weight, dtype=dtype, block_bytes=small_blocks(X, n_blocks))


class TestColumnwiseFrames(TestArrays):
    """Columns that were added one by one do not lie in one array."""

    def make(self, folder, X, y, weight=None, *, n_blocks=4, dtype="auto", names=None):
        frame = pd.DataFrame(index=range(len(X)))
        for j, name in enumerate(names or [f"x{j}" for j in range(X.shape[1])]):
            frame[name] = X[:, j].copy()
        return MemorySource(frame, y, weight=weight, dtype=dtype, block_bytes=small_blocks(X, n_blocks))


class TestMemmaps(TestArrays):
    in_files = True
    named_features = False

    def make(self, folder, X, y, weight=None, *, n_blocks=4, dtype="auto", names=None):
        arrays = {"X": X, "y": y, "weight": weight}
        for name, array in arrays.items():
            if array is not None:
                np.save(folder / f"{name}.npy", array)
        return self.mapped(folder, arrays["weight"] is not None, dtype, small_blocks(X, n_blocks))

    def mapped(self, folder, weighted=False, dtype="auto", block_bytes=1 << 20):
        X, y, weight = (
            np.load(folder / f"{name}.npy", mmap_mode="r") if (folder / f"{name}.npy").exists() else None
            for name in ("X", "y", "weight")
        )
        return MemorySource(X, y, weight=weight if weighted else None, dtype=dtype, block_bytes=block_bytes)

    def reopen(self, folder):
        return self.mapped(folder)


# Memmaps


@pytest.mark.parametrize(
    "view",
    [
        lambda m: m,
        lambda m: m[3:-2],
        lambda m: m[:, 2:5],
        lambda m: m[::3, ::2],
        lambda m: np.asarray(m)[1:],
        lambda m: m.T,
        lambda m: m[:, :1],
        lambda m: m[5:6],
    ],
)
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_views_of_memmaps_read_the_same(tmp_path: Path, view: Any, mode: Any) -> None:
    X = make_rows(60, 8)
    X.tofile(tmp_path / "X.bin")
    mapped = np.memmap(tmp_path / "X.bin", dtype="float32", mode=mode, shape=(59, 8), offset=32)
    if mode != "r":
        mapped[4, 3] = 17.0
    expected = np.array(view(mapped))
    source = MemorySource(view(mapped), block_bytes=500)
    assert_same_bits(read_all(source)[0], expected)
    unpickled = pickle.loads(pickle.dumps(source))
    del mapped
    assert_same_bits(read_all(unpickled)[0], expected)


def test_memmap_pickles_as_a_path(tmp_path: Path) -> None:
    np.save(tmp_path / "X.npy", make_rows(20_000, 10))
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    source = MemorySource(mapped[:, 1:], mapped[:, 0])
    assert len(pickle.dumps(source)) < 20_000


def test_memmap_is_read_from_its_file_not_through_the_mapping(tmp_path: Path) -> None:
    """Touched pages of a mapping count as resident memory."""
    np.save(tmp_path / "X.npy", make_rows(200_000, 20))
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    source = MemorySource(mapped[:, 1:], mapped[:, 0])

    def resident_bytes() -> int:
        smaps = Path("/proc/self/smaps").read_text().split(str(tmp_path / "X.npy"))[1]
        return int(smaps.split("Rss:")[1].split()[0]) << 10

    if not Path("/proc/self/smaps").exists():
        pytest.skip("reads /proc")
    for _ in range(2):
        read_all(source, (5_000,))
    list(source.iter_targets())
    assert resident_bytes() < mapped.nbytes / 8


def test_memmap_cut_short_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "X.npy", make_rows(1_000, 10))
    source = MemorySource(np.load(tmp_path / "X.npy", mmap_mode="r"), block_bytes=4_000)
    os.truncate(tmp_path / "X.npy", 20_000)
    with pytest.raises(CorruptDataError, match=r"X\.npy.*cut short"):
        read_all(source)


def test_memmap_of_a_replaced_file_keeps_its_own_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "X.npy", make_rows(100, 4))
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    np.save(tmp_path / "other.npy", make_rows(100, 4, seed=9))
    (tmp_path / "other.npy").replace(tmp_path / "X.npy")
    assert_same_bits(read_all(MemorySource(mapped))[0], make_rows(100, 4))


# No copies


def test_slices_of_an_array_are_views() -> None:
    X, y = make_rows(), make_target()
    with MemorySource(X, y, block_bytes=5_000).open_block(1) as reader:
        piece = reader.read(11)
    assert np.shares_memory(piece.X, X)
    assert np.shares_memory(piece.y, y)


def test_one_typed_frame_is_sliced_as_a_matrix_without_a_copy() -> None:
    frame = pd.DataFrame(make_rows(997, 6), columns=list("abcdef"))
    for source in (
        MemorySource(frame),
        MemorySource.from_dataframe(frame, "f"),
        MemorySource.from_dataframe(frame, "a", features=["f", "d", "b"]),
    ):
        with source.open_block(0) as reader:
            X = reader.read(5).X
        assert isinstance(X, np.ndarray)
        assert np.shares_memory(X, frame["b"].to_numpy())
    assert_same_bits(read_all(source)[0], frame[["f", "d", "b"]].to_numpy())


def test_columns_at_uneven_distances_are_kept_apart() -> None:
    frame = pd.DataFrame(make_rows(997, 6), columns=list("abcdef"))
    source = MemorySource.from_dataframe(frame, "c", features=["a", "b", "f"])
    assert_same_bits(read_all(source)[0], frame[["a", "b", "f"]].to_numpy())


def test_mixed_frame_is_sliced_by_column_without_a_copy() -> None:
    frame = pd.DataFrame({"a": np.arange(9.0), "b": np.arange(9, dtype=np.int8), "c": np.arange(9) % 2 == 0})
    source = MemorySource(frame)
    assert source.feature_dtypes == ("float64", "int8", "bool")
    assert source.row_dtype == np.float64
    with source.open_block(0) as reader:
        X = reader.read(4).X
    assert [column.dtype.name for column in X] == ["float64", "int8", "bool"]
    assert all(np.shares_memory(column, frame[name].to_numpy()) for column, name in zip(X, "abc", strict=True))


# What is accepted


def test_nested_lists_are_rows() -> None:
    source = MemorySource([[1, 2], [3, 4.5]], ["no", "yes"], weight=[1, 2])
    X, y, weight = read_all(source)
    assert_same_bits(X, np.array([[1, 2], [3, 4.5]]))
    assert y.tolist() == ["no", "yes"]
    assert weight.tolist() == [1, 2]


def test_objects_that_are_numbers_become_float64() -> None:
    X = np.array([[1, 2.5], [True, Decimal("0.25")]], dtype=object)
    source = MemorySource(X)
    assert source.row_dtype == np.float64
    assert_same_bits(read_all(source)[0], np.array([[1, 2.5], [1, 0.25]]))


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">f8"])
def test_other_byte_orders_are_handed_out_native(dtype: str) -> None:
    X = make_rows(50, 3, dtype=np.dtype(dtype).newbyteorder("=").name)
    source = MemorySource(X.astype(dtype), X[:, 0].astype(dtype), weight=X[:, 1].astype(dtype))
    with source.open_block(0) as reader:
        piece = reader.read(50)
    assert piece.X.dtype.isnative
    assert piece.y.dtype.isnative
    assert piece.weight.dtype.isnative
    assert_same_bits(piece.X, X)


def test_nullable_columns_are_numbers_with_nan_where_missing() -> None:
    frame = pd.DataFrame(
        {
            "i": pd.array([1, None, 3], dtype="Int64"),
            "f": pd.array([0.5, 1.5, None], dtype="Float32"),
            "b": pd.array([True, False, None], dtype="boolean"),
            "whole": pd.array([1, 2, 3], dtype="Int8"),
            "arrow": pd.array([1.0, None, 3.0], dtype="float64[pyarrow]"),
        }
    )
    source = MemorySource(frame)
    assert source.feature_dtypes == ("Int64", "Float32", "boolean", "Int8", "double[pyarrow]")
    with source.open_block(0) as reader:
        columns = reader.read(3).X
    assert [column.dtype.name for column in columns] == ["float64", "float32", "float32", "int8", "float64"]
    expected = [[1, 0.5, 1, 1, 1], [np.nan, 1.5, 0, 2, np.nan], [3, np.nan, np.nan, 3, 3]]
    assert_same_bits(dense(columns), np.array(expected))


@pytest.mark.parametrize(
    ("y", "dtype", "numeric"),
    [
        (pd.Series([1, 2, 3], dtype="Int32"), "Int32", True),
        (pd.Series(["b", "a", "b"], dtype="category"), "category", False),
        (pd.Series(["b", "a", "b"]), "str", False),
        (["x", "y", "z"], "<U1", False),
        (np.array(["x", "yy", "z"], dtype=object), "object", False),
        (np.array([1, 2, 3], dtype=object), "object", True),
        (np.array([True, False, True], dtype=object), "object", True),
        (np.array([1, "a", None], dtype=object), "object", False),
        (np.array([b"x", b"y", b"z"]), "|S1", False),
    ],
)
def test_targets_of_every_kind(y: Any, dtype: str, numeric: bool) -> None:
    source = MemorySource(np.ones((3, 2)), y)
    assert source.target is not None
    assert source.target.dtype == dtype
    assert source.target.numeric is numeric
    _, found, _ = read_all(source)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == list(y)


def test_missing_numbers_in_a_nullable_target_are_nan() -> None:
    source = MemorySource(np.ones((3, 1)), pd.Series([1, None, 3], dtype="Int64"))
    assert_same_bits(read_all(source)[1], np.array([1, np.nan, 3]))


def test_named_series_and_one_column_frames_name_the_target() -> None:
    X = np.ones((3, 1))
    named = MemorySource(X, pd.Series([1, 2, 3], name="price")).target
    column = MemorySource(X, pd.DataFrame({"price": [1, 2, 3]})).target
    assert named is not None
    assert (named.name, named.is_vector) == ("price", True)
    assert column is not None
    assert (column.name, column.is_vector, column.n_outputs) == ("price", False, 1)


def test_frame_with_columns_named() -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0], "w": [1, 3], "y": ["no", "yes"], "b": [True, False], "z": [5, 6]})
    source = MemorySource.from_dataframe(frame, "y", weight="w", dtype="float32")
    assert source.feature_names == ("a", "b", "z")
    assert source.target is not None
    assert source.target.name == "y"
    X, y, weight = read_all(source)
    assert_same_bits(X, np.array([[1, 1, 5], [2, 0, 6]]))
    assert y.tolist() == ["no", "yes"]
    assert weight.tolist() == [1, 3]
    several = MemorySource.from_dataframe(frame, ["a", "z"], features=["w"])
    assert several.feature_names == ("w",)
    assert_same_bits(read_all(several)[1], np.array([[1.0, 5], [2, 6]]))


def test_blocks_are_about_a_mebibyte() -> None:
    source = MemorySource(np.zeros((300_000, 4), np.float32), np.zeros(300_000))
    assert source.n_blocks == 7
    assert source.block_rows[0] * 24 == pytest.approx(1 << 20, rel=0.01)
    assert MemorySource(np.zeros((3, 200_000))).block_rows.tolist() == [1, 1, 1]


def test_fingerprint_of_a_large_array_sees_the_outermost_rows() -> None:
    X = make_rows(100_000, 12)
    first, last = X.copy(), X.copy()
    first[0, 0] += 1
    last[-1, -1] += 1
    prints = [MemorySource(each).fingerprint for each in (X, X.copy(), first, last)]
    assert prints[0] == prints[1]
    assert prints[0] not in prints[2:]


def test_fingerprint_looks_at_objects_not_at_their_addresses() -> None:
    def labelled(value: Any) -> dict[str, Any]:
        return MemorySource(np.ones((3, 1)), np.array(["a" * 100, None, value], dtype=object)).fingerprint

    assert labelled("b" * 100) == labelled("".join(["b"] * 100))
    assert labelled(1) != labelled("1")


# What is refused


def refused(error: type[Exception], match: str, *args: Any, **options: Any) -> None:
    with pytest.raises(error, match=match):
        MemorySource(*args, **options)


@pytest.mark.parametrize("dtype", ["bool", "i1", "f2", "f4", "f8", "U3", "O"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_stamp_sees_any_value_that_changes(dtype: str, order: Any) -> None:
    """In the first, the last and any other piece, whatever does not fill whole words."""
    y = np.random.default_rng(0).integers(0, 2, (200_003, 1)).astype(dtype)
    X = np.zeros((len(y), 3), "f4" if dtype in ("U3", "O") else dtype, order=order)
    before = MemorySource(X, y[:, 0]).stamp()
    assert MemorySource(X.copy(order), y[:, 0].copy()).stamp() == before
    found = [before["sum"]]
    for row in (0, 100_000, 200_002):
        was = y[row, 0]
        y[row, 0] = type(y[row, 0])(1 - int(float(was)))
        found.append(MemorySource(X, y[:, 0]).stamp()["sum"])
        y[row, 0] = was
        X[row, 2] = 1
        found.append(MemorySource(X, y[:, 0]).stamp()["sum"])
        X[row, 2] = 0
    assert len(set(found)) == 7


def test_unusable_columns_are_all_named_at_once() -> None:
    frame = pd.DataFrame(
        {
            "ok": [1.0, 2.0],
            "city": ["x", "y"],
            "when": pd.to_datetime(["2020-01-01", "2020-01-02"]),
            "grade": pd.Categorical([1, 2]),
            "mix": np.array([1, "a"], dtype=object),
            "z": [1j, 2j],
        }
    )
    with pytest.raises(SchemaError, match=r"5 of 6 columns.*Leave them out") as caught:
        MemorySource(frame)
    for name in ("'city' (str)", "'when' (datetime64", "'grade' (category)", "'mix' (object)", "'z' (complex128)"):
        assert name in str(caught.value)
    assert "'ok'" not in str(caught.value)


@pytest.mark.parametrize(
    ("X", "match"),
    [
        (np.ones(5), r"Reshape your data.*reshape\(-1, 1\)"),
        (pd.Series([1.0, 2.0]), r"reshape\(-1, 1\)"),
        (np.float64(3), "0D array"),
        (np.ones((2, 2, 2)), "3 dimensions"),
        (np.ones((3, 0)), r"0 feature\(s\) \(shape=\(3, 0\)\) while a minimum of 1 is required"),
        (pd.DataFrame(index=range(3)), r"0 feature\(s\)"),
        (np.ones((3, 2), complex), "Complex data not supported"),
        (np.array([["a", "b"]]), "<U1"),
        (np.array([["2020-01-01"]], dtype="datetime64[D]"), "datetime64"),
        (np.array([[1, "x"]], dtype=object), "not numbers.*'x'"),
        (np.array([[{}]], dtype=object), "not numbers"),
        ([[1, 2], [3]], "same length"),
        (np.ma.masked_array(np.ones((2, 1)), [[True], [False]]), "masked"),
    ],
)
def test_unusable_features_are_refused(X: Any, match: str) -> None:
    refused(SchemaError, match, X)


def test_sparse_features_are_refused() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    refused(SchemaError, "sparse.*toarray", sparse.csr_array(np.eye(3)))


@pytest.mark.parametrize("X", [np.ones((0, 2)), pd.DataFrame({"a": []}, dtype="float64")])
def test_no_rows_is_an_error(X: Any) -> None:
    refused(EmptySourceError, r"0 sample\(s\)", X)


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (np.ones(4), "X has 3 rows, but y has 4"),
        (np.ones(3, complex), "Complex data not supported"),
        (np.ones((3, 1, 1)), r"shape \(3, 1, 1\)"),
        (np.ones((3, 0)), r"shape \(3, 0\)"),
        (np.float64(1), r"shape \(\)"),
        (np.zeros(3, dtype=[("a", "f4")]), "records"),
    ],
)
def test_unusable_targets_are_refused(y: Any, match: str) -> None:
    refused(SchemaError, match, np.ones((3, 2)), y)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (np.ones(2), "X has 3 rows, but weight has 2"),
        (np.ones((3, 1)), r"shape \(3, 1\)"),
        (["a", "b", "c"], "weight is <U1"),
        (np.array([1, 2, "x"], dtype=object), "weight holds Python objects"),
    ],
)
def test_unusable_weights_are_refused(weight: Any, match: str) -> None:
    refused(SchemaError, match, np.ones((3, 2)), np.ones(3), weight=weight)


def test_feature_names_must_fit() -> None:
    refused(SchemaError, "2 feature names for 3 features", np.ones((2, 3)), feature_names=["a", "b"])


def test_missing_columns_are_named_with_those_there_are() -> None:
    frame = pd.DataFrame({"a": [1], "b": [2]})
    with pytest.raises(SourceNotFoundError, match=r"'price', 'w'; its columns are 'a', 'b'"):
        MemorySource.from_dataframe(frame, "price", weight="w")
    with pytest.raises(SourceNotFoundError, match="'c'"):
        MemorySource.from_dataframe(frame, "a", features=["c"])


def test_columns_cannot_be_used_twice_or_be_ambiguous() -> None:
    frame = pd.DataFrame([[1, 2, 3]], columns=["a", "b", "b"])
    with pytest.raises(OptionError, match="'a' would be used twice"):
        MemorySource.from_dataframe(frame, "a", features=["a"])
    with pytest.raises(OptionError, match="'a' would be used twice"):
        MemorySource.from_dataframe(frame, "a", features=[], weight="a")
    with pytest.raises(SchemaError, match="'b' occurs more than once"):
        MemorySource.from_dataframe(frame, "b")


def test_no_file_stays_open_behind_a_memmap_forgotten(tmp_path: Path) -> None:
    np.save(tmp_path / "X.npy", make_rows())
    source = MemorySource(np.load(tmp_path / "X.npy", mmap_mode="r"))
    read_all(source)
    assert open_files_in(tmp_path)
    del source
    assert open_files_in(tmp_path) == []


def test_targets_alone_of_a_source_without_any() -> None:
    assert list(MemorySource(np.ones((3, 1))).iter_targets()) == []
    ((first, y, weight),) = MemorySource(np.ones((3, 1)), weight=[1, 2, 3]).iter_targets()
    assert (first, plain(y), weight.tolist()) == (0, None, [1, 2, 3])
