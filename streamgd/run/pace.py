"""How many rounds are handed to a cluster at once, and whether workers share them.

A round costs some milliseconds beside its work: its tasks are scheduled, and what lanes found goes from worker to
worker. So one worker plays rounds by itself for as long as that is over sooner, many of them as one task; longer ones
are shared, several of them at once, so that nobody waits for the client. Where workers have an exchange, it costs a
fraction of a millisecond, and they share all rounds but those next to which a task is nothing. Only where and when
rounds are played depends on it, and not what comes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from streamgd.run.rounds import Round
from streamgd.run.turns import Span, Turns

#: What a round costs beside its work, in seconds, where workers share it; and for each group of lanes, which is a task.
_SHARED_S, _TASK_S = 0.006, 0.001
#: Rounds are short that have up to so many bytes of rows, before it is known how long a worker takes for them.
_SHORT_BYTES = 8_000_000
#: So many short rounds make one task at most, as long as their states, and their rows, come to no more than so many
#: bytes.
_MOST_TOGETHER, _STATES_BYTES, _TOGETHER_BYTES = 100, 20_000_000, 128_000_000
#: Rounds are handed over for so many seconds at once, so many of them at most; those of more groups of lanes than this
#: one by one, with a task for the merge, because otherwise every group gets what every other one found.
_FLIGHT_S, _MOST_IN_FLIGHT, _FEW_GROUPS = 0.25, 8, 8
#: When what was handed over last took longer than this, in seconds, nothing is handed over behind what is under way; of
#: others so many are chained at most.
_LONG_S, _MOST_CHAINED = 1.0, 32
#: Rounds of an exchange are handed over for so many seconds at once, so many of them at most; not those that take
#: longer than so many seconds each, next to which tasks are nothing. Before it is known how long they take, for so many
#: bytes of rows, and so many times as many behind these; and so many times as many of what lies in memory.
_EXCHANGED_S, _MOST_EXCHANGED, _LONG_ROUND_S = 0.5, 500, 1.0
_UNKNOWN_BYTES, _MORE_BEHIND, _MORE_IN_MEMORY = 32_000_000, 3, 6
#: What each of them takes beside its rows, which take this part of the whole at least.
_EACH_BESIDE_S, _LEAST_PART = 0.0005, 10


def shared_s(n_groups: int) -> float:
    """Return the seconds that a round costs beside its work where so many groups of lanes share it."""
    return _SHARED_S + n_groups * _TASK_S


@dataclass(frozen=True)
class Stretch:
    """Rounds that are handed over at once.

    Attributes
    ----------
    spans : list of Span
        The rows of each, one after the other.
    together : bool
        Whether one worker plays them all.
    last : bool
        Whether that is so for the last time, so that lanes go to their own workers where these rounds end.
    sent : bool
        Whether the others send it their lanes' rows.
    exchanged : bool
        Whether workers share them by an exchange, and not by tasks.
    """

    spans: list[Span]
    together: bool
    last: bool = False
    sent: bool = False
    exchanged: bool = False

    @property
    def rows(self) -> Span:
        """The rows of all of them."""
        return Span(self.spans[0].epoch, self.spans[0].row, self.spans[-1].end)


class Pace:
    """Decides what is handed over, from how long it took before.

    Parameters
    ----------
    turns : Turns
        Where rounds end.
    n_lanes, row_bytes, state_bytes : int
        Lanes, bytes of a row, and of a state.
    sent_bytes : int
        The most bytes of all lanes' rows in a task to which other workers send theirs.
    bounded : bool
        Whether the blocks behind the rows wait in memory, as those of Dask collections do; then no more rows are handed
        over at once than the longest turn has.
    """

    def __init__(
        self,
        turns: Turns,
        n_lanes: int,
        row_bytes: int,
        state_bytes: int,
        *,
        sent_bytes: int,
        bounded: bool,
    ) -> None:
        self._turns = turns
        self._sent_bytes = sent_bytes
        self._n_lanes, self._row_bytes, self._state_bytes = n_lanes, row_bytes, state_bytes
        self._most_rows = turns.most_rows if bounded else sys.maxsize
        self._unknown_bytes = _UNKNOWN_BYTES
        self._last_s = 0.0  # of what was handed over last
        self._row_s, self._alone_s = 0.0, 0.0  # for a row of each lane: shared, and where one worker plays alone
        self._shared = False

    def next(
        self,
        epoch: int,
        row: int,
        n_groups: int,
        *,
        room: bool,
        sent: bool = False,
        kept: bool = False,
        exchanged: bool = False,
    ) -> Stretch:
        """Return what to hand over from a row on.

        Parameters
        ----------
        epoch, row : int
            Where the first round begins.
        n_groups : int
            How many threads of workers would share the lanes.
        room : bool
            Whether a single worker has room for all lanes.
        sent : bool, default=False
            Whether others would send it their lanes' rows.
        kept : bool, default=False
            Whether lanes that share rounds have all their blocks, so that these do not bound what is handed over.
        exchanged : bool, default=False
            Whether workers can share rounds by an exchange.
        """
        most_rows = sys.maxsize if kept else self._most_rows
        if exchanged and (spans := self._exchanged_spans(epoch, row, most_rows, kept=kept)):
            return Stretch(spans, together=False, exchanged=True)
        if room and not self._shared:
            most_bytes = min(_TOGETHER_BYTES, self._sent_bytes) if sent else _TOGETHER_BYTES
            short, self._shared = self._short_spans(epoch, row, n_groups, most_bytes)
            if short:
                return Stretch(short, together=True, last=self._shared, sent=sent)
        self._shared = True  # lanes that went back to one worker would be read anew there
        return Stretch(self._shared_spans(epoch, row, n_groups, most_rows), together=False)

    def few(self, n_groups: int) -> bool:
        """Whether groups get what every other one found, rather than what one task makes of it."""
        return n_groups <= _FEW_GROUPS

    def may_chain(self, chained: int) -> bool:
        """Whether to hand over what comes next before this has ended, so that nothing waits for the client.

        Not when rounds are long, or many have been chained already: what is lost with a worker is computed again from
        the last state that the client has.
        """
        return self._last_s < _LONG_S and chained < _MOST_CHAINED

    def ended(
        self, stretch: Stretch, chained: int, rounds: Sequence[Round], took_s: float, exchanged_s: float = 0.0
    ) -> None:
        """Learn from what has ended, how long that took: the client, and those that shared it by an exchange."""
        self._last_s = took_s
        if stretch.exchanged:
            self._shared = True  # those that never met have read nothing
            took_s = max(exchanged_s - len(rounds) * _EACH_BESIDE_S, exchanged_s / _LEAST_PART)
        self._row_s = took_s / stretch.rows.n_rows
        if stretch.together and chained:  # the first one opens files, and compiles
            self._alone_s = max(self._alone_s, sum(each.took_s for each in rounds) / stretch.rows.n_rows)

    def _short_spans(self, epoch: int, row: int, n_groups: int, most_bytes: int) -> tuple[list[Span], bool]:
        """Return short rounds, as many as a worker has room for, and whether the next round is not short."""
        spans: list[Span] = []
        most, n_bytes = min(_MOST_TOGETHER, _STATES_BYTES // self._state_bytes), 0
        first = row
        while row < self._turns.lane_rows or not spans:
            span = self._turns.at(epoch, row)
            size = span.n_rows * self._n_lanes * self._row_bytes
            n_bytes += size
            if not self._is_short(span.n_rows, size, n_groups):
                return spans, True
            if n_bytes > most_bytes or len(spans) >= most or span.end - first > self._most_rows:
                break
            spans.append(span)
            row = span.end
        return spans, False

    def _is_short(self, n_rows: int, size: int, n_groups: int) -> bool:
        """Whether one worker plays a round sooner than all of them would, what a shared one costs included."""
        if not self._alone_s:
            return size <= _SHORT_BYTES
        return n_rows * self._alone_s * (1 - 1 / n_groups) <= shared_s(n_groups)

    def _exchanged_spans(self, epoch: int, row: int, most_rows: int, *, kept: bool) -> list[Span]:
        """Return rounds that are over in a moment, as far as is known; none if each of them is long, or may be."""
        span = self._turns.at(epoch, row)
        if span.n_rows * self._row_s > _LONG_ROUND_S:
            return []
        if self._row_s:
            most_rows = min(most_rows, int(_EXCHANGED_S / self._row_s))
        else:
            most_bytes = self._unknown_bytes * (_MORE_IN_MEMORY if kept else 1)
            most_rows = min(most_rows, most_bytes // (self._n_lanes * self._row_bytes))
            if span.n_rows > most_rows:
                return []
            self._unknown_bytes *= _MORE_BEHIND
        return self._following(span, min(_MOST_EXCHANGED, _STATES_BYTES // self._state_bytes), most_rows)

    def _shared_spans(self, epoch: int, row: int, n_groups: int, most_rows: int) -> list[Span]:
        """Return rounds that follow one another without the client: a moment's work, as far as is known."""
        first = self._turns.at(epoch, row)
        if not self._row_s or not self.few(n_groups):
            return [first]
        most = min(_MOST_IN_FLIGHT, _STATES_BYTES // (2 * self._state_bytes))
        return self._following(first, most, min(most_rows, int(_FLIGHT_S / self._row_s)))

    def _following(self, first: Span, most: int, most_rows: int) -> list[Span]:
        """Return a round and those that follow it in its epoch, up to so many, and so many rows of a lane."""
        spans = [first]
        while len(spans) < most and spans[-1].end < self._turns.lane_rows:
            span = self._turns.at(first.epoch, spans[-1].end)
            if span.end - first.row > most_rows:
                break
            spans.append(span)
        return spans
