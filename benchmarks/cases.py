"""What is measured against what, and the bars: the ratios that streamgd promises to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cold
import contenders as run
from rounds import Contender, Measured, Outcome, importable, ratio
from tables import N_FEATURES, Tables, hdf5_row_bytes, kept, write_hdf5

OURS, SECOND = "streamgd", "streamgd, second epoch from its cache"
BUFFER = "256MB"
#: Rows of a chunk: what is usual, and where scikit-learn is fastest (they then stay in the processor's second cache).
USUAL, FAST = 65_536, 16_384


@dataclass(frozen=True)
class Bar:
    """A promise: `ours` is at least so many times as fast as the fastest of `theirs`, or at most so many times as slow.

    Contenders of `theirs` are known by how their names begin.
    """

    work: str
    against: str
    ours: str
    theirs: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def wanted(self) -> str:
        """The bar in words."""
        if self.at_most is not None:
            return f"at most {self.at_most:g} times its time"
        return f"at least {self.at_least:g} times as fast"

    def judge(self, measured: Mapping[str, Measured], left_out: Mapping[str, str]) -> tuple[str, str]:
        """Return what was measured, and whether that meets the bar."""
        rivals = [found for name, found in measured.items() if name.startswith(self.theirs)]
        if self.ours not in measured or not rivals:
            reasons = {reason for name, reason in left_out.items() if name == self.ours or name.startswith(self.theirs)}
            return f"left out: {'; '.join(sorted(reasons))}", "-"
        ours, fastest = measured[self.ours], min(rivals, key=lambda found: found.median)
        if self.at_most is not None:
            found = ratio(ours, fastest)
            return f"{found:.2f} times its time", verdict(found.median <= self.at_most)
        assert self.at_least is not None
        found = ratio(fastest, ours)
        return f"{found:.2f} times as fast", verdict(found.median >= self.at_least)


def verdict(met: bool) -> str:
    """Return the word for a bar that is met or not."""
    return "met" if met else "MISSED"


@dataclass(frozen=True)
class Case:
    """Contenders over the same rows, and the bars that they decide. Files in `warm` are read before the rounds."""

    title: str
    n_rows: int
    contenders: tuple[Contender, ...]
    bars: tuple[Bar, ...]
    warm: tuple[Path, ...]


def hdf5(tables: Tables, scratch: Path) -> Case:
    """Contiguous HDF5: the fastest storage there is, so that all that is not reading shows."""
    path, n_rows = tables.hdf5, tables.n_rows

    def vowpal(*options: str) -> Outcome:
        return run.vowpal_wabbit(tables.vowpal_cache, n_rows, N_FEATURES, *options)

    contenders = (
        Contender(OURS, partial(run.streamgd_epoch, path, scratch)),
        Contender(SECOND, partial(run.streamgd_second_epoch, path, scratch), run.why_no_cache),
        Contender("h5py scan", partial(run.h5py_scan, path, USUAL)),
        *_scikit_learn("h5py", partial(run.sklearn_hdf5, path)),
        Contender("dask-ml Incremental", partial(run.dask_ml_incremental, path, FAST), importable("dask_ml.wrappers")),
        Contender("PyTorch loop", partial(run.torch_loop, path, USUAL), importable("torch")),
        Contender("Vowpal Wabbit, cached", vowpal, importable("vowpalwabbit")),
        Contender("Vowpal Wabbit, cached, --sgd", partial(vowpal, "--sgd"), importable("vowpalwabbit")),
    )
    bars = (
        Bar("HDF5, uncompressed, one epoch", "scikit-learn partial_fit, h5py", OURS, "scikit-learn", 6),
        Bar("second epoch from the cache", "scikit-learn partial_fit, h5py", SECOND, "scikit-learn", 6),
        Bar(
            "HDF5, uncompressed, one epoch", "Vowpal Wabbit, cached pass over the same rows", OURS, "Vowpal Wabbit", 10
        ),
    )
    return Case("HDF5, uncompressed", n_rows, contenders, bars, (path,))


def parquet(tables: Tables, scratch: Path) -> Case:
    """Parquet as one would write it for this: no dictionary, groups of 131,072 rows."""
    path = tables.parquet
    contenders = (
        Contender(OURS, partial(run.streamgd_epoch, path, scratch)),
        *_pyarrow_scans(path),
        Contender("pyarrow to a NumPy matrix", partial(run.pyarrow_matrix, path, USUAL)),
        *_scikit_learn("pyarrow", partial(run.sklearn_parquet, path)),
    )
    work = "Parquet, snappy, 131,072-row groups"
    bars = (
        Bar(work, "scikit-learn partial_fit, pyarrow", OURS, "scikit-learn", 4),
        Bar(work, "bare pyarrow scan with threads", OURS, "pyarrow scan", at_most=2),
    )
    return Case(work, tables.n_rows, contenders, bars, (path,))


def parquet_default(tables: Tables, scratch: Path) -> Case:
    """Parquet as its writer makes it."""
    path = tables.parquet_default
    work = f"Parquet, default writer, buffer {BUFFER}"
    contenders = (Contender(OURS, partial(run.streamgd_epoch, path, scratch, buffer=BUFFER)), *_pyarrow_scans(path))
    bars = (Bar(work, "bare pyarrow scan with threads", OURS, "pyarrow scan", at_most=2.5),)
    return Case(work, tables.n_rows, contenders, bars, (path,))


def hdf5_gzip(tables: Tables, scratch: Path) -> Case:
    """Compressed HDF5, in chunks of whole rows and in those that h5py chooses, which hold one feature each."""
    path, auto = tables.hdf5_gzip, tables.hdf5_auto
    contenders = (
        Contender(OURS, partial(run.streamgd_epoch, path, scratch)),
        Contender("h5py scan", partial(run.h5py_scan, path, USUAL)),
        Contender("streamgd, h5py's automatic chunks", partial(run.streamgd_epoch, auto, scratch)),
        Contender("scan by h5py, h5py's automatic chunks", partial(run.h5py_scan, auto, USUAL)),
    )
    bars = (Bar("HDF5, gzip and shuffle", "bare h5py scan", OURS, "h5py scan", 2.5),)
    return Case("HDF5, gzip and shuffle, chunks of 8,192 rows", tables.n_rows, contenders, bars, (path, auto))


def hdf5_cold(tables: Tables, scratch: Path, n_bytes: int) -> Case:
    """Contiguous HDF5 that is not in memory; give it more bytes than the machine has."""
    n_rows = n_bytes // hdf5_row_bytes(N_FEATURES)
    path = kept(tables.folder / f"contiguous-{n_rows}.h5", lambda path: write_hdf5(path, n_rows))
    work = f"HDF5, {path.stat().st_size / 1e9:.1f} GB, cold"

    def evict() -> None:
        cold.evict(path)

    contenders = (
        Contender(OURS, partial(run.streamgd_epoch, path, scratch), before=evict),
        Contender("sequential read", partial(cold.sequential_read, path), before=evict),
    )
    bars = (Bar(work, "plain sequential read of the file", OURS, "sequential read", at_most=1.15),)
    return Case(work, n_rows, contenders, bars, ())


#: The cases over one table, which differ in how it is stored.
CASES: dict[str, Callable[[Tables, Path], Case]] = {
    "hdf5": hdf5,
    "parquet": parquet,
    "parquet-default": parquet_default,
    "hdf5-gzip": hdf5_gzip,
}


def _scikit_learn(reader: str, fit: Callable[[int], Outcome]) -> list[Contender]:
    return [
        Contender(f"scikit-learn partial_fit, {reader}, {chunk:,}-row chunks", partial(fit, chunk))
        for chunk in (USUAL, FAST)
    ]


def _pyarrow_scans(path: Path) -> list[Contender]:
    """Scans in batches of pyarrow's own choice, and in the larger ones that are faster."""
    return [
        Contender(f"pyarrow scan, threads, {rows:,}-row batches", partial(run.pyarrow_scan, path, rows))
        for rows in (65_536, 131_072)
    ]
