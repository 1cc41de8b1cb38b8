"""Predictions of a fitted model over a source, written as a file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from streamgd.data.sources.base import Source
from streamgd.errors import OptionError, StreamgdError
from streamgd.learn.model import LinearModel
from streamgd.run.scoring import predict_source

#: Rows of a row group of the result: many enough to compress well, few enough to hold.
_GROUP_ROWS = 1 << 17
#: What writes each kind of file, by the end of its name.
_WRITERS: dict[str, Any] = {".parquet": pq.ParquetWriter, ".pq": pq.ParquetWriter, ".csv": csv.CSVWriter}


def write_predictions(model: LinearModel, source: Source, path: Path, *, proba: bool = False) -> int:
    """Predict for every row, in file order, and write the result as it comes.

    Parameters
    ----------
    model : LinearModel
        What predicts.
    source : Source
        Rows; a target is not needed.
    path : Path
        The file, whose name says what it is: ``.parquet`` or ``.pq``, or ``.csv`` with a line of names first. One that
        is there is replaced once the new one is complete.
    proba : bool, default=False
        Whether to write the probability of each class instead of the likeliest class.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    OptionError
        If the name ends otherwise, or `proba` is asked of a model without probabilities; before the file is made.
    SchemaError
        If the number of features is not the model's; before the file is made.
    NonFiniteError
        If a feature is NaN or infinite.
    OSError
        If the file cannot be written.

    Notes
    -----
    The column is ``prediction``, in the labels' own type for classes; for several outputs the columns are
    ``prediction_0``, ``prediction_1``, …; with `proba` there is ``probability_<label>`` for each class.
    """
    kind = _WRITERS.get(path.suffix.lower())
    if kind is None:
        raise OptionError(
            f"{path}: expected a name that ends in .parquet (or .pq) or .csv, which says what kind of file to write"
        )
    pieces = predict_source(model, source, "predict_proba" if proba else "predict")
    schema = _schema(model, proba)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    n_rows = 0
    try:
        with temporary.open("wb") as file:
            with kind(file, schema) as writer:
                for group in _grouped(pieces):
                    columns = [group] if group.ndim == 1 else list(group.T)
                    arrays = [_as_arrow(column, field.type) for column, field in zip(columns, schema, strict=True)]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
                    n_rows += len(group)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as err:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(err, OSError) and not isinstance(err, StreamgdError):
            raise OSError(err.errno, f"cannot write the predictions: {err.strerror or err}", str(path)) from err
        raise
    return n_rows


def _as_arrow(column: NDArray[Any], kind: pa.DataType) -> pa.Array:
    # Arrow takes NumPy's text to end at its first NUL, Python's not.
    return pa.array(column.tolist() if column.dtype.kind == "U" else column, kind)


def _schema(model: LinearModel, proba: bool) -> pa.Schema:
    if proba:
        assert model.classes is not None  # else there are no probabilities
        return pa.schema([(f"probability_{label}", pa.float64()) for label in model.classes.tolist()])
    if model.classes is not None:
        return pa.schema([("prediction", pa.array(model.classes).type)])
    if model.is_vector:
        return pa.schema([("prediction", pa.float64())])
    return pa.schema([(f"prediction_{i}", pa.float64()) for i in range(len(model.coef))])


def _grouped(pieces: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Join small pieces, so that row groups of the result do not follow the blocks of the data."""
    held: list[NDArray[Any]] = []
    n_held = 0
    for piece in pieces:
        held.append(piece)
        n_held += len(piece)
        if n_held >= _GROUP_ROWS:
            yield np.concatenate(held)
            held, n_held = [], 0
    if held:
        yield np.concatenate(held)
