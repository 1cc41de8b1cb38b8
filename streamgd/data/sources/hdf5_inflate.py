"""Decompression of zlib's format by ISA-L, to memory that is there already.

The package isal decompresses to new memory only, whose pages the system has to clear first. The library inside it does
better. Where it can be reached, which is tried out first, its functions are called as its header igzip_lib.h says.
"""

from __future__ import annotations

import ctypes
import threading
import zlib
from functools import lru_cache
from typing import cast

import numpy as np
from isal import igzip_lib, isal_zlib

from streamgd.data.compiled.hdf5 import inflate
from streamgd.data.sources.buffers import Bytes

#: Room for ISA-L's state, four times what it takes today. Of what it does not take, the system gives no page.
_STATE_BYTES = 1 << 18
#: Room beyond what data should decompress to: isal doubles its memory when that is filled to the last byte.
_SLACK = 64
#: More is decompressed in pieces, from and to so many bytes: of what isal allocates in one piece, the system keeps as
#: much again for every thread that ever did.
_WHOLE_BYTES, _PIECE_BYTES, _PIECE_ROOM = 1 << 19, 1 << 16, 1 << 18
_ERROR = cast("type[Exception]", isal_zlib.error)

_of_thread = threading.local()


def inflate_to(data: Bytes, out: Bytes) -> Bytes | None:
    """Decompress.

    Parameters
    ----------
    data : ndarray of uint8
        In zlib's format; what comes after its end is left alone.
    out : ndarray of uint8
        Where to.

    Returns
    -------
    ndarray of uint8, or None
        The part of `out` that was filled. None if the data is damaged or becomes more than there is room for.
    """
    functions = _functions()
    if functions is None:
        return _inflate_by_package(data, out)
    n_bytes = inflate(*functions, _state(), data, out)
    return None if n_bytes < 0 else out[:n_bytes]


def _state() -> int:
    """Return the address of this thread's memory for ISA-L's state."""
    if not hasattr(_of_thread, "address"):
        _of_thread.state = np.zeros(_STATE_BYTES, np.uint8)
        _of_thread.address = int(_of_thread.state.ctypes.data)
    return cast(int, _of_thread.address)


@lru_cache(maxsize=1)
def _functions() -> tuple[int, int] | None:
    """Find ISA-L's functions, and try them out; None where they cannot be reached, or are not what they should be."""
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    try:
        library = ctypes.CDLL(igzip_lib.__file__)
        begin, run = (
            cast(int, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
            for name in ("isal_inflate_init", "isal_inflate_stateless")
        )
    except (OSError, AttributeError):
        return None
    values = np.random.default_rng(0).binomial(255, 0.1, 5000).astype(np.uint8)
    out = np.empty(len(values), np.uint8)
    for level in (0, 1, 9):  # as they are, by the format's own code, and by one of their own
        data = np.frombuffer(zlib.compress(values.tobytes(), level), np.uint8)
        if inflate(begin, run, _state(), data, out) != len(values) or (out != values).any():
            return None
    return begin, run


def _inflate_by_package(data: Bytes, out: Bytes) -> Bytes | None:
    """Decompress by what the package isal offers; costs up to a third more time."""
    try:
        found = _by_piece(data, out) if len(out) > _WHOLE_BYTES else _whole(data, out)
    except _ERROR:
        return None
    return found


def _whole(data: Bytes, out: Bytes) -> Bytes | None:
    found = np.frombuffer(isal_zlib.decompress(data, isal_zlib.MAX_WBITS, len(out) + _SLACK), np.uint8)
    return found if len(found) <= len(out) else None


def _by_piece(data: Bytes, out: Bytes) -> Bytes | None:
    inflating = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_ZLIB)
    done, target = 0, out.data
    for at in range(0, len(data), _PIECE_BYTES):
        piece: Bytes | bytes = data[at : at + _PIECE_BYTES]
        while not inflating.eof and (len(piece) or not inflating.needs_input):
            found = inflating.decompress(piece, _PIECE_ROOM)
            if done + len(found) > len(target):
                return None
            target[done : done + len(found)] = found
            done += len(found)
            piece = b""
    return out[:done] if inflating.eof else None
