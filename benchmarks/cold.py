"""Reading from disk: a file that is not in the page cache, and the plainest way to read it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

#: Fastest of the sizes tried from 128 kB to 8 MB, though none was far behind.
READ_BYTES = 1 << 20
N_PROBES = 1000


def evict(path: Path) -> None:
    """Write the file out and have the kernel forget its pages.

    Raises
    ------
    RuntimeError
        If more than a hundredth of the file stays, because another process has it mapped, or the file system keeps it.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = cached_share(path)
    if left > 0.01:
        raise RuntimeError(f"{left:.0%} of {path} stayed in the page cache: not a cold read. Is it on a memory disk?")


def warm(path: Path) -> None:
    """Read the file, so that its pages are in the page cache."""
    sequential_read(path)


def cached_share(path: Path) -> float:
    """Return the share of the file that is in the page cache, from reads that may not wait, spread evenly over it."""
    size, probe, found = path.stat().st_size, bytearray(1), 0
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # a probe is not to set off reading ahead
        # Backwards, lest pages that a probe brings in be counted by a later one.
        places = range(size - 1, -1, -max(1, size // N_PROBES))
        for place in places:
            try:
                found += os.preadv(file.fileno(), [probe], place, os.RWF_NOWAIT)
            except OSError as err:
                if err.errno != errno.EAGAIN:
                    raise
    return found / len(places) if size else 0.0


def sequential_read(path: Path) -> None:
    """Read the file from end to end into one buffer, which is reused."""
    buffer = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
