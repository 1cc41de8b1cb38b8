"""Which workers may take part, and which lanes they get."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from streamgd.run import worker_memory
from streamgd.run.members import Members
from streamgd.run.versions import differing_versions, versions
from streamgd.run.worker_memory import WorkerMemory
from streamgd.run.workers import WorkerReport, assign, unfit, usable_memory
from tests.run import small

FIT = WorkerReport(versions(), n_threads=1, memory_limit=0, unreadable=None)


@pytest.fixture
def run():
    return small.begin_small(small.config_of(n_lanes=4, buffer_bytes=60_000))


class TestUnfit:
    def test_a_worker_like_the_client_is_fit(self, run):
        assert unfit("tcp://a:1", FIT, WorkerMemory.of(run)) is None

    @pytest.mark.parametrize("name", ["streamgd", "numba", "numpy"])
    def test_other_versions(self, run, name):
        report = replace(FIT, versions=FIT.versions | {name: "0.0.1"})
        assert f"{name} 0.0.1 there, {versions()[name]} here" in unfit("tcp://a:1", report, WorkerMemory.of(run))

    def test_another_python_will_do(self, run):
        assert (
            unfit(
                "tcp://a:1", replace(FIT, versions=FIT.versions | {"python": "3.99", "cpu": "x"}), WorkerMemory.of(run)
            )
            is None
        )

    def test_no_streamgd(self, run):
        why = unfit("tcp://a:1", ModuleNotFoundError("No module named 'streamgd'"), WorkerMemory.of(run))
        assert "worker tcp://a:1 cannot run streamgd" in why
        assert "No module named 'streamgd'" in why

    def test_data_that_is_not_there(self, run):
        why = unfit("tcp://a:1", replace(FIT, unreadable="SourceNotFoundError: /x.h5"), WorkerMemory.of(run))
        assert "tcp://a:1" in why
        assert "/x.h5" in why

    def test_too_little_memory_for_its_threads(self, run):
        memory = WorkerMemory.of(run)
        needed = memory.needed(2, 2)
        assert unfit("tcp://a:1", replace(FIT, n_threads=2, memory_limit=needed), memory) is None
        why = unfit("tcp://a:1", replace(FIT, n_threads=2, memory_limit=needed - 1), memory)
        assert "memory limit" in why
        most = memory.needed(4, 4)  # there are no more lanes
        assert unfit("tcp://a:1", replace(FIT, n_threads=64, memory_limit=most), memory) is None


def test_read_ahead_takes_what_the_limit_leaves(run):
    memory = WorkerMemory.of(run)
    assert memory.lanes_kept(1, 0) == 4
    for n_lanes in (1, 2, 3, 4, 9):
        assert memory.lanes_kept(1, memory.needed(1, n_lanes)) == min(n_lanes, 4)
    assert memory.lanes_kept(1, memory.needed(1, 3) - 1) == 2
    assert memory.lanes_kept(2, 1) == 2  # it was let in: at least what it trains at once


def test_rows_are_sent_where_there_is_room_for_them_beside_the_lanes(run):
    """Of the lanes at hand, those of two tasks take as much again; of a worker that has all lanes, none are sent."""
    memory = WorkerMemory.of(run)

    def has_room(lanes: dict[int, str], rooms: dict[str, int]) -> bool:
        members = Members.__new__(Members)
        members._memory, members._n_lanes, members._lanes = memory, 4, lanes
        members._reports = {address: replace(FIT, memory_limit=memory.needed(1, n)) for address, n in rooms.items()}
        return members.has_room_to_send

    halves = {0: "a", 1: "a", 2: "b", 3: "b"}
    assert has_room(halves, {"a": 4, "b": 4})
    assert not has_room(halves, {"a": 4, "b": 3})
    assert not has_room(halves, {"a": 3, "b": 4})
    assert has_room(halves, {"a": 4, "b": 4, "idle": 1})
    assert has_room({0: "a", 1: "b", 2: "c", 3: "d"}, dict.fromkeys("abcd", 2))
    assert has_room(dict.fromkeys(range(4), "a"), {"a": 4})


def test_blocks_stay_where_as_much_again_is_left_to_others(run):
    """Beside the plan and what was taken before, of the worker's limit and of what its machine has for all of them."""
    memory, n_bytes = WorkerMemory.of(run), 10**9
    planned = memory.needed(1, 4) - worker_memory.PROCESS_BYTES
    needed = planned + 2 * 2 * n_bytes  # of two lanes each

    def has_room(lanes: dict[int, str] | None = None, **worker: int) -> bool:
        members = Members.__new__(Members)
        members._memory, members._n_lanes = memory, 4
        members._lanes = lanes or {0: A, 1: A, 2: B, 3: B}
        other = replace(FIT, memory_limit=10 * needed, free_bytes=10 * needed)
        members._reports = {A: replace(other, **worker), B: other}
        return members.have_room_beside([n_bytes] * 4)

    A, B = "tcp://10.0.0.1:1", "tcp://10.0.0.1:2"
    assert has_room()
    used = {"memory_limit": 10 * needed, "used_bytes": 9 * needed}
    assert has_room(**used)
    assert not has_room(**used | {"used_bytes": 9 * needed + 1})
    assert has_room({0: A, 1: B, 2: B, 3: B}, **used | {"used_bytes": 9 * needed + 2 * n_bytes})
    assert has_room(free_bytes=2 * needed)
    assert not has_room(free_bytes=2 * needed - 1)
    assert has_room(memory_limit=0, free_bytes=2 * needed)
    assert not has_room(memory_limit=0, free_bytes=2 * needed - 2)
    B = "tcp://10.0.0.2:1"
    assert has_room(free_bytes=needed)
    assert not has_room(free_bytes=needed - 1)


def test_more_windows_take_what_lanes_leave(run):
    memory = replace(WorkerMemory.of(run), more_windows=4)
    assert memory.windows_kept(1, 3, 0) == 6
    for more in range(7):
        assert memory.windows_kept(1, 3, memory.needed(1, 3) + more * 3 * memory.window_bytes) == 2 + min(more, 4)
    assert memory.windows_kept(1, 3, memory.needed(1, 3) - 1) == 2


@pytest.mark.parametrize(
    ("limit", "target", "spill", "pause", "usable"),
    [
        (1e9, 0.6, 0.7, 0.8, 0.7e9),  # Dask's defaults: it moves data to disk first
        (10e9, 0.6, 0.7, 0.8, 6e9 + worker_memory.PROCESS_BYTES),  # and earlier still what it knows of
        (1e9, False, False, 0.8, 0.8e9),
        (1e9, False, False, False, 1e9),
        (None, 0.6, 0.7, 0.8, 0),
    ],
)
def test_a_worker_may_take_what_moves_nothing_and_does_not_pause_it(limit, target, spill, pause, usable):
    manager = SimpleNamespace(
        memory_limit=limit, memory_target_fraction=target, memory_spill_fraction=spill, memory_pause_fraction=pause
    )
    assert usable_memory(SimpleNamespace(memory_manager=manager)) == usable


class TestAssign:
    def test_evenly_by_threads(self):
        lanes = assign(8, {"a": 1, "b": 1, "c": 2}, {})
        assert sorted(lanes) == list(range(8))
        assert Counter(lanes.values()) == {"a": 2, "b": 2, "c": 4}

    def test_lanes_stay_where_they_were(self):
        before = assign(8, {"a": 1, "b": 1}, {})
        assert assign(8, {"a": 1, "b": 1}, before) == before
        joined = assign(8, {"a": 1, "b": 1, "c": 1}, before)
        assert max(Counter(joined.values()).values()) == 3
        assert sum(joined[lane] == before[lane] for lane in range(8)) == 6

    def test_those_of_a_lost_worker_go_to_the_others(self):
        before = assign(8, {"a": 1, "b": 1}, {})
        after = assign(8, {"b": 1}, before)
        assert set(after.values()) == {"b"}

    def test_workers_get_neighbours_which_hand_on_one_sum(self):
        assert assign(8, {"a": 1, "b": 1}, {}) == dict.fromkeys(range(4), "a") | dict.fromkeys(range(4, 8), "b")
        assert list(assign(7, {"a": 1, "b": 1, "c": 1}, {}).values()) == list("aaabbcc")

    def test_more_workers_than_lanes(self):
        lanes = assign(2, dict.fromkeys("abcde", 1), {})
        assert len(set(lanes.values())) == 2


def test_versions_that_results_depend_on_are_compared():
    here = versions()
    assert differing_versions(here, here | {"python": "3.99"}) is None
    assert differing_versions(here | {"numpy": "1.0"}, here) == f"numpy 1.0 there, {here['numpy']} here"
    del here["numba"]
    assert differing_versions(here, versions()) == f"numba missing there, {versions()['numba']} here"
