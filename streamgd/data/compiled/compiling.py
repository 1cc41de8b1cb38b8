"""Where Numba comes in: functions without the interpreter lock, whose machine code is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

from streamgd.compiling import digest, kept

_F = TypeVar("_F", bound=Callable[..., Any])

#: The modules that compiled functions call one another in.
SOURCES = (
    *("arrow", "checksums", "classes", "combining", "compiling", "flat", "hdf5", "memory", "parquet_footer"),
    *("parquet_headers", "parquet_members", "parquet_pages", "parquet_values", "placing", "scaling", "shuffle"),
    *("slices", "snappy"),
)


@cache
def _digest() -> str:
    return digest(*(f"{__package__}.{name}" for name in SOURCES))


def compiled(function: _F) -> _F:
    """Compile a function when it is first called, and keep what comes of it under a name of this source."""
    function.__qualname__ += f"_{_digest()}"
    return cast(_F, kept(function))
