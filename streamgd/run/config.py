"""Everything that defines a run: two runs with equal configurations over equal data give equal bits.

What only affects how fast it goes or how it is watched (threads, checkpoint interval, progress) is `RunOptions`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgd.errors import OptionError
from streamgd.learn.recipe import Recipe

if TYPE_CHECKING:
    from streamgd.run.workers import Reports

#: Updates after which the default stops adding epochs, and the most epochs it runs.
AUTO_UPDATES, AUTO_MAX_EPOCHS = 10_000, 1_000
#: With ``tol="auto"`` training ends after no fewer updates without an improvement than these: epochs of a few updates
#: say little.
_PATIENCE_UPDATES = 200
#: What ``tol="auto"`` is, as a share of the loss of the constant prediction.
AUTO_TOL = 1e-5
#: A lane's batches have this many rows at least, if the batch size does: fewer cost more in calls than they bring.
LEAST_LANE_BATCH = 32
#: The most lanes: they are merged in one place.
MOST_LANES = 1024
#: Differences between two runs that a message lists.
_MOST_DIFFERENCES = 10
#: What a configuration has beside the recipe and, since there are lanes, their number; and what of it counts something.
_OWN = ("max_iter", "tol", "n_iter_no_change", "shuffle", "seed", "buffer_bytes", "standardize", "class_weight")
_WHOLE = ("n_iter_no_change", "seed", "buffer_bytes", "n_lanes")


@dataclass(frozen=True)
class Config:
    """What defines a run.

    Parameters
    ----------
    recipe : Recipe
        What to minimise and by which steps.
    max_iter : int or "auto"
        Epochs at most. ``"auto"`` is as many as make about 10,000 updates, at least 1 and at most 1,000: a small set
        gets enough epochs to converge and a large one few, because many updates, not many passes, are what converges.
    tol : float, None or "auto"
        The run ends when the progressive loss of `n_iter_no_change` epochs in a row is not below the best before by
        more than `tol`; ``"auto"`` is 1e-5 of the loss of the best constant prediction, and as many epochs in a row as
        200 updates take; None never ends early.
    n_iter_no_change : int
        See `tol`.
    shuffle : bool
        Whether rows are shuffled each epoch.
    seed : int
        Of the shuffle: from 0.
    buffer_bytes : int
        The whole memory plan.
    standardize : {True, "full", False}
        Scale features by a sample's moments, by exact ones, or not.
    class_weight : dict, "balanced" or None
        Factor of each class, by label.
    n_lanes : int
        Parts that are trained side by side and merged after each round.
    """

    recipe: Recipe = field(default_factory=Recipe)
    max_iter: int | str = "auto"
    tol: float | str | None = "auto"
    n_iter_no_change: int = 5
    shuffle: bool = True
    seed: int = 0
    buffer_bytes: int = 256_000_000
    standardize: bool | str = True
    class_weight: dict[Any, float] | str | None = None
    n_lanes: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if not _is(self.max_iter, "auto") and not (_is_whole(self.max_iter) and int(self.max_iter) >= 1):
            raise OptionError(f"max_iter={self.max_iter!r}: expected 'auto' or a number of epochs of at least 1")
        # Minus infinity is scikit-learn's way to never stop.
        if not (self.tol is None or _is(self.tol, "auto") or (_is_real(self.tol) and float(self.tol) < math.inf)):
            raise OptionError(f"tol={self.tol!r}: expected 'auto', None or a number, not infinite")
        if not (_is_whole(self.n_iter_no_change) and self.n_iter_no_change >= 1):
            raise OptionError(f"n_iter_no_change={self.n_iter_no_change!r}: expected a whole number of at least 1")
        if not (_is_whole(self.seed) and self.seed >= 0):
            raise OptionError(f"random_state={self.seed!r}: expected a whole number of at least 0")
        if not (
            _is(self.standardize, "full") or (np.ndim(self.standardize) == 0 and self.standardize in (True, False))
        ):
            raise OptionError(f"standardize={self.standardize!r}: expected True, 'full' or False")
        if not isinstance(self.shuffle, (bool, np.bool_)):
            raise OptionError(f"shuffle={self.shuffle!r}: expected True or False")
        weights = self.class_weight
        if not (weights is None or _is(weights, "balanced") or isinstance(weights, dict)):
            raise OptionError(f"class_weight={weights!r}: expected None, 'balanced' or a dict of label to factor")
        for label, factor in weights.items() if isinstance(weights, dict) else ():
            if not (_is_real(factor) and 0 <= factor < math.inf):
                raise OptionError(f"class_weight of {label!r} is {factor!r}: expected a finite number of at least 0")
        if not (_is_whole(self.n_lanes) and 1 <= self.n_lanes <= MOST_LANES):
            raise OptionError(f"n_lanes={self.n_lanes!r}: expected a whole number from 1 to {MOST_LANES}")
        if weights is not None and self.recipe.task != "classification":
            raise OptionError("class_weight needs a classification")
        self._make_plain()

    def _make_plain(self) -> None:
        """Have one value for what is equal, and none of NumPy's: runs are found by them, and they go into files."""
        plain: dict[str, Any] = {name: int(getattr(self, name)) for name in _WHOLE}
        plain |= {"shuffle": bool(self.shuffle), "max_iter": "auto" if self.max_iter == "auto" else int(self.max_iter)}
        if self.tol is not None and self.tol != "auto":
            plain["tol"] = float(self.tol)
        if self.standardize != "full":
            plain["standardize"] = bool(self.standardize)
        if isinstance(self.class_weight, dict):
            weights = {_plain(label): float(factor) for label, factor in self.class_weight.items()}
            plain["class_weight"] = dict(sorted(weights.items(), key=lambda pair: repr(pair[0])))
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def starts_at_zero(self) -> bool:
        """Whether the intercept starts at 0: plain SGD on unscaled rows is posed exactly as in scikit-learn."""
        return self.recipe.the_optimizer.name == "sgd" and self.standardize is False

    def batch_rows(self, n_rows: int) -> int:
        """Count the rows behind one update of a lane.

        Lanes share a batch, as far as each has `LEAST_LANE_BATCH` rows of it: with a whole batch each, eight lanes
        missed two to three times as much of what there is to learn.
        """
        size = int(self.recipe.batch_size)
        return min(max(-(-size // self.n_lanes), min(size, LEAST_LANE_BATCH)), n_rows)

    def n_updates(self, n_rows: int) -> int:
        """Count the updates of an epoch over `n_rows` rows; about, if there are several lanes."""
        size = int(self.recipe.batch_size)
        return math.ceil(n_rows / (size if self.n_lanes == 1 else max(size, self.n_lanes * self.batch_rows(n_rows))))

    def n_epochs(self, n_rows: int) -> int:
        """Epochs at most, over `n_rows` rows."""
        if self.max_iter != "auto":
            return int(self.max_iter)
        return min(AUTO_MAX_EPOCHS, max(1, math.ceil(AUTO_UPDATES / self.n_updates(n_rows))))

    def patience(self, n_rows: int) -> int:
        """Return the epochs without an improvement that end training."""
        if self.tol != "auto":
            return self.n_iter_no_change
        return max(self.n_iter_no_change, -(-_PATIENCE_UPDATES // self.n_updates(n_rows)))

    def absolute_tol(self, null_loss: float) -> float | None:
        """Return `tol` in units of the loss; None to never stop early."""
        if self.tol == "auto":
            return AUTO_TOL * null_loss
        return None if self.tol is None else float(self.tol)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the recipe's among them. Labels of class weights keep their type through JSON."""
        weights: Any = self.class_weight
        if isinstance(weights, dict):
            weights = [list(pair) for pair in weights.items()]
        own = {name: getattr(self, name) for name in (*_OWN, "n_lanes")}
        return {**self.recipe.to_json(), **own, "class_weight": weights}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Config:
        """Undo `to_json`."""
        values = dict(values)
        mine = {name: values.pop(name) for name in _OWN}
        mine["n_lanes"] = values.pop("n_lanes", 1)  # runs from before there were lanes do not say
        if isinstance(mine["class_weight"], list):
            mine["class_weight"] = dict(mine["class_weight"])
        return cls(recipe=Recipe.from_json(values), **mine)


@dataclass(frozen=True)
class RunOptions:
    """How a run goes, without changing what it computes.

    Parameters
    ----------
    n_threads : int or None
        Threads that read; None for one per core.
    checkpoint_every_s : float
        Seconds between checkpoints.
    workers_timeout_s : float
        Seconds to wait for workers where a cluster has none.
    cache : path-like or None
        Folder for a cache of the rows; see `streamgd.run.caching`. That there is one changes the order of rows, where
        it lies changes nothing.
    reports : Reports or None
        What a cluster's workers said of themselves before the survey; they need not be asked again at once.
    """

    n_threads: int | None = None
    checkpoint_every_s: float = 60.0
    workers_timeout_s: float = 300.0
    cache: str | os.PathLike[str] | None = None
    reports: Reports | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.n_threads is not None and not (_is_whole(self.n_threads) and self.n_threads >= 1):
            raise OptionError(f"n_threads={self.n_threads!r}: expected None or a whole number of at least 1")
        if not (_is_real(self.checkpoint_every_s) and self.checkpoint_every_s >= 0):
            raise OptionError(f"checkpoint_every_s={self.checkpoint_every_s!r}: expected seconds, at least 0")
        if not (_is_real(self.workers_timeout_s) and self.workers_timeout_s >= 0):
            raise OptionError(f"workers_timeout_s={self.workers_timeout_s!r}: expected seconds, at least 0")
        if self.cache is not None and not (isinstance(self.cache, (str, os.PathLike)) and _names(self.cache)):
            raise OptionError(f"cache={self.cache!r}: expected the path of a folder, or None")


def refuse_cache(config: Config, *, cached: bool, on_cluster: bool) -> None:
    """Refuse a cache where it cannot be used; before anything of the run is written down.

    Parameters
    ----------
    config : Config
        What defines the run.
    cached : bool
        Whether there is to be a cache.
    on_cluster : bool
        Whether it is trained on a cluster.
    """
    if cached and (on_cluster or config.n_lanes > 1):
        raise OptionError("a cache is for one lane on one machine: leave out cache, or the lanes and the cluster")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name each entry that differs between two JSON objects, with both values; nested ones as ``files[0].digest``."""
    found: list[str] = []
    _compare("", old, new, found)
    more = len(found) - _MOST_DIFFERENCES
    return found if more <= 0 else [*found[:_MOST_DIFFERENCES], f"… and {more} more"]


def _compare(path: str, old: Any, new: Any, found: list[str]) -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            _compare(f"{path}.{name}" if path else name, old.get(name), new.get(name), found)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (one, other) in enumerate(zip(old, new, strict=True)):
            _compare(f"{path}[{i}]", one, other, found)
    elif old != new:
        found.append(f"{path}: {old!r} then, {new!r} now")


def _names(path: str | os.PathLike[str]) -> bool:
    """Whether it can be the name of a file."""
    text = os.fspath(path)
    return bool(text) and "\0" not in text


def _is(value: object, word: str) -> bool:
    """Whether it is this word; an array, compared by ``==``, would give an array."""
    return isinstance(value, str) and value == word


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool) and value == value


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
