"""Compiled code gives the same bits for every type of CPU, and the cache never gives the bits of older code."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import streamgd
from streamgd.learn import kernels
from streamgd.learn.kernels import entries
from tests.learn.fingerprint import fingerprints

ROOT = Path(__file__).parents[2]
#: One with vectors of 16 bytes, one with 32 and fused multiply-add; each compiles once, so each has one row dtype.
TARGETS = [("nehalem", "float32"), ("haswell", "float64")]


def run(code: list[str], cwd: Path = ROOT, **environment: str) -> str:
    """Run Python in a process of its own, and return what it printed."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_CPU")}
    done = subprocess.run(
        [sys.executable, *code], cwd=cwd, env={**known, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the targets are x86 CPUs")
@pytest.mark.parametrize(("cpu", "dtype"), TARGETS)
def test_every_cpu_type_gives_the_bits_of_this_one(cpu, dtype):
    # Without NUMBA_CPU_FEATURES this CPU's own instructions would be added to those of the named one.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "PYTHONPATH": path}
    theirs = json.loads(run(["-m", "tests.learn.fingerprint", dtype], **environment))
    ours = fingerprints(np.dtype(dtype))
    assert len(set(ours.values())) > 50
    assert [name for name in ours if theirs[name] != ours[name]] == []


MEAN_LOSS = """
import numpy as np
from streamgd.learn.kernels import entries, mean_loss
from streamgd.learn.recipe import Recipe
packed = Recipe().pack(n_classes=0, n_updates=1, mean_weight=1, moments=False)
loss = mean_loss(np.full((2, 1), 3.0), np.ones(2), np.ones((1, 1)), packed.codes, packed.params, np.zeros(0))
print(loss, sum(entries.mean_loss().stats.cache_hits.values()))
"""


def test_an_edited_formula_is_not_answered_from_the_cache(tmp_path):
    """Numba looks only at the file that holds the compiled function; formulas are elsewhere."""
    package, original = tmp_path / "streamgd", Path(streamgd.__file__).parent
    shutil.copytree(original / "learn", package / "learn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("errors.py", "compiling.py"):
        shutil.copy(original / name, package)
    (package / "__init__.py").touch()
    environment = {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def answer() -> tuple[float, int]:
        loss, hits = run(["-c", MEAN_LOSS], cwd=tmp_path, **environment).split()
        return float(loss), int(hits)

    assert answer() == (2.0, 0)
    assert answer() == (2.0, 1)
    formulas = package / "learn" / "kernels" / "losses.py"
    text = formulas.read_text(encoding="utf-8")
    formula = "return 0.5 * r * r, r,"
    assert text.count(formula) == 1
    formulas.write_text(text.replace(formula, formula.replace("0.5", "0.75")), encoding="utf-8")
    assert answer() == (3.0, 0)


def test_the_hash_of_the_source_leaves_no_file_out():
    package = Path(kernels.__file__).parent
    assert {path.stem for path in package.glob("*.py")} - {"__init__"} == set(entries.SOURCES)
