"""Dask arrays and DataFrames as a source.

A block is a Dask block of rows, computed as a whole when it is opened: on the active `distributed.Client` if there is
one, else in the thread that opens it. `dask_blocks` computes; what can be a feature or a target is decided in `arrays`
and `frames`, by the rules for data in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from streamgd.data.sources.arrays import as_features, as_target, as_weight
from streamgd.data.sources.base import Array, BlockReader, Slice, Source, choose_row_dtype
from streamgd.data.sources.columns import Column, Features, Target
from streamgd.data.sources.dask_blocks import Ahead, BlockGraph
from streamgd.data.sources.dask_clients import active_client, within_task
from streamgd.data.sources.dask_parts import Parts, array_parts, frame_parts
from streamgd.data.sources.dask_shown import ShownBlocks
from streamgd.data.sources.dask_waiting import gathered
from streamgd.data.sources.neighbours import NeighbourArray, UnreachableError
from streamgd.data.window import Stopped
from streamgd.errors import ClusterError, DataError, EmptySourceError, SchemaError, SourceNotFoundError, StreamgdError

T = TypeVar("T")

#: Bytes a Python object (a string, mostly) is taken to cost, for the memory plan.
_OBJECT_BYTES = 64
#: Rows of the first block, and of the last block's target, that the fingerprint covers.
_HASHED_ROWS = 1024
#: Up to so many blocks the fingerprint lists their lengths.
_LISTED_BLOCKS = 64
#: Targets of so many rows, bytes and blocks come from the cluster at once.
_TARGET_ROWS, _TARGET_BYTES, _TARGET_BLOCKS = 1_000_000, 8_000_000, 200
#: First rows of blocks come by themselves where they are this part of the blocks at most; so many bytes at once.
_FEW, _HEADS_BYTES = 4, 8_000_000
#: Blocks from this size on are worth a hint.
_BIG_BLOCK_BYTES = 16 << 20


class DaskSource(Source):
    """Dask arrays; `from_dataframe` takes DataFrames.

    Parameters
    ----------
    X : dask.array.Array of shape (n_rows, n_features)
        Numbers or booleans. Cut only between rows: other cuts are joined as blocks are computed.
    y : dask.array.Array, array-like or None, default=None
        Target of shape (n_rows,) or (n_rows, n_outputs); cut like X as it is computed.
    weight : dask.array.Array, array-like or None, default=None
        Sample weights of shape (n_rows,).
    dtype : {"auto", "float32", "float64"}, default="auto"
        Row dtype, see `streamgd.data.sources.base.choose_row_dtype`.
    target_name : str, default="y"
        What messages call the target.

    Attributes
    ----------
    compute_here : bool
        Whether blocks are computed in the thread that opens them even if a client is active. True for a source that was
        made within a task of a cluster, or unpickled, which was sent to where it is to be used: threads that read for a
        task do not know that they do, and what they asked of the cluster could wait for that task.

    Raises
    ------
    SchemaError
        If X is not a matrix of real numbers, or lengths differ.
    EmptySourceError
        If there are no rows.
    DataError
        If the lengths of blocks are unknown and cannot be measured.
    OptionError
        If `dtype` is unknown.

    Notes
    -----
    Blocks of unknown length are measured once, which computes them all (a message goes to the logger ``streamgd``).

    An open block is held whole, and while it is computed Dask holds what its tasks need besides. Without a client,
    blocks are computed one for each reader thread, each within its thread. With one, `announce` has the cluster begin a
    few blocks ahead, and their results come to this process when they are opened; but persisted arrays are read where
    they lie if that is on this machine, see `ShownBlocks`. What was shuffled is shuffled again for its blocks: persist
    it, or write it to files, first.

    The fingerprint holds types, shape, the length of the blocks, and a hash of the first rows and the last targets; it
    computes two blocks when it is first asked for. Keys of tasks are not in it: the same data may get other keys in
    another process. They are the stamp, so that a cache is never read for other data: Dask gives the same keys to what
    is computed in the same way, where it can tell.
    """

    kind = "dask"
    holds_block = True

    def __init__(
        self, X: Any, y: Any = None, *, weight: Any = None, dtype: str = "auto", target_name: str = "y"
    ) -> None:
        parts = array_parts(X, y, weight, target_name)
        self._set_up(parts, parts.rows.chunks[0], dtype, target_name)
        if X.numblocks[1] > 1:
            self.open_block_bytes *= 2  # pieces and the whole, while they are joined
        self.name = "Dask array"

    @classmethod
    def from_dataframe(
        cls,
        frame: Any,
        target: Any = None,
        features: Sequence[str] | None = None,
        weight: Any = None,
        dtype: str = "auto",
    ) -> DaskSource:
        """Make a source of a Dask DataFrame; its partitions are the blocks, and their lengths are measured.

        Parameters
        ----------
        frame : dask.dataframe.DataFrame
            The table.
        target : str, sequence of str, Dask Series or array, or None, default=None
            Target column or columns, or a collection of as many rows.
        features : sequence of str or None, default=None
            Feature columns; default: every column that is neither target nor weight.
        weight : str, Dask Series or array, or None, default=None
            Sample weights.
        dtype : {"auto", "float32", "float64"}, default="auto"
            Row dtype.

        Raises
        ------
        SourceNotFoundError
            If a column is not there.
        SchemaError
            If features are not numbers (all are named), a name occurs twice, or lengths differ.
        """
        parts, rows = frame_parts(frame, target, features, weight)
        source = cls.__new__(cls)
        source._set_up(parts, rows, dtype, target if isinstance(target, str) else "y")
        source.name = "Dask DataFrame"
        return source

    def _set_up(self, parts: Parts, rows: Sequence[int], dtype: str, target_name: str) -> None:
        """Set what types and lengths tell."""
        self._parts = parts
        self._target_parts = parts.targets()
        self._target_name = target_name
        features, target, weight = self._typed(parts.sample())
        assert features is not None
        lengths = np.array(rows, np.int64)
        self._numbers = np.flatnonzero(lengths)
        if not len(self._numbers):
            raise EmptySourceError(
                f"Found array with 0 sample(s) (shape=(0, {features.n_columns})) while a minimum of 1 is required."
            )
        self.block_rows = lengths[self._numbers]
        self.n_features = features.n_columns
        self.feature_names = features.names
        self.feature_dtypes = features.stored_dtypes
        self.row_dtype = choose_row_dtype(features.dtypes, dtype)
        self.target = None if target is None else target.info
        self.has_weight = weight is not None
        row_bytes = sum(each.itemsize for each in features.dtypes) * (features.n_columns if features.is_matrix else 1)
        if target is not None:
            width = target.column.dtype.itemsize if target.column.dtype.kind != "O" else _OBJECT_BYTES
            row_bytes += width * target.info.n_outputs
        row_bytes += 0 if weight is None else weight.dtype.itemsize
        self.stored_bytes = self.n_rows * row_bytes
        self.open_block_bytes = int(self.block_rows.max()) * row_bytes
        self.origin = {"kind": self.kind, "shape": [self.n_rows, self.n_features]}
        self.compute_here = active_client() is None and within_task()
        self._delivered: Mapping[int, Sequence[Any]] | None = None
        self._start_afresh()

    def _start_afresh(self) -> None:
        """Set what belongs to one process."""
        self._lock = threading.Lock()
        self._graphs: dict[bool, BlockGraph] = {}
        self._showing = threading.Lock()
        self._shown: ShownBlocks | None = None
        self._ahead = Ahead()
        self._n_open = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        own = ("_lock", "_graphs", "_showing", "_shown", "_ahead", "_n_open")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with nothing open, and compute where the source was sent to."""
        self.__dict__.update(state)
        self.compute_here = True
        self._start_afresh()

    def _computing_client(self) -> Any | None:
        """Return the client that computes blocks; None computes them in the thread that opens them."""
        return None if self.compute_here else active_client()

    # Reading

    def open_block(self, block: int, start: int = 0, *, piece_rows: int = 16384) -> BlockReader:
        """Compute a block."""
        return _Reader(self, block, self._compute(block, targets_only=False), start)

    def open_heads(self, heads: Sequence[tuple[int, int]], *, piece_rows: int) -> Iterator[BlockReader]:
        """Open blocks of which only the first rows are wanted: from a cluster no others come."""
        client = self._computing_client()
        whole = client is None or any(_FEW * n > int(self.block_rows[block]) for block, n in heads)
        if whole or self._shown_here(client).keys() >= {block for block, _ in heads}:
            yield from super().open_heads(heads, piece_rows=piece_rows)
            return
        graph, row_bytes = self._graph(targets_only=False), max(1, self.stored_bytes // self.n_rows)
        at_once = max(1, _HEADS_BYTES // (row_bytes * max(n for _, n in heads)))
        groups = [list(heads[first : first + at_once]) for first in range(0, len(heads), at_once)]

        def submit(group: Sequence[tuple[int, int]]) -> dict[int, list[Any]]:
            return graph.submit_heads(client, {int(self._numbers[block]): n for block, n in group})

        for group, found in _gathered_ahead(client, groups, submit):
            if found is None:
                yield from super().open_heads(group, piece_rows=piece_rows)
                continue
            for block, n in group:
                (parts,) = found[int(self._numbers[block])]
                yield _Reader(self, block, self._checked(block, parts, targets_only=False, n_rows=n), 0)

    def announce(self, blocks: Sequence[int]) -> None:
        """Have the client, if there is one, begin with a few of these blocks."""
        client = self._computing_client()
        if client is not None:
            shown = self._shown_here(client)
            numbers = self._numbers[[block for block in blocks if block not in shown]].tolist()
            self._ahead.announce(self._graph(targets_only=False), client, numbers, self._n_open)

    def iter_targets(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any, Array | None]]:
        """Compute target and weights alone, a block at a time."""
        if self.target is None and not self.has_weight:
            return
        wanted = self.blocks_of(start, self.n_rows if stop is None else stop)
        for (block, first, end), (_, (_, y, weight)) in zip(
            wanted, self._targets([block for block, _, _ in wanted]), strict=True
        ):
            yield start, *self._read_targets(block, (y, weight), first, end)
            start += end - first

    def _read_targets(
        self, block: int, parts: tuple[Target | None, Column | None], first: int, end: int
    ) -> tuple[Any, Any]:
        """Read some rows of a block's target and weights, or compute them anew if they are shown no more."""
        try:
            found = [None if part is None else part.read(first, end) for part in parts]
        except UnreachableError:
            parts = self.sent(block, targets_only=True)[1:]
            found = [None if part is None else part.read(first, end) for part in parts]
        return found[0], found[1]

    def _targets(self, blocks: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Compute target and weights of some blocks: on a cluster, those of many for one answer of it."""
        client = self._computing_client()
        if client is None or self._shown_here(client).keys() >= set(blocks):
            for block in blocks:
                yield block, self._compute(block, targets_only=True)
            return
        graph = self._graph(targets_only=True)

        def submit(group: Sequence[int]) -> dict[int, list[Any]]:
            return graph.submit_all(client, self._numbers[group].tolist())

        for group, found in _gathered_ahead(client, self._target_groups(blocks), submit):
            for block in group:
                if found is None:
                    yield block, self._compute(block, targets_only=True)
                else:
                    yield block, self._checked(block, found[int(self._numbers[block])], targets_only=True)

    def _target_groups(self, blocks: Sequence[int]) -> list[list[int]]:
        """Divide blocks into runs whose targets may be in memory together."""
        groups: list[list[int]] = [[]]
        n_rows, most = 0, self.target_piece_rows(_TARGET_ROWS, _TARGET_BYTES)
        for block, rows in zip(blocks, self.block_rows[list(blocks)].tolist(), strict=True):
            if groups[-1] and (n_rows + rows > most or len(groups[-1]) == _TARGET_BLOCKS):
                groups.append([])
                n_rows = 0
            groups[-1].append(block)
            n_rows += rows
        return groups

    # Elsewhere

    def detached(self) -> DaskSource:
        """Return a source that knows everything but the collections, and opens only what `with_blocks` gives it."""
        found = copy(self)  # as if it had been sent
        found._parts = self._parts.elsewhere()
        found._target_parts = self._target_parts.elsewhere()
        found._delivered = {}
        return found

    def with_blocks(self, blocks: Mapping[int, Sequence[Any]]) -> DaskSource:
        """Return a source that opens these blocks, computed by `submit`, and no others."""
        found = copy(self)
        found.deliver(blocks)
        return found

    def deliver(self, blocks: Mapping[int, Sequence[Any]]) -> None:
        """Open these blocks from now on, and no others; see `with_blocks`."""
        self._delivered = blocks

    @property
    def lies_in_cluster(self) -> bool:
        """Whether features are made of what is persisted on a cluster alone, and nothing is read for them."""
        return self._graph(targets_only=False).lies_in_cluster

    def get_ready(self) -> None:
        """Have the cluster's workers begin to show what they hold, unless they are computing it still."""
        client = self._computing_client()
        if client is not None:
            lying = self.lying()
            if lying and all(future.done() for futures in lying.values() for future in futures):
                self.shown(client, lying, to_workers=True)

    def shown(
        self, client: Any, lying: Mapping[int, Sequence[Any]] | None = None, *, to_workers: bool = False
    ) -> ShownBlocks:
        """Have a cluster's workers show what they hold of arrays, unless they do; see `ShownBlocks`."""
        with self._showing:
            if self._shown is None:
                self._shown = ShownBlocks(client, self.lying() if lying is None else lying, to_workers=to_workers)
            return self._shown

    def take_shown(self) -> ShownBlocks | None:
        """Hand over what is shown, if anything is, to whoever releases it when it is needed no more."""
        with self._showing:
            found, self._shown = self._shown, None
            return found

    def let_go(self) -> None:
        """Have what is shown, and what no run has taken, shown no more."""
        shown = self.take_shown()
        if shown is not None:
            shown.release()

    def _shown_here(self, client: Any) -> dict[int, list[NeighbourArray]]:
        return self.shown(client).here

    def lying(self) -> dict[int, list[Any]]:
        """Return the futures of blocks of arrays that a cluster holds as they are, by number."""
        if self._parts.features is not None:
            return {}
        graph = self._graph(targets_only=False)
        found = {block: graph.lying(number) for block, number in enumerate(self._numbers.tolist())}
        return {block: futures for block, futures in found.items() if futures is not None}

    def submit(
        self, client: Any, blocks: Sequence[int], workers: Sequence[str] | None = None, name: str | None = None
    ) -> dict[int, list[Any]]:
        """Have a cluster compute blocks, and leave them there.

        Parameters
        ----------
        client : distributed.Client
            Of the cluster.
        blocks : sequence of int
            Which.
        workers : sequence of str or None, default=None
            Where, if possible.
        name : str or None, default=None
            Makes the tasks different from all others', see `BlockGraph.submit_all`.

        Returns
        -------
        dict of int to list of Future
            What `with_blocks` takes once they are computed.
        """
        numbers = {block: int(self._numbers[block]) for block in blocks}
        found = self._graph(targets_only=False).submit_all(client, list(numbers.values()), workers, name)
        return {block: found[number] for block, number in numbers.items()}

    def _graph(self, *, targets_only: bool) -> BlockGraph:
        with self._lock:
            if targets_only not in self._graphs:
                parts = self._target_parts if targets_only else self._parts
                self._graphs[targets_only] = BlockGraph(parts.collections())
            return self._graphs[targets_only]

    def _compute(
        self, block: int, *, targets_only: bool, in_place: bool = True
    ) -> tuple[Features | None, Target | None, Column | None]:
        """Compute a block, unless it is shown here, and check that it is what was promised."""
        number = int(self._numbers[block])
        client = self._computing_client()
        if self._delivered is not None:
            given = self._delivered[block]
            parts = [each.here(reuse=True) if isinstance(each, NeighbourArray) else each for each in given]
            return self._checked(block, parts, targets_only=targets_only)
        shown = self._shown_here(client).get(block) if client is not None and in_place else None
        if shown is not None:
            with contextlib.suppress(UnreachableError):
                parts = [each.here() for each in shown]
                return self._checked(block, parts[1:] if targets_only else parts, targets_only=targets_only)
        try:
            graph = self._graph(targets_only=targets_only)
            if client is None:
                computed = graph.compute(number)
            else:
                computed = (Ahead() if targets_only else self._ahead).compute(graph, client, number)
        except (ClusterError, Stopped):
            raise
        except FileNotFoundError as err:
            raise SourceNotFoundError(f"Dask block {number} cannot be computed: {err}. Put the file back") from err
        except Exception as err:
            raise DataError(
                f"Dask block {number} cannot be computed: {type(err).__name__}: {err}. See the error above; "
                "computing this block by itself (X.blocks[...] or frame.partitions[...]) shows it too"
            ) from err
        return self._checked(block, computed, targets_only=targets_only)

    def sent(self, block: int, *, targets_only: bool) -> tuple[Features | None, Target | None, Column | None]:
        """Compute a block that is shown here no more. Where it was delivered, somebody else has to: it is as it was."""
        self.let_go()
        return self._compute(block, targets_only=targets_only, in_place=False)

    def _checked(
        self, block: int, computed: Sequence[Any], *, targets_only: bool, n_rows: int | None = None
    ) -> tuple[Features | None, Target | None, Column | None]:
        """Check that a computed block, or its first rows, is what was promised."""
        number = int(self._numbers[block])
        try:
            parts = self._target_parts if targets_only else self._parts
            found = self._typed(parts.split(computed))
        except StreamgdError as err:
            raise SchemaError(f"Dask block {number} is not what its collection promised: {err}") from err
        self._check(number, int(self.block_rows[block]) if n_rows is None else n_rows, *found)
        return found

    def _typed(self, arrays: tuple[Any, Any, Any]) -> tuple[Features | None, Target | None, Column | None]:
        X, y, weight = arrays
        return (
            None if X is None else as_features(X),
            None if y is None else as_target(y, self._target_name),
            None if weight is None else as_weight(weight),
        )

    def _check(self, number: int, n_rows: int, X: Features | None, y: Target | None, weight: Column | None) -> None:
        if X is not None and X.shape != (n_rows, self.n_features):
            raise SchemaError(
                f"Dask block {number} has shape {X.shape} where {(n_rows, self.n_features)} was promised; "
                "check the function that makes the blocks"
            )
        for what, part in (("target", y), ("weight", weight)):
            if part is not None and len(part) != n_rows:
                raise SchemaError(f"Dask block {number} has {n_rows:,} rows, but its {what} has {len(part):,}")
        if y is not None and self.target is not None and y.info.n_outputs != self.target.n_outputs:
            raise SchemaError(
                f"the target of Dask block {number} has {y.info.n_outputs} columns where {self.target.n_outputs} were "
                "promised"
            )

    def count_open(self, change: int) -> None:
        """Count readers."""
        with self._lock:
            self._n_open += change

    # Telling

    def stamp(self) -> dict[str, Any]:
        """Return the keys of the collections; see `Source.stamp`. The same data may have got others: then it counts."""
        return {"keys": [str(part._name) for part in self._parts.collections()]}

    def locate(self, block: int, row: int) -> str:
        """Name the Dask block and the row, within it and among all, counted from 0."""
        before = int(self.block_rows[:block].sum())
        return (
            f"Dask block {int(self._numbers[block])}, row {row:,} of it (row {before + row:,} of all, counted from 0)"
        )

    def mixing_hint(self) -> str | None:
        """Advise smaller blocks where they are big and few."""
        biggest = int(self.block_rows.max())
        if self.open_block_bytes < _BIG_BLOCK_BYTES or biggest * 1000 < self.n_rows:
            return None
        good = max(1, biggest * (_BIG_BLOCK_BYTES >> 2) // self.open_block_bytes)
        way = f"X.rechunk(({good}, -1))" if self._parts.features is None else "frame.repartition(npartitions=...)"
        return (
            f"Dask blocks hold up to {biggest:,} rows ({biggest / self.n_rows:.1%} of the data) and are computed "
            f"whole; smaller ones mix better, e.g. {way} where computing them does not cost more"
        )

    @cached_property
    def fingerprint(self) -> dict[str, Any]:  # type: ignore[override]
        """Computed when first asked for: predicting needs none."""
        target = self.target
        lengths = self.block_rows.tolist()
        short = len(lengths) <= _LISTED_BLOCKS
        return {
            "kind": self.kind,
            "n_rows": self.n_rows,
            "n_features": self.n_features,
            "feature_dtypes": sorted(set(self.feature_dtypes)),
            "feature_names": None if self.feature_names is None else list(self.feature_names),
            "target": None if target is None else [target.name, target.dtype, target.n_outputs, target.is_vector],
            "weight": self.has_weight,
            "blocks": lengths if short else hashlib.blake2b(self.block_rows.tobytes(), digest_size=16).hexdigest(),
            "sample": self._sample_digest(),
        }

    def _sample_digest(self) -> str:
        try:
            return self._digest(in_place=True)
        except UnreachableError:
            self.let_go()
            return self._digest(in_place=False)

    def _digest(self, *, in_place: bool) -> str:
        digest = hashlib.blake2b(digest_size=16)
        X, y, weight = self._compute(0, targets_only=False, in_place=in_place)
        assert X is not None
        n = min(_HASHED_ROWS, int(self.block_rows[0]))
        rows = X.read(0, n)
        _add(digest, rows if isinstance(rows, list) else [rows])
        _add(digest, [part.read(0, n) for part in (y, weight) if part is not None])
        if self.target is not None or self.has_weight:
            stop = int(self.block_rows[-1])
            _, y, weight = self._compute(self.n_blocks - 1, targets_only=True, in_place=in_place)
            _add(digest, [p.read(max(0, stop - _HASHED_ROWS), stop) for p in (y, weight) if p is not None])
        return digest.hexdigest()

    def close(self) -> None:
        """Forget blocks that the cluster computes ahead, and the graph."""
        self._ahead.clear()
        self.let_go()
        with self._lock:
            self._graphs.clear()


class _Reader(BlockReader):
    """A computed block."""

    def __init__(
        self,
        source: DaskSource,
        block: int,
        parts: tuple[Features | None, Target | None, Column | None],
        start: int,
    ) -> None:
        self._source, self._block, self._at = source, block, start
        self._parts: tuple[Features | None, Target | None, Column | None] | None = parts
        source.count_open(1)

    def read(self, n_rows: int) -> Slice:
        """Return the next rows, as views where the types allow."""
        if self._parts is None:
            raise ValueError("read from a closed block")
        try:
            found = self._slice(self._at + n_rows)
        except UnreachableError:  # it is shown no more
            self._parts = self._source.sent(self._block, targets_only=False)
            found = self._slice(self._at + n_rows)
        self._at += n_rows
        return found

    def _slice(self, stop: int) -> Slice:
        assert self._parts is not None
        X, y, weight = self._parts
        assert X is not None
        return Slice(
            X.read(self._at, stop),
            None if y is None else y.read(self._at, stop),
            None if weight is None else weight.read(self._at, stop),
        )

    def close(self) -> None:
        """Drop the block."""
        if self._parts is not None:
            self._parts = None
            self._source.count_open(-1)


def _gathered_ahead(
    client: Any, groups: Sequence[T], submit: Callable[[T], dict[int, list[Any]]]
) -> Iterator[tuple[T, dict[int, list[Any]] | None]]:
    """Fetch what groups of blocks come to, the next one computed meanwhile.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    groups : sequence
        At least one.
    submit : callable
        Begins with a group; returns the futures of each block.

    Yields
    ------
    group, found
        None if a task failed: which block's it is, and why, comes out block by block.
    """
    under_way = [submit(groups[0])]
    try:
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            if following is not None:
                under_way.append(submit(following))
            try:
                found = gathered(client, under_way[0])
            except (ClusterError, Stopped):
                raise
            except Exception:
                found = None
            yield group, found
            del under_way[0]
    finally:
        for future in (each for some in under_way for futures in some.values() for each in futures):
            future.release()  # an error's traceback holds them, and with them their tasks on the cluster


def _add(digest: Any, arrays: Sequence[Array]) -> None:
    for array in arrays:
        if array.dtype.kind == "O":  # its bytes are addresses
            digest.update("\x1f".join(map(repr, array.ravel().tolist())).encode("utf-8", "surrogatepass"))
        else:
            digest.update(array.tobytes())
