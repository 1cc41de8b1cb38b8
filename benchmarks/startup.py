"""How long until something happens: each time in a fresh process, from its start.

``import`` and ``--help`` are whole processes, exit included. A fit has two times, until the first call of the kernel
has returned (which over so few rows is the first window, its first update included) and until `fit` has: one epoch of
4,096 rows of 28 features, from an HDF5 file and from a NumPy array, at the defaults. Medians and range of several
processes after one that is not counted, which compiles the kernels unless Numba's cache (NUMBA_CACHE_DIR) has them.
Last, once: the fit with an empty cache, and again with what that left there. What Numba compiles is counted by its own
events; loading from the cache is none.

    python benchmarks/startup.py [--what import fit compile] [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rounds import Spread
from tables import write_hdf5

import streamgd

N_ROWS = 4096
#: The goals, in seconds.
IMPORT_S, HELP_S, UPDATE_S = 0.3, 0.5, 1.5

#: The estimator is used as anybody would; the kernel tells the time of its first return.
FIT = """
import sys
import streamgd
from streamgd.learn import kernels

def told(*arguments, consume=kernels.consume):
    consume(*arguments)
    kernels.consume = consume
    print("update", flush=True)

kernels.consume = told
"""
FIT_HDF5 = """
streamgd.SGDRegressor(max_iter=1).fit(streamgd.open_source("few.h5", target="y"))
print("fitted", flush=True)
"""
FIT_ARRAY = """
import numpy as np
rng = np.random.default_rng(0)
X = rng.standard_normal((4096, 28), dtype=np.float32)
streamgd.SGDRegressor(max_iter=1).fit(X, X.sum(axis=1))
print("fitted", flush=True)
"""
COUNT = """
from numba.core import event
recorder = event.RecordingListener()
event.register("numba:compile", recorder)
"""
COUNTED = """
print(sum(each.is_start for _, each in recorder.buffer), flush=True)
"""


class Processes:
    """Starts processes of Python, in some folder, that import the streamgd that is imported here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        paths = [str(Path(streamgd.__file__).parents[1]), os.environ.get("PYTHONPATH")]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}

    def times(self, *arguments: str, **environment: str) -> dict[str, float]:
        """Run one; return the seconds from its start to each line of its output, and to its "end"."""
        found = {}
        began = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self._folder,
            env=self._environment | environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found[line.strip()] = time.perf_counter() - began
        found["end"] = time.perf_counter() - began
        if process.returncode:
            raise RuntimeError(f"python {' '.join(arguments)} ended with status {process.returncode}")
        return found

    def spreads(self, n_repeats: int, *arguments: str) -> dict[str, Spread]:
        """Run some after one that is not counted; return the spread of each time."""
        self.times(*arguments)
        runs = [self.times(*arguments) for _ in range(n_repeats)]
        return {name: Spread.of([run[name] for run in runs]) for name in runs[0]}


def row(what: str, found: Spread | float, most: float | None = None) -> None:
    """Print a row of the table; `most` is the goal in seconds."""
    wanted = ""
    if most is not None:
        median = found.median if isinstance(found, Spread) else found
        wanted = f"at most {most:g} s: {'met' if median <= most else 'MISSED'}"
    print(f"| {what} | {found:.2f} | {wanted} |", flush=True)


def imports(processes: Processes, n_repeats: int) -> None:
    """Print the rows of what should cost next to nothing."""
    row("`python -c pass`, for comparison", processes.spreads(n_repeats, "-c", "pass")["end"])
    row("`import streamgd`", processes.spreads(n_repeats, "-c", "import streamgd")["end"], IMPORT_S)
    row("`streamgd --help`", processes.spreads(n_repeats, "-m", "streamgd", "--help")["end"], HELP_S)


def fits(processes: Processes, n_repeats: int) -> None:
    """Print the rows of fits whose kernels are compiled already."""
    for name, fit in (("HDF5", FIT_HDF5), ("array", FIT_ARRAY)):
        found = processes.spreads(n_repeats, "-c", FIT + fit)
        row(f"first update, {name}", found["update"], UPDATE_S)
        row(f"end of fit, {name}", found["fitted"])


def compiling(processes: Processes, cache: Path) -> None:
    """Print the rows of a cache that is empty, and then is not."""
    for what in ("an empty Numba cache", "the cache that this left"):
        times = processes.times("-c", COUNT + FIT + FIT_HDF5 + COUNTED, NUMBA_CACHE_DIR=str(cache))
        (compiled,) = [name for name in times if name.isdigit()]
        row(f"first update, HDF5, with {what}: {compiled} compilations", times["update"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = ["import", "fit", "compile"]
    parser.add_argument("--what", nargs="+", choices=every, default=every)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"seconds from a process's start, medians (and range) of {options.repeats}\n")
    print("| until | s | goal |", "|---|---|---|", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hdf5(folder / "few.h5", N_ROWS)
        processes = Processes(folder)
        if "import" in options.what:
            imports(processes, options.repeats)
        if "fit" in options.what:
            fits(processes, options.repeats)
        if "compile" in options.what:
            compiling(processes, folder / "numba")


if __name__ == "__main__":
    main()
