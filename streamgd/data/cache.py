"""The cache: a source decoded once into files of numbers that later epochs read as they lie.

A cache is a folder, named by a hash of what it holds, inside the folder that the user names::

    DIR/3f0c…/X.bin  y.bin  weight.bin    the rows, in the source's order; nothing is scaled
              parts.bin                   what each part of about a megabyte sums up to
              cache.json                  of which data, and how it is laid out

``cache.json`` comes last, once all else is on disk: where it is, the cache was whole once, and the sums tell whether it
still is. The content follows from the data alone, so that any number of runs may share it, and a run that loses its
cache may write it again and go on with the same bits. `streamgd.data.cache_writer` writes it.

The name follows from the fingerprint, which takes samples. ``cache.json`` also has the source's stamp, which misses no
change: a cache of data that was changed since counts as damaged, and is written anew.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.layout import format_bytes
from streamgd.data.sources.base import Source, choose_row_dtype
from streamgd.data.sources.cache import CacheFile, CacheSource, Parts
from streamgd.data.targets import TargetCodec
from streamgd.errors import CorruptDataError

if TYPE_CHECKING:
    from streamgd.data.cache_writer import CacheWriter

#: Version of the files. Another one gives another name.
FORMAT = 2
#: Parts are as big, unless this makes them too few to mix well: then so many of them, but not smaller than this.
_PART_BYTES, _MANY_PARTS, _LEAST_PART_BYTES = 1 << 20, 4096, 1 << 14
_MANIFEST, _SUMS, LOCK = "cache.json", "parts.bin", "lock"


@dataclass(frozen=True)
class Written:
    """What is written of a cache, before a window of the epoch that is kept.

    Attributes
    ----------
    sums : ndarray of shape (n_parts,), uint64
        What each part sums up to so far.
    n_rows : int
        Rows.
    stamp : dict
        What the source was; see `Source.stamp`.
    """

    sums: NDArray[np.uint64]
    n_rows: int
    stamp: dict[str, Any]


class Cache:
    """The place of a source's cache, whether it is there or not.

    Parameters
    ----------
    parent : path-like
        The folder that the user names; made when it is first written to.
    source : Source
        With a target.
    codec : TargetCodec
        How a run encodes the targets. Numbers are stored as they are, other classes by their index.
    part_rows : int or None, default=None
        Rows of a part; default: about a megabyte of them.

    Attributes
    ----------
    path : Path
        The cache's own folder.
    needed_bytes : int
        What it takes on disk.
    part_rows : int
        Rows of a part.
    """

    def __init__(
        self, parent: str | os.PathLike[str], source: Source, codec: TargetCodec, *, part_rows: int | None = None
    ) -> None:
        assert source.target is not None
        self.source = source
        #: The classes by index, for targets that are numbers and are stored as such.
        self.numbers = None if codec.classes is None else codec.sorted_numbers
        self.coded = codec.classes is not None and self.numbers is None
        n_outputs = 1 if codec.classes is not None else source.target.n_outputs
        width, double = source.n_features, np.dtype(np.float64)
        self.files = [CacheFile("features", "X.bin", stored_dtype(source), width)]
        self.files.append(CacheFile("target", "y.bin", double, n_outputs))
        if source.has_weight:
            self.files.append(CacheFile("weight", "weight.bin", double, 1))
        row_bytes = sum(file.row_bytes for file in self.files)
        self.needed_bytes = source.n_rows * row_bytes
        part_bytes = min(_PART_BYTES, max(_LEAST_PART_BYTES, self.needed_bytes // _MANY_PARTS))
        self.part_rows = max(1, part_bytes // row_bytes) if part_rows is None else part_rows
        self.parts = Parts.of(source.block_rows, self.part_rows)
        self.definition: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": json.loads(json.dumps(source.fingerprint)),
            "blocks": hashlib.blake2b(source.block_rows.astype("<i8").tobytes(), digest_size=16).hexdigest(),
            "n_rows": source.n_rows,
            "features": list(source.feature_names) if source.feature_names else source.n_features,
            "target": [source.target.name, codec.to_json() if self.coded else n_outputs],
            "files": [[file.name, file.dtype.name, file.width] for file in self.files],
            "part_rows": self.part_rows,
        }
        text = json.dumps(self.definition, sort_keys=True)
        self.path = Path(parent) / hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
        self._checked: tuple[str, NDArray[np.bool_]] | None = None  # the sums' hash, and the parts known to match
        self._stuck: OSError | None = None  # why it cannot be removed although it is damaged

    @property
    def is_whole(self) -> bool:
        """Whether there is a cache that was written to its end."""
        return self._stuck is None and os.path.exists(self.path / _MANIFEST)  # noqa: PTH110 - raises for no path

    @cached_property
    def stamp(self) -> dict[str, Any]:
        """What the source is; looked up once, and before a row is read."""
        found: dict[str, Any] = json.loads(json.dumps(self.source.stamp()))
        return found

    def changed_since(self, then: Mapping[str, Any]) -> str | None:
        """Say what has changed since the source had a stamp; None if nothing has."""
        changed = [name for name, value in then.items() if self.stamp.get(name, value) != value]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"{self.source.name} has changed since it was written ({changed[0]}{more})" if changed else None

    def free_bytes(self) -> int:
        """Return the room on the disk where it lies or would lie."""
        folder = self.path.absolute()
        while not os.path.isdir(folder):  # noqa: PTH112 - raises for no path
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def as_planned(self) -> CacheSource:
        """Return the source that it will be, to plan with; nothing is read."""
        return self.view(np.zeros(len(self.parts.rows), np.uint64), trusted=True)

    def open(self, *, as_source: bool = False) -> CacheSource:
        """Open a cache that is whole.

        Parameters
        ----------
        as_source : bool, default=False
            Whether its blocks are to be the source's, for windows that are the source's own, instead of the small ones
            that mix better.

        Raises
        ------
        CorruptDataError
            If it is damaged, or the data has changed since; it then counts as not there any more.
        """
        try:
            manifest = json.loads((self.path / _MANIFEST).read_text())
            sums = np.fromfile(self.path / _SUMS, "<u8").astype(np.uint64)
            sizes = [(self.path / file.name).stat().st_size for file in self.files]
            if manifest["sums"] != _digest_of(sums) or len(sums) != len(self.parts.rows):
                raise ValueError(f"{_SUMS} does not belong to it")
            if sizes != [file.row_bytes * self.source.n_rows for file in self.files]:
                raise ValueError(f"its files have {sizes} bytes")
            if manifest["definition"] != self.definition:
                raise ValueError(f"{_MANIFEST} is not what the folder's name says")
            stamp = dict(manifest["stamp"])
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise CorruptDataError(f"the cache in {self.path} is damaged: {err}. {self.forget()}") from err
        changed = self.changed_since(stamp)
        if changed is not None:
            raise CorruptDataError(f"the cache in {self.path} is of other data: {changed}. {self.forget()}")
        return self.view(sums, trusted=False, as_source=as_source)

    def begin(self, written: Written | None = None) -> CacheWriter | None:
        """Begin to write it, or go on; None if somebody else is at it, it is whole by now, or there is nothing left.

        Parameters
        ----------
        written : Written or None, default=None
            What was written before, of which there must be something left; None begins anew.

        Raises
        ------
        OSError
            If the folder cannot be written to, or has no room.
        """
        from streamgd.data.cache_writer import CacheWriter

        if self._stuck is not None:
            raise self._stuck
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / LOCK).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            return None
        paths = [self.path / file.name for file in self.files]
        if self.is_whole or (written is not None and not all(path.exists() for path in paths)):
            lock.close()
            return None
        try:
            if written is None:
                for path in paths:  # others may still read what was here, and keep it as it is
                    path.unlink(missing_ok=True)
                free = self.free_bytes()  # when nobody else writes here, and what was left of it is gone
                if free < self.needed_bytes:
                    needed = format_bytes(self.needed_bytes)
                    raise OSError(errno.ENOSPC, f"the cache takes {needed}, and {format_bytes(free)} are free")
            return CacheWriter(self, lock, written)
        except OSError:
            lock.close()
            raise

    def seal(self, sums: NDArray[np.uint64]) -> None:
        """Declare that all is written and flushed, and that the parts sum up to this."""
        with (self.path / _SUMS).open("wb") as file:
            file.write(sums.astype("<u8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        content = {"definition": self.definition, "stamp": self.stamp, "sums": _digest_of(sums)}
        manifest = json.dumps(content, indent=2, sort_keys=True)
        temporary = self.path / f"{_MANIFEST}.tmp"
        with temporary.open("w") as text:
            text.write(manifest + "\n")
            text.flush()
            os.fsync(text.fileno())
        temporary.rename(self.path / _MANIFEST)
        for folder in (self.path, self.path.parent):
            _flush_folder(folder)

    def view(self, sums: NDArray[np.uint64], *, trusted: bool, as_source: bool = False) -> CacheSource:
        """Return the source of what is written, whole or not, with the sums of its parts.

        Parameters
        ----------
        sums : ndarray of shape (n_parts,), uint64
            What each part should sum up to.
        trusted : bool
            Whether this process wrote it, so that it need not be checked when it is read.
        as_source : bool, default=False
            See `open`.
        """
        digest = _digest_of(sums)
        if self._checked is None or self._checked[0] != digest:
            self._checked = (digest, np.zeros(len(sums), np.bool_))
        if trusted:
            self._checked[1][:] = True
        return CacheSource(
            self.source,
            self.path,
            self.files,
            self.parts,
            sums,
            self._checked[1],
            classes=self.coded,
            as_source=as_source,
            damaged=self.forget,
        )

    def distrust(self) -> None:
        """Have every part checked again, because what this process wrote may not be on disk."""
        if self._checked is not None:
            self._checked[1][:] = False

    def forget(self) -> str:
        """Make it count as not there, so that the next one who needs it writes it anew; say what comes of it."""
        self._checked = None
        try:
            (self.path / _MANIFEST).unlink(missing_ok=True)
        except OSError as err:
            way = f"cannot be removed ({err.strerror}): remove {self.path}, or choose another folder for the cache"
            self._stuck = OSError(err.errno, f"it {way}")
            return f"It {way}"
        return "It is not used any more, and written anew when it is needed"


def stored_dtype(source: Source) -> np.dtype[Any]:
    """Return the type that holds every feature of a source exactly, whatever rows are trained in."""
    try:
        stored = [np.dtype(name) for name in set(source.feature_dtypes)]
    except (TypeError, ValueError):  # decimals and the like, which are read as float64
        return np.dtype(np.float64)
    return choose_row_dtype(stored, "auto")


def _digest_of(sums: NDArray[np.uint64]) -> str:
    return hashlib.blake2b(sums.tobytes(), digest_size=16).hexdigest()


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
