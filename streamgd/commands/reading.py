"""From paths and names to sources: for training, for resuming, and for a model that is already there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from streamgd.data.sources import open_source, reopen
from streamgd.data.sources.base import Source
from streamgd.data.sources.files import data_files
from streamgd.errors import ResumeError, SourceNotFoundError
from streamgd.run.folder import RunFolder
from streamgd.run.session import Saved, load_saved


def open_data(
    data: Sequence[str],
    *,
    target: list[str] | None,
    features: list[str] | None,
    weight: str | None,
    dtype: str = "auto",
) -> Source:
    """Open files.

    Parameters
    ----------
    data : sequence of str
        Files, folders or patterns.
    target : list of str or None
        One name, or several columns for several outputs.
    features : list of str or None
        Names of features.
    weight : str or None
        Name of the weights.
    dtype : str, default="auto"
        Row dtype.
    """
    return open_source(
        data[0] if len(data) == 1 else list(data),
        target[0] if target is not None and len(target) == 1 else target,
        features=features,
        weight=weight,
        dtype=dtype,
    )


def open_again(described: dict[str, Any], data: Sequence[str]) -> Source:
    """Open the data of a run again, with the row dtype that it was trained in.

    Parameters
    ----------
    described : dict
        The run's ``config.json``.
    data : sequence of str
        Where the data lies now; empty if where it lay.

    Raises
    ------
    ResumeError
        If the run was trained on data that was no file.
    SourceNotFoundError
        If it is gone.
    """
    origin = {**described["origin"], "dtype": described["row_dtype"]}
    if "data" not in origin:
        raise ResumeError(
            f"the run was trained on {origin.get('kind')} data that only Python has: resume it there, with "
            "fit(…, resume=True)"
        )
    if data:
        origin["data"] = data[0] if len(data) == 1 else list(data)
    try:
        return reopen(origin)
    except SourceNotFoundError as err:
        if data:
            raise
        ended = "" if str(err).endswith("?") else "."
        raise SourceNotFoundError(f"{err}{ended} If the data was moved, say where it is now: --data PATH") from err


def load(run_path: Path) -> Saved:
    """Read a run's newest checkpoint, and say if it is not the last word."""
    folder = RunFolder(run_path)
    saved = load_saved(folder, lambda text: click.echo(f"warning: {text}", err=True))
    if saved.finished is None:
        epochs = saved.trained.state.epoch
        click.echo(
            f"warning: the run is not finished ({epochs:,} epochs done); this is its newest checkpoint", err=True
        )
    return saved


def open_for_model(
    saved: Saved,
    data: Sequence[str],
    *,
    features: list[str] | None,
    target: list[str] | None = None,
    weight: str | None = None,
) -> Source:
    """Open data for a model: with the features it was trained on, by name where it knows names.

    Parameters
    ----------
    saved : Saved
        The run.
    data : sequence of str
        Files, folders or patterns.
    features : list of str or None
        What the user says the features are called here; None for the names of the training.
    target, weight : list of str, str or None
        As in `open_data`.
    """
    if features is None:
        features = _known_features(saved, data)
    return open_data(data, target=target, features=features, weight=weight)


def _known_features(saved: Saved, data: Sequence[str]) -> list[str] | None:
    kind, _ = data_files(list(data))
    if kind == "npy":
        return None
    of_origin = saved.origin.get("features")
    if kind == "hdf5" and saved.origin["kind"] == "hdf5" and of_origin is not None:
        return [of_origin] if isinstance(of_origin, str) else list(of_origin)  # datasets, each of several columns
    return None if saved.feature_names is None else list(saved.feature_names)


def known_target(saved: Saved) -> list[str] | None:
    """Return the name of the target as it was trained on, where it is a name."""
    found = None if saved.origin["kind"] == "memory" else saved.origin.get("target")
    return [found] if isinstance(found, str) else found


def known_weight(saved: Saved) -> str | None:
    """Return the name of the weights as trained with, where it is a name."""
    return None if saved.origin["kind"] == "memory" else saved.origin.get("weight")
