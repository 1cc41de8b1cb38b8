"""The formulas of `streamgd.learn`'s docstrings in plain NumPy, float64 throughout, to hold the kernel against."""

from __future__ import annotations

import numpy as np

from streamgd.learn.recipe import Recipe
from streamgd.learn.schedules import optimal_start
from tests.learn.training import Rows


def loss_terms(name: str, p: np.ndarray, y: np.ndarray, epsilon: float = 0.1, quantile: float = 0.5):
    """Value, first and second derivative in p; y is the target, or ±1 for a class."""
    r, z = p - y, p * y
    out = np.abs(r) - epsilon
    zero, one = np.zeros_like(p), np.ones_like(p)
    if name == "squared_error":
        return r**2 / 2, r, one
    if name == "huber":
        near = out <= 0
        return (
            np.where(near, r**2 / 2, epsilon * np.abs(r) - epsilon**2 / 2),
            np.clip(r, -epsilon, epsilon),
            near.astype(float),
        )
    if name == "epsilon_insensitive":
        return np.maximum(out, 0), np.sign(r) * (out > 0), zero
    if name == "squared_epsilon_insensitive":
        return np.maximum(out, 0) ** 2, 2 * np.sign(r) * np.maximum(out, 0), 2.0 * (out > 0)
    if name == "quantile":
        return np.maximum(-quantile * r, (1 - quantile) * r), np.where(r > 0, 1 - quantile, -quantile) * (r != 0), zero
    if name == "log_loss":
        wrong = 1 / (1 + np.exp(z))
        return np.logaddexp(0, -z), -y * wrong, wrong * (1 - wrong)
    if name in ("hinge", "perceptron"):
        edge = 1.0 if name == "hinge" else 0.0
        return np.maximum(edge - z, 0), -y * (z <= edge), zero
    if name == "squared_hinge":
        return np.maximum(1 - z, 0) ** 2, -2 * y * np.maximum(1 - z, 0), 2.0 * (z < 1)
    assert name == "modified_huber"
    inner = z >= -1
    return (
        np.where(inner, np.maximum(1 - z, 0) ** 2, -4 * z),
        np.where(inner, -2 * y * np.maximum(1 - z, 0), -4 * y),
        2.0 * (inner & (z < 1)),
    )


def softmax_terms(P: np.ndarray, classes: np.ndarray):
    """Cross-entropy of each row, its derivatives of shape (n, K), and the probabilities."""
    e = np.exp(P - P.max(axis=1, keepdims=True))
    share = e / e.sum(axis=1, keepdims=True)
    chosen = np.arange(len(P)), classes.astype(int)
    slope = share.copy()
    slope[chosen] -= 1
    return np.log(e.sum(axis=1)) + P.max(axis=1) - P[chosen], slope, share


class Reference:
    """The trainer of one recipe: `theta`, `average`, and the progressive loss so far."""

    def __init__(self, recipe: Recipe, rows: Rows, intercept: np.ndarray | None = None, n_updates: float = 100) -> None:
        self.recipe, self.rows, self.n_updates = recipe, rows, n_updates
        self.softmax = recipe.loss == "log_loss" and rows.n_classes > 2
        n_outputs = recipe.n_outputs(rows.y.shape[1], rows.n_classes)
        self.theta = np.zeros((n_outputs, rows.X.shape[1] + 1))
        if intercept is not None:
            self.theta[:, -1] = intercept
        self.average = self.theta.copy()
        self.subgradient = np.zeros_like(self.theta[:, :-1])
        self.start = self.theta.copy()
        self.slot, self.second = np.zeros_like(self.theta), np.zeros_like(self.theta)
        self.distance = 1e-4 * (1 + np.linalg.norm(self.theta))
        self.dowg_sum = 0.0
        self.t = 0
        self.loss_sum = self.weight_sum = self.penalty_sum = 0.0
        share = {None: (0, 0), "l2": (0, 1), "l1": (1, 0), "elasticnet": (recipe.l1_ratio, 1 - recipe.l1_ratio)}
        self.l1, self.l2 = (recipe.alpha * part for part in share[recipe.penalty])

    def epoch(self) -> None:
        size = self.recipe.batch_size
        for first in range(0, len(self.rows), size):
            self.batch(self.rows.part(first, first + size))

    def batch(self, rows: Rows) -> None:
        self.t += 1
        recipe, theta = self.recipe, self.theta
        X, y = np.column_stack([rows.X.astype(float), np.ones(len(rows))]), rows.y
        w = rows.weight if rows.weight.size else np.ones(len(rows))
        if rows.class_weight.size:
            w = w * rows.class_weight[y[:, 0].astype(int)]
        P = X @ theta.T
        if self.softmax:
            value, slope, curve = softmax_terms(P, y[:, 0])
        else:
            value, slope, curve = loss_terms(recipe.loss, P, self.targets(y), recipe.epsilon, recipe.quantile)
            value = value.mean(axis=1)
        self.loss_sum += w @ value
        self.weight_sum += w.sum()
        coef = theta[:, :-1]
        self.penalty_sum += len(X) * (self.l1 * np.abs(coef).sum() + self.l2 * (coef**2).sum() / 2)
        denominator = len(X) * self.rows.mean_weight
        g = (slope * w[:, None]).T @ X / denominator
        if not recipe.fit_intercept:
            g[:, -1] = 0
        if recipe.the_optimizer.name != "sgd":
            g[:, :-1] += self.l2 * coef
        scaled = w / denominator
        getattr(self, recipe.the_optimizer.name)(g, X, curve, scaled, self.rate())
        self.update_average()

    def targets(self, y: np.ndarray) -> np.ndarray:
        if self.rows.n_classes == 0:
            return y
        if self.rows.n_classes == 2:
            return np.where(y > 0, 1.0, -1.0)
        return np.where(y == np.arange(self.rows.n_classes), 1.0, -1.0)

    def rate(self) -> float:
        recipe, t = self.recipe, self.t
        if recipe.schedule == "optimal":
            return 1 / (recipe.alpha * (optimal_start(recipe.alpha) + t - 1))
        if recipe.schedule == "invscaling":
            return recipe.first_eta / t**recipe.power_t
        if recipe.schedule == "cosine":
            return recipe.first_eta * (1 + np.cos(np.pi * min(1.0, (t - 1) / self.n_updates))) / 2
        return recipe.first_eta

    def proximal(self, threshold: np.ndarray | float) -> None:
        if self.l1 > 0:
            coef = self.theta[:, :-1]
            threshold = np.broadcast_to(threshold, self.theta.shape)[:, :-1]
            before = coef.copy()
            coef[:] = np.sign(coef) * np.maximum(np.abs(coef) - threshold, 0)
            taken = np.divide(before - coef, threshold, out=np.zeros_like(coef), where=threshold > 0)
            self.subgradient += (taken - self.subgradient) * 9 / (self.t + 8)

    def auto(self, g, X, curve, w, rate) -> None:
        scale = np.ones(len(g)) if self.rows.target_scale is None else self.rows.target_scale
        step, root = self.adagrad_step(g, rate * scale[:, None])
        along = (g * step).sum(axis=1)
        S = X @ step.T
        ridge = self.l2 * (step[:, :-1] ** 2).sum(axis=1)
        if self.softmax:
            variance = (curve * S**2).sum(axis=1) - (curve * S).sum(axis=1) ** 2
            along, bend = np.full(len(g), along.sum()), np.full(len(g), w @ variance + ridge.sum())
        else:
            bend = w @ (curve * S**2) + ridge
        factor = np.minimum(1, np.divide(along, bend, out=np.ones_like(along), where=bend > 0))[:, None]
        self.theta -= factor * step
        self.proximal(factor * rate * scale[:, None] * self.l1 / root)

    def adagrad(self, g, X, curve, w, rate) -> None:
        step, root = self.adagrad_step(g, rate)
        self.theta -= step
        self.proximal(rate * self.l1 / root)

    def adagrad_step(self, g, rate):
        self.slot += g**2
        root = np.sqrt(self.slot) + 1e-9 * np.sqrt(self.slot.max(axis=1, keepdims=True))
        root[root == 0] = np.inf
        return rate * g / root, root

    def sgd(self, g, X, curve, w, rate) -> None:
        recipe = self.recipe
        if recipe.momentum:
            self.slot = recipe.momentum * self.slot + g
            g = g + recipe.momentum * self.slot if recipe.nesterov else self.slot
        self.theta[:, :-1] *= max(0.0, 1 - rate * self.l2)
        self.theta -= rate * g
        self.proximal(rate * self.l1)

    def adam(self, g, X, curve, w, rate) -> None:
        self.slot = 0.9 * self.slot + 0.1 * g
        self.second = 0.999 * self.second + 0.001 * g**2
        size = rate / (np.sqrt(self.second / (1 - 0.999**self.t)) + 1e-8)
        self.theta -= size * self.slot / (1 - 0.9**self.t)
        self.proximal(size * self.l1)

    def dowg(self, g, X, curve, w, rate) -> None:
        self.distance = max(self.distance, np.linalg.norm(self.theta - self.start))
        self.dowg_sum += self.distance**2 * np.linalg.norm(g) ** 2
        size = self.distance**2 / np.sqrt(self.dowg_sum)
        self.theta -= size * g
        self.proximal(size * self.l1)

    def update_average(self) -> None:
        average, name = self.recipe.average, self.recipe.the_optimizer.name
        if average == "auto":
            average = name in ("auto", "dowg")
        if not average:
            return
        since = self.t - (1 if average is True else average) + 1
        share = 9 / (self.t + 8) if name != "sgd" else 1 / max(since, 1)
        self.average += share * (self.theta - self.average)
