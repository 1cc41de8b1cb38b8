"""The survey's pass over the target and weight columns: what there is to predict, and how it is distributed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.base import Source
from streamgd.data.targets import ClassCounter, TargetCodec
from streamgd.errors import DataError, OptionError, SchemaError
from streamgd.learn.moments import Moments
from streamgd.run.survey_segments import look_at_labels, look_at_values
from streamgd.run.survey_shares import looked_at

Floats = NDArray[np.float64]

#: More classes than these are no classes if some of them are numbers with fractions.
_MOST_FRACTIONAL = 100
#: Letters of all classes together; a checkpoint's header holds them.
_MOST_LETTERS = 16_000_000
_EMPTY: Floats = np.zeros(0)


@dataclass(frozen=True)
class Targets:
    """What the pass over target and weight found; `sample` stands for the distribution of the target."""

    codec: TargetCodec
    mean: Floats
    variance: Floats
    class_counts: Floats
    class_weights: Floats
    mean_weight: float
    sample: Floats
    sample_weight: Floats


def survey_values(source: Source) -> Targets:
    """Look at the targets of a regression.

    Raises
    ------
    SchemaError
        If they are no numbers.
    NonFiniteError
        For NaN, infinity or null in a target or weight.
    DataError
        If all weights are zero.
    """
    assert source.target is not None
    if not source.target.numeric:
        raise SchemaError(
            f"{source.name}: the target {source.target.name!r} holds {source.target.dtype}, which regression cannot "
            "fit: choose a numeric target, or train a classification"
        )
    moments, sample, sample_weight = Moments(source.target.n_outputs), [], []
    with contextlib.closing(looked_at(source, look_at_values)) as segments:
        for segment in segments:
            moments = moments.joined(segment.moments)
            sample.append(segment.sample)
            sample_weight.append(segment.sample_weight)
    _require_weight(source, moments.total)
    mean, squares = moments.merged()
    return Targets(
        codec=TargetCodec(classes=None, n_outputs=source.target.n_outputs),
        mean=mean,
        variance=squares / moments.total,
        class_counts=_EMPTY,
        class_weights=_EMPTY,
        mean_weight=moments.total / source.n_rows,
        sample=np.concatenate(sample),
        sample_weight=np.concatenate(sample_weight),
    )


def survey_classes(source: Source, classes: NDArray[Any] | None) -> Targets:
    """Look at the labels of a classification.

    Parameters
    ----------
    source : Source
        With a target.
    classes : ndarray or None
        The classes where they are known beforehand.

    Raises
    ------
    SchemaError
        If the target has several columns.
    NonFiniteError
        For labels that are missing, and for weights that are not finite or negative.
    DataError
        For a single class, labels outside `classes`, measurements in place of labels, or weights that are all zero.
    """
    assert source.target is not None
    if source.target.n_outputs != 1:
        raise SchemaError(
            f"{source.name}: the target {source.target.name!r} has {source.target.n_outputs} columns; a "
            "classification takes one column of labels"
        )
    counter, total = ClassCounter(), 0.0
    with contextlib.closing(looked_at(source, look_at_labels)) as segments:
        for segment in segments:
            counter.join(segment.counter)
            total += segment.total_weight
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
    return Targets(
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
    """Refuse a column of measurements, for which as many classes as it has values would be trained, without an end.

    And one of texts that no checkpoint has room for.
    """
    if classes.dtype.kind == "O":
        n_letters = sum(len(label) for label in classes.tolist() if isinstance(label, str | bytes))
        if n_letters > _MOST_LETTERS:
            assert source.target is not None
            raise DataError(
                f"{source.name}: the {len(classes):,} classes of the target {source.target.name!r} have {n_letters:,} "
                f"letters together, and {_MOST_LETTERS:,} are the most: give them shorter names, such as numbers"
            )
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


def class_factors_of(class_weight: dict[Any, float] | str | None, targets: Targets) -> Floats:
    """Return by how much each class's weights are multiplied; of shape (0,) if by nothing.

    Raises
    ------
    OptionError
        If `class_weight` names classes that there are not and not all that there are, or if no row has one of the
        classes to balance.
    """
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
    for key, factor in class_weight.items():
        if key in known:
            factors[known[key]] = factor
        elif not known.keys() <= class_weight.keys():  # else rows of it may be elsewhere, as in folds
            raise OptionError(f"class_weight names the class {key!r}, which the target does not have: {list(known)}")
    return factors


def require_weight(source: Source) -> None:
    """Refuse rows of which none has any weight, where they are not surveyed: rows in memory, as of `partial_fit`.

    Raises
    ------
    DataError
        If all weights are zero.
    """
    if source.kind == "memory" and source.has_weight:
        _require_weight(
            source, float(any(weight.any() for _, _, weight in source.iter_targets() if weight is not None))
        )


def _require_weight(source: Source, total: float) -> None:
    if not total > 0:
        raise DataError(f"{source.name}: the sample weights are all zero: at least one row needs a weight above 0")
