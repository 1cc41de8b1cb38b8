"""A fitted model over a source: file order, bounded slices, released handles, scikit-learn's figures."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, r2_score, root_mean_squared_error

import streamgd
from streamgd import open_source
from streamgd.data.sources.hdf5 import Hdf5Source
from streamgd.errors import DataError, NonFiniteError, OptionError, SchemaError
from streamgd.learn.model import LinearModel
from streamgd.run import pieces
from streamgd.run.pieces import map_pieces
from streamgd.run.scoring import evaluate, predict_array, predict_source
from tests.data.fake import FakeSource, expect_no_threads


def table(n_rows: int = 900, n_features: int = 4, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(3).normal(size=(n_rows, n_features)).astype(dtype)


def regression(n_targets: int = 1, is_vector: bool = True) -> LinearModel:
    rng = np.random.default_rng(4)
    return LinearModel(
        "regression", "squared_error", rng.normal(size=(n_targets, 4)), rng.normal(size=n_targets), None, is_vector
    )


def classification(classes: Any, loss: str = "log_loss") -> LinearModel:
    rng = np.random.default_rng(5)
    n = 1 if len(classes) == 2 else len(classes)
    return LinearModel("classification", loss, rng.normal(size=(n, 4)), rng.normal(size=n), np.array(classes))


def linear(model: LinearModel, X: np.ndarray) -> np.ndarray:
    return X @ model.coef.T + model.intercept


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE_BYTES", 2_000)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "predict_log_proba", "decision_function"])
@pytest.mark.parametrize("classes", [["no", "yes"], [3, 5, 9]])
def test_a_source_is_predicted_in_file_order(method: str, classes: list[Any], small_slices: None) -> None:
    X, model = table(), classification(classes)
    found = list(predict_source(model, open_source(X), method))
    assert len(found) > 5
    expected = getattr(model, method)(linear(model, X))
    whole = np.concatenate(found)
    if method == "predict":
        np.testing.assert_array_equal(whole, expected)
    else:
        np.testing.assert_allclose(whole, expected, rtol=1e-12)
    np.testing.assert_array_equal(predict_array(model, X, method), whole)


def test_slices_are_of_bounded_size(small_slices: None) -> None:
    sizes = list(map_pieces(open_source(table()), regression(), lambda piece: len(piece.X)))
    assert sum(sizes) == 900
    assert max(sizes) <= 1.5 * 2_000 / (8 * 5)


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("slow", [0, 3, None])
def test_any_number_of_threads_keeps_file_order(
    n_threads: int, slow: int | None, small_slices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever block takes long, and however little may be held."""
    monkeypatch.setattr(pieces, "_HELD_BYTES", 800)
    source = FakeSource([70, 10, 200, 33, 1, 150], columns=True)

    def numbers(piece: pieces.Piece) -> np.ndarray:
        if piece.block == slow:
            time.sleep(0.01)
        return piece.decided[:, 0]

    model = LinearModel("regression", "squared_error", np.array([[1.0, 0.0, 0.0]]), np.zeros(1), None)
    found = list(map_pieces(source, model, numbers, n_threads=n_threads))
    assert len(found) > 6
    np.testing.assert_array_equal(np.concatenate(found), np.arange(464) * 3)
    expect_no_threads()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_an_error_comes_after_what_was_before_it(n_threads: int, small_slices: None) -> None:
    source = FakeSource([50] * 20)

    def fail(block: int, row: int) -> None:
        if block == 9:
            raise OSError("gone")

    source.before_read = fail
    model = LinearModel("regression", "squared_error", np.ones((1, 3)), np.zeros(1), None)
    found = map_pieces(source, model, lambda piece: len(piece.X), n_threads=n_threads)
    total = 0
    with pytest.raises(OSError, match="gone"):  # noqa: PT012
        for n in found:
            total += n
    assert total == 450
    expect_no_threads()


def test_predicting_reads_only_what_is_asked_for(small_slices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(table(900))
    asked: list[int] = []
    read_rows = source.read_rows
    monkeypatch.setattr(source, "read_rows", lambda first, stop: asked.append(stop) or read_rows(first, stop))
    predictions = predict_source(regression(), source)
    assert asked == []
    next(predictions)
    assert asked == [50]


def test_an_abandoned_iterator_releases_its_files(tmp_path: Path, small_slices: None) -> None:
    path = tmp_path / "rows.h5"
    with h5py.File(path, "w") as file:
        file["X"] = table()

    def is_open() -> bool:
        return str(path) in {opened.path for opened in psutil.Process().open_files()}

    source = open_source(path)
    predictions = predict_source(regression(), source)
    next(predictions)
    assert is_open()
    del predictions
    assert not is_open()
    list(predict_source(regression(), source))
    assert not is_open()


def test_a_source_of_another_width_is_refused_before_anything_is_read() -> None:
    with pytest.raises(SchemaError, match="has 3 features, but the model is expecting 4 features as input"):
        predict_source(regression(), open_source(table(n_features=3)))


def test_probabilities_that_are_not_there_are_refused_before_anything_is_read() -> None:
    with pytest.raises(OptionError, match="loss='hinge' gives no probabilities"):
        predict_source(classification([0, 1], "hinge"), open_source(table()), "predict_proba")
    with pytest.raises(OptionError, match="method='guess'"):
        predict_source(regression(), open_source(table()), "guess")


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
@pytest.mark.parametrize("method", ["predict", "predict_proba"])
def test_a_bad_value_is_named_with_its_row(bad: float, word: str, method: str, small_slices: None) -> None:
    X = table()
    X[777, 2] = bad
    model = classification([0, 1])
    with pytest.raises(NonFiniteError, match=rf"contains {word}.*row 777.*number 2"):
        list(predict_source(model, open_source(X), method))
    with pytest.raises(NonFiniteError, match=rf"contains {word}.*row 777.*number 2"):
        predict_array(model, X, method)


def test_values_whose_sum_overflows_are_no_error() -> None:
    X = np.full((4, 4), 6e4, np.float16)
    found = predict_array(regression(), X)
    np.testing.assert_allclose(found, regression().decision_function(linear(regression(), X.astype(float))))
    model = LinearModel("regression", "squared_error", np.full((1, 4), 1e-3), np.zeros(1), None)
    np.testing.assert_allclose(predict_array(model, np.full((4, 4), 1e308)), 4e305)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n_targets", [1, 3])
def test_regression_figures_agree(n_targets: int, weighted: bool, small_slices: None) -> None:
    rng = np.random.default_rng(6)
    X, model = table(), regression(n_targets, is_vector=n_targets == 1)
    y = (
        model.decision_function(linear(model, X)).reshape(900, n_targets)
        + rng.normal(size=(900, n_targets)) * [0.5, 2.0, 9.0][:n_targets]
    )
    y = y[:, 0] if n_targets == 1 else y
    weight = rng.uniform(size=900) if weighted else None
    found = evaluate(model, open_source(X, y, weight=weight))
    p = model.predict(linear(model, X))
    assert found.n_rows == 900
    assert found.score == found.metrics["r2"] == pytest.approx(r2_score(y, p, sample_weight=weight), rel=1e-12)
    assert found.metrics["rmse"] == pytest.approx(root_mean_squared_error(y, p, sample_weight=weight), rel=1e-12)
    assert found.metrics["mae"] == pytest.approx(mean_absolute_error(y, p, sample_weight=weight), rel=1e-12)


def test_targets_far_from_zero_lose_no_digits() -> None:
    X, model = table(), regression()
    far = LinearModel("regression", "squared_error", model.coef, model.intercept + 1e9, None)
    y = far.predict(linear(far, X)) + np.random.default_rng(8).normal(size=900)
    assert evaluate(far, open_source(X, y)).score == pytest.approx(r2_score(y, far.predict(linear(far, X))), rel=1e-7)


def test_constant_targets_are_explained_wholly_or_not_at_all() -> None:
    X = table()
    model = LinearModel("regression", "squared_error", np.zeros((1, 4)), np.array([2.0]), None)
    assert evaluate(model, open_source(X, np.full(900, 2.0))).score == 1.0
    assert evaluate(model, open_source(X, np.full(900, 3.0))).score == 0.0
    assert np.isnan(evaluate(model, open_source(X[:1], np.ones(1))).score)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [["no", "yes"], [3, 5, 9]])
def test_classification_figures_agree(classes: list[Any], weighted: bool, small_slices: None) -> None:
    rng = np.random.default_rng(9)
    X, model = table(), classification(classes)
    y, weight = rng.choice(classes, 900), rng.uniform(size=900) if weighted else None
    found = evaluate(model, open_source(X, y, weight=weight))
    assert found.score == found.metrics["accuracy"]
    assert found.score == pytest.approx(
        accuracy_score(y, model.predict(linear(model, X)), sample_weight=weight), rel=1e-12
    )
    expected = log_loss(y, model.predict_proba(linear(model, X)), sample_weight=weight, labels=model.classes)
    assert found.metrics["log_loss"] == pytest.approx(expected, rel=1e-9)


def test_an_unknown_label_counts_as_wrong() -> None:
    X, model = table(4), classification([0, 1])
    y = model.predict(linear(model, X))
    assert evaluate(model, open_source(X, y)).score == 1.0
    assert evaluate(model, open_source(X, np.append(y[:3], 7))).score == 0.75


def test_what_cannot_be_judged_is_said() -> None:
    X = table(5)
    with pytest.raises(DataError, match="no target to compare with"):
        evaluate(regression(), open_source(X))
    with pytest.raises(DataError, match="weights are all zero"):
        evaluate(regression(), open_source(X, np.ones(5), weight=np.zeros(5)))
    with pytest.raises(NonFiniteError, match=r"row 3.*'y'"):
        evaluate(regression(), open_source(X, np.array([1.0, 2.0, 3.0, np.nan, 5.0])))
    with pytest.raises(NonFiniteError, match=r"row 3.*'y'"):
        evaluate(classification([1, 2]), open_source(X, np.array([1.0, 2.0, 1.0, np.nan, 2.0])))
    with pytest.raises(SchemaError, match="predicts numbers"):
        evaluate(regression(), open_source(X, np.array(list("abcab"))))


def test_predictions_are_an_iterator_and_not_a_list() -> None:
    found = predict_source(regression(), open_source(table()))
    assert isinstance(found, Iterator)
    assert inspect.isgenerator(found)


class TestFlatFiles:
    """Rows that lie in files as they are come without h5py, and to the same."""

    @pytest.fixture
    def flat_reads(self, monkeypatch):
        found, read = [], pieces.FlatPieces.read

        def noted(self, *arguments):
            found.append(read(self, *arguments))
            return found[-1]

        monkeypatch.setattr(pieces.FlatPieces, "read", noted)
        return found

    def source(self, folder, X, y, weight=None, n_files=2, **options):
        for number in range(n_files):
            with h5py.File(folder / f"{number}.h5", "w") as file:
                file["X"], file["y"] = X, y
                if weight is not None:
                    file["w"] = weight
        paths = [folder / f"{number}.h5" for number in range(n_files)]
        return Hdf5Source(paths, weight=None if weight is None else "w", block_bytes=3000, **options)

    @pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "uint8", "bool", "float16"])
    @pytest.mark.parametrize("kind", ["values", "targets", "labels", "truths", "weights"])
    def test_predictions_and_scores_are_the_same(self, tmp_path, monkeypatch, flat_reads, dtype, kind):
        rng = np.random.default_rng(0)
        X = (rng.normal(size=(700, 4)) * 3).clip(0).astype(dtype)
        y = {"targets": rng.normal(size=(700, 3)), "labels": rng.integers(0, 3, 700), "truths": rng.random(700) < 0.5}
        target = y.get(kind, rng.normal(size=700).astype(np.float32))
        source = self.source(tmp_path, X, target, rng.random(700) if kind == "weights" else None)
        estimator = streamgd.SGDClassifier if kind in ("labels", "truths") else streamgd.SGDRegressor
        model = estimator(max_iter=1).fit(source)
        found = np.concatenate(list(model.predict(source))), model.score(source)
        there = [each is not None for each in flat_reads]
        assert all(there) if dtype != "float16" and kind != "truths" else not any(there)
        monkeypatch.setattr(pieces.FlatPieces, "read", lambda self, *arguments: None)
        assert found[0].tobytes() == np.concatenate(list(model.predict(source))).tobytes()
        assert found[1] == model.score(source)

    def test_columns_of_their_own_and_decoded_ones_are_left_to_h5py(self, tmp_path, flat_reads):
        rng = np.random.default_rng(0)
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for name in "abc":
                file[name] = rng.normal(size=500)
            file["y"] = rng.normal(size=500)
            file.create_dataset("X", data=rng.normal(size=(500, 2)), chunks=(50, 2))
        for features in (["a", "b", "c"], "X"):
            source = Hdf5Source(tmp_path / "a.h5", features=features)
            model = streamgd.SGDRegressor(max_iter=1).fit(source)
            assert np.isfinite(model.score(source))
        assert flat_reads
        assert not any(each is not None for each in flat_reads)

    def test_a_file_cut_short_is_named(self, tmp_path, flat_reads):
        rng = np.random.default_rng(0)
        source = self.source(tmp_path, rng.normal(size=(700, 4)), rng.normal(size=700), n_files=1)
        model = streamgd.SGDRegressor(max_iter=1).fit(source)
        os.truncate(tmp_path / "0.h5", 12_000)
        with pytest.raises(DataError, match=r"0\.h5"):
            model.score(source)
