"""The losses: names, formulas and which task each serves.

Scale and sign conventions are scikit-learn's: p is the prediction (decision value), y the target, s = ±1 the class.
The compiled code is `streamgd.learn.kernels.losses`; the codes and shapes here say which branch it takes, and how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamgd.errors import OptionError
from streamgd.learn import codes as c
from streamgd.learn.options import require

Task = Literal["regression", "classification"]


class Shape(NamedTuple):
    """What sets a loss apart from its like: a function of the excess o of a residual or a margin.

    bend · (o²/2 up to the knee, straight on from there) + steep · o. For a residual r = p − y the excess is
    max(0, |r| − width), and all is times over or under by the sign of r; for a margin z = s p it is max(0, width − z).
    """

    width: float = 0.0
    knee: float = np.inf
    bend: float = 1.0
    steep: float = 0.0
    over: float = 1.0
    under: float = 1.0


@dataclass(frozen=True)
class Loss:
    """One loss.

    Attributes
    ----------
    name : str
        As users write it.
    code : int
        Branch of the kernel.
    task : {"regression", "classification"}
        What it can be used for.
    formula : str
        Value for one row.
    shape : callable
        Its `Shape`, given its parameter; log_loss has none of its own.
    parameter : str or None
        Name of the one number that shapes it (``"epsilon"`` or ``"quantile"``).
    """

    name: str
    code: int
    task: Task
    formula: str
    shape: Callable[[float], Shape]
    parameter: str | None = None


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("squared_error", c.SQUARED_ERROR, "regression", "(p - y)**2 / 2", lambda _: Shape()),
        Loss(
            "huber",
            c.HUBER,
            "regression",
            "(p - y)**2 / 2 if |p - y| <= epsilon else epsilon |p - y| - epsilon**2 / 2",
            lambda epsilon: Shape(knee=epsilon),
            "epsilon",
        ),
        Loss(
            "epsilon_insensitive",
            c.EPSILON_INSENSITIVE,
            "regression",
            "max(0, |p - y| - epsilon)",
            lambda epsilon: Shape(width=epsilon, knee=0.0, bend=0.0, steep=1.0),
            "epsilon",
        ),
        Loss(
            "squared_epsilon_insensitive",
            c.SQUARED_EPSILON_INSENSITIVE,
            "regression",
            "max(0, |p - y| - epsilon)**2",
            lambda epsilon: Shape(width=epsilon, bend=2.0),
            "epsilon",
        ),
        Loss(
            "quantile",
            c.QUANTILE,
            "regression",
            "max(quantile (y - p), (quantile - 1) (y - p))",
            lambda quantile: Shape(knee=0.0, bend=0.0, steep=1.0, over=1.0 - quantile, under=quantile),
            "quantile",
        ),
        Loss(
            "log_loss",
            c.LOG_LOSS,
            "classification",
            "log(1 + exp(-s p)); softmax cross-entropy for 3 or more classes",
            lambda _: Shape(),
        ),
        Loss(
            "hinge",
            c.HINGE,
            "classification",
            "max(0, 1 - s p)",
            lambda _: Shape(width=1.0, knee=0.0, bend=0.0, steep=1.0),
        ),
        Loss(
            "squared_hinge",
            c.SQUARED_HINGE,
            "classification",
            "max(0, 1 - s p)**2",
            lambda _: Shape(width=1.0, bend=2.0),
        ),
        Loss(
            "modified_huber",
            c.MODIFIED_HUBER,
            "classification",
            "max(0, 1 - s p)**2 if s p >= -1 else -4 s p",
            lambda _: Shape(width=1.0, knee=2.0, bend=2.0),
        ),
        Loss(
            "perceptron",
            c.PERCEPTRON,
            "classification",
            "max(0, -s p)",
            lambda _: Shape(knee=0.0, bend=0.0, steep=1.0),
        ),
    )
}


def curvature_of(loss: Loss, unit: NDArray[np.float64], class_weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Say about how much the mean loss bends along a coefficient of a feature that is scaled to a variance of 1.

    Parameters
    ----------
    loss : Loss
        The loss.
    unit : ndarray of shape (n_outputs,)
        In what predictions are measured: the targets' standard deviations, or 1.
    class_weights : ndarray of shape (n_classes,) or (0,)
        Weight of each class, its factor included, over the weight of all rows.

    Returns
    -------
    ndarray of shape (n_outputs,)
        For log_loss that of the best constant prediction, p (1 - p); for others the most that the loss has anywhere,
        or, where it has edges in place of a bend, what they come to over residuals as far apart as the unit.
    """
    total = class_weights.sum() if class_weights.size else 1.0
    if loss.code == c.LOG_LOSS:
        p = class_weights[len(class_weights) - len(unit) :] / total  # of two classes there is one output
        return np.asarray(total * p * (1.0 - p))
    shape = loss.shape(0.5)
    return np.asarray(total * (np.full(len(unit), shape.bend) if shape.bend > 0 else shape.steep / unit))


def get_loss(name: str, task: Task) -> Loss:
    """Look a loss up by name.

    Raises
    ------
    OptionError
        If there is none of that name for the task; lists those there are. Or if there is no such task.
    """
    require(task in ("regression", "classification"), "task", task, "'regression' or 'classification'")
    loss = LOSSES.get(name) if isinstance(name, str) else None
    if loss is None or loss.task != task:
        there = ", ".join(repr(entry.name) for entry in LOSSES.values() if entry.task == task)
        raise OptionError(f"loss={name!r} is not a loss for {task}: expected one of {there}")
    return loss


def outputs_of(loss: Loss, n_targets: int, n_classes: int) -> int:
    """Rows of the coefficient matrix: one per target, one for two classes, else one per class."""
    if loss.task == "regression":
        return n_targets
    return 1 if n_classes <= 2 else n_classes


def start_intercept(
    loss: Loss, target_mean: NDArray[np.float64], class_weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Intercept of the best constant prediction, or near it: the link of the mean.

    Parameters
    ----------
    loss : Loss
        The loss to minimise.
    target_mean : ndarray of shape (n_outputs,)
        Weighted mean of each target (regression).
    class_weights : ndarray of shape (n_classes,)
        Total weight of each class (classification).

    Returns
    -------
    ndarray of shape (n_outputs,)
    """
    if loss.task == "regression":
        return target_mean.astype(np.float64)
    total = class_weights.sum()
    # A class that was announced but not seen yet must not start at minus infinity.
    share = np.clip(class_weights / total if total > 0 else np.ones_like(class_weights), 0.0, 1.0)
    floor = 0.5 / max(total, 1.0)
    share = np.clip(share, floor, 1.0)
    if loss.code == c.PERCEPTRON:
        return np.zeros(1 if len(share) <= 2 else len(share))
    if loss.code == c.LOG_LOSS:
        if len(share) > 2:
            logits = np.log(share / share.sum())
            return np.asarray(logits - logits.mean())
        return np.log(share[-1:]) - np.log(share[:1]) if len(share) == 2 else np.zeros(1)
    margins = 2.0 * share / share.sum() - 1.0
    return np.asarray(margins[-1:] if len(share) == 2 else margins)
