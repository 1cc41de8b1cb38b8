"""Dask: the contract of all sources, and what only lazy, clustered, partitioned data can do to one."""

from __future__ import annotations

import gc
import logging
import pickle
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import dask
import dask.array as da
import dask.dataframe as dd
import h5py
import numpy as np
import pandas as pd
import pytest
from distributed import Client, futures_of, get_client
from scipy import sparse

from streamgd import SGDRegressor
from streamgd.data.sources import dask as dask_module
from streamgd.data.sources import dask_blocks, dask_shown
from streamgd.data.sources.base import Source
from streamgd.data.sources.dask import DaskSource
from streamgd.data.sources.dask_clients import computing_on
from streamgd.data.sources.neighbours import UnreachableError
from streamgd.errors import DataError, EmptySourceError, SchemaError, SourceNotFoundError, UnfitWorkerError
from streamgd.run import members
from streamgd.run.in_place import InPlace
from tests.clustering import cluster
from tests.data.contract import SourceContract, make_rows, make_target, plain, read_all, read_block


def blocks_of(array: np.ndarray, n_blocks: int) -> da.Array:
    return da.from_array(array, chunks=(-(-len(array) // n_blocks), *array.shape[1:]))


class TestDaskContract(SourceContract):
    kind = "dask"
    in_files = False
    named_features = False

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
        lazy_X = da.from_array(X, chunks=(-(-len(X) // n_blocks), 2))  # cut between columns too
        lazy_y = None if y is None else blocks_of(y, n_blocks + 1)  # and the target elsewhere
        lazy_weight = None if weight is None else blocks_of(weight, n_blocks)
        return DaskSource(lazy_X, lazy_y, weight=lazy_weight, dtype=dtype)


class TestDaskDataFrameContract(SourceContract):
    kind = "dask"
    in_files = False

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
        frame = pd.DataFrame(X, columns=list(names or (f"x{j}" for j in range(X.shape[1]))))
        target: Any = None
        if y is not None and y.ndim == 1:
            target, frame["y"] = "y", y
        elif y is not None:
            target = [f"y{j}" for j in range(y.shape[1])]
            for j, name in enumerate(target):
                frame[name] = y[:, j]
        if weight is not None:
            frame["weight"] = weight
        lazy = dd.from_pandas(frame, npartitions=n_blocks)
        return DaskSource.from_dataframe(lazy, target, weight=None if weight is None else "weight", dtype=dtype)


def lazy(n: int = 40, n_blocks: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, da.Array, da.Array]:
    X, y = make_rows(n, 3, seed=seed), make_target(n)
    return X, y, blocks_of(X, n_blocks), blocks_of(y, n_blocks)


class Notes(list[Any]):
    """A list that tasks of a cluster in this process share, though they are pickled."""

    kept: ClassVar[dict[int, Notes]] = {}

    def __reduce__(self) -> Any:
        self.kept[id(self)] = self
        return find_notes, (id(self),)


def find_notes(number: int) -> Notes:
    return Notes.kept[number]


def noting(array: da.Array, notes: Notes, note: Any = lambda info: info[None]["chunk-location"][0]) -> da.Array:
    """Note the number of each block that is computed."""

    def pass_on(block: np.ndarray, block_info: Any = None) -> np.ndarray:
        notes.append(note(block_info))
        return block

    return array.map_blocks(pass_on, dtype=array.dtype, meta=np.empty((0,) * array.ndim, array.dtype))


class TestArrays:
    def test_unknown_lengths_are_measured_with_a_message(self, caplog: pytest.LogCaptureFixture) -> None:
        X, y, lazy_X, lazy_y = lazy()
        keep = lazy_y % 1 == 0
        unknown_X, unknown_y = lazy_X[keep], lazy_y[keep]
        with caplog.at_level(logging.INFO, logger="streamgd"):
            source = DaskSource(unknown_X, unknown_y)
        assert "unknown length: measuring all 4" in caplog.text
        assert np.isnan(unknown_X.shape[0])  # the caller's array is left as it is
        kept = y % 1 == 0
        found_X, found_y, _ = read_all(source)
        np.testing.assert_array_equal(found_X, X[kept])
        np.testing.assert_array_equal(found_y, y[kept])

    def test_known_lengths_compute_nothing(self) -> None:
        _, _, lazy_X, lazy_y = lazy()
        notes = Notes()
        DaskSource(noting(lazy_X, notes), lazy_y)
        assert notes == []

    def test_blocks_without_rows_are_passed_over(self) -> None:
        X, y, _, _ = lazy()
        chunks = (0, 7, 0, 0, 33, 0)
        source = DaskSource(da.from_array(X, chunks=(chunks, 3)), da.from_array(y, chunks=40))
        assert source.block_rows.tolist() == [7, 33]
        np.testing.assert_array_equal(read_all(source)[0], X)
        assert source.locate(1, 2) == "Dask block 4, row 2 of it (row 9 of all, counted from 0)"

    def test_no_rows(self) -> None:
        _, _, lazy_X, lazy_y = lazy()
        with pytest.raises(EmptySourceError):
            DaskSource(lazy_X[:0], lazy_y[:0])
        with pytest.raises(EmptySourceError):
            DaskSource(lazy_X[lazy_y < 0], lazy_y[lazy_y < 0])

    def test_row_counts_must_agree(self) -> None:
        _, _, lazy_X, lazy_y = lazy()
        with pytest.raises(SchemaError, match="X has 40 rows, but y has 39"):
            DaskSource(lazy_X, lazy_y[1:])
        with pytest.raises(SchemaError, match="weight has 38"):
            DaskSource(lazy_X, lazy_y, weight=lazy_y[2:])

    def test_arrays_that_are_not_dask_may_be_target(self) -> None:
        _, y, lazy_X, _ = lazy()
        source = DaskSource(lazy_X, y, weight=list(range(40)))
        np.testing.assert_array_equal(read_all(source)[1], y)
        np.testing.assert_array_equal(read_all(source)[2], np.arange(40))

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda X: X[:, 0], r"Expected 2D array.*X\[:, None\]"),
            (lambda X: X[:, :, None], "got 3D"),
            (lambda X: X.astype("datetime64[s]"), "datetime64"),
            (lambda X: X.astype(complex), "Complex"),
            (lambda X: X[:, X[0] > 99], "number of columns"),
            (lambda X: X.map_blocks(sparse.csr_array, meta=sparse.csr_array((0, 0))), "csr_array.*toarray"),
        ],
        ids=["vector", "cube", "dates", "complex", "unknown columns", "sparse"],
    )
    def test_what_cannot_be_features(self, make: Any, words: str) -> None:
        with pytest.raises(SchemaError, match=words):
            DaskSource(make(lazy()[2]))

    def test_failing_block_is_named_and_keeps_its_cause(self) -> None:
        _, _, lazy_X, lazy_y = lazy()

        def fail(block: np.ndarray, block_info: Any = None) -> np.ndarray:
            if block_info[None]["chunk-location"][0] == 2:
                raise OSError("disk on fire")
            return block

        source = DaskSource(lazy_X.map_blocks(fail, dtype="f4", meta=np.empty((0, 0), "f4")), lazy_y)
        read_block(source, 1)
        with pytest.raises(DataError, match="Dask block 2 cannot be computed: OSError: disk on fire") as caught:
            source.open_block(2)
        assert isinstance(caught.value.__cause__, OSError)

    def test_vanished_file_of_a_block(self, tmp_path: Path) -> None:
        np.save(tmp_path / "0.npy", np.ones((5, 2)))
        lazy_X = da.from_delayed(dask.delayed(np.load)(tmp_path / "0.npy"), (5, 2), dtype=float)
        source = DaskSource(lazy_X)
        (tmp_path / "0.npy").unlink()
        with pytest.raises(SourceNotFoundError, match=r"Dask block 0.*0\.npy"):
            source.open_block(0)

    @pytest.mark.parametrize(
        ("block", "words"),
        [
            (np.ones((3, 3)), r"shape \(3, 3\) where \(5, 3\)"),
            (np.ones((5, 2)), r"\(5, 2\) where \(5, 3\)"),
            (np.array([["a"] * 3] * 5), "not what its collection promised"),
        ],
        ids=["rows", "columns", "type"],
    )
    def test_block_that_is_not_as_promised(self, block: np.ndarray, words: str) -> None:
        source = DaskSource(da.from_delayed(dask.delayed(lambda: block)(), (5, 3), dtype=float))
        with pytest.raises(SchemaError, match=words):
            source.open_block(0)

    def test_target_pass_computes_no_features(self) -> None:
        _, y, lazy_X, lazy_y = lazy()
        notes = Notes()
        source = DaskSource(noting(lazy_X, notes), lazy_y)
        np.testing.assert_array_equal(np.concatenate([part for _, part, _ in source.iter_targets()]), y)
        assert notes == []

    def test_an_epoch_computes_every_block_once(self) -> None:
        _, _, lazy_X, lazy_y = lazy()
        notes = Notes()
        noted = noting(lazy_X, notes)
        read_all(DaskSource(noted, noted.sum(axis=1) + lazy_y))  # the target is made from the features
        assert sorted(notes) == [0, 1, 2, 3]

    def test_a_closed_block_is_dropped(self) -> None:
        source = DaskSource(lazy()[2] + 1)
        reader = source.open_block(0)
        held = weakref.ref(reader.read(3).X.base)
        reader.close()
        gc.collect()
        assert held() is None
        with pytest.raises(ValueError, match="closed"):
            reader.read(1)

    def test_blocks_out_of_hdf5(self, tmp_path: Path) -> None:
        X, y, _, _ = lazy(400)
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["X"], file["y"] = X, y
        with h5py.File(tmp_path / "a.h5") as file:
            source = DaskSource(da.from_array(file["X"], chunks=(50, 2)), da.from_array(file["y"], chunks=50))
            with ThreadPoolExecutor(4) as pool:
                parts = list(pool.map(lambda block: read_block(source, block)[0], range(8)))
            source.close()
        np.testing.assert_array_equal(np.concatenate(parts), X)

    def test_cost_counts_whole_blocks(self) -> None:
        lazy_X, lazy_y = da.zeros((100, 5), chunks=(30, 5)), da.zeros(100, chunks=30)
        source = DaskSource(lazy_X, lazy_y)
        assert source.holds_block
        assert source.open_block_bytes == 30 * 6 * 8
        assert source.stored_bytes == 100 * 6 * 8
        joined = DaskSource(lazy_X.rechunk((30, 2)), lazy_y)
        assert joined.open_block_bytes == 2 * 30 * 6 * 8

    def test_hint_where_blocks_are_big(self) -> None:
        assert DaskSource(*lazy()[2:]).mixing_hint() is None
        big = DaskSource(da.zeros((1_000_000, 8), chunks=(500_000, 8)))
        assert "X.rechunk((65536, -1))" in str(big.mixing_hint())

    def test_fingerprint_does_not_depend_on_keys(self) -> None:
        X, y, _, _ = lazy()
        one, other = (DaskSource(da.from_array(X, chunks=(10, 3), name=False), y) for _ in range(2))
        assert one.fingerprint == other.fingerprint
        assert DaskSource(da.from_array(X, chunks=(20, 3)), y).fingerprint != one.fingerprint

    def test_string_targets(self) -> None:
        labels = np.array(["u", "vw"])[np.arange(40) % 2]
        for array in (labels, labels.astype(object)):
            source = DaskSource(lazy()[2], da.from_array(array, chunks=10))
            assert not source.target.numeric
            assert plain(read_all(source)[1]).tolist() == labels.tolist()
            assert source.fingerprint == DaskSource(lazy()[2], da.from_array(array.copy(), chunks=10)).fingerprint


class TestDataFrames:
    def frame(self) -> pd.DataFrame:
        n = 30
        return pd.DataFrame(
            {
                "a": np.arange(n, dtype=np.int32),
                "flag": np.arange(n) % 2 == 0,
                "b": pd.array(np.arange(n) / 4, dtype="Float64"),
                "label": np.array(["u", "v"])[np.arange(n) % 2],
                "kind": pd.Categorical(np.array(["p", "q", "r"])[np.arange(n) % 3]),
                "day": pd.date_range("2020-01-01", periods=n),
                "w": np.linspace(1, 2, n),
            }
        )

    def test_all_unusable_columns_are_named(self) -> None:
        table = dd.from_pandas(self.frame(), npartitions=3)
        with pytest.raises(SchemaError) as caught:
            DaskSource.from_dataframe(table, "w")
        for name in ("label", "kind", "day"):
            assert f"'{name}' (" in str(caught.value)
        assert "'flag'" not in str(caught.value)

    @pytest.mark.parametrize("target", ["label", "kind", "day", "flag"])
    def test_targets_with_classes(self, target: str) -> None:
        frame = self.frame()
        features = ["b", "a"]
        source = DaskSource.from_dataframe(dd.from_pandas(frame, npartitions=3), target, features, "w")
        assert source.feature_names == ("b", "a")
        assert source.target.numeric == (target == "flag")
        X, y, weight = read_all(source)
        np.testing.assert_array_equal(X, frame[features].to_numpy(float))
        assert list(y) == list(frame[target].to_numpy())
        np.testing.assert_array_equal(weight, frame["w"])
        pieces = [plain(part) for _, part, _ in source.iter_targets()]
        assert list(np.concatenate(pieces)) == list(frame[target].to_numpy())

    def test_missing_column(self) -> None:
        table = dd.from_pandas(self.frame(), npartitions=3)
        with pytest.raises(SourceNotFoundError, match="'z'"):
            DaskSource.from_dataframe(table, "z", ["a"])

    def test_partitions_without_rows(self) -> None:
        table = dd.from_pandas(self.frame(), npartitions=3)
        source = DaskSource.from_dataframe(table[table.a >= 10], "w", ["a"])
        assert source.block_rows.tolist() == [10, 10]
        np.testing.assert_array_equal(read_all(source)[0][:, 0], np.arange(10, 30))

    @pytest.mark.parametrize("kind", ["series", "array", "numpy"])
    def test_targets_beside_the_frame(self, kind: str) -> None:
        frame = self.frame()
        table = dd.from_pandas(frame[["a", "b"]], npartitions=3)
        y = {"series": dd.from_pandas(frame["w"], npartitions=3), "array": da.from_array(frame["w"].to_numpy(), 7)}.get(
            kind, frame["w"].to_numpy()
        )
        source = DaskSource.from_dataframe(table, y)
        assert source.n_features == 2
        np.testing.assert_array_equal(read_all(source)[1], frame["w"])
        np.testing.assert_array_equal(np.concatenate([part for _, part, _ in source.iter_targets()]), frame["w"])

    @pytest.mark.filterwarnings("ignore:The inplace keyword")  # between Dask and pandas
    def test_parquet_through_dask(self, tmp_path: Path) -> None:
        frame = self.frame()[["a", "w"]]
        for part in range(3):
            frame.iloc[part * 10 : part * 10 + 10].to_parquet(tmp_path / f"{part}.parquet", index=False)
        source = DaskSource.from_dataframe(dd.read_parquet(tmp_path), "w")
        np.testing.assert_array_equal(read_all(source)[1], frame["w"])


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        dask.config.set({"distributed.worker.profile.enabled": False}),
        Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0") as client,
    ):
        yield client


def eventually(condition: Any, timeout_s: float = 5) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


class TestWithoutClient:
    def test_blocks_are_computed_by_the_caller(self) -> None:
        notes = Notes()
        lazy_X = noting(lazy()[2], notes, lambda _: threading.get_ident())
        source = DaskSource(lazy_X)
        source.announce([0, 1, 2])
        assert notes == []
        read_block(source, 0)
        assert notes == [threading.get_ident()]


class TestWithClient:
    def test_blocks_are_computed_on_the_client(self, client: Client) -> None:
        X, y, lazy_X, lazy_y = lazy()
        notes = Notes()
        source = DaskSource(noting(lazy_X, notes, lambda _: threading.get_ident()), lazy_y)
        found_X, found_y, _ = read_all(source)
        np.testing.assert_array_equal(found_X, X)
        np.testing.assert_array_equal(found_y, y)
        assert len(notes) == 4
        assert threading.get_ident() not in notes
        np.testing.assert_array_equal(np.concatenate([part for _, part, _ in source.iter_targets()]), y)

    def test_a_bounded_number_is_computed_ahead(self, client: Client) -> None:
        _, _, lazy_X, lazy_y = lazy(200, 20, seed=1)
        notes = Notes()
        source = DaskSource(noting(lazy_X, notes), lazy_y)
        readers = [source.open_block(block) for block in range(3)]
        source.announce(range(3, 20))
        assert eventually(lambda: sorted(notes) == list(range(9)))  # three are open: six ahead
        time.sleep(0.05)
        assert sorted(notes) == list(range(9))
        readers.append(source.open_block(3))
        assert notes.count(3) == 1  # it was there
        for reader in readers:
            reader.close()
        source.close()
        assert eventually(lambda: not client.futures)  # nothing stays on the workers

    def test_blocks_no_longer_wanted_are_forgotten(self, client: Client) -> None:
        _, _, lazy_X, lazy_y = lazy(200, 20, seed=2)
        notes = Notes()
        source = DaskSource(noting(lazy_X, notes), lazy_y)
        source.announce([0, 1, 2, 3])
        assert eventually(lambda: sorted(notes) == [0, 1, 2, 3])
        source.announce([3, 10])
        assert eventually(lambda: sorted(notes) == [0, 1, 2, 3, 10])
        assert eventually(lambda: len(client.futures) == 4)  # features and target of two blocks
        source.close()

    def test_unknown_lengths(self, client: Client) -> None:
        X, y, lazy_X, lazy_y = lazy(seed=3)
        source = DaskSource(lazy_X[lazy_y % 1 == 0], lazy_y[lazy_y % 1 == 0])
        np.testing.assert_array_equal(read_all(source)[0], X[y % 1 == 0])

    def test_dataframe(self, client: Client) -> None:
        frame = pd.DataFrame({"a": np.arange(12.0), "y": np.arange(12)})
        source = DaskSource.from_dataframe(dd.from_pandas(frame, npartitions=3), "y")
        source.announce(range(3))
        np.testing.assert_array_equal(read_all(source)[1], frame["y"])
        np.testing.assert_array_equal(np.concatenate([part for _, part, _ in source.iter_targets()]), frame["y"])
        source.close()

    @pytest.mark.parametrize("of", ["array", "columns", "frame"])
    def test_what_lies_in_the_cluster_is_told(self, client: Client, of: str) -> None:
        """Features that are made of what was persisted, and of nothing that would have to be read again."""
        X, y = make_rows(40), make_target(40)
        lazy_X, lazy_y = blocks_of(X, 4), blocks_of(y, 4)
        frame = dd.from_pandas(pd.DataFrame(X).rename(columns=str).assign(y=y), npartitions=3)
        sources = {
            "array": lambda persist: DaskSource(persist(lazy_X), lazy_y),
            "columns": lambda persist: DaskSource(persist(lazy_X)[:, :2] * 2, lazy_y),
            "frame": lambda persist: DaskSource.from_dataframe(persist(frame), "y", features=["0", "1"]),
        }
        assert sources[of](client.persist).lies_in_cluster
        assert not sources[of](lambda collection: collection).lies_in_cluster
        if of != "frame":
            half = da.concatenate([client.persist(lazy_X), lazy_X])
            assert not DaskSource(half, da.concatenate([lazy_y, lazy_y])).lies_in_cluster

    def test_persisted_data(self, client: Client) -> None:
        X, _, lazy_X, _ = lazy(seed=4)
        kept = lazy_X.persist()
        source = DaskSource(kept, kept.sum(axis=1))
        source.announce(range(4))
        np.testing.assert_array_equal(read_all(source)[0], X)
        source.compute_here = True
        found = read_all(source)
        np.testing.assert_array_equal(found[0], X)
        np.testing.assert_allclose(found[1], X.sum(axis=1), rtol=1e-6)
        source.close()
        derived = DaskSource(kept[:, :2] * 2, kept[:, 2])
        derived.compute_here = True  # where what was persisted is not known by its key
        np.testing.assert_array_equal(read_all(derived)[0], X[:, :2] * 2)

    def test_first_rows_come_by_themselves(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        X, y, lazy_X, lazy_y = lazy(200, 10, seed=5)
        source = DaskSource(lazy_X, lazy_y)
        monkeypatch.setattr(source, "open_block", lambda *_, **__: pytest.fail("a whole block was fetched"))
        heads = [(0, 3), (4, 5), (9, 1)]
        for (block, n), reader in zip(heads, source.open_heads(heads, piece_rows=100), strict=True):
            with reader:
                rows = reader.read(n)
            np.testing.assert_array_equal(rows.X, X[20 * block : 20 * block + n])
            np.testing.assert_array_equal(rows.y, y[20 * block : 20 * block + n])
        source.close()
        assert eventually(lambda: not client.futures)

    def test_first_rows_that_are_most_of_a_block_come_with_it(self, client: Client) -> None:
        X, _, lazy_X, lazy_y = lazy(200, 10, seed=5)
        source = DaskSource(lazy_X, lazy_y)
        with next(source.open_heads([(2, 18)], piece_rows=100)) as reader:
            np.testing.assert_array_equal(reader.read(18).X, X[40:58])

    def test_targets_of_many_blocks_come_at_once(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        _, y, lazy_X, lazy_y = lazy(200, 20, seed=6)
        asked: list[int] = []
        gather = client.gather
        monkeypatch.setattr(client, "gather", lambda futures, **options: asked.append(1) or gather(futures, **options))
        monkeypatch.setattr(dask_module, "_TARGET_ROWS", 100)
        found = [part for _, part, _ in DaskSource(lazy_X, lazy_y).iter_targets()]
        np.testing.assert_array_equal(np.concatenate(found), y)
        assert len(asked) == 2

    def test_failing_block(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        def fail(block: np.ndarray) -> np.ndarray:
            raise ZeroDivisionError("on purpose")

        source = DaskSource(lazy(seed=5)[2].map_blocks(fail, dtype="f4", meta=np.empty((0, 0), "f4")))
        source.announce([1, 2])
        with pytest.raises(DataError, match="Dask block 1 cannot be computed: ZeroDivisionError: on purpose") as caught:
            source.open_block(1)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        source.close()

    def test_within_a_task_blocks_are_computed_there(self, client: Client) -> None:
        X, _, lazy_X, lazy_y = lazy(seed=6)
        source = DaskSource(lazy_X, lazy_y)

        def total(some: DaskSource) -> float:
            some.compute_here = False  # as of one that is opened within the task
            return float(sum(read_block(some, block)[0].sum(dtype=float) for block in range(4)))

        tasks = [client.submit(total, source, pure=False) for _ in range(2)]  # as many as there are threads
        assert client.gather(tasks, direct=True) == [pytest.approx(X.sum(dtype=float))] * 2
        source.close()

    def test_within_a_task_readers_compute_too(self, client: Client) -> None:
        """Their threads run no task, but what they asked of the cluster would wait for the one that they read for."""

        def fitted() -> float:
            get_client()  # a default client is here now
            return float(SGDRegressor(max_iter=2, tol=None).fit(*lazy(seed=6)[2:]).coef_[0])

        tasks = [client.submit(fitted, pure=False) for _ in range(2)]  # as many as there are threads
        expected = float(SGDRegressor(max_iter=2, tol=None).fit(*lazy(seed=6)[2:]).coef_[0])
        assert [task.result(timeout=30) for task in tasks] == [expected] * 2

    def test_a_target_that_cannot_be_computed_leaves_nothing(self, client: Client) -> None:
        """Not even while the error is kept."""

        def fail(block: np.ndarray, block_info: Any = None) -> np.ndarray:
            if block_info[0]["chunk-location"][0] == 1:
                raise ZeroDivisionError("on purpose")
            return block

        _, _, lazy_X, lazy_y = lazy(seed=8)
        source = DaskSource(lazy_X, lazy_y.map_blocks(fail, dtype=lazy_y.dtype, meta=np.empty(0, lazy_y.dtype)))
        before = set(client.futures)
        with pytest.raises(DataError, match="on purpose") as kept:
            list(source.iter_targets())
        assert eventually(lambda: set(client.futures) <= before)
        assert kept.value.__cause__ is not None

    def test_sent_elsewhere_it_computes_there(self, client: Client) -> None:
        source = pickle.loads(pickle.dumps(DaskSource(*lazy()[2:])))
        assert source.compute_here
        before = set(client.futures)
        source.announce([0, 1])
        assert set(client.futures) <= before
        assert len(read_all(source)[0]) == 40


@pytest.fixture(scope="module")
def beside() -> Iterator[Client]:
    with cluster(1) as (_, client):
        yield client


class TestBesideACluster:
    """Workers in processes of their own, on this machine: what they hold is read where it lies."""

    @pytest.fixture
    def rows(self, beside: Client) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, DaskSource]]:
        X, y, weight = make_rows(60), make_target(60), np.arange(60.0)
        kept = beside.persist([blocks_of(X, 6), blocks_of(y, 6), blocks_of(weight, 6)])
        for collection in kept:
            beside.gather(futures_of(collection))
        with computing_on(beside, 60.0):
            source = DaskSource(kept[0], kept[1], weight=kept[2])
            yield X, y, weight, source
            source.close()

    def test_nothing_is_sent(self, beside: Client, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        X, y, weight, source = rows

        def never(*_: Any, **__: Any) -> Any:
            raise AssertionError

        for name in ("submit_all", "submit_heads", "compute"):
            monkeypatch.setattr(dask_blocks.BlockGraph, name, never)
        source.announce(range(6))
        found_X, found_y, found_weight = read_all(source)
        np.testing.assert_array_equal(found_X, X)
        np.testing.assert_array_equal(found_y, y)
        np.testing.assert_array_equal(found_weight, weight)
        pieces = list(source.iter_targets(5, 57))
        np.testing.assert_array_equal(np.concatenate([piece for _, piece, _ in pieces]), y[5:57])
        np.testing.assert_array_equal(np.concatenate([piece for _, _, piece in pieces]), weight[5:57])
        for (block, n), reader in zip([(1, 2), (5, 1)], source.open_heads([(1, 2), (5, 1)], piece_rows=9), strict=True):
            with reader:
                np.testing.assert_array_equal(reader.read(n).X, X[10 * block : 10 * block + n])

    def test_nothing_stays_shown(self, beside: Client, rows: Any) -> None:
        source = rows[-1]
        read_block(source, 0)
        assert len([key for key in beside.futures if "show" in str(key)]) == 1
        (owner,) = source.shown(beside).owners
        source.close()
        assert eventually(lambda: not any("show" in str(key) for key in beside.futures))
        assert eventually(lambda: not owner.answers())

    def test_nor_after_a_fit_that_was_refused(self, beside: Client, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        source, had = rows[-1], []

        def unfit(*_: Any) -> str:
            had.append([key for key in beside.futures if "show" in str(key)])
            return "too small"

        monkeypatch.setattr(members, "unfit", unfit)
        with pytest.raises(UnfitWorkerError, match="too small"):
            SGDRegressor(n_lanes=2).fit(source, client=beside)
        assert had[0]
        assert eventually(lambda: not any("show" in str(key) for key in beside.futures))

    def test_what_is_shown_no_more_is_computed(self, beside: Client, rows: Any) -> None:
        X, y, _, source = rows
        with source.open_block(2) as reader:
            found = [reader.read(4).X]
            (owner,) = source.shown(beside).owners
            source.shown(beside).release()
            assert eventually(lambda: not owner.answers())
            targets = [piece for _, piece, _ in source.iter_targets()]
            found.append(reader.read(6).X)
        np.testing.assert_array_equal(np.concatenate(found), X[20:30])
        np.testing.assert_array_equal(np.concatenate(targets), y)
        assert source.shown(beside).owners[0].answers()  # anew

    def test_fingerprints_are_the_same_then(self, beside: Client, rows: Any) -> None:
        source = rows[-1]
        expected = DaskSource(*source._parts.collections()[:2], weight=source._parts.weight).fingerprint
        read_block(source, 0)
        (owner,) = source.shown(beside).owners
        source.shown(beside).release()
        assert eventually(lambda: not owner.answers())
        assert source.fingerprint == expected

    def test_what_a_run_reads_is_its_own(self, beside: Client, rows: Any) -> None:
        """Another fit of the same source may end before."""
        source = rows[-1]
        (first,) = source.shown(beside).owners
        runs = [InPlace(source, beside), InPlace(source, beside)]
        for run in runs:
            run.ask(beside.nthreads())
        assert [list(run._shown.owners) == [first] for run in runs] == [True, False]
        source.close()
        runs[0].forget()
        assert eventually(lambda: not first.answers())
        assert runs[1]._shown.owners[0].answers()
        assert list(runs[1].at(*beside.nthreads())) == list(range(6))
        runs[1].forget()
        assert eventually(lambda: not any("show" in str(key) for key in beside.futures))

    def test_what_a_worker_shows_no_more_fails_where_it_was_delivered(self, beside: Client, rows: Any) -> None:
        """The turn is taken again then, over blocks that are sent."""
        source = rows[-1]
        there = source.detached().with_blocks(source.shown(beside).handles)
        with there.open_block(2) as reader:
            reader.read(4)
            (owner,) = source.shown(beside).owners
            source.let_go()
            assert eventually(lambda: not owner.answers())
            with pytest.raises(UnreachableError):
                reader.read(4)

    def test_a_worker_that_is_busy_is_not_waited_for(
        self, beside: Client, rows: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        X, _, _, source = rows
        monkeypatch.setattr(dask_shown, "_PATIENCE_S", 0.1)
        busy = beside.submit(time.sleep, 1.0, pure=False)
        assert eventually(lambda: all(beside.run(lambda dask_worker: len(dask_worker.state.executing)).values()))
        began = time.monotonic()
        assert not source.shown(beside).handles
        assert time.monotonic() - began < 0.9
        assert eventually(lambda: not any("show" in str(key) for key in beside.futures))
        np.testing.assert_array_equal(read_all(source)[0], X)
        run = InPlace(source, beside)
        busy.result()
        run.ask(beside.nthreads())  # once more, when it is not busy
        assert len(run.at(*beside.nthreads())) == 6
        run.forget()

    @pytest.mark.parametrize("of", ["derived", "frame", "lazy target"])
    def test_only_what_is_held_as_it_is_read(self, beside: Client, of: str) -> None:
        X, y = make_rows(40), make_target(40)
        lazy_X, lazy_y = beside.persist([blocks_of(X, 4), blocks_of(y, 4)])
        frame = beside.persist(dd.from_pandas(pd.DataFrame({"a": X[:, 0], "y": y}), npartitions=3))
        with computing_on(beside, 60.0):
            source, expected = {
                "derived": lambda: (DaskSource(lazy_X * 2, lazy_y), X * 2),
                "frame": lambda: (DaskSource.from_dataframe(frame, "y"), X[:, :1]),
                "lazy target": lambda: (DaskSource(lazy_X, lazy_y + 0), X),
            }[of]()
            assert not source.shown(beside).handles
            np.testing.assert_array_equal(read_all(source)[0], expected)
            source.close()

    def test_workers_that_are_short_of_memory_show_nothing(self) -> None:
        """They would have to read back what they moved to disk, or move it there in vain."""
        usual = {"status": "running", "memory_limit": 1000, "metrics": {"memory": 500}}
        spilled = {"memory": 500, "spilled_bytes": {"memory": 10, "disk": 10}}
        assert dask_shown._has_memory(usual)
        assert dask_shown._has_memory(usual | {"memory_limit": 0})
        assert not dask_shown._has_memory(usual | {"memory_limit": 700})
        assert not dask_shown._has_memory(usual | {"status": "paused"})
        assert not dask_shown._has_memory(usual | {"metrics": spilled})
        assert not dask_shown._has_memory(None)

    def test_fits_in_one_process_read_there_too(self, beside: Client) -> None:
        X, y = make_rows(500), make_target(500)
        lazy_X, lazy_y = beside.persist([blocks_of(X, 6), blocks_of(y, 6)])
        with beside.as_current():
            found = SGDRegressor(max_iter=3).fit(lazy_X, lazy_y)
            predicted = np.concatenate(list(found.predict(lazy_X)))
        expected = SGDRegressor(max_iter=3).fit(blocks_of(X, 6), blocks_of(y, 6))
        np.testing.assert_array_equal(found.coef_, expected.coef_)
        np.testing.assert_array_equal(predicted, expected.predict(X))
        assert eventually(lambda: not any("show" in str(key) for key in beside.futures))
