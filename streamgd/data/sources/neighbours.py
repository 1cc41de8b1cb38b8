"""Arrays in the memory of another process of the same machine, read where they lie.

Dask sends what a worker needs through a socket, also from a process beside it: into memory that is new each time, which
costs more than anything else about it. Linux lets a process read the memory of others of its user
(``process_vm_readv``, see its manual page), some rows at a time into a buffer that is used again, at the speed of
memory.

What is read could have been freed meanwhile. So whoever shows arrays keeps them as long as its `Shown` lives, which
takes back a mark before it lets them go; and whoever reads looks at the mark afterwards. Rows that were read while it
stood are those that were shown.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.base import Array

#: Ranges that the system takes in one call.
_MOST_RANGES = 1024
#: What was shown in this process, by its mark.
_shown_here: weakref.WeakValueDictionary[int, Shown] = weakref.WeakValueDictionary()
#: Marks that were taken back must not become anything else, so these few bytes are kept as long as the process.
_marks: list[NDArray[np.uint64]] = []
_buffers = threading.local()


class UnreachableError(Exception):
    """What was shown is not there any more, or cannot be read from here."""


@dataclass(frozen=True)
class Owner:
    """Who shows arrays.

    Attributes
    ----------
    machine : str
        Where process numbers mean the same.
    process : int
        Its number.
    address : int
        Where the mark is.
    mark : int
        A number that nobody else has.
    """

    machine: str
    process: int
    address: int
    mark: int

    def answers(self) -> bool:
        """Whether what it shows can be read from this process, now."""
        if self.is_here:
            return self.mark in _shown_here
        if self.machine != this_machine() or _system_call() is None:
            return False
        try:
            self.check()
        except UnreachableError:
            return False
        return True

    @property
    def is_here(self) -> bool:
        """Whether it is this process."""
        return self.process == os.getpid() and self.machine == this_machine()

    def check(self) -> None:
        """See that the mark stands: then what was read before had been kept until then.

        Raises
        ------
        UnreachableError
            If it does not.
        """
        found = np.zeros(1, np.uint64)
        read_memory(self.process, [(self.address, found.nbytes)], found)
        if int(found[0]) != self.mark:
            raise UnreachableError(f"process {self.process} does not show its arrays any more")


class Shown:
    """Arrays that other processes of this machine may read, as long as this object lives.

    Parameters
    ----------
    blocks : mapping of int to sequence of ndarray
        By number, the arrays of each block. Blocks that cannot be read elsewhere, such as those of objects, are left
        out.

    Attributes
    ----------
    handles : dict of int to list of NeighbourArray
        What stands for them elsewhere.

    Notes
    -----
    Pickled, it is its handles alone. It copies nothing, but what it shows stays in memory as long as it does: a worker
    that moves its blocks to disk has room only once it has moved this there too, which takes the mark back.
    """

    def __init__(self, blocks: Mapping[int, Sequence[Any]]) -> None:
        mark = np.frombuffer(os.urandom(8), np.uint64) | np.uint64(1)
        _marks.append(mark)
        self._mark = mark
        owner = Owner(this_machine(), os.getpid(), mark.ctypes.data, int(mark[0]))
        self.blocks = {number: list(arrays) for number, arrays in blocks.items() if all(map(_can_be_shown, arrays))}
        self.handles = {
            number: [
                NeighbourArray(
                    owner,
                    (number, part),
                    array.ctypes.data,
                    array.shape,
                    array.dtype,
                    by_column=not array.flags.c_contiguous,
                )
                for part, array in enumerate(arrays)
            ]
            for number, arrays in self.blocks.items()
        }
        _shown_here[owner.mark] = self

    def __del__(self) -> None:
        """Take the mark back, before the arrays go."""
        self._mark[0] = 0

    def __reduce__(self) -> Any:
        """Leave the arrays where they are."""
        return Handles, (self.handles,)


@dataclass(frozen=True)
class Handles:
    """What stands for a `Shown` elsewhere; see there."""

    handles: dict[int, list[NeighbourArray]]


class NeighbourArray:
    """An array that a neighbour shows, sliced by rows.

    Parameters
    ----------
    owner : Owner
        The neighbour.
    place : tuple of int
        Number of the block, and of the array in it.
    address : int
        Where the first element lies.
    shape : tuple of int
        Of one axis, or two.
    dtype : numpy.dtype
        Of the elements, which are no objects.
    by_column : bool
        Whether columns lie one after the other, rather than rows.

    Attributes
    ----------
    reuse : bool
        Whether what a thread reads goes where it read the array before, in the same place of its block: for whoever
        is done with rows before the next are read. New memory costs more than what it is read into it for.
    """

    def __init__(
        self,
        owner: Owner,
        place: tuple[int, int],
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        by_column: bool,
    ) -> None:
        self.owner, self.shape, self.dtype, self.reuse = owner, shape, dtype, False
        self._place, self._address, self._by_column = place, address, by_column

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def here(self, *, reuse: bool = False) -> Any:
        """Return the array itself in the process that it lies in, else what reads it from there.

        Parameters
        ----------
        reuse : bool, default=False
            As the attribute.

        Raises
        ------
        UnreachableError
            If this is that process, which does not show it any more.
        """
        if not self.owner.is_here:
            found = copy(self)
            found.reuse = reuse
            return found
        shown = _shown_here.get(self.owner.mark)
        if shown is None:
            raise UnreachableError("this process does not show its arrays any more")
        number, part = self._place
        return shown.blocks[number][part]

    def __getitem__(self, rows: slice) -> Array:
        """Read consecutive rows; see `reuse` for where to.

        Raises
        ------
        UnreachableError
            If they cannot be read, or are not shown any more.
        """
        first, stop, _ = rows.indices(len(self))
        n = max(0, stop - first)
        width = self.shape[1] if self.ndim == 2 else 1
        n_bytes = n * width * self.dtype.itemsize
        found = (_buffer(self._place[1], n_bytes) if self.reuse else np.empty(n_bytes, np.uint8)).view(self.dtype)
        if self._by_column:
            found = found.reshape(width, n).T
            step = len(self) * self.dtype.itemsize
            starts = [self._address + column * step + first * self.dtype.itemsize for column in range(width)]
            ranges = [(start, n * self.dtype.itemsize) for start in starts]
        else:
            found = found.reshape(n, *self.shape[1:])
            row_bytes = width * self.dtype.itemsize
            ranges = [(self._address + first * row_bytes, n * row_bytes)]
        if n:
            read_memory(self.owner.process, ranges, found)
            self.owner.check()
        return found


def _can_be_shown(array: Any) -> bool:
    """Whether an array is nothing but numbers, or strings of one length, that lie together."""
    return (
        type(array) is np.ndarray
        and not array.dtype.hasobject
        and array.ndim in (1, 2)
        and (array.flags.c_contiguous or array.flags.f_contiguous)
    )


def read_memory(process: int, ranges: Sequence[tuple[int, int]], into: Array) -> None:
    """Read ranges of another process's memory, one after the other, into an array without gaps.

    Parameters
    ----------
    process : int
        Its number.
    ranges : sequence of (int, int)
        Address and bytes of each.
    into : ndarray
        Of as many bytes as all of them.

    Raises
    ------
    UnreachableError
        If not all can be read.
    """
    call = _system_call()
    if call is None:
        raise UnreachableError("this system does not let processes read one another")
    at = into.ctypes.data
    for start in range(0, len(ranges), _MOST_RANGES):
        some = ranges[start : start + _MOST_RANGES]
        n_bytes = sum(size for _, size in some)
        here = (_Range * 1)(_Range(at, n_bytes))
        there = (_Range * len(some))(*(_Range(*each) for each in some))
        if call(process, here, 1, there, len(some), 0) != n_bytes:
            why = os.strerror(ctypes.get_errno())
            raise UnreachableError(f"the memory of process {process} cannot be read: {why}")
        at += n_bytes


class _Range(ctypes.Structure):
    """What C calls an iovec."""

    _fields_ = (("address", ctypes.c_void_p), ("n_bytes", ctypes.c_size_t))


@cache
def _system_call() -> Any:
    """Return the C library's function that reads memory of other processes, if it has one."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None) if os.name == "posix" else None
    if call is not None:
        ranges, count = ctypes.POINTER(_Range), ctypes.c_ulong
        call.argtypes = (ctypes.c_int, ranges, count, ranges, count, count)
        call.restype = ctypes.c_ssize_t
    return call


@cache
def this_machine() -> str:
    """Return what tells this machine from others, since it was started, and containers whose processes differ."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return os.urandom(16).hex()  # nobody else's


def _buffer(part: int, n_bytes: int) -> NDArray[np.uint8]:
    """Return bytes of this thread's, the same ones for as long as they are enough."""
    buffers: dict[str, NDArray[np.uint8]] = _buffers.__dict__
    name = f"part-{part}"
    if name not in buffers or len(buffers[name]) < n_bytes:
        buffers[name] = np.empty(n_bytes, np.uint8)
    return buffers[name][:n_bytes]
