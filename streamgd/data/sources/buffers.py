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

    Never holds more than was in use at some moment.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Bytes] = []
        self._in_use = self._most = self._idle = 0

    def take(self, n_bytes: int) -> Bytes:
        """Return memory of at least `n_bytes`, and at most about twice as much; whoever has it gives it back."""
        with self._lock:
            fitting = [each for each in self._free if n_bytes <= len(each) <= 2 * n_bytes + _SMALL_BYTES]
            found = min(fitting, key=len, default=None)
            if found is not None:
                self._free = [each for each in self._free if each is not found]
                self._idle -= len(found)
            self._in_use += n_bytes if found is None else len(found)
            self._most = max(self._most, self._in_use)
            self._shrink()
        return np.empty(n_bytes, np.uint8) if found is None else found

    def give(self, memory: Bytes) -> None:
        """Take back what `take` returned; nobody reads it any more."""
        with self._lock:
            self._in_use -= len(memory)
            self._idle += len(memory)
            self._free.append(memory)
            self._shrink()

    def _shrink(self) -> None:
        while self._free and self._idle + self._in_use > self._most:
            self._idle -= len(self._free.pop(0))

    def clear(self) -> None:
        """Forget what is not in use."""
        with self._lock:
            self._free, self._idle, self._most = [], 0, self._in_use
