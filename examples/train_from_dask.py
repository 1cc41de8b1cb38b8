"""Train from Dask arrays that are computed block by block as training needs them, and never held whole.

python examples/train_from_dask.py
"""

import dask.array as da
import numpy as np

import streamgd

N_ROWS, N_FEATURES, CHUNK_ROWS = 200_000, 8, 10_000
TRUE_COEF = np.array([2.0, -1.0, 0.5, 0.0, 3.0, -2.5, 1.0, -0.25])


def make_arrays() -> tuple[da.Array, da.Array]:
    """Make features and target lazily: nothing is computed here."""
    rng = da.random.default_rng(0)
    X = rng.standard_normal((N_ROWS, N_FEATURES), chunks=(CHUNK_ROWS, N_FEATURES))
    noise = rng.standard_normal(N_ROWS, chunks=CHUNK_ROWS)
    return X, X @ TRUE_COEF + 7.0 + 0.5 * noise


def main() -> None:
    X, y = make_arrays()
    # A block is a chunk of rows; blocks are computed by threads, or by the cluster of an active distributed.Client.
    model = streamgd.SGDRegressor(buffer="8MB", max_iter=5).fit(X, y)
    print(f"epochs: {model.n_iter_}, chunks: {X.numblocks[0]}, as float64: {X.nbytes / 1e6:.1f} MB, buffer: 8.0 MB")
    print("found:", np.array2string(model.coef_, precision=3, suppress_small=True))
    print("true: ", np.array2string(TRUE_COEF, precision=3, suppress_small=True))
    print(f"largest difference: {np.abs(model.coef_ - TRUE_COEF).max():.4f}")
    print(f"intercept: {model.intercept_[0]:.3f}   true 7.000")

    # Rows that were filtered have chunks of unknown length; they are measured once, when the source is opened.
    some = X[:, 0] > 0
    source = streamgd.open_source(X[some], y[some])
    print(f"{source.n_rows:,} rows with a positive first feature, R2 there: {model.score(source):.4f}")


if __name__ == "__main__":
    main()
