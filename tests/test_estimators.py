"""`SGDRegressor` and `SGDClassifier`: what goes in, what comes out, and what is kept between calls."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures

from streamgd import SGDClassifier, SGDRegressor, open_source
from streamgd.errors import DataError, DivergenceError, NonFiniteError, OptionError, SchemaError
from streamgd.estimators.inputs import rows_source, training_source

TRUE_COEF = np.array([3.0, -0.2, 50.0, 1.0])


def table(n_rows: int = 2_000, seed: int = 0, dtype: str = "float64") -> np.ndarray:
    """Features of very different scales and places."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n_rows, 4)) * [1.0, 20.0, 0.05, 1.0] + [0.0, 300.0, 1.0, -2.0]).astype(dtype)


def target(X: np.ndarray, noise: float = 0.1, seed: int = 1) -> np.ndarray:
    return X @ TRUE_COEF + 7.0 + noise * np.random.default_rng(seed).normal(size=len(X))


def labels(X: np.ndarray, names: Any = ("low", "mid", "high")) -> np.ndarray:
    y = target(X, noise=2.0)
    return np.array(names)[np.digitize(y, np.quantile(y, np.arange(1, len(names)) / len(names)))]


def assert_same_fit(one: Any, other: Any) -> None:
    """The same bits, whatever way the rows came."""
    np.testing.assert_array_equal(one.coef_, other.coef_)
    np.testing.assert_array_equal(one.intercept_, other.intercept_)
    assert one.loss_curve_ == other.loss_curve_


# --- what is learnt --------------------------------------------------------------------------------------------------
def test_regression_finds_the_coefficients_in_the_units_of_the_data() -> None:
    X = table()
    y = target(X)
    model = SGDRegressor(tol=None, max_iter=100).fit(X, y)
    exact = np.linalg.lstsq(np.column_stack([X, np.ones(len(X))]), y, rcond=None)[0]
    np.testing.assert_allclose(model.coef_, exact[:-1], rtol=2e-3)
    np.testing.assert_allclose(model.intercept_, exact[-1:], rtol=2e-2)
    assert model.coef_.shape == (4,)
    assert model.intercept_.shape == (1,)
    assert model.predict(X).shape == (len(X),)
    assert model.score(X, y) > 0.999


def test_without_intercept_predictions_are_those_that_were_trained() -> None:
    X = table() - [0.0, 290.0, 0.95, -1.0]  # means of half a standard deviation and more
    y = target(X)  # 7 off what can be fitted: the coefficients have to make up for it
    model = SGDRegressor(fit_intercept=False, tol=None, max_iter=200).fit(X, y)
    assert model.intercept_.tolist() == [0.0]
    np.testing.assert_allclose(model.coef_, np.linalg.lstsq(X, y, rcond=None)[0], rtol=2e-2)
    assert 2 * model.loss_curve_[-1] == pytest.approx(np.mean((model.predict(X) - y) ** 2), rel=0.05)


def test_a_small_set_gets_many_epochs_and_a_large_one_few() -> None:
    X = table(300)
    assert SGDRegressor(tol=None, batch_size=30).fit(X, target(X)).n_iter_ == 1_000
    X = table(30_000)
    assert SGDRegressor(tol=None, batch_size=3).fit(X, target(X)).n_iter_ == 1
    assert SGDRegressor(tol=None, batch_size=10).fit(X, target(X)).n_iter_ == 4


def test_counts_and_the_loss_curve() -> None:
    X = table(1_000)
    model = SGDRegressor(max_iter=3, tol=None).fit(X, target(X))
    assert model.n_iter_ == len(model.loss_curve_) == 3
    assert model.t_ == 3 * 4 + 1  # four batches of 256 make an epoch of 1,000 rows
    assert model.loss_curve_[2] < model.loss_curve_[0]
    assert model.run_dir_ is None


@pytest.mark.parametrize("shape", ["vector", "column", "matrix"])
def test_shapes_follow_the_target(shape: str) -> None:
    X = table(500)
    y = {"vector": target(X), "column": target(X)[:, None], "matrix": np.column_stack([target(X), -target(X), X[:, 0]])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a column is a target like any other for a regression with several outputs
        model = SGDRegressor(max_iter=2).fit(X, y[shape])
    n = {"vector": (), "column": (1,), "matrix": (3,)}[shape]
    assert model.coef_.shape == (*n, 4)
    assert model.intercept_.shape == (n or (1,))
    assert model.predict(X).shape == (500, *n)


def test_targets_are_learnt_independently_of_each_other() -> None:
    X = table(500)
    both = SGDRegressor(max_iter=3, tol=None).fit(X, np.column_stack([target(X), 1e6 * X[:, 0]]))
    alone = SGDRegressor(max_iter=3, tol=None).fit(X, target(X))
    np.testing.assert_array_equal(both.coef_[0], alone.coef_)


@pytest.mark.parametrize("names", [("no", "yes"), ("low", "mid", "high"), (False, True), (7, -2), (1.0, 2.0, 5.0)])
@pytest.mark.parametrize("loss", ["log_loss", "hinge", "squared_hinge", "modified_huber", "perceptron"])
def test_classes_of_any_type(loss: str, names: tuple[Any, ...]) -> None:
    X = table()
    y = labels(X, names)
    model = SGDClassifier(loss, max_iter=40).fit(X, y)
    np.testing.assert_array_equal(model.classes_, np.unique(y))
    assert model.classes_.dtype == y.dtype
    assert model.predict(X).dtype == y.dtype
    assert model.coef_.shape == (1 if len(names) == 2 else len(names), 4)
    assert model.decision_function(X).shape == ((len(X),) if len(names) == 2 else (len(X), len(names)))
    assert model.score(X, y) > (0.85 if len(names) == 2 else 0.6)


@pytest.mark.parametrize("loss", ["log_loss", "modified_huber"])
@pytest.mark.parametrize("names", [("no", "yes"), ("low", "mid", "high")])
def test_probabilities(loss: str, names: tuple[str, ...]) -> None:
    X = table()
    model = SGDClassifier(loss, max_iter=40).fit(X, labels(X, names))
    proba = model.predict_proba(X)
    np.testing.assert_allclose(proba.sum(axis=1), 1.0)
    np.testing.assert_array_equal(model.classes_[proba.argmax(axis=1)], model.predict(X))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(model.predict_log_proba(X), np.log(proba), atol=1e-9)


def test_log_probabilities_stay_finite_far_from_the_boundary() -> None:
    X = table()
    for names in (("no", "yes"), ("low", "mid", "high")):
        model = SGDClassifier(max_iter=5).fit(X, labels(X, names))
        model.coef_ *= 1e4
        assert np.isfinite(model.predict_log_proba(X)).all()


def test_margins_have_no_probabilities() -> None:
    model = SGDClassifier("hinge").fit([[0.0], [1.0]], [0, 1])
    assert not hasattr(model, "predict_proba")
    with pytest.raises(AttributeError, match="predict_log_proba") as caught:
        model.predict_log_proba([[0.0]])
    assert "loss='hinge'" in str(caught.value.__cause__)


def test_weights_of_any_scale_act_like_repetitions() -> None:
    X = table(100)
    y = target(X)
    repeats = np.random.default_rng(2).integers(0, 4, len(X))
    repeated = SGDRegressor(max_iter=20, tol=None).fit(X.repeat(repeats, axis=0), y.repeat(repeats))
    weighted = SGDRegressor(max_iter=20, tol=None).fit(X, y, sample_weight=1e-3 * repeats)
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-9)
    assert weighted.score(X, y, sample_weight=repeats) == pytest.approx(
        repeated.score(X.repeat(repeats, axis=0), y.repeat(repeats)), rel=1e-9
    )


def test_class_weights() -> None:
    X = table()
    y = labels(X, ("rare", "usual"))
    usual = SGDClassifier(max_iter=20).fit(X, y)
    dear = SGDClassifier(max_iter=20, class_weight={"rare": 50.0}).fit(X, y)
    assert (dear.predict(X) == "rare").sum() > (usual.predict(X) == "rare").sum() + 20
    with pytest.raises(OptionError, match="names the class 'seldom'"):
        SGDClassifier(class_weight={"seldom": 2.0}).fit(X, y)


# --- what goes in ----------------------------------------------------------------------------------------------------
def test_the_way_the_rows_come_changes_nothing() -> None:
    dask_array = pytest.importorskip("dask.array")
    dask_frame = pytest.importorskip("dask.dataframe")
    X = table(1_500)
    y, weight = target(X), np.random.default_rng(3).uniform(size=len(X))
    frame = pd.DataFrame(X, columns=list("abcd"))
    reference = SGDRegressor(max_iter=3).fit(X, y, sample_weight=weight)
    ways: dict[str, tuple[Any, Any, Any]] = {
        "lists": (X.tolist(), y.tolist(), weight.tolist()),
        "column-major": (np.asfortranarray(X), y, weight),
        "strided": (np.repeat(X, 2, axis=0)[::2], np.repeat(y, 2)[::2], weight),
        "objects": (X.astype(object), y.astype(object), weight.astype(object)),
        "frame": (frame, pd.Series(y), pd.Series(weight)),
        "frame of objects": (frame.astype(object), y, weight),
        "frame of several types": (frame.assign(a=frame["a"].astype("Float64")), y, weight),
        "source": (open_source(X, y, weight=weight), None, None),
        "dask arrays": (
            dask_array.from_array(X, chunks=(400, 2)),
            dask_array.from_array(y, chunks=333),
            dask_array.from_array(weight, chunks=400),
        ),
        "dask frame": (
            dask_frame.from_pandas(frame, npartitions=3),
            dask_frame.from_pandas(pd.Series(y), npartitions=3),
            dask_frame.from_pandas(pd.Series(weight), npartitions=3),
        ),
    }
    for name, (rows, values, weights) in ways.items():
        model = SGDRegressor(max_iter=3).fit(rows, values, sample_weight=weights)
        try:
            assert_same_fit(model, reference)
        except AssertionError as err:
            raise AssertionError(name) from err
        assert hasattr(model, "feature_names_in_") == ("frame" in name)


@pytest.mark.parametrize("path", ["rows.parquet", Path("rows.parquet")])
def test_paths_have_to_be_opened(path: Any) -> None:
    X = table(50)
    fitted = SGDRegressor(max_iter=1, tol=None).fit(X, target(X))
    for use in (lambda: fitted.predict(path), lambda: SGDRegressor().fit(path, "price")):
        with pytest.raises(OptionError, match=r"is a path: give what streamgd.open_source\('rows.parquet', target=…\)"):
            use()


def test_files_are_read_where_they_lie(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    X = table(1_500)
    y = target(X)
    frame = pd.DataFrame(X, columns=list("abcd"))
    frame.assign(price=y).to_parquet(tmp_path / "rows.parquet", row_group_size=400)
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["X"], file["y"] = X, y
    reference = SGDRegressor(max_iter=3).fit(X, y)
    sources = {
        "parquet": open_source(tmp_path / "rows.parquet", "price"),
        "hdf5": open_source(tmp_path / "rows.h5"),
    }
    for source in sources.values():
        model = SGDRegressor(max_iter=3).fit(source)
        np.testing.assert_allclose(model.coef_, reference.coef_, rtol=1e-9)
        assert model.score(source) == pytest.approx(reference.score(X, y))
        np.testing.assert_allclose(np.concatenate(list(model.predict(source))), reference.predict(X), rtol=1e-9)
    by_name = SGDRegressor(max_iter=1).fit(sources["parquet"])
    assert by_name.feature_names_in_.tolist() == list("abcd")
    assert by_name.predict(frame).shape == (1_500,)


def test_big_arrays_are_neither_copied_nor_cast() -> None:
    X = np.random.default_rng(0).normal(size=(200_000, 25)).astype(np.float32)  # 20 MB
    y = X[:, 0].copy()
    SGDRegressor(max_iter=1).fit(X[:100], y[:100])  # compiled, imported
    tracemalloc.start()
    try:
        model = SGDRegressor(max_iter=1, buffer="6MB").fit(X, y)
        model.predict(X[:10])
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < 15e6
    finally:
        tracemalloc.stop()
    assert model._trained.state.carry_X.dtype == np.float32


def test_predictions_convert_rows_a_few_at_a_time() -> None:
    X = np.random.default_rng(0).normal(size=(200_000, 25)).astype(np.float32)
    model = SGDRegressor(max_iter=1).fit(X[:1000], X[:1000, 0])
    tracemalloc.start()
    try:
        model.predict(X)
        assert tracemalloc.get_traced_memory()[1] < 15e6  # 40 MB as float64
    finally:
        tracemalloc.stop()


def test_memmaps_are_read_from_their_file(tmp_path: Path) -> None:
    X = table(3_000)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    model = SGDRegressor(max_iter=2).fit(mapped, target(X))
    assert_same_fit(model, SGDRegressor(max_iter=2).fit(X, target(X)))
    np.testing.assert_array_equal(model.predict(mapped), model.predict(X))
    for source in (
        training_source(SGDRegressor(), mapped, target(X), None, reset=True, labels=False),
        rows_source(model, mapped),
    ):
        assert "X.npy" in source.name


def test_feature_names_are_kept_and_held_to() -> None:
    X = table(400)
    frame = pd.DataFrame(X, columns=list("abcd"))
    model = SGDRegressor(max_iter=1).fit(frame, target(X))
    assert model.feature_names_in_.tolist() == ["a", "b", "c", "d"]
    model.predict(frame)
    with pytest.raises(ValueError, match="same order"):
        model.predict(frame[list("bacd")])
    with pytest.raises(SchemaError, match="another order"):
        model.predict(open_source(frame[list("bacd")]))
    with pytest.raises(SchemaError, match="it lacks 'd' and has 'e' instead"):
        model.predict(open_source(frame.rename(columns={"d": "e"})))
    with pytest.raises(SchemaError, match="has 3 features, but SGDRegressor is expecting 4 features as input"):
        model.predict(open_source(frame[list("abc")]))
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        model.predict(X)
    model.fit(X, target(X))
    assert not hasattr(model, "feature_names_in_")


def test_a_source_brings_its_own_target() -> None:
    X = table(100)
    source = open_source(X, target(X))
    with pytest.raises(OptionError, match="y was given beside a source"):
        SGDRegressor().fit(source, target(X))
    with pytest.raises(OptionError, match="sample_weight was given beside a source"):
        SGDRegressor().fit(source, sample_weight=np.ones(100))
    with pytest.raises(DataError, match="no target was given"):
        SGDRegressor().fit(open_source(X))


@pytest.mark.parametrize("kind", [SGDRegressor, SGDClassifier])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_is_named_with_its_row_and_column(kind: Any, bad: float) -> None:
    X = table(300)
    y = labels(X) if kind is SGDClassifier else target(X)
    X[123, 2] = bad
    with pytest.raises(NonFiniteError, match=rf"row 123.*number 2 is {'NaN' if np.isnan(bad) else 'inf'}"):
        kind().fit(X, y)
    frame = pd.DataFrame(X, columns=list("abcd"))
    with pytest.raises(NonFiniteError, match=r"row 123.*'c'"):
        kind().fit(frame, y)


def test_numbers_to_predict_are_no_classes() -> None:
    X = table(50)
    with pytest.raises(DataError, match=r"Unknown label type: continuous.*row 0"):
        SGDClassifier().fit(X, target(X))
    with pytest.raises(SchemaError, match="which regression cannot fit"):
        SGDRegressor().fit(X, labels(X))


def test_text_columns_are_named_all_at_once() -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0], "city": ["x", "y"], "day": pd.to_datetime(["2020-01-01", "2020-01-02"])})
    with pytest.raises(SchemaError, match=r"'city'.*'day'"):
        SGDRegressor().fit(frame, [1.0, 2.0])


def test_lengths_must_agree() -> None:
    X = table(50)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        SGDRegressor().fit(X, target(X)[:-1])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        SGDRegressor().fit(pd.DataFrame(X), target(X)[:-1])
    with pytest.raises(ValueError, match=r"sample_weight.shape == \(49,\), expected \(50,\)"):
        SGDRegressor().fit(X, target(X), sample_weight=np.ones(49))


def test_a_column_of_labels_warns_and_several_are_refused() -> None:
    X = table(50)
    y = labels(X, ("no", "yes"))
    for rows in (X, pd.DataFrame(X)):
        with pytest.warns(DataConversionWarning, match="column-vector y was passed"):
            SGDClassifier(max_iter=1).fit(rows, y[:, None])
        with pytest.raises(ValueError, match="1d array"):
            SGDClassifier(max_iter=1).fit(rows, np.column_stack([y, y]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "hinge"}, "loss='hinge' is not a loss for regression"),
        ({"penalty": "l3"}, "penalty='l3'"),
        ({"max_iter": 0}, "max_iter=0"),
        ({"buffer": "much"}, "size 'much'"),
        ({"random_state": -1}, "random_state=-1"),
        ({"random_state": "lucky"}, "random_state='lucky'"),
        ({"optimizer": "adam", "learning_rate": "optimal"}, "does not go with optimizer='adam'"),
        ({"n_threads": 0}, "n_threads=0"),
        ({"checkpoint_every_s": -1.0}, "checkpoint_every_s=-1.0"),
    ],
)
def test_options_are_checked_before_the_data(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        SGDRegressor(**options).fit("no data at all", None)


@pytest.mark.parametrize(("tol", "seen"), [(1e-3, "the loss is"), (None, "overflowed"), ("auto", "overflowed")])
def test_divergence_is_an_error_and_leaves_no_half_fitted_estimator(tol: Any, seen: str) -> None:
    X = table(500)
    model = SGDRegressor(learning_rate="constant", eta0=1.0, standardize=False, max_iter=50, tol=tol)
    with pytest.raises(DivergenceError, match=rf"diverged.*{seen}.*standardize=True"):
        model.fit(X, target(X))
    with pytest.raises(NotFittedError):
        model.predict(X)


def test_a_loss_beyond_all_measure_is_divergence_whatever_the_tolerance() -> None:
    X = table(1000)
    model = SGDRegressor(learning_rate="optimal", max_iter=5, tol=None)
    with pytest.raises(DivergenceError, match="after 5 epochs the loss is"):
        model.fit(X, target(X))
    model.set_params(learning_rate="constant", eta0=3.0)
    for _ in range(5):  # of rows to come nothing is known
        model.partial_fit(X, target(X))
    assert model.loss_curve_[-1] > model.loss_curve_[0]


@pytest.mark.parametrize("tol", [None, "auto"])
def test_a_warm_start_on_other_rows_is_not_judged_by_the_first(tol: Any) -> None:
    X = table(1000)
    model = SGDRegressor(max_iter=2, tol=tol, warm_start=True, learning_rate="constant", eta0=0.01)
    model.fit(X, X[:, 0] * 1e-4)
    before = model.coef_[0]
    model.fit(X, X[:, 0] * 10)
    assert model.coef_[0] > 1000 * before  # on its way


# --- what is kept between calls ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", ["auto", "sgd", "adagrad", "adam", "dowg"])
@pytest.mark.parametrize("kind", [SGDRegressor, SGDClassifier])
def test_partial_fit_on_the_same_rows_is_fit(kind: Any, optimizer: str) -> None:
    X = table(700)
    y = labels(X) if kind is SGDClassifier else target(X)
    whole = kind(optimizer=optimizer, max_iter=3, tol=None, eta0=0.001 if optimizer == "sgd" else "auto").fit(X, y)
    parts = clone(whole)
    more = {"classes": np.unique(y)} if kind is SGDClassifier else {}
    for i in range(3):
        assert parts.partial_fit(X, y, **more) is parts
        assert parts.n_iter_ == i + 1
    assert_same_fit(parts, whole)
    assert parts.t_ == whole.t_


def test_partial_fit_takes_parts_of_any_size_and_kind() -> None:
    X = table(5_000)
    y = target(X)
    model = SGDRegressor()
    first = 0
    for n in (1_000, 1, 300, 2_000, 17, 1_682):
        part = slice(first, first + n)
        weight = np.ones(n) if n == 300 else None
        rows = X[part].astype(np.float32) if n == 2_000 else X[part]
        if n == 17:
            model.partial_fit(open_source(rows, y[part]))
        else:
            model.partial_fit(rows, y[part], sample_weight=weight)
        first += n
    assert first == 5_000
    assert model.score(X, y) > 0.999
    assert model.t_ - 1 == 4 + 1 + 2 + 8 + 1 + 7  # every call closes its last batch


def test_partial_fit_goes_on_from_coefficients_that_were_set() -> None:
    X = table(500)
    y = target(X)
    model = SGDRegressor(optimizer="sgd", eta0=1e-12, learning_rate="constant", max_iter=1).fit(X, y)
    model.coef_, model.intercept_ = np.arange(4.0), np.array([9.0])
    model.partial_fit(X[:1], y[:1])
    np.testing.assert_allclose(model.coef_, np.arange(4.0), atol=1e-7)
    np.testing.assert_allclose(model.intercept_, [9.0], atol=1e-4)


def test_what_elasticnet_alone_uses_may_be_none_elsewhere() -> None:
    X = table(500)
    assert_same_fit(
        SGDRegressor(penalty="l2", l1_ratio=None).fit(X, target(X)), SGDRegressor(penalty="l2").fit(X, target(X))
    )


def test_partial_fit_keeps_the_scale_of_the_first_call() -> None:
    X = table(1_000)
    model = SGDRegressor().partial_fit(X, target(X))
    kept = model._trained.survey
    model.partial_fit(100 * X, 5.0 + target(100 * X))
    assert model._trained.survey is kept


def test_partial_fit_neither_stops_nor_slows_down() -> None:
    X = table(200)
    models = [SGDRegressor(learning_rate=rate, n_iter_no_change=1, tol=1.0) for rate in ("adaptive", "constant")]
    for _ in range(10):
        for model in models:
            model.partial_fit(X, target(X))
    assert_same_fit(*models)
    assert models[0].n_iter_ == 10


def test_a_failed_partial_fit_leaves_the_estimator_as_it_was() -> None:
    X = table(1_000)
    model = SGDRegressor(buffer="200kB").partial_fit(X, target(X))
    before = pickle.dumps(model)
    bad = table(5_000)
    bad[-1, 0] = np.nan
    with pytest.raises(NonFiniteError):
        model.partial_fit(bad, target(X).repeat(5))
    assert pickle.dumps(model) == before


def test_classes_of_partial_fit() -> None:
    X = table(300)
    y = labels(X)
    with pytest.raises(ValueError, match="classes must be passed on the first call to partial_fit"):
        SGDClassifier().partial_fit(X, y)
    model = SGDClassifier().partial_fit(X[y == "low"], y[y == "low"], classes=["mid", "low", "high"])
    assert model.classes_.tolist() == ["high", "low", "mid"]
    assert set(model.predict(X)) == {"low"}
    model.partial_fit(X, y)
    with pytest.raises(ValueError, match="is not the same as on last call to partial_fit"):
        model.partial_fit(X, y, classes=["low", "mid"])
    with pytest.raises(DataError, match="'odd' is none of the 3 known classes"):
        model.partial_fit(X[:1], ["odd"])
    with pytest.raises(DataError, match="'mid' is none of the 2 known classes"):
        SGDClassifier().partial_fit(X, y, classes=["low", "high"])
    with pytest.raises(ValueError, match="number of classes has to be greater than one"):
        SGDClassifier().partial_fit(X, y, classes=["low"])


def test_what_shapes_units_cannot_change_while_training_goes_on() -> None:
    X = table(300)
    model = SGDRegressor(max_iter=1).fit(X, target(X))
    model.set_params(alpha=0.1, penalty="l2", batch_size=50).partial_fit(X, target(X))
    with pytest.raises(OptionError, match="standardize: True then, False now"):
        model.set_params(standardize=False).partial_fit(X, target(X))
    with pytest.raises(OptionError, match="optimizer: 'auto' then, 'adam' now"):
        model.set_params(standardize=True, optimizer="adam").partial_fit(X, target(X))
    with pytest.raises(OptionError, match="learning_rate='cosine'"):
        SGDRegressor(learning_rate="cosine").partial_fit(X, target(X))
    with pytest.raises(SchemaError, match="2 columns, but training began with 1"):
        SGDRegressor().partial_fit(X, target(X)).partial_fit(X, np.column_stack([target(X)] * 2))


@pytest.mark.parametrize("optimizer", ["auto", "adagrad", "adam", "dowg"])
def test_a_warm_start_goes_on_as_partial_fit_does(optimizer: str) -> None:
    X = table(700)
    y = target(X)
    model = SGDRegressor(optimizer=optimizer, shuffle=False, tol=None, max_iter=3, warm_start=True).fit(X, y)
    other = copy.deepcopy(model).partial_fit(X, y)
    model.set_params(max_iter=1).fit(X, y)
    np.testing.assert_array_equal(model.coef_, other.coef_)
    assert model.t_ == other.t_
    assert (model.n_iter_, other.n_iter_) == (1, 4)
    assert model.loss_curve_ == other.loss_curve_[3:]


@pytest.mark.parametrize("optimizer", ["auto", "sgd", "adagrad", "adam", "dowg"])
def test_a_warm_start_does_not_leave_what_it_is_given(optimizer: str) -> None:
    X = table(5_000)
    y = target(X)
    model = SGDRegressor(optimizer=optimizer, max_iter=30, warm_start=True, eta0=0.01 if optimizer == "sgd" else "auto")
    model.fit(X, y)
    reached = np.mean((model.predict(X) - y) ** 2)
    cold = clone(model).set_params(max_iter=1).fit(X, y)
    model.coef_ = model.coef_ * (1 + 1e-9)  # no longer those of the kept state
    model.set_params(max_iter=1).fit(X, y)
    assert np.mean((model.predict(X) - y) ** 2) < reached + 0.01 * np.mean((cold.predict(X) - y) ** 2)


def test_a_warm_start_begins_with_the_attributes_as_they_are() -> None:
    X = table(500)
    y = target(X)
    plain = {"optimizer": "sgd", "eta0": 1e-12, "learning_rate": "constant", "max_iter": 1}
    model = SGDRegressor(**plain, warm_start=True).fit(X, y)
    model.coef_, model.intercept_ = np.arange(4.0), np.array([9.0])
    model.fit(X, y)
    np.testing.assert_allclose(model.coef_, np.arange(4.0), atol=1e-7)
    np.testing.assert_allclose(model.intercept_, [9.0], atol=1e-4)
    with pytest.raises(ValueError, match="expecting 4 features"):
        model.fit(X[:, :3], y)
    model.set_params(warm_start=False).fit(X[:, :3], y)
    assert model.n_features_in_ == 3


# --- randomness ------------------------------------------------------------------------------------------------------
def test_the_seed_decides_and_threads_do_not() -> None:
    X = table(20_000)
    y = target(X)

    def fit(**options: Any) -> Any:
        return SGDRegressor(max_iter=1, buffer="400kB", **options).fit(X, y)

    assert_same_fit(fit(), fit(random_state=0, n_threads=3))
    assert (fit(random_state=1).coef_ != fit().coef_).any()
    assert (fit(random_state=None).coef_ != fit(random_state=None).coef_).any()
    assert_same_fit(fit(random_state=np.random.RandomState(5)), fit(random_state=np.random.RandomState(5)))
    shared = np.random.RandomState(5)
    assert (fit(random_state=shared).coef_ != fit(random_state=shared).coef_).any()


# --- what comes out --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["predict", "predict_proba", "predict_log_proba", "decision_function"])
def test_sources_are_predicted_block_by_block(method: str) -> None:
    X = table(2_000)
    model = SGDClassifier(max_iter=2).fit(X, labels(X))
    found = getattr(model, method)(open_source(X))
    assert iter(found) is found
    np.testing.assert_array_equal(np.concatenate(list(found)), getattr(model, method)(X))


@pytest.mark.parametrize("kind", [SGDRegressor, SGDClassifier])
def test_scores_of_sources_are_those_of_arrays(kind: Any) -> None:
    X = table(2_000)
    y = labels(X) if kind is SGDClassifier else target(X, noise=30.0)
    weight = np.random.default_rng(3).uniform(size=len(X))
    model = kind(max_iter=2).fit(X, y)
    assert model.score(open_source(X, y)) == pytest.approx(model.score(X, y), rel=1e-12)
    weighted = model.score(open_source(X, y, weight=weight))
    assert weighted == pytest.approx(model.score(X, y, sample_weight=weight), rel=1e-12)
    assert weighted != model.score(X, y)


def test_an_unfitted_estimator_says_so() -> None:
    X = table(10)
    for method in ("predict", "score"):
        with pytest.raises(NotFittedError):
            getattr(SGDRegressor(), method)(open_source(X, target(X)))


def test_pickles_are_small_and_hold_no_data() -> None:
    X = np.random.default_rng(0).normal(size=(20_000, 30))
    model = SGDRegressor(max_iter=1).fit(open_source(X, X[:, 0]))
    stored = pickle.dumps(model)
    assert len(stored) < 30 * 8 * 10 + 4_000
    for twin in (pickle.loads(stored), copy.deepcopy(model)):
        assert_same_fit(twin, model)
        np.testing.assert_array_equal(twin.predict(X), model.predict(X))
        twin.partial_fit(X, X[:, 0])
        assert twin.n_iter_ == 2
        assert model.n_iter_ == 1
    assert not hasattr(clone(model), "coef_")


def test_lines_are_printed_where_they_are_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    X = table(300)
    SGDRegressor(max_iter=2).fit(X, target(X))
    assert capsys.readouterr().out == ""
    SGDRegressor(max_iter=2, verbose=1).fit(X, target(X))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("epoch 2/2: loss ")
    assert "explained" in lines[1]


def test_a_tolerance_that_was_not_reached_warns() -> None:
    X = table(300)
    with pytest.warns(ConvergenceWarning, match=r"tol=1e-12 when max_iter=2 epochs") as caught:
        SGDRegressor(max_iter=2, tol=1e-12).fit(X, target(X))
    assert caught[0].filename == __file__
    SGDRegressor(max_iter=2, tol=None).fit(X, target(X))
    SGDRegressor(max_iter=2).fit(X, target(X))


def test_a_feature_that_the_sample_misjudged_is_named() -> None:
    X = np.random.default_rng(0).normal(size=(120_000, 2))
    X[-100:, 1] = 1e6  # the survey looks at the heads of blocks
    with pytest.warns(UserWarning, match=r"spread of 1 feature.*number 1 .*standardize='full'") as caught:
        SGDRegressor(max_iter=1, tol=None).fit(X, X[:, 0])
    assert caught[0].filename == __file__


# --- within scikit-learn ---------------------------------------------------------------------------------------------
def test_grid_search_with_two_processes_and_checkpoints(tmp_path: Path) -> None:
    X = table(400)
    y = labels(X, ("no", "yes"))
    grid = {"alpha": [1e-4, 1e-1], "penalty": ["l2"], "max_iter": [1, 2]}
    search = GridSearchCV(SGDClassifier(checkpoint_dir=tmp_path), grid, n_jobs=2, cv=2, error_score="raise")
    search.fit(X, y)
    assert search.best_score_ > 0.8
    assert len(list(tmp_path.iterdir())) == 4 * 2 + 1  # every fit has a folder of its own
    assert search.best_estimator_.run_dir_.parent == tmp_path


def test_pipelines() -> None:
    X = table(400)
    pipeline = make_pipeline(PolynomialFeatures(2, include_bias=False), SGDRegressor(max_iter=50))
    assert pipeline.fit(X, target(X)).score(X, target(X)) > 0.99
    assert pickle.loads(pickle.dumps(pipeline)).predict(X[:3]).shape == (3,)


# --- options of the wrong kind ---
@pytest.mark.parametrize(
    "given",
    [
        {"alpha": "1"},
        {"alpha": float("inf")},
        {"alpha": [1.0]},
        {"l1_ratio": "1"},
        {"eta0": np.ones(2)},
        {"eta0": float("inf")},
        {"power_t": float("inf")},
        {"tol": float("inf")},
        {"tol": np.ones(2)},
        {"max_iter": np.ones(2)},
        {"batch_size": True},
        {"loss": []},
        {"optimizer": []},
        {"fit_intercept": None},
        {"fit_intercept": "no"},
        {"fit_intercept": np.ones(2)},
        {"nesterov": "yes", "optimizer": "sgd", "momentum": 0.9},
        {"standardize": np.ones(2)},
    ],
    ids=str,
)
def test_options_of_the_wrong_kind_are_named(given: dict[str, Any]) -> None:
    X = table(20)
    with pytest.raises(OptionError, match=f"^{next(iter(given))}="):
        SGDRegressor(**given).fit(X, target(X))


@pytest.mark.parametrize("weights", [np.ones(2), {"low": "heavy"}], ids=str)
def test_class_weights_of_the_wrong_kind_are_named(weights: Any) -> None:
    X = table(20)
    with pytest.raises(OptionError, match=r"^class_weight"):
        SGDClassifier(class_weight=weights).fit(X, labels(X))


def test_numbers_with_fractions_are_no_classes_in_a_source_either() -> None:
    X = table(150)
    with pytest.raises(DataError, match=r"continuous.*'y' holds .* and 149 other values.*train a regression"):
        SGDClassifier().fit(open_source(X, target(X)))


def test_the_advice_for_an_overflow_is_not_what_is_set_already() -> None:
    X = table(20)
    with pytest.raises(DivergenceError, match="target or the weights are so large"):
        SGDRegressor().fit(X, target(X) * 1e150)


def test_class_weights_of_classes_that_are_elsewhere() -> None:
    X = table(300)
    labels = (target(X) > 0).astype(int)
    model = SGDClassifier(class_weight={0: 1.0, 1: 2.0, 2: 3.0}).fit(X, labels)  # as in a fold
    assert model.coef_.tobytes() == SGDClassifier(class_weight={0: 1.0, 1: 2.0}).fit(X, labels).coef_.tobytes()
    with pytest.raises(OptionError, match="class_weight names the class 2, which the target does not have"):
        SGDClassifier(class_weight={0: 1.0, 2: 3.0}).fit(X, labels)


@pytest.mark.parametrize("kind", [int, bool])
def test_labels_that_are_objects_can_be_scored(kind: type) -> None:
    X = table(300)
    labels = np.array([kind(value > 0) for value in target(X)], dtype=object)
    assert SGDClassifier().fit(X, labels).score(X, labels) > 0.8


@pytest.mark.parametrize(
    ("options", "words"), [({"verbose": "a"}, "verbose='a'"), ({"checkpoint_dir": 5}, "checkpoint_dir=5")]
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_manners_that_are_none(method: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        getattr(SGDRegressor(**options), method)(table(30), target(table(30)))


class TestSparsity:
    """What l1 leaves is what the exact solution leaves."""

    def rows(self, n=8000):
        rng = np.random.default_rng(2)
        X = rng.normal(size=(n, 60))
        coef = np.zeros(60)
        coef[:5] = [3, -2, 1, 1, 0.5]
        return X, X @ coef + rng.normal(size=n)

    @pytest.mark.parametrize("options", [{}, {"n_lanes": 4}, {"optimizer": "adam"}, {"optimizer": "dowg"}])
    def test_of_a_regression(self, options):
        from sklearn.linear_model import Lasso

        X, y = self.rows()
        fitted = SGDRegressor(penalty="l1", alpha=0.05, **options).fit(X, y)
        exact = Lasso(alpha=0.05).fit(X / X.std(axis=0), y)
        assert ((fitted.coef_ == 0) == (exact.coef_ == 0)).mean() > 0.96
        np.testing.assert_allclose(fitted.coef_, exact.coef_ / X.std(axis=0), atol=0.03)

    @pytest.mark.parametrize("options", [{}, {"n_lanes": 4}])
    def test_of_a_classification(self, options):
        X, y = self.rows()
        fitted = SGDClassifier(loss="log_loss", penalty="l1", alpha=0.03, **options).fit(X, y > 0)
        assert (fitted.coef_[0, 5:] == 0).mean() > 0.96
        assert (fitted.coef_[0, :4] != 0).all()

    def test_on_features_as_they_are(self):
        X, y = self.rows()
        fitted = SGDRegressor(penalty="l1", alpha=0.3, standardize=False).fit(X, y)
        assert (fitted.coef_[5:] == 0).mean() > 0.8

    def test_coefficients_that_are_set_stay_about_there(self):
        """What was known of their signs was of others."""
        X, y = self.rows(2000)
        fitted = SGDRegressor(penalty="l1", alpha=0.3).fit(X[:, :3], y)
        for go_on in (fitted.partial_fit, fitted.set_params(warm_start=True, max_iter=1).fit):
            fitted.coef_ = np.array([-1.0, -2.0, 0.5])
            go_on(X[:256, :3], X[:256, :3] @ fitted.coef_)
            np.testing.assert_allclose(fitted.coef_, [-1.0, -2.0, 0.5], atol=0.1)

    def test_a_warm_start_goes_on(self):
        X, y = self.rows(2000)
        fitted = SGDRegressor(penalty="l1", alpha=0.1, warm_start=True, max_iter=20, tol=None).fit(X, y)
        before = fitted.coef_.copy()
        fitted.set_params(max_iter=1).fit(X, y)
        assert ((fitted.coef_ == 0) == (before == 0)).mean() > 0.95
        np.testing.assert_allclose(fitted.coef_, before, atol=0.02)

    def test_a_penalty_that_comes_and_goes(self):
        X, y = self.rows(2000)
        fitted = SGDRegressor().partial_fit(X, y)
        assert (fitted.coef_ != 0).all()
        for _ in range(10):
            fitted.set_params(penalty="l1", alpha=0.1).partial_fit(X, y)
        assert (fitted.coef_[5:] == 0).mean() > 0.9
        for _ in range(3):
            fitted.set_params(penalty=None).partial_fit(X, y)
        assert (fitted.coef_ != 0).all()
        again = SGDRegressor(penalty="l1", alpha=0.1, warm_start=True).fit(X, y).fit(X, y)
        assert (again.coef_[5:] == 0).mean() > 0.9


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.95])
def test_little_data_is_trained_until_it_is_learnt(quantile):
    """An epoch of 200 rows is one update, and five that bring nothing say nothing."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 3))
    y = X @ [1.0, 2.0, 0.0] + rng.exponential(size=200)
    options = {"loss": "quantile", "quantile": quantile}
    found, endless = (SGDRegressor(tol=tol, **options).fit(X, y) for tol in ("auto", None))
    assert found.n_iter_ < endless.n_iter_

    def loss(model):
        r = y - model.predict(X)
        return np.maximum(quantile * r, (quantile - 1) * r).mean()

    assert loss(found) < 1.02 * loss(endless)
    assert abs((y < found.predict(X)).mean() - quantile) < 0.03


def test_rows_without_weight_teach_nothing_more():
    X = table(60)
    fitted = SGDRegressor().partial_fit(X, target(X))
    before = fitted.coef_.copy()
    with pytest.raises(DataError, match="the sample weights are all zero"):
        fitted.partial_fit(X, target(X), sample_weight=np.zeros(60))
    assert (fitted.coef_ == before).all()
    fitted.partial_fit(X, target(X), sample_weight=[0.0] * 59 + [1.0])
    with pytest.raises(OptionError, match="expected at least one class"):
        SGDClassifier().partial_fit(X, target(X) > 0, classes=2)


@pytest.mark.parametrize("which", ["X", "y", "sample_weight"])
def test_what_is_masked_is_not_taken_for_a_value(which):
    X = table(60)
    given = {"X": X, "y": target(X), "sample_weight": np.ones(60)}
    given[which] = np.ma.masked_array(given[which], mask=np.zeros(given[which].shape))
    fitted = SGDRegressor().fit(**given)
    given[which][3] = np.ma.masked
    with pytest.raises(SchemaError, match=f"{which} has masked values; fill them first"):
        SGDRegressor().fit(**given)
    if which == "X":
        with pytest.raises(SchemaError, match="X has masked values"):
            fitted.predict(given["X"])
