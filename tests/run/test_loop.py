"""The loop: every row once, and wherever a run stops or is stopped, going on ends as if it never had."""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from streamgd.data.plan import EpochPlan, WindowPlan
from streamgd.data.window_stream import WindowStream
from streamgd.errors import (
    BufferTooSmallError,
    CheckpointWriteError,
    CorruptDataError,
    DivergenceError,
    NonFiniteError,
    ResumeError,
    RowAccountingError,
)
from streamgd.learn import kernels
from streamgd.learn.state import State
from streamgd.run import checkpoint as checkpoint_module
from streamgd.run import loop as module
from streamgd.run import sample as sample_module
from streamgd.run.config import Config, RunOptions
from streamgd.run.folder import RunFolder
from streamgd.run.loop import Watcher, train
from streamgd.run.runs import Run, prepare, restore
from tests.data.fake import FakeSource, expect_no_threads
from tests.run.small import N_ROWS, begin_small, bits, config_of, data, metrics, never, resume_small, saved, source_of

#: Options of every optimizer, with something that its state must carry on.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "auto": {},
    "sgd": {"optimizer": "sgd", "learning_rate": "invscaling", "momentum": 0.9, "nesterov": True, "average": 20},
    "adagrad": {"optimizer": "adagrad", "penalty": "elasticnet", "alpha": 1e-3},
    "adam": {"optimizer": "adam", "eta0": 0.05},
    "dowg": {"optimizer": "dowg", "penalty": "l2", "alpha": 1e-3},
}
#: Every schedule that does not need its end.
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"learning_rate": "constant"},
    "optimal": {"learning_rate": "optimal", "alpha": 0.01},
    "invscaling": {"learning_rate": "invscaling", "power_t": 0.3},
    "adaptive": {"learning_rate": "adaptive", "tol": 1e9, "n_iter_no_change": 1},
    "adagrad, invscaling": {"optimizer": "adagrad", "learning_rate": "invscaling"},
    "adam, adaptive": {"optimizer": "adam", "learning_rate": "adaptive", "tol": 1e9, "n_iter_no_change": 1},
}


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs here save hundreds of checkpoints; that they are flushed to disk is tested elsewhere."""
    monkeypatch.setattr(checkpoint_module.os, "fsync", lambda descriptor: None)
    yield
    expect_no_threads()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run") as folder:
        yield folder


def whole(tmp_path: Path, config: Config | None = None, source: FakeSource | None = None) -> dict[str, Any]:
    """Train without interruption; return what is saved."""
    with RunFolder(tmp_path / "whole") as folder:
        assert train(begin_small(config, source, folder), folder=folder)
        return saved(folder)


class Counting(Watcher):
    """Writes down what it is told, and does something after so many kernel calls."""

    def __init__(self, act: Callable[[], None] | None = None, after: int = 0) -> None:
        self.seen: list[str] = []
        self.messages: list[str] = []
        self._act, self._left = act, after

    def message(self, text: str) -> None:
        self.messages.append(text)

    def started(self, run: Run) -> None:
        self.seen.append("started")

    def advanced(self, run: Run, stream: WindowStream) -> None:
        self.seen.append("advanced")
        self._left -= 1
        if self._left == 0 and self._act is not None:
            self._act()

    def epoch_ended(self, run: Run, loss: float) -> None:
        self.seen.append("epoch")

    def saved(self, run: Run) -> None:
        self.seen.append("saved")


def in_pieces(monkeypatch: pytest.MonkeyPatch, n_rows: int, call_s: float = 0.0) -> None:
    """Have the first kernel call of a run take so many rows, and those after it as many as last so long."""
    begin = module._Training.__init__

    def begin_with_few(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        self._piece = n_rows

    monkeypatch.setattr(module._Training, "__init__", begin_with_few)
    monkeypatch.setattr(module, "_CALL_S", call_s)


# --- every row once --------------------------------------------------------------------------------------------------
class Unfair(EpochPlan):
    """Plans that do with the first window of the second epoch what they must not."""

    change: Callable[[WindowPlan], WindowPlan]

    def windows(self, first: int = 0) -> Iterator[WindowPlan]:
        for plan in super().windows(first):
            yield type(self).change(plan) if (plan.epoch, plan.index) == (1, 0) else plan


def lose_rows(plan: WindowPlan) -> WindowPlan:
    table = plan.table.copy()
    table[0, 2] -= 1
    return replace(plan, table=table, n_rows=plan.n_rows - 1)


def repeat_block(plan: WindowPlan) -> WindowPlan:
    """Read one block twice and another not at all: as many rows as there should be."""
    table = plan.table.copy()
    table[0, 0] = next(block for block in range(10) if block not in table[:, 0])
    return replace(plan, table=table)


def shift_rows(plan: WindowPlan) -> WindowPlan:
    table = plan.table.copy()
    table[0, 1] += 1
    table[0, 2] -= 1
    table[1, 2] -= 1
    return replace(plan, table=table, n_rows=plan.n_rows - 2)


@pytest.mark.parametrize("change", [lose_rows, repeat_block, shift_rows])
def test_a_row_lost_or_repeated_by_the_reader(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, change: Callable[[WindowPlan], WindowPlan]
) -> None:
    monkeypatch.setattr(Unfair, "change", staticmethod(change), raising=False)
    monkeypatch.setattr("streamgd.data.window_stream.EpochPlan", Unfair)
    run = begin_small(folder=folder, window_rows=90, n_open=10)
    expected = r"epoch 2 saw \d+ rows with checksum [0-9a-f]{16}; expected each of the 400 rows exactly once"
    with pytest.raises(RowAccountingError, match=expected):
        train(run, folder=folder)
    kept = folder.newest(never)
    assert kept is not None
    assert kept.meta["cursor"] == [1, 0, 0]  # the epoch that was good


@pytest.mark.parametrize("skip", [True, False])
def test_a_row_skipped_or_repeated_by_the_loop(monkeypatch: pytest.MonkeyPatch, skip: bool) -> None:
    consume, n_calls = kernels.consume, 0

    def wrong(X: Any, y: Any, weight: Any, ids: Any, start: int, stop: int, *more: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            start = start + 1
            if not skip:
                ids = ids.copy()
                ids[start] = ids[stop - 1]
                start -= 1
        consume(X, y, weight, ids, start, stop, *more)

    monkeypatch.setattr(kernels, "consume", wrong)
    with pytest.raises(RowAccountingError, match="saw 399 rows" if skip else "saw 400 rows"):
        train(begin_small())


def test_a_source_that_gives_too_few_rows(folder: RunFolder) -> None:
    """The error of the reader thread reaches the caller, and what was learnt before is kept."""
    source = source_of()
    run = begin_small(source=source, folder=folder)
    whole_rows = source.X
    n_read = 0

    def truncate(block: int, row: int) -> None:
        nonlocal n_read
        n_read += 1
        if n_read == 80:
            source.X = whole_rows[: source.row_of(block, row) + 5]

    source.before_read = truncate
    with pytest.raises(CorruptDataError, match=r"gave 5 rows where 7 were asked for"):
        train(run, folder=folder, options=RunOptions(n_threads=1))
    kept = folder.newest(never)
    assert kept is not None
    assert kept.meta["cursor"] > [1, 0, 0]
    source.before_read, source.X = lambda block, row: None, whole_rows
    again = resume_small(folder)
    assert train(again, folder=folder)
    other = begin_small()
    train(other)
    assert bits(again) == bits(other)


def test_a_number_that_is_not_finite_outside_the_sample(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "SAMPLE_ROWS", 20)
    X, _ = data()
    X[399, 1] = np.inf
    run = begin_small(config_of(shuffle=False), source_of(X=X), folder)
    with pytest.raises(NonFiniteError, match="fake, block 9, row 39: feature number 1 is inf"):
        train(run, folder=folder)
    kept = folder.newest(never)
    assert kept is not None
    n_windows = EpochPlan(run.source.block_rows, run.layout, seed=0, epoch=0, shuffle=False).n_windows
    assert kept.meta["cursor"][:2] == [0, n_windows - 1]  # the windows before the bad one


# --- stopping --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("after", [1, 3, 7, 14])
def test_a_stop_is_saved_and_gone_on_from(tmp_path: Path, folder: RunFolder, after: int) -> None:
    stop = threading.Event()
    run = begin_small(folder=folder)
    assert train(run, folder=folder, stop=stop, watcher=Counting(stop.set, after)) is False
    assert run.finished is None
    assert saved(folder)["cursor"] == list(run.state.cursor)
    again = resume_small(folder)
    assert bits(again) == bits(run)
    assert train(again, folder=folder) is True
    assert saved(folder) == whole(tmp_path)


def test_a_stop_before_the_first_row(tmp_path: Path, folder: RunFolder) -> None:
    stop = threading.Event()
    stop.set()
    assert train(begin_small(folder=folder), folder=folder, stop=stop) is False
    assert saved_cursor(folder) == [0, 0, 0]
    assert train(resume_small(folder), folder=folder)
    assert saved(folder) == whole(tmp_path)


def saved_cursor(folder: RunFolder) -> list[int]:
    checkpoint = folder.newest(never)
    assert checkpoint is not None
    found: list[int] = checkpoint.meta["cursor"]
    return found


def test_a_stop_while_waiting_for_a_reader_saves_before_the_read_ends(folder: RunFolder) -> None:
    """A read from a slow disk can take minutes; the signal that says stop may be the last but one."""
    source, stop, gate = source_of(), threading.Event(), threading.Event()
    run = begin_small(source=source, folder=folder)
    n_read = 0

    def slow(block: int, row: int) -> None:
        nonlocal n_read
        n_read += 1
        if n_read == 30:
            stop.set()
            gate.wait(60)

    class Opening(Watcher):
        def saved(self, run: Run) -> None:
            if run.state.cursor != (0, 0, 0):
                gate.set()

    source.before_read = slow
    began = time.monotonic()
    assert train(run, folder=folder, stop=stop, watcher=Opening()) is False
    assert time.monotonic() - began < 50  # the gate was opened by the checkpoint, not by its own patience
    assert saved_cursor(folder) == list(run.state.cursor) != [0, 0, 0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_interrupted_after_random_kernel_calls(
    tmp_path: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(sample_module, "SAMPLE_ROWS", 40)  # so that moments are kept
    config = config_of(**OPTIMIZERS[optimizer])
    expected = whole(tmp_path, config)
    rng = np.random.default_rng(5)
    consume, left = kernels.consume, 0

    def interrupted(*args: Any) -> None:
        nonlocal left
        consume(*args)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "consume", interrupted)
    in_pieces(monkeypatch, 7)
    run, n_interrupts = begin_small(config, folder=folder), 0
    while True:
        left = int(rng.integers(1, 300))
        try:
            train(run, folder=folder)
            break
        except KeyboardInterrupt:
            n_interrupts += 1
            assert saved_cursor(folder) == list(run.state.cursor)
        run = resume_small(folder)
    assert n_interrupts >= 3
    assert saved(folder) == expected


def interrupt_at(n: int, files: set[str]) -> tuple[Callable[..., Any], list[int]]:
    """Make a tracer that raises KeyboardInterrupt before the n-th line that is run in some files."""
    count = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count[0] += 1
            if count[0] == n:
                raise KeyboardInterrupt
        return trace

    return trace, count


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file between open and with
def test_interrupted_at_any_line(tmp_path: Path) -> None:
    """Ctrl-C comes between any two lines of the loop, of saving and of closing an epoch."""
    config = config_of(tol=1e9, n_iter_no_change=2, max_iter=4)  # ends by convergence, after three epochs
    expected = whole(tmp_path, config)
    assert expected["finished"] == "converged"
    assert expected["cursor"] == [3, 0, 0]
    files = {module.__file__, checkpoint_module.__file__, str(sys.modules[RunFolder.__module__].__file__)}

    def interrupted(n: int, path: Path) -> int:
        with RunFolder(path) as folder:
            run = begin_small(config, folder=folder)
            trace, count = interrupt_at(n, files)
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                train(run, folder=folder)
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(before)
        return count[0]

    n_lines = interrupted(0, tmp_path / "count")
    assert n_lines > 300
    rng = np.random.default_rng(0)
    for n in sorted(rng.choice(n_lines, 100, replace=False) + 1):
        interrupted(n, tmp_path / str(n))
        with RunFolder(tmp_path / str(n)) as folder:
            assert train(resume_small(folder, config), folder=folder)
            assert saved(folder) == expected, f"interrupted before line {n} of {n_lines}"
            assert list(folder.path.rglob("*.tmp")) == []


def test_an_interrupt_without_a_folder_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "consume", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(begin_small())


# --- saving ----------------------------------------------------------------------------------------------------------
def test_when_checkpoints_are_written(folder: RunFolder) -> None:
    rarely = Counting()
    train(begin_small(folder=folder), folder=folder, watcher=rarely, options=RunOptions(checkpoint_every_s=1e6))
    assert [event for event in rarely.seen if event != "advanced"] == ["started", "saved", *["epoch", "saved"] * 3]
    always = Counting()
    with RunFolder(folder.path.with_name("other")) as other:
        train(begin_small(folder=other), folder=other, watcher=always, options=RunOptions(checkpoint_every_s=0))
        assert always.seen.count("saved") == 1 + 3 * 5  # after each of five windows, the epoch's last among them
        assert saved(other) == saved(folder)


@pytest.mark.parametrize("at", [0, 1, 2, 9])
def test_a_full_disk_ends_the_run_and_costs_nothing(
    tmp_path: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    run = begin_small(folder=folder)
    write, n_written = checkpoint_module.write_atomic, 0

    def full(path: Path, content: bytes) -> None:
        nonlocal n_written
        n_written += 1
        if n_written > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint_module, "write_atomic", full)
        with pytest.raises(CheckpointWriteError, match="No space left on device"):
            train(run, folder=folder, options=RunOptions(checkpoint_every_s=0))
    assert len(folder.checkpoints.files()) == min(3, at)
    assert train(resume_small(folder), folder=folder)
    assert saved(folder) == whole(tmp_path)


def test_metrics_that_cannot_be_written_end_the_run(tmp_path: Path, folder: RunFolder) -> None:
    run = begin_small(folder=folder)
    (folder.path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointWriteError, match=r"metrics.jsonl"):
        train(run, folder=folder)
    (folder.path / "metrics.jsonl").rmdir()
    assert train(resume_small(folder), folder=folder)
    assert saved(folder) == whole(tmp_path)


def test_what_the_metrics_say(folder: RunFolder) -> None:
    run = begin_small(folder=folder)
    train(run, folder=folder)
    found = metrics(folder.path)
    assert [(record["epoch"], record["window"]) for record in found] == [
        (epoch, window) for epoch in range(3) for window in [*range(5), None]
    ]
    ends = [record for record in found if record["window"] is None]
    assert [record["rows"] for record in ends] == [N_ROWS, 2 * N_ROWS, 3 * N_ROWS]
    assert [record["updates"] for record in ends] == [13, 26, 39]
    assert [record["loss"] for record in ends] == run.state.loss_curve
    for record in ends:
        assert record["explained"] == pytest.approx(1 - record["loss"] / run.survey.null_loss)


def test_metrics_stay_short_over_many_windows(folder: RunFolder) -> None:
    run = begin_small(config_of(max_iter=1, shuffle=False), source_of([5] * 1000), folder, window_rows=10)
    train(run, folder=folder)
    found = metrics(folder.path)
    assert len(found) == 101  # 500 windows, every fifth, and the epoch's end
    assert found[-1]["window"] is None


# --- going on --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [*OPTIMIZERS.values(), *SCHEDULES.values()], ids=[*OPTIMIZERS, *SCHEDULES])
def test_three_epochs_and_two_more_are_five(tmp_path: Path, folder: RunFolder, options: dict[str, Any]) -> None:
    config = config_of(**{**options, "max_iter": 3})
    run = begin_small(config, folder=folder)
    assert train(run, folder=folder)
    assert run.finished == "max_iter"
    five = replace(config, max_iter=5)
    again = resume_small(folder, five)
    assert again.finished is None
    assert train(again, folder=folder)
    assert saved(folder) == whole(tmp_path, five)
    assert folder.description()["config"]["max_iter"] == 5


def test_cosine_cannot_be_prolonged(folder: RunFolder) -> None:
    config = config_of(learning_rate="cosine")
    train(begin_small(config, folder=folder), folder=folder)
    before = saved(folder)
    with pytest.raises(ResumeError, match=r"cosine.*cannot change: 3 then, 5 now"):
        resume_small(folder, replace(config, max_iter=5))
    assert saved(folder) == before
    assert folder.description()["config"]["max_iter"] == 3


def test_a_finished_run_stays_as_it_is(folder: RunFolder) -> None:
    train(begin_small(folder=folder), folder=folder)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.path.rglob("*") if path.is_file()}
    watcher = Counting()
    assert train(resume_small(folder), folder=folder, watcher=watcher)
    assert watcher.seen == ["started"]
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.path.rglob("*") if path.is_file()}
    assert after == before


def test_fewer_epochs(tmp_path: Path, folder: RunFolder) -> None:
    """A run may be told to end sooner, as long as it is not beyond that."""
    stop = threading.Event()
    assert not train(begin_small(folder=folder), folder=folder, stop=stop, watcher=Counting(stop.set, 7))
    assert saved_cursor(folder)[0] == 1
    with pytest.raises(ResumeError, match=r"has begun epoch 2: with max_iter=1 .*at least 2"):
        resume_small(folder, config_of(max_iter=1))
    two = resume_small(folder, config_of(max_iter=2))
    assert train(two, folder=folder)
    assert saved(folder) == whole(tmp_path, config_of(max_iter=2))


def test_fewer_epochs_at_an_epochs_edge_are_an_end(tmp_path: Path, folder: RunFolder) -> None:
    """The run has as many epochs as it is told to have: it says so from now on, and forgets what came after."""
    stop = threading.Event()
    run = begin_small(folder=folder)

    class Edge(Watcher):
        def epoch_ended(self, run: Run, loss: float) -> None:
            if run.state.epoch == 2:
                stop.set()

    assert not train(run, folder=folder, stop=stop, watcher=Edge())
    folder.append_metrics({"epoch": 2, "window": 0})  # of a window that no checkpoint knows
    assert train(resume_small(folder, config_of(max_iter=2)), folder=folder)
    assert saved(folder) == whole(tmp_path, config_of(max_iter=2))
    assert folder.description()["config"]["max_iter"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta0": 0.3}, "eta0: 'auto' then, 0.3 now"),
        ({"seed": 4}, "seed: 0 then, 4 now"),
        ({"tol": 0.1}, "tol: None then, 0.1 now"),
        ({"batch_size": 33, "loss": "huber"}, r"batch_size: 32 then, 33 now; loss: 'squared_error' then, 'huber' now"),
    ],
)
def test_a_changed_configuration_is_refused(folder: RunFolder, options: dict[str, Any], message: str) -> None:
    train(begin_small(folder=folder), folder=folder)
    with pytest.raises(ResumeError, match=message):
        resume_small(folder, config_of(**options))


def test_changed_data_is_refused(folder: RunFolder) -> None:
    train(begin_small(folder=folder), folder=folder)
    X, y = data()
    with pytest.raises(
        ResumeError, match=r"the data \(fake\) is not what the run was trained on.*n_rows: 400 then, 399"
    ):
        resume_small(folder, source=FakeSource([399], X[1:], y[1:]))
    with pytest.raises(ResumeError, match="dtype of rows: 'float32' then, 'float64' now"):
        resume_small(folder, source=source_of(row_dtype="float64"))
    with pytest.raises(ResumeError, match="cut into other blocks than when the run began"):
        resume_small(folder, source=source_of([80] * 5))


def test_a_killed_survey_is_taken_again(folder: RunFolder, tmp_path: Path) -> None:
    """Described but never saved: the run begins, with the same checks."""
    begin_small(folder=folder)
    with pytest.raises(ResumeError, match="seed"):
        resume_small(folder, config_of(seed=1))
    run = resume_small(folder)
    assert run.state.cursor == (0, 0, 0)
    assert train(run, folder=folder)


def test_everything_that_resuming_needs_is_in_the_checkpoint() -> None:
    """The plan is not derived again: another version might derive another."""
    run = begin_small(window_rows=77)
    checkpoint = run.to_checkpoint()
    again = restore(source_of(), checkpoint)
    assert again.layout == run.layout
    assert again.config == run.config
    assert bits(again) == bits(run)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_holds_the_whole_state(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """Field by field, in the middle of a batch, from memory to disk and back."""
    monkeypatch.setattr(sample_module, "SAMPLE_ROWS", 40)
    stop = threading.Event()
    weight = np.random.default_rng(1).uniform(0.5, 2, N_ROWS)
    run = begin_small(config_of(**OPTIMIZERS[optimizer]), source_of(weight=weight), folder)
    assert not train(run, folder=folder, stop=stop, watcher=Counting(stop.set, 7))
    again = resume_small(folder, source=source_of(weight=weight))
    assert run.state.counters[kernels.N_CARRY] > 0
    filled = {"carry_X", "carry_y", "carry_weight"}
    for name in (field.name for field in fields(State)):
        one, other = getattr(run.state, name), getattr(again.state, name)
        if name in filled:
            n = int(run.state.counters[kernels.N_CARRY])
            assert one.shape == other.shape
            assert one[:n].any()
            one, other = one[:n], other[:n]
        np.testing.assert_array_equal(one, other, err_msg=name)
    np.testing.assert_array_equal(run.model().coef, again.model().coef)


# --- when a run ends -------------------------------------------------------------------------------------------------
def simulate(curve: list[float], tol: float, patience: int) -> int:
    """Return after how many epochs a loss curve ends a run."""
    best, bad = np.inf, 0
    for n, loss in enumerate(curve, start=1):
        bad = bad + 1 if loss > best - tol else 0
        best = min(best, loss)
        if bad == patience:
            return n
    return len(curve)


@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("tol", [0.0, 1e-3, "auto"])
def test_tol_and_n_iter_no_change(tol: float | str, patience: int) -> None:
    endless = begin_small(config_of(max_iter=40))
    assert train(endless)
    assert endless.finished == "max_iter"
    absolute = 1e-5 * endless.survey.null_loss if tol == "auto" else float(tol)
    epochs = patience
    if tol == "auto":  # 200 updates at least
        updates = int(endless.state.counters[kernels.N_UPDATES]) // 40
        epochs = max(patience, -(-200 // updates))
        assert epochs > patience
    expected = simulate(endless.state.loss_curve, absolute, epochs)
    run = begin_small(config_of(max_iter=40, tol=tol, n_iter_no_change=patience))
    assert train(run)
    assert run.state.epoch == expected < 40
    assert run.finished == "converged"
    assert run.state.loss_curve == endless.state.loss_curve[:expected]


def test_patience_survives_a_stop(tmp_path: Path, folder: RunFolder) -> None:
    config = config_of(max_iter=20, tol=1e9, n_iter_no_change=4)
    for _ in range(30):
        stop = threading.Event()
        run = resume_small(folder) if folder.holds_run else begin_small(config, folder=folder)
        if train(run, folder=folder, stop=stop, watcher=Counting(stop.set, 3)):
            break
    assert run.finished == "converged"
    assert run.state.epoch == 5
    assert saved(folder) == whole(tmp_path, config)


def test_a_converged_run_stays_converged(folder: RunFolder) -> None:
    config = config_of(max_iter=20, tol=1e9, n_iter_no_change=2)
    train(begin_small(config, folder=folder), folder=folder)
    again = resume_small(folder, replace(config, max_iter=50))
    assert again.finished == "converged"
    assert train(again, folder=folder)
    assert again.state.epoch == 3


def test_the_penalty_counts_for_convergence() -> None:
    """As in scikit-learn: what should fall is what is minimised."""
    run = begin_small(config_of(max_iter=2, penalty="l2", alpha=10.0, tol=0.0))
    train(run)
    assert run.state.scalars[kernels.BEST_OBJECTIVE] > min(run.state.loss_curve)


def test_adaptive_divides_its_rate_by_five_until_it_ends() -> None:
    config = config_of(learning_rate="adaptive", eta0=0.01, tol=1e9, n_iter_no_change=1, max_iter=100)
    run = begin_small(config)
    assert train(run)
    assert run.finished == "converged"
    # One epoch sets the mark, six bring 0.01 below 1e-6 by fives, one more ends it.
    assert run.state.epoch == 8
    assert 0.01 * run.state.scalars[kernels.ETA_SCALE] == pytest.approx(0.01 / 5**6)


def test_a_diverging_run_says_what_to_do_and_keeps_the_last_good(folder: RunFolder) -> None:
    config = config_of(optimizer="sgd", learning_rate="constant", eta0=50.0, max_iter=30)
    with pytest.raises(DivergenceError) as caught:
        train(begin_small(config, folder=folder), folder=folder)
    message = str(caught.value)
    for part in ("training diverged in epoch ", "window ", "update ", "loss='squared_error'", "eta0=50"):
        assert part in message
    assert "Try a smaller eta0, or optimizer='auto', which needs none." in message
    assert f"The last checkpoint in {folder.path} is good." in message
    kept = folder.newest(never)
    assert kept is not None
    assert np.isfinite(kept.tensors["theta"]).all()
    assert kept.tensors["counters"][kernels.STATUS] == kernels.OK
    with pytest.raises(DivergenceError):  # again, at the same place
        train(resume_small(folder), folder=folder)


def test_a_diverging_run_without_scaling() -> None:
    config = config_of(optimizer="sgd", learning_rate="constant", eta0=1.0, standardize=False, max_iter=30)
    with pytest.raises(DivergenceError, match="Try standardize=True, which scales the features") as caught:
        train(begin_small(config))
    assert "checkpoint" not in str(caught.value)


# --- nothing but the definition counts -------------------------------------------------------------------------------
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_threads_change_no_bit(shuffle: bool, weighted: bool) -> None:
    weight = np.random.default_rng(9).uniform(0.1, 2.0, N_ROWS) if weighted else None
    found = []
    for n_threads in (1, 2, 3, 8, None):
        run = begin_small(config_of(shuffle=shuffle), source_of(weight=weight), window_rows=200, n_open=5)
        train(run, options=RunOptions(n_threads=n_threads))
        found.append(bits(run))
    assert all(each == found[0] for each in found[1:])


@pytest.mark.parametrize("call_s", [0.0, 1e-6, 1e9])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_how_long_a_kernel_call_lasts_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, call_s: float
) -> None:
    expected = begin_small(config_of(**OPTIMIZERS[optimizer]))
    train(expected)
    in_pieces(monkeypatch, 1 if call_s == 0 else 50, call_s)
    run = begin_small(config_of(**OPTIMIZERS[optimizer]))
    train(run)
    assert bits(run) == bits(expected)


def test_kernel_calls_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """They shrink if they take too long, whatever the first guess was."""
    in_pieces(monkeypatch, 50)
    rows: list[int] = []

    class Noting(Watcher):
        def advanced(self, run: Run, stream: WindowStream) -> None:
            rows.append(int(run.state.counters[kernels.N_ROWS]))

    train(begin_small(config_of(max_iter=1)), watcher=Noting())
    assert np.diff([0, *rows]).tolist() == [50] + [1] * 350


@pytest.mark.parametrize("window_rows", [10, 33, 90, 400])
def test_windows_change_no_bit_without_shuffling(window_rows: int) -> None:
    expected = begin_small(config_of(shuffle=False), source_of([400]), window_rows=400)
    train(expected)
    run = begin_small(config_of(shuffle=False), source_of([10] * 40), window_rows=window_rows)
    train(run)
    np.testing.assert_array_equal(run.state.theta, expected.state.theta)
    np.testing.assert_array_equal(run.state.average, expected.state.average)
    np.testing.assert_array_equal(run.state.slots, expected.state.slots)
    assert run.state.loss_curve == expected.state.loss_curve


def test_seeds_give_other_orders() -> None:
    found = set()
    for seed in range(3):
        run = begin_small(config_of(seed=seed))
        train(run)
        found.add(run.state.theta.tobytes())
    assert len(found) == 3


# --- what the survey's sample missed ---------------------------------------------------------------------------------
def silent_in_sample(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    """Make rows whose second feature is constant in the sample and spread outside of it."""
    monkeypatch.setattr(sample_module, "SAMPLE_ROWS", 40)
    X, _ = data()
    source = source_of(X=X)
    runs = list(sample_module.sample_runs(source))
    X[:, 1] = np.random.default_rng(2).uniform(0, 400, N_ROWS)
    for block, start, n in runs:
        first = source.row_of(block, start)
        X[first : first + n, 1] = 0.0
    source.feature_names = ("a", "late", "c")
    return source


def test_a_feature_that_the_sample_misjudged_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source, watcher = silent_in_sample(monkeypatch), Counting()
    run = begin_small(source=source)
    train(run, watcher=watcher)
    (message,) = watcher.messages
    assert "the spread of 1 feature(s) differs more than tenfold from what the survey's sample of 40 rows" in message
    spread = float(source.X[:, 1].astype(np.float64).std())
    assert f"'late' ({spread:.3g} times)" in message
    assert "standardize='full'" in message


def test_it_is_named_by_a_run_that_was_stopped(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, watcher = threading.Event(), Counting()
    run = begin_small(source=silent_in_sample(monkeypatch), folder=folder)
    assert not train(run, folder=folder, stop=stop, watcher=Counting(stop.set, 2))
    assert run.state.epoch == 0
    train(resume_small(folder, source=silent_in_sample(monkeypatch)), folder=folder, watcher=watcher)
    assert len(watcher.messages) == 1


@pytest.mark.parametrize("standardize", [False, "full"])
def test_nothing_is_said_where_nothing_was_sampled(monkeypatch: pytest.MonkeyPatch, standardize: bool | str) -> None:
    watcher = Counting()
    run = begin_small(config_of(standardize=standardize), silent_in_sample(monkeypatch))
    train(run, watcher=watcher)
    assert watcher.messages == []
    assert not run.state.moments.any()


def test_moments_are_those_of_the_first_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "SAMPLE_ROWS", 40)
    source, watcher = source_of(), Counting()
    run = begin_small(source=source)
    train(run, watcher=watcher)
    Z = (source.X.astype(np.float64) - run.survey.scaling.mean) * run.survey.scaling.factor
    np.testing.assert_allclose(run.state.moments, [Z.sum(axis=0), (Z**2).sum(axis=0)], rtol=1e-5)
    assert watcher.messages == []


def test_without_an_intercept_spread_is_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature far from zero keeps its size from the sample to the epoch: nothing to say."""
    monkeypatch.setattr(sample_module, "SAMPLE_ROWS", 40)
    X, _ = data()
    X[:, 0] += 1000
    watcher = Counting()
    train(begin_small(config_of(fit_intercept=False), source_of(X=X)), watcher=watcher)
    assert watcher.messages == []


# --- beginning -------------------------------------------------------------------------------------------------------
def test_a_buffer_that_is_too_small_is_refused_before_a_row_is_read() -> None:
    source = source_of()
    with pytest.raises(BufferTooSmallError) as caught:
        prepare(source, replace(config_of(), buffer_bytes=1000))
    assert caught.value.needed_bytes > 1000
    assert source.n_opened == 0
    run = prepare(source, replace(config_of(), buffer_bytes=caught.value.needed_bytes))
    assert train(run)


def test_a_batch_is_no_larger_than_the_data() -> None:
    run = prepare(source_of(), config_of(batch_size=10**6, buffer_bytes=10**6))
    assert run.state.carry_X.shape == (N_ROWS, 3)
    assert train(run)
    assert run.state.counters[kernels.N_UPDATES] == 3


def test_a_run_starts_where_the_survey_says() -> None:
    run = begin_small()
    np.testing.assert_array_equal(run.state.theta[:, -1], run.survey.target_mean)
    assert not run.state.theta[:, :-1].any()
    model = run.model()
    np.testing.assert_allclose(
        model.decision_function(data()[0] @ model.coef.T + model.intercept), run.survey.target_mean[0], rtol=1e-12
    )
