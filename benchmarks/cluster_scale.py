"""How far does a cluster scale? Simulated, from what a task and a state cost.

Time per round = the slowest worker's reading + the scheduler's tasks + moving the states to the merge + the merge. Each
worker reads and trains at 1 GB/s, a tenth of them up to 20 % slower in a round (drawn anew in each); there is one lane
for each worker, up to the most that there may be. Turns are as long as `streamgd.run.turns` says, and one worker plays
rounds by itself as long as `streamgd.run.pace` says. Before them workers and client read the targets: the survey.

    python benchmarks/cluster_scale.py [--task-ms 1.1] [--state-mb 0.02] [--network-mb 1000]
"""

from __future__ import annotations

import argparse

import numpy as np

from streamgd.run import pace, survey_shares
from streamgd.run.config import MOST_LANES
from streamgd.run.turns import Turns, longest

ROW_BYTES, TARGET_BYTES, BATCH_ROWS = 132, 8, 32  # 28 float32 features, target, identity, place
#: Of a round, whatever its size: the messages that follow each other.
FIXED_S = 0.006
#: Adding up a state, per byte.
MERGE_S_PER_BYTE = 4e-9


def epoch_seconds(n_bytes: float, n_workers: int, options: argparse.Namespace, rng: np.random.Generator) -> np.ndarray:
    """Return a first epoch's seconds: survey, one worker, all, straggling, tasks, states, merging; and its rounds."""
    n_lanes = min(n_workers, MOST_LANES)
    lane_rows = int(n_bytes / ROW_BYTES / n_lanes)
    turns = Turns(BATCH_ROWS, longest(n_lanes) // ROW_BYTES // BATCH_ROWS * BATCH_ROWS, lane_rows, n_lanes > 1)
    state = options.state_mb * 1e6
    row, spent, shared = 0, np.zeros(8), False
    n_shares = survey_shares._SHARES * n_workers
    spent[0] = n_bytes / ROW_BYTES * TARGET_BYTES / 1e9 / (n_workers + 1) + n_shares * options.task_ms / 1e3
    while row < lane_rows:
        end = min(turns.at(0, row).end, lane_rows)
        reading = (end - row) * ROW_BYTES / 1e9
        shared = shared or reading * (n_lanes - 1) > pace.shared_s(n_lanes)
        if not shared:
            spent += 0, reading * n_lanes, 0, 0, 0, 0, 0, 1
            row = end
            continue
        slow = 1 + 0.2 * rng.random(max(1, n_lanes // 10)).max()
        moving = 2 * n_lanes * state / (options.network_mb * 1e6)  # to the merge one after the other, and out again
        scheduling = FIXED_S + (n_lanes + 1) * options.task_ms / 1e3
        spent += 0, 0, reading, reading * (slow - 1), scheduling, moving, n_lanes * state * MERGE_S_PER_BYTE, 1
        row = end
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task-ms", type=float, default=1.1)
    parser.add_argument("--state-mb", type=float, nargs="+", default=[0.001, 1.0])
    parser.add_argument("--network-mb", type=float, default=1000.0)
    options = parser.parse_args()
    heads = "data", "workers", "state", "rounds", "epoch, s", "efficiency", "survey", "one alone", "reading", "slowest"
    print("|", *(f"{head} |" for head in (*heads, "tasks", "states", "merge")))
    print("|" + "---|" * (len(heads) + 3))
    for name, n_bytes in (("1 TB", 1e12), ("100 TB", 1e14)):
        for state_mb in options.state_mb:
            for n_workers in (10, 100, 1000):
                given = argparse.Namespace(**{**vars(options), "state_mb": state_mb})
                spent = epoch_seconds(n_bytes, n_workers, given, np.random.default_rng(0))
                total = spent[:7].sum()
                shares = " | ".join(f"{100 * part / total:.1f} %" for part in spent[:7])
                efficiency = n_bytes / 1e9 / n_workers / total
                cells = name, n_workers, f"{1000 * state_mb:g} kB", f"{spent[7]:,.0f}", f"{total:,.0f}"
                print("|", *(f"{cell} |" for cell in cells), f"{100 * efficiency:.0f} % | {shares} |")


if __name__ == "__main__":
    main()
