"""Fits of Dask collections on clusters that have no workers, or are gone."""

from __future__ import annotations

import _thread
import threading
import time
from typing import Any

import dask.array as da
import numpy as np
import pytest

from streamgd import SGDRegressor
from streamgd.data.sources import dask_waiting
from streamgd.errors import ClusterError
from streamgd.run import asking
from tests.clustering import cluster

X = np.random.default_rng(0).normal(size=(2000, 3))


def slowly(block: np.ndarray) -> np.ndarray:
    time.sleep(0.3)
    return block


def fit(client: Any, *, slow: bool = False, timeout_s: float = 60.0) -> SGDRegressor:
    features = da.from_array(X, chunks=(250, -1))
    if slow:
        features = features.map_blocks(slowly, dtype=float)
    model = SGDRegressor(max_iter=2, n_lanes=2, tol=None)
    return model.fit(features, da.from_array(X[:, 0], chunks=250), client=client, workers_timeout_s=timeout_s)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("streamgd-survey")]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_waiting, "_LOOK_S", 0.1)
    monkeypatch.setattr(dask_waiting, "_SAY_AFTER_S", 0.2)


@pytest.mark.usefixtures("hurried")
def test_without_workers_the_wait_has_an_end() -> None:
    with (
        cluster(0) as (_, client),
        pytest.warns(UserWarning, match="no workers: waiting for some, up to 1 s"),
        pytest.raises(ClusterError, match="no worker for 1 s: start workers"),
    ):
        fit(client, timeout_s=1.0)


@pytest.mark.usefixtures("hurried")
def test_the_timeout_is_that_of_the_fit_on_the_default_client_too() -> None:
    with (
        cluster(0) as (_, client),
        client.as_current(),
        pytest.warns(UserWarning, match="no workers: waiting for some, up to 1 s"),
        pytest.raises(ClusterError, match="no worker for 1 s: start workers"),
    ):
        SGDRegressor().fit(da.from_array(X, chunks=(250, -1)), da.from_array(X[:, 0]), workers_timeout_s=1.0)


def test_workers_may_come_late() -> None:
    with cluster(0) as (made, client):
        threading.Timer(0.5, made.scale, [1]).start()
        found = fit(client)
    alone = SGDRegressor(max_iter=2, n_lanes=2, tol=None).fit(
        da.from_array(X, chunks=(250, -1)), da.from_array(X[:, 0], chunks=250)
    )
    assert found.coef_.tobytes() == alone.coef_.tobytes()


def test_an_interrupt_ends_it() -> None:
    with cluster(0) as (_, client):
        began = time.monotonic()
        threading.Timer(0.5, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            fit(client)
        assert time.monotonic() - began < 10


def test_a_client_that_is_closed() -> None:
    with cluster(1) as (_, client):
        asking.reports_of_workers(client, None, list(client.nthreads()))  # then they have imported what they need
        threading.Timer(0.5, client.close).start()
        with pytest.raises(ClusterError, match="what the cluster was computing is lost"):
            fit(client, slow=True)
