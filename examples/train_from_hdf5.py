"""Train from HDF5 files that are several times larger than the memory they are given.

python examples/train_from_hdf5.py
"""

import tempfile
from pathlib import Path

import h5py
import numpy as np

import streamgd

N_FILES, ROWS_PER_FILE, N_FEATURES = 2, 100_000, 12
TRUE_COEF = np.linspace(-3.0, 3.0, N_FEATURES)
TRUE_INTERCEPT = 40.0


def write_files(folder: Path) -> None:
    """Write sensor readings in very different units: some a thousand times larger than others."""
    rng = np.random.default_rng(0)
    units = np.logspace(-1.5, 1.5, N_FEATURES)
    for number in range(N_FILES):
        z = rng.standard_normal((ROWS_PER_FILE, N_FEATURES))
        y = z @ TRUE_COEF + TRUE_INTERCEPT + rng.standard_normal(ROWS_PER_FILE)
        with h5py.File(folder / f"readings-{number}.h5", "w") as file:
            file.create_dataset("sensors", data=(z * units).astype(np.float32), chunks=(4096, N_FEATURES))
            file.create_dataset("yield", data=y)
    np.save(folder / "units.npy", units)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)

        # Opening reads no rows. The datasets are called "X" and "y" unless they are named here.
        source = streamgd.open_source(str(folder / "readings-*.h5"), target="yield", features="sensors")
        print(source)

        model = streamgd.SGDRegressor(buffer="2MB").fit(source)

        print(f"stored: {source.stored_bytes / 1e6:.1f} MB, buffer: 2.0 MB")
        print(f"epochs: {model.n_iter_}, updates: {model.t_ - 1:,}")
        per_unit = TRUE_COEF / np.load(folder / "units.npy")
        for feature, (found, true) in enumerate(zip(model.coef_, per_unit, strict=True)):
            print(f"  sensor {feature:2}: {found:11.5f}   true {true:11.5f}")
        worst = np.abs(model.coef_ / per_unit - 1).max()
        print(f"largest relative difference: {100 * worst:.2f} %")
        print(f"intercept: {model.intercept_[0]:.3f}   true {TRUE_INTERCEPT:.3f}")
        print(f"R2: {model.score(source):.4f}")

        # Predictions come in blocks, in the order of the data: the result is never held whole.
        n_blocks = n_rows = 0
        for block in model.predict(source):
            n_blocks += 1
            n_rows += len(block)
        print(f"predicted {n_rows:,} rows in {n_blocks} blocks")


if __name__ == "__main__":
    main()
