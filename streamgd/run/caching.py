"""The windows of a run: from the source, and from its cache where there is to be one.

A run with a cache reads its first epoch in the order of the source's own blocks, and the cache is written meanwhile;
later epochs read the cache in small blocks. Where the source's blocks mix poorly, the cache is written before the first
update instead, and every epoch reads it. Which of the two follows from metadata alone, and a cache's content from the
data: a run gives the same bits whether it writes its cache, finds it there, or loses it and writes it again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from streamgd.data.cache import Cache, Written
from streamgd.data.cache_writer import CacheWriter
from streamgd.data.layout import Layout, format_bytes, mixing, plan_layout
from streamgd.data.prefetch import END, Ended
from streamgd.data.sources.base import Source
from streamgd.data.targets import TargetCodec
from streamgd.data.window import Window
from streamgd.data.window_stream import WindowStream
from streamgd.errors import CacheError, CorruptDataError, ResumeError

if TYPE_CHECKING:
    from streamgd.run.config import Config, RunOptions
    from streamgd.run.runs import Run

Report = Callable[[str], None]

#: How long to wait before looking again whether somebody else has written the cache.
_LOOK_S = 0.1


@dataclass(frozen=True)
class Cached:
    """How a run reads its cache; stored in checkpoints, because the order of rows follows from it.

    Attributes
    ----------
    first_epoch : int
        The first epoch that is read in the cache's blocks: 0, or 1 where the source's own mix well.
    part_rows : int
        Rows of those blocks.
    layout : Layout
        The memory plan for them.
    """

    first_epoch: int
    part_rows: int
    layout: Layout

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"first_epoch": self.first_epoch, "part_rows": self.part_rows, "layout": self.layout.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Undo `to_json`."""
        return cls(int(values["first_epoch"]), int(values["part_rows"]), Layout.from_json(values["layout"]))


def plan_cached(source: Source, config: Config, codec: TargetCodec, layout: Layout) -> Cached:
    """Plan how a run reads a cache, from metadata alone.

    Parameters
    ----------
    source : Source
        What is to be cached.
    config : Config
        What defines the run.
    codec : TargetCodec
        How targets become numbers.
    layout : Layout
        How the source itself is read.
    """
    cache = Cache(os.curdir, source, codec)
    plan = plan_layout(
        cache.as_planned(),
        config.buffer_bytes,
        n_outputs=layout.n_outputs,
        carry_rows=config.batch_rows(source.n_rows),
        shuffle=config.shuffle,
    )
    poor = mixing(source, layout).verdict == "poor"
    return Cached(0 if poor else 1, cache.part_rows, plan)


class RunWindows:
    """The windows of a run from its cursor on, in order, read ahead; see `streamgd.data.window_stream.WindowStream`.

    Parameters
    ----------
    run : Run
        Its ``cached`` is planned here if it begins now and a cache is asked for, and set to None if the cache has to be
        given up before a row was read from it.
    options : RunOptions
        Threads, and where the cache lies.
    report : callable
        Told what happens to the cache that it should not.
    note : callable
        Told what the cache takes, before it is written.

    Raises
    ------
    ResumeError
        If the run was begun with a cache, and none is given.
    """

    def __init__(self, run: Run, options: RunOptions, report: Report, note: Report) -> None:
        self._run, self._options, self._report = run, options, report
        self._stream: WindowStream | None = None
        self._writer: CacheWriter | None = None
        self._ended: list[CacheWriter] = []  # closed when no thread may write any more
        self._fresh: Source | None = None  # the cache that this run wrote, on disk or not yet
        self._filling = self._waits = False
        self._at: tuple[int, int] = run.state.cursor[:2]
        self._until = run.n_epochs
        self._done = [0.0, 0.0, 0]  # of streams that have ended: seconds waited and filled, bytes read
        if options.cache is not None and run.cached is None:
            if run.state.cursor == (0, 0, 0):
                run.cached = plan_cached(run.source, run.config, run.survey.codec, run.layout)
            else:
                report("this run goes on without a cache, as it was begun or since its cache had to be given up")
        self._cache: Cache | None = None
        if run.cached is not None:
            if options.cache is None:
                raise ResumeError(
                    "the run was begun with a cache, which the order of its rows follows from: give it a folder for "
                    "one again (cache=…, --cache); it is written anew if it is not there"
                )
            self._cache = Cache(options.cache, run.source, run.survey.codec, part_rows=run.cached.part_rows)
            if not self._cache.is_whole:
                note(needs(self._cache))
                if run.cached.first_epoch == 0 and run.state.cursor == (0, 0, 0):
                    note("it is written before the first update, because the blocks of the data would mix poorly")
            else:
                note(f"reading the cache in {self._cache.path}")

    def get(self, timeout_s: float) -> Window | Ended | None:
        """Return the next window; see `WindowStream.get`. None also while the cache is being written."""
        if self._stream is None and not self._enter():
            time.sleep(min(timeout_s, _LOOK_S))
            return None
        assert self._stream is not None
        found = self._stream.get(timeout_s)
        if self._writer is not None and self._writer.error is not None:
            self._give_up(self._writer)
        if isinstance(found, Window) and found.last and self._writer is not None:
            self._finish(self._writer, found.index)  # before the epoch's checkpoint, which tells how this went
        if self._filling or (found is END and self._until < self._run.n_epochs):
            if found is END or (self._filling and self._writer is None):
                self._at = self._at if self._filling else (self._until, 0)
                self._end_stream()
            return None
        return found

    def _enter(self) -> bool:
        """Begin to read what comes next; False if it has to be waited for: others write the cache, or it is checked."""
        run, (epoch, window) = self._run, self._at
        self._filling, self._until = False, run.n_epochs
        if self._fresh is not None:
            lost = self._ended[-1].lost
            if lost is None:
                return False
            if lost:  # it is written once more
                self._fresh = None
                self._close_writers()
        if self._cache is None or run.cached is None:
            self._open_stream(run.source, run.layout, (epoch, window))
        elif epoch < run.cached.first_epoch:
            self._until = min(run.cached.first_epoch, run.n_epochs)
            found = self._open(self._cache, as_source=True)
            if found is None and (window == 0 or run.written is not None):
                self._writer = run.writer = self._begin(self._cache, run.written if window else None)
            self._open_stream(found or run.source, run.layout, (epoch, window))
        elif (found := self._fresh or self._open(self._cache, as_source=False)) is not None:
            self._open_stream(found, run.cached.layout, (epoch, window))
        else:
            self._writer = self._begin(self._cache, None)
            if self._writer is None:
                self._wait_for(self._cache)
                return False
            self._filling, self._until = True, 1
            self._open_stream(run.source, run.layout, (0, 0))
        return True

    def _open_stream(self, source: Source, layout: Layout, first: tuple[int, int]) -> None:
        run = self._run
        scaling = run.survey.scaling if run.config.standardize and not self._filling else None
        coded = self._cache is not None and self._cache.coded and source is not run.source
        self._stream = WindowStream(
            source,
            layout,
            TargetCodec(None, 1) if coded else run.survey.codec,  # classes are told apart when the cache is written
            seed=run.config.seed,
            shuffle=run.config.shuffle,
            shift=None if scaling is None else scaling.mean,
            factor=None if scaling is None else scaling.factor,
            first=first,
            n_epochs=self._until,
            n_threads=self._options.n_threads,
            keep=self._writer,
        )

    # --- the cache ---
    def _open(self, cache: Cache, *, as_source: bool) -> Source | None:
        if not cache.is_whole:
            return None
        try:
            return cache.open(as_source=as_source)
        except CorruptDataError as err:
            self._report(str(err))
            return None

    def _begin(self, cache: Cache, written: Written | None) -> CacheWriter | None:
        """Begin to write the cache; None if somebody else is at it, or it has to be given up."""
        if written is not None and (changed := cache.changed_since(written.stamp)) is not None:
            self._report(f"what there is of the cache in {cache.path} is not used: {changed}. It is written anew")
            return None
        try:
            return cache.begin(written)
        except OSError as err:
            self._drop(f"{cache.path}: {err.strerror or err}")
            return None

    def _wait_for(self, cache: Cache) -> None:
        if self._cache is not None and not cache.is_whole and not self._waits:
            self._waits = True
            self._report(f"waiting for another process, which writes the cache in {cache.path}")

    def _finish(self, writer: CacheWriter, last_window: int) -> None:
        """End writing: what is written can be read from now on."""
        found = writer.finish(last_window)
        if found is None and writer.error is not None:
            self._give_up(writer)
            return
        self._ended.append(writer)
        self._writer = self._run.writer = None
        if found is None:  # not all rows are there: it will be written once more
            writer.keeps_rest = False
        elif self._run.cached is not None:
            self._fresh = found

    def _give_up(self, writer: CacheWriter) -> None:
        """Stop writing, because it failed."""
        self._ended.append(writer)
        self._writer = self._run.writer = None
        self._drop(writer.why())

    def _drop(self, why: str) -> None:
        """Go on without the cache, or refuse to where rows in its order were trained on already."""
        run = self._run
        assert run.cached is not None
        if run.state.cursor > (run.cached.first_epoch, 0, 0):
            raise CacheError(
                f"the cache of the run is not there, and cannot be written again: {why}. Its rows come in an order "
                "that only the cache has: make room, or give it another folder, and resume"
            )
        self._report(f"no cache: {why}; the run goes on without, in the order of the source's blocks")
        run.cached = self._cache = None

    # --- the stream ---
    def _end_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
            self._done = [a + b for a, b in zip(self._done, _figures(stream), strict=True)]
        if self._fresh is None:  # whoever writes the cache anew needs the lock
            self._close_writers()

    def _close_writers(self) -> None:
        while self._ended:
            writer = self._ended.pop()
            writer.close()
            if writer.error is not None and self._fresh is not None:
                self._report(f"the cache will not be found by others: {writer.why()}")

    @property
    def wait_s(self) -> float:
        """Seconds that the consumer has waited for windows."""
        return self._done[0] + (0.0 if self._stream is None else self._stream.wait_s)

    @property
    def fill_s(self) -> float:
        """Seconds spent filling windows, whether somebody waited or not."""
        return self._done[1] + (0.0 if self._stream is None else self._stream.fill_s)

    @property
    def read_bytes(self) -> int:
        """Bytes of storage behind the rows read so far."""
        return int(self._done[2]) + (0 if self._stream is None else self._stream.read_bytes)

    def close(self) -> None:
        """Stop and join every thread; a cache that nobody can go on with is removed. Idempotent."""
        stream, self._stream = self._stream, None
        if self._writer is not None:
            self._ended.append(self._writer)
            self._writer = self._run.writer = None
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_writers)
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        """Return the windows themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        self.close()


def needs(cache: Cache) -> str:
    """Say what a cache takes, before anything is written."""
    return (
        f"the cache takes {format_bytes(cache.needed_bytes)} in {cache.path}, where {format_bytes(cache.free_bytes())} "
        "are free"
    )


def _figures(stream: WindowStream) -> tuple[float, float, int]:
    return stream.wait_s, stream.fill_s, stream.read_bytes


def cache_folder(path: str | os.PathLike[str] | None) -> str | None:
    """Return where a cache lies, to be written down."""
    return None if path is None else str(Path(path).absolute())
