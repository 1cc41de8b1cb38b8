"""Rows that are read elsewhere: they train to the same bits, and the reader goes on where they end."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streamgd.run.flights import WorkerWork, send_rows
from streamgd.run.lanes import LaneWork, open_reader, take_turn
from streamgd.run.rounds import Round, play_rounds
from streamgd.run.runs import Run
from streamgd.run.sent_rows import Rows, SentReader, SentRows
from streamgd.run.turns import Span
from tests.data.fake import FakeSource, layout_of
from tests.run import small

BLOCKS = (40, 17, 40, 40, 33, 40, 5, 40, 40, 28)
N_LANES = 3
SPANS = [Span(0, 0, 16), Span(0, 16, 40), Span(0, 40, 72)]


def begin_lanes(*, weighted: bool = True) -> Run:
    X, y = small.data(sum(BLOCKS))
    weight = np.random.default_rng(1).uniform(0.5, 2.0, len(y)) if weighted else None
    source = FakeSource(BLOCKS, X, y, weight=weight)
    run = small.begin_small(small.config_of(n_lanes=N_LANES, buffer_bytes=60_000), source)
    run.layout = layout_of(run.source, window_rows=60, n_open=2, slice_rows=20)
    return run


@pytest.fixture(params=[True, False], ids=["weighted", "unweighted"])
def run(request: pytest.FixtureRequest) -> Run:
    return begin_lanes(weighted=request.param)


@pytest.fixture
def works(run: Run) -> Any:
    """Two processes' readers, as it were."""
    made = [LaneWork(run, run.source, n_threads=2, most_readers=N_LANES) for _ in range(2)]
    yield made
    for work in made:
        work.readers.close()


def send(work: LaneWork, lane: int, row: int, end: int, epoch: int = 0) -> SentRows:
    reader = open_reader(work, lane, epoch, row, None)
    sent = SentRows.read(reader, end - row)
    work.readers.give_back(reader, work.most_readers)
    return sent


def told(rounds: list[Round]) -> Any:
    tensors = [{name: array.tobytes() for name, array in each.state.to_tensors().items()} for each in rounds]
    return tensors, [each.done for each in rounds], sum(each.read_rows for each in rounds)


@pytest.mark.parametrize(
    "spans", [SPANS, [*SPANS, Span(0, 72, 100), Span(0, 100, 200)]], ids=["within an epoch", "to its end"]
)
def test_rounds_over_rows_that_were_sent(run: Run, works: Any, spans: list[Span]) -> None:
    here, there = works
    packed = run.packed(moments=False)
    expected = told(play_rounds(here, run.state, packed, spans))
    here.readers.close()
    fresh = LaneWork(run, run.source, n_threads=2, most_readers=N_LANES)
    sent = [send(there, lane, 0, spans[-1].end) for lane in (1, 2)]
    found = play_rounds(fresh, run.state, packed, spans, sent=sent)
    assert [fresh.readers.has(lane) for lane in range(N_LANES)] == [True, False, False]
    again = play_rounds(fresh, run.state, packed, spans, sent=sent)  # as a task that is run anew: nothing was used up
    fresh.readers.close()
    assert told(found) == expected
    assert told(again)[0] == expected[0]


def test_the_reader_goes_on_where_they_end(run: Run, works: Any) -> None:
    there = works[1]
    packed = run.packed(moments=False)
    send(there, 1, 0, 16)
    sent = send(there, 1, 16, 72)
    assert sum(part.n_rows for part in sent.parts) == 56
    reader = there.readers._idle[1]
    turns = [take_turn(each, run.state, packed, 1, Span(0, 72, 110)).found for each in works]
    assert there.readers._idle[1] is reader
    assert turns[0].theta.tobytes() == turns[1].theta.tobytes()
    assert turns[0].checksum == turns[1].checksum


def test_a_lane_that_is_over_sends_nothing(run: Run, works: Any) -> None:
    there = works[1]
    sent = send(there, 1, 0, 10_000)
    assert sum(part.n_rows for part in sent.parts) == sent.lane_rows
    assert send(there, 1, sent.lane_rows, sent.lane_rows + 50).parts == ()


def test_readers_stay_where_their_lanes_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads for a worker that cannot has no room for its readers."""
    memory = SimpleNamespace(
        memory_limit=0, memory_target_fraction=0.6, memory_spill_fraction=0.7, memory_pause_fraction=0.8
    )
    worker = SimpleNamespace(address="tcp://127.0.0.1:1", state=SimpleNamespace(nthreads=1), memory_manager=memory)
    monkeypatch.setattr("distributed.get_worker", lambda: worker)
    work = WorkerWork(run, run.source)
    homes = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"
    there, here = (
        send_rows(work, [lane], home, Span(0, 0, 16), None)[0] for lane, home in zip((1, 2), homes, strict=True)
    )
    assert [work.readers.has(lane) for lane in range(N_LANES)] == [False, True, False]
    assert (there.lane, here.lane) == (1, 2)
    work.readers.close()


def test_whoever_plays_is_told_what_others_waited(works: Any) -> None:
    sent = replace(send(works[1], 0, 0, 72), wait_s=1.5)
    reader = SentReader(sent)
    assert reader.wait_s == reader.read_rows == 0
    list(reader.pieces(16))
    list(reader.pieces(16))
    assert (reader.wait_s, reader.read_rows) == (1.5, sent.read_rows)


def test_dask_is_told_their_size(works: Any) -> None:
    """It judges by that how much to move at once."""
    sent = send(works[1], 0, 0, 72)
    assert sys.getsizeof(sent) >= 72 * (3 * 4 + 8 + 8)


def odd(array: Any) -> Any:
    """Return an array as messages leave them: at an odd address, not to be written to."""
    if array is None:
        return None
    memory = np.zeros(array.nbytes + 1, np.uint8)
    found = memory[1:].view(array.dtype).reshape(array.shape)
    found[...] = array
    found.flags.writeable = False
    return found


def test_compiled_code_gets_arrays_that_it_knows(run: Run, works: Any) -> None:
    """For others it would be compiled anew, which takes seconds."""
    there = works[1]
    sent = pickle.loads(pickle.dumps(send(there, 0, 0, 72)))
    parts = tuple(Rows(odd(part.X), odd(part.y), odd(part.weight), odd(part.ids)) for part in sent.parts)
    assert not parts[0].X.flags.aligned
    reader = SentReader(replace(sent, parts=parts))
    n_rows = 0
    for rows, first, stop in reader.pieces(72):
        arrays = [array for array in (rows.X, rows.y, rows.weight, rows.ids) if array is not None]
        assert all(array.flags.aligned and array.flags.writeable for array in arrays)
        n_rows += stop - first
    assert n_rows == 72
    assert reader.row == 72
