"""What ``import streamgd`` offers, and what it costs."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import streamgd

HEAVY = {"numpy", "sklearn", "scipy", "numba", "pyarrow", "dask", "distributed", "h5py", "pandas", "rich", "click"}
ROOT = Path(streamgd.__file__).parent


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_public_names_are_these() -> None:
    assert set(streamgd.__all__) == {
        "SGDClassifier",
        "SGDRegressor",
        "StreamgdError",
        "__version__",
        "errors",
        "load",
        "open_source",
        "stream",
    }


@pytest.mark.parametrize("name", streamgd.__all__)
def test_every_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(streamgd, name) is not None
    assert name in dir(streamgd)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'SGDRegresor'"):
        _ = streamgd.SGDRegresor


def test_errors_have_one_base() -> None:
    classes = [found for _, found in inspect.getmembers(streamgd.errors, inspect.isclass)]
    assert all(issubclass(found, streamgd.StreamgdError) for found in classes)


@pytest.mark.parametrize("name", ["SGDClassifier", "SGDRegressor", "load", "open_source"])
def test_examples_in_docstrings_hold(name: str) -> None:
    found = getattr(streamgd, name)
    failed, attempted = 0, 0
    for example in doctest.DocTestFinder(recurse=False).find(found, name, globs={"streamgd": streamgd}):
        result = doctest.DocTestRunner().run(example)
        failed, attempted = failed + result.failed, attempted + result.attempted
    assert failed == 0
    assert attempted > 0


@pytest.mark.parametrize("kind", ["SGDClassifier", "SGDRegressor"])
def test_every_parameter_and_attribute_is_documented(kind: str) -> None:
    cls = getattr(streamgd, kind)
    described = re.findall(r"^    (\w+) : ", inspect.cleandoc(cls.__doc__).replace("\n", "\n    "), re.MULTILINE)
    parameters = list(inspect.signature(cls).parameters)
    assert described[: len(parameters)] == parameters
    model = cls(max_iter=1).fit([[0.0], [1.0], [2.0]], [0, 1, 1])
    public = {name for name in vars(model) if name.endswith("_") and not name.startswith("_")}
    assert public <= set(described[len(parameters) :])


def test_import_loads_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import streamgd; took = time.perf_counter() - began; "
        "print(took, *{name.partition('.')[0] for name in sys.modules})"
    )
    took, *modules = run_python(code).split()
    assert not HEAVY & set(modules)
    # The best of a few: other processes may be busy.
    assert min(float(took), *(float(run_python(code).split()[0]) for _ in range(2))) < 0.3


def test_sources_open_without_scikit_learn() -> None:
    code = "import sys, streamgd; streamgd.open_source; streamgd.stream; print(*sys.modules)"
    assert not {"sklearn", "h5py", "pyarrow", "dask", "pandas"} & set(run_python(code).split())


def imports_of(path: Path) -> set[str]:
    """Return the modules of this package that a file imports when it runs, those in functions included."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("streamgd")}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("data", ("streamgd.learn", "streamgd.run", "streamgd.estimators", "streamgd.commands")),
        ("learn", ("streamgd.data", "streamgd.run", "streamgd.estimators", "streamgd.commands")),
        ("run", ("streamgd.estimators", "streamgd.commands", "streamgd.cli")),
        ("estimators", ("streamgd.commands", "streamgd.cli")),
    ],
)
def test_packages_import_only_what_lies_below_them(package: str, forbidden: tuple[str, ...]) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): name for path in files for name in imports_of(path) if name.startswith(forbidden)
    }
    assert wrong == {}


def test_run_does_not_need_scikit_learn() -> None:
    code = "import sys, streamgd.run.loop, streamgd.run.scoring, streamgd.run.continuing; print(*sys.modules)"
    assert not {"sklearn", "distributed"} & set(run_python(code).split())
