"""How much is handed to a cluster at once."""

from __future__ import annotations

from typing import Any

import pytest

from streamgd.run import pace
from streamgd.run.pace import Pace, Stretch
from streamgd.run.rounds import Round
from streamgd.run.turns import Span, Turns

LANE_ROWS = 1_000_000
TURNS = Turns(64, 10**9, LANE_ROWS, grow=True)


def pace_of(turns: Turns = TURNS, state_bytes: int = 1000, *, bounded: bool = False) -> Pace:
    return Pace(turns, n_lanes=4, row_bytes=100, state_bytes=state_bytes, sent_bytes=400_000, bounded=bounded)


def rounds_of(stretch: Stretch, seconds: float) -> list[Round]:
    state: Any = None
    return [Round(state, False, 0, 0.0, seconds / len(stretch.spans)) for _ in stretch.spans]


def flown(pace: Pace, stretch: Stretch, seconds: float, chained: int = 1) -> None:
    pace.ended(stretch, chained, rounds_of(stretch, seconds), seconds)


def follow(pace: Pace, n_groups: int, row_s: float, n_epochs: int = 1, *, sent: bool = False) -> list[Stretch]:
    """Play whole epochs, on workers that take so long for a row of each lane, one of them alone."""
    found: list[Stretch] = []
    for epoch in range(n_epochs):
        row = 0
        while row < LANE_ROWS:
            stretch = pace.next(epoch, row, n_groups, room=True, sent=sent)
            found.append(stretch)
            flown(pace, stretch, stretch.rows.n_rows * row_s / (1 if stretch.together else n_groups))
            row = stretch.rows.end
    return found


def test_every_round_is_handed_over_once_and_in_order():
    stretches = follow(pace_of(), 2, 1e-6)
    expected = [TURNS.at(0, 0)]
    while expected[-1].end < LANE_ROWS:
        expected.append(TURNS.at(0, expected[-1].end))
    assert [span for stretch in stretches for span in stretch.spans] == expected


def test_one_worker_plays_short_rounds_and_then_they_are_shared_for_good():
    stretches = follow(pace_of(), 2, 1e-6, n_epochs=2)
    together = [stretch.together for stretch in stretches]
    assert together[0]
    assert not together[-1]
    assert together == sorted(together, reverse=True)
    (last,) = (stretch for stretch in stretches if stretch.last)
    assert last is stretches[together.index(False) - 1]
    longest = max(span.n_rows for stretch in stretches if stretch.together for span in stretch.spans)
    assert longest * 1e-6 * (1 - 1 / 2) <= pace.shared_s(2)


def test_rounds_are_shared_where_that_is_faster():
    """Two workers halve the work, four take three quarters off it, a hundred are a hundred tasks."""
    rows = [next(s.rows.row for s in follow(pace_of(), n_groups, 1e-6) if not s.together) for n_groups in (2, 4, 100)]
    assert rows[1] < rows[0] < rows[2]


def test_one_worker_has_nobody_to_share_with():
    stretches = follow(pace_of(), 1, 1e-7)
    assert all(stretch.together for stretch in stretches)
    assert max(stretch.rows.n_rows * 4 * 100 for stretch in stretches) <= pace._TOGETHER_BYTES  # what is lost with it


def test_rows_that_are_sent_fit_in_what_is_left_for_them():
    sent, own = (
        [stretch for stretch in follow(pace_of(), 2, 1e-6, sent=sent) if stretch.together] for sent in (True, False)
    )
    assert len(sent) > 3
    assert max(stretch.rows.n_rows * 4 * 100 for stretch in sent) <= 400_000
    assert all(stretch.sent for stretch in sent)
    assert len(own) < len(sent)
    assert not any(stretch.sent for stretch in own)


def test_without_room_for_all_lanes_rounds_are_shared_from_the_start():
    pacing = pace_of()
    assert not pacing.next(0, 0, 2, room=False).together
    assert not pacing.next(0, 64, 2, room=True).together  # lanes have readers where they are


def test_until_the_time_is_known_the_bytes_decide():
    known = pace_of()
    flown(known, known.next(0, 0, 2, room=True), 100.0, chained=0)  # what opens files says nothing
    row = known.next(0, 50_000, 2, room=True).rows.end
    assert 4 * 100 * TURNS.at(0, row).n_rows > pace._SHORT_BYTES or row - 50_000 > pace._TOGETHER_BYTES // 500


def test_a_flight_takes_a_moment():
    pacing = pace_of()
    pacing.next(0, 0, 2, room=False)
    flown(pacing, Stretch([Span(0, 0, 10_000)], together=False), 0.01)
    stretch = pacing.next(0, 100_000, 2, room=False)
    assert 1 < len(stretch.spans) <= pace._MOST_IN_FLIGHT
    assert stretch.rows.n_rows * 1e-6 <= pace._FLIGHT_S


def test_of_big_states_one_round_at_a_time():
    pacing = pace_of(state_bytes=50_000_000)
    first = pacing.next(0, 0, 2, room=True)
    assert not first.together
    assert len(first.spans) == 1


def test_of_many_groups_one_round_at_a_time():
    pacing = pace_of()
    flown(pacing, Stretch([Span(0, 0, 10_000)], together=False), 0.001)
    assert len(pacing.next(0, 100_000, pace._FEW_GROUPS + 1, room=False).spans) == 1


def test_blocks_of_collections_bound_a_flight():
    turns = Turns(64, 8_000, LANE_ROWS, grow=True)
    free, bounded = pace_of(turns), pace_of(turns, bounded=True)
    for pacing in (free, bounded):
        flown(pacing, Stretch([Span(0, 0, 10_000)], together=False), 0.001)
    assert free.next(0, 500_000, 2, room=False).rows.n_rows > 8_000
    assert bounded.next(0, 500_000, 2, room=False).rows.n_rows <= 8_000


def test_blocks_of_collections_bound_what_one_worker_plays():
    """All lanes' blocks go there, for as many turns as are under way."""
    turns = Turns(64, 8_000, LANE_ROWS, grow=True)
    free, bounded = (pace_of(turns, bounded=each).next(0, 60_000, 2, room=True) for each in (False, True))
    assert free.together
    assert free.rows.n_rows > 8_000
    assert bounded.together
    assert bounded.rows.n_rows <= 8_000


class TestChaining:
    STRETCH = Stretch([Span(0, 0, 1000)], together=False)

    def test_what_comes_next_is_handed_over_meanwhile(self):
        assert pace_of().may_chain(0)

    def test_not_too_many(self):
        assert not pace_of().may_chain(pace._MOST_CHAINED)

    @pytest.mark.parametrize(("seconds", "may"), [(0.5, True), (1.5, False)])
    def test_not_when_much_would_be_lost(self, seconds, may):
        pacing = pace_of()
        flown(pacing, self.STRETCH, seconds)
        assert pacing.may_chain(0) is may


class TestExchange:
    def exchanged(self, made: Pace, row: int = 0, *, kept: bool = False) -> Stretch:
        return made.next(0, row, 2, room=True, kept=kept, exchanged=True)

    def test_all_rounds_are_shared_from_the_first_one_on(self):
        made, row, found = pace_of(), 0, []
        while row < LANE_ROWS:
            found.append(self.exchanged(made, row))
            row = found[-1].rows.end
            made.ended(found[-1], 1, rounds_of(found[-1], 0.0), 1.0, 0.1)
        assert all(stretch.exchanged and not stretch.together for stretch in found)
        spans = [span for stretch in found for span in stretch.spans]
        assert spans[0] == TURNS.at(0, 0)
        assert [span.row for span in spans[1:]] == [span.end for span in spans[:-1]]

    @pytest.mark.parametrize(("kept", "most_rows"), [(False, 80_000), (True, 480_000)])
    def test_until_it_is_known_how_long_they_take_rows_bound_them(self, kept, most_rows):
        """32 MB of rows of 100 bytes in 4 lanes, six times as many in memory; three times as many behind."""
        made = pace_of()
        first = self.exchanged(made, kept=kept)
        assert most_rows / 1.2 < first.rows.n_rows <= most_rows
        second = self.exchanged(made, first.rows.end, kept=kept)
        assert second.rows.n_rows <= 3 * most_rows
        assert second.rows.n_rows > 3 * most_rows / 1.4 or second.rows.end >= LANE_ROWS

    @pytest.mark.parametrize(("seconds", "most_rows"), [(0.5, 100_000), (0.1, 500_000), (5.0, 30_000)])
    def test_then_time_does_what_each_of_them_takes_beside_left_out(self, seconds, most_rows):
        made = pace_of()
        first = self.exchanged(made)
        rounds = [*rounds_of(first, 0.0)]
        beside_s = len(rounds) * pace._EACH_BESIDE_S
        made.ended(first, 1, rounds, 100.0, seconds * first.rows.n_rows / 100_000 + beside_s)
        found = self.exchanged(made, first.rows.end).rows.n_rows
        assert found <= most_rows
        assert found > most_rows / 1.3 or found == TURNS.at(0, first.rows.end).n_rows

    def test_a_tenth_of_the_time_is_that_of_rows_at_least(self):
        made = pace_of()
        first = self.exchanged(made)
        seconds = len(first.spans) * pace._EACH_BESIDE_S  # nothing is left for rows
        made.ended(first, 1, rounds_of(first, 0.0), 100.0, seconds)
        most_rows = pace._EXCHANGED_S * 10 * first.rows.n_rows / seconds
        made = pace_of(Turns(64, 10**9, 10**9, grow=True))
        made.ended(first, 1, rounds_of(first, 0.0), 100.0, seconds)
        assert most_rows / 1.3 < self.exchanged(made, first.rows.end).rows.n_rows <= most_rows

    def test_long_rounds_are_handed_over_as_tasks(self):
        made = pace_of()
        first = self.exchanged(made)
        made.ended(first, 1, rounds_of(first, 0.0), 100.0, 1e-2 * first.rows.n_rows)
        assert not self.exchanged(made, first.rows.end).exchanged
        assert self.exchanged(made, 0).exchanged

    def test_blocks_that_wait_in_memory_bound_them(self):
        turns = Turns(64, 10_000, LANE_ROWS, grow=True)
        assert self.exchanged(pace_of(turns, bounded=True)).rows.n_rows <= 10_000
        assert self.exchanged(pace_of(turns, bounded=True), kept=True).rows.n_rows > 10_000

    def test_states_that_travel_bound_them(self):
        assert len(self.exchanged(pace_of(state_bytes=2_000_000)).spans) == 10
        assert len(self.exchanged(pace_of(state_bytes=10**9)).spans) == 1

    def test_once_shared_no_worker_plays_alone(self):
        """As when workers no longer meet: lanes that went back to one worker would be read anew there."""
        made = pace_of()
        first = self.exchanged(made)
        assert made.next(0, 0, 2, room=True).together  # they never met
        made = pace_of()
        made.ended(first, 1, rounds_of(first, 0.0), 1.0, 0.1)
        assert not made.next(0, first.rows.end, 2, room=True).together
