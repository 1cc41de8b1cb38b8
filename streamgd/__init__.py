"""Linear models of tables larger than memory: HDF5, Parquet and Dask arrays in, coefficients out.

====================================  ===================================================================
``SGDRegressor``, ``SGDClassifier``   estimators with scikit-learn's conventions
``open_source``                       opens data where it lies, for `fit`, `predict` and `stream`
``stream``                            shuffled batches of a source for somebody else's model
``load``                              the fitted estimator of a run folder
``StreamgdError``                     base of every error; the tree of them is in ``streamgd.errors``
====================================  ===================================================================

How the package is laid out, in the order in which data flows::

    data/          blocks to shuffled windows: sources, the plan of an epoch, reading ahead
    learn/         rows to coefficients: losses, optimizers, the compiled updater
    run/           the loop that joins the two; survey, checkpoints, scoring
    estimators/    scikit-learn's conventions over run/
    cli.py         the command line, `streamgd`, with commands/

Names are imported when they are first used, so that ``import streamgd`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamgd import errors
    from streamgd.data.sources import open_source
    from streamgd.data.stream import stream
    from streamgd.errors import StreamgdError
    from streamgd.estimators import SGDClassifier, SGDRegressor, load

__version__ = "0.1.0"

__all__ = [
    "SGDClassifier",
    "SGDRegressor",
    "StreamgdError",
    "__version__",
    "errors",
    "load",
    "open_source",
    "stream",
]

_HOME = {
    "SGDClassifier": "streamgd.estimators",
    "SGDRegressor": "streamgd.estimators",
    "StreamgdError": "streamgd.errors",
    "load": "streamgd.estimators",
    "open_source": "streamgd.data.sources",
    "stream": "streamgd.data.stream",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "errors":
        return importlib.import_module("streamgd.errors")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List public names, imported or not."""
    return sorted({*globals(), *__all__})
