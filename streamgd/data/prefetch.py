"""Fill the next windows while this one is consumed.

One thread, or several, walk through the plan, across the ends of epochs, and fill windows; the consumer takes them in
order and gives each back when it asks for the next, and where several may fill at once it fills one itself rather than
wait. Errors travel the same way, behind the windows that were filled before them.
"""

from __future__ import annotations

import contextlib
import enum
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Final, Literal, TypeAlias

from streamgd.data.flat import FlatFiller
from streamgd.data.plan import WindowPlan
from streamgd.data.window import ResidentFiller, Stopped, Window, WindowFiller


class End(enum.Enum):
    """What there is after the last window."""

    END = "no more windows"


#: What is handed out after the last window.
END: Final = End.END
Ended: TypeAlias = Literal[End.END]


def default_threads() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


class Prefetcher:
    """What the consumer and the threads share; knows nothing of the stream, which may therefore be collected.

    Each thread takes a free window first and a plan then, so that whoever fills the window that the consumer waits for
    has one to fill. Windows are handed out in the order of their plans, whoever is done first. Where several may fill
    at once, a consumer that would have to wait fills one itself: it takes the place of a thread, which would have to be
    woken, and to wait for the interpreter's lock.

    Parameters
    ----------
    filler : WindowFiller, ResidentFiller or FlatFiller
        What fills windows; closed with this.
    plans : iterator of WindowPlan
        What to fill them with, in order.
    make_window : callable
        Makes an empty window.
    depth : int
        The most windows, the consumer's included.
    n_callers : int, default=1
        How many may fill at once.

    Attributes
    ----------
    wait_s, fill_s : float
        Seconds that the consumer has waited for windows, and that went into filling them.
    exhausted : bool
        Whether the last window has been handed out and given back.
    """

    def __init__(
        self,
        filler: WindowFiller | ResidentFiller | FlatFiller,
        plans: Iterator[WindowPlan],
        make_window: Callable[[], Window],
        *,
        depth: int,
        n_callers: int = 1,
    ) -> None:
        self.filler = filler
        self.wait_s = 0.0
        self.fill_s = 0.0
        self.exhausted = False
        self._plans = _Ahead(plans)
        self._make_window = make_window
        self._n_unmade = depth  # windows are allocated when they are first needed: one epoch may need only one
        n_callers = max(1, min(n_callers, depth))
        self._helps = n_callers > 1
        self._n_threads = n_callers - self._helps
        self._free: deque[Window] = deque()
        self._ready: dict[int, Window | BaseException] = {}  # by the number of the plan
        self._n_handed = self._n_planned = 0
        self._n_running = 0
        self._handed: Window | None = None
        self._error: BaseException | None = None
        self._closed = False
        # Taken by itself, and not through the conditions: those are entered by Python code, which an interrupt can end
        # between the lock and the block that lets it go.
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        # Holds something where the consumer should look again. It waits for no condition: after an interrupt that comes
        # while one takes its lock again nobody knows whose it is.
        self._news: SimpleQueue[None] = SimpleQueue()
        self._n_inside = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        # Daemons, so that a consumer that was forgotten does not keep Python from exiting; the finalizer joins them.
        self._n_running = self._n_inside = self._n_threads
        self._threads = [
            threading.Thread(target=self._run, name=f"streamgd-prefetch-{number}", daemon=True)
            for number in range(self._n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def get(self, timeout_s: float | None) -> Window | Ended | None:
        """Hand out the next window, and take back the one before it; see `streamgd.data.window_stream`."""
        if not self._threads:
            return self._get_now()
        begin = time.perf_counter()
        with self._lock:
            if self._handed is not None:
                self._free.append(self._handed)
                self._handed = None
                self._freed.notify()
            if self._error is not None:
                raise self._error
        while self._helps and not self._answers() and self._help():
            pass
        answered = self._wait(timeout_s)
        with self._lock:
            self.wait_s += time.perf_counter() - begin
            found = None if self._closed else self._ready.pop(self._n_handed, None)
            if isinstance(found, BaseException):
                self._error = found
                raise found
            if found is not None:
                self._n_handed += 1
                self._handed = found
                return found
            if not answered:
                return None
            self.exhausted = True
            return END

    def _wait(self, timeout_s: float | None) -> bool:
        """Wait until there is something to say to the consumer; False if there is not in time."""
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                if self._answers():
                    return True
            left = end - time.monotonic()
            if left <= 0:
                return False
            with contextlib.suppress(Empty):
                self._news.get(timeout=None if left == math.inf else left)

    def _tell(self) -> None:
        """Have the consumer look again, if it waits or as soon as it would; under the lock."""
        if self._news.empty():
            self._news.put(None)

    def _answers(self) -> bool:
        """Whether there is something to say to the consumer."""
        return self._n_handed in self._ready or self._n_running == 0 or self._closed

    def _help(self) -> bool:
        """Fill a window in the consumer's thread, if there is one to fill."""
        entered = False
        try:
            with self._lock:
                if self._n_running == 0 or not (self._free or self._n_unmade):
                    return False
                self._n_running, self._n_inside, entered = self._n_running + 1, self._n_inside + 1, True
            return self._fill_next(wait=False)
        finally:
            if entered:
                self._leave()

    def _get_now(self) -> Window | Ended:
        """Fill a window in the consumer's thread."""
        if self._error is not None:
            raise self._error
        begin = time.perf_counter()
        plan, _ = (None, None) if self._closed else self._plans.take()
        if plan is None:
            self.exhausted = True
            return END
        if self._handed is None:
            self._handed = self._make_window()
        try:
            self.filler.fill(self._handed, plan)
        except BaseException as err:
            self._error = err
            raise
        self.fill_s += time.perf_counter() - begin
        self.wait_s += time.perf_counter() - begin
        return self._handed

    def _run(self) -> None:
        try:
            while self._fill_next(wait=True):
                pass
        finally:
            self._leave()

    def _fill_next(self, *, wait: bool) -> bool:
        """Fill the next window, or note what kept it from being filled; False if there will be no more."""
        number = -1
        try:
            window = self._free_window(wait=wait)
            if window is None:
                return False
            with self._lock:
                number = self._n_planned
                plan, upcoming = self._plans.take()
                self._n_planned += plan is not None
                if self._plans.exhausted:
                    self._freed.notify_all()  # whoever waits for a window need not
            if plan is None:
                return False
            begin = time.perf_counter()
            self.filler.fill(window, plan, upcoming)
            with self._lock:
                self.fill_s += time.perf_counter() - begin
                self._ready[number] = window
                self._tell()
        except Stopped:
            return False
        except BaseException as err:
            with self._lock:
                self._ready[self._n_planned if number < 0 else number] = err
                self._plans.end()
                self._tell()
                self._freed.notify_all()
            if not (wait or isinstance(err, Exception)):
                raise  # the consumer is interrupted
            return False
        return True

    def _leave(self) -> None:
        """Be the last to close the filler, if this thread is."""
        with self._lock:
            self._n_inside -= 1
            last = self._n_inside == 0
        error: BaseException | None = None
        if last:
            try:
                self.filler.close()
            except BaseException as err:
                error = err
        with self._lock:
            self._n_running -= 1
            if error is not None:
                self._ready.setdefault(self._n_planned, error)
            self._tell()

    def _free_window(self, *, wait: bool) -> Window | None:
        with self._lock:
            if wait:
                self._freed.wait_for(lambda: self._free or self._n_unmade or self._closed or self._plans.exhausted)
            if self._closed or self._plans.exhausted:
                return None
            if self._free:
                return self._free.popleft()
            if not self._n_unmade:
                return None
            self._n_unmade -= 1
        return self._make_window()

    def close(self) -> None:
        """Stop and join the threads, and close what fills windows. Idempotent."""
        with self._lock:
            self._closed = True
            self._tell()
            self._freed.notify_all()
        self.filler.stop()
        for thread in self._threads:
            if (
                thread.ident is not None and thread is not threading.current_thread()
            ):  # an interrupt may keep it from it
                thread.join()
        self.filler.close()
        self._ready.clear()
        self._free.clear()
        self._handed = None


class _Ahead:
    """The plans, each with the one after it; not for several threads at once."""

    def __init__(self, plans: Iterator[WindowPlan]) -> None:
        self._plans = plans
        self._next: WindowPlan | None = None
        self._begun = False
        self.exhausted = False

    def take(self) -> tuple[WindowPlan | None, WindowPlan | None]:
        if not self._begun:
            self._begun, self._next = True, next(self._plans, None)
        plan = None if self.exhausted else self._next
        self._next = None if plan is None else next(self._plans, None)
        self.exhausted = self._next is None
        return plan, self._next

    def end(self) -> None:
        self.exhausted = True
