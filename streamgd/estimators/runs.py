"""The run folders of `fit`: where they lie, which one to go on with, and estimators made from them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.base import Source
from streamgd.errors import CheckpointError
from streamgd.learn import kernels
from streamgd.run.checkpoint import Checkpoint
from streamgd.run.config import Config
from streamgd.run.folder import RunFolder
from streamgd.run.loop import Run, restore

#: Digits of the hash in a folder's name.
_DIGEST_BYTES = 10


def folder_of(parent: str | os.PathLike[str], config: Config, source: Source, start: Run | None) -> Path:
    """Return the run folder of a fit: ``<hash>-<max_iter>`` in `parent`.

    Parameters
    ----------
    parent : path-like
        The estimator's ``checkpoint_dir``.
    config : Config
        What defines the run. The hash leaves `max_iter` out, so that runs which differ in nothing else find each other.
    source : Source
        The data; its fingerprint counts, not where it lies.
    start : Run or None
        A run that does not start from the survey alone (a warm start): its first state counts too.
    """
    values = config.to_json()
    max_iter = values.pop("max_iter")
    text = json.dumps([values, source.fingerprint, source.row_dtype.name], sort_keys=True, default=repr)
    digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES)
    if start is not None:
        digest.update(start.state.theta.tobytes() + start.state.slots.tobytes())
    return Path(parent) / f"{digest.hexdigest()}-{max_iter}"


def resumable(folder: RunFolder, source: Source, config: Config) -> Run | None:
    """Restore the run that a fit with these options would go on with, or return None.

    It is the folder's own run, else the one that got furthest among those with another `max_iter`, as far as it has not
    gone beyond what is asked for now.
    """
    if folder.holds_run:
        found = folder.newest(_warn)
        if found is not None:
            return restore(source, found, config)
    furthest: tuple[int, Checkpoint] | None = None
    for checkpoint in _siblings(folder):
        n_rows = int(checkpoint.tensors["counters"][kernels.N_ROWS])
        if n_rows <= config.n_epochs(source.n_rows) * source.n_rows and (furthest is None or n_rows > furthest[0]):
            furthest = n_rows, checkpoint
    return None if furthest is None else restore(source, furthest[1], config)


def _siblings(folder: RunFolder) -> Iterator[Checkpoint]:
    stem = folder.path.name.rpartition("-")[0]
    for path in sorted(folder.path.parent.glob(f"{stem}-*")):
        if path != folder.path and (other := RunFolder(path)).holds_run:
            # Another process may be writing there, or have left nothing that can be read: then it is no help.
            with contextlib.suppress(CheckpointError):
                checkpoint = other.newest(_warn)
                if checkpoint is not None:
                    yield checkpoint


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def load(run_dir: str | os.PathLike[str]) -> Any:
    """Return the estimator of a run, fitted as far as the run got.

    Parameters
    ----------
    run_dir : path-like
        A run folder: one that ``streamgd train`` made, or ``run_dir_`` of an estimator that was fitted with a
        ``checkpoint_dir``.

    Returns
    -------
    SGDRegressor or SGDClassifier
        With the run's options, and the coefficients of its newest checkpoint; of the run of an unfinished epoch, too.
        It predicts, and `partial_fit` goes on with it. ``run_dir_`` is the folder.

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
    A newest checkpoint that is damaged is reported as a warning and the one before it used. Nothing is locked or
    written, so a run may be looked at while it trains.

    Examples
    --------
    >>> model = streamgd.load("runs/prices")  # doctest: +SKIP
    >>> model.predict(X)  # doctest: +SKIP
    """
    from streamgd.estimators.classifier import SGDClassifier
    from streamgd.estimators.regressor import SGDRegressor

    folder = RunFolder(run_dir)
    folder.description()  # says so if there is no run, or one of a newer format
    checkpoint = folder.newest(_warn)
    if checkpoint is None:
        raise CheckpointError(
            f"the run in {folder.path} has no checkpoint yet: wait for its first, or start it again if it was killed "
            "before"
        )
    config = Config.from_json(checkpoint.meta["config"])
    kind = SGDRegressor if config.recipe.task == "regression" else SGDClassifier
    estimator = kind(**options_of(config, kind))
    estimator._restore(checkpoint, config, folder.path)
    return estimator


def options_of(config: Config, kind: Any) -> dict[str, Any]:
    """Return the parameters of an estimator that a configuration amounts to."""
    values = config.to_json()
    values["random_state"], values["buffer"] = values.pop("seed"), values.pop("buffer_bytes")
    values["class_weight"] = config.class_weight
    return {name: value for name, value in values.items() if name in kind._get_param_names()}


def feature_names(checkpoint: Checkpoint) -> NDArray[Any] | None:
    """Return the names of the features that a run was trained on, where they had names."""
    names = checkpoint.meta["features"]
    return None if names is None else np.array(names, dtype=object)
