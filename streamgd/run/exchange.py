"""How workers of one machine hand one another what their lanes found, without Dask: an exchange.

A round that is made of Dask's tasks costs milliseconds beside its work: every worker tells the scheduler that its turns
are over, and is told of the next ones. Workers of the same machine play many rounds in one task each, and hand what
came of every turn to the others through sockets of the machine, in a tenth of a millisecond. What travels is what tasks
would hand on, and every worker merges it for itself, as tasks would.

Nobody may wait without end for a worker that is busy with something else, or gone. Those that share rounds meet first,
for which they have a moment's patience. Whoever gives up, or fails, closes its sockets, and the others give up too;
then these rounds are played by tasks.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import itertools
import os
import pickle
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from streamgd.data.window import Stopped

#: Seconds to wait for others at the start, who may be importing, or busy with other tasks; the same where they have met
#: before for rounds of this attempt; and for another's turn.
_MEET_S, _MEET_AGAIN_S, _TURN_S = 2.0, 0.3, 60.0
#: Seconds between attempts to reach who is not there yet; and between looks whether to wait on for who is to come.
_KNOCK_S, _LISTEN_S = 0.001, 0.05
#: Seconds to look for what comes before sleeping until it does. Linux wakes who sleeps on the processor of who sent,
#: which is about to sleep too; then both take their turns there, one after the other, and another one is idle.
_LOOK_S = 0.0005
#: Bytes of a message that a socket takes in before the other end reads.
_FITTING_BYTES = 32_000
_SIZE = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("iII")  # process, user, group
_PROOF_BYTES = 32  # of SHA-256


class ApartError(Exception):
    """Those that were to share rounds did not meet, or one of them is gone or gave up."""


@dataclass(frozen=True)
class Circle:
    """Those that share some rounds, as one of them sees it.

    Attributes
    ----------
    attempt, flight : int
        Which rounds these are: those of one attempt follow one another.
    homes : sequence of str
        The worker of each.
    mine : int
        Which of them this is.
    """

    attempt: int
    flight: int
    homes: Sequence[str]
    mine: int

    @property
    def home(self) -> str:
        """The worker of this one."""
        return self.homes[self.mine]

    def meets_as(self, other: Circle) -> bool:
        """Whether those that met for other rounds need not meet again for these."""
        return (self.attempt, self.homes, self.mine) == (other.attempt, other.homes, other.mine)


def can_meet(addresses: Sequence[str]) -> bool:
    """Whether workers are processes of one machine, by their addresses, and can have an exchange."""
    from distributed.comm.addressing import get_address_host, parse_address

    if not sys.platform.startswith("linux") or len(addresses) < 2:
        return False
    if any(parse_address(address)[0] == "inproc" for address in addresses):
        return False
    return len({get_address_host(address) for address in addresses}) == 1


class Exchange:
    """What a process has of the exchange of one run.

    Parameters
    ----------
    token : bytes
        Known to all that take part, and to nobody else.

    Notes
    -----
    Sockets are of Linux's abstract namespace: they have names, no files, and are gone with their process. Both ends see
    to it that the other one belongs to the same user, and knows the token, before they take anything from it.
    """

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._lock = threading.Lock()
        self._meetings: dict[int, _Meeting] = {}  # those that wait for their next rounds
        self._open: set[_Meeting] = set()  # all of them
        self._attempt = 0  # the latest
        self._closed = False

    @contextlib.contextmanager
    def among(self, circle: Circle) -> Iterator[Callable[[Any], list[Any]]]:
        """Meet those that share some rounds.

        Yields
        ------
        callable
            Hands what one found to all, and returns what all found, in order; to be called as often by each of them.

        Raises
        ------
        ApartError
            If they do not meet, or one of them gives up; also raised by what is yielded.
        Stopped
            If this is closed, likewise.
        """
        meeting = self._take(circle)
        numbers = itertools.count()

        def gather(part: Any) -> list[Any]:
            with self._apart_if_broken():
                return meeting.gather((circle.flight, next(numbers)), part)

        try:
            with self._apart_if_broken():
                meeting.wait_for(_MEET_AGAIN_S if meeting.met else _MEET_S)
                gather(None)
                meeting.wait_for(_TURN_S)
            yield gather
        except BaseException:
            self._drop(meeting)
            raise
        with self._lock:
            stays = not self._closed and circle.attempt >= self._attempt
            if stays:
                self._meetings[circle.mine] = meeting
        if not stays:
            self._drop(meeting)

    def give_up(self, attempt: int) -> None:
        """Have nobody wait for rounds of attempts before this one, which are played again, now or later."""
        with self._lock:
            self._attempt = max(self._attempt, attempt)
            old = [meeting for meeting in self._open if meeting.circle.attempt < attempt]
        for meeting in old:
            meeting.shut_down()

    def close(self) -> None:
        """Have nobody wait here any more, and leave nothing behind. Idempotent."""
        with self._lock:
            self._closed = True
            left, idle = list(self._open), list(self._meetings.values())
            self._meetings.clear()
            self._open.clear()
        for meeting in left:  # who waits is woken, and closes
            meeting.shut_down()
        for meeting in idle:
            meeting.close()

    def _take(self, circle: Circle) -> _Meeting:
        with self._lock:
            if self._closed:
                raise Stopped
            if circle.attempt < self._attempt:
                raise ApartError("these rounds are played again")
            self._attempt = circle.attempt
            before = self._meetings.pop(circle.mine, None)
            if before is not None and circle.meets_as(before.circle):
                return before
            new = _Meeting(circle, self._token)
            self._open.add(new)
        if before is not None:
            self._drop(before)
        return new

    def _drop(self, meeting: _Meeting) -> None:
        meeting.close()
        with self._lock:
            self._open.discard(meeting)

    @contextlib.contextmanager
    def _apart_if_broken(self) -> Iterator[None]:
        """Take what goes wrong with sockets for others having gone, unless this was closed."""
        try:
            yield
        except OSError as err:
            raise (Stopped() if self._closed else ApartError(f"{type(err).__name__}: {err}")) from err


class _Meeting:
    """The sockets from one that shares rounds to all others."""

    def __init__(self, circle: Circle, token: bytes) -> None:
        self.circle, self._token = circle, token
        self._ends: dict[int, socket.socket] = {}
        self._polls: dict[int, Any] = {}
        self._shut = False

    @property
    def met(self) -> bool:
        """Whether all have met; if some did not, it was closed."""
        return bool(self._ends)

    def wait_for(self, seconds: float) -> None:
        """Meet, if need be, and wait up to so many seconds for what others say from now on."""
        if not self.met:
            self._meet(time.monotonic() + seconds)
        if self._shut:
            raise TimeoutError("it is over")
        for index, end in self._ends.items():
            end.settimeout(seconds)
            if index not in self._polls:
                self._polls[index] = select.poll()
                self._polls[index].register(end, select.POLLIN)

    def gather(self, which: tuple[int, int], part: Any) -> list[Any]:
        """Hand a part to all others, and return all parts; what is bigger than sockets take in, in pairs in order."""
        mine = self.circle.mine
        message = pickle.dumps((which, part), protocol=5)
        size = _SIZE.pack(len(message))
        fits = len(message) <= _FITTING_BYTES
        if fits:
            for end in self._ends.values():
                end.sendall(size + message)
        found = {mine: part}
        for index, end in sorted(self._ends.items()):
            if not fits and index > mine:
                end.sendall(size)
                end.sendall(message)
            self._look(index)
            theirs, found[index] = pickle.loads(_read(end))
            if theirs != which:
                raise ApartError(f"others are elsewhere: at {theirs}, not {which}")
            if not fits and index < mine:
                end.sendall(size)
                end.sendall(message)
        return [part for _, part in sorted(found.items())]

    def _look(self, index: int) -> None:
        poll, until = self._polls[index].poll, time.perf_counter() + _LOOK_S
        while not poll(0) and time.perf_counter() < until:
            pass

    def _meet(self, until: float) -> None:
        """Be called by those behind, and call those before."""
        mine, n = self.circle.mine, len(self.circle.homes)
        if not sys.platform.startswith("linux"):
            raise ApartError(f"{sys.platform} has no such sockets")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._name(mine))
            listener.listen(n)
            for index in range(mine):
                self._ends[index] = self._call(index, until)
            listener.settimeout(_LISTEN_S)
            while len(self._ends) < n - 1:
                self._go_on(until)
                try:
                    end, _ = listener.accept()
                except TimeoutError:
                    continue
                with contextlib.suppress(OSError), contextlib.ExitStack() as held:
                    held.enter_context(end)
                    end.settimeout(_MEET_S)
                    _require_same_user(end)
                    (index,) = _SIZE.unpack(_read_exactly(end, _SIZE.size))
                    self._require_token(end, b"is called", b"calls %d" % index)
                    if mine < index < n and index not in self._ends:
                        self._ends[index] = end
                        held.pop_all()

    def _call(self, index: int, until: float) -> socket.socket:
        while True:
            end = socket.socket(socket.AF_UNIX)
            try:
                end.settimeout(_MEET_S)
                end.connect(self._name(index))
                _require_same_user(end)
                end.sendall(_SIZE.pack(self.circle.mine))
                self._require_token(end, b"calls %d" % self.circle.mine, b"is called")
                return end
            except OSError as err:
                end.close()
                if not isinstance(err, ConnectionRefusedError):  # it listens not yet
                    raise
            self._go_on(until)
            time.sleep(_KNOCK_S)

    def _require_token(self, end: socket.socket, mine: bytes, theirs: bytes) -> None:
        """Prove to know the token, by what only who does makes of the other's random bytes; and require the same."""
        ours = os.urandom(_PROOF_BYTES)
        end.sendall(ours)
        asked = _read_exactly(end, _PROOF_BYTES)
        end.sendall(hmac.digest(self._token, mine + asked, "sha256"))
        if not hmac.compare_digest(_read_exactly(end, _PROOF_BYTES), hmac.digest(self._token, theirs + ours, "sha256")):
            raise PermissionError("the other end does not know the token")

    def _go_on(self, until: float) -> None:
        if self._shut or time.monotonic() >= until:
            raise TimeoutError("not all have come")

    def _name(self, index: int) -> str:
        """Name the socket on which others call one, in Linux's abstract namespace."""
        known = f"{self.circle.attempt} {index} {' '.join(self.circle.homes)}"
        return "\0streamgd-" + hashlib.sha256(self._token + known.encode()).hexdigest()[:32]

    def shut_down(self) -> None:
        """Have whoever waits here wait no more."""
        self._shut = True
        for end in list(self._ends.values()):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut_down()  # a process that was forked from this one may have them open still
        for end in self._ends.values():
            end.close()
        self._ends.clear()


def _require_same_user(end: socket.socket) -> None:
    _, user, _ = _CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if user != os.geteuid():
        raise PermissionError(f"the other end belongs to user {user}")


def _read(end: socket.socket) -> bytearray:
    (size,) = _SIZE.unpack(_read_exactly(end, _SIZE.size))
    return _read_exactly(end, size)


def _read_exactly(end: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        n = end.recv_into(view)
        if n == 0:
            raise ConnectionResetError("the other one is gone, or gave up")
        view = view[n:]
    return data
