"""Runs of a few hundred rows with many windows, and what they come to, to the bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamgd.learn.recipe import Recipe
from streamgd.run.checkpoint import Checkpoint
from streamgd.run.config import Config
from streamgd.run.folder import RunFolder
from streamgd.run.lane_rows import LaneReader
from streamgd.run.runs import Run, prepare
from streamgd.run.session import begin, go_on
from tests.data.fake import FakeSource, layout_of

N_ROWS = 400
#: Room for windows of two blocks of 40 rows.
BUFFER = 7000


def data(n_rows: int = N_ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make a regression with features that are not scaled."""
    rng = np.random.default_rng(seed)
    X = rng.normal([2.0, -50.0, 0.0], [1.0, 10.0, 0.01], size=(n_rows, 3)).astype(np.float32)
    return X, X @ np.array([1.0, 0.2, -30.0]) + rng.normal(size=n_rows)


def source_of(block_rows: Sequence[int] = (40,) * 10, **options: Any) -> FakeSource:
    X, y = data(sum(block_rows))
    return FakeSource(block_rows, options.pop("X", X), options.pop("y", y), **options)


def config_of(**options: Any) -> Config:
    """Make a configuration of the options of both `Recipe` and `Config`: three epochs of five windows by default."""
    own = (
        "max_iter",
        "tol",
        "n_iter_no_change",
        "shuffle",
        "seed",
        "standardize",
        "class_weight",
        "buffer_bytes",
        "n_lanes",
    )
    chosen: dict[str, Any] = {"max_iter": 3, "tol": None, "buffer_bytes": BUFFER} | {
        n: options.pop(n) for n in own if n in options
    }
    return Config(recipe=Recipe(**{"batch_size": 32, **options}), **chosen)


def begin_small(
    config: Config | None = None,
    source: FakeSource | None = None,
    folder: RunFolder | None = None,
    *,
    window_rows: int | None = None,
    n_open: int = 3,
) -> Run:
    """Begin a run, in a folder if there is one; with a layout made by hand if `window_rows` is given."""
    source, config = source or source_of(), config or config_of()
    run = prepare(source, config) if folder is None else begin(folder, source, config)
    if window_rows is not None:
        run.layout = layout_of(source, window_rows=window_rows, n_open=n_open, shuffle=config.shuffle)
    return run


def resume_small(folder: RunFolder, config: Config | None = None, source: FakeSource | None = None) -> Run:
    """Go on with the run of a folder, over the same rows in another source."""
    return go_on(folder, source or source_of(), config, report=never)


def never(text: str) -> None:
    raise AssertionError(text)


def bits(run: Run) -> dict[str, Any]:
    """Return the state of a run, to the bit."""
    return bits_of(run.to_checkpoint())


def bits_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the arrays and words of a checkpoint, to the bit."""
    found: dict[str, Any] = {
        name: (array.dtype.str, array.shape, array.tobytes()) for name, array in checkpoint.tensors.items()
    }
    words = json.loads(json.dumps(checkpoint.meta))
    return found | {name: value for name, value in words.items() if name not in ("versions", "format")}


def saved(folder: RunFolder) -> dict[str, Any]:
    """Return what the newest checkpoint and the metrics of a folder say; clocks are left out."""
    checkpoint = folder.newest(never)
    assert checkpoint is not None
    return bits_of(checkpoint) | {"metrics": metrics(folder.path)}


def metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run folder; clocks are left out."""
    records = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key != "wall_s"} for record in records]


def settled(reader: LaneReader) -> LaneReader:
    """Wait until a lane's reader fills nothing more."""
    while True:
        with reader._lock:
            filling = reader._filling
        if filling is None:
            return reader
        filling.result()
