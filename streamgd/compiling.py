"""What compiled code follows from, as a name for it in Numba's cache.

That looks for changes only in the file that holds a compiled function, not in those of what it calls; and processes on
different CPUs may write at the same time what they find under one name. So the names of compiled functions, which are
those of their files, end in a hash of all that their code follows from but the types.
"""

from __future__ import annotations

import hashlib
import pkgutil

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
