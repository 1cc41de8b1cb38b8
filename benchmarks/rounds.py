"""Times contenders in turn, round after round, in one process; medians, ratios and their spread."""

from __future__ import annotations

import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """What a contender hands back: what it learnt, and its time where that is not the time of the call."""

    coef: np.ndarray | None = None
    intercept: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True)
class Contender:
    """Something that is timed. `why_not` says why it cannot run here; `before` runs untimed before each run."""

    name: str
    run: Callable[[], Outcome | None]
    why_not: Callable[[], str | None] = lambda: None
    before: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Measured:
    """A contender's seconds, round by round, and its last outcome."""

    seconds: tuple[float, ...]
    outcome: Outcome

    @property
    def median(self) -> float:
        """Median of its seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Spread:
    """A median and what it lay between."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of values."""
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})"


def ratio(a: Measured, b: Measured) -> Spread:
    """Return how many times b's time a took, round by round."""
    return Spread.of([x / y for x, y in zip(a.seconds, b.seconds, strict=True)])


def importable(module: str) -> Callable[[], str | None]:
    """Return a check that says why a module cannot be imported, or None."""

    def why_not() -> str | None:
        try:
            importlib.import_module(module)
        except Exception as err:  # a peer built for other versions fails with whatever comes first
            return f"import {module} fails ({type(err).__name__}: {err}); pip install '.[bench]'"
        return None

    return why_not


def interleave(contenders: Sequence[Contender], n_rounds: int) -> tuple[dict[str, Measured], dict[str, str]]:
    """Run the contenders in turn for so many rounds, after one that is not counted.

    The uncounted round compiles, imports and makes what is made once; a peer that fails in it is left out. Each round
    begins with another contender, so that none always follows the same one.

    Returns
    -------
    measured : dict of str to Measured
        By the contenders' names.
    left_out : dict of str to str
        Names of the others, and why.
    """
    running: list[Contender] = []
    left_out: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}
    outcomes: dict[str, Outcome] = {}
    for contender in contenders:
        reason = contender.why_not()
        if reason is None:
            try:
                _timed(contender)
            except Exception as err:
                if contender.name.startswith("streamgd"):
                    raise
                reason = f"{type(err).__name__}: {err}"
        if reason is None:
            running.append(contender)
            seconds[contender.name] = []
        else:
            left_out[contender.name] = reason
    for k in range(n_rounds):
        print(f"  round {k + 1} of {n_rounds}", file=sys.stderr, flush=True)
        first = k % len(running) if running else 0
        for contender in running[first:] + running[:first]:
            taken, outcomes[contender.name] = _timed(contender)
            seconds[contender.name].append(taken)
    return {name: Measured(tuple(seconds[name]), outcomes[name]) for name in seconds}, left_out


def _timed(contender: Contender) -> tuple[float, Outcome]:
    contender.before()
    gc.collect()
    began = time.perf_counter()
    outcome = contender.run() or Outcome()
    taken = time.perf_counter() - began
    return taken if outcome.seconds is None else outcome.seconds, outcome
