"""From paths and names to sources: for training, for resuming, and for a model that is already there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamgd.data.sources import open_source
from streamgd.data.sources.base import Source
from streamgd.data.sources.files import data_files
from streamgd.errors import ResumeError, SourceNotFoundError
from streamgd.run.session import Saved


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


def reopen(described: dict[str, Any], data: Sequence[str]) -> Source:
    """Open the data of a run again.

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
    origin = described["origin"]
    if "data" not in origin:
        raise ResumeError(
            f"the run was trained on {origin['kind']} data that only Python has: resume it there, with "
            "fit(…, resume=True)"
        )
    found: Any = list(data) if len(data) > 1 else data[0] if data else origin["data"]
    try:
        return open_source(
            found,
            origin["target"],
            features=origin["features"],
            weight=origin["weight"],
            dtype=described["row_dtype"],
        )
    except SourceNotFoundError as err:
        if data:
            raise
        raise SourceNotFoundError(f"{err}. If the data was moved, say where it is now: --data PATH") from err


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
    of_origin = saved.origin.get("features")
    if kind == "hdf5" and saved.origin["kind"] == "hdf5" and of_origin is not None:
        return [of_origin] if isinstance(of_origin, str) else list(of_origin)  # datasets, each of several columns
    return None if saved.feature_names is None else list(saved.feature_names)
