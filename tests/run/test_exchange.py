"""Threads that share rounds hand one another what they found, and nobody waits for who does not come."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streamgd.data.sources import open_source
from streamgd.data.window import Stopped
from streamgd.learn.state import State
from streamgd.run import exchange, flights
from streamgd.run.config import Config
from streamgd.run.dispatch import Dispatch, _beginnings
from streamgd.run.exchange import ApartError, Circle, Exchange, can_meet
from streamgd.run.flights import Flown, WorkerWork
from streamgd.run.rounds import Round
from streamgd.run.runs import prepare

TOKEN = os.urandom(16)


class Party:
    """Some that share rounds, each in a thread, and each with an exchange of its own as in a process of its own."""

    def __init__(self, n: int, *tokens: bytes) -> None:
        self.exchanges = [Exchange(tokens[index] if tokens else TOKEN) for index in range(n)]
        self.found: list[Any] = [None] * n
        self.seconds = [0.0] * n

    def circle(self, index: int, flight: int = 1, attempt: int = 0) -> Circle:
        return Circle(attempt, flight, [f"worker {each}" for each in range(len(self.exchanges))], index)

    def start(self, index: int, what: Callable[[int, Any], Any], circle: Circle | None = None) -> threading.Thread:
        def run() -> None:
            began = time.monotonic()
            try:
                with self.exchanges[index].among(circle or self.circle(index)) as gather:
                    self.found[index] = what(index, gather)
            except Exception as err:
                self.found[index] = err
            self.seconds[index] = time.monotonic() - began

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def play(self, *circles: Circle, what: Callable[[int, Any], Any]) -> list[Any]:
        threads = [self.start(index, what, circle) for index, circle in enumerate(circles)]
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        return self.found

    def close(self) -> None:
        for each in self.exchanges:
            each.close()


@pytest.fixture
def party() -> Any:
    made: list[Party] = []

    def of(n: int, *tokens: bytes) -> Party:
        made.append(Party(n, *tokens))
        return made[-1]

    yield of
    for each in made:
        each.close()


def sockets() -> set[str]:
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            found.add(descriptor.readlink().name)
    return {name for name in found if name.startswith("socket:")}


@pytest.mark.parametrize("size", [1, 200_000])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_all_get_what_all_found_in_order(party, n, size):
    def rounds(index: int, gather: Any) -> list[Any]:
        return [gather(np.full(size, 100.0 * number + index)) for number in range(4)]

    made = party(n)
    for found in made.play(*map(made.circle, range(n)), what=rounds):
        for number, parts in enumerate(found):
            assert [part[-1] for part in parts] == [100 * number + index for index in range(n)]
            assert {part.size for part in parts} == {size}


def test_they_meet_once_for_rounds_that_follow_one_another(party, monkeypatch):
    meetings = []
    real = exchange._Meeting._meet
    monkeypatch.setattr(exchange._Meeting, "_meet", lambda self, until: (meetings.append(self), real(self, until)))
    made = party(2)
    for flight in range(3):
        made.play(*(made.circle(index, flight) for index in range(2)), what=lambda index, gather: gather(index))
        assert made.found == [[0, 1]] * 2
    assert len(meetings) == 2
    made.play(*(made.circle(index, 3, attempt=1) for index in range(2)), what=lambda index, gather: gather(index))
    assert made.found == [[0, 1]] * 2
    assert len(meetings) == 4
    others = [Circle(1, 4, ["worker 0", "another worker"], index) for index in range(2)]
    made.play(*others, what=lambda index, gather: gather(index))
    assert made.found == [[0, 1]] * 2
    assert len(meetings) == 6


def test_who_does_not_come_is_not_waited_for(party, monkeypatch):
    monkeypatch.setattr(exchange, "_MEET_S", 0.3)
    made = party(3)
    made.play(made.circle(0), made.circle(1), what=lambda index, gather: gather(index))
    assert all(isinstance(each, ApartError) for each in made.found[:2])
    assert 0.2 < max(made.seconds) < 2


def test_who_came_before_is_waited_for_less_long(party):
    made = party(2)
    made.play(*map(made.circle, range(2)), what=lambda index, gather: gather(index))
    made.play(made.circle(0, 2), what=lambda index, gather: gather(index))
    assert isinstance(made.found[0], ApartError)
    assert 0.2 < made.seconds[0] < 0.8


def test_who_comes_late_is_waited_for(party):
    made = party(2)
    first = made.start(0, lambda index, gather: gather(index))
    time.sleep(0.3)
    made.start(1, lambda index, gather: gather(index)).join(5)
    first.join(5)
    assert made.found == [[0, 1]] * 2


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
@pytest.mark.parametrize("n_rounds", [0, 2])
def test_nobody_waits_for_who_fails(party, n_rounds, error):
    """And the error is told by who had it."""

    def rounds(index: int, gather: Any) -> None:
        for _ in range(n_rounds):
            gather(index)
        if index == 1:
            raise error("the disk is on fire")
        gather(index)

    made = party(3)
    made.play(*map(made.circle, range(3)), what=rounds)
    assert [type(each) for each in made.found] == [ApartError, error, ApartError]
    assert max(made.seconds) < 1


def test_they_meet_anew_after_one_has_failed(party):
    def fail(index: int, gather: Any) -> None:
        raise ValueError

    made = party(2)
    made.play(*map(made.circle, range(2)), what=fail)
    made.play(*(made.circle(index, 2) for index in range(2)), what=lambda index, gather: gather(index))
    assert made.found == [[0, 1]] * 2


def test_who_is_too_slow_is_not_waited_for(party, monkeypatch):
    """As a process that was stopped."""
    monkeypatch.setattr(exchange, "_TURN_S", 0.3)
    made = party(2)
    made.play(*map(made.circle, range(2)), what=lambda index, gather: time.sleep(1.5 * index) or (gather(0), gather(0)))
    assert [type(each) for each in made.found] == [ApartError, ApartError]
    assert 0.2 < made.seconds[0] < 1.3


def test_rounds_of_different_flights_are_not_taken_for_one_another(party):
    made = party(2)
    made.play(*map(made.circle, range(2)), what=lambda index, gather: gather(index))
    made.play(made.circle(0, 2), made.circle(1, 3), what=lambda index, gather: gather(index))
    assert all(isinstance(each, ApartError) for each in made.found)


def test_rounds_of_different_attempts_are_not_taken_for_one_another(party, monkeypatch):
    monkeypatch.setattr(exchange, "_MEET_S", 0.2)
    made = party(2)
    made.play(made.circle(0), made.circle(1, attempt=1), what=lambda index, gather: gather(index))
    assert all(isinstance(each, ApartError) for each in made.found)


def test_only_those_that_know_the_token_meet(party, monkeypatch):
    monkeypatch.setattr(exchange, "_MEET_S", 0.2)
    made = party(2, TOKEN, os.urandom(16))
    made.play(*map(made.circle, range(2)), what=lambda index, gather: gather(index))
    assert all(isinstance(each, ApartError) for each in made.found)


@pytest.mark.parametrize("who", ["who calls", "who is called"])
def test_only_processes_of_one_user_meet(party, monkeypatch, who):
    """Whoever has another one at the other end refuses, whatever that one does."""
    monkeypatch.setattr(exchange, "_MEET_S", 0.2)
    user, real = os.geteuid(), exchange._require_same_user

    def require_same_user(end: Any) -> None:
        called = not end.getpeername()  # whoever calls has no name
        with pytest.MonkeyPatch.context() as patch:
            if called == (who == "who is called"):
                patch.setattr(exchange.os, "geteuid", lambda: user + 1)
            real(end)

    monkeypatch.setattr(exchange, "_require_same_user", require_same_user)
    made = party(2)
    made.play(*map(made.circle, range(2)), what=lambda index, gather: gather(index))
    assert all(isinstance(each, ApartError) for each in made.found)


@pytest.mark.parametrize("who", ["who calls", "who is called"])
def test_nothing_is_taken_from_who_does_not_know_the_token(party, monkeypatch, who):
    """Though names of sockets are there for all to read."""
    monkeypatch.setattr(exchange, "_MEET_S", 0.3)
    monkeypatch.setattr(exchange._Meeting, "_name", lambda self, index: f"\0streamgd-test-{os.getpid()}-{index}")
    taken = []
    made = party(2)
    real = exchange._Meeting._require_token

    def require_token(self: Any, end: Any, mine: bytes, theirs: bytes) -> None:
        """Have one of them take whatever it gets, and say what it made up."""
        if mine.startswith(b"calls") != (who == "who calls"):
            real(self, end, mine, theirs)
            return
        for _ in range(2):
            end.sendall(bytes(32))
            exchange._read_exactly(end, 32)

    monkeypatch.setattr(exchange._Meeting, "_require_token", require_token)
    made.play(*map(made.circle, range(2)), what=lambda index, gather: taken.append(gather(index)))
    assert all(isinstance(each, ApartError) for each in made.found)
    assert not taken


def test_strangers_are_not_waited_for(party):
    """Whoever calls and is not the one who is awaited is turned away, and the others meet."""
    made = party(2)
    first = made.start(0, lambda index, gather: gather(index))
    time.sleep(0.1)
    meeting = next(iter(made.exchanges[0]._open))
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n" * 10, exchange._SIZE.pack(1) + bytes(64), exchange._SIZE.pack(7)):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(meeting._name(0))
            with contextlib.suppress(OSError):
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
                stranger.recv(200)
                stranger.recv(200)
    made.start(1, lambda index, gather: gather(index)).join(5)
    first.join(5)
    assert made.found == [[0, 1]] * 2


@pytest.mark.parametrize("when", ["meeting", "in a round"])
def test_closing_wakes_whoever_waits(party, when):
    made = party(2)
    threads = [made.start(0, lambda index, gather: gather(index))]
    if when == "in a round":
        threads.append(made.start(1, lambda index, gather: time.sleep(1)))
    time.sleep(0.2)
    made.exchanges[0].close()
    threads[0].join(5)
    assert isinstance(made.found[0], Stopped)
    assert made.seconds[0] < 0.9
    with pytest.raises(Stopped), made.exchanges[0].among(made.circle(0, 2)):
        pass


def test_giving_up_wakes_those_of_earlier_attempts_alone(party):
    made = party(2)
    waiting = made.start(0, lambda index, gather: gather(index), made.circle(0, attempt=3))
    time.sleep(0.1)
    made.exchanges[0].give_up(3)
    waiting.join(0.2)
    assert waiting.is_alive()
    made.exchanges[0].give_up(4)
    waiting.join(5)
    assert isinstance(made.found[0], ApartError)
    assert made.seconds[0] < 1


def test_who_comes_late_for_an_earlier_attempt_disturbs_nobody(party):
    made = party(2)
    made.play(*(made.circle(index, 1, attempt=1) for index in range(2)), what=lambda index, gather: gather(index))
    made.start(0, lambda index, gather: gather(index), made.circle(0, attempt=0)).join(5)
    assert isinstance(made.found[0], ApartError)
    made.play(*(made.circle(index, 2, attempt=1) for index in range(2)), what=lambda index, gather: gather(index))
    assert made.found == [[0, 1]] * 2


def test_who_goes_on_to_another_attempt_leaves_those_who_wait(party):
    """With one thread they could not come to it otherwise."""
    made = party(2)
    made.play(*map(made.circle, range(2)), what=lambda index, gather: gather(index))
    behind = made.start(0, lambda index, gather: gather(index), made.circle(0, 2))
    time.sleep(0.1)
    ahead = made.start(1, lambda index, gather: gather(index), made.circle(1, 3, attempt=1))
    behind.join(5)
    assert isinstance(made.found[0], ApartError)
    assert made.seconds[0] < 1
    made.start(0, lambda index, gather: gather(index), made.circle(0, 3, attempt=1)).join(5)
    ahead.join(5)
    assert made.found == [[0, 1]] * 2


def test_others_hear_at_once_that_one_has_left_though_a_child_has_its_sockets_still(party, monkeypatch):
    """A process that was forked meanwhile, as by `multiprocessing`, keeps them open."""
    monkeypatch.setattr(exchange, "_TURN_S", 5.0)
    made, kept = party(2), []

    def leave(index: int, gather: Any) -> None:
        gather(index)
        if index == 1:
            (meeting,) = made.exchanges[1]._open
            kept.extend(end.dup() for end in meeting._ends.values())
            raise ValueError("it has left")
        began = time.monotonic()
        with pytest.raises(ApartError):
            gather(index)
        assert time.monotonic() - began < 2

    made.play(*map(made.circle, range(2)), what=leave)
    assert made.found[0] is None
    for end in kept:
        end.close()


def test_nothing_is_left_open(party):
    before, threads = sockets(), set(threading.enumerate())
    made = party(3)
    made.play(*map(made.circle, range(3)), what=lambda index, gather: gather(index))
    assert len(sockets() - before) == 6
    made.play(*(made.circle(index, 2, attempt=1) for index in range(2)), what=lambda index, gather: gather(index))
    assert len(sockets() - before) == 2
    made.close()
    made.close()
    assert not sockets() - before
    assert not set(threading.enumerate()) - threads


def test_sockets_are_closed_with_the_work_of_a_run(party):
    """As on a worker that nobody tells that the run is over, since the client is gone."""
    run = prepare(open_source(np.ones((100, 2)), np.arange(100.0)), Config(n_lanes=2))
    work = WorkerWork(run, run.source)
    before = sockets()
    made = party(2)
    made.exchanges[0] = work.exchange
    made.exchanges[1] = Exchange(work.token)
    made.play(*map(made.circle, range(2)), what=lambda index, gather: gather(index))
    assert len(sockets() - before) == 2
    made.exchanges.pop(0)
    del work
    gc.collect()  # which would complain
    until = time.monotonic() + 5
    while len(sockets() - before) > 1:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_rounds_behind_those_that_were_not_played_are_not_played_either():
    with pytest.raises(ApartError, match="nobody came"):
        flights._begun([Flown([], apart="nobody came")], None)


def test_many_small_states_travel_in_one_piece():
    """Dask sends each array by itself, which takes longer than all of them."""
    run = prepare(open_source(np.ones((100, 2)), np.arange(100.0)), Config(n_lanes=2))
    rounds = [Round(run.state.copy(), False, 0, 0.0) for _ in range(1000)]
    for some, expected in ((rounds, 0), ([Round(wide_state(), False, 0, 0.0)], 1)):
        apart: list[Any] = []
        made = pickle.loads(pickle.dumps(Flown(some), 5, buffer_callback=apart.append), buffers=apart)
        assert (len(apart) > 0) == expected
        assert len(made.rounds) == len(some)
        np.testing.assert_array_equal(made.rounds[-1].state.theta, some[-1].state.theta)


def test_each_goes_on_from_its_own_unless_lanes_have_moved():
    groups = [([0, 1], "tcp://a:1"), ([2, 3], "tcp://a:2")]
    moved = [([0, 1], "tcp://a:1"), ([2, 3], "tcp://a:3")]
    exchanged = SimpleNamespace(
        stretch=SimpleNamespace(exchanged=True), groups=groups, last=["one", "two"], merged="one"
    )
    assert _beginnings(exchanged, groups) == [["one"], ["two"]]
    assert _beginnings(exchanged, moved) == [["one"], ["one"]]
    assert _beginnings(exchanged, groups[:1]) == [["one"]]
    by_tasks = SimpleNamespace(stretch=SimpleNamespace(exchanged=False), groups=groups, last=["one", "two"])
    assert _beginnings(by_tasks, moved) == [["one", "two"]] * 2


def wide_state() -> State:
    run = prepare(open_source(np.ones((3, 50_000)), np.arange(3.0)), Config(n_lanes=2))
    return run.state


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"fit": ["tcp://a:1"]}, False),
        ({"state_bytes": 20_000_000}, True),
        ({"state_bytes": 20_000_001}, False),
        ({"state_bytes": 10_000_001, "homes": ["tcp://a:1", "tcp://a:1"]}, False),
        ({"state_bytes": 10_000_000, "homes": ["tcp://a:1", "tcp://a:1"]}, True),
        ({"homes": [f"tcp://a:{port}" for port in range(33)]}, True),
        ({"homes": [f"tcp://a:{port}" for port in range(34)]}, False),
        ({"homes": [f"tcp://a:{port}" for port in range(2) for _ in range(4)]}, True),
        ({"homes": [f"tcp://a:{port}" for port in range(2) for _ in range(5)]}, False),
        ({"homes": ["tcp://a:1"] * 7}, False),
        ({"homes": ["tcp://a:1", "tcp://b:1"]}, False),
        ({"apart_s": 1.0}, False),
        ({"have_room": False}, False),
    ],
)
def test_who_exchanges(given, expected):
    """Not where only some workers may take part, nor where they would hold more than was planned."""
    options = {"fit": None, "have_room": True, "state_bytes": 1000, "homes": ["tcp://a:1", "tcp://a:2"]} | given
    some = SimpleNamespace(
        _apart_until=time.monotonic() + options.get("apart_s", 0.0),
        _members=SimpleNamespace(fit=options["fit"], have_room=options["have_room"]),
        state_bytes=options["state_bytes"],
    )
    groups = [([lane], home) for lane, home in enumerate(options["homes"])]
    assert Dispatch._can_exchange(some, groups) == expected


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["tcp://10.0.0.1:1", "tcp://10.0.0.1:2"], True),
        (["tls://10.0.0.1:1", "tls://10.0.0.1:2"], True),
        (["tcp://10.0.0.1:1", "tcp://10.0.0.1:1"], True),
        (["tcp://10.0.0.1:1", "tcp://10.0.0.2:1"], False),
        (["tcp://10.0.0.1:1"], False),
        (["inproc://10.0.0.1/1/2", "inproc://10.0.0.1/1/3"], False),
    ],
)
def test_processes_of_one_machine_can_meet(addresses, expected):
    assert can_meet(addresses) == expected


def test_other_systems_have_no_such_sockets(monkeypatch):
    monkeypatch.setattr(exchange.sys, "platform", "darwin")
    assert not can_meet(["tcp://10.0.0.1:1", "tcp://10.0.0.1:2"])
