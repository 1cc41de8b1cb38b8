"""The exceptions of streamgd.

Every one says what was found, what was expected and the way out::

    StreamgdError
    ├── OptionError (ValueError)           an option, or a pair of options, that cannot be used
    │   └── BufferTooSmallError            the memory plan does not fit; says how much is needed
    ├── DataError (ValueError)             the data cannot be used as given
    │   ├── SourceNotFoundError (FileNotFoundError)   no such file, dataset or column
    │   ├── SchemaError                    types, shapes or row counts that do not agree
    │   ├── EmptySourceError               no rows
    │   ├── NonFiniteError                 NaN, infinity or null where a number is needed
    │   └── CorruptDataError               a file that cannot be read to its end
    ├── RunError (RuntimeError)            a run folder, or what it holds
    │   ├── RunExistsError                 the folder already holds another run
    │   ├── RunLockedError                 another process is writing to it
    │   ├── RunNotFoundError               no run there to load or resume
    │   ├── CheckpointError                no checkpoint can be read
    │   ├── CheckpointWriteError           a checkpoint cannot be written; the one before is still good
    │   └── ResumeError                    data, configuration or format differ from the run's
    ├── ClusterError (RuntimeError)        a cluster that cannot train: no workers, a lost scheduler
    │   └── UnfitWorkerError               a worker that cannot take part, found before training starts
    ├── CacheError (RuntimeError)          a cache that cannot be written
    ├── DivergenceError (ArithmeticError)  the coefficients left the finite numbers
    └── RowAccountingError (RuntimeError)  an epoch did not see each row exactly once; always a bug or changing data

Catching `StreamgdError` catches all of them; each also is the built-in exception a Python user would expect.
"""

from __future__ import annotations


class StreamgdError(Exception):
    """Base of every error that streamgd raises on purpose."""


class OptionError(StreamgdError, ValueError):
    """An option, or a combination of options, that cannot be used."""


class BufferTooSmallError(OptionError):
    """The memory plan does not fit in the buffer.

    Attributes
    ----------
    needed_bytes : int
        The smallest buffer that would do.
    """

    def __init__(self, message: str, needed_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        """Keep both arguments when the error crosses a process boundary."""
        return type(self), (str(self), self.needed_bytes)


class DataError(StreamgdError, ValueError):
    """The data cannot be used as given."""


class SourceNotFoundError(DataError, FileNotFoundError):
    """No such file, dataset or column."""

    def __reduce__(self) -> tuple[type, tuple[str]]:
        """Be made anew when the error crosses a process boundary: its bases disagree on how to be copied."""
        return type(self), (str(self),)


class SchemaError(DataError):
    """Types, shapes or row counts that do not agree."""


class EmptySourceError(DataError):
    """A source without rows."""


class NonFiniteError(DataError):
    """NaN, infinity or null where a finite number is needed."""


class CorruptDataError(DataError):
    """A file that cannot be read to its end."""


class RunError(StreamgdError, RuntimeError):
    """Something is wrong with a run folder, or with what it holds."""


class RunExistsError(RunError):
    """The folder already holds another run."""


class RunLockedError(RunError):
    """Another process is writing to the run folder."""


class RunNotFoundError(RunError):
    """There is no run to load or resume."""


class CheckpointError(RunError):
    """No checkpoint of the run can be read."""


class CheckpointWriteError(RunError):
    """A checkpoint cannot be written; the one before it is untouched."""


class ResumeError(RunError):
    """Data, configuration or format differ from those of the run."""


class ClusterError(StreamgdError, RuntimeError):
    """A cluster cannot train: it has no workers, or they cannot take part, or the scheduler is lost."""


class UnfitWorkerError(ClusterError):
    """A worker cannot take part: it has other versions, cannot read the data, or has too little memory."""


class CacheError(StreamgdError, RuntimeError):
    """A cache cannot be written."""


class DivergenceError(StreamgdError, ArithmeticError):
    """The coefficients left the finite numbers."""


class RowAccountingError(StreamgdError, RuntimeError):
    """An epoch did not see every row exactly once."""
