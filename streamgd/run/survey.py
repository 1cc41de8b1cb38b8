"""What must be known before the first update: classes, the target's mean, the features' scale.

Two short looks at the data, independent of windows, threads and lanes. The first is a pass over the target and weight
columns alone. The second reads a sample of rows, at least 65,536 where there are as many: runs of rows from the heads
of up to 64 blocks spread evenly over the source (fewer where opening a block decodes much more than the run), all rows
of a smaller source. Moments do not depend on where blocks end, see `streamgd.learn.moments`.
"""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.flat_files import iter_numbers
from streamgd.data.rows import RowPlacer
from streamgd.data.sources.base import BlockReader, Source
from streamgd.data.targets import ClassCounter, TargetCodec
from streamgd.errors import DataError, NonFiniteError, OptionError, SchemaError
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

Floats = NDArray[np.float64]

#: Rows of the sample, and the most blocks it is taken from.
SAMPLE_ROWS, SAMPLE_BLOCKS = 65_536, 64
#: More classes than these are no classes if some of them are numbers with fractions.
_MOST_FRACTIONAL = 100
#: Blocks of the sample that are read side by side, if together they take no more than so many bytes.
_READ_AHEAD, _READ_AHEAD_BYTES = 2, 1 << 24
_EMPTY: Floats = np.zeros(0)


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
    factors = _class_factors(config.class_weight, targets)
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


def _look(source: Source, config: Config, classes: NDArray[Any] | None) -> tuple[_Targets, tuple[Scaling, int]]:
    """Look at the targets and at the features, side by side where reading takes a while."""

    def targets() -> _Targets:
        classify = config.recipe.task == "classification"
        return _survey_classes(source, classes) if classify else _survey_values(source)

    def features() -> tuple[Scaling, int]:
        if not config.standardize:
            return Scaling.identity(source.n_features), 0
        everything = config.standardize == "full"
        return _survey_features(source, config, everything=everything)

    if source.kind == "memory" or not config.standardize:
        return targets(), features()
    with ThreadPoolExecutor(1, "streamgd-survey") as pool:
        # In this thread's context, which names the Dask client to use.
        sampled = pool.submit(contextvars.copy_context().run, features)
        found = targets()  # what is wrong with the target is said first, whoever is faster
        return found, sampled.result()


@dataclass(frozen=True)
class _Targets:
    """What the pass over target and weight found; `sample` stands for the distribution of the target."""

    codec: TargetCodec
    mean: Floats
    variance: Floats
    class_counts: Floats
    class_weights: Floats
    mean_weight: float
    sample: Floats
    sample_weight: Floats


def _survey_values(source: Source) -> _Targets:
    assert source.target is not None
    if not source.target.numeric:
        raise SchemaError(
            f"{source.name}: the target {source.target.name!r} holds {source.target.dtype}, which regression cannot "
            "fit: choose a numeric target, or train a classification"
        )
    n_targets = source.target.n_outputs
    codec = TargetCodec(classes=None, n_outputs=n_targets)
    moments, what = Moments(n_targets), f"target {source.target.name!r}"
    step = source.n_rows // SAMPLE_ROWS + 1
    sample, sample_weight = [], []
    for first, y, weight in iter_numbers(source, codec) or source.iter_targets():
        values = codec.encode(y)
        if weight is not None:  # moments do not show what is wrong where it is zero
            _require_finite(source, first, values, what)
        weights = _checked_weights(source, first, weight)
        moments.add(values, weights)
        if not moments.finite:
            _require_finite(source, first, values, what)
        sampled = values[-first % step :: step]
        sample.append(sampled.copy())
        sample_weight.append(weights[-first % step :: step].copy() if weights.size else np.ones(len(sampled)))
    _require_weight(source, moments.total)
    mean, squares = moments.merged()
    return _Targets(
        codec=codec,
        mean=mean,
        variance=squares / moments.total,
        class_counts=_EMPTY,
        class_weights=_EMPTY,
        mean_weight=moments.total / source.n_rows,
        sample=np.concatenate(sample),
        sample_weight=np.concatenate(sample_weight),
    )


def _survey_classes(source: Source, classes: NDArray[Any] | None) -> _Targets:
    assert source.target is not None
    if source.target.n_outputs != 1:
        raise SchemaError(
            f"{source.name}: the target {source.target.name!r} has {source.target.n_outputs} columns; a "
            "classification takes one column of labels"
        )
    counter = ClassCounter()
    total = 0.0
    for first, y, weight in source.iter_targets():
        weights = _checked_weights(source, first, weight)
        bad = counter.add(y, weights if weights.size else None)
        if bad is not None:
            raise NonFiniteError(
                f"{source.locate_row(first + bad)}: the target {source.target.name!r} is missing (NaN or null): "
                "drop such rows, or give them a class of their own"
            )
        # Added one after the other, so that the sum does not depend on where pieces end.
        total = float(np.cumsum(np.concatenate([[total], weights]))[-1]) if weights.size else total + len(y)
    _require_weight(source, total)
    found = counter.classes
    _require_labels(source, found)
    codec = TargetCodec(found) if classes is None else TargetCodec.of_classes(classes)
    assert codec.classes is not None
    known = codec.classes
    if len(known) < 2:
        raise DataError(
            f"{source.name}: the number of classes has to be greater than one; got {len(known)} class "
            f"({known.tolist()[0]!r}) in the target {source.target.name!r}"
        )
    codes, unknown = codec.look_up(found)
    if unknown >= 0:
        raise codec.unknown_class(found, unknown, source.name)
    at = codes[:, 0].astype(np.intp)
    counts, sums = np.zeros(len(known)), np.zeros(len(known))
    counts[at], sums[at] = counter.counts, counter.weight_sums
    return _Targets(
        codec=codec,
        mean=np.zeros(1),
        variance=np.ones(1),
        class_counts=counts,
        class_weights=sums,
        mean_weight=total / source.n_rows,
        sample=np.arange(len(known), dtype=np.float64)[:, None],
        sample_weight=sums,
    )


def _require_labels(source: Source, classes: NDArray[Any]) -> None:
    """Refuse a column of measurements, for which as many classes as it has values would be trained, without an end."""
    if classes.dtype.kind != "f" or len(classes) <= _MOST_FRACTIONAL:
        return
    odd = classes[classes != np.floor(classes)]
    if len(odd):
        assert source.target is not None
        raise DataError(
            f"{source.name}: unknown label type: continuous. The target {source.target.name!r} holds {odd[0]} and "
            f"{len(classes) - 1:,} other values: classes are whole numbers or names. To predict numbers, train a "
            "regression"
        )


def _class_factors(class_weight: dict[Any, float] | str | None, targets: _Targets) -> Floats:
    classes = targets.codec.classes
    if class_weight is None or classes is None:
        return _EMPTY
    if isinstance(class_weight, str):
        weights = targets.class_weights
        if not (weights > 0).all():
            raise OptionError("class_weight='balanced' needs every class in the data of the first fit")
        return np.asarray(weights.sum() / (len(weights) * weights))
    known = {label: index for index, label in enumerate(classes.tolist())}
    factors = np.ones(len(classes))
    for label, factor in class_weight.items():
        key = label.item() if isinstance(label, np.generic) else label
        if key not in known:
            raise OptionError(f"class_weight names the class {key!r}, which the target does not have: {list(known)}")
        if not (isinstance(factor, Real) and np.isfinite(float(factor)) and factor >= 0):
            raise OptionError(f"class_weight of {key!r} is {factor!r}: expected a finite number of at least 0")
        factors[known[key]] = factor
    return factors


def _survey_features(source: Source, config: Config, *, everything: bool) -> tuple[Scaling, int]:
    moments = Moments(source.n_features)
    n_rows = 0
    runs = [(block, n) for block, _, n in sample_runs(source, everything=everything)]
    for first, X, weight in _sampled(source, runs, config.buffer_bytes):
        _require_finite(source, first, X, None)
        moments.add(X, _checked_weights(source, first, weight))
        n_rows += len(X)
    if moments.total <= 0:  # the sample happens to have no weight at all
        return Scaling.identity(source.n_features), n_rows
    mean, squares = moments.merged()
    variance = squares / moments.total
    if not config.recipe.fit_intercept:
        # Without an intercept there is nothing to take a shift back with: scale by the size around zero.
        mean, variance = np.zeros_like(mean), variance + mean**2
    return Scaling.from_moments(mean, variance), n_rows


def _sampled(source: Source, runs: Sequence[tuple[int, int]], buffer_bytes: int) -> Iterator[tuple[int, Floats, Any]]:
    """Yield (first row, features, weights) of pieces of the sample, in order, read side by side if there is room."""
    offsets = np.cumsum(source.block_rows) - source.block_rows
    placer = RowPlacer(source, None, None, None, check=False)
    piece = max(1, (1 << 22) // (8 * source.n_features))

    def read(block: int, reader: BlockReader, done: int, n: int) -> tuple[int, Floats, Any]:
        rows, X = reader.read(n), np.empty((n, source.n_features))
        placer.place_features(rows.X, np.arange(n, dtype=np.int32), X, block)
        return int(offsets[block]) + done, X, rows.weight

    def read_head(block: int, n: int) -> tuple[int, Floats, Any]:
        with source.open_block(block, piece_rows=n) as reader:
            first, X, weight = read(block, reader, 0, n)
            return first, X, None if weight is None else np.array(weight)  # it may be the reader's own

    most = max(n for _, n in runs)
    needed = _READ_AHEAD * (source.open_block_bytes + 2 * most * 8 * source.n_features)  # as stored, and as numbers
    room = min(_READ_AHEAD_BYTES, buffer_bytes // 2)
    simple = source.kind in ("dask", "memory") or len(runs) == 1  # Dask computes blocks ahead in its own way
    if simple or most > piece or needed > room:
        for (block, n), opened in zip(runs, source.open_heads(runs, piece_rows=piece), strict=True):
            with opened as reader:
                for done in range(0, n, piece):
                    yield read(block, reader, done, min(piece, n - done))
        return
    with ThreadPoolExecutor(_READ_AHEAD, "streamgd-survey") as pool:
        ahead: deque[Future[tuple[int, Floats, Any]]] = deque()
        try:
            for block, n in runs:
                ahead.append(pool.submit(read_head, block, n))
                if len(ahead) > _READ_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def sample_runs(source: Source, *, everything: bool = False) -> Iterator[tuple[int, int, int]]:
    """Yield (block, start, n_rows) of the rows to sample: a pure function of the source's metadata."""
    n_rows = source.n_rows
    if everything or n_rows <= SAMPLE_ROWS:
        for block, rows in enumerate(source.block_rows):
            yield block, 0, int(rows)
        return
    affordable = n_rows // 16 // max(1, source.slice_cost_rows)
    n_blocks = min(source.n_blocks, SAMPLE_BLOCKS, max(4, affordable))
    heads = [round(i * source.n_blocks / n_blocks) for i in range(n_blocks)] + [source.n_blocks]
    stretch_rows = np.add.reduceat(source.block_rows, heads[:-1])
    for i, left in enumerate(_divide(SAMPLE_ROWS, stretch_rows)):
        for block in range(heads[i], heads[i + 1]):
            n = min(left, int(source.block_rows[block]))
            if n == 0:
                break
            yield block, 0, n
            left -= n


def _divide(wanted: int, available: NDArray[np.int64]) -> list[int]:
    """Divide a number among stretches, as evenly as they bear it: what small ones cannot give, the others do."""
    shares = [0] * len(available)
    for n_before, i in enumerate(np.argsort(available, kind="stable").tolist()):
        shares[i] = min(int(available[i]), -(-wanted // (len(available) - n_before)))
        wanted -= shares[i]
    return shares


def _checked_weights(source: Source, first: int, weight: Any) -> Floats:
    if weight is None:
        return _EMPTY
    weights = np.ascontiguousarray(weight, np.float64)
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise NonFiniteError(
            f"{source.locate_row(first + int(bad[0]))}: the weight is {weights[bad[0]]}; weights must be finite and "
            "not negative"
        )
    return weights


def _require_finite(source: Source, first: int, values: Floats, what: str | None) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        named = what or f"feature {source.feature_label(int(column))}"
        value = "NaN" if np.isnan(values[row, column]) else values[row, column]
        raise NonFiniteError(
            f"{source.locate_row(first + int(row))}: {named} is {value}; expected a finite number. "
            "Drop or fill such rows before training"
        )


def _require_weight(source: Source, total: float) -> None:
    if not total > 0:
        raise DataError(f"{source.name}: the sample weights are all zero: at least one row needs a weight above 0")


def _quantile(values: Floats, weight: Floats, share: float) -> float:
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weight[order])
    return float(values[order][min(np.searchsorted(reached, share * reached[-1]), len(values) - 1)])
