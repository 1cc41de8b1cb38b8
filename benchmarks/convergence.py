"""How much of what can be learnt do the defaults miss?

The share of the attainable gain in training loss (from the best constant prediction to the exact optimum) that is still
missed, in per cent, through the public API with defaults: batch 256, any number of epochs.

    python benchmarks/convergence.py [--epochs 1 3] [--data FOLDER] [--optimizer auto …]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import sets

import streamgd


def missed(data: sets.Set, best: float, n_epochs: int, seed: int, **options: object) -> float:
    """Share of the attainable gain missed, in per cent."""
    kind = streamgd.SGDRegressor if data.task == "regression" else streamgd.SGDClassifier
    model = kind(max_iter=n_epochs, tol=None, random_state=seed, **options).fit(data.X, data.y)
    null = sets.null_loss(data)
    reached = sets.loss(data, np.ravel(model.coef_), float(np.ravel(model.intercept_)[0]))
    return 100 * (reached - best) / (null - best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--optimizer", nargs="+", default=["auto"])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with adult and diamonds")
    options = parser.parse_args()
    columns = [(o, n, lanes) for o in options.optimizer for n in options.epochs for lanes in options.lanes]
    heads = [f"{o}, {n} ep., {lanes} l." for o, n, lanes in columns]
    print("share of the attainable gain missed, %".ljust(40), *(head.rjust(16) for head in heads))
    table: dict[tuple[str, int, int], list[float]] = {column: [] for column in columns}
    names = [*sets.GENERATED, *(name for name in sets.REAL if options.data.is_dir())]
    for name in names:
        real = name in sets.REAL
        data = sets.REAL[name](options.data) if real else sets.GENERATED[name](np.random.default_rng(0))
        best = sets.loss(data, *sets.optimum(data))
        for column in columns:
            optimizer, n_epochs, n_lanes = column
            shares = [
                missed(data, best, n_epochs, seed, optimizer=optimizer, n_lanes=n_lanes)
                for seed in range(options.seeds)
            ]
            table[column].append(statistics.mean(shares))
        print(name.ljust(40), *(f"{table[column][-1]:16.4f}" for column in columns), flush=True)
    print("median".ljust(40), *(f"{statistics.median(table[column]):16.4f}" for column in columns))
    print("worst".ljust(40), *(f"{max(table[column]):16.4f}" for column in columns))


if __name__ == "__main__":
    main()
