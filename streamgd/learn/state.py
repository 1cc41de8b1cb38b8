"""The state: everything training carries from one row to the next, and nothing else.

A checkpoint is the state's arrays and a few words about the run. The state holds the rows of the batch that is still
open, not its gradient: the default step needs them again once the gradient is known, and a batch that is always
computed whole gives the same bits wherever windows end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.learn.codes import (
    BEST_OBJECTIVE,
    BETA_1_POWER,
    BETA_2_POWER,
    DOWG_DISTANCE,
    EPOCH,
    ETA_SCALE,
    LOSS_SUM,
    N_CARRY,
    N_COUNTERS,
    N_SCALARS,
    WEIGHT_SUM,
    WINDOW,
)

Floats = NDArray[np.float64]

#: The rows of the open batch.
_CARRIED = ("carry_X", "carry_y", "carry_weight")


@dataclass
class State:
    """What training carries from row to row.

    Attributes
    ----------
    theta : ndarray of shape (n_outputs, n_features + 1), float64
        Coefficients of the scaled features; the last column is the intercept.
    average : ndarray, same shape
        Running average of `theta`.
    slots : ndarray of shape (n_slots, n_outputs, n_features + 1), float64
        What the optimizer keeps: AdaGrad's sums, Adam's moments, sgd's velocity, DoWG's start.
    subgradient : ndarray of shape (n_outputs, n_features + 1), or (0, n_features + 1), float64
        Running mean, of the l1 penalty's subgradients, between -1 and 1; empty without that penalty.
    scalars : ndarray of float64
        Sums and numbers, at the places named in `streamgd.learn.codes`.
    counters : ndarray of int64
        The cursor (``EPOCH``, ``WINDOW``, ``ROW``) and the other whole numbers.
    checksum : ndarray of shape (1,), uint64
        Sum of the hashed identities of the rows consumed in this epoch.
    carry_X, carry_y, carry_weight : ndarrays of shape (batch_size, …)
        Rows of the open batch; ``counters[N_CARRY]`` of them are filled.
    moments : ndarray of shape (2, n_features), float64
        Sums of the scaled features and of their squares over the closed batches of the first epoch.
    loss_curve : list of float
        Mean progressive loss of each finished epoch.
    """

    theta: Floats
    average: Floats
    slots: NDArray[np.float64]
    subgradient: Floats
    scalars: Floats
    counters: NDArray[np.int64]
    checksum: NDArray[np.uint64]
    carry_X: NDArray[Any]
    carry_y: Floats
    carry_weight: Floats
    moments: Floats
    loss_curve: list[float] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        *,
        intercept: Floats,
        n_features: int,
        n_targets: int,
        n_slots: int,
        sparse: bool = False,
        batch_size: int,
        row_dtype: np.dtype[Any],
        has_weight: bool,
    ) -> State:
        """Return the state before the first row.

        Parameters
        ----------
        intercept : ndarray of shape (n_outputs,)
            Where the intercept starts; the coefficients start at zero.
        n_features, n_targets, n_slots, batch_size : int
            Sizes.
        sparse : bool, default=False
            Whether there is an l1 penalty.
        row_dtype : numpy.dtype
            float32 or float64.
        has_weight : bool
            Whether rows carry weights.
        """
        shape = (len(intercept), n_features + 1)
        theta = np.zeros(shape)
        theta[:, -1] = intercept
        scalars = np.zeros(N_SCALARS)
        scalars[[ETA_SCALE, BETA_1_POWER, BETA_2_POWER]] = 1.0
        with np.errstate(over="ignore"):  # targets of 1e160 diverge, and are told so by the first batch
            scalars[DOWG_DISTANCE] = 1e-4 * (1.0 + float(np.sqrt((theta**2).sum())))
        scalars[BEST_OBJECTIVE] = np.inf
        slots = np.zeros((n_slots, *shape))
        return cls(
            theta=theta,
            average=theta.copy(),
            slots=slots,
            subgradient=np.zeros(shape if sparse else (0, shape[1])),
            scalars=scalars,
            counters=np.zeros(N_COUNTERS, np.int64),
            checksum=np.zeros(1, np.uint64),
            carry_X=np.zeros((batch_size, n_features), row_dtype),
            carry_y=np.zeros((batch_size, n_targets)),
            carry_weight=np.zeros(batch_size if has_weight else 0),
            moments=np.zeros((2, n_features)),
        )

    @property
    def learnt(self) -> tuple[NDArray[Any], ...]:
        """The arrays that `streamgd.learn.kernels.consume` takes as its state."""
        return self.theta, self.average, self.slots, self.subgradient, self.scalars, self.counters

    def with_penalty(self, *, sparse: bool) -> State:
        """Return the state for a penalty with or without an l1 part; shares its arrays.

        Of coefficients that were there before the penalty it is taken that they keep their signs.
        """
        if sparse == (len(self.subgradient) > 0):
            return self
        return replace(self, subgradient=np.sign(self.theta[: None if sparse else 0]))

    def begin_at(self, theta: Floats) -> None:
        """Put other coefficients in the place of those that were learnt, and of all averages."""
        self.theta[:], self.average[:] = theta, theta
        self.subgradient[:] = np.sign(theta[: len(self.subgradient)])

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return int(self.counters[EPOCH])

    @property
    def cursor(self) -> tuple[int, int, int]:
        """(epoch, window, row) of the next row to consume."""
        epoch, window, row = (int(value) for value in self.counters[:3])
        return epoch, window, row

    @property
    def progressive_loss(self) -> float:
        """Mean progressive loss of the rows seen in this epoch; NaN before the first batch."""
        weight = float(self.scalars[WEIGHT_SUM])
        return float(self.scalars[LOSS_SUM]) / weight if weight > 0 else float("nan")

    def next_window(self) -> None:
        """Move the cursor to the start of the next window, in one step that an interrupt cannot split."""
        self.counters[:3] = (self.counters[EPOCH], self.counters[WINDOW] + 1, 0)

    @property
    def n_bytes(self) -> int:
        """Bytes of its arrays, as they travel and are saved."""
        return sum(array.nbytes for array in self.to_tensors().values())

    def to_tensors(self) -> dict[str, NDArray[Any]]:
        """Return every array by name, the open batch cut to its filled rows."""
        filled = int(self.counters[N_CARRY])
        return {
            "theta": self.theta,
            "average": self.average,
            "slots": self.slots,
            "subgradient": self.subgradient,
            "scalars": self.scalars,
            "counters": self.counters,
            "checksum": self.checksum,
            "carry_X": self.carry_X[:filled],
            "carry_y": self.carry_y[:filled],
            "carry_weight": self.carry_weight[:filled],
            "moments": self.moments,
            "loss_curve": np.asarray(self.loss_curve, np.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[Any]], *, batch_size: int, has_weight: bool) -> State:
        """Undo `to_tensors`."""
        filled = int(tensors["counters"][N_CARRY])
        kept = ("theta", "average", "slots", "scalars", "counters", "checksum", "moments")
        return cls(
            **{name: np.array(tensors[name]) for name in kept},
            subgradient=np.array(tensors.get("subgradient", tensors["theta"][:0])),
            carry_X=_grown(tensors["carry_X"], batch_size, filled),
            carry_y=_grown(tensors["carry_y"], batch_size, filled),
            carry_weight=_grown(tensors["carry_weight"], batch_size if has_weight else 0, filled),
            loss_curve=[float(value) for value in tensors["loss_curve"]],
        )

    def copy(self) -> State:
        """Return an independent copy."""
        filled, own = int(self.counters[N_CARRY]), {}
        for name, value in vars(self).items():
            if name in _CARRIED:
                own[name] = _grown(value, len(value), filled)
            elif name != "loss_curve":
                own[name] = np.array(value)
        return State(**own, loss_curve=list(self.loss_curve))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a pickle what says nothing: unfilled rows of the open batch, and moments that are all zero.

        A wide batch is many times as big as the rest of the state, and between rounds it is empty.
        """
        filled = int(self.counters[N_CARRY])
        found = dict(vars(self))
        found["lengths"] = {name: len(found[name]) for name in _CARRIED}
        for name in _CARRIED:
            found[name] = found[name][:filled]
        if not self.moments.any():
            found["moments"] = self.moments.shape
        return found

    def __setstate__(self, found: dict[str, Any]) -> None:
        """Undo `__getstate__`."""
        filled, lengths = int(found["counters"][N_CARRY]), found.pop("lengths")
        for name in _CARRIED:
            found[name] = _grown(found[name], lengths[name], filled)
        found.setdefault("subgradient", found["theta"][:0])  # which older versions did not have
        if isinstance(found["moments"], tuple):
            found["moments"] = np.zeros(found["moments"])
        self.__dict__.update(found)


def _grown(rows: NDArray[Any], length: int, filled: int) -> NDArray[Any]:
    """Copy the filled rows of an open batch to memory for `length`; of the rest no page is touched until it is used."""
    array = np.zeros((length, *rows.shape[1:]), rows.dtype)
    if length:
        array[:filled] = rows[:filled]
    return array
