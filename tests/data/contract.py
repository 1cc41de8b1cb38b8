"""What every source must do: one class of tests, run over every backend.

A backend's test file inherits `SourceContract` and supplies the backend::

    class TestParquet(SourceContract):
        kind = "parquet"

        def make(self, folder, X, y, weight=None, *, n_blocks=4, dtype="auto", names=None): ...

        def reopen(self, folder): ...
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import pickle
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from streamgd.data.sources.base import Slice, Source
from streamgd.errors import OptionError, SourceNotFoundError

ODD_SIZES = (1, 3, 17, 2, 64, 5)


def dense(X: Any) -> np.ndarray:
    """Return the features of a slice as one array of shape (n_rows, n_features), copied."""
    return np.array(X) if isinstance(X, np.ndarray) else np.column_stack(list(X))


def plain(y: Any) -> Any:
    """Return a target of a slice as a NumPy array of its own, or None."""
    if y is None:
        return None
    return np.array(y) if isinstance(y, np.ndarray) else y.to_numpy(zero_copy_only=False)


def copied(piece: Slice) -> tuple[np.ndarray, Any, Any]:
    return dense(piece.X), plain(piece.y), plain(piece.weight)


def joined(pieces: list[tuple[np.ndarray, Any, Any]]) -> tuple[np.ndarray, Any, Any]:
    X, y, weight = zip(*pieces, strict=True)
    return (
        np.concatenate(X),
        None if y[0] is None else np.concatenate(y),
        None if weight[0] is None else np.concatenate(weight),
    )


def read_block(source: Source, block: int, start: int = 0, sizes: tuple[int, ...] = ODD_SIZES) -> tuple[Any, Any, Any]:
    """Read a block from `start` to its end in slices of the given sizes, over and over."""
    left, pieces = int(source.block_rows[block]) - start, []
    with source.open_block(block, start, piece_rows=max(sizes)) as reader:
        while left:
            n = min(sizes[len(pieces) % len(sizes)], left)
            pieces.append(copied(reader.read(n)))
            left -= n
    return joined(pieces)


def read_all(source: Source, sizes: tuple[int, ...] = ODD_SIZES) -> tuple[Any, Any, Any]:
    """Read every block in file order."""
    return joined([read_block(source, block, sizes=sizes) for block in range(source.n_blocks)])


def assert_same_bits(found: Any, expected: Any) -> None:
    """Compare two arrays, or Nones, to the bit (values only: a backend may hand bools out as integers)."""
    if expected is None or found is None:
        assert found is None
        assert expected is None
    else:
        np.testing.assert_array_equal(found, expected)


def make_rows(n_rows: int = 997, n_features: int = 5, seed: int = 7, dtype: str = "float32") -> np.ndarray:
    """Generate features that the dtype can hold, distinct enough that rows cannot be confused."""
    generator = np.random.default_rng(seed)
    if dtype == "bool":
        return generator.integers(0, 2, (n_rows, n_features)).astype(bool)
    if np.dtype(dtype).kind in "iu":
        bounds = np.iinfo(dtype)
        return generator.integers(bounds.min, bounds.max, (n_rows, n_features), dtype=dtype)
    return generator.standard_normal((n_rows, n_features)).astype(dtype)


def make_target(n_rows: int = 997) -> np.ndarray:
    """Generate a target that counts the rows, so that a swap shows."""
    return np.arange(n_rows, dtype=np.float64) / 4


def open_files_in(folder: Path) -> list[str]:
    """List the descriptors of this process that point below `folder`."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            path = str(descriptor.readlink())
        except OSError:  # closed meanwhile: the listing's own descriptor, at least
            continue
        if path.startswith(str(folder)):
            found.append(path)
    return found


def bytes_read() -> int:
    """Bytes this process has asked the system to read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def put_rows(source: Source, pipe: Any) -> None:
    """Run in a forked child: read everything and send it back."""
    pipe.send(read_all(source))
    pipe.close()


class SourceContract:
    """The promises of `Source`, as tests.

    A backend sets `kind` and the flags below, and supplies `make` (and `reopen` where it reads files).

    Attributes
    ----------
    kind : str
        The source's ``kind``.
    in_files : bool
        Whether it reads files, all below the folder given to `make`; if so `reopen` must be there.
    named_features : bool
        Whether ``names`` given to `make` come back as ``feature_names`` and count in the fingerprint.
    keeps_feature_dtype : bool
        Whether ``feature_dtypes`` are the names of the NumPy dtypes given to `make`.
    matrix_targets : bool
        Whether the backend can hold a target of shape (n_rows, n_outputs).
    forks : bool
        Whether a forked child may read from the parent's source (not where the backend itself keeps threads).
    """

    kind: ClassVar[str]
    in_files: ClassVar[bool] = True
    named_features: ClassVar[bool] = True
    keeps_feature_dtype: ClassVar[bool] = True
    matrix_targets: ClassVar[bool] = True
    forks: ClassVar[bool] = True

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
        """Store the rows in `folder`, which exists and is empty, and return a source of them.

        Parameters
        ----------
        folder : Path
            Where files go, and nowhere else.
        X : ndarray of shape (n_rows, n_features)
            Stored in its own dtype.
        y : ndarray of shape (n_rows,) or (n_rows, n_outputs), or None
            Numbers, booleans, strings (``U`` dtype) or None. 2-D only if `matrix_targets`.
        weight : ndarray of shape (n_rows,) or None
            Sample weights.
        n_blocks : int
            About so many blocks; at least two if it is two or more.
        dtype : str
            Handed on to the source.
        names : tuple of str or None
            Names of the features, where the backend can name them; None leaves them to the backend.
        """
        raise NotImplementedError

    def reopen(self, folder: Path) -> Source:
        """Open what `make` stored in `folder` without weights, names or dtype, from its metadata alone."""
        raise NotImplementedError

    @pytest.fixture
    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return make_rows(), make_target(), np.linspace(0.5, 2.0, 997)

    # Metadata

    def test_metadata_describes_the_table(self, tmp_path: Path, rows: Any) -> None:
        X, y, weight = rows
        source = self.make(tmp_path, X, y, weight)
        assert source.kind == self.kind
        assert source.name
        assert source.n_rows == len(X)
        assert source.n_blocks == len(source.block_rows) >= 2
        assert source.block_rows.dtype == np.int64
        assert source.block_rows.sum() == len(X)
        assert source.block_rows.min() >= 1
        assert source.n_features == X.shape[1] == len(source.feature_dtypes)
        assert source.feature_names is None or len(source.feature_names) == X.shape[1]
        assert source.row_dtype == np.float32
        assert source.has_weight
        assert source.stored_bytes > 0
        assert source.open_block_bytes >= 0
        assert source.target is not None
        assert source.target.numeric
        assert source.target.is_vector
        assert source.target.n_outputs == 1
        assert f"{len(X):,} rows" in repr(source)
        assert source.feature_label(2)

    def test_fingerprint_and_origin_are_json(self, tmp_path: Path, rows: Any) -> None:
        source = self.make(tmp_path, *rows)
        assert json.loads(json.dumps(source.fingerprint)) == source.fingerprint
        assert json.loads(json.dumps(source.origin)) == source.origin

    def test_opening_reads_no_rows(self, tmp_path: Path) -> None:
        if not self.in_files:
            pytest.skip("not in files")
        if not sys.platform.startswith("linux"):
            pytest.skip("counts bytes in /proc")
        X = make_rows(60_000, 24)
        self.make(tmp_path, X, make_target(len(X)), n_blocks=6).close()
        self.reopen(tmp_path).close()  # what is imported on first use is no reading of rows
        before = bytes_read()
        source = self.reopen(tmp_path)
        assert source.n_rows == len(X)
        assert bytes_read() - before < X.nbytes / 8
        source.close()

    def test_feature_names_come_back(self, tmp_path: Path, rows: Any) -> None:
        if not self.named_features:
            pytest.skip("features have no names")
        names = ("age", "Größe", "c 3", "d.e", "f")
        source = self.make(tmp_path, *rows, names=names)
        assert source.feature_names == names
        assert "Größe" in source.feature_label(1)

    # Rows

    @pytest.mark.parametrize("sizes", [ODD_SIZES, (1,), (997,), (128, 1)])
    def test_slices_reassemble_the_table(self, tmp_path: Path, rows: Any, sizes: tuple[int, ...]) -> None:
        source = self.make(tmp_path, *rows)
        for found, expected in zip(read_all(source, sizes), rows, strict=True):
            assert_same_bits(found, expected)

    def test_slices_have_the_promised_form(self, tmp_path: Path, rows: Any) -> None:
        source = self.make(tmp_path, *rows)
        with source.open_block(0) as reader:
            piece = reader.read(7)
        if isinstance(piece.X, np.ndarray):
            assert piece.X.shape == (7, source.n_features)
            columns = [piece.X]
        else:
            assert len(piece.X) == source.n_features
            assert all(column.shape == (7,) for column in piece.X)
            columns = list(piece.X)
        assert piece.weight is not None
        assert len(piece.y) == len(piece.weight) == 7
        for array in (*columns, piece.weight):
            assert array.dtype.kind in "fiub"
            assert array.dtype.isnative

    def test_blocks_can_be_read_from_any_row(self, tmp_path: Path, rows: Any) -> None:
        source = self.make(tmp_path, *rows)
        first = np.concatenate([[0], np.cumsum(source.block_rows)])
        ends = source.block_rows - 1  # the last block may have a row only
        for block, start in [(0, 1), (1, int(ends[1])), (source.n_blocks - 1, min(11, int(ends[-1])))]:
            end = first[block + 1]
            for found, stored in zip(read_block(source, block, start), rows, strict=True):
                assert_same_bits(found, stored[first[block] + start : end])

    def test_blocks_can_be_read_in_any_order(self, tmp_path: Path, rows: Any) -> None:
        source = self.make(tmp_path, *rows)
        blocks = list(reversed(range(source.n_blocks)))
        found = {block: read_block(source, block) for block in blocks}
        for part, stored in zip(joined([found[b] for b in sorted(found)]), rows, strict=True):
            assert_same_bits(part, stored)

    def test_open_readers_do_not_disturb_each_other(self, tmp_path: Path, rows: Any) -> None:
        X, y, _ = rows
        source = self.make(tmp_path, *rows)
        first = np.concatenate([[0], np.cumsum(source.block_rows)])
        blocks = [0, 1, 1, int(np.argmax(source.block_rows))]  # one of them opened twice
        readers = [source.open_block(block) for block in blocks]
        for step in range(4):
            held = [reader.read(5) for reader in readers]  # all valid at once, until each reader reads on
            for block, piece in zip(blocks, held, strict=True):
                at = first[block] + 5 * step
                assert_same_bits(dense(piece.X), X[at : at + 5])
                assert_same_bits(plain(piece.y), y[at : at + 5])
        for reader in readers:
            reader.close()
            reader.close()

    def test_threads_may_read_at_once(self, tmp_path: Path, rows: Any) -> None:
        source = self.make(tmp_path, *rows)
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                parts = list(pool.map(lambda block: read_block(source, block), range(source.n_blocks)))
                for found, expected in zip(joined(parts), rows, strict=True):
                    assert_same_bits(found, expected)

    def test_reader_may_move_between_threads(self, tmp_path: Path, rows: Any) -> None:
        source = self.make(tmp_path, *rows)
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            reader = one.submit(source.open_block, 1).result()
            pieces = [copied(pool.submit(reader.read, 9).result()) for pool in (one, other, one)]
            other.submit(reader.close).result()
        first = int(source.block_rows[0])
        for found, expected in zip(joined(pieces), rows, strict=True):
            assert_same_bits(found, expected[first : first + 27])

    def test_same_rows_have_the_same_bits_twice(self, tmp_path: Path, rows: Any) -> None:
        X, y, weight = rows
        X[5, 1], X[400, 2], X[996, 4] = np.nan, -0.0, np.inf  # a source passes on what it finds; others judge
        source = self.make(tmp_path, X, y, weight)
        once, again = read_all(source), read_all(source, (31,))
        for found, expected in zip(once, again, strict=True):
            assert found.tobytes() == expected.tobytes()
        assert once[0].tobytes() == X.tobytes()

    def test_iter_targets_reads_the_same_targets(self, tmp_path: Path, rows: Any) -> None:
        _, y, weight = rows
        source = self.make(tmp_path, *rows)
        expected_first, pieces = 0, []
        for first, some_y, some_weight in source.iter_targets():
            assert first == expected_first
            pieces.append((np.empty(0), plain(some_y), plain(some_weight)))
            expected_first += len(some_y)
        assert expected_first == source.n_rows
        _, found_y, found_weight = joined(pieces)
        assert_same_bits(found_y, y)
        assert_same_bits(found_weight, weight)

    @pytest.mark.parametrize(
        ("start", "stop"), [(0, 1), (0, 500), (499, 501), (996, 997), (3, 990), (500, None), (7, 7)]
    )
    def test_iter_targets_reads_some_rows(self, tmp_path: Path, rows: Any, start: int, stop: int | None) -> None:
        _, y, weight = rows
        source = self.make(tmp_path, *rows)
        found_y, found_weight, at = [y[:0]], [weight[:0]], start
        for first, some_y, some_weight in source.iter_targets(start, stop):
            assert first == at
            found_y.append(plain(some_y))
            found_weight.append(plain(some_weight))
            at += len(some_y)
        assert at == (source.n_rows if stop is None else stop)
        assert_same_bits(np.concatenate(found_y), y[start:stop])
        assert_same_bits(np.concatenate(found_weight), weight[start:stop])

    # Types

    @pytest.mark.parametrize("stored", ["float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"])
    def test_feature_types_keep_their_values(self, tmp_path: Path, stored: str) -> None:
        X = make_rows(dtype=stored)
        source = self.make(tmp_path, X, make_target())
        if self.keeps_feature_dtype:
            assert set(source.feature_dtypes) == {stored}
        expected = np.float64 if stored in ("float64", "int32", "int64") else np.float32
        assert source.row_dtype == expected
        assert_same_bits(read_all(source)[0], X)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("stored", ["float32", "float64", "int64"])
    def test_row_dtype_can_be_chosen(self, tmp_path: Path, stored: str, dtype: str) -> None:
        X = make_rows(dtype=stored)
        source = self.make(tmp_path, X, make_target(), dtype=dtype)
        assert source.row_dtype == np.dtype(dtype)
        assert_same_bits(read_all(source)[0], X)  # rows are handed out as stored; the window casts

    def test_unknown_row_dtype_is_refused(self, tmp_path: Path, rows: Any) -> None:
        X, y, _ = rows
        with pytest.raises(OptionError, match="float16"):
            self.make(tmp_path, X, y, dtype="float16")

    @pytest.mark.parametrize("kind", ["float32", "int64", "bool", "string"])
    def test_targets_of_any_type(self, tmp_path: Path, kind: str) -> None:
        X, y = make_rows(), np.arange(997) % 5
        y = np.array(["no", "yes", "maybe", "ja", "Ägypten"])[y] if kind == "string" else y.astype(kind)
        source = self.make(tmp_path, X, y)
        assert source.target is not None
        assert source.target.numeric == (kind != "string")
        assert not source.has_weight
        _, found, weight = read_all(source)
        assert_same_bits(found, y)
        assert weight is None
        assert_same_bits(np.concatenate([plain(part) for _, part, _ in source.iter_targets()]), y)

    @pytest.mark.parametrize("n_outputs", [1, 3])
    def test_targets_with_several_outputs(self, tmp_path: Path, n_outputs: int) -> None:
        if not self.matrix_targets:
            pytest.skip("targets are single columns")
        y = make_rows(997, n_outputs, seed=8, dtype="float64")
        source = self.make(tmp_path, make_rows(), y)
        assert source.target is not None
        assert source.target.n_outputs == n_outputs
        assert not source.target.is_vector
        assert_same_bits(read_all(source)[1], y)
        assert_same_bits(np.concatenate([part for _, part, _ in source.iter_targets()]), y)

    def test_target_can_be_absent(self, tmp_path: Path) -> None:
        X = make_rows()
        source = self.make(tmp_path, X, None)
        assert source.target is None
        found, y, weight = read_all(source)
        assert_same_bits(found, X)
        assert y is None
        assert weight is None

    # Identity

    def test_fingerprint_follows_the_data_not_the_place(self, tmp_path: Path, rows: Any) -> None:
        (here := tmp_path / "here").mkdir()
        (there := tmp_path / "else" / "where").mkdir(parents=True)
        X, y, _ = rows
        source = self.make(here, X, y)
        if not self.in_files:
            assert self.make(there, X.copy(), y.copy()).fingerprint == source.fingerprint
            return
        shutil.copytree(here, there, dirs_exist_ok=True, copy_function=shutil.copyfile)  # times are not kept
        assert self.reopen(there).fingerprint == source.fingerprint
        here.rename(tmp_path / "moved")
        assert self.reopen(tmp_path / "moved").fingerprint == source.fingerprint

    @pytest.mark.parametrize("change", ["value", "target", "rows", "dtype", "features", "names", "target dtype"])
    def test_fingerprint_sees_a_change(self, tmp_path: Path, rows: Any, change: str) -> None:
        if change == "names" and not self.named_features:
            pytest.skip("features have no names")
        X, y, _ = rows
        names, other_names = ("a", "b", "c", "d", "e"), ("a", "b", "c", "d", "e")
        other_X, other_y = X.copy(), y.copy()
        match change:
            case "value":
                other_X[0, 0] = 1e6  # a new maximum, which statistics in a footer see too
            case "target":
                other_y[-1] = 1e6
            case "rows":
                other_X, other_y = X[:-1], y[:-1]
            case "dtype":
                other_X = X.astype(np.float64)
            case "target dtype":
                other_y = y.astype(np.float32)
            case "features":
                other_X, other_names = X[:, :-1], names[:-1]
            case "names":
                other_names = ("a", "b", "c", "d", "E")
        (first := tmp_path / "1").mkdir()
        (second := tmp_path / "2").mkdir()
        source = self.make(first, X, y, names=names if self.named_features else None)
        other = self.make(second, other_X, other_y, names=other_names if self.named_features else None)
        assert source.fingerprint != other.fingerprint

    def test_stamp_is_that_of_the_same_data_and_of_no_other(self, tmp_path: Path, rows: Any) -> None:
        X, y, _ = rows
        (here := tmp_path / "here").mkdir()
        source = self.make(here, X, y)
        stamp = source.stamp()
        assert stamp
        assert json.loads(json.dumps(stamp)) == stamp
        source.close()
        again = self.reopen(here) if self.in_files else self.make(here, X.copy(), y.copy())
        assert again.stamp() == stamp
        again.close()
        del source, again
        gc.collect()
        if self.in_files:
            shutil.copytree(here, tmp_path / "there")
            there = self.reopen(tmp_path / "there").stamp()
            assert there.keys() != stamp.keys()
            assert all(there[name] == stamp[name] for name in there.keys() & stamp.keys())
        shutil.rmtree(here)
        here.mkdir()
        middle = y.copy()
        middle[len(y) // 2] += 1e-3
        changed = self.make(here, X, middle).stamp()
        assert changed.keys() == stamp.keys()
        assert changed != stamp

    def test_locate_names_file_and_row(self, tmp_path: Path, rows: Any) -> None:
        source = self.make(tmp_path, *rows)
        places = {source.locate(block, row) for block in range(source.n_blocks) for row in (0, 3)}
        assert len(places) == 2 * source.n_blocks
        place = source.locate(1, 3)
        if self.in_files:
            names = [path.name for path in tmp_path.rglob("*") if path.is_file()]
            assert any(name in place for name in names)
        assert any(character.isdigit() for character in place)

    # Life cycle

    def test_source_survives_pickling(self, tmp_path: Path, rows: Any) -> None:
        source = self.make(tmp_path, *rows)
        unread = pickle.loads(pickle.dumps(source))
        open_reader = source.open_block(0)
        open_reader.read(3)
        used = pickle.loads(pickle.dumps(source))  # while files are open: they stay behind
        open_reader.close()
        source.close()
        for other in (unread, used):
            assert other.fingerprint == source.fingerprint
            assert other.row_dtype == source.row_dtype
            assert other.target == source.target
            np.testing.assert_array_equal(other.block_rows, source.block_rows)
            for found, expected in zip(read_all(other), rows, strict=True):
                assert_same_bits(found, expected)
            other.close()

    def test_forked_child_reads_for_itself(self, tmp_path: Path, rows: Any) -> None:
        if not (self.forks and sys.platform.startswith("linux")):
            pytest.skip("forks only where that is safe")
        source = self.make(tmp_path, *rows)
        reader = source.open_block(0)
        reader.read(3)
        here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=put_rows, args=(source, there))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: the process may have threads
            child.start()
        there.close()
        assert here.poll(60)
        for found, expected in zip(here.recv(), rows, strict=True):
            assert_same_bits(found, expected)
        child.join()
        here.close()
        assert_same_bits(dense(reader.read(4).X), rows[0][3:7])
        reader.close()

    def test_closed_source_can_be_used_again(self, tmp_path: Path, rows: Any) -> None:
        source = self.make(tmp_path, *rows)
        read_block(source, 0)
        source.close()
        source.close()
        for found, expected in zip(read_all(source), rows, strict=True):
            assert_same_bits(found, expected)

    def test_no_file_stays_open(self, tmp_path: Path, rows: Any) -> None:
        if not Path("/proc/self/fd").exists():
            pytest.skip("lists descriptors in /proc")
        source = self.make(tmp_path, *rows)
        read_all(source)
        list(source.iter_targets())
        with source.open_block(0) as reader:
            reader.read(1)
        pieces = source.iter_targets()
        next(pieces)  # left half-way
        pieces.close()
        source.close()
        assert open_files_in(tmp_path) == []

    def test_vanished_file_is_named(self, tmp_path: Path, rows: Any) -> None:
        if not self.in_files:
            pytest.skip("not in files")
        source = self.make(tmp_path, *rows)
        source.close()
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        for path in files:
            path.unlink()
        with pytest.raises(SourceNotFoundError, match=files[0].suffix), source.open_block(0) as reader:
            reader.read(1)
