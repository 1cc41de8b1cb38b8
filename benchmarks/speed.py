"""One epoch side by side with what a user would pick instead, over the same rows, and with bare scans.

Makes the data (8 million rows of 28 float32 features, a regression, in several formats), then runs each contender in
turn, round after round, in one process, over a warm page cache, and prints medians, ratios and their spread, and the
bars that streamgd promises. streamgd is at its defaults: it shuffles, scales, takes its survey, checks that each row
came once, reports its progressive loss and keeps checkpoints. Peers that are not installed (pip install '.[bench]')
are left out and named.

    python benchmarks/speed.py [--rows 8000000] [--rounds 5] [--folder DIR] [--cases hdf5 …] [--cold 32GB]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import cold
import contenders
import sorted_labels
from cases import CASES, OURS, Case, hdf5_cold, verdict
from rounds import Measured, interleave, ratio
from tables import Tables, sample

import streamgd
from streamgd.data.layout import parse_bytes

PACKAGES = ("numpy", "numba", "h5py", "isal", "pyarrow", "scikit-learn", "dask", "dask-ml", "torch", "vowpalwabbit")
SORTED = "sorted"


def describe_machine() -> str:
    """Return machine, versions and date in one line."""
    versions = [f"streamgd {streamgd.__version__}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = lines[0] if lines else model
    return (
        f"{time.strftime('%Y-%m-%d')}; {model}, {os.cpu_count()} cores, {memory:.0f} GB; "
        f"Python {platform.python_version()}; {', '.join(versions)}"
    )


def explained(found: Measured) -> str:
    """Return the share of the target's variance that the model explains on rows it has not seen."""
    if found.outcome.coef is None:
        return "-"
    X, y = sample()
    residual = y - X @ found.outcome.coef - found.outcome.intercept
    return f"{1 - residual.var() / y.var():.4f}"


def show(case: Case, measured: Mapping[str, Measured], left_out: Mapping[str, str]) -> None:
    """Print a case's table."""
    print(f"\n{case.title}: {case.n_rows:,} rows, medians (and range) of {len(measured[OURS].seconds)} rounds\n")
    print("| contender | s | M rows/s | times streamgd's time | R2 |\n|---|---|---|---|---|")
    for name, found in measured.items():
        rate = case.n_rows / found.median / 1e6
        print(f"| {name} | {_seconds(found)} | {rate:.2f} | {ratio(found, measured[OURS]):.2f} | {explained(found)} |")
    for name, reason in left_out.items():
        print(f"| {name} | left out: {reason} | | | |")
    sys.stdout.flush()


def _seconds(found: Measured) -> str:
    return f"{found.median:.3f} ({min(found.seconds):.3f}-{max(found.seconds):.3f})"


def measure(case: Case, n_rounds: int) -> list[tuple[str, ...]]:
    """Run a case, print its table, and return a row for each of its bars."""
    print(f"{case.title}", file=sys.stderr, flush=True)
    for path in case.warm:
        cold.sequential_read(path)
    measured, left_out = interleave(case.contenders, n_rounds)
    show(case, measured, left_out)
    return [(bar.work, bar.against, bar.wanted, *bar.judge(measured, left_out)) for bar in case.bars]


def measure_sorted(data: Path | None, folder: Path) -> tuple[str, ...]:
    """Compare label-sorted with shuffled rows when there is a cache; return the row of its bar."""
    row = ("label-sorted default-writer Parquet, 20 groups, cache, 3 epochs", "fully shuffled data", "loss within 1 %")
    reason = contenders.why_no_cache()
    if reason is not None:
        return (*row, f"left out: {reason}", "-")
    print("\nlabel-sorted and shuffled, Parquet of 20 row groups, with the cache\n", flush=True)
    found = sorted_labels.compare("parquet", data, n_seeds=5, folder=folder, cached=True)
    return (*row, f"test loss {found:.4f} times as large", verdict(abs(found - 1) <= 0.01))


def warm_up(scratch: Path) -> None:
    """Compile all kernels, by an epoch over a few rows; a first run after an installation takes some seconds."""
    contenders.streamgd_epoch(Tables(scratch, 5000).hdf5, scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the data is made and kept; a temporary folder by default")
    parser.add_argument("--cases", nargs="*", default=[*CASES, SORTED], choices=[*CASES, SORTED], help="all by default")
    parser.add_argument("--cold", metavar="SIZE", help="measure a cold HDF5 file too, so large: more than the memory")
    parser.add_argument("--data", type=Path, help=f"folder with adult, for {SORTED}; rows like it by default")
    options = parser.parse_args()
    if options.cold and not hasattr(os, "posix_fadvise"):
        parser.error("--cold needs Linux: it tells the kernel to forget a file, by posix_fadvise")
    print(describe_machine(), flush=True)
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        scratch = Path(temporary)
        tables = Tables(options.folder or scratch, options.rows)
        warm_up(scratch)
        bars: list[tuple[str, ...]] = []
        for name in options.cases:
            if name == SORTED:
                bars.append(measure_sorted(options.data, scratch))
            else:
                bars += measure(CASES[name](tables, scratch), options.rounds)
        if options.cold:
            bars += measure(hdf5_cold(tables, scratch, parse_bytes(options.cold)), options.rounds)
    print("\n| work | against | bar | measured | |\n|---|---|---|---|---|")
    for row in bars:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
