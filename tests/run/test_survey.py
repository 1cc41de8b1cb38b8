"""What is known before the first update: against NumPy, for every type of class, and wherever blocks end."""

from __future__ import annotations

import datetime
import decimal
import json
import pickle
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgd.data.sources import open_source
from streamgd.data.sources.memory import MemorySource
from streamgd.data.targets import ClassCounter
from streamgd.errors import DataError, NonFiniteError, OptionError, SchemaError
from streamgd.learn.losses import LOSSES
from streamgd.learn.moments import Moments
from streamgd.learn.recipe import Recipe
from streamgd.run import sample as module
from streamgd.run import survey_shares, survey_targets
from streamgd.run.config import Config
from streamgd.run.sample import SAMPLE_ROWS, sample_runs
from streamgd.run.survey import Survey, take_survey
from streamgd.run.survey_segments import look_at_features, look_at_labels, look_at_values
from tests.data.fake import FakeSource, repeatable

REGRESSIONS = [loss.name for loss in LOSSES.values() if loss.task == "regression"]
CLASSIFICATIONS = [loss.name for loss in LOSSES.values() if loss.task == "classification"]
N = 200


def regression(loss: str = "squared_error", **options: Any) -> Config:
    mine = {name: options.pop(name) for name in ("standardize", "class_weight") if name in options}
    return Config(recipe=Recipe(loss=loss, **options), **mine)


def classification(loss: str = "log_loss", **options: Any) -> Config:
    mine = {name: options.pop(name) for name in ("standardize", "class_weight") if name in options}
    return Config(recipe=Recipe(task="classification", loss=loss, **options), **mine)


def rows(n_outputs: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, targets and weights with nothing round about them."""
    rng = np.random.default_rng(seed)
    X = rng.normal([3.0, -2000.0, 0.1], [1.0, 5.0, 1e-3], size=(N, 3))
    y = rng.gamma(2.0, size=(N, n_outputs)) + 10
    return X, y[:, 0] if n_outputs == 1 else y, rng.uniform(0.1, 3.0, N)


def bits(survey: Survey) -> Any:
    arrays = {name: array.tobytes() for name, array in survey.to_tensors().items()}
    return arrays, json.dumps(survey.to_json(), sort_keys=True)


# --- targets of a regression -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_moments_of_targets_and_features(n_outputs: int, weighted: bool) -> None:
    X, y, weight = rows(n_outputs)
    w = weight if weighted else np.ones(N)
    found = take_survey(FakeSource([50] * 4, X, y, weight=weight if weighted else None), regression())
    Y = y.reshape(N, -1)
    mean = np.average(Y, axis=0, weights=w)
    np.testing.assert_allclose(found.target_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.target_scale, np.sqrt(np.average((Y - mean) ** 2, axis=0, weights=w)), rtol=1e-11)
    np.testing.assert_array_equal(found.start, found.target_mean)
    np.testing.assert_array_equal(found.output_scale(), found.target_scale)
    assert found.mean_weight == pytest.approx(w.mean(), rel=1e-14)
    x_mean = np.average(X, axis=0, weights=w)
    np.testing.assert_allclose(found.scaling.mean, x_mean, rtol=1e-12)
    np.testing.assert_allclose(
        found.scaling.scale, np.sqrt(np.average((X - x_mean) ** 2, axis=0, weights=w)), rtol=1e-9
    )
    assert found.n_sampled == N
    assert found.n_classes == 0
    assert found.class_factors.size == found.class_counts.size == 0


@pytest.mark.parametrize("loss", REGRESSIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_start_and_null_loss_of_regressions(loss: str, weighted: bool) -> None:
    X, y, weight = rows()
    w = weight if weighted else np.ones(N)
    config = regression(loss, epsilon=0.3, quantile=0.8)
    found = take_survey(FakeSource([N], X, y, weight=weight if weighted else None), config)
    start = found.start[0]
    if loss in ("quantile", "huber", "epsilon_insensitive"):
        share = 0.8 if loss == "quantile" else 0.5
        assert w[y <= start].sum() >= share * w.sum() - 1e-9 > w[y < start].sum() - 2e-9
        assert start in y
    else:
        assert start == pytest.approx(np.average(y, weights=w), rel=1e-13)
    r = start - y
    values = {
        "squared_error": r**2 / 2,
        "huber": np.where(abs(r) <= 0.3, r**2 / 2, 0.3 * abs(r) - 0.3**2 / 2),
        "epsilon_insensitive": np.maximum(0, abs(r) - 0.3),
        "squared_epsilon_insensitive": np.maximum(0, abs(r) - 0.3) ** 2,
        "quantile": np.maximum(-0.8 * r, 0.2 * r),
    }
    assert found.null_loss == pytest.approx(np.average(values[loss], weights=w), rel=1e-11)


def test_null_loss_of_several_targets_is_their_mean() -> None:
    X, y, _ = rows(3)
    for loss in ("squared_error", "huber"):
        whole = take_survey(FakeSource([N], X, y), regression(loss)).null_loss
        parts = [take_survey(FakeSource([N], X, y[:, k]), regression(loss)).null_loss for k in range(3)]
        assert whole == pytest.approx(np.mean(parts), rel=1e-12)


def test_a_target_that_never_changes() -> None:
    X, _, _ = rows()
    found = take_survey(FakeSource([N], X, np.full(N, 7.25)), regression())
    assert found.start.tolist() == [7.25]
    assert found.output_scale().tolist() == [1.0]
    assert found.null_loss == 0.0


@pytest.mark.parametrize(
    ("options", "starts_at_zero"),
    [
        ({}, False),
        ({"fit_intercept": False}, True),
        ({"optimizer": "sgd"}, False),
        ({"standardize": False}, False),
        ({"optimizer": "sgd", "standardize": False}, True),  # as scikit-learn poses it
        ({"learning_rate": "constant", "standardize": False}, True),
    ],
)
def test_when_the_intercept_starts_at_zero(options: dict[str, Any], starts_at_zero: bool) -> None:
    X, y, _ = rows()
    found = take_survey(FakeSource([N], X, y), regression(**options))
    assert (found.start[0] == 0) == starts_at_zero
    expected = np.mean((y - found.start[0]) ** 2) / 2
    assert found.null_loss == pytest.approx(expected, rel=1e-11)


def test_more_targets_than_the_sample_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a loss starts at a quantile, the quantile is that of a sample spread over all rows."""
    monkeypatch.setattr(module, "SAMPLE_ROWS", 50)
    y = np.arange(1000.0)
    found = take_survey(FakeSource([300, 1, 699], np.ones((1000, 1)), y), regression("quantile", quantile=0.9))
    assert found.start[0] == pytest.approx(900, abs=30)
    again = take_survey(FakeSource([7] * 142 + [6], np.ones((1000, 1)), y), regression("quantile", quantile=0.9))
    assert again.start.tobytes() == found.start.tobytes()
    assert again.null_loss == found.null_loss


# --- classes ---------------------------------------------------------------------------------------------------------
def cycled(values: list[Any]) -> list[Any]:
    """Give three rows to the first, two to the others."""
    return [values[0], *values, *values]


def as_objects(values: list[Any]) -> np.ndarray:
    found = np.empty(len(values), object)
    found[:] = values
    return found


CLASSES: dict[str, tuple[Any, list[Any]]] = {
    "int64": (np.array(cycled([-3, 0, 10**6])), [-3, 0, 10**6]),
    "large int64": (np.array(cycled([2**60, 2**60 + 1])), [2**60, 2**60 + 1]),
    "uint8": (np.array(cycled([7, 200]), np.uint8), [7, 200]),
    "float32": (np.array(cycled([3.0, -2.0]), np.float32), [-2.0, 3.0]),
    "bool": (np.array(cycled([True, False])), [False, True]),
    "text": (np.array(cycled(["b", "a", "ü"])), ["a", "b", "ü"]),
    "objects": (as_objects(cycled(["b", "a"])), ["a", "b"]),
    "bytes": (as_objects(cycled([b"b", b"a"])), [b"a", b"b"]),
    "days": (np.array(cycled(["2020-02-01", "2019-01-05"]), "datetime64[D]"), ["2019-01-05", "2020-02-01"]),
    "arrow text": (pa.array(cycled(["b", "a"])), ["a", "b"]),
    "arrow dictionary": (pa.array(cycled(["b", "a"])).dictionary_encode(), ["a", "b"]),
    "arrow bool": (pa.array(cycled([True, False])), [False, True]),
    "arrow decimal": (
        pa.array(cycled([decimal.Decimal("1.50"), decimal.Decimal("0.25")])),
        [decimal.Decimal("0.25"), decimal.Decimal("1.50")],
    ),
    "arrow time": (pa.array(cycled([datetime.time(9), datetime.time(8)])), [datetime.time(8), datetime.time(9)]),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_classes_of_every_type(kind: str) -> None:
    y, expected = CLASSES[kind]
    n = len(y)
    found = take_survey(FakeSource([2, n - 2], np.ones((n, 1)), y), classification())
    assert found.n_classes == len(expected)
    classes = found.codec.classes
    assert classes is not None
    assert [str(value) for value in classes.tolist()] == [str(value) for value in expected]
    first = 0 if kind in ("int64", "large int64", "uint8") else 1
    counts = [3 if k == first else 2 for k in range(len(expected))]
    assert found.class_counts.tolist() == found.class_weights.tolist() == counts
    again = Survey.restore(found.to_tensors(), json.loads(json.dumps(found.to_json())))
    assert bits(again) == bits(found)
    assert again.codec.classes is not None
    assert again.codec.classes.dtype == classes.dtype
    assert [type(value) for value in again.codec.classes.tolist()] == [type(value) for value in classes.tolist()]
    codes = again.codec.encode(y)[:, 0]
    assert np.bincount(codes.astype(int)).tolist() == counts


def labels(n_classes: int, seed: int = 1) -> np.ndarray:
    """Classes that are not equally frequent."""
    shares = np.arange(1, n_classes + 1) / np.arange(1, n_classes + 1).sum()
    return np.random.default_rng(seed).choice(n_classes, N, p=shares)


def formula(loss: str, p: np.ndarray) -> np.ndarray:
    """Loss of a decision value for the class it speaks for."""
    return {
        "log_loss": np.log1p(np.exp(-p)),
        "hinge": np.maximum(0, 1 - p),
        "squared_hinge": np.maximum(0, 1 - p) ** 2,
        "modified_huber": np.where(p >= -1, np.maximum(0, 1 - p) ** 2, -4 * p),
        "perceptron": np.maximum(0, -p),
    }[loss]


@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 0.5, 1: 4.0}])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("loss", CLASSIFICATIONS)
def test_start_and_null_loss_of_classifications(loss: str, n_classes: int, weighted: bool, class_weight: Any) -> None:
    X, _, weight = rows()
    y, w = labels(n_classes), weight if weighted else np.ones(N)
    source = FakeSource([120, 80], X, y, weight=weight if weighted else None)
    found = take_survey(source, classification(loss, class_weight=class_weight))
    sums = np.array([w[y == k].sum() for k in range(n_classes)])
    np.testing.assert_array_equal(found.class_counts, np.bincount(y))
    np.testing.assert_allclose(found.class_weights, sums, rtol=1e-13)
    assert found.mean_weight == pytest.approx(w.mean(), rel=1e-13)
    factors = {
        "None": np.ones(n_classes),
        "balanced": sums.sum() / (n_classes * sums),
        "dict": np.array([0.5, 4.0, 1.0])[:n_classes],
    }["dict" if isinstance(class_weight, dict) else str(class_weight)]
    if class_weight is None:
        assert found.class_factors.size == 0
    else:
        np.testing.assert_allclose(found.class_factors, factors, rtol=1e-13)
    share = sums * factors / (sums * factors).sum()
    if loss == "log_loss":
        expected = np.log(share[1:] / share[0]) if n_classes == 2 else np.log(share) - np.log(share).mean()
    elif loss == "perceptron":
        expected = np.zeros(1 if n_classes == 2 else n_classes)
    else:
        expected = 2 * (share[1:] if n_classes == 2 else share) - 1
    np.testing.assert_allclose(found.start, expected, rtol=1e-11, atol=1e-12)
    row_weight = w * factors[y]
    if loss == "log_loss" and n_classes == 3:
        losses = np.log(np.exp(found.start).sum()) - found.start[y]
    elif n_classes == 2:
        losses = formula(loss, np.where(y == 1, 1, -1) * found.start[0])
    else:  # one against the rest
        signs = np.where(y[:, None] == np.arange(3), 1, -1)
        losses = formula(loss, signs * found.start).mean(axis=1)
    assert found.null_loss == pytest.approx(np.average(losses, weights=row_weight), rel=1e-11)
    if loss == "log_loss":
        assert found.null_loss == pytest.approx(-(share * np.log(share)).sum(), rel=1e-11)


def test_classes_known_beforehand() -> None:
    X, _, _ = rows()
    y = labels(2)
    found = take_survey(FakeSource([N], X, y), classification(), classes=np.array([5, 1, 0]))
    assert found.codec.classes is not None
    assert found.codec.classes.tolist() == [0, 1, 5]
    assert found.class_counts.tolist() == [*np.bincount(y).tolist(), 0]
    assert np.isfinite(found.start).all()  # a class that was not seen does not start at minus infinity
    with pytest.raises(DataError, match="target 1 is none of the 2 known classes"):
        take_survey(FakeSource([N], X, y), classification(), classes=np.array([0, 5]))
    with pytest.raises(OptionError, match=r"balanced.*every class"):
        take_survey(FakeSource([N], X, y), classification(class_weight="balanced"), classes=np.array([0, 1, 5]))


@pytest.mark.parametrize(
    ("class_weight", "message"),
    [({9: 2.0}, r"names the class 9.*\[0, 1\]"), ({0: -1.0}, "class_weight of 0 is -1.0"), ({0: np.inf}, "is inf")],
)
def test_class_weights_that_cannot_be(class_weight: Any, message: str) -> None:
    X, _, _ = rows()
    with pytest.raises(OptionError, match=message):
        take_survey(FakeSource([N], X, labels(2)), classification(class_weight=class_weight))


def test_class_weights_of_labels_as_numpy_has_them() -> None:
    X, _, _ = rows()
    y = np.array(["no", "yes"])[labels(2)]
    config = classification(class_weight={np.str_("yes"): 3.0})
    found = take_survey(FakeSource([N], X, y), config)
    assert found.class_factors.tolist() == [1.0, 3.0]


# --- features --------------------------------------------------------------------------------------------------------
def test_silent_features_get_scale_one() -> None:
    """Without spread, in numbers that rounding makes look as if they had some."""
    X = np.ones((N, 4))
    X[:, 1] = 0.1
    X[:, 2] = 1e9 + 0.1
    X[:, 3] = np.random.default_rng(0).normal(1e9, 1.0, N)
    found = take_survey(FakeSource([30, 170], X, np.arange(N, dtype=float)), regression())
    assert found.scaling.scale[:3].tolist() == [1.0, 1.0, 1.0]
    assert found.scaling.scale[3] == pytest.approx(X[:, 3].std(), rel=1e-6)
    np.testing.assert_allclose(found.scaling.mean, X.mean(axis=0), rtol=1e-14)


def test_without_an_intercept_features_are_not_shifted() -> None:
    X, y, weight = rows()
    found = take_survey(FakeSource([N], X, y, weight=weight), regression(fit_intercept=False))
    assert found.scaling.mean.tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(found.scaling.scale, np.sqrt(np.average(X**2, axis=0, weights=weight)), rtol=1e-12)


def test_without_scaling_features_are_not_read() -> None:
    X, y, _ = rows()
    source = FakeSource([N], X, y)
    found = take_survey(source, regression(standardize=False))
    assert found.scaling.mean.tolist() == [0, 0, 0]
    assert found.scaling.scale.tolist() == [1, 1, 1]
    assert source.n_opened == found.n_sampled == 0


@pytest.mark.parametrize("columns", [False, True])
def test_a_sample_and_all_of_it(monkeypatch: pytest.MonkeyPatch, columns: bool) -> None:
    monkeypatch.setattr(module, "SAMPLE_ROWS", 60)
    X, y, weight = rows()
    source = FakeSource([50] * 4, X, y, weight=weight, columns=columns)
    sampled = take_survey(source, regression())
    picked = np.concatenate(
        [np.arange(50 * block + start, 50 * block + start + n) for block, start, n in sample_runs(source)]
    )
    assert 60 <= len(picked) == sampled.n_sampled < N
    np.testing.assert_allclose(sampled.scaling.mean, np.average(X[picked], axis=0, weights=weight[picked]), rtol=1e-12)
    whole = take_survey(source, regression(standardize="full"))
    assert whole.n_sampled == N
    np.testing.assert_allclose(whole.scaling.mean, np.average(X, axis=0, weights=weight), rtol=1e-12)
    # The target is not sampled.
    assert sampled.target_mean.tobytes() == whole.target_mean.tobytes()


@pytest.mark.parametrize("standardize", [True, "full"])
def test_blocks_read_side_by_side_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, standardize: Any
) -> None:
    """Whichever is there first: sums depend on the order of rows. And a block's own buffers serve the next one."""

    X, y, weight = rows()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, values in {"X": X, "y": y, "w": weight}.items():
            file.create_dataset(name, data=values, chunks=(16, *values.shape[1:]), compression="gzip")
    monkeypatch.setattr(module, "SAMPLE_ROWS", 60)
    source = open_source(tmp_path / "a.h5", "y", weight="w")
    found = {}
    for n_bytes in (0, 1 << 24):
        monkeypatch.setattr(module, "_READ_AHEAD_BYTES", n_bytes)
        found[n_bytes] = bits(take_survey(source, regression(standardize=standardize)))
    assert found[0] == found[1 << 24]


@pytest.mark.parametrize(("buffer_bytes", "ahead"), [(1 << 30, 2), (1 << 10, 0)], ids=["roomy", "tight"])
def test_blocks_are_read_ahead_within_the_buffer(
    monkeypatch: pytest.MonkeyPatch, buffer_bytes: int, ahead: int
) -> None:
    X, y, _ = rows()
    source = FakeSource([10] * 20, X, y)
    opened, added, most = [0], [0], [0]
    open_block, add = source.open_block, Moments.add

    def counted_open(*arguments: Any, **options: Any) -> Any:
        opened[0] += 1
        most[0] = max(most[0], opened[0] - added[0])
        return open_block(*arguments, **options)

    def slow_add(self: Moments, values: Any, weight: Any) -> None:
        if values.shape[1] == 3:  # features
            time.sleep(0.01)
            added[0] += 1
        add(self, values, weight)

    monkeypatch.setattr(source, "open_block", counted_open)
    monkeypatch.setattr(Moments, "add", slow_add)
    take_survey(source, Config(recipe=Recipe(), buffer_bytes=buffer_bytes))
    assert added[0] == 20
    assert most[0] == 1 + ahead


def test_the_first_bad_row_is_named_however_blocks_are_read() -> None:
    X, y, _ = rows()
    X[[70, 120], 1] = np.nan
    for _ in range(5):
        with pytest.raises(NonFiniteError, match="block 1, row 20"):
            take_survey(FakeSource([50] * 4, X, y), regression())


def test_a_sample_without_weight_leaves_features_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_ROWS", 10)
    X, y, _ = rows()
    weight = np.zeros(N)
    weight[-1] = 1.0
    found = take_survey(FakeSource([N], X, y, weight=weight), regression())
    assert found.scaling.scale.tolist() == [1.0, 1.0, 1.0]
    assert found.mean_weight == 1 / N


def test_wide_rows_are_read_in_small_pieces() -> None:
    X = np.random.default_rng(0).normal(size=(40, 70_000)).astype(np.float32)
    source = FakeSource([40], X, np.arange(40.0), columns=True)
    found = take_survey(source, regression())
    np.testing.assert_allclose(found.scaling.mean[::1000], X[:, ::1000].mean(axis=0), atol=1e-6)


def test_many_targets_are_surveyed_in_small_pieces(tmp_path: Path) -> None:
    n, n_targets = 12_000, 600
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X"] = np.ones((n, 1), np.float32)
        file.create_dataset("y", (n, n_targets), "f4", chunks=(100, n_targets), compression="lzf", fillvalue=3.0)
        file["y"][::100] = np.arange(n_targets)
    source = open_source(tmp_path / "a.h5", "y")
    tracemalloc.start()
    try:
        found = take_survey(source, regression("huber"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(found.target_mean, 2.97 + 0.01 * np.arange(n_targets), rtol=1e-12)
    assert peak < n * n_targets * 8 / 2


# --- where the sample is taken ---------------------------------------------------------------------------------------
def fake(block_rows: list[int], slice_cost_rows: int = 1) -> FakeSource:
    source = FakeSource(block_rows, np.zeros((sum(block_rows), 1), np.int8))
    source.slice_cost_rows = slice_cost_rows
    return source


BLOCKS = st.lists(st.integers(1, 60), min_size=1, max_size=40) | st.lists(
    st.sampled_from([1, 2, 3000]), min_size=1, max_size=12
)


@repeatable
@given(block_rows=BLOCKS, cost=st.sampled_from([1, 5, 10_000]), wanted=st.sampled_from([10, 64, 500]))
def test_sample_runs_properties(block_rows: list[int], cost: int, wanted: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAMPLE_ROWS", wanted)
        patch.setattr(module, "SAMPLE_BLOCKS", 8)
        source = fake(block_rows, cost)
        runs = list(sample_runs(source))
        assert runs == list(sample_runs(source))  # pure
    assert len({block for block, _, _ in runs}) == len(runs)
    assert runs == sorted(runs)
    assert all(start == 0 and 1 <= n <= block_rows[block] for block, start, n in runs)
    n_rows = sum(block_rows)
    total = sum(n for _, _, n in runs)
    if n_rows <= wanted:
        assert total == n_rows
    else:
        assert total == wanted


def test_the_sample_is_spread_over_the_source() -> None:
    source = fake([2000] * 500)
    runs = list(sample_runs(source))
    assert len(runs) == 64
    assert sum(n for _, _, n in runs) == SAMPLE_ROWS
    gaps = np.diff([block for block, _, _ in runs])
    assert gaps.min() >= 7
    assert gaps.max() <= 8


def test_few_blocks_are_opened_where_opening_costs_a_lot() -> None:
    """A sample of 6.5 % of the rows takes blocks that are read whole from few places, down to four."""
    assert len(list(sample_runs(fake([20_000] * 50, slice_cost_rows=20_000)))) == 4
    assert len(list(sample_runs(fake([20_000] * 500, slice_cost_rows=20_000)))) == 31
    assert len(list(sample_runs(fake([20_000] * 500)))) == 64


# --- where blocks end changes nothing --------------------------------------------------------------------------------
def cut(n: int) -> list[list[int]]:
    return [[n], [1] * n, [n - 1, 1], [3] * (n // 3) + [n % 3], [64, 64, n - 128]]


@pytest.mark.parametrize("loss", ["squared_error", "huber"])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_change_no_bit_of_a_regression(weighted: bool, loss: str) -> None:
    X, y, weight = rows(2)
    found = [
        bits(take_survey(FakeSource(blocks, X, y, weight=weight if weighted else None), regression(loss)))
        for blocks in cut(N)
    ]
    assert all(each == found[0] for each in found[1:])


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_change_no_bit_of_a_classification(weighted: bool, text: bool) -> None:
    """The weight of a class is a sum: it must be the same sum wherever blocks end."""
    X, _, weight = rows()
    y = np.array(["ash", "beech", "cedar"])[labels(3)] if text else labels(3)
    found = [
        bits(
            take_survey(
                FakeSource(blocks, X, y, weight=weight if weighted else None), classification(class_weight="balanced")
            )
        )
        for blocks in cut(N)
    ]
    assert all(each == found[0] for each in found[1:])


# --- segments --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["values", "labels", "features"])
@pytest.mark.parametrize("weighted", [False, True])
def test_segments_change_no_bit_wherever_blocks_end(kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_shares, "SEGMENT_ROWS", 64)
    X, y, weight = rows(2)
    config = regression(standardize="full" if kind == "features" else True)
    if kind == "labels":
        config = classification(class_weight="balanced")
    target, w = np.array(["ash", "beech", "cedar"])[labels(3)] if kind == "labels" else y, weight
    found = [take_survey(FakeSource(blocks, X, target, weight=w if weighted else None), config) for blocks in cut(N)]
    assert all(bits(each) == bits(found[0]) for each in found[1:])
    monkeypatch.undo()
    whole = take_survey(FakeSource([N], X, target, weight=w if weighted else None), config)
    np.testing.assert_allclose(found[0].target_mean, whole.target_mean, rtol=1e-14)
    np.testing.assert_allclose(found[0].target_scale, whole.target_scale, rtol=1e-13)
    np.testing.assert_allclose(found[0].scaling.scale, whole.scaling.scale, rtol=1e-9)
    assert found[0].n_sampled == N
    np.testing.assert_allclose(found[0].class_weights, whole.class_weights, rtol=1e-14)
    assert found[0].class_counts.tolist() == whole.class_counts.tolist()
    assert found[0].null_loss == pytest.approx(whole.null_loss, rel=1e-13)
    assert found[0].mean_weight == pytest.approx(whole.mean_weight, rel=1e-14)


@pytest.mark.parametrize("look", [look_at_values, look_at_labels, partial(look_at_features, buffer_bytes=1 << 20)])
def test_whoever_looks_at_a_segment_finds_the_same(look: Any) -> None:
    X, y, weight = rows()
    target = labels(3) if look is look_at_labels else y
    source = FakeSource([30] * 6 + [20], X, target, weight=weight)
    whole = list(look(source, 0, N, 64))
    parts = [*look(source, 0, 128, 64), *look(source, 128, 192, 64), *look(source, 192, N, 64)]
    assert [pickle.dumps(each) for each in parts] == [pickle.dumps(each) for each in whole]
    assert len(whole) == 4


def test_labels_of_several_kinds_come_together() -> None:
    """A column of objects may begin with numbers, and end with text that looks like them."""
    counters = []
    for piece in (np.array([1.0, 2.0]), np.array([2**60, 3]), pa.array([True, False]), np.array([3, 5], np.int8)):
        counters.append(ClassCounter())
        counters[-1].add(piece, np.array([0.5, 0.25]))
    whole = ClassCounter()
    for piece in (np.array([1.0, 2.0]), np.array([2**60, 3]), pa.array([True, False]), np.array([3, 5], np.int8)):
        whole.add(piece, np.array([0.5, 0.25]))
    joined = ClassCounter()
    for counter in counters:
        joined.join(counter)
    assert joined.classes.tolist() == whole.classes.tolist()
    assert joined.classes.dtype == whole.classes.dtype
    assert joined.counts.tolist() == whole.counts.tolist()
    assert joined.weight_sums.tolist() == whole.weight_sums.tolist()
    few = ClassCounter(max_classes=3)
    few.join(counters[0])
    with pytest.raises(DataError, match="more than 3 classes"):
        few.join(counters[1])


# --- what cannot be used ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["target", "weight", "feature"])
def test_numbers_that_are_not_finite_are_named(where: str, bad: float) -> None:
    X, y, weight = rows()
    {"target": y, "weight": weight, "feature": X[:, 1]}[where][77] = bad
    source = FakeSource([50] * 4, X, y, weight=weight)
    source.feature_names = ("a", "b", "c")
    with pytest.raises(NonFiniteError) as caught:
        take_survey(source, regression())
    message = str(caught.value)
    assert message.startswith("fake, block 1, row 27: ")
    assert {"target": "target 'y'", "weight": "the weight", "feature": "feature 'b'"}[where] in message
    assert ("NaN" if np.isnan(bad) else str(bad)).lower() in message.lower()


def test_a_feature_without_a_name() -> None:
    X, y, _ = rows()
    X[3, 2] = np.nan
    with pytest.raises(NonFiniteError, match="row 3: feature number 2 is NaN"):
        take_survey(FakeSource([N], X, y), regression())


@pytest.mark.parametrize("y", [np.array([0.0, 1.0, np.nan, 1.0]), pa.array(["a", "b", None, "a"])])
def test_a_missing_class_is_named(y: Any) -> None:
    with pytest.raises(NonFiniteError, match="block 1, row 0: the target 'y' is missing"):
        take_survey(FakeSource([2, 2], np.ones((4, 1)), y), classification())


def test_weights_that_cannot_be() -> None:
    X, y, weight = rows()
    weight[120] = -0.5
    with pytest.raises(NonFiniteError, match=r"block 2, row 20: the weight is -0\.5"):
        take_survey(FakeSource([50] * 4, X, y, weight=weight), regression())
    for config, target in ((regression(), y), (classification(), labels(2))):
        with pytest.raises(DataError, match="weights are all zero"):
            take_survey(FakeSource([N], X, target, weight=np.zeros(N)), config)


def test_labels_that_no_checkpoint_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_targets, "_MOST_LETTERS", 10)
    X, _, _ = rows()
    names = np.array(["a" * 5, "b" * 5], object)[labels(2)]
    take_survey(FakeSource([N], X, names), classification())
    with pytest.raises(DataError, match="the 2 classes of the target 'y' have 12 letters together, and 10 are the"):
        take_survey(FakeSource([N], X, names + "x"), classification())


def test_targets_that_do_not_serve_the_task() -> None:
    X, y, _ = rows()
    with pytest.raises(SchemaError, match="regression cannot fit: choose a numeric target, or train a classification"):
        take_survey(FakeSource([N], X, np.array(["a", "b"])[labels(2)]), regression())
    with pytest.raises(SchemaError, match="has 2 columns; a classification takes one"):
        take_survey(FakeSource([N], X, np.column_stack([y, y])), classification())
    with pytest.raises(DataError, match=r"greater than one; got 1 class \(4\) in the target 'y'"):
        take_survey(FakeSource([N], X, np.full(N, 4)), classification())
    with pytest.raises(DataError, match="no target was given"):
        take_survey(FakeSource([N], X, with_target=False), regression())


def test_a_survey_is_stored_whole() -> None:
    X, y, weight = rows(2)
    found = take_survey(MemorySource(X, y, weight=weight), regression())
    assert bits(Survey.restore(found.to_tensors(), json.loads(json.dumps(found.to_json())))) == bits(found)
