"""Signals, which only the command line handles: the first one asks to stop, the second one stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(BaseException):
    """A signal came where there is nothing to save; not an `Exception`, so that nothing takes it for an error.

    Parameters
    ----------
    signum : int
        Which one.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Turns SIGINT and SIGTERM into a request to stop, while it is entered as a context manager.

    Attributes
    ----------
    event : threading.Event
        Set by the first signal.
    signum : int or None
        The first signal.
    told : bool
        Whether a command has said what the signal led to.
    """

    def __init__(self) -> None:
        self.told = False
        self.event = threading.Event()
        self.signum: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """Name of the signal that came."""
        return "no signal" if self.signum is None else signal.Signals(self.signum).name

    @property
    def status(self) -> int:
        """Exit status that shells expect of a process that a signal stopped."""
        return 128 + (self.signum or 0)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only set the event on the first signal, instead of raising `Interrupted`: somebody looks at it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def __enter__(self) -> Self:
        """Install the handlers; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the handlers back that were there before."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            # No clean-up may hang now; checkpoints are written whole or not at all. The cursor may be hidden.
            os.write(2, (b"\x1b[?25h" if sys.stderr.isatty() else b"") + b"\nstreamgd: stopped at once\n")
            os._exit(128 + signum)
        self.signum = signum
        self.event.set()
        if not self._deferred:
            raise Interrupted(signum)
