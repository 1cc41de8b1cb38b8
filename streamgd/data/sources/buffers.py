"""Memory that readers use again and again, and what they keep decoded."""

from __future__ import annotations

import threading
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

#: Pieces smaller than this are used for each other, whatever their sizes.
_SMALL_BYTES = 4096
#: So much may lie idle beside the most that was in use: pieces of some sizes, while those of others are.
_SPARE_BYTES = 2 << 20
#: What keeping a piece costs beside its bytes.
_KEPT_BYTES = 512


class Buffers:
    """Memory handed out again and again: in fresh memory the first write to each page costs more than decoding does.

    Never holds much more than was in use at some moment. Safe for several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[Bytes]] = {}  # by the bits that their sizes take
        self._in_use = self._idle = self._most = 0

    def take(self, n_bytes: int) -> Bytes:
        """Return memory of at least `n_bytes`, and of not much more than twice as much, for `give` later."""
        wanted = n_bytes.bit_length()
        with self._lock:
            for bits in range(wanted, max(wanted + 1, _SMALL_BYTES.bit_length()) + 1):
                few = self._free.get(bits)
                if few and n_bytes <= len(few[-1]) <= 2 * n_bytes + _SMALL_BYTES:
                    found = few.pop()  # the last used is in the processor's caches
                    self._idle -= len(found)
                    self._in_use += len(found)
                    return found
            self._in_use += n_bytes
            self._most = max(self._most, self._in_use)
            self._shrink()
        return np.empty(n_bytes, np.uint8)

    def give(self, memory: Bytes) -> None:
        """Take back what `take` returned; nobody reads it any more."""
        with self._lock:
            self._in_use -= len(memory)
            self._idle += len(memory)
            self._free.setdefault(len(memory).bit_length(), []).append(memory)
            self._shrink()

    def clear(self) -> None:
        """Forget what is not in use."""
        with self._lock:
            self._free, self._idle, self._most = {}, 0, self._in_use

    def _shrink(self) -> None:
        """Let go of idle memory until not much more is held than was in use at some moment."""
        for few in self._free.values():
            while few and self._idle + self._in_use > self._most + _SPARE_BYTES:
                self._idle -= len(few.pop(0))


class Kept:
    """What was decoded, kept as far as memory is allowed: nothing at first. Safe for several threads.

    What is kept stays: where pieces are asked for in a new random order again and again, replacing them by others
    would not find more of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: dict[Hashable, Bytes] = {}
        self._allowed = self._taken = 0

    def allow(self, n_bytes: int) -> None:
        """Set how much memory may be taken; what is kept is forgotten if it takes more."""
        with self._lock:
            self._allowed = n_bytes
            if self._taken > n_bytes:
                self._pieces, self._taken = {}, 0

    def get(self, key: Hashable) -> Bytes | None:
        """Return what was kept; nobody writes to it."""
        return self._pieces.get(key)

    def has_room(self, n_bytes: int) -> bool:
        """Tell whether a piece would be kept, as far as can be known."""
        return self._taken + n_bytes + _KEPT_BYTES <= self._allowed

    def put(self, key: Hashable, memory: Bytes) -> None:
        """Keep a piece if there is room."""
        with self._lock:
            if key not in self._pieces and self.has_room(len(memory)):
                self._taken += len(memory) + _KEPT_BYTES
                self._pieces[key] = memory

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._pieces, self._taken = {}, 0
