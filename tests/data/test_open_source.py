"""`open_source`: every kind of data to its source, and what cannot be one to a message with a way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask.array as da
import dask.bag
import dask.dataframe as dd
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streamgd.data.sources import open_source, reopen
from streamgd.data.sources.files import find_files
from streamgd.errors import (
    CorruptDataError,
    DataError,
    EmptySourceError,
    OptionError,
    SchemaError,
    SourceNotFoundError,
)
from tests.data.contract import plain, read_all

N = 24
X = np.arange(N * 3, dtype=np.float32).reshape(N, 3)
Y = np.arange(N, dtype=np.float32) / 8


def hdf5(path: Path, first: int = 0, stop: int = N, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", **more) as file:
        file["X"], file["y"] = X[first:stop], Y[first:stop]
        file["other"] = -Y[first:stop]
    return path


def parquet(path: Path, first: int = 0, stop: int = N) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: X[first:stop, j] for j, name in enumerate("abc")} | {"y": Y[first:stop]}
    pq.write_table(pa.table(columns), path)
    return path


def frame() -> pd.DataFrame:
    return pd.DataFrame({name: X[:, j] for j, name in enumerate("abc")} | {"y": Y})


class TestFiles:
    @pytest.mark.parametrize("as_type", [str, Path, lambda path: [path], lambda path: (str(path),)])
    @pytest.mark.parametrize(("write", "kind"), [(hdf5, "hdf5"), (parquet, "parquet")])
    def test_content_decides_not_the_name(self, tmp_path: Path, write: Any, kind: str, as_type: Any) -> None:
        path = write(tmp_path / "data.bin")
        source = open_source(as_type(path), "y")
        assert source.kind == kind
        np.testing.assert_array_equal(read_all(source)[0], X)
        np.testing.assert_array_equal(read_all(source)[1], Y)

    @pytest.mark.parametrize(("write", "ending"), [(hdf5, "h5"), (parquet, "parquet")])
    @pytest.mark.parametrize("way", ["list", "glob", "folder", "deep glob", "glob of folders"])
    def test_several_files_are_one_source(self, tmp_path: Path, write: Any, ending: str, way: str) -> None:
        paths = [write(tmp_path / "in" / f"part-{i}.{ending}", 6 * i, 6 * i + 6) for i in range(4)]
        (tmp_path / "in" / "_notes.txt").write_text("no data")
        data = {
            "list": paths,
            "glob": str(tmp_path / "in" / "part-?.*"),
            "folder": tmp_path / "in",
            "deep glob": tmp_path / "**" / f"*.{ending}",
            "glob of folders": tmp_path / "i*",
        }[way]
        source = open_source(data, "y")
        np.testing.assert_array_equal(read_all(source)[0], X)

    def test_hdf5_after_a_user_block(self, tmp_path: Path) -> None:
        assert open_source(hdf5(tmp_path / "a.bin", userblock_size=1024)).n_rows == N

    def test_hdf5_target_is_y_if_there_is_one(self, tmp_path: Path) -> None:
        path = hdf5(tmp_path / "a.h5")
        assert open_source(path).target.name == "y"
        assert open_source(path, "other").target.name == "other"
        with h5py.File(path, "a") as file:
            del file["y"]
        assert open_source(path).target is None
        with pytest.raises(SourceNotFoundError, match="'label'"):
            open_source(path, "label")
        np.testing.assert_array_equal(read_all(open_source(path, features="X", weight="other"))[2], -Y)

    def test_parquet_columns(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet")
        assert open_source(path).feature_names == ("a", "b", "c", "y")
        assert open_source(path).target is None
        assert open_source(path, "y", features="b", weight="c").feature_names == ("b",)
        assert open_source(path, ["y", "c"]).target.n_outputs == 2

    def test_npy_files(self, tmp_path: Path) -> None:
        np.save(tmp_path / "X.npy", X)
        np.save(tmp_path / "y.npy", Y)
        for source in (
            open_source(tmp_path / "X.npy", tmp_path / "y.npy", weight=str(tmp_path / "y.npy")),
            open_source(str(tmp_path / "X.npy"), Y, weight=Y),
        ):
            found = read_all(source)
            np.testing.assert_array_equal(found[0], X)
            np.testing.assert_array_equal(found[1], Y)
            np.testing.assert_array_equal(found[2], Y)
        assert open_source(tmp_path / "X.npy").target is None
        with pytest.raises(SourceNotFoundError, match=r"target: .*y\.np'.*Did you mean .*y\.npy"):
            open_source(tmp_path / "X.npy", tmp_path / "y.np")
        np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
        with pytest.raises(CorruptDataError, match=r"o\.npy"):
            open_source(tmp_path / "o.npy")

    def test_home_and_working_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        parquet(tmp_path / "a.parquet")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert open_source("~/a.parquet").n_rows == N
        monkeypatch.chdir(tmp_path)
        source = open_source("a.parquet", "y")
        monkeypatch.chdir("/")
        assert read_all(source)[0].shape == (N, 3)
        assert reopen(source.origin).fingerprint == source.fingerprint

    def test_a_name_with_brackets_is_no_pattern(self, tmp_path: Path) -> None:
        assert open_source(parquet(tmp_path / "a[1].parquet")).n_rows == N

    @pytest.mark.parametrize("kind", ["hdf5", "hdf5 default", "parquet", "parquet folder", "parquet glob", "npy"])
    def test_origin_opens_the_same_again(self, tmp_path: Path, kind: str) -> None:
        np.save(tmp_path / "X.npy", X)
        np.save(tmp_path / "y.npy", Y)
        source = {
            "hdf5": lambda: open_source(hdf5(tmp_path / "a.h5"), "other", weight="y", dtype="float64"),
            "hdf5 default": lambda: open_source([hdf5(tmp_path / "a.h5"), hdf5(tmp_path / "b.h5")]),
            "parquet": lambda: open_source(parquet(tmp_path / "a.pq"), "y", features=["c", "a"], dtype="float64"),
            "parquet folder": lambda: open_source(parquet(tmp_path / "in" / "k=3" / "a.pq").parent.parent, "y"),
            "parquet glob": lambda: open_source(str(parquet(tmp_path / "in" / "a.pq").parent / "*.pq"), weight="y"),
            "npy": lambda: open_source(tmp_path / "X.npy", tmp_path / "y.npy", dtype="float64"),
        }[kind]()
        again = reopen(source.origin)
        assert again.fingerprint == source.fingerprint
        assert again.row_dtype == source.row_dtype
        assert again.origin == source.origin
        for found, expected in zip(read_all(again), read_all(source), strict=True):
            np.testing.assert_array_equal(found, expected)


class TestNoSource:
    def test_nothing_there(self, tmp_path: Path) -> None:
        parquet(tmp_path / "train.parquet")
        with pytest.raises(SourceNotFoundError, match=r"tain\.parquet'\. Did you mean '.*train\.parquet'"):
            open_source(tmp_path / "tain.parquet", "y")
        with pytest.raises(SourceNotFoundError, match=r"holds 'train\.parquet'"):
            open_source(tmp_path / "zzz")
        with pytest.raises(FileNotFoundError, match="no folder"):
            open_source(tmp_path / "no" / "train.parquet")

    def test_pattern_without_match(self, tmp_path: Path) -> None:
        parquet(tmp_path / "train.parquet")
        with pytest.raises(SourceNotFoundError, match=r"\*\.h5' matches no file.*holds 'train\.parquet'"):
            open_source(tmp_path / "*.h5")
        with pytest.raises(SourceNotFoundError, match="there is no folder"):
            open_source(tmp_path / "no" / "*.h5")

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(EmptySourceError, match="holds no files"):
            open_source(tmp_path)
        (tmp_path / "a.parquet").touch()
        with pytest.raises(EmptySourceError, match="holds only empty files"):
            open_source(tmp_path)

    def test_text_comes_with_the_way_to_convert_it(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        frame().to_csv(path, index=False)
        with pytest.raises(DataError) as caught:
            open_source(path, "y")
        advice = str(caught.value).split("memory:\n")[1]
        script = "\n".join(line.removeprefix("  ") for line in advice.splitlines())
        subprocess.run([sys.executable, "-c", script], check=True)  # the advice works as it stands
        np.testing.assert_array_equal(read_all(open_source(tmp_path / "rows.parquet", "y"))[0], X)

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("a.bin", b"whatever", r"first bytes are b'whatever'.*It reads HDF5"),
            ("a.bin", b"", r"it is empty \(0 bytes\)"),
            ("a.parquet.gz", b"\x1f\x8b", "unpack it first"),
            ("a.jsonl", b"{}", "looks like text"),
        ],
    )
    def test_other_formats(self, tmp_path: Path, name: str, content: bytes, words: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            open_source(tmp_path / name)

    @pytest.mark.parametrize("name", ["a.parquet", "a.h5"])
    def test_damaged_files_are_known_by_their_name(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"garbage all the way down")
        with pytest.raises(CorruptDataError, match=name.replace(".", r"\.")):
            open_source(tmp_path / name)

    def test_zarr_store(self, tmp_path: Path) -> None:
        (tmp_path / "zarr.json").write_text("{}")
        with pytest.raises(DataError, match="from_zarr"):
            open_source(tmp_path)

    def test_urls(self) -> None:
        with pytest.raises(DataError, match="local files only"):
            open_source("s3://bucket/rows.parquet", "y")

    def test_mixed_formats(self, tmp_path: Path) -> None:
        parquet(tmp_path / "a.parquet")
        hdf5(tmp_path / "b.h5")
        with pytest.raises(SchemaError, match=r"'a\.parquet' is parquet, 'b\.h5' is hdf5"):
            open_source(tmp_path, "y")

    def test_the_same_file_twice(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet")
        with pytest.raises(DataError, match="given twice"):
            open_source([path, str(tmp_path / "*.parquet")], "y")

    def test_options_that_do_not_belong(self, tmp_path: Path) -> None:
        path = hdf5(tmp_path / "a.h5")
        with pytest.raises(OptionError, match="target is a ndarray, but the data is in files"):
            open_source(path, Y)
        with pytest.raises(OptionError, match="one dataset of shape"):
            open_source(path, ["y", "other"])
        with pytest.raises(OptionError, match="names columns, but an array has none"):
            open_source(X, Y, features=["a"])
        with pytest.raises(OptionError, match="target='y' is a name"):
            open_source(X, "y")
        with pytest.raises(OptionError, match="weight='w' is a name"):
            open_source(da.from_array(X), da.from_array(Y), weight="w")

    @pytest.mark.parametrize(
        "data", [None, 3, {"a": [1]}, b"bytes", iter([1])], ids=["None", "number", "dict", "bytes", "iterator"]
    )
    def test_no_data_at_all(self, data: Any) -> None:
        with pytest.raises(DataError, match=f"cannot open a {type(data).__name__}"):
            open_source(data)

    def test_tables_of_other_libraries(self) -> None:
        with pytest.raises(DataError, match="to_pandas"):
            open_source(pa.table({"a": [1.0]}), "a")
        with pytest.raises(DataError, match="Bag"):
            open_source(dask.bag.from_sequence([1]))


class TestMemory:
    @pytest.mark.parametrize("as_type", [np.asarray, lambda array: array.tolist()])
    def test_arrays(self, as_type: Any) -> None:
        source = open_source(as_type(X), as_type(Y), weight=as_type(Y), dtype="float64")
        assert source.kind == "memory"
        assert source.row_dtype == np.float64
        np.testing.assert_array_equal(read_all(source)[0], X)
        np.testing.assert_array_equal(read_all(source)[2], Y)
        with pytest.raises(DataError, match="pass it again"):
            reopen(source.origin)

    def test_dataframes(self) -> None:
        for source in (
            open_source(frame(), "y"),
            open_source(frame(), "y", features=["a", "b", "c"]),
            open_source(frame().drop(columns="y"), Y),
            open_source(frame().drop(columns="y"), pd.Series(Y), weight=Y),
        ):
            assert source.feature_names == ("a", "b", "c")
            np.testing.assert_array_equal(read_all(source)[0], X)
            np.testing.assert_array_equal(read_all(source)[1], Y)
        assert open_source(frame(), "y", features="b", weight="a").feature_names == ("b",)
        assert open_source(frame(), ["y", "a"]).target.n_outputs == 2

    def test_dask(self) -> None:
        arrays = open_source(da.from_array(X, chunks=(5, 2)), da.from_array(Y, chunks=7))
        table = open_source(dd.from_pandas(frame(), npartitions=3), "y", features=["a", "b", "c"])
        for source in (arrays, table):
            assert source.kind == "dask"
            np.testing.assert_array_equal(read_all(source)[0], X)
            np.testing.assert_array_equal(plain(read_all(source)[1]), Y)

    def test_a_source_is_returned_as_it_is(self) -> None:
        source = open_source(X, Y)
        assert open_source(source) is source
        for options in ({"target": "y"}, {"features": ["a"]}, {"weight": Y}, {"dtype": "float64"}):
            with pytest.raises(OptionError, match="already"):
                open_source(source, **options)


class TestFindFiles:
    def test_links_and_dots_in_paths(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "in" / "a.parquet")
        (tmp_path / "link.parquet").symlink_to(path)
        assert find_files(tmp_path / "in" / ".." / "in" / "a.parquet").paths == (path,)
        assert open_source(tmp_path / "link.parquet").n_rows == N

    def test_order_is_by_name_part_by_part(self, tmp_path: Path) -> None:
        for name in ("b/1.parquet", "a-/2.parquet", "a/3.parquet", "a/x/4.parquet"):
            parquet(tmp_path / name)
        files = find_files(tmp_path)
        assert [files.relative(path) for path in files.paths] == [
            "a/3.parquet",
            "a/x/4.parquet",
            "a-/2.parquet",
            "b/1.parquet",
        ]
        assert find_files(str(tmp_path / "**" / "*.parquet")).paths == files.paths

    def test_pattern_keeps_partitions_below_it(self, tmp_path: Path) -> None:
        parquet(tmp_path / "k=1" / "a.parquet")
        for pattern in ("k=*/*.parquet", "*", "**/*.parquet"):
            source = open_source(str(tmp_path / pattern), "y")
            assert source.feature_names == ("a", "b", "c", "k")

    def test_unreadable_file(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("runs as root")
        with pytest.raises(DataError, match="permissions"):
            open_source(path)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    script = (
        "import sys, streamgd.data.sources\n"
        "heavy = {'pyarrow', 'h5py', 'dask', 'distributed', 'pandas', 'sklearn', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import numpy as np\n"
        "streamgd.data.sources.open_source(np.eye(3), np.ones(3))\n"
        "heavy = {'pyarrow', 'h5py', 'dask', 'distributed', 'pandas', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
