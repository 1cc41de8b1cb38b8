"""Run a fitted model over a source, slice by slice: predictions, and how good they are.

Rows come in file order and in slices of bounded size, so that neither the data nor the result is ever held whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.base import Source
from streamgd.data.targets import TargetCodec
from streamgd.errors import DataError, NonFiniteError, OptionError, SchemaError
from streamgd.learn.kernels import mean_loss
from streamgd.learn.model import PROBABILISTIC, LinearModel
from streamgd.learn.moments import Moments
from streamgd.learn.recipe import Recipe
from streamgd.run.pieces import Piece, decide, map_pieces

Array = NDArray[Any]
Floats = NDArray[np.float64]

#: What can be asked of a model.
METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function")
#: Classes up to which confusions are counted.
MOST_CONFUSED = 20
_NONE: Floats = np.zeros(0)


def predict_array(model: LinearModel, X: Array, method: str = "predict", owner: str = "the model") -> Array:
    """Predict for an array.

    Parameters
    ----------
    model : LinearModel
        What predicts.
    X : ndarray of shape (n_rows, n_features)
        Rows.
    method : {"predict", "predict_proba", "predict_log_proba", "decision_function"}, default="predict"
        What to compute.
    owner : str, default="the model"
        Who cannot take missing values, for the message.

    Returns
    -------
    ndarray of shape (n_rows,) or (n_rows, n_outputs)
        Values or labels.

    Raises
    ------
    NonFiniteError
        If a feature is NaN or infinite.
    """
    function = _function(model, method)
    decided, finite = decide(model, X, len(X))
    if not finite:
        _require_finite(X, partial(_row_of_array, 0), "number {}".format, owner)
    return function(decided)


def predict_source(model: LinearModel, source: Source, method: str = "predict") -> Iterator[Array]:
    """Predict for every row of a source, in file order.

    Parameters
    ----------
    model : LinearModel
        What predicts.
    source : Source
        Rows; a target is not needed.
    method : {"predict", "predict_proba", "predict_log_proba", "decision_function"}, default="predict"
        What to compute.

    Returns
    -------
    iterator of ndarray
        Predictions of consecutive rows, about two megabytes of data at a time.

    Raises
    ------
    SchemaError
        If the number of features is not the model's; at once, before anything is read.
    OptionError
        If the model has no probabilities; at once.
    NonFiniteError
        If a feature is NaN or infinite; when its rows are reached.
    """
    require_features(model, source)
    function = _function(model, method)

    def predicted(piece: Piece) -> Array:
        _require_finite_piece(source, piece)
        return function(piece.decided)

    def go_through() -> Iterator[Array]:
        with contextlib.closing(map_pieces(source, model, predicted)) as parts:
            yield from parts

    return go_through()


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on some rows.

    Attributes
    ----------
    n_rows : int
        Rows that were looked at.
    score : float
        R² (the mean over the targets, if several) for regression, accuracy for classification; weighted. NaN for R²
        of fewer than two rows.
    metrics : dict of str to float
        ``r2``, ``mse``, ``rmse`` and ``mae``, or ``accuracy`` and, where the loss gives probabilities, ``log_loss``;
        and ``loss``, the mean of the loss that the model was trained for, if a recipe was given.
    n_unknown : int
        Rows whose label the model does not know.
    confusion : ndarray of shape (n_classes, n_classes), or None
        Rows by true class (first axis) and predicted class, without those unknown; None for regression, and for more
        than `MOST_CONFUSED` classes.
    """

    n_rows: int
    score: float
    metrics: dict[str, float]
    n_unknown: int = 0
    confusion: NDArray[np.int64] | None = None


def evaluate(model: LinearModel, source: Source, recipe: Recipe | None = None) -> Evaluation:
    """Compare predictions with the target of every row of a source.

    Parameters
    ----------
    model : LinearModel
        What predicts.
    source : Source
        Rows with a target, and weights where it has them.
    recipe : Recipe, optional
        What the model was trained for, to have the mean of that loss too; class weights do not count in it.

    Raises
    ------
    DataError
        If the source has no target, or all weights are zero.
    SchemaError
        If features or targets are not those of the model.
    NonFiniteError
        If a feature or a target is missing or infinite.

    Notes
    -----
    Sums are kept about running means (West 1979), so that targets far from zero lose no digits. A label that the model
    does not know counts as a wrong prediction; for log_loss, as one of probability 2**-52. It has no
    place in the mean loss.
    """
    require_features(model, source)
    if source.target is None:
        raise DataError(f"{source.name}: no target to compare with. Name the target column or dataset (target=…)")
    sums = _Values(model, source) if model.classes is None else _Labels(model, source)
    loss = None if recipe is None else _Loss(model, recipe)

    def judged(piece: Piece) -> _Judged:
        _require_finite_piece(source, piece)
        return sums.judge(piece)

    n_rows = 0
    with contextlib.closing(map_pieces(source, model, judged)) as pieces:
        for piece in pieces:
            sums.add(piece)
            if loss is not None:
                loss.add(piece)
            n_rows += len(piece.y)
    if not sums.weight > 0:
        raise DataError(f"{source.name}: the sample weights are all zero: at least one row needs a weight above 0")
    metrics = sums.metrics(n_rows)
    score = next(iter(metrics.values()))
    if loss is not None:
        metrics["loss"] = loss.mean
    return Evaluation(n_rows, score, metrics, sums.n_unknown, sums.confusion)


def require_features(model: LinearModel, source: Source) -> None:
    """Refuse a source whose number of features is not the model's."""
    expected = model.coef.shape[1]
    if source.n_features != expected:
        raise SchemaError(
            f"{source.name} has {source.n_features} features, but the model is expecting {expected} features as input. "
            "Choose them with features=[…] when opening the source"
        )


class _Judged(NamedTuple):
    """Some rows: targets as numbers (a class the model does not know is -1), decisions, weights, log-probabilities."""

    y: Floats
    decided: Floats
    weight: Floats
    log_probability: Floats | None


def _weights_of(piece: Piece) -> Floats:
    """Copy the weights of a piece, or give each row one."""
    return np.ones(len(piece.decided)) if piece.weight is None else np.array(piece.weight, np.float64)


class _Values:
    """Sums behind R², for numbers."""

    n_unknown, confusion = 0, None

    def __init__(self, model: LinearModel, source: Source) -> None:
        assert source.target is not None
        n = len(model.coef)
        if not source.target.numeric:
            raise SchemaError(
                f"{source.name}: the target {source.target.name!r} holds {source.target.dtype}, but the model predicts "
                "numbers"
            )
        self._model, self._source, self._codec = model, source, TargetCodec(classes=None, n_outputs=n)
        self._targets, self._residuals = Moments(n), Moments(n)
        self._absolute = np.zeros(n)

    @property
    def weight(self) -> float:
        return self._targets.total

    def judge(self, piece: Piece) -> _Judged:
        """Compare rows with the model; called by several threads."""
        y = np.array(self._codec.encode(piece.y))
        bad = np.flatnonzero(~np.isfinite(y).all(axis=1))
        if len(bad):
            raise _missing_target(self._source, piece, int(bad[0]))
        return _Judged(y, self._model.decision_function(piece.decided), _weights_of(piece), None)

    def add(self, rows: _Judged) -> None:
        """Add rows to the sums."""
        y, decided, weight, _ = rows
        residual = y - decided.reshape(y.shape)
        self._targets.add(y, weight)
        self._residuals.add(residual, weight)
        self._absolute += weight @ np.abs(residual)

    def metrics(self, n_rows: int) -> dict[str, float]:
        bias, spread = self._residuals.merged()
        left, squares = spread + self.weight * bias**2, self._targets.merged()[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            explained = 1.0 - left / squares
        # A constant target is explained wholly or not at all.
        explained = np.where(squares > 0, explained, np.where(left > 0, 0.0, 1.0))
        return {
            "r2": float(explained.mean()) if n_rows >= 2 else float("nan"),
            "mse": float((left / self.weight).mean()),
            "rmse": float(np.sqrt(left / self.weight).mean()),
            "mae": float((self._absolute / self.weight).mean()),
        }


class _Labels:
    """Sums behind accuracy and log-loss, for classes."""

    def __init__(self, model: LinearModel, source: Source) -> None:
        assert model.classes is not None
        self._model, self._source, self._codec = model, source, TargetCodec(model.classes)
        self._probabilities = model.loss in PROBABILISTIC
        self.weight = self._right = self._loss = 0.0
        self.n_unknown = 0
        n = len(model.classes)
        self.confusion = np.zeros((n, n), np.int64) if n <= MOST_CONFUSED else None

    def judge(self, piece: Piece) -> _Judged:
        """Compare rows with the model; called by several threads."""
        codes = np.array(self._codec.look_up(piece.y)[0])
        bad = np.flatnonzero(np.isnan(codes[:, 0]))
        if len(bad):
            raise _missing_target(self._source, piece, int(bad[0]))
        of_target = None
        if self._probabilities:
            log_probabilities = self._model.predict_log_proba(piece.decided)
            of_target = log_probabilities[np.arange(len(codes)), np.maximum(codes[:, 0], 0).astype(np.intp)]
        return _Judged(codes, self._model.decision_function(piece.decided), _weights_of(piece), of_target)

    def add(self, rows: _Judged) -> None:
        """Add rows to the sums."""
        found, decided, weight, of_target = rows
        codes = found[:, 0]
        chosen = decided > 0 if decided.ndim == 1 else decided.argmax(axis=1)
        self.weight += float(weight.sum())
        self._right += float(weight[chosen == codes].sum())
        known = codes >= 0
        self.n_unknown += len(codes) - int(known.sum())
        if self.confusion is not None:
            n = len(self.confusion)
            pairs = codes[known].astype(np.intp) * n + chosen[known]
            self.confusion += np.bincount(pairs, minlength=n * n).reshape(n, n)
        if of_target is not None:
            floor = np.log(np.finfo(np.float64).eps)
            self._loss -= float(weight @ np.where(codes < 0, floor, np.maximum(of_target, floor)))

    def metrics(self, n_rows: int) -> dict[str, float]:
        found = {"accuracy": self._right / self.weight}
        return {**found, "log_loss": self._loss / self.weight} if self._probabilities else found


class _Loss:
    """The mean of the loss that a model was trained for."""

    def __init__(self, model: LinearModel, recipe: Recipe) -> None:
        n_classes = 0 if model.classes is None else len(model.classes)
        self._packed = recipe.pack(n_classes=n_classes, n_updates=1, mean_weight=1.0, moments=False)
        self._labels = n_classes > 0
        self._sum = self._weight = 0.0

    def add(self, rows: _Judged) -> None:
        """Add rows to the sum."""
        y, decided, weight, _ = rows
        decided = decided.reshape(len(y), -1)
        if self._labels and (y < 0).any():
            known = y[:, 0] >= 0
            y, weight, decided = y[known], weight[known], decided[known]
        if len(y):
            total = float(weight.sum())
            packed = self._packed
            mean = mean_loss(
                np.ascontiguousarray(y), weight, np.ascontiguousarray(decided), packed.codes, packed.params, _NONE
            )
            self._sum += float(mean) * total
            self._weight += total

    @property
    def mean(self) -> float:
        return self._sum / self._weight if self._weight > 0 else float("nan")


def _function(model: LinearModel, method: str) -> Callable[[Array], Array]:
    if method not in METHODS:
        raise OptionError(f"method={method!r}: expected one of {', '.join(map(repr, METHODS))}")
    if method.endswith("proba"):
        model.predict_proba(np.zeros((0, len(model.coef))))  # refuses here, not at the first piece
    return getattr(model, method)  # type: ignore[no-any-return]


def _require_finite_piece(source: Source, piece: Piece) -> None:
    if piece.finite:
        return
    X = piece.X if isinstance(piece.X, np.ndarray) else np.stack(list(piece.X), axis=1)
    _require_finite(X, partial(_locate, source, piece), source.feature_label, source.name)


def _row_of_array(first: int, row: int) -> str:
    return f"row {first + row:,}"


def _locate(source: Source, piece: Piece, row: int) -> str:
    return source.locate(piece.block, piece.start + row)


def _require_finite(X: Array, locate: Callable[[int], str], label: Callable[[int], str], owner: str) -> None:
    """Search for a value that is not finite, where it is known that there is one."""
    bad = np.argwhere(~np.isfinite(X))
    if len(bad):
        row, column = (int(value) for value in bad[0])
        what = "NaN" if np.isnan(X[row, column]) else "infinity or a value too large for float64"
        raise NonFiniteError(
            f"Input X contains {what}: {locate(row)}, feature {label(column)}. {owner} needs finite numbers: "
            "fill or drop such rows first"
        )


def _missing_target(source: Source, piece: Piece, row: int) -> NonFiniteError:
    assert source.target is not None
    return NonFiniteError(
        f"{source.locate(piece.block, piece.start + row)}: the target {source.target.name!r} is missing or infinite; "
        "leave such rows out"
    )
