"""What compiled code follows from, as a name for it in Numba's cache.

That looks for changes only in the file that holds a compiled function, not in those of what it calls; and processes on
different CPUs may write at the same time what they find under one name. So the names of compiled functions, which are
those of their files, end in a hash of all that their code follows from but the types.
"""

from __future__ import annotations

import hashlib
import pkgutil
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite
import numba
from numba.core.registry import cpu_target


def digest(*modules: str) -> str:
    """Hash the source of some modules, with the compilers and the CPU.

    Parameters
    ----------
    *modules : str
        Their full names.
    """
    cpu = cpu_target.target_context.codegen().magic_tuple()
    found = hashlib.blake2b(repr((numba.__version__, llvmlite.__version__, cpu)).encode(), digest_size=6)
    for module in modules:
        package, _, name = module.rpartition(".")
        found.update(pkgutil.get_data(package, f"{name}.py") or b"")
    return found.hexdigest()


def kept(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function when it is first called, without the interpreter lock, and keep what comes of it.

    Beside its source, or else in the user's cache or in ``NUMBA_CACHE_DIR``. Where none of them can be written, as for
    the user of a service who has no home, each process compiles for itself, and a warning says so.
    """
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError as err:
        if "cannot cache" not in str(err):
            raise
        _warn_once()
        return numba.njit(nogil=True, **options)(function)


@cache
def _warn_once() -> None:
    warnings.warn(
        "compiled code cannot be kept, since neither the folder of streamgd nor the user's cache can be written: every "
        "process will compile what it needs, which takes some ten seconds. Set NUMBA_CACHE_DIR to a folder that can be "
        "written",
        RuntimeWarning,
        stacklevel=2,
    )
