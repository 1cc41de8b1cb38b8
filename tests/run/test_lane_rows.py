"""Readers of lanes over blocks of a Dask collection, which come in portions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgd.data.sources import open_source
from streamgd.run.config import Config
from streamgd.run.lane_rows import Delivery
from streamgd.run.lanes import LaneWork, take_turn
from streamgd.run.runs import Run, prepare
from streamgd.run.turns import Span
from tests.clustering import load, make_data
from tests.run import small


@pytest.fixture
def run(tmp_path: Path) -> Run:
    make_data(tmp_path)
    X, y = load(tmp_path, "dask")
    return prepare(open_source(X, y), Config(n_lanes=2, max_iter=3, tol=None, buffer_bytes=80_000))


def computed(run: Run) -> dict[int, list[Any]]:
    collection: Any = run.source
    X, y, _ = collection._parts.rows, collection._parts.target, None
    return {block: [np.asarray(X.blocks[block]), np.asarray(y.blocks[block])] for block in range(run.source.n_blocks)}


def work_of(run: Run) -> LaneWork:
    collection: Any = run.source
    return LaneWork(run, collection.detached(), n_threads=1, most_readers=2)


def reader_of(work: LaneWork, lane: int) -> Any:
    return work.readers._idle[lane]


def test_a_reader_goes_on_over_blocks_that_come_early_and_into_the_next_epoch(run):
    blocks, work, packed = computed(run), work_of(run), run.packed(moments=False)
    first, *others = Span(0, 0, 640), Span(0, 640, 1100), Span(0, 1100, 10_000), Span(1, 0, 900)
    take_turn(work, run.state, packed, 0, first, Delivery(first, blocks))
    reader = reader_of(work, 0)
    for span in others:
        planned, before = small.settled(reader)._planned, span.epoch * reader.lane_rows
        assert planned < before + span.row + run.layout.window_rows  # no farther than it may
        delivery = Delivery(span, blocks)
        work.readers.expect(0, delivery)
        assert small.settled(reader)._planned > planned or planned >= before + min(span.end, reader.lane_rows)
        start = run.state.copy()
        start.counters[0] = span.epoch
        found = take_turn(work, start, packed, 0, span, delivery).found
        fresh = work_of(run)
        afresh = take_turn(fresh, start, packed, 0, span, delivery).found
        assert found.theta.tobytes() == afresh.theta.tobytes()
        assert found.checksum == afresh.checksum
        assert reader_of(work, 0) is reader
        fresh.readers.close()
    work.readers.close()


def test_blocks_that_come_while_a_reader_is_in_use_are_there_when_it_is_given_back(run):
    blocks, work = computed(run), work_of(run)
    first = Delivery(Span(0, 0, 640), blocks)
    reader = work.readers.take(work.plans, work.inputs, 0, 0, 0, n_threads=1, most=2, delivery=first)
    list(reader.pieces(640))
    work.readers.expect(0, Delivery(Span(0, 640, 1100), blocks))
    work.readers.give_back(reader, 2)
    assert reader._until == 1100
    work.readers.close()


def test_blocks_wait_for_those_before_them(run):
    """Dask runs the tasks that deliver in any order."""
    blocks, work, packed = computed(run), work_of(run), run.packed(moments=False)
    spans = [Span(0, 640, 900), Span(0, 900, 1000), Span(0, 1000, 1500)]
    take_turn(work, run.state, packed, 0, Span(0, 0, 640), Delivery(Span(0, 0, 640), blocks))
    reader = reader_of(work, 0)
    for span in (spans[2], spans[1]):
        work.readers.expect(0, Delivery(span, blocks))
        assert reader._until == 640
    work.readers.expect(0, Delivery(spans[0], blocks))
    assert reader._until == min(1500, reader.lane_rows)
    assert not work.readers._early
    work.readers.close()


def test_blocks_that_came_early_are_there_once_a_turn_has_brought_those_before_them(run):
    blocks, work, packed = computed(run), work_of(run), run.packed(moments=False)
    take_turn(work, run.state, packed, 0, Span(0, 0, 640), Delivery(Span(0, 0, 640), blocks))
    work.readers.expect(0, Delivery(Span(0, 900, 1500), blocks))
    take_turn(work, run.state, packed, 0, Span(0, 640, 900), Delivery(Span(0, 640, 900), blocks))
    assert reader_of(work, 0)._until == min(1500, reader_of(work, 0).lane_rows)
    work.readers.close()


def test_blocks_that_wait_are_few_and_go_with_the_reader(run):
    blocks, work, packed = computed(run), work_of(run), run.packed(moments=False)
    work.readers.expect(0, Delivery(Span(0, 640, 900), blocks))  # nobody reads here
    assert not work.readers._early
    take_turn(work, run.state, packed, 0, Span(0, 0, 640), Delivery(Span(0, 0, 640), blocks))
    for row in (1400, 1300, 1200, 1100, 1000):
        work.readers.expect(0, Delivery(Span(0, row, row + 100), blocks))
    assert len(work.readers._early[0]) == 3
    work.readers.discard(work.readers.take(work.plans, work.inputs, 0, 0, 640, n_threads=1, most=2))
    assert not work.readers._early
    work.readers.close()


def test_blocks_of_turns_that_are_over_are_let_go(run):
    blocks, work, packed = computed(run), work_of(run), run.packed(moments=False)
    take_turn(work, run.state, packed, 0, Span(0, 0, 640), Delivery(Span(0, 0, 640), blocks))
    assert reader_of(work, 0)._source._delivered == {}
    work.readers.expect(0, Delivery(Span(0, 640, 1100), blocks))
    assert reader_of(work, 0)._source._delivered == blocks
    work.readers.close()


def test_blocks_of_epochs_to_come_are_read_over_freely(run):
    blocks, work, packed = computed(run), work_of(run), run.packed(moments=False)
    first = Span(0, 0, 1100)
    take_turn(work, run.state, packed, 0, first, Delivery(first, blocks))
    reader = reader_of(work, 0)
    kept = Delivery(Span(1, 0, 10_000), blocks, n_epochs=2, n_bytes=10**6)
    work.readers.expect(0, kept)
    assert reader._until == 1100  # the rest of the first epoch is not there yet
    rest = Span(0, 1100, 10_000)
    take_turn(work, run.state, packed, 0, rest, Delivery(rest, blocks))
    assert reader._until == 3 * reader.lane_rows
    for span in (Span(1, 0, 900), Span(1, 900, 10_000), Span(2, 0, 10_000)):
        start = run.state.copy()
        start.counters[0] = span.epoch
        found = take_turn(work, start, packed, 0, span, kept).found
        fresh = work_of(run)
        afresh = take_turn(fresh, start, packed, 0, span, Delivery(span, blocks)).found
        assert found.theta.tobytes() == afresh.theta.tobytes()
        assert reader_of(work, 0) is reader
        fresh.readers.close()
    assert reader._deliveries == []
    work.readers.close()


def test_blocks_that_stay_are_told_to_dask_as_what_they_are(run):
    from dask.sizeof import sizeof

    blocks = computed(run)
    assert sizeof({0: Delivery(Span(0, 0, 640), blocks)}) < 10_000
    assert sizeof({0: Delivery(Span(1, 0, 640), blocks, n_epochs=2, n_bytes=10**6)}) > 10**6


def test_readers_are_freed_at_once_or_when_they_are_given_back(run):
    blocks, work = computed(run), work_of(run)
    first = Delivery(Span(0, 0, 640), blocks)
    options: dict[str, Any] = {"n_threads": 1, "most": 2, "delivery": first}
    idle, used = (work.readers.take(work.plans, work.inputs, lane, 0, 0, **options) for lane in (0, 1))
    work.readers.give_back(idle, 2)
    work.readers.free(1)
    assert idle._closed
    assert not work.readers.has(0)
    work.readers.give_back(used, 2)
    assert used._closed
    assert not work.readers.has(1)
    options["delivery"] = Delivery(Span(0, 0, 640), blocks, attempt=1)
    again = work.readers.take(work.plans, work.inputs, 1, 0, 0, **options)
    work.readers.give_back(again, 2)
    assert work.readers.has(1)
    work.readers.close()


def test_turns_that_are_late_leave_nothing_behind(run, monkeypatch):
    """As those that a worker began before it heard that blocks do not stay any longer."""
    blocks, work = computed(run), work_of(run)
    late, after = (Delivery(Span(0, 0, 640), blocks, attempt=attempt) for attempt in (0, 1))
    pool = work.readers.pool

    def freed(n_threads: int) -> Any:
        work.readers.free(1)
        return pool(n_threads)

    monkeypatch.setattr(work.readers, "pool", freed)  # while the reader is made
    for delivery, kept in [(late, False), (late, False), (after, True)]:
        reader = work.readers.take(work.plans, work.inputs, 0, 0, 0, n_threads=1, most=2, delivery=delivery)
        work.readers.expect(0, Delivery(Span(0, 640, 900), blocks))
        assert not work.readers._early
        work.readers.give_back(reader, 2)
        assert work.readers.has(0) is kept
        assert reader._closed is not kept
        monkeypatch.setattr(work.readers, "pool", pool)
    work.readers.close()
