"""Runs that SIGKILL ends, anywhere, and that go on: what they have learnt equals that of a whole run, to the bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, str]:
    """A folder of rows for each source."""
    for source in SOURCES:
        (folder / source).mkdir()
        make_data(folder / source, source, N_ROWS)
    return {source: str(folder / source) for source in SOURCES}


def job_of(folder: Path, data: dict[str, str], source: str, optimizer: str, name: str) -> Job:
    options: dict[str, Any] = {"max_iter": N_EPOCHS, "tol": None, "seed": 7, "batch_size": 64}
    options |= {"buffer_bytes": BUFFERS[source], **OPTIMIZERS[optimizer]}
    return Job(source, data[source], str(folder / f"{source}-{optimizer}-{name}"), options)


def steps_of(rng: np.random.Generator) -> list[tuple[str, int]]:
    """Return steps to die at, one after the other: each comes before the run has ended, wherever it stands."""
    return [
        ("survey", 0),
        ("save", int(rng.integers(0, 3))),
        ("save", int(rng.integers(3, 12))),
        ("half", int(rng.integers(0, 3))),
        ("window", int(rng.integers(0, 3))),
        ("epoch", 0),
        ("line", int(rng.integers(0, 3))),
        ("save", 0),  # while the torn record is cut off
        ("kernel", int(rng.integers(0, 3))),
        ("window-end", int(rng.integers(0, 3))),
        ("epoch-end", 0),
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("source", SOURCES)
def test_killed_runs_end_as_whole_ones(
    killer: Killer, folder: Path, data: dict[str, str], source: str, optimizer: str
) -> None:
    whole = job_of(folder, data, source, optimizer, "whole")
    reference = killer.run(whole)
    assert reference.status == 0
    expected = outcome(whole)
    assert counted_rows(whole) == N_EPOCHS * N_ROWS

    rng = np.random.default_rng([SOURCES.index(source), list(OPTIMIZERS).index(optimizer)])
    job = job_of(folder, data, source, optimizer, "killed")
    for step in steps_of(rng):
        ended = killer.run(job, trap=step)
        assert ended.killed, f"the child ended with status {ended.status} before it came to {step}"
    # Saved by the clock now, so that what is lost is more than a window, and not the same each time.
    job = replace(job, checkpoint_every_s=0.02)
    for _ in range(2):
        killer.run(job, delay_s=float(rng.uniform(0, reference.seconds / 2)))
    assert killer.run(job).status == 0
    found = outcome(job)
    assert found == expected
    assert counted_rows(job) == N_EPOCHS * N_ROWS
    assert list(leftovers(job)) == []


@pytest.mark.parametrize("n", range(20))
def test_every_step_of_saving(killer: Killer, folder: Path, data: dict[str, str], n: int) -> None:
    """Through the run's description, its first checkpoints, and the removal of the oldest."""
    whole = job_of(folder, data, "memory", "auto", "whole-steps")
    if not Path(whole.run).exists():
        assert killer.run(whole).status == 0
    job = job_of(folder, data, "memory", "auto", f"step-{n}")
    assert killer.run(job, trap=("save", n)).killed
    assert killer.run(job, trap=("save", 19 - n)).killed
    assert killer.run(job).status == 0
    assert outcome(job) == outcome(whole)
    assert list(leftovers(job)) == []


def test_killed_at_random_moments(killer: Killer, folder: Path, data: dict[str, str]) -> None:
    whole = job_of(folder, data, "hdf5", "auto", "whole-random")
    reference = killer.run(whole)
    rng = np.random.default_rng(11)
    n_killed = 0
    for turn in range(3):
        job = replace(job_of(folder, data, "hdf5", "auto", f"random-{turn}"), checkpoint_every_s=0.01)
        for _ in range(8):
            n_killed += killer.run(job, delay_s=float(rng.uniform(0, reference.seconds / 2))).killed
        assert killer.run(job).status == 0
        assert outcome(job) == outcome(whole)
    assert n_killed >= 3  # a run may end before it is killed, on a machine that has more to do at times


def test_a_killed_run_goes_on_where_its_data_was_moved_to(
    killer: Killer, folder: Path, data: dict[str, str], tmp_path: Path
) -> None:
    whole = job_of(folder, data, "parquet", "sgd", "whole-moved")
    assert killer.run(whole).status == 0
    job = job_of(folder, data, "parquet", "sgd", "moved")
    assert killer.run(job, trap=("window", 9)).killed
    (tmp_path / "rows.parquet").write_bytes((Path(data["parquet"]) / "rows.parquet").read_bytes())
    moved = replace(job, data=str(tmp_path))
    assert killer.run(moved).status == 0
    assert outcome(moved) == outcome(whole)
