"""The versions behind a run's results, and which of them have to be the same everywhere."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

import streamgd

#: What must be equal for equal bits: our own code, what compiles it, and what merges states.
COMPARED = ("streamgd", "numba", "numpy")


def versions() -> dict[str, str]:
    """Return the versions and the machine's type, to be stored; on resume they inform and are not compared."""
    import numba

    cpu, features = _cpu()
    return {
        "streamgd": streamgd.__version__,
        "numpy": np.__version__,
        "numba": numba.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": cpu,
        "cpu_features": features,
    }


@cache
def _cpu() -> tuple[str, str]:
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def differing_versions(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Say which versions differ so that results could; None if none does."""
    return (
        "; ".join(
            f"{name} {there.get(name, 'missing')} there, {here[name]} here"
            for name in COMPARED
            if there.get(name) != here[name]
        )
        or None
    )
