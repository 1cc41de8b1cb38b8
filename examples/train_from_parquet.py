"""Train a classifier from a folder of Parquet files, hive partitions and text labels included.

python examples/train_from_parquet.py
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import streamgd

FEATURES = ["amount", "age_days", "n_orders", "is_new"]
CLASSES = np.array(["stays", "leaves"])


def write_folder(folder: Path) -> None:
    """Write customers by year, in one file a year: rows that lie together are alike."""
    rng = np.random.default_rng(0)
    for year in (2022, 2023, 2024):
        n = 60_000
        amount = rng.lognormal(3.0, 1.0, n)
        age_days = rng.integers(0, 3000, n)
        n_orders = rng.poisson(5, n)
        is_new = age_days < 100
        score = 0.02 * amount - 0.001 * age_days - 0.2 * n_orders + 1.5 * is_new + 0.5 * (year - 2023)
        leaves = rng.random(n) < 1 / (1 + np.exp(-score))
        table = pa.table(
            {
                "amount": amount,
                "age_days": age_days.astype(np.int16),
                "n_orders": n_orders.astype(np.int8),
                "is_new": is_new,
                "note": ["free text"] * n,
                "outcome": CLASSES[leaves.astype(int)],
            }
        )
        (folder / f"year={year}").mkdir()
        # Row groups smaller than the window mix better than the writer's default of a million rows.
        pq.write_table(table, folder / f"year={year}" / "part.parquet", row_group_size=5_000)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder)

        # Text cannot be a feature, so the features are named; the partition's year is a column like the others.
        source = streamgd.open_source(folder, target="outcome", features=[*FEATURES, "year"])
        print(source)

        model = streamgd.SGDClassifier(buffer="2MB").fit(source)
        print(f"classes: {', '.join(model.classes_)}")
        for feature, coef in zip(model.feature_names_in_, model.coef_[0], strict=True):
            print(f"  {feature:9} {coef:9.4f}")
        print(f"accuracy: {model.score(source):.3f}")

        # Each block of probabilities belongs to consecutive rows; columns are in the order of classes_.
        probability = sum(block[:, 1].sum() for block in model.predict_proba(source)) / source.n_rows
        labels = pq.read_table(folder, columns=["outcome"])["outcome"]
        share = np.mean(labels.to_numpy() == model.classes_[1])
        print(f"mean probability of {model.classes_[1]!r}: {probability:.4f}, share of rows: {share:.4f}")


if __name__ == "__main__":
    main()
