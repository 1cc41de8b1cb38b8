"""Hashes of what training leaves behind, over every loss, optimizer, schedule and penalty.

Run as ``python -m tests.learn.fingerprint float32`` it prints them as JSON; `test_same_bits` compares types of CPU.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from streamgd.learn.losses import LOSSES
from streamgd.learn.optimizers import OPTIMIZERS
from streamgd.learn.recipe import Recipe
from tests.learn.training import Rows, bits_of, train_in_pieces

N_FEATURES = 47  # every width of vector: 32 + 8 + 4 + 2 + 1


def cases() -> Iterator[tuple[str, Recipe]]:
    """Name every recipe worth a hash."""
    for loss in LOSSES.values():
        yield loss.name, Recipe(task=loss.task, loss=loss.name, batch_size=32)
    for name, optimizer in OPTIMIZERS.items():
        for schedule in optimizer.learning_rates or ("auto",):
            for penalty in (None, "l2", "elasticnet"):
                options: dict[str, Any] = {"optimizer": name, "learning_rate": schedule, "penalty": penalty}
                if schedule == "optimal":
                    options.update(task="classification", loss="log_loss")
                yield f"{name} {schedule} {penalty}", Recipe(**options, alpha=0.01, batch_size=32, average=True)
    sgd = {"optimizer": "sgd", "learning_rate": "constant", "momentum": 0.9}
    yield "nesterov", Recipe(**sgd, nesterov=True, batch_size=32)


def simple_rows(dtype: Any, task: str, n_classes: int) -> Rows:
    """Rows from additions and multiplications alone, so that they are the same on every CPU."""
    rng = np.random.Generator(np.random.Philox(0))
    X = (rng.random((200, N_FEATURES)) + rng.random((200, N_FEATURES)) - 1.0).astype(dtype)
    weight = rng.random(200) + 0.5
    if task == "regression":
        y = X[:, :2].astype(np.float64) + X[:, 2:4] + 0.25 * rng.random((200, 2))
        return Rows(X, np.ascontiguousarray(y), weight, target_scale=np.array([0.5, 0.25]))
    y = np.floor((X[:, :1].astype(np.float64) + 1.0) * 0.5 * n_classes).clip(0, n_classes - 1)
    return Rows(X, y, weight, n_classes, class_weight=np.linspace(0.5, 1.5, n_classes))


def fingerprints(dtype: Any) -> dict[str, str]:
    """Train every case and hash its state."""
    found = {}
    for name, recipe in cases():
        for n_classes in (0,) if recipe.task == "regression" else (2, 3):
            rows = simple_rows(dtype, recipe.task, n_classes)
            state = train_in_pieces(recipe, rows, [77], [20, 150], moments=True)
            bits = b"".join(bits_of(state).values())
            found[f"{name} {n_classes}"] = hashlib.blake2b(bits, digest_size=16).hexdigest()
    return found


if __name__ == "__main__":
    print(json.dumps(fingerprints(np.dtype(sys.argv[1]))))
