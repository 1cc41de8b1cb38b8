"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, or warnings alone.

`Pace` turns what the loop tells into figures; the three `View`s show them. Everything goes to standard error, so that
standard output holds results alone. Nothing here changes what is computed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from streamgd.learn import kernels
from streamgd.run.epochs import Reading, Watcher
from streamgd.run.runs import Run

if TYPE_CHECKING:
    from rich.live import Live

#: Rates are taken over so many seconds.
SPAN_S = 15.0
#: Seconds between plain lines; an epoch's end has one too, if the last is older than the second number.
LINE_EVERY_S, EPOCH_LINE_EVERY_S = 10.0, 1.0
#: Seconds between two drawings of the bar.
_DRAW_EVERY_S = 0.2


@dataclass(frozen=True)
class Figures:
    """How a run stands.

    Attributes
    ----------
    epoch, n_epochs : int
        The epoch being trained, counted from 1, and how many there may be.
    n_rows, total_rows : int
        Rows consumed in all epochs, and how many there may be.
    rows_per_s, bytes_per_s : float or None
        Pace over the last seconds; None while it is not known, or where nothing is read from storage.
    wait_share : float or None
        Share of the last seconds in which training waited for data.
    loss : float
        Mean progressive loss of this epoch so far, or of the last one at its very end; NaN before the first batch.
    explained : float or None
        1 − loss / loss of the best constant prediction.
    left_s : float or None
        Seconds until the last epoch's end.
    may_end_early : bool
        Whether `tol` may end the run before.
    round_s : float or None
        Seconds of the last round, if there are rounds.
    workers : int or None
        Workers of the cluster, if there is one.
    """

    epoch: int
    n_epochs: int
    n_rows: int
    total_rows: int
    rows_per_s: float | None
    bytes_per_s: float | None
    wait_share: float | None
    loss: float
    explained: float | None
    left_s: float | None
    may_end_early: bool
    round_s: float | None = None
    workers: int | None = None

    @property
    def share(self) -> float:
        """Share of the rows that are done."""
        return self.n_rows / max(1, self.total_rows)

    def limit(self) -> str | None:
        """Say what the run's speed hangs on."""
        if self.wait_share is None:
            return None
        share = f"{100 * self.wait_share:.0f} % waiting"
        return f"reading is the limit ({share})" if self.wait_share >= 0.5 else f"training is the limit ({share})"

    def speed(self) -> str:
        """Say rows and bytes per second."""
        if self.rows_per_s is None:
            return ""
        rows = f"{format_count(self.rows_per_s)} rows/s"
        return rows if self.bytes_per_s is None else f"{rows}, {self.bytes_per_s / 1e6:,.0f} MB/s"

    def rounds(self) -> str:
        """Say how long rounds take, and on how many workers."""
        parts = [] if self.round_s is None else [f"{self.round_s:.2g} s a round"]
        if self.workers is not None:
            parts.append(f"{self.workers} worker{'' if self.workers == 1 else 's'}")
        return ", ".join(parts)

    def quality(self) -> str:
        """Say the loss, and what it explains."""
        if self.loss != self.loss:
            return ""
        text = f"loss {self.loss:.5g}"
        return text if self.explained is None else f"{text} (explains {100 * self.explained:.2f} %)"

    def left(self) -> str:
        """Say how long it will take."""
        if self.left_s is None:
            return ""
        return f"{'at most ' if self.may_end_early else ''}{format_seconds(self.left_s)} left"

    def line(self) -> str:
        """Say everything on one line."""
        parts = (
            f"epoch {self.epoch}/{self.n_epochs}",
            f"{self.n_rows:,} rows ({100 * self.share:.1f} %)",
            self.speed(),
            self.limit() or "",
            self.rounds(),
            self.quality(),
            self.left(),
        )
        return "  ".join(part for part in parts if part)


class Pace:
    """Keeps the last seconds of a run, to say how fast it goes.

    Parameters
    ----------
    clock : callable, default=time.monotonic
        Seconds.
    span_s : float, default=SPAN_S
        How long to look back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, span_s: float = SPAN_S) -> None:
        self._clock = clock
        self._span_s = span_s
        self._seen: deque[tuple[float, int, float, int]] = deque()  # time, rows, seconds waited, bytes read
        self._round_s: float | None = None
        self._workers: int | None = None

    def observe(self, run: Run, stream: Reading) -> None:
        """Note where the run stands. Cheap: called after every kernel call."""
        now = self._clock()
        seen = self._seen
        self._round_s, self._workers = stream.round_s, stream.workers
        # A hundred notes in a span are enough.
        if len(seen) >= 2 and now - seen[-2][0] < self._span_s / 100:
            seen.pop()
        seen.append((now, int(run.state.counters[kernels.N_ROWS]), stream.wait_s, stream.read_bytes))
        while len(seen) > 2 and now - seen[1][0] > self._span_s:
            seen.popleft()

    def figures(self, run: Run) -> Figures:
        """Say how the run stands."""
        state, total = run.state, run.n_epochs * run.source.n_rows
        done = int(state.counters[kernels.N_ROWS])
        rate = bytes_per_s = wait_share = None
        if len(self._seen) >= 2:
            (began, rows, waited, read), (now, rows_now, waited_now, read_now) = self._seen[0], self._seen[-1]
            if now > began and rows_now > rows:
                rate = (rows_now - rows) / (now - began)
                wait_share = min(1.0, (waited_now - waited) / (now - began))
                if run.source.kind != "memory" and read_now > read:
                    bytes_per_s = (read_now - read) / (now - began)
        loss = state.progressive_loss
        if loss != loss and state.loss_curve:
            loss = state.loss_curve[-1]
        null_loss = run.survey.null_loss
        return Figures(
            epoch=min(state.epoch + 1, run.n_epochs) if run.finished is None else state.epoch,
            n_epochs=run.n_epochs,
            n_rows=done,
            total_rows=total,
            rows_per_s=rate,
            bytes_per_s=bytes_per_s,
            wait_share=wait_share,
            loss=loss,
            explained=1.0 - loss / null_loss if null_loss > 0 and loss == loss else None,
            left_s=None if rate is None else max(0, total - done) / rate,
            may_end_early=run.config.tol is not None and run.n_epochs > run.config.n_iter_no_change,
            round_s=self._round_s,
            workers=self._workers,
        )


class View(Watcher):
    """A watcher that shows the run to a person; used as a context manager around the training.

    Parameters
    ----------
    out : text stream
        Where to write.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def say(self, lines: Sequence[str]) -> None:
        """Show what was decided, or what goes on, where it is wanted."""

    def note(self, text: str) -> None:
        """Show what goes on, where it is wanted."""
        self.say([text])

    def message(self, text: str) -> None:
        """Show a warning, always."""
        self._print(f"warning: {text}")

    def close(self) -> None:
        """Leave the terminal as it was. Idempotent."""

    def _print(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()

    def __enter__(self) -> Self:
        """Return the view itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


class QuietView(View):
    """Warnings alone."""


class PlainView(View):
    """Lines of text, at intervals that suit a log.

    Parameters
    ----------
    out : text stream
        Where to write.
    clock : callable, default=time.monotonic
        Seconds.
    """

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(out)
        self._clock = clock
        self._pace = Pace(clock)
        self._last_line = clock()

    def say(self, lines: Sequence[str]) -> None:
        """Write the lines."""
        for line in lines:
            self._print(line)

    def started(self, run: Run) -> None:
        """Begin to count the seconds."""
        self._pace.observe(run, Reading())
        self._last_line = self._clock()

    def advanced(self, run: Run, stream: Reading) -> None:
        """Write a line if the last one is old."""
        self._pace.observe(run, stream)
        if self._clock() - self._last_line >= LINE_EVERY_S:
            self._show(self._pace.figures(run).line())

    def epoch_ended(self, run: Run, loss: float) -> None:
        """Write a line for the epoch, unless epochs follow each other too fast to read."""
        if run.finished is not None or self._clock() - self._last_line >= EPOCH_LINE_EVERY_S:
            self._show(epoch_line(self._pace.figures(run), run.state.epoch))

    def _show(self, line: str) -> None:
        self._print(line)
        self._last_line = self._clock()


class BarView(View):
    """A progress bar and a line of figures below it, redrawn in place.

    Parameters
    ----------
    out : text stream
        A terminal.
    clock : callable, default=time.monotonic
        Seconds.
    """

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(out)
        self._clock = clock
        self._pace = Pace(clock)
        self._live: Live | None = None
        self._drawn = self._last_line = clock()

    def say(self, lines: Sequence[str]) -> None:
        """Write the lines, above the bar if it is there."""
        for line in lines:
            self._print(line)

    def started(self, run: Run) -> None:
        """Show the bar."""
        self._pace.observe(run, Reading())
        if run.finished is None:
            from rich.console import Console
            from rich.live import Live

            # Drawn by the loop's own thread: a second one would take the interpreter lock from the readers.
            console = Console(file=self._out, highlight=False, soft_wrap=False)
            self._live = Live(self._picture(run), console=console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)
        self._last_line = self._clock()

    def advanced(self, run: Run, stream: Reading) -> None:
        """Draw anew, a few times a second."""
        self._pace.observe(run, stream)
        now = self._clock()
        if self._live is not None and now - self._drawn >= _DRAW_EVERY_S:
            self._live.update(self._picture(run), refresh=True)
            self._drawn = now

    def epoch_ended(self, run: Run, loss: float) -> None:
        """Leave a line for the epoch above the bar, unless epochs follow each other too fast to read."""
        if run.finished is not None or self._clock() - self._last_line >= EPOCH_LINE_EVERY_S:
            self._print(epoch_line(self._pace.figures(run), run.state.epoch))
            self._last_line = self._clock()

    def close(self) -> None:
        """Remove the bar."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, line: str) -> None:
        if self._live is None:
            super()._print(line)
        else:
            from rich.text import Text

            self._live.console.print(Text(line))

    def _picture(self, run: Run) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        figures = self._pace.figures(run)
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(
            f"epoch {figures.epoch}/{figures.n_epochs}",
            ProgressBar(total=max(1, figures.total_rows), completed=figures.n_rows),
            f"{format_count(figures.n_rows)} of {format_count(figures.total_rows)} rows  "
            f"{100 * figures.share:.1f} %  {figures.left()}".rstrip(),
        )
        if figures.rows_per_s is None:
            below = "starting (the first run after an installation compiles for some seconds)"
        else:
            told = (figures.speed(), figures.limit(), figures.rounds(), figures.quality())
            below = "  ".join(part for part in told if part)
        return Group(bar, Text(below, style="dim"))


def choose_view(out: TextIO, *, quiet: bool, term: str | None) -> View:
    """Pick what suits the place where the lines go.

    Parameters
    ----------
    out : text stream
        Standard error.
    quiet : bool
        Whether only warnings are wanted.
    term : str or None
        The environment's ``TERM``.
    """
    if quiet:
        return QuietView(out)
    if out.isatty() and term not in (None, "", "dumb"):
        return BarView(out)
    return PlainView(out)


def epoch_line(figures: Figures, epoch: int) -> str:
    """Say how an epoch went."""
    parts = (f"epoch {epoch}/{figures.n_epochs} done", figures.quality(), figures.speed(), figures.limit() or "")
    return "  ".join(part for part in parts if part)


def format_count(number: float) -> str:
    """Write a count in four characters or so."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def format_seconds(seconds: float) -> str:
    """Write a duration as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
