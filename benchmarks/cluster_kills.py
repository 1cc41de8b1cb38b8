"""Does a run on a cluster come to the same bits whatever happens to its workers and its client?

For HDF5, Parquet and a Dask array, with every optimizer: the run without a cluster, then on 1, 2 and 4 worker
processes without faults, with workers that SIGKILL ends at random moments, and with a client that is killed and
resumed on a cluster of another size. All that was learnt must be equal to the bit.

    python benchmarks/cluster_kills.py [--kills 20] [--rows 20000] [--seed 0]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.clustering import KINDS, OPTIMIZERS, REPOSITORY, Processes, await_workers, cluster, fit, make_data

#: Workers that are killed during one run at most.
_MOST_KILLS = 3


class Tally:
    """Counts runs that came to the same bits."""

    def __init__(self) -> None:
        self.n_equal = self.n_runs = 0

    def add(self, what: str, equal: bool) -> None:
        self.n_runs += 1
        self.n_equal += equal
        print(f"{what:60s} {'equal' if equal else 'DIFFERS'}", flush=True)


def fit_while_killing(
    folder: Path, kind: str, optimizer: str, client: Any, workers: Processes, n_workers: int, rng: random.Random
) -> tuple[dict[str, Any], int]:
    """Fit while workers are killed, each time soon after the one before was replaced; return the bits and the kills."""
    stop, n_kills = threading.Event(), 0

    def kill() -> None:
        nonlocal n_kills
        # Not for ever: a lone worker would be killed before it has compiled.
        while n_kills < _MOST_KILLS and not stop.wait(rng.uniform(0.0, 1.5)):
            if len(client.nthreads()) == n_workers:
                workers.kill(rng.randrange(n_workers))
                n_kills += 1
                while len(client.nthreads()) == n_workers:  # the scheduler will see it soon
                    stop.wait(0.01)

    killing = threading.Thread(target=kill)
    killing.start()
    found = fit(folder, kind, optimizer, client)
    stop.set()
    killing.join()
    return found, n_kills


@contextlib.contextmanager
def workers_of(n_workers: int) -> Iterator[tuple[str, Any, Processes]]:
    """Start a scheduler and worker processes."""
    with cluster(0) as (made, client):
        workers = Processes(made.scheduler_address, n_workers)
        try:
            await_workers(client, n_workers)
            yield made.scheduler_address, client, workers
        finally:
            workers.close()


def fit_with_killed_client(
    folder: Path, kind: str, optimizer: str, scheduler: str, rng: random.Random, n_rows: int
) -> int:
    """Begin a fit in a process of its own and kill it; return the checkpoints that it left."""
    folder.mkdir(exist_ok=True)
    make_data(folder, n_rows)
    command = [sys.executable, "-m", "tests.clustering", kind, str(folder), scheduler, optimizer]
    child = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    run = folder / f"run-{kind}-{optimizer}"
    while child.poll() is None and not list(run.glob("*/checkpoints/*.safetensors")):
        time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 1.0))
    child.kill()
    child.wait()
    return len(list(run.glob("*/checkpoints/*.safetensors")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, tally, n_kills = random.Random(options.seed), Tally(), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder, options.rows)
        expected = {(kind, name): fit(folder, kind, name) for kind in KINDS for name in OPTIMIZERS}
        for n_workers in (1, 2, 4):
            with workers_of(n_workers) as (scheduler, client, workers):
                for kind in KINDS:
                    for name in OPTIMIZERS if n_workers == 2 else ["auto"]:
                        found = fit(folder, kind, name, client)
                        tally.add(f"{kind}, {name}, {n_workers} workers", found == expected[kind, name])
                    found, n = fit_while_killing(folder, kind, "auto", client, workers, n_workers, rng)
                    n_kills += n
                    await_workers(client, n_workers)
                    tally.add(f"{kind}, {n_workers} workers, {n} killed", found == expected[kind, "auto"])
                    n = fit_with_killed_client(folder / f"{n_workers}", kind, "auto", scheduler, rng, options.rows)
                    run = folder / f"{n_workers}" / f"run-{kind}-auto"
                    with workers_of(2 if n_workers == 1 else 1) as (_, other, _):
                        found = fit(folder, kind, client=other, checkpoint_dir=run)
                    what = f"{kind}, client of {n_workers} workers killed, {n} checkpoints"
                    tally.add(what, found == expected[kind, "auto"])
        with workers_of(2) as (_, client, workers):
            while n_kills < options.kills:
                kind, name = rng.choice(KINDS), rng.choice(list(OPTIMIZERS))
                found, n = fit_while_killing(folder, kind, name, client, workers, 2, rng)
                n_kills += n
                await_workers(client, 2)
                tally.add(f"{kind}, {name}, 2 workers, {n} killed", found == expected[kind, name])
    print(f"{tally.n_equal} of {tally.n_runs} runs equal bit for bit, {n_kills} workers killed")
    return 0 if tally.n_equal == tally.n_runs else 1


if __name__ == "__main__":
    raise SystemExit(main())
