"""Reading from disk: a file that is not in the page cache, and the plainest way to read it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

#: Fastest of the sizes tried from 128 kB to 8 MB, though none was far behind.
READ_BYTES = 1 << 20
#: A private mapping counts against the machine's memory: files are mapped in parts.
_MAPPED_BYTES = 1 << 28


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


def cached_share(path: Path) -> float:
    """Return the share of the file's pages that are in the page cache, as the kernel says; none is read for it."""
    page, size = mmap.PAGESIZE, path.stat().st_size
    libc, found = ctypes.CDLL(None, use_errno=True), 0
    with path.open("rb") as file:
        for start in range(0, size, _MAPPED_BYTES):
            n = min(_MAPPED_BYTES, size - start)
            present = np.zeros(-(-n // page), np.uint8)
            with mmap.mmap(file.fileno(), n, access=mmap.ACCESS_COPY, offset=start) as mapped:
                first = ctypes.c_char.from_buffer(mapped)
                address, vector = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_void_p(present.ctypes.data)
                failed = libc.mincore(address, ctypes.c_size_t(n), vector)
                del first  # else the mapping cannot be closed
            if failed:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
            found += int((present & 1).sum())
    return found / max(1, -(-size // page))


def sequential_read(path: Path) -> None:
    """Read the file from end to end into one buffer, which is reused."""
    buffer = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
