"""The cache never answers with older code, also where what changed is in another file than the compiled function."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

import streamgd
from streamgd import compiling
from streamgd.data import compiled
from streamgd.data.compiled.compiling import SOURCES

PLACE = """
import numpy as np
from streamgd.data.compiled.placing import place_identities
ids = np.zeros(1, np.uint64)
place_identities(0, 7, np.zeros(1, np.int32), ids)
print(ids[0], sum(place_identities.stats.cache_hits.values()))
"""


def test_an_edited_function_is_not_answered_from_the_cache_of_its_callers(tmp_path: Path) -> None:
    package, original = tmp_path / "streamgd", Path(streamgd.__file__).parent
    shutil.copytree(original / "data" / "compiled", package / "data" / "compiled")
    shutil.copy(original / "compiling.py", package)
    for folder in (package, package / "data"):
        (folder / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def answer() -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", PLACE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found, hits = done.stdout.split()
        return int(found), int(hits)

    first, hits = answer()
    assert hits == 0
    assert answer() == (first, 1)
    callee = package / "data" / "compiled" / "checksums.py"
    text = callee.read_text(encoding="utf-8")
    formula = "return z ^ (z >> np.uint64(31))"
    assert text.count(formula) == 1
    callee.write_text(text.replace(formula, "return z"), encoding="utf-8")
    changed, hits = answer()
    assert (changed != first, hits) == (True, 0)


def test_the_hash_of_the_source_leaves_no_file_out() -> None:
    found = {path.stem for path in Path(compiled.__file__).parent.glob("*.py")}
    assert found - {"__init__"} == set(SOURCES)


def test_what_cannot_be_kept_is_compiled_by_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the user of a service, who has no home and may not write where packages are."""
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    compiling._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        doubled = compiling.kept(lambda number: 2 * number)
    assert doubled(4) == 8
