"""Fits with a `checkpoint_dir`: where they write, how they go on, and `streamgd.load`."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

import streamgd
from streamgd import SGDClassifier, SGDRegressor, open_source
from streamgd.errors import CheckpointError, NonFiniteError, OptionError, ResumeError, RunLockedError, RunNotFoundError
from streamgd.estimators import base
from streamgd.learn import kernels
from streamgd.run.folder import RunFolder
from streamgd.run.rounds import RoundTraining
from streamgd.run.runs import Run


def table(n_rows: int = 3_000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n_rows, 5)) * [1.0, 9.0, 0.1, 1.0, 1.0] + [0.0, 5.0, 0.0, 0.0, 1.0]
    return X, X @ [1.0, -1.0, 8.0, 0.0, 0.5] + rng.normal(size=n_rows)


def labels(y: np.ndarray) -> np.ndarray:
    return np.array(["low", "mid", "high"])[np.digitize(y, [-9.0, 0.0])]


def regressor(folder: Path | None, **options: Any) -> SGDRegressor:
    """Return an estimator whose epochs take several windows."""
    return SGDRegressor(**{"max_iter": 4, "tol": None, "buffer": "150kB", "checkpoint_dir": folder, **options})


def assert_same_fit(one: Any, other: Any) -> None:
    np.testing.assert_array_equal(one.coef_, other.coef_)
    np.testing.assert_array_equal(one.intercept_, other.intercept_)
    assert one.loss_curve_ == other.loss_curve_
    assert (one.n_iter_, one.t_) == (other.n_iter_, other.t_)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Press Ctrl-C once, when a window of an epoch has been consumed; or not at all any more."""

    def arrange(epoch: int, window: int) -> None:
        pressed = False

        def advanced(self: Any, run: Run, stream: Any) -> None:
            nonlocal pressed
            if not pressed and run.state.cursor[:2] == (epoch, window):
                pressed = True
                raise KeyboardInterrupt

        monkeypatch.setattr(base._Announcer, "advanced", advanced)

    return arrange


def test_a_fit_leaves_a_run_folder_and_is_the_same_fit(tmp_path: Path) -> None:
    X, y = table()
    model = regressor(tmp_path).fit(X, y)
    assert_same_fit(model, regressor(None).fit(X, y))
    assert model.run_dir_.parent == tmp_path
    assert {path.name for path in model.run_dir_.iterdir()} >= {"config.json", "metrics.jsonl", "checkpoints"}
    assert model.run_dir_.name.endswith("-4")
    records = [json.loads(line) for line in (model.run_dir_ / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records if record["window"] is None] == model.loss_curve_
    assert model.partial_fit(X, y).run_dir_ is None  # what it knows now is in no folder


def test_every_fit_has_a_folder_of_its_own(tmp_path: Path) -> None:
    X, y = table()
    base_fit = regressor(tmp_path)
    variants = [
        base_fit.fit(X, y),
        clone(base_fit).fit(X, y + 1e-9),
        clone(base_fit).fit(X[:-1], y[:-1]),
        clone(base_fit).fit(X.astype(np.float32), y),
        clone(base_fit).fit(X, y, sample_weight=np.full(len(y), 2.0)),
        *(
            clone(base_fit).set_params(**options).fit(X, y)
            for options in ({"alpha": 1e-3}, {"max_iter": 3}, {"random_state": 1}, {"standardize": "full"})
        ),
    ]
    assert len({model.run_dir_ for model in variants}) == len(variants)
    again = clone(base_fit).set_params(verbose=0, n_threads=1, checkpoint_every_s=5.0).fit(X, y)
    assert again.run_dir_ == variants[0].run_dir_  # what changes no bit changes no name


@pytest.mark.parametrize("optimizer", ["auto", "sgd", "adam"])
@pytest.mark.parametrize("where", [(0, 0), (1, 2), (3, 0)])
def test_an_interrupted_fit_goes_on_as_if_nothing_had_been(
    where: tuple[int, int], optimizer: str, tmp_path: Path, interrupt: Callable[[int, int], None]
) -> None:
    X, y = table()
    options = {"optimizer": optimizer, "batch_size": 100, "eta0": "auto" if optimizer == "auto" else 0.001}
    whole = regressor(None, **options).fit(X, y)
    model = regressor(tmp_path, **options)
    interrupt(*where)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y)
    assert not hasattr(model, "coef_")
    assert_same_fit(model.fit(X, y, resume=True), whole)


def test_fit_starts_afresh_unless_told_to_resume(tmp_path: Path, interrupt: Callable[[int, int], None]) -> None:
    X, y = table()
    interrupt(2, 0)
    with pytest.raises(KeyboardInterrupt):
        regressor(tmp_path).fit(X, y)
    (folder,) = tmp_path.iterdir()
    before = RunFolder(folder).newest(pytest.fail)
    assert before is not None
    assert before.meta["cursor"][0] == 2
    interrupt(0, 1)
    with pytest.raises(KeyboardInterrupt):
        regressor(tmp_path).fit(X, y)
    after = RunFolder(folder).newest(pytest.fail)
    assert after is not None
    assert after.meta["cursor"][0] == 0


def test_resuming_a_finished_fit_changes_nothing(tmp_path: Path) -> None:
    X, y = table()
    model = regressor(tmp_path).fit(X, y)
    before = contents(tmp_path)
    again = clone(model).fit(X, y, resume=True)
    assert_same_fit(again, model)
    assert contents(tmp_path) == before
    converged = regressor(tmp_path, max_iter=200, tol=1e-2).fit(X, y)
    assert converged.n_iter_ < 200
    assert_same_fit(clone(converged).set_params(max_iter=300).fit(X, y, resume=True), converged)


def test_more_epochs_go_on_from_where_fewer_ended(tmp_path: Path) -> None:
    X, y = table()
    short = regressor(tmp_path, max_iter=2).fit(X, y)
    before = contents(short.run_dir_)
    longer = clone(short).set_params(max_iter=5).fit(X, y, resume=True)
    assert_same_fit(longer, regressor(None, max_iter=5).fit(X, y))
    assert longer.run_dir_ != short.run_dir_
    assert contents(short.run_dir_) == before
    first, all_of_them = ((each.run_dir_ / "metrics.jsonl").read_text() for each in (short, longer))
    assert all_of_them.startswith(first)  # the first two were not trained again: their times are the same
    assert {json.loads(line)["epoch"] for line in all_of_them[len(first) :].splitlines()} == {2, 3, 4}
    # Fewer epochs than there are in any other folder: from the beginning.
    fewer = clone(short).set_params(max_iter=1).fit(X, y, resume=True)
    assert_same_fit(fewer, regressor(None, max_iter=1).fit(X, y))


def test_resume_without_anything_to_resume_starts(tmp_path: Path) -> None:
    X, y = table()
    assert_same_fit(regressor(tmp_path).fit(X, y, resume=True), regressor(tmp_path).fit(X, y))


def test_what_cannot_be_resumed_is_said(tmp_path: Path) -> None:
    X, y = table()
    with pytest.raises(OptionError, match="resume=True needs a checkpoint_dir"):
        SGDRegressor().fit(X, y, resume=True)
    with pytest.raises(OptionError, match="random_state=None"):
        regressor(tmp_path, random_state=None).fit(X, y, resume=True)
    cosine = regressor(tmp_path, learning_rate="cosine").fit(X, y)
    with pytest.raises(ResumeError, match="'cosine'"):
        clone(cosine).set_params(max_iter=9).fit(X, y, resume=True)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path: Path) -> None:
    X, y = table()
    model = regressor(tmp_path).fit(X, y)
    newest, *_ = RunFolder(model.run_dir_).checkpoints.files()
    stored = bytearray(newest.read_bytes())
    stored[-20] ^= 1
    newest.write_bytes(stored)
    with pytest.warns(UserWarning, match="damaged.*trying the checkpoint before it"):
        assert streamgd.load(model.run_dir_).n_iter_ == 3
    with pytest.warns(UserWarning, match="damaged"):
        assert_same_fit(clone(model).fit(X, y, resume=True), model)
    for path in RunFolder(model.run_dir_).checkpoints.files():
        path.write_bytes(b"nothing")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="none of the 3 checkpoints"),
    ):
        clone(model).fit(X, y, resume=True)
    assert_same_fit(clone(model).fit(X, y), model)  # afresh


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    X, y = table()
    model = regressor(tmp_path).fit(X, y)
    before = contents(tmp_path)
    with RunFolder(model.run_dir_), pytest.raises(RunLockedError, match="in use"):
        clone(model).fit(X, y)
    assert contents(tmp_path) == before


def test_bad_data_late_in_the_first_epoch_keeps_what_was_learnt(tmp_path: Path) -> None:
    X, y = table(100_000)
    X[-1, 3] = np.nan
    with pytest.raises(NonFiniteError, match="row 99,999"):
        regressor(tmp_path, buffer="1MB", shuffle=False, standardize=False, optimizer="adagrad").fit(X, y)
    (folder,) = tmp_path.iterdir()
    assert streamgd.load(folder).t_ > 100


@pytest.mark.parametrize("kind", [SGDRegressor, SGDClassifier])
def test_load_gives_the_estimator_of_a_fit(kind: Any, tmp_path: Path) -> None:
    X, y = table()
    y = labels(y) if kind is SGDClassifier else y
    frame = pd.DataFrame(X, columns=list("abcde"))
    options = {"penalty": "l1", "alpha": 1e-3, "max_iter": 3, "random_state": 3, "batch_size": 64}
    if kind is SGDClassifier:
        options["class_weight"] = {"low": 2.0, "high": 0.5}
    model = kind(checkpoint_dir=tmp_path, **options).fit(frame, y)
    found = streamgd.load(model.run_dir_)
    assert type(found) is kind
    assert_same_fit(found, model)
    assert options.items() <= found.get_params().items()
    assert found.n_features_in_ == 5
    assert found.feature_names_in_.tolist() == list("abcde")
    assert found.run_dir_ == model.run_dir_
    np.testing.assert_array_equal(found.predict(frame), model.predict(frame))
    assert_same_fit(found.partial_fit(frame, y), model.partial_fit(frame, y))


def test_load_keeps_shape_and_type_of_targets(tmp_path: Path) -> None:
    X, y = table()
    for target in (y[:, None], np.column_stack([y, -y])):
        model = regressor(tmp_path).fit(X, target)
        assert streamgd.load(model.run_dir_).predict(X).shape == target.shape
    model = SGDClassifier(checkpoint_dir=tmp_path, max_iter=1).fit(X, y > 0)
    assert streamgd.load(model.run_dir_).predict(X).dtype == bool


def test_load_in_the_middle_of_an_epoch(tmp_path: Path, interrupt: Callable[[int, int], None]) -> None:
    X, y = table()
    interrupt(1, 1)
    with pytest.raises(KeyboardInterrupt):
        regressor(tmp_path, batch_size=100).fit(X, y)
    (folder,) = tmp_path.iterdir()
    before = contents(folder)
    found = streamgd.load(folder)
    state = found._trained.state
    n_open = int(state.counters[kernels.N_CARRY])
    assert n_open > 0
    assert found.n_iter_ == 1
    assert found.score(X, y) > 0.5
    updates = found.t_
    found.partial_fit(X[:250], y[:250])
    # The rows of the open batch are not lost: one update for them, then three for 250 rows.
    assert found.t_ == updates + 1 + 3
    assert found.n_iter_ == 3
    assert len(found.loss_curve_) == 3
    assert np.isfinite(found.loss_curve_).all()
    assert contents(folder) == before


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="holds no run"):
        streamgd.load(tmp_path)
    X, y = table(50)
    model = regressor(tmp_path).fit(X, y)
    for path in RunFolder(model.run_dir_).checkpoints.files():
        path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        streamgd.load(model.run_dir_)


def test_a_warm_start_has_a_folder_of_its_own_and_resumes(
    tmp_path: Path, interrupt: Callable[[int, int], None]
) -> None:
    X, y = table()
    model = regressor(tmp_path, warm_start=True).fit(X, y)
    plain = regressor(None, warm_start=True).fit(X, y).fit(X, y)
    first = contents(model.run_dir_)
    cold = model.run_dir_
    interrupt(2, 0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y)
    assert model.run_dir_ == cold
    assert contents(cold) == first
    assert_same_fit(model.fit(X, y, resume=True), plain)
    assert model.run_dir_ != cold


def test_sources_resume_too(tmp_path: Path, interrupt: Callable[[int, int], None]) -> None:
    X, y = table()
    source = open_source(X, y)
    whole = regressor(None).fit(source)
    interrupt(1, 0)
    with pytest.raises(KeyboardInterrupt):
        regressor(tmp_path).fit(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_fit(regressor(tmp_path).fit(open_source(X, y), resume=True), whole)


def test_fits_share_a_cache_and_go_on_with_it(tmp_path: Path, interrupt: Callable[[int, int], None]) -> None:
    X, y = table()
    cache = tmp_path / "cache"
    whole = regressor(None, cache=cache).fit(X, y)
    assert len(list(cache.glob("*/cache.json"))) == 1
    assert_same_fit(regressor(tmp_path / "runs", cache=str(cache)).fit(X, y), whole)
    assert_same_fit(clone(regressor(None, cache=cache)).fit(open_source(X, y)), whole)
    for epoch in (0, 2):
        interrupt(epoch, 1)
        folder = tmp_path / f"runs{epoch}"
        with pytest.raises(KeyboardInterrupt):
            regressor(folder, cache=tmp_path / "other").fit(X, y)
        interrupt(9, 9)
        assert_same_fit(regressor(folder, cache=tmp_path / "elsewhere").fit(X, y, resume=True), whole)
    assert (regressor(None).fit(X, y).coef_ != whole.coef_).any()


def test_a_cache_for_lanes_is_refused_before_a_run_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="a cache is for one lane on one machine"):
        regressor(tmp_path / "runs", cache=tmp_path / "cache", n_lanes=2).fit(*table())
    assert not (tmp_path / "runs").exists()


def test_runs_with_and_without_a_cache_do_not_meet(tmp_path: Path) -> None:
    X, y = table()
    with_one = regressor(tmp_path / "runs", cache=tmp_path / "cache").fit(X, y)
    without = regressor(tmp_path / "runs").fit(X, y, resume=True)
    assert with_one.run_dir_ != without.run_dir_
    assert_same_fit(without, regressor(None).fit(X, y))


def test_classes_and_weights_go_through_a_cache(tmp_path: Path) -> None:
    X, y = table()
    weight = np.random.default_rng(2).uniform(0, 2, len(y))
    options: dict[str, Any] = {"max_iter": 3, "tol": None, "buffer": "150kB", "shuffle": False}
    plain = SGDClassifier(**options).fit(X, labels(y), sample_weight=weight)
    cached = SGDClassifier(cache=tmp_path, **options).fit(X, labels(y), sample_weight=weight)
    assert_same_fit(cached, plain)
    assert list(cached.classes_) == ["high", "low", "mid"]


def test_partial_fit_makes_no_cache(tmp_path: Path) -> None:
    X, y = table()
    with_one, without = regressor(None, cache=tmp_path / "cache"), regressor(None)
    for _ in range(2):
        assert_same_fit(with_one.partial_fit(X, y), without.partial_fit(X, y))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": np.True_, "n_lanes": np.int64(2)},
        {"batch_size": np.int32(64), "alpha": np.float64(1), "average": np.True_, "standardize": np.True_},
        {
            "n_iter_no_change": np.int8(3),
            "random_state": np.int64(4),
            "fit_intercept": np.False_,
            "n_threads": np.int32(1),
        },
    ],
    ids=["run", "recipe", "ends"],
)
def test_parameters_may_be_numpys(tmp_path: Path, options: dict[str, Any]) -> None:
    X, y = table(300)
    plain = {name: value.item() for name, value in options.items()}
    one, other = (
        SGDRegressor(checkpoint_dir=tmp_path, max_iter=2, **given).fit(X, y, resume=True) for given in (options, plain)
    )
    assert one.run_dir_ == other.run_dir_


def test_equal_parameters_find_the_run_however_they_are_written(tmp_path: Path) -> None:
    X, y = table(300)
    labels = (y > 0).astype(int)
    written = [
        {"alpha": 1, "tol": 0, "class_weight": {0: 1, 1: 2}, "eta0": 1, "optimizer": "sgd"},
        {"alpha": 1.0, "tol": 0.0, "class_weight": {1: 2.0, 0: 1.0}, "eta0": 1.0, "optimizer": "sgd"},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        folders = {
            SGDClassifier(checkpoint_dir=tmp_path, penalty="l2", max_iter=2, **each).fit(X, labels).run_dir_
            for each in written
        }
    assert len(folders) == 1


def test_where_the_cache_lies_is_written_down(tmp_path: Path) -> None:
    X, y = table(300)
    model = SGDRegressor(checkpoint_dir=tmp_path / "runs", cache=tmp_path / "cache", max_iter=2).fit(X, y)
    assert json.loads((model.run_dir_ / "config.json").read_text())["cache"] == str(tmp_path / "cache")


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}], ids=["flat", "gzip"])
@pytest.mark.parametrize("buffer", ["300kB", "64MB"])
def test_a_file_is_free_as_soon_as_nobody_has_its_source(tmp_path: Path, buffer: str, options: dict[str, Any]) -> None:
    X, y = table()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("X", data=X, chunks=(300, 5) if options else None, **options)
        file["y"] = y
    gc.collect()
    gc.disable()
    try:
        SGDRegressor(max_iter=2, tol=None, buffer=buffer).fit(open_source(tmp_path / "a.h5", "y"))
        with h5py.File(tmp_path / "a.h5", "a") as file:
            file["predicted"] = y
    finally:
        gc.enable()


def test_a_longer_fit_has_the_records_of_the_one_it_goes_on_with(tmp_path: Path) -> None:
    X, y = table()

    def records(folder: Path, *epochs: int) -> list[dict[str, Any]]:
        for n in epochs:
            model = SGDRegressor(max_iter=n, tol=None, buffer="300kB", checkpoint_dir=folder).fit(X, y, resume=True)
        lines = (model.run_dir_ / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "wall_s"} for line in lines]

    whole = records(tmp_path / "whole", 4)
    assert {record["epoch"] for record in whole} == {0, 1, 2, 3}
    assert records(tmp_path / "parts", 2, 4) == whole


def test_a_round_that_is_interrupted_before_its_record_is_recorded(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(3000, 4))
    y = X @ [1.0, 2.0, 3.0, 4.0]

    def fit(folder, **options):
        made = SGDRegressor(max_iter=2, tol=None, n_lanes=2, checkpoint_dir=folder, buffer="100kB")
        return made.fit(X, y, **options)

    def records(folder):
        (path,) = folder.glob("*/metrics.jsonl")
        return [(record["epoch"], record["window"]) for record in map(json.loads, path.read_text().splitlines())]

    fit(tmp_path / "whole")
    real, n = RoundTraining._record, iter(range(100))

    def record(*arguments):
        if next(n) == 4:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(RoundTraining, "_record", record)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut")
    fit(tmp_path / "cut", resume=True)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
