"""What a person sees while a run trains."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streamgd.learn import kernels
from streamgd.run.progress import (
    BarView,
    Pace,
    PlainView,
    QuietView,
    choose_view,
    format_count,
    format_seconds,
)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_run(*, n_rows: int = 1000, n_epochs: int = 3, tol: float | None = None, kind: str = "parquet") -> Any:
    """A run as far as views look at it."""
    state = SimpleNamespace(
        counters=np.zeros(kernels.N_COUNTERS, np.int64), epoch=0, progressive_loss=float("nan"), loss_curve=[]
    )
    return SimpleNamespace(
        state=state,
        source=SimpleNamespace(n_rows=n_rows, kind=kind),
        survey=SimpleNamespace(null_loss=2.0),
        config=SimpleNamespace(tol=tol, n_iter_no_change=2),
        n_epochs=n_epochs,
        finished=None,
    )


def advance(run: Any, stream: Any, clock: Clock, *, rows: int, seconds: float, waited: float, read: int) -> None:
    run.state.counters[kernels.N_ROWS] += rows
    run.state.progressive_loss = 0.5
    clock.now += seconds
    stream.wait_s += waited
    stream.read_bytes += read


def make_stream() -> Any:
    return SimpleNamespace(wait_s=0.0, read_bytes=0, round_s=None, workers=None)


def test_pace_gives_rates_waiting_and_time_left() -> None:
    clock, run, stream = Clock(), make_run(), make_stream()
    pace = Pace(clock)
    advance(run, stream, clock, rows=100, seconds=12.0, waited=12.0, read=10)  # compiling: counts for nothing
    pace.observe(run, stream)
    assert pace.figures(run).rows_per_s is None
    for _ in range(4):
        advance(run, stream, clock, rows=100, seconds=0.5, waited=0.4, read=2_000_000)
        pace.observe(run, stream)
    found = pace.figures(run)
    assert found.rows_per_s == pytest.approx(200.0)
    assert found.bytes_per_s == pytest.approx(4e6)
    assert found.wait_share == pytest.approx(0.8)
    assert found.left_s == pytest.approx((3000 - 500) / 200)
    assert found.explained == pytest.approx(0.75)
    line = found.line()
    for part in ("epoch 1/3", "500 rows (16.7 %)", "200 rows/s, 4 MB/s", "reading is the limit (80 % waiting)"):
        assert part in line
    assert "loss 0.5 (explains 75.00 %)" in line
    assert "0:00:12 left" in line
    assert "at most" not in line


def test_pace_forgets_what_is_long_ago() -> None:
    clock, run, stream = Clock(), make_run(n_rows=10**6), make_stream()
    pace = Pace(clock, span_s=10.0)
    for seconds in (1.0, 100.0, *[1.0] * 12):  # one slow stretch, then a steady pace
        advance(run, stream, clock, rows=100, seconds=seconds, waited=0.0, read=0)
        pace.observe(run, stream)
    found = pace.figures(run)
    assert found.rows_per_s == pytest.approx(100.0)
    assert found.limit() == "training is the limit (0 % waiting)"
    assert found.bytes_per_s is None  # all rows are in memory


def test_pace_keeps_few_notes() -> None:
    clock, run, stream = Clock(), make_run(n_rows=10**9), make_stream()
    pace = Pace(clock)
    for _ in range(20_000):
        advance(run, stream, clock, rows=1, seconds=0.001, waited=0.0, read=1)
        pace.observe(run, stream)
    assert len(pace._seen) < 250
    assert pace.figures(run).rows_per_s == pytest.approx(1000.0, rel=0.01)


@pytest.mark.parametrize(("tol", "n_epochs", "early"), [(None, 9, False), (0.1, 9, True), (0.1, 2, False)])
def test_time_left_is_a_bound_where_the_run_may_converge(tol: float | None, n_epochs: int, early: bool) -> None:
    clock, run, stream = Clock(), make_run(tol=tol, n_epochs=n_epochs), make_stream()
    pace = Pace(clock)
    for _ in range(2):
        advance(run, stream, clock, rows=100, seconds=1.0, waited=0.0, read=1)
        pace.observe(run, stream)
    assert pace.figures(run).left().startswith("at most ") == early


def test_nothing_is_explained_where_a_constant_is_perfect() -> None:
    run = make_run()
    run.survey.null_loss = 0.0
    run.state.progressive_loss = 0.25
    assert Pace(Clock()).figures(run).quality() == "loss 0.25"


def test_plain_lines_come_every_ten_seconds_and_each_epoch() -> None:
    out, clock, run, stream = io.StringIO(), Clock(), make_run(), make_stream()
    with PlainView(out, clock) as view:
        view.say(["decided"])
        view.started(run)
        for _ in range(11):
            advance(run, stream, clock, rows=10, seconds=2.0, waited=0.0, read=1)
            view.advanced(run, stream)
        run.state.epoch, run.state.loss_curve, run.state.progressive_loss = 1, [0.7], float("nan")
        clock.now += 1.0
        view.epoch_ended(run, 0.7)
        view.message("the data is odd")
    lines = out.getvalue().splitlines()
    assert lines[0] == "decided"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "epoch 1/3",
        "epoch 1/3",
        "epoch 1/3 done",
        "warning: the data is odd",
    ]
    assert "loss 0.7 (explains 65.00 %)" in lines[3]


def test_plain_lines_do_not_flood_where_epochs_are_short() -> None:
    out, clock, run = io.StringIO(), Clock(), make_run(n_epochs=1000)
    view = PlainView(out, clock)
    view.started(run)
    for epoch in range(1, 1001):
        clock.now += 0.01
        run.state.epoch, run.state.loss_curve = epoch, [0.5]
        run.finished = "max_iter" if epoch == 1000 else None
        view.epoch_ended(run, 0.5)
    lines = out.getvalue().splitlines()
    assert 5 <= len(lines) <= 11
    assert lines[-1].startswith("epoch 1000/1000 done")


def test_quiet_shows_warnings_alone() -> None:
    out, run, stream = io.StringIO(), make_run(), make_stream()
    with QuietView(out) as view:
        view.say(["decided"])
        view.started(run)
        view.advanced(run, stream)
        view.epoch_ended(run, 0.5)
        view.message("careful")
    assert out.getvalue() == "warning: careful\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_shows_figures_and_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out, clock, run, stream = Terminal(), Clock(), make_run(), make_stream()
    view = BarView(out, clock)
    with contextlib.suppress(RuntimeError), view:
        view.started(run)
        for _ in range(3):
            advance(run, stream, clock, rows=100, seconds=1.0, waited=0.9, read=10**6)
            view.advanced(run, stream)
        view.message("careful [not markup]")
        raise RuntimeError("the run fails")
    shown = out.getvalue()
    for part in ("epoch 1/3", "300 of 3 k rows", "reading is the limit (90 % waiting)", "loss 0.5 (explains 75.00 %)"):
        assert part in shown
    assert "warning: careful [not markup]" in shown
    hidden, shown_again = shown.rindex("\x1b[?25l"), shown.rindex("\x1b[?25h")
    assert hidden < shown_again  # the cursor is back


def test_bar_is_drawn_a_few_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out, clock, run, stream = Terminal(), Clock(), make_run(n_rows=10**6), make_stream()
    with BarView(out, clock) as view:
        view.started(run)
        for _ in range(1000):
            advance(run, stream, clock, rows=1, seconds=0.001, waited=0.0, read=1)
            view.advanced(run, stream)
        drawn = out.getvalue().count("epoch 1/3")
    assert 3 <= drawn <= 8


def test_view_suits_the_place() -> None:
    assert type(choose_view(Terminal(), quiet=False, term="xterm")) is BarView
    assert type(choose_view(Terminal(), quiet=False, term="dumb")) is PlainView
    assert type(choose_view(io.StringIO(), quiet=False, term="xterm")) is PlainView
    assert type(choose_view(Terminal(), quiet=True, term="xterm")) is QuietView


def test_figures_are_written_for_people() -> None:
    assert [format_count(n) for n in (7, 1234, 12_345_678, 2.5e9)] == ["7", "1.23 k", "12.3 M", "2.5 G"]
    assert [format_seconds(s) for s in (0.4, 61, 3725.6)] == ["0:00:00", "0:01:01", "1:02:06"]
