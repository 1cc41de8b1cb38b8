"""What a row costs, in time and memory, as the data grows: in bytes, in features, and in rows of a row group.

Each set of data is trained on for one epoch by a process of its own, at the defaults, over a warm page cache. Time is
that of `fit`, survey included, the median of several; what is compiled or loaded once is left out, by a fit to a few
rows beforehand. Memory is the peak of the resident set, pages of mapped files included; "before" is what Python and the
libraries took after that first fit. The bare scan is of the same file, by h5py or by pyarrow with threads.

    python benchmarks/growth.py [--what sizes features groups] [--sizes 1GB 4GB 16GB] [--buffer 256MB] [--folder DIR]

Files are deleted once they are measured, so that the disk must hold the largest alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cold
import contenders
from tables import N_FEATURES, PIECE, hdf5_row_bytes, write_hdf5, write_parquet

import streamgd
from streamgd.data.layout import parse_bytes
from streamgd.errors import BufferTooSmallError

#: Bytes of a row group where features grow.
GROUP_BYTES = 16_000_000
#: Bytes of rows that a bare scan takes at once, about.
SCAN_BYTES = 8_000_000


@dataclass(frozen=True)
class Growth:
    """One set of data: what it is called in the table, its shape, and how it is written."""

    label: str
    n_rows: int
    n_features: int
    suffix: str
    write: Callable[[Path], None]


def sizes(n_bytes: list[int]) -> Iterator[Growth]:
    """More and more rows of 28 features."""
    for size in n_bytes:
        n_rows = size // hdf5_row_bytes(N_FEATURES)
        hdf5 = partial(write_hdf5, n_rows=n_rows)
        parquet = partial(write_parquet, n_rows=n_rows, group=PIECE, use_dictionary=False)
        yield Growth(f"HDF5, {size / 1e9:g} GB", n_rows, N_FEATURES, "h5", hdf5)
        yield Growth(f"Parquet, {size / 1e9:g} GB", n_rows, N_FEATURES, "parquet", parquet)


def features(n_features: list[int], n_bytes: int) -> Iterator[Growth]:
    """Wider and wider rows, the same bytes in all."""
    for width in n_features:
        n_rows = max(1, n_bytes // hdf5_row_bytes(width))
        group = max(1, GROUP_BYTES // hdf5_row_bytes(width))
        hdf5 = partial(write_hdf5, n_rows=n_rows, n_features=width)
        parquet = partial(write_parquet, n_rows=n_rows, n_features=width, group=group, use_dictionary=False)
        yield Growth(f"HDF5, {width:,} features", n_rows, width, "h5", hdf5)
        yield Growth(f"Parquet, {width:,} features", n_rows, width, "parquet", parquet)


def groups(group_rows: list[int], n_rows: int) -> Iterator[Growth]:
    """Larger and larger row groups of 28 features, by the default writer."""
    for group in group_rows:
        write = partial(write_parquet, n_rows=n_rows, group=group)
        yield Growth(f"Parquet, groups of {group:,} rows", n_rows, N_FEATURES, "parquet", write)


def peak_bytes() -> int:
    """Return the peak of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():  # elsewhere a child's peak begins with its parent's, which getrusage does not leave out
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_here(path: Path, warm_up: Path, buffer: str, n_repeats: int, row_bytes: int) -> dict[str, object]:
    """Train, then scan; return seconds and peaks of the training, or why the buffer is too small."""

    def fit(path: Path) -> float:
        source = streamgd.open_source(str(path), target="y")
        began = time.perf_counter()
        streamgd.SGDRegressor(max_iter=1, buffer=buffer).fit(source)
        return time.perf_counter() - began

    fit(warm_up)
    before = peak_bytes()
    try:
        seconds = [fit(path) for _ in range(n_repeats)]
    except BufferTooSmallError as err:
        return {"refused": str(err)}
    peak = peak_bytes()
    scan = contenders.h5py_scan if path.suffix == ".h5" else contenders.pyarrow_scan
    piece_rows = max(1, SCAN_BYTES // row_bytes)
    scans = []
    for _ in range(n_repeats):
        began = time.perf_counter()
        scan(path, piece_rows)
        scans.append(time.perf_counter() - began)
    return {"seconds": seconds, "scan": statistics.median(scans), "before": before, "peak": peak}


def measure(growth: Growth, folder: Path, buffer: str, n_repeats: int) -> str:
    """Write a set of data, train on it in a process of its own, and return its row of the table."""
    path, warm_up = folder / f"rows.{growth.suffix}", folder / f"few.{growth.suffix}"
    growth.write(path)
    write = write_hdf5 if growth.suffix == "h5" else write_parquet
    write(warm_up, 2000, growth.n_features)
    cold.sequential_read(path)
    asked = json.dumps([str(path), str(warm_up), buffer, n_repeats, hdf5_row_bytes(growth.n_features)])
    command = [sys.executable, __file__, "--measure", asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    n_bytes = path.stat().st_size
    found = json.loads(done.stdout)
    if "refused" in found:
        return f"| {growth.label} | {growth.n_rows:,} | refused: {found['refused']} | | | | | |"
    seconds = statistics.median(found["seconds"])
    spread = f"{seconds:.2f} ({min(found['seconds']):.2f}-{max(found['seconds']):.2f})"
    scan = seconds / found["scan"]
    megabytes = f"{found['before'] / 1e6:.0f} | {found['peak'] / 1e6:.0f}"
    per_row, rate = seconds / growth.n_rows * 1e9, n_bytes / seconds / 1e9
    return f"| {growth.label} | {growth.n_rows:,} | {spread} | {per_row:.1f} | {rate:.2f} | {scan:.1f} | {megabytes} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = ["sizes", "features", "groups"]
    parser.add_argument("--what", nargs="+", choices=every, default=every)
    parser.add_argument("--sizes", nargs="+", type=parse_bytes, default=[250_000_000, 1_000_000_000])
    parser.add_argument("--features", nargs="+", type=int, default=[4, 28, 200, 2000])
    parser.add_argument("--feature-bytes", type=parse_bytes, default=250_000_000, help="of each file, for features")
    parser.add_argument("--groups", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--group-rows", type=int, default=2_000_000, help="rows of each file, for groups")
    parser.add_argument("--buffer", default="256MB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the data is made; a temporary folder by default")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        path, warm_up, *rest = json.loads(options.measure)
        print(json.dumps(measure_here(Path(path), Path(warm_up), *rest)))
        return
    tables = {
        "sizes": sizes(options.sizes),
        "features": features(options.features, options.feature_bytes),
        "groups": groups(options.groups, options.group_rows),
    }
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    print(f"one epoch, buffer {options.buffer}, medians (and range) of {options.repeats}")
    for what in options.what:
        print(
            "\n| data | rows | s | ns a row | GB/s | times the bare scan | MB before | MB peak |",
            "|" + "---|" * 8,
            sep="\n",
            flush=True,
        )
        for growth in tables[what]:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                print(measure(growth, Path(folder), options.buffer, options.repeats), flush=True)


if __name__ == "__main__":
    main()
