"""Data sets on which the default optimizer is judged: generated ones, and two real ones where they are present."""

from __future__ import annotations

import bz2
import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

N_ROWS, N_FEATURES = 300_000, 20


class Set(NamedTuple):
    """A training set and what is learnt from it."""

    X: np.ndarray
    y: np.ndarray
    task: str  # "regression": squared error; "classification": log-loss


def _linear(X: np.ndarray, rng: np.random.Generator, noise: float = 1.0) -> Set:
    signal = X @ rng.standard_normal(X.shape[1])
    return Set(X, signal + noise * signal.std() * rng.standard_normal(len(X)), "regression")


def independent(rng: np.random.Generator) -> Set:
    return _linear(rng.standard_normal((N_ROWS, N_FEATURES)), rng)


def _autoregressive(rng: np.random.Generator, rho: float) -> np.ndarray:
    X = rng.standard_normal((N_ROWS, N_FEATURES))
    for j in range(1, N_FEATURES):
        X[:, j] = rho * X[:, j - 1] + np.sqrt(1 - rho**2) * X[:, j]
    return X


def ar_09(rng: np.random.Generator) -> Set:
    return _linear(_autoregressive(rng, 0.9), rng)


def ar_09_logistic(rng: np.random.Generator) -> Set:
    X = _autoregressive(rng, 0.9)
    return Set(X, _draw(X @ rng.standard_normal(N_FEATURES), rng), "classification")


def shifted_and_scaled(rng: np.random.Generator) -> Set:
    base = _linear(rng.standard_normal((N_ROWS, N_FEATURES)), rng)
    scale = 10.0 ** rng.uniform(-3, 4, N_FEATURES)
    return base._replace(X=base.X * scale + scale * rng.uniform(-100, 100, N_FEATURES), y=1e4 + 250 * base.y)


def rare_binary(rng: np.random.Generator) -> Set:
    X = (rng.random((N_ROWS, N_FEATURES)) < np.geomspace(0.5, 0.001, N_FEATURES)).astype(np.float64)
    return Set(X, _draw(X @ (2 * rng.standard_normal(N_FEATURES)) - 1, rng), "classification")


def lognormal(rng: np.random.Generator) -> Set:
    X = np.exp(2.5 * rng.standard_normal((N_ROWS, N_FEATURES)))
    w = rng.standard_normal(N_FEATURES) / X.std(axis=0)
    signal = X @ w
    return Set(X, signal + signal.std() * rng.standard_normal(N_ROWS), "regression")


def silent_column(rng: np.random.Generator) -> Set:
    """A column that is zero in what the survey samples, the heads of blocks, and 0 to 400 elsewhere."""
    X = rng.standard_normal((N_ROWS, N_FEATURES))
    X[:, 7] = np.where(rng.random(N_ROWS) < 0.2, rng.uniform(0, 400, N_ROWS), 0.0)
    rows_per_block = N_ROWS // 64
    X[np.arange(N_ROWS) % rows_per_block < 2 * 65_536 // 64, 7] = 0.0
    w = rng.standard_normal(N_FEATURES)
    w[7] = 0.05
    return Set(X, X @ w + 2 * rng.standard_normal(N_ROWS), "regression")


def _positives(rng: np.random.Generator, share: float) -> Set:
    """Exactly `share` of the rows are positive: the offset of the logit is chosen so."""
    X = rng.standard_normal((N_ROWS, N_FEATURES))
    logit = X @ (rng.standard_normal(N_FEATURES) / np.sqrt(N_FEATURES) * 2.0)
    u = rng.random(N_ROWS)
    needed = np.log(u / (1 - u)) - logit  # a row is positive when the offset is above this
    n_positive = round(share * N_ROWS)
    return Set(X, (needed <= np.sort(needed)[n_positive - 1]).astype(np.int64), "classification")


def positives_1000(rng: np.random.Generator) -> Set:
    return _positives(rng, 1e-3)


def positives_10000(rng: np.random.Generator) -> Set:
    return _positives(rng, 1e-4)


def _draw(logit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (rng.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(np.int64)


#: Levels of each of adult's attributes, numbers cut into classes: 123 indicators in all.
ADULT_LEVELS = (5, 8, 5, 16, 5, 7, 14, 6, 5, 2, 2, 2, 5, 41)


def adult_like(rng: np.random.Generator, n_train: int = 32_561, n_test: int = 16_281) -> tuple[Set, Set]:
    """Return training and test rows like adult's: one indicator of each attribute, some rare, a quarter positive.

    Attributes are told by three hidden traits, as age, schooling and marriage tell each other: they are correlated.
    """
    n_rows, columns = n_train + n_test, []
    traits = rng.standard_normal((n_rows, 3))
    for k, n_levels in enumerate(ADULT_LEVELS):
        score = 0.9 * traits[:, k % 3] + np.sqrt(1 - 0.9**2) * rng.standard_normal(n_rows)
        shares = 1.0 / np.arange(1, n_levels + 1)
        upper = np.quantile(score, np.cumsum(shares / shares.sum())[:-1])
        columns.append(np.searchsorted(upper, score)[:, None] == np.arange(n_levels))
    X = np.concatenate(columns, axis=1).astype(np.float64)
    logit = X @ (0.7 * rng.standard_normal(X.shape[1]))
    y = _draw(logit - np.quantile(logit, 0.8), rng)
    return Set(X[:n_train], y[:n_train], "classification"), Set(X[n_train:], y[n_train:], "classification")


GENERATED: dict[str, Callable[[np.random.Generator], Set]] = {
    "independent": independent,
    "AR(0.9)": ar_09,
    "AR(0.9), logistic": ar_09_logistic,
    "shifted and scaled": shifted_and_scaled,
    "rare binary": rare_binary,
    "lognormal, sigma 2.5": lognormal,
    "silent in the sample": silent_column,
    "positives 1:1,000": positives_1000,
    "positives 1:10,000": positives_10000,
}


def adult(folder: Path) -> Set:
    from sklearn.datasets import load_svmlight_file

    with bz2.open(folder / "adult.trn.bz2") as file:
        X, y = load_svmlight_file(file, n_features=123)
    return Set(X.toarray(), (y > 0).astype(np.int64), "classification")


def adult_test(folder: Path) -> Set:
    from sklearn.datasets import load_svmlight_file

    with bz2.open(folder / "adult.tst.bz2") as file:
        X, y = load_svmlight_file(file, n_features=123)
    return Set(X.toarray(), (y > 0).astype(np.int64), "classification")


def diamonds(folder: Path) -> Set:
    """log(price) on the numeric columns and one-hot categories; the 45,000 training rows of a shuffle with seed 0."""
    with (folder / "diamonds.csv").open() as file:
        rows = list(csv.DictReader(file))
    numeric = ("carat", "depth", "table", "x", "y", "z")
    columns = [np.array([float(row[name]) for row in rows]) for name in numeric]
    for name in ("cut", "color", "clarity"):
        values = [row[name] for row in rows]
        columns += [np.array([value == level for value in values], np.float64) for level in sorted(set(values))]
    y = np.log([float(row["price"]) for row in rows])
    order = np.random.default_rng(0).permutation(len(rows))[:45_000]
    return Set(np.column_stack(columns)[order], y[order], "regression")


REAL: dict[str, Callable[[Path], Set]] = {"diamonds": diamonds, "adult": adult}


def loss(data: Set, coef: np.ndarray, intercept: float) -> float:
    """Mean loss of a linear model: half the squared error, or log-loss."""
    p = data.X @ coef + intercept
    if data.task == "regression":
        return float(0.5 * np.mean((p - data.y) ** 2))
    return float(np.mean(np.logaddexp(0, np.where(data.y > 0, -p, p))))


def null_loss(data: Set) -> float:
    """Loss of the best constant prediction."""
    if data.task == "regression":
        return float(0.5 * data.y.var())
    share = data.y.mean()
    return float(-(share * np.log(share) + (1 - share) * np.log(1 - share)))


def optimum(data: Set) -> tuple[np.ndarray, float]:
    """Exact minimum: least squares, or Newton's method to convergence."""
    mean, scale = data.X.mean(axis=0), data.X.std(axis=0)
    scale[scale == 0] = 1
    A = np.column_stack([(data.X - mean) / scale, np.ones(len(data.X))])
    if data.task == "regression":
        theta = np.linalg.lstsq(A, data.y, rcond=None)[0]
    else:
        theta = np.zeros(A.shape[1])
        share = data.y.mean()
        theta[-1] = np.log(share / (1 - share))
        for _ in range(100):
            p = 1 / (1 + np.exp(-np.clip(A @ theta, -500, 500)))
            gradient = A.T @ (p - data.y) / len(A)
            hessian = (A * (p * (1 - p))[:, None]).T @ A / len(A)
            step = np.linalg.lstsq(hessian + 1e-12 * np.eye(len(theta)), gradient, rcond=None)[0]
            theta -= step * min(1.0, 5.0 / np.abs(step).max())
            if np.abs(gradient).max() < 1e-10:
                break
    coef = theta[:-1] / scale
    return coef, float(theta[-1] - coef @ mean)
