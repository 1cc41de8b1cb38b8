"""Who may import whom: the layers of the design, walked by AST; and that importing the package stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamgd
from streamgd.learn.kernels.entries import SOURCES

PACKAGE = Path(streamgd.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
#: Nothing of these is imported before it is used.
HEAVY = ("sklearn", "distributed", "dask", "pandas", "h5py", "pyarrow", "numba", "rich")


def imports_of(tree: ast.AST, module: str, is_package: bool, *, everywhere: bool = True) -> Iterator[str]:
    """Yield full names of what a module imports; only what runs on import unless `everywhere`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            if node.level:
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, node.module] if node.module else parts)
            else:
                base = node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            if everywhere:
                yield from imports_of(node, module, is_package)
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports_of(node, module, is_package, everywhere=everywhere)


def imported(module: str, *, everywhere: bool = True) -> set[str]:
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return set(imports_of(tree, module, path.name == "__init__.py", everywhere=everywhere))


def within(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if any(name == package or name.startswith(f"{package}.") for package in packages)}


def members(package: str) -> list[str]:
    return sorted(within(set(MODULES), package))


def test_the_walk_sees_every_kind_of_import():
    source = """
import a.b, c
from d import e
from . import f
from .g import h
from ..i import j
if TYPE_CHECKING:
    import types_only
try:
    import k
except ImportError:
    pass
class C:
    import l
def lazily():
    import m
    from n.o import p
"""
    tree = ast.parse(source)
    always = {"a.b", "c", "d", "d.e", "x.y", "x.y.f", "x.y.g", "x.y.g.h", "x.i", "x.i.j", "k", "l"}
    assert set(imports_of(tree, "x.y.z", False, everywhere=False)) == always
    assert set(imports_of(tree, "x.y.z", False)) == always | {"types_only", "m", "n.o", "n.o.p"}
    assert "x.y.z.f" in set(imports_of(tree, "x.y.z", True))


FRONTS = ["streamgd.estimators", "streamgd.commands", "streamgd.cli", "streamgd.demo"]


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("streamgd.data", ["streamgd.learn", "streamgd.run", *FRONTS]),
        ("streamgd.learn", ["streamgd.data", "streamgd.run", *FRONTS]),
        ("streamgd.run", FRONTS),
        ("streamgd.errors", ["streamgd"]),
    ],
)
def test_layers(package, never):
    assert members(package)
    for module in members(package):
        assert not within(imported(module), *never), module


@pytest.mark.parametrize("part", ["streamgd.data", "streamgd.learn"])
def test_run_joins_the_two(part):
    assert any(within(imported(module), part) for module in members("streamgd.run"))


@pytest.mark.parametrize("front", ["streamgd.estimators", "streamgd.commands"])
def test_the_fronts_stand_on_run(front):
    assert any(within(imported(module), "streamgd.run") for module in members(front))


def test_the_command_line_is_its_commands():
    assert within(imported("streamgd.cli"), "streamgd.commands")


@pytest.mark.parametrize("module", members("streamgd.run"))
def test_run_does_without_scikit_learn_and_distributed_until_they_are_used(module):
    assert not within(imported(module, everywhere=False), "sklearn", "distributed", "dask.distributed")


def test_learn_touches_arrays_only():
    for module in members("streamgd.learn"):
        assert not within(imported(module), "os", "io", "pathlib", "threading", "concurrent", "dask", "h5py", "pyarrow")


def test_only_one_module_of_learn_is_compiled():
    """Numba's cache sees only changes of the file that holds the compiled function: its name holds all other files'."""
    compiled = [module for module in members("streamgd.learn") if within(imported(module), "numba")]
    assert compiled == ["streamgd.learn.kernels.entries"]
    sources = {module.rpartition(".")[2] for module in members("streamgd.learn.kernels")} - {"kernels"}
    assert sources == set(SOURCES)


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, streamgd; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
