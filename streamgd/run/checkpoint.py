"""Checkpoints: one file each, complete or absent, checked when read.

A checkpoint is a safetensors file: the state's arrays, and in its metadata a BLAKE2b hash of the content followed by
one JSON text with everything else (cursor, plan, survey, configuration, fingerprint, versions). No pickle anywhere. It
is written under a temporary name, flushed to disk, renamed into place, and the folder is flushed: a kill or a power cut
at any moment leaves either the new file or the ones before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.errors import CheckpointError, CheckpointWriteError, ResumeError

#: Version of the layout of checkpoints and run folders. A newer one than this is refused.
FORMAT = 1
#: Checkpoints that are kept.
KEPT = 3
_SUFFIX = ".safetensors"
_DIGEST_LENGTH = 64  # hexadecimal digits of 32 bytes


@dataclass(frozen=True)
class Checkpoint:
    """What one file holds.

    Attributes
    ----------
    tensors : dict of str to ndarray
        Arrays by name.
    meta : dict of str to JSON value
        The rest.
    """

    tensors: dict[str, NDArray[Any]]
    meta: dict[str, Any]


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that it is there whole or not at all.

    Raises
    ------
    CheckpointWriteError
        If the disk is full or the folder cannot be written; what was there before is untouched.
    """
    from safetensors.numpy import save as to_bytes

    text = json.dumps({"format": FORMAT, **checkpoint.meta}, sort_keys=True)
    tensors = {name: np.ascontiguousarray(array) for name, array in checkpoint.tensors.items()}
    # One entry, because safetensors writes several in an order that changes from call to call.
    content = to_bytes(tensors, metadata={"streamgd": _digest(tensors, text) + text})
    try:
        write_atomic(path, content)
    except OSError as err:
        raise CheckpointWriteError(
            f"cannot write the checkpoint {path}: {err.strerror or err}. Those before it are untouched: free some "
            "space or mend the folder's permissions, then resume the run"
        ) from err


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and check it.

    Raises
    ------
    CheckpointError
        If the file is damaged or is not a checkpoint.
    ResumeError
        If a newer streamgd wrote it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as err:
        raise CheckpointError(f"{path} is damaged: {err}") from err
    if "streamgd" not in header:
        raise CheckpointError(f"{path} is a safetensors file, but not a streamgd checkpoint")
    digest, text = header["streamgd"][:_DIGEST_LENGTH], header["streamgd"][_DIGEST_LENGTH:]
    if digest != _digest(tensors, text):
        raise CheckpointError(f"{path} is damaged: its content does not match its hash")
    meta = json.loads(text)
    if meta["format"] > FORMAT:
        raise ResumeError(
            f"{path} has format {meta['format']}, this streamgd reads up to {FORMAT}: upgrade streamgd to go on with it"
        )
    return Checkpoint(tensors, meta)


def temporary_name(path: Path) -> Path:
    """Return where a file is written before it gets its name."""
    return path.with_name(path.name + ".tmp")


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, if need be; flushed, so that what is flushed in it can be found again."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _flush_folder(folder.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it, rename it into place and flush the folder."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _flush_folder(path.parent)


class CheckpointFolder:
    """The checkpoints of one run: numbered by rows consumed, the last three kept.

    Parameters
    ----------
    path : Path
        The folder; made when the first checkpoint is saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> list[Path]:
        """Return the checkpoints, newest first."""
        try:
            return sorted((p for p in self.path.iterdir() if p.name.endswith(_SUFFIX)), reverse=True)
        except FileNotFoundError:
            return []

    def save(self, checkpoint: Checkpoint, n_rows: int) -> Path:
        """Write the checkpoint taken after `n_rows` rows, then drop the oldest beyond three.

        Newer ones, which can only be damaged ones that were passed over, do not count among the three.
        """
        try:
            make_folder(self.path)
        except OSError as err:
            raise CheckpointWriteError(f"cannot make the folder {self.path}: {err.strerror or err}") from err
        path = self.path / f"rows-{n_rows:018d}{_SUFFIX}"
        save(path, checkpoint)
        for old in [file for file in self.files() if file <= path][KEPT:]:
            with contextlib.suppress(OSError):
                old.unlink()
        return path

    def load_newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """Load the newest checkpoint that is whole; report each damaged one that is passed over.

        Returns
        -------
        Checkpoint or None
            None if there is no checkpoint at all.

        Raises
        ------
        CheckpointError
            If there are checkpoints and every one is damaged.
        """
        files = self.files()
        for path in files:
            try:
                return load(path)
            except CheckpointError as err:
                report(f"{err}; trying the checkpoint before it")
        if files:
            raise CheckpointError(
                f"none of the {len(files)} checkpoints in {self.path} can be read: the run cannot be resumed; start it "
                "again in a new folder"
            )
        return None

    def remove_leftovers(self) -> None:
        """Delete temporary files that a killed writer left."""
        for path in self._leftovers():
            with contextlib.suppress(OSError):
                path.unlink()

    def _leftovers(self) -> Iterator[Path]:
        with contextlib.suppress(FileNotFoundError):
            yield from [p for p in self.path.iterdir() if p.name.endswith(".tmp")]


def _digest(tensors: dict[str, NDArray[Any]], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=32)
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
