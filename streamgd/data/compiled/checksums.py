"""Hashes of rows and of words, whose sums tell whether all rows came once, and whether any word changed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled

_BLOCK_SHIFT = np.uint64(40)  # a row's identity is block << 40 | row: 16 million blocks of 10**12 rows


@compiled
def identity(block: np.uint64, row: np.uint64) -> np.uint64:
    """Hash a row's identity; sums of these tell whether an epoch saw each row exactly once (Steele's splitmix64)."""
    z = ((block << _BLOCK_SHIFT) | row) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def sum_identities(blocks: NDArray[np.int64], block_rows: NDArray[np.int64]) -> np.uint64:
    """Sum the hashed identities of every row of some blocks, modulo 2**64."""
    total = np.uint64(0)
    for b in range(len(blocks)):
        block = np.uint64(blocks[b])
        for row in range(block_rows[b]):
            total += identity(block, np.uint64(row))
    return total


@compiled
def sum_words(words: NDArray[Any], first: int) -> np.uint64:
    """Sum up hashed words, modulo 2**64, each hashed with its number; `first` is that of the first one.

    The sums of parts add up to that of the whole, in whatever order they come. A single word that changes always
    changes the sum, because what hashes it is a bijection.
    """
    total = np.uint64(0)
    salt = np.uint64(first) * np.uint64(0x9E3779B97F4A7C15)
    for i in range(len(words)):
        z = np.uint64(words[i]) + salt
        z = (z ^ (z >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
        total += z ^ (z >> np.uint64(32))
        salt += np.uint64(0x9E3779B97F4A7C15)
    return total
