"""Feed shuffled batches from disk to a model that streamgd does not have, and stop and resume that as well.

python examples/feed_another_model.py
"""

import pickle
import tempfile
from pathlib import Path

import h5py
import numpy as np
from sklearn.neural_network import MLPRegressor

import streamgd

N_ROWS, N_EPOCHS, BATCH_SIZE = 100_000, 2, 500


def write_data(path: Path) -> None:
    """Write a target that no linear model fits, sorted by it, so that without shuffling a network would go astray."""
    rng = np.random.default_rng(0)
    X = rng.uniform(-2.0, 2.0, (N_ROWS, 4)).astype(np.float32)
    y = np.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2] + 0.1 * rng.standard_normal(N_ROWS)
    order = np.argsort(y)
    with h5py.File(path, "w") as file:
        file.create_dataset("X", data=X[order], chunks=(256, 4))
        file.create_dataset("y", data=y[order], chunks=(256,))


def make_stream(source):
    return streamgd.stream(source, batch_size=BATCH_SIZE, seed=0, buffer="1MB", n_epochs=N_EPOCHS)


def make_network() -> MLPRegressor:
    return MLPRegressor(hidden_layer_sizes=(32, 32), learning_rate_init=0.005, random_state=0)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data.h5")
        source = streamgd.open_source(folder / "data.h5")

        network = make_network()
        with make_stream(source) as batches:
            print(f"{batches!r}: {len(batches)} batches an epoch")
            for X, y in batches:
                network.partial_fit(X, y)

        # The same once more, stopped in the middle: what is kept is the network and where the stream stood.
        stopped_at = len(batches) + 77
        other = make_network()
        with make_stream(source) as batches:
            for number, (X, y) in enumerate(batches, start=1):
                other.partial_fit(X, y)
                if number == stopped_at:
                    break
            (folder / "state.pickle").write_bytes(pickle.dumps((other, batches.state_dict())))

        other, state = pickle.loads((folder / "state.pickle").read_bytes())
        where = ", ".join(f"{name} {state[name]}" for name in ("epoch", "window", "row"))
        print(f"stopped after {stopped_at} batches, at {where}")
        n_batches = 0
        with make_stream(source) as batches:
            batches.load_state_dict(state)
            for X, y in batches:
                other.partial_fit(X, y)
                n_batches += 1
        print(f"resumed for the other {n_batches} batches")
        same = all(np.array_equal(a, b) for a, b in zip(network.coefs_, other.coefs_, strict=True))
        print(f"weights equal those of the pass that was not stopped: {'yes' if same else 'NO'}")

        with h5py.File(folder / "data.h5") as file:
            X, y = file["X"][::10], file["y"][::10]
        linear = streamgd.SGDRegressor().fit(source)
        print(f"R2 of the network: {network.score(X, y):.3f}, of a linear model: {linear.score(X, y):.3f}")
        if not same:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
