"""Kill runs at random moments, go on with them until they are finished, and compare them with runs that nobody killed.

For HDF5, Parquet and Dask, with each optimizer in turn: a run is trained by processes that SIGKILL ends after a random
time, as often as it takes. What it has learnt in the end (coefficients, averages, the optimizer's state, losses, and
the records of its metrics without their clock times) must be that of an uninterrupted run to the bit, and the rows it
has consumed must be all of them, once an epoch. The machinery is that of the tests.

    python benchmarks/kills.py [--kills 100] [--rows 200000] [--seed 0] [--folder DIR]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.killing import OPTIMIZERS, Job, Killer, counted_rows, make_data, outcome

SOURCES = ("hdf5", "parquet", "dask")
N_FEATURES, N_EPOCHS = 10, 3
#: Buffers of a few percent of the data; an open Parquet row group has its price.
BUFFERS = {"hdf5": 1_000_000, "parquet": 3_000_000, "dask": 2_000_000}


@dataclass
class Tally:
    """What happened to the runs over one source."""

    n_kills: int = 0
    n_early: int = 0
    n_runs: int = 0
    n_equal: int = 0
    n_counted: int = 0
    n_arrays: int = 0
    n_records: int = 0
    saved: list[float] = field(default_factory=list)


class Source:
    """One kind of data, and the uninterrupted run of each optimizer over it."""

    def __init__(self, killer: Killer, folder: Path, name: str, n_rows: int, rng: np.random.Generator) -> None:
        self._killer, self._folder, self._name, self._n_rows, self._rng = killer, folder, name, n_rows, rng
        self._wholes: dict[str, tuple[dict[str, Any], float]] = {}
        self.tally = Tally()
        folder.mkdir()
        make_data(folder, name, n_rows, N_FEATURES)

    def _job(self, optimizer: str, run: str) -> Job:
        options: dict[str, Any] = {"max_iter": N_EPOCHS, "tol": None, "seed": 1, "buffer_bytes": BUFFERS[self._name]}
        return Job(
            self._name,
            str(self._folder),
            str(self._folder / run),
            options | OPTIMIZERS[optimizer],
            checkpoint_every_s=0.05,
        )

    def _whole(self, optimizer: str) -> tuple[dict[str, Any], float]:
        if optimizer not in self._wholes:
            job = self._job(optimizer, f"{optimizer}-whole")
            ended = self._killer.run(job)
            if ended.status != 0:
                raise SystemExit(f"an uninterrupted run ended with status {ended.status}")
            self._wholes[optimizer] = outcome(job), ended.seconds
        return self._wholes[optimizer]

    def kill(self, optimizer: str) -> None:
        """Train one run, killed after random times of at most what an uninterrupted run takes, to its end."""
        tally, total = self.tally, N_EPOCHS * self._n_rows
        expected, seconds = self._whole(optimizer)
        job = self._job(optimizer, f"{optimizer}-{tally.n_runs}")
        while (ended := self._killer.run(job, delay_s=float(self._rng.uniform(0, seconds)))).killed:
            tally.n_kills += 1
            try:
                tally.saved.append(counted_rows(job) / total)
            except (AssertionError, FileNotFoundError, ValueError):
                tally.n_early += 1  # before its first checkpoint
        if ended.status != 0:
            raise SystemExit(f"a run that was killed could not go on: status {ended.status}")
        found = outcome(job)
        tally.n_runs += 1
        tally.n_equal += found == expected
        tally.n_counted += counted_rows(job) == total
        tally.n_arrays = sum(isinstance(value, tuple) for value in found.values())
        tally.n_records = len(found["metrics"])

    def __str__(self) -> str:
        t = self.tally
        spread = f"{min(t.saved):.0%} to {max(t.saved):.0%}" if t.saved else "nothing"
        return (
            f"{self._name:8s} {t.n_kills:3d} kills ({t.n_early} before the first checkpoint, the others with {spread} "
            f"of the rows saved), {t.n_runs} runs:\n"
            f"         {t.n_equal} equal bit for bit ({t.n_arrays} arrays, {t.n_records} records), {t.n_counted} "
            f"consumed each of {self._n_rows:,} rows once in each of {N_EPOCHS} epochs"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where data and runs are kept; a temporary folder by default")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary, Killer() as killer:
        sources = []
        for number, name in enumerate(SOURCES):
            rng = np.random.default_rng([options.seed, number])
            source = Source(killer, Path(temporary) / name, name, options.rows, rng)
            sources.append(source)
            for optimizer in itertools.cycle(OPTIMIZERS):
                if source.tally.n_kills >= -(-options.kills // len(SOURCES)):
                    break
                source.kill(optimizer)
            print(source, flush=True)
    tallies = [source.tally for source in sources]
    n_kills, n_runs = sum(t.n_kills for t in tallies), sum(t.n_runs for t in tallies)
    good = all(t.n_equal == t.n_counted == t.n_runs for t in tallies)
    print(
        f"{n_kills} kills of {n_runs} runs in {time.monotonic() - began:.0f} s: "
        f"{'every run equal bit for bit, no row lost or repeated' if good else 'SOME RUNS DIFFER'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
