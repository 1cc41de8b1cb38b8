"""The run folders of `fit`: where they lie, which run to go on with, and estimators made from them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from streamgd.data.sources.base import Source
from streamgd.errors import CheckpointError
from streamgd.learn import kernels
from streamgd.run.checkpoint import Checkpoint
from streamgd.run.config import Config
from streamgd.run.folder import RunFolder
from streamgd.run.runs import Run, restore
from streamgd.run.session import begin, describe, go_on, load_saved

if TYPE_CHECKING:
    from streamgd.estimators.classifier import SGDClassifier
    from streamgd.estimators.regressor import SGDRegressor

#: Bytes of the hash in a folder's name.
_DIGEST_BYTES = 10


def folder_of(
    parent: str | os.PathLike[str], config: Config, source: Source, start: Run | None, *, cached: bool = False
) -> Path:
    """Return the run folder of a fit: ``<hash>-<max_iter>`` in `parent`.

    Parameters
    ----------
    parent : path-like
        The estimator's ``checkpoint_dir``.
    config : Config
        What defines the run. The hash leaves `max_iter` out, so that a run finds those that differ in it alone.
    source : Source
        The data; its fingerprint counts, not where it lies.
    start : Run or None
        A run that does not start from the survey alone (a warm start): its first state counts too.
    cached : bool, default=False
        Whether rows come in the order of a cache; where that lies does not count.
    """
    values = config.to_json()
    max_iter = values.pop("max_iter")
    if cached:
        values["cached"] = True
    text = json.dumps([values, source.fingerprint, source.row_dtype.name], sort_keys=True, default=repr)
    digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES)
    if start is not None:
        for array in start.state.to_tensors().values():
            digest.update(array.tobytes())
    return Path(parent) / f"{digest.hexdigest()}-{max_iter}"


def open_run(
    folder: RunFolder,
    source: Source,
    config: Config,
    start: Run | None,
    *,
    resume: bool,
    cache: str | os.PathLike[str] | None = None,
) -> Run:
    """Begin a run in its folder, which is locked, or go on with one.

    Parameters
    ----------
    folder : RunFolder
        As from `folder_of`, entered.
    source : Source
        With a target.
    config : Config
        What defines the run.
    start : Run or None
        What to begin with, if not with the survey.
    resume : bool
        Whether to go on with what is there: the folder's own run, else the one that got furthest among those which
        differ in `max_iter` alone and have not gone beyond what is asked for now. That one stays as it is.
    cache : path-like, optional
        Where the run's cache lies, to be written down.
    """
    if resume and folder.holds_run and folder.checkpoints.files():
        return go_on(folder, source, config, report=warn)
    found = _furthest(folder, config.n_epochs(source.n_rows) * source.n_rows) if resume else None
    if found is not None:
        other, checkpoint = found
        run = restore(source, checkpoint, config)
        folder.start(describe(source, config, cache), replace=True)
        folder.take_metrics(other, run.state.cursor)
        folder.checkpoints.save(run.to_checkpoint(), int(run.state.counters[kernels.N_ROWS]))
        return run
    if start is not None:
        folder.start(describe(source, config, cache), replace=True)
        return start
    return begin(folder, source, config, replace_old=True, cache=cache)


def _furthest(folder: RunFolder, most_rows: int) -> tuple[RunFolder, Checkpoint] | None:
    def progress(sibling: tuple[RunFolder, Checkpoint]) -> int:
        return int(sibling[1].tensors["counters"][kernels.N_ROWS])

    found = [sibling for sibling in _siblings(folder) if progress(sibling) <= most_rows]
    return max(found, key=progress, default=None)


def _siblings(folder: RunFolder) -> Iterator[tuple[RunFolder, Checkpoint]]:
    stem = folder.path.name.rpartition("-")[0]
    for path in sorted(folder.path.parent.glob(f"{stem}-*")):
        if path != folder.path and (other := RunFolder(path)).holds_run:
            # It may have left nothing that can be read, or be written to at this moment: then it is no help.
            with contextlib.suppress(CheckpointError):
                checkpoint = other.newest(warn)
                if checkpoint is not None:
                    yield other, checkpoint


def load(run_dir: str | os.PathLike[str]) -> SGDRegressor | SGDClassifier:
    """Return the estimator of a run, fitted as far as the run got.

    Parameters
    ----------
    run_dir : path-like
        A run folder: one that ``streamgd train`` made, or ``run_dir_`` of an estimator that was fitted with a
        `checkpoint_dir`.

    Returns
    -------
    SGDRegressor or SGDClassifier
        With the run's options, and the coefficients as of its newest checkpoint, whether the run has ended or not. It
        predicts, and `partial_fit` goes on with it. ``run_dir_`` is the folder.

    Raises
    ------
    RunNotFoundError
        If there is no run.
    CheckpointError
        If it has no checkpoint, or none that can be read.
    ResumeError
        If a newer streamgd wrote it.

    Notes
    -----
    A damaged checkpoint is reported as a warning and the one before it used. Nothing is locked or written, so a run may
    be looked at while it trains.

    Examples
    --------
    >>> import tempfile
    >>> import streamgd
    >>> X, y = [[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trained = streamgd.SGDRegressor(checkpoint_dir=folder, max_iter=20).fit(X, y)
    ...     loaded = streamgd.load(trained.run_dir_)
    >>> bool((loaded.coef_ == trained.coef_).all())
    True
    """
    from streamgd.estimators.classifier import SGDClassifier
    from streamgd.estimators.regressor import SGDRegressor

    folder = RunFolder(run_dir)
    saved = load_saved(folder, warn)
    config = saved.trained.config
    kind = SGDRegressor if config.recipe.task == "regression" else SGDClassifier
    values = config.to_json()
    values |= {"random_state": config.seed, "buffer": config.buffer_bytes, "class_weight": config.class_weight}
    estimator = kind(**{name: value for name, value in values.items() if name in kind._get_param_names()})
    estimator._restore(saved, folder.path)
    return estimator


def warn(text: str) -> None:
    """Say something in the way of a library."""
    warnings.warn(text, stacklevel=stack_level())


def stack_level() -> int:
    """Count the callers up to the first one outside of streamgd, whose line a warning of the caller should name."""
    level, frame = 1, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] == "streamgd" and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level
