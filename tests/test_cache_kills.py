"""Runs with a cache that SIGKILL ends, anywhere, and that go on: as a whole run, to the bit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.killing import BUFFERS, OPTIMIZERS, SOURCES, Job, Killer, counted_rows, leftovers, make_data, outcome

N_ROWS, N_EPOCHS = 6000, 3


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: what is tested is the order of steps, and not the disk."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as process:
        yield process


def job_of(folder: Path, source: str, name: str) -> Job:
    options = {"max_iter": N_EPOCHS, "tol": None, "seed": 7, "batch_size": 64, "buffer_bytes": BUFFERS[source]}
    run, cache = (str(folder / f"{source}-{name}{what}") for what in ("", "-cache"))
    return Job(source, str(folder / source), run, options | OPTIMIZERS["auto"], cache=cache)


@pytest.mark.parametrize("source", SOURCES)
def test_killed_runs_end_as_whole_ones(killer: Killer, folder: Path, source: str) -> None:
    (folder / source).mkdir()
    make_data(folder / source, source, N_ROWS)
    whole = job_of(folder, source, "whole")
    reference = killer.run(whole)
    assert reference.status == 0
    expected = outcome(whole)
    assert expected["cached"] is not None
    assert counted_rows(whole) == N_EPOCHS * N_ROWS

    rng = np.random.default_rng([5, SOURCES.index(source)])
    job = job_of(folder, source, "killed")
    steps = [("survey", 0), ("window", 1), ("save", 5), ("kernel", 2), ("half", 1), ("window-end", 2), ("epoch", 0)]
    if source == "parquet":  # all rows of the cache fit in a window
        steps = [("survey", 0), ("save", 0), ("save", 4), ("half", 0), ("epoch", 0)]
    for step in [*steps, ("save", 1), ("epoch-end", 0)]:
        ended = killer.run(job, trap=step)
        assert ended.killed, f"the child ended with status {ended.status} before it came to {step}"
    shutil.rmtree(job.cache or "")
    job = replace(job, checkpoint_every_s=0.02)
    for _ in range(2):
        killer.run(job, delay_s=float(rng.uniform(0, reference.seconds / 2)))
    assert killer.run(job).status == 0
    assert outcome(job) == expected
    assert counted_rows(job) == N_EPOCHS * N_ROWS
    assert list(leftovers(job)) == []

    # Killed at random moments only, with a cache that is shared by two runs, one after the other.
    for name in ("first", "second"):
        other = replace(job_of(folder, source, name), cache=str(folder / f"{source}-shared"), checkpoint_every_s=0.01)
        for _ in range(4):
            killer.run(other, delay_s=float(rng.uniform(0, reference.seconds / 2)))
        assert killer.run(other).status == 0
        assert outcome(other) == expected
