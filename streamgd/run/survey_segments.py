"""What rows come to, in segments of them: their targets, their labels, their features.

Rows are added up one after the other within a segment, and segments are put together in order. So what comes of them
depends on the rows alone: not on blocks, nor on who looked at which segments (`streamgd.run.survey_shares`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.flat_files import iter_numbers
from streamgd.data.sources.base import Source
from streamgd.data.sources.dask_waiting import given_up
from streamgd.data.targets import ClassCounter, TargetCodec
from streamgd.data.window import Stopped
from streamgd.errors import NonFiniteError
from streamgd.learn.moments import Moments
from streamgd.run.sample import read_runs, sampling_step
from streamgd.run.sound_rows import checked_weights, require_finite

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Values:
    """What a segment of numbers comes to.

    Attributes
    ----------
    moments : Moments
        Of the targets.
    sample : ndarray of shape (n_sampled, n_targets)
        The targets of every so-and-so-many-th row of the source.
    sample_weight : ndarray of shape (n_sampled,)
        Their weights.
    """

    moments: Moments
    sample: Floats
    sample_weight: Floats


@dataclass(frozen=True)
class Labels:
    """What a segment of labels comes to: its classes, and the weight of all its rows."""

    counter: ClassCounter
    total_weight: float


def look_at_values(source: Source, start: int, stop: int, segment_rows: int) -> Iterator[Values]:
    """Look at targets that are numbers.

    Parameters
    ----------
    source : Source
        With a target.
    start, stop : int
        The first row and the one after the last; `start` begins a segment.
    segment_rows : int
        Rows of a segment.

    Yields
    ------
    Values
        Of each segment.

    Raises
    ------
    NonFiniteError
        For NaN, infinity or null in a target or weight.
    """
    assert source.target is not None
    n_targets = source.target.n_outputs
    step = sampling_step(source.n_rows, n_targets)
    codec, what = TargetCodec(classes=None, n_outputs=n_targets), f"target {source.target.name!r}"
    pieces = iter_numbers(source, codec, start, stop) or source.iter_targets(start, stop)
    with _segments(pieces, segment_rows) as segments:
        for segment in segments:
            moments = Moments(n_targets)
            sample, sample_weight = [], []
            for first, y, weight in segment:
                values = codec.encode(y)
                if weight is not None:  # moments do not show what is wrong where it is zero
                    require_finite(source, first, values, what)
                weights = checked_weights(source, first, weight)
                moments.add(values, weights)
                if not moments.finite:
                    require_finite(source, first, values, what)
                sampled = values[-first % step :: step]
                sample.append(sampled.copy())
                sample_weight.append(weights[-first % step :: step].copy() if weights.size else np.ones(len(sampled)))
            yield Values(moments, np.concatenate(sample), np.concatenate(sample_weight))


def look_at_labels(source: Source, start: int, stop: int, segment_rows: int) -> Iterator[Labels]:
    """Look at the labels of a classification; see `look_at_values`.

    Raises
    ------
    NonFiniteError
        For labels that are missing, and for weights that are not finite or negative.
    DataError
        For labels that cannot be classes.
    """
    assert source.target is not None
    with _segments(source.iter_targets(start, stop), segment_rows) as segments:
        for segment in segments:
            counter, total = ClassCounter(), 0.0
            for first, y, weight in segment:
                weights = checked_weights(source, first, weight)
                bad = counter.add(y, weights if weights.size else None)
                if bad is not None:
                    raise NonFiniteError(
                        f"{source.locate_row(first + bad)}: the target {source.target.name!r} is missing (NaN or "
                        "null): drop such rows, or give them a class of their own"
                    )
                # Added one after the other, so that the sum does not depend on where pieces end.
                total = float(np.cumsum(np.concatenate([[total], weights]))[-1]) if weights.size else total + len(y)
            yield Labels(counter, total)


def look_at_features(
    source: Source, start: int, stop: int, segment_rows: int, *, buffer_bytes: int
) -> Iterator[Moments]:
    """Look at all features; see `look_at_values`.

    Parameters
    ----------
    buffer_bytes : int
        The run's buffer, of which reading side by side takes a part.

    Yields
    ------
    Moments
        Of each segment.

    Raises
    ------
    NonFiniteError
        For NaN, infinity or null in a feature or weight.
    Stopped
        If somebody gave up.
    """
    left = given_up.get()
    runs = [(block, first, end - first) for block, first, end in source.blocks_of(start, stop)]
    with _segments(read_runs(source, runs, buffer_bytes), segment_rows) as segments:
        for segment in segments:
            moments = Moments(source.n_features)
            for first, X, weight in segment:
                if left is not None and left.is_set():
                    raise Stopped
                require_finite(source, first, X, None)
                moments.add(X, checked_weights(source, first, weight))
            yield moments


@contextlib.contextmanager
def _segments(
    pieces: Iterator[tuple[int, Any, Any]], segment_rows: int
) -> Iterator[Iterator[Iterator[tuple[int, Any, Any]]]]:
    """Give the pieces of each segment, cut where segments end.

    Pieces are closed at the end: an error's traceback holds them, and with them what they have under way.
    """

    def cut() -> Iterator[tuple[int, tuple[int, Any, Any]]]:
        for first, values, weight in pieces:
            done = 0
            while done < len(values):
                segment, at = divmod(first + done, segment_rows)
                end = min(len(values), done + segment_rows - at)
                yield segment, (first + done, values[done:end], None if weight is None else weight[done:end])
                done = end

    try:
        yield ((piece for _, piece in segment) for _, segment in groupby(cut(), key=itemgetter(0)))
    finally:
        if isinstance(pieces, Generator):
            pieces.close()
