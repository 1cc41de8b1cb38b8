"""How fast is the training kernel alone, beside a pure read of the same window?

A window is held in memory, larger than the processor's last cache, and consumed as the training loop does: one thread,
a call of the kernel, nothing read or shuffled. Its bytes are those of features, targets (float64) and identities
(uint64), all of which the kernel must read. The pure read is NumPy's maximum of these bytes taken as uint32: it touches
each byte once, in order, and writes nothing; being vectorised, with no long chain of operations, it waits for memory
alone (sums, bitwise reductions, and maxima of 1 and 8 bytes were no faster). A window holds whole batches, at least two
of the largest, and may therefore be larger than asked for.

    python benchmarks/kernels.py [--features 4 28 200 2000] [--batches 1 32 256 4096] [--window 64MB] [--rounds 9]

Contenders of one window run in turn, round after round; ratios are taken round by round: median and range.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rounds import Contender, Measured, Outcome, interleave, ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from streamgd.data.layout import parse_bytes
from streamgd.learn import kernels
from streamgd.learn.losses import LOSSES
from streamgd.learn.optimizers import OPTIMIZERS
from streamgd.learn.recipe import Recipe
from tests.learn.training import Rows, begin, pack

#: The goals: times a pure read, for squared error in batches of at least so many rows; and rows/s of log_loss.
MOST_READS, FROM_BATCH, LOG_LOSS_RATE = 1.3, 32, 80e6
READ = "pure read"
#: Rows of which targets are made at once.
PIECE = 65_536


class Bench:
    """One window's features and identities, targets of several kinds, and what is timed on them."""

    def __init__(self, n_features: int, dtype: str, window_bytes: int, most_batch: int) -> None:
        row_bytes = n_features * np.dtype(dtype).itemsize + 16
        n_rows = max(2, round(window_bytes / row_bytes / most_batch)) * most_batch
        self._X = np.random.default_rng(0).standard_normal((n_rows, n_features), dtype=dtype)
        self._ids = np.arange(n_rows, dtype=np.uint64)
        self._targets = {0: self._make_targets(0)}
        self.n_rows, self.n_bytes = n_rows, n_rows * row_bytes

    def _make_targets(self, n_classes: int) -> np.ndarray:
        """Make targets of a linear model with noise, as numbers or as so many classes."""
        rng = np.random.default_rng(1)
        w = rng.standard_normal((self._X.shape[1], n_classes or 1), dtype=self._X.dtype)
        y = np.empty((len(self._X), 1))
        for first in range(0, len(y), PIECE):
            scores = self._X[first : first + PIECE] @ w
            scores += np.sqrt(self._X.shape[1]) * rng.standard_normal(scores.shape, dtype=scores.dtype)
            y[first : first + PIECE] = scores.argmax(axis=1)[:, None] if n_classes else scores
        return y if n_classes else y / y.std()

    def read(self) -> Contender:
        """Return the pure read."""
        words = [array.reshape(-1).view(np.uint32) for array in (self._X, self._targets[0], self._ids)]

        def run() -> None:
            for part in words:
                part.max()

        return Contender(READ, run)

    def kernel(self, name: str, n_classes: int = 0, moments: bool = False, **options: Any) -> Contender:
        """Return the kernel with some recipe; each run is another epoch of the same training."""
        recipe = Recipe(task="classification" if n_classes else "regression", **options)
        y = self._targets.setdefault(n_classes, self._targets[0] if not n_classes else self._make_targets(n_classes))
        rows = Rows(self._X, y, n_classes=n_classes, class_weight=np.ones(n_classes))
        state = begin(recipe, rows)
        packed = pack(recipe, rows, n_updates=100 * self.n_rows / recipe.batch_size, moments=moments)
        scale = np.ones(len(state.theta))

        def run() -> Outcome:
            state.next_window()
            kernels.consume(
                rows.X,
                rows.y,
                rows.weight,
                self._ids,
                0,
                self.n_rows,
                True,
                state.learnt,
                (state.carry_X, state.carry_y, state.carry_weight),
                state.checksum,
                state.moments,
                packed.codes,
                packed.params,
                rows.class_weight,
                scale,
            )
            if state.counters[kernels.STATUS] == kernels.DIVERGED:
                raise RuntimeError(f"{name} diverged: its time says nothing")
            return Outcome(state.theta[:, :-1])

        return Contender(f"streamgd, {name}", run)

    def measure(self, contenders: Sequence[Contender], n_rounds: int) -> Iterator[tuple[Measured, str]]:
        """Time contenders beside the pure read; yield each, and its columns of the table."""
        measured, _ = interleave([self.read(), *contenders], n_rounds)
        read = measured[READ]
        for contender in [*contenders, Contender(READ, lambda: None)]:
            found = measured[contender.name]
            rate, gigabytes = self.n_rows / found.median / 1e6, self.n_bytes / found.median / 1e9
            yield found, f"{rate:.{1 if rate >= 10 else 2}f} | {gigabytes:.1f} | {ratio(found, read):.2f}"


def goal(wanted: str, met: bool) -> str:
    """Return a goal in words, and whether it is met."""
    return f"{wanted}: {'met' if met else 'MISSED'}"


def shapes(options: argparse.Namespace) -> None:
    """Print the table over features, dtype and batch: squared error, the default optimizer."""
    print("\n| features | dtype | batch | M rows/s | GB/s | times a pure read | goal |", "|" + "---|" * 7, sep="\n")
    for n_features in options.features:
        for dtype in options.dtypes:
            bench = Bench(n_features, dtype, options.window, max(options.batches))
            read = bench.read().name
            contenders = [bench.kernel(f"batch {size}", batch_size=size) for size in options.batches]
            found = list(bench.measure(contenders, options.rounds))
            for size, (measured, columns) in zip([*options.batches, read], found, strict=True):
                wanted = ""
                if size != read and size >= FROM_BATCH:
                    times = ratio(measured, found[-1][0]).median
                    wanted = goal(f"at most {MOST_READS:g}", times <= MOST_READS)
                print(f"| {n_features:,} | {dtype} | {size} | {columns} | {wanted} |", flush=True)


def recipes(options: argparse.Namespace) -> None:
    """Print the table over losses, optimizers and classes: 28 features, float32, batch 256."""
    bench = Bench(28, "float32", options.window, 256)
    labels, contenders = [], []
    for loss in LOSSES.values():
        n_classes = 2 if loss.task == "classification" else 0
        labels.append(f"{loss.name} | auto")
        contenders.append(bench.kernel(loss.name, n_classes, loss=loss.name))
    for name in OPTIMIZERS:
        if name != "auto":
            labels.append(f"squared_error | {name}")
            contenders.append(bench.kernel(name, optimizer=name))
    for n_classes in (10, 100):
        labels.append(f"log_loss, {n_classes} classes | auto")
        contenders.append(bench.kernel(f"{n_classes} classes", n_classes, loss="log_loss"))
    labels.append("squared_error, moments of a first epoch | auto")
    contenders.append(bench.kernel("moments", moments=True))
    print("\n| loss | optimizer | M rows/s | GB/s | times a pure read | goal |", "|" + "---|" * 6, sep="\n")
    for label, (measured, columns) in zip(
        [*labels, f"{READ} | "], bench.measure(contenders, options.rounds), strict=True
    ):
        wanted = ""
        if label == "log_loss | auto":
            met = bench.n_rows / measured.median >= LOG_LOSS_RATE
            wanted = goal(f"at least {LOG_LOSS_RATE / 1e6:g} M rows/s", met)
        print(f"| {label} | {columns} | {wanted} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", nargs="*", type=int, default=[4, 28, 200, 2000], help="none: no such table")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float64"], default=["float32", "float64"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256, 4096])
    parser.add_argument("--window", type=parse_bytes, default=64_000_000, help="bytes; 64MB by default")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"windows of about {options.window / 1e6:g} MB, medians (and ratios' range) of {options.rounds} rounds")
    shapes(options)
    recipes(options)


if __name__ == "__main__":
    main()
