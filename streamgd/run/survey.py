"""What must be known before the first update: classes, the target's mean, the features' scale.

Two looks at the data, independent of windows, threads and lanes: a pass over the target and weight columns alone
(`streamgd.run.survey_targets`), and one over a sample of rows (`streamgd.run.sample`), or over all if that is wanted.
Moments do not depend on where blocks end, see `streamgd.learn.moments`.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.base import Source
from streamgd.data.sources.dask_waiting import given_up
from streamgd.data.targets import TargetCodec
from streamgd.errors import DataError
from streamgd.learn.kernels import (
    EPSILON_INSENSITIVE,
    HUBER,
    QUANTILE,
    SQUARED_ERROR,
    mean_loss,
)
from streamgd.learn.losses import start_intercept
from streamgd.learn.moments import Moments
from streamgd.learn.scaling import Scaling
from streamgd.run.config import Config
from streamgd.run.sample import read_runs, sample_runs
from streamgd.run.sound_rows import checked_weights, require_finite
from streamgd.run.survey_segments import look_at_features
from streamgd.run.survey_shares import looked_at
from streamgd.run.survey_targets import Targets, class_factors_of, survey_classes, survey_values

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Survey:
    """What the survey found; stored in every checkpoint and never taken again.

    Attributes
    ----------
    codec : TargetCodec
        How targets become numbers.
    scaling : Scaling
        The features' means and scales.
    target_mean, target_scale : ndarray of shape (n_targets,)
        Weighted mean and standard deviation of each target (regression; 0 and 1 for classes).
    class_counts, class_weights : ndarray of shape (n_classes,)
        Rows and weight of each class.
    class_factors : ndarray of shape (n_classes,) or (0,)
        What `class_weight` amounts to.
    start : ndarray of shape (n_outputs,)
        Where the intercepts start.
    mean_weight : float
        Mean sample weight.
    null_loss : float
        Mean loss of the best constant prediction.
    n_sampled : int
        Rows behind `scaling`.
    """

    codec: TargetCodec
    scaling: Scaling
    target_mean: Floats
    target_scale: Floats
    class_counts: Floats
    class_weights: Floats
    class_factors: Floats
    start: Floats
    mean_weight: float
    null_loss: float
    n_sampled: int

    @property
    def n_classes(self) -> int:
        """Number of classes; 0 for regression."""
        return 0 if self.codec.classes is None else len(self.codec.classes)

    def output_scale(self) -> Floats:
        """Return the unit of each prediction, by which the default optimizer's steps are measured."""
        return self.target_scale if self.n_classes == 0 else np.ones(len(self.start))

    _ARRAYS = ("target_mean", "target_scale", "class_counts", "class_weights", "class_factors", "start")

    def to_tensors(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        arrays: dict[str, NDArray[Any]] = {f"survey.{name}": getattr(self, name) for name in self._ARRAYS}
        return {**arrays, "survey.mean": self.scaling.mean, "survey.scale": self.scaling.scale}

    def to_json(self) -> dict[str, Any]:
        """Return what is not an array."""
        return {
            "codec": self.codec.to_json(),
            "mean_weight": self.mean_weight,
            "null_loss": self.null_loss,
            "n_sampled": self.n_sampled,
        }

    @classmethod
    def restore(cls, tensors: dict[str, NDArray[Any]], values: dict[str, Any]) -> Survey:
        """Undo `to_tensors` and `to_json`."""
        return cls(
            codec=TargetCodec.from_json(values["codec"]),
            scaling=Scaling(tensors["survey.mean"], tensors["survey.scale"]),
            mean_weight=values["mean_weight"],
            null_loss=values["null_loss"],
            n_sampled=values["n_sampled"],
            **{name: tensors[f"survey.{name}"] for name in cls._ARRAYS},
        )


def take_survey(source: Source, config: Config, *, classes: NDArray[Any] | None = None) -> Survey:
    """Look at the data.

    Parameters
    ----------
    source : Source
        With a target.
    config : Config
        What is to be learnt.
    classes : ndarray, optional
        The classes, in any order, where they are known beforehand; labels outside them are an error.

    Raises
    ------
    NonFiniteError
        For NaN, infinity or null in the target, the weights or the sampled features.
    DataError
        If the target cannot serve the task, or all weights are zero.
    """
    if source.target is None:
        raise DataError(f"{source.name}: no target was given. Name the target column or dataset (target=…)")
    targets, (scaling, n_sampled) = _look(source, config, classes)
    factors = class_factors_of(config.class_weight, targets)
    recipe = config.recipe
    loss = recipe.the_loss
    n_classes = 0 if targets.codec.classes is None else len(targets.codec.classes)
    if config.starts_at_zero or not recipe.fit_intercept:
        start = np.zeros(recipe.n_outputs(targets.codec.n_outputs, n_classes))
    elif loss.code in (QUANTILE, EPSILON_INSENSITIVE, HUBER):
        share = recipe.quantile if loss.code == QUANTILE else 0.5
        start = np.array([_quantile(column, targets.sample_weight, share) for column in targets.sample.T])
    else:
        start = start_intercept(loss, targets.mean, targets.class_weights * (factors if factors.size else 1.0))
    packed = recipe.pack(n_classes=n_classes, n_updates=1, mean_weight=1.0, moments=False)
    if loss.code == SQUARED_ERROR and not config.starts_at_zero and recipe.fit_intercept:
        null_loss = float(0.5 * targets.variance.mean())
    else:
        null_loss = float(
            mean_loss(targets.sample, targets.sample_weight, start[None, :], packed.codes, packed.params, factors)
        )
    deviation = np.sqrt(targets.variance)
    return Survey(
        codec=targets.codec,
        scaling=scaling,
        target_mean=targets.mean,
        target_scale=np.where(deviation > 0, deviation, 1.0),
        class_counts=targets.class_counts,
        class_weights=targets.class_weights,
        class_factors=factors,
        start=start,
        mean_weight=targets.mean_weight,
        null_loss=null_loss,
        n_sampled=n_sampled,
    )


def _look(source: Source, config: Config, classes: NDArray[Any] | None) -> tuple[Targets, tuple[Scaling, int]]:
    """Look at the targets and at the features, side by side where reading takes a while."""

    def targets() -> Targets:
        classify = config.recipe.task == "classification"
        return survey_classes(source, classes) if classify else survey_values(source)

    def features() -> tuple[Scaling, int]:
        if not config.standardize:
            return Scaling.identity(source.n_features), 0
        return _survey_features(source, config)

    if source.kind == "memory" or not config.standardize:
        return targets(), features()
    with ThreadPoolExecutor(1, "streamgd-survey") as pool:
        # In this thread's context, which names the Dask client to use.
        context, left = contextvars.copy_context(), threading.Event()
        context.run(given_up.set, left)
        sampled = pool.submit(context.run, features)
        try:
            found = targets()  # what is wrong with the target is said first, whoever is faster
            return found, sampled.result()
        except BaseException:
            left.set()  # else it would be waited for
            raise


def _survey_features(source: Source, config: Config) -> tuple[Scaling, int]:
    moments = Moments(source.n_features)
    n_rows = 0
    if config.standardize == "full":
        look = partial(look_at_features, buffer_bytes=config.buffer_bytes)
        with contextlib.closing(looked_at(source, look)) as segments:
            for segment in segments:
                moments = moments.joined(segment)
        n_rows = source.n_rows
    else:
        for first, X, weight in read_runs(source, list(sample_runs(source)), config.buffer_bytes):
            require_finite(source, first, X, None)
            moments.add(X, checked_weights(source, first, weight))
            n_rows += len(X)
    if moments.total <= 0:  # the sample happens to have no weight at all
        return Scaling.identity(source.n_features), n_rows
    mean, squares = moments.merged()
    variance = squares / moments.total
    if not config.recipe.fit_intercept:
        # Without an intercept there is nothing to take a shift back with: scale by the size around zero.
        mean, variance = np.zeros_like(mean), variance + mean**2
    return Scaling.from_moments(mean, variance), n_rows


def _quantile(values: Floats, weight: Floats, share: float) -> float:
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weight[order])
    return float(values[order][min(np.searchsorted(reached, share * reached[-1]), len(values) - 1)])
