"""A run: what defines it and where it stands, made from data and a configuration or from a checkpoint.

`prepare` plans the memory and takes the survey, `restore` checks that data and configuration are the run's. Training it
is `streamgd.run.loop.train`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import streamgd
from streamgd.data.cache import Written
from streamgd.data.cache_writer import CacheWriter
from streamgd.data.layout import buffer_option
from streamgd.data.plan import Layout, format_bytes, plan_layout
from streamgd.data.sources.base import Source
from streamgd.errors import BufferTooSmallError, ResumeError
from streamgd.learn import kernels
from streamgd.learn.losses import curvature_of
from streamgd.learn.model import LinearModel
from streamgd.learn.penalties import settled, strengths
from streamgd.learn.recipe import Packed
from streamgd.learn.state import State
from streamgd.run.caching import Cached
from streamgd.run.checkpoint import Checkpoint
from streamgd.run.config import Config, differences
from streamgd.run.survey import Survey, take_survey
from streamgd.run.versions import versions


@dataclass
class Run:
    """A run: what defines it, and where it stands.

    Attributes
    ----------
    source : Source
        The rows.
    config : Config
        What defines the run.
    survey : Survey
        What was found before the first update.
    layout : Layout
        The memory plan, from which the order of rows follows.
    state : State
        Coefficients, optimizer, cursor.
    finished : str or None
        Why the run ended (``"max_iter"`` or ``"converged"``), None while it goes on.
    cached : Cached or None
        How its cache is read; None without one.
    writer : CacheWriter or None
        What writes the cache while the first epoch trains.
    written : Written or None
        What was written of it before the checkpoint that the run was restored from.
    open_ended : bool
        Whether the survey may be of other rows than these, or rows are to come that it knows nothing of, so that losses
        say nothing beside its own.
    """

    source: Source
    config: Config
    survey: Survey
    layout: Layout
    state: State
    finished: str | None = None
    cached: Cached | None = None
    writer: CacheWriter | None = None
    written: Written | None = None
    open_ended: bool = False

    @property
    def layout_now(self) -> Layout:
        """The memory plan of the epoch that the cursor is in."""
        cached = self.cached
        return self.layout if cached is None or self.state.epoch < cached.first_epoch else cached.layout

    @property
    def n_epochs(self) -> int:
        """Epochs at most."""
        return self.config.n_epochs(self.source.n_rows)

    @property
    def batch_rows(self) -> int:
        """Rows behind one update of a lane."""
        return self.config.batch_rows(self.source.n_rows)

    def packed(self, *, moments: bool) -> Packed:
        """Write what is to be learnt as kernels take it.

        Parameters
        ----------
        moments : bool
            Whether to keep the features' moments while consuming rows.
        """
        return self.config.recipe.pack(
            n_classes=self.survey.n_classes,
            n_updates=self.n_epochs * self.config.n_updates(self.source.n_rows),
            mean_weight=self.survey.mean_weight,
            moments=moments,
        )

    def reason_to_end(self) -> str | None:
        """Say why the run ends with the epoch that was closed last; None if it goes on."""
        if self.state.counters[kernels.NO_IMPROVEMENT] >= self.config.patience(self.source.n_rows):
            return "converged"
        return "max_iter" if self.state.epoch >= self.n_epochs else None

    def model(self) -> LinearModel:
        """Return the model that the state amounts to, in the data's units."""
        return model_of(
            self.config, self.survey, self.state, self.source.target is None or self.source.target.is_vector
        )

    def to_checkpoint(self) -> Checkpoint:
        """Write down everything that resuming needs."""
        source = self.source
        assert source.target is not None
        meta: dict[str, Any] = {
            "config": self.config.to_json(),
            "layout": self.layout.to_json(),
            "cached": None if self.cached is None else self.cached.to_json(),
            "survey": self.survey.to_json(),
            "fingerprint": source.fingerprint,
            "row_dtype": source.row_dtype.name,
            "blocks": _block_digest(source),
            "cursor": list(self.state.cursor),
            "finished": self.finished,
            "features": list(source.feature_names) if source.feature_names else None,
            "target": {"name": source.target.name, "is_vector": source.target.is_vector},
            "versions": versions(),
        }
        tensors = {**self.state.to_tensors(), **self.survey.to_tensors()}
        if self.writer is not None:
            written = self.writer.written_before(self.state.cursor[1])
            tensors["cache.sums"], meta["cache_rows"] = written.sums, written.n_rows
            meta["cache_stamp"] = written.stamp
            self.writer.keeps_rest = self.writer.error is None
        return Checkpoint(tensors, meta)


def _block_digest(source: Source) -> str:
    """Hash the rows of each block: the order of rows follows from them."""
    return hashlib.blake2b(source.block_rows.astype("<i8").tobytes(), digest_size=16).hexdigest()


def model_of(config: Config, survey: Survey, state: State, is_vector: bool) -> LinearModel:
    """Fold a state into a model in the data's units.

    With averaging the coefficients are the averages. Under l1 they take one more proximal step; where features have not
    been scaled, so that nothing is known of the loss's curvature, they are zero where the last iterate is.
    """
    recipe, state = config.recipe, state.with_penalty(sparse=config.recipe.is_sparse)
    averaged = recipe.average_kind != kernels.AVERAGE_NONE and state.counters[kernels.N_UPDATES] > 0
    theta = (state.average if averaged else state.theta).copy()
    if recipe.is_sparse and config.standardize:
        l1, l2 = strengths(recipe.penalty, recipe.alpha, recipe.l1_ratio)
        factors = survey.class_factors if survey.class_factors.size else 1.0
        classes = survey.class_weights * factors / max(survey.class_weights.sum(), np.finfo(float).tiny)
        curvature = curvature_of(recipe.the_loss, survey.output_scale(), classes) + l2
        theta[:, :-1] = settled(theta[:, :-1], state.subgradient[:, :-1], l1, curvature)
    elif recipe.is_sparse:
        theta[:, :-1][state.theta[:, :-1] == 0] = 0.0
    coef, intercept = survey.scaling.fold(theta)
    if not config.recipe.fit_intercept:
        intercept = np.zeros_like(intercept)
    return LinearModel(config.recipe.task, config.recipe.loss, coef, intercept, survey.codec.classes, is_vector)


def prepare(
    source: Source, config: Config, *, survey: Survey | None = None, classes: NDArray[Any] | None = None
) -> Run:
    """Plan the memory, take the survey and make the first state.

    Parameters
    ----------
    source : Source
        With a target.
    config : Config
        What defines the run.
    survey : Survey, optional
        Of an earlier call, to be kept (`partial_fit`).
    classes : ndarray, optional
        Classes known beforehand.

    Raises
    ------
    BufferTooSmallError
        If the plan does not fit; before any row is read.
    DataError
        If the survey finds data that cannot be used.
    """
    layout = plan_for(source, config)
    if config.n_lanes == 1:
        source.lend(layout.spare_bytes)  # what the survey decodes, the first epoch will want again
    survey = survey or take_survey(source, config, classes=classes)
    return Run(source, config, survey, layout, first_state(source, config, survey))


def plan_for(source: Source, config: Config) -> Layout:
    """Plan the memory of a run, or of each of its lanes; see `streamgd.data.plan.plan_layout`.

    The buffer is for all lanes together, wherever they run: which part of it a lane has must not depend on that.

    Raises
    ------
    BufferTooSmallError
        If it does not fit; `needed_bytes` is for all lanes.
    """
    n_outputs = 1 if source.target is None or config.recipe.task == "classification" else source.target.n_outputs
    n_lanes = config.n_lanes
    try:
        layout = plan_layout(
            source,
            config.buffer_bytes // n_lanes,
            n_outputs=n_outputs,
            carry_rows=config.batch_rows(source.n_rows),
            shuffle=config.shuffle,
        )
    except BufferTooSmallError as err:
        if n_lanes == 1:
            raise
        needed = n_lanes * err.needed_bytes
        of_each = str(err).replace(f" ({buffer_option(err.needed_bytes)})", "")  # which would be too small again
        raise BufferTooSmallError(
            f"the buffer of {format_bytes(config.buffer_bytes)} is shared by {n_lanes} lanes, which need {needed:,} "
            f"bytes together ({buffer_option(needed)}). Of each: {of_each}",
            needed,
        ) from err
    return layout if n_lanes == 1 else _of_lane(layout, source, n_lanes)


def _of_lane(layout: Layout, source: Source, n_lanes: int) -> Layout:
    """Fit a layout to a lane: two windows, and none that would hold more rows than any lane has."""
    most = -(-source.n_rows // n_lanes) + int(source.block_rows.max())
    window_rows = min(layout.window_rows, most)
    return replace(
        layout,
        window_rows=window_rows,
        n_windows=2,
        window_bytes=window_rows * layout.row_bytes,
        planned_bytes=layout.open_bytes + layout.piece_bytes + layout.carry_bytes + 2 * window_rows * layout.row_bytes,
        resident=False,
    )


def first_state(source: Source, config: Config, survey: Survey) -> State:
    """Return the state before the first row."""
    return _state_from(survey.start, survey.codec.n_outputs, source, config)


def least_state_bytes(source: Source, config: Config) -> int:
    """Count the bytes of a state before classes are counted: as if there were two."""
    n_outputs = 1 if source.target is None else source.target.n_outputs
    return _state_from(np.zeros(n_outputs), n_outputs, source, config).n_bytes


def _state_from(intercept: NDArray[np.float64], n_targets: int, source: Source, config: Config) -> State:
    recipe = config.recipe
    return State.start(
        intercept=intercept,
        n_features=source.n_features,
        n_targets=n_targets,
        n_slots=recipe.the_optimizer.n_slots,
        sparse=recipe.is_sparse,
        batch_size=config.batch_rows(source.n_rows),
        row_dtype=source.row_dtype,
        has_weight=source.has_weight,
    )


def restore(source: Source, checkpoint: Checkpoint, config: Config | None = None) -> Run:
    """Make the run that a checkpoint describes, over the same data.

    Parameters
    ----------
    source : Source
        The data, wherever it lies now.
    checkpoint : Checkpoint
        Where to go on.
    config : Config, optional
        What the caller believes the configuration to be; only `max_iter` may differ.

    Raises
    ------
    ResumeError
        If data or configuration differ; names what.
    """
    meta = checkpoint.meta
    config = same_run(meta, source, config)
    if meta["blocks"] != _block_digest(source):
        raise ResumeError(
            f"the data ({source.name}) is cut into other blocks than when the run began, perhaps by another version "
            f"(streamgd {meta['versions']['streamgd']} then, {streamgd.__version__} now), so that its rows would come "
            "in another order: resume with that version, or start a new run"
        )
    survey = Survey.restore(checkpoint.tensors, meta["survey"])
    state = State.from_tensors(
        checkpoint.tensors,
        batch_size=config.batch_rows(source.n_rows),
        has_weight=source.has_weight,
    ).with_penalty(sparse=config.recipe.is_sparse)
    cached = None if meta.get("cached") is None else Cached.from_json(meta["cached"])
    run = Run(source, config, survey, Layout.from_json(meta["layout"]), state, meta["finished"], cached)
    if "cache.sums" in checkpoint.tensors:
        stamp = meta.get("cache_stamp", {})  # of older runs, whose caches have other names
        run.written = Written(checkpoint.tensors["cache.sums"], int(meta["cache_rows"]), stamp)
    epoch, window, row = state.cursor
    begun = epoch + (window > 0 or row > 0)
    if run.finished is None and begun > run.n_epochs:
        raise ResumeError(
            f"the run has begun epoch {begun}: with max_iter={run.n_epochs} epochs it would have to go back. Give it "
            f"at least {begun}"
        )
    # From the state, because more epochs, or fewer, may be asked for now, and because an interrupt may have come after
    # an epoch was closed and before anything was made of it.
    run.finished = run.reason_to_end() if begun == epoch else None
    return run


def same_run(recorded: Mapping[str, Any], source: Source, config: Config | None) -> Config:
    """Make sure that data and configuration are those of a run; return the configuration to go on with.

    Parameters
    ----------
    recorded : mapping
        What a checkpoint, or the folder's description, says: ``fingerprint``, ``row_dtype`` and ``config``.
    source : Source
        The data.
    config : Config or None
        What the caller believes the configuration to be; only `max_iter` may differ. None takes the recorded one.

    Raises
    ------
    ResumeError
        If they differ; names what.
    """
    changed = differences(recorded["fingerprint"], source.fingerprint)
    if recorded["row_dtype"] != source.row_dtype.name:
        changed.append(f"dtype of rows: {recorded['row_dtype']!r} then, {source.row_dtype.name!r} now")
    if changed:
        raise ResumeError(
            f"the data ({source.name}) is not what the run was trained on; these differ: {'; '.join(changed)}. Resume "
            "with the same data, or start a new run"
        )
    then = Config.from_json(recorded["config"])
    config = config or then
    changed = differences(then.to_json(), replace(config, max_iter=then.max_iter).to_json())
    if changed:
        raise ResumeError(
            f"the configuration is not the run's; these differ: {'; '.join(changed)}. Resume with the same, or start a "
            "new run; only the number of epochs may change"
        )
    if config.max_iter != then.max_iter and config.recipe.schedule == "cosine":
        raise ResumeError(
            "learning_rate='cosine' is shaped by the number of epochs, which therefore cannot change: "
            f"{then.max_iter} then, {config.max_iter} now. Start a new run"
        )
    return config
