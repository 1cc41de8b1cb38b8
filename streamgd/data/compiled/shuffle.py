"""Random places: permutations that follow from a key alone, on every machine and with every version of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled

#: Permutations of fewer rows take two steps from each raw number.
_PAIRED_ROWS = 1 << 20


@intrinsic
def _multiply_high(_context: Any, _a: Any, _b: Any) -> Any:
    """Return the upper 64 bits of a product of two 64-bit numbers."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(arguments[0], wide), builder.zext(arguments[1], wide))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@compiled
def _philox(counter: np.uint64, key_0: np.uint64, key_1: np.uint64) -> tuple[np.uint64, ...]:
    """Return four raw numbers: those that `numpy.random.Philox` with this key gives at this counter."""
    c0, c1, c2, c3 = counter, np.uint64(0), np.uint64(0), np.uint64(0)
    for _ in range(10):
        high_0: Any = _multiply_high(np.uint64(0xD2E7470EE14C6C93), c0)
        high_1: Any = _multiply_high(np.uint64(0xCA5A826395121157), c2)
        low_0 = np.uint64(0xD2E7470EE14C6C93) * c0
        low_1 = np.uint64(0xCA5A826395121157) * c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0 += np.uint64(0x9E3779B97F4A7C15)
        key_1 += np.uint64(0xBB67AE8584CAA73B)
    return c0, c1, c2, c3


@compiled
def raw_numbers(key: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
    """Write the raw numbers of `numpy.random.Philox` with a key: what `permute` consumes, for the test of it."""
    for i in range(0, len(out), 4):
        four = _philox(np.uint64(i // 4 + 1), key[0], key[1])
        for k in range(min(4, len(out) - i)):
            out[i + k] = four[k]


@compiled
def permute(key: NDArray[np.uint64], out: NDArray[np.int32]) -> None:
    """Write a random permutation of ``0 … len(out) - 1``.

    Fisher and Yates' shuffle, from the end. A bound is taken from 64 raw bits by the upper half of a product; the lower
    half is random still, and gives the next bound where there are few enough rows [1]_. The bias is at most
    ``len(out) ** 2 / 2**64`` up to `_PAIRED_ROWS`, and ``len(out) / 2**64`` above, which no run can notice, and as many
    raw numbers are taken whatever comes.

    References
    ----------
    .. [1] Brackett-Rozinsky & Lemire, "Batched Ranged Random Integer Generation", 2024.
    """
    for i in range(len(out)):
        out[i] = i
    i = len(out) - 1
    counter = np.uint64(0)
    while i > 0:
        counter += np.uint64(1)
        for raw in _philox(counter, key[0], key[1]):
            if i > 0:
                j = np.int64(_multiply_high(raw, np.uint64(i + 1)))
                out[i], out[j] = out[j], out[i]
                i -= 1
            if 0 < i < _PAIRED_ROWS:
                rest = raw * np.uint64(i + 2)
                j = np.int64(_multiply_high(rest, np.uint64(i + 1)))
                out[i], out[j] = out[j], out[i]
                i -= 1


@compiled
def draw_places(key: NDArray[np.uint64], out: NDArray[np.int32]) -> None:
    """Write the places of a window's rows: a random permutation, or without a key their own order."""
    if len(key):
        permute(key, out)
    else:
        for i in range(len(out)):
            out[i] = i
