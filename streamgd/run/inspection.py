"""What a person is told about data and runs: what was decided before the first row, and how a run ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from streamgd.data.cache import Cache
from streamgd.data.layout import Layout, format_bytes, mixing
from streamgd.data.sources.base import Source
from streamgd.data.targets import TargetCodec
from streamgd.learn import kernels
from streamgd.learn.recipe import Recipe
from streamgd.run.config import AUTO_UPDATES, Config, RunOptions
from streamgd.run.runs import Run
from streamgd.run.survey import Survey
from streamgd.run.worker_memory import WorkerMemory

#: Names and classes that are listed; of the rest, the number.
_LISTED = 8
_INDENT = 12
#: Bytes of a state that are told.
_WORTH_TELLING = 1_000_000


def decisions(run: Run, folder: Path, options: RunOptions, reasons: dict[str, str]) -> list[str]:
    """Say what was decided, before the first row is trained.

    Parameters
    ----------
    run : Run
        As prepared or restored.
    folder : Path
        The run's folder.
    options : RunOptions
        How it goes.
    reasons : dict of str to str
        Why ``"task"`` is what it is, if it was not told.
    """
    source = run.source
    assert source.target is not None
    resumed = [] if run.state.cursor == (0, 0, 0) else [entry("resuming", standing(run))]
    state_bytes = run.state.n_bytes
    return [
        *resumed,
        *about_data(source),
        *_about_target(run, reasons.get("task", "")),
        *_about_learning(run),
        *about_plan(source, run.layout, state_bytes),
        *about_lanes(run.config.n_lanes, run.batch_rows, run.layout, source, state_bytes),
        entry("run", f"{folder}, with a checkpoint every {options.checkpoint_every_s:g} s"),
    ]


def about_data(source: Source) -> list[str]:
    """Say what is read."""
    where = "" if source.kind == "memory" else f" ({source.kind})"
    named = f": {listed(source.feature_names)}" if source.feature_names else ""
    lines = [
        entry(
            "data",
            f"{source.name}{where}: {plural(source.n_rows, 'row')} in {plural(source.n_blocks, 'block')}, "
            f"{format_bytes(source.stored_bytes)} a pass",
        ),
        entry("features", f"{source.n_features:,} as {source.row_dtype}{named}"),
    ]
    if source.dropped:
        lines.append(entry("left out", listed([f"{name} ({reason})" for name, reason in source.dropped])))
    if source.has_weight:
        lines.append(entry("weights", "of each row, as stored"))
    return lines


def about_blocks(source: Source) -> list[str]:
    """Say how rows lie in blocks."""
    rows = source.block_rows
    if len(rows) == 1:
        return []
    median = int(np.median(rows))
    return [entry("blocks", f"of {int(rows.min()):,} to {int(rows.max()):,} rows, half of them of at most {median:,}")]


def _about_target(run: Run, reason: str) -> list[str]:
    target, survey, recipe = run.source.target, run.survey, run.config.recipe
    assert target is not None
    why = f" ({reason})" if reason else ""
    lines = [entry("target", f"{target.name} ({target.dtype}): {recipe.task}{why}")]
    if survey.n_classes:
        lines.append(entry("classes", f"{survey.n_classes:,}: {listed(_class_counts(survey))}"))
    elif target.n_outputs > 1:
        lines.append(entry("", f"{target.n_outputs} outputs"))
    return lines


def _class_counts(survey: Survey) -> list[str]:
    assert survey.codec.classes is not None
    factors = survey.class_factors.tolist() or [1.0] * survey.n_classes
    return [
        f"{label!r} ({plural(int(count), 'row')}{'' if factor == 1.0 else f', weighed {factor:.4g}'})"
        for label, count, factor in zip(
            survey.codec.classes.tolist(), survey.class_counts.tolist(), factors, strict=True
        )
    ]


def _about_learning(run: Run) -> list[str]:
    config, recipe = run.config, run.config.recipe
    penalty = "no penalty" if recipe.penalty is None else f"penalty {recipe.penalty} with alpha={recipe.alpha:g}"
    scaled = {True: "features scaled by a sample's moments", "full": "features scaled by their exact moments"}
    return [
        entry("learning", f"loss {recipe.loss}, {penalty}, {_optimizer(recipe)}, batches of {recipe.batch_size:,}"),
        entry("", scaled.get(config.standardize, "features as they are")),
        entry("epochs", _epochs(config, run.n_epochs)),
    ]


def _optimizer(recipe: Recipe) -> str:
    if recipe.the_optimizer.name == "auto":
        return "optimizer auto, which needs no tuning"
    if not recipe.the_optimizer.learning_rates:
        return f"optimizer {recipe.the_optimizer.name}"
    eta0 = "" if recipe.schedule == "optimal" else f", eta0={recipe.first_eta:g}"
    return f"optimizer {recipe.the_optimizer.name} (learning rate {recipe.schedule}{eta0})"


def _epochs(config: Config, n_epochs: int) -> str:
    why = f" (as many as make about {AUTO_UPDATES:,} updates)" if config.max_iter == "auto" else ""
    if config.tol is None or n_epochs <= config.n_iter_no_change:
        return f"{n_epochs:,}{why}"
    return f"at most {n_epochs:,}{why}, fewer if the loss stops falling for {config.n_iter_no_change} of them"


def about_plan(source: Source, layout: Layout, state_bytes: int) -> list[str]:
    """Say where memory goes, and how well rows will be mixed."""
    n_windows = -(-source.n_rows // layout.window_rows)
    windows = 3 if layout.resident else 2
    window_bytes = format_bytes(windows * layout.window_bytes)
    lines = [
        entry(
            "memory",
            f"{format_bytes(layout.planned_bytes)} of {format_bytes(layout.buffer_bytes)} planned: "
            f"{windows} windows of {plural(layout.window_rows, 'row')} ({window_bytes}), "
            f"{plural(layout.n_open, 'open block')} ({format_bytes(layout.open_bytes)}), "
            f"decoding ({format_bytes(layout.piece_bytes)}), open batch ({format_bytes(layout.carry_bytes)})",
        ),
        *about_state(state_bytes),
        entry("windows", f"{n_windows:,} an epoch, slices of up to {plural(layout.slice_rows, 'row')}"),
    ]
    if layout.resident:
        lines.append(entry("", "all rows fit in memory: they are read once"))
    mixed = mixing(source, layout)
    lines.append(entry("mixing", str(mixed)))
    if mixed.verdict in ("poor", "fair"):
        advice = ["a bigger --buffer would mix better"]
        if hint := source.mixing_hint():
            advice.insert(0, hint)
        if mixed.verdict == "poor":
            advice.insert(0, "if neighbouring rows are alike, as in sorted files, the fit will suffer")
        lines += [entry("", text) for text in advice]
    return lines


def about_state(state_bytes: int) -> list[str]:
    """Say what coefficients and optimizer take, where that is worth a line: the buffer is for rows."""
    if state_bytes < _WORTH_TELLING:
        return []
    return [entry("", f"beside it {format_bytes(state_bytes)} of coefficients and what the optimizer keeps")]


def about_lanes(n_lanes: int, batch_rows: int, layout: Layout, source: Source, state_bytes: int) -> list[str]:
    """Say what several lanes take, of the whole plan and on a worker."""
    if n_lanes == 1:
        return []
    memory = WorkerMemory.planned(layout, source, state_bytes, n_lanes)
    most = layout.planned_bytes + memory.more_windows * layout.window_bytes
    base = memory.needed(0, 0)
    together = n_lanes * (most + state_bytes)
    each, ahead, all_lanes = map(format_bytes, (memory.needed(1, 1) - base, most, together))
    return [
        entry("lanes", f"{n_lanes:,} with batches of {batch_rows:,}; memory, windows and mixing are of each lane"),
        entry("", f"memory of all lanes together: up to {all_lanes}"),
        entry("", f"a worker of a cluster takes {format_bytes(base)}, and {each} for each of its threads"),
        entry("", f"at least; up to {ahead} for each of its lanes are used to read ahead, as its limit allows"),
    ]


def about_cache(source: Source) -> list[str]:
    """Say what a cache would take."""
    if source.target is None:
        return []
    needed = Cache("", source, TargetCodec(None, source.target.n_outputs)).needed_bytes
    return [entry("cache", f"--cache DIR would take {format_bytes(needed)}: later epochs decode nothing, and mix well")]


def standing(run: Run) -> str:
    """Say where a run stands."""
    epoch, _, _ = run.state.cursor
    rows = int(run.state.counters[kernels.EPOCH_ROWS])
    if epoch >= run.n_epochs:
        return f"after epoch {epoch:,} of {run.n_epochs:,}"
    return f"in epoch {epoch + 1:,} of {run.n_epochs:,}, after {rows:,} of {plural(run.source.n_rows, 'row')}"


def outcome(run: Run, folder: Path, *, resumed: bool) -> list[str]:
    """Say how a finished run ended."""
    state, null_loss = run.state, run.survey.null_loss
    loss = state.loss_curve[-1]
    explained = f", explains {100 * (1 - loss / null_loss):.2f} % of what a constant misses" if null_loss > 0 else ""
    how = {
        "max_iter": f"finished: {plural(state.epoch, 'epoch')} done",
        "converged": f"finished: converged after {plural(state.epoch, 'epoch')}",
    }[run.finished or "max_iter"]
    lines = [
        f"{how}, {plural(int(state.counters[kernels.N_UPDATES]), 'update')}",
        f"loss {loss:.6g} over the last epoch{explained}",
    ]
    if resumed and run.finished == "converged":
        lines.append(
            "nothing to do: it stopped because the loss no longer fell (--tol), and more epochs would not change that"
        )
    elif resumed:
        lines.append(f"nothing to do; `streamgd resume {folder} --epochs N` with N above {state.epoch} goes on with it")
    return lines


def entry(name: str, text: str) -> str:
    """Write a line of a report: what it is about, and what there is to say."""
    return f"{name:<{_INDENT}}{text}"


def listed(items: Sequence[str], limit: int = _LISTED) -> str:
    """List items, cut short if they are many."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown}, … ({len(items) - limit:,} more)"


def plural(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
