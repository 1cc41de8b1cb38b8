"""Shuffled batches for somebody else's model, with a state that resumes at the exact row handed out.

The same windows that train streamgd's own models, cut into batches that the caller owns::

    with streamgd.stream(open_source("data.parquet", target="y"), batch_size=512, n_epochs=3) as batches:
        for X, y in batches:
            model.partial_fit(X, y)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import index
from pathlib import PurePath
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from streamgd.data.classes import ClassCounter
from streamgd.data.plan import Layout, checked_seed, checksum_of, format_bytes, parse_bytes, plan_layout
from streamgd.data.sources.base import Source
from streamgd.data.targets import TargetCodec
from streamgd.data.window import Window
from streamgd.data.window_stream import WindowStream
from streamgd.errors import NonFiniteError, OptionError, ResumeError, RowAccountingError

Array = NDArray[Any]

_STATE_VERSION = 1


def stream(
    source: Any,
    *,
    batch_size: int = 256,
    seed: int = 0,
    buffer: str | int = "256MB",
    shuffle: bool = True,
    n_epochs: int | None = 1,
    drop_last: bool = False,
    n_threads: int | None = None,
) -> Stream:
    """Iterate over shuffled batches of a source.

    Parameters
    ----------
    source : Source, pair of arrays, or whatever `open_source` takes alone
        ``(X, y)`` is a pair of arrays; a path that needs ``target=`` is opened with `open_source` first.
    batch_size : int, default=256
        Rows of a batch.
    seed : int, default=0
        Any non-negative number; determines the order together with the source's blocks, `buffer` and the epoch.
    buffer : str or int, default="256MB"
        Memory to shuffle in.
    shuffle : bool, default=True
        False gives the rows in file order.
    n_epochs : int or None, default=1
        Passes over the rows, each in another order; None goes on for ever.
    drop_last : bool, default=False
        Whether to leave out the last batch of an epoch if it is shorter than the others.
    n_threads : int or None, default=None
        Threads that read; default: one for each processor. The batches do not depend on it.

    Returns
    -------
    Stream
        An iterator and context manager.

    Raises
    ------
    BufferTooSmallError
        If the buffer is too small for the source; says how much is needed.
    OptionError
        If an option cannot be used.
    """
    opened = not isinstance(source, Source)
    return Stream(
        _open(source) if opened else source,
        batch_size=batch_size,
        seed=seed,
        buffer=buffer,
        shuffle=shuffle,
        n_epochs=n_epochs,
        drop_last=drop_last,
        n_threads=n_threads,
        owns_source=opened,
    )


class Stream:
    """Batches in order; made by `stream`.

    Yields ``(X, y)``, ``(X, y, weight)`` if the source has weights, or X alone without a target: arrays of at most
    `batch_size` rows that belong to the caller. X is in the data's units and in the row dtype, y as it is stored
    (labels as labels), weight in float64. Batches run on from window to window; an epoch ends with a batch of the rows
    that are left.

    Parameters
    ----------
    source : Source
        What is read.
    batch_size, seed, buffer, shuffle, n_epochs, drop_last, n_threads
        See `stream`.
    owns_source : bool, default=False
        Whether `close` closes the source too.

    Attributes
    ----------
    source : Source
        What is read.
    layout : Layout
        The memory plan.
    epoch : int
        The epoch of the next batch, counted from 0.

    Notes
    -----
    Like every iterator it can be gone through once; `n_epochs` asks for several passes, and ``len`` is the number of
    batches in each. Text targets cost a pass over the target column before the first batch. At the end of each epoch
    the rows handed out are compared with the source's; a row lost or repeated is a `RowAccountingError`.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int = 256,
        seed: int = 0,
        buffer: str | int = "256MB",
        shuffle: bool = True,
        n_epochs: int | None = 1,
        drop_last: bool = False,
        n_threads: int | None = None,
        owns_source: bool = False,
    ) -> None:
        self.source = source
        self._batch_size = _count("batch_size", batch_size)
        self._n_epochs = None if n_epochs is None else _count("n_epochs", n_epochs)
        self._n_threads = None if n_threads is None else _count("n_threads", n_threads)
        self._seed = checked_seed(seed)
        self._shuffle = bool(shuffle)
        self._drop_last = bool(drop_last)
        self._buffer_bytes = parse_bytes(buffer)
        self._owns_source = owns_source
        if self._drop_last and self._batch_size > source.n_rows:
            raise OptionError(
                f"batch_size={self._batch_size:,} with drop_last=True leaves nothing of {source.n_rows:,} rows: choose "
                "a smaller batch, or keep the last one"
            )
        numeric = source.target is not None and (source.target.numeric or _number_dtype(source.target.dtype))
        self._n_outputs = 0 if source.target is None else source.target.n_outputs if numeric else 1
        self._numeric = bool(numeric)
        self.layout = plan_layout(
            source,
            self._buffer_bytes,
            n_outputs=self._n_outputs,
            carry_rows=min(self._batch_size, source.n_rows),
            shuffle=self._shuffle,
        )
        self._codec: TargetCodec | None = None
        self._expected = checksum_of(source.block_rows)
        self._windows: WindowStream | None = None
        self._current: Window | None = None
        self._closed = False
        # The cursor: everything before it has been handed out.
        self.epoch = 0
        self._window = 0
        self._row = 0
        self._n_seen = 0
        self._checksum = 0

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        n_rows = self.source.n_rows
        return n_rows // self._batch_size if self._drop_last else -(-n_rows // self._batch_size)

    def __iter__(self) -> Self:
        """Return the stream itself."""
        return self

    def __next__(self) -> Any:
        """Return the next batch.

        Raises
        ------
        DataError
            If the data cannot be used; the next call tries again at the same row.
        RowAccountingError
            If an epoch did not hand out every row exactly once.
        """
        if self._closed:
            raise OptionError("the stream is closed: make another, and load_state_dict() to go on where it stood")
        while self._n_epochs is None or self.epoch < self._n_epochs:
            left = self.source.n_rows - self._n_seen
            try:
                batch = self._take(min(self._batch_size, left))
            except BaseException:
                self._stop()  # what was read of the batch is lost, and would be missing: begin again at the cursor
                raise
            if left >= self._batch_size or not self._drop_last:
                return batch
        self._stop()
        raise StopIteration

    def _take(self, n_rows: int) -> Any:
        """Copy the next rows, then move the cursor past them."""
        if self._windows is None:
            self._start()
        window, row = self._next_window() if self._current is None else self._current, self._row
        if row > window.n_rows:
            raise ResumeError(f"the state stands at row {row:,} of a window of {window.n_rows:,}: it is damaged")
        X = np.empty((n_rows, self.source.n_features), self.source.row_dtype)
        codes = np.empty((n_rows, self._n_outputs))
        weight = np.empty(n_rows) if window.weight is not None else None
        checksum, done = self._checksum, 0
        while done < n_rows:
            if row == window.n_rows:
                if window.last:
                    raise self._miscounted(f"the epoch ended after {self._n_seen + done:,} rows")
                window, row = self._next_window(), 0
            n = min(n_rows - done, window.n_rows - row)
            here, there = slice(row, row + n), slice(done, done + n)
            X[there], codes[there] = window.X[here], window.y[here]
            if weight is not None and window.weight is not None:
                weight[there] = window.weight[here]
            checksum = (checksum + int(window.ids[here].sum(dtype=np.uint64))) % 2**64
            done, row = done + n, row + n
        self._advance(window, row, n_rows, checksum)
        return self._as_batch(X, codes, weight)

    def _advance(self, window: Window, row: int, n_rows: int, checksum: int) -> None:
        n_seen = self._n_seen + n_rows
        if n_seen == self.source.n_rows:
            if not (window.last and row == window.n_rows):
                raise self._miscounted("there were more rows than that")
            if checksum != self._expected:
                raise self._miscounted("some rows came twice and others not at all")
            self.epoch, self._window, self._row, self._n_seen, self._checksum = self.epoch + 1, 0, 0, 0, 0
            self._current = None
        else:
            edge = row == window.n_rows
            self._window, self._row = (window.index + 1, 0) if edge else (window.index, row)
            self._n_seen, self._checksum = n_seen, checksum
            self._current = None if edge else window

    def _miscounted(self, what: str) -> RowAccountingError:
        return RowAccountingError(
            f"epoch {self.epoch} of {self.source.name}: expected each of {self.source.n_rows:,} rows once, but {what}. "
            "Either the data changed while it was read, or this is a bug in streamgd"
        )

    def _as_batch(self, X: Array, codes: Array, weight: Array | None) -> Any:
        if self._codec is None or self.source.target is None:
            return X if weight is None else (X, weight)
        y = self._codec.decode(codes)
        if self.source.target.is_vector:
            y = y.reshape(-1)
        return (X, y) if weight is None else (X, y, weight)

    def _start(self) -> None:
        """Begin reading at the cursor."""
        if self._codec is None and self.source.target is not None:
            self._codec = (
                TargetCodec(None, self._n_outputs, _number_dtype(self.source.target.dtype))
                if self._numeric
                else find_classes(self.source)
            )
        self._windows = WindowStream(
            self.source,
            self.layout,
            self._codec,
            seed=self._seed,
            shuffle=self._shuffle,
            first=(self.epoch, self._window),
            n_epochs=self._n_epochs,
            n_threads=self._n_threads,
        )

    def _next_window(self) -> Window:
        assert self._windows is not None
        window = self._windows.get()
        if not isinstance(window, Window):
            raise self._miscounted("there are no more windows")
        return window

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, as JSON values.

        Returns
        -------
        dict
            Epoch, window and row of the next row to be handed out; what was handed out of this epoch; the layout,
            the options and the fingerprint of the data.
        """
        return {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "window": self._window,
            "row": self._row,
            "n_seen": self._n_seen,
            "checksum": f"{self._checksum:016x}",
            "layout": self.layout.to_json(),
            "options": self._options(),
            "fingerprint": _as_json(self.source.fingerprint),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream stood.

        Parameters
        ----------
        state : mapping
            What `state_dict` returned. `n_epochs` and `n_threads` may differ; everything else must be the same, because
            the order of rows depends on it.

        Raises
        ------
        ResumeError
            If the state is of other data, other options, or a newer version; names what differs.
        """
        version = state.get("version")
        if not isinstance(version, int) or version > _STATE_VERSION:
            raise ResumeError(
                f"the state has version {version!r}, and this streamgd reads up to {_STATE_VERSION}: use the streamgd "
                "that wrote it, or a newer one"
            )
        try:
            for what, stored, own in (
                ("data", state["fingerprint"], _as_json(self.source.fingerprint)),
                ("options", state["options"], self._options()),
            ):
                different = [key for key in {**own, **stored} if own.get(key) != stored.get(key)]
                if different:
                    raise ResumeError(
                        f"the state belongs to a stream with other {what}: "
                        + "; ".join(f"{key} was {stored.get(key)!r}, is {own.get(key)!r}" for key in different)
                        + f". Give the stream the same {what}, or start afresh without the state"
                    )
            layout = Layout.from_json(state["layout"])
            cursor = [index(state[key]) for key in ("epoch", "window", "row", "n_seen")]
            checksum = int(state["checksum"], 16)
            if min(cursor) < 0 or cursor[3] >= self.source.n_rows:
                raise ValueError(f"a cursor at {cursor}")
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise ResumeError(f"the state is damaged ({err!r}): expected what state_dict() returned") from err
        self._stop()
        self.layout = layout
        self.epoch, self._window, self._row, self._n_seen = cursor
        self._checksum = checksum

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self._batch_size,
            "seed": self._seed,
            "buffer": self._buffer_bytes,
            "shuffle": self._shuffle,
            "drop_last": self._drop_last,
        }

    def _stop(self) -> None:
        """Stop reading; the next batch begins again at the cursor."""
        windows, self._windows, self._current = self._windows, None, None
        if windows is not None:
            windows.close()

    def close(self) -> None:
        """Stop and join all threads. Idempotent; `state_dict` still tells where the stream stood."""
        self._closed = True
        self._stop()
        if self._owns_source:
            self.source.close()

    def __enter__(self) -> Self:
        """Return the stream itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Say what is streamed, and how far it is."""
        return (
            f"<stream of {self.source.name!r}: epoch {self.epoch}, {self._n_seen:,} of {self.source.n_rows:,} rows, "
            f"batches of {self._batch_size:,}, buffer of {format_bytes(self._buffer_bytes)}>"
        )


def _open(data: Any) -> Source:
    from streamgd.data.sources import open_source

    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], (str, PurePath)):
        return open_source(data[0], data[1])
    return open_source(data)


def find_classes(source: Source) -> TargetCodec:
    """Read the targets of a source, and return how its classes are encoded."""
    counter = ClassCounter()
    for first, y, weight in source.iter_targets():
        missing = counter.add(y, weight)
        if missing is not None:
            raise NonFiniteError(
                f"{source.locate_row(first + missing)}: the target is missing. Drop such rows before streaming"
            )
    return TargetCodec(counter.classes)


def _number_dtype(name: str) -> str | None:
    """Return a dtype's name if NumPy knows it and it is a number or a boolean."""
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError):  # Arrow's types have other names
        return None
    return dtype.name if dtype.kind in "fiub" else None


def _count(name: str, value: Any) -> int:
    try:
        number = index(value)
    except TypeError as err:
        raise OptionError(f"{name}={value!r}: expected a whole number from 1 on") from err
    if number < 1 or isinstance(value, bool):
        raise OptionError(f"{name}={value!r}: expected a whole number from 1 on")
    return number


def _as_json(value: Any) -> dict[str, Any]:
    """Turn tuples into lists and so on, so that a stored fingerprint compares equal."""
    found: dict[str, Any] = json.loads(json.dumps(value))
    return found
