"""Fill the next windows while this one is consumed.

One thread, or several, walk through the plan, across the ends of epochs, and fill windows; the consumer takes them in
order and gives each back when it asks for the next, and where several may fill at once it fills one itself rather than
wait. Errors travel the same way, behind the windows that were filled before them.
"""

from __future__ import annotations

import enum
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from streamgd.data.flat import FlatFiller
from streamgd.data.flat_files import FlatFiles, reads_flat
from streamgd.data.plan import EpochPlan, Layout, WindowPlan
from streamgd.data.sources.base import Source
from streamgd.data.targets import TargetCodec
from streamgd.data.window import ResidentFiller, Stopped, Window, WindowFiller

if TYPE_CHECKING:
    from streamgd.data.cache_writer import CacheWriter

#: In-memory data up to this size is shuffled when it is asked for, without threads: a hand-over would cost more.
_SMALL_BYTES = 2_000_000


class _End(enum.Enum):
    END = "no more windows"


#: What `WindowStream.get` returns after the last window.
END: Final = _End.END
Ended: TypeAlias = Literal[_End.END]


def default_threads() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def make_filler(
    source: Source,
    layout: Layout,
    codec: TargetCodec | None,
    *,
    shift: NDArray[np.float64] | None,
    factor: NDArray[np.float64] | None,
    n_threads: int,
    check: bool = True,
    keep: CacheWriter | None = None,
    spare_bytes: int = 0,
    files: FlatFiles | None = None,
) -> WindowFiller | FlatFiller:
    """Return what fills windows from a source the fastest; the parameters are those of both fillers."""
    rows = source.flat_rows() if keep is None and reads_flat(source, codec) else None
    if rows is None:
        return WindowFiller(
            source,
            layout,
            codec,
            shift=shift,
            factor=factor,
            n_threads=n_threads,
            check=check,
            keep=keep,
            spare_bytes=spare_bytes,
        )
    return FlatFiller(
        source, rows, layout, codec, shift=shift, factor=factor, n_threads=n_threads, check=check, files=files
    )


class WindowStream:
    """The windows of a run, in order, read ahead.

    Parameters
    ----------
    source : Source
        What is read.
    layout : Layout
        The memory plan.
    codec : TargetCodec or None
        How targets become numbers; None leaves the target out.
    seed : int
        Any non-negative number.
    shuffle : bool, default=True
        Whether rows are shuffled.
    shift, factor : ndarray of shape (n_features,), float64, or None, default=None
        Features become ``(x - shift) * factor``.
    first : tuple of int, default=(0, 0)
        Epoch and window to begin with.
    n_epochs : int or None, default=1
        Epoch to stop before, counted from 0 and not from `first`; None goes on for ever.
    n_threads : int or None, default=None
        Threads that read; default: one for each processor. No result depends on it.
    depth : int or None, default=None
        The most windows in memory, the consumer's and those ahead of it; default: as many as the layout has room for.
        No result depends on it.
    lane, n_lanes : int, default=0 and 1
        Which part of the blocks.
    check : bool, default=True
        Whether numbers that are not finite are errors.
    keep : CacheWriter or None, default=None
        Is given every row that is read, as it is stored; one epoch at most.

    Notes
    -----
    A context manager; `close` stops and joins every thread. A stream that is dropped without it is closed when it is
    collected, or when Python exits. For one consumer.

    The first window of the next epoch is read while the last one of this epoch is consumed. If one window holds all
    rows and the layout has room to keep them, they are read only once.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        codec: TargetCodec | None,
        *,
        seed: int,
        shuffle: bool = True,
        shift: NDArray[np.float64] | None = None,
        factor: NDArray[np.float64] | None = None,
        first: tuple[int, int] = (0, 0),
        n_epochs: int | None = 1,
        n_threads: int | None = None,
        depth: int | None = None,
        lane: int = 0,
        n_lanes: int = 1,
        check: bool = True,
        keep: CacheWriter | None = None,
    ) -> None:
        whole = n_lanes == 1 and layout.window_rows >= source.n_rows
        small = whole and source.kind == "memory" and layout.row_bytes * source.n_rows <= _SMALL_BYTES
        n_threads = 1 if small else default_threads() if n_threads is None else n_threads
        reader = make_filler(
            source,
            layout,
            codec,
            shift=shift,
            factor=factor,
            n_threads=n_threads,
            check=check,
            keep=keep,
            spare_bytes=layout.spare_bytes if n_lanes == 1 else 0,  # lanes share a source, and are not all here
        )
        again = n_epochs is None or n_epochs - first[0] > 1
        # What is in memory anyway is not copied, unless it is so small that calling its reader costs more.
        stays = again and (small or (whole and layout.resident and source.kind != "memory"))
        filler = ResidentFiller(reader, Window(layout, source)) if stays else reader

        def plan_epoch(epoch: int) -> EpochPlan:
            plan = EpochPlan(
                source.block_rows, layout, seed=seed, epoch=epoch, shuffle=shuffle, lane=lane, n_lanes=n_lanes
            )
            if isinstance(filler, FlatFiller):
                filler.expect(plan, first[1] if epoch == first[0] else 0)
            return plan

        plans = _windows_of(plan_epoch, first, n_epochs)
        depth = layout.n_windows - layout.resident if depth is None else depth
        n_callers = reader.n_callers if filler is reader else 1
        # One window for the consumer, and one for every thread that fills its own.
        depth = 1 if small else max(1, min(depth, 1 + n_callers))
        self._core = _Prefetcher(filler, plans, lambda: Window(layout, source), depth=depth, n_callers=n_callers)
        self._row_bytes = source.stored_bytes / source.n_rows
        self._finalizer = weakref.finalize(self, self._core.close)
        if not small:
            self._core.start()

    def get(self, timeout_s: float | None = None) -> Window | Literal[_End.END] | None:
        """Return the next window; the one before it goes back to be refilled.

        Parameters
        ----------
        timeout_s : float or None, default=None
            How long to wait; None waits until there is something. A window that is filled meanwhile is filled to its
            end.

        Returns
        -------
        Window, END or None
            The window is the consumer's until the next call. ``END`` after the last one, None if time ran out.

        Raises
        ------
        Exception
            Whatever reading the window raised, with the traceback of the thread that read. It is raised again by
            every further call.
        """
        return self._core.get(timeout_s)

    def __iter__(self) -> Iterator[Window]:
        """Go through the windows to the end."""
        while not isinstance(window := self.get(), _End):
            if window is not None:
                yield window

    @property
    def exhausted(self) -> bool:
        """Whether the last window has been handed out and given back."""
        return self._core.exhausted

    @property
    def wait_s(self) -> float:
        """Seconds that the consumer has waited for windows."""
        return self._core.wait_s

    @property
    def fill_s(self) -> float:
        """Seconds spent filling windows, whether somebody waited or not."""
        return self._core.fill_s

    @property
    def read_bytes(self) -> int:
        """Bytes of storage behind the rows read so far, those ahead of the consumer included."""
        return round(self._core.filler.read_rows * self._row_bytes)

    def close(self) -> None:
        """Stop and join every thread and close every reader. Idempotent; waits for a read that is under way."""
        self._finalizer()

    def __enter__(self) -> Self:
        """Return the stream itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def _windows_of(
    plan_epoch: Callable[[int], EpochPlan], first: tuple[int, int], n_epochs: int | None
) -> Iterator[WindowPlan]:
    """Walk through the windows of all epochs; a lane without rows has none."""
    epoch, window = first
    while n_epochs is None or epoch < n_epochs:
        plan = plan_epoch(epoch)
        if plan.n_rows == 0:
            return
        yield from plan.windows(window)
        epoch, window = epoch + 1, 0


class _Prefetcher:
    """What the consumer and the threads share; knows nothing of the `WindowStream`, which may therefore be collected.

    Each thread takes a free window first and a plan then, so that whoever fills the window that the consumer waits for
    has one to fill. Windows are handed out in the order of their plans, whoever is done first. Where several may fill
    at once, a consumer that would have to wait fills one itself: it takes the place of a thread, which would have to be
    woken, and to wait for the interpreter's lock.
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
        self._filled, self._freed = threading.Condition(self._lock), threading.Condition(self._lock)
        self._n_inside = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        # Daemons, so that a consumer that was forgotten does not keep Python from exiting; the finalizer joins them.
        self._n_running = self._n_inside = self._n_threads
        self._threads = [
            threading.Thread(target=self._run, name=f"streamgd-prefetch-{number}", daemon=True)
            for number in range(self._n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def get(self, timeout_s: float | None) -> Window | Literal[_End.END] | None:
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
        with self._lock:
            answered = self._filled.wait_for(self._answers, timeout_s)
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

    def _get_now(self) -> Window | Literal[_End.END]:
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
                self._filled.notify()
        except Stopped:
            return False
        except BaseException as err:
            with self._lock:
                self._ready[self._n_planned if number < 0 else number] = err
                self._plans.end()
                self._filled.notify()
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
            self._filled.notify()

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
        with self._lock:
            self._closed = True
            self._filled.notify_all()
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
