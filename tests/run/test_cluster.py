"""The same runs on worker processes, which are killed, join and leave: the same bits as here."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import distributed
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streamgd import errors
from streamgd.data.sources import dask_clients, open_source
from streamgd.data.sources.dask_clients import computing_on
from streamgd.errors import ClusterError, DataError, NonFiniteError, OptionError, UnfitWorkerError
from streamgd.learn import kernels
from streamgd.learn.recipe import Recipe
from streamgd.run import (
    asking,
    delivery,
    dispatch,
    flights,
    graph,
    members,
    pace,
    runs,
    survey_shares,
    worker_memory,
    workers,
)
from streamgd.run import cluster as cluster_module
from streamgd.run.checkpoint import CheckpointFolder
from streamgd.run.config import Config, RunOptions
from streamgd.run.epochs import Watcher
from streamgd.run.exchange import ApartError
from streamgd.run.loop import train
from streamgd.run.runs import prepare
from streamgd.run.survey import take_survey
from streamgd.run.turns import Span
from streamgd.run.versions import versions
from streamgd.run.worker_memory import WorkerMemory
from tests.clustering import (
    KINDS,
    N_EPOCHS,
    N_ROWS,
    OPTIMIZERS,
    Processes,
    await_workers,
    bits,
    cluster,
    estimator,
    fit,
    kill_worker,
    load,
    make_data,
)

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rows")
    make_data(made)
    return made


@pytest.fixture(scope="module")
def here(folder: Path) -> Any:
    """What runs without a cluster come to."""
    known: dict[tuple[str, str], Any] = {}

    def of(kind: str, optimizer: str = "auto") -> Any:
        if (kind, optimizer) not in known:
            known[kind, optimizer] = fit(folder, kind, optimizer)
        return known[kind, optimizer]

    return of


@pytest.fixture(scope="module")
def two() -> Any:
    with cluster(2) as made:
        yield made


@pytest.fixture(scope="class")
def two_to_kill() -> Any:
    """A client of two workers, and what kills and replaces these: a nanny may give up who is killed early."""
    with cluster(0) as (made, client):
        processes = Processes(made.scheduler_address, 2)
        yield client, processes
        processes.close()


@pytest.fixture(scope="module")
def four() -> Any:
    with cluster(4) as made:
        yield made


def task_states(client: Any) -> dict[str, int]:
    """Count what the scheduler still knows, once it has had time to forget."""
    for _ in range(50):
        found = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
        if not found:
            break
        time.sleep(0.05)
    return found


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamgd")]


def open_data_files() -> int:
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            found += descriptor.readlink().suffix in (".h5", ".parquet")
    return found


def records_of(path: Path) -> list[dict[str, Any]]:
    """Return what the only run in a folder has recorded, but for the time that it took."""
    (found,) = path.glob("*/metrics.jsonl")
    lines = map(json.loads, found.read_text().splitlines())
    return [{name: value for name, value in record.items() if name != "wall_s"} for record in lines]


#: Ways to hand rounds over: what `pace` is told.
SINGLY = {"_SHORT_BYTES": 0, "_SHARED_S": -1.0, "_FEW_GROUPS": 0}
CHAINED = {"_SHORT_BYTES": 0, "_SHARED_S": -1.0, "_FLIGHT_S": 100.0}
TOGETHER = {"_SHARED_S": 100.0}
#: As on one machine, where workers hand one another what they found without tasks: all else is as on several.
EXCHANGED = {"_EXCHANGED_S": 100.0}


def hand_over(monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]) -> None:
    if way is not EXCHANGED:
        monkeypatch.setattr(dispatch, "can_meet", lambda addresses: False)
    for name, value in way.items():
        monkeypatch.setattr(pace, name, value)


WAYS = {"chained": CHAINED, "together": TOGETHER, "exchanged": EXCHANGED}


@pytest.fixture(params=["chained", "exchanged"])
def rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand rounds over as tasks, several at once, and without tasks of their own."""
    hand_over(monkeypatch, WAYS[request.param])


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_bits_of_rounds_that_are_handed_over_one_by_one(two, folder, here, monkeypatch, kind):
    """With a task for each merge, as where many workers take part."""
    hand_over(monkeypatch, SINGLY)
    assert fit(folder, kind, client=two[1]) == here(kind)


def test_every_round_is_told_wherever_lane_0_is(two, folder, here, monkeypatch, tmp_path):
    """As after a worker joined whose address sorts before the others: `metrics.jsonl` is the same as without."""
    hand_over(monkeypatch, CHAINED)
    monkeypatch.setattr(
        members,
        "assign",
        lambda n_lanes, threads, before: {lane: max(threads) if lane < 2 else min(threads) for lane in range(n_lanes)},
    )

    fit(folder, "hdf5", checkpoint_dir=tmp_path / "here")
    assert fit(folder, "hdf5", client=two[1], checkpoint_dir=tmp_path / "there") == here("hdf5")
    assert records_of(tmp_path / "there") == records_of(tmp_path / "here")


def test_workers_read_for_who_plays_alone(four, folder, here, monkeypatch):
    """What is slow to decode: each lane where it belongs, one task after the other, as its reader goes on."""

    sends: list[tuple[Any, ...]] = []
    players: set[str] = set()

    class Recorded(dispatch.Graph):
        def add(self, key, address, priority, function, *arguments):
            if function is dispatch.send_rows:
                _, lanes, home, span, after = arguments
                assert home == address
                sends.append((tuple(lanes), address, span, isinstance(after, distributed.Future)))
            elif function is dispatch.play_short:
                players.add(address)
            return super().add(key, address, priority, function, *arguments)

    monkeypatch.setattr(dispatch, "Graph", Recorded)
    hand_over(monkeypatch, {**TOGETHER, "_MOST_TOGETHER": 5, "_LONG_S": 1e6})
    assert fit(folder, "hdf5", client=four[1]) == here("hdf5")
    assert not task_states(four[1])
    assert len(players) == 1
    assert all(address not in players for _, address, *_ in sends)
    by_lanes = {lanes: [rest for some, _, *rest in sends if some == lanes] for lanes, *_ in sends}
    assert len(by_lanes) == 3
    for found in by_lanes.values():
        assert len(found) > 4
        for (span, _), (following, after) in pairwise(found):
            assert (following.epoch, following.row) in ((span.epoch, span.end), (span.epoch + 1, 0))
            assert after


def pause(dask_worker: Any = None) -> None:
    from distributed import Status

    dask_worker.status = Status.paused


def test_nobody_waits_for_a_worker_that_is_paused(folder, here, monkeypatch):
    """Its lanes are read elsewhere."""
    hand_over(monkeypatch, TOGETHER)
    with cluster(2, memory_limit=0) as (_, client):
        fit(folder, "hdf5", client=client, max_iter=1)
        client.run(pause, workers=[max(client.nthreads())])
        found: list[Any] = []
        fitting = threading.Thread(target=lambda: found.append(fit(folder, "hdf5", client=client)), daemon=True)
        fitting.start()
        fitting.join(30)
        assert found == [here("hdf5")]


@pytest.mark.parametrize("kind", ["parquet", "dask"])
def test_what_is_quick_to_decode_is_not_sent(two, folder, here, monkeypatch, kind):
    def never(*arguments: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(dispatch, "send_rows", never)
    monkeypatch.setattr(dispatch.Dispatch, "_add_sent", never)
    hand_over(monkeypatch, TOGETHER)
    assert fit(folder, kind, client=two[1]) == here(kind)


def test_rows_are_not_sent_where_there_is_no_room_for_them(two, folder, here, monkeypatch):
    monkeypatch.setattr(members.Members, "has_room_to_send", False)
    hand_over(monkeypatch, TOGETHER)
    added = []
    monkeypatch.setattr(dispatch, "send_rows", lambda *arguments: added.append(arguments))
    assert fit(folder, "hdf5", client=two[1]) == here("hdf5")
    assert not added


@pytest.mark.parametrize("kind", KINDS)
def test_bits_on_four_workers_one_of_which_is_killed(four, folder, here, monkeypatch, kind):
    client = four[1]
    assert fit(folder, kind, client=client) == here(kind)
    hand_over(monkeypatch, CHAINED)
    await_workers(client, 4)
    killing = threading.Timer(0.2, kill_worker, (client, KINDS.index(kind)))
    killing.start()
    found = fit(folder, kind, client=client)
    killing.join()
    assert found == here(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_rounds_of_which_many_make_one_task(two, folder, here, monkeypatch, kind):
    hand_over(monkeypatch, TOGETHER)
    assert fit(folder, kind, client=two[1]) == here(kind)


@pytest.mark.usefixtures("rounds")
class TestBits:
    @pytest.mark.parametrize("kind", KINDS)
    def test_of_every_source(self, two, folder, here, kind):
        assert fit(folder, kind, client=two[1]) == here(kind)

    def test_with_room_for_a_few_rounds_in_a_task(self, two, folder, here, monkeypatch):
        hand_over(monkeypatch, TOGETHER)
        monkeypatch.setattr(pace, "_MOST_TOGETHER", 3)
        assert fit(folder, "hdf5", client=two[1]) == here("hdf5")

    def test_with_room_for_the_readers_of_one_lane(self, two, folder, here, monkeypatch):
        monkeypatch.setattr(WorkerMemory, "lanes_kept", lambda *_: 1)
        assert fit(folder, "hdf5", client=two[1]) == here("hdf5")

    @pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "auto"])
    def test_of_every_optimizer(self, two, folder, here, optimizer):
        assert fit(folder, "hdf5", optimizer, two[1]) == here("hdf5", optimizer)

    def test_of_a_single_lane(self, two, folder):
        said = "n_lanes=1: only 1 of the cluster's 2 threads will train"
        with pytest.raises(UserWarning, match=said):  # warnings are errors here
            fit(folder, "hdf5", client=two[1], n_lanes=1)
        assert not task_states(two[1])
        with pytest.warns(UserWarning, match=said):
            found = fit(folder, "hdf5", client=two[1], n_lanes=1)
        assert found == fit(folder, "hdf5", n_lanes=1)

    def test_of_arrays_in_memory(self, two, folder):
        X, y = (np.asarray(part) for part in load(folder, "dask"))
        assert bits(estimator().fit(X, y, client=two[1])) == bits(estimator().fit(X, y))

    @pytest.mark.parametrize("buffer", ["100kB", "200kB"])
    def test_of_collections_whose_turns_take_several_windows(self, two, folder, buffer):
        options = {"buffer": buffer, "batch_size": 128}
        assert fit(folder, "dask", client=two[1], **options) == fit(folder, "dask", **options)

    def test_of_what_is_made_of_a_persisted_array(self, two, folder):
        X, y = load(folder, "dask")
        X = two[1].persist(X)
        y = X.sum(axis=1)
        assert bits(estimator().fit(X[:, :3], y, client=two[1])) == bits(
            estimator().fit(load(folder, "dask")[0][:, :3], load(folder, "dask")[0].sum(axis=1))
        )

    def test_of_datasets_that_are_open(self, two, folder):
        """Dask has no hash of tasks that hold them, and computes them all the same."""
        import dask.array as da
        import h5py

        with h5py.File(folder / "rows.h5") as file:
            X, y = (da.from_array(file[name], chunks=(500, -1)[: file[name].ndim]) for name in "Xy")
            there = estimator().fit(X, y, client=two[1])
            some = estimator().fit(X[y > 0], y[y > 0], client=two[1])  # of unknown lengths
            predicted = np.concatenate(list(there.predict(X)))
            X, y = X.compute(), y.compute()
        assert bits(there) == bits(estimator().fit(da.from_array(X, chunks=(500, -1)), da.from_array(y, chunks=500)))
        np.testing.assert_allclose(predicted, there.predict(X))
        cuts = [int((y[first : first + 500] > 0).sum()) for first in range(0, len(y), 500)]
        X, y = da.from_array(X[y > 0], chunks=(tuple(cuts), -1)), da.from_array(y[y > 0], chunks=(tuple(cuts),))
        assert bits(some) == bits(estimator().fit(X, y))

    def test_of_persisted_data_of_unknown_lengths(self, two, folder):
        import dask.array as da
        import dask.dataframe as dd

        X, y = load(folder, "dask")
        kept = y > 0
        there = estimator().fit(X[kept].persist(), y[kept].persist(), client=two[1])
        cuts = tuple(int(kept.blocks[i].sum()) for i in range(kept.numblocks[0]))
        X, y = X.compute()[kept.compute()], y.compute()[kept.compute()]
        assert bits(there) == bits(estimator().fit(da.from_array(X, (cuts, -1)), da.from_array(y, (cuts,))))
        frame = dd.from_dask_array(da.from_array(X, (500, -1)), columns=list("abcde")).persist()
        frame = frame[frame["a"] > 1]
        some = estimator().fit(frame[["b", "c"]].to_dask_array().persist(), frame["a"].to_dask_array().persist())
        assert some.n_features_in_ == 2

    def test_nothing_of_a_collection_is_computed_here(self, two, folder, tmp_path):
        """Not for the survey either, though the client is not the process's default."""
        X, y = load(folder, "dask")

        def noted(block: Any) -> Any:
            if block.size:  # Dask tries it on nothing
                (tmp_path / f"{os.getpid()}").touch()
            return block

        estimator().fit(X.map_blocks(noted, dtype=X.dtype), y.map_blocks(noted, dtype=y.dtype), client=two[1])
        assert {path.name for path in tmp_path.iterdir()} <= {str(pid) for pid in two[1].run(os.getpid).values()}

    def test_of_a_data_frame(self, two, folder):
        import dask.dataframe as dd
        import pandas as pd

        X, y = (np.asarray(part) for part in load(folder, "dask"))
        frame = pd.DataFrame(X, columns=list("abcde")).assign(y=y)
        frame = dd.from_pandas(frame, npartitions=9)
        features, target = frame[list("abcde")], frame["y"]
        assert bits(estimator().fit(features, target, client=two[1])) == bits(estimator().fit(features, target))

    def test_on_one_worker_of_two_threads(self, folder, here):
        with cluster(1, threads_per_worker=2) as (_, client):
            assert fit(folder, "parquet", client=client) == here("parquet")

    def test_nothing_is_left_behind(self, two, folder):
        client = two[1]
        fit(folder, "hdf5", client=client)
        assert not task_states(client)
        for _ in range(100):
            left = [name for names in client.run(threads_of_ours).values() for name in names]
            files = sum(client.run(open_data_files).values())
            if not left and not files:
                break
            time.sleep(0.05)
        assert not left
        assert not files
        assert not threads_of_ours()


class StopAt(Watcher):
    """Stops a run once it has seen so many rows."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows, self.stop = n_rows, threading.Event()

    def advanced(self, run: Any, reading: Any) -> None:
        if int(run.state.counters[kernels.N_ROWS]) >= self.n_rows:
            self.stop.set()


def stop_in_mid_run(monkeypatch: pytest.MonkeyPatch, process: int) -> None:
    """Have a worker fall silent after a few rounds."""
    play, n = cluster_module.ClusterCrew.play, iter(range(10**6))

    def stopping(*arguments: Any) -> Any:
        if next(n) == 5:
            os.kill(process, signal.SIGSTOP)
        return play(*arguments)

    monkeypatch.setattr(cluster_module.ClusterCrew, "play", stopping)


class TestFaults:
    @pytest.mark.parametrize(
        ("way", "kind"),
        [
            *(("exchanged", kind) for kind in KINDS),
            *(("chained", kind) for kind in ("hdf5", "dask", "persisted")),
            ("together", "hdf5"),
        ],
    )
    def test_workers_are_killed(self, two_to_kill, folder, monkeypatch, way, kind):
        hand_over(monkeypatch, WAYS[way])
        (client, processes), rng = two_to_kill, random.Random(kind)
        await_workers(client, 2)
        expected = fit(folder, kind, max_iter=70)
        fit(folder, kind, client=client, max_iter=1)  # who starts takes its time
        killed: list[float] = []

        def kill() -> None:
            killed.append(time.monotonic())
            processes.kill(rng.randrange(2))

        killing = threading.Timer(rng.uniform(0.05, 0.3), kill)
        killing.start()
        found = fit(folder, kind, client=client, max_iter=70)
        ended = time.monotonic()
        killing.join()
        assert found == expected
        assert killed[0] < ended

    def test_all_workers_are_lost_and_others_come(self, folder, here):
        with cluster(1) as (made, client):

            def lose() -> None:
                time.sleep(0.3)
                made.scale(0)
                while client.nthreads():
                    time.sleep(0.05)
                time.sleep(4)
                made.scale(2)

            losing = threading.Thread(target=lose)
            losing.start()
            with pytest.warns(UserWarning, match="no workers: waiting for some"):
                found = fit(folder, "hdf5", client=client)
            losing.join()
            assert found == here("hdf5")

    def test_the_only_worker_is_lost_with_blocks_that_it_computed(self, folder, here):
        """They are computed on the next one, though they were to be computed on that one."""
        with cluster(0) as (made, client):
            processes = Processes(made.scheduler_address, 1)
            await_workers(client, 1)
            try:
                for _ in range(2):
                    client.run(slowed, 1.5)
                    found: list[Any] = []
                    fitting = threading.Thread(
                        target=lambda kept=found: kept.append(fit(folder, "dask", client=client)), daemon=True
                    )
                    fitting.start()
                    time.sleep(1)
                    processes.kill(0)
                    fitting.join(60)
                    assert found == [here("dask")]
                    await_workers(client, 1)
            finally:
                processes.close()

    def test_two_fits_of_one_collection_lose_all_workers(self, folder, here):
        """The blocks of either are its own: what waits for a worker that is gone, nobody else waits for."""
        X, y = load(folder, "dask")
        with cluster(0) as (made, client):
            processes = Processes(made.scheduler_address, 1)
            await_workers(client, 1)
            try:
                for _ in range(2):
                    client.run(slowed, 1.0)
                    found: list[Any] = []

                    def once(kept: list[Any] = found) -> None:
                        kept.append(bits(estimator().fit(X, y, client=client)))

                    fitting = [threading.Thread(target=once, daemon=True) for _ in range(2)]
                    for each in fitting:
                        each.start()
                        time.sleep(0.3)
                    time.sleep(0.7)
                    processes.kill(0)
                    for each in fitting:
                        each.join(60)
                    assert found == [here("dask")] * 2
                    assert dask.config.get("scheduler", None) is None  # which `Client.as_current` would leave behind
                    await_workers(client, 1)
            finally:
                processes.close()

    def test_a_cluster_that_adapts_starts_workers(self, folder, here):
        """It does so for tasks that wait."""
        with cluster(0) as (made, client):
            made.adapt(minimum=0, maximum=1, interval="100 ms")
            found = []
            fitting = threading.Thread(target=lambda: found.append(fit(folder, "parquet", client=client)), daemon=True)
            fitting.start()
            fitting.join(60)
            assert found == [here("parquet")]

    def test_a_worker_that_is_silent_gets_no_lanes(self, folder, here, monkeypatch):
        """Nor is it waited for in the end."""
        monkeypatch.setattr(asking, "ANSWER_S", 1.0)
        with cluster(0) as (made, client):
            processes = Processes(made.scheduler_address, 2)
            await_workers(client, 2)
            pids = client.run(os.getpid)
            try:
                os.kill(pids[min(pids)], signal.SIGSTOP)
                began = time.monotonic()
                with pytest.warns(UserWarning, match=f"worker {min(pids)} does not answer") as told:
                    assert fit(folder, "hdf5", client=client) == here("hdf5")
                assert time.monotonic() - began < 20
                assert told[0].filename.endswith("clustering.py")  # who called fit
            finally:
                os.kill(pids[min(pids)], signal.SIGCONT)
                processes.close()

    def test_a_worker_that_is_paused_gets_no_lanes(self, folder, here, monkeypatch):
        """Its tasks would wait for as long as it is paused, and the run for them."""
        monkeypatch.setattr(members, "_LOOK_IDLE_S", 0.2)
        monkeypatch.setattr(members, "_LOOK_S", 0.1)
        with cluster(2) as (_, client):
            paused = min(client.nthreads())
            client.run(_pause, workers=[paused])
            with pytest.warns(UserWarning, match=f"worker {paused} is paused by Dask, for lack of memory: it gets no"):
                assert fit(folder, "hdf5", client=client, max_iter=60) == fit(folder, "hdf5", max_iter=60)
            client.run(_pause)
            with (
                pytest.warns(UserWarning, match=r"all workers are idle \(.* is paused by Dask"),
                pytest.raises(ClusterError, match=r"all workers were idle \(tcp.* is paused by Dask.*\) for"),
            ):
                estimator().fit(*load(folder, "dask"), client=client, workers_timeout_s=2.2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises(ClusterError, match=r"no worker for .* that takes tasks \(tcp.* is paused by Dask"):
                    estimator().fit(*load(folder, "hdf5"), client=client, workers_timeout_s=1)

    def test_a_worker_that_falls_silent_has_its_lanes_taken_over(self, folder, monkeypatch):
        """Long before Dask gives it up."""
        monkeypatch.setattr(members, "_LOOK_IDLE_S", 0.3)
        monkeypatch.setattr(dask_clients, "SILENT_S", 3.0)
        monkeypatch.setattr(asking, "ANSWER_S", 1.0)
        with cluster(0) as (made, client):
            processes = Processes(made.scheduler_address, 2)
            await_workers(client, 2)
            pids = client.run(os.getpid)
            silent = max(pids)
            stop_in_mid_run(monkeypatch, pids[silent])
            try:
                began = time.monotonic()
                with pytest.warns(UserWarning, match=f"worker {silent} is silent for .* s: it gets no lanes"):
                    found = fit(folder, "hdf5", client=client, max_iter=100)
                assert time.monotonic() - began < 40  # who waits for its part is told to give up
                assert found == fit(folder, "hdf5", max_iter=100)
            finally:
                os.kill(pids[silent], signal.SIGCONT)
                processes.close()

    def test_all_that_fall_silent_are_not_waited_for_without_an_end(self, folder, monkeypatch):
        """There is nobody beside whom they would seem so."""
        monkeypatch.setattr(members, "_LOOK_IDLE_S", 0.3)
        monkeypatch.setattr(dask_clients, "SILENT_S", 2.0)
        monkeypatch.setattr(asking, "ANSWER_S", 1.0)
        monkeypatch.setattr(cluster_module, "_SAY_AFTER_S", 1.0)
        with cluster(0) as (made, client):
            processes = Processes(made.scheduler_address, 1)
            await_workers(client, 1)
            (process,) = client.run(os.getpid).values()
            stop_in_mid_run(monkeypatch, process)
            try:
                with (
                    pytest.warns(UserWarning, match="or do not answer. The run waits"),
                    pytest.warns(UserWarning, match=r"worker tcp.* is silent for \d s: it gets no lanes"),
                    pytest.raises(ClusterError, match=r"no worker for .* takes tasks \(tcp.* is silent for \d s"),
                ):
                    estimator(max_iter=100).fit(*load(folder, "hdf5"), client=client, workers_timeout_s=1)
            finally:
                os.kill(process, signal.SIGCONT)
                processes.close()

    @pytest.mark.parametrize("kind", ["parquet", "persisted"])
    def test_workers_join_and_retire(self, folder, kind):
        stop = threading.Event()
        with cluster(1) as (made, client):
            X, y = load(folder, kind)
            source = X if y is None else open_source(*client.persist([X, y]))
            run = prepare(source, Config(n_lanes=4, max_iter=10_000, tol=None, buffer_bytes=3_000_000))
            training = threading.Thread(target=train, args=(run,), kwargs={"client": client, "stop": stop})
            training.start()

            def after_more_epochs() -> None:
                until, epoch = time.monotonic() + 60, run.state.epoch
                while run.state.epoch < epoch + 5:
                    assert training.is_alive()
                    assert time.monotonic() < until
                    time.sleep(0.01)

            after_more_epochs()
            made.scale(3)
            await_workers(client, 3)
            after_more_epochs()
            client.retire_workers(sorted(client.nthreads())[:2])
            after_more_epochs()
            stop.set()
            training.join()
        source = X if y is None else open_source(X, y)
        again = prepare(source, Config(n_lanes=4, max_iter=10_000, tol=None, buffer_bytes=3_000_000))
        rounds = int(run.state.counters[kernels.N_ROWS])
        watcher = StopAt(rounds)
        assert train(again, watcher=watcher, stop=watcher.stop) is False
        for name, array in run.state.to_tensors().items():
            np.testing.assert_array_equal(again.state.to_tensors()[name], array, name)

    @pytest.mark.parametrize(
        ("kind", "way"),
        [
            *((kind, EXCHANGED) for kind in KINDS),
            ("hdf5", CHAINED),
            ("dask", CHAINED),
            ("hdf5", SINGLY),
            ("parquet", TOGETHER),
        ],
    )
    def test_the_client_is_killed_and_resumed_elsewhere(self, two, four, folder, here, kind, way, tmp_path):
        make_data(tmp_path)
        scheduler = two[0].scheduler_address
        command = [sys.executable, "-m", "tests.clustering", kind, str(tmp_path), scheduler, "auto", json.dumps(way)]
        child = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        run = tmp_path / f"run-{kind}-auto"
        until = time.monotonic() + 100
        while not (found := list(run.glob("*/checkpoints/*"))) or len(found) < 3:
            assert time.monotonic() < until
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (tmp_path / "done.txt").exists()
        (checkpoints,) = run.glob("*/checkpoints")
        assert 0 < int(CheckpointFolder(checkpoints).files()[0].name[5:23]) < N_EPOCHS * N_ROWS
        # Without any cluster, or on one of another size.
        resumed = fit(tmp_path, kind, client=four[1] if way in (CHAINED, EXCHANGED) else None, checkpoint_dir=run)
        assert resumed == here(kind)


def _pause(dask_worker: Any) -> None:
    """Pause this worker, and have nobody look whether it has memory again."""
    from distributed.core import Status

    dask_worker.memory_manager.memory_pause_fraction = False
    dask_worker.status = Status.paused


class TestSurvey:
    """The pass over targets and weights, in segments of which workers take some."""

    @pytest.fixture(autouse=True)
    def short_segments(self, monkeypatch):
        monkeypatch.setattr(survey_shares, "SEGMENT_ROWS", 100)
        monkeypatch.setattr(survey_shares, "_LEAST_SEGMENTS", 4)

    @pytest.fixture
    def fetched(self, monkeypatch):
        """What came from workers, share by share."""
        found: list[Any] = []
        real = survey_shares._fetched

        def note(future: Any) -> Any:
            found.append(real(future))
            return found[-1]

        monkeypatch.setattr(survey_shares, "_fetched", note)
        return found

    @pytest.fixture
    def idle(self, monkeypatch):
        """Have the client begin when the workers are done."""
        real = survey_shares._Shares.gathered

        def wait(shares: Any, n_threads: int) -> Any:
            for future in shares._futures:
                survey_shares._waited(future, 60)
            return real(shares, n_threads)

        monkeypatch.setattr(survey_shares._Shares, "gathered", wait)

    def survey(self, source: Any, client: Any, standardize: Any = True, **options: Any) -> Any:
        config = Config(Recipe(**options), standardize=standardize)
        with computing_on(client, 60):
            found = take_survey(source, config)
        return {name: array.tobytes() for name, array in found.to_tensors().items()}, found.to_json()

    @pytest.mark.parametrize("kind", ["hdf5", "parquet"])
    @pytest.mark.parametrize("standardize", [False, "full"])
    def test_workers_find_the_same(self, two, folder, kind, standardize, fetched, idle):
        source = load(folder, kind)[0]
        there = self.survey(source, two[1], standardize=standardize)
        assert there == self.survey(source, None, standardize=standardize)
        assert len(fetched) == (8 if standardize else 4)
        assert all(fetched)
        assert sum(len(each) for each in fetched) == (2 if standardize else 1) * N_ROWS // 100

    def test_labels_and_weights(self, two, tmp_path, fetched, idle):
        rng = np.random.default_rng(0)
        names = np.array(["ash", "beech", "cedar"])[rng.integers(0, 3, 1000)]
        table = pa.table({"x": rng.normal(size=1000), "y": names, "w": rng.uniform(0, 1, 1000)})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=130)
        source = open_source(tmp_path / "a.parquet", "y", weight="w")
        there = self.survey(source, two[1], task="classification", loss="log_loss")
        assert there == self.survey(source, None, task="classification", loss="log_loss")
        assert len(fetched) == 4
        assert all(fetched)

    @pytest.mark.parametrize("way", ["none", "busy", "other versions", "lost", "unreadable", "another file"])
    def test_the_client_does_what_workers_do_not(self, two, folder, monkeypatch, way, tmp_path, fetched, request):
        client = two[1]
        blocked: list[Any] = []
        source = load(folder, "hdf5")[0]
        if way == "none":
            monkeypatch.setattr(survey_shares, "threads_of_workers", lambda client: {})
        elif way == "busy":
            monkeypatch.setattr(survey_shares, "_LEAST_PATIENCE_S", 0.1)
            blocked = client.map(time.sleep, [3, 3.1], priority=100)
        elif way == "other versions":
            request.getfixturevalue("idle")
            here = versions()
            monkeypatch.setattr(survey_shares, "versions", lambda: here | {"numpy": "0.1"})
        elif way == "lost":
            request.getfixturevalue("idle")
            monkeypatch.setattr(survey_shares, "look_there", _fails)
        else:
            request.getfixturevalue("idle")
            (tmp_path / "rows.h5").write_bytes((folder / "rows.h5").read_bytes())
            source = open_source(tmp_path / "rows.h5", "y")
            list(source.iter_targets())  # from now on it is open here
            (tmp_path / "rows.h5").rename(tmp_path / "moved.h5")
            if way == "another file":
                make_data(tmp_path, n_rows=2 * N_ROWS)
        assert self.survey(source, client) == self.survey(source, None)
        assert not any(fetched)
        client.cancel(blocked, force=True)

    @pytest.mark.parametrize("row", [3, 1500, 2999])
    def test_what_is_wrong_is_said_as_without_a_cluster(self, two, tmp_path, row, idle):
        X, y = np.zeros((3000, 1), np.float32), np.arange(3000.0)
        y[[row, 2999]] = np.nan
        pq.write_table(pa.table({"x": X[:, 0], "y": y}), tmp_path / "a.parquet", row_group_size=225)
        source = open_source(tmp_path / "a.parquet", "y")
        with pytest.raises(errors.NonFiniteError) as there:
            self.survey(source, two[1])
        with pytest.raises(errors.NonFiniteError) as here:
            self.survey(source, None)
        assert str(there.value) == str(here.value)
        assert task_states(two[1]) == 0

    def test_fit_leaves_it_to_the_workers_of_its_client(self, two, folder, here, fetched, idle):
        assert fit(folder, "hdf5", client=two[1])["theta"] == fit(folder, "hdf5")["theta"]
        assert any(fetched)
        assert task_states(two[1]) == 0
        n = len(fetched)
        estimator().fit(load(folder, "hdf5")[0])  # with the default client, which was not asked for
        assert len(fetched) == n


def _fails(*_: Any) -> None:
    raise RuntimeError("a worker that does not know this")


class TestErrors:
    def test_a_damaged_file_ends_the_run_with_its_cause(self, two, tmp_path):
        make_data(tmp_path)
        import h5py

        with h5py.File(tmp_path / "rows.h5") as file:
            chunk = file["X"].id.get_chunk_info(18)  # a block that is not opened on trial
        content = bytearray((tmp_path / "rows.h5").read_bytes())
        content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\x55" * chunk.size
        (tmp_path / "rows.h5").write_bytes(content)
        X, _ = load(tmp_path, "hdf5")
        kept = X.fingerprint
        with pytest.raises(DataError, match=r"rows\.h5"):
            estimator(checkpoint_dir=tmp_path / "run", standardize=False).fit(X, client=two[1])
        assert X.fingerprint == kept
        assert not task_states(two[1])

    @pytest.mark.parametrize("error", [OSError("the tape is torn"), TimeoutError("the store does not answer")])
    def test_a_block_that_cannot_be_computed(self, two, folder, error):
        """Whatever it says: a task's own time-out is not a slow network's."""
        X, y = load(folder, "dask")

        def fails(block: Any, block_info: Any = None) -> Any:
            if block_info[0]["chunk-location"][0] == 17:
                raise error
            return block

        X = X.map_blocks(fails, dtype=X.dtype)
        with pytest.raises(DataError, match=f"{type(error).__name__}: {error}"):
            estimator(standardize=False).fit(X, y, client=two[1])

    def test_a_block_that_ends_every_worker_ends_the_run(self, folder, monkeypatch):
        monkeypatch.setattr(cluster_module, "_MOST_LOSSES", 2)
        X, y = load(folder, "dask")

        def fatal(block: Any, block_info: Any = None) -> Any:
            if block_info[0]["chunk-location"][0] == 17:
                os._exit(9)
            return block

        X = X.map_blocks(fatal, dtype=X.dtype)
        # Who sees a worker's end first, the look or the task that fails, is luck; five failed tasks end the run too.
        with cluster(2) as (_, client), pytest.raises(ClusterError, match=r"a round was lost [2-6] times"):
            estimator(standardize=False).fit(X, y, client=client)

    def test_a_block_that_cannot_be_computed_leaves_nothing_on_the_cluster(self, two, folder):
        """Not even while the error is kept, as a notebook keeps the last one."""

        def fails(block: Any, block_info: Any = None) -> Any:
            if block_info[0]["chunk-location"][0] == 17:
                raise OSError("the tape is torn")
            return block

        X, y = load(folder, "dask")
        source = open_source(X.map_blocks(fails, dtype=X.dtype), y)
        with two[1].as_current(), pytest.raises(DataError, match="the tape is torn") as kept:
            source.open_block(17)
        assert not task_states(two[1])
        assert kept.value.__cause__ is not None

    def test_targets_that_cannot_be_used_leave_nothing_on_the_cluster(self, two, folder):
        X, y = load(folder, "dask")
        y = y.map_blocks(lambda block: np.where(block > 0, block, np.nan), dtype=y.dtype)
        with pytest.raises(NonFiniteError, match="Dask block 0, row") as kept:
            estimator().fit(X, y, client=two[1])
        assert not task_states(two[1])
        assert kept.value is not None

    def test_a_worker_that_never_answers_is_named(self, folder, monkeypatch):
        def full(source: Any, dask_worker: Any = None) -> Any:
            raise OSError("No space left on device")

        monkeypatch.setattr(asking, "describe", full)
        X, _ = load(folder, "hdf5")
        with cluster(1) as (_, client), pytest.raises(ClusterError, match=r"no worker for .*No space left on device"):
            crew(X, client, RunOptions(workers_timeout_s=0.5), Watcher())

    @pytest.mark.parametrize("kind", [value for value in vars(errors).values() if isinstance(value, type)])
    def test_errors_come_back_as_they_are(self, kind):
        """As Dask sends them, with their tracebacks."""
        from distributed.protocol.pickle import dumps, loads

        try:
            try:
                raise OSError("the tape is torn")
            except OSError as cause:
                raise kind("what is wrong") from cause
        except errors.StreamgdError as error:
            found = loads(dumps(error))
        assert (type(found), str(found)) == (kind, "what is wrong")

    def test_files_that_workers_cannot_read(self, two, tmp_path):
        make_data(tmp_path)
        X, _ = load(tmp_path, "hdf5")
        (tmp_path / "rows.h5").rename(tmp_path / "moved.h5")

        with pytest.raises(ClusterError, match=r"worker tcp://127\.0\.0\.1:\d+ cannot read the data.*rows\.h5"):
            crew(X, two[1], RunOptions(), Watcher())

    @pytest.mark.parametrize("kind", ["hdf5", "parquet", "npy"])
    def test_workers_that_have_another_file(self, two, tmp_path, kind):
        make_data(tmp_path)
        X, _ = load(tmp_path, "hdf5" if kind == "npy" else kind)
        path, place = tmp_path / f"rows.{'h5' if kind == 'hdf5' else kind}", slice(-5000, -4000)
        if kind == "npy":
            with np.load(tmp_path / "rows.npz") as file:
                np.save(path, file["X"])
            X, place = open_source(np.load(path, mmap_mode="r"), np.zeros(N_ROWS)), slice(-40_000, -1000)
        content = bytearray(path.read_bytes())
        content[place] = bytes(len(content[place]))
        path.write_bytes(content)
        with pytest.raises(UnfitWorkerError, match=r"worker tcp://.* cannot read the data.*Error"):
            crew(X, two[1], RunOptions(), Watcher())

    def test_no_workers(self, folder):

        X, _ = load(folder, "hdf5")
        with cluster(0) as (_, client):
            with pytest.raises(ClusterError, match="no worker for"):
                crew(X, client, RunOptions(workers_timeout_s=0.5), Watcher())
            stop = threading.Event()
            threading.Timer(0.5, stop.set).start()
            waiting = crew(X, client, RunOptions(), Watcher(), stop)  # somebody pressed Ctrl-C: it gives up waiting
            assert waiting.play(None, None, Span(0, 0, 1), stop) is None
            waiting.close()

    def test_what_is_no_client(self, two, folder, tmp_path):
        for given in ("tcp://127.0.0.1:1", two[0], True):
            with pytest.raises(OptionError, match=r"client=.*: expected a distributed\.Client"):
                fit(folder, "hdf5", client=given, checkpoint_dir=tmp_path / "runs")
        from distributed import Client

        closed = Client(two[0], set_as_default=False)
        closed.close()
        with pytest.raises(ClusterError, match="the client is closed: connect anew"):
            fit(folder, "hdf5", client=closed, checkpoint_dir=tmp_path / "runs")
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize("kind", ["hdf5", "dask"])
    def test_too_little_memory(self, two, folder, monkeypatch, kind):
        """Before the survey, which takes a while and computes blocks."""
        monkeypatch.setattr(worker_memory, "PROCESS_BYTES", 10**15)
        monkeypatch.setattr(runs, "take_survey", None)
        with pytest.raises(ClusterError, match="of its memory limit where Dask moves data to disk or pauses it"):
            fit(folder, kind, client=two[1])

    def test_the_client_is_closed_while_workers_are_asked(self):
        """For some seconds, where they import what they need."""

        def ask_on(client: Any, addresses: list[str]) -> None:
            while True:
                asking.reports_of_workers(client, None, addresses)

        with cluster(1) as (_, client):
            addresses = list(client.nthreads())
            closing = threading.Timer(0.5, client.close)
            closing.start()
            with pytest.raises(ClusterError, match=r"the workers cannot be asked.*resume the run"):
                ask_on(client, addresses)
            closing.join()

    def test_other_versions(self, two, folder, monkeypatch):
        here = workers.versions()
        monkeypatch.setattr(workers, "versions", lambda: here | {"numba": "0.1"})
        with pytest.raises(ClusterError, match=r"numba .* there, 0\.1 here"):
            fit(folder, "hdf5", client=two[1])

    def test_a_scheduler_that_is_lost(self, folder, tmp_path):
        with cluster(1) as (made, client):
            errors: list[BaseException] = []

            def train() -> None:
                try:
                    fit(folder, "hdf5", client=client, checkpoint_dir=tmp_path / "run", max_iter=500)
                except ClusterError as err:
                    errors.append(err)

            training = threading.Thread(target=train)
            training.start()
            time.sleep(1.0)
            made.close()
            training.join(60)
            assert len(errors) == 1
            assert list((tmp_path / "run").glob("*/checkpoints/*"))


@pytest.mark.parametrize("how", ["interrupted", "lost"])
@pytest.mark.parametrize("kind", ["hdf5", "dask", "persisted"])
def test_what_is_dropped_takes_nothing_of_others_with_it(two, folder, here, monkeypatch, kind, how):
    """While a flight and the one behind it are under way: the client's other futures, and the client itself, stay."""
    hand_over(monkeypatch, CHAINED)
    error = KeyboardInterrupt() if how == "interrupted" else cluster_module._Again("a worker left", counts=False)
    finished, seen = cluster_module.ClusterCrew._finished, []

    def interrupted(self: Any, future: Any) -> bool:
        if not seen and self._next and self._next[-1].chained > 1 and future.status == "pending":
            seen.append(self._next[-1])
            raise error
        return finished(self, future)

    monkeypatch.setattr(cluster_module.ClusterCrew, "_finished", interrupted)
    own = two[1].submit(lambda: 42, pure=False)
    assert own.result() == 42
    with pytest.raises(KeyboardInterrupt) if how == "interrupted" else contextlib.nullcontext():
        # Most rounds of a flight are of interest to nobody but the next one.
        found = fit(folder, kind, client=two[1], max_iter=12)
    if how == "lost":
        assert found == fit(folder, kind, max_iter=12)
    assert seen
    time.sleep(0.5)
    assert own.status == "finished"
    assert two[1].submit(lambda: 1, pure=False).result(timeout=10) == 1
    own.release()
    own_blocks = 2 * 23 if kind == "persisted" else 0  # which the error's traceback holds
    assert task_states(two[1]) == own_blocks
    error.__traceback__ = None
    seen.clear()
    gc.collect()
    assert not task_states(two[1])


@pytest.fixture
def deliveries(monkeypatch):
    """What was handed over to bring blocks: the kind of each task, and the epoch where its rows begin."""
    found: list[tuple[str, int]] = []
    real = graph.Graph.add

    def noted(self: Any, key: Any, address: Any, priority: int, function: Any, *arguments: Any) -> Any:
        if function is flights.hold:
            found.append(("hold", key[1]))
        if function is flights.deliver:
            found.append(("all" if key[-1] else "some", key[1]))
        return real(self, key, address, priority, function, *arguments)

    monkeypatch.setattr(graph.Graph, "add", noted)
    return found


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How rounds were handed over, in order."""
    found: list[str] = []
    real = dispatch.Dispatch.hand_over

    def recorded(*arguments: Any, **options: Any) -> Any:
        flight = real(*arguments, **options)
        found.append(next((way for way in ("together", "exchanged") if getattr(flight.stretch, way)), "by tasks"))
        return flight

    monkeypatch.setattr(dispatch.Dispatch, "hand_over", recorded)
    return found


def wait_for_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the client wait until blocks that are kept are there, which it only looks for."""
    arrived = delivery.Deliveries.arrived.fget

    def patient(self: Any) -> bool:
        until = time.monotonic() + 20
        while self._all and not arrived(self) and time.monotonic() < until:
            time.sleep(0.01)
        return arrived(self)

    monkeypatch.setattr(delivery.Deliveries, "arrived", property(patient))


def _refuse_meeting(refuse: bool) -> None:
    from streamgd.run import exchange

    def refused(*_: Any) -> None:
        raise OSError("no sockets are left")

    if refuse:
        exchange._Meeting._real_meet = exchange._Meeting._meet
        exchange._Meeting._meet = refused
    else:
        exchange._Meeting._meet = exchange._Meeting._real_meet


def _set_patience(seconds: float) -> None:
    from streamgd.run import exchange

    exchange._MEET_S = seconds


class TestExchange:
    @pytest.mark.parametrize("kind", ["hdf5", "parquet", "persisted"])
    def test_workers_of_one_machine_need_no_tasks_for_rounds(self, two, folder, here, ways, kind):
        fit(folder, kind, client=two[1], max_iter=1)  # who starts takes its time
        ways.clear()
        assert fit(folder, kind, client=two[1]) == here(kind)
        assert set(ways) == {"exchanged"}
        assert not task_states(two[1])

    def test_but_until_blocks_are_there(self, two, folder, here, monkeypatch, ways):
        """Whoever waited for another one would keep the thread that computes what that one needs."""
        wait_for_blocks(monkeypatch)
        monkeypatch.setattr(pace, "_SHORT_BYTES", 0)
        assert fit(folder, "dask", client=two[1]) == here("dask")
        assert "exchanged" not in ways
        ways.clear()
        assert fit(folder, "sent", client=two[1]) == here("sent")
        assert ways[0] == "by tasks"
        assert ways[-1] == "exchanged"

    def test_also_where_dask_drops_replicas(self, two, folder, here, monkeypatch, ways):
        """As its memory manager does every two seconds with those of several that no task waits for."""
        fetched = cluster_module.ClusterCrew._fetched

        def dropping(self: Any, flight: Any) -> Any:
            found = fetched(self, flight)
            two[1].amm.run_once()
            time.sleep(0.05)
            return found

        monkeypatch.setattr(cluster_module.ClusterCrew, "_fetched", dropping)
        monkeypatch.setattr(pace.Pace, "may_chain", lambda *_: False)
        fit(folder, "hdf5", client=two[1], max_iter=1)
        ways.clear()
        assert fit(folder, "hdf5", client=two[1]) == here("hdf5")
        assert set(ways) == {"exchanged"}

    def test_there_is_one_work_of_a_run_in_a_process(self, folder):
        X, _ = load(folder, "hdf5")
        run = prepare(X, Config(n_lanes=2))
        pickled = pickle.dumps(flights.WorkerWork(run, run.source))
        made = pickle.loads(pickled)
        assert pickle.loads(pickled) is made
        assert flights.work_here(made.token) is made
        assert pickle.loads(pickle.dumps(flights.WorkerWork(run, run.source))) is not made

    def test_workers_may_know_themselves_by_a_name(self, monkeypatch):
        """As with ``dask worker --contact-address``: the scheduler knows them by a number."""
        monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(address="tcp://localhost:8790"))
        assert flights._is_at("tcp://127.0.0.1:8790")
        assert not flights._is_at("tcp://127.0.0.1:8791")

    def test_why_workers_came_apart_is_told(self, two, folder, here, ways):
        """Nobody else would know why rounds take longer."""
        client, said = two[1], []
        fit(folder, "parquet", client=client, max_iter=1)
        ways.clear()
        watcher = Watcher()
        watcher.note = said.append
        refused = max(client.nthreads())
        client.run(_refuse_meeting, True, workers=[refused])
        try:
            run = prepare(load(folder, "parquet")[0], estimator()._config(0))
            train(run, client=client, watcher=watcher)
        finally:
            client.run(_refuse_meeting, False, workers=[refused])
        assert ways[0] == "exchanged"
        assert ways[-1] != "exchanged"
        (told,) = [text for text in said if "by tasks" in text]
        assert "for 30 s, since an exchange failed" in told
        assert "no sockets are left" in told

    def test_blocks_that_came_stay_where_workers_do_not_meet(self, two, folder, monkeypatch, ways):
        """None is sent twice."""
        wait_for_blocks(monkeypatch)
        fetched, lost, held = cluster_module.ClusterCrew._fetched, [], []
        size = delivery.Deliveries._bytes_of
        monkeypatch.setattr(
            delivery.Deliveries, "_bytes_of", lambda self, blocks: (held.extend(blocks), size(self, blocks))[1]
        )

        def apart_at_times(self: Any, flight: Any) -> Any:
            rows = flight.stretch.rows
            if flight.stretch.exchanged and rows.epoch not in lost and rows.epoch in (1, 3):
                lost.append(rows.epoch)
                raise ApartError("nobody came")
            return fetched(self, flight)

        monkeypatch.setattr(cluster_module.ClusterCrew, "_fetched", apart_at_times)
        monkeypatch.setattr(dispatch, "_APART_S", 0.0)
        monkeypatch.setattr(pace, "_SHORT_BYTES", 0)
        assert fit(folder, "sent", client=two[1], max_iter=6) == fit(folder, "sent", max_iter=6)
        assert lost == [1, 3]
        assert sorted(held) == list(range(23))
        assert not task_states(two[1])

    def test_not_before_blocks_are_there(self, two, folder, monkeypatch, ways):
        """Workers would meet, or not, when those of the other have come."""
        monkeypatch.setattr(pace, "_SHORT_BYTES", 0)
        monkeypatch.setattr(delivery.Deliveries, "arrived", property(lambda self: not any(self._lane_bytes)))
        assert fit(folder, "sent", client=two[1], max_iter=3) == fit(folder, "sent", max_iter=3)
        assert set(ways) == {"by tasks"}
        ways.clear()
        fit(folder, "persisted", client=two[1], max_iter=3)
        assert set(ways) == {"exchanged"}

    @pytest.mark.parametrize(
        ("seconds", "after"), [(0.0, {"exchanged"}), (0.3, {"by tasks", "exchanged"}), (600.0, {"by tasks"})]
    )
    def test_what_is_persisted_is_read_in_place_again_some_time_after_a_loss(
        self, two, folder, monkeypatch, ways, deliveries, seconds, after
    ):
        monkeypatch.setattr(delivery, "_SENT_S", seconds)
        monkeypatch.setattr(pace, "_SHORT_BYTES", 0)
        look, epochs = cluster_module.ClusterCrew._look, []

        def lose(self: Any) -> None:
            if not epochs and ways and self._dispatch._flights > 4:
                epochs.append(len(ways))
                raise cluster_module._Again("a worker left", counts=False)
            look(self)

        monkeypatch.setattr(cluster_module.ClusterCrew, "_look", lose)
        fit(folder, "persisted", client=two[1], max_iter=1)
        ways.clear()
        epochs.clear()
        deliveries.clear()
        assert fit(folder, "persisted", client=two[1], max_iter=40) == fit(folder, "persisted", max_iter=40)
        assert epochs
        assert set(ways[: epochs[0]]) == {"exchanged"}
        assert set(ways[epochs[0] :]) == after
        assert "hold" not in {name for name, _ in deliveries}

    def test_blocks_are_sent_for_longer_only_after_losses_that_follow_one_another(self, monkeypatch):
        now = [1000.0]
        monkeypatch.setattr(delivery.time, "monotonic", lambda: now[0])
        some = SimpleNamespace(
            _sent_s=delivery._SENT_S, _sent_until=float("-inf"), _free=lambda: None, close=lambda: None
        )
        waits = []
        for passed in (0, 1, 1, 100, 2000, 31):
            now[0] += passed
            delivery.Deliveries.start_again(some)
            waits.append(some._sent_until - now[0])
        assert waits == [30, 30, 30, 60, 30, 60]

    def test_metrics_are_those_of_a_run_here(self, two, folder, here, tmp_path):
        for path, client in ((tmp_path / "here", None), (tmp_path / "there", two[1])):
            assert fit(folder, "parquet", client=client, checkpoint_dir=path) == here("parquet")
        assert records_of(tmp_path / "there") == records_of(tmp_path / "here")

    def test_threads_of_a_worker_take_part_too(self, folder, here, ways):
        with cluster(2, threads_per_worker=2) as (_, client):
            fit(folder, "hdf5", client=client, max_iter=1)
            ways.clear()
            assert fit(folder, "hdf5", client=client) == here("hdf5")
            assert fit(folder, "persisted", client=client) == here("persisted")
        assert set(ways) == {"exchanged"}

    def test_who_is_busy_with_other_tasks_is_not_waited_for(self, two, folder, here, ways):
        """Rounds are shared by tasks then, which wait as tasks do; nobody holds a thread meanwhile."""
        client = two[1]
        fit(folder, "parquet", client=client, max_iter=1)
        ways.clear()
        client.run(_set_patience, 0.2)
        try:
            busy = client.submit(time.sleep, 2.0, workers=[max(client.nthreads())], pure=False, priority=100)
            time.sleep(0.2)
            assert fit(folder, "parquet", client=client) == here("parquet")
            busy.result()
        finally:
            client.run(_set_patience, 2.0)
        assert ways[0] == "exchanged"
        assert ways[-1] != "exchanged"

    def test_blocks_are_read_in_place_though_workers_do_not_meet(self, two, folder, here, monkeypatch, ways):
        """Nothing is lost then."""
        fetched, computed = cluster_module.ClusterCrew._fetched, delivery._ComputedBlocks._computed
        flights_seen: list[Any] = []
        sent: list[int] = []

        def apart_once(self: Any, flight: Any) -> Any:
            flights_seen.append(flight.stretch)
            if len(flights_seen) == 1:
                raise ApartError("nobody came")
            return fetched(self, flight)

        def recorded(self: Any, blocks: Any, workers: Any) -> Any:
            sent.extend(blocks)
            return computed(self, blocks, workers)

        monkeypatch.setattr(cluster_module.ClusterCrew, "_fetched", apart_once)
        monkeypatch.setattr(delivery._ComputedBlocks, "_computed", recorded)
        assert fit(folder, "persisted", client=two[1]) == here("persisted")
        assert ways[0] == "exchanged"
        assert ways[-1] != "exchanged"
        assert not sent

    def test_fits_at_once(self, two, folder, here):
        """Each may get one of two threads, and wait for the other."""
        found: dict[str, Any] = {}
        fitting = [
            threading.Thread(target=lambda kind=kind: found.update({kind: fit(folder, kind, client=two[1])}))
            for kind in ("hdf5", "parquet", "dask", "persisted")
        ]
        for each in fitting:
            each.start()
        for each in fitting:
            each.join(60)
        assert found == {kind: here(kind) for kind in ("hdf5", "parquet", "dask", "persisted")}
        assert not task_states(two[1])

    def test_workers_are_left_as_they_were(self, two, folder):
        def sockets_and_threads() -> tuple[int, int]:
            names = [thread.name for thread in threading.enumerate() if thread.name.startswith("streamgd")]
            rows = map(str.split, Path("/proc/net/unix").read_text().splitlines())
            named = {f"socket:[{row[6]}]" for row in rows if row[-1].startswith("@streamgd-")}
            found = 0
            for descriptor in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(OSError):  # the one that lists them
                    found += str(descriptor.readlink()) in named
            return found, len(names)

        fit(folder, "hdf5", client=two[1])
        for _ in range(50):
            found = two[1].run(sockets_and_threads)
            if set(found.values()) == {(0, 0)}:
                break
            time.sleep(0.1)
        assert set(found.values()) == {(0, 0)}


class TestKeptBlocks:
    """Blocks of what is persisted, which cannot be read where they lie, stay with their lanes if there is room."""

    @pytest.mark.parametrize("way", [CHAINED, SINGLY], ids=["chained", "singly"])
    def test_they_are_brought_in_one_epoch_and_then_are_there(self, two, folder, monkeypatch, deliveries, way):
        hand_over(monkeypatch, way)
        held: list[int] = []
        size = delivery.Deliveries._bytes_of
        monkeypatch.setattr(
            delivery.Deliveries, "_bytes_of", lambda self, blocks: (held.extend(blocks), size(self, blocks))[1]
        )
        assert fit(folder, "sent", client=two[1], max_iter=4) == fit(folder, "sent", max_iter=4)
        assert [name for name, epoch in deliveries if epoch > 0 and name != "hold"] == ["all"] * 2
        assert sorted(held) == sorted(set(held))
        assert len(held) == 23  # each block, once
        assert not task_states(two[1])

    def test_flights_are_long_then(self, two, folder, monkeypatch):
        hand_over(monkeypatch, CHAINED)
        flown: list[Any] = []
        ended = pace.Pace.ended
        monkeypatch.setattr(
            pace.Pace, "ended", lambda self, stretch, *rest: (flown.append(stretch), ended(self, stretch, *rest))[1]
        )
        fit(folder, "sent", client=two[1], max_iter=4)
        rows = [max(each.rows.n_rows for each in flown if (each.rows.epoch > 0) is later) for later in (False, True)]
        assert rows[1] > rows[0]

    def test_not_without_room(self, two, folder, monkeypatch, deliveries):
        hand_over(monkeypatch, CHAINED)
        monkeypatch.setattr(members.Members, "have_room_beside", lambda *_: False)
        assert fit(folder, "sent", client=two[1], max_iter=3) == fit(folder, "sent", max_iter=3)
        assert {name for name, _ in deliveries} == {"some"}

    def test_not_what_has_to_be_computed_nor_for_a_single_epoch(self, two, folder, monkeypatch, deliveries):
        hand_over(monkeypatch, CHAINED)
        fit(folder, "dask", client=two[1], max_iter=3)
        fit(folder, "sent", client=two[1], max_iter=1)
        assert {name for name, _ in deliveries} == {"some"}

    def test_not_where_lanes_are_no_more(self, two, folder, monkeypatch, deliveries):
        """Lanes that go elsewhere, where there is no room for their blocks, leave none behind."""
        hand_over(monkeypatch, CHAINED)
        rooms, left = [True, False], []
        monkeypatch.setattr(members.Members, "have_room_beside", lambda _, n_bytes: not any(n_bytes) or rooms.pop(0))
        groups, kept = members.Members.groups, delivery.Deliveries.kept

        def elsewhere(self: Any) -> Any:
            found = groups(self)
            return found if rooms else [(lanes, at) for (lanes, _), (_, at) in zip(found, found[::-1], strict=True)]

        def asked(self: Any, now: Any, epoch: int) -> bool:
            if epoch == 3 and len(rooms) == 1:
                now = [(lanes, at) for (lanes, _), (_, at) in zip(now, now[::-1], strict=True)]
            found = kept(self, now, epoch)
            if not rooms and not left:
                for _ in range(100):
                    left.append(two[1].run(_kept_bytes, self._token))
                    if not any(left[-1].values()):
                        break
                    time.sleep(0.05)
            return found

        monkeypatch.setattr(members.Members, "groups", elsewhere)
        monkeypatch.setattr(delivery.Deliveries, "kept", asked)
        assert fit(folder, "sent", client=two[1], max_iter=6) == fit(folder, "sent", max_iter=6)
        assert left
        assert not any(left[-1].values())
        assert [name for name, _ in deliveries].count("all") == 2
        assert deliveries[-1][0] == "some"

    def test_not_after_a_loss(self, two, folder, monkeypatch, deliveries):
        """Nor does anything that waits on workers hold any: one that is paused for lack of memory would never go on."""
        hand_over(monkeypatch, CHAINED)
        crew, before, after = cluster_module.ClusterCrew, [], []
        look, start_again = crew._look, dispatch.Dispatch.start_again

        def lose(self: Any, **options: Any) -> None:
            held = not before and two[1].run(_kept_bytes, self._dispatch._lane_work.token)
            if held and all(held.values()):
                before.append(held)
                raise cluster_module._Again("a worker left", counts=False)
            look(self, **options)

        def started_again(self: Any, **options: Any) -> None:
            start_again(self, **options)
            for _ in range(100):
                after.append(two[1].run(_kept_bytes, self._lane_work.token))
                if not any(after[-1].values()):
                    break
                time.sleep(0.05)

        monkeypatch.setattr(crew, "_look", lose)
        monkeypatch.setattr(dispatch.Dispatch, "start_again", started_again)
        found = fit(folder, "sent", client=two[1], max_iter=40)
        assert found == fit(folder, "sent", max_iter=40)
        assert before
        assert not any(after[-1].values())
        assert [name for name, _ in deliveries].count("all") == 2
        assert deliveries[-1][0] == "some"
        assert not task_states(two[1])


class TestInPlace:
    """Blocks of what is persisted are not sent to workers that can read them where they lie."""

    @pytest.mark.parametrize("max_iter", [1, 3])
    def test_nothing_is_sent(self, two, folder, monkeypatch, deliveries, max_iter):
        hand_over(monkeypatch, CHAINED)
        assert fit(folder, "persisted", client=two[1], max_iter=max_iter) == fit(folder, "persisted", max_iter=max_iter)
        assert deliveries == [("all", 0)] * 2  # once for the lanes of each worker
        assert not task_states(two[1])

    def test_nor_where_one_worker_plays_alone(self, two, folder, here, monkeypatch, deliveries):
        hand_over(monkeypatch, TOGETHER)
        assert fit(folder, "persisted", client=two[1]) == here("persisted")
        assert {name for name, _ in deliveries} == {"some"}  # for the next rounds, of which nothing is a future
        assert not task_states(two[1])

    @pytest.mark.parametrize("way", [CHAINED, TOGETHER], ids=["chained", "together"])
    def test_what_some_worker_cannot_read_is_sent_to_it(self, two, folder, monkeypatch, deliveries, way):
        hand_over(monkeypatch, way)
        refused = min(two[1].nthreads())
        two[1].run(_refuse_reading, True, workers=[refused])
        try:
            found = fit(folder, "persisted", client=two[1], max_iter=3)
        finally:
            two[1].run(_refuse_reading, False, workers=[refused])
        assert found == fit(folder, "persisted", max_iter=3)
        if way is CHAINED:
            assert 0 < [name for name, _ in deliveries].count("hold") < 23
            assert [name for name, epoch in deliveries if epoch > 0 and name != "hold"] == ["all"] * 2
        assert not task_states(two[1])

    def test_what_is_shown_no_more_is_sent(self, two, folder, monkeypatch, deliveries):
        """As when Dask moves it to disk."""
        hand_over(monkeypatch, {**CHAINED, "_FLIGHT_S": 0.0})
        forgotten: list[int] = []
        kept = delivery.Deliveries.kept

        def forget(self: Any, groups: Any, epoch: int) -> bool:
            if epoch == 3 and not forgotten:
                forgotten.append(epoch)
                self._in_place._shown.release()
                time.sleep(0.2)
            return kept(self, groups, epoch)

        monkeypatch.setattr(delivery.Deliveries, "kept", forget)
        assert fit(folder, "persisted", client=two[1], max_iter=8) == fit(folder, "persisted", max_iter=8)
        assert forgotten
        assert [name for name, _ in deliveries].count("all") == 2
        assert deliveries[-1][0] == "some"
        assert not task_states(two[1])

    def test_nobody_fetches_what_a_lost_worker_showed(self, two, folder):
        """Another worker would have to take all of it at once, for nobody."""
        client = two[1]
        await_workers(client, 2)
        X, y = client.persist(list(load(folder, "dask")))
        source = open_source(X, y)
        assert len(source.shown(client).owners) == 2
        kill_worker(client)
        until = time.monotonic() + 60

        def shown(dask_scheduler: Any) -> list[str]:
            return sorted(task.state for key, task in dask_scheduler.tasks.items() if "show-blocks" in str(key))

        while len(client.nthreads()) < 2 or client.run_on_scheduler(shown) == ["memory", "memory"]:
            assert time.monotonic() < until
            time.sleep(0.05)
        client.gather(distributed.futures_of([X, y]))
        assert client.run_on_scheduler(shown) == ["memory", "no-worker"]
        source.close()
        del source, X, y
        assert not task_states(client)

    def test_rows_of_several_threads_stay_apart(self, folder, here, monkeypatch):
        """Each reads into a buffer of its own."""
        hand_over(monkeypatch, CHAINED)
        with cluster(2, threads_per_worker=3) as (_, client):
            assert fit(folder, "persisted", client=client) == here("persisted")


def _refuse_reading(refuse: bool) -> None:
    """Have a worker be on a system that does not let it read others."""
    from streamgd.data.sources import neighbours

    if refuse:
        neighbours._known_call = neighbours._system_call
        neighbours._system_call = lambda: None
    else:
        neighbours._system_call = neighbours._known_call


def _kept_bytes(token: bytes) -> int:
    """Count what readers on a worker hold of blocks that were to stay."""
    work = flights.work_here(token)
    if work is None:
        return 0
    readers = [*work.readers._idle.values(), *work.readers._out]
    return sum(each.n_bytes for reader in readers for each in reader._deliveries)


@pytest.mark.parametrize(("kind", "most"), [("hdf5", 1), ("dask", 2)])
def test_a_few_flights_are_under_way(two, folder, monkeypatch, kind, most):
    """Of a collection, for which each is a single round, one more: no worker waits for the client."""
    hand_over(monkeypatch, CHAINED)
    behind, handed_over = [], cluster_module.ClusterCrew._hand_over_next

    def noted(self: Any, *args: Any) -> None:
        handed_over(self, *args)
        behind.append(len(self._next))

    monkeypatch.setattr(cluster_module.ClusterCrew, "_hand_over_next", noted)
    assert fit(folder, kind, client=two[1], max_iter=4) == fit(folder, kind, max_iter=4)
    assert max(behind) == most


@pytest.mark.parametrize("kind", ["hdf5", "dask", "persisted"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("auto", {"tol": 1e-2, "n_iter_no_change": 2}),
        ("sgd", {"tol": 1e-2, "n_iter_no_change": 1, "learning_rate": "adaptive"}),
        ("adam", {}),
    ],
)
def test_rounds_go_on_into_the_next_epoch(two, folder, monkeypatch, kind, optimizer, options):
    """Workers close epochs as the client does, which may find then that the run has ended."""
    hand_over(monkeypatch, CHAINED)
    went_on, handed_over = [], dispatch.Dispatch.hand_over

    def noted(self: Any, start: Any, packed: Any, epoch: int, row: int, *, behind: Any) -> Any:
        went_on.append(behind is not None and behind.stretch.rows.epoch < epoch)
        return handed_over(self, start, packed, epoch, row, behind=behind)

    monkeypatch.setattr(dispatch.Dispatch, "hand_over", noted)
    there = fit(folder, kind, optimizer, two[1], max_iter=30, **options)
    assert there == fit(folder, kind, optimizer, max_iter=30, **options)
    assert sum(went_on) >= 3
    assert not task_states(two[1])


def test_workers_in_this_process_close_epochs_of_their_own(folder, monkeypatch):
    """Objects are not copied on their way from there; what the client changes of a state must not be theirs."""
    hand_over(monkeypatch, CHAINED)
    changed, closed_epoch = [], flights.closed_epoch

    def slowly(state: Any, *rest: Any) -> Any:
        before = state.epoch, len(state.loss_curve)
        time.sleep(0.05)
        changed.append((state.epoch, len(state.loss_curve)) != before)
        return closed_epoch(state, *rest)

    monkeypatch.setattr(flights, "closed_epoch", slowly)
    with cluster(1, processes=False, host=None) as (_, client):
        there = fit(folder, "hdf5", client=client, max_iter=6, n_lanes=1)
        assert client.scheduler.address.startswith("inproc")
    assert there == fit(folder, "hdf5", max_iter=6, n_lanes=1)
    assert len(changed) >= 3
    assert not any(changed)


def test_a_run_that_converges_leaves_no_errors_on_workers(two, folder, monkeypatch):
    """What is under way then, into the next epoch, leaves off."""
    hand_over(monkeypatch, CHAINED)
    for n_lanes in (1, 4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(folder, "hdf5", client=two[1], n_lanes=n_lanes, max_iter=50, tol=1e9, n_iter_no_change=1)
    time.sleep(0.3)
    logs = [text for said in two[1].get_worker_logs().values() for _, text in said]
    assert not [text for text in logs if "Stopped" in text]


def crew(source: Any, client: Any, options: Any, watcher: Any, stop: threading.Event | None = None) -> Any:
    from streamgd.run.cluster import ClusterCrew
    from streamgd.run.config import Config
    from streamgd.run.runs import Run, first_state, plan_for
    from streamgd.run.survey import Scaling, Survey
    from tests.run import small

    config = Config(n_lanes=2)
    survey: Survey = small.begin_small().survey
    assert Scaling
    return ClusterCrew(
        Run(source, config, survey, plan_for(source, config), first_state(source, config, survey)),
        client,
        options,
        watcher,
        stop or threading.Event(),
    )


def slowed(seconds: float, module: str = "streamgd.run.flights") -> None:
    """Let whoever plays rounds alone take longer, or as long as ever."""
    import importlib

    flights: Any = importlib.import_module(module)
    play = flights.__dict__.setdefault("_play_as_ever", flights.play_rounds)

    def later(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return play(*arguments, **options)

    flights.play_rounds = later if seconds else play


@pytest.mark.parametrize("default", [True, False], ids=["default", "not the default"])
def test_rounds_may_take_long_whichever_client_is_the_default(two, folder, here, monkeypatch, default):
    """Longer than it may take to fetch a state that is there."""

    client = two[1]
    monkeypatch.setattr(distributed.client, "_global_clients", {0: client} if default else {})
    monkeypatch.setattr(cluster_module, "_FETCH_S", 0.2)
    hand_over(monkeypatch, TOGETHER)
    monkeypatch.setattr(cluster_module, "_SAY_AFTER_S", 0.4)
    client.run(slowed, 0.7)
    try:
        with pytest.warns(UserWarning, match=r"no round has ended for \d s") as told:
            assert fit(folder, "parquet", client=client, max_iter=1) == fit(folder, "parquet", max_iter=1)
        assert len(told) == 1
    finally:
        client.run(slowed, 0)


@pytest.mark.parametrize("answer", [{}, None], ids=["no worker", "silent scheduler"])
def test_stopping_while_workers_are_awaited_ends_quietly(two, folder, monkeypatch, answer):
    """In the middle of a run, when every worker is gone: nothing may be handed over to those that were there."""
    stop = threading.Event()
    seen: list[int] = []

    def present(client):
        seen.append(1)
        if len(seen) <= 1:
            return dict(client.nthreads())
        stop.set()
        return answer

    monkeypatch.setattr(members, "_LOOK_S", 0.0)
    hand_over(monkeypatch, SINGLY)
    monkeypatch.setattr(members, "threads_of_workers", present)
    run = prepare(open_source(folder / "rows.h5", "y"), Config(n_lanes=2, max_iter=3, tol=None))
    assert train(run, client=two[1], stop=stop) is False
    assert len(seen) == 2
