"""Memory that readers use again and again."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

#: Pieces smaller than this are used for each other, whatever their sizes.
_SMALL_BYTES = 4096


class Buffers:
    """Memory handed out again and again: in fresh memory the first write to each page costs more than decoding does.

    Never holds more than was in use at some moment. Safe for several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Bytes] = []
        self._in_use = self._idle = self._most = 0

    def take(self, n_bytes: int) -> Bytes:
        """Return memory of at least `n_bytes`, and of not much more than twice as much, for `give` later."""
        with self._lock:
            for i in range(len(self._free) - 1, -1, -1):  # the last used is in the processor's caches
                size = len(self._free[i])
                if n_bytes <= size <= 2 * n_bytes + _SMALL_BYTES:
                    self._idle -= size
                    self._in_use += size
                    return self._free.pop(i)
            self._in_use += n_bytes
            self._most = max(self._most, self._in_use)
            self._shrink()
        return np.empty(n_bytes, np.uint8)

    def give(self, memory: Bytes) -> None:
        """Take back what `take` returned; nobody reads it any more."""
        with self._lock:
            self._in_use -= len(memory)
            self._idle += len(memory)
            self._free.append(memory)
            self._shrink()

    def clear(self) -> None:
        """Forget what is not in use."""
        with self._lock:
            self._free, self._idle, self._most = [], 0, self._in_use

    def _shrink(self) -> None:
        while self._free and self._idle + self._in_use > self._most:
            self._idle -= len(self._free.pop(0))
