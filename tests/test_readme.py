"""What the README says is so: its commands run, its Python prints what it says, its tables are the code's."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from ast import literal_eval
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import sklearn.linear_model

import streamgd
from streamgd.cli import main
from streamgd.learn.optimizers import OPTIMIZERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def rows_of_table(head: str) -> list[list[str]]:
    """Return the cells of the table that begins with a head."""
    table = README[README.index(head) :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def literals(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory):
    """Run the README's Python as it stands, in an empty folder; return the folder and what was printed."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "quick_start.py").write_text("".join(blocks("python")))
    paths = [str(Path(streamgd.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "quick_start.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


def test_python_prints_what_the_readme_says(quick_start):
    said = [line.partition("  # ")[2] for line in "".join(blocks("python")).splitlines() if line.startswith("print(")]
    assert len(said) >= 6
    assert quick_start[1].splitlines() == said


def test_command_lines_do_what_the_readme_says(quick_start, monkeypatch):
    folder, _ = quick_start
    monkeypatch.chdir(folder)
    shown = {}
    for line in "".join(blocks("bash")).splitlines():
        if line.startswith("streamgd "):
            args = shlex.split(line)[1:]
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                assert main(args) == 0, line
            shown[args[0]] = output.getvalue()
    assert list(shown) == ["inspect", "train", "resume", "evaluate", "predict"]
    assert "200,000 rows in 100 blocks" in shown["inspect"]
    assert "5 epochs" in shown["train"]
    assert "8 epochs" in shown["resume"]
    assert float(re.search(r"r2 +([\d.]+)", shown["evaluate"])[1]) == pytest.approx(0.984, abs=0.001)
    assert pq.read_metadata(folder / "predictions.parquet").num_rows == 200_000
    assert {"config.json", "metrics.jsonl", "checkpoints"} <= {path.name for path in (folder / "runs/homes").iterdir()}


@pytest.mark.parametrize("start", ["pip install . ", "pip install '.[test]' "])
def test_there_is_one_line_of_each_for_ci_to_take(start):
    lines = [line for line in README.splitlines() if line.startswith(start)]
    assert lines == [start + ("&& streamgd demo" if start == "pip install . " else "&& pytest")]
    assert any(lines[0] in block for block in blocks("bash"))


def test_table_of_optimizers_is_complete():
    table = {literals(name)[0]: tuple(literals(rates)) for name, rates in rows_of_table("| `optimizer` |")}
    assert table == {name: ("auto", *optimizer.learning_rates) for name, optimizer in OPTIMIZERS.items()}


def test_table_of_defaults_is_true():
    for cells in rows_of_table("| parameter | scikit-learn |"):
        name = literals(cells[0])[0]
        for module, cell in ((sklearn.linear_model, cells[1]), (streamgd, cells[2])):
            for kind in ("SGDClassifier",) if "classifier" in cells[0] else ("SGDClassifier", "SGDRegressor"):
                parameters = inspect.signature(getattr(module, kind)).parameters
                if literals(cell):
                    assert parameters[name].default == literal_eval(literals(cell)[0]), (name, kind)
                else:
                    assert name not in parameters  # in words, because there is no such parameter


def test_default_that_is_not_in_the_table_is_scikit_learns():
    listed = {literals(cells[0])[0] for cells in rows_of_table("| parameter | scikit-learn |")}
    by_optimizer = {"learning_rate", "eta0"}  # under "Optimizer"
    for kind in ("SGDClassifier", "SGDRegressor"):
        theirs = inspect.signature(getattr(sklearn.linear_model, kind)).parameters
        ours = inspect.signature(getattr(streamgd, kind)).parameters
        for name in (theirs.keys() & ours.keys()) - listed - by_optimizer:
            assert ours[name].default == theirs[name].default, (kind, name)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists() or (ROOT / "streamgd/learn" / target).exists(), target


def test_changelog_and_package_agree_on_the_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert newest == project["version"] == streamgd.__version__
