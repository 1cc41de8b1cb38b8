"""What every way of training does between rows: records, checks and closes epochs, saves, says what went wrong.

`streamgd.run.loop` trains on one window after the other, `streamgd.run.rounds` on several lanes at once; both are a
`Training`.
"""

from __future__ import annotations

import abc
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgd.data.plan import checksum_of
from streamgd.errors import DivergenceError, RowAccountingError
from streamgd.learn import kernels
from streamgd.learn.schedules import ADAPTIVE_FLOOR
from streamgd.learn.state import State
from streamgd.run.config import Config, RunOptions
from streamgd.run.folder import RunFolder
from streamgd.run.runs import Run

#: A run that ends with a loss this many times that of the best constant prediction has not converged but diverged.
_LOST = 1e6
#: A feature whose spread is this many times what the survey saw is named.
_OFF_BY = 10.0


@dataclass
class Reading:
    """What is known of the reading behind a run.

    Attributes
    ----------
    wait_s : float
        Seconds that training has waited for windows.
    read_bytes : int
        Bytes of storage behind the rows read so far.
    round_s : float or None
        Seconds of the last round; None if there are no rounds.
    workers : int or None
        Workers of the cluster; None if there is none.
    """

    wait_s: float = 0.0
    read_bytes: int = 0
    round_s: float | None = None
    workers: int | None = None


class Watcher:
    """What the loop tells whoever watches. Every method may be overridden; none changes the run."""

    def message(self, text: str) -> None:
        """Take a sentence that a person should see."""

    def note(self, text: str) -> None:
        """Take a sentence that a person may want to see."""

    def started(self, run: Run) -> None:
        """See the run before its first row, or where it resumes."""

    def advanced(self, run: Run, stream: Reading) -> None:
        """See the run after each kernel call, or each round."""

    def epoch_ended(self, run: Run, loss: float) -> None:
        """See the mean progressive loss of an epoch."""

    def saved(self, run: Run) -> None:
        """See that a checkpoint was written."""


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Let an interrupt be one: Python's conditions fail for lack of their lock if it comes while they take it again."""
    try:
        yield
    except RuntimeError as err:
        if isinstance(err.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from err
        raise


class Training(abc.ABC):
    """One call of `streamgd.run.loop.train`: the kernel's arguments, and when the last checkpoint was.

    Parameters
    ----------
    run : Run
        Updated in place.
    options : RunOptions
        How it goes.
    folder : RunFolder or None
        Where checkpoints and metrics go; already locked.
    watcher : Watcher
        Told how it goes.
    stop : threading.Event
        Set when somebody asks to stop.
    """

    def __init__(
        self, run: Run, options: RunOptions, folder: RunFolder | None, watcher: Watcher, stop: threading.Event
    ) -> None:
        self.run, self.options, self.folder, self.watcher, self.stop = run, options, folder, watcher, stop
        source = run.source
        # The survey's sample is checked against all rows while the first epoch trains.
        self._checks_scale = run.config.standardize is True and run.survey.n_sampled < source.n_rows
        self._packed = run.packed(moments=self._checks_scale and run.state.epoch == 0)
        self._expected = checksum_of(source.block_rows)
        self._tol = run.config.absolute_tol(run.survey.null_loss)
        self._saved_at = time.monotonic()
        self._began = time.monotonic()

    @abc.abstractmethod
    def go(self) -> bool:
        """Train; say whether the run is finished, rather than asked to stop."""

    def _metrics(self, window: int | None, loss: float, state: State | None = None) -> dict[str, Any]:
        state, survey = self.run.state if state is None else state, self.run.survey
        return {
            "epoch": state.epoch,
            "window": window,
            "rows": int(state.counters[kernels.N_ROWS]),
            "updates": int(state.counters[kernels.N_UPDATES]),
            "loss": loss,
            "explained": 1.0 - loss / survey.null_loss if survey.null_loss > 0 else None,
            "wall_s": round(time.monotonic() - self._began, 3),
        }

    def _end_epoch(self) -> bool:
        """Check that every row was seen once, close the epoch, and say whether the run is finished."""
        run, state = self.run, self.run.state
        seen = int(state.counters[kernels.EPOCH_ROWS])
        if seen != run.source.n_rows or int(state.checksum[0]) != self._expected:
            raise RowAccountingError(
                f"epoch {state.epoch + 1} saw {seen:,} rows with checksum {int(state.checksum[0]):016x}; expected each "
                f"of the {run.source.n_rows:,} rows exactly once, checksum {self._expected:016x}. The data changed "
                "while it was read, or this is a bug"
            )
        if self._checks_scale and state.epoch == 0:
            for text in self._misjudged():
                self.watcher.message(text)
        self._packed = self._packed.without_moments()
        closed = closed_epoch(state, run.config, self._tol)
        # The record comes first: an epoch that is interrupted before it is closed will be recorded again, while one
        # that was closed will not.
        if self.folder is not None:
            self.folder.append_metrics(self._metrics(None, closed["loss_curve"][-1]))
        state.__dict__.update(closed)
        run.finished = run.reason_to_end()
        if run.finished and not run.open_ended and state.loss_curve[-1] > _LOST * run.survey.null_loss > 0:
            raise self._lost()
        self.watcher.epoch_ended(run, state.loss_curve[-1])
        if self.folder is not None:
            self.save()
        return run.finished is not None

    def _misjudged(self) -> list[str]:
        """Name features whose spread over the first epoch is far from what the survey's sample showed."""
        state, source = self.run.state, self.run.source
        n = float(state.counters[kernels.EPOCH_ROWS])
        # Without an intercept features are scaled by their size around zero, see the survey.
        mean = state.moments[0] / n if self.run.config.recipe.fit_intercept else 0.0
        spread = np.sqrt(np.maximum(state.moments[1] / n - mean**2, 0.0))
        off = np.flatnonzero((spread > _OFF_BY) | ((spread < 1 / _OFF_BY) & (spread > 0)))
        if not len(off):
            return []
        named = ", ".join(f"{source.feature_label(int(j))} ({spread[j]:.3g} times)" for j in off[:10])
        more = f" and {len(off) - 10} more" if len(off) > 10 else ""
        return [
            f"the spread of {len(off)} feature(s) differs more than tenfold from what the survey's sample of "
            f"{self.run.survey.n_sampled:,} rows showed: {named}{more}. The fit is valid; standardize='full' scales "
            "them by their exact moments"
        ]

    def _divergence(self, part: str) -> DivergenceError:
        state = self.run.state
        kept = "" if self.folder is None else f" The last checkpoint in {self.folder.path} is good."
        return DivergenceError(
            f"training diverged in epoch {state.epoch + 1}, {part}, update "
            f"{int(state.counters[kernels.N_UPDATES]) + 1:,}: a loss, prediction or gradient of the batch overflowed "
            + self._advice()
            + kept
        )

    def _lost(self) -> DivergenceError:
        loss, null = self.run.state.loss_curve[-1], self.run.survey.null_loss
        return DivergenceError(
            f"training diverged: after {self.run.state.epoch} epochs the loss is {loss:.3g}, {loss / null:.3g} times "
            f"that of the best constant prediction {self._advice()}"
        )

    def _advice(self) -> str:
        recipe = self.run.config.recipe
        if self.run.config.standardize is False:
            advice = "standardize=True, which scales the features"
        elif recipe.the_optimizer.code == kernels.AUTO and recipe.eta0 == "auto":
            advice = "smaller values: the target or the weights are so large that the loss overflows"
        else:
            advice = "a smaller eta0, or optimizer='auto', which needs none"
        return (
            f"(loss={recipe.loss!r}, optimizer={recipe.the_optimizer.name!r}, eta0={recipe.first_eta:g}). Try {advice}."
        )

    def _save_if_due(self) -> None:
        if self.folder is not None and time.monotonic() - self._saved_at >= self.options.checkpoint_every_s:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of the run as it stands."""
        assert self.folder is not None
        self.folder.save(self.run.to_checkpoint(), int(self.run.state.counters[kernels.N_ROWS]))
        self._saved_at = time.monotonic()
        self.watcher.saved(self.run)


def closed_epoch(state: State, config: Config, tol: float | None) -> dict[str, Any]:
    """Return what changes in the state when an epoch is closed: its loss is noted, the cursor goes to the next epoch.

    All of it is to take effect in one step, so that an interrupt finds the epoch open or closed.

    Parameters
    ----------
    state : State
        All rows of its epoch are trained; stays as it is.
    config : Config
        The run's.
    tol : float or None
        In units of the loss, see `Config.absolute_tol`.
    """
    scalars, counters = state.scalars.copy(), state.counters.copy()
    weight = scalars[kernels.WEIGHT_SUM]
    loss = float(scalars[kernels.LOSS_SUM] / weight) if weight > 0 else 0.0
    objective = loss + float(scalars[kernels.PENALTY_SUM]) / max(1, int(counters[kernels.EPOCH_ROWS]))
    if tol is not None and objective > scalars[kernels.BEST_OBJECTIVE] - tol:
        counters[kernels.NO_IMPROVEMENT] += 1
    else:
        counters[kernels.NO_IMPROVEMENT] = 0
    scalars[kernels.BEST_OBJECTIVE] = min(objective, scalars[kernels.BEST_OBJECTIVE])
    if counters[kernels.NO_IMPROVEMENT] >= config.n_iter_no_change and config.recipe.schedule == "adaptive":
        rate = config.recipe.first_eta * scalars[kernels.ETA_SCALE]
        if rate > ADAPTIVE_FLOOR:
            scalars[kernels.ETA_SCALE] /= 5.0
            counters[kernels.NO_IMPROVEMENT] = 0
    scalars[[kernels.LOSS_SUM, kernels.WEIGHT_SUM, kernels.PENALTY_SUM]] = 0.0
    counters[kernels.EPOCH] += 1
    counters[[kernels.WINDOW, kernels.ROW, kernels.EPOCH_ROWS]] = 0
    return {
        "scalars": scalars,
        "counters": counters,
        "checksum": np.zeros(1, np.uint64),
        "loss_curve": [*state.loss_curve, loss],
    }
