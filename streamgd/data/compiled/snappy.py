"""Snappy's raw format (its ``format_description.txt``), decompressed."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamgd.data.compiled.compiling import compiled
from streamgd.data.compiled.memory import copy_bytes, put_uint8, put_uint64, uint8_at, uint64_at, varint


@compiled
def expand_snappy(at: Any, end: int, target: int, n_bytes: int) -> bool:
    """Decompress snappy's raw format to exactly `n_bytes` at an address; False if it cannot be.

    Two bits of each tag tell bytes that follow as they are from copies of bytes that came before, which may overlap
    with those they become.
    """
    size, at = varint(at, end)
    if at == 0 or size != n_bytes:
        return False
    out: Any = target
    limit = target + n_bytes
    while at < end:
        tag: Any = np.int64(uint8_at(at, 0))
        at += 1
        if tag & 3 == 0:
            length = tag >> 2
            if length >= 60:
                n = length - 59
                if n > end - at:
                    return False
                length = tag & 0
                for k in range(n):
                    length |= np.int64(uint8_at(at + k, 0)) << (8 * k)
                at += n
            length += 1
            if length > end - at or length > limit - out:
                return False
            if length <= 16 and end - at >= 16 and limit - out >= 16:  # more than needed: a known length is fast
                put_uint64(out, 0, uint64_at(at, 0))
                put_uint64(out + 8, 0, uint64_at(at + 8, 0))
            else:
                copy_bytes(out, at, length)
            at += length
            out += length
            continue
        n = 1 if tag & 3 == 1 else 2 if tag & 3 == 2 else 4
        if n > end - at:
            return False
        distance = np.int64(0)
        for k in range(n):
            distance |= np.int64(uint8_at(at + k, 0)) << (8 * k)
        at += n
        length = (tag >> 2) + 1
        if n == 1:
            length, distance = 4 + (tag >> 2 & 7), distance | (tag >> 5) << 8
        if distance == 0 or distance > out - target or length > limit - out:
            return False
        if distance >= 8 and limit - out >= length + 8:
            for k in range(0, length, 8):
                put_uint64(out + k, 0, uint64_at(out + k - distance, 0))
        else:
            for k in range(length):
                put_uint8(out + k, 0, uint8_at(out + k - distance, 0))
        out += length
    return bool(out == limit)
