"""The run folder: ``config.json``, ``metrics.jsonl`` and ``checkpoints/``, with one writer at a time.

All that the other commands need to go on with a run, predict from it or judge it is in here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from streamgd.errors import (
    CheckpointWriteError,
    ResumeError,
    RunError,
    RunExistsError,
    RunLockedError,
    RunNotFoundError,
)
from streamgd.run.checkpoint import (
    FORMAT,
    Checkpoint,
    CheckpointFolder,
    make_folder,
    temporary_name,
    write_atomic,
)

#: Records of windows reach the file so often, in seconds, and with every checkpoint.
_FLUSH_S = 0.25


class RunFolder:
    """A folder that holds one run.

    Use it as a context manager to write: it is then locked against a second writer until the block ends or the process
    dies. Reading needs no lock.

    Parameters
    ----------
    path : path-like
        The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints = CheckpointFolder(self.path / "checkpoints")
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None
        self._flushed_at = float("-inf")

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self._description_path.exists()

    # --- locking ---
    def __enter__(self) -> Self:
        """Make the folder if need be, and lock it."""
        try:
            make_folder(self.path)
            lock = (self.path / "lock").open("a")
        except OSError as err:
            raise RunError(
                f"cannot write to the run folder {self.path}: {err.strerror or err}. Choose another folder or mend its "
                "permissions"
            ) from err
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            lock.close()
            raise RunLockedError(
                f"the run folder {self.path} is in use by another process: wait until it ends, or choose another folder"
            ) from err
        self._lock = lock
        self._remove_leftovers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the metrics and release the lock."""
        self._close_metrics()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _remove_leftovers(self) -> None:
        """Delete temporary files that a killed writer left; none but ours."""
        self.checkpoints.remove_leftovers()
        for path in (self._description_path, self._metrics_path):
            with contextlib.suppress(OSError):
                temporary_name(path).unlink()

    # --- the run's description ---
    @property
    def _description_path(self) -> Path:
        return self.path / "config.json"

    def start(self, description: dict[str, Any], *, replace: bool = False) -> None:
        """Begin a run in this folder.

        Parameters
        ----------
        description : dict of str to JSON value
            What ``config.json`` says.
        replace : bool, default=False
            Whether a run that is already here is removed.

        Raises
        ------
        RunExistsError
            If there is a run and `replace` is False.
        """
        self.require_free(replace=replace)
        # The description goes last: as long as it is there, what is here is known to be a run's.
        shutil.rmtree(self.checkpoints.path, ignore_errors=True)
        try:
            self._metrics_path.unlink(missing_ok=True)
        except OSError as err:
            raise self._unwritable_metrics(err) from err
        self.describe(description)

    def require_free(self, *, replace: bool = False) -> None:
        """Refuse a folder that a new run cannot begin in; see `start`."""
        if self.holds_run and not replace:
            raise RunExistsError(
                f"{self.path} already holds a run: `streamgd resume {self.path}` goes on with it; for a new run choose "
                "another folder"
            )
        if not self.holds_run and (self.checkpoints.path.exists() or self._metrics_path.exists()):
            raise RunExistsError(
                f"{self.path} holds no run, but {self.checkpoints.path.name!r} or {self._metrics_path.name!r} of "
                "something else, which a run would overwrite: choose another folder"
            )

    def discard(self) -> None:
        """Undo `start`, for a run that could not begin."""
        with contextlib.suppress(OSError):
            self._description_path.unlink()

    def describe(self, description: dict[str, Any]) -> None:
        """Write ``config.json``."""
        text = json.dumps({"format": FORMAT, **description}, indent=2, sort_keys=True)
        try:
            write_atomic(self._description_path, (text + "\n").encode())
        except OSError as err:
            raise CheckpointWriteError(f"cannot write {self._description_path}: {err.strerror or err}") from err

    def description(self) -> dict[str, Any]:
        """Read ``config.json``.

        Raises
        ------
        RunNotFoundError
            If there is none.
        ResumeError
            If a newer streamgd wrote it, or it is damaged.
        """
        path = self._description_path
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError as err:
            raise RunNotFoundError(
                f"{self.path} holds no run (no {path.name} in it): `streamgd train … --run {self.path}` starts one"
            ) from err
        except NotADirectoryError as err:
            raise RunNotFoundError(f"{self.path} is not a run folder but a file") from err
        except ValueError as err:
            raise ResumeError(f"{path} is damaged: {err}") from err
        if not isinstance(found, dict) or not isinstance(found.get("format"), int):
            raise ResumeError(f"{path} is damaged: it does not describe a run")
        if found["format"] > FORMAT:
            raise ResumeError(
                f"{path} has format {found['format']}, this streamgd reads up to {FORMAT}: upgrade streamgd to use it"
            )
        return found

    def newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """Load the newest whole checkpoint; see `CheckpointFolder.load_newest`."""
        return self.checkpoints.load_newest(report)

    # --- metrics ---
    @property
    def _metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def cut_metrics(self, cursor: tuple[int, int, int]) -> None:
        """Drop the records of windows that the run, at `cursor`, has not finished: they will be written again."""
        self.take_metrics(self, cursor)

    def take_metrics(self, other: RunFolder, cursor: tuple[int, int, int]) -> None:
        """Have the records of another run of the windows that were finished at `cursor`, and no others."""
        self._close_metrics()
        try:
            found = other._metrics_path.read_text(errors="replace")
        except FileNotFoundError:
            return
        kept = "".join(line + "\n" for line in found.splitlines() if _is_before(line, cursor))
        if kept != found or other is not self:
            try:
                write_atomic(self._metrics_path, kept.encode())
            except OSError as err:
                raise self._unwritable_metrics(err) from err

    def save(self, checkpoint: Checkpoint, n_rows: int) -> None:
        """Save a checkpoint, and before it flush the metrics that belong to it; see `CheckpointFolder.save`."""
        self._require_place()
        if self._metrics is not None:
            try:
                self._flush_metrics(self._metrics)
                os.fsync(self._metrics.fileno())
            except OSError as err:
                raise self._unwritable_metrics(err) from err
        self.checkpoints.save(checkpoint, n_rows)

    def _require_place(self) -> None:
        """Make sure that the folder is the one that was locked: another run may have begun in one of the same name."""
        if self._lock is None:
            return
        mine, there = os.fstat(self._lock.fileno()), None
        with contextlib.suppress(OSError):
            there = (self.path / "lock").stat()
        if there is None or not os.path.samestat(mine, there):
            raise CheckpointWriteError(
                f"the run folder {self.path} was removed or replaced while its run was training, so that nothing more "
                "can be saved there: start the run again, in a folder that nobody removes"
            )

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # what a checkpoint needs was flushed before it was written
                self._metrics.close()
            self._metrics = None

    def _flush_metrics(self, metrics: IO[str]) -> None:
        metrics.flush()
        self._flushed_at = time.monotonic()

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a record to ``metrics.jsonl``."""
        try:
            if self._metrics is None:
                self._metrics, self._flushed_at = self._metrics_path.open("a"), float("-inf")
            self._metrics.write(json.dumps(record) + "\n")
            if time.monotonic() - self._flushed_at >= _FLUSH_S:  # for whoever looks; what is lost is written again
                self._flush_metrics(self._metrics)
        except OSError as err:
            raise self._unwritable_metrics(err) from err

    def _unwritable_metrics(self, err: OSError) -> CheckpointWriteError:
        return CheckpointWriteError(
            f"cannot write {self._metrics_path}: {err.strerror or err}. The checkpoints are untouched: free some "
            "space or mend the folder's permissions, then resume the run"
        )


def _is_before(line: str, cursor: tuple[int, int, int]) -> bool:
    """Whether a record belongs to a window that was finished at the cursor. A torn last line does not."""
    try:
        record = json.loads(line)
        where = (record["epoch"], record["window"])
    except (ValueError, KeyError, TypeError):
        return False
    # An epoch's own record says window null and comes after all its windows.
    epoch = int(where[0])
    return epoch < cursor[0] or (epoch == cursor[0] and where[1] is not None and int(where[1]) < cursor[1])
