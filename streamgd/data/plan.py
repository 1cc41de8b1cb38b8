"""The order of rows: which slices make up each window, and each row's place. Pure: no files, no clock, no threads.

Order is a function of (rows of each block, layout, seed, epoch, lane) alone:

1. Blocks are permuted and dealt to the lanes, each to the lane with the fewest rows so far, once for the run: a lane
   has the same blocks in every epoch, so that whoever takes its turns need read, cache or fetch no others. An epoch
   permutes the blocks anew, and a lane takes its own in that order.
2. A lane keeps up to ``n_open`` blocks open, in slots. A window takes the next ``slice_rows`` rows (or what the block
   has left) from each slot in turn. A finished block's slot goes to the next block of the order; when there is none,
   the slot is gone. The window ends when the next slice would not fit, or no rows are left; the next window goes on
   with that slot. Slices therefore start at multiples of ``slice_rows`` in their block.
3. Within a window, rows are permuted.

If one window holds everything, blocks stay in file order: the window's permutation mixes all rows anyway. Without
shuffling there is one slot, blocks are taken in file order and rows keep their order.

Random numbers are the raw stream of ``numpy.random.Philox(SeedSequence(seed, spawn_key))``, with the spawn key
``(0,)`` for the deal, ``(epoch, 0)`` for the order of blocks and ``(epoch, 1 + lane, 1 + window)`` for the places in a
window, turned into permutations by `streamgd.data.compiled.shuffle.permute`. NumPy promises to keep that stream, but
not `Generator.permutation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamgd.data.layout import (
    Layout,
    Mixing,
    format_bytes,
    mixing,
    parse_bytes,
    plan_layout,
)
from streamgd.errors import OptionError

__all__ = [
    "EpochPlan",
    "Layout",
    "Mixing",
    "SliceRef",
    "WindowPlan",
    "checked_seed",
    "checksum_of",
    "format_bytes",
    "lanes_of_blocks",
    "mixing",
    "parse_bytes",
    "plan_layout",
    "rows_of_lanes",
]


_NO_KEY = np.empty(0, np.uint64)


class SliceRef(NamedTuple):
    """Consecutive rows of a block.

    Attributes
    ----------
    block : int
        Index of the block.
    start : int
        First row in the block.
    n_rows : int
        Rows.
    """

    block: int
    start: int
    n_rows: int


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """What a window is filled with.

    Attributes
    ----------
    seed, epoch, lane, index : int
        Where the window belongs; `index` counts the windows of the lane's epoch.
    table : ndarray of shape (n_slices, 3), int64
        Block, start and rows of each slice, in the order of their rows in the window before it is permuted.
    n_rows : int
        Rows of all slices.
    last : bool
        Whether the lane's epoch ends with this window.
    shuffle : bool
        Whether rows are permuted.
    """

    seed: int
    epoch: int
    lane: int
    index: int
    table: NDArray[np.int64]
    n_rows: int
    last: bool
    shuffle: bool

    @property
    def slices(self) -> tuple[SliceRef, ...]:
        """The slices, one by one."""
        return tuple(SliceRef(*entry) for entry in self.table.tolist())

    def opened_blocks(self) -> tuple[int, ...]:
        """List the blocks that are begun in this window, in order."""
        return tuple(self.table[self.table[:, 1] == 0, 0].tolist())

    def places(self, out: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
        """Return the place in the window of each row that the slices give, one slice after the other.

        Parameters
        ----------
        out : ndarray of at least `n_rows` int32, default=None
            Memory to use; a view of it is returned.
        """
        from streamgd.data.compiled.shuffle import draw_places

        found = np.empty(self.n_rows, np.int32) if out is None else out[: self.n_rows]
        draw_places(self.key, found)
        return found

    @property
    def key(self) -> NDArray[np.uint64]:
        """What `streamgd.data.compiled.shuffle.draw_places` draws the places from; empty if rows keep their order."""
        return _key(self.seed, self.epoch, 1 + self.lane, 1 + self.index) if self.shuffle else _NO_KEY


class EpochPlan:
    """The windows of one lane's epoch.

    Parameters
    ----------
    block_rows : ndarray of shape (n_blocks,), int64
        Rows of each block of the source; none is empty.
    layout : Layout
        The memory plan.
    seed : int
        Any non-negative number.
    epoch : int
        Counted from 0.
    shuffle : bool, default=True
        Whether rows are shuffled.
    lane, n_lanes : int, default=0 and 1
        Which part of the blocks, of how many. A lane may be empty where there are fewer blocks than lanes.

    Attributes
    ----------
    n_rows : int
        Rows of the lane's epoch.
    blocks : ndarray of int32
        The lane's blocks in the order in which they are opened.

    Notes
    -----
    Made in a fraction of a second for a million blocks; windows are worked out one at a time, and going to any of them
    takes a walk through the slices before it, at some nanoseconds each.
    """

    def __init__(
        self,
        block_rows: NDArray[np.int64],
        layout: Layout,
        *,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        lane: int = 0,
        n_lanes: int = 1,
    ) -> None:
        if not 0 <= lane < n_lanes:
            raise OptionError(f"lane {lane} of {n_lanes}: expected 0 <= lane < n_lanes")
        if layout.slice_rows > layout.window_rows:
            raise OptionError(
                f"a layout with slices of {layout.slice_rows:,} rows in windows of {layout.window_rows:,} cannot be "
                "read; make layouts with plan_layout"
            )
        self.block_rows = np.ascontiguousarray(block_rows, np.int64)
        self.layout = layout
        self.seed = checked_seed(seed)
        self.epoch = epoch
        self.lane = lane
        self.shuffle = shuffle
        blocks = np.arange(len(block_rows), dtype=np.int32)
        if shuffle and len(blocks) > 1 and (n_lanes > 1 or int(self.block_rows.sum()) > layout.window_rows):
            _permute(blocks, self.seed, epoch, 0)
        if n_lanes > 1:
            blocks = blocks[lanes_of_blocks(self.block_rows, n_lanes, self.seed, shuffle=shuffle)[blocks] == lane]
        self.blocks = blocks
        self.n_rows = int(self.block_rows[blocks].sum())

    @cached_property
    def n_windows(self) -> int:
        """Number of windows; takes a walk through all slices, without making them."""
        slots, walk = self._start()
        return self._skip(slots, walk, -1)

    @cached_property
    def checksum(self) -> int:
        """What the identities of the lane's rows add up to, see `checksum_of`."""
        from streamgd.data.compiled.checksums import sum_identities

        return int(sum_identities(self.blocks.astype(np.int64), self.block_rows[self.blocks]))

    def windows(self, first: int = 0) -> Iterator[WindowPlan]:
        """Work out the windows one after the other.

        Parameters
        ----------
        first : int, default=0
            Window to begin with; none are given if there are no more than that.
        """
        from streamgd.data.compiled.slices import N_LIVE, next_slices

        slots, walk = self._start()
        window = self._skip(slots, walk, first) if first else 0
        sizes, none = (self.layout.slice_rows, self.layout.window_rows), np.empty((0, 3), np.int64)
        while walk[N_LIVE]:
            count = next_slices(self.blocks, self.block_rows, slots.copy(), walk.copy(), *sizes, none)
            table = np.empty((count, 3), np.int64)
            next_slices(self.blocks, self.block_rows, slots, walk, *sizes, table)
            yield WindowPlan(
                seed=self.seed,
                epoch=self.epoch,
                lane=self.lane,
                index=window,
                table=table,
                n_rows=int(table[:, 2].sum()),
                last=bool(walk[N_LIVE] == 0),
                shuffle=self.shuffle,
            )
            window += 1

    def blocks_left(self, window: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """List the blocks that windows from some window on take rows of, in the order of their turns.

        Returns
        -------
        blocks : ndarray of int64
            The blocks.
        rows : ndarray of int64
            The first row of each that is still to come; 0 for those not begun.
        """
        from streamgd.data.compiled.slices import N_LIVE, NEXT_BLOCK, TURN

        slots, walk = self._start()
        if window:
            self._skip(slots, walk, window)
        live = np.roll(slots[: walk[N_LIVE]], -int(walk[TURN]), axis=0)
        rest = self.blocks[walk[NEXT_BLOCK] :]
        return np.concatenate([live[:, 0], rest]), np.concatenate([live[:, 1], np.zeros(len(rest), np.int64)])

    def window_at(self, row: int) -> tuple[int, int]:
        """Find the window of a row of the lane's epoch.

        Parameters
        ----------
        row : int
            Counted through the lane's windows; those from `n_rows` on are in no window, and the number of windows is
            given.

        Returns
        -------
        window, before : int
            Its index, and the rows of all windows before it.
        """
        window = before = 0
        while (more := (row - before) // self.layout.window_rows) > 0 and before < self.n_rows:
            window += more  # no window has more rows than that, many have fewer
            before = self._rows_before(window)
        for plan in self.windows(window):
            if row < before + plan.n_rows:
                return window, before
            window, before = window + 1, before + plan.n_rows
        return self.n_windows, self.n_rows

    def _rows_before(self, window: int) -> int:
        from streamgd.data.compiled.slices import N_LIVE, NEXT_BLOCK

        slots, walk = self._start()
        self._skip(slots, walk, window)
        live = slots[: walk[N_LIVE]]
        left = int((self.block_rows[live[:, 0]] - live[:, 1]).sum())
        return int(self.block_rows[self.blocks[: walk[NEXT_BLOCK]]].sum()) - left

    def _start(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Put the first blocks in the slots: (block, next row) of each, and the walk's state."""
        n_slots = min(self.layout.n_open if self.shuffle else 1, len(self.blocks))
        slots = np.zeros((n_slots, 2), np.int64)
        slots[:, 0] = self.blocks[:n_slots]
        return slots, np.array([n_slots, 0, n_slots], np.int64)

    def _skip(self, slots: NDArray[np.int64], walk: NDArray[np.int64], n_windows: int) -> int:
        from streamgd.data.compiled.slices import skip_windows

        layout = self.layout
        return int(
            skip_windows(self.blocks, self.block_rows, slots, walk, layout.slice_rows, layout.window_rows, n_windows)
        )


def checksum_of(block_rows: NDArray[np.int64]) -> int:
    """Add up the hashed identities of every row of a source, modulo 2**64.

    What an epoch's rows must add up to, in whatever order they came. Takes about half a second for a billion rows.
    """
    from streamgd.data.compiled.checksums import sum_identities

    rows = np.ascontiguousarray(block_rows, np.int64)
    return int(sum_identities(np.arange(len(rows), dtype=np.int64), rows))


def rows_of_lanes(block_rows: NDArray[np.int64], n_lanes: int, seed: int, *, shuffle: bool) -> NDArray[np.int64]:
    """Count the rows of each lane's epochs; see `EpochPlan`."""
    lanes = lanes_of_blocks(block_rows, n_lanes, seed, shuffle=shuffle)
    return np.bincount(lanes, block_rows, n_lanes).astype(np.int64)


def lanes_of_blocks(block_rows: NDArray[np.int64], n_lanes: int, seed: int, *, shuffle: bool) -> NDArray[np.int32]:
    """Return the lane of each block; see `EpochPlan`."""
    from streamgd.data.compiled.slices import deal_blocks

    block_rows, seed = np.ascontiguousarray(block_rows, np.int64), checked_seed(seed)
    order = np.arange(len(block_rows), dtype=np.int32)
    if shuffle:
        _permute(order, seed, 0)
    lanes = np.empty_like(order)
    lanes[order] = deal_blocks(order, block_rows, n_lanes)
    return lanes


def _permute(out: NDArray[np.int32], seed: int, *spawn_key: int) -> None:
    from streamgd.data.compiled.shuffle import permute

    permute(_key(seed, *spawn_key), out)


def _key(seed: int, *spawn_key: int) -> NDArray[np.uint64]:
    """Return the key of a stream of random numbers, as Philox seeds itself."""
    key = np.random.SeedSequence(seed, spawn_key=spawn_key).generate_state(2, np.uint64)
    return key.astype(np.uint64, copy=False)


def checked_seed(seed: int) -> int:
    """Return a seed as an int.

    Raises
    ------
    OptionError
        If it is not a whole number from 0 on.
    """
    try:
        number = index(seed)
    except TypeError as err:
        raise OptionError(f"seed {seed!r} of type {type(seed).__name__}: expected a whole number from 0 on") from err
    if number < 0:
        raise OptionError(f"seed {seed!r}: expected a whole number from 0 on")
    return number
