"""The only training loop.

`train` takes a `Run` to its end: it takes windows from `streamgd.data.window_stream`, hands their rows to the kernel,
closes epochs, saves checkpoints and tells a `Watcher` how it goes. Nothing that it does depends on time except when it
saves.
Several lanes, and clusters, are trained in rounds, see `streamgd.run.rounds`; what both have in common is in
`streamgd.run.epochs`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from streamgd.data.prefetch import END
from streamgd.data.window import Window
from streamgd.errors import ClusterError, DataError, RowAccountingError
from streamgd.learn import kernels
from streamgd.run.caching import RunWindows
from streamgd.run.config import RunOptions, refuse_cache
from streamgd.run.epochs import Reading, Training, Watcher, interrupts
from streamgd.run.folder import RunFolder
from streamgd.run.runs import Run

__all__ = ["Watcher", "train"]

#: A kernel call should not last longer than half a second: signals wait for it.
_CALL_S = 0.25
#: How long to wait for a reader before looking whether somebody asked to stop.
_POLL_S = 0.1
#: The most window records in ``metrics.jsonl`` per epoch; an epoch's end always has one.
_RECORDS_PER_EPOCH = 100
_EMPTY = np.zeros(0)


def train(
    run: Run,
    *,
    options: RunOptions | None = None,
    folder: RunFolder | None = None,
    watcher: Watcher | None = None,
    stop: threading.Event | None = None,
    client: Any = None,
) -> bool:
    """Train until the run is finished or somebody asks to stop.

    Parameters
    ----------
    run : Run
        Updated in place.
    options : RunOptions, optional
        Threads and checkpoint interval.
    folder : RunFolder, optional
        Where checkpoints and metrics go; already locked.
    watcher : Watcher, optional
        Told how it goes.
    stop : threading.Event, optional
        Set by a signal handler: the loop saves and returns at the next kernel call's end, or at once while it waits.

    client : distributed.Client, optional
        A cluster to train on, to the same bits. Without one, training is done here.

    Returns
    -------
    bool
        Whether the run is finished; False if it was asked to stop.

    Raises
    ------
    DivergenceError
        If the coefficients leave the finite numbers; the last checkpoint is kept.
    RowAccountingError
        If an epoch did not see every row exactly once.
    CheckpointWriteError
        If a checkpoint cannot be written; the one before is kept.
    """
    cached = run.cached is not None or (options is not None and options.cache is not None)
    refuse_cache(run.config, cached=cached, on_cluster=client is not None)
    arguments = run, options or RunOptions(), folder, watcher or Watcher(), stop or threading.Event()
    if client is None and run.config.n_lanes == 1:
        return _Training(*arguments).go()
    from streamgd.run.rounds import RoundTraining

    return RoundTraining(*arguments, client).go()


class _Training(Training):
    """Trains on one window after the other."""

    def __init__(
        self, run: Run, options: RunOptions, folder: RunFolder | None, watcher: Watcher, stop: threading.Event
    ) -> None:
        super().__init__(run, options, folder, watcher, stop)
        self._output_scale = run.survey.output_scale()
        n_outputs = len(run.survey.start)
        self._piece = max(run.batch_rows, int(1e7 // (n_outputs * (run.source.n_features + 16))))

    def go(self) -> bool:
        run = self.run
        self.watcher.started(run)
        if run.finished:
            return True
        with RunWindows(run, self.options, self.watcher.message, self.watcher.note) as stream:
            # After the plan for a cache, which belongs to the run.
            if self.folder is not None and run.state.counters[kernels.N_ROWS] == 0:
                self.save()
            # Saved before the stream is closed, which waits for reads that are under way.
            try:
                with interrupts():
                    done = self._through(stream)
            except (KeyboardInterrupt, ClusterError, DataError):
                # The kernel changes state and cursor in one call, so the state is whole wherever the interrupt came;
                # and where the data ends the run, what was learnt before is kept.
                if self.folder is not None:
                    self.save()
                raise
            if not done and self.folder is not None:
                self.save()
        return done

    def _through(self, stream: RunWindows) -> bool:
        """Take windows until the run is finished (True) or asked to stop (False)."""
        while not self.stop.is_set():
            window = stream.get(_POLL_S)
            if window is None:
                continue
            if window is END:
                raise RowAccountingError("the reader ended before the last epoch did; this is a bug")
            if not self._consume(window, stream):
                return False
            self._record(window)
            if window.last:
                if self._end_epoch():
                    return True
            else:
                self.run.state.next_window()
                self._save_if_due()
        return False

    def _consume(self, window: Window, stream: RunWindows) -> bool:
        """Train on what is left of a window; False if asked to stop before its end."""
        state = self.run.state
        carry = (state.carry_X, state.carry_y, state.carry_weight)
        weight = _EMPTY if window.weight is None else window.weight
        while True:
            row = int(state.counters[kernels.ROW])
            until = min(window.n_rows, row + self._piece)
            ends = until == window.n_rows
            began = time.perf_counter()
            kernels.consume(
                window.X,
                window.y,
                weight,
                window.ids,
                row,
                until,
                ends and window.last,
                state.learnt,
                carry,
                state.checksum,
                state.moments,
                self._packed.codes,
                self._packed.params,
                self.run.survey.class_factors,
                self._output_scale,
            )
            took = time.perf_counter() - began
            if state.counters[kernels.STATUS] == kernels.DIVERGED:
                raise self._divergence(f"window {window.index + 1}")
            if until - row >= self._piece:
                self._piece = max(1, min(4 * self._piece, int((until - row) * _CALL_S / max(took, 1e-6))))
            self.watcher.advanced(self.run, Reading(stream.wait_s, stream.read_bytes))
            if ends:
                return True
            if self.stop.is_set():
                return False
            self._save_if_due()

    def _record(self, window: Window) -> None:
        """Write a metrics record of a window; which windows have one depends on their number alone."""
        if self.folder is not None:
            n_windows = -(-self.run.source.n_rows // self.run.layout_now.window_rows)
            if window.index % -(-n_windows // _RECORDS_PER_EPOCH) == 0:
                self.folder.append_metrics(self._metrics(window.index, self.run.state.progressive_loss))
