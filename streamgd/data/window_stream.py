"""The windows of a run, in order: what is filled by whom, and how many windows there are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from streamgd.data.flat import FlatFiller
from streamgd.data.flat_files import FlatFiles, reads_flat
from streamgd.data.plan import EpochPlan, Layout, WindowPlan
from streamgd.data.prefetch import End, Ended, Prefetcher, default_threads
from streamgd.data.sources.base import Source
from streamgd.data.targets import TargetCodec
from streamgd.data.window import ResidentFiller, Window, WindowFiller

if TYPE_CHECKING:
    from streamgd.data.cache_writer import CacheWriter

#: In-memory data up to this size is shuffled when it is asked for, without threads: a hand-over would cost more.
_SMALL_BYTES = 2_000_000


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
        self._core = Prefetcher(filler, plans, lambda: Window(layout, source), depth=depth, n_callers=n_callers)
        self._row_bytes = source.stored_bytes / source.n_rows
        self._finalizer = weakref.finalize(self, self._core.close)
        if not small:
            self._core.start()

    def get(self, timeout_s: float | None = None) -> Window | Ended | None:
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
        while not isinstance(window := self.get(), End):
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
