"""One checked choice of what to learn and how, and its packing into the numbers that kernels take."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.errors import OptionError
from streamgd.learn import codes as c
from streamgd.learn import penalties
from streamgd.learn.losses import Loss, Task, get_loss, outputs_of
from streamgd.learn.optimizers import Optimizer, resolve
from streamgd.learn.options import is_flag, is_number, is_whole, require
from streamgd.learn.schedules import SCHEDULES, optimal_start

#: What is a number, whole or not.
_REAL = ("epsilon", "quantile", "alpha", "l1_ratio", "power_t", "momentum")


@dataclass(frozen=True)
class Recipe:
    """What to minimise and by which steps. Values are as users give them; the properties say what they amount to.

    Parameters
    ----------
    task : {"regression", "classification"}
        What the target is.
    loss : str
        A name of `streamgd.learn.losses.LOSSES`.
    epsilon : float
        Shape of huber and of the epsilon-insensitive losses, in the target's units.
    quantile : float
        Which quantile the quantile loss estimates, between 0 and 1.
    penalty : {None, "l2", "l1", "elasticnet"}
        See `streamgd.learn.penalties`.
    alpha, l1_ratio : float
        Strength of the penalty, and the share of its l1 part under elasticnet.
    fit_intercept : bool
        Whether there is an intercept.
    optimizer, learning_rate : str
        See the table in `streamgd.learn.optimizers`.
    eta0 : float or "auto"
        First learning rate.
    power_t : float
        Exponent of invscaling.
    momentum : float
        Momentum of sgd, from 0 to below 1.
    nesterov : bool
        Nesterov's form of momentum.
    average : bool, int or "auto"
        Whether to average the coefficients; under sgd, an int n > 1 starts with update n, as in scikit-learn.
    batch_size : int
        Rows behind one update.
    """

    task: Task = "regression"
    loss: str = "squared_error"
    epsilon: float = 0.1
    quantile: float = 0.5
    penalty: str | None = None
    alpha: float = 1e-4
    l1_ratio: float = 0.15
    fit_intercept: bool = True
    optimizer: str = "auto"
    learning_rate: str = "auto"
    eta0: float | str = "auto"
    power_t: float = 0.25
    momentum: float = 0.0
    nesterov: bool = False
    average: bool | int | str = "auto"
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Refuse what cannot be run, saying what would be accepted."""
        loss = self.the_loss
        optimizer, schedule = resolve(self.optimizer, self.learning_rate, self.task)
        penalties.strengths(self.penalty, self.alpha, self.l1_ratio)
        epsilon, quantile, momentum, eta0 = self.epsilon, self.quantile, self.momentum, self.eta0
        require(is_number(epsilon) and epsilon >= 0, "epsilon", epsilon, "a number of at least 0")
        require(loss.code != c.HUBER or epsilon > 0, "epsilon", epsilon, "a number above 0 for loss='huber'")
        require(is_number(quantile) and 0 < quantile < 1, "quantile", quantile, "a number between 0 and 1")
        require(is_number(self.power_t), "power_t", self.power_t, "a number")
        require(is_number(momentum) and 0 <= momentum < 1, "momentum", momentum, "a number from 0 to below 1")
        require(is_flag(self.fit_intercept), "fit_intercept", self.fit_intercept, "True or False")
        require(is_flag(self.nesterov), "nesterov", self.nesterov, "True or False")
        size = self.batch_size
        require(is_whole(size) and size >= 1, "batch_size", size, "a whole number of at least 1")
        numeric = is_number(eta0) and float(eta0) > 0
        require(numeric or (isinstance(eta0, str) and eta0 == "auto"), "eta0", eta0, "'auto' or a number above 0")
        average: Any = self.average
        counts = is_flag(average) or (is_whole(average) and average >= 0)
        require(
            counts or (isinstance(average, str) and average == "auto"),
            "average",
            average,
            "'auto', True, False or a number of updates",
        )
        self._require_fitting(optimizer, schedule)
        self._make_plain()

    def _make_plain(self) -> None:
        """Have one value for what is equal, and none of NumPy's."""
        plain: dict[str, Any] = {name: float(getattr(self, name)) for name in _REAL if getattr(self, name) is not None}
        plain |= {"fit_intercept": bool(self.fit_intercept), "nesterov": bool(self.nesterov)}
        plain["batch_size"] = int(self.batch_size)
        if self.eta0 != "auto":
            plain["eta0"] = float(self.eta0)
        if self.average != "auto":
            plain["average"] = bool(self.average) if is_flag(self.average) else int(self.average)
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def _require_fitting(self, optimizer: Optimizer, schedule: str) -> None:
        """Refuse options that are fine by themselves but not together."""
        if self.eta0 != "auto" and not optimizer.learning_rates and optimizer.code != c.AUTO:
            raise OptionError(f"eta0={self.eta0!r}: optimizer={optimizer.name!r} has no learning rate to set")
        if optimizer.code != c.SGD and (self.momentum or self.nesterov):
            raise OptionError(
                f"momentum and nesterov belong to optimizer='sgd'; found optimizer={optimizer.name!r}. "
                "Set optimizer='sgd' or leave them out"
            )
        if self.nesterov and not self.momentum:
            raise OptionError("nesterov=True needs a momentum above 0, such as momentum=0.9")
        if schedule == "optimal" and not self.alpha > 0:
            raise OptionError(f"learning_rate='optimal' needs alpha above 0; found alpha={self.alpha!r}")

    @property
    def the_loss(self) -> Loss:
        """The loss behind the name."""
        return get_loss(self.loss, self.task)

    @property
    def the_optimizer(self) -> Optimizer:
        """The optimizer that the pair (optimizer, learning_rate) means."""
        return resolve(self.optimizer, self.learning_rate, self.task)[0]

    @property
    def is_sparse(self) -> bool:
        """Whether the penalty has an l1 part."""
        return penalties.strengths(self.penalty, self.alpha, self.l1_ratio)[0] > 0

    @property
    def schedule(self) -> str:
        """The schedule that the pair (optimizer, learning_rate) means."""
        return resolve(self.optimizer, self.learning_rate, self.task)[1]

    @property
    def first_eta(self) -> float:
        """The value of eta0."""
        return self.the_optimizer.eta0 if self.eta0 == "auto" else float(self.eta0)

    @property
    def average_kind(self) -> int:
        """One of `c.AVERAGE_NONE`, `c.AVERAGE_UNIFORM`, `c.AVERAGE_POLYNOMIAL`."""
        wanted = self.the_optimizer.averages if self.average == "auto" else bool(self.average)
        if not wanted:
            return c.AVERAGE_NONE
        return c.AVERAGE_UNIFORM if self.the_optimizer.code == c.SGD else c.AVERAGE_POLYNOMIAL

    def n_outputs(self, n_targets: int, n_classes: int) -> int:
        """Rows of the coefficient matrix."""
        return outputs_of(self.the_loss, n_targets, n_classes)

    def pack(self, *, n_classes: int, n_updates: float, mean_weight: float, moments: bool) -> Packed:
        """Write the recipe as the two arrays that kernels take.

        Parameters
        ----------
        n_classes : int
            0 for regression.
        n_updates : float
            Planned updates of the whole run, for the cosine schedule.
        mean_weight : float
            Mean sample weight, by which gradients are divided.
        moments : bool
            Whether to keep the features' moments while consuming rows.
        """
        loss, optimizer = self.the_loss, self.the_optimizer
        l1, l2 = penalties.strengths(self.penalty, self.alpha, self.l1_ratio)
        codes = np.zeros(c.N_CODES, np.int64)
        codes[c.CODE_LOSS] = loss.code
        codes[c.CODE_OPTIMIZER] = optimizer.code
        codes[c.CODE_SCHEDULE] = SCHEDULES[self.schedule]
        codes[c.CODE_SOFTMAX] = loss.code == c.LOG_LOSS and n_classes > 2
        codes[c.CODE_CLASSES] = n_classes
        codes[c.CODE_INTERCEPT] = self.fit_intercept
        codes[c.CODE_AVERAGE] = self.average_kind
        codes[c.CODE_NESTEROV] = self.nesterov
        codes[c.CODE_MOMENTS] = moments
        params = np.zeros(c.N_PARAMS, np.float64)
        params[c.PARAM_WIDTH : c.PARAM_UNDER + 1] = loss.shape(
            self.quantile if loss.parameter == "quantile" else self.epsilon
        )
        params[c.PARAM_L1], params[c.PARAM_L2] = l1, l2
        params[c.PARAM_ETA0] = self.first_eta
        params[c.PARAM_POWER_T] = self.power_t
        params[c.PARAM_MOMENTUM] = self.momentum
        params[c.PARAM_BETA_1], params[c.PARAM_BETA_2], params[c.PARAM_EPSILON] = 0.9, 0.999, 1e-8
        params[c.PARAM_OPTIMAL_START] = optimal_start(self.alpha) if SCHEDULES[self.schedule] == c.OPTIMAL else 0.0
        params[c.PARAM_ALPHA] = self.alpha
        params[c.PARAM_N_UPDATES] = max(1.0, n_updates)
        params[c.PARAM_AVERAGE_FROM] = (
            1 if is_flag(self.average) or self.average == "auto" else max(1, int(self.average))
        )
        params[c.PARAM_MEAN_WEIGHT] = mean_weight
        return Packed(codes, params)

    def to_json(self) -> dict[str, Any]:
        """Return plain values by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """Undo `to_json`."""
        return replace(cls(task=values["task"], loss=values["loss"]), **values)


@dataclass(frozen=True)
class Packed:
    """A recipe as kernels take it.

    Attributes
    ----------
    codes : ndarray of int64
        Which branches to take (``CODE_*``).
    params : ndarray of float64
        The numbers (``PARAM_*``).
    """

    codes: NDArray[np.int64]
    params: NDArray[np.float64]

    def without_moments(self) -> Packed:
        """Return it for epochs after the first, in which the features' moments are not added up."""
        codes = self.codes.copy()
        codes[c.CODE_MOMENTS] = 0
        return Packed(codes, self.params)
