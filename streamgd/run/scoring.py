"""Run a fitted model over a source, slice by slice: predictions, and how good they are.

Rows come in file order and in slices of bounded size, so that neither the data nor the result is ever held whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.base import Source
from streamgd.data.targets import TargetCodec
from streamgd.errors import DataError, NonFiniteError, OptionError, SchemaError
from streamgd.learn.kernels import add_moments
from streamgd.learn.model import PROBABILISTIC, LinearModel

Array = NDArray[Any]
Floats = NDArray[np.float64]

#: What can be asked of a model.
METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function")
#: Bytes of a slice as float64, features and outputs together.
_SLICE_BYTES = 4 << 20
#: Blocks that a source which computes is told of ahead of time, the one being read included.
_AHEAD = 3


class Piece(NamedTuple):
    """Consecutive rows of one block.

    Attributes
    ----------
    block, start : int
        Where they lie.
    X : ndarray of shape (n_rows, n_features)
        Features as stored, a common dtype for columns of several.
    y : ndarray, pyarrow.Array or None
        The target as stored.
    weight : ndarray of shape (n_rows,), or None
        Sample weights.
    """

    block: int
    start: int
    X: Array
    y: Any
    weight: Array | None


def iter_pieces(source: Source, n_outputs: int = 1) -> Generator[Piece, None, None]:
    """Read a source in file order, a few megabytes at a time.

    Parameters
    ----------
    source : Source
        What to read. Its handles are released when the iterator ends or is dropped.
    n_outputs : int, default=1
        Columns of what is computed for each row, which count towards the size of a piece.

    Yields
    ------
    Piece
        Valid until the next one is asked for.
    """
    most = max(1, _SLICE_BYTES // (8 * (source.n_features + n_outputs)))
    try:
        for block, n_rows in enumerate(source.block_rows.tolist()):
            source.announce(range(block, min(block + _AHEAD, source.n_blocks)))
            n = min(most, n_rows)
            with source.open_block(block, piece_rows=n) as reader:
                for start in range(0, n_rows, n):
                    rows = reader.read(min(n, n_rows - start))
                    X = rows.X if isinstance(rows.X, np.ndarray) else np.stack(list(rows.X), axis=1)
                    yield Piece(block, start, X, rows.y, rows.weight)
    finally:
        source.close()


def predict_array(model: LinearModel, X: Array, method: str = "predict", owner: str = "the model") -> Array:
    """Predict for an array.

    Parameters
    ----------
    model : LinearModel
        What predicts.
    X : ndarray of shape (n_rows, n_features)
        Rows; converted to float64 a few megabytes at a time.
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
    most = max(1, _SLICE_BYTES // (8 * X.shape[1]))
    function = _function(model, method)
    parts = []
    for first in range(0, max(len(X), 1), most):
        rows = X[first : first + most]
        _require_finite(rows, partial(_row_of_array, first), "number {}".format, owner)
        parts.append(function(rows))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


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
        Predictions of consecutive rows, a few megabytes of data at a time.

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

    def go_through() -> Iterator[Array]:
        with contextlib.closing(iter_pieces(source, len(model.coef))) as pieces:
            for piece in pieces:
                _require_finite_piece(source, piece)
                yield function(piece.X)

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
        ``r2``, ``rmse`` and ``mae``, or ``accuracy`` and, where the loss gives probabilities, ``log_loss``.
    """

    n_rows: int
    score: float
    metrics: dict[str, float]


def evaluate(model: LinearModel, source: Source) -> Evaluation:
    """Compare predictions with the target of every row of a source.

    Parameters
    ----------
    model : LinearModel
        What predicts.
    source : Source
        Rows with a target, and weights where it has them.

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
    does not know counts as a wrong prediction; for log_loss, as one of probability 2**-52.
    """
    require_features(model, source)
    if source.target is None:
        raise DataError(f"{source.name}: no target to compare with. Name the target column or dataset (target=…)")
    sums = _Values(model, source) if model.classes is None else _Labels(model, source)
    n_rows = 0
    with contextlib.closing(iter_pieces(source, len(model.coef))) as pieces:
        for piece in pieces:
            weight = np.ones(len(piece.X)) if piece.weight is None else np.ascontiguousarray(piece.weight, np.float64)
            _require_finite_piece(source, piece)
            sums.add(piece, weight)
            n_rows += len(piece.X)
    if not sums.weight > 0:
        raise DataError(f"{source.name}: the sample weights sum to {sums.weight}: at least one row needs one above 0")
    metrics = sums.metrics(n_rows)
    return Evaluation(n_rows, next(iter(metrics.values())), metrics)


def require_features(model: LinearModel, source: Source) -> None:
    """Refuse a source whose number of features is not the model's."""
    expected = model.coef.shape[1]
    if source.n_features != expected:
        raise SchemaError(
            f"{source.name} has {source.n_features} features, but the model is expecting {expected} features as input. "
            "Choose them with features=[…] when opening the source"
        )


class _Values:
    """Sums behind R², for numbers."""

    def __init__(self, model: LinearModel, source: Source) -> None:
        assert source.target is not None
        n = len(model.coef)
        if not source.target.numeric:
            raise SchemaError(
                f"{source.name}: the target {source.target.name!r} holds {source.target.dtype}, but the model predicts "
                "numbers"
            )
        self._model, self._source, self._codec = model, source, TargetCodec(classes=None, n_outputs=n)
        self._mean, self._squares, self._total = np.zeros(n), np.zeros(n), np.zeros(1)
        self._residual_mean, self._residual_squares, self._residual_total = np.zeros(n), np.zeros(n), np.zeros(1)
        self._absolute = np.zeros(n)

    @property
    def weight(self) -> float:
        return float(self._total[0])

    def add(self, piece: Piece, weight: Floats) -> None:
        y = self._codec.encode(piece.y)
        bad = np.flatnonzero(~np.isfinite(y).all(axis=1))
        if len(bad):
            raise _missing_target(self._source, piece, int(bad[0]))
        decided = self._model.decision_function(piece.X)
        residual = y - decided.reshape(y.shape)
        add_moments(y, weight, self._mean, self._squares, self._total)
        add_moments(residual, weight, self._residual_mean, self._residual_squares, self._residual_total)
        self._absolute += weight @ np.abs(residual)

    def metrics(self, n_rows: int) -> dict[str, float]:
        left = self._residual_squares + self.weight * self._residual_mean**2
        with np.errstate(divide="ignore", invalid="ignore"):
            explained = 1.0 - left / self._squares
        # A constant target is explained wholly or not at all.
        explained = np.where(self._squares > 0, explained, np.where(left > 0, 0.0, 1.0))
        return {
            "r2": float(explained.mean()) if n_rows >= 2 else float("nan"),
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

    def add(self, piece: Piece, weight: Floats) -> None:
        codes, _ = self._codec.look_up(piece.y)
        codes = codes[:, 0]
        bad = np.flatnonzero(np.isnan(codes))
        if len(bad):
            raise _missing_target(self._source, piece, int(bad[0]))
        decided = self._model.decision_function(piece.X)
        chosen = decided > 0 if decided.ndim == 1 else decided.argmax(axis=1)
        self.weight += float(weight.sum())
        self._right += float(weight[chosen == codes].sum())
        if self._probabilities:
            log_probabilities = self._model.predict_log_proba(piece.X)
            of_target = log_probabilities[np.arange(len(codes)), np.maximum(codes, 0).astype(np.intp)]
            floor = np.log(np.finfo(np.float64).eps)
            self._loss -= float(weight @ np.where(codes < 0, floor, np.maximum(of_target, floor)))

    def metrics(self, n_rows: int) -> dict[str, float]:
        found = {"accuracy": self._right / self.weight}
        return {**found, "log_loss": self._loss / self.weight} if self._probabilities else found


def _function(model: LinearModel, method: str) -> Callable[[Array], Array]:
    if method not in METHODS:
        raise OptionError(f"method={method!r}: expected one of {', '.join(map(repr, METHODS))}")
    if method.endswith("proba"):
        model.predict_proba(np.zeros((0, model.coef.shape[1])))  # refuses here, not at the first piece
    return getattr(model, method)  # type: ignore[no-any-return]


def _require_finite_piece(source: Source, piece: Piece) -> None:
    _require_finite(piece.X, partial(_locate, source, piece), source.feature_label, source.name)


def _row_of_array(first: int, row: int) -> str:
    return f"row {first + row:,}"


def _locate(source: Source, piece: Piece, row: int) -> str:
    return source.locate(piece.block, piece.start + row)


def _require_finite(X: Array, locate: Callable[[int], str], label: Callable[[int], str], owner: str) -> None:
    """Look at the sum first; only one that is not finite is worth the search."""
    if X.dtype.kind != "f":
        return
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(X.sum(dtype=np.float32 if X.itemsize < 4 else X.dtype)):
            return
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
