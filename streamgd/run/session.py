"""A run in its folder: begin it, go on with it, and read the model that it has come to.

What the command line and the estimators' checkpoints have in common. Training itself is `streamgd.run.loop.train`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from streamgd.data.sources.base import Source
from streamgd.errors import CheckpointError, ResumeError
from streamgd.learn import kernels
from streamgd.learn.state import State
from streamgd.run.config import Config
from streamgd.run.continuing import Trained
from streamgd.run.folder import RunFolder
from streamgd.run.runs import Run, plan_for, prepare, restore, same_run
from streamgd.run.survey import Survey
from streamgd.run.versions import versions

Report = Callable[[str], None]


def begin(
    folder: RunFolder,
    source: Source,
    config: Config,
    *,
    replace_old: bool = False,
    classes: NDArray[Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Run:
    """Begin a run in a folder, which is locked: plan, describe, survey.

    Parameters
    ----------
    folder : RunFolder
        Entered.
    source : Source
        With a target.
    config : Config
        What defines the run.
    replace_old : bool, default=False
        Whether a run that is already there is removed.
    classes : ndarray, optional
        Classes known beforehand.
    cache : path-like, optional
        Where the run's cache lies, to be written down.

    Raises
    ------
    RunExistsError
        If there is a run and `replace_old` is False.
    BufferTooSmallError, DataError
        As from `prepare`; the folder is then as before.

    Notes
    -----
    The folder is described before the survey, which takes a while on big data: a run that is killed meanwhile can be
    resumed. Where an old run would be lost, the survey goes first.
    """
    if replace_old:
        run = prepare(source, config, classes=classes)
        folder.start(describe(source, config, cache), replace=True)
        return run
    plan_for(source, config)
    folder.start(describe(source, config, cache))
    try:
        return prepare(source, config, classes=classes)
    except Exception:
        folder.discard()
        raise


def go_on(
    folder: RunFolder,
    source: Source,
    config: Config | None = None,
    *,
    report: Report,
    classes: NDArray[Any] | None = None,
) -> Run:
    """Go on with the run of a folder, which is locked: from its newest checkpoint, or from the beginning without one.

    Parameters
    ----------
    folder : RunFolder
        Entered.
    source : Source
        The data, wherever it lies now.
    config : Config, optional
        Only `max_iter` may differ from the run's; None takes the run's.
    report : callable
        Told of damaged checkpoints that are passed over.
    classes : ndarray, optional
        Classes known beforehand.

    Raises
    ------
    RunNotFoundError
        If there is no run.
    ResumeError
        If data, configuration or format differ; names what.
    CheckpointError
        If there are checkpoints, but none can be read.
    """
    described = description_of(folder)
    checkpoint = folder.newest(report)
    if checkpoint is None:
        run = prepare(source, same_run(described, source, config), classes=classes)
    else:
        # The description knows of epochs that were asked for after the checkpoint was written.
        run = restore(source, checkpoint, config or Config.from_json(described["config"]))
    if run.finished and checkpoint is not None and run.finished == checkpoint.meta["finished"]:
        return run  # there is nothing to change
    folder.cut_metrics(run.state.cursor)
    now = described | {"config": run.config.to_json(), "origin": source.origin}
    if now != described:
        folder.describe(now)
    if run.finished:  # with what it has, because fewer epochs are asked for now
        folder.save(run.to_checkpoint(), int(run.state.counters[kernels.N_ROWS]))
    return run


def with_epochs(config: Config, max_iter: int | str | None) -> Config:
    """Return the configuration with another number of epochs, if one is given."""
    return config if max_iter is None else replace(config, max_iter=max_iter)


def description_of(folder: RunFolder) -> dict[str, Any]:
    """Read what `describe` said of a run.

    Raises
    ------
    RunNotFoundError
        If there is no run.
    ResumeError
        If a newer streamgd wrote it, or it is damaged.
    """
    found = folder.description()
    lacks = [name for name in ("config", "origin", "fingerprint", "row_dtype") if name not in found]
    try:
        if not lacks:
            Config.from_json(found["config"])
    except (KeyError, TypeError, AttributeError) as err:
        raise ResumeError(f"{folder.path / 'config.json'} is damaged: its 'config' cannot be used ({err})") from err
    if lacks:
        raise ResumeError(f"{folder.path / 'config.json'} is damaged: it lacks {', '.join(map(repr, lacks))}")
    return found


def describe(source: Source, config: Config, cache: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Say what ``config.json`` says."""
    assert source.target is not None
    return {
        "config": config.to_json(),
        "origin": source.origin,
        "cache": None if cache is None else os.fspath(cache),
        "fingerprint": source.fingerprint,
        "row_dtype": source.row_dtype.name,
        "features": list(source.feature_names) if source.feature_names else None,
        "n_features": source.n_features,
        "target": {"name": source.target.name, "is_vector": source.target.is_vector},
        "versions": versions(),
    }


@dataclass(frozen=True)
class Saved:
    """What the folder of a run holds, without its data.

    Attributes
    ----------
    trained : Trained
        What the newest checkpoint has learnt.
    finished : str or None
        Why the run ended; None if it has not.
    feature_names : tuple of str, or None
        As trained on.
    origin : dict
        How the data was opened.
    """

    trained: Trained
    finished: str | None
    feature_names: tuple[str, ...] | None
    origin: dict[str, Any]


def load_saved(folder: RunFolder, report: Report) -> Saved:
    """Read the newest whole checkpoint of a folder.

    Parameters
    ----------
    folder : RunFolder
        Need not be locked.
    report : callable
        Told of damaged checkpoints that are passed over.

    Raises
    ------
    RunNotFoundError
        If there is no run.
    CheckpointError
        If it has no checkpoint, or none that can be read.
    ResumeError
        If a newer streamgd wrote it.
    """
    described = description_of(folder)
    checkpoint = folder.newest(report)
    if checkpoint is None:
        raise CheckpointError(
            f"the run in {folder.path} has no checkpoint yet: it was stopped before the first update. "
            f"`streamgd resume {folder.path}` trains it"
        )
    tensors, meta = checkpoint.tensors, checkpoint.meta
    state = State.from_tensors(
        tensors,
        batch_size=len(tensors["carry_y"]),  # the rows of the open batch; nothing will be added to it here
        has_weight=len(tensors["carry_weight"]) > 0,
    )
    survey = Survey.restore(tensors, meta["survey"])
    names = meta["features"]
    return Saved(
        trained=Trained(Config.from_json(meta["config"]), survey, state, meta["target"]["is_vector"]),
        finished=meta["finished"],
        feature_names=None if names is None else tuple(names),
        origin=described["origin"],
    )
