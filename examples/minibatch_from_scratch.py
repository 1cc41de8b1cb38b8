"""The textbook mini-batch loop, and three libraries that do the same: one regression fitted four ways.

python examples/minibatch_from_scratch.py
"""

import numpy as np
from sklearn.linear_model import SGDRegressor

import streamgd

BATCH_SIZE, LEARNING_RATE, N_EPOCHS = 32, 0.01, 100
N_ROWS, NOISE = 1_000, 0.1
TRUE = np.array([2.0, -3.0, 0.5, 1.5, -1.0, 4.0])  # five coefficients and the intercept


def make_data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N_ROWS, len(TRUE) - 1))
    return X, X @ TRUE[:-1] + TRUE[-1] + NOISE * rng.standard_normal(N_ROWS)


def from_scratch(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Minimise the mean of (prediction - y)**2 / 2."""
    rng = np.random.default_rng(0)
    w, b = np.zeros(X.shape[1]), 0.0
    for _ in range(N_EPOCHS):
        order = rng.permutation(len(X))
        for start in range(0, len(X), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            # A widespread listing has y - prediction here and still subtracts: uphill, so that it diverges.
            error = X[rows] @ w + b - y[rows]
            w -= LEARNING_RATE * X[rows].T @ error / len(rows)
            b -= LEARNING_RATE * error.mean()
    return np.append(w, b)


def with_scikit_learn(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """One row at a time, by falling steps: with steps that stay at 0.01, single rows would be heard too loudly."""
    model = SGDRegressor(penalty=None, eta0=LEARNING_RATE, max_iter=N_EPOCHS, tol=None, random_state=0).fit(X, y)
    return np.append(model.coef_, model.intercept_)


def with_torch(X: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """The same loop by automatic differentiation; None where torch is missing."""
    try:
        import torch
    except ImportError:
        return None
    torch.manual_seed(0)
    features, target = torch.from_numpy(X), torch.from_numpy(y)
    model = torch.nn.Linear(X.shape[1], 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(N_EPOCHS):
        for rows in torch.randperm(len(X)).split(BATCH_SIZE):
            optimizer.zero_grad()
            error = model(features[rows]).squeeze(1) - target[rows]
            (0.5 * error**2).mean().backward()
            optimizer.step()
    return np.append(model.weight.detach().numpy(), model.bias.detach().numpy())


def with_streamgd(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The same settings by name; ``SGDRegressor()`` alone would do as well."""
    model = streamgd.SGDRegressor(
        optimizer="sgd",
        learning_rate="constant",
        eta0=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        max_iter=N_EPOCHS,
        tol=None,
        random_state=0,
    ).fit(X, y)
    return np.append(model.coef_, model.intercept_)


def main() -> None:
    X, y = make_data()
    fits = {
        "from scratch": from_scratch(X, y),
        "scikit-learn": with_scikit_learn(X, y),
        "PyTorch": with_torch(X, y),
        "streamgd": with_streamgd(X, y),
    }
    if fits["PyTorch"] is None:
        print("PyTorch is not installed: its column is left out")
        del fits["PyTorch"]
    exact = np.linalg.lstsq(np.column_stack([X, np.ones(len(X))]), y, rcond=None)[0]
    columns = {"true": TRUE, "least squares": exact, **fits}
    print(" " * 10 + "".join(f"{name:>15}" for name in columns))
    for row, name in enumerate([*(f"w{i}" for i in range(X.shape[1])), "intercept"]):
        print(f"{name:<10}" + "".join(f"{column[row]:15.4f}" for column in columns.values()))
    apart = max(np.abs(fit - exact).max() for fit in fits.values())
    print(f"largest distance of any fit from least squares: {apart:.4f}")
    print("(the sign: error = y - prediction with w -= rate * X.T @ error climbs instead of descending, and diverges)")


if __name__ == "__main__":
    main()
