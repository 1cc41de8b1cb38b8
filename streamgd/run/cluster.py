"""Rounds on a Dask cluster.

A round is a task for the lanes of each worker's thread; it begins by merging what the round before found, and several
rounds are handed over at once, with one task that tells the client what came of them: a flight
(`streamgd.run.dispatch`). Rounds that one worker plays sooner by itself, as the first ones are, make one task together
(`streamgd.run.pace`). Workers of one machine take all turns of a flight in a task each, and hand one another what they
found without Dask (`streamgd.run.exchange`). Each task has a key of its own, made of the run, the epoch, the round and
the lanes, and what comes of it is a pure function of what it is given, so Dask may run it anywhere, again or late; a
flight whose workers do not find one another comes to nothing, and is played again. The client keeps the state of the
last round that it was told of, from which rounds that are lost with a worker are played again; the next flight is
handed over while one is under way, also into the next epoch, which workers close as the client does, so that no worker
waits for the client. Nothing that happens on the cluster can change what comes of it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from streamgd.data.sources.neighbours import UnreachableError
from streamgd.errors import ClusterError, DataError, OptionError, StreamgdError
from streamgd.learn.recipe import Packed
from streamgd.learn.state import State
from streamgd.run.config import RunOptions
from streamgd.run.dispatch import Dispatch, Flight, drop
from streamgd.run.epochs import Watcher
from streamgd.run.exchange import ApartError
from streamgd.run.flights import Flown, Unfit
from streamgd.run.members import Members
from streamgd.run.rounds import Crew, Round
from streamgd.run.runs import Run
from streamgd.run.turns import Span

#: How often to look whether somebody asked to stop.
_POLL_S = 0.25
#: A merged state comes to the client at so many bytes a second at least, after two seconds at most.
_FETCH_RATE, _FETCH_S = 10e6, 2.0
#: A wait for rounds is told after so many seconds, and after so many times what those before took.
_SAY_AFTER_S, _SAY_AFTER_TIMES = 30.0, 5
#: Times that a round is played again before what keeps it from ending is taken to be for good.
_MOST_ATTEMPTS = 5
#: Flights behind the one that is awaited. Those over collections are short where blocks do not stay with lanes, for
#: lack of room for more of them, and over before the client hears of the one before them; so there are two.
_FLIGHTS_BEHIND, _FLIGHTS_BEHIND_BLOCKS = 1, 2
#: Times that workers may leave over the same round before it is taken to be what ends them.
_MOST_LOSSES = 20


class ClusterCrew(Crew):
    """Takes the turns on a cluster's workers.

    Parameters
    ----------
    run : Run
        What is trained.
    client : distributed.Client
        Of the cluster.
    options : RunOptions
        How long to wait for workers.
    watcher : Watcher
        Told of workers that are awaited or cannot take part.
    stop : threading.Event
        Set by whoever wants training to stop; then workers are not waited for.

    Raises
    ------
    ClusterError
        If there are no workers, or some cannot take part: before training starts.
    """

    def __init__(self, run: Run, client: Any, options: RunOptions, watcher: Watcher, stop: threading.Event) -> None:
        require_client(client)
        self._client, self._stop = client, stop
        self._n_lanes = run.config.n_lanes
        self._closed = False
        self._awaited: tuple[Any, threading.Event] | None = None
        self._next: deque[Flight] = deque()  # what was handed over behind what is awaited
        self._flown_from: State | None = None
        self._played: deque[Round] = deque()  # rounds that came with others before them
        self._round_s, self._flight_s, self._watcher = 0.0, 0.0, watcher
        self._members = Members(run, client, options, watcher, stop)
        self._tell_idle_threads()
        self._dispatch = Dispatch(run, client, self._members)
        self._pace = self._dispatch.pace

    @property
    def n_threads(self) -> int:
        """How many lanes take their turns at once, where workers share a round."""
        return min(self._n_lanes, self._members.n_threads)

    @property
    def workers(self) -> int | None:
        """How many workers take part."""
        return len(self._members)

    @property
    def round_s(self) -> float | None:
        """Seconds of each of the rounds that came last, on average."""
        return self._round_s

    def play(self, start: State, packed: Packed, span: Span, stop: threading.Event) -> Round | None:
        """Play a round, again if need be; see `Crew.play`."""
        lost = left = 0
        said = False
        if self._played and self._flown_from is start:
            return self._hand_out()
        self._played.clear()
        while not stop.is_set():
            began = time.monotonic()
            if self._flown_from is not start:
                self._drop_next()
            if self._next:
                flight = self._next.popleft()
            else:
                flight = self._dispatch.hand_over(start, packed, span.epoch, span.row, behind=None)
            try:
                self._look()
                if stop.is_set():
                    return None  # perhaps without a worker: nobody is waited for then
                self._hand_over_next(flight, packed)
                while not self._finished(flight.merged):
                    if stop.is_set():
                        return None
                    self._look()
                    said = said or self._say_if_long(time.monotonic() - began)
                flown = self._result(flight)
                self._played.extend(flown.rounds)
                took_s = time.monotonic() - began
                if flown.took_s:
                    self._dispatch.met()
                self._pace.ended(flight.stretch, flight.chained, self._played, took_s, flown.took_s)
                self._flight_s, self._round_s = took_s, took_s / len(self._played)
                return self._hand_out()
            except _Again as again:
                lost += again.counts
                left += not again.counts
                drop(flight)
                self._drop_next()
                if lost >= _MOST_ATTEMPTS or left >= _MOST_LOSSES:
                    raise ClusterError(
                        f"a round was lost {lost + left} times: {again}. If workers die, see their logs; they may have "
                        "too little memory" + self._perhaps_gone()
                    ) from again.__cause__
                self._start_again(apart=again.apart)
            finally:
                drop(flight)
        return None

    def _perhaps_gone(self) -> str:
        if not self._dispatch.computes:
            return ""
        return ". If the collection was persisted, it may have been cancelled, or lost as the cluster was restarted"

    def _hand_over_next(self, flight: Flight, packed: Packed) -> None:
        """Hand over what comes behind a flight, so that no worker waits for the client."""
        last = self._next[-1] if self._next else flight
        most = _FLIGHTS_BEHIND_BLOCKS if self._dispatch.computes else _FLIGHTS_BEHIND
        while len(self._next) < most and (following := self._dispatch.following(last)) is not None:
            if not self._pace.may_chain(last.chained):
                if self._dispatch.computes:
                    self._dispatch.deliver_ahead(*following)
                return
            epoch, row = following
            now = packed if epoch == flight.stretch.rows.epoch else packed.without_moments()
            last = self._dispatch.hand_over(None, now, epoch, row, behind=last)
            self._next.append(last)

    def _tell_idle_threads(self) -> None:
        """Say that threads will have nothing to do: with a single lane, whoever made a cluster hardly meant that."""
        n_lanes, n_threads = self._n_lanes, self._members.n_threads
        if n_lanes < n_threads:
            tell = self._watcher.message if n_lanes == 1 else self._watcher.note
            tell(
                f"n_lanes={n_lanes}: only {n_lanes} of the cluster's {n_threads:,} threads will train. More lanes "
                "(n_lanes, --lanes), which are part of what defines the model, use more of them"
            )

    def _say_if_long(self, waited: float) -> bool:
        """Say that rounds take long, if they do: nothing else tells workers that are at work from busy ones."""
        if waited <= max(_SAY_AFTER_S, _SAY_AFTER_TIMES * self._flight_s):
            return False
        self._watcher.message(
            f"no round has ended for {waited:.0f} s: reading is slow, or workers are busy with other tasks, or do not "
            "answer. The run waits for them"
        )
        return True

    def _start_again(self, *, apart: bool) -> None:
        """See which workers are left, and forget what was handed over."""
        gone = self._members.look(now=True)
        self._dispatch.start_again(lost=gone is not None or not apart)

    def _look(self) -> None:
        """See whether workers came or went; a round is lost with one that had lanes."""
        gone = self._members.look()
        if gone is not None:
            raise _Again(f"{gone} left", counts=False)

    def _hand_out(self) -> Round:
        """Return the next round, and remember where the one after it begins."""
        found = self._played.popleft()
        self._flown_from = found.state
        return found

    def _drop_next(self) -> None:
        while self._next:
            drop(self._next.pop())

    # --- what comes back ---
    def _finished(self, future: Any) -> bool:
        """Wait a little for a future.

        Not by `distributed.wait`, which is the default client's: this one need not be that.
        """
        if self._awaited is None or self._awaited[0] is not future:
            done = threading.Event()
            future.add_done_callback(lambda _: done.set())
            self._awaited = future, done
        self._awaited[1].wait(_POLL_S)
        finished = bool(future.done())  # also if it was cancelled; `_result` says what that means
        if finished:
            self._awaited = None
        return finished

    def _result(self, flight: Flight) -> Flown:
        """Fetch what came of rounds, or say what kept them from ending."""
        from concurrent.futures import CancelledError

        from distributed import KilledWorker
        from distributed.comm.core import CommClosedError

        try:
            return self._fetched(flight)
        except ApartError as err:
            err.__traceback__ = None
            apart_s = self._dispatch.keep_apart()
            why = "; ".join(dict.fromkeys([str(err), *_reasons(flight.last[1:], self._stop)]))
            self._watcher.note(f"workers share rounds by tasks for {apart_s:.0f} s, since an exchange failed: {why}")
            raise _Again(str(err), counts=False, apart=True) from err
        except (Unfit, UnreachableError) as err:
            err.__traceback__ = None  # the future keeps the error, which would keep what these frames hold
            raise _Again(str(err)) from err
        except (StreamgdError, _Again):
            raise
        except _Failed as err:
            raise self._failure(err.__cause__ or err) from err.__cause__
        except KilledWorker as err:
            raise _Again(f"workers died over it ({err})") from err
        except (CancelledError, CommClosedError, TimeoutError) as err:
            if self._client.status != "running":
                raise ClusterError(
                    f"the connection to the scheduler is lost ({type(err).__name__}): start the cluster again and "
                    "resume the run"
                ) from err
            raise _Again(f"what it needs was lost ({type(err).__name__}: {err})") from err
        except Exception as err:
            raise self._failure(err) from err

    def _failure(self, err: BaseException) -> StreamgdError:
        """Return what ends a run of which a task fails for good."""
        kind = DataError if self._dispatch.computes else ClusterError
        return kind(
            f"a task failed on the cluster: {type(err).__name__}: {err}. See the error above; computing the collection "
            "by itself, or training without the cluster, shows it too"
        )

    def _fetched(self, flight: Flight) -> Flown:
        """Fetch what came of rounds, unless it is lost meanwhile with the worker that has it."""
        size = len(flight.stretch.spans) * self._dispatch.state_bytes
        patience_s = _FETCH_S + size / _FETCH_RATE
        for _ in range(_MOST_ATTEMPTS):
            if self._stop.is_set():
                break
            try:
                found: Flown = flight.merged.result(timeout=patience_s)
                if not found.rounds:
                    raise ApartError(found.apart)
                # A worker in this process has the same objects still, of which the client changes its own.
                return replace(found, rounds=[replace(each, state=replace(each.state)) for each in found.rounds])
            except TimeoutError as err:
                if flight.merged.status == "error":  # it is the task's own
                    raise _Failed(str(err)) from err
            self._look()
        raise TimeoutError(f"a state of {size:,} bytes did not come within {_MOST_ATTEMPTS * patience_s:.0f} s")

    def close(self) -> None:
        """Release what the workers hold, and have them close what they opened. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._drop_next()
        self._dispatch.close()


def _reasons(futures: Sequence[Any], stop: threading.Event) -> Iterator[str]:
    """Yield why others that were to share rounds came apart, as far as they have said so and are heard at once."""
    until = time.monotonic() + _FETCH_S
    for future in futures:
        left_s = until - time.monotonic()
        if left_s <= 0 or stop.is_set():
            return
        with contextlib.suppress(Exception):
            if future.status == "error":
                error = future.exception(timeout=left_s)
                yield f"{type(error).__name__}: {error}"
            elif future.done() and (found := future.result(timeout=left_s)).apart:
                yield found.apart


def require_client(client: Any) -> None:
    """Refuse what is no client of a cluster that can be used.

    Raises
    ------
    OptionError
        If it is something else, such as an address.
    ClusterError
        If it is asynchronous, or closed.
    """
    kind = getattr(sys.modules.get("distributed"), "Client", None)  # whoever has one has imported it
    if kind is None or not isinstance(client, kind):
        raise OptionError(
            f"client={client!r}: expected a distributed.Client, such as distributed.Client('tcp://host:8786') or the "
            "get_client() of a cluster"
        )
    if client.asynchronous:
        raise ClusterError("the client is asynchronous: give a distributed.Client that was made without it")
    if client.status != "running":
        raise ClusterError(f"the client is {client.status}: connect anew, and give that distributed.Client")


class _Again(Exception):
    """A round was lost, and is to be played again.

    It `counts` unless it was because a worker left, or because workers did not meet, which was `apart`.
    """

    def __init__(self, message: str, *, counts: bool = True, apart: bool = False) -> None:
        super().__init__(message)
        self.counts, self.apart = counts, apart


class _Failed(Exception):
    """A task failed with what else says that fetching took too long; its cause is the task's error."""
