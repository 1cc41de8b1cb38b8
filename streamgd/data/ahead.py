"""Ask the operating system for what will be read soon, and let it forget what has been read.

Blocks are read in random order, which a system's own read-ahead cannot foresee: a disk would wait between any two of
them. Only advice: nothing that is read depends on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

#: Bytes asked for ahead of what is being read: enough for some tenths of a second of a fast disk.
_AHEAD_BYTES = 128 << 20
#: Systems read no more than their own read-ahead for one request.
_REQUEST_BYTES = 128 << 10
#: After some blocks in a row that were there, as many are passed over before the next look, up to so many.
_MOST_PASSED = 32
#: Data bigger than this share of the memory does not stay in the page cache, where it would push out all else.
_KEPT_SHARE = 0.5

_CACHESTAT = 451

Range = tuple[int, int, int]  # descriptor, first byte, bytes


class ReadAhead:
    """Advises on the blocks of an epoch after another, in a thread of its own.

    Parameters
    ----------
    ranges_of : callable
        Given a block, returns what it takes in files, and what keeps them open meanwhile; called in the thread.
    n_open : int
        Blocks that are open at once: those so far back are done with.
    forgets : bool, default=False
        Whether to let go of blocks that have been read.
    """

    def __init__(
        self, ranges_of: Callable[[int], tuple[Sequence[Range], Any]], n_open: int, *, forgets: bool = False
    ) -> None:
        self._ranges_of = ranges_of
        self._n_open = n_open
        self._forgets = forgets
        self._epochs: deque[Iterator[int]] = deque()
        self._asked: deque[tuple[int, int]] = deque()  # blocks not yet opened, and their bytes
        self._opened: deque[int] = deque()
        self._n_opened = self._ahead = 0
        # Blocks in a row that were there, or passed over because of these; of them, those since the last look.
        self._n_there = self._n_passed = 0
        self._block_bytes = 0
        self._closed = False
        # Taken by itself: an interrupt can end a condition's `__enter__` with the lock taken, and `notify` before it
        # forgets whom it woke, which `notify_all` does not mind.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None

    def expect(self, blocks: Iterator[int]) -> None:
        """Add the blocks of an epoch, in the order in which they will be opened."""
        with self._lock:
            self._epochs.append(blocks)
            if self._thread is None and not self._closed and hasattr(os, "posix_fadvise"):
                self._thread = threading.Thread(target=self._run, name="streamgd-ahead", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def opened(self, n_blocks: int) -> None:
        """Note that so many blocks more have been opened."""
        if n_blocks:
            with self._lock:
                self._n_opened += n_blocks
                self._changed.notify_all()

    def close(self) -> None:
        """Stop the thread. Idempotent."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(self._has_work)
                if self._closed:
                    return
                n_opened, self._n_opened = self._n_opened, 0
            try:
                self._pass_over(n_opened)
                self._forget()
                while self._ahead < _AHEAD_BYTES and not self._n_opened and not self._closed:
                    block = self._next()
                    if block is None:
                        break
                    n_bytes = self._ask_for(block)
                    self._ahead += n_bytes
                    self._asked.append((block, n_bytes))
            except Exception:  # what is wrong with a file, whoever reads it says
                return

    def _ask_for(self, block: int) -> int:
        """Ask for a block, unless it is there, or those before it were: looking costs as much as some reading.

        Returns how many bytes it has, or the one before.
        """
        if self._n_passed < min(self._n_there, _MOST_PASSED):
            self._n_passed += 1
            return self._block_bytes
        ranges, held = self._ranges_of(block)
        self._n_there, self._n_passed = (0 if ask_for(ranges) else self._n_there + self._n_passed + 1), 0
        del held  # not before: a descriptor that is closed meanwhile may be another file's by now
        self._block_bytes = sum(n_bytes for _, _, n_bytes in ranges)
        return self._block_bytes

    def _has_work(self) -> bool:
        return bool(self._closed or self._n_opened or (self._epochs and self._ahead < _AHEAD_BYTES))

    def _pass_over(self, n_opened: int) -> None:
        """Note blocks as opened; those that were too late to be asked for are left out."""
        for _ in range(n_opened):
            if self._asked:
                block, n_bytes = self._asked.popleft()
                self._ahead -= n_bytes
            else:
                late = self._next()
                if late is None:
                    return
                block = late
            self._opened.append(block)

    def _next(self) -> int | None:
        while self._epochs:
            block = next(self._epochs[0], None)
            if block is not None:
                return block
            with self._lock:
                self._epochs.popleft()
        return None

    def _forget(self) -> None:
        """Let go of blocks that must have been read by now; too early would only mean to read them again."""
        while len(self._opened) > 2 * self._n_open:
            block = self._opened.popleft()
            if self._forgets:
                ranges, held = self._ranges_of(block)
                for descriptor, first, n_bytes in ranges:
                    os.posix_fadvise(descriptor, first, n_bytes, os.POSIX_FADV_DONTNEED)
                del held


def ask_for(ranges: Sequence[Range]) -> int:
    """Ask for ranges of files that are not in memory yet; return how many bytes."""
    asked = 0
    for descriptor, first, n_bytes in ranges:
        if not _is_there(descriptor, first):
            for at in range(first, first + n_bytes, _REQUEST_BYTES):
                os.posix_fadvise(descriptor, at, min(_REQUEST_BYTES, first + n_bytes - at), os.POSIX_FADV_WILLNEED)
            asked += n_bytes
    return asked


def _is_there(descriptor: int, at: int) -> bool:
    """Tell whether the first byte of a range can be read without waiting; so will be the rest."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    with contextlib.suppress(OSError):  # it would have to wait, or the file system cannot tell
        return os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    return False


class _Range(ctypes.Structure):
    _fields_ = (("first", ctypes.c_uint64), ("n_bytes", ctypes.c_uint64))


def cached_bytes(descriptor: int, first: int, n_bytes: int) -> int:
    """Count the bytes of a range of a file that are in the page cache; 0 if the system cannot tell.

    By Linux' ``cachestat``, which is there from version 6.5 on and has this number on every kind of processor.
    """
    if not sys.platform.startswith("linux"):
        return 0
    pages, wanted = (ctypes.c_uint64 * 5)(), _Range(first, n_bytes)
    failed = ctypes.CDLL(None).syscall(_CACHESTAT, descriptor, ctypes.byref(wanted), ctypes.byref(pages), 0)
    return 0 if failed else int(pages[0]) * os.sysconf("SC_PAGE_SIZE")


def stays_in_memory(n_bytes: int) -> bool:
    """Tell whether data of so many bytes may stay in the page cache, and is worth its while."""
    return n_bytes <= _KEPT_SHARE * memory_bytes()


def memory_bytes() -> int:
    """Return the machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
