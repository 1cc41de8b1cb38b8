"""Feeding rows to the kernel as the training loop does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numba as nb
import numpy as np

from streamgd.learn import kernels
from streamgd.learn.kernels.entries import instruction
from streamgd.learn.recipe import Packed, Recipe
from streamgd.learn.state import State

EMPTY = np.zeros(0)


@dataclass(frozen=True)
class Rows:
    """Rows to train on, as a window holds them."""

    X: np.ndarray
    y: np.ndarray
    weight: np.ndarray = field(default_factory=lambda: EMPTY)
    n_classes: int = 0
    class_weight: np.ndarray = field(default_factory=lambda: EMPTY)
    target_scale: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.X)

    @property
    def mean_weight(self) -> float:
        return float(self.weight.mean()) if self.weight.size else 1.0

    def part(self, start: int, stop: int) -> Rows:
        """Copy some of the rows, as another window would hold them."""
        return Rows(
            self.X[start:stop].copy(),
            self.y[start:stop].copy(),
            self.weight[start:stop].copy(),
            self.n_classes,
            self.class_weight,
            self.target_scale,
        )


def make_rows(
    n: int,
    d: int,
    *,
    seed: int = 0,
    dtype: Any = np.float64,
    n_targets: int = 1,
    n_classes: int = 0,
    weighted: bool = False,
    class_weighted: bool = False,
) -> Rows:
    """Rows of a linear model with noise: targets for a regression, or class indices."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)).astype(dtype)
    scores = X.astype(np.float64) @ rng.standard_normal((d, n_classes or n_targets)) + 0.3
    scores += rng.standard_normal(scores.shape)
    y = scores.argmax(axis=1).astype(np.float64)[:, None] if n_classes else scores
    weight = rng.uniform(0.25, 3.0, n) if weighted else EMPTY
    factors = rng.uniform(0.5, 2.0, n_classes) if class_weighted else EMPTY
    return Rows(X, y, weight, n_classes, factors)


def begin(recipe: Recipe, rows: Rows, intercept: np.ndarray | None = None) -> State:
    n_outputs = recipe.n_outputs(rows.y.shape[1], rows.n_classes)
    return State.start(
        intercept=np.zeros(n_outputs) if intercept is None else np.asarray(intercept, np.float64),
        n_features=rows.X.shape[1],
        n_targets=rows.y.shape[1],
        n_slots=recipe.the_optimizer.n_slots,
        sparse=recipe.is_sparse,
        batch_size=recipe.batch_size,
        row_dtype=rows.X.dtype,
        has_weight=rows.weight.size > 0,
    )


def pack(recipe: Recipe, rows: Rows, *, n_updates: float = 100, moments: bool = False) -> Packed:
    return recipe.pack(n_classes=rows.n_classes, n_updates=n_updates, mean_weight=rows.mean_weight, moments=moments)


def feed(
    state: State,
    rows: Rows,
    packed: Packed,
    *,
    start: int = 0,
    stop: int | None = None,
    close: bool = True,
    first_id: int = 0,
) -> None:
    """Call the kernel once, on rows start to stop of one window."""
    n_outputs = state.theta.shape[0]
    kernels.consume(
        rows.X,
        rows.y,
        rows.weight,
        np.arange(first_id, first_id + len(rows), dtype=np.uint64),
        start,
        len(rows) if stop is None else stop,
        close,
        state.learnt,
        (state.carry_X, state.carry_y, state.carry_weight),
        state.checksum,
        state.moments,
        packed.codes,
        packed.params,
        rows.class_weight,
        np.ones(n_outputs) if rows.target_scale is None else rows.target_scale,
    )


def train(recipe: Recipe, rows: Rows, *, n_epochs: int = 1, intercept: np.ndarray | None = None) -> State:
    """Train over all rows, `n_epochs` times, in file order."""
    state = begin(recipe, rows, intercept)
    packed = pack(recipe, rows, n_updates=n_epochs * -(-len(rows) // recipe.batch_size))
    for _ in range(n_epochs):
        feed(state, rows, packed)
    return state


def train_in_pieces(
    recipe: Recipe, rows: Rows, window_edges: Iterable[int], piece_edges: Iterable[int], *, moments: bool = False
) -> State:
    """Train over all rows once, cut into windows (arrays of their own), and those into pieces (calls of their own)."""
    state = begin(recipe, rows)
    packed = pack(recipe, rows, moments=moments)
    windows = [0, *sorted(set(window_edges)), len(rows)]
    for opens, ends in pairwise(windows):
        window = rows.part(opens, ends)
        pieces = [0, *sorted({edge - opens for edge in piece_edges if opens < edge < ends}), ends - opens]
        for start, stop in pairwise(pieces):
            assert state.counters[kernels.ROW] == start
            close = ends == len(rows) and stop == len(window)
            feed(state, window, packed, start=start, stop=stop, close=close, first_id=opens)
            assert state.counters[kernels.ROW] == stop
        state.next_window()
    return state


def bits_of(state: State) -> dict[str, bytes]:
    """Everything in a state as bytes, but for the cursor, which says how the rows were cut."""
    tensors = {name: np.array(tensor) for name, tensor in state.to_tensors().items()}
    tensors["counters"][[kernels.WINDOW, kernels.ROW]] = 0
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def compiled(names: str, write: Callable) -> Callable:
    """Compile something that writes code, as a function of arrays."""
    written = instruction(tuple(names.split()), write)

    @nb.njit
    def call(arrays):
        written(arrays)

    return lambda *arrays: call(arrays)
