"""The order of slices: blocks dealt to lanes, and the walk through a lane's blocks, window by window."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled

#: Where each number lies in the state of a walk through an epoch.
NEXT_BLOCK, TURN, N_LIVE = range(3)


@compiled
def deal_blocks(order: NDArray[np.int32], block_rows: NDArray[np.int64], n_lanes: int) -> NDArray[np.int32]:
    """Give each block, in order, to the lane with the fewest rows so far, and return the lane of each."""
    rows = np.zeros(n_lanes, np.int64)
    lanes = np.empty(len(order), np.int32)
    for i in range(len(order)):
        lane = 0
        for k in range(1, n_lanes):
            if rows[k] < rows[lane]:
                lane = k
        lanes[i] = lane
        rows[lane] += block_rows[order[i]]
    return lanes


@compiled
def _step(
    order: NDArray[np.int32],
    block_rows: NDArray[np.int64],
    slots: NDArray[np.int64],
    walk: NDArray[np.int64],
    slice_rows: int,
    room: int,
) -> tuple[int, int, int]:
    """Take the next slice (block, start, rows) if it fits in `room` rows, else return 0 rows."""
    turn = walk[TURN]
    block, start = slots[turn, 0], slots[turn, 1]
    rows = min(slice_rows, block_rows[block] - start)
    if rows > room:
        return 0, 0, 0
    if start + rows < block_rows[block]:
        slots[turn, 1] = start + rows
        walk[TURN] = turn + 1
    elif walk[NEXT_BLOCK] < len(order):
        slots[turn, 0], slots[turn, 1] = order[walk[NEXT_BLOCK]], 0
        walk[NEXT_BLOCK] += 1
        walk[TURN] = turn + 1
    else:
        for k in range(turn, walk[N_LIVE] - 1):
            slots[k, 0], slots[k, 1] = slots[k + 1, 0], slots[k + 1, 1]
        walk[N_LIVE] -= 1
    if walk[TURN] >= walk[N_LIVE]:
        walk[TURN] = 0
    return block, start, rows


@compiled
def next_slices(
    order: NDArray[np.int32],
    block_rows: NDArray[np.int64],
    slots: NDArray[np.int64],
    walk: NDArray[np.int64],
    slice_rows: int,
    window_rows: int,
    out: NDArray[np.int64],
) -> int:
    """Walk through one window, write as many slices (block, start, rows) as `out` holds, and return their number."""
    n, room = 0, window_rows
    while walk[N_LIVE] > 0:
        block, start, rows = _step(order, block_rows, slots, walk, slice_rows, room)
        if rows == 0:
            break
        if n < len(out):
            out[n, 0], out[n, 1], out[n, 2] = block, start, rows
        n += 1
        room -= rows
    return n


@compiled
def skip_windows(
    order: NDArray[np.int32],
    block_rows: NDArray[np.int64],
    slots: NDArray[np.int64],
    walk: NDArray[np.int64],
    slice_rows: int,
    window_rows: int,
    most: int,
) -> int:
    """Walk through up to `most` windows (all that are left if negative) and return how many there were."""
    n = 0
    while walk[N_LIVE] > 0 and n != most:
        room = window_rows
        while walk[N_LIVE] > 0:
            rows = _step(order, block_rows, slots, walk, slice_rows, room)[2]
            if rows == 0:
                break
            room -= rows
        n += 1
    return n
